r"""What the property tests share."""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Generator, Tensor
from torch.distributions import Distribution, Independent, Normal

from mlsbi.levels import Level, LevelStack
from mlsbi.priors import BoxPrior
from theory_checks.coordinates import Estimator
from theory_checks.poincare import logistic, normal, product, uniform

__all__ = ["known_constants", "normal_prior_of", "properties", "two_levels"]

_THOROUGH = 10


def properties(number: int) -> settings:
    """So many examples, or ten times as many under HYPOTHESIS_PROFILE=thorough, each as long as it takes."""
    thorough = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
    return settings(max_examples=number * (_THOROUGH if thorough else 1), deadline=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def known_constants(stack: LevelStack, estimator: Estimator) -> dict[str, Any]:
    """Poincaré constants of a generated stack, from what it was made of instead of from its draws."""
    columns: Any = stack.noise
    noise = product([uniform(0.0, 1.0) if law == "uniform" else normal() for law in columns.columns])
    prior: Any = stack.prior
    if isinstance(prior, BoxPrior):
        laws = [logistic() if estimator == "npe" else uniform(low, high)
                for low, high in zip(prior.low.tolist(), prior.high.tolist(), strict=True)]
    else:
        laws = [normal(scale) for scale in prior.base_dist.scale.tolist()]
    return {"theta_constant": product(laws).constant, "noise_constant": noise.constant}


def normal_prior_of(dim: int) -> Distribution:
    """Standard normal theta."""
    return Independent(Normal(torch.zeros(dim), torch.ones(dim)), 1)


def two_levels(gap: float) -> LevelStack:
    """The sum of theta and noise, and below it the same plus `gap` times a perturbation."""

    def cheap(theta: Tensor, noise: Tensor) -> Tensor:
        return theta + noise + gap * (1 + theta - 2 * noise)

    def dear(theta: Tensor, noise: Tensor) -> Tensor:
        return theta + noise

    def draw(n: int, generator: Generator) -> Tensor:
        return torch.randn(n, 1, generator=generator)

    return LevelStack(normal_prior_of(1), draw, [Level("cheap", cheap, 1.0), Level("dear", dear, 10.0)])
