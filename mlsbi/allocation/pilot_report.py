r"""What a pilot measured, how well it knows it, and what to think about before the budget is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from mlsbi.allocation.checking import convergence_rates, rows_needed
from mlsbi.allocation.moments import Moments
from mlsbi.allocation.networks import STATES
from mlsbi.data import MultilevelData
from mlsbi.levels import sum_pair_costs

__all__ = ["PilotReport"]

_KURTOSIS_LIMIT = 100.0  # above it a few rare rows decide the variance (Giles 2015, section 3.3)
_ERROR_LIMIT = 0.5  # relative standard error of a variance, which few rows reach at a far smaller kurtosis
_ERROR_AIM = 0.2
_FEW_ROWS = 32  # below, a large error says more about their number than about rare ones
_DRIFT_LIMIT = 3.0
_OPPOSITE = 3.0  # times the chance level, where a negative correlation is no chance
_LEVEL_COLUMNS = {
    "level": "level", "cost per run": "cost/run", "cost per row": "cost/row", "variance": "variance",
    "variance of correction": "of correction", "kurtosis": "kurtosis",
}  # fmt: skip
_PAIR_COLUMNS = {
    "level": "pairs with level below", "correlation with level below": "correlation",
    "correlation of shuffled rows": "(shuffled)", "correlation of the noise": "of the noise",
    "noise of shuffled rows": "(shuffled)", "consistency": "consistency",
}  # fmt: skip


@dataclass(frozen=True)
class PilotReport:
    r"""What a pilot measured; level 0 (cheapest) first.

    f^l is the integrand at level l's output: the loss of a pilot network on rows it was not trained on, its gradient
    in the network's parameters, the output itself, or a function of the user's. Of an integrand with several
    components, variances and covariances are sums over them. Theta is taken in unbounded coordinates.

    Args:
        names: Level names.
        integrand: What variances are of.
        variances: Var f^0, then Var(f^l - f^{l-1}), shape `(L + 1,)`; of the last of `states`, as all that follows.
        covariance: Covariance of f^0 .. f^L, shape `(L + 1, L + 1)`.
        costs: Cost of one run of each level, in `cost_unit`, shape `(L + 1,)`.
        pair_costs: Cost of one row of each level's term, shape `(L + 1,)`.
        cost_unit: `"declared"` or `"seconds"`.
        single_level_variance: Var f^L.
        correlations: Correlation of f^l with f^{l-1}, shape `(L,)`.
        shuffled: What those stay below, 19 times in 20, when rows are paired at random, shape `(L,)`.
        noise_correlations: Correlation of the outputs of levels l and l - 1 beyond what theta explains, shape `(L,)`;
            NaN where a level has no noise.
        noise_shuffled: What those stay below when rows are paired at random, shape `(L,)`.
        kurtosis: Kurtosis of each correction (of f^0 first), shape `(L + 1,)`; NaN where its variance is zero.
        consistency: Giles' ratio for levels 1 .. L, shape `(L,)`; above 1 the coarse halves have another law than the
            level below. Of the loss, where the integrand is a network's gradient.
        rates: Slopes per level of log2 |mean correction| (alpha), log2 variance (beta), both negated, and log2 cost
            (gamma); `None` with fewer than three levels.
        spent: Cost of the whole pilot, in `cost_unit`.
        data: The joint rows as pairs of the finest level, and the independent rows of level 0, for `reuse=`.
        losses: Loss of each joint row at each level, shape `(n, L + 1)`; `None` where no network is involved.
        theta: Parameters of the joint rows, shape `(n, D)`.
        outputs: Their output at each level, each `(n, ...)`.
        states: Moments by state of the network: untrained, after level 0, after the pilot; only one where no network
            is involved.
    """

    names: tuple[str, ...]
    integrand: str
    variances: np.ndarray[Any, Any]
    covariance: np.ndarray[Any, Any]
    costs: tuple[float, ...]
    pair_costs: tuple[float, ...]
    cost_unit: Literal["declared", "seconds"]
    single_level_variance: float
    correlations: np.ndarray[Any, Any]
    shuffled: np.ndarray[Any, Any]
    noise_correlations: np.ndarray[Any, Any]
    noise_shuffled: np.ndarray[Any, Any]
    kurtosis: np.ndarray[Any, Any]
    consistency: np.ndarray[Any, Any]
    rates: dict[str, float] | None
    spent: float
    data: MultilevelData
    losses: np.ndarray[Any, Any] | None = field(repr=False)
    theta: Tensor = field(repr=False)
    outputs: tuple[Tensor, ...] = field(repr=False)
    states: Mapping[str, Moments] = field(repr=False)

    @property
    def n(self) -> int:
        """Joint rows."""
        return len(self.theta)

    @property
    def variance_draws(self) -> np.ndarray[Any, Any]:
        """Bootstrap draws of `variances`, shape `(draws, L + 1)`."""
        return list(self.states.values())[-1].draws

    @property
    def covariance_draws(self) -> np.ndarray[Any, Any]:
        """Bootstrap draws of `covariance`, shape `(draws, L + 1, L + 1)`."""
        return list(self.states.values())[-1].covariance_draws

    @property
    def relative_errors(self) -> np.ndarray[Any, Any]:
        r"""Relative standard error of each variance, :math:`\sqrt{(\kappa - 1) / n}`; NaN where a variance is zero."""
        return np.asarray(np.sqrt(np.maximum(self.kurtosis - 1, 0) / self.n))

    def rows_for(self, relative_error: float = _ERROR_AIM) -> int:
        r"""Pilot rows after which every variance is known to a relative standard error, by the largest kurtosis seen.

        Few rows underestimate a large kurtosis: take the number as a lower bound where `warnings` speak of rare rows.

        Raises:
            ValueError: If the error is not positive.
        """
        if not (math.isfinite(relative_error) and relative_error > 0):
            raise ValueError(f"Expected a positive relative error; got {relative_error}.")
        known = self.kurtosis[np.isfinite(self.kurtosis)]
        return rows_needed(float(known.max()), relative_error) if known.size else 0

    def sizes(self, budget: float | None = None, *, level: float = 0.9) -> pd.DataFrame:
        r"""How many rows of each level a budget would buy, by the variances at each state of the network.

        Args:
            budget: Beside the pilot's own cost, in the unit of `costs`; ten times that cost when left out.
            level: Probability of the intervals.

        Returns:
            One row per state and level: `state`, `level`, `n` (not rounded), and the bootstrap interval `low`, `high`.

        Raises:
            ValueError: If the budget is not positive, or the level not between 0 and 1.
        """
        budget = self._round_budget() if budget is None else budget
        if not (math.isfinite(budget) and budget > 0):
            raise ValueError(f"Expected a positive, finite budget; got {budget}.")
        if not 0 < level < 1:
            raise ValueError(f"Expected a level between 0 and 1; got {level}.")
        found = []
        for state, moments in self.states.items():
            n = budget * _sizes_per_cost(moments.variances[None], self.pair_costs)[0]
            drawn = budget * _sizes_per_cost(moments.draws, self.pair_costs)
            low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
            found += [{"state": state, "level": name, "n": n[i], "low": low[i], "high": high[i]}
                      for i, name in enumerate(self.names)]
        return pd.DataFrame(found)

    @property
    def drift(self) -> np.ndarray[Any, Any]:
        """Factor between the largest and the smallest n_l that the network's states call for, shape `(L + 1,)`."""
        return self._drift(self.states)

    def _drift(self, states: Mapping[str, Moments]) -> np.ndarray[Any, Any]:
        sizes = np.concatenate([_sizes_per_cost(each.variances[None], self.pair_costs) for each in states.values()])
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(sizes.max(0) > 0, sizes.max(0) / sizes.min(0), 1.0))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to think about before spending the budget, in plain words."""
        found = []
        for level, name in enumerate(self.names):
            error = self.relative_errors[level]
            if error > _ERROR_LIMIT and self.n < _FEW_ROWS:
                found.append(f"{self.n} rows tell the variance of '{name}' to within {error:.0%} only: take more pilot "
                             "rows before trusting its share.")
            elif error > _ERROR_LIMIT or self.kurtosis[level] > _KURTOSIS_LIMIT:
                found.append(f"A few rare rows decide the variance of '{name}' (kurtosis {self.kurtosis[level]:.0f} in "
                             f"{self.n} rows): it is known to within {error:.0%} at best. Take more pilot rows before "
                             "trusting its share.")
            if self.variances[level] == 0:
                found.append(f"'{name}' adds nothing to the level below: their outputs agree on every pilot row."
                             if level else f"'{name}' does not vary on any pilot row.")
            if level:
                found += self._pair_warnings(level)
        if self.rates is not None and self.rates["beta"] < 0 and self._clearly_grow():
            found.append(f"The variance of the corrections grows from level to level (beta {self.rates['beta']:.2g}): "
                         "levels in between do not lead from the cheapest to the finest.")
        # An untrained network may hardly read its inputs yet: what it calls for says little.
        drift = self._drift({name: each for name, each in self.states.items() if name != STATES[0]})
        moved = int(np.argmax(drift))
        if drift[moved] > _DRIFT_LIMIT:
            found.append(f"The rows that '{self.names[moved]}' should get move by a factor of {drift[moved]:.1f} "
                         "while the network learns: spend in rounds (simulate_adaptively), or look at .sizes().")
        return tuple(found)

    def _clearly_grow(self) -> bool:
        """Whether corrections grow over the levels in 19 of 20 bootstrap draws."""
        draws = self.variance_draws[:, 1:]
        slopes = np.polyfit(np.arange(draws.shape[1]), np.log2(draws).T, 1)[0]
        return bool(np.quantile(slopes, 0.05) > 0)

    def _pair_warnings(self, level: int) -> list[str]:
        fine, coarse, pair = self.names[level], self.names[level - 1], level - 1
        found = []
        if self.consistency[pair] > 1:
            found.append(f"The coarse halves of '{fine}' do not have the law of '{coarse}' "
                         f"(consistency {self.consistency[pair]:.2f} > 1): check how the levels share noise.")
        noise, chance = self.noise_correlations[pair], self.noise_shuffled[pair]
        if noise < -_OPPOSITE * chance:  # noise read with the opposite sign is shared too
            noise = -noise
        if self.correlations[pair] <= self.shuffled[pair]:
            told = (f"Pairs of '{fine}' and '{coarse}' agree no better (correlation {self.correlations[pair]:.2f} of "
                    f"the {self.integrand}) than rows paired at random do (up to {self.shuffled[pair]:.2f}): ")
            found.append(told + (f"their outputs do, so that it is this {self.integrand} that '{coarse}' hardly helps."
                                 if noise > chance else "check that row i of both is the same theta and noise."))
        if noise <= chance:
            found.append(f"'{fine}' and '{coarse}' show no shared noise: beyond what theta explains their outputs "
                         f"correlate by {self.noise_correlations[pair]:.2f}, rows paired at random by up to "
                         f"{chance:.2f}. Check that both read the same noise in the same places.")
        if self.costs[level] <= self.costs[level - 1]:
            found.append(f"'{fine}' was measured as no dearer than '{coarse}'.")
        return found

    def to_frame(self) -> pd.DataFrame:
        """One row per level."""
        nothing = [math.nan]
        return pd.DataFrame({
            "level": self.names,
            "cost per run": self.costs,
            "cost per row": self.pair_costs,
            "variance": np.diag(self.covariance),
            "variance of correction": self.variances,
            "correlation with level below": [*nothing, *self.correlations],
            "correlation of shuffled rows": [*nothing, *self.shuffled],
            "correlation of the noise": [*nothing, *self.noise_correlations],
            "noise of shuffled rows": [*nothing, *self.noise_shuffled],
            "kurtosis": self.kurtosis,
            "consistency": [*nothing, *self.consistency],
        })

    def with_costs(self, costs: Sequence[float]) -> PilotReport:
        r"""The same report at other costs of a run, such as those that a store measured over a whole campaign.

        A pair then costs the sum of its runs.

        Args:
            costs: Seconds (or any other unit) that one run of each level takes, shape `(L + 1,)`.

        Raises:
            ValueError: If they are not positive, finite numbers, one per level.

        Example:
            >>> from mlsbi import pilot, tasks
            >>> report = pilot(tasks.get("ou").stack, 16, seed=0, integrand="output", progress=False)
            >>> report.with_costs([0.5, 7.0]).pair_costs
            (0.5, 7.5)
        """
        own = tuple(float(cost) for cost in costs)
        if len(own) != len(self.names) or not all(math.isfinite(cost) and cost > 0 for cost in own):
            raise ValueError(f"Expected a positive, finite cost for each of the levels {list(self.names)}; got "
                             f"{list(own)}. A store measures a level's cost once it has run it.")
        spent = sum(runs * cost for runs, cost in zip(self.data.runs, own, strict=True))
        means = list(self.states.values())[-1].means
        return replace(self, costs=own, pair_costs=sum_pair_costs(own), cost_unit="seconds", spent=spent,
                       rates=convergence_rates(means, self.variances, own))

    def __str__(self) -> str:
        frame = self.to_frame()
        tables = [_print(frame[list(names)].rename(columns=names).iloc[first:])
                  for first, names in enumerate((_LEVEL_COLUMNS, _PAIR_COLUMNS)) if first < len(frame)]
        unit = "seconds" if self.cost_unit == "seconds" else "cost units"
        lines = [f"Pilot: {self.n} joint rows, {self.spent:.4g} {unit} spent; variances of the {self.integrand}",
                 *tables, *self._told_sizes(unit)]
        worst = float(np.nanmax(self.relative_errors)) if np.isfinite(self.kurtosis).any() else 0.0
        known = f"Variances are known to within {worst:.0%} or better (one standard error)"
        if worst > _ERROR_AIM:
            known += f"; {self.rows_for():,} pilot rows would give {_ERROR_AIM:.0%}"
        return "\n".join([*lines, f"{known}.", *(f"- {warning}" for warning in self.warnings)])

    def _told_sizes(self, unit: str) -> list[str]:
        """What a budget would buy at every state, as lines."""
        frame = self.sizes()
        cells = [["", *self.names]]
        for state, rows in frame.groupby("state", sort=False):
            cells.append([str(state), *(f"{_whole(n)} [{_whole(low)}, {_whole(high)}]" for n, low, high in
                                        zip(rows["n"], rows["low"], rows["high"], strict=True))])
        widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
        table = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                         zip(row[1:], widths[1:], strict=True))]) for row in cells]
        return [f"Rows that {self._round_budget():,.6g} {unit} beside the pilot would buy [90% interval]:", *table]

    def _round_budget(self) -> float:
        """About ten times the pilot's cost."""
        return float(f"{10 * self.spent:.1g}")


def _sizes_per_cost(variances: np.ndarray[Any, Any], pair_costs: Sequence[float]) -> np.ndarray[Any, Any]:
    """n_l for a budget of one, of variances `(m, L + 1)`."""
    costs = np.asarray(pair_costs)
    total = np.sqrt(variances * costs).sum(axis=1, keepdims=True)
    return np.asarray(np.divide(np.sqrt(variances / costs), total, out=np.zeros_like(variances), where=total > 0))


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _print(frame: pd.DataFrame) -> str:
    with pd.option_context("display.width", 200, "display.max_columns", 20):
        return str(frame.to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="-"))
