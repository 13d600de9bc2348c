import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trainings import MIXTURE, agree, make_members, train, values_of

from mlsbi.training import loop
from mlsbi.training.descent import Objective
from mlsbi.training.kept import NONFINITE, PATIENCE, RUNNING, Kept
from mlsbi.training.options import TrainingOptions

SCORES = st.one_of(st.sampled_from([math.nan, math.inf]), st.integers(-3, 3).map(float))
LOSSES = st.sampled_from([1.0] * 8 + [math.nan, math.inf, -math.inf])


def stop_early(losses, scores, parameters, *, patience, scored):
    """One training's early stopping, the plain way: best epoch, score and parameters, and why it ended."""
    best, best_score, kept = -1, math.inf, parameters[0]
    for epoch, (loss, score, flat) in enumerate(zip(losses, scores, parameters[1:], strict=True)):
        if not (math.isfinite(loss) and all(map(math.isfinite, flat))):
            return best, best_score, kept, NONFINITE
        if not scored:
            best, best_score, kept = epoch, loss, flat
        elif score < best_score:
            best, best_score, kept = epoch, score, flat
        if scored and epoch - best >= patience:
            return best, best_score, kept, PATIENCE
    return best, best_score, kept, RUNNING


def run(losses, scores, parameters, *, patience, scored, pooled=False):
    """Gives all epochs `(E, K)` to `Kept`; parameters `(E + 1, K, P)`."""
    kept = Kept(torch.tensor(parameters[0]), patience=patience, scored=scored, pooled=pooled)
    for epoch, (loss, score, flat) in enumerate(zip(losses, scores, parameters[1:], strict=True)):
        better = kept.update(epoch, torch.tensor(loss), torch.tensor(score), torch.tensor(flat))
        assert torch.equal(better, kept.epoch == epoch)
    return kept


@st.composite
def trainings(draw):
    members, epochs = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    table = st.lists(st.lists(SCORES, min_size=members, max_size=members), min_size=epochs, max_size=epochs)
    losses = draw(st.lists(st.lists(LOSSES, min_size=members, max_size=members), min_size=epochs, max_size=epochs))
    spoiled = draw(st.sets(st.tuples(st.integers(1, epochs), st.integers(0, members - 1)), max_size=2))
    parameters = [[[float(epoch), math.nan if (epoch, member) in spoiled else float(member)]
                   for member in range(members)] for epoch in range(epochs + 1)]
    return losses, draw(table), parameters


@settings(deadline=None, max_examples=200)
@given(training=trainings(), patience=st.integers(1, 5), scored=st.booleans())
@example(training=([[1.0]] * 4, [[math.nan]] * 4, [[[0.0]]] * 5), patience=2, scored=True)  # never a score
@example(training=([[1.0]] * 3, [[2.0], [2.0], [1.0]], [[[float(i)]] for i in range(4)]), patience=1, scored=True)
def test_kept_is_plain_early_stopping(training, patience, scored):
    losses, scores, parameters = training
    kept = run(losses, scores, parameters, patience=patience, scored=scored)
    for member in range(len(losses[0])):
        best, score, flat, state = stop_early(
            [row[member] for row in losses], [row[member] for row in scores], [row[member] for row in parameters],
            patience=patience, scored=scored,
        )
        assert kept.epoch[member] == best
        assert kept.loss[member] == score
        assert kept.best[member].tolist() == flat
        assert kept.state[member] == state
        assert bool(kept.best[member].isfinite().all())


def test_a_score_of_minus_infinity_is_no_score():
    """A density that collapsed on a held-out row is not the best one, and hides none that was."""
    kept = run([[1.0]] * 3, [[2.0], [-math.inf], [1.0]], [[[float(epoch)]] for epoch in range(4)], patience=5,
               scored=True)
    assert kept.epoch.tolist() == [2]
    assert kept.loss.tolist() == [1.0]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(SCORES, min_size=3, max_size=3), min_size=1, max_size=12), st.integers(1, 5))
def test_pooled_members_stop_by_their_mean(scores, patience):
    parameters = [[[float(epoch), float(member)] for member in range(3)] for epoch in range(len(scores) + 1)]
    kept = run([[1.0] * 3] * len(scores), scores, parameters, patience=patience, scored=True, pooled=True)
    means = [float(torch.tensor(row).mean()) for row in scores]
    best, score, _, state = stop_early([1.0] * len(scores), means, [row[0] for row in parameters], patience=patience,
                                       scored=True)
    assert kept.epoch.tolist() == [best] * 3
    assert kept.loss.tolist() == [score] * 3
    assert kept.state.tolist() == [state] * 3
    assert kept.best.tolist() == parameters[best + 1]


