r"""What a campaign wants of one stream of rows, and what came back so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mlsbi.levels import Level
from mlsbi.store.records import OK, STATUSES, Records, Stream

__all__ = ["MISSING", "Batch", "Source", "Term", "cut_missing"]

MISSING = len(STATUSES)
"""In place of a status, of rows not run."""


class Source(Protocol):
    """Where a stream's rows come from."""

    def rows(self, start: int, stop: int) -> tuple[Tensor, Any]:
        """Theta and noise of rows `start:stop`."""
        ...


@dataclass
class Term:
    r"""One stream of rows on which the same levels are run, and what came back so far.

    Args:
        levels: The levels.
        stream: Their stream.
        source: Draws theta and noise.
        n: Finished rows wanted; with gaps, rows wanted.
        first: Row of the stream to begin with.
        label: What progress and errors call it.
        proven: Whether rows of its levels were finished elsewhere: it is not given up if its first ones fail.
    """

    levels: Sequence[Level]
    stream: Stream
    source: Source
    n: int
    first: int = 0
    label: str = ""
    proven: bool = False
    place: int = 0
    status: Any = None
    theta: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)
    dtypes: list[Any] = field(default_factory=list)
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)  # row: status in words, message
    missing: deque[tuple[int, int]] = field(default_factory=deque)
    runs: Any = None
    seconds: Any = None
    room: int = 0  # rows that the tensors have place for
    batch: int = 0  # rows of the next one
    row_seconds: float = 0.0  # of the last one

    def __post_init__(self) -> None:
        self.label = self.label or self.levels[-1].name
        self.status, self.room = np.full(self.n, MISSING, np.uint8), self.n
        self.runs, self.seconds = np.zeros(len(self.levels), np.int64), np.zeros(len(self.levels))
        self.dtypes = [None] * len(self.levels)

    @property
    def stop(self) -> int:
        """Row behind the last that is wanted."""
        return self.first + len(self.status)

    @property
    def done(self) -> int:
        """Rows run, failed ones included."""
        return int((self.status != MISSING).sum())

    @property
    def finished(self) -> int:
        """Rows that every level finished."""
        return int((self.status == OK).sum())

    def put(self, records: Records) -> None:
        """Writes records in their places: joining batches later would take twice the memory."""
        at: Any = records.index - self.first
        at = slice(int(at[0]), int(at[-1]) + 1) if at[-1] - at[0] + 1 == len(at) else at
        self.status[at] = records.status
        self.runs += records.runs.sum(0)
        self.seconds += records.seconds.sum(0)
        for row, message in records.messages.items():
            self.failures[int(records.index[row])] = STATUSES[records.status[row]], message
        if self.theta is None:
            self.theta = torch.empty(self.room, records.theta.shape[1], dtype=_float_of(records.theta))
        self.theta[at] = torch.from_numpy(records.theta)
        if not (records.status == OK).any():  # nobody asks for the outputs of failed rows, and some have none
            return
        if not self.outputs:
            self.dtypes = [output.dtype for output in records.outputs]
            self.outputs = [torch.empty(self.room, *output.shape[1:], dtype=_float_of(output))
                            for output in records.outputs]
        for place, output in zip(self.outputs, records.outputs, strict=True):
            place[at] = torch.from_numpy(output)

    def extend(self, rows: int) -> None:
        """Makes place for more rows, in place of failed ones."""
        self.status = np.concatenate([self.status, np.full(rows, MISSING, np.uint8)])
        if self.room >= len(self.status):
            return
        self.room = max(len(self.status), 5 * self.room // 4)
        if self.theta is not None:
            self.theta = _longer(self.theta, self.room)
        self.outputs = [_longer(output, self.room) for output in self.outputs]

    def finite_rows(self, *, up_to: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Theta and outputs of finished rows, among the first `up_to`."""
        kept = torch.from_numpy(self.status[:up_to] == OK)
        theta = torch.empty(0, 0) if self.theta is None else self.theta[:len(kept)]
        outputs = [output[:len(kept)] for output in self.outputs]
        if kept.all():
            return theta, outputs
        return theta[kept], [output[kept] for output in outputs]


@dataclass
class Batch:
    """Rows `start:stop` of a term that are run together; `replay` names the places of levels to run again."""

    term: Term
    start: int
    stop: int
    guard: bool = False
    replay: tuple[int, ...] = ()
    deaths: int = 0
    lonely_deaths: int = 0  # of them, those with nothing else under way
    lost_runs: Any = 0  # of each level, that a row has behind it and that gave nothing
    lost_seconds: Any = 0.0  # and their seconds
    theta: Any = None  # as sent
    seeds: Any = None

    def __len__(self) -> int:
        return self.stop - self.start

    def halves(self) -> list[Batch]:
        """Both halves, with the batch's past."""
        middle = (self.start + self.stop) // 2
        past = {"guard": self.guard, "deaths": self.deaths, "lost_runs": self.lost_runs,
                "lost_seconds": self.lost_seconds}
        return [Batch(self.term, self.start, middle, **past), Batch(self.term, middle, self.stop, **past)]


def cut_missing(done: Any, first: int) -> deque[tuple[int, int]]:
    """Ranges of rows that are not done.

    Example:
        >>> list(cut_missing(np.array([True, False, False, True, False]), 10))
        [(11, 13), (14, 15)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], ~np.asarray(done), [0]]).astype(np.int8)))
    return deque((first + int(start), first + int(stop)) for start, stop in edges.reshape(-1, 2))


def _float_of(array: Any) -> torch.dtype:
    return torch.from_numpy(array[:0]).dtype if array.dtype.kind == "f" else torch.get_default_dtype()


def _longer(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, torch.empty(rows - len(tensor), *tensor.shape[1:], dtype=tensor.dtype)])
