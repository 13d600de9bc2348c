r"""A folder in which nothing that was computed is lost or changes: every row ever run, finished or failed.

A store is a set of records. Shards are only its packaging: joining or copying them changes no record, and whatever is
found twice counts once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from mlsbi.data import LevelData, MultilevelData
from mlsbi.levels import campaign_cost
from mlsbi.simulation.locking import LockHeldError, find_holder, is_alive, locked
from mlsbi.simulation.records import OK, STATUSES, Records, Stream
from mlsbi.simulation.seeding import JOINT_STREAM, TEST_STREAM
from mlsbi.simulation.shards import (
    LARGEST,
    TEMPORARY,
    DamagedShardError,
    Ranges,
    Replay,
    Shard,
    StoreError,
    Tries,
    belongs,
    encode,
    join,
    order,
    read_bytes,
    read_meta,
    read_records,
    read_tries,
    split,
    sync_folder,
    write_file,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Store", "StoreError", "Writer", "create_store", "open_store"]

_LAYOUT = 1
_FORMAT = "mlsbi store"
_SLOW = 0.05  # seconds of simulation that are worth a file at once
_OLDEST = 0.5  # seconds that finished rows may wait in memory
_SMALL, _MANY = 1 << 20, 512  # more small shards of a stream than this are joined

Array = np.ndarray[Any, Any]


@dataclass
class _Index:
    """What a stream's shards hold together."""

    shards: list[Shard]  # by their first rows
    ok: Ranges
    failed: dict[int, Ranges]  # by status, rows without a finished record
    winners: dict[str, Array]  # positions of the records that stand for their rows, in shards that share rows
    runs: Array  # of each of the stream's levels, without replays
    seconds: Array
    replay_runs: Array
    replay_seconds: Array

    @property
    def rows(self) -> Ranges:
        return Ranges.union([self.ok, *self.failed.values()])


