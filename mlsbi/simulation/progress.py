r"""Progress bars of a campaign: one per level, with what was spent and how long the rest will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

__all__ = ["Progress"]

_LOG_PAUSE = 60.0  # seconds between two lines, where bars go to a file
_FORMAT = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} rows [{elapsed}{postfix}]"


@dataclass
class Progress:
    r"""Bars of several streams of rows.

    Args:
        labels: What each stream is called.
        totals: Rows wanted of each.
        done: Rows each has already, runs of its dearest level behind them, and the seconds they took.
        costs: Declared cost of one row of each; `None` to show seconds.
        show: Whether anything is drawn.
    """

    labels: Sequence[str]
    totals: Sequence[int]
    done: Sequence[tuple[int, int, float]]
    costs: Sequence[float] | None
    show: bool
    bars: list[Any] = field(default_factory=list)

    def __enter__(self) -> Progress:
        width = max(map(len, self.labels), default=0)
        self._rows, self._runs, self._seconds = (list(column) for column in zip(*self.done, strict=True))
        notebook = any("notebook" in base.__module__ for base in tqdm.__mro__)
        pause = 0.1 if notebook or sys.stderr.isatty() else _LOG_PAUSE  # a log is not drawn over
        for stream, (label, total) in enumerate(zip(self.labels, self.totals, strict=True)):
            self.bars.append(tqdm(total=total, initial=self._rows[stream], desc=f"{label:{width}s}", unit="row",
                                  leave=False, bar_format=_FORMAT, mininterval=pause, maxinterval=max(pause, 10),
                                  disable=not self.show or not total))
            self._tell(stream, width=1)
        return self

    def __exit__(self, *error: object) -> None:
        for bar in reversed(self.bars):
            bar.close()

    def extend(self, stream: int, rows: int) -> None:
        """More rows are wanted of a stream."""
        self.bars[stream].total += rows

    def advance(self, stream: int, rows: int, seconds: float, *, runs: int, width: int = 1) -> None:
        """Rows of a stream are done, which took their simulators so many seconds and its dearest level so many runs.

        `width` of them run at a time.
        """
        self._rows[stream] += rows
        self._runs[stream] += runs
        self._seconds[stream] += seconds
        if self.show:
            self._tell(stream, width=width)
            self.bars[stream].update(rows)

    def refresh(self) -> None:
        """Draws the bars again where that is due: time passes, though no row is done."""
        for bar in self.bars if self.show else ():
            if not bar.disable and time.time() - bar.last_print_t >= max(bar.mininterval, 1.0):
                bar.refresh()
                bar.last_print_t = time.time()

    def _tell(self, stream: int, *, width: int) -> None:
        spent = f"{self._seconds[stream]:.3g} s"
        if self.costs:
            spent = f"cost {self._runs[stream] * self.costs[stream]:.4g}"
        rows, left = self._rows[stream], "?"
        if rows:
            left = tqdm.format_interval((self.bars[stream].total - rows) * self._seconds[stream] / rows / width)
        self.bars[stream].set_postfix_str(f"{spent}, {left} left", refresh=False)
