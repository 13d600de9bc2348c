r"""Bounds and goals as users give them: least and largest sizes, a budget, target variances."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from mlsbi.allocation.arrays import Array, read_array, read_counts, read_numbers
from mlsbi.allocation.problem import Problem

__all__ = ["read_bounds", "read_budget", "read_targets"]


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
    if isinstance(maximum, (list, tuple)):
        maximum = [math.inf if value is None else value for value in maximum]
    upper = read_counts("maximum", maximum, levels, least=1)
    for i in range(levels):
        if lower[i] > upper[i]:
            what = "the minimum" if least[i] > upper[i] else "the rows that exist already"
            raise ValueError(
                f"Expected a maximum on level {i} of at least {what}, {lower[i]:.0f}; got {upper[i]:.0f}. "
                "Raise the maximum" + (" or lower the minimum." if least[i] > upper[i] else ".")
            )
    return least, lower, upper


def read_budget(budget: float, problem: Problem, smallest: float) -> float:
    r"""Reads a budget and refuses one below `smallest`.

    Raises:
        ValueError: If the budget cannot buy the least sizes; the message names the smallest that can.
    """
    value = read_numbers("budget", budget, (), zero=False).item()
    if value < problem.sunk * (1 - 1e-14):  # not for one unit of rounding in a sum of costs
        raise ValueError(
            f"Expected a budget that includes the {problem.sunk!r} already spent; got {value!r}. "
            f"Raise it to at least {smallest!r}."
        )
    if value < smallest * (1 - 1e-14):
        raise ValueError(
            f"Expected a budget that buys the minimum of every level; got {value!r}. "
            f"The smallest feasible budget is {smallest!r}: raise it, or lower minimum."
        )
    return value


def read_targets(target: ArrayLike, problem: Problem, variances: Array, upper: Array) -> Array:
    r"""Reads one target variance, or one per output, and refuses one that sizes `upper` do not reach.

    Args:
        target: As given.
        problem: What it is for.
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
    targets = np.broadcast_to(read_numbers("target_variance", given, shape, zero=False), (outputs,)).copy()
    reachable = (variances / upper).sum(axis=1)
    attained = (np.isfinite(upper) | (variances == 0)).all(axis=1)
    for k in range(outputs):
        if reachable[k] > targets[k] * (1 + 1e-14) or (not attained[k] and reachable[k] >= targets[k]):
            where = f" of output {k}" if problem.several else ""
            least = "The smallest reachable is" if attained[k] else "Reachable is all above"
            raise ValueError(
                f"Expected a target variance{where} that maximum allows; got {targets[k].item()!r}. "
                f"{least} {reachable[k].item()!r}: raise it, or raise maximum."
            )
    return targets
