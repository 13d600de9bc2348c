r"""Sizes of levels: published answers, exhaustive search, and what every allocation must satisfy."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsbi.allocation.optimal import Allocation, optimal_allocation
from mlsbi.allocation.problem import read_problem

# Sums of a few float64 products: relative rounding stays below 1e-14; anything beyond 1e-9 is a wrong answer.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Case:
    variances: list
    costs: list  # per row of each level's term

    @property
    def smallest(self):
        return sum(self.costs)


def cases(least, most, *, zero=False, spread=1e3):
    positive = st.floats(1 / spread, spread, allow_nan=False)
    variance = st.one_of(st.just(0.0), positive) if zero else positive
    return st.integers(least, most).flatmap(
        lambda levels: st.builds(
            Case,
            st.lists(variance, min_size=levels, max_size=levels),
            st.lists(st.floats(0.1, 10), min_size=levels, max_size=levels),
        )
    )


def value(n, variances):
    return sum(v / k for v, k in zip(variances, n, strict=True))


def price(n, costs):
    return sum(k * c for k, c in zip(n, costs, strict=True))


def exhaustive_budget(case, budget, lower=None, upper=None):
    r"""Least variance over every whole allocation within the budget."""
    levels = len(case.costs)
    lower = lower or [1] * levels
    upper = upper or [10**9] * levels
    least = math.inf
    most = [int(min(u, (budget - case.smallest) / c + 2)) for u, c in zip(upper, case.costs, strict=True)]
    for rest in itertools.product(*(range(a, b + 1) for a, b in zip(lower[1:], most[1:], strict=True))):
        left = budget * (1 + 1e-13) - price(rest, case.costs[1:])
        first = min(math.floor(left / case.costs[0]), upper[0])
        if first >= lower[0]:
            least = min(least, value((first, *rest), case.variances))
    return least


def exhaustive_target(variances, costs, targets, most):
    r"""Least cost over every whole allocation with sizes up to `most` that meets all targets."""
    table = np.stack(np.meshgrid(*[np.arange(1, most + 1)] * len(costs), indexing="ij"), axis=-1).reshape(
        -1, len(costs)
    )
    reached = (1 / table) @ np.atleast_2d(variances).T
    meets = (reached <= np.asarray(targets) * (1 + 1e-13)).all(axis=1)
    return (table[meets] @ np.asarray(costs)).min() if meets.any() else math.inf


def report(**changes):
    fields = {
        "variances": (4.0, 1.0),
        "costs": (1.0, 3.0),
        "pair_costs": (1.0, 4.0),
        "covariance": ((4.0, 3.5), (3.5, 4.0)),
        "single_level_variance": 4.0,
        "names": ("euler", "exact"),
        "spent": 10.0,
        "data": SimpleNamespace(n=(0, 2)),
    }
    return SimpleNamespace(**{**fields, **changes})


class TestPublished:
    @pytest.mark.parametrize(
        ("costs", "variances", "budget", "n", "variance"),
        [
            ([1, 3], [4, 1], 8, (4, 1), 2.0),
            ([1, 3, 5], [4, 1, 0.5], 24, (8, 2, 1), 1.5),
            ([1, 3, 5, 11], [4, 1, 0.5, 0.25], 64, (16, 4, 2, 1), 1.0),
        ],
    )
    @pytest.mark.parametrize("factor", [1, 2, 1000])
    def test_mxmcpy_budgets(self, costs, variances, budget, n, variance, factor):
        plan = optimal_allocation(variances, costs, budget=factor * budget)
        assert plan.n == tuple(factor * k for k in n)
        assert plan.continuous == pytest.approx(plan.n, rel=ROUNDING)
        assert plan.variance == pytest.approx(variance / factor, rel=ROUNDING)
        assert plan.cost == factor * budget
        assert plan.unspent == 0

    def test_rounding_down_is_not_enough(self):
        plan = optimal_allocation([4, 1, 0.5], [1, 3, 5], budget=36)
        assert plan.n in {(12, 4, 1), (8, 3, 2)}
        assert plan.variance == pytest.approx(13 / 12, rel=ROUNDING)
        assert plan.cost == 36

    @pytest.mark.parametrize(("error", "n"), [(0.1, (800, 200)), (0.01, (80_000, 20_000))])
    def test_mlmcpy_targets(self, error, n):
        plan = optimal_allocation([4, 1], pair_costs=[1, 4], target_variance=error**2)
        assert plan.n == n
        assert plan.cost == price(n, [1, 4])
        assert plan.variance <= error**2
        assert plan.unspent == 0

    def test_mlmcpy_several_outputs_the_tightest_decides(self):
        variances = [[4.0, 1.0], [0.4, 0.1]]
        plan = optimal_allocation(variances, pair_costs=[1, 4], target_variance=0.01)
        assert plan.n == (800, 200)
        assert plan.variance == pytest.approx((0.01, 0.001), rel=ROUNDING)
        other = optimal_allocation(variances, pair_costs=[1, 4], target_variance=[0.1, 0.0001])
        assert other.n == (8000, 2000)

    def test_european_call(self):
        costs = [1, 4, 16, 64]
        plan = optimal_allocation(
            [161.79, 4.4421, 1.0584, 0.27246],
            costs,
            pair_costs=costs,
            target_variance=0.75 * 0.01**2,
            single_level_variance=215.6,
        )
        # The published sizes come from Giles's own run, with variances re-estimated as it went: 1%.
        assert plan.n == pytest.approx((4_263_226, 352_669, 86_856, 21_828), rel=0.01)
        assert plan.cost == pytest.approx(8.46e6, rel=0.01)
        assert plan.speedup == pytest.approx(21.7, rel=0.01)

    def test_control_variate_pair_that_pays_its_fine_run_only(self):
        plan = optimal_allocation([0.25, 0.75], pair_costs=[4, 4800], budget=14_640)
        assert plan.n == (60, 3)
        assert plan.variance == pytest.approx(61 / 240, rel=ROUNDING)


class TestBudget:
    @given(case=cases(2, 3), factor=st.floats(1, 5))
    @settings(max_examples=150, deadline=None)
    def test_is_the_exhaustive_optimum(self, case, factor):
        budget = factor * case.smallest
        plan = optimal_allocation(case.variances, pair_costs=case.costs, budget=budget)
        assert plan.variance == pytest.approx(exhaustive_budget(case, budget), rel=ROUNDING)

    @given(case=cases(4, 4), factor=st.floats(1, 3))
    @settings(max_examples=25, deadline=None)
    def test_four_levels_are_near_the_exhaustive_optimum(self, case, factor):
        case = Case(case.variances, [max(c, 2.0) for c in case.costs])  # keeps the exhaustive search short
        budget = factor * case.smallest
        plan = optimal_allocation(case.variances, pair_costs=case.costs, budget=budget)
        assert plan.variance <= 1.05 * exhaustive_budget(case, budget)  # 5%: what METHOD 3 asks at small n

    @given(
        case=cases(2, 3),
        factor=st.floats(2, 5),
        bounds=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=3, max_size=3),
    )
    @settings(max_examples=100, deadline=None)
    def test_is_the_exhaustive_optimum_within_bounds(self, case, factor, bounds):
        lower = [a for a, _ in bounds][: len(case.costs)]
        upper = [a + b for a, b in bounds][: len(case.costs)]
        budget = factor * price(lower, case.costs) / 2 + price(lower, case.costs) / 2
        plan = optimal_allocation(case.variances, pair_costs=case.costs, budget=budget, minimum=lower, maximum=upper)
        assert all(a <= k <= b for a, k, b in zip(lower, plan.n, upper, strict=True))
        assert plan.variance == pytest.approx(exhaustive_budget(case, budget, lower, upper), rel=ROUNDING)

    @given(case=cases(1, 12, zero=True), factor=st.floats(1, 1e4))
    @settings(max_examples=150, deadline=None)
    def test_costs_at_most_the_budget_and_leaves_no_level_empty(self, case, factor):
        budget = factor * case.smallest
        plan = optimal_allocation(case.variances, pair_costs=case.costs, budget=budget)
        assert plan.cost <= budget
        assert plan.cost == pytest.approx(price(plan.n, case.costs), rel=ROUNDING)
        assert plan.unspent == budget - plan.cost
        assert min(plan.n) >= 1
        assert all(isinstance(k, int) for k in plan.n)
        # What is left cannot buy another row of any level that has variance.
        assert all(plan.unspent < c for c, v in zip(case.costs, case.variances, strict=True) if v > 0)
        assert plan.variance == pytest.approx(value(plan.n, case.variances), rel=ROUNDING)

    @given(case=cases(2, 8), factor=st.floats(1, 100))
    @settings(max_examples=100, deadline=None)
    def test_no_exchange_between_two_levels_is_better(self, case, factor):
        budget = factor * case.smallest
        plan = optimal_allocation(case.variances, pair_costs=case.costs, budget=budget)
        for changed, filled in itertools.permutations(range(len(case.costs)), 2):
            for step in (-1, 1):
                n = list(plan.n)
                n[changed] += step
                n[filled] += math.floor((budget - price(n, case.costs)) / case.costs[filled])
                if min(n) >= 1:
                    assert value(n, case.variances) >= plan.variance * (1 - ROUNDING)

    @given(case=cases(2, 4), factor=st.floats(1, 30))
    @settings(max_examples=60, deadline=None)
    def test_no_neighbour_is_better_when_the_rest_is_allocated_anew(self, case, factor):
        budget = factor * case.smallest
        plan = optimal_allocation(case.variances, pair_costs=case.costs, budget=budget)
        for level, step in itertools.product(range(len(case.costs)), (-1, 1)):
            lower, upper = [1] * len(case.costs), [None] * len(case.costs)
            lower[level] = upper[level] = plan.n[level] + step
            if lower[level] >= 1 and price(lower, case.costs) <= budget:
                other = optimal_allocation(
                    case.variances, pair_costs=case.costs, budget=budget, minimum=lower, maximum=upper
                )
                assert other.variance >= plan.variance * (1 - ROUNDING)

    @given(case=cases(1, 8), factor=st.floats(1, 100), scale=st.integers(2, 50))
    @settings(max_examples=100, deadline=None)
    def test_continuous_sizes_scale_with_the_budget(self, case, factor, scale):
        floor = min(math.sqrt(v / c) for v, c in zip(case.variances, case.costs, strict=True))
        total = sum(math.sqrt(v * c) for v, c in zip(case.variances, case.costs, strict=True))
        budget = factor * total / floor  # every unbounded size is at least `factor`
        plan = optimal_allocation(case.variances, pair_costs=case.costs, budget=budget)
        larger = optimal_allocation(case.variances, pair_costs=case.costs, budget=scale * budget)
        expected = [budget / total * math.sqrt(v / c) for v, c in zip(case.variances, case.costs, strict=True)]
        assert plan.continuous == pytest.approx(expected, rel=ROUNDING)
        assert larger.continuous == pytest.approx([scale * k for k in expected], rel=ROUNDING)
        assert larger.variance <= plan.variance

    @given(case=cases(2, 3), factor=st.floats(1, 50), more=st.floats(0, 2))
    @settings(max_examples=100, deadline=None)
    def test_a_larger_budget_is_never_worse(self, case, factor, more):
        small, large = (
            optimal_allocation(case.variances, pair_costs=case.costs, budget=b * case.smallest)
            for b in (factor, factor + more)
        )
        assert large.variance <= small.variance * (1 + ROUNDING)

    @given(case=cases(2, 8), factor=st.floats(1, 100), data=st.data())
    @settings(max_examples=100, deadline=None)
    def test_permuted_levels_get_permuted_sizes(self, case, factor, data):
        pairs = sorted(set(zip(case.variances, case.costs, strict=True)))  # equals could not be told apart
        order = data.draw(st.permutations(range(len(pairs))))
        budget = factor * math.fsum(c for _, c in pairs) * (1 + 1e-12)
        plans = [
            optimal_allocation([v for v, _ in levels], pair_costs=[c for _, c in levels], budget=budget)
            for levels in (pairs, [pairs[i] for i in order])
        ]
        assert plans[1].n == tuple(plans[0].n[i] for i in order)
        assert plans[1].continuous == pytest.approx([plans[0].continuous[i] for i in order], rel=ROUNDING)

    @given(case=cases(1, 8, zero=True), factor=st.floats(1, 50), data=st.data())
    @settings(max_examples=150, deadline=None)
    def test_continuous_sizes_satisfy_the_optimality_conditions(self, case, factor, data):
        levels = len(case.costs)
        lower = data.draw(st.lists(st.integers(1, 20), min_size=levels, max_size=levels))
        upper = [a + data.draw(st.integers(0, 50)) for a in lower]
        budget = factor * price(lower, case.costs)
        plan = optimal_allocation(case.variances, pair_costs=case.costs, budget=budget, minimum=lower, maximum=upper)
        check_optimality(plan, case, lower, upper)
        full = all(k == b or v == 0 for k, b, v in zip(plan.continuous, upper, case.variances, strict=True))
        assert full or price(plan.continuous, case.costs) == pytest.approx(budget, rel=ROUNDING)

    @pytest.mark.parametrize("seed", range(30))
    def test_is_the_exhaustive_optimum_on_fixed_cases(self, seed):
        rng = np.random.default_rng(seed)
        levels = int(rng.integers(2, 5))
        case = Case(list(10 ** rng.uniform(-2, 1, levels)), list(rng.uniform(1, 10, levels)))
        budget = case.smallest * rng.uniform(1, 4 if levels < 4 else 2.5)
        plan = optimal_allocation(case.variances, pair_costs=case.costs, budget=budget)
        assert plan.variance == pytest.approx(exhaustive_budget(case, budget), rel=ROUNDING)

    @pytest.mark.parametrize("seed", range(5))
    def test_no_exchange_is_better_with_twenty_levels(self, seed):
        rng = np.random.default_rng(seed)
        variances, costs = 2.0 ** -np.arange(20) * rng.uniform(0.5, 2, 20), 1.7 ** np.arange(20)
        plan = optimal_allocation(variances, pair_costs=costs, budget=3e5)
        for changed, filled in itertools.permutations(range(20), 2):
            for step in (-1, 1):
                n = np.array(plan.n)
                n[changed] += step
                n[filled] += math.floor((3e5 - n @ costs) / costs[filled])
                if n.min() >= 1:
                    assert (variances / n).sum() >= plan.variance * (1 - 1e-12)

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_equally_good_sizes_are_told_apart_the_same_way_in_every_order(self, order):
        variances, costs = [1, 1, 2], [1, 2, 1]  # (3, 2, 3) and (2, 2, 4) tie
        plan = optimal_allocation(variances, pair_costs=costs, budget=10)
        other = optimal_allocation([variances[i] for i in order], pair_costs=[costs[i] for i in order], budget=10)
        assert other.n == tuple(plan.n[i] for i in order)

    def test_twenty_levels_come_near_the_continuous_bound(self):
        variances, costs = 2.0 ** -np.arange(20), 1.7 ** np.arange(20)
        plan = optimal_allocation(variances, pair_costs=costs, budget=1e6)
        # No whole numbers beat the continuous solution; the dearest level has a few rows, so 1% is close.
        bound = value(plan.continuous, variances)
        assert bound <= plan.variance <= 1.01 * bound

    def test_a_budget_that_is_a_rounded_sum_buys_that_sum(self):
        plan = optimal_allocation([1.0], [0.1], budget=0.3)  # 0.3 / 0.1 is below 3 in float64
        assert plan.n == (3,)
        assert plan.cost <= 0.3

    def test_one_level_is_plain_monte_carlo(self):
        plan = optimal_allocation([4.0], [2.0], budget=9)
        assert plan.n == (4,)
        assert plan.unspent == 1
        assert plan.single_level_variance == 4
        assert plan.speedup == pytest.approx(1)


def check_optimality(plan, case, lower, upper):
    r"""Moving cost from a level above its minimum to one below its maximum must not lower the variance."""
    n = np.array(plan.continuous)
    assert (n >= lower).all()
    assert (n <= upper).all()
    gain = np.array(case.variances) / np.array(case.costs) / n**2
    giving, taking = gain[n > np.array(lower) * (1 + 1e-12)], gain[n < np.array(upper) * (1 - 1e-12)]
    if giving.size and taking.size:
        assert giving.min() >= taking.max() * (1 - ROUNDING)


class TestTarget:
    @given(case=cases(2, 3, spread=10), size=st.floats(1, 4))
    @settings(max_examples=100, deadline=None)
    def test_is_the_exhaustive_optimum(self, case, size):
        target = sum(case.variances) / size
        plan = optimal_allocation(case.variances, pair_costs=case.costs, target_variance=target)
        best = exhaustive_target(case.variances, case.costs, [target], most=max(60, *plan.n))
        assert plan.variance <= target
        assert plan.cost == pytest.approx(best, rel=ROUNDING)

    @pytest.mark.parametrize("seed", range(30))
    def test_is_the_exhaustive_optimum_within_a_maximum(self, seed):
        rng = np.random.default_rng(seed)
        variances, costs = 10 ** rng.uniform(-1, 1, 3), rng.uniform(0.1, 10, 3)
        target = variances.sum() / 12 * rng.uniform(1.01, 4)  # twelve of each would do
        plan = optimal_allocation(variances, pair_costs=costs, target_variance=target, maximum=12)
        assert max(plan.n) <= 12
        assert plan.cost == pytest.approx(exhaustive_target(variances, costs, [target], most=12), rel=ROUNDING)

    @given(case=cases(1, 12, zero=True), size=st.floats(0.1, 1e4), data=st.data())
    @settings(max_examples=150, deadline=None)
    def test_is_met_within_bounds_and_no_row_is_needless(self, case, size, data):
        levels = len(case.costs)
        lower = data.draw(st.lists(st.integers(1, 20), min_size=levels, max_size=levels))
        target = max(sum(case.variances), 1e-3) / size
        plan = optimal_allocation(case.variances, pair_costs=case.costs, target_variance=target, minimum=lower)
        assert plan.variance <= target
        assert value(plan.n, case.variances) <= target * (1 + ROUNDING)
        assert all(k >= a for k, a in zip(plan.n, lower, strict=True))
        for level in range(levels):
            if plan.n[level] > lower[level]:
                fewer = [k - (i == level) for i, k in enumerate(plan.n)]
                assert value(fewer, case.variances) > target
        check_optimality(plan, case, lower, [math.inf] * levels)

    @given(case=cases(2, 6), size=st.floats(1, 100))
    @settings(max_examples=60, deadline=None)
    def test_no_exchange_between_two_levels_is_cheaper(self, case, size):
        target = sum(case.variances) / size
        plan = optimal_allocation(case.variances, pair_costs=case.costs, target_variance=target)
        for changed, filled in itertools.permutations(range(len(case.costs)), 2):
            for step in (-1, 1):
                n = list(plan.n)
                n[changed] += step
                if n[changed] < 1:
                    continue
                room = target - sum(
                    v / k for i, (v, k) in enumerate(zip(case.variances, n, strict=True)) if i != filled
                )
                if room > 0:
                    n[filled] = max(1, math.ceil(case.variances[filled] / room))
                    assert price(n, case.costs) >= plan.cost * (1 - ROUNDING)

    @given(case=cases(2, 3), size=st.floats(1, 100), less=st.floats(1, 3))
    @settings(max_examples=60, deadline=None)
    def test_a_smaller_variance_is_never_cheaper(self, case, size, less):
        target = sum(case.variances) / size
        loose, tight = (
            optimal_allocation(case.variances, pair_costs=case.costs, target_variance=t)
            for t in (target, target / less)
        )
        assert tight.cost >= loose.cost * (1 - ROUNDING)

    def test_a_ratio_that_is_whole_but_for_rounding_is_not_rounded_up(self):
        assert 3 * 0.1 / 0.1 > 3  # in float64
        plan = optimal_allocation([3 * 0.1], [1.0], target_variance=0.1)
        assert plan.n == (3,)
        assert plan.variance <= 0.1

    def test_a_maximum_that_just_allows_the_target_is_used_up(self):
        plan = optimal_allocation([4.0, 1.0], [1, 3], target_variance=4 / 7 + 1 / 3, maximum=[7, 3])
        assert plan.n == (7, 3)

    @given(
        variances=st.lists(st.lists(st.floats(0.01, 10), min_size=2, max_size=2), min_size=2, max_size=4),
        costs=st.lists(st.floats(0.1, 10), min_size=2, max_size=2),
        sizes=st.lists(st.floats(1, 8), min_size=4, max_size=4),
    )
    @settings(max_examples=100, deadline=None)
    def test_several_outputs_are_all_met_at_the_exhaustive_optimum(self, variances, costs, sizes):
        targets = [sum(row) / size for row, size in zip(variances, sizes, strict=False)]
        plan = optimal_allocation(variances, pair_costs=costs, target_variance=targets)
        assert all(v <= t for v, t in zip(plan.variance, targets, strict=True))
        best = exhaustive_target(variances, costs, targets, most=max(200, *plan.n))
        assert plan.cost == pytest.approx(best, rel=ROUNDING)

    def test_many_outputs_and_levels_come_near_the_continuous_bound(self):
        rng = np.random.default_rng(0)
        variances, costs = 10 ** rng.uniform(-3, 1, (10, 20)), 10 ** rng.uniform(0, 3, 20)
        targets = 10 ** rng.uniform(-6, -4, 10)
        plan = optimal_allocation(variances, pair_costs=costs, target_variance=targets)
        assert all(v <= t for v, t in zip(plan.variance, targets, strict=True))
        # Sizes are in the millions, so whole numbers cost less than 1e-5 more.
        assert plan.cost == pytest.approx(price(plan.continuous, costs), rel=1e-5)
        # The sizes are optimal for a weighted sum of the outputs: weights >= 0 with c n^2 = weights @ V exist.
        wanted = costs * np.array(plan.continuous) ** 2
        active = np.array(plan.variance) > targets * (1 - 1e-5)
        weights, *_ = np.linalg.lstsq((variances[active] / wanted).T, np.ones(20), rcond=None)
        assert (weights > 0).all()
        assert weights @ variances[active] == pytest.approx(wanted, rel=1e-3)

    def test_one_target_serves_all_outputs(self):
        variances = [[4.0, 1.0], [1.0, 3.0]]
        one, each = (optimal_allocation(variances, [1, 3], target_variance=t).n for t in (0.05, [0.05, 0.05]))
        assert one == each


class TestSeveralOutputs:
    @given(
        variances=st.lists(st.lists(st.floats(0.01, 10), min_size=2, max_size=2), min_size=2, max_size=3),
        factor=st.floats(1, 20),
    )
    @settings(max_examples=60, deadline=None)
    def test_a_budget_minimises_the_sum_relative_to_the_first_level(self, variances, factor):
        combined = [sum(row[i] / row[0] for row in variances) for i in range(2)]
        case = Case(combined, [1.0, 4.0])
        plan = optimal_allocation(variances, [1, 3], budget=factor * 5)
        assert value(plan.n, combined) == pytest.approx(exhaustive_budget(case, factor * 5), rel=ROUNDING)
        assert plan.variance == pytest.approx([value(plan.n, row) for row in variances], rel=ROUNDING)

    def test_scaling_an_output_changes_nothing_with_a_budget(self):
        rows = [[4.0, 1.0], [1.0, 3.0]]
        scaled = [rows[0], [1e6 * v for v in rows[1]]]
        assert optimal_allocation(rows, [1, 3], budget=100).n == optimal_allocation(scaled, [1, 3], budget=100).n

    def test_a_zero_first_level_is_replaced_by_the_largest_and_said(self):
        plan = optimal_allocation([[4.0, 1.0], [0.0, 3.0], [0.0, 0.0]], [1, 3], budget=400)
        assert plan.n == optimal_allocation([1.0, 0.25 + 1.0], [1, 3], budget=400).n
        assert any("Output 1" in a and "relative to its largest" in a for a in plan.advice)
        assert any("Output 2" in a and "left out of the sum" in a for a in plan.advice)

    def test_single_level_variance_and_speedup_are_per_output(self):
        plan = optimal_allocation([[4.0, 1.0], [1.0, 3.0]], [1, 3], budget=100, single_level_variance=[4.0, 40.0])
        assert plan.single_level_variance == (4.0, 40.0)
        cost = price(plan.n, [1, 4])
        expected = [4 * 3 / (plan.variance[0] * cost), 40 * 3 / (plan.variance[1] * cost)]
        assert plan.speedup == pytest.approx(expected, rel=ROUNDING)
        assert any("for output 0" in a for a in plan.advice)
        assert not any("for output 1" in a for a in plan.advice)


class TestReport:
    def test_budget_includes_the_pilot_and_its_rows_count(self):
        plan = optimal_allocation(report(), budget=30)
        # 20 are left beside 2 pairs that exist: 12 + 2 more pairs is the best split of 20 + 8.
        best = min(value((k, m), (4, 1)) for k in range(1, 21) for m in range(2, 7) if k + 4 * (m - 2) <= 20)
        assert plan.variance == pytest.approx(best, rel=ROUNDING)
        assert plan.cost == 10 + plan.n[0] + 4 * (plan.n[1] - 2)
        assert plan.cost <= 30
        assert plan.rows == (0, 2)
        assert plan.overhead == 2
        assert plan.names == ("euler", "exact")
        assert plan.speedup == pytest.approx(4 * 3 / (plan.variance * price(plan.n, [1, 4])), rel=ROUNDING)

    def test_many_pilot_rows_are_kept(self):
        plan = optimal_allocation(report(data=SimpleNamespace(n=(0, 50)), spent=250.0), budget=260)
        assert plan.n == (10, 50)
        assert plan.binding == ("rows already there on level 1 (exact)",)

    def test_a_target_counts_the_rows_too(self):
        plan = optimal_allocation(report(), target_variance=0.5)
        fresh = optimal_allocation((4, 1), (1, 3), target_variance=0.5)
        assert plan.variance <= 0.5
        assert plan.n == fresh.n
        assert plan.cost == fresh.cost + 2

    def test_a_large_overhead_does_not_round_a_row_away(self):
        for rows in range(2, 40):
            budget = 1e6 + 0.1 + 0.1 * rows  # off by up to 1e-10, the spacing of float64 at 1e6
            pilot = report(pair_costs=(0.1, 0.1), data=None, spent=1e6, variances=(1.0, 0.0), covariance=None)
            assert optimal_allocation(pilot, budget=budget).n == (rows, 1)

    def test_without_data_or_covariance(self):
        plan = optimal_allocation(
            report(data=None, covariance=None, single_level_variance=None, pair_costs=None), budget=18
        )
        assert plan.n == (4, 1)
        assert plan.speedup is None

    def test_several_outputs(self):
        outputs = report(
            variances=((4.0, 1.0), (1.0, 3.0)),
            single_level_variance=(4.0, 4.0),
            covariance=(((4.0, 3.5), (3.5, 4.0)), ((1.0, 1.0), (1.0, 4.0))),
        )
        assert len(optimal_allocation(outputs, budget=100).speedup) == 2

    def test_a_budget_below_the_pilots_is_refused(self):
        with pytest.raises(ValueError, match=r"includes the 10\.0 already spent; got 9\.0.*at least 11\.0"):
            optimal_allocation(report(), budget=9)
        with pytest.raises(ValueError, match=r"smallest feasible budget is 11\.0"):
            optimal_allocation(report(), budget=10.5)
        assert optimal_allocation(report(), budget=11).n == (1, 2)

    @pytest.mark.parametrize("name", ["costs", "pair_costs", "spent", "covariance", "single_level_variance"])
    def test_numbers_beside_a_report_are_refused(self, name):
        with pytest.raises(ValueError, match=f"report alone, which has its own {name}"):
            optimal_allocation(report(), budget=30, **{name: [1.0, 3.0]})

    @pytest.mark.parametrize("spent", [-1.0, math.nan])
    def test_a_cost_of_the_pilot_that_is_none_is_refused(self, spent):
        with pytest.raises(ValueError, match=r"report\.spent to be finite and zero or positive"):
            optimal_allocation(report(spent=spent), budget=30)

    def test_a_wrong_number_of_names_is_refused(self):
        with pytest.raises(ValueError, match="Expected 2 level names"):
            optimal_allocation(report(names=("a",)), budget=30)


class TestSpent:
    def test_rows_count_in_n_and_in_the_budget(self):
        plan = optimal_allocation([4.0, 1.0], [1, 3], budget=32, spent=[0, 6])
        assert plan.n == (8, 6)
        assert plan.cost == 32
        assert plan.overhead == 0
        assert plan.binding == ("rows already there on level 1",)
        assert any("without them the variance would be" in a for a in plan.advice)

    def test_few_rows_change_nothing(self):
        assert optimal_allocation([4.0, 1.0], [1, 3], budget=16, spent=[3, 1]).n == (8, 2)

    def test_rows_beyond_the_budget_are_refused(self):
        with pytest.raises(ValueError, match=r"includes the 40\.0 already spent"):
            optimal_allocation([4.0, 1.0], [1, 3], budget=30, spent=[0, 10])


def with_draws(case, draws=60, seed=0, **changes):
    r"""A report on a case whose variances were drawn again, some of them zero."""
    rng = np.random.default_rng(seed)
    variances = np.array(case.variances) * rng.gamma(3, 1 / 3, (draws, len(case.costs)))
    variances[rng.uniform(size=variances.shape) < 0.02] = 0
    fields = {"variances": case.variances, "pair_costs": case.costs, "costs": None, "covariance": None, "data": None}
    fields |= {"single_level_variance": None, "spent": 0.0, "names": [str(i) for i in range(len(case.costs))]}
    return report(**fields, variance_draws=variances, **changes)


class TestInterval:
    @given(case=cases(1, 6), factor=st.floats(1, 1e3), bounds=st.tuples(st.integers(1, 9), st.integers(0, 500)))
    @settings(max_examples=30, deadline=None)
    @pytest.mark.parametrize("goal", ["budget", pytest.param("target_variance", marks=pytest.mark.slow)])
    def test_is_that_of_an_allocation_of_each_draw(self, goal, case, factor, bounds):
        low, high = bounds[0], bounds[0] + bounds[1]
        drawn = with_draws(case)
        if goal == "budget":
            limits = {"budget": factor * low * case.smallest, "minimum": low, "maximum": high}
        else:
            limits = {"target_variance": sum(case.variances) / factor, "minimum": low}
        plan = optimal_allocation(drawn, **limits)
        sizes = [
            optimal_allocation(row, pair_costs=case.costs, **limits).continuous for row in drawn.variance_draws.tolist()
        ]
        expected = np.quantile(sizes, [0.05, 0.95], axis=0)
        np.testing.assert_allclose(np.transpose(plan.interval), expected, atol=0.5 + 1e-6, rtol=ROUNDING)
        assert all(isinstance(end, int) for ends in plan.interval for end in ends)
        same = optimal_allocation(report(**{**vars(drawn), "variance_draws": None}), **limits)
        assert same.n == plan.n
        assert same.interval is None

    def test_rows_that_exist_are_within(self):
        drawn = with_draws(Case([4.0, 1.0], [1.0, 4.0]))
        drawn.data, drawn.spent = SimpleNamespace(n=(0, 50)), 205.0
        plan = optimal_allocation(drawn, budget=400)
        assert plan.interval[1][0] >= 50

    def test_is_a_column_of_the_table(self):
        plan = optimal_allocation(with_draws(Case([4.0, 1.0], [1.0, 4.0])), budget=1600)
        lines = str(plan).splitlines()
        assert "n  90% interval  cost/row" in lines[0]
        assert lines[1].split()[:3] == ["0", "800", f"{plan.interval[0][0]}-{plan.interval[0][1]}"]
        assert json.loads(json.dumps(plan.to_dict()))["interval"] == [list(ends) for ends in plan.interval]
        assert "interval" not in str(optimal_allocation([4.0, 1.0], [1.0, 3.0], budget=1600))

    def test_is_unknown_for_a_report_without_draws(self):
        assert optimal_allocation(report(), budget=30).interval is None

    def test_is_unknown_with_optimal_weights(self):
        drawn = report(variance_draws=np.ones((9, 2)))
        assert optimal_allocation(drawn, budget=30).interval is not None
        assert optimal_allocation(drawn, budget=30, weights="optimal").interval is None

    def test_draws_that_cannot_reach_the_target_are_told(self):
        drawn = with_draws(Case([4.0, 1.0], [1.0, 4.0]))
        plan = optimal_allocation(drawn, target_variance=0.1, maximum=[60, None])
        out = int((drawn.variance_draws[:, 0] / 60 >= 0.1).sum())
        assert 0 < out < 60
        assert plan.interval is None
        assert any(f"in {out} of 60 bootstrap draws the maximum" in a for a in plan.advice)

    @pytest.mark.parametrize("draws", [np.ones(2), np.ones((9, 3)), np.ones((0, 2)), np.ones((9, 2, 2))])
    def test_draws_of_another_shape_are_refused(self, draws):
        with pytest.raises(ValueError, match=r"variance_draws of shape \(draws, 2\), for one output"):
            optimal_allocation(report(variance_draws=draws), budget=30)

    def test_draws_that_are_no_variances_are_refused(self):
        with pytest.raises(ValueError, match=r"variance_draws to be finite and zero or positive; got -1\.0 at \[0, "):
            optimal_allocation(report(variance_draws=-np.ones((9, 2))), budget=30)

    def test_draws_beside_several_outputs_are_refused(self):
        outputs = report(
            variances=((4.0, 1.0), (1.0, 3.0)),
            single_level_variance=None,
            covariance=None,
            variance_draws=np.ones((9, 2)),
        )
        with pytest.raises(ValueError, match=r"for one output; got \(9, 2\) for 2"):
            optimal_allocation(outputs, budget=100)


class TestComparison:
    def test_covariance_gives_the_single_level_variance(self):
        plan = optimal_allocation([4.0, 1.0], [1, 3], budget=16, covariance=[[4.0, 4.0], [4.0, 5.0]])
        assert plan.single_level_variance == 5
        assert plan.speedup == pytest.approx(5 * 3 / (1.0 * 16))

    def test_plain_monte_carlo_buys_whole_rows(self):
        # One run for 12, not 1.2: its variance of 1 is hardly below 1.01.
        plan = optimal_allocation([1, 0.01], [1, 10], budget=12, covariance=[[1, 0.995], [0.995, 1]])
        assert plan.variance == pytest.approx(1.01)
        assert plan.speedup == pytest.approx(10 / (1.01 * 12))
        assert not any("Plain Monte Carlo" in a for a in plan.advice)

    def test_plain_monte_carlo_that_wins_with_few_rows_only(self):
        joint = [[1, 0.95], [0.95, 1]]
        plan = optimal_allocation([1, 0.1], [1, 3], budget=6.5, covariance=joint)  # (2, 1) rows, or 2 runs
        [sentence] = [a for a in plan.advice if a.startswith("Plain Monte Carlo")]
        gain = 1 - (1 + math.sqrt(0.4)) ** 2 / 3
        assert "for the same cost, n = 2, its variance is 0.5, not 0.6; at large budgets the levels win" in sentence
        assert sentence.endswith(f"with {gain:.1%} less variance.")
        assert any("At large budgets no subset" in a for a in plan.advice)
        held = optimal_allocation([1, 0.1], [1, 3], budget=650, covariance=joint, maximum=[2, None])
        assert any("at large budgets and without the maximum the levels win" in a for a in held.advice)
        assert any("At large budgets and without the maximum no subset" in a for a in held.advice)
        large = optimal_allocation([1, 0.1], [1, 3], budget=65_000, covariance=joint)
        assert large.variance == pytest.approx((1 - gain) * 3 / 65_000, rel=1e-3)
        assert not any("Plain Monte Carlo" in a for a in large.advice)

    def test_plain_monte_carlo_that_is_as_good_at_large_budgets(self):
        plan = optimal_allocation([4, 1], [1, 3], budget=6, single_level_variance=16 / 3)  # S^2 = 16
        [sentence] = [a for a in plan.advice if a.startswith("Plain Monte Carlo")]
        assert sentence.endswith("n = 2, its variance is 2.66667, not 3; at large budgets the two are alike.")

    def test_plain_monte_carlo_keeps_the_pilots_rows(self):
        pilot = report(
            variances=(1.0, 0.1), covariance=((1.0, 0.95), (0.95, 1.0)), single_level_variance=1.0,
            data=SimpleNamespace(n=(0, 50)), spent=200.0,
        )
        plan = optimal_allocation(pilot, budget=210)  # ten rows of level 0, or three runs more
        [sentence] = [a for a in plan.advice if a.startswith("Plain Monte Carlo")]
        assert f"n = 53 (50 of them already there), its variance is {1 / 53:.6g}, not {0.1 + 0.1 / 50:.6g}" in sentence
        assert "; at large budgets the levels win, with" in sentence
        assert not any("Plain Monte Carlo" in a for a in optimal_allocation(pilot, budget=2100).advice)

    def test_plain_monte_carlo_respects_the_maximum(self):
        plan = optimal_allocation([4.0, 1.0], [1, 3], budget=16, single_level_variance=4, maximum=[None, 2])
        assert not any("Plain Monte Carlo" in a for a in plan.advice)  # 4 / 2, not 4 / 5

    @pytest.mark.parametrize(("variance", "cost"), [(0.3, 0.7), (1.0, 3.0), (0.1, 0.1)])
    @pytest.mark.parametrize("weights", ["unit", "optimal"])
    def test_one_level_is_not_compared_with_itself(self, variance, cost, weights):
        for budget in np.linspace(1, 100, 50) * cost:
            plan = optimal_allocation([variance], [cost], budget=budget, weights=weights)
            assert plan.speedup == pytest.approx(1)
            assert len(plan.advice) == 1
            assert plan.advice[0].startswith("Doubling")

    def test_costs_none_leaves_the_speedup_unknown(self):
        plan = optimal_allocation([4.0, 1.0], pair_costs=[1, 4], budget=16, single_level_variance=5)
        assert plan.single_level_variance == 5
        assert plan.speedup is None
        assert "unknown: needs the cost of one finest run" in str(plan)

    def test_plain_monte_carlo_wins_and_loses(self):
        worse = optimal_allocation([4.0, 1.0], [1, 3], budget=16, single_level_variance=4)
        assert worse.speedup == pytest.approx(0.75)
        assert any("Plain Monte Carlo on level 1 alone beats this stack" in a for a in worse.advice)
        better = optimal_allocation([4.0, 1.0], [1, 3], budget=16, single_level_variance=6)
        assert better.speedup > 1
        assert not any("Plain Monte Carlo" in a for a in better.advice)

    @given(levels=st.integers(2, 6), seed=st.integers(0, 10**6))
    @settings(max_examples=60, deadline=None)
    def test_best_subset_is_that_of_an_enumeration(self, levels, seed):
        rng = np.random.default_rng(seed)
        outputs = np.cumsum(rng.normal(size=(levels, 30)) * 2.0 ** rng.normal(size=(levels, 1)), axis=0)
        joint = np.cov(outputs)
        costs = np.cumprod(rng.uniform(1, 6, size=levels))
        variances = [joint[0, 0], *np.var(np.diff(outputs, axis=0), axis=1, ddof=1)]
        plan = optimal_allocation(variances, costs, budget=1000 * costs.sum(), covariance=joint)

        def spread(subset):
            total = math.sqrt(joint[subset[0], subset[0]] * costs[subset[0]])
            for a, b in itertools.pairwise(subset):
                variance = joint[a, a] + joint[b, b] - 2 * joint[a, b]
                total += math.sqrt(variance * (costs[a] + costs[b]))
            return total

        subsets = [(*rest, levels - 1) for k in range(levels) for rest in itertools.combinations(range(levels - 1), k)]
        best = min(subsets, key=spread)
        [sentence] = [a for a in plan.advice if a.startswith("At large budgets")]
        if len(best) == levels:
            assert sentence == "At large budgets no subset of the levels beats all of them together."
        elif spread(best) ** 2 > 0.99 * spread(range(levels)) ** 2:
            assert sentence == "At large budgets no subset of the levels beats all of them together by 1%."
        else:
            kept = ", ".join(f"level {i}" for i in best)
            assert f"the best subset of the levels is {kept}: S^2 = {spread(best) ** 2:.6g}, not" in sentence

    @pytest.mark.parametrize("weights", ["unit", "optimal"])
    def test_a_subset_that_is_hardly_better_is_none(self, weights):
        plan = optimal_allocation(
            [1, 1e-20, 1e-20], [1, 10, 100], budget=1e5, covariance=np.ones((3, 3)), weights=weights
        )
        assert not any("best subset" in a for a in plan.advice)
        assert any("beats all of them together by 1%" in a for a in plan.advice)

    def test_a_subset_of_levels_that_hardly_differ_is_not_judged_by_rounding(self):
        # Var(f^2 - f^0) is 0 by the covariance, but at least 0.998e-20 by the triangle inequality.
        variances, costs, joint = [1, 1e-26, 1e-20], [1, 10, 1e18], np.ones((3, 3))
        plan = optimal_allocation(variances, costs, budget=1e20, covariance=joint, maximum=[1000, None, None])
        assert any("no subset of the levels beats all of them together by 1%" in a for a in plan.advice)
        problem = read_problem(variances, costs, None, None, None, joint)
        assert problem.term_variance(0, 2) == pytest.approx(0.998001e-20)

    def test_a_subset_has_the_same_s2_for_a_budget_and_a_target(self):
        joint = [[1, 0.2, 0.1], [0.2, 1, 0.99], [0.1, 0.99, 1]]
        goals = ({"budget": 1e6}, {"target_variance": 0.01})
        plans = [optimal_allocation([1, 1.6, 0.02], [1, 2, 30], covariance=joint, **goal) for goal in goals]
        for plan in plans:
            best = (math.sqrt(2) + math.sqrt(0.02 * 32)) ** 2
            assert any(f"the best subset of the levels is level 1, level 2: S^2 = {best:.6g}" in a for a in plan.advice)

    def test_subsets_are_compared_without_the_maximum(self):
        joint = [[4.0, 4.5], [4.5, 6.0]]
        plan = optimal_allocation([4.0, 1.0], [1, 3], budget=160, covariance=joint, maximum=[9, None])
        assert any(a.startswith("At large budgets and without the maximum no subset") for a in plan.advice)

    def test_subsets_need_the_cost_of_single_runs(self):
        plan = optimal_allocation([4.0, 1.0], pair_costs=[1, 4], budget=16, covariance=[[4.0, 3.5], [3.5, 4.0]])
        assert any("Pass costs beside pair_costs" in a for a in plan.advice)


class TestAdvice:
    def test_zero_variance_gets_the_minimum(self):
        plan = optimal_allocation([4.0, 0.0, 1.0], [1, 2, 3], budget=100, minimum=2)
        assert plan.n[1] == 2
        assert "minimum on level 1" in plan.binding
        assert any("level 1 has zero variance and gets 2 rows" in a for a in plan.advice)

    @pytest.mark.parametrize("goal", [{"budget": 100}, {"target_variance": 0.1}])
    def test_all_variances_zero(self, goal):
        plan = optimal_allocation([0.0, 0.0], [1, 3], single_level_variance=0.0, **goal)
        assert plan.n == (1, 1)
        assert plan.variance == 0
        assert plan.speedup is None
        assert any("would change nothing" in a for a in plan.advice)
        assert "unknown: the predicted variance is zero" in str(plan)

    def test_binding_names_the_active_bounds_only(self):
        free = optimal_allocation([4.0, 1.0, 0.5], [1, 3, 5], budget=24)
        assert free.binding == ()  # the continuous solution meets the minimum of level 2 by itself
        held = optimal_allocation([4.0, 1.0, 0.5], [1, 3, 5], budget=24, minimum=[1, 1, 2], maximum=[3, None, None])
        assert held.binding == ("maximum on level 0", "minimum on level 2")
        assert any(a.startswith("Active bounds: maximum on level 0, minimum on level 2") for a in held.advice)

    def test_bounds_that_cost_nothing_are_not_worth_a_sentence(self):
        hardly = optimal_allocation([4.0, 1.0], [1, 3], budget=1600, minimum=[1, 201])
        assert hardly.binding == ("minimum on level 1",)
        assert not any("Active bounds" in a for a in hardly.advice)
        more = optimal_allocation([4.0, 1.0], [1, 3], budget=1600, minimum=[1, 230])
        assert any("Active bounds: minimum on level 1; without them" in a for a in more.advice)

    def test_doubling_the_budget(self):
        plan = optimal_allocation([4.0, 1.0], [1, 3], budget=16)
        assert "Doubling the budget to 32 would multiply the variance by 0.5, to 0.5." in plan.advice
        full = optimal_allocation([4.0, 1.0], [1, 3], budget=16, maximum=1)
        assert full.unspent == 11
        assert any("Doubling the budget to 32 would change nothing" in a for a in full.advice)

    def test_doubling_counts_the_pilots_overhead_once(self):
        sentence = optimal_allocation(report(), budget=30).advice[-1]
        assert "Doubling the budget to 60 " in sentence
        variance = float(sentence.split("to ")[-1].rstrip("."))
        assert variance == pytest.approx(optimal_allocation(report(), budget=60).variance, rel=0.01)  # before rounding


class TestRecord:
    def test_is_frozen(self):
        plan = optimal_allocation([4.0, 1.0], [1, 3], budget=16)
        assert isinstance(plan, Allocation)
        with pytest.raises(FrozenInstanceError):
            plan.cost = 1.0

    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize("weights", ["unit", "optimal"])
    def test_to_dict_survives_json(self, several, weights):
        variances = [[4.0, 1.0], [1.0, 2.0]] if several else [4.0, 1.0]
        joint = [[4.0, 3.5], [3.5, 4.0]]
        joint = [joint, [[1.0, 0.5], [0.5, 2.0]]] if several else joint
        plan = optimal_allocation(
            np.array(variances), pair_costs=np.array([1, 4]), budget=np.float64(16), covariance=joint, weights=weights
        )
        content = plan.to_dict()
        assert json.loads(json.dumps(content, allow_nan=False)) == content
        assert content["n"] == list(plan.n)
        assert content["speedup"] is None

    def test_str_is_an_aligned_ascii_table(self):
        text = str(optimal_allocation(report(), budget=30))
        assert text.isascii()
        lines = text.splitlines()
        assert lines[0].split() == ["level", "name", "n", "cost/row", "cost", "variance", "share"]
        assert len({len(line) for line in lines[:3]}) == 1
        assert lines[1].split()[1] == "euler"
        assert "predicted variance" in lines[3]
        assert "speed-up over high-only" in lines[3]
        assert "(2 of it spent beside these rows)" in lines[3]
        assert all(line.startswith("- ") for line in lines[4:])
        assert "unknown: needs Var f^L" in str(optimal_allocation([4.0, 1.0], [1, 3], budget=16))

    def test_str_has_a_column_per_output(self):
        text = str(optimal_allocation([[4.0, 1.0], [1.0, 2.0]], [1, 3], budget=16))
        assert "variance[0]  variance[1]" in text

    def test_shares_and_level_costs_add_up(self):
        plan = optimal_allocation([4.0, 1.0, 0.3], [1, 3, 7], budget=100)
        assert sum(plan.shares) == pytest.approx(1)
        assert sum(plan.level_costs) == pytest.approx(plan.cost)


def powers(most):
    return st.integers(-most, most).map(lambda k: 4.0**k)


class TestUnits:
    @given(case=cases(1, 6), size=st.floats(1, 1e4), unit=powers(480), cost=powers(240))
    @settings(max_examples=60, deadline=None)
    @pytest.mark.parametrize("goal", ["budget", "target_variance"])
    def test_change_no_digit(self, goal, case, size, unit, cost):
        def allocate(unit, cost):
            limit = size * case.smallest * cost if goal == "budget" else sum(case.variances) / size * unit
            scaled = {"pair_costs": [c * cost for c in case.costs], goal: limit}
            return optimal_allocation([v * unit for v in case.variances], **scaled)

        plan, other = allocate(1, 1), allocate(unit, cost)
        for field in ("n", "continuous", "shares", "binding"):
            assert getattr(other, field) == getattr(plan, field)
        assert other.variance == plan.variance * unit
        assert other.cost == plan.cost * cost
        assert other.unspent == plan.unspent * cost
        assert sum(other.shares) == pytest.approx(1)
        then = float(plan.advice[-1].split(", to ")[-1].rstrip(".")) if ", to " in plan.advice[-1] else None
        if then is not None:  # printed with six digits
            assert float(other.advice[-1].split(", to ")[-1].rstrip(".")) == pytest.approx(then * unit, rel=1e-5)

    @given(units=st.tuples(powers(450), powers(450)), cost=powers(240), weights=st.sampled_from(["unit", "optimal"]))
    @settings(max_examples=30, deadline=None)
    def test_change_no_digit_of_several_outputs(self, units, cost, weights):
        joint = np.array([[[4.0, 3.5], [3.5, 4.0]], [[1.0, 0.5], [0.5, 2.0]]])
        variances, costs = np.array([[4.0, 1.0], [1.0, 2.0]]), np.array([1.0, 3.0])
        plan = optimal_allocation(variances, costs, covariance=joint, budget=1e3, weights=weights)
        column = np.array(units)[:, None]
        other = optimal_allocation(
            column * variances, cost * costs, covariance=column[:, None] * joint, budget=cost * 1e3, weights=weights
        )
        assert other.n == plan.n
        for field in ("speedup", "weights"):
            assert getattr(other, field) == getattr(plan, field)
        for field in ("variance", "single_level_variance", "weighted_variance"):
            assert getattr(other, field) == tuple(v * u for v, u in zip(getattr(plan, field), units, strict=True))
        assert np.array_equal(other.variances, column * plan.variances)
        assert other.pair_costs == tuple(cost * c for c in plan.pair_costs)

    @given(unit=st.floats(5e-324, 1e308), cost=st.floats(5e-324, 1e307))
    @settings(max_examples=60, deadline=None)
    def test_are_powers_of_four(self, unit, cost):
        problem = read_problem([[unit, 0.0], [0.0, 0.0]], None, [cost, cost], None, None, None).scaled()
        assert 1 <= problem.variances[0, 0] < 4
        assert 1 <= problem.pair_costs[0] < 4
        for power in (*problem.variance_unit, problem.cost_unit):  # so that square roots change no digit either
            mantissa, exponent = math.frexp(power)
            assert mantissa == 0.5
            assert exponent % 2 == 1

    @pytest.mark.parametrize("goal", ["budget", "target_variance"])
    @pytest.mark.parametrize(("unit", "cost"), [(4.0**400, 4.0**-200), (4.0**-400, 4.0**200)])
    def test_change_no_digit_of_a_report(self, unit, cost, goal):
        draws = np.random.default_rng(0).gamma(3, size=(60, 2)) * [4, 1]

        def allocate(unit, cost):
            pilot = report(
                variances=(4 * unit, unit), costs=(cost, 3 * cost), pair_costs=(cost, 4 * cost), spent=10 * cost,
                covariance=unit * np.array([[4.0, 3.5], [3.5, 4.0]]), single_level_variance=4 * unit,
                variance_draws=unit * draws,
            )
            return optimal_allocation(pilot, **{goal: 300 * cost if goal == "budget" else unit / 16})

        plan, other = allocate(1.0, 1.0), allocate(unit, cost)
        for field in ("n", "interval", "speedup", "weights", "names", "rows"):
            assert getattr(other, field) == getattr(plan, field)
        assert (other.cost, other.overhead) == (plan.cost * cost, plan.overhead * cost)
        assert [a[:30] for a in other.advice][:-1] == [a[:30] for a in plan.advice][:-1]

    @pytest.mark.parametrize("unit", [1e-300, 1e-160, 1e155, 1e200, 1e307])
    def test_far_from_one(self, unit):
        joint = np.array([[1, 0.95], [0.95, 1.1]])
        arguments = {"costs": [1, 10], "budget": 1e6}
        plan = optimal_allocation([1, 0.2], covariance=joint, **arguments)
        other = optimal_allocation(np.multiply([1, 0.2], unit), covariance=unit * joint, **arguments)
        assert other.n == plan.n
        assert other.variance == pytest.approx(unit * plan.variance, rel=ROUNDING)
        assert other.weights == pytest.approx(plan.weights, rel=ROUNDING)

    def test_refusals_are_in_the_users(self):
        with pytest.raises(ValueError, match=r"got 4e\+200\. The smallest feasible budget is 4\.9+5e\+200: raise it"):
            optimal_allocation([4, 1], [1e200, 3e200], budget=4e200)
        with pytest.raises(ValueError, match=r"got 1e-201\. The smallest reachable is 5\.9+e-201: raise it"):
            optimal_allocation([4e-200, 1e-200], [1, 3], target_variance=1e-201, maximum=[10, 5])
        with pytest.raises(ValueError, match=r"level 1 the variance is 1e\+155, and the covariance says 8e\+155"):
            optimal_allocation([4e155, 1e155], [1, 3], covariance=[[4e155, 0], [0, 4e155]], budget=100)

    @pytest.mark.parametrize(
        ("goal", "message"),
        [
            ({"budget": 1e20}, r"fewer than 2\*\*53 rows of each level; got 5e\+19 of one. Pass a smaller budget"),
            ({"target_variance": 1e-20}, r"fewer than 2\*\*53 rows of each level; got 8e\+20 of one"),
            ({"budget": 1e22, "minimum": 2**60}, r"fewer than 2\*\*53 rows"),
            ({"budget": 1e308}, r"budget below 1e90 rows of the dearest level; got 1e\+308"),
            ({"target_variance": 1e-306}, "target variances above 1e-90 of the largest variance; got 1e-306"),
        ],
    )
    def test_sizes_beyond_counting_are_refused(self, goal, message):
        with pytest.raises(ValueError, match=message):
            optimal_allocation([4, 1], [1, 3], **goal)

    def test_goals_that_bounds_make_easy_are_met(self):
        assert optimal_allocation([4, 1], [1, 3], budget=1e80, maximum=9).n == (9, 9)
        assert optimal_allocation([4e-300, 1e-300], [1, 3], target_variance=1e300).n == (1, 1)
        assert optimal_allocation([0, 0], [1, 3], target_variance=1e-306).n == (1, 1)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "changes", "message"),
        [
            (([4, 1], [1, 3]), {"budget": None}, "exactly one of budget and target_variance; got neither"),
            (([4, 1], [1, 3]), {"target_variance": 1.0}, "exactly one of budget and target_variance; got both"),
            (([4, 1],), {}, "Expected costs, one per level, or pair_costs; got neither"),
            (([4, -1], [1, 3]), {}, r"variances to be finite and zero or positive; got -1\.0 at \[0, 1\]"),
            (([4, math.nan], [1, 3]), {}, "variances to be finite and zero or positive; got nan"),
            (([math.inf, 1], [1, 3]), {}, "variances to be finite and zero or positive; got inf"),
            ((4.0, [1, 3]), {}, r"variances of shape \(levels,\) or \(outputs, levels\); got \(\)"),
            (([], []), {}, r"variances of shape .* got \(0,\)"),
            (([[4, 1], [1]], [1, 3]), {}, "variances to be numbers"),
            (([4, 1], [0, 3]), {}, r"costs to be finite and positive; got 0\.0 at \[0\]"),
            (([4, 1], [1, -3]), {}, "costs to be finite and positive; got -3"),
            (([4, 1], [1, math.nan]), {}, "costs to be finite and positive; got nan"),
            (([4, 1], [1, 3, 5]), {}, r"costs of shape \(2,\) .* got shape \(3,\)"),
            (([4, 1],), {"pair_costs": [1]}, r"pair_costs of shape \(2,\) .* got shape \(1,\)"),
            (([4, 1],), {"pair_costs": [1, 0]}, "pair_costs to be finite and positive; got 0"),
            (([4, 1], [1]), {}, r"costs of shape \(2,\) .* got shape \(1,\)"),
            (([4, 1], [1, math.inf]), {}, "costs to be finite and positive; got inf"),
            (([4, 1],), {"pair_costs": [1, math.nan]}, "pair_costs to be finite and positive; got nan"),
            (([4, 1],), {"pair_costs": [-1, 1]}, r"pair_costs to be finite and positive; got -1\.0 at \[0\]"),
            (([4, 1], ["a", 3]), {}, "costs to be numbers"),
            (([4, 1], [1, 3]), {"budget": math.nan}, "budget to be finite and positive; got nan"),
            (([4, 1], [1, 3]), {"budget": -16}, "budget to be finite and positive; got -16"),
            (([4, 1], [1, 3]), {"budget": 0}, "budget to be finite and positive; got 0"),
            (([4, 1], [1, 3]), {"minimum": math.nan}, "minimum to be whole numbers of at least 1; got nan"),
            (([4, 1], [1, 3]), {"maximum": math.nan}, "maximum to be whole numbers of at least 1; got nan"),
            (([4, 1], [1, 3]), {"maximum": [9, 9, 9]}, r"maximum to be one whole number or 2.* got shape \(3,\)"),
            (([4, 1], [1, 3]), {"spent": [1, 1, 1]}, r"spent to be one whole number or 2.* got shape \(3,\)"),
            (([4, 1], [1, 3]), {"single_level_variance": math.nan}, "single_level_variance to be finite"),
            (([4, 1], [1, 3]), {"budget": math.inf}, "budget to be finite and positive; got inf"),
            (([4, 1], [1, 3]), {"budget": [16, 16]}, "budget of a single number"),
            (([4, 1], [1, 3]), {"budget": 4.9}, r"smallest feasible budget is 5\.0"),
            (([4, 1], [1, 3]), {"budget": 9, "minimum": [2, 2]}, r"smallest feasible budget is 10\.0"),
            (([4, 1], [1, 3]), {"minimum": 0}, "minimum to be whole numbers of at least 1; got 0.*Every level needs"),
            (([4, 1], [1, 3]), {"minimum": 1.5}, "minimum to be whole numbers of at least 1; got 1.5"),
            (([4, 1], [1, 3]), {"minimum": [1, 1, 1]}, r"minimum to be one whole number or 2.* got shape \(3,\)"),
            (
                ([4, 1], [1, 3]),
                {"minimum": 3, "maximum": [9, 2]},
                "maximum on level 1 of at least the minimum, 3; got 2",
            ),
            (([4, 1], [1, 3]), {"spent": [2, 0], "maximum": 1}, "at least the rows that exist already, 2; got 1"),
            (([4, 1], [1, 3]), {"spent": 8, "minimum": 5, "maximum": 2}, "at least the minimum, 5; got 2"),
            (([4, 1], [1, 3]), {"maximum": [None, 2.5]}, r"got \[inf, 2\.5\]\. .* None stands for no maximum"),
            (([4, 1], [1, 3]), {"maximum": np.array([math.nan, 3])}, r"at least 1; got \[nan, 3\.0\]"),
            (([4, 1], [1, 3]), {"maximum": [[1], [2, 3]]}, "maximum to be numbers"),
            (([4, 1], [1, 3]), {"maximum": 0}, "maximum to be whole numbers of at least 1; got 0"),
            (([4, 1], [1, 3]), {"spent": -1}, "spent to be whole numbers of at least 0; got -1.*Count the rows"),
            (
                ([4, 1], [1, 3]),
                {"single_level_variance": -1},
                "single_level_variance to be finite and zero or positive",
            ),
            (([4, 1], [1, 3]), {"single_level_variance": [1, 2]}, "single_level_variance of a single number"),
            (([4, 1], [1, 3]), {"covariance": np.eye(3)}, r"covariance of shape \(2, 2\).* got \(3, 3\)"),
            (([4, 1], [1, 3]), {"covariance": [[4, math.nan], [math.nan, 4]]}, "covariance to be finite"),
            (([4, 1], [1, 3]), {"covariance": [[4, 1], [2, 4]]}, "covariance to be symmetric"),
            (([4, 1], [1, 3]), {"covariance": [[4, 5], [5, 4]]}, "correlations within"),
            (([4, 1], [1, 3]), {"covariance": [[-4, 0], [0, 4]]}, "covariance to be symmetric with"),
            (([[4, 1]] * 2, [1, 3]), {"covariance": np.eye(2)}, r"covariance of shape \(2, 2, 2\)"),
        ],
    )
    def test_budget(self, arguments, changes, message):
        with pytest.raises(ValueError, match=message):
            optimal_allocation(*arguments, **{"budget": 16, **changes})

    @pytest.mark.parametrize(
        ("target", "changes", "message"),
        [
            (0, {}, "target_variance to be finite and positive; got 0"),
            (math.nan, {}, "target_variance to be finite and positive; got nan"),
            ([0.1, 0.1], {}, "target_variance of a single number"),
            ("low", {}, "target_variance to be numbers; got 'low'"),
            (-0.1, {}, r"target_variance to be finite and positive; got -0\.1"),
            (0.1, {"maximum": [10, 5]}, r"target variance that maximum allows; got 0\.1.*reachable is 0\.6000"),
            (0.4, {"maximum": [10, None]}, r"that maximum allows; got 0\.4\. Reachable is all above 0\.4"),
        ],
    )
    def test_target(self, target, changes, message):
        with pytest.raises(ValueError, match=message):
            optimal_allocation([4, 1], [1, 3], target_variance=target, **changes)

    @pytest.mark.parametrize("kind", [list, tuple, np.array])
    def test_no_maximum_on_some_levels(self, kind):
        assert optimal_allocation([4, 1], [1, 3], budget=24, maximum=kind([None, 2])).n == (16, 2)

    def test_target_of_one_output_out_of_reach(self):
        with pytest.raises(ValueError, match=r"target variance of output 1 that maximum allows; got 0\.01"):
            optimal_allocation([[4, 1], [1, 1]], [1, 3], target_variance=[10, 0.01], maximum=10)
        with pytest.raises(ValueError, match=r"target_variance of shape \(2,\)"):
            optimal_allocation([[4, 1], [1, 1]], [1, 3], target_variance=[10, 0.01, 1])

    @given(case=cases(1, 6), spent=st.integers(0, 9))
    @settings(max_examples=50, deadline=None)
    def test_the_budget_that_a_refusal_names_is_enough(self, case, spent):
        with pytest.raises(ValueError, match="Expected a budget") as caught:
            optimal_allocation(case.variances, pair_costs=case.costs, budget=1e-9, spent=spent, minimum=3)
        named = float(
            str(caught.value)
            .replace(",", "")
            .split("at least " if spent else "budget is ")[1]
            .split(":")[0]
            .rstrip(".")
        )
        plan = optimal_allocation(case.variances, pair_costs=case.costs, budget=named, spent=spent, minimum=3)
        assert plan.n == (max(3, spent),) * len(case.costs)
        with pytest.raises(ValueError, match="Expected a budget"):
            optimal_allocation(case.variances, pair_costs=case.costs, budget=named * 0.999, spent=spent, minimum=3)


@pytest.mark.parametrize("heavy", ["torch", "scipy", "pandas"])
def test_importing_needs_no(heavy):
    code = (
        "import sys, mlsbi.allocation.optimal as module; "
        f"assert '{heavy}' not in sys.modules; print(module.optimal_allocation([4, 1], [1, 3], budget=8).n)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(4, 1)"
