r"""What a strategy is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.history import History
from mlsbi.training.members import Member, Pooling, Schedule
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

__all__ = ["Strategy"]


class Strategy(Protocol):
    r"""A way to train networks on coupled rows: a frozen dataclass with three methods.

    Beside them it may have `members`, how many networks to train where no number is asked for; `covers = True`, if
    every row is to be held out by some member and members are to stop together; and `mixes = True`, if it makes each
    network a mixture of several: it is then given `DensityMixture`s.

    Members may be of several data sets: `pooled` then has a group for each, and nothing is to be learned across groups.
    A strategy that hands `members` and `pooled` to `minimise` or `mix_candidates` as they are has nothing to do for it.
    """

    def terms(self, terms: Sequence[Term]) -> list[Term]:
        """The rows to train on, out of those of all levels; they are split before `fit`."""
        ...

    def runs(self, n: Sequence[int]) -> tuple[int, ...]:
        """Runs of each level whose outputs `fit` reads, of data with n rows per level: what its quality cost."""
        ...

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
        """Trains the networks in place and leaves them with their best weights, in eval mode.

        `schedules` has one per stage, for training without held-out rows; the rest is as in `minimise`.
        """
        ...
