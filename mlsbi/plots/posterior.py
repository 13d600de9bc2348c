r"""Posterior draws, one and two parameters at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_filter

from mlsbi.plots.style import BLACK, COLOURS, GREY, TEXT, TRUTH, axis_names, dress, new_figure

__all__ = ["pairs"]

Array: TypeAlias = np.ndarray[Any, Any]

_MASSES = (0.9, 0.5)
_FEWEST = 10
_BINS_1D, _BINS_2D = 160, 72
_LARGEST = 14.0  # inches


@dataclass(frozen=True)
class _Draws:
    """One set of draws and how it is drawn."""

    values: Array  # (n, D)
    label: str
    colour: str
    line: Literal["-", "--"] = "-"
    filled: bool = False


def pairs(
    samples: ArrayLike | Mapping[str, ArrayLike],
    *,
    names: Sequence[str] | None = None,
    truth: ArrayLike | None = None,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    reference: ArrayLike | None = None,
    labels: Sequence[str] | None = None,
) -> Figure:
    r"""Densities of posterior draws: single parameters on the diagonal, pairs below it.

    Contours hold 50% and 90% of the draws, 50% alone where several posteriors are compared; densities are smoothed
    histograms, reflected at the edges of the box.

    Args:
        samples: Posterior draws, shape `(n, D)`, or several sets of them by name.
        names: Parameter names.
        truth: True parameters, shape `(D,)`.
        low: Lower ends of the prior's box, shape `(D,)`; with `high`, axes show the whole box.
        high: Upper ends.
        reference: Draws from the exact posterior, shape `(m, D)`, the black dashed lines.
        labels: What the legend calls each set of draws, the reference last.

    Raises:
        ValueError: If shapes do not agree, a set has fewer than 10 draws or is not finite, or only one end of the box
            is given.
    """
    sets = _read_sets(samples, reference, labels)
    dim = sets[0].values.shape[1]
    titles = axis_names(names, dim, what="parameter", default="theta_")
    true = _read_vector("truth", truth, dim)
    if (low is None) != (high is None):
        raise ValueError("Expected low and high together; got one of them.")
    lows, highs = _read_vector("low", low, dim), _read_vector("high", high, dim)
    box = None if lows is None or highs is None else np.stack([lows, highs])
    if box is not None and not (box[0] < box[1]).all():
        raise ValueError(f"Expected low < high for every parameter; got {box[0].tolist()} and {box[1].tolist()}.")
    limits = box if box is not None else _limits(sets, true)
    masses = _MASSES if sum(draws.line == "-" for draws in sets) == 1 else _MASSES[1:]

    if dim == 1:
        return _draw_single(sets, titles[0], true, box, limits[:, 0])
    side = min(max(1.75 * dim + 0.6, 4.6), _LARGEST)
    figure = new_figure(side, side)
    grid: Any = figure.subplots(dim, dim, squeeze=False)
    for row, column in product(range(dim), range(dim)):
        axes: Axes = grid[row][column]
        if column > row:
            axes.set_visible(False)
            continue
        if column == row:
            _draw_marginal(axes, sets, row, true, box)
            dress(axes, title=_heading(titles[row], sets, row), grid=None)
            axes.set_ylim(bottom=0)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        else:
            _draw_joint(axes, sets, (column, row), true, box, masses)
            dress(axes, y=titles[row] if column == 0 else "", grid=None)
            axes.set_ylim(*limits[:, row])
            axes.yaxis.set_major_locator(MaxNLocator(3, prune="both"))
            axes.spines[["top", "right"]].set_visible(True)
            axes.tick_params(labelleft=column == 0)
        axes.set_xlim(*limits[:, column])
        axes.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
        axes.tick_params(labelbottom=row == dim - 1)
        if row == dim - 1:
            axes.set_xlabel(titles[column])
    figure.align_labels()
    figure.legend(
        handles=_handles(sets, true, box), loc="upper right", frameon=False, fontsize=TEXT, labelcolor=BLACK,
        handlelength=1.8, title=f"regions that hold {' and '.join(f'{mass:.0%}' for mass in sorted(masses))}",
        title_fontproperties={"size": TEXT}, alignment="left",
    )  # fmt: skip
    return figure


def _draw_single(
    sets: Sequence[_Draws], name: str, truth: Array | None, box: Array | None, limits: Array
) -> Figure:
    figure = new_figure(6.8, 3.5)
    axes = figure.add_subplot()
    _draw_marginal(axes, sets, 0, truth, box)
    dress(axes, title=f"Posterior of {_heading(name, sets, 0, lines=1)}", x=name, y="density")
    axes.set_xlim(*limits)
    axes.set_ylim(bottom=0)
    figure.legend(handles=_handles(sets, truth, box), loc="outside right upper", frameon=False, fontsize=TEXT,
                  labelcolor=BLACK, handlelength=1.8)
    return figure


def _draw_marginal(axes: Axes, sets: Sequence[_Draws], index: int, truth: Array | None, box: Array | None) -> None:
    if box is not None:
        axes.plot(box[:, index], [1 / (box[1, index] - box[0, index])] * 2, color=GREY, linewidth=1.0, linestyle=":")
    for draws in sets:
        density, edges = _density(draws.values[:, [index]], box if box is None else box[:, [index]], _BINS_1D)
        centres = (edges[0][1:] + edges[0][:-1]) / 2
        # To the edges: at an end of the box the density need not be zero.
        centres, density = np.concatenate([edges[0][:1], centres, edges[0][-1:]]), np.pad(density, 1, mode="edge")
        axes.plot(centres, density, color=draws.colour, linestyle=draws.line, linewidth=1.5)
        if draws.filled:
            axes.fill_between(centres, density, color=draws.colour, alpha=0.2, linewidth=0)
    if truth is not None:
        axes.axvline(truth[index], color=TRUTH, linewidth=1.4)


def _draw_joint(
    axes: Axes, sets: Sequence[_Draws], pair: tuple[int, int], truth: Array | None, box: Array | None,
    masses: Sequence[float],
) -> None:
    x, y = pair
    for draws in sets:
        values = draws.values[:, [x, y]]
        density, edges = _density(values, box if box is None else box[:, [x, y]], _BINS_2D)
        thresholds = _thresholds(density, masses)
        grid = [np.concatenate([edge[:1], (edge[1:] + edge[:-1]) / 2, edge[-1:]]) for edge in edges]
        density = np.pad(density, 1, mode="edge").T
        if len(thresholds) == 0:
            axes.plot(*values.T, color=draws.colour, marker=".", linestyle="", markersize=2)
            continue
        if draws.filled:
            for threshold, alpha in zip(thresholds, (0.18, 0.32), strict=False):
                axes.contourf(*grid, density, levels=[threshold, np.inf], colors=[draws.colour], alpha=alpha)
        axes.contour(*grid, density, levels=thresholds, colors=[draws.colour], linewidths=1.2, linestyles=[draws.line])
    if truth is not None:
        axes.axvline(truth[x], color=TRUTH, linewidth=0.9)
        axes.axhline(truth[y], color=TRUTH, linewidth=0.9)
        axes.plot(truth[x], truth[y], color=TRUTH, marker="s", markersize=4.5, linestyle="")


def _density(values: Array, box: Array | None, bins: int) -> tuple[Array, list[Array]]:
    r"""A histogram smoothed by about Scott's bandwidth, reflected at the edges of the box.

    Args:
        values: Draws, shape `(n, k)`.
        box: Ends of the prior, shape `(2, k)`, or `None`.
        bins: Cells along each axis.

    Returns:
        Densities, shape `(bins,) * k`, and the edges of the cells along each axis.
    """
    n, k = values.shape
    q25, q75 = np.quantile(values, [0.25, 0.75], axis=0)
    spread = np.minimum(values.std(axis=0), np.where(q75 > q25, (q75 - q25) / 1.34, np.inf))
    size = np.maximum(np.abs(values).max(axis=0), 1e-12)
    width = np.maximum(0.85 * spread * n ** (-1 / (k + 4)), 1e-6 * size)
    low, high = values.min(axis=0) - 4 * width, values.max(axis=0) + 4 * width
    if box is not None:
        low, high = np.where(low < box[0], np.minimum(box[0], values.min(0)), low), np.where(
            high > box[1], np.maximum(box[1], values.max(0)), high
        )
    counts, edges = np.histogramdd(values, bins=bins, range=list(zip(low, high, strict=True)), density=True)
    return gaussian_filter(counts, width / ((high - low) / bins), mode="reflect"), list(edges)


def _thresholds(density: Array, masses: Sequence[float]) -> Array:
    """Density levels whose regions hold these masses, ascending and different."""
    ordered = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    found = ordered[np.searchsorted(mass, masses).clip(max=len(ordered) - 1)]
    return np.unique(found[(found > 0) & (found < ordered[0])])


def _heading(name: str, sets: Sequence[_Draws], index: int, *, lines: int = 2) -> str:
    """A parameter's name, with its mean and standard deviation where one posterior is drawn."""
    own = [draws for draws in sets if draws.line == "-"]
    if len(own) != 1:
        return name
    mean, sd = float(own[0].values[:, index].mean()), float(own[0].values[:, index].std())
    digits = int(np.clip(1 - np.floor(np.log10(sd)), 0, 8)) if sd > 0 else 3
    plain = abs(mean) < 1e5 and (sd == 0 or sd > 1e-5)
    numbers = f"{mean:.{digits}f} ± {sd:.{digits}f}" if plain else f"{mean:.3g} ± {sd:.2g}"
    return f"{name}\n{numbers}" if lines == 2 else f"{name}: {numbers}"


