import json
import re
import shutil
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import mlsbi
from mlsbi import MCMCOptions, TrainingOptions
from mlsbi.cli.main import main
from mlsbi.cli.requests import RunRequest
from mlsbi.store.records import JOINT_STREAM
from mlsbi.store.store import open_store

pytestmark = pytest.mark.usefixtures("rough_figures")

QUICK = ["--quiet", "--ensemble", "1", "--seed", "1"]

STACK = """
import torch
from mlsbi import BoxPrior, Level, LevelStack

def low(theta, noise):
    return theta + noise + 0.1

def high(theta, noise):
    return theta + noise

stack = LevelStack(
    prior=BoxPrior([0.0, 0.0], [1.0, 2.0], names=["rate", "shift"]),
    noise=lambda n, generator: 0.2 * torch.randn(n, 2, generator=generator),
    levels=[Level("low", low, cost=1), Level("high", high, cost=10)],
)
number = 3
"""


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def only(results):
    """The record of the one strategy of a run."""
    (record,) = results["strategies"]
    return record


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A whole run of ou, small."""
    out = tmp_path_factory.mktemp("run") / "ou"
    assert main(["run", "ou", "--n", "200,20", "--tests", "30", "--draws", "200", "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="module", autouse=True)
def little_effort(run_folder):
    """Most does not depend on how well networks are trained or chains mix; the run above is trained in full."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("cli.running", "inference.mcmc_posterior"):
            patch.setattr(f"mlsbi.{module}.MCMCOptions", partial(MCMCOptions, effective=80))
        patch.setattr("mlsbi.cli.requests.RunRequest", partial(RunRequest, training=TrainingOptions(epochs=15)))
        yield


@pytest.fixture
def mine(tmp_path):
    """A stack of one's own: unlike the tasks', without an exact posterior that takes longer than the run."""
    (tmp_path / "mine.py").write_text(STACK)
    return f"{tmp_path}/mine.py:stack"


def test_auto_runs_and_its_report_says_what_it_weighted(mine, tmp_path):
    out = tmp_path / "out"
    assert main(["run", mine, "--n", "100,40", "--strategy", "auto", "--tests", "10", "--draws",
                 "50", "--out", str(out), "--quiet", "--ensemble", "2"]) == 0
    network = only(read_results(out))["training"][0]
    assert {part["strategy"] for part in network["mixture"]} >= {"Emulation", "TransferLearning", "Multilevel"}
    assert sum(part["weight"] for part in network["mixture"]) == pytest.approx(1.0)
    assert "Every network is a mixture of 5 strategies" in (out / "report.html").read_text()
    assert (out / "figures/losses.png").is_file()
    assert mlsbi.load(out / "auto/model").networks[0].weights.sum() == pytest.approx(1.0)


def test_run_leaves_everything(run_folder):
    results = read_results(run_folder)
    assert results["spent"]["n"] == [200, 20]
    assert results["spent"]["runs"] == [222, 20]
    assert results["spent"]["cost"] == 222 + 20 * 100
    checks = only(results)["checks"]
    assert checks["n_test"] == 30
    assert checks["reference_nlpd"] < checks["nlpd"]["mean"]
    assert only(results)["cost"] == results["spent"]["cost"]
    assert only(results)["runs"] == [220, 20]
    assert results["comparison"] is None
    assert len(results["verdict"]) >= 2
    assert results["command"].startswith("mlsbi run ou --n 200,20")
    assert mlsbi.MultilevelData.load(run_folder / "data.npz").n == (200, 20)
    assert mlsbi.load(run_folder / "multilevel/model").posterior(torch.zeros(5)).sample((3,), seed=0).shape == (3, 3)
    samples = pd.read_csv(run_folder / "multilevel/posterior_samples.csv")
    assert list(samples) == ["gamma", "mu", "sigma"]
    assert len(samples) == 200
    names = {path.stem for path in (run_folder / "figures").glob("*.png")}
    assert names == {"coupled", "losses", "posterior", "coverage", "ranks"}
    page = (run_folder / "report.html").read_text()
    assert page.count("data:image/png;base64") == len(names)
    assert results["verdict"][0].split(" by ")[0] in page


