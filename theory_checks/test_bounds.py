"""Values of the bounds against closed forms, and what is said of them: verdicts, refusals, arguments."""

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Independent, Normal

from mlsbi import Level, LevelStack
from theory_checks.bounds import (
    ALL,
    INFINITE,
    JUMPS,
    Check,
    check_bounds,
    gradient_bounds,
    minimising_sizes,
    numerators,
    poincare_bound,
    sobolev_bound,
    theorem_bound,
)
from theory_checks.densities import AffineGaussian
from theory_checks.integrands import Loss
from theory_checks.measuring import Measured, measure
from theory_checks.poincare import normal

ROWS = 20_000
ROWS_OF_REPETITIONS = 2000
RELATIVE = 0.03  # of a bound's value; every factor and power that could be wrong changes some case by more
SIZES = (7, 3, 2)
LABELS = [("P", 0), ("P", 1), ("P", 2), ("S0", 0), ("Sl", 1), ("Sl", 2), ("T", 0), ("T", 1), ("T", 2)]


def prior_of(scale, dim):
    return Independent(Normal(torch.zeros(dim), torch.full((dim,), scale)), 1)


def normal_noise(dim):
    return lambda n, generator: torch.randn(n, dim, generator=generator)


class Affine:
    """Levels `G^l = a_l theta + b_l u` in `dim` equal coordinates and q(theta | x) = N(alpha x, exp(-2 lam)), exactly.

    In each coordinate theta is N(0, scale^2) and u standard normal. The residual theta - alpha x is c theta + d u with
    c = 1 - alpha a, d = -alpha b. For v = (c, d) the loss is p / 2 z'(v v')z with p = exp(2 lam), up to a constant.
    """

    def __init__(self, slopes, alpha, lam, *, dim=1, scale=1.0):
        self.slopes, self.alpha, self.lam, self.dim, self.scale = slopes, alpha, lam, dim, scale
        self.p = math.exp(2 * lam)
        self.constant = max(scale**2, 1.0)
        self.lipschitz = self.p * (1 + alpha**2)
        self.growth = self.p * math.sqrt(1 + alpha**2) * max(1.0, abs(alpha))
        self.fourth = dim * (dim + 2)  # E|v|^4 of a standard normal vector

    @property
    def stack(self):
        levels = [Level(f"run {index}", lambda theta, u, a=a, b=b: a * theta + b * u)
                  for index, (a, b) in enumerate(self.slopes)]
        return LevelStack(prior_of(self.scale, self.dim), normal_noise(self.dim), levels)

    @property
    def density(self):
        one = torch.eye(self.dim, dtype=torch.float64)
        return AffineGaussian(self.alpha * one, torch.zeros(self.dim), torch.full((self.dim,), self.lam))

    def form(self, level):
        """Matrix of the quadratic form f^l - f^(l-1) of one coordinate's (theta, u)."""
        total = torch.zeros(2, 2, dtype=torch.float64)
        for sign, each in ((1, level), (-1, level - 1)):
            if each >= 0:
                a, b = self.slopes[each]
                v = torch.tensor([1 - self.alpha * a, -self.alpha * b], dtype=torch.float64)
                total += sign * self.p / 2 * torch.outer(v, v)
        return total

    @property
    def covariance(self):
        return torch.diag(torch.tensor([self.scale**2, 1.0], dtype=torch.float64))

    def variance(self, level):
        """Of z'Qz: 2 tr (QC)^2 a coordinate."""
        product = self.form(level) @ self.covariance
        return self.dim * 2 * float((product @ product).trace())

    def poincare(self, level):
        """|2 Q z|^2 has mean 4 tr QCQ."""
        form = self.form(level)
        return self.constant * self.dim * 4 * float((form @ self.covariance @ form).trace())

    def outputs(self, a, b):
        """Root of E|a theta + b u|^4, and |grad|^2 of it."""
        return (a**2 * self.scale**2 + b**2) * math.sqrt(self.fourth), self.dim * (a**2 + b**2)

    def sobolev(self, level):
        _, gradient = self.outputs(*self.slopes[level])
        below = self.slopes[max(level - 1, 0)]
        residual, _ = self.outputs(1 - self.alpha * below[0], -self.alpha * below[1])
        # grad log q = -p r (1, -alpha), r the residual
        return self.joined(level, self.dim + gradient, self.p**2 * (1 + self.alpha**2) * residual)

    def theorem(self, level):
        _, gradient = self.outputs(*self.slopes[level])
        size, _ = self.outputs(*self.slopes[max(level - 1, 0)])
        theta = self.scale**4 * self.fourth
        return self.joined(level, math.sqrt(2 * (self.dim**2 + gradient**2)),
                           math.sqrt(27 * self.growth**4 * (size**2 + theta + 1)))

    def joined(self, level, joint, density):
        """From roots of E|grad g|^4 and of E|grad log q|^4."""
        if level == 0:
            return self.constant * joint * density
        (a, b), (a_below, b_below) = self.slopes[level], self.slopes[level - 1]
        function, gradient = self.outputs(a - a_below, b - b_below)
        norm = math.sqrt(function**2 + gradient**2)
        return 2 * self.constant * (self.lipschitz**2 * joint + density) * norm

    def exact(self, bound, level):
        return {"P": self.poincare, "T": self.theorem}.get(bound, self.sobolev)(level)


