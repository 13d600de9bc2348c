r"""A small campaign that tells what the levels are worth, before the budget is spent."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.data import LevelData, MultilevelData
from mlsbi.density.flows import NSF
from mlsbi.density.standardise import Standardiser, Transform, check_transform
from mlsbi.levels import LevelStack, campaign_cost, sum_pair_costs
from mlsbi.priors import Unbounded
from mlsbi.randomness import check_device, child_seed
from mlsbi.simulation.campaign import JointRows, simulate_streams
from mlsbi.simulation.running import RunOptions
from mlsbi.simulation.scheduling import OnFailure
from mlsbi.store.records import JOINT_STREAM
from mlsbi.store.store import Store
from mlsbi.strategies.fitting import Problem
from mlsbi.training.descent import Objective
from mlsbi.training.loop import minimise
from mlsbi.training.members import Member
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

__all__ = ["PilotReport", "pilot", "pilot_cost"]

_FEWEST = 8
_KURTOSIS_LIMIT = 100.0  # above it a few rare rows decide the variance (Giles 2015, section 3.3)
_FOLDS = 2
_TRAINING = TrainingOptions(epochs=300, patience=30, batch_size=None)


@dataclass(frozen=True)
class PilotReport:
    r"""What a pilot measured; level 0 (cheapest) first.

    f^l is the loss of a pilot network at level l's output, on rows the network was not trained on; theta is taken
    in unbounded coordinates.

    Args:
        names: Level names.
        variances: Var f^0, then Var(f^l - f^{l-1}), shape `(L + 1,)`.
        covariance: Covariance of f^0 .. f^L, shape `(L + 1, L + 1)`.
        costs: Cost of one run of each level, in `cost_unit`, shape `(L + 1,)`.
        pair_costs: Cost of one row of each level's term, shape `(L + 1,)`.
        cost_unit: `"declared"` or `"seconds"`.
        single_level_variance: Var f^L.
        correlations: Correlation of f^l with f^{l-1}, shape `(L,)`.
        kurtosis: Kurtosis of each correction (of f^0 first), shape `(L + 1,)`; NaN where its variance is zero.
        consistency: Giles' ratio for levels 1 .. L, shape `(L,)`; above 1 the coarse halves have another law than the
            level below.
        rates: Slopes per level of log2 |mean correction| (alpha), log2 variance (beta), both negated, and log2 cost
            (gamma); `None` with fewer than three levels.
        spent: Cost of the whole pilot, in `cost_unit`.
        data: The joint rows as pairs of the finest level, and the independent rows of level 0, for `reuse=`.
        losses: f^l of each joint row, shape `(n, L + 1)`.
    """

    names: tuple[str, ...]
    variances: np.ndarray[Any, Any]
    covariance: np.ndarray[Any, Any]
    costs: tuple[float, ...]
    pair_costs: tuple[float, ...]
    cost_unit: Literal["declared", "seconds"]
    single_level_variance: float
    correlations: np.ndarray[Any, Any]
    kurtosis: np.ndarray[Any, Any]
    consistency: np.ndarray[Any, Any]
    rates: dict[str, float] | None
    spent: float
    data: MultilevelData
    losses: np.ndarray[Any, Any]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to think about before spending the budget, in plain words."""
        found = []
        for level, name in enumerate(self.names):
            if self.kurtosis[level] > _KURTOSIS_LIMIT:
                found.append(f"A few rare rows decide the variance of '{name}' (kurtosis {self.kurtosis[level]:.0f}): "
                             "take more pilot rows before trusting its share.")
            if self.variances[level] == 0:
                found.append(f"'{name}' adds nothing to the level below: their outputs agree on every pilot row.")
            if level and self.consistency[level - 1] > 1:
                found.append(f"The coarse halves of '{name}' do not have the law of '{self.names[level - 1]}' "
                             f"(consistency {self.consistency[level - 1]:.2f} > 1): check how the levels share noise.")
            if level and self.costs[level] <= self.costs[level - 1]:
                found.append(f"'{name}' was measured as no dearer than '{self.names[level - 1]}'.")
        return tuple(found)

    def to_frame(self) -> pd.DataFrame:
        """One row per level."""
        diagonal = np.diag(self.covariance)
        return pd.DataFrame({
            "level": self.names,
            "cost per run": self.costs,
            "cost per row": self.pair_costs,
            "variance": diagonal,
            "variance of correction": self.variances,
            "correlation with level below": [math.nan, *self.correlations],
            "kurtosis": self.kurtosis,
            "consistency": [math.nan, *self.consistency],
        })

    def with_costs(self, costs: Sequence[float]) -> PilotReport:
        r"""The same report at other costs of a run, such as those that a store measured over a whole campaign.

        A pair then costs the sum of its runs.

        Args:
            costs: Seconds (or any other unit) that one run of each level takes, shape `(L + 1,)`.

        Raises:
            ValueError: If they are not positive, finite numbers, one per level.

        Example:
            >>> from mlsbi import tasks
            >>> report = pilot(tasks.get("ou").stack, 16, seed=0, progress=False)
            >>> report.with_costs([0.5, 7.0]).pair_costs
            (0.5, 7.5)
        """
        own = tuple(float(cost) for cost in costs)
        if len(own) != len(self.names) or not all(math.isfinite(cost) and cost > 0 for cost in own):
            raise ValueError(f"Expected a positive, finite cost for each of the levels {list(self.names)}; got "
                             f"{list(own)}. A store measures a level's cost once it has run it.")
        spent = sum(runs * cost for runs, cost in zip(self.data.runs, own, strict=True))
        return replace(self, costs=own, pair_costs=sum_pair_costs(own), cost_unit="seconds", spent=spent)

    def __str__(self) -> str:
        with pd.option_context("display.width", 200, "display.max_columns", 20):
            table = self.to_frame().to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="-")
        unit = "seconds" if self.cost_unit == "seconds" else "cost units"
        lines = [f"Pilot: {len(self.losses)} joint rows, {self.spent:.4g} {unit} spent", table, *self.warnings]
        return "\n".join(lines)


