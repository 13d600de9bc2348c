r"""Coupled simulations: what every estimator is trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["LevelData", "MultilevelData", "count_runs", "spread"]

_FORMAT = 1


@dataclass(frozen=True)
class LevelData:
    r"""The rows of one level's term in the telescoping sum, aligned.

    Args:
        theta: Parameters, shape `(n, D)`.
        fine: Outputs of this level at `theta`, shape `(n, ...)`.
        coarse: Outputs of the level below at the same `theta` and noise, same shape; `None` at level 0, and where
            levels were simulated apart.
    """

    theta: Tensor
    fine: Tensor
    coarse: Tensor | None = None

    def __len__(self) -> int:
        return len(self.theta)

    def rows(self, index: slice | Tensor) -> LevelData:
        """The rows that `index` picks, still aligned."""
        return LevelData(self.theta[index], self.fine[index], None if self.coarse is None else self.coarse[index])

    def followed_by(self, other: LevelData) -> LevelData:
        """These rows, then those of `other`."""
        coarse = None
        if self.coarse is not None and other.coarse is not None:
            coarse = torch.cat([self.coarse, other.coarse])
        return LevelData(torch.cat([self.theta, other.theta]), torch.cat([self.fine, other.fine]), coarse)


@dataclass(frozen=True)
class MultilevelData:
    r"""Coupled simulations of a whole stack, level 0 (cheapest) first.

    Args:
        levels: One `LevelData` per level. Rows of different levels are independent.
        names: Level names, cheapest first.
        failures: Rows per level that failed, and were left out or redrawn.
        runs: Simulator runs made per level, replays, coarse halves and left-out pairs included.
        seconds: Time spent in each level's simulator; `None` where the data came from elsewhere.

    Example:
        >>> theta, x = torch.rand(8, 2), torch.rand(8, 3)
        >>> data = MultilevelData.from_arrays([(theta, x), (theta[:3], x[:3] + 0.1, x[:3])])
        >>> data.n, data.runs, data.levels[1].coarse.shape
        ((8, 3), (11, 3), torch.Size([3, 3]))
    """

    levels: tuple[LevelData, ...]
    names: tuple[str, ...]
    failures: tuple[int, ...]
    runs: tuple[int, ...]
    seconds: tuple[float, ...] | None = None

    @classmethod
    def from_arrays(cls, levels: Sequence[Sequence[Any]], names: Sequence[str] | None = None) -> MultilevelData:
        r"""Builds data from simulations that exist already.

        Args:
            levels: `(theta, x)` for level 0, then `(theta, fine, coarse)` per level, or `(theta, fine)` where levels
                were simulated apart (strategies that need no pairs can use those); arrays or tensors.
            names: Level names; `level 0, level 1, ...` when left out.

        Raises:
            ValueError: If arrays are missing, do not align, are not finite, or differ in shape between levels.
        """
        if not levels:
            raise ValueError("Expected at least one level: levels=[(theta, x), (theta, fine, coarse), ...].")
        parsed = []
        for index, arrays in enumerate(levels):
            if len(arrays) not in ((2,) if index == 0 else (2, 3)):
                what = "(theta, x)" if index == 0 else "(theta, fine, coarse) or (theta, fine)"
                raise ValueError(f"Expected {what} for level {index}; got {len(arrays)} arrays.")
            parsed.append(LevelData(*(_to_tensor(array) for array in arrays)))
        n = [len(level) for level in parsed]
        if names is not None and (len(names) != len(n) or len(set(names)) != len(n)):
            raise ValueError(f"Expected {len(n)} different level names; got {list(names)}.")
        data = cls(
            levels=tuple(parsed),
            names=tuple(names) if names is not None else tuple(f"level {i}" for i in range(len(n))),
            failures=(0,) * len(n),
            runs=tuple(own + len(above) if above is not None and above.coarse is not None else own
                       for own, above in zip(n, (*parsed[1:], None), strict=True)),
        )
        data.check()
        return data

    @property
    def n(self) -> tuple[int, ...]:
        """Rows per level."""
        return tuple(len(level) for level in self.levels)

    @property
    def checked(self) -> bool:
        """Whether `simulate` or `pilot` made these rows, which see to it that simulators are deterministic."""
        return self.seconds is not None

    def __len__(self) -> int:
        return len(self.levels)

    def __iter__(self) -> Iterator[LevelData]:
        return iter(self.levels)

    def head(self, n: int | Sequence[int]) -> MultilevelData:
        r"""The first rows of every level.

        Args:
            n: Rows to keep, one number for all levels (levels that have fewer keep theirs) or one per level.

        Raises:
            ValueError: If more rows are asked of a level than it has, or fewer than one.
        """
        wanted = spread(n, len(self), what="n")
        if isinstance(n, (int, np.integer)):
            wanted = [min(want, have) for want, have in zip(wanted, self.n, strict=True)]
        for name, want, have in zip(self.names, wanted, self.n, strict=True):
            if not 1 <= want <= have:
                raise ValueError(f"Expected between 1 and {have} rows of level '{name}'; got {want}.")
        levels = tuple(level.rows(slice(want)) for level, want in zip(self.levels, wanted, strict=True))
        return replace(self, levels=levels)

    def check(self, *, empty: bool = False) -> None:
        """Raises a `ValueError` unless rows align, are finite, have one shape over levels, and none is empty.

        Args:
            empty: Whether levels without rows are allowed, as in a pilot's data.
        """
        shape = tuple(self.levels[0].fine.shape[1:])
        if not shape:
            raise ValueError("Expected outputs of shape (n, ...), one row a simulation; got one number a row. Pass "
                             "x[:, None].")
        for name, level in zip(self.names, self.levels, strict=True):
            if level.theta.ndim != 2 or (len(level) == 0 and not empty):
                raise ValueError(f"Expected theta of shape (n, D), n > 0, at level '{name}'; got "
                                 f"{tuple(level.theta.shape)}.")
            for half, x in (("fine", level.fine), ("coarse", level.coarse)):
                if x is None:
                    continue
                if tuple(x.shape) != (len(level), *shape):
                    raise ValueError(f"Expected {half} outputs of shape {(len(level), *shape)} at level '{name}'; got "
                                     f"{tuple(x.shape)}.")
                bad = int((~torch.isfinite(x).flatten(1).all(1)).sum())
                if bad:
                    raise ValueError(f"Expected finite outputs; {bad} {half} rows of level '{name}' are not. "
                                     "Leave those pairs out, at every level that uses them.")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one `.npz` file (no pickle), whole or not at all; returns its path."""
        target = Path(path)
        if target.suffix != ".npz":
            target = target.with_name(target.name + ".npz")
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {
            "format": _FORMAT, "names": list(self.names), "failures": self.failures, "runs": self.runs,
        }
        if self.seconds is not None:
            arrays["seconds"] = self.seconds
        for index, level in enumerate(self.levels):
            arrays[f"theta_{index}"], arrays[f"fine_{index}"] = level.theta.numpy(), level.fine.numpy()
            if level.coarse is not None:
                arrays[f"coarse_{index}"] = level.coarse.numpy()
        partial = target.with_name(target.name + f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, target)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MultilevelData:
        """Reads what `save` wrote.

        Raises:
            ValueError: If the file was written by a newer format.
        """
        with np.load(path, allow_pickle=False) as file:
            if "format" not in file:
                raise ValueError(f"{path} was not written by MultilevelData.save: it holds {sorted(file)}.")
            if int(file["format"]) > _FORMAT:
                raise ValueError(f"{path} has format {int(file['format'])}; this version reads up to {_FORMAT}. "
                                 "Upgrade mlsbi to read it.")
            names = tuple(str(name) for name in file["names"])
            levels = tuple(
                LevelData(*(torch.from_numpy(file[key]) for key in
                            (f"theta_{i}", f"fine_{i}", f"coarse_{i}") if key in file))
                for i in range(len(names))
            )
            seconds = tuple(float(s) for s in file["seconds"]) if "seconds" in file else None
            data = cls(levels, names, tuple(map(int, file["failures"])), tuple(map(int, file["runs"])), seconds)
        data.check(empty=True)
        return data

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {n}" for name, n in zip(self.names, self.n, strict=True))
        lost = f", {sum(self.failures)} pairs left out" if any(self.failures) else ""
        return f"MultilevelData({rows}; x {tuple(self.levels[0].fine.shape[1:])}{lost})"


