r"""Hamiltonian Monte Carlo on many densities at once."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from mlsbi.inference.mcmc import Chain, LogDensity, Step, check_start, collect
from mlsbi.randomness import check_seed

__all__ = ["run_hmc"]

# What HMC's steps are tuned to, and the smallest share of its step that a trajectory may have. For Gaussians 0.8 and 1
# are a little faster; but steps that suit the middle of a banana are too long for its ends, which chains then never
# enter (half the mass beyond two standard deviations was missing), and nothing in their draws shows it.
_ACCEPTANCE = 0.9
_SHORTEST = 0.5


def run_hmc(
    log_density: LogDensity,
    start: Tensor,
    *,
    effective: int = 400,
    max_steps: int = 2000,
    warmup: int = 200,
    leapfrog: int = 16,
    least: int = 1,
    seed: int,
    progress: bool = False,
    label: str = "HMC",
) -> Chain:
    r"""Runs Hamiltonian Monte Carlo on B densities at once, until each has enough effective draws.

    During warm-up each density gets a mass matrix, the inverse of its chains' covariance, and a step size that is
    accepted 90 % of the time; then both stay fixed. The number of leapfrog steps, and the share of its step size that
    each density uses, are drawn anew in each iteration, for trajectories of up to half a period of a Gaussian. Chains
    hardly ever find other modes: the weights of separate modes are those of the starts.

    Args:
        log_density: Maps `(B, C, D)` to `(B, C)`, differentiable. Proposals where it or its gradient is NaN or
            infinite are rejected.
        start: Where the C chains of each density start, shape `(B, C, D)`; 16 or more chains are efficient.
        effective: Effective draws of every parameter of every density to reach.
        max_steps: Steps of each chain with warm-up, at most.
        warmup: Steps of warm-up.
        leapfrog: Most leapfrog steps, and so gradients, per step.
        least: Draws to keep at least, if `max_steps` allows.
        seed: Seed of the run. Torch's global random state is left as found.
        progress: Whether to show a progress bar.
        label: What the bar says.

    Returns:
        A chain. Not all of it need have converged: see each `chain.convergence[b].warning`.

    Raises:
        ValueError: If there are too few chains or steps.
        ChainError: If a start has no finite log density and gradient, or all chains of a density stay where they
            began.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011), sections 4.1 and 4.2
        | https://arxiv.org/abs/1206.1901
        | The No-U-Turn sampler, section 3.2 on step sizes (Hoffman and Gelman, 2014)
        | https://arxiv.org/abs/1111.4246
    """
    if start.ndim != 3 or start.shape[1] < 2:
        raise ValueError(f"Expected starts of shape (B, C, D) with at least 2 chains each; got {tuple(start.shape)}.")
    begun = time.perf_counter()
    steps = _hmc_steps(log_density, start, warmup, leapfrog, check_seed(seed))
    return collect(steps, "HMC", begun, effective, max_steps, least=least,
                   warmup=warmup, progress=progress, label=label)


def _hmc_steps(log_density: LogDensity, start: Tensor, warmup: int, most: int, seed: int) -> Iterator[Step]:
    generator = torch.Generator().manual_seed(seed)
    z = start.detach()
    value, slope = _value_and_slope(log_density, z)
    check_start((value.isfinite() & slope.isfinite().all(-1)).cpu())
    root = _covariance_root(z)
    tuning = _StepSizes(len(z))
    learn = [math.ceil(warmup * share) for share in (0.15, 0.4, 0.75)]
    window: list[Tensor] = []
    for count in itertools.count():
        if count < warmup and count in learn:
            root = _covariance_root(torch.cat(window, 1))
            window = []
            tuning.restart()
        size = tuning.explored if count < warmup else tuning.settled  # (B,)
        # Half a period of a Gaussian that the mass fits, for nearly all densities of the batch.
        longest = min(most, max(1, math.ceil(math.pi / size.quantile(0.1).item())))
        number = int(torch.randint(1, longest + 1, (), generator=generator))
        size = size * (_SHORTEST + (1 - _SHORTEST) * torch.rand((), generator=generator))
        momentum = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
        new_z, new_value, new_slope, new_momentum = _leapfrog(
            log_density, z, slope, momentum, root, size.to(z)[:, None, None], number
        )
        gain = new_value - value - (new_momentum.square().sum(-1) - momentum.square().sum(-1)) / 2
        accepted = _accept(gain, torch.rand(value.shape, generator=generator, dtype=z.dtype).to(z.device))
        z = torch.where(accepted[..., None], new_z, z)
        slope = torch.where(accepted[..., None], new_slope, slope)
        value = torch.where(accepted, new_value, value)
        if count < warmup:
            tuning.update(gain.clamp(max=0).exp().mean(1).cpu())
            window.append(z)
        yield z.cpu(), value.cpu(), accepted.double().mean(1).cpu()


def _accept(gain: Tensor, uniform: Tensor) -> Tensor:
    """Metropolis's rule on what a proposal gains in log density of position and momentum."""
    return uniform.log() < gain


def _leapfrog(
    log_density: LogDensity, z: Tensor, slope: Tensor, momentum: Tensor, root: Tensor, size: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position, log density (`-inf` where lost), slope and momentum after a trajectory.

    In whitened coordinates u, z = root u, the mass is one.
    """
    begun, lost = z, torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
    momentum = momentum + size / 2 * (slope @ root)
    for left in reversed(range(number)):
        z = z + size * (momentum @ root.mT)
        lost = lost | ~z.isfinite().all(-1)
        z = torch.where(lost[..., None], begun, z)  # somewhere that can be evaluated; it will be rejected
        value, slope = _value_and_slope(log_density, z)
        lost = lost | ~(value.isfinite() & slope.isfinite().all(-1))
        slope = torch.where(lost[..., None], 0.0, slope)
        momentum = momentum + (size if left else size / 2) * (slope @ root)
    return z, torch.where(lost, -torch.inf, value), slope, momentum


def _value_and_slope(log_density: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = log_density(z)
        (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope


def _covariance_root(z: Tensor) -> Tensor:
    """Lower Cholesky factor of the covariance of `(B, n, D)` draws; of its diagonal only if draws are few."""
    n, dim = z.shape[1:]
    centred = z.double() - z.double().mean(1, keepdim=True)
    covariance = centred.mT @ centred / (n - 1)
    variance = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12)
    if n < 10 * dim:  # draws of a chain are worth a few times less than independent ones
        return variance.sqrt().diag_embed().to(z.dtype)
    factor: Tensor = torch.linalg.cholesky(covariance + (1e-6 * variance).diag_embed())
    return factor.to(z.dtype)


class _StepSizes:
    """Dual averaging of the log step size of each density (Hoffman and Gelman, 2014, eq. 6), with their constants."""

    def __init__(self, batch: int) -> None:
        self.explored = torch.full((batch,), 0.5)
        self.restart()

    def restart(self) -> None:
        self._count = 0
        self._error = torch.zeros_like(self.explored)
        self._mean = self.explored.log()

    @property
    def settled(self) -> Tensor:
        return self._mean.exp()

    def update(self, acceptance: Tensor) -> None:
        self._count += 1
        self._error += (_ACCEPTANCE - acceptance - self._error) / (self._count + 10)
        log = -(self._count**0.5) / 0.05 * self._error  # drawn to a step of 1, natural in whitened coordinates
        self._mean += (log - self._mean) * self._count**-0.75
        self.explored = log.exp()
