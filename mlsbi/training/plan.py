r"""Which rows every step sees, fixed before the first: all of them, or minibatches that keep pairs together.

Rows stay on the device, one block per half of the telescoping sum, with a leading axis for the members of an ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlsbi.training.objective import Term

__all__ = ["Plan", "Rows", "batch_rows", "stack_rows"]

_LANES = 1 << 16  # values of 16 random bits
_SMALLEST_BATCH = 64  # rows of a term in a step, where it has them: fewer make the correction's gradient noise


@dataclass(frozen=True)
class Rows:
    r"""Halves of all terms side by side: fine 0, then fine and coarse of each level above.

    Args:
        input: Shape `(K, n, dim)`.
        condition: Shape `(K, n, ...)`.
        sizes: Rows of each half, n in all.
        keep: Dropout masks by buffer name, each `(K, features, n)`; the two halves of a pair have the same.
    """

    input: Tensor
    condition: Tensor
    sizes: tuple[int, ...]
    keep: Mapping[str, Tensor]

    def halves(self) -> list[Rows]:
        """Each half by itself."""
        parts = zip(self.input.split(self.sizes, 1), self.condition.split(self.sizes, 1), strict=True)
        masks = {name: mask.split(self.sizes, 2) for name, mask in self.keep.items()}
        return [Rows(input, condition, (size,), {name: mask[half] for name, mask in masks.items()})
                for half, ((input, condition), size) in enumerate(zip(parts, self.sizes, strict=True))]


def stack_rows(members: Sequence[Sequence[Term]]) -> list[tuple[Tensor, Tensor]]:
    """Input and condition `(K, n, ...)` of every half of the terms of K members, without a copy where K is 1."""
    blocks = []
    for terms in zip(*members, strict=True):
        blocks.append((_stack([term.input for term in terms]), _stack([term.fine for term in terms])))
        if terms[0].coarse is not None:
            inputs = blocks[-1][0] if terms[0].coarse_input is None else _stack([term.coarse_input for term in terms])
            blocks.append((inputs, _stack([term.coarse for term in terms])))
    return blocks


class Plan:
    r"""Steps of an epoch, for K members with equally many rows.

    Args:
        members: Standardised training rows of each member's terms, on the device.
        batch_size: See `TrainingOptions`.
        dropouts: Features and probability of every dropout layer, by the name of its buffer.
        seeds: One per member; a member's batches and masks are the same whoever is trained beside it.
    """

    def __init__(
        self,
        members: Sequence[Sequence[Term]],
        *,
        batch_size: int | str | None,
        dropouts: Mapping[str, tuple[int, float]],
        seeds: Sequence[int],
    ) -> None:
        self.n = tuple(len(term) for term in members[0])
        self.blocks = stack_rows(members)
        self.device = self.blocks[0][0].device
        self.dtype = self.blocks[0][0].dtype
        self.dropouts = dict(dropouts)
        # Term of each half: 0, 1, 1, 2, 2, ...
        self.term = tuple(level for level, term in enumerate(members[0])
                          for _ in range(1 if term.coarse is None else 2))
        self.steps, self.taken = self.split(batch_rows(batch_size, sum(self.n)))
        self.full = self.steps == 1
        self.sizes = tuple(self.taken[term] for term in self.term)
        # Orders are drawn on the CPU, so that a seed gives the same ones on every device.
        self.orders = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.bits = [_Bits(seed, self.device) for seed in seeds]
        self._whole = self._join() if self.full else None

    def __len__(self) -> int:
        """Members."""
        return len(self.orders)

    def split(self, size: int) -> tuple[int, tuple[int, ...]]:
        """Steps of an epoch with so many rows in each, about, and how many of each term a step then takes."""
        steps = math.ceil(sum(self.n) / size)
        return steps, tuple(n if steps == 1 else min(n, max(math.ceil(n / steps), _SMALLEST_BATCH)) for n in self.n)

    def epoch(self) -> Iterator[Rows]:
        """The rows of each step of the next epoch."""
        if self._whole is not None:
            yield Rows(*self._whole, self.sizes, self._keep())
            return
        orders = []
        for n in self.n:
            drawn = torch.stack([torch.randperm(n, generator=generator) for generator in self.orders])
            orders.append((drawn + n * torch.arange(len(self))[:, None]).to(self.device, non_blocking=True))
        for step in range(self.steps):
            picks = []
            for n, size, order in zip(self.n, self.taken, orders, strict=True):
                start = step * size % n
                picks.append(torch.cat([order, order], 1)[:, start: start + size] if start + size > n
                             else order[:, start: start + size])
            yield Rows(*self._join(picks), self.sizes, self._keep())

    def few(self, most: Sequence[int]) -> Rows:
        """The first rows of every term, with masks that drop nothing."""
        blocks = [(input[:, :most[term]], condition[:, :most[term]])
                  for term, (input, condition) in zip(self.term, self.blocks, strict=True)]
        input = torch.cat([input for input, _ in blocks], 1)
        keep = {name: input.new_ones(len(self), features, input.shape[1])
                for name, (features, _) in self.dropouts.items()}
        return Rows(input, torch.cat([condition for _, condition in blocks], 1),
                    tuple(block.shape[1] for block, _ in blocks), keep)

    def select(self, members: Sequence[int]) -> None:
        """Goes on with some of the members."""
        index = torch.tensor(members, device=self.device)
        self.blocks = [(input[index], condition[index]) for input, condition in self.blocks]
        self.orders = [self.orders[member] for member in members]
        self.bits = [self.bits[member] for member in members]
        self._whole = self._join() if self.full else None

    def _join(self, picks: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """All halves' rows that `picks`, `(K, size)` per term, index in the blocks with members end to end."""
        parts: list[tuple[Tensor, Tensor]] = []
        for term, block in zip(self.term, self.blocks, strict=True):
            if picks is None:
                parts.append(block)
                continue
            index = picks[term]
            input, condition = (rows.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
                                for rows in block)
            parts.append((input, condition))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([input for input, _ in parts], 1), torch.cat([condition for _, condition in parts], 1)

    def _keep(self) -> dict[str, Tensor]:
        """Masks of 0 and 1 / (1 - p) for every row of a step and layer, `(K, features, rows)`."""
        if not self.dropouts:
            return {}
        columns = sum(self.taken)
        features = [count for count, _ in self.dropouts.values()]
        drawn = torch.stack([bits.draw(sum(features) * columns) for bits in self.bits])
        parts = drawn.unflatten(1, (sum(features), columns)).split(self.taken, 2)
        rows = torch.cat([parts[term] for term in self.term], 2).split(features, 1)
        return {name: _mask(bits, p, self.dtype) for (name, (_, p)), bits in zip(self.dropouts.items(), rows,
                                                                                 strict=True)}

    def random_state(self) -> dict[str, Tensor]:
        """What the next batches and masks follow from, each with a leading axis of members."""
        state = {"orders": torch.stack([order.get_state() for order in self.orders])}
        if self.dropouts:
            state["bits"] = torch.stack([bits.get_state() for bits in self.bits])
        return state

    def set_random_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `random_state` gave."""
        for order, own in zip(self.orders, state["orders"], strict=True):
            order.set_state(own.cpu().clone())  # torch reads a view from the start of its storage
        for bits, own in zip(self.bits, state.get("bits", ()), strict=bool(self.dropouts)):
            bits.set_state(own.cpu().clone())


def _mask(bits: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """0 with probability p, to 16 bits, else what makes the mean 1."""
    kept = min(max(round((1 - p) * _LANES), 1), _LANES - 1)
    # Without booleans, which take several times as long: at least 0.5 where kept, below 0 where not.
    return torch.rsub(bits, kept - _LANES // 2 - 0.5).clamp_(0.0, 0.5).to(dtype).mul_(2 * _LANES / kept)


class _Bits:
    """Random 16-bit numbers: numpy's on the CPU, where they take a tenth of the time of torch's, else the device's."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self._host = np.random.SFC64(seed)
        self._own = None if device.type == "cpu" else torch.Generator(device).manual_seed(seed)

    def draw(self, count: int) -> Tensor:
        words = -(-count // 4)
        if self._own is None:
            return torch.from_numpy(self._host.random_raw(words).view(np.int16))[:count]
        drawn = torch.empty(words, dtype=torch.int64, device=self.device)
        return drawn.random_(-(1 << 63), None, generator=self._own).view(torch.int16)[:count]

    def get_state(self) -> Tensor:
        if self._own is not None:
            return self._own.get_state()
        return torch.from_numpy(self._host.state["state"]["state"].view(np.uint8).copy())

    def set_state(self, state: Tensor) -> None:
        if self._own is not None:
            self._own.set_state(state)
        else:
            told = self._host.state
            self._host.state = {**told, "state": {"state": state.numpy().view(np.uint64).copy()}}


def batch_rows(asked: int | str | None, total: int) -> int:
    """Rows of all terms in a step, about."""
    if asked is None:
        return total
    return asked if isinstance(asked, int) else min(max(math.ceil(total / 4), 256), 2048)


def _stack(tensors: Sequence[Tensor | None]) -> Tensor:
    found = [tensor for tensor in tensors if tensor is not None]
    return found[0][None] if len(found) == 1 else torch.stack(found)
