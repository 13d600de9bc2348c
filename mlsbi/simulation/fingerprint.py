r"""What makes two stacks the same: a description in JSON, and its differences in words."""

from __future__ import annotations

import ast
import difflib
import dis
import functools
import hashlib
import linecache
import math
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.distributions import Distribution

from mlsbi.levels import LevelStack
from mlsbi.priors import parameter_names, sample_prior
from mlsbi.randomness import seeded
from mlsbi.simulation.adapters import Command, PerSample

__all__ = ["compare_stacks", "describe_stack"]

_FORMAT = 1
_DEPTH = 3  # how far functions are followed into those they use
_TOLERANCE = 1e-4  # of draws: other processors round differently
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)
_LIBRARIES = {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")}


def describe_stack(stack: LevelStack) -> dict[str, Any]:
    r"""Describes the prior, the noise and the simulators of a stack, for `compare_stacks`.

    The prior and the noise are told by a few draws as well as in words; simulators by their source without comments,
    docstrings and formatting, with the values they use: defaults, captured variables, globals, arguments of a
    `functools.partial`, attributes, and the functions they call, three deep, unless those belong to a library.
    Lists and dicts count by value only as arguments of a partial: elsewhere they may be caches. Costs are left out,
    since they may be corrected, and so are the contents of external programs and data files.

    Args:
        stack: The stack; torch's global random state is left as found.

    Returns:
        Plain dicts, lists, texts and numbers, the same in every process, and after a round trip through JSON.

    Example:
        >>> from mlsbi.levels import Level
        >>> from mlsbi.priors import BoxPrior
        >>> stack = LevelStack(BoxPrior([0.0], [1.0]), "seed", [Level("only", torch.add)])
        >>> describe_stack(stack)["levels"]
        [{'name': 'only', 'code': 'builtin add'}]
    """
    return {
        "format": _FORMAT,
        "prior": _describe_prior(stack.prior),
        "noise": _describe_noise(stack),
        "levels": [{"name": str(level.name), "code": _code(level.simulate)} for level in stack.levels],
    }


def compare_stacks(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Tells how two descriptions of `describe_stack` differ.

    Args:
        stored: The earlier description.
        now: The present one.

    Returns:
        One sentence for the prior, the noise, the names of the levels, and each level whose code changed, where they
        differ; none if the stacks are the same. Draws may differ by a ten-thousandth.

    Example:
        >>> from mlsbi.levels import Level
        >>> from mlsbi.priors import BoxPrior
        >>> one, two = (LevelStack(BoxPrior([0.0], [b]), "seed", [Level("only", torch.add)]) for b in (1.0, 2.0))
        >>> compare_stacks(describe_stack(one), describe_stack(two))
        ['prior: stored `BoxPrior(theta_1 in [0, 1])`, now `BoxPrior(theta_1 in [0, 2])`']
    """
    if stored.get("format") != now.get("format"):
        return [f"description: stored in format {stored.get('format')}, now in format {now.get('format')}; stacks "
                "described by different versions of mlsbi cannot be compared"]
    differences = [_prior_difference(stored["prior"], now["prior"]), _noise_difference(stored["noise"], now["noise"])]
    before, after = ({level["name"]: level["code"] for level in each["levels"]} for each in (stored, now))
    if list(before) != list(after):
        differences.append(f"levels: stored {list(before)}, now {list(after)}")
    differences += [
        f"level '{name}': its code changed:\n{_diff(code, after[name])}"
        for name, code in before.items()
        if name in after and code != after[name]
    ]
    return [text for text in differences if text is not None]


# Prior and noise


def _describe_prior(prior: Distribution) -> dict[str, Any]:
    draws = sample_prior(prior, 8, seed=0)
    names = list(parameter_names(prior))
    return {
        "class": type(prior).__name__,
        "dimension": len(names),
        "names": names,
        "text": " ".join(_strip(repr(prior)).split()),
        "dtype": str(draws.dtype),
        "draws": {name: _numbers(draws[:, i]) for i, name in enumerate(names)},
    }


def _describe_noise(stack: LevelStack) -> dict[str, Any]:
    with seeded(0):  # of noise that draws from the global state as well, which is found and refused elsewhere
        noise = stack.draw_noise(4, Generator().manual_seed(0))
    leaves = {
        name: {
            "kind": f"{str(leaf.dtype).removeprefix('torch.')} {('n', *leaf.shape[1:])}".replace("'", ""),
            "draws": _numbers(leaf.reshape(4, -1)[:, :2].flatten()) if leaf.numel() else [],
        }
        for name, leaf in _leaves(noise)
    }
    return {"code": "one seed a row" if isinstance(stack.noise, str) else _code(stack.noise), "leaves": leaves}


def _leaves(noise: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(noise, dict):
        yield from ((f"noise[{key!r}]", leaf) for key, leaf in noise.items())
    elif isinstance(noise, tuple):
        yield from ((f"noise[{place}]", leaf) for place, leaf in enumerate(noise))
    else:
        yield "noise", noise


def _numbers(values: Tensor) -> list[Any]:
    """A flat list that JSON keeps; NaN and infinity, which it does not know, as texts."""
    flat = torch.view_as_real(values).flatten() if values.is_complex() else values.detach()
    return [value if math.isfinite(value) else str(value) for value in flat.tolist()]


def _prior_difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if stored["text"] != now["text"]:
        return f"prior: stored `{stored['text']}`, now `{now['text']}`"
    for what in ("class", "dimension", "names", "dtype"):
        if stored[what] != now[what]:
            return f"prior: its {what} changed, stored {stored[what]}, now {now[what]}"
    return _changed_draws("prior", stored["draws"], now["draws"])


def _noise_difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    before, after = stored["leaves"], now["leaves"]
    kinds = [{name: leaf["kind"] for name, leaf in leaves.items()} for leaves in (before, after)]
    code = "" if stored["code"] == now["code"] else f"its code changed:\n{_diff(stored['code'], now['code'])}"
    if kinds[0] != kinds[1]:
        found: str | None = f"noise: stored {kinds[0]}, now {kinds[1]}"
    else:
        found = _changed_draws("noise", *({name: leaf["draws"] for name, leaf in each.items()}
                                          for each in (before, after)))
    if found is None:
        return f"noise: {code}" if code else None
    return f"{found}; {code}" if code else found


def _changed_draws(what: str, stored: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> str | None:
    changed = [name for name in stored if not _close(stored[name], now[name])]
    if not changed:
        return None
    name = changed[0]
    others = f" (and those of {', '.join(changed[1:])})" if changed[1:] else ""
    return f"{what}: its draws changed, {name} stored {_short(stored[name])}, now {_short(now[name])}{others}"


def _close(stored: list[Any], now: list[Any]) -> bool:
    numbers = [abs(value) for value in (*stored, *now) if not isinstance(value, str)]
    scale = max(numbers, default=0.0)  # a draw that is zero but for rounding has no digits of its own

    def close(one: Any, other: Any) -> bool:
        if isinstance(one, str) or isinstance(other, str):
            return bool(one == other)
        return math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=1e-3 * _TOLERANCE * scale)

    return len(stored) == len(now) and all(map(close, stored, now))


def _short(values: list[Any]) -> str:
    return "[" + ", ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values) + "]"


def _diff(stored: str, now: str) -> str:
    lines = difflib.unified_diff(stored.splitlines(), now.splitlines(), "stored", "now", lineterm="", n=2)
    return "\n".join(lines)


# Code


def _code(simulate: Any) -> str:
    return _Describer(_package(simulate)).text(simulate, _DEPTH)


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
            return _strip(repr(value) if isinstance(value, _SIMPLE) else str(value))
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
        return self._thing(value, depth)

    def _thing(self, value: Any, depth: int) -> str:
        if depth == 0 or any(value is other for other in self.seen):
            return _label(value)
        self.seen.append(value)
        if isinstance(value, functools.partial):
            arguments = [(str(place), argument) for place, argument in enumerate(value.args)]
            arguments += sorted(value.keywords.items())
            listed = self._list("argument", arguments, depth, by_value=True)
            return f"partial of\n{self.text(value.func, depth)}{listed}"
        if isinstance(value, PerSample):
            return f"per_sample of\n{self.text(value.function, depth)}"
        if isinstance(value, Command):
            names = ("template", "parameters", "output", "read", "cwd", "env")
            options = [(name, getattr(value, name)) for name in names]
            return f"command{self._list('option', options, depth, by_value=True)}"
        if isinstance(value, types.MethodType):
            return f"method {value.__name__} of\n{self._object(value.__self__, value.__func__, depth)}"
        inner = _wrapped(value)
        if inner is not None and self._foreign(value):
            return f"{type(value).__name__} of\n{self.text(inner, depth)}"
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, type):
            return self._class(value, depth)
        if isinstance(value, types.BuiltinFunctionType):
            return _label(value)
        return self._object(value, _find_method(type(value), "__call__"), depth)

    def _list(self, what: str, values: Iterable[tuple[str, Any]], depth: int, *, by_value: bool = False) -> str:
        lines = []
        for name, value in values:
            text = self.text(value, depth, by_value=by_value)
            lines.append(f"\n{what} {name} = {text}" if "\n" not in text else f"\n{what} {name} =\n{_indent(text)}")
        return "".join(lines)

    def _function(self, function: types.FunctionType, depth: int) -> str:
        if self._foreign(function):
            return _label(function)
        code = function.__code__
        named = code.co_varnames[: code.co_argcount]
        defaults = function.__defaults__ or ()
        values = dict(zip(named[len(named) - len(defaults) :], defaults, strict=True))
        values |= function.__kwdefaults__ or {}
        return (_function_source(function) + self._list("default", sorted(values.items()), depth - 1)
                + self._list("where", _surroundings(function), depth - 1))

    def _class(self, kind: type, depth: int) -> str:
        if self._foreign(kind):
            return _label(kind)
        methods = _methods(kind)
        values = {name: value for method in methods for name, value in _surroundings(method)}
        values |= {name: value for name, value in vars(kind).items() if _is_constant(name, value)}
        values.pop(kind.__name__, None)
        bases = [(f"base {base.__name__}", base) for base in kind.__bases__ if base is not object]
        return _class_source(kind) + self._list("where", [*bases, *sorted(values.items())], depth - 1)

    def _object(self, value: Any, called: Any, depth: int) -> str:
        """An object by its class and its attributes, without those that a call sets: they are its state."""
        kind = type(value)
        if isinstance(value, type):
            return self.text(value, depth)
        if isinstance(value, Distribution):
            return _strip(repr(value))
        code = getattr(called, "__code__", None)
        state = _named(code, "STORE_ATTR") if code is not None else set()
        slots = {name for base in kind.__mro__ for name in _listed(base.__dict__.get("__slots__", ()))}
        names = sorted((set(getattr(value, "__dict__", ())) | {name for name in slots if hasattr(value, name)}) - state)
        held = [(name, getattr(value, name)) for name in names]
        if isinstance(value, torch.nn.Module):
            public = [(name, part) for name, part in held if name != "training" and not name.startswith("_")]
            held = [] if self._foreign(kind) else public
            held += [("layers", repr(value)), *sorted(value.state_dict().items())]
        elif self._foreign(kind):
            return _label(value)
        return f"object of\n{self.text(kind, depth)}{self._list('attribute', held, depth - 1)}"

    def _foreign(self, value: Any) -> bool:
        """Whether something belongs to a library other than the simulator's own."""
        code = getattr(value, "__code__", None)
        if code is not None:  # a wrapper carries the module of what it wraps
            package = value.__globals__.get("__name__", "").split(".")[0]
            return package != self.home and _in_library(code.co_filename)
        kind = value if isinstance(value, type) else type(value)
        return str(kind.__module__).split(".")[0] != self.home and _in_library(_file_of_class(kind))


def _surroundings(function: types.FunctionType) -> list[tuple[str, Any]]:
    """What a function reads of its surroundings, without the variables it sets itself: they are its state."""
    code = function.__code__
    found = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    for name in _named(code, "LOAD_GLOBAL") | _named(code, "LOAD_NAME"):
        if name not in function.__globals__:
            continue  # a builtin, or not there yet
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType):
            if not _in_library(getattr(value, "__file__", None)):
                used = _named(code, "LOAD_ATTR") | _named(code, "LOAD_METHOD")
                found |= {f"{name}.{part}": vars(value)[part] for part in used & set(vars(value))}
        else:
            found[name] = value
    state = _named(code, "STORE_GLOBAL") | _named(code, "STORE_DEREF") | {"__class__"}  # the last is that of super()
    return [(name, found[name]) for name in sorted(found) if name not in state]


def _named(code: types.CodeType, operation: str) -> set[str]:
    """Names that instructions of a kind have in a function and in those written inside it."""
    names = {str(step.argval) for step in dis.get_instructions(code) if step.opname == operation}
    return names.union(*(_named(inner, operation) for inner in _inner(code)))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _methods(kind: type) -> list[types.FunctionType]:
    found = []
    for value in vars(kind).values():
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        while isinstance(function, types.FunctionType) and _in_library(function.__code__.co_filename):
            function = _wrapped(function)
        if isinstance(function, types.FunctionType):
            found.append(function)
    if is_dataclass(kind):  # what it wrote itself is in its fields
        return [method for method in found if method.__code__.co_filename != "<string>"]
    return found


def _find_method(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _is_constant(name: str, value: Any) -> bool:
    simple = isinstance(value, (*_SIMPLE, tuple, np.ndarray, Tensor))
    return simple and not name.startswith("__")


def _wrapped(value: Any) -> Any:
    """What a decorator of a library (functools, torch, numba, jax, numpy.vectorize) holds; `None` if not callable."""
    if isinstance(value, type):
        return None
    found = (getattr(value, name, None) for name in ("__wrapped__", "py_func", "pyfunc"))
    return next((inner for inner in found if callable(inner)), None)


# Sources


@dataclass(frozen=True)
class _File:
    """A source file: the code it compiles to, to know whether it is still the one that was loaded, and its tree."""

    codes: tuple[types.CodeType, ...]
    tree: ast.Module


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> _File | None:
    try:
        whole = compile(text, "<source>", "exec", dont_inherit=True)
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    codes, waiting = [], [whole]
    while waiting:
        code = waiting.pop()
        codes.append(code)
        waiting += _inner(code)
    return _File(tuple(codes), _WithoutDocstrings().visit(tree))


class _WithoutDocstrings(ast.NodeTransformer):
    def _strip(self, node: Any) -> Any:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _strip


def _load(filename: str, module_globals: dict[str, Any] | None) -> _File | None:
    linecache.checkcache(filename)
    text = "".join(linecache.getlines(filename, module_globals))
    return _parse(text) if text else None


def _function_source(function: types.FunctionType) -> str:
    code = function.__code__
    file = _load(code.co_filename, function.__globals__)
    if file is None or code not in file.codes:
        return f"source not available: {_label(function)}, bytecode {_bytecode(code)}"
    nodes = [node for node in ast.walk(file.tree) if _starts(node) == (code.co_name, code.co_firstlineno)]
    if len(nodes) > 1:  # lambdas of one line
        nodes = [node for node in nodes if _span(node) == _code_span(code)] or nodes
    if len(nodes) == 1:
        return ast.unparse(nodes[0])
    texts = sorted({ast.unparse(node) for node in nodes})
    return texts[0] if len(texts) == 1 else "\n".join(["one of", *texts, f"bytecode {_bytecode(code)}"])


def _starts(node: ast.AST) -> tuple[str, int] | None:
    if isinstance(node, ast.Lambda):
        return "<lambda>", node.lineno
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return node.name, min(part.lineno for part in (node, *node.decorator_list))
    return None


def _span(node: Any) -> tuple[Any, ...]:
    body = node.body
    return body.lineno, body.col_offset, body.end_lineno, body.end_col_offset


def _code_span(code: types.CodeType) -> tuple[Any, ...] | None:
    """Where the body of a lambda is written; Python 3.10 does not know."""
    positions: Callable[[], Iterator[Any]] | None = getattr(code, "co_positions", None)
    places = [] if positions is None else [place for place in positions() if None not in place]
    starts = [(line, column) for line, end, column, stop in places if (end, stop) > (line, column)]
    ends = [(end, stop) for line, end, column, stop in places if (end, stop) > (line, column)]
    return (*min(starts), *max(ends)) if starts else None


def _class_source(kind: type) -> str:
    filename = _file_of_class(kind)
    methods = [method for method in _methods(kind) if method.__code__.co_filename == filename]
    file = None if filename is None else _load(filename, None)
    if file is not None and all(method.__code__ in file.codes for method in methods):
        lines = [method.__code__.co_firstlineno for method in methods]
        nodes = [
            node for name, node in _classes(file.tree, "")
            if name == kind.__qualname__ and all(node.lineno <= line <= (node.end_lineno or 0) for line in lines)
        ]  # fmt: skip
        if nodes:
            return ast.unparse(nodes[-1])
    code = [f"{method.__name__} bytecode {_bytecode(method.__code__)}" for method in _methods(kind)]
    return "\n".join([f"source not available: {_label(kind)}", *sorted(code)])


def _classes(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield prefix + child.name, child
            yield from _classes(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _classes(child, f"{prefix}{child.name}.<locals>.")
        else:
            yield from _classes(child, prefix)


def _file_of_class(kind: type) -> str | None:
    for method in _methods(kind):  # its module may be gone
        if not method.__code__.co_filename.startswith("<") and method.__module__ == kind.__module__:
            return method.__code__.co_filename
    return getattr(sys.modules.get(kind.__module__), "__file__", None)


@functools.lru_cache(maxsize=1024)
def _in_library(filename: str | None) -> bool:
    if filename is None or filename.startswith("<frozen"):
        return True
    if filename.startswith("<"):  # typed in
        return False
    path = Path(filename).resolve()
    return bool({"site-packages", "dist-packages"} & set(path.parts)) or any(
        str(parent) in _LIBRARIES for parent in path.parents
    )


def _package(value: Any) -> str | None:
    """The top package that a simulator is from, seen through what wraps it; `None` if that is a general library."""
    while True:
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, PerSample):
            value = value.function
        elif isinstance(value, types.MethodType):
            value = value.__self__
        elif _wrapped(value) is not None:
            value = _wrapped(value)
        else:
            break
    kind = value if isinstance(value, (type, types.FunctionType)) else type(value)
    top = str(kind.__module__).split(".")[0]
    return None if top in sys.stdlib_module_names - {"__main__"} or top in ("torch", "numpy", "scipy") else top


def _bytecode(code: types.CodeType) -> str:
    """A hash of what a function does, the same in every process of one version of Python."""

    def plain(constant: Any) -> str:
        if isinstance(constant, types.CodeType):
            return _bytecode(constant)
        if isinstance(constant, frozenset):
            return str(sorted(map(plain, constant)))
        return f"({', '.join(map(plain, constant))})" if isinstance(constant, tuple) else repr(constant)

    parts = [code.co_code.hex(), plain(code.co_consts), *code.co_names, *code.co_varnames, *code.co_freevars]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]} of Python {version}"


# Values


def _array(values: Tensor | np.ndarray[Any, Any]) -> str:
    what = f"{type(values).__name__} {str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}"
    if isinstance(values, Tensor):
        tensor = values.detach().cpu().contiguous()
        array = tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else np.empty(0)
    else:
        array = np.ascontiguousarray(values)
    if array.dtype.hasobject:
        return what
    few = f" {values.tolist()}" if array.size and math.prod(values.shape) <= 8 else ""
    return f"{what}{few} sha256 {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


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


def _listed(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _strip(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
