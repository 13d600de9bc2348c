"""Theorem 1: variance bounds on random stacks, and how they scale."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mlsbi import BoxPrior, Level, LevelStack
from theory_checks.bounds import check_bounds, poincare_bound, sobolev_bound, theorem_bound
from theory_checks.generators import Perturbed
from theory_checks.integrands import Loss
from theory_checks.measuring import measure
from theory_checks.scaling import difference_slope, sample_size_slope
from theory_checks.stacks import gaussians, mixtures, problems, stacks
from theory_checks.testing import known_constants, properties, two_levels

ROWS = 1500
SMOOTH = ("gaussian", "mixture")
ALL = ("gaussian", "mixture", "mdn", "maf", "nsf")
STACKS = {"coupled": None, "gap": (1e-3, 1.0)}


def measured(stack, density, *, estimator="npe", rows=ROWS, seed=0):
    return measure(stack, Loss(density, estimator), estimator=estimator, rows=rows, seed=seed,
                   **known_constants(stack, estimator))


def failing(checks):
    """Checks that are not kept."""
    return [str(check) for check in checks if check.verdict not in ("holds", "within error")]


@properties(200)
@given(problem=problems(density=ALL, **STACKS), seed=st.integers(0, 2**32 - 1))
def test_poincare_bound_holds_for_posteriors_of_every_kind(problem, seed):
    assert not failing(poincare_bound(measured(*problem, seed=seed)))


@pytest.mark.slow
@properties(50)
@given(problem=problems(estimator="nle", density=ALL, **STACKS), seed=st.integers(0, 2**32 - 1))
def test_poincare_bound_holds_for_likelihoods_of_every_kind(problem, seed):
    assert not failing(poincare_bound(measured(*problem, estimator="nle", seed=seed)))


@properties(200)
@given(estimator=st.sampled_from(["npe", "nle"]), data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_theorem_1_holds_for_densities_with_known_constants(estimator, data, seed):
    stack, density = data.draw(problems(estimator=estimator, density=SMOOTH, **STACKS))
    rows = measured(stack, density, estimator=estimator, seed=seed)
    sharp, sobolev, theorem = poincare_bound(rows), sobolev_bound(rows), theorem_bound(rows)
    assert not failing([*sharp, *sobolev, *theorem])
    # Each bound follows from the one before by inequalities that hold for means over any rows: no error to allow for.
    for p, s, t in zip(sharp, sobolev, theorem, strict=True):
        assert p.value <= s.value * (1 + 1e-9)
        assert s.value <= t.value * (1 + 1e-9)


@properties(30)
@given(problem=problems(density="gaussian"), factor=st.integers(2, 1000))
def test_bounds_and_estimates_fall_as_one_over_n(problem, factor):
    rows = measured(*problem, rows=200)
    levels = len(problem[0])
    few, many = check_bounds(rows, n=(3,) * levels), check_bounds(rows, n=(3 * factor,) * levels)
    for one, other in zip(few, many, strict=True):
        assert other.value * factor == pytest.approx(one.value, rel=1e-12)
        assert other.estimate * factor == pytest.approx(one.estimate, rel=1e-12)
        assert other.verdict == one.verdict


@properties(30)
@given(problem=problems(density=ALL, levels=2, gap=(0.1, 1.0)), seed=st.integers(0, 2**32 - 1))
def test_variances_of_means_fall_as_one_over_n(problem, seed):
    rows = measured(*problem, rows=4000, seed=seed)
    for level in range(2):
        slope = sample_size_slope(rows, level)
        if rows.differences[level].var() > 0:  # a density may read nothing of x
            assert abs(slope.value + 1) < 5 * slope.error, str(slope)


@properties(30)
@given(stack=stacks(levels=2, gap=(1.0, 1.0)), data=st.data())
def test_variance_falls_as_the_squared_level_difference(stack, data):
    """A family of stacks whose cheap level comes closer: variance, norm and bounds all have slope 2 in the gap."""
    x = stack.levels[0].simulate(torch.zeros(1, stack.prior.event_shape[0]), stack.draw_noise(1, torch.Generator()))
    sizes = int(stack.prior.event_shape[0]), x.shape[1]
    density = data.draw(st.one_of(gaussians(*sizes), mixtures(*sizes)))
    cheap = stack.levels[0].simulate
    variances, norms, bounds = [], [], []
    for gap in (1e-2, 1e-3, 1e-4):
        levels = [replace(stack.levels[0], simulate=Perturbed(cheap.base, cheap.perturbation, gap)), stack.levels[1]]
        rows = measured(replace(stack, levels=levels), density, rows=500)
        variances.append(float(rows.differences[1].var(0)))
        norms.append(float((rows.difference_fourth + rows.difference_gradient_fourth).mean()) ** 0.25)
        bounds.append(poincare_bound(rows)[1].value)
    assume(variances[-1] > 1e-20)  # a density may read nothing of x
    for values, power in ((norms, 1), (variances, 2), (bounds, 2)):
        for far, near in zip(values, values[1:], strict=False):
            # The smooth densities' next order is the gap times their curvature.
            assert far / near == pytest.approx(10**power, rel=0.1)


@pytest.mark.slow
@properties(30)
@given(problem=problems(density=SMOOTH, levels=(2, 3)))
def test_interpolated_levels_have_slope_two(problem):
    rows = measured(*problem, rows=500)
    for level in range(1, len(problem[0])):
        slope = difference_slope(rows, level)
        if rows.differences[level].var() > 1e-12:  # a density may read nothing of x
            assert slope.agrees, str(slope)


def test_the_bound_is_attained_by_its_extremals():
    """Linear in a normal, cosine in a uniform: then (P) is an equality, to which the estimate must come."""
    normal = LevelStack(two_levels(0.0).prior, lambda n, generator: torch.randn(n, 1, generator=generator),
                        [Level("u", lambda theta, u: u)])
    uniform = replace(normal, noise=lambda n, generator: torch.rand(n, 1, generator=generator))
    linear, cosine = (lambda theta, x: x[:, 0]), (lambda theta, x: torch.cos(torch.pi * x[:, 0]))
    for stack, function in ((normal, linear), (uniform, cosine)):
        (check,) = poincare_bound(measure(stack, Loss(function, "npe"), rows=50_000, theta_constant=1e-6))
        assert check.ratio == pytest.approx(1, abs=0.02)
        assert check.verdict in ("holds", "within error")


def test_identical_levels_add_nothing_and_their_bound_is_zero():
    stack = LevelStack(BoxPrior([0.0], [1.0]), lambda n, generator: torch.randn(n, 1, generator=generator),
                       [Level("one", lambda theta, u: theta + u, 1.0), Level("other", lambda theta, u: theta + u, 2.0)])
    for check in check_bounds(stack, lambda theta, x: -((theta - x) ** 2).sum(1), rows=200):
        if check.level == 1 and check.verdict != "not applicable":
            assert (check.value, check.estimate, check.verdict) == (0, 0, "holds")