def _handles(sets: Sequence[_Draws], truth: Array | None, box: Array | None) -> list[Line2D]:
    handles = [Line2D([], [], color=d.colour, linestyle=d.line, linewidth=1.6, label=d.label) for d in sets]
    if box is not None:
        handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label="prior"))
    if truth is not None:
        handles.append(Line2D([], [], color=TRUTH, linewidth=1.4, label="true value"))
    return handles


def _limits(sets: Sequence[_Draws], truth: Array | None) -> Array:
    """Range of all draws and of the truth with a margin, shape `(2, D)`."""
    values = np.concatenate([draws.values for draws in sets] + ([] if truth is None else [truth[None]]))
    low, high = values.min(axis=0), values.max(axis=0)
    margin = np.maximum(0.05 * (high - low), 1e-6 * np.maximum(np.abs(high), 1e-6))
    return np.stack([low - margin, high + margin])


def _read_sets(
    samples: ArrayLike | Mapping[str, ArrayLike], reference: ArrayLike | None, labels: Sequence[str] | None
) -> list[_Draws]:
    given = dict(samples) if isinstance(samples, Mapping) else {"posterior": samples}
    if not given:
        raise ValueError("Expected at least one set of posterior draws; got an empty dictionary.")
    found = [
        _Draws(_read_draws(str(name), values), str(name), COLOURS[index % len(COLOURS)], filled=len(given) == 1)
        for index, (name, values) in enumerate(given.items())
    ]
    if reference is not None:
        found.append(_Draws(_read_draws("reference", reference), "reference posterior", BLACK, "--"))
    if len({draws.values.shape[1] for draws in found}) > 1:
        raise ValueError("Expected draws of the same number of parameters; got shapes "
                         f"{', '.join(f'{d.label} {d.values.shape}' for d in found)}.")
    if labels is None:
        return found
    if len(labels) != len(found):
        raise ValueError(f"Expected {len(found)} labels, one per set of draws; got {len(labels)}: {list(labels)}.")
    return [replace(draws, label=str(label)) for draws, label in zip(found, labels, strict=True)]


def _read_draws(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"Expected draws '{name}' of shape (n, D); got {array.shape}. For one parameter pass "
                         "samples[:, None].")
    if len(array) < _FEWEST or not np.isfinite(array).all():
        raise ValueError(f"Expected at least {_FEWEST} finite draws '{name}'; got {len(array)} rows, "
                         f"{int((~np.isfinite(array)).any(axis=1).sum())} of them not finite.")
    return array


def _read_vector(name: str, values: ArrayLike | None, dim: int) -> Array | None:
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (dim,):
        raise ValueError(f"Expected {name} of shape ({dim},), one number per parameter; got {array.shape}.")
    return array
