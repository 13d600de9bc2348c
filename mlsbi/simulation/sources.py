r"""What code a simulator is made of, in words that are the same in every process."""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import hashlib
import inspect
import linecache
import math
import re
import sys
import sysconfig
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.simulation.adapters import PerSample
from mlsbi.simulation.programs import Command

__all__ = ["describe_code", "strip_addresses"]

_DEPTH = 3  # how far functions are followed into those they use
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)
_LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_GENERAL = {"torch", "numpy", "scipy", *sys.stdlib_module_names} - {"__main__"}
_OPTIONS = ("template", "parameters", "output", "read", "cwd", "env")  # those that a command's result depends on
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SPAN = attrgetter("lineno", "col_offset", "end_lineno", "end_col_offset")
_HOLDING = {functools.partial: "func", PerSample: "function", types.MethodType: "__self__"}


def describe_code(simulate: Any) -> str:
    """Describes a simulator, or any function or object that is called, by its source and the values it uses.

    Args:
        simulate: What is called. Its source is told without comments, docstrings and formatting; then defaults,
            captured variables, globals, arguments of a `functools.partial`, attributes, and the functions it calls,
            three deep. Libraries' code is told by its name; lists and dicts, which may be caches, by their type only,
            unless they are arguments of a partial.

    Returns:
        Python-like text, lines indented by what they belong to.

    Example:
        >>> import operator
        >>> print(describe_code(functools.partial(operator.add, 2.0)))
        partial of
        builtin add
        argument 0 = 2.0
    """
    return _Describer(_package(simulate)).text(simulate, _DEPTH)


def strip_addresses(text: str) -> str:
    """Removes the memory addresses of Python's default `repr`.

    Example:
        >>> strip_addresses("<Model object at 0x7f00e0>")
        '<Model object>'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


class _Describer:
    """Writes what a simulator is made of; whatever it meets a second time, by name.

    Args:
        home: The simulator's own package, described in full even where it is installed as a library.
    """

    def __init__(self, home: str | None) -> None:
        self.home = home
        self.seen: list[Any] = []

    def text(self, value: Any, depth: int, *, by_value: bool = False) -> str:
        """Describes anything, in one line or several; lists and dicts in full only if `by_value`."""
        again = functools.partial(self.text, depth=depth, by_value=by_value)
        if isinstance(value, Enum):
            return str(value)
        if isinstance(value, np.generic):
            return f"{value.dtype} {value.item()!r}"
        if isinstance(value, (*_SIMPLE, torch.dtype, torch.device, PurePath, np.dtype)):
            return strip_addresses(repr(value) if isinstance(value, _SIMPLE) else str(value))
        if isinstance(value, tuple) or (by_value and isinstance(value, list)):
            return f"{type(value).__name__}({', '.join(map(again, value))})"
        if isinstance(value, frozenset) or (by_value and isinstance(value, set)):
            return f"{type(value).__name__}({', '.join(sorted(map(again, value)))})"
        if by_value and isinstance(value, Mapping):
            items = sorted(f"{again(key)}: {again(item)}" for key, item in value.items())
            return f"{type(value).__name__}({', '.join(items)})"
        if isinstance(value, (np.ndarray, Tensor)):
            return _array(value)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if depth == 0 or any(value is other for other in self.seen):
            return _label(value)
        self.seen.append(value)
        return self._thing(value, depth)

    def _thing(self, value: Any, depth: int) -> str:
        if isinstance(value, functools.partial):
            arguments = [*enumerate(value.args), *sorted(value.keywords.items())]
            listed = self._list("argument", arguments, depth, by_value=True)
            return f"partial of\n{self.text(value.func, depth)}{listed}"
        if isinstance(value, PerSample):
            return f"per_sample of\n{self.text(value.function, depth)}"
        if isinstance(value, Command):
            options = [(name, getattr(value, name)) for name in _OPTIONS]
            return f"command{self._list('option', options, depth, by_value=True)}"
        if isinstance(value, types.MethodType):
            return f"method {value.__name__} of\n{self._object(value.__self__, value.__func__, depth)}"
        if _wrapped(value) is not None and self._foreign(value):
            return f"{type(value).__name__} of\n{self.text(_wrapped(value), depth)}"
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, type):
            return self._class(value, depth)
        return self._object(value, type(value).__call__, depth)

    def _list(self, what: str, values: Iterable[tuple[Any, Any]], depth: int, *, by_value: bool = False) -> str:
        texts = ((name, self.text(value, depth, by_value=by_value)) for name, value in values)
        return "".join(f"\n{what} {name} =" + (textwrap.indent(f"\n{text}", "    ") if "\n" in text else f" {text}")
                       for name, text in texts)

    def _function(self, function: types.FunctionType, depth: int) -> str:
        if self._foreign(function):
            return _label(function)
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
        defaults = sorted((each.name, each.default) for each in parameters if each.default is not each.empty)
        return (_function_source(function) + self._list("default", defaults, depth - 1)
                + self._list("where", _surroundings(function), depth - 1))

    def _class(self, kind: type, depth: int) -> str:
        if self._foreign(kind):
            return _label(kind)
        values = {name: value for method in _methods(kind) for name, value in _surroundings(method)}
        values |= {name: value for name, value in vars(kind).items()
                   if isinstance(value, (*_SIMPLE, tuple, np.ndarray, Tensor)) and not name.startswith("__")}
        values.pop(kind.__name__, None)
        bases = [(f"base {base.__name__}", base) for base in kind.__bases__ if base is not object]
        return _class_source(kind) + self._list("where", [*bases, *sorted(values.items())], depth - 1)

    def _object(self, value: Any, called: Any, depth: int) -> str:
        """An object by its class and its attributes, without those that a call sets: they are its state."""
        kind = type(value)
        if isinstance(value, type):
            return self.text(value, depth)
        if isinstance(value, Distribution):
            return strip_addresses(repr(value))
        if self._foreign(kind) and not isinstance(value, torch.nn.Module):
            return _label(value)
        slots = {name for base in kind.__mro__ for name, part in vars(base).items()
                 if isinstance(part, types.MemberDescriptorType) and hasattr(value, name)}
        code = getattr(called, "__code__", None)
        names = {*getattr(value, "__dict__", ()), *slots} - (set() if code is None else _named(code, "STORE_ATTR"))
        held = [(name, getattr(value, name)) for name in sorted(names)]
        if isinstance(value, torch.nn.Module):
            public = [(name, part) for name, part in held if name != "training" and not name.startswith("_")]
            held = [] if self._foreign(kind) else public
            held += [("layers", repr(value)), *sorted(value.state_dict().items())]
        return f"object of\n{self.text(kind, depth)}{self._list('attribute', held, depth - 1)}"

    def _foreign(self, value: Any) -> bool:
        """Whether something belongs to a library other than the simulator's own."""
        if isinstance(value, types.FunctionType):  # a wrapper carries the module of what it wraps
            package = value.__globals__.get("__name__", "").split(".")[0]
            return package != self.home and _in_library(value.__code__.co_filename)
        kind = value if isinstance(value, type) else type(value)
        return str(kind.__module__).split(".")[0] != self.home and _in_library(_file_of_class(kind))


