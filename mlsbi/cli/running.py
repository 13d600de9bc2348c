r"""`mlsbi run`: from a target to a checked posterior in a folder."""

from __future__ import annotations

import hashlib
import math
import platform
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import mlsbi
from mlsbi.allocation.adaptive import simulate_adaptively
from mlsbi.allocation.comparing import error_curves
from mlsbi.allocation.optimal import Allocation, optimal_allocation
from mlsbi.allocation.pilot_report import PilotReport
from mlsbi.allocation.piloting import pilot, pilot_cost
from mlsbi.cli.folders import KEPT, ROUNDS, STORE, TRAINING, begin, read_kept, write_json
from mlsbi.cli.requests import FEWEST_ROWS, RunRequest
from mlsbi.cli.sequential import (
    check_rounds,
    infer_rounds,
    is_sequential,
    record_rounds,
    set_aside,
    simulate_inside,
)
from mlsbi.cli.targets import Target
from mlsbi.data import MultilevelData, count_runs, spread
from mlsbi.density.embeddings import embedding_to_config
from mlsbi.density.registry import builder_to_config
from mlsbi.inference.mcmc import ChainError
from mlsbi.inference.mcmc_posterior import MCMCOptions, MCMCPosterior
from mlsbi.inference.nle import NLE
from mlsbi.inference.npe import NPE
from mlsbi.inference.observations import read_set
from mlsbi.inference.sequential import SequentialInference
from mlsbi.levels import campaign_cost, sum_pair_costs
from mlsbi.priors import parameter_names, sample_prior
from mlsbi.randomness import child_seed
from mlsbi.report.checking import check_likelihood, check_posterior, compare, verdict
from mlsbi.report.figures import draw_figures
from mlsbi.report.html import write_report
from mlsbi.simulation.campaign import simulate
from mlsbi.simulation.running import RunOptions
from mlsbi.simulation.seeding import RowSource
from mlsbi.store.records import TEST_STREAM
from mlsbi.strategies.fitting import check_strategy
from mlsbi.strategies.registry import strategy_to_config
from mlsbi.training.history import TrainingError

__all__ = ["check_budget", "run"]

_CHECK_DRAWS = 499  # 500 possible ranks: bins of equal size
_CHAIN_DRAWS = 199  # where draws are dear
_LIKELIHOOD_TESTS = 100
_ENSEMBLE = 10
_LONG = 1 << 20  # numbers in an output that no strategy with a limit takes
_LIKELIHOOD_ROWS = 5000


@dataclass(frozen=True)
class _Tests:
    """Rows of the highest level with known parameters, sets of outputs `(B, m, ...)` for a likelihood."""

    theta: Tensor
    x: Tensor


