r"""What level sizes minimise: variance within a budget, or cost within target variances; continuous solutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["BudgetGoal", "Goal", "TargetGoal", "target_multipliers"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Goal(ABC):
    r"""What sizes minimise and what they must respect, within `lower <= n <= upper`.

    Both goals have the continuous solution `clip(water * sqrt(weights / costs))`
    for one number, the water level. A subclass implements `water_level`,
    `feasible`, `safe`, `fill`, `scores` and `surplus`.

    Args:
        costs: Cost of one sample, shape `(L + 1,)`.
        weights: Variances combined into one, shape `(L + 1,)`.
        lower: Least sizes, whole numbers of at least 1, shape `(L + 1,)`.
        upper: Largest sizes, whole numbers or infinity, shape `(L + 1,)`.
    """

    costs: Array
    weights: Array
    lower: Array
    upper: Array

    @property
    def rates(self) -> Array:
        r"""Relative sizes of the unbounded solution, shape `(L + 1,)`."""
        return np.sqrt(self.weights / self.costs)

    @property
    def tolerance(self) -> float:
        r"""Relative error that a sum over the levels may carry in float64, with a factor of eight to spare.

        Sizes that are whole numbers in exact arithmetic may come out this far
        beside them, and must not be rounded to the next one.
        """
        return 8 * (self.costs.size + 1) * float(np.finfo(np.float64).eps)

    def sizes(self, water: float, lower: Array, upper: Array) -> Array:
        r"""Continuous sizes at a water level, shape `(L + 1,)`."""
        return np.clip(water * self.rates, lower, upper)

    def continuous(self) -> Array:
        r"""Best sizes when fractions are allowed, shape `(L + 1,)`."""
        return self.sizes(self.water_level(self.lower, self.upper), self.lower, self.upper)

    def ordered(self, order: NDArray[np.intp]) -> Goal:
        r"""The same goal with its levels in another order."""
        names = ("costs", "weights", "lower", "upper", "variances")
        return replace(self, **{name: getattr(self, name)[..., order] for name in names if hasattr(self, name)})

    def marks(self, lower: Array, upper: Array) -> Array:
        r"""Water levels at which a size meets or leaves a bound, ascending, shape `(marks,)`."""
        moving = self.rates > 0
        both = np.concatenate([lower[moving] / self.rates[moving], upper[moving] / self.rates[moving]])
        return np.sort(both[np.isfinite(both)])

    @abstractmethod
    def water_level(self, lower: Array, upper: Array) -> float:
        r"""Water level of the continuous solution within the given bounds."""

    @abstractmethod
    def feasible(self, lower: Array, upper: Array) -> bool:
        r"""Whether any sizes within the given bounds respect the goal."""

    @abstractmethod
    def safe(self, n: Array) -> Array:
        r"""Whole numbers next to feasible sizes that are feasible too, shape `(L + 1,)`."""

    @abstractmethod
    def fill(self, n: Array, into: NDArray[np.intp]) -> Array:
        r"""Best size of one level a row given the others, NaN where there is none, `(m, L + 1)` to `(m,)`."""

    @abstractmethod
    def scores(self, n: Array) -> tuple[Array, Array]:
        r"""What is minimised, and what decides between equals, `(m, L + 1)` to `(m,)` each."""

    @abstractmethod
    def surplus(self, n: Array, water: float) -> float:
        r"""Largest Lagrangian, in cost units, of feasible sizes that are at least as good as `n`."""


@dataclass(frozen=True, eq=False)
class BudgetGoal(Goal):
    r"""Least weighted variance for a total cost of at most `limit`."""

    limit: float

    def water_level(self, lower: Array, upper: Array) -> float:
        r"""The level at which the sizes cost the limit."""
        marks = self.marks(lower, upper)
        if not marks.size:
            return 1.0  # no level has any variance: every size is its lower bound
        spent = self.sizes_at(marks, lower, upper) @ self.costs  # (marks,), ascending
        i = int(np.searchsorted(spent, self.limit, side="right"))
        if i == 0:
            return float(marks[0])
        inside = _between(marks, i)
        n = self.sizes(inside, lower, upper)
        free = (n > lower) & (n < upper)
        slope = float(self.costs[free] @ self.rates[free])
        if slope == 0:
            return inside  # every size is at its upper bound
        water = (self.limit - float(self.costs[~free] @ n[~free])) / slope
        return max(water, float(marks[i - 1]))

    def sizes_at(self, marks: Array, lower: Array, upper: Array) -> Array:
        r"""Continuous sizes at several water levels, `(marks,)` to `(marks, L + 1)`."""
        return np.clip(marks[:, None] * self.rates, lower, upper)

    def feasible(self, lower: Array, upper: Array) -> bool:
        r"""Whether the least sizes are within the limit."""
        return bool(lower @ self.costs <= self.limit * (1 + self.tolerance))

    def safe(self, n: Array) -> Array:
        r"""Rounds down."""
        return np.floor(n)

    def fill(self, n: Array, into: NDArray[np.intp]) -> Array:
        r"""All that the other levels leave of the limit."""
        row = np.arange(len(n))
        others = n @ self.costs - n[row, into] * self.costs[into]
        size = np.floor((self.limit * (1 + self.tolerance) - others) / self.costs[into])
        return np.where(size < self.lower[into], np.nan, np.minimum(size, self.upper[into]))

    def scores(self, n: Array) -> tuple[Array, Array]:
        r"""Variance, then cost."""
        variance = (self.weights / n).sum(axis=-1)
        return np.where(np.isnan(variance), np.inf, variance), n @ self.costs

    def surplus(self, n: Array, water: float) -> float:
        r"""Feasible sizes cost at most the limit."""
        return water**2 * float((self.weights / n).sum()) + self.limit


@dataclass(frozen=True, eq=False)
class TargetGoal(Goal):
    r"""Least cost for variances of at most `targets`; `weights` is `multipliers @ variances`."""

    variances: Array  # (outputs, L + 1)
    targets: Array  # (outputs,)
    multipliers: Array  # (outputs,)

    def water_level(self, lower: Array, upper: Array) -> float:
        r"""The lowest level at which all targets are met."""
        marks = self.marks(lower, upper)
        if not marks.size:
            return 1.0
        n = np.clip(marks[:, None] * self.rates, lower, upper)
        reached = (1 / n) @ self.variances.T  # (marks, outputs), descending
        missed = (reached > self.targets).sum(axis=0)
        waters = [self._output_water(k, int(i), marks, lower, upper) for k, i in enumerate(missed)]
        return max(waters)

    def _output_water(self, output: int, missed: int, marks: Array, lower: Array, upper: Array) -> float:
        if missed == 0:
            return float(marks[0])
        inside = _between(marks, missed)
        n = self.sizes(inside, lower, upper)
        free = (n > lower) & (n < upper)
        variances = self.variances[output]
        slope = float((variances[free] / self.rates[free]).sum())
        room = float(self.targets[output] - (variances[~free] / n[~free]).sum())
        if slope == 0 or room <= 0:
            return float(marks[min(missed, marks.size - 1)])  # rounding: the target is met at a mark
        return max(slope / room, float(marks[missed - 1]))

    def feasible(self, lower: Array, upper: Array) -> bool:
        r"""Whether the largest sizes meet all targets."""
        reached = (self.variances / upper).sum(axis=1)
        attained = np.isfinite(upper[self.weights > 0]).all()
        limit = self.targets * (1 + self.tolerance)
        return bool((reached <= limit).all() if attained else (reached < self.targets).all())

    def safe(self, n: Array) -> Array:
        r"""Rounds up."""
        return np.ceil(n)

    def fill(self, n: Array, into: NDArray[np.intp]) -> Array:
        r"""As few as the targets need beside the other levels."""
        own = self.variances[:, into].T  # (m, outputs)
        others = (1 / n) @ self.variances.T - own / n[np.arange(len(n)), into][:, None]
        room = self.targets * (1 + self.tolerance) - others
        with np.errstate(divide="ignore", invalid="ignore"):
            needed = np.where(own > 0, own / room, 0.0)
        size = np.maximum(np.ceil(needed.max(axis=1)), self.lower[into])
        missed = ((room <= 0) & (own > 0)).any(axis=1) | (room < 0).any(axis=1) | (size > self.upper[into])
        return np.where(missed, np.nan, size)

    def scores(self, n: Array) -> tuple[Array, Array]:
        r"""Cost, then weighted variance."""
        cost = n @ self.costs
        return np.where(np.isnan(cost), np.inf, cost), (self.weights / n).sum(axis=-1)

    def surplus(self, n: Array, water: float) -> float:
        r"""Feasible sizes have at most the targets' variances."""
        return float(n @ self.costs + water**2 * (self.multipliers @ self.targets))


