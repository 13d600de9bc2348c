import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsbi.allocation.checking import (
    consistency,
    convergence_rates,
    noise_correlation,
    rows_needed,
    shuffled_correlation,
    shuffled_correlations,
)
from mlsbi.allocation.moments import corrections_of


def pairs(n=60, k=1, seed=0, law="standard_normal"):
    """Fine and coarse of pairs, and the coarse level alone."""
    rng = np.random.default_rng(seed)
    coarse, step, alone = getattr(rng, law)(size=(3, n, k))
    return coarse + 0.1 * step, coarse, alone


def test_consistency_is_giles_formula():
    fine, coarse, alone = pairs(60)
    alone = alone[:40] + 0.5
    y = fine - coarse
    distance = abs(y.mean() + alone.mean() - fine.mean())
    spread = 3 * (y.std(ddof=1) + alone.std(ddof=1) + fine.std(ddof=1))
    assert consistency(fine, coarse, alone) == pytest.approx(distance * math.sqrt(40) / spread, rel=1e-12)


def test_consistency_of_several_components_is_the_largest():
    fine, coarse, alone = pairs(60, 3)
    each = [consistency(fine[:, [at]], coarse[:, [at]], alone[:, [at]]) for at in range(3)]
    assert consistency(fine, coarse, alone) == pytest.approx(max(each), rel=1e-12)


@pytest.mark.parametrize("law", ["standard_normal", "standard_exponential"])
@pytest.mark.parametrize("n", [8, 64])
def test_right_laws_hardly_ever_seem_wrong(law, n):
    """Less than once in a thousand times: the ratio is one where a mean is four of its standard errors off."""
    ratios = np.array([consistency(*pairs(n, seed=seed, law=law)) for seed in range(2000)])
    assert (ratios > 1).sum() <= 2
    assert (ratios > 0.3).mean() > 0.05  # these are not zeros


@pytest.mark.parametrize("shift", [-1.5, 1.5])
def test_a_shifted_law_is_found(shift):
    found = [consistency(fine, coarse, alone + shift) > 1 for fine, coarse, alone in
             (pairs(64, seed=seed) for seed in range(100))]
    assert all(found)


def test_consistency_of_numbers_that_do_not_vary():
    same = np.full((50, 1), 0.25)
    assert consistency(same, same, same) == 0
    assert consistency(same, same, same + 1) == math.inf
    assert consistency(0 * same, 0 * same, 0 * same) == 0


@settings(deadline=None, max_examples=50)
@given(st.floats(-1e6, 1e6), st.integers(8, 120), st.integers(8, 120))
def test_rounding_is_no_other_law(value, n, m):
    """Means over different numbers of rows of one constant differ in the last digit, and so does their spread."""
    fine, coarse, alone = pairs(120, 2)
    fine, coarse, alone = fine[:n], coarse[:n], alone[:m]
    for part in (fine, coarse, alone):
        part[:, 0] = value
    assert consistency(fine, coarse, alone) == pytest.approx(consistency(*(p[:, 1:] for p in (fine, coarse, alone))))


@pytest.mark.parametrize("coupled", [True, False])
def test_shuffles_say_what_chance_gives(coupled):
    """For one component, 1.64 standard deviations of a correlation of n independent rows, 1 / sqrt(n - 1)."""
    found = []
    for seed in range(40):
        fine, coarse, alone = pairs(100, seed=seed)
        found.append(shuffled_correlation(fine, coarse if coupled else alone, seed=seed))
    assert np.mean(found) == pytest.approx(1.645 / math.sqrt(99), rel=0.05)


def test_shuffles_follow_a_seed_and_need_variation():
    fine, coarse, _ = pairs(30)
    assert shuffled_correlation(fine, coarse, seed=1) == shuffled_correlation(fine, coarse, seed=1)
    assert shuffled_correlation(fine, coarse, seed=1) != shuffled_correlation(fine, coarse, seed=2)
    for constant in (0.25, 0.1, 0.0):
        assert math.isnan(shuffled_correlation(fine, np.full_like(coarse, constant), seed=1))


def outputs(n, seed, *, shared, bend=0.0):
    """Theta and outputs of two levels that both follow theta closely, and share noise or not."""
    rng = np.random.default_rng(seed)
    theta = rng.uniform(-1, 1, size=(n, 2))
    u, other = 0.3 * rng.normal(size=(2, n, 3))
    mean = theta[:, [0, 1, 0]] + bend * theta[:, [1, 0, 0]] ** 2
    return theta, mean + u, 1.1 * mean + (0.9 * u if shared else other)


def found_share(make, repetitions=80):
    """How often shared noise is missed."""
    found = [noise_correlation(*make(seed), seed=seed) for seed in range(repetitions)]
    return np.mean([correlation <= control for correlation, control in found])


