r"""Turns what a user gives `optimal_allocation`, numbers or a pilot's report, into one checked record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike

from mlsbi.allocation.arrays import Array, check_range, read_array, read_counts, read_numbers

__all__ = ["Problem", "Report", "read_problem"]

# Of Var f^l + Var f^{l-1}, or of the correction if that varies more: room for float32 and for divisors n and n - 1
# beside each other from 50 rows on. Other rows, other units or correlations in the place of covariances differ by more.
_AGREEMENT = 0.02


class Report(Protocol):
    r"""What a pilot's report tells; `mlsbi.PilotReport` is one.

    `spent` is the pilot's total cost, in the unit of `costs`; `data.n` counts
    the rows per level that it leaves behind. A report of one output may also
    have `variance_draws`, bootstrap draws of `variances`, shape `(draws, L + 1)`;
    one without them, or with `None`, gives no intervals.
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
        draws: Bootstrap draws of the variances of one output, shape `(draws, L + 1)`, or `None`.
        variance_unit: What variances of each output are multiples of, shape `(K,)`.
        cost_unit: What costs are multiples of.
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
    draws: Array | None
    variance_unit: Array
    cost_unit: float = 1.0

    def scaled(self) -> Problem:
        r"""The same problem in units of about its largest variance and its largest cost, whose products are finite.

        They are powers of four, so no digit of a sum, a product or a square root changes.
        """
        largest = self.variances.max(axis=1)
        if self.covariance is not None:
            largest = np.maximum(largest, np.diagonal(self.covariance, axis1=1, axis2=2).max(axis=1))
        unit, cost = _power_of_four(largest), _power_of_four(self.pair_costs.max()).item()
        single = self.single_level_variance
        return replace(
            self,
            variances=self.variances / unit[:, None],
            pair_costs=self.pair_costs / cost,
            costs=None if self.costs is None else self.costs / cost,
            covariance=None if self.covariance is None else self.covariance / unit[:, None, None],
            single_level_variance=None if single is None else single / unit,
            sunk=self.sunk / cost,
            draws=None if self.draws is None else self.draws / unit,
            variance_unit=self.variance_unit * unit,
            cost_unit=self.cost_unit * cost,
        )

    def label(self, level: int) -> str:
        r"""A level's name, or its number if it has none."""
        name = self.names[level]
        return f"level {level}" if name == str(level) else name

    def place(self, level: int) -> str:
        r"""A level's number, and its name if it has one."""
        number, label = f"level {level}", self.label(level)
        return number if label == number else f"{number} ({label})"

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
        # Rounding, where the two hardly differ: but standard deviations of differences obey the triangle inequality.
        steps = np.sqrt(self.variances[:, coarse + 1 : fine + 1])
        farthest = steps.sum(axis=1)
        nearest = np.maximum(2 * steps.max(axis=1) - farthest, 0)
        return np.clip(difference, nearest**2, farthest**2)


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
    draws: object = None
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
        sunk = read_numbers("report.spent", report.spent, ()).item()
        draws = getattr(report, "variance_draws", None)
    variances = read_array("variances", values)
    if variances.ndim not in (1, 2) or variances.size == 0:
        raise ValueError(
            f"Expected variances of shape (levels,) or (outputs, levels); got {variances.shape}. "
            "Pass one variance per level, cheapest first."
        )
    several = variances.ndim == 2
    variances = np.atleast_2d(variances)
    outputs, levels = variances.shape
    check_range("variances", variances, zero=True)
    own = None if costs is None else read_numbers("costs", costs, (levels,), zero=False)
    if pair_costs is not None:
        pairs = read_numbers("pair_costs", pair_costs, (levels,), zero=False)
    elif own is not None:
        pairs = own + np.concatenate([[0.0], own[:-1]])
    else:
        raise ValueError(
            "Expected costs, one per level, or pair_costs; got neither. Pass costs=[...], the cost of one simulation "
            "of each level, cheapest first."
        )
    if own is None and levels == 1:
        own = pairs
    if covariance is None and levels == 1:
        covariance = variances[:, :, None] if several else variances
    rows = np.zeros(levels) if spent is None else read_counts("spent", spent, levels, least=0)
    shape = (outputs,) if several else ()
    joint = None if covariance is None else _covariance(covariance, (*shape, levels, levels))
    single = None
    if single_level_variance is not None:
        single = np.atleast_1d(read_numbers("single_level_variance", single_level_variance, shape))
    elif joint is not None:
        single = joint[:, -1, -1]
    labels = tuple(str(i) for i in range(levels)) if names is None else tuple(str(name) for name in names)
    if len(labels) != levels:
        raise ValueError(f"Expected {levels} level names, one per variance; got {labels}. Correct report.names.")
    problem = Problem(
        variances=variances,
        several=several,
        pair_costs=pairs,
        costs=own,
        covariance=joint,
        single_level_variance=single,
        names=labels,
        rows=rows,
        sunk=float(rows @ pairs) if sunk is None else sunk,
        draws=None if draws is None else _draws(draws, variances.shape),
        variance_unit=np.ones(outputs),
    )
    _check_agreement(problem.scaled())
    return problem


def _power_of_four(values: Array) -> Array:
    r"""The largest power of four not above each value; 1 for 0."""
    exponents = np.frexp(values)[1] - 1
    return np.where(values > 0, np.ldexp(1.0, exponents - exponents % 2), 1.0)


def _draws(values: object, shape: tuple[int, ...]) -> Array:
    array = read_array("variance_draws", values)
    if shape[0] > 1 or array.ndim != 2 or array.shape[1] != shape[1] or not len(array):
        raise ValueError(
            f"Expected variance_draws of shape (draws, {shape[1]}), for one output; got {array.shape} for {shape[0]}. "
            "Pass one row of variances per bootstrap draw, or None."
        )
    check_range("variance_draws", array, zero=True)
    return array


def _check_agreement(problem: Problem) -> None:
    if problem.covariance is None:
        return
    own = np.diagonal(problem.covariance, axis1=1, axis2=2)
    scale, implied = own.copy(), own.copy()
    scale[:, 1:] += own[:, :-1]
    implied[:, 1:] += own[:, :-1] - 2 * np.diagonal(problem.covariance, 1, axis1=1, axis2=2)
    wrong = np.argwhere(np.abs(problem.variances - implied) > _AGREEMENT * np.maximum(scale, implied))
    if len(wrong):
        output, level = (int(i) for i in wrong[0])
        of = f" of output {output}" if problem.several else ""
        given, says = (float(v[output, level] * problem.variance_unit[output]) for v in (problem.variances, implied))
        raise ValueError(
            f"Expected variances and covariance to agree; for {problem.place(level)}{of} the variance is "
            f"{given:.6g}, and the covariance says {says:.6g}. "
            "Measure both on the same rows, with the same divisor."
        )


def _covariance(values: object, shape: tuple[int, ...]) -> Array:
    array = read_array("covariance", values)
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
