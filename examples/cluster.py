r"""A campaign on a cluster: Slurm jobs through dask-jobqueue, or processes of this machine to try it out.

    pip install -e ".[cluster]"
    python examples/cluster.py --local                       # here, in seconds
    python examples/cluster.py --n 20000,500                 # on Slurm, from a login node or a small job of its own

Call it again to go on after any interruption: finished rows are in the store and are not simulated again. Only this
process, which coordinates, writes the store, so nothing else needs to see its folder. The jobs need the program, this
Python environment, and a network connection to this process. Leave it running, in tmux or a small job of its own: when
it ends, its jobs end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mlsbi import BoxPrior, Level, LevelStack, command, open_store, simulate

__all__ = ["SLURM", "WORKERS", "make_stack", "start_cluster"]

PROGRAM = Path(__file__).with_name("population.py").resolve()  # at the same path wherever rows run

SLURM: dict[str, Any] = {
    "queue": "short",
    "cores": 8, "processes": 8,     # a job's; one row at a time on each core
    "memory": "16GB",               # a job's
    "walltime": "02:00:00",
    "job_script_prologue": ["export OMP_NUM_THREADS=1"],
    # Workers leave before their job's time is up: a row that is cut off would count as having killed its worker.
    "worker_extra_args": ["--lifetime", "100m", "--lifetime-stagger", "10m"],
    "local_directory": "$TMPDIR", "log_directory": "logs",
}  # fmt: skip
WORKERS = {"minimum_jobs": 1, "maximum_jobs": 25}  # jobs come and go with the work there is


def make_stack() -> LevelStack:
    """The same program with few steps and with many; `noise="seed"` gives both the row's seed."""

    def run(steps: int) -> Any:
        return command([sys.executable, PROGRAM, "{growth}", "{capacity}", "{seed}", "{output}", "--steps", str(steps)],
                       parameters=["growth", "capacity"], timeout=600)

    return LevelStack(
        prior=BoxPrior(low=[0.3, 50.0], high=[1.5, 200.0], names=["growth", "capacity"]),
        noise="seed",
        levels=[Level("8 steps", run(8), cost=1.0), Level("512 steps", run(512), cost=50.0)],
    )


def start_cluster(*, local: bool) -> Any:
    """The one switch between this machine and Slurm."""
    if local:
        from distributed import LocalCluster

        return LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0")
    from dask_jobqueue import SLURMCluster

    cluster = SLURMCluster(**SLURM)
    cluster.adapt(**WORKERS)
    return cluster


def main() -> None:
    """Runs the campaign, or what is left of it."""
    from distributed import Client

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", action="store_true", help="on processes of this machine")
    parser.add_argument("--n", default="20,6", help="rows per level, cheapest first; or pass optimal_allocation's plan")
    parser.add_argument("--store", default="runs/cluster")
    options = parser.parse_args()
    with start_cluster(local=options.local) as cluster, Client(cluster) as client:
        data = simulate(make_stack(), [int(n) for n in options.n.split(",")], seed=1, store=options.store,
                        executor=client)
    print(data)
    print(open_store(options.store))


if __name__ == "__main__":
    main()
