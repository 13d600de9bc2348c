r"""Numeric brackets of the Poincaré constant of a law on the line, from its log density.

For any increasing f, with derivative g > 0 and density p,

.. math:: \frac{\mathrm{Var} f}{E g^2} \le K_P \le \sup_x \frac{I(x)}{p(x) g(x)}, \qquad
    I(x) = \int_x^\infty (f - E f)\, p,

the left side by definition (Rayleigh), the right side by Chen's variational formula. Both meet at the first
eigenfunction, and `g <- I / p` is a step of inverse iteration towards it. Where tails are exponential no eigenfunction
may exist; there `g = p^{-1/2}` does well: it is exact for the logistic, exponential and Gumbel laws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from theory_checks.poincare import Law

__all__ = ["from_log_density"]

Array: TypeAlias = np.ndarray[Any, Any]

_DEPTH = 600.0  # the law is cut where its log density is this far below the peak: exp(-600) and its inverse are floats
_CELLS = 3000
_STEPS = 300
_DOUBLINGS = 60
_NODES, _WEIGHTS = (np.polynomial.legendre.leggauss(4)[0] + 1) / 2, np.polynomial.legendre.leggauss(4)[1] / 2
_POWERS = np.arange(4)
_UP_TO = (_NODES[:, None] ** (_POWERS + 1) / (_POWERS + 1)) @ np.linalg.inv(_NODES[:, None] ** _POWERS)


def from_log_density(
    log_density: Callable[[Array], Array],
    low: float = -math.inf,
    high: float = math.inf,
    *,
    name: str,
    points: Sequence[float] = (),
) -> Law:
    r"""The law of a density on an interval, its constant bracketed from below and above.

    Args:
        log_density: Log density up to a constant, of float64 arrays `(k,)`; `-inf` outside the support.
        low: Lower end of the interval.
        high: Upper end of the interval.
        name: What tables call the law.
        points: Where some of the mass lies, when one narrow peak among several could be overlooked.

    Returns:
        A law whose constant is the bracket's upper end, or `None` where there is no Poincaré inequality.

    Raises:
        ValueError: If the interval is empty, or no point of positive density is found.

    References:
        | Poincaré inequalities on intervals - application to sensitivity analysis (Roustant, Barthe and Iooss, 2017)
        | https://arxiv.org/abs/1612.03689

    Example:
        >>> import numpy as np
        >>> law = from_log_density(lambda x: -x**2 / 2, name="half of a normal", low=0.0)
        >>> round(law.constant, 3), law.log_concave
        (0.5, True)
    """
    if not low < high:
        raise ValueError(f"Expected low < high; got {low} and {high}.")
    value = _quiet(log_density, low, high)
    tried, mode, peak = _search(value, low, high, points)
    depth = peak - value(tried)
    bulk = tried[depth < 30]
    width = float(bulk[-1] - bulk[0])
    if not width > 0:
        raise ValueError(f"Expected a density of {name} on an interval; found one single point, {mode:g}, where it is "
                         "positive. Name points of its bulk.")
    slopes = []
    for end, start, step in ((low, bulk[0], -width), (high, bulk[-1], width)):
        slopes.append(_tail_slope(value, peak, start, step) if math.isinf(end) else math.inf)
    heavy = [side for side, slope in zip(("left", "right"), slopes, strict=True) if slope == 0]
    if heavy:
        return Law(name, None, log_concave=False, source="none",
                   reason=f"{' and '.join(heavy)} tails heavier than exponential: no Poincaré inequality")
    alive = tried[depth < _DEPTH]
    left = _edge(value, peak, alive[0], low, -width)
    right = _edge(value, peak, alive[-1], high, width)
    nodes, drift = _mesh(value, peak, np.unique(np.concatenate([tried, [left, right]])), mode, left, right)
    if drift > 1e-3:
        return Law(name, None, log_concave=None, source="none",
                   reason="the density is too singular to be integrated numerically")
    x = nodes[:-1, None] + np.diff(nodes)[:, None] * _NODES
    depth = peak - value(x.ravel()).reshape(x.shape)
    if depth.max() > 1.1 * _DEPTH:
        gap = float(x.ravel()[depth.argmax()])
        return Law(name, None, log_concave=False, source="none",
                   reason=f"the density falls below exp(-{_DEPTH:g}) of its peak at {gap:.3g}, between two "
                   "parts of the support: no finite constant")
    lower, upper = _bracket(nodes, np.exp(-depth))
    # The continuous spectrum, which a cut law lacks, starts at slope^2 / 4.
    upper = max([upper, *((2 / slope) ** 2 for slope in slopes)])
    told = f"numeric bracket {lower:.5g} <= K_P <= {upper:.5g}"
    fails = _convex_parts(x[:, 0], depth[:, 0], peak)
    if len(fails):
        return Law(name, upper, log_concave=False, source="bracketed",
                   reason=f"log density not concave between {fails[0]:.3g} and {fails[-1]:.3g}, so A1 fails as "
                   f"stated, though the inequality holds with this constant ({told})")
    return Law(name, upper, log_concave=True, source="bracketed",
               reason=f"{told}, log-concave on a grid of {len(x)} points")


def _quiet(log_density: Callable[[Array], Array], low: float, high: float) -> Callable[[Array], Array]:
    """The log density with `-inf` wherever it is not a number, and without numpy's warnings."""
    first, last = np.nextafter(low, high), np.nextafter(high, low)  # points next to an edge may round to it

    def value(x: Array) -> Array:
        with np.errstate(all="ignore"):
            values = np.asarray(log_density(np.clip(x, first, last)), dtype=np.float64)
        return np.where(np.isfinite(values), values, -np.inf)

    return value


