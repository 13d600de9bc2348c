"""Whatever dies, nothing that was finished is lost, run twice or changed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from loky import ProcessPoolExecutor as LokyExecutor

from mlsbi import BoxPrior, Level, LevelStack, SimulationError, open_store, per_sample, simulate
from mlsbi.simulation.seeding import RowSource
from mlsbi.store.records import STATUSES, Stream

PRIOR = BoxPrior([0.0, -1.0], [1.0, 1.0])
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for orphans in /proc")


def run_killing(*arguments) -> dict:
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("killing.py")), *map(str, arguments)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_account(found, kills):
    assert found["identical"]
    assert len(found["finished_at_each_kill"]) == kills
    assert found["finished_ran_again"] == found["finished_vanished"] == 0
    assert found["different_ones_started"] == found["simulations"]
    assert found["longest_orphan_seconds"] < 10
    # What had ended, too, is in the store, but for what batches under way hold and what waits for half a second.
    lost, most = (found[f"{what}_at_each_kill"] for what in ("finished_but_lost_seconds",
                                                            "most_seconds_that_may_be_lost"))
    assert len(lost) == kills
    assert all(seconds <= limit for seconds, limit in zip(lost, most, strict=True)), (lost, most)


# What is killed, and the account of it, is in killing.py.


@ON_LINUX
def test_a_killed_campaign_loses_nothing_and_repeats_nothing():
    found = run_killing("--kills", 3, "--workers", 2, "--seed", 9, "--remove")
    check_account(found, 3)
    # The control: rows of a file that was removed on purpose after the last kill do show up as having run again.
    assert found["finished_at_each_kill"][-1] >= found["removed"] > 0
    assert found["removed_ran_again"] == found["removed_counted_as_lost"] == found["removed"]


@ON_LINUX
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_25_kills(seed):
    found = run_killing("--kills", 25, "--workers", 4, "--seed", seed)
    check_account(found, 25)
    assert found["under_way_at_a_kill_and_started_again"] > 0


@pytest.mark.slow
@ON_LINUX
@pytest.mark.parametrize("whom", ["group", pytest.param("process", marks=pytest.mark.slow)])
def test_interrupted_from_the_keyboard(whom):
    workers = 2
    found = run_killing("--interrupt", whom, "--workers", workers)
    assert "KeyboardInterrupt" in found["said"]
    assert found["exit_code"] == -signal.SIGINT
    assert found["seconds"] + found["orphan_seconds"] < 10
    # A worker loses the row it runs, two simulations, and at most the one it begins before it is ended.
    assert found["finished"] > 0
    assert found["begun_and_not_kept"] <= 4 * workers
    assert found["identical"]


@ON_LINUX
@pytest.mark.slow
def test_programs_of_a_killed_campaign_end_with_it(tmp_path):
    code = f"""
