r"""Running levels on a few rows, wherever that happens, every failure kept apart from the rest."""

from __future__ import annotations

import subprocess
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsbi.levels import Level, map_noise
from mlsbi.simulation.adapters import RowSimulator, noise_of_row
from mlsbi.store.records import OK, STATUSES

__all__ = ["Expected", "Outcome", "run_levels"]

Array = np.ndarray[Any, Any]
_LONGEST_MESSAGE = 4000


@dataclass(frozen=True)
class Expected:
    """What outputs must look like: one shape `(...)` for all levels, a dtype for each; `None` while unknown."""

    shape: tuple[int, ...] | None
    dtypes: tuple[np.dtype[Any] | None, ...]


@dataclass
class Outcome:
    r"""What became of n rows.

    Args:
        outputs: Of each level `(n, ...)`, `None` where no row has any.
        status: Place in `STATUSES`, shape `(n,)`.
        runs: Runs of each level, shape `(n, levels)`.
        seconds: Time in each level, shape `(n, levels)`.
        messages: What went wrong, by row.
        error: The exception of the first failed row, where it was raised in this process.
        whole: Whether the failure is that of all rows together, and which of them cause it is not known.
    """

    outputs: list[Array | None]
    status: Array
    runs: Array
    seconds: Array
    messages: dict[int, str]
    error: BaseException | None = None
    whole: bool = False

    def fail(self, row: int, status: str, message: str, error: BaseException | None = None) -> None:
        """Marks a row as failed."""
        self.status[row] = STATUSES.index(status)
        self.messages[row] = message[:_LONGEST_MESSAGE]
        self.error = self.error or error

    def put(self, place: int, rows: Array, output: Array) -> None:
        """Writes a level's output of some rows, the rest filled with NaN or zeros."""
        whole = self.outputs[place]
        if whole is None and len(rows) == len(self.status):
            self.outputs[place] = output
            return
        if whole is None:
            empty = np.nan if output.dtype.kind == "f" else 0
            self.outputs[place] = whole = np.full((len(self.status), *output.shape[1:]), empty, output.dtype)
        whole[rows] = output


def run_levels(
    levels: Sequence[Level], theta: Any, noise: Any, expected: Expected, *, guard: bool = False, plain: bool = False
) -> Outcome:
    r"""Runs levels, cheapest first, at the same rows; a row that fails at one is not run at the next.

    Args:
        levels: The levels.
        theta: Parameters `(n, D)`.
        noise: Noise of n rows.
        expected: What outputs must look like.
        guard: Whether to see to it that no level changes its inputs.
        plain: Whether inputs came as arrays, from another process, where exceptions may not travel back.

    Raises:
        ValueError: If a level does not keep to its contract: another number of rows, no arrays, inputs changed.
    """
    if plain:
        theta, noise = torch.from_numpy(theta), map_noise(torch.from_numpy, noise)
    n = len(theta)
    outcome = Outcome([None] * len(levels), np.zeros(n, np.uint8), np.zeros((n, len(levels)), np.int64),
                      np.zeros((n, len(levels))), {})
    shape = expected.shape
    for place, level in enumerate(levels):
        rows = np.flatnonzero(outcome.status == OK)
        if len(rows) == 0 or outcome.whole:
            break
        # Noise is large and looked at in the first rows alone.
        before = theta.clone(), map_noise(torch.clone, noise) if guard else None
        run = _run_each if isinstance(level.simulate, RowSimulator) else _run_together
        run(outcome, place, level, rows, theta, noise, Expected(shape, expected.dtypes))
        _check_unchanged(level, before, (theta, noise))
        found = outcome.outputs[place]
        shape = shape if found is None else found.shape[1:]
    if plain:
        outcome.error = None
    return outcome


def _run_together(
    outcome: Outcome, place: int, level: Level, rows: Array, theta: Tensor, noise: Any, expected: Expected
) -> None:
    if len(rows) < len(theta):
        theta, noise = theta[rows], map_noise(lambda leaf: leaf[rows], noise)
    failed: BaseException | None = None
    start = time.perf_counter()
    try:
        output = level.run(theta, noise)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a simulator raises is its row's failure
        failed = error
    outcome.seconds[rows, place] = (time.perf_counter() - start) / len(rows)
    outcome.runs[rows, place] = 1
    if failed is not None:
        _fail_together(outcome, rows, _status_of(failed), _describe(level, failed), failed)
        return
    array = _to_array(level, output)
    if array.ndim == 0 or len(array) != len(rows):
        raise ValueError(f"Expected level '{level.name}' to return {len(rows)} rows, one per row of theta; got shape "
                         f"{array.shape}.")
    if array.ndim == 1:
        raise ValueError(f"Expected level '{level.name}' to return x of shape (n, ...); got {array.shape}. Return "
                         "x[:, None] for one number a row.")
    fits, why = _fit(level, array, array.shape[1:], expected, place)
    if why:
        _fail_together(outcome, rows, *why)
        return
    outcome.put(place, rows, fits)
    _mark_not_finite(outcome, level, rows, fits)


