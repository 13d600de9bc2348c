"""Derivatives of levels: estimates along directions, what cannot be differentiated, and steps of finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, poisson
from torch.distributions import Independent, Normal

from mlsbi import BoxPrior, Level, LevelStack, per_sample
from theory_checks.coordinates import Coordinates
from theory_checks.differentiating import differentiator
from theory_checks.jumps import count_jumps
from theory_checks.smoothness import check_smoothness
from theory_checks.tangents import Tangents
from theory_checks.testing import normal_prior_of


def normal_noise(n, generator):
    return torch.randn(n, 1, generator=generator)


def uniform_noise(n, generator):
    return torch.rand(n, 1, generator=generator)


def coordinates_of(*simulators, prior=None, noise=normal_noise, estimator="npe"):
    levels = [Level(f"run {index}", run) for index, run in enumerate(simulators)]
    return Coordinates(LevelStack(prior or normal_prior_of(1), noise, levels), estimator)


def look(run, **options):
    coordinates = coordinates_of(run, **options)
    return check_smoothness(coordinates, 0, coordinates.draw(256, seed=5, stream=1), seed=0)


def black_box(function):
    """What torch cannot look into."""
    return lambda theta, noise: torch.from_numpy(function(theta.numpy(), noise.numpy()))


def single(theta, noise):
    if theta.dtype != torch.float32:
        raise TypeError("give me float32")
    return (theta + noise).sin()


class WrongBackward(torch.autograd.Function):
    """A sine that says its slope is 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


def moments(values):
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


@pytest.mark.parametrize("k", [2, 4, 7])
def test_random_directions_are_unbiased_for_the_norm_and_its_fourth_power(k):
    generator = torch.Generator().manual_seed(k)
    jacobian = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    along = torch.randint(0, 2, (40_000, 5, k), generator=generator) * 2.0 - 1
    tangents = Tangents(jacobian @ along.double(), exact=False)
    truth = float(jacobian.square().sum())
    for found, expected in ((tangents.square(), truth), (tangents.fourth(), truth**2)):
        mean, error = moments(found)
        assert 0 < error < 0.05 * expected
        assert abs(mean - expected) < 4 * error
    # What would be wrong: the square of the estimate is too large by its variance.
    mean, error = moments(tangents.square().square())
    assert mean - truth**2 > 6 * error


def test_all_coordinates_give_norms_exactly():
    values = torch.tensor([[[1.0, 2.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, -1.0]]], dtype=torch.float64)
    tangents = Tangents(values, exact=True)
    assert tangents.square().tolist() == [9.0, 1.0]
    assert tangents.fourth().tolist() == [81.0, 1.0]
    assert (tangents - tangents).fourth().tolist() == [0.0, 0.0]
    assert (tangents - Tangents(0 * values, exact=True)).exact


@pytest.mark.parametrize("run", [
    lambda theta, noise: (theta + noise).sin(),
    lambda theta, noise: (theta * 50 + noise).sin() / 50,
    lambda theta, noise: (theta + noise).abs(),
    lambda theta, noise: (theta + noise).relu(),
    lambda theta, noise: torch.maximum(theta, noise),
    lambda theta, noise: theta.mul_(2).add_(noise).exp_(),
    lambda theta, noise: torch.ones(len(theta), 2),
    lambda theta, noise: torch.cat([torch.ones_like(theta), theta * 1e-12, noise * 1e12], 1),
    lambda theta, noise: theta[:, :, None].expand(-1, 2, 3) * noise[:, :, None],
    lambda theta, noise: torch.nn.functional.softplus(200 * theta) / 200 + noise,
])  # fmt: skip
def test_smooth_and_kinked_levels_are_differentiated_by_torch(run):
    found = look(run)
    assert (found.method, found.problem) == ("autodiff", None)
    assert found.error < 0.05


