r"""One z-score for all levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Standardiser"]


class Standardiser(nn.Module):
    r"""Shifts and scales features by fixed numbers, kept as buffers.

    It is fitted once, on rows of all levels together: a standardiser per level would break the telescoping sum.

    Args:
        mean: Shift, the shape of one row.
        scale: Positive scale, same shape.

    Example:
        >>> standardiser = Standardiser.fit([torch.tensor([[0.0, 5.0], [2.0, 5.0]])])
        >>> standardiser(torch.tensor([[2.0, 5.0]]))
        tensor([[1., 0.]])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def fit(cls, rows: Sequence[Tensor]) -> Standardiser:
        """Mean and standard deviation of all rows together; a constant feature keeps scale 1."""
        total = sum(len(part) for part in rows)
        mean = sum(part.double().sum(0) for part in rows) / total
        variance = sum((part.double() - mean).square().sum(0) for part in rows) / total
        scale = torch.as_tensor(variance).sqrt()
        # Below rounding error of the mean, differences are noise, not signal.
        constant = scale <= 1e-6 * torch.as_tensor(mean).abs() + 1e-30
        return cls(torch.as_tensor(mean).float(), torch.where(constant, 1.0, scale).float())

    def forward(self, rows: Tensor) -> Tensor:
        """Standardised rows, `(n, ...)`."""
        return (rows - self.mean) / self.scale

    def inverse(self, rows: Tensor) -> Tensor:
        """Rows in their own units, `(..., D)`."""
        return rows * self.scale + self.mean

    @property
    def log_scale(self) -> Tensor:
        """Log-determinant of `inverse`, a scalar."""
        return self.scale.log().sum()
