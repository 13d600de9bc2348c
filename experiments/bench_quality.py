r"""Quality of every strategy on every task: the same data, network and observations for all, over many seeds.

Rows are a task at a budget; columns are the published recipe (500 to 2000 full-batch epochs at a learning rate of 1e-4,
rescaled and projected gradients, one network), the strategies that `Auto` mixes, each an ensemble of five that hold out
different rows, and `Auto` itself with all its defaults. The floor is the exact posterior or density where it is known,
else plain training on many runs of the finest level; the ceiling is the prior.

Scores: mean and median negative log density of the true parameters over 1000 test simulations (all 400 of CAMELS);
for likelihoods of g-and-k the divergence from the exact density over 20 000 test rows, for the toggle switch the
squared MMD of 500 against 500 draws at 200 test theta. Calibration: how often the truth lies in 90% regions of highest
density (of theta for posteriors, of x for likelihoods), on 250 test rows, and whether all sizes are uniform, by KS.

Hyper-parameters were chosen on seeds from 9000 on; reported seeds start at 100. A cell is one (row, seed, strategy);
finished ones are read from the result file and from `--cells`, so that an interrupted run goes on, on another machine
too. `METHOD` is raised when what is measured changes, and old cells are then not used; each says how many seconds it
took. Seeds are trained some in one go (`TOGETHER`), which is the same as one by one up to rounding.

    python experiments/bench_quality.py --data FOLDER_OF_CAMELS --workers 2
    python experiments/bench_quality.py --quick
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from likelihood_distance import draw_twice, likelihood_kl, likelihood_mmd, mean_mmd
from runner import RESULTS, keep_cell, provenance, read_cell, write_result
from torch import Tensor

from mlsbi import NLE, NPE, Auto, Multilevel, SingleLevel, TrainingOptions, tasks
from mlsbi.data import MultilevelData
from mlsbi.density.mixture import DensityMixture
from mlsbi.diagnostics import coverage, hpd_levels, uniformity
from mlsbi.plots.style import COLOURS, GREY, TRUTH, add_legend, dress, new_figure
from mlsbi.tasks import Task
from mlsbi.tasks.toggle_switch import LARGEST
from mlsbi.training.history import TrainingError

# The last ones are of `Auto` and what it mixes.
METHOD = {"published": 1, "reference": 1, "posterior": 2, "likelihood": 2, "camels, 20 pairs": 3}
NAME = "bench_quality"
TEST_ROWS, LIKELIHOOD_ROWS, THETAS, DRAWS = 1000, 20_000, 200, 500
CALIBRATED, REGION_DRAWS = 250, 99
REFERENCE_SEEDS = 3  # of large trainings, which take long and differ little
TOGETHER = {"published": 10, "auto": 4, "reference": 1}  # seeds that are trained in one go
COLUMNS = ("published", "high", "multilevel", "transfer", "transfer_then_multilevel", "translation", "emulation",
           "auto")
PARTS = {"Multilevel": "multilevel", "TransferLearning": "transfer", "SingleLevel": "high",
         "TransferThenMultilevel": "transfer_then_multilevel", "Translation": "translation", "Emulation": "emulation"}


@dataclass(frozen=True)
class Row:
    """A task at a budget, how long the published recipe trains there, and the runs of the reference."""

    task: str
    n: tuple[int, ...]
    epochs: int
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: int | None = None
    target: float | None = None
    kind: str = "posterior"


ROWS = {
    "ou, 10 pairs": Row("ou", (1000, 10), 500, target=-0.15),
    "ou, 50 pairs": Row("ou", (1000, 50), 500, target=-0.55),
    "ou, 100 pairs": Row("ou", (1000, 100), 500, target=-0.85),
    "ou with X_0, 100 pairs": Row("ou", (1000, 100), 500, {"parameters": 4}, target=-1.0),
    "g_and_k posterior, 10 pairs": Row("g_and_k", (1000, 10), 800, {"x": "quantiles"}, 10_000, target=2.2),
    "g_and_k posterior, 100 pairs": Row("g_and_k", (1000, 100), 800, {"x": "quantiles"}, 10_000, target=1.0),
    "g_and_k likelihood, 50 pairs": Row("g_and_k", (10_000, 50), 1000, target=0.20, kind="likelihood"),
    "g_and_k likelihood, 300 pairs": Row("g_and_k", (10_000, 300), 1000, target=0.10, kind="likelihood"),
    "toggle_switch, 10000 500 100": Row("toggle_switch", (10_000, 500, 100), 2000, kind="likelihood"),
    "camels, 20 pairs": Row("camels", (580, 20), 500, reference=600, target=-1.02),
}
QUICK = ("ou, 100 pairs",)


def make_task(row: Row, data: Path | None) -> Task:
    """The row's task."""
    options = dict(row.options)
    if row.task == "camels" and data is not None:
        options["data"] = data
    return tasks.get(row.task, **options)


