r"""Immutable files of records: written whole or not at all, named after their content, read without pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import re
import socket
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlsbi.simulation.records import OK, STATUSES, Records, Stream

__all__ = [
    "LARGEST", "TEMPORARY", "DamagedShardError", "Ranges", "Replay", "Shard", "StoreError", "Tries", "belongs",
    "encode", "join", "order", "parse_name", "read_bytes", "read_meta", "read_records", "read_tries", "split",
    "sync_folder", "write_file",
]  # fmt: skip

LARGEST = 16 << 20
"""Bytes of arrays a shard holds at most, unless a single row is larger."""

TEMPORARY = ".tmp-"
"""How names of unfinished files begin."""

_LAYOUT = 1
_NAME = re.compile(r"(?P<kind>replay-)?(?P<number>\d+)-(?P<seed>\d+|x[0-9a-f]{16})-(?P<levels>[\d+]+|x[0-9a-f]{16})-"
                   r"(?P<first>\d+)-(?P<last>\d+)-(?P<digest>[0-9a-f]{20})\.npz")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_counter = itertools.count()

Array = np.ndarray[Any, Any]


class StoreError(ValueError):
    """A store cannot do what was asked; the message says what to do."""


class DamagedShardError(StoreError):
    """A shard's bytes are not those that were written."""


