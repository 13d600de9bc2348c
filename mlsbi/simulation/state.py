r"""What code changes while it runs: caches and counters, which say nothing of what it computes."""

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
import inspect
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mlsbi.simulation.adapters import PerSample
from mlsbi.simulation.programs import Command
from mlsbi.simulation.reading import codes_of, in_library, named_in, nodes_of, surroundings_of, unwrap

__all__ = ["HELD", "NAMESPACES", "NESTED", "SIMPLE", "State"]

NESTED = 16  # how far containers are followed into those they hold
SIMPLE = (type(None), bool, int, float, complex, str, bytes)
_NUMBERS = (range, decimal.Decimal, fractions.Fraction, datetime.date, datetime.time, datetime.timedelta)
NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_CONTAINERS = (list, dict, set, deque, bytearray, array.array, types.MappingProxyType, *NAMESPACES)  # not fixed
HELD = (tuple, frozenset, *_CONTAINERS)
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
_INERT = (*SIMPLE, *_NUMBERS, types.ModuleType, types.BuiltinFunctionType, np.ndarray, np.generic, Tensor)
_FIXED = (*SIMPLE, *_NUMBERS, np.generic, types.FunctionType, types.BuiltinFunctionType, type)
_FOLLOWED = 2000  # functions that are searched for state
_LOOKED = 100_000  # elements of containers that are searched for functions
_UNKNOWN = object()


@dataclass(frozen=True)
class _Instance:
    """An object that the code makes while it runs: of it only the class is known."""

    kind: type


class State:
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
        """Follows a simulator from its call, as far as it can be followed."""
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
        """Stands for an object that the code makes itself."""
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
        elif not isinstance(value, type) and unwrap(value) is not None and self.foreign(value):
            self.follow(unwrap(value), arguments, keywords)
        elif isinstance(value, types.FunctionType):
            if not self.foreign(value):
                self._read(value, _bound(value, arguments, keywords))
        elif self._first(value, *map(_identity, arguments)):
            self.kept.append(arguments)
            self._look_into(value, arguments, keywords)

    def _look_into(self, value: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        if isinstance(value, HELD):
            parts = vars(value) if isinstance(value, NAMESPACES) else value
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
        code, nodes = function.__code__, nodes_of(function)
        for name in named_in(code, "STORE_GLOBAL", "DELETE_GLOBAL"):
            self.place(function.__globals__, name)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name in named_in(code, "STORE_DEREF", "DELETE_DEREF"):
                self.place(cell, "")
        around = [value for _, value, _ in surroundings_of(function)]
        for value in around:
            self.follow(value)
        for node in nodes:
            scope = _Scope(self, function, node, bound)
            for part in ast.walk(node):
                self._visit(part, scope)
        if not nodes:  # without a source, all that may be meant
            changing = named_in(code, "LOAD_ATTR", "LOAD_METHOD") & _CHANGING or any(
                step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
                for inner in codes_of(code) for step in dis.get_instructions(inner))
            for value in (*around, *bound.values()):
                if changing and isinstance(value, (*_CONTAINERS, np.ndarray, Tensor)):
                    self.change(value)
                for name in named_in(code, "STORE_ATTR", "DELETE_ATTR"):
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

    def __init__(self, state: State, function: types.FunctionType, node: ast.AST, bound: dict[str, Any]) -> None:
        self.state, self.function = state, function
        self.local = {name for code in codes_of(function.__code__) for name in (*code.co_varnames, *code.co_cellvars)}
        grown = {id(part.target) for part in ast.walk(node) if isinstance(part, ast.AugAssign)}
        times = Counter(part.id for part in ast.walk(node)
                        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and id(part) not in grown)
        self.known = {name: value for name, value in bound.items() if not times[name]}
        self.aliases = {name: meant for part in ast.walk(node) for name, meant in _aliases(part)
                        if times[name] == 1 and name in self.local and name not in bound}
        self.outer = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def value(self, node: ast.AST, depth: int = NESTED) -> Any:
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

    def change(self, node: ast.AST, depth: int = NESTED, *, aliased: bool = False) -> None:
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
        elif isinstance(value, HELD) and not isinstance(value, NAMESPACES):
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
    while unwrap(function) is not None and _in_library_function(function):
        function = unwrap(function)
    return function if isinstance(function, types.FunctionType) else _UNKNOWN


def _in_library_function(value: Any) -> bool:
    return not isinstance(value, types.FunctionType) or in_library(value.__code__.co_filename)


def _bound(function: types.FunctionType, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What a function's parameters stand for, where that is known and can be changed."""
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    positional = names[: code.co_argcount]
    bound = dict(zip(reversed(positional), reversed(defaults), strict=False)) | (function.__kwdefaults__ or {})
    bound |= dict(zip(positional, arguments, strict=False))
    bound |= {name: value for name, value in keywords.items() if name in names}
    return {name: value for name, value in bound.items()
            if value is not _UNKNOWN and not isinstance(value, SIMPLE)}


def _identity(value: Any) -> Any:
    if isinstance(value, types.MethodType):  # a new one each time it is looked up
        return "method", id(value.__self__), id(value.__func__)
    return id(value)