def _surroundings(function: types.FunctionType) -> list[tuple[str, Any]]:
    """What a function reads of its surroundings, without the variables it sets itself: they are its state."""
    code = function.__code__
    found = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not set yet
            found[name] = cell.cell_contents
    for name in _named(code, "LOAD_GLOBAL", "LOAD_NAME") & set(function.__globals__):
        value = function.__globals__[name]
        if not isinstance(value, types.ModuleType):
            found[name] = value
        elif not _in_library(getattr(value, "__file__", None)):
            used = _named(code, "LOAD_ATTR", "LOAD_METHOD") & set(vars(value))
            found |= {f"{name}.{part}": vars(value)[part] for part in used}
    state = _named(code, "STORE_GLOBAL", "STORE_DEREF") | {"__class__"}  # the last is that of super()
    return [(name, found[name]) for name in sorted(found) if name not in state]


def _named(code: types.CodeType, *operations: str) -> set[str]:
    """Names that instructions of some kinds have in a function and in those written inside it."""
    return {str(step.argval) for part in _codes(code) for step in dis.get_instructions(part)
            if step.opname in operations}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _methods(kind: type) -> list[types.FunctionType]:
    found = []
    for value in vars(kind).values():
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        while isinstance(function, types.FunctionType) and _in_library(function.__code__.co_filename):
            function = _wrapped(function)
        if isinstance(function, types.FunctionType):
            written = is_dataclass(kind) and function.__code__.co_filename == "<string>"  # by its fields
            found += [] if written else [function]
    return found


def _wrapped(value: Any) -> Any:
    """What a decorator of a library (functools, torch, numba, jax, numpy.vectorize) holds; `None` if not callable."""
    names = () if isinstance(value, type) else ("__wrapped__", "py_func", "pyfunc")
    return next((inner for name in names if callable(inner := getattr(value, name, None))), None)


def _package(value: Any) -> str | None:
    """The top package that a simulator is from, seen through what wraps it; `None` if that is a general library."""
    while type(value) in _HOLDING or _wrapped(value) is not None:
        value = getattr(value, _HOLDING[type(value)]) if type(value) in _HOLDING else _wrapped(value)
    kind = value if isinstance(value, (type, types.FunctionType)) else type(value)
    top = str(kind.__module__).split(".")[0]
    return None if top in _GENERAL else top


def _file_of_class(kind: type) -> str | None:
    for method in _methods(kind):  # its module may be gone
        if not method.__code__.co_filename.startswith("<") and method.__module__ == kind.__module__:
            return method.__code__.co_filename
    return getattr(sys.modules.get(kind.__module__), "__file__", None)


