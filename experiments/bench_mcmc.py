r"""Effective draws a second of the posterior of four g-and-k parameters given ten observations.

A neural likelihood (one network, trained on 10 000 Taylor rows and 300 pairs) and the exact one, at observations of
another prior draw per seed. The slowest parameter counts, and the time is all of `sample`, start and warm-up included.

    python experiments/bench_mcmc.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from runner import summarise, write_result

from mlsbi import NLE, TrainingOptions, tasks
from mlsbi.inference.mcmc_posterior import MCMCPosterior
from mlsbi.simulation.sets import simulate_sets
from mlsbi.store.records import TEST_STREAM

DRAWS = 1000


def measure(posterior: MCMCPosterior, seed: int) -> dict[str, float]:
    """One run of the sampler."""
    start = time.perf_counter()
    posterior.sample((DRAWS,), seed=seed)
    seconds = time.perf_counter() - start
    found = posterior.convergence[0]
    return {"seconds": seconds, "effective": min(found.effective), "per_second": min(found.effective) / seconds,
            "rhat": max(found.rhat), "steps": found.steps + found.warmup, "converged": float(found.converged)}


def main() -> None:
    """Writes `experiments/results/bench_mcmc.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    task = tasks.get("g_and_k")
    training = TrainingOptions(learning_rate=5e-4, patience=30)
    nle = NLE(task.prior, density=task.density, x_transform=task.x_transform, training=training, seed=0)
    nle.fit(task.simulate((10_000, 300), 0), progress=False)
    cells: dict[str, list[dict[str, Any]]] = {"neural": [], "exact": []}
    for seed in range(options.seeds):
        x = simulate_sets(task.stack, -1, 1, task.observations, seed=seed, stream=TEST_STREAM)[1][0]
        cells["neural"].append(measure(nle.posterior(x), seed))
        cells["exact"].append(measure(MCMCPosterior(task.likelihood, task.prior, (1,), x), seed))
        print(seed, {name: round(rows[-1]["per_second"]) for name, rows in cells.items()}, flush=True)
    result = {
        "seeds": list(range(options.seeds)), "observations": task.observations, "threads": torch.get_num_threads(),
        "per_second": {name: {**summarise([row["per_second"] for row in rows]),
                              "lowest": min(row["per_second"] for row in rows)} for name, rows in cells.items()},
        "converged": {name: statistics.mean(row["converged"] for row in rows) for name, rows in cells.items()},
        "cells": cells,
    }
    for name, row in result["per_second"].items():
        print(f"{name}: {row['median']:.0f} effective draws a second (median), lowest {row['lowest']:.0f}")
    print(write_result("bench_mcmc", result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
