r"""Turns what a user gives `optimal_allocation`, numbers or a pilot's report, into one checked record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Problem", "Report", "read_bounds", "read_budget", "read_problem", "read_targets"]

Array: TypeAlias = NDArray[np.float64]


class Report(Protocol):
    r"""What a pilot's report tells; `mlsbi.PilotReport` is one.

    `spent` is the pilot's total cost, in the unit of `costs`; `data.n` counts
    the rows per level that it leaves behind.
    """

    @property
    def variances(self) -> ArrayLike:
        r"""Variances of the corrections."""

    @property
    def costs(self) -> ArrayLike | None:
        r"""Cost of one run of each level."""

    @property
    def pair_costs(self) -> ArrayLike | None:
        r"""Cost of one row of each level's term."""

    @property
    def covariance(self) -> ArrayLike | None:
        r"""Covariance of f^0..f^L."""

    @property
    def single_level_variance(self) -> ArrayLike | None:
        r"""Var f^L."""

    @property
    def names(self) -> Sequence[str] | None:
        r"""Level names."""

    @property
    def spent(self) -> float:
        r"""Total cost of the pilot."""

    @property
    def data(self) -> Any:  # noqa: ANN401
        r"""What the pilot leaves behind, with `n`, rows per level; or `None`."""


@dataclass(frozen=True, eq=False)
class Problem:
    r"""Checked numbers, level 0 first; `K` outputs, `L + 1` levels.

    Args:
        variances: Variances of the corrections, shape `(K, L + 1)`.
        several: Whether the user gave one row of variances per output.
        pair_costs: Cost of one row of each level's term, shape `(L + 1,)`.
        costs: Cost of one run of each level, shape `(L + 1,)`, or `None`.
        covariance: Covariance of f^0..f^L per output, shape `(K, L + 1, L + 1)`, or `None`.
        single_level_variance: Var f^L per output, shape `(K,)`, or `None`.
        names: Level names.
        rows: Rows that exist already, shape `(L + 1,)`.
        sunk: Cost of everything that has been run already.
    """

    variances: Array
    several: bool
    pair_costs: Array
    costs: Array | None
    covariance: Array | None
    single_level_variance: Array | None
    names: tuple[str, ...]
    rows: Array
    sunk: float

    def cost(self, n: Array) -> float:
        r"""Total cost of sizes `n`, what has been run already included."""
        return self.sunk + float((n - self.rows) @ self.pair_costs)

    def term_cost(self, coarse: int | None, fine: int) -> float:
        r"""Cost of one row of f^fine - f^coarse, or of f^fine alone; needs `costs`."""
        if coarse is None:
            return float(self.pair_costs[0] if fine == 0 or self.costs is None else self.costs[fine])
        if coarse == fine - 1 or self.costs is None:
            return float(self.pair_costs[fine])
        return float(self.costs[fine] + self.costs[coarse])

    def term_variance(self, coarse: int | None, fine: int) -> Array:
        r"""Variance of f^fine - f^coarse, or of f^fine alone, shape `(K,)`; needs `covariance`."""
        if coarse == fine - 1 or (coarse is None and fine == 0) or self.covariance is None:
            return self.variances[:, fine]  # measured on differences, so more accurate
        own = self.covariance[:, fine, fine]
        if coarse is None:
            return own
        difference = own + self.covariance[:, coarse, coarse] - 2 * self.covariance[:, fine, coarse]
        return np.maximum(difference, 0)


