r"""How networks are trained, as far as it does not depend on the levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["TrainingOptions"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


@dataclass(frozen=True)
class TrainingOptions:
    r"""How a network is trained.

    Args:
        learning_rate: Adam's step size.
        batch_size: Rows of all terms in a step, about: a term gives its share, at least 64 rows where it has them.
            Every row in every step when `None`. `"auto"` is a quarter of the rows, at least 256 and at most 2048:
            where cheap rows are many, small batches would show the few pairs far more often than them.
        epochs: Most passes over the rows.
        patience: Epochs without a better held-out loss before training stops.
        validation_fraction: Share of each term's rows held out, pairs kept together; 0 trains all epochs on all rows
            and keeps the last weights. Ensembles of `"auto"` and `"emulation"` hold out one part per member instead.
        cross_fit: Whether the epoch to stop at is chosen on every row, each scored by networks not trained on it,
            instead of on one held-out part. An ensemble then stops all members at their common best epoch. A single
            network is preceded by `1 / validation_fraction` others that choose the epoch, and then trained on all
            rows up to there, which takes that many times as long. `"auto"` does so where a term holds out fewer than
            10 rows.
        clip: Largest gradient norm.
        weight_decay: Decoupled weight decay.
        average: Decay per step of a running average of the weights, such as 0.99, which is then what is scored and
            kept; 0 keeps the weights themselves.
        together: Whether the members of an ensemble are trained in one go, as a batch of networks, or one after the
            other; `"auto"` takes what is faster for the number of rows. Results agree up to rounding.
        compile: Whether the network's loss is compiled, which takes from ten seconds to a minute and makes steps about
            two times faster; needs a C++ compiler on the CPU. `"auto"` compiles once plain training has lasted as long
            as compiling usually takes. What it brought is in the history.
        precision: Of weights, rows and losses. `"bfloat16"` is mixed: only matrix products are of that precision.

    Raises:
        ValueError: If a number is out of range.
    """

    learning_rate: float = 1e-3
    batch_size: int | Literal["auto"] | None = "auto"
    epochs: int = 1000
    patience: int = 20
    validation_fraction: float = 0.2
    cross_fit: bool | Literal["auto"] = False
    clip: float = 5.0
    weight_decay: float = 0.0
    average: float = 0.0
    together: bool | Literal["auto"] = "auto"
    compile: bool | Literal["auto"] = False
    precision: Literal["float32", "float64", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and self.clip > 0 and self.weight_decay >= 0):
            raise ValueError(f"Expected learning_rate > 0, clip > 0 and weight_decay >= 0; got {self}.")
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f'Expected a number, "auto" or None as batch_size; got {self.batch_size!r}.')
        rows = self.batch_size if isinstance(self.batch_size, (int, float)) else 1
        if self.epochs < 1 or self.patience < 1 or rows < 1:
            raise ValueError(f"Expected epochs, patience and batch_size of at least 1; got {self}.")
        if any(int(number) != number for number in (self.epochs, self.patience, rows)):
            raise ValueError(f"Expected whole numbers of epochs, patience and batch_size; got {self}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"Expected 0 <= validation_fraction < 1; got {self.validation_fraction}.")
        if not 0 <= self.average < 1:
            raise ValueError(f"Expected 0 <= average < 1, the decay of the weights' average; got {self.average}.")
        for name in ("cross_fit", "together", "compile"):
            if getattr(self, name) not in (True, False, "auto"):
                raise ValueError(f'Expected True, False or "auto" as {name}; got {getattr(self, name)!r}.')
        if self.cross_fit is True and self.validation_fraction == 0:
            raise ValueError("cross_fit=True needs rows to hold out: set validation_fraction above 0.")
        if self.precision not in _DTYPES:
            raise ValueError(f"Expected a precision out of {', '.join(_DTYPES)}; got {self.precision!r}.")

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, rows and losses."""
        return _DTYPES[self.precision]