def estimator(task: Task, strategy: Any, seed: int, training: TrainingOptions | None = None) -> NPE | NLE:
    """An untrained estimator with the task's network."""
    kind = {"npe": NPE, "nle": NLE}[task.estimator]
    return kind(task.prior, strategy=strategy, density=task.density, embedding=task.embedding,
                x_transform=task.x_transform, training=training, seed=seed)


def score(fitted: NPE | NLE, task: Task, seed: int) -> dict[str, float]:
    """All scores of a trained estimator."""
    if isinstance(fitted, NPE):
        theta, x = task.test(min(TEST_ROWS, task.test_rows) if task.stack is None else TEST_ROWS, seed)
        log_q = fitted.posterior().log_prob_batched(theta[None], x)[0]
        found = {"score": -float(log_q.double().mean()), "median": -float(log_q.median())}
        regions = slice(CALIBRATED)
        draws = fitted.posterior().sample_batched((REGION_DRAWS,), x[regions], seed=seed)
        levels = hpd_levels(log_q[regions].numpy(), fitted.posterior().log_prob_batched(draws, x[regions]).numpy())
    else:
        if task.likelihood is not None:
            kl = likelihood_kl(fitted, task, LIKELIHOOD_ROWS, seed)
            found = {"score": kl["kld"], "median": kl["median"]}
        else:
            theta, x, null = toggle_draws(task, seed)
            mmd = likelihood_mmd(fitted, theta, x, limits=(0.0, LARGEST), seed=seed)
            found = {"score": mmd.mean, "median": mmd.median, "null": null}
        levels = likelihood_levels(fitted, *task.test(CALIBRATED, seed), seed)
    return {**found, "coverage_90": float(coverage(levels, [0.9])[0]), "uniformity_p": uniformity(levels)}


def likelihood_levels(fitted: NLE, theta: Tensor, x: Tensor, seed: int) -> np.ndarray[Any, Any]:
    """Levels of the smallest regions of highest density of x given theta that hold the simulated x."""
    likelihood = fitted.likelihood
    many = theta.repeat(REGION_DRAWS, 1)
    drawn = likelihood.sample(many, seed=seed)
    return hpd_levels(likelihood.log_prob(x, theta).numpy(),
                      likelihood.log_prob(drawn, many).reshape(REGION_DRAWS, -1).numpy())


def toggle_draws(task: Task, seed: int) -> tuple[Tensor, Tensor, float]:
    """Test theta, draws at each, and the distance of other draws of the same law from them."""
    theta, x, again = draw_twice(task, thetas=THETAS, draws=DRAWS, seed=seed)
    return theta, x, mean_mmd(x, again).mean


def auto_cells(row: Row, task: Task, seeds: Sequence[int]) -> dict[tuple[int, str], dict[str, Any]]:
    """`Auto`, and each of the strategies that it mixes, from one training of several seeds in one go."""
    fitted = [estimator(task, Auto(), seed) for seed in seeds]
    type(fitted[0]).fit_replicates(fitted, [task.simulate(row.n, seed) for seed in seeds], progress=False)
    return {(seed, strategy): cell for seed, one in zip(seeds, fitted, strict=True)
            for strategy, cell in mixed_cells(one, task, seed).items()}


def mixed_cells(fitted: NPE | NLE, task: Task, seed: int) -> dict[str, dict[str, Any]]:
    """Scores of a trained `Auto`, and of each of the strategies that it mixes."""
    mixed, whole = fitted.history.mixture, fitted.networks
    seconds = sum(history.seconds for history in fitted.histories)
    cells = {"auto": {**score(fitted, task, seed), "seconds": seconds,
                      "weights": {PARTS[part["strategy"]]: round(part["weight"], 4) for part in mixed}}}
    for index, part in enumerate(mixed):
        if part["held_out"] is None:
            continue
        # An ensemble of this strategy alone, which is what these networks are.
        fitted.networks = tuple(network.part(index) for network in whole if isinstance(network, DensityMixture))
        cells[PARTS[part["strategy"]]] = {
            **score(fitted, task, seed), "held_out": part["held_out"], "seconds": part["seconds"] * len(whole),
        }
    return cells


