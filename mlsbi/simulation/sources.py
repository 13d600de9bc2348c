r"""What code a simulator is made of, in words that are the same in every process."""

from __future__ import annotations

import argparse
import array
import ast
import contextlib
import datetime
import decimal
import dis
import fractions
import functools
import hashlib
import inspect
import linecache
import math
import operator
import os
import re
import shutil
import string
import sys
import sysconfig
import textwrap
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.simulation.adapters import PerSample
from mlsbi.simulation.programs import Command

__all__ = ["describe_code", "strip_addresses"]

_DEPTH = 8  # how far functions are followed into those they use
_NESTED = 16  # how far containers are followed into those they hold
_INCREMENTAL = 10_000  # elements of a list beyond which only a hash is made
_SHOWN = 20_000  # characters of values that are told in full, and not by their hash
_SHOWN_CODE = 1_000_000  # the same where they are functions
_MOST = 10_000_000  # elements of all containers that are looked at
_HASHED = 2**28  # bytes of a program that is hashed
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)
_NUMBERS = (range, decimal.Decimal, fractions.Fraction, datetime.date, datetime.time, datetime.timedelta)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_CONTAINERS = (list, dict, set, deque, bytearray, array.array, types.MappingProxyType, *_NAMESPACES)  # not fixed
_HELD = (tuple, frozenset, *_CONTAINERS)
_LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_GENERAL = {"torch", "numpy", "scipy", *sys.stdlib_module_names} - {"__main__"}
_SYSTEM = {Path(name) for name in ("/bin", "/usr/bin", "/usr/local/bin")}
_OPTIONS = ("template", "parameters", "output", "read", "cwd", "env")  # those that a command's result depends on
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SPAN = operator.attrgetter("lineno", "col_offset", "end_lineno", "end_col_offset")
_HOLDING = {functools.partial: "func", PerSample: "function", types.MethodType: "__self__"}


