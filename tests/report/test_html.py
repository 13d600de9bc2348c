r"""The report says everything, holds everything, and survives what is missing or hostile."""

import base64
import copy
import json
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch

from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.data import MultilevelData
from mlsbi.inference.saving import write_model
from mlsbi.report.elements import number, table
from mlsbi.report.figures import draw_figures
from mlsbi.report.html import write_report
from mlsbi.report.wording import give_or_take
from mlsbi.store.records import Records, Stream
from mlsbi.store.store import create_store

pytestmark = pytest.mark.usefixtures("rough_figures")

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
FIGURES = ("coupled", "pilot", "plan", "losses", "posterior", "coverage", "ranks")
SECTIONS = (
    "What was asked", "The plan, and why", "What was spent", "How training went", "The posterior",
    "Can it be trusted?", "How to reproduce this",
)  # fmt: skip
SECTIONS_OF_SEVERAL = (
    "What was asked", "The plan, and why", "What was spent", "The strategies compared", "How 'transfer' was trained",
    "The posterior of 'transfer'", "Can 'transfer' be trusted?", "The other strategies, in short",
    "How to reproduce this",
)  # fmt: skip


def make_checks(**changes):
    return {
        "n_test": 400, "draws": 1000, "nlpd": make_score(-0.9, 0.05), "prior_nlpd": 0.27, "reference_nlpd": -1.5,
        "kld": make_score(0.6, 0.02), "coverage": {"credibility": [0.5, 0.9], "found": [0.49, 0.91], "p": 0.6},
        "sbc": {"p": [0.4, 0.2]}, "tarp": {"p": 0.33},
        "calibration_error": {"value": 0.021, "null": 0.0225, "null_sd": 0.0106}, "fom": make_score(39.6, 3.2),
        "mse": [0.061, 0.36], "nrmse": [0.91, 0.52], "likelihood_kld": None, "mcmc": None, **changes,
    }  # fmt: skip


def make_score(mean, error):
    return {"mean": mean, "median": mean, "standard_error": error, "n": 400}


