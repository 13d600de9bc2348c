import math
import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from trainings import (
    DROPPING,
    MIXTURE,
    SMALL,
    ForeignDropout,
    fit,
    loss_of,
    make_descent,
    make_members,
    make_network,
    make_terms,
    spoil,
    train,
    values_of,
)

from mlsbi.density.flows import NSF
from mlsbi.training import loop
from mlsbi.training.descent import Descent, Objective
from mlsbi.training.history import TrainingError
from mlsbi.training.members import Member, Schedule
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions
from mlsbi.training.plan import Rows

OBJECTIVES = [Objective(), Objective(rescale=True, project=True), Objective("estimated")]
ONES = torch.ones(1, 2)


def test_training_lowers_the_held_out_loss():
    options = TrainingOptions(epochs=60, learning_rate=1e-2, batch_size=None)
    network, history, held = fit(options=options)
    assert history.best_loss < history.epochs[0]["validation_loss"] - 0.3
    assert loss_of(network, held) == pytest.approx(history.best_loss, abs=1e-5)
    assert not network.training


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_best_weights_are_really_restored(objective):
    # A step size that overshoots: the last weights are worse than the best ones.
    options = TrainingOptions(epochs=300, patience=15, learning_rate=0.05, batch_size=None)
    network, history, held = fit(objective, options, network=make_network(MIXTURE))
    assert 0 < history.best_epoch < len(history.epochs) - 1
    values = history.to_frame()["validation_loss"]
    assert history.best_loss == values.min() == values[history.best_epoch]
    assert history.best_loss < values.iloc[-1]
    assert history.stages == (history.best_epoch,)
    if objective.weights == "unit":
        assert loss_of(network, held) == pytest.approx(history.best_loss, abs=1e-5)
    assert history.stopped == "no better held-out loss for 15 epochs"


def test_patience_counts_from_the_best_epoch():
    options = TrainingOptions(epochs=200, patience=7, learning_rate=0.05, batch_size=None)
    _, history, _ = fit(options=options, network=make_network(MIXTURE))
    assert len(history.epochs) - 1 - history.best_epoch == 7


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("batch_size", [None, 64])
def test_a_seed_reproduces_and_another_differs(objective, batch_size):
    options = TrainingOptions(epochs=2, batch_size=batch_size)
    first, again, other = (fit(objective, options, network=make_network(DROPPING), seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(values_of(first), values_of(again))
    assert not torch.equal(values_of(first), values_of(other))


@pytest.mark.parametrize("embedding", [None, ForeignDropout()])
def test_global_random_state_is_left_alone(embedding):
    before = torch.get_rng_state()
    fit(network=make_network(DROPPING, embedding=embedding))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("embedding", [None, ForeignDropout()], ids=["masks", "seeds"])
@pytest.mark.parametrize("objective", [Objective(), Objective(rescale=True)])
@pytest.mark.parametrize("together", [False, True])
def test_identical_halves_cancel_under_dropout(embedding, objective, together):
    """With one mask a pair of equal halves has equal losses and no slope."""
    terms = make_terms(dtype=torch.float64)
    twin = [terms[0], Term(terms[1].input, terms[1].fine, terms[1].fine)]
    network = make_network(DROPPING, embedding=embedding, dtype=torch.float64, spread=0.2)
    descent, plan = make_descent([network], twin, objective, together=together, draws=embedding is not None)
    step, = plan.epoch()
    losses, gradient, _ = descent.gradient(step, ONES.double(), [[5, 6]])
    own, fine, coarse = losses.split(step.sizes, 1)
    # 1e-12: both halves go through one matrix product, whose edges add up in another order.
    assert torch.allclose(fine, coarse, rtol=0, atol=1e-12)
    assert own.std() > 0.1
    lowest, _ = make_descent([network], terms[:1], draws=embedding is not None)
    masked = Rows(terms[0].input[None], terms[0].fine[None], (200,),
                  {name: mask[:, :, :200] for name, mask in step.keep.items()})
    _, alone, _ = lowest.gradient(masked, ONES[:, :1].double(), [[5]])
    assert torch.allclose(gradient, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("embedding", [None, ForeignDropout()], ids=["masks", "seeds"])
def test_halves_under_masks_of_their_own_do_not_cancel(embedding):
    terms = make_terms()
    twin = [terms[0], Term(terms[1].input, terms[1].fine, terms[1].fine)]
    network = make_network(DROPPING, embedding=embedding, spread=0.2)
    descent, plan = make_descent([network], twin)  # not told that the network draws
    step, = plan.epoch()
    for name, mask in step.keep.items():
        step.keep[name][..., -40:] = mask[..., :40]
    with torch.random.fork_rng():
        losses, _, _ = descent.gradient(step, ONES)
    _, fine, coarse = losses.split(step.sizes, 1)
    assert (fine - coarse).abs().mean() > 0.02


@pytest.mark.parametrize(("embedding", "draws"), [
    (None, False), (ForeignDropout(), True), (nn.Dropout(0.5), True), (nn.Dropout(0.0), False),
    (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), False),
])
@pytest.mark.parametrize("builder", [SMALL, DROPPING])
def test_dropout_is_found_however_it_is_written(monkeypatch, embedding, draws, builder):
    found = []
    monkeypatch.setattr(loop, "Descent", lambda *given, **named: found.append(named["draws"]) or Descent(
        *given, **named))
    fit(options=TrainingOptions(epochs=1), network=make_network(builder, embedding=embedding))
    assert found == [draws]


@pytest.mark.parametrize("builder", [SMALL, MIXTURE])
def test_gradients_by_halves_assemble_to_that_of_the_telescope(monkeypatch, builder):
    terms = make_terms((60, 30, 20), dtype=torch.float64)
    weights = torch.tensor([[0.4, 0.7, 1.0]], dtype=torch.float64)
    network = make_network(builder, dtype=torch.float64, spread=0.1)
    halves = [-network.standard_log_prob(term.input, condition).mean()
              for term in terms for condition in (term.fine, term.coarse) if condition is not None]
    total = sum(sign * half for sign, half in zip([0.4, 0.7, -0.4, 1.0, -0.7], halves, strict=True))
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(total, list(network.parameters()))])
    monkeypatch.setattr("mlsbi.training.stabilisers.rescale", lambda coarse, fine: coarse)
    for objective, recorded in ((Objective(), set()), (Objective(rescale=True), {
        "base_norm", "correction_norm", "cosine", "projected"
    })):
        descent, plan = make_descent([network], terms, objective)
        _, gradient, told = descent.gradient(next(iter(plan.epoch())), weights)
        assert torch.allclose(gradient[0], expected, rtol=0, atol=1e-10)
        assert set(told) == recorded


