r"""Numbers and draws of densities on intervals: quadrature, truncated normals, piecewise linear densities."""

from __future__ import annotations

import math

import torch
from numpy.polynomial.legendre import leggauss
from torch import Generator, Tensor

__all__ = ["draw_piecewise", "draw_truncated", "edges_halved", "legendre", "log_mass"]


def legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    unit, weight = (torch.from_numpy(values) for values in leggauss(nodes))
    return (unit + 1) / 2, weight / 2


def _to_lower_tail(low: float, high: float, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The standardised interval, mirrored into the lower tail, where normal probabilities keep their digits."""
    a, b = (low - mean) / sd, (high - mean) / sd
    mirrored = a + b > 0
    return torch.where(mirrored, -b, a), torch.where(mirrored, -a, b), mirrored


def log_mass(low: float, high: float, mean: Tensor, sd: Tensor) -> Tensor:
    """Log probability of [low, high] under a normal, also far in its tails."""
    a, b, _ = _to_lower_tail(low, high, mean, sd)
    log_b = torch.special.log_ndtr(b)
    return log_b + torch.log1p(-torch.exp(torch.special.log_ndtr(a) - log_b))


def draw_truncated(mean: Tensor, sd: Tensor, low: float, high: float, generator: Generator) -> Tensor:
    """One draw each of normals truncated to [low, high]."""
    a, b, mirrored = _to_lower_tail(low, high, mean, sd)
    uniform = torch.rand(mean.shape, generator=generator, dtype=mean.dtype)
    below = torch.special.ndtr(a)
    z = torch.special.ndtri(below + uniform * (torch.special.ndtr(b) - below))
    return (mean + sd * torch.where(mirrored, -z, z)).clamp(low, high)


def edges_halved(log_density: Tensor) -> Tensor:
    """Log densities on an even grid with half weight at its ends: what the trapezoidal rule sums."""
    halved = log_density.clone()
    halved[..., [0, -1]] -= math.log(2)
    return halved


def draw_piecewise(log_density: Tensor, grid: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draws from densities that are linear between the points of even grids, all `(n, K)`.

    Such a density is a mixture of triangles, one around each grid point and half of one at each edge.

    Returns:
        The triangle drawn from, and the draw, each `(n,)`.
    """
    log_weight = edges_halved(log_density)
    cumulative = torch.softmax(log_weight, -1).cumsum(-1)
    uniform = torch.rand(len(grid), 1, generator=generator, dtype=grid.dtype) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, uniform, right=True).clamp(max=grid.shape[1] - 1)[:, 0]
    offset = torch.rand(len(grid), generator=generator, dtype=grid.dtype)
    offset += torch.rand(len(grid), generator=generator, dtype=grid.dtype) - 1  # a triangle on (-1, 1)
    offset = torch.where(index == 0, offset.abs(), offset)
    offset = torch.where(index == grid.shape[1] - 1, -offset.abs(), offset)
    rows = torch.arange(len(grid))
    return index, grid[rows, index] + offset * (grid[:, 1] - grid[:, 0])
