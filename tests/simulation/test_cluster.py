"""Campaigns on a Dask cluster: the same numbers, whichever worker dies, and a clear word when the cluster does."""

import importlib.util
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack, SimulationError, open_store, per_sample, simulate
from mlsbi.simulation.executors import open_workers
from mlsbi.simulation.seeding import RowSource
from mlsbi.store.records import STATUSES, Stream

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")

PRIOR = BoxPrior([0.0, -1.0], [1.0, 1.0])
EXAMPLES = Path(__file__).parents[2] / "examples"


def start_cluster(**options):
    return distributed.LocalCluster(**{
        "n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0",
        "silence_logs": logging.CRITICAL, **options,
    })  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    logger = logging.getLogger("distributed")  # it tells of every worker that dies, with tracebacks
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):  # it gives a call up at the first death
        yield
    logger.setLevel(before)


@pytest.fixture(scope="module")
def client(_quiet):
    with start_cluster() as cluster, distributed.Client(cluster) as client:
        yield client


def same(one, other) -> bool:
    return one.n == other.n and all(
        torch.equal(a.theta, b.theta) and torch.equal(a.fine, b.fine)
        and (a.coarse is None) == (b.coarse is None) and (a.coarse is None or torch.equal(a.coarse, b.coarse))
        for a, b in zip(one, other, strict=True)
    )


def make(*, pause=0.0, deadly_above=math.inf, log=None):
    """Rows that take their time, are noted when they begin, and may kill their worker. Cloudpickle sends all of it."""

    def cheap(theta, seed):
        return theta + np.random.default_rng(seed).normal(size=2).astype(np.float32)

    def dear(theta, seed):
        if log is not None:
            with open(log, "a") as file:
                file.write(f"{os.getpid()} {seed}\n")
        time.sleep(pause)
        if theta[0] > deadly_above:
            time.sleep(1.0)  # Dask does not start a worker again that dies in its very first moments
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * cheap(theta, seed)

    return LevelStack(PRIOR, "seed", [Level("cheap", per_sample(cheap), 1), Level("dear", per_sample(dear), 9)])


def serial(n):
    return simulate(make(), n, seed=1, progress=False)


def when(condition, action):
    """Acts, in a thread, as soon as a condition holds."""
    def wait():
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_a_client_and_its_executor_change_nothing(client, tmp_path):
    n = (1200, 40)
    whole = serial(n)
    assert same(whole, simulate(make(), n, seed=1, executor=client, store=tmp_path / "store", progress=False))
    assert same(whole, open_store(tmp_path / "store").data(seed=1))
    with client.get_executor() as executor:
        assert same(whole, simulate(make(), n, seed=1, executor=executor, batch_size=37, progress=False))
    assert not same(whole, simulate(make(), n, seed=2, executor=client, progress=False))


def test_dict_noise_and_vectorised_levels_travel(client):
    stack = LevelStack(
        PRIOR,
        lambda n, generator: {"u": torch.randn(n, 3, generator=generator), "v": torch.rand(n, generator=generator)},
        [Level("low", lambda t, noise: t[:, :1] + noise["u"]),
         Level("high", lambda t, noise: t[:, 1:] + noise["u"] * (1 + noise["v"][:, None]))],
    )  # fmt: skip
    options = {"seed": 1, "progress": False}
    assert same(simulate(stack, (3000, 100), **options), simulate(stack, (3000, 100), executor=client, **options))


def test_a_worker_killed_in_the_middle_loses_nothing(client, tmp_path):
    n, log = (40, 60), tmp_path / "log"
    victim = next(iter(client.run(os.getpid).values()))
    thread = when(lambda: len(lines(log)) > 20, lambda: os.kill(victim, signal.SIGKILL))
    data = simulate(make(pause=0.05, log=str(log)), n, seed=1, executor=client, batch_size=3, progress=False,
                    store=tmp_path / "store")
    thread.join()
    assert same(data, serial(n))
    assert len(lines(log)) > 60  # what the dead one ran was run again ...
    assert str(victim) in {line.split()[0] for line in lines(log)}
    store = open_store(tmp_path / "store")
    assert len(store.ok(Stream(1, 1, (0, 1)))) == 60
    assert not store.failures().size


