r"""Sets of independent outputs at the same parameters, as a likelihood is tested with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsbi.levels import LevelStack
from mlsbi.simulation.running import DROPPING, RunOptions, make_term, run_terms, warn_left_out
from mlsbi.simulation.scheduling import SimulationError
from mlsbi.simulation.seeding import RowSource
from mlsbi.store.records import OK, SET_STREAM

__all__ = ["simulate_sets"]


@dataclass(frozen=True)
class _SetSource:
    """Rows of a stream with one theta for m of them: its row k for rows `k m` to `k m + m - 1`."""

    thetas: RowSource
    noises: RowSource  # apart, as each keeps the block it drew last
    m: int

    def rows(self, start: int, stop: int) -> tuple[Tensor, Any]:
        first = start // self.m
        theta = self.thetas.rows(first, (stop - 1) // self.m + 1)[0]
        return theta[torch.arange(start, stop) // self.m - first], self.noises.rows(start, stop)[1]


def simulate_sets(
    stack: LevelStack, level: int, n: int, m: int, *, seed: int, stream: int,
    options: RunOptions = DROPPING,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Draws theta `(n, D)` and sets of m independent outputs `(n, m, ...)` of one level at each.

    A set with a failed output is left out whole, with a warning. With m = 1 these are the rows of `simulate_level`.

    Args:
        stack: Prior, noise and levels.
        level: Which level; negative counts from the finest.
        n: Sets.
        m: Outputs in each.
        seed: Seed of everything random.
        stream: Random stream.
        options: How they are run; `on_failure="redraw"` is not for sets.

    Raises:
        ValueError: If n or m is not positive, or failed rows are to be redrawn.
        SimulationError: If no set is finished, or a row failed and `on_failure` is `"raise"`.
    """
    if min(n, m) < 1:
        raise ValueError(f"Expected at least one set of at least one output; got n={n}, m={m}.")
    if options.on_failure == "redraw":
        raise ValueError('Expected on_failure "raise" or "drop" for sets; a set has no further rows to redraw.')
    index = range(len(stack))[level]
    number = stream if m == 1 else SET_STREAM * m + stream
    thetas, noises = (RowSource(stack, seed=seed, stream=stream) for _ in range(2))
    source = _SetSource(thetas, noises, m)
    term = make_term(stack, seed, number, slice(index, index + 1), n * m, source=source)
    run_terms(stack, [term], [()], options)
    whole = torch.from_numpy((term.status == OK).reshape(n, m).all(1))
    name = stack.levels[index].name
    if not bool(whole.any()):
        raise SimulationError(f"Every one of {n} sets of '{name}' has a failed output.")
    warn_left_out([name], [n], [int(np.sum(~whole.numpy()))])
    theta = term.theta
    if theta is None:
        raise RuntimeError("A finished term has no rows.")
    return theta[::m][whole], term.outputs[0].reshape(n, m, *term.outputs[0].shape[1:])[whole]
