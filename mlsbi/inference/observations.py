r"""Reading observations and sample shapes from users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["describe", "read_length", "read_observation", "read_observations", "read_set", "read_sets", "read_theta"]


def read_observation(x: Any, shape: tuple[int, ...]) -> Tensor:
    """One observation of a shape, with or without its batch dimension, as `(1, *shape)`.

    Raises:
        ValueError: If it has another shape, or is not finite.
    """
    tensor = _real(x)
    if tuple(tensor.shape) == shape:
        tensor = tensor[None]
    if tuple(tensor.shape) != (1, *shape):
        raise ValueError(f"Expected one observation of shape {shape} or {(1, *shape)}; got {tuple(tensor.shape)}. Use "
                         "sample_batched and log_prob_batched for several.")
    return _finite(tensor)


def read_observations(x: Any, shape: tuple[int, ...]) -> Tensor:
    """Several observations `(B, *shape)`.

    Raises:
        ValueError: If they have another shape, or are not finite.
    """
    tensor = _real(x)
    if tensor.ndim == 0 or tuple(tensor.shape[1:]) != shape or len(tensor) == 0:
        raise ValueError(f"Expected observations of shape {describe('B', shape)}; got {tuple(tensor.shape)}.")
    return _finite(tensor)


def read_set(x: Any, shape: tuple[int, ...]) -> Tensor:
    """Independent outputs `(m, *shape)` at one theta, or a single one `shape`, as `(1, m, *shape)`.

    Raises:
        ValueError: If they have another shape, there is none, or one is not finite.
    """
    tensor = _real(x)
    if tuple(tensor.shape) == shape:
        tensor = tensor[None]
    if tuple(tensor.shape[1:]) != shape or tensor.ndim == 0 or len(tensor) == 0:
        raise ValueError(f"Expected m independent observations of shape {describe('m', shape)}, or one of {shape}; got "
                         f"{tuple(tensor.shape)}. Use sample_batched and log_prob_batched for several sets.")
    return _finite(tensor)[None]


def read_sets(x: Any, shape: tuple[int, ...]) -> Tensor:
    """Sets `(B, m, *shape)`, or single outputs `(B, *shape)` as sets of one.

    Raises:
        ValueError: If they have another shape, there is none, or one is not finite.
    """
    tensor = _real(x)
    if tuple(tensor.shape[1:]) == shape:
        tensor = tensor[:, None]
    if tensor.ndim != 2 + len(shape) or tuple(tensor.shape[2:]) != shape or 0 in tensor.shape[:2]:
        raise ValueError(f"Expected sets of observations of shape {describe('B, m', shape)}, or single ones of "
                         f"{describe('B', shape)}; got {tuple(tensor.shape)}.")
    return _finite(tensor)


def read_theta(theta: Any, batch: int, dim: int) -> Tensor:
    """Parameters `(n, B, D)`, expanded from `(n, 1, D)`.

    Raises:
        ValueError: If they have another shape.
    """
    points = torch.as_tensor(theta, dtype=torch.get_default_dtype()).cpu()
    if points.ndim != 3 or points.shape[2] != dim or points.shape[1] not in (1, batch):
        raise ValueError(f"Expected theta of shape (n, {batch}, {dim}); got {tuple(points.shape)}.")
    return points.expand(-1, batch, -1)


def read_length(sample_shape: Sequence[int]) -> int:
    """The n of a sample shape `(n,)`.

    Raises:
        TypeError: If it is a number.
        ValueError: If it is not one positive number.
    """
    if isinstance(sample_shape, (int, np.integer)):
        raise TypeError(f"Expected sample_shape as a tuple; write sample(({sample_shape},)).")
    shape = tuple(sample_shape)
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"Expected sample_shape (n,) with n >= 1; got {shape}.")
    return int(shape[0])


def describe(leading: str, shape: tuple[int, ...]) -> str:
    """A shape with free leading lengths, as in error texts.

    Example:
        >>> describe("B, m", (5,)), describe("n", ())
        ('(B, m, 5)', '(n,)')
    """
    return f"({', '.join([leading, *map(str, shape)])}{'' if shape or ',' in leading else ','})"


def _real(x: Any) -> Tensor:
    """A tensor of floats; float64 is kept, for the standardiser to centre."""
    tensor = torch.as_tensor(x)
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _finite(x: Tensor) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise ValueError("Expected a finite observation; it has NaN or infinite entries.")
    return x
