import json
import os
import pickle
import subprocess
import sys
import time

import cloudpickle
import numpy as np
import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack, simulate
from mlsbi.simulation.adapters import RowSimulator
from mlsbi.simulation.programs import CommandError, command

THETA = torch.tensor([[0.1, 2.0], [0.3, -1.5]])
SEEDS = torch.tensor([5, 2**62 + 1])
ROW = THETA[0].numpy()


def python(code, *arguments, parameters=("a", "_b"), **options):
    """A program that is a few lines of Python; they see their arguments as `args`."""
    code = "import sys, os, json, time; args = sys.argv[1:]\n" + code
    program = [sys.executable, "-S", "-c", code.replace("{", "{{").replace("}", "}}")]
    return command([*program, *arguments], parameters=parameters, **options)


def numpy_program(expression, **options):
    code = f"import sys, numpy as np; np.save(sys.argv[1], {expression})"
    return command([sys.executable, "-c", code, "{output}"], parameters=["_a", "_b"], **options)


@pytest.mark.parametrize("package", [pickle, cloudpickle])
def test_programs_can_be_pickled(package):
    program = python("print(args[0])", "{a}", env={"A": "b"}, timeout=60)
    assert package.loads(package.dumps(program)) == program
    assert isinstance(program, RowSimulator)


def test_a_campaign_of_programs():
    prior = BoxPrior([0.0, 0.0], [1.0, 1.0])
    low = python("print(args[0], int(args[1]) % 7)", "{a}", "{seed}")
    high = python("print(float(args[0]) + 1, int(args[1]) % 7)", "{a}", "{seed}")
    data = simulate(LevelStack(prior, "seed", [Level("low", low, 1), Level("high", high, 9)]), (3, 2), seed=1,
                    progress=False)  # fmt: skip
    assert torch.allclose(data.levels[0].fine[:, 0].double(), data.levels[0].theta[:, 0].double(), atol=1e-6)
    assert torch.allclose(data.levels[1].fine[:, 0], data.levels[1].coarse[:, 0] + 1)
    assert torch.equal(data.levels[1].fine[:, 1], data.levels[1].coarse[:, 1])


# What goes in


def test_values_reach_the_program_in_full():
    code = "print(float(args[0]).hex(), args[1:], sep='|', file=open(args[3], 'w'))"
    program = python(code, "{a}", "{_b:.3g}", "x{seed}", "{output}", output=".dat", read=keep_text)
    program.run_row(np.array([0.1 + 0.2, 1 / 3]), 2**62 + 1)
    value, rest = READ.pop().split("|")
    assert float.fromhex(value) == 0.1 + 0.2
    assert rest.startswith(f"['0.333', 'x{2**62 + 1}'")


READ = []


def keep_text(path):
    READ.append(path.read_text())
    return 1.0


@pytest.mark.parametrize("text", ["$(touch made)", "; touch made", "`touch made`", "a b*", "> made", "{{a}}"])
def test_no_shell_reads_the_arguments(text, tmp_path):
    program = python("print(len(args)); open('said', 'w').write(args[0])", text, "{a}", cwd=tmp_path)
    assert program.run_row(ROW, 1).tolist() == [2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["said"]
    assert (tmp_path / "said").read_text() == text.replace("{{", "{").replace("}}", "}")


def test_the_input_file_holds_parameters_and_seed():
    code = "d = json.load(open(args[0])); print(*d['parameters'].values(), int(d['seed'] == 2**62 + 1))"
    assert python(code, "{input}").run_row(ROW, 2**62 + 1).tolist() == [float(ROW[0]), 2.0, 1.0]
    noise = {"u": np.array([1.0, 2.0])}
    assert python("print(*json.load(open(args[0]))['noise']['u'])", "{input}").run_row(ROW, noise).tolist() == [1, 2]


def test_a_program_runs_in_a_fresh_directory_with_the_environment(tmp_path):
    code = "print(len(os.listdir()), int(os.environ['ADDED']), int('PATH' in os.environ)); open('left', 'w')"
    program = python(code, "{a}", env={"ADDED": "7"})
    rows = program(THETA, SEEDS)
    assert rows.tolist() == [[2.0, 7.0, 1.0]] * 2  # what it prints goes to two files there
    assert "ADDED" not in os.environ
    (tmp_path / "table.txt").write_text("4 5")
    assert python("print(open('table.txt').read())", "{a}", cwd=tmp_path).run_row(ROW, 1).tolist() == [4.0, 5.0]


# What comes out


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("np.arange(3)", np.arange(3)),
        ("np.ones((2, 3), np.float32)", np.ones((2, 3), np.float32)),
        ("np.array([np.nan, np.inf])", np.array([np.nan, np.inf])),
        ("7", np.array([7])),
    ],
)
def test_arrays_come_back_as_they_are(expression, expected):
    x = numpy_program(expression).run_row(ROW, 1)
    assert x.dtype == expected.dtype
    assert np.array_equal(x, expected, equal_nan=x.dtype.kind == "f")


