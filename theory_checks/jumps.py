r"""Jumps, found by halving intervals until nothing else is left of a change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["count_jumps", "random_way"]

_HALVINGS = 24  # of an interval a standard deviation long, after which a smooth function hardly changes over it
_MOST_HALVINGS = 40  # where one still does, after which it is steeper than anything that is computed in float64
_JUMP = 1e-3  # of an output's standard deviation, over an interval that short


def count_jumps(along: Callable[[Tensor], Tensor], rows: int, *, reach: float) -> Tensor:
    r"""In how many rows each component of a function of one number jumps.

    Intervals are halved towards the larger change, until a continuous function hardly changes over them any more,
    however steep it is: changes are seen relative to the largest on the way.

    Args:
        along: From one number a row `(rows,)` to values `(rows, components)`, with standard deviations of about 1.
        rows: How many rows.
        reach: How far from 0 the intervals begin.

    Returns:
        Counts, `(components,)`.

    Example:
        >>> count_jumps(lambda t: torch.stack([t.round(), t.abs()], 1), 3, reach=0.7)
        tensor([3, 0])
    """
    low, high = torch.full((rows,), -reach, dtype=torch.float64), torch.full((rows,), reach, dtype=torch.float64)
    at_low, at_high = along(low), along(high)
    size = torch.ones_like(at_low)
    for halving in range(_MOST_HALVINGS):
        if halving == _HALVINGS and not ((at_high - at_low).abs() > _JUMP * size).any():
            break
        middle = (low + high) / 2
        at_middle = along(middle)
        size = torch.maximum(size, torch.maximum((at_middle - at_low).abs(), (at_high - at_middle).abs()))
        left = (at_middle - at_low).square().sum(1) > (at_high - at_middle).square().sum(1)
        low, high = torch.where(left, low, middle), torch.where(left, middle, high)
        at_low = torch.where(left[:, None], at_low, at_middle)
        at_high = torch.where(left[:, None], at_middle, at_high)
    return ((at_high - at_low).abs() > _JUMP * size).sum(0)


def random_way(
    theta: Tensor, x: Tensor, generator: torch.Generator
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]:
    r"""A straight way through each row of v = (theta, x), in a random direction.

    Args:
        theta: Shape `(n, D)`.
        x: Shape `(n, ...)`.
        generator: Source of directions.

    Returns:
        A function from distances `(n,)`, in standard deviations of v's coordinates, to theta and x there; and how long
        a unit of it is in v, `(n,)`.
    """
    scale = torch.cat([theta.std(0), x.flatten(1).std(0)])
    way = torch.randn(len(theta), len(scale), generator=generator, dtype=torch.float64)
    way = scale * way / way.square().sum(1, keepdim=True).sqrt()

    def move(at: Tensor) -> tuple[Tensor, Tensor]:
        step = at[:, None] * way
        return theta + step[:, :theta.shape[1]], x + step[:, theta.shape[1]:].reshape(x.shape)

    return move, way.square().sum(1).sqrt()