class Store:
    r"""The simulations of one stack, on disk; see `open_store` and `create_store`.

    Reading needs no lock and never blocks; `refresh` shows what others have written since.

    Args:
        path: Folder.
        manifest: What `store.json` says.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.manifest = path, dict(manifest)
        self._shards: dict[str, Shard] = {}
        self._damaged: dict[str, str] = {}
        self._checked: set[str] = set()
        self._tries: dict[str, Tries] = {}
        self._indices: dict[Stream, _Index] = {}
        self._targets: dict[Stream, int] = {}
        self.refresh()

    @property
    def description(self) -> dict[str, Any]:
        """What the stack was when the store was made."""
        return dict(self.manifest["description"])

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
        return tuple(sorted({shard.stream for shard in self._shards.values()} | set(self._targets)))

    @property
    def targets(self) -> dict[Stream, int]:
        """Rows that campaigns asked for."""
        return dict(self._targets)

    @property
    def damaged(self) -> dict[str, str]:
        """Files whose content is not what was written, and which rows they held."""
        return dict(self._damaged)

    @property
    def rows(self) -> Path:
        """The folder of shards."""
        return self.path / "rows"

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What is known of every shard, by stream, damaged ones left out."""
        return tuple(sorted(self._shards.values(), key=lambda shard: (shard.stream, shard.name)))

    def refresh(self) -> None:
        """Sees what others have written since."""
        for _ in range(100):
            names = _list_shards(self.rows)
            try:
                new = {name: self._open(name) for name in names if name not in self._shards
                       and name not in self._damaged}
            except FileNotFoundError:
                continue  # joined with others between the two looks
            break
        else:
            raise StoreError(f"{self.rows} changes faster than it can be listed. Wait for its writer to finish.")
        for name in set(self._shards) - set(names):
            self._forget(name)
        self._damaged = {name: why for name, why in self._damaged.items() if name in names}
        for shard in new.values():
            if shard is not None:
                self._learn(shard)
        self._targets = _read_targets(self.path / "targets.json")

    def verify(self) -> tuple[str, ...]:
        """Reads every shard; returns the names of damaged ones, which `damaged` then explains."""
        self.refresh()
        for name in sorted(self._shards):
            with contextlib.suppress(FileNotFoundError):
                try:
                    read_bytes(self.rows / name)
                except DamagedShardError as error:
                    self._condemn(name, error)
        return tuple(sorted(self._damaged))

    def discard_damaged(self) -> tuple[str, ...]:
        """Moves damaged shards into the folder `damaged/`, so that their rows count as never run; returns names."""
        place = self.path / "damaged"
        if self._damaged:
            place.mkdir(exist_ok=True)
        names = tuple(sorted(self._damaged))
        for name in names:
            os.replace(self.rows / name, place / name)
            del self._damaged[name]
        if names:
            sync_folder(place)
            sync_folder(self.rows)
        return names

    def done(self, stream: Stream) -> Ranges:
        """Rows of a stream that are finished, or failed and were not repaired since."""
        return self._index(stream).rows

    def ok(self, stream: Stream) -> Ranges:
        """Rows of a stream that every level finished."""
        return self._index(stream).ok

    def missing(self, stream: Stream, start: int, stop: int, *, retry_failed: bool = False) -> list[tuple[int, int]]:
        """Ranges `[start, stop)` of rows still to be run; with `retry_failed`, failed ones too."""
        if stop <= start:
            return []
        index = self._index(stream)
        return list(Ranges([(start, stop)]) - (index.ok if retry_failed else index.rows))

    def failed(self, stream: Stream) -> dict[int, int]:
        """Status of each row that failed and was not repaired since, by row."""
        found: dict[int, int] = {}
        for status, rows in sorted(self._index(stream).failed.items()):
            for row in rows.indices().tolist():
                found.setdefault(row, status)
        return dict(sorted(found.items()))

    def replayed(self, stream: Stream) -> bool:
        """Whether rows of a stream were run again to see whether its simulators are deterministic."""
        return any(shard.replays and shard.stream == stream for shard in self._shards.values())

    def replays(self, stream: Stream) -> tuple[Array, Array]:
        """Runs and seconds of each of a stream's levels that went into replays; zeros where there were none."""
        index = self._index(stream)
        return index.replay_runs.copy(), index.replay_seconds.copy()

    def read(
        self, stream: Stream, start: int = 0, stop: int | None = None, *, failed: bool = False
    ) -> Iterator[Records]:
        r"""Records of a stream, shard by shard in the order of their first rows, each row once.

        Args:
            stream: Which stream.
            start: First row.
            stop: Row to stop before; `None` for all.
            failed: Whether rows that failed and were not repaired come too.

        Raises:
            StoreError: If a shard that may hold rows of the stream is damaged.
        """
        index = self._index(stream)
        rows = index.rows if failed else index.ok
        return self._read(stream, rows & Ranges([(start, 2**62 if stop is None else max(start, stop))]), failed=failed)

    def failures(self) -> pd.DataFrame:
        """One line per row that failed and was not repaired: what it was, and what went wrong."""
        import pandas as pd

        fixed = ("level", "stream", "seed", "index", "noise_seed", "status", "message")
        titles = [f"{name} (parameter)" if name in fixed else name for name in self.parameters]
        lines = []
        for stream in self.streams:
            rows = Ranges.union(self._index(stream).failed.values())
            for records in self._read(stream, rows, failed=True):
                for place in range(len(records)):
                    line = {
                        "level": self.names[stream.levels[-1]], "stream": self._purpose(stream), "seed": stream.seed,
                        "index": int(records.index[place]),
                    }  # fmt: skip
                    if records.noise_seed is not None:
                        line["noise_seed"] = int(records.noise_seed[place])
                    line |= dict(zip(titles, records.theta[place].tolist(), strict=True))
                    lines.append(line | {"status": STATUSES[int(records.status[place])],
                                         "message": records.messages.get(place, "")})
        columns = ["level", "stream", "seed", "index", *titles, "status", "message"]
        if any("noise_seed" in line for line in lines):
            columns.insert(4, "noise_seed")
        return pd.DataFrame(lines, columns=columns)

    @property
    def runs(self) -> tuple[int, ...]:
        """Simulator runs of each level, failed tries and replays included."""
        return tuple(int(n) for n in self._sum_runs(self.streams))

    @property
    def seconds(self) -> tuple[float, ...]:
        """Time spent in each level's simulator, failed tries and replays included."""
        return tuple(float(s) for s in self._sum_seconds(self.streams))

    @property
    def costs(self) -> tuple[float, ...]:
        """Measured seconds per run of each level; NaN where it was never run."""
        return tuple(s / n if n else math.nan for s, n in zip(self.seconds, self.runs, strict=True))

    def spent(self, unit: Literal["declared", "seconds"] = "declared") -> float:
        r"""What all runs cost.

        Raises:
            ValueError: If the unit is unknown, or declared costs are asked for and there are none.
        """
        if unit == "seconds":
            return sum(self.seconds)
        costs, row_costs = self.manifest["costs"], self.manifest["row_costs"]
        if unit != "declared" or costs is None or row_costs is None:
            raise ValueError(f'Expected unit="seconds", or "declared" where the stack declares costs; got {unit!r} '
                             f"with costs {costs}.")
        pairs = [0] * len(self.names)
        for stream in self.streams:
            for place, (below, level) in enumerate(zip(stream.levels, stream.levels[1:], strict=False)):
                if level == below + 1:
                    pairs[level] += int(self._index(stream).runs[place + 1])
        return campaign_cost(costs, row_costs, runs=self.runs, pairs=pairs)

    def data(self, seed: int | None = None) -> MultilevelData:
        r"""Every finished row that training can use, by level: a pilot's first, then each seed's in order.

        Level l has the rows of its own streams. A pilot's joint rows are pairs of the finest level, its rows of level
        0 alone belong to level 0; test rows and others are left out. Whole numbers become torch's default dtype.

        Args:
            seed: Only streams of this seed; all when left out.

        Returns:
            Data whose failures, runs and seconds are those of the streams used. A level may be empty, but not all.

        Raises:
            StoreError: If no level has a row, or a shard is damaged.
        """
        used = [self._streams_of(level, seed) for level in range(len(self.names))]
        wanted = [[(stream, self.ok(stream)) for stream in streams] for streams in used]
        shape, dtype = self._output_form([stream for streams in used for stream in streams])
        levels = [self._collect(level, pairs, shape, dtype) for level, pairs in enumerate(wanted)]
        streams = [stream for streams in used for stream in streams]
        failures = tuple(sum(len(self.done(s)) - len(self.ok(s)) for s in streams) for streams in used)
        data = MultilevelData(
            tuple(levels), self.names, failures, tuple(int(n) for n in self._sum_runs(streams)),
            tuple(float(s) for s in self._sum_seconds(streams)),
        )  # fmt: skip
        data.check(empty=True)
        return data

    def batches(self, level: int, seed: int | None = None) -> Iterator[LevelData]:
        """The rows of one level of `data`, shard by shard, so that they need not fit into memory.

        They come in the order of `data` unless shards interleave; `compact` sorts them.
        """
        for theta, fine, coarse in self.term_records(level, seed):
            yield LevelData(_to_torch(theta), _to_torch(fine), None if coarse is None else _to_torch(coarse))

    def term_records(self, level: int, seed: int | None = None) -> Iterator[tuple[Array, Array, Array | None]]:
        """Theta, fine and coarse of one level of `data`, shard by shard, in the dtypes that simulators gave."""
        level = range(len(self.names))[level]
        for stream in self._streams_of(level, seed):
            above, below = _terms(stream, level)
            for records in self.read(stream):
                yield records.theta, records.outputs[above], None if below is None else records.outputs[below]

    @contextlib.contextmanager
    def writing(self) -> Iterator[Writer]:
        r"""Opens the store for writing, alone; what was added is written when the context ends, however it ends.

        Raises:
            StoreError: If somebody else is writing, or what was added cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                alone = stack.enter_context(locked(self.path / "lock"))
            except LockHeldError as error:
                raise StoreError(f"{self.path} is being written by {error.holder or 'another process'}. Wait for it, "
                                 "or end it; reading is possible meanwhile.") from error
            _remove_unfinished([self.path, self.rows], alone=alone)
            self.refresh()
            writer = Writer(self)
            try:
                yield writer
            finally:
                writer.close()

    def compact(self) -> None:
        """Joins shards into few large ones, sorted by row; no record changes. Raises as `writing`."""
        with self.writing() as writer:
            writer.compact()

    def to_frame(self) -> pd.DataFrame:
        """A line per level: rows wanted, done and failed, runs, seconds, and what they cost."""
        import pandas as pd

        lines = []
        for level, name in enumerate(self.names):
            streams = [s for s in self.streams if s.number == level]
            runs, seconds = self.runs[level], self.seconds[level]
            declared = self.manifest["costs"]
            lines.append({
                "level": name, "wanted": sum(self._targets.get(s, 0) for s in streams),
                "done": sum(len(self.ok(s)) for s in streams),
                "failed": sum(len(self.done(s)) - len(self.ok(s)) for s in streams),
                "runs": runs, "seconds": seconds, "seconds per run": self.costs[level],
                "cost": seconds if declared is None else runs * declared[level],
            })  # fmt: skip
        return pd.DataFrame(lines).set_index("level")

    def __str__(self) -> str:
        lines = [f"Store {self.path}", self.to_frame().to_string(float_format=lambda value: f"{value:.4g}")]
        for stream in self.streams:
            if stream.number >= len(self.names):
                ok, target = len(self.ok(stream)), self._targets.get(stream)
                lost = len(self.done(stream)) - ok
                lines.append(f"{self._purpose(stream)}, seed {stream.seed}: {ok} rows" + (f" of {target}" if target
                             else "") + (f", {lost} failed" if lost else ""))
        kinds: dict[str, int] = {}
        messages: dict[str, int] = {}
        for stream in self.streams:
            for status, rows in self._index(stream).failed.items():
                kinds[STATUSES[status]] = kinds.get(STATUSES[status], 0) + len(rows)
                for shard in self._index(stream).shards:
                    for text, count in shard.messages.items() if len(rows & shard.rows) else ():
                        messages[text] = messages.get(text, 0) + count
        if kinds:
            lines.append("failed: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
            frequent = sorted(filter(str.strip, messages), key=lambda text: -messages[text])
            lines += [f"  {text.strip().splitlines()[-1][:100]}" for text in frequent[:3]]
        lines += [f"damaged: {name}: {why}" for name, why in sorted(self._damaged.items())]
        holder = find_holder(self.path / "lock")
        return "\n".join(lines + ([f"being written by {holder}"] if holder else []))

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {n}" for name, n in self.to_frame()["done"].items())
        return f"Store({str(self.path)!r}; {rows})"

    # What follows keeps the catalogue of shards.

    def _open(self, name: str) -> Shard | None:
        try:
            return read_meta(self.rows / name)
        except DamagedShardError as error:
            self._damaged[name] = str(error)
            return None

    def _learn(self, shard: Shard) -> None:
        self._shards[shard.name] = shard
        self._damaged.pop(shard.name, None)
        self._indices.pop(shard.stream, None)

    def _forget(self, name: str) -> None:
        shard = self._shards.pop(name)
        self._tries.pop(name, None)
        self._checked.discard(name)
        self._indices.pop(shard.stream, None)

    def _condemn(self, name: str, error: Exception) -> None:
        self._forget(name)
        self._damaged[name] = str(error)

    def _index(self, stream: Stream) -> _Index:
        while stream not in self._indices:
            try:
                self._indices[stream] = self._build_index(stream)
            except FileNotFoundError:
                self.refresh()
        return self._indices[stream]

    def _build_index(self, stream: Stream) -> _Index:
        mine = [shard for shard in self._shards.values() if shard.stream == stream]
        shards = sorted((shard for shard in mine if not shard.replays), key=lambda shard: (shard.first, shard.name))
        replays = [shard for shard in mine if shard.replays]
        sharing = _sharing(shards)
        for shard in sharing:
            if shard.name not in self._tries:
                try:
                    self._tries[shard.name] = read_tries(self.rows / shard.name)
                except DamagedShardError as error:
                    self._condemn(shard.name, error)
                    return self._build_index(stream)
        winners, runs, seconds = _settle([shard.name for shard in sharing], self._tries, len(stream.levels))
        apart = [shard for shard in shards if shard.name not in winners]
        ok = Ranges.union(shard.ok for shard in shards)
        failed: dict[int, Ranges] = {}
        for status in sorted({status for shard in shards for status in shard.failed}):
            rows = Ranges.union(shard.failed.get(status, Ranges()) for shard in shards) - ok
            rows = rows - Ranges.union(failed.values())
            if len(rows):
                failed[status] = rows
        width = len(stream.levels)
        return _Index(
            shards, ok, failed, winners,
            runs + _total([shard.runs for shard in apart], width).astype(np.int64),
            seconds + _total([shard.seconds for shard in apart], width),
            _total([shard.runs for shard in replays], width).astype(np.int64),
            _total([shard.seconds for shard in replays], width),
        )  # fmt: skip

    def _load(self, shard: Shard) -> Records:
        try:
            records = read_records(self.rows / shard.name, shard, check=shard.name not in self._checked)
        except DamagedShardError as error:
            self._condemn(shard.name, error)
            raise self._damage(shard.name) from error
        self._checked.add(shard.name)
        return records

    def _damage(self, name: str) -> StoreError:
        return StoreError(f"{self._damaged[name]} Call discard_damaged() to move it away, then the campaign again to "
                          "simulate these rows once more, or put back a copy of the file.")

    def _read(self, stream: Stream, left: Ranges, *, failed: bool) -> Iterator[Records]:
        for name in sorted(self._damaged):
            if belongs(name, stream):
                raise self._damage(name)
        while len(left):
            index = self._index(stream)
            for shard in index.shards:
                if not len((shard.rows if failed else shard.ok) & left):
                    continue
                try:
                    records = self._load(shard)
                except FileNotFoundError:
                    self.refresh()  # joined with others: go on with the rows that are left
                    break
                chosen = left.holds(records.index) & (failed | (records.status == OK))
                if shard.name in index.winners:
                    wins = np.zeros(len(records), bool)
                    wins[index.winners[shard.name]] = True
                else:
                    wins = _first_of_index(records.index)
                chosen &= wins
                if chosen.any():
                    left = left - Ranges.of(records.index[chosen])
                    yield records if chosen.all() else records.take(chosen)
                del records, chosen
            else:
                if len(left):
                    raise StoreError(f"{self.path}: {len(left)} rows of {stream} vanished while they were read, the "
                                     f"first of them row {int(left.pairs[0, 0])}. Files were removed from outside.")

    def _sum_runs(self, streams: Sequence[Stream]) -> Array:
        total = np.zeros(len(self.names), np.int64)
        for stream in streams:
            index = self._index(stream)
            total[list(stream.levels)] += index.runs + index.replay_runs
        return total

    def _sum_seconds(self, streams: Sequence[Stream]) -> Array:
        total = np.zeros(len(self.names))
        for stream in streams:
            index = self._index(stream)
            total[list(stream.levels)] += index.seconds + index.replay_seconds
        return total

    def _purpose(self, stream: Stream) -> str:
        number = stream.number
        if number < len(self.names):
            return f"level {self.names[number]}"
        if number == JOINT_STREAM:
            return "pilot, all levels together"
        if JOINT_STREAM < number <= JOINT_STREAM + len(self.names):
            return f"pilot, {self.names[number - JOINT_STREAM - 1]} alone"
        return "test rows" if number == TEST_STREAM else f"stream {number}"

    def _streams_of(self, level: int, seed: int | None) -> list[Stream]:
        """Streams whose rows are of one level's term, a pilot's first."""
        last = len(self.names) - 1
        kinds = [(level, tuple(range(max(level - 1, 0), level + 1)))]
        if level == 0:
            kinds.insert(0, (JOINT_STREAM + 1, (0,)))
        if level == last:
            kinds.insert(0, (JOINT_STREAM, tuple(range(last + 1))))
        return [stream for number, levels in kinds for stream in self.streams
                if (stream.number, stream.levels) == (number, levels) and seed in (None, stream.seed)]

    def _output_form(self, streams: Sequence[Stream]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        forms = {form for stream in streams for shard in self._index(stream).shards if len(shard.ok)
                 for form in shard.outputs if form is not None}
        if not forms:
            raise StoreError(f"{self.path} holds no finished rows to train on{self._why_none()}.")
        shapes = {shape for _, shape in forms}
        if len(shapes) > 1:
            raise StoreError(f"{self.path} holds outputs of different shapes: {sorted(shapes)}. Levels must return "
                             "rows of one shape.")
        return shapes.pop(), np.result_type(*(_torch_dtype(np.dtype(form)) for form, _ in forms))

    def _why_none(self) -> str:
        lost = sum(len(rows) for stream in self.streams for rows in self._index(stream).failed.values())
        return f": {lost} rows failed, see failures()" if lost else " yet"

    def _collect(
        self, level: int, wanted: Sequence[tuple[Stream, Ranges]], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> LevelData:
        """Rows of one level, each put in its place as it is read."""
        n = sum(len(rows) for _, rows in wanted)
        shards = [shard for stream, _ in wanted for shard in self._index(stream).shards]
        dtypes = [_torch_dtype(np.dtype(shard.theta[0])) for shard in shards if shard.theta] or [np.dtype(np.float32)]
        theta = np.empty((n, len(self.parameters)), np.result_type(*dtypes))
        fine = np.empty((n, *shape), dtype)
        coarse = np.empty_like(fine) if level else None
        start = 0
        for stream, rows in wanted:
            above, below = _terms(stream, level)
            for records in self._read(stream, rows, failed=False):
                places = start + rows.rank(records.index)
                theta[places], fine[places] = records.theta, records.outputs[above]
                if coarse is not None and below is not None:
                    coarse[places] = records.outputs[below]
            start += len(rows)
        return LevelData(_to_torch(theta), _to_torch(fine), None if coarse is None else _to_torch(coarse))


@dataclass
class _Buffer:
    """Finished rows of a stream that are not on disk yet."""

    since: float
    parts: list[Records] = field(default_factory=list)
    nbytes: int = 0


class Writer:
    """Adds to a store; see `Store.writing`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pid = os.getpid()
        self._buffers: dict[Stream, _Buffer] = {}

    def add(self, stream: Stream, records: Records) -> None:
        r"""Keeps records: on disk for good on return if they took long to make, else within about half a second.

        Raises:
            StoreError: If they cannot be written; they are kept in memory, and the next call tries again.
            ValueError: If arrays do not align, or do not fit the stream.
        """
        self._check_owner()
        records = _check_records(stream, records, len(self.store.names), len(self.store.parameters))
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
        self._put(stream, replay)

    def set_target(self, stream: Stream, n: int) -> None:
        """Notes how many rows of a stream a campaign asks for."""
        self._check_owner()
        targets = self.store.targets | {stream: int(n)}
        if targets != self.store.targets:
            lines = [{"seed": s.seed, "number": s.number, "levels": list(s.levels), "rows": rows}
                     for s, rows in sorted(targets.items())]
            write_file(self.store.path / "targets.json", json.dumps(lines, indent=1).encode())
            self.store._targets = targets

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
        for stream in self.store.streams:
            self._repack(stream, self.store._index(stream).shards)

    def add_shard(self, name: str, data: bytes) -> None:
        r"""Keeps a copy of another store's shard.

        Raises:
            StoreError: If it cannot be written, or is no shard of that name.
        """
        self._check_owner()
        write_file(self.store.rows / name, data)
        self.store._learn(read_meta(self.store.rows / name))

    def _check_owner(self) -> None:
        if self._pid != os.getpid():
            raise StoreError(f"{self.store.path} is being written by the process that forked this one. Send records "
                             "there to be added.")

    def _write(self, stream: Stream) -> None:
        buffer = self._buffers[stream]
        buffer.parts = [piece for alike in join(buffer.parts) for piece in split(alike)]
        while buffer.parts:
            self._put(stream, buffer.parts[0])
            buffer.nbytes -= buffer.parts.pop(0).nbytes
        del self._buffers[stream]
        small = [shard for shard in self.store._shards.values()
                 if shard.stream == stream and not shard.replays and shard.size < _SMALL]
        if len(small) > _MANY:
            self._repack(stream, small)

    def _put(self, stream: Stream, content: Records | Replay) -> Shard:
        shard, data = encode(stream, content)
        write_file(self.store.rows / shard.name, data)
        self.store._learn(shard)
        return shard

    def _repack(self, stream: Stream, shards: Sequence[Shard]) -> None:
        """Writes the records of shards, sorted, into new ones, and removes each old one when all of it is in these."""
        shards = sorted(shards, key=lambda shard: (shard.first, shard.name))
        tries = [self._read_tries(shard) for shard in shards]
        for group in _alike(shards):
            members = [place for place in group if tries[place] is not None]
            if members:
                self._repack_alike(stream, [shards[place] for place in members], [tries[place] for place in members])

    def _read_tries(self, shard: Shard) -> Tries | None:
        try:
            read_bytes(self.store.rows / shard.name)
            self.store._checked.add(shard.name)
            return read_tries(self.store.rows / shard.name)
        except DamagedShardError as error:
            self.store._condemn(shard.name, error)
            warnings.warn(f"{error} Call discard_damaged() to have these rows simulated again.", stacklevel=2)
            return None

    def _repack_alike(self, stream: Stream, shards: Sequence[Shard], tries: Sequence[Any]) -> None:
        owner = np.repeat(np.arange(len(shards)), [len(found.index) for found in tries])
        position = np.concatenate([np.arange(len(found.index)) for found in tries])
        places, repeated = order(Tries(*(np.concatenate([getattr(found, name) for found in tries])
                                         for name in ("index", "status", "runs", "seconds"))))
        bins = (np.cumsum(~repeated) - 1) // max(1, LARGEST // _row_bytes(shards))
        edges = np.r_[np.flatnonzero(np.diff(bins, prepend=-1)), len(bins)]
        last = np.zeros(len(shards), np.int64)
        np.maximum.at(last, owner[places], bins)
        kept: set[str] = set()
        for number, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            inside = places[start:stop]
            wanted = inside[~repeated[start:stop]]
            owners = np.unique(owner[wanted]).tolist()
            only = shards[owners[0]]
            if len(owners) == 1 and np.array_equal(position[wanted], np.arange(only.records)):
                kept.add(only.name)  # packed this way already
            else:
                parts = [self.store._load(shards[one]).take(position[wanted[owner[wanted] == one]]) for one in owners]
                for piece in join(parts):
                    shard = self._put(stream, piece)
                    read_bytes(self.store.rows / shard.name)
                    kept.add(shard.name)
                del parts
            for one in np.flatnonzero(last == number).tolist():
                if shards[one].name not in kept:
                    (self.store.rows / shards[one].name).unlink(missing_ok=True)
                    self.store._forget(shards[one].name)
        sync_folder(self.store.rows)


