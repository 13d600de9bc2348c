r"""Running a stack: coupled rows of every level, checked while they come in."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mlsbi.data import LevelData, MultilevelData, spread
from mlsbi.levels import Level, LevelStack, map_noise
from mlsbi.priors import check_theta
from mlsbi.simulation.executors import SerialExecutor, open_executor
from mlsbi.simulation.seeding import BLOCK, RowSource

__all__ = ["JointRows", "Plan", "simulate", "simulate_joint", "simulate_level", "warn_left_out"]

_CHECKED = 2  # rows replayed to see whether a simulator is deterministic
_LARGEST_BATCH = 16 * BLOCK  # rows; bounds the memory that noise takes
_BATCH_SECONDS = 1.0  # what a batch of slow simulations should take, so that progress shows


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
        left_out: Rows dropped because an output was NaN or infinite.
        runs: Simulator runs per level run, dropped rows and replays included.
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
    executor: Executor | None = None,
    workers: int = 1,
    batch_size: int | None = None,
    replay_finest: bool = False,
    progress: bool = True,
) -> MultilevelData:
    r"""Simulates independent coupled rows for every level's term of the telescoping sum.

    The first two rows of every level but the finest are replayed to see whether its simulator is deterministic;
    replays are counted as runs, and not made when rows of a checked campaign, such as a pilot's, are reused.
    Rows with a NaN or infinite output are left out with their twin, counted per level and warned about.

    Args:
        stack: Prior, noise and levels.
        n_or_plan: Rows per level, cheapest first (one number for all), or a plan such as an `Allocation`.
        seed: Seed of everything random; theta and noise of a row depend on nothing else.
        reuse: Rows that exist already, such as a pilot's `.data`; they come first and count toward n.
        executor: Any `concurrent.futures.Executor`. Simulators must be picklable where it needs that.
        workers: Processes on this machine, when no executor is given.
        batch_size: Rows a call; chosen from the simulators' speed when left out. It changes no result.
        replay_finest: Whether the finest level is replayed too, which costs two of its runs.
        progress: Whether to show a progress bar.

    Returns:
        Data whose level l holds at most `n[l]` rows, fewer where rows were left out.

    Raises:
        ValueError: If a simulator returns another number of rows, or another shape than the other levels, changes
            its inputs, is not deterministic row by row, or gives nothing finite; if the noise does not come from its
            generator; if n does not fit the stack or `reuse`.

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
    names = stack.names
    wanted: Any = getattr(n_or_plan, "n", n_or_plan)
    n = spread(wanted, len(stack), what="n")
    have = list(reuse.n) if reuse is not None else [0] * len(stack)
    _check_request(stack, n, reuse, batch_size)
    lost = reuse.failures if reuse is not None else (0,) * len(stack)
    # New rows start behind as many as were made before: data of the same seed is extended, never repeated.
    terms = [
        _Term(stack.levels[max(level - 1, 0) : level + 1], level, n[level] - have[level], have[level] + lost[level])
        for level in range(len(stack))
    ]
    with open_executor(executor, workers) as pool, _bar(sum(term.n for term in terms), progress) as bar:
        runner = _Runner(stack, seed, pool, batch_size, bar, _known_shape(reuse))
        for term in terms:
            cheap = term.stream < len(stack) - 1 and not (reuse is not None and reuse.checked)
            runner.probe(term, replay=slice(-1, None) if cheap or (replay_finest and term is terms[-1]) else slice(0))
        for term in reversed(terms):
            runner.finish(term)
    rows = [runner.collect(term) for term in terms]
    levels, failures = [], []
    runs, seconds = [0] * len(stack), [0.0] * len(stack)
    for index, joint in enumerate(rows):
        old = reuse.levels[index] if reuse is not None else None
        new = None
        if joint is not None:
            new = LevelData(joint.theta, joint.outputs[-1], joint.outputs[0] if index else None)
            for offset, level in enumerate(range(max(index - 1, 0), index + 1)):
                runs[level] += joint.runs[offset]
                seconds[level] += joint.seconds[offset]
        failures.append((joint.left_out if joint else 0) + (reuse.failures[index] if reuse else 0))
        merged = old.followed_by(new) if old is not None and new is not None else (old or new)
        if merged is None or len(merged) == 0:
            raise ValueError(f"Every one of the {n[index]} rows of level '{names[index]}' gave NaN or infinite output. "
                             "Check the simulator over the whole prior.")
        levels.append(merged)
    warn_left_out(names, n, [joint.left_out if joint else 0 for joint in rows])
    if reuse is not None:
        runs = [a + b for a, b in zip(runs, reuse.runs, strict=True)]
        seconds = [a + b for a, b in zip(seconds, reuse.seconds or [0.0] * len(stack), strict=True)]
    return MultilevelData(tuple(levels), names, tuple(failures), tuple(runs), tuple(seconds))


