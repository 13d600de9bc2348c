r"""Memory that a training frees and needs again in the next step, kept from going back and forth to the system.

Steps make many arrays of a few megabytes. By its defaults glibc returns such memory at once and has it cleared anew,
which takes up to a third of a step's time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator
from typing import Any

__all__ = ["kept_memory"]

_TRIM, _PAD, _MMAP = -1, -2, -3  # parameters of mallopt
_SMALL = 32 << 20  # bytes up to which arrays come from the heap, the most that glibc allows
_KEPT = 256 << 20  # bytes of the heap's end that may be free
_AHEAD = 64 << 20  # bytes by which the heap grows at least
_USUAL_AHEAD = 128 << 10


@functools.cache
def _glibc() -> Any:
    if platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keeps freed memory for reuse, and gives it back at the end. Does nothing where the C library is not glibc.

    Afterwards thresholds are those to which glibc raises its own ones as large arrays come and go.
    """
    library = _glibc()
    if library is None:
        yield
        return
    for parameter, value in ((_MMAP, _SMALL), (_TRIM, _KEPT), (_PAD, _AHEAD)):
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        library.mallopt(_TRIM, 2 * _SMALL)
        library.mallopt(_PAD, _USUAL_AHEAD)
        library.malloc_trim(0)
