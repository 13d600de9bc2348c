r"""Getting rows run: what is missing, in batches, finest level first, whatever happens to single rows or workers."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mlsbi.levels import map_noise
from mlsbi.simulation.adapters import RowSimulator
from mlsbi.simulation.execution import Expected, Outcome, run_levels
from mlsbi.simulation.executors import Workers, worker_died
from mlsbi.simulation.progress import Progress
from mlsbi.simulation.seeding import BLOCK
from mlsbi.simulation.terms import MISSING, Batch, Term, cut_missing
from mlsbi.store.files import StoreError
from mlsbi.store.records import OK, STATUSES, Records, Stream

__all__ = ["REPLAYED", "Ledger", "OnFailure", "Runner", "SimulationError"]

OnFailure = Literal["raise", "drop", "redraw"]
"""What a failed row does: end the campaign, leave a gap, or have a further row run in its place."""

REPLAYED = 2
"""Rows of a level that are run again."""

_PROBED = 2  # rows run before the bulk
_LARGEST_BATCH = 16 * BLOCK  # rows; bounds the memory that noise takes
_BATCH_SECONDS = 1.0  # what a batch of slow simulations should take, so that little is under way at any time
_ROW_BATCH_SECONDS = 0.05  # where rows run one by one, so that larger batches save nothing but the sending
_LONGEST_TRIAL = 10.0  # seconds that a larger batch may take to see whether it is cheaper by the row
_CHEAPER = 0.8  # of the seconds a row, to go on to an even larger one
_SHARED_DEATHS = 2  # of a worker that ran a batch beside others, after which it runs with nothing else under way
_LONELY_DEATHS = 2  # of a worker that ran a row alone, after which the row is set aside: once may be chance
_PAUSE = 0.25  # seconds after which what waits in the ledger is looked at
_PATIENCE = 60.0  # seconds without a result after which a cluster's workers are counted
_ALL_FAILED = 32  # rows after which a simulator that never finished one is given up
_MOST_REDRAWN = 10  # times the rows wanted, and 100, that redrawing may run
_FAILURES_KEPT = 5  # shown in an error
_GONE = ("The executor takes no more work: was it shut down, or its cluster? What was finished is kept in the store, "
         "or without one as this error's `data`. Call again with a running one.")


class SimulationError(RuntimeError):
    r"""A simulation failed and the campaign was to stop, or nothing could be simulated at all.

    Args:
        message: What happened and how to go on.
        failures: What went wrong, one sentence a row.
    """

    def __init__(self, message: str, failures: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)
        self.data: Any = None
        """The rows that were finished before, for `simulate(..., reuse=error.data)`; `None` where there are none."""


class Ledger(Protocol):
    """Where finished batches are kept, such as a store's writer."""

    def add(self, stream: Stream, records: Records) -> None:
        """Keeps records for good."""
        ...

    def add_replay(self, stream: Stream, index: Any, runs: Any, seconds: Any) -> None:
        """Keeps what a replay cost."""
        ...

    def tick(self) -> None:
        """Is called now and then."""
        ...

    def flush(self) -> None:
        """Is called before a while in which there is no time for it."""
        ...


