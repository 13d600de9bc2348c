r"""Laws and their Poincaré constants: the least K_P with Var f <= K_P E|grad f|^2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = [
    "Law", "Source", "exponential", "gumbel", "laplace", "log_gamma", "logistic", "logit_beta", "multivariate_normal",
    "normal", "product", "uniform",
]

Source = Literal["table", "bracketed", "sampled", "given", "none"]


@dataclass(frozen=True)
class Law:
    r"""What is known of a law's Poincaré inequality, `Var f <= constant E|grad f|^2`.

    Args:
        name: What tables call it: "uniform(0, 1)", "standard normal", "numeric".
        constant: K_P, or a proven upper bound of it; `None` where none is known or none exists.
        log_concave: Whether the density is log-concave (assumption A1); `None` where it cannot be told.
        reason: One sentence: where the constant comes from, or why there is none.
        source: "table" for a formula, "bracketed" for a numeric upper bound with a lower bound beside it, "sampled"
            for what was read off draws, "given" for a user's own, "none" for no constant.
        coordinates: Dimension of the law.
    """

    name: str
    constant: float | None
    log_concave: bool | None
    reason: str
    source: Source
    coordinates: int = 1


def uniform(low: float, high: float) -> Law:
    r"""The uniform law: `(high - low)^2 / pi^2`, attained by a cosine.

    References:
        | An optimal Poincaré inequality for convex domains (Payne and Weinberger, 1960)
        | https://doi.org/10.1007/BF00252910

    Example:
        >>> round(uniform(0.0, 1.0).constant, 4)
        0.1013
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"Expected finite edges, low < high; got {low} and {high}.")
    return _table(f"uniform({low:g}, {high:g})", ((high - low) / math.pi) ** 2,
                  "(b - a)^2/pi^2, attained by a cosine")


def normal(scale: float = 1.0) -> Law:
    r"""The normal law of standard deviation `scale`: `scale^2`, attained by linear functions.

    Example:
        >>> normal(2.0).constant
        4.0
    """
    name = "standard normal" if scale == 1 else f"normal(sd {_scale(scale):g})"
    return _table(name, _scale(scale) ** 2, "the variance, attained by linear functions")


def logistic(scale: float = 1.0) -> Law:
    r"""The logistic law: `4 scale^2`, approached but not attained.

    With `f(z) = sinh(z / 2)` and scale 1, `L f = -f / 4` for the law's generator L and f is increasing: Chen's
    formula (see `brackets`) gives at most 4, and the tails of rate 1 give no less.

    Example:
        >>> logistic().constant
        4.0
    """
    return _table(f"logistic(0, {scale:g})", 4 * _scale(scale) ** 2, "4 s^2, by the test function sinh(z/2s)")


def exponential(rate: float = 1.0) -> Law:
    r"""The exponential law: `4 / rate^2`, approached but not attained.

    References:
        | Poincaré's inequalities and Talagrand's concentration phenomenon for the exponential distribution
        | (Bobkov and Ledoux, 1997), https://doi.org/10.1007/s004400050090

    Example:
        >>> exponential(2.0).constant
        1.0
    """
    return _table(f"exponential({rate:g})", 4 / _scale(rate) ** 2, "4/rate^2 (Bobkov and Ledoux, 1997)")


def laplace(scale: float = 1.0) -> Law:
    r"""The two-sided exponential law: `4 scale^2`, approached but not attained (Bobkov and Ledoux, 1997).

    Example:
        >>> laplace(0.5).constant
        1.0
    """
    return _table(f"laplace({scale:g})", 4 * _scale(scale) ** 2, "4 b^2 (Bobkov and Ledoux, 1997)")


def log_gamma(shape: float, scale: float = 1.0) -> Law:
    r"""`scale` times the logarithm of a gamma variable of any rate.

    The generator is similar to a Schrödinger operator with Morse's potential, whose spectrum is known: a first
    eigenvalue `shape - 1` above shape 2, else the bottom `shape^2 / 4` of the continuous spectrum.

    References:
        | Supersymmetry and quantum mechanics (Cooper, Khare and Sukhatme, 1995), table 4.1
        | https://doi.org/10.1016/0370-1573(94)00080-M

    Example:
        >>> log_gamma(1.0).constant, log_gamma(5.0).constant  # shape 1: the logarithm of an exponential variable
        (4.0, 0.25)
    """
    gap = shape - 1 if _scale(shape) > 2 else shape**2 / 4
    return _table(f"log gamma(shape {shape:g}, scale {scale:g})", _scale(scale) ** 2 / gap,
                  "the spectrum of Morse's potential")


