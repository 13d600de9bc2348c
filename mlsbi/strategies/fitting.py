r"""From coupled simulations to trained networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from mlsbi.data import MultilevelData
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.embeddings import EmbeddingBuilder, shared_axes
from mlsbi.density.mixture import DensityMixture, Network
from mlsbi.density.registry import DensityBuilder
from mlsbi.density.standardise import Standardiser, Transform
from mlsbi.priors import Unbounded, check_theta, sample_prior
from mlsbi.randomness import child_seed, seeded
from mlsbi.strategies.protocol import Strategy
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.history import History, TrainingError
from mlsbi.training.members import Member, Schedule, at_once
from mlsbi.training.objective import Term, split_terms
from mlsbi.training.options import TrainingOptions

__all__ = ["Problem", "check_strategy", "fit_ensemble", "fit_replicates", "likelihood_problem", "posterior_problem"]

_FEW_HELD_OUT = 10  # rows: with fewer, the best epoch of one split is mostly chance
_MOST_FOLDS = 10
_FOLD_KEY = 10  # seeds of networks that only choose the epoch


@dataclass(frozen=True)
class Problem:
    r"""Rows of every term in their own units, and the scalers that standardise them.

    Args:
        terms: Rows of each level's term.
        input_scaler: Standardiser of what the density is of.
        condition_scaler: Standardiser of what it is conditioned on.
        draw: `draw(n, seed)` gives inputs from the prior in their own units; `None` where the density is not of theta.
        start: Trained networks with these scalers from which members go on, one after the other; none to begin anew.
    """

    terms: tuple[Term, ...]
    input_scaler: Standardiser
    condition_scaler: Standardiser
    draw: Callable[[int, int], Tensor] | None = None
    start: tuple[ConditionalDensity, ...] = ()

    def going_on(self, networks: Sequence[Network]) -> Problem:
        """The same rows for networks that go on from trained ones, whose scalers they keep.

        Raises:
            ValueError: If these are mixtures.
        """
        plain = tuple(network for network in networks if isinstance(network, ConditionalDensity))
        if len(plain) < len(networks):
            raise ValueError("Expected single networks to go on from; these are mixtures of several strategies.")
        scalers = copy.deepcopy(plain[0].input_scaler).cpu(), copy.deepcopy(plain[0].condition_scaler).cpu()
        return replace(self, input_scaler=scalers[0], condition_scaler=scalers[1], start=plain)

    def standardise(self, term: Term) -> Term:
        """A term's rows as networks read them."""
        coarse = None if term.coarse is None else self.condition_scaler(term.coarse)
        coarse_input = None if term.coarse_input is None else self.input_scaler(term.coarse_input)
        return replace(term, input=self.input_scaler(term.input), fine=self.condition_scaler(term.fine), coarse=coarse,
                       coarse_input=coarse_input)

    def network(
        self,
        builder: DensityBuilder,
        embedding: EmbeddingBuilder | None,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> ConditionalDensity:
        """A fresh network with these scalers, initialised from a seed."""
        with seeded(seed):
            # Every network owns its scalers: it may move to a device, and is saved by itself.
            scalers = copy.deepcopy(self.input_scaler), copy.deepcopy(self.condition_scaler)
            built = None if embedding is None else embedding(tuple(self.condition_scaler.mean.shape))
            network = ConditionalDensity(builder, *scalers, built)
        network.embedding.to(dtype)
        network.density.to(dtype)
        return network

    def standard_draw(self, n: int, seed: int) -> Tensor:
        """Standardised inputs `(n, dim)` from the prior."""
        assert self.draw is not None
        return self.input_scaler(self.draw(n, seed))


def posterior_problem(
    data: MultilevelData,
    prior: Distribution,
    *,
    x_transform: Transform = "none",
    embedding: EmbeddingBuilder | None = None,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    r"""Rows for a density of unbounded theta given x.

    Args:
        data: Coupled simulations.
        prior: The prior, whose support is mapped to unbounded space.
        x_transform: What outputs go through before they are standardised.
        embedding: What reads x; it may name axes to standardise alike.
        dtype: Of standardised rows.

    Raises:
        ValueError: If theta does not fit the prior.
    """
    _check_levels(data, prior)
    unbounded = Unbounded(prior)
    inputs = [unbounded.to(level.theta) for level in data.levels]
    shared = shared_axes(embedding, tuple(data.levels[0].fine.shape[1:]))
    scaler = Standardiser.fit([level.fine for level in data.levels], transform=x_transform, shared=shared,
                              dtype=dtype)
    terms = tuple(Term(z, level.fine, level.coarse) for z, level in zip(inputs, data.levels, strict=True))
    return Problem(terms, Standardiser.fit(inputs, dtype=dtype), scaler,
                   draw=lambda n, seed: unbounded.to(sample_prior(prior, n, seed=seed)))


def likelihood_problem(
    data: MultilevelData,
    prior: Distribution,
    *,
    x_transform: Transform = "none",
    dtype: torch.dtype = torch.float32,
) -> Problem:
    r"""Rows for a density of x, flattened, given theta in the coordinates of `Unbounded.features`.

    Args:
        data: Coupled simulations.
        prior: The prior.
        x_transform: What outputs go through before they are standardised.
        dtype: Of standardised rows.

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
    return Problem(terms, Standardiser.fit(outputs, transform=x_transform, dtype=dtype),
                   Standardiser.fit(conditions, dtype=dtype))


def _check_levels(data: MultilevelData, prior: Distribution) -> None:
    """Raises a `ValueError` unless every level's theta fits the prior."""
    for name, level in zip(data.names, data.levels, strict=True):
        check_theta(prior, level.theta, where=f"level '{name}' of the data")


def check_strategy(
    strategy: Strategy, levels: int, shape: Sequence[int], *, options: TrainingOptions, of_outputs: bool = False
) -> None:
    """Raises a `ValueError` if a strategy cannot use coupled data of so many levels and such outputs.

    Args:
        strategy: The strategy.
        levels: Levels.
        shape: Shape of one output.
        options: How it trains.
        of_outputs: Whether a likelihood is to be learned.
    """
    x, theta = torch.zeros(1, *shape), torch.zeros(1, 1)
    first, second = (x.flatten(1), theta) if of_outputs else (theta, x)
    strategy.terms([Term(first, second, second if level else None, first if level else None, of_outputs=of_outputs)
                    for level in range(levels)])
    if getattr(strategy, "covers", False) and not options.validation_fraction:
        raise ValueError(f"{type(strategy).__name__} is weighted by held-out rows: expected a validation_fraction "
                         "above 0.")


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
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> tuple[list[Network], list[History]]:
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
        checkpoint: Where to keep the state of the training, and to go on from.
        progress: Whether to show a progress bar.
    """
    fitting = _Fitting(problem, builder, strategy, strategy.terms(problem.terms), embedding, options,
                       torch.device(device), seed)
    pooled = fitting.covers or _cross_fits(fitting.rows, options)
    if pooled and members == 1 and not fitting.covers:
        return _cross_fit(fitting, checkpoint, progress=progress)
    most = members if pooled else at_once(fitting.rows, members, options, fitting.device)
    networks: list[Network] = []
    histories: list[History] = []
    for group in _groups(range(members), most):
        part = None if checkpoint is None else checkpoint.part("-".join(map(str, (group[0], group[-1]))))
        trained = [fitting.member(member, members) for member in group]
        histories += strategy.fit(trained, options=options, pooled=pooled, checkpoint=part, progress=progress,
                                  label=_label(group, members))
        networks += [member.network for member in trained]
        del trained  # copies of the rows; the next ones make their own
    return networks, histories


def _groups(members: Sequence[int], most: int) -> list[Sequence[int]]:
    """Members in groups of about equal size, of so many at most."""
    count = -(-len(members) // most)
    edges = [index * len(members) // count for index in range(count + 1)]
    return [members[first:last] for first, last in zip(edges[:-1], edges[1:], strict=True)]


def _label(group: Sequence[int], members: int) -> str:
    if members == 1:
        return "training"
    first, last = group[0] + 1, group[-1] + 1
    return f"training {first if first == last else f'{first} to {last}'} of {members}"


def fit_replicates(
    problems: Sequence[Problem],
    builder: DensityBuilder,
    strategy: Strategy,
    *,
    seeds: Sequence[int],
    members: int = 1,
    embedding: EmbeddingBuilder | None = None,
    options: TrainingOptions,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> list[tuple[list[Network], list[History]]]:
    r"""Trains one ensemble per problem, all of them in one go where that is faster and they have equally many rows.

    Each is what `fit_ensemble` gives with its problem and seed, up to rounding.

    Args:
        problems: Rows and scalers of each replicate, of one shape.
        builder: Builds the density.
        strategy: Which rows and which objective.
        seeds: One per replicate.
        members: Networks per replicate.
        embedding: As in `fit_ensemble`.
        options: How each is trained.
        device: Where.
        progress: Whether to show a progress bar.
    """
    place = torch.device(device)
    fittings = [_Fitting(problem, builder, strategy, strategy.terms(problem.terms), embedding, options, place, seed)
                for problem, seed in zip(problems, seeds, strict=True)]
    rows = fittings[0].rows
    apart = fittings[0].covers or _cross_fits(rows, options)
    alike = all(_shape(fitting.rows) == _shape(rows) for fitting in fittings)
    total = members * len(problems)
    most = at_once(rows, total, options, place)
    if fittings[0].covers and alike and most >= 2 * members:
        found: list[tuple[list[Network], list[History]]] = []
        for group in _groups(range(len(problems)), most // members):
            found += _fit_covering([fittings[index] for index in group], members, progress=progress)
        return found
    if not alike or most == 1 or apart:
        return [fit_ensemble(problem, builder, strategy, members=members, embedding=embedding, options=options,
                             device=device, seed=seed, progress=progress)
                for problem, seed in zip(problems, seeds, strict=True)]
    networks: list[Network] = []
    histories: list[History] = []
    for group in _groups(range(total), most):
        trained = [fittings[index // members].member(index % members, members) for index in group]
        histories += strategy.fit(trained, options=options, progress=progress, label=_label(group, total))
        networks += [member.network for member in trained]
    return [(networks[at: at + members], histories[at: at + members]) for at in range(0, total, members)]


def _shape(rows: Sequence[Term]) -> list[tuple[int, bool]]:
    """Rows of each term, and whether it has pairs."""
    return [(len(term), term.coarse is not None) for term in rows]


def _fit_covering(
    fittings: Sequence[_Fitting], members: int, *, progress: bool
) -> list[tuple[list[Network], list[History]]]:
    """Ensembles in one go, of which each stops by its own rows."""
    first = fittings[0]
    trained = [fitting.member(member, members) for fitting in fittings for member in range(members)]
    histories = first.strategy.fit(
        trained, options=first.options, progress=progress, label=f"training {len(fittings)} ensembles",
        pooled=tuple(index for index in range(len(fittings)) for _ in range(members)),
    )
    networks: list[Network] = [member.network for member in trained]
    return [(networks[at: at + members], histories[at: at + members]) for at in range(0, len(trained), members)]


@dataclass(frozen=True)
class _Fitting:
    """What all members of an ensemble have in common."""

    problem: Problem
    builder: DensityBuilder
    strategy: Strategy
    rows: list[Term]
    embedding: EmbeddingBuilder | None
    options: TrainingOptions
    device: torch.device
    seed: int

    @property
    def mixes(self) -> bool:
        """Whether each network is to become a mixture."""
        return bool(getattr(self.strategy, "mixes", False))

    @property
    def covers(self) -> bool:
        """Whether every row is to be held out by some member, and members stop together."""
        return bool(getattr(self.strategy, "covers", False))

    def network(self, member: int, key: int = 0) -> Network:
        """A fresh network, initialised for one member, or a copy of a trained one to go on from."""
        if self.problem.start:
            if self.mixes:
                raise ValueError("A strategy that mixes others begins anew; it cannot go on from trained networks.")
            return copy.deepcopy(self.problem.start[member % len(self.problem.start)]).to(self.device)
        network = self.problem.network(self.builder, self.embedding, seed=child_seed(self.seed, key, member),
                                       dtype=self.options.dtype)
        if member and not key and self.embedding is not None:
            _reset(network.embedding, seed=child_seed(self.seed, 3, member))
        return (DensityMixture([network]) if self.mixes else network).to(self.device)

    def member(self, member: int, members: int, *, key: int = 0) -> Member:
        """One member with its split; `key` tells ensembles of different purpose apart."""
        kept: list[Term] = list(self.rows)
        held: list[Term] = []
        if self.options.validation_fraction:
            generator = torch.Generator().manual_seed(child_seed(self.seed, 1))  # one permutation for all members
            kept, held = split_terms(self.rows, self.options.validation_fraction, generator, member=member,
                                     members=members, cover=key == _FOLD_KEY or (self.covers and members > 1))
        # Standardised one by one, so that large data is not there twice over.
        train = [self.problem.standardise(kept.pop(0)) for _ in range(len(kept))]
        validation = [self.problem.standardise(held.pop(0)) for _ in range(len(held))]
        # A strategy that mixes knows that its networks are mixtures; to all others they are single densities.
        network = cast(ConditionalDensity, self.network(member, key))
        return Member(network, train, validation, child_seed(self.seed, key + 2, member),
                      draw=None if self.problem.draw is None else self.problem.standard_draw)


def _cross_fits(rows: Sequence[Term], options: TrainingOptions) -> bool:
    if options.cross_fit != "auto":
        return bool(options.cross_fit)
    held = min(round(options.validation_fraction * len(term)) for term in rows)
    return options.validation_fraction > 0 and held < _FEW_HELD_OUT


def _cross_fit(
    fitting: _Fitting, checkpoint: Checkpoint | None, *, progress: bool
) -> tuple[list[Network], list[History]]:
    """One network trained on all rows, for as long as was best for several that held out different parts of them."""
    options, strategy = fitting.options, fitting.strategy
    folds = min(max(round(1 / options.validation_fraction), 2), min(len(term) for term in fitting.rows), _MOST_FOLDS)
    parts = [None if checkpoint is None else checkpoint.part(name) for name in ("folds", "final")]
    choosing = [fitting.member(fold, folds, key=_FOLD_KEY) for fold in range(folds)]
    found = strategy.fit(choosing, options=options, pooled=True, checkpoint=parts[0], progress=progress,
                         label=f"choosing the epoch, {folds} folds")
    whole = replace(choosing[0], network=cast(ConditionalDensity, fitting.network(0)), validation=[],
                    train=[fitting.problem.standardise(term) for term in fitting.rows],
                    seed=child_seed(fitting.seed, 2, 0))
    schedules = _schedules(found)
    history, = strategy.fit([whole], options=options, schedules=schedules, checkpoint=parts[1],
                            progress=progress)
    if len(history.epochs) < sum(schedule.epochs for schedule in schedules):
        raise TrainingError(f"The network trained on all rows diverged before the epoch that was best for {folds} "
                            "others. Lower the learning rate.")
    scores = [np.mean([record["validation_loss"] for record in records])
              for records in zip(*(_trained(own) for own in found), strict=True)]
    for record, score in zip(history.epochs, scores, strict=True):
        record["validation_loss"] = float(score)
    history.best_loss = found[0].best_loss
    history.seconds += sum(own.seconds for own in found)
    history.notes = (*history.notes, f"trained on all rows up to the epoch that was best on average for {folds} "
                                     "networks which held out different rows; the held-out loss is theirs")
    return [whole.network], [history]


def _trained(history: History) -> list[dict[str, float]]:
    """Records up to the best epoch of each stage."""
    records = []
    for stage, best in enumerate(history.stages):
        own = [record for record in history.epochs if record.get("stage", 0.0) == stage]
        records += own[:best + 1]
    return records


def _schedules(histories: Sequence[History]) -> list[Schedule]:
    """Epochs and mean weights of each stage of networks that were stopped together."""
    schedules = []
    for stage, best in enumerate(histories[0].stages):
        epochs = [[record for record in history.epochs if record.get("stage", 0.0) == stage][:best + 1]
                  for history in histories]
        names = sorted((name for name in epochs[0][0] if name.startswith("weight_")), key=lambda name: int(name[7:]))
        weights = tuple(tuple(float(np.mean([record[name] for record in records])) for name in names)
                        for records in zip(*epochs, strict=True))
        schedules.append(Schedule(best + 1, weights))
    return schedules


def _reset(module: nn.Module, *, seed: int) -> None:
    """Starts the parts of a module that can reset themselves from new values, frozen ones excepted."""
    with seeded(seed):
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset) and all(parameter.requires_grad for parameter in part.parameters()):
                reset()
