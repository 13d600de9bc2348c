import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mlsbi.store.records import Records, Stream
from mlsbi.store.shards import DamagedShardError, Replay, encode, read_meta, read_records

STREAM = Stream(7, 1, (0, 1))


def make(index, *, status=0, dtype=np.float32, shape=(3,), seconds=0.25, message=None, noise_seed=False):
    index = np.asarray(index, np.int64)
    n = len(index)
    outputs = tuple((index.reshape(-1, *(1,) * len(shape)) * np.ones(shape) + level).astype(dtype) for level in (0, 1))
    return Records(
        index, np.stack([index, -index], 1).astype(np.float32), outputs if status == 0 else (),
        np.full(n, status, np.uint8), np.ones((n, 2), np.int64), np.full((n, 2), seconds),
        dict.fromkeys(range(n), message) if message else {}, index * 3 if noise_seed else None,
    )


def put(folder, records, stream=STREAM) -> Path:
    shard, data = encode(stream, records)
    (folder / shard.name).write_bytes(data)
    return folder / shard.name


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8, bool])
@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_records_come_back_as_they_were(tmp_path, dtype, shape):
    records = make([3, 4, 9], dtype=dtype, shape=shape, noise_seed=True)
    path = put(tmp_path, records)
    shard = read_meta(path)
    back = read_records(path, shard)
    assert (shard.stream, shard.records, list(shard.ok)) == (STREAM, 3, [(3, 5), (9, 10)])
    assert shard.runs == (3, 3)
    assert shard.seconds == (0.75, 0.75)
    for name in ("index", "theta", "status", "runs", "seconds", "noise_seed"):
        assert np.array_equal(getattr(back, name), getattr(records, name))
        assert getattr(back, name).dtype == getattr(records, name).dtype
    for a, b in zip(back.outputs, records.outputs, strict=True):
        assert np.array_equal(a, b)
        assert a.dtype == dtype


def test_what_is_known_in_memory_is_what_the_file_says(tmp_path):
    for content in (make([1, 2]), make([5], status=2, message="too late"),
                    Replay(np.arange(2), np.ones((2, 2), int), np.ones((2, 2)))):
        shard, data = encode(STREAM, content)
        (tmp_path / shard.name).write_bytes(data)
        read = read_meta(tmp_path / shard.name)
        assert read == shard


def test_the_same_content_has_the_same_name_and_another_one_another():
    assert encode(STREAM, make([1]))[0].name == encode(STREAM, make([1]))[0].name
    names = {encode(STREAM, records)[0].name for records in (make([1]), make([1], seconds=0.5), make([1], dtype=float))}
    assert len(names) == 3
    assert encode(STREAM, make([2, 5]))[0].name.startswith("1-7-0+1-2-5-")


def test_names_stay_short():
    stream = Stream(10**80, 1, tuple(range(200)))
    each = np.ones((1, 200), int)
    records = Records(np.arange(1), np.ones((1, 1)), (), np.ones(1, np.uint8), each, each)
    name = encode(stream, records)[0].name
    assert len(name) < 120
    assert name != encode(Stream(10**80 + 1, 1, tuple(range(200))), records)[0].name


def test_a_long_seed_comes_back(tmp_path):
    path = put(tmp_path, make([0]), Stream(10**80, 1, (0, 1)))
    assert read_meta(path).stream.seed == 10**80


def rename_to_content(path: Path, data: bytes) -> Path:
    """A file whose name's hash is right, as an attacker would make it."""
    new = path.with_name(path.name[:-24] + hashlib.sha256(data).hexdigest()[:20] + ".npz")
    new.write_bytes(data)
    return new


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("member", ["meta", "index", "status", "theta", "output_0", "messages"])
def test_pickles_are_refused_and_never_run(tmp_path, member):
    path = put(tmp_path, make([0, 1]))
    with np.load(path) as file:
        arrays = dict(file)
    trap = np.empty(2, object)
    trap[:] = Trap(tmp_path / "sprung")
    arrays[member] = trap
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    evil = rename_to_content(path, buffer.getvalue())
    with pytest.raises(DamagedShardError, match="rows 0 to 1 of stream 1"):
        read_records(evil, read_meta(evil))
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()  # the trap works


def test_every_truncation_is_found_on_opening(tmp_path):
    path = put(tmp_path, make([0, 1]))
    data = path.read_bytes()
    for size in [*range(0, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(DamagedShardError, match="is damaged"):
            read_meta(path)


def test_every_flipped_byte_is_found_on_reading(tmp_path):
    path = put(tmp_path, make([0, 1]))
    data = path.read_bytes()
    shard = read_meta(path)
    read_records(path, shard)
    for at in range(0, len(data), 61):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(DamagedShardError):
            read_records(path, shard)


@pytest.mark.parametrize("name", ["other rows", "other stream", "no shard", "no meta", "no zip"])
def test_a_file_that_is_not_the_one_of_its_name_is_refused_on_opening(tmp_path, name):
    path = put(tmp_path, make([0, 1]))
    if name == "other rows":
        path.write_bytes(encode(STREAM, make([5, 6]))[1])
    elif name == "other stream":
        path.write_bytes(encode(Stream(8, 1, (0, 1)), make([0, 1]))[1])
    elif name == "no shard":
        np.savez(path, x=np.ones(3))
    elif name == "no meta":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("meta.npy", b"nonsense")
    else:
        path.write_bytes(b"text")
    with pytest.raises(DamagedShardError, match="It held rows 0 to 1 of stream 1"):
        read_meta(path)