def simulate_joint(
    stack: LevelStack,
    n: int,
    *,
    seed: int,
    stream: int,
    levels: slice = slice(None),
    executor: Executor | None = None,
    workers: int = 1,
    replay: bool = False,
    progress: bool = False,
) -> JointRows:
    r"""Runs several levels of a stack at the same n rows of theta and noise.

    Args:
        stack: Prior, noise and levels.
        n: Rows.
        seed: Seed of everything random.
        stream: Random stream, so that these rows are independent of every other stream's.
        levels: Which levels to run.
        executor: Any `concurrent.futures.Executor`.
        workers: Processes on this machine, when no executor is given.
        replay: Whether all levels but the last are replayed on two rows to see whether they are deterministic.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: As `simulate`.
    """
    term = _Term(tuple(stack.levels[levels]), stream, n)
    with open_executor(executor, workers) as pool, _bar(n, progress) as bar:
        runner = _Runner(stack, seed, pool, None, bar, None)
        runner.probe(term, replay=slice(-1) if replay else slice(0))
        runner.finish(term)
    joint = runner.collect(term)
    if joint is None:
        raise ValueError(f"Expected at least one row; got n={n}.")
    names = ", ".join(level.name for level in term.levels)
    if len(joint.theta) == 0:
        raise ValueError(f"Every one of {n} rows of {names} gave NaN or infinite output. Check the simulators over the "
                         "whole prior.")
    warn_left_out([names], [n], [joint.left_out])
    return joint


