import itertools
import math

import pytest
import torch
from torch import nn
from trainings import (
    DROPPING,
    MIXTURE,
    SMALL,
    ForeignDropout,
    agree,
    loss_of,
    make_members,
    make_network,
    make_terms,
    spoil,
    train,
    values_of,
)

from mlsbi import NPE, BoxPrior, MLPEmbedding, MultilevelData, TransferLearning
from mlsbi.density.flows import MAF, NSF
from mlsbi.training import loop
from mlsbi.training.descent import Objective
from mlsbi.training.history import TrainingError
from mlsbi.training.members import at_once
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions
from mlsbi.training.stack import Stack, refusal

OBJECTIVES = {
    "unit": Objective(), "estimated": Objective("estimated"), "adjusted": Objective(rescale=True, project=True),
    "penalised": Objective(difference_penalty=2.0), "limited": Objective((0.7,), correction_limit=0.3),
}
BUILDERS = {"nsf": DROPPING, "maf": MAF(transforms=2, hidden=8, dropout=0.2), "mdn": MIXTURE}
FOUR = TrainingOptions(epochs=4, patience=50, batch_size=64, precision="float64")


def both(make, objective=None, options=FOUR, **more):
    """Histories and members, trained in one go and one after the other."""
    found = []
    for together in (True, False):
        members = make()
        named = {name: getattr(options, name) for name in options.__dataclass_fields__} | {"together": together}
        found.append((train(members, objective, TrainingOptions(**named), **more), members))
    return found


def differ_by_rounding(found, tolerance, epochs=None):
    (one, first), (other, second) = found
    assert all(agree(*pair, tolerance, epochs) for pair in zip(one, other, strict=True))
    if epochs is None:
        for a, b in zip(first, second, strict=True):
            assert torch.allclose(values_of(a.network), values_of(b.network), rtol=tolerance, atol=tolerance)
    tables = [history.epochs[0]["loss"] for history in one]
    assert len(set(tables)) == len(tables)  # members are different ones


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS)
def test_members_in_one_go_are_those_trained_one_after_the_other(builder, objective):
    found = both(lambda: make_members(3, builder, n=(90, 40), dtype=torch.float64), objective)
    differ_by_rounding(found, 1e-9)
    assert found[0][0][0].notes == found[1][0][0].notes == ()


@pytest.mark.parametrize(("builder", "objective"), [
    (DROPPING, Objective("estimated")), (DROPPING, OBJECTIVES["adjusted"]), (MIXTURE, OBJECTIVES["penalised"]),
])
@pytest.mark.parametrize("batch_size", [None, 64])
@pytest.mark.parametrize("average", [0.0, 0.9])
def test_in_single_precision_the_first_epochs_agree(builder, objective, batch_size, average):
    options = TrainingOptions(epochs=3, batch_size=batch_size, average=average)
    differ_by_rounding(both(lambda: make_members(3, builder, n=(90, 40)), objective, options), 1e-4, 3)


def test_three_levels_go_together():
    found = both(lambda: make_members(2, DROPPING, n=(90, 40, 20), dtype=torch.float64),
                 Objective("estimated", rescale=True, project=True, correction_limit=1.0, difference_penalty=1.0))
    differ_by_rounding(found, 1e-9)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_until_all_have_stopped(precision):
    """Up to the end in double precision; in single precision chance takes over, but what stops is the same rule."""
    options = TrainingOptions(epochs=80, patience=6, learning_rate=0.03, batch_size=None, precision=precision)
    dtype = torch.float64 if precision == "float64" else torch.float32
    found = both(lambda: make_members(3, MIXTURE, n=(60, 20), dtype=dtype), Objective(), options)
    if precision == "float64":
        differ_by_rounding(found, 1e-6)
    for histories, members in found:
        for history, member in zip(histories, members, strict=True):
            assert len(history.epochs) - 1 - history.best_epoch == 6
            assert loss_of(member.network, member.validation) == pytest.approx(history.best_loss, abs=1e-5)


def test_members_that_stop_are_let_go_and_keep_their_best(monkeypatch):
    sizes = []
    step = loop._Run._step

    def watch(self, rows, weights):
        sizes.append(len(self.descent.flat))
        assert len(rows.input) == len(weights) == len(self.stack) == sizes[-1]
        return step(self, rows, weights)

    monkeypatch.setattr(loop._Run, "_step", watch)
    members = make_members(4, MIXTURE, n=(60, 20))
    options = TrainingOptions(epochs=200, patience=6, learning_rate=0.03, batch_size=None)
    histories = train(members, Objective("estimated"), options)
    ends = sorted(len(history.epochs) for history in histories)
    assert len(set(ends)) > 2
    assert sizes == [4] * ends[0] + [3] * (ends[1] - ends[0]) + [2] * (ends[2] - ends[1]) + [1] * (ends[3] - ends[2])
    for history in histories:
        values = history.to_frame()["validation_loss"]
        assert history.best_loss == values.min() == values[history.best_epoch]
        assert history.stopped == "no better held-out loss for 6 epochs"


