r"""Tasks by name. Adding one takes a module with a `build(**options) -> Task`, and one line here."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlsbi.tasks.task import Task

__all__ = ["get", "names"]

_MODULES = {
    "ou": "mlsbi.tasks.ou",
    "camels": "mlsbi.tasks.camels",
    "g_and_k": "mlsbi.tasks.g_and_k",
    "toggle_switch": "mlsbi.tasks.toggle_switch",
    "ou2": "mlsbi.tasks.ou2",
}


def names() -> tuple[str, ...]:
    """Names that `get` takes.

    Example:
        >>> "ou" in names()
        True
    """
    return tuple(_MODULES)


def get(name: str, **options: Any) -> Task:
    r"""Builds a task.

    Args:
        name: One of `names()`.
        **options: The task's own options, documented at `build` in its module.

    Raises:
        ValueError: If there is no such task, or an option's value is not accepted.
        TypeError: If the task has no such option.
        FileNotFoundError: If the task reads data that is not there.

    Example:
        >>> get("ou", parameters=4).prior
        BoxPrior(gamma in [0.5, 1.5], mu in [0.1, 3], sigma in [0.1, 0.6], x_0 in [0, 4])
    """
    if name not in _MODULES:
        raise ValueError(f"Expected a task out of {', '.join(_MODULES)}; got {name!r}.")
    build = importlib.import_module(_MODULES[name]).build
    accepted = list(inspect.signature(build).parameters)
    unknown = [option for option in options if option not in accepted]
    if unknown:
        takes = f"takes the options {', '.join(accepted)}" if accepted else "takes no options"
        raise TypeError(f"Task '{name}' {takes}; got {', '.join(unknown)}.")
    return build(**options)
