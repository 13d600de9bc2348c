r"""One z-score for all levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Standardiser", "Transform", "check_transform"]

Transform: TypeAlias = Literal["none", "asinh"]

_CHUNK = 8192  # rows; bounds the memory that float64 copies take
_QUARTILE_ROWS = 20_000  # values a feature; bounds the work of sorting
_QUARTILE_VALUES = 4_000_000  # of all features; bounds the memory
_NORMAL_IQR = 1.349  # interquartile range of a standard normal


class Standardiser(nn.Module):
    r"""Shifts and scales features by fixed numbers, kept as buffers.

    It is fitted once, on rows of all levels together: a standardiser per level would break the telescoping sum.
    Shift and scale are float64, so that the large offset of float64 rows costs no digits.

    Args:
        mean: Shift, the shape of one row.
        scale: Positive scale, same shape.
        transform: `"asinh"` first maps each feature by :math:`\operatorname{asinh}((x - c) / s)`, linear near the
            centre and logarithmic far from it, so that heavy tails neither squeeze the bulk nor leave a spline's range.
        centre: The c above, the shape of one row.
        spread: The s above, same shape.
        shared: Axes of a row along which features are exchangeable and so have one mean and scale, as the draws of a
            set or the pixels of an image.
        dtype: What `forward` and `log_abs_det` return, whatever the rows.

    Example:
        >>> standardiser = Standardiser.fit([torch.tensor([[0.0, 5.0], [2.0, 5.0]])])
        >>> standardiser(torch.tensor([[2.0, 5.0]]))
        tensor([[1., 0.]])
    """

    mean: Tensor
    scale: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(
        self,
        mean: Tensor,
        scale: Tensor,
        *,
        transform: Transform = "none",
        centre: Tensor | None = None,
        spread: Tensor | None = None,
        shared: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.transform, self.shared, self.dtype = transform, shared, dtype
        self.register_buffer("mean", mean.double())
        self.register_buffer("scale", scale.double())
        if transform == "asinh":
            self.register_buffer("centre", torch.zeros_like(self.mean) if centre is None else centre.double())
            self.register_buffer("spread", torch.ones_like(self.mean) if spread is None else spread.double())

    @classmethod
    def fit(
        cls,
        rows: Sequence[Tensor],
        *,
        transform: Transform = "none",
        shared: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> Standardiser:
        """Mean and standard deviation of all rows together; a constant feature keeps scale 1.

        With `transform="asinh"` the centre is the median and the spread comes from the quartiles.
        """
        shape = rows[0].shape[1:]
        centre, spread = _quartiles(rows, shared) if transform == "asinh" else (None, None)
        before = cls(torch.zeros(shape), torch.ones(shape), transform=transform, centre=centre, spread=spread)
        total = sum(len(part) for part in rows)
        mean = torch.zeros(shape, dtype=torch.float64)
        for part in rows:
            for chunk in part.split(_CHUNK):
                mean += before._bend(chunk.double()).sum(0) / total
        if shared:
            mean = mean.mean(shared, keepdim=True).expand(shape).contiguous()
        variance = torch.zeros_like(mean)
        for part in rows:
            for chunk in part.split(_CHUNK):
                variance += (before._bend(chunk.double()) - mean).square().sum(0) / total
        if shared:
            variance = variance.mean(shared, keepdim=True).expand(shape).contiguous()
        scale = variance.sqrt()
        # Below the rounding error of the rows, differences are noise, not signal.
        rounding = 8 * max(torch.finfo(part.dtype).eps for part in rows)
        scale = torch.where(scale <= rounding * mean.abs() + 1e-30, 1.0, scale)
        return cls(mean, scale, transform=transform, centre=centre, spread=spread, shared=shared, dtype=dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """Standardised rows, `(n, ...)`, of `dtype`."""
        rows = self._finer(rows)
        return ((self._bend(rows) - self.mean.to(rows.dtype)) / self.scale.to(rows.dtype)).to(self.dtype)

    def inverse(self, rows: Tensor) -> Tensor:
        """Rows in their own units, `(..., D)`."""
        straight = rows * self.scale.to(rows.dtype) + self.mean.to(rows.dtype)
        if self.transform == "none":
            return straight
        return straight.sinh() * self.spread.to(rows.dtype) + self.centre.to(rows.dtype)

    def log_abs_det(self, rows: Tensor) -> Tensor:
        """Log-determinant of `forward` at rows `(n, ...)`, a scalar where it is the same for all, else `(n,)`."""
        constant = -self.scale.log().sum().to(self.dtype)
        if self.transform == "none":
            return constant
        rows = self._finer(rows)
        far = (rows - self.centre.to(rows.dtype)) / self.spread.to(rows.dtype)
        bend = torch.hypot(far, torch.ones_like(far)).log().flatten(1).sum(1)
        return constant - self.spread.log().sum().to(self.dtype) - bend.to(self.dtype)

    def _finer(self, rows: Tensor) -> Tensor:
        """Rows in their own precision or in that of the result, whichever is finer."""
        return rows.to(torch.promote_types(rows.dtype, self.dtype))

    def _bend(self, rows: Tensor) -> Tensor:
        if self.transform == "none":
            return rows
        return ((rows - self.centre.to(rows.dtype)) / self.spread.to(rows.dtype)).asinh()


def check_transform(transform: str) -> Transform:
    """The transform, if it is one.

    Raises:
        ValueError: If it is not.
    """
    if transform not in ("none", "asinh"):
        raise ValueError(f'Expected x_transform "none" or "asinh"; got {transform!r}.')
    return transform  # type: ignore[return-value]


def _quartiles(rows: Sequence[Tensor], shared: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Median and interquartile range, in standard deviations of a normal, of every feature; a constant has range 1."""
    shape = rows[0].shape[1:]
    most = max(min(_QUARTILE_ROWS, _QUARTILE_VALUES // max(shape.numel(), 1)), 100)
    step = -(-sum(len(part) for part in rows) // most)
    values = torch.cat([part[::step].double() for part in rows]).numpy()
    axes = (0, *(axis + 1 for axis in shared))
    low, centre, high = (torch.from_numpy(np.asarray(value))[0].expand(shape).contiguous()
                         for value in np.quantile(values, [0.25, 0.5, 0.75], axis=axes, keepdims=True))
    spread = (high - low) / _NORMAL_IQR
    return centre, torch.where(spread <= 1e-12 * centre.abs() + 1e-30, 1.0, spread)
