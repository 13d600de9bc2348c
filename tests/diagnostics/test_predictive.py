import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Independent, Normal

from mlsbi import BoxPrior, Level, LevelStack, simulate
from mlsbi.diagnostics import posterior_predictive, predictive_levels
from mlsbi.simulation.campaign import simulate_level
from mlsbi.simulation.seeding import BLOCK
from mlsbi.store.records import JOINT_STREAM, TEST_STREAM

PRIOR = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)


def draw(n, generator):
    return {"u": torch.randn(n, 2, generator=generator)}


def make(fine=lambda theta, noise: theta + noise["u"], noise=draw, prior=PRIOR):
    return LevelStack(prior, noise, [Level("noise", lambda theta, noise: noise["u"], 1), Level("fine", fine, 2)])


def test_rows_are_theta_with_noise_of_their_own():
    theta = torch.randn(2 * BLOCK + 5, 2, generator=torch.Generator().manual_seed(0))
    x, u = (posterior_predictive(make(), theta, level=level, seed=1) for level in (-1, 0))
    assert torch.equal(x, theta + u)
    assert len(torch.unique(u)) == u.numel()
    assert torch.equal(x, posterior_predictive(make(), theta.double().numpy(), seed=1))
    assert torch.equal(x[: BLOCK + 3], posterior_predictive(make(), theta[: BLOCK + 3], seed=1))
    assert not bool((x == posterior_predictive(make(), theta, seed=2)).any())


def test_noise_is_that_of_no_other_rows():
    mine = posterior_predictive(make(), torch.zeros(50, 2), level=0, seed=1)
    others = [simulate_level(make(), 0, 50, seed=1, stream=stream)[1]
              for stream in (0, 1, JOINT_STREAM, JOINT_STREAM + 1, TEST_STREAM)]
    others.append(simulate(make(), 50, seed=1, progress=False).levels[0].fine)
    assert torch.equal(others[0], others[-1])  # equal noise does show
    for other in others:
        assert not np.isin(mine.numpy(), other.numpy()).any()


def test_black_boxes_get_seeds():
    def roll(theta, seeds):
        return theta + torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(int(s))) for s in seeds])

    stack = LevelStack(PRIOR, "seed", [Level("box", roll)])
    x = posterior_predictive(stack, torch.ones(500, 2), seed=1)
    assert torch.equal(x, posterior_predictive(stack, torch.ones(500, 2), seed=1))
    assert stats.kstest((x - 1).flatten(), "norm").pvalue > 0.01


def test_predictive_levels_of_gaussians():
    n, rng = 4000, np.random.default_rng(0)
    x_first = np.array([1.0, -0.5])
    theta = x_first / 2 + np.sqrt(0.5) * rng.standard_normal((n, 2))  # exact posterior
    x = posterior_predictive(make(), theta, seed=0)
    for x_o in (x_first, np.array([3.0, -1.0])):
        exact = stats.norm.cdf(x_o, x_first / 2, np.sqrt(1.5))
        error = 4 * np.sqrt(exact * (1 - exact) / n) + 1 / n
        assert (np.abs(predictive_levels(x_o, x) - exact) < error).all()
    assert (predictive_levels([40.0, -40.0], x) == [(n + 0.5) / (n + 1), 0.5 / (n + 1)]).all()


def test_predictive_levels_of_what_never_varies_are_in_the_middle():
    assert (predictive_levels(np.zeros((2, 3)), np.zeros((7, 2, 3))) == np.full((2, 3), 0.5)).all()


def test_simulators_cannot_change_the_draws():
    theta = torch.zeros(3, 2)
    posterior_predictive(make(fine=lambda theta, noise: theta.add_(noise["u"])), theta, seed=0)
    assert not theta.any()


def test_failed_rows_are_reported_and_kept():
    stack = make(fine=lambda theta, noise: theta.log())
    theta = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, 0.0]])
    with pytest.warns(UserWarning, match="'fine' gave NaN or infinite output at 2 of 3"):
        x = posterior_predictive(stack, theta, seed=0)
    assert torch.equal(torch.isfinite(x).all(1), torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match="0 and 2 NaN or infinite"):
        predictive_levels(np.zeros(2), x)


def test_bad_inputs():
    theta = torch.zeros(3, 2)
    for level in (2, -3):
        with pytest.raises(ValueError, match=f"level from -2 to 1; got {level}"):
            posterior_predictive(make(), theta, level=level, seed=0)
    with pytest.raises(ValueError, match=r"theta of shape \(n, 2\) in posterior draws"):
        posterior_predictive(make(), theta[0], seed=0)
    with pytest.raises(ValueError, match="at least one posterior draw"):
        posterior_predictive(make(), theta[:0], seed=0)
    with pytest.raises(ValueError, match="inside the prior's support; 3 of 3"):
        posterior_predictive(make(prior=BoxPrior([1.0, 1.0], [2.0, 2.0])), theta, seed=0)
    with pytest.raises(ValueError, match=r"return x of shape \(3, ...\)"):
        posterior_predictive(make(fine=lambda theta, noise: theta[:, 0]), theta, seed=0)
    with pytest.raises(ValueError, match="from its generator alone"):
        posterior_predictive(make(noise=lambda n, generator: {"u": torch.rand(n, 2)}), theta, seed=0)
    with pytest.raises(ValueError, match="as seed; got -1"):
        posterior_predictive(make(), theta, seed=-1)
    with pytest.raises(ValueError, match=r"got \(2,\) and \(5, 3\)"):
        predictive_levels(np.zeros(2), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="n at least 1"):
        predictive_levels(np.zeros(2), np.zeros((0, 2)))
