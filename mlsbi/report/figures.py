r"""The figures of a run, drawn from what it saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlsbi import plots
from mlsbi.data import MultilevelData
from mlsbi.inference.saving import read_model
from mlsbi.training.loop import History

__all__ = ["draw_figures"]

_DPI = 110


def draw_figures(folder: Path) -> list[Path]:
    r"""Draws every figure that a run's files allow into `folder/figures`.

    Args:
        folder: Folder of a run, with `results.json`, `data.npz` and `model`.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: If the folder holds no finished run.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"Expected the folder of a finished run; there is no {path}.")
    results = json.loads(path.read_text())
    data = MultilevelData.load(folder / "data.npz")
    model, _ = read_model(folder / "model")
    figures: dict[str, Any] = {
        "coupled": plots.coupled(data, axis=results["observable"]["axis"], x_label=results["observable"]["label"],
                                 names=results["posterior"]["names"]),
        "losses": plots.losses([History(**history) for history in model["histories"]], names=list(data.names)),
        "posterior": _posterior(folder, results, model["prior"]),
    }
    if results["pilot"] is not None:
        table = results["pilot"]["table"]
        figures["pilot"] = plots.pilot(pd.DataFrame(table["rows"], columns=table["columns"]))
    if results["plan"] is not None:
        figures["plan"] = plots.plan(results["plan"])
    if results["checks"] is not None:
        with np.load(folder / "checks.npz", allow_pickle=False) as arrays:
            figures["coverage"] = plots.coverage({results["asked"]["strategy"]: arrays["hpd_levels"]})
            figures["ranks"] = plots.ranks(arrays["ranks"], results["checks"]["draws"], results["posterior"]["names"])
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    written = []
    for name, figure in figures.items():
        figure.savefig(target / f"{name}.png", dpi=_DPI)
        written.append(target / f"{name}.png")
    return written


def _posterior(folder: Path, results: dict[str, Any], box: dict[str, Any] | None) -> Any:
    samples = pd.read_csv(folder / "posterior_samples.csv").to_numpy()
    named = results["files"].get("reference")
    return plots.pairs(
        samples,
        names=results["posterior"]["names"],
        truth=results["posterior"]["truth"],
        low=None if box is None else box["low"],
        high=None if box is None else box["high"],
        reference=pd.read_csv(folder / named).to_numpy() if named else None,
        labels=["this posterior", "exact posterior"] if named else None,
    )
