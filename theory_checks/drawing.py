r"""Draws of a noise tree, of at most 200 columns per leaf."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Generator, Tensor

from mlsbi.randomness import child_seed

__all__ = ["FEWEST_DRAWS", "DrawnLeaf", "draw_leaves"]

Array: TypeAlias = np.ndarray[Any, Any]

FEWEST_DRAWS = 2000
_COLUMNS = 200
_MOST_NUMBERS = 4 * 10**7
_BLOCK_NUMBERS = 10**7


@dataclass(frozen=True, eq=False)
class DrawnLeaf:
    r"""A tensor of the noise, flattened to columns.

    Args:
        name: `noise`, `noise[0]` or `noise['path']`.
        size: How many numbers a row has.
        kind: Name of the dtype.
        columns: Draws of all columns, or of 200 of them, shape `(k, n)`, float64; `None` where they are not
            floating-point numbers.
    """

    name: str
    size: int
    kind: str
    columns: Array | None

    @property
    def looked_at(self) -> int:
        """How many columns were kept."""
        return 0 if self.columns is None else len(self.columns)


def draw_leaves(noise: Callable[[int, Generator], Any], *, rows: int, seed: int) -> list[DrawnLeaf]:
    r"""Draws noise in blocks; fewer rows, at least 2000, where it would be more than 4 10^7 numbers.

    Raises:
        TypeError: If the noise function gives something else than tensors.
        ValueError: If their leading dimension is wrong, or a draw is not finite.
    """
    generator = Generator().manual_seed(child_seed(seed, 0))
    rng = np.random.default_rng(child_seed(seed, 1))
    first = _named(noise(1, generator), 1)
    total = max(1, sum(leaf.numel() for leaf in first.values()))
    rows = min(rows, max(FEWEST_DRAWS, _MOST_NUMBERS // total))
    block = max(1, min(rows, _BLOCK_NUMBERS // total))
    picked = {name: torch.from_numpy(_pick(leaf.numel(), rng)) for name, leaf in first.items()
              if leaf.is_floating_point()}
    blocks: dict[str, list[Tensor]] = {name: [] for name in picked}
    for start in range(0, rows if picked else 0, block):
        n = min(block, rows - start)
        drawn = _named(noise(n, generator), n)
        for name, columns in picked.items():
            blocks[name].append(drawn[name].flatten(1)[:, columns])
    leaves = []
    for name, leaf in first.items():
        values = torch.cat(blocks[name]).double().T.contiguous().numpy() if name in blocks else None
        if values is not None and not np.isfinite(values).all():
            raise ValueError(f"Expected finite noise; {name} is not finite in some of {rows} draws.")
        leaves.append(DrawnLeaf(name, leaf.numel(), str(leaf.dtype).removeprefix("torch."), values))
    return leaves


def _named(noise: Any, n: int) -> dict[str, Tensor]:
    if isinstance(noise, dict):
        named = {f"noise[{key!r}]": leaf for key, leaf in noise.items()}
    elif isinstance(noise, (tuple, list)):
        named = {f"noise[{index}]": leaf for index, leaf in enumerate(noise)}
    else:
        named = {"noise": noise}
    for name, leaf in named.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(f"Expected noise(n, generator) to give tensors; {name} is a {type(leaf).__name__}.")
        if leaf.ndim == 0 or len(leaf) != n:
            raise ValueError(f"Expected {name} with leading dimension {n}; got shape {tuple(leaf.shape)}.")
    real = {name: torch.view_as_real(leaf) if leaf.is_complex() else leaf for name, leaf in named.items()}
    return {name: leaf if leaf.ndim > 1 else leaf[:, None] for name, leaf in real.items()}


def _pick(size: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All columns, or half of them in one run, where neighbours may depend on each other, and half anywhere."""
    if size <= _COLUMNS:
        return np.arange(size)
    half = _COLUMNS // 2
    start = int(rng.integers(size - half + 1))
    run = np.arange(start, start + half)
    return np.sort(np.concatenate([run, rng.choice(np.setdiff1d(np.arange(size), run), half, replace=False)]))
