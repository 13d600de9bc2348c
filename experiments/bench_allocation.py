r"""What planning promises against what happens: published cases, realised variances, intervals, and how long it takes.

1. The cases of the literature with known answers, by `optimal_allocation`, and by `pilot` on the option stacks.
2. Stacks like the toggle switch, at a fixed network: the variance of the multilevel loss over repetitions of the whole
   campaign, relative to what was predicted with the variances of one large pilot; with unit and with optimal weights.
3. How often the 90% bootstrap interval of a pilot of 64 rows holds the sizes that the true variances call for.
4. Seconds: an allocation of 20 levels, and a pilot of `ou` with the gradient as integrand.

    python experiments/bench_allocation.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from runner import summarise, write_result
from torch import Tensor

from mlsbi import NLE, BoxPrior, Level, LevelStack, TrainingOptions, optimal_allocation, pilot, simulate, tasks
from mlsbi.priors import Unbounded
from mlsbi.tasks.toggle_switch import build as build_toggle_switch
from mlsbi.tasks.toggle_switch import noise as toggle_noise
from mlsbi.tasks.toggle_switch import run as run_toggle_switch

SPOT, STRIKE, RATE, VOLATILITY, LEVELS, FACTOR = 100.0, 100.0, 0.05, 0.2, 6, 4
PUBLISHED_CALL = (161.79, 4.4421, 1.0584, 0.27246, 0.068922, 0.017214)
PUBLISHED_CALL_N = (4_263_226, 352_669, 86_856, 21_828)
PUBLISHED_DIGITAL_KURTOSIS = (32.0, 54.0, 105.0, 209.0, 420.0)
ROWS_REPEATED, REPETITIONS, LARGE_PILOT = (400, 60, 20), 2000, 200_000
HORIZONS = ((50, 80, 300), (20, 100, 300), (80, 300))


def option_stack(levels: int = LEVELS) -> LevelStack:
    """Geometric Brownian motion by Euler with 4^l steps: the value at the end; theta plays no part."""

    def euler(theta: Tensor, noise: Tensor, steps: int) -> Tensor:
        kicks = noise.reshape(len(noise), steps, -1).sum(2)  # increments of the finest path, added up
        spot = torch.full((len(noise),), SPOT, dtype=torch.float64)
        for step in range(steps):
            spot = spot * (1 + RATE / steps + VOLATILITY * kicks[:, step])
        return spot[:, None]

    finest = FACTOR ** (levels - 1)

    def noise(n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, finest, generator=generator, dtype=torch.float64) / math.sqrt(finest)

    costs = [float(FACTOR**level) for level in range(levels)]
    return LevelStack(
        BoxPrior([0.0], [1.0]), noise,
        [Level(f"{FACTOR**level} steps", partial(euler, steps=FACTOR**level), cost)
         for level, cost in enumerate(costs)],
        pair_costs=costs,
    )


def call(theta: Tensor, x: Tensor) -> Tensor:
    """Discounted payoff of a European call."""
    return math.exp(-RATE) * (x[:, 0] - STRIKE).clamp(min=0)


def digital(theta: Tensor, x: Tensor) -> Tensor:
    """Discounted payoff of a digital call."""
    return math.exp(-RATE) * STRIKE * (x[:, 0] > STRIKE).double()


def published_cases() -> dict[str, Any]:
    """Whether each published answer is reproduced: sizes exactly, those of Giles' adaptive run within 1%."""
    plan = optimal_allocation
    budgets = [([1, 3], [4, 1], 8, (4, 1), 2.0), ([1, 3, 5], [4, 1, 0.5], 24, (8, 2, 1), 1.5),
               ([1, 3, 5, 11], [4, 1, 0.5, 0.25], 64, (16, 4, 2, 1), 1.0)]
    one = [plan(v, c, budget=f * b).n == tuple(f * k for k in n)
           and math.isclose(plan(v, c, budget=f * b).variance, variance / f, rel_tol=1e-12)
           for c, v, b, n, variance in budgets for f in (1, 2)]
    rounded = plan([4, 1, 0.5], [1, 3, 5], budget=36)
    targets = [plan([4, 1], pair_costs=[1, 4], target_variance=error**2) for error in (0.1, 0.01)]
    costs = [1, 4, 16, 64]
    european = plan(PUBLISHED_CALL[:4], costs, pair_costs=costs, target_variance=0.75e-4, single_level_variance=215.6)
    nested = plan([0.25, 0.75], pair_costs=[4, 4800], budget=14_640)
    return {
        "1: budgets": all(one),
        "2: best integers": rounded.n in {(12, 4, 1), (8, 3, 2)} and math.isclose(rounded.variance, 13 / 12),
        "3: targets": [found.n for found in targets] == [(800, 200), (80_000, 20_000)]
        and [found.cost for found in targets] == [1600, 160_000],
        "4: European call": bool(np.allclose(european.n, PUBLISHED_CALL_N, rtol=0.01)
                                 and math.isclose(european.cost, 8.46e6, rel_tol=0.01)
                                 and math.isclose(european.speedup, 21.7, rel_tol=0.01)),
        "6: nested samples": nested.n == (60, 3) and math.isclose(nested.variance, 61 / 240),
        "4: sizes": {"found": european.n, "published": PUBLISHED_CALL_N, "speedup": european.speedup},
    }