def _search(
    value: Callable[[Array], Array], low: float, high: float, points: Sequence[float]
) -> tuple[Array, float, float]:
    """Points at every scale around the peak, sorted; the peak's place and height."""
    steps = np.logspace(-8, 8, 2001)
    if math.isfinite(low) and math.isfinite(high):
        shares = np.concatenate([steps[steps < 0.5], 1 - steps[steps < 0.5], np.linspace(0, 1, 2001)])
        grid = low + (high - low) * shares
    elif math.isfinite(low):
        grid = low + steps
    elif math.isfinite(high):
        grid = high - steps
    else:
        grid = np.concatenate([-steps, [0.0], steps])
    tried = np.unique(np.concatenate([grid, np.asarray(points, dtype=np.float64)]))
    tried = tried[(tried > low) & (tried < high)]
    for _ in range(8):
        heights = value(tried)
        best = int(heights.argmax())
        if heights[best] == -np.inf:
            raise ValueError("Expected a log density that is finite somewhere; it is finite at none of the "
                             f"{len(tried)} points tried. Name points of its bulk.")
        around = np.linspace(tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)], 201)
        tried = np.unique(np.concatenate([tried, around]))
    heights = value(tried)
    return tried, float(tried[heights.argmax()]), float(heights.max())


def _tail_slope(value: Callable[[Array], Array], peak: float, start: float, step: float) -> float:
    """Rate at which the log density falls far out: 0 for tails heavier than exponential, inf where there is none."""
    x = start + step * 2.0 ** np.arange(_DOUBLINGS)
    depth = peak - value(x)
    reached = int(np.argmax(np.append(depth, np.inf) > _DEPTH))
    if reached < 2:
        return math.inf
    slopes = np.diff(depth[:reached]) / np.abs(np.diff(x[:reached]))
    if len(slopes) >= 4:
        # A power law halves its slope with every doubling, exp(-x^.9) takes off 7%; exponential tails settle.
        falling = bool((slopes[-3:] < 0.95 * slopes[-4:-1]).all())
        if falling or slopes[-1] * abs(step) < 1e-6:
            return 0.0
    if len(slopes) >= 3 and slopes[-1] < slopes[-2] < slopes[-3]:
        first, second = slopes[-2] - slopes[-3], slopes[-1] - slopes[-2]
        if second > first:  # they settle, and Aitken's extrapolation gives the limit
            return float(slopes[-1] - second**2 / (second - first))
    return float(slopes[-1])


def _edge(value: Callable[[Array], Array], peak: float, inside: float, end: float, step: float) -> float:
    """Where the density ends on one side, or falls below what floats can hold."""

    def alive(x: float) -> bool:
        return bool(peak - value(np.array([x]))[0] < _DEPTH)

    if math.isfinite(end):
        if alive(float(np.nextafter(end, inside))):
            return end
        outside = end
    else:
        outside = inside + step
        while alive(outside):
            inside, step = outside, 2 * step
            outside = inside + step
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if alive(middle) else (inside, middle)
    return inside


