r"""A stack's levels as functions of the estimator's own coordinates z = (theta, noise)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mlsbi.levels import LevelStack, map_noise
from mlsbi.priors import Unbounded
from mlsbi.randomness import child_seed
from mlsbi.simulation.seeding import RowSource

__all__ = ["Coordinates", "Estimator", "Points", "SimulatorProblem"]

Estimator: TypeAlias = Literal["npe", "nle"]


class SimulatorProblem(Exception):
    """A level cannot be evaluated at valid rows; the message names the level and what happened."""


@dataclass(frozen=True)
class Points:
    r"""Rows in the estimator's own coordinates.

    Args:
        theta: Parameters as the density reads them, shape `(n, D)`, float64.
        noise: The noise tree; what is continuous in it is float64.
    """

    theta: Tensor
    noise: Any

    def __len__(self) -> int:
        return len(self.theta)

    def rows(self, index: Any) -> Points:
        """The rows that `index` picks."""
        return Points(self.theta[index], map_noise(lambda leaf: leaf[index], self.noise))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Theta, then every continuous tensor of the noise: what can be differentiated in."""
        found: list[Tensor] = []
        map_noise(found.append, self.noise)
        return (self.theta, *(leaf for leaf in found if leaf.is_floating_point()))

    @property
    def dim(self) -> int:
        """How many coordinates z has."""
        return sum(leaf[0].numel() for leaf in self.leaves)

    def replace(self, leaves: Sequence[Tensor]) -> Points:
        """The same rows with other leaves."""
        rest = iter(leaves[1:])
        return Points(leaves[0], map_noise(lambda leaf: next(rest) if leaf.is_floating_point() else leaf, self.noise))

    def moved(self, by: Tensor) -> Points:
        """The rows moved by `(n, dim)` in z."""
        shifted, start = [], 0
        for leaf in self.leaves:
            size = leaf[0].numel()
            shifted.append(leaf + by[:, start:start + size].reshape(leaf.shape))
            start += size
        return self.replace(shifted)

    def flat(self) -> Tensor:
        """The rows of z, `(n, dim)`."""
        return torch.cat([leaf.reshape(len(leaf), -1) for leaf in self.leaves], 1)


@dataclass(frozen=True)
class Coordinates:
    r"""What an estimator sees of a stack: levels as functions of z = (theta, noise).

    A posterior's density (`"npe"`) lives in unbounded theta, which maps a box by its logit; a likelihood (`"nle"`)
    reads theta inside a box as it is. Bounds that are stated in theta hold in these coordinates only (METHOD 4).

    Args:
        stack: Prior, noise and levels.
        estimator: `"npe"` or `"nle"`.
        precision: What simulators are given; rows are drawn, and outputs read, in float64.

    Raises:
        ValueError: If the estimator is neither.
    """

    stack: LevelStack
    estimator: Estimator = "npe"
    precision: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if self.estimator not in ("npe", "nle"):
            raise ValueError(f'Expected estimator "npe" or "nle"; got {self.estimator!r}.')

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return int(self.stack.prior.event_shape[0])

    def draw(self, n: int, *, seed: int, stream: int = 0, start: int = 0) -> Points:
        """Draws n rows, from row `start` on; a larger n extends a smaller one."""
        theta, noise = RowSource(self.stack, seed=child_seed(seed, stream), stream=0).rows(start, start + n)
        exact = map_noise(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, noise)
        return Points(self.read(theta), exact)

    def read(self, theta: Tensor) -> Tensor:
        """Parameters `(n, D)` in the estimator's coordinates, float64, from those that simulators read."""
        unbounded = Unbounded(self.stack.prior)
        return unbounded.to(theta.double()) if self.estimator == "npe" else unbounded.features(theta.double())

    def parameters(self, theta: Tensor) -> Tensor:
        """Parameters as simulators read them, from the estimator's coordinates."""
        unbounded = Unbounded(self.stack.prior)
        # A likelihood reads a box as it is: then features(theta) is theta, and nothing is to be undone.
        if self.estimator == "nle" and unbounded.features(theta) is theta:
            return theta
        return unbounded.back(theta)

    def simulate(self, level: int, points: Points) -> Tensor:
        r"""Runs a level.

        Returns:
            Its outputs `(n, ...)` in float64.

        Raises:
            SimulatorProblem: If it raises, or gives another shape than one output a row.
        """
        own = self.stack.levels[level]
        # Copies: what a simulator does to its inputs stays there.
        theta = self.parameters(points.theta).to(self.precision, copy=True)
        noise = map_noise(lambda leaf: leaf.to(self.precision, copy=True) if leaf.is_floating_point() else leaf.clone(),
                          points.noise)
        try:
            x = own.run(theta, noise)
            if x.is_complex():
                raise TypeError("expected real outputs; got complex ones")
            x = x.double()
        except Exception as error:
            raise SimulatorProblem(f"level '{own.name}' raised {type(error).__name__}: "
                                   f"{' '.join(str(error).split())}") from error
        if x.ndim < 2 or len(x) != len(points):
            raise SimulatorProblem(f"level '{own.name}' gave shape {tuple(x.shape)} for {len(points)} rows; expected "
                                   f"({len(points)}, ...), with an axis of outputs")
        return x

    def function(self, level: int, points: Points) -> Callable[..., Tensor]:
        """The level as a function of the leaves of these rows, its outputs flattened to `(n, d)`."""
        return lambda *leaves: self.simulate(level, points.replace(leaves)).flatten(1)
