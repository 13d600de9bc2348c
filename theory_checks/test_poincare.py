import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory_checks import poincare
from theory_checks.poincare import Law, product

CLOSED = {
    "uniform": (poincare.uniform(-1.0, 2.0), 9 / math.pi**2, lambda rng, n: rng.uniform(-1, 2, n)),
    "normal": (poincare.normal(2.0), 4.0, lambda rng, n: rng.normal(0, 2, n)),
    "logistic": (poincare.logistic(0.5), 1.0, lambda rng, n: rng.logistic(0, 0.5, n)),
    "exponential": (poincare.exponential(2.0), 1.0, lambda rng, n: rng.exponential(0.5, n)),
    "laplace": (poincare.laplace(0.5), 1.0, lambda rng, n: rng.laplace(0, 0.5, n)),
    "gumbel": (poincare.gumbel(0.5), 1.0, lambda rng, n: rng.gumbel(0, 0.5, n)),
    "log_gamma": (poincare.log_gamma(5.0), 0.25, lambda rng, n: np.log(rng.gamma(5.0, size=n))),
    "logit_beta": (poincare.logit_beta(3.0, 3.0), 0.8, lambda rng, n: _logit(rng.beta(3, 3, n))),
}


def _logit(p):
    return np.log(p) - np.log1p(-p)


@pytest.mark.parametrize("name", CLOSED)
def test_constants_are_those_of_the_formulas(name):
    law, constant, _ = CLOSED[name]
    assert law.constant == pytest.approx(constant, rel=1e-12)
    assert law.log_concave
    assert law.source == "table"


@pytest.mark.parametrize("name", CLOSED)
def test_the_inequality_holds_on_draws_for_linear_sine_and_tanh_functions(name):
    law, _, draw = CLOSED[name]
    x = draw(np.random.default_rng(0), 100_000)
    scale = x.std()
    for f, slope in ((x, np.ones_like(x)), (np.sin(x / scale), np.cos(x / scale) / scale),
                     (np.tanh(3 * x / scale), 3 / scale / np.cosh(3 * x / scale) ** 2)):
        assert f.var() <= 1.02 * law.constant * (slope**2).mean()  # 100 000 draws: errors of about 0.5%


@pytest.mark.parametrize(("name", "extremal"), [("normal", lambda x: (x, np.ones_like(x))),
                                                ("uniform", lambda x: (np.cos(math.pi * (x + 1) / 3),
                                                                       -math.pi / 3 * np.sin(math.pi * (x + 1) / 3)))])
def test_nine_tenths_of_the_constant_fail_on_extremals(name, extremal):
    law, _, draw = CLOSED[name]
    f, slope = extremal(draw(np.random.default_rng(0), 100_000))
    assert f.var() > 0.9 * law.constant * (slope**2).mean()


def test_constants_scale_with_the_square_of_the_law():
    for make in (poincare.normal, poincare.logistic, poincare.laplace, poincare.gumbel):
        assert make(3.0).constant == pytest.approx(9 * make(1.0).constant)


def test_formulas_agree_where_their_laws_do():
    assert poincare.logit_beta(1.0, 1.0).constant == poincare.logistic().constant
    assert poincare.log_gamma(1.0, 2.0).constant == poincare.gumbel(2.0).constant
    for shape in (2.0, 2.0 + 1e-9):  # both branches meet
        assert poincare.log_gamma(shape).constant == pytest.approx(1.0, rel=1e-6)
    # gamma(b) dwarfs gamma(a) for large b: log of beta's odds becomes the log of a gamma variable.
    assert poincare.logit_beta(5.0, 1e6).constant == pytest.approx(poincare.log_gamma(5.0).constant, rel=1e-4)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5))
@settings(deadline=None, max_examples=20)
def test_the_product_of_normals_is_their_multivariate_law(scales):
    joint = product([poincare.normal(scale) for scale in scales])
    together = poincare.multivariate_normal(np.diag(np.square(scales)))
    assert joint.constant == pytest.approx(together.constant, rel=1e-12)
    assert joint.coordinates == together.coordinates == len(scales)


def test_a_product_names_the_part_without_a_constant():
    heavy = Law("cauchy", None, log_concave=False, reason="tails", source="none")
    joint = product([poincare.normal(), heavy, poincare.logistic()])
    assert joint.constant is None
    assert joint.source == "none"
    assert "cauchy" in joint.reason
    assert "tails" in joint.reason


def test_log_concavity_of_a_product():
    untold = Law("untold", 1.0, log_concave=None, reason="untold", source="sampled")
    broken = Law("mixture", 1.0, log_concave=False, reason="two modes", source="bracketed")
    assert product([poincare.normal(), poincare.logistic()]).log_concave is True
    assert product([poincare.normal(), untold]).log_concave is None
    assert product([untold, broken]).log_concave is False
    joint = product([poincare.logistic(), broken])
    assert joint.constant == 4.0
    assert "two modes" in joint.reason


def test_a_product_is_as_certain_as_its_least_certain_part():
    sampled = Law("untold", 1.0, log_concave=True, reason="draws", source="sampled")
    assert product([poincare.normal(), poincare.logistic()]).source == "table"
    assert product([poincare.logistic(), sampled]).source == "sampled"


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="low < high"):
        poincare.uniform(1.0, 1.0)
    with pytest.raises(ValueError, match="positive, finite"):
        poincare.normal(0.0)
    with pytest.raises(ValueError, match="at least one law"):
        product([])
    with pytest.raises(ValueError, match="symmetric"):
        poincare.multivariate_normal([[1.0, 0.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="smallest eigenvalue"):
        poincare.multivariate_normal([[1.0, 2.0], [2.0, 1.0]])
