import builtins
import errno
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsbi.simulation import catalogue, repacking, writing
from mlsbi.simulation import shards as shards_module
from mlsbi.simulation.records import OK, Records, Stream
from mlsbi.simulation.seeding import JOINT_STREAM, TEST_STREAM
from mlsbi.simulation.files import write_file
from mlsbi.simulation.ranges import Ranges
from mlsbi.simulation.store import StoreError, create_store, open_store

LOW, HIGH = Stream(1, 0, (0,)), Stream(1, 1, (0, 1))
PILOT, PILOT_LOW = Stream(3, JOINT_STREAM, (0, 1)), Stream(3, JOINT_STREAM + 1, (0,))


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


def test_what_is_added_is_there_for_every_reader(tmp_path):
    fill(new(tmp_path), (LOW, make(range(10))), (LOW, make([12, 13])), (HIGH, make([1], HIGH)))
    store = open_store(tmp_path / "store")
    assert store.streams == (LOW, HIGH)
    assert store.missing(LOW, 0, 20) == [(10, 12), (14, 20)]
    assert store.missing(LOW, 5, 5) == []
    assert store.missing(Stream(2, 0, (0,)), 0, 3) == [(0, 3)]
    assert store.runs == (13, 1)
    found = list(store.read(LOW, 3, 13))
    assert np.concatenate([r.index for r in found]).tolist() == [*range(3, 10), 12]
    expected = make([*range(3, 10), 12])
    assert np.array_equal(np.concatenate([r.outputs[0] for r in found]), expected.outputs[0])
    assert np.array_equal(np.concatenate([r.theta for r in found]), expected.theta)


def test_slow_rows_are_on_disk_when_add_returns_and_cheap_ones_soon(tmp_path, monkeypatch):
    store = new(tmp_path)
    with store.writing() as writer:
        writer.add(LOW, make([0], cost=0.001))
        assert open_store(store.path).missing(LOW, 0, 1) == [(0, 1)]
        writer.add(LOW, make([1], cost=0.06))
        assert open_store(store.path).missing(LOW, 0, 2) == []
        writer.add(HIGH, make([0], HIGH))
        later = time.monotonic() + 0.6
        monkeypatch.setattr(writing.time, "monotonic", lambda: later)
        writer.tick()
        assert open_store(store.path).missing(HIGH, 0, 1) == []


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_leaving_in_a_hurry_writes_what_was_added(tmp_path, end):
    store = new(tmp_path)
    with pytest.raises(end), store.writing() as writer:  # noqa: PT012
        writer.add(LOW, make([0, 1]))
        raise end
    assert open_store(store.path).missing(LOW, 0, 3) == [(2, 3)]
    fill(store, (LOW, make([2])))  # the lock is free again


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
                        shards_module.read_records(path, *a, **k))
    assert len(store.failures()) == 1
    assert len(read) == 1


def test_replays_cost_and_are_remembered(tmp_path):
    store = fill(new(tmp_path), (LOW, make([0, 1])))
    assert not store.replayed(LOW)
    with store.writing() as writer:
        writer.add_replay(LOW, [0, 1], [[1], [1]], [[0.25], [0.5]])
    store = open_store(store.path)
    assert store.replayed(LOW)
    assert not store.replayed(HIGH)
    assert store.runs == (4, 0)
    assert store.seconds[0] == pytest.approx(make([0, 1]).seconds.sum() + 0.75)
    assert [part.tolist() for part in store.replays(LOW)] == [[2], [0.75]]
    assert store.missing(LOW, 0, 3) == [(2, 3)]
    assert store.data().runs == (4, 0)
    fill(store, (HIGH, make([0], HIGH)))
    before = store.data()
    store.compact()
    assert same(store.data(), before)
    assert store.replayed(LOW)


