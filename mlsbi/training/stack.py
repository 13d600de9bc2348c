r"""Networks of one architecture as one matrix: a row per network, its trainable parameters side by side.

Gradients, optimiser and adjustments then take one operation on a matrix where they would take one per parameter and
network, and losses of all networks can be evaluated in one go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mlsbi.density.columns import dropouts
from mlsbi.density.conditional import ConditionalDensity

__all__ = ["Stack", "perturbed", "refusal"]


class _Losses(nn.Module):
    """A network as a module whose call gives the loss of every row."""

    def __init__(self, network: ConditionalDensity) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor, condition: Tensor) -> Tensor:
        return -self.network.standard_log_prob(input, condition)


class Stack:
    r"""K networks of one architecture.

    Args:
        networks: On one device, of one precision.
    """

    def __init__(self, networks: Sequence[ConditionalDensity]) -> None:
        self.networks = tuple(networks)
        self._modules = tuple(_Losses(network) for network in networks)
        trained = {name: p for name, p in self._modules[0].named_parameters() if p.requires_grad}
        self.names = tuple(trained)
        self.shapes = tuple(p.shape for p in trained.values())
        self.sizes = tuple(p.numel() for p in trained.values())
        # Only where parameters are shared: tying takes a tenth of a small step.
        first = self._modules[0]
        self._tied = len(list(first.parameters())) < len(list(first.named_parameters(remove_duplicate=False)))
        self._fixed = self._own()
        self._layers = [dropouts(network) for network in networks]

    def __len__(self) -> int:
        return len(self.networks)

    def _own(self) -> dict[str, Tensor]:
        """What is not trained but differs between the networks: frozen parameters, buffers."""
        if len(self) == 1:
            return {}
        found = [{name: tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())
                  if name not in self.names} for module in self._modules]
        first, *others = found
        return {name: torch.stack([tensors[name].detach() for tensors in found]) for name, tensor in first.items()
                if not all(torch.equal(tensor, other[name]) for other in others)}

    def read(self) -> Tensor:
        """A copy of the parameters, shape `(K, P)`."""
        rows = []
        for module in self._modules:
            parameters = dict(module.named_parameters())
            rows.append(torch.cat([parameters[name].detach().flatten() for name in self.names]))
        return torch.stack(rows)

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Gives the networks these parameters, `(K, P)`."""
        for module, row in zip(self._modules, flat, strict=True):
            parameters = dict(module.named_parameters())
            for name, part, shape in zip(self.names, row.split(self.sizes), self.shapes, strict=True):
                parameters[name].copy_(part.view(shape))

    def bind(self, flat: Tensor) -> None:
        """Makes the networks' parameters parts of `flat` (K, P): what changes there changes them."""
        for parameters, row in zip(self.parameters(), flat.detach(), strict=True):
            for parameter, part, shape in zip(parameters, row.split(self.sizes), self.shapes, strict=True):
                parameter.data = part.view(shape)

    def release(self) -> None:
        """Gives the networks' parameters memory of their own again."""
        for parameters in self.parameters():
            for parameter in parameters:
                parameter.data = parameter.data.clone()
        for layers in self._layers:
            for layer in layers.values():
                layer.keep = layer.keep.new_empty(0)

    def parameters(self) -> list[list[nn.Parameter]]:
        """Each network's trained parameters."""
        return [[parameter for parameter in network.parameters() if parameter.requires_grad]
                for network in self.networks]

    def as_is(self, member: int, input: Tensor, condition: Tensor, keep: Mapping[str, Tensor]) -> Tensor:
        """Row losses `(n,)` of one network with the parameters that it has, on its rows of `(K, n, ...)`."""
        for name, mask in keep.items():
            self._layers[member][name].keep = mask[member]
        found: Tensor = self._modules[member](input[member], condition[member])
        return found

    def eval(self) -> None:
        """Eval mode."""
        for network in self.networks:
            network.eval()

    def train(self) -> None:
        """Train mode, but for an embedding of which nothing is trained: its statistics and masks stay fixed too."""
        for network in self.networks:
            network.train()
            parameters = list(network.embedding.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                network.embedding.eval()

    def together(self, flat: Tensor, input: Tensor, condition: Tensor, keep: Mapping[str, Tensor]) -> Tensor:
        r"""Row losses of all networks, in one go.

        Args:
            flat: Parameters, shape `(K, P)`.
            input: Shape `(K, n, dim)`.
            condition: Shape `(K, n, ...)`.
            keep: Dropout masks by buffer name, each `(K, features, n)`.

        Returns:
            Losses, shape `(K, n)`.
        """
        if len(self) == 1:
            return self.apart(flat, input, condition, keep)
        parts = flat.split(self.sizes, 1)
        values = {name: part.unflatten(1, shape) for name, part, shape in zip(self.names, parts, self.shapes,
                                                                              strict=True) if part.shape[1]}
        module = self._modules[0]

        def losses(own: dict[str, Tensor], rows: Tensor, conditions: Tensor) -> Tensor:
            return functional_call(module, own, (rows, conditions), tie_weights=self._tied)

        mapped: Callable[..., Tensor] = vmap(losses)
        return mapped({**values, **self._fixed, **_named(keep)}, input, condition)

    def apart(self, flat: Tensor, input: Tensor, condition: Tensor, keep: Mapping[str, Tensor]) -> Tensor:
        """The same as `together`, one network after the other."""
        return torch.stack([
            self.one(member, flat[member], input[member], condition[member],
                     {name: mask[member] for name, mask in keep.items()})
            for member in range(len(self))
        ])

    def one(
        self, member: int, flat: Tensor, input: Tensor, condition: Tensor, keep: Mapping[str, Tensor]
    ) -> Tensor:
        """Row losses `(n,)` of one network with parameters `(P,)`."""
        values = {name: part.view(shape) for name, part, shape in zip(self.names, flat.split(self.sizes), self.shapes,
                                                                      strict=True)}
        found: Tensor = functional_call(self._modules[member], {**values, **_named(keep)}, (input, condition),
                                        tie_weights=self._tied)
        return found


def refusal(
    network: ConditionalDensity, input: Tensor, condition: Tensor, keep: Mapping[str, Tensor]
) -> str | None:
    """Why a network cannot be one of several that are evaluated in one go; `None` if it can.

    Args:
        network: Left as it is.
        input: A few rows, `(n, dim)`.
        condition: Of the same rows.
        keep: Dropout masks of one network, `(features, n)` each.
    """
    stack = Stack([copy.deepcopy(network), copy.deepcopy(network)])
    stack.train()
    flat, rows, conditions = perturbed(stack.read()), *(part.expand(2, *part.shape) for part in (input, condition))
    masks = {name: mask.expand(2, *mask.shape) for name, mask in keep.items()}
    with torch.no_grad():
        try:
            found = stack.together(flat, rows, conditions, masks)
        except Exception as error:  # a user's module may raise anything where it cannot be mapped
            return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        expected = stack.apart(flat, rows, conditions, masks)
    alike = torch.allclose(found, expected, rtol=1e-2, atol=1e-2, equal_nan=True)
    return None if alike else "in one go the network gives other values"


def perturbed(flat: Tensor) -> Tensor:
    """Parameters away from where they start, where some are zero and networks alike."""
    return flat + 0.1 * torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device).view_as(flat).sin()


def _named(keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"network.{name}": mask for name, mask in keep.items()}
