r"""The telescoping multilevel loss over coupled rows.

.. math:: E[f^L] = \sum_l \left( a_l\, E[f^l] - a_{l-1}\, E[f^{l-1}] \right), \quad a_L = 1,\ a_{-1} = 0

is unbiased for every choice of weights fixed in advance. `a = 1` is the published objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Batch", "Term", "batch_terms", "pool_level", "pool_levels", "split_terms", "telescope"]


@dataclass(frozen=True)
class Term:
    r"""Standardised rows of one level's term.

    Args:
        input: What the density is of, shape `(n, dim)`.
        fine: Condition of the fine half, shape `(n, ...)`.
        coarse: Condition of the coarse half; `None` in the first term.
        coarse_input: Input of the coarse half where it differs (a likelihood); `input` when left out.
        of_outputs: Whether the density is of the simulator's outputs (a likelihood) instead of theta.
    """

    input: Tensor
    fine: Tensor
    coarse: Tensor | None = None
    coarse_input: Tensor | None = None
    of_outputs: bool = False

    def __len__(self) -> int:
        return len(self.input)

    @property
    def outputs(self) -> tuple[Tensor, Tensor | None]:
        """The simulator's outputs, fine and coarse."""
        return (self.input, self.coarse_input) if self.of_outputs else (self.fine, self.coarse)

    def with_outputs(self, fine: Tensor, coarse: Tensor | None) -> Term:
        """The same rows with other outputs."""
        if self.of_outputs:
            return replace(self, input=fine, coarse_input=coarse)
        return replace(self, fine=fine, coarse=coarse)

    def rows(self, index: Tensor) -> Term:
        """The rows that `index` picks, still aligned."""
        return self._map(lambda part: part[index])

    def to(self, device: torch.device | str) -> Term:
        """The same rows on a device."""
        return self._map(lambda part: part.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Term:
        coarse = None if self.coarse is None else change(self.coarse)
        coarse_input = None if self.coarse_input is None else change(self.coarse_input)
        return replace(self, input=change(self.input), fine=change(self.fine), coarse=coarse, coarse_input=coarse_input)


@dataclass(frozen=True)
class Batch:
    """Halves of all terms in one tensor: fine 0, then fine and coarse of each level above."""

    input: Tensor
    condition: Tensor
    sizes: tuple[int, ...]

    def halves(self) -> list[tuple[Tensor, Tensor]]:
        """`(input, condition)` of each half."""
        return list(zip(self.input.split(self.sizes), self.condition.split(self.sizes), strict=True))


def pool_level(terms: Sequence[Term], level: int) -> Term:
    """Every output of one level as a plain term: its own rows, then the coarse halves of the pairs above."""
    own = terms[level]
    inputs, conditions = [own.input], [own.fine]
    above = terms[level + 1] if level + 1 < len(terms) else None
    if above is not None and above.coarse is not None:
        inputs.append(above.input if above.coarse_input is None else above.coarse_input)
        conditions.append(above.coarse)
    return Term(torch.cat(inputs), torch.cat(conditions), of_outputs=own.of_outputs)


def pool_levels(terms: Sequence[Term], levels: Sequence[int]) -> Term:
    """Every output of several levels as one plain term."""
    pooled = [pool_level(terms, level) for level in levels]
    return Term(torch.cat([term.input for term in pooled]), torch.cat([term.fine for term in pooled]),
                of_outputs=pooled[0].of_outputs)


def batch_terms(terms: Sequence[Term]) -> Batch:
    """Joins the halves of all terms, the order in which `telescope` reads their losses."""
    inputs, conditions = [], []
    for term in terms:
        inputs.append(term.input)
        conditions.append(term.fine)
        if term.coarse is not None:
            inputs.append(term.input if term.coarse_input is None else term.coarse_input)
            conditions.append(term.coarse)
    return Batch(torch.cat(inputs), torch.cat(conditions), tuple(len(part) for part in inputs))


def telescope(halves: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    r"""Weighted telescoping sum of mean losses.

    Args:
        halves: Row losses `(..., rows)` of fine 0, fine 1, coarse 1, fine 2, coarse 2, ...
        weights: a_0 .. a_L, of which the last is 1, shape `(..., L + 1)`.

    Returns:
        The multilevel estimate of the finest level's mean loss, shape `(...)`.

    References:
        | Multilevel neural simulation-based inference (Hikida et al., 2025)
        | https://arxiv.org/abs/2506.06087

    Example:
        >>> low, high, low_twin = torch.tensor([1.0, 3.0]), torch.tensor([5.0]), torch.tensor([4.0])
        >>> telescope([low, high, low_twin], [1.0, 1.0])
        tensor(3.)
    """
    a = torch.as_tensor(weights, dtype=halves[0].dtype, device=halves[0].device)
    loss = a[..., 0] * halves[0].mean(-1)
    for level in range(1, a.shape[-1]):
        fine, coarse = halves[2 * level - 1], halves[2 * level]
        loss = loss + a[..., level] * fine.mean(-1) - a[..., level - 1] * coarse.mean(-1)
    return loss


def split_terms(
    terms: Sequence[Term],
    fraction: float,
    generator: torch.Generator,
    *,
    member: int = 0,
    members: int = 1,
    cover: bool = False,
) -> tuple[list[Term], list[Term]]:
    r"""Holds out whole rows of every term, pairs kept together.

    With several members the held-out rows move evenly through one permutation, so that every row is held out by about
    as many members as any other: where pairs are few, that is cross-validation.

    Args:
        terms: Rows of every level.
        fraction: Share of each term's rows to hold out; at least one, and at least one stays.
        generator: Source of the permutation; the same for all members.
        member: Which member of an ensemble the split is for.
        members: How many there are.
        cover: Whether to hold out enough rows, whatever the fraction, that every row is held out by some member.

    Raises:
        ValueError: If a term has fewer than two rows.
    """
    kept, held = [], []
    for level, term in enumerate(terms):
        n = len(term)
        if n < 2:
            raise ValueError(f"Expected at least 2 rows in term {level}, one to train on and one to hold out; got {n}. "
                             "Simulate more, or set validation_fraction=0 to train for a fixed number of epochs.")
        out = min(max(-(-n // members) if cover else round(fraction * n), 1), n - 1)
        order = torch.randperm(n, generator=generator).roll(-(member * n // members))
        held.append(term.rows(order[:out]))
        kept.append(term.rows(order[out:]))
    return kept, held
