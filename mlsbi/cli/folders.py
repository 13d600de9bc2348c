r"""The folder of a run: what makes it the same run when it is called again, and what an earlier one left."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mlsbi.cli.requests import RunRequest
from mlsbi.cli.targets import Target
from mlsbi.levels import LevelStack
from mlsbi.simulation.opening import OtherStackError, accept_code, store_for
from mlsbi.store.store import StoreError, open_store
from mlsbi.strategies.registry import strategy_names

__all__ = ["KEPT", "REQUEST", "ROUNDS", "STORE", "TRAINING", "begin", "is_finished", "is_same", "read_kept",
           "write_json"]

ROUNDS = "rounds"
"""Folder of the networks of rounds for one observation, and of the later ones' simulations, in that of a run."""

STORE = "store"
"""Folder of the simulations, in that of a run."""

REQUEST = "request.json"
"""What was asked for, written before anything is spent."""

KEPT = "record.json"
"""What a finished strategy adds to the results, in its folder."""

TRAINING = "training"
"""Where an unfinished strategy keeps the state of its training, in its folder."""

_FREE = ("out", "command", "workers", "on_failure", "retry_failed", "accept_code", "overwrite", "progress", "say",
         "device", "x_o")


def begin(target: Target, request: RunRequest, say: Any) -> None:
    r"""Makes a run's folder ready: empty, or as an interrupted run of the same request left it.

    Args:
        target: What is run.
        request: How; with `overwrite` an earlier run's results are removed. Its simulations are used again, or moved
            aside when they are another stack's.
        say: Is told what is found.

    Raises:
        ValueError: If the folder holds a finished run, or an unfinished one of another request.
        StoreError: If its store is another stack's, is being written, or is damaged.
    """
    out = request.out
    asked = _describe(target, request)
    if not request.overwrite:
        _check_folder(out, asked)
    aside = None
    if target.stack is not None and (out / STORE / "store.json").exists():
        aside = _check_store(target.stack, out / STORE, request)
    if aside is not None:
        say(f"The simulations of another stack that were here are in {aside}.")
    if not request.overwrite and (out / REQUEST).is_file():
        say(f"Going on with the run in {out}.")
        return
    _clear(out, request.strategies)
    write_json(out / REQUEST, asked)


def _check_store(stack: LevelStack, folder: Path, request: RunRequest) -> Path | None:
    """Sees to it that a store can be used, before anything of an earlier run is removed; where it was moved to."""
    with open_store(folder).writing():  # nobody else is
        pass
    if request.accept_code:
        accept_code(folder, stack)
    try:
        store = store_for(stack, folder)
    except OtherStackError:
        if not request.overwrite:
            raise
        aside = next(path for path in (folder.with_name(f"{STORE}-{k}") for k in range(1, 10**6)) if not path.exists())
        with open_store(folder).writing():
            os.rename(folder, aside)
        return aside
    if store.damaged:
        told = "; ".join(f"{name}: {why}" for name, why in sorted(store.damaged.items()))
        raise StoreError(f"Files of {folder} are damaged: {told} See `mlsbi status {folder.parent}`.")
    return None


def read_kept(folder: Path, digest: str) -> tuple[dict[str, Any], np.ndarray[Any, Any]] | None:
    """What an earlier call recorded of a strategy, with its test scores, if it was given the same data."""
    if not (folder / KEPT).is_file():
        return None
    try:
        kept = json.loads((folder / KEPT).read_text())
    except ValueError:  # damaged: the strategy is trained again
        return None
    if kept["data"] != digest:
        return None
    scores = np.empty(0)
    if (folder / "checks.npz").is_file():
        with np.load(folder / "checks.npz", allow_pickle=False) as arrays:
            scores = arrays["log_q"]
    return kept["record"], scores


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_plain(content), indent=1))
    os.replace(partial, path)


def _describe(target: Target, request: RunRequest) -> dict[str, Any]:
    """What a run's result follows from, JSON-ready."""
    asked = {key: value for key, value in asdict(request).items() if key not in _FREE}
    asked |= {"task": os.path.abspath(target.name) if ":" in target.name else target.name, "options": target.options}
    if request.x_o is not None:
        asked["observation"] = hashlib.sha256(request.x_o.read_bytes()).hexdigest()
    plain: dict[str, Any] = json.loads(json.dumps(_plain(asked)))
    return plain


def is_finished(out: Path) -> bool:
    """Whether a folder holds a run that came to its end."""
    return (out / "results.json").is_file() and bool(_read(out / "results.json").get("complete", True))


def is_same(target: Target, request: RunRequest) -> bool:
    """Whether a folder holds a run of this very request."""
    return (request.out / REQUEST).is_file() and _read(request.out / REQUEST) == _describe(target, request)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Give another --out, or --overwrite.") from error
    return content


def _check_folder(out: Path, asked: Mapping[str, Any]) -> None:
    if is_finished(out):
        raise ValueError(f"{out} holds a finished run of another request. Give another --out, or --overwrite, which "
                         "uses its simulations again where they fit.")
    if not (out / REQUEST).is_file():
        kept = [name for name in ("results.json", "data.npz", "pilot.npz") if (out / name).exists()]
        if kept:
            raise ValueError(f"{out} holds {', '.join(kept)} of an earlier run. Give another --out, or --overwrite.")
        return
    before = _read(out / REQUEST)
    changed = [f"{key}: {before.get(key)!r}, now {asked.get(key)!r}" for key in sorted({*before, *asked})
               if before.get(key) != asked.get(key)]
    if changed:
        raise ValueError(f"{out} holds an unfinished run of another request ({'; '.join(changed)}). Call that one "
                         "again to go on with it, give another --out, or --overwrite.")


def _clear(out: Path, strategies: Sequence[str]) -> None:
    """Removes what an earlier run left, so that nothing of it is taken for this one's."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (REQUEST, "results.json", "report.html", "data.npz", "reference_samples.csv"):
        (out / name).unlink(missing_ok=True)
    found = list(out.glob("figures/*.png"))
    for name in {*strategies, *strategy_names()}:
        found += [*(out / name).glob("model/model.*"), out / name / "posterior_samples.csv",
                  out / name / "checks.npz", out / name / KEPT, *(out / name / TRAINING).glob("*/training*")]
    for path in found:
        path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """JSON-ready content; numbers that JSON lacks become words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Path):
        return str(value)
    return value
