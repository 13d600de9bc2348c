from dataclasses import dataclass, replace

import pytest
import torch

import mlsbi
from mlsbi import (
    MDN,
    NLE,
    NPE,
    Auto,
    BoxPrior,
    Emulation,
    Multilevel,
    MultilevelData,
    SingleLevel,
    TrainingOptions,
    TransferLearning,
    TransferThenMultilevel,
    Translation,
)
from mlsbi.density.mixture import DensityMixture
from mlsbi.training.history import TrainingError
from mlsbi.training.objective import Term

SMALL = MDN(components=1, hidden=8, layers=1)
QUICK = TrainingOptions(epochs=40, learning_rate=5e-3)
PRIOR = BoxPrior([0.0], [1.0])
X = torch.tensor([[0.2, 0.2], [0.7, 0.7]])
THETA = torch.tensor([[0.2], [0.5]])


def make_data(n=(200, 40), low="close", seed=0):
    """Two outputs about theta; the low level is close to them, or says the contrary."""
    g = torch.Generator().manual_seed(seed)
    levels = []
    for level, rows in enumerate(n):
        theta, u = torch.rand(rows, 1, generator=g), 0.1 * torch.randn(rows, 2, generator=g)
        fine = theta + u
        coarse = fine + 0.02 if low == "close" else 1 - theta + u
        levels.append((theta, fine, coarse) if level else (theta, coarse))
    return MultilevelData.from_arrays(levels)


def fit(strategy, data=None, kind=NPE, ensemble=None, options=QUICK, seed=1, **more):
    made = kind(PRIOR, strategy=strategy, density=SMALL, training=options, seed=seed)
    return made.fit(make_data() if data is None else data, ensemble, progress=False, **more)


@dataclass(frozen=True)
class Failing:
    """A user's strategy that cannot be trained."""

    def terms(self, terms):
        return list(terms)

    def runs(self, n):
        return tuple(n)

    def fit(self, members, **named):
        raise TrainingError("it never works")


def test_candidates_are_what_they_would_be_alone():
    """An ensemble of the same size whose members stop together; the split covers all rows in both."""
    strategies = (Multilevel(), TransferLearning())
    npe = fit(Auto(strategies))
    assert len(npe.networks) == 5
    for index, strategy in enumerate(strategies):
        alone = fit(strategy, ensemble=5, options=replace(QUICK, cross_fit=True))
        for mixture, network in zip(npe.networks, alone.networks, strict=True):
            for one, other in zip(mixture.parts[index].parameters(), network.parameters(), strict=True):
                assert torch.equal(one, other)


def test_weights_follow_what_rows_of_the_finest_level_say():
    npe = fit(Auto((SingleLevel(-1), SingleLevel(0))), make_data(low="contrary"))
    weights = [part["weight"] for part in npe.history.mixture]
    assert weights[0] > 0.9
    assert sum(weights) == pytest.approx(1.0)
    told = npe.history.mixture[0]
    assert told["strategy"] == "SingleLevel(level=-1)"
    assert told["held_out"] < npe.history.mixture[1]["held_out"]
    assert any("mixed SingleLevel(level=-1) 9" in note and "40 held-out rows" in note for note in npe.history.notes)
    for network in npe.networks:
        assert isinstance(network, DensityMixture)
        assert network.weights.tolist() == pytest.approx(weights)
    # As good as the better one, whose networks it uses alone.
    only = fit(SingleLevel(-1), make_data(low="contrary"), ensemble=5, options=replace(QUICK, cross_fit=True))
    theta = torch.rand(200, 1, generator=torch.Generator().manual_seed(9))
    x = theta + 0.1 * torch.randn(200, 2, generator=torch.Generator().manual_seed(10))
    one, other = (float(e.posterior().log_prob_batched(theta[None], x).mean()) for e in (npe, only))
    assert abs(one - other) < 0.1  # rows were pooled before they were split there


