r"""Training several strategies on the same rows, and weighing what they give by rows that they have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.mixture import DensityMixture
from mlsbi.strategies.protocol import Strategy
from mlsbi.strategies.stacking import PSEUDO_ROWS, Scores, Stacking, stack_densities
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.history import FewRowsError, History, TrainingError, join_histories
from mlsbi.training.members import Member, Pooling, groups_of
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

__all__ = ["Candidate", "check_held_out", "mix_candidates", "tell_apart"]

_SCORED = 1 << 16  # rows evaluated at once


@dataclass(frozen=True)
class Candidate:
    r"""A strategy to be mixed, and the networks that it trains.

    Args:
        name: What histories call it.
        strategy: How it is trained.
        networks: One per member.
        pseudo_rows: What speaks for it before any row is seen; see `stack_densities`.
    """

    name: str
    strategy: Strategy
    networks: Sequence[ConditionalDensity]
    pseudo_rows: float = PSEUDO_ROWS


def check_held_out(members: Sequence[Member], what: str) -> None:
    """Raises a `ValueError` unless every member holds rows out."""
    if not all(member.validation for member in members):
        raise ValueError(f"{what} weighs networks by rows that are held out: set validation_fraction above 0.")


def tell_apart(kinds: Sequence[str], wholes: Sequence[Any]) -> list[str]:
    """What histories call candidates: their kinds, with all options where two are of one kind."""
    return [kind if kinds.count(kind) == 1 else str(whole) for kind, whole in zip(kinds, wholes, strict=True)]


def mix_candidates(
    candidates: Sequence[Candidate],
    members: Sequence[Member],
    *,
    options: TrainingOptions,
    pooled: Pooling = True,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
    label: str = "training",
) -> tuple[list[DensityMixture], list[History]]:
    r"""Trains candidates one after the other, each stopped by all members together, and mixes them.

    All members have the same weights: those of the mixture with the best score on the rows that they hold out. A
    candidate that cannot be trained, or not on so few rows, gets no weight, and the history says why. With groups, such
    as the ensembles of several data sets, all of this holds for each by itself.

    Args:
        candidates: What to train.
        members: Rows and seeds; their networks are not used.
        options: How each candidate is trained.
        pooled: The group of each member, where they are not all of one; anything else is one group.
        checkpoint: Where to keep the state of the training, and to go on from; of one group.
        progress: Whether to show a progress bar.
        label: What the bar is called.

    Returns:
        One mixture and one history per member.

    Raises:
        TrainingError: If no candidate can be trained, or none can be scored.
    """
    pooled = pooled or True
    found: list[list[History | str]] = []
    for index, candidate in enumerate(candidates):
        part = None if checkpoint is None else checkpoint.part(str(index))
        found.append(_train(candidate, members, pooled=pooled, options=options, checkpoint=part, progress=progress,
                            label=f"{label}, {candidate.name}"))
    mixed: dict[int, tuple[DensityMixture, History]] = {}
    for group in groups_of(pooled, len(members)):
        own = [replace(candidate, networks=[candidate.networks[at] for at in group]) for candidate in candidates]
        told = [[histories[at] for at in group] for histories in found]
        mixed |= dict(zip(group, _mix(own, [members[at] for at in group], told), strict=True))
    return [mixed[at][0] for at in range(len(members))], [mixed[at][1] for at in range(len(members))]


def _train(
    candidate: Candidate,
    members: Sequence[Member],
    *,
    pooled: Pooling,
    options: TrainingOptions,
    checkpoint: Checkpoint | None,
    progress: bool,
    label: str,
) -> list[History | str]:
    """What happened to each member's network of a candidate, or why it could not be trained."""
    groups = groups_of(pooled, len(members))
    own = [replace(member, network=network, train=candidate.strategy.terms(member.train),
                   validation=candidate.strategy.terms(member.validation))
           for member, network in zip(members, candidate.networks, strict=True)]
    # Networks are trained in place, and what stops one group is not to stop the others.
    before = [[tensor.detach().clone() for tensor in _tensors(network)] for network in candidate.networks
              if len(groups) > 1]
    try:
        return list(candidate.strategy.fit(own, options=options, pooled=pooled, checkpoint=checkpoint,
                                           progress=progress, label=label))
    except (TrainingError, FewRowsError) as error:
        if len(groups) == 1:
            return [str(error)] * len(members)
    for network, values in zip(candidate.networks, before, strict=True):
        with torch.no_grad():
            for tensor, value in zip(_tensors(network), values, strict=True):
                tensor.copy_(value)
    found: dict[int, History | str] = {}
    for group in groups:
        alone = replace(candidate, networks=[candidate.networks[at] for at in group])
        found |= dict(zip(group, _train(alone, [members[at] for at in group], pooled=True, options=options,
                                        checkpoint=None, progress=progress, label=label), strict=True))
    return [found[at] for at in range(len(members))]


