"""What sections say."""

from dataclasses import replace

import pytest

from theory_checks.assumptions import Assumption
from theory_checks.bounds import Check
from theory_checks.poincare import Law
from theory_checks.scaling import Slope
from theory_checks.sections import Section, relative_error
from theory_checks.wording import sentences, table

SMOOTH, ROUGH = Assumption("A3", "holds", "so"), Assumption("A3", "fails", "so")
HELD = Check("P", 0, "a", "loss", 10, 2.0, 0.1, 1.0, 0.1, "holds")
REFUSED = replace(HELD, verdict="not applicable", reason="no constant", value=float("nan"), value_error=float("nan"))
BROKEN = replace(HELD, estimate=4.0, verdict="violated", reason="by 9.0 standard errors")
TABLE = Law("standard normal", 1.0, log_concave=True, reason="so", source="table")


def slope(level, value, expected=2.0, error=0.01, reason=""):
    return Slope(level, expected, value, error, (1.0, 0.5, 0.25), (16.0, 4.0, 1.0), 3, reason)


def told(**fields):
    return " ".join(sentences(Section(**{"density": "d", "assumption": SMOOTH, "checks": (HELD,), "rows": 64,
                                         "laws": (TABLE, TABLE), **fields})))


def test_bounds_hold_only_where_none_is_violated():
    assert "Every bound that applies holds." in told()
    assert "Every bound" not in told(checks=(REFUSED,))
    for fields in ({"checks": (HELD, BROKEN)}, {"gradients": (BROKEN,)}, {"broken": (BROKEN,)}):
        text = told(**fields)
        assert "Every bound" not in text
        assert "VIOLATED at 'a'" in text
        assert text.count("by 9.0 standard errors") == 1
        assert "too steep for these rows to see" in text


@pytest.mark.parametrize(("source", "words"), [
    ("given", "The declared constant of the noise may be too small."),
    ("sampled", "The constant of the noise is an estimate"), ("table", None), ("bracketed", None),
])  # fmt: skip
def test_a_constant_that_is_not_proven_is_the_first_suspect(source, words):
    text = told(checks=(BROKEN,), laws=(TABLE, replace(TABLE, source=source)))
    assert "of theta" not in text
    if words is None:
        assert "constant of" not in text
    else:
        assert text.index(words) < text.index("The inequality is a theorem")


def test_single_parameters_are_named_but_not_all_of_them():
    broken = tuple(replace(BROKEN, component=f"weight[{index}]", estimate=4.0 + index) for index in range(9))
    text = told(broken=broken, parameters=20, violating=9, gradients=(HELD,), worst_parameter=6.0)
    assert "in 9 single parameters: weight[8] by" in text
    assert "and 6 more" in text
    assert "weight[1]" not in text
    assert "9 of them violate a bound" in text
    assert "at least" not in text
    assert "violates a bound" not in text


def test_parameters_above_their_bound_by_chance_are_counted():
    gradient = {"gradients": (HELD,), "parameters": 20}
    assert "in 3 of them the estimate exceeds the bound by less than its error" in told(
        **gradient, above=3, worst_parameter=1.09)
    fine = told(**gradient, worst_parameter=0.5)
    assert "at least 2 times for each" in fine
    assert "exceeds" not in fine


def test_derivatives_at_fewer_rows_than_asked_for_are_told():
    gradient = {"gradients": (HELD,), "parameters": 1, "worst_parameter": 0.5, "gradient_rows_wanted": 2000}
    assert "derivatives in 1 parameter at 128 of 2000 rows" in told(**gradient, gradient_rows=128)
    assert "2000" not in told(**gradient, gradient_rows=2000)


def test_uncertain_numbers_are_no_plan():
    sharp = (HELD, replace(HELD, level=1, name="b"))
    assert "may stand in" in told(checks=sharp)
    for name in ("value_error", "estimate_error"):
        loose = (HELD, replace(HELD, level=1, name="b", **{name: 0.9}))
        text = told(checks=loose)
        assert "may stand in" not in text
        assert f"from 64 rows: errors of up to {relative_error(loose):.0%}" in text
    assert relative_error((HELD, REFUSED, replace(HELD, bound="T", value_error=9.0))) == pytest.approx(0.1)
    assert relative_error((REFUSED,)) == 0.0


def test_slopes_and_reasons_have_sentences_of_their_own():
    text = told(sample_slopes=(slope(0, -1.0, -1.0), slope(1, float("nan"), -1.0, reason="the level adds nothing")),
                difference_slopes=(slope(1, float("nan"), reason="the level adds nothing"), slope(2, 2.0)))
    assert "power -1.00 +- 0.01 (theory: -1)." in text
    assert "power 2.00 +- 0.01 (theory: 2); levels 1 and 2, as they are, have 1 times what that law says." in text
    assert "No slope at level 1: the level adds nothing." in text
    assert text.count("adds nothing") == 1
    assert "nan" not in text


@pytest.mark.parametrize(("value", "assumption", "words"), [
    (2.5, SMOOTH, "Above 2: levels 0 and 1 are far apart: at these differences the variance grows faster."),
    (2.5, ROUGH, "Above 2: levels 0 and 1 are far apart: at these differences the variance grows faster."),
    (1.2, SMOOTH, "grows slower, although the density is smooth."),
    (1.2, ROUGH, "Below 2: at levels 0 and 1 the density is not smooth on that scale"),
])  # fmt: skip
def test_slopes_other_than_two(value, assumption, words):
    text = told(difference_slopes=(slope(1, value),), assumption=assumption)
    assert words in text
    assert "as they are" not in text
    assert ("not smooth" in text) == (value < 2 and assumption is ROUGH)


def test_derivatives_that_jump_have_no_line_of_missing_slopes():
    jumping = {"parameters": 5, "jumping": 3, "gradients": (REFUSED,)}
    text = told(**jumping, gradient_slopes=(slope(1, float("nan"), reason="the level adds nothing"),))
    assert "Derivatives in 3 of them jump" in text
    assert "no slope" not in text
    assert "no bound is stated" in text
    assert "power 1.20 +- 0.01 (theory for smooth ones: 2)" in told(**jumping, gradient_slopes=(slope(1, 1.2),))


def test_few_rows_to_fit_to_are_told():
    assert "fitted to 1000 rows of 1024 numbers each" in told(fitted_to_few=(1000, 1024))
    assert "fitted to" not in told()


def test_tables_leave_out_what_does_not_apply():
    assert table([REFUSED]) == []
    assert len(table([HELD, REFUSED, BROKEN])) == 3
