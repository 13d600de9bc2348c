r"""Strategies that need pairs, and data that has none."""

from __future__ import annotations

from collections.abc import Sequence

from mlsbi.training.objective import Term

__all__ = ["check_coupled", "is_coupled"]


def is_coupled(terms: Sequence[Term]) -> bool:
    """Whether every row above the cheapest level has its coarse half."""
    return all(term.coarse is not None for term in terms[1:])


def check_coupled(terms: Sequence[Term], name: str) -> None:
    """Raises a `ValueError` unless levels are coupled."""
    if not is_coupled(terms):
        raise ValueError(f"{name} learns from pairs, outputs of two levels at one theta and noise; these levels were "
                         "simulated apart. Use transfer learning, a single level, or emulation by these.")
