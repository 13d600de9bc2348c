r"""Sets of row indices, kept as ranges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

__all__ = ["Ranges"]

Array = np.ndarray[Any, Any]


class Ranges:
    r"""A set of row indices, kept as half-open ranges.

    Args:
        pairs: Ranges `[start, stop)`, ascending and apart, int64, shape `(k, 2)`.

    Example:
        >>> done = Ranges.of([0, 1, 2, 7]) | Ranges([(10, 12)])
        >>> list(done), len(done), list(Ranges([(0, 12)]) - done)
        ([(0, 3), (7, 8), (10, 12)], 6, [(3, 7), (8, 10)])
    """

    def __init__(self, pairs: Array | Sequence[tuple[int, int]] = ()) -> None:
        self.pairs = np.asarray(pairs, np.int64).reshape(-1, 2)

    @classmethod
    def of(cls, indices: Array | Sequence[int]) -> Ranges:
        """The set of the given indices, in any order, repeated or not."""
        found = np.unique(np.asarray(indices, np.int64))
        if not len(found):
            return cls()
        cuts = np.flatnonzero(np.diff(found) > 1)
        return cls(np.stack([found[np.r_[0, cuts + 1]], found[np.r_[cuts, len(found) - 1]] + 1], axis=1))

    @classmethod
    def union(cls, parts: Iterable[Ranges]) -> Ranges:
        """What is in any of the parts."""
        pairs = np.concatenate([np.empty((0, 2), np.int64), *(part.pairs for part in parts)])
        if not len(pairs):
            return cls()
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        reach = np.maximum.accumulate(pairs[:, 1])
        opens = np.r_[True, pairs[1:, 0] > reach[:-1]]
        return cls(np.stack([pairs[opens, 0], reach[np.r_[np.flatnonzero(opens)[1:] - 1, len(pairs) - 1]]], axis=1))

    def __or__(self, other: Ranges) -> Ranges:
        return Ranges.union([self, other])

    def __sub__(self, other: Ranges) -> Ranges:
        if not len(self.pairs) or not len(other.pairs):
            return self
        low, high = self.pairs[0, 0], max(self.pairs[-1, 1], other.pairs[-1, 1]) + 1
        gaps = np.stack([np.r_[low, other.pairs[:, 1]], np.r_[other.pairs[:, 0], high]], axis=1)
        return self & Ranges(gaps[gaps[:, 0] < gaps[:, 1]])

    def __and__(self, other: Ranges) -> Ranges:
        """Pairs of ranges that meet, found by bisection."""
        if not len(self.pairs) or not len(other.pairs):
            return Ranges()
        first = np.searchsorted(other.pairs[:, 1], self.pairs[:, 0], side="right")
        last = np.searchsorted(other.pairs[:, 0], self.pairs[:, 1], side="left")
        counts = np.maximum(last - first, 0)
        mine = np.repeat(np.arange(len(counts)), counts)
        theirs = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        starts = np.maximum(self.pairs[mine, 0], other.pairs[theirs, 0])
        return Ranges(np.stack([starts, np.minimum(self.pairs[mine, 1], other.pairs[theirs, 1])], axis=1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and np.array_equal(self.pairs, other.pairs)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return int((self.pairs[:, 1] - self.pairs[:, 0]).sum())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((start, stop) for start, stop in self.pairs.tolist())

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"

    def holds(self, indices: Array) -> Array:
        """Whether each index is in the set."""
        place = np.searchsorted(self.pairs[:, 0], indices, side="right") - 1
        return (place >= 0) & (indices < np.r_[self.pairs[:, 1], 0][place])

    def rank(self, indices: Array) -> Array:
        """How many members lie below each index."""
        sizes = self.pairs[:, 1] - self.pairs[:, 0]
        below = np.r_[0, np.cumsum(sizes)]
        place = np.searchsorted(self.pairs[:, 0], indices, side="right") - 1
        inside = np.minimum(indices - np.r_[self.pairs[:, 0], 0][place], np.r_[sizes, 0][place])
        return np.where(place < 0, 0, below[place] + inside)

    def indices(self) -> Array:
        """Every member, ascending, int64."""
        return np.concatenate([np.empty(0, np.int64), *(np.arange(a, b) for a, b in self.pairs.tolist())])