def count_runs(n: Sequence[int]) -> tuple[int, ...]:
    """Simulator runs of each level behind n rows per level: a row above level 0 is a run of two levels.

    Example:
        >>> count_runs([1000, 100, 10])
        (1100, 110, 10)
    """
    return tuple(own + above for own, above in zip(n, (*n[1:], 0), strict=True))


def spread(value: int | Sequence[int], length: int, *, what: str) -> list[int]:
    """One whole number per level, from one for all or from a sequence of the right length.

    Raises:
        ValueError: If the length does not fit or a number is not whole.
    """
    if isinstance(value, (int, np.integer)):
        return [int(value)] * length
    try:
        values = list(value)
    except TypeError:
        raise ValueError(f"Expected {what} as a whole number or one per level, {length}; got {value!r}.") from None
    if len(values) != length:
        raise ValueError(f"Expected {what} with one number per level, {length}; got {len(values)}: {values}.")
    if any(int(v) != v for v in values):
        raise ValueError(f"Expected whole numbers for {what}; got {values}.")
    return [int(v) for v in values]


def _to_tensor(array: Any) -> Tensor:
    tensor = torch.as_tensor(array).detach().cpu()
    if tensor.is_complex():
        raise ValueError("Expected real arrays; got complex ones. Give real and imaginary parts as separate outputs.")
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
