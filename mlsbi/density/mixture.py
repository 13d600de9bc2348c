r"""A weighted mixture of trained densities, which is used as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.standardise import Standardiser

__all__ = ["DensityMixture", "Network"]


class DensityMixture(nn.Module):
    r"""The mixture :math:`\sum_c w_c q_c(input | condition)` of densities with the same scalers.

    It is evaluated, sampled, saved and moved like one of its parts. Parts of weight 0 are kept and not evaluated.

    Args:
        parts: The densities.
        weights: One each, scaled to a sum of 1; equal ones when left out.

    Raises:
        ValueError: If there is not one weight a part, or one is negative, or all are 0.

    Example:
        >>> from mlsbi.density.flows import MAF
        >>> scalers = [Standardiser(torch.zeros(dim), torch.ones(dim)) for dim in (1, 2)]
        >>> parts = [ConditionalDensity(MAF(), *scalers) for _ in range(3)]
        >>> mixture = DensityMixture(parts, [0.5, 0.5, 0.0])
        >>> mixture.log_prob(torch.zeros(4, 1), torch.zeros(4, 2)).shape, mixture.sample(5, torch.zeros(4, 2)).shape
        (torch.Size([4]), torch.Size([5, 4, 1]))
    """

    weights: Tensor

    def __init__(self, parts: Sequence[ConditionalDensity], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        given = [1.0] * len(parts) if weights is None else weights
        found = torch.tensor(given, dtype=torch.float64, device=parts[0].input_scaler.mean.device)
        if len(found) != len(parts) or not bool((found >= 0).all()) or not 0 < float(found.sum()) < torch.inf:
            raise ValueError(f"Expected {len(parts)} weights of at least 0, not all of them 0; got {list(given)}.")
        self.register_buffer("weights", found / found.sum())
        self.train(parts[0].training)

    @property
    def input_scaler(self) -> Standardiser:
        """Standardiser of the input."""
        return self.part(0).input_scaler

    @property
    def condition_scaler(self) -> Standardiser:
        """Standardiser of the condition."""
        return self.part(0).condition_scaler

    def standard_log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of rows standardised beforehand, in standardised units, shape `(n,)`."""
        return self._mix([part.standard_log_prob(input, condition) for part in self._used])

    def embed(self, condition: Tensor) -> Tensor:
        """What the densities read of conditions `(B, ...)`, side by side, shape `(B, k)`."""
        return torch.cat([part.embed(condition) for part in self._used], 1)

    def log_prob_embedded(self, input: Tensor, embedded: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given embedded conditions `(n, k)`, shape `(n,)`."""
        used = self._used
        shares = embedded.split(embedded.shape[1] // len(used), 1)
        return self._mix([part.log_prob_embedded(input, own) for part, own in zip(used, shares, strict=True)])

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given `condition` (n, ...), shape `(n,)`."""
        return self._mix([part.log_prob(input, condition) for part in self._used])

    def sample(self, n: int, condition: Tensor) -> Tensor:
        """Draws `(n, B, dim)` given `condition` (B, ...), each from a part of its own choice; torch's global state."""
        weights = self.weights[self.weights > 0].cpu()
        chosen = torch.multinomial(weights, n * len(condition), replacement=True).reshape(n, -1, 1)
        chosen = chosen.to(condition.device)
        drawn = self._used[0].sample(n, condition)
        for index, part in enumerate(self._used[1:], start=1):
            drawn = torch.where(chosen == index, part.sample(n, condition), drawn)
        return drawn

    def become(self, other: DensityMixture) -> None:
        """Takes over another mixture's parts and weights."""
        self.parts, self.weights = other.parts, other.weights
        self.train(other.training)

    def part(self, index: int) -> ConditionalDensity:
        """One of the densities."""
        found = self.parts[index]
        assert isinstance(found, ConditionalDensity)
        return found

    @property
    def _used(self) -> list[ConditionalDensity]:
        return [self.part(index) for index, weight in enumerate(self.weights.tolist()) if weight > 0]

    def _mix(self, values: Sequence[Tensor]) -> Tensor:
        if len(values) == 1:
            return values[0]
        log_weights = self.weights[self.weights > 0].log().to(values[0].dtype)
        return (torch.stack(tuple(values)) + log_weights[:, None]).logsumexp(0)


Network: TypeAlias = ConditionalDensity | DensityMixture
"""What estimators train and posteriors evaluate."""
