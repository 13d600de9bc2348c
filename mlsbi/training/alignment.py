r"""Affine maps that bring the outputs of cheap levels closer to the finest one.

Any fixed map of a level's output defines another valid lower level: as long as both halves that contain the level are
mapped alike, the sum still telescopes to the finest level. A map that follows the fine output raises the correlation
within pairs, and spares the network from telling the levels apart. The maps here are fitted on the training pairs that
they then map, which biases the correction by a term that falls with the number of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mlsbi.training.objective import Term

__all__ = ["align_terms", "fit_affine"]

_PRIOR_PAIRS = 4.0


def fit_affine(coarse: Tensor, fine: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    r"""Slope and shift per feature that predict the fine output from the coarse one.

    The slope is drawn towards 1 as if `_PRIOR_PAIRS` further pairs of the level's usual spread had slope 1.

    Args:
        coarse: Coarse outputs, shape `(n, ...)`.
        fine: Fine outputs of the same rows, same shape.
        spread: Variance of the coarse level's outputs, shape `(...)`.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 200)[:, None]
        >>> slope, shift = fit_affine(x, 2 * x + 3, x.var(0))
        >>> slope.round(decimals=1), shift.round(decimals=1)
        (tensor([2.]), tensor([3.]))
    """
    centre_c, centre_f = coarse.mean(0), fine.mean(0)
    c, f = coarse - centre_c, fine - centre_f
    prior = _PRIOR_PAIRS * spread
    below = (c * c).sum(0) + prior
    slope = ((c * f).sum(0) + prior) / below.where(below > 0, 1.0)
    slope = slope.where(below > 0, 1.0)
    return slope, centre_f - slope * centre_c


def align_terms(train: Sequence[Term], held_out: Sequence[Term]) -> tuple[list[Term], list[Term]]:
    r"""Maps every level's outputs towards the finest level, by pairs of the training rows.

    Args:
        train: Rows of each term, on which the maps are fitted.
        held_out: Rows mapped alike, never fitted on; may be empty.

    Returns:
        The terms with mapped outputs; the finest level's own are unchanged.
    """
    aligned = [list(train), list(held_out)]
    for level in range(len(train) - 1, 0, -1):
        # Fine outputs of this level are in the finest level's place already.
        fine, coarse = aligned[0][level].fine, train[level].coarse
        if coarse is None:
            raise ValueError(f"Expected pairs at level {level}; its coarse outputs are missing.")
        own = train[level - 1].fine
        slope, shift = fit_affine(coarse, fine, own.var(0, correction=0))
        for terms in aligned:
            if terms:
                upper, lower = terms[level], terms[level - 1]
                mapped = None if upper.coarse is None else torch.addcmul(shift, slope, upper.coarse)
                terms[level] = replace(upper, coarse=mapped)
                terms[level - 1] = replace(lower, fine=torch.addcmul(shift, slope, lower.fine))
    return aligned[0], aligned[1]
