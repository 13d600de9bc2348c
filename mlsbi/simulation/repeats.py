r"""Cheap levels run once more at theta that have been run, with noise of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsbi.levels import LevelStack
from mlsbi.priors import check_theta
from mlsbi.simulation.opening import store_for
from mlsbi.simulation.running import DROPPING, RunOptions, make_term, run_terms, warn_left_out
from mlsbi.simulation.scheduling import SimulationError
from mlsbi.simulation.seeding import RowSource
from mlsbi.store.records import OK, REPEAT_STREAM, Stream
from mlsbi.store.store import Store, StoreError

__all__ = ["Repeats", "simulate_repeats"]


@dataclass(frozen=True)
class Repeats:
    r"""Outputs of cheap levels at given theta.

    Args:
        kept: Which of the n theta every level finished, bool, shape `(n,)`.
        outputs: Output of each level but the finest at those, cheapest first, each `(kept.sum(), ...)`.
        runs: Simulator runs of each of these levels.
        seconds: Time spent in each.
    """

    kept: Tensor
    outputs: tuple[Tensor, ...]
    runs: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class _RepeatSource:
    """Given theta, and the noise of a stream."""

    theta: Tensor
    noises: RowSource

    def rows(self, start: int, stop: int) -> tuple[Tensor, Any]:
        return self.theta[start:stop].clone(), self.noises.rows(start, stop)[1]


def simulate_repeats(stack: LevelStack, theta: Tensor, *, seed: int, options: RunOptions = DROPPING) -> Repeats:
    r"""Runs every level but the finest at given theta, with noise that no pilot, campaign or test row has.

    The levels share their noise. A row with a failed output is left out at all of them, with a warning. Row i depends
    on the seed and its theta alone, so that longer theta extend shorter ones, in a store as well.

    Args:
        stack: Prior, noise and at least two levels.
        theta: Parameters, shape `(n, D)`, such as a pilot report's.
        seed: Seed of the noise.
        options: How they are run; `on_failure="redraw"` is not for given theta.

    Raises:
        ValueError: If the stack has one level only, theta is empty or outside the prior's support, or failed rows are
            to be redrawn.
        SimulationError: If no row is finished, or a row failed and `on_failure` is `"raise"`.
        StoreError: If the store has these rows at other theta, or as `simulate`.
    """
    if len(stack) < 2:
        raise ValueError("Expected a stack of at least two levels; this one has no cheap level.")
    if options.on_failure == "redraw":
        raise ValueError('Expected on_failure "raise" or "drop" at given theta; there are no further rows to redraw.')
    given = torch.as_tensor(theta).detach().cpu()
    check_theta(stack.prior, given, where="theta")
    if len(given) == 0:
        raise ValueError("Expected at least one theta; got none.")
    source = _RepeatSource(given, RowSource(stack, seed=seed, stream=REPEAT_STREAM))
    term = make_term(stack, seed, REPEAT_STREAM, slice(0, -1), len(given), source=source)
    if options.store is not None:
        kept = store_for(stack, options.store)
        _check_stored(kept, term.stream, given)
        options = replace(options, store=kept)
    run_terms(stack, [term], [()], options)
    whole = torch.from_numpy(term.status == OK)
    if not bool(whole.any()):
        raise SimulationError(f"Every one of {len(given)} repeats failed.")
    warn_left_out([term.label], [len(given)], [int((~whole).sum())])
    return Repeats(whole, tuple(output[whole] for output in term.outputs), tuple(term.runs.tolist()),
                   tuple(term.seconds.tolist()))


def _check_stored(store: Store, stream: Stream, theta: Tensor) -> None:
    """Refuses rows that were repeated at other theta, such as another pilot's."""
    wanted = theta.numpy()
    for records in store.read(stream, 0, len(wanted), failed=True):
        other = (records.theta != wanted[records.index]).any(1)
        if other.any():
            raise StoreError(f"The store {store.path} has repeats with seed {stream.seed} at other theta, from row "
                             f"{int(records.index[np.argmax(other)])} on, as of another pilot. Pass another seed.")
