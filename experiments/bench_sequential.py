r"""Sequential inference: every method on the same observations and the same runs of the expensive level.

Observations: of `ou2` the ten that were published with the training data (`--data FOLDER`, of arrays that
`np.load` reads; without it test simulations), of `ou` ten test simulations; at 50, 100 and 1000 expensive runs beside
10 000 cheap ones. The exact posterior is known for both tasks.

- amortised: `npe` (expensive runs alone), `mf_npe` (transfer learning), `auto`; on `ou2` all three on the published
  training data too, which is not coupled (`..._published`); `multilevel_nle`, a Gaussian likelihood by transfer
  learning and the multilevel objective after it, sampled by importance;
- sequential, rounds of equal numbers of expensive runs: `tsnpe`, `mf_tsnpe`, `mf_tsnpe_af` (five rounds, as
  published: region by the 1e-6 quantile, networks that go on, a fifth of theta by disagreement), and
  `multilevel_rounds` at the same total cost (two rounds, each divided over levels inside the truncated prior, trained
  by emulation: the first by three Gaussian emulators alone);
- `multilevel_rounds_nle`: as `multilevel_nle`, from the rows inside the truncated prior of `multilevel_rounds`;
  its seconds count the rounds only where these are not kept;
- `mf_abc`, multifidelity rejection; negative weights count as 0 when it is drawn from.

Networks that go on in a later round hold out other rows than before, some of which they were trained on.

All neural methods have ensembles of five, of the task's network unless said otherwise. Scores are C2ST of 1000 against
1000 draws: of a random forest with five folds, as published, and of the perceptron of `sbi`; the share of the exact
posterior outside what the last round drew theta from; what was spent. A cell is one (task, runs, method, observation),
kept in `--cells` and in the result file, so that an interrupted run goes on; another `--first`, or other observations
for want of `--data`, need another `--cells`.

    python experiments/bench_sequential.py --data FOLDER --workers 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runner import RESULTS, keep_cell, provenance, read_cell, write_result
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor
from torch.distributions import Distribution

from mlsbi import (
    MDN,
    NLE,
    NPE,
    Auto,
    Emulation,
    MCMCOptions,
    MultilevelData,
    SingleLevel,
    TransferLearning,
    TransferThenMultilevel,
    Translation,
    infer_sequentially,
    tasks,
)
from mlsbi.diagnostics import c2st
from mlsbi.inference.multifidelity_abc import multifidelity_abc
from mlsbi.levels import LevelStack
from mlsbi.plots.style import COLOURS, TRUTH, add_legend, dress, new_figure
from mlsbi.tasks import Task

# Raised when what is measured changes, of methods of OWN together; 1 of all others.
METHOD = {"tsnpe": 2, "mf_tsnpe": 2, "mf_tsnpe_af": 2, "multilevel_rounds": 2}
NAME = "bench_sequential"
LOW, HIGH = 10_000, (50, 100, 1000)
OBSERVATIONS, DRAWS, EXACT_DRAWS = 10, 1000, 20_000
ROUNDS, OWN_ROUNDS, MEMBERS = 5, 2, 5
GAUSSIAN = MDN(components=1)
SCOUT = Emulation(((GAUSSIAN, TransferThenMultilevel()), (GAUSSIAN, Translation()), (GAUSSIAN, TransferLearning())),
                  rows=4096)
OF_ANY_DATA = ("npe", "mf_npe", "auto")
AMORTISED = (*OF_ANY_DATA, "multilevel_nle")
OWN = ("multilevel_rounds", "multilevel_rounds_nle")  # of the same rounds
SEQUENTIAL = ("tsnpe", "mf_tsnpe", "mf_tsnpe_af", *OWN)
METHODS = (*AMORTISED, *SEQUENTIAL, "mf_abc")
OF_PUBLISHED_DATA = tuple(f"{name}_published" for name in OF_ANY_DATA)
PUBLISHED = {"npe": (0.795, 0.783, 0.629), "mf_npe": (0.740, 0.719, 0.604), "tsnpe": (0.843, 0.773, 0.674),
             "mf_tsnpe": (0.805, 0.781, 0.654), "mf_tsnpe_af": (0.788, 0.752, 0.636)}  # C2ST on ou2


@dataclass(frozen=True)
class Job:
    """What is computed together: one method on one observation, or an amortised one on all."""

    task: str
    high: int
    method: str
    observation: int | None = None


def observations(name: str, data: Path | None, first: int) -> Tensor:
    """What all methods are asked."""
    if name == "ou2" and data is not None:
        with np.load(data / "ou2_observations_10.npz", allow_pickle=False) as file:
            return torch.tensor(file["x_summary"][:OBSERVATIONS], dtype=torch.float32)
    return tasks.get(name).test(OBSERVATIONS, first)[1]


def published_data(data: Path, high: int) -> MultilevelData:
    """The published training data, whose levels are not coupled."""
    with np.load(data / "ou2_training_sets.npz", allow_pickle=False) as file:
        return MultilevelData.from_arrays([
            (file[f"{part}_theta"].astype("float32"), file[f"{part}_x"].astype("float32"))
            for part in (f"lf{LOW}", f"hf{high}")
        ])


def run_job(job: Job, data: Path | None, first: int, folder: Path) -> str:
    """Computes and keeps the cells of a job."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The observation is farther")
    task, x = tasks.get(job.task), observations(job.task, data, first)
    found: dict[int, dict[str, Any]] = {}
    if job.observation is None:
        estimator, seconds = amortised(job, task, data, first)
        draws = estimator.posterior().sample_batched((DRAWS,), x, seed=first)
        for index in range(len(x)):
            found[index] = {**score(task, x[index], draws[:, index], first + index), "seconds": seconds / len(x)}
    else:
        x_o = x[job.observation]
        began = time.perf_counter()
        draws, facts = asked_for(job, task, x_o, first, folder)
        seconds = time.perf_counter() - began
        found[job.observation] = {**score(task, x_o, draws, first + job.observation), **facts, "seconds": seconds}
    commit = provenance()["commit"][:10]
    for index, cell in found.items():
        keep_cell(folder, key(job.task, job.high, job.method, index), version(job.method), {**cell, "commit": commit})
    mean = statistics.mean(cell["c2st_forest"] for cell in found.values())
    return f"{job.task}, {job.high}, {job.method}, observation {job.observation}: C2ST {mean:.3f}"


