r"""Whether cheap levels are worth their runs, for multilevel training and for transfer learning."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from torch import Tensor

from mlsbi.allocation.problem import Problem, Report, read_problem
from mlsbi.diagnostics.arrays import Array
from mlsbi.diagnostics.information import FEWEST, Coherence, MutualInformation, coherence, mutual_information
from mlsbi.levels import LevelStack
from mlsbi.priors import Unbounded, check_theta, parameter_names
from mlsbi.simulation.repeats import simulate_repeats
from mlsbi.simulation.running import RunOptions
from mlsbi.simulation.scheduling import OnFailure
from mlsbi.store.store import Store

__all__ = ["LevelTransfer", "Piloted", "TransferReport", "transfer"]

_CLEARLY = 1.1  # times less cost, below which a level makes no difference worth a word
_MISPLACED = 0.1  # share of variance that a linear map finds and entries in place do not
_FEW = 50  # rows below which much of the information is missed
_INTERVAL = (0.05, 0.95)
_LEGEND = (
    "cost factor: cost without the level over cost with it, other levels at their best, for the same variance",
    "information: what both levels' outputs know of theta, at least, in nats per parameter",
    "carried: the same, read from both as a network would that was trained on the level",
    "coherence: share of the finest level's outputs that a linear map of the level's explains; in place: entry by "
    "entry",
    "score: carried * in place / coherence, to compare levels for transfer learning",
)


class Piloted(Report, Protocol):
    r"""What is read of a pilot's report; `mlsbi.PilotReport` is one.

    It may also have `covariance_draws`, bootstrap draws of `covariance`, shape `(draws, L + 1, L + 1)`; one without
    them, or with `None`, gives no intervals.
    """

    @property
    def cost_unit(self) -> str:
        r"""Unit of the costs."""

    @property
    def theta(self) -> Tensor:
        r"""Parameters of the joint rows, shape `(n, D)`."""

    @property
    def outputs(self) -> Sequence[Tensor]:
        r"""Their output at each level, each `(n, ...)`."""


@dataclass(frozen=True, eq=False)
class LevelTransfer:
    r"""What one cheap level is worth.

    Args:
        name: Its name.
        cost_factor: How many times the cost would be for the same variance of the multilevel loss without it, of the
            best levels without it against the best with it; below 1 it is better left out. NaN where the finest
            level's losses do not vary.
        cost_interval: 90% interval of that, over those of the report's bootstrap draws in which the finest level's
            losses vary; `None` without draws.
        correlation: Of its losses with the finest level's; NaN where either does not vary.
        information: What its outputs and the finest level's know together about theta.
        coherence: How much its outputs explain of the finest level's.
        rows: Rows that information was measured on.
        verdict: All that in a sentence.
    """

    name: str
    cost_factor: float
    cost_interval: tuple[float, float] | None
    correlation: float
    information: MutualInformation
    coherence: Coherence
    rows: int
    verdict: str

    @property
    def variance_reduction(self) -> float:
        """Share of the variance that it takes away at equal cost; negative where it adds some."""
        return 1 - 1 / self.cost_factor

    @property
    def score(self) -> float:
        """What transfer learning from it brings, to compare levels by: carried information times alignment, in nats.

        A network trained on the level reads the finest level's outputs as it would read its own: `carried` is what
        that says of theta. It is measured from few rows, so that it misses some of what mixed or reordered entries
        spoil; `alignment` sees that at any noise. NaN where outputs have other shapes.
        """
        return _score(self.information, self.coherence)


@dataclass(frozen=True, eq=False)
class TransferReport:
    r"""Whether each cheap level is worth its runs.

    Args:
        levels: One record per level but the finest, cheapest first.
        finest: Name of the finest level.
        summaries: What the information is about: parameters, or columns of the user's summary.
        spent: Cost of the runs that it needed, in `cost_unit`, of those that the store had already too.
        cost_unit: `"declared"` or `"seconds"`.
    """

    levels: tuple[LevelTransfer, ...]
    finest: str
    summaries: tuple[str, ...]
    spent: float
    cost_unit: str

    @property
    def verdicts(self) -> tuple[str, ...]:
        """One sentence per level."""
        return tuple(level.verdict for level in self.levels)

    def to_frame(self) -> pd.DataFrame:
        """One row per level but the finest; information in nats."""
        return pd.DataFrame([{
            "level": level.name,
            "variance reduction": level.variance_reduction,
            "cost factor": level.cost_factor,
            "(5%)": level.cost_interval[0] if level.cost_interval else math.nan,
            "(95%)": level.cost_interval[1] if level.cost_interval else math.nan,
            "correlation": level.correlation,
            "information": level.information.mean,
            "(permuted)": level.information.control,
            **{f"about {name}": float(value)
               for name, value in zip(self.summaries, level.information.values, strict=True)},
            "carried": level.information.mean_carried,
            "carried (permuted)": level.information.carried_control,
            "coherence": level.coherence.linear,
            "coherence (permuted)": level.coherence.control,
            "in place": level.coherence.in_place,
            "score": level.score,
        } for level in self.levels])  # fmt: skip

    def __str__(self) -> str:
        turned = self.to_frame().set_index("level").rename_axis(None).T  # levels are few, and terminals narrow
        with pd.option_context("display.width", 200, "display.max_columns", 30):
            table = turned.to_string(float_format=lambda value: f"{value:.3g}", na_rep="-")
        unit = "seconds" if self.cost_unit == "seconds" else "cost units"
        title = f"Worth of levels below '{self.finest}': repeats cost {self.spent:.4g} {unit}"
        return "\n".join([title, table, *_LEGEND, *(f"{level.name}: {level.verdict}" for level in self.levels)])


def transfer(
    stack: LevelStack,
    report: Piloted,
    *,
    seed: int = 0,
    summary: Callable[[Array], ArrayLike] | None = None,
    store: Store | str | os.PathLike[str] | None = None,
    executor: Any = None,
    workers: int = 1,
    on_failure: OnFailure = "raise",
    retry_failed: bool = False,
    progress: bool = True,
) -> TransferReport:
    r"""Says what each cheap level is worth, for multilevel training and for transfer learning.

    Multilevel training needs levels whose losses go together at the same noise: the pilot's variances say how much
    cost they save. They also go together where a network learns nothing from the outputs, as it may in a short pilot,
    so a level that shares no information with the finest is not worth it whatever the variances say. Transfer
    learning needs mutual information, which is measured at the same theta with other noise, and outputs that say the
    same in the same entries: see `mutual_information` and `coherence`. For that, every level but the finest is run
    once more at the pilot's theta. A level whose outputs share information that a network trained on it would not find
    in the finest level's is worth it only after a fixed map, for either: once the network reads, losses fall apart.

    Both are of outputs as they are. `Multilevel(align=True)` maps each entry of a cheap output before training, which
    neither the pilot nor this does: entries that differ by a fixed map each are judged as if that stayed.

    At 64 rows another seed moves information by up to a fifth, and what is carried by up to two fifths where it is
    little. The cost of cheap runs that transfer learning trains on is left out: it is small where they are cheap.

    Args:
        stack: The stack that was piloted.
        report: What `pilot` returned, of at least 20 rows; below 50 much of the information is missed, and 100 tell
            good levels from bad.
        seed: Seed of the noise of the repeats, of folds and of permutations. Another pilot with the same store needs
            another one.
        summary: `summary(x) -> (n, k)` of an output; predictions of the parameters when left out.
        store: Folder that keeps the repeats, as in `simulate`, which may use the same.
        executor: What runs the simulations, as in `simulate`.
        workers: Processes on this machine, when no executor is given.
        on_failure: What a row does that fails: `"raise"` or `"drop"`.
        retry_failed: Whether rows that the store has as failed are run again.
        progress: Whether to show a progress bar.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If the report is of another stack (other names, theta of another prior or outputs of other shapes),
            has too few rows, or a simulator misbehaves (see `simulate`).
        SimulationError: As `simulate`.
        StoreError: If the store has repeats of another pilot with this seed, or as `simulate`.

    References:
        | Multifidelity simulation-based inference for computationally expensive simulators (Krouglova et al., 2025)
        | https://arxiv.org/abs/2502.08416

    Example:
        >>> from mlsbi import pilot, tasks
        >>> stack = tasks.get("ou").stack
        >>> report = transfer(stack, pilot(stack, 64, seed=0, progress=False), progress=False)
        >>> report.spent, len(report.verdicts)
        (64.0, 1)
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:  # before anything is run
        raise ImportError("transfer needs scikit-learn, which is not installed: pip install mlsbi[metrics]") from error
    if tuple(report.names or ()) != stack.names or len(stack) < 2:
        raise ValueError(f"Expected a pilot's report on this stack, of two levels at least; got one on "
                         f"{list(report.names or ())} for the levels {list(stack.names)}.")
    if len(report.theta) < FEWEST:
        raise ValueError(f"Expected at least {FEWEST} pilot rows; got {len(report.theta)}. Take more.")
    check_theta(stack.prior, report.theta, where="the pilot's report")
    problem = read_problem(report, None, None, None, None, None)
    if problem.costs is None or problem.covariance is None:
        raise ValueError("Expected a report with costs and the covariance of all levels, as pilot gives.")
    draws = _resample(problem, getattr(report, "covariance_draws", None))
    options = RunOptions(store, executor, workers, None, on_failure, retry_failed, progress)
    repeats = simulate_repeats(stack, report.theta, seed=seed, options=options)
    read = Unbounded(stack.prior).features(report.theta[repeats.kept]).numpy()
    finest = report.outputs[-1].numpy()
    levels = []
    for level, (name, output) in enumerate(zip(stack.names[:-1], repeats.outputs, strict=True)):
        if output.shape[1:] != report.outputs[level].shape[1:]:
            raise ValueError(f"Expected a pilot's report on this stack; its outputs of '{name}' have shape "
                             f"{tuple(report.outputs[level].shape[1:])}, and runs give {tuple(output.shape[1:])}.")
        information = mutual_information(output.numpy(), finest[repeats.kept.numpy()], read, summary=summary,
                                         seed=seed)
        common = coherence(report.outputs[level].numpy(), finest, seed=seed)
        factor, interval = _cost_factors(_summed(problem), level)[0].item(), None
        if draws is not None and not math.isnan(factor):
            low, high = np.nanquantile(_cost_factors(draws, level), _INTERVAL).tolist()
            interval = low, high
        words = _judge(factor, interval, information, common, len(report.theta), len(read))
        levels.append(LevelTransfer(name, factor, interval, _correlation(problem, level), information, common,
                                    len(read), words))
    known = parameter_names(stack.prior)
    if summary is not None:
        known = tuple(f"summary {j}" for j in range(len(levels[0].information.values)))
    spent = sum(runs * float(cost) for runs, cost in zip(repeats.runs, problem.costs[:-1], strict=True))
    return TransferReport(tuple(levels), stack.names[-1], known, spent, report.cost_unit)


