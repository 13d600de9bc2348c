r"""Simulators that run one row at a time, as levels: a Python function of one sample, an external program."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mlsbi.levels import map_noise

__all__ = ["Command", "CommandError", "PerSample", "RowSimulator", "command", "noise_of_row", "per_sample"]

Array = np.ndarray[Any, Any]

_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64")
_FIELDS = ("seed", "input", "output")
_SUFFIXES = (".npy", ".csv", ".txt", ".json")
_TAIL = 2000


@runtime_checkable
class RowSimulator(Protocol):
    """A simulator whose rows run, and fail, one by one."""

    def run_row(self, theta: Array, noise: Any) -> Array:
        """Simulates one row: parameters `(D,)` and `noise_of_row(noise, row)` give an output of one fixed shape."""
        ...


def noise_of_row(noise: Any, row: int) -> Any:
    """One row of base noise, in numpy: the seed of `noise="seed"` as a plain number, a tuple or dict of rows as such.

    Args:
        noise: Tensor or array, or a tuple or dict of them, each `(n, ...)`.
        row: Which row.

    Example:
        >>> noise_of_row(torch.tensor([7, 8]), 1)
        8
        >>> noise_of_row({"u": torch.zeros(2, 3)}, 1)
        {'u': array([0., 0., 0.], dtype=float32)}
    """
    return map_noise(partial(_leaf_of_row, row), noise)


def _leaf_of_row(row: int, leaf: Any) -> Any:
    array = _as_array(leaf)
    if array.ndim == 1 and array.dtype.kind in "iu":
        return int(array[row])
    return array[row].copy()  # what a simulator does to its row stays there


@dataclass(frozen=True)
class PerSample:
    """A function of one sample as a level's `simulate`; made by `per_sample`.

    Args:
        function: `function(theta (D,), noise) -> x`, in numpy.
    """

    function: Callable[[Array, Any], Any]

    def run_row(self, theta: Array, noise: Any) -> Array:
        """Simulates one row.

        Raises:
            TypeError: If the function does not return real numbers.
            ValueError: If what it returns has no one shape.
        """
        return _as_output(self.function(theta, noise), f"function '{_name(self.function)}'")

    def __call__(self, theta: Any, noise: Any) -> Tensor:
        """Simulates n rows, `(n, ...)`; the first row that fails ends it with a `RuntimeError` that names it."""
        return _run_rows(self, theta, noise)

    def __reduce__(self) -> Any:
        # Under the decorator the function's own name means this object, which pickle refuses for the function.
        module, name = getattr(self.function, "__module__", None), getattr(self.function, "__qualname__", "<>")
        if module != "__main__" and "<" not in name:
            with contextlib.suppress(AttributeError):
                if attrgetter(name)(sys.modules.get(module or "")) is self:
                    return _import, (module, name)
        return type(self), (self.function,)


def per_sample(function: Callable[[Array, Any], Any]) -> PerSample:
    """Makes a level's `simulate` of a function of one sample; also a decorator.

    Rows run one by one, so that a row that fails leaves the others alone, and nothing needs to be vectorised.

    Args:
        function: `function(theta, noise) -> x`. Theta is an array `(D,)` in the prior's dtype; noise is one row, in
            numpy (a tuple or dict where the stack's noise is one, a plain int for `noise="seed"`). Returns an array, a
            list or a tensor of one fixed shape, or a number, which counts as shape `(1,)`.

    Raises:
        TypeError: If `function` cannot be called.

    Example:
        >>> @per_sample
        ... def walk(theta, seed):
        ...     return theta[0] * np.random.default_rng(seed).normal(size=3).cumsum()
        >>> walk(torch.ones(2, 1), torch.tensor([4, 5])).shape
        torch.Size([2, 3])
    """
    if not callable(function):
        raise TypeError(f"Expected a function of one sample, f(theta, noise); got {type(function).__name__}.")
    return PerSample(function)


class CommandError(RuntimeError):
    """A program that failed or gave no result.

    Args:
        message: What happened.
        exit_code: The program's exit code; minus the signal's number if a signal ended it.
        stderr: The last 2000 characters of its standard error.
        arguments: The program and its arguments.
    """

    def __init__(self, message: str, exit_code: int, stderr: str, arguments: tuple[str, ...]) -> None:
        super().__init__(message, exit_code, stderr, arguments)  # so that it can be pickled
        self.message, self.exit_code, self.stderr, self.arguments = message, exit_code, stderr, arguments

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True)
class Command:
    """An external program as a level's `simulate`; made by `command`, which tells what the fields are."""

    template: tuple[str, ...]
    parameters: tuple[str, ...]
    output: str = ".npy"
    read: Callable[[Path], Any] | None = None
    timeout: float | None = None
    cwd: str | None = None
    env: Mapping[str, str] | None = field(default=None, hash=False)
    keep: str | None = None

    def __post_init__(self) -> None:
        _check_command(self)

    def run_row(self, theta: Array, noise: Any) -> Array:
        """Runs the program once, in a directory of its own.

        Args:
            theta: Parameters, `(D,)`.
            noise: The row's seed, or its row of noise, which then reaches the program by `{input}` only.

        Raises:
            CommandError: If the program fails, or its result is missing or cannot be read.
            TimeoutError: If it runs past the time limit; it is then ended with all the processes it started.
            FileNotFoundError: If there is no such program.
            TypeError: If `{seed}` is used and noise is no seed, or the result is not made of real numbers.
        """
        if self.keep is not None:
            os.makedirs(self.keep, exist_ok=True)
        place = None if self.keep is None else os.path.abspath(self.keep)
        folder = Path(tempfile.mkdtemp(prefix="row-", dir=place))
        failed = False
        try:
            return self._run_in(folder, np.asarray(theta), noise)
        except Exception:
            failed = True
            raise
        finally:
            if not failed or self.keep is None:
                shutil.rmtree(folder, ignore_errors=True)  # a file that cannot be removed is no reason to lose a row

    def __call__(self, theta: Any, noise: Any) -> Tensor:
        """Simulates n rows, `(n, ...)`; the first row that fails ends it with a `RuntimeError` that names it."""
        return _run_rows(self, theta, noise)

    def _run_in(self, folder: Path, theta: Array, noise: Any) -> Array:
        if theta.shape != (len(self.parameters),):
            raise ValueError(f"Expected theta of shape ({len(self.parameters)},), one value for each of "
                             f"{list(self.parameters)}; got {theta.shape}.")
        values: dict[str, Any] = dict(zip(self.parameters, map(float, theta), strict=True))
        used = _fields(self.template)
        if "input" in used:
            (folder / "input.json").write_text(json.dumps({"parameters": values, **_json_noise(noise)}))
        if "seed" in used:
            values["seed"] = _check_row_seed(noise)
        values |= {"input": str(folder / "input.json"), "output": str(folder / f"output{self.output}")}
        run = _Run(tuple(_render(part, values) for part in self.template), folder, kept=self.keep is not None)
        exit_code = self._execute(run)
        if exit_code:
            raise run.error(f"Expected '{run.arguments[0]}' to succeed; it {_ending(exit_code)}.", exit_code)
        return _as_output(self._result(run, Path(values["output"]) if "output" in used else None),
                          f"program '{run.arguments[0]}'")

    def _execute(self, run: _Run) -> int:
        """Runs the program to its end. Files take what it prints: a full pipe would stop it."""
        cwd = str(run.folder) if self.cwd is None else os.path.abspath(self.cwd)
        if not os.path.isdir(cwd):
            raise FileNotFoundError(f"Expected cwd={self.cwd!r} to be a directory where the program runs.")
        env = None if self.env is None else {**os.environ, **self.env}
        with open(run.stdout, "wb") as stdout, open(run.stderr, "wb") as stderr:
            try:
                process = subprocess.Popen(run.arguments, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                                           cwd=cwd, env=env, start_new_session=True)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"Expected a program '{run.arguments[0]}' that this machine can start; there is none. Check PATH "
                    f"where the rows run, or give an absolute path: relative ones start at the program's directory, "
                    f"{'a fresh one' if self.cwd is None else cwd}."
                ) from error
            try:
                return process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                _kill_group(process)
                raise TimeoutError(run.explain(f"Expected '{run.arguments[0]}' to end within {self.timeout:g} s; it "
                                               "was ended with all the processes it started.")) from None
            except BaseException:
                _kill_group(process)
                raise

    def _result(self, run: _Run, path: Path | None) -> Any:
        if path is not None and not path.exists():
            raise run.error(f"Expected '{run.arguments[0]}' to write its result to {{output}}; it did not.", 0)
        if self.read is not None:
            return self.read(path or Path(self.cwd or run.folder))
        try:
            return _read_printed(run.stdout) if path is None else _READERS[self.output](path)
        except (OSError, EOFError, ValueError) as error:
            where = "its standard output" if path is None else f"its result, a {self.output} file,"
            raise run.error(f"Expected {where} to be numbers that can be read; got: {error} "
                            "Use read= for another format.", 0) from error


