from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsbi import MDN, BoxPrior, Multilevel, MultilevelData, SingleLevel, TrainingOptions, TransferLearning
from mlsbi.strategies import fitting, multilevel
from mlsbi.strategies.fitting import fit_ensemble, fit_replicates, posterior_problem
from mlsbi.training.checkpoints import Checkpoint

SMALL = MDN(components=2, hidden=8, layers=1)
OPTIONS = TrainingOptions(epochs=8, patience=3, learning_rate=0.02, precision="float64")


def make_problem(seed=0, n=(60, 20)):
    g = torch.Generator().manual_seed(seed)
    levels = []
    for level, rows in enumerate(n):
        theta, u = torch.rand(rows, 1, generator=g), 0.1 * torch.randn(rows, 2, generator=g)
        fine, coarse = theta + u, 2 * (theta + u) + 1 + seed
        levels.append((theta, fine, coarse) if level else (theta, coarse))
    return posterior_problem(MultilevelData.from_arrays(levels), BoxPrior([0.0], [1.0]), dtype=torch.float64)


@pytest.fixture
def groups(monkeypatch):
    """Sizes of the groups that were trained in one go, and what they were called."""
    found = []
    minimise = multilevel.minimise

    def record(members, **named):
        found.append((len(members), named["label"]))
        return minimise(members, **named)

    monkeypatch.setattr(multilevel, "minimise", record)
    return found


def values_of(networks):
    return torch.stack([torch.cat([value.flatten().double() for value in network.state_dict().values()])
                        for network in networks])


@pytest.mark.parametrize("strategy", [Multilevel("estimated"), TransferLearning(), SingleLevel(-1)], ids=str)
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("together", ["auto", True, False])
def test_replicates_are_the_ensembles_of_their_problems(strategy, members, together):
    """Whatever differs between them: rows, scalers, seeds."""
    problems, seeds = [make_problem(seed) for seed in range(3)], [5, 6, 5]
    options = replace(OPTIONS, together=together)
    found = fit_replicates(problems, SMALL, strategy, seeds=seeds, members=members, options=options, progress=False)
    assert len(found) == 3
    for problem, seed, (networks, histories) in zip(problems, seeds, found, strict=True):
        expected, told = fit_ensemble(problem, SMALL, strategy, members=members, options=options, seed=seed,
                                      progress=False)
        assert torch.allclose(values_of(networks), values_of(expected), rtol=1e-7, atol=1e-7)
        assert [history.best_epoch for history in histories] == [history.best_epoch for history in told]
        assert torch.equal(networks[0].condition_scaler.mean, problem.condition_scaler.mean)
    assert not torch.allclose(values_of(found[0][0]), values_of(found[2][0]), atol=1e-3)


def test_replicates_of_different_sizes_are_trained_apart(groups):
    problems = [make_problem(0), make_problem(1, (60, 21))]
    found = fit_replicates(problems, SMALL, Multilevel(), seeds=[1, 2], members=2, options=OPTIONS, progress=False)
    assert [size for size, _ in groups] == [2, 2]
    assert [history.n_train for _, (history, _) in found] == [(48, 16), (48, 17)]


def test_replicates_that_are_cross_fitted_stop_by_their_own_folds(groups):
    options = replace(OPTIONS, cross_fit=True, validation_fraction=0.34)
    problems = [make_problem(seed) for seed in range(2)]
    found = fit_replicates(problems, SMALL, Multilevel(), seeds=[1, 2], options=options, progress=False)
    assert [size for size, _ in groups] == [3, 1, 3, 1]
    for problem, seed, (networks, _) in zip(problems, [1, 2], found, strict=True):
        expected, _ = fit_ensemble(problem, SMALL, Multilevel(), options=options, seed=seed, progress=False)
        assert torch.equal(values_of(networks), values_of(expected))


@pytest.mark.parametrize(("most", "expected"), [
    (5, [(5, "training 1 to 5 of 5")]),
    (3, [(2, "training 1 to 2 of 5"), (3, "training 3 to 5 of 5")]),
    (1, [(1, f"training {at} of 5") for at in range(1, 6)]),
])
def test_ensembles_are_trained_in_groups(monkeypatch, groups, most, expected, tmp_path):
    monkeypatch.setattr(fitting, "at_once", lambda *given: most)
    options = replace(OPTIONS, together=True)
    networks, _ = fit_ensemble(make_problem(), SMALL, Multilevel(), members=5, options=options, seed=1, progress=False,
                               checkpoint=Checkpoint(tmp_path / "here"))
    assert groups == expected
    assert len(list(tmp_path.iterdir())) == len(expected)
    whole, _ = fit_ensemble(make_problem(), SMALL, Multilevel(), members=5, options=replace(options, together=False),
                            seed=1, progress=False)
    assert torch.allclose(values_of(networks), values_of(whole), rtol=1e-7, atol=1e-7)


def test_one_network_is_called_a_training(groups):
    fit_ensemble(make_problem(), SMALL, Multilevel(), options=OPTIONS, seed=1, progress=False)
    assert groups == [(1, "training")]


@given(st.integers(1, 60), st.integers(1, 70))
def test_groups_are_about_equal_and_hold_every_member(members, most):
    groups = fitting._groups(range(members), most)
    assert [member for group in groups for member in group] == list(range(members))
    sizes = [len(group) for group in groups]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(groups) == -(-members // most)
