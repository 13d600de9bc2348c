r"""Stores for tests: records that follow from their rows, and what spoils them."""

import os
import warnings

import numpy as np
import pytest
import torch

from mlsbi.store.records import OK, Records, Stream
from mlsbi.store.store import create_store

LOW, HIGH = Stream(1, 0, (0,)), Stream(1, 1, (0, 1))


def make(index, stream=LOW, *, status=0, dtype=np.float32, width=3, cost=0.001, message=None, noise_seed=False):
    """Records whose every number follows from stream and row, so that any mix-up shows."""
    index = np.asarray(index, np.int64)
    n, levels = len(index), len(stream.levels)
    base = index + 1000 * stream.number % 997 + stream.seed
    outputs = tuple((base[:, None] + np.linspace(0, 1, width) + 10 * level).astype(dtype) for level in stream.levels)
    return Records(
        index, np.stack([base, -base], 1).astype(np.float32), outputs if status == OK else (),
        np.full(n, status, np.uint8), np.ones((n, levels), np.int64),
        np.full((n, levels), cost) * (1 + index[:, None] / 128) * (1 + status), dict.fromkeys(range(n), message)
        if message else {}, index + 5 if noise_seed else None,
    )


def new(folder, **options):
    return create_store(folder / "store", {"stack": "a"}, ["low", "high"], ["mu", "sigma"], **options)


def fill(store, *pairs):
    with store.writing() as writer:
        for stream, records in pairs:
            writer.add(stream, records)
            writer.flush()
    return store


def same(one, other) -> bool:
    return (one.failures, one.runs, one.n) == (other.failures, other.runs, other.n) and all(
        torch.equal(a.theta, b.theta) and torch.equal(a.fine, b.fine) and a.fine.dtype == b.fine.dtype
        and (a.coarse is None) == (b.coarse is None) and (a.coarse is None or torch.equal(a.coarse, b.coarse))
        for a, b in zip(one, other, strict=True)
    ) and one.seconds == pytest.approx(other.seconds, rel=1e-12)


def in_child(function) -> int:
    """Runs a function in a forked child; its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def damage(path, at=-200):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def flip_an_output(store, row):
    shard = next(shard for shard in store.shards if shard.ok.holds(np.array([row]))[0])
    path = store.rows / shard.name
    at = path.read_bytes().index(make([row], width=50).outputs[0].tobytes())
    damage(path, at + 9)
    return shard.name
