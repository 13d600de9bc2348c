import math

import numpy as np
import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack, optimal_allocation, pilot, simulate

PRIOR = BoxPrior([0.0, -1.0], [1.0, 1.0])


def noise(n, generator):
    return torch.randn(n, 4, generator=generator)


def exact(theta, noise):
    return torch.cat([theta, theta], 1) + 0.3 * noise


def off(amount):
    def simulate_off(theta, noise):
        return exact(theta, noise) + amount * torch.sin(5 * noise)

    return simulate_off


def stack(*functions, costs=(1.0, 20.0, 50.0)):
    if costs is None:
        costs = (None,) * len(functions)
    levels = [Level(f"level {i}", f, cost) for i, (f, cost) in enumerate(zip(functions, costs, strict=False))]
    return LevelStack(PRIOR, noise, levels)


@pytest.fixture(scope="module")
def report():
    return pilot(stack(off(0.2), exact), 64, seed=0, progress=False)


def test_a_seed_reproduces(report):
    again = pilot(stack(off(0.2), exact), 64, seed=0, progress=False)
    assert np.array_equal(report.losses, again.losses)
    assert report.spent == again.spent


def test_moments_are_those_of_the_losses(report):
    f = report.losses
    assert f.dtype == np.float64
    assert report.variances[0] == pytest.approx(f[:, 0].var(ddof=1))
    assert report.variances[1] == pytest.approx((f[:, 1] - f[:, 0]).var(ddof=1))
    assert report.single_level_variance == pytest.approx(f[:, 1].var(ddof=1))
    assert report.correlations[0] == pytest.approx(np.corrcoef(f.T)[0, 1])
    assert report.covariance.shape == (2, 2)


def test_close_levels_have_small_corrections():
    near = pilot(stack(off(0.01), exact), 64, seed=0, progress=False)
    far = pilot(stack(off(0.5), exact), 64, seed=0, progress=False)
    assert near.variances[1] < 0.1 * far.variances[1]
    assert near.correlations[0] > far.correlations[0]


def test_uncoupled_noise_is_seen():
    def uncoupled(theta, noise):
        return exact(theta, noise.flip(1))

    coupled, not_coupled = (pilot(stack(off(0.01), f), 64, seed=0, progress=False) for f in (exact, uncoupled))
    assert not_coupled.variances[1] > 10 * coupled.variances[1]
    assert not_coupled.correlations[0] < coupled.correlations[0]


def test_a_likelihoods_pilot_measures_a_likelihoods_loss():
    """The coupling shows in the loss of x given theta as in a posterior's, on the same rows."""
    options = {"seed": 0, "estimator": "nle", "progress": False}
    near, far = (pilot(stack(off(amount), exact), 64, **options) for amount in (0.01, 0.5))
    assert near.variances[1] < 0.1 * far.variances[1]
    assert near.losses.shape == (64, 2)
    posterior = pilot(stack(off(0.01), exact), 64, seed=0, progress=False)
    assert not np.allclose(near.losses, posterior.losses)
    assert torch.equal(near.data.levels[1].fine, posterior.data.levels[1].fine)


def test_heavy_tails_can_be_transformed():
    """So that a few rows no longer decide the variance."""

    def far(theta, noise):
        return exact(theta, noise).sinh() ** 3

    heavy = stack(lambda theta, noise: far(theta, noise) * 1.1, far)
    plain, bent = (pilot(heavy, 64, seed=0, estimator="nle", x_transform=transform, progress=False)
                   for transform in ("none", "asinh"))
    assert bent.kurtosis[0] < plain.kurtosis[0]


def test_identical_levels_have_zero_correction_and_say_so():
    report = pilot(stack(exact, exact), 32, seed=0, progress=False)
    assert report.variances[1] == 0.0
    assert math.isnan(report.kurtosis[1])
    assert any("adds nothing" in warning for warning in report.warnings)
    assert optimal_allocation(report, budget=2000).n[1] == 32  # the pilot's own rows: no more are bought


def test_the_pilots_rows_are_training_rows_and_its_cost_is_counted(report):
    # 64 joint rows, 64 independent ones of level 0, two replayed: level 0 twice each, the finest once.
    assert report.data.n == (64, 64)
    assert report.data.runs == (64 + 2 + 64, 64)
    assert report.spent == 130 * 1.0 + 64 * 20.0
    plan = optimal_allocation(report, budget=5000)
    assert plan.cost <= 5000
    data = simulate(stack(off(0.2), exact), plan, seed=1, reuse=report.data, progress=False)
    assert data.n == plan.n
    assert torch.equal(data.levels[1].coarse[:64], report.data.levels[1].coarse)
    spent = data.runs[0] * 1.0 + data.runs[1] * 20.0
    assert spent == pytest.approx(plan.cost)


def test_joint_and_own_rows_are_independent(report):
    joint, own = report.data.levels[1].theta, report.data.levels[0].theta
    assert not bool((joint == own).any())


def test_three_levels_give_rates_and_leave_the_middle_to_be_simulated():
    report = pilot(stack(off(0.4), off(0.1), exact), 48, seed=0, progress=False)
    assert report.data.n == (48, 0, 48)
    assert report.rates is not None
    assert report.rates["beta"] > 0
    assert len(report.consistency) == 2
    data = simulate(stack(off(0.4), off(0.1), exact), (100, 20, 48), seed=1, reuse=report.data, progress=False)
    assert data.n == (100, 20, 48)


def test_measured_costs_are_seconds_a_run():
    def slow(theta, noise):
        torch.linalg.eigvals(torch.ones(150, 150))
        return exact(theta, noise)

    report = pilot(stack(exact, slow, costs=None), 16, seed=0, progress=False)
    assert report.cost_unit == "seconds"
    assert report.costs[1] > report.costs[0] > 0
    assert report.pair_costs[1] == pytest.approx(sum(report.costs))


def test_a_law_that_differs_between_pair_and_level_is_found(report):
    assert (report.consistency <= 1).all()
    from mlsbi.allocation.piloting import _consistency

    shifted = [report.losses[:, 0] + 10.0]
    assert _consistency(report.losses, shifted)[0] > 1


def test_the_table_prints(report):
    text = str(report)
    assert "64 joint rows" in text
    assert "level 1" in text
    assert len(report.to_frame()) == 2


def test_rows_that_fail_are_reported():
    def failing(theta, noise):
        return torch.where(theta[:, :1] > 0.9, torch.nan, exact(theta, noise))

    with pytest.warns(UserWarning, match="level 0, level 1"):
        report = pilot(stack(exact, failing), 64, seed=0, on_failure="drop", progress=False)
    assert report.data.failures[1] == 64 - len(report.losses) > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 7}, "at least 8 pilot rows"), ({"estimator": "npr"}, "estimator"),
        ({"x_transform": "log"}, "x_transform"), ({"integrand": "entropy"}, "integrand"),
    ],
)
def test_bad_requests(options, match):
    with pytest.raises(ValueError, match=match):
        pilot(stack(off(0.2), exact), **{"n": 16, "seed": 0, **options})


def test_a_budget_below_the_pilots_cost_is_refused(report):
    with pytest.raises(ValueError, match="already spent"):
        optimal_allocation(report, budget=100)
