import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import MultivariateNormal

from mlsbi import tasks
from mlsbi.priors import sample_prior
from mlsbi.tasks.ou2 import OU2Posterior, euler, gaussian, log_likelihood, noise

THETA = torch.tensor([[1.5, 0.4, 0.45, 2.0]], dtype=torch.float64)


@pytest.fixture(params=[2, 3, 4])
def task(request):
    return tasks.get("ou2", parameters=request.param)


@pytest.fixture(scope="module")
def published():
    """Ten observations and their exact posteriors, worked out by others; skipped where they are not at hand."""
    path = Path(__file__).parents[3] / "shared" / "data" / "ou2" / "ou2_observations_10.npz"
    if not path.is_file():
        pytest.skip("needs the published OU2 observations")
    return {name: torch.from_numpy(array) for name, array in np.load(path, allow_pickle=False).items()}


def normals(n, seed=0):
    return noise(n, torch.Generator().manual_seed(seed))


def response(simulate, theta):
    """Mean (10,) and response to unit noise (91, 10): outputs are linear in the noise."""
    mean = simulate(theta, torch.zeros(1, 91, dtype=torch.float64))
    return mean[0], simulate(theta.expand(91, -1), torch.eye(91, dtype=torch.float64)) - mean


def brute_force(prior, x):
    """Every parameter on Gauss-Legendre nodes: theta, posterior weights that sum to one, and the log evidence."""
    dim = len(prior.low)
    rules = [np.polynomial.legendre.leggauss(nodes) for nodes in ((160, 96, 1, 1), (96, 48, 96, 1), (48, 24, 48, 12))
             [dim - 2][:dim]]
    unit = torch.cartesian_prod(*(torch.from_numpy(points + 1) / 2 for points, _ in rules))
    weight = torch.cartesian_prod(*(torch.from_numpy(weights) / 2 for _, weights in rules)).prod(1)
    low, high = prior.low.double(), prior.high.double()
    theta = low + (high - low) * unit
    joint = log_likelihood(x, theta) + weight.log()
    return theta, joint.softmax(0), joint.logsumexp(0)


def moments(theta, weight=None):
    """Means, then second central moments, and their standard errors were theta independent draws."""
    weight = torch.full((len(theta),), 1 / len(theta), dtype=torch.float64) if weight is None else weight
    mean = weight @ theta
    centred = theta - mean
    rows, columns = torch.triu_indices(theta.shape[1], theta.shape[1])
    features = torch.cat([centred, centred[:, rows] * centred[:, columns]], 1)
    average = weight @ features
    return torch.cat([mean, average[theta.shape[1] :]]), (weight @ (features - average) ** 2).sqrt()


def test_euler_is_the_recursion_at_the_points_stated(task):
    theta, u = sample_prior(task.prior, 50, seed=0).double(), normals(50).double()
    mu, sigma = theta[:, 0], theta[:, 1]
    gamma = theta[:, 2] if theta.shape[1] > 2 else 0.5
    path = [mu + (theta[:, 3] if theta.shape[1] > 3 else 3.0) + u[:, 0]]
    for t in range(90):
        path.append(path[-1] + gamma * (mu - path[-1]) * 0.1 + sigma * math.sqrt(0.1) * u[:, t + 1])
    x = euler(theta, u)
    assert torch.allclose(x, torch.stack(path[:100:10], 1), rtol=0, atol=1e-12)  # float64 algebra
    assert not torch.allclose(x[:, :9], torch.stack(path[1:90:10], 1), rtol=0, atol=1e-3)
    assert task.x_axis == pytest.approx(range(10))
    assert torch.equal(task.stack.levels[1].simulate(theta.float(), u.float()), euler(theta.float(), u.float()))


@pytest.mark.parametrize("simulate", [euler, gaussian])
def test_simulators_are_pure_and_treat_rows_alone(simulate, task):
    theta, u = sample_prior(task.prior, 37, seed=1), normals(37)
    before = theta.clone(), u.clone()
    x = simulate(theta, u)
    assert x.dtype == torch.float32
    assert torch.equal(theta, before[0])
    assert torch.equal(u, before[1])
    assert torch.equal(simulate(theta[:5], u[:5]), x[:5])