def _summed(problem: Problem) -> Problem:
    """Several outputs as one, which varies as they do together."""
    if problem.covariance is None:
        raise RuntimeError("A report without covariance was let through.")
    return replace(problem, variances=problem.variances.sum(0, keepdims=True),
                   covariance=problem.covariance.sum(0, keepdims=True))


def _resample(problem: Problem, values: object) -> Problem | None:
    """One output per bootstrap draw of the covariance."""
    if values is None:
        return None
    draws, levels = np.asarray(values, dtype=np.float64), len(problem.names)
    if draws.ndim != 3 or draws.shape[1:] != (levels, levels) or not len(draws):
        raise ValueError(f"Expected covariance_draws of shape (draws, {levels}, {levels}); got {draws.shape}.")
    own = np.diagonal(draws, axis1=1, axis2=2)
    steps = own[:, 1:] + own[:, :-1] - 2 * np.diagonal(draws, 1, axis1=1, axis2=2)
    return replace(problem, variances=np.concatenate([own[:, :1], np.maximum(steps, 0)], 1), covariance=draws)


def _cost_factors(problem: Problem, level: int) -> Array:
    """S^2 of the best subset of levels without one, over that of the best one with it, for each output."""
    levels = range(len(problem.names))
    with_it = _least_root(problem, levels[: level + 1]) + _least_root(problem, levels[level + 1 :], after=level)
    without = _least_root(problem, [*levels[:level], *levels[level + 1 :]])
    varies = (without > 0) & (with_it > 0)  # else the finest level's integrand is constant
    return np.where(varies, without / np.where(varies, with_it, 1.0), np.nan) ** 2


