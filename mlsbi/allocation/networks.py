r"""The pilot's networks: trained step by step on one part of the rows, to be scored on the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.allocation.integrands import Rows
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.embeddings import EmbeddingBuilder, shared_axes
from mlsbi.density.registry import DensityBuilder
from mlsbi.density.standardise import Standardiser, Transform
from mlsbi.priors import Unbounded
from mlsbi.randomness import child_seed
from mlsbi.strategies.fitting import Problem
from mlsbi.training.descent import Objective
from mlsbi.training.loop import minimise
from mlsbi.training.members import Member
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

__all__ = ["FOLDS", "STATES", "Reader", "fold_of", "train_states"]

FOLDS = 2
STATES = ("untrained", "after level 0", "after the pilot")
"""States of a network that variances are measured at."""

_TRAINING = TrainingOptions(epochs=300)
_HELD_OUT = 4  # every fourth row that a network may train on decides when to stop


@dataclass(frozen=True)
class Reader:
    r"""How a network reads simulations: as a density of theta given x, or of x given theta.

    Args:
        prior: The prior.
        estimator: `"npe"` or `"nle"`.
        scalers: Of what the density is of, and of what it is conditioned on; float64.
    """

    prior: Distribution
    estimator: str
    scalers: tuple[Standardiser, Standardiser]

    @classmethod
    def fit(
        cls, prior: Distribution, estimator: str, rows: Sequence[tuple[Tensor, Tensor]], *, x_transform: Transform,
        embedding: EmbeddingBuilder | None = None,
    ) -> Reader:  # fmt: skip
        """A reader whose scalers are fitted on theta and x of all these rows together."""
        terms = [_term(prior, estimator, theta, x) for theta, x in rows]
        transforms: tuple[Transform, Transform] = ("none", x_transform)
        shared = shared_axes(embedding, tuple(rows[0][1].shape[1:])) if estimator == "npe" else ()
        if estimator == "nle":
            transforms = (x_transform, "none")
        kind = torch.float64
        return cls(prior, estimator, (
            Standardiser.fit([term.input for term in terms], transform=transforms[0], dtype=kind),
            Standardiser.fit([term.fine for term in terms], transform=transforms[1], shared=shared, dtype=kind),
        ))

    def rows(self, theta: Tensor, outputs: Sequence[Tensor]) -> Rows:
        """The same theta at several levels, standardised."""
        problem = Problem((), *self.scalers)
        terms = [problem.standardise(_term(self.prior, self.estimator, theta, x)) for x in outputs]
        return Rows(theta, tuple(outputs), tuple(terms))

    def features(self, theta: Tensor) -> np.ndarray[Any, Any]:
        """Theta as a likelihood's network reads it, float64, shape `(n, D)`: inside a box as it is."""
        return np.asarray(Unbounded(self.prior).features(theta.double()).numpy())


def _term(prior: Distribution, estimator: str, theta: Tensor, x: Tensor) -> Term:
    unbounded = Unbounded(prior)
    if estimator == "npe":
        return Term(unbounded.to(theta), x)
    return Term(x.flatten(1), unbounded.features(theta), of_outputs=True)


def fold_of(n: int, folds: int = FOLDS) -> Tensor:
    """Which of the folds each of n rows is in: the network of that number has not seen it."""
    return torch.arange(n) % folds


def train_states(
    reader: Reader,
    levels: Sequence[Sequence[Rows]],
    *,
    builder: DensityBuilder,
    embedding: EmbeddingBuilder | None,
    seed: int,
    device: str | torch.device,
    progress: bool,
) -> Iterator[tuple[str, list[ConditionalDensity]]]:
    r"""Networks at one state after the other; the same ones, so score them before asking for the next state.

    Args:
        reader: How they read rows.
        levels: Rows of each level, cheapest first; a level may have several sets of them. Network k trains on all rows
            but those of fold k, first on level 0 alone, then on all levels pooled.
        builder: Builds their density.
        embedding: What reads the condition.
        seed: Of initialisation and batches.
        device: Where they are trained.
        progress: Whether to show progress bars.

    Yields:
        The state's name, and a network per fold.
    """
    problem = Problem((), *reader.scalers)
    networks = [problem.network(builder, embedding, seed=child_seed(seed, fold)).to(device) for fold in range(FOLDS)]
    yield STATES[0], networks
    for stage, (name, pool) in enumerate(zip(STATES[1:], (levels[:1], levels), strict=True)):
        rows = [each for level in pool for each in level]
        train, held = ([_pool(rows, fold, held=held) for fold in range(FOLDS)] for held in (False, True))
        members = [Member(network, [own], [kept], child_seed(seed, fold, 1 + stage))
                   for fold, (network, own, kept) in enumerate(zip(networks, train, held, strict=True))]
        minimise(members, objective=Objective(), options=_TRAINING, progress=progress,
                 label=f"pilot networks, {stage + 1}/{len(STATES) - 1}")
        yield name, networks


def _pool(rows: Sequence[Rows], fold: int, *, held: bool) -> Term:
    """Rows outside a fold, all levels one after the other; every fourth is held out, at all levels at once.

    Of every set as many as for any other fold, at most one less than there are: so networks can be trained in one go.
    """
    picked = []
    for each in rows:
        chosen = [_outside(len(each), own, held=held) for own in range(FOLDS)]
        index = chosen[fold][: min(map(len, chosen))]
        picked += [term.rows(index) for term in each.terms]
    return Term(torch.cat([term.input for term in picked]).float(), torch.cat([term.fine for term in picked]).float())


def _outside(n: int, fold: int, *, held: bool) -> Tensor:
    row = torch.arange(n)
    return row[(row % FOLDS != fold) & ((row // FOLDS % _HELD_OUT == 0) == held)]