def command(
    template: Sequence[str | os.PathLike[str]],
    *,
    parameters: Sequence[str],
    output: str = ".npy",
    read: Callable[[Path], Any] | None = None,
    timeout: float | None = None,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    keep: str | os.PathLike[str] | None = None,
) -> Command:
    r"""Makes a level's `simulate` of an external program, run once per row.

    Args:
        template: Program and arguments, no shell between. Fields in braces are filled in: `{name}` a parameter in full
            precision, or as its format says, `{name:.6g}`; `{seed}` the row's seed, for stacks with `noise="seed"`;
            `{output}` the path of the file to write the result to; `{input}` the path of a JSON file with
            `parameters`, by name, and `seed` (or `noise`, nested lists). Literal braces are doubled; a `Path` is
            taken as it is.
        parameters: Names of theta's components, in order. A name that starts with `_` may go unused.
        output: Suffix of `{output}`, and the format: `.npy`, `.csv`, `.txt` or `.json` (the last three are read as
            float64). Without `{output}`, and without `read`, numbers are read from standard output.
        read: `read(path) -> array` for other formats; path is `{output}`, or without `{output}` the program's
            directory.
        timeout: Seconds that a row may take; `None` for no limit.
        cwd: The program's directory, where relative paths in the template start; a fresh one for each row when left
            out, removed afterwards.
        env: Added to the environment.
        keep: Where to keep the directory of rows that failed.

    Raises:
        TypeError: If the template is one string.
        ValueError: If the template is empty or malformed, has unknown fields, or leaves parameters unused.

    Example:
        >>> simulate = command([sys.executable, "-c", "print({rate} * 2, {seed})"], parameters=["rate"])
        >>> simulate(torch.tensor([[0.5]]), torch.tensor([3]))
        tensor([[1., 3.]], dtype=torch.float64)
    """
    if isinstance(template, (str, os.PathLike)):
        raise TypeError(f"Expected the program and its arguments as a list; got {template!r}. Pass a list such as "
                        "['prog', '{rate}', '{output}']: there is no shell that would split it.")
    if isinstance(parameters, str):
        raise TypeError(f"Expected a list of parameter names; got the text {parameters!r}.")
    parts = tuple(
        os.fspath(part).replace("{", "{{").replace("}", "}}") if isinstance(part, os.PathLike) else part
        for part in template
    )
    return Command(
        template=parts, parameters=tuple(parameters), output=output, read=read, timeout=timeout,
        cwd=None if cwd is None else os.fspath(cwd), env=None if env is None else dict(env),
        keep=None if keep is None else os.path.abspath(keep),
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """One start of a program: what is known to tell when it goes wrong."""

    arguments: tuple[str, ...]
    folder: Path
    kept: bool

    @property
    def stdout(self) -> Path:
        return self.folder / "stdout.txt"

    @property
    def stderr(self) -> Path:
        return self.folder / "stderr.txt"

    def error(self, what: str, exit_code: int) -> CommandError:
        return CommandError(self.explain(what), exit_code, _tail(self.stderr), self.arguments)

    def explain(self, what: str) -> str:
        kept = f" Its files are kept in {self.folder}." if self.kept else ""
        said = [(name, _tail(path).strip()) for name, path in (("error", self.stderr), ("output", self.stdout))]
        name, text = next((pair for pair in said if pair[1]), ("", ""))  # some programs complain on standard output
        return what + kept + (f" Its standard {name} ends with:\n{text}" if name else " It printed nothing.")


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 4 * _TAIL, 0))
        return file.read().decode(errors="replace")[-_TAIL:]