def read_problem(
    source: ArrayLike | Report,
    costs: ArrayLike | None,
    pair_costs: ArrayLike | None,
    spent: ArrayLike | None,
    single_level_variance: ArrayLike | None,
    covariance: ArrayLike | None,
) -> Problem:
    r"""Reads variances and costs, or a report in their place.

    Raises:
        ValueError: If anything is missing, given twice, of the wrong shape, negative or not finite.
    """
    names: Sequence[str] | None = None
    sunk: float | None = None
    values: object = source
    if hasattr(source, "variances"):
        given = {
            "costs": costs,
            "pair_costs": pair_costs,
            "spent": spent,
            "single_level_variance": single_level_variance,
            "covariance": covariance,
        }
        twice = [name for name, value in given.items() if value is not None]
        if twice:
            raise ValueError(
                f"Expected a report alone, which has its own {', '.join(twice)}; got both. "
                "Leave them out, or pass report.variances in place of the report."
            )
        report = cast("Report", source)
        values, costs, pair_costs, names = report.variances, report.costs, report.pair_costs, report.names
        single_level_variance, covariance = report.single_level_variance, report.covariance
        spent = None if report.data is None else report.data.n
        sunk = _numbers("report.spent", report.spent, ()).item()
    variances = _array("variances", values)
    if variances.ndim not in (1, 2) or variances.size == 0:
        raise ValueError(
            f"Expected variances of shape (levels,) or (outputs, levels); got {variances.shape}. "
            "Pass one variance per level, cheapest first."
        )
    several = variances.ndim == 2
    variances = np.atleast_2d(variances)
    outputs, levels = variances.shape
    _check("variances", variances, zero=True)
    own = None if costs is None else _numbers("costs", costs, (levels,), zero=False)
    if pair_costs is not None:
        pairs = _numbers("pair_costs", pair_costs, (levels,), zero=False)
    elif own is not None:
        pairs = own + np.concatenate([[0.0], own[:-1]])
    else:
        raise ValueError(
            "Expected costs, one per level, or pair_costs; got neither. Pass costs=[...], the cost of one simulation "
            "of each level, cheapest first."
        )
    if own is None and levels == 1:
        own = pairs
    rows = np.zeros(levels) if spent is None else _counts("spent", spent, levels, least=0)
    shape = (outputs,) if several else ()
    joint = None if covariance is None else _covariance(covariance, (*shape, levels, levels))
    single = None
    if single_level_variance is not None:
        single = np.atleast_1d(_numbers("single_level_variance", single_level_variance, shape))
    elif joint is not None:
        single = joint[:, -1, -1]
    elif levels == 1:
        single = variances[:, 0]
    labels = tuple(str(i) for i in range(levels)) if names is None else tuple(str(name) for name in names)
    if len(labels) != levels:
        raise ValueError(f"Expected {levels} level names, one per variance; got {labels}. Correct report.names.")
    return Problem(
        variances=variances,
        several=several,
        pair_costs=pairs,
        costs=own,
        covariance=joint,
        single_level_variance=single,
        names=labels,
        rows=rows,
        sunk=float(rows @ pairs) if sunk is None else sunk,
    )


def read_bounds(minimum: ArrayLike, maximum: ArrayLike | None, rows: Array) -> tuple[Array, Array, Array]:
    r"""Reads bounds on sizes; rows that exist are lower bounds too.

    Returns:
        Minimum as given, lower and upper bound, each of shape `(L + 1,)`; no upper bound is infinity.

    Raises:
        ValueError: If a minimum is not a whole number of at least 1, or exceeds the maximum.
    """
    levels = len(rows)
    least = _counts("minimum", minimum, levels, least=1)
    lower = np.maximum(least, rows)
    if maximum is None:
        return least, lower, np.full(levels, np.inf)
    if isinstance(maximum, (list, tuple)):
        maximum = [math.inf if value is None else value for value in maximum]
    upper = _counts("maximum", maximum, levels, least=1)
    for i in range(levels):
        if lower[i] > upper[i]:
            what = "the minimum" if least[i] > upper[i] else "the rows that exist already"
            raise ValueError(
                f"Expected a maximum on level {i} of at least {what}, {lower[i]:.0f}; got {upper[i]:.0f}. "
                "Raise the maximum" + (" or lower the minimum." if least[i] > upper[i] else ".")
            )
    return least, lower, upper


def read_budget(budget: float, problem: Problem, smallest: float) -> float:
    r"""Reads a budget and refuses one below `smallest`.

    Raises:
        ValueError: If the budget cannot buy the least sizes; the message names the smallest that can.
    """
    value = _numbers("budget", budget, (), zero=False).item()
    if value < problem.sunk * (1 - 1e-14):  # not for one unit of rounding in a sum of costs
        raise ValueError(
            f"Expected a budget that includes the {problem.sunk!r} already spent; got {value!r}. "
            f"Raise it to at least {smallest!r}."
        )
    if value < smallest * (1 - 1e-14):
        raise ValueError(
            f"Expected a budget that buys the minimum of every level; got {value!r}. "
            f"The smallest feasible budget is {smallest!r}: raise it, or lower minimum."
        )
    return value


