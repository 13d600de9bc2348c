r"""What a network does in train mode beside computing its loss: draw random numbers, change buffers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlsbi.density.conditional import ConditionalDensity
from mlsbi.training.stack import Stack, perturbed

__all__ = ["Traits", "find_traits", "is_normed"]


@dataclass(frozen=True)
class Traits:
    """Whether a network draws numbers of its own from torch's global state, and the names of buffers it changes."""

    draws: bool
    moving: tuple[str, ...]


@torch.no_grad()
def find_traits(
    network: ConditionalDensity, input: Tensor, condition: Tensor, keep: Mapping[str, Tensor]
) -> Traits:
    """Looks at a copy of a network, with parameters away from where they are: buffers may be settled there.

    Args:
        network: Left as it is.
        input: A few rows, `(n, dim)`.
        condition: Of the same rows.
        keep: Masks of its own dropout layers, `(features, n)` each, for which it then draws nothing.
    """
    copied = copy.deepcopy(network)
    before = {name: buffer.clone() for name, buffer in copied.named_buffers()}
    stack = Stack([copied])
    stack.train()
    state = _random_state(input.device)
    stack.one(0, perturbed(stack.read())[0], input, condition, keep)
    moving = tuple(name for name, buffer in copied.named_buffers()
                   if name in before and not torch.equal(torch.nan_to_num(buffer), torch.nan_to_num(before[name])))
    return Traits(not torch.equal(state, _random_state(input.device)), moving)


def is_normed(network: nn.Module) -> bool:
    """Whether a network, in the mode it is in, normalises by batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in network.modules())


def _random_state(device: torch.device) -> Tensor:
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state
