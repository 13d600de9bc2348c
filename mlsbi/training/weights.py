r"""Weights of the telescoping sum: fixed, or estimated from earlier steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mlsbi.training.alignment import fit_affine

__all__ = ["LaggedWeights", "solve_weights"]


def solve_weights(
    n: Sequence[float], fine: ArrayLike, coarse: ArrayLike, covariance: ArrayLike
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    r"""Weights a_0 .. a_L that minimise the telescoping estimator's variance, a_L = 1.

    .. math:: -\frac{c_l}{n_l} a_{l-1} + \left(\frac{V^f_l}{n_l} + \frac{V^c_{l+1}}{n_{l+1}}\right) a_l
              - \frac{c_{l+1}}{n_{l+1}} a_{l+1} = 0

    Args:
        n: Rows of each term, shape `(L + 1,)`.
        fine: Variance of f^l over term l's rows, shape `(L + 1,)`.
        coarse: Variance of f^{l-1} over term l's rows, shape `(L + 1,)`, entry 0 unused.
        covariance: Covariance of f^l and f^{l-1} over term l's rows, shape `(L + 1,)`, entry 0 unused.

    Example:
        >>> solve_weights([1000, 10], fine=[1.0, 1.0], coarse=[0.0, 1.0], covariance=[0.0, 0.5]).round(3)
        array([0.495, 1.   ])
    """
    top = len(n) - 1
    weights = np.ones(top + 1)
    if top == 0:
        return weights
    g = 1.0 / np.asarray(n, dtype=np.float64)
    v_fine, v_coarse = np.asarray(fine, dtype=np.float64), np.asarray(coarse, dtype=np.float64)
    coupling = g * np.asarray(covariance, dtype=np.float64)
    diagonal = g[:-1] * v_fine[:-1] + g[1:] * v_coarse[1:]
    matrix = np.diag(diagonal) - np.diag(coupling[1:top], 1) - np.diag(coupling[1:top], -1)
    right = np.zeros(top)
    right[-1] = coupling[top]
    # Levels without any variance leave their weight free: least squares then takes the smallest.
    weights[:top] = np.linalg.lstsq(matrix, right, rcond=None)[0]
    return weights


class LaggedWeights:
    r"""Weights estimated from losses seen before: smoothed moments of rows that the network was not trained on.

    The moments of training rows would not do: the finer the network fits the few fine halves, the less these go with
    their coarse twins, until the cheap levels are left out altogether. A level's variance is pooled over all rows that
    have its output; the slope of fine on coarse losses is drawn towards 1, the published objective, by `fit_affine`.

    Args:
        n: Rows trained on in each term, shape `(L + 1,)`.
        smoothing: Share of the old moments kept at each update.
    """

    def __init__(self, n: Sequence[int], *, smoothing: float = 0.8) -> None:
        self.n = tuple(n)
        self.smoothing = smoothing
        self.current = (1.0,) * len(n)
        self._moments: Tensor | None = None

    def update(self, halves: Sequence[Tensor]) -> None:
        """Takes in row losses, in the order of `telescope`; the new weights hold from the next use on."""
        if len(self.n) == 1:
            return
        losses = [half.detach().double().cpu() for half in halves]
        if not all(bool(torch.isfinite(loss).all()) for loss in losses):
            return  # such a step is recorded and ends the training; it tells nothing of the weights
        fine, coarse = [losses[0], *losses[1::2]], losses[2::2]  # coarse[l] are rows of level l, as fine[l]
        variances, slopes = [], []
        for level, twin in enumerate(coarse):
            variances.append(_pooled_variance(fine[level], twin))
            slopes.append(fit_affine(twin, fine[level + 1], variances[-1])[0])
        moments = torch.stack([torch.stack(variances), torch.stack(slopes)])
        keep = self.smoothing if self._moments is not None else 0.0
        self._moments = moments if self._moments is None else keep * self._moments + (1 - keep) * moments
        variance, slope = self._moments.numpy()
        below = np.concatenate([[0.0], variance])
        # The finest level's own variance does not enter.
        solved = solve_weights(self.n, np.append(variance, 0.0), below, np.concatenate([[0.0], slope * variance]))
        # Beyond [0, 1] a weight follows noise of few pairs: levels that agree give 1, unrelated ones 0.
        self.current = tuple(float(a) for a in np.clip(solved, 0.0, 1.0))


def _pooled_variance(*groups: Tensor) -> Tensor:
    """Variance of all rows together, each group about its own mean; 0 where no group has two rows."""
    freedom = sum(len(group) - 1 for group in groups)
    return torch.stack([((group - group.mean()) ** 2).sum() for group in groups]).sum() / max(freedom, 1)
