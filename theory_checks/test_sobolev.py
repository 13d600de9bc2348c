"""Norms whose values are known, how far estimates are from them, and autodiff against finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.distributions import Independent, Normal

from mlsbi import BoxPrior, Level, LevelStack, per_sample
from theory_checks.measuring import measure
from theory_checks.samples import mean_and_error
from theory_checks.sobolev import sobolev_norms
from theory_checks.stacks import stacks
from theory_checks.testing import normal_prior_of

SIGMAS = 4.5


def normal_noise(n, generator):
    return torch.randn(n, 1, generator=generator)


def uniform_noise(n, generator):
    return torch.rand(n, 1, generator=generator)


def stack_of(*simulators, prior=None, noise=normal_noise):
    levels = [Level(f"run {index}", run) for index, run in enumerate(simulators)]
    return LevelStack(prior or normal_prior_of(1), noise, levels)


def black_box(run):
    return lambda theta, noise: torch.from_numpy(run(theta, noise).numpy())


def affine(theta, noise):
    return torch.cat([theta @ torch.tensor([[1.0], [2.0]], dtype=theta.dtype) + noise - 1, 3 * noise + 0.5], 1)


def affine_moment():
    """E|G|^4 of the affine map by the mean c and covariance S of its outputs: (|c|^2 + tr S)^2 + 2 tr S^2 + 4 c'Sc."""
    both = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    covariance, centre = both @ both.T, torch.tensor([-1.0, 0.5], dtype=torch.float64)
    trace = float(covariance.trace() + centre.square().sum())
    return (trace**2 + 2 * float((covariance @ covariance).trace()) + 4 * float(centre @ covariance @ centre),
            float(both.square().sum()) ** 2)


# Simulator, prior, noise, estimator, E|G|^4 and E|grad G|^4.
KNOWN = {
    "affine": (affine, normal_prior_of(2), normal_noise, "npe", *affine_moment()),
    "product": (lambda theta, noise: theta * noise, normal_prior_of(1), normal_noise, "npe", 9.0, 8.0),
    "square": (lambda theta, noise: noise**2, normal_prior_of(1), uniform_noise, "npe", 1 / 9, 16 / 5),
    "wave": (lambda theta, noise: torch.sin(2 * math.pi * noise), normal_prior_of(1), uniform_noise, "npe",
             3 / 8, (2 * math.pi) ** 4 * 3 / 8),
    # In the logit z of theta in (0, 1), d theta / dz = theta (1 - theta).
    "box, posterior": (lambda theta, noise: theta, BoxPrior([0.0], [1.0]), normal_noise, "npe", 1 / 5, 1 / 630),
    "box, likelihood": (lambda theta, noise: theta, BoxPrior([0.0], [1.0]), normal_noise, "nle", 1 / 5, 1.0),
    "wide box": (lambda theta, noise: theta, BoxPrior([0.0], [10.0]), normal_noise, "npe", 2e3, 1e4 / 630),
    "constant": (lambda theta, noise: torch.full_like(theta, 2.0), normal_prior_of(1), normal_noise, "npe", 16.0, 0.0),
    "kink": (lambda theta, noise: (theta + noise).abs(), normal_prior_of(1), normal_noise, "npe", 12.0, 4.0),
}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_norms_are_the_known_ones(name, hidden):
    run, prior, noise, estimator, function, gradient = KNOWN[name]
    stack = stack_of(black_box(run) if hidden else run, prior=prior, noise=noise)
    measured = measure(stack, rows=6000, estimator=estimator, seed=1)
    found = sobolev_norms(measured)
    (norm,) = found.levels
    assert found.method == ("finite differences" if hidden else "autodiff")
    assert abs(norm.value - (function + gradient) ** 0.25) <= SIGMAS * norm.error + 1e-12
    assert norm.error < 0.05 * norm.value
    for tensor, expected in ((measured.output_fourth[0], function), (measured.gradient_fourth[0], gradient)):
        mean, error = (float(number) for number in mean_and_error(tensor))
        assert abs(mean - expected) <= SIGMAS * error + 1e-5 * expected
    assert norm.function == pytest.approx(float(measured.output_fourth[0].mean()) ** 0.25)
    assert norm.gradient == pytest.approx(float(measured.gradient_fourth[0].mean()) ** 0.25)
    assert norm.value**4 == pytest.approx(norm.function**4 + norm.gradient**4)


def test_gradients_of_affine_levels_are_exact_by_autodiff():
    norm = sobolev_norms(stack_of(affine, prior=normal_prior_of(2)), rows=100).levels[0]
    assert norm.gradient == pytest.approx(15**0.5, rel=1e-12)


