r"""Shared by the experiments: resumable cells and small result files that say where they come from."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("mlsbi", "torch", "nflows", "numpy")


def provenance() -> dict[str, Any]:
    """Versions, commit and size of the machine that a result was measured with."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "../mlsbi", "../theory_checks", "."],
        cwd=here, capture_output=True, text=True, check=True,
    )
    return {
        "commit": commit.stdout.strip(),
        "uncommitted": [line for line in changed.stdout.splitlines() if "results/" not in line],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "cores": os.cpu_count(),
    }


def resume_cell(folder: Path, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of one cell of an experiment, read if an earlier run at the same commit finished it."""
    path, commit = folder / f"{key}.json", provenance()["commit"]
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept.get("commit") == commit:
            return kept["result"]
    result = compute()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"commit": commit, "result": result}))
    os.replace(partial, path)
    return result


def keep_cell(folder: Path, key: str, version: Any, result: dict[str, Any]) -> None:
    """Writes one cell, whole or not at all, for as long as `version` stands."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{key}.{os.getpid()}.partial"
    partial.write_text(json.dumps({"version": version, "result": result}))
    os.replace(partial, folder / f"{key}.json")


def read_cell(folder: Path, key: str, version: Any) -> dict[str, Any] | None:
    """A cell that `keep_cell` wrote under the same version; `None` where there is none."""
    path = folder / f"{key}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    return kept["result"] if kept.get("version") == version else None


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Mean, its standard error, standard deviation and median over seeds."""
    spread = statistics.stdev(values)
    return {"mean": statistics.mean(values), "standard_error": spread / math.sqrt(len(values)), "sd": spread,
            "median": statistics.median(values)}


def write_result(name: str, content: dict[str, Any], *, compact: str | None = None) -> Path:
    """Writes `experiments/results/<name>.json`, provenance included; what `compact` names comes last, in one line."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    rest = {key: value for key, value in content.items() if key != compact}
    text = json.dumps({**rest, "provenance": provenance()}, indent=1)
    if compact is not None:
        text = f'{text[:-2]},\n "{compact}": {json.dumps(content[compact])}\n}}'
    path.write_text(text + "\n")
    return path
