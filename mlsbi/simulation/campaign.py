r"""Campaigns: coupled rows of every level, from where an earlier campaign stopped, checked while they come in."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mlsbi.data import LevelData, MultilevelData, spread
from mlsbi.levels import LevelStack
from mlsbi.priors import check_theta, parameter_names
from mlsbi.randomness import check_seed
from mlsbi.simulation.executors import open_workers
from mlsbi.simulation.opening import store_for
from mlsbi.simulation.progress import Progress
from mlsbi.simulation.records import OK, Stream
from mlsbi.simulation.scheduling import MISSING, OnFailure, Runner, SimulationError, Source, Term, cut_missing
from mlsbi.simulation.seeding import RowSource
from mlsbi.simulation.store import Store

__all__ = [
    "DROPPING", "JointRows", "Plan", "RunOptions", "SimulationError", "run_terms", "simulate", "simulate_joint",
    "simulate_level", "warn_left_out",
]  # fmt: skip


class Plan(Protocol):
    """Anything with a number of rows per level, such as an `Allocation`."""

    @property
    def n(self) -> Sequence[int]:
        """Rows per level, cheapest first."""
        ...


@dataclass(frozen=True)
class RunOptions:
    r"""How a campaign runs; none of it changes a number of what is simulated, except what failed rows do.

    Args:
        store: Folder that keeps every row, or an open `Store`; rows it has are not simulated again.
        executor: A `concurrent.futures.Executor`, a function that makes one, or a `dask.distributed.Client`.
        workers: Processes on this machine, when no executor is given.
        batch_size: Rows a call; chosen from the simulators' speed when left out.
        on_failure: `"raise"`, `"drop"` or `"redraw"`; see `simulate`.
        retry_failed: Whether rows that failed in an earlier campaign are run again.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If a choice is unknown or a number not positive.
    """

    store: Store | str | os.PathLike[str] | None = None
    executor: Any = None
    workers: int = 1
    batch_size: int | None = None
    on_failure: OnFailure = "raise"
    retry_failed: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if self.on_failure not in ("raise", "drop", "redraw"):
            raise ValueError(f'Expected on_failure "raise", "drop" or "redraw"; got {self.on_failure!r}.')
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"Expected batch_size >= 1; got {self.batch_size}.")
        if self.retry_failed and self.store is None:
            raise ValueError("Expected a store beside retry_failed=True: without one no earlier campaign is known.")


DROPPING = RunOptions(on_failure="drop")
"""Serial, in memory, failed rows left out."""


@dataclass(frozen=True)
class JointRows:
    r"""Rows on which several levels were run together.

    Args:
        theta: Parameters, shape `(n, D)`.
        outputs: Output of each level run, cheapest first, each `(n, ...)`.
        left_out: Rows that failed.
        runs: Simulator runs per level run, failed rows and replays included.
        seconds: Time spent in each level run.
    """

    theta: Tensor
    outputs: tuple[Tensor, ...]
    left_out: int
    runs: tuple[int, ...]
    seconds: tuple[float, ...]


def simulate(
    stack: LevelStack,
    n_or_plan: int | Sequence[int] | Plan,
    *,
    seed: int,
    reuse: MultilevelData | None = None,
    store: Store | str | os.PathLike[str] | None = None,
    executor: Any = None,
    workers: int = 1,
    batch_size: int | None = None,
    on_failure: OnFailure = "raise",
    retry_failed: bool = False,
    replay_finest: bool = False,
    progress: bool = True,
) -> MultilevelData:
    r"""Simulates independent coupled rows for every level's term of the telescoping sum.

    With a `store`, every finished row is on disk before the next is begun, and a campaign that was interrupted, in
    whatever way, goes on where it was when called again. Whole pairs are run, those of the finest level first.

    The first two rows of every level but the finest are replayed to see whether its simulator is deterministic;
    replays are counted as runs, and not made when rows of a checked campaign, such as a pilot's, are reused.

    A row fails if a simulator raises, runs out of time, gives NaN or infinite numbers or another shape, or kills its
    worker three times. Failed rows leave a part of the prior out, whatever is done about them: see the fraction.

    Args:
        stack: Prior, noise and levels.
        n_or_plan: Rows per level, cheapest first (one number for all), or a plan such as an `Allocation`.
        seed: Seed of everything random; theta and noise of a row depend on nothing else.
        reuse: Rows that exist already, such as a pilot's `.data`; they come first and count toward n.
        store: Folder that keeps every row, made when it does not exist, or an open `Store`.
        executor: Any `concurrent.futures.Executor`, a function that makes one (which is called again when a worker
            died), or a `dask.distributed.Client`. Simulators must be picklable where it needs that.
        workers: Processes on this machine, when no executor is given.
        batch_size: Rows a call; chosen from the simulators' speed when left out. It changes no result, as long as a
            simulator computes a row in the same way in every batch.
        on_failure: What a failed row does: `"raise"` an error, once what is running has finished; `"drop"` the row with
            its twin, with a warning; or `"redraw"`: have as many further rows run.
        retry_failed: Whether rows that the store has as failed are run again.
        replay_finest: Whether the finest level is replayed too, which costs two of its runs.
        progress: Whether to show progress bars.

    Returns:
        Data whose level l holds `n[l]` rows, fewer where rows were dropped.

    Raises:
        SimulationError: If a row failed and `on_failure` is `"raise"`, nothing is finished at all, or the executor
            broke for good. Its `.data` has the rows finished before.
        ValueError: If a simulator returns another number of rows, or another shape than the other levels, changes
            its inputs, or is not deterministic row by row; if the noise does not come from its generator; if n does
            not fit the stack or `reuse`.
        StoreError: If the store belongs to another stack, is in use, is damaged, or its disk is full.

    Example:
        >>> from mlsbi import BoxPrior, Level, LevelStack
        >>> stack = LevelStack(
        ...     prior=BoxPrior([0.0], [1.0]),
        ...     noise=lambda n, generator: torch.randn(n, 1, generator=generator),
        ...     levels=[Level("low", lambda t, u: t + u, cost=1), Level("high", lambda t, u: t + u.sinh(), cost=9)],
        ... )
        >>> simulate(stack, (100, 5), seed=1, progress=False).n
        (100, 5)
    """
    options = RunOptions(store, executor, workers, batch_size, on_failure, retry_failed, progress)
    names = stack.names
    wanted: Any = getattr(n_or_plan, "n", n_or_plan)
    n = spread(wanted, len(stack), what="n")
    have = list(reuse.n) if reuse is not None else [0] * len(stack)
    _check_request(stack, n, reuse)
    lost = reuse.failures if reuse is not None else (0,) * len(stack)
    # New rows start behind as many as were made before: data of the same seed is extended, never repeated.
    terms = [
        _term(stack, seed, level, slice(max(level - 1, 0), level + 1), n[level] - have[level],
              first=have[level] + lost[level], label=names[level])
        for level in range(len(stack))
    ]
    checked = reuse is not None and reuse.checked
    replays = [
        tuple(range(len(term.levels)))[slice(-1, None) if level < len(stack) - 1 and not checked
                                       or replay_finest and level == len(stack) - 1 else slice(0)]
        for level, term in enumerate(terms)
    ]
    try:
        run_terms(stack, terms, replays, options, shape=_known_shape(reuse))
    except SimulationError as error:
        error.data = _assemble(stack, terms, reuse, unfinished=True)
        raise
    data = _assemble(stack, terms, reuse)
    warn_left_out(names, [term.done for term in terms], [len(term.failures) for term in terms], on_failure)
    return data


def simulate_joint(
    stack: LevelStack, n: int, *, seed: int, stream: int, levels: slice = slice(None), replay: bool = False,
    options: RunOptions = DROPPING,
) -> JointRows:  # fmt: skip
    r"""Runs several levels of a stack at the same n rows of theta and noise.

    Args:
        stack: Prior, noise and levels.
        n: Rows.
        seed: Seed of everything random.
        stream: Random stream, so that these rows are independent of every other stream's.
        levels: Which levels to run.
        replay: Whether all levels but the last are replayed on two rows to see whether they are deterministic.
        options: How they are run.

    Raises:
        ValueError: As `simulate`.
        SimulationError: As `simulate`.
    """
    if n < 1:
        raise ValueError(f"Expected at least one row; got n={n}.")
    term = _term(stack, seed, stream, levels, n)
    run_terms(stack, [term], [tuple(range(len(term.levels) - 1)) if replay else ()], options)
    warn_left_out([term.label], [term.done], [len(term.failures)], options.on_failure)
    theta, outputs = term.finite_rows()
    return JointRows(theta, tuple(outputs), len(term.failures), tuple(term.runs.tolist()),
                     tuple(term.seconds.tolist()))


def simulate_level(
    stack: LevelStack, level: int, n: int, *, seed: int, stream: int,
    options: RunOptions = DROPPING,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draws `(theta, x)`: n plain rows of one level (negative counts from the finest) from a random stream."""
    index = range(len(stack))[level]
    joint = simulate_joint(stack, n, seed=seed, stream=stream, levels=slice(index, index + 1), options=options)
    return joint.theta, joint.outputs[0]


