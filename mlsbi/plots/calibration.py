r"""Whether stated probabilities come true, as curves and histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import ArrayLike
from scipy import stats

from mlsbi.plots.style import BLACK, COLOURS, GREY, LIGHT, TEXT, add_legend, axis_names, dress, new_figure

__all__ = ["coverage", "ranks"]

_STATED = np.linspace(0.0, 1.0, 201)
_BAND = 0.95
_ROWS_PER_BIN = 20  # expected in a bin of a rank histogram


def coverage(levels_by_name: Mapping[str, ArrayLike]) -> Figure:
    r"""How often the true parameters lay in the highest-density region of each stated credibility.

    A calibrated posterior follows the diagonal; below it the posterior is over-confident. The band holds 95% of the
    values that a calibrated posterior would give, at each credibility on its own, for this number of observations.

    Args:
        levels_by_name: `hpd_levels` of test observations, shape `(B,)`, by the name of the posterior.

    Raises:
        ValueError: If there is none, or one is not a vector of numbers in [0, 1].
    """
    curves = {str(name): np.asarray(levels, dtype=np.float64) for name, levels in levels_by_name.items()}
    if not curves:
        raise ValueError("Expected the HPD levels of at least one posterior; got none.")
    for name, levels in curves.items():
        if levels.ndim != 1 or len(levels) == 0 or not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"Expected HPD levels of '{name}' of shape (B,) within [0, 1]; got shape {levels.shape}.")
    counts = sorted({len(levels) for levels in curves.values()})
    figure = new_figure(4.9, 4.8)
    axes = figure.add_subplot()
    smallest = f", n = {counts[0]:,}" if len(counts) > 1 else ""
    low, high = (stats.binom.ppf(q, counts[0], _STATED) / counts[0] for q in ((1 - _BAND) / 2, (1 + _BAND) / 2))
    axes.fill_between(_STATED, low, high, color=LIGHT, linewidth=0, label=f"95% of calibrated posteriors{smallest}")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1.0, linestyle="--")
    for (name, levels), colour in zip(curves.items(), _cycle(len(curves)), strict=True):
        found = np.searchsorted(np.sort(levels), _STATED, side="right") / len(levels)
        axes.plot(_STATED, found, color=colour, linewidth=1.8, label=name)
    axes.text(0.05, 0.66, "under-confident:\nregions too wide", fontsize=TEXT, color=GREY, va="top")
    axes.text(0.97, 0.14, "over-confident:\nregions too narrow", fontsize=TEXT, color=GREY, ha="right", va="top")
    n = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    dress(axes, title=f"Coverage of credible regions, n = {n} test observations", x="stated credibility",
          y="share of regions that hold the truth", grid="both")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    for one in (axes.xaxis, axes.yaxis):
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    add_legend(axes, loc="upper left")
    return figure


def ranks(ranks: ArrayLike, n: int, names: Sequence[str] | None = None) -> Figure:
    r"""Histograms of the true parameters' ranks among posterior draws, one panel a parameter.

    Flat where the posterior is calibrated, U-shaped where it is too narrow, humped where too wide, sloped where biased.

    Args:
        ranks: From `sbc_ranks`, 0 .. n, shape `(B, D)`.
        n: Posterior draws per observation.
        names: Parameter names.

    Raises:
        ValueError: If the ranks are not of that shape or not within 0 .. n, or `names` do not fit.
    """
    values = np.asarray(ranks)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"Expected ranks of shape (B, D); got {values.shape}.")
    if values.min() < 0 or values.max() > n:
        raise ValueError(f"Expected ranks within 0 .. {n}; got {values.min()} .. {values.max()}. Pass the number of "
                         "posterior draws as n.")
    rows, dim = values.shape
    labels = axis_names(names, dim, what="parameter", default="theta_")
    bins = _count_bins(rows, n)
    edges = np.round(np.linspace(0, n + 1, bins + 1))  # each bin holds whole ranks
    expected = np.diff(edges) / (n + 1)
    low, high = (stats.binom.ppf(q, rows, expected) / (rows * expected) for q in ((1 - _BAND) / 2, (1 + _BAND) / 2))
    columns = min(dim, 4)
    lines = math.ceil(dim / columns)
    figure = new_figure(max(5.2, 2.35 * columns + 0.5), 2.2 * lines + 0.9)
    panels = np.atleast_1d(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)).ravel()
    for index, axes in enumerate(panels):
        if index >= dim:
            axes.set_visible(False)
            continue
        found = np.histogram(values[:, index] + 0.5, edges)[0] / (rows * expected)
        place = edges / (n + 1)
        axes.fill_between(place, np.append(low, low[-1]), np.append(high, high[-1]), step="post", color=LIGHT,
                          linewidth=0)
        axes.stairs(found, place, fill=True, color=COLOURS[0], alpha=0.55)
        axes.stairs(found, place, color=COLOURS[0], linewidth=1.2)
        axes.axhline(1, color=GREY, linewidth=0.9, linestyle="--")
        last = index + columns >= dim
        dress(axes, title=labels[index], x="rank / draws" if last else "", y="count / expected" if index % columns == 0
              else "")
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])  # short, for those of panels beside each other meet
        axes.tick_params(labelbottom=last)
    tallest = max(float(np.max(high)), *(axes.dataLim.y1 for axes in panels[:dim]))
    panels[0].set_ylim(0, 1.1 * tallest)
    figure.suptitle(f"Rank of the truth among {n:,} draws, {rows:,} test observations\n"
                    "flat: calibrated, U: too narrow, hump: too wide, slope: biased\n"
                    "grey: 95% of calibrated posteriors, bin by bin", fontsize=TEXT, color=BLACK)
    return figure


def _count_bins(rows: int, n: int) -> int:
    """As many bins as the rows fill, with equally many ranks in each where a number near that divides them."""
    most = int(np.clip(rows // _ROWS_PER_BIN, 4, 20))
    if n + 1 <= most:
        return n + 1
    return next((bins for bins in range(most, most // 2, -1) if (n + 1) % bins == 0), most)


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