@pytest.mark.parametrize(
    ("suffix", "text", "expected"),
    [
        (".csv", "1,2\n3,nan", [[1, 2], [3, np.nan]]),
        (".csv", "# x\n4\n5", [4, 5]),
        (".txt", "1 2 3\n", [1, 2, 3]),
        (".txt", "# k, P(k)\n1 2\n3 4  # last", [[1, 2], [3, 4]]),
        (".json", "[[1, 2], [3, 4.5]]", [[1, 2], [3, 4.5]]),
        (".json", "[1, NaN]", [1, np.nan]),
        (".json", "3", [3]),
        (None, "1 2\n3 4", [[1, 2], [3, 4]]),
        (None, "1,2", [1, 2]),
        (None, "nan", [np.nan]),
    ],
)
def test_tables_and_printed_numbers(suffix, text, expected):
    if suffix is None:
        program = python(f"print({text!r})", "{a}")
    else:
        program = python(f"open(args[0], 'w').write({text!r})", "{output}", "{a}", output=suffix)
    x = program.run_row(ROW, 1)
    assert x.dtype == np.float64
    assert np.array_equal(x, np.array(expected, float), equal_nan=True)


def test_a_reader_of_ones_own():
    program = python("open('run.log', 'w').write('chi2 = 4.5')", "{a}", read=lambda path: float(
        (path / "run.log").read_text().split("=")[1]))  # fmt: skip
    assert program.run_row(ROW, 1).tolist() == [4.5]


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".csv", "1,,2"), (".csv", "a,b\n1,2"), (".txt", "1 2\n3"), (".txt", ""), (".json", "[1, null]"),
        (".json", '{"a": 1}'), (".json", '["1"]'), (".json", "[[1], [1, 2]]"), (".npy", "text"), (".npy", ""),
    ],
)  # fmt: skip
def test_results_that_cannot_be_read(suffix, text):
    program = python(f"open(args[0], 'w').write({text!r})", "{output}", "{a}", output=suffix)
    with pytest.raises(CommandError, match="numbers that can be read"):
        program.run_row(ROW, 1)


def test_an_array_of_objects_is_never_unpickled():
    with pytest.raises(CommandError, match="Object arrays cannot be loaded"):
        numpy_program("np.array([None], dtype=object)").run_row(ROW, 1)


# What goes wrong


def test_an_exit_code_comes_with_the_end_of_the_error_output():
    program = python("sys.stderr.write('y' * 300000 + 'the cause'); print('x' * 300000); sys.exit(3)", "{a}")
    with pytest.raises(CommandError, match="exit code 3") as caught:
        program.run_row(ROW, 1)
    error = pickle.loads(pickle.dumps(caught.value))
    for each in (caught.value, error):
        assert each.exit_code == 3
        assert len(each.stderr) == 2000
        assert each.stderr.endswith("the cause")
        assert each.arguments[0] == sys.executable
        assert "the cause" in str(each)
        assert len(str(each)) < 2500


def test_a_program_that_complains_on_standard_output_is_quoted():
    with pytest.raises(CommandError, match="standard output ends with:\nno licence"):
        python("print('no licence'); sys.exit(1)", "{a}").run_row(ROW, 1)


def test_a_signal_is_named():
    with pytest.raises(CommandError, match="killed by SIGSEGV") as caught:
        python("import signal; os.kill(os.getpid(), signal.SIGSEGV)", "{a}").run_row(ROW, 1)
    assert caught.value.exit_code == -11


def test_much_output_does_not_block_a_program_that_succeeds():
    code = "sys.stderr.write('y' * 10**6); sys.stdout.write('x' * 10**6); json.dump([1], open(args[0], 'w'))"
    assert python(code, "{output}", "{a}", output=".json", timeout=60).run_row(ROW, 1).tolist() == [1.0]


def test_a_missing_result():
    with pytest.raises(CommandError, match=r"(?s)write its result to \{output\}.*disk is full") as caught:
        python("sys.stderr.write('disk is full')", "{output}", "{a}").run_row(ROW, 1)
    assert caught.value.exit_code == 0
    with pytest.raises(CommandError, match="standard output to be numbers.*no numbers"):
        python("pass", "{a}").run_row(ROW, 1)
    with pytest.raises(FileNotFoundError, match="'no-such-program'.*Check PATH"):
        command(["no-such-program", "{a}"], parameters=["a"]).run_row(ROW[:1], 1)
    with pytest.raises(FileNotFoundError, match="cwd='nowhere' to be a directory"):
        python("pass", "{a}", cwd="nowhere").run_row(ROW, 1)


