r"""Running statistics of batch normalisation, which training changes beside the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Statistics", "is_normed"]


def is_normed(network: nn.Module) -> bool:
    """Whether a network normalises by batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


class Statistics:
    r"""The statistics of several networks as they were when their parameters were best.

    False where there are none.

    Args:
        networks: All members, whether still in training or not.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._current = [
            {f"{index}.{name}": buffer for index, module in enumerate(network.modules())
             if isinstance(module, nn.modules.batchnorm._BatchNorm) for name, buffer in module.named_buffers()}
            for network in networks
        ]
        self._best = [{name: buffer.clone() for name, buffer in own.items()} for own in self._current]

    def __bool__(self) -> bool:
        return any(self._current)

    def keep(self, members: Sequence[int]) -> None:
        """Says that these members are at their best."""
        for member in members:
            self._best[member] = {name: buffer.clone() for name, buffer in self._current[member].items()}

    @torch.no_grad()
    def restore(self, member: int) -> None:
        """Puts a member's best statistics back."""
        for name, buffer in self._current[member].items():
            buffer.copy_(self._best[member][name])

    def tensors(self) -> dict[str, Tensor]:
        """All that changes."""
        return {f"{what}.{member}.{name}": buffer for what, groups in (("current", self._current), ("best", self._best))
                for member, own in enumerate(groups) for name, buffer in own.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `tensors` gave."""
        for name, buffer in self.tensors().items():
            buffer.copy_(tensors[name])
