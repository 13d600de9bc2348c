import importlib.util
import json
import os
import pickle
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from mlsbi import BoxPrior, Level, LevelStack
from mlsbi.loading import load_stack
from mlsbi.simulation.fingerprint import compare_stacks, describe_stack

SOURCE = '''
import functools
from dataclasses import dataclass
import numpy as np
import torch
from mlsbi import BoxPrior, Level, LevelStack, command, per_sample

STEP = 0.5
CALLS = 0
CACHE = {}
UNUSED = 1

def square(x):
    """Squares."""
    return x * x  # a comment

def slope(theta, power=2.0):
    return square(theta) * STEP

def noise(n, generator):
    return {"u": torch.randn(n, 3, generator=generator), "v": torch.rand(n, generator=generator)}

def plain(theta, noise):
    """Does it."""
    global CALLS
    CALLS += 1
    CACHE[len(theta)] = CALLS
    return slope(theta)

def make(scale, names):
    seen = 0
    def simulate(theta, noise):
        nonlocal seen
        seen += 1
        return scale * theta + len(names)
    return simulate

def chain(theta, noise, *, order=3, table=np.arange(20.0)):
    return theta + order

class Base:
    def offset(self):
        return 1.5

@dataclass
class Object(Base):
    rate: float
    calls: int = 0
    def __call__(self, theta, noise):
        self.calls += 1
        return theta * self.rate + self.offset()
    def other(self, theta, noise):
        return theta

@torch.no_grad()
def wrapped(theta, noise):
    return theta + 11

@functools.lru_cache(maxsize=None)
def constant(n):
    return n + 12

@per_sample
def row(theta, seed):
    return theta * constant(13)

program = command(["prog", "--fast", "{a}", "{seed}"], parameters=["a"], env={"MODE": "exact"}, timeout=5)
stack = LevelStack(
    prior=BoxPrior([0.0, -1.0], [1.0, 1.0], names=["rate", "shift"]), noise=noise,
    levels=[Level("plain", plain, 1), Level("closure", make(21.0, ("p", "q")), 2),
            Level("partial", functools.partial(chain, order=22), 3), Level("object", Object(23.0), 4),
            Level("method", Object(24.0).other, 5), Level("wrapped", wrapped, 6), Level("row", row, 7),
            Level("program", program, 8),
            Level("first", lambda t, u: t + 31, 9), Level("second", lambda t, u: t + 32, 10),
            Level("builtin", torch.add, 11)],
)
'''


def described(folder, *changes):
    """The stack of `SOURCE` with texts replaced, through a file as a user's."""
    source = SOURCE
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / "model.py").write_text(source)
    return describe_stack(load_stack(f"{folder / 'model.py'}:stack"))


def simple(prior=None, noise="seed", simulate=torch.add):
    return describe_stack(LevelStack(prior or BoxPrior([0.0], [1.0]), noise, [Level("only", simulate)]))


def test_sources_are_found_where_the_module_is_gone(tmp_path):
    text = json.dumps(described(tmp_path))
    assert "source not available" not in text
    assert " at 0x" not in text


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ((" # a comment", " # another one"),),
        (('"""Squares."""', '"""Two\n    lines."""'), ('    """Does it."""\n', "")),
        (("return square(theta) * STEP", "return (square( theta )\n            * STEP)"),),
        (("STEP = 0.5", "# moved\n\nSTEP = 0.5"),),
        (("UNUSED = 1", "UNUSED = 2"), ("CALLS = 0", "CALLS = 3"), ("CACHE = {}", "CACHE = {1: 2}")),
        (("seen = 0", "seen = 1"),),
        (('"plain", plain, 1)', '"plain", plain, 0.5)'), ("timeout=5", "timeout=50")),
    ],
    ids=["none", "comment", "docstrings", "layout", "place", "state", "counter", "cost and time limit"],
)
def test_what_changes_no_output_changes_nothing(tmp_path, changes):
    assert compare_stacks(described(tmp_path), described(tmp_path, *changes)) == []


