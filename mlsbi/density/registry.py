r"""Names of density estimators."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from mlsbi.density.configs import from_config, to_config
from mlsbi.density.flows import MAF, NSF
from mlsbi.density.mixture_density import MDN

__all__ = ["DensityBuilder", "builder_from_config", "builder_to_config", "resolve_builder"]


class DensityBuilder(Protocol):
    """Builds an `nn.Module` with `log_prob(input, condition) -> (n,)` and `sample(n, condition) -> (n, B, dim)`."""

    def __call__(self, dim: int, condition_dim: int) -> nn.Module:
        """A fresh density of vectors of length `dim` given vectors of length `condition_dim`."""
        ...


_BUILDERS: dict[str, Any] = {"nsf": NSF, "maf": MAF, "mdn": MDN}


def resolve_builder(density: str | DensityBuilder) -> DensityBuilder:
    """A builder from its name, or the builder itself.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither.
    """
    if isinstance(density, str):
        if density not in _BUILDERS:
            raise ValueError(f"Unknown density '{density}'; known: {sorted(_BUILDERS)}, or pass a builder.")
        built: DensityBuilder = _BUILDERS[density]()
        return built
    if not callable(density):
        raise TypeError(f"Expected a density name or builder(dim, condition_dim); got {type(density).__name__}.")
    return density


def builder_to_config(builder: DensityBuilder) -> dict[str, Any] | None:
    """JSON description of a builder of this library; `None` for a user's own."""
    return to_config(_BUILDERS, builder)


def builder_from_config(config: dict[str, Any]) -> DensityBuilder:
    """Inverse of `builder_to_config`."""
    built: DensityBuilder = from_config(_BUILDERS, config)
    return built
