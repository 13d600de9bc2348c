r"""What the theory's bounds are worth: on random stacks, on the benchmark tasks, and what adjusted gradients cost.

1. 300 random affine stacks of two levels with an affine Gaussian: the measured variance over each of the bounds.
2. The benchmark tasks: how far (P) is from the variance, slopes against n and against the level difference, in how
   many of a spline flow's parameters the derivative jumps, and how their variance then scales; seconds of
   `python -m theory_checks`.
3. Gradients of one step on `ou`, untrained, after 30 epochs and after training: bias by rescaling and projecting.

    python experiments/theory.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from runner import summarise, write_result

from mlsbi import NPE, Level, LevelStack, TrainingOptions, tasks
from mlsbi.data import MultilevelData
from mlsbi.randomness import child_seed
from mlsbi.simulation.campaign import simulate_level
from theory_checks.bounds import check_bounds
from theory_checks.densities import AffineGaussian
from theory_checks.generators import Affine, NormalNoise, Perturbed, UniformNoise
from theory_checks.integrands import Gradient, Loss
from theory_checks.measuring import measure
from theory_checks.report import TheoryReport, theory_report
from theory_checks.scaling import difference_slope
from theory_checks.stabilising import adjusted_gradient
from theory_checks.stacks import box_prior, normal_prior

TASKS = ("ou", "ou2", "g_and_k", "toggle_switch")
STEPS = {"64 + 8 rows": (64, 8), "1000 + 100 rows": (1000, 100)}
TRAINING = TrainingOptions(learning_rate=5e-4, patience=30)  # as when these were measured first
WAYS: dict[str, dict[str, Any]] = {
    "plain": {}, "rescale": {"rescale": True}, "project": {"project": True},
    "rescale + project": {"rescale": True, "project": True}, "correction_limit 1": {"correction_limit": 1.0},
}  # fmt: skip


def random_stack(generator: np.random.Generator) -> tuple[LevelStack, AffineGaussian]:
    """Two affine levels that differ by 0.001 to 1, and an affine Gaussian of theta given x."""
    dim, outputs, noise = (int(generator.integers(1, 4)) for _ in range(3))

    def affine() -> Affine:
        def matrix(columns: int) -> tuple[tuple[float, ...], ...]:
            return tuple(tuple(row) for row in generator.normal(size=(outputs, columns)).tolist())

        return Affine(matrix(dim), matrix(noise), tuple(generator.normal(size=outputs).tolist()))

    base, gap = affine(), float(10 ** generator.uniform(-3, 0))
    if generator.integers(2):
        prior = box_prior(generator.normal(size=dim).tolist(), generator.uniform(0.5, 4, size=dim).tolist())
    else:
        prior = normal_prior(generator.normal(size=dim).tolist(), generator.uniform(0.2, 2, size=dim).tolist())
    draw = (NormalNoise, UniformNoise)[generator.integers(2)](noise)
    stack = LevelStack(prior, draw, [Level("cheap", Perturbed(base, affine(), gap), 1.0), Level("dear", base, 10.0)])
    density = AffineGaussian(torch.from_numpy(generator.normal(size=(dim, outputs))),
                             torch.from_numpy(generator.normal(size=dim)),
                             torch.from_numpy(generator.normal(size=dim) / 2))
    return stack, density


def random_stacks(number: int, rows: int) -> dict[str, Any]:
    """The variance over the bound, per bound, and how many are violated."""
    ratios: dict[str, list[float]] = {}
    violated = 0
    for seed in range(number):
        stack, density = random_stack(np.random.default_rng(seed))
        for check in check_bounds(stack, density, rows=rows, seed=seed):
            violated += check.verdict == "violated"
            name = check.bound if check.bound.startswith("S") else f"{check.bound}, level {check.level}"
            ratios.setdefault(name, []).append(check.ratio)
    return {"stacks": number, "rows": rows, "violated": violated,
            "variance over bound": {name: {"median": statistics.median(found), "largest": max(found)}
                                    for name, found in ratios.items()}}


def on_tasks(seeds: list[int], rows: int) -> dict[str, Any]:
    """What reports on the tasks say, over seeds."""
    found: dict[str, Any] = {}
    for name in TASKS:
        task = tasks.get(name)
        assert task.stack is not None
        reports = [
            theory_report(task.stack, title=name, estimator=task.estimator, embedding=task.embedding, rows=rows,
                          densities=("gaussian", task.density), x_transform=task.x_transform, n=task.budgets[-1],
                          seed=seed)
            for seed in seeds
        ]  # fmt: skip
        found[name] = summary(reports)
    return found


def summary(reports: list[TheoryReport]) -> dict[str, Any]:
    """Medians and ranges over seeds, per density."""
    told: dict[str, Any] = {
        "violated": sum(len(report.violations) for report in reports),
        "A2": [report.assumptions[1].verdict for report in reports],
        "reports without a problem": sum(report.problem is None for report in reports),
    }
    reports = [report for report in reports if report.problem is None]
    if not reports:
        return told
    for place, section in enumerate(reports[0].sections):
        sections = [report.sections[place] for report in reports]

        def over(values: list[float]) -> dict[str, float]:
            finite = [value for value in values if np.isfinite(value)]
            return summarise(finite) if len(finite) > 1 else {"mean": finite[0]} if finite else {}

        told[section.density] = {
            "A3": section.assumption.verdict,
            "bound (P) over variance": over([1 / c.ratio for s in sections for c in s.of("P")
                                             if c.verdict != "not applicable" and c.ratio > 0]),
            "bound (T) over variance": over([1 / c.ratio for s in sections for c in s.of("T")
                                             if c.verdict != "not applicable" and c.ratio > 0]),
            "slope in n": over([slope.value for s in sections for slope in s.sample_slopes]),
            "slope in the level difference": over([slope.value for s in sections for slope in s.difference_slopes]),
            "parameters": section.parameters,
            "parameters whose derivative jumps": over([float(s.jumping) for s in sections]),
            "slope of the gradient": over([slope.value for s in sections for slope in s.gradient_slopes]),
        }
    return told


def adjusted(seeds: list[int], rows: int, repetitions: int) -> dict[str, Any]:
    """Bias of a step's gradient on `ou`, relative to its length, for each adjustment, state of the network and size."""
    stack = tasks.get("ou").stack
    assert stack is not None
    found: dict[str, Any] = {}
    for state, epochs in (("1 epoch", 1), ("30 epochs", 30), ("trained", None)):
        cells: dict[str, dict[str, list[float]]] = {}
        for seed in seeds:
            theta, x = simulate_level(stack, 0, 1000, seed=child_seed(seed, 1), stream=0)
            options = TRAINING if epochs is None else replace(TRAINING, epochs=epochs, validation_fraction=0.0)
            npe = NPE(stack.prior, strategy="low", training=options, seed=seed)
            npe.fit(MultilevelData.from_arrays([(theta, x)]), progress=False)
            gradients = measure(stack, Gradient(npe, "npe", most=300, seed=seed), rows=rows, seed=seed)
            for size, n in STEPS.items():
                for way, how in WAYS.items():
                    one = adjusted_gradient(gradients, n, repetitions=repetitions, seed=seed, **how)
                    cell = cells.setdefault(f"{size}, {way}", {"bias": [], "z": [], "spread": []})
                    for name in cell:
                        cell[name].append(getattr(one, name))
        found[state] = {name: {key: summarise(values) for key, values in cell.items()} for name, cell in cells.items()}
    return found


