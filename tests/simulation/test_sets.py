import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack, SimulationError
from mlsbi.simulation.campaign import simulate_level
from mlsbi.simulation.sets import simulate_sets

PRIOR = BoxPrior([0.0], [1.0])


def stack_of(simulate):
    return LevelStack(PRIOR, lambda n, generator: torch.randn(n, 2, generator=generator),
                      [Level("low", simulate, 1), Level("high", simulate, 2)])


STACK = stack_of(lambda theta, noise: theta + noise)


def test_outputs_of_a_set_share_theta_and_nothing_else():
    theta, x = simulate_sets(STACK, -1, 700, 3, seed=0, stream=9)
    assert theta.shape == (700, 1)
    assert x.shape == (700, 3, 2)
    noise = x - theta[:, None]
    flat = noise.reshape(2100, 2)
    assert len(flat.unique(dim=0)) == 2100
    assert abs(torch.corrcoef(noise[:, :, 0].T)[0, 1].item()) < 4 / 700**0.5
    assert abs(torch.corrcoef(torch.stack([theta[:, 0], noise[:, 0, 0]]))[0, 1].item()) < 4 / 700**0.5


def test_sets_of_one_are_the_rows_of_a_level():
    theta, x = simulate_sets(STACK, 0, 30, 1, seed=1, stream=9)
    rows = simulate_level(STACK, 0, 30, seed=1, stream=9)
    assert torch.equal(theta, rows[0])
    assert torch.equal(x[:, 0], rows[1])


def test_more_sets_extend_fewer_and_blocks_do_not_show():
    few, many = (simulate_sets(STACK, -1, n, 5, seed=2, stream=9) for n in (10, 400))
    assert torch.equal(few[0], many[0][:10])
    assert torch.equal(few[1], many[1][:10])


def test_sets_with_infinite_outputs_are_left_out_with_a_warning():
    broken = stack_of(lambda theta, noise: torch.where(noise > 2.5, torch.inf, theta + noise))
    with pytest.warns(UserWarning, match="Left out rows"):
        theta, x = simulate_sets(broken, -1, 200, 4, seed=0, stream=9)
    assert 150 < len(theta) == len(x) < 200
    assert torch.isfinite(x).all()
    hopeless = stack_of(lambda theta, noise: torch.full_like(noise, torch.nan))
    with pytest.raises(SimulationError, match="Every one of the first 10 rows of level 'high' failed"):
        simulate_sets(hopeless, -1, 5, 2, seed=0, stream=9)
    with pytest.raises(ValueError, match="at least one output; got n=5, m=0"):
        simulate_sets(STACK, -1, 5, 0, seed=0, stream=9)
