import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory_checks.brackets import from_log_density
from theory_checks.recognise import alike, dependent_groups, group_law, recognise, sampled_law

ROWS = 20_000


def _rng(seed=0):
    return np.random.default_rng(seed)


def _sorted(draws):
    return np.sort(np.atleast_2d(draws), axis=1)


DRAWS = {
    "standard normal": lambda rng: rng.normal(size=ROWS),
    "uniform(0, 1)": lambda rng: rng.random(ROWS),
    "uniform(-1, 3)": lambda rng: rng.uniform(-1, 3, ROWS),
    "uniform(0.25, 0.75)": lambda rng: rng.uniform(0.25, 0.75, ROWS),
    "logistic(0, 1)": lambda rng: rng.logistic(size=ROWS),
    "exponential(1)": lambda rng: rng.exponential(size=ROWS),
    "laplace(1)": lambda rng: rng.laplace(size=ROWS),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("seed", range(3))
def test_usual_laws_are_recognised_with_exact_parameters(name, seed):
    (fit,) = recognise(_sorted(DRAWS[name](_rng(seed))))
    assert fit is not None
    assert fit.law.name == name
    assert fit.law.source == "table"
    assert fit.distance < 0.015


@given(st.floats(0.05, 20.0), st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_scales_are_estimated_where_they_are_not_one(scale, seed):
    rng = _rng(seed)
    draws = np.stack([scale * rng.normal(size=ROWS) + 3, scale * rng.exponential(size=ROWS)])
    normal, exponential = recognise(_sorted(draws))
    assert (normal.family, exponential.family) == ("normal", "exponential")
    for fit, constant in ((normal, scale**2), (exponential, 4 * scale**2)):
        assert fit.law.constant == pytest.approx(constant, rel=0.1)  # five standard errors of a variance
        assert fit.law.source == ("table" if fit.law.name in ("standard normal", "exponential(1)") else "sampled")


@pytest.mark.parametrize("draw", [
    lambda rng: rng.standard_t(3, ROWS),
    lambda rng: rng.standard_cauchy(ROWS),
    lambda rng: rng.normal(size=ROWS) + 3 * (rng.random(ROWS) > 0.5),
    lambda rng: rng.beta(2, 2, ROWS),
    lambda rng: rng.gumbel(size=ROWS),
    lambda rng: rng.gamma(5, size=ROWS),
])
def test_other_laws_are_not_recognised(draw):
    assert recognise(_sorted(draw(_rng()))) == [None]


def test_recognition_holds_over_many_columns():
    rng = _rng()
    draws = np.concatenate([rng.normal(size=(100, 4000)), rng.random((100, 4000))])
    families = [None if fit is None else fit.family for fit in recognise(_sorted(draws))]
    assert families == ["normal"] * 100 + ["uniform"] * 100


def test_independent_columns_stay_apart():
    assert dependent_groups(_rng().normal(size=(60, ROWS))) == [(index,) for index in range(60)]


def test_dependence_of_ranks_and_of_squares_joins_columns():
    rng = _rng()
    a, b, c, d = rng.normal(size=(4, ROWS))
    sign = rng.choice([-1.0, 1.0], ROWS)
    draws = np.stack([a, b, a**2, c, 0.2 * b + d, sign * c, rng.random(ROWS)])
    assert dependent_groups(draws) == [(0, 2), (1, 4), (3, 5), (6,)]


def test_dependence_is_passed_on_along_chains():
    steps = _rng().normal(size=(6, ROWS))
    walk = np.stack([steps[i : i + 2].sum(0) for i in range(5)])
    assert dependent_groups(walk) == [(0, 1, 2, 3, 4)]


def test_jointly_normal_columns_get_the_largest_eigenvalue():
    covariance = 0.8 ** np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    draws = np.linalg.cholesky(covariance) @ _rng().normal(size=(5, ROWS))
    law = group_law(draws, recognise(_sorted(draws)), rng=_rng(1))
    assert law.constant == pytest.approx(np.linalg.eigvalsh(covariance)[-1], rel=0.06)
    assert law.source == "sampled"
    assert law.coordinates == 5


def test_normal_columns_that_are_not_jointly_normal_get_none():
    rng = _rng()
    u = rng.normal(size=ROWS)
    draws = np.stack([u, u * rng.choice([-1.0, 1.0], ROWS)])
    fits = recognise(_sorted(draws))
    assert all(fit.family == "normal" for fit in fits)
    law = group_law(draws, fits, rng=_rng(1))
    assert law.constant is None
    assert "not jointly normal" in law.reason


def test_columns_of_one_law_are_alike_and_others_are_not():
    rng = _rng()
    draws = np.concatenate([rng.gamma(5, size=(10, ROWS)), rng.gamma(6, size=(1, ROWS))])
    assert alike(_sorted(draws)).tolist() == [True] * 10 + [False]


@pytest.mark.parametrize(("draw", "constant"), [
    (lambda rng: rng.random(ROWS) + rng.random(ROWS), 1 / 2.404825557695773**2),
    (lambda rng: rng.gumbel(size=ROWS), 4.0),
    (lambda rng: rng.gamma(5, size=ROWS), 7.2),
    (lambda rng: rng.normal(size=ROWS), 1.0),
])
@pytest.mark.parametrize("seed", range(3))
def test_log_concave_samples_get_about_the_right_constant(draw, constant, seed):
    law = sampled_law(np.sort(draw(_rng(seed))), name="sample")
    assert 0.8 * constant < law.constant < 2.0 * constant  # 200 draws beyond the 1% point: 4 mean^2 to some 20%
    assert law.log_concave is True
    assert "no bound" in law.reason


@pytest.mark.parametrize("seed", range(3))
def test_two_modes_break_a1_and_keep_a_constant(seed):
    rng = _rng(seed)
    law = sampled_law(np.sort(rng.normal(size=ROWS) + 4 * (rng.random(ROWS) > 0.5)), name="mixture")
    exact = from_log_density(lambda x: np.logaddexp(-((x - 2) ** 2) / 2, -((x + 2) ** 2) / 2), name="mixture")
    assert law.constant == pytest.approx(exact.constant, rel=0.15)
    assert law.log_concave is False
    assert "refute log-concavity" in law.reason


def test_an_empty_valley_gives_no_constant():
    rng = _rng()
    law = sampled_law(np.sort(rng.normal(size=ROWS) + 20 * (rng.random(ROWS) > 0.5)), name="mixture")
    assert law.constant is None
    assert "amid the bulk" in law.reason


@pytest.mark.parametrize("draw", [
    lambda rng: rng.standard_t(3, ROWS), lambda rng: rng.standard_cauchy(ROWS),
    lambda rng: np.exp(1.5 * rng.normal(size=ROWS)), lambda rng: -rng.pareto(2, ROWS),
])
def test_heavy_tails_get_no_constant(draw):
    law = sampled_law(np.sort(draw(_rng())), name="sample")
    assert law.constant is None
    assert law.log_concave is False
    assert "tail heavier than exponential" in law.reason
