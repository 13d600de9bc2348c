r"""Finding the parameters of highest density."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["climb"]

_PATIENCE = 25  # steps in which some point must rise
_GAIN = 1e-3  # by so much in log density


def climb(log_density: Callable[[Tensor], Tensor], start: Tensor, *, steps: int) -> Tensor:
    r"""Moves points uphill by Adam, until none rises any more.

    Args:
        log_density: From points `(k, D)` to values `(k,)`, differentiable; where they are not finite, nothing moves.
        start: Where to begin, shape `(k, D)`.
        steps: Steps of the ascent, at most.

    Returns:
        The highest point on each way, `(k, D)`.

    Example:
        >>> climb(lambda z: -(z - 1).square().sum(1), torch.tensor([[0.0], [0.5]]), steps=500).round(decimals=1)
        tensor([[1.],
                [1.]])
    """
    points = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([points], lr=0.02)
    found, top = start.clone(), torch.full_like(start[:, 0], -torch.inf)
    mark, since = top, 0
    for step in range(steps + 1):  # where the last one leads counts too
        value = log_density(points)
        finite = value.isfinite()
        higher = finite & (value.detach() > top)
        found = torch.where(higher[:, None], points.detach(), found)
        top = torch.where(higher, value.detach(), top)
        since += 1
        if bool((top > mark + _GAIN).any()):
            mark, since = torch.where(top > mark + _GAIN, top, mark), 0
        if since == _PATIENCE or step == steps:
            break
        points.grad = -torch.autograd.grad(value.where(finite, 0.0).sum(), points)[0]
        optimiser.step()
    return found
