import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from trainings import (
    DROPPING,
    MIXTURE,
    SMALL,
    ForeignDropout,
    Interrupted,
    agree,
    make_members,
    make_terms,
    spoil,
    train,
    values_of,
)

from mlsbi import NPE, BoxPrior, MLPEmbedding, Multilevel, MultilevelData, TransferLearning
from mlsbi.training import loop
from mlsbi.training.checkpoints import Checkpoint, CheckpointError, fingerprint
from mlsbi.training.descent import Objective
from mlsbi.training.history import TrainingError
from mlsbi.training.options import TrainingOptions

OPTIONS = TrainingOptions(epochs=7, patience=4, learning_rate=0.02, batch_size=64)


def embedding_of(*parts):
    def build(member):
        with torch.random.fork_rng():
            torch.manual_seed(member)
            return nn.Sequential(nn.Linear(2, 3), *(part() for part in parts))

    return build


def norm():
    return nn.BatchNorm1d(3)


def spectral():
    return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))


# Members, and how they are trained.
CASES = {
    "minibatches": (lambda: make_members(1, MIXTURE, n=(90, 40)), Objective(), OPTIONS),
    "full batches": (lambda: make_members(1, MIXTURE, n=(90, 40)), Objective(), replace(OPTIONS, batch_size=None)),
    "dropout": (lambda: make_members(1, DROPPING, n=(90, 40)), Objective(), OPTIONS),
    "foreign dropout": (lambda: make_members(2, MIXTURE, n=(90, 40), embedding=embedding_of(ForeignDropout)),
                        Objective(), OPTIONS),
    "estimated weights": (lambda: make_members(1, MIXTURE, n=(90, 40, 20)), Objective("estimated"), OPTIONS),
    "adjusted": (lambda: make_members(1, MIXTURE, n=(90, 40)),
                 Objective(rescale=True, project=True, correction_limit=1.0, difference_penalty=1.0), OPTIONS),
    "average": (lambda: make_members(1, MIXTURE, n=(90, 40)), Objective(), replace(OPTIONS, average=0.9)),
    "no rows held out": (lambda: make_members(1, MIXTURE, n=(90, 40), fraction=0), Objective("estimated"), OPTIONS),
    "ensemble in one go": (lambda: make_members(3, DROPPING, n=(90, 40)), Objective("estimated"),
                           replace(OPTIONS, average=0.5, weight_decay=0.1, patience=2, learning_rate=0.05)),
    "ensemble one by one": (lambda: make_members(3, MIXTURE, n=(90, 40)), Objective("estimated"),
                            replace(OPTIONS, together=False)),
    "batch norm": (lambda: make_members(2, MIXTURE, n=(90,), embedding=embedding_of(norm)), Objective(), OPTIONS),
    "spectral norm": (lambda: make_members(1, MIXTURE, n=(90,), embedding=embedding_of(spectral)), Objective(),
                      OPTIONS),
    "one level, estimated": (lambda: make_members(1, MIXTURE, n=(90,)), Objective("estimated"), OPTIONS),
    "double precision": (lambda: make_members(2, MIXTURE, n=(90, 40), dtype=torch.float64), Objective(),
                         replace(OPTIONS, precision="float64")),
}


def die_after(patch, epochs, *, steps=0):
    """Ends training in the epoch after so many, at the beginning or after so many steps of it."""
    count = [0]
    train_epoch, step = loop._Run._train_epoch, loop._Run._step

    def dying(self):
        count[0] += 1
        if count[0] > epochs and not steps:
            raise Interrupted
        taken = [0]

        def counted(this, rows, weights):
            taken[0] += 1
            if count[0] > epochs and taken[0] > steps:
                raise Interrupted
            return step(this, rows, weights)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(loop._Run, "_step", counted)
            train_epoch(self)

    patch.setattr(loop._Run, "_train_epoch", dying)


def lives_until_done(call, *, epochs=1, steps=0, most=200):
    """Calls again and again, each time until so many further epochs are done; how often it took, and the result."""
    for lives in range(1, most):
        with pytest.MonkeyPatch.context() as patch:
            die_after(patch, epochs, steps=steps)
            try:
                return lives, call()
            except Interrupted:
                continue
    raise AssertionError("never done")


def same_training(one, other):
    """Whether two trainings gave the same, bit for bit."""
    (histories, networks), (again, others) = one, other
    for a, b in zip(histories, again, strict=True):
        assert agree(a, b, 0.0)
        assert (a.best_epoch, a.best_loss, a.stopped, a.n_train, a.n_validation, a.stages, a.notes) == (
            b.best_epoch, b.best_loss, b.stopped, b.n_train, b.n_validation, b.stages, b.notes)
    for a, b in zip(networks, others, strict=True):
        assert torch.equal(values_of(a), values_of(b))
        assert not b.training


