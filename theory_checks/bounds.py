r"""The variance bounds of theorems 1 and 3 with their constants, held against Monte Carlo estimates.

A row is z = (theta, u), and g^l(z) = (G^l(theta, u), theta). Several draws at one theta are one row whose output holds
them all. K_P is the Poincaré constant of z, D the number of parameters, f^l = -log q(g^l) (or its derivative in a
parameter), h_l the mean of f^l - f^{l-1} over n_l rows.

.. math::
    (P)   &\quad \operatorname{Var} h_l \le \tfrac{K_P}{n_l} E|\nabla_z (f^l - f^{l-1})|^2 \\
    (S0)  &\quad \operatorname{Var} h_0 \le \tfrac{K_P}{n_0} \sqrt{E|\nabla g^0|^4} \sqrt{E|\nabla \log q(g^0)|^4} \\
    (Sl)  &\quad \operatorname{Var} h_l \le \tfrac{2 K_P}{n_l} \Big[ K_{Lip}^2 \sqrt{E|\nabla g^l|^4}
        + \sqrt{E|\nabla \log q(g^{l-1})|^4} \Big] |G^l - G^{l-1}|_{W14}^2 \\
    (T)   &\quad \text{the same with } E|\nabla g|^4 \le 2 (D^2 + |\nabla G|_{L4}^4), \quad
        E|\nabla \log q(g)|^4 \le 27 K_{grow}^4 (|G|_{L4}^4 + E|\theta|^4 + 1)

(T) has nothing of the density but its constants: it is theorem 1 as stated, and theorem 3 for derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mlsbi.levels import LevelStack
from theory_checks.integrands import Gradient, Loss
from theory_checks.measuring import Measured, measure
from theory_checks.samples import looks_infinite, mean_and_error

__all__ = [
    "ALL", "INFINITE", "JUMPS", "SIGMAS", "Check", "check_bounds", "gradient_bounds", "minimising_sizes", "numerators",
    "poincare_bound", "sobolev_bound", "theorem_bound",
]  # fmt: skip

ALL = "all parameters"
"""Component whose variance is that of all components together."""

INFINITE = "an expectation in the bound looks infinite (A2)"
"""Why a level has no bound."""

JUMPS = "it jumps as a function of theta and x (ReLU does, in its parameters), so that it has no weak derivative"
"""Why a component has no bound."""

SIGMAS = 4.0
"""Standard errors by which an estimate must exceed its bound to violate it."""

_SAMPLED_ERROR = 0.2  # of a Poincaré constant that was estimated from draws, which no standard error here knows of

Verdict = Literal["holds", "within error", "violated", "not applicable"]


@dataclass(frozen=True)
class Check:
    r"""A bound beside what it bounds.

    Args:
        bound: `"P"`, `"S0"`, `"Sl"` or `"T"`.
        level: Number of the level.
        name: The level's name.
        component: `"loss"`; a parameter's name; or `"all parameters"`, where variances are added up, or how many of
            them, where the derivatives in others jump.
        n: Rows of this level's term, n_l.
        value: The bound on Var h_l; NaN where it is not applicable.
        value_error: Its standard error.
        estimate: Monte Carlo estimate of Var h_l.
        estimate_error: Its standard error.
        verdict: Whether the estimate is below the bound, above it by less than the errors allow, or violates it.
        reason: Why it is not applicable, or what was violated.
    """

    bound: Literal["P", "S0", "Sl", "T"]
    level: int
    name: str
    component: str
    n: int
    value: float
    value_error: float
    estimate: float
    estimate_error: float
    verdict: Verdict
    reason: str = ""

    @property
    def ratio(self) -> float:
        """Estimate over bound; 0 where both vanish."""
        if self.estimate == 0 and self.value == 0:
            return 0.0
        return self.estimate / self.value if self.value else math.inf

    def __str__(self) -> str:
        head = f"({self.bound}) level {self.level} '{self.name}', {self.component}, n = {self.n}: "
        if self.verdict == "not applicable":
            return f"{head}not applicable: {self.reason}"
        return (f"{head}Var h = {self.estimate:.3g} +- {self.estimate_error:.1g}, bound {self.value:.3g} +- "
                f"{self.value_error:.1g}, ratio {self.ratio:.3g}: {self.verdict}")


def check_bounds(
    stack: LevelStack | Measured, density: Any = None, n: Sequence[int] | None = None, **options: Any
) -> list[Check]:  # fmt: skip
    r"""All bounds of theorem 1 at once, from the same rows.

    Args:
        stack: A stack, or rows that `measure` gave for it.
        density: Has `log_prob(input, condition)`; or a function `log_q(theta, x)`; or a fitted `NPE` or `NLE`. Not
            needed beside rows that were measured.
        n: Rows of each term, n_0 .. n_L; 1 each when left out.
        **options: As of `measure` (rows, seed, estimator, ...), and `sigmas`, see `SIGMAS`.

    Returns:
        A check per bound and level.

    Raises:
        ValueError: If n does not have one positive number per level, or options are out of range.

    Example:
        >>> from mlsbi import tasks
        >>> from theory_checks.densities import AffineGaussian
        >>> task = tasks.get("ou")
        >>> gaussian = AffineGaussian(torch.zeros(3, 5), torch.zeros(3), torch.zeros(3))
        >>> checks = check_bounds(task.stack, gaussian, n=(1000, 100), rows=2000, seed=0)
        >>> {check.verdict for check in checks}
        {'holds'}
    """
    measured, n, sigmas = _ready(stack, density, n, options)
    return [*poincare_bound(measured, n=n, sigmas=sigmas), *sobolev_bound(measured, n=n, sigmas=sigmas),
            *theorem_bound(measured, n=n, sigmas=sigmas)]


def gradient_bounds(
    stack: LevelStack, density: Any, n: Sequence[int] | None = None, *, parameters: int = 200, rows: int = 2000,
    seed: int = 0, sigmas: float = SIGMAS, **options: Any,
) -> list[Check]:  # fmt: skip
    r"""All bounds for the derivatives of the loss in a network's parameters (theorem 3).

    Args:
        stack: A stack.
        density: An `nn.Module` with parameters.
        n: Rows of each term; 1 each when left out.
        parameters: How many parameters to look at; so many at random where there are more.
        rows: Rows to run.
        seed: Of everything random.
        sigmas: Standard errors that a violation takes.
        **options: As of `measure`.

    Returns:
        Per bound and level a check of each parameter, and behind them one of all parameters, variances added up.
        Derivatives that jump, as those in most parameters of a network of ReLUs do, have no bound, and no part in it.
    """
    integrand = Gradient(density, options.get("estimator", "npe"), most=parameters, seed=seed)
    measured = measure(stack, integrand, rows=rows, seed=seed, **options)
    return check_bounds(measured, n=n, sigmas=sigmas)


def poincare_bound(
    stack: LevelStack | Measured, density: Any = None, n: Sequence[int] | None = None, **options: Any
) -> list[Check]:  # fmt: skip
    """(P) of every level, the sharp bound; arguments and errors as of `check_bounds`."""
    measured, n, sigmas = _ready(stack, density, n, options)
    constant = measured.law.constant
    if measured.problem or constant is None:
        return _refused(measured, n, lambda level: "P", measured.problem or measured.law.reason)
    refused = _refused(measured, n, lambda level: "P", INFINITE)
    found = []
    for level, difference in enumerate(measured.differences):
        # Of the terms that are subtracted, whose difference may look odd where it is tiny.
        if any(looks_infinite(rows.sum(1).sqrt(), 2) for rows in measured.level_slopes[max(level - 1, 0):level + 1]):
            found.append(refused[level])
            continue
        terms = constant * measured.slopes[level]
        found += _compare("P", level, measured, n, difference, terms.mean(0), terms, sigmas)
    return found


def sobolev_bound(
    stack: LevelStack | Measured, density: Any = None, n: Sequence[int] | None = None, **options: Any
) -> list[Check]:  # fmt: skip
    """(S0) of level 0 and (Sl) of those above, with measured moments of the density's derivative; as `check_bounds`."""
    measured, n, sigmas = _ready(stack, density, n, options)

    def moments(level: int, growth: Tensor) -> tuple[Tensor, Tensor]:
        return measured.joint_fourth[level][:, None], measured.density_fourth[max(level - 1, 0)]

    return _smooth_bound(measured, n, sigmas, lambda level: "Sl" if level else "S0", moments)


