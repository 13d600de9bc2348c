r"""A stack's theory on one page: laws, norms, assumptions, bounds, slopes, and what they mean in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.levels import LevelStack
from mlsbi.randomness import check_seed
from theory_checks.assumptions import Assumption, check_assumptions
from theory_checks.bounds import Check
from theory_checks.coordinates import Estimator
from theory_checks.fitting import Candidate, check_fit, fit_candidates, name_density
from theory_checks.integrands import Gradient, Loss
from theory_checks.measuring import FEWEST_ROWS, Measured, measure, measure_all
from theory_checks.sections import Section, make_section
from theory_checks.sobolev import SobolevNorms, sobolev_norms
from theory_checks.wording import describe_law, describe_plan, sentences, table

__all__ = ["TheoryReport", "theory_report"]

_GRADIENT_ROWS = 2000
_DEFAULT_ROWS = 100  # of every level, whose cost is what sizes are chosen for


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
        wanted: Rows that were asked for.
        seconds: Time for running them; `None` where there was no limit.
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
    wanted: int
    seconds: float | None
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
        """Bounds that are violated, of losses, of all parameters together and of single ones."""
        return [check for section in self.sections for check in section.violations]

    def to_frame(self) -> pd.DataFrame:
        """One row per density, bound and level; further ones for single parameters that violate a bound."""
        return pd.DataFrame([
            {"density": section.density, "bound": check.bound, "level": check.name, "component": check.component,
             "n": check.n, "variance": check.estimate, "its error": check.estimate_error, "limit": check.value,
             "limit's error": check.value_error, "ratio": check.ratio, "verdict": check.verdict, "reason": check.reason}
            for section in self.sections for check in section.every_check
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
            f"Theory of '{self.title}' in the coordinates of {kind}; {self._rows}seed {self.seed}",
            f"  n = {self.n}, {self.sizes}",
            f"  theta: {self.laws[0]}", f"  noise: {self.laws[1]}", f"  Poincaré constant of both: {constant}",
        ]  # fmt: skip
        if self.problem:
            return "\n".join([*lines, *map(str, self.assumptions), "",
                              f"Problem: {self.problem}. There are no norms and no bounds."])
        lines += [*str(self.norms).splitlines(), *map(str, self.assumptions)]
        for section in self.sections:
            lines += ["", f"Density '{section.density}': {section.assumption}"]
            lines += table([*section.checks, *section.gradients])
            lines += [f"- {sentence}" for sentence in sentences(section)]
        if self.plan:
            lines += ["", self.plan]
        return "\n".join(lines)

    @property
    def _rows(self) -> str:
        if self.problem:
            return ""
        if self.rows < self.wanted and self.seconds is not None:
            return f"{self.rows} of {self.wanted} rows in {self.seconds:g} s (more with --seconds), "
        return f"{self.rows} rows, "


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
            Any of them may be a pair `(name, density)`.
        estimator: `"npe"` or `"nle"`; fitted estimators must be of that kind.
        n: Rows of each term that bounds are stated for; ratios do not depend on it.
        rows: Rows of the bounds, at least 64.
        seconds: Time for these rows, after which fewer will do. At most a fourth of it is for rows to fit to.
        seed: Of everything random.
        parameters: Parameters of each density whose derivatives are looked at; 0 for none.
        embedding: Embedding of networks that are trained here.
        x_transform: What their outputs go through.
        theta_constant: Poincaré constant of theta, where it is known.
        noise_constant: Poincaré constant of the noise, where it is known.
        advance: Is told of every block of rows done.

    Returns:
        What was found. What is wrong with a simulator does not raise: it is in `problem`.

    Raises:
        ValueError: If an argument is out of range, or a density does not fit the stack.
        TypeError: If something given as a density is none.
    """
    _check_numbers(stack, n, rows, seconds, seed, parameters)
    for name, constant in (("theta_constant", theta_constant), ("noise_constant", noise_constant)):
        if constant is not None and not 0 < constant < math.inf:
            raise ValueError(f"Expected a positive, finite constant as {name}; got {constant}.")
    if estimator not in ("npe", "nle"):
        raise ValueError(f"Expected estimator 'npe' or 'nle'; got {estimator!r}.")
    if not densities:
        raise ValueError('Expected at least one density, such as "gaussian".')
    named = [name_density(density, estimator) for density in densities]
    given = [candidate for candidate, fresh in named if not fresh]
    if parameters:
        for candidate in given:
            Gradient(candidate.density, estimator, most=1)  # which says what has no parameters
    options: dict[str, Any] = {"estimator": estimator, "seed": seed, "theta_constant": theta_constant,
                               "noise_constant": noise_constant}
    # What cannot be checked cannot be trained on either.
    first = measure(stack, rows=FEWEST_ROWS, seconds=seconds, **options)
    asked = n, rows, seconds, seed
    if first.problem:
        return _assemble(title, [], [first], [], *asked)
    for candidate in given:
        check_fit(candidate, first.theta, first.outputs[0], estimator)
    numbers = first.outputs[0][0].numel() if estimator == "npe" else first.theta.shape[1]
    candidates = fit_candidates(named, stack, numbers, estimator=estimator, seed=seed, seconds=seconds,
                                embedding=embedding, x_transform=x_transform)
    integrands: list[Any] = [Loss(candidate.density, estimator) for candidate in candidates]
    limits = [rows] * len(candidates)
    if parameters:
        integrands += [Gradient(candidate.density, estimator, most=parameters, seed=seed) for candidate in candidates]
        limits += [min(rows, _GRADIENT_ROWS)] * len(candidates)
    measured = measure_all(stack, integrands, rows=limits, seconds=seconds, advance=advance, **options)
    return _assemble(title, candidates, measured[:len(candidates)], measured[len(candidates):], *asked)


