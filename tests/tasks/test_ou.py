import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal

from mlsbi import tasks
from mlsbi.priors import sample_prior
from mlsbi.simulation.campaign import simulate_joint
from mlsbi.tasks.ou import OUPosterior, euler, stationary


@pytest.fixture(params=[3, 4])
def task(request):
    return tasks.get("ou", parameters=request.param)


THE_FOURTH_IS_SLOW = pytest.mark.parametrize("task", [3, pytest.param(4, marks=pytest.mark.slow)], indirect=True)


def start_of(theta):
    return theta[:, 3] if theta.shape[1] == 4 else torch.full_like(theta[:, 0], 2.0)


def test_euler_is_the_recursion_at_the_points_stated(task):
    theta = sample_prior(task.prior, 50, seed=0).double()
    noise = torch.randn(50, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gamma, mu, sigma = theta[:, 0], theta[:, 1], theta[:, 2]
    path = [start_of(theta)]
    for t in range(100):
        path.append(path[-1] + gamma * (mu - path[-1]) * 0.1 + sigma * math.sqrt(0.1) * noise[:, t])
    points = [path[1], path[4], path[11], path[32], path[100]]
    x = euler(theta, noise)
    assert torch.allclose(x, torch.stack(points, 1), rtol=0, atol=1e-12)  # float64 algebra
    wrong = [path[0], path[3], path[10], path[31], path[99]]  # X_0 counted as a point
    assert not torch.allclose(x, torch.stack(wrong, 1), rtol=0, atol=1e-3)
    assert task.x_axis == pytest.approx([0.1, 0.4, 1.1, 3.2, 10.0])


def test_stationary_reads_the_same_normals(task):
    theta = sample_prior(task.prior, 50, seed=0)
    noise = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    u = torch.stack([noise[:, 0], noise[:, 3], noise[:, 10], noise[:, 31], noise[:, 99]], 1)
    expected = theta[:, 1:2] + theta[:, 2:3] / (2 * theta[:, 0:1]).sqrt() * u
    assert torch.allclose(stationary(theta, noise), expected, rtol=1e-5)


@pytest.mark.parametrize("simulate", [euler, stationary])
def test_simulators_are_pure_and_treat_rows_alone(simulate, task):
    theta = sample_prior(task.prior, 37, seed=1)
    noise = torch.randn(37, 100, generator=torch.Generator().manual_seed(1))
    before = theta.clone(), noise.clone()
    x = simulate(theta, noise)
    assert torch.equal(theta, before[0])
    assert torch.equal(noise, before[1])
    assert torch.equal(simulate(theta[:5], noise[:5]), x[:5])


def test_fourth_parameter_is_the_start_which_the_low_level_ignores():
    theta = sample_prior(tasks.get("ou", parameters=4).prior, 20, seed=2)
    noise = torch.randn(20, 100, generator=torch.Generator().manual_seed(2))
    moved = theta + torch.tensor([0.0, 0.0, 0.0, 0.5])
    low = tasks.get("ou", parameters=4).stack.levels[0]
    assert torch.equal(low.run(theta, noise), low.run(moved, noise))
    assert torch.equal(low.run(theta, noise), stationary(theta[:, :3], noise))
    assert (euler(theta, noise)[:, 0] != euler(moved, noise)[:, 0]).all()
    two = torch.cat([theta[:, :3], torch.full((20, 1), 2.0)], 1)
    assert torch.equal(euler(two, noise), euler(theta[:, :3], noise))


def test_coupling_has_the_correlation_of_the_last_step(task):
    r"""At fixed theta a point shares the last of its steps with the low level; with other noise it shares nothing."""
    n = 20_000
    theta = sample_prior(task.prior, 1, seed=0).expand(n, -1)
    low, high = (
        level(theta, torch.randn(n, 100, generator=torch.Generator().manual_seed(0))) for level in (stationary, euler)
    )
    other = stationary(theta, torch.randn(n, 100, generator=torch.Generator().manual_seed(1)))
    decay = 1 - 0.1 * float(theta[0, 0])
    for j, steps in enumerate([1, 4, 11, 32, 100]):
        expected = math.sqrt((1 - decay**2) / (1 - decay ** (2 * steps)))
        shared = np.corrcoef(low[:, j], high[:, j])[0, 1]
        # A correlation's standard error is at most 1/sqrt(n); 4 of them.
        assert abs(shared - expected) < 4 / math.sqrt(n)
        assert abs(np.corrcoef(other[:, j], high[:, j])[0, 1]) < 4 / math.sqrt(n) < shared


def test_likelihood_is_the_dense_gaussian_of_the_simulator(task):
    r"""The path is linear in the noise, so that its response to unit noise gives its exact covariance."""
    theta, x = task.test(20, 0)
    log_likelihood = task.reference.log_likelihood(theta, x)
    for row in range(20):
        one = theta[row : row + 1].double()
        mean = euler(one, torch.zeros(1, 100, dtype=torch.float64))[0]
        response = euler(one.expand(100, -1), torch.eye(100, dtype=torch.float64)) - mean
        dense = MultivariateNormal(mean, response.T @ response).log_prob(x[row].double())
        assert log_likelihood[row].item() == pytest.approx(dense.item(), abs=1e-9)  # float64 algebra
        wider = MultivariateNormal(mean, 1.02 * response.T @ response).log_prob(x[row].double())
        assert log_likelihood[row].item() != pytest.approx(wider.item(), abs=1e-4)


def test_evidence_has_converged(task):
    x = task.test(100, 1)[1]
    coarse, default, fine = (OUPosterior(task.prior, nodes).log_evidence(x) for nodes in (8, 32, 64))
    assert (default - fine).abs().max() < 1e-8  # what the docstring says, with some room
    assert (coarse - fine).abs().max() > 1e-4  # the comparison can see a rule that is too coarse


def test_evidence_is_the_mean_likelihood_over_the_prior(task):
    theta = sample_prior(task.prior, 400_000, seed=3)
    for x in task.test(3, 2)[1]:
        likelihood = task.reference.log_likelihood(theta, x).exp()
        error = likelihood.std() / len(theta) ** 0.5
        evidence = task.reference.log_evidence(x).exp()
        assert error < 0.1 * evidence  # else the next line would say nothing
        assert abs(likelihood.mean() - evidence) < 4 * error


def test_posterior_holds_for_observations_that_the_prior_hardly_allows(task):
    x = torch.tensor([[7.0, -3.0, 5.0, 0.0, 9.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    theta = sample_prior(task.prior, 2, seed=0)
    assert torch.isfinite(task.reference.log_prob(theta, x)).all()
    fine = OUPosterior(task.prior, 96).log_evidence(x)
    assert (task.reference.log_evidence(x) - fine).abs().max() < 1e-6
    for row in x:
        assert torch.isfinite(task.prior.log_prob(task.reference.sample(100, row, 0))).all()


def test_draws_feel_the_edge_of_the_start():
    r"""A first point below 0 is reached from X_0 >= 0 more easily when mu is low. Checked by weighted prior draws."""
    task = tasks.get("ou", parameters=4)
    x = torch.tensor([-0.5, -0.1, 0.8, 1.3, 1.1])
    theta = sample_prior(task.prior, 400_000, seed=6).double()
    weight = torch.softmax(task.reference.log_likelihood(theta, x), 0)
    draws = task.reference.sample(20_000, x, 0).double()
    mean = (weight[:, None] * theta).sum(0)
    error = (weight[:, None] ** 2 * (theta - mean) ** 2).sum(0).sqrt()
    assert (error < 0.1 * draws.std(0)).all()  # else the next line would say nothing
    assert ((mean - draws.mean(0)).abs() < 4 * (error + draws.std(0) / 20_000**0.5)).all()


def test_exact_nlpd_is_the_published_one():
    r"""Published: -1.479, the mean over 500 observations. Both means have noise; 3 of their standard errors."""
    theta, x = tasks.get("ou").test(4000, 0)
    loss = -tasks.get("ou").reference.log_prob(theta, x)
    error = loss.std() * math.sqrt(1 / 500 + 1 / len(loss))
    assert abs(loss.mean() + 1.479) < 3 * error
    assert 3 * error < 0.2  # NPE trained on 10^4 high simulations, at -0.995, would fail


@pytest.mark.parametrize(("parameters", "nlpd"), [(3, 0.266), (4, 1.758)])
def test_prior_nlpd_is_the_published_one(parameters, nlpd):
    task = tasks.get("ou", parameters=parameters)
    assert -task.prior.log_prob(task.test(1, 0)[0]).item() == pytest.approx(nlpd, abs=5e-4)  # printed digits


@THE_FOURTH_IS_SLOW
def test_exact_posterior_is_calibrated_and_a_narrow_one_is_not(task):
    r"""Ranks of the truth among posterior draws are uniform (KS over 150 observations, each parameter)."""
    truth, x = task.test(150, 4)
    draws = torch.stack([task.reference.sample(200, row, seed) for seed, row in enumerate(x)])
    narrow = draws.mean(1, keepdim=True) + 0.7 * (draws - draws.mean(1, keepdim=True))

    def p_values(samples):
        # Rank plus a uniform within it, so that the ranks have a continuous law.
        jitter = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
        ranks = ((samples < truth[:, None]).sum(1) + jitter) / (samples.shape[1] + 1)
        return [stats.kstest(ranks[:, i].numpy(), "uniform").pvalue for i in range(truth.shape[1])]

    def centred(samples):
        jitter = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
        ranks = ((samples < truth[:, None]).sum(1) + jitter) / (samples.shape[1] + 1)
        return [stats.kstest((2 * ranks[:, i] - 1).abs().numpy(), "uniform").pvalue for i in range(truth.shape[1])]

    # 14 p-values under fixed seeds in all: the smallest of a right posterior is below 1e-3 in one case of 70.
    assert min(p_values(draws) + centred(draws)) > 1e-3
    assert min(centred(narrow)) < 1e-3


@THE_FOURTH_IS_SLOW
def test_draws_at_another_observation_fail(task):
    r"""The exact posterior of one row judged by the truth of another: what mixing up rows would look like."""
    theta, x = task.test(500, 5)
    own, other = task.reference.log_prob(theta, x), task.reference.log_prob(theta, x.roll(1, 0))
    assert own.mean() > other.mean() + 1


def test_shapes_and_errors(task):
    reference = task.reference
    theta, x = task.test(6, 0)
    assert torch.allclose(reference.log_prob(theta, x)[2:3], reference.log_prob(theta[2:3], x[2]), rtol=0, atol=1e-9)
    assert reference.sample(7, x[:1], 0).shape == (7, theta.shape[1])
    assert reference.sample(7, x[0], 0).dtype == theta.dtype
    with pytest.raises(ValueError, match=r"theta of shape \(n, \d\); got \(6, 2\)"):
        reference.log_prob(theta[:, :2], x)
    with pytest.raises(ValueError, match=r"one per row of theta, 6; got 5"):
        reference.log_prob(theta, x[:5])
    with pytest.raises(ValueError, match=r"x of shape \(n, 5\).*got \(6, 4\)"):
        reference.log_prob(theta, x[:, :4])
    with pytest.raises(ValueError, match="one observation"):
        reference.sample(7, x, 0)
    with pytest.raises(ValueError, match="parameters=3 or parameters=4"):
        tasks.get("ou", parameters=5)


def test_levels_of_the_stack_are_the_two_simulators(task):
    joint = simulate_joint(task.stack, 10, seed=0, stream=99)
    generator = torch.Generator().manual_seed(0)
    assert task.stack.noise(10, generator).shape == (10, 100)
    assert [output.shape for output in joint.outputs] == [(10, 5), (10, 5)]
    assert task.levels == (("stationary", 1.0), ("euler", 100.0))
