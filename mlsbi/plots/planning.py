r"""What a pilot measured, how a budget was split over levels, and what each level is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlsbi.plots.bars import add_bars, log_axis, name_rows, share_axis, signed_axis
from mlsbi.plots.style import BLACK, GREY, TEXT, dress, level_colours, log_ticks, new_figure

if TYPE_CHECKING:
    from mlsbi.allocation.comparing import ErrorCurve
    from mlsbi.allocation.optimal import Allocation
    from mlsbi.allocation.pilot_report import PilotReport

__all__ = ["errors", "pilot", "plan"]

Array: TypeAlias = np.ndarray[Any, Any]

_WIDTH = 9.0
_PILOT_COLUMNS = (
    "level", "cost per run", "variance", "variance of correction", "correlation with level below", "kurtosis",
    "consistency",
)  # fmt: skip
_PLAN_KEYS = ("n", "names", "pair_costs", "cost", "shares", "rows")
_KURTOSIS_LIMIT, _CONSISTENCY_LIMIT = 100.0, 1.0
_LINE_GAP, _LEADER = 13.0, 16.0  # points between the names at the ends of lines, and from a line to its name


def plan(allocation: Allocation | Mapping[str, Any]) -> Figure:
    r"""Rows of each level, and each level's share of the cost and of the estimator's variance.

    Where the two shares agree level by level, no other split does better.

    Args:
        allocation: What `optimal_allocation` returned, or its `to_dict()`.

    Raises:
        ValueError: If a dictionary lacks a key.
    """
    record = _plan_record(allocation)
    n, total = [int(value) for value in record["n"]], float(record["cost"])
    names = [_level_name(name) for name in record["names"]]
    shares = [float(value) for value in record["shares"]]
    spent = [rows * float(cost) / total for rows, cost in zip(n, record["pair_costs"], strict=True)]
    colours = level_colours(len(n))
    figure = new_figure(_WIDTH, 1.25 + 0.42 * len(n))
    first, second, third = figure.subplots(1, 3, sharey=True, width_ratios=[1.35, 1, 1])

    log_axis(first, n)
    add_bars(first, n, [_count(rows, old) for rows, old in zip(n, record["rows"], strict=True)], colours=colours)
    dress(first, title="Rows to simulate", x="rows (log scale)", grid="x")
    share_axis(second)
    add_bars(second, spent, [_percent(share) for share in spent], colours=colours)
    dress(second, title="Share of the cost", x=f"share of {total:,.6g} cost units", grid="x")
    share_axis(third)
    add_bars(third, shares, [_percent(share) for share in shares], colours=colours)
    dress(third, title="Share of the variance", x="share of the estimator's variance", grid="x")
    _finish_rows((first, second, third), names)
    elsewhere = 1 - sum(spent)
    if elsewhere > 0.005:
        figure.supxlabel(f"The other {elsewhere:.0%} of the cost went to pilot runs that are no rows of these levels.",
                         fontsize=TEXT, color=GREY)
    return figure


def pilot(report: PilotReport | pd.DataFrame) -> Figure:
    r"""What each level's correction and runs cost in variance and in time, and how closely the levels are coupled.

    Levels pay off where corrections vary much less than the levels themselves, and cheap levels cost much less.

    Args:
        report: What `pilot` returned, or its `to_frame()`.

    Raises:
        ValueError: If a frame lacks a column.
    """
    frame, unit, of = _pilot_frame(report)
    names = [_level_name(name) for name in frame["level"]]
    own, correction, cost, correlation = (
        [_measured(value) for value in frame[column]]
        for column in ("variance", "variance of correction", "cost per run", "correlation with level below")
    )
    colours = level_colours(len(names))
    figure = new_figure(_WIDTH, 1.5 + 0.5 * len(names))
    first, second, third = figure.subplots(1, 3, sharey=True, width_ratios=[1.5, 1, 1])

    log_axis(first, [*own, *correction])
    grey = [GREY] * len(names)
    add_bars(first, own, _numbers(own), colours=grey, offset=-0.2, height=0.34, filled=False)
    add_bars(first, correction, _numbers(correction), colours=colours, offset=0.2, height=0.34)
    dress(first, title=f"Variance of the {of}", x="variance (log scale)", grid="x")
    log_axis(second, cost)
    add_bars(second, cost, _numbers(cost), colours=colours)
    dress(second, title="Cost of one run", x=f"{unit} (log scale)", grid="x")
    signed_axis(third, correlation)
    add_bars(third, correlation, ["" if np.isnan(r) else f"{r:.3f}" for r in correlation], colours=colours)
    dress(third, title="Correlation with level below", x=f"correlation of the {of}", grid="x")
    _finish_rows((first, second, third), names)
    key = ("Outlined: variance of the level itself. Filled: of its term, level 0's own or the correction to the level "
           "below.")
    figure.supxlabel("\n".join([key, *_pilot_remarks(frame)]), fontsize=TEXT, color=GREY)
    return figure


def errors(
    curves: Sequence[ErrorCurve],
    budget: float | None = None,
    *,
    unit: str = "cost units",
    label: str = "standard error of the mean loss (nats, log scale)",
) -> Figure:
    r"""Predicted error against the budget, for all levels, without each of them, and for the finest alone.

    A level is worth its runs where the line without it lies above that of all levels. Names at the ends of the lines
    say by how much: how the error compares with that of all levels at the planned budget, or else the largest.

    Args:
        curves: What `error_curves` returned.
        budget: The planned one, marked by a vertical line, and by a point on each line that has it.
        unit: Unit of the budgets.
        label: What the errors are, with their unit.

    Raises:
        ValueError: If there is no curve, curves have different budgets, or the budget is not positive and finite.
    """
    if not len(curves) or any(curve.budgets != curves[0].budgets for curve in curves):
        raise ValueError(f"Expected curves, all at the same budgets; got {len(curves)} that differ. Pass what "
                         "error_curves returned." if len(curves) else "Expected at least one curve; got none.")
    if budget is not None and not (np.isfinite(budget) and budget > 0):
        raise ValueError(f"Expected a positive, finite budget; got {budget!r}.")
    order = np.argsort(curves[0].budgets)
    costs = np.asarray(curves[0].budgets, float)[order]
    values = np.array([curve.errors for curve in curves], float)[:, order]
    at = int(np.flatnonzero(costs == budget)[0]) if budget in costs else -1
    figure = new_figure(_WIDTH, max(4.2, 0.9 + _LINE_GAP / 72 * len(curves)))
    axes = figure.add_subplot()
    key = f" (percent: against all levels, {'planned' if at >= 0 else 'largest'} budget)" * (len(curves) > 1)
    dress(axes, title=f"What each level is worth: predicted error{key}",
          x=f"cost of the rows, pilot left out ({unit}, log scale)", y=label, grid="both")
    _scale_errors(axes, costs, values)
    every = max(curves, key=lambda curve: len(curve.levels)).levels
    whole = next(row[at] for row, curve in zip(values, curves, strict=True) if curve.levels == every)
    ends, remarks = [], []
    for curve, row in zip(curves, values, strict=True):
        look = _look(curve.levels, every)
        axes.plot(costs, np.where(row > 0, row, np.nan), label=curve.label, **look)
        if at >= 0 and row[at] > 0:
            axes.plot(costs[at], row[at], "o", markersize=6, color=look["color"], markeredgecolor="white", zorder=5)
        if row[-1] > 0:
            more = f" {row[at] / whole - 1:+.0%}" if curve.levels != every and row[at] > 0 and whole > 0 else ""
            ends.append((float(row[-1]), curve.label + more.replace("-", "−"), str(look["color"])))
        else:
            remarks.append(f"{curve.label}: " + ("no error." if (row == 0).any() else "no budget here buys it."))
    if budget is not None:
        _mark_budget(axes, budget)
    figure.supxlabel("\n".join(remarks), fontsize=TEXT, color=GREY)
    _name_ends(axes, ends)
    return figure


def _scale_errors(axes: Axes, costs: Array, values: Array) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(costs[0], max(costs[-1], 1.1 * costs[0]))
    log_ticks(axes.xaxis, *axes.get_xlim())
    shown = values[values > 0]
    if shown.size:
        axes.set_ylim(shown.min() / 1.3, shown.max() * 1.3)
        log_ticks(axes.yaxis, *axes.get_ylim())


def _look(levels: tuple[int, ...], every: tuple[int, ...]) -> dict[str, Any]:
    """All levels as a broad black line under the others, the finest alone grey, else the colour of what is left out."""
    if levels == every:
        return {"color": BLACK, "linewidth": 3.6, "zorder": 2}
    if levels == every[-1:]:
        return {"color": GREY, "linewidth": 1.5, "linestyle": "--", "zorder": 3}
    return {"color": level_colours(len(every))[min(set(every) - set(levels))], "linewidth": 1.5, "zorder": 4}


def _mark_budget(axes: Axes, budget: float) -> None:
    axes.axvline(budget, color=BLACK, linewidth=0.9, linestyle=":", zorder=1)
    low, high = axes.get_xlim()
    left = budget > low * (high / low) ** 0.75  # to the right there is room at the top, since lines fall
    number = f"{budget:,.0f}" if budget >= 1000 else f"{budget:.4g}"
    axes.annotate(f"planned: {number}", (budget, 1), xycoords=axes.get_xaxis_transform(),
                  xytext=(-4 if left else 4, -2), textcoords="offset points", ha="right" if left else "left",
                  va="top", fontsize=TEXT, color=BLACK)


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes each line's name beside its right end, names apart from each other and tied to their lines."""
    ends = sorted(ends)
    names = [
        axes.annotate(name, (1, value), xycoords=axes.get_yaxis_transform(), xytext=(_LEADER, 0),
                      textcoords="offset points", va="center", fontsize=TEXT, color=BLACK, annotation_clip=False)
        for value, name, _ in ends
    ]  # fmt: skip
    figure: Any = axes.figure
    figure.draw_without_rendering()  # the layout decides how high the axes are
    points = 72 / figure.dpi * axes.get_window_extent().height
    low, high = np.log(axes.get_ylim())
    wanted = [points * (np.log(value) - low) / (high - low) for value, _, _ in ends]
    places: list[float] = []
    for place in wanted:  # upwards, then those that stick out at the top are pushed back down
        places.append(max(place, places[-1] + _LINE_GAP if places else 0.0))
    roof = points
    for index in reversed(range(len(places))):
        places[index] = min(places[index], roof)
        roof = places[index] - _LINE_GAP
    for text, place, want, (value, _, colour) in zip(names, places, wanted, ends, strict=True):
        text.set_position((_LEADER, place - want))
        axes.annotate("", (1, value), xycoords=axes.get_yaxis_transform(), xytext=(_LEADER - 3, place - want),
                      textcoords="offset points", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0})


