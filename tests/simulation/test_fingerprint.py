import importlib.util
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
from torch.distributions import Independent, MultivariateNormal, Normal

from mlsbi import BoxPrior, Level, LevelStack, command
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


VALUES = '''
import types
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from fractions import Fraction
import numpy as np
import torch
from mlsbi import BoxPrior, Level, LevelStack

@dataclass
class Options:
    order: int
    parts: list = field(default_factory=lambda: [4.0, 5.0])

class Model:
    shared = {"s": 6.0}
    def __init__(self, a):
        self.c = {"a": a, "deep": [{"b": 7.0}]}
        self.rows = [8.0]
        self.rows.append(9.0)
        self.rate = 10.0
    def set_rate(self, rate):
        self.rate = rate
        self.c["rate"] = rate
    def step(self, theta):
        return theta * self.c["a"] + self.rows[0] + self.shared["s"] * self.rate
    def __call__(self, theta, noise):
        return self.step(theta)

SEEN = [0, 3, 11]
CONFIG = {"dt": 0.125, "inner": {"steps": (1, 12)}}
NAMES = {"p", "q", "r"}
SETTINGS = types.SimpleNamespace(scale=13.0)
OPTIONS = Options(14)
RANGE, RATIO = range(0, 15), Fraction(1, 16)
ORDERED = OrderedDict(z=17.0, y=deque([18.0]))
START = [19.0, 20.0]
FAR = {"near": 1.0, "far": 21.0}
LARGE = [float(i) for i in range(50_000)]
TABLE = [[float(i), i % 7] for i in range(3000)]
OWN = Model(22.0)
OWN.set_rate(23.0)

def square(theta):
    return theta ** 24

FUNCTIONS = {"one": [square], "two": (lambda theta: theta + 25, np.vectorize(lambda theta: theta + 26))}

def fourth(theta):
    return theta + 27

def third(theta):
    return fourth(theta)

def second(theta):
    return third(theta)

def first(theta):
    return second(theta)

def deep(theta, noise):
    return first(theta)

def values(theta, noise):
    start = START
    start = list(start)
    start.append(1.0)
    copied = dict(CONFIG)
    copied["dt"] = 3.0
    local = SEEN[:]
    local.append(3)
    return theta + SEEN[2] * CONFIG["dt"] * SETTINGS.scale * OPTIONS.order + len(NAMES) + len(RANGE) * float(RATIO)

def tables(theta, noise):
    return theta + LARGE[3] + TABLE[4][0] + ORDERED["z"]

def functions(theta, noise):
    return FUNCTIONS["one"][0](theta) + FUNCTIONS["two"][0](theta)

def objects(theta, noise):
    return OWN.step(theta)

def make(weights):
    def simulate(theta, noise):
        return theta * weights[0]
    return simulate

def noise(n, generator):
    return torch.randn(n, 2, generator=generator) * FAR["near"] if n < 99 else FAR["far"]

stack = LevelStack(BoxPrior([0.0], [1.0]), noise, [
    Level("values", values), Level("tables", tables), Level("functions", functions), Level("objects", objects),
    Level("deep", deep), Level("closure", make([28.0, 29.0])), Level("model", Model(30.0))])
'''

