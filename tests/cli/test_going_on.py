import os
import signal
import subprocess
import sys
import time

import pytest

import mlsbi
from mlsbi.cli.main import main
from mlsbi.report.html import read_results
from mlsbi.strategies.multilevel import Multilevel
from mlsbi.strategies.single_level import SingleLevel
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.loop import _Run

pytestmark = pytest.mark.usefixtures("rough_figures")

STACK = """
import os, time, torch
from pathlib import Path
from mlsbi import BoxPrior, Level, LevelStack, per_sample

def noise(n, generator):
    return torch.randn(n, 2, generator=generator)

def note(level):
    with open(Path(os.environ["MLSBI_TEST_FOLDER"]) / "runs.log", "a") as file:
        file.write(level)

@per_sample
def low(theta, noise):
    note("l")
    return theta[:1] + 0.1 * noise

@per_sample
def high(theta, noise):
    note("h")
    time.sleep(float(os.environ.get("MLSBI_TEST_SECONDS", 0)))
    stop = Path(os.environ["MLSBI_TEST_FOLDER"]) / "stop"
    if stop.exists() and stop.stat().st_size < 20:
        with open(stop, "a") as file:
            file.write(".")
    elif stop.exists():
        raise KeyboardInterrupt
    return theta[:1] + 0.1 * noise + 0.01

stack = LevelStack(BoxPrior([0.0], [1.0], names=["a"]), noise, [Level("low", low, 1), Level("high", high, 9)])
"""
QUICK = ["--n", "60,40", "--tests", "10", "--draws", "50", "--ensemble", "1", "--quiet"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(STACK)
    monkeypatch.setenv("MLSBI_TEST_FOLDER", str(tmp_path))
    return tmp_path


def call(folder, *more, out="out"):
    return main(["run", f"{folder}/mine.py:stack", "--out", str(folder / out), *QUICK, *more])


def simulations(folder):
    log = folder / "runs.log"
    return log.read_text() if log.exists() else ""


def without_time(results):
    record = results["strategies"][0]
    return record["checks"], record["posterior"], results["spent"]["n"], results["spent"]["runs"]


def test_ctrl_c_and_the_same_command_again(folder, capsys, monkeypatch):
    monkeypatch.setenv("MLSBI_TEST_SECONDS", "0.06")
    assert call(folder, out="undisturbed") == 0
    whole = len(simulations(folder))
    (folder / "runs.log").unlink()
    (folder / "stop").touch()
    assert call(folder) == 130
    assert "the same command goes on where it was" in capsys.readouterr().err
    assert simulations(folder).count("h") == 21
    (folder / "stop").unlink()
    assert call(folder) == 0
    assert "Going on with the run in" in capsys.readouterr().out
    assert len(simulations(folder)) == whole + 2  # the pair that was under way
    assert without_time(read_results(folder / "out")) == without_time(read_results(folder / "undisturbed"))


def test_a_killed_run_goes_on(folder, monkeypatch):
    command = [sys.executable, "-m", "mlsbi.cli.main", "run", f"{folder}/mine.py:stack", "--out", str(folder / "out"),
               *QUICK]
    process = subprocess.Popen(command, env={**os.environ, "MLSBI_TEST_SECONDS": "0.1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if simulations(folder).count("h") >= 9:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(mlsbi.open_store(folder / "out" / "store").data().levels[1])
    assert 8 <= kept < 40
    (folder / "runs.log").unlink()
    assert call(folder) == 0
    assert simulations(folder).count("h") == 40 - kept + 10  # and the tests
    assert call(folder, out="undisturbed") == 0
    assert without_time(read_results(folder / "out")) == without_time(read_results(folder / "undisturbed"))


@pytest.mark.slow
def test_finished_strategies_are_not_trained_again(folder, monkeypatch, capsys):
    def crash(self, *args, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SingleLevel, "fit", crash)
        assert call(folder, "--strategy", "multilevel,high") == 130
    assert read_results(folder / "out")["complete"] is False
    before = read_results(folder / "out")["strategies"][0]
    done = simulations(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Multilevel, "fit", crash)
        assert call(folder, "--strategy", "multilevel,high") == 0
    assert simulations(folder) == done
    assert "trained and checked before" in capsys.readouterr().out
    results = read_results(folder / "out")
    assert results["complete"] is True
    assert results["strategies"][0] == before
    assert results["comparison"]["best"] in ("multilevel", "high")
    before = (folder / "out" / "results.json").read_bytes()
    assert call(folder, "--strategy", "multilevel,high") == 0  # a batch job that is queued again
    assert "This run is finished" in capsys.readouterr().out
    assert (folder / "out" / "results.json").read_bytes() == before


def test_another_request_does_not_go_on(folder, capsys):
    (folder / "stop").touch()
    assert call(folder) == 130
    (folder / "stop").unlink()
    assert call(folder, "--seed", "5", "--draws", "60") == 2
    told = capsys.readouterr().err
    assert "seed: 0, now 5" in told
    assert "draws: 50, now 60" in told
    kept = len(mlsbi.open_store(folder / "out" / "store").data().levels[1])
    done = simulations(folder)
    assert call(folder, "--draws", "60", "--overwrite") == 0  # the simulations are used again
    assert simulations(folder).count("h") - done.count("h") == 40 - kept + 10


@pytest.mark.slow
def test_simulations_of_another_stack_are_moved_aside_when_overwriting(folder, capsys):
    assert call(folder) == 0
    (folder / "mine.py").write_text(STACK.replace("+ 0.01", "+ 0.02"))
    (folder / "out" / "results.json").unlink()
    assert call(folder) == 2
    assert "level 'high': its code changed" in capsys.readouterr().err
    assert call(folder, "--overwrite") == 0
    assert len(mlsbi.open_store(folder / "out" / "store-1").data().levels[1]) == 40
    assert "are in" in capsys.readouterr().out


@pytest.mark.slow
def test_a_plan_and_its_run_share_their_pilot(folder):
    arguments = [f"{folder}/mine.py:stack", "--budget", "600", "--pilot", "12", "--quiet", "--out",
                 str(folder / "out")]
    assert main(["plan", *arguments]) == 0
    planned = simulations(folder)
    assert planned.count("h") == 12
    assert main(["run", *arguments, "--tests", "0", "--draws", "50", "--ensemble", "1"]) == 0
    results = read_results(folder / "out")
    assert results["pilot"]["n"] == 12
    assert simulations(folder).count("h") == results["spent"]["n"][1] + 1  # and the observation


@pytest.mark.slow
def test_a_mended_simulator_goes_on_with_what_is_there(folder, capsys):
    failing = STACK.replace("theta[:1] + 0.1 * noise + 0.01", "theta[:1] + 0.1 * noise if theta[0] < 0.9 else 1 // 0")
    (folder / "mine.py").write_text(failing)
    assert call(folder) == 2
    assert "--accept-code" in capsys.readouterr().err
    kept = len(mlsbi.open_store(folder / "out" / "store").data().levels[1])
    (folder / "mine.py").write_text(STACK)
    assert call(folder, "--retry-failed") == 2
    assert "its code changed" in capsys.readouterr().err
    done = simulations(folder).count("h")
    assert call(folder, "--retry-failed", "--accept-code") == 0
    assert simulations(folder).count("h") - done == 40 - kept + 10
    assert read_results(folder / "out")["spent"]["failures"] == [0, 0]


@pytest.mark.slow
def test_a_store_in_use_is_neither_moved_nor_cleared(folder, capsys):
    assert call(folder) == 0
    before = (folder / "out" / "results.json").read_bytes()
    with mlsbi.open_store(folder / "out" / "store").writing():
        assert call(folder, "--overwrite") == 2
        (folder / "mine.py").write_text(STACK.replace("+ 0.01", "+ 0.02"))
        assert call(folder, "--overwrite") == 2
    assert "writ" in capsys.readouterr().err
    assert (folder / "out" / "results.json").read_bytes() == before
    assert not (folder / "out" / "store-1").exists()


@pytest.mark.slow
def test_damage_is_named_before_anything_is_removed(folder, capsys):
    assert call(folder) == 0
    before = (folder / "out" / "results.json").read_bytes()
    shard = max((folder / "out" / "store" / "rows").glob("*.npz"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-50])
    assert call(folder, "--overwrite") == 2
    assert shard.name in capsys.readouterr().err
    assert (folder / "out" / "results.json").read_bytes() == before
    (folder / "out" / "request.json").write_text("{")
    (folder / "out" / "results.json").unlink()
    assert call(folder) == 2
    assert "request.json is damaged" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told(folder, capsys):
    (folder / "file").touch()
    assert call(folder, out="file/x") == 2
    assert "file/x" in capsys.readouterr().err


@pytest.mark.filterwarnings("default:Replaced rows", "default:Left out rows")
def test_the_failures_of_a_run_are_the_user_s_to_judge(folder, capsys):
    failing = STACK.replace("theta[:1] + 0.1 * noise + 0.01", "theta[:1] + 0.1 * noise if theta[0] < 0.9 else 1 // 0")
    (folder / "mine.py").write_text(failing)
    assert call(folder) == 2
    told = capsys.readouterr().err
    assert "of 'high' failed. Row " in told
    assert "ZeroDivisionError" in told
    done = simulations(folder).count("h")
    assert call(folder, "--on-failure", "redraw") == 0
    results = read_results(folder / "out")
    assert results["spent"]["n"] == [60, 40]
    assert results["spent"]["failures"][1] > 0
    assert "mlsbi: warning: Replaced rows that failed" in capsys.readouterr().err
    store = mlsbi.open_store(folder / "out" / "store")
    assert set(store.failures()["status"]) == {"exception"}
    assert len(store.done(store.streams[1])) == results["spent"]["runs"][1]
    assert done < simulations(folder).count("h")


@pytest.mark.slow
def test_training_goes_on_where_it_was_interrupted(folder, monkeypatch, capsys):
    assert call(folder, out="undisturbed") == 0
    monkeypatch.setattr(Checkpoint, "due", True)  # a version after every epoch
    epoch, done = _Run._train_epoch, []

    def interrupted(self):
        if len(done) == 12:
            raise KeyboardInterrupt
        done.append(self.epoch)
        return epoch(self)

    monkeypatch.setattr(_Run, "_train_epoch", interrupted)
    assert call(folder) == 130
    assert (folder / "out" / "multilevel" / "training").is_dir()
    monkeypatch.setattr(_Run, "_train_epoch", lambda self: done.append(self.epoch) or epoch(self))
    assert call(folder) == 0
    assert done[11:13] == [11, 12]  # none of the twelve epochs is trained again
    first, again = (read_results(folder / name) for name in ("undisturbed", "out"))
    assert without_time(again) == without_time(first)
    assert not (folder / "out" / "multilevel" / "training").exists()  # the model is saved
