r"""Splits a budget over levels, or meets a target variance, at the least variance or cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from mlsbi.allocation.advising import give_advice
from mlsbi.allocation.arrays import Array
from mlsbi.allocation.limits import read_bounds
from mlsbi.allocation.problem import Problem, Report, read_problem
from mlsbi.allocation.solution import solve

__all__ = ["Allocation", "optimal_allocation"]


@dataclass(frozen=True)
class Allocation:
    r"""How many rows of each level's term to run, and what they buy; `print` it as a table.

    With several outputs `variance`, `weighted_variance`, `single_level_variance`
    and `speedup` are tuples, one entry an output, and `variances` and `weights`
    tuples of tuples.

    Args:
        n: Rows per level, those that exist already included.
        continuous: The solution within the bounds before it was rounded.
        cost: Cost of `n`, in the unit of the costs; with a report, everything the pilot spent included.
        variance: Predicted variance of the multilevel estimator with `n` rows; with `weights="optimal"`, of the
            weighted one.
        unspent: What is left of the budget; 0 where a target was given.
        single_level_variance: Var f^L; `None` if unknown.
        speedup: `single_level_variance * C_L / (variance * sum(n * pair_costs))`: how many times larger the variance
            of plain Monte Carlo on the finest level is, at the cost of these rows, be it a whole number of runs or not.
            `None` if Var f^L or C_L, the cost of one finest run, is unknown, or the predicted variance is zero.
        binding: Bounds that keep `continuous` from the unbounded optimum, in words.
        advice: Sentences worth reading before spending anything.
        names: Level names.
        pair_costs: Cost of one row of each level's term.
        variances: Variance of each level's correction; with `weights="optimal"`, of the weighted one,
            Var(a_l f^l - a_{l-1} f^{l-1}).
        shares: Each level's part of the predicted variance, between 0 and 1; the mean over outputs.
        rows: Rows per level that exist already.
        overhead: Cost of past runs that left none of `rows` behind, as the lower levels of a pilot.
        weights: The control-variate weights a_0..a_L (the last is 1) of least variance for `n`, whether the sizes were
            chosen for them or not; `None` without a covariance.
        weighted_variance: The variance that they reach with `n`.
        interval: From where to where `continuous` goes as the pilot's variances are drawn anew by bootstrap: 5% and
            95% quantiles per level, rounded. `None` without such draws, where some of them keep a target out of
            reach, or with `weights="optimal"`, whose variances need more than the draws tell.
    """

    n: tuple[int, ...]
    continuous: tuple[float, ...]
    cost: float
    variance: float | tuple[float, ...]
    unspent: float
    single_level_variance: float | tuple[float, ...] | None
    speedup: float | tuple[float, ...] | None
    binding: tuple[str, ...]
    advice: tuple[str, ...]
    names: tuple[str, ...]
    pair_costs: tuple[float, ...]
    variances: tuple[float, ...] | tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]
    rows: tuple[int, ...]
    overhead: float
    weights: tuple[float, ...] | tuple[tuple[float, ...], ...] | None
    weighted_variance: float | tuple[float, ...] | None
    interval: tuple[tuple[int, int], ...] | None

    @property
    def level_costs(self) -> tuple[float, ...]:
        r"""Cost of all rows of each level."""
        return tuple(n * cost for n, cost in zip(self.n, self.pair_costs, strict=True))

    def to_dict(self) -> dict[str, object]:
        r"""Everything as numbers, strings, lists and `None`, ready for `json.dumps`."""
        return {name: _listed(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        r"""A table with a line per level, the totals, then the advice."""
        outputs = np.atleast_2d(np.asarray(self.variances))
        several = isinstance(self.variance, tuple)
        heads = ["level", "name", "n", *(["90% interval"] if self.interval else []), "cost/row", "cost"]
        heads += [f"variance[{k}]" for k in range(len(outputs))][:4] if several else ["variance"]
        table = [[*heads, "share"]]
        for i, name in enumerate(self.names):
            between = [f"{self.interval[i][0]}-{self.interval[i][1]}"] if self.interval else []
            numbers = [self.pair_costs[i], self.level_costs[i], *outputs[:4, i]]
            cells = [str(i), name, str(self.n[i]), *between, *(f"{v:.6g}" for v in numbers), f"{self.shares[i]:.1%}"]
            table.append(cells)
        if self.names == tuple(str(i) for i in range(len(self.names))):
            table = [[row[0], *row[2:]] for row in table]
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        cost = f"cost {self.cost:.6g}"
        if self.overhead > 0:
            cost += f" ({self.overhead:.6g} of it spent beside these rows)"
        unknown = "needs Var f^L" if self.single_level_variance is None else "needs the cost of one finest run"
        if np.any(np.asarray(self.variance) == 0):
            unknown = "the predicted variance is zero"
        speedup = f"unknown: {unknown}" if self.speedup is None else _shown(self.speedup)
        lines.append(
            f"{cost}, unspent {self.unspent:.6g}, predicted variance {_shown(self.variance)}, "
            f"speed-up over high-only {speedup}"
        )
        return "\n".join([*lines, *(f"- {sentence}" for sentence in self.advice)])


def optimal_allocation(
    variances_or_report: ArrayLike | Report,
    costs: ArrayLike | None = None,
    *,
    budget: float | None = None,
    target_variance: ArrayLike | None = None,
    pair_costs: ArrayLike | None = None,
    minimum: ArrayLike = 1,
    maximum: ArrayLike | None = None,
    spent: ArrayLike | None = None,
    single_level_variance: ArrayLike | None = None,
    covariance: ArrayLike | None = None,
    weights: Literal["unit", "optimal"] = "unit",
) -> Allocation:
    r"""Splits a budget over levels, or meets a target variance, as cheaply as possible.

    With :math:`c_\ell` the cost of one row of level l's term and :math:`V_\ell` its variance,

    .. math::
        n_\ell = \frac{B}{S} \sqrt{V_\ell / c_\ell} \quad\text{or}\quad
        n_\ell = \frac{S}{\varepsilon^2} \sqrt{V_\ell / c_\ell}, \qquad S = \sum_\ell \sqrt{V_\ell c_\ell},

    within the bounds, then the best whole numbers: the exact optimum where a
    search over all candidates is short (two or three levels, or few runs),
    else sizes that no exchange between two levels improves.

    Args:
        variances_or_report: Variance of each level's correction, level 0's own first, shape `(L + 1,)`, or
            `(outputs, L + 1)`; or a pilot's report in place of every number but the goal and the bounds.
        costs: Cost of one simulation of each level, any unit, shape `(L + 1,)`. A row of level l costs
            `costs[l] + costs[l - 1]`.
        budget: Total cost, in the unit of `costs`; it includes what `spent` or the report's pilot cost. With several
            outputs the sum of their variances, each relative to its first level's, is minimised (relative to its
            largest where the first is zero).
        target_variance: Variance to reach at least cost, in place of a budget; one number, or one per output. All
            are met, up to float64 rounding.
        pair_costs: Cost of one row of each level's term, shape `(L + 1,)`, in place of that sum; entry 0 is level
            0's own cost. `costs` then only serves the comparison with other subsets of the levels.
        minimum: Least rows, at least 1; one number or one per level.
        maximum: Most rows; one number or one per level, `None` for no bound.
        spent: Rows that exist already and count in `n`; one number or one per level.
        single_level_variance: Var f^L, for the comparison with plain Monte Carlo; one number, or one per output.
        covariance: Covariance of f^0..f^L, shape `(L + 1, L + 1)`, or `(outputs, L + 1, L + 1)`: gives Var f^L and
            compares subsets of the levels and control-variate weights. It must agree with the variances: measure both
            on the same rows.
        weights: `"unit"` for the telescoping sum of the levels. `"optimal"` chooses sizes for its weighted form,
            :math:`\sum_\ell a_\ell \bar f^\ell - a_{\ell-1} \bar f^{\ell-1}` with :math:`a_L = 1`, each output with
            weights of its own, and needs a covariance. The form is unbiased for weights fixed in advance; rows that
            measured the covariance and are used again in the sum bias it a little.

    Returns:
        An allocation of at least one row per level. With a budget its cost is at most the budget.

    Raises:
        ValueError: If not exactly one of `budget` and `target_variance` is given, a variance is negative, a cost not
            positive, anything not finite, shapes disagree, the budget cannot buy the least rows (the message names
            the smallest that can), `maximum` keeps the target out of reach (the message names what it allows), a
            level would need 2**53 rows or more, variances and covariance contradict each other, or optimal weights
            are asked for without a covariance.

    References:
        | Multilevel Monte Carlo methods (Giles, 2015), section 1.3
        | https://doi.org/10.1017/S096249291500001X

    Example:
        >>> plan = optimal_allocation([4.0, 1.0], [1.0, 3.0], budget=16.0)
        >>> plan.n, plan.cost, plan.variance
        ((8, 2), 16.0, 1.0)
        >>> optimal_allocation([4.0, 1.0], pair_costs=[1.0, 4.0], target_variance=0.01).n
        (800, 200)
        >>> print(optimal_allocation([4.0, 1.0], [1.0, 3.0], budget=16.0, single_level_variance=4.0))
        level  n  cost/row  cost  variance  share
            0  8         1     8         4  50.0%
            1  2         4     8         1  50.0%
        cost 16, unspent 0, predicted variance 1, speed-up over high-only 0.75
        - Plain Monte Carlo on level 1 alone beats this stack: for the same cost, n = 5, its variance is 0.8, not 1.
        - Doubling the budget to 32 would multiply the variance by 0.5, to 0.5.
        >>> joint = [[1.0, 0.5], [0.5, 1.0]]
        >>> plan = optimal_allocation([1, 1], pair_costs=[4, 4800], budget=14640, covariance=joint, weights="optimal")
        >>> plan.n, [round(weight, 3) for weight in plan.weights]
        ((60, 3), [0.476, 1.0])
    """
    if weights not in ("unit", "optimal"):
        raise ValueError(f'Expected weights "unit" or "optimal"; got {weights!r}. Pass one of them.')
    given = read_problem(variances_or_report, costs, pair_costs, spent, single_level_variance, covariance)
    problem = given.scaled()
    least, lower, upper = read_bounds(minimum, maximum, problem.rows)
    found = solve(problem, lower, upper, budget=budget, target=target_variance, weighted=weights == "optimal")
    n, unit, interval = found.n, problem.variance_unit, found.interval
    binding, advice = give_advice(problem, found, least)
    parts = found.variances / n
    whole = parts.sum(axis=1, keepdims=True)
    share = parts / np.where(whole > 0, whole, 1)
    cost = found.cost * problem.cost_unit
    return Allocation(
        n=tuple(int(v) for v in n),
        continuous=tuple(found.goal.continuous().tolist()),
        cost=cost,
        variance=_each(found.variance * unit, problem),
        unspent=0.0 if budget is None else float(budget) - cost,
        single_level_variance=_each(given.single_level_variance, problem),
        speedup=_each(_speedup(problem, n, found.variance), problem),
        binding=binding,
        advice=advice,
        names=problem.names,
        pair_costs=tuple(given.pair_costs.tolist()),
        variances=_each(found.variances * unit[:, None], problem),
        shares=tuple(share.mean(axis=0).tolist()),
        rows=tuple(int(v) for v in problem.rows),
        overhead=max(given.sunk - float(given.rows @ given.pair_costs), 0.0),
        weights=_each(found.weights, problem),
        weighted_variance=_each(None if found.weighted_variance is None else found.weighted_variance * unit, problem),
        interval=None if interval is None else tuple((int(low), int(high)) for low, high in interval.T),
    )


def _speedup(problem: Problem, n: Array, variance: Array) -> Array | None:
    if problem.single_level_variance is None or problem.costs is None or (variance == 0).any():
        return None
    speedup: Array = problem.single_level_variance * problem.costs[-1] / (variance * float(n @ problem.pair_costs))
    return speedup


def _each(values: Array | None, problem: Problem) -> Any:  # noqa: ANN401
    if values is None:
        return None
    if not problem.several:
        return values[0].item() if values.ndim == 1 else tuple(values[0].tolist())
    return tuple(tuple(v) if isinstance(v, list) else v for v in values.tolist())


def _listed(value: object) -> object:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value


def _shown(value: float | tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in value) + ")" if isinstance(value, tuple) else f"{value:.6g}"