def amortised(job: Job, task: Task, data: Path | None, first: int) -> tuple[NPE | NLE, float]:
    """One training for all observations."""
    base = job.method.removesuffix("_published")
    rows = published_data(data, job.high) if base != job.method and data is not None \
        else task.simulate((LOW, job.high), first)
    if base == "multilevel_nle":
        estimator: NPE | NLE = likelihood_of(task, task.prior, first)
    else:
        strategy = {"npe": SingleLevel(-1), "mf_npe": TransferLearning(), "auto": Auto()}[base]
        estimator = NPE(task.prior, strategy=strategy, density=task.density, embedding=task.embedding,
                        x_transform=task.x_transform, seed=first)
    began = time.perf_counter()
    estimator.fit(rows, MEMBERS, progress=False)
    return estimator, time.perf_counter() - began


def likelihood_of(task: Task, prior: Distribution, seed: int) -> NLE:
    """A Gaussian likelihood, untrained."""
    return NLE(prior, strategy=TransferThenMultilevel(), density=GAUSSIAN, x_transform=task.x_transform, seed=seed)


def asked_for(job: Job, task: Task, x_o: Tensor, first: int, folder: Path) -> tuple[Tensor, dict[str, Any]]:
    """Draws of a method that is run for one observation, and what it did."""
    stack = task.stack
    assert stack is not None
    if job.method == "mf_abc":
        found = multifidelity_abc(stack, x_o, low_runs=LOW, high_runs=job.high, seed=first)
        return found.sample(DRAWS, seed=first), {"effective": found.effective, "negative": found.negative,
                                                     "runs": found.runs}
    part = job.high // ROUNDS
    options: dict[str, Any] = {"rounds": ROUNDS, "keep": "all", "region": "mixture", "go_on": True,
                               "strategy": ("transfer", *["high"] * (ROUNDS - 1)),
                               "n": [(LOW, part), *[(0, part)] * (ROUNDS - 1)]}
    if job.method == "tsnpe":
        stack = LevelStack(stack.prior, stack.noise, stack.levels[-1:])
        options |= {"strategy": "high", "n": [(part,)] * ROUNDS}
    elif job.method == "mf_tsnpe_af":
        options["active"] = 0.2
    elif job.method in OWN:
        costs = task.stack.row_costs if task.stack is not None else None
        assert costs is not None
        options = {"rounds": OWN_ROUNDS, "strategy": (SCOUT, Emulation()), "pilot_rows": 8,
                   "budget": LOW * costs[0] + job.high * costs[1]}
    shared = folder / "rounds" / f"{job.task}-{job.high}-{rounds_of(job)}-{first}"
    run = infer_sequentially(stack, x_o, seed=first, ensemble=MEMBERS, density=task.density, embedding=task.embedding,
                             x_transform=task.x_transform, folder=shared, progress=False, **options)
    exact = task.reference.sample(EXACT_DRAWS, x_o, seed=first) if task.reference is not None else None
    lost = run.truncation_error(exact)[-1] if exact is not None else None
    if job.method == "multilevel_rounds_nle":
        estimator = likelihood_of(task, run.priors[-1], first).fit(run.inside, MEMBERS, progress=False)
        posterior = estimator.posterior(run.x, mcmc=MCMCOptions(method="importance", effective=DRAWS))
        return posterior.sample((DRAWS,), seed=first), {"lost": lost, "spent": run.spent}
    return run.posterior.sample((DRAWS,), seed=first), {
        "lost": lost, "spent": run.spent, "shares": [done.share for done in run.rounds],
        "n": [done.n for done in run.rounds], "leakage": [done.leakage for done in run.rounds],
        "c2st_rounds": [forest(task, x_o, posterior.sample((DRAWS,), seed=first), first + (job.observation or 0))
                        for posterior in run.posteriors],
    }


