"""What is said of A1, A2 and A3 where the truth is known; and Hill's estimates."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mlsbi import BoxPrior, Level, LevelStack
from theory_checks.assumptions import Assumption, check_assumptions
from theory_checks.densities import AffineGaussian, SharedMixture
from theory_checks.integrands import Loss
from theory_checks.measuring import measure
from theory_checks.samples import hill
from theory_checks.stacks import random_network
from theory_checks.testing import normal_prior_of

ROWS = 20_000


def normal_noise(n, generator):
    return torch.randn(n, 1, generator=generator)


def uniform_noise(n, generator):
    return torch.rand(n, 1, generator=generator)


def student(df):
    """Student's t: moments below `df` are finite."""
    def draw(n, generator):
        chi = torch.randn(n, df, generator=generator).square().mean(1, keepdim=True)
        return torch.randn(n, 1, generator=generator) / chi.sqrt()

    return draw


def cauchy(n, generator):
    return torch.tan(math.pi * (torch.rand(n, 1, generator=generator, dtype=torch.float64) - 0.5))


def lognormal(n, generator):
    return torch.randn(n, 1, generator=generator).exp()


def total(theta, noise):
    return theta + noise


def stack_of(*runs, prior=None, noise=normal_noise):
    return LevelStack(prior or normal_prior_of(1), noise, [Level(f"run {i}", run) for i, run in enumerate(runs)])


def assumptions(*runs, density=None, rows=ROWS, seed=0, **options):
    loss = None if density is None else Loss(density, "npe")
    return check_assumptions(measure(stack_of(*(runs or [total]), **options), loss, rows=rows, seed=seed), seed=seed)


def a2(*runs, **options):
    return assumptions(*runs, **options)[1]


def a3(density, **options):
    return assumptions(total, density=density, rows=options.pop("rows", 2048), **options)[2]