CASES = {
    "one dimension, K_Lip of 5": Affine([(0.7, 0.9), (1.0, 1.0), (1.1, 0.8)], 2.0, 0.0),
    "a flat density": Affine([(0.7, 0.9), (1.0, 1.0), (0.2, 1.4)], 0.3, -1.0),
    "a sharp density": Affine([(0.7, 0.9), (1.0, 1.0), (0.2, 1.4)], -0.6, 0.9),
    "wide theta": Affine([(0.7, 0.9), (0.9, 1.1), (0.2, 1.4)], 0.5, 0.6, scale=2.0),
    "narrow theta": Affine([(0.7, 0.9), (0.9, 1.1), (0.2, 1.4)], 0.5, 0.9, scale=0.4),
    "two dimensions": Affine([(0.3, 0.2), (0.4, 0.3), (0.1, 0.5)], 2.0, 0.1, dim=2, scale=1.5),
    "three dimensions": Affine([(0.1, 0.2), (0.3, 0.1), (0.1, 0.5)], 1.5, 0.4, dim=3),
    "five dimensions": Affine([(0.1, 0.1), (0.2, 0.1), (0.0, 0.2)], 0.4, 0.0, dim=5, scale=0.7),
}


@cache
def checks_of(name):
    case = CASES[name]
    return check_bounds(case.stack, case.density, SIZES, rows=ROWS, seed=1)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_closed_forms(name):
    case, checks = CASES[name], checks_of(name)
    assert [(check.bound, check.level) for check in checks] == LABELS
    for check in checks:
        exact = case.exact(check.bound, check.level) / SIZES[check.level]
        assert abs(check.value - exact) < 5 * check.value_error + 1e-12 * exact, f"{check}: {exact}"
        assert check.value == pytest.approx(exact, rel=RELATIVE), str(check)


@pytest.mark.parametrize("name", CASES)
def test_estimates_are_the_variances_in_closed_form(name):
    case = CASES[name]
    for check in checks_of(name):
        exact = case.variance(check.level) / SIZES[check.level]
        assert abs(check.estimate - exact) < 5 * check.estimate_error, f"{check}: {exact}"
        assert check.estimate == pytest.approx(exact, rel=0.1), str(check)
        assert check.verdict == "holds"
        assert check.ratio == pytest.approx(case.variance(check.level) / case.exact(check.bound, check.level), rel=0.1)


def test_constants_are_what_the_cases_say():
    for case in CASES.values():
        assert case.density.constants.lipschitz == pytest.approx(case.lipschitz)
        assert case.density.constants.growth == pytest.approx(case.growth)
    assert CASES["one dimension, K_Lip of 5"].lipschitz == 5