def test_history_records_terms_gradients_and_weights():
    _, history, _ = fit(Objective("estimated", rescale=True, project=True))
    frame = history.to_frame()
    assert {"loss", "fine_0", "fine_1", "coarse_1", "weight_0", "gradient_norm", "base_norm", "correction_norm",
            "cosine", "projected", "validation_loss"} == set(frame)
    assert frame["cosine"].between(-1, 1).all()
    assert frame["projected"].between(0, 1).all()
    assert frame["weight_0"].between(0, 1).all()
    assert frame["weight_0"].nunique() > 1
    assert (history.n_train, history.n_validation) == ((160, 32), (40, 8))
    assert history.seconds > 0


def test_plain_steps_record_the_length_of_the_gradient_alone():
    _, history, _ = fit()
    frame = history.to_frame()
    assert (frame["gradient_norm"] > 0).all()
    assert not {"cosine", "base_norm", "correction_norm", "projected"} & set(frame)


def test_three_levels():
    _, history, _ = fit(Objective("estimated", rescale=True, project=True), terms=make_terms((200, 40, 20)))
    frame = history.to_frame()
    assert {"fine_2", "coarse_2", "weight_1"} <= set(frame)
    expected = (frame["weight_0"] * frame["fine_0"] + frame["weight_1"] * frame["fine_1"]
                - frame["weight_0"] * frame["coarse_1"] + frame["fine_2"] - frame["weight_1"] * frame["coarse_2"])
    assert frame["loss"].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-5)  # float32


def test_fixed_weights_are_those_of_the_sum():
    _, history, _ = fit(Objective((0.3,)))
    frame = history.to_frame()
    assert frame["weight_0"].to_numpy() == pytest.approx(0.3)
    expected = 0.3 * frame["fine_0"] + frame["fine_1"] - 0.3 * frame["coarse_1"]
    assert frame["loss"].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-5)


