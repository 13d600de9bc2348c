r"""Adding to a store, alone: rows that took long are on disk at once, quick ones together and soon."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlsbi.store.catalogue import Catalogue
from mlsbi.store.files import StoreError, remove_unfinished
from mlsbi.store.joining import LARGEST, join, split
from mlsbi.store.locking import LockHeldError, locked
from mlsbi.store.records import OK, STATUSES, Records, Stream
from mlsbi.store.repacking import repack, repack_small
from mlsbi.store.shards import Replay

__all__ = ["Writer", "open_writer"]

_SLOW = 0.05  # seconds of simulation that are worth a file at once
_OLDEST = 0.5  # seconds that finished rows may wait in memory

Array = np.ndarray[Any, Any]


@dataclass
class _Buffer:
    """Finished rows of a stream that are not on disk yet."""

    since: float
    parts: list[Records] = field(default_factory=list)
    nbytes: int = 0


class Writer:
    """Adds to a store; see `Store.writing`."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._pid = os.getpid()
        self._buffers: dict[Stream, _Buffer] = {}

    def add(self, stream: Stream, records: Records) -> None:
        r"""Keeps records: on disk for good on return if they took long to make, else within about half a second.

        Raises:
            StoreError: If they cannot be written; they are kept in memory, and the next call tries again.
            ValueError: If arrays do not align, or do not fit the stream.
        """
        self._check_owner()
        records = _check_records(stream, records, len(self._catalogue.names), len(self._catalogue.parameters))
        if len(records):
            buffer = self._buffers.setdefault(stream, _Buffer(time.monotonic()))
            buffer.parts.append(records)
            buffer.nbytes += records.nbytes
            if float(records.seconds.sum()) >= _SLOW or buffer.nbytes > LARGEST:
                self._write(stream)
        self.tick()

    def add_replay(self, stream: Stream, index: Array, runs: Array, seconds: Array) -> None:
        r"""Keeps, on disk, that rows were run again to see whether a stream's simulators are deterministic.

        Args:
            stream: Which stream.
            index: Rows, shape `(n,)`, at least one.
            runs: Simulator runs of each of its levels, shape `(n, levels)`.
            seconds: Time spent in each, shape `(n, levels)`.

        Raises:
            StoreError: If it cannot be written.
            ValueError: If arrays do not align.
        """
        self._check_owner()
        replay = Replay(np.asarray(index, np.int64), np.asarray(runs, np.int64), np.asarray(seconds, np.float64))
        shape = (len(replay.index), len(stream.levels))
        if not len(replay.index) or replay.runs.shape != shape or replay.seconds.shape != shape:
            raise ValueError(f"Expected runs and seconds of shape {shape}, at least one row; got {replay.runs.shape} "
                             f"and {replay.seconds.shape}.")
        self._catalogue.add(stream, replay)

    def add_shard(self, name: str, data: bytes) -> None:
        r"""Keeps a copy of another store's shard.

        Raises:
            StoreError: If it cannot be written, or is no shard of that name.
        """
        self._check_owner()
        self._catalogue.add_file(name, data)

    def set_target(self, stream: Stream, n: int) -> None:
        """Notes how many rows of a stream a campaign asks for."""
        self._check_owner()
        self._catalogue.set_target(stream, int(n))

    def tick(self) -> None:
        """Writes what has waited long enough."""
        now = time.monotonic()
        for stream in [stream for stream, buffer in self._buffers.items() if now - buffer.since >= _OLDEST]:
            self._write(stream)

    def flush(self) -> None:
        """Writes everything that was added; raises as `add`."""
        self._check_owner()
        for stream in list(self._buffers):
            self._write(stream)

    def close(self) -> None:
        """Writes everything that was added; in a forked child, which owns nothing, does nothing."""
        if self._pid == os.getpid():
            self.flush()

    def compact(self) -> None:
        """Joins shards into few large ones, sorted by row; no record changes."""
        self.flush()
        for stream in self._catalogue.streams:
            repack(self._catalogue, stream, self._catalogue.index(stream).shards)

    def _check_owner(self) -> None:
        if self._pid != os.getpid():
            raise StoreError(f"{self._catalogue.folder} is being written by the process that forked this one. Send "
                             "records there to be added.")

    def _write(self, stream: Stream) -> None:
        buffer = self._buffers[stream]
        buffer.parts = [piece for alike in join(buffer.parts) for piece in split(alike)]
        while buffer.parts:  # what is written leaves the buffer, so that an error repeats nothing
            self._catalogue.add(stream, buffer.parts[0])
            buffer.nbytes -= buffer.parts.pop(0).nbytes
        del self._buffers[stream]
        repack_small(self._catalogue, stream)


@contextlib.contextmanager
def open_writer(catalogue: Catalogue) -> Iterator[Writer]:
    r"""Holds a store's lock and gives its writer; what was added is written when the context ends, however it ends.

    Raises:
        StoreError: If somebody else is writing, or what was added cannot be written.
    """
    folder = catalogue.folder
    with contextlib.ExitStack() as stack:
        try:
            alone = stack.enter_context(locked(folder / "lock"))
        except LockHeldError as error:
            raise StoreError(f"{folder} is being written by {error.holder or 'another process'}. Wait for it, or end "
                             "it; reading is possible meanwhile.") from error
        remove_unfinished([folder, catalogue.rows], alone=alone)
        catalogue.refresh()
        writer = Writer(catalogue)
        try:
            yield writer
        finally:
            writer.close()


def _check_records(stream: Stream, records: Records, levels: int, parameters: int) -> Records:
    if not stream.levels or not all(0 <= level < levels for level in stream.levels):
        raise ValueError(f"Expected a stream of levels 0 to {levels - 1}; got {stream}.")
    n = len(records)
    index, status = np.asarray(records.index, np.int64), np.asarray(records.status, np.uint8)
    runs, seconds = np.asarray(records.runs, np.int64), np.asarray(records.seconds, np.float64)
    shape = (n, len(stream.levels))
    if records.theta.shape != (n, parameters) or status.shape != (n,) or runs.shape != shape or seconds.shape != shape:
        raise ValueError(f"Expected theta {(n, parameters)}, status {(n,)}, runs and seconds {shape}; got "
                         f"{records.theta.shape}, {status.shape}, {runs.shape} and {seconds.shape}.")
    if not np.isfinite(seconds).all() or (n and runs.min() < 0):
        raise ValueError("Expected finite seconds and runs of at least 0.")
    if n and (int(index.min()) < 0 or int(status.max()) >= len(STATUSES)):
        raise ValueError(f"Expected rows of at least 0 and statuses below {len(STATUSES)}; got {index} and {status}.")
    sizes = [len(output) for output in records.outputs if output.size]
    if len(records.outputs) not in (0, len(stream.levels)) or any(size != n for size in sizes):
        raise ValueError(f"Expected outputs of {len(stream.levels)} levels, {n} rows each; got "
                         f"{[output.shape for output in records.outputs]}.")
    if (status == OK).any() and len(sizes) != len(stream.levels):
        raise ValueError("Expected outputs of every level for finished rows; some are empty.")
    return Records(index, records.theta, records.outputs, status, runs, seconds, records.messages, records.noise_seed)
