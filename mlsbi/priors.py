r"""Prior distributions and the map between their support and unbounded space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Uniform, biject_to, constraints
from torch.distributions.transforms import Transform

from mlsbi.randomness import seeded

__all__ = ["BoxPrior", "Unbounded", "check_prior", "check_theta", "in_support", "parameter_names", "sample_prior"]


_FLOAT32_LOGIT = 25 * math.log(2)  # of half a float32 step, 2**-25


class BoxPrior(Independent):  # type: ignore[type-arg]  # generic in type stubs only
    r"""Independent uniform distributions on a closed box.

    Args:
        low: Lower edges, shape `(D,)`.
        high: Upper edges, shape `(D,)`, each above its lower edge.
        names: One name per parameter; `theta_1, theta_2, ...` when left out.

    Raises:
        ValueError: If the edges are not finite, not of one length, or not ordered, or the names do not fit.

    Example:
        >>> prior = BoxPrior([0.0, 1.0], [1.0, 3.0], names=["rate", "scale"])
        >>> prior.log_prob(torch.tensor([[0.5, 2.0], [0.5, 4.0]]))
        tensor([-0.6931,    -inf])
    """

    def __init__(
        self,
        low: Sequence[float] | Tensor | np.ndarray[Any, Any],
        high: Sequence[float] | Tensor | np.ndarray[Any, Any],
        names: Sequence[str] | None = None,
    ) -> None:
        low_t = torch.as_tensor(low, dtype=torch.get_default_dtype())
        high_t = torch.as_tensor(high, dtype=torch.get_default_dtype())
        if low_t.ndim != 1 or low_t.shape != high_t.shape or len(low_t) == 0:
            raise ValueError(
                f"Expected low and high of one shape (D,); got {tuple(low_t.shape)} and {tuple(high_t.shape)}."
            )
        if not bool(torch.isfinite(low_t).all() & torch.isfinite(high_t).all() & (low_t < high_t).all()):
            raise ValueError(f"Expected finite edges, low < high; got low={low_t.tolist()}, high={high_t.tolist()}.")
        if names is not None and (len(names) != len(low_t) or len(set(names)) != len(names)):
            raise ValueError(f"Expected {len(low_t)} different names, one per parameter; got {list(names)}.")
        self.low, self.high = low_t, high_t
        self.names = tuple(names) if names is not None else _default_names(len(low_t))
        super().__init__(Uniform(low_t, high_t, validate_args=False), 1, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, shape `value.shape[:-1]`; `-inf` outside the box, whose edges belong to it."""
        inside = ((value >= self.low) & (value <= self.high)).all(-1)
        volume = torch.log(self.high - self.low).sum()
        return torch.where(inside, -volume, -torch.inf)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Distribution:
        """The same distribution with a batch shape, as every torch distribution offers."""
        return Independent(self.base_dist, 1, validate_args=False).expand(batch_shape)

    def __repr__(self) -> str:
        edges = ", ".join(
            f"{name} in [{low:g}, {high:g}]"
            for name, low, high in zip(self.names, self.low.tolist(), self.high.tolist(), strict=True)
        )
        return f"BoxPrior({edges})"


@dataclass(frozen=True)
class Unbounded:
    r"""The bijection between a prior's support and unbounded space, where densities live.

    Args:
        prior: A distribution over vectors, on the CPU.
    """

    prior: Distribution

    @property
    def _map(self) -> Transform:
        return biject_to(self.prior.support)

    def to(self, theta: Tensor) -> Tensor:
        """Maps parameters `(..., D)` inside the support to unbounded coordinates.

        Parameters on the edge of a box are taken half a float32 step inside, where rounding may have come from.
        """
        z: Tensor = self._map.inv(theta)
        return z.clamp(-_FLOAT32_LOGIT, _FLOAT32_LOGIT) if self._is_box else z

    def features(self, theta: Tensor) -> Tensor:
        """What a network reads of parameters `(..., D)`: themselves inside a box, unbounded coordinates elsewhere."""
        return theta if self._is_box else self.to(theta)

    @property
    def _is_box(self) -> bool:
        support: Any = self.prior.support
        return isinstance(getattr(support, "base_constraint", support), constraints.interval)

    def back(self, z: Tensor) -> Tensor:
        """Maps unbounded coordinates to parameters `(..., D)`, which lie in the support."""
        return self._map(z)

    def log_abs_det(self, z: Tensor, theta: Tensor) -> Tensor:
        """Log of |d theta / d z| at matching points, shape `(...,)`."""
        return self._map.log_abs_det_jacobian(z, theta)


