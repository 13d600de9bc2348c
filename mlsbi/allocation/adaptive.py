r"""Spending a budget in rounds: what each round brings decides where the next one goes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import nn

from mlsbi.allocation.arrays import Array
from mlsbi.allocation.integrands import IntegrandLike, resolve_integrand
from mlsbi.allocation.limits import read_bounds
from mlsbi.allocation.moments import Moments
from mlsbi.allocation.optimal import Allocation, optimal_allocation
from mlsbi.allocation.pilot_report import PilotReport
from mlsbi.allocation.piloting import FEWEST, pilot, pilot_cost
from mlsbi.allocation.remeasuring import Remeasuring
from mlsbi.data import MultilevelData
from mlsbi.density.embeddings import EmbeddingBuilder, resolve_embedding
from mlsbi.density.registry import DensityBuilder, resolve_builder
from mlsbi.density.standardise import Transform
from mlsbi.levels import LevelStack, campaign_cost, sum_pair_costs
from mlsbi.randomness import child_seed
from mlsbi.simulation.campaign import simulate
from mlsbi.simulation.running import RunOptions
from mlsbi.simulation.scheduling import OnFailure
from mlsbi.store.store import Store

__all__ = ["AdaptiveCampaign", "Round", "simulate_adaptively"]

_ROUND_KEY = 1 << 20  # seeds of the networks of each round


@dataclass(frozen=True)
class Round:
    r"""One round of an adaptive campaign.

    Args:
        budget: What could be spent up to its end, the pilot included.
        variances: Of the corrections, as known when it was planned, shape `(L + 1,)`.
        pair_costs: Cost of one finished row of each level's term, failed ones included, as known then, `(L + 1,)`.
        n: Rows of each level at its end.
        spent: Cost of everything up to its end.
    """

    budget: float
    variances: tuple[float, ...]
    pair_costs: tuple[float, ...]
    n: tuple[int, ...]
    spent: float


@dataclass(frozen=True)
class AdaptiveCampaign:
    r"""What an adaptive campaign simulated, and how it decided.

    Args:
        data: All rows, the pilot's included.
        plan: The last round's allocation, of the whole budget.
        pilot: The pilot's report.
        rounds: What was known and done in each round.
        spent: Cost of everything.
    """

    data: MultilevelData
    plan: Allocation
    pilot: PilotReport
    rounds: tuple[Round, ...]
    spent: float

    def to_frame(self) -> pd.DataFrame:
        """One row per round and level: `round`, `level`, `n`, `variance of correction`, `cost per row`, `spent`."""
        return pd.DataFrame([
            {"round": number, "level": name, "n": done.n[i], "variance of correction": done.variances[i],
             "cost per row": done.pair_costs[i], "spent": done.spent}
            for number, done in enumerate(self.rounds, start=1) for i, name in enumerate(self.data.names)
        ])

    def __str__(self) -> str:
        unit = "seconds" if self.pilot.cost_unit == "seconds" else "cost units"
        lines = [f"Adaptive campaign: {self.spent:.6g} {unit} spent in a pilot and {len(self.rounds)} rounds"]
        for number, done in enumerate(self.rounds, start=1):
            levels = ", ".join(f"{name} {n:,} (variance {variance:.4g})" for name, n, variance in
                               zip(self.data.names, done.n, done.variances, strict=True))
            lines.append(f"round {number}, {done.spent:.6g} spent: {levels}")
        return "\n".join([*lines, str(self.plan)])


def simulate_adaptively(
    stack: LevelStack,
    budget: float,
    *,
    seed: int,
    rounds: int = 3,
    pilot_rows: int = 64,
    estimator: Literal["npe", "nle"] = "npe",
    integrand: IntegrandLike = "loss",
    density: str | DensityBuilder = "nsf",
    embedding: str | nn.Module | EmbeddingBuilder | None = None,
    x_transform: Transform = "none",
    minimum: ArrayLike = 1,
    maximum: ArrayLike | None = None,
    store: Store | str | os.PathLike[str] | None = None,
    executor: Any = None,
    workers: int = 1,
    batch_size: int | None = None,
    on_failure: OnFailure = "raise",
    retry_failed: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> AdaptiveCampaign:
    r"""Spends a budget in a pilot and rounds; before each, variances are measured anew on all rows so far.

    A pilot's few rows, and a network that has seen no others, tell variances roughly. Rounds end at budgets that grow
    by equal factors from the pilot's cost to the whole. Networks of each round are trained and scored on different
    halves of the rows so far (of at most 4096 a level); no round buys more of a level than the whole budget would call
    for.

    With a `store`, every row is on disk as soon as it is finished, and the same call goes on where it was interrupted,
    in whatever way: rows are never run twice. Where costs are measured, not declared, the budget holds as far as costs
    stay what they were. Unless failed rows end the campaign, what they leave of the budget buys further rows, whether
    they are dropped or redrawn; the budget pays for them too.

    Args:
        stack: Prior, noise and levels.
        budget: Total cost, the pilot's included: in the unit of the stack's costs, in seconds where it declares none.
        seed: Seed of everything random.
        rounds: Rounds after the pilot; 1 plans once, by the pilot alone.
        pilot_rows: Joint rows of the pilot.
        estimator: As in `pilot`.
        integrand: As in `pilot`.
        density: As in `pilot`.
        embedding: As in `pilot`.
        x_transform: As in `pilot`.
        minimum: Least rows, one number or one per level, as in `optimal_allocation`.
        maximum: Most rows, as in `optimal_allocation`.
        store: As in `simulate`.
        executor: As in `simulate`.
        workers: As in `simulate`.
        batch_size: As in `simulate`.
        on_failure: As in `simulate`.
        retry_failed: As in `simulate`.
        device: Where networks are trained.
        progress: Whether to show progress bars.

    Returns:
        All rows, and how each round decided.

    Raises:
        ValueError: If the budget is not beyond the pilot's cost (before the pilot where costs are declared), a number
            is out of range, or as `pilot` and `simulate`. What was spent is in the store.
        SimulationError: As `simulate`.
        StoreError: As `simulate`.

    References:
        | A continuation multilevel Monte Carlo algorithm (Collier et al., 2015)
        | https://doi.org/10.1007/s10543-014-0511-3

    Example:
        >>> from mlsbi import tasks
        >>> campaign = simulate_adaptively(tasks.get("ou").stack, 5000, seed=0, pilot_rows=16, integrand="output",
        ...                                progress=False)
        >>> len(campaign.rounds), campaign.spent <= 5000, campaign.data.n == campaign.plan.n
        (3, True, True)
    """
    for name, number, least in (("rounds", rounds, 1), ("pilot_rows", pilot_rows, FEWEST)):
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < least:
            raise ValueError(f"Expected {name} to be a whole number of at least {least}; got {number!r}.")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"Expected a positive, finite number as budget; got {budget!r}.")
    _check_affordable(stack, budget, pilot_rows, minimum, maximum)
    RunOptions(store, executor, workers, batch_size, on_failure, retry_failed, progress)
    remeasuring = Remeasuring(stack.prior, resolve_integrand(integrand), estimator, resolve_builder(density),
                              resolve_embedding(embedding), x_transform, device, progress)
    running: dict[str, Any] = {"seed": seed, "store": store, "executor": executor, "workers": workers,
                               "retry_failed": retry_failed, "progress": progress}
    report = pilot(stack, pilot_rows, estimator=estimator, integrand=integrand, density=density, embedding=embedding,
                   x_transform=x_transform, on_failure=on_failure, device=device, **running)
    # Further rows in place of failed ones are bought with what is left, so that the budget holds.
    running |= {"on_failure": "raise" if on_failure == "raise" else "drop", "batch_size": batch_size}
    known, done = _Known.of_pilot(stack, report), list[Round]()
    while True:
        part = (len(done) + 1) / rounds
        limit = budget if part == 1 else known.pilot_spent * (budget / known.pilot_spent) ** part
        plan = optimal_allocation(known, budget=budget, minimum=minimum, maximum=maximum)
        before, known = known, known.after(_buy(stack, known, _towards(plan, known, limit), running))
        if part == 1 and on_failure != "raise":
            plan, known = _spend_rest(stack, known, budget, minimum, maximum, running)
        done.append(Round(limit, tuple(before.variances.tolist()), before.pair_costs, known.data.n, known.spent))
        if part == 1:
            return AdaptiveCampaign(known.data, plan, report, tuple(done), known.spent)
        known = known.measured(remeasuring.measure(known.data, report, seed=child_seed(seed, _ROUND_KEY, len(done))))


@dataclass(frozen=True)
class _Known:
    """What is known at some point of a campaign, as `optimal_allocation` reads it; costs include failed rows'."""

    stack: LevelStack
    report: PilotReport
    data: MultilevelData
    variances: Array
    variance_draws: Array
    covariance: Array | None
    single_level_variance: float

    @classmethod
    def of_pilot(cls, stack: LevelStack, report: PilotReport) -> _Known:
        return cls(stack, report, report.data, report.variances, report.variance_draws, report.covariance,
                   report.single_level_variance)

    def after(self, data: MultilevelData) -> _Known:
        return replace(self, data=data)

    def measured(self, moments: Sequence[Moments]) -> _Known:
        return replace(
            self, variances=np.array([each.variances[-1] for each in moments]),
            variance_draws=np.stack([each.draws[:, -1] for each in moments], axis=1),
            covariance=None,  # no longer of one set of rows, as the variances are
            single_level_variance=float(moments[-1].covariance[-1, -1]),
        )  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        return self.stack.names

    @property
    def attempts(self) -> tuple[float, ...]:
        """Rows of each level's term tried per row finished."""
        return tuple((rows + lost) / rows if rows else 1.0
                     for rows, lost in zip(self.data.n, self.data.failures, strict=True))

    @property
    def run_costs(self) -> tuple[float, ...]:
        """Cost of one run of each level, declared or measured on all runs so far."""
        if self.stack.costs is not None:
            return self.stack.costs
        return tuple(seconds / runs for seconds, runs in zip(self.data.seconds or (), self.data.runs, strict=True))

    @property
    def costs(self) -> tuple[float, ...]:
        return tuple(cost * tries for cost, tries in zip(self.run_costs, self.attempts, strict=True))

    @property
    def pair_costs(self) -> tuple[float, ...]:
        own = self.stack.row_costs or sum_pair_costs(self.run_costs)
        return tuple(cost * tries for cost, tries in zip(own, self.attempts, strict=True))

    @property
    def pilot_spent(self) -> float:
        return self.report.spent

    @property
    def spent(self) -> float:
        """Cost of the pilot and of everything after it."""
        if self.stack.costs is None or self.stack.row_costs is None:
            return float(sum(self.data.seconds or ()))
        before = self.report.data
        runs = [now - then for now, then in zip(self.data.runs, before.runs, strict=True)]
        rows = [now - then for now, then in zip(self.data.n, before.n, strict=True)]
        lost = [now - then for now, then in zip(self.data.failures, before.failures, strict=True)]
        pairs = [finished + failed for finished, failed in zip(rows, lost, strict=True)]
        return self.report.spent + campaign_cost(self.stack.costs, self.stack.row_costs, runs=runs, pairs=pairs)


