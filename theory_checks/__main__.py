r"""`python -m theory_checks [TASK | file.py:stack]`: the theory of a stack, checked and explained."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 where a bound is violated or none can be stated, 2 where anything fails."""
    options = _parser().parse_args(list(sys.argv[1:] if arguments is None else arguments))
    from mlsbi.simulation.scheduling import SimulationError
    from mlsbi.training.history import TrainingError

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _run(options)
    except (ValueError, TypeError, OSError, ImportError, SimulationError, TrainingError) as error:
        print(f"theory_checks: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # else Python would leave with 1, which here means a finding
        traceback.print_exc()
        print(f"theory_checks: unexpected {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("theory_checks: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m theory_checks",
        description="Holds the variance bounds of multilevel training against what a stack does. The property tests "
                    "run by: pytest --pyargs theory_checks",
        epilog="Exit code: 0 where every bound that applies holds, 1 where one is violated or none can be stated, 2 "
               "where it fails.",
    )  # fmt: skip
    parser.add_argument("target", nargs="?", default="ou", metavar="TARGET",
                        help="a benchmark task (default: ou), or path/to/file.py:stack")
    parser.add_argument("--density", action="append", metavar="NAME|FOLDER",
                        help='a density fitted to rows of the cheapest level: "gaussian" (known constants), "nsf", '
                             '"maf", "mdn"; or the folder of a saved estimator. May be given several times. Default: '
                             "gaussian, and what suits the task")
    parser.add_argument("--estimator", choices=("npe", "nle"), help="in whose coordinates (default: as the task is "
                                                                    "usually solved, npe for a stack of your own)")
    parser.add_argument("--n", metavar="N0,N1,...", help="rows of each level's term that bounds are stated for")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to run, at least 64 (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0,
                        help="time for running them, after which fewer will do (default: %(default)s)")
    parser.add_argument("--parameters", type=int, default=100,
                        help="network parameters whose derivatives are checked, 0 for none (default: %(default)s)")
    parser.add_argument("--theta-constant", type=float, metavar="K", help="Poincaré constant of theta in the "
                                                                          "estimator's coordinates, if you know it")
    parser.add_argument("--noise-constant", type=float, metavar="K", help="Poincaré constant of the noise, if known")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", help="write text, table, numbers and figure there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _run(options: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from mlsbi.cli.targets import find_target
    from theory_checks.figure import theory_figure
    from theory_checks.report import theory_report

    out = _folder(options.out)
    target = find_target(options.target, {})
    if target.stack is None:
        raise ValueError(f"'{options.target}' is data without simulators: there is nothing to differentiate.")
    given = [_density(name) for name in options.density or []]
    kind = _only_kind(given)
    estimator = options.estimator or kind or target.estimator
    networks = target.networks(estimator)
    densities = given or ["gaussian", networks["density"]]
    n = target.default_n if options.n is None else _sizes(options.n)
    with tqdm(total=options.rows, unit="row", desc="rows", leave=False, disable=options.quiet or None) as bar:
        report = theory_report(
            target.stack, title=options.target, densities=densities, estimator=estimator, n=n, rows=options.rows,
            seconds=options.seconds, seed=options.seed, parameters=options.parameters,
            embedding=networks["embedding"], x_transform=networks["x_transform"],
            theta_constant=options.theta_constant, noise_constant=options.noise_constant, advance=bar.update,
        )  # fmt: skip
    print(report)
    if out is not None:
        folder = report.save(out)
        theory_figure(report).savefig(folder / "theory.png", dpi=110)
        print(f"\nText, table, numbers and figure: {folder}")
    stated = any(check.verdict != "not applicable" for section in report.sections for check in section.checks)
    return 1 if report.violations or not stated else 0


def _density(name: str) -> Any:
    """A name as it is, or a folder's name with the estimator that was saved there."""
    if Path(name).is_dir():
        from mlsbi import load

        return name, load(name)
    return name


def _only_kind(densities: Sequence[Any]) -> Any:
    """The kind of the saved estimators; `None` where there are none.

    Raises:
        ValueError: If there are two.
    """
    folders = {given[1].kind: given[0] for given in densities if isinstance(given, tuple)}
    if len(folders) > 1:
        told = " and ".join(f'{folder} ("{kind}")' for kind, folder in folders.items())
        raise ValueError(f"Expected saved estimators of one kind; got {told}. Check one kind at a time.")
    return next(iter(folders), None)


def _folder(name: str | None) -> Path | None:
    if name is not None and (not name or (Path(name).exists() and not Path(name).is_dir())):
        raise ValueError(f"Expected a folder as --out; {f'{name} is a file' if name else 'got an empty name'}.")
    return None if name is None else Path(name)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"Expected --n as whole numbers like 1000,100; got '{text}'.") from None


def _show_warning(message: Warning | str, *where: Any, **how: Any) -> None:
    """A warning's text, without the line of the library that gave it."""
    print(f"theory_checks: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
