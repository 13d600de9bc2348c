r"""Training on one level after the other, cheapest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from mlsbi.data import count_runs
from mlsbi.randomness import child_seed
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.descent import Objective
from mlsbi.training.history import History, join_histories
from mlsbi.training.loop import minimise
from mlsbi.training.members import Member, Pooling, Schedule, align_members
from mlsbi.training.objective import Term, pool_levels
from mlsbi.training.options import TrainingOptions

__all__ = ["TransferLearning"]


@dataclass(frozen=True)
class TransferLearning:
    r"""Transfer learning: train on the cheapest level until early stopping, go on from there on the next, and so on.

    A stage trains on every output of its level, the coarse halves of the pairs above included. Pairs are held out
    together, so that no stage trains on the twin of a row that a later one stops by. One standardiser serves all
    stages. Parameters that a level ignores are prior draws in its rows, from which the network learns their prior.

    Args:
        learning_rate: Step size of each stage, one for all or one per stage; the training options' when left out.
        patience: Patience of each stage, likewise.
        freeze_embedding: Whether the embedding is kept as the cheapest level left it; only the density is tuned then.
        fine_tune: Whether to train on the finest level at all; without, the network of the level below is used as is.
        align: Whether outputs of cheap levels are mapped towards the finest by an affine map per output, fitted on
            the pairs trained on, before the first stage.
        joint: Whether one first stage trains on the outputs of all levels together, instead of one stage a level; the
            finest level's stage follows.

    Raises:
        ValueError: If a learning rate or a patience is not positive.

    References:
        | Multifidelity simulation-based inference for computationally expensive simulators (Krouglova et al., 2025)
        | https://arxiv.org/abs/2502.08416
        | Transfer learning for multifidelity simulation-based inference in cosmology (Saoulis et al., 2025)
        | https://arxiv.org/abs/2505.21215
    """

    learning_rate: float | tuple[float, ...] | None = None
    patience: int | tuple[int, ...] | None = None
    freeze_embedding: bool = False
    fine_tune: bool = True
    align: bool = False
    joint: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rate", "patience"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value))
            values = value if isinstance(value, (list, tuple)) else (value,)
            if any(one is not None and not one > 0 for one in values):
                raise ValueError(f"Expected a positive {name}; got {value}.")
            if name == "patience" and any(one is not None and int(one) != one for one in values):
                raise ValueError(f"Expected a whole number of epochs as patience; got {value}.")

    def terms(self, terms: Sequence[Term]) -> list[Term]:
        """The rows this strategy trains on: all, pooled by level only after they are split.

        Raises:
            ValueError: If there is one level alone, or options do not fit the number of stages.
        """
        if len(terms) < 2:
            raise ValueError("Expected data of at least 2 levels to transfer between; got 1. Use SingleLevel.")
        stages = len(self._stages(len(terms)))
        for name in ("learning_rate", "patience"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != stages:
                raise ValueError(f"Expected one {name} for all stages or {stages}, one per stage; got {value}.")
        return list(terms)

    def runs(self, n: Sequence[int]) -> tuple[int, ...]:
        """Runs of each level whose outputs are trained on, of data with n rows per level."""
        pooled = count_runs(n)
        return pooled if self.fine_tune or self.align or self.joint else (*pooled[:-1], 0)

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
        """Trains the networks in place, stage by stage; see `minimise`.

        Raises:
            ValueError: If the embedding is to be frozen and has nothing to freeze.
        """
        frozen = [parameter for member in members for parameter in member.network.embedding.parameters()
                  if self.freeze_embedding]
        if self.freeze_embedding and not frozen:
            raise ValueError("freeze_embedding=True needs an embedding with parameters; there is none. Pass "
                             "embedding=, or leave freeze_embedding out.")
        if self.align:
            members = align_members(members)
        stages = []
        for stage, levels in enumerate(self._stages(len(members[0].train))):
            rows = [
                replace(member, train=[pool_levels(member.train, levels)], seed=child_seed(member.seed, stage),
                        validation=[pool_levels(member.validation, levels)] if member.validation else [])
                for member in members
            ]
            name = f"level {levels[0]}" if len(levels) == 1 else "all levels"
            with _kept(frozen if stage else []):
                stages.append(minimise(
                    rows, objective=Objective(), options=self._options(options, stage), pooled=pooled,
                    schedule=schedules[stage] if schedules else None,
                    checkpoint=None if checkpoint is None else checkpoint.part(str(stage)),
                    progress=progress, label=f"{label}, {name}",
                ))
            for history in stages[-1]:
                history.labels = (name,)
        return [join_histories(own) for own in zip(*stages, strict=True)]

    def _stages(self, levels: int) -> list[tuple[int, ...]]:
        """The levels that each stage trains on."""
        first: list[tuple[int, ...]] = [(level,) for level in range(levels - 1)]
        if self.joint:
            first = [tuple(range(levels))]
        return [*first, (levels - 1,)] if self.fine_tune else first

    def _options(self, options: TrainingOptions, stage: int) -> TrainingOptions:
        rate = self.learning_rate[stage] if isinstance(self.learning_rate, tuple) else self.learning_rate
        patience = self.patience[stage] if isinstance(self.patience, tuple) else self.patience
        return replace(options, learning_rate=options.learning_rate if rate is None else rate,
                       patience=options.patience if patience is None else patience)


@contextmanager
def _kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Takes parameters out of training for a while."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True
