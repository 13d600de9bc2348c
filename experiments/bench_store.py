r"""The store of a campaign: how fast it takes records, how large it may grow, and what being killed costs.

Rows of 4 kB; medians over repetitions, with the range.

    python experiments/bench_store.py --folder FOLDER_ON_THE_DISK_TO_MEASURE      # 4.2 GB are written and removed
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runner import write_result
from timing import in_turn

from mlsbi import BoxPrior, Level, LevelStack, open_store, simulate, tasks
from mlsbi.store.records import Records, Stream
from mlsbi.store.store import create_store

_VALUES, _PARAMETERS = 1016, 8  # 4096 bytes a row in single precision
_FLOOR = 2000.0  # records a second that are asked for
_STREAM = Stream(1, 0, (0,))
_KILLING = Path(__file__).parents[1] / "tests" / "simulation" / "killing.py"


def make_records(start: int, stop: int) -> Records:
    """Rows that were simulated in no time."""
    index = np.arange(start, stop)
    output = np.random.default_rng(start).normal(size=(stop - start, _VALUES)).astype(np.float32)
    return Records(index, output[:, :_PARAMETERS].copy(), (output,), np.zeros(stop - start, np.uint8),
                   np.ones((stop - start, 1), np.int64), np.zeros((stop - start, 1)))


def make_stack(pause: float = 0.0) -> LevelStack:
    """A simulator that does next to nothing, twice."""

    def trivial(theta: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        time.sleep(pause)
        return theta[:, :1] + noise

    return LevelStack(
        BoxPrior([0.0] * _PARAMETERS, [1.0] * _PARAMETERS),
        lambda n, generator: torch.randn(n, _VALUES, generator=generator),
        [Level("low", trivial, cost=1), Level("high", trivial, cost=2)],
    )


def in_fresh(folder: Path, use: Callable[[Path], Any]) -> Callable[[], Any]:
    """Does something with a folder that is new every time; removing it is part of the time on both sides."""

    def run() -> None:
        place = Path(tempfile.mkdtemp(dir=folder))
        use(place)
        shutil.rmtree(place)

    return run


def taking_records(folder: Path, rows: int, repetitions: int) -> dict[str, Any]:
    """Records a second, against one `np.save` and fsync of as many bytes."""
    singles = [make_records(row, row + 1) for row in range(rows)]
    whole = np.concatenate([np.concatenate([one.theta, one.outputs[0]], 1) for one in singles])
    stack = make_stack()

    def add(place: Path) -> None:
        store = create_store(place / "store", {}, ["low"], [str(i) for i in range(_PARAMETERS)])
        with store.writing() as writer:
            for one in singles:
                writer.add(_STREAM, one)

    def campaign(place: Path) -> None:
        simulate(stack, (rows, 2), seed=1, store=place / "store", progress=False)

    def save(place: Path) -> None:
        with open(place / "rows.npy", "wb") as file:
            np.save(file, whole)
            file.flush()
            os.fsync(file.fileno())

    found = {}
    for name, use in (("writer.add, one row at a time", add), ("a campaign with a trivial simulator", campaign)):
        times = in_turn(in_fresh(folder, use), in_fresh(folder, save), repetitions)
        rate = rows / times["seconds"]
        found[name] = {"rows": rows, "records_per_second": rate, "ratio_to_floor": rate / _FLOOR,
                       "seconds_to_those_of_np_save": times}
    return found


_PEAK = """
import json, time
from mlsbi import open_store
def peak():  # not getrusage, which starts from the peak of the process that started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
"""
_IMPORT = _PEAK + "import torch, mlsbi.store.store\nprint(json.dumps({'peak_bytes': peak()}))"
_STREAM_ALL = _PEAK + """
import sys
import torch, mlsbi.store.store
start = time.perf_counter()
store = open_store(sys.argv[1])
stream = store.streams[0]
missing = store.missing(stream, 0, store.targets[stream])
opened = time.perf_counter() - start
start = time.perf_counter()
rows = size = 0
for batch in store.batches(0):
    rows, size = rows + len(batch), size + batch.theta.nbytes + batch.fine.nbytes
seconds = time.perf_counter() - start
print(json.dumps({"peak_bytes": peak(), "seconds_to_open": opened, "missing": len(missing), "rows": rows,
                  "bytes": size, "seconds_to_stream": seconds}))
