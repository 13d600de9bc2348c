r"""The bounds drawn: variance against rows, and against the difference between levels."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mlsbi.plots.style import BLACK, GREY, TEXT, add_note, dress, level_colours, new_figure
from theory_checks.report import TheoryReport
from theory_checks.sections import Section

__all__ = ["theory_figure"]

_HEIGHT = 3.4  # inches a density
# Line, marker where there is one value alone, and name. (T) is too far up to be drawn.
_LINES: dict[str, tuple[Any, str, str]] = {"P": ("--", "v", "bound (P)"), "S": (":", "", "bounds (S0), (Sl)")}


def theory_figure(report: TheoryReport) -> Figure:
    r"""A row of two panels per density: variances and bounds against n_l, and against the level difference.

    Points are measured. Lines on the left are bounds, and the variance measured from all rows, each over n; on the
    right they have slope 2, the solid one through the smallest difference.

    Args:
        report: What `theory_report` gave.
    """
    rows = max(1, len(report.sections))
    figure = new_figure(9.2, _HEIGHT * rows + 0.6)
    figure.suptitle(f"Theory of {report.title}", fontsize=TEXT + 2, color=BLACK, x=0.01, ha="left")
    if not report.sections:
        axes = figure.subplots()
        axes.set_axis_off()
        told = textwrap.fill(f"Problem: {report.problem}", 100)
        axes.text(0.0, 0.98, told, transform=axes.transAxes, va="top", fontsize=TEXT, color=BLACK)
        return figure
    colours = level_colours(len(report.names))
    for panels, section in zip(figure.subplots(rows, 2, squeeze=False), report.sections, strict=True):
        _against_rows(panels[0], report, section, colours)
        _against_difference(panels[1], report, section, colours)
    kinds = {check.bound[0] for section in report.sections for check in section.checks if check.value > 0} & set(_LINES)
    handles = [Line2D([], [], color=colour, marker="o", markersize=4, linewidth=1.4, label=name)
               for name, colour in zip(report.names, colours, strict=True)]
    handles += [Line2D([], [], color=GREY, linewidth=1.2, linestyle=_LINES[kind][0], marker=_LINES[kind][1],
                       markersize=6, label=_LINES[kind][2]) for kind in sorted(kinds)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False, fontsize=TEXT,
                  labelcolor=BLACK)
    return figure


def _against_rows(axes: Axes, report: TheoryReport, section: Section, colours: list[str]) -> None:
    _dress(axes, f"{section.density}: a level's term", "rows n of the level", r"variance of $h_l$")
    largest = max([*report.n, *(at for slope in section.sample_slopes for at in slope.at), 2])
    n = np.array([1.0, largest])
    for check in section.checks:
        colour, kind = colours[check.level], check.bound[0]
        if kind == "P" and check.estimate > 0:
            axes.plot(n, check.estimate * check.n / n, color=colour, linewidth=1.4)
        if check.value > 0 and kind in _LINES:
            axes.plot(n, check.value * check.n / n, color=colour, linewidth=1.2, linestyle=_LINES[kind][0])
    for slope in section.sample_slopes:
        axes.plot(slope.at, slope.variances, "o", markersize=4, color=colours[slope.level])


def _against_difference(axes: Axes, report: TheoryReport, section: Section, colours: list[str]) -> None:
    slopes = [slope for slope in section.difference_slopes if not slope.reason]
    if not slopes:
        axes.set_axis_off()
        add_note(axes, "No two levels that differ", x=0.02)
        return
    _dress(axes, f"{section.density}: as levels approach each other",
           r"difference of the levels, $|G^l - G^{l-1}|_{W14}$", r"variance of $f^l - f^{l-1}$")
    for slope in slopes:
        at = np.array(slope.at) * report.norms.differences[slope.level - 1].value
        variances, colour, ends = np.array(slope.variances), colours[slope.level], at[[0, -1]]
        axes.plot(ends, variances[-1] * (ends / at[-1]) ** 2, color=colour, linewidth=1.0)
        axes.plot(at[1:], variances[1:], "o", markersize=4, markerfacecolor="white", color=colour)
        axes.plot(at[0], variances[0], "o", markersize=6, color=colour)
        for check in section.checks:
            if check.level == slope.level and check.value > 0 and check.bound == "P":
                axes.plot(at[0], check.value * check.n, _LINES["P"][1], markersize=6, color=colour)
            if check.level == slope.level and check.value > 0 and check.bound == "Sl":
                axes.plot(ends, check.value * check.n * (ends / at[0]) ** 2, color=colour, linewidth=1.2,
                          linestyle=_LINES["S"][0])
    add_note(axes, "filled: the levels as they are\nopen: the fine output drawn\ntowards the coarse one", y=0.03)


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    dress(axes, title=title, x=x, y=y, grid="both")
    axes.set_xscale("log")
    axes.set_yscale("log")