def test_report_draws_again(run_folder, capsys):
    for path in (*(run_folder / "figures").glob("*.png"), run_folder / "report.html"):
        path.unlink()
    assert main(["report", str(run_folder)]) == 0
    assert (run_folder / "report.html").is_file()
    assert len(list((run_folder / "figures").glob("*.png"))) == 5
    assert "report.html" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_results(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mlsbi.cli.requests.RunRequest", RunRequest)
    out = tmp_path / "again"
    main(["run", "ou", "--n", "200,20", "--tests", "30", "--draws", "200", "--out", str(out), *QUICK])
    first, again = (only(read_results(folder)) for folder in (run_folder, out))
    assert first["checks"] == again["checks"]
    assert first["posterior"] == again["posterior"]


def test_finished_runs_are_not_overwritten(run_folder, capsys):
    before = (run_folder / "results.json").read_bytes()
    assert main(["run", "ou", "--n", "50,5", "--out", str(run_folder), *QUICK]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (run_folder / "results.json").read_bytes() == before


def test_a_budget_is_planned_by_a_pilot_and_kept(tmp_path, capsys):
    out = tmp_path / "planned"
    arguments = ["--budget", "4000", "--pilot", "16", "--tests", "2", "--out", str(out), *QUICK]
    assert main(["run", "ou", "--option", "parameters=4", *arguments]) == 0
    results = read_results(out)
    assert results["spent"]["cost"] == pytest.approx(results["plan"]["cost"])
    assert results["spent"]["cost"] <= 4000
    assert results["plan"]["n"] == results["spent"]["n"]
    assert results["pilot"]["n"] == 16
    assert only(results)["posterior"]["names"] == ["gamma", "mu", "sigma", "x_0"]
    assert {"pilot", "plan"} <= {path.stem for path in (out / "figures").glob("*.png")}
    assert len(mlsbi.open_store(out / "store").data().levels[1].theta) == results["spent"]["n"][1]
    assert "Report:" in capsys.readouterr().out


def test_camels_runs_on_a_folder_of_spectra(camels_folder, tmp_path, monkeypatch):
    out = tmp_path / "camels"
    assert main(["run", "camels", "--n", "20,4", "--data", str(camels_folder), "--out", str(out), *QUICK]) == 0
    results = read_results(out)
    assert results["plan"] is None
    assert "fixed data set" in results["plan_note"]
    assert only(results)["checks"]["prior_nlpd"] == pytest.approx(np.log(0.4), abs=1e-5)
    monkeypatch.setenv("MLSBI_CAMELS", str(camels_folder))
    assert main(["run", "camels", "--n", "20,4", "--strategy", "high", "--out", str(tmp_path / "high"), *QUICK]) == 0


def test_absent_data_says_where_it_comes_from(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("MLSBI_CAMELS", raising=False)
    assert main(["run", "camels", "--out", str(tmp_path / "x")]) == 2
    assert "camels.readthedocs.io" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_own_stack_and_an_observation_from_a_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(STACK)
    np.savetxt(tmp_path / "x.csv", [[0.5, 1.0]], delimiter=",")
    out = tmp_path / "out"
    arguments = ["--n", "100,20", "--x-o", str(tmp_path / "x.csv"), "--out", str(out), *QUICK]
    assert main(["run", f"{tmp_path}/mine.py:stack", *arguments]) == 0
    results = read_results(out)
    assert only(results)["checks"] is None
    assert only(results)["posterior"]["truth"] is None
    assert only(results)["posterior"]["observation"] == "file x.csv"
    assert "Do not trust" in capsys.readouterr().out
    assert "mine" not in sys.modules


@pytest.mark.slow
def test_an_own_stack_on_several_processes_and_with_tests(mine, tmp_path):
    out = tmp_path / "out"
    arguments = ["--n", "100,20", "--workers", "2", "--tests", "30", "--out", str(out), *QUICK]
    assert main(["run", mine, *arguments]) == 0
    spent = read_results(out)["spent"]
    assert (spent["test_runs"], spent["test_cost"]) == (30, 300)
    assert "30 further runs of the finest level" in (out / "report.html").read_text()


def test_strategies_are_compared_on_one_data_set(mine, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--strategy", "multilevel,transfer,high,low", "--n", "120,12", "--tests", "25", "--draws", "100"]
    assert main(["run", mine, *arguments, "--out", str(out), *QUICK]) == 0
    results = read_results(out)
    records = {record["name"]: record for record in results["strategies"]}
    assert list(records) == ["multilevel", "transfer", "high", "low"]
    assert [records[name]["runs"] for name in records] == [[132, 12], [132, 12], [0, 12], [132, 0]]
    assert [records[name]["cost"] for name in records] == [results["spent"]["cost"]] * 2 + [120, 132]
    log_q = {}
    for name in records:
        assert mlsbi.load(out / name / "model").posterior(torch.zeros(2)).sample((3,), seed=0).shape == (3, 2)
        with np.load(out / name / "checks.npz") as arrays:
            log_q[name] = arrays["log_q"]
    best = min(records, key=lambda name: records[name]["checks"]["nlpd"]["mean"])
    assert results["comparison"]["best"] == best
    for name, behind in results["comparison"]["behind"].items():
        difference = log_q[best] - log_q[name]
        assert behind["mean"] == pytest.approx(difference.mean())
        assert behind["standard_error"] == pytest.approx(difference.std(ddof=1) / 5)
    assert f"'{best}' knows most" in capsys.readouterr().out
    single = tmp_path / "single"
    main(["run", mine, "--strategy", "high", *arguments[2:], "--out", str(single), *QUICK])
    assert only(read_results(single))["checks"] == records["high"]["checks"]


def test_a_strategy_that_fails_leaves_the_others(mine, tmp_path, monkeypatch):
    from mlsbi.strategies.single_level import SingleLevel
    from mlsbi.training.history import TrainingError

    def fail(self, *args, **keywords):
        raise TrainingError("it diverged")

    monkeypatch.setattr(SingleLevel, "fit", fail)
    out = tmp_path / "out"
    arguments = ["--n", "40,6", "--tests", "10", "--out", str(out), *QUICK]
    assert main(["run", mine, "--strategy", "high,multilevel", *arguments]) == 0
    results = read_results(out)
    assert [record["error"] for record in results["strategies"]] == ["it diverged", None]
    assert results["verdict"][0] == "Training 'high' failed: it diverged"
    assert "it diverged" in (out / "report.html").read_text()
    assert main(["run", mine, "--strategy", "high", *arguments, "--overwrite"]) == 2
    assert main(["run", mine, "--strategy", "high,low", *arguments, "--overwrite"]) == 2
    assert (out / "data.npz").is_file()


@pytest.mark.slow
def test_a_likelihood_of_several_outputs(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--n", "400,40", "--observations", "4", "--tests", "6", "--draws", "60", "--out", str(out)]
    assert main(["run", "g_and_k", *arguments, *QUICK]) == 0
    results = read_results(out)
    record = only(results)
    assert results["asked"]["estimator"] == "nle"
    assert results["asked"]["observations"] == 4
    assert results["spent"]["test_runs"] == 6 * 4 + 5000  # sets, and single outputs for the exact likelihood
    assert results["reference"]["warning"] is None
    assert record["posterior"]["mcmc"]["method"] == "emcee"
    assert record["checks"]["mcmc"]["chains"] == 6
    assert 0 < record["checks"]["likelihood_kld"]["mean"] < 5
    assert (out / "reference_samples.csv").is_file()
    assert isinstance(mlsbi.load(out / "multilevel/model"), mlsbi.NLE)
    np.savetxt(tmp_path / "x.csv", [0.5, 1.0, 2.0])
    again = ["--n", "50,10", "--x-o", str(tmp_path / "x.csv"), "--tests", "0", "--draws", "60", "--out",
             str(tmp_path / "b"), *QUICK]
    assert main(["run", "g_and_k", *again]) == 0
    assert only(read_results(tmp_path / "b"))["checks"] is None
    assert read_results(tmp_path / "b")["asked"]["observations"] == 3
    disagreeing = [*again[:-len(QUICK)], "--observations", "4", "--overwrite", *QUICK]
    assert main(["run", "g_and_k", *disagreeing]) == 2
    assert "holds 3 observations; --observations says 4" in capsys.readouterr().err
    assert only(read_results(tmp_path / "b"))["checks"] is None  # nothing was touched


@pytest.mark.slow
def test_a_likelihood_where_the_task_has_a_posterior(tmp_path):
    """Normalised by importance sampling, it is scored on the same scale, against the same exact posterior."""
    out = tmp_path / "out"
    arguments = ["--estimator", "nle", "--n", "300,40", "--tests", "12", "--draws", "100", "--out", str(out), *QUICK]
    assert main(["run", "ou", *arguments]) == 0
    checks = only(read_results(out))["checks"]
    assert checks["reference_nlpd"] is not None
    assert checks["kld"]["mean"] > 0
    assert checks["likelihood_kld"]["mean"] > 0


@pytest.mark.slow
def test_what_fails_after_training_does_not_take_the_rest_with_it(mine, tmp_path, monkeypatch):
    from mlsbi.cli import running

    def fail(*args, **keywords):
        raise ValueError("weights are nowhere finite")

    monkeypatch.setattr(running, "check_posterior", fail)
    out = tmp_path / "out"
    assert main(["run", mine, "--n", "40,6", "--tests", "10", "--draws", "50", "--out", str(out), *QUICK]) == 0
    results = read_results(out)
    assert only(results)["checks"] is None
    assert only(results)["posterior"] is not None
    assert "'multilevel': It could not be checked: weights are nowhere finite" in results["verdict"]
    assert "weights are nowhere finite" in (out / "report.html").read_text()


@pytest.mark.slow
def test_finished_strategies_stay_when_a_later_one_crashes(mine, tmp_path, monkeypatch):
    from mlsbi.strategies.single_level import SingleLevel

    def crash(self, *args, **keywords):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(SingleLevel, "fit", crash)
    out = tmp_path / "out"
    arguments = ["--n", "40,6", "--tests", "10", "--draws", "50", "--out", str(out), *QUICK]
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["run", mine, "--strategy", "multilevel,high", *arguments])
    assert only(read_results(out))["checks"]["n_test"] == 10
    assert main(["report", str(out)]) == 0
    before = (out / "data.npz").read_bytes()
    (out / "results.json").unlink()
    assert main(["run", mine, *arguments]) == 2  # the simulations are kept even so
    assert (out / "data.npz").read_bytes() == before


@pytest.mark.slow
def test_overwriting_touches_no_other_folder(mine, tmp_path):
    other = tmp_path / "another-run" / "model"
    other.mkdir(parents=True)
    (other / "model.json").write_text("{}")
    arguments = ["--n", "40,6", "--tests", "0", "--draws", "50", "--out", str(tmp_path), "--overwrite", *QUICK]
    assert main(["run", mine, *arguments]) == 0
    assert (other / "model.json").is_file()


@pytest.mark.slow
def test_overwriting_leaves_nothing_of_the_run_before(mine, run_folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out)
    assert main(["run", mine, "--n", "50,10", "--overwrite", "--out", str(out), *QUICK]) == 0
    assert not (out / "reference_samples.csv").exists()
    assert not (out / "multilevel/checks.npz").exists()
    assert {path.stem for path in (out / "figures").glob("*.png")} == {"coupled", "losses", "posterior"}


def test_more_tests_than_there_are_stop_before_training(camels_folder, tmp_path, capsys):
    arguments = ["--data", str(camels_folder), "--n", "20,4", "--tests", "500", "--out", str(tmp_path / "out")]
    assert main(["run", "camels", *arguments]) == 2
    assert "--tests of at most 16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_plan_prints_and_draws(tmp_path, capsys):
    assert main(["plan", "ou", "--budget", "5000", "--pilot", "16", "--quiet", "--out", str(tmp_path / "plan")]) == 0
    printed = capsys.readouterr().out
    assert "16 joint rows" in printed
    assert "euler" in printed
    assert "if 5000 went into rows alone" in printed
    assert re.search(r"^  all levels   0\.\d+$", printed, re.MULTILINE)
    assert re.search(r"^  euler alone  0\.\d+$", printed, re.MULTILINE)
    assert "errors.png" in printed
    figures = {"pilot.png", "plan.png", "errors.png"}
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {"store", *figures}


@pytest.mark.slow
def test_plan_with_optimal_weights_says_what_they_gain(tmp_path, capsys):
    arguments = ["plan", "ou", "--pilot", "16", "--quiet", "--out", str(tmp_path / "plan")]
    assert main([*arguments, "--budget", "5000", "--weights", "optimal"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Control-variate weights a = \(.*, 1\) (reach|gain) .*% .*unit weights", printed)
    target = float(re.search(r"predicted variance (\S+),", printed).group(1))
    assert main([*arguments, "--target-variance", str(2 * target)]) == 0
    printed = capsys.readouterr().out
    cost = re.search(r"^cost (\S+) ", printed, re.MULTILINE).group(1)
    assert f"if {cost} went into rows alone" in printed


def test_tasks_lists_all(capsys, monkeypatch):
    monkeypatch.delenv("MLSBI_CAMELS", raising=False)
    assert main(["tasks"]) == 0
    printed = capsys.readouterr().out
    for name in mlsbi.tasks.names():
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["run", "nothing"], "Expected a task"),
        (["run", "ou", "--n", "10,1"], "at least 2 rows per level"),
        (["run", "ou", "--budget", "nan"], "positive, finite budget"),
        (["run", "ou", "--budget", "6530"], "does not reach beyond a pilot"),
        (["plan", "ou", "--budget", "10"], "does not reach beyond a pilot"),
        (["run", "ou", "--device", "nowhere"], "device that torch can use"),
        (["run", "ou", "--seed", "-1"], "at least 0 as seed"),
        (["run", "ou", "--n", "10"], "one number per level"),
        (["run", "ou", "--budget", "100"], "does not reach beyond a pilot"),
        (["run", "ou", "--strategy", "best"], "Unknown strategy"),
        (["run", "ou", "--strategy", "high,best"], "Unknown strategy"),
        (["run", "ou", "--observations", "3"], "--observations is for likelihoods"),
        (["run", "g_and_k", "--observations", "0"], "--observations of at least 1"),
        (["run", "one.py:stack", "--n", "50", "--strategy", "high,transfer"], "Strategy 'transfer': Expected data of"),
        (["run", "g_and_k", "--option", "prior=flat"], "flat"),
        (["run", "ou", "--option", "parameters=7"], "parameters=3 or parameters=4"),
        (["run", "ou", "--option", "speed=7"], "takes the options"),
        (["run", "ou", "--x-o", "nowhere.npy"], "no observation file"),
        (["run", "ou", "--ensemble", "0"], "--ensemble of at least 1"),
        (["run", "g_and_k", "--n", "60,20", "--strategy", "emulation"], "NLE learns the likelihood"),
        (["run", "ou", "--tests", "-1"], "--tests of at least 0"),
        (["run", "nowhere.py:stack"], "There is no file"),
        (["run", "nowhere.py"], "path/to/file.py:name"),
        (["report", "nowhere"], "finished run"),
    ],
)
def test_bad_requests_stop_before_anything_is_run(arguments, match, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.py").write_text(STACK.replace('Level("low", low, cost=1), ', ""))
    assert main(arguments) == 2
    assert match in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["one.py"]


@pytest.mark.parametrize("strategy", ["multilevel,translation", "emulation"])
def test_outputs_too_long_for_a_strategy_stop_before_anything_is_run(strategy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.py").write_text(STACK.replace("theta + noise", "(theta + noise).repeat(1, 33)"))
    assert main(["run", "two.py:stack", "--n", "50,10", "--strategy", strategy]) == 2
    said = capsys.readouterr().err
    assert f"Strategy '{strategy.split(',')[-1]}': Expected outputs of at most 64 numbers" in said
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["two.py"]


def test_an_observation_of_the_wrong_shape_stops_before_anything_is_run(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros(4))
    assert main(["run", "ou", "--n", "50,5", "--x-o", str(tmp_path / "x.npy"), "--out", str(tmp_path / "out")]) == 2
    assert "shape (5,)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_without_the_stack_says_what_it_has(tmp_path, capsys):
    (tmp_path / "other.py").write_text(STACK)
    assert main(["plan", f"{tmp_path}/other.py:number", "--budget", "10"]) == 2
    assert "it defines ['stack']" in capsys.readouterr().err
    assert "other" not in sys.modules


def test_a_fixed_data_set_cannot_be_planned(camels_folder, capsys):
    assert main(["plan", "camels", "--data", str(camels_folder), "--budget", "10"]) == 2
    assert "fixed data set" in capsys.readouterr().err
    assert main(["run", "camels", "--data", str(camels_folder), "--budget", "10"]) == 2
    assert "--n" in capsys.readouterr().err


FAILING_STACK = '''
import torch
from mlsbi import BoxPrior, Level, LevelStack

FAILS = {fails}

def low(theta, noise):
    return theta + 0.1 * noise

def high(theta, noise):
    x = theta + 0.1 * noise + 0.02 * noise.sin()
    return torch.where(theta > 0.9, torch.nan, x) if FAILS else x

stack = LevelStack(BoxPrior([0.0], [1.0]), lambda n, generator: torch.randn(n, 1, generator=generator),
                   [Level("low", low, 1.0), Level("high", high, 50.0)])
'''


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(Left out|Replaced) rows")
def test_plan_says_what_levels_are_worth_within_the_budget_and_goes_on_after_a_repair(tmp_path, capsys):
    pytest.importorskip("sklearn")
    file, out = tmp_path / "mine.py", tmp_path / "plan"
    arguments = ["plan", f"{file}:stack", "--budget", "9000", "--pilot", "60", "--integrand", "output", "--verdict",
                 "--quiet", "--out", str(out)]
    file.write_text(FAILING_STACK.format(fails=True))
    assert main([*arguments, "--on-failure", "drop"]) == 0
    told = capsys.readouterr().out
    assert "low: worth it" in told
    file.write_text(FAILING_STACK.format(fails=False))
    assert main([*arguments, "--accept-code", "--retry-failed"]) == 0
    told = capsys.readouterr().out
    assert "Of the budget, 60 go to repeats of the cheap levels for the verdict." in told
    assert re.search(r"^cost 8940 ", told, flags=re.MULTILINE)
    assert "60 joint rows" in told
    assert (out / "errors.png").stat().st_size > 10_000


@pytest.mark.parametrize(("options", "match"), [
    (["--pilot", "10"], "--pilot of at least"), (["--pilot", "60", "--budget", "10"], "does not reach beyond"),
])  # fmt: skip
def test_a_verdict_that_cannot_be_given_costs_nothing(tmp_path, capsys, options, match):
    pytest.importorskip("sklearn")
    arguments = ["plan", "ou2", "--budget", "1e5", "--verdict", *options, "--out", str(tmp_path / "plan")]
    assert main(arguments) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "plan").exists()


def test_a_verdict_needs_a_cheap_level(tmp_path, capsys):
    file = tmp_path / "one.py"
    file.write_text(FAILING_STACK.format(fails=False).replace('Level("low", low, 1.0), ', ""))
    assert main(["plan", f"{file}:stack", "--budget", "1e5", "--verdict", "--out", str(tmp_path / "plan")]) == 2
    assert "two levels at least" in capsys.readouterr().err
    assert not (tmp_path / "plan").exists()


def test_a_budget_is_spent_in_rounds(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["run", "ou", "--budget", "4000", "--rounds", "2", "--pilot", "16", "--integrand", "output", "--tests",
                 "4", "--draws", "50", "--out", str(out), *QUICK]
    assert main(arguments) == 0
    assert "spent in a pilot and 2 rounds" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    rounds = results["rounds"]
    assert [row[rounds["columns"].index("round")] for row in rounds["rows"]] == [1, 1, 2, 2]
    assert results["spent"]["cost"] <= 4000
    assert results["plan"]["n"] == results["spent"]["n"]
    page = (out / "report.html").read_text()
    assert "The rounds" in page
    assert "standardised outputs" in page
    sizes = results["pilot"]["sizes"]
    found = [row[sizes["columns"].index("n")] for row in sizes["rows"]]
    paid = [n * cost for n, cost in zip(found, results["plan"]["pair_costs"], strict=True)]
    assert sum(paid) == pytest.approx(results["plan"]["cost"])  # what the text above the table says they cost
    assert "4,000 units beside the pilot would buy" in page
    assert main(["run", "ou", "--n", "40,6", "--rounds", "2", "--out", str(tmp_path / "x")]) == 2
    assert "--budget beside --rounds" in capsys.readouterr().err


@pytest.fixture
def own_stack(mine, tmp_path):
    np.save(tmp_path / "x.npy", np.array([0.4, 1.5]))
    return ["run", mine, "--x-o", str(tmp_path / "x.npy"), "--draws", "60", *QUICK]


def test_rounds_for_one_observation(own_stack, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = [*own_stack, "--rounds", "2", "--budget", "1500", "--pilot", "8", "--tests", "12", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "round 2: " in printed
    assert "in 2 rounds and holds for this observation alone" in printed
    results = read_results(out)
    first, second = results["sequential"]["rounds"]
    assert first["share"] == 1.0 > second["share"] > 0
    assert results["spent"]["n"] == [a + b for a, b in zip(first["n"], second["n"], strict=True)]
    assert results["spent"]["cost"] == pytest.approx(results["sequential"]["spent"])
    assert results["sequential"]["spent"] <= 1500
    assert results["sequential"]["lost"] is None
    assert only(results)["checks"]["n_test"] == 12
    report = (out / "report.html").read_text()
    assert "The rounds" in report
    assert "share of the prior" in report
    assert (out / "figures/rounds.png").is_file()
    assert mlsbi.load(out / "multilevel/model").posterior([0.4, 1.5]).sample((2,), seed=0).shape == (2, 2)
    # The same command draws nothing anew once it is finished, and a killed one goes on.
    assert main(arguments) == 0
    assert "finished" in capsys.readouterr().out
    (out / "report.html").unlink()
    (out / "results.json").unlink()
    monkeypatch.setattr("mlsbi.NPE.fit", None)  # its networks are read
    assert main(arguments) == 0
    again = read_results(out)
    assert [done["n"] for done in again["sequential"]["rounds"]] == [first["n"], second["n"]]
    assert only(again)["posterior"]["mean"] == only(results)["posterior"]["mean"]
    assert only(again)["checks"] == only(results)["checks"]
    assert main(["report", str(out)]) == 0
    capsys.readouterr()
    assert main(["status", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{out}/store") == 1
    assert "round-2/store" in printed


@pytest.mark.slow
def test_rounds_go_on_from_the_rows_of_a_plan(own_stack, tmp_path):
    out, target = tmp_path / "out", own_stack[1]
    assert main(["plan", target, "--budget", "750", "--pilot", "8", "--out", str(out), "--seed", "0", "--quiet"]) == 0
    assert main([*own_stack, "--rounds", "2", "--budget", "1500", "--pilot", "8", "--tests", "0", "--out", str(out),
                 "--seed", "0"]) == 0
    kept = open_store(out / "store")
    joint = [len(kept.done(stream)) for stream in kept.streams if stream.number == JOINT_STREAM]
    assert joint == [8]  # one pilot, not two
    assert not list((out / "rounds").glob("round-1/store"))


@pytest.mark.slow
def test_overwriting_rounds_moves_the_old_ones_aside(own_stack, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [*own_stack, "--rounds", "2", "--tests", "0", "--out", str(out), "--n"]
    assert main([*arguments, "60,10"]) == 0
    before = (out / "results.json").read_bytes()
    assert main([*arguments, "60,2", "--overwrite"]) == 2  # refused before anything is removed
    assert (out / "results.json").read_bytes() == before
    assert main([*arguments, "60,12", "--overwrite"]) == 0
    assert "rounds-1" in capsys.readouterr().out
    assert list(out.glob("rounds-1/observation-*/round-2/store/store.json"))
    assert (out / "store/store.json").is_file()  # the first round's rows are of use to any run
    assert read_results(out)["spent"]["n"] == [60, 12]
    assert "Checks are on" not in " ".join(read_results(out)["verdict"])


@pytest.mark.slow
def test_rounds_go_on_after_the_code_changed_on_ones_word(own_stack, tmp_path):
    arguments = [*own_stack, "--rounds", "2", "--n", "60,10", "--tests", "4", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    (tmp_path / "out/results.json").unlink()
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("return theta + noise\n", "return noise + theta\n"))
    assert main(arguments) == 2
    assert main([*arguments, "--accept-code"]) == 0


def test_rounds_of_a_task_say_what_of_the_exact_posterior_is_lost(tmp_path):
    np.save(tmp_path / "x.npy", mlsbi.tasks.get("ou2").test(1, 3)[1][0].numpy())
    out = tmp_path / "out"
    assert main(["run", "ou2", "--x-o", str(tmp_path / "x.npy"), "--rounds", "2", "--n", "60,12", "--tests", "0",
                 "--draws", "60", "--out", str(out), *QUICK]) == 0
    results = read_results(out)
    assert [done["n"] for done in results["sequential"]["rounds"]] == [[30, 6], [30, 6]]
    assert results["sequential"]["lost"][0] == 0.0
    assert len(results["sequential"]["divergence"]) == 2
    assert any("Of the exact posterior" in sentence for sentence in results["verdict"])


@pytest.mark.parametrize(("more", "match"), [
    (["--budget", "1500"], "beyond the cost of a pilot of 64 rows"),
    (["--n", "20,2"], r"round 1 of 3 has \(7, 1\)"),
    (["--n", "200,20", "--strategy", "multilevel,high"], "give one --strategy"),
])
def test_rounds_that_do_not_fit_stop_before_anything_is_run(own_stack, more, match, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*own_stack, "--rounds", "3", *more, "--out", str(out)]) == 2
    assert re.search(match, capsys.readouterr().err)
    assert not list(out.glob("store/*"))


@pytest.mark.slow
def test_rounds_of_a_likelihood_are_those_of_the_whole_prior(tmp_path):
    np.save(tmp_path / "x.npy", mlsbi.tasks.get("ou").test(1, 3)[1][0].numpy())
    out = tmp_path / "out"
    assert main(["run", "ou", "--estimator", "nle", "--x-o", str(tmp_path / "x.npy"), "--rounds", "2", "--budget",
                 "3000", "--pilot", "8", "--integrand", "output", "--tests", "4", "--draws", "60", "--out", str(out),
                 *QUICK]) == 0
    results = read_results(out)
    assert results["sequential"] is None
    assert results["rounds"] is not None
    assert only(results)["checks"]["reference_nlpd"] is not None
