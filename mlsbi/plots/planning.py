r"""What a pilot measured, and how a budget was split over levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlsbi.plots.bars import add_bars, log_axis, name_rows, share_axis, signed_axis
from mlsbi.plots.style import GREY, TEXT, dress, level_colours, new_figure

if TYPE_CHECKING:
    from mlsbi.allocation.optimal import Allocation
    from mlsbi.allocation.piloting import PilotReport

__all__ = ["pilot", "plan"]

_WIDTH = 9.0
_PILOT_COLUMNS = (
    "level", "cost per run", "variance", "variance of correction", "correlation with level below", "kurtosis",
    "consistency",
)  # fmt: skip
_PLAN_KEYS = ("n", "names", "pair_costs", "cost", "shares", "rows")
_KURTOSIS_LIMIT, _CONSISTENCY_LIMIT = 100.0, 1.0


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
    frame, unit = _pilot_frame(report)
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
    dress(first, title="Variance of the loss", x="variance (log scale)", grid="x")
    log_axis(second, cost)
    add_bars(second, cost, _numbers(cost), colours=colours)
    dress(second, title="Cost of one run", x=f"{unit} (log scale)", grid="x")
    signed_axis(third, correlation)
    add_bars(third, correlation, ["" if np.isnan(r) else f"{r:.3f}" for r in correlation], colours=colours)
    dress(third, title="Correlation with level below", x="correlation of the losses", grid="x")
    _finish_rows((first, second, third), names)
    key = ("Outlined: variance of the level itself. Filled: of its term, level 0's own or the correction to the level "
           "below.")
    figure.supxlabel("\n".join([key, *_pilot_remarks(frame)]), fontsize=TEXT, color=GREY)
    return figure


def _plan_record(allocation: Allocation | Mapping[str, Any]) -> Mapping[str, Any]:
    record = allocation if isinstance(allocation, Mapping) else allocation.to_dict()
    missing = [key for key in _PLAN_KEYS if key not in record]
    if missing:
        raise ValueError(f"Expected an allocation with {', '.join(_PLAN_KEYS)}; {', '.join(missing)} missing. "
                         "Pass what optimal_allocation returned, or its to_dict().")
    return record


def _pilot_frame(report: PilotReport | pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The table of a report, and the unit of its costs."""
    if not isinstance(report, pd.DataFrame):
        return report.to_frame(), "seconds" if report.cost_unit == "seconds" else "declared units"
    missing = [column for column in _PILOT_COLUMNS if column not in report.columns]
    if missing:
        raise ValueError(f"Expected the columns of PilotReport.to_frame(); {missing} missing.")
    return report, str(report.attrs.get("cost_unit", "cost units"))


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
