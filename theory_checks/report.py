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
from mlsbi.simulation.scheduling import SimulationError
from theory_checks.assumptions import Assumption, check_assumptions
from theory_checks.bounds import Check
from theory_checks.coordinates import Estimator
from theory_checks.fitting import resolve_density
from theory_checks.integrands import Gradient, Loss
from theory_checks.measuring import Measured, measure, measure_all
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
            f"  n = {self.n}, {self.sizes}",
            f"  theta: {self.laws[0]}", f"  noise: {self.laws[1]}", f"  Poincaré constant of both: {constant}",
            *str(self.norms).splitlines(), *map(str, self.assumptions),
        ]  # fmt: skip
        for section in self.sections:
            lines += ["", f"Density '{section.density}': {section.assumption}"]
            lines += table([*section.checks, *section.gradients])
            lines += [f"- {sentence}" for sentence in sentences(section)]
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
        named = [resolve_density(density, stack, estimator, seed, embedding, x_transform)
                 for density in densities]
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


def _assemble(
    title: str, names: Sequence[str], losses: Sequence[Measured], gradients: Sequence[Measured],
    n: Sequence[int] | None, seed: int,
) -> TheoryReport:  # fmt: skip
    first = losses[0]
    a1, a2, _ = check_assumptions(first, seed=seed)
    sizes, origin = (tuple(n), "rows of each level's term") if n is not None else _default_sizes(first)
    sections = []
    if not first.problem:
        for place, name in enumerate(names):
            gradient = gradients[place] if gradients else None
            sections.append(make_section(name, losses[place], gradient, sizes, seed))
    plan = describe_plan(first.stack, sections, sizes) if sections else ""
    return TheoryReport(
        title, first.stack.names, first.estimator, seed, sizes, origin, first.rows,
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
