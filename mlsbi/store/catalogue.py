r"""What is in a store's folder: its shards, the index of each stream, and records read in order, each row once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlsbi.store.files import StoreError, list_names, sync_folder, write_file
from mlsbi.store.indexing import Index, build_index, find_sharing
from mlsbi.store.joining import Tries
from mlsbi.store.manifest import read_manifest, read_targets, write_targets
from mlsbi.store.ranges import Ranges
from mlsbi.store.records import OK, Records, Stream
from mlsbi.store.shards import (
    DamagedShardError,
    Replay,
    Shard,
    belongs,
    encode,
    read_bytes,
    read_meta,
    read_records,
    read_tries,
)

__all__ = ["Catalogue"]

Array = np.ndarray[Any, Any]


class Catalogue:
    r"""The content of a store's folder, as last seen; `refresh` looks again.

    Args:
        folder: The store's folder.
        manifest: What its `store.json` says.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, dict(manifest)
        self.shards: dict[str, Shard] = {}
        self.damaged: dict[str, str] = {}  # and why
        self.targets: dict[Stream, int] = {}
        self._checked: set[str] = set()  # whose content was compared with their names
        self._tries: dict[str, Tries] = {}  # of shards that share rows
        self._indices: dict[Stream, Index] = {}
        self.refresh()

    @property
    def rows(self) -> Path:
        """The folder of shards."""
        return self.folder / "rows"

    @property
    def names(self) -> tuple[str, ...]:
        """Level names, cheapest first."""
        return tuple(self.manifest["names"])

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self.manifest["parameters"])

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Streams that have records, replays or a target."""
        return tuple(sorted({shard.stream for shard in self.shards.values()} | set(self.targets)))

    def refresh(self) -> None:
        """Sees what others have written since."""
        self.manifest = read_manifest(self.folder) if (self.folder / "store.json").exists() else self.manifest
        for _ in range(100):
            names = list_names(self.rows, suffix=".npz")
            try:
                for name in names - set(self.shards) - set(self.damaged):
                    self._open(name)
            except FileNotFoundError:
                continue  # joined with others between the two looks
            break
        else:
            raise StoreError(f"{self.rows} changes faster than it can be listed. Wait for its writer to finish.")
        for name in set(self.shards) - names:
            self._forget(name)
        self.damaged = {name: why for name, why in self.damaged.items() if name in names}
        self.targets = read_targets(self.folder)

    def index(self, stream: Stream) -> Index:
        """What the shards of a stream hold together."""
        while stream not in self._indices:
            mine = [shard for shard in self.shards.values() if shard.stream == stream]
            shards = [shard for shard in mine if not shard.replays]
            sharing = find_sharing(shards)
            if all(self._know_tries(shard) for shard in sharing):
                tries = {shard.name: self._tries[shard.name] for shard in sharing}
                self._indices[stream] = build_index(stream, shards, [shard for shard in mine if shard.replays], tries)
        return self._indices[stream]

    def count_runs(self, streams: Iterable[Stream]) -> tuple[int, ...]:
        """Simulator runs of each level in some streams, replays included."""
        total = np.zeros(len(self.names), np.int64)
        for stream in streams:
            total[list(stream.levels)] += self.index(stream).runs + self.index(stream).replay_runs
        return tuple(total.tolist())

    def sum_seconds(self, streams: Iterable[Stream]) -> tuple[float, ...]:
        """Time spent in each level's simulator in some streams, replays included."""
        total = np.zeros(len(self.names))
        for stream in streams:
            total[list(stream.levels)] += self.index(stream).seconds + self.index(stream).replay_seconds
        return tuple(total.tolist())

    def load(self, shard: Shard) -> Records:
        r"""All records of a shard.

        Raises:
            StoreError: If it is damaged.
            FileNotFoundError: If it is not there any more.
        """
        try:
            records = read_records(self.rows / shard.name, shard, check=shard.name not in self._checked)
        except DamagedShardError as error:
            self._condemn(shard.name, error)
            raise self._refuse(shard.name) from error
        self._checked.add(shard.name)
        return records

    def read(self, stream: Stream, left: Ranges, *, failed: bool) -> Iterator[Records]:
        r"""Records of rows of a stream, shard by shard in the order of their first rows, each row once.

        Args:
            stream: Which stream.
            left: Rows that it has.
            failed: Whether rows without a finished record come too.

        Raises:
            StoreError: If a shard that may hold rows of the stream is damaged.
        """
        for name in sorted(self.damaged):
            if belongs(name, stream):
                raise self._refuse(name)
        while len(left):
            index = self.index(stream)
            for shard in index.shards:
                if not len((shard.rows if failed else shard.ok) & left):
                    continue
                try:
                    records = self.load(shard)
                except FileNotFoundError:
                    self.refresh()  # joined with others: go on with the rows that are left
                    break
                chosen = index.winning(shard, records) & left.holds(records.index) & (failed | (records.status == OK))
                if chosen.any():
                    left = left - Ranges.of(records.index[chosen])
                    yield records if chosen.all() else records.take(chosen)
                del records, chosen  # before the next shard is read
            else:
                if len(left):
                    raise StoreError(f"{self.folder}: {len(left)} rows of {stream} vanished while they were read, the "
                                     f"first of them row {int(left.pairs[0, 0])}. Files were removed from outside.")

    def check(self, name: str) -> str | None:
        """Compares a shard's content with its name; what is wrong, if anything is."""
        try:
            read_bytes(self.rows / name)
        except DamagedShardError as error:
            return self._condemn(name, error)
        self._checked.add(name)
        return None

    def verify(self) -> None:
        """Looks again and checks every shard."""
        self.refresh()
        for name in sorted(self.shards):
            with contextlib.suppress(FileNotFoundError):  # joined with others
                self.check(name)

    def discard_damaged(self) -> tuple[str, ...]:
        """Moves damaged shards into the folder `damaged/`; returns their names."""
        names = tuple(sorted(self.damaged))
        if names:
            place = self.folder / "damaged"
            place.mkdir(exist_ok=True)
            for name in names:
                os.replace(self.rows / name, place / name)
                del self.damaged[name]
            sync_folder(place)
            sync_folder(self.rows)
        return names

    # What follows is for the one who holds the lock.

    def add(self, stream: Stream, content: Records | Replay) -> Shard:
        """Writes a new shard."""
        shard, data = encode(stream, content)
        write_file(self.rows / shard.name, data)
        self._learn(shard)
        return shard

    def add_file(self, name: str, data: bytes) -> None:
        """Writes a copy of another store's shard."""
        write_file(self.rows / name, data)
        self._learn(read_meta(self.rows / name))

    def remove(self, name: str) -> None:
        """Removes a shard whose records are all in others."""
        (self.rows / name).unlink(missing_ok=True)
        self._forget(name)

    def sum_first_tries(self) -> tuple[Array, Array]:
        """Runs and seconds of each level in rows that were finished at the first try.

        A failed try may be over in no time, and one that raised for a whole batch is counted in each of its rows.
        """
        runs, seconds = np.zeros(len(self.names), np.int64), np.zeros(len(self.names))
        for shard in list(self.shards.values()):
            levels = list(shard.stream.levels)
            if shard.replays:
                continue
            if not shard.failed and all(count == shard.records for count in shard.runs):
                runs[levels] += np.array(shard.runs, np.int64)
                seconds[levels] += shard.seconds
                continue
            with contextlib.suppress(FileNotFoundError, DamagedShardError):  # gone with a repacking, or named elsewhere
                tries = read_tries(self.rows / shard.name)
                first = (tries.status == OK) & (tries.runs == 1).all(1)
                runs[levels] += int(first.sum())
                seconds[levels] += tries.seconds[first].sum(0)
        return runs, seconds

    def set_target(self, stream: Stream, n: int) -> None:
        """Notes how many rows of a stream a campaign asks for."""
        targets = self.targets | {stream: n}
        if targets != self.targets:
            write_targets(self.folder, targets)
            self.targets = targets

    def _open(self, name: str) -> None:
        try:
            self._learn(read_meta(self.rows / name))
        except DamagedShardError as error:
            self.damaged[name] = str(error)

    def _learn(self, shard: Shard) -> None:
        self.shards[shard.name] = shard
        self.damaged.pop(shard.name, None)
        self._indices.pop(shard.stream, None)

    def _forget(self, name: str) -> None:
        shard = self.shards.pop(name)
        self._tries.pop(name, None)
        self._checked.discard(name)
        self._indices.pop(shard.stream, None)

    def _condemn(self, name: str, error: DamagedShardError) -> str:
        self._forget(name)
        self.damaged[name] = str(error)
        return str(error)

    def _refuse(self, name: str) -> StoreError:
        return StoreError(f"{self.damaged[name]} Call discard_damaged() to move it away, then the campaign again to "
                          "simulate these rows once more, or put back a copy of the file.")

    def _know_tries(self, shard: Shard) -> bool:
        """Reads a shard's tries; `False` where it is gone or damaged, and the list of shards has changed with that."""
        try:
            if shard.name not in self._tries:
                self._tries[shard.name] = read_tries(self.rows / shard.name)
        except FileNotFoundError:
            self.refresh()
        except DamagedShardError as error:
            self._condemn(shard.name, error)
        return shard.name in self._tries
