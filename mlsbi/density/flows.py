r"""Conditional density estimators built from nflows, and the registry of their names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import CompositeTransform
from nflows.utils import create_alternating_binary_mask
from torch import Tensor, nn

from mlsbi.density.splines import SolvedLULinear, SplineCoupling

__all__ = ["NSF", "DensityBuilder", "FlowDensity", "builder_from_config", "builder_to_config", "resolve_builder"]


class DensityBuilder(Protocol):
    """Builds an `nn.Module` with `log_prob(input, condition) -> (n,)` and `sample(n, condition) -> (n, B, dim)`."""

    def __call__(self, dim: int, condition_dim: int) -> nn.Module:
        """A fresh density of vectors of length `dim` given vectors of length `condition_dim`."""
        ...


class FlowDensity(nn.Module):
    """An nflows flow behind the two methods that training and posteriors use."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given `condition` (n, condition_dim), shape `(n,)`."""
        return self.flow.log_prob(input, condition)

    def sample(self, n: int, condition: Tensor) -> Tensor:
        """Draws `(n, B, dim)` given `condition` (B, condition_dim), from torch's global random state."""
        return self.flow.sample(n, condition).transpose(0, 1)


@dataclass(frozen=True)
class NSF:
    r"""Neural spline flow: rational-quadratic couplings with linear maps in between.

    Args:
        transforms: Number of couplings.
        hidden: Width of the residual networks.
        blocks: Residual blocks per network.
        bins: Spline bins.
        tail_bound: Half-width of the splines' interval, in standard deviations; the identity outside.
        dropout: Dropout probability in the residual networks.

    References:
        | Neural spline flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032

    Example:
        >>> density = NSF(transforms=2, hidden=16)(dim=3, condition_dim=5)
        >>> density.log_prob(torch.zeros(4, 3), torch.zeros(4, 5)).shape
        torch.Size([4])
    """

    transforms: int = 3
    hidden: int = 32
    blocks: int = 1
    bins: int = 5
    tail_bound: float = 4.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.transforms, self.hidden, self.blocks) < 1 or self.bins < 2:
            raise ValueError(f"Expected at least 1 transform, hidden unit and block, and 2 bins; got {self}.")
        if not (self.tail_bound > 0 and 0 <= self.dropout < 1):
            raise ValueError(f"Expected tail_bound > 0 and 0 <= dropout < 1; got {self}.")

    def __call__(self, dim: int, condition_dim: int) -> FlowDensity:
        """A fresh flow, initialised from torch's global random state.

        Raises:
            ValueError: If one coupling is to model several features, of which it would leave half as they are.
        """
        if dim > 1 and self.transforms < 2:
            raise ValueError(f"Expected at least 2 transforms for {dim} features: one coupling changes only half of "
                             "them.")

        def network(inputs: int, outputs: int) -> ResidualNet:
            return ResidualNet(
                inputs, outputs, hidden_features=self.hidden, context_features=condition_dim,
                num_blocks=self.blocks, dropout_probability=self.dropout,
            )

        layers: list[nn.Module] = []
        for index in range(self.transforms):
            # A single feature is always transformed, by a spline of the condition alone.
            mask = create_alternating_binary_mask(dim, even=index % 2 == 0) if dim > 1 else torch.ones(1)
            layers.append(SplineCoupling(mask, network, num_bins=self.bins, tails="linear", tail_bound=self.tail_bound))
            layers.append(SolvedLULinear(dim))
        return FlowDensity(Flow(CompositeTransform(layers), StandardNormal([dim])))


_BUILDERS = {"nsf": NSF}


def resolve_builder(density: str | DensityBuilder) -> DensityBuilder:
    """A builder from its name, or the builder itself.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(density, str):
        if density not in _BUILDERS:
            raise ValueError(f"Unknown density '{density}'; known: {sorted(_BUILDERS)}, or pass a builder.")
        return _BUILDERS[density]()
    if not callable(density):
        raise TypeError(f"Expected a density name or builder(dim, condition_dim); got {type(density).__name__}.")
    return density


def builder_to_config(builder: DensityBuilder) -> dict[str, Any] | None:
    """JSON description of a builder of this library; `None` for a user's own."""
    for name, kind in _BUILDERS.items():
        if type(builder) is kind:
            return {"name": name, "options": asdict(builder)}
    return None


def builder_from_config(config: dict[str, Any]) -> DensityBuilder:
    """Inverse of `builder_to_config`."""
    return _BUILDERS[config["name"]](**config["options"])