def run(target: Target, request: RunRequest) -> dict[str, Any]:
    r"""Plans and simulates, then trains, infers and checks with every strategy; writes everything to `request.out`.

    Every simulation is kept in `request.out/store`, those of later rounds for one observation in `request.out/rounds`;
    data, models and results as soon as they exist. The same request for a folder that an interrupted run left goes on
    where that one was.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: If the request does not fit the target, before anything is spent.
        TrainingError: If no strategy gave a network that can be used.
    """
    say = request.say or (lambda text: None)
    kind = request.estimator or target.estimator
    estimators = {name: _estimator(target, request, kind, name) for name in request.strategies}
    n_asked = _check_request(target, request, kind)
    _check_strategies(target, request, estimators)
    sequential = is_sequential(request, kind)
    if sequential:
        check_rounds(target, request, n_asked)
    default = target.default_tests if kind == "npe" else min(target.default_tests, _LIKELIHOOD_TESTS)
    n_tests = default if request.tests is None else request.tests
    observed = _read_observation(target, request, kind)
    m = _count_observations(target, request, kind, observed)
    out = request.out
    begin(target, request, say)
    aside = set_aside(out) if request.overwrite else None
    if aside is not None:
        say(f"The later rounds of the earlier run, with their simulations, are in {aside}.")
    options = RunOptions(None if target.stack is None else out / STORE, workers=request.workers,
                         on_failure=request.on_failure, retry_failed=request.retry_failed, progress=request.progress)

    found: SequentialInference | None = None
    if sequential:
        (own,) = estimators.values()
        assert isinstance(own, NPE)
        assert observed is not None
        found = infer_rounds(target, request, own, _members(own, request), n_asked, observed, options)
        say(f"{found}\n")
        report, plan, data, rounds = None, None, found.data, None
        estimators = {name: found.estimator for name in estimators}
    else:
        report, plan, data, rounds = _simulate(target, request, kind, n_asked, options, say)
    data.save(out / "data.npz")
    say(f"simulated {data}")

    test_rows = max(n_tests, 1) if observed is None else n_tests
    tests, truth = None, None
    if test_rows:
        tests = _Tests(*(target.test_sets(test_rows, m, request.seed, options) if kind == "nle"
                         else target.test(test_rows, request.seed, options) if found is None
                         else simulate_inside(target, request, found, test_rows, options)))
    if observed is None and tests is not None:
        truth, observed = tests.theta[0], tests.x[0]
    judged = _judge_rows(target, request, kind, options) if n_tests else None
    exact, exact_chain = _draw_exact(target, request, kind, observed)
    results: dict[str, Any] = {
        "format": 2,
        "complete": False,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"mlsbi": mlsbi.__version__, "python": platform.python_version(),
                     **{name: version(name) for name in ("torch", "nflows", "numpy")}},
        "command": request.command,
        "asked": _asked(target, request, list(estimators.values()), n_asked, m),
        "observable": {"axis": target.x_axis, "label": target.x_label},
        **_planned(report, plan, rounds, n_asked, target),
        "sequential": None if found is None else record_rounds(target, found, request.seed, out / "rounds.npz"),
        "levels": _levels(target, report, data),
        "cost_unit": "as declared" if target.level_costs else "seconds",
        "spent": _spent(target, report, data, test_rows * m + (len(judged.theta) if judged else 0)),
        "reference": exact_chain,
        "files": {"data": "data.npz", "store": None if target.stack is None else STORE,
                  "rounds": None if found is None else ROUNDS,
                  "reference": "reference_samples.csv" if exact is not None else None},
    }
    if exact is not None:
        exact.to_csv(out / "reference_samples.csv", index=False)
    results["strategies"] = records = []
    log_q: dict[str, np.ndarray[Any, Any]] = {}
    digest = _digest(data, tests, observed)
    for name, estimator in estimators.items():
        if len(estimators) > 1:
            say(f"{name}:")
        kept = read_kept(out / name, digest)
        if kept is not None:
            say("trained and checked before")
            records.append(kept[0])
            log_q[name] = kept[1]
            continue
        try:
            if found is None:
                estimator.fit(data, ensemble=_members(estimator, request), progress=request.progress,
                              checkpoint=out / name / TRAINING / digest[:16])
        except TrainingError as error:
            if len(estimators) == 1:
                raise
            records.append({"name": name, "error": str(error)})
            say(f"failed: {error}")
            continue
        record, arrays = _infer(target, request, estimator, observed, truth, tests if n_tests else None, judged,
                                out / name)
        if found is not None and record["checks"] is not None:  # test parameters are the truncated prior's
            record["checks"]["prior_nlpd"] += math.log(results["sequential"]["share"])
        record.update(name=name, error=None, **_cost_of(estimator, results, data))
        records.append(record)
        log_q[name] = arrays.get("log_q", np.empty(0))
        write_json(out / name / KEPT, {"data": digest, "record": record})
        shutil.rmtree(out / name / TRAINING, ignore_errors=True)  # the model is saved
        # Written anew after every strategy: what is done stays, whatever happens to the next one.
        results["comparison"] = compare(records, log_q)
        results["verdict"] = verdict(results)
        write_json(out / "results.json", results)
    if not log_q:
        raise TrainingError("; ".join(f"{record['name']}: {record['error']}" for record in records))
    results["comparison"] = compare(records, log_q)
    results["verdict"] = verdict(results)
    write_json(out / "results.json", results)
    draw_figures(out)
    write_report(out)
    write_json(out / "results.json", {**results, "complete": True})
    return results


def _digest(data: MultilevelData, tests: _Tests | None, observed: Tensor | None) -> str:
    """What a strategy is trained, checked and asked with, as a hash."""
    tensors = [tensor for level in data for tensor in (level.theta, level.fine, level.coarse)]
    tensors += [tests.theta, tests.x] if tests is not None else []
    found = hashlib.sha256()
    for tensor in (*tensors, observed):
        if tensor is not None:
            found.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _check_strategies(target: Target, request: RunRequest, estimators: Mapping[str, NPE | NLE]) -> None:
    """Raises a `ValueError` if a strategy cannot use data of so many levels, or outputs of such a length."""
    for name, estimator in estimators.items():
        why = _refusal(estimator, len(target.level_names), 1)
        if why is None and _refusal(estimator, len(target.level_names), _LONG) is not None:
            why = _refusal(estimator, len(target.level_names), _output_shape(target, request).numel())
        if why is not None:
            raise ValueError(f"Strategy '{name}': {why}") from why