STATE = '''
import functools, heapq, types
from collections import Counter, deque
import numpy as np
import torch
from mlsbi import BoxPrior, Level, LevelStack, per_sample

CACHE, LOG, RECENT, NUMBERS, TOTALS = {}, [], deque(maxlen=3), set(), Counter()
BUFFER, ACCUMULATED = np.zeros(3), torch.zeros(2)
STATS = types.SimpleNamespace(calls=0, rate=1.5)
CACHES = ({}, {})
NESTED = {"log": [], "steps": {"a": [1.0]}}
ROWS = [[0.0], [0.0]]
QUEUE = [3, 1]
COUNT = 0
SCALE = {"a": 2.5}
WIDE = [[i] for i in range(5000)]
TIMES = [np.float32(8.5), np.float32(9.5)]

def count():
    global COUNT
    COUNT += 1

def remember(cache, key, value):
    cache[key] = value
    return value

def globals_(theta, noise, calls=[], *, memo={}):
    count()
    CACHE[len(CACHE)] = COUNT
    LOG.append(theta)
    RECENT.append(1.0)
    NUMBERS.add(len(LOG))
    TOTALS["calls"] += 1
    BUFFER[:] = len(LOG)
    ACCUMULATED.add_(1.0)
    STATS.calls += 1
    CACHES[len(LOG) % 2][len(LOG)] = 1.0
    NESTED["log"].append(1)
    log = NESTED["steps"]["a"]
    log.append(2)
    for row in ROWS:
        row[0] += 1
    calls.append(1)
    remember(memo, len(memo), 1.0)
    heapq.heappush(QUEUE, len(LOG))
    for time in TIMES:
        time += WIDE[0][0]
    return theta * SCALE["a"]

class Solver:
    total = {}
    def __init__(self, rate):
        self.rate, self.memo, self.calls, self.log = rate, {}, 0, []
        self.options = {"a": rate}
    @functools.cached_property
    def table(self):
        return np.arange(4.0) * self.rate
    @property
    def counted(self):
        self.log.append(1)
        return len(self.log)
    def advance(self, theta):
        self.calls += 1
        self.total[self.calls] = self.calls
        remember(self.memo, len(self.memo), self.calls)
        return theta * self.options["a"] + self.table[1] + 0 * self.counted

class Simulator(Solver):
    def __call__(self, theta, noise):
        return super().advance(theta)
    def advance(self, theta):
        raise NotImplementedError

class Plan:
    made = []
    def __init__(self, factor):
        self.factor = factor
        self.made.append(factor)
    def run(self, theta):
        CACHE[len(CACHE)] = self.factor
        return theta * self.factor

SOLVER = Solver(3.5)

def through(theta, noise):
    return SOLVER.advance(theta)

def plans(theta, noise):
    return Plan(4.5).run(theta)

def make(weights):
    seen, calls = [], 0
    def tell():
        nonlocal calls
        calls += 1
        seen.append(calls)
    def simulate(theta, noise):
        tell()
        return theta * weights[0] + 0 * calls
    return simulate

def keyed(theta, noise, cache, weights):
    cache[len(cache)] = weights[0]
    return theta * weights[0]

@per_sample
def row(theta, noise):
    CACHE.setdefault("row", []).append(theta[0])
    return theta * SCALE["a"]

def noise(n, generator):
    LOG.append(n)
    return torch.randn(n, 2, generator=generator)

stack = LevelStack(BoxPrior([0.0], [1.0]), noise, [
    Level("globals", globals_), Level("object", Simulator(5.5)), Level("through", through), Level("plans", plans),
    Level("closure", make([6.5])), Level("partial", functools.partial(keyed, cache={}, weights=[7.5])),
    Level("row", row)])
'''


def described(folder, *changes, source=SOURCE):
    """The stack of a source with texts replaced, through a file as a user's."""
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


def code_of(simulate):
    return simple(simulate=simulate)["levels"][0]["code"]


@pytest.mark.parametrize(
    ("change", "level"),
    [
        (("SEEN = [0, 3, 11]", "SEEN = [0, 3, 12]"), "values"),
        (('"dt": 0.125', '"dt": 100.0'), "values"),
        (('"steps": (1, 12)', '"steps": (1, 13)'), "values"),
        (('NAMES = {"p", "q", "r"}', 'NAMES = {"p", "q", "t"}'), "values"),
        (("scale=13.0", "scale=13.5"), "values"),
        (("Options(14)", "Options(15)"), "values"),
        (("[4.0, 5.0])", "[4.0, 5.5])"), "values"),
        (("range(0, 15)", "range(0, 15, 2)"), "values"),
        (("Fraction(1, 16)", "Fraction(1, 17)"), "values"),
        (("START = [19.0, 20.0]", "START = [19.0, 21.0]"), "values"),
        (("range(50_000)]", "range(49_999)]"), "tables"),
        (("i % 7]", "i % 8]"), "tables"),
        (("z=17.0", "z=17.5"), "tables"),
        (("deque([18.0])", "deque([18.5])"), "tables"),
        (("theta ** 24", "theta ** 25"), "functions"),
        (("theta + 25, ", "theta + 25.5, "), "functions"),
        (("theta + 26", "theta + 26.5"), "functions"),
        (("OWN = Model(22.0)", "OWN = Model(22.5)"), "objects"),
        (("OWN.set_rate(23.0)", "OWN.set_rate(23.5)"), "objects"),
        (("theta + 27", "theta + 27.5"), "deep"),
        (("[28.0, 29.0]", "[28.0, 29.5]"), "closure"),
        (("Model(30.0)", "Model(30.5)"), "model"),
    ],
    ids=str,
)
def test_a_change_of_values_in_containers_is_told(tmp_path, change, level):
    before, after = described(tmp_path, source=VALUES), described(tmp_path, change, source=VALUES)
    (found,) = compare_stacks(before, after)
    assert found.startswith(f"level '{level}': its code changed:\n")
    assert len(found) < 3000


