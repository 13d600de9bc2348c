r"""Speed of training: a step of the engine against the published loop on nflows, an epoch of NPE against `sbi`.

Every ratio is the reference's time over the engine's, measured in turn on the same machine: above 1 the engine is that
many times faster. Rows are task ou's, standardised and on the device beforehand. A step sees all rows; where that would
be more than 200 000 of all replicates together, both sides see one batch of the size that training chooses by itself.
Replicates trained together are compared with the engine's own plain steps, one replicate after another. The time that
compiling takes is not in a step's, but beside it, with the steps beyond which it pays.

    python experiments/bench_training.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from reference_loops import PlainLoop, sbi_epoch_seconds, sbi_installed
from runner import write_result
from timing import compare, in_turn, stopwatch
from torch.distributions import Distribution

from mlsbi import NPE, NSF, TrainingOptions, tasks
from mlsbi.data import MultilevelData
from mlsbi.density.columns import dropouts
from mlsbi.plots.style import COLOURS, GREY, dress, new_figure
from mlsbi.strategies.fitting import Problem, posterior_problem
from mlsbi.training.descent import Descent, Objective
from mlsbi.training.graphs import CapturedStep
from mlsbi.training.memory import kept_memory
from mlsbi.training.objective import Term, batch_terms
from mlsbi.training.plan import Plan
from mlsbi.training.stack import Stack

NETWORKS = {
    "paper": NSF(transforms=2, hidden=32, blocks=1, bins=2, tail_bound=2.0, dropout=0.1),
    "default": NSF(),
}
SIZES = ((1000, 100), (100_000, 10_000))
REPLICATES = {"cpu": 20, "cuda": 100}
NPE_ROWS, NPE_BATCHES, NPE_EPOCHS = 1000, (200, 50), 20
NPE_HELD_OUT = 0.2  # 800 rows to train on: both batch sizes divide them, so both toolboxes take the same steps

GROWING_ROWS, GROWING_LEVELS, LEVEL_ROWS = (1000, 3000, 10_000, 30_000, 100_000), (2, 3, 4, 5, 6), 2000
FIGURE = Path(__file__).parent.parent / "docs" / "training_cost.png"

_BATCH, _SMALLEST = 2048, 64  # rows of all terms and of one in a step, as batch_size="auto" has them for many rows
_MOST_ROWS = 200_000  # of all replicates in a step: with more, a plain step takes seconds and the engine's gigabytes
_MEASUREMENT = 0.05  # seconds that one timing takes at least, in as many steps as that needs
_FEWEST = 20  # repetitions of a result that is written


@dataclass(frozen=True)
class Engine:
    r"""A way to run the engine.

    Args:
        device: Where.
        compiled: Whether its step is compiled.
        replicates: Networks trained at once.
    """

    device: str
    compiled: bool = False
    replicates: int = 1


ENGINES = {
    "cpu_eager": Engine("cpu"),
    "cpu_compiled": Engine("cpu", compiled=True),
    "cpu_replicates_eager": Engine("cpu", replicates=REPLICATES["cpu"]),
    "cpu_replicates": Engine("cpu", compiled=True, replicates=REPLICATES["cpu"]),
    "gpu_vs_plain": Engine("cuda"),
    "gpu_replicates": Engine("cuda", replicates=REPLICATES["cuda"]),
}
RATIOS = ("cpu_eager", "cpu_compiled", "cpu_replicates_eager", "cpu_replicates", "npe_epoch_vs_sbi", "gpu_vs_plain",
          "gpu_replicates")


# ---- The engine's side ----


class EngineStep:
    r"""A step of the library's engine on fixed rows, every replicate's; what the plain loops are compared with.

    Args:
        problem: Builds networks with its scalers.
        terms: Standardised rows of every term, on the device.
        density: Architecture of the flow.
        engine: How to run it.
    """

    def __init__(self, problem: Problem, terms: Sequence[Term], density: NSF, engine: Engine) -> None:
        networks = [problem.network(density, None, seed=seed).to(engine.device) for seed in range(engine.replicates)]
        masks = {name: (layer.features, layer.p) for name, layer in dropouts(networks[0]).items()}
        self.plan = Plan([terms] * engine.replicates, batch_size=None, dropouts=masks, seeds=range(engine.replicates))
        self.stack = Stack(networks)
        self.stack.train()
        self.descent = Descent(self.stack, Objective(), TrainingOptions(), n=self.plan.n,
                               together=engine.replicates > 1, draws=False)
        self.weights = torch.ones(engine.replicates, len(terms), device=engine.device)
        self.compile_seconds = 0.0
        self.step: Callable[..., Any] = self.descent.step
        if engine.compiled:
            self.descent.compile()
            start = time.perf_counter()
            self()
            self.compile_seconds = time.perf_counter() - start
        if engine.device == "cuda":
            self.step = CapturedStep(self.descent, next(iter(self.plan.epoch())), self.weights)

    def __call__(self) -> None:
        """Takes one step, and leaves the device to finish it."""
        for rows in self.plan.epoch():
            self.step(rows, self.weights)


def npe_epoch_seconds(data: MultilevelData, prior: Distribution, *, batch_size: int, epochs: int) -> float:
    """Seconds per epoch of plain NPE on the high level: one fit without and one with `epochs` more epochs."""

    def fit(epochs: int) -> float:
        training = TrainingOptions(epochs=epochs, patience=epochs, batch_size=batch_size,
                                   validation_fraction=NPE_HELD_OUT)
        npe = NPE(prior, strategy="high", density=NETWORKS["default"], training=training, seed=0)
        return npe.fit(data, progress=False).history.seconds

    few = fit(1)
    return (fit(1 + epochs) - few) / epochs


# ---- The comparisons ----


def rows_of_a_step(problem: Problem, engine: Engine) -> list[Term]:
    """Standardised rows on the engine's device: all, or a batch where all would be too many."""
    terms = [problem.standardise(term).to(engine.device) for term in problem.terms]
    total = sum(len(term) for term in terms)
    if engine.replicates * sum(batch_terms(terms).sizes) <= _MOST_ROWS:
        return terms
    batches = math.ceil(total / _BATCH)
    sizes = [min(len(term), max(math.ceil(len(term) / batches), _SMALLEST)) for term in terms]
    return [term.rows(torch.arange(size, device=engine.device)) for term, size in zip(terms, sizes, strict=True)]


