r"""Everything found for one density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from theory_checks.assumptions import Assumption, check_assumptions
from theory_checks.bounds import Check, check_bounds
from theory_checks.fitting import Candidate
from theory_checks.measuring import Measured
from theory_checks.poincare import Law
from theory_checks.scaling import Slope, difference_slope, sample_size_slope
from theory_checks.stabilising import AdjustedGradient, adjusted_gradient

__all__ = ["Section", "applicable", "make_section", "relative_error"]


@dataclass(frozen=True)
class Section:
    r"""What was found for one density.

    Args:
        density: Its name.
        assumption: A3.
        checks: Bounds on the loss.
        laws: Of theta and of the noise, whose constants the bounds have.
        rows: Rows that the loss was measured at.
        fitted_to_few: Rows it was fitted to and numbers of a condition, where the former are fewer than ten times the
            latter; empty otherwise.
        sample_slopes: Slope against rows, of each level.
        difference_slopes: Slope against the level difference, of each level above 0.
        gradients: Bounds on derivatives in the parameters; those of all parameters together.
        broken: Bounds on derivatives in single parameters that are violated.
        gradient_slopes: Slope of their variance against the level difference, of each level above 0.
        gradient_rows: Rows that derivatives were measured at.
        gradient_rows_wanted: Rows that were asked for.
        parameters: How many parameters were looked at.
        jumping: In how many of them the derivative jumps.
        violating: How many of them violate a bound.
        above: In how many of them a variance exceeds (P) by less than its error.
        worst_parameter: Largest ratio of variance and bound (P) among parameters.
        adjusted: What adjustments do to the gradient of a step.
    """

    density: str
    assumption: Assumption
    checks: tuple[Check, ...]
    laws: tuple[Law, ...] = ()
    rows: int = 0
    fitted_to_few: tuple[int, ...] = ()
    sample_slopes: tuple[Slope, ...] = ()
    difference_slopes: tuple[Slope, ...] = ()
    gradients: tuple[Check, ...] = ()
    broken: tuple[Check, ...] = ()
    gradient_slopes: tuple[Slope, ...] = ()
    gradient_rows: int = 0
    gradient_rows_wanted: int = 0
    parameters: int = 0
    jumping: int = 0
    violating: int = 0
    above: int = 0
    worst_parameter: float = math.nan
    adjusted: tuple[AdjustedGradient, ...] = ()

    def of(self, bound: str) -> list[Check]:
        """Checks of one bound; `"S"` for (S0) and (Sl)."""
        return [check for check in self.checks if check.bound.startswith(bound)]

    @property
    def every_check(self) -> tuple[Check, ...]:
        """Of the loss, of all parameters together, and of single ones that violate a bound."""
        return (*self.checks, *self.gradients, *self.broken)

    @property
    def violations(self) -> list[Check]:
        """Bounds that are violated."""
        return [check for check in self.every_check if check.verdict == "violated"]


def applicable(checks: Sequence[Check]) -> list[Check]:
    """Checks that say something."""
    return [check for check in checks if check.verdict != "not applicable"]


def relative_error(checks: Sequence[Check]) -> float:
    """Largest relative standard error of (P) or of the variance beside it; 0 where there are none."""
    pairs = [(error, number) for check in applicable(checks) if check.bound == "P"
             for error, number in ((check.value_error, check.value), (check.estimate_error, check.estimate))]
    return max((error / number for error, number in pairs if number > 0), default=0.0)


def make_section(
    candidate: Candidate, loss: Measured, gradient: Measured | None, n: tuple[int, ...], seed: int
) -> Section:  # fmt: skip
    """Everything about one density, from rows measured with its loss, and with its gradient where it is asked for."""
    levels = range(len(loss.stack))
    section = Section(
        candidate.name, check_assumptions(loss, seed=seed)[2], tuple(check_bounds(loss, n=n)),
        laws=(loss.theta_law, loss.noise_law), rows=loss.rows,
        fitted_to_few=(candidate.rows, candidate.numbers) if candidate.fitted_to_few else (),
        sample_slopes=tuple(sample_size_slope(loss, each) for each in levels),
        difference_slopes=tuple(difference_slope(loss, each, seed=seed) for each in levels[1:]),
    )  # fmt: skip
    if gradient is None:
        return section
    found = check_bounds(gradient, n=n)
    names = set(gradient.integrand.names) if gradient.integrand is not None else set()
    single = applicable([check for check in found if check.component in names])
    sharp = [check for check in single if check.bound == "P"]
    broken = tuple(check for check in single if check.verdict == "violated")
    small = tuple(min(size, gradient.rows) for size in n)
    ways: list[dict[str, Any]] = [{}, {"rescale": True}, {"project": True}]
    return replace(
        section,
        gradients=tuple(check for check in found if check.component not in names),
        broken=broken,
        gradient_slopes=tuple(difference_slope(gradient, each, seed=seed) for each in levels[1:]),
        gradient_rows=gradient.rows,
        gradient_rows_wanted=gradient.wanted,
        parameters=len(names),
        jumping=int((gradient.jumps > 0).sum()),
        violating=len({check.component for check in broken}),
        above=len({check.component for check in sharp if check.verdict == "within error"}),
        worst_parameter=max((check.ratio for check in sharp), default=math.nan),
        adjusted=() if len(levels) == 1 else tuple(adjusted_gradient(gradient, small, seed=seed, **way)
                                                   for way in ways),
    )
