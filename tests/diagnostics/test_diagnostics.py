import numpy as np
import pytest
from scipy import stats

from mlsbi.diagnostics import coverage, hpd_levels, kld, nlpd, sbc_ranks, uniformity

B, N = 300, 200


def gaussian_case(width=1.0, shift=0.0, seed=0):
    """Exact posterior N(x / 2, 1 / 2) of theta ~ N(0, 1), x ~ N(theta, 1), made wider or shifted."""
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal(B)
    x = theta + rng.standard_normal(B)
    stated = stats.norm(x / 2 + shift, width * np.sqrt(0.5))
    samples = stated.rvs((N, B), random_state=rng)
    return theta, samples, stated.logpdf(theta), stated.logpdf(samples)


def p_values(**case):
    theta, samples, log_true, log_samples = gaussian_case(**case)
    ranks = sbc_ranks(theta[:, None], samples[..., None])[:, 0]
    return uniformity(hpd_levels(log_true, log_samples)), uniformity((ranks + 0.5) / (N + 1))


def test_an_exact_posterior_is_calibrated():
    hpd, sbc = p_values()
    assert hpd > 0.01
    assert sbc > 0.01


@pytest.mark.parametrize("case", [{"width": 0.6}, {"width": 1.6}])
def test_wrong_widths_are_found(case):
    assert p_values(**case)[0] < 0.01


def test_a_shift_is_found_by_ranks():
    assert p_values(shift=0.5)[1] < 0.01


def test_coverage_of_an_exact_and_an_overconfident_posterior():
    _, _, log_true, log_samples = gaussian_case()
    credibility = np.array([0.5, 0.9])
    error = 3 * np.sqrt(credibility * (1 - credibility) / B)  # three binomial standard errors
    assert (np.abs(coverage(hpd_levels(log_true, log_samples), credibility) - credibility) < error).all()
    _, _, log_true, log_samples = gaussian_case(width=0.5)
    assert (coverage(hpd_levels(log_true, log_samples), credibility) < credibility - error).all()


def test_false_alarms_are_as_rare_as_stated():
    alarms = [p_values(seed=seed)[0] < 0.05 for seed in range(100)]
    assert np.mean(alarms) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)


def test_nlpd_summary():
    score = nlpd([-1.0, -2.0, -6.0])
    assert (score.mean, score.median, score.n) == (3.0, 2.0, 3)
    assert score.standard_error == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    assert nlpd([-1.0, -np.inf]).mean == np.inf
    with pytest.raises(ValueError, match="without NaN"):
        nlpd([np.nan])


def test_kld_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    p, q = stats.norm(0, 1), stats.norm(0.5, 2)
    draws = p.rvs((4000, 5), random_state=rng)
    found = kld(p.logpdf(draws), q.logpdf(draws))
    exact = np.log(2) + (1 + 0.25) / 8 - 0.5
    assert found.mean == pytest.approx(exact, abs=4 * found.standard_error)
    assert kld(p.logpdf(draws), p.logpdf(draws)).mean == 0.0
    with pytest.raises(ValueError, match="one shape"):
        kld(draws, draws[:2])


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"\(B,\) and \(n, B\)"):
        hpd_levels(np.zeros(3), np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"\(B, D\) and \(n, B, D\)"):
        sbc_ranks(np.zeros(3), np.zeros((5, 3)))
