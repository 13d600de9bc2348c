r"""A weighted mixture of trained densities, which is used as one."""

from __future__ import annotations

import copy
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
        network: The first part, and for now the only one.

    Example:
        >>> from mlsbi.density.flows import MAF
        >>> scalers = [Standardiser(torch.zeros(dim), torch.ones(dim)) for dim in (1, 2)]
        >>> mixture = DensityMixture(ConditionalDensity(MAF(), *scalers))
        >>> mixture.grow(3)
        >>> mixture.weigh([0.5, 0.5, 0.0])
        >>> mixture.log_prob(torch.zeros(4, 1), torch.zeros(4, 2)).shape, mixture.sample(5, torch.zeros(4, 2)).shape
        (torch.Size([4]), torch.Size([5, 4, 1]))
    """

    weights: Tensor

    def __init__(self, network: ConditionalDensity) -> None:
        super().__init__()
        self.parts = nn.ModuleList([network])
        self.register_buffer("weights", torch.ones(1, dtype=torch.float64))
        self.train(network.training)

    def grow(self, count: int) -> None:
        """Makes it `count` copies of its first part, of equal weight: parts that start from the same initialisation."""
        first = self.parts[0]
        self.parts = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(count - 1))])
        self.weigh([1.0 / count] * count)

    def weigh(self, weights: Sequence[float]) -> None:
        """Sets the weights, which are scaled to a sum of 1.

        Raises:
            ValueError: If there is not one weight a part, or one is negative, or all are 0.
        """
        found = torch.as_tensor(weights, dtype=torch.float64, device=self.weights.device)
        if found.shape != (len(self.parts),) or not bool((found >= 0).all()) or not 0 < float(found.sum()) < torch.inf:
            raise ValueError(f"Expected {len(self.parts)} weights of at least 0, not all of them 0; got "
                             f"{found.tolist()}.")
        self.weights = found / found.sum()

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
