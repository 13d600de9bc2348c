r"""Where in the prior simulations fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

from mlsbi.plots.style import BLACK, COLOURS, GREY, TEXT, TRUTH, axis_names, dress, new_figure
from mlsbi.store.records import OK

if TYPE_CHECKING:
    from mlsbi.store.store import Store

__all__ = ["failures", "read_tries"]

Array = np.ndarray[Any, Any]

_BINS = 10
_MOST = 6  # parameters drawn
_DRAWN = 3000  # points of a kind in a panel
_FAILED = TRUTH  # the palette's red; nothing here has a true value
_SUCCEEDED = "#A9A9A9"
_NORMAL = 1.959964  # two-sided 95%


@dataclass(frozen=True)
class _Curve:
    """The fraction that fails along one parameter, by bins: edges `(b + 1,)`, the rest `(b,)`, NaN where no row is."""

    edges: Array
    fraction: Array
    low: Array
    high: Array
    change: float  # sum over rows of the squared difference between their bin's fraction and all rows'


def failures(
    theta: ArrayLike,
    failed: ArrayLike,
    *,
    names: Sequence[str] | None = None,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
) -> Figure:
    r"""A map of failures over the prior: which parameters a simulation fails at, one and two at a time.

    Below the diagonal are the rows, failed ones in red over grey ones that succeeded; on it is the fraction that fails
    along each parameter, in ten bins (of equal width in a box, of equally many rows without one) with 95% Wilson
    intervals, and dashed that of all rows. Of more than six parameters the six are drawn along which the fraction
    changes most, and the title says so. Of many rows every k-th is drawn; fractions are of all.

    Args:
        theta: Parameters of every row that was run, shape `(n, D)`.
        failed: Whether each row failed, booleans, shape `(n,)`.
        names: Parameter names.
        low: Lower ends of the prior's box, shape `(D,)`; with `high`, axes show the whole box.
        high: Upper ends.

    Raises:
        ValueError: If shapes do not agree, there are no rows, theta is not finite or outside the box, `failed` is not
            boolean, or only one end of the box is given.

    Example:
        >>> theta = np.random.default_rng(0).uniform(size=(200, 2))
        >>> figure = failures(theta, theta[:, 0] > 0.9, names=["rate", "shift"], low=[0, 0], high=[1, 1])
        >>> [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
        ['rate', 'shift']
    """
    values, lost = _read_rows(theta, failed)
    dim = values.shape[1]
    titles = axis_names(names, dim, what="parameter", default="theta_")
    box = _read_box(values, low, high)
    curves = [_measure(values[:, k], lost, None if box is None else box[:, k]) for k in range(dim)]
    strongest = np.argsort([-curve.change for curve in curves], kind="stable")[:_MOST]
    shown = sorted(strongest.tolist())
    limits = box if box is not None else _limits(values)
    top = min(1.02, 1.08 * max(float(np.nanmax(curves[k].high)) for k in shown))

    count = len(shown)
    figure = new_figure(6.8, 3.9) if count == 1 else new_figure(*[min(max(1.85 * count + 0.9, 5.2), 12.0)] * 2)
    grid: Any = figure.subplots(count, count, squeeze=False)
    for row, y in enumerate(shown):
        for column, x in enumerate(shown):
            axes: Axes = grid[row][column]
            if column > row:
                axes.set_visible(False)
                continue
            if column == row:
                _draw_fraction(axes, curves[x], float(lost.mean()))
                dress(axes, title="" if count == 1 else titles[x], y="fraction that fails" if count == 1 else "")
                axes.set_ylim(-0.03 * top, top)
                axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
                if count > 1:  # to the left is the panel of a pair
                    axes.yaxis.tick_right()
                    axes.spines["left"].set_visible(False)
                    axes.spines["right"].set_visible(True)
            else:
                _draw_rows(axes, values[:, [x, y]], lost)
                dress(axes, y=titles[y] if column == 0 else "", grid=None)
                axes.set_ylim(*limits[:, y])
                axes.yaxis.set_major_locator(MaxNLocator(3, prune="both"))
                axes.spines[["top", "right"]].set_visible(True)
                axes.tick_params(labelleft=column == 0)
            axes.set_xlim(*limits[:, x])
            axes.xaxis.set_major_locator(MaxNLocator(3 if count > 1 else 6, prune="both" if count > 1 else None))
            axes.tick_params(labelbottom=row == count - 1)
            if row == count - 1:
                axes.set_xlabel(titles[x])
    figure.align_labels()
    title = f"{int(lost.sum()):,} of {len(lost):,} rows failed ({_percent(float(lost.mean()))})"
    if count < dim:
        title += f"\nthe {count} of {dim} parameters along which that changes most"
    figure.suptitle(title, fontsize=TEXT + 2, color=BLACK)
    entries = {label: handle for panel in figure.axes for handle, label in
               zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=2, frameon=False,
                  fontsize=TEXT, labelcolor=BLACK, handlelength=1.8, markerscale=1.5)
    return figure


def read_tries(store: Store, level: int) -> tuple[Array, Array]:
    r"""Parameters of every row that a store has whose finest level is the given one, and which of them failed.

    Rows of all seeds count, a pilot's and test rows too: each is a draw from the prior. Shards are read one by one.

    Args:
        store: The store.
        level: Which level; negative counts from the finest.

    Returns:
        Theta `(n, D)`, and whether the row failed and was not repaired since, boolean `(n,)`; n may be 0.

    Raises:
        ValueError: If there is no such level.
        StoreError: If a shard is damaged.
    """
    count = len(store.names)
    if not -count <= level < count:
        raise ValueError(f"Expected a level from {-count} to {count - 1}; got {level}.")
    theta, failed = [np.empty((0, len(store.parameters)), np.float32)], [np.empty(0, bool)]
    for stream in store.streams:
        if stream.levels[-1] == level % count:
            for records in store.read(stream, failed=True):
                theta.append(records.theta)
                failed.append(records.status != OK)
    return np.concatenate(theta), np.concatenate(failed)


def _draw_fraction(axes: Axes, curve: _Curve, overall: float) -> None:
    here = np.isfinite(curve.fraction)
    left, right = curve.edges[:-1][here], curve.edges[1:][here]
    fraction, low, high = curve.fraction[here], curve.low[here], curve.high[here]
    axes.errorbar(
        (left + right) / 2, fraction, xerr=(right - left) / 2, yerr=[fraction - low, high - fraction], fmt="o",
        color=COLOURS[0], markersize=3.5, linewidth=1.2, label="fraction that fails per bin, 95% interval",
    )  # fmt: skip
    axes.axhline(overall, color=GREY, linewidth=1.0, linestyle="--", label="fraction of all rows")


def _draw_rows(axes: Axes, points: Array, failed: Array) -> None:
    size = float(np.clip(4000 / len(points), 3, 14))
    for what, mask, colour in (("succeeded", ~failed, _SUCCEEDED), ("failed", failed, _FAILED)):
        kind = points[mask]
        if not len(kind):
            continue
        drawn = kind[:: -(-len(kind) // _DRAWN)]  # rows are independent: every k-th is as good as any
        label = f"{what} ({len(drawn):,} of {len(kind):,} drawn)" if len(drawn) < len(kind) else what
        axes.scatter(drawn[:, 0], drawn[:, 1], s=size, color=colour, linewidths=0, alpha=0.75, label=label,
                     rasterized=True)


def _measure(values: Array, failed: Array, box: Array | None) -> _Curve:
    """The fraction that fails along a parameter; `box` are its ends, shape `(2,)`."""
    if box is not None:
        edges = np.linspace(box[0], box[1], _BINS + 1)
    else:
        edges = np.unique(np.quantile(values, np.linspace(0, 1, _BINS + 1)))
    if len(edges) == 1:  # a parameter that does not vary
        edges = edges[0] + np.array([-0.5, 0.5]) * max(abs(float(edges[0])), 1e-6)
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    n = np.bincount(bins, minlength=len(edges) - 1)
    lost = np.bincount(bins[failed], minlength=len(edges) - 1)
    fraction = np.divide(lost, n, out=np.full(len(n), np.nan), where=n > 0)
    low, high = _wilson(lost, n)
    return _Curve(edges, fraction, low, high, float(np.nansum(n * (fraction - failed.mean()) ** 2)))


def _wilson(lost: Array, n: Array) -> tuple[Array, Array]:
    """Ends of the 95% Wilson score interval of a binomial fraction; NaN for n = 0."""
    n = np.where(n > 0, n, np.nan)
    share, square = lost / n, _NORMAL**2 / n
    centre = (share + square / 2) / (1 + square)
    half = np.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return np.minimum(np.maximum(centre - half, 0), share), np.maximum(np.minimum(centre + half, 1), share)


def _read_rows(theta: ArrayLike, failed: ArrayLike) -> tuple[Array, Array]:
    values, lost = np.asarray(theta, np.float64), np.asarray(failed)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"Expected theta of shape (n, D); got {values.shape}. For one parameter pass theta[:, None].")
    if len(values) == 0:
        raise ValueError("Expected theta of at least one row; got none. Nothing has been run.")
    if lost.dtype != bool or lost.shape != values.shape[:1]:
        raise ValueError(f"Expected failed as booleans of shape {values.shape[:1]}, one per row of theta; got "
                         f"{lost.dtype} of shape {lost.shape}.")
    bad = int((~np.isfinite(values)).any(axis=1).sum())
    if bad:
        raise ValueError(f"Expected finite theta; {bad} of {len(values)} rows are not. Pass the parameters that were "
                         "drawn, not outputs.")
    return values, lost


def _read_box(values: Array, low: ArrayLike | None, high: ArrayLike | None) -> Array | None:
    if (low is None) != (high is None):
        raise ValueError("Expected low and high together; got one of them.")
    if low is None or high is None:
        return None
    ends = [np.asarray(end, np.float64) for end in (low, high)]
    if any(end.shape != values.shape[1:] for end in ends):
        raise ValueError(f"Expected low and high of shape {values.shape[1:]}, one number per parameter; got "
                         f"{ends[0].shape} and {ends[1].shape}.")
    if not (np.isfinite(ends).all() and (ends[0] < ends[1]).all()):
        raise ValueError(f"Expected finite low < high for every parameter; got {ends[0].tolist()} and "
                         f"{ends[1].tolist()}.")
    slack = 1e-5 * (ends[1] - ends[0])  # theta may have been drawn in single precision
    outside = int(((values < ends[0] - slack) | (values > ends[1] + slack)).any(axis=1).sum())
    if outside:
        raise ValueError(f"Expected theta within low and high; {outside} of {len(values)} rows are outside. Leave low "
                         "and high out, or pass those of the prior that theta was drawn from.")
    return np.stack(ends)


def _limits(values: Array) -> Array:
    """Range of the rows with a margin, shape `(2, D)`."""
    low, high = values.min(axis=0), values.max(axis=0)
    margin = np.where(high > low, 0.03 * (high - low), 0.6 * np.maximum(np.abs(high), 1e-6))
    return np.stack([low - margin, high + margin])


def _percent(share: float) -> str:
    return "less than 0.1%" if 0 < share < 5e-4 else f"{share:.1%}".replace(".0%", "%")
