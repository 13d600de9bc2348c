r"""Whether Markov chains have converged: rank-normalised split R-hat and effective sample size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Convergence", "diagnose", "effective_size", "forgotten", "split_rhat"]

Array = np.ndarray[Any, Any]

# The usual 1.01 is meant for four long chains. R-hat of chains that are all right is about (1 - 1/k)^(-1/2), where k
# is the number of effective draws in half a chain: 1.01 would ask 100 of each of an ensemble's 64 or more walkers,
# 1.05 asks 21. One walker in 64 that sits three standard deviations off the others still gives 1.07.
RHAT_LIMIT = 1.05
EFFECTIVE_LIMIT = 100  # below, the estimates of R-hat and of the effective size are noise themselves


@dataclass(frozen=True)
class Convergence:
    """What is known about the chains of one posterior; `dataclasses.asdict` makes it ready for JSON.

    Attributes:
        rhat: Split R-hat of each parameter.
        effective: Effective number of draws of each parameter, over all chains.
        acceptance: Share of proposals accepted.
        steps: Steps kept of each chain.
        warmup: Steps thrown away before those.
        chains: Number of chains, or of walkers.
        seconds: Wall time of the run, shared by all posteriors of a batch.
        method: Name of the sampler.
    """

    rhat: tuple[float, ...]
    effective: tuple[float, ...]
    acceptance: float
    steps: int
    warmup: int
    chains: int
    seconds: float
    method: str

    @property
    def converged(self) -> bool:
        """Whether every parameter has an R-hat of at most 1.05 and at least 100 effective draws."""
        return not self._failed

    @property
    def _failed(self) -> list[int]:
        """Indices of the parameters that have not converged; NaN fails."""
        return [
            i for i, (rhat, effective) in enumerate(zip(self.rhat, self.effective, strict=True))
            if not (rhat <= RHAT_LIMIT and EFFECTIVE_LIMIT <= effective < math.inf)
        ]

    @property
    def warning(self) -> str | None:
        """What has not converged (parameters counted from 1) and what to do; nothing if all is well."""
        failed = self._failed
        if not failed:
            return None
        names = ", ".join(f"{i + 1} (R-hat {self.rhat[i]:.2f}, {self.effective[i]:.0f} effective)" for i in failed)
        return (
            f"The chains have not converged after {self.warmup + self.steps} steps in parameter{'s'[:len(failed) > 1]} "
            f"{names}; R-hat should be at most {RHAT_LIMIT} and the effective draws at least {EFFECTIVE_LIMIT}. "
            "Do not trust these draws: allow more steps. If that does not help, chains are stuck in separate modes."
        )

    def __str__(self) -> str:
        state = "converged" if self.converged else "not converged"
        return (
            f"{self.method}: {state}, R-hat at most {np.max(self.rhat):.3f}, at least {np.min(self.effective):.0f} "
            f"effective draws, acceptance {self.acceptance:.2f}, {self.chains} chains of {self.steps} steps after "
            f"{self.warmup} of warm-up, {self.seconds:.1f} s"
        )


def diagnose(draws: Array, *, acceptance: float, warmup: int, seconds: float, method: str) -> Convergence:
    """The convergence of draws `(steps, chains, D)` that followed `warmup` steps."""
    return Convergence(
        rhat=tuple(split_rhat(draws).tolist()), effective=tuple(effective_size(draws).tolist()), acceptance=acceptance,
        steps=draws.shape[0], warmup=warmup, chains=draws.shape[1], seconds=seconds, method=method,
    )


def split_rhat(draws: Array) -> Array:
    r"""Rank-normalised split R-hat, the larger of bulk and folded, near 1 where chains agree.

    Args:
        draws: Shape `(steps, chains, D)`, at least 4 steps.

    Returns:
        One number per parameter, shape `(D,)`; NaN where draws are constant or not finite.

    Raises:
        ValueError: If `draws` does not have that shape.

    References:
        | Rank-normalization, folding, and localization (Vehtari et al., 2021), eqs. 4 and 14
        | https://arxiv.org/abs/1903.08008
    """
    halves = _split(draws)
    folded = np.abs(halves - np.median(halves, axis=(0, 1)))
    return np.maximum(_rhat(_rank_normal(halves)), _rhat(_rank_normal(folded)))


def effective_size(draws: Array) -> Array:
    r"""Bulk effective sample size over all chains.

    Autocorrelation is measured against the variance over all chains, so chains that sit in different places count
    for little however well each of them moves. It is summed as far as Geyer's initial monotone sequence.

    Args:
        draws: Shape `(steps, chains, D)`, at least 4 steps.

    Returns:
        One number per parameter, shape `(D,)`; NaN where draws are constant or not finite.

    Raises:
        ValueError: If `draws` does not have that shape.

    References:
        | Rank-normalization, folding, and localization (Vehtari et al., 2021), eqs. 10-13
        | https://arxiv.org/abs/1903.08008
    """
    z = np.ascontiguousarray(_rank_normal(_split(draws)).transpose(2, 1, 0))  # (D, chains, steps)
    chains, steps = z.shape[1:]
    means = z.mean(-1)
    size = 1 << (2 * steps - 1).bit_length()  # zero-padded, so that the ends do not meet
    spectrum = np.fft.rfft(z - means[..., None], size)
    covariance = np.fft.irfft((spectrum.real**2 + spectrum.imag**2).mean(1), size)[:, :steps] / steps
    within = covariance[:, :1] * steps / (steps - 1)
    total = covariance[:, :1] + means.var(1, ddof=1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = 1 - (within - covariance) / total
    correlation[:, 0] += 1 - correlation[:, 0]  # exactly 1, and NaN stays
    pairs = correlation[:, : steps // 2 * 2].reshape(len(z), -1, 2).sum(-1)
    first = np.logical_and.accumulate(~(pairs <= 0), axis=1)
    time = 2 * np.where(first, np.minimum.accumulate(pairs, axis=1), 0).sum(1) - 1
    # Draws that alternate around the mean can count for more than independent ones; the paper's cap on how much more.
    count = chains * steps
    return count / np.maximum(time, 1 / math.log10(count))


def forgotten(draws: Array, log_density: Array) -> int:
    r"""How many of the first steps to throw away, at most half.

    At least five autocorrelation times, after which a chain has forgotten its start; of those choices the one that
    leaves most effective draws, for a chain that is still on its way costs more of them than it brings.

    Args:
        draws: Shape `(steps, chains, D)`, at least 8 steps.
        log_density: Of the draws, shape `(steps, chains)`; often the last to settle.

    References:
        | A simple method for automated equilibration detection (Chodera, 2016)
        | https://doi.org/10.1021/acs.jctc.5b00784
    """
    both = np.concatenate([draws, log_density[..., None]], -1)

    def left(drop: int) -> float:
        return float(np.nan_to_num(effective_size(both[drop:]).min()))

    half = len(both) // 2
    autocorrelation = (len(both) - half) * both.shape[1] / max(left(half), 1)
    least = min(half, math.ceil(5 * autocorrelation))
    return max({least, (least + half) // 2, half}, key=left)


def _split(draws: Array) -> Array:
    """Each chain's two halves as chains of their own, `(steps // 2, 2 * chains, D)`."""
    if draws.ndim != 3 or draws.shape[0] < 4 or 0 in draws.shape:
        raise ValueError(f"Expected draws of shape (steps, chains, D) with at least 4 steps; got {draws.shape}.")
    half = len(draws) // 2
    return np.concatenate([draws[-2 * half : -half], draws[-half:]], axis=1)


def _rank_normal(draws: Array) -> Array:
    """Normal scores of the ranks over all chains; ties, which rejected steps leave, share their mean rank."""
    from scipy.special import ndtri  # 0.15 s that only those who run chains should wait for

    columns = draws.reshape(-1, draws.shape[2])
    scores = np.full(columns.shape, np.nan)
    for i, column in enumerate(columns.T):
        if np.isfinite(column).all():
            _, place, count = np.unique(column, return_inverse=True, return_counts=True)
            rank = count.cumsum() - (count - 1) / 2
            scores[:, i] = ndtri((rank - 3 / 8) / (len(column) + 1 / 4))[place]
    return scores.reshape(draws.shape)


def _rhat(z: Array) -> Array:
    steps = len(z)
    within = z.var(axis=0, ddof=1).mean(0)
    between = z.mean(0).var(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt((steps - 1) / steps + between / within)
