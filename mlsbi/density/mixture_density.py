r"""Gaussian mixtures whose parameters are a network of the condition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlsbi.density.columns import linear

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

    def __init__(self, body: nn.Module, hidden: int, condition_dim: int, dim: int, components: int) -> None:
        super().__init__()
        self.dim, self.components = dim, components
        self.body = body
        self.head = nn.Linear(hidden, components * (1 + 2 * dim + dim * (dim - 1) // 2))
        self.line = nn.Linear(condition_dim, components * dim, bias=False)
        with torch.no_grad():  # Gaussians start as wide as standardised data, at centres that differ
            self.head.weight.mul_(0.1)
            self.line.weight.zero_()
            self.head.bias.zero_()
            self.head.bias[components: components * (1 + dim)].normal_(std=0.5)

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given `condition` (n, condition_dim), shape `(n,)`."""
        logits, mean, log_diagonal, below = self._read(condition)
        centred = input.T - mean  # (K, dim, n)
        white = log_diagonal.exp() * centred
        white = torch.stack([
            white[:, row] + (below[:, _row(row)] * centred[:, :row]).sum(1) if row else white[:, 0]
            for row in range(self.dim)
        ], 1)
        log_normal = log_diagonal.sum(1) - 0.5 * (white.square().sum(1) + self.dim * math.log(2 * math.pi))
        return (logits.log_softmax(0) + log_normal).logsumexp(0)

    def sample(self, n: int, condition: Tensor) -> Tensor:
        """Draws `(n, B, dim)` given `condition` (B, condition_dim), from torch's global random state."""
        logits, mean, log_diagonal, below = self._read(condition)
        chosen = torch.multinomial(logits.softmax(0).T, n, replacement=True).T[:, None]  # (n, 1, B)
        mean, log_diagonal, below = (
            part.gather(0, chosen.expand(-1, part.shape[1], -1)) for part in (mean, log_diagonal, below)
        )
        noise = torch.randn(n, len(condition), self.dim, dtype=condition.dtype, device=condition.device)
        away: list[Tensor] = []  # from the mean: U^-1 noise, row by row
        for row in range(self.dim):
            known = (below[:, _row(row)] * torch.stack(away, 1)).sum(1) if row else 0.0
            away.append((noise[..., row] - known) * (-log_diagonal[:, row]).exp())
        return (mean + torch.stack(away, 1)).transpose(1, 2)

    def _read(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (K, n), means and log diagonals of U (K, dim, n), and what is below, row by row, (K, ., n)."""
        k, d = self.components, self.dim
        columns = condition.T.contiguous()
        out = linear(self.head, self.body(condition).T)
        logits, mean, log_diagonal, below = out.split([k, k * d, k * d, k * (d * (d - 1) // 2)])
        mean = mean + self.line.weight @ columns
        return logits, mean.unflatten(0, (k, d)), log_diagonal.unflatten(0, (k, d)), below.unflatten(0, (k, -1))


def _row(row: int) -> slice:
    """Where the entries of one row of U are among those below the diagonal."""
    return slice(row * (row - 1) // 2, row * (row + 1) // 2)
