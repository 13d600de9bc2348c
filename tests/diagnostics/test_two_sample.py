import sys

import numpy as np
import pytest
from scipy import stats

from mlsbi.diagnostics import c2st, mmd


def normal(n, dim, shift=0.0, seed=0):
    draws = np.random.default_rng(seed).standard_normal((n, dim))
    draws[:, 0] += shift
    return draws


@pytest.mark.parametrize("shift", [0.0, 2.0, *(pytest.param(shift, marks=pytest.mark.slow) for shift in (1.0, 8.0))])
def test_c2st_is_the_best_accuracy_between_gaussians(shift):
    n = 1000
    exact = stats.norm.cdf(shift / 2)
    error = 4 * np.sqrt(max(exact * (1 - exact), 0.25 / n) / (2 * n))  # binomial
    found = c2st(normal(n, 2), normal(n, 2, shift, seed=1))
    assert exact - error - 0.02 < found < exact + error  # a fitted classifier is a little below the best


def test_c2st_finds_a_width_that_no_line_can():
    assert c2st(normal(1000, 2), 2 * normal(1000, 2, seed=1)) > 0.62


def test_c2st_does_not_depend_on_units():
    reference, samples, unit = normal(200, 2), normal(200, 2, 1.0, seed=1), np.array([1024.0, 2.0**-20])
    assert c2st(reference * unit, samples * unit) == c2st(reference, samples)


def test_c2st_is_reproducible_and_balances_sets():
    reference, samples = normal(100, 2), normal(3000, 2, seed=1)
    score = c2st(reference, samples, seed=1)
    assert score == c2st(reference, samples, seed=1)
    assert abs(score - 0.5) < 4 / np.sqrt(8 * 100)  # guessing the larger set would give 0.97
    assert abs(c2st(samples, reference, seed=1) - 0.5) < 4 / np.sqrt(8 * 100)


def test_c2st_takes_another_classifier():
    linear_model = pytest.importorskip("sklearn.linear_model")
    exact = stats.norm.cdf(1)
    found = c2st(normal(1000, 2), normal(1000, 2, 2.0, seed=1), classifier=linear_model.LogisticRegression())
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 2000))


def test_c2st_without_scikit_learn(monkeypatch):
    for name in ("sklearn", "sklearn.model_selection", "sklearn.neural_network"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install mlsbi\[metrics\]"):
        c2st(normal(100, 1), normal(100, 1))


def squared_mmd(m, s, bandwidth):
    """Closed form between N(0, I) and N(m, s^2 I)."""
    def kernel(variance, distance):
        wide = bandwidth**2 + variance
        return (bandwidth**2 / wide) ** (len(m) / 2) * np.exp(-distance / (2 * wide))

    return kernel(2.0, 0.0) + kernel(2 * s**2, 0.0) - 2 * kernel(1 + s**2, (m**2).sum())


@pytest.mark.parametrize(("shift", "width"), [(0.0, 1.0), (0.7, 1.0), (0.0, 1.6)])
def test_squared_mmd_is_unbiased(shift, width):
    rng = np.random.default_rng(0)
    cases = [(rng.standard_normal((40, 3)), shift + width * rng.standard_normal((60, 3))) for _ in range(400)]
    found = [mmd(x, y, bandwidth=1.5) for x, y in cases]
    exact = squared_mmd(np.full(3, shift), width, 1.5)
    error = 4 * np.std(found) / np.sqrt(len(cases))
    assert np.mean(found) == pytest.approx(exact, abs=error)
    biased = [mmd(x, y, bandwidth=1.5, squared=False) ** 2 for x, y in cases]
    assert np.mean(biased) > exact + 2 * error  # negative control


def test_mmd_is_symmetric_and_0_for_one_set():
    x, y = normal(30, 2), normal(50, 2, seed=1)
    assert mmd(x, y) == pytest.approx(mmd(y, x), abs=1e-14)
    assert mmd(x, x, squared=False) == pytest.approx(0, abs=1e-7)  # the root of rounding errors


def test_mmd_bandwidth_is_the_median_distance_of_pooled_draws():
    x, y = np.array([[0.0], [1.0]]), np.array([[3.0], [7.0]])  # distances 1, 4, 3, 7, 2, 6
    assert mmd(x, y) == mmd(x, y, bandwidth=3.5)
    assert mmd(8 * x, 8 * y) == pytest.approx(mmd(x, y), rel=1e-12)


def test_bad_inputs():
    good = normal(60, 2)
    for score in (c2st, mmd):
        with pytest.raises(ValueError, match=r"\(n, D\) and \(m, D\); got \(60, 2\) and \(60, 1\)"):
            score(good, good[:, :1])
        with pytest.raises(ValueError, match="finite samples"):
            score(good, good * np.inf)
        with pytest.raises(ValueError, match=r"reference of shape \(n, D\)"):
            score(good[:, 0], good)
    with pytest.raises(ValueError, match="at least 50 draws in each set; got 60 and 49"):
        c2st(good, good[:49])
    with pytest.raises(ValueError, match="at least 2 folds"):
        c2st(good, good, folds=1)
    with pytest.raises(ValueError, match="varies in every parameter"):
        c2st(good * [1.0, 0.0] + 0.1, good)
    with pytest.raises(ValueError, match="at least 2 draws"):
        mmd(good, good[:1])
    with pytest.raises(ValueError, match="positive bandwidth; got 0"):
        mmd(good, good, bandwidth=0)
    with pytest.raises(ValueError, match="median distance is 0"):
        mmd(0 * good, 0 * good)