def run(case, checkpoint=None):
    make, objective, options = CASES[case]
    members = make()
    histories = train(members, objective, options, checkpoint=checkpoint)
    return histories, [member.network for member in members]


@pytest.mark.parametrize("case", CASES)
def test_a_training_that_dies_after_every_epoch_ends_as_if_it_had_not(case, tmp_path):
    expected = run(case)
    lives, found = lives_until_done(lambda: run(case, Checkpoint(tmp_path / "here", every=0)))
    longest = max(len(history.epochs) for history in expected[0])
    assert lives in (longest, longest + 1)  # the last epoch is saved, or what comes after it
    same_training(expected, found)
    assert [path.name for path in tmp_path.iterdir()] == ["here.safetensors"]


@pytest.mark.parametrize("case", ["dropout", "ensemble in one go", "batch norm", "foreign dropout"])
@pytest.mark.parametrize("epochs", [0, 1, 3, 6])
def test_a_training_that_dies_within_an_epoch(case, epochs, tmp_path):
    def call():
        return run(case, Checkpoint(tmp_path / "here", every=0))

    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, epochs, steps=1)
        with pytest.raises(Interrupted):
            call()
    assert (tmp_path / "here.safetensors").exists() is (epochs > 0)
    same_training(run(case), call())


def test_members_had_stopped_before_the_others():
    """So that dying after every epoch is dying after some members were let go."""
    histories, _ = run("ensemble in one go")
    assert len({len(history.epochs) for history in histories}) > 1


STRATEGIES = {
    "transfer": (TransferLearning(), None),
    "transfer, frozen": (TransferLearning(freeze_embedding=True), MLPEmbedding(3, 4, 1)),
    "transfer, frozen batch norm": (TransferLearning(freeze_embedding=True), embedding_of(norm)(0)),
    "aligned": (Multilevel("estimated"), None),
}


def toy_data(n=(80, 20), seed=0):
    levels = []
    for level, term in enumerate(make_terms(n, seed)):
        theta = term.input.sigmoid()
        levels.append((theta, term.fine, term.coarse) if level else (theta, term.fine))
    return MultilevelData.from_arrays(levels)


def estimate(folder=None, *, data=None, seed=4, ensemble=1, density=MIXTURE, strategy="multilevel", embedding=None,
             **options):
    training = TrainingOptions(**{"epochs": 5, "patience": 2, "learning_rate": 0.02, **options})
    npe = NPE(BoxPrior([0.0], [1.0]), strategy=strategy, density=density, embedding=embedding, training=training,
              seed=seed)
    npe.fit(toy_data() if data is None else data, ensemble=ensemble, checkpoint=folder, progress=False)
    return npe.histories, npe.networks


@pytest.fixture
def eager(monkeypatch):
    """Checkpoints after every epoch."""
    monkeypatch.setattr(Checkpoint, "due", True)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("case", STRATEGIES)
@pytest.mark.parametrize(("ensemble", "together"), [(1, "auto"), (2, True), (2, False)])
def test_estimators_go_on(case, ensemble, together, tmp_path):
    strategy, embedding = STRATEGIES[case]
    given = {"strategy": strategy, "embedding": embedding, "ensemble": ensemble, "together": together}
    expected = estimate(**given)
    lives, found = lives_until_done(lambda: estimate(tmp_path / "new" / "folder", **given), epochs=2)
    assert lives > 2
    same_training(expected, found)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("strategy", ["multilevel", "transfer"])
def test_cross_fitted_trainings_go_on(strategy, tmp_path):
    given = {"strategy": strategy, "cross_fit": True, "validation_fraction": 0.34}
    expected = estimate(**given)
    lives, found = lives_until_done(lambda: estimate(tmp_path, **given), epochs=3)
    assert lives > 2
    same_training(expected, found)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("given", [{}, {"ensemble": 2}, {"strategy": "transfer"}, {"cross_fit": True}])
def test_a_finished_training_is_read_at_once(given, tmp_path):
    expected = estimate(tmp_path, **given)
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 0)
        found = estimate(tmp_path, **given)
    same_training(expected, found)


def test_a_training_that_failed_fails_again(monkeypatch, tmp_path):
    spoil(monkeypatch, after=0)
    for _ in range(2):
        with pytest.raises(TrainingError, match="no weights to keep"):
            run("minibatches", Checkpoint(tmp_path / "here", every=0))


