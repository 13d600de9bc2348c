import math

import pytest
import torch
from torch import nn

from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.flows import NSF
from mlsbi.density.standardise import Standardiser
from mlsbi.training.loop import Objective, TrainingOptions, _Trainer, minimise
from mlsbi.training.objective import Term, split_terms, telescope

QUICK = TrainingOptions(epochs=5, batch_size=None)


def make_terms(n=(200, 40), seed=0):
    g = torch.Generator().manual_seed(seed)
    terms = []
    for level, rows in enumerate(n):
        z = torch.randn(rows, 1, generator=g)
        u = 0.3 * torch.randn(rows, 2, generator=g)
        fine, coarse = z + u, z + 0.2 + u
        terms.append(Term(z, fine, coarse) if level else Term(z, coarse))
    return terms


def make_network(builder=None, seed=0, embedding=None):
    scalers = Standardiser(torch.zeros(1), torch.ones(1)), Standardiser(torch.zeros(2), torch.ones(2))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConditionalDensity(builder or NSF(transforms=2, hidden=16), *scalers, embedding)


def fit(objective=None, options=QUICK, network=None, terms=None, seed=1):
    network = network or make_network()
    kept, held = split_terms(terms or make_terms(), 0.2, torch.Generator().manual_seed(0))
    history = minimise(network, kept, held, objective=objective or Objective(), options=options, seed=seed,
                       progress=False)
    return network, history, held


def held_out_loss(network, held):
    losses = []
    with torch.no_grad():
        for term in held:
            losses.append(-network.standard_log_prob(term.input, term.fine))
            if term.coarse is not None:
                losses.append(-network.standard_log_prob(term.input, term.coarse))
    return float(telescope(losses, [1.0] * len(held)))


def test_training_lowers_the_held_out_loss():
    options = TrainingOptions(epochs=60, learning_rate=3e-3, batch_size=None)
    network, history, held = fit(options=options)
    assert history.best_loss < history.epochs[0]["validation_loss"] - 0.3
    assert held_out_loss(network, held) == pytest.approx(history.best_loss, abs=1e-5)


@pytest.mark.parametrize("objective", [Objective(), Objective(rescale=True, project=True), Objective("estimated")])
def test_the_best_weights_are_really_restored(objective):
    # A step size that overshoots: the last weights are worse than the best ones.
    options = TrainingOptions(epochs=300, patience=15, learning_rate=0.05, batch_size=None)
    network, history, held = fit(objective, options)
    assert 0 < history.best_epoch < len(history.epochs) - 1
    values = history.to_frame()["validation_loss"]
    assert history.best_loss == values.min() == values[history.best_epoch]
    assert history.best_loss < values.iloc[-1]
    if objective.weights == "unit":
        assert held_out_loss(network, held) == pytest.approx(history.best_loss, abs=1e-4)
    assert "no better held-out loss" in history.stopped


def test_patience_counts_from_the_best_epoch():
    options = TrainingOptions(epochs=200, patience=7, learning_rate=0.05, batch_size=None)
    _, history, _ = fit(options=options)
    assert len(history.epochs) - 1 - history.best_epoch == 7


@pytest.mark.parametrize("objective", [Objective(), Objective(rescale=True, project=True), Objective("estimated")])
@pytest.mark.parametrize("batch_size", [None, 64])
def test_a_seed_reproduces_and_another_differs(objective, batch_size):
    options = TrainingOptions(epochs=3, batch_size=batch_size)
    first, again = (fit(objective, options, network=make_network(NSF(transforms=1, dropout=0.2)))[0] for _ in range(2))
    other = fit(objective, options, network=make_network(NSF(transforms=1, dropout=0.2)), seed=2)[0]
    same = [torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True)]
    different = [torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True)]
    assert all(same)
    assert not all(different)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    fit(network=make_network(NSF(transforms=1, dropout=0.3)))
    assert torch.equal(before, torch.get_rng_state())


def test_identical_halves_cancel_exactly_under_dropout():
    """With one mask a pair of equal halves has equal losses; with two masks it has not."""
    terms = make_terms()
    twin = [terms[0], Term(terms[1].input, terms[1].fine, terms[1].fine)]
    network = make_network(NSF(transforms=2, hidden=32, dropout=0.5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    for objective in (Objective(), Objective(rescale=True)):
        trainer = _Trainer(network, twin, [], objective, QUICK, torch.device("cpu"))
        network.train()
        with torch.random.fork_rng():
            halves, _ = trainer._step(next(trainer._batches()), [1.0, 1.0], record=False)
        assert torch.equal(halves[1], halves[2])
    trainer.paired = False  # negative control
    network.train()
    with torch.random.fork_rng():
        halves, _ = trainer._step(next(trainer._batches()), [1.0, 1.0], record=False)
    assert not torch.equal(halves[1], halves[2])


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


def test_dropout_is_found_however_it_is_written():
    terms = make_terms()
    for embedding, paired in ((None, False), (FunctionalDropout(), True), (nn.Dropout(0.0), False)):
        network = make_network(embedding=embedding)
        with torch.random.fork_rng():
            assert _Trainer(network, terms, [], Objective(), QUICK, torch.device("cpu")).paired is paired


def test_adjusted_and_plain_steps_agree_when_nothing_is_adjusted():
    """The gradient assembled from the halves is that of the telescope."""
    terms = make_terms()
    network = make_network()
    trainer = _Trainer(network, terms, [], Objective(), QUICK, torch.device("cpu"))
    batch = next(trainer._batches())
    losses = trainer._losses(batch)
    exact = torch.autograd.grad(telescope(losses, [0.4, 1.0]), trainer.parameters, allow_unused=True)
    _, halves = trainer._gradients(batch)
    flat = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                      for p, g in zip(trainer.parameters, exact, strict=True)])
    assembled = 0.4 * halves[0] + halves[1] - 0.4 * halves[2]
    assert torch.allclose(flat, assembled, atol=1e-5)  # float32, summed in another order