GRANDCHILD = """
import subprocess
sys.stderr.write('stuck'); sys.stderr.flush()
child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])
with open(args[0] + '.tmp', 'w') as file: file.write(str(child.pid))
os.rename(args[0] + '.tmp', args[0])
"""


def alive(pid):
    try:
        os.kill(pid, 0)
        if not os.path.isdir("/proc/self"):
            return True
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_time_limit_ends_the_program_and_what_it_started(tmp_path):
    pid_file = tmp_path / "pid"
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"(?s)within 3 s.*stuck"):
        python(GRANDCHILD + "time.sleep(60)", str(pid_file), "{a}", timeout=3).run_row(ROW, 1)
    assert time.monotonic() - start < 30
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_a_grandchild_would_outlive_a_program_that_ends_by_itself(tmp_path):
    pid_file = tmp_path / "pid"
    python(GRANDCHILD + "print(1)", str(pid_file), "{a}", timeout=60).run_row(ROW, 1)
    pid = int(pid_file.read_text())
    assert alive(pid)
    os.kill(pid, 9)


def test_an_interrupt_ends_the_program(tmp_path, monkeypatch):
    pid_file = tmp_path / "pid"

    def interrupted(self, timeout=None):
        if self.returncode is None and timeout == 59:
            while not pid_file.exists():
                time.sleep(0.02)
            raise KeyboardInterrupt
        return wait(self, timeout)

    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        python(GRANDCHILD + "time.sleep(60)", str(pid_file), "{a}", timeout=59, keep=tmp_path / "kept").run_row(ROW, 1)
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)
    assert list((tmp_path / "kept").iterdir()) == []


def test_directories_are_removed_unless_a_failed_one_is_to_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    code = "open('left', 'w').write('here'); print(1); sys.exit(float(args[0]) < 0)"
    good, bad = np.array([1.0, 0.0]), np.array([-1.0, 0.0])
    python(code, "{a}").run_row(good, 1)
    with pytest.raises(CommandError):
        python(code, "{a}").run_row(bad, 1)
    assert list((tmp_path / "temporary").iterdir()) == []
    kept = python(code, "{a}", "{input}", keep=tmp_path / "kept")
    kept.run_row(good, 1)
    assert list((tmp_path / "kept").iterdir()) == []
    with pytest.raises(CommandError, match="files are kept in") as caught:
        kept.run_row(bad, 1)
    (folder,) = (tmp_path / "kept").iterdir()
    assert str(folder) in str(caught.value)
    assert (folder / "left").read_text() == "here"
    assert json.loads((folder / "input.json").read_text()) == {"parameters": {"a": -1.0, "_b": 0.0}, "seed": 1}


def test_rows_that_do_not_fit_the_template():
    with pytest.raises(TypeError, match='noise="seed"'):
        python("pass", "{a}", "{seed}").run_row(ROW, np.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(2,\).*got \(1,\)"):
        python("pass", "{a}").run_row(ROW[:1], 1)


@pytest.mark.parametrize(
    ("template", "options", "error", "match"),
    [
        ("prog {a}", {}, TypeError, "as a list"),
        (["prog", "{a}"], {"parameters": "a"}, TypeError, "list of parameter names"),
        ([], {}, ValueError, "a program and its arguments"),
        (["prog", 3], {}, ValueError, "all texts"),
        (["prog", "{a}", "{other}"], {}, ValueError, r"\['a', 'seed', 'input', 'output'\].*got \['other'\]"),
        (["prog", "{a}", "{}"], {}, ValueError, "Expected fields out of"),
        (["prog", "{a}", "}"], {}, ValueError, r"literally: \{\{ \}\}"),
        (["prog", "{a:q}"], {}, ValueError, "formats that suit"),
        (["prog", "{seed}"], {}, ValueError, r"\['a'\] are not"),
        (["prog", "{a}"], {"parameters": ["a", "a"]}, ValueError, "different parameter names"),
        (["prog", "{seed}"], {"parameters": ["seed"]}, ValueError, "none of"),
        (["prog", "{a}", "{output}"], {"output": ".h5"}, ValueError, "or read="),
        (["prog", "{a}", "{output}"], {"output": "npy"}, ValueError, "a suffix"),
        (["prog", "{a}"], {"timeout": 0}, ValueError, "positive number of seconds"),
    ],
)
def test_bad_templates(template, options, error, match):
    with pytest.raises(error, match=match):
        command(template, **{"parameters": ["a"], **options})


def test_templates_that_are_fine(tmp_path):
    command(["prog", "{input}"], parameters=["a", "b"])
    command(["prog"], parameters=["_ignored"])
    command(["prog", "{a.b}"], parameters=["a.b"])
    assert command([tmp_path / "odd{name}", "{a}"], parameters=["a"]).template[0].endswith("odd{{name}}")
