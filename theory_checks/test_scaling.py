"""Slopes whose values are known: -1 for independent rows, 2 for smooth densities, 1 for densities that jump."""

import math
from dataclasses import replace

import pytest
import torch

from mlsbi import Level, LevelStack
from theory_checks.densities import AffineGaussian
from theory_checks.integrands import Gradient, Loss
from theory_checks.measuring import measure
from theory_checks.scaling import Slope, difference_slope, sample_size_slope
from theory_checks.stacks import random_network
from theory_checks.testing import normal_prior_of

GAUSSIAN = AffineGaussian([[0.5]], [0.1], [0.2])


def normal_noise(n, generator):
    return torch.randn(n, 1, generator=generator)


def stack_of(*runs, noise=normal_noise):
    return LevelStack(normal_prior_of(1), noise, [Level(f"run {i}", run) for i, run in enumerate(runs)])


def cheap(theta, noise):
    return theta + noise


def dear(theta, noise):
    return theta + noise + 0.1 * theta * noise


def shifted(theta, noise):
    return theta + noise + 0.5


def measured(*runs, density=GAUSSIAN, rows=4000, seed=0, **options):
    return measure(stack_of(*(runs or (cheap, dear)), **options), Loss(density, "npe"), rows=rows, seed=seed)


def with_values(rows, values):
    """The same record with other losses, level by level."""
    return replace(rows, values=torch.stack(values)[..., None])


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("rows", [400, 20_000])
def test_variances_fall_as_one_over_the_rows(level, rows):
    found = sample_size_slope(measured(rows=rows), level)
    assert found.expected == -1
    assert found.agrees
    assert abs(found.value + 1) < 4 * found.error
    assert found.error < 0.6
    assert found.fitted == len(found.at) == len(found.variances)
    assert found.at == tuple(2**power for power in range(len(found.at)))


def test_the_variance_of_single_rows_is_that_of_the_rows():
    rows = measured(rows=20_000)
    found = sample_size_slope(rows, 1)
    expected = float(rows.differences[1].var(0).sum())
    assert found.variances[0] == pytest.approx(expected, rel=0.2)


def z_scores(gradient, level, rows, seeds):
    found = []
    for seed in range(seeds):
        integrand = Gradient(GAUSSIAN, "npe") if gradient else Loss(GAUSSIAN, "npe")
        slope = sample_size_slope(measure(stack_of(cheap, dear), integrand, rows=rows, seed=seed), level)
        found.append((slope.value + 1) / slope.error)
    return torch.tensor(found)


@pytest.mark.parametrize(("gradient", "level"), [(False, 0), (False, 1), (True, 0)])
def test_standard_errors_of_slopes_are_of_the_right_size(gradient, level):
    z = z_scores(gradient, level, rows=2000, seeds=20 if gradient else 30)
    assert abs(float(z.mean())) < 0.7
    assert 0.6 < float(z.std()) < 1.4


def test_standard_errors_hold_for_many_components():
    """Of 40 independent losses the summed variance is known much better than that of one."""
    rows = measured(rows=4000)
    scores = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(2, 4000, 40, generator=generator, dtype=torch.float64)
        slope = sample_size_slope(replace(rows, values=values), 0)
        scores.append((slope.value + 1) / slope.error)
    assert 0.6 < float(torch.tensor(scores).std()) < 1.4


