"""The report, its files and figure, and the command line: what it says, what it returns, and how it is misused."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from mlsbi import MDN, NLE, NPE, BoxPrior, Level, LevelStack, MultilevelData, TrainingOptions
from theory_checks import __main__ as command
from theory_checks import report as report_module
from theory_checks.__main__ import main
from theory_checks.densities import AffineGaussian
from theory_checks.figure import theory_figure
from theory_checks.report import theory_report
from theory_checks.testing import normal_prior_of, two_levels

STACKS = """
import torch
from mlsbi import Level, LevelStack
from theory_checks.testing import normal_prior_of, two_levels

def draw(n, generator):
    return torch.randn(n, 1, generator=generator)

def total(theta, noise):
    return theta + noise

stack = two_levels(0.1)
one = LevelStack(normal_prior_of(1), draw, [Level("only", total)])
same = LevelStack(normal_prior_of(1), draw, [Level("a", total, 1.0), Level("b", total, 2.0)])
jumps = LevelStack(normal_prior_of(1), draw, [Level("only", lambda theta, noise: (theta + noise).round())])
fails = LevelStack(normal_prior_of(1), draw, [Level("only", lambda theta, noise: 1 / 0)])
seeded = LevelStack(normal_prior_of(1), "seed", [Level("only", lambda theta, noise: theta.sin())])
"""


def normal_noise(n, generator):
    return torch.randn(n, 1, generator=generator)


def ladder(levels, prior=None):
    """x = theta + (1 - 2^-l) u."""
    return LevelStack(prior or normal_prior_of(1), normal_noise, [
        Level(f"run {level}", lambda theta, noise, level=level: theta + (1.5 - 0.5**level) * noise, 4.0**level)
        for level in range(levels)
    ])  # fmt: skip


def fitted(kind, prior, **options):
    generator = torch.Generator().manual_seed(0)
    theta = torch.rand(64, 1, generator=generator)
    x = theta + 0.3 * torch.randn(64, 1, generator=generator)
    estimator = kind(prior, strategy="low", density=MDN(components=2, hidden=8), seed=1,
                     training=TrainingOptions(epochs=2), **options)
    return estimator.fit(MultilevelData.from_arrays([(theta, x)]), progress=False)


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    path = tmp_path_factory.mktemp("stacks") / "mine.py"
    path.write_text(STACKS, encoding="utf-8")
    return path


def boxed(folder, output="theta + noise"):
    path = folder / "mine.py"
    path.write_text("import torch\nfrom mlsbi import BoxPrior, Level, LevelStack\n"
                    "stack = LevelStack(BoxPrior([0.0], [1.0]), lambda n, g: torch.randn(n, 1, generator=g),\n"
                    f"                   [Level('only', lambda theta, noise: {output})])\n", encoding="utf-8")
    return path


def call(target, *arguments, density="gaussian"):
    return main([str(target), "--density", density, "--rows", "200", "--parameters", "0", "--quiet", *arguments])


@pytest.fixture(scope="module")
def report():
    return theory_report(two_levels(0.1), densities=["gaussian"], rows=600, parameters=2, n=(500, 20), seed=2)


def test_every_part_is_in_the_text(report):
    text = str(report)
    for part in ("600 rows, seed 2", "theta: standard normal", "noise: standard normal", "Poincaré constant of both: 1",
                 "W14 norms by autodiff", "A1 holds", "A2 ", "Density 'gaussian': A3 holds", "(P)", "(S0)",
                 "(Sl)", "(T)", "Every bound that applies holds.", "all parameters", "Theorem 2", "Theorem 3",
                 "rescale"):
        assert part in text, part
    assert "nan" not in text
    assert report.violations == []


def test_the_table_has_a_row_for_each_bound_level_and_sum(report):
    table = report.to_frame()
    assert len(table) == 2 * 2 * 3
    assert set(table["verdict"]) <= {"holds", "within error"}
    assert set(table[table["level"] == "dear"]["n"]) == {20}
    assert set(table["component"]) == {"loss", "all parameters"}
    checks = report.sections[0].checks
    assert table["ratio"].tolist()[:len(checks)] == [check.estimate / check.value for check in checks]


def test_files_hold_what_the_report_says(report, tmp_path):
    folder = report.save(tmp_path / "deep" / "er")
    assert sorted(path.name for path in folder.iterdir()) == ["theory.csv", "theory.json", "theory.txt"]
    assert (folder / "theory.txt").read_text(encoding="utf-8") == str(report) + "\n"
    assert len(pd.read_csv(folder / "theory.csv")) == len(report.to_frame())
    record = json.loads((folder / "theory.json").read_text(encoding="utf-8"))
    assert record["n"] == [500, 20]
    assert record["norms"]["levels"][0]["value"] == report.norms.levels[0].value
    assert record["sections"][0]["checks"][0]["value"] == report.sections[0].checks[0].value
    report.save(tmp_path / "deep" / "er")  # again, over itself


def test_numbers_that_are_not_finite_become_null(tmp_path):
    found = theory_report(LevelStack(normal_prior_of(1), "seed", [Level("only", lambda theta, noise: theta.sin())]),
                          densities=[AffineGaussian([[1.0]], [0.0], [0.0])], rows=100, parameters=0)
    text = (found.save(tmp_path) / "theory.json").read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["constant"] is None
    assert record["sections"][0]["checks"][0]["value"] is None


@pytest.mark.parametrize(("levels", "densities"), [(1, 2), (2, 1), (4, 1)])
def test_the_figure_has_two_panels_a_density(levels, densities, tmp_path):
    given = [AffineGaussian([[0.5]], [0.0], [0.0])] * densities
    found = theory_report(ladder(levels), densities=given, rows=100, parameters=0)
    figure = theory_figure(found)
    figure.savefig(tmp_path / "theory.png", dpi=40)
    assert (tmp_path / "theory.png").stat().st_size > 5000
    assert len(figure.axes) == 2 * densities
    points = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert len(points) == levels
    assert len(found.norms.differences) == levels - 1
    assert all(math.isfinite(edge) and edge > 0 for edge in (*figure.axes[0].get_ylim(), *figure.axes[0].get_xlim()))


def test_the_figure_of_levels_that_cannot_be_measured_says_why(tmp_path):
    broken = LevelStack(normal_prior_of(1), normal_noise, [Level("only", lambda theta, noise: theta.round())])
    figure = theory_figure(theory_report(broken, densities=["gaussian"], rows=100))
    figure.savefig(tmp_path / "theory.png", dpi=40)
    said = " ".join(text.get_text() for axes in figure.axes for text in axes.texts).replace("\n", " ")
    assert "Problem: level 'only' is not differentiable" in said


def test_levels_that_add_nothing_are_told_and_drawn(tmp_path):
    def total(theta, noise):
        return theta + noise

    stack = LevelStack(normal_prior_of(1), normal_noise, [Level("a", total, 1.0), Level("b", total, 2.0)])
    found = theory_report(stack, densities=["gaussian"], rows=300, parameters=2)
    assert str(found).count("the level adds nothing") == 1
    assert "No slope at level 1: the level adds nothing." in str(found)
    assert "no slope" not in str(found)
    assert found.violations == []
    theory_figure(found).savefig(tmp_path / "theory.png", dpi=40)


def test_a_jumping_density_is_not_promised_the_rate():
    found = theory_report(two_levels(0.1), densities=[lambda theta, x: (theta[:, 0] > x[:, 0]).double()], rows=1000,
                          parameters=0)
    assert "as they are, have" not in str(found)
    assert found.sections[0].assumption.verdict == "fails"


def test_a_problem_is_told_once():
    found = theory_report(ladder(1, BoxPrior([0.0], [1.0])), densities=["gaussian"], rows=100, parameters=0)
    assert "Problem" not in str(found)
    broken = LevelStack(normal_prior_of(1), normal_noise, [Level("only", lambda theta, noise: theta.round())])
    found = theory_report(broken, densities=["gaussian", "nsf"], rows=100)
    assert str(found).count("not differentiable") == 1
    assert str(found).count("Problem: ") == 1
    assert "0 rows" not in str(found)


def test_nothing_is_fitted_to_a_simulator_with_a_problem(monkeypatch):
    monkeypatch.setattr(report_module, "fit_candidates", lambda *_, **__: pytest.fail("it was"))
    rows = []

    def rounded(theta, noise):
        rows.append(len(theta))
        return theta.round()

    assert theory_report(LevelStack(normal_prior_of(1), normal_noise, [Level("only", rounded)])).problem
    assert max(rows) <= 64


def test_few_rows_are_told_and_not_planned_by():
    heavy = LevelStack(normal_prior_of(1), normal_noise, [
        Level("a", lambda theta, noise: (1.5 * theta).exp() + noise, 1.0),
        Level("b", lambda theta, noise: (1.6 * theta).exp() + noise, 2.0),
    ])  # fmt: skip
    found = theory_report(heavy, densities=[AffineGaussian([[0.5]], [0.0], [0.0])], rows=64, parameters=2)
    text = str(found)
    assert "from 64 rows: errors of up to" in text
    assert "may stand in" not in text
    assert found.plan == ""
    many = theory_report(two_levels(0.1), densities=[AffineGaussian([[0.5]], [0.0], [0.0])], rows=2000, parameters=0)
    assert "errors of up to" not in str(many)
    assert many.plan


def test_time_that_ran_out_is_told():
    def slow(theta, noise):
        time.sleep(0.002)
        return theta + noise

    stack = LevelStack(normal_prior_of(1), normal_noise, [Level("only", slow)])
    found = theory_report(stack, densities=["gaussian"], rows=10**7, seconds=0.5, parameters=0)
    assert found.rows < 10**7
    assert f"{found.rows} of 10000000 rows in 0.5 s (more with --seconds)" in str(found)


def test_a_single_parameter_that_violates_a_bound_is_a_violation():
    """A wrong constant breaks bounds on the derivatives, of which the report keeps every parameter."""
    found = theory_report(two_levels(0.1), densities=[AffineGaussian([[0.5]], [0.0], [0.0])], rows=500,
                          theta_constant=1e-9, noise_constant=1e-9)
    section, table = found.sections[0], found.to_frame()
    assert section.violating == section.parameters == 3
    assert len({check.component for check in section.broken}) == 3
    assert len(section.broken) > 3
    assert set(section.broken) <= set(found.violations)
    assert len(table) == len(section.every_check)
    assert {"slope[0]", "shift[0]", "log_precision[0]"} <= set(table[table["verdict"] == "violated"]["component"])
    text = str(found)
    assert "Every bound that applies holds" not in text
    assert "3 of them violate a bound" in text
    assert "in 3 single parameters: " in text
    assert text.count("The declared constant of theta may be too small. The declared constant of the noise") == 1


def test_a_plan_by_a_loose_bound_is_not_recommended():
    """Widths of theta that do not matter make (P) useless, and different by level."""
    prior = BoxPrior([0.0], [1000.0])
    levels = [Level("a", lambda theta, noise: (0.3 * theta).sin() + noise, 1.0),
              Level("b", lambda theta, noise: (0.3 * theta).sin() + 1.1 * noise, 2.0)]
    stack = LevelStack(prior, normal_noise, levels)
    found = theory_report(stack, densities=[AffineGaussian([[1.0]], [0.0], [0.0])], estimator="nle", rows=500,
                          parameters=0)
    assert max(1 / check.ratio for check in found.sections[0].of("P")) > 100
    assert "may stand in for the variance" not in str(found)


def test_a_fitted_posterior_is_checked_as_it_is():
    prior = BoxPrior([0.0], [1.0])
    found = theory_report(ladder(2, prior), densities=[fitted(NPE, prior)], rows=300, parameters=5)
    assert [section.density for section in found.sections] == ["NPE"]
    assert {check.verdict for check in found.sections[0].of("P")} <= {"holds", "within error"}
    assert {check.verdict for check in found.sections[0].of("T")} == {"not applicable"}


def test_a_fitted_likelihood_is_checked_in_its_box():
    prior = BoxPrior([0.0], [1.0])
    found = theory_report(ladder(2, prior), densities=[fitted(NLE, prior), "gaussian"], estimator="nle", rows=300,
                          parameters=0)
    assert "a likelihood's density" in str(found)
    assert "uniform(0, 1)" in found.laws[0]
    assert [section.density for section in found.sections] == ["NLE", "gaussian"]
    assert {check.verdict for section in found.sections for check in section.of("P")} <= {"holds", "within error"}


def test_an_estimator_of_the_other_kind_is_refused():
    prior = BoxPrior([0.0], [1.0])
    with pytest.raises(ValueError, match='kind "npe"; got one of kind "nle": old'):
        theory_report(ladder(2, prior), densities=[("old", fitted(NLE, prior))], rows=100)


@pytest.mark.parametrize(("options", "message"), [
    ({"densities": []}, "densit"),
    ({"n": (10,)}, "2 sizes n, one per level; got 1"),
    ({"n": (10, 0)}, "at least 1"),
    ({"rows": 63}, "rows >= 64, as fewer tell nothing; got 63"),
    ({"seconds": 0.0}, "seconds > 0; got 0.0"),
    ({"seed": -1}, "as seed; got -1"),
    ({"theta_constant": 0.0}, "constant as theta_constant; got 0.0"),
    ({"noise_constant": math.inf}, "constant as noise_constant; got inf"),
    ({"estimator": "both"}, "estimator 'npe' or 'nle'; got 'both'"),
    ({"densities": ["gaussian", "nope"]}, "Unknown density 'nope'"),
    ({"densities": [lambda theta, x: theta[:, 0]], "parameters": 1}, "density with parameters"),
    ({"densities": ["nonsense"]}, "Unknown density 'nonsense'"),
    ({"parameters": -1}, "parameters"),
])  # fmt: skip
def test_reports_name_what_is_wrong_before_anything_runs(options, message):
    ran = []

    def run(theta, noise):
        ran.append(len(theta))
        return theta + noise

    stack = LevelStack(normal_prior_of(1), normal_noise, [Level("a", run), Level("b", run)])
    with pytest.raises(ValueError, match=message):
        theory_report(stack, **{"densities": ["gaussian"], "rows": 100, "parameters": 0, **options})
    assert ran == []


@pytest.mark.parametrize(("density", "message"), [
    (AffineGaussian([[0.5, 0.5]], [0.0], [0.0]), "'old' does not fit the stack, with 1 parameters and outputs of"),
    (AffineGaussian([[0.5]], [0.0], [0.0]).constants, "Expected a density with log_prob"),
])  # fmt: skip
def test_densities_that_do_not_fit_are_named(density, message):
    with pytest.raises((ValueError, TypeError), match=message):
        theory_report(two_levels(0.1), densities=[("old", density)], rows=100, parameters=0)


def test_the_same_seed_gives_the_same_report():
    state = torch.get_rng_state()
    texts = [str(theory_report(two_levels(0.1), densities=["gaussian"], rows=70, parameters=1, seed=seed))
             for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert texts[0] == texts[1] != texts[2]


def test_progress_is_told():
    told = []
    theory_report(two_levels(0.1), densities=["gaussian"], rows=300, parameters=0, advance=told.append)
    assert sum(told) == 300


@pytest.mark.parametrize(("name", "code", "text"), [
    ("stack", 0, "Every bound that applies holds."), ("one", 0, "Every bound that applies holds."),
    ("same", 0, "the level adds nothing"), ("jumps", 1, "Problem: level 'only' is not differentiable"),
    ("fails", 1, "level 'only' raised ZeroDivisionError"), ("seeded", 1, "no Poincaré inequality"),
])  # fmt: skip
def test_the_exit_code_says_whether_bounds_hold(stacks, capsys, name, code, text):
    assert call(f"{stacks}:{name}") == code
    out, err = capsys.readouterr()
    assert text in out
    assert err == ""
    assert f"{stacks}:{name}" in out


def test_a_violated_bound_has_exit_code_one(stacks, capsys):
    assert call(f"{stacks}:stack", "--theta-constant", "1e-9", "--noise-constant", "1e-9") == 1
    assert "VIOLATED" in capsys.readouterr().out


def test_a_benchmark_task_needs_no_file(capsys):
    assert call("ou") == 0
    out = capsys.readouterr().out
    assert "Theory of 'ou'" in out
    assert " 1000 " in out  # of the task's own sizes


@pytest.mark.parametrize("name", ["stack", "jumps"])
def test_files_and_figure_are_written_where_asked(stacks, capsys, tmp_path, name):
    call(f"{stacks}:{name}", "--out", str(tmp_path / "new" / "folder"))
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["theory.csv", "theory.json", "theory.png", "theory.txt"]
    assert str(folder) in capsys.readouterr().out


def test_a_saved_estimator_is_read_from_its_folder(tmp_path, capsys):
    path = boxed(tmp_path)
    for kind, words in ((NPE, "a posterior's density"), (NLE, "a likelihood's density")):
        folder = fitted(kind, BoxPrior([0.0], [1.0])).save(tmp_path / kind.__name__)
        assert call(f"{path}:stack", density=str(folder)) == 0
        out = capsys.readouterr().out
        assert words in out
        assert f"Density '{folder}'" in out


def test_saved_estimators_of_two_kinds_are_both_named(tmp_path, capsys):
    path, prior = boxed(tmp_path), BoxPrior([0.0], [1.0])
    folders = [str(fitted(kind, prior).save(tmp_path / kind.__name__)) for kind in (NPE, NLE)]
    for more in ([], ["--estimator", "npe"]):
        assert call(f"{path}:stack", "--density", folders[1], *more, density=folders[0]) == 2
        err = capsys.readouterr().err
        assert f'{folders[0]} ("npe") and {folders[1]} ("nle")' in err
    assert call(f"{path}:stack", "--estimator", "npe", density=folders[1]) == 2
    assert folders[1] in capsys.readouterr().err


def test_a_saved_estimator_of_other_shapes_is_named(stacks, tmp_path, capsys):
    prior = BoxPrior([0.0], [1.0])
    folder = fitted(NPE, prior).save(tmp_path / "old")
    path = boxed(tmp_path, output="torch.cat([theta, noise], 1)")
    assert call(f"{path}:stack", density=str(folder)) == 2
    err = capsys.readouterr().err
    assert f"Density '{folder}' does not fit the stack: it is of 1 parameters and outputs of shape (1,)" in err
    assert "the stack of 1 and (2,)" in err


def test_what_nobody_expected_is_no_finding(stacks, capsys, monkeypatch):
    monkeypatch.setattr(command, "_sizes", lambda text: 1 / 0)
    assert call(f"{stacks}:stack", "--n", "1,1") == 2
    assert "theory_checks: unexpected ZeroDivisionError: division by zero" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--n", "10"], "2 sizes n, one per level; got 1"),
    (["--n", "10,ten"], "--n as whole numbers like 1000,100; got '10,ten'"),
    (["--n", "0,5"], "at least 1 as n"),
    (["--rows", "63"], "rows >= 64, as fewer tell nothing; got 63"),
    (["--rows", "-5"], "got -5"),
    (["--out", ""], "a folder as --out; got an empty name"),
    (["--seconds", "0"], "seconds > 0"),
    (["--seed", "-1"], "at least 0 as seed"),
    (["--theta-constant", "-1"], "positive, finite constant"),
    (["--noise-constant", "nan"], "positive, finite constant"),
    (["--density", "nonsense"], "Unknown density 'nonsense'"),
    (["--parameters", "-1"], "parameters"),
])  # fmt: skip
def test_wrong_numbers_are_named_without_a_traceback(stacks, capsys, arguments, message):
    assert call(f"{stacks}:stack", *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("theory_checks: ")
    assert "Traceback" not in err
    assert out == ""


def test_a_file_is_no_folder(stacks, capsys):
    assert call(f"{stacks}:stack", "--out", str(stacks)) == 2
    assert "Expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "target", "message"), [
    (None, "there/is/none.py:stack", "no file"),
    ("stack = 3\n", "{}:stack", "LevelStack called stack"),
    ("\nimport no_such_module_at_all\n", "{}:stack", "mine.py, line 2, raised ModuleNotFoundError: No module named "),
    ("class Own(Exception): pass\nraise Own('so')\n", "{}:stack", "mine.py, line 2, raised Own: so"),
    (None, "no-such-task", "no-such-task"),
])  # fmt: skip
def test_wrong_targets_are_named_without_a_traceback(tmp_path, capsys, text, target, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert call(target.format(path)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("theory_checks: ")


def test_arguments_that_are_no_numbers_are_argparses(stacks, capsys):
    for arguments in (["--rows", "many"], ["--estimator", "both"], ["--unknown"]):
        with pytest.raises(SystemExit) as left:
            call(f"{stacks}:stack", *arguments)
        assert left.value.code == 2
    assert "usage: python -m theory_checks" in capsys.readouterr().err


def test_it_runs_as_a_module(stacks):
    command = [sys.executable, "-m", "theory_checks", f"{stacks}:jumps", "--density", "gaussian", "--rows", "100"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 1
    assert "not differentiable" in done.stdout
    assert "Traceback" not in done.stderr