def describe_code(simulate: Any) -> str:
    """Describes a simulator, or any function or object that is called, by its source and the values it uses.

    Source is told without comments, docstrings and formatting; with it come defaults, captured variables, globals,
    arguments of a `functools.partial`, attributes, and the functions that are called, eight deep, those in lists and
    dicts too. Values are numbers, texts, arrays, and lists, tuples, dicts, sets, namespaces and dataclass instances of
    values and functions; long ones are told by a hash. What the code itself changes while it runs counts as a cache or
    a counter and is told by its type only: names and attributes that it rebinds, and lists, dicts and arrays that it
    assigns into or calls `append`, `update` and the like of. A command comes with hashes of the files that its
    template names by a path, but for the running interpreter and what lies in a system's folder of programs.

    Told by name or type only: code and objects of libraries, modules imported inside functions, objects of extension
    types, and what else is read when the code runs, such as data files and the environment.

    Args:
        simulate: What is called.

    Returns:
        Python-like text, lines indented by what they belong to.

    Example:
        >>> import operator
        >>> print(describe_code(functools.partial(operator.add, 2.0)))
        partial of
        builtin add
        argument 0 = 2.0
    """
    return _Describer(simulate).text(simulate, _DEPTH + 1)


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
        simulate: The simulator. Its own package is described in full even where it is installed as a library.
    """

    def __init__(self, simulate: Any) -> None:
        self.home = _package(simulate)
        self.seen: dict[int, Any] = {}
        self.open: list[Any] = []  # containers that are being described
        self.told = 0  # elements of containers
        self.state = _State(self.foreign)
        self.state.find(simulate)

    def text(self, value: Any, depth: int, *, by_value: bool = False) -> str:
        """Describes anything, in one line or several; mappings of unknown types in full only if `by_value`."""
        try:
            return self._text(value, depth, by_value=by_value)
        except Exception:  # objects may raise whatever they like when they are looked at
            return f"a {type(value).__name__}"

    def _text(self, value: Any, depth: int, *, by_value: bool) -> str:
        if isinstance(value, Enum):
            return str(value)
        if isinstance(value, np.generic):
            return f"{value.dtype} {value.item()!r}"
        if isinstance(value, (str, bytes)) and len(value) > _SHOWN:
            return f"{type(value).__name__} of {len(value)}, sha256 {_hash([repr(value)])}"
        if isinstance(value, (*_SIMPLE, torch.dtype, torch.device, PurePath, np.dtype)):
            return strip_addresses(repr(value) if isinstance(value, _SIMPLE) else str(value))
        if isinstance(value, _NUMBERS):
            return repr(value)
        if id(value) in self.state.changed:
            return _label(value)
        if isinstance(value, _HELD) or (by_value and isinstance(value, Mapping)):
            return self._container(value, depth, by_value=by_value)
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            return f"{_array(value)} {self._container(value.tolist(), depth)}"
        if isinstance(value, (np.ndarray, Tensor)):
            return _array(value)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if depth <= 0 or id(value) in self.seen:
            return _label(value)
        self.seen[id(value)] = value
        return self._thing(value, depth)

    def _container(self, value: Any, depth: int, *, by_value: bool = False) -> str:
        if len(self.open) >= _NESTED or any(value is other for other in self.open):
            return _label(value)
        self.open.append(value)
        try:
            told = self._held(value, depth, by_value=by_value)
        finally:
            self.open.pop()
        own = not isinstance(value, tuple) and depth > 0 and not self.foreign(type(value))
        return f"{told}\n{self._object(value, None, depth)}" if own else told

    def _held(self, value: Any, depth: int, *, by_value: bool) -> str:
        """What a container holds, in one line, a line each, or by a hash."""
        def again(part: Any) -> str:
            return repr(part) if type(part) in _SIMPLE else self.text(part, depth, by_value=by_value)

        kind, size = type(value).__name__, len(vars(value)) if isinstance(value, _NAMESPACES) else len(value)
        self.told += size
        if self.told > _MOST:
            return f"{kind} of {size}"
        if isinstance(value, _NAMESPACES):
            items = [f"{name}={again(part)}" for name, part in sorted(vars(value).items())
                     if (id(value), name) not in self.state.places]
        elif isinstance(value, Mapping):
            items = sorted(f"{again(key)}: {again(part)}" for key, part in value.items())
        elif isinstance(value, (set, frozenset)):
            items = sorted(self._apart(map(again, value)))
        elif size > _INCREMENTAL:
            return f"{kind} of {size}, sha256 {_hash(map(again, value))}"
        else:
            items = [again(part) for part in value]
        lines, length = any("\n" in item for item in items), sum(map(len, items))
        if length > (_SHOWN_CODE if lines else _SHOWN):
            return f"{kind} of {size}, sha256 {_hash(items)}"
        if lines or length > 200:  # a line each, so that a difference is short
            return f"{kind} of\n{textwrap.indent(chr(10).join(items), '    ')}"
        return f"{kind}({', '.join(items)})"

    def _apart(self, texts: Iterator[str]) -> Iterator[str]:
        """Texts of a set's elements, which come in any order: none may be short because another was seen before."""
        before, after = self.seen, dict(self.seen)
        self.seen = dict(before)
        for text in texts:
            yield text
            after |= self.seen
            self.seen = dict(before)
        self.seen = after

    def _thing(self, value: Any, depth: int) -> str:
        if isinstance(value, functools.partial):
            arguments = [*enumerate(value.args), *sorted(value.keywords.items())]
            listed = self._list("argument", arguments, depth, by_value=True)
            return f"partial of\n{self.text(value.func, depth)}{listed}"
        if isinstance(value, PerSample):
            return f"per_sample of\n{self.text(value.function, depth)}"
        if isinstance(value, Command):
            options = [(name, getattr(value, name)) for name in _OPTIONS]
            files = "".join(f"\nfile {told}" for told in _files(value))
            return f"command{self._list('option', options, depth, by_value=True)}{files}"
        if isinstance(value, types.MethodType):
            return f"method {value.__name__} of\n{self._object(value.__self__, value.__func__, depth)}"
        if _wrapped(value) is not None and self.foreign(value):
            return f"{type(value).__name__} of\n{self.text(_wrapped(value), depth)}"
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, type):
            return self._class(value, depth)
        return self._object(value, type(value).__call__ if callable(value) else None, depth)

    def _list(self, what: str, values: Iterable[tuple[Any, Any]], depth: int, *, by_value: bool = False) -> str:
        texts = ((name, self.text(value, depth, by_value=by_value)) for name, value in values)
        return "".join(f"\n{what} {name} =" + (textwrap.indent(f"\n{text}", "    ") if "\n" in text else f" {text}")
                       for name, text in texts)

    def _function(self, function: types.FunctionType, depth: int) -> str:
        if self.foreign(function):
            return _label(function)
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
        defaults = sorted((each.name, each.default) for each in parameters if each.default is not each.empty)
        return (_function_source(function) + self._list("default", defaults, depth - 1)
                + self._list("where", self._surroundings(function), depth - 1))

    def _class(self, kind: type, depth: int) -> str:
        if self.foreign(kind):
            return _label(kind)
        values = {name: value for method in _methods(kind) for name, value in self._surroundings(method)}
        values |= {name: value for name, value in vars(kind).items()
                   if isinstance(value, (*_SIMPLE, *_NUMBERS, *_HELD, np.ndarray, Tensor))
                   and not name.startswith("__") and (id(kind), name) not in self.state.places}
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
        if self.foreign(kind) and is_dataclass(value):
            held = [(part.name, getattr(value, part.name)) for part in fields(value) if hasattr(value, part.name)]
            return f"{kind.__name__} of{self._list('attribute', held, depth - 1)}"
        if self.foreign(kind) and not isinstance(value, torch.nn.Module):
            return _label(value)
        slots = {name for base in kind.__mro__ for name, part in vars(base).items()
                 if isinstance(part, types.MemberDescriptorType) and hasattr(value, name)}
        code = getattr(called, "__code__", None)
        names = {*getattr(value, "__dict__", ()), *slots} - (set() if code is None else _named(code, "STORE_ATTR"))
        names -= {name for name in names if (id(value), name) in self.state.places
                  or isinstance(inspect.getattr_static(kind, name, None), functools.cached_property)}
        held = [(name, getattr(value, name)) for name in sorted(names)]
        if isinstance(value, torch.nn.Module):
            public = [(name, part) for name, part in held if name != "training" and not name.startswith("_")]
            held = [] if self.foreign(kind) else public
            held += [("layers", repr(value)), *sorted(value.state_dict().items())]
        return f"object of\n{self.text(kind, depth)}{self._list('attribute', held, depth - 1)}"

    def foreign(self, value: Any) -> bool:
        """Whether something belongs to a library other than the simulator's own."""
        if isinstance(value, types.FunctionType):  # a wrapper carries the module of what it wraps
            package = value.__globals__.get("__name__", "").split(".")[0]
            return package != self.home and _in_library(value.__code__.co_filename)
        kind = value if isinstance(value, type) else type(value)
        return str(kind.__module__).split(".")[0] != self.home and _in_library(_file_of_class(kind))

    def _surroundings(self, function: types.FunctionType) -> list[tuple[str, Any]]:
        """What a function reads of its surroundings, without the variables that are set meanwhile: they are state."""
        own = _named(function.__code__, "STORE_GLOBAL", "STORE_DEREF") | {"__class__"}  # the last is that of super()
        return [(name, value) for name, value, place in sorted(_around(function), key=operator.itemgetter(0))
                if name not in own and place not in self.state.places]


