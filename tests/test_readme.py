import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from mlsbi import tasks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_every_python_block_runs_as_printed(index, tmp_path):
    done = subprocess.run([sys.executable, "-c", BLOCKS[index]], cwd=tmp_path, capture_output=True, text=True,
                          check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    if index == 0:
        assert "euler" in done.stdout
        assert (tmp_path / "runs/example/posterior.png").stat().st_size > 10_000
        assert (tmp_path / "runs/example/npe/model.json").is_file()


def test_the_example_is_the_public_contract():
    for name in ("Level(", "LevelStack(", "pilot(", "optimal_allocation(", "simulate(", "NPE(", ".posterior(",
                 ".sample(", ".save(", "mlsbi.load("):
        assert name in BLOCKS[0]


def test_every_task_is_in_the_table():
    for name in tasks.names():
        assert re.search(rf"^\| `{name}`", README, flags=re.MULTILINE)


def test_pictures_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def result(name):
    return json.loads((ROOT / f"experiments/results/{name}.json").read_text())


def row_of(start):
    return next(line for line in README.splitlines() if line.startswith(f"| {start}")).strip("| ").split(" | ")


def test_quality_numbers_are_the_measured_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import bench_quality

    measured = result("bench_quality")
    for name, versions in measured["method"].items():
        assert versions == {strategy: bench_quality.method(name, strategy) for strategy in versions}
    assert bench_quality.markdown(measured["table"]) in README
    for name, entry in measured["table"].items():
        cells = measured["cells"][name]
        for column in bench_quality.COLUMNS:
            if column in entry:
                scores = [cells[column][str(seed)]["score"] for seed in entry["seeds"]]
                assert entry[column]["score"]["median"] == pytest.approx(statistics.median(scores))
    own = {name: list(columns["auto"].values()) for name, columns in measured["cells"].items()}
    middle = [statistics.median(cell["coverage_90"] for cell in cells) for cells in own.values()]
    flat = [(name, cell) for name, cells in own.items() for cell in cells]
    low = [name for name, cell in flat if cell["coverage_90"] < 0.85]
    least = min(cell["coverage_90"] for _, cell in flat)
    uniform = sum(cell["uniformity_p"] >= 0.01 for _, cell in flat)
    assert f"the truth in {min(middle):.0%} to {max(middle):.0%} of the test rows" in README
    splits = low.count("camels, 20 pairs")
    told = f"{len(low)} are below 85%, of which {splits} are splits of `camels` ({least:.0%} at least)"
    assert f"Of the {len(flat)} cells\n{told}" in README
    assert f"(KS, p > 0.01) in {uniform} cells" in README
    wide = sum(sum(cell["coverage_90"] > 0.9 for cell in cells) >= 14 for cells in own.values())
    assert (wide, len(own)) == (5, 10)
    assert "In five of the ten rows regions are rather too wide (they hold more than 90% for\nat least 14 of" in README
    behind = [cells[str(seed)]["score"] - min(columns[single][str(seed)]["score"] for single in columns
                                              if single not in ("published", "auto", "reference"))
              for columns in measured["cells"].values() for cells in [columns["auto"]] for seed in cells]
    assert f"behind it by up to {max(behind):.2f} nats in single seeds" in README
    seconds = sum(cell.get("seconds", 0.0) for columns in measured["cells"].values() for cells in columns.values()
                  for cell in cells.values())
    assert f"Its cells took {seconds / 3600:.0f} process hours" in README


def test_sequential_numbers_are_the_measured_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import bench_sequential

    measured = result("bench_sequential")
    assert bench_sequential.markdown(measured["table"]).strip() in README
    for task, by_high in measured["table"].items():
        for high, by_method in by_high.items():
            for method, entry in by_method.items():
                cells = measured["cells"][task][high][method].values()
                assert entry["observations"] == len(cells)
                assert entry["c2st_forest"]["mean"] == pytest.approx(statistics.mean(c["c2st_forest"] for c in cells))
    assert measured["method"] == {method: bench_sequential.version(method) for method in measured["method"]}

    told = " ".join(README.split())  # wherever its lines break

    def lost(method, task):
        return [cell["lost"] for by_method in measured["cells"][task].values()
                for cell in by_method.get(method, {}).values()]

    own = lost("multilevel_rounds", "ou2") + lost("multilevel_rounds", "ou")
    few, many = (f"{statistics.mean(each):.1%} ({max(each):.1%})"
                 for each in (lost("tsnpe", "ou2"), lost("tsnpe", "ou")))
    assert f"rounds lose {statistics.mean(own):.2%} on average ({max(own):.2%} at most)," in told
    assert f"TSNPE {few} of `ou2` and {many} of `ou`." in told
    assert max(own) < 1e-3  # of each observation
    columns = {(task, high): {method: entry["c2st_forest"]["mean"] for method, entry in by_method.items()}
               for task, by_high in measured["table"].items() for high, by_method in by_high.items()}
    assert len(columns) == 6
    gains = [means["multilevel_rounds"] - means["multilevel_rounds_nle"] for means in columns.values()]
    assert 0.005 < min(gains) < max(gains) < 0.025
    assert "on average, by 0.01 to 0.02 (" in told
    assert [column for column, means in columns.items()
            if means["multilevel_nle"] < means["multilevel_rounds_nle"]] == [("ou2", "1000")]
    assert "rounds pay but on `ou2` with 1000 expensive runs" in told
    for (_, high), means in columns.items():
        assert high != "1000" or means["multilevel_nle"] < means["multilevel_rounds"]
        published = min(means[method] for method in ("tsnpe", "mf_tsnpe", "mf_tsnpe_af"))
        assert max(means[method] for method in bench_sequential.OWN) < published
    for method in ("mf_npe", "mf_tsnpe_af"):
        few, some, many = bench_sequential.PUBLISHED[method]
        assert f"{few:.3f}, {some:.3f} and {many:.3f}" in told


def test_recovery_of_the_closed_form_is_as_measured():
    measured = result("gaussian_recovery")["summary"]
    scores = [summary["c2st"] for summary in measured.values()]
    assert len(scores) == 8
    mean, largest = sum(score["mean"] for score in scores) / 8, max(score["largest"] for score in scores)
    assert largest < 0.55
    assert f"an accuracy of {mean:.3f} on average and\n{largest:.3f} at most" in README


def test_speeds_are_the_measured_ones():
    ratios = {name: f"{row['ratio']:.2f}" for name, row in result("bench_basics")["ratios"].items()}
    assert row_of("`from mlsbi import NPE`")[1] == ratios["from mlsbi import NPE"]
    assert row_of("`simulate` of 100 000")[1] == ratios["simulate 100 000 rows of ou"]
    draws = result("bench_mcmc")["per_second"]["neural"]["median"]
    assert row_of("effective draws a second")[1] == f"{draws:.0f}"
    assert row_of("peak memory")[1] == ratios["memory with large outputs"]


@pytest.mark.parametrize(("start", "name"), [
    ("a step of the default network", "cpu_eager"), ("the same, compiled", "cpu_compiled"),
    ("20 replicates of a small network", "cpu_replicates_eager"), ("these, compiled", "cpu_replicates"),
    ("an epoch of plain NPE", "npe_epoch_vs_sbi"),
])
def test_speeds_of_training_are_the_measured_ones(start, name):
    measured = result("bench_training")
    assert row_of(start)[1] == f"{measured['ratios'][name]:.1f}"
    assert measured["ratios"]["gpu_vs_plain"] is measured["ratios"]["gpu_replicates"] is None  # or it is to be told


@pytest.mark.parametrize(("variant", "start"), [
    ("none", "none |"), ("rescale", "rescale |"), ("project", "project |"), ("rescale + project", "both |"),
])
def test_the_ablation_is_as_measured(variant, start):
    lines = README[README.index("The published ablation"):].splitlines()
    row = next(line for line in lines if line.startswith(f"| {start}")).strip("| ").split(" | ")
    distances = result("stabilisers")["distances"]
    expected = [distances[task][regime][variant] for task in ("toggle_switch", "g_and_k")
                for regime in ("fixed epochs", "early stopping")]
    assert row[1:] == [f"{score['mean']:.2f} +- {score['standard_error']:.2f}" for score in expected]


def test_claims_about_the_store_are_the_measured_ones():
    measured = result("bench_store")["results"]
    taken, large, kills = measured["taking records"], measured["a large store"], measured["kills"]
    assert row_of("records of 4 kB")[1] == f"{taken['writer.add, one row at a time']['ratio_to_floor']:.1f}"
    assert row_of("seconds to open a store")[1] == f"{large['seconds_to_open']['median'] / 2:.2f}"
    assert row_of("memory while these 4 GB")[1] == f"{large['peak_bytes']['median'] / 3e8:.2f}"
    assert large["rows"] == 10**6
    assert f"In {kills['kills']} kills" in README
    assert kills["finished_ran_again"] == kills["finished_vanished"] == 0
    assert kills["identical"]
    lost = kills["finished_but_lost_seconds_per_kill"]
    assert f"was {lost['median']:.2f} s of simulation per kill (median), {lost['maximum']:.1f} s at most" in README


def test_results_say_where_they_come_from():
    for path in (ROOT / "experiments/results").glob("*.json"):
        origin = json.loads(path.read_text())["provenance"]
        assert len(origin["commit"]) == 40
        assert origin["uncommitted"] == []
        assert set(origin["versions"]) >= {"mlsbi", "torch", "numpy", "python"}


def test_claims_about_planning_are_the_measured_ones():
    measured, verdicts = result("bench_allocation"), result("transfer_verdict")
    assert all(right for case, right in measured["cases"].items() if case != "4: sizes")
    ratio, seconds = measured["realised"]["ratio"], measured["seconds"]
    assert row_of("variance of the multilevel loss over")[1] == (
        f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})")
    assert 0.85 < ratio["lowest"] <= ratio["highest"] < 1.15
    assert row_of("90% intervals of pilots")[1] == f"{min(measured['interval_coverage']['held']):.0%}"
    assert row_of("seconds for the sizes")[1] == f"{seconds['allocation of 20 levels']['median']:.4f}"
    assert row_of("seconds for a pilot")[1] == f"{seconds['gradient pilot of ou']['median']:.1f}"
    assert seconds["allocation of 20 levels"]["worst"] < 0.01
    assert seconds["gradient pilot of ou"]["worst"] < 20
    order = verdicts["order"]["transfer"]["score"]
    assert row_of("rank correlation of the verdict's score")[1].startswith(f"{order['spearman_of_means']:.2f} (")
    assert row_of("pairs of these levels")[1] == f"{order['ordered_rightly']} of {order['pairs_apart']}"
    options = measured["options"]
    assert options["call warned"] == 0
    assert options["digital warned"] == len(options["seeds"])


