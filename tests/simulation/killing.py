r"""A campaign that is killed again and again, and an account of what was simulated twice or lost.

    python tests/simulation/killing.py --kills 3 --seed 0

Every simulator call notes level, theta and process in a log when it starts. What the store holds at a kill is finished:
it must stay there and must not be in the log again. Prints its findings as one line of JSON.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlsbi import BoxPrior, Level, LevelStack, open_store, per_sample, simulate
from mlsbi.simulation.scheduling import REPLAYED

ENTRY = np.dtype([("level", "u1"), ("theta", "V12"), ("pid", "<i4")])
SECONDS = (5e-5, 0.004, 0.012)  # of one run of each level
PATIENCE = 60.0


def note(level: int, theta: Any) -> None:
    """Adds simulator calls to the log, whole or not at all, and takes their time; does nothing without a log."""
    if "KILLING_LOG" not in os.environ:
        return
    entries = np.empty(len(theta), ENTRY)
    entries["level"], entries["pid"] = level, os.getpid()
    entries["theta"] = np.ascontiguousarray(theta, np.float32).view("V12")[:, 0]
    descriptor = os.open(os.environ["KILLING_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, entries.tobytes())
    os.close(descriptor)
    if "KILLING_HASTE" not in os.environ:
        time.sleep(len(theta) * SECONDS[level])


def rough(theta, noise):
    note(0, theta.numpy())
    return theta + noise["u"]


def medium(theta, noise):
    note(1, theta[None])
    return theta + noise["u"] * (1 + noise["v"])


def fine(theta, noise):
    note(2, theta[None])
    return theta + noise["u"] * (1 + noise["v"] + noise["v"] ** 2)


def draw(n, generator):
    return {"u": torch.randn(n, 3, generator=generator), "v": torch.rand(n, generator=generator)}


def make_stack() -> LevelStack:
    """A vectorised level and two that run row by row."""
    return LevelStack(BoxPrior([0.0, -1.0, 2.0], [1.0, 1.0, 5.0]), draw, [
        Level("rough", rough, 1), Level("medium", per_sample(medium), 80), Level("fine", per_sample(fine), 240),
    ])  # fmt: skip


def campaign(n: tuple[int, ...], store: Path, *, workers: int = 1, batch_size: int | None = None) -> Any:
    return simulate(make_stack(), n, seed=1, store=store, workers=workers, batch_size=batch_size, progress=False)


class Child:
    """The campaign in a process of its own, in a session of its own.

    Args:
        folder: Where the store and the log are.
        n: Rows per level.
        workers: How many.
        batch_size: Rows a call.
    """

    def __init__(self, folder: Path, n: tuple[int, ...], *, workers: int, batch_size: int | None = None) -> None:
        command = [sys.executable, __file__, "--run", ",".join(map(str, n)), "--folder", str(folder)]
        command += ["--workers", str(workers)]
        command += ["--batch-size", str(batch_size)] if batch_size else []
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(command, start_new_session=True, stderr=self.errors,
                                        env={**os.environ, "KILLING_LOG": str(folder / "log")})

    def wait_for(self, condition: Any) -> bool:
        """Whether a condition came true before the campaign ended."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                return False
            if condition():
                return True
            time.sleep(0.002)
        raise TimeoutError(f"The campaign did not get on within {PATIENCE} s: {self.said()}")

    def members(self) -> list[int]:
        """Living processes of its session, workers too; zombies wait for nothing but their parent."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.process.pid and state != "Z":
                found.append(int(path.parent.name))
        return found

    def outlived_by(self) -> float:
        """Seconds until the last worker is gone."""
        start = time.monotonic()
        while self.members() and time.monotonic() < start + PATIENCE:
            time.sleep(0.02)
        return time.monotonic() - start

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode()

    def close(self) -> None:
        for pid in self.members():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()


def read_log(folder: Path) -> list[tuple[int, bytes]]:
    path = folder / "log"
    entries = np.fromfile(path, ENTRY) if path.exists() else np.empty(0, ENTRY)
    return list(zip(entries["level"].tolist(), entries["theta"].tolist(), strict=True))


def finished(folder: Path) -> tuple[set[tuple[int, bytes]], set[tuple[int, bytes]], int]:
    """Simulations the store holds, those that may be run once more as a replay, and how many replays it holds."""
    done: set[tuple[int, bytes]] = set()
    replayable: set[tuple[int, bytes]] = set()
    replays = 0
    if not (folder / "store" / "store.json").exists():
        return done, replayable, replays
    store = open_store(folder / "store")
    for stream in store.streams:
        thetas = [records.theta[place].tobytes() for records in store.read(stream) for place in range(len(records))]
        done |= {(level, theta) for level in stream.levels for theta in thetas}
        runs = store.replays(stream)[0]
        replayable |= {(stream.levels[-1], theta) for theta in thetas[: REPLAYED - int(runs.max())]}
        replays += int(runs.sum())
    return done, replayable, replays


class Account:
    r"""What became of finished simulations, looked at after every kill.

    Args:
        folder: Where the store and the log are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = self.ran_again = self.vanished = 0
        self.done, self.replayable, _ = finished(folder)
        self.removed: set[Any] = set()
        self.removed_ran_again = 0
        self.held: list[int] = []

    def update(self) -> None:
        log = read_log(self.folder)
        new = log[self.seen :]
        self.ran_again += sum(key in self.done and key not in self.replayable for key in new)
        self.removed_ran_again += len(self.removed.intersection(new))
        before, self.seen = self.done, len(log)
        self.done, self.replayable, _ = finished(self.folder)
        self.vanished += len(before - self.done)
        self.held.append(len(self.done))

    def remove_a_file(self) -> None:
        """Loses some finished rows on purpose, which must then run again: what has no such rows proves nothing."""
        max((self.folder / "store" / "rows").glob("[0-9]*.npz"), key=lambda path: path.stat().st_size).unlink()
        before = self.done
        self.done, self.replayable, _ = finished(self.folder)
        self.removed = before - self.done