def open_store(path: str | os.PathLike[str]) -> Store:
    r"""Opens a store for reading; `Store.writing` opens it for writing.

    Raises:
        StoreError: If the folder is no store, or was written by a newer version.
    """
    folder = Path(path)
    try:
        manifest = json.loads((folder / "store.json").read_bytes())
        known = manifest["format"] == _FORMAT
        layout = int(manifest["layout"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder} is no store of simulations: its store.json cannot be read ({error}).") from error
    if not known:
        raise StoreError(f"{folder} is no store of simulations: store.json has the format {manifest['format']!r}.")
    if layout > _LAYOUT:
        raise StoreError(f"{folder} has layout {layout}; this version reads up to {_LAYOUT}. Upgrade mlsbi to read it.")
    return Store(folder, manifest)


def create_store(
    path: str | os.PathLike[str],
    description: Mapping[str, Any],
    names: Sequence[str],
    parameters: Sequence[str],
    costs: Sequence[float] | None = None,
    row_costs: Sequence[float] | None = None,
) -> Store:
    r"""Makes an empty store.

    Args:
        path: Folder; made if need be.
        description: What the stack is, in JSON.
        names: Level names, cheapest first.
        parameters: Names of the parameters.
        costs: Declared cost of one run of each level.
        row_costs: Cost of one row of each level's term.

    Raises:
        StoreError: If the folder holds a store, or anything else, already.

    Example:
        >>> import tempfile
        >>> from mlsbi.simulation.records import Records, Stream
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = create_store(folder, {}, names=["low", "high"], parameters=["mu"])
        ...     with store.writing() as writer:
        ...         ones = np.ones((2, 1))
        ...         records = Records(np.arange(2), ones, (ones,), np.zeros(2, np.uint8), np.ones((2, 1), int), ones)
        ...         writer.add(Stream(1, 0, (0,)), records)
        ...     open_store(folder).missing(Stream(1, 0, (0,)), 0, 5)
        [(2, 5)]
    """
    folder = Path(path)
    _check_fresh(folder)
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": _FORMAT, "layout": _LAYOUT, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": _versions(), "description": dict(description), "names": list(names),
        "parameters": list(parameters), "costs": None if costs is None else list(costs),
        "row_costs": None if row_costs is None else list(row_costs),
    }  # fmt: skip
    text = json.dumps(manifest, indent=1).encode()
    try:
        with locked(folder / "lock") as alone:
            _remove_unfinished([folder], alone=alone)
            _check_fresh(folder)
            write_file(folder / "store.json", text)  # the folder becomes a store with this
    except LockHeldError as error:
        raise StoreError(f"{folder} is being made a store by {error.holder or 'another process'}.") from error
    return open_store(folder)


