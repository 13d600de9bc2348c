import pytest
import torch
from torch import nn

from mlsbi import NPE, NSF, BoxPrior, Level, LevelStack, MLPEmbedding, TrainingOptions, TransferLearning, simulate
from mlsbi.strategies import transfer
from mlsbi.strategies.registry import resolve_strategy, strategy_from_config, strategy_to_config
from mlsbi.training.objective import Term, pool_level

SMALL = NSF(transforms=2, hidden=8)
QUICK = TrainingOptions(epochs=4)
PRIOR = BoxPrior([0.0, 0.0], [1.0, 2.0])


def level(shift):
    return lambda theta, noise: theta + 0.2 * noise + shift


def data_of(levels, n, seed=0):
    stack = LevelStack(PRIOR, lambda rows, generator: torch.randn(rows, 2, generator=generator),
                       [Level(f"l{i}", level(0.1 * (levels - 1 - i)), 10.0**i) for i in range(levels)])
    return simulate(stack, n, seed=seed, progress=False)


@pytest.fixture
def stages(monkeypatch):
    """Every call that trains a stage: the network's values before it, its rows, options and trained parameters."""
    calls = []

    def record(members, **keywords):
        member, = members
        network = member.network
        calls.append({
            "before": {name: value.clone() for name, value in network.state_dict().items()},
            "train": member.train, "validation": member.validation, "options": keywords["options"],
            "seed": member.seed, "trained": {name for name, p in network.named_parameters() if p.requires_grad},
        })
        histories = minimise(members, **keywords)
        calls[-1]["after"] = {name: value.clone() for name, value in network.state_dict().items()}
        return histories

    minimise = transfer.minimise
    monkeypatch.setattr(transfer, "minimise", record)
    return calls


def test_levels_are_trained_in_order_each_from_where_the_last_one_stopped(stages):
    data = data_of(3, (60, 30, 20))
    npe = NPE(PRIOR, strategy="transfer", density=SMALL, training=QUICK, seed=1).fit(data, progress=False)
    assert [len(call["train"][0]) + len(call["validation"][0]) for call in stages] == [90, 50, 20]
    for before, after in zip(stages[:-1], stages[1:], strict=True):
        for name, value in before["after"].items():
            assert torch.equal(value, after["before"][name]), name  # standardisers included
    assert all(call["train"][0].coarse is None for call in stages)
    assert len({call["seed"] for call in stages}) == 3
    history = npe.history
    assert history.n_train == tuple(len(call["train"][0]) for call in stages)
    frame = history.to_frame()
    assert frame["stage"].unique().tolist() == [0, 1, 2]
    assert len(frame) == 12
    assert 8 <= history.best_epoch < 12


def test_no_stage_trains_on_the_twin_of_a_row_held_out(stages):
    data = data_of(2, (40, 20))
    NPE(PRIOR, strategy="transfer", density=SMALL, training=QUICK, seed=1).fit(data, progress=False)
    first, second = stages
    held = second["validation"][0].input
    assert len(held) == 4
    assert not bool((first["train"][0].input[:, None] == held[None]).all(-1).any())
    assert bool((first["validation"][0].input[:, None] == held[None]).all(-1).any(0).all())


def test_learning_rate_and_patience_per_stage(stages):
    strategy = TransferLearning(learning_rate=(1e-3, 1e-5), patience=7)
    NPE(PRIOR, strategy=strategy, density=SMALL, training=QUICK, seed=1).fit(data_of(2, (40, 20)), progress=False)
    assert [call["options"].learning_rate for call in stages] == [1e-3, 1e-5]
    assert [call["options"].patience for call in stages] == [7, 7]
    assert [call["options"].epochs for call in stages] == [4, 4]


def test_a_frozen_embedding_stays_as_the_cheap_level_left_it(stages):
    npe = NPE(PRIOR, strategy=TransferLearning(freeze_embedding=True), density=SMALL, embedding=MLPEmbedding(4, 8, 1),
              training=QUICK, seed=1).fit(data_of(2, (40, 20)), progress=False)
    first, second = stages
    embedding = {name for name in first["before"] if name.startswith("embedding")}
    assert embedding
    assert embedding <= first["trained"]
    assert not embedding & second["trained"]
    assert all(torch.equal(first["after"][name], second["after"][name]) for name in embedding)
    assert any(not torch.equal(first["after"][name], second["after"][name]) for name in second["trained"])
    assert all(p.requires_grad for p in npe.networks[0].embedding.parameters())


def test_parameters_that_a_user_froze_stay_frozen():
    body = nn.Linear(2, 3)
    body.weight.requires_grad = False
    npe = NPE(PRIOR, strategy=TransferLearning(freeze_embedding=True), density=SMALL, embedding=body, training=QUICK)
    npe.fit(data_of(2, (40, 20)), progress=False)
    assert torch.equal(npe.networks[0].embedding.weight, body.weight)
    assert not npe.networks[0].embedding.weight.requires_grad
    assert npe.networks[0].embedding.bias.requires_grad


def test_without_fine_tuning_the_finest_outputs_are_not_trained_on(stages):
    """They enter the common standardiser and nothing else: permuted among their rows they change nothing."""
    data, permuted = data_of(2, (40, 20)), data_of(2, (40, 20))
    permuted.levels[1].fine.copy_(permuted.levels[1].fine.flip(0))
    strategy = TransferLearning(fine_tune=False)
    fits = [NPE(PRIOR, strategy=how, density=SMALL, training=QUICK, seed=1).fit(rows, progress=False)
            for how in (strategy, "transfer") for rows in (data, permuted)]
    x, points = torch.tensor([0.5, 1.0]), torch.tensor([[0.5, 1.0]])
    one, other, tuned, tuned_other = (npe.posterior(x).log_prob(points) for npe in fits)
    assert torch.allclose(one, other, atol=1e-4)  # the standardiser's sums are in another order
    assert not torch.allclose(tuned, tuned_other, atol=1e-3)
    assert fits[0].history.n_train == (48,)
    assert strategy.runs((40, 20)) == (60, 0)
    assert [len(call["train"][0]) for call in stages] == [48, 48, 48, 16, 48, 16]


