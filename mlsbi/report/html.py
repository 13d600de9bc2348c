r"""Writes the report of a run: one HTML file that is read from top to bottom."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mlsbi.report import comparing, rounds, sections, strategies
from mlsbi.report.elements import page

__all__ = ["read_results", "write_report"]

_FORMAT = 2


def write_report(folder: str | os.PathLike[str]) -> Path:
    r"""Writes `report.html` from `results.json` and `figures/*.png` of a run.

    The page holds its images and style, asks the network for nothing and runs no script.

    Args:
        folder: Where `mlsbi run` left its results.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError: If there is no `results.json` in the folder.
        ValueError: If it is not a JSON object, or of another format.
    """
    root = Path(folder)
    results = read_results(root)
    figures = root / "figures"
    task = (results.get("asked") or {}).get("task", "a run")
    text = page(
        f"mlsbi report: {task}",
        sections.opening(results),
        sections.asked(results, figures),
        sections.plan(results, figures),
        sections.spent(results, figures),
        rounds.told(results, figures),
        comparing.compared(results, figures),
        *strategies.described(results, figures),
        sections.reproduce(results),
    )
    target = root / "report.html"
    partial = root / f"report.html.{os.getpid()}.partial"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
    return target


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a run's `results.json`.

    Raises:
        FileNotFoundError: If there is none in the folder.
        ValueError: If it is not a JSON object, or of another format.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"No results.json in '{folder}': it is not the folder of a finished run. Give the one "
                                "that `mlsbi run ... --out` wrote.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not JSON ({error}). Run again to write it anew.") from error
    if not isinstance(results, dict):
        raise ValueError(f"Expected a JSON object in '{path}'; got {type(results).__name__}.")
    version = int(results.get("format", _FORMAT))
    if version > _FORMAT:
        raise ValueError(f"'{path}' has format {version}; this version reads format {_FORMAT}. Upgrade mlsbi to read "
                         "it.")
    if version < _FORMAT:
        raise ValueError(f"'{path}' has format {version}, from before strategies could be compared; this version reads "
                         f"format {_FORMAT}. Run again with --overwrite, or read it with the mlsbi that wrote it.")
    return results
