r"""What code a simulator is made of, in words that are the same in every process."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import inspect
import math
import operator
import os
import re
import shutil
import string
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.simulation.adapters import PerSample
from mlsbi.simulation.programs import Command
from mlsbi.simulation.reading import (
    class_source,
    file_of_class,
    function_source,
    in_library,
    label_of,
    methods_of,
    named_in,
    package_of,
    surroundings_of,
    unwrap,
)
from mlsbi.simulation.state import _NUMBERS, HELD, NAMESPACES, NESTED, SIMPLE, State

__all__ = ["describe_code", "strip_addresses"]

_DEPTH = 8  # how far functions are followed into those they use
_INCREMENTAL = 10_000  # elements of a list beyond which only a hash is made
_SHOWN = 20_000  # characters of values that are told in full, and not by their hash
_SHOWN_CODE = 1_000_000  # the same where they are functions
_MOST = 10_000_000  # elements of all containers that are looked at
_HASHED = 2**28  # bytes of a program that is hashed
_SYSTEM = {Path(name) for name in ("/bin", "/usr/bin", "/usr/local/bin")}
_OPTIONS = ("template", "parameters", "output", "read", "cwd", "env")  # those that a command's result depends on


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
        self.home = package_of(simulate)
        self.seen: dict[int, Any] = {}
        self.open: list[Any] = []  # containers that are being described
        self.told = 0  # elements of containers
        self.state = State(self.foreign)
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
        if isinstance(value, (*SIMPLE, torch.dtype, torch.device, PurePath, np.dtype)):
            return strip_addresses(repr(value) if isinstance(value, SIMPLE) else str(value))
        if isinstance(value, _NUMBERS):
            return repr(value)
        if id(value) in self.state.changed:
            return label_of(value)
        if isinstance(value, HELD) or (by_value and isinstance(value, Mapping)):
            return self._container(value, depth, by_value=by_value)
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            return f"{_array(value)} {self._container(value.tolist(), depth)}"
        if isinstance(value, (np.ndarray, Tensor)):
            return _array(value)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if depth <= 0 or id(value) in self.seen:
            return label_of(value)
        self.seen[id(value)] = value
        return self._thing(value, depth)

    def _container(self, value: Any, depth: int, *, by_value: bool = False) -> str:
        if len(self.open) >= NESTED or any(value is other for other in self.open):
            return label_of(value)
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
            return repr(part) if type(part) in SIMPLE else self.text(part, depth, by_value=by_value)

        kind, size = type(value).__name__, len(vars(value)) if isinstance(value, NAMESPACES) else len(value)
        self.told += size
        if self.told > _MOST:
            return f"{kind} of {size}"
        if isinstance(value, NAMESPACES):
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
        if unwrap(value) is not None and self.foreign(value):
            return f"{type(value).__name__} of\n{self.text(unwrap(value), depth)}"
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
            return label_of(function)
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
        defaults = sorted((each.name, each.default) for each in parameters if each.default is not each.empty)
        return (function_source(function) + self._list("default", defaults, depth - 1)
                + self._list("where", self._surroundings(function), depth - 1))

    def _class(self, kind: type, depth: int) -> str:
        if self.foreign(kind):
            return label_of(kind)
        values = {name: value for method in methods_of(kind) for name, value in self._surroundings(method)}
        values |= {name: value for name, value in vars(kind).items()
                   if isinstance(value, (*SIMPLE, *_NUMBERS, *HELD, np.ndarray, Tensor))
                   and not name.startswith("__") and (id(kind), name) not in self.state.places}
        values.pop(kind.__name__, None)
        bases = [(f"base {base.__name__}", base) for base in kind.__bases__ if base is not object]
        return class_source(kind) + self._list("where", [*bases, *sorted(values.items())], depth - 1)

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
            return label_of(value)
        slots = {name for base in kind.__mro__ for name, part in vars(base).items()
                 if isinstance(part, types.MemberDescriptorType) and hasattr(value, name)}
        code = getattr(called, "__code__", None)
        names = {*getattr(value, "__dict__", ()), *slots} - (set() if code is None else named_in(code, "STORE_ATTR"))
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
            return package != self.home and in_library(value.__code__.co_filename)
        kind = value if isinstance(value, type) else type(value)
        return str(kind.__module__).split(".")[0] != self.home and in_library(file_of_class(kind))

    def _surroundings(self, function: types.FunctionType) -> list[tuple[str, Any]]:
        """What a function reads of its surroundings, without the variables that are set meanwhile: they are state."""
        own = named_in(function.__code__, "STORE_GLOBAL", "STORE_DEREF") | {"__class__"}  # the last is that of super()
        return [(name, value) for name, value, place in sorted(surroundings_of(function), key=operator.itemgetter(0))
                if name not in own and place not in self.state.places]


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
