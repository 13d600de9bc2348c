"""Theorem 2: the sizes that minimise the bound under a budget."""

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlsbi import optimal_allocation, tasks
from mlsbi.levels import sum_pair_costs
from theory_checks.bounds import minimising_sizes, numerators, poincare_bound
from theory_checks.integrands import Loss
from theory_checks.measuring import measure
from theory_checks.stacks import problems
from theory_checks.testing import known_constants, properties

NUMERATORS = st.floats(-6, 3).map(lambda power: 10.0**power)
WITHIN = 1.05  # of the exhaustive optimum, what issue and README promise of integer sizes


@st.composite
def plans(draw, *, levels=(2, 3), most=400):
    """Numerators, costs of a row, and a budget small enough to try every plan."""
    number = draw(st.integers(*levels))
    bounds = [draw(NUMERATORS) for _ in range(number)]
    costs = list(itertools.accumulate([draw(st.integers(2, 6)) for _ in range(number - 1)], initial=1,
                                      func=lambda cost, factor: cost * factor))
    pair_costs = sum_pair_costs(costs)
    budget = sum(pair_costs) + draw(st.integers(0, most // number**2))
    return bounds, costs, pair_costs, float(budget)


def objective(bounds, sizes):
    return sum(bound / size for bound, size in zip(bounds, sizes, strict=True))


def every_plan(pair_costs, budget):
    """All integer plans that spend what a plan can: the cheapest level takes what the others leave."""
    above = [range(1, int(budget // cost) + 1) for cost in pair_costs[1:]]
    for sizes in itertools.product(*above):
        left = budget - sum(size * cost for size, cost in zip(sizes, pair_costs[1:], strict=True))
        if left >= pair_costs[0]:
            yield (int(left // pair_costs[0]), *sizes)


@properties(200)
@given(plan=plans())
def test_no_integer_plan_has_a_smaller_bound(plan):
    bounds, _, pair_costs, budget = plan
    best = objective(bounds, minimising_sizes(bounds, pair_costs, budget))
    assert best == pytest.approx(sum(math.sqrt(b * c) for b, c in zip(bounds, pair_costs, strict=True)) ** 2 / budget)
    assert best <= min(objective(bounds, sizes) for sizes in every_plan(pair_costs, budget)) * (1 + 1e-12)


@properties(200)
@given(plan=plans())
def test_optimal_allocation_minimises_the_bound(plan):
    bounds, costs, pair_costs, budget = plan
    found = optimal_allocation(bounds, costs, budget=budget)
    exhaustive = min(objective(bounds, sizes) for sizes in every_plan(pair_costs, budget))
    assert sum(size * cost for size, cost in zip(found.n, pair_costs, strict=True)) <= budget
    assert exhaustive * (1 - 1e-12) <= objective(bounds, found.n) <= WITHIN * exhaustive
    assert found.variance == pytest.approx(objective(bounds, found.n))


@properties(200)
@given(bounds=st.lists(NUMERATORS, min_size=2, max_size=6), factors=st.lists(st.integers(2, 9), min_size=5, max_size=5))
def test_theorem_2_is_what_optimal_allocation_rounds(bounds, factors):
    costs = list(itertools.accumulate(factors[:len(bounds) - 1], initial=1, func=lambda cost, factor: cost * factor))
    pair_costs = sum_pair_costs(costs)
    budget = 1e12
    wanted = minimising_sizes(bounds, pair_costs, budget)
    assume(min(wanted) > 1)
    assert optimal_allocation(bounds, costs, budget=budget).continuous == pytest.approx(wanted, rel=1e-9)


@properties(50)
@given(plan=plans(), which=st.integers(0, 2), factor=st.floats(1.5, 10))
def test_sizes_of_other_numerators_are_worse(plan, which, factor):
    """The negative control: a numerator that is wrong gives sizes with a larger bound."""
    bounds, _, pair_costs, budget = plan
    wrong = list(bounds)
    wrong[which % len(bounds)] *= factor
    best = objective(bounds, minimising_sizes(bounds, pair_costs, budget))
    assert objective(bounds, minimising_sizes(wrong, pair_costs, budget)) > best


@properties(20)
@given(problem=problems(density="gaussian", levels=(2, 3), gap=(0.03, 1.0)), extra=st.integers(0, 40))
def test_a_stacks_own_bounds_are_minimised(problem, extra):
    stack, density = problem
    checks = poincare_bound(measure(stack, Loss(density, "npe"), rows=300, **known_constants(stack, "npe")))
    bounds, pair_costs = numerators(checks), stack.row_costs
    assume(min(bounds) > 1e-12 and sum(pair_costs) < 400)
    budget = sum(pair_costs) + extra
    found = optimal_allocation(bounds, stack.costs, budget=budget)
    exhaustive = min(objective(bounds, sizes) for sizes in every_plan(pair_costs, budget))
    assert objective(bounds, found.n) <= WITHIN * exhaustive


def test_sizes_by_the_bound_are_near_those_by_the_variance():
    """What theorem 2 is for: its V_l need no more than the right proportions."""
    stack = tasks.get("ou").stack
    data = measure(stack, Loss(lambda theta, x: -((theta[:, 1:2] - x) ** 2).sum(1), "npe"), rows=2000)
    by_bound = optimal_allocation(numerators(poincare_bound(data)), stack.costs, budget=20_000)
    variances = [float(rows.var(0)) for rows in data.differences]
    best = optimal_allocation(variances, stack.costs, budget=20_000)
    assert objective(variances, by_bound.n) <= 1.25 * best.variance
