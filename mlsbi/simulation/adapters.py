r"""Simulators that run one row at a time as levels, and the plain function of one sample among them."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mlsbi.levels import map_noise

__all__ = ["PerSample", "RowSimulator", "as_output", "noise_of_row", "per_sample", "run_rows"]

Array = np.ndarray[Any, Any]

_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64")


@runtime_checkable
class RowSimulator(Protocol):
    """A simulator whose rows run, and fail, one by one."""

    def run_row(self, theta: Array, noise: Any) -> Array:
        """Simulates one row: parameters `(D,)` and `noise_of_row(noise, row)` give an output of one fixed shape."""
        ...


def noise_of_row(noise: Any, row: int) -> Any:
    """One row of base noise, in numpy: the seed of `noise="seed"` as a plain number, a tuple or dict of rows as such.

    Args:
        noise: Tensor or array, or a tuple or dict of them, each `(n, ...)`.
        row: Which row.

    Example:
        >>> noise_of_row(torch.tensor([7, 8]), 1)
        8
        >>> noise_of_row({"u": torch.zeros(2, 3)}, 1)
        {'u': array([0., 0., 0.], dtype=float32)}
    """
    return map_noise(partial(_leaf_of_row, row), noise)


def _leaf_of_row(row: int, leaf: Any) -> Any:
    array = _as_array(leaf)
    if array.ndim == 1 and array.dtype.kind in "iu":
        return int(array[row])
    return array[row].copy()  # what a simulator does to its row stays there


@dataclass(frozen=True)
class PerSample:
    """A function of one sample as a level's `simulate`; made by `per_sample`.

    Args:
        function: `function(theta (D,), noise) -> x`, in numpy.
    """

    function: Callable[[Array, Any], Any]

    def run_row(self, theta: Array, noise: Any) -> Array:
        """Simulates one row.

        Raises:
            TypeError: If the function does not return real numbers.
            ValueError: If what it returns has no one shape.
        """
        return as_output(self.function(theta, noise), f"function '{_name(self.function)}'")

    def __call__(self, theta: Any, noise: Any) -> Tensor:
        """Simulates n rows, `(n, ...)`; the first row that fails ends it with a `RuntimeError` that names it."""
        return run_rows(self, theta, noise)

    def __reduce__(self) -> Any:
        # Under the decorator the function's own name means this object, which pickle refuses for the function.
        module, name = getattr(self.function, "__module__", None), getattr(self.function, "__qualname__", "")
        start: Any = sys.modules.get(module or "")
        found = reduce(lambda held, part: getattr(held, part, None), name.split("."), start)
        if found is self and module != "__main__":
            return pkgutil.resolve_name, (f"{module}:{name}",)
        return type(self), (self.function,)


def per_sample(function: Callable[[Array, Any], Any]) -> PerSample:
    """Makes a level's `simulate` of a function of one sample; also a decorator.

    Rows run one by one, so that a row that fails leaves the others alone, and nothing needs to be vectorised.

    Args:
        function: `function(theta, noise) -> x`. Theta is an array `(D,)` in the prior's dtype; noise is one row, in
            numpy (a tuple or dict where the stack's noise is one, a plain int for `noise="seed"`). Returns an array, a
            list or a tensor of one fixed shape, or a number, which counts as shape `(1,)`. Arrays keep their type,
            plain whole numbers become floats.

    Raises:
        TypeError: If `function` cannot be called.

    Example:
        >>> @per_sample
        ... def walk(theta, seed):
        ...     return theta[0] * np.random.default_rng(seed).normal(size=3).cumsum()
        >>> walk(torch.ones(2, 1), torch.tensor([4, 5])).shape
        torch.Size([2, 3])
    """
    if not callable(function):
        raise TypeError(f"Expected a function of one sample, f(theta, noise); got {type(function).__name__}.")
    return PerSample(function)


def run_rows(simulator: RowSimulator, theta: Any, noise: Any) -> Tensor:
    """Runs n rows one by one; for `__call__` of a simulator of single rows.

    Args:
        simulator: What runs a row.
        theta: Parameters, `(n, D)`.
        noise: Base noise of n rows.

    Returns:
        Outputs, `(n, ...)`, on the CPU.

    Raises:
        ValueError: If theta is no table, or rows differ in shape.
        RuntimeError: If a row fails; the row is named.
    """
    thetas = _as_array(theta)
    if thetas.ndim != 2 or len(thetas) == 0:
        raise ValueError(f"Expected theta of shape (n, D), at least one row; got {thetas.shape}.")
    outputs: list[Array] = []
    for row in range(len(thetas)):
        try:
            outputs.append(simulator.run_row(thetas[row].copy(), noise_of_row(noise, row)))
        except Exception as error:
            raise RuntimeError(f"Row {row}, theta {thetas[row].tolist()}, failed: {type(error).__name__}: "
                               f"{error}") from error
        if outputs[row].shape != outputs[0].shape:
            raise ValueError(f"Expected every row to have one shape; row 0 has {outputs[0].shape}, row {row} has "
                             f"{outputs[row].shape}.")
    return torch.from_numpy(np.stack(outputs))


def as_output(output: Any, who: str) -> Array:
    """A row's output as an array of numbers, at least `(1,)`: a copy, for its memory may be used for the next row.

    Args:
        output: What a simulator returned.
        who: What errors call it.

    Raises:
        TypeError: If the output is not made of real numbers.
        ValueError: If it has no one shape.
    """
    try:
        array = np.array(_as_array(output))
    except ValueError as error:
        raise ValueError(f"Expected {who} to return numbers of one shape; got {type(output).__name__}: "
                         f"{error}") from error
    if array.dtype.kind in "iu" and not hasattr(output, "dtype"):  # [0, 0] here may be [0.5, 0] in the next row
        array = array.astype(np.float64)
    if array.dtype.kind == "c":
        raise TypeError(f"Expected {who} to return real numbers; got complex ones. Return real and imaginary parts as "
                        "separate outputs.")
    if array.dtype.name not in _DTYPES:
        raise TypeError(f"Expected {who} to return numbers, of one of the types {', '.join(_DTYPES)}; got "
                        f"{array.dtype.name} ({type(output).__name__}).")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array[None] if array.ndim == 0 else array


def _as_array(values: Any) -> Array:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
