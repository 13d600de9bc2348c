r"""Finding the parameters of highest density."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["climb"]


def climb(log_density: Callable[[Tensor], Tensor], start: Tensor, *, steps: int) -> Tensor:
    r"""Moves points uphill by Adam.

    Args:
        log_density: From points `(k, D)` to values `(k,)`, differentiable.
        start: Where to begin, shape `(k, D)`.
        steps: Steps of the ascent.

    Returns:
        Points `(k, D)`; one that ran off, on a ridge or to an edge, may be lower than its start.
    """
    points = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([points], lr=0.02)
    for _ in range(steps):
        value = log_density(points).sum()
        points.grad = -torch.autograd.grad(value, points)[0]
        optimiser.step()
    return points.detach()