def test_a_frozen_embedding_keeps_its_batch_statistics(stages):
    body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    NPE(PRIOR, strategy=TransferLearning(freeze_embedding=True), density=SMALL, embedding=body, training=QUICK).fit(
        data_of(2, (40, 20)), progress=False)
    first, second = stages
    moving = [name for name in first["after"] if "running" in name]
    assert moving
    assert any(not torch.equal(first["before"][name], first["after"][name]) for name in moving)
    assert all(torch.equal(first["after"][name], second["after"][name]) for name in moving)


def test_an_embedding_frozen_by_its_user_does_not_drift():
    body = nn.BatchNorm1d(2)
    body.weight.requires_grad = body.bias.requires_grad = False
    body.running_mean.fill_(5.0)
    npe = NPE(PRIOR, strategy="high", density=SMALL, embedding=body, training=QUICK)
    npe.fit(data_of(2, (40, 20)), progress=False)
    assert npe.networks[0].embedding.running_mean.tolist() == [5.0, 5.0]


def test_alignment_maps_the_cheap_level_first(stages):
    data = data_of(2, (400, 100))
    for align in (False, True):
        NPE(PRIOR, strategy=TransferLearning(align=align), density=SMALL, training=QUICK, seed=1).fit(data,
                                                                                                  progress=False)
    plain, aligned = stages[0]["train"][0].fine, stages[2]["train"][0].fine
    finest = stages[1]["train"][0].fine
    assert (plain.mean(0) - finest.mean(0)).abs().max() > (aligned.mean(0) - finest.mean(0)).abs().max()
    assert torch.equal(stages[1]["train"][0].fine, stages[3]["train"][0].fine)


@pytest.mark.slow
def test_transfer_beats_the_finest_level_alone_with_few_pairs():
    options = TrainingOptions(epochs=150, learning_rate=2e-3, patience=15)
    data, test = data_of(2, (2000, 12)), data_of(2, (1, 500), seed=9).levels[1]
    scores = {}
    for strategy in ("transfer", "high"):
        posterior = NPE(PRIOR, strategy=strategy, density=SMALL, training=options, seed=0).fit(
            data, progress=False).posterior()
        scores[strategy] = posterior.log_prob_batched(test.theta[None], test.fine)[0].mean().item()
    assert scores["transfer"] > scores["high"] + 0.2


def test_pooling_takes_every_output_of_a_level():
    a, b = torch.arange(3.0)[:, None], torch.arange(10.0, 12.0)[:, None]
    posterior = pool_level([Term(a, a + 0.5), Term(b, b + 0.9, b + 0.5)], 0)
    assert torch.equal(posterior.input, torch.cat([a, b]))
    assert torch.equal(posterior.fine, torch.cat([a, b]) + 0.5)
    likelihood = pool_level([Term(a + 0.5, a, of_outputs=True), Term(b + 0.9, b, b, b + 0.5, of_outputs=True)], 0)
    assert torch.equal(likelihood.input, torch.cat([a, b]) + 0.5)
    assert torch.equal(likelihood.fine, torch.cat([a, b]))
    assert likelihood.of_outputs


def test_configuration_round_trip():
    strategy = TransferLearning(learning_rate=[1e-3, 1e-4], patience=5, freeze_embedding=True)
    assert strategy_from_config(strategy_to_config(strategy)) == strategy
    assert resolve_strategy("transfer") == TransferLearning()


@pytest.mark.parametrize(("strategy", "levels", "match"), [
    (TransferLearning(), 1, "at least 2 levels"),
    (TransferLearning(learning_rate=(1e-3, 1e-3, 1e-3)), 2, "one learning_rate for all stages or 2"),
    (TransferLearning(patience=(5, 5), fine_tune=False), 2, "one patience for all stages or 1"),
    (TransferLearning(freeze_embedding=True), 2, "needs an embedding with parameters"),
])
def test_bad_combinations(strategy, levels, match):
    data = data_of(levels, (10, 5)[:levels])
    with pytest.raises(ValueError, match=match):
        NPE(PRIOR, strategy=strategy, density=SMALL, training=QUICK).fit(data, progress=False)


def test_bad_numbers():
    with pytest.raises(ValueError, match="positive learning_rate"):
        TransferLearning(learning_rate=(1e-3, 0.0))
    with pytest.raises(ValueError, match="positive patience"):
        TransferLearning(patience=0)
    with pytest.raises(ValueError, match="whole number of epochs as patience"):
        TransferLearning(patience=(30, 2.5))


def test_joint_training_begins_with_every_output_of_all_levels(stages):
    data = data_of(3, (60, 30, 20))
    npe = NPE(PRIOR, strategy=TransferLearning(joint=True), density=SMALL, training=QUICK, seed=1)
    npe.fit(data, progress=False)
    assert [len(call["train"][0]) + len(call["validation"][0]) for call in stages] == [90 + 50 + 20, 20]
    assert npe.history.labels == ("all levels", "level 2")
    only = TransferLearning(joint=True, fine_tune=False)
    assert only.runs((60, 30, 20)) == TransferLearning().runs((60, 30, 20))
    stages.clear()
    NPE(PRIOR, strategy=only, density=SMALL, training=QUICK, seed=1).fit(data, progress=False)
    assert len(stages) == 1
