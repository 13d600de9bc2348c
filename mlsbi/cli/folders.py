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
from mlsbi.simulation.opening import OtherStackError, store_for
from mlsbi.strategies.registry import strategy_names

__all__ = ["KEPT", "REQUEST", "STORE", "begin", "read_kept", "write_json"]

STORE = "store"
"""Folder of the simulations, in that of a run."""

REQUEST = "request.json"
"""What was asked for, written before anything is spent."""

KEPT = "record.json"
"""What a finished strategy adds to the results, in its folder."""

_FREE = ("out", "command", "workers", "on_failure", "retry_failed", "overwrite", "progress", "say", "device", "x_o")


def begin(target: Target, request: RunRequest, say: Any) -> None:
    r"""Makes a run's folder ready: empty, or as an interrupted run of the same request left it.

    Args:
        target: What is run.
        request: How; with `overwrite` an earlier run's results are removed. Its simulations are used again, or moved
            aside when they are another stack's.
        say: Is told what is found.

    Raises:
        ValueError: If the folder holds a finished run, or an unfinished one of another request.
        StoreError: If its store is another stack's.
    """
    out = request.out
    asked = _describe(target, request)
    if not request.overwrite:
        _check_folder(out, asked)
    goes_on = not request.overwrite and (out / REQUEST).is_file()
    if target.stack is not None and (out / STORE).exists():
        try:
            store_for(target.stack, out / STORE)
        except OtherStackError:
            if not request.overwrite:
                raise
            aside = next(path for path in (out / f"{STORE}-{k}" for k in range(1, 10**6)) if not path.exists())
            os.rename(out / STORE, aside)
            say(f"The simulations of another stack that were here are in {aside}.")
    if goes_on:
        say(f"Going on with the run in {out}.")
        return
    _clear(out, request.strategies)
    write_json(out / REQUEST, asked)


def read_kept(folder: Path, digest: str) -> tuple[dict[str, Any], np.ndarray[Any, Any]] | None:
    """What an earlier call recorded of a strategy, with its test scores, if it was given the same data."""
    if not (folder / KEPT).is_file():
        return None
    kept = json.loads((folder / KEPT).read_text())
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
    asked |= {"task": target.name, "options": target.options}
    if request.x_o is not None:
        asked["observation"] = hashlib.sha256(request.x_o.read_bytes()).hexdigest()
    plain: dict[str, Any] = json.loads(json.dumps(_plain(asked)))
    return plain


def _check_folder(out: Path, asked: Mapping[str, Any]) -> None:
    if (out / "results.json").is_file() and json.loads((out / "results.json").read_text()).get("complete", True):
        raise ValueError(f"{out} holds a finished run. Give another --out, or --overwrite.")
    if not (out / REQUEST).is_file():
        kept = [name for name in ("results.json", "data.npz", "pilot.npz") if (out / name).exists()]
        if kept:
            raise ValueError(f"{out} holds {', '.join(kept)} of an earlier run. Give another --out, or --overwrite.")
        return
    before = json.loads((out / REQUEST).read_text())
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
                  out / name / "checks.npz", out / name / KEPT]
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
