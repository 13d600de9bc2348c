r"""A store's rows as one HDF5 file, for programs other than this one."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np

from mlsbi.store.files import TEMPORARY
from mlsbi.store.store import Store, StoreError

__all__ = ["export_store"]

_CHUNK = 1 << 20  # bytes


def export_store(store: Store, path: str | os.PathLike[str], *, seed: int | None = None) -> Path:
    r"""Writes the rows of `Store.data` to an HDF5 file, one group per level, without holding them in memory.

    Each level's group has `theta`, `fine` and, above level 0, `coarse`, in the dtype that the simulators gave. The
    group `failures` has one dataset per column of `Store.failures`.

    Args:
        store: Which store.
        path: A new file, `.h5` or `.hdf5`.
        seed: Only streams of this seed; all when left out.

    Returns:
        The file's path.

    Raises:
        ImportError: If h5py is not installed.
        StoreError: If the suffix is another, the file exists, a shard is damaged, or there are no rows.
    """
    target = Path(path)
    if target.suffix not in (".h5", ".hdf5"):
        raise StoreError(f"Expected a file name that ends in .h5 or .hdf5; got {target.name}.")
    if target.exists():
        raise StoreError(f"{target} exists already. Choose another name, or remove it first.")
    try:
        import h5py
    except ImportError as error:
        raise ImportError("Writing HDF5 needs h5py. Install it with: pip install 'mlsbi[hdf5]'.") from error
    partial = target.with_name(f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{target.name}")
    try:
        with h5py.File(partial, "w") as file:
            _write(file, store, seed)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _write(file: Any, store: Store, seed: int | None) -> None:
    file.attrs["names"], file.attrs["parameters"] = list(store.names), list(store.parameters)
    file.attrs["runs"], file.attrs["seconds"] = store.runs, store.seconds  # of everything in the store
    file.attrs["manifest"] = json.dumps(store.manifest)
    total = 0
    for level, name in enumerate(store.names):
        group = file.create_group(f"level_{level}")
        group.attrs["name"] = name
        for arrays in store.term_records(level, seed):
            total += len(arrays[0])
            for key, array in zip(("theta", "fine", "coarse"), arrays, strict=False):
                if array is not None:
                    _append(group, key, array)
    if not total:
        raise StoreError(f"{store.path} holds no finished rows to export yet.")
    failures = file.create_group("failures")
    frame = store.failures()
    frame = frame if seed is None else frame[frame["seed"] == seed]
    for column in frame.columns:
        values = frame[column].to_numpy()
        if values.dtype.kind == "O":
            import h5py

            failures.create_dataset(column, data=[str(value) for value in values], dtype=h5py.string_dtype())
        else:
            failures.create_dataset(column, data=values)


def _append(group: Any, key: str, array: np.ndarray[Any, Any]) -> None:
    if key not in group:
        row = max(1, array[:1].nbytes)
        chunk = (max(1, min(_CHUNK // row, 65536)), *array.shape[1:])
        group.create_dataset(key, data=array, maxshape=(None, *array.shape[1:]), chunks=chunk)
        return
    dataset = group[key]
    if dataset.dtype != array.dtype or dataset.shape[1:] != array.shape[1:]:
        raise StoreError(f"{group.name}: {key} has rows of {dataset.dtype} {dataset.shape[1:]} and of {array.dtype} "
                         f"{array.shape[1:]}; one dataset cannot hold both. Read them with Store.data.")
    dataset.resize(len(dataset) + len(array), axis=0)
    dataset[-len(array) :] = array
