import os
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from stores import HIGH, LOW, fill, flip_an_output, make, new, same

from mlsbi.store import repacking
from mlsbi.store.records import OK
from mlsbi.store.store import StoreError, open_store


def test_a_later_success_repairs_a_failure_and_both_are_paid(tmp_path):
    store = fill(new(tmp_path), (LOW, make([0, 1, 2], status=1, message="boom")), (LOW, make([1])))
    assert store.failed(LOW) == {0: 1, 2: 1}
    assert store.missing(LOW, 0, 4) == [(3, 4)]
    assert store.missing(LOW, 0, 4, retry_failed=True) == [(0, 1), (2, 4)]
    assert store.runs == (4, 0)
    assert store.seconds[0] == pytest.approx(make([0, 1, 2], status=1).seconds.sum() + make([1]).seconds.sum())
    assert [r.index.tolist() for r in store.read(LOW)] == [[1]]
    assert sorted(i for r in store.read(LOW, failed=True) for i in r.index.tolist()) == [0, 1, 2]
    late = fill(store, (LOW, make([1], status=2)))  # a failure after a success changes nothing but the cost
    assert late.failed(LOW) == {0: 1, 2: 1}
    assert late.runs == (5, 0)


def test_a_record_found_twice_counts_once(tmp_path):
    store = fill(new(tmp_path), (LOW, make([0, 1])), (LOW, make([1, 2])), (LOW, make([0, 1, 2])))
    assert store.runs == (3, 0)
    assert len(store.shards) == 3
    assert store.seconds[0] == pytest.approx(make([0, 1, 2]).seconds.sum())
    assert [r.index.tolist() for r in store.read(LOW)]
    assert store.data().n == (3, 0)
    fill(store, (LOW, make([0], cost=0.5)))  # run a second time: paid twice
    assert store.runs == (4, 0)
    assert store.data().n == (3, 0)


@pytest.mark.parametrize("compact", [False, True])
def test_a_finished_record_stands_for_its_row_and_the_quickest_of_these(tmp_path, compact):
    store = fill(new(tmp_path), (LOW, make([0, 1, 2], status=1)), (LOW, make([1], cost=0.5)), (LOW, make([1])))
    if compact:
        store.compact()  # all tries of row 1 are in one shard
    fill(store, (LOW, make([1, 3], cost=0.4)))
    found = {int(row): (int(status), float(seconds)) for part in store.read(LOW, failed=True)
             for row, status, seconds in zip(part.index, part.status, part.seconds[:, 0], strict=True)}
    assert {row: status for row, (status, _) in found.items()} == {0: 1, 1: OK, 2: 1, 3: OK}
    assert found[1][1] == make([1]).seconds[0, 0]
    assert sum(map(len, store.read(LOW, failed=True))) == 4


def test_a_flipped_byte_is_found_named_and_repaired(tmp_path):
    store = fill(new(tmp_path), (LOW, make([0, 1], width=50)), (LOW, make([2], width=50)))
    before = store.data()
    name = flip_an_output(store, 2)
    store = open_store(store.path)
    assert not store.damaged  # opening does not read data
    with pytest.raises(StoreError, match=r"2-2.*rows 2 to 2 of stream 0.*discard_damaged\(\)"):
        store.data()
    other = open_store(store.path)
    assert other.verify() == (name,)
    assert list(other.damaged) == [name]
    with pytest.raises(StoreError, match="discard_damaged"):
        list(other.read(LOW))
    assert f"damaged: {name}" in str(other)
    assert other.discard_damaged() == (name,)
    assert (other.path / "damaged" / name).exists()
    assert other.missing(LOW, 0, 3) == [(2, 3)]
    assert other.data().n == (2, 0)
    assert same(fill(other, (LOW, make([2], width=50))).data(), before)


def test_a_truncated_shard_is_found_on_opening(tmp_path):
    store = fill(new(tmp_path), (LOW, make([0, 1])), (LOW, make([5])), (HIGH, make([0], HIGH)))
    name = next(shard.name for shard in store.shards if shard.stream == LOW)
    path = store.rows / name
    path.write_bytes(path.read_bytes()[:-30])
    store = open_store(store.path)
    assert list(store.damaged) == [name]
    assert len(list(store.read(HIGH))) == 1  # other streams are not concerned
    with pytest.raises(StoreError, match="is damaged"):
        list(store.read(LOW))
    store.compact()
    assert path.exists()


def test_a_foreign_file_is_refused_until_it_is_moved(tmp_path):
    store = fill(new(tmp_path), (LOW, make([0])))
    np.savez(store.rows / "extra.npz", x=np.ones(3))
    store = open_store(store.path)
    with pytest.raises(StoreError, match="unknown rows"):
        store.data()
    store.discard_damaged()
    assert store.data().n == (1, 0)


def test_reading_goes_on_while_a_writer_compacts(tmp_path):
    store = fill(new(tmp_path), *((LOW, make([i, i + 20])) for i in range(20)))
    expected = store.data()
    reader, older = open_store(store.path), open_store(store.path)
    reading = reader.read(LOW)
    found = [next(reading).index]
    store.compact()
    found += [records.index for records in reading]
    assert sorted(np.concatenate(found).tolist()) == list(range(40))
    assert same(older.data(), expected)


def test_readers_in_other_processes_see_everything_at_every_moment(tmp_path):
    store = fill(new(tmp_path), (LOW, make(range(10))))

    def write():
        for _ in range(12):
            fill(store, *((LOW, make([i, i + 5])) for i in range(5)), (LOW, make(range(10))))
            store.compact()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        write()
        os._exit(0)
    looks = 0
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        reader = open_store(store.path)
        assert reader.missing(LOW, 0, 10) == []
        assert reader.data().n == (10, 0)
        assert not reader.damaged
        looks += 1
    assert looks > 3


def test_a_thousand_shards_open_fast(tmp_path, monkeypatch):
    monkeypatch.setattr(repacking, "_MANY", 10**9)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    fill(new(tmp_path), *((LOW, make(range(i * 1000, i * 1000 + 1000), width=1, cost=1e-7)) for i in range(1000)))
    best = min(timed(lambda: open_store(tmp_path / "store").missing(LOW, 0, 10**6)) for _ in range(3))
    assert best < 2.0  # 0.25 s on an idle machine


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of a process's memory")
def test_reading_needs_memory_for_two_shards(tmp_path):
    store = new(tmp_path)
    with store.writing() as writer:
        for part in range(20):
            writer.add(LOW, make(range(part * 4000, part * 4000 + 4000), width=1000))  # 16 MB each
    code = ("import sys\nfrom mlsbi.store.store import open_store\n"
            # not getrusage, which starts from the peak of the process that started this one
            "def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status')"
            " if line.startswith('VmHWM')) // 1024\n"
            "before = peak()\n"
            "rows = sum(len(batch) for batch in open_store(sys.argv[1]).batches(0))\n"
            "print(rows, peak() - before)")
    out = subprocess.run([sys.executable, "-c", code, str(store.path)], capture_output=True, text=True, check=True)
    rows, megabytes = map(int, out.stdout.split())
    assert rows == 80000
    assert megabytes < 80
