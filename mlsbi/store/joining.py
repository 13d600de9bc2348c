r"""Records of one stream put together: sorted by row, each distinct record once, in pieces of the size of a shard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlsbi.store.records import OK, Records

__all__ = [
    "LARGEST", "Form", "Order", "Tries", "forms_of", "group_alike", "join", "row_bytes", "sort_tries", "split",
]  # fmt: skip

LARGEST = 16 << 20
"""Bytes of arrays a piece holds at most, unless a single row is larger."""

Array = np.ndarray[Any, Any]
Form = tuple[str, tuple[int, ...]]
"""Dtype and shape of a row."""


@dataclass(frozen=True)
class Tries:
    r"""The part of records that tells them apart, n of them: index, status, runs and seconds."""

    index: Array
    status: Array
    runs: Array
    seconds: Array


@dataclass(frozen=True)
class Order:
    r"""Records of several parts in one order: by row, finished ones first, then the quickest.

    Args:
        owner: Which part each comes from, shape `(n,)`.
        position: Its place in that part.
        repeated: Whether it repeats the one before it.
        tries: The tries themselves, in this order.
    """

    owner: Array
    position: Array
    repeated: Array
    tries: Tries


def sort_tries(parts: Sequence[Tries]) -> Order:
    """The order of the records of at least one part."""
    index, status, runs, seconds = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("index", "status", "runs", "seconds")
    )
    keys = [*runs.T, *seconds.T, status, seconds.sum(1), status != OK, index]  # the least important first
    places = np.lexsort(keys)
    repeated = np.zeros(len(places), bool)
    repeated[1:] = np.logical_and.reduce([key[places[1:]] == key[places[:-1]] for key in keys])
    owner = np.repeat(np.arange(len(parts)), [len(part.index) for part in parts])
    position = np.concatenate([np.arange(len(part.index)) for part in parts])
    tries = Tries(index[places], status[places], runs[places], seconds[places])
    return Order(owner[places], position[places], repeated, tries)


def forms_of(records: Records) -> list[Form | None]:
    """Forms of theta, noise seed and each output; `None` for outputs that no row has."""
    forms: list[Form | None] = [(records.theta.dtype.str, records.theta.shape[1:])]
    forms.append(("none" if records.noise_seed is None else "seed", ()))
    for output in records.outputs or (np.empty(0),) * records.runs.shape[1]:
        forms.append((output.dtype.str, output.shape[1:]) if output.size else None)
    return forms


def group_alike(forms: Sequence[Sequence[Form | None]]) -> list[tuple[list[Form | None], list[int]]]:
    """Which parts, by place, can be joined, and their common forms; those without outputs go with the first with."""
    groups: list[tuple[list[Form | None], list[int]]] = []
    for place in sorted(range(len(forms)), key=lambda place: (list(forms[place]).count(None), str(forms[place]))):
        for known, members in groups:
            if all(a is None or b is None or a == b for a, b in zip(known, forms[place], strict=True)):
                known[:] = [a or b for a, b in zip(known, forms[place], strict=True)]
                members.append(place)
                break
        else:
            groups.append((list(forms[place]), [place]))
    return [(known, sorted(members)) for known, members in groups]


def row_bytes(forms: Sequence[Form | None]) -> int:
    """About what a row takes."""
    return 32 + sum(np.dtype(form[0]).itemsize * math.prod(form[1]) for form in forms if form is not None)


def join(parts: Sequence[Records]) -> list[Records]:
    r"""Records of one stream put together, sorted by row, each distinct record once.

    Args:
        parts: Records in any order.

    Returns:
        One `Records` per combination of dtypes and shapes; rows without outputs go to the first that has any.
    """
    groups = group_alike([forms_of(part) for part in parts])
    return [_join_alike(known, [parts[place] for place in members]) for known, members in groups]


def split(records: Records, *, largest: int = LARGEST) -> list[Records]:
    """Consecutive pieces of at most `largest` bytes, or of one row."""
    rows = max(1, largest // max(1, -(-records.nbytes // max(1, len(records)))))
    if rows >= len(records):
        return [records]
    return [records.take(np.arange(start, min(start + rows, len(records)))) for start in range(0, len(records), rows)]


def _join_alike(forms: Sequence[Form | None], parts: Sequence[Records]) -> Records:
    n = sum(len(part) for part in parts)
    starts = np.cumsum([0, *(len(part) for part in parts)])[:-1].tolist()
    outputs = []
    for place, form in enumerate(forms[2:]):
        dtype, shape = (np.dtype(form[0]), form[1]) if form is not None else (np.dtype(np.float32), (0,))
        whole = np.full((n, *shape), np.nan if dtype.kind == "f" else 0, dtype)
        for start, part in zip(starts, parts, strict=True):
            if part.outputs and part.outputs[place].size:
                whole[start : start + len(part)] = part.outputs[place]
        outputs.append(whole)
    messages = {
        start + at: text for start, part in zip(starts, parts, strict=True) for at, text in part.messages.items()
    }
    seeds = [part.noise_seed for part in parts if part.noise_seed is not None]
    index, theta, status, runs, seconds = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("index", "theta", "status", "runs", "seconds")
    )
    joined = Records(index, theta, tuple(outputs), status, runs, seconds, messages,
                     np.concatenate(seeds) if seeds else None)
    order = sort_tries([Tries(index, status, runs, seconds)])
    places = order.position[~order.repeated]
    return joined if np.array_equal(places, np.arange(n)) else joined.take(places)
