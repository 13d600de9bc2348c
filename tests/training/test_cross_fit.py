import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from trainings import MIXTURE, make_members, make_terms, spoil, train

from mlsbi import BoxPrior, Multilevel, MultilevelData, SingleLevel, TransferLearning
from mlsbi.density.embeddings import GivenEmbedding
from mlsbi.strategies import fitting, multilevel, single_level, transfer
from mlsbi.strategies.fitting import fit_ensemble, posterior_problem
from mlsbi.training.history import TrainingError
from mlsbi.training.options import TrainingOptions

OPTIONS = TrainingOptions(epochs=40, patience=5, learning_rate=0.03, cross_fit=True)


def toy_problem(n=(60, 10), seed=0):
    levels = []
    for level, term in enumerate(make_terms(n, seed)):
        theta = term.input.sigmoid()
        levels.append((theta, term.fine, term.coarse) if level else (theta, term.fine))
    return posterior_problem(MultilevelData.from_arrays(levels), BoxPrior([0.0], [1.0]))


def fit(strategy=None, options=OPTIONS, *, problem=None, members=1, seed=1):
    problem = problem or toy_problem()
    return fit_ensemble(problem, MIXTURE, strategy or Multilevel(align=False), members=members, options=options,
                        seed=seed, progress=False)


@pytest.fixture
def calls(monkeypatch):
    """Every call that trains: its members, how, and what came of it."""
    found = []
    minimise = multilevel.minimise

    def record(members, **named):
        before = [member.network.density.head.weight.detach().clone() for member in members]
        histories = minimise(members, **named)
        found.append({"members": members, "histories": histories, "before": before, **named,
                      "seconds": sum(history.seconds for history in histories)})
        return histories

    for module in (multilevel, single_level, transfer):
        monkeypatch.setattr(module, "minimise", record)
    return found


def rows_in(term, whole):
    """How often each row of a term occurs in another."""
    return (whole.fine[:, None] == term.fine[None]).all(-1).sum(1)


def test_every_pair_is_held_out_once_and_the_last_network_sees_all(calls):
    problem = toy_problem()
    (network,), (history,) = fit(problem=problem)
    folds, final = calls
    assert (len(folds["members"]), len(final["members"])) == (5, 1)
    assert (folds["pooled"], final["pooled"]) == (True, False)
    whole = [problem.standardise(term) for term in problem.terms]
    for level, term in enumerate(whole):
        held = sum(rows_in(member.validation[level], term) for member in folds["members"])
        trained = sum(rows_in(member.train[level], term) for member in folds["members"])
        assert held.tolist() == [1] * len(term)
        assert trained.tolist() == [4] * len(term)
        assert rows_in(final["members"][0].train[level], term).tolist() == [1] * len(term)
    assert final["members"][0].validation == []
    assert network is final["members"][0].network
    assert not network.training


def test_the_last_network_is_trained_for_the_epochs_that_were_best_on_average(calls):
    _, (history,) = fit()
    folds, _ = (call["histories"] for call in calls)
    scores = np.array([[record["validation_loss"] for record in own.epochs] for own in folds])  # common epochs
    best = int(scores.mean(0).argmin())
    assert [own.best_epoch for own in folds] == [best] * 5
    assert 0 < best < len(scores[0]) - 1
    assert scores.shape[1] == best + 1 + OPTIONS.patience
    assert len(history.epochs) == best + 1
    assert history.best_epoch == best
    assert history.best_loss == pytest.approx(scores.mean(0).min(), rel=1e-6)
    assert [record["validation_loss"] for record in history.epochs] == pytest.approx(scores.mean(0)[:best + 1])
    assert history.stopped == f"all {best + 1} epochs done"
    assert (history.n_train, history.n_validation) == ((60, 10), ())
    note = next(note for note in history.notes if "held out different rows" in note)
    assert "5 networks" in note
    assert history.seconds == pytest.approx(sum(call["seconds"] for call in calls))


def test_networks_that_choose_the_epoch_are_others(calls):
    fit()
    folds, final = calls
    starts = [*folds["before"], *final["before"]]
    assert len({start.sum().item() for start in starts}) == 6
    seeds = [member.seed for call in calls for member in call["members"]]
    assert len(set(seeds)) == 6
    del calls[:]
    fit(options=replace(OPTIONS, cross_fit=False))  # the network is the one that is trained without them
    assert torch.equal(calls[0]["before"][0], final["before"][0])
    assert calls[0]["members"][0].seed == final["members"][0].seed


