r"""A user's own stack from `path/to/file.py:stack`."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path

from mlsbi.levels import LevelStack

__all__ = ["load_stack"]


def load_stack(spec: str) -> LevelStack:
    r"""Runs a Python file and takes a `LevelStack` from it.

    Args:
        spec: `path/to/file.py:name`.

    Raises:
        ValueError: If the text has no name after the path, the file fails while it runs, or it has no stack of that
            name.
        FileNotFoundError: If there is no such file.
    """
    path_text, _, name = spec.rpartition(":")
    path = Path(path_text)
    if not path_text or not name.isidentifier():
        raise ValueError(f"Expected path/to/file.py:name; got {spec!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; expected one that defines {name} = LevelStack(...).")
    private = f"_mlsbi_{path.stem}"  # never a name that somebody else imports
    module_spec = importlib.util.spec_from_file_location(private, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"Expected a Python file ending in .py; got {path}.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[private] = module  # dataclasses look their module up while it runs
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a file that ends the program when it is run as one has no stack
        raise ValueError(f"{_where(path, error)} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
        # Functions of a module that cannot be imported travel to worker processes by value.
        del sys.modules[private]
    stack = getattr(module, name, None)
    if not isinstance(stack, LevelStack):
        found = [key for key, value in vars(module).items() if isinstance(value, LevelStack)]
        raise ValueError(f"Expected {path} to define a LevelStack called {name}; it defines {found or 'none'}.")
    return stack


def _where(path: Path, error: BaseException) -> str:
    """The file and the line of it that was reached."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == path.resolve():
        return f"{path}, line {error.lineno},"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if Path(frame.filename).resolve() == path.resolve()]
    return f"{path}, line {lines[-1]}," if lines else f"{path}"
