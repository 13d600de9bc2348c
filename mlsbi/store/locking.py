r"""One writer per folder: a lock that the kernel releases when its process dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

__all__ = ["Holder", "LockHeldError", "find_holder", "is_alive", "locked"]

_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)
_TRIES, _PAUSE = 10, 0.02  # a look at the lock holds it for an instant; a writer steps over that

_guard = threading.Lock()  # closing any descriptor of a file drops the process's lock on it: no look while taking


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Args:
        host: Machine.
        pid: Process.
        since: When it was taken, local time.
    """

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


_held: dict[str, Holder] = {}  # locks of this process, by real path; a forked child inherits these lines, not the locks


class LockHeldError(RuntimeError):
    """Another writer holds the lock.

    Args:
        message: What to tell.
        holder: Who it is, as far as known.
    """

    def __init__(self, message: str, holder: Holder | None = None) -> None:
        super().__init__(message)
        self.holder = holder

    def __reduce__(self) -> tuple[type[LockHeldError], tuple[str, Holder | None]]:
        return type(self), (str(self), self.holder)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[bool]:
    r"""Holds the lock on a file, made if need be, for as long as the context lasts.

    The lock belongs to this process: threads of it are kept apart too, and forked children do not hold it. The file
    stays behind when the lock is released or its process is killed; only the kernel's lock counts.

    Args:
        path: The lock's file; its content names the holder.

    Returns:
        Whether writers are really kept apart: `False`, with a warning, where the file system has no locks.

    Raises:
        LockHeldError: If somebody else, or this process, holds it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with locked(folder + "/lock") as kept_apart:
        ...         print(kept_apart, find_holder(folder + "/lock").pid == os.getpid())
        ...     print(find_holder(folder + "/lock"))
        True True
        None
    """
    key = os.path.realpath(path)
    me = Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
    with _guard:
        if _is_mine(key):
            raise LockHeldError(f"{path} is held by this process already, since {_held[key].since}.", _held[key])
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            kept_apart = _take(descriptor, path)
            with contextlib.suppress(OSError):  # on a full disk; the name is a courtesy
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(asdict(me)).encode())
        except BaseException:
            os.close(descriptor)
            raise
        _held[key] = me
    try:
        yield kept_apart
    finally:
        with _guard:
            if _held.get(key) is me and _is_mine(key):
                del _held[key]
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)
            os.close(descriptor)


def find_holder(path: str | os.PathLike[str]) -> Holder | None:
    """Who holds the lock on a file now; `None` where nobody does, or where that cannot be told."""
    key = os.path.realpath(path)
    with _guard:
        if _is_mine(key):
            return _held[key]
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            return None
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_ELSEWHERE:
                return _parse_holder(os.read(descriptor, 1024)) or Holder("another machine", 0, "an unknown time")
        finally:
            os.close(descriptor)
    return None


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    if os.name != "posix":
        return True  # cannot be asked harmlessly
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _is_mine(key: str) -> bool:
    return key in _held and _held[key].pid == os.getpid()


def _take(descriptor: int, path: str | os.PathLike[str]) -> bool:
    why = "this system has no file locks"
    for remaining in reversed(range(_TRIES if fcntl is not None else 0)):
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD_ELSEWHERE:
                why = f"its file system has no locks ({error.strerror})"
                break
            if not remaining:
                holder = _parse_holder(os.read(descriptor, 1024))
                raise LockHeldError(f"{path} is held by {holder or 'another process'}.", holder) from None
            time.sleep(_PAUSE)
        else:
            return True
    warnings.warn(f"{path}: {why}, so two writers would not be kept apart. They would repeat work, but spoil nothing. "
                  "See to it that only one runs.", stacklevel=4)
    return False


def _parse_holder(content: bytes) -> Holder | None:
    try:
        found = json.loads(content)
        return Holder(str(found["host"]), int(found["pid"]), str(found["since"]))
    except (ValueError, KeyError, TypeError):
        return None


def _after_fork() -> None:
    """Another thread of the parent may have been at the guard; its copy here would never open."""
    global _guard
    _guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
