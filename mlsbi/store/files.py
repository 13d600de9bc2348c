r"""Files that are there whole, for good, or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlsbi.store.locking import is_alive

__all__ = ["TEMPORARY", "StoreError", "list_names", "remove_unfinished", "sync_folder", "write_file"]

TEMPORARY = ".tmp-"
"""How names of unfinished files begin."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_counter = itertools.count()


class StoreError(ValueError):
    """A store cannot do what was asked; the message says what to do."""

    data: Any = None
    """What a campaign finished before its disk was full, for `simulate(..., reuse=error.data)`."""


def write_file(path: Path, data: bytes) -> None:
    r"""Writes a file so that it is there whole, for good, or not at all.

    Raises:
        StoreError: If the disk is full or cannot be written; the unfinished file is removed.
    """
    partial = path.parent / f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{next(_counter)}"
    try:
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        sync_folder(path.parent)
    except OSError as error:
        what = f"{error}. See to it that the folder can be written"
        if error.errno in _DISK_FULL:
            what = f"there is no space left for {len(data)} bytes ({error.strerror}). Free some"
        raise StoreError(f"{path.parent}: {what} and call again; everything written so far is safe.") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that need no such thing
            raise
    finally:
        os.close(descriptor)


def remove_unfinished(folders: Sequence[Path], *, alone: bool) -> None:
    """Removes files that a killed writer did not finish; unless `alone`, only those of dead processes of this host."""
    mine = f"{TEMPORARY}{socket.gethostname()}-"
    for folder in folders:
        for path in folder.glob(f"{TEMPORARY}*"):
            pid = path.name.removeprefix(mine).split("-")[0]
            dead = path.name.startswith(mine) and pid.isdigit() and not is_alive(int(pid))
            if alone or dead:
                path.unlink(missing_ok=True)


def list_names(folder: Path, *, suffix: str) -> set[str]:
    """Names in a folder at one moment: a listing during which it changed may miss a file and its replacement."""
    for _ in range(20):
        before = os.stat(folder).st_mtime_ns
        names = {entry.name for entry in os.scandir(folder) if entry.name.endswith(suffix)}
        if os.stat(folder).st_mtime_ns == before:
            break
    return names