@pytest.mark.parametrize(("kind", "expected"), [
    (NPE, ["Multilevel", "TransferLearning", "TransferThenMultilevel", "SingleLevel", "Emulation"]),
    (NLE, ["Multilevel", "TransferLearning", "TransferThenMultilevel", "SingleLevel", "Translation"]),
])
def test_default_candidates_depend_on_what_is_learned(kind, expected):
    fitted = fit("auto", kind=kind, options=TrainingOptions(epochs=2), ensemble=2)
    assert [part["strategy"] for part in fitted.history.mixture] == expected
    assert sum(part["weight"] for part in fitted.history.mixture) == pytest.approx(1.0)
    if kind is NLE:
        assert fitted.likelihood.log_prob(X, THETA).isfinite().all()
        assert fitted.likelihood.sample(THETA, seed=0).shape == (2, 2)


def test_two_candidates_of_one_kind_are_told_apart():
    fitted = fit(Auto((SingleLevel(0), SingleLevel(-1), Multilevel())), options=TrainingOptions(epochs=2), ensemble=2)
    assert [part["strategy"] for part in fitted.history.mixture] == [
        "SingleLevel(level=0)", "SingleLevel(level=-1)", "Multilevel"]


def test_one_level_and_long_outputs_leave_candidates_out():
    one = MultilevelData.from_arrays([(make_data().levels[0].theta, make_data().levels[0].fine)])
    fitted = fit("auto", one, options=TrainingOptions(epochs=2), ensemble=2)
    assert [part["strategy"] for part in fitted.history.mixture] == ["SingleLevel"]
    theta = torch.rand(30, 1)
    long = MultilevelData.from_arrays([(theta, torch.rand(30, 65)), (theta[:10], torch.rand(10, 65),
                                                                     torch.rand(10, 65))])
    fitted = fit("auto", long, options=TrainingOptions(epochs=2), ensemble=2)
    assert "Emulation" not in [part["strategy"] for part in fitted.history.mixture]


@pytest.mark.parametrize(("rows", "size", "emulates", "translates"), [
    (1900, 64, True, True), (1980, 65, False, False), (1870, 63, True, True), (1869, 63, False, True),
])
def test_default_candidates_depend_on_the_outputs(rows, size, emulates, translates):
    x, theta, some = torch.zeros(rows, size), torch.zeros(rows, 1), torch.arange(20)
    posterior = [Term(theta, x), Term(theta[some], x[some], x[some])]
    likelihood = [Term(x, theta, of_outputs=True), Term(x[some], theta[some], theta[some], x[some], of_outputs=True)]
    for terms, special in ((posterior, (emulates, False)), (likelihood, (False, translates))):
        kinds = [type(one) for one in Auto().chosen(terms)]
        assert (Emulation in kinds, Translation in kinds) == special


def test_levels_simulated_apart_leave_out_what_needs_pairs():
    low, high = make_data().levels
    apart = MultilevelData.from_arrays([(low.theta, low.fine), (high.theta, high.fine)])
    for kind, last in ((NPE, ["Emulation"]), (NLE, [])):
        fitted = fit("auto", apart, kind=kind, options=TrainingOptions(epochs=2), ensemble=2)
        assert [part["strategy"] for part in fitted.history.mixture] == ["TransferLearning", "SingleLevel", *last]
    for strategy in ("multilevel", "transfer_then_multilevel", Auto((Multilevel(),))):
        with pytest.raises(ValueError, match="Multilevel training learns from pairs"):
            fit(strategy, apart)
    with pytest.raises(ValueError, match="Translation learns from pairs"):
        fit("translation", apart)


def test_a_mixture_is_saved_and_read_back(tmp_path):
    npe = fit(Auto((SingleLevel(-1), Multilevel())))
    npe.save(tmp_path)
    again = mlsbi.load(tmp_path)
    assert again.strategy == npe.strategy
    assert again.history.mixture == npe.history.mixture
    one, other = npe.posterior(X[0]), again.posterior(X[0])
    assert torch.equal(one.log_prob(THETA), other.log_prob(THETA))
    assert torch.equal(one.sample((9,), seed=3), other.sample((9,), seed=3))


