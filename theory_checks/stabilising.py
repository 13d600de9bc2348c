r"""What rescaling and projecting do to the expected gradient: they buy stability with a bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlsbi.randomness import child_seed
from mlsbi.training.stabilisers import adjust
from theory_checks.measuring import Measured

__all__ = ["AdjustedGradient", "adjusted_gradient"]


@dataclass(frozen=True)
class AdjustedGradient:
    r"""Mean and spread of a step's gradient over repetitions, beside the true one.

    Args:
        name: Which adjustment.
        bias: Length of the mean gradient's difference from the true one, over the length of the true one; that part
            which chance alone would give is taken off.
        z: The difference along its own direction in half the repetitions, in standard errors of the other half.
        spread: Root of the trace of the covariance, over the length of the true gradient.
    """

    name: str
    bias: float
    z: float
    spread: float

    def __str__(self) -> str:
        return (f"{self.name}: bias {self.bias:.1%} of the gradient ({self.z:.1f} standard errors), spread "
                f"{self.spread:.0%}")


def adjusted_gradient(
    measured: Measured,
    n: Sequence[int],
    *,
    rescale: bool = False,
    project: bool = False,
    correction_limit: float | None = None,
    weights: Sequence[float] | None = None,
    repetitions: int = 1000,
    seed: int = 0,
) -> AdjustedGradient:
    r"""Repeats one step of training at a fixed network and compares the mean gradient with the true one.

    The rows that were measured are the whole world: steps draw their rows from them with replacement, and the true
    gradient is the mean over all of them at the finest level. So nothing but the adjustment can bias the mean.

    Args:
        measured: Rows measured with a `Gradient` integrand.
        n: Rows of each term in a step.
        rescale: Whether each coarse gradient gets the length of its fine twin.
        project: Whether conflicting gradients of level 0 and of the correction are projected.
        correction_limit: Longest correction, in lengths of level 0's gradient.
        weights: a_0 .. a_L; 1 when left out.
        repetitions: Steps.
        seed: Of their rows.

    Raises:
        ValueError: If n does not have one positive number per level.
    """
    values = measured.values  # (L + 1, rows, parameters)
    levels, rows, parameters = values.shape
    if len(n) != levels or not all(isinstance(size, int) and size >= 1 for size in n):
        raise ValueError(f"Expected {levels} whole numbers of at least 1 as n, one per level; got {list(n)}.")
    a = torch.ones(levels, dtype=values.dtype) if weights is None else torch.tensor(weights, dtype=values.dtype)
    generator = torch.Generator().manual_seed(child_seed(seed, 6))
    steps = torch.empty(repetitions, parameters, dtype=values.dtype)
    for repetition in range(repetitions):
        halves: list[Tensor] = []
        for level, size in enumerate(n):
            drawn = torch.randint(0, rows, (size,), generator=generator)
            halves.append(values[level, drawn].mean(0))
            if level:
                halves.append(values[level - 1, drawn].mean(0))
        steps[repetition] = adjust(halves, a, use_rescale=rescale, use_project=project,
                                   correction_limit=correction_limit).gradient
    true = values[-1].mean(0)
    length = float(true.norm())
    off = steps - true
    mean, covariance_trace = off.mean(0), float(off.var(0).sum())
    # |mean|^2 is too large by the trace over the number of repetitions.
    bias = max(float(mean.square().sum()) - covariance_trace / repetitions, 0.0) ** 0.5 / length
    half = repetitions // 2
    direction = off[:half].mean(0)
    along = off[half:] @ (direction / direction.norm())
    chosen = [name for name, used in (("rescale", rescale), ("project", project),
                                      ("correction_limit", correction_limit is not None)) if used]
    return AdjustedGradient(" + ".join(chosen) or "plain", bias,
                            float(along.mean() / along.std()) * len(along) ** 0.5, covariance_trace**0.5 / length)
