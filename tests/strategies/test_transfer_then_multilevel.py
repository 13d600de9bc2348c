import torch

from mlsbi import MDN, NPE, BoxPrior, Multilevel, MultilevelData, TrainingOptions, TransferLearning
from mlsbi import TransferThenMultilevel as Both
from mlsbi.strategies import multilevel, transfer
from mlsbi.training.loop import minimise

PRIOR = BoxPrior([0.0], [1.0])
SMALL = MDN(components=1, hidden=8, layers=1)


def make_data(n=(80, 40, 20)):
    g = torch.Generator().manual_seed(0)
    levels = []
    for level, rows in enumerate(n):
        theta, u = torch.rand(rows, 1, generator=g), 0.1 * torch.randn(rows, 2, generator=g)
        outputs = [(1 + 0.5 * (len(n) - 1 - at)) * (theta + u) for at in range(len(n))]
        levels.append((theta, outputs[level], outputs[level - 1]) if level else (theta, outputs[0]))
    return MultilevelData.from_arrays(levels)


def fit(monkeypatch, strategy, epochs=4):
    seen = []

    def record(members, **named):
        state = [parameter.clone() for parameter in members[0].network.parameters()]
        histories = minimise(members, **named)
        after = [parameter.clone() for parameter in members[0].network.parameters()]
        seen.append((members[0].train, named["objective"], state, after))
        return histories

    for module in (multilevel, transfer):
        monkeypatch.setattr(module, "minimise", record)
    npe = NPE(PRIOR, strategy=strategy, density=SMALL, training=TrainingOptions(epochs=epochs), seed=0)
    return npe.fit(make_data(), progress=False), seen


def test_stages_are_the_cheap_levels_and_then_the_telescoping_sum(monkeypatch):
    npe, seen = fit(monkeypatch, Both())
    assert [len(train) for train, *_ in seen] == [1, 1, 3]
    assert seen[2][1].weights == "estimated"
    for before, after in zip(seen[:-1], seen[1:], strict=True):
        for one, other in zip(before[3], after[2], strict=True):
            assert torch.equal(one, other)
    assert npe.history.labels == ("level 0", "level 1", "all levels at once")
    assert npe.history.to_frame()["stage"].unique().tolist() == [0, 1, 2]
    assert npe.history.best_epoch == 8 + npe.history.stages[2]


def test_one_map_serves_all_stages(monkeypatch):
    _, seen = fit(monkeypatch, Both())
    low, _, whole = (train for train, *_ in seen)
    coarse = whole[1].coarse
    assert torch.equal(low[0].fine[: len(whole[0])], whole[0].fine)
    assert (whole[1].fine - coarse).abs().mean() < 0.2  # aligned: the levels differ by a factor
    _, seen = fit(monkeypatch, Both(align=False))
    assert (seen[2][0][1].fine - seen[2][0][1].coarse).abs().mean() > 0.2


def test_its_parts_can_be_chosen(monkeypatch):
    strategy = Both(TransferLearning(joint=True), Multilevel((0.5, 0.5), align=False, project=True))
    _, seen = fit(monkeypatch, strategy)
    assert len(seen) == 2
    assert seen[1][1].project
    assert seen[1][1].weights == (0.5, 0.5)
    assert not strategy.transfer.fine_tune
