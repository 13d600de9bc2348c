import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack
from mlsbi.levels import campaign_cost, sum_pair_costs

PRIOR = BoxPrior([0.0], [1.0])


def noise(n, generator):
    return torch.randn(n, 1, generator=generator)


def simulate(theta, noise):
    return theta + noise


def test_pair_costs_default_to_both_runs():
    stack = LevelStack(PRIOR, noise, [Level("a", simulate, 1), Level("b", simulate, 4), Level("c", simulate, 9)])
    assert stack.row_costs == (1, 5, 13)


def test_given_pair_costs_replace_the_sum():
    stack = LevelStack(PRIOR, noise, [Level("a", simulate, 1), Level("b", simulate, 4)], pair_costs=[1, 4])
    assert stack.row_costs == (1, 4)


def test_undeclared_costs_are_unknown():
    stack = LevelStack(PRIOR, noise, [Level("a", simulate), Level("b", simulate)])
    assert stack.costs is None
    assert stack.row_costs is None


def test_campaign_cost_charges_pairs_as_declared():
    # 5 plain runs of the cheapest level and 3 pairs of each level above.
    runs, pairs = (8, 6, 3), (0, 3, 3)
    assert campaign_cost((1, 10, 100), sum_pair_costs((1, 10, 100)), runs=runs, pairs=pairs) == 8 + 60 + 300
    assert campaign_cost((1, 10, 100), (1, 10, 100), runs=runs, pairs=pairs) == 5 + 30 + 300


@pytest.mark.parametrize("costs", [(2, 1), (1, 1), (1, 3, 2)])
def test_declared_costs_must_ascend(costs):
    with pytest.raises(ValueError, match="ascending cost"):
        LevelStack(PRIOR, noise, [Level(str(i), simulate, cost) for i, cost in enumerate(costs)])


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: Level("a", "nothing"), TypeError, "function simulate"),
        (lambda: Level("a", simulate, 0.0), ValueError, "positive, finite cost"),
        (lambda: Level("a", simulate, float("nan")), ValueError, "positive, finite cost"),
        (lambda: LevelStack(PRIOR, noise, []), ValueError, "at least one"),
        (lambda: LevelStack(PRIOR, noise, [Level("a", simulate), Level("a", simulate)]), ValueError, "different names"),
        (lambda: LevelStack(PRIOR, noise, [Level("a", simulate, 1), Level("b", simulate)]), ValueError, "or for none"),
        (lambda: LevelStack(PRIOR, "random", [Level("a", simulate)]), TypeError, '"seed"'),
        (lambda: LevelStack("prior", noise, [Level("a", simulate)]), TypeError, "Distribution"),
        (lambda: LevelStack(PRIOR, noise, [Level("a", simulate, 1)], pair_costs=[1, 2]), ValueError, "1 positive pair"),
        (lambda: LevelStack(PRIOR, noise, [Level("a", simulate)], pair_costs=[1]), ValueError, "beside pair_costs"),
    ],
)
def test_bad_stacks(build, error, match):
    with pytest.raises(error, match=match):
        build()


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        (lambda n, generator: torch.randn(3, 1), ValueError, "leading dimension 5"),
        (lambda n, generator: [1.0, 2.0], TypeError, "give tensors"),
        (lambda n, generator: {"a": torch.randn(n), "b": None}, TypeError, "give tensors"),
    ],
)
def test_bad_noise(source, error, match):
    stack = LevelStack(PRIOR, source, [Level("a", simulate)])
    with pytest.raises(error, match=match):
        stack.draw_noise(5, torch.Generator())


def test_seed_noise_gives_different_64_bit_integers():
    seeds = LevelStack(PRIOR, "seed", [Level("a", simulate)]).draw_noise(100, torch.Generator().manual_seed(1))
    assert seeds.dtype == torch.int64
    assert len(set(seeds.tolist())) == 100
    assert int(seeds.min()) >= 0
