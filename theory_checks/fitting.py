r"""Densities to hold bounds against: those that users give, and those fitted to rows of a stack's cheapest level."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlsbi.data import MultilevelData
from mlsbi.density.registry import DensityBuilder, builder_to_config, resolve_builder
from mlsbi.inference.estimator import Estimator as FittedEstimator
from mlsbi.inference.nle import NLE
from mlsbi.inference.npe import NPE
from mlsbi.levels import LevelStack
from mlsbi.randomness import child_seed
from mlsbi.simulation.campaign import simulate_level
from theory_checks.coordinates import Coordinates, Estimator
from theory_checks.densities import AffineGaussian
from theory_checks.integrands import Loss, as_density

__all__ = ["Candidate", "check_fit", "draw_rows", "fit_candidates", "fit_density", "name_density", "rows_to_fit"]

_GAUSSIAN = "gaussian"

_ROWS = 1000
_FEWEST_ROWS = 100
_MOST_ROWS = 20_000
_ENOUGH = 10  # rows for each number of a condition, with which least squares is far from interpolating
_SHARE = 0.25  # of the time, for rows to fit to


@dataclass(frozen=True)
class Candidate:
    r"""A density to hold bounds against.

    Args:
        name: What reports call it.
        density: The density, or what `fit_density` makes one of.
        rows: Rows it was fitted to for the report; 0 for one that was given.
        numbers: Numbers that a condition has in each of them.
    """

    name: str
    density: Any
    rows: int = 0
    numbers: int = 0

    @property
    def fitted_to_few(self) -> bool:
        """Whether it was fitted to fewer rows than ten for each number of a condition."""
        return 0 < self.rows < _ENOUGH * self.numbers


def name_density(density: Any, estimator: Estimator) -> tuple[Candidate, bool]:
    r"""A density with its name, and whether it is to be fitted.

    Args:
        density: `"gaussian"`, a density's name or builder; a density as of `Loss`; or a pair of a name and one.
        estimator: Whose coordinates.

    Raises:
        ValueError: If a name is unknown, or an estimator is of another kind or not fitted.
        TypeError: If it is no density.
    """
    given = None
    if isinstance(density, tuple):
        given, density = density
    if isinstance(density, str):
        if density != _GAUSSIAN:
            try:
                resolve_builder(density)
            except ValueError as error:
                raise ValueError(f'{error} Or "{_GAUSSIAN}".') from None
        return Candidate(given or density, density), True
    if builder_to_config(density) is not None:
        return Candidate(given or type(density).__name__.lower(), density), True
    if isinstance(density, FittedEstimator) and density.kind != estimator:
        raise ValueError(f'Expected estimators of kind "{estimator}"; got one of kind "{density.kind}"'
                         + (f": {given}." if given else "."))
    as_density(density)
    return Candidate(given or type(density).__name__, density), False


def check_fit(candidate: Candidate, theta: Tensor, x: Tensor, estimator: Estimator) -> None:
    r"""Tries a density that was given at a stack's rows.

    Args:
        candidate: The density.
        theta: Parameters in the estimator's coordinates, `(n, D)`.
        x: Outputs `(n, ...)`.
        estimator: Whose coordinates.

    Raises:
        ValueError: If its shapes are others than the stack's.
    """
    density, shape, dim = candidate.density, tuple(x.shape[1:]), theta.shape[1]
    if isinstance(density, FittedEstimator):
        own = density.prior.event_shape[0], tuple(density.x_shape)
        if own != (dim, shape):
            raise ValueError(f"Density '{candidate.name}' does not fit the stack: it is of {own[0]} parameters and "
                             f"outputs of shape {own[1]}, the stack of {dim} and {shape}.")
    try:
        Loss(density, estimator).values(theta, x)
    except Exception as error:
        raise ValueError(f"Density '{candidate.name}' does not fit the stack, with {dim} parameters and outputs of "
                         f"shape {shape}: {error}") from error


def rows_to_fit(numbers: int, *, gaussian: bool) -> int:
    r"""How many rows to draw: a thousand, or where least squares would interpolate ten for each number.

    Args:
        numbers: Numbers of a condition.
        gaussian: Whether one of the densities is fitted by least squares.

    Example:
        >>> rows_to_fit(5, gaussian=True), rows_to_fit(1024, gaussian=True), rows_to_fit(1024, gaussian=False)
        (1000, 10240, 1000)
    """
    return max(_ROWS, min(_ENOUGH * numbers, _MOST_ROWS)) if gaussian else _ROWS


def draw_rows(stack: LevelStack, rows: int, *, seed: int, seconds: float | None = None) -> tuple[Tensor, Tensor]:
    r"""Fresh rows `(theta, x)` of the cheapest level, for all densities.

    Args:
        stack: The stack.
        rows: How many; at least 100.
        seed: Of the rows.
        seconds: Time of the whole report. What a fourth of it does not buy, by the time that the first hundred took,
            is left out.
    """
    own, start = child_seed(seed, 2), time.monotonic()
    first = simulate_level(stack, 0, _FEWEST_ROWS, seed=own, stream=0)
    if seconds is not None:
        each = (time.monotonic() - start) / _FEWEST_ROWS
        rows = int(min(float(rows), _SHARE * seconds / each))
    if rows <= _FEWEST_ROWS:
        return first
    rest = simulate_level(stack, 0, rows - _FEWEST_ROWS, seed=own, stream=1)
    return torch.cat([first[0], rest[0]]), torch.cat([first[1], rest[1]])


def fit_density(
    density: str | DensityBuilder, stack: LevelStack, theta: Tensor, x: Tensor, *, estimator: Estimator = "npe",
    seed: int = 0, embedding: Any = None, x_transform: Any = "none",
) -> Any:  # fmt: skip
    r"""A density fitted to rows.

    Args:
        density: `"gaussian"` for an affine mean by least squares, with a ridge of the numbers of a condition over the
            rows; or the name or builder of a density estimator, which is trained on a thousand rows at most.
        stack: The stack.
        theta: Parameters `(n, D)`.
        x: Outputs `(n, ...)`.
        estimator: `"npe"` or `"nle"`.
        seed: Of training.
        embedding: What reads the condition.
        x_transform: What outputs go through.
    """
    if density == _GAUSSIAN:
        own = Coordinates(stack, estimator).read(theta)
        pair = (own, x.double().flatten(1)) if estimator == "npe" else (x.double().flatten(1), own)
        return AffineGaussian.fit(*pair, ridge=max(1e-6, pair[1].shape[1] / len(theta)))
    kind = NPE if estimator == "npe" else NLE
    fitted = kind(stack.prior, strategy="low", density=density, embedding=embedding, x_transform=x_transform,
                  seed=seed)
    return fitted.fit(MultilevelData.from_arrays([(theta[:_ROWS], x[:_ROWS])]), progress=False)


def fit_candidates(
    named: Sequence[tuple[Candidate, bool]], stack: LevelStack, numbers: int, *, estimator: Estimator, seed: int,
    seconds: float | None, embedding: Any, x_transform: Any,
) -> list[Candidate]:  # fmt: skip
    r"""All densities, those fitted that are to be, to the same rows.

    Args:
        named: What `name_density` gave.
        stack: The stack.
        numbers: Numbers of a condition.
        estimator: `"npe"` or `"nle"`.
        seed: Of rows and training.
        seconds: Time of the whole report.
        embedding: What reads the condition.
        x_transform: What outputs go through.
    """
    if not any(fresh for _, fresh in named):
        return [candidate for candidate, _ in named]
    gaussian = any(fresh and candidate.density == _GAUSSIAN for candidate, fresh in named)
    theta, x = draw_rows(stack, rows_to_fit(numbers, gaussian=gaussian), seed=seed, seconds=seconds)
    found = []
    for candidate, fresh in named:
        if not fresh:
            found.append(candidate)
            continue
        density = fit_density(candidate.density, stack, theta, x, estimator=estimator, seed=seed, embedding=embedding,
                              x_transform=x_transform)
        used = len(theta) if candidate.density == _GAUSSIAN else min(len(theta), _ROWS)
        found.append(Candidate(candidate.name, density, used, numbers))
    return found