import sys
from mlsbi import BoxPrior, Level, LevelStack, command, simulate
program = "import os, time; open(os.path.join({str(tmp_path)!r}, str(os.getpid())), 'x'); time.sleep(1000 * {{rate}})"
level = Level("endless", command([sys.executable, "-c", program], parameters=["rate"]))
simulate(LevelStack(BoxPrior([1.0], [2.0]), "seed", [level]), 9, seed=1, workers=2, batch_size=1, progress=False)
"""
    campaign = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    assert comes_true(lambda: len(list(tmp_path.iterdir())) > 0)
    programs = [int(path.name) for path in tmp_path.iterdir()]
    assert all(map(runs, programs))
    campaign.kill()
    campaign.wait()
    assert comes_true(lambda: not any(map(runs, programs)), seconds=10)


def runs(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def comes_true(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


# Workers


def one_seed_a_row(theta, seed):
    return theta + np.random.default_rng(seed).normal(size=2).astype(np.float32)


def make(simulate_row, *, cheap=one_seed_a_row):
    return LevelStack(PRIOR, "seed", [Level("cheap", per_sample(cheap), 1), Level("dear", per_sample(simulate_row), 9)])


def same(one, other) -> bool:
    return one.n == other.n and all(
        torch.equal(a.theta, b.theta) and torch.equal(a.fine, b.fine)
        and (a.coarse is None) == (b.coarse is None) and (a.coarse is None or torch.equal(a.coarse, b.coarse))
        for a, b in zip(one, other, strict=True)
    )


def poison(stack, rows, *, seed=1, stream=1):
    """The row with the largest first parameter, a value that only this row exceeds, and one that one more does."""
    theta, _ = RowSource(stack, seed=seed, stream=stream).rows(0, rows)
    order = theta[:, 0].argsort(descending=True)
    values = theta[order, 0].tolist()
    return int(order[0]), (values[0] + values[1]) / 2, (values[1] + values[2]) / 2


def deadly_above(limit, *, once=math.inf, marker=None):
    """Kills its process for some theta: above `limit` always, above `once` if no process did so before."""

    def simulate_row(theta, seed):
        if theta[0] > limit:
            os.kill(os.getpid(), signal.SIGKILL)
        if theta[0] > once and not os.path.exists(marker):
            open(marker, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return one_seed_a_row(theta, seed)

    return simulate_row


def test_a_row_that_kills_its_worker_is_found_and_the_rest_is_finished(tmp_path):
    row, limit, once = poison(make(one_seed_a_row), 12)
    stack = make(deadly_above(limit, once=once, marker=str(tmp_path / "died")))
    options = {"seed": 1, "store": tmp_path / "store", "batch_size": 1, "progress": False}
    with pytest.warns(UserWarning, match="1 of 12 at level 'dear'"):
        data = simulate(stack, (20, 12), workers=2, on_failure="drop", **options)
    assert os.path.exists(tmp_path / "died")  # the row whose worker died once is among the finished ones
    whole = simulate(make(one_seed_a_row), (20, 12), seed=1, progress=False)
    rest = [place for place in range(12) if place != row]
    assert data.n == (20, 11)
    assert data.failures == (0, 1)
    assert torch.equal(data.levels[0].fine, whole.levels[0].fine)
    assert torch.equal(data.levels[1].fine, whole.levels[1].fine[rest])
    assert torch.equal(data.levels[1].coarse, whole.levels[1].coarse[rest])
    store = open_store(tmp_path / "store")
    assert store.failed(Stream(1, 1, (0, 1))) == {row: STATUSES.index("worker died")}
    told = "died 4 times with this row under way, the last 2 times alone"
    assert store.failures()["message"].str.contains(told).all()
    with pytest.warns(UserWarning, match="1 of 12"):  # and nothing is tried again: it would end this process
        again = simulate(stack, (20, 12), on_failure="drop", **options)
    assert same(again, data)


def bystander(witness, culprit, folder):
    """Kills its process for the culprit's theta always, for the witness's once: when the culprit did so twice."""

    def simulate_row(theta, seed):
        deaths = os.path.join(folder, "deaths")
        if abs(float(theta[0]) - culprit) < 1e-6:
            with open(deaths, "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        if abs(float(theta[0]) - witness) < 1e-6:
            until = time.monotonic() + 60
            while time.monotonic() < until and (not os.path.exists(deaths) or os.path.getsize(deaths) < 2):
                time.sleep(0.01)  # until the pool breaks
            if not os.path.exists(os.path.join(folder, "died")):
                open(os.path.join(folder, "died"), "x").close()
                os.kill(os.getpid(), signal.SIGKILL)
        return one_seed_a_row(theta, seed)

    return simulate_row


@pytest.mark.slow
def test_a_row_that_was_under_way_when_workers_died_is_not_to_blame_if_it_dies_once_itself(tmp_path):
    theta, _ = RowSource(make(one_seed_a_row), seed=1, stream=1).rows(0, 12)
    stack = make(bystander(float(theta[0, 0]), float(theta[1, 0]), str(tmp_path)))
    with pytest.warns(UserWarning, match="1 of 12 at level 'dear'"):
        data = simulate(stack, (20, 12), seed=1, workers=2, on_failure="drop", batch_size=1, progress=False)
    assert (tmp_path / "died").exists()
    whole = simulate(make(one_seed_a_row), (20, 12), seed=1, progress=False)
    assert torch.equal(data.levels[1].fine, whole.levels[1].fine[[0, *range(2, 12)]])


@pytest.mark.slow
def test_a_row_whose_worker_dies_once_is_finished(tmp_path):
    _, once, _ = poison(make(one_seed_a_row), 12)
    stack = make(deadly_above(math.inf, once=once, marker=str(tmp_path / "died")))
    data = simulate(stack, (20, 12), seed=1, workers=2, batch_size=2, progress=False)
    assert os.path.exists(tmp_path / "died")
    assert same(data, simulate(make(one_seed_a_row), (20, 12), seed=1, progress=False))


@pytest.mark.slow
def test_the_one_deadly_row_of_a_large_batch_is_found():
    row, limit, _ = poison(make(one_seed_a_row), 40)
    with pytest.warns(UserWarning, match="1 of 40 at level 'dear'"):
        data = simulate(make(deadly_above(limit)), (20, 40), seed=1, workers=2, on_failure="drop", batch_size=16,
                        progress=False)
    whole = simulate(make(one_seed_a_row), (20, 40), seed=1, progress=False)
    assert torch.equal(data.levels[1].fine, whole.levels[1].fine[[place for place in range(40) if place != row]])


@pytest.mark.slow
def test_a_deadly_row_ends_a_campaign_that_is_not_to_drop_rows(tmp_path):
    row, limit, _ = poison(make(one_seed_a_row), 12)
    with pytest.raises(SimulationError, match=f"Row {row} .*worker died"):
        simulate(make(deadly_above(limit)), (20, 12), seed=1, workers=2, store=tmp_path / "store", batch_size=1,
                 progress=False)
    done = open_store(tmp_path / "store").ok(Stream(1, 1, (0, 1)))
    assert len(done) > 0  # what was finished before, or was under way, is kept


def test_a_broken_pool_is_made_anew_if_it_is_known_how(tmp_path, monkeypatch):
    _, once, _ = poison(make(one_seed_a_row), 12)
    lasting = make(pickled_for_the_standard_pool)
    monkeypatch.setenv("DEADLY_ONCE_ABOVE", str(once))
    monkeypatch.setenv("DEADLY_MARKER", str(tmp_path / "died"))
    with ProcessPoolExecutor(2) as pool, pytest.raises(SimulationError, match="a function that makes an"):
        simulate(lasting, (20, 12), seed=1, executor=pool, batch_size=2, progress=False, store=tmp_path / "store")
    os.remove(tmp_path / "died")
    data = simulate(lasting, (20, 12), seed=1, executor=lambda: ProcessPoolExecutor(2), batch_size=2,
                    progress=False, store=tmp_path / "store")
    assert os.path.exists(tmp_path / "died")
    assert same(data, simulate(make(one_seed_a_row), (20, 12), seed=1, progress=False))


def pickled_for_the_standard_pool(theta, seed):
    once, marker = float(os.environ["DEADLY_ONCE_ABOVE"]), os.environ["DEADLY_MARKER"]
    return deadly_above(math.inf, once=once, marker=marker)(theta, seed)


# Workers and batches


def row_by_row():
    return make(lambda theta, seed: one_seed_a_row(theta, seed) * 2)


def dict_noise():
    return LevelStack(
        PRIOR,
        lambda n, generator: {"u": torch.randn(n, 3, generator=generator), "v": torch.rand(n, generator=generator)},
        [Level("low", lambda t, noise: t[:, :1] + noise["u"]),
         Level("high", lambda t, noise: t[:, 1:] + noise["u"] * (1 + noise["v"][:, None]))],
    )  # fmt: skip


def whole_numbers():
    def count(theta, noise):
        return (theta[:, :1] * 10 + noise).floor().to(torch.int16)

    return LevelStack(
        PRIOR,
        lambda n, generator: torch.randn(n, 4, generator=generator),
        [Level("low", count), Level("high", lambda theta, noise: count(theta, noise) + 1)],
    )


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def pool(request):
    with LokyExecutor(request.param) as executor:
        yield executor


@pytest.mark.parametrize("make_stack", [row_by_row, dict_noise, whole_numbers])
def test_workers_and_batches_change_nothing(make_stack, pool, tmp_path):
    stack, n = make_stack(), (1500, 60)
    options = {"seed": 3, "progress": False}
    serial = simulate(stack, n, **options)
    assert not same(serial, simulate(stack, n, seed=4, progress=False))
    for place, batch_size in enumerate((None, 7, 400)):
        store = tmp_path / str(place)
        assert same(serial, simulate(stack, n, executor=pool, batch_size=batch_size, **options))
        assert same(serial, simulate(stack, n, executor=pool, batch_size=batch_size, store=store, **options))
        kept = open_store(store)
        assert same(serial, kept.data(seed=3))
        assert same(serial, simulate(stack, n, store=store, **options))
        assert kept.runs == serial.runs


@pytest.mark.parametrize("make_stack", [row_by_row, dict_noise, whole_numbers])
def test_interrupted_anywhere_and_resumed_otherwise(make_stack, tmp_path):
    stack, n = make_stack(), (1500, 60)
    serial = simulate(stack, n, seed=3, progress=False)
    for part in ((200, 10), (1030, 10), (1030, 60)):
        simulate(stack, part, seed=3, store=tmp_path / "store", batch_size=part[1], progress=False)
    assert same(serial, simulate(stack, n, seed=3, store=tmp_path / "store", progress=False))