def _around(function: types.FunctionType) -> Iterator[tuple[str, Any, tuple[int, str]]]:
    """Name, value and place of the variables around a function that it uses; of its own modules, their parts."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not set yet
            yield name, cell.cell_contents, (id(cell), "")
    used = _named(code, "LOAD_ATTR", "LOAD_METHOD")
    modules: list[tuple[str, types.ModuleType]] = []
    for name in sorted(_named(code, "LOAD_GLOBAL", "LOAD_NAME") & set(function.__globals__)):
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType):
            modules.append((name, value))
        else:
            yield name, value, (id(function.__globals__), name)
    met: list[types.ModuleType] = []
    while modules:
        name, module = modules.pop()
        if _in_library(getattr(module, "__file__", None)) or module in met:
            continue
        met.append(module)
        for part in sorted(used & set(vars(module))):
            value = vars(module)[part]
            if isinstance(value, types.ModuleType):
                modules.append((f"{name}.{part}", value))
            else:
                yield f"{name}.{part}", value, (id(vars(module)), part)


# Methods that change what they are called of, and functions that change their first argument.
_CHANGING = {"append", "extend", "insert", "pop", "popitem", "clear", "update", "add", "remove", "discard",
             "setdefault", "sort", "reverse", "write", "appendleft", "extendleft", "popleft", "rotate", "fill",
             "resize", "put", "move_to_end", "subtract", "intersection_update", "difference_update",
             "symmetric_difference_update", "__setitem__", "__delitem__"}
_CHANGING_FIRST = {"setattr", "delattr", "heappush", "heappop", "heapify", "heapreplace", "heappushpop", "insort",
                   "insort_left", "insort_right", "shuffle", "copyto", "put", "place", "putmask"}
_GIVING = {"get", "setdefault", "items", "values"}  # methods that give what is inside, not a copy
_NOT_IMPLICIT = {"__init__", "__new__", "__post_init__", "__init_subclass__", "__class_getitem__", "__setattr__",
                 "__delattr__", "__setitem__", "__delitem__", "__set_name__", "__reduce__", "__reduce_ex__",
                 "__getstate__", "__setstate__", "__getnewargs__", "__copy__", "__deepcopy__", "__repr__", "__del__"}
_INERT = (*_SIMPLE, *_NUMBERS, types.ModuleType, types.BuiltinFunctionType, np.ndarray, np.generic, Tensor)
_FIXED = (*_SIMPLE, *_NUMBERS, np.generic, types.FunctionType, types.BuiltinFunctionType, type)
_FOLLOWED = 2000  # functions that are searched for state
_LOOKED = 100_000  # elements of containers that are searched for functions
_UNKNOWN = object()


@dataclass(frozen=True)
class _Instance:
    """An object that the code makes while it runs: of it only the class is known."""

    kind: type


class _State:
    """What a simulator's own code changes while it runs, found by reading it.

    Functions are followed from where they are called, with what their parameters then stand for; methods only where
    they are called, for those that set an object up are no sign of state.

    Args:
        foreign: Whether something belongs to a library.
    """

    def __init__(self, foreign: Callable[[Any], bool]) -> None:
        self.foreign = foreign
        self.changed: dict[int, Any] = {}  # containers and arrays, by identity
        self.places: set[tuple[int, str]] = set()  # (globals, name), (cell, ""), (object, attribute)
        self.kept: list[Any] = []  # what identities refer to
        self.met: set[Any] = set()
        self.queue: list[tuple[Any, Any, Mapping[str, Any]]] = []
        self.fresh: dict[type, _Instance] = {}
        self.read = self.looked = 0  # functions, elements of containers

    def find(self, simulate: Any) -> None:
        self.follow(simulate)
        while self.queue and self.read < _FOLLOWED:
            with contextlib.suppress(Exception):  # objects may raise whatever they like when they are looked at
                self._follow(*self.queue.pop())

    def follow(self, value: Any, arguments: Iterable[Any] = (), keywords: Mapping[str, Any] | None = None) -> None:
        """Has something looked at that is used, or called with arguments."""
        if value is not _UNKNOWN and not isinstance(value, _INERT):
            self.queue.append((value, tuple(arguments), keywords or {}))

    def change(self, value: Any) -> None:
        """Takes something for state that is changed in place."""
        if isinstance(value, (*_CONTAINERS, tuple, np.ndarray, Tensor)):
            self.changed[id(value)] = value
        else:
            self.follow(_attribute(value, "__setitem__"))

    def place(self, holder: Any, name: str) -> None:
        """Takes a variable or an attribute for state that is set."""
        self.places.add((id(holder), name))
        self.kept.append(holder)

    def instance(self, kind: type) -> _Instance:
        return self.fresh.setdefault(kind, _Instance(kind))

    def _follow(self, value: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        if isinstance(value, functools.partial):
            self.follow(value.func, (*value.args, *arguments), {**value.keywords, **keywords})
        elif isinstance(value, PerSample):
            self.follow(value.function, arguments, keywords)
        elif isinstance(value, Command):
            self.follow(value.read)
        elif isinstance(value, types.MethodType):
            owner = value.__self__
            kind = owner if isinstance(owner, type) else owner.kind if isinstance(owner, _Instance) else type(owner)
            others = [_plain(vars(base).get(value.__name__)) for base in kind.__mro__]  # those of super()
            for function in (value.__func__, *others):
                self.follow(function, (owner, *arguments), keywords)
        elif not isinstance(value, type) and _wrapped(value) is not None and self.foreign(value):
            self.follow(_wrapped(value), arguments, keywords)
        elif isinstance(value, types.FunctionType):
            if not self.foreign(value):
                self._read(value, _bound(value, arguments, keywords))
        elif self._first(value, *map(_identity, arguments)):
            self.kept.append(arguments)
            self._look_into(value, arguments, keywords)

    def _look_into(self, value: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        if isinstance(value, _HELD):
            parts = vars(value) if isinstance(value, _NAMESPACES) else value
            self.looked += len(parts)
            for part in (parts.values() if isinstance(parts, Mapping) else parts) if self.looked < _LOOKED else ():
                self.follow(part)
        kind = value if isinstance(value, type) else type(value)
        methods = {name: part for base in reversed(kind.__mro__) if base is not object and not self.foreign(base)
                   for name, part in vars(base).items()}
        if isinstance(value, type):  # where it is used, objects of it are made
            for function in map(_plain, methods.values()):
                self.follow(function, (self.instance(value),))
            return
        for name in sorted(methods.keys() - _NOT_IMPLICIT):
            called = name in ("__call__", "forward")
            if called or name.startswith("__"):
                self.follow(_attribute(value, name), arguments if called else (), keywords if called else {})

    def _first(self, value: Any, *others: Any) -> bool:
        key = (_identity(value), *others)
        if key in self.met:
            return False
        self.met.add(key)
        self.kept.append(value)
        return True

    def _read(self, function: types.FunctionType, bound: dict[str, Any]) -> None:
        if not self._first(function, *((name, _identity(value)) for name, value in sorted(bound.items()))):
            return
        self.kept += bound.values()
        self.read += 1
        code, nodes = function.__code__, _nodes(function)
        for name in _named(code, "STORE_GLOBAL", "DELETE_GLOBAL"):
            self.place(function.__globals__, name)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name in _named(code, "STORE_DEREF", "DELETE_DEREF"):
                self.place(cell, "")
        around = [value for _, value, _ in _around(function)]
        for value in around:
            self.follow(value)
        for node in nodes:
            scope = _Scope(self, function, node, bound)
            for part in ast.walk(node):
                self._visit(part, scope)
        if not nodes:  # without a source, all that may be meant
            changing = _named(code, "LOAD_ATTR", "LOAD_METHOD") & _CHANGING or any(
                step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
                for inner in _codes(code) for step in dis.get_instructions(inner))
            for value in (*around, *bound.values()):
                if changing and isinstance(value, (*_CONTAINERS, np.ndarray, Tensor)):
                    self.change(value)
                for name in _named(code, "STORE_ATTR", "DELETE_ATTR"):
                    self.place(value, name)

    def _visit(self, node: ast.AST, scope: _Scope) -> None:
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            scope.change(node.target)
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            scope.change(node.value)
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            holder = scope.value(node.value)
            if holder is _UNKNOWN:
                scope.change(node.value)
            else:
                self.place(vars(holder) if isinstance(holder, types.ModuleType) else holder, node.attr)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            self.follow(scope.value(node))
        elif isinstance(node, ast.Call):
            self._visit_call(node, scope)

    def _visit_call(self, node: ast.Call, scope: _Scope) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if isinstance(node.func, ast.Attribute):
            holder = scope.value(node.func.value)
            in_place = isinstance(holder, Tensor) and name.endswith("_") and not name.endswith("__")
            held = holder is _UNKNOWN or isinstance(holder, (*_CONTAINERS, np.ndarray, Tensor))
            if held and (in_place or name in _CHANGING):
                scope.change(node.func.value)
        if name in _CHANGING_FIRST and node.args:
            if name in ("setattr", "delattr"):
                wanted = node.args[1] if len(node.args) > 1 else None
                self.place(scope.value(node.args[0]), str(getattr(wanted, "value", "")))
            else:
                scope.change(node.args[0])
        for keyword in node.keywords:
            if keyword.arg == "out":
                scope.change(keyword.value)
        plain = [part for part in node.args if not isinstance(part, ast.Starred)]
        arguments = map(scope.value, plain if len(plain) == len(node.args) else ())
        self.follow(scope.value(node.func), arguments,
                    {part.arg: scope.value(part.value) for part in node.keywords if part.arg is not None})


class _Scope:
    """What the names in a function stand for, as far as that is fixed before it runs.

    Args:
        state: What to tell of changes.
        function: The function.
        node: Its source.
        bound: What its parameters stand for.
    """

    def __init__(self, state: _State, function: types.FunctionType, node: ast.AST, bound: dict[str, Any]) -> None:
        self.state, self.function = state, function
        self.local = {name for code in _codes(function.__code__) for name in (*code.co_varnames, *code.co_cellvars)}
        grown = {id(part.target) for part in ast.walk(node) if isinstance(part, ast.AugAssign)}
        times = Counter(part.id for part in ast.walk(node)
                        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and id(part) not in grown)
        self.known = {name: value for name, value in bound.items() if not times[name]}
        self.aliases = {name: meant for part in ast.walk(node) for name, meant in _aliases(part)
                        if times[name] == 1 and name in self.local and name not in bound}
        self.outer = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def value(self, node: ast.AST, depth: int = _NESTED) -> Any:
        """The object that an expression stands for, or `_UNKNOWN`."""
        if depth == 0:
            return _UNKNOWN
        if isinstance(node, ast.Name):
            return self._name(node.id, depth)
        if isinstance(node, ast.Attribute):
            return _attribute(self.value(node.value, depth - 1), node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            held: Any = self.value(node.value, depth - 1)
            key: Any = node.slice.value
            with contextlib.suppress(LookupError, TypeError):
                return held[key] if isinstance(held, (list, tuple, dict)) else _UNKNOWN
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "super":  # methods are followed in all bases
                return self.known.get(self.function.__code__.co_varnames[0], _UNKNOWN) if self.local else _UNKNOWN
            kind = self.value(node.func, depth - 1)
            if isinstance(kind, type) and not self.state.foreign(kind):
                return self.state.instance(kind)
        return _UNKNOWN

    def _name(self, name: str, depth: int) -> Any:
        if name in self.known:
            return self.known[name]
        if name in self.aliases:
            return self.value(self.aliases[name], depth - 1)
        if name in self.outer:
            with contextlib.suppress(ValueError):  # not set yet
                return self.outer[name].cell_contents
            return _UNKNOWN
        return _UNKNOWN if name in self.local else self.function.__globals__.get(name, _UNKNOWN)

    def change(self, node: ast.AST, depth: int = _NESTED, *, aliased: bool = False) -> None:
        """Takes what an expression stands for as changed in place, or what holds it."""
        value = self.value(node)
        if depth == 0:
            return
        if value is not _UNKNOWN:
            self.state.change(value)
        elif isinstance(node, ast.Name) and node.id in self.aliases:
            self.change(self.aliases[node.id], depth - 1, aliased=True)
        elif isinstance(node, ast.Subscript) and not (aliased and isinstance(node.slice, ast.Slice)):  # a copy
            self._change_inside(node.value, depth, aliased=aliased)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _GIVING:
            self._change_inside(node.func.value, depth, aliased=aliased)
        elif isinstance(node, ast.Attribute):
            self.change(node.value, depth - 1, aliased=aliased)

    def _change_inside(self, node: ast.AST, depth: int, *, aliased: bool) -> None:
        value = self.value(node)
        if value is _UNKNOWN:
            self.change(node, depth - 1, aliased=aliased)
        elif isinstance(value, (np.ndarray, Tensor)):
            if not aliased:  # else it may be a copy
                self.state.change(value)
        elif isinstance(value, _HELD) and not isinstance(value, _NAMESPACES):
            parts = value.values() if isinstance(value, Mapping) else value
            if not len(parts) or not all(isinstance(part, _FIXED) for part in parts):
                self.state.change(value)


def _aliases(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Names that are set, and what to."""
    if isinstance(node, ast.Assign):
        yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and isinstance(node.target, ast.Name) and node.value:
        yield node.target.id, node.value
    elif isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.target, ast.Name):
        yield node.target.id, ast.Subscript(node.iter, ast.Name("", ast.Load()), ast.Load())


