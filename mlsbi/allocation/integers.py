r"""The best whole numbers next to a continuous solution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlsbi.allocation.arrays import Array
from mlsbi.allocation.goals import Goal

__all__ = ["best_integers"]

# Entries of the largest table an exact search may build (about a millisecond of work).
_EXACT_LIMIT = 60_000
_MOST = 2.0**53  # from here on float64 leaves whole numbers out


def best_integers(goal: Goal) -> Array:
    r"""Whole sizes that minimise a goal.

    Levels are rounded in turn, dearest first, re-solving the rest; exchanges
    between two levels follow until none improves; where the candidates that
    the Lagrangian bound leaves are few, they are searched exhaustively, so
    the answer is then the optimum.

    Args:
        goal: A feasible goal.

    Returns:
        Shape `(L + 1,)`, whole numbers within the bounds.

    Raises:
        ValueError: If there are more than can be counted.
    """
    # Equals are told apart by their place: with the levels in one order, a permuted problem has a permuted answer.
    order = np.lexsort((goal.upper, goal.lower, goal.weights, goal.costs))
    n = np.empty(len(order))
    n[order] = _best_integers(goal.ordered(order))
    return n


def _best_integers(goal: Goal) -> Array:
    continuous = goal.continuous()
    if continuous.max() >= _MOST:
        raise ValueError(
            f"Expected to need fewer than 2**53 rows of each level; got {continuous.max():.6g} of one. "
            "Pass a smaller budget or minimum, a larger target variance, or a maximum."
        )
    if ((continuous == goal.upper) | (goal.weights == 0)).all():
        return continuous
    start = np.stack([np.clip(goal.safe(continuous), goal.lower, goal.upper), _round_in_turn(goal)])
    return _search(goal, _exchange(goal, start[_best(goal, start)]))


def _best(goal: Goal, rows: Array) -> int:
    score, tie = goal.scores(rows)
    equal = np.flatnonzero(score <= score.min() * (1 + goal.tolerance))
    return int(equal[np.argmin(tie[equal])])


def _round_in_turn(goal: Goal) -> Array:
    lower, upper = goal.lower.copy(), goal.upper.copy()
    order = np.argsort(-goal.costs, kind="stable")
    for i in order[:-1]:
        size = goal.sizes(goal.water_level(lower, upper), lower, upper)[i]
        down = np.floor(size)
        # w / n + c n is equal at k and k + 1 when its minimum is at sqrt(k (k + 1)).
        nearest = down + (size**2 > down * (down + 1))
        bounds = lower[i], upper[i]
        lower[i] = upper[i] = np.clip(nearest, *bounds)
        if not goal.feasible(lower, upper):
            lower[i] = upper[i] = np.clip(goal.safe(np.array([size]))[0], *bounds)
    n = np.where(np.isfinite(upper), upper, lower)
    n[order[-1]] = goal.lower[order[-1]]
    n[order[-1]] = goal.fill(n[None], order[-1:])[0]
    return n


def _exchange(goal: Goal, n: Array) -> Array:
    r"""Changes one level by one and refills another, as long as that improves; far if it keeps improving."""
    levels = n.size
    changed, filled = np.nonzero(~np.eye(levels, dtype=bool))
    one = np.eye(levels)
    moves = np.concatenate([np.zeros((levels, levels)), one[changed], -one[changed]])
    fills = np.concatenate([np.arange(levels), filled, filled])
    strides = 2.0 ** np.arange(40)
    while True:
        best = _try(goal, n, moves, fills)
        if best is None:
            return n
        chosen, found = best
        further = _try(goal, found, strides[:, None] * moves[chosen], np.full(len(strides), fills[chosen]))
        n = found if further is None else further[1]


def _try(goal: Goal, n: Array, moves: Array, fills: NDArray[np.intp]) -> tuple[int, Array] | None:
    r"""The best of the moves and its sizes, or `None` where none improves."""
    rows = n + moves
    inside = np.flatnonzero(((rows >= goal.lower) & (rows <= goal.upper)).all(axis=1))
    if not inside.size:
        return None
    rows, into = rows[inside], fills[inside]
    rows[np.arange(len(rows)), into] = goal.fill(rows, into)
    best = _best(goal, rows)
    before, after = (float(goal.scores(row[None])[0][0]) for row in (n, rows[best]))
    return (int(inside[best]), rows[best]) if after < before * (1 - goal.tolerance) else None


def _search(goal: Goal, n: Array) -> Array:
    r"""The best of all sizes if the candidates are few, else `n`.

    With :math:`W_\ell` the weights at the continuous solution's multiplier, every
    feasible row as good as `n` has :math:`\sum_\ell (c_\ell n_\ell + W_\ell / n_\ell)`
    at most `goal.surplus(n)`, and each term has a known minimum, so what a
    term may lie above its minimum is bounded: that leaves an interval a level.
    """
    water = goal.water_level(goal.lower, goal.upper)
    weights, costs = water**2 * goal.weights, goal.costs
    centre = goal.sizes(water, goal.lower, goal.upper)
    least = costs * centre + weights / centre
    gap = max(goal.surplus(n, water) - float(least.sum()), 0.0) + 4 * goal.tolerance * float(least.sum())
    sides = least + gap
    root = np.sqrt(np.maximum(sides**2 - 4 * costs * weights, 0))
    moving = weights > 0
    first = np.where(moving, np.maximum(goal.lower, np.ceil(2 * weights / (sides + root))), goal.lower)
    last = np.where(moving, np.minimum(goal.upper, np.floor((sides + root) / (2 * costs))), goal.lower)
    order = np.argsort(last - first, kind="stable")
    rows, excess = n[None], np.zeros(1)
    for i in order[:-1]:
        if len(rows) * (last[i] - first[i] + 1) > _EXACT_LIMIT:
            return n
        sizes = np.arange(first[i], last[i] + 1)
        total = excess[:, None] + (costs[i] * sizes + weights[i] / sizes - least[i])  # (rows, sizes)
        row, size = np.nonzero(total <= gap)
        rows, excess = rows[row], total[row, size]
        rows[:, i] = sizes[size]
    filled = np.full(len(rows), order[-1])
    rows[np.arange(len(rows)), filled] = goal.fill(rows, filled)
    rows = np.concatenate([n[None], rows])
    best: Array = rows[_best(goal, rows)]
    return best