def sample_prior(prior: Distribution, n: int, *, seed: int) -> Tensor:
    """Draws `(n, D)` parameters from a seed, leaving torch's global random state as found."""
    with seeded(seed):
        return prior.sample((n,))


def check_prior(prior: Distribution) -> None:
    """Checks that a prior is a continuous distribution over vectors whose support can be unbounded.

    Raises:
        TypeError: If `prior` is not a torch distribution.
        ValueError: If it is batched, scalar, discrete, or its support has no bijection to unbounded space.
    """
    if not isinstance(prior, Distribution):
        raise TypeError(
            f"Expected a torch.distributions.Distribution as prior; got {type(prior).__name__}. "
            "Use mlsbi.BoxPrior(low, high) for a uniform prior."
        )
    if len(prior.event_shape) != 1 or len(prior.batch_shape) != 0:
        raise ValueError(
            f"Expected a prior over vectors: event_shape (D,), batch_shape (); got {tuple(prior.event_shape)} and "
            f"{tuple(prior.batch_shape)}. Wrap independent components as torch.distributions.Independent(prior, 1)."
        )
    try:
        support = prior.support
        if support is None or support.is_discrete:
            raise ValueError("Expected a prior with a continuous support; this one is discrete or undefined.")
        unbounded = Unbounded(prior)
        theta = sample_prior(prior, 16, seed=0)
        z = unbounded.to(theta)
    except NotImplementedError as error:
        raise ValueError(
            f"Expected a prior with a usable support; {type(prior).__name__} has none that biject_to() can map to "
            "unbounded space. Give the distribution a `support` constraint."
        ) from error
    if not bool(torch.isfinite(theta).all() & torch.isfinite(z).all() & torch.isfinite(prior.log_prob(theta)).all()):
        raise ValueError(
            f"Expected a prior whose own draws have a finite density inside its support; {type(prior).__name__} does "
            "not: are its edges infinite or its support wrong?"
        )


def check_theta(prior: Distribution, theta: Tensor, *, where: str) -> None:
    """Raises a `ValueError` unless `theta` is `(n, D)`, finite and inside the prior's support."""
    dim = prior.event_shape[0]
    if theta.ndim != 2 or theta.shape[1] != dim:
        raise ValueError(f"Expected theta of shape (n, {dim}) in {where}; got {tuple(theta.shape)}.")
    outside = int((~in_support(prior, theta)).sum())
    if outside:
        raise ValueError(
            f"Expected every theta in {where} to be finite and inside the prior's support; {outside} of {len(theta)} "
            "rows are not. Check the parameter order and the prior's edges."
        )


def in_support(prior: Distribution, theta: Tensor) -> Tensor:
    """Whether each parameter vector of `(..., D)` is finite and inside the support, shape `(...,)`."""
    theta = theta.to(torch.get_default_dtype())  # edges are kept in it: 0.1 is not above 0.1
    finite = torch.isfinite(theta).all(-1)
    if theta.numel() == 0:
        return finite
    support: Any = prior.support
    return finite & support.check(torch.nan_to_num(theta))


def parameter_names(prior: Distribution) -> tuple[str, ...]:
    """The prior's own parameter names, else `theta_1, theta_2, ...`."""
    dim = prior.event_shape[0]
    names = getattr(prior, "names", None)
    return tuple(map(str, names)) if names is not None and len(names) == dim else _default_names(dim)


def _default_names(dim: int) -> tuple[str, ...]:
    return tuple(f"theta_{i + 1}" for i in range(dim))
