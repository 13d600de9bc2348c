r"""Variances, covariances and kurtosis of coupled corrections, and how well so many rows tell them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlsbi.allocation.arrays import Array

__all__ = ["Moments", "compact", "corrections_of", "measure"]

_DRAWS = 400  # bootstrap draws: the 5% and 95% quantiles are then known to about a tenth of the interval
_STUDENTISED = 2.0  # most that a sample's own error may differ from that of all rows, either way
_LOG_LIMIT = 3.0  # of the logarithm of a variance drawn
_CHUNK_VALUES = 1 << 24  # numbers in the counts of the draws held at once


@dataclass(frozen=True)
class Moments:
    r"""What rows tell of f^0 .. f^L; of an integrand with several components, sums over them.

    Args:
        variances: Var f^0, then Var(f^l - f^{l-1}), shape `(L + 1,)`.
        covariance: Covariance of f^0 .. f^L, shape `(L + 1, L + 1)`.
        kurtosis: E|Y - EY|^4 / V^2 of f^0 and of each correction Y, shape `(L + 1,)`; NaN where V is zero.
        means: Length of the mean of f^0 and of each correction, shape `(L + 1,)`.
        draws: Draws of the variances, as `measure` explains, shape `(draws, L + 1)`.
        covariance_draws: Bootstrap draws of `covariance`, shape `(draws, L + 1, L + 1)`.
    """

    variances: Array
    covariance: Array
    kurtosis: Array
    means: Array
    draws: Array
    covariance_draws: Array

    @property
    def correlations(self) -> Array:
        """Correlation of f^l with f^{l-1}, shape `(L,)`; NaN where one of them does not vary."""
        spread = np.sqrt(np.diag(self.covariance))
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Array = np.diag(self.covariance, 1) / (spread[1:] * spread[:-1])
        return found


def corrections_of(values: Array) -> Array:
    r"""f^0 and the differences f^l - f^{l-1}, of values `(levels, n, k)`, in float64.

    Example:
        >>> corrections_of(np.array([[[1.0]], [[1.5]]])).ravel().tolist()
        [1.0, 0.5]
    """
    return np.concatenate([values[:1], np.diff(values, axis=0)])


def compact(blocks: Iterable[Array]) -> Array:
    r"""Corrections of many components in as few coordinates as keep all their inner products.

    Rows span no more dimensions than there are of them: a QR decomposition turns them into that many coordinates
    wherever there are more components, some components at a time.

    Args:
        blocks: Values, each `(levels, n, components)`.

    Returns:
        Corrections, shape `(levels, n, k)` with k at most `levels * n`.

    Raises:
        ValueError: If there is no block, or a number is not finite.

    Example:
        >>> values = np.random.default_rng(0).normal(size=(2, 3, 50))
        >>> short, long = compact([values[..., :30], values[..., 30:]]), corrections_of(values)
        >>> short.shape, np.allclose(np.tensordot(short, short, (2, 2)), np.tensordot(long, long, (2, 2)))
        ((2, 3, 6), True)
    """
    kept: Array | None = None
    shape = (0, 0)
    for block in blocks:
        bad = int((~np.isfinite(block)).any((0, 2)).sum())
        if bad:
            raise ValueError(f"Expected finite numbers of every row; {bad} of {block.shape[1]} rows have others: their "
                             "loss or its gradient is not finite. Take another density, or an integrand that needs no "
                             "network.")
        corrections = corrections_of(block)
        shape = corrections.shape[:2]
        wide = corrections.reshape(shape[0] * shape[1], -1)
        kept = wide if kept is None else np.concatenate([kept, wide], axis=1)
        if kept.shape[1] > kept.shape[0]:
            kept = np.asarray(np.linalg.qr(kept.T, mode="r")).T
    if kept is None:
        raise ValueError("Expected at least one block.")
    return kept.reshape(*shape, -1)


def measure(folds: Sequence[Array], *, seed: int) -> Moments:
    r"""Moments of corrections, pooled over folds that may have means of their own.

    How well the variances are known is told by a bootstrap of their logarithms, each in units of its own standard
    error :math:`\sqrt{(\kappa - 1) / n}`: samples with a small variance by chance show a small kurtosis too, so that
    plain bootstrap intervals are too short. Quantiles of `draws` are bounds of intervals.

    Args:
        folds: Corrections, each `(levels, n, k)`, of rows scored by one network.
        seed: Of the bootstrap, which draws rows within each fold.

    References:
        | Bootstrap confidence intervals (DiCiccio and Efron, 1996), section 4
        | https://doi.org/10.1214/ss/1032280214
    """
    levels = folds[0].shape[0]
    freedom = sum(fold.shape[1] - 1 for fold in folds)
    rows = sum(fold.shape[1] for fold in folds)
    scatter, mean = np.zeros((levels, levels)), np.zeros(levels)
    powers, drawn = np.zeros((2, levels)), np.zeros((2, _DRAWS, levels))
    drawn_scatter = np.zeros((_DRAWS, levels, levels))
    generator = np.random.default_rng(seed)
    for fold in folds:
        centre = fold.mean(1, keepdims=True)
        centred = fold - centre
        scatter += np.einsum("ink,jnk->ij", centred, centred)
        squares = np.einsum("lnk,lnk->ln", centred, centred)
        powers += [squares.sum(1), (squares**2).sum(1)]
        mean += fold.shape[1] / rows * (centre**2).sum((1, 2))
        for start, counts in _draw(fold.shape[1], generator):
            these = slice(start, start + len(counts))
            drawn_scatter[these] += _drawn_scatter(centred, counts)
            drawn[:, these] += [counts @ squares.T, counts @ (squares**2).T]
    variances, kurtosis = np.diag(scatter) / freedom, _kurtosis(powers[0], powers[1], rows)
    joined = np.tril(np.ones((levels, levels)))  # f^l is the sum of the corrections up to l
    draws = _studentised(variances, kurtosis, np.diagonal(drawn_scatter, axis1=1, axis2=2) / freedom,
                         _kurtosis(drawn[0], drawn[1], rows))
    return Moments(variances, joined @ (scatter / freedom) @ joined.T, kurtosis, np.sqrt(mean), draws,
                   joined @ (drawn_scatter / freedom) @ joined.T)


def _kurtosis(squares: Array, fourth: Array, rows: int) -> Array:
    """From sums over rows; NaN where nothing varies."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(fourth * rows / squares**2)