def test_rows_that_depend_on_each_other_do_not_fall_so():
    rows = measured(rows=8000)
    groups = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat_interleave(8)
    found = sample_size_slope(with_values(rows, [groups, groups + rows.values[1, :, 0]]), 0)
    assert found.value > -0.5
    assert found.agrees is False
    wave = torch.randn(8000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alternating = wave - wave.roll(1)
    assert sample_size_slope(with_values(rows, [alternating, alternating]), 0).value < -1.2


@pytest.mark.parametrize("rows", [2, 3, 64, 100])
def test_few_rows_give_a_reason_instead(rows):
    found = sample_size_slope(measured(rows=rows), 1)
    assert math.isnan(found.value)
    assert found.agrees is None
    assert f"{rows} rows are too few" in str(found)


def test_levels_that_add_nothing_have_no_slope():
    rows = measured(cheap, lambda theta, noise: theta + noise)
    for found in (sample_size_slope(rows, 1), difference_slope(rows, 1)):
        assert math.isnan(found.value)
        assert found.reason == "the level adds nothing"
        assert found.agrees is None
        assert str(found) == "no slope: the level adds nothing"
    assert sample_size_slope(rows, 0).agrees


def test_one_level_has_one_slope():
    rows = measured(cheap)
    assert sample_size_slope(rows, 0).agrees
    with pytest.raises(ValueError, match="level 0 has none below"):
        difference_slope(rows, 0)


def test_a_slope_of_the_difference_needs_a_density():
    with pytest.raises(ValueError, match="with an integrand"):
        difference_slope(measure(stack_of(cheap, dear), rows=100), 1)


SMOOTH = {
    "gaussian": GAUSSIAN,
    "mixture network": random_network(1, 1, kind="mdn", seed=0),
    "flow": random_network(1, 1, kind="maf", seed=0),
    "kink": lambda theta, x: -(theta[:, 0] - x[:, 0]).abs(),
    "linear": lambda theta, x: x[:, 0],
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("run", [dear, shifted])
def test_smooth_densities_have_slope_two(name, run):
    if name == "linear" and run is shifted:
        return  # its difference is a constant
    found = difference_slope(measured(cheap, run, density=SMOOTH[name], rows=1000), 1)
    assert found.agrees, str(found)
    assert found.value == pytest.approx(2, abs=0.1)
    assert (found.at[0], found.at[-1], len(found.at)) == (1.0, 1 / 256, 9)


def test_gradients_have_slope_two():
    rows = measure(stack_of(cheap, dear), Gradient(random_network(1, 1, kind="maf", seed=0), "npe", most=30), rows=1000)
    assert difference_slope(rows, 1).agrees


def test_the_variance_at_share_one_is_that_of_the_levels():
    rows = measured(rows=3000)
    found = difference_slope(rows, 1)
    assert found.variances[0] == pytest.approx(float(rows.differences[1].var()), rel=1e-9)
    # A loss that is linear in x: every variance is the share squared.
    linear = difference_slope(measured(density=SMOOTH["linear"]), 1)
    for share, variance in zip(linear.at, linear.variances, strict=True):
        assert variance == pytest.approx(share**2 * linear.variances[0], rel=1e-6)


JUMPS = {
    "step": lambda theta, x: (theta[:, 0] > x[:, 0]).double(),
    "steps": lambda theta, x: (4 * x[:, 0]).floor(),
    "smooth with a step": lambda theta, x: -(theta[:, 0] - x[:, 0]).square() + 30.0 * (x[:, 0] > 0).double(),
}


@pytest.mark.parametrize("name", JUMPS)
@pytest.mark.parametrize("seed", range(2))
def test_densities_that_jump_have_slope_one(name, seed):
    # As far apart as makes some 10 of 4000 rows jump at the smallest share.
    run = (lambda theta, noise: theta + noise + 0.7 + 0.1 * noise) if name == "steps" else (
        lambda theta, noise: theta + noise + 3.0)
    found = difference_slope(measured(cheap, run, density=JUMPS[name], seed=seed), 1)
    assert not found.agrees
    assert 0.6 < found.value < 1.4
    assert 0 < found.error < 0.5, "an error that is not a number tells nothing"


@pytest.mark.parametrize("name", ["step", "smooth with a step"])
@pytest.mark.parametrize("seed", range(3))
def test_jumps_of_very_few_rows_do_not_agree_with_slope_two(name, seed):
    found = difference_slope(measured(cheap, shifted, density=JUMPS[name], seed=seed), 1)
    assert not found.agrees, str(found)
    assert found.reason or not math.isnan(found.error), "an error that is not a number tells nothing"


def test_a_jump_that_few_rows_cross_is_not_a_level_that_adds_nothing():
    rows = measured(cheap, lambda theta, noise: theta + noise + 0.02, density=JUMPS["step"], rows=2000)
    found = difference_slope(rows, 1)
    assert found.variances[0] > 0
    assert found.variances[-1] == 0
    assert "adds nothing" not in found.reason
    assert not found.agrees
    assert not math.isinf(found.value)


def test_the_bootstrap_depends_on_its_seed_alone():
    rows = measured(density=SMOOTH["mixture network"], rows=500)
    state = torch.get_rng_state()
    assert difference_slope(rows, 1, seed=1) == difference_slope(rows, 1, seed=1)
    assert difference_slope(rows, 1, seed=1).error != difference_slope(rows, 1, seed=2).error
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("value", "error", "agrees"), [
    (-1.0, 0.0, True), (-1.04, 0.0, True), (-1.06, 0.0, False), (-1.3, 0.1, True), (-1.5, 0.1, False),
    (0.0, 0.1, False), (math.nan, math.nan, None),
])  # fmt: skip
def test_agreement_allows_for_errors(value, error, agrees):
    assert Slope(0, -1.0, value, error, (), (), 0).agrees is agrees
