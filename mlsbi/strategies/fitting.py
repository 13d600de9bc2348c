r"""From coupled simulations to trained networks."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributions import Distribution

from mlsbi.data import MultilevelData
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.embeddings import EmbeddingBuilder, shared_axes
from mlsbi.density.registry import DensityBuilder
from mlsbi.density.standardise import Standardiser, Transform
from mlsbi.priors import Unbounded, check_theta
from mlsbi.randomness import child_seed, seeded
from mlsbi.strategies.registry import Strategy
from mlsbi.training.loop import History, TrainingOptions
from mlsbi.training.objective import Term, split_terms

__all__ = ["Problem", "fit_ensemble", "likelihood_problem", "posterior_problem"]


@dataclass(frozen=True)
class Problem:
    r"""Rows of every term in their own units, and the scalers that standardise them.

    Args:
        terms: Rows of each level's term.
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
        return replace(term, input=self.input_scaler(term.input), fine=self.condition_scaler(term.fine), coarse=coarse,
                       coarse_input=coarse_input)

    def network(
        self, builder: DensityBuilder, embedding: EmbeddingBuilder | None, *, seed: int
    ) -> ConditionalDensity:
        """A fresh network with these scalers, initialised from a seed."""
        with seeded(seed):
            # Every network owns its scalers: it may move to a device, and is saved by itself.
            scalers = copy.deepcopy(self.input_scaler), copy.deepcopy(self.condition_scaler)
            built = None if embedding is None else embedding(tuple(self.condition_scaler.mean.shape))
            return ConditionalDensity(builder, *scalers, built)


def posterior_problem(
    data: MultilevelData,
    prior: Distribution,
    *,
    x_transform: Transform = "none",
    embedding: EmbeddingBuilder | None = None,
) -> Problem:
    r"""Rows for a density of unbounded theta given x.

    Args:
        data: Coupled simulations.
        prior: The prior, whose support is mapped to unbounded space.
        x_transform: What outputs go through before they are standardised.
        embedding: What reads x; it may name axes to standardise alike.

    Raises:
        ValueError: If theta does not fit the prior.
    """
    _check_levels(data, prior)
    unbounded = Unbounded(prior)
    inputs = [unbounded.to(level.theta) for level in data.levels]
    shared = shared_axes(embedding, tuple(data.levels[0].fine.shape[1:]))
    scaler = Standardiser.fit([level.fine for level in data.levels], transform=x_transform, shared=shared)
    terms = tuple(Term(z, level.fine, level.coarse) for z, level in zip(inputs, data.levels, strict=True))
    return Problem(terms, Standardiser.fit(inputs), scaler)


def likelihood_problem(data: MultilevelData, prior: Distribution, *, x_transform: Transform = "none") -> Problem:
    r"""Rows for a density of x, flattened, given theta in the coordinates of `Unbounded.features`.

    Args:
        data: Coupled simulations.
        prior: The prior.
        x_transform: What outputs go through before they are standardised.

    Raises:
        ValueError: If theta does not fit the prior.
    """
    _check_levels(data, prior)
    unbounded = Unbounded(prior)
    conditions = [unbounded.features(level.theta) for level in data.levels]
    outputs = [level.fine.flatten(1) for level in data.levels]
    terms = tuple(
        Term(x, theta, of_outputs=True) if level.coarse is None
        else Term(x, theta, theta, level.coarse.flatten(1), of_outputs=True)
        for x, theta, level in zip(outputs, conditions, data.levels, strict=True)
    )
    return Problem(terms, Standardiser.fit(outputs, transform=x_transform), Standardiser.fit(conditions))


def _check_levels(data: MultilevelData, prior: Distribution) -> None:
    """Raises a `ValueError` unless every level's theta fits the prior."""
    for name, level in zip(data.names, data.levels, strict=True):
        check_theta(prior, level.theta, where=f"level '{name}' of the data")


def fit_ensemble(
    problem: Problem,
    builder: DensityBuilder,
    strategy: Strategy,
    *,
    members: int = 1,
    embedding: EmbeddingBuilder | None = None,
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
        embedding: Builds the network from standardised conditions to vectors. Of a user's own network every member
            trains a copy: the first as given, the others re-initialised where no parameter is frozen.
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