"""


def fresh(code: str, *arguments: object) -> dict[str, Any]:
    """What code prints in an interpreter of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def drop_cache(folder: Path) -> None:
    """Has the system forget the content of files, so that they are read from the disk."""
    for path in folder.rglob("*.npz"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def large_store(folder: Path, rows: int, repetitions: int) -> dict[str, Any]:
    """A store of a million rows: writing it, opening it and streaming it in a process of its own."""
    needed = rows * 4096 * 1.05
    if shutil.disk_usage(folder).free < 1.5 * needed:
        raise SystemExit(f"Expected {1.5 * needed / 1e9:.1f} GB free in {folder}. Choose another by --folder.")
    store = create_store(folder / "large", {}, ["low"], [str(i) for i in range(_PARAMETERS)])
    chunk = min(rows, 1000)
    records = make_records(0, chunk)
    start = time.perf_counter()
    with store.writing() as writer:
        writer.set_target(_STREAM, rows)
        for first in range(0, rows, chunk):
            writer.add(_STREAM, Records(records.index + first, records.theta, records.outputs, records.status,
                                        records.runs, records.seconds))
    writing = time.perf_counter() - start
    found = []
    for _ in range(repetitions):
        drop_cache(folder / "large")
        found.append(fresh(_STREAM_ALL, folder / "large"))
    shards = len(list((folder / "large" / "rows").iterdir()))
    shutil.rmtree(folder / "large")
    if any(one["rows"] != rows or one["missing"] for one in found):
        raise RuntimeError(f"Expected {rows} rows; got {found}.")
    alone = fresh(_IMPORT)["peak_bytes"]
    return {
        "rows": rows, "bytes": found[0]["bytes"], "shards": shards, "seconds_to_write": writing,
        "write_bytes_per_second": found[0]["bytes"] / writing,
        "seconds_to_open": spread([one["seconds_to_open"] for one in found]),
        "peak_bytes": spread([one["peak_bytes"] for one in found]), "peak_bytes_of_imports_alone": alone,
        "stream_bytes_per_second": spread([one["bytes"] / one["seconds_to_stream"] for one in found]),
        "limits": {"seconds_to_open": 2.0, "peak_bytes": 300e6},
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values),
            "repetitions": len(values)}


def overhead(folder: Path, repetitions: int) -> dict[str, Any]:
    """`simulate` of 100 000 vectorised rows with a store against without."""
    stack, rows = tasks.get("ou").stack, (90_000, 10_000)
    return in_turn(
        in_fresh(folder, lambda place: simulate(stack, rows, seed=0, store=place / "store", progress=False)),
        in_fresh(folder, lambda place: simulate(stack, rows, seed=0, progress=False)), repetitions,
    )


def many_shards(folder: Path, repetitions: int) -> dict[str, Any]:
    """Opening a store of 1000 small shards, and resuming a campaign that lacks one row."""
    stack, rows = make_stack(0.06), (1000, 1000)
    with ThreadPoolExecutor(32) as pool:
        simulate(stack, rows, seed=1, store=folder / "many", executor=pool, batch_size=2, progress=False)
    shards = len(open_store(folder / "many").shards)
    opening, resuming = [], []
    for repetition in range(repetitions):
        start = time.perf_counter()
        store = open_store(folder / "many")
        gaps = [store.missing(stream, 0, 1000) for stream in store.streams]
        opening.append(time.perf_counter() - start)
        if any(gaps):
            raise RuntimeError(f"Expected no missing rows; got {gaps}.")
        start = time.perf_counter()
        simulate(stack, (1000 + repetition + 1, 1000), seed=1, store=folder / "many", progress=False)
        resuming.append(time.perf_counter() - start)
    shutil.rmtree(folder / "many")
    return {"shards": shards, "rows": sum(rows), "seconds_to_open": spread(opening),
            "seconds_to_resume_for_one_row": spread(resuming)}


def killing(kills: int, seeds: int) -> dict[str, Any]:
    """Campaigns killed at random moments; see `tests/simulation/killing.py`."""
    found = []
    for seed in range(seeds):
        command = [sys.executable, str(_KILLING), "--kills", str(kills), "--workers", "4", "--seed", str(seed)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(seed, found[-1], flush=True)
    summed = ("kills", "rows", "simulations", "started", "finished_ran_again", "finished_vanished", "finished_but_lost",
              "finished_but_lost_seconds", "replays", "under_way_at_a_kill_and_started_again")  # fmt: skip
    lost = {name: [value for one in found for value in one[f"{name}_at_each_kill"]]
            for name in ("finished_but_lost", "finished_but_lost_seconds")}
    return {**{name: sum(one[name] for one in found) for name in summed},
            **{f"{name}_per_kill": {"median": statistics.median(values), "maximum": max(values)}
               for name, values in lost.items()},
            "identical": all(one["identical"] for one in found), "cells": found}


def main() -> None:
    """Measures everything and writes `experiments/results/bench_store.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where stores are written; the system's temporary one if left out")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small, to see whether all works; writes no result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repetitions = 2 if options.quick else options.repetitions
    results: dict[str, Any] = {}
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "taking records": lambda folder: taking_records(folder, 4000 if options.quick else 20_000, repetitions),
        "a large store": lambda folder: large_store(folder, 50_000 if options.quick else 1_000_000,
                                                    min(repetitions, 5)),
        "simulate 100 000 rows of ou with a store, to without": lambda folder: overhead(folder, repetitions),
        "many small shards": lambda folder: many_shards(folder, repetitions),
        "kills": lambda folder: killing(3 if options.quick else 25, 1 if options.quick else options.seeds),
    }
    for name, measure in parts.items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results[name] = measure(Path(folder))
        print(f"{name} ({time.perf_counter() - start:.0f} s)\n{json.dumps(results[name], indent=1)}", flush=True)
    if not options.quick:
        print(write_result("bench_store", {"threads": 1, "results": results}))


if __name__ == "__main__":
    main()