def simulate_level(stack: LevelStack, level: int, n: int, *, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """Draws `(theta, x)`: n plain rows of one level (negative counts from the finest) from a random stream."""
    index = range(len(stack))[level]
    joint = simulate_joint(stack, n, seed=seed, stream=stream, levels=slice(index, index + 1))
    return joint.theta, joint.outputs[0]


@dataclass
class _Term:
    """One stream of rows on which the same levels are run, and what came back so far."""

    levels: Sequence[Level]
    stream: int
    n: int
    first: int = 0  # row of the stream to begin with
    done: int = 0
    runs: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rows: tuple[Tensor, list[Tensor], Tensor] | None = None  # theta, outputs, whether finite: n rows, filled batch-wise

    def __post_init__(self) -> None:
        self.runs, self.seconds = [0] * len(self.levels), [0.0] * len(self.levels)

    def put(self, start: int, theta: Tensor, outputs: Sequence[Tensor]) -> None:
        """Writes a batch in its place: joining batches later would take twice the memory."""
        if self.rows is None:
            places = [torch.empty(self.n, *output.shape[1:], dtype=output.dtype) for output in outputs]
            self.rows = torch.empty(self.n, *theta.shape[1:], dtype=theta.dtype), places, torch.ones(self.n).bool()
        at = slice(start, start + len(theta))
        self.rows[0][at] = theta
        for place, output in zip(self.rows[1], outputs, strict=True):
            place[at] = output
            self.rows[2][at] &= torch.isfinite(output).flatten(1).all(1)


@dataclass
class _Runner:
    """Sends batches of rows to an executor and checks what comes back."""

    stack: LevelStack
    seed: int
    pool: Executor
    batch_size: int | None
    bar: Any
    shape: tuple[int, ...] | None
    sources: dict[int, RowSource] = field(default_factory=dict)

    def probe(self, term: _Term, *, replay: slice) -> None:
        """Runs a term's first rows alone, checks them, and runs the levels `replay` of the term again."""
        rows = min(_CHECKED, term.n)
        if rows == 0:
            return
        if not self.sources:
            RowSource(self.stack, seed=self.seed, stream=term.stream).check_noise()
        theta, noise = self._draw(term, 0, rows)
        self._take(term, 0, theta, self._submit(term.levels, theta, noise, guard=True))
        first = term.rows[1] if term.rows is not None else []
        replayed = range(len(term.levels))[replay]
        for row in reversed(range(rows)) if replayed else ():
            # One row at a time and backwards: what depends on the rest of a batch, or on calls before, shows too.
            one, its_noise = self._draw(term, row, row + 1)
            again, seconds = _receive(self._submit([term.levels[index] for index in replayed], one, its_noise))
            for index, output, took in zip(replayed, again, seconds, strict=True):
                term.runs[index] += 1
                term.seconds[index] += took
                _check_replay(term.levels[index], first[index][row : row + 1], output)
        term.done = rows

    def finish(self, term: _Term) -> None:
        """Runs the rest of a term's rows, a bounded number of batches in flight."""
        flying: deque[tuple[int, Tensor, Future[Any]]] = deque()
        batch = self._first_batch(term)
        while term.done < term.n or flying:
            if term.done < term.n and len(flying) < 2 * _parallelism(self.pool):
                stop = min(term.done + batch, term.n)
                theta, noise = self._draw(term, term.done, stop)
                flying.append((term.done, theta, self._submit(term.levels, theta, noise)))
                term.done = stop
            if flying and (isinstance(self.pool, SerialExecutor) or len(flying) >= 2 * _parallelism(self.pool)
                           or term.done == term.n):
                start, theta, future = flying.popleft()
                seconds = self._take(term, start, theta, future)
                batch = self._next_batch(batch, seconds)

    def collect(self, term: _Term) -> JointRows | None:
        """A term's rows, without those that have an output that is not finite."""
        if term.rows is None:
            return None
        theta, outputs, finite = term.rows
        left_out = int((~finite).sum())
        if left_out:
            theta, outputs = theta[finite], [output[finite] for output in outputs]
        return JointRows(theta, tuple(outputs), left_out, tuple(term.runs), tuple(term.seconds))

    def _draw(self, term: _Term, start: int, stop: int) -> tuple[Tensor, Any]:
        if term.stream not in self.sources:
            self.sources[term.stream] = RowSource(self.stack, seed=self.seed, stream=term.stream)
        return self.sources[term.stream].rows(term.first + start, term.first + stop)

    def _submit(self, levels: Sequence[Level], theta: Tensor, noise: Any, *, guard: bool = False) -> Future[Any]:
        if isinstance(self.pool, SerialExecutor):
            return self.pool.submit(_run, levels, theta, noise, guard=guard)
        # Plain arrays travel between processes; tensors would share file descriptors.
        return self.pool.submit(_run_arrays, levels, theta.numpy(), map_noise(Tensor.numpy, noise), guard=guard)

    def _take(self, term: _Term, start: int, theta: Tensor, future: Future[Any]) -> float:
        """Checks and keeps one batch; returns the seconds its simulators took."""
        outputs, seconds = _receive(future)
        for index, (level, output) in enumerate(zip(term.levels, outputs, strict=True)):
            if output.ndim == 0 or len(output) != len(theta):
                raise ValueError(f"Expected level '{level.name}' to return {len(theta)} rows, one per row of theta; "
                                 f"got shape {tuple(output.shape)}.")
            if output.ndim == 1:
                raise ValueError(f"Expected level '{level.name}' to return x of shape (n, ...); got "
                                 f"{tuple(output.shape)}. Return x[:, None] for one number a row.")
            if self.shape is None:
                self.shape = tuple(output.shape[1:])
            if tuple(output.shape[1:]) != self.shape:
                raise ValueError(f"Expected every level to return rows of one shape, {self.shape}; level "
                                 f"'{level.name}' returned {tuple(output.shape[1:])}. Map its output to the others'.")
            term.runs[index] += len(theta)
            term.seconds[index] += seconds[index]
        term.put(start, theta, outputs)
        self.bar.set_postfix_str(term.levels[-1].name, refresh=False)
        self.bar.update(len(theta))
        return sum(seconds)

    def _first_batch(self, term: _Term) -> int:
        if self.batch_size is not None:
            return self.batch_size
        probed = sum(term.seconds) / max(term.runs[-1], 1)  # seconds a row, call overhead included
        if probed * _CHECKED < 0.02:  # a call costs little: vectorised
            return max(1, min(_LARGEST_BATCH, math.ceil(term.n / (4 * _parallelism(self.pool) - 3))))
        return max(1, min(BLOCK, int(_BATCH_SECONDS / probed)))

    def _next_batch(self, batch: int, seconds: float) -> int:
        if self.batch_size is not None:
            return batch
        if seconds < _BATCH_SECONDS / 4:
            return min(2 * batch, _LARGEST_BATCH)
        return max(1, batch // 2) if seconds > 4 * _BATCH_SECONDS else batch


def _run(
    levels: Sequence[Level], theta: Tensor, noise: Any, *, guard: bool = False
) -> tuple[list[Tensor], list[float]]:
    """Runs levels at the same inputs; `guard` sees to it that none of them changes these, where they are."""
    outputs, seconds = [], []
    for level in levels:
        before = (theta.clone(), map_noise(torch.clone, noise)) if guard else None
        start = time.perf_counter()
        output = level.simulate(theta, noise)
        seconds.append(time.perf_counter() - start)
        if before is not None:
            _check_unchanged(level, before, (theta, noise))
        try:
            tensor = torch.as_tensor(output).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"Expected level '{level.name}' to return a tensor or array; got "
                             f"{type(output).__name__}.") from error
        if tensor.is_complex():
            raise ValueError(f"Expected level '{level.name}' to return real numbers; got complex ones. Return real and "
                             "imaginary parts as separate outputs.")
        outputs.append(tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype()))
    return outputs, seconds


