r"""`mlsbi status`: what a store or the folder of a run holds, what went wrong there, and how to go on."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlsbi.cli.folders import KEPT, REQUEST, ROUNDS, STORE
from mlsbi.store.locking import find_holder
from mlsbi.store.store import Store, StoreError, find_stores, open_store

__all__ = ["describe", "draw_map"]

_MESSAGES = 5
_LONGEST = 200  # characters of a message
_AGREE = 2.0  # factor between declared and measured costs that is worth no word
_NUMBER = re.compile(r"(?<![A-Za-z_'])[-+]?\d+(\.\d*)?(e[-+]?\d+)?")
_RESULTS = "results.json"


def describe(folder: Path) -> str:
    r"""What a folder holds, in a table and in sentences.

    Args:
        folder: A store, or the folder of a run, finished or not.

    Raises:
        FileNotFoundError: If it is neither.
        StoreError: If the store in it cannot be opened.
    """
    asked, results = _read(folder / REQUEST), _read(folder / _RESULTS)
    finished = bool(results) and bool(results.get("complete", True))
    sections = []
    for store in _find_stores(folder):
        # Before the table: reading failed rows may find damage, which the table then shows.
        failed = list(_failures(store, finished=finished))
        sentences = [*_writing(store, finished=finished), *failed, *_damage(store), *_costs(store)]
        sections.append(str(store))
        sections.append("\n".join(f"- {sentence}" for sentence in sentences))
    if _is_run(folder):
        sections.append("\n".join(_run(folder, asked, results, finished=finished)))
    return "\n\n".join(sections)


def draw_map(folder: Path, target: Path) -> str:
    r"""Writes a map of failures over the prior, of the level with most failed rows.

    Args:
        folder: A store, or the folder of a run.
        target: File to write; its ending says which kind of picture.

    Returns:
        What was drawn, in a sentence.

    Raises:
        FileNotFoundError: If the folder is neither, or that of the picture does not exist.
        ValueError: If nothing failed, or there is no such kind of picture.
        StoreError: If a shard is damaged.
    """
    from mlsbi import plots
    from mlsbi.plots.failures import read_tries

    stores = _find_stores(folder)
    lost = [sum(failed) for failed in zip(*([failed for _, failed in _tries(store)] for store in stores), strict=True)]
    if not any(lost):
        raise ValueError(f"Expected failed rows to draw a map of; {folder} has none. Leave --map out.")
    level = lost.index(max(lost))
    theta, failed = map(np.concatenate, zip(*(read_tries(store, level) for store in stores), strict=True))
    plots.failures(theta, failed, names=stores[0].parameters).savefig(target, dpi=110)
    return f"Map of the failures of '{stores[0].names[level]}': {target}"


def _find_stores(folder: Path) -> list[Store]:
    """The store that a folder is or has, and those of its rounds."""
    store = _find_store(folder)
    rounds = [open_store(path) for path in find_stores(folder / ROUNDS)]
    return rounds if store is None else [store, *rounds]


def _find_store(folder: Path) -> Store | None:
    """The store that a folder is or has; `None` for a run without one."""
    if (folder / "store.json").is_file():
        return open_store(folder)
    if (folder / STORE).is_dir():
        return open_store(folder / STORE)
    if not _is_run(folder):
        raise FileNotFoundError(f"{folder} is neither a store of simulations (it has no store.json) nor the folder of "
                                f"a run (no {STORE}/, {REQUEST} or {_RESULTS}). Give what `mlsbi run --out` or "
                                "`simulate(..., store=...)` was given.")
    return None


def _is_run(folder: Path) -> bool:
    return (folder / REQUEST).is_file() or (folder / _RESULTS).is_file()


# The store


def _writing(store: Store, *, finished: bool) -> Iterator[str]:
    holder = find_holder(store.path / "lock")
    if holder is not None:
        yield f"A campaign is writing to the store ({holder}): these numbers grow. Reading disturbs nothing."
    elif finished:
        yield "Nobody is writing to the store now."
    else:
        yield "Nobody is writing to the store now; calling the same campaign again goes on where it was."


def _tries(store: Store) -> list[tuple[int, int]]:
    """Rows tried and rows failed by finest level, a pilot's and test rows included."""
    found = []
    for level in range(len(store.names)):
        streams = [stream for stream in store.streams if stream.levels[-1] == level]
        tried = sum(len(store.done(stream)) for stream in streams)
        found.append((tried, tried - sum(len(store.ok(stream)) for stream in streams)))
    return found


def _failures(store: Store, *, finished: bool) -> Iterator[str]:
    tries = _tries(store)
    if not any(failed for _, failed in tries):
        if any(tried for tried, _ in tries):
            yield "No row failed."
        return
    told = [f"{failed} of {tried} rows ({failed / tried:.1%}) of level '{name}'"
            for name, (tried, failed) in zip(store.names, tries, strict=True) if failed]
    yield (f"Failed, test rows and a pilot's included: {', '.join(told)}. What is learned without them holds for the "
           "part of the prior where simulations succeed; --map FILE.png draws which part fails.")
    try:
        reasons = _reasons(store)
    except StoreError:
        reasons = ["not all reasons can be read, because files are damaged"]
    yield "Why, most frequent first:" + "".join(f"\n    {reason}" for reason in reasons)
    if finished:
        return
    yield ("A campaign stops at failed rows unless told what to do: add --on-failure drop to go on with fewer rows, "
           "--on-failure redraw to have others run in their place, or --retry-failed to run them again once the "
           "simulator is mended (in Python on_failure= and retry_failed=).")


