import pytest
import torch

import mlsbi
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


def three(theta, noise):
    gamma, mu, sigma = theta.split(1, 1)
    return gamma + 2 * mu + sigma * noise


def four(theta, noise):
    return three(theta[:, :3], noise) + theta[:, 3:]


NAMES = ["gamma", "mu", "sigma", "x_0"]
BOX = BoxPrior([0.1] * 4, [1.0, 2.0, 3.0, 4.0], names=NAMES)


def draw_noise(n, generator):
    return torch.randn(n, 1, generator=generator)


@pytest.mark.parametrize("fewer", [0, 1], ids=["the low level has fewer", "the high level has fewer"])
def test_levels_read_their_own_parameters_and_the_others_are_dummies(fewer):
    own = [{"simulate": four}, {"simulate": four}]
    own[fewer] = {"simulate": three, "parameters": NAMES[:3]}
    stack = LevelStack(BOX, draw_noise, [Level(f"l{i}", cost=10.0**i, **own[i]) for i in range(2)])
    data = mlsbi.simulate(stack, (50, 20), seed=0, progress=False)
    pairs = data.levels[1]
    assert pairs.theta.shape == (20, 4)  # of all levels alike
    with_x_0, without = (pairs.fine, pairs.coarse) if fewer == 0 else (pairs.coarse, pairs.fine)
    assert torch.allclose(with_x_0 - without, pairs.theta[:, 3:], atol=1e-5)


def test_parameters_come_in_the_order_in_which_the_level_names_them():
    seen = []

    def record(theta, noise):
        seen.append(theta)
        return theta[:, :1]

    stack = LevelStack(BOX, draw_noise, [Level("low", record, parameters=["x_0", "gamma"]), Level("high", four)])
    theta = torch.rand(5, 4)
    stack.levels[0].run(theta, draw_noise(5, torch.Generator()))
    assert torch.equal(seen[0], theta[:, [3, 0]])
    assert torch.equal(stack.levels[1].own(theta), theta)
    assert stack.levels[0] == Level("low", record, parameters=["x_0", "gamma"])


def test_functions_of_one_sample_read_their_own_parameters_too():
    low = mlsbi.per_sample(lambda theta, noise: theta[:1] * 10)
    stack = LevelStack(BOX, draw_noise, [Level("low", low, parameters=["x_0"]), Level("high", four)])
    data = mlsbi.simulate(stack, (6, 3), seed=0, progress=False)
    assert torch.allclose(data.levels[0].fine.float(), 10 * data.levels[0].theta[:, 3:])


def test_a_store_tells_levels_with_other_parameters_apart(tmp_path):
    def stack_of(parameters):
        return LevelStack(BOX, draw_noise, [Level("low", lambda theta, noise: theta[:, :1], 1.0, parameters),
                                            Level("high", four, 2.0)])

    mlsbi.simulate(stack_of(["gamma", "mu"]), (4, 2), seed=0, store=tmp_path, progress=False)
    with pytest.raises(ValueError, match="parameters: mu, gamma"):
        mlsbi.simulate(stack_of(["mu", "gamma"]), (4, 2), seed=0, store=tmp_path, progress=False)


def test_wrong_parameters_are_refused():
    with pytest.raises(TypeError, match="a list of parameter names for level 'low'"):
        Level("low", three, parameters="gamma")
    for wrong in ([], ["gamma", "gamma"]):
        with pytest.raises(ValueError, match="different parameter names for level 'low'"):
            Level("low", three, parameters=wrong)
    with pytest.raises(ValueError, match=r"\['kappa'\], which the prior lacks; it has \['gamma'"):
        LevelStack(BOX, draw_noise, [Level("low", three, parameters=["gamma", "kappa"])])
    with pytest.raises(ValueError, match=r"No level has the parameters \['x_0'\]"):
        LevelStack(BOX, draw_noise, [Level(f"l{i}", three, parameters=NAMES[:3]) for i in range(2)])
