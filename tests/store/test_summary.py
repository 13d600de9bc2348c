import os

from stores import HIGH, LOW, fill, make, new

from mlsbi.store import catalogue, shards
from mlsbi.store.records import TEST_STREAM, Stream
from mlsbi.store.store import open_store


def test_failures_say_what_happened(tmp_path):
    store = fill(new(tmp_path), (HIGH, make([4], HIGH, status=2, message="too late", noise_seed=True)),
                 (HIGH, make([5, 6], HIGH, noise_seed=True)))
    line, = store.failures().to_dict("records")
    assert line == {"level": "high", "stream": "level high", "seed": 1, "index": 4, "noise_seed": 9, "mu": 8.0,
                    "sigma": -8.0, "status": "time-out", "message": "too late"}
    assert fill(store, (HIGH, make([4], HIGH, noise_seed=True))).failures().empty


def test_only_shards_with_failures_are_read_for_them(tmp_path, monkeypatch):
    store = fill(new(tmp_path), (LOW, make(range(5))), (LOW, make([7], status=1)))
    read = []
    monkeypatch.setattr(catalogue, "read_records", lambda path, *a, **k: read.append(path) or
                        shards.read_records(path, *a, **k))
    assert len(store.failures()) == 1
    assert len(read) == 1


def test_targets_and_the_table(tmp_path):
    store = new(tmp_path, costs=[1.0, 5.0], row_costs=[1.0, 6.0])
    with store.writing() as writer:
        writer.set_target(LOW, 100)
        writer.set_target(TEST := Stream(1, TEST_STREAM, (1,)), 10)
        writer.add(LOW, make(range(20)))
        writer.add(LOW, make([30], status=1, message="ValueError: negative rate"))
        writer.add(TEST, make([0], TEST))
        writer.flush()
        text = str(store)
        assert f"being written by process {os.getpid()}" in text
        assert open_store(store.path).targets == {LOW: 100, TEST: 10}
    for part in ("test rows, seed 1: 1 rows of 10", "failed: 1 exception"):
        assert part in text
    frame = store.to_frame()
    assert frame.loc["low", ["wanted", "done", "failed", "runs", "cost"]].tolist() == [100, 20, 1, 21, 21]
    assert "being written" not in str(store)
    assert repr(store).endswith("low: 20, high: 0)")
