r"""One z-score for all levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Standardiser"]

_CHUNK = 8192  # rows; bounds the memory that float64 copies take


class Standardiser(nn.Module):
    r"""Shifts and scales features by fixed numbers, kept as buffers.

    It is fitted once, on rows of all levels together: a standardiser per level would break the telescoping sum.
    Shift and scale are float64 and rows come out as float32, so that a large offset costs no digits.

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
        self.register_buffer("mean", mean.double())
        self.register_buffer("scale", scale.double())

    @classmethod
    def fit(cls, rows: Sequence[Tensor]) -> Standardiser:
        """Mean and standard deviation of all rows together; a constant feature keeps scale 1."""
        total = sum(len(part) for part in rows)
        mean = torch.zeros(rows[0].shape[1:], dtype=torch.float64)
        for part in rows:
            for chunk in part.split(_CHUNK):
                mean += chunk.double().sum(0) / total
        variance = torch.zeros_like(mean)
        for part in rows:
            for chunk in part.split(_CHUNK):
                variance += (chunk.double() - mean).square().sum(0) / total
        scale = variance.sqrt()
        # Below the rounding error of the rows, differences are noise, not signal.
        rounding = 8 * max(torch.finfo(part.dtype).eps for part in rows)
        return cls(mean, torch.where(scale <= rounding * mean.abs() + 1e-30, 1.0, scale))

    def forward(self, rows: Tensor) -> Tensor:
        """Standardised rows, `(n, ...)`, float32."""
        shift, scale = self.mean.to(rows.dtype), self.scale.to(rows.dtype)
        return (rows - shift).div_(scale).float()

    def inverse(self, rows: Tensor) -> Tensor:
        """Rows in their own units, `(..., D)`."""
        return rows * self.scale.to(rows.dtype) + self.mean.to(rows.dtype)

    @property
    def log_scale(self) -> Tensor:
        """Log-determinant of `inverse`, a scalar."""
        return self.scale.log().sum().float()
