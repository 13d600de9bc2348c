r"""The g-and-k distribution, known by its quantile function; the low level has a Taylor series inside."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from mlsbi.density.flows import NSF
from mlsbi.levels import Level, LevelStack
from mlsbi.priors import BoxPrior
from mlsbi.tasks.task import Task

__all__ = ["build", "exact", "invert", "log_density", "noise", "octiles", "quantile", "taylor"]

SKEW = 0.8
"""The factor c of the skewness term, at its usual value."""

_NAMES = ("location", "scale", "skewness", "tails")
_OBSERVED = ("draw", "quantiles", "draws")
_UNIFORMS = 1 << 23  # values that the base noise takes
_SMALLEST = 1e-100  # scales and distances from the location below this count as this
_LEAST_SLOPE = 0.1  # of log |Q - location| against log |z|; the least is 0.1186, where tails = 1
_BATCH = 1 << 15  # densities evaluated together, so that the arrays stay in the processor's cache


def build(
    x: Literal["draw", "quantiles", "draws"] = "draw", prior: Literal["code", "paper"] = "code", draws: int = 1000
) -> Task:
    r"""The task "g_and_k": a distribution with four parameters, of which single draws or many are seen.

    .. math::
        x = \theta_1 + \theta_2 \left(1 + 0.8 \tanh\frac{\theta_3 z}{2}\right) (1 + z^2)^{\log \theta_4} z,
        \qquad z = \sqrt 2 \, \mathrm{erf}^{-1}(2u - 1), \quad u \sim U(0, 1)

    High level: as written. Low level: :math:`\mathrm{erf}^{-1}` by its third-order Taylor series, at the same u. Its
    :math:`|z|` stays below 1.59, so that it has no tails. The costs of 1 and 10 are nominal: none are published.

    With the prior "paper" that function of z is not monotone for 55% of theta (any theta_4 below exp(-1/2), and more
    where theta_3 is large), and then it is no quantile function: x has a density with a pole wherever the function
    turns, which `log_density` does not compute. The task therefore has no likelihood under that prior. Where theta_2
    or theta_4 come near zero, under that prior or the other, all x come near theta_1.

    Args:
        x: "draw" observes one draw, x `(n, 1)`, to learn a likelihood from. "quantiles" observes four statistics of
            the octiles of many draws at the same theta, x `(n, 4)`, and "draws" the draws themselves, x `(n, draws)`,
            which a set embedding reads; both to learn a posterior from.
        prior: "code" has theta_4 on [exp(1/2), 3], as the authors' code, "paper" on [0, exp(1/2)]. The others are on
            [0, 3].
        draws: Draws per simulation of "quantiles" (at least 8) and "draws"; "draw" does not use it.

    Raises:
        ValueError: If an option is not one of those above.
    """
    if x not in _OBSERVED:
        raise ValueError(f"Expected x='draw', x='quantiles' or x='draws' for task 'g_and_k'; got {x!r}.")
    if prior not in ("code", "paper"):
        raise ValueError(f"Expected prior='code' or prior='paper' for task 'g_and_k'; got {prior!r}.")
    least = 8 if x == "quantiles" else 1
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < least:
        raise ValueError(f"Expected a whole number of draws, at least {least} for x='{x}'; got {draws!r}.")
    edge = math.exp(0.5)
    tails = (edge, 3.0) if prior == "code" else (0.0, edge)
    fields: dict[str, Any] = {
        "title": "The g-and-k distribution; the low level replaces the inverse error function by a Taylor series.",
        "citation": "Hikida, Bharti, Jeffrey, Briol, Multilevel neural simulation-based inference, NeurIPS 2025, "
        "arXiv 2506.06087",
        "likelihood": log_density if prior == "code" and x != "quantiles" else None,
        "x_transform": "none" if x == "quantiles" else "asinh",
        "x_names": ("octile statistic" if x == "quantiles" else "draw",),
    }
    if x == "draw":
        fields |= {
            "estimator": "nle",
            "observations": 10,
            "test_rows": 20_000,
            "budgets": ((10_000, 50), (10_000, 100), (10_000, 300)),
            "density": NSF(transforms=1, hidden=50, blocks=1, bins=10, tail_bound=7.0),
        }
    else:
        fields |= {
            "embedding": "set" if x == "draws" else None,
            "budgets": ((1000, 10), (1000, 50), (1000, 100)),
            "density": NSF(transforms=3, hidden=32, blocks=1, bins=3, tail_bound=3.0),
        }
    low, high = (partial(_octiles_of, level) if x == "quantiles" else level for level in (taylor, exact))
    stack = LevelStack(
        prior=BoxPrior([0.0, 0.0, 0.0, tails[0]], [3.0, 3.0, 3.0, tails[1]], names=_NAMES),
        noise=partial(noise, draws=1 if x == "draw" else draws),
        levels=[Level("taylor", low, cost=1.0), Level("exact", high, cost=10.0)],
    )
    return Task.from_stack("g_and_k", stack, **fields)


def noise(n: int, generator: Generator, draws: int = 1) -> Tensor:
    r"""Uniform noise, shape `(n, draws)`, float32: odd multiples of 2^-24.

    None is 0, 1/2 or 1, and 2u - 1 is exact, so that z is finite, at most 5.3 in absolute value, and symmetric.
    """
    return (2 * torch.randint(_UNIFORMS, (n, draws), generator=generator, dtype=torch.int32) + 1) / (2.0 * _UNIFORMS)


def exact(theta: Tensor, noise: Tensor) -> Tensor:
    """Draws `(n, m)` at theta `(n, 4)` from uniforms `(n, m)`, worked out in float64, in the dtype of theta."""
    return quantile(math.sqrt(2) * torch.erfinv(2 * noise.double() - 1), theta).to(theta.dtype)


def taylor(theta: Tensor, noise: Tensor) -> Tensor:
    r"""What `exact` gives with :math:`\mathrm{erf}^{-1}(v) \approx \frac{\sqrt\pi}{2} (v + \frac{\pi}{12} v^3)`."""
    v = 2 * noise.double() - 1
    return quantile(math.sqrt(math.pi / 2) * (v + math.pi / 12 * v**3), theta).to(theta.dtype)


def quantile(z: Tensor, theta: Tensor) -> Tensor:
    """The task's function of standard normal quantiles z `(n, m)` at theta `(n, 4)`, shape `(n, m)`, float64."""
    location, scale, skewness, tails = theta.double()[:, :, None].unbind(1)  # (n, 1) each
    z = z.double()
    return location + scale * (1 + SKEW * torch.tanh(skewness * z / 2)) * (1 + z * z) ** tails.log() * z


