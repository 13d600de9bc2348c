r"""Networks to be trained, each with its own rows, and how many of them in one go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlsbi.density.conditional import ConditionalDensity
from mlsbi.training.alignment import align_terms
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions
from mlsbi.training.plan import batch_rows

__all__ = ["Member", "Pooling", "Schedule", "align_members", "at_once", "groups_of", "whole_groups"]

Pooling = bool | tuple[int, ...]
"""Whether all members stop at the epoch that is best on average; or the group of each member: those of a group do."""

# Rows in a step up to which a CPU evaluates several networks faster in one go, of each and of all (it gains 2 to 4
# times with a few hundred rows, and loses beyond its cache).
_ROWS_EACH, _TOGETHER_ROWS = 4096, 32_768
_TOGETHER_VALUES = 1 << 28  # numbers in the rows of all members, which are copies: 1 GiB


@dataclass(frozen=True)
class Member:
    r"""A network to train and its own rows.

    Args:
        network: On the device to train on; left in eval mode with the best weights found.
        train: Standardised rows of each term.
        validation: Held-out rows of each term; empty to train for all epochs and keep the last weights.
        seed: Seed of batches and dropout.
        draw: `draw(n, seed)` gives inputs `(n, dim)` from the prior, standardised, on the CPU; `None` where the density
            is not of theta.
    """

    network: ConditionalDensity
    train: Sequence[Term]
    validation: Sequence[Term]
    seed: int
    draw: Callable[[int, int], Tensor] | None = None


@dataclass(frozen=True)
class Schedule:
    r"""How long to train and under which weights, as found out before on other splits.

    Args:
        epochs: Epochs to train.
        weights: a_0 .. a_{L-1} in every epoch, instead of estimated ones.
    """

    epochs: int
    weights: tuple[tuple[float, ...], ...] | None = None


def align_members(members: Sequence[Member]) -> list[Member]:
    """Members with the outputs of cheap levels mapped towards the finest, each by its own pairs; see `align_terms`."""
    shared = members[0].network.shared_axes(of_outputs=members[0].train[0].of_outputs)
    aligned = [align_terms(member.train, member.validation, shared=shared) for member in members]
    return [replace(member, train=train, validation=validation)
            for member, (train, validation) in zip(members, aligned, strict=True)]


def groups_of(pooled: Pooling, members: int) -> list[list[int]]:
    """Places of members that stop together.

    Raises:
        ValueError: If groups are not those of so many members.
    """
    if isinstance(pooled, bool):
        return [list(range(members))] if pooled else [[place] for place in range(members)]
    if len(pooled) != members:
        raise ValueError(f"Expected the group of each of {members} members; got {len(pooled)} groups.")
    return [[place for place, own in enumerate(pooled) if own == group] for group in dict.fromkeys(pooled)]


def whole_groups(groups: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Places of members to train in one go: whole groups, of so many members at most where they have no more."""
    parts: list[list[int]] = []
    for group in groups:
        if parts and len(parts[-1]) + len(group) <= most:
            parts[-1] += group
        else:
            parts.append(list(group))
    return parts


def at_once(terms: Sequence[Term], members: int, options: TrainingOptions, device: torch.device) -> int:
    """How many of several networks with such rows each to train in one go; 1 is one after the other.

    The answer follows from sizes alone, not from a clock, so that a seed gives the same on machines of one kind.
    """
    if members == 1 or options.together != "auto":
        return members if options.together else 1
    halves = [(len(term), 1 if term.coarse is None else 2) for term in terms]
    total = sum(rows for rows, _ in halves)
    share = min(batch_rows(options.batch_size, total) / total, 1.0)
    values = sum(rows * count * (term.input[0].numel() + term.fine[0].numel())
                 for (rows, count), term in zip(halves, terms, strict=True))
    most = max(_TOGETHER_VALUES // values, 1)
    if device.type == "cpu":
        rows = math.ceil(share * sum(rows * count for rows, count in halves))
        most = min(most, _TOGETHER_ROWS // rows) if rows <= _ROWS_EACH else 1
    return min(members, most)
