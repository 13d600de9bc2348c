r"""Rows of a posterior turned into rows of a likelihood, and networks for them."""

from __future__ import annotations

import torch

from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.registry import DensityBuilder
from mlsbi.density.standardise import Standardiser
from mlsbi.randomness import child_seed, seeded
from mlsbi.training.members import Member
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

__all__ = ["MOST_OUTPUTS", "check_outputs", "likelihood_network", "turn_term"]

MOST_OUTPUTS = 64
"""Numbers in an output up to which its density can be learned from few runs."""


def check_outputs(term: Term) -> None:
    """Raises a `ValueError` if outputs are too long to learn their density from few runs."""
    size = term.outputs[0][0].numel()
    if size > MOST_OUTPUTS:
        raise ValueError(f"Expected outputs of at most {MOST_OUTPUTS} numbers, whose density few runs can teach; got "
                         f"{size}. Reduce x to summary statistics, or use another strategy.")


def turn_term(term: Term) -> Term:
    """The rows of a likelihood: outputs, flattened, given what theta became. Those of one already are as they were."""
    if term.of_outputs:
        return term
    x = term.fine.flatten(1)
    if term.coarse is None:
        return Term(x, term.input, of_outputs=True)
    return Term(x, term.input, term.input, term.coarse.flatten(1), of_outputs=True)


def likelihood_network(
    member: Member, density: DensityBuilder, options: TrainingOptions, key: int
) -> ConditionalDensity:
    """A fresh density for a member's turned rows, which are standardised; initialised from its seed and a key."""
    row = turn_term(member.train[0])
    sides = [Standardiser(torch.zeros(rows.shape[1]), torch.ones(rows.shape[1]), dtype=options.dtype)
             for rows in (row.input, row.fine)]
    with seeded(child_seed(member.seed, key)):
        network = ConditionalDensity(density, *sides)
    network.density.to(options.dtype)
    return network.to(member.network.input_scaler.mean.device)
