r"""Whether stated probabilities come true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from mlsbi.diagnostics.arrays import Array, as_finite

__all__ = ["CalibrationError", "calibration_error", "coverage", "folded_uniformity", "hpd_levels", "rank_uniformity",
           "sbc_ranks", "uniformity"]


@dataclass(frozen=True)
class CalibrationError:
    """How far levels are from uniform, beside what chance alone gives.

    Args:
        value: The error; a calibrated posterior does not score 0.
        null: Its mean where levels are uniform.
        null_sd: Its standard deviation there.
        bins: Bins of the levels.
    """

    value: float
    null: float
    null_sd: float
    bins: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.null:.3f} +- {self.null_sd:.3f} if calibrated, {self.bins} bins)"


def hpd_levels(log_prob_true: ArrayLike, log_prob_samples: ArrayLike) -> np.ndarray[Any, Any]:
    r"""Mass of the smallest highest-density region that holds the true parameters, per observation.

    It is uniform on (0, 1) where the posterior is calibrated.

    Args:
        log_prob_true: log q(theta_i | x_i), shape `(B,)`.
        log_prob_samples: log q at n posterior draws of each observation, shape `(n, B)`.

    Example:
        >>> hpd_levels([-1.0], [[-0.5], [-0.2], [-3.0]])
        array([0.625])
    """
    true, drawn = np.asarray(log_prob_true, dtype=np.float64), np.asarray(log_prob_samples, dtype=np.float64)
    if true.ndim != 1 or drawn.ndim != 2 or drawn.shape[1] != len(true):
        raise ValueError(f"Expected shapes (B,) and (n, B); got {true.shape} and {drawn.shape}.")
    return ((drawn > true).sum(0) + 0.5) / (len(drawn) + 1)


def coverage(levels: ArrayLike, credibility: ArrayLike) -> np.ndarray[Any, Any]:
    """Share of observations whose true parameters lie in the region of each credibility, shape of `credibility`.

    Example:
        >>> coverage([0.1, 0.4, 0.7, 0.95], [0.5, 0.9])
        array([0.5 , 0.75])
    """
    found = np.asarray(levels, dtype=np.float64)
    return (found[:, None] <= np.atleast_1d(np.asarray(credibility, dtype=np.float64))).mean(0)


def sbc_ranks(theta: ArrayLike, samples: ArrayLike) -> np.ndarray[Any, Any]:
    r"""Ranks of the true parameters among posterior draws, 0 .. n, uniform where the posterior is calibrated.

    Args:
        theta: True parameters, shape `(B, D)`.
        samples: Posterior draws, shape `(n, B, D)`.

    Returns:
        Ranks, shape `(B, D)`.

    References:
        | Validating Bayesian inference algorithms with simulation-based calibration (Talts et al., 2018)
        | https://arxiv.org/abs/1804.06788
    """
    true, drawn = np.asarray(theta), np.asarray(samples)
    if true.ndim != 2 or drawn.ndim != 3 or drawn.shape[1:] != true.shape:
        raise ValueError(f"Expected shapes (B, D) and (n, B, D); got {true.shape} and {drawn.shape}.")
    return (drawn < true).sum(0)


def uniformity(values: ArrayLike) -> float:
    """Kolmogorov-Smirnov p-value of values in (0, 1) being uniform; small means they are not.

    Example:
        >>> uniformity(np.linspace(0.01, 0.99, 99)) > 0.9, uniformity(np.linspace(0.3, 0.6, 99)) < 1e-6
        (True, True)
    """
    return float(stats.kstest(np.asarray(values, dtype=np.float64), "uniform").pvalue)


def folded_uniformity(values: ArrayLike) -> float:
    r"""P-value of values in (0, 1) being uniform that sees both a shift and a width.

    Two Kolmogorov-Smirnov tests, of the values u and of :math:`|2 u - 1|`, combined as Bonferroni does:
    :math:`\min(1, 2 \min(p, p'))`. Ranks under a posterior too narrow pile up at both ends, which moves the
    distribution function little and that of the folded values twice as much.

    Args:
        values: Values such as `tarp_levels` or `(sbc_ranks + 0.5) / (n + 1)`, shape `(B,)`.

    Raises:
        ValueError: If there are none, or they are not finite or outside [0, 1].

    Example:
        >>> ends = np.concatenate([np.linspace(0.0, 0.35, 50), np.linspace(0.65, 1.0, 50)])
        >>> uniformity(ends) > 0.01, folded_uniformity(ends) < 0.0001
        (True, True)
    """
    u = _unit(values, "values")
    return min(1.0, 2 * min(uniformity(u), uniformity(np.abs(2 * u - 1))))


def rank_uniformity(ranks: ArrayLike, n: int) -> np.ndarray[Any, Any]:
    r"""P-values of each parameter's ranks being uniform, by `folded_uniformity` of (rank + 1/2) / (n + 1).

    Each parameter has its own; of D of them, the smallest is below 0.05 / D in at most 5% of calibrated cases.
    At 5% it finds 0.7 and 1.4 times the true width of Gaussian posteriors in over 99% of cases with B = 200, where
    `uniformity` of the ranks finds 88% and 85%.

    The test takes ranks to be continuous. That needs n of at least some :math:`10 \sqrt B`; with a third of it,
    n = 100 at B = 1000, 12% of calibrated cases are below 0.05.

    Args:
        ranks: Ranks of the true parameters among n posterior draws, from `sbc_ranks`, shape `(B, D)`.
        n: Posterior draws per observation.

    Returns:
        P-values, shape `(D,)`.

    Raises:
        ValueError: If ranks are not whole numbers from 0 to n.

    References:
        | Validating Bayesian inference algorithms with simulation-based calibration (Talts et al., 2018)
        | https://arxiv.org/abs/1804.06788

    Example:
        >>> even = np.arange(100)
        >>> narrow = np.where(even < 50, even // 2, 99 - even // 2)
        >>> rank_uniformity(np.stack([even, narrow], 1), n=99) < 0.01
        array([False,  True])
    """
    found = as_finite(ranks, "ranks", ("B", "D"))
    if n < 1 or (found != np.round(found)).any() or found.min() < 0 or found.max() > n:
        raise ValueError(f"Expected ranks that are whole numbers from 0 to n={n}; got {found.min():g} to "
                         f"{found.max():g}.")
    return np.array([folded_uniformity(column) for column in ((found + 0.5) / (n + 1)).T])


def calibration_error(levels: ArrayLike, *, bins: int = 10) -> CalibrationError:
    r"""Squared distance of the histogram of levels from a flat one.

    .. math:: C = \frac{1}{K} \sum_{i=1}^{K} (K p_i - 1)^2

    over K equal bins of [0, 1], with :math:`p_i` the share of the B levels in bin i. B C is Pearson's statistic, so
    where levels are uniform C has mean :math:`(K - 1) / B` and variance :math:`2 (K - 1)(B - 1) / B^3`, exactly.
    With levels made of n posterior draws this needs n + 1 to be a multiple of K, or n to be large.

    Args:
        levels: Levels such as `hpd_levels` or `tarp_levels`, shape `(B,)`.
        bins: Number of bins K, at least 2.

    Returns:
        The error with its mean and standard deviation under calibration.

    Raises:
        ValueError: If there are no levels, or they are not finite or outside [0, 1], or `bins` is below 2.

    Example:
        >>> print(calibration_error(np.linspace(0.005, 0.995, 100)))  # flatter than chance
        0.000 (0.090 +- 0.042 if calibrated, 10 bins)
    """
    found = _unit(levels, "levels")
    if bins < 2:
        raise ValueError(f"Expected at least 2 bins; got {bins}.")
    n = len(found)
    share = np.bincount(np.minimum(found * bins, bins - 1).astype(int), minlength=bins) / n
    value = float(((bins * share - 1) ** 2).mean())
    return CalibrationError(value, (bins - 1) / n, float(np.sqrt(2 * (bins - 1) * (n - 1) / n**3)), bins)


def _unit(values: ArrayLike, name: str) -> Array:
    array = as_finite(values, name, ("B",))
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"Expected {name} from 0 to 1; got {array.min():g} to {array.max():g}.")
    return array
