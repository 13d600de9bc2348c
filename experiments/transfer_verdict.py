r"""Does the verdict of `mlsbi.diagnostics.transfer` order cheap levels as posteriors trained on them do?

The perturbation study of Krouglova et al. (2025, arXiv 2502.08416) on the task ou2: the low level is the high one with
delta added to sigma, delta in 0, .1, .3, 1 and 3, with and without reversing the order of its outputs. Every seed
pilots each of the ten cases with 100 joint rows and asks for the verdict, then trains by transfer learning on 10 000
low rows and those 100 high ones, and scores the posterior on 2000 test rows: mean negative log posterior density, lower
is better. Training on the 100 high rows alone is the baseline, the same for all cases.

Reported are the rank correlation of the verdict's score with the NLPD over the ten cases, for each seed and for means
over seeds, and how many pairs of cases whose mean NLPD differ by more than two standard errors (paired by seed) the
score orders rightly.

    python experiments/transfer_verdict.py
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from runner import resume_cell, summarise, write_result
from scipy.stats import spearmanr

from mlsbi import NPE, Multilevel, SingleLevel, TrainingOptions, TransferLearning, pilot, simulate, tasks
from mlsbi.diagnostics import nlpd, transfer

DELTAS = (0.0, 0.1, 0.3, 1.0, 3.0)
CASES = {f"delta {delta:g}{', reversed' if reverse else ''}": (delta, reverse)
         for reverse in (False, True) for delta in DELTAS}  # fmt: skip
BASELINE = "high alone"
MEASURES = ("score", "information", "carried", "coherence", "in_place", "variance_reduction", "correlation")


def run_cell(case: str, seed: int, sizes: argparse.Namespace) -> dict[str, Any]:
    """The verdict on one case, and the score of what is trained on it."""
    delta, reverse = CASES.get(case, (0.0, False))
    task = tasks.get("ou2", low="ou", extra_noise=delta, reverse=reverse)
    report = pilot(task.stack, sizes.pairs, seed=seed, progress=False)
    data = simulate(task.stack, (sizes.low, sizes.pairs), seed=seed, reuse=report.data, progress=False)
    theta, x = task.test(sizes.test, seed)
    strategies: dict[str, Any] = {"transfer": TransferLearning(), **({"multilevel": Multilevel()} if sizes.multilevel
                                                                     else {})}
    found: dict[str, Any] = {}
    if case == BASELINE:
        strategies = {"high": SingleLevel(-1)}
    else:
        level = transfer(task.stack, report, seed=seed, progress=False).levels[0]
        found = {
            "score": level.score, "verdict": level.verdict, "variance_reduction": level.variance_reduction,
            "cost_interval": level.cost_interval, "correlation": level.correlation,
            "information": level.information.mean, "information_control": level.information.control,
            "carried": level.information.mean_carried, "carried_control": level.information.carried_control,
            "coherence": level.coherence.linear, "coherence_control": level.coherence.control,
            "in_place": level.coherence.in_place,
        }  # fmt: skip
    for name, strategy in strategies.items():
        npe = NPE(task.prior, strategy=strategy, density=task.density, seed=seed, training=training(sizes))
        posterior = npe.fit(data, progress=False).posterior()
        scored = nlpd(posterior.log_prob_batched(theta[None], x)[0])
        found[name] = {"nlpd": scored.mean, "median": scored.median, "seconds": npe.history.seconds}
    return found


def training(sizes: argparse.Namespace) -> TrainingOptions:
    """The settings of the study, with the library's share of held-out rows."""
    return TrainingOptions(learning_rate=5e-4, batch_size=200, patience=20, epochs=sizes.epochs)


