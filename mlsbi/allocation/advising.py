r"""Says in plain words what an allocation hides: useless levels, active bounds, better subsets, plain Monte Carlo."""

from __future__ import annotations

import numpy as np

from mlsbi.allocation.goals import BudgetGoal, Goal
from mlsbi.allocation.problem import Array, Problem

__all__ = ["best_subset", "give_advice"]


def give_advice(
    problem: Problem,
    goal: Goal,
    n: Array,
    variance: Array,
    outputs: Array,
    speedup: Array | None,
    cost: float,
    minimum: Array,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    r"""Puts the active bounds and the advice into words.

    Args:
        problem: The numbers that were allocated.
        goal: What was minimised.
        n: The sizes found, shape `(L + 1,)`.
        variance: Their predicted variances, shape `(K,)`.
        outputs: Weight of each output, shape `(K,)`.
        speedup: Against plain Monte Carlo, shape `(K,)`, or `None`.
        cost: Total cost of `n`.
        minimum: Least rows as the user gave them, shape `(L + 1,)`.

    Returns:
        Active bounds, and sentences.
    """
    below, above = _active(goal)
    bound = {
        **{i: "minimum" if minimum[i] >= problem.rows[i] else "rows already there" for i in below},
        **dict.fromkeys(above, "maximum"),
    }
    words = {i: f"{bound[i]} on {_place(problem, i)}" for i in sorted(bound)}
    sentences = [*_useless(problem, goal, n), *_bounded(goal, words), *_subsets(problem, outputs)]
    sentences += _against_plain(problem, variance, speedup)
    sentences.append(_doubled(problem, goal, n, variance, cost))
    return tuple(words.values()), tuple(sentences)


def best_subset(problem: Problem, outputs: Array) -> tuple[tuple[int, ...], float, float]:
    r"""The subset of levels, with the finest, whose estimator has the least variance at equal cost.

    :math:`S = \sum \sqrt{V c}` adds up over neighbours in the subset, so the
    best one is a shortest path to the finest level: no enumeration.

    Args:
        problem: With `costs` and `covariance`.
        outputs: Weight of each output, shape `(K,)`.

    Returns:
        The subset, its :math:`S^2`, and that of all levels together.
    """

    def term(coarse: int | None, fine: int) -> float:
        weight = float(outputs @ problem.term_variance(coarse, fine))
        return float(np.sqrt(weight * problem.term_cost(coarse, fine)))

    levels = len(problem.names)
    paths: list[tuple[float, tuple[int, ...]]] = []
    for fine in range(levels):
        ways: list[tuple[float, tuple[int, ...]]] = [(term(None, fine), (fine,))]
        ways += [(paths[coarse][0] + term(coarse, fine), (*paths[coarse][1], fine)) for coarse in range(fine)]
        paths.append(min(ways, key=lambda way: way[0]))
    whole = term(None, 0) + sum(term(i - 1, i) for i in range(1, levels))
    return paths[-1][1], paths[-1][0] ** 2, whole**2


def _place(problem: Problem, level: int) -> str:
    name = problem.names[level]
    return f"level {level}" if name == str(level) else f"level {level} ({name})"


def _active(goal: Goal) -> tuple[list[int], list[int]]:
    r"""Levels that the unbounded solution at the same water level would put below, and above, their bounds."""
    free = goal.water_level(goal.lower, goal.upper) * goal.rates
    # A size that meets its bound by itself is not held there: 1e-9 is far above rounding, far below a run.
    below, above = free < goal.lower * (1 - 1e-9), free > goal.upper * (1 + 1e-9)
    return np.flatnonzero(below).tolist(), np.flatnonzero(above).tolist()


def _useless(problem: Problem, goal: Goal, n: Array) -> list[str]:
    sentences = []
    for i in np.flatnonzero((problem.variances == 0).all(axis=0)).tolist():
        if i == 0:
            advice = "its output never varies, so it could be left out of the stack"
        else:
            advice = f"it agrees exactly with level {i - 1}, so one of the two could be left out of the stack"
        place = _place(problem, i)
        sentences.append(f"The correction of {place} has zero variance and gets {n[i]:.0f} rows: {advice}.")
    if len(problem.variances) > 1 and isinstance(goal, BudgetGoal):
        for k in np.flatnonzero(problem.variances[:, 0] == 0).tolist():
            scale = "is left out of the sum" if not problem.variances[k].any() else "is taken relative to its largest"
            sentences.append(f"Output {k} has zero variance on level 0: its variance {scale}.")
    return sentences


def _bounded(goal: Goal, words: dict[int, str]) -> list[str]:
    held = [words[i] for i in words if goal.weights[i] > 0]
    if not held:
        return []
    sentence = "Active bounds: " + ", ".join(held)
    if isinstance(goal, BudgetGoal):
        free = float(np.sqrt(goal.weights * goal.costs).sum()) ** 2 / goal.limit
        found = float((goal.weights / goal.continuous()).sum())
        sentence += f"; without them the variance would be {1 - free / found:.2%} lower"
    return [sentence + "."]


def _subsets(problem: Problem, outputs: Array) -> list[str]:
    if problem.covariance is None or len(problem.names) == 1:
        return []
    if problem.costs is None:
        return ["Pass costs beside pair_costs to compare subsets of the levels."]
    subset, best, whole = best_subset(problem, outputs)
    if len(subset) == len(problem.names) or best >= whole:
        return ["No subset of the levels beats all of them together."]
    kept = ", ".join(_place(problem, i) for i in subset)
    return [
        f"The best subset of the levels is {kept}: S^2 = {best:.6g}, not {whole:.6g}, "
        f"so {1 - best / whole:.1%} less variance at the same cost."
    ]


def _against_plain(problem: Problem, variance: Array, speedup: Array | None) -> list[str]:
    if speedup is None:
        return []
    sentences = []
    finest = _place(problem, len(problem.names) - 1)
    for k in np.flatnonzero(speedup < 1).tolist():
        where = f" for output {k}" if problem.several else ""
        sentences.append(
            f"Plain Monte Carlo on {finest} alone beats this stack{where}: "
            f"for the same cost its variance is {speedup[k] * variance[k]:.6g}, not {variance[k]:.6g}."
        )
    return sentences


def _doubled(problem: Problem, goal: Goal, n: Array, variance: Array, cost: float) -> str:
    past = cost - float(n @ goal.costs)  # spent on runs that left no rows
    what, total = ("budget", 2 * (goal.limit + past)) if isinstance(goal, BudgetGoal) else ("cost", 2 * cost)
    larger = BudgetGoal(goal.costs, goal.weights, goal.lower, goal.upper, total - past)
    now = float((goal.weights / n).sum())
    then = float((goal.weights / larger.continuous()).sum())
    sentence = f"Doubling the {what} to {total:.6g} would"
    if then >= now:
        return f"{sentence} change nothing: bounds or zero variances hold every level."
    sentence += f" multiply the variance by {then / now:.4g}"
    return f"{sentence}, over all outputs." if problem.several else f"{sentence}, to {variance[0] * then / now:.6g}."
