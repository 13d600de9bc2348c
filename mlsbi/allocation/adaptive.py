r"""Spending a budget in rounds: what each round brings decides where the next one goes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import nn

from mlsbi.allocation.integrands import Array, Integrand, IntegrandLike, Rows, resolve_integrand
from mlsbi.allocation.moments import Moments, compact, measure
from mlsbi.allocation.networks import Reader, fold_of, train_states
from mlsbi.allocation.optimal import Allocation, optimal_allocation
from mlsbi.allocation.pilot_report import PilotReport
from mlsbi.allocation.piloting import pilot, pilot_cost
from mlsbi.data import LevelData, MultilevelData
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.embeddings import EmbeddingBuilder, resolve_embedding
from mlsbi.density.registry import DensityBuilder, resolve_builder
from mlsbi.density.standardise import Transform
from mlsbi.levels import LevelStack, campaign_cost, sum_pair_costs
from mlsbi.randomness import child_seed
from mlsbi.simulation.campaign import simulate
from mlsbi.simulation.scheduling import OnFailure
from mlsbi.store.store import Store

__all__ = ["AdaptiveCampaign", "Round", "simulate_adaptively"]

_MOST_ROWS = 4096  # of a level that networks are trained and scored on: its variance is then known to a few percent
_CHUNK_ROWS = 512  # scored together, around a mean of their own
_FEWEST_SCORED = 4  # rows of a set: two a fold
_ROUND_KEY = 1 << 20  # seeds of the networks of each round


@dataclass(frozen=True)
class Round:
    r"""One round of an adaptive campaign.

    Args:
        budget: What could be spent up to its end, the pilot included.
        variances: Of the corrections, as known when it was planned, shape `(L + 1,)`.
        pair_costs: Cost of one row of each level's term, as known then, shape `(L + 1,)`.
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
    stay what they were; with `on_failure="redraw"`, as far as rows go on failing as often.

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
    if isinstance(rounds, bool) or int(rounds) != rounds or rounds < 1:
        raise ValueError(f"Expected a whole number of rounds, at least 1; got {rounds}.")
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"Expected a positive, finite budget; got {budget}.")
    floor = pilot_cost(stack, pilot_rows)
    if floor is not None and budget <= floor:
        raise ValueError(f"Expected a budget beyond the cost of a pilot of {pilot_rows} rows, {floor:g}; got "
                         f"{budget:g}. Raise it, or take fewer pilot rows (at least 8).")
    chosen, builder, reads = resolve_integrand(integrand), resolve_builder(density), resolve_embedding(embedding)
    running: dict[str, Any] = {"seed": seed, "store": store, "executor": executor, "workers": workers,
                               "on_failure": on_failure, "retry_failed": retry_failed, "progress": progress}
    report = pilot(stack, pilot_rows, estimator=estimator, integrand=integrand, density=density, embedding=embedding,
                   x_transform=x_transform, device=device, **running)
    known, done = _Known.of_pilot(report), list[Round]()
    while True:
        part = 1.0 if len(done) == rounds - 1 else (len(done) + 1) / rounds
        limit = budget if part == 1 else known.pilot_spent * (budget / known.pilot_spent) ** part
        plan = optimal_allocation(known, budget=budget, minimum=minimum, maximum=maximum)
        wanted = plan.n if part == 1 else _towards(plan, known, limit)
        # A row that failed and was dropped is counted by `simulate` as one of those asked for.
        lost = known.data.failures if on_failure == "drop" else (0,) * len(stack)
        asked = [n + gaps for n, gaps in zip(wanted, lost, strict=True)]
        data = simulate(stack, asked, reuse=known.data, batch_size=batch_size, **running)
        spent = _spent(stack, report, data)
        done.append(Round(limit, tuple(known.variances.tolist()), known.pair_costs, data.n, spent))
        if len(done) == rounds:
            return AdaptiveCampaign(data, plan, report, tuple(done), spent)
        reader = Reader.fit(stack.prior, estimator, _all_outputs(data), x_transform=x_transform, embedding=reads)
        networks = _networks(reader, data, chosen, builder=builder, embedding=reads, device=device, progress=progress,
                             seed=child_seed(seed, _ROUND_KEY, len(done)))
        moments = [_term_moments(chosen, networks, sets, child_seed(seed, _ROUND_KEY, len(done), 1 + level))
                   for level, sets in enumerate(_scored(reader, data, report))]
        known = _Known.of_rounds(stack, report, data, moments, spent, redraws=on_failure == "redraw")


@dataclass(frozen=True)
class _Known:
    """What is known before a round, as `optimal_allocation` reads it."""

    names: tuple[str, ...]
    variances: Array
    costs: tuple[float, ...]
    pair_costs: tuple[float, ...]
    covariance: Array | None
    single_level_variance: float
    variance_draws: Array
    spent: float
    pilot_spent: float
    data: MultilevelData

    @classmethod
    def of_pilot(cls, report: PilotReport) -> _Known:
        return cls(report.names, report.variances, report.costs, report.pair_costs, report.covariance,
                   report.single_level_variance, report.variance_draws, report.spent, report.spent, report.data)

    @classmethod
    def of_rounds(
        cls, stack: LevelStack, report: PilotReport, data: MultilevelData, moments: Sequence[Moments], spent: float, *,
        redraws: bool,
    ) -> _Known:  # fmt: skip
        costs = _costs(stack, data)
        pair_costs = stack.row_costs or sum_pair_costs(costs)
        if redraws:
            pair_costs = tuple(cost * factor for cost, factor in zip(pair_costs, _attempts(report, data), strict=True))
        return cls(
            names=stack.names, variances=np.array([each.variances[-1] for each in moments]), costs=costs,
            pair_costs=pair_costs,
            covariance=None,  # no longer of one set of rows, as the variances are
            single_level_variance=float(moments[-1].covariance[-1, -1]),
            variance_draws=np.stack([each.draws[:, -1] for each in moments], axis=1), spent=spent,
            pilot_spent=report.spent, data=data,
        )


