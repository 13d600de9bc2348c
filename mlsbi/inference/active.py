r"""Parameters where the networks of an ensemble disagree most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.inference.posteriors import DirectPosterior
from mlsbi.inference.truncated import TruncatedPrior
from mlsbi.priors import parameter_names

__all__ = ["ActiveProposal", "disagreement"]


class ActiveProposal(Distribution):
    r"""Draws of a truncated prior, and at even distances among them prior draws that an ensemble disagrees on most.

    Of the first n of every `sample`, a share is the top of a pool of prior draws by `disagreement`, best first. These
    do not follow the prior. `log_prob` is the prior's, which is what a plain loss takes them for, as published.

    Args:
        truncated: The truncated prior.
        posterior: The ensemble, with its observation.
        share: Share of draws chosen so, above 0 and below 1.
        pool: Prior draws to choose from.

    References:
        | Multifidelity simulation-based inference for computationally expensive simulators (Krouglova et al., 2025)
        | https://arxiv.org/abs/2502.08416
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  # as torch declares it

    def __init__(
        self, truncated: TruncatedPrior, posterior: DirectPosterior, share: float = 0.2, *, pool: int = 10_000
    ) -> None:
        super().__init__(event_shape=truncated.event_shape, validate_args=False)
        self.truncated, self.posterior, self.share, self.pool = truncated, posterior, share, pool
        self.names = parameter_names(truncated.prior)

    @property
    def support(self) -> Any:
        """The prior's support."""
        return self.truncated.support

    def log_prob(self, value: Tensor) -> Tensor:
        """The prior's log density, shape `value.shape[:-1]`."""
        return self.truncated.prior.log_prob(value)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # torch's signature
        """Draws `(*sample_shape, D)` from torch's global random state."""
        shape = torch.Size(sample_shape)
        n = shape.numel()
        counts = (torch.arange(n + 1, dtype=torch.float64) * self.share + 1e-9).floor()
        chosen = counts[1:] > counts[:-1]
        theta = self.truncated.sample((n,))
        pool = self.truncated.prior.sample((max(self.pool, 4 * int(chosen.sum())),))
        theta[chosen] = pool[disagreement(self.posterior, pool).topk(int(chosen.sum())).indices]
        return theta.reshape(*shape, *self.event_shape)

    def __repr__(self) -> str:
        return f"ActiveProposal({self.truncated}, share {self.share:g} of a pool of {self.pool})"


def disagreement(posterior: DirectPosterior, theta: Tensor) -> Tensor:
    """Variance over an ensemble of its densities at theta `(n, D)` given its observation, up to a factor, `(n,)`."""
    log_q = torch.stack([member.log_prob(theta) for member in posterior.members]).double()
    return (log_q - log_q.max()).exp().var(0, correction=0)