def plain_step(
    problem: Problem, terms: Sequence[Term], density: NSF, engine: Engine, *, halves_together: bool
) -> Callable[[], None]:
    """One step of the published loop."""
    halves = batch_terms(terms).halves()
    dim, condition_dim = problem.input_scaler.mean.numel(), problem.condition_scaler.mean.numel()
    loop = PlainLoop(density, dim, condition_dim, halves_together=halves_together, device=engine.device)
    passes = loop.passes(halves)
    return lambda: loop.step(passes)


def references(
    problem: Problem, terms: Sequence[Term], density: NSF, engine: Engine
) -> dict[str, Callable[[], None]]:
    """What an engine is compared with: the published loop in two forms, or its own plain steps one after another."""
    if engine.replicates == 1:
        return {name: plain_step(problem, terms, density, engine, halves_together=together)
                for name, together in (("plain", False), ("plain, halves together", True))}
    # The same step on other weights takes the same time: one network stands for all.
    alone = EngineStep(problem, terms, density, Engine(engine.device))

    def one_after_another() -> None:
        for _ in range(engine.replicates):
            alone()

    return {"own steps, one replicate after another": one_after_another}


def steps(sizes: Sequence[tuple[int, int]], threads: Sequence[int], repetitions: int) -> list[dict[str, Any]]:
    """Steps of every engine on this machine against both plain loops."""
    found = []
    cuda = torch.cuda.is_available()
    for n in sizes:
        task = tasks.get("ou")
        problem = posterior_problem(task.simulate(n, 0), task.prior)
        for name, engine in ENGINES.items():
            if engine.device == "cuda" and not cuda:
                continue
            terms = rows_of_a_step(problem, engine)
            wait = torch.cuda.synchronize if engine.device == "cuda" else None
            # The host's threads play no part in a step on the GPU.
            for count in threads if engine.device == "cpu" else threads[:1]:
                torch.set_num_threads(count)
                for network, density in NETWORKS.items():
                    if engine.compiled and n != sizes[0]:
                        continue  # compiling again for every shape would take most of the time
                    ours = EngineStep(problem, terms, density, engine)
                    for reference, other in references(problem, terms, density, engine).items():
                        timed = in_turn(other, ours, repetitions, at_least=_MEASUREMENT, wait=wait)
                        found.append({
                            "name": name, "reference": reference, "threads": count, "n": list(n), "network": network,
                            "rows_in_a_step": list(batch_terms(terms).sizes), **asdict(engine),
                            "compile_seconds": ours.compile_seconds, **renamed(timed),
                        })
                        show(found[-1])
    return found