def test_history_records_terms_gradients_and_weights():
    _, history, _ = fit(Objective("estimated", rescale=True, project=True))
    frame = history.to_frame()
    assert {"loss", "fine_0", "fine_1", "coarse_1", "weight_0", "base_norm", "correction_norm", "cosine", "projected",
            "validation_loss"} <= set(frame)
    assert frame["cosine"].between(-1, 1).all()
    assert frame["projected"].between(0, 1).all()
    assert frame["weight_0"].between(0, 1).all()
    assert (history.n_train, history.n_validation) == ((160, 32), (40, 8))


def test_plain_steps_record_gradients_now_and_then():
    _, history, _ = fit(options=TrainingOptions(epochs=21, batch_size=None, patience=21))
    recorded = history.to_frame()["cosine"].notna()
    assert recorded[[0, 20]].all()
    assert recorded.sum() == 2


def test_three_levels():
    g = torch.Generator().manual_seed(0)
    top = Term(torch.randn(20, 1, generator=g), torch.randn(20, 2, generator=g), torch.randn(20, 2, generator=g))
    _, history, _ = fit(Objective("estimated", rescale=True, project=True), terms=[*make_terms(), top])
    frame = history.to_frame()
    assert {"fine_2", "coarse_2", "weight_1"} <= set(frame)
    expected = (frame["weight_0"] * frame["fine_0"] + frame["weight_1"] * frame["fine_1"]
                - frame["weight_0"] * frame["coarse_1"] + frame["fine_2"] - frame["weight_1"] * frame["coarse_2"])
    assert frame["loss"].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-6)


def test_minibatches_use_every_row_and_keep_pairs():
    terms = make_terms(n=(500, 100))
    trainer = _Trainer(make_network(), terms, [], Objective(), TrainingOptions(batch_size=150), torch.device("cpu"))
    seen = [[], []]
    for batch in trainer._batches():
        (i0, _), (i1, c1), (i2, c2) = batch.halves()
        assert torch.equal(i1, i2)
        for row, fine, coarse in zip(i1, c1, c2, strict=True):
            index = int((terms[1].input == row).all(1).nonzero())
            assert torch.equal(terms[1].fine[index], fine)
            assert torch.equal(terms[1].coarse[index], coarse)
        seen[0] += i0.flatten().tolist()
        seen[1] += i1.flatten().tolist()
    assert set(seen[0]) == set(terms[0].input.flatten().tolist())
    assert set(seen[1]) == set(terms[1].input.flatten().tolist())


def test_without_held_out_rows_all_epochs_are_run():
    history = minimise(make_network(), make_terms(), [], objective=Objective(), options=QUICK, seed=0, progress=False)
    assert history.best_epoch == 4
    assert history.stopped == "all 5 epochs done"
    assert math.isnan(history.epochs[0]["validation_loss"])


def test_a_network_that_explodes_keeps_its_best_weights(monkeypatch):
    step = _Trainer._step

    def explode(self, batch, weights, *, record):
        if len(self.history.epochs) == 3:
            next(iter(self.parameters)).data.fill_(math.nan)
        return step(self, batch, weights, record=record)

    monkeypatch.setattr(_Trainer, "_step", explode)
    network, history, _ = fit(options=TrainingOptions(epochs=10, batch_size=None))
    assert "stopped being finite" in history.stopped
    assert all(bool(torch.isfinite(p).all()) for p in network.parameters())
    assert math.isfinite(history.best_loss)


def test_training_that_diverges_at_once_is_an_error():
    with pytest.raises(RuntimeError, match="Lower the learning rate"):
        fit(options=TrainingOptions(epochs=5, learning_rate=1e30, clip=1e9, batch_size=None))


def test_extreme_x_is_an_error_not_a_nan_network():
    terms = make_terms()
    terms[0] = Term(terms[0].input, terms[0].fine * 1e38)
    with pytest.raises(RuntimeError, match="not finite before training"):
        fit(terms=terms)


@pytest.mark.parametrize(
    ("objective", "terms", "match"),
    [
        (Objective(weights="best"), None, '"unit", "estimated" or numbers'),
        (Objective(weights=(1.0, 1.0)), None, "Expected 1 weights"),
        (Objective("estimated"), make_terms(n=(50, 2)), "at least 2 training rows a term"),
    ],
)
def test_bad_objectives(objective, terms, match):
    with pytest.raises(ValueError, match=match):
        fit(objective, terms=terms)


def test_batch_normalisation_is_refused():
    embedding = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="Batch normalisation"):
        fit(network=make_network(embedding=embedding))
    fit(network=make_network(embedding=embedding), terms=make_terms(n=(200,)))  # one level has no pairs


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.0}, {"epochs": 0}, {"patience": 0}, {"batch_size": 0}, {"validation_fraction": 1.0},
     {"clip": -1.0}, {"weight_decay": -0.1}],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match="Expected"):
        TrainingOptions(**options)
