r"""Where simulations run: in this process, on processes of this machine, or through any executor."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from types import SimpleNamespace
from typing import Any

__all__ = ["SerialExecutor", "Workers", "open_workers", "worker_died"]

_UNKNOWN_WIDTH = 8
_WIDTH_AGE = 5.0  # seconds after which a cluster is asked again how many workers it has
_PARENT_AGE = 1.0  # seconds after which a worker looks again whether its campaign still lives


class SerialExecutor(Executor):
    """Runs every call at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Runs the call and returns its finished future; an exception is raised here, not later."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Workers:
    r"""An executor that starts when it is first needed, knows its width and can be made anew when it broke.

    Args:
        make: Makes an executor.
        renewable: Whether `make` may be called again after a worker died.
        owned: Whether the executor is ours to shut down.
    """

    def __init__(self, make: Callable[[], Executor], *, renewable: bool, owned: bool) -> None:
        self._make, self.renewable, self._owned = make, renewable, owned
        self._pool: Executor | None = None
        self._width = -math.inf, 1  # when it was asked for, and the answer

    @property
    def pool(self) -> Executor:
        """The executor, started now if it was not."""
        if self._pool is None:
            self._pool = self._make()
        return self._pool

    @property
    def serial(self) -> bool:
        """Whether calls run in this thread, one after the other."""
        return isinstance(self.pool, SerialExecutor)

    @property
    def width(self) -> int:
        """How many calls run at a time, as far as that is known."""
        if self.serial:
            return 1
        now = time.monotonic()
        if now - self._width[0] > _WIDTH_AGE:
            self._width = now, max(1, _width_of(self.pool))
        return self._width[1]

    @property
    def deserted(self) -> bool:
        """Whether a cluster has no worker at all just now."""
        client = getattr(self.pool, "_client", None)
        return client is not None and hasattr(client, "nthreads") and not client.nthreads()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As an executor's."""
        return self.pool.submit(fn, *args, **kwargs)

    def renew(self) -> None:
        """Makes a new executor in place of one whose worker died."""
        self.stop()

    def stop(self) -> None:
        """Ends an executor of ours without waiting for what it runs; another one is left to its owner."""
        pool, self._pool = self._pool, None
        if pool is None or not self._owned:
            return
        # Loky can kill its workers, the standard library cancel what has not begun; Dask's cancels everything.
        for options in ({"kill_workers": True}, {"cancel_futures": True}, {}):
            try:
                pool.shutdown(wait="kill_workers" in options, **options)  # killed ones are soon waited for
            except TypeError:
                continue
            except Exception:  # noqa: BLE001, S110  # gone already, with its cluster; that error is on its way
                pass
            return

    def close(self) -> None:
        """Shuts an executor of ours down, which has nothing left to do."""
        pool, self._pool = self._pool, None
        if pool is not None and self._owned:
            pool.shutdown()


@contextlib.contextmanager
def open_workers(executor: Any, workers: int) -> Iterator[Workers]:
    r"""Gives the means to run simulations.

    Args:
        executor: A `concurrent.futures.Executor`; a function that makes one, which is called again when a worker died;
            a `dask.distributed.Client`; or `None`.
        workers: Processes on this machine, when no executor is given.

    Raises:
        ValueError: If both an executor and workers are given, or workers is not positive.
        TypeError: If the executor is none.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"Expected workers >= 1; got {workers}.")
    if executor is not None and workers > 1:
        raise ValueError("Expected an executor or workers, not both: the executor decides how many workers it has.")
    pool = _workers_of(executor, workers)
    try:
        yield pool
    except BaseException:
        pool.stop()
        raise
    pool.close()


def worker_died(error: BaseException) -> bool:
    """Whether a call failed because the process that ran it is gone."""
    # Dask gives up on a task after several workers died of it; loky's pool breaks, too, at what it cannot unpickle.
    return type(error).__name__ == "KilledWorker" or isinstance(error, BrokenExecutor) and "serialize" not in str(error)


def _workers_of(executor: Any, workers: int) -> Workers:
    if executor is None:
        return Workers(SerialExecutor if workers == 1 else lambda: _loky(workers), renewable=True, owned=True)
    if isinstance(executor, Executor):
        return Workers(lambda: executor, renewable=False, owned=False)
    if hasattr(executor, "get_executor"):  # Dask's client
        return Workers(lambda: executor.get_executor(pure=False), renewable=True, owned=True)
    if not callable(executor):
        raise TypeError("Expected a concurrent.futures.Executor, a function that makes one, or a dask.distributed "
                        f"Client; got {type(executor).__name__}.")
    return Workers(executor, renewable=True, owned=True)


def _loky(workers: int) -> Executor:
    from loky import ProcessPoolExecutor

    return ProcessPoolExecutor(max_workers=workers, initializer=_end_with, initargs=(os.getpid(),))


def _end_with(parent: int) -> None:
    """Has a worker end when its campaign was killed: nothing else would tell it, and it would wait for ever."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    from loky.backend.utils import kill_process_tree

    while os.getppid() == parent:
        time.sleep(_PARENT_AGE)
    # Programs that it runs go first; loky wants something like a process.
    kill_process_tree(SimpleNamespace(pid=os.getpid(), kill=lambda: os._exit(1), join=lambda: os._exit(1)))


def _width_of(pool: Executor) -> int:
    client = getattr(pool, "_client", None)
    if client is not None and hasattr(client, "nthreads"):
        try:
            now = sum(client.nthreads().values())
        except Exception:  # noqa: BLE001  # the cluster is gone, as what is submitted next will tell
            return 1
        # A cluster that adapts starts no more workers than there are calls waiting.
        most = getattr(getattr(getattr(client, "cluster", None), "_adaptive", None), "maximum", math.inf)
        return max(now, int(most)) if math.isfinite(most) else now
    return int(getattr(pool, "_max_workers", None) or _UNKNOWN_WIDTH)
