from dataclasses import replace

import pytest
import torch
from torch import nn
from trainings import (
    DROPPING,
    MIXTURE,
    SMALL,
    ForeignDropout,
    Interrupted,
    agree,
    loss_of,
    make_descent,
    make_members,
    make_network,
    make_terms,
    message_of,
    train,
    values_of,
)

from mlsbi import NPE, BoxPrior, MultilevelData
from mlsbi.density.flows import NSF
from mlsbi.training import loop
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.descent import Objective
from mlsbi.training.graphs import CapturedStep
from mlsbi.training.members import Member
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
TEN = TrainingOptions(epochs=10, patience=50, batch_size=64, learning_rate=5e-3)
DOUBLE = replace(TEN, precision="float64")
OBJECTIVES = [Objective(), Objective("estimated", rescale=True, project=True),
              Objective(correction_limit=1.0, difference_penalty=1.0)]


@pytest.fixture(autouse=True)
def device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def to(device, members):
    """Members on a device; their rows stay where they are until training moves them."""
    for member in members:
        member.network.to(device)
    return members


def on(device, objective, options, builder=SMALL, *, count=1, **more):
    """Trains fresh members on a device; their histories and networks, back on the CPU."""
    dtype = torch.float64 if options.precision == "float64" else torch.float32
    members = to(device, make_members(count, builder, dtype=dtype, **{"n": (120, 60), **more}))
    histories = train(members, objective, options)
    assert all(parameter.device.type == device.type for member in members for parameter in member.network.parameters())
    return histories, [member.network.cpu() for member in members]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("batch_size", [None, 64])
