r"""Pre-training on the cheap levels one by one, then training on the telescoping sum of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlsbi.data import count_runs
from mlsbi.randomness import child_seed
from mlsbi.strategies.multilevel import Multilevel
from mlsbi.strategies.transfer import TransferLearning
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.history import History, join_histories
from mlsbi.training.members import Member, Pooling, Schedule, align_members
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

__all__ = ["TransferThenMultilevel"]


@dataclass(frozen=True)
class TransferThenMultilevel:
    r"""Transfer learning over the cheap levels, whose network then goes on learning from all levels at once.

    The telescoping loss of a fresh network is noisy where pairs are few; a network that knows the cheap levels is near
    its minimum, and the correction is small from the start.

    Args:
        transfer: How the cheap levels are learned; its stage of the finest level is left out.
        multilevel: The objective of the last stage.
        align: Whether outputs of cheap levels are mapped towards the finest before the first stage, by one map for
            all stages.

    Raises:
        ValueError: If one of the two strategies is to align, which is decided here.
    """

    transfer: TransferLearning = TransferLearning(fine_tune=False)
    multilevel: Multilevel = Multilevel(weights="estimated", align=False)
    align: bool = True

    def __post_init__(self) -> None:
        if self.transfer.align or self.multilevel.align:
            raise ValueError("Expected align=False in the strategies of TransferThenMultilevel, whose own align= says "
                             "whether outputs are mapped: once, for all stages.")
        object.__setattr__(self, "transfer", replace(self.transfer, fine_tune=False))

    def terms(self, terms: Sequence[Term]) -> list[Term]:
        """The rows this strategy trains on: all.

        Raises:
            ValueError: If there is one level alone, levels are not coupled, or options do not fit the number of stages.
        """
        return self.multilevel.terms(self.transfer.terms(terms))

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
        """Trains the networks in place, stage by stage; see `minimise`."""
        if self.align:
            members = align_members(members)
        first, last = (None if checkpoint is None else checkpoint.part(name) for name in ("transfer", "multilevel"))
        before = self.transfer.fit(members, options=options, pooled=pooled, schedules=schedules[:-1], checkpoint=first,
                                   progress=progress, label=label)
        members = [replace(member, seed=child_seed(member.seed, len(before[0].stages))) for member in members]
        after = self.multilevel.fit(members, options=options, pooled=pooled, schedules=schedules[-1:],
                                    checkpoint=last, progress=progress, label=f"{label}, all levels")
        for history in after:
            history.labels = ("all levels at once",)
        return [join_histories(parts) for parts in zip(before, after, strict=True)]