@pytest.mark.slow
def test_errors_are_those_of_repetitions():
    """Of bounds and of estimates, whose rows have heavy squares: over 60 seeds z has standard deviation 1."""
    case = CASES["one dimension, K_Lip of 5"]
    values, errors, estimates, estimate_errors = torch.tensor([
        [(check.value, check.value_error, check.estimate, check.estimate_error) for check in checks]
        for checks in (check_bounds(measured(case, seed)) for seed in range(60))
    ], dtype=torch.float64).permute(2, 0, 1)
    for found, error in ((values, errors), (estimates, estimate_errors)):
        for place, (bound, level) in enumerate(LABELS):
            if float(error[:, place].max()) > 0:
                ratio = float(error[:, place].mean() / found[:, place].std())
                assert 0.65 < ratio < 1.35, (bound, level, ratio)


def measured(case, seed):
    """Rows without asking again which laws the noise has."""
    return measure(case.stack, Loss(case.density, "npe"), rows=ROWS_OF_REPETITIONS, seed=seed, noise_constant=1.0)


@pytest.mark.parametrize(("scales", "noise", "constant"), [
    ((0.5, 0.3), None, 1.0), ((0.5, 3.0), None, 9.0), ((0.5, 3.0), 16.0, 16.0), ((0.5, 0.2), 0.01, 0.25),
])  # fmt: skip
def test_the_constant_is_the_largest_of_all_coordinates(scales, noise, constant):
    """(P) is the constant times the mean slope, which for f = 2 u + theta_0 + theta_1 is 6 in every row."""
    prior = Independent(Normal(torch.zeros(2), torch.tensor(scales)), 1)
    stack = LevelStack(prior, normal_noise(1), [Level("u", lambda theta, u: u)])
    check, = poincare_bound(stack, lambda theta, x: 2 * x[:, 0] + theta.sum(1), (4,), rows=2000, noise_constant=noise)
    assert check.value == pytest.approx(constant * 6 / 4)
    assert check.value_error == pytest.approx(0, abs=1e-12)


def test_bounds_alone_are_those_together():
    case = CASES["wide theta"]
    rows = measured(case, 0)
    alone = [*poincare_bound(rows, n=SIZES), *sobolev_bound(rows, n=SIZES), *theorem_bound(rows, n=SIZES)]
    assert alone == check_bounds(rows, n=SIZES)
    assert check_bounds(case.stack, case.density, SIZES, rows=ROWS_OF_REPETITIONS, noise_constant=1.0) == alone
    ones = check_bounds(rows)
    assert [check.value for check in ones] == pytest.approx(numerators(alone))
    assert [check.n for check in ones] == [1] * 9


def test_gradients_of_a_gaussian_mean():
    """The derivative in the shift is p times the residual: Var, (P), and Lipschitz 0, so (S) is without its first term.

    Its gradient in (theta, x) is p (1, -alpha): |.|^2 is constant, p K_Lip.
    """
    case = CASES["one dimension, K_Lip of 5"]
    checks = {(check.bound, check.level, check.component): check
              for check in gradient_bounds(case.stack, case.density, SIZES, rows=4000, seed=2)}
    assert len(checks) == 9 * 4
    for level, (a, b) in enumerate(case.slopes):
        below = case.slopes[level - 1] if level else (0.0, 0.0)
        square = case.alpha**2 * ((a - below[0]) ** 2 + (b - below[1]) ** 2)
        if level == 0:
            square = (1 - case.alpha * a) ** 2 + (case.alpha * b) ** 2
        tight = checks["P", level, "shift[0]"]
        assert tight.value == pytest.approx(case.p**2 * square / SIZES[level])
        assert abs(tight.estimate - tight.value) < 5 * tight.estimate_error  # linear functions attain (P)
        smooth = checks["Sl" if level else "S0", level, "shift[0]"]
        root = case.p**2 * (1 + case.alpha**2)
        function, gradient = case.outputs(a - below[0], b - below[1])
        exact = root * (1 + a**2 + b**2) if level == 0 else 2 * root * math.sqrt(function**2 + gradient**2)
        assert smooth.value == pytest.approx(exact / SIZES[level], rel=RELATIVE)