@pytest.mark.parametrize("dropped", [0.0, 0.5])
def test_equal_halves_train_as_the_lowest_level_alone(dropped):
    """The correction of identical levels is nothing, also under dropout."""
    builder = NSF(transforms=2, hidden=8, bins=3, dropout=dropped)
    low = make_terms((100,), dtype=torch.float64)
    pairs = Term(low[0].input[:20], low[0].fine[:20], low[0].fine[:20])
    one, two = (make_network(builder, dtype=torch.float64, spread=0.1) for _ in range(2))
    options = TrainingOptions(epochs=3, batch_size=None, precision="float64")
    train([Member(one, low, [], 3)], options=options)
    train([Member(two, [*low, pairs], [], 3)], options=options)
    if dropped:  # the masks are drawn for more rows: others than those of the level alone, but equal within pairs
        assert not torch.allclose(values_of(one), values_of(two), atol=1e-8)
    else:
        assert torch.allclose(values_of(one), values_of(two), atol=1e-8)


def test_without_held_out_rows_all_epochs_are_run():
    members = make_members(fraction=0)
    history, = train(members)
    assert history.best_epoch == 4
    assert history.stopped == "all 5 epochs done"
    assert history.n_validation == ()
    assert math.isnan(history.epochs[0]["validation_loss"])
    assert history.best_loss == history.epochs[-1]["loss"]


def test_a_schedule_gives_the_epochs_and_the_weights():
    history, = train(make_members(fraction=0), Objective("estimated"),
                     schedule=Schedule(3, ((0.2,), (0.4,), (0.6,))))
    assert [record["weight_0"] for record in history.epochs] == pytest.approx([0.2, 0.4, 0.6])
    assert history.stopped == "all 3 epochs done"


def test_the_average_of_weights_is_what_is_scored_and_kept():
    options = TrainingOptions(epochs=8, learning_rate=0.02, batch_size=None, average=0.9)
    network, history, held = fit(options=options)
    assert loss_of(network, held) == pytest.approx(history.best_loss, abs=1e-5)
    plain, other, _ = fit(options=TrainingOptions(epochs=8, learning_rate=0.02, batch_size=None))
    # The steps are the same, what is kept of them is not.
    assert [record["loss"] for record in history.epochs] == [record["loss"] for record in other.epochs]
    assert not torch.allclose(values_of(plain), values_of(network), atol=1e-3)


