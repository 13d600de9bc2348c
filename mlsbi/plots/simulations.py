r"""What the twins of a coupled pair look like, and how alike they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from mlsbi.plots.style import BLACK, GREY, TEXT, add_legend, add_note, dress, level_colours, log_ticks, new_figure

if TYPE_CHECKING:
    from mlsbi.data import MultilevelData

__all__ = ["coupled"]

Array = np.ndarray[Any, Any]

_MARKED = 25  # more outputs than this are drawn without markers
_DECADE = 10.0
_WIDE = 300.0  # ratio of largest to smallest output from which they are drawn on a log scale
_APART = 0.09  # of an axis, between its ticks
_TAILS = 10.0  # interquartile ranges that a single output spans from which it is drawn on a scale that shrinks tails


def coupled(
    data: MultilevelData,
    *,
    axis: ArrayLike | None = None,
    x_label: str = "output",
    n: int = 4,
    names: Sequence[str] | None = None,
) -> Figure:
    r"""Fine and coarse twins of the first finest pairs over each other, and their correlation output by output.

    Outputs that are not vectors are flattened, and the axis label says so. A single output is drawn as one scatter of
    fine against coarse, on axes that are linear near zero and logarithmic far from it where its tails are long. Data
    of one level shows that level's own samples.

    Args:
        data: Coupled simulations; only the finest level's pairs are drawn.
        axis: Where the outputs lie, such as times or wavenumbers, shape `(outputs,)`; their numbers when left out.
        x_label: What `axis` is, with its unit.
        n: Pairs to draw.
        names: Names of the parameters, for the title of each pair.

    Raises:
        ValueError: If `axis` or `names` do not fit the data, `n` is below 1, or there are no pairs.
    """
    level = data.levels[-1]
    if n < 1 or len(level) == 0:
        raise ValueError(f"Expected n >= 1 and at least one row of level '{data.names[-1]}'; got n={n} and "
                         f"{len(level)} rows.")
    theta, fine = level.theta.numpy(), level.fine.reshape(len(level), -1).numpy()
    coarse = None if level.coarse is None else level.coarse.reshape(len(level), -1).numpy()
    if level.fine.ndim > 2:
        x_label = f"{x_label}, {' x '.join(map(str, level.fine.shape[1:]))} flattened"
    place = np.arange(1, fine.shape[1] + 1) if axis is None else np.asarray(axis, dtype=np.float64)
    if place.shape != fine.shape[1:]:
        raise ValueError(f"Expected axis of shape {fine.shape[1:]}, one place per output; got {place.shape}.")
    if names is not None and len(names) != theta.shape[1]:
        raise ValueError(f"Expected {theta.shape[1]} names, one per parameter; got {len(names)}: {list(names)}.")
    labels = [data.names[-1], data.names[-2] if len(data) > 1 else ""]
    if fine.shape[1] == 1:
        return _scatter(fine[:, 0], None if coarse is None else coarse[:, 0], labels, x_label)

    shown = min(n, len(level))
    columns = 1 if shown == 1 else 2
    rows = math.ceil(shown / columns)
    figure = new_figure(9.0, max(3.3, 0.9 + 1.75 * rows))
    extra = 0 if coarse is None else 1
    grid = figure.add_gridspec(rows, columns + extra, width_ratios=[1.0] * columns + [1.15] * extra)
    panels = [figure.add_subplot(grid[index // columns, index % columns]) for index in range(shown)]
    everything = fine[:shown] if coarse is None else np.concatenate([fine[:shown], coarse[:shown]])
    wide = bool((everything > 0).all()) and float(everything.max() / everything.min()) > _WIDE
    for index, axes in enumerate(panels):
        _draw_pair(axes, place, fine[index], None if coarse is None else coarse[index], labels)
        lowest = index + columns >= shown
        title = "" if names is None else ", ".join(f"{k} {v:.2g}" for k, v in zip(names, theta[index], strict=True))
        dress(axes, title=_shorten(title) or f"{'sample' if coarse is None else 'pair'} {index + 1}",
              x=x_label if lowest else "", y="output" if index % columns == 0 else "")
        axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=TEXT, color=BLACK)
        if wide:
            axes.set_yscale("log")
            log_ticks(axes.yaxis, *axes.get_ylim())
        _scale_place(axes, place, counted=axis is None)
    if coarse is not None:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False,
                      fontsize=TEXT, labelcolor=BLACK, handlelength=2.4)
    if coarse is None:
        figure.suptitle(f"Samples of '{labels[0]}'", fontsize=TEXT + 2, color=BLACK)
    else:
        figure.suptitle(f"'{labels[0]}' and '{labels[1]}' at the same parameters and noise", fontsize=TEXT + 2,
                        color=BLACK)
        _draw_correlation(figure.add_subplot(grid[:, columns]), place, fine, coarse, x_label,
                          counted=axis is None)
    return figure


def _draw_pair(axes: Axes, place: Array, fine: Array, coarse: Array | None, labels: Sequence[str]) -> None:
    marked = len(place) <= _MARKED
    low, high = level_colours(2)
    if coarse is not None:
        axes.plot(place, coarse, color=low, marker="s" if marked else "", markersize=4, linewidth=1.3, linestyle="--",
                  label=labels[1])
    axes.plot(place, fine, color=high, marker="o" if marked else "", markersize=4, linewidth=1.3, label=labels[0])


def _draw_correlation(axes: Axes, place: Array, fine: Array, coarse: Array, x_label: str, *, counted: bool) -> None:
    r = _correlations(fine, coarse)
    n = len(fine)
    known = np.isfinite(r)
    blue = level_colours(1)[0]
    if n > 3 and known.any():
        # Fisher's transform; an r of exactly 1 has no interval.
        z, half = np.arctanh(np.clip(r[known], -1 + 1e-12, 1 - 1e-12)), 1.96 / math.sqrt(n - 3)
        axes.fill_between(place[known], np.tanh(z - half), np.tanh(z + half), color=blue, alpha=0.18, linewidth=0,
                          label="95% interval")
    axes.plot(place[known], r[known], color=blue, marker="o" if len(place) <= _MARKED else "", markersize=4.5,
              linewidth=1.3, label="correlation")
    axes.axhline(0, color=GREY, linewidth=0.7)
    lowest = float(np.nanmin(r, initial=0.0))
    axes.set_ylim(0 if lowest >= 0 else max(lowest - 0.2, -1.05), 1.05)
    dress(axes, title=f"Correlation of twins per output\n({n:,} pairs; parameters vary too)", x=x_label,
          y="correlation coefficient")
    _scale_place(axes, place, counted=counted)
    add_legend(axes, loc="lower left")
    if not known.all():
        add_note(axes, f"{int((~known).sum())} constant outputs\nhave no correlation", y=0.3)


def _scatter(fine: Array, coarse: Array | None, labels: Sequence[str], x_label: str) -> Figure:
    """The one figure of data with a single output; far tails, which would hide all the rest, are drawn shrunk."""
    figure = new_figure(4.6, 4.4)
    axes = figure.add_subplot()
    colour = level_colours(1)[0]
    both = fine if coarse is None else np.concatenate([fine, coarse])
    ends = [float(both.min()), float(both.max())]
    low, middle, high = np.quantile(both, [0.25, 0.5, 0.75])
    tails = high > low and ends[1] - ends[0] > _TAILS * (high - low)
    width = max(float(high - low), abs(float(middle)))
    if tails:
        x_label = f"{x_label} (tails shrunk)"
    if coarse is None:
        edges: Any = min(40, max(5, len(fine) // 10))
        if tails:
            first, last = np.arcsinh(np.divide(ends, width))
            edges = width * np.sinh(np.linspace(first, last, edges + 1))
            edges[[0, -1]] = ends  # rounding must not leave them out
        axes.hist(fine, bins=edges, color=colour, alpha=0.8)
        dress(axes, title=f"{len(fine):,} samples of '{labels[0]}'", x=x_label, y="samples")
    else:
        axes.plot(ends, ends, color=GREY, linewidth=1.0, linestyle="--", label="the two agree")
        axes.scatter(coarse, fine, s=14, color=colour, alpha=0.7, linewidths=0)
        r, ranks = (_correlations(a[:, None], b[:, None])[0]
                    for a, b in ((fine, coarse), (rankdata(fine), rankdata(coarse))))
        dress(axes, title=f"Twins at the same parameters and noise, {len(fine):,} pairs:\ncorrelation {r:.3f}, of "
              f"their ranks {ranks:.3f}", x=f"'{labels[1]}': {x_label}", y=f"'{labels[0]}': {x_label}", grid="both")
        add_legend(axes, loc="upper left")
    if tails:
        ticks = _tail_ticks(ends, width)
        told = [f"{tick:g}".replace("-", "\u2212") for tick in ticks]
        axes.set_xscale("asinh", linear_width=width)
        axes.set_xticks(ticks, told)
        axes.set_xticks([], minor=True)
        if coarse is not None:
            axes.set_yscale("asinh", linear_width=width)
            axes.set_yticks(ticks, told)
            axes.set_yticks([], minor=True)
    return figure


def _tail_ticks(ends: Sequence[float], width: float) -> list[float]:
    """Zero, powers of ten and their doubles and halves, as many as stand apart on an asinh axis."""
    low, high = np.arcsinh(np.divide(ends, width))
    powers = 10.0 ** np.arange(np.floor(np.log10(width)), np.log10(np.abs(ends).max()))[::-1]
    kept: list[float] = []
    for tick in [0.0, *(factor * sign * power for factor in (1, 2, 5) for power in powers for sign in (1, -1))]:
        place = np.arcsinh(tick / width)
        if low <= place <= high and all(abs(place - np.arcsinh(one / width)) > _APART * (high - low) for one in kept):
            kept.append(tick)
    return sorted(kept)


def _correlations(fine: Array, coarse: Array) -> Array:
    """Pearson's r per output, NaN where a level does not vary or there is a single pair, shape `(outputs,)`."""
    a, b = fine.astype(np.float64), coarse.astype(np.float64)
    a, b = a - a.mean(0), b - b.mean(0)
    scale = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), scale, out=np.full(a.shape[1], np.nan), where=scale > 0)


def _scale_place(axes: Axes, place: Array, *, counted: bool) -> None:
    if not counted and place.min() > 0 and place.max() / place.min() > _DECADE:
        axes.set_xscale("log")
    elif counted:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _shorten(title: str, length: int = 34) -> str:
    return title if len(title) <= length else title[: length - 3].rstrip(", ") + "..."
