r"""emcee's ensemble sampler on densities in unbounded space that are cheap to evaluate in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mlsbi.inference.mcmc import Chain, ChainError, LogDensity, Step, check_start, collect
from mlsbi.randomness import check_seed

__all__ = ["run_emcee"]

def run_emcee(
    log_density: LogDensity,
    start: Tensor,
    *,
    effective: int = 1000,
    max_steps: int = 10_000,
    least: int = 1,
    seed: int,
    progress: bool = False,
    label: str = "MCMC",
) -> Chain:
    r"""Runs emcee's ensemble sampler with differential evolution moves, until there are enough effective draws.

    One move in ten goes the full distance between two walkers, from one mode into another. How many steps to throw
    away is decided afterwards, see `convergence.forgotten`. It stops when every parameter has `effective` effective
    draws and has converged, or after `max_steps`.

    Args:
        log_density: Maps `(n, D)` to `(n,)`, called with half the walkers at once. NaN and infinity count as `-inf`.
        start: Where the W walkers start, shape `(W, D)`; W of at least 2 D, and 64 or more is efficient.
        effective: Effective draws of every parameter to reach.
        max_steps: Steps of each walker, at most.
        least: Draws to keep at least, if `max_steps` allows.
        seed: Seed of the run. Numpy's and torch's global random states are left as found.
        progress: Whether to show a progress bar.
        label: What the bar says.

    Returns:
        A chain with B = 1 and C = W. It need not have converged: see `chain.convergence[0].warning`.

    Raises:
        ValueError: If there are too few walkers or steps.
        ChainError: If a start has no finite log density, the starts lie in a subspace, or no walker ever moves.

    References:
        | emcee: the MCMC hammer (Foreman-Mackey et al., 2013)
        | https://arxiv.org/abs/1202.3665
        | Run DMC, for the moves (Nelson et al., 2014)
        | https://arxiv.org/abs/1311.5229
    """
    walkers, dim = start.shape
    if walkers < max(4, 2 * dim):
        raise ValueError(f"Expected at least {max(4, 2 * dim)} walkers for {dim} parameters; got {walkers}.")
    begun = time.perf_counter()
    steps = _emcee_steps(log_density, start, check_seed(seed))
    return collect(steps, "emcee", begun, effective, max_steps, least=least,
                   warmup=None, progress=progress, label=label)


def _emcee_steps(log_density: LogDensity, start: Tensor, seed: int) -> Iterator[Step]:
    from emcee import EnsembleSampler, State  # 0.7 s that only those who run chains should wait for
    from emcee.moves import DEMove

    def evaluate(points: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            value = log_density(torch.as_tensor(points, dtype=start.dtype, device=start.device))
        array = value.double().cpu().numpy()
        return np.where(np.isfinite(array), array, -np.inf)

    points = start.detach().double().cpu().numpy()
    value = evaluate(points)
    check_start(torch.from_numpy(np.isfinite(value))[None])
    spread = points - points.mean(0)
    if np.linalg.matrix_rank(spread / spread.std(0).clip(np.finfo(float).tiny)) < points.shape[1]:
        raise ChainError("The chain cannot start: the walkers lie in a subspace, which they would never leave.", [0])
    sampler = EnsembleSampler(
        *points.shape, evaluate, vectorize=True, moves=[(DEMove(), 0.9), (DEMove(gamma0=1.0), 0.1)]
    )
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))).get_state()
    begin, before = State(points, log_prob=value, random_state=random), value
    for state in sampler.sample(begin, iterations=None, store=False, skip_initial_state_check=True):
        moved = np.mean(state.log_prob != before)
        before = state.log_prob.copy()
        yield (
            torch.tensor(state.coords, dtype=start.dtype)[None],
            torch.as_tensor(before, dtype=start.dtype)[None],
            torch.tensor([moved]),
        )
