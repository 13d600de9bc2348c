r"""Everything found for one density."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from theory_checks.assumptions import Assumption, check_assumptions
from theory_checks.bounds import Check, check_bounds
from theory_checks.measuring import Measured
from theory_checks.scaling import Slope, difference_slope, sample_size_slope
from theory_checks.stabilising import AdjustedGradient, adjusted_gradient

__all__ = ["Section", "make_section"]


@dataclass(frozen=True)
class Section:
    r"""What was found for one density.

    Args:
        density: Its name.
        assumption: A3.
        checks: Bounds on the loss.
        sample_slopes: Slope against rows, of each level.
        difference_slopes: Slope against the level difference, of each level above 0.
        gradients: Bounds on derivatives in the parameters; those of all parameters together.
        gradient_slopes: Slope of their variance against the level difference, of each level above 0.
        parameters: How many were looked at, in how many of them the derivative jumps, and how many violate a bound.
        worst_parameter: Largest ratio of variance and bound (P) among parameters.
        adjusted: What adjustments do to the gradient of a step.
    """

    density: str
    assumption: Assumption
    checks: tuple[Check, ...]
    sample_slopes: tuple[Slope, ...] = ()
    difference_slopes: tuple[Slope, ...] = ()
    gradients: tuple[Check, ...] = ()
    gradient_slopes: tuple[Slope, ...] = ()
    parameters: tuple[int, int, int] = (0, 0, 0)
    worst_parameter: float = math.nan
    adjusted: tuple[AdjustedGradient, ...] = ()

    def of(self, bound: str) -> list[Check]:
        """Checks of one bound; `"S"` for (S0) and (Sl)."""
        return [check for check in self.checks if check.bound.startswith(bound)]


def make_section(name: str, loss: Measured, gradient: Measured | None, n: tuple[int, ...], seed: int) -> Section:
    """Everything about one density, from rows measured with its loss, and with its gradient where it is asked for."""
    levels = range(len(loss.stack))
    checks = check_bounds(loss, n=n)
    section = Section(
        name, check_assumptions(loss, seed=seed)[2], tuple(checks),
        tuple(sample_size_slope(loss, each) for each in levels),
        tuple(difference_slope(loss, each, seed=seed) for each in levels[1:]),
    )  # fmt: skip
    if gradient is None:
        return section
    found = check_bounds(gradient, n=n)
    names = set(gradient.integrand.names) if gradient.integrand is not None else set()
    together = tuple(check for check in found if check.component not in names)
    single = [check for check in found if check.component in names and check.verdict != "not applicable"]
    worst = max((check.ratio for check in single if check.bound == "P"), default=math.nan)
    small = tuple(min(size, gradient.rows) for size in n)
    ways: list[dict[str, Any]] = [{}, {"rescale": True}, {"project": True}]
    adjusted = () if len(levels) == 1 else tuple(adjusted_gradient(gradient, small, seed=seed, **way) for way in ways)
    counts = len(names), int((gradient.jumps > 0).sum()), sum(check.verdict == "violated" for check in single)
    slopes = tuple(difference_slope(gradient, each, seed=seed) for each in levels[1:])
    return replace(section, gradients=together, gradient_slopes=slopes, parameters=counts, worst_parameter=worst,
                   adjusted=adjusted)
