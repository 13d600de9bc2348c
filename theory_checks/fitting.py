r"""Densities to hold bounds against, fitted to rows of a stack's cheapest level."""

from __future__ import annotations

from typing import Any

from mlsbi.data import MultilevelData
from mlsbi.density.registry import DensityBuilder, builder_to_config
from mlsbi.inference.estimator import Estimator as FittedEstimator
from mlsbi.inference.nle import NLE
from mlsbi.inference.npe import NPE
from mlsbi.levels import LevelStack
from mlsbi.randomness import child_seed
from mlsbi.simulation.campaign import simulate_level
from theory_checks.coordinates import Coordinates, Estimator
from theory_checks.densities import AffineGaussian

__all__ = ["fit_density", "resolve_density"]

_ROWS = 1000


def fit_density(
    density: str | DensityBuilder, stack: LevelStack, *, estimator: Estimator = "npe", rows: int = _ROWS,
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


def resolve_density(
    density: Any, stack: LevelStack, estimator: Estimator, seed: int, embedding: Any, x_transform: Any
) -> tuple[str, Any]:
    """A density's name and the density: fitted where it was only named, of the right kind where it was fitted."""
    if isinstance(density, str) or builder_to_config(density) is not None:
        name = density if isinstance(density, str) else type(density).__name__.lower()
        return name, fit_density(density, stack, estimator=estimator, seed=seed, embedding=embedding,
                                 x_transform=x_transform)
    if isinstance(density, FittedEstimator) and density.kind != estimator:
        raise ValueError(f'Expected estimators of kind "{estimator}"; got one of kind "{density.kind}".')
    return type(density).__name__, density