def _check_fresh(folder: Path) -> None:
    if (folder / "store.json").exists():
        raise StoreError(f"{folder} holds a store already. Open it with open_store, or choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"Expected a folder for a store; {folder} is a file.")
    ours = ("rows", "lock")
    others = [entry.name for entry in folder.iterdir() if not entry.name.startswith(TEMPORARY)
              and entry.name not in ours] if folder.exists() else []
    if others or (folder.exists() and any((folder / "rows").glob("*.npz"))):
        raise StoreError(f"Expected an empty or new folder for a store; {folder} holds "
                         f"{sorted(others)[:5] or 'shards'} and no store.json. Choose another folder.")


def _remove_unfinished(folders: Sequence[Path], *, alone: bool) -> None:
    """Removes files that a killed writer did not finish; without locks only those of dead processes of this host."""
    mine = f"{TEMPORARY}{socket.gethostname()}-"
    for folder in folders:
        for path in folder.glob(f"{TEMPORARY}*"):
            pid = path.name.removeprefix(mine).split("-")[0]
            dead = path.name.startswith(mine) and pid.isdigit() and not is_alive(int(pid))
            if alone or dead:
                path.unlink(missing_ok=True)


def _list_shards(folder: Path) -> set[str]:
    """Names in the folder at one moment: a listing during which it changed may miss a file and its replacement."""
    for _ in range(20):
        before = os.stat(folder).st_mtime_ns
        names = {entry.name for entry in os.scandir(folder) if entry.name.endswith(".npz")}
        if os.stat(folder).st_mtime_ns == before:
            break
    return names


def _read_targets(path: Path) -> dict[Stream, int]:
    try:
        lines = json.loads(path.read_bytes())
        return {Stream(line["seed"], line["number"], tuple(line["levels"])): int(line["rows"]) for line in lines}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}). Delete it: it only says how many rows were asked for."
                         ) from error


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "numpy": np.__version__, "torch": str(torch.__version__)}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["mlsbi"] = importlib.metadata.version("mlsbi")
    return found


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


