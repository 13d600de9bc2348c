r"""What the user asked a run for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlsbi.simulation.scheduling import OnFailure
from mlsbi.training.options import TrainingOptions

__all__ = ["FEWEST_ROWS", "RunRequest"]

FEWEST_ROWS = 2
"""Rows that a term needs: one to train on, one to hold out."""


@dataclass(frozen=True)
class RunRequest:
    """What the user asked for; the fields are the options of `mlsbi run`."""

    strategies: tuple[str, ...]
    seed: int
    device: str
    ensemble: int | None
    out: Path
    command: str
    estimator: Literal["npe", "nle"] | None = None
    observations: int | None = None
    budget: float | None = None
    n: tuple[int, ...] | None = None
    pilot_rows: int = 64
    integrand: Literal["loss", "gradient", "output"] = "loss"
    rounds: int = 1
    workers: int = 1
    on_failure: OnFailure = "raise"
    retry_failed: bool = False
    accept_code: bool = False
    overwrite: bool = False
    tests: int | None = None
    draws: int = 2000
    x_o: Path | None = None
    training: TrainingOptions = TrainingOptions()
    progress: bool = True
    say: Any = None