def _check_numbers(
    stack: LevelStack, n: Sequence[int] | None, rows: int, seconds: float | None, seed: int, parameters: int
) -> None:  # fmt: skip
    """Raises ValueError where a number is out of range."""
    if rows < FEWEST_ROWS:
        raise ValueError(f"Expected rows >= {FEWEST_ROWS}, as fewer tell nothing; got {rows}.")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"Expected seconds > 0; got {seconds}.")
    if parameters < 0:
        raise ValueError(f"Expected parameters >= 0; got {parameters}.")
    check_seed(seed)
    if n is not None and len(n) != len(stack):
        raise ValueError(f"Expected {len(stack)} sizes n, one per level; got {len(n)}.")
    if n is not None and not all(isinstance(size, int) and size >= 1 for size in n):
        raise ValueError(f"Expected whole numbers of at least 1 as n; got {list(n)}.")


def _assemble(
    title: str, candidates: Sequence[Candidate], losses: Sequence[Measured], gradients: Sequence[Measured],
    n: Sequence[int] | None, rows: int, seconds: float | None, seed: int,
) -> TheoryReport:  # fmt: skip
    first = losses[0]
    a1, a2, _ = check_assumptions(first, seed=seed)
    sizes, origin = (tuple(n), "rows of each level's term") if n is not None else _default_sizes(first)
    sections = []
    if not first.problem:
        for place, candidate in enumerate(candidates):
            gradient = gradients[place] if gradients else None
            sections.append(make_section(candidate, losses[place], gradient, sizes, seed))
    plan = describe_plan(first.stack, sections, sizes) if sections else ""
    return TheoryReport(
        title, first.stack.names, first.estimator, seed, sizes, origin, first.rows, rows, seconds,
        (describe_law(first.theta_law), describe_law(first.noise_law)), first.law.constant, sobolev_norms(first),
        (a1, a2), tuple(sections), first.problem, plan, tuple(losses),
    )  # fmt: skip


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
    return plan.n, f"sizes that are best for the cost of {_DEFAULT_ROWS} rows of every level"


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