@pytest.mark.parametrize(
    ("change", "level", "removed", "added"),
    [
        (("CALLS += 1", "CALLS += 2"), "plain", "CALLS += 1", "CALLS += 2"),
        (("return x * x", "return x * x * x"), "plain", "return x * x", "x * x * x"),
        (("STEP = 0.5", "STEP = 0.25"), "plain", "STEP = 0.5", "STEP = 0.25"),
        (("power=2.0", "power=3.0"), "plain", "power=2.0", "power=3.0"),
        (("make(21.0", "make(21.5"), "closure", "scale = 21.0", "scale = 21.5"),
        (('("p", "q")', '("p", "r")'), "closure", "tuple('p', 'q')", "tuple('p', 'r')"),
        (("order=22", "order=23"), "partial", "order = 22", "order = 23"),
        (("np.arange(20.0)", "np.arange(20.0) ** 2"), "partial", "arange(20.0))", "arange(20.0) ** 2)"),
        (("Object(23.0)", "Object(23.5)"), "object", "rate = 23.0", "rate = 23.5"),
        (("Object(24.0)", "Object(24.5)"), "method", "rate = 24.0", "rate = 24.5"),
        (("Object(24.0).other", "Object(24.0).__call__"), "method", "method other", "method __call__"),
        (("theta + 11", "theta + 12"), "wrapped", "theta + 11", "theta + 12"),
        (("n + 12", "n + 13"), "row", "n + 12", "n + 13"),
        (("constant(13)", "constant(14)"), "row", "constant(13)", "constant(14)"),
        (("--fast", "--slow"), "program", "--fast", "--slow"),
        (('"MODE": "exact"', '"MODE": "rough"'), "program", "exact", "rough"),
        (("t + 31", "t + 33"), "first", "t + 31", "t + 33"),
        (("t + 32", "t + 33"), "second", "t + 32", "t + 33"),
        (("torch.add", "torch.sub"), "builtin", "builtin add", "builtin sub"),
    ],
    ids=str,
)
def test_a_change_of_code_is_told_once_with_both_versions(tmp_path, change, level, removed, added):
    (found,) = compare_stacks(described(tmp_path), described(tmp_path, change))
    assert found.startswith(f"level '{level}': its code changed:\n")
    lines = found.splitlines()
    assert any(line.startswith("-") and removed in line for line in lines)
    assert any(line.startswith("+") and added in line for line in lines)


def test_a_base_class_is_part_of_both_levels_that_use_it(tmp_path):
    found = compare_stacks(described(tmp_path), described(tmp_path, ("return 1.5", "return 2.5")))
    assert [text.split(":")[0] for text in found] == ["level 'object'", "level 'method'"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ([("[0.0, -1.0], [1.0, 1.0]", "[0.0, -1.0], [1.0, 2.0]")],
         "prior: stored `BoxPrior(rate in [0, 1], shift in [-1, 1])`, now `BoxPrior(rate in [0, 1], shift in [-1, 2"),
        ([('names=["rate", "shift"]', 'names=["rate", "move"]')], "prior: stored `BoxPrior(rate in [0, 1], shift"),
        ([('Level("builtin"', 'Level("sum"')], "levels: stored ['plain', "),
        ([("torch.randn(n, 3, ", "torch.randn(n, 4, ")], "noise: stored {\"noise['u']\": 'float32 (n, 3)', "),
        ([("torch.randn(n, 3, ", "2 * torch.randn(n, 3, ")], "noise: its draws changed, noise['u'] stored [1.54"),
        ([("torch.rand(n, generator=generator)}", "torch.rand(n, generator=generator) * 1}")],
         "noise: its code changed:\n"),
        ([("noise=noise,", 'noise="seed",')], "noise: stored {\"noise['u']\": 'float32 (n, 3)', \"noise['v']\": "
                                              "'float32 (n,)'}, now {'noise': 'int64 (n,)'}"),
    ],
    ids=["edge", "name", "level", "shape", "scale", "no draw", "seeds"],
)  # fmt: skip
def test_a_change_of_anything_else_is_told_once(tmp_path, changes, found):
    (text,) = compare_stacks(described(tmp_path), described(tmp_path, *changes))
    assert text.startswith(found)