# Rows made by hand


def rows_of(values, slopes, *, names=("loss",), jumps=None, **changes):
    """A record of `values` and `slopes`, each `(L + 1, n, components)`, with normals' everything else and K_P = 1."""
    levels, n, components = values.shape
    shape = torch.randn(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64).square()
    stack = LevelStack(prior_of(1.0, 1), normal_noise(1),
                       [Level(f"run {index}", lambda theta, u: theta + u) for index in range(levels)])
    integrand = SimpleNamespace(names=names, growth=torch.full((components,), 2.0, dtype=torch.float64),
                                lipschitz=torch.full((components,), 3.0, dtype=torch.float64))
    each = shape.expand(levels, n)
    return Measured(**{
        "stack": stack, "integrand": integrand, "estimator": "npe", "theta_law": normal(), "noise_law": normal(),
        "smoothness": (), "wanted": n, "values": values, "slopes": slopes,
        "level_slopes": each[..., None].expand(levels, n, components),
        "density_fourth": each.square()[..., None].expand(levels, n, components), "output_fourth": each.square(),
        "gradient_square": each, "gradient_fourth": each.square(), "difference_fourth": each[1:].square(),
        "difference_gradient_fourth": each[1:].square(), "theta_fourth": shape.square(),
        "theta": shape.sqrt()[:, None], "jumps": torch.zeros(components) if jumps is None else torch.tensor(jumps),
        **changes,
    })  # fmt: skip


