r"""`mlsbi status` says what is there, what went wrong, and how to go on."""

import json
import re
import shlex
import subprocess
import sys
import warnings

import matplotlib.figure
import numpy as np
import pytest

from mlsbi.cli import status
from mlsbi.cli.folders import KEPT
from mlsbi.cli.main import main
from mlsbi.store.records import STATUSES, Records, Stream
from mlsbi.store.store import create_store, open_store

LOW, HIGH = Stream(1, 0, (0,)), Stream(1, 1, (0, 1))

STACK = """
import torch
from mlsbi import BoxPrior, Level, LevelStack

def low(theta, noise):
    return theta + noise + 0.1

def high(theta, noise):
    if bool((theta[:, 0] > 0.7).any()):
        raise RuntimeError(f"no convergence at {float(theta[:, 0].max()):.4f}")
    return theta + noise

stack = LevelStack(
    prior=BoxPrior([0.0], [1.0], names=["rate"]),
    noise=lambda n, generator: 0.2 * torch.randn(n, 1, generator=generator),
    levels=[Level("low", low, cost=1), Level("high", high, cost=10)],
)
"""


def make(stream, n, failed=(), *, start=0, message="it broke", status="exception", seconds=1.0):
    """Rows of a stream; those in `failed` went wrong. A run of level l takes `seconds * 10**l`."""
    index = np.arange(start, start + n)
    ones = np.ones((n, len(stream.levels)))
    theta = np.stack([index / 100, index % 7], 1).astype(np.float32)
    gone = np.isin(index, failed)
    texts = {int(at): message.replace("{}", str(index[at])) for at in np.flatnonzero(gone)}
    return Records(index, theta, (ones,) * len(stream.levels), np.where(gone, STATUSES.index(status), 0),
                   ones.astype(int), ones * seconds * 10.0 ** np.array(stream.levels), texts)


def new(folder, *pairs, costs=(1.0, 10.0)):
    store = create_store(folder, {}, ["low", "high"], ["mu", "tau"], costs=costs,
                         row_costs=costs and (costs[0], sum(costs)))
    with store.writing() as writer:
        for stream, records in pairs:
            writer.add(stream, records)
            writer.flush()
    return store


def printed(capsys, *arguments, code=0):
    assert main(["status", *map(str, arguments)]) == code
    out = capsys.readouterr()
    return out.err if code else out.out


def test_a_sound_store_gives_no_alarm(tmp_path, capsys):
    new(tmp_path / "s", (LOW, make(LOW, 50)), (HIGH, make(HIGH, 20)))
    text = printed(capsys, tmp_path / "s")
    assert text.startswith(str(open_store(tmp_path / "s")))  # the table, once
    assert "Nobody is writing" in text
    assert "No row failed." in text
    for unsaid in ("Damaged", "Declared", "Why,", "--on-failure", "run:"):
        assert unsaid not in text


def test_an_empty_store_has_neither_succeeded_nor_failed(tmp_path, capsys):
    new(tmp_path / "s")
    text = printed(capsys, tmp_path / "s")
    assert "ailed:" not in text
    assert "No row failed" not in text


def test_failures_are_counted_by_level_and_by_reason(tmp_path, capsys):
    new(tmp_path / "s", (LOW, make(LOW, 200, [5], message="Solver: step {} too small")),
        (HIGH, make(HIGH, 30, [1, 4, 9], message="Level 'high2': time {}.5 out of 1e-3 range\n  in line {}")),
        (HIGH, make(HIGH, 10, [31, 33], start=30, message="lost", status="worker died")))
    text = printed(capsys, tmp_path / "s")
    assert "1 of 200 rows (0.5%) of level 'low', 5 of 40 rows (12.5%) of level 'high'" in text
    assert "the part of the prior where simulations succeed" in text
    reasons = re.findall(r"^    (\d+) x (.*)$", text, re.MULTILINE)
    assert reasons == [
        ("3", "exception: Level 'high2': time 1.5 out of 1e-3 range in line 1 (and the like, with other numbers)"),
        ("2", "worker died: lost"), ("1", "exception: Solver: step 5 too small"),
    ]  # fmt: skip
    for option in ("--on-failure drop", "--on-failure redraw", "--retry-failed"):
        assert option in text


def test_reasons_are_few_short_and_always_there(tmp_path, capsys):
    pairs = [(LOW, make(LOW, 10, range(10 * k, 10 * k + 10 - k), start=10 * k, message=letter * 500 if k else " "))
             for k, letter in enumerate("abcdefg")]
    new(tmp_path / "s", *pairs)
    text = printed(capsys, tmp_path / "s")
    reasons = text[text.index("Why,") :].split("\n- ")[0].splitlines()[1:]
    assert len(reasons) == 6
    assert reasons[0].strip() == "10 x exception: no message"
    assert reasons[-1].strip().startswith("9 for 2 other reasons")
    assert max(map(len, reasons)) < 250