def _refusal(estimator: NPE | NLE, levels: int, length: int) -> ValueError | None:
    """What an estimator's strategy says against data of so many levels and outputs of such a length."""
    try:
        if estimator.strategy is not None:
            check_strategy(estimator.strategy, levels, (length,), options=estimator.training,
                           of_outputs=isinstance(estimator, NLE))
    except ValueError as error:
        return error
    return None


def _count_observations(target: Target, request: RunRequest, kind: str, observed: Tensor | None) -> int:
    """Outputs that make one observation: those in the user's file, else as asked or as the task usually has."""
    if kind != "nle":
        return 1
    if observed is None:
        return request.observations or target.observations
    if request.observations is not None and request.observations != len(observed):
        raise ValueError(f"{request.x_o} holds {len(observed)} observations; --observations says "
                         f"{request.observations}. Leave it out.")
    if len(observed) > 1 and target.stack is None and request.tests != 0:
        raise ValueError(f"'{target.name}' has one output at each theta, so a posterior given {len(observed)} cannot "
                         "be tested. Add --tests 0 to go on without.")
    return len(observed)


def _judge_rows(target: Target, request: RunRequest, kind: str, options: RunOptions) -> _Tests | None:
    """Single outputs on which a likelihood is compared with the exact one, where that is known."""
    if kind != "nle" or target.likelihood is None:
        return None
    return _Tests(*target.test(min(target.most_rows, _LIKELIHOOD_ROWS), request.seed, options))


def _estimator(target: Target, request: RunRequest, kind: str, strategy: str) -> NPE | NLE:
    options: dict[str, Any] = {"strategy": strategy, **target.networks(kind), "training": request.training,
                               "device": request.device, "seed": child_seed(request.seed, 1)}
    return NLE(target.prior, **options) if kind == "nle" else NPE(target.prior, **options)


def _members(estimator: NPE | NLE, request: RunRequest) -> int:
    """Networks to train: as asked, else the strategy's usual number."""
    usual: int = getattr(estimator.strategy, "members", _ENSEMBLE)
    return usual if request.ensemble is None else request.ensemble


