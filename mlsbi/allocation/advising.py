r"""Says in plain words what an allocation hides: useless levels, active bounds, better subsets and weights."""

from __future__ import annotations

import numpy as np

from mlsbi.allocation.arrays import Array
from mlsbi.allocation.goals import BudgetGoal, Goal, TargetGoal
from mlsbi.allocation.problem import Problem
from mlsbi.allocation.solution import Solution

__all__ = ["best_subset", "give_advice"]

_WORTH_SAYING = 0.01  # relative gain
_FELT = 0.001  # the same of bounds, which are the user's own


def give_advice(problem: Problem, found: Solution, minimum: Array) -> tuple[tuple[str, ...], tuple[str, ...]]:
    r"""Puts the active bounds and the advice into words.

    Args:
        problem: The numbers that were allocated; advice is in the user's units, not in its own.
        found: The sizes found.
        minimum: Least rows as the user gave them, shape `(L + 1,)`.

    Returns:
        Active bounds, and sentences.
    """
    below, above = _active(found.goal)
    bound = {
        **{i: "minimum" if minimum[i] >= problem.rows[i] else "rows already there" for i in below},
        **dict.fromkeys(above, "maximum"),
    }
    words = {i: f"{bound[i]} on {problem.place(i)}" for i in sorted(bound)}
    sentences = [*_useless(problem, found), *_bounded(found, words), *_subsets(problem, found)]
    sentences += _gained(problem, found) if found.weighted else _possible(problem, found)
    sentences += [*_against_plain(problem, found), *_unreached(problem, found), _doubled(problem, found)]
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


def _active(goal: Goal) -> tuple[list[int], list[int]]:
    r"""Levels that the unbounded solution at the same water level would put below, and above, their bounds."""
    free = goal.water_level(goal.lower, goal.upper) * goal.rates
    # A size that meets its bound by itself is not held there: 1e-9 is far above rounding, far below a run.
    below, above = free < goal.lower * (1 - 1e-9), free > goal.upper * (1 + 1e-9)
    return np.flatnonzero(below).tolist(), np.flatnonzero(above).tolist()


def _useless(problem: Problem, found: Solution) -> list[str]:
    sentences = []
    for i in np.flatnonzero((problem.variances == 0).all(axis=0)).tolist():
        if i == 0:
            advice = "its output never varies, so it could be left out of the stack"
        else:
            advice = f"it agrees exactly with level {i - 1}, so one of the two could be left out of the stack"
        place = problem.place(i)
        sentences.append(f"The correction of {place} has zero variance and gets {found.n[i]:.0f} rows: {advice}.")
    if len(problem.variances) > 1 and isinstance(found.goal, BudgetGoal):
        for k in np.flatnonzero(problem.variances[:, 0] == 0).tolist():
            scale = "is left out of the sum" if not problem.variances[k].any() else "is taken relative to its largest"
            sentences.append(f"Output {k} has zero variance on level 0: its variance {scale}.")
    return sentences


def _bounded(found: Solution, words: dict[int, str]) -> list[str]:
    goal = found.goal
    held = [words[i] for i in words if goal.weights[i] > 0]
    if not held:
        return []
    sentence = "Active bounds: " + ", ".join(held)
    if isinstance(goal, BudgetGoal):
        free = float(np.sqrt(goal.weights * goal.costs).sum()) ** 2 / goal.limit
        reached = float((goal.weights / goal.continuous()).sum())
        if free > reached * (1 - _FELT):
            return []
        same = ", with the same control-variate weights," if found.weighted else ""
        sentence += f"; without them{same} the variance would be {1 - free / reached:.2%} lower"
    return [sentence + "."]


def _subsets(problem: Problem, found: Solution) -> list[str]:
    if problem.covariance is None or len(problem.names) == 1:
        return []
    if problem.costs is None:
        return ["Pass costs beside pair_costs to compare subsets of the levels."]
    goal = found.goal
    subset, best, whole = best_subset(problem, goal.outputs)
    unit = ""
    if found.weighted:
        whole, unit = float(np.sqrt(goal.weights * goal.costs).sum()) ** 2, " at unit weights"
    large = f"At large budgets{_unbounded(goal)}"
    if len(subset) == len(problem.names) or best >= whole:
        return [f"{large} no subset of the levels{unit} beats all of them together."]
    if best > whole * (1 - _WORTH_SAYING):
        return [f"{large} no subset of the levels{unit} beats all of them together by {_WORTH_SAYING:.0%}."]
    kept = ", ".join(problem.place(i) for i in subset)
    # Several outputs, each with its weight, have no unit.
    scale, over = problem.cost_unit, " over all outputs"
    if len(goal.outputs) == 1:
        scale, over = scale * (problem.variance_unit[0] / goal.outputs[0]).item(), ""
    return [
        f"{large} the best subset of the levels{unit} is {kept}: S^2 = {best * scale:.6g}, not {whole * scale:.6g}, "
        f"so {1 - best / whole:.1%} less variance{over} at the same cost."
    ]