def test_how_members_are_evaluated_may_change_on_the_way(tmp_path):
    make, objective, options = CASES["ensemble in one go"]
    options = replace(options, precision="float64")
    results = []
    for choices in ((True, True), (True, False), (False, True)):
        checkpoint = Checkpoint(tmp_path / f"{choices}", every=0)
        for together in choices:
            members = make_members(3, DROPPING, n=(90, 40), dtype=torch.float64)
            with pytest.MonkeyPatch.context() as patch:
                if together is choices[0] and not Path(f"{checkpoint.path}.safetensors").exists():
                    die_after(patch, 3)
                    with pytest.raises(Interrupted):
                        train(members, objective, replace(options, together=together), checkpoint=checkpoint)
                else:
                    results.append(train(members, objective, replace(options, together=together),
                                         checkpoint=checkpoint))
    assert len(results) == 3
    for found in results[1:]:
        assert all(agree(one, other, 1e-9) for one, other in zip(results[0], found, strict=True))


def begun(folder, **given):
    """The checkpoint of a training that died after two epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "due", True)
        die_after(patch, 2)
        with pytest.raises(Interrupted):
            estimate(folder, **given)
    return folder


class Frozen(nn.Module):
    """An embedding of which a part is fixed."""

    def __init__(self, by):
        super().__init__()
        self.line = nn.Linear(2, 2)
        self.by = nn.Parameter(torch.full((2,), by), requires_grad=False)
        nn.init.eye_(self.line.weight)
        nn.init.zeros_(self.line.bias)

    def forward(self, x):
        return self.line(x) + self.by


@pytest.mark.parametrize(("first", "then"), [
    ({}, {"seed": 5}),
    ({}, {"learning_rate": 0.01}),
    ({}, {"epochs": 6}),
    ({}, {"precision": "float64"}),
    ({}, {"data": toy_data(seed=1)}),
    ({}, {"data": toy_data((81, 20))}),
    ({}, {"strategy": Multilevel(align=False)}),
    ({}, {"strategy": Multilevel("estimated")}),
    ({}, {"strategy": Multilevel(rescale=True)}),
    ({"strategy": Multilevel("estimated"), "cross_fit": True}, {"strategy": Multilevel(), "cross_fit": True}),
    ({}, {"density": SMALL}),
    ({"density": SMALL}, {"density": DROPPING}),
    ({"density": DROPPING}, {"density": replace(DROPPING, dropout=0.1)}),
    ({"density": SMALL}, {"density": replace(SMALL, tail_bound=1.0)}),
    ({"embedding": Frozen(0.0)}, {"embedding": Frozen(1.0)}),
    ({"embedding": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))},
     {"embedding": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))}),
], ids=["seed", "step size", "epochs", "precision", "data", "rows", "alignment", "weights", "rescale", "cross-fitted",
        "density", "dropout added", "dropout", "tail bound", "frozen values", "foreign dropout"])
def test_a_checkpoint_of_another_training_is_refused(first, then, tmp_path):
    if "embedding" in first:  # equal where they are trained
        for embedding in (first["embedding"], then["embedding"]):
            for parameter in embedding.parameters():
                if parameter.requires_grad:
                    nn.init.constant_(parameter, 0.3)
    begun(tmp_path, **first)
    with pytest.raises(CheckpointError, match=r"another training.*Pass another folder, or delete it"):
        estimate(tmp_path, **{**first, **then})


@pytest.mark.parametrize("damage", [
    lambda data: data[:200], lambda data: b"", lambda data: data[:-10], lambda data: b"x" * len(data),
    lambda data: data.replace(b"training", b"straying"), lambda data: data.replace(b"fingerprint", b"fingerpaint"),
], ids=["short", "empty", "cut", "other", "no record", "no fingerprint"])
def test_damage_is_an_error_that_says_what_to_do(damage, tmp_path):
    path, = begun(tmp_path).iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"[Dd]elete it to train from the start"):
        estimate(tmp_path)
    path.unlink()
    same_training(estimate(), estimate(tmp_path))


def test_the_file_is_safetensors_and_json(tmp_path):
    run("ensemble in one go", Checkpoint(tmp_path / "here", every=0))
    data = (tmp_path / "here.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    told = json.loads(header["__metadata__"]["training"])
    assert told["epoch"] == max(len(history["epochs"]) for history in told["histories"])
    assert told["running"] == []
    with safe_open(tmp_path / "here.safetensors", framework="pt") as file:
        assert {name for name in file.keys() if name.startswith("finished/")} == {f"finished/{at}" for at in range(3)}


@pytest.mark.parametrize(("every", "writes"), [(0.0, 8), (1e9, 1)])
def test_files_are_written_as_often_as_asked(monkeypatch, every, writes, tmp_path):
    written = []
    write = Checkpoint.write
    monkeypatch.setattr(Checkpoint, "write", lambda self, *given: written.append(self.path) or write(self, *given))
    run("minibatches", Checkpoint(tmp_path / "here", every=every))
    assert len(written) == writes  # seven epochs and the end
    assert set(written) == {tmp_path / "here"}


def test_time_is_counted_from_the_last_version(monkeypatch, tmp_path):
    clock, passed = time.monotonic, [0.0]
    monkeypatch.setattr("mlsbi.training.checkpoints.time.monotonic", lambda: clock() + passed[0])
    checkpoint = Checkpoint(tmp_path / "here", every=1000.0)
    assert not checkpoint.due
    passed[0] = 1001.0
    assert checkpoint.due
    part = checkpoint.part("0")
    assert (part.every, part.path) == (1000.0, tmp_path / "here-0")
    checkpoint.write({}, {})
    assert not checkpoint.due


def test_seconds_add_up_over_the_lives(tmp_path):
    def call():
        return run("minibatches", Checkpoint(tmp_path / "here", every=0))

    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 3)
        with pytest.raises(Interrupted):
            call()
    with safe_open(tmp_path / "here.safetensors", framework="pt") as file:
        before = json.loads(file.metadata()["training"])["seconds"]
    (history,), _ = call()
    assert history.seconds > before > 0


def test_fingerprints_tell_tensors_and_text_apart():
    a, b = torch.arange(6.0), torch.arange(6.0)[None]
    marks = [fingerprint(*given) for given in (
        ([a],), ([b],), ([a, a],), ([a.double()],), ([a + 1e-6],), ([a], "more"), ([a], 1), ([a], "1"), ([],),
    )]
    assert len(set(marks)) == len(marks)
    assert fingerprint([a.clone()], (1, "x")) == fingerprint([a], (1, "x"))


@pytest.mark.parametrize("rows", [100, 5000, 20_000])
@pytest.mark.parametrize("columns", [2, 3, 4])
def test_fingerprints_see_every_column_of_large_data(rows, columns):
    data = torch.zeros(rows, columns)
    marks = {fingerprint([data + torch.eye(columns)[at]]) for at in range(columns)} | {fingerprint([data])}
    assert len(marks) == columns + 1


SCRIPT = """
import sys
sys.path.append({folder!r})
import torch
from test_checkpoints import estimate, same_training
from mlsbi.training.checkpoints import Checkpoint
torch.set_num_threads(1)
Checkpoint.due = True
write = Checkpoint.write
def told(self, *given):
    write(self, *given)
    print("written", flush=True)