class Ranges:
    r"""A set of row indices, kept as half-open ranges.

    Args:
        pairs: Ranges `[start, stop)`, ascending and apart, int64, shape `(k, 2)`.

    Example:
        >>> done = Ranges.of([0, 1, 2, 7]) | Ranges([(10, 12)])
        >>> list(done), len(done), list(Ranges([(0, 12)]) - done)
        ([(0, 3), (7, 8), (10, 12)], 6, [(3, 7), (8, 10)])
    """

    def __init__(self, pairs: Array | Sequence[tuple[int, int]] = ()) -> None:
        self.pairs = np.asarray(pairs, np.int64).reshape(-1, 2)

    @classmethod
    def of(cls, indices: Array | Sequence[int]) -> Ranges:
        """The set of the given indices, in any order, repeated or not."""
        found = np.unique(np.asarray(indices, np.int64))
        if not len(found):
            return cls()
        cuts = np.flatnonzero(np.diff(found) > 1)
        return cls(np.stack([found[np.r_[0, cuts + 1]], found[np.r_[cuts, len(found) - 1]] + 1], axis=1))

    @classmethod
    def union(cls, parts: Iterable[Ranges]) -> Ranges:
        """What is in any of the parts."""
        pairs = np.concatenate([np.empty((0, 2), np.int64), *(part.pairs for part in parts)])
        if not len(pairs):
            return cls()
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        reach = np.maximum.accumulate(pairs[:, 1])
        opens = np.r_[True, pairs[1:, 0] > reach[:-1]]
        return cls(np.stack([pairs[opens, 0], reach[np.r_[np.flatnonzero(opens)[1:] - 1, len(pairs) - 1]]], axis=1))

    def __or__(self, other: Ranges) -> Ranges:
        return Ranges.union([self, other])

    def __sub__(self, other: Ranges) -> Ranges:
        if not len(self.pairs) or not len(other.pairs):
            return self
        low, high = self.pairs[0, 0], max(self.pairs[-1, 1], other.pairs[-1, 1]) + 1
        gaps = np.stack([np.r_[low, other.pairs[:, 1]], np.r_[other.pairs[:, 0], high]], axis=1)
        return self & Ranges(gaps[gaps[:, 0] < gaps[:, 1]])

    def __and__(self, other: Ranges) -> Ranges:
        """Pairs of ranges that meet, found by bisection."""
        if not len(self.pairs) or not len(other.pairs):
            return Ranges()
        first = np.searchsorted(other.pairs[:, 1], self.pairs[:, 0], side="right")
        last = np.searchsorted(other.pairs[:, 0], self.pairs[:, 1], side="left")
        counts = np.maximum(last - first, 0)
        mine = np.repeat(np.arange(len(counts)), counts)
        theirs = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        starts = np.maximum(self.pairs[mine, 0], other.pairs[theirs, 0])
        return Ranges(np.stack([starts, np.minimum(self.pairs[mine, 1], other.pairs[theirs, 1])], axis=1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and np.array_equal(self.pairs, other.pairs)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return int((self.pairs[:, 1] - self.pairs[:, 0]).sum())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((start, stop) for start, stop in self.pairs.tolist())

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"

    def holds(self, indices: Array) -> Array:
        """Whether each index is in the set."""
        place = np.searchsorted(self.pairs[:, 0], indices, side="right") - 1
        return (place >= 0) & (indices < np.r_[self.pairs[:, 1], 0][place])

    def rank(self, indices: Array) -> Array:
        """How many members lie below each index."""
        sizes = self.pairs[:, 1] - self.pairs[:, 0]
        below = np.r_[0, np.cumsum(sizes)]
        place = np.searchsorted(self.pairs[:, 0], indices, side="right") - 1
        inside = np.minimum(indices - np.r_[self.pairs[:, 0], 0][place], np.r_[sizes, 0][place])
        return np.where(place < 0, 0, below[place] + inside)

    def indices(self) -> Array:
        """Every member, ascending, int64."""
        return np.concatenate([np.empty(0, np.int64), *(np.arange(a, b) for a, b in self.pairs.tolist())])


@dataclass(frozen=True)
class Replay:
    r"""Rows of a stream that were run again, to see whether its simulators are deterministic.

    Args:
        index: Rows, int64, shape `(n,)`.
        runs: Simulator runs of each level, shape `(n, levels)`.
        seconds: Time spent in each, shape `(n, levels)`.
    """

    index: Array
    runs: Array
    seconds: Array


@dataclass(frozen=True)
class Shard:
    r"""What is known of a shard without reading its data.

    Args:
        name: File name.
        stream: The stream of its rows.
        replays: Whether it holds a `Replay` rather than records.
        records: How many.
        ok: Rows with a finished record.
        failed: Rows with a failed record, by status.
        runs: Simulator runs of each of the stream's levels.
        seconds: Time spent in each.
        outputs: Dtype and shape of a row of each level's output; `None` where no row has any.
        theta: Dtype and shape of a row's parameters; `None` for replays.
        messages: What went wrong most often, with counts.
        size: Bytes of the file.
    """

    name: str
    stream: Stream
    replays: bool
    records: int
    ok: Ranges
    failed: Mapping[int, Ranges]
    runs: tuple[int, ...]
    seconds: tuple[float, ...]
    outputs: tuple[tuple[str, tuple[int, ...]] | None, ...]
    theta: tuple[str, tuple[int, ...]] | None
    messages: Mapping[str, int]
    size: int

    @property
    def rows(self) -> Ranges:
        """Every row it has a record of."""
        return Ranges.union([self.ok, *self.failed.values()])

    @property
    def first(self) -> int:
        """The first of them."""
        return int(self.rows.pairs[0, 0])


@dataclass(frozen=True)
class Tries:
    r"""The part of a shard's records that tells them apart, n of them: index, status, runs and seconds."""

    index: Array
    status: Array
    runs: Array
    seconds: Array

    def keys(self) -> list[Array]:
        """Columns to sort by, the least important first: by row, finished records first, then the quickest."""
        columns = [*self.runs.T, *self.seconds.T]
        return [*columns, self.status, self.seconds.sum(1), self.status != OK, self.index]


def order(tries: Tries) -> tuple[Array, Array]:
    """Positions in the order of `Tries.keys`, and which of these (sorted) repeat the record before them."""
    keys = tries.keys()
    places = np.lexsort(keys)
    repeated = np.zeros(len(places), bool)
    if len(places) > 1:
        repeated[1:] = np.logical_and.reduce([key[places[1:]] == key[places[:-1]] for key in keys])
    return places, repeated


def join(parts: Sequence[Records]) -> list[Records]:
    r"""Records of one stream put together, sorted by row, each distinct record once.

    Args:
        parts: Records in any order.

    Returns:
        One `Records` per combination of dtypes and shapes; rows without outputs go to the first that has any.
    """
    groups: list[tuple[list[Any], list[Records]]] = []
    for part in sorted(parts, key=lambda part: (sum(form is None for form in _forms(part)), str(_forms(part)))):
        forms = _forms(part)
        for known, members in groups:
            if all(a is None or b is None or a == b for a, b in zip(known, forms, strict=True)):
                known[:] = [a or b for a, b in zip(known, forms, strict=True)]
                members.append(part)
                break
        else:
            groups.append((list(forms), [part]))
    return [_join_alike(known, members) for known, members in groups]


def split(records: Records, *, largest: int = LARGEST) -> list[Records]:
    """Consecutive pieces of at most `largest` bytes, or of one row."""
    rows = max(1, largest // max(1, -(-records.nbytes // max(1, len(records)))))
    if rows >= len(records):
        return [records]
    return [records.take(np.arange(start, min(start + rows, len(records)))) for start in range(0, len(records), rows)]


def encode(stream: Stream, content: Records | Replay) -> tuple[Shard, bytes]:
    """A shard's file, in memory, and what is to be known of it."""
    index = np.ascontiguousarray(content.index, np.int64)
    arrays: dict[str, Array] = {"index": index, "runs": content.runs, "seconds": content.seconds}
    meta: dict[str, Any] = {
        "layout": _LAYOUT, "kind": "replays", "seed": stream.seed, "number": stream.number,
        "levels": list(stream.levels), "rows": len(index),
        "runs": content.runs.sum(0).tolist(), "seconds": content.seconds.sum(0).tolist(),
    }  # fmt: skip
    if isinstance(content, Records):
        status = np.asarray(content.status, np.uint8)
        outputs = {f"output_{place}": output for place, output in enumerate(_filled(content))}
        arrays = {"index": index, "theta": content.theta, **outputs, "status": status, "runs": content.runs,
                  "seconds": content.seconds, "messages": _text(dict(sorted(content.messages.items())))}
        if content.noise_seed is not None:
            arrays["noise_seed"] = content.noise_seed
        forms = _forms(content)
        counts: dict[str, int] = {}
        for message in content.messages.values():
            counts[message[:300]] = counts.get(message[:300], 0) + 1
        meta |= {
            "kind": "records", "ok": list(Ranges.of(index[status == OK])),
            "failed": {str(code): list(Ranges.of(index[status == code])) for code in np.unique(status[status != OK])},
            "theta": forms[0], "outputs": forms[2:],
            "messages": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]),
        }  # fmt: skip
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # np.savez would accept objects
        for member, array in {"meta": _text(meta), **arrays}.items():
            with archive.open(f"{member}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
    data = buffer.getvalue()
    name = _make_name(stream, isinstance(content, Replay), index, hashlib.sha256(data).hexdigest()[:20])
    return _parse_meta(name, json.loads(json.dumps(meta)), len(data)), data


def write_file(path: Path, data: bytes) -> None:
    r"""Writes a file so that it is there whole, for good, or not at all.

    Raises:
        StoreError: If the disk is full or cannot be written; the unfinished file is removed.
    """
    partial = path.parent / f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{next(_counter)}"
    try:
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        sync_folder(path.parent)
    except OSError as error:
        what = f"{error}. See to it that the folder can be written"
        if error.errno in _DISK_FULL:
            what = f"there is no space left for {len(data)} bytes ({error.strerror}). Free some"
        raise StoreError(f"{path.parent}: {what} and call again; everything written so far is safe.") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that need no such thing
            raise
    finally:
        os.close(descriptor)


def parse_name(name: str) -> str | None:
    """What rows a shard's name says it holds, in words; `None` where it is no name of a shard.

    Example:
        >>> parse_name("1-7-0+1-0-1023-0123456789abcdef0123.npz")
        'rows 0 to 1023 of stream 1 (levels 0+1, seed 7)'
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    seed = match["seed"] if match["seed"].isdigit() else "too long to name"
    kind = "replayed rows" if match["kind"] else "rows"
    return (f"{kind} {match['first']} to {match['last']} of stream {match['number']} (levels {match['levels']}, "
            f"seed {seed})")


def belongs(name: str, stream: Stream) -> bool:
    """Whether a file may hold rows of a stream, as far as its name tells."""
    match = _NAME.fullmatch(name)
    return match is None or any(
        name.startswith(_make_name(stream, replays, np.zeros(1, int), "")[: match.start("first")])
        for replays in (False, True)
    )


def read_meta(path: Path) -> Shard:
    r"""What a shard says of itself, without its data.

    Raises:
        DamagedShardError: If it is no whole shard, or not the one of that name.
        FileNotFoundError: If it is not there.
    """
    with _naming_damage(path), open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        first = archive.infolist()[0]
        if first.filename != "meta.npy" or first.compress_type != zipfile.ZIP_STORED or first.file_size > LARGEST:
            raise ValueError("it does not begin with a description of its rows")
        meta = json.loads(_read_member(archive, "meta").tobytes())
        shard = _parse_meta(path.name, meta, os.fstat(file.fileno()).st_size)
        needed = {"index.npy", "runs.npy", "seconds.npy"} | (set() if shard.replays else {"theta.npy", "status.npy"})
        if not needed <= set(archive.namelist()):
            raise ValueError("arrays are missing")
        return shard


def read_tries(path: Path) -> Tries:
    """The part of a shard's records that tells them apart; raises as `read_meta`."""
    with _naming_damage(path), zipfile.ZipFile(path) as archive:
        return Tries(*(_read_member(archive, name) for name in ("index", "status", "runs", "seconds")))


def read_bytes(path: Path) -> bytes:
    """A shard's file, once its content is found to be that of its name; raises as `read_meta`."""
    with _naming_damage(path):
        data = path.read_bytes()
        match = _NAME.fullmatch(path.name)
        if match is None or hashlib.sha256(data).hexdigest()[:20] != match["digest"]:
            raise ValueError("its content has changed since it was written")
        return data


def read_records(path: Path, shard: Shard, *, check: bool = True) -> Records:
    """A shard's records; `check` hashes the file. Raises as `read_meta`."""
    source = io.BytesIO(read_bytes(path)) if check else path
    with _naming_damage(path), zipfile.ZipFile(source) as archive:
        def read(name: str) -> Array:
            return _read_member(archive, name)

        messages = {int(place): str(text) for place, text in json.loads(read("messages").tobytes()).items()}
        outputs = tuple(read(f"output_{place}") for place in range(len(shard.stream.levels)))
        noise_seed = read("noise_seed") if "noise_seed.npy" in archive.namelist() else None
        records = Records(read("index"), read("theta"), outputs, read("status"), read("runs"), read("seconds"),
                          messages, noise_seed)
        arrays = [records.theta, *outputs, records.status, records.runs, records.seconds]
        if any(len(array) != shard.records for array in [records.index, *arrays]):
            raise ValueError("its arrays do not align")
        return records


def _read_member(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(f"{name}.npy") as member:
        found: Array = np.lib.format.read_array(member, allow_pickle=False)
    return found


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turns whatever reading a spoilt file raises into one error that tells what is lost."""
    try:
        yield
    except (DamagedShardError, MemoryError):
        raise
    except OSError as error:
        if error.errno not in (None, errno.EIO, errno.EINVAL):  # a file that is gone, or too many open, is not damaged
            raise
        raise DamagedShardError(f"{path} is damaged: {error}. It held {parse_name(path.name) or 'unknown rows'}."
                                ) from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OverflowError,
            RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DamagedShardError(f"{path} is damaged: {error}. It held {parse_name(path.name) or 'unknown rows'}."
                                ) from error


def _make_name(stream: Stream, replays: bool, index: Array, digest: str) -> str:  # noqa: FBT001
    levels = "+".join(map(str, stream.levels))
    parts = [stream.number, _short(str(stream.seed), 20), _short(levels, 80), index.min(), index.max(), digest]
    return ("replay-" if replays else "") + "-".join(map(str, parts)) + ".npz"


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else "x" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _parse_meta(name: str, meta: Mapping[str, Any], size: int) -> Shard:
    if meta["layout"] > _LAYOUT:
        raise ValueError(f"it has layout {meta['layout']}, this version reads up to {_LAYOUT}: upgrade mlsbi")
    stream = Stream(int(meta["seed"]), int(meta["number"]), tuple(int(level) for level in meta["levels"]))
    replays = meta["kind"] == "replays"
    failed = {int(code): Ranges(pairs) for code, pairs in meta.get("failed", {}).items()}
    shard = Shard(
        name=name, stream=stream, replays=replays, records=int(meta["rows"]), ok=Ranges(meta.get("ok", ())),
        failed=failed, runs=tuple(int(n) for n in meta["runs"]), seconds=tuple(float(s) for s in meta["seconds"]),
        outputs=tuple(_as_form(form) for form in meta.get("outputs", ())), theta=_as_form(meta.get("theta")),
        messages=dict(meta.get("messages", {})), size=size,
    )  # fmt: skip
    ends = [0] if replays else [shard.first, int(shard.rows.pairs[-1, 1]) - 1]
    match = _NAME.fullmatch(name)
    if match is None or not name.startswith(_make_name(stream, replays, np.asarray(ends), "")[: match.start("first")]):
        raise ValueError("it is not the shard of that name")
    if not replays and ends != [int(match["first"]), int(match["last"])]:
        raise ValueError("it does not hold the rows that its name says")
    known = all(0 <= code < len(STATUSES) for code in failed)
    if not len(shard.runs) == len(shard.seconds) == len(stream.levels) or not known:
        raise ValueError("its description is inconsistent")
    return shard


def _as_form(form: Any) -> tuple[str, tuple[int, ...]] | None:
    return None if form is None else (str(np.dtype(form[0]).str), tuple(int(size) for size in form[1]))


def _forms(records: Records) -> list[Any]:
    """Dtype and shape of a row of theta, noise seed and each output; `None` for outputs that no row has."""
    forms: list[Any] = [(records.theta.dtype.str, records.theta.shape[1:])]
    forms.append(("none" if records.noise_seed is None else "seed", ()))
    for output in records.outputs or (np.empty(0),) * records.runs.shape[1]:
        forms.append((output.dtype.str, output.shape[1:]) if output.size else None)
    return forms


def _filled(records: Records) -> list[Array]:
    """Outputs with one leading dimension, also where no row has any."""
    empty = np.empty((len(records), 0), np.float32)
    outputs = records.outputs or (empty,) * records.runs.shape[1]
    return [np.ascontiguousarray(output) if output.size else empty for output in outputs]


def _join_alike(forms: Sequence[Any], parts: Sequence[Records]) -> Records:
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
    noise_seed = None
    if forms[1][0] == "seed":
        noise_seed = np.concatenate([part.noise_seed for part in parts if part.noise_seed is not None])
    index, theta, status, runs, seconds = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("index", "theta", "status", "runs", "seconds")
    )
    whole_records = Records(index, theta, tuple(outputs), status, runs, seconds, messages, noise_seed)
    places, repeated = order(Tries(index, status, runs, seconds))
    if not repeated.any() and np.array_equal(places, np.arange(n)):
        return whole_records
    return whole_records.take(places[~repeated])


def _text(value: Any) -> Array:
    return np.frombuffer(json.dumps(value, separators=(",", ":")).encode(), np.uint8)
