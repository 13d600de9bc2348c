"""How often tests of calibration give a false alarm, and how often they find a wrong posterior."""

import itertools
from functools import cache

import numpy as np
import pytest
from scipy import stats

from mlsbi.diagnostics import (
    calibration_error,
    coverage,
    folded_uniformity,
    hpd_levels,
    rank_uniformity,
    sbc_ranks,
    tarp_levels,
    uniformity,
)

B, N, D, REPETITIONS = 200, 200, 2, 200
GRID = np.linspace(0.05, 0.95, 19)


def gaussian_case(rng, *, width=1.0, noise=1.0):
    """Truth, observation, draws and log densities of the posterior of theta ~ N(0, I), x ~ N(theta, noise^2 I)."""
    theta = rng.standard_normal((B, D))
    x = theta + noise * rng.standard_normal((B, D))
    variance = noise**2 / (1 + noise**2)
    mean = x * variance / noise**2
    samples = mean + width * np.sqrt(variance) * rng.standard_normal((N, B, D))

    def log_prob(parameters):  # but for a constant
        return -((parameters - mean) ** 2).sum(-1)

    return theta, x, samples, log_prob(theta), log_prob(samples)


@cache
def levels_and_ranks(width, noise=1.0):
    """HPD levels, TARP levels `(B, REPETITIONS)` and ranks of the first parameter, of repeated cases."""
    rng = np.random.default_rng(0)
    hpd, tarp, ranks = [], [], []
    for seed in range(REPETITIONS):
        theta, _, samples, log_true, log_samples = gaussian_case(rng, width=width, noise=noise)
        hpd.append(hpd_levels(log_true, log_samples))
        tarp.append(tarp_levels(theta, samples, seed=seed))
        ranks.append(sbc_ranks(theta, samples)[:, 0])
    return np.stack(hpd, 1), np.stack(tarp, 1), np.stack(ranks, 1)


def rejected(test, columns):
    return np.mean([test(column) < 0.05 for column in columns.T])


def test_false_alarms_are_rare():
    # 5% with a binomial standard deviation of 1.5%
    hpd, tarp, ranks = levels_and_ranks(1.0)
    assert rejected(uniformity, hpd) < 0.1
    assert rejected(uniformity, tarp) < 0.1
    assert rejected(folded_uniformity, tarp) < 0.1
    assert np.mean(rank_uniformity(ranks, N) < 0.05) < 0.1


@pytest.mark.parametrize("width", [0.7, pytest.param(1.4, marks=pytest.mark.slow)])
def test_wrong_widths_are_found(width):
    hpd, tarp, ranks = levels_and_ranks(width)
    assert rejected(uniformity, hpd) > 0.95
    assert np.mean(rank_uniformity(ranks, N) < 0.05) > 0.95
    assert rejected(folded_uniformity, tarp) > 0.95
    assert rejected(uniformity, tarp) > 0.85


@pytest.mark.parametrize("width", [0.7, pytest.param(1.4, marks=pytest.mark.slow)])
def test_folding_finds_widths_that_tarp_levels_and_ranks_alone_often_miss(width):
    _, tarp, ranks = levels_and_ranks(width, noise=0.1)
    assert 0.7 < rejected(uniformity, tarp) < 0.95
    assert rejected(folded_uniformity, tarp) > 0.95
    assert rejected(uniformity, (ranks + 0.5) / (N + 1)) < 0.95
    assert np.mean(rank_uniformity(ranks, N) < 0.05) > 0.95


@pytest.mark.parametrize("width", [0.7, 1.4])
def test_a_two_sample_test_on_grid_points_rejects_nothing(width):
    """What `uniformity` of the values replaces: 19 points of a curve are no sample of 19."""
    hpd, _, _ = levels_and_ranks(width)
    assert rejected(lambda levels: stats.ks_2samp(coverage(levels, GRID), GRID).pvalue, hpd) == 0.0
    assert rejected(uniformity, hpd) > 0.95


def test_shifts_are_found_by_ranks():
    theta, _, samples, _, _ = gaussian_case(np.random.default_rng(0))
    wrong = samples + [0.5, 0.0]
    p = rank_uniformity(sbc_ranks(theta, wrong), N)
    assert p[0] < 1e-4
    assert p[1] > 0.01


def test_too_few_draws_for_the_ranks_give_false_alarms():
    """The limit that the docstring states; `10 sqrt(B)` draws suffice."""
    rng = np.random.default_rng(0)

    def alarms(n):
        return np.mean(rank_uniformity(rng.integers(0, n + 1, (B, 500)), n) < 0.05)

    assert alarms(20) > 0.2
    assert alarms(141) < 0.1


def test_calibration_error_by_hand():
    error = calibration_error([0.1, 0.2, 0.3, 1.0], bins=2)
    assert (error.value, error.bins) == (0.25, 2)  # shares 3 / 4 and 1 / 4
    assert str(error) == "0.250 (0.250 +- 0.306 if calibrated, 2 bins)"


