import math
from dataclasses import replace

import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack
from mlsbi.inference.multifidelity_abc import multifidelity_abc

RUNS = {"low": 0, "high": 0}


def make_stack(shift=0.1):
    def low(theta, noise):
        RUNS["low"] += len(theta)
        return theta + 0.1 * noise + shift

    def high(theta, noise):
        RUNS["high"] += len(theta)
        return theta + 0.1 * noise

    return LevelStack(BoxPrior([0.0], [1.0]), lambda n, generator: torch.randn(n, 1, generator=generator),
                      [Level("low", low, cost=1.0), Level("high", high, cost=20.0)])


def mean(found):
    return float((found.weights * found.theta[:, 0]).sum() / found.weights.sum())


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.4])
def test_the_finest_level_corrects_the_cheap_one(shift):
    """Weighted means are the finest level's, however far off the cheap level is; over it alone they are not."""
    means = [mean(multifidelity_abc(make_stack(shift), [0.5], low_runs=4000, high_runs=1000, seed=seed, accepted=0.2))
             for seed in range(24)]
    error = float(torch.tensor(means).std()) / math.sqrt(len(means))
    assert abs(sum(means) / len(means) - 0.5) < 4 * error
    if shift == 0.1:  # the control: the cheap level's own acceptance is off by its shift
        stack = make_stack(shift)
        low = stack.levels[0]
        wrong = replace(stack, levels=[low, replace(low, name="again", cost=20.0)])
        off = mean(multifidelity_abc(wrong, [0.5], low_runs=4000, high_runs=1000, seed=0, accepted=0.2)) - 0.5
        assert off < -8 * error


def test_runs_are_counted_and_kept_within():
    RUNS.update(low=0, high=0)
    found = multifidelity_abc(make_stack(), [0.5], low_runs=2000, high_runs=100, seed=0)
    assert found.runs == (RUNS["low"], RUNS["high"])
    assert found.runs[0] == 2000
    assert 60 <= found.runs[1] <= 100
    assert 0 < found.continuation[1] <= 1
    assert found.effective > 10
    assert 0 <= found.negative < 1
    assert all(0 < each <= 1 for each in found.continuation)


def test_seeds_reproduce_and_leave_global_state():
    state = torch.get_rng_state()
    one, again, other = (multifidelity_abc(make_stack(), [0.5], low_runs=500, high_runs=50, seed=seed)
                         for seed in (1, 1, 2))
    assert torch.equal(one.weights, again.weights)
    assert not torch.equal(one.theta[:5], other.theta[:5])
    assert torch.equal(one.sample(9, seed=0), again.sample(9, seed=0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("options", "match"), [
    ({"high_runs": 15}, "at least 16"), ({"high_runs": 501}, "as many low_runs"), ({"accepted": 0.0}, "accepted"),
])
def test_bad_requests(options, match):
    with pytest.raises(ValueError, match=match):
        multifidelity_abc(make_stack(), [0.5], **{"low_runs": 500, "high_runs": 50, "seed": 0, **options})
    with pytest.raises(ValueError, match="at least 2 levels"):
        multifidelity_abc(replace(make_stack(), levels=make_stack().levels[1:]), [0.5], low_runs=500, high_runs=50,
                          seed=0)
    broken = Level("high", lambda theta, noise: theta.where(theta < 0.9, math.nan), cost=20.0)
    with pytest.raises(ValueError, match="of level 'high' are not"):
        multifidelity_abc(replace(make_stack(), levels=[make_stack().levels[0], broken]), [0.5], low_runs=500,
                          high_runs=50, seed=0)
    with pytest.raises(ValueError, match="one observation"):
        multifidelity_abc(make_stack(), [0.5, 1.0], low_runs=500, high_runs=50, seed=0)
