r"""Affine maps that bring the outputs of cheap levels closer to the finest one.

Any fixed map of a level's output defines another valid lower level: as long as both halves that contain the level are
mapped alike, the sum still telescopes to the finest level. A map that follows the fine output raises the correlation
within pairs, and spares the network from telling the levels apart. The maps here are fitted on the training pairs that
they then map, which biases the correction by a term that falls with the number of pairs.

A feature is left as it is unless its map brings most pairs closer, not a few far ones: where levels agree but for their
tails, a map that follows the tails would part the bulk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlsbi.training.objective import Term

__all__ = ["align_terms", "fit_affine"]

_PRIOR_PAIRS = 4.0
_GAIN = 0.9  # of the mean absolute difference of pairs: a map is used where it leaves less


def fit_affine(
    coarse: Tensor, fine: Tensor, spread: Tensor, shared: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    r"""Slope and shift per feature that predict the fine output from the coarse one.

    The slope is drawn towards 1 as if `_PRIOR_PAIRS` further pairs of the level's usual spread had slope 1.

    Args:
        coarse: Coarse outputs, shape `(n, ...)`.
        fine: Fine outputs of the same rows, same shape.
        spread: Variance of the coarse level's outputs, shape `(...)`, of length 1 along shared axes.
        shared: Axes of a row along which features have one slope and shift.

    Returns:
        Slope and shift, of the shape of `spread`.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 200)[:, None]
        >>> slope, shift = fit_affine(x, 2 * x + 3, x.var(0))
        >>> slope.round(decimals=1), shift.round(decimals=1)
        (tensor([2.]), tensor([3.]))
    """
    axes = _with_rows(shared)
    centre_c, centre_f = coarse.mean(axes, keepdim=True), fine.mean(axes, keepdim=True)
    c, f = coarse - centre_c, fine - centre_f
    prior = _PRIOR_PAIRS * spread
    below = (c * c).sum(axes, keepdim=True)[0] + prior
    slope = ((c * f).sum(axes, keepdim=True)[0] + prior) / below.where(below > 0, 1.0)
    slope = slope.where(below > 0, 1.0)
    return slope, centre_f[0] - slope * centre_c[0]


def align_terms(
    train: Sequence[Term], held_out: Sequence[Term], *, shared: tuple[int, ...] = ()
) -> tuple[list[Term], list[Term]]:
    r"""Maps every level's outputs towards the finest level, by pairs of the training rows.

    Args:
        train: Rows of each term, on which the maps are fitted.
        held_out: Rows mapped alike, never fitted on; may be empty.
        shared: Axes of an output along which the map is one and the same.

    Returns:
        The terms with mapped outputs; the finest level's own are unchanged.

    Raises:
        ValueError: If a term above the first has no coarse halves.
    """
    aligned = [list(train), list(held_out)]
    for level in range(len(train) - 1, 0, -1):
        # Fine outputs of this level are in the finest level's place already.
        (fine, _), (_, coarse), (own, _) = aligned[0][level].outputs, train[level].outputs, train[level - 1].outputs
        if coarse is None:
            raise ValueError(f"Expected pairs at level {level}; its coarse outputs are missing.")
        slope, shift = fit_affine(coarse, fine, own.var(_with_rows(shared), correction=0, keepdim=True)[0], shared)
        before, after = ((fine - given).abs().mean(_with_rows(shared), keepdim=True)[0]
                         for given in (coarse, torch.addcmul(shift, slope, coarse)))
        slope, shift = slope.where(after < _GAIN * before, 1.0), shift.where(after < _GAIN * before, 0.0)
        for terms in aligned:
            if terms:
                fine, coarse = terms[level].outputs
                mapped = None if coarse is None else torch.addcmul(shift, slope, coarse)
                terms[level] = terms[level].with_outputs(fine, mapped)
                fine, coarse = terms[level - 1].outputs
                terms[level - 1] = terms[level - 1].with_outputs(torch.addcmul(shift, slope, fine), coarse)
    return aligned[0], aligned[1]


def _with_rows(shared: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *(axis + 1 for axis in shared))
