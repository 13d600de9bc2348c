r"""How rounds of sequential inference closed in on a posterior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy.stats import gaussian_kde

from mlsbi.plots.style import COLOURS, GREY, add_legend, axis_names, dress, level_colours, new_figure

__all__ = ["rounds"]

_WIDTH = 9.0
_ACROSS = 3  # parameters side by side
_GRID = 200


def rounds(
    done: Sequence[Mapping[str, Any]],
    draws: ArrayLike,
    *,
    levels: Sequence[str],
    names: Sequence[str] | None = None,
    exact: ArrayLike | None = None,
) -> Figure:
    r"""Share of the prior and rows of every round, and each parameter's marginal after it.

    Args:
        done: One record a round, with `share`, and `n` and `inside` of every level, such as
            `dataclasses.asdict(SequentialInference.rounds[0])`.
        draws: Draws of the posterior after each round, shape `(rounds, n, D)`.
        levels: Level names.
        names: Parameter names.
        exact: Draws of the exact posterior, shape `(m, D)`.

    Raises:
        ValueError: If there are not as many records as rounds, or none.
    """
    theta = np.asarray(draws, float)
    if theta.ndim != 3 or len(theta) != len(done) or not len(done):
        raise ValueError(f"Expected draws of shape ({len(done)}, n, D), one set for each round, at least one; got "
                         f"{theta.shape}.")
    labels = axis_names(names, theta.shape[2], what="parameter", default="theta")
    across = min(len(labels), _ACROSS)
    below, wide = -(-len(labels) // across), 6 // across
    figure = new_figure(_WIDTH, 2.7 + 2.4 * below)
    grid = figure.add_gridspec(1 + below, 6)
    _draw_shares(figure.add_subplot(grid[0, :3]), done)
    _draw_rows(figure.add_subplot(grid[0, 3:]), done, levels)
    for index, label in enumerate(labels):
        first = wide * (index % across)
        axes = figure.add_subplot(grid[1 + index // across, first: first + wide])
        _draw_marginals(axes, theta[:, :, index], None if exact is None else np.asarray(exact, float)[:, index])
        dress(axes, title=label, grid="x")
        axes.set_yticks([])
        if not index:
            add_legend(axes, loc="best", fontsize=7)
    return figure


def _draw_shares(axes: Any, done: Sequence[Mapping[str, Any]]) -> None:
    shares = [float(each["share"]) for each in done]
    place = np.arange(1, len(done) + 1)
    axes.plot(place, shares, "o-", color=COLOURS[0])
    if min(shares) < 0.1:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08)
    for x, share in zip(place, shares, strict=True):
        axes.annotate(f"{share:.2g}", (x, share), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axes.margins(y=0.25)
    dress(axes, title="share of the prior", x="round", grid="y")
    axes.set_xticks(place)


def _draw_rows(axes: Any, done: Sequence[Mapping[str, Any]], levels: Sequence[str]) -> None:
    place, width = np.arange(1, len(done) + 1), 0.8 / len(levels)
    for index, (level, colour) in enumerate(zip(levels, level_colours(len(levels)), strict=True)):
        new = np.array([each["n"][index] for each in done], float)
        old = np.array([each["inside"][index] for each in done], float) - new
        at = place + (index - (len(levels) - 1) / 2) * width
        axes.bar(at, new, width, color=colour, label=level)
        axes.bar(at, np.maximum(old, 0), width, bottom=new, color=colour, alpha=0.35)
    axes.set_yscale("log")
    axes.set_ylim(0.8, 8 * max(max(each["inside"]) for each in done))  # room for the names
    dress(axes, title="rows inside: new, and of earlier rounds (pale)", x="round", grid="y")
    axes.set_xticks(place)
    add_legend(axes, loc="upper right", fontsize=7, ncols=len(levels))


def _draw_marginals(axes: Any, draws: np.ndarray[Any, Any], exact: np.ndarray[Any, Any] | None) -> None:
    """Smoothed marginals, later rounds darker."""
    last = draws[-1] if exact is None else np.concatenate([draws[-1], exact])
    low, high = np.quantile(last, [0.001, 0.999])
    grid = np.linspace(low - 0.5 * (high - low), high + 0.5 * (high - low), _GRID)
    inside = (grid >= min(draws.min(), last.min())) & (grid <= max(draws.max(), last.max()))
    grid = grid[inside] if inside.any() else grid
    for number, own in enumerate(draws, 1):
        strength = 0.25 + 0.75 * number / len(draws)
        if np.ptp(own) > 0:
            axes.plot(grid, gaussian_kde(own)(grid), color=COLOURS[0], alpha=strength, linewidth=1.6,
                      label=f"after round {number}")
    if exact is not None and np.ptp(exact) > 0:
        axes.plot(grid, gaussian_kde(exact)(grid), color="black", linestyle="--", linewidth=1.2, label="exact")
    axes.axhline(0, color=GREY, linewidth=0.6)
