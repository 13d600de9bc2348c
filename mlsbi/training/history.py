r"""What happened in a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FewRowsError", "History", "TrainingError", "join_histories"]


class TrainingError(RuntimeError):
    """Training gave no network that could be used."""


class FewRowsError(ValueError):
    """A way of training needs more rows than there are, which another may not."""


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
        labels: What each stage trained on, where there are several.
        mixture: Where several strategies were mixed, one record each, in the order of the mixture's parts: its name,
            weight, own loss on held-out rows (`None` where it could not be trained) and its standard error, its first
            stage and the one after its last, and seconds.
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
    labels: tuple[str, ...] = ()
    mixture: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> History:
        """A history from what `dataclasses.asdict` made of it and JSON kept.

        Raises:
            KeyError: `saved` is not a history: it lacks epochs.
            TypeError: It has a field that no history has.
        """
        others: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                                  for name, value in saved.items() if name != "epochs"}
        return cls(epochs=saved["epochs"], **others)

    def to_frame(self) -> pd.DataFrame:
        """One row per epoch."""
        import pandas as pd  # takes a quarter as long to import as torch, and training does not need it

        return pd.DataFrame(self.epochs)


def join_histories(parts: Sequence[History]) -> History:
    """The history of trainings in a row, with the number of its stage in every record.

    A part may itself be in stages. The kept epoch and its loss are the last part's.
    """
    epochs: list[dict[str, float]] = []
    stages: list[int] = []
    for part in parts:
        epochs += [{**record, "stage": record.get("stage", 0.0) + len(stages)} for record in part.epochs]
        stages += part.stages or (part.best_epoch,)
    return History(
        epochs=epochs,
        best_epoch=len(epochs) - len(parts[-1].epochs) + parts[-1].best_epoch,
        best_loss=parts[-1].best_loss,
        stopped="; then ".join(part.stopped for part in parts),
        seconds=sum(part.seconds for part in parts),
        n_train=tuple(n for part in parts for n in part.n_train),
        n_validation=tuple(n for part in parts for n in part.n_validation),
        stages=tuple(stages),
        labels=tuple(label for part in parts for label in part.labels or ("",) * max(len(part.stages), 1)),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )
