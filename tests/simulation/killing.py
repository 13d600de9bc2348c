r"""A campaign that is killed again and again, and an account of what was simulated twice or lost.

    python tests/simulation/killing.py --kills 3 --seed 0

Every simulator call notes level, theta and time in a log when it starts and when it ends. What the store holds at a
kill must stay there and must not be in the log again; what had ended by then and is not in the store is lost and runs
again, which must be little. Prints its findings as one line of JSON.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import statistics
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

ENTRY = np.dtype([("level", "u1"), ("ended", "?"), ("theta", "V12"), ("time", "<f8")])
SECONDS = (5e-5, 0.004, 0.012)  # of one run of each level
BATCH_SECONDS = 0.05  # what the scheduler has a batch of rows take that run one by one
WAITING_SECONDS = 0.5  # that quick batches may wait in memory
BUSY_SECONDS = 0.2  # that it may take to pass results on beside, where processors are few
PATIENCE = 240.0


def simulate_for_a_while(level: int, theta: Any) -> None:
    """Takes the time of simulator calls, with their beginnings and ends in the log; does nothing without a log."""
    if "KILLING_LOG" not in os.environ:
        return
    note(level, theta, ended=False)
    if "KILLING_HASTE" not in os.environ:
        time.sleep(len(theta) * SECONDS[level])
    note(level, theta, ended=True)


def note(level: int, theta: Any, *, ended: bool) -> None:
    """Adds entries to the log, whole or not at all."""
    entries = np.empty(len(theta), ENTRY)
    entries["level"], entries["ended"], entries["time"] = level, ended, time.monotonic()
    entries["theta"] = np.ascontiguousarray(theta, np.float32).view("V12")[:, 0]
    descriptor = os.open(os.environ["KILLING_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, entries.tobytes())
    os.close(descriptor)


def rough(theta, noise):
    simulate_for_a_while(0, theta.numpy())
    return theta + noise["u"]


def medium(theta, noise):
    simulate_for_a_while(1, theta[None])
    return theta + noise["u"] * (1 + noise["v"])


def fine(theta, noise):
    simulate_for_a_while(2, theta[None])
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


def read_log(folder: Path) -> Any:
    path = folder / "log"
    return np.fromfile(path, ENTRY) if path.exists() else np.empty(0, ENTRY)


def simulations(entries: Any) -> list[tuple[int, bytes]]:
    """What entries of the log are about."""
    return list(zip(entries["level"].tolist(), entries["theta"].tolist(), strict=True))


def begun(folder: Path) -> list[tuple[int, bytes]]:
    """Simulations that ever began, as often as they did."""
    entries = read_log(folder)
    return simulations(entries[~entries["ended"]])


def seconds_of(found: Any) -> float:
    """What simulations take."""
    return sum(SECONDS[level] for level, _ in found)


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
        self.removed_ran_again = self.removed_counted_as_lost = 0
        self.held: list[int] = []
        self.ended: set[Any] = set()  # before a kill
        self.lost: list[set[Any]] = []  # at each kill

    def update(self, killed: float | None = None) -> None:
        """Looks at what is new.

        Args:
            killed: When the campaign was killed; what orphaned workers ended later is nobody's loss.
        """
        log = read_log(self.folder)
        new = log[self.seen :]
        started = simulations(new[~new["ended"]])
        self.ran_again += sum(key in self.done and key not in self.replayable for key in started)
        self.removed_ran_again += len(self.removed.intersection(started))
        before, self.seen = self.done, len(log)
        self.done, self.replayable, _ = finished(self.folder)
        self.vanished += len(before - self.done)
        self.held.append(len(self.done))
        if killed is not None:
            ended = set(simulations(new[new["ended"] & (new["time"] < killed)]))
            self.ended |= ended
            self.lost.append(ended - self.done)

    def remove_a_file(self) -> None:
        """Loses some finished rows on purpose, which must then run again: what has no such rows proves nothing."""
        max((self.folder / "store" / "rows").glob("[0-9]*.npz"), key=lambda path: path.stat().st_size).unlink()
        before = self.done
        self.done, self.replayable, _ = finished(self.folder)
        self.removed = before - self.done
        self.removed_counted_as_lost = len(self.removed & (self.ended - self.done))


def most_lost(workers: int, batch_size: int | None) -> float:
    """Seconds of simulations that may have ended before a kill and be lost.

    Those of a batch per worker and one more on its way back, and of quick batches that wait to be written together.
    """
    batch = 2 * BATCH_SECONDS if batch_size is None else batch_size * (SECONDS[1] + SECONDS[2])  # it doubles to fit
    return (workers + 1) * max(batch, SECONDS[2]) + workers * (WAITING_SECONDS + BUSY_SECONDS)


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
    wanted = (n[0] + n[1], n[1] + n[2], n[2])
    account, orphans, most = Account(folder), [], []
    for turn in range(kills):
        batch_size = chance.choice([None, None, 1, 16])
        most.append(most_lost(workers, batch_size))
        child = Child(folder, n, workers=workers, batch_size=batch_size)
        left = float(np.dot(wanted, SECONDS)) - seconds_of(account.done)
        share = min(chance.uniform(0, 1.5 * left / (kills - turn + 1)), left - 3.0)
        try:
            killed = _kill(child, account, chance, share)
            orphans.append(child.outlived_by())
        finally:
            child.close()
        account.update(killed)
    if remove:
        account.remove_a_file()
    os.environ |= {"KILLING_LOG": str(folder / "log"), "KILLING_HASTE": "1"}
    data = campaign(n, folder / "store")
    account.update()
    log, replays = collections.Counter(begun(folder)), finished(folder)[2]
    os.environ.pop("KILLING_LOG")
    lost, lost_seconds = [len(each) for each in account.lost], [seconds_of(each) for each in account.lost]
    again = log.total() - len(log) - replays - account.removed_ran_again - sum(lost)
    return {
        "kills": kills, "workers": workers,
        "finished_ran_again": account.ran_again, "finished_vanished": account.vanished,
        "finished_at_each_kill": account.held[:-1], "longest_orphan_seconds": max(orphans),
        "finished_but_lost": sum(lost), "finished_but_lost_seconds": sum(lost_seconds),
        "finished_but_lost_at_each_kill": lost, "finished_but_lost_seconds_at_each_kill": lost_seconds,
        "most_seconds_that_may_be_lost_at_each_kill": most,
        "finished_but_lost_per_kill": spread(lost), "finished_but_lost_seconds_per_kill": spread(lost_seconds),
        "removed": len(account.removed), "removed_ran_again": account.removed_ran_again,
        "removed_counted_as_lost": account.removed_counted_as_lost,
        "rows": sum(n), "simulations": sum(wanted), "different_ones_started": len(log), "started": log.total(),
        "replays": replays, "under_way_at_a_kill_and_started_again": again,
        "identical": same(simulate(make_stack(), n, seed=1, progress=False), data) and data.n == n,
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "maximum": max(values)}


def _kill(child: Child, account: Account, chance: random.Random, share: float) -> float:
    """Kills the campaign while it starts, or when it has done some seconds of work; returns the moment."""
    log = account.folder / "log"

    def far_enough() -> bool:
        new = np.fromfile(log, ENTRY, offset=account.seen * ENTRY.itemsize) if log.exists() else np.empty(0, ENTRY)
        return len(new) > 0 and float(np.array(SECONDS)[new["level"][~new["ended"]]].sum()) >= share

    if chance.random() < 0.2:
        time.sleep(chance.uniform(0, 3.0))
    elif child.wait_for(far_enough):
        time.sleep(chance.uniform(0, 0.3))
    killed = time.monotonic()
    child.process.kill()
    if child.process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"The campaign ended before it was killed: {child.said()}")
    return killed


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
        if not child.wait_for(lambda: len(begun(folder)) > 150):
            raise RuntimeError(child.said())
        start = time.monotonic()
        (os.killpg if group else os.kill)(child.process.pid, signal.SIGINT)
        code = child.process.wait(PATIENCE)
        seconds, orphans = time.monotonic() - start, child.outlived_by()
        said = child.said()
    finally:
        child.close()
    started, done = set(begun(folder)), finished(folder)[0]
    return {
        "exit_code": code, "seconds": seconds, "orphan_seconds": orphans, "said": said[-2000:],
        "finished": len(done), "begun_and_not_kept": len(started - done),
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