@functools.lru_cache(maxsize=1024)
def _in_library(filename: str | None) -> bool:
    if filename is None or filename.startswith("<frozen"):
        return True
    path, typed_in = Path(filename).resolve(), filename.startswith("<")
    return not typed_in and bool({"site-packages", "dist-packages"} & {*path.parts} or _LIBRARIES & {*path.parents})


def _read(filename: str | None, module_globals: dict[str, Any] | None = None) -> tuple[set[types.CodeType], ast.Module]:
    """The code that a file compiles to, which tells whether it is still the one that was loaded, and its tree."""
    linecache.checkcache(filename)
    return _parse("".join(linecache.getlines(filename or "", module_globals)))


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> tuple[set[types.CodeType], ast.Module]:
    try:
        codes, tree = set(_codes(compile(text, "<source>", "exec", dont_inherit=True))), ast.parse(text)
    except (SyntaxError, ValueError):
        return set(), ast.Module([], [])
    for node in ast.walk(tree):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return codes, tree


def _function_source(function: types.FunctionType) -> str:
    code = function.__code__
    codes, tree = _read(code.co_filename, function.__globals__)
    if code not in codes:
        return f"source not available: {_label(function)}, bytecode {_bytecode(code)}"
    nodes: list[Any] = [node for node in ast.walk(tree) if _start(node) == (code.co_name, code.co_firstlineno)]
    if len(nodes) > 1:  # lambdas of one line
        nodes = [node for node in nodes if _SPAN(node.body) == _code_span(code)] or nodes
    texts = sorted({ast.unparse(node) for node in nodes})
    return texts[0] if len(texts) == 1 else "\n".join(["one of", *texts, f"bytecode {_bytecode(code)}"])


def _start(node: ast.AST) -> tuple[str, int] | None:
    if isinstance(node, ast.Lambda):
        return "<lambda>", node.lineno
    if isinstance(node, _FUNCTIONS):
        return node.name, min(part.lineno for part in (node, *node.decorator_list))
    return None


def _code_span(code: types.CodeType) -> tuple[int, ...] | None:
    """Where the body of a lambda is written; Python 3.10 does not know."""
    positions: Any = getattr(code, "co_positions", tuple)()
    places = [((line, column), (end, stop)) for line, end, column, stop in positions
              if None not in (line, end, column, stop) and (line, column) < (end, stop)]
    return (*min(places)[0], *max(end for _, end in places)) if places else None


def _class_source(kind: type) -> str:
    methods, filename = _methods(kind), _file_of_class(kind)
    codes, tree = _read(filename)
    written = [method.__code__ for method in methods if method.__code__.co_filename == filename]
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == kind.__name__
             and all(node.lineno <= code.co_firstlineno <= (node.end_lineno or 0) for code in written)]
    if nodes and codes.issuperset(written):
        return ast.unparse(nodes[-1])
    code = sorted(f"{method.__name__} bytecode {_bytecode(method.__code__)}" for method in methods)
    return "\n".join([f"source not available: {_label(kind)}", *code])


def _bytecode(code: types.CodeType) -> str:
    """A hash of what a function does, the same in every process of one version of Python."""

    def plain(constant: Any) -> str:
        if isinstance(constant, types.CodeType):
            return _bytecode(constant)
        if isinstance(constant, frozenset):
            return str(sorted(map(plain, constant)))
        return f"({', '.join(map(plain, constant))})" if isinstance(constant, tuple) else repr(constant)

    parts = [code.co_code.hex(), plain(code.co_consts), *code.co_names, *code.co_varnames, *code.co_freevars]
    digest = hashlib.sha256("|".join(parts).encode()).hexdigest()
    return f"{digest[:16]} of Python {sys.version_info.major}.{sys.version_info.minor}"


def _array(values: Tensor | np.ndarray[Any, Any]) -> str:
    what = f"{type(values).__name__} {str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}"
    if isinstance(values, Tensor):
        data = values.detach().cpu().flatten().contiguous().view(torch.uint8).numpy()
    elif (data := values).dtype.hasobject:
        return what
    few = f" {values.tolist()}" if 0 < math.prod(values.shape) <= 8 else ""
    return f"{what}{few} sha256 {hashlib.sha256(data.tobytes()).hexdigest()[:16]}"


def _label(value: Any) -> str:
    """A name that is the same in every process; of a library only its top package, inside it things move."""
    if isinstance(value, types.BuiltinFunctionType):
        return f"builtin {value.__name__}"
    if not isinstance(value, (type, types.FunctionType, types.MethodType)):
        name = getattr(value, "__name__", None)
        return f"{type(value).__name__} {name}" if isinstance(name, str) else f"a {type(value).__name__}"
    name = re.sub(r".*<locals>\.", "", value.__qualname__)
    library = _in_library(_file_of_class(value) if isinstance(value, type) else value.__code__.co_filename)
    return f"{(value.__module__ or '').split('.')[0]}.{name}" if library else name