@pytest.mark.parametrize("beside", [[1], [0, 1], [1, 2], [2, 1, 0]])
def test_a_member_does_not_depend_on_who_is_beside_it(beside):
    options = TrainingOptions(epochs=25, patience=4, learning_rate=0.02, batch_size=64, precision="float64",
                              together=True)
    whole = make_members(3, DROPPING, n=(90, 40), dtype=torch.float64)
    expected = train(whole, Objective("estimated"), options)
    again = make_members(3, DROPPING, n=(90, 40), dtype=torch.float64)
    found = train([again[at] for at in beside], Objective("estimated"), options)
    assert agree(expected[1], found[beside.index(1)], 1e-6)
    assert expected[1].best_epoch == found[beside.index(1)].best_epoch
    assert torch.allclose(values_of(whole[1].network), values_of(again[1].network), atol=1e-6)


def body(member, dtype=torch.float64):
    """An embedding, initialised for a member."""
    with torch.random.fork_rng():
        torch.manual_seed(member)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh()).to(dtype)


def test_what_is_frozen_may_differ_between_members():
    def make():
        members = make_members(3, SMALL, n=(90, 40), embedding=body, dtype=torch.float64)
        for member in members:
            member.network.embedding[0].weight.requires_grad = False
        return members

    fresh, found = make(), both(make)
    differ_by_rounding(found, 1e-9)
    for before, after in zip(fresh, found[0][1], strict=True):
        linear, tuned = before.network.embedding[0], after.network.embedding[0]
        assert torch.equal(linear.weight, tuned.weight)
        assert not torch.equal(linear.bias, tuned.bias)


