import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsbi.allocation import moments
from mlsbi.allocation.moments import compact, corrections_of, measure


def inner_products(values):
    rows = values.reshape(-1, values.shape[-1])
    return rows @ rows.T


def split(values, widths):
    edges = np.cumsum([0, *widths])
    return [values[..., first:last] for first, last in zip(edges[:-1], edges[1:], strict=True)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 6), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 99))
def test_compact_keeps_all_inner_products(levels, n, widths, seed):
    values = normal(levels, n, sum(widths), seed=seed)
    found = compact(split(values, widths))
    assert found.shape[:2] == (levels, n)
    assert found.shape[2] <= max(levels * n, 1)
    expected = inner_products(corrections_of(values))
    assert np.allclose(inner_products(found), expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


def test_fewer_components_than_rows_stay_what_they_are():
    values = normal(2, 10, 20)
    assert np.array_equal(compact([values]), corrections_of(values))
    assert np.array_equal(compact(split(values, [7, 13])), corrections_of(values))


def test_corrections_that_are_zero_stay_exactly_zero():
    values = normal(3, 4, 90)
    values[1] = values[0]
    found = compact(split(values, [40, 1, 49]))
    assert (found[1] == 0).all()
    assert (np.abs(found[2]).sum(1) > 0).all()
    measured = measure([found], seed=0)
    assert measured.variances[1] == 0
    assert (measured.draws[:, 1] == 0).all()
    assert math.isnan(measured.kurtosis[1])


def test_tiny_corrections_keep_their_digits():
    values = normal(2, 20, 300)
    values[1] = values[0] + 1e-9 * normal(20, 300, seed=1)
    corrections, found = corrections_of(values), compact(split(values, [100, 100, 100]))
    sizes = np.linalg.norm(corrections, axis=2)
    assert sizes[1].max() < 1e-8 * sizes[0].min()
    assert np.allclose(np.linalg.norm(found, axis=2), sizes, rtol=1e-12, atol=0)
    spread = np.linalg.norm(corrections - corrections.mean(1, keepdims=True), axis=2)
    assert measure([found], seed=0).variances[1] == pytest.approx((spread[1] ** 2).sum() / 19, rel=1e-9)
    # Inner products of the levels themselves, which would be cheaper, have lost them.
    together = inner_products(values)
    lost = np.diag(together)[:20] + np.diag(together)[20:] - 2 * np.diag(together, 20)
    assert not np.allclose(lost, sizes[1] ** 2, rtol=0.1, atol=0)


def test_compact_needs_finite_blocks():
    with pytest.raises(ValueError, match="at least one block"):
        compact([])
    values = normal(2, 5, 3)
    values[1, 4, 0], values[0, 4, 1], values[0, 2, 2] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match="2 of 5 rows"):
        compact([normal(2, 5, 3), values])


def values_of(n=50, seed=0, levels=3):
    """Of one component, correlated over levels, means far from zero, `(levels, n, 1)`."""
    steps = normal(levels, n, 1, seed=seed) * np.array([2.0, 0.5, 0.1])[:levels, None, None]
    return 5 + np.cumsum(steps + 0.3, 0)


def test_moments_of_one_fold_are_numpys():
    values = values_of()
    f, y = values[..., 0], corrections_of(values)[..., 0]
    found = measure([compact([values])], seed=0)
    assert found.variances == pytest.approx(y.var(1, ddof=1), rel=1e-12)
    assert found.covariance == pytest.approx(np.cov(f), rel=1e-10)
    assert found.correlations == pytest.approx(np.diag(np.corrcoef(f), 1), rel=1e-10)
    assert found.means == pytest.approx(np.abs(y.mean(1)), rel=1e-12)
    fourth = ((y - y.mean(1, keepdims=True)) ** 4).mean(1)
    assert found.kurtosis == pytest.approx(fourth / y.var(1) ** 2, rel=1e-12)