def theorem_bound(
    stack: LevelStack | Measured, density: Any = None, n: Sequence[int] | None = None, **options: Any
) -> list[Check]:  # fmt: skip
    """(T) of every level: theorem 1, or 3 for derivatives, with explicit constants; as `check_bounds`."""
    measured, n, sigmas = _ready(stack, density, n, options)

    def moments(level: int, growth: Tensor) -> tuple[Tensor, Tensor]:
        size = measured.output_fourth[max(level - 1, 0)] + measured.theta_fourth + 1
        dim = measured.theta.shape[1]
        return (2 * (dim**2 + measured.gradient_fourth[level]))[:, None], 27 * growth**4 * size[:, None]

    return _smooth_bound(measured, n, sigmas, lambda level: "T", moments)


def numerators(checks: Sequence[Check]) -> list[float]:
    """What a bound would be at n_l = 1, level by level: the V_l of theorem 2."""
    return [check.value * check.n for check in checks]


def minimising_sizes(numerators: Sequence[float], pair_costs: Sequence[float], budget: float) -> tuple[float, ...]:
    r"""Theorem 2: rows that minimise the sum of the bounds under a budget, as real numbers.

    .. math:: n_l = \text{budget} \frac{\sqrt{B_l / C_l}}{\sum_k \sqrt{B_k C_k}}

    `mlsbi.optimal_allocation` gives the integers.

    Args:
        numerators: B_l, the bounds at n_l = 1, shape `(L + 1,)`.
        pair_costs: C_l, cost of one row of each level's term, shape `(L + 1,)`.
        budget: Total cost.

    Example:
        >>> minimising_sizes([4.0, 1.0], [1.0, 4.0], budget=16.0)
        (8.0, 2.0)
    """
    total = sum(math.sqrt(b * c) for b, c in zip(numerators, pair_costs, strict=True))
    return tuple(budget * math.sqrt(b / c) / total for b, c in zip(numerators, pair_costs, strict=True))