def _infer(
    target: Target, request: RunRequest, estimator: NPE | NLE, observed: Tensor | None, truth: Tensor | None,
    tests: _Tests | None, judged: _Tests | None, folder: Path,
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Saves a trained estimator, draws from its posterior and checks it."""
    say = request.say or (lambda text: None)
    estimator.save(folder / "model")
    say(f"trained {len(estimator.networks)} networks in {sum(h.seconds for h in estimator.histories):.0f} s")
    posterior: Any = estimator.posterior(observed)
    record: dict[str, Any] = {
        "options": strategy_to_config(estimator.strategy)["options"] if estimator.strategy else {},
        "training": [_trained(history) for history in estimator.histories],
        "posterior": None,
        "checks": None,
        "failures": [],
        "files": {"model": f"{folder.name}/model"},
    }
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    with warnings.catch_warnings():
        # A chain that has not converged is in the results and the verdict.
        warnings.filterwarnings("ignore", message="MCMC has not converged")
        if observed is not None:
            try:
                samples = posterior.to_frame(request.draws, seed=child_seed(request.seed, 2))
                samples.to_csv(folder / "posterior_samples.csv", index=False)
                record["posterior"] = _summary(posterior, samples.to_numpy(), truth, request)
                record["files"]["samples"] = f"{folder.name}/posterior_samples.csv"
            except (ValueError, ChainError) as error:
                record["failures"].append(f"It could not be sampled at the observation: {error}")
        if tests is not None:
            say(f"checking on {len(tests.theta)} test simulations")
            try:
                record["checks"], arrays = _check(target, request, estimator, posterior, tests, judged)
                np.savez(folder / "checks.npz", **arrays)  # type: ignore[arg-type]
            except (ValueError, ChainError) as error:
                record["failures"].append(f"It could not be checked: {error}")
    for failure in record["failures"]:
        say(failure)
    return record, arrays


def _check(
    target: Target, request: RunRequest, estimator: NPE | NLE, posterior: Any, tests: _Tests, judged: _Tests | None
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    is_set = isinstance(estimator, NLE)
    # After rounds the network knows the truncated prior's posterior alone, which the exact one differs from at edges.
    everywhere = not is_sequential(request, estimator.kind)
    known = everywhere and target.reference is not None and (not is_set or tests.x.shape[1] == 1)
    checks, arrays = check_posterior(
        posterior, tests.theta, tests.x, draws=_CHAIN_DRAWS if is_set else _CHECK_DRAWS,
        seed=child_seed(request.seed, 3), reference=target.reference if known else None,
        reference_x=tests.x[:, 0] if is_set else None,
    )
    if isinstance(estimator, NLE) and target.likelihood is not None and judged is not None:
        score = check_likelihood(estimator.likelihood.log_prob, target.likelihood, judged.theta, judged.x)
        checks["likelihood_kld"] = vars(score)
    return checks, arrays


def _cost_of(estimator: NPE | NLE, results: Mapping[str, Any], data: MultilevelData) -> dict[str, Any]:
    """Runs that a strategy reads, and what they cost; all of them cost what the campaign did."""
    everything = count_runs(data.n)
    runs = estimator.strategy.runs(data.n) if estimator.strategy is not None else everything
    costs = [level["cost"] for level in results["levels"]]
    cost = results["spent"]["cost"] if runs == everything else sum(r * c for r, c in zip(runs, costs, strict=True))
    return {"runs": runs, "cost": cost}


def _draw_exact(
    target: Target, request: RunRequest, kind: str, observed: Tensor | None
) -> tuple[pd.DataFrame | None, dict[str, Any] | None]:
    """Draws from the exact posterior of the observation, where it is known or follows from a known likelihood.

    With the latter comes how its chain went.
    """
    seed = child_seed(request.seed, 6)
    if observed is None:
        return None, None
    names = list(parameter_names(target.prior))
    single = kind == "npe" or len(observed) == 1
    if target.reference is not None and single:
        x = observed[0] if kind == "nle" else observed
        return pd.DataFrame(target.reference.sample(request.draws, x, seed).numpy(), columns=names), None
    if target.likelihood is None:
        return None, None
    sets = observed if kind == "nle" else observed[None]
    posterior = MCMCPosterior(target.likelihood, target.prior, tuple(sets.shape[1:]), sets,
                              mcmc=MCMCOptions(method="emcee"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MCMC has not converged")
        try:
            return posterior.to_frame(request.draws, seed=seed), _chain(posterior)
        except (ValueError, ChainError) as error:
            return None, {"warning": f"It could not be sampled: {error}"}


def _asked(
    target: Target, request: RunRequest, estimators: Sequence[NPE | NLE], n_asked: tuple[int, ...] | None, m: int
) -> dict[str, Any]:
    estimator = estimators[0]
    embedding = embedding_to_config(estimator.embedding)
    return {
        "task": target.name, "title": target.title, "citation": target.citation, "estimator": estimator.kind,
        "strategies": list(request.strategies), "density": builder_to_config(estimator.builder),
        "embedding": embedding if isinstance(embedding, dict) else None, "x_transform": estimator.x_transform,
        "training": asdict(request.training), "budget": request.budget, "n": n_asked, "seed": request.seed,
        "device": request.device, "ensemble": request.ensemble, "observations": m,
        "networks": [_members(one, request) for one in estimators],
        "on_failure": request.on_failure, "parameters": list(parameter_names(target.prior)),
    }


def check_budget(target: Target, budget: float, pilot_rows: int) -> None:
    """Raises a `ValueError` unless a budget reaches beyond the pilot's own cost, before that is spent."""
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"Expected a positive, finite budget; got {budget}.")
    floor = pilot_cost(target.stack, pilot_rows) if target.stack is not None else None
    if floor is not None and budget <= floor:
        raise ValueError(f"The budget of {budget:g} does not reach beyond a pilot of {pilot_rows} rows, which costs "
                         f"{floor:g}. Give a larger --budget, or fewer --pilot rows (at least 8).")