def test_what_was_spent(tmp_path):
    store = new(tmp_path, costs=[1.0, 10.0], row_costs=[1.0, 10.0])  # coarse halves come for free
    fill(store, (LOW, make(range(100))), (HIGH, make(range(20), HIGH)))
    assert store.spent() == 300.0
    assert store.spent("seconds") == pytest.approx(sum(store.seconds))
    assert store.costs == pytest.approx([s / n for s, n in zip(store.seconds, store.runs, strict=True)])
    with pytest.raises(ValueError, match="seconds"):
        create_store(tmp_path / "other", {}, ["low"], ["mu"]).spent()


def test_data_takes_what_training_can_use(tmp_path):
    test = Stream(1, TEST_STREAM, (1,))
    alone = Stream(3, JOINT_STREAM + 2, (1,))
    later = Stream(2, 0, (0,))
    store = fill(
        new(tmp_path), (later, make([1, 0], later)), (LOW, make([2, 3])), (LOW, make([0, 1, 5])),
        (HIGH, make([0], HIGH)), (HIGH, make([1], HIGH, status=3)), (PILOT, make([0, 1], PILOT)),
        (PILOT_LOW, make([0], PILOT_LOW)), (test, make([0], test)), (alone, make([0], alone)),
    )  # fmt: skip
    data = store.data()
    low = [make([0], PILOT_LOW), make([0, 1, 2, 3, 5]), make([0, 1], later)]
    high = [make([0, 1], PILOT), make([0], HIGH)]
    assert np.array_equal(data.levels[0].theta, np.concatenate([r.theta for r in low]))
    assert np.array_equal(data.levels[0].fine, np.concatenate([r.outputs[-1] for r in low]))
    assert np.array_equal(data.levels[1].fine, np.concatenate([r.outputs[-1] for r in high]))
    assert np.array_equal(data.levels[1].coarse, np.concatenate([r.outputs[-2] for r in high]))
    assert data.failures == (0, 1)
    assert data.runs == (1 + 5 + 2 + 2 + 2, 4)
    assert data.checked
    assert store.runs == (12, 6)
    assert store.data(seed=3).n == (1, 2)
    assert store.data(seed=1).n == (5, 1)
    assert sorted(torch.cat([b.theta for b in store.batches(0)])[:, 0]) == sorted(data.levels[0].theta[:, 0])
    store.compact()  # shards that interleave come one after the other; now they are in order
    for level in (0, 1):
        batches = list(store.batches(level))
        for part in ("theta", "fine", "coarse"):
            if getattr(data.levels[level], part) is not None:
                assert torch.equal(torch.cat([getattr(b, part) for b in batches]), getattr(data.levels[level], part))


@pytest.mark.parametrize(("dtype", "expected"), [(np.int64, torch.float32), (bool, torch.float32),
                                                 (np.float64, torch.float64), (np.float16, torch.float16)])
def test_dtypes_for_training(tmp_path, dtype, expected):
    store = fill(new(tmp_path), (LOW, make([0, 1], dtype=dtype)))
    assert store.data().levels[0].fine.dtype == expected
    assert next(store.read(LOW)).outputs[0].dtype == dtype
    assert next(store.batches(0)).fine.dtype == expected


def test_nothing_to_train_on_is_told(tmp_path):
    with pytest.raises(StoreError, match="no finished rows to train on yet"):
        new(tmp_path).data()
    with pytest.raises(StoreError, match="2 rows failed"):
        fill(open_store(tmp_path / "store"), (LOW, make([0, 1], status=1))).data()


TRIES = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 0, 1, 2])), min_size=1, max_size=25)


