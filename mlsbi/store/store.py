r"""A folder in which nothing that was computed is lost or changes: every row ever run, finished or failed.

A store is a set of records. Shards are only its packaging: joining or copying them changes no record, and whatever is
found twice counts once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mlsbi.data import LevelData, MultilevelData
from mlsbi.levels import campaign_cost
from mlsbi.store.catalogue import Catalogue
from mlsbi.store.collecting import collect, read_batches, read_terms
from mlsbi.store.files import StoreError
from mlsbi.store.manifest import make_folder, read_manifest
from mlsbi.store.ranges import Ranges
from mlsbi.store.records import Records, Stream
from mlsbi.store.shards import Shard
from mlsbi.store.summary import summarise, tabulate_failures, tabulate_levels
from mlsbi.store.writing import Writer, open_writer

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Store", "StoreError", "Writer", "create_store", "find_stores", "open_store"]

Array = np.ndarray[Any, Any]


class Store:
    r"""The simulations of one stack, on disk; see `open_store` and `create_store`.

    Reading needs no lock and never blocks; `refresh` shows what others have written since.

    Args:
        path: Folder.
        manifest: What `store.json` says.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._catalogue = Catalogue(path, manifest)

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._catalogue.folder

    @property
    def rows(self) -> Path:
        """The folder of shards."""
        return self._catalogue.rows

    @property
    def manifest(self) -> dict[str, Any]:
        """What `store.json` says."""
        return dict(self._catalogue.manifest)

    @property
    def description(self) -> dict[str, Any]:
        """What the stack was when the store was made."""
        return dict(self._catalogue.manifest["description"])

    @property
    def names(self) -> tuple[str, ...]:
        """Level names, cheapest first."""
        return self._catalogue.names

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return self._catalogue.parameters

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Streams that have records, replays or a target."""
        return self._catalogue.streams

    @property
    def targets(self) -> dict[Stream, int]:
        """Rows that campaigns asked for."""
        return dict(self._catalogue.targets)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What is known of every shard, by stream, damaged ones left out."""
        return tuple(sorted(self._catalogue.shards.values(), key=lambda shard: (shard.stream, shard.name)))

    @property
    def damaged(self) -> dict[str, str]:
        """Files whose content is not what was written, and which rows they held."""
        return dict(self._catalogue.damaged)

    def refresh(self) -> None:
        """Sees what others have written since."""
        self._catalogue.refresh()

    def verify(self) -> tuple[str, ...]:
        """Reads every shard; returns the names of damaged ones, which `damaged` then explains."""
        self._catalogue.verify()
        return tuple(sorted(self._catalogue.damaged))

    def discard_damaged(self) -> tuple[str, ...]:
        """Moves damaged shards into the folder `damaged/`, so that their rows count as never run; returns names."""
        return self._catalogue.discard_damaged()

    def done(self, stream: Stream) -> Ranges:
        """Rows of a stream that are finished, or failed and were not repaired since."""
        return self._catalogue.index(stream).rows

    def ok(self, stream: Stream) -> Ranges:
        """Rows of a stream that every level finished."""
        return self._catalogue.index(stream).ok

    def failed(self, stream: Stream) -> dict[int, int]:
        """Status of each row that failed and was not repaired since, by row."""
        failed = self._catalogue.index(stream).failed
        return dict(sorted((row, status) for status, rows in failed.items() for row in rows.indices().tolist()))

    def missing(self, stream: Stream, start: int, stop: int, *, retry_failed: bool = False) -> list[tuple[int, int]]:
        """Ranges `[start, stop)` of rows still to be run; with `retry_failed`, failed ones too."""
        if stop <= start:
            return []
        return list(Ranges([(start, stop)]) - (self.ok(stream) if retry_failed else self.done(stream)))

    def replayed(self, stream: Stream) -> bool:
        """Whether rows of a stream were run again to see whether its simulators are deterministic."""
        return any(shard.replays and shard.stream == stream for shard in self._catalogue.shards.values())

    def tries(self, stream: Stream) -> tuple[Array, Array]:
        """Runs and seconds of each of a stream's levels, those of rows that were tried again included; no replays."""
        index = self._catalogue.index(stream)
        return index.runs.copy(), index.seconds.copy()

    def replays(self, stream: Stream) -> tuple[Array, Array]:
        """Runs and seconds of each of a stream's levels that went into replays; zeros where there were none."""
        index = self._catalogue.index(stream)
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
        wanted = Ranges([(start, 2**62 if stop is None else max(start, stop))])
        return self._catalogue.read(stream, wanted & (self.done if failed else self.ok)(stream), failed=failed)

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
        return collect(self._catalogue, seed)

    def batches(self, level: int, seed: int | None = None) -> Iterator[LevelData]:
        """The rows of one level of `data`, shard by shard, so that they need not fit into memory.

        They come in the order of `data` unless shards interleave; `compact` sorts them.
        """
        return read_batches(self._catalogue, level, seed)

    def term_records(self, level: int, seed: int | None = None) -> Iterator[tuple[Array, Array, Array | None]]:
        """Theta, fine and coarse of one level of `data`, shard by shard, in the dtypes that simulators gave."""
        return read_terms(self._catalogue, level, seed)

    def failures(self) -> pd.DataFrame:
        """One line per row that failed and was not repaired: what it was, and what went wrong."""
        return tabulate_failures(self._catalogue)

    @property
    def runs(self) -> tuple[int, ...]:
        """Simulator runs of each level, failed tries and replays included."""
        return self._catalogue.count_runs(self.streams)

    @property
    def seconds(self) -> tuple[float, ...]:
        """Time spent in each level's simulator, failed tries and replays included."""
        return self._catalogue.sum_seconds(self.streams)

    @property
    def costs(self) -> tuple[float, ...]:
        """Measured seconds per run of each level, of rows finished at the first try; NaN where there are none."""
        runs, seconds = self._catalogue.sum_first_tries()
        return tuple(s / n if n else math.nan for s, n in zip(seconds.tolist(), runs.tolist(), strict=True))

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
                    pairs[level] += int(self._catalogue.index(stream).runs[place + 1])
        return campaign_cost(costs, row_costs, runs=self.runs, pairs=pairs)

    def writing(self) -> AbstractContextManager[Writer]:
        r"""Opens the store for writing, alone; what was added is written when the context ends, however it ends.

        Raises:
            StoreError: If somebody else is writing, or what was added cannot be written.
        """
        return open_writer(self._catalogue)

    def compact(self) -> None:
        """Joins shards into few large ones, sorted by row; no record changes. Raises as `writing`."""
        with self.writing() as writer:
            writer.compact()

    def to_frame(self) -> pd.DataFrame:
        """A line per level: rows wanted, done and failed, runs, seconds, and what they cost."""
        return tabulate_levels(self._catalogue)

    def __str__(self) -> str:
        return summarise(self._catalogue)

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {n}" for name, n in self.to_frame()["done"].items())
        return f"Store({str(self.path)!r}; {rows})"


