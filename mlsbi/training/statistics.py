r"""Buffers that training changes beside the parameters, such as the running statistics of batch normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Statistics"]


class Statistics:
    r"""Such buffers of several networks, as they were when the parameters were best.

    False where there are none.

    Args:
        networks: All members, whether still in training or not.
        names: Names of the buffers.
    """

    def __init__(self, networks: Sequence[nn.Module], names: Sequence[str]) -> None:
        self._networks, self._names = tuple(networks), tuple(names)
        self._best = [{name: buffer.clone() for name, buffer in self._current(member).items()}
                      for member in range(len(networks))]

    def __bool__(self) -> bool:
        return bool(self._names)

    def _current(self, member: int) -> dict[str, Tensor]:
        """Looked up each time: a module may put another tensor in the place of its buffer."""
        buffers = dict(self._networks[member].named_buffers())
        return {name: buffers[name] for name in self._names}

    def keep(self, members: Sequence[int]) -> None:
        """Says that these members are at their best."""
        for member in members:
            self._best[member] = {name: buffer.clone() for name, buffer in self._current(member).items()}

    @torch.no_grad()
    def restore(self, member: int) -> None:
        """Puts a member's best buffers back."""
        for name, buffer in self._current(member).items():
            buffer.copy_(self._best[member][name])

    def tensors(self) -> dict[str, Tensor]:
        """All that changes."""
        found: dict[str, Tensor] = {}
        for member, best in enumerate(self._best):
            for what, own in (("current", self._current(member)), ("best", best)):
                found |= {f"{what}.{member}.{name}": buffer for name, buffer in own.items()}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `tensors` gave."""
        for name, buffer in self.tensors().items():
            buffer.copy_(tensors[name])
