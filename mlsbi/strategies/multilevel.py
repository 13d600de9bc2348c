r"""Training on the telescoping sum of all levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlsbi.data import count_runs
from mlsbi.strategies.coupling import check_coupled
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.descent import Objective
from mlsbi.training.history import History
from mlsbi.training.loop import minimise
from mlsbi.training.members import Member, Pooling, Schedule, align_members
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

__all__ = ["Multilevel"]


@dataclass(frozen=True)
class Multilevel:
    r"""Multilevel training: many cheap rows carry the bulk of the loss, few coupled pairs correct it.

    Args:
        weights: `"unit"` is the published objective; `"estimated"` weighs each level by how well its losses predict
            the next level's, on rows held out, from earlier epochs; or fixed numbers a_0 .. a_{L-1}.
        rescale: Whether the coarse gradient of each pair gets the length of the fine one.
        project: Whether the gradients of level 0 and of the correction are projected when they conflict.
        correction_limit: Longest correction of the gradient, in lengths of level 0's gradient; any when left out.
        difference_penalty: How many standard errors of the correction terms are added to the loss, which keeps the
            differences of few pairs small.
        align: Whether outputs of cheap levels are mapped towards the finest by an affine map per output, fitted on
            the pairs trained on, where that brings them closer. The sum still telescopes: both halves that contain a
            level are mapped alike.

    Raises:
        ValueError: If `weights` is another word, or a number is out of range.

    References:
        | Multilevel neural simulation-based inference (Hikida et al., 2025)
        | https://arxiv.org/abs/2506.06087
    """

    weights: Literal["unit", "estimated"] | tuple[float, ...] = "unit"
    rescale: bool = False
    project: bool = False
    correction_limit: float | None = None
    difference_penalty: float = 0.0
    align: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", self._objective().weights)

    def terms(self, terms: Sequence[Term]) -> list[Term]:
        """The rows this strategy trains on.

        Raises:
            ValueError: If levels are not coupled.
        """
        check_coupled(terms, "Multilevel training")
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
        """Trains the networks in place; see `minimise`."""
        if self.align:
            members = align_members(members)
        return minimise(members, objective=self._objective(), options=options, pooled=pooled,
                        schedule=schedules[0] if schedules else None, checkpoint=checkpoint, progress=progress,
                        label=label)

    def _objective(self) -> Objective:
        return Objective(weights=self.weights, rescale=self.rescale, project=self.project,
                         correction_limit=self.correction_limit, difference_penalty=self.difference_penalty)
