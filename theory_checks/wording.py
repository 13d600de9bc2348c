r"""What was found, in sentences and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.levels import LevelStack
from theory_checks.bounds import Check, numerators
from theory_checks.poincare import Law
from theory_checks.scaling import Slope
from theory_checks.sections import Section, applicable, relative_error

__all__ = ["describe_law", "describe_plan", "sentences", "table"]

_ALIKE = 4.0  # times that the bound's looseness may differ between levels for plans by it to be good
_FEW = 0.3  # relative error beyond which numbers are too uncertain to plan by
_NAMED = 3  # parameters named in one sentence


def sentences(section: Section) -> list[str]:
    """What a section means."""
    return [*_of_fit(section), *_of_violations(section), *_of_bounds(section), *_of_rates(section),
            *_of_parameters(section)]


def _of_fit(section: Section) -> list[str]:
    if not section.fitted_to_few:
        return []
    rows, numbers = section.fitted_to_few
    return [f"It was fitted to {rows} rows of {numbers} numbers each, which is few: other rows would give another "
            "density."]


def _of_violations(section: Section) -> list[str]:
    """Every violated bound, single parameters together, and what may be the cause."""
    found = [f"({check.bound}) is VIOLATED at '{check.name}' ({check.component}) {check.reason}."
             for check in (*section.checks, *section.gradients) if check.verdict == "violated"]
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in section.broken:
        groups.setdefault((check.bound, check.name), []).append(check)
    for (bound, name), checks in groups.items():
        worst = sorted(checks, key=lambda check: -check.ratio)[:_NAMED]
        told = ", ".join(f"{check.component} {check.reason}" for check in worst)
        more = f" and {len(checks) - len(worst)} more" if len(checks) > len(worst) else ""
        found.append(f"({bound}) is VIOLATED at '{name}' in {_count(len(checks), 'single parameter')}: {told}{more}.")
    if not found:
        return ["Every bound that applies holds."] if applicable(section.checks) else []
    causes = []
    for what, law in zip(("theta", "the noise"), section.laws, strict=False):
        if law.source == "given":
            causes.append(f"The declared constant of {what} may be too small.")
        elif law.source == "sampled":
            causes.append(f"The constant of {what} is an estimate, which may be too small.")
    causes.append(f"The inequality is a theorem, so that {'otherwise ' if causes else ''}one of its assumptions fails "
                  "here: the law of the noise, the derivatives, or finite moments; or a change is too steep for these "
                  "rows to see.")
    return [*found, " ".join(causes)]


def _of_bounds(section: Section) -> list[str]:
    found = []
    sharp = [1 / check.ratio for check in applicable(section.of("P")) if check.ratio > 0]
    if sharp:
        told = f"(P) is {_range(sharp)} times the variance"
        if relative_error(section.checks) > _FEW:
            told += f"; {_few(section.checks, section.rows)}"
        elif len(sharp) > 1:
            told += (": it may stand in for the variance in a plan" if max(sharp) / min(sharp) < _ALIKE else
                     ": levels differ so much in this that sizes should be planned by variances")
        found.append(f"{told}.")
    rough = [1 / check.ratio for check in applicable(section.of("T")) if check.ratio > 0]
    if rough:
        found.append(f"(T), theorem 1 with explicit constants, is {_range(rough)} times the variance: it proves rates, "
                     "not sizes.")
    for reason in dict.fromkeys(check.reason for check in section.checks if check.verdict == "not applicable"):
        refused = [check for check in section.checks if check.reason == reason]
        bounds = ", ".join(dict.fromkeys(f"({check.bound})" for check in refused))
        names = dict.fromkeys(check.name for check in refused)
        levels = "" if len(names) == len(section.sample_slopes) else f" of {', '.join(map(repr, names))}"
        found.append(f"{bounds}{levels}: not applicable, {reason}.")
    return found


def _of_rates(section: Section) -> list[str]:
    """Slopes that there are in a sentence for each theory, and then why there are no others."""
    found = []
    told = _told(section.sample_slopes)
    if told:
        agree = all(slope.agrees is not False for slope in section.sample_slopes)
        found.append(f"Variances fall as n to the power {_slopes(told)} (theory: -1)"
                     + ("." if agree else ", which is not what independent rows do: does a row depend on another?"))
    told = _told(section.difference_slopes)
    if told:
        sentence = f"Variances grow as the level difference to the power {_slopes(told)} (theory: 2)"
        near = [slope for slope in told if slope.agrees is not False]
        if near:
            # What the line through the smallest shares says of the levels as they are.
            times = [slope.variances[0] / (slope.variances[-1] / slope.at[-1] ** 2) for slope in near]
            sentence += (f"; {_levels(near, told)}, as they are, have {', '.join(f'{each:.2g}' for each in times)} "
                         "times what that law says")
        found.append(f"{sentence}.")
        above = [slope for slope in told if slope.agrees is False and slope.value > slope.expected]
        below = [slope for slope in told if slope.agrees is False and slope.value < slope.expected]
        if above:
            found.append(f"Above 2: {_levels(above, told)} are far apart: at these differences the variance grows "
                         "faster.")
        if below and section.assumption.verdict == "holds":
            found.append(f"Below 2: {_levels(below, told)} are far apart: at these differences the variance grows "
                         "slower, although the density is smooth.")
        elif below:
            found.append(f"Below 2: at {_levels(below, told)} the density is not smooth on that scale, so that theorem "
                         "1's rate is not reached.")
    return [*found, *_untold((*section.sample_slopes, *section.difference_slopes))]


def _told(slopes: Sequence[Slope]) -> list[Slope]:
    return [slope for slope in slopes if not slope.reason]


def _untold(slopes: Sequence[Slope]) -> list[str]:
    """One sentence for each reason why there is no slope, with the levels it is of."""
    levels: dict[str, dict[int, None]] = {}
    for slope in slopes:
        if slope.reason:
            levels.setdefault(slope.reason, {})[slope.level] = None
    return [f"No slope at level{'s' * (len(where) > 1)} {', '.join(map(str, where))}: {reason}."
            for reason, where in levels.items()]


def _slopes(slopes: Sequence[Slope]) -> str:
    return ", ".join(map(str, slopes))


def _levels(some: Sequence[Slope], of: Sequence[Slope]) -> str:
    """Which levels, where it is not all of them."""
    if len(some) == len(of) > 1:
        return "the levels"
    return ", ".join(f"levels {slope.level - 1} and {slope.level}" for slope in some)


def _of_parameters(section: Section) -> list[str]:
    """Theorem 3 and what adjustments do."""
    found = []
    if section.parameters:
        held = "no parameter violates a bound"
        if section.violating:
            held = f"{section.violating} of them violate{'s' * (section.violating == 1)} a bound"
        if not applicable(section.gradients):
            held = "no bound is stated"
        told = f"Theorem 3, derivatives in {_count(section.parameters, 'parameter')}"
        if section.gradient_rows < section.gradient_rows_wanted:
            told += f" at {section.gradient_rows} of {section.gradient_rows_wanted} rows"
        told += f": {held}"
        sharp = [1 / check.ratio for check in applicable(section.gradients) if check.bound == "P" and check.ratio > 0]
        if sharp:
            told += f"; (P) is {_range(sharp)} times their variance"
            if section.worst_parameter <= 1:
                told += f", at least {1 / section.worst_parameter:.2g} times for each"
            elif section.above:
                told += f"; in {section.above} of them the estimate exceeds the bound by less than its error"
            if relative_error(section.gradients) > _FEW:
                told += f"; {_few(section.gradients, section.gradient_rows)}"
        found.append(f"{told}.")
    if section.jumping:
        told = (f"Derivatives in {section.jumping} of them jump as functions of theta and x, as those of ReLU do: "
                "theorem 3 does not hold for these")
        rates = _told(section.gradient_slopes)
        if rates:
            told += (f", and the variance of all derivatives grows as the level difference to the power "
                     f"{_slopes(rates)} (theory for smooth ones: 2)")
        found.append(f"{told}.")
    if section.adjusted:
        found.append("A step's gradient at these sizes: " + "; ".join(map(str, section.adjusted)) + ".")
    return found


def _few(checks: Sequence[Check], rows: int) -> str:
    return f"from {rows} rows: errors of up to {relative_error(checks):.0%}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


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
    """Theorem 2 with the numerators of (P) of the last density, beside sizes from measured variances; if they tell."""
    checks = sections[-1].of("P")
    usable = all(check.verdict != "not applicable" and check.value > 0 and check.estimate > 0 for check in checks)
    if stack.row_costs is None or not usable or len(checks) == 1 or relative_error(checks) > _FEW:
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