def _attribute(holder: Any, name: str) -> Any:
    """An attribute, found without running any code; of a property the method behind it."""
    if holder is _UNKNOWN:
        return _UNKNOWN
    if isinstance(holder, types.ModuleType):
        return vars(holder).get(name, _UNKNOWN)
    found = inspect.getattr_static(holder.kind if isinstance(holder, _Instance) else holder, name, _UNKNOWN)
    if isinstance(found, types.MemberDescriptorType):
        return _UNKNOWN if isinstance(holder, (type, _Instance)) else getattr(holder, name, _UNKNOWN)
    if name in getattr(holder, "__dict__", ()) and not isinstance(holder, type):
        return found
    if isinstance(found, staticmethod):
        return found.__func__
    if isinstance(found, classmethod):
        kind = holder.kind if isinstance(holder, _Instance) else holder if isinstance(holder, type) else type(holder)
        return types.MethodType(found.__func__, kind)
    function = _plain(found)
    if isinstance(function, types.FunctionType):
        return function if isinstance(holder, type) else types.MethodType(function, holder)
    return _UNKNOWN if hasattr(type(found), "__get__") else found


def _plain(member: Any) -> Any:
    """The function behind a member of a class: a method, a property, or one that a library wrapped."""
    if isinstance(member, functools.cached_property):
        return member.func
    function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
    while _wrapped(function) is not None and _in_library_function(function):
        function = _wrapped(function)
    return function if isinstance(function, types.FunctionType) else _UNKNOWN


