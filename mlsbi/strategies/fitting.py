r"""From coupled simulations to trained networks."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from mlsbi.data import MultilevelData
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.flows import DensityBuilder
from mlsbi.density.standardise import Standardiser
from mlsbi.priors import Unbounded, check_theta
from mlsbi.randomness import child_seed, seeded
from mlsbi.strategies.registry import Strategy
from mlsbi.training.loop import History, TrainingOptions
from mlsbi.training.objective import Term, split_terms

__all__ = ["Problem", "fit_ensemble", "posterior_problem"]


@dataclass(frozen=True)
class Problem:
    r"""Rows of every term in their own units, and the scalers that standardise them.

    Args:
        terms: Rows of each level's term, theta in unbounded space.
        input_scaler: Standardiser of what the density is of.
        condition_scaler: Standardiser of what it is conditioned on.
    """

    terms: tuple[Term, ...]
    input_scaler: Standardiser
    condition_scaler: Standardiser

    def standardise(self, term: Term) -> Term:
        """A term's rows as networks read them."""
        coarse = None if term.coarse is None else self.condition_scaler(term.coarse)
        coarse_input = None if term.coarse_input is None else self.input_scaler(term.coarse_input)
        return Term(self.input_scaler(term.input), self.condition_scaler(term.fine), coarse, coarse_input)

    def network(self, builder: DensityBuilder, embedding: nn.Module | None, *, seed: int) -> ConditionalDensity:
        """A fresh network with these scalers, initialised from a seed."""
        with seeded(seed):
            # Every network owns its scalers: it may move to a device, and is saved by itself.
            scalers = copy.deepcopy(self.input_scaler), copy.deepcopy(self.condition_scaler)
            return ConditionalDensity(builder, *scalers, copy.deepcopy(embedding))


def posterior_problem(data: MultilevelData, prior: Distribution) -> Problem:
    r"""Rows for a density of unbounded theta given x.

    Args:
        data: Coupled simulations.
        prior: The prior, whose support is mapped to unbounded space.

    Raises:
        ValueError: If theta does not fit the prior.
    """
    unbounded = Unbounded(prior)
    inputs: list[Tensor] = []
    for name, level in zip(data.names, data.levels, strict=True):
        check_theta(prior, level.theta, where=f"level '{name}' of the data")
        inputs.append(unbounded.to(level.theta))
    input_scaler = Standardiser.fit(inputs)
    condition_scaler = Standardiser.fit([level.fine for level in data.levels])
    terms = tuple(Term(z, level.fine, level.coarse) for z, level in zip(inputs, data.levels, strict=True))
    return Problem(terms, input_scaler, condition_scaler)


def fit_ensemble(
    problem: Problem,
    builder: DensityBuilder,
    strategy: Strategy,
    *,
    members: int = 1,
    embedding: nn.Module | None = None,
    options: TrainingOptions,
    device: str | torch.device = "cpu",
    seed: int,
    progress: bool = True,
) -> tuple[list[ConditionalDensity], list[History]]:
    r"""Trains networks that differ in initialisation and in the rows held out.

    Args:
        problem: Rows and their scalers.
        builder: Builds the density.
        strategy: Which rows and which objective.
        members: Networks to train.
        embedding: Network from standardised conditions to vectors. Every member trains a copy: the first as given, the
            others re-initialised where no parameter is frozen.
        options: How each is trained.
        device: Where.
        seed: Seed of initialisation, splits, batches and dropout.
        progress: Whether to show a progress bar.
    """
    rows = strategy.terms(problem.terms)
    networks, histories = [], []
    for member in range(members):
        network = problem.network(builder, embedding, seed=child_seed(seed, 0, member))
        if member and embedding is not None:
            _reset(network.embedding, seed=child_seed(seed, 3, member))
        network.to(device)
        if options.validation_fraction:
            generator = torch.Generator().manual_seed(child_seed(seed, 1))  # one permutation for all members
            kept, held_out = split_terms(rows, options.validation_fraction, generator, member=member, members=members)
        else:
            kept, held_out = list(rows), []
        # Standardised one by one, so that large data is not there twice over.
        train = [problem.standardise(kept.pop(0)) for _ in range(len(kept))]
        held = [problem.standardise(held_out.pop(0)) for _ in range(len(held_out))]
        label = "training" if members == 1 else f"training {member + 1}/{members}"
        histories.append(strategy.fit(network, train, held, options=options, seed=child_seed(seed, 2, member),
                                      progress=progress, label=label))
        del train, held  # copies of the rows; the next member makes its own
        networks.append(network)
    return networks, histories


def _reset(module: nn.Module, *, seed: int) -> None:
    """Starts the parts of a module that can reset themselves from new values, frozen ones excepted."""
    with seeded(seed):
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset) and all(parameter.requires_grad for parameter in part.parameters()):
                reset()
