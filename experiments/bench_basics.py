r"""Speed and memory of the basics: imports, simulating, a whole run. Training has `bench_training.py`.

Every figure is a ratio of two things measured in turn on the same machine, the median over repetitions.

    python experiments/bench_basics.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runner import write_result
from timing import in_turn

from mlsbi import simulate, tasks


def python(code: str) -> Callable[[], Any]:
    """Runs code in a fresh interpreter."""
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def importing(repetitions: int) -> dict[str, Any]:
    """Importing against importing torch, fresh interpreters."""
    return {
        "import mlsbi": in_turn(python("import mlsbi"), python("import torch"), repetitions),
        "from mlsbi import NPE": in_turn(python("from mlsbi import NPE"), python("import torch"), repetitions),
    }


def simulating(repetitions: int) -> dict[str, Any]:
    """`simulate` of 100 000 vectorised rows against drawing and calling the simulators directly."""
    stack = tasks.get("ou").stack
    rows = (90_000, 10_000)

    def ours() -> None:
        simulate(stack, rows, seed=0, progress=False)

    def direct() -> None:
        generator = torch.Generator().manual_seed(0)
        low, high = stack.levels
        theta, noise = stack.prior.sample((rows[0],)), stack.noise(rows[0], generator)
        low.simulate(theta, noise)
        theta, noise = stack.prior.sample((rows[1],)), stack.noise(rows[1], generator)
        high.simulate(theta, noise), low.simulate(theta, noise)

    return {"simulate 100 000 rows of ou": in_turn(ours, direct, repetitions)}


def peak_of(code: str) -> tuple[int, dict[str, Any]]:
    """Peak resident memory of a fresh interpreter, and the JSON that the code prints last."""
    report = "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", code + report], check=True, capture_output=True, text=True)
    *_, said, peak = done.stdout.strip().splitlines()
    return int(peak.split()[1]) * 1024, json.loads(said)


def memory() -> dict[str, Any]:
    """Peak memory of a whole run, and of simulating and one epoch of training on large outputs."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        arguments = ["run", "ou", "--n", "20000,200", "--ensemble", "1", "--quiet", "--out", str(out)]
        run = f"from mlsbi.cli.main import main; main({arguments!r}); print({{}})".replace("{}", '"{}"')
        run_peak, _ = peak_of(run)
        run_data = (out / "data.npz").stat().st_size
    large_peak, large = peak_of(_LARGE)
    return {
        name: {"data_bytes": data, "peak_bytes": peak, "limit_bytes": 3 * data + 2**30,
               "ratio": peak / (3 * data + 2**30)}
        for name, data, peak in (
            ("memory of mlsbi run ou", run_data, run_peak), ("memory with large outputs", large["data"], large_peak)
        )
    }


_LARGE = """
import json, torch
from mlsbi import *
stack = LevelStack(
    prior=BoxPrior([0.0, 0.0], [1.0, 1.0]),
    noise=lambda n, generator: torch.randn(n, 1000, generator=generator),
    levels=[Level("low", lambda t, u: t[:, :1] + u, cost=1), Level("high", lambda t, u: t[:, 1:] + u, cost=5)],
)
data = simulate(stack, (200_000, 2_000), seed=0, progress=False)
NPE(stack.prior, training=TrainingOptions(epochs=1, batch_size=4096), seed=0).fit(data, progress=False)
tensors = [t for level in data for t in (level.theta, level.fine, level.coarse) if t is not None]
print(json.dumps({"data": sum(t.numel() * t.element_size() for t in tensors)}))
"""


def main() -> None:
    """Measures everything and writes `experiments/results/bench_basics.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    results |= memory()
    results |= importing(min(options.repetitions, 7))
    results |= simulating(options.repetitions)
    for name, row in results.items():
        print(f"{name:45s} {row['ratio']:.3f}", {k: round(v, 3) for k, v in row.items() if k in ("lowest", "highest")})
    print(write_result("bench_basics", {"threads": options.threads, "seed": 0, "ratios": results}))


if __name__ == "__main__":
    main()
