r"""A stack's theory on one page: laws, norms, assumptions, bounds, slopes, and what they mean in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.data import MultilevelData
from mlsbi.density.registry import DensityBuilder, builder_to_config
from mlsbi.inference.estimator import Estimator as FittedEstimator
from mlsbi.inference.nle import NLE
from mlsbi.inference.npe import NPE
from mlsbi.levels import LevelStack
from mlsbi.randomness import child_seed
from mlsbi.simulation.campaign import simulate_level
from mlsbi.simulation.scheduling import SimulationError
from theory_checks.assumptions import Assumption, check_assumptions
from theory_checks.bounds import Check, check_bounds, numerators
from theory_checks.coordinates import Coordinates, Estimator
from theory_checks.densities import AffineGaussian
from theory_checks.integrands import Gradient, Loss
from theory_checks.measuring import Measured, measure, measure_all
from theory_checks.poincare import Law
from theory_checks.scaling import Slope, difference_slope, sample_size_slope
from theory_checks.sobolev import SobolevNorms, sobolev_norms
from theory_checks.stabilising import AdjustedGradient, adjusted_gradient

__all__ = ["Section", "TheoryReport", "fit_density", "theory_report"]

_FITTED_ROWS = 1000
_ALIKE = 4.0  # times that the bound's looseness may differ between levels for plans by it to be good
_GRADIENT_ROWS = 2000
_DEFAULT_ROWS = 100  # of every level, whose cost is what sizes are chosen for


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

    def sentences(self) -> list[str]:
        """What it means, in words."""
        return _sentences(self)


@dataclass(frozen=True)
class TheoryReport:
    r"""What theory says of a stack, and whether it does as theory says.

    Args:
        title: The task's name, or where the stack is from.
        names: Names of the levels, cheapest first.
        estimator: Whose coordinates.
        seed: Of everything.
        n: Rows of each term that bounds are stated for.
        sizes: Where n comes from.
        rows: Rows that were run.
        laws: What is known of theta and of the noise.
        constant: Poincaré constant of z; `None` where there is none.
        norms: W14 norms.
        assumptions: A1 and A2.
        sections: One per density.
        problem: Why there are no bounds.
        plan: What theorem 2 says of the sizes.
    """

    title: str
    names: tuple[str, ...]
    estimator: Estimator
    seed: int
    n: tuple[int, ...]
    sizes: str
    rows: int
    laws: tuple[str, str]
    constant: float | None
    norms: SobolevNorms
    assumptions: tuple[Assumption, ...]
    sections: tuple[Section, ...]
    problem: str | None = None
    plan: str = ""
    measured: tuple[Measured, ...] = field(default=(), repr=False)

    @property
    def violations(self) -> list[Check]:
        """Bounds that are violated."""
        return [check for section in self.sections for check in (*section.checks, *section.gradients)
                if check.verdict == "violated"]

    def to_frame(self) -> pd.DataFrame:
        """One row per density, bound and level."""
        return pd.DataFrame([
            {"density": section.density, "bound": check.bound, "level": check.name, "component": check.component,
             "n": check.n, "variance": check.estimate, "its error": check.estimate_error, "limit": check.value,
             "limit's error": check.value_error, "ratio": check.ratio, "verdict": check.verdict, "reason": check.reason}
            for section in self.sections for check in (*section.checks, *section.gradients)
        ])  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Writes the text, the table and all numbers to a folder, which is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "theory.txt").write_text(str(self) + "\n", encoding="utf-8")
        self.to_frame().to_csv(folder / "theory.csv", index=False)
        record = {name: value for name, value in vars(self).items() if name not in ("sections", "measured")}
        record = {**record, "norms": asdict(self.norms), "assumptions": [asdict(one) for one in self.assumptions],
                  "sections": [asdict(section) for section in self.sections]}
        (folder / "theory.json").write_text(json.dumps(_plain(record), indent=1) + "\n", encoding="utf-8")
        return folder

    def __str__(self) -> str:
        kind = {"npe": "a posterior's density", "nle": "a likelihood's density"}[self.estimator]
        constant = "unknown" if self.constant is None else f"{self.constant:.4g}"
        lines = [
            f"Theory of '{self.title}' in the coordinates of {kind}; {self.rows} rows, seed {self.seed}",
            f"  theta: {self.laws[0]}", f"  noise: {self.laws[1]}", f"  Poincaré constant of both: {constant}",
            *str(self.norms).splitlines(), *map(str, self.assumptions),
        ]  # fmt: skip
        for section in self.sections:
            lines += ["", f"Density '{section.density}': {section.assumption}"]
            lines += _table([*section.checks, *section.gradients])
            lines += [f"- {sentence}" for sentence in section.sentences()]
        if self.plan:
            lines += ["", self.plan]
        if self.problem:
            lines += ["", f"No bound is stated: {self.problem}."]
        return "\n".join(lines)


def theory_report(
    stack: LevelStack,
    *,
    title: str = "stack",
    densities: Sequence[Any] = ("gaussian", "nsf"),
    estimator: Estimator = "npe",
    n: Sequence[int] | None = None,
    rows: int = 20_000,
    seconds: float | None = None,
    seed: int = 0,
    parameters: int = 100,
    embedding: Any = None,
    x_transform: Any = "none",
    theta_constant: float | None = None,
    noise_constant: float | None = None,
    advance: Callable[[int], Any] | None = None,
) -> TheoryReport:
    r"""Checks all bounds on a stack and says what they mean.

    Args:
        stack: The stack.
        title: What the report calls it.
        densities: `"gaussian"` (an affine mean, by least squares, whose constants are known); names or builders of
            density estimators, which are trained on rows of the cheapest level; or densities and fitted estimators.
        estimator: `"npe"` or `"nle"`; fitted estimators must be of that kind.
        n: Rows of each term that bounds are stated for; ratios do not depend on it.
        rows: Rows of the bounds.
        seconds: Time after which fewer rows will do.
        seed: Of everything random.
        parameters: Parameters of each density whose derivatives are looked at; 0 for none.
        embedding: Embedding of networks that are trained here.
        x_transform: What their outputs go through.
        theta_constant: Poincaré constant of theta, where it is known.
        noise_constant: Poincaré constant of the noise, where it is known.
        advance: Is told of every block of rows done.
    """
    options: dict[str, Any] = {"estimator": estimator, "seed": seed, "theta_constant": theta_constant,
                               "noise_constant": noise_constant}
    if parameters < 0:
        raise ValueError(f"Expected parameters >= 0; got {parameters}.")
    if not densities:
        raise ValueError('Expected at least one density, such as "gaussian".')
    if n is not None and len(n) != len(stack):
        raise ValueError(f"Expected {len(stack)} sizes n, one per level; got {len(n)}.")
    try:
        named = [_resolve(density, stack, estimator, seed, embedding, x_transform) for density in densities]
    except (SimulationError, ValueError, RuntimeError):
        # A simulator that cannot be checked often cannot be trained on either; then that is the finding.
        found = measure(stack, rows=64, seconds=seconds, **options)
        if not found.problem:
            raise
        return _assemble(title, [], [found], [], n, seed)
    integrands: list[Any] = [Loss(density, estimator) for _, density in named]
    limits = [rows] * len(named)
    if parameters:
        integrands += [Gradient(density, estimator, most=parameters, seed=seed) for _, density in named]
        limits += [min(rows, _GRADIENT_ROWS)] * len(named)
    measured = measure_all(stack, integrands, rows=limits, seconds=seconds, advance=advance, **options)
    return _assemble(title, [name for name, _ in named], measured[:len(named)], measured[len(named):], n, seed)


def fit_density(
    density: str | DensityBuilder, stack: LevelStack, *, estimator: Estimator = "npe", rows: int = _FITTED_ROWS,
    seed: int = 0, embedding: Any = None, x_transform: Any = "none",
) -> Any:  # fmt: skip
    r"""A density fitted to fresh rows of the cheapest level.

    Args:
        density: `"gaussian"` for an affine mean by least squares, or the name or builder of a density estimator.
        stack: The stack.
        estimator: `"npe"` or `"nle"`.
        rows: Rows of the cheapest level.
        seed: Of rows and training.
        embedding: What reads the condition.
        x_transform: What outputs go through.
    """
    theta, x = simulate_level(stack, 0, rows, seed=child_seed(seed, 2), stream=0)
    if density == "gaussian":
        own = Coordinates(stack, estimator).read(theta)
        return AffineGaussian.fit(own, x) if estimator == "npe" else AffineGaussian.fit(x.double().flatten(1), own)
    kind = NPE if estimator == "npe" else NLE
    fitted = kind(stack.prior, strategy="low", density=density, embedding=embedding, x_transform=x_transform,
                  seed=seed)
    return fitted.fit(MultilevelData.from_arrays([(theta, x)]), progress=False)


def _resolve(
    density: Any, stack: LevelStack, estimator: Estimator, seed: int, embedding: Any, x_transform: Any
) -> tuple[str, Any]:
    if isinstance(density, str) or builder_to_config(density) is not None:
        name = density if isinstance(density, str) else type(density).__name__.lower()
        return name, fit_density(density, stack, estimator=estimator, seed=seed, embedding=embedding,
                                 x_transform=x_transform)
    if isinstance(density, FittedEstimator) and density.kind != estimator:
        raise ValueError(f'Expected estimators of kind "{estimator}"; got one of kind "{density.kind}".')
    return type(density).__name__, density


def _assemble(
    title: str, names: Sequence[str], losses: Sequence[Measured], gradients: Sequence[Measured],
    n: Sequence[int] | None, seed: int,
) -> TheoryReport:  # fmt: skip
    first = losses[0]
    a1, a2, _ = check_assumptions(first, seed=seed)
    sizes, origin = (tuple(n), "as asked for") if n is not None else _default_sizes(first)
    sections = []
    if not first.problem:
        for place, name in enumerate(names):
            gradient = gradients[place] if gradients else None
            sections.append(_section(name, losses[place], gradient, sizes, seed))
    plan = _plan(first.stack, sections, sizes) if sections else ""
    return TheoryReport(
        title, first.stack.names, first.estimator, seed, sizes, origin, first.rows,
        (_told(first.theta_law), _told(first.noise_law)), first.law.constant, sobolev_norms(first), (a1, a2),
        tuple(sections), first.problem, plan, tuple(losses),
    )  # fmt: skip


def _section(name: str, loss: Measured, gradient: Measured | None, n: tuple[int, ...], seed: int) -> Section:
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


def _default_sizes(measured: Measured) -> tuple[tuple[int, ...], str]:
    """Sizes that measured variances and declared costs make best, or the same for every level."""
    stack, levels = measured.stack, len(measured.stack)
    costs = stack.row_costs
    if measured.problem or measured.integrand is None or costs is None:
        return (_DEFAULT_ROWS,) * levels, f"{_DEFAULT_ROWS} of every level"
    variances = [float(rows.var(0).sum()) for rows in measured.differences]
    if not all(variance > 0 for variance in variances):
        return (_DEFAULT_ROWS,) * levels, f"{_DEFAULT_ROWS} of every level"
    plan = optimal_allocation(variances, pair_costs=costs, costs=stack.costs, budget=_DEFAULT_ROWS * sum(costs))
    return plan.n, f"best for the cost of {_DEFAULT_ROWS} rows of every level"


def _plan(stack: LevelStack, sections: Sequence[Section], n: tuple[int, ...]) -> str:
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


def _sentences(section: Section) -> list[str]:
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


def _told(law: Law) -> str:
    constant = "no constant" if law.constant is None else f"K_P = {law.constant:.4g}"
    return f"{law.name}, {constant} ({law.reason})"


def _range(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"


def _table(checks: Sequence[Check]) -> list[str]:
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


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