def gumbel(scale: float = 1.0) -> Law:
    r"""The Gumbel law, minus the logarithm of an exponential variable: `4 scale^2` (see `log_gamma`).

    Example:
        >>> gumbel(2.0).constant
        16.0
    """
    return _table(f"gumbel({scale:g})", 4 * _scale(scale) ** 2, "4 s^2, by the spectrum of Morse's potential")


def logit_beta(a: float, b: float, scale: float = 1.0) -> Law:
    r"""`scale` times the logit of a beta(a, b) variable.

    The generator is similar to a Schrödinger operator with Rosen and Morse's potential. With `A = (a + b) / 2` and
    `B = A (b - a) / 2`, and where `sqrt|B| < A - 1`, its gap is `(A^2 - (A-1)^2 + B^2/A^2 - B^2/(A-1)^2) / 4`; else
    the bottom of the continuous spectrum, `min(a, b)^2 / 4`. Beta(1, 1) gives the logistic law.

    References:
        | Supersymmetry and quantum mechanics (Cooper, Khare and Sukhatme, 1995), table 4.1
        | https://doi.org/10.1016/0370-1573(94)00080-M

    Example:
        >>> logit_beta(1.0, 1.0).constant, logit_beta(3.0, 3.0).constant
        (4.0, 0.8)
    """
    half = (_scale(a) + _scale(b)) / 2
    skew = half * (b - a) / 2
    gap = min(a, b) ** 2 / 4
    if math.sqrt(abs(skew)) < half - 1:
        gap = (half**2 - (half - 1) ** 2 + (skew / half) ** 2 - (skew / (half - 1)) ** 2) / 4
    return _table(f"logit of beta({a:g}, {b:g})", _scale(scale) ** 2 / gap,
                  "the spectrum of Rosen and Morse's potential")


def multivariate_normal(covariance: Any) -> Law:
    r"""A normal law with any covariance matrix `(D, D)`: its largest eigenvalue.

    Example:
        >>> round(multivariate_normal([[1.0, 0.5], [0.5, 1.0]]).constant, 6)
        1.5
    """
    matrix = np.asarray(covariance, dtype=np.float64)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not square or not np.allclose(matrix, matrix.T, rtol=1e-5, atol=1e-6 * np.abs(matrix).max()):
        raise ValueError(f"Expected a symmetric covariance matrix (D, D); got shape {matrix.shape}.")
    eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    if not eigenvalues[-1] > 0 or eigenvalues[0] < -1e-6 * eigenvalues[-1]:
        raise ValueError(f"Expected a covariance matrix; its smallest eigenvalue is {eigenvalues[0]:.3g}.")
    return _table("multivariate normal", float(eigenvalues[-1]), "the covariance's largest eigenvalue", len(matrix))


def product(laws: Sequence[Law]) -> Law:
    r"""The joint law of independent parts: the largest of their constants.

    Raises:
        ValueError: If there are no laws.

    Example:
        >>> product([uniform(0.0, 1.0), logistic()]).constant
        4.0
    """
    if not laws:
        raise ValueError("Expected at least one law; got none.")
    if len(laws) == 1:
        return laws[0]
    coordinates = sum(law.coordinates for law in laws)
    # A part that is not log-concave settles the product, whatever cannot be told of the others.
    verdicts = {law.log_concave for law in laws}
    log_concave = False if False in verdicts else None if None in verdicts else True
    name = " x ".join(dict.fromkeys(law.name for law in laws))
    missing = [law for law in laws if law.constant is None]
    if missing:
        return Law(name, None, log_concave, f"no constant for {missing[0].name}: {missing[0].reason}", "none",
                   coordinates)
    largest = max(laws, key=lambda law: law.constant or 0.0)
    used = {law.source for law in laws}
    weakest: Source = next(source for source in ("sampled", "given", "bracketed", "table") if source in used)
    reason = f"largest of its independent parts, {largest.name}: {largest.reason}"
    broken = next((law for law in laws if law.log_concave is False), largest)
    if broken is not largest:
        reason += f"; but {broken.name}: {broken.reason}"
    return Law(name, largest.constant, log_concave, reason, weakest, coordinates)


def _table(name: str, constant: float, reason: str, coordinates: int = 1) -> Law:
    return Law(name, constant, log_concave=True, reason=reason, source="table", coordinates=coordinates)


def _scale(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"Expected a positive, finite number; got {value}.")
    return value