def judge(cells: dict[str, list[dict[str, Any]]], strategy: str, measure: str) -> dict[str, Any]:
    """How well a measure orders the cases as the NLPD of a strategy does."""
    values = {case: [cell[measure] for cell in found] for case, found in cells.items()}
    scores = {case: [cell[strategy]["nlpd"] for cell in found] for case, found in cells.items()}
    ranks = [spearmanr([values[case][i] for case in cells], [-scores[case][i] for case in cells]).statistic
             for i in range(len(next(iter(scores.values()))))]
    means = {case: (statistics.mean(values[case]), statistics.mean(scores[case])) for case in cells}
    apart, wrong = 0, []
    for one, other in itertools.combinations(cells, 2):
        gap = summarise([a - b for a, b in zip(scores[one], scores[other], strict=True)])
        if abs(gap["mean"]) > 2 * gap["standard_error"]:
            apart += 1
            better, worse = (one, other) if gap["mean"] < 0 else (other, one)
            if means[better][0] <= means[worse][0]:
                wrong.append([better, worse])
    return {
        "spearman_of_means": float(spearmanr(*zip(*((value, -score) for value, score in means.values()),
                                                  strict=True)).statistic),
        "spearman_per_seed": summarise([float(rank) for rank in ranks]),
        "pairs_apart": apart, "ordered_rightly": apart - len(wrong), "ordered_wrongly": wrong,
    }  # fmt: skip


def report_on(
    cells: dict[str, list[dict[str, Any]]], seeds: Sequence[int], sizes: argparse.Namespace
) -> dict[str, Any]:
    """What the result file holds."""
    cases = {case: found for case, found in cells.items() if case != BASELINE}
    strategies = ["transfer", *(["multilevel"] if sizes.multilevel else [])]
    return {
        "seeds": list(seeds), "rows": {"low": sizes.low, "pairs": sizes.pairs, "test": sizes.test},
        "training": asdict(training(sizes)),
        "high_alone": summarise([cell["high"]["nlpd"] for cell in cells[BASELINE]]),
        "nlpd": {strategy: {case: summarise([cell[strategy]["nlpd"] for cell in found])
                            for case, found in cases.items()} for strategy in strategies},
        "measures": {measure: {case: summarise([cell[measure] for cell in found]) for case, found in cases.items()}
                     for measure in MEASURES},
        "order": {strategy: {measure: judge(cases, strategy, measure) for measure in MEASURES}
                  for strategy in strategies},
        "cells": cells,
    }  # fmt: skip


def main() -> None:
    """Runs what is missing and writes `experiments/results/transfer_verdict.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=30, help="first seed; the score was chosen on others")
    parser.add_argument("--low", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--multilevel", action="store_true", help="train by the multilevel loss too")
    parser.add_argument("--cells", type=Path, default=Path("runs/transfer_verdict"), help="folder of finished cells")
    parser.add_argument("--name", default="transfer_verdict", help="of the result file")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    setting = f"{options.low}-{options.pairs}-{options.test}-{options.epochs}{'-multilevel' * options.multilevel}"
    cells: dict[str, list[dict[str, Any]]] = {case: [] for case in (*CASES, BASELINE)}
    for seed in seeds:
        for case, found in cells.items():
            key = f"{case}-{seed}-{setting}".replace(", ", "_").replace(" ", "_")
            found.append(resume_cell(options.cells, key, lambda c=case, s=seed: run_cell(c, s, options)))
            told = "  ".join(f"{name} NLPD {found[-1][name]['nlpd']:.3f}" for name in ("transfer", "multilevel", "high")
                             if name in found[-1])
            print(f"seed {seed} {case:20s} {told}" + (f"  score {found[-1]['score']:.3f}" if "score" in found[-1]
                                                      else ""), flush=True)
    result = report_on(cells, seeds, options)
    for case, row in result["nlpd"]["transfer"].items():
        score = result["measures"]["score"][case]
        print(f"{case:20s} NLPD {row['mean']:.3f} +- {row['standard_error']:.3f}  score {score['mean']:.3f} +- "
              f"{score['standard_error']:.3f}")
    for strategy, measures in result["order"].items():
        for measure, row in measures.items():
            print(f"{strategy:10s} by {measure:18s} rank correlation {row['spearman_of_means']:.2f}, per seed "
                  f"{row['spearman_per_seed']['mean']:.2f} +- {row['spearman_per_seed']['standard_error']:.2f}; "
                  f"{row['ordered_rightly']} of {row['pairs_apart']} pairs")
    print(write_result(options.name, result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