def test_low_level_is_independent_normals():
    mean, slope = response(gaussian, THETA)
    assert torch.equal(mean, torch.full((10,), 1.5, dtype=torch.float64))
    assert torch.allclose(slope.T @ slope, 0.4**2 * torch.eye(10, dtype=torch.float64), atol=1e-14)  # float64 algebra
    assert torch.equal(gaussian(THETA, normals(1)), gaussian(THETA[:, :2], normals(1)))


def test_low_level_reads_the_standardised_sum_of_ten_steps():
    u = normals(20)
    expected = [u[:, 0], *(u[:, 10 * i - 9 : 10 * i + 1].sum(1) / math.sqrt(10) for i in range(1, 10))]
    x = gaussian(THETA[:, :2].float(), u)
    assert torch.allclose(x, 1.5 + 0.4 * torch.stack(expected, 1), atol=1e-5)  # float32 sums
    late = [u[:, 0], *(u[:, 10 * i - 8 : 10 * i + 2].sum(1) / math.sqrt(10) for i in range(1, 9)), u[:, 90]]
    assert not torch.allclose(x, 1.5 + 0.4 * torch.stack(late, 1), atol=0.1)


def test_coupling_has_the_covariance_of_the_steps_before():
    r"""A point shares the ten steps before it with the low level, and nothing with what the low level has later."""
    (_, low), (_, high) = response(gaussian, THETA), response(euler, THETA)
    covariance = high.T @ low / 0.4  # of the path and the low level's normals
    decay = 1 - 0.1 * 0.45
    for i in range(10):
        for j in range(1, 10):
            shared = sum(decay**age for age in range(10)) * decay ** (10 * (i - j)) if j <= i else 0.0
            assert covariance[i, j].item() == pytest.approx(0.4 * 0.1 * shared, abs=1e-14)
        assert covariance[i, 0].item() == pytest.approx(decay ** (10 * i), abs=1e-14)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["gaussian", "ou"]), st.floats(0.0, 3.0), st.booleans(), st.sampled_from([2, 3, 4]))
def test_low_level_is_made_worse_as_asked(low, extra_noise, reverse, parameters):
    task = tasks.get("ou2", parameters=parameters, low=low, extra_noise=extra_noise, reverse=reverse)
    theta, u = sample_prior(task.prior, 8, seed=2).double(), normals(8).double()
    worse = theta.clone()
    worse[:, 1] += extra_noise
    x, plain = task.stack.levels[0].simulate(theta, u), {"gaussian": gaussian, "ou": euler}[low](worse, u)
    assert torch.allclose(x, plain.flip(1) if reverse else plain, rtol=1e-12)
    assert not torch.allclose(x, plain if reverse else plain.flip(1), rtol=1e-3)
    assert torch.equal(task.stack.levels[1].simulate(theta, u), euler(theta, u))


def test_identical_levels_have_no_differences(task):
    def differences(**options):
        pairs = tasks.get("ou2", parameters=len(task.prior.low), low="ou", **options).simulate((2, 200), 0).levels[1]
        return pairs.fine - pairs.coarse

    assert (differences() == 0).all()
    assert (differences(extra_noise=0.1)[:, 1:] != 0).all()
    assert (differences(extra_noise=0.1)[:, 0] == 0).all()  # X_0 does not depend on sigma
    assert (differences(reverse=True) != 0).all()


def test_likelihood_is_the_dense_gaussian_of_the_simulator(task):
    theta, x = task.test(20, 0)
    value = task.likelihood(x, theta)
    for row in range(20):
        mean, slope = response(euler, theta[row : row + 1].double())
        dense = MultivariateNormal(mean, slope.T @ slope).log_prob(x[row].double())
        assert value[row].item() == pytest.approx(dense.item(), abs=1e-9)  # float64 algebra
        wider = MultivariateNormal(mean, 1.02 * slope.T @ slope).log_prob(x[row].double())
        assert value[row].item() != pytest.approx(wider.item(), abs=1e-4)
    assert value.dtype == torch.float64
    assert torch.equal(log_likelihood(x[0], theta[:1]), value[:1])


