r"""All strategies on the same rows, mixed by how well they do on rows they have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlsbi.data import count_runs
from mlsbi.density.mixture import DensityMixture
from mlsbi.strategies.emulation import MOST_OUTPUTS, Emulation
from mlsbi.strategies.multilevel import Multilevel
from mlsbi.strategies.protocol import Strategy
from mlsbi.strategies.single_level import SingleLevel
from mlsbi.strategies.stacking import Scores, Stacking, stack_densities
from mlsbi.strategies.transfer import TransferLearning
from mlsbi.strategies.transfer_then_multilevel import TransferThenMultilevel
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.history import History, TrainingError, join_histories
from mlsbi.training.members import Member, Schedule
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

__all__ = ["Auto"]

_SCORED = 1 << 16  # rows evaluated at once


@dataclass(frozen=True)
class Auto:
    r"""Stacking: every candidate strategy is trained on the same rows, and their mixture is weighted by its score.

    Members hold out different rows, so that every row of the finest level is held out by one; the weights are those
    of the mixture with the best score on these rows, see `stack_densities`. All members share them, and each candidate
    stops at the epoch that is best on average. What was weighted how, and why, is in `history.mixture`.

    Args:
        candidates: Strategies to mix. When left out: multilevel, transfer learning, one after the other, the finest
            level alone and, for posteriors of outputs of up to 64 numbers, emulation; with one level, that alone.
        members: Networks of each candidate where no other number is asked for.

    Raises:
        ValueError: If there is no candidate, or one of them is itself a mixture.

    References:
        | Using stacking to average Bayesian predictive distributions (Yao et al., 2018)
        | https://doi.org/10.1214/17-BA1091
    """

    candidates: tuple[Strategy, ...] | None = None
    members: int = 5

    mixes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"Expected at least 1 member; got {self.members}.")
        if self.candidates is None:
            return
        object.__setattr__(self, "candidates", tuple(self.candidates))
        if not self.candidates or any(getattr(one, "mixes", False) for one in self.candidates):
            raise ValueError("Expected at least one candidate strategy, none of which mixes others itself.")

    def chosen(self, terms: Sequence[Term]) -> tuple[Strategy, ...]:
        """The candidates for such rows."""
        if self.candidates is not None:
            return self.candidates
        if len(terms) == 1:
            return (SingleLevel(-1),)
        found: tuple[Strategy, ...] = (Multilevel(rescale=True, project=True), TransferLearning(),
                                       TransferThenMultilevel(), SingleLevel(-1))
        if not terms[0].of_outputs and terms[0].fine[0].numel() <= MOST_OUTPUTS:
            found = (*found, Emulation())
        return found

    def terms(self, terms: Sequence[Term]) -> list[Term]:
        """The rows this strategy trains on: all.

        Raises:
            ValueError: If a candidate cannot use them.
        """
        for candidate in self.chosen(terms):
            candidate.terms(terms)
        return list(terms)

    def runs(self, n: Sequence[int]) -> tuple[int, ...]:
        """Runs of each level whose outputs are trained on, of data with n rows per level: all."""
        return count_runs(n)

    def fit(
        self,
        members: Sequence[Member],
        *,
        options: TrainingOptions,
        pooled: bool = False,
        schedules: Sequence[Schedule] = (),
        checkpoint: Checkpoint | None = None,
        progress: bool = True,
        label: str = "training",
    ) -> list[History]:
        """Trains the candidates one after the other, each stopped by all members together, and weighs them.

        A candidate that cannot be trained gets no weight, and the history says why.

        Raises:
            ValueError: If no rows are held out.
            TrainingError: If no candidate can be trained.
        """
        if not all(member.validation for member in members):
            raise ValueError("Auto weighs strategies by rows that are held out: set validation_fraction above 0.")
        candidates = self.chosen(members[0].train)
        mixtures = [_mixture(member) for member in members]
        for mixture in mixtures:
            mixture.grow(len(candidates))
        histories: list[list[History] | str] = []
        for index, candidate in enumerate(candidates):
            own = [replace(member, network=mixture.part(index), train=candidate.terms(member.train),
                           validation=candidate.terms(member.validation))
                   for member, mixture in zip(members, mixtures, strict=True)]
            part = None if checkpoint is None else checkpoint.part(f"{index}-{_name(candidate)}")
            try:
                histories.append(candidate.fit(own, options=options, pooled=True, checkpoint=part, progress=progress,
                                               label=f"{label}, {_name(candidate)}"))
            except TrainingError as error:
                histories.append(str(error))
        trained = [index for index, found in enumerate(histories) if not isinstance(found, str)]
        if not trained:
            raise TrainingError("No strategy could be trained: " + "; ".join(
                f"{_name(candidate)}: {found}" for candidate, found in zip(candidates, histories, strict=True)))
        scores = Scores.joined([_score(member, mixture, trained)
                                for member, mixture in zip(members, mixtures, strict=True)])
        try:
            stacking = stack_densities(scores)
        except ValueError as error:
            raise TrainingError(f"The strategies cannot be weighed: {error}") from error
        weights = dict(zip(trained, stacking.weights, strict=True))
        for mixture in mixtures:
            mixture.weigh([weights.get(index, 0.0) for index in range(len(candidates))])
            mixture.eval()
        return [_history(candidates, [found if isinstance(found, str) else found[at] for found in histories], stacking)
                for at in range(len(members))]


def _mixture(member: Member) -> DensityMixture:
    network: Any = member.network
    if not isinstance(network, DensityMixture):
        raise TypeError(f"Expected networks that can become mixtures; got {type(network).__name__}.")
    return network


def _name(strategy: Strategy) -> str:
    return type(strategy).__name__


@torch.no_grad()
def _score(member: Member, mixture: DensityMixture, trained: Sequence[int]) -> Scores:
    """Log densities of the candidates that were trained, at the member's held-out rows."""
    parts = [mixture.part(index) for index in trained]

    def score(input: Tensor, condition: Tensor) -> Tensor:
        rows = zip(input.split(_SCORED), condition.split(_SCORED), strict=True)
        return torch.cat([torch.stack([part.standard_log_prob(*some) for part in parts]) for some in rows], 1)

    for part in parts:
        part.eval()
    top = member.validation[-1]
    fine = score(top.input, top.fine)
    if top.coarse is None or len(member.validation) < 2:
        return Scores(fine)
    below = member.validation[-2]
    coarse = score(top.input if top.coarse_input is None else top.coarse_input, top.coarse)
    return Scores(fine, coarse, score(below.input, below.fine))