def test_the_average_is_the_recursion_over_the_steps():
    terms = make_terms((40, 10), dtype=torch.float64)
    options = TrainingOptions(batch_size=None, average=0.5, precision="float64", learning_rate=0.1)
    descent, plan = make_descent([make_network(dtype=torch.float64)], terms, options=options)
    average = descent.flat.detach().clone()
    for count in range(1, 25):
        descent.step(next(iter(plan.epoch())), ONES.double())
        decay = min(0.5, count / (count + 10))
        average = decay * average + (1 - decay) * descent.flat.detach()
    assert torch.allclose(descent.current, average, atol=1e-12)
    assert not torch.allclose(descent.current, descent.flat.detach(), atol=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_steps_are_those_of_adam_on_the_clipped_gradient(decay):
    terms = make_terms((40, 10), dtype=torch.float64)
    options = TrainingOptions(batch_size=None, clip=0.2, weight_decay=decay, learning_rate=0.01)
    network, same = (make_network(dtype=torch.float64) for _ in range(2))
    descent, plan = make_descent([network], terms, options=options)
    parameters = list(same.parameters())
    adam = torch.optim.AdamW(parameters, lr=0.01, weight_decay=decay)
    for _ in range(4):
        step = descent.step(next(iter(plan.epoch())), ONES.double())
        adam.zero_grad()
        low = -same.standard_log_prob(terms[0].input, terms[0].fine).mean()
        fine, coarse = (-same.standard_log_prob(terms[1].input, half).mean()
                        for half in (terms[1].fine, terms[1].coarse))
        (low + fine - coarse).backward()
        length = nn.utils.clip_grad_norm_(parameters, 0.2)
        assert step.recorded["gradient_norm"].item() == pytest.approx(length.item(), rel=1e-9)
        assert length > 0.2
        adam.step()
    descent.stack.write(descent.current)
    assert torch.allclose(values_of(network), values_of(same), atol=1e-9)


@pytest.mark.parametrize("builder", [MIXTURE, DROPPING])
def test_a_network_that_explodes_keeps_its_best_weights(monkeypatch, builder):
    spoil(monkeypatch, after=3)
    network, history, held = fit(options=TrainingOptions(epochs=10, batch_size=None), network=make_network(builder))
    assert "stopped being finite" in history.stopped
    assert len(history.epochs) == 4  # the epoch whose step spoils the network is the last
    assert bool(values_of(network).isfinite().all())
    assert history.best_epoch < 3
    assert loss_of(network, held) == pytest.approx(history.best_loss, abs=1e-5)


def test_a_network_that_explodes_keeps_its_last_weights_without_held_out_rows(monkeypatch):
    spoil(monkeypatch, after=3)
    members = make_members(fraction=0)
    history, = train(members, options=TrainingOptions(epochs=10, batch_size=None))
    assert "stopped being finite" in history.stopped
    assert history.best_epoch == 2
    assert bool(values_of(members[0].network).isfinite().all())


def test_training_that_diverges_at_once_is_an_error():
    with pytest.raises(TrainingError, match="Lower the learning rate"):
        fit(options=TrainingOptions(epochs=5, learning_rate=1e30, clip=1e9, batch_size=None))


def test_a_held_out_loss_that_is_never_finite_is_an_error_that_says_so():
    kept, held = make_terms(), make_terms((40, 8), seed=3)
    held[1].fine.fill_(math.inf)
    with pytest.raises(TrainingError, match="held-out loss was never finite"):
        train([Member(make_network(MIXTURE), kept, held, 0)])


def test_extreme_x_is_an_error_not_a_nan_network():
    terms = make_terms()
    terms[0] = Term(terms[0].input, terms[0].fine * 1e38)
    with pytest.raises(TrainingError, match=r"not finite before training has begun: \d+ of 224 rows"):
        fit(terms=terms)


class Gap(nn.Module):
    """A normal density that is not defined above 1."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1))

    def log_prob(self, input, condition):
        found = -0.5 * (input - self.mean).square().sum(1)
        return torch.where(input[:, 0] > 1, math.nan, found)

    def sample(self, n, condition):
        return self.mean.expand(n, len(condition), 1)


@dataclass(frozen=True)
class GapBuilder:
    def __call__(self, dim, condition_dim):
        return Gap()


def test_a_density_without_a_value_on_some_rows_is_an_error_that_counts_them():
    member, = make_members(builder=GapBuilder())
    low, high = (int((term.input > 1).sum()) for term in member.train)
    assert low
    assert high
    with pytest.raises(TrainingError, match=re.escape(f"{low + 2 * high} of 224 rows")):
        train([member])


@pytest.mark.parametrize(
    ("objective", "terms", "match"),
    [
        ((1.0, 1.0), None, "Expected 1 weights"),
        ((), None, "Expected 1 weights"),
        ("estimated", make_terms((50, 2)), "at least 2 training rows a term"),
    ],
)
def test_weights_that_do_not_fit_the_terms(objective, terms, match):
    with pytest.raises(ValueError, match=match):
        fit(Objective(objective), terms=terms)


@pytest.mark.parametrize(("given", "match"), [
    ({"weights": "best"}, '"unit", "estimated" or numbers'),
    ({"correction_limit": 0.0}, "correction_limit > 0"),
    ({"difference_penalty": -1.0}, "difference_penalty >= 0"),
    ({"difference_penalty": math.nan}, "difference_penalty >= 0"),
])
def test_bad_objectives(given, match):
    with pytest.raises(ValueError, match=match):
        Objective(**given)


def normed():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_batch_normalisation_is_refused_with_levels():
    with pytest.raises(ValueError, match="Batch normalisation"):
        fit(network=make_network(MIXTURE, embedding=normed()))


def test_batch_statistics_are_restored_with_the_best_weights():
    options = TrainingOptions(epochs=300, patience=15, learning_rate=0.05, batch_size=None)
    network, history, held = fit(options=options, network=make_network(MIXTURE, embedding=normed()),
                                 terms=make_terms((200,)))
    assert history.best_epoch < len(history.epochs) - 1
    assert loss_of(network, held) == pytest.approx(history.best_loss, abs=1e-5)
    assert network.embedding[1].num_batches_tracked.item() >= history.best_epoch + 1
    network.embedding[1].running_mean += 0.1  # negative control
    assert loss_of(network, held) != pytest.approx(history.best_loss, abs=1e-4)


class Running(nn.Module):
    """Centres by a running mean, as a network of a user's own may."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        found = self.line(x)
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * found.detach().mean(0)
        return found - self.mean


@pytest.mark.parametrize("embedding", [
    nn.BatchNorm1d(2), Running(), nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)),
    nn.Sequential(nn.Unflatten(1, (1, 2)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten()),
], ids=["batch norm", "running mean", "spectral norm", "instance norm"])
def test_whatever_training_changes_is_that_of_the_best_weights(embedding):
    options = TrainingOptions(epochs=100, patience=10, learning_rate=0.1, batch_size=None)
    network, history, held = fit(options=options, network=make_network(MIXTURE, embedding=embedding),
                                 terms=make_terms((200,)))
    assert history.best_epoch < len(history.epochs) - 1
    assert loss_of(network, held) == pytest.approx(history.best_loss, abs=1e-5)