def gaussian_rows(n=5000, *, levels=1, components=1, seed=0):
    """Level by level independent differences of mean 0 and variance 1, exactly."""
    rows = torch.randn(levels, n, components, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows - rows.mean(1, keepdim=True)
    return (rows / rows.std(1, keepdim=True)).cumsum(0)


ERROR = math.sqrt(2 / 5000)  # of the variance of 5000 such rows


@pytest.mark.parametrize(("bound", "sigmas", "verdict"), [
    (2.0, 4.0, "holds"), (1.001, 4.0, "holds"), (0.999, 4.0, "within error"), (1 - 3 * ERROR, 4.0, "within error"),
    (1 - 3 * ERROR, 2.0, "violated"), (1 - 5 * ERROR, 4.0, "violated"), (1 - 5 * ERROR, 6.0, "within error"),
    (0.999, 0.0, "violated"), (0.5, 4.0, "violated"), (0.0, 4.0, "violated"),
])  # fmt: skip
def test_verdicts(bound, sigmas, verdict):
    values = gaussian_rows()
    check, = poincare_bound(rows_of(values, torch.full_like(values, bound)), n=(10,), sigmas=sigmas)
    assert (check.bound, check.level, check.name, check.component, check.n) == ("P", 0, "run 0", "loss", 10)
    assert check.value == pytest.approx(bound / 10)
    assert check.value_error == pytest.approx(0, abs=1e-12)
    assert check.estimate == pytest.approx(0.1)
    assert check.estimate_error == pytest.approx(ERROR / 10, rel=0.1)
    assert check.verdict == verdict
    assert check.ratio == (pytest.approx(1 / bound) if bound else math.inf)
    if verdict == "violated":
        told = float(check.reason.removeprefix("by ").removesuffix(" standard errors"))
        assert told == pytest.approx((1 - bound) / ERROR, rel=0.1, abs=0.1)
    else:
        assert check.reason == ""
    assert str(check).endswith(f": {verdict}")


@pytest.mark.parametrize(("bound", "verdict"), [(1.1, "holds"), (0.9, "within error"), (0.75, "violated")])
def test_a_constant_read_off_draws_may_be_a_fifth_too_small(bound, verdict):
    values = gaussian_rows()
    record = rows_of(values, torch.full_like(values, bound), noise_law=replace(normal(), source="sampled"))
    assert poincare_bound(record)[0].verdict == verdict
    assert poincare_bound(rows_of(values, torch.full_like(values, 0.9)))[0].verdict == "violated"


def test_without_any_error_a_violation_is_exact():
    values = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(100)[None, :, None]
    check, = poincare_bound(rows_of(values, torch.full_like(values, 0.5)))
    assert (check.verdict, check.reason) == ("violated", "exactly")
    assert check.estimate == pytest.approx(200 / 199)
    assert check.estimate_error == 0


def test_levels_that_add_nothing_hold_with_ratio_0():
    values = gaussian_rows().repeat(2, 1, 1)
    slopes = torch.stack([torch.full_like(values[0], 2.0), torch.zeros_like(values[0])])
    for bound in (poincare_bound, sobolev_bound, theorem_bound):
        check = bound(rows_of(values, slopes))[1]
        assert (check.estimate, check.verdict, check.ratio) == (0, "holds", 0)


def test_errors_of_the_same_rows_cancel():
    """A bound that is .98 of each row's square is violated, though both it and the estimate are far less certain."""
    values = gaussian_rows()
    slopes = 0.98 * values.square()
    check, = poincare_bound(rows_of(values, slopes))
    assert check.verdict == "violated"
    assert check.estimate - check.value < 2 * min(check.estimate_error, check.value_error)
    other = slopes[:, torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    assert poincare_bound(rows_of(values, other))[0].verdict == "within error"


@pytest.mark.parametrize("rows", [2, 3, 50])
def test_estimates_are_unbiased_sums_whatever_is_said_of_the_bound(rows):
    """With few rows n or n - 1 matters; the sum is that of the components, and the same where there is no bound."""
    values = torch.randn(2, rows, 3, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    exact = [values[0].var(0).sum(), (values[1] - values[0]).var(0).sum()]
    record = rows_of(values, torch.ones_like(values), names=("a", "b", "c"))
    none = replace(normal(), constant=None, source="none", reason="nobody knows")
    refused = rows_of(values, torch.ones_like(values), names=("a", "b", "c"), theta_law=none)
    for bound in (poincare_bound, sobolev_bound, theorem_bound):
        together = [check for check in bound(record, n=(5, 2)) if check.component == ALL]
        assert [check.estimate for check in together] == pytest.approx([float(exact[0]) / 5, float(exact[1]) / 2])
        blank = bound(refused, n=(5, 2))
        assert [check.component for check in blank] == [ALL, ALL]
        assert [check.estimate for check in blank] == pytest.approx([check.estimate for check in together])
        errors = [check.estimate_error for check in together]  # to n / (n - 1), far below an error's own error
        assert [check.estimate_error for check in blank] == pytest.approx(errors, rel=1.01 / (rows - 1))


def test_the_sum_of_components_is_a_check_of_its_own():
    values = gaussian_rows(components=3)
    slopes = torch.tensor([0.99, 2.0, 3.0], dtype=torch.float64).expand_as(values)
    checks = poincare_bound(rows_of(values, slopes, names=("a", "b", "c")), n=(2,))
    assert [check.component for check in checks] == ["a", "b", "c", ALL]
    assert [check.verdict for check in checks] == ["within error", "holds", "holds", "holds"]
    assert [check.value for check in checks] == pytest.approx([0.495, 1.0, 1.5, 2.995])
    assert [check.estimate for check in checks] == pytest.approx([0.5, 0.5, 0.5, 1.5])
    assert checks[3].estimate_error == pytest.approx(ERROR * math.sqrt(3) / 2, rel=0.1)


def test_a_small_excess_of_each_component_adds_up():
    """Components that are above their bound by 3 errors each are together above it by more than 4."""
    values = gaussian_rows(components=8)
    slopes = torch.full_like(values, 1 - 3 * ERROR)
    checks = poincare_bound(rows_of(values, slopes, names=tuple("abcdefgh")))
    assert [check.verdict for check in checks] == ["within error"] * 8 + ["violated"]


def test_components_that_jump_have_no_bound_and_no_part_in_the_sum():
    values = gaussian_rows(components=3)
    record = rows_of(values, torch.full_like(values, 2.0), names=("a", "b", "c"), jumps=[0, 3, 0])
    for bound in (poincare_bound, sobolev_bound, theorem_bound):
        checks = bound(record)
        assert [check.component for check in checks] == ["a", "b", "c", "2 of 3 parameters"]
        assert [check.verdict for check in checks] == ["holds", "not applicable", "holds", "holds"]
        assert checks[1].reason == JUMPS
        assert math.isnan(checks[1].value)
        assert math.isnan(checks[1].value_error)
        assert [check.estimate for check in checks] == pytest.approx([1.0, 1.0, 1.0, 2.0])
        assert checks[3].value == pytest.approx(checks[0].value + checks[2].value)


def test_where_all_components_jump_there_is_no_sum():
    values = gaussian_rows(components=2)
    record = rows_of(values, torch.full_like(values, 2.0), names=("a", "b"), jumps=[1, 1])
    assert {(check.verdict, check.reason) for check in check_bounds(record)} == {("not applicable", JUMPS)}


def test_without_a_constant_no_bound_applies_and_estimates_stay():
    values = gaussian_rows(levels=2)
    law = replace(normal(), name="odd", constant=None, source="none", reason="nobody knows its constant")
    checks = check_bounds(rows_of(values, torch.ones_like(values), noise_law=law), n=(10, 5))
    assert [(check.bound, check.level) for check in checks] == [("P", 0), ("P", 1), ("S0", 0), ("Sl", 1), ("T", 0),
                                                                ("T", 1)]
    for check in checks:
        assert check.verdict == "not applicable"
        assert "nobody knows its constant" in check.reason
        assert math.isnan(check.value)
        assert check.estimate == pytest.approx(1 / check.n)
        assert "not applicable: no constant for odd" in str(check)


def test_without_known_constants_of_the_density_only_p_applies():
    values = gaussian_rows(levels=2)
    record = rows_of(values, torch.full_like(values, 2.0))
    for missing in ("growth", "lipschitz"):
        integrand = SimpleNamespace(**{**vars(record.integrand), missing: None})
        for check in check_bounds(replace(record, integrand=integrand)):
            assert check.verdict == ("holds" if check.bound == "P" else "not applicable")
            assert check.bound == "P" or "(A3)" in check.reason


def test_what_could_not_be_measured_has_neither_bound_nor_estimate():
    record = rows_of(gaussian_rows(levels=2), torch.ones(2, 5000, 1, dtype=torch.float64))
    blank = Measured(record.stack, record.integrand, "npe", normal(), normal(), (), 100, problem="it jumps")
    checks = check_bounds(blank, n=(4, 2))
    assert len(checks) == 6
    for check in checks:
        assert (check.verdict, check.reason) == ("not applicable", "it jumps")
        assert math.isnan(check.estimate)
        assert math.isnan(check.value)


HEAVY = torch.rand(5000, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("heavy", range(4))
@pytest.mark.parametrize("name", ["level_slopes", "output_fourth", "gradient_fourth", "density_fourth"])
def test_heavy_levels_refuse_only_their_own_bounds(heavy, name):
    """Those of the level, whose rows are its own, and of the next, which takes its difference from it."""
    values = gaussian_rows(levels=4)
    record = rows_of(values, torch.full_like(values, 2.0))
    rows = getattr(record, name).clone()
    # Roots of slopes have tail index .5 and need a second moment; others' fourth roots have it, and need a fourth.
    tail = HEAVY ** -4 if name == "level_slopes" else HEAVY ** -8
    rows[heavy] = tail if rows.ndim == 2 else tail[:, None]
    found = check_bounds(replace(record, **{name: rows}))
    own = {"P"} if name == "level_slopes" else {"S", "T"}
    refused = {(check.bound[0], check.level) for check in found if check.verdict == "not applicable"}
    wanted = {(bound, level) for bound in own for level in (heavy, heavy + 1) if level < 4}
    assert refused == wanted
    assert {check.reason for check in found if check.verdict == "not applicable"} == {INFINITE}
    assert len(found) == 12
    assert [(check.bound[0], check.level) for check in found] == [(bound, level) for bound in "PST"
                                                                  for level in range(4)]
    assert all(check.estimate == pytest.approx(1, rel=1e-3) for check in found)


# Arguments

CASE = CASES["one dimension, K_Lip of 5"]
BOUNDS = [check_bounds, poincare_bound, sobolev_bound, theorem_bound]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("n", [(), (5,), (5, 5), (5, 5, 5, 5), (5, 5, 0), (5, -1, 5), (5, 5, 2.5), (5.0, 5, 5)])
def test_wrong_sizes_are_refused_before_anything_is_run(bound, n):
    def never(theta, u):
        raise AssertionError

    stack = LevelStack(prior_of(1.0, 1), normal_noise(1), [Level(f"run {index}", never) for index in range(3)])
    with pytest.raises(ValueError, match=r"Expected 3 whole numbers of at least 1 as n, one per level; got \["):
        bound(stack, CASE.density, n)


@pytest.mark.parametrize("bound", BOUNDS)
def test_wrong_sizes_are_refused_beside_rows(bound):
    values = gaussian_rows(levels=2)
    with pytest.raises(ValueError, match="Expected 2 whole numbers"):
        bound(rows_of(values, torch.ones_like(values)), n=(3,))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("options", [{"rows": 100}, {"seed": 1}, {"estimator": "nle"}, {"density": CASE.density}])
def test_nothing_stands_beside_rows_that_are_there(bound, options):
    values = gaussian_rows()
    with pytest.raises(ValueError, match="Expected no density and no options beside rows"):
        bound(rows_of(values, torch.ones_like(values)), **options)


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_stack_needs_a_density(bound):
    with pytest.raises(ValueError, match=r"Expected a density: check_bounds\(stack, density, n\)"):
        bound(CASE.stack, n=SIZES)


def test_rows_need_an_integrand():
    rows = measure(CASE.stack, rows=100, noise_constant=1.0)
    with pytest.raises(ValueError, match="measured with an integrand"):
        check_bounds(rows)


# Theorem 2


def test_sizes_that_minimise_the_sum_of_bounds():
    """Lagrange: every B_l / (n_l^2 C_l) is the same, and the budget is spent."""
    bounds, costs, budget = [5.0, 0.3, 0.02], [1.0, 9.0, 70.0], 1e4
    sizes = minimising_sizes(bounds, costs, budget)
    assert sum(size * cost for size, cost in zip(sizes, costs, strict=True)) == pytest.approx(budget)
    shadow = [bound / (size**2 * cost) for bound, size, cost in zip(bounds, sizes, costs, strict=True)]
    assert shadow == pytest.approx([shadow[0]] * 3)
    assert minimising_sizes([4.0, 1.0], [1.0, 4.0], 16.0) == (8.0, 2.0)
    assert minimising_sizes([3.0], [2.0], 10.0) == (5.0,)
    assert minimising_sizes([1.0, 0.0], [1.0, 1.0], 10.0) == (10.0, 0.0)


def test_as_many_costs_as_bounds_are_needed():
    with pytest.raises(ValueError, match="argument 2 is (shorter|longer)"):
        minimising_sizes([1.0, 2.0], [1.0], 10.0)


def test_numerators_are_bounds_of_one_row():
    check = Check("P", 0, "run 0", "loss", 8, 0.25, 0.1, 0.1, 0.1, "holds")
    assert numerators([check, replace(check, n=1)]) == [2.0, 0.25]