@pytest.mark.parametrize("change", [('{"b": 7.0}', '{"b": 7.5}'), ("[8.0]", "[8.5]"), ("append(9.0)", "append(9.5)"),
                                    ('{"s": 6.0}', '{"s": 6.5}')], ids=str)
def test_a_change_inside_objects_is_told_of_all_that_use_them(tmp_path, change):
    found = compare_stacks(described(tmp_path, source=VALUES), described(tmp_path, change, source=VALUES))
    assert [text.split(":")[0] for text in found] == ["level 'objects'", "level 'model'"]


def test_a_value_that_the_noise_uses_later_counts(tmp_path):
    changed = described(tmp_path, ('"far": 21.0', '"far": 21.5'), source=VALUES)
    (found,) = compare_stacks(described(tmp_path, source=VALUES), changed)
    assert found.startswith("noise: its code changed")
    assert "21.5" in found


@pytest.mark.parametrize("source", [VALUES, STATE], ids=["values", "state"])
def test_containers_are_told_alike_in_every_process_and_in_few_words(tmp_path, source):
    here = described(tmp_path, source=source)
    assert len(json.dumps(here)) < 50_000
    assert " at 0x" not in json.dumps(here)
    code = ("import json, sys; from mlsbi.loading import load_stack; from mlsbi.simulation.fingerprint import "
            "describe_stack; print(json.dumps(describe_stack(load_stack(sys.argv[1] + ':stack'))))")
    there = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.py")], check=True, capture_output=True,
                           text=True, env={**os.environ, "PYTHONHASHSEED": "77"})
    assert json.loads(there.stdout) == here


@pytest.mark.parametrize("source", [VALUES, STATE], ids=["values", "state"])
def test_what_the_code_itself_changes_is_state(tmp_path, source):
    before = described(tmp_path, source=source)
    stack = load_stack(f"{tmp_path / 'model.py'}:stack")
    for _ in range(3):
        noise = stack.draw_noise(5, torch.Generator())
        for level in stack.levels:
            level.simulate(torch.rand(5, 1), noise)
    assert compare_stacks(before, describe_stack(stack)) == []


@pytest.mark.parametrize(("change", "levels"), [
    (('SCALE = {"a": 2.5}', 'SCALE = {"a": 2.6}'), ["globals", "row"]),
    (("rate=1.5", "rate=1.6"), ["globals"]),
    (("SOLVER = Solver(3.5)", "SOLVER = Solver(3.6)"), ["through"]),
    (("Plan(4.5)", "Plan(4.6)"), ["plans"]),
    (("Simulator(5.5)", "Simulator(5.6)"), ["object"]),
    (("make([6.5])", "make([6.6])"), ["closure"]),
    (("weights=[7.5]", "weights=[7.6]"), ["partial"]),
    (("np.float32(9.5)", "np.float32(9.6)"), ["globals"]),
    (("WIDE = [[i] for", "WIDE = [[i + 1] for"), ["globals"]),
    (("QUEUE = [3, 1]", "QUEUE = [3, 2]"), []),
], ids=str)  # fmt: skip
def test_beside_state_values_still_count(tmp_path, change, levels):
    found = compare_stacks(described(tmp_path, source=STATE), described(tmp_path, change, source=STATE))
    assert [text.split("'")[1] for text in found] == levels


def test_an_array_that_only_others_change_is_a_value():
    buffer = np.zeros(20)

    def simulate(theta, noise):
        window = buffer[theta > 0]  # a copy
        window[0] = 1
        return window

    before = simple(simulate=simulate)
    buffer[0] = 1.0
    assert len(compare_stacks(before, simple(simulate=simulate))) == 1