def activations(seeds: list[int], rows: int) -> dict[str, Any]:
    """Slope of the loss's and the gradient's variance in the level difference, spline flow against tanh mixture."""
    stack = tasks.get("ou").stack
    assert stack is not None
    found: dict[str, Any] = {}
    for name in ("nsf", "maf", "mdn"):
        slopes: dict[str, list[float]] = {"loss": [], "gradient": [], "jumping": []}
        for seed in seeds:
            theta, x = simulate_level(stack, 0, 1000, seed=child_seed(seed, 1), stream=0)
            npe = NPE(stack.prior, strategy="low", density=name, training=TRAINING, seed=seed)
            npe.fit(MultilevelData.from_arrays([(theta, x)]), progress=False)
            gradient = measure(stack, Gradient(npe, "npe", most=300, seed=seed), rows=rows, seed=seed)
            loss = replace(gradient, integrand=Loss(npe, "npe"))
            slopes["loss"].append(difference_slope(loss, 1).value)
            slopes["gradient"].append(difference_slope(gradient, 1).value)
            slopes["jumping"].append(float((gradient.jumps > 0).double().mean()))
        found[name] = {key: summarise(values) for key, values in slopes.items()}
    return found


def seconds_of_report() -> float:
    """Wall time of the command line on `ou`, imports and training included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "theory_checks", "ou", "--quiet"], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measures everything and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few stacks, one seed and few rows")
    quick = parser.parse_args().quick
    seeds = [0, 1] if quick else list(range(5))
    rows = 2000 if quick else 20_000
    content = {
        "random affine stacks": random_stacks(20 if quick else 300, 4000),
        "tasks": on_tasks(seeds, rows),
        "networks on ou": activations(seeds, 1000 if quick else 2000),
        "a step's gradient on ou": adjusted(seeds, 1000 if quick else 2000, 200 if quick else 1000),
        "seconds of a report on ou": summarise([seconds_of_report() for _ in range(2 if quick else 5)]),
        "seeds": seeds,
    }
    print(write_result("theory_quick" if quick else "theory", content))


if __name__ == "__main__":
    main()
