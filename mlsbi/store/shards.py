r"""The format of a shard: an immutable file of records, named after their content, read without pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlsbi.store.files import StoreError
from mlsbi.store.joining import LARGEST, Form, Tries, forms_of
from mlsbi.store.ranges import Ranges
from mlsbi.store.records import OK, STATUSES, Records, Stream

__all__ = [
    "DamagedShardError", "Replay", "Shard", "StoreError", "belongs", "encode", "parse_name", "read_bytes",
    "read_meta", "read_records", "read_tries",
]  # fmt: skip

_LAYOUT = 1
_NAME = re.compile(r"(?P<kind>replay-)?(?P<number>\d+)-(?P<seed>\d+|x[0-9a-f]{16})-(?P<levels>[\d+]+|x[0-9a-f]{16})-"
                   r"(?P<first>\d+)-(?P<last>\d+)-(?P<digest>[0-9a-f]{20})\.npz")

Array = np.ndarray[Any, Any]


class DamagedShardError(StoreError):
    """A shard's bytes are not those that were written."""


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
    outputs: tuple[Form | None, ...]
    theta: Form | None
    size: int

    @property
    def rows(self) -> Ranges:
        """Every row it has a record of."""
        return Ranges.union([self.ok, *self.failed.values()])

    @property
    def first(self) -> int:
        """The first of them."""
        return int(self.rows.pairs[0, 0])


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
        forms = forms_of(content)
        meta |= {
            "kind": "records", "ok": list(Ranges.of(index[status == OK])),
            "failed": {str(code): list(Ranges.of(index[status == code])) for code in np.unique(status[status != OK])},
            "theta": forms[0], "outputs": forms[2:],
        }  # fmt: skip
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # np.savez would accept objects
        for member, array in {"meta": _text(meta), **arrays}.items():
            with archive.open(f"{member}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
    data = buffer.getvalue()
    name = _make_name(stream, isinstance(content, Replay), index, hashlib.sha256(data).hexdigest()[:20])
    return _parse_meta(name, json.loads(json.dumps(meta)), len(data)), data


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
        size=size,
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


def _as_form(form: Any) -> Form | None:
    return None if form is None else (str(np.dtype(form[0]).str), tuple(int(size) for size in form[1]))


def _filled(records: Records) -> list[Array]:
    """Outputs with one leading dimension, also where no row has any."""
    empty = np.empty((len(records), 0), np.float32)
    outputs = records.outputs or (empty,) * records.runs.shape[1]
    return [np.ascontiguousarray(output) if output.size else empty for output in outputs]


def _text(value: Any) -> Array:
    return np.frombuffer(json.dumps(value, separators=(",", ":")).encode(), np.uint8)
