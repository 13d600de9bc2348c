"""Means with errors, tail indices, and which laws look as if they had no moment."""

import math

import pytest
import torch

from theory_checks.samples import FEWEST_FOR_TAILS, hill, looks_infinite, mean_and_error

ROWS = 20_000


def uniform(n, seed):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pareto(index):
    return lambda n, seed: uniform(n, seed) ** (-1 / index)


def log_normal(scale):
    return lambda n, seed: (scale * normal(n, seed)).exp()


def student_2(n, seed):
    u = uniform(n, seed)
    return ((2 * u - 1) / (2 * u * (1 - u)).sqrt()).abs()


POWER_LAWS = {  # index 2 at most, so that three standard errors of 50 values stay below 4
    "pareto of index 0.5": pareto(0.5),
    "pareto of index 1": pareto(1.0),
    "pareto of index 2": pareto(2.0),
    "ratio of uniforms": lambda n, seed: uniform(n, seed) / uniform(n, seed + 10_000),
    "cauchy": lambda n, seed: (math.pi * (uniform(n, seed) - 0.5)).tan().abs(),
    "student with 2 degrees of freedom": student_2,
}
LIGHT = {
    "equal": lambda n, seed: torch.ones(n, dtype=torch.float64),
    "zero": lambda n, seed: torch.zeros(n, dtype=torch.float64),
    "uniform": uniform,
    "normal": lambda n, seed: normal(n, seed).abs(),
    "cube of a normal": lambda n, seed: normal(n, seed).abs() ** 3,
    "exponential": lambda n, seed: -uniform(n, seed).log(),
    "square of an exponential": lambda n, seed: uniform(n, seed).log() ** 2,
    "pareto of index 6": pareto(6.0),
    "log-normal of scale 0.5": log_normal(0.5),
}
LOG_NORMAL = {f"scale {scale:g}": log_normal(scale) for scale in (1.0, 1.5, 2.0, 3.0)}


def times(draw, *, rows=ROWS, moment=4.0, repetitions=50):
    """In how many of so many samples the moment looks infinite."""
    return sum(looks_infinite(draw(rows, seed), moment) for seed in range(repetitions))


@pytest.mark.parametrize("law", POWER_LAWS)
def test_power_laws_look_infinite(law):
    assert times(POWER_LAWS[law]) >= 45


@pytest.mark.parametrize("law", LIGHT)
def test_light_tails_never_do(law):
    assert times(LIGHT[law]) == 0


@pytest.mark.parametrize("law", LOG_NORMAL)
def test_log_normal_values_rarely_do(law):
    """Their index at any level is small, and their shape is told from a power law's by a thousand values."""
    assert times(LOG_NORMAL[law], repetitions=200) <= 20
    assert hill(LOG_NORMAL[law](ROWS, 0))[0] < 4


@pytest.mark.parametrize("law", [*POWER_LAWS, *LIGHT, *LOG_NORMAL])
def test_few_values_tell_nothing(law):
    draw = {**POWER_LAWS, **LIGHT, **LOG_NORMAL}[law]
    assert times(draw, rows=FEWEST_FOR_TAILS - 1, moment=100.0, repetitions=20) == 0
    assert times(draw, rows=20, moment=100.0, repetitions=20) == 0


def test_from_that_many_on_a_power_law_is_seen():
    """In most samples: the shape of a hundred values is told to a tenth."""
    assert FEWEST_FOR_TAILS == 2000
    assert times(pareto(0.5), rows=FEWEST_FOR_TAILS) >= 30


def test_moments_well_below_the_index_look_finite():
    """Pareto values of index 2 have moments below 2; at 2 itself a rule of three standard errors does not fire."""
    assert times(pareto(2.0), moment=4.0) >= 45
    assert times(pareto(2.0), moment=1.0) == 0
    assert times(pareto(2.0), moment=2.0) <= 1


def test_one_outlier_is_no_tail():
    values = normal(ROWS, 0).abs()
    values[7] = 1e12
    assert not looks_infinite(values, 4)


@pytest.mark.parametrize("index", [0.7, 2.0, 10.0])
@pytest.mark.parametrize("share", [0.0025, 0.01, 0.5])
def test_hill_of_pareto_values(index, share):
    """Every level of a Pareto law has its index, so that errors are those of exponential excesses."""
    z = []
    for seed in range(100):
        found, error = hill(pareto(index)(ROWS, seed), share)
        assert error == pytest.approx(found / math.sqrt(share * ROWS))
        z.append((found - index) / error)
    z = torch.tensor(z)
    assert abs(float(z.mean())) < 0.4  # the bias of 1 / mean is 1 / sqrt(50) of an error, chance alone 0.1
    assert 0.8 < float(z.std()) < 1.2


def test_hill_by_hand():
    """Ten values above 1, each e times it but one e^11: a mean excess of 2."""
    values = torch.tensor([1.0] * 90 + [math.e] * 9 + [math.e**11], dtype=torch.float64)
    index, error = hill(values)
    assert index == pytest.approx(0.5)
    assert error == pytest.approx(0.5 / math.sqrt(10))


def test_hill_reads_neither_order_nor_units():
    values = pareto(3.0)(3000, 0)
    assert hill(values[torch.randperm(3000, generator=torch.Generator().manual_seed(1))]) == hill(values)
    assert hill(1e-9 * values) == pytest.approx(hill(values))


@pytest.mark.parametrize("values", [[2.0] * 5000, [0.0] * 5000, [0.0] * 4999 + [3.0], [1.0, 1.0], [1.0]])
def test_what_has_no_tail_has_index_infinity(values):
    assert hill(torch.tensor(values, dtype=torch.float64)) == (math.inf, 0.0)


def test_mean_and_error_by_hand():
    mean, error = mean_and_error(torch.tensor([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]], dtype=torch.float64))
    assert mean.tolist() == [4.0, 5.0]
    assert error.tolist() == pytest.approx([math.sqrt((9 + 1 + 16) / 2 / 3), 0.0])


def test_the_error_is_that_of_repetitions():
    z = torch.tensor([float(mean / error) for mean, error in
                      (mean_and_error(normal(100, seed)[:, None]) for seed in range(400))])
    assert abs(float(z.mean())) < 4 / 400**0.5
    assert abs(float(z.std()) - 1) < 4 / 800**0.5 + 0.01  # and a hundredth for Student's tails