def _check_request(target: Target, request: RunRequest, kind: str) -> tuple[int, ...] | None:
    if request.observations is not None and kind != "nle":
        raise ValueError("--observations is for likelihoods (--estimator nle): a posterior network reads one x.")
    if request.observations is not None and request.observations > 1 and target.stack is None:
        raise ValueError(f"'{target.name}' is a fixed data set with one output at each theta: --observations must be "
                         "1.")
    if request.budget is not None and request.n is not None:
        raise ValueError("Expected --budget or --n, not both.")
    if request.budget is not None and target.stack is None:
        raise ValueError(f"'{target.name}' is a fixed data set: nothing can be simulated for a budget. Give --n, at "
                         f"most what it holds; its usual split is --n {','.join(map(str, target.default_n or ()))}.")
    if target.most_tests is not None and (request.tests or 0) > target.most_tests:
        raise ValueError(f"Expected --tests of at most {target.most_tests}, what '{target.name}' has; got "
                         f"{request.tests}.")
    n = request.n if request.n is not None else (target.default_n if request.budget is None else None)
    if n is None and request.budget is None:
        raise ValueError(f"Expected --budget B or --n with {len(target.level_names)} numbers for your own stack.")
    if n is not None:
        if min(spread(n, len(target.level_names), what="--n")) < FEWEST_ROWS:
            raise ValueError(f"Expected at least {FEWEST_ROWS} rows per level, to train on and to hold out; got --n "
                             f"{','.join(map(str, n))}.")
        return tuple(n)
    if request.budget is not None:
        check_budget(target, request.budget, request.pilot_rows)
    return None


def _read_observation(target: Target, request: RunRequest, kind: str) -> Tensor | None:
    """The observation in a file, checked against the shape of a simulation before anything is spent."""
    if request.x_o is None:
        return None
    path = request.x_o
    if not path.is_file():
        raise ValueError(f"There is no observation file {path}.")
    try:
        array = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, delimiter=_comma(path))
    except ValueError as error:
        raise ValueError(f"Expected {path} to be a .npy array or a text file of numbers: {error}") from error
    x = torch.as_tensor(np.asarray(array, dtype=np.float64))
    shape = _output_shape(target, request)
    if x.ndim == 0 and shape.numel() == 1:
        x = x.reshape(shape)
    if kind == "nle":
        try:
            return read_set(x[:, None] if shape.numel() == 1 and x.ndim == 1 else x, tuple(shape))[0]
        except ValueError as error:
            raise ValueError(f"{path} does not fit: {error}") from error
    if tuple(x.shape) not in (tuple(shape), (1, *shape)) or not bool(torch.isfinite(x).all()):
        raise ValueError(f"Expected a finite observation of shape {tuple(shape)} in {path}; got {tuple(x.shape)}.")
    return x.reshape(shape)


def _output_shape(target: Target, request: RunRequest) -> torch.Size:
    """Shape of one output, by one run of the cheapest level where there is no other way to know."""
    if target.stack is None:
        return target.test(1, request.seed, RunOptions())[1].shape[1:]
    row = RowSource(target.stack, seed=request.seed, stream=TEST_STREAM).rows(0, 1)
    return torch.as_tensor(target.stack.levels[0].run(*row)).shape[1:]


def _comma(path: Path) -> str | None:
    return "," if path.suffix == ".csv" else None


def _simulate(
    target: Target, request: RunRequest, kind: Literal["npe", "nle"], n: tuple[int, ...] | None, options: RunOptions,
    say: Any,
) -> tuple[PilotReport | None, Allocation | None, MultilevelData, pd.DataFrame | None]:
    """Pilot, plan, simulations, and what several rounds did."""
    if target.simulate_data is not None and n is not None:
        return None, None, target.simulate_data(n, request.seed), None
    if target.stack is None:
        raise ValueError(f"'{target.name}' has neither simulators nor data.")
    run: dict[str, Any] = {"seed": request.seed, **vars(options)}
    run.pop("batch_size")
    if n is not None:
        return None, None, simulate(target.stack, n, **run), None
    measured: dict[str, Any] = {"estimator": kind, "integrand": request.integrand, **target.networks(kind),
                                "device": request.device, **run}
    if request.rounds > 1 and request.budget is not None:
        campaign = simulate_adaptively(target.stack, request.budget, rounds=request.rounds,
                                       pilot_rows=request.pilot_rows, minimum=FEWEST_ROWS, **measured)
        say(f"{campaign.pilot}\n\n{campaign}\n")
        return campaign.pilot, campaign.plan, campaign.data, campaign.to_frame()
    report = pilot(target.stack, request.pilot_rows, **measured)
    plan = optimal_allocation(report, budget=request.budget, minimum=FEWEST_ROWS)
    say(f"{report}\n\n{plan}\n")
    return report, plan, simulate(target.stack, plan, reuse=report.data, **run), None


