r"""What a store says of itself: which stack its rows are of, and how many rows of each stream were asked for."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlsbi.store.files import TEMPORARY, StoreError, remove_unfinished, write_file
from mlsbi.store.locking import LockHeldError, locked
from mlsbi.store.records import Stream

__all__ = ["make_folder", "read_manifest", "read_targets", "write_targets"]

_LAYOUT = 1
_FORMAT = "mlsbi store"


def read_manifest(folder: Path) -> dict[str, Any]:
    r"""What `store.json` says.

    Raises:
        StoreError: If the folder is no store, or was written by a newer version.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "store.json").read_bytes())
        known = manifest["format"] == _FORMAT
        layout = int(manifest["layout"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder} is no store of simulations: its store.json cannot be read ({error}).") from error
    if not known:
        raise StoreError(f"{folder} is no store of simulations: store.json has the format {manifest['format']!r}.")
    if layout > _LAYOUT:
        raise StoreError(f"{folder} has layout {layout}; this version reads up to {_LAYOUT}. Upgrade mlsbi to read it.")
    return manifest


def make_folder(folder: Path, content: Mapping[str, Any]) -> None:
    r"""Makes a folder an empty store.

    Args:
        folder: Made if need be.
        content: What `store.json` says besides layout, time and versions.

    Raises:
        StoreError: If the folder holds a store, or anything else, already.
    """
    _check_fresh(folder)
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    manifest = {"format": _FORMAT, "layout": _LAYOUT, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "versions": _find_versions(), **content}
    text = json.dumps(manifest, indent=1).encode()
    try:
        with locked(folder / "lock") as alone:
            remove_unfinished([folder], alone=alone)
            _check_fresh(folder)
            write_file(folder / "store.json", text)  # the folder becomes a store with this
    except LockHeldError as error:
        raise StoreError(f"{folder} is being made a store by {error.holder or 'another process'}.") from error


def read_targets(folder: Path) -> dict[Stream, int]:
    r"""Rows of each stream that campaigns asked for.

    Raises:
        StoreError: If `targets.json` cannot be understood.
    """
    path = folder / "targets.json"
    try:
        lines = json.loads(path.read_bytes())
        return {Stream(line["seed"], line["number"], tuple(line["levels"])): int(line["rows"]) for line in lines}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}). Delete it: it only says how many rows were asked for."
                         ) from error


def write_targets(folder: Path, targets: Mapping[Stream, int]) -> None:
    """Writes what `read_targets` reads."""
    lines = [{"seed": stream.seed, "number": stream.number, "levels": list(stream.levels), "rows": rows}
             for stream, rows in sorted(targets.items())]
    write_file(folder / "targets.json", json.dumps(lines, indent=1).encode())


def _check_fresh(folder: Path) -> None:
    if (folder / "store.json").exists():
        raise StoreError(f"{folder} holds a store already. Open it with open_store, or choose another folder.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StoreError(f"Expected a folder for a store; {folder} is a file.")
    others = sorted(entry.name for entry in folder.iterdir()
                    if entry.name not in ("rows", "lock") and not entry.name.startswith(TEMPORARY))
    if others or any((folder / "rows").glob("*.npz")):
        raise StoreError(f"Expected an empty or new folder for a store; {folder} holds {others[:5] or 'shards'} and no "
                         "store.json. Choose another folder.")


def _find_versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "numpy": np.__version__, "torch": str(torch.__version__)}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["mlsbi"] = importlib.metadata.version("mlsbi")
    return found
