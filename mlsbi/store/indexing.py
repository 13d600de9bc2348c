r"""What the shards of a stream hold together: its rows, which record stands for each, and what all of them cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlsbi.store.joining import Tries, sort_tries
from mlsbi.store.ranges import Ranges
from mlsbi.store.records import Records, Stream
from mlsbi.store.shards import Shard

__all__ = ["Index", "build_index", "find_sharing"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Index:
    r"""What a stream's shards hold together.

    Args:
        shards: Those of records, by their first rows.
        ok: Rows with a finished record.
        failed: Rows without one, by status.
        winners: Positions of the records that stand for their rows, in shards that share rows, by name.
        runs: Simulator runs of each of the stream's levels, without replays.
        seconds: Time spent in each.
        replay_runs: Runs that went into replays.
        replay_seconds: Time that did.
    """

    shards: Sequence[Shard]
    ok: Ranges
    failed: Mapping[int, Ranges]
    winners: Mapping[str, Array]
    runs: Array
    seconds: Array
    replay_runs: Array
    replay_seconds: Array

    @property
    def lost(self) -> Ranges:
        """Rows that failed and were not repaired since."""
        return Ranges.union(self.failed.values())

    @property
    def rows(self) -> Ranges:
        """Rows with any record."""
        return self.ok | self.lost

    def winning(self, shard: Shard, records: Records) -> Array:
        """Which of a shard's records stand for their rows, boolean."""
        if shard.name not in self.winners:
            return _first_of_row(records.index)
        chosen = np.zeros(len(records), bool)
        chosen[self.winners[shard.name]] = True
        return chosen


def find_sharing(shards: Sequence[Shard]) -> list[Shard]:
    """Shards of a stream's records that share rows with another."""
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


def build_index(
    stream: Stream, shards: Sequence[Shard], replays: Sequence[Shard], tries: Mapping[str, Tries]
) -> Index:
    r"""Finds what a stream's shards hold together.

    Args:
        stream: The stream.
        shards: Its shards of records.
        replays: Its shards of replays.
        tries: The tries in those of `find_sharing(shards)`, by name.
    """
    width = len(stream.levels)
    ok = Ranges.union(shard.ok for shard in shards)
    failed: dict[int, Ranges] = {}
    for status in sorted({status for shard in shards for status in shard.failed}):
        rows = Ranges.union(shard.failed.get(status, Ranges()) for shard in shards)
        rows = rows - ok - Ranges.union(failed.values())
        if len(rows):
            failed[status] = rows
    winners, runs, seconds = _settle(tries, width)
    apart = [shard for shard in shards if shard.name not in winners]
    return Index(
        sorted(shards, key=lambda shard: (shard.first, shard.name)), ok, failed, winners,
        runs + _total([shard.runs for shard in apart], width).astype(np.int64),
        seconds + _total([shard.seconds for shard in apart], width),
        _total([shard.runs for shard in replays], width).astype(np.int64),
        _total([shard.seconds for shard in replays], width),
    )  # fmt: skip


def _settle(tries: Mapping[str, Tries], width: int) -> tuple[dict[str, Array], Array, Array]:
    """Which records of shards that share rows stand for these, and what the distinct ones cost."""
    if not tries:
        return {}, np.zeros(width, np.int64), np.zeros(width)
    order = sort_tries(list(tries.values()))
    first = _first_of_row(order.tries.index)
    winners = {name: np.sort(order.position[first & (order.owner == place)]) for place, name in enumerate(tries)}
    return winners, order.tries.runs[~order.repeated].sum(0), order.tries.seconds[~order.repeated].sum(0)


def _first_of_row(index: Array) -> Array:
    """Records that stand for their rows where they are sorted, the best of a row first."""
    return np.r_[True, index[1:] != index[:-1]] if len(index) else np.empty(0, bool)


def _total(rows: Sequence[Sequence[float]], width: int) -> Array:
    return np.array([math.fsum(column) for column in zip(*rows, strict=True)] if rows else [0.0] * width)
