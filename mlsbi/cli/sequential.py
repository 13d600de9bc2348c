r"""Rounds for one observation, as `mlsbi run --x-o FILE --rounds R` makes them."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsbi.cli.folders import ROUNDS, STORE
from mlsbi.cli.requests import RunRequest
from mlsbi.cli.targets import Target
from mlsbi.inference.budgeting import FixedRows, check_parts
from mlsbi.inference.npe import NPE
from mlsbi.inference.sequential import SequentialInference, infer_sequentially
from mlsbi.inference.truncated import TruncatedPrior
from mlsbi.randomness import child_seed
from mlsbi.simulation.campaign import simulate_level
from mlsbi.simulation.opening import accept_code
from mlsbi.simulation.running import RunOptions
from mlsbi.store.records import TEST_STREAM

__all__ = ["check_rounds", "infer_rounds", "is_sequential", "record_rounds", "set_aside", "simulate_inside"]

_KEPT_DRAWS = 1000  # of each round's posterior
_EXACT_DRAWS = 20_000


def is_sequential(request: RunRequest, kind: str) -> bool:
    """Whether rounds are for one observation: a likelihood is learned for all."""
    return request.rounds > 1 and request.x_o is not None and kind == "npe"


def check_rounds(target: Target, request: RunRequest, n: tuple[int, ...] | None) -> None:
    """Raises a `ValueError` if a target or request cannot go in rounds for one observation."""
    if target.stack is None:
        raise ValueError(f"'{target.name}' is a fixed data set: nothing can be simulated in rounds. Leave out "
                         "--rounds.")
    if len(request.strategies) > 1:
        raise ValueError("Rounds for one observation simulate where the strategy's own posterior is, so that several "
                         "cannot share them: give one --strategy, and another --out to each run.")
    if n is not None:
        FixedRows.read(n, request.rounds, len(target.stack))
    elif request.budget is not None:
        check_parts(target.stack, request.budget, request.rounds, request.pilot_rows)


def set_aside(folder: Path) -> Path | None:
    """Moves the rounds of an earlier run out of the way, all but the first one's simulations; where to."""
    if not (folder / ROUNDS).exists():
        return None
    aside = next(path for path in (folder / f"{ROUNDS}-{k}" for k in range(1, 10**6)) if not path.exists())
    os.rename(folder / ROUNDS, aside)
    return aside


def infer_rounds(
    target: Target, request: RunRequest, estimator: NPE, members: int, n: tuple[int, ...] | None, observed: Tensor,
    options: RunOptions,
) -> SequentialInference:  # fmt: skip
    """Simulates and trains in rounds; everything is kept in the run's folder, and a run goes on there.

    The first round's simulations are in the run's store, where a pilot may have begun.
    """
    assert target.stack is not None
    running = {key: value for key, value in vars(options).items() if key != "store"}
    return infer_sequentially(
        target.stack, observed, seed=request.seed, rounds=request.rounds, n=n,
        budget=None if n is not None else request.budget, strategy=estimator.strategy or "multilevel",
        ensemble=members, density=estimator.builder, embedding=estimator.embedding, x_transform=estimator.x_transform,
        training=request.training, pilot_rows=request.pilot_rows, integrand=request.integrand, device=request.device,
        folder=request.out / ROUNDS, store=request.out / STORE, accept_code=request.accept_code, **running,
    )


def simulate_inside(
    target: Target, request: RunRequest, found: SequentialInference, n: int, options: RunOptions
) -> tuple[Tensor, Tensor]:
    """Test rows `(theta, x)` of the finest level from what the last round drew theta from, kept in the run's folder."""
    assert target.stack is not None
    stack, seed = replace(target.stack, prior=found.priors[-1]), request.seed
    kept = replace(options, store=request.out / ROUNDS / "tests")
    if request.accept_code and (request.out / ROUNDS / "tests" / "store.json").is_file():
        accept_code(request.out / ROUNDS / "tests", stack)
    return simulate_level(stack, -1, n, seed=child_seed(seed, TEST_STREAM), stream=TEST_STREAM, options=kept)


def record_rounds(target: Target, found: SequentialInference, seed: int, path: Path) -> dict[str, Any]:
    """What `results.json` says of the rounds; draws of each round's posterior are written to a file."""
    draws = torch.stack([posterior.sample((_KEPT_DRAWS,), seed=child_seed(seed, 7)) for posterior in found.posteriors])
    np.savez(path, draws=draws.numpy())
    lost: tuple[float, ...] | None = None
    distance: list[float] | None = None
    if target.reference is not None:
        exact = target.reference.sample(_EXACT_DRAWS, found.x, child_seed(seed, 8))
        lost = found.truncation_error(exact)
        log_p = target.reference.log_prob(exact, found.x[0])
        distance = [float((log_p - posterior.log_prob(exact).double()).mean()) for posterior in found.posteriors]
    last = found.priors[-1]
    return {
        "rounds": [asdict(done) for done in found.rounds], "lost": lost, "divergence": distance,
        "spent": found.spent, "share": last.share if isinstance(last, TruncatedPrior) else 1.0,
    }
