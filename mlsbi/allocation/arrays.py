r"""Numbers as users give them: arrays of the right shape and range, or an error that names what is wrong."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "check_range", "read_array", "read_counts", "read_numbers"]

Array: TypeAlias = NDArray[np.float64]


def read_array(name: str, values: object) -> Array:
    r"""Numbers of any shape, copied to float64; `ValueError` if they are none."""
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"Expected {name} to be numbers; got {values!r}. Pass a list or an array.") from None


def read_numbers(name: str, values: object, shape: tuple[int, ...], *, zero: bool = True) -> Array:
    r"""Finite numbers of one shape, positive or, where `zero`, at least 0; `ValueError` if they are not."""
    array = read_array(name, values)
    if array.shape != shape:
        what = "a single number" if shape == () else f"shape {shape}"
        raise ValueError(
            f"Expected {name} of {what} beside these variances; got shape {array.shape}. "
            "Pass one entry per level, cheapest first, and one row per output if variances have several."
        )
    check_range(name, array, zero=zero)
    return array


def check_range(name: str, array: Array, *, zero: bool) -> None:
    r"""Raises `ValueError`, with the first wrong entry, if not all are finite and positive (or zero, where `zero`)."""
    bad = ~np.isfinite(array) | ((array < 0) if zero else (array <= 0))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        at = f" at {list(place)}" if place else ""
        sign = "zero or positive" if zero else "positive"
        raise ValueError(
            f"Expected {name} to be finite and {sign}; got {array[place].item()!r}{at}. Correct it, or measure again."
        )


def read_counts(name: str, values: object, levels: int, *, least: int) -> Array:
    r"""Whole numbers of at least `least`, one per level or one for all, shape `(levels,)`; a maximum may be infinite.

    Raises:
        ValueError: If they are not.
    """
    array = read_array(name, values)
    if array.ndim > 0 and array.shape != (levels,):
        raise ValueError(
            f"Expected {name} to be one whole number or {levels}, one per level; got shape {array.shape}. "
            "Pass as many as there are variances."
        )
    allowed = np.isposinf(array) if name == "maximum" else np.zeros(array.shape, dtype=bool)
    whole = np.isfinite(array) & (array >= least) & (array == np.floor(array))
    if not (whole | allowed).all():
        raise ValueError(
            f"Expected {name} to be whole numbers of at least {least}; got {values!r}. "
            + {
                "minimum": "Every level needs a row: leave a level out of the stack to skip it.",
                "maximum": "Every level needs a row; None stands for no maximum.",
            }.get(name, "Count the rows.")
        )
    return np.broadcast_to(array, (levels,)).copy()
