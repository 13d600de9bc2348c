r"""Sets of independent outputs at the same parameters, as a likelihood is tested with."""

from __future__ import annotations

import torch
from torch import Tensor

from mlsbi.levels import LevelStack
from mlsbi.simulation.campaign import warn_left_out
from mlsbi.simulation.seeding import BLOCK, RowSource

__all__ = ["simulate_sets"]


def simulate_sets(stack: LevelStack, level: int, n: int, m: int, *, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    r"""Draws theta `(n, D)` and sets of m independent outputs `(n, m, ...)` of one level at each.

    Sets with NaN or infinite outputs are left out, with a warning. With m = 1 these are the rows of `simulate_level`.

    Args:
        stack: Prior, noise and levels.
        level: Which level; negative counts from the finest.
        n: Sets.
        m: Outputs in each.
        seed: Seed of everything random.
        stream: Random stream.

    Raises:
        ValueError: If n or m is not positive, or no set is finite.
    """
    if min(n, m) < 1:
        raise ValueError(f"Expected at least one set of at least one output; got n={n}, m={m}.")
    source = RowSource(stack, seed=seed, stream=stream)
    theta = source.rows(0, n)[0]
    outputs = []
    for start in range(0, n * m, BLOCK):
        rows = torch.arange(start, min(start + BLOCK, n * m))
        noise = source.rows(start, int(rows[-1]) + 1)[1]
        found = torch.as_tensor(stack.levels[level].simulate(theta[rows // m], noise)).detach().cpu()
        if len(found) != len(rows):
            raise ValueError(f"Expected {len(rows)} outputs of '{stack.levels[level].name}', one per theta; got "
                             f"{len(found)}.")
        outputs.append(found if found.is_floating_point() else found.to(theta.dtype))
    x = torch.cat(outputs).reshape(n, m, *outputs[0].shape[1:])
    finite = torch.isfinite(x).flatten(1).all(1)
    if not bool(finite.any()):
        raise ValueError(f"Every one of {n} sets of '{stack.levels[level].name}' has NaN or infinite outputs.")
    warn_left_out([stack.levels[level].name], [n], [int((~finite).sum())])
    return theta[finite], x[finite]
