r"""What each level is worth: the error that a budget buys with all levels, without each of them, and with one alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from mlsbi.allocation.arrays import Array
from mlsbi.allocation.limits import read_bounds
from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.allocation.problem import Problem, Report, read_problem

__all__ = ["ErrorCurve", "error_curves"]

_POINTS = 31
_SPAN = 1000.0  # largest default budget over the smallest
_AROUND = 30.0  # largest default budget over the one given, and that over the smallest


@dataclass(frozen=True)
class ErrorCurve:
    r"""Predicted standard error against the budget, for some of the levels.

    Args:
        label: Which levels these are, in words.
        levels: Their numbers, the finest last.
        budgets: Cost of the rows, in the unit of the costs.
        errors: Standard error at each budget; NaN where it cannot buy the least rows of each of these levels.
    """

    label: str
    levels: tuple[int, ...]
    budgets: tuple[float, ...]
    errors: tuple[float, ...]


def error_curves(
    variances_or_report: ArrayLike | Report,
    costs: ArrayLike | None = None,
    *,
    budgets: ArrayLike | None = None,
    budget: float | None = None,
    pair_costs: ArrayLike | None = None,
    covariance: ArrayLike | None = None,
    minimum: ArrayLike = 1,
    weights: Literal["unit", "optimal"] = "unit",
) -> tuple[ErrorCurve, ...]:
    r"""Predicts the standard error of the mean of f^L against the budget, for all levels and for fewer.

    The curves are of all levels, of all but each one below the finest, and of
    the finest alone. Each error is that of whole sizes, allocated anew for
    that budget and those levels. A row that leaves a level out pairs its
    neighbours: its variance is that of the covariance, its cost the sum of
    both runs. Only rows are paid for: what a pilot cost is left out, and its
    rows are not counted.

    Args:
        variances_or_report: As in `optimal_allocation`, of one output.
        costs: Cost of one simulation of each level, shape `(L + 1,)`.
        budgets: Budgets to predict for, shape `(m,)`. By default 31, from the smallest that buys any of the curves
            a point to 1000 times it.
        budget: In place of `budgets`: defaults from 1/30 of this (or from the smallest) to 30 times it, itself
            among them.
        pair_costs: As in `optimal_allocation`.
        covariance: Covariance of f^0..f^L, shape `(L + 1, L + 1)`.
        minimum: Least rows, at least 1; one number or one per level.
        weights: As in `optimal_allocation`.

    Returns:
        One curve per set of levels, that of all levels first and that of the finest alone last.

    Raises:
        ValueError: If there is no covariance, no cost of single runs, more than one output, both of `budgets` and
            `budget`, a budget that is not positive and finite or buys nothing, or `optimal_allocation` refuses the
            rest.

    Example:
        >>> joint = [[4.0, 3.9], [3.9, 4.0]]
        >>> for curve in error_curves([4.0, 0.2], [1.0, 9.0], covariance=joint, budgets=[10, 100, 1000]):
        ...     print(curve.label, [round(error, 3) for error in curve.errors])
        all levels [nan, 0.342, 0.108]
        level 1 alone [2.0, 0.603, 0.19]
    """
    problem = read_problem(variances_or_report, costs, pair_costs, None, None, covariance)
    if len(problem.variances) > 1:
        raise ValueError(
            f"Expected one output; got {len(problem.variances)}. Pass the variances and the covariance of one of them."
        )
    if problem.covariance is None:
        raise ValueError(
            "Expected covariance, of f^0..f^L, which tells what fewer levels reach; got None. Pass covariance=... or a "
            "pilot's report."
        )
    if problem.costs is None:
        raise ValueError(
            "Expected costs, of one simulation of each level; got None. Pass costs=[...] beside pair_costs."
        )
    least, _, _ = read_bounds(minimum, None, np.zeros(len(problem.names)))
    sets = _level_sets(problem)
    smallest = min(float(_row_costs(problem, levels) @ least[list(levels)]) for _, levels in sets)
    chosen = _read_budgets(budgets, budget, smallest)
    return tuple(
        ErrorCurve(label, levels, tuple(chosen.tolist()), _errors(problem, levels, chosen, least, weights))
        for label, levels in sets
    )


def _level_sets(problem: Problem) -> list[tuple[str, tuple[int, ...]]]:
    finest = len(problem.names) - 1
    every = tuple(range(finest + 1))
    sets = [("all levels", every)]
    if finest > 1:  # of two levels, leaving one out leaves the finest alone
        sets += [(f"without {problem.label(out)}", every[:out] + every[out + 1 :]) for out in every[:-1]]
    if finest > 0:
        sets.append((f"{problem.label(finest)} alone", (finest,)))
    return sets


def _terms(levels: tuple[int, ...]) -> list[tuple[int | None, int]]:
    r"""The coarse and the fine level of each term."""
    return list(zip((None, *levels[:-1]), levels, strict=True))


def _row_costs(problem: Problem, levels: tuple[int, ...]) -> Array:
    return np.array([problem.term_cost(coarse, fine) for coarse, fine in _terms(levels)])


def _read_budgets(budgets: ArrayLike | None, budget: float | None, smallest: float) -> Array:
    if budgets is not None and budget is not None:
        raise ValueError("Expected budgets or the one budget to look around; got both. Pass one of them.")
    if budgets is None and budget is None:
        return np.geomspace(smallest, _SPAN * smallest, _POINTS)
    chosen = np.asarray(budgets if budget is None else [budget], dtype=np.float64)
    if chosen.ndim != 1 or not chosen.size or not (np.isfinite(chosen) & (chosen > 0)).all():
        raise ValueError(f"Expected positive, finite budgets of shape (m,); got {chosen.tolist()}. Correct them.")
    if budget is None:
        return chosen
    if budget < smallest:
        raise ValueError(
            f"Expected a budget that buys some of the levels; got {budget!r}. The smallest is {smallest!r}: raise it."
        )
    half = _POINTS // 2 + 1
    above = np.geomspace(budget, budget * _AROUND, half)
    if budget == smallest:
        return above
    return np.concatenate([np.geomspace(max(smallest, budget / _AROUND), budget, half)[:-1], above])


def _errors(
    problem: Problem, levels: tuple[int, ...], budgets: Array, least: Array, weights: Literal["unit", "optimal"]
) -> tuple[float, ...]:
    variances = [problem.term_variance(coarse, fine)[0] for coarse, fine in _terms(levels)]
    costs, minimum = _row_costs(problem, levels), least[list(levels)]
    joint = None if problem.covariance is None else problem.covariance[0][np.ix_(levels, levels)]
    found = []
    for budget in budgets.tolist():
        if budget < float(costs @ minimum):
            found.append(math.nan)
            continue
        plan = optimal_allocation(
            variances, pair_costs=costs, budget=budget, minimum=minimum, covariance=joint, weights=weights
        )
        found.append(np.sqrt(plan.variance).item())
    return tuple(found)