def kill_and_resume(folder: Path, *, kills: int, workers: int, seed: int, remove: bool = False) -> dict[str, Any]:
    r"""Kills a campaign at random moments until it has been killed often enough, and then lets it end.

    Args:
        folder: Empty.
        kills: How often.
        workers: How many; the rest is run without any in the end.
        seed: Of the moments.
        remove: Whether a file of finished rows is removed after the last kill: the account must show them.
    """
    chance = random.Random(seed)
    n = (4000 * kills + 8000, 30 * kills + 60, 80 * kills + 240)
    simulations = (n[0] + n[1], n[1] + n[2], n[2])
    account, orphans = Account(folder), []
    for turn in range(kills):
        child = Child(folder, n, workers=workers, batch_size=chance.choice([None, None, 1, 16]))
        left = float(np.dot(simulations, SECONDS)) - sum(SECONDS[level] for level, _ in account.done)
        share = min(chance.uniform(0, 1.5 * left / (kills - turn + 1)), left - 3.0)
        try:
            _kill(child, account, chance, share)
            orphans.append(child.outlived_by())
        finally:
            child.close()
        account.update()
    if remove:
        account.remove_a_file()
    os.environ |= {"KILLING_LOG": str(folder / "log"), "KILLING_HASTE": "1"}
    data = campaign(n, folder / "store")
    account.update()
    log, replays = collections.Counter(read_log(folder)), finished(folder)[2]
    os.environ.pop("KILLING_LOG")
    again = log.total() - len(log) - replays - account.removed_ran_again
    return {
        "kills": kills, "workers": workers,
        "finished_ran_again": account.ran_again, "finished_vanished": account.vanished,
        "finished_at_each_kill": account.held[:-1], "longest_orphan_seconds": max(orphans),
        "removed": len(account.removed), "removed_ran_again": account.removed_ran_again,
        "rows": sum(n), "simulations": sum(simulations), "different_ones_started": len(log), "started": log.total(),
        "replays": replays, "under_way_at_a_kill_and_started_again": again,
        "identical": same(simulate(make_stack(), n, seed=1, progress=False), data) and data.n == n,
    }  # fmt: skip


def _kill(child: Child, account: Account, chance: random.Random, share: float) -> None:
    """Kills the campaign while it starts, or when it has done some seconds of work."""
    log = account.folder / "log"

    def far_enough() -> bool:
        new = np.fromfile(log, ENTRY, offset=account.seen * ENTRY.itemsize)["level"] if log.exists() else []
        return len(new) > 0 and float(np.array(SECONDS)[new].sum()) >= share

    if chance.random() < 0.2:
        time.sleep(chance.uniform(0, 3.0))
    elif child.wait_for(far_enough):
        time.sleep(chance.uniform(0, 0.3))
    child.process.kill()
    if child.process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"The campaign ended before it was killed: {child.said()}")


def interrupt(folder: Path, *, workers: int, group: bool) -> dict[str, Any]:
    r"""Interrupts a campaign as Ctrl-C does, and resumes it.

    Args:
        folder: Empty.
        workers: How many.
        group: Whether the workers get the signal, too, as in a terminal.
    """
    n = (1000, 20, 400)
    child = Child(folder, n, workers=workers, batch_size=1)
    try:
        if not child.wait_for(lambda: len(read_log(folder)) > 150):
            raise RuntimeError(child.said())
        start = time.monotonic()
        (os.killpg if group else os.kill)(child.process.pid, signal.SIGINT)
        code = child.process.wait(PATIENCE)
        seconds, orphans = time.monotonic() - start, child.outlived_by()
        said = child.said()
    finally:
        child.close()
    begun, done = set(read_log(folder)), finished(folder)[0]
    return {
        "exit_code": code, "seconds": seconds, "orphan_seconds": orphans, "said": said[-2000:],
        "finished": len(done), "begun_and_not_kept": len(begun - done),
        "identical": same(simulate(make_stack(), n, seed=1, progress=False), campaign(n, folder / "store")),
    }  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Whether two data sets are bit for bit the same."""
    return one.n == other.n and all(
        torch.equal(a.theta, b.theta) and torch.equal(a.fine, b.fine)
        and (a.coarse is None) == (b.coarse is None) and (a.coarse is None or torch.equal(a.coarse, b.coarse))
        for a, b in zip(one.levels, other.levels, strict=True)
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--remove", action="store_true", help="lose finished rows on purpose")
    parser.add_argument("--interrupt", choices=["process", "group"], help="Ctrl-C instead of kills")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--run", help="what is killed")
    parser.add_argument("--batch-size", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.run:
        campaign(tuple(map(int, options.run.split(","))), options.folder / "store", workers=options.workers,
                 batch_size=options.batch_size)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.interrupt:
            found = interrupt(folder, workers=options.workers, group=options.interrupt == "group")
        else:
            found = kill_and_resume(folder, kills=options.kills, workers=options.workers, seed=options.seed,
                                    remove=options.remove)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
