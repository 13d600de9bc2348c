r"""Likelihoods as functions of outputs and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.density.mixture import Network
from mlsbi.inference.observations import describe, read_observations
from mlsbi.priors import Unbounded, check_theta
from mlsbi.randomness import child_seed, seeded

__all__ = ["NeuralLikelihood"]

_CHUNK = 1 << 16  # rows evaluated at once


class NeuralLikelihood:
    r"""The mixture of an ensemble of densities q(x | theta) of one output.

    Args:
        networks: Trained densities of flattened x given theta, all of one device.
        prior: The prior of theta.
        x_shape: Shape of one output.
    """

    def __init__(
        self, networks: Sequence[Network], prior: Distribution, x_shape: tuple[int, ...]
    ) -> None:
        self.networks = tuple(networks)
        self.prior = prior
        self.x_shape = x_shape
        self._unbounded = Unbounded(prior)

    def __call__(self, x: Tensor, theta: Tensor) -> Tensor:
        """Log densities `(n,)` of outputs x `(n, ...)`, each given its theta `(n, D)`.

        Differentiable and unchecked. Arguments and result are on the CPU, wherever the networks are.
        """
        features = self._unbounded.features(theta).to(self._device)
        rows = x.flatten(1).to(self._device)
        members = torch.stack([network.log_prob(rows, features) for network in self.networks])
        mixture = members.logsumexp(0) - np.log(len(self.networks)) if len(members) > 1 else members[0]
        return mixture.cpu()

    @torch.no_grad()
    def log_prob(self, x: Any, theta: Any) -> Tensor:
        """Log densities `(n,)` of outputs x `(n, ...)`, each given its theta `(n, D)`.

        Raises:
            ValueError: If shapes do not fit, or theta is outside the prior's support.
        """
        outputs, parameters = read_observations(x, self.x_shape), self._parameters(theta)
        if len(outputs) != len(parameters):
            raise ValueError(f"Expected as many outputs as theta; got {len(outputs)} and {len(parameters)}.")
        chunks = zip(outputs.split(_CHUNK), parameters.split(_CHUNK), strict=True)
        return torch.cat([self(*chunk) for chunk in chunks])

    @torch.no_grad()
    def sample(self, theta: Any, seed: int | None = None) -> Tensor:
        """One output per theta `(n, D)`, shape `(n, ...)`: a fast stand-in for the simulator."""
        parameters = self._parameters(theta)
        features = self._unbounded.features(parameters).to(self._device)
        with seeded(child_seed(seed), self._device):
            member = torch.randint(len(self.networks), (len(features),))
            scaler = self.networks[0].input_scaler
            drawn = torch.empty(len(features), scaler.mean.numel(), dtype=scaler.dtype)
            for index, network in enumerate(self.networks):
                own = (member == index).nonzero()[:, 0]
                if len(own):
                    drawn[own] = network.sample(1, features[own.to(features.device)])[0].cpu()
        return drawn.reshape(-1, *self.x_shape)

    @property
    def _device(self) -> torch.device:
        return self.networks[0].input_scaler.mean.device

    def _parameters(self, theta: Any) -> Tensor:
        parameters = torch.as_tensor(theta, dtype=torch.get_default_dtype()).cpu()
        check_theta(self.prior, parameters, where="the arguments")
        return parameters

    def __repr__(self) -> str:
        return f"NeuralLikelihood(x of shape {describe('n', self.x_shape)}; {len(self.networks)} networks)"
