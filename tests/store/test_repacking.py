import os

import pytest
from stores import HIGH, LOW, fill, flip_an_output, make, new, same

from mlsbi.store import repacking
from mlsbi.store.ranges import Ranges
from mlsbi.store.store import open_store


def test_compacting_changes_no_record(tmp_path):
    store = fill(new(tmp_path), *((LOW, make([i])) for i in range(40, 0, -1)), (LOW, make([3, 7], status=1)),
                 (LOW, make([50], status=2, message="late")), (LOW, make(range(30, 45))),
                 *((HIGH, make([i, i + 3], HIGH)) for i in range(5)))
    before, failures, runs, seconds = store.data(), store.failures(), store.runs, store.seconds
    store.compact()
    assert len(store.shards) == 2
    for now in (store, open_store(store.path)):
        assert same(now.data(), before)
        assert now.failures().equals(failures)
        assert now.runs == runs
        assert now.seconds == pytest.approx(seconds, rel=1e-12)
    names = sorted(os.listdir(store.rows))
    store.compact()
    assert sorted(os.listdir(store.rows)) == names
    assert open_store(store.path).verify() == ()


def test_compacting_keeps_to_the_size_of_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(repacking, "LARGEST", 5000)
    store = fill(new(tmp_path), *((LOW, make(range(i, 1000, 10), width=4)) for i in range(10)))
    before = store.data()
    store.compact()
    rows = [len(shard.ok) for shard in store.shards]
    assert len(rows) > 3
    assert max(rows) * 56 <= 5000
    assert all(len(shard.ok.pairs) == 1 for shard in store.shards)
    assert same(store.data(), before)
    names = sorted(os.listdir(store.rows))
    store.compact()
    assert sorted(os.listdir(store.rows)) == names


def test_small_shards_are_joined_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(repacking, "_MANY", 8)
    store = new(tmp_path)
    with store.writing() as writer:
        for row in range(100):
            writer.add(LOW, make([row], cost=0.06))
            assert len(os.listdir(store.rows)) <= 9
            assert len(open_store(store.path).ok(LOW)) == row + 1 if row % 10 == 0 else True
    assert store.data().n == (100, 0)
    assert store.runs == (100, 0)


def test_joining_small_shards_leaves_damaged_ones_alone(tmp_path, monkeypatch):
    store = fill(new(tmp_path), *((LOW, make([row], width=50)) for row in range(4)))
    name = flip_an_output(store, 2)
    monkeypatch.setattr(repacking, "_MANY", 2)
    with pytest.warns(UserWarning, match="rows 2 to 2"):
        fill(store, (LOW, make([9], width=50)))
    assert list(store.damaged) == [name]
    assert (store.rows / name).exists()
    store.discard_damaged()
    assert store.ok(LOW) == Ranges.of([0, 1, 3, 9])
    assert store.data().n == (4, 0)
