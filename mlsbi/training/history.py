r"""What happened in a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["History", "TrainingError", "join_histories"]


class TrainingError(RuntimeError):
    """Training gave no network that could be used."""


@dataclass
class History:
    r"""What happened in one training.

    Args:
        epochs: One record per epoch: losses, loss of each half, weights; gradient norms, cosine and projected share
            where the gradient was adjusted; in transfer learning its stage.
        best_epoch: Epoch whose weights were kept.
        best_loss: Held-out loss of that epoch; the training loss without held-out rows.
        stopped: Why training ended.
        seconds: Time it took; of members trained in one go, an equal share.
        n_train: Rows trained on, per term.
        n_validation: Rows held out, per term.
        stages: Best epoch of each stage, counted from the stage's first.
        notes: What was done otherwise than asked or needs saying, and what compiling brought.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    best_loss: float = math.inf
    stopped: str = ""
    seconds: float = 0.0
    n_train: tuple[int, ...] = ()
    n_validation: tuple[int, ...] = ()
    stages: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per epoch."""
        import pandas as pd  # takes a quarter as long to import as torch, and training does not need it

        return pd.DataFrame(self.epochs)


def join_histories(stages: Sequence[History]) -> History:
    """The history of trainings in a row, each of one term, with the number of its stage in every record.

    The kept epoch and its loss are the last stage's.
    """
    before = sum(len(stage.epochs) for stage in stages[:-1])
    return History(
        epochs=[{**record, "stage": float(index)} for index, stage in enumerate(stages) for record in stage.epochs],
        best_epoch=before + stages[-1].best_epoch,
        best_loss=stages[-1].best_loss,
        stopped="; then ".join(stage.stopped for stage in stages),
        seconds=sum(stage.seconds for stage in stages),
        n_train=tuple(n for stage in stages for n in stage.n_train),
        n_validation=tuple(n for stage in stages for n in stage.n_validation),
        stages=tuple(stage.best_epoch for stage in stages),
        notes=tuple(dict.fromkeys(note for stage in stages for note in stage.notes)),
    )
