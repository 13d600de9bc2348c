r"""Where simulations run: in this process, or through any `concurrent.futures.Executor`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

__all__ = ["SerialExecutor", "open_executor"]


class SerialExecutor(Executor):
    """Runs every call at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Runs the call and returns its finished future; an exception is raised here, not later."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextlib.contextmanager
def open_executor(executor: Executor | None, workers: int) -> Iterator[Executor]:
    """Gives the caller's executor, a pool of `workers` processes, or this process.

    Raises:
        ValueError: If both an executor and workers are given, or workers is not positive.
    """
    if workers < 1:
        raise ValueError(f"Expected workers >= 1; got {workers}.")
    if executor is not None and workers > 1:
        raise ValueError("Expected an executor or workers, not both: the executor decides how many workers it has.")
    if executor is not None:
        yield executor
    elif workers == 1:
        yield SerialExecutor()
    else:
        from loky import ProcessPoolExecutor

        with ProcessPoolExecutor(max_workers=workers) as pool:
            yield pool