@settings(max_examples=8, deadline=None)
@given(stack=stacks(levels=(1, 3), generators=["affine", "saturating"]))
def test_black_boxes_have_the_norms_of_what_is_in_them(stack):
    levels = [Level(level.name, black_box(level.simulate)) for level in stack.levels]
    hidden = LevelStack(stack.prior, stack.noise, levels)
    seen, unseen = (sobolev_norms(one, rows=800, seed=0) for one in (stack, hidden))
    assert (seen.method, unseen.method) == ("autodiff", "finite differences")
    for exact, estimated in zip((*seen.levels, *seen.differences), (*unseen.levels, *unseen.differences), strict=True):
        # The same rows, so that errors of the two differ by the directions alone.
        assert abs(exact.value - estimated.value) <= 4 * math.hypot(exact.error, estimated.error) + 1e-9
        assert exact.function == pytest.approx(estimated.function, rel=1e-9)


def test_functions_of_one_sample_have_the_same_norms():
    def one(theta, noise):
        return np.array([theta[0] * noise[0], np.tanh(theta[0])])

    def many(theta, noise):
        return torch.cat([theta * noise, theta.tanh()], 1)

    seen, unseen = (sobolev_norms(stack_of(run), rows=400).levels[0] for run in (many, per_sample(one)))
    assert abs(seen.value - unseen.value) < 4 * math.hypot(seen.error, unseen.error)
    assert seen.value != unseen.value


def z_scores(run, truth, seeds=40, rows=1000):
    norms = [sobolev_norms(stack_of(run), rows=rows, seed=seed).levels[0] for seed in range(seeds)]
    return torch.tensor([(norm.value - truth) / norm.error for norm in norms])


def total(theta, noise):
    return theta + noise


@pytest.mark.parametrize("run", [total, black_box(total)])
def test_standard_errors_are_of_the_right_size(run):
    z = z_scores(run, 16**0.25)
    assert abs(float(z.mean())) < 0.6
    assert 0.7 < float(z.std()) < 1.3  # 40 draws have a standard deviation with a relative error of 11%


def test_differences_are_those_of_the_level_below():
    stack = stack_of(lambda theta, noise: theta, lambda theta, noise: theta + 0.1 * noise,
                     lambda theta, noise: theta + 0.1 * noise + 5.0, prior=normal_prior_of(1))
    found = sobolev_norms(stack, rows=5000)
    assert len(found.levels) == 3
    first, second = found.differences
    assert abs(first.value - (3e-4 + 1e-4) ** 0.25) < SIGMAS * first.error
    assert first.gradient == pytest.approx(0.1, rel=1e-9)
    assert second.value == pytest.approx(5.0, rel=1e-12)
    assert second.error == pytest.approx(0.0, abs=1e-9)
    assert second.gradient == pytest.approx(0.0, abs=1e-12)


def test_small_differences_keep_their_digits():
    found = sobolev_norms(stack_of(total, lambda theta, noise: theta + (1 + 1e-6) * noise), rows=2000)
    (norm,) = found.differences
    assert norm.gradient == pytest.approx(1e-6, rel=1e-6)
    assert abs(norm.value - (4e-24) ** 0.25) < SIGMAS * norm.error


def test_identical_levels_differ_by_nothing():
    found = sobolev_norms(stack_of(total, lambda theta, noise: theta + noise), rows=200)
    assert (found.differences[0].value, found.differences[0].error) == (0.0, 0.0)
    assert "of what it adds to 'run 0': 0 +- 0" in str(found)


def test_one_level_has_no_differences():
    found = sobolev_norms(stack_of(total), rows=200)
    assert found.differences == ()
    assert found.rows == 200
    assert str(found).startswith("W14 norms by autodiff from 200 rows")
    assert "adds to" not in str(found)


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_norms_scale_with_the_level(factor):
    plain, scaled = (sobolev_norms(stack_of(run), rows=300).levels[0]
                     for run in (total, lambda theta, noise: factor * (theta + noise)))
    for name in ("value", "error", "function", "gradient"):
        assert getattr(scaled, name) == pytest.approx(factor * getattr(plain, name), rel=1e-9)


def test_wider_parameters_have_their_own_units():
    stack = stack_of(total, prior=Independent(Normal(torch.zeros(1), torch.full((1,), 100.0)), 1))
    norm = sobolev_norms(stack, rows=4000).levels[0]
    assert norm.gradient == pytest.approx(2**0.5, rel=1e-9)
    assert abs(norm.value - (3 * 10001**2 + 4) ** 0.25) < SIGMAS * norm.error


def test_rows_that_were_measured_are_taken_as_they_are():
    measured = measure(stack_of(total), rows=300, seed=4)
    assert sobolev_norms(measured) == sobolev_norms(stack_of(total), rows=300, seed=4)
    assert sobolev_norms(measured) != sobolev_norms(stack_of(total), rows=300, seed=5)


def test_levels_without_norms_say_why():
    found = sobolev_norms(stack_of(total, lambda theta, noise: theta.round()), rows=300)
    assert found.levels == found.differences == ()
    assert found.rows == 0
    assert "level 'run 1' is not differentiable" in found.problem
    assert str(found).startswith("No Sobolev norms: level 'run 1'")
