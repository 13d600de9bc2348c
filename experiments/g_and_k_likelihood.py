r"""Neural likelihoods of the g-and-k distribution: how far each strategy is from the exact density.

10 000 Taylor rows and 50 or 300 pairs; all strategies see the same rows, network and splits, one network each. The
score is the Kullback-Leibler divergence E[log p(x | theta) - log q(x | theta)] over 20 000 test rows, which is exact in
expectation. Every seed is its own data, initialisation and test rows.

Seeds 0 to 9 showed that alignment could part the bulk of the two levels, and were not used again after it was mended.

    python experiments/g_and_k_likelihood.py
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from likelihood_distance import likelihood_kl
from runner import resume_cell, summarise, write_result

from mlsbi import NLE, Multilevel, TrainingOptions, TransferLearning, tasks
from mlsbi.density.registry import builder_to_config

STRATEGIES: dict[str, Any] = {
    "multilevel": "multilevel",
    "transfer": "transfer",
    "high": "high",
    "low": "low",
    "multilevel, rescale + project": Multilevel(rescale=True, project=True),
    "transfer, aligned": TransferLearning(align=True),
}
LOW_ROWS, PAIRS, TEST_ROWS = 10_000, (50, 300), 20_000


def run_cell(strategy: str, pairs: int, seed: int) -> dict[str, Any]:
    """Trains one likelihood and scores it."""
    task = tasks.get("g_and_k")
    data = task.simulate((LOW_ROWS, pairs), seed)
    nle = NLE(task.prior, strategy=STRATEGIES[strategy], density=task.density, x_transform=task.x_transform, seed=seed)
    nle.fit(data, progress=False)
    return {
        **likelihood_kl(nle, task, TEST_ROWS, seed), "epochs": len(nle.history.epochs), "seconds": nle.history.seconds,
    }


def main() -> None:
    """Runs what is missing and writes `experiments/results/g_and_k_likelihood.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=10, help="first seed; reported results start at 10")
    parser.add_argument("--cells", type=Path, default=Path("runs/g_and_k_likelihood"), help="folder of finished cells")
    options = parser.parse_args()
    seeds = list(range(options.first, options.first + options.seeds))
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for pairs in PAIRS:
        found = cells.setdefault(str(pairs), {strategy: [] for strategy in STRATEGIES})
        for seed in seeds:
            for strategy in STRATEGIES:
                key = f"{strategy}-{pairs}-{seed}"
                cell = resume_cell(options.cells, key, lambda s=strategy, n=pairs, i=seed: run_cell(s, n, i))
                found[strategy].append(cell)
                print(f"n_1 {pairs} seed {seed} {strategy:30s} KL {cell['kld']:.3f}", flush=True)
    result: dict[str, Any] = {
        "seeds": seeds, "low_rows": LOW_ROWS, "test_rows": TEST_ROWS, "training": asdict(TrainingOptions()),
        "density": builder_to_config(tasks.get("g_and_k").density), "kld": {}, "paired_differences": {},
        "cells": cells,
    }
    for pairs, found in cells.items():
        scores = {strategy: [cell["kld"] for cell in rows] for strategy, rows in found.items()}
        result["kld"][pairs] = {strategy: summarise(values) for strategy, values in scores.items()}
        result["paired_differences"][pairs] = {
            f"multilevel - {other}": summarise([a - b for a, b in zip(scores["multilevel"], values, strict=True)])
            for other, values in scores.items() if other != "multilevel"
        }
        for strategy, row in result["kld"][pairs].items():
            print(f"n_1 {pairs} {strategy:30s} {row['mean']:.3f} +- {row['standard_error']:.3f}")
        for name, row in result["paired_differences"][pairs].items():
            print(f"n_1 {pairs} {name}: {row['mean']:.3f} +- {row['standard_error']:.3f}")
    print(write_result("g_and_k_likelihood", result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
