r"""`mlsbi plan`: what a budget should buy, and what each level is worth, before anything but a pilot is spent."""

from __future__ import annotations

import argparse
import math
from importlib.util import find_spec
from pathlib import Path

from mlsbi import plots
from mlsbi.allocation.comparing import error_curves
from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.allocation.piloting import pilot
from mlsbi.cli.folders import STORE
from mlsbi.cli.requests import FEWEST_ROWS
from mlsbi.cli.running import check_budget
from mlsbi.cli.targets import Target
from mlsbi.diagnostics import transfer
from mlsbi.diagnostics.information import FEWEST
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
    if options.budget is not None:
        check_budget(target, options.budget, options.pilot)
    if options.accept_code and (out / STORE).exists():
        accept_code(out / STORE, target.stack)
    if options.verdict and find_spec("sklearn") is None:
        raise ImportError("--verdict needs scikit-learn, which is not installed: pip install mlsbi[metrics]")
    if options.verdict and options.pilot < FEWEST:
        raise ValueError(f"Expected --pilot of at least {FEWEST} beside --verdict; got {options.pilot}.")
    kind = options.estimator or target.estimator
    report = pilot(target.stack, options.pilot, seed=options.seed, estimator=kind, integrand=options.integrand,
                   **target.networks(kind), device=options.device, workers=options.workers, store=out / STORE,
                   on_failure=options.on_failure, retry_failed=options.retry_failed, progress=not options.quiet)
    chosen = optimal_allocation(report, budget=options.budget, target_variance=options.target_variance,
                                minimum=FEWEST_ROWS, weights=options.weights)
    budget = chosen.cost if options.budget is None else options.budget
    curves = error_curves(report, budget=budget, minimum=FEWEST_ROWS, weights=options.weights)
    print(f"{report}\n\n{chosen}\n\nPredicted standard error of the mean {report.integrand} if {budget:.10g} went "
          "into rows alone, without a pilot:")
    width = max(len(curve.label) for curve in curves)
    for curve in curves:
        error = curve.errors[curve.budgets.index(budget)]
        print(f"  {curve.label:{width}s}  " + ("cannot be bought" if math.isnan(error) else f"{error:.4g}"))
    if options.verdict:
        worth = transfer(target.stack, report, seed=options.seed, store=out / STORE, workers=options.workers,
                         on_failure="raise" if options.on_failure == "raise" else "drop",
                         retry_failed=options.retry_failed, progress=not options.quiet)
        print(f"\n{worth}")
    unit = "seconds" if report.cost_unit == "seconds" else "declared units"
    measure = " (nats, log scale)" if report.integrand == "loss" else " (log scale)"
    errors = plots.errors(curves, budget, unit=unit, label=f"standard error of the mean {report.integrand}{measure}")
    figures = (plots.pilot(report), plots.plan(chosen), errors)
    for name, figure in zip(("pilot", "plan", "errors"), figures, strict=True):
        figure.savefig(out / f"{name}.png", dpi=110)
    print("\nPilot rows, which `mlsbi run` goes on from when given the same --out, and figures pilot.png, plan.png, "
          f"errors.png: {out}")
