r"""The rows of a store that training can use, level by level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mlsbi.data import LevelData, MultilevelData
from mlsbi.store.catalogue import Catalogue
from mlsbi.store.files import StoreError
from mlsbi.store.records import JOINT_STREAM, Stream

__all__ = ["collect", "read_batches", "read_terms"]

Array = np.ndarray[Any, Any]


def collect(catalogue: Catalogue, seed: int | None) -> MultilevelData:
    """All of them in memory; see `Store.data`."""
    used = [_find_streams(catalogue, level, seed) for level in range(len(catalogue.names))]
    streams = [stream for level in used for stream in level]
    shape, dtype = _find_form(catalogue, streams)
    data = MultilevelData(
        tuple(_collect_level(catalogue, level, streams, shape, dtype) for level, streams in enumerate(used)),
        catalogue.names,
        tuple(sum(len(catalogue.index(stream).lost) for stream in streams) for streams in used),
        catalogue.count_runs(streams),
        catalogue.sum_seconds(streams),
    )
    data.check(empty=True)
    return data


def read_terms(catalogue: Catalogue, level: int, seed: int | None) -> Iterator[tuple[Array, Array, Array | None]]:
    """Theta, fine and coarse of one level, shard by shard; see `Store.term_records`."""
    level = range(len(catalogue.names))[level]
    for stream in _find_streams(catalogue, level, seed):
        for records in catalogue.read(stream, catalogue.index(stream).ok, failed=False):
            yield records.theta, records.outputs[-1], records.outputs[-2] if level else None


def read_batches(catalogue: Catalogue, level: int, seed: int | None) -> Iterator[LevelData]:
    """Tensors of one level, shard by shard; see `Store.batches`."""
    for theta, fine, coarse in read_terms(catalogue, level, seed):
        yield LevelData(_to_torch(theta), _to_torch(fine), None if coarse is None else _to_torch(coarse))


def _find_streams(catalogue: Catalogue, level: int, seed: int | None) -> list[Stream]:
    """Streams whose rows are of one level's term, a pilot's first."""
    last = len(catalogue.names) - 1
    kinds = [(level, tuple(range(max(level - 1, 0), level + 1)))]
    if level == 0:
        kinds.insert(0, (JOINT_STREAM + 1, (0,)))
    if level == last:
        kinds.insert(0, (JOINT_STREAM, tuple(range(last + 1))))
    return [stream for number, levels in kinds for stream in catalogue.streams
            if (stream.number, stream.levels) == (number, levels) and seed in (None, stream.seed)]


def _find_form(catalogue: Catalogue, streams: Sequence[Stream]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape of an output, and the dtype that holds all of them."""
    forms = {form for stream in streams for shard in catalogue.index(stream).shards if len(shard.ok)
             for form in shard.outputs if form is not None}
    if not forms:
        lost = sum(len(catalogue.index(stream).lost) for stream in catalogue.streams)
        raise StoreError(f"{catalogue.folder} holds no finished rows to train on"
                         + (f": {lost} rows failed, see failures()." if lost else " yet."))
    shapes = {shape for _, shape in forms}
    if len(shapes) > 1:
        raise StoreError(f"{catalogue.folder} holds outputs of different shapes: {sorted(shapes)}. Levels must return "
                         "rows of one shape.")
    return shapes.pop(), np.result_type(*(_torch_dtype(np.dtype(name)) for name, _ in forms))


def _collect_level(
    catalogue: Catalogue, level: int, streams: Sequence[Stream], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> LevelData:
    """Rows of one level, each put in its place as it is read."""
    wanted = [catalogue.index(stream).ok for stream in streams]
    n = sum(len(rows) for rows in wanted)
    forms = [shard.theta for stream in streams for shard in catalogue.index(stream).shards if shard.theta is not None]
    dtypes = [_torch_dtype(np.dtype(name)) for name, _ in forms] or [np.dtype(np.float32)]
    theta = np.empty((n, len(catalogue.parameters)), np.result_type(*dtypes))
    fine = np.empty((n, *shape), dtype)
    coarse = np.empty_like(fine) if level else None
    start = 0
    for stream, rows in zip(streams, wanted, strict=True):
        for records in catalogue.read(stream, rows, failed=False):
            places = start + rows.rank(records.index)
            theta[places], fine[places] = records.theta, records.outputs[-1]
            if coarse is not None:
                coarse[places] = records.outputs[-2]
        start += len(rows)
    return LevelData(_to_torch(theta), _to_torch(fine), None if coarse is None else _to_torch(coarse))


def _torch_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What numbers of a dtype become for training."""
    if dtype.kind != "f":
        return torch.empty(0).numpy().dtype
    return dtype.newbyteorder("=") if dtype.itemsize <= 8 else np.dtype(np.float64)


def _to_torch(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.astype(_torch_dtype(array.dtype), copy=False))
