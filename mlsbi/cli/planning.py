r"""`mlsbi plan`: what a budget should buy, and what each level is worth, before anything but a pilot is spent."""

from __future__ import annotations

import argparse
import hashlib
import math
from importlib.util import find_spec
from pathlib import Path

from mlsbi import plots
from mlsbi.allocation.comparing import error_curves
from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.allocation.pilot_report import PilotReport
from mlsbi.allocation.piloting import pilot
from mlsbi.cli.folders import STORE
from mlsbi.cli.requests import FEWEST_ROWS
from mlsbi.cli.running import check_budget
from mlsbi.cli.targets import Target
from mlsbi.diagnostics import transfer
from mlsbi.diagnostics.information import FEWEST
from mlsbi.levels import LevelStack
from mlsbi.randomness import child_seed
from mlsbi.simulation.opening import accept_code

__all__ = ["plan"]


def plan(target: Target, options: argparse.Namespace, out: Path) -> None:
    r"""Runs a pilot, prints what it found and the plan, and draws both.

    Args:
        target: A task or a stack.
        options: Of the command line.
        out: Folder for the pilot's simulations and the figures.

    Raises:
        ValueError: If there is nothing to plan, or the budget does not reach beyond the pilot's own cost.
        ImportError: If verdicts are asked for and scikit-learn is not installed.
    """
    if target.stack is None:
        raise ValueError(f"'{target.name}' is a fixed data set: there is nothing to plan.")
    if options.verdict:
        _check_verdict(target.stack, options)
    if options.budget is not None:
        check_budget(target, options.budget, options.pilot)
    if options.accept_code and (out / STORE).exists():
        accept_code(out / STORE, target.stack)
    kind = options.estimator or target.estimator
    report = pilot(target.stack, options.pilot, seed=options.seed, estimator=kind, integrand=options.integrand,
                   **target.networks(kind), device=options.device, workers=options.workers, store=out / STORE,
                   on_failure=options.on_failure, retry_failed=options.retry_failed, progress=not options.quiet)
    print(f"{report}\n")
    repeats = report.n * sum(report.costs[:-1]) if options.verdict else 0.0
    _plan(report, options, out, repeats)
    if options.verdict:
        # Repeats belong to the very rows that the pilot left: with others there, the noise is drawn anew.
        rows = int.from_bytes(hashlib.sha256(report.theta.numpy().tobytes()).digest()[:7], "big")
        worth = transfer(target.stack, report, seed=child_seed(options.seed, rows), store=out / STORE,
                         workers=options.workers, on_failure="raise" if options.on_failure == "raise" else "drop",
                         retry_failed=options.retry_failed, progress=not options.quiet)
        print(f"\n{worth}")
    print("\nPilot rows, which `mlsbi run` goes on from when given the same --out, and figures pilot.png, plan.png, "
          f"errors.png: {out}")


def _check_verdict(stack: LevelStack, options: argparse.Namespace) -> None:
    """What a verdict needs, before anything is spent."""
    if find_spec("sklearn") is None:
        raise ImportError("--verdict needs scikit-learn, which is not installed: pip install mlsbi[metrics]")
    if len(stack) < 2:
        raise ValueError("Expected a stack of two levels at least beside --verdict, which is about cheap levels.")
    if options.pilot < FEWEST:
        raise ValueError(f"Expected --pilot of at least {FEWEST} beside --verdict; got {options.pilot}.")


def _plan(report: PilotReport, options: argparse.Namespace, out: Path, repeats: float) -> None:
    """Prints the plan of a budget, of which repeats for the verdict are taken, and draws it."""
    budget = options.budget
    if budget is not None and repeats:
        print(f"Of the budget, {repeats:.6g} go to repeats of the cheap levels for the verdict.")
        budget -= repeats
    chosen = optimal_allocation(report, budget=budget, target_variance=options.target_variance, minimum=FEWEST_ROWS,
                                weights=options.weights)
    budget = chosen.cost if budget is None else budget
    curves = error_curves(report, budget=budget, minimum=FEWEST_ROWS, weights=options.weights)
    print(f"{chosen}\n\nPredicted standard error of the mean {report.integrand} if {budget:.10g} went into rows alone, "
          "without a pilot:")
    width = max(len(curve.label) for curve in curves)
    for curve in curves:
        error = curve.errors[curve.budgets.index(budget)]
        print(f"  {curve.label:{width}s}  " + ("cannot be bought" if math.isnan(error) else f"{error:.4g}"))
    unit = "seconds" if report.cost_unit == "seconds" else "declared units"
    measure = " (nats, log scale)" if report.integrand == "loss" else " (log scale)"
    errors = plots.errors(curves, budget, unit=unit, label=f"standard error of the mean {report.integrand}{measure}")
    for name, figure in (("pilot", plots.pilot(report)), ("plan", plots.plan(chosen)), ("errors", errors)):
        figure.savefig(out / f"{name}.png", dpi=110)
