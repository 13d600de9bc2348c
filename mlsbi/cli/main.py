r"""`mlsbi tasks | plan | run | status | report`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlsbi import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    from mlsbi.inference.truncated import TruncationError
    from mlsbi.simulation.scheduling import SimulationError
    from mlsbi.training.history import TrainingError

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.function(options, given)
    except (ValueError, TypeError, OSError, ImportError, SimulationError, TrainingError,
            TruncationError) as error:
        print(f"mlsbi: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = options.function in (_run, _plan)
        print(f"mlsbi: interrupted{'; the same command goes on where it was' if goes_on else ''}", file=sys.stderr)
        return 130
    return 0


def _show_warning(message: Warning | str, *where: Any, **how: Any) -> None:
    """A warning's text, without the line of the library that gave it."""
    print(f"mlsbi: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlsbi", description="Bayesian inference for expensive simulators.")
    parser.add_argument("--version", action="version", version=f"mlsbi {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    tasks = commands.add_parser("tasks", help="list the benchmark tasks")
    tasks.set_defaults(function=_tasks)

    plan = commands.add_parser("plan", help="say how many runs of each level to buy, before spending a budget")
    _add_target(plan)
    goal = plan.add_mutually_exclusive_group(required=True)
    goal.add_argument("--budget", type=float, help="total cost, pilot included")
    goal.add_argument("--target-variance", type=float, help="variance of the loss estimate to reach")
    plan.add_argument("--weights", choices=("unit", "optimal"), default="unit", help="choose the sizes for the plain "
                      "telescoping sum (unit, default) or for its control-variate weights too (optimal)")
    plan.add_argument("--verdict", action="store_true", help="say what each cheap level is worth, for multilevel "
                      "training and transfer learning; runs the cheap levels once more (needs scikit-learn)")
    plan.add_argument("--out", type=Path, help="folder for the pilot's simulations and figures (default "
                      "that of `mlsbi run`)")
    plan.set_defaults(function=_plan)

    run = commands.add_parser("run", help="plan, simulate, train, infer, check and report")
    _add_target(run)
    amount = run.add_mutually_exclusive_group()
    amount.add_argument("--budget", type=float, help="total cost; a pilot decides how to split it")
    amount.add_argument("--n", type=_numbers, help="rows per level, cheapest first: 1000,100")
    run.add_argument("--rounds", type=int, default=1, help="rounds in which a budget is spent after the pilot; before "
                     "each the variances are measured anew on all rows so far (default 1). With --x-o: rounds for that "
                     "observation, each inside the prior truncated to where its posterior was found before")
    run.add_argument("--strategy", default=("multilevel",), type=_strategies,
                     help="multilevel (default), transfer, transfer_then_multilevel, translation, emulation, high, "
                     "low; auto, which mixes them by how well they do on held-out runs; or several to compare: "
                     "auto,transfer,high")
    run.add_argument("--observations", type=int, metavar="M", help="independent outputs in one observation, for nle "
                     "(default: the task's usual number, else 1)")
    run.add_argument("--ensemble", type=int, help="networks whose mixture is the posterior (default 10; for emulation "
                     "5, and for auto 5 of every strategy that it mixes)")
    run.add_argument("--x-o", type=Path, help="observation, .npy, .csv or text; default: the first test simulation")
    run.add_argument("--tests", type=int, help="test simulations of the highest level (tasks: up to 400; own stack: 0)")
    run.add_argument("--draws", type=int, default=2000, help="posterior draws to write (default 2000)")
    run.add_argument("--out", type=Path, help="folder for everything (default runs/TASK-STRATEGY-SEED)")
    run.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in that folder; "
                     "its simulations are used again where they fit")
    run.set_defaults(function=_run)

    status = commands.add_parser("status", help="say what a store or a run's folder holds, what failed, how to go on")
    status.add_argument("folder", type=Path, help="a store, or the folder of a run")
    status.add_argument("--map", type=Path, metavar="FILE", help="draw where in the prior simulations fail: FILE.png")
    status.set_defaults(function=_status)

    report = commands.add_parser("report", help="draw the figures and report.html of a finished run again")
    report.add_argument("folder", type=Path)
    report.set_defaults(function=_report)
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TASK", help="a task, or path/to/file.py:stack")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", type=_key_value,
                        help="option of the task, such as parameters=4; may be repeated")
    parser.add_argument("--data", type=Path, help="folder of the data, for tasks that read some")
    parser.add_argument("--estimator", choices=("npe", "nle"), help="posterior or likelihood network (default: the "
                        "task's usual one; npe for an own stack)")
    parser.add_argument("--pilot", type=int, default=64, metavar="ROWS", help="pilot rows (default 64)")
    parser.add_argument("--integrand", choices=("loss", "gradient", "output"), default="loss", help="what the pilot "
                        "takes variances of: a network's loss (default), its gradient, or the outputs alone")
    parser.add_argument("--workers", type=int, default=1, help="processes that simulate (default 1)")
    parser.add_argument("--on-failure", choices=("raise", "drop", "redraw"), default="raise", help="what a failed "
                        "simulation does: end the run (default), leave a gap, or have another one made in its place")
    parser.add_argument("--retry-failed", action="store_true", help="simulate rows again that failed before")
    parser.add_argument("--accept-code", action="store_true", help="take simulations made by other code of the stack "
                        "for its own: finished rows would still come out the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1000,100; got {text!r}") from None