def published_cells(row: Row, task: Task, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The published recipe on the same rows, of several seeds in one go."""
    training = TrainingOptions(learning_rate=1e-4, batch_size=None, epochs=row.epochs, validation_fraction=0.0)
    strategy = Multilevel(rescale=True, project=True, align=False)
    fitted = [estimator(task, strategy, seed, training) for seed in seeds]
    began = time.perf_counter()
    type(fitted[0]).fit_replicates(fitted, [task.simulate(row.n, seed) for seed in seeds], progress=False)
    seconds = (time.perf_counter() - began) / len(seeds)
    return {seed: {**score(one, task, seed), "seconds": seconds} for seed, one in zip(seeds, fitted, strict=True)}


def reference_cell(row: Row, task: Task, seed: int) -> dict[str, Any]:
    """What is best possible: the exact posterior or density, or plain training on many runs of the finest level."""
    if task.estimator == "nle":
        return {"score": 0.0 if task.likelihood is not None else toggle_draws(task, seed)[2], "kind": "exact"}
    theta, x = task.test(min(TEST_ROWS, task.test_rows) if task.stack is None else TEST_ROWS, seed)
    if task.reference is not None:
        return {"score": -float(task.reference.log_prob(theta, x).mean()), "kind": "exact"}
    if task.stack is None:  # all rows of the catalogue that are not for testing, as high ones
        level = task.simulate((1, row.reference - 1), seed).levels[1]
    else:
        level = task.simulate((1, row.reference), seed).levels[1]
    data = MultilevelData.from_arrays([(level.theta, level.fine)])
    fitted = estimator(task, SingleLevel(-1), seed).fit(data, ensemble=3, progress=False)
    return {**score(fitted, task, seed), "kind": f"high, {len(level)} runs"}


def prior_score(task: Task, seed: int) -> float | None:
    """The prior's own negative log density of the true parameters."""
    if task.estimator == "nle":
        return None
    theta, _ = task.test(min(TEST_ROWS, task.test_rows), seed)
    return -float(task.prior.log_prob(theta).double().mean())


def run_job(name: str, seeds: Sequence[int], what: str, data: Path | None, folder: Path) -> str:
    """Computes and keeps cells of one row and of one seed, or of several that are trained together."""
    torch.set_num_threads(1)
    row = ROWS[name]
    task = make_task(row, data)
    found: dict[tuple[int, str], dict[str, Any]] = {}
    if what == "published":
        found = {(seed, what): cell for seed, cell in published_cells(row, task, seeds).items()}
    elif what == "reference":
        found = {(seed, what): {**reference_cell(row, task, seed), "prior": prior_score(task, seed)} for seed in seeds}
    else:
        try:
            found = auto_cells(row, task, seeds)
        except TrainingError as error:
            if len(seeds) == 1:
                raise
            print(f"{name}, one of the seeds {seeds} failed, which are now trained one by one: {error}", flush=True)
            return "\n".join(one_by_one(name, seed, what, data, folder) for seed in seeds)
    commit = provenance()["commit"][:10]
    for (seed, strategy), cell in found.items():
        keep_cell(folder, key(name, seed, strategy), method(name, strategy), {**cell, "commit": commit})
    return "\n".join(f"{name}, seed {seed}: {strategy} {cell['score']:.3f}" for (seed, strategy), cell in found.items())


def one_by_one(name: str, seed: int, what: str, data: Path | None, folder: Path) -> str:
    """What a job of one seed says, or why it failed."""
    try:
        return run_job(name, (seed,), what, data, folder)
    except TrainingError as error:
        return f"{name}, seed {seed} failed: {error}"


def method(name: str, strategy: str) -> int:
    """Version of what a column measures in a row."""
    return METHOD.get(strategy, METHOD.get(name, METHOD[ROWS[name].kind]))


def key(name: str, seed: int, strategy: str) -> str:
    """File name of a cell."""
    return f"{name}-{seed}-{strategy}".replace(" ", "_").replace(",", "")


def known_cells(seeds: Sequence[int], folder: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Finished cells, from the folder and from the result file."""
    found = {}
    path = RESULTS / f"{NAME}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for name, by_strategy in kept.get("cells", {}).items():
        for strategy, cells in by_strategy.items():
            if kept["method"][name][strategy] == method(name, strategy):
                found |= {(name, int(seed), strategy): cell for seed, cell in cells.items()}
    for name in ROWS:
        for seed in seeds:
            for strategy in (*COLUMNS, "reference"):
                cell = read_cell(folder, key(name, seed, strategy), method(name, strategy))
                if cell is not None:
                    found[name, seed, strategy] = cell
    return found


def rounded(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell as it is kept: six digits are more than its noise."""
    return {quantity: float(f"{value:.6g}") if isinstance(value, float) else value
            for quantity, value in cell.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median over seeds and its spread."""
    low, high = (float(np.quantile(values, share)) for share in (0.25, 0.75))
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"median": statistics.median(values), "quartile_1": low, "quartile_3": high,
            "mean": statistics.mean(values), "standard_error": error, "seeds": len(values)}


def gather(cells: Mapping[tuple[str, int, str], dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The result file's content."""
    table: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    for name in names:
        own = {strategy: {seed: rounded(cell) for (row, seed, who), cell in sorted(cells.items()) if row == name
                          and who == strategy} for strategy in (*COLUMNS, "reference")}
        own = {strategy: found for strategy, found in own.items() if found}
        if not own:
            continue
        raw[name] = own
        # All columns over the same seeds.
        common = set.intersection(*(set(found) for strategy, found in own.items() if strategy != "reference"))
        entry: dict[str, Any] = {"target": ROWS[name].target, "n": ROWS[name].n, "seeds": sorted(common)}
        for strategy, found in own.items():
            some = [cell for seed, cell in found.items() if seed in common or strategy == "reference"]
            if some:
                entry[strategy] = {quantity: summary([cell[quantity] for cell in some])
                                   for quantity in ("score", "coverage_90", "seconds") if quantity in some[0]}
                if "uniformity_p" in some[0]:
                    entry[strategy]["uniform_at_1_percent"] = statistics.mean(
                        cell["uniformity_p"] >= 0.01 for cell in some)
        if own.get("reference"):
            first = next(iter(own["reference"].values()))
            entry["floor"], entry["prior"] = first.get("kind"), first.get("prior")
        table[name] = entry
    methods = {name: {strategy: method(name, strategy) for strategy in own} for name, own in raw.items()}
    return {"method": methods, "columns": COLUMNS, "table": table, "cells": raw}


def show(table: Mapping[str, Any]) -> None:
    """Prints medians over seeds."""
    print(f"{'':30s} seeds " + " ".join(f"{name[:13]:>13s}" for name in (*COLUMNS, "reference", "prior", "target")))
    for name, entry in table.items():
        cells = [entry[column]["score"]["median"] if column in entry else None for column in (*COLUMNS, "reference")]
        cells += [entry.get("prior"), entry["target"]]
        print(f"{name:30s} {len(entry['seeds']):5d} "
              + " ".join(f"{'' if cell is None else f'{cell:.3f}':>13s}" for cell in cells), flush=True)


def markdown(table: Mapping[str, Any]) -> str:
    """The table of the README: medians over seeds."""
    columns = [*COLUMNS, "floor", "prior"]
    lines = ["| row | seeds | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
             "|---" * (len(columns) + 2) + "|"]
    for name, entry in table.items():
        found = [entry[column]["score"]["median"] if column in entry else None for column in (*COLUMNS, "reference")]
        found.append(entry.get("prior"))
        digits = 3 if name.startswith(("g_and_k likelihood", "toggle")) else 2
        lines.append(f"| {name} | {len(entry['seeds'])} | "
                     + " | ".join("" if value is None else f"{value:.{digits}f}" for value in found) + " |")
    return "\n".join(lines)


def draw(content: Mapping[str, Any], path: Path) -> None:
    """One panel a row: every seed a dot, the median a bar, the floor and the prior as lines."""
    table, cells = content["table"], content["cells"]
    figure = new_figure(12.0, 2.2 * len(table))
    grid = figure.add_gridspec(math.ceil(len(table) / 2), 2)
    for index, (name, entry) in enumerate(table.items()):
        axes = figure.add_subplot(grid[index // 2, index % 2])
        shown = [column for column in COLUMNS if column in entry]
        tops = []
        for place, column in enumerate(reversed(shown)):
            values = [cell["score"] for seed, cell in cells[name][column].items() if seed in entry["seeds"]]
            middle = entry[column]["score"]["median"]
            colour = TRUTH if column == "auto" else COLOURS[0]
            axes.plot(values, [place] * len(values), "o", markersize=4, alpha=0.5, color=colour, clip_on=True)
            axes.plot([middle] * 2, [place - 0.35, place + 0.35], color=colour, linewidth=2.2)
            tops.append(middle)
        lines = [(entry.get("prior"), "prior", ":"), (entry["target"], "target", "--")]
        if "reference" in entry:
            lines.append((entry["reference"]["score"]["median"], f"floor ({entry['floor']})", "-"))
        for value, what, style in lines:
            if value is not None:
                axes.axvline(value, color=GREY, linestyle=style, linewidth=1.0, label=what)
        # What is worse than the prior by far would hide all else.
        known = [value for value, _, _ in lines if value is not None]
        low = min(*known, *tops)
        high = max(tops) if entry.get("prior") is None else min(max(*known, *tops), low + 1.5 * (max(known) - low))
        axes.set_xlim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        dress(axes, title=f"{name} ({len(entry['seeds'])} seeds)", grid="x",
              x="KL, MMD or negative log density (lower is better)" if index >= len(table) - 2 else "")
        axes.set_yticks(range(len(shown)), [column.replace("_", " ") for column in reversed(shown)])
        add_legend(axes, loc="lower right")
    figure.savefig(path, dpi=80)


def jobs_of(
    names: Sequence[str], seeds: Sequence[int], known: Mapping[tuple[str, int, str], Any], first: int
) -> list[tuple[str, Sequence[int], str]]:
    """What is missing, some seeds in one go; first seeds first, so that all rows have about as many."""
    jobs: list[tuple[str, Sequence[int], str]] = []
    for what, most in TOGETHER.items():
        asked = [seed for seed in seeds if what != "reference" or seed < first + REFERENCE_SEEDS]
        for name in names:
            missing = [seed for seed in asked if (name, seed, what) not in known]
            jobs += [(name, missing[at: at + most], what) for at in range(0, len(missing), most)]
    return sorted(jobs, key=lambda job: (job[2] != "published", job[1][0]))


def main() -> None:
    """Runs what is missing and writes `experiments/results/bench_quality.json` and `docs/quality.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=100, help="first seed; hyper-parameters were chosen from 9000 on")
    parser.add_argument("--only", choices=["published", "auto", "reference"], help="only these jobs")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), help="only these rows")
    parser.add_argument("--data", type=Path, help="folder of the CAMELS spectra; without it that row is left out")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cells", type=Path, default=Path("runs") / NAME, help="folder of finished cells")
    parser.add_argument("--gather", action="store_true", help="only gather what is there")
    parser.add_argument("--quick", action="store_true", help="one row and one seed, written to the folder of cells")
    options = parser.parse_args()
    names = [name for name in options.rows or ROWS
             if ROWS[name].task != "camels" or options.data or os.environ.get("MLSBI_CAMELS")]
    seeds = list(range(options.first, options.first + options.seeds))
    if options.quick:
        names, seeds = list(QUICK), seeds[:1]
    known = known_cells(seeds, options.cells)
    jobs = [] if options.gather else jobs_of(names, seeds, known, options.first)
    jobs = [job for job in jobs if options.only in (None, job[2])]
    print(f"{len(jobs)} jobs to run, {len(known)} cells known", flush=True)
    run_all(jobs, options.workers, lambda job: (run_job, *job, options.data, options.cells))
    cells = known_cells(seeds, options.cells)
    content = gather(cells, list(QUICK) if options.quick else list(ROWS))
    show(content["table"])
    print(markdown(content["table"]))
    if options.quick:
        return
    print(write_result(NAME, content, compact="cells"))
    docs = Path(__file__).parents[1] / "docs"
    draw(content, docs / "quality.png")


def run_all(jobs: Sequence[Any], workers: int, call: Callable[[Any], tuple[Any, ...]]) -> None:
    """Runs jobs on several processes; one that fails is told, and the others go on."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(*call(job)): job for job in jobs}
        for done in as_completed(running):
            try:
                print(done.result(), flush=True)
            except Exception as error:  # noqa: BLE001  # hours of others' work go on
                print(f"{running[done]} failed: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