Checkpoint.write = told
found = estimate(sys.argv[1], epochs=40, patience=40, ensemble=2, together=True)
same_training(estimate(epochs=40, patience=40, ensemble=2, together=True), found)
print("the same", flush=True)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(tmp_path):
    command = [sys.executable, "-c", SCRIPT.format(folder=str(Path(__file__).parent)), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(6):
            assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    assert done[-2] == "the same"
    assert done.count("written") <= 41 - 5  # 40 epochs and the end, of which six were there


def test_a_finished_training_keeps_its_notes(tmp_path):
    kept = [train(make_members(builder=MIXTURE, fraction=0), Objective("estimated"),
                  checkpoint=Checkpoint(tmp_path / "here"))[0] for _ in range(2)]
    assert kept[0].notes
    assert kept[0].notes == kept[1].notes
    assert kept[0].seconds == kept[1].seconds


def test_addresses_do_not_tell_trainings_apart(tmp_path):
    class Calls(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.function = torch.nn.Linear(2, 2), lambda x: x

        def extra_repr(self):
            return repr(self.function)

        def forward(self, x):
            return self.function(self.line(x))

    def embedding(member):
        with torch.random.fork_rng():
            torch.manual_seed(member)
            return Calls()

    for _ in range(2):
        train(make_members(builder=MIXTURE, embedding=embedding), checkpoint=Checkpoint(tmp_path / "here"))


def test_masks_of_another_kind_of_device_are_refused(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(self):
        raise Stop

    def call():
        return train(make_members(builder=DROPPING), checkpoint=Checkpoint(tmp_path / "here", every=0))

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_check_start", lambda self: (setattr(self, "_identity", self._fingerprint()),
                                                               self._save(0.0), stop(self)))
        with pytest.raises(Stop):
            call()
    found = Checkpoint(tmp_path / "here")
    file = tmp_path / "here.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        told = json.loads(opened.metadata()["training"])
    found.write(tensors, {**told, "device": "cuda"})
    with pytest.raises(CheckpointError, match="is of a training on cuda, where the masks"):
        call()
    found.write(tensors, told)
    assert len(call()[0].epochs) == 5
