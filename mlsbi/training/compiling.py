r"""Compiled losses, when that pays, and what it brought."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

__all__ = ["Compiling", "compiled"]

_USUAL_SECONDS = 30.0  # that compiling takes; "auto" trains plainly for as long first, so as to lose half at most
_PLAIN_STEPS = 3  # timed before compiling, for comparison
_COMPILED_STEPS = 10  # timed after it
_GRAPHS = 64  # shapes and architectures that one process may compile


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one compiled graph per shape of its arguments."""
    inner = torch.compile(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_GRAPHS):
            return inner(*arguments)

    return call


class Compiling:
    r"""Decides when steps are compiled, and times some of them.

    Args:
        asked: See `TrainingOptions.compile`.
        device: Where steps run.
    """

    def __init__(self, *, asked: bool | Literal["auto"], device: torch.device) -> None:
        # On a GPU steps are replayed as a graph, beside which compiling seldom pays by itself.
        self.asked = False if asked == "auto" and device.type == "cuda" else asked
        self.device = device
        self.seconds: float | None = None
        self._plain: list[float] = []
        self._compiled: list[float] = []
        self._spent = 0.0
        self._begun = False
        self._failed: str | None = None

    @property
    def due(self) -> bool:
        """Whether the next step is to be compiled."""
        if self._begun or self.asked is False:
            return False
        enough = len(self._plain) >= _PLAIN_STEPS
        return enough and (self.asked is True or self._spent >= _USUAL_SECONDS)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be timed or compiled."""
        return self.asked is False or len(self._compiled) >= _COMPILED_STEPS

    def begin(self) -> None:
        """Says that the next step compiles."""
        self._begun = True

    def give_up(self, why: str) -> None:
        """Says that compiling failed."""
        self.asked, self._failed = False, why

    def time(self, step: Callable[[], Any]) -> Any:
        """Runs a step, and times it where the time is wanted."""
        if self.asked is False or len(self._compiled) >= _COMPILED_STEPS:
            return step()
        start = self._now()
        found = step()
        taken = self._now() - start
        if not self._begun:
            self._spent += taken
            self._plain.append(taken)
        elif self.seconds is None:
            self.seconds = taken
        else:
            self._compiled.append(taken)
        return found

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def report(self, steps: int) -> str | None:
        """What compiling brought after so many steps; `None` where nothing was compiled."""
        if self.asked == "auto" and not self._begun:
            return "not compiled: training was over before compiling could have paid"
        if self.asked is False:
            return self._failed
        if self.seconds is None or not self._compiled:
            return f"compiling came to nothing: training was over after {steps} steps"
        plain, after = statistics.median(self._plain), statistics.median(self._compiled)
        said = (f"compiling took {self.seconds:.0f} s; a step then took {1e3 * after:.2f} ms instead of "
                f"{1e3 * plain:.2f} ms")
        if after >= plain:
            return f"{said}, which cannot pay"
        even = self.seconds / (plain - after)
        return f"{said}, which pays beyond {even:.0f} steps; {steps} were made"
