r"""Water levels: one number decides all sizes of a continuous solution, found for many problems at once.

Sizes are `clip(water * rates, lower, upper)`, so cost and variance are simple
between the *marks*, the levels at which a size meets or leaves a bound: find
the right pair of marks, then solve between them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlsbi.allocation.arrays import Array

__all__ = ["budget_water", "find_sizes", "target_water"]


def find_sizes(water: Array, rates: Array, lower: Array, upper: Array) -> Array:
    r"""Continuous sizes at water levels, `(...,)` and `(..., L + 1)` to `(..., L + 1)`."""
    return np.clip(water[..., None] * rates, lower, upper)


def budget_water(costs: Array, rates: Array, lower: Array, upper: Array, limit: float) -> Array:
    r"""Water levels at which sizes cost a limit; where no size moves, any level.

    Args:
        costs: Cost of one sample, shape `(L + 1,)`.
        rates: Relative sizes of the unbounded solutions, shape `(m, L + 1)`.
        lower: Least sizes, shape `(L + 1,)`.
        upper: Largest sizes or infinity, shape `(L + 1,)`.
        limit: Total cost.

    Returns:
        Shape `(m,)`.
    """
    marks = _marks(rates, lower, upper)
    spent = find_sizes(marks, rates[:, None], lower, upper) @ costs  # (m, marks), ascending
    passed = (spent <= limit).sum(axis=1)
    first, inside = _between(marks, passed)
    n = find_sizes(inside, rates, lower, upper)
    free = (n > lower) & (n < upper)
    slope = (costs * rates * free).sum(axis=1)
    moving = slope > 0  # else every size is at its upper bound
    water = (limit - (n * ~free) @ costs) / np.where(moving, slope, 1)
    return np.where(passed == 0, first, np.where(moving, np.maximum(water, first), inside))


def target_water(variances: Array, targets: Array, rates: Array, lower: Array, upper: Array) -> Array:
    r"""Lowest water levels at which variances meet targets; the last mark where none does.

    Args:
        variances: Variances of the levels' terms, shape `(m, L + 1)`.
        targets: Shape `(m,)`.
        rates: Relative sizes of the unbounded solutions, shape `(m, L + 1)`.
        lower: Least sizes, shape `(L + 1,)`.
        upper: Largest sizes or infinity, shape `(L + 1,)`.

    Returns:
        Shape `(m,)`.
    """
    marks = _marks(rates, lower, upper)
    n = find_sizes(marks, rates[:, None], lower, upper)
    reached = ((1 / n) @ variances[:, :, None])[:, :, 0]  # (m, marks), descending
    missed = (reached > targets[:, None]).sum(axis=1)
    first, inside = _between(marks, missed)
    n = find_sizes(inside, rates, lower, upper)
    free = (n > lower) & (n < upper)
    slope = (variances * free / np.where(free, rates, 1)).sum(axis=1)
    room = targets - (variances * ~free / n).sum(axis=1)
    solvable = (slope > 0) & (room > 0)
    last = np.take_along_axis(marks, np.minimum(missed, marks.shape[1] - 1)[:, None], axis=1)[:, 0]
    water = np.where(solvable, slope, 1) / np.where(solvable, room, 1)
    water = np.where(solvable, np.maximum(water, first), last)  # not solvable by rounding: met at a mark
    return np.where(missed == 0, first, water)


def _marks(rates: Array, lower: Array, upper: Array) -> Array:
    r"""Ascending marks, `(m, L + 1)` to `(m, 2 L + 2)`; the last is repeated in the place of those at infinity."""
    moving = rates > 0
    both = np.concatenate([lower / np.where(moving, rates, 1), upper / np.where(moving, rates, 1)], axis=1)
    finite = np.concatenate([moving, moving], axis=1) & np.isfinite(both)
    last = np.where(finite, both, 0).max(axis=1, keepdims=True)
    return np.sort(np.where(finite, both, np.where(last > 0, last, 1)), axis=1)


def _between(marks: Array, passed: NDArray[np.intp]) -> tuple[Array, Array]:
    r"""The last mark passed (the first if none is), and a water level between it and the next, `(m,)` each."""
    row = np.arange(len(marks))
    before = marks[row, np.maximum(passed - 1, 0)]
    beyond = passed == marks.shape[1]
    after = marks[row, np.where(beyond, -1, passed)]
    return before, np.where(beyond, 2 * marks[:, -1], (before + after) / 2)
