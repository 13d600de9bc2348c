r"""Error against budget for subsets of the levels: allocated anew from the rows themselves."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsbi.allocation.comparing import ErrorCurve, error_curves
from mlsbi.allocation.optimal import optimal_allocation


def make_rows(levels, seed=0, rows=40):
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(levels, rows)) * 2.0 ** -np.arange(levels)[:, None], axis=0)


def term_variances(f):
    return np.diff(f, axis=0, prepend=0.0).var(axis=1, ddof=1)


def make_report(levels, seed=0, **changes):
    f = make_rows(levels, seed)
    costs = 4.0 ** np.arange(levels)
    fields = {
        "variances": term_variances(f),
        "costs": costs,
        "pair_costs": costs + np.append(0, costs[:-1]),
        "covariance": np.cov(f).reshape(levels, levels),
        "single_level_variance": f[-1].var(ddof=1),
        "names": ["low", "middle", "high", "best"][:levels],
        "spent": 1e6,
        "data": SimpleNamespace(n=(0,) * (levels - 1) + (5000,)),
    }
    return SimpleNamespace(**{**fields, **changes})


class TestCurves:
    @pytest.mark.parametrize(
        ("levels", "labels", "sets"),
        [
            (1, ["all levels"], [(0,)]),
            (2, ["all levels", "middle alone"], [(0, 1), (1,)]),
            (
                3,
                ["all levels", "without low", "without middle", "high alone"],
                [(0, 1, 2), (1, 2), (0, 2), (2,)],
            ),
        ],
    )
    def test_are_of_all_levels_without_each_and_the_finest_alone(self, levels, labels, sets):
        curves = error_curves(make_report(levels), budgets=[1000])
        assert all(isinstance(curve, ErrorCurve) for curve in curves)
        assert [curve.label for curve in curves] == labels
        assert [curve.levels for curve in curves] == sets

    def test_levels_without_names_are_numbered(self):
        f = make_rows(3)
        curves = error_curves(term_variances(f), [1, 4, 16], covariance=np.cov(f), budgets=[1000])
        assert [curve.label for curve in curves[1:]] == ["without level 0", "without level 1", "level 2 alone"]

    def test_names_that_are_numbers_are_not_said_twice(self):
        report = make_report(2, names=["level 0", "level 1"], data=SimpleNamespace(n=(0, 0)), spent=0.0)
        assert [curve.label for curve in error_curves(report, budgets=[1000])] == ["all levels", "level 1 alone"]
        plan = optimal_allocation(report, budget=1000, minimum=[1, 150])
        assert plan.binding == ("minimum on level 1",)

    @given(levels=st.integers(2, 4), seed=st.integers(0, 10**6), factor=st.floats(1, 1e3), minimum=st.integers(1, 3))
    @settings(max_examples=25, deadline=None)
    @pytest.mark.parametrize("weights", ["unit", "optimal"])
    def test_are_those_of_a_stack_of_these_levels(self, weights, levels, seed, factor, minimum):
        report, f = make_report(levels, seed), make_rows(levels, seed)
        budget = factor * minimum * report.costs[-1]
        for curve in error_curves(report, budgets=[budget], minimum=minimum, weights=weights):
            rows, costs = f[list(curve.levels)], report.costs[list(curve.levels)]
            if budget < minimum * (costs.sum() + costs[:-1].sum()):
                assert math.isnan(curve.errors[0])
                continue
            plan = optimal_allocation(
                term_variances(rows), costs, budget=budget, minimum=minimum, weights=weights,
                covariance=np.cov(rows).reshape(len(rows), len(rows)),
            )
            assert curve.errors[0] ** 2 == pytest.approx(plan.variance, rel=1e-9)

    def test_only_rows_are_paid_for(self):
        [all_levels, *_] = error_curves(make_report(3), budgets=[1000])
        assert all_levels.errors == error_curves(make_report(3, spent=0.0, data=None), budgets=[1000])[0].errors

    def test_pairs_of_neighbours_have_the_cost_that_was_given(self):
        report = make_report(3, pair_costs=np.array([1.0, 4.0, 16.0]))  # coarse halves are by-products
        every, without_low, without_middle, alone = error_curves(report, budgets=[20.5], minimum=1)
        assert math.isnan(every.errors[0])  # 1 + 4 + 16
        assert not math.isnan(without_low.errors[0])  # 4 + 16
        assert not math.isnan(without_middle.errors[0])  # 1 + (1 + 16): nothing is said of that pair
        assert alone.errors == (math.sqrt(report.covariance[2, 2]),)

    def test_a_level_that_agrees_with_the_one_below_is_worth_nothing(self):
        f = make_rows(3)
        f[1] = f[0]
        curves = error_curves(term_variances(f), [1, 4, 16], covariance=np.cov(f), budgets=np.geomspace(100, 1e5, 9))
        assert (np.array(curves[2].errors) < np.array(curves[0].errors)).all()

    def test_one_output_of_several_levels_can_be_flat(self):
        curves = error_curves([0.0, 0.0], [1, 4], covariance=np.zeros((2, 2)), budgets=[100])
        assert [curve.errors for curve in curves] == [(0.0,), (0.0,)]


class TestBudgets:
    def test_default_to_a_thousandfold_of_the_smallest(self):
        curves = error_curves(make_report(3), minimum=2)
        budgets = np.array(curves[0].budgets)
        assert len(budgets) == 31
        assert budgets[0] == 32  # two runs of the finest level, which is dearer than nothing else that is bought
        assert budgets[-1] == pytest.approx(32_000)
        np.testing.assert_allclose(np.diff(np.log(budgets)), np.log(1000) / 30)
        assert not math.isnan(curves[-1].errors[0])
        assert math.isnan(curves[0].errors[0])
        assert all(curve.budgets == curves[0].budgets for curve in curves)

    @pytest.mark.parametrize(("budget", "first"), [(20_000.0, 20_000 / 30), (100.0, 16.0), (16.0, 16.0)])
    def test_lie_around_one_that_is_among_them(self, budget, first):
        budgets = np.array(error_curves(make_report(3), budget=budget)[0].budgets)
        assert budget in budgets
        assert budgets[0] == pytest.approx(first)
        assert budgets[-1] == pytest.approx(30 * budget)
        assert (np.diff(budgets) > 0).all()

    def test_errors_fall_with_the_budget(self):
        for curve in error_curves(make_report(4)):
            errors = np.array(curve.errors)
            assert (np.diff(errors[np.isfinite(errors)]) <= 0).all()


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"covariance": None}, "Expected covariance, of .* got None"),
            ({"costs": None}, "Expected costs, of one simulation of each level; got None"),
            ({"budgets": [1.0], "budget": 1.0}, "budgets or the one budget to look around; got both"),
            ({"budgets": []}, r"positive, finite budgets of shape \(m,\); got \[\]"),
            ({"budgets": [[1.0]]}, "positive, finite budgets"),
            ({"budgets": [1.0, math.nan]}, "positive, finite budgets"),
            ({"budget": -1.0}, "positive, finite budgets"),
            ({"budget": 2.0}, r"buys some of the levels; got 2\.0\. The smallest is 3\.0"),
            ({"minimum": 0}, "minimum to be whole numbers of at least 1"),
            ({"weights": "best"}, 'weights "unit" or "optimal"'),
        ],
    )
    def test_bad_input(self, changes, message):
        arguments = {"covariance": [[4, 3.5], [3.5, 4]], "costs": [1, 3], "pair_costs": [1, 4], **changes}
        with pytest.raises(ValueError, match=message):
            error_curves([4, 1], **arguments)

    def test_several_outputs(self):
        with pytest.raises(ValueError, match="Expected one output; got 2"):
            error_curves([[4, 1], [4, 1]], [1, 3], covariance=[[[4, 3.5], [3.5, 4]]] * 2)