def rounds_of(job: Job) -> str:
    """The method whose rounds a job uses."""
    return OWN[0] if job.method in OWN else job.method


def forest(task: Task, x_o: Tensor, draws: Tensor, seed: int) -> float:
    """C2ST of a random forest with five folds, as published."""
    assert task.reference is not None
    exact = task.reference.sample(DRAWS, x_o, seed=seed)
    return c2st(exact.numpy(), draws.numpy(), seed=seed % 2**31, classifier=RandomForestClassifier(random_state=0))


def score(task: Task, x_o: Tensor, draws: Tensor, seed: int) -> dict[str, float]:
    """How far draws are from the exact posterior."""
    assert task.reference is not None
    exact = task.reference.sample(DRAWS, x_o, seed=seed)
    return {"c2st_forest": forest(task, x_o, draws, seed), "c2st": c2st(exact.numpy(), draws.numpy(), seed=seed)}


def version(method: str) -> int:
    """Version of what is measured of a method."""
    return METHOD.get(method, 1)


def key(task: str, high: int, method: str, observation: int) -> str:
    """File name of a cell."""
    return f"{task}-{high}-{method}-{observation}"


def methods_of(task: str, data: Path | None) -> tuple[str, ...]:
    """Columns of a task."""
    return (*METHODS, *OF_PUBLISHED_DATA) if task == "ou2" and data is not None else METHODS


def known_cells(
    names: Sequence[str], data: Path | None, folder: Path, first: int
) -> dict[tuple[str, int, str, int], Any]:
    """Finished cells, from the folder and from the result file."""
    path = RESULTS / f"{NAME}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    found: dict[tuple[str, int, str, int], Any] = {}
    if kept.get("first") == first and kept.get("published_data") == (data is not None):
        found = {(task, int(high), method, int(index)): cell for task, by_high in kept["cells"].items()
                 for high, by_method in by_high.items() for method, cells in by_method.items()
                 for index, cell in cells.items() if kept["method"][method] == version(method)}
    for task in names:
        for high in HIGH:
            for method in methods_of(task, data):
                for index in range(OBSERVATIONS):
                    cell = read_cell(folder, key(task, high, method, index), version(method))
                    if cell is not None:
                        found[task, high, method, index] = cell
    return found


def jobs_of(
    names: Sequence[str], high: Sequence[int], only: Sequence[str] | None, data: Path | None, known: Mapping[Any, Any]
) -> list[list[Job]]:
    """What is missing, in groups to be run one after the other: those of a group share rounds."""
    groups: dict[tuple[str, int, str], list[Job]] = {}
    for task in names:
        for each in high:
            for method in methods_of(task, data):
                if only and method not in only:
                    continue
                jobs = [Job(task, each, method, index) for index in range(OBSERVATIONS)
                        if (task, each, method, index) not in known]
                if jobs and method.removesuffix("_published") in AMORTISED:
                    jobs = [Job(task, each, method)]
                if jobs:
                    groups.setdefault((task, each, rounds_of(jobs[0])), []).extend(jobs)
    return list(groups.values())


def run_group(jobs: Sequence[Job], data: Path | None, first: int, folder: Path) -> str:
    """Runs jobs one after the other; one that fails is told, and the others go on."""
    said = []
    for job in jobs:
        try:
            said.append(run_job(job, data, first, folder))
        except Exception as error:  # noqa: BLE001  # hours of others' work go on
            said.append(f"{job} failed: {type(error).__name__}: {error}")
        print(said[-1], flush=True)
    return said[-1]


