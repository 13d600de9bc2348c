r"""The source of functions and classes: found, without comments, and with what it names."""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import hashlib
import linecache
import operator
import re
import sys
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from mlsbi.simulation.adapters import PerSample

__all__ = [
    "class_source", "codes_of", "file_of_class", "function_source", "in_library", "label_of",
    "methods_of", "named_in", "nodes_of", "package_of", "surroundings_of", "unwrap",
]  # fmt: skip

_LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_GENERAL = {"torch", "numpy", "scipy", *sys.stdlib_module_names} - {"__main__"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SPAN = operator.attrgetter("lineno", "col_offset", "end_lineno", "end_col_offset")
_HOLDING = {functools.partial: "func", PerSample: "function", types.MethodType: "__self__"}


def surroundings_of(function: types.FunctionType) -> Iterator[tuple[str, Any, tuple[int, str]]]:
    """Name, value and place of the variables around a function that it uses; of its own modules, their parts."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not set yet
            yield name, cell.cell_contents, (id(cell), "")
    used = named_in(code, "LOAD_ATTR", "LOAD_METHOD")
    modules: list[tuple[str, types.ModuleType]] = []
    for name in sorted(named_in(code, "LOAD_GLOBAL", "LOAD_NAME") & set(function.__globals__)):
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType):
            modules.append((name, value))
        else:
            yield name, value, (id(function.__globals__), name)
    met: list[types.ModuleType] = []
    while modules:
        name, module = modules.pop()
        if in_library(getattr(module, "__file__", None)) or module in met:
            continue
        met.append(module)
        for part in sorted(used & set(vars(module))):
            value = vars(module)[part]
            if isinstance(value, types.ModuleType):
                modules.append((f"{name}.{part}", value))
            else:
                yield f"{name}.{part}", value, (id(vars(module)), part)


def function_source(function: types.FunctionType) -> str:
    """The source of a function, comments and docstrings left out; a hash of its bytecode where there is none."""
    code = function.__code__
    nodes = nodes_of(function)
    if not nodes:
        return f"source not available: {label_of(function)}, bytecode {_bytecode(code)}"
    texts = sorted({ast.unparse(node) for node in nodes})
    return texts[0] if len(texts) == 1 else "\n".join(["one of", *texts, f"bytecode {_bytecode(code)}"])


def class_source(kind: type) -> str:
    """The source of a class, as `function_source`."""
    methods, filename = methods_of(kind), file_of_class(kind)
    codes, tree = _read(filename)
    written = [method.__code__ for method in methods if method.__code__.co_filename == filename]
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == kind.__name__
             and all(node.lineno <= code.co_firstlineno <= (node.end_lineno or 0) for code in written)]
    if nodes and codes.issuperset(written):
        return ast.unparse(nodes[-1])
    code = sorted(f"{method.__name__} bytecode {_bytecode(method.__code__)}" for method in methods)
    return "\n".join([f"source not available: {label_of(kind)}", *code])


def nodes_of(function: types.FunctionType) -> list[Any]:
    """Where a function is in its source; several for lambdas that cannot be told apart, none without a source."""
    code = function.__code__
    codes, tree = _read(code.co_filename, function.__globals__)
    if code not in codes:
        return []
    nodes: list[Any] = _starts(tree).get((code.co_name, code.co_firstlineno), [])
    if len(nodes) > 1:  # lambdas of one line
        nodes = [node for node in nodes if _SPAN(node.body) == _code_span(code)] or nodes
    return nodes


def methods_of(kind: type) -> list[types.FunctionType]:
    """Functions that a class defines itself."""
    found = []
    for value in vars(kind).values():
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        function = value.func if isinstance(value, functools.cached_property) else function
        while isinstance(function, types.FunctionType) and in_library(function.__code__.co_filename):
            function = unwrap(function)
        if isinstance(function, types.FunctionType):
            written = is_dataclass(kind) and function.__code__.co_filename == "<string>"  # by its fields
            found += [] if written else [function]
    return found


def file_of_class(kind: type) -> str | None:
    """The file that a class was defined in; `None` where that is not known."""
    for method in methods_of(kind):  # its module may be gone
        if not method.__code__.co_filename.startswith("<") and method.__module__ == kind.__module__:
            return method.__code__.co_filename
    return getattr(sys.modules.get(kind.__module__), "__file__", None)


@functools.lru_cache(maxsize=1024)
def in_library(filename: str | None) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    if filename is None or filename.startswith("<frozen"):
        return True
    path, typed_in = Path(filename).resolve(), filename.startswith("<")
    return not typed_in and bool({"site-packages", "dist-packages"} & {*path.parts} or _LIBRARIES & {*path.parents})


def package_of(value: Any) -> str | None:
    """The top package that a simulator is from, seen through what wraps it; `None` if that is a general library."""
    while type(value) in _HOLDING or unwrap(value) is not None:
        value = getattr(value, _HOLDING[type(value)]) if type(value) in _HOLDING else unwrap(value)
    kind = value if isinstance(value, (type, types.FunctionType)) else type(value)
    top = str(kind.__module__).split(".")[0]
    return None if top in _GENERAL else top


def label_of(value: Any) -> str:
    """A name that is the same in every process; of a library only its top package, inside it things move."""
    if isinstance(value, types.BuiltinFunctionType):
        return f"builtin {value.__name__}"
    if not isinstance(value, (type, types.FunctionType, types.MethodType)):
        name = getattr(value, "__name__", None)
        return f"{type(value).__name__} {name}" if isinstance(name, str) else f"a {type(value).__name__}"
    name = re.sub(r".*<locals>\.", "", value.__qualname__)
    library = in_library(file_of_class(value) if isinstance(value, type) else value.__code__.co_filename)
    return f"{(value.__module__ or '').split('.')[0]}.{name}" if library else name


def unwrap(value: Any) -> Any:
    """What a decorator of a library (functools, torch, numba, jax, numpy.vectorize) holds; `None` if not callable."""
    names = () if isinstance(value, type) else ("__wrapped__", "py_func", "pyfunc")
    return next((inner for name in names if callable(inner := getattr(value, name, None))), None)


def named_in(code: types.CodeType, *operations: str) -> set[str]:
    """Names that instructions of some kinds have in a function and in those written inside it."""
    return {str(step.argval) for part in codes_of(code) for step in dis.get_instructions(part)
            if step.opname in operations}


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of those defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_of(constant)


def _read(filename: str | None, module_globals: dict[str, Any] | None = None) -> tuple[set[types.CodeType], ast.Module]:
    """The code that a file compiles to, which tells whether it is still the one that was loaded, and its tree."""
    linecache.checkcache(filename)
    return _parse("".join(linecache.getlines(filename or "", module_globals)))


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> tuple[set[types.CodeType], ast.Module]:
    try:
        codes, tree = set(codes_of(compile(text, "<source>", "exec", dont_inherit=True))), ast.parse(text)
    except (SyntaxError, ValueError):
        return set(), ast.Module([], [])
    for node in ast.walk(tree):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return codes, tree


@functools.lru_cache(maxsize=64)
def _starts(tree: ast.Module) -> dict[tuple[str, int], list[ast.AST]]:
    found: dict[tuple[str, int], list[ast.AST]] = {}
    for node in ast.walk(tree):
        if (start := _start(node)) is not None:
            found.setdefault(start, []).append(node)
    return found


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
