r"""A density with its standardisers and embedding: what is trained, saved and sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlsbi.density.flows import DensityBuilder
from mlsbi.density.standardise import Standardiser

__all__ = ["ConditionalDensity"]


class ConditionalDensity(nn.Module):
    r"""q(input | condition) in the caller's units, with all fixed scaling inside.

    Args:
        builder: Builds the density of standardised inputs.
        input_scaler: Standardiser of the input, rows `(dim,)`.
        condition_scaler: Standardiser of the condition, rows of any shape.
        embedding: Network from standardised conditions `(n, ...)` to vectors `(n, k)`; flattening when left out.

    Raises:
        ValueError: If the embedding does not return one vector per row.
    """

    density: Any  # an nn.Module with the two methods that a `DensityBuilder` promises

    def __init__(
        self,
        builder: DensityBuilder,
        input_scaler: Standardiser,
        condition_scaler: Standardiser,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.input_scaler = input_scaler
        self.condition_scaler = condition_scaler
        self.embedding: nn.Module = embedding if embedding is not None else nn.Flatten()
        with torch.no_grad():
            vector = self.embedding(torch.zeros(2, *condition_scaler.mean.shape))
        if vector.ndim != 2 or len(vector) != 2:
            raise ValueError(f"Expected the embedding to return vectors (n, k); two rows gave {tuple(vector.shape)}.")
        self.density = builder(input_scaler.mean.numel(), vector.shape[1])

    def standard_log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of rows standardised beforehand, in standardised units, shape `(n,)`."""
        return self.density.log_prob(input, self.embedding(condition))

    def embed(self, condition: Tensor) -> Tensor:
        """What the density reads of conditions `(B, ...)`, shape `(B, k)`; compute it once for many inputs."""
        return self.embedding(self.condition_scaler(condition))

    def log_prob_embedded(self, input: Tensor, embedded: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given embedded conditions `(n, k)`, shape `(n,)`."""
        return self.density.log_prob(self.input_scaler(input), embedded) - self.input_scaler.log_scale

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given `condition` (n, ...), shape `(n,)`."""
        return self.log_prob_embedded(input, self.embed(condition))

    def sample(self, n: int, condition: Tensor) -> Tensor:
        """Draws `(n, B, dim)` given `condition` (B, ...), from torch's global random state."""
        return self.input_scaler.inverse(self.density.sample(n, self.embed(condition)))