@settings(deadline=None, max_examples=100)
@given(training=trainings(), patience=st.integers(1, 5), groups=st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_members_of_a_group_stop_by_its_mean(training, patience, groups):
    losses, scores, parameters = training
    groups = tuple(groups[: len(losses[0])])
    kept = run(losses, scores, parameters, patience=patience, scored=True, pooled=groups)
    for group in set(groups):
        own = [place for place, each in enumerate(groups) if each == group]
        alone = run(*([[row[place] for place in own] for row in table] for table in (losses, scores, parameters)),
                    patience=patience, scored=True, pooled=True)
        assert kept.epoch[own].tolist() == alone.epoch.tolist()
        assert kept.loss[own].tolist() == alone.loss.tolist()
        assert kept.state[own].tolist() == alone.state.tolist()
        assert torch.equal(kept.best[own], alone.best)


def test_groups_are_taken_along():
    flat = [[[float(epoch), float(member)] for member in range(3)] for epoch in range(3)]
    kept = run([[1.0] * 3] * 2, [[3.0, 2.0, 2.0], [2.0, 3.0, 3.0]], flat, patience=9, scored=True, pooled=(0, 1, 1))
    assert kept.epoch.tolist() == [1, 0, 0]
    kept.select([1, 2])
    assert kept.pooled == (1, 1)
    better = kept.update(2, torch.ones(2), torch.tensor([1.0, 2.5]), torch.zeros(2, 2))
    assert better.tolist() == [True, True]
    assert kept.loss.tolist() == [1.75, 1.75]
    with pytest.raises(ValueError, match="group of each of 1 members; got 2"):
        Kept(torch.zeros(1, 2), patience=9, scored=True, pooled=(0, 1))


def test_members_are_taken_along_by_number():
    scores = [[1.0, 3.0, 2.0], [2.0, 1.0, 1.0], [3.0, 2.0, math.nan]]
    parameters = [[[float(epoch), float(member)] for member in range(3)] for epoch in range(5)]
    kept = run([[1.0] * 3] * 3, scores, parameters[:4], patience=9, scored=True)
    kept.select([2, 1])
    assert kept.epoch.tolist() == [1, 1]
    assert kept.best.tolist() == [[2.0, 2.0], [2.0, 1.0]]
    other = Kept(torch.zeros(2, 2), patience=9, scored=True, pooled=False)
    other.load(kept.tensors())
    for one in (kept, other):
        one.update(3, torch.ones(2), torch.tensor([0.5, 5.0]), torch.tensor([parameters[4][2], parameters[4][1]]))
        assert one.epoch.tolist() == [3, 1]
        assert one.loss.tolist() == [0.5, 1.0]


def test_what_is_loaded_is_a_copy():
    kept = Kept(torch.zeros(1, 2), patience=9, scored=True, pooled=False)
    told = kept.tensors()
    kept.load(told)
    told["best"].fill_(5.0)
    assert kept.best.tolist() == [[0.0, 0.0]]


def look_every(monkeypatch, epochs):
    """Reads what happened every so many epochs, as on a GPU, where reading waits for the device."""
    read, told = loop._Run._read, loop._Run._told

    def seldom(self):
        if len(self._unread) >= epochs or self.epoch == self.epochs:
            read(self)

    monkeypatch.setattr(loop._Run, "_read", seldom)
    monkeypatch.setattr(loop._Run, "_told", lambda self: told(self) if self.histories[0].epochs else {})


@pytest.mark.parametrize("looks", [7, 100])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("objective", [Objective(), Objective("estimated", rescale=True)])
def test_results_do_not_depend_on_how_often_the_host_looks(monkeypatch, looks, pooled, objective):
    """A stop is then noticed late, when steps and weights have gone on; nothing of that is kept."""
    options = TrainingOptions(epochs=60, patience=6, learning_rate=0.05, batch_size=64, average=0.5,
                              precision="float64")
    members = make_members(3, MIXTURE, n=(100, 40), dtype=torch.float64)
    expected = train(members, objective, options, pooled=pooled)
    with monkeypatch.context() as patch:
        look_every(patch, looks)
        again = make_members(3, MIXTURE, n=(100, 40), dtype=torch.float64)
        found = train(again, objective, options, pooled=pooled)
    ends = [len(history.epochs) for history in expected]
    assert max(ends) < 60
    assert len(set(ends)) == (1 if pooled else 3)
    for one, other in zip(expected, found, strict=True):
        assert (one.stopped, one.best_epoch) == (other.stopped, other.best_epoch)
        # Members that stopped are still there: products of another shape, which add up in another order.
        assert agree(one, other, 1e-6)
    for a, b in zip(members, again, strict=True):
        assert torch.allclose(values_of(a.network), values_of(b.network), atol=1e-6)


def test_a_member_that_explodes_between_two_looks_keeps_its_best(monkeypatch):
    step = loop._Run._step

    def spoil(self, rows, weights):
        if self.epoch == 4:
            self.descent.flat.data[1] = math.nan
        return step(self, rows, weights)

    monkeypatch.setattr(loop._Run, "_step", spoil)
    look_every(monkeypatch, 7)
    members = make_members(3, MIXTURE)
    histories = train(members, options=TrainingOptions(epochs=12, batch_size=None))
    assert [len(history.epochs) for history in histories] == [12, 5, 12]
    assert "stopped being finite" in histories[1].stopped
    assert all(bool(values_of(member.network).isfinite().all()) for member in members)
    assert all(math.isfinite(history.best_loss) for history in histories)
