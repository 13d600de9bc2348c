r"""What level sizes minimise: variance within a budget, or cost within target variances; continuous solutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mlsbi.allocation.arrays import Array
from mlsbi.allocation.water import budget_water, find_sizes, target_water

__all__ = ["BudgetGoal", "Goal", "TargetGoal", "target_multipliers"]


@dataclass(frozen=True, eq=False)
class Goal(ABC):
    r"""What sizes minimise and what they must respect, within `lower <= n <= upper`.

    Both goals have the continuous solution `clip(water * sqrt(weights / costs))`
    for one number, the water level, with `weights` the variances of all outputs
    combined into one. A subclass implements `water_level`,
    `continuous_of`, `feasible`, `safe`, `fill`, `scores` and `surplus`.

    Args:
        costs: Cost of one sample, shape `(L + 1,)`.
        variances: Variances of the corrections of K outputs, shape `(K, L + 1)`.
        outputs: Weight of each output in what is minimised, shape `(K,)`.
        lower: Least sizes, whole numbers of at least 1, shape `(L + 1,)`.
        upper: Largest sizes, whole numbers or infinity, shape `(L + 1,)`.
    """

    costs: Array
    variances: Array
    outputs: Array
    lower: Array
    upper: Array

    @cached_property
    def weights(self) -> Array:
        r"""Variances combined into one, shape `(L + 1,)`."""
        return self.outputs @ self.variances

    @cached_property
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
        return find_sizes(np.asarray(water), self.rates, lower, upper)

    def continuous(self) -> Array:
        r"""Best sizes when fractions are allowed, shape `(L + 1,)`."""
        return self.sizes(self.water_level(self.lower, self.upper), self.lower, self.upper)

    def ordered(self, order: NDArray[np.intp]) -> Goal:
        r"""The same goal with its levels in another order."""
        names = ("costs", "variances", "lower", "upper")
        return replace(self, **{name: getattr(self, name)[..., order] for name in names})

    @abstractmethod
    def water_level(self, lower: Array, upper: Array) -> float:
        r"""Water level of the continuous solution within the given bounds."""

    @abstractmethod
    def continuous_of(self, variances: Array) -> Array:
        r"""Best continuous sizes for other variances of the one output, `(m, L + 1)` each; NaN where there are none."""

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
        return float(budget_water(self.costs, self.rates[None], lower, upper, self.limit)[0])

    def continuous_of(self, variances: Array) -> Array:
        r"""Each at its own water level."""
        rates = np.sqrt(variances / self.costs)
        water = budget_water(self.costs, rates, self.lower, self.upper, self.limit)
        return find_sizes(water, rates, self.lower, self.upper)

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
    r"""Least cost for variances of at most `targets`, shape `(K,)`; `outputs` are their multipliers."""

    targets: Array

    def water_level(self, lower: Array, upper: Array) -> float:
        r"""The lowest level at which all targets are met."""
        rates = np.broadcast_to(self.rates, self.variances.shape)
        return float(target_water(self.variances, self.targets, rates, lower, upper).max())

    def continuous_of(self, variances: Array) -> Array:
        r"""Each at its own water level."""
        rates = np.sqrt(variances / self.costs)
        targets = np.broadcast_to(self.targets, len(variances))
        water = target_water(variances, targets, rates, self.lower, self.upper)
        sizes = find_sizes(water, rates, self.lower, self.upper)
        return np.where(self._meets(variances, self.upper)[:, None], sizes, np.nan)

    def feasible(self, lower: Array, upper: Array) -> bool:
        r"""Whether the largest sizes meet all targets."""
        return bool(self._meets(self.variances, upper).all())

    def _meets(self, variances: Array, upper: Array) -> NDArray[np.bool_]:
        r"""Which of several variances, `(m, L + 1)`, some sizes up to `upper` bring to their target, `(m,)`."""
        reached = (variances / upper).sum(axis=1)
        attained = (np.isfinite(upper) | (variances == 0)).all(axis=1)
        return (reached < self.targets) | (attained & (reached <= self.targets * (1 + self.tolerance)))

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
        return float(n @ self.costs + water**2 * (self.outputs @ self.targets))


def target_multipliers(costs: Array, variances: Array, targets: Array, lower: Array, upper: Array) -> Array:
    r"""Weights of the outputs with which one weighted variance stands for all targets, shape `(outputs,)`.

    The multipliers of :math:`\min c \cdot n` subject to
    :math:`\sum_\ell V_{k\ell} / n_\ell \le t_k`, by Chromy's fixed point
    :math:`\kappa_k \leftarrow \kappa_k (\mathrm{Var}_k / t_k)^2`. Any positive
    values keep the sizes found with them feasible; good ones make them cheap.
    There are none where `upper` keeps a target out of reach: then 1 / t.

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
    if len(targets) == 1 or ((variances / upper).sum(axis=1) > targets).any():
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