@settings(max_examples=40, deadline=None)
@given(TRIES, st.integers(1, 6), st.randoms(use_true_random=False), st.booleans())
def test_packaging_changes_nothing(tries, size, random, compact):
    # Every record is one try of one row; any cutting, order and repetition of them is the same store.
    tries = sorted(set(tries)) if (0, 0) in tries else [(0, 0), *sorted(set(tries))]
    shuffled = tries + random.choices(tries, k=5)
    random.shuffle(shuffled)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = (create_store(Path(folder) / name, {}, ["low", "high"], ["mu", "sigma"]) for name in "ab")
        fill(whole, *((HIGH, make([row], HIGH, status=status)) for row, status in tries))
        with cut.writing() as writer:
            for start in range(0, len(shuffled), size):
                for row, status in shuffled[start : start + size]:
                    writer.add(HIGH, make([row], HIGH, status=status))
                writer.flush()
        if compact:
            cut.compact()
        assert same(whole.data(), cut.data())
        assert whole.failed(HIGH) == cut.failed(HIGH)
        assert cut.data().n[1] == len({row for row, status in tries if status == OK})
        assert cut.runs[1] == len(set(tries))


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
    for part in ("test rows, seed 1: 1 rows of 10", "failed: 1 exception", "ValueError: negative rate"):
        assert part in text
    frame = store.to_frame()
    assert frame.loc["low", ["wanted", "done", "failed", "runs", "cost"]].tolist() == [100, 20, 1, 21, 21]
    assert "being written" not in str(store)
    assert repr(store).endswith("low: 20, high: 0)")


# Writers.


def test_a_second_writer_is_refused(tmp_path):
    store = new(tmp_path)
    with store.writing() as writer:
        writer.add(LOW, make([0]))
        me = f"being written by process {os.getpid()} on .* since"
        for other in (store, open_store(store.path)):
            with pytest.raises(StoreError, match=me), other.writing():
                pass
        code = ("import sys\nfrom mlsbi.simulation.store import *\n"
                "try:\n  with open_store(sys.argv[1]).writing(): pass\n"
                "except StoreError as error: print(error)")
        told = subprocess.run([sys.executable, "-c", code, str(store.path)], capture_output=True, text=True).stdout
        assert f"being written by process {os.getpid()}" in told
    assert store.data().n == (1, 0)