def _studentised(variances: Array, kurtosis: Array, drawn: Array, drawn_kurtosis: Array) -> Array:
    """Draws of the variances whose quantiles bound intervals, from bootstrap samples; zero where nothing varies."""
    known = variances > 0
    # Few rows may repeat one value, or miss the rare ones: such samples tell no error.
    error, own_error = (np.sqrt(np.maximum(np.nan_to_num(k) - 1, 0)) for k in (kurtosis, drawn_kurtosis))
    ratio = np.clip(np.divide(error, own_error, out=np.full_like(own_error, np.inf), where=own_error > 0),
                    1 / _STUDENTISED, _STUDENTISED)
    log = np.log(np.divide(drawn, variances, out=np.ones_like(drawn), where=known & (drawn > 0)))
    log = np.clip(np.where(known & (drawn <= 0), -np.inf, log), -_LOG_LIMIT, _LOG_LIMIT)
    return np.asarray(variances * np.exp(-ratio * log))


def _draw(n: int, generator: np.random.Generator) -> Iterator[tuple[int, Array]]:
    """How often bootstrap draws of n rows have each, `(some draws, n)`, and the number of the first of them."""
    size = max(_CHUNK_VALUES // n, 1)
    for start in range(0, _DRAWS, size):
        drawn = min(size, _DRAWS - start)
        yield start, generator.multinomial(n, np.full(n, 1 / n), size=drawn).astype(np.float64)


def _drawn_scatter(centred: Array, counts: Array) -> Array:
    """Sums of products of corrections around the draw's own means, unbiased, shape `(draws, levels, levels)`."""
    levels, n, _ = centred.shape
    products = np.einsum("ink,jnk->nij", centred, centred).reshape(n, -1)
    sums = np.stack([counts @ each for each in centred])  # (levels, draws, k)
    found = (counts @ products).reshape(-1, levels, levels) - np.einsum("idk,jdk->dij", sums, sums) / n
    own = np.arange(levels)
    # Rounding leaves less than nothing where a draw repeats one value.
    found[:, own, own] = np.maximum(found[:, own, own], 0)
    return np.asarray(found * n / (n - 1))