def _plan_record(allocation: Allocation | Mapping[str, Any]) -> Mapping[str, Any]:
    record = allocation if isinstance(allocation, Mapping) else allocation.to_dict()
    missing = [key for key in _PLAN_KEYS if key not in record]
    if missing:
        raise ValueError(f"Expected an allocation with {', '.join(_PLAN_KEYS)}; {', '.join(missing)} missing. "
                         "Pass what optimal_allocation returned, or its to_dict().")
    return record


def _pilot_frame(report: PilotReport | pd.DataFrame) -> tuple[pd.DataFrame, str, str]:
    """The table of a report, the unit of its costs, and what its variances are of."""
    if not isinstance(report, pd.DataFrame):
        return report.to_frame(), "seconds" if report.cost_unit == "seconds" else "declared units", report.integrand
    missing = [column for column in _PILOT_COLUMNS if column not in report.columns]
    if missing:
        raise ValueError(f"Expected the columns of PilotReport.to_frame(); {missing} missing.")
    return report, str(report.attrs.get("cost_unit", "cost units")), str(report.attrs.get("integrand", "loss"))


def _pilot_remarks(frame: pd.DataFrame) -> list[str]:
    remarks = []
    for name, kurtosis, consistency in zip(frame["level"], frame["kurtosis"], frame["consistency"], strict=True):
        if _measured(kurtosis) > _KURTOSIS_LIMIT:
            remarks.append(f"{name}: kurtosis {float(kurtosis):.0f}, a few rare rows decide this variance.")
        if _measured(consistency) > _CONSISTENCY_LIMIT:
            remarks.append(f"{name}: consistency {float(consistency):.2f} > 1, its coarse halves do not have the law "
                           "of the level below.")
    return remarks


def _finish_rows(panels: Sequence[Axes], names: Sequence[str]) -> None:
    for axes in panels:
        name_rows(axes, names)


def _measured(value: Any) -> float:
    """A number; NaN for what a saved table holds as `None`."""
    return np.nan if value is None else float(value)


def _level_name(name: Any) -> str:
    return f"level {name}" if str(name).isdigit() else str(name)


def _count(n: int, before: Any) -> str:
    return f"{n:,} ({int(before):,} exist)" if int(before) else f"{n:,}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"


def _numbers(values: Sequence[float]) -> list[str]:
    return ["not measured" if np.isnan(value) else f"{value:.3g}" for value in values]