@pytest.mark.parametrize("bend", [0.0, 2.0])
@pytest.mark.parametrize("n", [32, 200])
def test_noise_that_levels_share_is_seen(bend, n):
    assert found_share(lambda seed: outputs(n, seed, shared=True, bend=bend)) == 0


@pytest.mark.parametrize("bend", [0.0, 2.0])
@pytest.mark.parametrize("n", [32, 200])
def test_noise_that_levels_do_not_share_is_reported(bend, n):
    """19 times in 20, of 80 within three standard errors, although theta makes the outputs themselves agree."""
    assert found_share(lambda seed: outputs(n, seed, shared=False, bend=bend)) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 80)
    theta, fine, coarse = outputs(n, 0, shared=False, bend=bend)
    assert np.corrcoef(fine[:, 0], coarse[:, 0])[0, 1] > 0.6
    assert shuffled_correlation(fine, coarse, seed=0) < 0.4
    assert abs(noise_correlation(theta, fine, coarse, seed=0)[0]) < 0.4


def test_pairs_of_shuffled_rows_are_reported():
    def shuffled(seed):
        theta, fine, coarse = outputs(100, seed, shared=True)
        return theta, fine, np.random.default_rng(seed + 1).permutation(coarse)

    assert found_share(shuffled) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 80)


def test_what_only_theta_explains_is_taken_out_where_rows_suffice():
    """Eight rows of two parameters are too few: only means are taken out, and theta stays."""
    few, many = (noise_correlation(*outputs(n, 1, shared=False), seed=0)[0] for n in (8, 400))
    assert few > 0.5
    assert abs(many) < 0.15


@pytest.mark.parametrize("level", [0, 1])
def test_levels_without_noise_have_nothing_to_share(level):
    theta, *levels = outputs(60, 0, shared=True)
    levels[level] = np.concatenate([theta + 1, theta[:, :1] ** 2], 1)
    assert all(math.isnan(found) for found in noise_correlation(theta, *levels, seed=0))
    for constant in (7.0, 0.1, 0.0):
        levels[level] = np.full((60, 3), constant)
        assert all(math.isnan(found) for found in noise_correlation(theta, *levels, seed=0))


@settings(deadline=None, max_examples=30)
@given(st.floats(0.2, 4), st.floats(0.2, 4), st.floats(0.1, 4), st.integers(3, 7))
def test_rates_of_geometric_levels(alpha, beta, gamma, levels):
    l = np.arange(levels)  # noqa: E741
    sign = (-1.0) ** l
    found = convergence_rates(3 * sign * 2 ** (-alpha * l), 5 * 2 ** (-beta * l), 7 * 2 ** (gamma * l))
    assert found == pytest.approx({"alpha": alpha, "beta": beta, "gamma": gamma}, abs=1e-10)


def test_rates_need_three_levels_and_corrections_that_do_not_vanish():
    assert convergence_rates(np.ones(2), np.ones(2), [1.0, 2.0]) is None
    found = convergence_rates(np.array([1.0, 0.5, 0.25]), np.array([1.0, 0.0, 0.5]), [1.0, 2.0, 4.0])
    assert found["alpha"] == 1
    assert math.isnan(found["beta"])
    assert math.isnan(convergence_rates(np.array([1.0, 0.5, 0.0]), np.ones(3), [1.0, 2.0, 4.0])["alpha"])


@settings(deadline=None, max_examples=50)
@given(st.floats(1.5, 500), st.floats(0.01, 1))
def test_rows_needed_are_just_enough(kurtosis, error):
    n = rows_needed(kurtosis, error)
    assert math.sqrt((kurtosis - 1) / n) <= error * (1 + 1e-9)
    assert n == 1 or math.sqrt((kurtosis - 1) / (n - 1)) > error * (1 - 1e-9)


def test_corrections_in_folds_are_shuffled_as_values_are():
    """One fold gives what the values give, its own mean moves nothing; many components have a lower chance level."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 40, 5))
    corrections = corrections_of(values)
    found = shuffled_correlations([corrections], seed=1)
    for level in (1, 2):
        assert found[level - 1] == pytest.approx(shuffled_correlation(values[level], values[level - 1], seed=1))
    halves = [corrections[:, :20], corrections[:, 20:]]
    moved = [halves[0], halves[1] + 3.0]
    assert shuffled_correlations(moved, seed=1) == pytest.approx(shuffled_correlations(halves, seed=1))
    wide = corrections_of(rng.normal(size=(2, 40, 2000)))
    assert shuffled_correlations([wide], seed=1)[0] < 0.3 * found.max()