def _ending(exit_code: int) -> str:
    if exit_code > 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name} (exit code {exit_code})"
    except ValueError:
        return f"was killed by signal {-exit_code} (exit code {exit_code})"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a program with everything it started; its group lives on as long as it is not waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # ended by itself meanwhile
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows has no process groups of this kind
            process.kill()
    process.wait()


def _check_command(self: Command) -> None:
    if not self.template or not all(isinstance(part, str) for part in self.template):
        raise ValueError(f"Expected a program and its arguments, all texts; got {list(self.template)!r}.")
    if len(set(self.parameters)) != len(self.parameters) or set(self.parameters) & set(_FIELDS):
        raise ValueError(f"Expected different parameter names, none of {list(_FIELDS)}; got {list(self.parameters)}.")
    if self.timeout is not None and not self.timeout > 0:
        raise ValueError(f"Expected a positive number of seconds as timeout, or None; got {self.timeout}.")
    if not self.output.startswith(".") or os.path.basename(self.output) != self.output:
        raise ValueError(f"Expected a suffix such as '.npy' as output; got {self.output!r}.")
    known = (*self.parameters, *_FIELDS)
    used = _fields(self.template)
    if unknown := sorted(used - set(known)):
        raise ValueError(f"Expected fields out of {list(known)} in the template; got {unknown}. Double braces that are "
                         "meant literally: {{ }}.")
    unused = [name for name in self.parameters if name not in used and not name.startswith("_")]
    if unused and "input" not in used:
        raise ValueError(f"Expected every parameter in the template; {unused} are not. Add {{{unused[0]}}} or "
                         "{input}; start the name of a parameter that the program ignores with _.")
    if "output" in used and self.read is None and self.output not in _SUFFIXES:
        raise ValueError(f"Expected output to be one of {list(_SUFFIXES)}, or read= to read it; got {self.output!r}.")
    sample: dict[str, Any] = {name: 0.5 for name in self.parameters} | {"seed": 1, "input": "", "output": ""}
    for part in self.template:
        try:
            _render(part, sample)
        except ValueError as error:
            raise ValueError(f"Expected formats that suit their fields in {part!r}; got: {error}.") from error


