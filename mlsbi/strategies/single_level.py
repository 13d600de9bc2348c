r"""Training on the simulations of one level alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlsbi.data import count_runs
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.descent import Objective
from mlsbi.training.history import History
from mlsbi.training.loop import minimise
from mlsbi.training.members import Member, Pooling, Schedule
from mlsbi.training.objective import Term, pool_level
from mlsbi.training.options import TrainingOptions

__all__ = ["SingleLevel"]


@dataclass(frozen=True)
class SingleLevel:
    r"""Plain training on every output of one level: its own rows and the coarse halves of the pairs above.

    Args:
        level: Which level; negative counts from the finest.
    """

    level: int = -1

    def terms(self, terms: Sequence[Term]) -> list[Term]:
        """The rows this strategy trains on, as one term.

        Raises:
            ValueError: If the data has no such level.
        """
        if not -len(terms) <= self.level < len(terms):
            raise ValueError(f"Expected a level between {-len(terms)} and {len(terms) - 1}; got {self.level}.")
        return [pool_level(terms, range(len(terms))[self.level])]

    def runs(self, n: Sequence[int]) -> tuple[int, ...]:
        """Runs of each level whose outputs are trained on, of data with n rows per level."""
        level = range(len(n))[self.level]
        return tuple(pooled if index == level else 0 for index, pooled in enumerate(count_runs(n)))

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
        """Trains the networks in place; see `minimise`."""
        return minimise(members, objective=Objective(), options=options, pooled=pooled,
                        schedule=schedules[0] if schedules else None, checkpoint=checkpoint, progress=progress,
                        label=label)
