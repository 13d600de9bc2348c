r"""Benchmark tasks: level stacks or published data, with budgets, references and known numbers."""

from typing import TYPE_CHECKING, Any

from mlsbi.tasks.registry import get, names

if TYPE_CHECKING:
    from mlsbi.tasks.task import Likelihood, Reference, Task

__all__ = ["Likelihood", "Reference", "Task", "get", "names"]


def __getattr__(name: str) -> Any:
    if name in ("Likelihood", "Reference", "Task"):  # they pull in torch, which listing the tasks does not need
        from mlsbi.tasks import task

        return getattr(task, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