def _fail_together(
    outcome: Outcome, rows: Array, status: str, message: str, error: BaseException | None = None
) -> None:
    outcome.whole = len(rows) > 1
    for row in rows.tolist():
        outcome.fail(row, status, message, error)


def _run_each(
    outcome: Outcome, place: int, level: Level, rows: Array, theta: Tensor, noise: Any, expected: Expected
) -> None:
    for row in rows.tolist():
        start, failed = time.perf_counter(), None
        try:
            own = level.own(theta[row]).numpy().copy()
            array = np.asarray(level.simulate.run_row(own, noise_of_row(noise, row)))  # type: ignore[attr-defined]
        except (Exception, SystemExit) as error:  # noqa: BLE001
            failed = error
        outcome.seconds[row, place] = time.perf_counter() - start
        outcome.runs[row, place] = 1
        if failed is not None:
            outcome.fail(row, _status_of(failed), _describe(level, failed), failed)
            continue
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        fits, why = _fit(level, array, array.shape, expected, place)
        if why:
            outcome.fail(row, *why)
            continue
        at = np.array([row])
        outcome.put(place, at, fits[None])
        _mark_not_finite(outcome, level, at, fits[None])
        if expected.shape is None or expected.dtypes[place] is None:
            dtypes = list(expected.dtypes)
            dtypes[place] = fits.dtype
            expected = Expected(array.shape, tuple(dtypes))


def _fit(
    level: Level, array: Array, shape: tuple[int, ...], expected: Expected, place: int
) -> tuple[Array, tuple[str, str] | None]:
    """The array in the dtype that is expected; and if it does not fit, the status and why."""
    if expected.shape is not None and shape != expected.shape:
        return array, ("wrong shape", f"Expected every level to return rows of one shape, {expected.shape}; level "
                                      f"'{level.name}' returned {shape}. Map its output to the others'.")
    dtype = expected.dtypes[place]
    if dtype is None or array.dtype == dtype:
        return array, None
    if np.can_cast(array.dtype, dtype, "safe"):
        return array.astype(dtype), None
    return array, ("wrong type", f"Expected level '{level.name}' to return numbers of one type, {dtype} as in its "
                                 f"first rows; it returned {array.dtype}.")


def _mark_not_finite(outcome: Outcome, level: Level, rows: Array, output: Array) -> None:
    if output.dtype.kind != "f":
        return
    finite = np.isfinite(output)
    if finite.all():
        return
    bad = (~finite).reshape(len(rows), -1).sum(1)
    for row, count in zip(rows[bad > 0].tolist(), bad[bad > 0].tolist(), strict=True):
        outcome.fail(row, "not finite", f"Level '{level.name}' returned {count} NaN or infinite of "
                                        f"{output[0].size} values.")


def _to_array(level: Level, output: Any) -> Array:
    try:
        tensor = torch.as_tensor(output).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Expected level '{level.name}' to return a tensor or array; got "
                         f"{type(output).__name__}.") from error
    if tensor.is_complex():
        raise ValueError(f"Expected level '{level.name}' to return real numbers; got complex ones. Return real and "
                         "imaginary parts as separate outputs.")
    if tensor.dtype == torch.bfloat16:  # which numpy lacks
        tensor = tensor.float()
    return tensor.cpu().numpy()


def _status_of(error: BaseException) -> str:
    return "time-out" if isinstance(error, (TimeoutError, subprocess.TimeoutExpired)) else "exception"


def _describe(level: Level, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" (line {frame.lineno} of {frame.name})" for frame in frames)
    return f"Level '{level.name}': {type(error).__name__}: {error}{where}"


def _check_unchanged(level: Level, before: tuple[Tensor, Any], after: tuple[Tensor, Any]) -> None:
    same: list[bool] = [torch.equal(before[0], after[0])]
    leaves: list[Tensor] = []
    others: list[Tensor] = []
    if before[1] is not None:
        map_noise(leaves.append, before[1])
        map_noise(others.append, after[1])
    same += [torch.equal(a, b) for a, b in zip(leaves, others, strict=True)]
    if not all(same):
        raise ValueError(f"Expected a pure simulator; level '{level.name}' changed theta or noise in place. Work on a "
                         "copy.")
