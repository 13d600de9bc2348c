"""The telescope is unbiased, with weights too; adjusted gradients are not."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mlsbi import simulate, tasks
from mlsbi.simulation.campaign import simulate_level
from mlsbi.training.objective import telescope
from theory_checks.coordinates import Coordinates
from theory_checks.densities import AffineGaussian
from theory_checks.integrands import Gradient, Loss
from theory_checks.measuring import measure
from theory_checks.stabilising import adjusted_gradient
from theory_checks.stacks import problems
from theory_checks.testing import properties, two_levels

SIGMAS = 5.0
REPETITIONS = 200


def telescopes(stack, density, n, weights, *, seed, change=None):
    """Many telescoping sums from the library's own simulations, `(repetitions,)`; `change` alters a pair's halves."""
    data = simulate(stack, [size * REPETITIONS for size in n], seed=seed, progress=False)
    loss, read = Loss(density, "npe"), Coordinates(stack).read
    halves = []
    for level, rows in enumerate(data):
        both = [rows.fine] if rows.coarse is None else [rows.fine, rows.coarse]
        if change is not None and len(both) == 2:
            both = change(both)
        halves += [loss.values(read(rows.theta), x.double())[:, 0].reshape(REPETITIONS, n[level]) for x in both]
    return telescope(halves, weights)


def z_score(stack, density, n, weights, *, seed=0, change=None):
    """How far the mean telescope is from the finest level's mean loss, in standard errors."""
    found = telescopes(stack, density, n, weights, seed=seed, change=change)
    theta, x = simulate_level(stack, -1, 4000, seed=seed, stream=77)
    direct = Loss(density, "npe").values(Coordinates(stack).read(theta), x.double())[:, 0]
    error = (found.var() / len(found) + direct.var() / len(direct)).sqrt()
    return float((found.mean() - direct.mean()) / error), float(error)


@properties(25)
@given(problem=problems(density=("gaussian", "mixture", "nsf"), levels=(2, 4), coupled=None, gap=(0.1, 1.0)),
       seed=st.integers(0, 2**32 - 1), data=st.data())
def test_the_telescope_is_unbiased_whatever_its_weights(problem, seed, data):
    stack, density = problem
    weights = [*(data.draw(st.integers(-5, 15)) / 10 for _ in stack.levels[1:]), 1.0]
    n = [max(2, 16 >> level) for level in range(len(stack))]
    for own in ([1.0] * len(stack), weights):
        z, _ = z_score(stack, density, n, own, seed=seed)
        assert abs(z) < SIGMAS


@properties(25)
@given(problem=problems(density="gaussian", levels=2, generators=["affine"], gap=(0.5, 1.0)))
def test_swapped_levels_are_biased(problem):
    """The negative control: with fine and coarse exchanged the sum has the mean E f^0 + E f^0 - E f^1."""
    stack, density = problem
    z, error = z_score(stack, density, (16, 8), [1.0, 1.0], change=lambda both: both[::-1])
    rows = measure(stack, Loss(density, "npe"), rows=4000)
    bias = 2 * float((rows.values[0] - rows.values[1]).mean())
    assume(abs(bias) > 2 * SIGMAS * error)
    assert abs(z) > SIGMAS


def test_a_last_weight_other_than_one_is_biased():
    stack, density = two_levels(0.5), AffineGaussian([[0.5]], [0.0], [0.0])
    assert abs(z_score(stack, density, (16, 8), [1.0, 1.0])[0]) < SIGMAS
    assert abs(z_score(stack, density, (16, 8), [1.0, 0.5])[0]) > SIGMAS


@pytest.fixture(scope="module")
def gradients():
    """Gradients of a Gaussian that is away from its best fit, on the task whose levels differ most."""
    stack = tasks.get("ou").stack
    density = AffineGaussian(torch.full((3, 5), 0.1), torch.zeros(3), torch.zeros(3))
    return measure(stack, Gradient(density, "npe"), rows=4000)


N = (64, 8)


def test_the_plain_gradient_is_unbiased(gradients):
    assert abs(adjusted_gradient(gradients, N, repetitions=4000).z) < SIGMAS


def test_weights_keep_the_gradient_unbiased(gradients):
    assert abs(adjusted_gradient(gradients, N, weights=[0.3, 1.0], repetitions=4000).z) < SIGMAS


@pytest.mark.parametrize("options", [{"rescale": True}, {"project": True}, {"rescale": True, "project": True},
                                     {"correction_limit": 0.5}])
def test_adjusted_gradients_are_biased(gradients, options):
    found = adjusted_gradient(gradients, N, repetitions=4000, **options)
    assert found.z > 2 * SIGMAS
    assert found.bias > 0.02