def test_without_a_source_containers_count_unless_something_is_changed():
    def typed(text, **values):
        exec(text, values)
        return simple(simulate=values["f"])

    reading = "def f(theta, noise):\n    return theta * TABLE[0]"
    writing = "def f(theta, noise):\n    TABLE[0] = theta\n    return theta"
    assert len(compare_stacks(typed(reading, TABLE=[1.0]), typed(reading, TABLE=[2.0]))) == 1
    assert compare_stacks(typed(writing, TABLE=[1.0]), typed(writing, TABLE=[2.0])) == []


def chain_of(length, last):
    lines = [f"def f{i}(x):\n    return f{i + 1}(x) + f{max(i - 1, 0)}(x)\n" for i in range(length)]
    return "".join([*lines, f"def f{length}(x):\n    return {last} * x\n"]) + "simulate = f0\n"


@pytest.mark.parametrize(("length", "seen"), [(4, True), (8, True), (9, False)])
def test_functions_are_followed_eight_deep(tmp_path, length, seen):
    def described_chain(last):
        (tmp_path / "chain.py").write_text(chain_of(length, last))
        spec = importlib.util.spec_from_file_location("chain_of_model", tmp_path / "chain.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return simple(simulate=module.simulate)

    assert compare_stacks(described_chain(2), described_chain(2)) == []
    assert len(compare_stacks(described_chain(2), described_chain(3))) == seen


class Odd:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name):
        raise RuntimeError(name)

    def __eq__(self, other):
        raise RuntimeError("compared")

    __hash__ = object.__hash__


class OddList(list):
    def __iter__(self):
        raise RuntimeError("iterated")


LOOP = [1.0, {"self": None}]
LOOP[1]["self"] = LOOP
STRANGE = [Odd(), OddList([1]), object(), iter([1]), os.environ, sys.stdin, {Odd(): 1}, {sys, torch.add, Odd}, LOOP]
NEST = []
for _ in range(5000):
    NEST = [NEST]


def strange(theta, noise):
    return theta, STRANGE, NEST, MISSING  # noqa: F821


def test_nothing_that_users_hold_breaks_the_description():
    code = code_of(strange)
    assert code == code_of(strange)
    assert " at 0x" not in code
    assert "a Odd" in code
    assert "PATH" not in code  # the environment is no value


def test_large_containers_are_described_quickly():
    table = [float(i) for i in range(1_000_000)]

    def simulate(theta, noise):
        return theta * table[0]

    start = time.perf_counter()
    before = code_of(simulate)
    assert time.perf_counter() - start < 10  # takes about half a second
    assert len(before) < 300
    table[-1] = 0.5
    assert code_of(simulate) != before


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("place", ["argument", "program", "relative", "option", "nothing"])
def test_the_files_of_a_command_count(tmp_path, place):
    def description(text, other="1"):
        path = program(tmp_path / "bin", "sim.py", text)
        program(tmp_path / "bin", "unused.py", other)
        template, cwd = {
            "argument": ([sys.executable, path, "{a}"], None),
            "program": ([path, "{a}"], None),
            "relative": ([sys.executable, "./sim.py", "{a}"], tmp_path / "bin"),
            "option": ([sys.executable, "-c", "pass", f"--model={path}", "{a}"], None),
            "nothing": ([sys.executable, "-c", "pass", "{a}", "sim", "{a}/sim.py"], tmp_path / "bin"),
        }[place]
        return simple(simulate=command(template, parameters=["a"], cwd=cwd))

    base = description("print(1)")
    assert compare_stacks(base, description("print(1)", other="2")) == []
    found = compare_stacks(base, description("print(2)"))
    if place == "nothing":
        assert found == []
    else:
        assert "file sim.py = sha256" in found[0]


def test_interpreters_and_the_systems_programs_do_not_count(tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    for first in (sys.executable, tmp_path / "python", "/bin/sh", "/usr/bin/env", "python3.11", "sh"):
        assert "\nfile" not in code_of(command([first, "{a}"], parameters=["a"]))


def test_a_program_that_is_too_large_to_hash_is_told_by_size_and_time(tmp_path):
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        file.truncate(2**28 + 1)
    os.utime(path, (1e9, 1e9))
    simulate = command([path, "{a}"], parameters=["a"])
    assert "file large.bin = 268435457 bytes of 2001-09-09 01:46:40+00:00" in code_of(simulate)
    before = code_of(simulate)
    os.utime(path, (1e9, 2e9))
    assert code_of(simulate) != before
