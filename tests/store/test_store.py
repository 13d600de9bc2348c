import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import HIGH, LOW, fill, make, new, same

from mlsbi.store.records import OK, Stream
from mlsbi.store.store import create_store, open_store

TRIES = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 0, 1, 2])), min_size=1, max_size=25)


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
