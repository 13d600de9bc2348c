r"""What each stabiliser of the multilevel descent brings: the published ablation rerun, and the others beside it.

Two likelihoods: g-and-k (10 000 Taylor rows and 50 pairs; Kullback-Leibler divergence from the exact density) and the
toggle switch (10 000, 500 and 100 rows of three levels; squared MMD between 500 simulated and 500 modelled draws, its
bandwidth the median distance at that theta, mean over test theta). One stabiliser at a time is added to plain descent
on the published objective, without alignment; the published ablation is rescale and project, both and neither. Two
regimes: the library's training with early stopping, and a fixed number of full-batch epochs without, which is how the
published code trains.

All seeds of a variant are trained together; every seed is its own data, initialisation, held-out rows and test rows.

    python experiments/stabilisers.py
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from likelihood_distance import draw_twice, likelihood_kl, likelihood_mmd, mean_mmd
from runner import resume_cell, summarise, write_result
from torch import Tensor

from mlsbi import NLE, Multilevel, TrainingOptions, tasks
from mlsbi.tasks import Task
from mlsbi.tasks.toggle_switch import LARGEST

PLAIN = Multilevel(align=False)
STOPPED, FIXED = TrainingOptions(learning_rate=5e-4, patience=30), TrainingOptions(
    learning_rate=1e-3, batch_size=None, epochs=1000, validation_fraction=0.0,
)
PUBLISHED: dict[str, tuple[Multilevel, dict[str, Any]]] = {
    "none": (PLAIN, {}),
    "rescale": (replace(PLAIN, rescale=True), {}),
    "project": (replace(PLAIN, project=True), {}),
    "rescale + project": (replace(PLAIN, rescale=True, project=True), {}),
}
VARIANTS = {
    **PUBLISHED,
    "correction clipped at 1": (replace(PLAIN, correction_limit=1.0), {}),
    "difference penalty 1": (replace(PLAIN, difference_penalty=1.0), {}),
    "weight decay 0.01": (PLAIN, {"weight_decay": 0.01}),
    "average 0.99": (PLAIN, {"average": 0.99}),
    "estimated weights": (replace(PLAIN, weights="estimated"), {}),
    "alignment": (replace(PLAIN, align=True), {}),
}
REGIMES = {"early stopping": (STOPPED, VARIANTS), "fixed epochs": (FIXED, PUBLISHED)}
ROWS = {"g_and_k": (10_000, 50), "toggle_switch": (10_000, 500, 100)}
TEST_ROWS, TEST_THETAS, DRAWS = 20_000, 200, 500


@functools.cache  # the same for every variant, and slower than training
def test_draws(name: str, seed: int) -> tuple[Tensor, Tensor, float]:
    """Test theta, draws at each, and the distance of other draws of the same law from them."""
    theta, x, again = draw_twice(tasks.get(name), thetas=TEST_THETAS, draws=DRAWS, seed=seed)
    return theta, x, mean_mmd(x, again).mean


def score(nle: NLE, task: Task, seed: int) -> dict[str, float]:
    """The distance of a likelihood from the simulator's, and its value for a perfect one."""
    if task.likelihood is not None:
        return {"distance": likelihood_kl(nle, task, TEST_ROWS, seed)["kld"], "null": 0.0}
    theta, x, null = test_draws(task.name, seed)
    return {"distance": likelihood_mmd(nle, theta, x, limits=(0.0, LARGEST), seed=seed).mean, "null": null}


def run_cell(name: str, regime: str, variant: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Trains one likelihood per seed, together, and scores them."""
    task, (training, variants) = tasks.get(name), REGIMES[regime]
    strategy, changed = variants[variant]
    likelihoods = [NLE(task.prior, strategy=strategy, density=task.density, x_transform=task.x_transform, seed=seed,
                       training=replace(training, **changed)) for seed in seeds]
    NLE.fit_replicates(likelihoods, [task.simulate(ROWS[name], seed) for seed in seeds], progress=False)
    return {"seeds": [
        {**score(nle, task, seed), "epochs": len(nle.history.epochs), "best_epoch": nle.history.best_epoch,
         "projected": nle.history.epochs[-1].get("projected"), "seconds": nle.history.seconds}
        for nle, seed in zip(likelihoods, seeds, strict=True)
    ]}


def main() -> None:
    """Runs what is missing and writes `experiments/results/stabilisers.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=20, help="first seed; those below 20 have been looked at before")
    parser.add_argument("--cells", type=Path, default=Path("runs/stabilisers"), help="folder of finished cells")
    options = parser.parse_args()
    seeds = list(range(options.first, options.first + options.seeds))
    result: dict[str, Any] = {
        "seeds": seeds, "rows": ROWS, "test": {"rows": TEST_ROWS, "thetas": TEST_THETAS, "draws": DRAWS},
        "training": {regime: asdict(training) for regime, (training, _) in REGIMES.items()},
        "distances": {}, "cells": {},
    }
    for name in reversed(ROWS):
        for regime, (_, variants) in REGIMES.items():
            cells = {}
            for variant in variants:
                key = "-".join([name, regime, variant, *map(str, seeds)]).replace(" ", "_")
                cells[variant] = resume_cell(options.cells, key,
                                             lambda n=name, r=regime, v=variant: run_cell(n, r, v, seeds))
            values = {variant: [row["distance"] for row in cell["seeds"]] for variant, cell in cells.items()}
            result["cells"].setdefault(name, {})[regime] = cells
            result["distances"].setdefault(name, {})[regime] = {
                variant: {**summarise(found), "minus_none": summarise(
                    [one - none for one, none in zip(found, values["none"], strict=True)])}
                for variant, found in values.items()
            }
            for variant, row in result["distances"][name][regime].items():
                print(f"{name:14s} {regime:15s} {variant:24s} {row['mean']:.3f} +- {row['standard_error']:.3f}  "
                      f"minus none {row['minus_none']['mean']:+.3f} +- {row['minus_none']['standard_error']:.3f}",
                      flush=True)
    print(write_result("stabilisers", result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
