import json
from dataclasses import asdict, dataclass, replace

import pytest
import torch

from mlsbi import (
    MAF,
    MDN,
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
from mlsbi.strategies import multilevel
from mlsbi.strategies.registry import resolve_strategy, strategy_from_config, strategy_names, strategy_to_config
from mlsbi.training.descent import Objective
from mlsbi.training.history import join_histories
from mlsbi.training.loop import minimise
from mlsbi.training.members import Member
from mlsbi.training.objective import Term, pool_level

SMALL = MDN(components=2, hidden=8, layers=1)
QUICK = TrainingOptions(epochs=4)
PRIOR = BoxPrior([0.0], [1.0])
STRATEGIES = [Multilevel(), Multilevel("estimated", rescale=True, project=True), Multilevel((0.5,), align=False),
              Multilevel(correction_limit=0.5, difference_penalty=2.0), TransferLearning(), SingleLevel(0),
              TransferLearning(learning_rate=(1e-3, 1e-4), patience=3, fine_tune=True), SingleLevel(-1),
              TransferLearning(joint=True), TransferThenMultilevel(), Translation(), Translation(MAF(hidden=8)),
              TransferThenMultilevel(TransferLearning(joint=True), Multilevel("unit", align=False), align=False)]
COVERING = [Auto(), Auto((SingleLevel(-1), Multilevel()), pseudo_rows=(1.0, 2.5)),
            Emulation(((SMALL, SingleLevel(-1)), (MAF(transforms=1, hidden=4), TransferLearning())), rows=100)]


def make_data(n=(80, 20)):
    g = torch.Generator().manual_seed(0)
    levels = []
    for level, rows in enumerate(n):
        theta, u = torch.rand(rows, 1, generator=g), 0.1 * torch.randn(rows, 2, generator=g)
        fine, coarse = theta + u, 2 * (theta + u) + 1
        levels.append((theta, fine, coarse) if level else (theta, coarse))
    return MultilevelData.from_arrays(levels)


def fit(strategy, ensemble=1, options=QUICK, data=None, **more):
    npe = NPE(PRIOR, strategy=strategy, density=SMALL, training=options, seed=1)
    return npe.fit(make_data() if data is None else data, ensemble=ensemble, progress=False, **more)


@dataclass(frozen=True)
class Reversed:
    """A user's own strategy: the finest level first, then the cheapest."""

    rate: float = 1e-3

    def terms(self, terms):
        return list(terms)

    def runs(self, n):
        return tuple(n)

    def fit(self, members, *, options, pooled=False, schedules=(), checkpoint=None, progress=True, label="training"):
        options, stages = replace(options, learning_rate=self.rate), []
        for stage, level in enumerate(range(len(members[0].train) - 1, -1, -1)):
            rows = [Member(member.network, [pool_level(member.train, level)],
                           [pool_level(member.validation, level)] if member.validation else [], member.seed + stage)
                    for member in members]
            stages.append(minimise(
                rows, objective=Objective(), options=options, pooled=pooled,
                schedule=schedules[stage] if schedules else None,
                checkpoint=None if checkpoint is None else checkpoint.part(str(stage)), progress=progress, label=label))
        return [join_histories(own) for own in zip(*stages, strict=True)]


@pytest.mark.parametrize("strategy", [*STRATEGIES, Reversed()], ids=str)
@pytest.mark.parametrize(("ensemble", "cross_fit"), [(1, False), (3, False), (1, True), (2, True)])
def test_every_strategy_trains_one_network_or_several(strategy, ensemble, cross_fit, tmp_path):
    options = replace(QUICK, cross_fit=cross_fit, validation_fraction=0.34)
    npe = fit(strategy, ensemble, options, checkpoint=tmp_path)
    assert len(npe.networks) == len(npe.histories) == ensemble
    found = npe.posterior(torch.tensor([0.3, 0.3])).log_prob(torch.tensor([[0.2], [0.5]]))
    assert bool(found.isfinite().all())
    again = fit(strategy, ensemble, options, checkpoint=tmp_path)  # at once, from what is there
    assert torch.equal(found, again.posterior(torch.tensor([0.3, 0.3])).log_prob(torch.tensor([[0.2], [0.5]])))


@pytest.mark.parametrize("strategy", COVERING, ids=str)
@pytest.mark.parametrize("ensemble", [1, 3])
def test_strategies_that_hold_every_row_out_train_one_network_or_several(strategy, ensemble, tmp_path):
    npe = fit(strategy, ensemble, QUICK, checkpoint=tmp_path)
    assert len(npe.networks) == len(npe.histories) == ensemble
    found = npe.posterior(torch.tensor([0.3, 0.3])).log_prob(torch.tensor([[0.2], [0.5]]))
    assert bool(found.isfinite().all())
    again = fit(strategy, ensemble, QUICK, checkpoint=tmp_path)
    assert torch.equal(found, again.posterior(torch.tensor([0.3, 0.3])).log_prob(torch.tensor([[0.2], [0.5]])))


@pytest.mark.parametrize("strategy", [*STRATEGIES, *COVERING, Emulation()], ids=str)
def test_configurations_come_back_through_json(strategy):
    assert strategy_from_config(json.loads(json.dumps(strategy_to_config(strategy)))) == strategy


def test_a_users_own_strategy_is_named_but_not_read_back():
    config = strategy_to_config(Reversed(0.01))
    assert config == {"name": "Reversed", "options": {"rate": 0.01}}
    assert strategy_from_config(config) is None
    mixed = json.loads(json.dumps(strategy_to_config(Auto((SingleLevel(-1), Reversed())))))
    assert mixed["options"]["candidates"][1]["strategy"]["name"] == "Reversed"
    assert strategy_from_config(mixed) is None
    own = Emulation(((lambda dim, condition_dim: None, SingleLevel(-1)),))
    assert strategy_from_config(json.loads(json.dumps(strategy_to_config(own)))) is None
    assert resolve_strategy(Reversed()) == Reversed()


def test_names():
    assert {name: resolve_strategy(name) for name in strategy_names()} == {
        "multilevel": Multilevel(), "transfer": TransferLearning(), "high": SingleLevel(-1), "low": SingleLevel(0),
        "transfer_then_multilevel": TransferThenMultilevel(), "translation": Translation(),
        "emulation": Emulation(), "auto": Auto()}
    with pytest.raises(ValueError, match="Unknown strategy 'all'"):
        resolve_strategy("all")
    with pytest.raises(TypeError, match=r"A class must be called: Multilevel\(\)"):
        resolve_strategy(3)


def test_one_level_is_every_output_of_it():
    terms = [Term(torch.zeros(5, 1), torch.zeros(5, 2)), Term(*(torch.ones(3, size) for size in (1, 2, 2)))]
    assert [len(SingleLevel(level).terms(terms)[0]) for level in (0, 1, -1, -2)] == [8, 3, 3, 8]
    assert [SingleLevel(level).runs((5, 3)) for level in (0, -1)] == [(8, 0), (0, 3)]
    for level in (2, -3):
        with pytest.raises(ValueError, match="a level between -2 and 1"):
            SingleLevel(level).terms(terms)


def test_multilevel_aligns_what_it_trains_on(monkeypatch):
    seen = []
    monkeypatch.setattr(multilevel, "minimise", lambda members, **named: seen.append((members, named)) or minimise(
        members, **named))
    for align in (True, False):
        fit(Multilevel(align=align), ensemble=2, options=replace(QUICK, together=True), data=make_data((200, 80)))
    (aligned, _), (plain, _) = seen
    for one, other in zip(aligned, plain, strict=True):
        for with_map, without in ((one.train, other.train), (one.validation, other.validation)):
            assert torch.equal(with_map[1].fine, without[1].fine)
            apart = [(rows[1].fine - rows[1].coarse).abs().mean() for rows in (with_map, without)]
            assert apart[0] < 0.2 * apart[1]
    assert not torch.equal(aligned[0].train[1].coarse, aligned[1].train[1].coarse)


def test_multilevel_passes_its_options_on(monkeypatch):
    seen = []
    monkeypatch.setattr(multilevel, "minimise", lambda members, **named: seen.append(named["objective"]) or minimise(
        members, **named))
    strategy = Multilevel([0.5], rescale=True, project=True, correction_limit=0.7, difference_penalty=1.5)
    fit(strategy)
    objective, = seen
    assert asdict(objective) == {name: value for name, value in asdict(strategy).items() if name != "align"}
    assert objective.weights == (0.5,)


@pytest.mark.parametrize(("given", "match"), [
    ({"weights": "optimal"}, '"unit", "estimated" or numbers'),
    ({"correction_limit": -1.0}, "correction_limit > 0"),
    ({"difference_penalty": -0.1}, "difference_penalty >= 0"),
])
def test_bad_options_are_refused_where_they_are_given(given, match):
    with pytest.raises(ValueError, match=match):
        Multilevel(**given)
