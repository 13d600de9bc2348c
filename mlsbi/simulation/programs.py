r"""External programs as levels, run once per row."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import string
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mlsbi.levels import map_noise
from mlsbi.simulation.adapters import as_output, run_rows

__all__ = ["Command", "CommandError", "command"]

Array = np.ndarray[Any, Any]

_FIELDS = ("seed", "input", "output")
_TAIL = 2000


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
        _check_options(self)
        _check_template(self)

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
        folder = Path(tempfile.mkdtemp(prefix="row-", dir=self.keep))
        kept = False
        try:
            return self._run_in(folder, np.asarray(theta), noise)
        except Exception:
            kept = self.keep is not None
            raise
        finally:
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)  # a file that cannot be removed is no reason to lose a row

    def __call__(self, theta: Any, noise: Any) -> Tensor:
        """Simulates n rows, `(n, ...)`; the first row that fails ends it with a `RuntimeError` that names it."""
        return run_rows(self, theta, noise)

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
        arguments = tuple(_render(part, values) for part in self.template)
        run = _Run(arguments, folder, kept=self.keep is not None)
        exit_code = self._execute(run)
        if exit_code:
            raise run.error(f"Expected '{arguments[0]}' to succeed; it {_ending(exit_code)}.", exit_code)
        result = self._result(run, Path(values["output"]) if "output" in used else None)
        return as_output(result, f"program '{arguments[0]}'")

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
            return _read_table(run.stdout) if path is None else _READERS[self.output](path)
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
            float64; tables have commas or spaces between numbers). Without `{output}`, and without `read`, a table is
            read from standard output.
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
        >>> import sys, torch
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
        for name, path in (("error", self.stderr), ("output", self.stdout)):  # some complain on standard output
            if text := _tail(path).strip():
                return f"{what}{kept} Its standard {name} ends with:\n{text}"
        return f"{what}{kept} It printed nothing."


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 4 * _TAIL, 0))
        return file.read().decode(errors="replace")[-_TAIL:]


def _ending(exit_code: int) -> str:
    if exit_code > 0:
        return f"ended with exit code {exit_code}"
    names = {each.value: each.name for each in signal.Signals}  # real-time signals have none
    return f"was killed by {names.get(-exit_code, f'signal {-exit_code}')} (exit code {exit_code})"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a program with everything it started; its group lives on as long as it is not waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # ended by itself meanwhile
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows has no process groups of this kind
            process.kill()
    process.wait()


def _check_options(self: Command) -> None:
    if not self.template or not all(isinstance(part, str) for part in self.template):
        raise ValueError(f"Expected a program and its arguments, all texts; got {list(self.template)!r}.")
    if len(set(self.parameters)) != len(self.parameters) or set(self.parameters) & set(_FIELDS):
        raise ValueError(f"Expected different parameter names, none of {list(_FIELDS)}; got {list(self.parameters)}.")
    if self.timeout is not None and not self.timeout > 0:
        raise ValueError(f"Expected a positive number of seconds as timeout, or None; got {self.timeout}.")
    if not self.output.startswith(".") or os.path.basename(self.output) != self.output:
        raise ValueError(f"Expected a suffix such as '.npy' as output; got {self.output!r}.")


def _check_template(self: Command) -> None:
    known, used = [*self.parameters, *_FIELDS], _fields(self.template)
    if unknown := sorted(used - set(known)):
        raise ValueError(f"Expected fields out of {known} in the template; got {unknown}. Double braces that are "
                         "meant literally: {{ }}.")
    unused = [name for name in self.parameters if name not in used and not name.startswith("_")]
    if unused and "input" not in used:
        raise ValueError(f"Expected every parameter in the template; {unused} are not. Add {{{unused[0]}}} or "
                         "{input}; start the name of a parameter that the program ignores with _.")
    if "output" in used and self.read is None and self.output not in _READERS:
        raise ValueError(f"Expected output to be one of {list(_READERS)}, or read= to read it; got {self.output!r}.")
    sample: dict[str, Any] = {name: 0.5 for name in self.parameters} | {"seed": 1, "input": "", "output": ""}
    for part in self.template:
        try:
            _render(part, sample)
        except ValueError as error:
            raise ValueError(f"Expected formats that suit their fields in {part!r}; got: {error}.") from error


def _render(part: str, values: Mapping[str, Any]) -> str:
    # Not str.format: it would read a name such as `a.b` as an attribute.
    texts = []
    for literal, name, form, conversion in string.Formatter().parse(part):
        value = "" if name is None else values[name]
        texts += [literal, format(repr(value) if conversion == "r" else value, form or "")]
    return "".join(texts)


def _fields(template: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for part in template:
        try:
            found |= {name for _, name, _, _ in string.Formatter().parse(part) if name is not None}
        except ValueError as error:
            raise ValueError(f"Expected fields such as {{name}} in {part!r}; got: {error}. Double braces that are "
                             "meant literally: {{ }}.") from error
    return found


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


def _read_table(path: Path) -> Array:
    lines = [line.split("#")[0] for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ValueError("no numbers.")
    return np.loadtxt(lines, delimiter="," if any("," in line for line in lines) else None, ndmin=1)


def _read_json(path: Path) -> Array:
    numbers = np.asarray(json.loads(path.read_text(encoding="utf-8")))
    if numbers.dtype.kind not in "biuf":
        raise ValueError("something else than numbers in lists of equal length.")
    return numbers.astype(np.float64)  # [1, 2] in one row, [1.5, 2] in the next


_READERS = {".npy": _read_npy, ".csv": _read_table, ".txt": _read_table, ".json": _read_json}
