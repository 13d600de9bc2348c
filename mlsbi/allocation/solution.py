r"""Sizes for a problem and a goal: at unit weights, or together with the control-variate weights that suit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from mlsbi.allocation.arrays import Array
from mlsbi.allocation.goals import BudgetGoal, Goal, TargetGoal, target_multipliers
from mlsbi.allocation.integers import best_integers
from mlsbi.allocation.limits import read_budget, read_targets
from mlsbi.allocation.problem import Problem
from mlsbi.allocation.weighting import Coupling, round_weighted, weigh

__all__ = ["Solution", "solve"]

_INTERVAL = (0.05, 0.95)


@dataclass(frozen=True, eq=False)
class Solution:
    r"""Sizes, and what they reach.

    Args:
        goal: What was minimised to find the continuous sizes.
        n: Sizes, whole numbers, shape `(L + 1,)`.
        variances: Variances of the corrections as the estimator weights them, shape `(K, L + 1)`.
        variance: Variance of the estimator, shape `(K,)`.
        cost: Total cost.
        weights: Best weights for `n`, shape `(K, L + 1)`; `None` without a covariance.
        weighted_variance: Variance that they reach with `n`, shape `(K,)`, or `None`.
        weighted: Whether the estimator has these weights; else its weights are ones.
        unit: Where `weighted`, the best at unit weights; `None` if those cannot reach the goal.
        interval: Quantiles of the continuous sizes over the bootstrap draws, shape `(2, L + 1)`, or `None`.
        unreached: How many of the draws cannot reach the goal.
    """

    goal: Goal
    n: Array
    variances: Array
    variance: Array
    cost: float
    weights: Array | None
    weighted_variance: Array | None
    weighted: bool = False
    unit: Solution | None = None
    interval: Array | None = None
    unreached: int = 0

    @property
    def combined(self) -> float:
        r"""The one variance that the goal is about: of all outputs, each with its weight."""
        return float(self.goal.outputs @ self.variance)


def solve(
    problem: Problem, lower: Array, upper: Array, *, budget: float | None, target: ArrayLike | None, weighted: bool
) -> Solution:
    r"""Finds the best sizes within bounds for a budget or target variances, and the best weights for them.

    Args:
        problem: Scaled, as the solution is.
        lower: Least sizes, shape `(L + 1,)`.
        upper: Largest sizes or infinity, shape `(L + 1,)`.
        budget: As the user gave it, not scaled.
        target: As the user gave it, not scaled.
        weighted: Whether the estimator has the best weights.

    Raises:
        ValueError: If not exactly one of budget and target is given, it is out of reach, it needs more rows than can
            be counted, or weights are asked for without a covariance.
    """
    coupling = Coupling.read(problem)
    if not weighted:
        goal_of = _read_goal(problem, lower, upper, budget, target, problem.variances)
        return _solve_unit(problem, goal_of, coupling, budget)
    if coupling is None:
        raise ValueError(
            'Expected covariance, of f^0..f^L, with weights="optimal"; got None. Pass covariance=... or a pilot\'s '
            'report, or leave weights at "unit".'
        )
    largest = coupling.best_weights(upper)
    goal_of = _read_goal(problem, lower, upper, budget, target, coupling.weighted(largest))
    unit = None
    if goal_of(problem.variances).feasible(lower, upper):
        unit = _solve_unit(problem, goal_of, coupling, budget)
    continuous = weigh(goal_of, coupling, largest if unit is None else np.ones_like(largest))
    goal = goal_of(coupling.weighted(continuous))
    candidates = [best_integers(goal)] if unit is None else [best_integers(goal), unit.n]
    n, weights = round_weighted(goal_of, coupling, candidates)
    found = _measure(problem, goal, n, coupling.weighted(weights), budget)
    return replace(found, weights=weights, weighted_variance=found.variance, weighted=True, unit=unit)


def _read_goal(
    problem: Problem, lower: Array, upper: Array, budget: float | None, target: ArrayLike | None, largest: Array
) -> Callable[[Array], Goal]:
    r"""The goal for any variances of the corrections, shape `(K, L + 1)`; `largest` are those for sizes `upper`."""
    costs = problem.pair_costs
    if budget is not None and target is None:
        total = read_budget(budget, problem, problem.cost(lower))
        outputs = _output_weights(problem)
        # The difference of two sums of costs is off by their rounding: a row that is just affordable stays so.
        room = 4 * float(np.finfo(np.float64).eps) * problem.sunk
        limit = total - problem.sunk + room + float(problem.rows @ costs)
        return lambda variances: BudgetGoal(costs, variances, outputs, lower, upper, limit)
    if target is not None and budget is None:
        targets = read_targets(target, problem, largest, upper)

        def target_goal(variances: Array) -> TargetGoal:
            outputs = target_multipliers(costs, variances, targets, lower, upper)
            return TargetGoal(costs, variances, outputs, lower, upper, targets)

        return target_goal
    got = "neither" if budget is None else "both"
    raise ValueError(f"Expected exactly one of budget and target_variance; got {got}. Pass one of them.")


def _output_weights(problem: Problem) -> Array:
    r"""Weight of each output in the sum that a budget minimises, shape `(K,)`."""
    if len(problem.variances) == 1:
        return np.ones(1)
    scale = np.where(problem.variances[:, 0] > 0, problem.variances[:, 0], problem.variances.max(axis=1))
    return np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0.0)


def _solve_unit(
    problem: Problem, goal_of: Callable[[Array], Goal], coupling: Coupling | None, budget: float | None
) -> Solution:
    goal = goal_of(problem.variances)
    found = _measure(problem, goal, best_integers(goal), problem.variances, budget)
    if coupling is not None:
        weights = coupling.best_weights(found.n)
        reached = (coupling.weighted(weights) / found.n).sum(axis=1)
        found = replace(found, weights=weights, weighted_variance=np.minimum(reached, found.variance))
    if problem.draws is None:
        return found
    sizes = goal.continuous_of(problem.draws)
    unreached = int(np.isnan(sizes).any(axis=1).sum())
    interval = None if unreached else np.rint(np.quantile(sizes, _INTERVAL, axis=0))
    return replace(found, interval=interval, unreached=unreached)


def _measure(problem: Problem, goal: Goal, n: Array, variances: Array, budget: float | None) -> Solution:
    cost, variance = problem.cost(n), (variances / n).sum(axis=1)
    # What exceeds a limit by rounding alone is the limit: callers may compare without a tolerance.
    if budget is not None:
        cost = min(cost, float(budget) / problem.cost_unit)
    if isinstance(goal, TargetGoal):
        variance = np.minimum(variance, goal.targets)
    return Solution(goal, n, variances, variance, cost, None, None)
