r"""Bringing the simulations of one stack together that were made in several places."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from mlsbi.simulation.fingerprint import compare_stacks
from mlsbi.store.ranges import Ranges
from mlsbi.store.records import OK, Records, Stream
from mlsbi.store.shards import Shard, read_bytes, read_records
from mlsbi.store.store import Store, StoreError, open_store

__all__ = ["merge_stores"]


def merge_stores(store: Store, other: Store | str | os.PathLike[str]) -> None:
    r"""Copies into a store what another store of the same stack holds; doing so twice changes nothing.

    Args:
        store: Where to.
        other: Where from; it is left as it is.

    Raises:
        StoreError: If the stacks differ, a shard is damaged, or rows that both hold are not equal (then nothing is
            copied); or if the store cannot be written.
    """
    source = other if isinstance(other, Store) else open_store(other)
    if os.path.realpath(source.path) == os.path.realpath(store.path):
        return
    with store.writing() as writer:
        source.refresh()
        _check_same_stack(store, source)
        for name in source.verify():
            raise StoreError(f"{source.damaged[name]} Call discard_damaged() on {source.path}, then merge again.")
        new = [shard for shard in source.shards if shard.name not in {own.name for own in store.shards}]
        for stream in sorted({shard.stream for shard in new}):
            _check_equal_rows(store, source, stream, [shard for shard in new if shard.stream == stream])
        for shard in new:
            writer.add_shard(shard.name, read_bytes(source.rows / shard.name))
        for stream, n in source.targets.items():
            writer.set_target(stream, max(n, store.targets.get(stream, 0)))


def _check_same_stack(store: Store, source: Store) -> None:
    differences = compare_stacks(store.description, source.description)
    for what in ("names", "parameters"):
        ours, theirs = getattr(store, what), getattr(source, what)
        if ours != theirs and not differences:
            differences = [f"{what}: {ours} here, {theirs} there"]
    if differences:
        raise StoreError(f"{source.path} holds simulations of another stack than {store.path}:\n"
                         + "\n".join(differences))


def _check_equal_rows(store: Store, source: Store, stream: Stream, new: Sequence[Shard]) -> None:
    """Rows of a stream that come from new shards and are here already must be the same."""
    differing = Ranges()
    for shard in new:
        shared = shard.ok & store.ok(stream)
        if not len(shared):
            continue
        theirs = read_records(source.rows / shard.name, shard)
        theirs = theirs.take((theirs.status == OK) & shared.holds(theirs.index))
        for ours in store.read(stream, int(theirs.index[0]), int(theirs.index[-1]) + 1):
            differing |= _differing(ours, theirs)
    if len(differing):
        raise StoreError(f"{source.path} and {store.path} hold different outputs for {len(differing)} rows of "
                         f"{stream}: {list(differing)[:5]}. A simulator is not deterministic, or differs between the "
                         "two places. Nothing was copied.")


def _differing(ours: Records, theirs: Records) -> Ranges:
    place = np.minimum(np.searchsorted(ours.index, theirs.index), len(ours) - 1)
    shared = ours.index[place] == theirs.index
    same = np.ones(len(theirs), bool)
    for one, other in zip((ours.theta, *ours.outputs), (theirs.theta, *theirs.outputs), strict=True):
        alike = one.dtype == other.dtype and one.shape[1:] == other.shape[1:]
        same &= (one[place] == other).reshape(len(theirs), -1).all(1) if alike else False
    return Ranges.of(theirs.index[shared & ~same])