def test_several_changes_are_all_told(tmp_path):
    changes = [("STEP = 0.5", "STEP = 1.0"), ("n + 12", "n + 13"), ("[1.0, 1.0]", "[1.0, 3.0]")]
    found = compare_stacks(described(tmp_path), described(tmp_path, *changes))
    assert [text.split(":")[0] for text in found] == ["prior", "level 'plain'", "level 'row'"]


def test_the_description_survives_json_and_other_processes(tmp_path):
    here = described(tmp_path)
    assert json.loads(json.dumps(here, allow_nan=False)) == here
    code = (
        "import json, sys; from mlsbi.loading import load_stack; from mlsbi.simulation.fingerprint import "
        "describe_stack; print(json.dumps(describe_stack(load_stack(sys.argv[1] + ':stack'))))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    there = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.py")], check=True, capture_output=True,
                           text=True, env=environment)  # fmt: skip
    assert json.loads(there.stdout) == here


def test_describing_again_after_running_changes_nothing(tmp_path):
    before = described(tmp_path)
    stack = load_stack(f"{tmp_path / 'model.py'}:stack")
    theta = torch.rand(5, 2)
    for level in stack.levels[:7]:
        for _ in range(50):  # often enough that Python specialises the code
            level.simulate(theta, torch.arange(5))
    assert compare_stacks(before, describe_stack(stack)) == []


def test_functions_that_travelled_by_value_are_the_same(tmp_path):
    before = described(tmp_path, ("@functools.lru_cache(maxsize=None)\n", ""))  # which cannot travel
    stack = pickle.loads(cloudpickle.dumps(load_stack(f"{tmp_path / 'model.py'}:stack")))
    assert compare_stacks(before, describe_stack(stack)) == []