def test_theory_numbers_are_the_measured_ones():
    measured = result("theory")
    ratios = measured["random affine stacks"]["variance over bound"]
    assert measured["random affine stacks"]["violated"] == 0
    names = {"variance over bound (P)": "P, level 1", "the same, (Sl)": "Sl", "the same, (T)": "T, level 1"}
    for start, name in names.items():
        assert row_of(start)[1] == f"{ratios[name]['median']:.2g} ({ratios[name]['largest']:.2g})"
    ou, networks = measured["tasks"]["ou"], measured["networks on ou"]
    loose = [f"{ou[name]['bound (P) over variance']['median']:.1f}" for name in ("gaussian", "nsf")]
    assert row_of("bound (P) over the variance on `ou`")[1] == ", ".join(loose)
    for start, what in (("slope of the variance of the loss", "loss"), ("slope of that of its gradient", "gradient")):
        told = [f"{networks[name][what]['mean']:.2f} +- {networks[name][what]['standard_error']:.2g}"
                for name in ("nsf", "mdn")]
        assert row_of(start)[1] == ", ".join(told)
    told = [f"{networks[name]['jumping']['mean']:.0%}" for name in ("nsf", "mdn")]
    assert row_of("parameters in which")[1] == ", ".join(told)
    steps = measured["a step's gradient on ou"]["30 epochs"]
    told = [f"{steps[f'1000 + 100 rows, {way}']['bias']['mean']:.0%}"
            for way in ("plain", "rescale", "project", "rescale + project")]
    assert row_of("bias of a step's gradient")[1] == ", ".join(told)
    seconds = measured["seconds of a report on ou"]["median"]
    assert row_of("seconds of `python -m theory_checks ou`")[1] == f"{seconds:.0f}"
    assert seconds < 60
    assert not any(task["violated"] for task in measured["tasks"].values())