def _planned(
    report: PilotReport | None, plan: Allocation | None, rounds: pd.DataFrame | None, n: tuple[int, ...] | None,
    target: Target,
) -> dict[str, Any]:
    note = None
    if plan is None:
        source = "a fixed data set" if target.stack is None else "your choice or the task's published budget"
        note = "Each round was planned when it began; see the rounds below." if n is None else (
            f"The rows per level, {n}, were given ({source}), not planned: no pilot was run.")
    table = None
    if report is not None:
        # After rounds the pilot's variances are no longer what the plan rests on.
        curves = () if plan is None or rounds is not None else error_curves(report, budget=plan.cost,
                                                                            minimum=FEWEST_ROWS)
        table = {"n": report.n, "spent": report.spent, "warnings": list(report.warnings),
                 "integrand": report.integrand, "table": _tabled(report.to_frame()),
                 "sizes": _tabled(report.sizes(None if plan is None else plan.cost)),
                 "curves": [asdict(curve) for curve in curves]}
    return {"pilot": table, "plan": plan.to_dict() if plan is not None else None, "plan_note": note,
            "rounds": None if rounds is None else _tabled(rounds)}


def _tabled(frame: pd.DataFrame) -> dict[str, Any]:
    return {"columns": list(frame.columns), "rows": frame.to_numpy(dtype=object).tolist()}


def _levels(target: Target, report: PilotReport | None, data: MultilevelData) -> list[dict[str, Any]]:
    costs = _costs(target, report, data)
    return [{"name": name, "cost": cost} for name, cost in zip(target.level_names, costs, strict=True)]


def _costs(target: Target, report: PilotReport | None, data: MultilevelData) -> tuple[float, ...]:
    if target.level_costs is not None:
        return target.level_costs
    if report is not None:
        return report.costs
    seconds = data.seconds or (0.0,) * len(data)
    return tuple(s / max(r, 1) for s, r in zip(seconds, data.runs, strict=True))


def _spent(target: Target, report: PilotReport | None, data: MultilevelData, test_runs: int) -> dict[str, Any]:
    costs = _costs(target, report, data)
    pair_costs = (target.stack.row_costs if target.stack is not None else None) or sum_pair_costs(costs)
    pairs = [n + lost for n, lost in zip(data.n, data.failures, strict=True)]
    if report is not None:  # its joint rows are among the finest pairs, and were pairs of the levels between too
        joint = report.data.n[-1] + report.data.failures[-1]
        pairs[1:-1] = [rows + joint for rows in pairs[1:-1]]
    cost = campaign_cost(costs, pair_costs, runs=data.runs, pairs=pairs)
    tested = test_runs if target.stack is not None else 0  # those of a data set are there already
    return {"n": data.n, "runs": data.runs, "failures": data.failures, "seconds": data.seconds, "cost": cost,
            "high_only_n": math.floor(cost / costs[-1]), "test_runs": tested, "test_cost": tested * costs[-1]}


def _trained(history: Any) -> dict[str, Any]:
    frame = history.to_frame()
    return {
        "best_epoch": history.best_epoch, "epochs": len(frame), "best_loss": history.best_loss,
        "stopped": history.stopped, "seconds": history.seconds, "n_train": history.n_train,
        "n_validation": history.n_validation,
        "notes": history.notes, "mixture": history.mixture,
        **{name: float(frame[name].mean()) for name in ("projected", "cosine") if name in frame},
    }


def _summary(
    posterior: Any, samples: np.ndarray[Any, Any], truth: Tensor | None, request: RunRequest
) -> dict[str, Any]:
    prior = posterior.prior
    prior_sd = sample_prior(prior, 4000, seed=child_seed(request.seed, 4)).std(0)
    sd = samples.std(axis=0, ddof=1)
    quantiles = np.quantile(samples, [0.05, 0.5, 0.95], axis=0)
    return {
        "names": parameter_names(prior),
        "observation": f"file {request.x_o.name}" if request.x_o else "row 0 of the test set",
        "truth": None if truth is None else truth.tolist(),
        "mean": samples.mean(axis=0), "sd": sd,
        "quantiles": dict(zip(("0.05", "0.5", "0.95"), quantiles, strict=True)),
        "map": posterior.map(seed=child_seed(request.seed, 5)).tolist(),
        "shrinkage": sd / prior_sd.numpy(),
        "mcmc": _chain(posterior),
    }


def _chain(posterior: Any) -> dict[str, Any] | None:
    found = getattr(posterior, "convergence", ())
    return {**asdict(found[0]), "warning": found[0].warning} if found else None
