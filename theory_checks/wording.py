r"""What was found, in sentences and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.levels import LevelStack
from theory_checks.bounds import Check, numerators
from theory_checks.poincare import Law
from theory_checks.scaling import Slope
from theory_checks.sections import Section

__all__ = ["describe_law", "describe_plan", "sentences", "table"]

_ALIKE = 4.0  # times that the bound's looseness may differ between levels for plans by it to be good


def sentences(section: Section) -> list[str]:
    """What a section means."""
    found = []
    stated = [check for check in section.checks if check.verdict != "not applicable"]
    violated = [check for check in (*section.checks, *section.gradients) if check.verdict == "violated"]
    for check in violated:
        found.append(f"({check.bound}) is VIOLATED at '{check.name}' ({check.component}) {check.reason}. The "
                     "inequality is a theorem, so that one of its assumptions fails here: the law of the noise, the "
                     "derivatives, or finite moments.")
    if stated and not violated:
        found.append("Every bound that applies holds.")
    sharp = [1 / check.ratio for check in section.of("P") if check.verdict != "not applicable" and check.ratio > 0]
    if sharp:
        worth = ("it may stand in for the variance in a plan" if max(sharp) / min(sharp) < _ALIKE else
                 "levels differ so much in this that sizes should be planned by variances")
        found.append(f"(P) is {_range(sharp)} times the variance" + (f": {worth}." if len(sharp) > 1 else "."))
    rough = [1 / check.ratio for check in section.of("T") if check.verdict != "not applicable" and check.ratio > 0]
    if rough:
        found.append(f"(T), theorem 1 with explicit constants, is {_range(rough)} times the variance: it proves rates, "
                     "not sizes.")
    for reason in dict.fromkeys(check.reason for check in section.checks if check.verdict == "not applicable"):
        refused = [check for check in section.checks if check.reason == reason]
        bounds = ", ".join(dict.fromkeys(f"({check.bound})" for check in refused))
        names = dict.fromkeys(check.name for check in refused)
        levels = "" if len(names) == len(section.sample_slopes) else f" of {', '.join(map(repr, names))}"
        found.append(f"{bounds}{levels}: not applicable, {reason}.")
    if section.sample_slopes:
        exponents = ", ".join(map(str, section.sample_slopes))
        agree = all(slope.agrees is not False for slope in section.sample_slopes)
        found.append(f"Variances fall as n to the power {exponents} (theory: -1)"
                     + ("." if agree else ", which is not what independent rows do: does a row depend on another?"))
    for slope in section.difference_slopes:
        found.append(_of_difference(slope))
    looked_at, jumping, broken = section.parameters
    if looked_at:
        held = f"{broken} of {looked_at} parameters violate a bound" if broken else "no parameter violates a bound"
        if not any(check.verdict != "not applicable" for check in section.gradients):
            held = "no bound is stated"
        sharp = [1 / check.ratio for check in section.gradients if check.bound == "P" and check.ratio > 0]
        told = f"Theorem 3, derivatives in {looked_at} parameters: {held}"
        if sharp:
            told += (f"; (P) is {_range(sharp)} times their variance, at least {1 / section.worst_parameter:.2g} times "
                     "for each")
        found.append(f"{told}.")
    if jumping:
        rates = ", ".join(str(slope) for slope in section.gradient_slopes)
        told = (f"Derivatives in {jumping} of them jump as functions of theta and x, as those of ReLU do: theorem 3 "
                "does not hold for these")
        if rates:
            told += f", and the variance of all derivatives grows as the level difference to the power {rates}, not 2"
        found.append(f"{told}.")
    if section.adjusted:
        found.append("A step's gradient at these sizes: " + "; ".join(map(str, section.adjusted)) + ".")
    return found


def _of_difference(slope: Slope) -> str:
    if slope.reason:
        return f"Level {slope.level}: {slope.reason}."
    told = f"Level {slope.level}: the variance grows as the level difference to the power {slope} (theory: 2)"
    if slope.agrees is False:
        return told + ": the density is not smooth on that scale, so that theorem 1's rate is not reached."
    # What the line through the smallest shares says of the levels as they are.
    line = slope.variances[-1] / slope.at[-1] ** 2
    return told + f"; for the levels as they are it is {slope.variances[0] / line:.2g} times what that law says."


def describe_law(law: Law) -> str:
    """Its name, constant and where that is from."""
    constant = "no constant" if law.constant is None else f"K_P = {law.constant:.4g}"
    return f"{law.name}, {constant} ({law.reason})"


def _range(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"


def table(checks: Sequence[Check]) -> list[str]:
    """Lines with a row per check that applies; none where none does."""
    cells = [("bound", "of", "level", "n", "variance", "bound", "ratio", "verdict")]
    for check in checks:
        if check.verdict != "not applicable":  # which a sentence says
            cells.append((
                f"({check.bound})", check.component, check.name, f"{check.n}",
                f"{check.estimate:.3g} +- {check.estimate_error:.1g}", f"{check.value:.3g} +- {check.value_error:.1g}",
                f"{check.ratio:.2g}", check.verdict,
            ))  # fmt: skip
    if len(cells) == 1:
        return []
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells]


def describe_plan(stack: LevelStack, sections: Sequence[Section], n: tuple[int, ...]) -> str:
    """Theorem 2 with the numerators of (P) of the last density, beside sizes from measured variances."""
    checks = sections[-1].of("P")
    usable = all(check.verdict != "not applicable" and check.value > 0 and check.estimate > 0 for check in checks)
    if stack.row_costs is None or not usable or len(checks) == 1:
        return ""
    budget = sum(size * cost for size, cost in zip(n, stack.row_costs, strict=True))
    variances = [check.estimate * check.n for check in checks]
    options: dict[str, Any] = {"costs": stack.costs, "pair_costs": stack.row_costs, "budget": budget}
    by_bound, by_variance = optimal_allocation(numerators(checks), **options), optimal_allocation(variances, **options)
    reached = [sum(v / size for v, size in zip(variances, plan.n, strict=True)) for plan in (by_bound, by_variance)]
    loss = reached[0] / reached[1] - 1
    return (f"Theorem 2, at the cost of n = {n}: sizes that minimise the sum of the bounds (P) are {by_bound.n}, those "
            f"that minimise the measured variance {by_variance.n}; planning by the bound costs {max(loss, 0.0):.1%} of "
            "variance.")