def _between(marks: Array, i: int) -> float:
    r"""A water level after mark `i - 1` and before mark `i`."""
    return float(2 * marks[-1] if i == marks.size else (marks[i - 1] + marks[i]) / 2)


def target_multipliers(costs: Array, variances: Array, targets: Array, lower: Array, upper: Array) -> Array:
    r"""Weights of the outputs with which one weighted variance stands for all targets, shape `(outputs,)`.

    The multipliers of :math:`\min c \cdot n` subject to
    :math:`\sum_\ell V_{k\ell} / n_\ell \le t_k`, by Chromy's fixed point
    :math:`\kappa_k \leftarrow \kappa_k (\mathrm{Var}_k / t_k)^2`. Any positive
    values keep the sizes found with them feasible; good ones make them cheap.

    Args:
        costs: Shape `(L + 1,)`.
        variances: Shape `(outputs, L + 1)`.
        targets: Shape `(outputs,)`.
        lower: Shape `(L + 1,)`.
        upper: Shape `(L + 1,)`.

    References:
        | Design optimization with multiple objectives (Chromy, 1987)
        | Proceedings of the Survey Research Methods Section, ASA, 194-199
    """
    kappa = 1 / targets
    if len(targets) == 1:
        return kappa
    for _ in range(300):  # converges linearly; the search over whole numbers mends what is left
        n = np.clip(np.sqrt(kappa @ variances / costs), lower, upper)
        ratio = (variances / n).sum(axis=1) / targets
        idle = float(kappa @ (targets * np.abs(1 - ratio)))
        if ratio.max() <= 1 + 1e-9 and idle <= 1e-9 * float(costs @ n):
            break
        kappa = kappa * np.maximum(ratio, 1e-3) ** 2
        # An output that is idle now may be needed later: keep a trace of it.
        kappa = np.maximum(kappa, 1e-12 * (kappa * targets).max() / targets)
    return kappa