@dataclass
class Runner:
    r"""Sends batches of rows to workers, a bounded number at a time, and takes what comes back.

    Args:
        workers: Where simulations run.
        ledger: Where finished batches are kept; `None` to keep them in memory only.
        progress: Bars, one per term.
        batch_size: Rows a call; chosen from the simulators' speed when `None`.
        on_failure: What a failed row does.
        shape: Shape of one output, where it is known.
        describe: Says of a theta which parameters it has.
        recall: Fills a term with the rows, from a given one on, that an earlier campaign left.
        terms: How many terms there are.
    """

    workers: Workers
    ledger: Ledger | None
    progress: Progress
    batch_size: int | None
    on_failure: OnFailure
    shape: tuple[int, ...] | None
    describe: Callable[[Tensor], str]
    recall: Callable[[Term, int], None]
    terms: int

    def __post_init__(self) -> None:
        self._again: deque[Batch] = deque()
        self._flying: dict[Future[Any], Batch] = {}
        self._stopped: Exception | None = None
        self._idle = 0.0  # seconds in which nothing came back

    def probe(self, terms: Sequence[Term]) -> None:
        """Runs the first rows of terms of which none is finished, and sees to it that levels keep their contract."""
        waiting = [term for term in terms if term.missing and not term.finished and not self._needs_no_probe(term)]
        while waiting:
            batches = []
            for term in waiting:
                # Rows that run one by one are kept one by one, however long each takes.
                single = _runs_row_by_row(term)
                for _ in range(_PROBED if single else 1):
                    if term.missing:
                        batches.append(self._cut(term, 1 if single else _PROBED, guard=True))
            self._work(iter(batches))
            waiting = [term for term in waiting if term.missing and not term.finished]

    def replay(self, wanted: Sequence[tuple[Term, tuple[int, ...], int]]) -> None:
        """Runs levels of terms again at their first finished rows and compares: a level must be deterministic.

        Args:
            wanted: Terms, the places of the levels, and how many rows were replayed before.
        """
        batches: list[Batch] = []
        for term, places, done in wanted:
            rows = term.first + np.flatnonzero(term.status == OK)[:max(REPLAYED - done, 0)]
            # One row at a time and backwards: what depends on the rest of a batch, or on calls before, shows too.
            batches += [Batch(term, row, row + 1, replay=places) for row in rows[::-1].tolist() if places]
        self._work(iter(batches))

    def finish(self, terms: Sequence[Term]) -> None:
        """Runs all that is missing, finest term first."""
        for term in terms:
            term.batch = self.batch_size or self._first_batch(term)

        def batches() -> Iterable[Batch]:
            for term in reversed(terms):
                while term.missing:
                    yield self._cut(term, term.batch)

        source = iter(batches())
        self._work(source)
        while any(term.missing for term in terms):  # redrawn rows of terms that the source had left behind
            self._work(iter(batches()))

    def _needs_no_probe(self, term: Term) -> bool:
        """Whether nothing is gained by holding many workers back until a dear row or two have come."""
        return _runs_row_by_row(term) and not self.workers.serial and term.place == self.terms - 1

    def _cut(self, term: Term, rows: int, *, guard: bool = False) -> Batch:
        start, stop = term.missing.popleft()
        if stop - start > rows:
            term.missing.appendleft((start + rows, stop))
        return Batch(term, start, min(stop, start + rows), guard=guard)

    def _work(self, batches: Any) -> None:
        """Runs batches until there are none left; on the way out, what is done is kept."""
        more = True
        try:
            while True:
                while self._stopped is None and self._has_room():
                    batch = self._again.popleft() if self._again else next(batches, None)
                    more = batch is not None
                    if batch is None:
                        break
                    self._send(batch)
                if not self._flying:
                    if self._stopped is not None:
                        raise self._stopped
                    if not more and not self._again:
                        return
                    continue
                self._receive()
        except BaseException:
            self._keep_what_is_done()
            raise

    def _has_room(self) -> bool:
        if any(_is_alone(batch) for batch in self._flying.values()):
            return False
        if self._again and _is_alone(self._again[0]):
            return not self._flying
        return len(self._flying) < (1 if self.workers.serial else 2 * self.workers.width)

    def _send(self, batch: Batch) -> None:
        term = batch.term
        theta, noise = term.source.rows(batch.start, batch.stop)
        batch.theta, batch.seeds = theta.numpy().copy(), _seeds_of(noise)  # out of a simulator's reach
        levels = [term.levels[place] for place in batch.replay] or term.levels
        expected = Expected(self.shape, tuple(term.dtypes[place] for place in batch.replay) or tuple(term.dtypes))
        if not self.workers.serial:  # plain arrays travel between processes; tensors would share file descriptors
            noise = map_noise(Tensor.numpy, noise)
        if self.workers.serial and term.row_seconds * len(batch) > _ROW_BATCH_SECONDS:
            self._keep(lambda ledger: ledger.flush())
        try:
            future = self.workers.submit(run_levels, levels, theta if self.workers.serial else batch.theta, noise,
                                         expected, guard=batch.guard, plain=not self.workers.serial)
        except Exception as error:
            if not worker_died(error):
                shut_down = isinstance(error, RuntimeError) or "Closed" in type(error).__name__
                if self.workers.serial or not shut_down:
                    raise
                raise SimulationError(_GONE) from error
            future = Future()
            future.set_exception(error)
        self._flying[future] = batch

    def _receive(self) -> None:
        """Takes what has come back; after a worker's death everything under way is looked at again."""
        done, _ = wait(self._flying, timeout=_PAUSE, return_when=FIRST_COMPLETED)
        self._idle = 0.0 if done else self._idle + _PAUSE
        self.progress.refresh()
        if self._idle == _PATIENCE and self.workers.deserted:
            warnings.warn(f"Nothing has come back for {_PATIENCE:.0f} s and the cluster has no worker; waiting. "
                          "Is its queue long, or did its workers die?", stacklevel=2)
        died: list[tuple[Batch, BaseException]] = []
        for future in sorted(done, key=lambda future: (self._flying[future].term.place, self._flying[future].start)):
            batch = self._flying.pop(future)
            if future.cancelled():
                if self._stopped is None:
                    raise SimulationError(_GONE)
                continue
            error = future.exception()
            if error is None:
                self._take(batch, future.result())
            elif worker_died(error):
                died.append((batch, error))
            elif isinstance(error, ValueError):  # of a level that does not keep its contract
                self._stop(error)
            else:
                refusal = SimulationError(f"The executor could not run {self._name([batch])}: {type(error).__name__}: "
                                          f"{error} Can the simulators be pickled?")
                refusal.__cause__ = error
                self._stop(refusal)
        if died:
            self._mourn(died)
        self._keep(lambda ledger: ledger.tick())

    def _keep(self, write: Callable[[Ledger], None]) -> None:
        """Has the ledger keep something; where it cannot, such as on a full disk, what is running may still finish."""
        if self.ledger is None:
            return
        try:
            write(self.ledger)
        except StoreError as error:  # the ledger has it in memory, and tries again
            self._stop(error)

    def _mourn(self, died: list[tuple[Batch, BaseException]]) -> None:
        """Looks after batches whose worker died: tries them again, in the end one by one, to find which is to blame."""
        if any(type(error).__name__ != "KilledWorker" for _, error in died):  # the pool broke: all in it is lost
            self._take_what_is_done()
            died += [(batch, died[0][1]) for batch in self._flying.values()]
            self._flying.clear()
            if not self.workers.renewable:
                raise SimulationError(
                    f"The executor broke: {died[0][1]}. It was running {self._name(batch for batch, _ in died)}. Pass "
                    "a function that makes an executor, and a broken one is replaced and the row to blame found."
                ) from died[0][1]
            self.workers.renew()
        guilty = len(died) == 1
        for batch, error in sorted(died, key=lambda pair: (pair[0].term.place, pair[0].start), reverse=True):
            was_alone = _is_alone(batch) and guilty
            batch.deaths += 1
            batch.lonely_deaths += was_alone
            if not was_alone:
                self._again.append(batch) if _is_alone(batch) else self._again.appendleft(batch)
            elif len(batch) > 1:
                self._again.extend(batch.halves())
            elif batch.lonely_deaths < _LONELY_DEATHS:
                self._again.append(batch)
            else:
                self._quarantine(batch, error)

    def _quarantine(self, batch: Batch, error: BaseException) -> None:
        if batch.replay:
            raise SimulationError(f"A worker died {batch.deaths} times while it ran {self._name([batch])} again, which "
                                  "it had finished before.") from error
        levels = len(batch.term.levels)
        outcome = Outcome([None] * levels, np.zeros(1, np.uint8), np.full((1, levels), batch.deaths),
                          np.zeros((1, levels)), {})
        outcome.fail(0, "worker died", f"The worker process died {batch.deaths} times with this row under way, the "
                                       f"last {_LONELY_DEATHS} times alone: {type(error).__name__}: {error}")
        self._take(batch, outcome)

    def _take(self, batch: Batch, outcome: Outcome) -> None:
        """Keeps a batch, or splits one of which it is not known which row failed."""
        term = batch.term
        if batch.replay:
            self._compare(batch, outcome)
            return
        if outcome.whole:
            batch.lost_runs = batch.lost_runs + outcome.runs.max(0)
            batch.lost_seconds = batch.lost_seconds + outcome.seconds.mean(0)
            self._check_shape_of_probe(batch, outcome)
            self._again.extendleft(reversed(batch.halves()))
            if self.batch_size is None and len(batch) >= term.batch:  # the larger, the more is run again
                term.batch = max(1, term.batch // 4)
            return
        self._check_shape_of_probe(batch, outcome)
        levels = len(term.levels)
        known = [output for output in outcome.outputs if output is not None]
        shape = known[0].shape[1:] if known else self.shape
        if len(known) < levels and (outcome.status == OK).any():
            raise RuntimeError("A finished row lacks an output.")
        dtypes = [output.dtype if output is not None else term.dtypes[place]
                  for place, output in enumerate(outcome.outputs)]
        outputs: tuple[Any, ...] = ()
        if shape is not None and all(dtype is not None for dtype in dtypes):
            outputs = tuple(
                output if output is not None
                else np.full((len(batch), *shape), np.nan if dtype.kind == "f" else 0, dtype)
                for output, dtype in zip(outcome.outputs, dtypes, strict=True)
            )
        records = Records(
            np.arange(batch.start, batch.stop), batch.theta, outputs, outcome.status,
            outcome.runs + batch.lost_runs, outcome.seconds + batch.lost_seconds, outcome.messages, batch.seeds,
        )  # fmt: skip
        term.put(records)
        self._keep(lambda ledger: ledger.add(term.stream, records))
        if self.shape is None and (outcome.status == OK).any():
            self.shape = shape
        self._fit_batch(batch, float(records.seconds.sum()))
        self.progress.advance(term.place, len(batch), float(records.seconds.sum()), runs=int(records.runs[:, -1].sum()),
                              width=self.workers.width)
        failed = len(outcome.messages)
        if failed:
            self._fail(term, failed, outcome.error)

    def _check_shape_of_probe(self, batch: Batch, outcome: Outcome) -> None:
        """A wrong shape or type in a term's first rows is the simulator's, not the row's."""
        wrong = np.flatnonzero(np.isin(outcome.status, [STATUSES.index("wrong shape"), STATUSES.index("wrong type")]))
        if len(wrong) and not batch.term.finished:
            raise ValueError(outcome.messages[int(wrong[0])])
        known = next((output for output in outcome.outputs if output is not None), None)
        if known is not None and self.shape is not None and known.shape[1:] != self.shape:
            raise ValueError(f"Expected every level to return rows of one shape, {self.shape}; level "
                             f"'{batch.term.levels[0].name}' returned {known.shape[1:]}. Map its output to the "
                             "others'.")

    def _fail(self, term: Term, failed: int, error: BaseException | None) -> None:
        if self.on_failure == "raise":
            self._stop(self.refuse(term, error))
            return
        enough = _ALL_FAILED if self.on_failure == "redraw" else min(_ALL_FAILED, term.n)
        if not (term.finished or term.proven) and term.done >= enough:
            raise SimulationError(f"Every one of the first {term.done} rows of level '{term.label}' failed. Check the "
                                  f"simulator over the whole prior. {self._sentences(term)}", self._messages(term))
        if self.on_failure == "redraw":
            if len(term.status) + failed > _MOST_REDRAWN * term.n + 100:
                raise SimulationError(
                    f"Only {term.finished} of {term.done} rows of '{term.label}' were finished: redrawing the failed "
                    f"ones would take many times the {term.n} rows asked for. Narrow the prior to where simulations "
                    f"succeed, or mend the simulator. {self._sentences(term)}", self._messages(term))
            self._redraw(term, failed)

    def _redraw(self, term: Term, rows: int) -> None:
        """Wants further rows of a term, from an earlier campaign or to be run."""
        while rows:
            start, failed = term.stop, len(term.failures)
            term.extend(rows)
            self.progress.extend(term.place, rows)
            self.recall(term, start)
            term.missing.extend(cut_missing(term.status[start - term.first:] != MISSING, start))
            rows = len(term.failures) - failed

    def _stop(self, error: Exception) -> None:
        """Begins nothing more; the error is raised once what is running has finished."""
        self._stopped = self._stopped or error
        for future in self._flying:
            future.cancel()

    def refuse(self, term: Term, error: BaseException | None = None, *, before: str = "") -> SimulationError:
        """The error that ends a campaign because rows of a term failed."""
        refusal = SimulationError(
            f"{len(term.failures)} of {term.done} rows run of '{term.label}' failed{before}. {self._sentences(term)}\n"
            "What was finished is kept in the store, or without one as this error's `data`, for `reuse=`. Go on "
            "without such rows by on_failure=\"drop\" (fewer rows) or \"redraw\" (others in their place), on the "
            "command line --on-failure; either restricts the prior to where simulations succeed. Or mend the "
            "simulator, have the store take its new code (accept_code, --accept-code) and run failed rows again "
            "(retry_failed=True, --retry-failed).", self._messages(term))
        refusal.__cause__ = error
        return refusal

    def _messages(self, term: Term) -> list[str]:
        return [f"row {row}: {status}: {message}" for row, (status, message) in sorted(term.failures.items())]

    def _sentences(self, term: Term) -> str:
        rows = sorted(term.failures)[:_FAILURES_KEPT]
        told = []
        for row in rows:
            theta, noise = term.source.rows(row, row + 1)
            seeds = _seeds_of(noise)
            seed = "" if seeds is None else f", seed {seeds[0]}"
            told.append(f"Row {row} ({self.describe(theta[0])}{seed}): {': '.join(term.failures[row]).rstrip('.')}.")
        if len(term.failures) > len(rows):
            told.append(f"And {len(term.failures) - len(rows)} more.")
        return " ".join(told)

    def _name(self, batches: Iterable[Batch]) -> str:
        return ", ".join(f"rows {batch.start} to {batch.stop - 1} of '{batch.term.label}'" for batch in batches)

    def _compare(self, batch: Batch, outcome: Outcome) -> None:
        term, row = batch.term, batch.start - batch.term.first
        runs, seconds = np.zeros((1, len(term.levels)), np.int64), np.zeros((1, len(term.levels)))
        runs[:, batch.replay], seconds[:, batch.replay] = outcome.runs, outcome.seconds
        term.runs += runs[0]
        term.seconds += seconds[0]
        self._keep(lambda ledger: ledger.add_replay(term.stream, np.array([batch.start]), runs, seconds))
        for place, output in zip(batch.replay, outcome.outputs, strict=True):
            first = term.outputs[place][row]
            again = None if output is None else torch.from_numpy(output[0]).to(first.dtype)
            # A row run alone may round otherwise than in a batch, by a few units of its largest output's last place.
            largest = float(first.abs().max()) if first.numel() else 0.0
            if again is None or not torch.allclose(first, again, rtol=1e-5, atol=1e-5 * largest):
                raise ValueError(
                    f"Level '{term.levels[place].name}' is not deterministic: the same theta and noise gave two "
                    "different outputs, in a batch and alone. Draw all randomness from `noise` (or seed from it), and "
                    "let no row depend on another."
                )

    def _keep_what_is_done(self) -> None:
        """Takes what came back in the meantime, for a campaign that is being left."""
        self._stop(SimulationError("left"))
        self._take_what_is_done()

    def _take_what_is_done(self) -> None:
        for future, batch in list(self._flying.items()):
            if future.done() and not future.cancelled() and future.exception() is None:
                del self._flying[future]
                self._take(batch, future.result())

    def _first_batch(self, term: Term) -> int:
        rows = sum(stop - start for start, stop in term.missing)
        term.row_seconds = float(term.seconds.sum()) / max(int(term.runs[-1]), 1)  # call overhead included
        if _runs_row_by_row(term) and not term.finished:  # not probed
            return 1
        if term.row_seconds * _PROBED < 0.02 and not _runs_row_by_row(term):  # a call costs little: vectorised
            quick = int(_BATCH_SECONDS / max(term.row_seconds, 1e-6))
            return max(1, min(_LARGEST_BATCH, quick, math.ceil(rows / (4 * self.workers.width - 3))))
        batch = max(1, min(BLOCK, math.ceil(_seconds_of_batch(term) / max(term.row_seconds, 1e-6))))
        if not _runs_row_by_row(term) and batch <= _PROBED and 2 * _PROBED * term.row_seconds < _LONGEST_TRIAL:
            return 2 * _PROBED  # is a larger batch cheaper by the row?
        return batch

    def _fit_batch(self, batch: Batch, seconds: float) -> None:
        term = batch.term
        if self.batch_size is not None or not term.batch or len(batch) < term.batch:
            return
        before, term.row_seconds = term.row_seconds, seconds / len(batch)
        wanted = _seconds_of_batch(term)
        if not _runs_row_by_row(term) and term.row_seconds < _CHEAPER * before and 2 * seconds < _LONGEST_TRIAL:
            term.batch *= 2  # its calls have an overhead to share
        elif seconds < wanted / 4:
            term.batch *= 2
        elif seconds > 4 * wanted and term.row_seconds > before / 2:
            term.batch = max(1, term.batch // 2)
        term.batch = min(term.batch, _LARGEST_BATCH)


def _runs_row_by_row(term: Term) -> bool:
    return all(isinstance(level.simulate, RowSimulator) for level in term.levels)


def _seconds_of_batch(term: Term) -> float:
    return _ROW_BATCH_SECONDS if _runs_row_by_row(term) else _BATCH_SECONDS


def _is_alone(batch: Batch) -> bool:
    """Whether it must be the only one under way, so that it is clear of what a worker dies."""
    return batch.deaths >= _SHARED_DEATHS


def _seeds_of(noise: Any) -> Any:
    """The rows' seeds, where noise is one per row."""
    return noise.numpy() if isinstance(noise, Tensor) and noise.dtype == torch.int64 and noise.ndim == 1 else None