def open_store(path: str | os.PathLike[str]) -> Store:
    r"""Opens a store for reading; `Store.writing` opens it for writing.

    Raises:
        StoreError: If the folder is no store, or was written by a newer version.
    """
    folder = Path(path).absolute()  # a simulator may change the working directory
    return Store(folder, read_manifest(folder))


def find_stores(folder: Path) -> list[Path]:
    """The stores below a folder."""
    return sorted(path.parent for path in folder.glob("**/store.json"))


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
        >>> from mlsbi.store.records import Records, Stream
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = create_store(folder, {}, names=["low", "high"], parameters=["mu"])
        ...     with store.writing() as writer:
        ...         ones = np.ones((2, 1))
        ...         records = Records(np.arange(2), ones, (ones,), np.zeros(2, np.uint8), np.ones((2, 1), int), ones)
        ...         writer.add(Stream(1, 0, (0,)), records)
        ...     open_store(folder).missing(Stream(1, 0, (0,)), 0, 5)
        [(2, 5)]
    """
    make_folder(Path(path).absolute(), {
        "description": dict(description), "names": list(names), "parameters": list(parameters),
        "costs": None if costs is None else list(costs), "row_costs": None if row_costs is None else list(row_costs),
    })  # fmt: skip
    return open_store(path)
