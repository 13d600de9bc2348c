r"""Posteriors that are sampled and evaluated directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.density.mixture import Network
from mlsbi.inference.ascent import climb
from mlsbi.inference.observations import read_length, read_observation, read_observations, read_theta
from mlsbi.priors import Unbounded, in_support, parameter_names
from mlsbi.randomness import child_seed, seeded

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DirectPosterior"]

_CHUNK = 1 << 16  # parameter rows evaluated at once
_EMBED_CHUNK = 1024  # observations embedded at once


class DirectPosterior:
    r"""The mixture of an ensemble of densities q(theta | x), inside the prior's support by construction.

    Args:
        networks: Trained densities of unbounded theta given x, all of one device.
        prior: The prior.
        x: Default observation, shape `(...)` or `(1, ...)`.

    Raises:
        ValueError: If the observation does not have the shape of the training outputs, or is not finite.
    """

    def __init__(self, networks: Sequence[Network], prior: Distribution, x: Any = None) -> None:
        self.networks = tuple(networks)
        self.prior = prior
        self._unbounded = Unbounded(prior)
        self._x_shape = tuple(self.networks[0].condition_scaler.mean.shape)
        self.x: Tensor | None = None if x is None else read_observation(x, self._x_shape)

    @property
    def _device(self) -> torch.device:
        return self.networks[0].condition_scaler.mean.device

    @property
    def members(self) -> tuple[DirectPosterior, ...]:
        """One posterior for each network of the ensemble, with the same default observation."""
        return tuple(DirectPosterior([network], self.prior, self.x) for network in self.networks)

    def set_default_x(self, x: Any) -> DirectPosterior:
        """Sets the observation that calls without `x` use; returns the posterior."""
        self.x = read_observation(x, self._x_shape)
        return self

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = (1,), x: Any = None, seed: int | None = None) -> Tensor:
        r"""Draws from the posterior of one observation.

        Args:
            sample_shape: `(n,)`.
            x: Observation, shape `(...)` or `(1, ...)`; the default one when left out.
            seed: Seed of the draws; a fresh one when left out. Torch's global random state is left as found.

        Returns:
            Parameters, shape `(n, D)`.
        """
        return self.sample_batched(sample_shape, self._observation(x), seed=seed)[:, 0]

    @torch.no_grad()
    def sample_batched(self, sample_shape: Sequence[int], x: Any, seed: int | None = None) -> Tensor:
        """Draws `(n, B, D)` given observations x of shape `(B, ...)`."""
        n = read_length(sample_shape)
        batch = self._many(x)
        with seeded(child_seed(seed), self._device):
            # How many draws each member gives is random: the ensemble is a mixture.
            members = torch.randint(len(self.networks), (n,)).bincount(minlength=len(self.networks)).tolist()
            drawn = []
            for network, count in zip(self.networks, members, strict=True):
                step = max(1, _CHUNK // len(batch))
                for start in range(0, count, step):
                    drawn.append(network.sample(min(step, count - start), batch).cpu())
            z = torch.cat(drawn)
            z = z[torch.randperm(n)]
        return self._unbounded.back(z)

    @torch.no_grad()
    def log_prob(self, theta: Any, x: Any = None) -> Tensor:
        """Normalised log density of theta `(n, D)` or `(D,)`, shape `(n,)`; `-inf` outside the prior's support."""
        points = torch.as_tensor(theta, dtype=torch.get_default_dtype())
        points = points[None] if points.ndim == 1 else points
        return self.log_prob_batched(points[:, None], self._observation(x))[:, 0]

    @torch.no_grad()
    def log_prob_batched(self, theta: Any, x: Any) -> Tensor:
        """Log density of theta `(n, B, D)` (or `(1, B, D)`, `(n, 1, D)`) given x `(B, ...)`, shape `(n, B)`."""
        batch = self._many(x)
        dim = self.prior.event_shape[0]
        points = read_theta(theta, len(batch), dim)
        flat = points.reshape(-1, dim)
        inside = in_support(self.prior, flat)
        result = torch.full((len(flat),), -torch.inf, dtype=self.networks[0].input_scaler.dtype)
        rows = inside.nonzero()[:, 0]
        embedded = self._embed(batch)
        for chunk in rows.split(_CHUNK) if len(rows) else ():
            result[chunk] = self._log_prob_rows(flat[chunk], embedded, chunk % len(batch)).to(result.dtype)
        return result.reshape(points.shape[:2])

    def _embed(self, x: Tensor) -> list[Tensor]:
        """What each network reads of the observations, computed once however many theta follow."""
        parts = [[network.embed(chunk) for chunk in x.split(_EMBED_CHUNK)] for network in self.networks]
        return [torch.cat(part) for part in parts]

    def _log_prob_rows(self, theta: Tensor, embedded: Sequence[Tensor], at: Tensor) -> Tensor:
        """Mixture log density of theta `(n, D)`, each given the observation that `at` (n,) names."""
        z = self._unbounded.to(theta)
        index = at.to(self._device)
        members = torch.stack([
            network.log_prob_embedded(z.to(seen), seen[index])
            for network, seen in zip(self.networks, embedded, strict=True)
        ])
        mixture = members.logsumexp(0) - np.log(len(self.networks))
        return mixture.cpu() - self._unbounded.log_abs_det(z, theta)

    def log_normaliser(self, x: Any, *, draws: Tensor | None = None, seed: int = 0) -> Tensor:
        """Log of the integral of the density that `log_prob_batched` gives, shape `(B,)`: zero."""
        return torch.zeros(len(self._many(x)))

    def map(self, x: Any = None, *, seed: int = 0, draws: int = 2000, steps: int = 200) -> Tensor:
        r"""The parameters of highest posterior density, shape `(D,)`.

        Args:
            x: Observation; the default one when left out.
            seed: Seed of the starting points.
            draws: Posterior draws, of which the best 16 start an ascent.
            steps: Steps of the ascent.
        """
        batch = self._observation(x)
        theta = self.sample((draws,), batch, seed=seed)
        best = self.log_prob(theta, batch).topk(min(16, draws)).indices
        start = theta[best]
        with torch.no_grad():
            embedded = self._embed(batch)
        at = torch.zeros(len(start), dtype=torch.long)
        found = climb(lambda z: self._log_prob_rows(self._unbounded.back(z), embedded, at), self._unbounded.to(start),
                      steps=steps)
        candidates = torch.cat([start, self._unbounded.back(found)])  # there and back may round a point out of a box
        return candidates[self.log_prob(candidates, batch).argmax()]

    def to_frame(self, n: int = 1000, x: Any = None, seed: int | None = None) -> pd.DataFrame:
        """Draws as a table with one named column per parameter."""
        import pandas as pd  # slow to import, and little else here needs it

        return pd.DataFrame(self.sample((n,), x, seed).numpy(), columns=list(parameter_names(self.prior)))

    def _observation(self, x: Any) -> Tensor:
        if x is None:
            if self.x is None:
                raise ValueError("No observation: pass x, or set one with posterior.set_default_x(x_o).")
            return self._many(self.x)
        return self._many(read_observation(x, self._x_shape))

    def _many(self, x: Any) -> Tensor:
        return read_observations(x, self._x_shape).to(self._device)

    def __repr__(self) -> str:
        given = "no observation set" if self.x is None else f"given x of shape {self._x_shape}"
        return f"DirectPosterior({', '.join(parameter_names(self.prior))}; {len(self.networks)} networks; {given})"

