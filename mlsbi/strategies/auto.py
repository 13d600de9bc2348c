r"""All strategies on the same rows, mixed by how well they do on rows they have not seen."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlsbi.data import count_runs
from mlsbi.density.mixture import DensityMixture
from mlsbi.strategies.coupling import is_coupled
from mlsbi.strategies.emulation import Emulation
from mlsbi.strategies.mixing import Candidate, check_held_out, mix_candidates, tell_apart
from mlsbi.strategies.multilevel import Multilevel
from mlsbi.strategies.protocol import Strategy
from mlsbi.strategies.single_level import SingleLevel
from mlsbi.strategies.transfer import TransferLearning
from mlsbi.strategies.transfer_then_multilevel import TransferThenMultilevel
from mlsbi.strategies.translation import Translation
from mlsbi.strategies.turning import MOST_OUTPUTS
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.history import History
from mlsbi.training.members import Member, Pooling, Schedule
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

__all__ = ["Auto"]

# Chosen on development seeds, where ten pairs cannot tell: what uses all levels and needs few runs is best most often.
_PSEUDO_ROWS, _TRUSTED_ROWS = 0.4, 3.3
# Emulation of 39 outputs learned from 13 rows each was too sure of itself; of 10 from 90 rows each it was best.
_ROWS_PER_OUTPUT = 30


@dataclass(frozen=True)
class Auto:
    r"""Stacking: every candidate strategy is trained on the same rows, and their mixture is weighted by its score.

    Members hold out different rows, so that every row of the finest level is held out by one (a single network holds
    out `validation_fraction` of them); the weights are those of the mixture with the best score on these rows, see
    `stack_densities`. All members share them, and each candidate stops at the epoch that is best on average: that is
    cross-fitting, whatever `cross_fit` says. The rows have chosen when candidates stop, but no network was trained on
    those that it is scored by. What was weighted how, and why, is in `history.mixture`.

    Args:
        candidates: Strategies to mix. When left out: multilevel, transfer learning, one after the other, the finest
            level alone and, for outputs of up to 64 numbers, translation for a likelihood or, with 30 rows for each
            number, emulation for a posterior; with one level, that alone. Where levels are not coupled, those that
            need pairs are left out.
        members: Networks of each candidate where no other number is asked for.
        pseudo_rows: Held-out rows that count for each candidate from the start: where pairs are few, weights stay near
            the shares of these. When left out 0.4 each; of the candidates above 3.3 for emulation and translation.

    Raises:
        ValueError: If there is no candidate, one of them is itself a mixture, or there are not as many positive
            pseudo rows.

    References:
        | Using stacking to average Bayesian predictive distributions (Yao et al., 2018)
        | https://doi.org/10.1214/17-BA1091
    """

    candidates: tuple[Strategy, ...] | None = None
    members: int = 5
    pseudo_rows: tuple[float, ...] | None = None

    mixes: ClassVar[bool] = True
    covers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"Expected at least 1 member; got {self.members}.")
        if self.candidates is None:
            if self.pseudo_rows is not None:
                raise ValueError("pseudo_rows are one number for each of candidates=, which is not given.")
            return
        object.__setattr__(self, "candidates", tuple(self.candidates))
        if not self.candidates or any(getattr(one, "mixes", False) for one in self.candidates):
            raise ValueError("Expected at least one candidate strategy, none of which mixes others itself.")
        if self.pseudo_rows is None:
            return
        object.__setattr__(self, "pseudo_rows", tuple(self.pseudo_rows))
        if len(self.pseudo_rows) != len(self.candidates) or not all(rows > 0 for rows in self.pseudo_rows):
            raise ValueError("Expected one positive number of pseudo_rows for each of "
                             f"{len(self.candidates)} candidates; got {self.pseudo_rows}.")

    def chosen(self, terms: Sequence[Term]) -> tuple[Strategy, ...]:
        """The candidates for such rows."""
        if self.candidates is not None:
            return self.candidates
        if len(terms) == 1:
            return (SingleLevel(-1),)
        coupled = is_coupled(terms)
        found: tuple[Strategy, ...] = (TransferLearning(), SingleLevel(-1))
        if coupled:
            found = (Multilevel(rescale=True, project=True), TransferLearning(), TransferThenMultilevel(),
                     SingleLevel(-1))
        size = terms[0].outputs[0][0].numel()
        if terms[0].of_outputs:
            return (*found, Translation()) if size <= MOST_OUTPUTS and coupled else found
        enough = sum(len(term) for term in terms) >= _ROWS_PER_OUTPUT * size
        return (*found, Emulation()) if size <= MOST_OUTPUTS and enough else found

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
        pooled: Pooling = False,
        schedules: Sequence[Schedule] = (),
        checkpoint: Checkpoint | None = None,
        progress: bool = True,
        label: str = "training",
    ) -> list[History]:
        """Trains the candidates and makes each network the mixture of what they gave; see `mix_candidates`.

        Raises:
            ValueError: If no rows are held out.
            TrainingError: If no candidate can be trained.
        """
        check_held_out(members, "Auto")
        networks = [_mixture(member) for member in members]
        chosen = self.chosen(members[0].train)
        names = tell_apart([type(strategy).__name__ for strategy in chosen], chosen)
        counted = self.pseudo_rows or tuple(
            _TRUSTED_ROWS if self.candidates is None and isinstance(strategy, (Emulation, Translation))
            else _PSEUDO_ROWS for strategy in chosen)
        candidates = [Candidate(name, strategy, [copy.deepcopy(network.part(0)) for network in networks], rows)
                      for name, strategy, rows in zip(names, chosen, counted, strict=True)]
        mixtures, histories = mix_candidates(candidates, members, options=options, pooled=pooled,
                                             checkpoint=checkpoint, progress=progress, label=label)
        for network, mixture in zip(networks, mixtures, strict=True):
            network.become(mixture)
        return histories


def _mixture(member: Member) -> DensityMixture:
    network: Any = member.network
    if not isinstance(network, DensityMixture):
        raise TypeError(f"Expected networks that can become mixtures; got {type(network).__name__}.")
    return network