def test_threads_take_turns_or_are_refused_and_nothing_is_lost(tmp_path):
    store = new(tmp_path)
    refused = []

    def write(row):
        while True:
            try:
                fill(open_store(store.path), (LOW, make([row])))
                return
            except StoreError as error:
                refused.append(str(error))
                time.sleep(0.01)

    threads = [threading.Thread(target=write, args=[row]) for row in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.refresh()
    assert store.missing(LOW, 0, 6) == []
    assert all("is being written" in text for text in refused)


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


def test_a_forked_child_writes_nothing(tmp_path):
    store = new(tmp_path)
    with store.writing() as writer:
        writer.add(LOW, make([0]))

        def child():
            writer.close()
            with pytest.raises(StoreError, match="by the process that forked this one"):
                writer.add(LOW, make([1]))

        assert in_child(child) == 0
        assert open_store(store.path).shards == ()
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


def test_unfinished_files_of_killed_writers_are_removed(tmp_path):
    store = fill(new(tmp_path), (LOW, make([0])))
    for place in (store.path, store.rows):
        (place / ".tmp-elsewhere-1-0").write_bytes(b"half")
    assert open_store(store.path).data().n == (1, 0)
    fill(store)
    assert not list(store.path.rglob(".tmp-*"))


def test_without_locks_others_unfinished_files_are_left_alone(tmp_path, monkeypatch):
    store = new(tmp_path)
    (store.rows / ".tmp-elsewhere-1-0").write_bytes(b"half")
    monkeypatch.setattr("mlsbi.simulation.locking.fcntl", None)
    with pytest.warns(UserWarning, match="two writers"):
        fill(store, (LOW, make([0])))
    assert (store.rows / ".tmp-elsewhere-1-0").exists()
    assert store.data().n == (1, 0)


# Crashes: every file operation is the last one.


class Stop(BaseException):
    pass


OPERATIONS = [(builtins, "open"), (os, "open"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "mkdir")]


def stop_at(monkeypatch, k, how):
    """Makes the k-th file operation from now the last; returns a list with the number of operations so far."""
    count = [0]

    def wrap(operation):
        def wrapped(*args, **options):
            count[0] += 1
            if count[0] == k:
                how()
            return operation(*args, **options)

        return wrapped

    for owner, name in OPERATIONS:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    return count


def scenario(folder, done):
    """A small campaign with everything; rows are reported to `done` once they are promised to be safe."""
    try:
        store = open_store(folder / "store")
    except StoreError:
        store = new(folder)
    with store.writing() as writer:
        writer.set_target(LOW, 12)
        for rows in ([0, 1], [2], [1, 3], [8, 4]):
            writer.add(LOW, make(rows, cost=0.06))
            done(rows)
        writer.add(LOW, make([5], status=1, cost=0.06))
        writer.add_replay(LOW, [0], [[1]], [[0.5]])
        writer.add(LOW, make([6]))
        writer.add(HIGH, make([0], HIGH))
    done([6])
    store.compact()


def run_scenario(folder, monkeypatch, k, how, done):
    with monkeypatch.context() as patch:
        patch.setattr(repacking, "_MANY", 2)
        count = stop_at(patch, k, how)
        scenario(folder, done)
    return count[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        operations = run_scenario(folder, patch, 0, None, lambda rows: None)
    return open_store(folder / "store").data(), operations


def check_after_crash(folder, promised, whole):
    if (folder / "store" / "store.json").exists():
        store = open_store(folder / "store")
        assert not store.damaged
        assert store.verify() == ()
        assert set(promised) <= set(store.ok(LOW).indices().tolist())
        for records in store.read(LOW):
            assert np.array_equal(records.outputs[0], make(records.index).outputs[0])
    else:
        assert not promised
    scenario(folder, lambda rows: None)  # the same again repairs everything, and counts nothing twice
    assert same(open_store(folder / "store").data(), whole)
    assert not list((folder / "store").rglob(".tmp-*"))


def test_killed_at_any_operation(tmp_path, monkeypatch, whole):
    data, operations = whole
    assert operations > 60
    for k in range(1, operations + 1):
        folder = tmp_path / str(k)
        folder.mkdir()
        log = open(folder / "log", "ab", buffering=0)  # noqa: SIM115
        with log:
            def note(rows, log=log):
                log.write(bytes(rows))

            def child(folder=folder, k=k, note=note):
                run_scenario(folder, monkeypatch, k, lambda: os._exit(9), note)

            assert in_child(child) == 9
        check_after_crash(folder, (folder / "log").read_bytes(), data)


@pytest.mark.parametrize("error", [Stop, lambda: OSError(errno.EIO, "no such luck")], ids=["stopped", "failing"])
def test_an_error_in_any_operation(tmp_path, monkeypatch, whole, error):
    data, operations = whole

    def how():
        raise error()

    survived = 0
    for k in range(1, operations + 1):
        folder = tmp_path / str(k)
        folder.mkdir()
        promised: list[int] = []
        try:
            run_scenario(folder, monkeypatch, k, how, promised.extend)
            survived += 1
        except (Stop, OSError, StoreError):
            pass
        check_after_crash(folder, promised, data)
    assert survived < operations / 2


# Full disks.


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, monkeypatch):
    store = fill(new(tmp_path), (LOW, make([0])))
    full = [True]
    sync = os.fsync

    def fsync(descriptor):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with store.writing() as writer:
        monkeypatch.setattr(os, "fsync", fsync)
        for rows in ([1], [2]):
            with pytest.raises(StoreError, match=f"{re.escape(str(store.path))}.*no space left.*so far is safe"):
                writer.add(LOW, make(rows, cost=0.06))
        assert open_store(store.path).missing(LOW, 0, 3) == [(1, 3)]
        assert not list(store.path.rglob(".tmp-*"))
        full[0] = False
        writer.flush()
        assert open_store(store.path).missing(LOW, 0, 4) == [(3, 4)]
    assert store.runs == (3, 0)


def test_a_real_limit_on_files(tmp_path):
    store = fill(new(tmp_path), (LOW, make([0])))

    def child():
        with pytest.raises(StoreError, match="no space left"), store.writing() as writer:  # noqa: PT012
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
            writer.add(LOW, make([1], cost=0.06))
            with pytest.raises(StoreError, match="no space left"):
                writer.add(LOW, make([2], width=10000, cost=0.06))
            assert not list(store.path.rglob(".tmp-*"))

    assert in_child(child) == 0
    assert open_store(store.path).missing(LOW, 0, 3) == [(2, 3)]
    assert open_store(store.path).verify() == ()


# Damage.


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


# Making and opening.


def test_folders_that_are_no_store(tmp_path):
    with pytest.raises(StoreError, match="is no store"):
        open_store(tmp_path)
    with pytest.raises(StoreError, match="is no store"):
        open_store(tmp_path / "nowhere")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="thesis.tex"):
        new(tmp_path)
    assert os.listdir(tmp_path / "store") == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        create_store(tmp_path / "file", {}, ["low"], ["mu"])