def _reasons(store: Store) -> list[str]:
    """The most frequent messages with their counts; those that differ in numbers alone are one."""
    frame = store.failures()
    alike: dict[tuple[str, str], list[str]] = {}
    for status, message in zip(frame["status"], frame["message"], strict=True):
        text = " ".join(message.split())
        alike.setdefault((status, _NUMBER.sub("#", text)), []).append(text)
    groups = sorted(alike.items(), key=lambda item: -len(item[1]))
    told = []
    for (status, _), texts in groups[:_MESSAGES]:
        example = textwrap.shorten(texts[0], _LONGEST, placeholder=" ...") or "no message"
        others = " (and the like, with other numbers)" if len(set(texts)) > 1 else ""
        told.append(f"{len(texts)} x {status}: {example}{others}")
    if len(groups) > _MESSAGES:
        rest = sum(len(texts) for _, texts in groups[_MESSAGES:])
        told.append(f"{rest} for {len(groups) - _MESSAGES} other reasons; open_store(...).failures() lists every row")
    return told


def _damage(store: Store) -> Iterator[str]:
    if store.damaged:
        command = f"import mlsbi; s = mlsbi.open_store({str(store.path)!r}); s.verify(); print(s.discard_damaged())"
        yield (f"Damaged: {', '.join(sorted(store.damaged))}. No campaign can go on before that is settled. Put back a "
               "copy of each file, or move them away, so that their rows are simulated again by the same command: "
               f"python -c {shlex.quote(command)}")


def _costs(store: Store) -> Iterator[str]:
    """Where levels are not as far apart in seconds as in declared cost."""
    declared, measured = store.manifest["costs"], store.costs
    for level in range(1, len(store.names) if declared is not None else 0):
        said = declared[level] / declared[level - 1]
        if not (measured[level] > 0 and measured[level - 1] > 0):  # NaN where a level was not run
            continue
        found = measured[level] / measured[level - 1]
        if max(said / found, found / said) > _AGREE:
            yield (f"Declared '{store.names[level]}' as {said:.3g} times '{store.names[level - 1]}', measured "
                   f"{found:.3g} times: {measured[level]:.3g} s a run against {measured[level - 1]:.3g} s. Plans split "
                   "a budget by what is declared; if seconds are what you pay, declare those.")


# The run


def _run(
    folder: Path, asked: Mapping[str, Any], results: Mapping[str, Any], *, finished: bool
) -> Iterator[str]:
    command = results.get("command") or (_command(asked, folder) if asked else "its command was not recorded")
    yield f"{'Finished' if finished else 'Unfinished'} run: {command}"
    records = {record["name"]: record for record in results.get("strategies") or []}
    names = list(asked.get("strategies") or (results.get("asked") or {}).get("strategies") or records)
    failed = [name for name in names if records.get(name, {}).get("error")]
    done = [name for name in names if (folder / name / KEPT).is_file() and name not in failed]
    left = [name for name in names if name not in done and name not in failed and not finished]
    for what, these in (("trained and checked", done), ("failed to train", failed), ("still to be trained", left)):
        if these:
            yield f"- {what}: {', '.join(these)}"
    if finished:
        yield f"- report: {folder / 'report.html'}"
    else:
        yield "- unless it is still running, the same command goes on where it was; what is done is not done again"


def _command(asked: Mapping[str, Any], folder: Path) -> str:
    """The command of a run that left no results yet, put together from what was asked."""
    parts = ["mlsbi", "run", str(asked.get("task"))]
    for key, flag in (("estimator", "estimator"), ("strategies", "strategy"), ("budget", "budget"), ("n", "n"),
                      ("pilot_rows", "pilot"), ("integrand", "integrand"), ("rounds", "rounds"),
                      ("observations", "observations"), ("ensemble", "ensemble"),
                      ("tests", "tests"), ("draws", "draws"), ("seed", "seed")):  # fmt: skip
        value = asked.get(key)
        if value is not None:
            parts += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else f"{value}"]
    for key, value in (asked.get("options") or {}).items():
        parts += ["--data", str(value)] if key == "data" else ["--option", f"{key}={json.dumps(value)}"]
    parts += ["--out", str(folder)]
    return shlex.join(parts) + (" --x-o FILE, the same observation" if asked.get("observation") else "")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). It was damaged; run again with --overwrite, which keeps the "
                         "simulations.") from error
    if not isinstance(found, dict):
        raise ValueError(f"Expected a JSON object in {path}; got {type(found).__name__}.")
    return found
