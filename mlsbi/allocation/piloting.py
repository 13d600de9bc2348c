r"""A small campaign that tells what the levels are worth, before the budget is spent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from mlsbi.allocation.arrays import Array
from mlsbi.allocation.checking import consistency, convergence_rates, noise_correlation, shuffled_correlations
from mlsbi.allocation.integrands import Integrand, IntegrandLike, Loss, Rows, resolve_integrand
from mlsbi.allocation.moments import Moments, compact, measure
from mlsbi.allocation.networks import Reader, fold_of, train_states
from mlsbi.allocation.pilot_report import PilotReport
from mlsbi.data import LevelData, MultilevelData
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.embeddings import EmbeddingBuilder, resolve_embedding
from mlsbi.density.registry import DensityBuilder, resolve_builder
from mlsbi.density.standardise import Transform, check_transform
from mlsbi.levels import LevelStack, campaign_cost, sum_pair_costs
from mlsbi.randomness import check_device, child_seed
from mlsbi.simulation.campaign import JointRows, simulate_streams
from mlsbi.simulation.running import RunOptions
from mlsbi.simulation.scheduling import OnFailure
from mlsbi.store.records import JOINT_STREAM
from mlsbi.store.store import Store

__all__ = ["FEWEST", "pilot", "pilot_cost"]

FEWEST = 8
"""Joint rows that a pilot needs."""

_BOOTSTRAP, _SHUFFLE = 2, 3  # purposes of seeds beside the networks'


def pilot(
    stack: LevelStack,
    n: int = 64,
    *,
    seed: int,
    estimator: Literal["npe", "nle"] = "npe",
    integrand: IntegrandLike = "loss",
    density: str | DensityBuilder = "nsf",
    embedding: str | nn.Module | EmbeddingBuilder | None = None,
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

    Two networks are trained, each on one half of the rows, and scored on the other half, in float64: before training,
    after level 0 alone, and after all levels. As many independent rows of every level but the finest are drawn, to
    check that the coarse halves of pairs have its law; those of level 0 are trained on too.

    Args:
        stack: Prior, noise and levels.
        n: Joint rows, at least 8. The report says how well so many know the variances (`relative_errors`), and how
            many would know them better (`rows_for`).
        seed: Seed of everything random.
        estimator: What will be trained: `"npe"`, a density of theta given x, or `"nle"`, of x given theta.
        integrand: What variances are of. `"loss"`: the network's loss. `"gradient"`: its gradient in the parameters,
            which training averages; the variance is the trace of its covariance. `"output"`: the simulators'
            standardised outputs, without any network. Or a function `f(theta, x)` of theta `(n, D)` and x `(n, ...)`
            that gives `(n,)` or `(n, k)`, in float64.
        density: The pilot network's density, as in the estimator.
        embedding: What reads the condition, as in the estimator.
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
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < FEWEST:
        raise ValueError(f"Expected a whole number of at least {FEWEST} pilot rows; got {n!r}.")
    check_device(device)
    if estimator not in ("npe", "nle"):
        raise ValueError(f'Expected estimator "npe" or "nle"; got {estimator!r}.')
    check_transform(x_transform)
    chosen, builder, reads = resolve_integrand(integrand), resolve_builder(density), resolve_embedding(embedding)
    options = RunOptions(store, executor, workers, None, on_failure, retry_failed, progress)
    streams = [(JOINT_STREAM + 1 + level, slice(level, level + 1)) for level in range(len(stack) - 1)]
    *apart, joint = simulate_streams(stack, n, [*streams, (JOINT_STREAM, slice(None))], seed=seed, replay=True,
                                     options=options)
    if len(joint.theta) < FEWEST:
        raise ValueError(f"Only {len(joint.theta)} of {n} pilot rows gave finite output at every level; the pilot "
                         f"needs {FEWEST}. Check the simulators, or take more rows.")
    outputs = [(joint.theta, x) for x in joint.outputs] + [(rows.theta, rows.outputs[0]) for rows in apart]
    reader = Reader.fit(stack.prior, estimator, outputs, x_transform=x_transform, embedding=reads)
    together = reader.rows(joint.theta, joint.outputs)
    alone = [reader.rows(rows.theta, rows.outputs) for rows in apart]
    states: dict[str, Moments] = {}
    bootstrap, shuffles = (child_seed(seed, JOINT_STREAM, purpose) for purpose in (_BOOTSTRAP, _SHUFFLE))
    networks: Sequence[ConditionalDensity | None] = [None]
    if chosen.needs_network:
        own = [[reader.rows(joint.theta, [x])] + alone[level: level + 1] for level, x in enumerate(joint.outputs)]
        for state, networks in train_states(reader, own, builder=builder, embedding=reads,
                                            seed=child_seed(seed, JOINT_STREAM), device=device, progress=progress):
            folds = _folds(chosen, networks, together)
            states[state] = measure(folds, seed=bootstrap)
    else:
        folds = _folds(chosen, networks, together)
        states[chosen.name] = measure(folds, seed=bootstrap)
    values, values_apart = _checked_values(chosen, networks, together, alone)
    moments = list(states.values())[-1]
    runs, seconds = _totals(joint, apart)
    costs = stack.costs or tuple(s / r for s, r in zip(seconds, runs, strict=True))
    pair_costs = stack.row_costs or sum_pair_costs(costs)
    theta = reader.features(joint.theta)
    flat = [term.outputs[0].flatten(1).numpy() for term in together.terms]
    noise = [noise_correlation(theta, fine, coarse, seed=shuffles)
             for coarse, fine in zip(flat, flat[1:], strict=False)]
    return PilotReport(
        names=stack.names,
        integrand=chosen.name,
        variances=moments.variances,
        covariance=moments.covariance,
        costs=costs,
        pair_costs=pair_costs,
        cost_unit="declared" if stack.costs else "seconds",
        single_level_variance=float(moments.covariance[-1, -1]),
        correlations=moments.correlations,
        shuffled=shuffled_correlations(folds, seed=shuffles),
        noise_correlations=np.array([found for found, _ in noise]),
        noise_shuffled=np.array([control for _, control in noise]),
        kurtosis=moments.kurtosis,
        consistency=np.array([consistency(fine, coarse, other)
                              for coarse, fine, other in zip(values, values[1:], values_apart, strict=False)]),
        rates=convergence_rates(moments.means, moments.variances, costs),
        spent=campaign_cost(costs, pair_costs, runs=runs, pairs=[joint.runs[-1]] * len(stack)),
        data=_as_data(stack, joint, apart, runs, seconds),
        losses=values[:, :, 0].T if chosen.needs_network else None,
        theta=joint.theta,
        outputs=joint.outputs,
        states=states,
    )


def pilot_cost(stack: LevelStack, n: int) -> float | None:
    """What a pilot of n rows costs, in the declared unit; `None` where costs are to be measured."""
    if stack.costs is None or stack.row_costs is None:
        return None
    replayed = min(2, n)
    runs = [2 * n + replayed] * (len(stack) - 1) + [n]
    return campaign_cost(stack.costs, stack.row_costs, runs=runs, pairs=[n] * len(stack))


def _folds(integrand: Integrand, networks: Sequence[ConditionalDensity | None], rows: Rows) -> list[Array]:
    """Corrections of every fold's rows under its own network."""
    fold = fold_of(len(rows), len(networks))
    return [compact(integrand.blocks(network, rows.rows(fold == own))) for own, network in enumerate(networks)]


def _checked_values(
    integrand: Integrand, networks: Sequence[ConditionalDensity | None], together: Rows, alone: Sequence[Rows]
) -> tuple[Array, list[Array]]:
    """What checks look at, of joint rows `(levels, n, k)` and of rows alone, each `(m, k)`: a gradient's loss."""
    integrand = Loss() if integrand.needs_network else integrand

    def values(rows: Rows) -> Array:
        fold = fold_of(len(rows), len(networks))
        parts = [np.concatenate(list(integrand.blocks(network, rows.rows(fold == own))), axis=2)
                 for own, network in enumerate(networks)]
        found = np.empty((parts[0].shape[0], len(rows), parts[0].shape[2]))
        for own, part in enumerate(parts):
            found[:, (fold == own).numpy()] = part
        return found

    return values(together), [values(rows)[0] for rows in alone]


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
