"""What must fail: the bounds with something wrong, placed where they are tight."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given

from mlsbi import Level, LevelStack, simulate
from theory_checks.bounds import poincare_bound, sobolev_bound
from theory_checks.coordinates import Coordinates
from theory_checks.densities import AffineGaussian
from theory_checks.integrands import Loss
from theory_checks.measuring import measure
from theory_checks.stacks import problems
from theory_checks.testing import known_constants, normal_prior_of, properties, two_levels

EXTREMALS = {
    "normal": (lambda n, generator: torch.randn(n, 1, generator=generator), lambda theta, x: x[:, 0], 1.0),
    "uniform": (lambda n, generator: torch.rand(n, 1, generator=generator),
                lambda theta, x: torch.cos(torch.pi * x[:, 0]), torch.pi**-2),
}


@pytest.mark.parametrize("law", EXTREMALS)
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_less_than_the_constant_is_violated_by_extremals(law, share):
    noise, function, constant = EXTREMALS[law]
    stack = LevelStack(normal_prior_of(1), noise, [Level("u", lambda theta, u: u)])
    (check,) = poincare_bound(measure(stack, Loss(function, "npe"), rows=20_000, theta_constant=1e-6,
                                      noise_constant=share * constant))
    assert (check.verdict == "violated") == (share < 1), str(check)


def check_violated(check):
    """Above its bound; by four standard errors too, but where tails are so heavy that 1000 rows leave these large."""
    assert check.estimate > check.value, str(check)
    assert check.verdict == "violated" or check.estimate_error > check.estimate / 5, str(check)


@properties(40)
@given(problem=problems(density=("gaussian", "mixture"), gap=(1e-4, 1e-3)))
def test_uncoupled_noise_violates_the_bound(problem):
    """The bound is of coupled levels; rows whose coarse half has other noise exceed it."""
    stack, density = problem
    constants = known_constants(stack, "npe")
    rows = measure(stack, Loss(density, "npe"), rows=1000, **constants)
    last = len(stack) - 1
    coordinates = Coordinates(stack)
    points, other = coordinates.draw(1000, seed=0), coordinates.draw(1000, seed=1)
    apart = coordinates.simulate(last - 1, replace(points, noise=other.noise))
    values = rows.values.clone()
    values[last - 1] = Loss(density, "npe").values(points.theta, apart)
    good, bad = sobolev_bound(rows)[last], sobolev_bound(replace(rows, values=values))[last]
    assert good.verdict in ("holds", "within error")
    noise_matters = (values[last - 1] - rows.values[last - 1]).std() > 0.1
    assume(noise_matters)  # a density may read nothing of x
    check_violated(bad)


@properties(40)
@given(problem=problems(density=("gaussian", "mixture"), gap=(1e-4, 1e-3)))
def test_a_reversed_sign_violates_the_bound(problem):
    stack, density = problem
    rows = measure(stack, Loss(density, "npe"), rows=1000, **known_constants(stack, "npe"))
    last = len(stack) - 1
    values = rows.values.clone()
    values[last - 1] *= -1
    assume(values[last].std() > 0.1)
    assert sobolev_bound(rows)[last].verdict in ("holds", "within error")
    check_violated(sobolev_bound(replace(rows, values=values))[last])


@pytest.mark.parametrize("gap", [1e-3, 1e-5])
def test_pairs_of_a_campaign_keep_the_bound_and_shuffled_ones_do_not(gap):
    """The library's own simulations, whose halves share theta and noise, against the bound of the stack's functions."""
    stack = two_levels(gap)
    density = AffineGaussian([[0.5]], [0.1], [0.3])
    bound = sobolev_bound(stack, density, rows=4000)[1]
    pairs = simulate(stack, (2, 4000), seed=1, progress=False).levels[1]
    loss = Loss(density, "npe")
    theta, fine, coarse = pairs.theta.double(), pairs.fine.double(), pairs.coarse.double()
    together = loss.values(theta, fine) - loss.values(theta, coarse)
    # float32 outputs: their rounding is below 1e-6 here, beside differences of the gap.
    assert float(together.var()) <= bound.value + 1e-12
    shuffled = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    apart = loss.values(theta, fine) - loss.values(theta, coarse[shuffled])
    assert float(apart.var()) > 100 * bound.value
