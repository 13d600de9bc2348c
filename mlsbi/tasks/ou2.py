r"""Ornstein-Uhlenbeck process from a random start: ten points of a path, and low levels that can be made worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.distributions import Normal

from mlsbi.density.flows import NSF
from mlsbi.levels import Level, LevelStack
from mlsbi.priors import BoxPrior
from mlsbi.tasks.observations import check_matching, read_observations
from mlsbi.tasks.quadrature import draw_truncated, legendre, log_mass
from mlsbi.tasks.task import Task

__all__ = ["OU2Posterior", "build", "euler", "gaussian", "log_likelihood", "noise"]

STEP = 0.1
POINTS = 10
GAP = 10
"""Steps from one observed point to the next: X_0, X_10, ..., X_90 are observed."""

_STEPS = GAP * (POINTS - 1)
_NAMES = ("mu", "sigma", "gamma", "offset")
_LOW = (0.1, 0.1, 0.1, 0.0)
_HIGH = (3.0, 0.6, 1.0, 4.0)
_FIXED = {"gamma": 0.5, "offset": 3.0}  # where they are not inferred
_DRAW_NODES = (128, 384, 48)  # values of sigma, gamma and offset of the density that is drawn from
_BATCH = 500_000  # quadrature nodes evaluated together, 4 MB an array


def build(
    parameters: Literal[2, 3, 4] = 2,
    low: Literal["gaussian", "ou"] = "gaussian",
    extra_noise: float = 0.0,
    *,
    reverse: bool = False,
) -> Task:
    r"""The task "ou2".

    .. math:: dX = \gamma (\mu - X) dt + \sigma dW, \qquad X_0 \sim N(\mu + \text{offset}, 1)

    High level: Euler steps of 0.1, seen at X_0, X_10, ..., X_90; the ten steps that are left to X_100 are not run.
    Low level: ten independent draws of :math:`N(\mu, \sigma^2)`, which ignore gamma and the offset, or the high level
    itself. It is made worse on purpose to study when cheap simulations help: more noise takes away information, and
    the reverse order keeps all of it but says it in another way.

    Costs are declared, not measured: 1 and 100, also where the low level is a path.

    Args:
        parameters: 2 infers mu and sigma, with gamma = 0.5 and offset = 3; 3 infers gamma too, and 4 the offset.
        low: "gaussian" for the independent draws, coupled by the sum of the ten normals between two points. "ou" for
            the Euler path with the high level's noise: without the next two options both levels are the same.
        extra_noise: Added to the low level's sigma.
        reverse: Whether the low level's ten outputs come in reverse order.

    Raises:
        ValueError: If an option has another value, or `extra_noise` is not a finite number of at least 0.
    """
    if not isinstance(parameters, int) or parameters not in (2, 3, 4):
        raise ValueError(f"Expected parameters=2, 3 or 4 for task 'ou2'; got {parameters!r}.")
    if low not in ("gaussian", "ou"):
        raise ValueError(f"Expected low='gaussian' or low='ou' for task 'ou2'; got {low!r}.")
    if isinstance(extra_noise, bool) or not isinstance(extra_noise, int | float) or not 0 <= extra_noise < math.inf:
        raise ValueError(f"Expected a finite number of at least 0 as extra_noise for task 'ou2'; got {extra_noise!r}.")
    if not isinstance(reverse, bool):
        raise ValueError(f"Expected reverse=True or reverse=False for task 'ou2'; got {reverse!r}.")
    name, simulate = ("gaussian", gaussian) if low == "gaussian" else ("low euler", euler)
    prior = BoxPrior(_LOW[:parameters], _HIGH[:parameters], names=_NAMES[:parameters])
    stack = LevelStack(
        prior=prior,
        noise=noise,
        levels=[
            Level(name, partial(_perturbed, simulate=simulate, extra=float(extra_noise), reverse=reverse), cost=1.0),
            Level("euler", euler, cost=100.0),
        ],
    )
    return Task.from_stack(
        "ou2",
        stack,
        title="Ornstein-Uhlenbeck process from a random start, seen at ten times, with low levels of any quality.",
        budgets=((10_000, 50), (10_000, 100), (10_000, 1000)),
        density=NSF(transforms=5, hidden=50, bins=8),
        reference=OU2Posterior(prior),
        likelihood=log_likelihood,
        x_names=("time",),
        x_axis=tuple(STEP * GAP * point for point in range(POINTS)),
        citation="Krouglova, Johnson, Confavreux, Deistler, Goncalves, Multifidelity simulation-based inference for "
        "computationally expensive simulators, ICLR 2026, arXiv 2502.08416",
    )


def noise(n: int, generator: Generator) -> Tensor:
    """Standard normals, shape `(n, 91)`: one for X_0 and one per step to X_90."""
    return torch.randn(n, 1 + _STEPS, generator=generator)


def euler(theta: Tensor, noise: Tensor, *, extra: float = 0.0) -> Tensor:
    """Euler path at the observed points, shape `(n, 10)`, with `extra` added to sigma."""
    mu, sigma, gamma, offset = _all_four(theta)
    decay = 1 - gamma * STEP
    # (steps, n): a step is one run.
    kicks = ((sigma + extra) * math.sqrt(STEP)) * noise[:, 1:].T.contiguous() + gamma * mu * STEP
    x = mu + offset + noise[:, 0]
    observed = [x]
    for step, kick in enumerate(kicks, 1):
        x = decay * x + kick
        if step % GAP == 0:
            observed.append(x)
    return torch.stack(observed, 1)


def gaussian(theta: Tensor, noise: Tensor, *, extra: float = 0.0) -> Tensor:
    """Independent normals of mean mu and sd sigma + `extra`, shape `(n, 10)`; other parameters are ignored.

    The first reads the normal of X_0, the others the standardised sum of the ten steps' normals before their point.
    """
    mu, sigma = theta[:, 0:1], theta[:, 1:2]
    steps = noise[:, 1:].reshape(-1, POINTS - 1, GAP).sum(2) / math.sqrt(GAP)
    return mu + (sigma + extra) * torch.cat([noise[:, :1], steps], 1)


def log_likelihood(x: Tensor, theta: Tensor) -> Tensor:
    r"""Log density of the high level's output, a Gaussian AR(1) chain. Differentiable, float64.

    Args:
        x: Outputs, shape `(n, 10)`, or `(10,)` for one that all theta share.
        theta: Parameters, shape `(n, D)` with D = 2, 3 or 4, or `(1, D)`.

    Returns:
        Log densities `(n,)`.

    Raises:
        ValueError: If x has another shape.

    Example:
        >>> log_likelihood(torch.ones(10), torch.tensor([[1.0, 0.3, 0.5, 0.0]]))
        tensor([3.5301], dtype=torch.float64)
    """
    x = read_observations(x, POINTS)
    mu, sigma, gamma, offset = (column[:, None] for column in _all_four(theta.double()))
    weight, variance = _transition(gamma)
    start = Normal(mu + offset, 1.0, validate_args=False).log_prob(x[:, :1])
    mean = mu + weight * (x[:, :-1] - mu)
    return start[:, 0] + Normal(mean, sigma * variance.sqrt(), validate_args=False).log_prob(x[:, 1:]).sum(1)


@dataclass(frozen=True)
class OU2Posterior:
    r"""Exact posterior of the high level, by a closed form in mu and quadrature over what else is inferred.

    At given sigma, gamma and offset the ten points are linear in mu with Gaussian errors, so that mu is integrated over
    its prior interval in closed form. The others take Gauss-Legendre nodes over all of theirs. For prior draws the log
    evidence is within 1e-12 of that with twice as many nodes.

    `sample` draws sigma, gamma and offset from the density interpolated linearly between even grid values, and mu from
    its conditional. That widens a marginal's variance by at most 1% for prior draws, and by 0.2% at most for the median
    one.

    All work is in float64.

    Args:
        prior: The task's prior, over two to four parameters.
        nodes: Quadrature nodes for sigma, gamma and offset.
    """

    prior: BoxPrior
    nodes: tuple[int, int, int] = (64, 96, 12)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log of the likelihood's mean over the prior `(n,)` at each observation of x `(n, 10)`, float64."""
        x = read_observations(x, POINTS)
        axes, log_weight = self._grid(self.nodes, legendre)
        parts = [
            (self._log_marginal(rows[:, None, None, None], *axes) + log_weight).flatten(1).logsumexp(1)
            for rows in x.split(max(1, _BATCH // log_weight.numel()))
        ]
        low, high = self._interval(0)
        return torch.cat(parts) - math.log(high - low)

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        r"""Normalised posterior log density at matching rows, float64.

        Args:
            theta: Parameters, shape `(n, D)`.
            x: Observations, shape `(n, 10)`, or `(10,)` for one that all theta share.

        Returns:
            Log densities `(n,)`, `-inf` outside the prior.

        Raises:
            ValueError: If theta or x have other shapes.
        """
        x = read_observations(x, POINTS)
        check_matching(self.prior, theta, x)
        log_prior = self.prior.log_prob(theta).double()
        log_prob = log_likelihood(x, theta) + log_prior - self.log_evidence(x)
        return torch.where(torch.isfinite(log_prior), log_prob, -torch.inf)

    def sample(self, n: int, x: Tensor, seed: int) -> Tensor:
        """Independent posterior draws `(n, D)` at one observation x `(10,)`, in the prior's dtype."""
        x = read_observations(x, POINTS)
        if len(x) != 1:
            raise ValueError(f"Expected one observation of shape ({POINTS},); got {len(x)}.")
        generator = torch.Generator().manual_seed(seed)
        axes, log_weight = self._grid(_DRAW_NODES, _trapezoid)
        probability = (self._log_marginal(x, *axes) + log_weight).flatten().softmax(0)
        chosen = torch.multinomial(probability, n, replacement=True, generator=generator)
        index = torch.unravel_index(chosen, log_weight.shape)
        others = [_interpolated(axis.flatten(), i, generator) for axis, i in zip(axes, index, strict=True)]
        mean, sd, _ = _mu_given(x, *others)
        mu = draw_truncated(mean, sd, *self._interval(0), generator)
        draws = torch.stack([mu, *others], 1)[:, : len(self.prior.low)].to(self.prior.low.dtype)
        # A draw rounded to the prior's dtype may step over an edge by one unit in the last place.
        return torch.minimum(torch.maximum(draws, self.prior.low), self.prior.high)

    def _interval(self, index: int) -> tuple[float, float]:
        return float(self.prior.low[index]), float(self.prior.high[index])

    def _grid(self, counts: Sequence[int], rule: Callable[[int], tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
        """Values of sigma, gamma and offset, each along an axis of its own, and the log weights of their product grid.

        `rule` gives nodes and weights on [0, 1]. What is not inferred has one value.
        """
        axes, log_weight = [], torch.zeros(1, 1, 1, dtype=torch.float64)
        for index, count in enumerate(counts, 1):
            shape = [-1 if axis == index else 1 for axis in (1, 2, 3)]
            if index < len(self.prior.low):
                low, high = self._interval(index)
                unit, weight = rule(count)
                log_weight = log_weight + weight.log().reshape(shape)
                axes.append((low + (high - low) * unit).reshape(shape))
            else:
                axes.append(torch.full((1, 1, 1), _FIXED[_NAMES[index]], dtype=torch.float64))
        return axes, log_weight

    def _log_marginal(self, x: Tensor, sigma: Tensor, gamma: Tensor, offset: Tensor) -> Tensor:
        """Log of the likelihood integrated over mu in its prior interval; x is `(..., 10)`, the rest `(...)`."""
        mean, sd, log_peak = _mu_given(x, sigma, gamma, offset)
        return log_peak + sd.log() + math.log(2 * math.pi) / 2 + log_mass(*self._interval(0), mean, sd)


def _mu_given(x: Tensor, sigma: Tensor, gamma: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and sd of mu at given others, had it no prior, and the log likelihood at that mean."""
    weight, variance = _transition(gamma)
    slope, variance = 1 - weight, sigma**2 * variance
    rest = x[..., 1:] - weight[..., None] * x[..., :-1]  # the chain says rest = slope mu + noise
    average = rest.mean(-1)
    scatter = (rest - average[..., None]).square().sum(-1)
    transitions = POINTS - 1
    precision = 1 + transitions * slope**2 / variance
    mean = (x[..., 0] - offset + transitions * slope * average / variance) / precision
    misfit = (scatter + transitions * (average - slope * mean) ** 2) / variance + (x[..., 0] - offset - mean) ** 2
    log_peak = -(misfit + transitions * variance.log() + POINTS * math.log(2 * math.pi)) / 2
    return mean, precision.rsqrt(), log_peak


def _perturbed(theta: Tensor, noise: Tensor, *, simulate: Callable[..., Tensor], extra: float, reverse: bool) -> Tensor:
    x = simulate(theta, noise, extra=extra)
    return x.flip(1) if reverse else x


def _all_four(theta: Tensor) -> list[Tensor]:
    """Columns mu, sigma, gamma and offset, each `(n,)`, of theta `(n, D)`."""
    columns = list(theta.unbind(1))
    return columns + [torch.full_like(columns[0], _FIXED[name]) for name in _NAMES[len(columns) :]]


def _transition(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of the point before, and variance over sigma^2, of the step from one observed point to the next."""
    decay = 1 - gamma * STEP
    weight = decay**GAP
    return weight, STEP * (1 - weight**2) / (1 - decay**2)


def _trapezoid(count: int) -> tuple[Tensor, Tensor]:
    """Even nodes and weights of the trapezoidal rule on [0, 1]."""
    weight = torch.full((count,), 1 / (count - 1), dtype=torch.float64)
    weight[[0, -1]] /= 2
    return torch.linspace(0, 1, count, dtype=torch.float64), weight


def _interpolated(grid: Tensor, index: Tensor, generator: Generator) -> Tensor:
    """Draws from the triangles around given points of an even grid, folded inwards at its ends.

    So drawn, the density is linear between points that are chosen with the weights of the trapezoidal rule.
    """
    low, high = grid[0], grid[-1]
    triangle = torch.rand(2, len(index), generator=generator, dtype=grid.dtype).sum(0) - 1
    value = grid[index] + triangle * (high - low) / max(1, len(grid) - 1)
    return high - (high - (low + (value - low).abs())).abs()
