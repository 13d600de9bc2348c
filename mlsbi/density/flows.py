r"""Conditional density estimators built from nflows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform
from nflows.utils import create_alternating_binary_mask
from torch import Tensor, nn

from mlsbi.density.autoregressive import AffineAutoregressive
from mlsbi.density.columns import ColumnResidualNet
from mlsbi.density.linear import Reversal, Shift, SolvedLULinear
from mlsbi.density.splines import SplineCoupling

__all__ = ["MAF", "NSF", "FlowDensity"]


class FlowDensity(nn.Module):
    """An nflows flow behind the two methods that training and posteriors use.

    Args:
        flow: A flow to the standard normal whose transforms have `columns`, as those of this folder.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given `condition` (n, condition_dim), shape `(n,)`."""
        # Not `Flow.log_prob`, which adds in place and looks at its inputs.
        noise, log_det = self._to_noise(input, condition)
        return log_det - 0.5 * math.log(2 * math.pi) * len(noise) - 0.5 * noise.square().sum(0)

    def noise(self, input: Tensor, condition: Tensor) -> Tensor:
        """Standard normal noise `(n, dim)` that the flow turns into `input` (n, dim) given `condition`."""
        return self._to_noise(input, condition)[0].T

    def _to_noise(self, input: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of noise `(dim, n)` and log determinants `(n,)`."""
        x, condition = input.T, condition.T.contiguous()
        log_det = x.new_zeros(x.shape[1])
        for layer in self.flow._transform._transforms:
            x, log_slope = layer.columns(x, condition)
            log_det = log_det + log_slope
        return x, log_det

    def sample(self, n: int, condition: Tensor) -> Tensor:
        """Draws `(n, B, dim)` given `condition` (B, condition_dim), from torch's global random state."""
        # Not `Flow.sample`, whose noise has the default dtype whatever the flow's.
        shape = self.flow._distribution._shape
        noise = torch.randn(len(condition) * n, *shape, dtype=condition.dtype, device=condition.device)
        x, repeated = noise.T, condition.T.repeat_interleave(n, 1)
        for layer in reversed(self.flow._transform._transforms):
            x, _ = layer.columns(x, repeated, inverse=True)
        return x.T.reshape(len(condition), n, *shape).transpose(0, 1)


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
        line: Whether the flow is of what a linear map of the condition leaves: few rows teach a line first.

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
    line: bool = False

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

        def network(inputs: int, outputs: int) -> ColumnResidualNet:
            return ColumnResidualNet(
                inputs, outputs, condition_dim=condition_dim, hidden=self.hidden, blocks=self.blocks,
                dropout=self.dropout,
            )

        layers: list[nn.Module] = [Shift(dim, condition_dim)] if self.line else []
        for index in range(self.transforms):
            # A single feature is always transformed, by a spline of the condition alone.
            mask = create_alternating_binary_mask(dim, even=index % 2 == 0) if dim > 1 else torch.ones(1)
            layers.append(SplineCoupling(mask, network, num_bins=self.bins, tails="linear", tail_bound=self.tail_bound))
            layers.append(SolvedLULinear(dim))
        return FlowDensity(Flow(CompositeTransform(layers), StandardNormal([dim])))


@dataclass(frozen=True)
class MAF:
    r"""Masked autoregressive flow: affine maps of each feature given those before it, the order reversed in between.

    With one feature that is a Gaussian given the condition. In nflows the first feature of a map does not see the
    condition; here it does. Sampling takes as many passes as there are features.

    Args:
        transforms: Number of autoregressive maps.
        hidden: Width of the masked networks.
        blocks: Residual blocks per network.
        dropout: Dropout probability in the networks.
        line: Whether the flow is of what linear maps of the condition and of the features before leave.

    References:
        | Masked autoregressive flow for density estimation (Papamakarios et al., 2017)
        | https://arxiv.org/abs/1705.07057

    Example:
        >>> density = MAF(transforms=2, hidden=16)(dim=3, condition_dim=5)
        >>> density.sample(2, torch.zeros(4, 5)).shape
        torch.Size([2, 4, 3])
    """

    transforms: int = 5
    hidden: int = 32
    blocks: int = 1
    dropout: float = 0.0
    line: bool = False

    def __post_init__(self) -> None:
        if min(self.transforms, self.hidden, self.blocks) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"Expected at least 1 transform, hidden unit and block, and 0 <= dropout < 1; got {self}.")

    def __call__(self, dim: int, condition_dim: int) -> FlowDensity:
        """A fresh flow, initialised from torch's global random state."""
        layers: list[nn.Module] = [Shift(dim, condition_dim), SolvedLULinear(dim)] if self.line else []
        for index in range(self.transforms):
            if index:
                layers.append(Reversal(dim))
            layers.append(AffineAutoregressive(
                dim, condition_dim=condition_dim, hidden=self.hidden, blocks=self.blocks, dropout=self.dropout,
            ))
        return FlowDensity(Flow(CompositeTransform(layers), StandardNormal([dim])))