def _check_affordable(
    stack: LevelStack, budget: float, pilot_rows: int, minimum: ArrayLike, maximum: ArrayLike | None
) -> None:
    """Raises a `ValueError` where bounds or the budget are impossible, as far as that is known before the pilot."""
    finest = len(stack) - 1
    rows = np.array([pilot_rows if level in (0, finest) else 0 for level in range(len(stack))], dtype=np.float64)
    _, lower, _ = read_bounds(minimum, maximum, rows)
    floor = pilot_cost(stack, pilot_rows)
    if floor is None or stack.row_costs is None:
        return
    if budget <= floor:
        raise ValueError(f"Expected a budget beyond the cost of a pilot of {pilot_rows} rows, {floor:g}; got "
                         f"{budget:g}. Raise it, or take fewer pilot rows (at least {FEWEST}).")
    smallest = floor + float((lower - rows) @ np.array(stack.row_costs))
    if budget < smallest:
        raise ValueError(f"Expected a budget that buys a pilot of {pilot_rows} rows and the minimum of every level, "
                         f"{smallest:g}; got {budget:g}. Raise it, lower minimum, or take fewer pilot rows.")


def _buy(stack: LevelStack, known: _Known, wanted: Sequence[int], running: dict[str, Any]) -> MultilevelData:
    """Simulates until there are so many rows, as far as rows fail no more often than they did."""
    more = [n - have for n, have in zip(wanted, known.data.n, strict=True)]
    tried = [math.floor(max(rows, 0) * tries) for rows, tries in zip(more, known.attempts, strict=True)]
    dropped = known.data.failures if running["on_failure"] == "drop" else (0,) * len(stack)
    # `simulate` counts a row that failed and was dropped as one of those asked for.
    asked = [have + lost + rows for have, lost, rows in zip(known.data.n, dropped, tried, strict=True)]
    return simulate(stack, asked, reuse=known.data, **running)


def _spend_rest(
    stack: LevelStack, known: _Known, budget: float, minimum: ArrayLike, maximum: ArrayLike | None,
    running: dict[str, Any],
) -> tuple[Allocation, _Known]:  # fmt: skip
    """Buys further rows for what failed ones left of the budget, until it buys none; the plan of what there is then."""
    while True:
        there = np.minimum(minimum, np.maximum(known.data.n, 1))  # of what failed rows left too few there are no more
        plan = optimal_allocation(known, budget=budget, minimum=there, maximum=maximum)
        if plan.n == known.data.n:
            return plan, known
        known = known.after(_buy(stack, known, plan.n, running))


def _towards(plan: Allocation, known: _Known, limit: float) -> tuple[int, ...]:
    """Sizes within a part of the budget, no larger than the whole one's."""
    have = np.array(known.data.n)
    more = np.array(plan.n) - have
    left = float(more @ np.array(known.pair_costs))
    share = min(max((limit - known.spent) / left, 0.0), 1.0) if left > 0 else 0.0
    return plan.n if plan.cost <= limit else tuple(int(n) for n in np.maximum(have + np.floor(share * more), 1))
