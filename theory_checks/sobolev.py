r"""Sobolev norms of levels and of their differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mlsbi.levels import LevelStack
from theory_checks.measuring import Measured, measure
from theory_checks.samples import mean_and_error

__all__ = ["Norm", "SobolevNorms", "sobolev_norms"]


@dataclass(frozen=True)
class Norm:
    r"""A norm in W^{1,4} and its parts.

    Args:
        value: :math:`|G|_{W14} = (E|G|^4 + E|\nabla G|^4)^{1/4}`.
        error: Its standard error.
        function: :math:`|G|_{L4}`.
        gradient: :math:`|\nabla G|_{L4}`, the Frobenius norm of the derivative in (theta, noise).
    """

    value: float
    error: float
    function: float
    gradient: float

    def __str__(self) -> str:
        return f"{self.value:.4g} +- {self.error:.2g}"


@dataclass(frozen=True)
class SobolevNorms:
    r"""Norms of a stack's levels.

    Args:
        names: The levels' names, cheapest first.
        levels: Norm of each level, L + 1 of them.
        differences: Norm of each level's difference from the one below, L of them.
        method: By autodiff or by finite differences.
        step_error: Relative error of derivatives, from the step-size check; the worst level's.
        rows: Rows they were estimated from.
        problem: Why there are none.
    """

    names: tuple[str, ...]
    levels: tuple[Norm, ...]
    differences: tuple[Norm, ...]
    method: str
    step_error: float
    rows: int
    problem: str | None = None

    def __str__(self) -> str:
        if self.problem:
            return f"No Sobolev norms: {self.problem}."
        lines = [f"W14 norms by {self.method} from {self.rows} rows (derivatives to {self.step_error:.1g})"]
        for index, (name, norm) in enumerate(zip(self.names, self.levels, strict=True)):
            below = f", of what it adds to '{self.names[index - 1]}': {self.differences[index - 1]}" if index else ""
            lines.append(f"  {name}: {norm}{below}")
        return "\n".join(lines)


def sobolev_norms(stack: LevelStack | Measured, **options: Any) -> SobolevNorms:
    r"""W^{1,4} norms of a stack's levels as functions of (theta, noise), in the estimator's own coordinates.

    Torch simulators are differentiated by `torch.func`; black boxes by central differences along random directions,
    whose step is the one at which derivatives depend least on it.

    Args:
        stack: The stack, or what `measure` gave for it.
        **options: As of `measure`: rows, seed, estimator, directions and so on.

    Returns:
        Norms with standard errors; where a level has none, why.

    Example:
        >>> import torch
        >>> from mlsbi import Level
        >>> from torch.distributions import Independent, Normal
        >>> prior = Independent(Normal(torch.zeros(1), torch.ones(1)), 1)
        >>> noise = lambda n, generator: torch.randn(n, 1, generator=generator)
        >>> stack = LevelStack(prior, noise, [Level("sum", lambda theta, u: theta + u)])
        >>> norm = sobolev_norms(stack, rows=4000, seed=0).levels[0]  # E|G|^4 = 3 * 2^2, |grad G|^4 = 2^2
        >>> abs(norm.value - 16**0.25) < 4 * norm.error
        True
    """
    measured = stack if isinstance(stack, Measured) else measure(stack, **options)
    found = measured.smoothness
    method = "autodiff" if all(one.method == "autodiff" for one in found) else "finite differences"
    error = max(one.error for one in found)
    if measured.problem:
        return SobolevNorms(measured.stack.names, (), (), method, error, 0, measured.problem)
    pairs = zip(measured.output_fourth, measured.gradient_fourth, strict=True)
    differences = zip(measured.difference_fourth, measured.difference_gradient_fourth, strict=True)
    return SobolevNorms(
        measured.stack.names, tuple(_norm(*pair) for pair in pairs), tuple(_norm(*pair) for pair in differences),
        method, error, measured.rows,
    )  # fmt: skip


def _norm(function: Tensor, gradient: Tensor) -> Norm:
    total, error = mean_and_error(function + gradient)
    value = float(total) ** 0.25
    return Norm(value, value / 4 * float(error) / float(total) if float(total) > 0 else 0.0,
                float(function.mean()) ** 0.25, float(gradient.mean()) ** 0.25)
