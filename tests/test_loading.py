"""Stacks from users' own files, and what is said where such a file fails."""

import sys

import pytest

from mlsbi import LevelStack
from mlsbi.loading import load_stack

STACK = """
import torch
from mlsbi import BoxPrior, Level, LevelStack

stack = LevelStack(BoxPrior([0.0], [1.0]), "seed", [Level("only", lambda theta, noise: theta)])
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.py"


def test_a_stack_is_taken_from_its_file(path):
    path.write_text(STACK, encoding="utf-8")
    before = list(sys.path)
    assert isinstance(load_stack(f"{path}:stack"), LevelStack)
    assert sys.path == before
    with pytest.raises(ValueError, match=r"LevelStack called other; it defines \['stack'\]"):
        load_stack(f"{path}:other")


@pytest.mark.parametrize(("text", "line", "error"), [
    ("\n\n1 / 0\n", 3, "ZeroDivisionError: division by zero"),
    ("def f():\n    raise KeyError('key')\n\n\nf()\n", 2, "KeyError: 'key'"),
    ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError: Expecting"),
    ("import no_such_module_at_all\n", 1, "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    ("\nopen('there/is/none')\n", 2, "FileNotFoundError: "),
    ("\nstack = (\n", 2, "SyntaxError: "),
    ("import sys\nsys.exit('done')\n", 2, "SystemExit: done"),
])  # fmt: skip
def test_a_file_that_fails_is_named_with_its_line(path, text, line, error):
    path.write_text(text, encoding="utf-8")
    before, modules = list(sys.path), set(sys.modules)
    with pytest.raises(ValueError, match=f"model.py, line {line}, raised {error}") as raised:
        load_stack(f"{path}:stack")
    assert type(raised.value.__cause__).__name__ in error
    assert sys.path == before
    assert "_mlsbi_model" not in set(sys.modules) - modules


def test_an_interrupt_is_not_the_files_fault(path):
    path.write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        load_stack(f"{path}:stack")


def test_a_file_that_is_not_there_or_not_named_is_said(path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_stack(f"{path}:stack")
    path.write_text(STACK, encoding="utf-8")
    with pytest.raises(ValueError, match=r"Expected path/to/file.py:name"):
        load_stack(str(path))