def test_looking_at_a_network_leaves_its_batch_statistics_alone():
    """After one full batch they are those of that batch, and of nothing else."""
    terms = make_terms((200,))
    network = make_network(MIXTURE, embedding=normed())
    linear, norm = network.embedding
    expected = 0.1 * linear(terms[0].fine).mean(0)  # momentum .1, from zero
    train([Member(network, terms, [], 0)], options=TrainingOptions(epochs=1, batch_size=None))
    assert norm.num_batches_tracked.item() == 1
    assert torch.allclose(norm.running_mean, expected, atol=1e-6)


def test_an_embedding_of_which_nothing_is_trained_stays_in_eval_mode():
    body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    body.requires_grad_(requires_grad=False)
    network = make_network(MIXTURE, embedding=body)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    _, history, _ = fit(network=network, terms=make_terms((200,)))
    assert all(torch.equal(before[name], value) for name, value in network.embedding.state_dict().items())
    assert len(history.epochs) == 5


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.0}, {"epochs": 0}, {"patience": 0}, {"batch_size": 0}, {"validation_fraction": 1.0},
     {"clip": -1.0}, {"weight_decay": -0.1}, {"average": 1.0}, {"average": -0.1}, {"batch_size": "all"},
     {"epochs": 2.5}, {"together": "yes"}, {"compile": "always"}, {"cross_fit": 5}, {"precision": "float16"}],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match="Expected"):
        TrainingOptions(**options)


def test_cross_fitting_needs_rows_to_hold_out():
    with pytest.raises(ValueError, match="needs rows to hold out"):
        TrainingOptions(cross_fit=True, validation_fraction=0)
    assert TrainingOptions(cross_fit="auto", validation_fraction=0).cross_fit == "auto"


def test_the_bar_is_called_as_asked_and_says_how_many_networks_are_left(capsys):
    train(make_members(2, MIXTURE), options=TrainingOptions(epochs=3, batch_size=None), show=True, label="fitting")
    told = capsys.readouterr().err
    assert "fitting" in told
    assert "/3" in told
    train(make_members(2, MIXTURE))
    assert capsys.readouterr() == ("", "")


class Cliff(nn.Module):
    """A normal density that is not defined once its mean is beyond 0.05; descent takes it there."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1))

    def log_prob(self, input, condition):
        return torch.where(self.mean < 0.05, -0.5 * (input - self.mean + 1).square().sum(1), math.nan)


@dataclass(frozen=True)
class CliffBuilder:
    def __call__(self, dim, condition_dim):
        return Cliff()


@pytest.mark.parametrize("epochs", [3, 20])
def test_without_held_out_rows_parameters_without_a_finite_loss_are_not_kept(epochs):
    """The loss of an epoch is that of the parameters before its last step, not of those after it."""
    member, = make_members(builder=CliffBuilder(), n=(50,), fraction=0)
    history, = train([member], options=TrainingOptions(epochs=epochs, learning_rate=0.02, batch_size=None))
    assert math.isfinite(loss_of(member.network, member.train))
    assert 0 < member.network.density.mean.item() < 0.05
    assert history.best_epoch == 1  # steps of 0.02: the third goes too far
    assert history.best_loss == history.epochs[1]["loss"]


def test_weights_estimated_on_rows_trained_on_are_told():
    history, = train(make_members(builder=MIXTURE, fraction=0), Objective("estimated"))
    assert history.notes == ("weights were estimated on rows trained on, for none were held out",)