def test_a_store_is_made_once(tmp_path):
    fill(new(tmp_path), (LOW, make([0])))
    with pytest.raises(StoreError, match="holds a store already"):
        new(tmp_path)
    (tmp_path / "store" / "store.json").unlink()
    with pytest.raises(StoreError, match="shards"):
        new(tmp_path)


def test_a_newer_layout_is_refused(tmp_path):
    manifest = new(tmp_path).manifest
    write_file(tmp_path / "store" / "store.json", json.dumps(manifest | {"layout": 2}).encode())
    with pytest.raises(StoreError, match="has layout 2; this version reads up to 1. Upgrade"):
        open_store(tmp_path / "store")
    write_file(tmp_path / "store" / "store.json", b'{"format": "other", "layout": 1}')
    with pytest.raises(StoreError, match="format 'other'"):
        open_store(tmp_path / "store")


def test_the_manifest_says_what_the_store_is_of(tmp_path):
    new(tmp_path, costs=[1.0, 2.0], row_costs=[1.0, 3.0])
    store = open_store(tmp_path / "store")
    assert (store.description, store.names, store.parameters) == ({"stack": "a"}, ("low", "high"), ("mu", "sigma"))
    assert store.manifest["costs"] == [1.0, 2.0]
    assert store.manifest["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize(
    ("records", "match"),
    [
        (make([-1]), "at least 0"),
        (make([0], HIGH), "runs and seconds"),
        (Records(np.arange(1), np.ones((1, 3)), (np.ones((1, 2)),), np.zeros(1), np.ones((1, 1)), np.ones((1, 1))),
         r"theta \(1, 2\)"),
        (Records(np.arange(1), np.ones((1, 2)), (), np.zeros(1), np.ones((1, 1)), np.ones((1, 1))), "finished rows"),
        (Records(np.arange(1), np.ones((1, 2)), (), np.full(1, 99), np.ones((1, 1)), np.ones((1, 1))), "statuses"),
        (make([0], cost=np.nan), "finite seconds"),
    ],
)
def test_records_that_do_not_fit_are_refused(tmp_path, records, match):
    with new(tmp_path).writing() as writer, pytest.raises(ValueError, match=match):
        writer.add(LOW, records)


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


def test_reading_needs_memory_for_two_shards(tmp_path):
    store = new(tmp_path)
    with store.writing() as writer:
        for part in range(20):
            writer.add(LOW, make(range(part * 4000, part * 4000 + 4000), width=1000))  # 16 MB each
    code = ("import resource, sys\nfrom mlsbi.simulation.store import open_store\n"
            "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
            "before = peak()\n"
            "rows = sum(len(batch) for batch in open_store(sys.argv[1]).batches(0))\n"
            "print(rows, peak() - before)")
    out = subprocess.run([sys.executable, "-c", code, str(store.path)], capture_output=True, text=True, check=True)
    rows, megabytes = map(int, out.stdout.split())
    assert rows == 80000
    assert megabytes < 80
