r"""What samples tell: means with their errors, how heavy tails are, whether a moment looks infinite."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["FEWEST_FOR_TAILS", "hill", "looks_infinite", "mean_and_error"]

FEWEST_FOR_TAILS = 2000
"""Values below which nothing is said of tails."""

_SHARES = (0.01, 0.0025)  # of the values, at which the tail index is estimated
_SHAPE_SHARE = 0.05  # of the values, whose shape tells a power law from what only looks like one
_POWER_LAW = 0.92  # coefficient of variation of log excesses: 1 for a power law, below .9 for a log-normal and lighter


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over rows, the first axis, and its standard error."""
    return values.mean(0), values.std(0) / len(values) ** 0.5


def hill(values: Tensor, share: float = _SHARES[0]) -> tuple[float, float]:
    r"""Hill's estimate of the tail index of non-negative values, and its standard error.

    Moments below the index are finite. It is infinite where the largest values are equal.

    Args:
        values: Shape `(n,)`.
        share: Share of the values that is taken as the tail; at least 10 of them.

    References:
        | A simple general approach to inference about the tail of a distribution (Hill, 1975)
        | https://doi.org/10.1214/aos/1176343247

    Example:
        >>> import torch
        >>> uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> index, error = hill(uniform**-0.5)  # a Pareto tail of index 2
        >>> abs(index - 2) < 3 * error
        True
    """
    excess = _log_excess(values, share)
    if excess is None or not float(excess.mean()) > 0:
        return math.inf, 0.0
    index = 1 / float(excess.mean())
    return index, index / math.sqrt(len(excess))


def looks_infinite(values: Tensor, moment: float) -> bool:
    r"""Whether non-negative values look as if they came from a law whose moment is infinite.

    Their tail index must be below it by three standard errors, in the outer hundredth and farther out, and the tail
    must look like a power law: the logarithms of what exceeds a level have the same spread as mean. Log-normal values
    have all moments, though a small index at any level; their tails bend down. Fewer than `FEWEST_FOR_TAILS` values
    cannot tell these apart, and never look infinite.

    Args:
        values: Shape `(n,)`.
        moment: Order of the moment.
    """
    if len(values) < FEWEST_FOR_TAILS:
        return False
    for share in _SHARES:
        index, error = hill(values, share)
        if not index + 3 * error < moment:
            return False
    excess = _log_excess(values, _SHAPE_SHARE)
    return excess is not None and float(excess.std()) > _POWER_LAW * float(excess.mean())


def _log_excess(values: Tensor, share: float) -> Tensor | None:
    """Logarithms of the largest values over the largest of the rest; `None` where that is zero."""
    k = min(max(10, round(share * len(values))), len(values) - 1)
    top = values.topk(k + 1).values
    return (top[:-1] / top[-1]).log() if k > 0 and float(top[-1]) > 0 else None
