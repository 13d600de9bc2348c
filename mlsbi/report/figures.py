r"""The figures of a run, drawn from what it saved."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mlsbi import plots
from mlsbi.allocation.comparing import ErrorCurve
from mlsbi.data import MultilevelData
from mlsbi.inference.saving import read_model
from mlsbi.plots.failures import read_tries
from mlsbi.report.checking import worst_level
from mlsbi.report.html import read_results
from mlsbi.report.wording import Record, part, unit_of
from mlsbi.store.store import StoreError, find_stores, open_store
from mlsbi.training.history import History

__all__ = ["draw_figures"]

_DPI = 110


def draw_figures(folder: Path) -> list[Path]:
    r"""Draws every figure that a run's files allow into `folder/figures`.

    Of one strategy they are `coupled`, `pilot`, `plan`, `errors`, `losses`, `posterior`, `coverage` and `ranks`. Of
    several, `quality`, `coverage` and `posterior` show all; `losses-NAME` and `ranks-NAME` are about one, and so is
    `posterior-NAME` of the best. Where rows failed, `failures` maps those of the level that lost most; without a store
    that can be read there is no such figure, which the report then says.

    Args:
        folder: Folder of a run, with `results.json`, `data.npz`, a folder of each strategy, and the store.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: If the folder holds no finished run.
        ValueError: If its results are of another format.
    """
    results = read_results(folder)
    data = MultilevelData.load(folder / "data.npz")
    names = results["asked"]["parameters"]
    figures: dict[str, Figure] = {
        "coupled": plots.coupled(data, axis=results["observable"]["axis"], x_label=results["observable"]["label"],
                                 names=names),
    }
    if results["pilot"] is not None:
        table = results["pilot"]["table"]
        frame = pd.DataFrame(table["rows"], columns=table["columns"])
        frame.attrs["integrand"] = results["pilot"].get("integrand") or "loss"
        figures["pilot"] = plots.pilot(frame)
    if results["plan"] is not None:
        figures["plan"] = plots.plan(results["plan"])
        if (results["pilot"] or {}).get("curves"):
            figures["errors"] = _draw_errors(results)
    if results.get("sequential"):
        figures["rounds"] = _draw_rounds(folder, results)
    done = [record for record in results["strategies"] if not record["error"]]
    several = len(results["strategies"]) > 1
    levels: dict[str, Any] = {}
    box: dict[str, Any] | None = None
    for record in done:
        tail = f"-{record['name']}" if several else ""
        model, _ = read_model(folder / record["files"]["model"])
        box = model["prior"]  # of every strategy the same
        histories = [History.read(history) for history in model["histories"]]
        figures[f"losses{tail}"] = plots.losses(histories, names=list(data.names))
        if record["checks"] is not None:
            with np.load(folder / record["name"] / "checks.npz", allow_pickle=False) as arrays:
                levels[record["name"]] = arrays["hpd_levels"]
                figures[f"ranks{tail}"] = plots.ranks(arrays["ranks"], record["checks"]["draws"], names)
    if levels:
        figures["coverage"] = plots.coverage(levels)
    if several and levels:
        figures["quality"] = _quality(results, [record for record in done if record["checks"] is not None])
    drawn = [record for record in done if record["posterior"] is not None]
    if drawn:
        figures["posterior"] = _posterior(folder, results, drawn, box)
        best = part(results, "comparison").get("best")
        for record in drawn:
            if several and record["name"] == best:
                figures[f"posterior-{best}"] = _posterior(folder, results, [record], box)
    with contextlib.suppress(StoreError, OSError):
        figures |= _failures(folder, results, box)
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    written = []
    for name, figure in figures.items():
        figure.savefig(target / f"{name}.png", dpi=_DPI)
        written.append(target / f"{name}.png")
    return written


def _draw_rounds(folder: Path, results: Record) -> Figure:
    """How rounds closed in on the posterior."""
    known = results["files"].get("reference")
    with np.load(folder / "rounds.npz", allow_pickle=False) as arrays:
        return plots.rounds(
            results["sequential"]["rounds"], arrays["draws"], levels=[level["name"] for level in results["levels"]],
            names=results["asked"]["parameters"], exact=pd.read_csv(folder / known).to_numpy() if known else None,
        )


def _quality(results: Record, records: list[Record]) -> Figure:
    scores = [record["checks"]["nlpd"] for record in records]
    exact = records[0]["checks"]["reference_nlpd"]
    return plots.quality(
        [record["cost"] for record in records],
        [float(score["mean"]) for score in scores],
        [float(score["standard_error"]) for score in scores],
        names=[record["name"] for record in records],
        prior=float(records[0]["checks"]["prior_nlpd"]),
        exact=None if exact is None else float(exact),
        unit=unit_of(results),
    )


def _failures(folder: Path, results: Record, box: dict[str, Any] | None) -> dict[str, Figure]:
    """The map of failed rows, where there are any and the run kept its simulations."""
    level, store, rounds = worst_level(results), results["files"].get("store"), results["files"].get("rounds")
    if level is None or store is None:
        return {}
    stores = [folder / store, *(find_stores(folder / rounds) if rounds else [])]
    theta, failed = map(np.concatenate, zip(*(read_tries(open_store(path), level) for path in stores), strict=True))
    if not failed.any():  # repaired since
        return {}
    ends = {} if box is None else {"low": box["low"], "high": box["high"]}
    return {"failures": plots.failures(theta, failed, names=results["asked"]["parameters"], **ends)}


def _posterior(folder: Path, results: Record, records: list[Record], box: dict[str, Any] | None) -> Figure:
    """Draws of these strategies over each other, and of the exact posterior where it is known."""
    samples = {record["name"]: pd.read_csv(folder / record["files"]["samples"]).to_numpy() for record in records}
    named = results["files"].get("reference")
    labels = list(samples) if len(results["strategies"]) > 1 else ["this posterior"]
    return plots.pairs(
        samples,
        names=results["asked"]["parameters"],
        truth=records[0]["posterior"]["truth"],
        low=None if box is None else box["low"],
        high=None if box is None else box["high"],
        reference=pd.read_csv(folder / named).to_numpy() if named else None,
        labels=[*labels, "exact posterior"] if named else labels,
    )


def _draw_errors(results: dict[str, Any]) -> Figure:
    """Predicted error against the budget; numbers that JSON lacks were written as words."""
    pilot = results["pilot"]
    curves = [ErrorCurve(curve["label"], tuple(curve["levels"]), tuple(map(float, curve["budgets"])),
                         tuple(map(float, curve["errors"]))) for curve in pilot["curves"]]
    measure = " (nats, log scale)" if pilot["integrand"] == "loss" else " (log scale)"
    return plots.errors(curves, float(results["plan"]["cost"]), unit=unit_of(results),
                        label=f"standard error of the mean {pilot['integrand']}{measure}")
