r"""Scores of a posterior on held-out pairs of parameters and observations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Score", "kld", "nlpd"]


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
