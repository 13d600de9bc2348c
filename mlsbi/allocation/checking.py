r"""Whether pilot rows can be trusted: laws of coupled halves, shared noise, rates over the levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlsbi.allocation.arrays import Array

__all__ = ["consistency", "convergence_rates", "noise_correlation", "rows_needed", "shuffled_correlation",
           "shuffled_correlations"]

_SHUFFLES = 200
_SHUFFLED_QUANTILE = 0.95
_ROWS_PER_FEATURE = 4  # of a regression on theta
_ROUNDING = 1e-12  # relative


def consistency(fine: Array, coarse: Array, alone: Array) -> float:
    r"""Whether the coarse halves of pairs have the law of the level below; above 1 they have not.

    .. math:: \frac{|\bar Y + \bar f^{l-1} - \bar f^l| \sqrt{n}}{3 (s_Y + s_{f^{l-1}} + s_{f^l})}

    Args:
        fine: f^l of pairs, shape `(n, k)`.
        coarse: f^{l-1} of the same pairs, shape `(n, k)`.
        alone: f^{l-1} of independent rows, shape `(m, k)`.

    Returns:
        The largest ratio over the k components.

    References:
        | Multilevel Monte Carlo methods (Giles, 2015), section 3.3
        | https://doi.org/10.1017/S096249291500001X

    Example:
        >>> rng = np.random.default_rng(0)
        >>> coarse, alone = rng.normal(size=(2, 100, 1))
        >>> consistency(coarse + 0.1, coarse, alone) < 1 < consistency(coarse + 0.1, coarse, alone + 2)
        True
    """
    correction = fine - coarse
    distance = np.abs(correction.mean(0) + alone.mean(0) - fine.mean(0))
    # Means of equal numbers differ by rounding, and so would their ratio to a spread of rounding.
    largest = np.abs(np.concatenate([fine, coarse, alone])).max(0)
    distance = np.where(distance > _ROUNDING * largest, distance, 0.0) * math.sqrt(min(len(fine), len(alone)))
    spread = 3 * sum(part.std(0, ddof=1) for part in (correction, alone, fine))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(spread > 0, distance / spread, np.where(distance > 0, np.inf, 0.0))
    return float(ratios.max())


def shuffled_correlation(fine: Array, coarse: Array, *, seed: int) -> float:
    r"""What the correlation of pairs stays below, 19 times in 20, when rows are paired at random.

    Args:
        fine: f^l, shape `(n, k)`.
        coarse: f^{l-1} of the same rows, shape `(n, k)`.
        seed: Of the shuffles.

    Returns:
        The 95% quantile over shuffles; NaN where a level does not vary.
    """
    return _shuffled([(_centred(fine), _centred(coarse))], seed)


def shuffled_correlations(folds: Sequence[Array], *, seed: int) -> Array:
    r"""The same for all neighbouring levels, from corrections in folds with means of their own.

    Args:
        folds: Corrections, each `(L + 1, n, k)`; rows are paired at random within each.
        seed: Of the shuffles.

    Returns:
        Shape `(L,)`.
    """
    levels = [np.cumsum(fold - fold.mean(1, keepdims=True), axis=0) for fold in folds]
    return np.array([_shuffled([(fold[level], fold[level - 1]) for fold in levels], seed)
                     for level in range(1, len(folds[0]))])


def _shuffled(pairs: Sequence[tuple[Array, Array]], seed: int) -> float:
    """Of centred values of several folds."""
    squares = [sum(float((pair[side] ** 2).sum()) for pair in pairs) for side in range(2)]
    scale = math.sqrt(squares[0] * squares[1])
    if scale == 0:
        return math.nan
    generator = np.random.default_rng(seed)
    found = [sum(float((fine * coarse[generator.permutation(len(coarse))]).sum()) for fine, coarse in pairs) / scale
             for _ in range(_SHUFFLES)]
    return float(np.quantile(found, _SHUFFLED_QUANTILE))


def noise_correlation(theta: Array, fine: Array, coarse: Array, *, seed: int) -> tuple[float, float]:
    r"""How strongly paired outputs agree beyond what theta explains: the mark of shared noise.

    Both outputs are reduced to what a regression on theta (and its squares, where rows suffice) leaves.

    Args:
        theta: Parameters, in the coordinates of `Unbounded.features`, shape `(n, D)`.
        fine: Outputs, standardised, shape `(n, k)`.
        coarse: Outputs of the level below at the same rows, shape `(n, k)`.
        seed: Of the shuffles.

    Returns:
        Correlation of what is left, and what it stays below, 19 times in 20, when rows are paired at random; NaN
        where nothing is left of a level: it has no noise.
    """
    n, fine, coarse = len(theta), _centred(fine), _centred(coarse)
    design = np.ones((n, 1))
    for more in (theta, theta**2):
        if n >= _ROWS_PER_FEATURE * (design.shape[1] + more.shape[1]):
            design = np.concatenate([design, more], axis=1)
    basis, _ = np.linalg.qr(design)
    left = [part - basis @ (basis.T @ part) for part in (fine, coarse)]
    for rest, part in zip(left, (fine, coarse), strict=True):
        if float((rest**2).sum()) <= 1e-10 * float((part**2).sum()):
            return math.nan, math.nan
    scale = math.sqrt(float((left[0] ** 2).sum() * (left[1] ** 2).sum()))
    return float((left[0] * left[1]).sum()) / scale, shuffled_correlation(left[0], left[1], seed=seed)


def _centred(values: Array) -> Array:
    """Values less their means; zero where they differ by rounding alone."""
    centred = values - values.mean(0)
    return np.where(np.abs(centred).max(0) > _ROUNDING * np.abs(values).max(0), centred, 0.0)


def convergence_rates(means: Array, variances: Array, costs: Sequence[float]) -> dict[str, float] | None:
    r"""Slopes per level of log2 |mean correction| (alpha) and log2 variance (beta), negated, and log2 cost (gamma).

    Args:
        means: Of the corrections, shape `(L + 1,)`.
        variances: Of the corrections, shape `(L + 1,)`.
        costs: Of one run, shape `(L + 1,)`.

    Returns:
        NaN where a correction vanishes; `None` with fewer than three levels.

    Example:
        >>> convergence_rates(np.array([9.0, 1.0, 0.5]), np.array([9.0, 1.0, 0.25]), [1, 2, 4])
        {'alpha': 1.0, 'beta': 2.0, 'gamma': 1.0}
    """
    if len(costs) < 3:
        return None
    levels = np.arange(1, len(costs))

    def slope(values: Array) -> float:
        return float(np.polyfit(levels, np.log2(values), 1)[0]) if (values > 0).all() else math.nan

    return {
        "alpha": round(-slope(np.abs(means[1:])), 12),
        "beta": round(-slope(variances[1:]), 12),
        "gamma": round(slope(np.asarray(costs, dtype=np.float64)[1:]), 12),
    }


def rows_needed(kurtosis: float, relative_error: float) -> int:
    r"""Rows after which a variance is known to a relative standard error: :math:`(\kappa - 1) / \epsilon^2`.

    Example:
        >>> rows_needed(3.0, 0.1)  # a normal quantity, to 10%
        200
    """
    return math.ceil((kurtosis - 1) / relative_error**2 * (1 - 1e-12))