def test_moments_of_two_folds_are_pooled_within_them():
    values = values_of(50)
    folds = [corrections_of(values[:, :20]), corrections_of(values[:, 20:])]
    found = measure(folds, seed=0)
    for at in range(3):
        own = [fold[at, :, 0].var(ddof=1) for fold in folds]
        assert found.variances[at] == pytest.approx((19 * own[0] + 29 * own[1]) / 48, rel=1e-12)
    covariances = [np.cov(values[:, part, 0]) for part in (slice(20), slice(20, None))]
    assert found.covariance == pytest.approx((19 * covariances[0] + 29 * covariances[1]) / 48, rel=1e-10)
    squares = [(fold[0, :, 0] - fold[0, :, 0].mean()) ** 2 for fold in folds]
    both = np.concatenate(squares)
    assert found.kurtosis[0] == pytest.approx((both**2).mean() / both.mean() ** 2, rel=1e-12)
    assert found.means[0] == pytest.approx(
        math.sqrt(0.4 * folds[0][0].mean() ** 2 + 0.6 * folds[1][0].mean() ** 2), rel=1e-12)


def test_an_offset_between_folds_is_no_variance():
    folds = [corrections_of(values_of(20, seed)) for seed in (0, 1)]
    plain, moved = measure(folds, seed=0), measure([folds[0], folds[1] + 100.0], seed=0)
    for name in ("variances", "covariance", "kurtosis", "draws"):
        assert getattr(moved, name) == pytest.approx(getattr(plain, name), rel=1e-8)
    joined = measure([np.concatenate([folds[0], folds[1] + 100.0], 1)], seed=0)
    assert joined.variances[0] > 100 * plain.variances[0]