def pilot(
    stack: LevelStack,
    n: int = 64,
    *,
    seed: int,
    estimator: Literal["npe", "nle"] = "npe",
    integrand: Literal["loss"] = "loss",
    x_transform: Transform = "none",
    store: Store | str | os.PathLike[str] | None = None,
    executor: Any = None,
    workers: int = 1,
    on_failure: OnFailure = "raise",
    retry_failed: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> PilotReport:
    r"""Measures costs, variances and coupling on n joint rows, every level at the same theta and noise.

    Two networks are trained, each on one half of the rows, and scored on the other half. As many independent rows
    of every level but the finest are drawn for the consistency check.

    Args:
        stack: Prior, noise and levels.
        n: Joint rows, at least 8.
        seed: Seed of everything random.
        estimator: What will be trained: `"npe"`, a density of theta given x, or `"nle"`, of x given theta.
        integrand: What variances are of: `"loss"`.
        x_transform: What outputs go through before they are standardised, as in the estimator.
        store: Folder that keeps every row, as in `simulate`, which may use the same; rows it has are not run again.
        executor: What runs the simulations, as in `simulate`.
        workers: Processes on this machine, when no executor is given.
        on_failure: What a row does that fails at any level, as in `simulate`.
        retry_failed: Whether rows that the store has as failed are run again.
        device: Where the networks are trained.
        progress: Whether to show progress bars.

    Returns:
        A report that `optimal_allocation` takes; its rows count toward n.

    Raises:
        ValueError: If n is too small, a choice is unknown, or a simulator misbehaves (see `simulate`).
        SimulationError: As `simulate`.
        StoreError: As `simulate`.

    References:
        | Multilevel Monte Carlo methods (Giles, 2015), section 3
        | https://doi.org/10.1017/S096249291500001X
    """
    if n < _FEWEST:
        raise ValueError(f"Expected at least {_FEWEST} pilot rows; got {n}.")
    check_device(device)
    if estimator not in ("npe", "nle"):
        raise ValueError(f'Expected estimator "npe" or "nle"; got {estimator!r}.')
    check_transform(x_transform)
    if integrand != "loss":
        raise ValueError(f'Expected integrand "loss"; got {integrand!r}.')
    options = RunOptions(store, executor, workers, None, on_failure, retry_failed, progress)
    streams = [(JOINT_STREAM + 1 + level, slice(level, level + 1)) for level in range(len(stack) - 1)]
    *apart, joint = simulate_streams(stack, n, [*streams, (JOINT_STREAM, slice(None))], seed=seed, replay=True,
                                     options=options)
    if len(joint.theta) < _FEWEST:
        raise ValueError(f"Only {len(joint.theta)} of {n} pilot rows gave finite output at every level; the pilot "
                         f"needs {_FEWEST}. Check the simulators, or take more rows.")
    rows = _rows_of(stack.prior, estimator)
    losses, losses_apart = _cross_fit(joint, apart, rows, x_transform, seed=seed, device=device, progress=progress)
    runs, seconds = _totals(joint, apart)
    costs = stack.costs or tuple(s / r for s, r in zip(seconds, runs, strict=True))
    pair_costs = stack.row_costs or sum_pair_costs(costs)
    corrections = np.concatenate([losses[:, :1], np.diff(losses, axis=1)], axis=1)
    variances = corrections.var(axis=0, ddof=1)
    covariance = np.atleast_2d(np.cov(losses, rowvar=False))
    deviations = np.sqrt(np.diag(covariance))
    with np.errstate(divide="ignore", invalid="ignore"):
        correlations = np.diag(covariance, 1) / (deviations[1:] * deviations[:-1])
        fourth = ((corrections - corrections.mean(0)) ** 4).mean(0)
        kurtosis = fourth / variances**2
    return PilotReport(
        names=stack.names,
        variances=variances,
        covariance=covariance,
        costs=costs,
        pair_costs=pair_costs,
        cost_unit="declared" if stack.costs else "seconds",
        single_level_variance=float(covariance[-1, -1]),
        correlations=correlations,
        kurtosis=kurtosis,
        consistency=_consistency(losses, losses_apart),
        rates=_rates(corrections, variances, costs),
        spent=campaign_cost(costs, pair_costs, runs=runs, pairs=[joint.runs[-1]] * len(stack)),
        data=_as_data(stack, joint, apart, runs, seconds),
        losses=losses,
    )


def pilot_cost(stack: LevelStack, n: int) -> float | None:
    """What a pilot of n rows costs, in the declared unit; `None` where costs are to be measured."""
    if stack.costs is None or stack.row_costs is None:
        return None
    replayed = min(2, n)
    runs = [2 * n + replayed] * (len(stack) - 1) + [n]
    return campaign_cost(stack.costs, stack.row_costs, runs=runs, pairs=[n] * len(stack))


def _rows_of(prior: Distribution, estimator: str) -> Callable[[Tensor, Tensor], Term]:
    """How a density reads theta and x: of unbounded theta given x, or of flattened x given theta."""
    unbounded = Unbounded(prior)
    if estimator == "npe":
        return lambda theta, x: Term(unbounded.to(theta), x)
    return lambda theta, x: Term(x.flatten(1), unbounded.features(theta), of_outputs=True)


def _cross_fit(
    joint: JointRows, apart: Sequence[JointRows], rows_of: Callable[[Tensor, Tensor], Term], x_transform: Transform, *,
    seed: int, device: str | torch.device, progress: bool,
) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
    """Losses of every row under a network that was trained on the other fold, float64."""
    sources = [rows_of(joint.theta, x) for x in joint.outputs]
    sources += [rows_of(rows.theta, rows.outputs[0]) for rows in apart]
    transforms: tuple[Transform, Transform] = ("none", x_transform)
    if sources[0].of_outputs:
        transforms = (x_transform, "none")
    problem = Problem((), Standardiser.fit([term.input for term in sources], transform=transforms[0]),
                      Standardiser.fit([term.fine for term in sources], transform=transforms[1]))
    losses = [np.empty(len(term)) for term in sources]
    for fold in range(_FOLDS):
        train, held = _fold_terms(problem, sources, fold)
        network = problem.network(NSF(), None, seed=child_seed(seed, JOINT_STREAM, fold)).to(device)
        member = Member(network, [train], [held], child_seed(seed, JOINT_STREAM, fold, 1))
        minimise([member], objective=Objective(), options=_TRAINING, progress=progress,
                 label=f"pilot network {fold + 1}/{_FOLDS}")
        for found, term in zip(losses, sources, strict=True):
            chosen = torch.arange(len(term)) % _FOLDS == fold
            rows = problem.standardise(term.rows(chosen)).to(device)
            with torch.no_grad():  # the loss that is trained on: a transform's own log-determinant is not part of it
                found[chosen.numpy()] = -network.standard_log_prob(rows.input, rows.fine).double().cpu().numpy()
    return np.stack(losses[:len(joint.outputs)], 1), losses[len(joint.outputs):]


def _fold_terms(problem: Problem, sources: Sequence[Term], fold: int) -> tuple[Term, Term]:
    """Outputs of all levels outside a fold, pooled; every fourth of those rows is held out at all levels at once."""

    def pool(*, held: bool) -> Term:
        parts = []
        for term in sources:
            row = torch.arange(len(term))
            parts.append(problem.standardise(term.rows((row % _FOLDS != fold) & ((row // _FOLDS % 4 == 0) == held))))
        return Term(torch.cat([part.input for part in parts]), torch.cat([part.fine for part in parts]))

    return pool(held=False), pool(held=True)


def _consistency(losses: np.ndarray[Any, Any], apart: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    ratios = []
    for level, alone in enumerate(apart, start=1):
        correction, fine = losses[:, level] - losses[:, level - 1], losses[:, level]
        distance = abs(correction.mean() + alone.mean() - fine.mean())
        spread = 3 * (correction.std(ddof=1) + alone.std(ddof=1) + fine.std(ddof=1))
        ratios.append(distance * math.sqrt(min(len(losses), len(alone))) / spread if spread > 0 else 0.0)
    return np.array(ratios)


def _rates(
    corrections: np.ndarray[Any, Any], variances: np.ndarray[Any, Any], costs: Sequence[float]
) -> dict[str, float] | None:
    levels = np.arange(1, len(costs))
    if len(levels) < 2:
        return None

    def slope(values: np.ndarray[Any, Any]) -> float:
        return float(np.polyfit(levels, np.log2(values), 1)[0]) if (values > 0).all() else math.nan

    return {
        "alpha": -slope(np.abs(corrections.mean(0))[1:]),
        "beta": -slope(variances[1:]),
        "gamma": slope(np.asarray(costs)[1:]),
    }


def _totals(joint: JointRows, apart: Sequence[JointRows]) -> tuple[list[int], list[float]]:
    runs, seconds = list(joint.runs), list(joint.seconds)
    for level, rows in enumerate(apart):
        runs[level] += rows.runs[0]
        seconds[level] += rows.seconds[0]
    return runs, seconds


def _as_data(
    stack: LevelStack, joint: JointRows, apart: Sequence[JointRows], runs: Sequence[int], seconds: Sequence[float]
) -> MultilevelData:
    """Every row feeds one level's term only: joint rows the finest pairs, independent rows of level 0 its own."""
    finest = len(stack) - 1
    coarse = joint.outputs[finest - 1] if finest else None
    levels, failures = [], []
    for level in range(len(stack)):
        if level == finest:
            levels.append(LevelData(joint.theta, joint.outputs[finest], coarse))
            failures.append(joint.left_out)
        elif level == 0:
            levels.append(LevelData(apart[0].theta, apart[0].outputs[0]))
            failures.append(apart[0].left_out)
        else:
            empty = joint.outputs[level][:0]
            levels.append(LevelData(joint.theta[:0], empty, empty))
            failures.append(0)
    return MultilevelData(tuple(levels), stack.names, tuple(failures), tuple(runs), tuple(seconds))
