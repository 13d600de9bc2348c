r"""The report says everything, holds everything, and survives what is missing or hostile."""

import base64
import copy
import json
from html.parser import HTMLParser

import pytest

from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.report.elements import number, table
from mlsbi.report.html import write_report

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
FIGURES = ("coupled", "pilot", "plan", "losses", "posterior", "coverage", "ranks")
SECTIONS = (
    "What was asked", "The plan, and why", "What was spent", "How training went", "The posterior",
    "Can it be trusted?", "How to reproduce this",
)  # fmt: skip


def make_results():
    plan = optimal_allocation([8.0, 0.9], [1.0, 100.0], budget=11_000.0, single_level_variance=7.7)
    return {
        "format": 1,
        "created": "2025-11-21T08:40:12",
        "versions": {"mlsbi": "0.1.0", "torch": "2.13.0", "numpy": "2.3.1", "python": "3.11.9", "nflows": None},
        "command": "mlsbi run ou --budget 11000 --out runs/ou",
        "asked": {
            "task": "ou", "title": "Ornstein-Uhlenbeck", "citation": "Hikida et al. 2025", "strategy": "multilevel",
            "strategy_options": {"weights": "estimated", "project": False}, "density": {"name": "nsf", "options": {}},
            "training": {"learning_rate": 0.001, "batch_size": None}, "budget": 11000.0, "n": None, "seed": 7,
            "device": "cpu", "ensemble": 2, "parameters": ["gamma", "mu"],
        },
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
        "training": [
            {"best_epoch": 14, "epochs": 45, "best_loss": 3.5, "stopped": "no better held-out loss for 30 epochs",
             "seconds": 3.0, "n_train": [800, 80], "n_validation": [200, 20], "projected": 0.25, "cosine": -0.1},
        ] * 2,
        "posterior": {
            "names": ["gamma", "mu"], "observation": "row 0 of the test set", "truth": [0.3, 1.6],
            "mean": [0.62, 1.01], "sd": [0.25, 0.6], "quantiles": {"0.05": [0.2, 0.3], "0.5": [0.6, 1.0],
            "0.95": [0.9, 2.4]}, "map": [0.7, 0.9], "shrinkage": [0.96, 0.51],
        },
        "checks": {
            "n_test": 400, "draws": 1000,
            "nlpd": {"mean": -0.9, "median": -1.0, "standard_error": 0.05, "n": 400}, "prior_nlpd": 0.27,
            "reference_nlpd": -1.5, "kld": {"mean": 0.6, "median": 0.5, "standard_error": 0.02, "n": 400},
            "coverage": {"credibility": [0.5, 0.9], "found": [0.49, 0.91], "p": 0.6}, "sbc": {"p": [0.4, 0.2]},
        },
        "verdict": ["Informative and calibrated."],
        "files": {"data": "data.npz", "model": "model", "samples": None},
    }  # fmt: skip


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
    assert page.text.index("Informative and calibrated.") < page.text.index("What was asked")
    for said in ("11,000 units", "2,000", "101 runs of the finest level alone", "3 rows were left out", "800 + 80",
                 "25%", "Take more pilot rows.", "mlsbi run ou --budget 11000 --out runs/ou", "torch 2.13.0", "seed 7",
                 "data.npz", "tells most about mu", "51%", "batch size none", "project no"):  # fmt: skip
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
        return value + evil if isinstance(value, str) and value != "nan" else value

    text = write(tmp_path, poison(make_results()))
    page = Reader(text)
    assert "script" not in page.tags
    assert page.text.count("<script>") > 20


def drop(*path):
    def change(results):
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
    (drop("checks", "sbc"), "400 observations of the finest level"),
    (drop("spent", "seconds"), "simulator runs"),
    (drop("asked", "strategy_options"), "multilevel"),
], ids=str)  # fmt: skip
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
    results["checks"]["reference_nlpd"] = results["checks"]["kld"] = None
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
    (tmp_path / "results.json").write_text('{"format": 2}', encoding="utf-8")
    with pytest.raises(ValueError, match="Upgrade mlsbi"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_empty_results_still_make_a_page(tmp_path):
    assert Reader(write(tmp_path, {}, figures=())).of("h2") == ["In short", *SECTIONS]


def test_number_columns_stand_to_the_right():
    html = table(["name", "share", "n", "words"], [["a", "5%", 3, "1 of 2"], ["b", "–", None, "2 of 2"]])
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