def renamed(timed: dict[str, float]) -> dict[str, float]:
    """The reference was timed as the first of two, so that the ratio is its time over the engine's."""
    return {**timed, "seconds": timed["reference_seconds"], "reference_seconds": timed["seconds"]}


def epochs_against_sbi(threads: Sequence[int], repetitions: int) -> list[dict[str, Any]]:
    """Epochs of plain NPE on the rows of the high level against those of `sbi`, held-out rows scored in both."""
    task = tasks.get("ou")
    data = task.simulate((1, NPE_ROWS), 0)
    theta, x = data.levels[1].theta, data.levels[1].fine
    found = []
    for count in threads:
        torch.set_num_threads(count)
        for batch_size in NPE_BATCHES:
            def ours(batch_size: int = batch_size) -> float:
                return npe_epoch_seconds(data, task.prior, batch_size=batch_size, epochs=NPE_EPOCHS)

            def theirs(batch_size: int = batch_size) -> float:
                return sbi_epoch_seconds(theta, x, task.prior, density=NETWORKS["default"], batch_size=batch_size,
                                         validation_fraction=NPE_HELD_OUT, epochs=NPE_EPOCHS)

            ours(), theirs()
            found.append({
                "name": "npe_epoch_vs_sbi", "reference": "sbi", "threads": count, "n": [NPE_ROWS],
                "network": "default", "batch_size": batch_size,
                **renamed(compare(theirs, ours, repetitions)),
            })
            show(found[-1])
    return found