def run_terms(
    stack: LevelStack, terms: Sequence[Term], replays: Sequence[tuple[int, ...]], options: RunOptions, *,
    shape: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    r"""Sees to it that every row of some terms is run: taken from the store, or simulated and kept there.

    Args:
        stack: The stack that the terms are of.
        terms: What is wanted; filled in.
        replays: Which levels of each term, by place, are replayed.
        options: How.
        shape: Shape of one output, where it is known already.

    Raises:
        ValueError: As `simulate`.
        SimulationError: As `simulate`.
        StoreError: As `simulate`.
    """
    for place, term in enumerate(terms):
        term.place, term.missing = place, cut_missing(np.zeros(term.n, bool), term.first)
    with contextlib.ExitStack() as exits:
        workers = exits.enter_context(open_workers(options.executor, options.workers))
        kept = store_for(stack, options.store) if options.store is not None else None
        writer = exits.enter_context(kept.writing()) if kept is not None else None
        replayed = [False] * len(terms)
        if kept is not None and writer is not None:
            for term in terms:
                writer.set_target(term.stream, term.first + term.n)
            replayed = [_load(kept, term, options) for term in terms]
        costs = None if stack.row_costs is None else [_row_cost(stack, term) for term in terms]
        bars = exits.enter_context(Progress([term.label for term in terms], [len(term.status) for term in terms],
                                            [term.done for term in terms], costs, show=options.progress))
        known = shape or next((tuple(term.outputs[0].shape[1:]) for term in terms if term.finished), None)
        runner = Runner(workers, writer, bars, options.batch_size, options.on_failure, known,
                        describe=_describer(stack))
        for term in terms:
            if term.failures and options.on_failure == "raise":
                raise runner.refuse(term, before=" in an earlier campaign, and were not run again for want of "
                                                 "retry_failed=True")
        missing = any(term.missing for term in terms)
        unchecked = any(places and not done for places, done in zip(replays, replayed, strict=True))
        if not missing and not unchecked:
            return
        RowSource(stack, seed=terms[0].stream.seed, stream=terms[0].stream.number).check_noise()
        runner.probe(terms)
        runner.replay([(term, places) for term, places, done in zip(terms, replays, replayed, strict=True) if not done])
        runner.finish(terms)


def _term(
    stack: LevelStack, seed: int, stream: int, levels: slice, n: int, *, first: int = 0, label: str = "",
    source: Source | None = None,
) -> Term:  # fmt: skip
    chosen = tuple(range(len(stack)))[levels]
    return Term(
        levels=[stack.levels[level] for level in chosen], stream=Stream(check_seed(seed), stream, chosen),
        source=source or RowSource(stack, seed=seed, stream=stream), n=n, first=first,
        label=label or ", ".join(stack.names[level] for level in chosen),
    )  # fmt: skip


def _load(store: Store, term: Term, options: RunOptions) -> bool:
    """Fills a term with the rows a store has; whether its levels were replayed before."""
    loaded = term.first
    while loaded < term.stop:
        for records in store.read(term.stream, loaded, term.stop, failed=True):
            term.put(records)
        loaded = term.stop
        if options.on_failure == "redraw" and not options.retry_failed:
            term.extend(term.n + len(term.failures) - len(term.status))
    if options.retry_failed:
        for row in term.failures:
            term.status[row - term.first] = MISSING
        term.failures.clear()
    term.missing = cut_missing(term.status != MISSING, term.first)
    runs, seconds = store.replays(term.stream)
    term.runs += runs
    term.seconds += seconds
    return bool(runs.sum())


def _row_cost(stack: LevelStack, term: Term) -> float:
    chosen = term.stream.levels
    if stack.row_costs is not None and len(chosen) == 2 and term.stream.number < len(stack):
        return stack.row_costs[chosen[-1]]
    return sum(stack.levels[level].cost or 0.0 for level in chosen)


def _describer(stack: LevelStack) -> Any:
    names = parameter_names(stack.prior)

    def describe(theta: Tensor) -> str:
        return ", ".join(f"{name} = {value:.6g}" for name, value in zip(names, theta.tolist(), strict=True))

    return describe


def _assemble(
    stack: LevelStack, terms: Sequence[Term], reuse: MultilevelData | None, *, unfinished: bool = False
) -> Any:
    """The rows of all terms behind those reused; of an unfinished campaign the unbroken beginning of each term."""
    levels, failures = [], []
    runs, seconds = [0] * len(stack), [0.0] * len(stack)
    shape = next((term.outputs[0].shape[1:] for term in terms if term.outputs), None)
    for index, term in enumerate(terms):
        old = reuse.levels[index] if reuse is not None else None
        ready = int(np.argmax(term.status == MISSING)) if (term.status == MISSING).any() else len(term.status)
        theta, outputs = term.finite_rows(up_to=ready)
        if outputs and len(theta):
            new = LevelData(theta, outputs[-1], outputs[0] if index else None)
            merged = old.followed_by(new) if old is not None else new
        elif old is not None:
            merged = old
        elif unfinished and shape is not None:
            dim = stack.prior.event_shape[0]
            empty = torch.empty(0, *shape)
            merged = LevelData(torch.empty(0, dim), empty, empty if index else None)
        else:
            return None
        for offset, level in enumerate(term.stream.levels):
            runs[level] += int(term.runs[offset])
            seconds[level] += float(term.seconds[offset])
        failures.append(int(((term.status[:ready] != OK)).sum()) + (reuse.failures[index] if reuse else 0))
        levels.append(merged)
    if reuse is not None:
        runs = [a + b for a, b in zip(runs, reuse.runs, strict=True)]
        seconds = [a + b for a, b in zip(seconds, reuse.seconds or [0.0] * len(stack), strict=True)]
    return MultilevelData(tuple(levels), stack.names, tuple(failures), tuple(runs), tuple(seconds))


def _check_request(stack: LevelStack, n: list[int], reuse: MultilevelData | None) -> None:
    if any(rows < 1 for rows in n):
        raise ValueError(f"Expected at least one row per level; got {tuple(n)} for {list(stack.names)}. "
                         "Leave a level out of the stack instead of giving it none.")
    if reuse is None:
        return
    if reuse.names != stack.names:
        raise ValueError(f"Expected reused data of the levels {list(stack.names)}; got {list(reuse.names)}.")
    for name, want, level in zip(stack.names, n, reuse.levels, strict=True):
        if len(level) > want:
            raise ValueError(f"n asks for {want} rows of level '{name}', but the reused data has {len(level)} already. "
                             "Ask for at least as many, or reuse data.head(n).")
        check_theta(stack.prior, level.theta, where="the reused data")
    reuse.check(empty=True)


def _known_shape(reuse: MultilevelData | None) -> tuple[int, ...] | None:
    if reuse is None:
        return None
    return next((tuple(level.fine.shape[1:]) for level in reuse.levels if len(level)), None)


def warn_left_out(
    labels: Sequence[str], run: Sequence[int], failed: Sequence[int], on_failure: OnFailure = "drop"
) -> None:
    """Warns about rows that failed among those run, if there are any, and what it means."""
    if any(failed):
        what = ", ".join(f"{lost} of {total} at level '{label}' ({lost / total:.1%})"
                         for label, total, lost in zip(labels, run, failed, strict=True) if lost)
        done = "Left out rows that failed" if on_failure == "drop" else "Replaced rows that failed"
        warnings.warn(f"{done}, with their twins: {what}. What is learned holds for the part of the prior where "
                      "simulations succeed.", stacklevel=3)