def gather(cells: Mapping[tuple[str, int, str, int], Any]) -> dict[str, Any]:
    """The result file's content."""
    raw: dict[str, Any] = {}
    table: dict[str, Any] = {}
    for (task, high, method, index), cell in sorted(cells.items()):
        rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in cell.items()}
        raw.setdefault(task, {}).setdefault(str(high), {}).setdefault(method, {})[str(index)] = rounded
    for task, by_high in raw.items():
        for high, by_method in by_high.items():
            for method, found in by_method.items():
                entry: dict[str, Any] = {"observations": len(found)}
                for name in ("c2st_forest", "c2st", "lost", "spent", "seconds"):
                    values = [cell[name] for cell in found.values() if cell.get(name) is not None]
                    if values:
                        entry[name] = {"mean": statistics.mean(values), "median": statistics.median(values),
                                       "largest": max(values), "standard_error":
                                       statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None}
                table.setdefault(task, {}).setdefault(high, {})[method] = entry
    versions = {method: version(method) for _, _, method, _ in sorted(cells)}
    return {"method": versions, "published": PUBLISHED, "table": table, "cells": raw}


def markdown(table: Mapping[str, Any]) -> str:
    """Mean C2ST (random forest) over observations, a row a method."""
    lines = []
    for task, by_high in table.items():
        highs = sorted(by_high, key=int)
        lines += [f"| {task}: expensive runs | " + " | ".join(highs) + " |", "|---" * (len(highs) + 1) + "|"]
        for method in (*METHODS, *OF_PUBLISHED_DATA):
            found = [by_high[high].get(method) for high in highs]
            if not any(found):
                continue
            lines.append(f"| {method.replace('_', ' ')} | " + " | ".join(
                "" if each is None else f"{each['c2st_forest']['mean']:.3f}"
                + ("" if each["observations"] == OBSERVATIONS else f" ({each['observations']})") for each in found)
                + " |")
        lines.append("")
    return "\n".join(lines)


def draw(content: Mapping[str, Any], path: Path) -> None:
    """One panel a task and number of runs: every observation a dot, the mean a bar, the published mean a cross."""
    cells = content["cells"]
    panels = [(task, high) for task in cells for high in sorted(cells[task], key=int)]
    figure = new_figure(11.0, 3.4 * -(-len(panels) // 2))
    grid = figure.add_gridspec(-(-len(panels) // 2), 2)
    for place, (task, high) in enumerate(panels):
        axes = figure.add_subplot(grid[place // 2, place % 2])
        by_method = cells[task][high]
        names = [name for name in (*METHODS, *OF_PUBLISHED_DATA) if name in by_method]
        for row, name in enumerate(reversed(names)):
            values = [cell["c2st_forest"] for cell in by_method[name].values()]
            colour = TRUTH if name in (*OWN, "multilevel_nle", "auto", "auto_published") else COLOURS[0]
            axes.plot(values, [row] * len(values), "o", markersize=4, alpha=0.5, color=colour)
            axes.plot([statistics.mean(values)] * 2, [row - 0.35, row + 0.35], color=colour, linewidth=2.2)
            reported = PUBLISHED.get(name.removesuffix("_published"))
            if task == "ou2" and reported is not None and int(high) in HIGH:
                axes.plot(reported[HIGH.index(int(high))], row, "x", color="black", markersize=6,
                          label="published" if row == len(names) - 1 else None)
        axes.axvline(0.5, color="grey", linewidth=1.0)
        dress(axes, title=f"{task}, {high} expensive runs", grid="x", x="C2ST (random forest), 0.5 is best")
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in reversed(names)])
        add_legend(axes, loc="lower right", bbox_to_anchor=(1.0, 0.98))  # beside the title
    figure.savefig(path, dpi=80)


def main() -> None:
    """Runs what is missing and writes `experiments/results/bench_sequential.json` and `docs/sequential.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", choices=["ou2", "ou"], default=["ou2", "ou"])
    parser.add_argument("--high", nargs="*", type=int, choices=HIGH, default=list(HIGH))
    parser.add_argument("--only", nargs="*", help="only these methods")
    parser.add_argument("--first", type=int, default=100, help="seed; hyper-parameters were chosen from 9000 on")
    parser.add_argument("--data", type=Path, help="folder of the published ou2 arrays")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cells", type=Path, default=Path("runs") / NAME, help="folder of finished cells")
    parser.add_argument("--gather", action="store_true", help="only gather what is there")
    options = parser.parse_args()
    known = known_cells(options.tasks, options.data, options.cells, options.first)
    groups = [] if options.gather else jobs_of(options.tasks, options.high, options.only, options.data, known)
    print(f"{sum(map(len, groups))} jobs to run, {len(known)} cells known", flush=True)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_group, group, options.data, options.first, options.cells)
                                  for group in groups]):
            done.result()
    content = gather(known_cells(["ou2", "ou"], options.data, options.cells, options.first))
    content |= {"first": options.first, "published_data": options.data is not None}
    print(markdown(content["table"]))
    print(write_result(NAME, content, compact="cells"))
    draw(content, Path(__file__).parents[1] / "docs" / "sequential.png")


if __name__ == "__main__":
    main()
