import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory_checks import poincare
from theory_checks.brackets import from_log_density


def _softplus(x):
    return np.logaddexp(0.0, x)


def _mixture(distance):
    return lambda x: np.logaddexp(-((x - distance / 2) ** 2) / 2, -((x + distance / 2) ** 2) / 2)


def _bracket(law):
    return tuple(map(float, re.search(r"bracket (\S+) <= K_P <= ([^\s,)]+)", law.reason).groups()))


KNOWN = {
    "uniform": (lambda x: 0 * x, 2.0, 5.0, poincare.uniform(2.0, 5.0).constant),
    "normal": (lambda x: -((x - 5) ** 2) / 2e-6, -math.inf, math.inf, 1e-6),
    "logistic": (lambda x: -x - 2 * _softplus(-x), -math.inf, math.inf, 4.0),
    "exponential": (lambda x: -2 * x, 0.0, math.inf, 1.0),
    "exponential, its edge unsaid": (lambda x: np.where(x > 1, -2 * x, -np.inf), -math.inf, math.inf, 1.0),
    "laplace": (lambda x: -np.abs(x - 3) / 2, -math.inf, math.inf, 16.0),
    "gumbel": (lambda x: -x - np.exp(-x), -math.inf, math.inf, 4.0),
    "log gamma 0.3": (lambda x: 0.3 * x - np.exp(x), -math.inf, math.inf, poincare.log_gamma(0.3).constant),
    "log gamma 1.5": (lambda x: 1.5 * x - np.exp(x), -math.inf, math.inf, poincare.log_gamma(1.5).constant),
    "log gamma 5": (lambda x: 5 * x - np.exp(x), -math.inf, math.inf, 0.25),
    "logit beta 2, 9": (lambda x: 2 * x - 11 * _softplus(x), -math.inf, math.inf, poincare.logit_beta(2, 9).constant),
    "logit beta 1, 3": (lambda x: x - 4 * _softplus(x), -math.inf, math.inf, 4.0),
    # Bessel's equation: the first zero of J_0 is 2.4048.
    "triangular": (lambda x: np.log1p(-np.abs(x)), -1.0, 1.0, 1 / 2.404825557695773**2),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_bracket_holds_the_known_constant(name):
    log_density, low, high, constant = KNOWN[name]
    law = from_log_density(log_density, low, high, name=name)
    lower, upper = _bracket(law)
    assert law.source == "bracketed"
    assert law.log_concave, law.reason
    assert (1 - 1e-6) * constant <= law.constant <= 1.001 * constant  # 1e-6: quadrature
    assert 0.99 * constant <= lower <= (1 + 1e-4) * constant  # printed to five digits
    assert upper == pytest.approx(law.constant, rel=1e-4)


@given(st.floats(0.2, 20.0), st.floats(0.2, 20.0))
@settings(deadline=None, max_examples=8)
def test_the_logit_of_a_beta_variable_has_rosen_and_morses_gap(a, b):
    law = from_log_density(lambda x: a * x - (a + b) * _softplus(x), name="logit beta")
    assert law.constant == pytest.approx(poincare.logit_beta(a, b).constant, rel=2e-3)


@pytest.mark.parametrize("distance", [8.0, 12.0, 20.0])
def test_two_separated_normals_grow_as_laplaces_method_says(distance):
    law = from_log_density(_mixture(distance), name="mixture")
    # A step function between the modes: K_P -> (1/4) int 1/p, a Gaussian over a hyperbolic cosine at the saddle.
    steps = np.linspace(-5, 5, 20001)
    saddle = (np.exp(steps**2 / 2) / np.cosh(distance * steps / 2)).sum() * (steps[1] - steps[0])
    expected = math.sqrt(2 * math.pi) / 4 * math.exp(distance**2 / 8) * saddle
    assert law.constant == pytest.approx(expected, rel=0.1)
    assert law.log_concave is False
    assert "A1 fails as stated, though the inequality holds" in law.reason


def test_two_near_normals_are_log_concave():
    assert from_log_density(_mixture(1.9), name="mixture").log_concave is True
    assert from_log_density(_mixture(2.1), name="mixture").log_concave is False


@pytest.mark.parametrize(("log_density", "low"), [
    (lambda x: -2 * np.log1p(x**2 / 3), -math.inf),  # Student t(3)
    (lambda x: -np.log1p(x**2), -math.inf),  # Cauchy
    (lambda x: -15.5 * np.log1p(x**2 / 30), -math.inf),  # Student t(30)
    (lambda x: -np.log(x) - np.log(x) ** 2 / 2, 0.0),  # log-normal
    (lambda x: -np.abs(x) ** 0.8, -math.inf),
])
def test_heavy_tails_are_refused(log_density, low):
    law = from_log_density(log_density, low, name="heavy")
    assert law.constant is None
    assert law.log_concave is False
    assert law.source == "none"
    assert "tails heavier than exponential: no Poincaré inequality" in law.reason


def test_tails_just_lighter_than_exponential_are_not_refused():
    assert from_log_density(lambda x: -np.abs(x) ** 1.2, name="light").constant > 0


def test_separated_supports_have_no_constant():
    boxes = from_log_density(lambda x: np.where((np.abs(x) > 1) & (np.abs(x) < 2), 0.0, -np.inf), name="boxes")
    far = from_log_density(_mixture(100.0), name="mixture")
    for law in (boxes, far):
        assert law.constant is None
        assert "between two parts of the support" in law.reason


def test_a_far_narrow_peak_is_seen_once_a_point_of_it_is_named():
    def log_density(x):
        return np.logaddexp(-(x**2) / 2, -((x - 20.03) ** 2) / 2e-4)

    assert from_log_density(log_density, name="two peaks", points=[20.03]).constant > 1e10


def test_convex_densities_on_an_interval_have_a_constant_yet_break_a1():
    law = from_log_density(lambda x: -0.5 * np.log(x) - 0.5 * np.log1p(-x), 0.0, 1.0, name="arcsine")
    assert law.log_concave is False
    # The variance of f = x from below; x = sin(t)^2 of a uniform t in (0, pi/2), a contraction, from above.
    assert 0.125 < law.constant < 0.25


def test_gamma_in_its_own_coordinate():
    law = from_log_density(lambda x: -0.5 * np.log(x) - x, 0.0, name="gamma")
    assert law.log_concave is False
    assert law.constant == pytest.approx(4.0, rel=5e-3)  # its tail of rate 1


def test_singular_densities_are_not_integrated_in_silence():
    law = from_log_density(lambda x: -0.95 * np.log(x) - 0.95 * np.log1p(-x), 0.0, 1.0, name="spiky")
    assert law.constant is None
    assert "too singular" in law.reason


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="low < high"):
        from_log_density(lambda x: 0 * x, 1.0, 1.0, name="empty")
    with pytest.raises(ValueError, match="finite at none"):
        from_log_density(lambda x: np.full(len(x), -np.inf), name="nothing")