@pytest.mark.slow
def test_a_row_that_kills_its_workers_is_found_and_the_rest_is_finished(client, tmp_path):
    theta, _ = RowSource(make(), seed=1, stream=1).rows(0, 16)
    row, next_row = theta[:, 0].argsort(descending=True)[:2].tolist()
    stack = make(deadly_above=float(theta[row, 0] + theta[next_row, 0]) / 2)
    client.wait_for_workers(2, timeout=60)
    with pytest.warns(UserWarning, match="1 of 16 at level 'dear'"):
        data = simulate(stack, (20, 16), seed=1, executor=client, batch_size=1, on_failure="drop",
                        store=tmp_path / "store", progress=False)
    whole, rest = serial((20, 16)), [place for place in range(16) if place != row]
    assert data.n == (20, 15)
    assert torch.equal(data.levels[0].fine, whole.levels[0].fine)
    assert torch.equal(data.levels[1].fine, whole.levels[1].fine[rest])
    assert torch.equal(data.levels[1].coarse, whole.levels[1].coarse[rest])
    store = open_store(tmp_path / "store")
    assert store.failed(Stream(1, 1, (0, 1))) == {row: STATUSES.index("worker died")}
    assert store.failures()["message"].str.contains("the last 2 times alone").all()


@pytest.mark.slow
def test_a_cluster_that_ends_in_the_middle_is_told_and_nothing_is_lost(tmp_path):
    n, log = (40, 100), tmp_path / "log"
    stack = make(pause=0.04, log=str(log))
    with start_cluster() as cluster, distributed.Client(cluster) as client:
        thread = when(lambda: len(lines(log)) > 20, cluster.close)
        with pytest.raises(SimulationError, match=r"was it shut down, or its cluster\?") as caught:
            simulate(stack, n, seed=1, executor=client, batch_size=2, progress=False, store=tmp_path / "store")
        thread.join()
        with pytest.raises(SimulationError, match=r"was it shut down, or its cluster\?"):
            simulate(stack, n, seed=1, executor=client, progress=False)
    done = open_store(tmp_path / "store").ok(Stream(1, 1, (0, 1)))
    assert 0 < len(done) < 100
    assert len(caught.value.data.levels[1]) <= len(done)
    begun = len(lines(log))
    assert same(serial(n), simulate(stack, n, seed=1, progress=False, store=tmp_path / "store"))
    assert len(lines(log)) - begun == 100 - len(done)  # no row that was finished ran again


def test_a_cluster_that_adapts_gets_enough_calls_to_grow():
    with start_cluster(n_workers=0) as cluster, distributed.Client(cluster) as client:
        with open_workers(client, 1) as workers:
            assert workers.width == 1
        cluster.adapt(minimum=0, maximum=50, interval="1h")
        with open_workers(client, 1) as workers:
            assert workers.width == 50


@pytest.mark.slow
def test_a_cluster_that_adapts(tmp_path):
    log = tmp_path / "log"
    with start_cluster(n_workers=0) as cluster, distributed.Client(cluster) as client:
        cluster.adapt(minimum=0, maximum=3, interval="200ms", target_duration="100ms")
        data = simulate(make(pause=0.3, log=str(log)), (20, 60), seed=1, executor=client, batch_size=1, progress=False)
    assert same(data, serial((20, 60)))
    assert len({line.split()[0] for line in lines(log)}) == 3


# The example


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("cluster_example", EXAMPLES / "cluster.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_example_runs_here_and_goes_on(tmp_path):
    command = [sys.executable, str(EXAMPLES / "cluster.py"), "--local", "--store", str(tmp_path / "store")]
    done = subprocess.run([*command, "--n", "4,2"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    store = open_store(tmp_path / "store")
    assert [len(level) for level in store.data()] == [4, 2]
    assert store.failures().empty
    difference = store.data().levels[1].fine - store.data().levels[1].coarse
    assert 0 < float(difference.square().mean().sqrt()) < 0.2 * float(store.data().levels[1].fine.mean())


@pytest.mark.slow
def test_the_example_makes_a_job_for_slurm(example, tmp_path):
    jobqueue = pytest.importorskip("dask_jobqueue")
    options = {**example.SLURM, "log_directory": str(tmp_path)}
    with jobqueue.SLURMCluster(**options, scheduler_options={"dashboard_address": ":0"}) as cluster:
        script = cluster.job_script()
    for line in ("#SBATCH -p short", "#SBATCH --cpus-per-task=8", "#SBATCH -t 02:00:00", "--nworkers 8",
                 "--nthreads 1", "--lifetime 100m", "export OMP_NUM_THREADS=1", "--local-directory $TMPDIR"):
        assert line in script
    assert set(example.WORKERS) == {"minimum_jobs", "maximum_jobs"}