def test_several_components_are_sums_over_them():
    parts = [values_of(30, seed) for seed in range(4)]
    together = measure([compact([np.concatenate(parts, 2)])], seed=3)
    apart = [measure([compact([part])], seed=3) for part in parts]
    for name in ("variances", "covariance"):
        assert getattr(together, name) == pytest.approx(sum(getattr(each, name) for each in apart), rel=1e-10)
    assert together.means == pytest.approx(np.sqrt(sum(each.means**2 for each in apart)), rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
def test_units_only_scale_moments(scale, shift):
    values = values_of(25)
    plain, scaled = (measure([compact([each])], seed=1) for each in (values, scale * (values + shift)))
    assert scaled.variances == pytest.approx(scale**2 * plain.variances, rel=1e-6)
    assert scaled.kurtosis == pytest.approx(plain.kurtosis, rel=1e-6)
    assert scaled.draws == pytest.approx(scale**2 * plain.draws, rel=1e-6, abs=1e-12 * scale**2)
    assert (scaled.kurtosis >= 1).all()


def test_kurtosis_of_known_laws():
    """Within four standard errors, sqrt(24 / n) for a normal law; of a rare event about one over its probability."""
    n, p = 20_000, 0.01
    values = np.stack([normal(n, 1), np.zeros((n, 1))])
    values[1] = values[0] + (np.random.default_rng(1).random((n, 1)) < p)
    found = measure([compact([values])], seed=0).kurtosis
    assert found[0] == pytest.approx(3, abs=4 * math.sqrt(24 / n))
    exact = (1 - 3 * p * (1 - p)) / (p * (1 - p))
    assert found[1] == pytest.approx(exact, rel=4 / math.sqrt(n * p))
    assert exact == pytest.approx(1 / p, rel=0.03)


@pytest.mark.parametrize("law", ["normal", "exponential"])
@pytest.mark.parametrize("folds", [1, 2])
def test_draws_spread_as_the_kurtosis_says(law, folds):
    """Centred on the variance, to four standard errors of 400 draws; as wide as sqrt((kurtosis - 1) / n)."""
    y = getattr(np.random.default_rng(0), law)(size=(1, 2000, 1))
    found = measure(np.split(y, folds, axis=1), seed=0)
    relative = found.draws[:, 0] / found.variances[0]
    spread = math.sqrt((found.kurtosis[0] - 1) / 2000)
    assert found.draws.shape == (400, 1)
    assert relative.mean() == pytest.approx(1, abs=4 * spread / 20)
    assert relative.std() == pytest.approx(spread, rel=4 / math.sqrt(2 * 400))


def test_draws_of_few_rows_are_unbiased():
    """Of folds of five rows, within four standard errors of their mean; without a correction they are a fifth low."""
    found = measure(np.split(normal(1, 40, 1), 8, axis=1), seed=0)
    relative = found.draws[:, 0] / found.variances[0]
    assert relative.mean() == pytest.approx(1, abs=4 * relative.std() / 20)
    assert 4 * relative.std() / 20 < 0.1


@pytest.mark.parametrize(("law", "rows", "nearly"), [("normal", 64, 0.90), ("exponential", 64, 0.86)])
def test_intervals_cover_the_variance(law, rows, nearly):
    """About nine times in ten, fewer where tails are heavy; 300 samples know that to 0.02."""

    def covered(copies):
        hits = 0
        for seed in range(300):
            y = np.tile(getattr(np.random.default_rng(seed), law)(size=(1, rows, 1)), (1, copies, 1))
            low, high = np.quantile(measure([y], seed=seed).draws[:, 0], [0.05, 0.95])
            hits += low <= 1 <= high
        return hits / 300

    assert abs(covered(1) - nearly) < 3 * 0.02
    assert covered(4) < 0.65  # the same rows four times over seem to tell more than they do


def test_one_row_that_decides_leaves_the_variance_open():
    """Of a correction that one row alone has, many samples have none: draws stay finite, and reach far."""
    values = values_of(40, levels=1).repeat(2, 0)
    values[1, 3] += 0.37
    found = measure([compact([values[:, :20]]), compact([values[:, 20:]])], seed=0)
    assert np.isfinite(found.draws).all()
    assert (found.draws >= 0).all()
    low, high = np.quantile(found.draws[:, 1], [0.05, 0.95])
    assert high > 10 * low


def test_what_never_varies_has_no_draws():
    values = values_of(20, levels=1).repeat(2, 0)
    found = measure([compact([values])], seed=0)
    assert (found.draws[:, 1] == 0).all()


def test_the_seed_and_nothing_else_decides_the_draws(monkeypatch):
    folds = [corrections_of(values_of(20, seed)) for seed in (0, 1)]
    first, other = measure(folds, seed=5), measure(folds, seed=6)
    assert np.array_equal(first.draws, measure(folds, seed=5).draws)
    assert not np.array_equal(first.draws, other.draws)
    assert np.array_equal(first.variances, other.variances)
    monkeypatch.setattr(moments, "_CHUNK_VALUES", 7 * 20)  # seven draws at a time
    assert measure(folds, seed=5).draws == pytest.approx(first.draws, rel=1e-12)


def test_levels_that_do_not_vary_have_no_correlation():
    values = np.stack([np.full((9, 1), 2.0), normal(9, 1), normal(9, 1, seed=1)])
    found = measure([compact([values])], seed=0)
    assert found.variances[0] == 0
    assert math.isnan(found.kurtosis[0])
    assert math.isnan(found.correlations[0])
    assert abs(found.correlations[1]) <= 1


def test_draws_of_the_covariance_are_those_of_resampled_rows():
    """Centred on it, to four standard errors; unbiased as numpy's; as far as rows vary together."""
    values = values_of(300)
    found = measure([compact([values])], seed=0)
    draws = found.covariance_draws
    assert draws.shape == (400, 3, 3)
    assert np.allclose(draws, draws.transpose(0, 2, 1))
    spread = draws.std(0)
    assert (np.abs(draws.mean(0) - found.covariance) < 4 * spread / 20).all()
    rng = np.random.default_rng(1)
    by_hand = np.array([np.cov(values[:, rng.integers(300, size=300), 0]) for _ in range(400)])
    assert np.allclose(spread, by_hand.std(0), rtol=0.2)
