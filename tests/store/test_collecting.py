import numpy as np
import pytest
import torch
from stores import HIGH, LOW, fill, make, new

from mlsbi.store.records import JOINT_STREAM, TEST_STREAM, Stream
from mlsbi.store.store import StoreError, open_store

PILOT, PILOT_LOW = Stream(3, JOINT_STREAM, (0, 1)), Stream(3, JOINT_STREAM + 1, (0,))


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