def test_the_global_random_state_is_left_alone(tmp_path):
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    described(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # noqa: NPY002


def test_a_file_that_changed_since_it_was_loaded_is_not_taken_for_its_source(tmp_path):
    described(tmp_path)
    stack = load_stack(f"{tmp_path / 'model.py'}:stack")
    (tmp_path / "model.py").write_text(SOURCE.replace("theta + 11", "theta + 12"))
    code = {level["name"]: level["code"] for level in describe_stack(stack)["levels"]}
    assert "source not available" in code["wrapped"]
    assert "theta + 12" not in code["wrapped"]


def test_code_without_a_source_is_told_by_what_it_does():
    def typed(text):
        space = {}
        exec(text, space)
        return simple(simulate=space["f"])

    text = "def f(theta, noise):\n    return theta * 2 if str(theta) in {'a', 'b'} else theta"
    assert "source not available: f, bytecode" in typed(text)["levels"][0]["code"]
    assert compare_stacks(typed(text), typed(text.replace("return", "return  "))) == []
    assert len(compare_stacks(typed(text), typed(text.replace("* 2", "* 3")))) == 1
    assert len(compare_stacks(typed(text), typed(text.replace("'b'", "'c'")))) == 1


# fmt: off
LAMBDAS = [lambda t, u: t + 1, lambda t, u: t + 2, lambda t, u: (lambda v: v + 3)(t), lambda t, u: t if 1 in t else u]
# fmt: on


def test_lambdas_of_one_line_are_told_apart():
    code = [simple(simulate=function)["levels"][0]["code"] for function in LAMBDAS]
    assert len(set(code)) == 4
    if sys.version_info >= (3, 11):
        assert code == ["lambda t, u: t + 1", "lambda t, u: t + 2", "lambda t, u: (lambda v: v + 3)(t)",
                        "lambda t, u: t if 1 in t else u"]  # fmt: skip


def rescaled(theta, noise):
    return HELPER(theta)


def double(theta):
    return 2 * theta


HELPER = np.vectorize(double)


def test_what_libraries_wrap_is_seen_and_libraries_are_not():
    code = simple(simulate=rescaled)["levels"][0]["code"]
    assert "return 2 * theta" in code
    assert "vectorize of" in code
    assert "numpy" not in code
    assert simple(simulate=torch.nn.functional.relu)["levels"][0]["code"] == "torch.relu"


def test_an_emulator_is_told_by_its_weights():
    def net(bias, last):
        layer = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(layer.weight, 1.0)
        torch.nn.init.constant_(layer.bias, bias)
        return simple(simulate=torch.nn.Sequential(layer, last))

    base = net(0.5, torch.nn.ReLU())
    assert compare_stacks(base, net(0.5, torch.nn.ReLU())) == []
    assert len(compare_stacks(base, net(0.6, torch.nn.ReLU()))) == 1
    assert len(compare_stacks(base, net(0.5, torch.nn.Tanh()))) == 1


PRIORS = [
    lambda scale: Independent(Normal(torch.zeros(2), scale * torch.ones(2)), 1),
    lambda scale: MultivariateNormal(torch.zeros(2), scale * torch.eye(2)),
]


@pytest.mark.parametrize("make", PRIORS, ids=["independent", "correlated"])
def test_priors_are_compared_by_their_draws(make):
    assert compare_stacks(simple(make(1.0)), simple(make(1.0))) == []
    (found,) = compare_stacks(simple(make(1.0)), simple(make(1.001)))
    assert found.startswith("prior: ")


def test_draws_may_differ_by_rounding_only():
    base = simple(PRIORS[0](1.0), lambda n, generator: torch.randn(n, 3, generator=generator))

    def scaled(part, factor):
        copy = json.loads(json.dumps(base))
        draws = copy["prior"]["draws"] if part == "prior" else copy["noise"]["leaves"]["noise"]
        name = "theta_1" if part == "prior" else "draws"
        draws[name] = [value * factor for value in draws[name]]
        return copy

    for part in ("prior", "noise"):
        assert compare_stacks(base, scaled(part, 1 + 2e-5)) == []
        (found,) = compare_stacks(base, scaled(part, 1 + 5e-4))
        assert found.startswith(f"{part}: its draws changed, ")
        assert "stored [" in found
        assert "now [" in found


def test_noise_that_is_not_finite_can_be_kept():
    def odd(n, generator):
        return torch.full((n, 2), float("nan")), torch.randn(n, generator=generator) > 0

    found = simple(noise=odd)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert compare_stacks(found, simple(noise=odd)) == []


def test_other_formats_are_not_compared():
    base = simple()
    (found,) = compare_stacks({**base, "format": 0}, base)
    assert "different versions of mlsbi" in found


def test_things_that_refer_to_themselves_end():
    class Loop:
        def __init__(self):
            self.me, self.call = self, self.__call__

        def __call__(self, theta, noise):
            return recursive(theta, noise)

    def recursive(theta, noise):
        return theta if len(theta) < 2 else recursive(theta[1:], noise)

    assert compare_stacks(simple(simulate=Loop()), simple(simulate=Loop())) == []
    assert "theta[1:]" in simple(simulate=recursive)["levels"][0]["code"]


def test_helpers_in_a_module_of_ones_own_count(tmp_path):
    def with_helper(factor):
        (tmp_path / "helper_of_model.py").write_text(f"def step(x):\n    return {factor} * x\n")
        spec = importlib.util.spec_from_file_location("helper_of_model", tmp_path / "helper_of_model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        space = {"helper": module}
        (tmp_path / "user.py").write_text("def f(theta, noise):\n    return helper.step(theta)\n")
        exec(compile((tmp_path / "user.py").read_text(), str(tmp_path / "user.py"), "exec"), space)
        return simple(simulate=space["f"])

    assert compare_stacks(with_helper(10), with_helper(10)) == []
    assert "return 200 * x" in compare_stacks(with_helper(10), with_helper(200))[0]