@pytest.mark.parametrize("run", [
    black_box(lambda theta, noise: np.sin(theta + noise)),
    black_box(lambda theta, noise: np.abs(theta) + noise),
    black_box(lambda theta, noise: (np.sin(theta) + noise).astype(np.float32)),
    per_sample(lambda theta, noise: [math.sin(theta[0]), noise[0] ** 2]),
    lambda theta, noise: torch.tensor(np.sin(np.array(theta.tolist()))) + noise,
    lambda theta, noise: theta.detach() + noise,
    lambda theta, noise: theta.sin() + noise.detach() * theta,
    lambda theta, noise: WrongBackward.apply(theta) + noise,
    lambda theta, noise: theta.float().sin().double() + torch.tensor(noise.tolist()),
])  # fmt: skip
def test_what_torch_cannot_differentiate_is_left_to_finite_differences(run):
    found = look(run)
    assert (found.method, found.problem) == ("finite differences", None)
    assert found.error < 0.05
    assert 1e-4 <= found.step <= 0.1


@pytest.mark.parametrize("run", [
    lambda theta, noise: (theta + noise).round(),
    lambda theta, noise: (3 * theta).floor() + noise,
    lambda theta, noise: (theta > noise).double(),
    lambda theta, noise: theta.sign() * 0.01 + theta + noise,
    lambda theta, noise: torch.cat([theta, noise, theta * noise, (5 * noise).round()], 1),
    lambda theta, noise: theta + (100 * noise).round() / 100,
    black_box(lambda theta, noise: poisson.ppf(norm.cdf(noise), np.exp(theta))),
    per_sample(lambda theta, noise: float(int(4 * theta[0] + noise[0]))),
])  # fmt: skip
def test_levels_that_jump_are_refused(run):
    found = look(run)
    assert found.method == "none"
    assert "level 'run 0' is not differentiable" in found.problem
    assert "it jumps" in found.problem


def shuffled(theta, noise):
    return theta + noise.roll(1, 0)


@pytest.mark.parametrize("run", [
    lambda theta, noise: theta + torch.randn_like(noise),
    lambda theta, noise: theta + noise + 1e-3 * torch.rand(1),
    lambda theta, noise: (theta + noise).cumsum(0),
    shuffled,
    lambda theta, noise: theta + noise + torch.linspace(0, 1, len(theta))[:, None],
    black_box(lambda theta, noise: theta + np.random.default_rng().normal(size=noise.shape)),
    lambda theta, noise: (theta + noise) - (theta + noise).mean(0),
    lambda theta, noise: (theta + noise) / (theta + noise).std(0),
    lambda theta, noise: theta + noise.max(0).values,
])  # fmt: skip
def test_hidden_randomness_and_rows_that_depend_on_others_are_refused(run):
    found = look(run)
    assert found.method == "none"
    assert "level 'run 0' is not deterministic" in found.problem


def test_a_level_that_counts_its_calls_is_not_deterministic():
    calls = []

    def drifting(theta, noise):
        calls.append(0)
        return theta + noise + 0.01 * len(calls)

    assert "not deterministic" in look(drifting).problem


def nan_far_out(theta, noise):
    return torch.where(theta > 1.5, math.nan, theta) + noise


@pytest.mark.parametrize(("run", "message"), [
    (nan_far_out, r"not finite in \d+ of 256 rows"),
    (lambda theta, noise: theta / 0 * noise, "not finite in 256 of 256 rows"),
    (lambda theta, noise: 1 / 0, "raised ZeroDivisionError"),
    (lambda theta, noise: theta[:3], r"gave shape \(3, 1\) for 256 rows"),
    (single, "raised TypeError: give me float32"),
    (per_sample(lambda theta, noise: np.zeros(1 + int(theta[0] > 0))), "raised ValueError: .*one shape"),
])  # fmt: skip
def test_broken_levels_are_named(run, message):
    found = look(run)
    assert found.method == "none"
    assert math.isnan(found.step)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found.problem)
    assert "level 'run 0'" in found.problem


def test_a_level_whose_derivative_is_noise_is_refused():
    rough = look(black_box(lambda theta, noise: theta + 4e-4 * np.sin(1e9 * theta) + 0 * noise))
    assert rough.method == "finite differences"  # too small to matter at large steps
    assert rough.step > 1e-3
    rougher = look(black_box(lambda theta, noise: 1e-3 * theta + 0.3 * np.sin(1e6 * theta)))
    assert rougher.method == "none"


