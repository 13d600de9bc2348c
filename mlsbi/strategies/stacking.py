r"""Weights of a mixture of densities that maximise its score on rows of the finest level which none of them has seen.

.. math:: \max_w \; \frac1n \sum_i \log \sum_c w_c q_c(i), \qquad w_c \ge 0, \; \sum_c w_c = 1

Where rows of the finest level are few, their mean is corrected by the control variate that the levels offer: the
mixture's score on the pairs' coarse halves, whose mean over many rows of the cheap level is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

__all__ = ["PSEUDO_ROWS", "Scores", "Stacking", "stack_densities"]

PSEUDO_ROWS = 0.25
"""Held-out rows that count for every candidate from the start."""

_FEW_PAIRS = 50  # below, the control variate is used
_PRIOR_PAIRS = 4.0  # pairs without correlation that the control variate's factor is drawn towards
_NEGLIGIBLE = 0.05  # weights below are 0: an ensemble is evaluated as often as it has parts


@dataclass(frozen=True)
class Scores:
    r"""Log densities of C candidates at held-out rows; larger is better.

    Args:
        fine: At rows of the finest level, shape `(C, n)`.
        coarse: At the coarse halves of the same rows, shape `(C, n)`; `None` where there are none.
        low: At other rows of the level below, shape `(C, m)`; `None` where there are none.
        most: Different rows that there are at most; where members hold out some of them twice, they count once.
    """

    fine: Tensor
    coarse: Tensor | None = None
    low: Tensor | None = None
    most: int | None = None

    @property
    def rows(self) -> int:
        """Different rows of the finest level."""
        return self.fine.shape[1] if self.most is None else min(self.fine.shape[1], self.most)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """All rows of several, which have the same candidates and draw on the same rows."""
        found = {}
        for name in ("coarse", "low"):
            own = [getattr(part, name) for part in parts]
            found[name] = None if any(one is None for one in own) else torch.cat(own, 1)
        return cls(torch.cat([part.fine for part in parts], 1), **found, most=parts[0].most)


@dataclass(frozen=True)
class Stacking:
    r"""Weights of a mixture, and what they rest on.

    Args:
        weights: One per candidate, 0 where it adds nothing.
        score: Mean log density of the mixture over the held-out rows.
        scores: Of each candidate alone.
        standard_errors: Of these.
        rows: Different held-out rows of the finest level.
        factor: Factor of the control variate; 0 where none was used.
        lost: Scored rows at which no candidate has a finite density, which are left out.
    """

    weights: tuple[float, ...]
    score: float
    scores: tuple[float, ...]
    standard_errors: tuple[float, ...]
    rows: int
    factor: float = 0.0
    lost: int = 0


def stack_densities(scores: Scores, pseudo_rows: Sequence[float] | None = None) -> Stacking:
    r"""Finds the mixture weights.

    On top of the held-out rows it counts pseudo rows :math:`r_c` of each candidate, which add :math:`r_c \log w_c`:
    where rows are few, weights stay near :math:`r_c / \sum r_c`.

    Args:
        scores: Held-out log densities. Candidates with a score that is not a number, or minus infinity at every row,
            get no weight; rows at which none has a finite score are left out
            and counted.
        pseudo_rows: One number per candidate; a quarter of a row each when left out.

    Raises:
        ValueError: If no candidate can be used.

    References:
        | Using stacking to average Bayesian predictive distributions (Yao et al., 2018)
        | https://doi.org/10.1214/17-BA1091

    Example:
        >>> good, bad = torch.zeros(200), torch.full((200,), -3.0)
        >>> stack_densities(Scores(torch.stack([good, bad]))).weights
        (1.0, 0.0)
    """
    fine = scores.fine.double().cpu()
    usable = (~fine.isnan()).all(1) & fine.isfinite().any(1)
    if not bool(usable.any()):
        raise ValueError("Expected a candidate with a finite score at some held-out row; none has one.")
    index = usable.nonzero()[:, 0]
    count = len(index)
    told = fine[index].isfinite().any(0)
    found = fine[index][:, told]
    coarse = None if scores.coarse is None else scores.coarse.double().cpu()[index][:, told]
    low = None if scores.low is None else scores.low.double().cpu()[index]
    pseudo = torch.as_tensor(pseudo_rows or [PSEUDO_ROWS] * len(fine), dtype=torch.float64)[index]
    first = pseudo / pseudo.sum()
    factor = 0.0
    if coarse is not None and low is not None and scores.rows < _FEW_PAIRS:
        factor = _factor(_mix(first, found), _mix(first, coarse), _mix(first, low))

    def loss(logits: np.ndarray) -> tuple[float, np.ndarray]:
        free = torch.tensor(logits, requires_grad=True)
        weights = free.softmax(0)
        value = _mix(weights, found).mean() + (pseudo * free.log_softmax(0)).sum() / scores.rows
        if factor and coarse is not None and low is not None:
            value = value - factor * (_mix(weights, coarse).mean() - _mix(weights, low).mean())
        gradient, = torch.autograd.grad(-value, free)
        return -value.item(), gradient.numpy()

    weights = first
    if count > 1:
        weights = torch.tensor(minimize(loss, first.log().numpy(), jac=True, method="L-BFGS-B").x).softmax(0)
        weights = torch.where(weights < min(_NEGLIGIBLE, float(weights.max())), 0.0, weights)
        weights = weights / weights.sum()
    whole = torch.zeros(len(fine), dtype=torch.float64)
    whole[index] = weights
    errors = fine.std(1) / math.sqrt(scores.rows) if fine.shape[1] > 1 else torch.full((len(fine),), math.nan)
    return Stacking(tuple(whole.tolist()), _mix(weights, found).mean().item(), tuple(fine.mean(1).tolist()),
                    tuple(errors.tolist()), scores.rows, factor, int((~told).sum()))


def _mix(weights: Tensor, log_densities: Tensor) -> Tensor:
    """Log density of the mixture, shape `(n,)`."""
    return (log_densities + weights.log()[:, None]).logsumexp(0)


def _factor(fine: Tensor, coarse: Tensor, low: Tensor) -> float:
    """Factor of the control variate, between 0 and 1, drawn towards 0; 0 where a score is not finite."""
    if len(fine) < 2 or not all(bool(part.isfinite().all()) for part in (fine, coarse, low)):
        return 0.0
    c, f = coarse - coarse.mean(), fine - fine.mean()
    below = (c * c).sum() + _PRIOR_PAIRS * low.var(correction=0)
    if not bool(below > 0):
        return 0.0
    slope = (c * f).sum() / below / (1 + len(coarse) / len(low))  # the mean over `low` has an error too
    return float(slope.clamp(0.0, 1.0))