def test_repaired_rows_are_not_failures(tmp_path, capsys):
    new(tmp_path / "s", (LOW, make(LOW, 20, [3])), (LOW, make(LOW, 1, start=3)))
    assert "No row failed." in printed(capsys, tmp_path / "s")


def test_a_writer_is_named(tmp_path, capsys):
    store = new(tmp_path / "s", (LOW, make(LOW, 20)))
    code = ("import sys; from mlsbi.store.store import open_store\n"
            "with open_store(sys.argv[1]).writing():\n    print('ready', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, str(store.path)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        text = printed(capsys, tmp_path / "s")
        other.stdin.close()
    assert f"is writing to the store (process {other.pid} on" in text
    assert "Nobody" not in text


@pytest.mark.parametrize(("costs", "said"), [
    ((1.0, 10.0), None), ((1.0, 19.0), None), ((1.0, 5.5), None), (None, None),
    ((1.0, 100.0), "Declared 'high' as 100 times 'low', measured 10 times: 20 s a run against 2 s."),
    ((1.0, 3.0), "Declared 'high' as 3 times 'low', measured 10 times"),
])  # fmt: skip
def test_declared_costs_are_held_against_measured_ones(tmp_path, capsys, costs, said):
    new(tmp_path / "s", (LOW, make(LOW, 20, seconds=2.0)), (HIGH, make(HIGH, 9, seconds=2.0)), costs=costs)
    text = printed(capsys, tmp_path / "s")
    assert ("Declared" in text) == (said is not None)
    assert (said or "") in text


def test_levels_that_were_not_run_are_not_compared(tmp_path, capsys):
    new(tmp_path / "s", (LOW, make(LOW, 20)), costs=(1.0, 1000.0))
    assert "Declared" not in printed(capsys, tmp_path / "s")


@pytest.mark.parametrize("failed", [(), (3, 4)])
def test_damage_is_shown_with_a_way_out_that_works(tmp_path, capsys, failed):
    store = new(tmp_path / "s", (LOW, make(LOW, 20, failed)), (HIGH, make(HIGH, 9)))
    (path,) = store.rows.glob("0-*.npz")
    content = bytearray(path.read_bytes())
    if failed:  # found when the reasons are read
        content[-400] ^= 1
    else:  # found at once
        content = content[:50]
    path.write_bytes(bytes(content))
    text = printed(capsys, tmp_path / "s")
    assert f"Damaged: {path.name}." in text
    assert f"damaged: {path.name}" in text  # in the table as well, also where reading the reasons found it
    assert ("not all reasons can be read" in text) == bool(failed)
    if failed:
        assert "is damaged" in printed(capsys, tmp_path / "s", "--map", tmp_path / "map.png", code=2)
    command = shlex.split(re.search(r"python -c (.*)$", text, re.MULTILINE)[1])
    subprocess.run([sys.executable, "-c", *command], check=True, capture_output=True)
    assert "Damaged" not in printed(capsys, tmp_path / "s")
    assert (store.path / "damaged" / path.name).is_file()


def test_the_map_is_of_the_level_with_most_failures(tmp_path, capsys, monkeypatch):
    from mlsbi import plots

    drawn = []
    draw = plots.failures
    monkeypatch.setattr(plots, "failures", lambda *args, **options: drawn.append((args, options)) or draw(*args,
                                                                                                       **options))
    new(tmp_path / "s", (LOW, make(LOW, 200, [5])), (HIGH, make(HIGH, 30, [1, 4])))
    text = printed(capsys, tmp_path / "s", "--map", tmp_path / "map.png")
    assert f"Map of the failures of 'high': {tmp_path / 'map.png'}" in text
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    [((theta, failed), options)] = drawn
    assert np.flatnonzero(failed).tolist() == [1, 4]
    assert theta.shape == (30, 2)
    assert options["names"] == ("mu", "tau")


def test_the_map_of_a_run_has_the_rows_of_its_rounds(tmp_path, capsys, monkeypatch):
    """The first round's are in the run's store, where nothing failed here."""
    new(tmp_path / "run/store", (HIGH, make(HIGH, 10)))
    new(tmp_path / "run/rounds/observation-1/round-2/store", (HIGH, make(HIGH, 6, [2], start=10)),
        (HIGH, make(HIGH, 4, [17], start=16)))
    drawn = []
    monkeypatch.setattr("mlsbi.plots.failures", lambda theta, failed, **named: drawn.append((theta, failed))
                        or matplotlib.figure.Figure())
    printed(capsys, tmp_path / "run", "--map", tmp_path / "map.png")
    (theta, failed), = drawn
    assert theta[:, 0] == pytest.approx(np.arange(20) / 100)
    assert np.flatnonzero(failed).tolist() == [17]


@pytest.mark.parametrize(("failed", "name", "match"), [
    ([], "map.png", "Expected failed rows to draw a map of"), ([1], "map.tpng", "tpng"),
    ([1], "nowhere/map.png", "No such file"),
])  # fmt: skip
def test_maps_that_cannot_be_drawn(tmp_path, capsys, failed, name, match):
    new(tmp_path / "s", (LOW, make(LOW, 20, failed)))
    assert match in printed(capsys, tmp_path / "s", "--map", tmp_path / name, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_folders_that_are_neither(tmp_path, capsys):
    assert "neither a store of simulations" in printed(capsys, tmp_path / "nowhere", code=2)
    assert "neither a store of simulations" in printed(capsys, tmp_path, code=2)
    (tmp_path / "store").mkdir()
    assert "is no store of simulations" in printed(capsys, tmp_path, code=2)
    (tmp_path / "request.json").write_text("{")
    (tmp_path / "store").rmdir()
    assert "is not JSON" in printed(capsys, tmp_path, code=2)
    (tmp_path / "request.json").write_text("[]")
    assert "Expected a JSON object" in printed(capsys, tmp_path, code=2)


def make_run(folder, *, results=None, done=()):
    asked = {"task": "my file.py:stack", "strategies": ["multilevel", "high", "low"], "n": [50, 9], "budget": None,
             "seed": 3, "options": {"parameters": 4}, "estimator": "npe"}
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps(asked))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    for name in done:
        (folder / name).mkdir()
        (folder / name / KEPT).write_text("{}")
    return folder


def test_a_run_that_left_no_results_is_told_from_its_request(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    new(folder / "store", (LOW, make(LOW, 20, [2])))
    text = printed(capsys, folder)
    assert str(open_store(folder / "store")) in text
    line = re.search(r"Unfinished run: (.*)", text)[1]
    assert shlex.split(line) == [
        "mlsbi", "run", "my file.py:stack", "--estimator", "npe", "--strategy", "multilevel,high,low", "--n", "50,9",
        "--seed", "3", "--option", "parameters=4", "--out", str(folder),
    ]  # fmt: skip
    assert "still to be trained: multilevel, high, low" in text
    assert "the same command goes on" in text
    assert "trained and checked" not in text


def test_a_run_that_stopped_between_strategies(tmp_path, capsys):
    results = {"command": "mlsbi run it", "complete": False,
               "strategies": [{"name": "multilevel", "error": None}, {"name": "high", "error": "diverged"}]}
    text = printed(capsys, make_run(tmp_path / "run", results=results, done=["multilevel"]))
    assert "Unfinished run: mlsbi run it" in text
    assert "trained and checked: multilevel\n" in text
    assert "failed to train: high\n" in text
    assert "still to be trained: low\n" in text


def test_a_finished_run_needs_nothing(tmp_path, capsys):
    results = {"command": "mlsbi run it", "complete": True, "strategies": [{"name": "multilevel", "error": None}]}
    folder = make_run(tmp_path / "run", results=results, done=["multilevel", "high", "low"])
    new(folder / "store", (LOW, make(LOW, 20, [2])))
    text = printed(capsys, folder)
    assert "Finished run: mlsbi run it" in text
    assert "trained and checked: multilevel, high, low\n" in text
    assert "1 of 20 rows (5.0%) of level 'low'" in text
    for unsaid in ("still to be", "goes on", "--on-failure"):
        assert unsaid not in text


def test_a_run_from_its_first_failure_to_its_report(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(STACK)
    out = tmp_path / "out"
    command = ["run", f"{tmp_path}/mine.py:stack", "--n", "60,40", "--tests", "8", "--draws", "20", "--ensemble", "1",
               "--seed", "1", "--quiet", "--out", str(out)]
    assert main(command) == 2
    capsys.readouterr()
    text = printed(capsys, out, "--map", tmp_path / "map.png")
    assert "x exception: Level 'high': RuntimeError: no convergence at" in text
    told = shlex.split(re.search(r"Unfinished run: (.*)", text)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about rows that are left out
        assert main([*told[1:], "--quiet", "--on-failure", "drop"]) == 0  # the command it tells goes on
    assert "Going on with the run" in capsys.readouterr().out
    assert "Finished run" in status.describe(out)
    results = json.loads((out / "results.json").read_text())
    lost = results["spent"]["failures"][1]
    assert lost == sum(row > 0.7 for row in read_theta(out)) > 0
    assert results["asked"]["on_failure"] == "drop"
    assert f"{lost} of 40 rows ({lost / 40:.1%}) of level 'high' failed and were left out" in results["verdict"][-1]
    page = (out / "report.html").read_text()
    assert (out / "figures" / "failures.png").is_file()
    assert "Rows that failed" in page
    assert "cannot be drawn" not in page


def read_theta(folder):
    """The first parameter of every row of the finest level's own pairs that was run."""
    store = open_store(folder / "store")
    return [row for records in store.read(Stream(1, 1, (0, 1)), failed=True) for row in records.theta[:, 0]]
