r"""Random draws that do not depend on how the work is cut up.

Theta and noise are drawn in whole blocks of `BLOCK` rows, each block seeded by (seed, stream, block), then sliced.
A larger n therefore extends a smaller one, and workers, order, batch size and resumption change nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlsbi.levels import LevelStack, map_noise
from mlsbi.priors import sample_prior
from mlsbi.randomness import check_seed, child_seed

__all__ = ["BLOCK", "RowSource"]

BLOCK = 1024
"""Rows drawn together."""


class RowSource:
    """Theta and noise of one random stream, in any order of rows; the last block drawn is kept.

    Args:
        stack: Prior and noise.
        seed: Seed of everything random.
        stream: Which stream.
    """

    def __init__(self, stack: LevelStack, *, seed: int, stream: int) -> None:
        self.stack, self.seed, self.stream = stack, check_seed(seed), stream
        self._kept: tuple[int, Tensor, Any] | None = None

    def rows(self, start: int, stop: int) -> tuple[Tensor, Any]:
        """Theta `(stop - start, D)` and the noise of rows `start:stop`."""
        thetas, noises = [], []
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            rows = slice(max(start - block * BLOCK, 0), min(stop - block * BLOCK, BLOCK))
            theta, noise = self._block(block)
            thetas.append(theta[rows])
            noises.append(map_noise(partial(_take, rows), noise))
        return torch.cat(thetas), _join(noises)

    def thetas(self, n: int) -> Tensor:
        """Theta of the first n rows, `(n, D)`, without drawing noise."""
        blocks = [self._thetas(block) for block in range(-(-n // BLOCK))]
        return torch.cat(blocks)[:n]

    def check_noise(self) -> None:
        """Raises a `ValueError` unless the same generator state gives the same noise."""
        state = child_seed(self.seed, self.stream)
        first, again = (self.stack.draw_noise(2, torch.Generator().manual_seed(state)) for _ in range(2))
        pairs = zip(_leaves(first), _leaves(again), strict=True)
        if not all(torch.equal(one, other) for one, other in pairs):
            raise ValueError("Expected noise(n, generator) to draw from its generator alone; the same generator state "
                             "gave two different draws. Pass generator=generator to every random function in it.")

    def _thetas(self, block: int) -> Tensor:
        return sample_prior(self.stack.prior, BLOCK, seed=child_seed(self.seed, self.stream, block, 0))

    def _block(self, block: int) -> tuple[Tensor, Any]:
        if self._kept is None or self._kept[0] != block:
            theta = self._thetas(block)
            generator = torch.Generator().manual_seed(child_seed(self.seed, self.stream, block, 1))
            self._kept = block, theta, self.stack.draw_noise(BLOCK, generator)
        return self._kept[1:]


def _leaves(noise: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_noise(found.append, noise)
    return found


def _take(rows: slice, tensor: Tensor) -> Tensor:
    return tensor[rows]


def _join(noises: list[Any]) -> Any:
    first = noises[0]
    if len(noises) == 1:
        return map_noise(torch.clone, first)  # the block is kept; a simulator gets its own rows
    if isinstance(first, dict):
        return {key: torch.cat([noise[key] for noise in noises]) for key in first}
    if isinstance(first, tuple):
        return tuple(torch.cat(parts) for parts in zip(*noises, strict=True))
    return torch.cat(noises)
