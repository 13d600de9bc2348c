r"""Training on the telescoping sum of all levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlsbi.data import count_runs
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.training.alignment import align_terms
from mlsbi.training.loop import History, Objective, TrainingOptions, minimise
from mlsbi.training.objective import Term

__all__ = ["Multilevel"]


@dataclass(frozen=True)
class Multilevel:
    r"""Multilevel training: many cheap rows carry the bulk of the loss, few coupled pairs correct it.

    Args:
        weights: `"unit"` is the published objective; `"estimated"` weighs each level by how well its losses predict
            the next level's, on rows held out, from earlier epochs; or fixed numbers a_0 .. a_{L-1}.
        rescale: Whether the coarse gradient of each pair gets the length of the fine one.
        project: Whether the gradients of level 0 and of the correction are projected when they conflict.
        align: Whether outputs of cheap levels are mapped towards the finest by an affine map per output, fitted on
            the pairs trained on, where that brings them closer. The sum still telescopes: both halves that contain a
            level are mapped alike.

    Raises:
        ValueError: If `weights` is another word.

    References:
        | Multilevel neural simulation-based inference (Hikida et al., 2025)
        | https://arxiv.org/abs/2506.06087
    """

    weights: Literal["unit", "estimated"] | tuple[float, ...] = "unit"
    rescale: bool = False
    project: bool = False
    align: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.weights, str):
            object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        elif self.weights not in ("unit", "estimated"):
            raise ValueError(f'Expected weights "unit", "estimated" or numbers a_0 .. a_(L-1); got "{self.weights}".')

    def terms(self, terms: Sequence[Term]) -> list[Term]:
        """The rows this strategy trains on."""
        return list(terms)

    def runs(self, n: Sequence[int]) -> tuple[int, ...]:
        """Runs of each level whose outputs are trained on, of data with n rows per level: all."""
        return count_runs(n)

    def fit(
        self,
        network: ConditionalDensity,
        train: Sequence[Term],
        validation: Sequence[Term],
        *,
        options: TrainingOptions,
        seed: int,
        progress: bool = True,
        label: str = "training",
    ) -> History:
        """Trains the network in place; see `minimise`."""
        if self.align:
            shared = network.shared_axes(of_outputs=train[0].of_outputs)
            train, validation = align_terms(train, validation, shared=shared)
        objective = Objective(weights=self.weights, rescale=self.rescale, project=self.project)
        return minimise(network, train, validation, objective=objective, options=options, seed=seed,
                        progress=progress, label=label)
