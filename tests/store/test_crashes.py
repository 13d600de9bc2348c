r"""Crashes: every file operation is the last one, and nothing that was promised is lost."""

import builtins
import errno
import os

import numpy as np
import pytest
from stores import HIGH, LOW, in_child, make, new, same

from mlsbi.store import repacking
from mlsbi.store.store import StoreError, open_store


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


@pytest.mark.parametrize("error", [pytest.param(Stop, marks=pytest.mark.slow),
                                   lambda: OSError(errno.EIO, "no such luck")], ids=["stopped", "failing"])
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