def _ready(
    stack: LevelStack | Measured, density: Any, n: Sequence[int] | None, options: dict[str, Any]
) -> tuple[Measured, tuple[int, ...], float]:
    """Rows, sizes and the width of a violation, checked."""
    sigmas = float(options.pop("sigmas", SIGMAS))
    if isinstance(stack, Measured):
        if density is not None or options:
            raise ValueError("Expected no density and no options beside rows that are measured already.")
        measured = stack
    else:
        if density is None:
            raise ValueError("Expected a density: check_bounds(stack, density, n).")
        n = _sizes(n, len(stack))
        measured = measure(stack, Loss(density, options.get("estimator", "npe")), **options)
    if measured.integrand is None:
        raise ValueError("Expected rows that were measured with an integrand: measure(stack, Loss(density, ...)).")
    return measured, _sizes(n, len(measured.stack)), sigmas


def _sizes(n: Sequence[int] | None, levels: int) -> tuple[int, ...]:
    sizes = tuple(n) if n is not None else (1,) * levels
    if len(sizes) != levels or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"Expected {levels} whole numbers of at least 1 as n, one per level; got {list(sizes)}.")
    return sizes


def _smooth_bound(
    measured: Measured,
    n: tuple[int, ...],
    sigmas: float,
    label: Callable[[int], Literal["S0", "Sl", "T"]],
    moments: Callable[[int, Tensor], tuple[Tensor, Tensor]],
) -> list[Check]:
    """Bounds by Hölder's inequality from fourth moments of g and of the density's derivative, given row by row."""
    constant, integrand = measured.law.constant, measured.integrand
    if measured.problem or constant is None:
        return _refused(measured, n, label, measured.problem or measured.law.reason)
    if integrand is None or integrand.growth is None or integrand.lipschitz is None:
        return _refused(measured, n, label, "no growth and Lipschitz constants of the density are known (A3)")
    refused = _refused(measured, n, label, INFINITE)
    found = []
    for level, difference in enumerate(measured.differences):
        own = slice(max(level - 1, 0), level + 1)
        used = (*measured.output_fourth[own], *measured.gradient_fourth[own], *measured.density_fourth[own].sum(2))
        if any(looks_infinite(rows**0.25, 4) for rows in used):
            found.append(refused[level])
            continue
        joint, density = moments(level, integrand.growth)
        root_joint, root_density = joint.mean(0).sqrt(), density.mean(0).sqrt()
        # Rows' influences on the roots, for the standard error of the bound.
        of_joint, of_density = _halved(joint, root_joint), _halved(density, root_density)
        if level == 0:
            value = constant * root_joint * root_density
            rows = constant * (of_joint * root_density + of_density * root_joint)
        else:
            norm = (measured.difference_fourth[level - 1] + measured.difference_gradient_fourth[level - 1])[:, None]
            root_norm = norm.mean(0).sqrt()
            bracket = integrand.lipschitz**2 * root_joint + root_density
            value = 2 * constant * bracket * root_norm
            rows = 2 * constant * ((integrand.lipschitz**2 * of_joint + of_density) * root_norm
                                   + bracket * _halved(norm, root_norm))
        found += _compare(label(level), level, measured, n, difference, value, rows, sigmas)
    return found


