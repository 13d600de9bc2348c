r"""Bounds and goals as users give them: least and largest sizes, a budget, target variances."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from mlsbi.allocation.arrays import Array, read_array, read_counts, read_numbers
from mlsbi.allocation.problem import Problem

__all__ = ["read_bounds", "read_budget", "read_targets"]

# Of a budget over the largest cost, and of a variance over a target: far more rows than can be counted.
_FARTHEST = 1e90


def read_bounds(minimum: ArrayLike, maximum: ArrayLike | None, rows: Array) -> tuple[Array, Array, Array]:
    r"""Reads bounds on sizes; rows that exist are lower bounds too.

    Returns:
        Minimum as given, lower and upper bound, each of shape `(L + 1,)`; no upper bound is infinity.

    Raises:
        ValueError: If a minimum is not a whole number of at least 1, or exceeds the maximum.
    """
    levels = len(rows)
    least = read_counts("minimum", minimum, levels, least=1)
    lower = np.maximum(least, rows)
    if maximum is None:
        return least, lower, np.full(levels, np.inf)
    given = np.array(maximum, dtype=object).tolist()  # in float64, None would be NaN
    if isinstance(given, list):
        given = [math.inf if value is None else value for value in given]
    upper = read_counts("maximum", given, levels, least=1)
    for i in range(levels):
        if lower[i] > upper[i]:
            over = least[i] > upper[i]
            what = f"the minimum, {least[i]:.0f}" if over else f"the rows that exist already, {lower[i]:.0f}"
            raise ValueError(
                f"Expected a maximum on level {i} of at least {what}; got {upper[i]:.0f}. "
                "Raise the maximum" + (" or lower the minimum." if over else ".")
            )
    return least, lower, upper


def read_budget(budget: float, problem: Problem, smallest: float) -> float:
    r"""Reads a budget and refuses one below `smallest`, which has the problem's unit, as what is returned.

    Raises:
        ValueError: If the budget cannot buy the least sizes; the message names the smallest that can.
    """
    given = read_numbers("budget", budget, (), zero=False).item()
    unit = problem.cost_unit
    value = given / unit
    if value < problem.sunk * (1 - 1e-14):  # not for one unit of rounding in a sum of costs
        raise ValueError(
            f"Expected a budget that includes the {problem.sunk * unit!r} already spent; got {given!r}. "
            f"Raise it to at least {smallest * unit!r}."
        )
    if value < smallest * (1 - 1e-14):
        raise ValueError(
            f"Expected a budget that buys the minimum of every level; got {given!r}. "
            f"The smallest feasible budget is {smallest * unit!r}: raise it, or lower minimum."
        )
    if value > _FARTHEST:
        raise ValueError(f"Expected a budget below 1e90 rows of the dearest level; got {given!r}. Lower it.")
    return value


def read_targets(target: ArrayLike, problem: Problem, variances: Array, upper: Array) -> Array:
    r"""Reads one target variance, or one per output, and refuses one that sizes `upper` do not reach.

    Args:
        target: As given.
        problem: What it is for, and what has the unit of all that follows.
        variances: Variances of the corrections, shape `(K, L + 1)`.
        upper: Largest sizes or infinity, shape `(L + 1,)`.

    Returns:
        Shape `(K,)`.

    Raises:
        ValueError: If a target is not positive, or the maximum does not allow it.
    """
    outputs = len(problem.variances)
    given = read_array("target_variance", target)
    shape = (outputs,) if problem.several and given.ndim else ()
    given = np.broadcast_to(read_numbers("target_variance", given, shape, zero=False), (outputs,))
    with np.errstate(over="ignore"):
        targets = given / problem.variance_unit
    reachable = (variances / upper).sum(axis=1)
    attained = (np.isfinite(upper) | (variances == 0)).all(axis=1)
    for k in range(outputs):
        if reachable[k] > targets[k] * (1 + 1e-14) or (not attained[k] and reachable[k] >= targets[k]):
            where = f" of output {k}" if problem.several else ""
            least = "The smallest reachable is" if attained[k] else "Reachable is all above"
            smallest = reachable[k].item() * problem.variance_unit[k].item()
            raise ValueError(
                f"Expected a target variance{where} that maximum allows; got {given[k].item()!r}. "
                f"{least} {smallest!r}: raise it, or raise maximum."
            )
        if targets[k] * _FARTHEST < 1 and variances[k].any():
            raise ValueError(
                f"Expected target variances above 1e-90 of the largest variance; got {given[k].item()!r}. Raise it."
            )
    # Beyond, a target asks for nothing, and products would overflow.
    return np.clip(targets, 1 / _FARTHEST, _FARTHEST)