def pareto(index, n=100_000, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** (-1 / index)


@pytest.mark.parametrize("index", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("share", [0.0025, 0.01, 0.1])
def test_hill_finds_the_index_of_a_pareto_law(index, share):
    found, error = hill(pareto(index), share)
    assert abs(found - index) < 4 * error
    assert error == pytest.approx(found / (share * 100_000) ** 0.5)


def test_hills_error_is_that_of_repetitions():
    z = torch.tensor([(found - 3) / error for found, error in (hill(pareto(3.0, 5000, seed)) for seed in range(200))])
    assert 0.8 < float(z.std()) < 1.25
    assert abs(float(z.mean())) < 0.4


def test_hill_does_not_depend_on_order_or_units():
    values = pareto(2.0, 5000)
    assert hill(values.flip(0)) == hill(values)
    assert hill(1e9 * values) == pytest.approx(hill(values))


def test_lighter_tails_have_larger_indices():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(50_000, generator=generator).double().abs()
    assert hill(normal)[0] > 6
    assert hill(normal, 0.0025)[0] > hill(normal)[0]
    assert hill(torch.rand(50_000, generator=generator).double())[0] > 50


@pytest.mark.parametrize("values", [torch.ones(1000), torch.zeros(1000), torch.tensor([0.0, 0.0, 3.0]), torch.ones(2)])
def test_equal_or_vanishing_values_have_no_tail(values):
    assert hill(values.double())[0] == math.inf


def test_hill_works_on_few_values():
    for values in ([1.0, 2.0], [1.0, 2.0, 4.0], list(range(1, 12))):
        found, error = hill(torch.tensor(values, dtype=torch.float64))
        assert 0 < found < math.inf
        assert 0 < error < math.inf


@pytest.mark.parametrize(("prior", "noise"), [
    (normal_prior_of(2), normal_noise), (BoxPrior([0.0], [3.0]), uniform_noise), (BoxPrior([0.0], [3.0]), normal_noise),
])  # fmt: skip
def test_usual_laws_are_log_concave(prior, noise):
    found = assumptions(lambda theta, noise: theta[:, :1] + noise, prior=prior, noise=noise, rows=100)[0]
    assert (found.name, found.verdict) == ("A1", "holds")


def two_humps(n, generator):
    return 0.1 * torch.randn(n, 1, generator=generator) + 4 * (torch.rand(n, 1, generator=generator) > 0.5) - 2


def coin(n, generator):
    return torch.randint(0, 2, (n, 1), generator=generator)


@pytest.mark.parametrize("noise", [two_humps, cauchy, "seed", coin])
def test_other_laws_are_not_said_to_be_log_concave(noise):
    def run(theta, noise):
        return theta + (noise if noise.is_floating_point() else 0)

    found = assumptions(run, noise=noise, rows=100)[0]
    assert found.verdict in ("fails", "doubtful")
    assert found.reason


def test_a_known_constant_does_not_make_a_law_log_concave():
    measured = measure(stack_of(total, noise=two_humps), rows=100, noise_constant=50.0)
    assert measured.law.constant == 50.0
    assert check_assumptions(measured)[0].verdict in ("fails", "doubtful")


@pytest.mark.parametrize("run", [
    total, lambda theta, noise: theta * noise, lambda theta, noise: (theta + noise).tanh(),
    lambda theta, noise: theta * 0, lambda theta, noise: torch.cat([theta.sin(), noise.abs()], 1),
])  # fmt: skip
@pytest.mark.parametrize("noise", [normal_noise, uniform_noise])
def test_moments_of_light_tails_are_plausible(run, noise):
    found = a2(run, noise=noise)
    assert (found.name, found.verdict) == ("A2", "plausible"), found.reason


def verdicts(seeds=10, **options):
    return [a2(seed=seed, **options).verdict for seed in range(seeds)]


@pytest.mark.parametrize("noise", [student(2), cauchy])
def test_moments_of_heavy_tails_fail_and_are_never_plausible(noise):
    found = verdicts(noise=noise)
    assert "plausible" not in found
    assert found.count("fails") >= 7
    assert "holds" not in found


def test_moments_of_a_log_normal_are_in_doubt_as_they_are_finite():
    found = verdicts(noise=lognormal)
    assert "fails" not in found[:3]
    assert found.count("doubtful") + found.count("plausible") >= 6


def test_powers_of_normals_have_all_moments():
    found = [a2(lambda theta, noise: theta + noise**3, seed=seed).verdict for seed in range(8)]
    assert found.count("fails") <= 1


@pytest.mark.parametrize("rows", [64, 300, 1000])
def test_few_rows_do_not_tell_that_moments_are_infinite(rows):
    """Rows that are not enough to see two places of a tail must not say that it stays heavy."""
    for run, most in ((total, 0), (lambda theta, noise: theta + noise**3, 3)):
        found = [a2(run, seed=seed, rows=rows).verdict for seed in range(10)]
        assert found.count("fails") <= most, (rows, found)


def test_an_infinite_derivative_is_found():
    found = a2(lambda theta, noise: (theta + noise).abs().sqrt())  # E|grad G|^4 is the integral of 1/x^2
    assert found.verdict == "fails"
    assert "|grad G| of 'run 0'" in found.reason


def test_the_worst_level_is_named():
    found = a2(total, lambda theta, noise: theta + torch.sinh(2 * noise), lambda theta, noise: theta)
    assert found.verdict in ("doubtful", "fails")
    assert "'run 1'" in found.reason


def test_levels_that_cannot_be_measured_are_doubtful():
    found = assumptions(lambda theta, noise: theta.round(), density=AffineGaussian([[1.0]], [0.0], [0.0]), rows=100)
    assert found[1].verdict == "doubtful"
    assert "nothing was measured" in found[1].reason
    assert found[2].verdict == "doubtful"


def test_known_constants_hold():
    for density in (AffineGaussian([[1.0]], [0.0], [0.0]),
                    SharedMixture([[1.0]], [[-1.0], [1.0]], [0.0], [[0.0], [0.3]], [[1.0]], [0.0])):
        found = a3(density)
        assert (found.name, found.verdict) == ("A3", "holds")
        assert f"{density.constants.growth:.3g}" in found.reason


@pytest.mark.parametrize("kind", ["mdn", "maf"])
def test_networks_of_tanh_are_not_proven(kind):
    assert a3(random_network(1, 1, kind=kind, seed=0)).verdict in ("plausible", "fails")


class Tanh(nn.Module):
    """A smooth density whose derivative grows linearly and has a bounded slope."""

    def log_prob(self, input, condition):
        return -0.5 * input.square().sum(1) + (input + condition).tanh().sum(1)


def test_a_smooth_density_of_linear_growth_is_plausible():
    found = a3(Tanh())
    assert found.verdict == "plausible", found.reason
    assert "neither is a proof" in found.reason


FAILING = {
    "spline": (random_network(1, 1, kind="nsf", seed=0), "jumps"),
    "kink": (lambda theta, x: -(theta[:, 0] - x[:, 0]).abs(), "jumps"),
    "step": (lambda theta, x: (theta[:, 0] > x[:, 0]).double(), "jumps"),
    "slope and step": (lambda theta, x: (theta[:, 0] > x[:, 0]).double() - (theta - x).square().sum(1), "jumps"),
    "relu": (lambda theta, x: -(theta - x.relu()).square().sum(1), "jumps"),
    "quadratic growth": (lambda theta, x: -(theta - x).abs().pow(3).sum(1), "faster than linearly"),
    "cubic growth": (lambda theta, x: -(theta - x).pow(4).sum(1), "faster than linearly"),
    "mean times precision": (lambda theta, x: -(theta * x).square().sum(1), "faster than linearly"),
    "exponential growth": (lambda theta, x: -(theta.square() * x.exp()).sum(1), "not finite|faster"),
}


@pytest.mark.parametrize("name", FAILING)
def test_densities_that_break_it_fail_with_the_right_reason(name):
    density, reason = FAILING[name]
    found = a3(density)
    assert found.verdict == "fails"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)


def test_linear_growth_is_not_taken_for_more():
    for scale in (1e-3, 1.0, 1e3):
        assert a3(lambda theta, x, scale=scale: -scale * (theta - x).square().sum(1)).verdict == "plausible"


def test_a_constant_density_is_plausible():
    assert a3(lambda theta, x: torch.zeros(len(theta))).verdict == "plausible"


def test_without_a_density_there_is_nothing_to_say():
    found = assumptions(total, rows=100)[2]
    assert (found.verdict, found.reason) == ("doubtful", "there is no density to look at")


def test_the_same_seed_says_the_same():
    state = torch.get_rng_state()
    density = random_network(1, 1, kind="mdn", seed=0)
    assert assumptions(density=density, rows=500) == assumptions(density=density, rows=500)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_reads_as_a_sentence():
    assert str(Assumption("A2", "fails", "too heavy")) == "A2 fails: too heavy"
    assert all(np.isfinite(len(str(one))) and str(one).startswith(f"A{place}") for place, one in
               enumerate(assumptions(rows=100), 1))