def _strategies(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"expected different strategies; got {text!r}")
    return names


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, tuple(value.split(",")) if "," in value else value


def _target(options: argparse.Namespace) -> Any:
    from mlsbi.cli.targets import find_target

    chosen = dict(options.option)
    if options.data is not None:
        chosen["data"] = options.data
    return find_target(options.target, chosen)


def _tasks(options: argparse.Namespace, given: Sequence[str]) -> None:
    from mlsbi import tasks

    width = max(map(len, tasks.names()))
    for name in tasks.names():
        try:
            task = tasks.get(name)
        except FileNotFoundError as error:
            print(f"{name:{width}s} (its data is not here: see `mlsbi run {name}`)  {str(error).splitlines()[0]}")
            continue
        levels = ", ".join(f"{level} (cost {cost:g})" for level, cost in task.levels)
        budgets = " ".join(",".join(map(str, n)) for n in task.budgets)
        print(f"{name:{width}s} {task.title}\n{'':{width}s} levels: {levels}; budgets: {budgets}")


def _plan(options: argparse.Namespace, given: Sequence[str]) -> None:
    from mlsbi.cli.planning import plan

    target = _target(options)
    plan(target, options, _default_folder(options, target, ["multilevel"]))


def _default_folder(options: argparse.Namespace, target: Any, strategies: Sequence[str]) -> Path:
    label = Path(target.name.partition(":")[0]).stem
    return options.out or Path("runs") / f"{label}-{'-'.join(strategies)}-{options.seed}"


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    from mlsbi.cli.folders import is_finished, is_same
    from mlsbi.cli.requests import RunRequest
    from mlsbi.cli.running import run

    target = _target(options)
    out = _default_folder(options, target, options.strategy)
    for name, least in (("workers", 1), ("ensemble", 1), ("draws", 10), ("pilot", 8), ("observations", 1),
                        ("rounds", 1)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise ValueError(f"Expected --{name} of at least {least}; got {getattr(options, name)}.")
    if options.rounds > 1 and options.budget is None and options.x_o is None:
        raise ValueError("Expected --budget beside --rounds: with --n there is nothing to plan. With --x-o, rounds are "
                         "for that observation.")
    if options.tests is not None and options.tests < 0:
        raise ValueError(f"Expected --tests of at least 0; got {options.tests}.")
    request = RunRequest(
        strategies=options.strategy, estimator=options.estimator, observations=options.observations,
        seed=options.seed, device=options.device, ensemble=options.ensemble, out=out,
        command=shlex.join(["mlsbi", *given]), budget=options.budget, n=options.n, pilot_rows=options.pilot,
        integrand=options.integrand, rounds=options.rounds,
        workers=options.workers, on_failure=options.on_failure, retry_failed=options.retry_failed,
        accept_code=options.accept_code, overwrite=options.overwrite, tests=options.tests, draws=options.draws,
        x_o=options.x_o, progress=not options.quiet, say=lambda text: print(text, flush=True),
    )
    if not request.overwrite and is_finished(out) and is_same(target, request):
        print(f"This run is finished (--overwrite makes it anew).\nReport: {out / 'report.html'}")
        return
    results = run(target, request)
    print()
    for sentence in results["verdict"]:
        print(f"- {sentence}")
    print(f"\nReport: {out / 'report.html'}\nData, models, figures and results.json: {out}")


def _status(options: argparse.Namespace, given: Sequence[str]) -> None:
    from mlsbi.cli.status import describe, draw_map

    print(describe(options.folder))
    if options.map is not None:
        print(f"\n{draw_map(options.folder, options.map)}")


def _report(options: argparse.Namespace, given: Sequence[str]) -> None:
    from mlsbi.report.figures import draw_figures
    from mlsbi.report.html import write_report

    draw_figures(options.folder)
    print(f"Report: {write_report(options.folder)}")


if __name__ == "__main__":
    sys.exit(main())