def _towards(plan: Allocation, known: _Known, limit: float) -> tuple[int, ...]:
    """Sizes within a part of the budget, no larger than the whole one's."""
    have = known.data.n
    more = np.array(plan.n) - np.array(have)
    left = float(more @ np.array(known.pair_costs))
    share = min(max((limit - known.spent) / left, 0.0), 1.0) if left > 0 else 0.0
    return tuple(int(n) for n in np.maximum(np.array(have) + np.floor(share * more), 1))


def _costs(stack: LevelStack, data: MultilevelData) -> tuple[float, ...]:
    """Cost of one run of each level, declared or measured on all runs so far."""
    if stack.costs is not None:
        return stack.costs
    return tuple(seconds / runs for seconds, runs in zip(data.seconds or (), data.runs, strict=True))


def _pairs(report: PilotReport, data: MultilevelData) -> tuple[list[int], list[int]]:
    """Runs of each level made beside the pilot's, and how many of them as its own term's rows."""
    more = [now - before for now, before in zip(data.runs, report.data.runs, strict=True)]
    pairs = [0] * len(more)
    for level in range(len(more) - 1, -1, -1):
        above = pairs[level + 1] if level + 1 < len(more) else 0
        pairs[level] = more[level] - above
    return more, pairs


def _spent(stack: LevelStack, report: PilotReport, data: MultilevelData) -> float:
    """Cost of the pilot and of everything after it."""
    if stack.costs is None or stack.row_costs is None:
        return float(sum(data.seconds or ()))
    more, pairs = _pairs(report, data)
    return report.spent + campaign_cost(stack.costs, stack.row_costs, runs=more, pairs=pairs)


def _attempts(report: PilotReport, data: MultilevelData) -> list[float]:
    """Rows of each level's term tried per row finished, beside the pilot's."""
    _, pairs = _pairs(report, data)
    finished = [now - before for now, before in zip(data.n, report.data.n, strict=True)]
    return [max(tried / done, 1.0) if done > 0 else 1.0 for tried, done in zip(pairs, finished, strict=True)]


def _all_outputs(data: MultilevelData) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Theta and outputs of every set of rows."""
    found = [(level.theta, level.fine) for level in data.levels]
    return found + [(level.theta, level.coarse) for level in data.levels if level.coarse is not None]


def _networks(
    reader: Reader, data: MultilevelData, integrand: Integrand, *, builder: DensityBuilder,
    embedding: EmbeddingBuilder | None, seed: int, device: str | torch.device, progress: bool,
) -> Sequence[ConditionalDensity | None]:  # fmt: skip
    """Networks trained on the rows so far, one per fold."""
    if not integrand.needs_network:
        return [None]
    levels: list[list[Rows]] = [[] for _ in data.levels]
    for index, each in enumerate(data.levels):
        rows = each.rows(slice(_MOST_ROWS))
        levels[index].append(reader.rows(rows.theta, [rows.fine]))
        if rows.coarse is not None:
            levels[index - 1].append(reader.rows(rows.theta, [rows.coarse]))
    states = list(train_states(reader, levels, builder=builder, embedding=embedding, seed=seed, device=device,
                               progress=progress))
    return states[-1][1]


def _scored(reader: Reader, data: MultilevelData, report: PilotReport) -> list[list[Rows]]:
    """Rows of each level's term, and the pilot's joint rows where they are of another term.

    A row keeps its place in its set, and so its fold: the finest pairs begin with the joint rows.
    """
    found = []
    finest = len(data.levels) - 1
    for index, own in enumerate(data.levels):
        sets = [own]
        if index < finest:
            sets.append(LevelData(report.theta, report.outputs[index], report.outputs[index - 1] if index else None))
        few = [rows.rows(slice(_MOST_ROWS)) for rows in sets if len(rows) >= _FEWEST_SCORED]
        found.append([reader.rows(rows.theta, [rows.fine] if rows.coarse is None else [rows.coarse, rows.fine])
                      for rows in few])
    return found


def _term_moments(
    integrand: Integrand, networks: Sequence[ConditionalDensity | None], sets: Sequence[Rows], seed: int
) -> Moments:
    """Moments of a term's rows, each scored by the network that has not seen it."""
    folds = []
    for rows in sets:
        for fold, network in enumerate(networks):
            own = torch.nonzero(fold_of(len(rows), len(networks)) == fold).flatten()
            for chunk in own.tensor_split(max(1, len(own) // _CHUNK_ROWS)):
                folds.append(compact(integrand.blocks(network, rows.rows(chunk))))
    return measure(folds, seed=seed)