def _halved(rows: Tensor, root: Tensor) -> Tensor:
    """Each row's influence on the root of the mean."""
    return (rows - rows.mean(0)) / (2 * root).clamp_min(1e-300)


def _compare(
    bound: Literal["P", "S0", "Sl", "T"],
    level: int,
    measured: Measured,
    n: tuple[int, ...],
    difference: Tensor,
    value: Tensor,
    rows: Tensor,
    sigmas: float,
) -> list[Check]:
    """Holds variances of `difference` `(rows, components)` against bounds at n = 1, whose influences are `rows`."""
    centred = (difference - difference.mean(0)).square()
    count = len(difference)
    estimate, estimate_error = mean_and_error(centred)
    estimate, rows = estimate * count / (count - 1), rows - rows.mean(0)
    # Differences of one row enter both, so that their error is that of the difference.
    spread = mean_and_error(centred - rows)[1]
    columns = [value, rows.std(0) / count**0.5, estimate, estimate_error, spread]
    names, jumps = list(measured.integrand.names) if measured.integrand is not None else [], measured.jumps.tolist()
    if len(names) > 1:
        smooth = measured.jumps == 0
        parts = [part[:, smooth].sum(1) for part in (rows, centred, centred - rows)]
        errors = [mean_and_error(part)[1] for part in parts]
        added = [value[smooth].sum(), errors[0], estimate[smooth].sum(), errors[1], errors[2]]
        columns = [torch.cat([column, one[None]]) for column, one in zip(columns, added, strict=True)]
        kept = int(smooth.sum())
        names.append(ALL if kept == len(names) else f"{kept} of {len(names)} parameters")
        jumps.append(0 if kept else 1)
    doubt = _SAMPLED_ERROR if measured.law.source == "sampled" else 0.0
    found = []
    for index, component in enumerate(names):
        top, top_error, middle, middle_error, error = (float(column[index]) for column in columns)
        excess = middle - top
        # Equal levels give zeros, and rounding of the losses they are differences of.
        slack = sigmas * error + 1e-12 * abs(middle) + doubt * top
        verdict: Verdict = "holds" if excess <= 0 else "within error" if excess <= slack else "violated"
        reason = "" if verdict != "violated" else f"by {excess / error:.1f} standard errors" if error else "exactly"
        if jumps[index]:
            top, top_error, verdict, reason = math.nan, math.nan, "not applicable", JUMPS
        found.append(Check(bound, level, measured.stack.names[level], component, n[level], top / n[level],
                           top_error / n[level], middle / n[level], middle_error / n[level], verdict, reason))
    return found


def _refused(
    measured: Measured, n: tuple[int, ...], label: Callable[[int], Literal["P", "S0", "Sl", "T"]], reason: str
) -> list[Check]:
    """Checks that say why there are none; the estimate is there where rows are."""
    component = "loss" if measured.integrand is None or len(measured.integrand.names) == 1 else ALL
    blank = Check("P", 0, "", component, 1, math.nan, math.nan, math.nan, math.nan, "not applicable", reason)
    found = []
    for level, name in enumerate(measured.stack.names):
        estimate, error = math.nan, math.nan
        if not measured.problem:
            rows = measured.differences[level]
            centred = (rows - rows.mean(0)).square().sum(1) * len(rows) / (len(rows) - 1)
            estimate, error = (float(number) / n[level] for number in mean_and_error(centred))
        found.append(replace(blank, bound=label(level), level=level, name=name, n=n[level], estimate=estimate,
                             estimate_error=error))
    return found
