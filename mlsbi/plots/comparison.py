r"""What strategies cost and what they know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, ScaledTranslation, Transform
from numpy.typing import ArrayLike

from mlsbi.plots.style import BLACK, COLOURS, GREY, TEXT, dress, log_ticks, new_figure

__all__ = ["quality"]

Array: TypeAlias = np.ndarray[Any, Any]

_BARS = 2.0  # standard errors
_SPANS = 3.0  # ratio of costs from which their axis is logarithmic
_FAR, _FAR_LINE = 10.0, 6.0  # ranges of the better scores beyond which a score, or a line, is left off the axis
_SAME_COST = 1.03
_APART, _WIDE = 11.0, 72.0  # points between strategies of one cost, where there are others and where there are none
_DISTANCES = (8.0, 20.0, 34.0)  # points from a strategy to its name
_NAME_ROOM = 0.3  # of the axis, beyond the dearest strategy
_COVERED = 3.0  # points of distance that a name goes to cover a square point less
_LINES = (("prior", ":", GREY, 1), ("exact posterior", "--", BLACK, 0))  # named at opposite ends


@dataclass(frozen=True)
class _Point:
    """A strategy in the axes, moved sideways by its transform."""

    text: str
    colour: str
    x: float
    y: float
    bar: float
    beside: Transform


def quality(
    costs: ArrayLike,
    scores: ArrayLike,
    errors: ArrayLike,
    *,
    names: Sequence[str],
    prior: float | None = None,
    exact: float | None = None,
    unit: str = "units",
    label: str = "negative log density of the true parameters",
) -> Figure:
    r"""Score against cost, one named point a strategy with a bar of two standard errors; lower is better.

    Strategies of equal cost are drawn side by side. A score, or a line, so far from the others that they could not be
    told apart is marked at the edge with its number; an infinite score is marked there too.

    Args:
        costs: What each strategy's simulations cost, not negative, shape `(S,)`.
        scores: Mean scores, shape `(S,)`; `inf` where true parameters got no density.
        errors: Standard errors of the scores, shape `(S,)`; NaN where unknown.
        names: Names of the strategies.
        prior: The prior's score.
        exact: The exact posterior's score.
        unit: Unit of the costs.
        label: What the score is.

    Raises:
        ValueError: If there is no strategy, shapes do not agree, or a cost or a score is not a number.
    """
    cost, score, error = (np.asarray(values, dtype=np.float64) for values in (costs, scores, errors))
    if cost.ndim != 1 or len(cost) == 0 or not cost.shape == score.shape == error.shape == (len(names),):
        raise ValueError(f"Expected as many costs, scores and errors as names, at least one; got shapes {cost.shape}, "
                         f"{score.shape} and {error.shape} and {len(names)} names.")
    if not (np.isfinite(cost) & (cost >= 0)).all() or np.isnan(score).any() or (score == -np.inf).any():
        raise ValueError(f"Expected finite costs of at least 0 and scores that are numbers or inf; got {cost.tolist()} "
                         f"and {score.tolist()}.")
    bars = np.where(np.isfinite(error), _BARS * error, 0.0)
    figure = new_figure(7.0, 4.3)
    axes = figure.add_subplot()
    low, high, shown = _limits(score, bars, [value for value in (prior, exact) if value is not None])
    axes.set_ylim(low, high)
    _scale_cost(axes, cost)
    log = ", log scale" if axes.get_xscale() == "log" else ""
    dress(axes, title="Quality against cost (bars: two standard errors either way)",
          x=f"cost of the simulations it learns from ({unit}{log})", y=f"{label}\n(lower is better)", grid="both")
    taken = [_draw_line(axes, value, *look) for value, look in zip((prior, exact), _LINES, strict=True)]
    points = []
    for index, shift in enumerate(_shifts(cost)):
        colour = COLOURS[index % len(COLOURS)]
        text, at = str(names[index]), float(score[index])
        if not shown[index]:
            text, at, bars[index] = f"{text}: {'infinite' if np.isinf(at) else _signed(at)}", high, 0.0
        beside = axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
        axes.plot([cost[index]] * 2, [at - bars[index], at + bars[index]], color=colour, linewidth=1.6,
                  transform=beside)
        axes.plot(cost[index], at, marker="o" if shown[index] else "^", markersize=8, color=colour, linestyle="",
                  markeredgecolor="white", transform=beside, clip_on=False, zorder=4, label=str(names[index]))
        points.append(_Point(text, colour, float(cost[index]), at, float(bars[index]), beside))
    if not shown.all():
        figure.supxlabel("Triangles: off the axis, worse than it shows."
                         + " Infinite: some true parameters got no density at all." * bool(np.isinf(score).any()),
                         fontsize=TEXT, color=GREY)
    _write_names(axes, points, [text for text in taken if text is not None])
    return figure


def _limits(score: Array, bars: Array, lines: Sequence[float]) -> tuple[float, float, Array]:
    """Ends of the axis and which scores lie within; those far above the better ones do not, and lines likewise."""
    shown = np.isfinite(score)
    low, high = np.inf, -np.inf
    for place, index in enumerate(np.argsort(score)):
        if shown[index] and (place < 2 or score[index] - low <= _FAR * (high - low)):
            low, high = min(low, score[index] - bars[index]), max(high, score[index] + bars[index])
        else:
            shown[index] = False
    inside = [value for value in lines if np.isfinite(value)]
    if not shown.any():
        low, high = (min(inside), max(inside)) if inside else (0.0, 1.0)
    least = 0.02 * max(abs(low), abs(high), 1e-6)
    low, high = (low, high) if high - low > least else (low - least, high + least)
    for value in sorted(inside, key=lambda value: max(low - value, value - high)):
        if max(high, value) - min(low, value) <= _FAR_LINE * (high - low):
            low, high = min(low, value), max(high, value)
    return low - 0.1 * (high - low), high + (0.1 if shown.all() else 0.25) * (high - low), shown


def _scale_cost(axes: Axes, cost: Array) -> None:
    least, most = float(cost.min()), float(cost.max())
    if least > 0 and most / least > _SPANS:
        axes.set_xscale("log")
        axes.set_xlim(least * (least / most) ** 0.12, most * (most / least) ** _NAME_ROOM)
        log_ticks(axes.xaxis, *axes.get_xlim())
        return
    if most > _SAME_COST * least:
        axes.set_xlim(least - 0.12 * (most - least), most + _NAME_ROOM * (most - least))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    else:  # one place on the axis: the points beside it have the same cost
        axes.set_xlim(0.5 * least - (most == 0), 1.5 * most + (most == 0))
        axes.set_xticks([most])
    axes.xaxis.set_major_formatter("{x:,.6g}")


def _shifts(cost: Array) -> Array:
    """Points by which each strategy is moved sideways, so that those of one cost stand side by side."""
    shifts = np.zeros(len(cost))
    for value in cost:
        same = np.flatnonzero((cost <= value * _SAME_COST) & (cost * _SAME_COST >= value))
        shifts[same] = (_APART if len(same) < len(cost) else _WIDE) * (np.arange(len(same)) - (len(same) - 1) / 2)
    return shifts


def _draw_line(axes: Axes, value: float | None, name: str, style: str, colour: str, end: int) -> Annotation | None:
    """A horizontal line named at its left (0) or right end (1); a remark at the edge where it is off the axis."""
    if value is None:
        return None
    low, high = axes.get_ylim()
    look: Any = {"textcoords": "offset points", "fontsize": TEXT, "color": colour, "ha": "right" if end else "left"}
    aside = -3 if end else 3
    if low <= value <= high:
        axes.axhline(value, color=colour, linewidth=1.1, linestyle=style, zorder=1)
        return axes.annotate(name, (end, value), xycoords=axes.get_yaxis_transform(), xytext=(aside, 2), va="bottom",
                             **look)
    above = value > high
    text = f"{'↑' if above else '↓'} {name}: {_signed(value)}, {'above' if above else 'below'} this axis"
    return axes.annotate(text, (end, int(above)), xycoords="axes fraction", xytext=(aside, -3 if above else 3),
                         va="top" if above else "bottom", **look)


def _write_names(axes: Axes, points: Sequence[_Point], texts: Sequence[Annotation]) -> None:
    """Writes each name where it covers least of the points, bars and texts that are there already."""
    figure: Any = axes.figure
    figure.draw_without_rendering()  # the layout decides where things are
    scale = figure.dpi / 72
    room = axes.get_window_extent()
    taken = [text.get_window_extent() for text in texts]
    for point in points:
        (x, y), (_, end) = point.beside.transform([(point.x, point.y), (point.x, point.y + point.bar)])
        reach = 6 * scale
        taken += [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach),
                  Bbox.from_extents(x - 2 * scale, 2 * y - end, x + 2 * scale, end)]
    for point in points:
        text = axes.annotate(point.text, (point.x, point.y), xycoords=point.beside, textcoords="offset points",
                             xytext=(0, 0), va="bottom", fontsize=TEXT, color=BLACK, zorder=5)
        size, at = text.get_window_extent(), point.beside.transform((point.x, point.y))
        width, height = size.width / scale, size.height / scale
        choices: list[Any] = []
        for distance, x, y in product(_DISTANCES, (1, -1, 0), (0, 1, -1)):
            if (x, y) == (0, 0):
                continue
            reach = distance * (0.7 if x and y else 1.0)
            offset = (x * reach - (1 - x) / 2 * width, y * reach - (1 - y) / 2 * height)
            box = Bbox.from_bounds(at[0] + offset[0] * scale, at[1] + offset[1] * scale, size.width, size.height)
            hidden = sum(_shared(box, other) for other in taken) + size.width * size.height - _shared(box, room)
            loss = _COVERED * hidden + distance * scale
            choices.append((loss, len(choices), offset, box, distance, (x * reach, y * reach)))
        _, _, offset, box, distance, end = min(choices)  # of equally good ones, the first
        text.set_position(offset)
        taken.append(box)
        if distance > _DISTANCES[0]:
            axes.annotate("", (point.x, point.y), xycoords=point.beside, xytext=end, textcoords="offset points",
                          arrowprops={"arrowstyle": "-", "color": point.colour, "linewidth": 0.8})


def _shared(one: Bbox, other: Bbox) -> float:
    """Area of the overlap of two boxes."""
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else float(both.width * both.height)


def _signed(value: float) -> str:
    return f"{value:,.4g}".replace("-", "−", 1)