def make_training(n=(800, 80), **changes):
    return {"best_epoch": 14, "epochs": 45, "best_loss": 3.5, "stopped": "no better held-out loss for 30 epochs",
            "seconds": 3.0, "n_train": list(n), "n_validation": [count // 4 for count in n], "notes": [], **changes}


def make_record(name, **changes):
    return {
        "options": {}, "training": [make_training()] * 2, "checks": make_checks(),
        "posterior": {
            "names": ["gamma", "mu"], "observation": "row 0 of the test set", "truth": [0.3, 1.6],
            "mean": [0.62, 1.01], "sd": [0.25, 0.6], "quantiles": {"0.05": [0.2, 0.3], "0.5": [0.6, 1.0],
            "0.95": [0.9, 2.4]}, "map": [0.7, 0.9], "shrinkage": [0.96, 0.51], "mcmc": None,
        },
        "files": {"model": f"{name}/model", "samples": f"{name}/posterior_samples.csv"}, "name": name, "error": None,
        "runs": [2080, 80], "cost": 10144.0, **changes,
    }  # fmt: skip


def make_results():
    plan = optimal_allocation([8.0, 0.9], [1.0, 100.0], budget=11_000.0, single_level_variance=7.7)
    return {
        "format": 2,
        "created": "2025-11-21T08:40:12",
        "versions": {"mlsbi": "0.1.0", "torch": "2.13.0", "numpy": "2.3.1", "python": "3.11.9", "nflows": None},
        "command": "mlsbi run ou --budget 11000 --out runs/ou",
        "asked": {
            "task": "ou", "title": "Ornstein-Uhlenbeck", "citation": "Hikida et al. 2025", "estimator": "npe",
            "strategies": ["multilevel"], "density": {"name": "nsf", "options": {}}, "embedding": None,
            "x_transform": "none", "training": {"learning_rate": 0.001, "batch_size": None}, "budget": 11000.0,
            "n": None, "seed": 7, "device": "cpu", "ensemble": 2, "observations": 1, "parameters": ["gamma", "mu"],
        },
        "observable": {"axis": None, "label": "time"},
        "levels": [{"name": "stationary", "cost": 1.0}, {"name": "euler", "cost": 100.0}],
        "cost_unit": "as declared",
        "pilot": {
            "n": 64, "spent": 6528.0, "warnings": ["Take more pilot rows."],
            "table": {"columns": ["level", "variance", "correlation"],
                      "rows": [["stationary", 8.0, "nan"], ["euler", 0.9, 0.94]]},
        },
        "plan": plan.to_dict(),
        "plan_note": None,
        "spent": {"n": [2000, 80], "runs": [2144, 80], "failures": [0, 3], "seconds": [0.02, 0.4], "cost": 10144.0,
                  "high_only_n": 101.44},
        "strategies": [make_record("multilevel", options={"weights": "estimated", "project": False},
                                   training=[make_training(projected=0.25, cosine=-0.1)] * 2)],
        "comparison": None,
        "verdict": ["Informative and calibrated, +- -0.3."],
        "files": {"data": "data.npz", "reference": None},
    }  # fmt: skip


def make_comparison(*records, best=None):
    """Results of several strategies on the same data."""
    results = make_results()
    records = records or (
        make_record("multilevel", checks=make_checks(nlpd=make_score(-0.85, 0.05))),
        make_record("transfer", options={"learning_rate": None, "fine_tune": True}, training=[
            make_training(stopped="no better held-out loss for 30 epochs; then no better held-out loss for 30 epochs")
        ]),
        make_record("high", options={"level": -1}, training=[make_training((80,))], runs=[0, 80], cost=8000.0,
                    checks=make_checks(nlpd=make_score("inf", "nan"), kld=make_score(2.5, 0.3))),
    )
    results["strategies"] = list(records)
    results["asked"]["strategies"] = [record["name"] for record in records]
    results["comparison"] = {"best": "transfer", "behind": {
        "multilevel": make_score(0.05, 0.04), "high": make_score("inf", "nan"),
    }} if best is None else best
    return results


def make_likelihood():
    """Results of one likelihood network whose posterior is sampled by Markov chains."""
    results = make_results()
    results["asked"].update(estimator="nle", observations=10, x_transform="asinh")
    record = results["strategies"][0]
    record["posterior"]["mcmc"] = {
        "rhat": [1.041, 1.026], "effective": [1014.9, 1660.3], "acceptance": 0.248, "steps": 581, "warmup": 219,
        "chains": 64, "seconds": 5.54, "method": "emcee", "warning": None,
    }
    record["checks"].update(kld=None, reference_nlpd=None, likelihood_kld=make_score(0.157, 0.005), mcmc={
        "chains": 40, "converged": 40, "method": "HMC", "least_effective": 563.4
    })
    return results


def write(folder, results, figures=FIGURES):
    (folder / "figures").mkdir(exist_ok=True)
    for name in figures:
        (folder / "figures" / f"{name}.png").write_bytes(PIXEL)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Headings, tags, attributes and text of a page, and whether its tags match."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self):
        return " ".join(" ".join(data for tag, data in self.texts if tag != "style").split())

    def of(self, tag):
        return [data for open_tag, data in self.texts if open_tag == tag]


def test_all_sections_in_order_with_the_verdict_first(tmp_path):
    page = Reader(write(tmp_path, make_results()))
    assert page.of("h2") == ["In short", *SECTIONS]
    assert page.of("h1") == ["Ornstein-Uhlenbeck"]
    assert page.text.index("Informative and calibrated, ± −0.3.") < page.text.index("What was asked")
    for said in ("11,000 units", "2,000", "101 runs of the finest level alone", "800 + 80",
                 "3 of 83 rows (3.6%) of level 'euler' failed", "25%", "Take more pilot rows.",
                 "mlsbi run ou --budget 11000 --out runs/ou", "torch 2.13.0", "seed 7",
                 "data.npz", "tells most about mu", "51%", "batch size none", "project no", "posterior network",
                 "multilevel/model, multilevel/posterior_samples.csv", "Figure of merit: 39.6 ± 3.2",
                 "0.021. A posterior without fault gives 0.022 ± 0.011", "(TARP) 0.33", "mu 0.36 0.52"):  # fmt: skip
        assert said in page.text, said


def test_page_is_self_contained(tmp_path):
    text = write(tmp_path, make_results())
    page = Reader(text)
    sources = [value for _, name, value in page.attributes if name == "src"]
    assert len(sources) == len(FIGURES)
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PIXEL
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("figcaption") == len(FIGURES)
    assert not list(tmp_path.glob("*.partial"))


def test_text_is_escaped_wherever_it_comes_from(tmp_path):
    evil = '<script>alert("x")</script>&'

    def poison(value):
        if isinstance(value, dict):
            return {key: poison(one) for key, one in value.items()}
        if isinstance(value, list):
            return [poison(one) for one in value]
        return value + evil if isinstance(value, str) and value not in ("nan", "inf") else value

    for results in (make_results(), make_comparison(), make_likelihood()):
        page = Reader(write(tmp_path, poison(results)))
        assert "script" not in page.tags
        assert page.text.count("<script>") > 20


def drop(*path):
    """Sets a part of the results to null, of the only strategy where it is one of its parts."""

    def change(results):
        results = results["strategies"][0] if path[0] in results["strategies"][0] else results
        for key in path[:-1]:
            results = results[key]
        results[path[-1]] = None

    return change


@pytest.mark.parametrize(("change", "said"), [
    (drop("plan"), "nothing was planned"),
    (drop("pilot"), "No pilot was run"),
    (drop("checks"), "was not checked"),
    (drop("posterior"), "no posterior was drawn"),
    (drop("posterior", "truth"), "are not known"),
    (drop("training"), "No training was recorded"),
    (drop("spent"), "not recorded"),
    (drop("verdict"), "No verdict was recorded"),
    (drop("command"), "The command was not recorded"),
    (drop("checks", "coverage"), "Coverage was not computed"),
    *((drop("checks", name), "400 observations of the finest level")
      for name in ("sbc", "tarp", "calibration_error", "fom", "mse", "kld")),
    (drop("spent", "seconds"), "simulator runs"),
    (drop("options"), "multilevel"),
    (drop("strategies"), "No training was recorded"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_is_missing_is_said(tmp_path, change, said):
    results = make_results()
    change(results)
    page = Reader(write(tmp_path, results, figures=()))
    assert said in page.text
    assert page.of("h2") == ["In short", *SECTIONS]
    assert "None" not in page.text
    assert "img" not in page.tags


def test_missing_reference_is_said(tmp_path):
    results = make_results()
    assert "No exact or reference posterior" not in write(tmp_path, results)
    results["strategies"][0]["checks"].update(reference_nlpd=None, kld=None)
    assert "No exact or reference posterior is known" in write(tmp_path, results)


def test_plan_note_stands_in_for_a_plan(tmp_path):
    results = {**make_results(), "plan": None, "plan_note": "The published budget was used."}
    assert "The published budget was used." in write(tmp_path, results)


def test_several_outputs_and_losing_stacks(tmp_path):
    results = make_results()
    results["plan"] = optimal_allocation(
        [[4.0, 1.0], [8.0, 3.0]], [1.0, 3.0], budget=160.0, single_level_variance=[4.0, 8.0]
    ).to_dict()
    text = Reader(write(tmp_path, results)).text
    assert "these levels do not pay off" in text
    assert "4, 8" in text


def test_three_levels_and_one(tmp_path):
    results = make_results()
    results["levels"].insert(1, {"name": "middle", "cost": 10.0})
    results["plan"] = optimal_allocation([8.0, 0.9, 0.1], [1.0, 10.0, 100.0], budget=11_000.0).to_dict()
    for key in ("n", "runs", "failures", "seconds"):
        results["spent"][key] = [*results["spent"][key], 5]
    assert "middle" in write(tmp_path, results)
    results = copy.deepcopy(make_results())
    results["levels"], results["plan"], results["pilot"] = results["levels"][1:], None, None
    for key in ("n", "runs", "failures", "seconds"):
        results["spent"][key] = results["spent"][key][1:]
    assert "of the finest level alone" not in write(tmp_path, results)


def test_unreadable_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="No results.json in"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="Expected a JSON object"):
        write_report(tmp_path)
    for version, told in ((3, "Upgrade mlsbi"), (1, "format 1, from before strategies could be compared")):
        (tmp_path / "results.json").write_text(json.dumps({"format": version}), encoding="utf-8")
        for make in (write_report, draw_figures):
            with pytest.raises(ValueError, match=told):
                make(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_empty_results_still_make_a_page(tmp_path):
    assert Reader(write(tmp_path, {}, figures=())).of("h2") == ["In short", *SECTIONS]


SEVERAL = ("coupled", "pilot", "plan", "quality", "coverage", "posterior", "posterior-transfer",
           *(f"{kind}-{name}" for kind in ("losses", "ranks") for name in ("multilevel", "transfer", "high")))


def rows_of(text):
    """Cells of the table rows of a page."""
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]


def test_several_strategies_are_compared_then_the_best_is_shown_in_full(tmp_path):
    text = write(tmp_path, make_comparison(), SEVERAL)
    page = Reader(text)
    assert page.of("h2") == ["In short", *SECTIONS_OF_SEVERAL]
    assert page.tags.count("img") == len(SEVERAL)
    rows = rows_of(text)
    assert ["transfer", "2,080 + 80", "10,144", "3", "−0.900 ± 0.050", "–", "0.600 ± 0.020"] in rows
    assert ["multilevel", "2,080 + 80", "10,144", "6", "−0.850 ± 0.050", "0.050 ± 0.040", "0.600 ± 0.020"] in rows
    assert ["high", "0 + 80", "8,000", "3", "∞", "∞", "2.500 ± 0.300"] in rows
    assert [row[0] for row in rows if len(row) == 7][:3] == ["transfer", "multilevel", "high"]  # best first
    assert ["multilevel", "49%", "91%", "0.6", "0.33", "0.2", "0.021"] in rows
    assert ["gamma", "0.3", *["0.62 ± 0.25"] * 3] in rows
    for said in ("the prior's is 0.27 and the exact posterior's is −1.5", "without a fault it is 0.022 ± 0.011",
                 "transfer (fine tune yes); high (level euler)", "'transfer', the best here, is shown in full",
                 "Training stopped: no better held-out loss for 30 epochs, in every stage.", "stage by stage",
                 "Files of high high/model, high/posterior_samples.csv", "2 for each strategy"):
        assert said in page.text, said


def test_what_failed_is_told_and_comes_last(tmp_path):
    lost = {"name": "multilevel", "error": "Training diverged."}
    results = make_comparison(lost, make_record("transfer"), make_record("high"))
    text = write(tmp_path, results, figures=())
    page = Reader(text)
    assert page.of("h2") == ["In short", *SECTIONS_OF_SEVERAL]
    assert page.text.count("Training 'multilevel' failed: Training diverged.") == 1
    assert [row[0] for row in rows_of(text) if len(row) == 7][:3] == ["transfer", "high", "multilevel\u00a0(failed)"]
    assert page.of("h3")[-2:] == ["high", "multilevel"]
    alone = make_comparison(lost, make_record("transfer"), best={})
    assert "'transfer', the only one that could be trained" in Reader(write(tmp_path, alone, figures=())).text


def test_strategies_that_were_not_checked_are_not_ranked(tmp_path):
    records = [make_record(name, checks=None, posterior=None) for name in ("transfer", "multilevel")]
    page = Reader(write(tmp_path, make_comparison(*records, best={}), figures=()))
    assert page.of("h2") == ["In short", *SECTIONS_OF_SEVERAL]
    for said in ("which strategy is best cannot be said", "the first that was asked for", "No observation was given",
                 "Do not rely on its width"):
        assert said in page.text, said
    assert "negative log density" not in page.text
    assert "None" not in page.text


def test_gradients_are_told_where_they_were_adjusted(tmp_path):
    results = make_results()
    adjusted = Reader(write(tmp_path, results)).text
    assert "steps projected" in adjusted
    assert "mean cosine" in adjusted
    results["strategies"][0]["training"] = [make_training()] * 2
    plain = Reader(write(tmp_path, results)).text
    assert "projected" not in plain
    assert "cosine" not in plain


def test_notes_of_a_training_are_told_once(tmp_path):
    results = make_results()
    note = "members were evaluated one after the other: it draws <random> numbers"
    results["strategies"][0]["training"] = [make_training(notes=[note])] * 2
    text = Reader(write(tmp_path, results)).text
    assert text.count("Members were evaluated one after the other: it draws <random> numbers.") == 1
    old = make_training()
    del old["notes"]  # written before there were any
    results["strategies"][0]["training"] = [old]
    assert "Training stopped" in Reader(write(tmp_path, results)).text


def test_a_mixture_says_what_it_weighted_and_leaves_out_what_would_not_fit(tmp_path):
    mixture = [{"strategy": name, "weight": weight, "held_out": loss, "standard_error": 0.1, "stages": [0, 1],
                "seconds": 2.0} for name, weight, loss in (("Emulation", 0.75, 2.9), ("TransferLearning", 0.25, 3.2))]
    training = make_training(mixture=mixture, notes=["mixed Emulation 75%, TransferLearning 25%, for the best score"],
                             stopped="; then ".join(["no better held-out loss for 20 epochs"] * 4))
    results = make_results()
    results["strategies"] = [make_record("auto", training=[training] * 2)]
    text = Reader(write(tmp_path, results)).text
    assert "a mixture of 2 strategies" in text
    found = text[text.index("a mixture of 2 strategies"):]
    assert found.index("Emulation") < found.index("75%") < found.index("TransferLearning") < found.index("25%")
    assert "Mixed Emulation 75%" in text
    assert "no better held-out loss for 20 epochs, in every stage" in text
    assert "rows trained on" not in text


def test_likelihoods_say_how_their_chains_went(tmp_path):
    results = make_likelihood()
    page = Reader(write(tmp_path, results))
    for said in ("explain 10 outputs of the finest level", "likelihood of one output given the parameters",
                 "likelihood network", "through asinh", "400 observations of 10 outputs each",
                 "64 Markov chains (emcee)", "581 steps each, after 219", "24.8% of the steps", "at most 1.041",
                 "at least 1,015 independent ones",
                 "all 40 converged", "563 effective draws", "Nothing speaks against these chains",
                 "divergence from the exact likelihood (KL), per output 0.157"):
        assert said in page.text, said
    assert "No exact or reference posterior" not in page.text
    record = results["strategies"][0]
    record["posterior"]["mcmc"].update(rhat=[1.3, "nan"], warning="The chains have not converged.")
    record["checks"]["mcmc"]["converged"] = 33
    page = Reader(write(tmp_path, results))
    for said in ("could not be computed for every parameter", "Warning: The chains have not converged.",
                 "7 of 40 did not converge, so the checks are uncertain too"):
        assert said in page.text, said
    assert "Nothing speaks against" not in page.text


def test_chains_of_several_strategies_are_compared(tmp_path):
    first, second = (make_likelihood()["strategies"][0] for _ in range(2))
    second["name"], second["checks"]["mcmc"]["converged"] = "transfer", 30
    second["posterior"]["mcmc"]["warning"] = "Stuck."
    second["checks"]["nlpd"] = make_score(3.0, 0.1)
    best = {"best": "multilevel", "behind": {"transfer": make_score(3.9, 0.1)}}
    text = write(tmp_path, make_comparison(first, second, best=best), figures=())
    assert ["transfer", "49%", "91%", "0.6", "0.33", "0.2", "0.021", "75%"] in rows_of(text)
    assert "Of the observation's chain: Stuck." in Reader(text).text


def test_failed_rows_are_told_with_their_map(tmp_path):
    results = make_results()
    text = write(tmp_path, results, (*FIGURES, "failures"))
    page = Reader(text)
    assert ["euler", "80", "80", "3", "3.6%", "0.4"] in rows_of(text)
    assert ["stationary", "2,000", "2,144", "0", "0%", "0.02"] in rows_of(text)
    assert page.tags.count("img") == len(FIGURES) + 1
    for said in ("left out with their twins", "raises an error, runs out of time", "level is 'euler'",
                 "Below the diagonal"):
        assert said in page.text, said
    assert "cannot be drawn" not in page.text
    section = text[text.index('id="what-was-spent"') : text.index('id="how-training-went"')]
    assert section.count("<img") == 1
    results["asked"].update(on_failure="redraw", parameters=["gamma"])
    text = write(tmp_path, results)
    assert "replaced by others" in text
    assert "Below the diagonal" not in text


def test_failed_rows_without_a_store_have_no_map_and_the_report_says_so(tmp_path):
    text = write(tmp_path, make_results())
    assert "cannot be drawn: the run's store" in text.replace("&#x27;", "'")


def test_runs_without_failed_rows_have_no_word_on_them(tmp_path):
    results = make_results()
    results["spent"]["failures"] = [0, 0]
    text = write(tmp_path, results, (*FIGURES, "failures"))  # a figure left over is not shown
    page = Reader(text)
    assert "No row failed." in page.text
    assert "Rows that failed" not in page.text
    assert "share that failed" not in page.text
    assert page.tags.count("img") == len(FIGURES)


def write_store(folder, failed):
    """A run's store, 40 rows of its finest level; those in `failed` went wrong."""
    store = create_store(folder / "store", {}, ["stationary", "euler"], ["gamma", "mu"])
    theta = np.random.default_rng(0).uniform(size=(40, 2)).astype(np.float32)
    status = np.isin(np.arange(40), failed).astype(np.uint8)
    ones = np.ones((40, 2))
    with store.writing() as writer:
        writer.add(Stream(7, 1, (0, 1)), Records(
            np.arange(40), theta, (ones, ones), status, ones.astype(int), ones, dict.fromkeys(failed, "no luck")))


@pytest.mark.parametrize(("store", "drawn"), [("whole", True), ("repaired", False), ("damaged", False),
                                              *(pytest.param(store, False, marks=pytest.mark.slow)
                                                for store in ("gone", "unnamed"))])
def test_the_map_of_failures_is_drawn_from_the_store(tmp_path, store, drawn):
    results = {**make_results(), "pilot": None}
    results["files"] = {"data": "data.npz", "reference": None} | ({} if store == "unnamed" else {"store": "store"})
    write_run(tmp_path, results)
    if store != "gone":
        write_store(tmp_path, [] if store == "repaired" else [1, 5, 6])
    if store == "damaged":
        (shard,) = (tmp_path / "store" / "rows").iterdir()
        content = bytearray(shard.read_bytes())
        content[-300] ^= 1
        shard.write_bytes(bytes(content))
    names = {path.stem for path in draw_figures(tmp_path)}
    assert ("failures" in names) == drawn
    assert {"coupled", "losses", "posterior"} <= names
    assert ("cannot be drawn" in write_report(tmp_path).read_text(encoding="utf-8")) == (not drawn)


def write_run(folder, results):
    """A folder as `mlsbi run` leaves it, without the networks."""
    rng = np.random.default_rng(0)
    theta, x = torch.rand(40, 2), torch.randn(40, 1)
    MultilevelData.from_arrays([(theta, x), (theta[:20], x[:20] ** 3, x[:20])]).save(folder / "data.npz")
    if results["files"]["reference"]:
        pd.DataFrame(rng.uniform(size=(50, 2))).to_csv(folder / results["files"]["reference"], index=False)
    for record in results["strategies"]:
        if record["error"]:
            continue
        stages = 2 if record["name"] == "transfer" else 1
        epochs = [{"loss": 1 / (1 + epoch), "validation_loss": 1.0, "fine_0": 1.0,
                   **({"stage": float(epoch // 5)} if stages == 2 else {})} for epoch in range(10)]
        write_model(folder / record["files"]["model"],
                    {"histories": [{"epochs": epochs, "best_epoch": 7}], "prior": {"low": [0, 0], "high": [1, 1]}},
                    {"weight": torch.zeros(1)})
        if record["posterior"]:
            pd.DataFrame(rng.uniform(size=(50, 2))).to_csv(folder / record["files"]["samples"], index=False)
        if record["checks"]:
            np.savez(folder / record["name"] / "checks.npz", hpd_levels=rng.uniform(size=30),
                     ranks=rng.integers(0, 1001, (30, 2)))
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


LOST = {"name": "low", "error": "Training diverged."}
BLIND = make_record("multilevel", checks=None, posterior=None)


@pytest.mark.parametrize(("results", "names"), [
    (make_results(), {"coupled", "plan", "losses", "posterior", "coverage", "ranks"}),
    ({**make_results(), "strategies": [BLIND], "plan": None}, {"coupled", "losses"}),
    (make_comparison(), set(SEVERAL) - {"pilot"}),
    (make_comparison(make_record("high"), LOST, best={}),
     {"coupled", "plan", "losses-high", "ranks-high", "coverage", "quality", "posterior"}),
], ids=["one", "unchecked", "several", "failed"])  # fmt: skip
def test_figures_of_a_run(tmp_path, results, names):
    results = {**results, "pilot": None, "files": {"data": "data.npz", "reference": "reference_samples.csv"}}
    write_run(tmp_path, results)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.png").write_bytes(PIXEL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = draw_figures(tmp_path)
    assert {path.stem for path in written} == {path.stem for path in (tmp_path / "figures").iterdir()} == names
    assert Reader(write_report(tmp_path).read_text(encoding="utf-8")).tags.count("img") == len(names)


def test_figures_need_a_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a finished run"):
        draw_figures(tmp_path)


def test_number_columns_stand_to_the_right():
    html = table(["name", "share", "n", "words"], [["a", "5%", 3, "1 of 2"], ["b", "–", "0.5 ± 0.1", "2 of 2"]])
    assert html.count('<th class="number">') == 2
    assert html.count('<td class="number">') == 4
    with pytest.raises(ValueError, match="rows of 2 cells"):
        table(["a", "b"], [["only one"]])


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (0.0, "0"), (1234567, "1,234,567"), (11000.0, "11,000"), (1234.56, "1,234.6"), (12345.6, "12,346"),
    (0.12346, "0.1235"), (-0.5, "−0.5"), (-12000.0, "−12,000"), (3e12, "3e+12"), (2.5e-7, "2.5e-07"),
    (float("nan"), "undefined"), (float("-inf"), "−∞"), (None, "–"), (999.96, "1000"),
])  # fmt: skip
def test_numbers_are_written_as_people_do(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("mean", "error", "text"), [
    (-0.91234, 0.0512, "−0.912 ± 0.051"), (1234.5, 160.0, "1,234 ± 160"), (2.0, 0.0, "2 ± 0"), ("inf", "nan", "∞"),
    (0.5, None, "0.5"), (None, None, "–"),
])  # fmt: skip
def test_errors_set_the_digits(mean, error, text):
    assert give_or_take(mean, error) == text