def test_estimated_weights_are_those_of_the_folds(calls):
    _, (history,) = fit(Multilevel("estimated", align=False))
    folds, _ = calls
    expected = np.mean([[record["weight_0"] for record in own.epochs[:len(history.epochs)]]
                        for own in folds["histories"]], 0)
    assert [record["weight_0"] for record in history.epochs] == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) > 1
    assert expected[0] == 1.0


@pytest.mark.parametrize("strategy", [Multilevel((0.4,), align=False), Multilevel(rescale=True, align=False)])
def test_fixed_weights_stay(strategy, calls):
    _, (history,) = fit(strategy)
    given = 1.0 if strategy.weights == "unit" else 0.4
    assert [record["weight_0"] for record in history.epochs] == pytest.approx([given] * len(history.epochs))
    assert calls[1]["objective"] == calls[0]["objective"]


def test_stages_of_transfer_have_epochs_of_their_own(calls):
    _, (history,) = fit(TransferLearning(), problem=toy_problem((60, 20, 10)))
    assert [len(call["members"]) for call in calls] == [5, 5, 5, 1, 1, 1]
    best = [call["histories"][0].best_epoch for call in calls[:3]]
    for call, epoch in zip(calls[:3], best, strict=True):
        assert [own.best_epoch for own in call["histories"]] == [epoch] * 5
    assert [call["schedule"].epochs for call in calls[3:]] == [epoch + 1 for epoch in best]
    assert [call["members"][0].train[0].input.shape[0] for call in calls[3:]] == [80, 30, 10]
    assert history.stages == tuple(best)
    assert len(history.epochs) == sum(best) + 3
    assert history.best_epoch == len(history.epochs) - 1
    assert [record["stage"] for record in history.epochs] == [
        float(stage) for stage, epoch in enumerate(best) for _ in range(epoch + 1)]
    scores = [np.mean([own.epochs[at]["validation_loss"] for own in call["histories"]])
              for call, epoch in zip(calls[:3], best, strict=True) for at in range(epoch + 1)]
    assert [record["validation_loss"] for record in history.epochs] == pytest.approx(scores)
    assert len(set(best)) > 1


def test_one_level_alone(calls):
    _, (history,) = fit(SingleLevel(-1))
    assert [len(call["members"]) for call in calls] == [5, 1]
    assert history.n_train == (10,)


def test_an_ensemble_stops_at_one_epoch(calls):
    networks, histories = fit(members=4)
    assert len(calls) == 1
    assert calls[0]["pooled"]
    assert len({history.best_epoch for history in histories}) == 1
    scores = np.array([[record["validation_loss"] for record in history.epochs] for history in histories])
    assert histories[0].best_epoch == scores.mean(0).argmin()
    assert len({history.best_loss for history in histories}) == 1
    assert histories[0].best_loss == pytest.approx(scores.mean(0).min(), rel=1e-6)
    assert len(networks) == 4
    del calls[:]
    _, apart = fit(members=4, options=replace(OPTIONS, cross_fit=False))
    assert len({history.best_epoch for history in apart}) > 1


@pytest.mark.parametrize("together", [True, False])
def test_an_ensemble_is_one_training_however_it_is_evaluated(together, calls):
    fit(members=2, options=replace(OPTIONS, together=together, epochs=3))
    assert len(calls) == 1
    assert len(calls[0]["members"]) == 2


@pytest.mark.parametrize(("n", "fraction", "strategy", "expected"), [
    ((600, 10), 0.2, Multilevel(), True),
    ((600, 47), 0.2, Multilevel(), True),  # 9.4 held out
    ((600, 50), 0.2, Multilevel(), False),
    ((600, 50), 0.1, Multilevel(), True),
    ((40, 60), 0.2, Multilevel(), True),  # the cheap rows are the few
    ((600, 10), 0.0, Multilevel(), False),
    ((600, 10), 0.2, SingleLevel(0), False),
    ((600, 10), 0.2, SingleLevel(1), True),
    ((600, 10), 0.2, TransferLearning(), True),
])
@pytest.mark.parametrize("members", [1, 3])
def test_automatically_where_few_rows_are_held_out(n, fraction, strategy, expected, members, calls):
    options = TrainingOptions(epochs=2, validation_fraction=fraction, cross_fit="auto", together=False)
    _, histories = fit(strategy, options, problem=toy_problem(n), members=members)
    assert calls[0]["pooled"] is expected
    assert any("held out different rows" in note for note in histories[0].notes) is (expected and members == 1)