def growth(repetitions: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of a plain step on all rows, as rows grow at two levels and as levels grow at fixed rows a level."""
    torch.set_num_threads(1)
    task = tasks.get("ou")
    problem = posterior_problem(task.simulate((max(GROWING_ROWS), max(GROWING_ROWS) // 10), 0), task.prior)
    low, pairs = (problem.standardise(term) for term in problem.terms)
    first = torch.arange(max(GROWING_ROWS))
    cells = {
        "rows": [(n + n // 10, [low.rows(first[:n]), pairs.rows(first[: n // 10])]) for n in GROWING_ROWS],
        "levels": [(count, [low.rows(first[:LEVEL_ROWS]), *[pairs.rows(first[:LEVEL_ROWS])] * (count - 1)])
                   for count in GROWING_LEVELS],
    }
    found: dict[str, list[dict[str, float]]] = {}
    for what, sized in cells.items():
        for size, terms in sized:
            step = EngineStep(problem, terms, NETWORKS["default"], Engine("cpu"))
            step()
            taken = [stopwatch(step)() for _ in range(repetitions)]
            halves = sum(batch_terms(terms).sizes)
            found.setdefault(what, []).append({what: size, "halves": halves, "seconds": statistics.median(taken)})
            print(f"{what} {size}: {1e3 * found[what][-1]['seconds']:.2f} ms a step", flush=True)
    return found


def draw_growth(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """The same as a figure, with the line through the origin and the last point."""
    figure = new_figure(9.0, 3.2)
    labels = {"rows": "rows of both levels", "levels": f"levels, {LEVEL_ROWS} rows each"}
    for index, (what, cells) in enumerate(found.items()):
        axes = figure.add_subplot(1, 2, index + 1)
        x, y = [cell[what] for cell in cells], [1e3 * cell["seconds"] for cell in cells]
        line = [y[-1] * cell["halves"] / cells[-1]["halves"] for cell in cells]
        axes.plot(x, line, color=GREY, linewidth=1, label="in proportion to evaluated rows")
        axes.plot(x, y, "o", color=COLOURS[0], label="measured")
        if what == "rows":
            axes.set_xscale("log")
            axes.set_yscale("log")
        else:
            axes.set_xticks(x)
        dress(axes, title="", x=labels[what], y="milliseconds a step")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


# ---- Reporting ----


def headline(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The first row of a name, with fewest threads and rows: replicates of the paper's network, else the default one.

    Of the two forms of the published loop it is the faster one.
    """
    network = "paper" if "replicates" in name else "default"
    return next((row for row in rows if row["name"] == name and row["network"] == network
                 and row["reference"] != "plain"), None)


def show(row: dict[str, Any]) -> None:
    """Prints a row of the table."""
    where = f"{row['name']:20s} {row['reference']:38s} {row['threads']} threads  {row['network']:7s}"
    rows = f"n {'+'.join(map(str, row['n']))}" + (f" by {row['batch_size']}" if "batch_size" in row else "")
    print(f"{where} {rows:15s} {1e3 * row['reference_seconds']:9.3f} / {1e3 * row['seconds']:9.3f} ms = "
          f"{row['ratio']:.2f} ({row['lower_quartile']:.3f} .. {row['upper_quartile']:.3f})  "
          f"others busy on {row['other_cores']:.2f} cores", flush=True)


def pair(text: str) -> tuple[int, int]:
    """Rows of both levels from `1000,100`."""
    low, high = map(int, text.split(","))
    return low, high


def main() -> None:
    """Measures everything and writes `experiments/results/bench_training.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=_FEWEST)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=pair, nargs="+", default=list(SIZES), help="rows of both levels: 1000,100")
    parser.add_argument("--quick", action="store_true", help="the first size, 3 repetitions, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.repetitions = options.sizes[:1], 3
    elif options.repetitions < _FEWEST:
        parser.error(f"Expected at least {_FEWEST} repetitions for a result; got {options.repetitions}. Use --quick to "
                     "look without writing one.")
    with kept_memory():  # as in training; the references have it too
        grown = growth(options.repetitions)
        rows = steps(options.sizes, options.threads, options.repetitions)
    if sbi_installed():
        rows += epochs_against_sbi(options.threads, options.repetitions)
    else:
        print('npe_epoch_vs_sbi is left out: sbi is not installed (pip install -c constraints.txt -e ".[sbi]")')
    if not torch.cuda.is_available():
        print("gpu_vs_plain and gpu_replicates are left out: torch sees no GPU")
    chosen = {name: headline(rows, name) for name in RATIOS}
    ratios = {name: None if row is None else row["ratio"] for name, row in chosen.items()}
    for name, ratio in ratios.items():
        print(f"{name:17s} {'-' if ratio is None else f'{ratio:.3f}'}")
    if not options.quick:
        draw_growth(grown, FIGURE)
        print(write_result("bench_training", {
            "ratios": ratios,
            "ratios_are": "the reference's time over the engine's, median; of each name the first row in `measured` "
            "with the paper's network for replicates, else the default one, against the faster form of the reference",
            "seed": 0, "replicates": REPLICATES, "networks": {name: asdict(net) for name, net in NETWORKS.items()},
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "sbi": version("sbi") if sbi_installed() else None,
            "measured": rows, "growth": grown,
        }))


if __name__ == "__main__":
    main()
