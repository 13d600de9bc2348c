r"""sigma_8 from real matter power spectra: multilevel, transfer learning and each level alone, on the same splits.

Every seed is its own split of the 1000 spectra (20 pairs, 580 gravity-only rows, 400 test rows), its own noise and its
own initialisation; all strategies see the same rows. It runs `mlsbi run camels` with its defaults.

    python experiments/camels_strategies.py --data FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from runner import resume_cell, summarise, write_result

from mlsbi.cli.main import main as mlsbi

STRATEGIES = ("multilevel", "transfer", "high", "low")


def run_cell(strategy: str, seed: int, data: Path, extra: list[str]) -> dict[str, Any]:
    """The checks of one `mlsbi run camels`."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = Path(folder) / "run"
        arguments = ["run", "camels", "--data", str(data), "--strategy", strategy, "--seed", str(seed), "--quiet"]
        code = mlsbi([*arguments, *extra, "--out", str(out)])
        if code:
            raise RuntimeError(f"mlsbi {arguments} ended with {code}")
        results = json.loads((out / "results.json").read_text())
    record = results["strategies"][0]
    checks = record["checks"]
    return {
        "n": results["spent"]["n"],
        "nlpd": checks["nlpd"]["mean"],
        "median": checks["nlpd"]["median"],
        "coverage_90": dict(zip(map(str, checks["coverage"]["credibility"]), checks["coverage"]["found"],
                                strict=True))["0.9"],
        "uniformity_p": checks["coverage"]["p"],
        "training_seconds": sum(network["seconds"] for network in record["training"]),
        "asked": {"strategy_options": record["options"],
                  **{key: results["asked"][key] for key in ("density", "training", "ensemble")}},
    }


def main() -> None:
    """Runs what is missing and writes `experiments/results/camels_strategies.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the CAMELS spectra")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--cells", type=Path, default=Path("runs/camels_strategies"), help="folder of finished cells")
    parser.add_argument("--extra", nargs="*", default=[], help="further options of `mlsbi run`")
    options = parser.parse_args()
    cells: dict[str, list[dict[str, Any]]] = {strategy: [] for strategy in STRATEGIES}
    for seed in range(options.seeds):
        for strategy in STRATEGIES:
            key = "-".join([strategy, str(seed), *options.extra])
            cell = resume_cell(
                options.cells, key, lambda s=strategy, i=seed: run_cell(s, i, options.data, options.extra)
            )
            cells[strategy].append(cell)
            print(f"seed {seed} {strategy:10s} NLPD {cell['nlpd']:.3f}", flush=True)
    nlpd = {strategy: [cell["nlpd"] for cell in found] for strategy, found in cells.items()}
    differences = {
        f"multilevel - {other}": summarise([a - b for a, b in zip(nlpd["multilevel"], nlpd[other], strict=True)])
        for other in STRATEGIES[1:]
    }
    result = {
        "seeds": list(range(options.seeds)), "prior_nlpd": math.log(0.4),
        "nlpd": {strategy: summarise(values) for strategy, values in nlpd.items()},
        "paired_differences": differences,
        "coverage_90": {strategy: summarise([c["coverage_90"] for c in found]) for strategy, found in cells.items()},
        "cells": {strategy: [{k: v for k, v in c.items() if k != "asked"} for c in found]
                  for strategy, found in cells.items()},
        "asked": {strategy: found[0]["asked"] for strategy, found in cells.items()},
    }
    for strategy, row in result["nlpd"].items():
        print(f"{strategy:10s} mean {row['mean']:.3f} +- {row['standard_error']:.3f}, median {row['median']:.3f}")
    for name, row in differences.items():
        print(f"{name}: {row['mean']:.3f} +- {row['standard_error']:.3f}")
    print(write_result("camels_strategies", result))


if __name__ == "__main__":
    main()