def _terms(stream: Stream, level: int) -> tuple[int, int | None]:
    """Places of a level's own and its coarse output among those of a stream."""
    return len(stream.levels) - 1, len(stream.levels) - 2 if level else None


def _torch_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What numbers of a dtype become for training."""
    if dtype.kind != "f":
        return torch.empty(0).numpy().dtype
    return dtype.newbyteorder("=") if dtype.itemsize <= 8 else np.dtype(np.float64)


def _to_torch(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.astype(_torch_dtype(array.dtype), copy=False))


def _total(rows: Sequence[Sequence[float]], width: int) -> Array:
    return np.array([math.fsum(column) for column in zip(*rows, strict=True)] if rows else [0.0] * width)


def _first_of_index(index: Array) -> Array:
    """Records of a shard that stand for their rows: they are sorted, the best of a row first."""
    return np.r_[True, index[1:] != index[:-1]] if len(index) else np.empty(0, bool)


def _sharing(shards: Sequence[Shard]) -> list[Shard]:
    """Shards that share rows with another."""
    rows = [shard.rows.pairs for shard in shards]
    if len(rows) < 2:
        return []
    pairs = np.concatenate(rows)
    owner = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    places = np.argsort(pairs[:, 0], kind="stable")
    starts, stops, owner = pairs[places, 0], pairs[places, 1], owner[places]
    earlier = np.r_[False, starts[1:] < np.maximum.accumulate(stops)[:-1]]
    later = np.r_[stops[:-1] > starts[1:], False]
    return [shards[place] for place in np.unique(owner[earlier | later])]


def _settle(
    names: Sequence[str], tries: Mapping[str, Tries], width: int
) -> tuple[dict[str, Array], Array, Array]:
    """Which records of shards that share rows stand for these, and what the distinct ones cost."""
    if not names:
        return {}, np.zeros(width, np.int64), np.zeros(width)
    found = [tries[name] for name in names]
    owner = np.repeat(np.arange(len(found)), [len(one.index) for one in found])
    position = np.concatenate([np.arange(len(one.index)) for one in found])
    whole = Tries(*(np.concatenate([getattr(one, field) for one in found])
                    for field in ("index", "status", "runs", "seconds")))
    places, repeated = order(whole)
    wins = places[_first_of_index(whole.index[places])]
    winners = {name: np.sort(position[wins[owner[wins] == place]]) for place, name in enumerate(names)}
    distinct = places[~repeated]
    return winners, whole.runs[distinct].sum(0), whole.seconds[distinct].sum(0)


def _alike(shards: Sequence[Shard]) -> list[list[int]]:
    """Places of shards whose arrays can be joined; those without outputs go with the first that have some."""
    groups: list[tuple[list[Any], list[int]]] = []
    for place in sorted(range(len(shards)), key=lambda p: (sum(form is None for form in shards[p].outputs),
                                                           str(shards[p].theta), str(shards[p].outputs), p)):
        forms = [shards[place].theta, *shards[place].outputs]
        for known, members in groups:
            if all(a is None or b is None or a == b for a, b in zip(known, forms, strict=True)):
                known[:] = [a or b for a, b in zip(known, forms, strict=True)]
                members.append(place)
                break
        else:
            groups.append((forms, [place]))
    return [sorted(members) for _, members in groups]


def _row_bytes(shards: Sequence[Shard]) -> int:
    forms = [[shard.theta, *shard.outputs] for shard in shards]
    known = [next((form for form in column if form is not None), None) for column in zip(*forms, strict=True)]
    return 32 + sum(np.dtype(form[0]).itemsize * math.prod(form[1]) for form in known if form is not None)
