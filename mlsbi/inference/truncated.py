r"""The prior, cut to where the posterior of one observation has its mass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.inference.posteriors import DirectPosterior
from mlsbi.priors import BoxPrior, in_support, parameter_names
from mlsbi.randomness import child_seed, seeded

__all__ = ["LEAST_ACCEPTANCE", "Region", "TruncatedPrior", "TruncationError", "density_region", "truncate_prior"]

LEAST_ACCEPTANCE = 1e-4
"""Share of proposed draws inside, below which draws come from the posterior instead, weighted and drawn again."""

_MARGIN = 0.05
_ENOUGH = 400  # draws inside from which an acceptance is known to 5%
_BATCH = 1 << 14
_MOST = 1 << 18  # prior draws from which an acceptance of LEAST_ACCEPTANCE is known to 20%
_CANDIDATES = 256  # posterior draws for each one that weights choose
_FRUITLESS = 1 << 10  # groups of candidates without any inside, after which no more are drawn
_WEIGHED = 1 << 14  # posterior draws from which a small share is measured


class TruncationError(RuntimeError):
    """Rounds contradict each other: nearly nothing lies in all regions. `found` has what earlier rounds gave."""

    found: Any = None


@dataclass(frozen=True, eq=False)
class Region:
    r"""Where a posterior's density at its observation is at least a threshold, within a box.

    Args:
        posterior: The posterior, with its observation.
        thresholds: Log density of theta at the region's edge; or one of each network of the posterior's ensemble, and
            the region is where any of them reaches its own.
        low: Lower edges of the box, shape `(D,)`.
        high: Its upper edges.
    """

    posterior: DirectPosterior
    thresholds: tuple[float, ...]
    low: Tensor
    high: Tensor

    def holds(self, theta: Tensor) -> Tensor:
        """Whether each of theta `(n, D)` lies inside, `(n,)`."""
        inside = ((theta >= self.low) & (theta <= self.high)).all(-1)
        rows = inside.nonzero()[:, 0]
        if len(rows):
            inside[rows] = torch.stack([part.log_prob(theta[rows]) >= threshold for part, threshold in
                                        zip(_parts(self.posterior, len(self.thresholds)), self.thresholds, strict=True)
                                        ]).any(0)
        return inside

    def settings(self) -> dict[str, Any]:
        """What JSON keeps of it, beside the posterior."""
        return {"thresholds": self.thresholds, "low": self.low.tolist(), "high": self.high.tolist()}

    @classmethod
    def from_settings(cls, posterior: DirectPosterior, kept: Mapping[str, Any]) -> Region:
        """The region that `settings` described."""
        low, high = (torch.tensor(kept[name], dtype=torch.get_default_dtype()) for name in ("low", "high"))
        return cls(posterior, tuple(kept["thresholds"]), low, high)


class TruncatedPrior(Distribution):
    r"""A prior restricted to regions; its support for networks stays the whole prior's.

    Draws are those of the prior that lie in all regions. Of a uniform prior they are looked for in the box that holds
    the regions. Where less than one in ten thousand is found inside, they are draws of the last region's posterior,
    resampled by their weights (sampling-importance resampling): draws of the truncated prior as far as many candidates
    for each make them so, which `effective` tells.

    Args:
        prior: The prior.
        regions: Regions, first to last; a draw lies in all of them. Every region inside the earlier ones, so that what
            was drawn before and lies inside has the law of new draws.
        share: Share of the prior that they hold.
        acceptance: Share of proposed draws that lie inside.
        resampled: Whether draws come from the posterior.
        effective: Of 256 posterior draws, as how many equally weighted ones they count; `None` where draws are not
            resampled.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  # as torch declares it

    def __init__(
        self, prior: Distribution, regions: Sequence[Region], *, share: float, acceptance: float,
        resampled: bool = False, effective: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(event_shape=prior.event_shape, validate_args=False)
        self.prior = prior
        self.regions = tuple(regions)
        self.share, self.acceptance = share, acceptance
        self.resampled, self.effective = resampled, effective
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
        return torch.where(inside, self.prior.log_prob(value) - math.log(self.share), -torch.inf)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # torch's signature
        """Draws `(*sample_shape, D)` from torch's global random state, as torch's distributions do.

        Raises:
            TruncationError: If far fewer draws lie inside than did before.
        """
        shape = torch.Size(sample_shape)
        n = shape.numel()
        drawn = self._resample(n) if self.resampled else self._reject(n)
        return drawn.reshape(*shape, *self.event_shape)

    def propose(self, n: int) -> Tensor:
        """Draws `(n, D)` of the prior, of a uniform one those in the box that holds all regions."""
        if not isinstance(self.prior, BoxPrior):
            return self.prior.sample((n,))
        low, high = self._box()
        return low + (high - low) * torch.rand(n, len(low))

    @property
    def proposed_share(self) -> float:
        """Share of the prior in which draws are proposed."""
        if not isinstance(self.prior, BoxPrior):
            return 1.0
        low, high = self._box()
        return float(((high - low) / (self.prior.high - self.prior.low)).double().prod())

    def _box(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.prior, BoxPrior)
        low = torch.stack([self.prior.low, *(region.low for region in self.regions)]).amax(0)
        high = torch.stack([self.prior.high, *(region.high for region in self.regions)]).amin(0)
        return low, torch.maximum(low, high)

    def _reject(self, n: int) -> Tensor:
        found: list[Tensor] = []
        missing, tried, most = n, 0, 100 * (n + _ENOUGH) / self.acceptance
        while missing > 0:
            theta = self.propose(min(math.ceil(1.2 * missing / self.acceptance) + 16, _BATCH))
            found.append(theta[self.holds(theta)])
            missing -= len(found[-1])
            tried += len(theta)
            if tried > most:
                raise TruncationError(f"Only {n - missing} of {tried} draws lie in the truncated prior; "
                                      f"{self.acceptance:.2g} of them did when it was made.")
        return torch.cat(found)[:n] if found else self.prior.sample((0,))

    def _resample(self, n: int) -> Tensor:
        """One of every `_CANDIDATES` posterior draws, chosen by its weight; of those without any inside others."""
        chosen: list[Tensor] = []
        missing, tried = n, 0
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
            tried += rows
            if missing == n and tried > _FRUITLESS:
                raise TruncationError("Nearly no draw of the last round's posterior lies in the truncated prior.")
        return torch.cat(chosen) if chosen else self.prior.sample((0,))

    def __repr__(self) -> str:
        edges = ", ".join("|".join(f"{each:.6g}" for each in region.thresholds) for region in self.regions)
        return f"TruncatedPrior({self.prior}, log q >= {edges})"

    def settings(self) -> dict[str, Any]:
        """What JSON keeps of it, beside the prior and posteriors."""
        return {"regions": [region.settings() for region in self.regions], "share": self.share,
                "acceptance": self.acceptance, "resampled": self.resampled, "effective": self.effective}

    @classmethod
    def from_settings(
        cls, prior: Distribution, posteriors: Sequence[DirectPosterior], kept: Mapping[str, Any]
    ) -> TruncatedPrior:
        """The truncated prior that `settings` described; `posteriors` has one for each region."""
        regions = [Region.from_settings(*pair) for pair in zip(posteriors, kept["regions"], strict=True)]
        return cls(prior, regions, **{name: kept[name] for name in ("share", "acceptance", "resampled", "effective")})


def density_region(
    posterior: DirectPosterior, *, union: bool = False, outside: float = 1e-6, draws: int = 30_000, seed: int
) -> Region:
    r"""The region of highest density that leaves out a share of the posterior's own draws.

    With fewer draws than `1 / outside` its edge is the lowest density of any draw. It ends where draws end, and a
    twentieth of their range beyond.

    Args:
        posterior: The posterior, with its observation.
        union: Whether it is the union of the regions of each network of an ensemble, instead of their mixture's, in
            one box about all of them. What one network is too sure of, another one may know better.
        outside: The share.
        draws: Draws that the edge is found from; so many of each network for a union.
        seed: Of the draws.

    Raises:
        TruncationError: If the density is finite at no draw.

    References:
        | Truncated proposals for scalable and hassle-free simulation-based inference (Deistler et al., 2022)
        | https://arxiv.org/abs/2210.04815
    """
    parts = posterior.members if union else (posterior,)
    found = [_edges(part, outside, draws, child_seed(seed, index)) for index, part in enumerate(parts)]
    thresholds, lows, highs = zip(*found, strict=True)
    return Region(posterior, thresholds, torch.stack(lows).amin(0), torch.stack(highs).amax(0))


def _edges(posterior: DirectPosterior, outside: float, draws: int, seed: int) -> tuple[float, Tensor, Tensor]:
    """Log density at a region's edge, and the lower and upper edges of its box."""
    theta = posterior.sample((draws,), seed=seed)
    log_q = posterior.log_prob(theta)
    known = torch.isfinite(log_q)
    if not bool(known.any()):
        raise TruncationError("The posterior's density is finite at none of its draws.")
    theta = theta[known]
    edge = _MARGIN * (theta.amax(0) - theta.amin(0))
    return float(torch.quantile(log_q[known].double(), outside)), theta.amin(0) - edge, theta.amax(0) + edge


def _parts(posterior: DirectPosterior, thresholds: int) -> tuple[DirectPosterior, ...]:
    """Whose densities thresholds are of: the mixture's, or each network's."""
    return (posterior,) if thresholds == 1 else posterior.members


def truncate_prior(prior: Distribution, regions: Sequence[Region], *, seed: int) -> TruncatedPrior:
    r"""The prior restricted to regions, and the way of drawing from it that its share of the prior allows.

    Args:
        prior: The prior.
        regions: Regions, first to last.
        seed: Of the draws that measure the share.

    Raises:
        TruncationError: If not even the last region's posterior has draws in all regions.
    """
    truncated = TruncatedPrior(prior, regions, share=1.0, acceptance=1.0)
    inside = tried = 0
    while inside < _ENOUGH and tried < _MOST:
        with seeded(child_seed(seed, 0, tried)):
            inside += int(truncated.holds(truncated.propose(_BATCH)).sum())
        tried += _BATCH
    if inside / tried >= LEAST_ACCEPTANCE:
        return TruncatedPrior(prior, regions, share=truncated.proposed_share * inside / tried,
                              acceptance=inside / tried)
    # The region's share of the prior is the mean weight of posterior draws.
    with seeded(child_seed(seed, 1)):
        _, log_weight = _weighed(truncated, _WEIGHED)
    if not bool(torch.isfinite(log_weight).any()):
        raise TruncationError("No draw of the last round's posterior lies in the truncated priors of the rounds before "
                              "it: rounds contradict each other. Take more runs a round, or an ensemble.")
    share = float(log_weight.double().logsumexp(0).exp()) / len(log_weight)
    weights = (log_weight - log_weight.max()).double().exp()
    effective = float(weights.sum().square() / weights.square().sum()) * _CANDIDATES / len(weights)
    return TruncatedPrior(prior, regions, share=share, acceptance=inside / tried, resampled=True,
                          effective=max(effective, 1.0))


def _weighed(truncated: TruncatedPrior, n: int) -> tuple[Tensor, Tensor]:
    """Draws `(n, D)` of the last region's posterior from torch's global state, with their log weights."""
    posterior = truncated.regions[-1].posterior
    theta = posterior.sample((n,), seed=int(torch.randint(2**62, ())))
    log_weight = truncated.prior.log_prob(theta) - posterior.log_prob(theta)
    return theta, torch.where(truncated.holds(theta), log_weight, -torch.inf)