def _mesh(
    value: Callable[[Array], Array], peak: float, tried: Array, mode: float, left: float, right: float
) -> tuple[Array, float]:
    """Cells that share mass, change of log density and length alike; and the mass's last relative change."""
    nodes = np.unique(np.concatenate([tried[(tried >= left) & (tried <= right)], np.linspace(left, right, 2001)]))
    masses = []
    for _ in range(4):
        width = np.diff(nodes)
        x = nodes[:-1, None] + width[:, None] * _NODES
        depth = np.minimum(peak - value(x.ravel()).reshape(x.shape), 1.2 * _DEPTH)
        mass = width * (np.exp(-depth) @ _WEIGHTS)
        change = np.ptp(depth, axis=1) + 1e-9
        masses.append(mass.sum())
        shares = mass / mass.sum() + change / change.sum() + width / width.sum()
        total = np.concatenate([[0.0], np.cumsum(shares)])
        nodes = np.interp(np.linspace(0, total[-1], _CELLS + 1), total, nodes)
        nodes[np.abs(nodes[1:-1] - mode).argmin() + 1] = mode  # densities may have a kink there
        nodes = np.unique(nodes)
    return nodes, abs(masses[-1] / masses[-2] - 1)


def _bracket(nodes: Array, p: Array) -> tuple[float, float]:
    """Best lower and upper bound over inverse iterations from f = x and from f' = p^(-1/2)."""
    lower, upper = 0.0, math.inf
    width = np.diff(nodes)[:, None]
    p = p / (width * p * _WEIGHTS).sum()
    centre = int(np.searchsorted(np.cumsum(width * (p @ _WEIGHTS)[:, None]), 0.5))
    for start in (np.ones_like(p), 1 / np.sqrt(p)):
        g = start
        history: list[float] = []
        for _ in range(_STEPS):
            f = _primitive(g, width, centre)
            f -= (width * f * p * _WEIGHTS).sum()
            variance, energy = ((width * (h * np.sqrt(p)) ** 2 * _WEIGHTS).sum() for h in (f, g))
            lower = max(lower, float(variance / energy))
            ratio = _tail_integral(f, p, width) / (p * g)
            bound = float(ratio.max())
            upper = min(upper, bound)
            history.append(bound)
            if upper < (1 + 1e-5) * lower or (len(history) > 20 and bound > (1 - 1e-5) * history[-20]):
                break
            # Any positive g will do: where rounding at the ends left none, shrink it as much as anywhere else.
            g = g * np.maximum(ratio, ratio[ratio > 0].min()) / ratio[centre, 0]
    return lower, max(upper, lower)


def _primitive(g: Array, width: Array, centre: int) -> Array:
    """Integral of g from a node in the bulk: from an end, the tails would drown the bulk in rounding."""
    cells = width[:, 0] * (g @ _WEIGHTS)
    at_left = np.concatenate([-np.cumsum(cells[:centre][::-1])[::-1], [0.0], np.cumsum(cells[centre:])[:-1]])
    return at_left[:, None] + width * (g @ _UP_TO.T)


def _tail_integral(f: Array, p: Array, width: Array) -> Array:
    """Integral of f p over all above each point, for f of mean 0; summed from the side where terms have one sign."""
    q = f * p
    cells = width[:, 0] * (q @ _WEIGHTS)
    below = np.concatenate([[0.0], np.cumsum(cells)[:-1]])[:, None] + width * (q @ _UP_TO.T)
    above = np.concatenate([np.cumsum(cells[::-1])[::-1][1:], [0.0]])[:, None] + width * (q @ (_WEIGHTS - _UP_TO).T)
    return np.where(f > 0, above, -below)


def _convex_parts(x: Array, depth: Array, peak: float) -> Array:
    """Points at which the log density's slope grows by more than rounding explains."""
    steps = np.diff(x)
    slopes = np.diff(depth) / steps
    rounding = 64 * np.finfo(np.float64).eps * (depth.max() + abs(peak) + 1) / np.minimum(steps[1:], steps[:-1])
    tolerance = rounding + 1e-6 * (np.abs(slopes[1:]) + np.abs(slopes[:-1]))
    return x[1:-1][np.diff(slopes) < -tolerance]