def octiles(x: Tensor) -> Tensor:
    r"""Location, scale, skewness and tail weight `(n, 4)` of draws `(n, m)`, m > 1, by their octiles E_1, ..., E_7.

    .. math:: \left(E_4, \; E_6 - E_2, \; \frac{E_6 + E_2 - 2 E_4}{E_6 - E_2}, \;
        \frac{E_7 - E_5 + E_3 - E_1}{E_6 - E_2}\right)

    Octiles lie between order statistics by linear interpolation, as those of `numpy.quantile`. Rows whose draws are
    all equal have NaN ratios.

    Example:
        >>> octiles(torch.arange(9.0)[None])
        tensor([[4., 4., 0., 1.]])
    """
    ordered = x.sort(1).values
    places = [divmod(i * (x.shape[1] - 1), 8) for i in range(8)]
    e = [torch.lerp(ordered[:, at], ordered[:, at + 1], part / 8) for at, part in places]
    spread = e[6] - e[2]
    return torch.stack([e[4], spread, (e[6] + e[2] - 2 * e[4]) / spread, (e[7] - e[5] + e[3] - e[1]) / spread], 1)


def invert(x: Tensor, theta: Tensor) -> Tensor:
    r"""The inverse of `quantile`: standard normal quantiles z of draws x, float64.

    Args:
        x: Draws, shape `(n, m)`.
        theta: Parameters, shape `(n, 4)`; either may have one row.

    Returns:
        Quantiles, shape `(n, m)`, with the error that rounding x causes.

    Raises:
        ValueError: As `log_density`.
    """
    x, theta = _matched(x, theta)
    rows = max(1, _BATCH // x.shape[1])
    pieces = zip(x.split(rows), theta.split(rows), strict=True)
    return torch.cat([torch.copysign(_solve(*piece)[0].exp(), piece[0] - piece[1][:, :1]) for piece in pieces])


def log_density(x: Tensor, theta: Tensor) -> Tensor:
    r"""Exact log density of independent draws, summed over each row, float64.

    .. math:: \log p(x) = \sum_j \log \phi(z_j) - \log Q'(z_j), \qquad Q(z_j) = x_j

    Q is inverted in :math:`w = \log |z|`, where :math:`\log |Q - \theta_1|` is nearly linear: its slope is between
    0.11 and 1.3 + 2 log theta_4, so that a few bracketed Newton steps give all digits, however far out x is.

    Args:
        x: Draws, shape `(n, m)`.
        theta: Parameters, shape `(n, 4)`; either may have one row.

    Returns:
        Log densities, shape `(n,)`. A scale below 1e-100 counts as 1e-100: a scale of 0 has no density.

    Raises:
        ValueError: If shapes do not fit, x is not within the range of float32, or theta has a negative scale or
            tails below 1, where the quantile function may not be monotone.

    References:
        | gk: An R package for the g-and-k and generalised g-and-h distributions (Prangle, 2020)
        | https://doi.org/10.32614/RJ-2020-010
    """
    x, theta = _matched(x, theta)
    rows = max(1, _BATCH // x.shape[1])
    parts = []
    for x_rows, theta_rows in zip(x.split(rows), theta.split(rows), strict=True):
        w, log_value, slope = _solve(x_rows, theta_rows)
        # dQ/dz = scale * slope * |y / z|, with y = (x - location) / scale
        log_jacobian = _log_scale(theta_rows) + slope.log() + (log_value - w)
        parts.append((-(2 * w).exp() / 2 - log_jacobian).sum(1))
    return torch.cat(parts) - x.shape[1] * math.log(2 * math.pi) / 2


def _octiles_of(level: Any, theta: Tensor, noise: Tensor) -> Tensor:
    return octiles(level(theta.double(), noise)).to(theta.dtype)


def _matched(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Checked x and theta with one row each per density, float64."""
    if theta.ndim != 2 or theta.shape[1] != len(_NAMES):
        raise ValueError(f"Expected theta of shape (n, {len(_NAMES)}); got {tuple(theta.shape)}.")
    if x.ndim != 2 or x.shape[1] < 1 or (len(x) != len(theta) and 1 not in (len(x), len(theta))):
        raise ValueError(f"Expected x of shape (n, m) with one row, or one per row of theta, {len(theta)}; got "
                         f"{tuple(x.shape)}.")
    x, theta = x.double(), theta.double()
    if not bool((x.abs() <= torch.finfo(torch.float32).max).all()):
        raise ValueError("Expected finite x, within the range of float32.")
    if not bool(((theta[:, 1] >= 0) & (theta[:, 3] >= 1) & torch.isfinite(theta).all(1)).all()):
        raise ValueError("Expected finite theta with scale >= 0 and tails >= 1, where the quantile function is "
                         "monotone; some rows are not. Evaluate the density inside the task's prior only.")
    n = max(len(x), len(theta))
    return x.expand(n, -1), theta.expand(n, -1)


def _log_scale(theta: Tensor) -> Tensor:
    return theta[:, 1:2].clamp(min=_SMALLEST).log()


def _solve(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solves for w = log |z|; gives w, log |y| at it and the slope of log |y| against w, each `(n, m)`."""
    shift = x - theta[:, :1]
    target = shift.abs().clamp(min=_SMALLEST).log() - _log_scale(theta)
    half_skew = theta[:, 2:3] * torch.copysign(torch.ones_like(shift), shift) / 2
    power = theta[:, 3:4].log()

    def at(w: Tensor) -> tuple[Tensor, Tensor]:
        z = w.exp()
        square = z * z
        angle = half_skew * z
        tanh = angle.tanh()
        slope = 1 + 2 * power * square / (1 + square) + SKEW * angle * (1 - tanh * tanh) / (1 + SKEW * tanh)
        return w + power * square.log1p() + (SKEW * tanh).log1p(), slope

    # From where the nearer of two asymptotes meets the target. There plain Newton needed at most 8 steps, in 6 million
    # random cases; the bracket, by the mean value theorem, makes it sure to end.
    far = (target - (SKEW * half_skew.sign()).log1p()) / (1 + 2 * power)
    w = torch.minimum(target, far)
    value, slope = at(w)
    reach = (target - value) / _LEAST_SLOPE
    lower, upper = w + reach.clamp(max=0), w + reach.clamp(min=0)
    while bool(((value - target).abs() > 1e-8).any()):
        step = w + (target - value) / slope
        w = torch.where((step >= lower) & (step <= upper), step, (lower + upper) / 2)
        value, slope = at(w)
        lower, upper = torch.where(value < target, w, lower), torch.where(value > target, w, upper)
    w = w + (target - value) / slope  # the error squares: 1e-8 becomes rounding error
    return w, *at(w)
