r"""Progress bars of a campaign: one per level, with what was spent and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

__all__ = ["Progress"]

_FORMAT = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} rows [{elapsed}{postfix}]"


@dataclass
class Progress:
    r"""Bars of several streams of rows.

    Args:
        labels: What each stream is called.
        totals: Rows wanted of each.
        done: Rows each has already.
        costs: Declared cost of one row of each; `None` to show seconds.
        show: Whether anything is drawn.
    """

    labels: Sequence[str]
    totals: Sequence[int]
    done: Sequence[int]
    costs: Sequence[float] | None
    show: bool
    bars: list[Any] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __enter__(self) -> Progress:
        width = max(map(len, self.labels), default=0)
        self.rows, self.seconds = list(self.done), [0.0] * len(self.labels)
        self._begun, self._new = time.monotonic(), [0] * len(self.labels)
        for label, total, done in zip(self.labels, self.totals, self.done, strict=True):
            self.bars.append(tqdm(total=total, initial=done, desc=f"{label:{width}s}", unit="row", leave=False,
                                  bar_format=_FORMAT, disable=not self.show or not total))
        return self

    def __exit__(self, *error: object) -> None:
        for bar in reversed(self.bars):
            bar.close()

    def extend(self, stream: int, rows: int) -> None:
        """More rows are wanted of a stream."""
        bar = self.bars[stream]
        bar.total += rows
        bar.refresh()

    def advance(self, stream: int, rows: int, seconds: float, *, width: int = 1) -> None:
        """Rows of a stream are done, which took their simulators so many seconds; `width` of them run at a time."""
        self.rows[stream] += rows
        self._new[stream] += rows
        self.seconds[stream] += seconds
        if not self.show:
            return
        bar = self.bars[stream]
        spent = f"cost {self.rows[stream] * self.costs[stream]:.4g}" if self.costs else f"{self.seconds[stream]:.3g} s"
        left = max(bar.total - self.rows[stream], 0) * self.seconds[stream] / max(self._new[stream], 1) / width
        bar.set_postfix_str(f"{spent}, {tqdm.format_interval(left)} left", refresh=False)
        bar.update(rows)
