r"""Whether cheap levels are worth their runs, for multilevel training and for transfer learning."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mlsbi.allocation.problem import Problem, Report, read_problem
from mlsbi.diagnostics.arrays import Array
from mlsbi.diagnostics.information import FEWEST, Coherence, MutualInformation, coherence, mutual_information
from mlsbi.levels import LevelStack
from mlsbi.priors import Unbounded, parameter_names
from mlsbi.simulation.repeats import simulate_repeats
from mlsbi.simulation.running import RunOptions
from mlsbi.simulation.scheduling import OnFailure
from mlsbi.store.store import Store

__all__ = ["LevelTransfer", "Piloted", "TransferReport", "transfer"]

_CLEARLY = 1.1  # times less cost, below which a level makes no difference worth a word
_MISPLACED = 0.1  # share of variance that a linear map finds and entries in place do not


class Piloted(Report, Protocol):
    r"""What is read of a pilot's report; `mlsbi.PilotReport` is one."""

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
        cost_factor: How many times the cost would be for the same variance of the multilevel loss without it; below
            1 it is better left out. NaN where losses do not vary.
        correlation: Of its losses with the finest level's; NaN where either does not vary.
        information: What its outputs and the finest level's know together about theta.
        coherence: How much its outputs explain of the finest level's.
        rows: Rows that both were measured on.
        verdict: All that in a sentence.
    """

    name: str
    cost_factor: float
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
        spoil; `alignment` sees that at any noise.
        """
        return _score(self.information, self.coherence)


@dataclass(frozen=True, eq=False)
class TransferReport:
    r"""Whether each cheap level is worth its runs.

    Args:
        levels: One record per level but the finest, cheapest first.
        finest: Name of the finest level.
        summaries: What the information is about: parameters, or columns of the user's summary.
        spent: Cost of the runs made for it, in `cost_unit`.
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
            "correlation": level.correlation,
            "information": level.information.mean,
            "(permuted)": level.information.control,
            **{f"about {name}": float(value)
               for name, value in zip(self.summaries, level.information.values, strict=True)},
            "carried": level.information.mean_carried,
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
        title = f"Worth of levels below '{self.finest}': {self.spent:.4g} {unit} spent on repeats"
        nats = "(information, carried and score in nats per parameter)"
        return "\n".join([title, table, nats, *(f"{level.name}: {level.verdict}" for level in self.levels)])


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
    cost they save. Transfer learning needs mutual information, which is measured at the same theta with other noise,
    and outputs that say the same in the same entries: see `mutual_information` and `coherence`. For that, every level
    but the finest is run once more at the pilot's theta.

    The cost of cheap runs that transfer learning trains on is left out: it is small where they are cheap.

    Args:
        stack: The stack that was piloted.
        report: What `pilot` returned, of at least 20 rows; 100 tell good levels from bad.
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
        ValueError: If the report is of another stack, has too few rows, or a simulator misbehaves (see `simulate`).
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
    problem = read_problem(report, None, None, None, None, None)
    if problem.costs is None or problem.covariance is None:
        raise ValueError("Expected a report with costs and the covariance of all levels, as pilot gives.")
    options = RunOptions(store, executor, workers, None, on_failure, retry_failed, progress)
    repeats = simulate_repeats(stack, report.theta, seed=seed, options=options)
    read = Unbounded(stack.prior).features(report.theta[repeats.kept]).numpy()
    finest = report.outputs[-1].numpy()
    levels = []
    for level, (name, output) in enumerate(zip(stack.names[:-1], repeats.outputs, strict=True)):
        information = mutual_information(
            output.numpy(), finest[repeats.kept.numpy()], read, more=_further_rows(stack, report, level),
            summary=summary, seed=seed,
        )  # fmt: skip
        common = coherence(report.outputs[level].numpy(), finest, seed=seed)
        factor, rows = _cost_factor(problem, level), len(read)
        verdict = _judge(factor, information, common, rows)
        levels.append(LevelTransfer(name, factor, _correlation(problem, level), information, common, rows, verdict))
    known = parameter_names(stack.prior)
    if summary is not None:
        known = tuple(f"summary {j}" for j in range(len(levels[0].information.values)))
    spent = sum(runs * float(cost) for runs, cost in zip(repeats.runs, problem.costs[:-1], strict=True))
    return TransferReport(tuple(levels), stack.names[-1], known, spent, report.cost_unit)


def _further_rows(stack: LevelStack, report: Piloted, level: int) -> tuple[Array, Array] | None:
    """Rows of a level's own that the pilot left behind; they are independent of its joint rows."""
    rows = None if report.data is None else report.data.levels[level]
    if rows is None or len(rows.theta) == 0:
        return None
    theta: Tensor = rows.theta
    return Unbounded(stack.prior).features(theta).numpy(), torch.as_tensor(rows.fine).numpy()


def _cost_factor(problem: Problem, level: int) -> float:
    """S^2 of the stack without a level, over that with it."""
    levels = list(range(len(problem.names)))
    with_it, without = (_root_cost(problem, kept) for kept in (levels, levels[:level] + levels[level + 1 :]))
    return (without / with_it) ** 2 if with_it > 0 else math.nan


def _root_cost(problem: Problem, levels: Sequence[int]) -> float:
    r""":math:`S = \sum \sqrt{V c}` over the terms of a subset of levels."""
    terms = zip([None, *levels[:-1]], levels, strict=True)
    return float(sum(np.sqrt(problem.term_variance(*term).sum() * problem.term_cost(*term)) for term in terms))


def _correlation(problem: Problem, level: int) -> float:
    if problem.covariance is None:
        raise RuntimeError("A report without covariance was let through.")
    covariance = problem.covariance.sum(0)
    spread = math.sqrt(covariance[level, level] * covariance[-1, -1])
    return float(covariance[level, -1]) / spread if spread > 0 else math.nan


def _score(information: MutualInformation, common: Coherence) -> float:
    return information.mean_carried * common.alignment


def _judge(factor: float, information: MutualInformation, common: Coherence, rows: int) -> str:
    """One sentence, worst news included."""
    saves, shares = factor >= _CLEARLY, information.mean > information.control
    if saves and shares:
        head = "worth it"
    elif saves or shares:
        head = f"worth it for {'multilevel training' if saves else 'transfer learning'} only"
    else:
        head = "not worth it"
    if math.isnan(factor):
        cost = "there is no variance that multilevel training could reduce"
    elif saves:
        cost = f"multilevel training needs {factor:.3g} times less cost for the same variance"
    elif factor > 1 / _CLEARLY:
        cost = "multilevel training costs as much with it as without"
    else:
        cost = f"multilevel training needs {1 / factor:.3g} times the cost for the same variance"
    if not shares:
        learning = (f"{rows} rows show transfer learning no more about theta that both levels know "
                    f"({information.mean:.2g} nats per parameter) than chance ({information.control:.2g})")
    else:
        learning = (f"for transfer learning both levels know {information.mean:.2g} nats per parameter together, "
                    f"score {_score(information, common):.2g}")
    hint = ""
    if common.linear - common.in_place > _MISPLACED and common.linear > common.control:
        hint = (f"; a fixed linear map of its output, such as another order, would explain {common.linear:.0%} of the "
                f"finest level's, not {common.in_place:.0%}")
    return f"{head}: {cost}, and {learning}{hint}."