def _in_library_function(value: Any) -> bool:
    return not isinstance(value, types.FunctionType) or _in_library(value.__code__.co_filename)


def _bound(function: types.FunctionType, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What a function's parameters stand for, where that is known and can be changed."""
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    positional = names[: code.co_argcount]
    bound = dict(zip(reversed(positional), reversed(defaults), strict=False)) | (function.__kwdefaults__ or {})
    bound |= dict(zip(positional, arguments, strict=False))
    bound |= {name: value for name, value in keywords.items() if name in names}
    return {name: value for name, value in bound.items()
            if value is not _UNKNOWN and not isinstance(value, _SIMPLE)}


def _identity(value: Any) -> Any:
    if isinstance(value, types.MethodType):  # a new one each time it is looked up
        return "method", id(value.__self__), id(value.__func__)
    return id(value)


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
        function = value.func if isinstance(value, functools.cached_property) else function
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
    nodes = _nodes(function)
    if not nodes:
        return f"source not available: {_label(function)}, bytecode {_bytecode(code)}"
    texts = sorted({ast.unparse(node) for node in nodes})
    return texts[0] if len(texts) == 1 else "\n".join(["one of", *texts, f"bytecode {_bytecode(code)}"])


def _nodes(function: types.FunctionType) -> list[Any]:
    """Where a function is in its source; several for lambdas that cannot be told apart, none without a source."""
    code = function.__code__
    codes, tree = _read(code.co_filename, function.__globals__)
    if code not in codes:
        return []
    nodes: list[Any] = _starts(tree).get((code.co_name, code.co_firstlineno), [])
    if len(nodes) > 1:  # lambdas of one line
        nodes = [node for node in nodes if _SPAN(node.body) == _code_span(code)] or nodes
    return nodes


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


def _files(command: Command) -> Iterator[str]:
    """The files that a command's template names by a path, by what they contain."""
    for place, part in enumerate(command.template):
        parsed = list(string.Formatter().parse(part))
        if any(name is not None for _, name, _, _ in parsed):
            continue
        whole = "".join(literal for literal, *_ in parsed)
        for text in dict.fromkeys((whole, whole.partition("=")[2])):
            path = _local_file(text, command.cwd, searched=place == 0)
            if path is not None:
                yield f"{os.path.basename(text)} = {_contents(path)}"


def _local_file(text: str, cwd: str | None, *, searched: bool) -> str | None:
    if os.path.basename(text) == text and not re.search(r"\.\w*[A-Za-z]\w*$", text):  # python3.11 has no suffix
        return None
    if searched and os.path.basename(text) == text:
        path = shutil.which(text)
    else:  # relative ones start at cwd; without it at a fresh directory, which has none
        path = os.path.join(os.path.abspath(cwd), text) if cwd is not None else text if os.path.isabs(text) else None
    if path is None or not os.path.isfile(path):
        return None
    here, real = Path(path), Path(path).resolve()
    running = sys.executable and real == Path(sys.executable).resolve()
    return None if running or {here.parent, real.parent} & _SYSTEM else path


def _contents(path: str) -> str:
    state = os.stat(path)
    if state.st_size <= _HASHED:
        with contextlib.suppress(OSError), open(path, "rb") as file:  # a program may be run without being readable
            return f"sha256 {_hash(iter(functools.partial(file.read, 2**20), b''))}"
    return f"{state.st_size} bytes of {datetime.datetime.fromtimestamp(state.st_mtime, datetime.timezone.utc)}"


def _hash(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else f"{len(part)} {part}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


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
