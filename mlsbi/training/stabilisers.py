r"""What keeps the multilevel descent stable: adjustments of gradients, of the loss and of the weights.

With few pairs the negated coarse term is unbounded below, which plain descent may run after. Each function here takes
vectors along the last axis and any axes before it, so that members of an ensemble are adjusted one by one. Weight
decay is the optimiser's, see `TrainingOptions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Adjusted", "adjust", "averaged_share", "clip_correction", "clip_norm", "difference_penalty", "project", "rescale",
]  # fmt: skip


def rescale(coarse: Tensor, fine: Tensor) -> Tensor:
    """The coarse gradient with the length of the fine one; unchanged where it is zero.

    Example:
        >>> rescale(torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0]))
        tensor([0., 2.])
    """
    length = _norm(coarse)
    return coarse * torch.where(length > 0, _norm(fine) / length.clamp_min(_tiny(coarse)), 1.0)


def project(base: Tensor, correction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Removes from each of two conflicting vectors its part along the other (gradient surgery).

    Returns:
        Both vectors, unchanged unless their inner product is negative, and whether it was.

    Example:
        >>> project(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]))
        (tensor([0.5000, 0.5000]), tensor([0., 1.]), tensor(True))
    """
    inner = (base * correction).sum(-1, keepdim=True)
    onto = inner.clamp(max=0.0)
    along_correction = onto / _norm(correction).square().clamp_min(_tiny(base)) * correction
    along_base = onto / _norm(base).square().clamp_min(_tiny(base)) * base
    return base - along_correction, correction - along_base, inner[..., 0] < 0


def clip_correction(base: Tensor, correction: Tensor, limit: float) -> Tensor:
    """The correction, shortened to `limit` times the length of level 0's gradient where it is longer.

    Example:
        >>> clip_correction(torch.tensor([0.0, 2.0]), torch.tensor([8.0, 0.0]), 0.5)
        tensor([1., 0.])
    """
    share = (limit * _norm(base) / _norm(correction).clamp_min(_tiny(base))).clamp(max=1.0)
    return correction * torch.where(_norm(base) > 0, share, 1.0)  # a level 0 of weight 0 says nothing of lengths


def clip_norm(gradient: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The gradient, shortened to `limit` where it is longer, and its length before."""
    length = _norm(gradient)
    return gradient * (limit / (length + 1e-6)).clamp(max=1.0), length[..., 0]


def difference_penalty(halves: Sequence[Tensor], weights: Tensor, n: Sequence[int]) -> Tensor:
    r"""Standard errors of the correction terms, summed: what the loss may seem to gain by the pairs' chance alone.

    .. math:: \sum_{l \ge 1} \sqrt{\operatorname{Var}(a_l f^l - a_{l-1} f^{l-1}) / n_l}

    Added to the loss it keeps the differences of few pairs small. It does not vanish at the optimum, and biases the
    minimum by a term that falls as :math:`n_l^{-1/2}`.

    Args:
        halves: Row losses of fine 0, fine 1, coarse 1, ..., each `(..., rows)`.
        weights: a_0 .. a_L, shape `(..., L + 1)`.
        n: Rows of each term in all, of which a step may see a part.

    Returns:
        The penalty, shape `(...)`.

    References:
        | Empirical Bernstein bounds and sample variance penalization (Maurer, Pontil, 2009)
        | https://arxiv.org/abs/0907.3740
    """
    total = halves[0].new_zeros(halves[0].shape[:-1])
    for level in range(1, len(n)):
        a, b = weights[..., level, None], weights[..., level - 1, None]
        variance = (a * halves[2 * level - 1] - b * halves[2 * level]).var(-1, correction=0)
        # The root has no slope at zero, which equal levels would reach.
        total = total + (variance / n[level] + torch.finfo(variance.dtype).tiny ** 0.5).sqrt()
    return total


def averaged_share(decay: float, step: int) -> float:
    """Share of the new weights in their running average after a step, 1 and more; the first steps count more.

    Example:
        >>> averaged_share(0.99, 1), averaged_share(0.99, 10_000)
        (0.9090909090909091, 0.010000000000000009)
    """
    return 1 - min(decay, step / (step + 10.0))


@dataclass(frozen=True)
class Adjusted:
    """A step's gradient `(..., P)` and what is recorded of it `(...)`; all tensors on the device."""

    gradient: Tensor
    base_norm: Tensor
    correction_norm: Tensor
    cosine: Tensor
    projected: Tensor


def adjust(
    halves: Sequence[Tensor],
    weights: Tensor,
    *,
    use_rescale: bool,
    use_project: bool,
    correction_limit: float | None = None,
) -> Adjusted:
    r"""Joins the gradients of all halves into one step, Algorithm 1 of the multilevel paper.

    A step so adjusted is no longer an unbiased estimate of the gradient.

    Args:
        halves: Flat gradients `(..., P)` of the mean loss of fine 0, fine 1, coarse 1, ...
        weights: a_0 .. a_L of the telescoping sum, shape `(..., L + 1)`. Rescaling comes before weighting, which it
            would cancel.
        use_rescale: Whether each coarse gradient gets the length of its fine twin.
        use_project: Whether level 0's gradient and the correction are projected when they conflict.
        correction_limit: See `clip_correction`, which comes before projecting.

    References:
        | Multilevel neural simulation-based inference (Hikida et al., 2025), Algorithm 1
        | https://arxiv.org/abs/2506.06087
    """
    base = weights[..., :1] * halves[0]
    correction = torch.zeros_like(base)
    for level in range(1, weights.shape[-1]):
        fine, coarse = halves[2 * level - 1], halves[2 * level]
        if use_rescale:
            coarse = rescale(coarse, fine)
        correction = correction + weights[..., level, None] * fine - weights[..., level - 1, None] * coarse
    lengths = _norm(base)[..., 0], _norm(correction)[..., 0]
    cosine = (base * correction).sum(-1) / (lengths[0] * lengths[1]).clamp_min(_tiny(base))
    if correction_limit is not None:
        correction = clip_correction(base, correction, correction_limit)
    if use_project:
        base, correction, projected = project(base, correction)
    else:
        projected = torch.zeros_like(cosine, dtype=torch.bool)
    return Adjusted(base + correction, *lengths, cosine, projected)


def _norm(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)


def _tiny(vectors: Tensor) -> float:
    return torch.finfo(vectors.dtype).tiny