def _run_arrays(
    levels: Sequence[Level], theta: np.ndarray[Any, Any], noise: Any, *, guard: bool
) -> tuple[list[Any], list[float]]:
    outputs, seconds = _run(levels, torch.from_numpy(theta), map_noise(torch.from_numpy, noise), guard=guard)
    return [output.cpu().numpy() for output in outputs], seconds


def _receive(future: Future[Any]) -> tuple[list[Tensor], list[float]]:
    outputs, seconds = future.result()
    return [torch.as_tensor(output).cpu() for output in outputs], seconds


def _parallelism(pool: Executor) -> int:
    return 1 if isinstance(pool, SerialExecutor) else int(getattr(pool, "_max_workers", None) or 8)


def _check_replay(level: Level, first: Tensor, again: Tensor) -> None:
    # A row run alone may round otherwise than in a batch, by a few units of its largest output's last place.
    largest = float(torch.nan_to_num(first, posinf=0.0, neginf=0.0).abs().max()) if first.numel() else 0.0
    if first.shape != again.shape or not torch.allclose(first, again, rtol=1e-5, atol=1e-5 * largest, equal_nan=True):
        raise ValueError(
            f"Level '{level.name}' is not deterministic: the same theta and noise gave two different outputs, in a "
            "batch and alone. Draw all randomness from `noise` (or seed from it), and let no row depend on another."
        )


def _check_unchanged(level: Level, before: tuple[Tensor, Any], after: tuple[Tensor, Any]) -> None:
    same: list[bool] = [torch.equal(before[0], after[0])]
    noise_before: list[Tensor] = []
    noise_after: list[Tensor] = []
    map_noise(noise_before.append, before[1])
    map_noise(noise_after.append, after[1])
    same += [torch.equal(a, b) for a, b in zip(noise_before, noise_after, strict=True)]
    if not all(same):
        raise ValueError(f"Expected a pure simulator; level '{level.name}' changed theta or noise in place. Work on a "
                         "copy.")


def _check_request(stack: LevelStack, n: list[int], reuse: MultilevelData | None, batch_size: int | None) -> None:
    if any(rows < 1 for rows in n):
        raise ValueError(f"Expected at least one row per level; got {tuple(n)} for {list(stack.names)}. "
                         "Leave a level out of the stack instead of giving it none.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"Expected batch_size >= 1; got {batch_size}.")
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


def warn_left_out(names: Sequence[str], n: Sequence[int], left_out: Sequence[int]) -> None:
    """Warns about rows left out of n per level, if there are any."""
    if any(left_out):
        what = ", ".join(f"{lost} of {total} at level '{name}'"
                         for name, total, lost in zip(names, n, left_out, strict=True) if lost)
        warnings.warn(f"Left out rows with NaN or infinite output, with their twins: {what}. "
                      "What is learned holds for the part of the prior where simulations succeed.", stacklevel=3)


def _bar(total: int, progress: bool) -> Any:  # noqa: FBT001
    return tqdm(total=total, desc="simulating", unit="row", disable=not progress, leave=False)
