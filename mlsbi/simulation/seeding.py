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
from mlsbi.randomness import child_seed

__all__ = ["BLOCK", "JOINT_STREAM", "TEST_STREAM", "draw_rows"]

BLOCK = 1024
"""Rows drawn together."""

JOINT_STREAM = 1 << 16
"""Random stream of a pilot's joint rows; its independent rows of level l use `JOINT_STREAM + 1 + l`."""

TEST_STREAM = 1 << 17
"""Random stream of test rows. Streams 0, 1, ... are the levels' own."""


def draw_rows(stack: LevelStack, start: int, stop: int, *, seed: int, stream: int) -> tuple[Tensor, Any]:
    """Draws theta `(stop - start, D)` and the noise of rows `start:stop` of one stream."""
    thetas, noises = [], []
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        rows = slice(max(start - block * BLOCK, 0), min(stop - block * BLOCK, BLOCK))
        thetas.append(sample_prior(stack.prior, BLOCK, seed=child_seed(seed, stream, block, 0))[rows])
        generator = torch.Generator().manual_seed(child_seed(seed, stream, block, 1))
        noises.append(map_noise(partial(_take, rows), stack.draw_noise(BLOCK, generator)))
    return torch.cat(thetas), _join(noises)


def _take(rows: slice, tensor: Tensor) -> Tensor:
    return tensor[rows]


def _join(noises: list[Any]) -> Any:
    first = noises[0]
    if len(noises) == 1:
        return first
    if isinstance(first, dict):
        return {key: torch.cat([noise[key] for noise in noises]) for key in first}
    if isinstance(first, tuple):
        return tuple(torch.cat(parts) for parts in zip(*noises, strict=True))
    return torch.cat(noises)
