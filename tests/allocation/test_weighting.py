r"""Control-variate weights: the least variance for given sizes, and with sizes of their own."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.allocation.problem import read_problem
from mlsbi.allocation.weighting import Coupling

# Relative, of float64 sums of a few squares.
ROUNDING = 1e-9


class Stack:
    r"""Rows of f^0..f^L with random couplings, and what they say of variances and costs."""

    def __init__(self, levels, seed, rows=12):
        rng = np.random.default_rng(seed)
        steps = rng.normal(size=(levels, rows)) * 10 ** rng.uniform(-1.5, 0.5, size=(levels, 1))
        self.f = np.cumsum(steps, axis=0) * rng.uniform(0.5, 2, size=(levels, 1))
        self.covariance = np.atleast_2d(np.cov(self.f))
        self.variances = self.weighted(np.ones(levels))
        self.costs = np.cumprod(rng.uniform(1.2, 6, size=levels))
        self.pair_costs = self.costs + np.append(0, self.costs[:-1])

    def weighted(self, a):
        r"""Sample variances of a_l f^l - a_{l-1} f^{l-1}."""
        scaled = np.asarray(a)[:, None] * self.f
        return np.diff(scaled, axis=0, prepend=0.0).var(axis=1, ddof=1)

    def variance(self, a, n):
        return float((self.weighted(a) / n).sum())

    def best(self, n):
        r"""Least variance over weights, by a general minimiser."""
        found = minimize(lambda a: self.variance([*a, 1.0], n), np.ones(len(n) - 1), method="BFGS", options={"gtol": 0})
        return found.fun

    def allocate(self, weights="optimal", **goal):
        return optimal_allocation(self.variances, self.costs, covariance=self.covariance, weights=weights, **goal)


def sizes_of(levels, seed):
    return np.random.default_rng(seed + 1).integers(1, 200, size=levels).astype(float)


stacks = st.builds(Stack, st.integers(2, 6), st.integers(0, 10**6))


class TestForGivenSizes:
    @given(stack=stacks, seed=st.integers(0, 10**6))
    @settings(max_examples=60, deadline=None)
    def test_reach_the_least_variance(self, stack, seed):
        n = sizes_of(len(stack.costs), seed)
        plan = optimal_allocation(
            stack.variances, stack.costs, covariance=stack.covariance, budget=n @ stack.pair_costs, minimum=n, maximum=n
        )
        assert plan.n == tuple(n)
        assert plan.weights[-1] == 1
        assert plan.weighted_variance == pytest.approx(stack.variance(plan.weights, n), rel=ROUNDING)
        assert plan.weighted_variance == pytest.approx(stack.best(n), rel=1e-6)  # what BFGS resolves
        assert plan.weighted_variance <= plan.variance
        for level in range(len(n) - 1):  # the other side: any weight moved is worse
            for factor in (0.9, 1.1):
                moved = np.array(plan.weights)
                moved[level] *= factor
                assert stack.variance(moved, n) >= plan.weighted_variance * (1 - ROUNDING)

    @given(stack=stacks, seed=st.integers(0, 10**6))
    @settings(max_examples=60, deadline=None)
    def test_weighted_variances_are_those_of_weighted_rows(self, stack, seed):
        weights = np.random.default_rng(seed).normal(1, 1, size=len(stack.costs))
        coupling = Coupling.read(read_problem(stack.variances, stack.costs, None, None, None, stack.covariance))
        expected = stack.weighted(weights)
        scale = weights[1:] ** 2 * np.diag(stack.covariance)[1:] + weights[:-1] ** 2 * np.diag(stack.covariance)[:-1]
        np.testing.assert_allclose(coupling.weighted(weights[None])[0, 1:] / scale, expected[1:] / scale, atol=ROUNDING)
        equal = np.full_like(weights, weights[0])
        assert coupling.weighted(equal[None])[0].tolist() == (weights[0] ** 2 * stack.variances).tolist()

    def test_levels_that_hardly_differ_lose_no_digits(self):
        variances = [1.0, 1e-20]  # beside which 1 + 1 - 2 cov is all rounding
        joint = np.ones((2, 2))
        plan = optimal_allocation(variances, [1, 3], covariance=joint, budget=1000, minimum=[10, 90], maximum=[10, 90])
        assert plan.variance == pytest.approx(0.1)
        assert plan.weights[0] == pytest.approx(0.1, rel=ROUNDING)  # 100 rows of one variable
        assert plan.weighted_variance == pytest.approx(0.01, rel=ROUNDING)

    def test_rows_of_identical_levels_are_pooled(self):
        plan = optimal_allocation([1, 0, 0], [1, 2, 3], covariance=np.ones((3, 3)), budget=100, minimum=[2, 3, 5],
                                  maximum=[2, 3, 5])
        assert plan.weights == pytest.approx((0.2, 0.5, 1))
        assert plan.weighted_variance == pytest.approx(0.1)

    def test_an_uncorrelated_level_gets_no_weight(self):
        plan = optimal_allocation([1, 5], [1, 3], covariance=np.diag([1.0, 4.0]), budget=100)
        assert plan.weights == (0, 1)
        assert plan.weighted_variance == 4 / plan.n[1]

    def test_a_level_of_opposite_sign_gets_a_negative_weight(self):
        plan = optimal_allocation([1, 3.8], [1, 3], covariance=[[1, -0.9], [-0.9, 1]], budget=100)
        assert plan.weights[0] < 0
        assert plan.weighted_variance < 1 / plan.n[1]

    def test_levels_that_never_vary(self):
        joint = [[0, 0, 0], [0, 0, 0], [0, 0, 2.0]]
        plan = optimal_allocation([0, 0, 2.0], [1, 2, 3], covariance=joint, budget=100)
        assert plan.weighted_variance == plan.variance
        assert np.isfinite(plan.weights).all()

    def test_one_level_has_weight_one(self):
        plan = optimal_allocation([4.0], [2.0], budget=9, weights="optimal")
        assert plan.n == (4,)
        assert plan.weights == (1,)
        assert plan.weighted_variance == plan.variance == 1

    def test_several_outputs_have_weights_of_their_own(self):
        stacks = [Stack(3, seed) for seed in (1, 2)]
        variances, joint = [s.variances for s in stacks], [s.covariance for s in stacks]
        plan = optimal_allocation(variances, [1, 4, 16], covariance=joint, budget=1000)
        assert plan.weights[0] != plan.weights[1]
        for k, stack in enumerate(stacks):
            assert plan.weighted_variance[k] == pytest.approx(stack.variance(plan.weights[k], plan.n), rel=ROUNDING)
            assert plan.weighted_variance[k] == pytest.approx(stack.best(np.array(plan.n)), rel=1e-6)

    def test_without_a_covariance_they_are_unknown(self):
        plan = optimal_allocation([4.0, 1.0], [1, 3], budget=16)
        assert plan.weights is None
        assert plan.weighted_variance is None

    def test_advice_says_what_they_gain_if_it_is_a_percent(self):
        good = optimal_allocation([1, 1], [4, 4796], covariance=[[1, 0.5], [0.5, 1]], budget=14_640)
        [sentence] = [a for a in good.advice if "control-variate weights" in a]
        weights = f"a = ({good.weights[0]:.3g}, 1)"
        assert f"{weights} the same rows would reach variance {good.weighted_variance:.6g}" in sentence
        assert sentence.endswith(f"{1 - good.weighted_variance / good.variance:.1%} less.")
        little = optimal_allocation([4, 1e-4], [1, 3], covariance=[[4, 4], [4, 4.0001]], budget=1000)
        assert not any("control-variate" in a for a in little.advice)


def joint_optimum(stack, budget):
    r"""Least variance over sizes of at least 1 and weights, by a general minimiser over shares of the cost."""
    costs = stack.pair_costs
    left = budget - costs.sum()

    def sizes(shares):
        return 1 + left * np.append(shares, 1 - shares.sum()).clip(0) / costs

    levels = len(costs)

    def variance(shares):
        n = sizes(shares)
        hessian = np.zeros((levels, levels))
        for i in range(levels):
            hessian[i, i] += stack.covariance[i, i] / n[i]
            if i:
                hessian[i - 1, i - 1] += stack.covariance[i - 1, i - 1] / n[i]
                hessian[i, i - 1] -= stack.covariance[i, i - 1] / n[i]
                hessian[i - 1, i] = hessian[i, i - 1]
        inner, edge = hessian[:-1, :-1], hessian[:-1, -1]
        return hessian[-1, -1] - edge @ np.linalg.solve(inner, edge)

    found = []
    for start in (np.full(levels - 1, 1 / levels), np.full(levels - 1, 0.02), np.full(levels - 1, 0.9 / (levels - 1))):
        result = minimize(
            variance, start, method="SLSQP", bounds=[(0, 1)] * (levels - 1), options={"ftol": 1e-14, "maxiter": 500},
            constraints={"type": "ineq", "fun": lambda shares: 1 - shares.sum()},
        )
        found.append(variance(np.clip(result.x, 0, 1)))
    return min(found)


class TestWithSizes:
    @given(levels=st.integers(2, 3), seed=st.integers(0, 10**6), factor=st.floats(1.05, 1e4))
    @settings(max_examples=60, deadline=None)
    def test_reach_the_joint_continuous_optimum(self, levels, seed, factor):
        stack = Stack(levels, seed)
        budget = factor * stack.pair_costs.sum()
        n = np.array(stack.allocate(budget=budget).continuous)
        assert n @ stack.pair_costs <= budget * (1 + ROUNDING)
        coupling = Coupling.read(read_problem(stack.variances, stack.costs, None, None, None, stack.covariance))
        found = stack.variance(coupling.best_weights(n)[0], n)
        assert found <= joint_optimum(stack, budget) * (1 + 1e-6)

    @given(stack=stacks, factor=st.floats(1, 1e3), low=st.integers(1, 4), more=st.integers(0, 60))
    @settings(max_examples=80, deadline=None)
    def test_are_never_worse_than_ones_for_a_budget(self, stack, factor, low, more):
        goal = {"budget": factor * low * stack.pair_costs.sum(), "minimum": low, "maximum": low + more}
        unit, plan = stack.allocate("unit", **goal), stack.allocate(**goal)
        assert plan.variance <= unit.weighted_variance * (1 + ROUNDING)
        assert unit.weighted_variance <= unit.variance
        assert plan.cost <= goal["budget"]
        assert all(low <= k <= low + more for k in plan.n)
        assert plan.variance == plan.weighted_variance
        assert plan.variance == pytest.approx(stack.variance(plan.weights, plan.n), rel=ROUNDING)
        assert plan.variances == pytest.approx(tuple(stack.weighted(plan.weights)), rel=1e-6, abs=1e-12)

    @given(stack=stacks, size=st.floats(1, 1e3), low=st.integers(1, 4))
    @settings(max_examples=60, deadline=None)
    def test_are_never_dearer_than_ones_for_a_target(self, stack, size, low):
        target = stack.variances.sum() / size
        unit, plan = (stack.allocate(w, target_variance=target, minimum=low) for w in ("unit", "optimal"))
        assert plan.cost <= unit.cost
        assert plan.variance <= target
        assert stack.variance(plan.weights, plan.n) <= target * (1 + ROUNDING)

    def test_published_control_variate_pair(self):
        plan = optimal_allocation(
            [1, 1], pair_costs=[4, 4800], covariance=[[1, 0.5], [0.5, 1]], budget=14_640, weights="optimal"
        )
        assert plan.n == (60, 3)
        assert plan.variance <= 61 / 240  # MXMCPy's, with weight 0.5
        assert plan.cost <= 14_640

    def test_identical_levels_leave_the_weights_at_one(self):
        plan = optimal_allocation([1, 0, 0], [1, 2, 4], covariance=np.ones((3, 3)), budget=1e6, weights="optimal")
        assert plan.weights == pytest.approx((1, 1, 1), abs=1e-5)  # the one row of level 1 and of level 2 is pooled
        assert plan.n[1:] == (1, 1)

    def test_an_uncorrelated_level_gets_the_minimum(self):
        plan = optimal_allocation(
            [1, 5], [1, 3], covariance=np.diag([1.0, 4.0]), budget=1000, minimum=2, weights="optimal"
        )
        assert plan.weights == (0, 1)
        assert plan.n == (2, 249)
        assert plan.speedup == pytest.approx(3 / 4, rel=0.01)  # a pair pays the coarse run for nothing

    def test_a_target_that_ones_do_not_reach(self):
        joint = [[1, 0.3], [0.3, 1]]
        with pytest.raises(ValueError, match="maximum allows"):
            optimal_allocation([1, 1.4], [1, 9], covariance=joint, target_variance=0.1, maximum=[1000, 11])
        plan = optimal_allocation(
            [1, 1.4], [1, 9], covariance=joint, target_variance=0.1, maximum=[1000, 11], weights="optimal"
        )
        assert plan.variance <= 0.1
        assert plan.n[1] <= 11
        assert any("unit weights do not, within the maximum" in a for a in plan.advice)
        with pytest.raises(ValueError, match=r"maximum allows; got 0\.01\. The smallest reachable is 0\.08"):
            optimal_allocation(
                [1, 1.4], [1, 9], covariance=joint, target_variance=0.01, maximum=[1000, 11], weights="optimal"
            )

    @pytest.mark.parametrize("goal", [{"budget": 3000.0}, {"target_variance": (0.05, 0.2)}])
    def test_several_outputs_share_sizes(self, goal):
        stacks = [Stack(3, seed) for seed in (3, 4)]
        variances, joint = [s.variances for s in stacks], [s.covariance for s in stacks]
        unit, plan = (
            optimal_allocation(variances, [1, 4, 16], covariance=joint, weights=w, **goal) for w in ("unit", "optimal")
        )
        for k, stack in enumerate(stacks):
            assert plan.variance[k] == pytest.approx(stack.variance(plan.weights[k], plan.n), rel=ROUNDING)
        if "budget" in goal:
            scale = [stack.variances[0] for stack in stacks]
            assert np.divide(plan.variance, scale).sum() <= np.divide(unit.variance, scale).sum()
            assert any("less variance over all outputs than unit weights" in a for a in plan.advice)
        else:
            assert plan.cost <= unit.cost
            assert all(v <= t for v, t in zip(plan.variance, goal["target_variance"], strict=True))

    def test_advice_says_what_was_gained(self):
        stack = Stack(3, 5)
        unit, plan = (stack.allocate(w, budget=5000.0) for w in ("unit", "optimal"))
        gain = 1 - plan.variance / unit.variance
        assert any(f"reach {gain:.1%} less variance than unit weights at the same budget" in a for a in plan.advice)
        unit, plan = (stack.allocate(w, target_variance=unit.variance) for w in ("unit", "optimal"))
        gain = 1 - plan.cost / unit.cost
        assert any(f"cost {gain:.1%} less than unit weights for the same target" in a for a in plan.advice)

    @pytest.mark.parametrize("goal", [{"budget": 1e5}, {"target_variance": 1e-4}])
    def test_a_gain_below_a_percent_is_not_given_a_number(self, goal):
        plan = optimal_allocation(
            [4, 1e-4], [1, 3], covariance=[[4, 4], [4, 4.0001]], weights="optimal", **goal
        )
        [sentence] = [a for a in plan.advice if "Control-variate" in a]
        assert sentence.endswith("gain less than 1% over unit weights.")

    @pytest.mark.parametrize("goal", [{"budget": 9}, {"target_variance": 0.1}])
    def test_of_one_level_need_no_words(self, goal):
        assert not any("weights" in a for a in optimal_allocation([4.0], [2.0], weights="optimal", **goal).advice)

    def test_need_a_covariance(self):
        with pytest.raises(ValueError, match='covariance, of .*with weights="optimal"; got None'):
            optimal_allocation([4, 1], [1, 3], budget=16, weights="optimal")
        with pytest.raises(ValueError, match='weights "unit" or "optimal"; got 1'):
            optimal_allocation([4, 1], [1, 3], budget=16, weights=1)


class TestAgreement:
    @pytest.mark.parametrize(
        ("variances", "joint", "message"),
        [
            ([4, 1], [[4, 0], [0, 4]], "for level 1 the variance is 1, and the covariance says 8"),
            ([5, 1], [[4, 3.5], [3.5, 4]], "for level 0 the variance is 5, and the covariance says 4"),
            ([4, 1], [[1, 0.875], [0.875, 1]], "for level 0"),  # correlations
            ([[4, 1], [4, 2]], [[[4, 3.5], [3.5, 4]]] * 2, "for level 1 of output 1 the variance is 2"),
        ],
    )
    def test_variances_that_contradict_the_covariance_are_refused(self, variances, joint, message):
        with pytest.raises(ValueError, match=message):
            optimal_allocation(variances, [1, 3], covariance=joint, budget=100)

    @given(stack=stacks, seed=st.integers(0, 10**6))
    @settings(max_examples=40, deadline=None)
    def test_the_other_divisor_is_let_pass_and_never_worse(self, stack, seed):
        rows = 64  # from 50 on, n and n - 1 are alike enough
        variances = stack.variances * (rows - 1) / rows
        arguments = {"covariance": stack.covariance, "budget": 100 * stack.pair_costs.sum()}
        plan = optimal_allocation(variances, stack.costs, **arguments)
        assert plan.weighted_variance <= plan.variance
        assert math.isfinite(plan.weighted_variance)
        better = optimal_allocation(variances, stack.costs, weights="optimal", **arguments)
        assert better.variance <= plan.variance
