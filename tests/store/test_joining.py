import numpy as np
from stores import HIGH, make

from mlsbi.store.joining import join, split


def test_failed_rows_join_finished_ones_and_keep_their_messages():
    joined, = join([make([4], HIGH, status=1, message="boom"), make([3, 5], HIGH)])
    assert joined.index.tolist() == [3, 4, 5]
    assert joined.messages == {1: "boom"}
    assert np.isnan(joined.outputs[0][1]).all()
    assert not np.isnan(joined.outputs[0][[0, 2]]).any()
    integers, = join([make([4], HIGH, status=1), make([3], HIGH, dtype=np.int64)])
    assert integers.outputs[0].dtype == np.int64
    assert (integers.outputs[0][1] == 0).all()


def test_joining_drops_repetitions_but_no_second_try():
    once = join([make([1, 2]), make([2, 3])])[0]
    assert once.index.tolist() == [1, 2, 3]
    tries = join([make([1], status=1), make([1], cost=0.5), make([1])])[0]
    assert tries.index.tolist() == [1, 1, 1]
    assert tries.status.tolist() == [0, 0, 1]


def test_other_dtypes_and_shapes_stay_apart():
    assert len(join([make([1]), make([2], dtype=float), make([3], width=4)])) == 3


def test_splitting_keeps_rows_and_the_limit():
    records = make(range(100), width=10)
    pieces = split(records, largest=1000)
    assert all(piece.nbytes <= 1000 for piece in pieces)
    assert len(pieces) < 20
    assert np.array_equal(np.concatenate([piece.index for piece in pieces]), records.index)
    assert len(split(records, largest=1)) == 100
