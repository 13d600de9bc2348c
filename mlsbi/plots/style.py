r"""How all figures look: colours, font sizes, axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = [
    "BLACK", "COLOURS", "GREY", "LIGHT", "TEXT", "TITLE", "TRUTH", "add_legend", "add_note", "axis_names", "dress",
    "level_colours", "log_ticks", "new_figure",
]

TEXT = 9.0
"""Points; nothing is set smaller."""
TITLE = 10.0
_FEW_DECADES = 30.0
BLACK, GREY, LIGHT = "#222222", "#6F6F6F", "#D9D9D9"
TRUTH = "#C43C00"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D31", "#5B4B9A")
"""Okabe and Ito's palette, which readers with any colour vision tell apart, with its yellow replaced by brown."""



def new_figure(width: float, height: float) -> Figure:
    """A white figure in inches that lays itself out and belongs to no window."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def dress(
    axes: Axes, *, title: str = "", x: str = "", y: str = "", grid: Literal["x", "y", "both"] | None = "y"
) -> Axes:
    """Writes a title and axis labels and gives the axes the common look; sizes are set here, not in rcParams."""
    axes.set_facecolor("white")
    axes.set_title(title, fontsize=TITLE, color=BLACK, loc="left", fontweight="normal")
    axes.set_xlabel(x, fontsize=TEXT, color=BLACK)
    axes.set_ylabel(y, fontsize=TEXT, color=BLACK)
    axes.tick_params(which="both", labelsize=TEXT, colors=GREY, labelcolor=BLACK, width=0.7, length=3)
    axes.tick_params(which="minor", length=2)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
        spine.set_linewidth(0.7)
    axes.grid(visible=False)
    if grid is not None:
        axes.grid(visible=True, axis=grid, color="#ECECEC", linewidth=0.7)
        axes.set_axisbelow(True)
    return axes


def add_legend(axes: Axes, **options: Any) -> None:
    """A frameless legend of what has a label, if anything has."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**{"frameon": False, "fontsize": TEXT, "labelcolor": BLACK, "handlelength": 1.8, **options})


def add_note(axes: Axes, text: str, *, x: float = 0.98, y: float = 0.97) -> None:
    """A small grey remark in axes coordinates, anchored at the nearer corner."""
    axes.text(
        x, y, text, transform=axes.transAxes, fontsize=TEXT, color=GREY, linespacing=1.3,
        ha="right" if x > 0.5 else "left", va="top" if y > 0.5 else "bottom",
    )  # fmt: skip


def level_colours(levels: int) -> list[str]:
    """One colour a level, cheapest first; the finest is always blue and the one below it orange."""
    return [COLOURS[(levels - 1 - level) % len(COLOURS)] for level in range(levels)]


def axis_names(names: Sequence[str] | None, count: int, *, what: str, default: str) -> list[str]:
    """The names given, or `default` followed by a number.

    Raises:
        ValueError: If there are not `count` of them.
    """
    if names is None:
        return [f"{default}{index + 1}" for index in range(count)]
    if len(names) != count:
        raise ValueError(f"Expected {count} names, one per {what}; got {len(names)}: {list(names)}.")
    return [str(name) for name in names]


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Labels powers of ten on a log axis from low to high, and 2 and 5 between them where it spans few."""
    few = high / low < _FEW_DECADES
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=8 if few else 6))
    if few:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