@pytest.mark.parametrize(("fraction", "pairs", "folds"), [
    (0.2, 10, 5), (0.34, 10, 3), (0.5, 10, 2), (0.8, 10, 2), (0.1, 10, 10), (0.05, 40, 10), (0.1, 4, 4),
])
def test_folds_are_as_many_as_parts(fraction, pairs, folds, calls):
    fit(options=replace(OPTIONS, epochs=2, validation_fraction=fraction), problem=toy_problem((60, pairs)))
    assert len(calls[0]["members"]) == folds


@pytest.mark.parametrize("pairs", [7, 10, 11, 12, 13, 19])
def test_every_pair_is_scored_by_a_network_not_trained_on_it(pairs, calls):
    problem = toy_problem((60, pairs))
    fit(options=replace(OPTIONS, epochs=2), problem=problem)
    whole = problem.standardise(problem.terms[1])
    held = sum(rows_in(member.validation[1], whole) for member in calls[0]["members"])
    assert held.min() >= 1
    assert held.max() <= 2


def test_a_seed_reproduces():
    (one,), (first,) = fit()
    (two,), (second,) = fit()
    (three,), _ = fit(seed=2)
    assert torch.equal(one.density.head.weight, two.density.head.weight)
    assert first.epochs == second.epochs
    assert not torch.equal(one.density.head.weight, three.density.head.weight)


def test_a_fold_that_explodes_ends_at_the_common_epoch(monkeypatch):
    """Members that share a score share an epoch, also where one of them has no score any more."""
    members = make_members(3, MIXTURE)
    spoil(monkeypatch, after=4, network=members[1].network)
    histories = train(members, options=TrainingOptions(epochs=30, patience=3, batch_size=None), pooled=True)
    assert len({history.best_epoch for history in histories}) == 1
    assert histories[0].best_epoch <= 3
    assert all(math.isfinite(history.best_loss) for history in histories)


def test_cross_fitting_with_a_fold_that_explodes_is_no_puzzle(monkeypatch):
    spoiled = []
    member = fitting._Fitting.member

    def watch(self, *given, **named):
        made = member(self, *given, **named)
        spoiled.append(made.network)
        if len(spoiled) == 2:
            spoil(monkeypatch, after=4, network=made.network)
        return made

    monkeypatch.setattr(fitting._Fitting, "member", watch)
    try:
        _, (history,) = fit(options=replace(OPTIONS, batch_size=None))
    except TrainingError:
        return
    assert 0 <= history.best_epoch <= 3


def test_a_last_network_that_explodes_is_no_puzzle(monkeypatch):
    network = fitting._Fitting.network

    def watch(self, member, key=0):
        made = network(self, member, key)
        if key == 0:
            spoil(monkeypatch, after=2, network=made)
        return made

    monkeypatch.setattr(fitting._Fitting, "network", watch)
    try:
        _, (history,) = fit(options=replace(OPTIONS, batch_size=None))
    except TrainingError:
        return
    assert history.best_epoch == 1
    assert "stopped being finite" in history.stopped


def test_folds_start_from_a_given_embedding_as_the_last_network_does(calls):
    class Seven(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Linear(2, 2)
            torch.nn.init.constant_(self.line.weight, 7.0)

        def forward(self, x):
            return self.line(x)

    started = []

    class Noting(Multilevel):
        def fit(self, members, **named):
            started.extend(member.network.embedding.line.weight[0, 0].item() for member in members)
            return super().fit(members, **named)

    fit_ensemble(toy_problem(), MIXTURE, Noting(align=False), embedding=GivenEmbedding(Seven()), options=OPTIONS,
                 seed=1, progress=False)
    assert started == [7.0] * 6