@pytest.mark.parametrize(("run", "expected"), [
    (lambda t: t.round(), 3), (lambda t: (t > 0).double(), 3), (lambda t: (t > 0.69).double(), 3),
    (lambda t: t.sign() * 0.01, 3), (lambda t: t.abs(), 0), (lambda t: t.relu(), 0), (lambda t: (1000 * t).tanh(), 0),
    (lambda t: 1e-4 * (t > 0).double(), 0), (lambda t: t * 0, 0), (lambda t: 50 * t, 0),
    (lambda t: torch.tensor([0.0, 1.0, 1.0]) * (t > 0.2), 2),
    (lambda t: 0.1 * t.sin() + torch.tensor([1.0, 0.0, 0.0]) * (t < -0.3), 1),
])  # fmt: skip
def test_jumps_are_counted_and_steep_slopes_are_not(run, expected):
    assert count_jumps(lambda t: run(t)[:, None], 3, reach=0.7).tolist() == [expected]


def test_jumps_are_counted_for_each_component():
    found = count_jumps(lambda t: torch.stack([t.sin(), t.round(), t.abs(), (t > 0.5).double()], 1), 4, reach=0.7)
    assert (found[0], found[2]) == (0, 0)
    assert int(found[1] + found[3]) >= 4  # halving ends at one place


def test_fewer_than_two_directions_are_refused():
    with pytest.raises(ValueError, match="at least 2 directions"):
        differentiator(coordinates_of(lambda theta, noise: theta), rows=16, directions=1, seed=0)


def test_what_refuses_float64_is_run_in_float32_at_all_levels():
    coordinates = coordinates_of(single, lambda theta, noise: theta + noise)
    derive, found = differentiator(coordinates, rows=64, directions=2, seed=0)
    assert derive.coordinates.precision == torch.float32
    assert [one.method for one in found] == ["autodiff", "autodiff"]
    assert derive.exact


def test_what_fails_in_both_precisions_keeps_its_first_message():
    derive, found = differentiator(coordinates_of(lambda theta, noise: 1 / 0), rows=16, directions=2, seed=0)
    assert derive.coordinates.precision == torch.float64
    assert "ZeroDivisionError" in found[0].problem


