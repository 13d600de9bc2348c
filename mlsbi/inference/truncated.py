r"""The prior, cut to where the posterior of one observation has its mass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.inference.posteriors import DirectPosterior
from mlsbi.priors import in_support, parameter_names, sample_prior
from mlsbi.randomness import child_seed, seeded

__all__ = ["LEAST_ACCEPTANCE", "Region", "TruncatedPrior", "density_region", "truncate_prior"]

LEAST_ACCEPTANCE = 1e-4
"""Share of prior draws inside, below which draws come from the posterior instead, weighted and drawn again."""

_ENOUGH = 400  # draws inside from which an acceptance is known to 5%
_BATCH = 1 << 14
_MOST = 1 << 18  # prior draws from which an acceptance of LEAST_ACCEPTANCE is known to 20%
_CANDIDATES = 256  # posterior draws for each one that weights choose
_WEIGHED = 1 << 14  # posterior draws from which a small share is measured


@dataclass(frozen=True, eq=False)
class Region:
    r"""Where a posterior's density at its observation is at least a threshold.

    Args:
        posterior: The posterior, with its observation.
        threshold: Log density of theta at the region's edge.
    """

    posterior: DirectPosterior
    threshold: float

    def holds(self, theta: Tensor) -> Tensor:
        """Whether each of theta `(n, D)` lies inside, `(n,)`."""
        return self.posterior.log_prob(theta) >= self.threshold if len(theta) else torch.zeros(0, dtype=torch.bool)


class TruncatedPrior(Distribution):
    r"""A prior restricted to regions; its support for networks stays the whole prior's.

    Draws are those of the prior that lie in all regions: of the prior itself where at least one in ten thousand does,
    else draws of the last region's posterior, resampled by their weights (sampling-importance resampling), which are
    draws of the truncated prior as far as many candidates for each make them so.

    Args:
        prior: The prior.
        regions: Regions, first to last; a draw lies in all of them. Every region inside the earlier ones, so that what
            was drawn before and lies inside has the law of new draws.
        acceptance: Share of the prior that they hold.
        resampled: Whether draws come from the posterior instead of the prior.
        effective: Of `_CANDIDATES` posterior draws, as how many equally weighted ones they count; `None` where draws
            come from the prior.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  # as torch declares it

    def __init__(
        self, prior: Distribution, regions: Sequence[Region], acceptance: float, *, resampled: bool = False,
        effective: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(event_shape=prior.event_shape, validate_args=False)
        self.prior = prior
        self.regions = tuple(regions)
        self.acceptance = acceptance
        self.resampled = resampled
        self.effective = effective
        self.names = parameter_names(prior)

    @property
    def support(self) -> Any:
        """The prior's support, in which networks live."""
        return self.prior.support

    def holds(self, theta: Tensor) -> Tensor:
        """Whether each of theta `(n, D)` lies in all regions, `(n,)`."""
        inside = in_support(self.prior, theta)
        for region in reversed(self.regions):  # the last is the smallest
            rows = inside.nonzero()[:, 0]
            inside[rows] = region.holds(theta[rows])
        return inside

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, shape `value.shape[:-1]`; `-inf` outside."""
        flat = value.reshape(-1, value.shape[-1])
        inside = self.holds(flat).reshape(value.shape[:-1])
        return torch.where(inside, self.prior.log_prob(value) - math.log(self.acceptance), -torch.inf)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # torch's signature
        """Draws `(*sample_shape, D)` from torch's global random state, as torch's distributions do.

        Raises:
            RuntimeError: If far fewer draws lie inside than did before.
        """
        shape = torch.Size(sample_shape)
        n = shape.numel()
        drawn = self._resample(n) if self.resampled else self._reject(n)
        return drawn.reshape(*shape, *self.event_shape)

    def _reject(self, n: int) -> Tensor:
        found: list[Tensor] = []
        missing, tried, most = n, 0, 100 * (n + _ENOUGH) / self.acceptance
        while missing > 0:
            theta = self.prior.sample((min(math.ceil(1.2 * missing / self.acceptance) + 16, _BATCH),))
            found.append(theta[self.holds(theta)])
            missing -= len(found[-1])
            tried += len(theta)
            if tried > most:
                raise RuntimeError(f"Only {n - missing} of {tried} prior draws lie in the truncated prior; "
                                   f"{self.acceptance:.2g} of them did when it was made.")
        return torch.cat(found)[:n] if found else self.prior.sample((0,))

    def _resample(self, n: int) -> Tensor:
        """One of every `_CANDIDATES` posterior draws, chosen by its weight; of those without any inside others."""
        chosen: list[Tensor] = []
        missing = n
        while missing > 0:
            rows = min(_BATCH // _CANDIDATES, missing)
            theta, log_weight = _weighed(self, rows * _CANDIDATES)
            groups = log_weight.reshape(rows, _CANDIDATES)
            largest = groups.amax(1, keepdim=True)
            groups, theta = (part[torch.isfinite(largest[:, 0])] for part in
                             (groups - largest, theta.reshape(rows, _CANDIDATES, -1)))
            pick = torch.multinomial(groups.exp(), 1) if len(groups) else torch.zeros(0, 1, dtype=torch.long)
            chosen.append(theta[torch.arange(len(groups)), pick[:, 0]])
            missing -= len(groups)
        return torch.cat(chosen) if chosen else self.prior.sample((0,))

    def __repr__(self) -> str:
        edges = ", ".join(f"{region.threshold:.6g}" for region in self.regions)
        return f"TruncatedPrior({self.prior}, log q >= {edges}, share {self.acceptance:.6g})"


def density_region(posterior: DirectPosterior, *, outside: float = 1e-6, draws: int = 30_000, seed: int) -> Region:
    r"""The region of highest density that leaves out a share of the posterior's own draws.

    With fewer draws than `1 / outside` its edge is the lowest density of any draw.

    Args:
        posterior: The posterior, with its observation.
        outside: The share.
        draws: Draws that the edge is found from.
        seed: Of the draws.

    References:
        | Truncated proposals for scalable and hassle-free simulation-based inference (Deistler et al., 2022)
        | https://arxiv.org/abs/2210.04815
    """
    log_q = posterior.log_prob(posterior.sample((draws,), seed=seed))
    return Region(posterior, float(torch.quantile(log_q[torch.isfinite(log_q)].double(), outside)))


def truncate_prior(prior: Distribution, regions: Sequence[Region], *, seed: int) -> TruncatedPrior:
    r"""The prior restricted to regions, and the way of drawing from it that its share of the prior allows.

    Args:
        prior: The prior.
        regions: Regions, first to last.
        seed: Of the draws that measure the share.

    Raises:
        RuntimeError: If not even the last region's posterior has draws in all regions.
    """
    truncated = TruncatedPrior(prior, regions, 1.0)
    inside = tried = 0
    while inside < _ENOUGH and tried < _MOST:
        inside += int(truncated.holds(sample_prior(prior, _BATCH, seed=child_seed(seed, 0, tried))).sum())
        tried += _BATCH
    if inside / tried >= LEAST_ACCEPTANCE:
        return TruncatedPrior(prior, regions, inside / tried)
    # The region's share of the prior is the mean weight of posterior draws.
    with seeded(child_seed(seed, 1)):
        _, log_weight = _weighed(truncated, _WEIGHED)
    if not bool(torch.isfinite(log_weight).any()):
        raise RuntimeError("No draw of the last round's posterior lies in the truncated priors of the rounds before "
                           "it: rounds contradict each other. Take more runs a round, or an ensemble.")
    share = float(log_weight.double().logsumexp(0).exp()) / len(log_weight)
    weights = (log_weight - log_weight.max()).double().exp()
    effective = float(weights.sum().square() / weights.square().sum()) * _CANDIDATES / len(weights)
    return TruncatedPrior(prior, regions, share, resampled=True, effective=effective)


def _weighed(truncated: TruncatedPrior, n: int) -> tuple[Tensor, Tensor]:
    """Draws `(n, D)` of the last region's posterior from torch's global state, with their log weights."""
    posterior = truncated.regions[-1].posterior
    theta = posterior.sample((n,), seed=int(torch.randint(2**62, ())))
    log_weight = truncated.prior.log_prob(theta) - posterior.log_prob(theta)
    return theta, torch.where(truncated.holds(theta), log_weight, -torch.inf)
