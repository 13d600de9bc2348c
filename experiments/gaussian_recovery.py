r"""Posteriors and likelihoods of an affine-Gaussian stack against the closed form, for all strategies.

Three parameters, four outputs, two levels whose matrices and shifts differ, 50 000 rows and as many pairs: plenty.
Draws are compared with the exact posterior of the level that a strategy learns: the low level's for "low", which as a
control is compared with the high level's too. NPE sees one output, NLE five independent ones.

    python experiments/gaussian_recovery.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from runner import resume_cell, summarise, write_result
from torch import Tensor
from torch.distributions import MultivariateNormal

from mlsbi import MDN, NLE, NPE, Level, LevelStack, TrainingOptions, simulate
from mlsbi.diagnostics import c2st
from mlsbi.simulation.sets import simulate_sets
from mlsbi.store.records import TEST_STREAM

STRATEGIES = ("multilevel", "transfer", "high", "low")
ROWS, DRAWS, OBSERVATIONS, SET = (50_000, 50_000), 2000, 3, 5
MATRIX = torch.tensor([[1.0, 0.0, 0.3], [0.5, 1.0, 0.0], [0.0, -1.0, 0.5], [0.2, 0.2, 1.0]])
CHANGE = torch.tensor([[0.2, 0.0, 0.0], [0.0, -0.2, 0.0], [0.0, 0.0, 0.3], [0.0, 0.1, 0.0]])
SHIFT = torch.tensor([0.4, -0.3, 0.2, 0.0])
NOISE = 0.7
TRAINING = TrainingOptions(learning_rate=1e-3, epochs=400, patience=30)
DENSITY = MDN(components=1, hidden=8, layers=1)  # a Gaussian whose parameters are a network of the condition


def low(theta: Tensor, noise: Tensor) -> Tensor:
    """The cheap level: another matrix and a shift."""
    return theta @ (MATRIX + CHANGE).T + SHIFT + NOISE * noise


def high(theta: Tensor, noise: Tensor) -> Tensor:
    """The fine level."""
    return theta @ MATRIX.T + NOISE * noise


STACK = LevelStack(
    prior=MultivariateNormal(torch.zeros(3), torch.eye(3)),
    noise=lambda n, generator: torch.randn(n, 4, generator=generator),
    levels=[Level("low", low, cost=1.0), Level("high", high, cost=100.0)],
)


def exact(x: Tensor, level: str) -> MultivariateNormal:
    """The posterior given independent outputs x (m, 4) of a level."""
    matrix, shift = (MATRIX + CHANGE, SHIFT) if level == "low" else (MATRIX, torch.zeros(4))
    precision = torch.eye(3) + len(x) * matrix.T @ matrix / NOISE**2
    mean = torch.linalg.solve(precision, matrix.T @ (x - shift).sum(0) / NOISE**2)
    return MultivariateNormal(mean, precision_matrix=precision)


def run_cell(kind: str, strategy: str, seed: int) -> dict[str, Any]:
    """Trains one estimator and compares its posterior at some observations."""
    data = simulate(STACK, ROWS, seed=seed, progress=False)
    estimator = (NPE if kind == "npe" else NLE)(STACK.prior, strategy=strategy, density=DENSITY, training=TRAINING,
                                                seed=seed)
    estimator.fit(data, progress=False)
    _, sets = simulate_sets(STACK, -1, OBSERVATIONS, 1 if kind == "npe" else SET, seed=seed, stream=TEST_STREAM)
    level = "low" if strategy == "low" else "high"
    rows: list[dict[str, float]] = []
    for index, x in enumerate(sets):
        posterior = estimator.posterior(x)
        drawn, truth = posterior.sample((DRAWS,), seed=index), exact(x, level)
        expected = truth.sample((DRAWS,))
        # Monte Carlo errors of the mean and the standard deviation of independent draws.
        chains = getattr(posterior, "convergence", ())
        effective = min(min(chains[0].effective), DRAWS) if chains else DRAWS
        sd = truth.variance.sqrt()
        mean_error, sd_error = (drawn.mean(0) - truth.mean) / sd, drawn.std(0) / sd - 1
        row = {
            "c2st": c2st(expected.numpy(), drawn.numpy(), seed=index),
            "mean_error": mean_error.abs().max().item(), "sd_error": sd_error.abs().max().item(),
            "mean_z": mean_error.abs().max().item() * effective**0.5,
            "sd_z": sd_error.abs().max().item() * (2 * effective) ** 0.5,
            "rhat": max(chains[0].rhat) if chains else 1.0,
        }
        if strategy == "low":
            row["c2st_against_high"] = c2st(exact(x, "high").sample((DRAWS,)).numpy(), drawn.numpy(), seed=index)
        rows.append(row)
    return {"rows": rows, "seconds": estimator.history.seconds}


def main() -> None:
    """Runs what is missing and writes `experiments/results/gaussian_recovery.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="first seed; reported results start at 0")
    parser.add_argument("--cells", type=Path, default=Path("runs/gaussian_recovery"), help="folder of finished cells")
    options = parser.parse_args()
    seeds = list(range(options.first, options.first + options.seeds))
    result: dict[str, Any] = {"seeds": seeds, "rows": ROWS, "draws": DRAWS, "observations": OBSERVATIONS,
                              "outputs_per_observation": {"npe": 1, "nle": SET}, "summary": {}, "cells": {}}
    for kind in ("npe", "nle"):
        for strategy in STRATEGIES:
            name, found = f"{kind}, {strategy}", []
            for seed in seeds:
                torch.manual_seed(seed)  # of the exact draws
                found.append(resume_cell(options.cells, f"{kind}-{strategy}-{seed}",
                                         lambda k=kind, s=strategy, i=seed: run_cell(k, s, i)))
            rows = [row for cell in found for row in cell["rows"]]
            summary = {key: {**summarise([row[key] for row in rows]), "largest": max(row[key] for row in rows)}
                       for key in rows[0]}
            result["summary"][name], result["cells"][name] = summary, found
            print(f"{name:16s} C2ST {summary['c2st']['mean']:.3f} (largest {summary['c2st']['largest']:.3f}), mean off "
                  f"by {summary['mean_error']['mean']:.3f} sd, sd off by {summary['sd_error']['mean']:.1%}", flush=True)
            if strategy == "low":
                print(f"{'':16s} C2ST against the high level {summary['c2st_against_high']['mean']:.3f}")
    print(write_result("gaussian_recovery", result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