def _parse(part: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(part))
    except ValueError as error:
        raise ValueError(f"Expected fields such as {{name}} in {part!r}; got: {error}. Double braces that are meant "
                         "literally: {{ }}.") from error


def _fields(template: Sequence[str]) -> set[str]:
    return {name for part in template for _, name, _, _ in _parse(part) if name is not None}


def _render(part: str, values: Mapping[str, Any]) -> str:
    # Not str.format: it would read a name such as `a.b` as an attribute.
    texts = []
    for literal, name, form, conversion in _parse(part):
        value = "" if name is None else values[name]
        texts += [literal, format(repr(value) if conversion == "r" else value, form or "")]
    return "".join(texts)


def _check_row_seed(noise: Any) -> int:
    if isinstance(noise, bool) or not isinstance(noise, (int, np.integer)):
        raise TypeError(f"Expected one seed a row for {{seed}}; got noise of type {type(noise).__name__}. Declare the "
                        'stack with noise="seed", or read the noise from {input}.')
    return int(noise)


def _json_noise(noise: Any) -> dict[str, Any]:
    if isinstance(noise, (int, np.integer)):
        return {"seed": int(noise)}
    return {"noise": map_noise(lambda leaf: np.asarray(leaf).tolist(), noise)}


def _read_npy(path: Path) -> Array:
    with open(path, "rb") as file:  # np.load would take other formats as well
        return np.lib.format.read_array(file, allow_pickle=False)


def _read_table(text: str, delimiter: str | None) -> Array:
    lines = [line for line in text.splitlines() if line.split("#")[0].strip()]
    if not lines:
        raise ValueError("no numbers.")
    return np.loadtxt(lines, delimiter=delimiter, ndmin=1)


def _read_printed(path: Path) -> Array:
    text = path.read_text(encoding="utf-8")
    return _read_table(text, "," if "," in text else None)


def _read_json(path: Path) -> Array:
    numbers = np.asarray(json.loads(path.read_text(encoding="utf-8")))
    if numbers.dtype.kind not in "biuf":
        raise ValueError("something else than numbers in lists of equal length.")
    return numbers.astype(np.float64)  # [1, 2] in one row, [1.5, 2] in the next


_READERS: dict[str, Callable[[Path], Array]] = {
    ".npy": _read_npy,
    ".csv": lambda path: _read_table(path.read_text(encoding="utf-8"), ","),
    ".txt": lambda path: _read_table(path.read_text(encoding="utf-8"), None),
    ".json": _read_json,
}


def _run_rows(simulator: RowSimulator, theta: Any, noise: Any) -> Tensor:
    thetas = _as_array(theta)
    if thetas.ndim != 2 or len(thetas) == 0:
        raise ValueError(f"Expected theta of shape (n, D), at least one row; got {thetas.shape}.")
    outputs: list[Array] = []
    for row in range(len(thetas)):
        try:
            outputs.append(simulator.run_row(thetas[row].copy(), noise_of_row(noise, row)))
        except Exception as error:
            raise RuntimeError(f"Row {row}, theta {thetas[row].tolist()}, failed: {type(error).__name__}: "
                               f"{error}") from error
        if outputs[row].shape != outputs[0].shape:
            raise ValueError(f"Expected every row to have one shape; row 0 has {outputs[0].shape}, row {row} has "
                             f"{outputs[row].shape}.")
    return torch.from_numpy(np.stack(outputs))


def _as_array(values: Any) -> Array:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _as_output(output: Any, who: str) -> Array:
    """A copy of a row's output: what gave it may use its memory again for the next row."""
    try:
        array = np.array(_as_array(output))
    except ValueError as error:
        raise ValueError(f"Expected {who} to return numbers of one shape; got {type(output).__name__}: "
                         f"{error}") from error
    if array.dtype.kind == "c":
        raise TypeError(f"Expected {who} to return real numbers; got complex ones. Return real and imaginary parts as "
                        "separate outputs.")
    if array.dtype.name not in _DTYPES:
        raise TypeError(f"Expected {who} to return numbers, of one of the types {', '.join(_DTYPES)}; got "
                        f"{array.dtype.name} ({type(output).__name__}).")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array[None] if array.ndim == 0 else array


def _import(module: str, name: str) -> Any:
    return attrgetter(name)(importlib.import_module(module))


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
