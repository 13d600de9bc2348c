r"""Scores of a posterior on held-out pairs of parameters and observations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mlsbi.diagnostics.arrays import as_finite, as_pairs, as_per_parameter

__all__ = ["Score", "fom", "kld", "mse", "nlpd", "nrmse"]


@dataclass(frozen=True)
class Score:
    """Summary of one number per test observation.

    Args:
        mean: Mean over observations.
        median: Median over observations.
        standard_error: Standard error of the mean.
        n: Observations.
    """

    mean: float
    median: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} +- {self.standard_error:.3f} (median {self.median:.3f}, n = {self.n})"


def nlpd(log_prob: ArrayLike) -> Score:
    r"""Negative log posterior density at the true parameters, natural logarithm.

    Args:
        log_prob: log q(theta_i | x_i) of test pairs, shape `(B,)`. `-inf` gives an infinite mean, as it should.

    Example:
        >>> nlpd([-1.0, -3.0]).mean
        2.0
    """
    return _score(-_vector(log_prob, "log_prob"))


def kld(log_p: ArrayLike, log_q: ArrayLike) -> Score:
    r"""Kullback-Leibler divergence of a posterior from the exact one.

    .. math:: KL_i = E_{\theta \sim p(\theta | x_i)} [\log p(\theta | x_i) - \log q(\theta | x_i)]

    Args:
        log_p: Exact log density at draws from the exact posterior, shape `(n, B)`.
        log_q: Log density of the posterior under test at the same draws, shape `(n, B)`.

    Returns:
        The divergences of the B observations, averaged; nothing is normalised across observations.

    Raises:
        ValueError: If the shapes differ.
    """
    p, q = np.asarray(log_p, dtype=np.float64), np.asarray(log_q, dtype=np.float64)
    if p.ndim != 2 or p.shape != q.shape:
        raise ValueError(f"Expected log_p and log_q of one shape (n, B); got {p.shape} and {q.shape}.")
    return _score((p - q).mean(0))


def fom(samples: ArrayLike, low: ArrayLike, high: ArrayLike) -> Score:
    r"""Figure of merit: how narrow a posterior is.

    .. math:: FoM_i = \det(\mathrm{Cov}[\theta | x_i])^{-1 / D}

    with parameters scaled so that [low, high] is the unit box, and the covariance of n draws (divided by n - 1),
    which makes it too large by about a share (D + 1) / (2 n) + 1 / (n D). It says nothing of being right: a posterior
    too narrow scores high. Cosmologists often write the power -1/2.

    Args:
        samples: Posterior draws, shape `(n, B, D)`, n above D.
        low: Lower edges of the prior's box, shape `(D,)`.
        high: Upper edges, shape `(D,)`.

    Returns:
        Figures of the B observations, averaged.

    Raises:
        ValueError: If shapes do not fit, something is not finite, there are too few draws, low is not below high,
            or the covariance of an observation is singular.

    References:
        | Report of the Dark Energy Task Force (Albrecht et al., 2006), where the name comes from
        | https://arxiv.org/abs/astro-ph/0609591

    Example:
        >>> round(fom([[[0.0]], [[1.0]], [[2.0]]], low=[0.0], high=[10.0]).mean, 6)  # variance 1 / 10**2
        100.0
    """
    drawn = as_finite(samples, "samples", ("n", "B", "D"))
    n, _, dim = drawn.shape
    edges = as_per_parameter(low, "low", dim), as_per_parameter(high, "high", dim)
    if not (edges[0] < edges[1]).all():
        raise ValueError(f"Expected low < high; got {edges[0].tolist()} and {edges[1].tolist()}.")
    if n <= dim:
        raise ValueError(f"Expected more draws than parameters; got n={n} and D={dim}.")
    flat = int((np.ptp(drawn, axis=0) == 0).any(1).sum())  # a standard deviation of 0 may be lost to rounding
    if flat:
        raise ValueError(f"Expected draws that vary in every parameter; at {flat} observations they do not.")
    centred = ((drawn - drawn.mean(0)) / (edges[1] - edges[0])).transpose(1, 0, 2)  # (B, n, D)
    # Correlation and variances apart: a tiny variance does not make a matrix singular.
    width = centred.std(1, ddof=1, keepdims=True)
    scaled = centred / width
    sign, log_det = np.linalg.slogdet(scaled.transpose(0, 2, 1) @ scaled / (n - 1))
    singular = int(((sign <= 0) | (log_det < np.log(dim * _precision(samples)))).sum())
    if singular:
        raise ValueError(f"Expected a covariance that is not singular; at {singular} observations it is: parameters "
                         "of the draws depend on each other.")
    return _score(np.exp(-(log_det + 2 * np.log(width[:, 0]).sum(1)) / dim))


def _precision(samples: ArrayLike) -> float:
    """Rounding error of draws in the precision they come in."""
    kind = np.asarray(samples).dtype
    return float(np.finfo(kind if np.issubdtype(kind, np.floating) else np.float64).eps)


def mse(theta: ArrayLike, samples: ArrayLike) -> np.ndarray[Any, Any]:
    r"""Squared error of the posterior mean, averaged over observations, per parameter in its own unit squared.

    The mean of n draws adds the posterior variance divided by n.

    Args:
        theta: True parameters, shape `(B, D)`.
        samples: Posterior draws, shape `(n, B, D)`.

    Returns:
        Mean squared errors, shape `(D,)`.

    Raises:
        ValueError: If shapes do not fit or something is not finite.

    Example:
        >>> mse([[1.0], [2.0]], [[[0.0], [2.0]], [[4.0], [2.0]]])  # posterior means 2 and 2
        array([0.5])
    """
    true, drawn = as_pairs(theta, samples)
    return ((drawn.mean(0) - true) ** 2).mean(0)


def nrmse(theta: ArrayLike, samples: ArrayLike, *, scale: ArrayLike | None = None) -> np.ndarray[Any, Any]:
    r"""Root of the mean squared error of the posterior mean, in units of the spread of true parameters.

    .. math:: NRMSE_d = \frac{1}{s_d} \sqrt{\frac{1}{B} \sum_{i=1}^{B} (E[\theta_d | x_i] - \theta_{id})^2}

    Args:
        theta: True parameters, shape `(B, D)`.
        samples: Posterior draws, shape `(n, B, D)`.
        scale: What to divide by, shape `(D,)`; the range of the true parameters (largest minus smallest) when left
            out. The range grows with B where the prior is unbounded: pass the prior's standard deviation there.

    Returns:
        Errors, shape `(D,)`.

    Raises:
        ValueError: If shapes do not fit, something is not finite, or a scale is not positive.

    Example:
        >>> nrmse([[1.0], [3.0]], [[[2.0], [2.0]]]), nrmse([[1.0], [3.0]], [[[2.0], [2.0]]], scale=[4.0])
        (array([0.5]), array([0.25]))
    """
    true, drawn = as_pairs(theta, samples)
    unit = np.ptp(true, axis=0) if scale is None else as_per_parameter(scale, "scale", true.shape[1])
    if not (unit > 0).all():
        raise ValueError(f"Expected a positive scale for every parameter; got {unit.tolist()}. "
                         "Pass scale, such as the prior's standard deviation.")
    return np.sqrt(mse(true, drawn)) / unit


def _score(values: np.ndarray[Any, Any]) -> Score:
    n = len(values)
    spread = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 and np.isfinite(values).all() else float("nan")
    return Score(float(values.mean()), float(np.median(values)), spread, n)


def _vector(values: ArrayLike, name: str) -> np.ndarray[Any, Any]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or np.isnan(array).any():
        raise ValueError(f"Expected {name} of shape (B,) without NaN; got shape {array.shape}, "
                         f"{int(np.isnan(array).sum())} NaN.")
    return array