def test_seeds_reproduce_and_differ():
    draws = [fit(Auto((SingleLevel(-1), Emulation(((SMALL, SingleLevel(-1)),), rows=64))), seed=seed)
             .posterior(X[0]).log_prob(THETA) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_candidate_that_fails_gets_no_weight_and_is_told():
    npe = fit(Auto((Failing(), SingleLevel(-1))))
    assert [(part["strategy"], part["weight"], part["held_out"] is None) for part in npe.history.mixture] == [
        ("Failing", 0.0, True), ("SingleLevel", 1.0, False)]  # in the order of the mixture's parts
    assert npe.networks[0].weights.tolist() == [0.0, 1.0]
    assert any("Failing got no weight" in note and "it never works" in note for note in npe.history.notes)
    with pytest.raises(TrainingError, match="No strategy could be trained: Failing: it never works"):
        fit(Auto((Failing(),)))


@dataclass(frozen=True)
class Picky(SingleLevel):
    """A user's strategy that cannot be trained on rows of large inputs, and tells that late."""

    def fit(self, members, **named):
        histories = super().fit(members, **named)
        if any(float(member.train[0].input.max()) > 1.7 for member in members):
            raise TrainingError("inputs are too large")
        return histories


# Everything that stops by its own rows and is mixed by them, in both kinds of estimators, one of them cheap to train.
COVERING = [(NPE, Auto((Multilevel("estimated"), TransferLearning()))), (NLE, Auto((Translation(), SingleLevel(-1)))),
            (NPE, Emulation(((SMALL, TransferThenMultilevel()), (SMALL, Translation())), rows=64)),
            (NPE, Auto((SingleLevel(-1), Picky(-1))))]


@pytest.mark.parametrize(("kind", "strategy"), COVERING, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("most", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_replicates_are_the_estimators_they_would_be_alone(kind, strategy, most, monkeypatch):
    """In one go, or where no more than two of them fit into one."""
    if most is not None:
        monkeypatch.setattr("mlsbi.training.loop.at_once", lambda terms, members, *others: min(members, most))
    options = TrainingOptions(epochs=8, learning_rate=5e-3, patience=3, precision="float64")
    data = [make_data(n=(80, 20), seed=seed, low=low) for seed, low in enumerate(("close", "contrary", "close"))]
    one, two, three = (kind(PRIOR, strategy=strategy, density=SMALL, training=options, seed=seed) for seed in range(3))
    kind.fit_replicates([one, two, three], data, 2, progress=False)
    told = []
    for seed, (fitted, own) in enumerate(zip((one, two, three), data, strict=True)):
        alone = fit(strategy, own, kind=kind, ensemble=2, options=options, seed=seed)
        assert [history.best_epoch for history in fitted.histories] == [
            history.best_epoch for history in alone.histories]
        for network, expected in zip(fitted.networks, alone.networks, strict=True):
            for name, value in expected.state_dict().items():
                assert torch.allclose(network.state_dict()[name], value, rtol=1e-6, atol=1e-7), name
        if fitted.history.mixture:
            assert [part["weight"] for part in fitted.history.mixture] == pytest.approx(
                [part["weight"] for part in alone.history.mixture], abs=1e-6)
        told.append([any("inputs are too large" in note for note in made.history.notes) for made in (fitted, alone)])
    failing = isinstance(strategy, Auto) and any(isinstance(each, Picky) for each in strategy.candidates)
    assert told == [[False] * 2, [False] * 2, [failing] * 2]  # what fails in one leaves the others theirs


def test_replicates_are_trained_together_as_far_as_they_are_alike_and_fit(monkeypatch):
    calls = []
    fit_auto = Auto.fit
    monkeypatch.setattr(Auto, "fit", lambda self, members, **named: calls.append(named["pooled"])
                        or fit_auto(self, members, **named))
    coupled = [make_data(n=(60, 20), seed=seed) for seed in range(3)]
    apart = MultilevelData.from_arrays([(level.theta, level.fine) for level in coupled[0].levels])
    options = TrainingOptions(epochs=2)

    def together(data):
        calls.clear()
        made = [NPE(PRIOR, strategy=Auto((TransferLearning(), SingleLevel(-1))), density=SMALL, training=options,
                    seed=seed) for seed in range(len(data))]
        NPE.fit_replicates(made, data, 2, progress=False)
        return list(calls)

    assert together(coupled) == [(0, 0, 1, 1, 2, 2)]
    assert together([coupled[0], apart]) == [True, True]  # pairs of one are none of the other
    monkeypatch.setattr("mlsbi.strategies.fitting.at_once", lambda terms, members, *others: 5)
    assert together(coupled) == [(0,) * 2, (0, 0, 1, 1)]


@pytest.mark.parametrize("kind", [NPE, NLE])
@pytest.mark.parametrize(("pairs", "ensemble"), [(2, 2), (3, 2), (2, 5)])
def test_two_pairs_leave_out_what_needs_more(kind, pairs, ensemble):
    fitted = fit(Auto(), make_data(n=(40, pairs)), kind=kind, options=TrainingOptions(epochs=2), ensemble=ensemble)
    assert sum(part["weight"] for part in fitted.history.mixture) == pytest.approx(1.0)


def test_bad_options_of_a_candidate_are_not_taken_for_a_strategy_that_fails():
    with pytest.raises(ValueError, match="Expected 1 weights"):
        fit(Auto((Multilevel((0.5, 0.5)), SingleLevel(-1))))


def test_names_of_any_length_do_not_trouble_a_checkpoint(tmp_path):
    two = tuple(Emulation(((SMALL, SingleLevel(-1)),), rows=rows) for rows in (32, 64))
    first, again = (fit(Auto(two), options=TrainingOptions(epochs=2), checkpoint=tmp_path) for _ in range(2))
    assert first.history.mixture[0]["strategy"] != first.history.mixture[1]["strategy"]
    assert torch.equal(first.posterior(X[0]).log_prob(THETA), again.posterior(X[0]).log_prob(THETA))


@pytest.mark.parametrize("strategy", [Auto(), Emulation()], ids=["Auto", "Emulation"])
def test_rows_must_be_held_out(strategy):
    with pytest.raises(ValueError, match="set validation_fraction above 0"):
        fit(strategy, options=replace(QUICK, validation_fraction=0.0))


@pytest.mark.gpu
@pytest.mark.parametrize(("strategy", "kind"), [("auto", NPE), ("auto", NLE), ("emulation", NPE), ("translation", NPE)])
def test_on_a_gpu(strategy, kind):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    made = kind(PRIOR, strategy=strategy, density=SMALL, training=TrainingOptions(epochs=3), device="cuda", seed=0)
    made.fit(make_data(), 2, progress=False)
    assert all(parameter.is_cuda for network in made.networks for parameter in network.parameters())


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="at least one candidate"):
        Auto(())
    with pytest.raises(ValueError, match="none of which mixes others"):
        Auto((Auto(),))
    with pytest.raises(ValueError, match="one positive number of pseudo_rows for each of 2"):
        Auto((SingleLevel(-1), Multilevel()), pseudo_rows=(1.0,))
    with pytest.raises(ValueError, match="one positive number of pseudo_rows for each of 1"):
        Auto((SingleLevel(-1),), pseudo_rows=(0.0,))
    with pytest.raises(ValueError, match="candidates=, which is not given"):
        Auto(pseudo_rows=(1.0,))
    with pytest.raises(ValueError, match="at least 1 member"):
        Auto(members=0)
    with pytest.raises(ValueError, match="at least one emulator"):
        Emulation(())
    with pytest.raises(ValueError, match="at least one emulator"):
        Emulation(((SMALL, Auto()),))
    with pytest.raises(ValueError, match="at least 2 rows"):
        Emulation(rows=1)
    with pytest.raises(ValueError, match="align=False in the strategies"):
        TransferThenMultilevel(multilevel=Multilevel())
    with pytest.raises(ValueError, match="NLE learns the likelihood"):
        fit(Emulation(), kind=NLE)
    theta = torch.rand(30, 1)
    long = MultilevelData.from_arrays([(theta, torch.rand(30, 65)), (theta, torch.rand(30, 65), torch.rand(30, 65))])
    with pytest.raises(ValueError, match="at most 64 numbers"):
        fit(Emulation(), long)
