r"""Checks of what an exact posterior is asked about."""

from __future__ import annotations

from torch import Tensor

from mlsbi.priors import BoxPrior

__all__ = ["check_matching", "read_observations"]


def read_observations(x: Tensor, points: int) -> Tensor:
    """Observations of so many points, `(n, points)`, float64, of which one may come without its batch dimension.

    Raises:
        ValueError: If they have another shape.
    """
    x = (x[None] if x.ndim == 1 else x).double()
    if x.ndim != 2 or x.shape[1] != points:
        raise ValueError(f"Expected x of shape (n, {points}) or ({points},); got {tuple(x.shape)}.")
    return x


def check_matching(prior: BoxPrior, theta: Tensor, x: Tensor) -> None:
    """Raises a `ValueError` unless theta is `(n, D)` and there is one observation, or one per row of theta."""
    dim = len(prior.low)
    if theta.ndim != 2 or theta.shape[1] != dim:
        raise ValueError(f"Expected theta of shape (n, {dim}); got {tuple(theta.shape)}.")
    if len(x) not in (1, len(theta)):
        raise ValueError(f"Expected one observation, or one per row of theta, {len(theta)}; got {len(x)}.")
