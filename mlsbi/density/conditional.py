r"""A density with its standardisers and embedding: what is trained, saved and sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlsbi.density.registry import DensityBuilder
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
        self.density = builder(input_scaler.mean.numel(), _embedded_length(self.embedding, condition_scaler.mean.shape))

    def shared_axes(self, *, of_outputs: bool) -> tuple[int, ...]:
        """Axes of one simulator output along which its features are scaled alike; outputs are inputs or conditions."""
        return self.input_scaler.shared if of_outputs else self.condition_scaler.shared

    def standard_log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of rows standardised beforehand, in standardised units, shape `(n,)`."""
        return self.density.log_prob(input, self.embedding(condition))

    def embed(self, condition: Tensor) -> Tensor:
        """What the density reads of conditions `(B, ...)`, shape `(B, k)`; compute it once for many inputs."""
        return self.embedding(self.condition_scaler(condition))

    def log_prob_embedded(self, input: Tensor, embedded: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given embedded conditions `(n, k)`, shape `(n,)`."""
        return self.density.log_prob(self.input_scaler(input), embedded) + self.input_scaler.log_abs_det(input)

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given `condition` (n, ...), shape `(n,)`."""
        return self.log_prob_embedded(input, self.embed(condition))

    def sample(self, n: int, condition: Tensor) -> Tensor:
        """Draws `(n, B, dim)` given `condition` (B, ...), from torch's global random state."""
        return self.input_scaler.inverse(self.density.sample(n, self.embed(condition)))


@torch.no_grad()
def _embedded_length(embedding: nn.Module, shape: torch.Size) -> int:
    """Length of an embedding's vectors, the same for two rows and for three."""
    like = next(embedding.parameters(), torch.empty(0))
    training = embedding.training
    embedding.eval()  # so that zeros leave no trace in batch statistics
    try:
        found = [tuple(embedding(like.new_zeros(rows, *shape)).shape) for rows in (2, 3)]
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"The embedding cannot read rows of shape {tuple(shape)}: {error}") from error
    finally:
        embedding.train(training)
    if any(len(got) != 2 for got in found) or [got[0] for got in found] != [2, 3] or found[0][1] != found[1][1]:
        raise ValueError(f"Expected the embedding to return vectors (n, k), k the same for every n; 2 and 3 rows of "
                         f"shape {tuple(shape)} gave {found[0]} and {found[1]}.")
    return int(found[0][1])
