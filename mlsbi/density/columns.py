r"""Layers of a network on columns `(features, n)`: one column a row of data.

Feature-first, every operation of a flow reads and writes whole vectors of length n, also under `torch.func.vmap`.
"""

from __future__ import annotations

import torch
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ColumnResidualNet", "Dropout", "dropouts", "linear", "relu"]


def linear(layer: nn.Linear, columns: Tensor) -> Tensor:
    """A linear layer applied to columns `(in_features, n)`, shape `(out_features, n)`."""
    return torch.addmm(layer.bias[:, None], layer.weight, columns)


def relu(x: Tensor) -> Tensor:
    """The larger of `x` and 0, with gradient 0 at 0, in the form that is fastest where it runs."""
    if x.device.type != "cpu" or not torch.compiler.is_compiling():
        return x.relu()
    # Compiled for a CPU, a relu keeps booleans for its gradient, which are slow to write; here it keeps numbers.
    # The clamp is for minus infinity, which times 0 would be NaN.
    return x.clamp_min(torch.finfo(x.dtype).min) * x.detach().clamp_min(0.0).sign()


class Dropout(nn.Module):
    r"""Dropout of columns, at random or by a mask from outside.

    With an empty `keep` the mask comes from torch's global random state, as in `nn.Dropout`. A trainer that wants two
    rows to lose the same units gives the mask instead, by `torch.func.functional_call` under the buffer's name.

    Args:
        features: Number of features of the columns, which a mask's maker needs to know.
        p: Probability that a unit is dropped.

    Example:
        >>> layer = Dropout(2, 0.5)
        >>> torch.func.functional_call(layer, {"keep": torch.tensor([[0.0], [2.0]])}, torch.ones(2, 1))
        tensor([[0.],
                [2.]])
    """

    keep: Tensor

    def __init__(self, features: int, p: float) -> None:
        super().__init__()
        self.features, self.p = features, p
        self.register_buffer("keep", torch.empty(0), persistent=False)

    def extra_repr(self) -> str:
        """What tells it from another."""
        return f"{self.features}, p={self.p}"

    def forward(self, columns: Tensor) -> Tensor:
        """Columns `(features, n)` as they are in evaluation mode, else each entry times 0 or `1 / (1 - p)`."""
        if not self.training or self.p == 0:
            return columns
        if self.keep.numel():
            return columns * self.keep
        return functional.dropout(columns, self.p)


def dropouts(network: nn.Module) -> dict[str, Dropout]:
    """The layers of a network that drop units, by the full name of their buffer `keep`.

    Example:
        >>> list(dropouts(nn.Sequential(Dropout(4, 0.1), Dropout(4, 0.0))))
        ['0.keep']
    """
    return {f"{name}.keep" if name else "keep": part for name, part in network.named_modules()
            if isinstance(part, Dropout) and part.p > 0}


class ColumnResidualNet(ResidualNet):
    """The nflows residual network with ReLUs, given a condition, on columns.

    Args:
        features: Length of its inputs.
        outputs: Length of its outputs.
        condition_dim: Length of the conditions.
        hidden: Width.
        blocks: Residual blocks.
        dropout: Dropout probability.
    """

    def __init__(
        self, features: int, outputs: int, *, condition_dim: int, hidden: int, blocks: int, dropout: float
    ) -> None:
        super().__init__(features, outputs, hidden, context_features=condition_dim, num_blocks=blocks)
        for block in self.blocks:
            block.dropout = Dropout(hidden, dropout)

    def forward(self, inputs: Tensor, context: Tensor) -> Tensor:
        """Outputs `(n, outputs)` of rows `(n, features)` and conditions `(n, condition_dim)`."""
        hidden = self.hidden_columns(torch.cat([inputs.T, context.T]), context.T)
        return linear(self.final_layer, hidden).T

    def hidden_columns(self, both: Tensor, condition: Tensor) -> Tensor:
        """What the last layer reads, `(hidden, n)`, of inputs with conditions below them, and of conditions."""
        hidden = linear(self.initial_layer, both)
        for block in self.blocks:
            inner = block.dropout(relu(linear(block.linear_layers[0], relu(hidden))))
            inner = linear(block.linear_layers[1], inner)
            hidden = torch.addcmul(hidden, inner, linear(block.context_layer, condition).sigmoid())
        return hidden
