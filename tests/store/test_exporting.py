import json
import sys

import numpy as np
import pytest

from mlsbi.store.exporting import export_store
from mlsbi.store.records import Records, Stream
from mlsbi.store.store import StoreError, create_store

h5py = pytest.importorskip("h5py")

LOW, HIGH = Stream(1, 0, (0,)), Stream(1, 1, (0, 1))


def make(index, stream=LOW, *, status=0, dtype=np.int32):
    index = np.asarray(index, np.int64)
    shape = (len(index), len(stream.levels))
    outputs = tuple(((index[:, None, None] + level) * np.ones((2, 3))).astype(dtype) for level in stream.levels)
    return Records(index, index[:, None] / 7, outputs if status == 0 else (), np.full(len(index), status, np.uint8),
                   np.ones(shape, np.int64), np.ones(shape) / 1000, {0: "schön kaputt"} if status else {})


@pytest.fixture
def store(tmp_path):
    store = create_store(tmp_path / "store", {"stack": "ä"}, ["low", "high"], ["mu"])
    with store.writing() as writer:
        for stream, records in [(LOW, make([0, 1])), (LOW, make([2, 9])), (HIGH, make([0, 1], HIGH)),
                                (HIGH, make([4], HIGH, status=2))]:
            writer.add(stream, records)
            writer.flush()
    return store


@pytest.mark.parametrize("suffix", [".h5", ".hdf5"])
def test_a_file_holds_what_the_store_does(tmp_path, store, suffix):
    path = export_store(store, tmp_path / f"out{suffix}")
    data = store.data()
    with h5py.File(path) as file:
        for level in (0, 1):
            group = file[f"level_{level}"]
            assert group.attrs["name"] == store.names[level]
            assert group["fine"].dtype == np.int32
            assert np.array_equal(group["theta"][:], data.levels[level].theta.numpy())
            assert np.array_equal(group["fine"][:], data.levels[level].fine.numpy())
        assert "coarse" not in file["level_0"]
        assert np.array_equal(file["level_1"]["coarse"][:], data.levels[1].coarse.numpy())
        assert tuple(file.attrs["runs"]) == store.runs
        assert list(file.attrs["parameters"]) == ["mu"]
        assert json.loads(file.attrs["manifest"])["description"] == {"stack": "ä"}
        assert file["failures"]["index"][:].tolist() == [4]
        assert file["failures"]["message"].asstr()[0] == "schön kaputt"
    assert not list(tmp_path.glob(".tmp-*"))


def test_refusals(tmp_path, store):
    with pytest.raises(StoreError, match=r"\.h5 or \.hdf5; got out\.zarr"):
        export_store(store, tmp_path / "out.zarr")
    (tmp_path / "old.h5").write_text("precious")
    with pytest.raises(StoreError, match="exists already"):
        export_store(store, tmp_path / "old.h5")
    empty = create_store(tmp_path / "empty", {}, ["low"], ["mu"])
    with pytest.raises(StoreError, match="no finished rows"):
        export_store(empty, tmp_path / "out.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old.h5", "store"]


def test_two_dtypes_of_one_level_are_refused(tmp_path, store):
    with store.writing() as writer:
        writer.add(LOW, make([20], dtype=np.float64))
    with pytest.raises(StoreError, match="int32 .* float64"):
        export_store(store, tmp_path / "out.h5")
    assert store.data().levels[0].fine.dtype.is_floating_point


def test_without_h5py_the_extra_is_named(tmp_path, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"mlsbi\[hdf5\]"):
        export_store(store, tmp_path / "out.h5")
