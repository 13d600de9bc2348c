r"""How variances scale: as 1/n_l, and as the square of the difference between levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlsbi.randomness import child_seed
from theory_checks.measuring import Measured

__all__ = ["Slope", "difference_slope", "sample_size_slope"]

_FEWEST_BATCHES = 32
_LARGEST_BATCH = 64
_SHARES = tuple(2.0**-power for power in range(15))
_FIRST_FITTED = 4  # share 1/16: where a slope may be taken from on, as a smooth density is then nearly linear
_FITTED = 5  # shares that a slope is taken from
_STEADY = 0.05  # by how much slopes between neighbouring shares may differ there
_BOOTSTRAP = 100
_UNTOLD = 0.5  # standard error from which a slope tells nothing


@dataclass(frozen=True)
class Slope:
    r"""A log-log slope and what it was fitted to.

    Args:
        level: Number of the level.
        expected: What theory says.
        value: The slope; NaN where all variances vanish.
        error: Its standard error.
        at: Where variances were taken: rows in a mean, or shares of the level difference.
        variances: The variances.
        fitted: How many of them, from the end, the slope was fitted to.
        reason: Why there is no slope.
    """

    level: int
    expected: float
    value: float
    error: float
    at: tuple[float, ...]
    variances: tuple[float, ...]
    fitted: int
    reason: str = ""

    @property
    def agrees(self) -> bool | None:
        """Whether it is what is expected to within 4 standard errors or 5%; `None` where that cannot be told."""
        if math.isnan(self.value) or not self.error < _UNTOLD:
            return None
        return abs(self.value - self.expected) <= max(4 * self.error, 0.05 * abs(self.expected))

    def __str__(self) -> str:
        if self.reason:
            return f"no slope: {self.reason}"
        return f"{self.value:.2f} +- {self.error:.1g}"


def sample_size_slope(measured: Measured, level: int) -> Slope:
    r"""Slope of the variance of a level's term against the number of its rows; -1 for rows that are independent.

    Means of disjoint batches are taken, every size from rows of its own. Components are added up.

    Args:
        measured: Rows with an integrand.
        level: Which level.
    """
    rows = measured.differences[level]
    largest = _LARGEST_BATCH
    while largest > 1 and len(rows) // _sizes(largest).numel() < _FEWEST_BATCHES * largest:
        largest //= 2
    sizes = _sizes(largest)
    if len(sizes) < 2 or not (rows.var(0) > 0).any():
        reason = "the level adds nothing" if len(sizes) >= 2 else f"{len(rows)} rows are too few"
        return Slope(level, -1.0, math.nan, math.nan, (), (), 0, reason)
    centred = rows - rows.mean(0)
    square = centred.square().sum(1)
    kurtosis = float(square.square().mean() / square.mean() ** 2)
    covariance = centred.T @ centred / len(rows)
    gaussian = 2 * float(covariance.square().sum() / covariance.trace() ** 2)  # what normal rows have beyond 1
    variances, errors = [], []
    for part, size in zip(rows.tensor_split(len(sizes)), sizes.tolist(), strict=True):
        means = part[:len(part) // size * size].reshape(-1, size, part.shape[1]).mean(1)
        variances.append(float((means - means.mean(0)).square().sum()) / (len(means) - 1))
        # Relative error of a variance by the kurtosis of means; taken from the batches it would favour small variances.
        relative = gaussian + (kurtosis - 1 - gaussian) / size
        errors.append(math.sqrt(max(relative, gaussian / 20) / len(means)))
    if not all(variance > 0 for variance in variances):
        return Slope(level, -1.0, math.nan, math.nan, tuple(sizes.tolist()), tuple(variances), 0,
                     "means of some rows vanish: do rows depend on each other?")
    # Weighted least squares on the logarithms, whose errors are relative ones.
    x, y = sizes.double().log(), torch.tensor(variances, dtype=torch.float64).log()
    weight = torch.tensor(errors, dtype=torch.float64) ** -2
    centred = x - (weight * x).sum() / weight.sum()
    scale = float((weight * centred**2).sum())
    return Slope(level, -1.0, float((weight * centred * y).sum()) / scale, scale**-0.5, tuple(sizes.tolist()),
                 tuple(variances), len(sizes))


def difference_slope(measured: Measured, level: int, *, seed: int = 0) -> Slope:
    r"""Slope of the variance of `f(x) - f(x_coarse)` against the level difference, as the fine output nears the coarse.

    Outputs `x = x_coarse + share (x_fine - x_coarse)` stand for a level that is so much closer. The slope at small
    shares is 2 where the integrand is differentiable. That the variance at share 1 lies on the same line says that the
    levels themselves are close enough for theorem 1 to describe them.

    Args:
        measured: Rows with an integrand.
        level: Which level, 1 or above.
        seed: Of the bootstrap that gives the error.

    Raises:
        ValueError: If the level is 0.
    """
    if level < 1:
        raise ValueError("Expected a level of 1 or above; level 0 has none below to differ from.")
    if measured.integrand is None:
        raise ValueError("Expected rows that were measured with an integrand.")
    theta, coarse, fine = measured.theta, measured.outputs[level - 1], measured.outputs[level]
    base = measured.integrand.values(theta, coarse)
    rows = torch.stack([measured.integrand.values(theta, coarse + share * (fine - coarse)) - base
                        for share in _SHARES])  # (shares, n, components)
    variances = rows.var(1).sum(1)
    # Below this the variance is that of rounding errors of the values that are subtracted.
    floor = 1e-24 * float(base.square().mean(0).sum())
    if not float(variances[0]) > floor:
        return Slope(level, 2.0, math.nan, math.nan, _SHARES, tuple(variances.tolist()), 0, "the level adds nothing")
    # The fewer rows cross a jump, the less is seen of it: what jumps is not followed to ever smaller shares.
    start = _window(variances, floor, most=1 if bool((measured.jumps > 0).any()) else len(_SHARES))
    if start is None:
        reason = "the variance is decided by so few rows that it vanishes as levels approach each other"
        return Slope(level, 2.0, math.nan, math.nan, _SHARES, tuple(variances.tolist()), 0, reason)
    window = slice(start, start + _FITTED)
    shares = _SHARES[window]
    generator = torch.Generator().manual_seed(child_seed(seed, 5, level))
    slopes = []
    for _ in range(_BOOTSTRAP):
        drawn = torch.randint(0, len(theta), (len(theta),), generator=generator)
        again = rows[window, drawn].var(1).sum(1)
        # Where the rows that it hangs on are left out there is no slope.
        slopes.append(_slope(shares, again) if bool((again > 0).all()) else math.inf)
    error = float(torch.tensor(slopes).std()) if all(map(math.isfinite, slopes)) else math.inf
    return Slope(level, 2.0, _slope(shares, variances[window]), error, _SHARES[:window.stop],
                 tuple(variances[:window.stop].tolist()), _FITTED)


def _window(variances: Tensor, floor: float, *, most: int) -> int | None:
    """Where to fit: the first shares over which the slope stays the same, or the steadiest of so many windows."""
    best, least = None, math.inf
    for start in range(_FIRST_FITTED, min(_FIRST_FITTED + most, len(_SHARES) - _FITTED + 1)):
        if not float(variances[start + _FITTED - 1]) > floor:
            break
        local = -variances[start:start + _FITTED].log2().diff()  # shares are halved
        spread = float(local.max() - local.min())
        if spread < least:
            best, least = start, spread
        if spread < _STEADY:
            return start
    return best


def _slope(shares: Sequence[float], variances: Tensor) -> float:
    x = torch.tensor(shares, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * variances.log()).sum() / (x * x).sum())


def _sizes(largest: int) -> Tensor:
    """Powers of two up to the largest."""
    return 2 ** torch.arange(int(math.log2(largest)) + 1)
