r"""Horizontal bars with their numbers written behind them: one row a level."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from mlsbi.plots.style import BLACK, TEXT, log_ticks

__all__ = ["add_bars", "log_axis", "name_rows", "share_axis", "signed_axis"]

_BELOW = 3.0  # a log axis starts this factor below the smallest bar
_NAME_WIDTH = 18


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Gives the bars a log axis that fits these values and leaves room for numbers; linear if none is positive."""
    positive = [value for value in values if np.isfinite(value) and value > 0]
    if not positive:
        axes.set_xlim(0, 1)
        axes.set_xticks([0])
        return
    low, high = min(positive) / _BELOW, max(positive)
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** 0.4)
    log_ticks(axes.xaxis, *axes.get_xlim())


def share_axis(axes: Axes) -> None:
    """Gives the bars an axis from 0 to 100%, with room for numbers."""
    axes.set_xlim(0, 1.3)
    axes.set_xticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))


def signed_axis(axes: Axes, values: Sequence[float]) -> None:
    """Gives the bars an axis from 0, or from -1 if a value is negative, to 1, with room for numbers."""
    negative = any(value < 0 for value in values)
    axes.set_xlim(-1.4 if negative else 0, 1.4)
    axes.set_xticks([-1, 0, 1] if negative else [0, 0.5, 1])


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Writes the name of each row, first on top; long names are wrapped."""
    axes.set_yticks(np.arange(len(names)), [textwrap.fill(name, _NAME_WIDTH) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def add_bars(
    axes: Axes,
    values: Sequence[float],
    texts: Sequence[str],
    *,
    colours: Sequence[str],
    label: str | None = None,
    offset: float = 0.0,
    height: float = 0.62,
    filled: bool = True,
) -> None:
    r"""Draws one bar a row and writes a text behind it.

    Args:
        axes: Where to draw; the x axis is set already.
        values: Lengths. NaN, and zero on a log axis, leave the bar out but not its text.
        texts: One per row.
        colours: One per row.
        label: Legend entry.
        offset: Shift of the bars, in rows, to draw several in a row.
        height: Thickness, in rows.
        filled: Whether bars are filled, or outlined only.
    """
    log = axes.get_xscale() == "log"
    start = axes.get_xlim()[0] if log else 0.0
    for row, (value, text, colour) in enumerate(zip(values, texts, colours, strict=True)):
        drawn = bool(np.isfinite(value)) and (value > 0 or not log)
        end = float(value) if drawn else start
        if drawn:
            axes.barh(
                row + offset, end - start if log else end, height, left=start if log else 0.0, edgecolor=colour,
                linewidth=1.1, facecolor=colour if filled else "white", label=label,
            )  # fmt: skip
            label = None
        axes.annotate(
            text, (end, row + offset), xytext=(4 if end >= 0 else -4, 0), textcoords="offset points", va="center",
            ha="left" if end >= 0 else "right", fontsize=TEXT, color=BLACK,
        )  # fmt: skip