def measured_options(rows: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Variances, kurtosis and warnings of a pilot on the option stacks, over seeds."""
    reports = {name: [pilot(option_stack(), rows, seed=seed, integrand=payoff, progress=False) for seed in seeds]
               for name, payoff in (("call", call), ("digital", digital))}

    def warned(report: Any) -> bool:
        return any("rare rows" in warning for warning in report.warnings)

    return {
        "rows": rows, "seeds": list(seeds),
        "call variances": [summarise(list(column)) for column in
                           zip(*(report.variances.tolist() for report in reports["call"]), strict=True)],
        "call variances published": PUBLISHED_CALL,
        "call kurtosis": np.median([report.kurtosis for report in reports["call"]], 0).tolist(),
        "call warned": sum(map(warned, reports["call"])),
        "call rates": reports["call"][0].rates,
        "digital kurtosis": np.median([report.kurtosis[1:] for report in reports["digital"]], 0).tolist(),
        "digital kurtosis published": PUBLISHED_DIGITAL_KURTOSIS,
        "digital beta": statistics.median(report.rates["beta"] for report in reports["digital"]),
        "digital warned": sum(map(warned, reports["digital"])),
    }


def toggle_stack(horizons: Sequence[int]) -> LevelStack:
    """The toggle switch with other path lengths as levels."""
    return LevelStack(build_toggle_switch().prior, toggle_noise,
                      [Level(f"{steps} steps", partial(run_toggle_switch, steps=steps), float(steps))
                       for steps in horizons])


def fixed_loss(stack: LevelStack, seed: int, epochs: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss under a likelihood network that was trained for some epochs and stays as it is."""
    nle = NLE(stack.prior, strategy="low", density=tasks.get("toggle_switch").density, seed=seed,
              training=TrainingOptions(epochs=epochs, validation_fraction=0.0, precision="float64"))
    nle.fit(simulate(stack, (1000,) * len(stack), seed=seed, progress=False), progress=False)
    network, unbounded = nle.networks[0], Unbounded(stack.prior)

    @torch.no_grad()
    def loss(theta: Tensor, x: Tensor) -> Tensor:
        return -network.log_prob(x.double(), unbounded.features(theta).double())

    return loss


def realised(horizons: Sequence[int], epochs: int, seed: int, repetitions: int) -> dict[str, Any]:
    """The variance of the multilevel estimate over repeated campaigns, relative to the predicted one."""
    stack = toggle_stack(horizons)
    loss = fixed_loss(stack, seed, epochs)
    report = pilot(stack, LARGE_PILOT, seed=seed, integrand=loss, progress=False)
    budget = float(np.dot(ROWS_REPEATED[-len(horizons):], report.pair_costs))
    found: dict[str, Any] = {"levels": list(horizons), "epochs": epochs, "seed": seed, "budget": budget,
                             "kurtosis": report.kurtosis.tolist()}
    for weights in ("unit", "optimal"):
        plan = optimal_allocation(report.variances, report.costs, budget=budget, covariance=report.covariance,
                                  weights=weights)
        a = np.ones(len(horizons)) if weights == "unit" else np.array(plan.weights)
        data = simulate(stack, [n * repetitions for n in plan.n], seed=seed + 1, progress=False)
        estimates = np.zeros(repetitions)
        for level, (rows, n) in enumerate(zip(data.levels, plan.n, strict=True)):
            values = a[level] * loss(rows.theta, rows.fine).numpy()
            if rows.coarse is not None:
                values = values - a[level - 1] * loss(rows.theta, rows.coarse).numpy()
            estimates += values.reshape(repetitions, n).mean(1)
        kurtosis = float(((estimates - estimates.mean()) ** 4).mean() / estimates.var() ** 2)
        found[weights] = {
            "n": list(plan.n), "predicted": plan.variance, "realised": float(estimates.var(ddof=1)),
            "ratio": float(estimates.var(ddof=1)) / plan.variance,
            "ratio_standard_error": math.sqrt((kurtosis - 1) / repetitions), "speedup": plan.speedup,
            "weights": a.tolist(),
        }
    return found


def interval_coverage(pilots: int, rows: int) -> dict[str, Any]:
    """How often intervals of small pilots hold the sizes of a large one, for the outputs of `ou`."""
    stack = tasks.get("ou").stack
    # The unit of an output is a pilot's own standard deviation, which moves all levels' variances alike: n stays.
    truth = pilot(stack, 200_000, seed=10_000, integrand="output", progress=False).sizes(1e6)["n"].to_numpy()
    inside = []
    for seed in range(pilots):
        frame = pilot(stack, rows, seed=seed, integrand="output", progress=False).sizes(1e6)
        inside.append(((frame["low"] <= truth) & (truth <= frame["high"])).to_numpy())
    return {"pilots": pilots, "rows": rows, "nominal": 0.9, "held": np.mean(inside, 0).tolist()}


def allocation_seconds(problems: int) -> dict[str, Any]:
    """Seconds of an allocation of 20 levels and a budget of a million."""
    seconds = []
    for seed in range(problems):
        rng = np.random.default_rng(seed)
        spread = rng.uniform(0.5, 2.0, 20) if seed else np.ones(20)
        variances, costs = 2.0 ** -np.arange(20) * spread, 1.7 ** np.arange(20)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            optimal_allocation(variances, pair_costs=costs, budget=1e6)
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
    return {"problems": problems, "median": statistics.median(seconds), "worst": max(seconds), "aim": 0.01}


def pilot_seconds(repetitions: int) -> dict[str, Any]:
    """Seconds of a pilot of `ou` with the gradient as integrand, on two threads."""
    torch.set_num_threads(2)
    seconds = []
    for seed in range(repetitions):
        start = time.perf_counter()
        pilot(tasks.get("ou").stack, 64, seed=seed, integrand="gradient", progress=False)
        seconds.append(time.perf_counter() - start)
    return {"threads": 2, "repetitions": repetitions, "median": statistics.median(seconds), "worst": max(seconds),
            "aim": 20}


def main() -> None:
    """Measures everything and writes `experiments/results/bench_allocation.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--pilots", type=int, default=300)
    options = parser.parse_args()
    result: dict[str, Any] = {"cases": published_cases(), "seconds": {
        "allocation of 20 levels": allocation_seconds(50), "gradient pilot of ou": pilot_seconds(5),
    }}
    print(result, flush=True)
    result["options"] = measured_options(4000, range(5))
    print(result["options"], flush=True)
    result["interval_coverage"] = interval_coverage(options.pilots, 64)
    print(result["interval_coverage"], flush=True)
    cells = []
    for horizons in HORIZONS:
        for seed, epochs in ((0, 1), (1, 30), (2, 300)):
            cells.append(realised(horizons, epochs, seed, options.repetitions))
            print(cells[-1], flush=True)
    ratios = [cell[weights]["ratio"] for cell in cells for weights in ("unit", "optimal")]
    result["realised"] = {
        "repetitions": options.repetitions, "pilot_rows": LARGE_PILOT, "cells": cells,
        "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}, "aim": 0.15,
    }
    print(write_result("bench_allocation", result))


if __name__ == "__main__":
    main()
