r"""Seeing to it that rows are run: those that a store has are read, the rest is simulated and kept."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from mlsbi.levels import LevelStack
from mlsbi.priors import parameter_names
from mlsbi.randomness import check_seed
from mlsbi.simulation.executors import open_workers
from mlsbi.simulation.opening import store_for
from mlsbi.simulation.progress import Progress
from mlsbi.simulation.scheduling import REPLAYED, OnFailure, Runner
from mlsbi.simulation.seeding import RowSource
from mlsbi.simulation.terms import MISSING, Source, Term, cut_missing
from mlsbi.store.ranges import Ranges
from mlsbi.store.records import Stream
from mlsbi.store.store import Store

__all__ = ["DROPPING", "RunOptions", "make_term", "run_terms", "warn_left_out"]


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
        replayed = [0] * len(terms)
        if kept is not None and writer is not None:
            for term in terms:
                writer.set_target(term.stream, len(kept.done(term.stream) | Ranges([(term.first, term.stop)])))
            replayed = [_load(kept, term, options) for term in terms]
        costs = None if stack.row_costs is None else [_row_cost(stack, term) for term in terms]
        done = [(term.done, int(term.runs[-1]), float(term.seconds.sum())) for term in terms]
        bars = exits.enter_context(Progress([term.label for term in terms], [len(term.status) for term in terms], done,
                                            costs, show=options.progress))
        known = shape or next((tuple(term.outputs[0].shape[1:]) for term in terms if term.finished), None)
        runner = Runner(workers, writer, bars, options.batch_size, options.on_failure, known,
                        _describer(stack), recall=partial(_recall, kept, options), terms=len(terms))
        for term in terms:
            if term.failures and options.on_failure == "raise":
                raise runner.refuse(term, before=" in an earlier campaign, and are only run again when asked for")
        missing = any(term.missing for term in terms)
        unchecked = any(places and done < min(REPLAYED, len(term.status))
                        for term, places, done in zip(terms, replays, replayed, strict=True))
        if not missing and not unchecked:
            return
        RowSource(stack, seed=terms[0].stream.seed, stream=terms[0].stream.number).check_noise()
        runner.probe(terms)
        wanted = list(zip(terms, replays, replayed, strict=True))
        runner.replay([each for each in wanted if each[0].finished])
        early = [term.finished > 0 for term in terms]
        runner.finish(terms)
        runner.replay([each for each, was in zip(wanted, early, strict=True) if not was])


def make_term(
    stack: LevelStack, seed: int, stream: int, levels: slice, n: int, *, first: int = 0, label: str = "",
    source: Source | None = None, proven: bool = False,
) -> Term:  # fmt: skip
    r"""What `run_terms` fills in.

    Args:
        stack: Prior, noise and levels.
        seed: Seed of everything random.
        stream: Number of the stream that the rows are kept as, and drawn from.
        levels: Levels that are run on every row.
        n: Rows wanted.
        first: Row of the stream to begin with.
        label: What progress and errors call it; the levels' names when left out.
        source: Draws the rows, where they are not simply those of the stream.
        proven: Whether rows of these levels were finished elsewhere.

    Raises:
        ValueError: If the seed is no whole number of at least 0.
    """
    chosen = tuple(range(len(stack)))[levels]
    return Term(
        levels=[stack.levels[level] for level in chosen], stream=Stream(check_seed(seed), stream, chosen),
        source=source or RowSource(stack, seed=seed, stream=stream), n=n, first=first, proven=proven,
        label=label or ", ".join(stack.names[level] for level in chosen),
    )  # fmt: skip


def _load(store: Store, term: Term, options: RunOptions) -> int:
    """Fills a term with the rows a store has; how many were replayed before."""
    loaded = term.first
    while loaded < term.stop:
        start, loaded = loaded, term.stop
        _recall(store, options, term, start)
        if options.on_failure == "redraw":
            term.extend(term.n + len(term.failures) - len(term.status))
    term.missing = cut_missing(term.status != MISSING, term.first)
    runs, seconds = store.replays(term.stream)
    if len(store.done(term.stream) - Ranges([(term.first, term.stop)])) == 0:  # earlier tries of its rows count too
        term.runs, term.seconds = store.tries(term.stream)
    term.runs += runs
    term.seconds += seconds
    return int(runs.max())


def _recall(store: Store | None, options: RunOptions, term: Term, start: int) -> None:
    """Fills a term with the rows that a store has from a given one on, failed ones unless they are to be retried."""
    if store is None:
        return
    for records in store.read(term.stream, start, term.stop, failed=not options.retry_failed):
        term.put(records)


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
