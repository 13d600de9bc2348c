r"""Whether a posterior's own simulations look like the observation."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mlsbi.diagnostics.arrays import Array
from mlsbi.levels import LevelStack
from mlsbi.priors import check_theta
from mlsbi.simulation.seeding import BLOCK, RowSource

__all__ = ["posterior_predictive", "predictive_levels"]

_STREAM = 1 << 18  # apart from those of levels, pilots and test rows in simulation.seeding


def posterior_predictive(stack: LevelStack, theta: ArrayLike | Tensor, *, level: int = -1, seed: int) -> Tensor:
    r"""Runs one level at posterior draws, each with fresh noise.

    The noise is independent of that of training and test rows of the same seed, and depends on nothing but seed and
    row: more draws extend fewer.

    Args:
        stack: Noise and levels.
        theta: Posterior draws, shape `(n, D)`.
        level: Which level to run, 0 the cheapest; negative numbers count from the finest.
        seed: Seed of the noise.

    Returns:
        Outputs on the CPU, shape `(n, ...)`, row for row those of theta. Rows with NaN or infinite output stay in
        and are warned about.

    Raises:
        ValueError: If there is no such level, theta is empty, has another shape or leaves the prior's support, the
            noise does not come from its generator, or the simulator returns another number of rows.

    References:
        | Posterior predictive assessment of model fitness via realized discrepancies (Gelman, Meng and Stern, 1996)
        | https://www.jstor.org/stable/24306036

    Example:
        >>> from mlsbi import BoxPrior, Level, LevelStack
        >>> stack = LevelStack(
        ...     prior=BoxPrior([0.0], [1.0]),
        ...     noise=lambda n, generator: torch.randn(n, 1, generator=generator),
        ...     levels=[Level("exact", lambda theta, noise: theta + noise)],
        ... )
        >>> x = posterior_predictive(stack, torch.full((1000, 1), 0.5), seed=0)
        >>> x.shape, predictive_levels(torch.tensor([9.0]), x) > 0.99
        (torch.Size([1000, 1]), array([ True]))
    """
    if not -len(stack) <= level < len(stack):
        raise ValueError(f"Expected a level from {-len(stack)} to {len(stack) - 1}; got {level}.")
    draws = torch.as_tensor(theta).detach().to("cpu", torch.get_default_dtype())
    check_theta(stack.prior, draws, where="posterior draws")
    if len(draws) == 0:
        raise ValueError("Expected at least one posterior draw; got none.")
    source, chosen = RowSource(stack, seed=seed, stream=_STREAM), stack.levels[level]
    source.check_noise()
    outputs = []
    for start in range(0, len(draws), BLOCK):  # bounds the memory that noise takes
        rows = draws[start : start + BLOCK].clone()
        _, noise = source.rows(start, start + len(rows))
        output = torch.as_tensor(chosen.run(rows, noise)).detach().cpu()
        if output.ndim < 2 or len(output) != len(rows):
            raise ValueError(f"Expected level '{chosen.name}' to return x of shape ({len(rows)}, ...), a row per row "
                             f"of theta; got {tuple(output.shape)}.")
        outputs.append(output)
    x = torch.cat(outputs)
    failed = int((~torch.isfinite(x).flatten(1).all(1)).sum())
    if failed:
        warnings.warn(f"Level '{chosen.name}' gave NaN or infinite output at {failed} of {len(x)} posterior draws.",
                      stacklevel=2)
    return x


def predictive_levels(x_o: ArrayLike, x: ArrayLike) -> Array:
    r"""Share of predictive draws below the observation, for each output: near 0 or 1 where they cannot explain it.

    It is (below + ties / 2 + 1/2) / (n + 1). As the posterior has seen the observation, levels keep nearer to the
    middle than uniform ones: one that is extreme counts, one that is not proves nothing.

    Args:
        x_o: One observation, shape `(...)`.
        x: Predictive draws, shape `(n, ...)`, from `posterior_predictive`.

    Returns:
        Levels, shape `(...)`.

    Raises:
        ValueError: If shapes do not fit or something is not finite.

    References:
        | Posterior predictive assessment of model fitness via realized discrepancies (Gelman, Meng and Stern, 1996)
        | https://www.jstor.org/stable/24306036

    Example:
        >>> predictive_levels([0.5, 9.0], [[0.0, 1.0], [1.0, 1.0], [2.0, 2.0]])
        array([0.375, 0.875])
    """
    observed, drawn = np.asarray(x_o, dtype=np.float64), np.asarray(x, dtype=np.float64)
    if drawn.ndim == 0 or len(drawn) == 0 or drawn.shape[1:] != observed.shape:
        raise ValueError(f"Expected x_o of shape (...) and x of shape (n, ...), n at least 1; got {observed.shape} and "
                         f"{drawn.shape}.")
    if not (np.isfinite(observed).all() and np.isfinite(drawn).all()):
        raise ValueError(f"Expected finite x_o and x; got {int((~np.isfinite(observed)).sum())} and "
                         f"{int((~np.isfinite(drawn)).sum())} NaN or infinite numbers. Leave failed rows out, and say "
                         "how many.")
    return ((drawn < observed).sum(0) + 0.5 * (drawn == observed).sum(0) + 0.5) / (len(drawn) + 1)
