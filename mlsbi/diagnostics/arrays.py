r"""Checks of the arrays that users pass to diagnostics."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Array", "as_finite", "as_pairs", "as_per_parameter", "as_two_sets"]

Array = np.ndarray[Any, Any]


def as_finite(values: ArrayLike, name: str, shape: tuple[str, ...]) -> Array:
    """The values as float64.

    Args:
        values: What the user passed.
        name: What errors call it.
        shape: Name of each axis.

    Raises:
        ValueError: If there is another number of axes, nothing in it, or a NaN or infinite number.

    Example:
        >>> as_finite([0.5, float("nan")], "levels", ("B",))
        Traceback (most recent call last):
        ValueError: Expected finite levels; got 1 NaN or infinite of 2 numbers.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != len(shape) or array.size == 0:
        axes = f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(shape)})"
        raise ValueError(f"Expected {name} of shape {axes}, not empty; got {array.shape}.")
    wrong = int((~np.isfinite(array)).sum())
    if wrong:
        raise ValueError(f"Expected finite {name}; got {wrong} NaN or infinite of {array.size} numbers.")
    return array


def as_pairs(theta: ArrayLike, samples: ArrayLike) -> tuple[Array, Array]:
    """True parameters `(B, D)` and posterior draws `(n, B, D)` as float64.

    Raises:
        ValueError: If the shapes do not fit or something is not finite.
    """
    true, drawn = as_finite(theta, "theta", ("B", "D")), as_finite(samples, "samples", ("n", "B", "D"))
    if drawn.shape[1:] != true.shape:
        raise ValueError(f"Expected shapes (B, D) and (n, B, D); got {true.shape} and {drawn.shape}.")
    return true, drawn


def as_two_sets(reference: ArrayLike, samples: ArrayLike, *, least: int) -> tuple[Array, Array]:
    """Two sets of draws, `(n, D)` and `(m, D)`, as float64.

    Raises:
        ValueError: If the shapes do not fit, something is not finite, or a set has fewer than `least` draws.
    """
    sets = as_finite(reference, "reference", ("n", "D")), as_finite(samples, "samples", ("m", "D"))
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"Expected shapes (n, D) and (m, D); got {sets[0].shape} and {sets[1].shape}.")
    if min(map(len, sets)) < least:
        raise ValueError(f"Expected at least {least} draws in each set; got {len(sets[0])} and {len(sets[1])}.")
    return sets


def as_per_parameter(values: ArrayLike, name: str, dim: int) -> Array:
    """One finite number per parameter, shape `(D,)`, as float64.

    Raises:
        ValueError: If there is another number of them, or one is not finite.
    """
    array = as_finite(values, name, ("D",))
    if len(array) != dim:
        raise ValueError(f"Expected {name} of shape ({dim},), one number per parameter; got {array.shape}.")
    return array
