import os

import numpy as np
import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack
from mlsbi.simulation.fingerprint import describe_stack
from mlsbi.simulation.merging import merge_stores
from mlsbi.store.records import Records, Stream
from mlsbi.store.store import StoreError, create_store, open_store

LOW, HIGH = Stream(1, 0, (0,)), Stream(1, 1, (0, 1))


def noise(n, generator):
    return torch.randn(n, 1, generator=generator)


def low(theta, noise):
    return theta + noise


def high(theta, noise):
    return theta + noise.sinh()


def stack(high=high):
    return LevelStack(BoxPrior([0.0], [1.0]), noise, [Level("low", low, 1), Level("high", high, 2)])


def make(index, stream=LOW, *, shift=0.0, seconds=0.001):
    index = np.asarray(index, np.int64)
    shape = (len(index), len(stream.levels))
    outputs = tuple((index[:, None] + level + shift) * np.ones(3) for level in stream.levels)
    return Records(index, index[:, None] / 7, outputs, np.zeros(len(index), np.uint8), np.ones(shape, np.int64),
                   np.full(shape, seconds) + index[:, None])


def fill(path, *pairs, description=None, targets=()):
    store = create_store(path, description or describe_stack(stack()), ["low", "high"], ["theta_0"])
    with store.writing() as writer:
        for stream, records in pairs:
            writer.add(stream, records)
            writer.flush()
        for stream, n in targets:
            writer.set_target(stream, n)
    return store


def test_merging_brings_everything_once(tmp_path):
    here = fill(tmp_path / "a", (LOW, make([0, 1])), (HIGH, make([0], HIGH)), targets=[(LOW, 5)])
    there = fill(tmp_path / "b", (LOW, make([1, 2])), (HIGH, make([0], HIGH)), targets=[(LOW, 3), (HIGH, 9)])
    with there.writing() as writer:
        writer.add_replay(LOW, [0], [[1]], [[0.5]])
    for _ in range(2):
        merge_stores(here, tmp_path / "b")
        now = open_store(here.path)
        assert now.data().n == (3, 1)
        assert now.runs == (3 + 1 + 1, 1)
        assert now.replayed(LOW)
        assert now.targets == {LOW: 5, HIGH: 9}
        assert now.verify() == ()
    names = sorted(os.listdir(here.rows))
    merge_stores(here, open_store(here.path))
    assert sorted(os.listdir(here.rows)) == names
    assert there.data().n == (2, 1)


def test_merging_a_compacted_copy_counts_nothing_twice(tmp_path):
    here = fill(tmp_path / "a", *((LOW, make([row])) for row in range(5)))
    there = fill(tmp_path / "b", *((LOW, make([row])) for row in range(7)))
    there.compact()
    merge_stores(here, there)
    assert here.runs == (7, 0)
    assert here.seconds == pytest.approx(there.seconds)
    assert here.data().n == (7, 0)


def test_different_outputs_are_named_and_nothing_is_copied(tmp_path):
    here = fill(tmp_path / "a", (LOW, make(range(10))))
    there = fill(tmp_path / "b", (HIGH, make([0], HIGH)), (LOW, make([3, 4, 20], shift=1e-9)))
    with pytest.raises(StoreError, match=r"different outputs for 2 rows .*\[\(3, 5\)\].*Nothing was copied"):
        merge_stores(here, there)
    assert open_store(here.path).streams == (LOW,)
    assert len(here.ok(LOW)) == 10
    same_again = fill(tmp_path / "c", (LOW, make([3, 4], seconds=9.0)))
    merge_stores(here, same_again)  # run twice, equal: both are paid
    assert here.runs == (12, 0)


def test_another_stack_is_refused(tmp_path):
    here = fill(tmp_path / "a", (LOW, make([0])))
    there = fill(tmp_path / "b", (LOW, make([1])), description=describe_stack(stack(high=lambda t, u: t * u)))
    with pytest.raises(StoreError, match="(?s)another stack.*level 'high'"):
        merge_stores(here, there)
    assert len(open_store(here.path).shards) == 1


def test_damaged_shards_are_not_copied(tmp_path):
    here = fill(tmp_path / "a", (LOW, make([0])))
    there = fill(tmp_path / "b", (LOW, make([1])), (LOW, make([2])))
    path = there.rows / there.shards[1].name
    data = bytearray(path.read_bytes())
    data[data.index(make([2]).outputs[0].tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged.*rows 2 to 2"):
        merge_stores(here, there)
    assert len(open_store(here.path).shards) == 1
    there.discard_damaged()
    merge_stores(here, there)
    assert len(here.ok(LOW)) == 2


def test_a_store_being_written_is_not_merged_into(tmp_path):
    here, there = fill(tmp_path / "a"), fill(tmp_path / "b", (LOW, make([1])))
    with here.writing(), pytest.raises(StoreError, match="is being written"):
        merge_stores(here, there)
