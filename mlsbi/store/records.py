r"""What a campaign keeps of every row it ran: a whole coupled sample, finished or failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["JOINT_STREAM", "OK", "REPEAT_STREAM", "SET_STREAM", "STATUSES", "TEST_STREAM", "Records", "Stream"]

STATUSES = ("ok", "exception", "time-out", "not finite", "wrong shape", "worker died", "wrong type")
"""What can become of a row; a record's status is a place in this tuple."""

OK = 0
"""Status of a row that every level finished."""

JOINT_STREAM = 1 << 16
"""Random stream of a pilot's joint rows; its independent rows of level l use `JOINT_STREAM + 1 + l`."""

TEST_STREAM = 1 << 17
"""Random stream of test rows. Streams 0, 1, ... are the levels' own."""

REPEAT_STREAM = 1 << 19
"""Random stream of the noise with which cheap levels are run again at a pilot's theta."""

SET_STREAM = 1 << 24
"""Sets of m outputs are kept as stream `SET_STREAM * m` plus the number of the stream they are drawn from."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, order=True)
class Stream:
    r"""Rows of one purpose: drawn from one random stream, the same levels run on each.

    Args:
        seed: The user's seed.
        number: Random stream, such as a level's own number, or `JOINT_STREAM`.
        levels: Levels that are run on every row, cheapest first, by number.
    """

    seed: int
    number: int
    levels: tuple[int, ...]


@dataclass(frozen=True)
class Records:
    r"""Rows of one stream that were run, n of them.

    Args:
        index: Row of the stream, ascending, int64, shape `(n,)`.
        theta: Parameters, shape `(n, D)`.
        outputs: Output of each level of the stream, each `(n, ...)`, in the dtype that the simulator gave; NaN (0 for
            whole numbers) in rows without one. Empty where no row has any.
        status: Place in `STATUSES`, uint8, shape `(n,)`.
        runs: Simulator runs of each level, shape `(n, levels)`.
        seconds: Time spent in each level's simulator, shape `(n, levels)`.
        messages: What went wrong, by position in these arrays, for rows whose status is not `OK`.
        noise_seed: The seed that the row's simulators were given, int64, shape `(n,)`; `None` where noise is no seed.
    """

    index: Array
    theta: Array
    outputs: tuple[Array, ...]
    status: Array
    runs: Array
    seconds: Array
    messages: Mapping[int, str] = field(default_factory=dict)
    noise_seed: Array | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        return self.theta.nbytes + sum(output.nbytes for output in self.outputs) + 32 * len(self)

    def take(self, rows: Array) -> Records:
        """The records at the given positions (or where a mask holds), in that order."""
        places = np.flatnonzero(rows) if rows.dtype == bool else rows
        messages = {new: self.messages[old] for new, old in enumerate(places.tolist()) if old in self.messages}
        return Records(
            self.index[places], self.theta[places], tuple(output[places] for output in self.outputs),
            self.status[places], self.runs[places], self.seconds[places], messages,
            None if self.noise_seed is None else self.noise_seed[places],
        )  # fmt: skip
