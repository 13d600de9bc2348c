r"""Many small shards made into few large ones, sorted by row, without a moment in which a record is missing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from mlsbi.store.catalogue import Catalogue
from mlsbi.store.files import sync_folder
from mlsbi.store.joining import LARGEST, Form, group_alike, join, row_bytes, sort_tries
from mlsbi.store.records import Stream
from mlsbi.store.shards import Shard, read_bytes, read_tries

__all__ = ["repack", "repack_small"]

_SMALL, _MANY = 1 << 20, 512  # more shards of a stream below this size are joined


def repack_small(catalogue: Catalogue, stream: Stream) -> None:
    """Joins the small shards of a stream once they are many; raises as `repack`."""
    small = [shard for shard in catalogue.shards.values()
             if shard.stream == stream and not shard.replays and shard.size < _SMALL]
    if len(small) > _MANY:
        repack(catalogue, stream, small)


def repack(catalogue: Catalogue, stream: Stream, shards: Sequence[Shard]) -> None:
    r"""Writes the records of shards, sorted, into new ones, and removes each old one when all of it is in these.

    Damaged ones are left alone, with a warning.

    Args:
        catalogue: Of the store, whose lock is held.
        stream: Whose shards.
        shards: Which of them, of records.

    Raises:
        StoreError: If shards cannot be written.
    """
    whole = []
    for shard in sorted(shards, key=lambda shard: (shard.first, shard.name)):
        why = catalogue.check(shard.name)
        if why is None:
            whole.append(shard)
        else:
            warnings.warn(f"{why} Call discard_damaged() to have these rows simulated again.", stacklevel=2)
    for forms, members in group_alike([[shard.theta, *shard.outputs] for shard in whole]):
        _repack_alike(catalogue, stream, [whole[place] for place in members], forms)


def _repack_alike(catalogue: Catalogue, stream: Stream, shards: Sequence[Shard], forms: Sequence[Form | None]) -> None:
    order = sort_tries([read_tries(catalogue.rows / shard.name) for shard in shards])
    bins = (np.cumsum(~order.repeated) - 1) // max(1, LARGEST // row_bytes(forms))
    edges = np.r_[np.flatnonzero(np.diff(bins, prepend=-1)), len(bins)]
    last = np.zeros(len(shards), np.int64)  # the bin that holds the last of each shard
    np.maximum.at(last, order.owner, bins)
    kept: set[str] = set()
    for number, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        wanted = ~order.repeated[start:stop]
        owner, position = order.owner[start:stop][wanted], order.position[start:stop][wanted]
        owners = np.unique(owner).tolist()
        only = shards[owners[0]]
        if len(owners) == 1 and np.array_equal(position, np.arange(only.records)):
            kept.add(only.name)  # packed this way already
        else:
            parts = [catalogue.load(shards[one]).take(position[owner == one]) for one in owners]
            for piece in join(parts):
                shard = catalogue.add(stream, piece)
                read_bytes(catalogue.rows / shard.name)  # what replaces others is read back first
                kept.add(shard.name)
            del parts
        for one in np.flatnonzero(last == number).tolist():
            if shards[one].name not in kept:
                catalogue.remove(shards[one].name)
    sync_folder(catalogue.rows)