def test_buffers_may_differ_between_members():
    class Shift(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.register_buffer("by", torch.full((2,), float(by), dtype=torch.float64))

        def forward(self, x):
            return x + self.by

    differ_by_rounding(both(lambda: make_members(3, SMALL, n=(90, 40), embedding=Shift, dtype=torch.float64)), 1e-9)


@pytest.mark.parametrize("strategy", [TransferLearning(freeze_embedding=True), TransferLearning(align=True)])
def test_transfer_goes_together(strategy):
    found = []
    for together in (True, False):
        members = make_members(3, DROPPING, n=(90, 40), embedding=body, dtype=torch.float64)
        options = TrainingOptions(epochs=6, patience=2, learning_rate=0.01, precision="float64", together=together)
        found.append((strategy.fit(members, options=options, progress=False), members))
    differ_by_rounding(found, 1e-7)
    (histories, members), _ = found
    assert {record["stage"] for record in histories[0].epochs} == {0.0, 1.0}
    assert not torch.equal(*(member.network.embedding[0].weight for member in members[:2]))


class Tied(nn.Module):
    """Two layers with one matrix, and one that nothing reads."""

    def __init__(self, member):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(member)
            self.there, self.back, self.unread = (nn.Linear(2, 2, dtype=torch.float64) for _ in range(3))
        self.back.weight = self.there.weight

    def forward(self, x):
        return self.back(self.there(x).tanh())


@pytest.mark.parametrize("objective", [Objective(), Objective(rescale=True)])
def test_parameters_that_are_shared_or_unread(objective):
    found = both(lambda: make_members(3, MIXTURE, n=(90, 40), embedding=Tied, dtype=torch.float64), objective)
    differ_by_rounding(found, 1e-9)
    for histories, members in found:
        for history, member in zip(histories, members, strict=True):
            assert loss_of(member.network, member.validation) == pytest.approx(history.best_loss, abs=1e-9)
    for at, member in enumerate(found[0][1]):
        embedding = member.network.embedding
        assert embedding.there.weight is embedding.back.weight
        assert torch.equal(embedding.unread.weight, Tied(at).unread.weight)
        assert not torch.allclose(embedding.there.weight, Tied(at).there.weight, atol=1e-4)


class Fork(nn.Module):
    """A network whose path depends on its data, which cannot be mapped over members."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 2)

    def forward(self, x):
        return self.line(x) if x.mean() > 0 else -self.line(x)


def forked(member):
    with torch.random.fork_rng():
        torch.manual_seed(member)
        return Fork().double()


def normed(member):
    with torch.random.fork_rng():
        torch.manual_seed(member)
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()


@pytest.mark.parametrize(("embedding", "n", "why"), [
    (forked, (90, 40), "data-dependent control flow"),
    (lambda member: ForeignDropout(), (90, 40), "draws random numbers of its own"),
    (normed, (90,), "changes buffers of the network"),
])
def test_networks_that_cannot_be_mapped_are_evaluated_one_by_one_and_say_so(embedding, n, why):
    def make():
        return make_members(3, MIXTURE, n=n, embedding=embedding, dtype=torch.float64)

    (together, first), (apart, second) = both(make)
    for history in together:
        note, = history.notes
        assert note.startswith("members were evaluated one after the other: ")
        assert why in note
    assert apart[0].notes == ()  # as was asked for
    for one, other in zip(together, apart, strict=True):
        assert agree(one, other, 0.0)
    members = make()
    alone = [train([member], options=FOUR)[0] for member in members]
    for one, other in zip(together, alone, strict=True):
        assert agree(one, other, 1e-12)
    for a, b, c in zip(first, second, members, strict=True):
        assert torch.equal(values_of(a.network), values_of(b.network))
        assert torch.allclose(values_of(a.network), values_of(c.network), atol=1e-12)


def test_members_with_batch_statistics_stop_with_those_of_their_best():
    members = make_members(3, MIXTURE, n=(90,), embedding=lambda member: normed(member).float())
    options = TrainingOptions(epochs=100, patience=6, learning_rate=0.03, together=True)
    histories = train(members, options=options)
    assert len({len(history.epochs) for history in histories}) > 1
    for history, member in zip(histories, members, strict=True):
        assert history.best_epoch < len(history.epochs) - 1
        assert loss_of(member.network, member.validation) == pytest.approx(history.best_loss, abs=1e-5)


def test_a_network_of_the_library_is_not_refused():
    rows = torch.zeros(4, 1), torch.zeros(4, 2)
    for builder in (SMALL, MAF(transforms=2, hidden=8), MIXTURE):
        assert refusal(make_network(builder), *rows, {}) is None
    assert refusal(make_network(SMALL, embedding=Fork()), *rows, {}) is not None


def test_asking_leaves_a_network_as_it_was():
    network = make_network(SMALL, embedding=nn.BatchNorm1d(2))
    before = values_of(network)
    refusal(network, torch.zeros(4, 1), torch.ones(4, 2), {})
    assert torch.equal(before, values_of(network))


def zeros(n):
    return [Term(torch.zeros(rows, 1), torch.zeros(rows, 2), torch.zeros(rows, 2) if level else None)
            for level, rows in enumerate(n)]


@pytest.mark.parametrize(("n", "batch_size", "device", "expected"), [
    ((1000, 100), None, "cpu", 27),  # 1200 rows in all halves, of which 32768 go at once
    ((4096,), None, "cpu", 8),
    ((4097,), None, "cpu", 1),
    ((4000, 100), None, "cpu", 1),
    ((4000, 100), 1000, "cpu", 31),
    ((4000, 100), "auto", "cpu", 31),
    ((40_000, 100), "auto", "cpu", 15),  # 2048 rows a step
    ((40_000, 100), 10_000, "cpu", 1),
    ((40_000, 100), None, "cuda", 100),
])
def test_small_steps_go_together(n, batch_size, device, expected):
    terms, device = zeros(n), torch.device(device)
    assert at_once(terms, 100, TrainingOptions(batch_size=batch_size), device) == expected
    assert at_once(terms, 5, TrainingOptions(batch_size=batch_size), device) == min(expected, 5)
    for together in (True, False):
        asked = TrainingOptions(batch_size=batch_size, together=together)
        assert at_once(terms, 5, asked, device) == (5 if together else 1)
        assert at_once(terms, 1, asked, device) == 1
    assert at_once(terms, 1, TrainingOptions(batch_size=batch_size), device) == 1


def test_copies_of_large_data_do_not_go_together():
    image = torch.zeros(1, 1).expand(1, 1 << 20)
    terms = [Term(torch.zeros(40, 1), image.expand(40, -1))]  # 40 million numbers each, without the memory
    for device in ("cpu", "cuda"):
        assert at_once(terms, 100, TrainingOptions(batch_size=10), torch.device(device)) == 6
    one = [Term(torch.zeros(400, 1), image.expand(400, -1))]
    assert at_once(one, 100, TrainingOptions(batch_size=10), torch.device("cuda")) == 1


def toy_data(n=(100, 24)):
    levels = []
    for level, term in enumerate(make_terms(n)):
        theta = term.input.sigmoid()
        levels.append((theta, term.fine, term.coarse) if level else (theta, term.fine))
    return MultilevelData.from_arrays(levels)


@pytest.mark.parametrize("strategy", ["multilevel", "transfer", "high"])
def test_ensembles_are_the_same_either_way(strategy):
    data, prior = toy_data(), BoxPrior([0.0], [1.0])
    theta, x = torch.linspace(0.05, 0.95, 7)[:, None], torch.tensor([0.3, 0.1])
    found = []
    for together in (True, False, "auto"):
        options = TrainingOptions(epochs=6, patience=2, learning_rate=5e-3, together=together)
        npe = NPE(prior, strategy=strategy, density=NSF(transforms=2, hidden=8, bins=3, dropout=0.1), training=options,
                  embedding=MLPEmbedding(3, 8, 1), seed=4).fit(data, ensemble=3, progress=False)
        found.append((npe.posterior(x).log_prob(theta), npe.histories))
    (first, histories), *others = found
    for log_prob, own in others:
        assert torch.allclose(first, log_prob, atol=1e-4)
        assert [history.best_epoch for history in own] == [history.best_epoch for history in histories]
    assert len({history.best_loss for history in histories}) == 3
    assert torch.equal(first, others[1][0])  # so little data goes together by itself


def test_one_member_that_diverges_is_an_error(monkeypatch):
    members = make_members(3, MIXTURE)
    spoil(monkeypatch, after=0, network=members[1].network)
    with pytest.raises(TrainingError, match=r"no weights of network 2 of 3 to keep.*Lower the learning rate"):
        train(members)


def test_one_member_that_explodes_later_keeps_its_best_and_leaves_the_others_alone(monkeypatch):
    options = TrainingOptions(epochs=8, batch_size=None, precision="float64")
    expected = train(make_members(3, MIXTURE, dtype=torch.float64), options=options)
    members = make_members(3, MIXTURE, dtype=torch.float64)
    spoil(monkeypatch, after=4, network=members[1].network)
    found = train(members, options=options)
    assert [len(history.epochs) for history in found] == [8, 5, 8]
    assert "stopped being finite" in found[1].stopped
    for at in (0, 2):
        assert agree(expected[at], found[at], 1e-9)
    assert agree(expected[1], found[1], 1e-9, 4)
    assert math.isnan(found[1].epochs[4]["validation_loss"])
    assert loss_of(members[1].network, members[1].validation) == pytest.approx(found[1].best_loss, abs=1e-9)


def owns_its_memory(network):
    """Whether no parameter is a part of something larger, or shared."""
    values = list(network.parameters()) + list(network.buffers())
    places = {value.untyped_storage().data_ptr() for value in values if value.numel()}
    return len(places) == sum(value.numel() > 0 for value in values) and all(
        value.untyped_storage().nbytes() == value.numel() * value.element_size() for value in values)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("builder", [DROPPING, MIXTURE])
def test_networks_own_their_memory_afterwards(together, builder):
    """Those that were let go early too: what comes of one must not change another, or be saved with it."""
    members = make_members(4, builder, n=(60, 20))
    options = TrainingOptions(epochs=40, patience=3, learning_rate=0.05, together=together)
    histories = train(members, options=options)
    assert len({len(history.epochs) for history in histories}) > 1
    for member in members:
        assert owns_its_memory(member.network)
        assert all(parameter.grad is None for parameter in member.network.parameters())
        assert not any(name.endswith("keep") and value.numel() for name, value in member.network.named_buffers())


@pytest.mark.parametrize("together", [True, False])
def test_networks_own_their_memory_after_an_error(monkeypatch, together):
    members = make_members(3, DROPPING)
    spoil(monkeypatch, after=2, network=members[1].network)
    monkeypatch.setattr(loop._Run, "_deliver", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(members, options=TrainingOptions(epochs=4, together=together))
    assert all(owns_its_memory(member.network) for member in members)


def test_parameters_are_read_and_written_as_rows_of_one_matrix():
    networks = [make_network(SMALL, seed, spread=0.1) for seed in range(3)]
    networks[0].density.flow._transform._transforms[1].bias.requires_grad = False
    for network in networks[1:]:
        network.density.flow._transform._transforms[1].bias.requires_grad = False
    stack = Stack(networks)
    flat = stack.read()
    assert flat.shape == (3, sum(p.numel() for p in networks[0].parameters() if p.requires_grad))
    others = [make_network(SMALL, seed, spread=0.1) for seed in (7, 8, 9)]
    for network in others:
        network.density.flow._transform._transforms[1].bias.requires_grad = False
    Stack(others).write(flat)
    for one, other in itertools.product(range(3), range(3)):
        same = all(torch.equal(a, b) for a, b in zip(networks[one].parameters(), others[other].parameters(),
                                                     strict=True) if a.requires_grad)
        assert same is (one == other)
    assert torch.equal(Stack(others).read(), flat)
