import re
import shutil
from dataclasses import replace

import pytest
import torch
from trainings import DROPPING, MIXTURE, SMALL, ForeignDropout, agree, make_members, train, values_of

from mlsbi.density.flows import NSF
from mlsbi.training import compiling, descent
from mlsbi.training.compiling import Compiling
from mlsbi.training.descent import Objective
from mlsbi.training.history import TrainingError
from mlsbi.training.options import TrainingOptions

CPU = torch.device("cpu")
ADJUSTED = Objective(rescale=True, project=True)


@pytest.fixture
def clock(monkeypatch):
    """A clock that steps move by what they say."""
    now = [0.0]
    monkeypatch.setattr("mlsbi.training.compiling.time.perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds
        return seconds

    return move


def take(decides, clock, seconds, steps=1):
    """Steps of so many seconds; after how many compiling was due."""
    for step in range(steps):
        if decides.due:
            return step
        assert decides.time(lambda: clock(seconds)) == seconds
    return None


def test_asked_for_it_comes_after_three_steps_for_comparison(clock):
    decides = Compiling(asked=True, device=CPU)
    assert take(decides, clock, 0.01, 100) == 3
    assert not decides.settled
    decides.begin()
    assert not decides.due
    take(decides, clock, 20.0)
    assert take(decides, clock, 0.004, 50) is None
    assert decides.settled
    assert decides.report(100) == ("compiling took 20 s; a step then took 4.00 ms instead of 10.00 ms, which pays "
                                   "beyond 3333 steps; 100 were made")


def test_automatically_it_comes_once_plain_steps_have_taken_as_long_as_it_would(clock):
    decides = Compiling(asked="auto", device=CPU)
    assert take(decides, clock, 0.5, 100) == 60  # 30 seconds
    short = Compiling(asked="auto", device=CPU)
    assert take(short, clock, 100.0, 9) == 3  # never before there is something to compare
    assert short.report(3) == "not compiled: training was over before compiling could have paid"
    decides.begin()
    take(decides, clock, 40.0)
    take(decides, clock, 0.6, 20)
    assert decides.report(80) == ("compiling took 40 s; a step then took 600.00 ms instead of 500.00 ms, which cannot "
                                  "pay")


def test_never(clock):
    for decides in (Compiling(asked=False, device=CPU), Compiling(asked="auto", device=torch.device("cuda"))):
        assert take(decides, clock, 1000.0, 20) is None
        assert decides.settled
        assert decides.report(20) is None


def test_the_typical_step_is_compared_not_the_slowest(clock):
    decides = Compiling(asked=True, device=CPU)
    for seconds in (5.0, 0.01, 0.01):
        take(decides, clock, seconds)
    decides.begin()
    for seconds in (10.0, 0.005, 0.005, 3.0):
        take(decides, clock, seconds)
    assert "5.00 ms instead of 10.00 ms" in decides.report(7)


def test_too_few_steps_to_compile_are_told(clock):
    decides = Compiling(asked=True, device=CPU)
    take(decides, clock, 0.01, 2)
    assert decides.report(2) == "compiling came to nothing: training was over after 2 steps"


def plainly(monkeypatch):
    """Puts the function itself in place of its compiled form, and counts how often it is called."""
    calls = []

    def compiled(function):
        calls.append(0)

        def call(*arguments):
            calls[-1] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(descent, "compiled", compiled)
    return calls


def test_training_compiles_once_and_says_what_it_brought(monkeypatch):
    calls = plainly(monkeypatch)
    members = make_members(1, MIXTURE)
    history, = train(members, options=TrainingOptions(epochs=8, batch_size=None, compile=True))
    assert calls == [5]
    note, = history.notes
    assert re.fullmatch(r"compiling took 0 s; a step then took [\d.]+ ms instead of [\d.]+ ms, which (cannot pay|pays "
                        r"beyond \d+ steps; 8 were made)", note)


def test_training_that_is_short_is_not_compiled_by_itself(monkeypatch):
    calls = plainly(monkeypatch)
    history, = train(make_members(1, MIXTURE), options=TrainingOptions(epochs=8, compile="auto"))
    assert not calls
    assert history.notes == ("not compiled: training was over before compiling could have paid",)


def test_long_training_is_compiled_by_itself(monkeypatch):
    calls = plainly(monkeypatch)
    monkeypatch.setattr(compiling, "_USUAL_SECONDS", 0.0)
    history, = train(make_members(1, MIXTURE), options=TrainingOptions(epochs=8, batch_size=None, compile="auto"))
    assert calls == [5]
    assert history.notes[0].startswith("compiling took")


def test_members_that_stop_stay_where_a_shape_is_compiled(monkeypatch):
    plainly(monkeypatch)
    options = {"epochs": 60, "patience": 4, "learning_rate": 0.05, "batch_size": None, "precision": "float64"}
    found = []
    for choice in (True, False):
        members = make_members(3, MIXTURE, n=(60, 20), dtype=torch.float64)
        found.append((train(members, options=TrainingOptions(**options, compile=choice)), members))
    (one, first), (other, second) = found
    assert len({len(history.epochs) for history in one}) > 1
    for a, b in zip(one, other, strict=True):
        assert agree(a, b, 1e-6)
        assert a.stopped == b.stopped
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(values_of(a.network), values_of(b.network), atol=1e-6)


@pytest.mark.parametrize(("embedding", "together", "why"), [
    (lambda member: ForeignDropout(), True, "the network draws random numbers of its own"),
    (None, False, "members were evaluated one after the other"),
])
@pytest.mark.parametrize("choice", [True, "auto"])
def test_what_cannot_be_compiled_says_so(monkeypatch, embedding, together, why, choice):
    calls = plainly(monkeypatch)
    members = make_members(2, MIXTURE, embedding=embedding)
    histories = train(members, options=TrainingOptions(epochs=6, together=together, compile=choice))
    assert not calls
    for history in histories:
        assert f"not compiled: {why}" in next(note for note in history.notes if note.startswith("not compiled"))


def with_backend(monkeypatch, backend):
    """Compiles by a backend that needs no compiler of the machine's."""

    def compiled(function):
        inner = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

        def call(*arguments):
            with torch._dynamo.config.patch(recompile_limit=64):
                return inner(*arguments)

        return call

    monkeypatch.setattr(descent, "compiled", compiled)


def compiled_and_plain(builder, objective, members, options):
    tables = []
    for choice in (True, False):
        made = make_members(members, builder, n=(90, 40))
        tables.append(train(made, objective, TrainingOptions(**options, compile=choice)))
    for one, other in zip(*tables, strict=True):
        assert agree(one, other, 1e-4)
    return tables[0][0]


@pytest.mark.parametrize(("builder", "objective", "members"), [
    pytest.param(SMALL, Objective("estimated"), 1, marks=pytest.mark.slow),
    pytest.param(DROPPING, ADJUSTED, 2, marks=pytest.mark.slow),
    (MIXTURE, Objective(difference_penalty=1.0), 3),
], ids=["nsf", "dropout", "mdn"])
def test_a_traced_loss_trains_as_the_loss_itself(monkeypatch, builder, objective, members):
    with_backend(monkeypatch, "aot_eager")
    history = compiled_and_plain(builder, objective, members, {"epochs": 6, "batch_size": 100})
    assert history.notes[0].startswith("compiling took")
    assert all(count == 0 for count in torch._dynamo.utils.counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("objective", [Objective(), ADJUSTED], ids=["plain", "adjusted"])
def test_a_compiled_loss_trains_as_the_loss_itself(members, objective):
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    builder = NSF(transforms=2, hidden=16)
    history = compiled_and_plain(builder, objective, members, {"epochs": 5, "batch_size": 100})
    assert history.notes[0].startswith("compiling took")


@pytest.mark.parametrize("asked", [True, "auto"])
def test_a_network_that_cannot_be_compiled(monkeypatch, asked):
    def compiled(function):
        def call(*arguments):
            raise RuntimeError("data-dependent branching\nand more")

        return call

    monkeypatch.setattr(descent, "compiled", compiled)
    monkeypatch.setattr(compiling, "_USUAL_SECONDS", 0.0)
    options = TrainingOptions(epochs=8, batch_size=None, compile=asked)
    if asked is True:
        with pytest.raises(TrainingError, match="branching and more. Leave compile out"):
            train(make_members(1, MIXTURE), options=options)
        return
    history, = train(make_members(1, MIXTURE), options=options)
    plain, = train(make_members(1, MIXTURE), options=replace(options, compile=False))
    assert history.notes == ("not compiled: data-dependent branching and more",)
    assert agree(history, plain, 0.0)