@pytest.mark.parametrize(("n", "bins"), [(1, 2), (4, 3), (5, 2)])
def test_calibration_error_under_uniform_levels_is_exact(n, bins):
    centres = (np.arange(bins) + 0.5) / bins
    errors = [calibration_error(levels, bins=bins) for levels in itertools.product(centres, repeat=n)]
    values = [error.value for error in errors]
    assert np.mean(values) == pytest.approx(errors[0].null, abs=1e-12)
    assert np.std(values) == pytest.approx(errors[0].null_sd, abs=1e-12)


def test_calibration_error_of_right_and_wrong_posteriors():
    errors = [calibration_error(levels) for levels in levels_and_ranks(1.0)[0].T]
    null, spread = errors[0].null, errors[0].null_sd
    # Of 201 values a level can take, one bin has 21: that moves the mean by less than a standard error.
    assert np.mean([error.value for error in errors]) == pytest.approx(null, abs=4 * spread / np.sqrt(REPETITIONS))
    assert np.median([calibration_error(levels).value for levels in levels_and_ranks(0.7)[0].T]) > null + 5 * spread


def test_tarp_levels_by_hand():
    theta, samples = [[1.0, 0.0]], [[[0.5, 0.0]], [[0.0, 2.0]], [[3.0, 0.0]]]
    box = {"low": [0.0, 0.0], "high": [1.0, 1.0], "references": [[0.0, 0.0]]}
    assert tarp_levels(theta, samples, **box) == pytest.approx((1 + 0.5) / 4)
    box["high"] = [1.0, 10.0]  # now the second draw is near too
    assert tarp_levels(theta, samples, **box) == pytest.approx((2 + 0.5) / 4)


def test_tarp_levels_do_not_depend_on_units():
    theta, _, samples, _, _ = gaussian_case(np.random.default_rng(0))
    unit, origin = np.array([4.0, 0.25]), np.array([1.0, -2.0])
    assert (tarp_levels(theta, samples, seed=3) == tarp_levels(theta * unit + origin, samples * unit + origin,
                                                               seed=3)).all()
    assert (tarp_levels(theta, samples, seed=3) != tarp_levels(theta, samples, seed=4)).any()


def test_tarp_finds_a_posterior_that_ignores_x_only_by_references_that_depend_on_x():
    rng = np.random.default_rng(0)
    theta, x, samples, _, _ = gaussian_case(rng)
    prior = rng.standard_normal(samples.shape)
    assert folded_uniformity(tarp_levels(theta, prior)) > 0.01
    assert folded_uniformity(tarp_levels(theta, prior, references=x)) < 1e-6
    assert folded_uniformity(tarp_levels(theta, samples, references=x)) > 0.01


def test_tarp_finds_a_lost_correlation_that_ranks_cannot_see():
    rng = np.random.default_rng(0)
    root = np.linalg.cholesky([[1.0, 0.95], [0.95, 1.0]])
    theta, samples = rng.standard_normal((B, 2)) @ root.T, rng.standard_normal((N, B, 2)) @ root.T
    apart = rng.standard_normal((N, B, 2))
    assert rank_uniformity(sbc_ranks(theta, apart), N).min() > 0.01
    assert folded_uniformity(tarp_levels(theta, apart)) < 1e-3
    assert folded_uniformity(tarp_levels(theta, samples)) > 0.01


def test_bad_inputs():
    theta, samples = np.linspace(0, 1, 6).reshape(3, 2), np.zeros((5, 3, 2))
    with pytest.raises(ValueError, match=r"\(B, D\) and \(n, B, D\); got \(2, 2\)"):
        tarp_levels(theta[:2], samples)
    with pytest.raises(ValueError, match=r"theta of shape \(B, D\), not empty; got \(3,\)"):
        tarp_levels(theta[:, 0], samples)
    with pytest.raises(ValueError, match="finite samples; got 1 NaN"):
        tarp_levels(theta, np.where(np.arange(30).reshape(5, 3, 2) == 7, np.nan, samples))
    with pytest.raises(ValueError, match="both low and high"):
        tarp_levels(theta, samples, low=[0, 0])
    with pytest.raises(ValueError, match="low < high"):
        tarp_levels(theta[:1], samples[:, :1])
    with pytest.raises(ValueError, match=r"low of shape \(2,\)"):
        tarp_levels(theta, samples, low=[0], high=[1])
    with pytest.raises(ValueError, match="references of the shape of theta"):
        tarp_levels(theta, samples, references=theta[:2])
    with pytest.raises(ValueError, match="seed"):
        tarp_levels(theta, samples, seed=-1)
    with pytest.raises(ValueError, match="from 0 to n=5; got 0 to 6"):
        rank_uniformity([[0], [6]], 5)
    with pytest.raises(ValueError, match="whole numbers"):
        rank_uniformity([[0.5]], 5)
    with pytest.raises(ValueError, match="levels from 0 to 1; got 0.5 to 2"):
        calibration_error([0.5, 2.0])
    with pytest.raises(ValueError, match="finite levels"):
        calibration_error([0.5, np.nan])
    with pytest.raises(ValueError, match="at least 2 bins; got 1"):
        calibration_error([0.5], bins=1)
    with pytest.raises(ValueError, match="values from 0 to 1"):
        folded_uniformity([-0.5])
