r"""Levels and noise with known derivatives, of which random stacks are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor

__all__ = [
    "Affine", "Column", "Matrix", "MixedNoise", "NoiseBlock", "NormalNoise", "Perturbed", "Polynomial", "Saturating",
    "Simulator", "UniformNoise",
]  # fmt: skip

Column = Literal["uniform", "normal"]
Matrix = tuple[tuple[float, ...], ...]


class Simulator(Protocol):
    """A generator `simulate(theta, noise) -> x` of rows `(n, d)` from theta `(n, D)` and noise `(n, K)`."""

    def __call__(self, theta: Tensor, noise: Tensor) -> Tensor:
        """Outputs `(n, d)`, of theta's dtype."""
        ...


@dataclass(frozen=True)
class Affine:
    r"""The generator :math:`x = A \theta + B u + c`.

    Args:
        theta_slope: A, shape `(d, D)`.
        noise_slope: B, shape `(d, K)`.
        shift: c, shape `(d,)`.

    Example:
        >>> Affine(theta_slope=((2.0,),), noise_slope=((1.0,),), shift=(0.5,))(torch.ones(1, 1), torch.zeros(1, 1))
        tensor([[2.5000]])
    """

    theta_slope: Matrix
    noise_slope: Matrix
    shift: tuple[float, ...]

    def __call__(self, theta: Tensor, noise: Tensor) -> Tensor:
        """Outputs `(n, d)`, of theta's dtype."""
        return _times(self.theta_slope, theta) + _times(self.noise_slope, noise.to(theta)) + _like(self.shift, theta)


@dataclass(frozen=True)
class Polynomial:
    r"""The generator :math:`x_i = a_i + q_i r_i^2 / 2 + t_i r_i^3 / 6`, where a and r are affine in (theta, u).

    Args:
        affine: a, of d outputs.
        inner: r, of d outputs.
        quadratic: q, shape `(d,)`.
        cubic: t, shape `(d,)`.
    """

    affine: Affine
    inner: Affine
    quadratic: tuple[float, ...]
    cubic: tuple[float, ...]

    def __call__(self, theta: Tensor, noise: Tensor) -> Tensor:
        """Outputs `(n, d)`, of theta's dtype."""
        inner = self.inner(theta, noise)
        square = inner * inner
        return self.affine(theta, noise) + square * (
            _like(self.quadratic, theta) / 2 + _like(self.cubic, theta) / 6 * inner
        )


@dataclass(frozen=True)
class Saturating:
    r"""The generator :math:`x = a + C \tanh(r)`, where a and r are affine in (theta, u).

    Args:
        affine: a, of d outputs.
        inner: r, of any number h of outputs.
        readout: C, shape `(d, h)`.
    """

    affine: Affine
    inner: Affine
    readout: Matrix

    def __call__(self, theta: Tensor, noise: Tensor) -> Tensor:
        """Outputs `(n, d)`, of theta's dtype."""
        return self.affine(theta, noise) + _times(self.readout, self.inner(theta, noise).tanh())


@dataclass(frozen=True)
class Perturbed:
    r"""The generator `base + gap * perturbation`, whose derivatives are as close to those of `base` as its values.

    Args:
        base: A generator.
        perturbation: Another one of the same shapes.
        gap: Any number.
    """

    base: Simulator
    perturbation: Simulator
    gap: float

    def __call__(self, theta: Tensor, noise: Tensor) -> Tensor:
        """Outputs `(n, d)`, of theta's dtype."""
        return self.base(theta, noise) + self.gap * self.perturbation(theta, noise)


@dataclass(frozen=True)
class NoiseBlock:
    r"""A generator that reads some columns of the noise only; levels that read different ones are not coupled.

    Args:
        generator: What runs on those columns.
        start: The first of them.
        stop: One past the last.
    """

    generator: Simulator
    start: int
    stop: int

    def __call__(self, theta: Tensor, noise: Tensor) -> Tensor:
        """Outputs `(n, d)`, of theta's dtype."""
        return self.generator(theta, noise[:, self.start: self.stop])


@dataclass(frozen=True)
class UniformNoise:
    r"""Independent uniform(0, 1) noise.

    Args:
        dim: Number of columns.
    """

    dim: int

    @property
    def columns(self) -> tuple[Column, ...]:
        """The law of each column."""
        columns: tuple[Column, ...] = ("uniform",)
        return columns * self.dim

    def __call__(self, n: int, generator: Generator) -> Tensor:
        """Draws `(n, dim)`, of the default dtype."""
        return torch.rand(n, self.dim, generator=generator, device=generator.device)


@dataclass(frozen=True)
class NormalNoise:
    r"""Independent N(0, 1) noise.

    Args:
        dim: Number of columns.
    """

    dim: int

    @property
    def columns(self) -> tuple[Column, ...]:
        """The law of each column."""
        columns: tuple[Column, ...] = ("normal",)
        return columns * self.dim

    def __call__(self, n: int, generator: Generator) -> Tensor:
        """Draws `(n, dim)`, of the default dtype."""
        return torch.randn(n, self.dim, generator=generator, device=generator.device)


@dataclass(frozen=True)
class MixedNoise:
    r"""Independent columns, some uniform(0, 1) and some N(0, 1).

    Args:
        columns: The law of each column.

    Example:
        >>> MixedNoise(("uniform", "normal"))(4, torch.Generator()).shape
        torch.Size([4, 2])
    """

    columns: tuple[Column, ...]

    def __call__(self, n: int, generator: Generator) -> Tensor:
        """Draws `(n, len(columns))`, of the default dtype."""
        draw = {"uniform": torch.rand, "normal": torch.randn}
        return torch.stack([draw[law](n, generator=generator, device=generator.device) for law in self.columns], 1)


def _like(values: Any, rows: Tensor) -> Tensor:
    return torch.tensor(values, dtype=rows.dtype, device=rows.device)


def _times(matrix: Matrix, rows: Tensor) -> Tensor:
    """The matrix times every row; a product of matrices would round a row by the number of rows beside it."""
    return (rows[:, None] * _like(matrix, rows)).sum(2)