def _unbounded(goal: Goal) -> str:
    r"""What to say where bounds are left out; a minimum alone is met by any large budget."""
    return " and without the maximum" if np.isfinite(goal.upper).any() else ""


def _possible(problem: Problem, found: Solution) -> list[str]:
    r"""What control-variate weights would gain on the same rows, where it is worth saying."""
    if found.weights is None or found.weighted_variance is None:
        return []
    sentences = []
    for k, (weights, variance) in enumerate(zip(found.weights, found.weighted_variance, strict=True)):
        if variance < found.variance[k] * (1 - _WORTH_SAYING):
            where = f" for output {k}" if problem.several else ""
            sentences.append(
                f"With control-variate weights a = {_listed(weights)} the same rows would reach variance "
                f"{variance * problem.variance_unit[k]:.6g}{where}, {1 - variance / found.variance[k]:.1%} less."
            )
    return sentences


def _gained(problem: Problem, found: Solution) -> list[str]:
    r"""What control-variate weights, and sizes that suit them, gain."""
    if len(problem.names) == 1:
        return []
    weights = "Control-variate weights"
    if found.weights is not None and not problem.several:
        weights += f" a = {_listed(found.weights[0])}"
    if found.unit is None:
        return [f"{weights} reach the target variance; unit weights do not, within the maximum."]
    for_target = isinstance(found.goal, TargetGoal)
    now, before = (found.cost, found.unit.cost) if for_target else (found.combined, found.unit.combined)
    if before == 0:
        return []
    gain = 1 - now / before
    if gain < _WORTH_SAYING:
        return [f"{weights} gain less than {_WORTH_SAYING:.0%} over unit weights."]
    if for_target:
        return [f"{weights} cost {gain:.1%} less than unit weights for the same target."]
    over = " over all outputs" if problem.several else ""
    return [f"{weights} reach {gain:.1%} less variance{over} than unit weights at the same budget."]


def _listed(weights: Array) -> str:
    return "(" + ", ".join(f"{weight:.3g}" for weight in weights) + ")"


def _unreached(problem: Problem, found: Solution) -> list[str]:
    if problem.draws is None or not found.unreached:
        return []
    return [
        f"No interval of the sizes: in {found.unreached} of {len(problem.draws)} bootstrap draws the maximum keeps the "
        "target out of reach."
    ]


def _against_plain(problem: Problem, found: Solution) -> list[str]:
    r"""Where plain Monte Carlo is better: whole rows for what is not yet spent, beside those that exist already."""
    single = problem.single_level_variance
    if single is None or problem.costs is None or len(problem.names) == 1:
        return []
    goal, cost, already = found.goal, float(problem.costs[-1]), problem.rows[-1]
    total = goal.limit if isinstance(goal, BudgetGoal) else float(found.n @ goal.costs)
    left = total * (1 + goal.tolerance) - float(problem.rows @ goal.costs)
    n = min(already + np.floor(left / cost), goal.upper[-1])
    if n < 1:
        return []
    runs = f"n = {n:.0f}" + (f" ({already:.0f} of them already there)" if already else "")
    moving = goal.weights > 0
    stack = (goal.variances[:, moving] / goal.rates[moving]).sum(axis=1) * float(goal.costs @ goal.rates)
    sentences = []
    for k in np.flatnonzero(single / n < found.variance * (1 - _WORTH_SAYING)).tolist():
        where = f" for output {k}" if problem.several else ""
        here, there = (float(v * problem.variance_unit[k]) for v in (found.variance[k], single[k] / n))
        sentence = (
            f"Plain Monte Carlo on {problem.place(len(problem.names) - 1)} alone beats this stack{where}: "
            f"for the same cost, {runs}, its variance is {there:.6g}, not {here:.6g}"
        )
        gain = 1 - stack[k] / (single[k] * cost) if single[k] > 0 else -np.inf
        if gain >= _WORTH_SAYING:
            sentence += f"; at large budgets{_unbounded(goal)} the levels win, with {gain:.1%} less variance"
        elif gain > -_WORTH_SAYING:
            sentence += f"; at large budgets{_unbounded(goal)} the two are alike"
        sentences.append(f"{sentence}.")
    return sentences


def _doubled(problem: Problem, found: Solution) -> str:
    goal, cost = found.goal, found.cost
    past = cost - float(found.n @ goal.costs)  # spent on runs that left no rows
    what, total = ("budget", 2 * (goal.limit + past)) if isinstance(goal, BudgetGoal) else ("cost", 2 * cost)
    larger = BudgetGoal(goal.costs, goal.variances, goal.outputs, goal.lower, goal.upper, total - past)
    now = found.combined
    then = float((goal.weights / larger.continuous()).sum())
    sentence = f"Doubling the {what} to {total * problem.cost_unit:.6g} would"
    if then >= now:
        return f"{sentence} change nothing: bounds or zero variances hold every level."
    sentence += f" multiply the variance by {then / now:.4g}"
    if problem.several:
        return f"{sentence}, over all outputs."
    return f"{sentence}, to {found.variance[0] * then / now * problem.variance_unit[0]:.6g}."