def _tensors(network: ConditionalDensity) -> list[Tensor]:
    """All that training may change."""
    return [*network.parameters(), *network.buffers()]


def _mix(
    candidates: Sequence[Candidate], members: Sequence[Member], found: Sequence[Sequence[History | str]]
) -> list[tuple[DensityMixture, History]]:
    """Mixtures of trained candidates with weights that all members share."""
    trained = [index for index, histories in enumerate(found) if not isinstance(histories[0], str)]
    if not trained:
        raise TrainingError("No strategy could be trained: " + "; ".join(
            f"{candidate.name}: {why[0]}" for candidate, why in zip(candidates, found, strict=True)))
    try:
        stacking = stack_densities(Scores.joined([
            _score(member, [candidates[index].networks[at] for index in trained]) for at, member in enumerate(members)
        ]), [candidates[index].pseudo_rows for index in trained])
    except ValueError as error:
        raise TrainingError(f"The strategies cannot be weighed: {error}") from error
    weights = dict(zip(trained, stacking.weights, strict=True))
    shares = [weights.get(index, 0.0) for index in range(len(candidates))]
    names = [candidate.name for candidate in candidates]
    return [(DensityMixture([candidate.networks[at] for candidate in candidates], shares).eval(),
             _history(names, [own[at] for own in found], stacking)) for at in range(len(members))]


@torch.no_grad()
def _score(member: Member, networks: Sequence[ConditionalDensity]) -> Scores:
    """Log densities at the rows that a member holds out."""
    device = next(networks[0].parameters()).device

    def score(input: Tensor, condition: Tensor) -> Tensor:
        rows = [(a.to(device), b.to(device))
                for a, b in zip(input.split(_SCORED), condition.split(_SCORED), strict=True)]
        return torch.cat([torch.stack([network.standard_log_prob(*some) for network in networks]) for some in rows],
                         1).cpu()

    for network in networks:
        network.eval()
    top: Term = member.validation[-1]
    fine = score(top.input, top.fine)
    most = len(top) + len(member.train[-1])
    if top.coarse is None or len(member.validation) < 2:
        return Scores(fine, most=most)
    below = member.validation[-2]
    coarse = score(top.input if top.coarse_input is None else top.coarse_input, top.coarse)
    return Scores(fine, coarse, score(below.input, below.fine), most)


def _history(names: Sequence[str], found: Sequence[History | str], stacking: Stacking) -> History:
    """One member's history: its candidates' one after the other, and what was made of them."""
    for name, history in zip(names, found, strict=True):
        if isinstance(history, History):
            history.labels = tuple(f"{name}, {label}" if label else name for label in
                                   history.labels or ("",) * len(history.stages))
    joined = join_histories([history for history in found if isinstance(history, History)])
    mixture: list[dict[str, Any]] = []
    notes = list(joined.notes)
    numbers = zip(stacking.weights, stacking.scores, stacking.standard_errors, strict=True)
    stage = 0
    for name, history in zip(names, found, strict=True):
        if isinstance(history, str):
            notes.append(f"{name} got no weight, for it could not be trained: {history}")
            mixture.append({"strategy": name, "weight": 0.0, "held_out": None, "standard_error": None,
                            "stages": [stage, stage], "seconds": 0.0})
            continue
        weight, score, error = next(numbers)
        mixture.append({"strategy": name, "weight": weight, "held_out": -score, "standard_error": error,
                        "stages": [stage, stage + len(history.stages)], "seconds": history.seconds})
        stage += len(history.stages)
    if len(mixture) > 1:
        told = ", ".join(f"{part['strategy']} {part['weight']:.0%}" for part in
                         sorted(mixture, key=lambda part: -part["weight"]))
        why = f"for the best score on {stacking.rows} held-out rows of the finest level"
        if stacking.factor:
            why += f", corrected by {stacking.factor:.2f} times their coarse halves'"
        notes.append(f"mixed {told}, {why}: the mixture has a held-out loss of {-stacking.score:.3f}, the best of them "
                     f"alone {-max(stacking.scores):.3f}")
    if stacking.lost:
        notes.append(f"{stacking.lost} held-out rows were left out of this: no strategy gives them a finite density")
    # Which epoch was kept is told per candidate; the loss is the mixture's.
    return replace(joined, best_loss=-stacking.score, notes=tuple(notes), mixture=tuple(mixture))