def _history(candidates: Sequence[Strategy], found: Sequence[History | str], stacking: Stacking) -> History:
    """One member's history: its candidates' one after the other, and what was made of them."""
    trained = [history for history in found if isinstance(history, History)]
    joined = join_histories(trained)
    mixture: list[dict[str, Any]] = []
    notes = list(joined.notes)
    numbers = zip(stacking.weights, stacking.scores, stacking.standard_errors, strict=True)
    stage = 0
    for candidate, history in zip(candidates, found, strict=True):
        name = _name(candidate)
        if isinstance(history, str):
            notes.append(f"{name} got no weight, for it could not be trained: {history}")
            continue
        weight, score, error = next(numbers)
        stage += len(history.stages)
        mixture.append({"strategy": name, "options": str(candidate), "weight": weight, "held_out": -score,
                        "standard_error": error, "last_stage": stage - 1, "seconds": history.seconds})
    told = ", ".join(f"{part['strategy']} {part['weight']:.0%}" for part in
                     sorted(mixture, key=lambda part: -part["weight"]))
    why = f"for the best score on {stacking.rows} held-out rows of the finest level"
    if stacking.factor:
        why += f", corrected by {stacking.factor:.2f} times their coarse halves'"
    notes.append(f"strategies were mixed, {told}, {why}: the mixture has a held-out loss of {-stacking.score:.3f}, "
                 f"the best of them alone {-max(stacking.scores):.3f}")
    # Which epochs were kept is told per candidate; the loss is the mixture's.
    return replace(joined, best_loss=-stacking.score, notes=tuple(notes), mixture=tuple(mixture))
