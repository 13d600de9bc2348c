r"""Gaussian mixtures whose parameters are a network of the condition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["MDN", "MixtureDensity"]


@dataclass(frozen=True)
class MDN:
    r"""Mixture density network: Gaussians with full covariances, smooth in the condition.

    Args:
        components: Gaussians in the mixture.
        hidden: Width of the network.
        layers: Hidden layers, with tanh between.

    References:
        | Mixture density networks (Bishop, 1994)
        | https://publications.aston.ac.uk/id/eprint/373/

    Example:
        >>> density = MDN(components=2)(dim=3, condition_dim=5)
        >>> density.log_prob(torch.zeros(4, 3), torch.zeros(4, 5)).shape
        torch.Size([4])
    """

    components: int = 5
    hidden: int = 32
    layers: int = 2

    def __post_init__(self) -> None:
        if min(self.components, self.hidden, self.layers) < 1:
            raise ValueError(f"Expected at least 1 component, hidden unit and layer; got {self}.")

    def __call__(self, dim: int, condition_dim: int) -> MixtureDensity:
        """A fresh mixture, initialised from torch's global random state."""
        sizes = [condition_dim, *[self.hidden] * self.layers]
        body = [part for width, following in zip(sizes[:-1], sizes[1:], strict=True)
                for part in (nn.Linear(width, following), nn.Tanh())]
        return MixtureDensity(nn.Sequential(*body), self.hidden, condition_dim, dim, self.components)


class MixtureDensity(nn.Module):
    r"""Mixture of K Gaussians with precision :math:`U^T U`, U lower triangular with a positive diagonal.

    Means are a linear map of the condition plus what the network adds: outside the training data they go on straight.

    Args:
        body: Network from conditions `(n, k)` to features `(n, hidden)`.
        hidden: Its output width.
        condition_dim: Length of the conditions.
        dim: Length of the modelled vectors.
        components: K.
    """

    below: Tensor

    def __init__(self, body: nn.Module, hidden: int, condition_dim: int, dim: int, components: int) -> None:
        super().__init__()
        self.dim, self.components = dim, components
        self.body = body
        self.head = nn.Linear(hidden, components * (1 + 2 * dim + dim * (dim - 1) // 2))
        self.line = nn.Linear(condition_dim, components * dim, bias=False)
        rows, columns = torch.tril_indices(dim, dim, -1)
        self.register_buffer("below", rows * dim + columns, persistent=False)
        with torch.no_grad():  # Gaussians start as wide as standardised data, at centres that differ
            self.head.weight.mul_(0.1)
            self.line.weight.zero_()
            self.head.bias.zero_()
            self.head.bias[components: components * (1 + dim)].normal_(std=0.5)

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given `condition` (n, condition_dim), shape `(n,)`."""
        log_weight, mean, log_diagonal, factor = self._read(condition)
        white = (factor @ (input[:, None] - mean)[..., None])[..., 0]  # (n, K, dim)
        log_normal = log_diagonal.sum(-1) - 0.5 * (white.square().sum(-1) + self.dim * math.log(2 * math.pi))
        return (log_weight + log_normal).logsumexp(-1)

    def sample(self, n: int, condition: Tensor) -> Tensor:
        """Draws `(n, B, dim)` given `condition` (B, condition_dim), from torch's global random state."""
        log_weight, mean, _, factor = self._read(condition)
        chosen = torch.multinomial(log_weight.exp(), n, replacement=True).T  # (n, B)
        rows = torch.arange(len(condition), device=condition.device)
        noise = torch.randn(n, len(condition), self.dim, device=condition.device)
        white = torch.linalg.solve_triangular(factor[rows, chosen], noise[..., None], upper=False)
        return mean[rows, chosen] + white[..., 0]

    def _read(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log weights (n, K), means and log diagonals (n, K, dim), and factors U (n, K, dim, dim)."""
        k, d = self.components, self.dim
        out = self.head(self.body(condition))
        logits, mean, log_diagonal, below = out.split([k, k * d, k * d, k * (d * (d - 1) // 2)], dim=-1)
        mean = mean + self.line(condition)
        log_diagonal = log_diagonal.unflatten(-1, (k, d))
        factor = torch.diag_embed(log_diagonal.exp())
        if d > 1:
            below = below.unflatten(-1, (k, -1))
            index = self.below.expand(below.shape)
            factor = factor + factor.new_zeros(*below.shape[:2], d * d).scatter(-1, index, below).unflatten(-1, (d, d))
        return logits.log_softmax(-1), mean.unflatten(-1, (k, d)), log_diagonal, factor
