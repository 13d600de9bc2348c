r"""Whether stated probabilities come true."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

__all__ = ["coverage", "hpd_levels", "sbc_ranks", "uniformity"]


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
