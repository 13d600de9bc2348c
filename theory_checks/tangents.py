r"""Derivatives along directions in z, and what taking them needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from theory_checks.coordinates import Coordinates, Points, SimulatorProblem

__all__ = ["Tangents", "moved_inside", "pull_back", "relative_error", "spread_of"]


@dataclass(frozen=True)
class Tangents:
    r"""Derivatives of a vector-valued function of z along k directions, at n rows.

    Args:
        values: Shape `(n, outputs, k)`.
        exact: Whether the directions are all coordinates of z. Otherwise they are independent with unit covariance, so
            that the square of a derivative along one has the gradient's squared norm as its mean.

    Example:
        >>> tangents = Tangents(torch.tensor([[[3.0, 4.0]]]), exact=True)
        >>> tangents.square(), tangents.fourth()
        (tensor([25.]), tensor([625.]))
    """

    values: Tensor
    exact: bool

    def __sub__(self, other: Tangents) -> Tangents:
        return Tangents(self.values - other.values, self.exact)

    def square(self) -> Tensor:
        """Unbiased for the squared Frobenius norm of the derivative, `(n,)`."""
        along = self.values.square().sum(1)
        return along.sum(-1) if self.exact else along.mean(-1)

    def fourth(self) -> Tensor:
        """Unbiased for its fourth power, `(n,)`."""
        along = self.values.square().sum(1)
        if self.exact:
            return along.sum(-1).square()
        k = along.shape[-1]  # products of two different directions, which are independent
        return (along.sum(-1).square() - along.square().sum(-1)) / (k * (k - 1))


def pull_back(coordinates: Coordinates, level: int, points: Points, cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Gradients `(n, dim)` of sums of outputs, one for each of several weights `(n, d)`.

    Raises:
        SimulatorProblem: If the level cannot be differentiated by torch.
    """
    name = coordinates.stack.levels[level].name
    try:
        pulled: Any = vjp(coordinates.function(level, points), *points.leaves)
        back, found = pulled[1], []
        for weight in cotangents:
            found.append(torch.cat([part.reshape(len(part), -1) for part in back(weight)], 1))
        return found
    except SimulatorProblem:
        raise
    except Exception as error:
        raise SimulatorProblem(f"level '{name}' cannot be differentiated by torch: {error}") from error


def relative_error(errors: Tensor, values: Tensor) -> Tensor:
    """Root mean square of errors `(steps, n)` over that of values; zero where both vanish."""
    size = values.square().mean(1)
    return torch.where(size > 0, errors.square().mean(1) / size.clamp_min(1e-300), errors.square().mean(1)).sqrt()


def spread_of(values: Tensor) -> Tensor:
    """Standard deviation of each column; 0 for one that is constant."""
    return values.std(0) if len(values) > 1 else torch.ones_like(values[0])


def moved_inside(points: Points, reach: Tensor) -> Points:
    """Rows at the edge of what was drawn moved inside by `reach`: noise may have an end there."""
    z = points.flat()
    low, high = z.min(0).values + reach, z.max(0).values - reach
    fits = low < high
    return points.moved(torch.where(fits, torch.minimum(torch.maximum(z, low), high), z) - z)