def test_a_seed_gives_the_same_training_on_either(objective, batch_size):
    """Without dropout, whose masks are drawn where they are used."""
    for options, tolerance in ((TEN, 1e-3), (DOUBLE, 1e-8)):
        options = replace(options, batch_size=batch_size)
        (here, first), (there, second) = (on(place, objective, options) for place in (torch.device("cpu"), GPU))
        assert agree(here[0], there[0], tolerance)
        assert torch.allclose(values_of(first[0]), values_of(second[0]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("builder", [DROPPING, MIXTURE])
@pytest.mark.parametrize("count", [1, 3])
def test_early_stopping_is_the_same_though_the_host_looks_seldom(builder, count):
    options = replace(DOUBLE, epochs=70, patience=4, learning_rate=0.05, batch_size=None)
    if builder is DROPPING:
        histories, networks = on(GPU, Objective(), options, builder, count=count)
        members = make_members(count, builder, n=(120, 60), dtype=torch.float64)
        for history, network, member in zip(histories, networks, members, strict=True):
            assert len(history.epochs) - 1 - history.best_epoch == 4
            assert loss_of(network, member.validation) == pytest.approx(history.best_loss, abs=1e-9)
        return
    (here, first), (there, second) = (on(place, Objective("estimated"), options, builder, count=count)
                                      for place in (torch.device("cpu"), GPU))
    for one, other in zip(here, there, strict=True):
        assert (one.best_epoch, one.stopped) == (other.best_epoch, other.stopped)
        assert agree(one, other, 1e-5)
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(values_of(one), values_of(other), atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("batch_size", [None, 64])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("before", [0, 2])
def test_steps_that_are_replayed_are_those_that_are_taken(objective, batch_size, count, before):
    """Parameters, running average, optimiser and what is recorded, under masks that change."""
    options = TrainingOptions(batch_size=batch_size, average=0.9, weight_decay=0.01, learning_rate=0.01,
                              precision="float64")
    terms = [term.to(GPU) for term in make_terms((120, 60), dtype=torch.float64)]
    found = []
    for captured in (False, True):
        networks = [make_network(DROPPING, seed, dtype=torch.float64, spread=0.1).to(GPU) for seed in range(count)]
        descent, plan = make_descent(networks, terms, objective, options)
        replay, steps = None, []
        while len(steps) < 7:
            for rows in plan.epoch():
                weights = torch.tensor([[0.1 * len(steps), 1.0]] * count, dtype=torch.float64, device=GPU)
                if captured and replay is None and len(steps) >= before:
                    state = {name: tensor.clone() for name, tensor in descent.tensors().items()}
                    replay = CapturedStep(descent, rows, weights)
                    for name, tensor in state.items():
                        assert torch.equal(tensor, descent.tensors()[name])  # recording takes no step
                step = descent.step(rows, weights) if replay is None else replay(rows, weights)
                steps.append((step.losses.clone(), {name: value.clone() for name, value in step.recorded.items()}))
        found.append((descent, steps))
    (plain, taken), (other, replayed) = found
    assert plain.done == other.done
    for (losses, recorded), (again, told) in zip(taken, replayed, strict=True):
        assert torch.allclose(losses, again, atol=1e-9)
        assert recorded.keys() == told.keys()
        for name, value in recorded.items():
            assert torch.allclose(value.double(), told[name].double(), atol=1e-9)
    for name, tensor in plain.tensors().items():
        assert torch.allclose(tensor, other.tensors()[name], atol=1e-9), name
    assert not torch.allclose(plain.flat, plain.average, atol=1e-4)


def test_training_replays_its_steps(monkeypatch):
    replayed = []
    call = CapturedStep.__call__
    monkeypatch.setattr(CapturedStep, "__call__", lambda self, *given: replayed.append(0) or call(self, *given))
    expected, first = on(GPU, Objective("estimated"), DOUBLE, DROPPING, count=2)
    steps = len(replayed)
    assert steps >= 10
    monkeypatch.setattr(loop, "CapturedStep", lambda descent, rows, weights: None)
    found, second = on(GPU, Objective("estimated"), DOUBLE, DROPPING, count=2)
    assert len(replayed) == steps
    for one, other in zip(expected, found, strict=True):
        assert agree(one, other, 1e-9)
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(values_of(one), values_of(other), atol=1e-9)


@pytest.mark.parametrize("builder", [DROPPING, MIXTURE])
def test_members_in_one_go_are_those_trained_one_after_the_other(builder):
    results = [on(GPU, Objective("estimated"), replace(DOUBLE, together=together), builder, count=3)
               for together in (True, False)]
    for one, other in zip(*(histories for histories, _ in results), strict=True):
        assert agree(one, other, 1e-8)
    assert len({history.best_loss for history in results[0][0]}) == 3


def test_batch_statistics_follow_on_a_gpu():
    def normed(member):
        with torch.random.fork_rng():
            torch.manual_seed(member)
            return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()

    options = replace(DOUBLE, epochs=30, patience=5, learning_rate=0.05)
    (here, first), (there, second) = (on(place, Objective(), options, MIXTURE, n=(120,), embedding=normed)
                                      for place in (torch.device("cpu"), GPU))
    assert agree(here[0], there[0], 1e-6)
    assert torch.allclose(values_of(first[0]), values_of(second[0]), atol=1e-6)


@pytest.mark.parametrize("embedding", [None, ForeignDropout()], ids=["masks", "seeds"])
def test_identical_halves_cancel_under_dropout(embedding):
    low, pairs = make_terms(dtype=torch.float64)
    terms = [term.to(GPU) for term in (low, Term(pairs.input, pairs.fine, pairs.fine))]
    network = make_network(DROPPING, embedding=embedding, dtype=torch.float64, spread=0.2).to(GPU)
    descent, plan = make_descent([network], terms, draws=embedding is not None)
    step, = plan.epoch()
    losses, _, _ = descent.gradient(step, torch.ones(1, 2, dtype=torch.float64, device=GPU), [[5, 6]])
    own, fine, coarse = losses.split(step.sizes, 1)
    assert torch.allclose(fine, coarse, rtol=0, atol=1e-12)
    assert own.std() > 0.1


def test_random_states_are_left_alone():
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    on(GPU, Objective(), replace(TEN, epochs=2), DROPPING, embedding=lambda member: ForeignDropout())
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(before[1], torch.cuda.get_rng_state())


@pytest.mark.parametrize("embedding", [None, lambda member: ForeignDropout()], ids=["replayed", "drawing"])
def test_a_training_that_dies_goes_on(monkeypatch, embedding, tmp_path):
    """To rounding: sums on a GPU are not always in one order."""
    options = replace(DOUBLE, epochs=45, average=0.9)
    expected, first = on(GPU, Objective("estimated"), options, DROPPING, count=2, embedding=embedding)
    train_epoch = loop._Run._train_epoch

    def dying(self):
        if self.epoch == 30:
            raise Interrupted
        train_epoch(self)

    def call():
        members = to(GPU, make_members(2, DROPPING, n=(120, 60), dtype=torch.float64, embedding=embedding))
        histories = train(members, Objective("estimated"), options, checkpoint=Checkpoint(tmp_path / "here", every=0))
        return histories, [member.network.cpu() for member in members]

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_train_epoch", dying)
        with pytest.raises(Interrupted):
            call()
    assert (tmp_path / "here.safetensors").is_file()
    found, second = call()
    for one, other in zip(expected, found, strict=True):
        assert agree(one, other, 1e-8)
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(values_of(one), values_of(other), atol=1e-8)


def test_mixed_precision_is_close_to_single():
    losses = []
    for precision in ("float32", "bfloat16"):
        histories, _ = on(GPU, Objective(), replace(TEN, precision=precision, batch_size=None), DROPPING, count=2)
        losses.append([record["loss"] for history in histories for record in history.epochs])
    assert losses[1] == pytest.approx(losses[0], abs=0.1)
    assert losses[1] != losses[0]


def test_ensembles_through_the_estimator():
    terms = make_terms((120, 60))
    low, high = (term.input.sigmoid() for term in terms)
    data = MultilevelData.from_arrays([(low, terms[0].fine), (high, terms[1].fine, terms[1].coarse)])
    theta, x = torch.linspace(0.1, 0.9, 5)[:, None], torch.tensor([0.2, 0.4])
    found = []
    for device in ("cpu", "cuda"):
        npe = NPE(BoxPrior([0.0], [1.0]), density=SMALL, training=replace(TEN, epochs=5), device=device, seed=1)
        found.append(npe.fit(data, ensemble=3, progress=False).posterior(x).log_prob(theta))
    assert torch.allclose(*found, atol=1e-3)


@pytest.mark.parametrize("n", [(200_000,), (150_000, 50_000)])
def test_an_error_of_the_device_says_what_fits(n):
    total = torch.cuda.get_device_properties(GPU).total_memory
    terms = make_terms(n)

    def call(size):
        network = make_network(NSF(transforms=4, hidden=64)).to(GPU)
        options = TrainingOptions(epochs=2, batch_size=size)
        return train([Member(network, terms, [], 0)], options=options)

    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (held + 2**29) / total))
    try:
        message = message_of(lambda: call(None))
        assert f"ran out of memory with {sum(n)} rows" in message
        advised = int(message.rpartition("batch_size=")[2].rstrip("."))
        assert 0 < advised < sum(n)
        history, = call(advised)
        assert len(history.epochs) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
