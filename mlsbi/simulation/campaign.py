r"""Campaigns: coupled rows of every level, from where an earlier campaign stopped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mlsbi.data import LevelData, MultilevelData, spread
from mlsbi.levels import LevelStack
from mlsbi.priors import check_theta
from mlsbi.simulation.running import DROPPING, RunOptions, make_term, run_terms, warn_left_out
from mlsbi.simulation.scheduling import OnFailure, SimulationError
from mlsbi.simulation.seeding import BLOCK, RowSource
from mlsbi.simulation.terms import Term
from mlsbi.store.records import OK
from mlsbi.store.store import Store, StoreError

__all__ = ["JointRows", "Plan", "simulate", "simulate_joint", "simulate_level", "simulate_streams"]


class Plan(Protocol):
    """Anything with a number of rows per level, such as an `Allocation`."""

    @property
    def n(self) -> Sequence[int]:
        """Rows per level, cheapest first."""
        ...


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

    With a `store`, every finished batch is on disk as soon as it comes back (batches of less than 0.05 s within half a
    second), and a campaign that was interrupted, in whatever way, goes on where it was when called again. Whole pairs
    are run, those of the finest level first.

    The first two rows of every level but the finest are replayed to see whether its simulator is deterministic;
    replays are counted as runs, and not made when rows of a checked campaign, such as a pilot's, are reused.

    A row fails if a simulator raises, runs out of time, gives NaN or infinite numbers or another shape, or kills its
    worker twice while it runs alone. Failed rows leave a part of the prior out, whatever is done about them: see the
    fraction.

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
    gaps = lost if on_failure == "drop" else (0,) * len(stack)
    more = [max(n[level] - have[level] - gaps[level], 0) for level in range(len(stack))]
    terms = [
        make_term(stack, seed, level, slice(max(level - 1, 0), level + 1), more[level],
                  first=_first_row(stack, seed, level, reuse, more[level]), label=names[level],
                  proven=reuse is not None and len(reuse.levels[level]) > 0)
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
    except (SimulationError, StoreError) as error:
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
    return simulate_streams(stack, n, [(stream, levels)], seed=seed, replay=replay, options=options)[0]


def simulate_streams(
    stack: LevelStack, n: int, streams: Sequence[tuple[int, slice]], *, seed: int, replay: bool = False,
    options: RunOptions = DROPPING,
) -> list[JointRows]:  # fmt: skip
    """What `simulate_joint` does for several streams and their levels at once; the last is run first and replayed."""
    if n < 1:
        raise ValueError(f"Expected at least one row; got n={n}.")
    terms = [make_term(stack, seed, stream, levels, n) for stream, levels in streams]
    replays = [()] * (len(terms) - 1) + [tuple(range(len(terms[-1].levels) - 1)) if replay else ()]
    run_terms(stack, terms, replays, options)
    warn_left_out([term.label for term in terms], [term.done for term in terms],
                  [len(term.failures) for term in terms], options.on_failure)
    rows = []
    for term in terms:
        theta, outputs = term.finite_rows()
        rows.append(JointRows(theta, tuple(outputs), len(term.failures), tuple(term.runs.tolist()),
                              tuple(term.seconds.tolist())))
    return rows


def simulate_level(
    stack: LevelStack, level: int, n: int, *, seed: int, stream: int,
    options: RunOptions = DROPPING,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draws `(theta, x)`: n plain rows of one level (negative counts from the finest) from a random stream."""
    index = range(len(stack))[level]
    joint = simulate_joint(stack, n, seed=seed, stream=stream, levels=slice(index, index + 1), options=options)
    return joint.theta, joint.outputs[0]


def _first_row(stack: LevelStack, seed: int, level: int, reuse: MultilevelData | None, more: int) -> int:
    """The first row of a level's stream behind all that the reused data has: it is extended, never repeated.

    Rows are looked for as far as `more` rows, twice as many where some fail, would reach.
    """
    if reuse is None or len(reuse.levels[level]) == 0:
        return 0
    first, source = 0, RowSource(stack, seed=seed, stream=level)
    while True:
        drawn = source.thetas(first + 2 * (more + len(reuse.levels[level]) + reuse.failures[level]) + BLOCK)
        known = {row.tobytes() for row in reuse.levels[level].theta.to(drawn.dtype).numpy()}
        found = [place for place, row in enumerate(drawn.numpy()) if row.tobytes() in known]
        if not found or found[-1] < first:
            return first
        within = found[-1] + 1 - len(found)  # failed rows among those; the others failed behind the last
        first = found[-1] + 1 + max(reuse.failures[level] - within, 0)


def _assemble(
    stack: LevelStack, terms: Sequence[Term], reuse: MultilevelData | None, *, unfinished: bool = False
) -> Any:
    """The rows of all terms behind those reused; of an unfinished campaign the unbroken beginning of each term."""
    levels, failures = [], []
    runs, seconds = [0] * len(stack), [0.0] * len(stack)
    shape = next((term.outputs[0].shape[1:] for term in terms if term.outputs), None)
    for index, term in enumerate(terms):
        old = reuse.levels[index] if reuse is not None else None
        ready = len(term.status)
        if unfinished and (term.status != OK).any():  # failed rows are not reused, so that they can be mended
            ready = int(np.argmax(term.status != OK))
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
