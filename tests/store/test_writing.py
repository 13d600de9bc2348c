import errno
import os
import re
import resource
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from stores import HIGH, LOW, fill, in_child, make, new

from mlsbi.store import writing
from mlsbi.store.records import Records
from mlsbi.store.store import StoreError, open_store


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


def test_a_second_writer_is_refused(tmp_path):
    store = new(tmp_path)
    with store.writing() as writer:
        writer.add(LOW, make([0]))
        me = f"being written by process {os.getpid()} on .* since"
        for other in (store, open_store(store.path)):
            with pytest.raises(StoreError, match=me), other.writing():
                pass
        code = ("import sys\nfrom mlsbi.store.store import *\n"
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
    monkeypatch.setattr("mlsbi.store.locking.fcntl", None)
    with pytest.warns(UserWarning, match="two writers"):
        fill(store, (LOW, make([0])))
    assert (store.rows / ".tmp-elsewhere-1-0").exists()
    assert store.data().n == (1, 0)


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
