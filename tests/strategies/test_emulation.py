import math

import pytest
import torch

from mlsbi import MDN, NPE, BoxPrior, Emulation, MultilevelData, SingleLevel, TrainingOptions
from mlsbi.strategies import emulation
from mlsbi.training.history import TrainingError
from mlsbi.training.loop import minimise

LINEAR = MDN(components=1, hidden=8, layers=1)
BY_HIGH = ((LINEAR, SingleLevel(-1)),)
PRIOR = BoxPrior([-3.0], [3.0], names=["mean"])


def gaussian(n, seed=0, sd=0.5):
    """x = theta + noise; the low level is shifted. Far from the prior's edges the posterior is N(x, sd)."""
    g = torch.Generator().manual_seed(seed)
    levels = []
    for level, rows in enumerate(n):
        theta = PRIOR.low + (PRIOR.high - PRIOR.low) * torch.rand(rows, 1, generator=g)
        fine = theta + sd * torch.randn(rows, 1, generator=g)
        levels.append((theta, fine, fine + 1) if level else (theta, fine + 1))
    return MultilevelData.from_arrays(levels)


def test_the_posterior_is_that_of_the_finest_level_from_few_runs():
    """Sixty runs of it: a Gaussian's mean and width are learned to about 0.5 / sqrt(60) and a tenth."""
    npe = NPE(PRIOR, strategy=Emulation(BY_HIGH, rows=2048), seed=0, training=TrainingOptions(learning_rate=5e-3))
    npe.fit(gaussian((200, 60)), progress=False)
    for x in (-1.0, 0.0, 1.0):
        draws = npe.posterior([x]).sample((4000,), seed=1)[:, 0]
        assert abs(float(draws.mean()) - x) < 4 * 0.5 / math.sqrt(60)
        assert 0.75 < float(draws.std()) / 0.5 < 1.35


@pytest.mark.slow
def test_the_control_without_runs_of_the_finest_level_is_wrong():
    npe = NPE(PRIOR, strategy=Emulation(((LINEAR, SingleLevel(0)),)), seed=0,
              training=TrainingOptions(learning_rate=5e-3))
    npe.fit(gaussian((200, 60)), 3, progress=False)
    draws = npe.posterior([0.0]).sample((4000,), seed=1)[:, 0]
    assert float(draws.mean()) < -4 * 0.5 / math.sqrt(60)  # the low level's outputs are larger by 1


def test_it_trains_on_new_parameters_and_on_its_own_members_draws(monkeypatch):
    seen = []
    monkeypatch.setattr(emulation, "minimise", lambda members, **named: seen.append(members) or minimise(
        members, **named))
    data = gaussian((60, 30))
    NPE(PRIOR, strategy=Emulation(BY_HIGH, rows=500), density=LINEAR, training=TrainingOptions(epochs=3), seed=0).fit(
        data, 2, progress=False)
    (first, second), = seen
    assert len(first.train[0]) == len(second.train[0]) == 400
    assert len(first.validation[0]) == len(second.validation[0]) == 100  # a fifth of the draws
    assert not torch.equal(first.train[0].input, second.train[0].input)
    drawn = torch.cat([term.input for member in (first, second) for term in (*member.train, *member.validation)])
    assert len(drawn.unique()) == 1000  # each at a parameter of its own


def test_a_constant_output_is_no_reason_to_refuse_draws():
    levels = gaussian((60, 30)).levels
    flat = [torch.cat([part, torch.full_like(part, 2.0)], 1) for part in (levels[0].fine, levels[1].fine,
                                                                        levels[1].coarse)]
    data = MultilevelData.from_arrays([(levels[0].theta, flat[0]), (levels[1].theta, flat[1], flat[2])])
    npe = NPE(PRIOR, strategy=Emulation(BY_HIGH, rows=100), density=LINEAR, training=TrainingOptions(epochs=2), seed=0)
    assert npe.fit(data, 2, progress=False).posterior([0.0, 2.0]).sample((5,), seed=1).isfinite().all()


def test_emulators_of_one_kind_are_told_apart():
    both = tuple((MDN(components=1, hidden=width, layers=1), SingleLevel(-1)) for width in (4, 8))
    npe = NPE(PRIOR, strategy=Emulation(both, rows=64), density=LINEAR, training=TrainingOptions(epochs=2), seed=0)
    note = next(note for note in npe.fit(gaussian((60, 30)), 2, progress=False).history.notes if "mixed" in note)
    assert "hidden=4" in note
    assert "hidden=8" in note


def test_notes_name_the_emulators():
    strategy, training = Emulation((*BY_HIGH, ("maf", SingleLevel(0))), rows=64), TrainingOptions(epochs=30,
                                                                                                  learning_rate=5e-3)
    npe = NPE(PRIOR, strategy=strategy, density=LINEAR, training=training, seed=0)
    npe.fit(gaussian((60, 30)), 2, progress=False)
    assert any(note.startswith("emulator: mixed MDN by SingleLevel") for note in npe.history.notes)
    assert len(npe.history.stages) == 3
    assert npe.history.to_frame()["stage"].unique().tolist() == [0, 1, 2]
    assert npe.history.best_epoch < len(npe.history.epochs)


class Far(torch.nn.Module):
    """An emulator all or some of whose draws lie far away or are not numbers."""

    def __init__(self, share):
        super().__init__()
        self.share, self.shift = share, torch.nn.Parameter(torch.zeros(1))

    def log_prob(self, input, condition):
        return -(input - self.shift).square().sum(1)

    def sample(self, n, condition):
        x = torch.randn(n, len(condition), 1)
        far = torch.rand(n, len(condition), 1) < self.share
        return torch.where(far, torch.where(torch.rand_like(x) < 0.5, 1e6, torch.nan), 0.1 * x)


def test_draws_far_from_every_output_are_made_anew_and_counted():
    def build(share):
        return lambda dim, condition_dim: Far(share)

    def fit(share):
        strategy = Emulation(((build(share), SingleLevel(-1)),), rows=400)
        return NPE(PRIOR, strategy=strategy, density=LINEAR, training=TrainingOptions(epochs=2), seed=0).fit(
            gaussian((60, 30)), 2, progress=False)

    note, = [note for note in fit(0.5).history.notes if "drawn anew" in note]
    assert 40 < float(note.split("%")[0]) < 60  # of 800 drawn about half are lost
    assert not [note for note in fit(0.0).history.notes if "drawn anew" in note]
    with pytest.raises(TrainingError, match="far from every simulated output"):
        fit(1.0)
