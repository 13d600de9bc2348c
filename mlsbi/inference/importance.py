r"""Adaptive importance sampling: independent draws from many posteriors of few parameters at once."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from mlsbi.inference.evidence import propose, summarise_weights
from mlsbi.inference.mcmc import LogDensity, flattening
from mlsbi.randomness import child_seed

__all__ = ["Resampling", "Sample", "run_importance"]

_LIMIT = 100  # effective proposals below which draws are repeats of a few
_CENTRES = 500  # draws that the next round's proposals are shaped by
_SPREAD = 250  # effective proposals that a round's weights are flattened to, where the posterior is still far off
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Resampling:
    """What is known about the draws of one posterior; `dataclasses.asdict` makes it ready for JSON.

    Attributes:
        effective: Effective number of weighted proposals, one entry.
        proposals: Proposals of the last round, of which the draws are.
        rounds: Rounds of proposals.
        seconds: Wall time of the run, shared by all posteriors of a batch.
        method: Name of the sampler.
    """

    effective: tuple[float, ...]
    proposals: int
    rounds: int
    seconds: float
    method: str = "importance sampling"

    @property
    def converged(self) -> bool:
        """Whether there are at least 100 effective proposals."""
        return self.effective[0] >= _LIMIT

    @property
    def warning(self) -> str | None:
        """What went wrong and what to do; nothing if all is well."""
        if self.converged:
            return None
        return (f"Importance sampling found only {self.effective[0]:.0f} effective proposals of {self.proposals} in "
                f"{self.rounds} rounds; expected at least {_LIMIT}. Do not trust these draws: use method='hmc'.")


@dataclass(frozen=True)
class Sample:
    """Draws from B densities.

    Attributes:
        draws: Shape `(n, B, D)`.
        convergence: What is known about the draws of each density, length B.
    """

    draws: Tensor
    convergence: tuple[Resampling, ...]


@torch.no_grad()
def run_importance(
    log_density: LogDensity, start: Tensor, n: int, *, effective: int = 400, proposals: int = 2000, rounds: int = 12,
    seed: int,
) -> Sample:
    r"""Draws from B densities by rounds of proposals, each shaped by the weighted proposals before.

    A round's weights are raised to the largest power that leaves enough of them effective, so that proposals close in
    on the densities step by step. It ends when the untempered weights of every density are good enough, or after
    `rounds`; draws are proposals of the last round, resampled by their weights.

    Args:
        log_density: Unnormalised; maps `(n, B, D)` to `(n, B)`. NaN counts as `-inf`.
        start: Points that surround where the mass is, shape `(C, B, D)`, a few hundred.
        n: Draws of each density.
        effective: Effective proposals of each density to reach.
        proposals: Proposals of each density in a round.
        rounds: Most rounds.
        seed: Seed of the run. Torch's global random state is left as found.

    References:
        | Population Monte Carlo (Cappé et al., 2004)
        | https://doi.org/10.1198/106186004X12803
    """
    begun = time.perf_counter()
    batch = start.shape[1]
    centres = start
    for turn in range(1, rounds + 1):
        points = torch.empty((proposals, batch, start.shape[2]), dtype=torch.float64)
        log_proposal = torch.empty((proposals, batch), dtype=torch.float64)
        generators = [torch.Generator().manual_seed(child_seed(seed, turn, b)) for b in range(batch)]
        for b, generator in enumerate(generators):
            points[:, b], log_proposal[:, b] = propose(centres[:, b].double().cpu(), proposals, generator)
        value = torch.cat([log_density(chunk.to(start)).double().cpu()
                           for chunk in points.split(max(1, _CHUNK // batch))])
        log_weight = torch.where(value.isnan(), -torch.inf, value) - log_proposal
        found = summarise_weights(log_weight).effective
        if turn == rounds or bool((found >= effective).all()):
            break
        flat = log_weight * flattening(log_weight, _SPREAD)
        centres = torch.stack([_resample(points[:, b], flat[:, b], _CENTRES, generators[b])
                               for b in range(batch)], 1).to(start)
    draws = torch.stack([_resample(points[:, b], log_weight[:, b], n, generators[b]) for b in range(batch)], 1)
    seconds = time.perf_counter() - begun
    return Sample(draws.to(start), tuple(
        Resampling((float(one),), proposals, turn, seconds) for one in found
    ))


def _resample(points: Tensor, log_weight: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Systematic resampling of points `(k, D)`: each comes its expected number of times, rounded; random order."""
    edges = (log_weight - log_weight.logsumexp(0)).exp().cumsum(0)
    marks = (torch.arange(n, dtype=torch.float64) + torch.rand((), generator=generator, dtype=torch.float64)) / n
    chosen = torch.searchsorted(edges, marks * edges[-1]).clamp(max=len(points) - 1)
    return points[chosen[torch.randperm(n, generator=generator)]]
