r"""Masked affine autoregressive maps whose first feature sees the condition too."""

from __future__ import annotations

from typing import Any

import torch
from nflows.transforms import MaskedAffineAutoregressiveTransform
from torch import Tensor, nn
from torch.nn import functional

from mlsbi.density.columns import Dropout, linear, relu

__all__ = ["AffineAutoregressive"]


class _Conditioned(nn.Module):
    """A masked network of nflows whose first feature, blind there, sees the condition through layers of its own."""

    made: Any  # of an untyped package
    first: Any

    def __init__(self, made: nn.Module, condition_dim: int, hidden: int) -> None:
        super().__init__()
        self.made = made
        last = nn.Linear(hidden, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.first = nn.Sequential(nn.Linear(condition_dim, hidden), nn.ReLU(), last)

    def columns(self, x: Tensor, condition: Tensor) -> Tensor:
        """Scale and shift of every feature, those of the first one first, shape `(2 * features, n)`."""
        made = self.made
        hidden = _masked(made.initial_layer, x) + relu(linear(made.context_layer, condition))
        for block in made.blocks:
            inner = _masked(block.linear_layers[0], relu(hidden)) + linear(block.context_layer, condition)
            hidden = hidden + _masked(block.linear_layers[1], block.dropout(relu(inner)))
        both = _masked(made.final_layer, hidden)
        own = linear(self.first[2], relu(linear(self.first[0], condition)))
        return torch.cat([both[:2] + own, both[2:]])


def _masked(layer: Any, columns: Tensor) -> Tensor:
    return torch.addmm(layer.bias[:, None], layer.weight * layer.mask, columns)


class AffineAutoregressive(MaskedAffineAutoregressiveTransform):
    """The nflows masked affine autoregressive map on columns, its first feature given the condition.

    Args:
        features: Number of features.
        condition_dim: Length of the conditions.
        hidden: Width of the networks; of the masked one at least `features`.
        blocks: Residual blocks.
        dropout: Dropout probability.
    """

    autoregressive_net: Any

    def __init__(self, features: int, *, condition_dim: int, hidden: int, blocks: int, dropout: float) -> None:
        width = max(hidden, features)
        super().__init__(features, hidden_features=width, context_features=condition_dim, num_blocks=blocks)
        for block in self.autoregressive_net.blocks:
            block.dropout = Dropout(width, dropout)
        self.autoregressive_net = _Conditioned(self.autoregressive_net, condition_dim, hidden)

    def columns(self, x: Tensor, condition: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Image of columns `(features, n)` given conditions `(condition_dim, n)`, and log-determinants `(n,)`.

        The inverse takes a pass per feature.
        """
        if not inverse:
            scale, shift = self._scale_and_shift(x, condition)
            return scale * x + shift, scale.log().sum(0)
        y = torch.zeros_like(x)
        for _ in range(self.features):
            scale, shift = self._scale_and_shift(y, condition)
            y = (x - shift) / scale
        return y, -scale.log().sum(0)

    def _scale_and_shift(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        unconstrained, shift = self.autoregressive_net.columns(x, condition).unflatten(0, (-1, 2)).unbind(1)
        return functional.softplus(unconstrained) + self._epsilon, shift

    def forward(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `(n, features)` and log-determinants `(n,)`."""
        outputs, log_det = self.columns(inputs.T, context.T)
        return outputs.T, log_det

    def inverse(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `forward`."""
        outputs, log_det = self.columns(inputs.T, context.T, inverse=True)
        return outputs.T, log_det