def test_one_black_box_makes_all_levels_finite_differences():
    derive, found = differentiator(
        coordinates_of(lambda theta, noise: theta.sin() + noise, black_box(lambda theta, noise: np.sin(theta) + noise)),
        rows=64, directions=3, seed=0,
    )  # fmt: skip
    assert [one.method for one in found] == ["finite differences", "finite differences"]
    assert not derive.exact
    points = derive.coordinates.draw(10, seed=0)
    along = derive.along(points, block=0)
    assert along.shape == (10, 2, 3)
    assert set(along.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(along, derive.along(points, block=0))
    assert not torch.equal(along, derive.along(points, block=64))
    (x, slopes), (same, others) = (derive.outputs(level, points, along) for level in (0, 1))
    torch.testing.assert_close(x, same, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes.values, others.values, rtol=1e-6, atol=1e-6)


def trees(n, generator):
    return torch.randn(n, 2, generator=generator), torch.randint(0, 5, (n,), generator=generator)


def bent(theta, noise):
    smooth, count = noise
    return torch.stack([theta[:, 0] * smooth[:, 0], theta[:, 0] ** 2 + smooth[:, 1].sin(), count * theta[:, 0]], 1)


def bent_slopes(points):
    """Its derivative `(n, 3, 3)` in theta and the two continuous coordinates of the noise, by hand."""
    theta, (smooth, count) = points.theta[:, 0], points.noise
    zero = torch.zeros_like(theta)
    return torch.stack([
        torch.stack([smooth[:, 0], theta, zero], 1), torch.stack([2 * theta, zero, smooth[:, 1].cos()], 1),
        torch.stack([count.double(), zero, zero], 1),
    ], 1)  # fmt: skip


def test_autodiff_gives_the_derivatives_by_hand():
    derive, _ = differentiator(coordinates_of(bent, noise=trees), rows=64, directions=2, seed=0)
    points = derive.coordinates.draw(50, seed=0)
    x, tangents = derive.outputs(0, points, derive.along(points, block=0))
    assert tangents.exact
    torch.testing.assert_close(x, bent(points.theta, points.noise))
    torch.testing.assert_close(tangents.values, bent_slopes(points), rtol=1e-12, atol=1e-12)


def test_finite_differences_give_the_derivatives_by_hand():
    def hidden(theta, noise):
        return torch.from_numpy(bent(theta, noise).numpy())

    derive, (found,) = differentiator(coordinates_of(hidden, noise=trees), rows=64, directions=5, seed=0)
    assert found.method == "finite differences"
    points = derive.coordinates.draw(50, seed=0)
    along = derive.along(points, block=0)
    x, tangents = derive.outputs(0, points, along)
    torch.testing.assert_close(x, bent(points.theta, points.noise))
    torch.testing.assert_close(tangents.values, bent_slopes(points) @ along.double(), rtol=1e-3, atol=3e-3)


@pytest.mark.parametrize("estimator", ["npe", "nle"])
def test_finite_differences_stay_inside_what_was_drawn(estimator):
    def strict(theta, noise):
        if not (0 <= noise[0] <= 1 and 2 <= theta[0] <= 3):
            raise ValueError(f"outside: {theta}, {noise}")
        return theta * noise

    prior = BoxPrior([2.0], [3.0])
    coordinates = coordinates_of(per_sample(strict), prior=prior, noise=uniform_noise, estimator=estimator)
    derive, (found,) = differentiator(coordinates, rows=128, directions=2, seed=0)
    assert found.problem is None
    points = coordinates.draw(200, seed=0)
    _, tangents = derive.outputs(0, points, derive.along(points, block=0))
    assert bool(tangents.values.isfinite().all())


def test_outputs_that_stop_being_finite_later_are_named():
    derive, _ = differentiator(coordinates_of(lambda theta, noise: theta + noise), rows=16, directions=2, seed=0)
    broken = coordinates_of(lambda theta, noise: torch.where(theta > 0, math.inf, theta))
    points = derive.coordinates.draw(10, seed=0)
    derive = type(derive)(broken, exact=True, step=0.1, directions=2, spread=derive.spread, seed=0)
    with pytest.raises(Exception, match=r"level 'run 0' gives .* not finite in \d of 10 rows"):
        derive.outputs(0, points, derive.along(points, block=0))


@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_steps_fit_coordinates_of_very_different_width_in_single_precision(scale):
    """The wider coordinate must be moved by more than its rounding error."""
    def rounded(theta, noise):
        return torch.from_numpy(theta.numpy().astype(np.float32) + noise.numpy().astype(np.float32))

    prior = Independent(Normal(torch.zeros(1), scale * torch.ones(1)), 1)
    derive, (found,) = differentiator(coordinates_of(rounded, prior=prior), rows=128, directions=2, seed=0)
    points = derive.coordinates.draw(500, seed=0)
    _, tangents = derive.outputs(0, points, derive.along(points, block=0))
    # Either the derivative is right or the check has said that it is not; the squared norm is 2.
    assert found.problem or abs(float(tangents.square().mean()) / 2 - 1) < max(0.2, 3 * found.error)


def test_looking_again_with_the_same_seed_finds_the_same():
    state = torch.get_rng_state()
    run = per_sample(lambda theta, noise: math.sin(theta[0]) + noise[0])
    assert look(run) == look(run)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_fails_on_the_way_between_rows_is_named_and_not_taken_for_a_black_box():
    def fragile(theta, noise):
        if len(theta) > 256:  # which only the way between rows asks for
            raise RuntimeError("too many rows")
        return theta + noise

    found = look(fragile)
    assert found.method == "none"
    assert "too many rows" in found.problem


@pytest.mark.parametrize("run", [lambda theta, noise: torch.tanh(1e5 * noise) + 0.1 * theta,
                                 lambda theta, noise: torch.sigmoid(1e5 * (theta - 0.3)) + 0.1 * noise])
def test_changes_too_steep_for_any_sample_of_rows_are_named(run):
    found = look(run)
    assert found.method == "none"
    assert "so steep in places" in found.problem


def test_slopes_that_rows_see_are_not_too_steep():
    for run in (lambda theta, noise: torch.tanh(30 * noise) + theta, lambda theta, noise: theta + noise**3):
        assert look(run).problem is None
