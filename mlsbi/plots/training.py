r"""How a training went."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlsbi.plots.style import (
    BLACK,
    COLOURS,
    GREY,
    TITLE,
    add_legend,
    add_note,
    axis_names,
    dress,
    level_colours,
    new_figure,
)

if TYPE_CHECKING:
    from mlsbi.training.history import History

__all__ = ["losses"]

Array: TypeAlias = np.ndarray[Any, Any]

_THIN = 1.1
_MARKED = 60  # records drawn one by one
_OFF_SCALE = 4.0  # ranges of the later losses that the first ones may exceed before the axis leaves them out


def losses(histories: Sequence[History | pd.DataFrame], names: Sequence[str] | None = None) -> Figure:
    r"""Losses over epochs and, in multilevel training, what its terms, weights and gradients did.

    Panels with nothing to show are left out: one level alone has no correction, and weights that never change
    are no curve. Transfer learning has one panel a stage, each with epochs of its own, for the networks of an ensemble
    begin a stage at different ones; the last stage picks the weights.

    Args:
        histories: One per ensemble member, drawn as thin lines: `History`, or frames with the columns of
            `History.to_frame()` and, to mark the kept epoch, a column `best_epoch`.
        names: Level names, cheapest first; not needed where one level alone was trained on. Transfer learning may
            leave the finest out of its stages.

    Raises:
        ValueError: If there is no history or none has an epoch, or `names` do not fit.
    """
    frames = [_frame(history) for history in histories]
    if not frames or any(len(frame) == 0 or "loss" not in frame for frame in frames):
        raise ValueError("Expected at least one history, each with at least one epoch and a loss. Train first.")
    if any("stage" in frame for frame in frames):
        labels = getattr(histories[0], "labels", ())
        return _draw_stages(frames, labels if any(labels) else None, names)
    levels = 1 + sum(column.startswith("fine_") for column in frames[0].columns if column != "fine_0")
    labels = [f"level {level}" for level in range(levels)]
    if names is not None and levels > 1:
        labels = axis_names(names, levels, what="level", default="level ")
    panels: list[Callable[[Axes], None]] = [lambda axes: _draw_losses(axes, frames)]
    if levels > 1:
        panels.append(lambda axes: _draw_halves(axes, frames, labels))
        if any(_varies(frame, f"weight_{level}") for frame in frames for level in range(levels - 1)):
            panels.append(lambda axes: _draw_weights(axes, frames, labels))
        if any(_recorded(frame, "correction_norm") for frame in frames):
            panels += [lambda axes: _draw_norms(axes, frames), lambda axes: _draw_angles(axes, frames)]
    if len(panels) == 1:
        figure = new_figure(6.4, 3.6)
        panels[0](figure.add_subplot())
        return figure
    rows = math.ceil(len(panels) / 2)
    figure = new_figure(9.0, 2.75 * rows)
    grid = figure.add_gridspec(rows, 2)
    odd = len(panels) % 2
    for index, draw in enumerate(panels):
        place = index + odd  # an odd number of panels: the first takes the whole first row
        draw(figure.add_subplot(grid[0, :] if odd and index == 0 else grid[place // 2, place % 2]))
    return figure


def _frame(history: History | pd.DataFrame) -> pd.DataFrame:
    if isinstance(history, pd.DataFrame):
        return history
    return history.to_frame().assign(best_epoch=history.best_epoch)


def _draw_stages(
    frames: Sequence[pd.DataFrame], labels: Sequence[str] | None, names: Sequence[str] | None
) -> Figure:
    """One panel a stage, called by its label, in which levels have their names."""
    count = 1 + max(int(_column(frame, "stage").max()) for frame in frames)
    if labels is not None:
        known = {f"level {level}": str(name) for level, name in enumerate(names or ())}
        names = [re.sub(r"\blevel \d+$", lambda found: known.get(found[0], found[0]), label) for label in labels]
    if names is not None and len(names) < count:
        raise ValueError(f"Expected at least {count} names, one per stage; got {len(names)}: {list(names)}.")
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = new_figure(9.0 if count > 1 else 6.4, 3.5 * rows)
    members = f" ({len(frames)} networks)" if len(frames) > 1 else ""
    for stage in range(count):
        axes = figure.add_subplot(rows, columns, stage + 1)
        _draw_losses(axes, [_stage(frame, stage) for frame in frames])
        name = f"level {stage}" if names is None else names[stage]
        axes.set_title("\n".join(textwrap.wrap(f"Stage {stage + 1}: {name}{members}", 36)), fontsize=TITLE,
                       color=BLACK, loc="left")
        if stage % columns:
            axes.set_ylabel("")
    return figure


def _stage(frame: pd.DataFrame, stage: int) -> pd.DataFrame:
    """The epochs of one stage, the epoch kept counted from its first: beyond its last where a later stage has it."""
    inside = _column(frame, "stage") == stage
    part = frame[inside].reset_index(drop=True)
    return part.assign(best_epoch=part["best_epoch"] - int(np.argmax(inside))) if "best_epoch" in part else part


def _draw_losses(axes: Axes, frames: Sequence[pd.DataFrame]) -> None:
    shown: list[Array] = []
    marks: list[float] = []
    for member, frame in enumerate(frames):
        label = member == 0
        train, held = _column(frame, "loss"), _column(frame, "validation_loss")
        epochs = np.arange(len(frame))
        axes.plot(epochs, train, color=GREY, linewidth=_THIN, alpha=0.8, label="training rows" if label else None)
        scored = held if np.isfinite(held).any() else train
        if scored is held:
            axes.plot(epochs, held, color=COLOURS[0], linewidth=_THIN + 0.2, label="held-out rows" if label else None)
        shown += [train, held]
        best = int(frame["best_epoch"].iloc[0]) if "best_epoch" in frame else -1
        if 0 <= best < len(frame):
            axes.plot(best, scored[best], marker="o", markersize=6, color=COLOURS[0], markeredgecolor="white",
                      linestyle="", zorder=5, label="weights kept" if label else None)
            marks.append(float(scored[best]))
    held_out = any(np.isfinite(_column(frame, "validation_loss")).any() for frame in frames)
    members = f" ({len(frames)} networks)" if len(frames) > 1 else ""
    title = "held-out rows pick the weights kept" if held_out else "no rows were held out"
    dress(axes, title=f"Loss: {title}{members}", x="epoch", y="mean loss (nats)")
    _limit(axes, shown, marks)
    _count_epochs(axes, frames)
    add_legend(axes, loc="best")


def _draw_halves(axes: Axes, frames: Sequence[pd.DataFrame], labels: Sequence[str]) -> None:
    top = len(labels) - 1
    colours = level_colours(len(labels))
    curves = [
        (f"fine_{top}", colours[top], "-", f"{labels[top]}, fine half"),
        (f"coarse_{top}", colours[top - 1], "--", f"{labels[top - 1]}, coarse half"),
        ("fine_0", colours[0], ":", f"{labels[0]}, own rows"),
    ]
    shown: list[Array] = []
    for column, colour, line, label in curves:
        for member, frame in enumerate(frames):
            values = _column(frame, column)
            axes.plot(values, color=colour, linestyle=line, linewidth=_THIN + 0.3, label=label if member == 0 else None)
            shown.append(values)
    dress(axes, title="Loss of each term on its training rows", x="epoch", y="mean loss (nats)")
    _limit(axes, shown, [])
    _count_epochs(axes, frames)
    add_legend(axes, loc="best")


def _draw_weights(axes: Axes, frames: Sequence[pd.DataFrame], labels: Sequence[str]) -> None:
    colours = level_colours(len(labels))
    for level in range(len(labels) - 1):
        for member, frame in enumerate(frames):
            axes.plot(_column(frame, f"weight_{level}"), color=colours[level], linewidth=_THIN + 0.2,
                      label=f"a{level}: {labels[level]}" if member == 0 else None)
    axes.set_ylim(min(-0.05, axes.get_ylim()[0]), max(1.05, axes.get_ylim()[1]))
    dress(axes, title="Weight of each cheaper level (finest: 1)", x="epoch", y="weight in the objective")
    _count_epochs(axes, frames)
    add_legend(axes, loc="best")


def _draw_norms(axes: Axes, frames: Sequence[pd.DataFrame]) -> None:
    curves = [("base_norm", COLOURS[1], "s", "level 0, weighted"), ("correction_norm", COLOURS[0], "o", "correction")]
    zero = False
    for column, colour, marker, label in curves:
        for member, frame in enumerate(frames):
            values = _column(frame, column)
            zero |= bool((values == 0).any())
            _draw_recorded(axes, np.where(values > 0, values, np.nan), colour, marker, label if member == 0 else None)
    axes.set_yscale("log")
    dress(axes, title="Length of the gradients", x="epoch (zeros, at weight 0, not drawn)" if zero else "epoch",
          y="norm (log scale)")
    _count_epochs(axes, frames)
    add_legend(axes, loc="best")


def _draw_angles(axes: Axes, frames: Sequence[pd.DataFrame]) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8)
    for member, frame in enumerate(frames):
        values = np.where(_column(frame, "base_norm") > 0, _column(frame, "cosine"), np.nan)
        _draw_recorded(axes, values, COLOURS[2], "o", "cosine" if member == 0 else None)
    if any((_column(frame, "projected") > 0).any() for frame in frames):
        for member, frame in enumerate(frames):
            label = "share of steps projected" if member == 0 else None
            _draw_recorded(axes, _column(frame, "projected"), COLOURS[3], "D", label)
    axes.set_ylim(-1.08, 1.08)
    axes.set_yticks([-1, -0.5, 0, 0.5, 1])
    dress(axes, title="Angle of correction and level 0 (below 0: conflict)", x="epoch", y="cosine")
    _count_epochs(axes, frames)
    add_legend(axes, loc="best")


def _draw_recorded(axes: Axes, values: Array, colour: str, marker: str, label: str | None) -> None:
    """Few records as marked points; many as a running mean over a twentieth of them, the records faint behind it."""
    epochs = np.flatnonzero(np.isfinite(values))
    known = values[epochs]
    if len(known) <= _MARKED:
        axes.plot(epochs, known, color=colour, marker=marker, markersize=4, linewidth=_THIN, label=label)
        return
    window = len(known) // 20
    axes.plot(epochs, known, color=colour, marker=".", markersize=2, linestyle="", alpha=0.25)
    mean = np.convolve(known, np.full(window, 1 / window), mode="valid")
    axes.plot(epochs[window // 2 :][: len(mean)], mean, color=colour, linewidth=_THIN + 0.4,
              label=None if label is None else f"{label}, running mean")


def _limit(axes: Axes, curves: Sequence[Array], marks: Sequence[float]) -> None:
    """Fits the axis to the losses after the first fifth; far larger ones are left out, and it says so."""
    values = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    if len(values) == 0:
        add_note(axes, "no finite loss", x=0.5, y=0.5)
        return
    settled = np.concatenate([_settled(curve) for curve in curves])
    low = float(min([np.percentile(values, 0.5), *marks]))
    high = float(max([np.percentile(settled, 97), *marks]))
    room = max(high - low, 1e-3 * max(abs(high), 1e-12))
    top = float(values.max())
    if top > high + _OFF_SCALE * room:
        axes.set_ylim(low - 0.08 * room, high + 0.55 * room)
        axes.set_xlabel(f"epoch (losses up to {top:,.4g} not shown)")
    else:
        axes.set_ylim(low - 0.06 * max(top - low, room), top + 0.06 * max(top - low, room))


def _settled(curve: Array) -> Array:
    """A curve without its first fifth."""
    finite = curve[np.isfinite(curve)]
    return finite[len(finite) // 5 :]


def _column(frame: pd.DataFrame, name: str) -> Array:
    if name not in frame:
        return np.full(len(frame), np.nan)
    return np.asarray(frame[name], dtype=np.float64)


def _varies(frame: pd.DataFrame, name: str) -> bool:
    values = _column(frame, name)
    return bool(np.isfinite(values).any()) and float(np.nanmax(values) - np.nanmin(values)) > 0


def _recorded(frame: pd.DataFrame, name: str) -> bool:
    return bool(np.isfinite(_column(frame, name)).any())


def _count_epochs(axes: Axes, frames: Sequence[pd.DataFrame]) -> None:
    """The same whole epochs along every panel."""
    longest = max(len(frame) for frame in frames)
    axes.set_xlim(-0.02 * longest, 1.02 * longest)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
