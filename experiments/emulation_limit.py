r"""What limits emulation on `ou2`: its emulator, or the network that learns the posterior from draws of it.

The same ensemble is trained by `Emulation` from 10 000 cheap and 1000 expensive runs, and, by its second stage's
options, on as many draws of the exact simulator as it takes from its emulator. Seeds for development, whose
observations are not those of the sequential benchmark; C2ST of a random forest against the exact posterior, mean of
ten observations.

    python experiments/emulation_limit.py
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_sequential import DRAWS, HIGH, LOW, MEMBERS, OBSERVATIONS, forest
from runner import resume_cell, summarise, write_result

from mlsbi import NPE, Emulation, MultilevelData, SingleLevel, TrainingOptions, tasks
from mlsbi.tasks import Task

FIRST = 9100


def rows_of(task: Task, kind: str, seed: int) -> tuple[MultilevelData, dict[str, Any]]:
    """What is trained on, and how."""
    emulation = Emulation()
    if kind == "emulator":
        return task.simulate((LOW, HIGH[-1]), seed), {"strategy": emulation}
    options = TrainingOptions(batch_size=emulation.batch_size, learning_rate=emulation.learning_rate,
                              patience=emulation.patience)
    return task.simulate((1, emulation.rows), seed), {"strategy": SingleLevel(-1), "training": options}


def run_cell(kind: str, seed: int) -> dict[str, float]:
    """C2ST at the observations, their mean."""
    torch.set_num_threads(1)
    task = tasks.get("ou2")
    data, how = rows_of(task, kind, seed)
    npe = NPE(task.prior, density=task.density, embedding=task.embedding, x_transform=task.x_transform, seed=seed,
              **how)
    npe.fit(data, MEMBERS, progress=False)
    x = task.test(OBSERVATIONS, seed)[1]
    draws = npe.posterior().sample_batched((DRAWS,), x, seed=seed)
    found = [forest(task, x[index], draws[:, index], seed + index) for index in range(len(x))]
    return {"c2st_forest": statistics.mean(found), "largest": max(found)}


def main() -> None:
    """Writes `experiments/results/emulation_limit.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", type=Path, default=Path("runs") / "emulation_limit", help="folder of finished cells")
    options = parser.parse_args()
    cells: dict[str, Any] = {"exact simulator": {}, "emulator": {}}
    for kind, found in cells.items():
        for seed in range(FIRST, FIRST + options.seeds):
            found[str(seed)] = resume_cell(options.cells, f"{kind.split()[0]}-{seed}", partial(run_cell, kind, seed))
            print(kind, seed, found[str(seed)], flush=True)
    summary = {kind: summarise([cell["c2st_forest"] for cell in found.values()]) for kind, found in cells.items()}
    print(summary)
    print(write_result("emulation_limit", {"runs": [LOW, HIGH[-1]], "summary": summary, "cells": cells}))


if __name__ == "__main__":
    main()
