r"""Weights of the telescoping sum: fixed, or estimated from earlier steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

__all__ = ["LaggedWeights", "solve_weights"]


def solve_weights(
    n: Sequence[float], fine: Sequence[float], coarse: Sequence[float], covariance: Sequence[float]
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
    r"""Estimated weights that never see the rows they multiply: moments of earlier steps, smoothed.

    Args:
        n: Rows of each term, shape `(L + 1,)`.
        smoothing: Share of the old moments kept at each step.
    """

    def __init__(self, n: Sequence[int], *, smoothing: float = 0.95) -> None:
        self.n = tuple(n)
        self.smoothing = smoothing
        self.current = (*([0.0] * (len(n) - 1)), 1.0)
        self._moments: np.ndarray[tuple[int, int], np.dtype[np.float64]] | None = None

    def update(self, halves: Sequence[Tensor]) -> None:
        """Takes in the row losses of a step, in the order of `telescope`; its weights hold from the next step on."""
        moments = np.zeros((3, len(self.n)))
        for level in range(len(self.n)):
            f = halves[max(2 * level - 1, 0)].detach().double().cpu().numpy()
            moments[0, level] = f.var(ddof=1)
            if level:
                c = halves[2 * level].detach().double().cpu().numpy()
                moments[1, level] = c.var(ddof=1)
                moments[2, level] = np.cov(f, c)[0, 1]
        keep = self.smoothing if self._moments is not None else 0.0
        self._moments = moments if self._moments is None else keep * self._moments + (1 - keep) * moments
        solved = solve_weights(self.n, *self._moments)
        # A weight outside [0, 1] only follows noise of few pairs: levels that agree give 1, unrelated ones 0.
        self.current = tuple(float(a) for a in np.clip(solved, 0.0, 1.0))