def test_evidence_has_converged(task):
    x = task.test(20, 1)[1]
    coarse, default, fine = (OU2Posterior(task.prior, nodes).log_evidence(x)
                             for nodes in ((8, 12, 2), (64, 96, 12), (128, 192, 24)))
    assert (default - fine).abs().max() < 1e-11  # what the docstring says, with some room
    assert (coarse - fine).abs().max() > 1e-5  # the comparison can see a rule that is too coarse


def test_posterior_is_that_of_a_grid_over_all_parameters(task):
    r"""Evidence to the quadrature's error, draws to 4.5 standard errors of the grid's moments."""
    x = euler(THETA[:, : len(task.prior.low)], normals(1, seed=3).double())[0]
    theta, weight, log_evidence = brute_force(task.prior, x)
    assert task.reference.log_evidence(x).item() == pytest.approx(log_evidence.item(), abs=1e-8)
    log_prob = task.reference.log_prob(theta[:: len(theta) // 50].float(), x)
    expected = (log_likelihood(x, theta.float()) - log_evidence + task.prior.log_prob(theta.float()))
    assert torch.allclose(log_prob, expected[:: len(theta) // 50], rtol=0, atol=1e-6)
    exact, error = moments(theta, weight)
    draws = task.reference.sample(20_000, x, 0)
    assert ((moments(draws.double())[0] - exact).abs() < 4.5 * error / 20_000**0.5).all()
    shifted = task.reference.sample(20_000, x + 0.05, 0)
    assert not ((moments(shifted.double())[0] - exact).abs() < 4.5 * error / 20_000**0.5).all()


def test_draws_feel_the_edges_of_the_prior(task):
    """Points around 0, below the prior of mu, whose marginal is then far from normal."""
    x = torch.tensor([2.0, 1.0, 0.5, 0.2, -0.1, 0.2, -0.2, 0.1, 0.0, 0.1])
    theta, weight, _ = brute_force(task.prior, x)
    exact, error = moments(theta, weight)
    draws = task.reference.sample(20_000, x, 1)
    assert torch.isfinite(task.prior.log_prob(draws)).all()
    assert (draws[:, 0] < 0.2).double().mean() > 0.2
    assert ((moments(draws.double())[0] - exact).abs() < 4.5 * error / 20_000**0.5).all()


def test_posterior_holds_for_observations_that_the_prior_hardly_allows(task):
    x = torch.tensor([[7.0, -3.0, 5.0, 0.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0], [2.0] * 10, [30.0] + [2.0] * 9])
    assert torch.isfinite(task.reference.log_prob(sample_prior(task.prior, 3, seed=0), x)).all()
    for row in x:
        assert torch.isfinite(task.prior.log_prob(task.reference.sample(100, row, 0))).all()


@pytest.mark.parametrize("parameters", [2, 3])
def test_exact_posterior_is_calibrated_and_a_narrow_one_is_not(parameters):
    r"""Ranks of the truth among posterior draws are uniform (KS over 150 observations, each parameter)."""
    task = tasks.get("ou2", parameters=parameters)
    truth, x = task.test(150, 4)
    draws = torch.stack([task.reference.sample(200, row, seed) for seed, row in enumerate(x)])
    jitter = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))

    def p_values(samples, fold):
        ranks = (((samples < truth[:, None]).sum(1) + jitter) / (samples.shape[1] + 1)).numpy()
        return [stats.kstest(abs(2 * column - 1) if fold else column, "uniform").pvalue for column in ranks.T]

    # 10 p-values under fixed seeds in all: the smallest of right posteriors is below 1e-3 in one case of 100.
    assert min(p_values(draws, fold=False) + p_values(draws, fold=True)) > 1e-3
    narrow = draws.mean(1, keepdim=True) + 0.6 * (draws - draws.mean(1, keepdim=True))
    assert min(p_values(narrow, fold=True)) < 1e-3


def test_published_posteriors_are_those_of_this_task(published):
    r"""Moments of the published 2000 draws to 4.5 standard errors; their density of the truth to its grid's 1e-4."""
    task = tasks.get("ou2")
    x, truth = published["x_summary"], published["theta_true"]
    nlpd = -task.reference.log_prob(truth, x)
    assert torch.allclose(nlpd, published["nltp_euler_off3"], rtol=0, atol=1e-4)
    assert (nlpd - published["nltp_exact_off3"]).abs().max() > 1e-2  # of the process in continuous time

    def distance(draws, row):
        theta, weight, _ = brute_force(task.prior, row)
        exact, error = moments(theta, weight)
        return ((moments(draws.double())[0] - exact).abs() / error * len(draws) ** 0.5).max()

    assert max(distance(*pair) for pair in zip(published["posterior_euler_off3"], x, strict=True)) < 4.5
    for row, observation in enumerate(x):
        assert distance(task.reference.sample(2000, observation, row), observation) < 4.5
    # The draws that were made for offset 2 are far off.
    assert max(distance(*pair) for pair in zip(published["posterior_shipped"], x, strict=True)) > 8


def test_shapes_and_errors(task):
    reference = task.reference
    theta, x = task.test(6, 0)
    assert torch.allclose(reference.log_prob(theta, x)[2:3], reference.log_prob(theta[2:3], x[2]), rtol=0, atol=1e-9)
    assert reference.sample(7, x[:1], 0).shape == (7, theta.shape[1])
    assert reference.sample(7, x[0], 0).dtype == theta.dtype
    assert torch.equal(reference.sample(7, x[0], 0), reference.sample(7, x[0], 0))
    assert (reference.log_prob(theta + 10, x) == -torch.inf).all()
    assert torch.equal(pickle.loads(pickle.dumps(task)).reference.log_prob(theta, x), reference.log_prob(theta, x))
    with pytest.raises(ValueError, match=r"theta of shape \(n, \d\); got \(6, 1\)"):
        reference.log_prob(theta[:, :1], x)
    with pytest.raises(ValueError, match=r"one per row of theta, 6; got 5"):
        reference.log_prob(theta, x[:5])
    with pytest.raises(ValueError, match=r"x of shape \(n, 10\).*got \(6, 9\)"):
        reference.log_prob(theta, x[:, :9])
    with pytest.raises(ValueError, match="one observation"):
        reference.sample(7, x, 0)


@pytest.mark.parametrize(("options", "match"), [
    ({"parameters": 5}, "parameters=2, 3 or 4.*got 5"),
    ({"parameters": True}, "parameters=2, 3 or 4.*got True"),
    ({"parameters": "2"}, "parameters=2, 3 or 4.*got '2'"),
    ({"low": "euler"}, "low='gaussian' or low='ou'.*got 'euler'"),
    ({"low": ["ou"]}, "low='gaussian' or low='ou'"),
    ({"extra_noise": -0.1}, "at least 0 as extra_noise.*got -0.1"),
    ({"extra_noise": math.nan}, "at least 0 as extra_noise.*got nan"),
    ({"extra_noise": math.inf}, "at least 0 as extra_noise.*got inf"),
    ({"extra_noise": "some"}, "at least 0 as extra_noise.*got 'some'"),
    ({"extra_noise": True}, "at least 0 as extra_noise.*got True"),
    ({"reverse": "yes"}, "reverse=True or reverse=False.*got 'yes'"),
    ({"reverse": 1}, "reverse=True or reverse=False.*got 1"),
])
def test_wrong_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        tasks.get("ou2", **options)


def test_describes_itself(task):
    assert task.prior.names == ("mu", "sigma", "gamma", "offset")[: len(task.prior.low)]
    assert task.levels == (("gaussian", 1.0), ("euler", 100.0))
    assert tasks.get("ou2", low="ou").level_names == ("low euler", "euler")
    assert normals(10).shape == (10, 91)
    assert task.budgets == ((10_000, 50), (10_000, 100), (10_000, 1000))