def read_targets(target: ArrayLike, problem: Problem, reachable: Array) -> Array:
    r"""Reads one target variance, or one per output, and refuses one below `reachable`.

    Returns:
        Shape `(K,)`.

    Raises:
        ValueError: If a target is not positive, or the maximum does not allow it.
    """
    outputs = len(problem.variances)
    given = _array("target_variance", target)
    shape = (outputs,) if problem.several and given.ndim else ()
    targets = np.broadcast_to(_numbers("target_variance", given, shape, zero=False), (outputs,)).copy()
    for k in range(outputs):
        if reachable[k] > targets[k] * (1 + 1e-14):
            where = f" of output {k}" if problem.several else ""
            raise ValueError(
                f"Expected a target variance{where} that maximum allows; got {targets[k].item()!r}. "
                f"The smallest reachable is {reachable[k].item()!r}: raise it, or raise maximum."
            )
    return targets


def _array(name: str, values: object) -> Array:
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"Expected {name} to be numbers; got {values!r}. Pass a list or an array.") from None


def _numbers(name: str, values: object, shape: tuple[int, ...], *, zero: bool = True) -> Array:
    array = _array(name, values)
    if array.shape != shape:
        what = "a single number" if shape == () else f"shape {shape}"
        raise ValueError(
            f"Expected {name} of {what} beside these variances; got shape {array.shape}. "
            "Pass one entry per level, cheapest first, and one row per output if variances have several."
        )
    _check(name, array, zero=zero)
    return array


def _check(name: str, array: Array, *, zero: bool) -> None:
    bad = ~np.isfinite(array) | ((array < 0) if zero else (array <= 0))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        at = f" at {list(place)}" if place else ""
        sign = "zero or positive" if zero else "positive"
        raise ValueError(
            f"Expected {name} to be finite and {sign}; got {array[place].item()!r}{at}. Correct it, or measure again."
        )


def _counts(name: str, values: object, levels: int, *, least: int) -> Array:
    array = _array(name, values)
    if array.ndim > 0 and array.shape != (levels,):
        raise ValueError(
            f"Expected {name} to be one whole number or {levels}, one per level; got shape {array.shape}. "
            "Pass as many as there are variances."
        )
    allowed = np.isposinf(array) if name == "maximum" else np.zeros(array.shape, dtype=bool)
    whole = np.isfinite(array) & (array >= least) & (array == np.floor(array))
    if not (whole | allowed).all():
        raise ValueError(
            f"Expected {name} to be whole numbers of at least {least}; got {values!r}. "
            + ("Every level needs a row: leave a level out of the stack to skip it." if least else "Count the rows.")
        )
    return np.broadcast_to(array, (levels,)).copy()


def _covariance(values: object, shape: tuple[int, ...]) -> Array:
    array = _array("covariance", values)
    if array.shape != shape:
        raise ValueError(
            f"Expected covariance of shape {shape}, f^0..f^L by f^0..f^L for each output; got {array.shape}. "
            "Estimate it from joint rows, for instance with numpy.cov."
        )
    if not np.isfinite(array).all():
        raise ValueError("Expected covariance to be finite; got NaN or infinity. Measure again.")
    joint = array.reshape(-1, *shape[-2:])
    spread = np.sqrt(np.maximum(np.diagonal(joint, axis1=1, axis2=2), 0))
    # Cauchy-Schwarz, with room for float32 estimates.
    room = spread[:, :, None] * spread[:, None, :] * (1 + 1e-5)
    diagonal = np.diagonal(joint, axis1=1, axis2=2)
    symmetric = np.abs(joint - joint.transpose(0, 2, 1)) <= 1e-5 * room
    if (diagonal < 0).any() or not symmetric.all() or (np.abs(joint) > room).any():
        raise ValueError(
            f"Expected covariance to be symmetric with correlations within [-1, 1]; got {values!r}. "
            "Pass covariances, not correlations or differences."
        )
    return joint
