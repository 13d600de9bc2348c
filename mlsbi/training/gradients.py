r"""Adjustments of the multilevel gradient: rescaling and projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Combined", "combine_gradients", "project", "rescale"]


def rescale(coarse: Tensor, fine: Tensor) -> Tensor:
    """The coarse gradient with the length of the fine one; unchanged where it is zero.

    Example:
        >>> rescale(torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0]))
        tensor([0., 2.])
    """
    length = coarse.norm()
    return coarse * torch.where(length > 0, fine.norm() / length.clamp_min(torch.finfo(coarse.dtype).tiny), 1.0)


def project(base: Tensor, correction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Removes from each of two conflicting vectors its part along the other (gradient surgery).

    Returns:
        Both vectors, unchanged unless their inner product is negative, and whether it was, a boolean scalar.

    Example:
        >>> project(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]))
        (tensor([0.5000, 0.5000]), tensor([0., 1.]), tensor(True))
    """
    inner = base @ correction
    conflict = inner < 0
    onto = torch.where(conflict, inner, 0.0)
    tiny = torch.finfo(base.dtype).tiny
    along_correction = onto / (correction @ correction).clamp_min(tiny) * correction
    along_base = onto / (base @ base).clamp_min(tiny) * base
    return base - along_correction, correction - along_base, conflict


@dataclass(frozen=True)
class Combined:
    """A step's gradient and what is recorded of it; all tensors on the device."""

    gradient: Tensor
    base_norm: Tensor
    correction_norm: Tensor
    cosine: Tensor
    projected: Tensor


def combine_gradients(
    halves: Sequence[Tensor],
    weights: Sequence[float],
    *,
    use_rescale: bool,
    use_project: bool,
) -> Combined:
    r"""Joins the gradients of all halves into one step, Algorithm 1 of the multilevel paper.

    Args:
        halves: Flat gradients of the mean loss of fine 0, fine 1, coarse 1, ...
        weights: a_0 .. a_L of the telescoping sum. Rescaling comes before weighting, which it would cancel.
        use_rescale: Whether each coarse gradient gets the length of its fine twin.
        use_project: Whether level 0's gradient and the correction are projected when they conflict. A step so
            adjusted is no longer an unbiased estimate of the gradient.

    References:
        | Multilevel neural simulation-based inference (Hikida et al., 2025), Algorithm 1
        | https://arxiv.org/abs/2506.06087
    """
    base = weights[0] * halves[0]
    correction = torch.zeros_like(base)
    for level in range(1, len(weights)):
        fine, coarse = halves[2 * level - 1], halves[2 * level]
        if use_rescale:
            coarse = rescale(coarse, fine)
        correction = correction + weights[level] * fine - weights[level - 1] * coarse
    norms = base.norm(), correction.norm()
    cosine = base @ correction / (norms[0] * norms[1]).clamp_min(torch.finfo(base.dtype).tiny)
    if use_project:
        base, correction, projected = project(base, correction)
    else:
        projected = torch.zeros((), dtype=torch.bool, device=base.device)
    return Combined(base + correction, norms[0], norms[1], cosine, projected)
