"""Theorem 3: the bounds for each partial derivative of the loss in the parameters."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

from theory_checks.bounds import ALL, JUMPS, check_bounds, gradient_bounds, poincare_bound
from theory_checks.integrands import Gradient
from theory_checks.measuring import measure
from theory_checks.scaling import difference_slope
from theory_checks.stacks import problems, random_network
from theory_checks.testing import known_constants, properties, two_levels

ROWS = 600
STACKS = {"levels": (2, 3), "coupled": None, "gap": (1e-3, 1.0)}


@pytest.mark.slow
@properties(25)
@given(problem=problems(density=("mdn", "maf", "nsf"), **STACKS), seed=st.integers(0, 2**32 - 1))
def test_poincare_bound_holds_for_every_parameter_of_a_network(problem, seed):
    stack, density = problem
    options = {"rows": ROWS, "seed": seed, **known_constants(stack, "npe")}
    checks = poincare_bound(measure(stack, Gradient(density, "npe", most=60, seed=seed), **options))
    assert not [str(check) for check in checks if check.verdict == "violated"]
    assert any(check.verdict != "not applicable" for check in checks)


@properties(15)
@given(problem=problems(density="mdn", **STACKS))
def test_every_parameter_of_a_smooth_network_has_a_bound(problem):
    stack, density = problem
    checks = gradient_bounds(stack, density, rows=200, **known_constants(stack, "npe"))
    assert {check.verdict for check in checks if check.bound == "P"} <= {"holds", "within error"}


def test_derivatives_in_parameters_before_a_relu_jump_and_have_no_bound():
    """As functions of v they are steps: theorem 3 does not apply, and taken all the same its bound is violated."""
    stack, density = two_levels(0.5), random_network(1, 1, kind="maf", seed=0, scale=0.1)
    rows = measure(stack, Gradient(density, "npe", most=200), rows=2000)
    refused = [check for check in poincare_bound(rows) if check.verdict == "not applicable"]
    assert refused
    assert {check.reason for check in refused} == {JUMPS}
    blind = poincare_bound(replace(rows, jumps=torch.zeros_like(rows.jumps)))
    assert any(check.verdict == "violated" for check in blind)
    broken = {check.component for check in blind if check.verdict == "violated"}
    assert broken <= {check.component for check in refused} | {ALL}


@pytest.mark.slow
def test_derivatives_that_jump_fall_at_half_the_rate():
    """Their variance is as the level difference itself, not as its square: a share of rows crosses a step."""
    density = random_network(1, 1, kind="maf", seed=0, scale=0.1)
    rows = measure(two_levels(0.5), Gradient(density, "npe", most=200), rows=4000)
    jumping = rows.jumps > 0
    steps = replace(rows, integrand=_Some(rows.integrand, jumping))
    smooth = replace(rows, integrand=_Some(rows.integrand, ~jumping))
    assert difference_slope(steps, 1).value < 1.5
    assert difference_slope(smooth, 1).value > 1.9


class _Some:
    """Some of an integrand's components."""

    def __init__(self, integrand, chosen):
        self._integrand, self._chosen = integrand, chosen

    def values(self, theta, x):
        return self._integrand.values(theta, x)[:, self._chosen]


@properties(60)
@given(problem=problems(estimator="nle", density="gaussian", **STACKS), seed=st.integers(0, 2**32 - 1))
def test_all_bounds_hold_for_every_parameter_of_a_gaussian(problem, seed):
    stack, density = problem
    checks = gradient_bounds(stack, density, rows=ROWS, seed=seed, estimator="nle", **known_constants(stack, "nle"))
    parameters = sum(parameter.numel() for parameter in density.parameters())
    assert len(checks) == 3 * len(stack) * (parameters + 1)
    assert not [str(check) for check in checks if check.verdict not in ("holds", "within error")]
    thirds = [checks[part * len(checks) // 3: (part + 1) * len(checks) // 3] for part in range(3)]
    for p, s, t in zip(*thirds, strict=True):
        assert p.component == s.component == t.component
        assert p.value <= s.value * (1 + 1e-9) + 1e-300
        assert s.value <= t.value * (1 + 1e-9) + 1e-300


def test_variances_of_all_parameters_add_up():
    stack = two_levels(0.5)
    density = random_network(1, 1, kind="mdn", seed=0)
    checks = poincare_bound(measure(stack, Gradient(density, "npe", most=10_000), rows=200))
    for level in range(2):
        own = [check for check in checks if check.level == level]
        assert own[-1].component == "all parameters"
        assert abs(sum(check.estimate for check in own[:-1]) / own[-1].estimate - 1) < 1e-9
        assert abs(sum(check.value for check in own[:-1]) / own[-1].value - 1) < 1e-9


def test_components_are_derivatives_of_the_loss():
    """The variance of one of them is that of finite differences of the loss in that parameter."""
    stack = two_levels(0.5)
    density = random_network(1, 1, kind="nsf", seed=3)
    integrand = Gradient(density, "npe", most=10, seed=1)
    rows = measure(stack, integrand, rows=100)
    x = rows.outputs[1]
    for index, name in enumerate(integrand.names):
        tensor, _, place = name.rpartition("[")
        place = int(place[:-1])
        losses = []
        for step in (1e-5, -1e-5):
            moved = {key: value.detach().clone() for key, value in density.named_parameters()}
            moved[tensor].view(-1)[place] += step
            losses.append(-functional_call(_Call(density), {f"density.{k}": v for k, v in moved.items()},
                                           (rows.theta, x)).detach())
        slope = (losses[0] - losses[1]) / 2e-5
        assert torch.allclose(slope, rows.values[1, :, index], atol=1e-4 * float(slope.abs().max()) + 1e-8)


class _Call(torch.nn.Module):
    def __init__(self, density):
        super().__init__()
        self.density = density

    def forward(self, theta, x):
        return self.density.log_prob(theta, x)


def test_half_the_constants_of_a_parameter_fail():
    """A negative control: with constants that are wrong by far, some parameter violates its bound."""
    stack = two_levels(0.5)
    rows = measure(stack, Gradient(random_network(1, 1, kind="mdn", seed=0), "npe"), rows=500, theta_constant=1e-4,
                   noise_constant=1e-4)
    assert any(check.verdict == "violated" for check in check_bounds(rows))
