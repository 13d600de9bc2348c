"""Levels as functions of the estimator's coordinates: maps of theta, noise trees, and simulators that misbehave."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Exponential, Independent, LogNormal, MultivariateNormal

from mlsbi import BoxPrior, Level, LevelStack
from theory_checks.coordinates import Coordinates, Points, SimulatorProblem
from theory_checks.testing import normal_prior_of


def normal_noise(n, generator):
    return torch.randn(n, 1, generator=generator)


def stack_of(*simulators, prior=None, noise=normal_noise):
    return LevelStack(prior or normal_prior_of(1), noise, [Level(f"run {i}", run) for i, run in enumerate(simulators)])


def add(theta, noise):
    return theta + noise


def tree(n, generator):
    return {"path": torch.randn(n, 2, 3, generator=generator), "count": torch.randint(0, 9, (n,), generator=generator),
            "late": torch.rand(n, 1, generator=generator), "flag": torch.rand(n, 2, generator=generator) > 0.5}


@pytest.mark.parametrize(("low", "high"), [([0.0], [1.0]), ([-2.0, 10.0], [3.0, 10.5]), ([-1e3], [5e2])])
def test_a_posterior_sees_a_box_through_its_logit(low, high):
    stack = stack_of(add, prior=BoxPrior(low, high))
    theta = stack.prior.sample((500,)).double()
    low, high = (torch.tensor(edge).double() for edge in (low, high))  # rounded as the prior rounds them
    share = (theta - low) / (high - low)
    by_hand = torch.log(share / (1 - share))
    coordinates = Coordinates(stack, "npe")
    torch.testing.assert_close(coordinates.read(theta), by_hand, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(coordinates.parameters(by_hand), theta, rtol=1e-9, atol=1e-9)


def test_a_likelihood_reads_a_box_as_it_is():
    coordinates = Coordinates(stack_of(add, prior=BoxPrior([-2.0, 5.0], [3.0, 6.0])), "nle")
    theta = coordinates.stack.prior.sample((50,)).double()
    assert torch.equal(coordinates.read(theta), theta)
    assert torch.equal(coordinates.parameters(theta), theta)
    points = coordinates.draw(50, seed=0)
    assert bool(((points.theta > torch.tensor([-2.0, 5.0])) & (points.theta < torch.tensor([3.0, 6.0]))).all())


@pytest.mark.parametrize("estimator", ["npe", "nle"])
@pytest.mark.parametrize("prior", [Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1),
                                   Independent(Exponential(torch.tensor([0.5, 3.0])), 1)])
def test_positive_parameters_are_read_through_their_logarithm(prior, estimator):
    coordinates = Coordinates(stack_of(add, prior=prior), estimator)
    theta = prior.sample((50,)).double()
    torch.testing.assert_close(coordinates.read(theta), theta.log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(coordinates.parameters(theta.log()), theta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ["npe", "nle"])
def test_normal_parameters_stay_as_they_are(estimator):
    prior = MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    coordinates = Coordinates(stack_of(add, prior=prior), estimator)
    theta = prior.sample((50,)).double()
    assert torch.equal(coordinates.read(theta), theta)
    assert torch.equal(coordinates.parameters(theta), theta)
    assert coordinates.dim == 2


def test_edges_of_a_box_have_finite_coordinates():
    coordinates = Coordinates(stack_of(add, prior=BoxPrior([0.0, 2.0], [1.0, 4.0])))
    z = coordinates.read(torch.tensor([[0.0, 4.0], [1.0, 2.0]]))
    assert bool(z.isfinite().all())
    back = coordinates.parameters(z)
    assert bool(((back > torch.tensor([0.0, 2.0])) & (back < torch.tensor([1.0, 4.0]))).all())


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match='"npe" or "nle"; got \'snpe\''):
        Coordinates(stack_of(add), "snpe")


@pytest.mark.parametrize(("start", "n"), [(0, 1), (0, 700), (1020, 10), (1500, 600), (2047, 2)])
def test_any_range_of_rows_is_that_of_all_rows(start, n):
    coordinates = Coordinates(stack_of(add, noise=tree))
    every, some = coordinates.draw(2200, seed=3), coordinates.draw(n, seed=3, start=start)
    assert len(some) == n
    assert torch.equal(some.theta, every.theta[start:start + n])
    for name, leaf in some.noise.items():
        assert torch.equal(leaf, every.noise[name][start:start + n]), name


def test_draws_are_float64_and_depend_on_seed_and_stream_alone():
    coordinates = Coordinates(stack_of(add))
    state = torch.get_rng_state()
    first, again = coordinates.draw(20, seed=3), coordinates.draw(20, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.theta.dtype == first.noise.dtype == torch.float64
    assert torch.equal(first.flat(), again.flat())
    for other in (coordinates.draw(20, seed=4), coordinates.draw(20, seed=3, stream=1)):
        assert not bool((other.theta == first.theta).any())
        assert not bool((other.noise == first.noise).any())


def test_a_tree_of_noise_has_its_continuous_leaves_as_coordinates():
    points = Coordinates(stack_of(add, prior=normal_prior_of(2), noise=tree)).draw(5, seed=0)
    assert [tuple(leaf.shape) for leaf in points.leaves] == [(5, 2), (5, 2, 3), (5, 1)]
    assert points.dim == 9
    assert points.flat().shape == (5, 9)
    assert points.noise["count"].dtype == torch.int64
    assert points.noise["flag"].dtype == torch.bool


def test_moving_by_a_vector_adds_it_in_flat_coordinates_and_leaves_the_rest():
    points = Coordinates(stack_of(add, prior=normal_prior_of(2), noise=tree)).draw(5, seed=0)
    by = torch.randn(5, 9, dtype=torch.float64)
    kept = points.flat().clone()
    moved = points.moved(by)
    torch.testing.assert_close(moved.flat(), kept + by, rtol=0, atol=1e-15)
    assert torch.equal(points.flat(), kept)
    assert torch.equal(moved.noise["count"], points.noise["count"])
    assert torch.equal(moved.noise["flag"], points.noise["flag"])
    assert moved.noise["path"].shape == (5, 2, 3)


def test_rows_are_picked_in_all_leaves():
    points = Coordinates(stack_of(add, noise=tree)).draw(6, seed=0)
    backwards = torch.arange(5, -1, -1)
    turned = points.rows(backwards)
    assert torch.equal(turned.theta, points.theta.flip(0))
    assert all(torch.equal(turned.noise[name], leaf.flip(0)) for name, leaf in points.noise.items())
    assert len(points.rows(slice(2, 4))) == 2


@pytest.mark.parametrize("noise", [
    lambda n, generator: torch.randn(n, generator=generator),
    lambda n, generator: (torch.randn(n, generator=generator), torch.randn(n, 1, generator=generator)),
])  # fmt: skip
def test_one_number_of_noise_a_row_needs_no_second_axis(noise):
    points = Coordinates(stack_of(add, noise=noise)).draw(4, seed=0)
    assert points.flat().shape == (4, points.dim)
    torch.testing.assert_close(points.moved(torch.ones(4, points.dim, dtype=torch.float64)).flat(), points.flat() + 1)


def test_a_seed_has_no_coordinates():
    points = Coordinates(stack_of(add, noise="seed")).draw(5, seed=0)
    assert points.dim == 1
    assert points.noise.dtype == torch.int64
    assert points.noise.unique().numel() == 5


def test_replace_takes_leaves_in_their_order():
    points = Points(torch.zeros(2, 1), (torch.ones(2, 1), torch.tensor([7, 8]), torch.full((2, 3), 2.0)))
    swapped = points.replace([leaf + 10 for leaf in points.leaves])
    assert swapped.theta.tolist() == [[10], [10]]
    assert swapped.noise[0].tolist() == [[11], [11]]
    assert swapped.noise[1].tolist() == [7, 8]
    assert swapped.noise[2].tolist() == [[12] * 3] * 2


def test_a_simulator_may_change_its_inputs():
    def spoil(theta, noise):
        theta.mul_(0)
        for leaf in noise.values():
            leaf.zero_()
        return theta

    coordinates = Coordinates(stack_of(spoil, noise=tree))
    points = coordinates.draw(10, seed=0)
    theta, noise = points.theta.clone(), {name: leaf.clone() for name, leaf in points.noise.items()}
    assert coordinates.simulate(0, points).abs().max() == 0
    assert torch.equal(points.theta, theta)
    assert all(torch.equal(points.noise[name], leaf) for name, leaf in noise.items())


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_simulators_are_given_one_precision_and_their_parameters(precision):
    seen = []

    def look(theta, noise):
        seen.append((theta, noise))
        return theta + noise["late"]

    coordinates = Coordinates(stack_of(look, prior=BoxPrior([2.0], [3.0]), noise=tree), precision=precision)
    points = coordinates.draw(10, seed=0)
    x = coordinates.simulate(0, points)
    theta, noise = seen[0]
    assert x.dtype == torch.float64
    assert theta.dtype == noise["path"].dtype == precision
    assert noise["count"].dtype == torch.int64
    assert bool(((theta > 2) & (theta < 3)).all())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.float32])
def test_outputs_of_any_real_type_are_read_in_float64(dtype):
    coordinates = Coordinates(stack_of(lambda theta, noise: (theta > 0).to(dtype)))
    x = coordinates.simulate(0, coordinates.draw(10, seed=0))
    assert x.dtype == torch.float64
    assert set(x.flatten().tolist()) == {0.0, 1.0}


def raises(theta, noise):
    raise KeyError("no\n   such\n table")


@pytest.mark.parametrize(("run", "message"), [
    (raises, "level 'run 0' raised KeyError: .*no"),
    (lambda theta, noise: 1 / 0, "level 'run 0' raised ZeroDivisionError: division by zero"),
    (lambda theta, noise: theta[:-1], r"level 'run 0' gave shape \(4, 1\) for 5 rows"),
    (lambda theta, noise: theta.sum(), r"level 'run 0' gave shape \(\) for 5 rows"),
    (lambda theta, noise: theta.T, r"level 'run 0' gave shape \(1, 5\) for 5 rows"),
    (lambda theta, noise: (theta + noise)[:, 0], r"level 'run 0' gave shape \(5,\)"),
    (lambda theta, noise: np.zeros((5, 1)), "level 'run 0'"),
    (lambda theta, noise: None, "level 'run 0'"),
    (lambda theta, noise: torch.complex(theta, noise), "level 'run 0'"),
])  # fmt: skip
def test_what_is_wrong_with_a_simulator_is_named_with_its_level(run, message):
    coordinates = Coordinates(stack_of(run))
    points = coordinates.draw(5, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of complex numbers: not every user has them raised
        with pytest.raises(SimulatorProblem, match=message) as caught:
            coordinates.simulate(0, points)
    assert "\n" not in str(caught.value)


def test_a_level_as_a_function_of_leaves_has_flat_outputs_and_the_right_slopes():
    def image(theta, noise):
        return (theta[:, :, None] * noise["path"]).sin()

    coordinates = Coordinates(stack_of(image, prior=BoxPrior([1.0], [3.0]), noise=tree))
    points = coordinates.draw(4, seed=0)
    function = coordinates.function(0, points)
    assert function(*points.leaves).shape == (4, 6)
    slopes = torch.autograd.functional.jacobian(lambda z: function(z, *points.leaves[1:])[0], points.theta)[:, 0, 0]
    theta = coordinates.parameters(points.theta)[0]
    stretch = (theta - 1) * (3 - theta) / 2  # d theta / d logit
    path = points.noise["path"][0].flatten()
    torch.testing.assert_close(slopes, stretch * path * (theta * path).cos(), rtol=1e-9, atol=1e-12)
    assert not math.isclose(float(stretch), 1.0)