def _least_root(problem: Problem, levels: Sequence[int], after: int | None = None) -> Array:
    r"""Least :math:`S = \sum \sqrt{V c}` over subsets of levels that have the last, for each output.

    It adds up over neighbours, so that it is a shortest path, begun at the level `after` if there is one.
    """

    def term(coarse: int | None, fine: int) -> Array:
        return np.asarray(np.sqrt(problem.term_variance(coarse, fine) * problem.term_cost(coarse, fine)))

    paths: list[Array] = []
    for fine in levels:
        ways = [path + term(coarse, fine) for path, coarse in zip(paths, levels, strict=False)]
        paths.append(np.minimum.reduce([term(after, fine), *ways]))
    return paths[-1]


def _correlation(problem: Problem, level: int) -> float:
    if problem.covariance is None:
        raise RuntimeError("A report without covariance was let through.")
    covariance = problem.covariance.sum(0)
    spread = math.sqrt(covariance[level, level] * covariance[-1, -1])
    return float(covariance[level, -1]) / spread if spread > 0 else math.nan


def _score(information: MutualInformation, common: Coherence) -> float:
    return information.mean_carried * common.alignment


def _judge(
    factor: float, interval: tuple[float, float] | None, information: MutualInformation, common: Coherence,
    pilot_rows: int, rows: int,
) -> str:  # fmt: skip
    """One sentence, worst news included."""
    saves = factor >= _CLEARLY  # not where it is NaN
    low, high = interval or (factor, factor)
    unsure = low < 1 < high and not 1 / _CLEARLY < low < high < _CLEARLY
    cost = _tell_cost(factor, interval, pilot_rows, unsure=unsure)
    if information.mean <= information.control:
        nothing = (f"{rows} rows show no more about theta that both levels know ({information.mean:.2g} nats per "
                   f"parameter) than chance ({information.control:.2g})")
        why = (f"; variance {'would be' if unsure else 'is'} saved only because the network learns nothing from the "
               "outputs") if saves else ""
        return f"not worth it: {cost}{why}, and {nothing}{_warn_few(rows)}."
    carries = information.mean_carried > information.carried_control
    mapped = common.linear > common.control
    learning = (f"for transfer learning both levels know at least {information.mean:.2g} nats per parameter together, "
                f"score {_score(information, common):.2g}")
    if not carries:
        head = "worth it only after a fixed map of its output" if mapped else "not worth it as it is"
        learning += (f"; a network trained on it reads no more in the finest level's outputs "
                     f"({information.mean_carried:.2g}) than chance ({information.carried_control:.2g})")
    elif unsure:
        head = "worth it for transfer learning"
    else:
        head = "worth it" if saves else "worth it for transfer learning only"
    hint = ""
    if mapped and common.linear - common.in_place > _MISPLACED:
        hint = (f"; a fixed linear map of its output would explain {common.linear:.0%} of the finest level's, entries "
                f"in place {common.in_place:.0%}")
    return f"{head}: {cost}, and {learning}{_warn_few(rows)}{hint}."


def _tell_cost(factor: float, interval: tuple[float, float] | None, rows: int, *, unsure: bool) -> str:
    """What a level saves multilevel training, in words."""
    if math.isnan(factor):
        return "there is no variance that multilevel training could reduce"
    if interval is not None and unsure:
        return (f"whether it saves multilevel training cost cannot be told from {rows} rows (without it "
                f"{factor:.3g} times the cost, {interval[0]:.3g} to {interval[1]:.3g})")
    if 1 / _CLEARLY < factor < _CLEARLY:
        return "multilevel training costs as much with it as without"
    low, high = interval or (math.nan, math.nan)
    if factor > 1:
        known = f" ({low:.3g} to {high:.3g})" if interval else ""
        return f"multilevel training needs {factor:.3g} times{known} less cost for the same variance"
    known = f" ({1 / high:.3g} to {1 / low:.3g})" if interval else ""
    return f"multilevel training needs {1 / factor:.3g} times{known} the cost for the same variance"


def _warn_few(rows: int) -> str:
    return f" (so few rows miss much of it: take {_FEW} at least)" if rows < _FEW else ""
