r"""Rational-quadratic coupling without masks or in-place writes.

Same values as nflows 0.14, whose version indexes with boolean masks, writes in place and looks at the data.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform
from nflows.transforms.lu import LULinear
from torch import Tensor
from torch.nn import functional

__all__ = ["SolvedLULinear", "SplineCoupling", "rational_quadratic_spline"]

_MIN_BIN = 1e-3
_MIN_DERIVATIVE = 1e-3


def rational_quadratic_spline(
    inputs: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, *, tail_bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Monotone rational-quadratic spline on `[-tail_bound, tail_bound]`, the identity outside.

    Args:
        inputs: Any shape.
        widths: Unnormalised bin widths, shape `(*inputs.shape, bins)`.
        heights: Unnormalised bin heights, same shape.
        derivatives: Unnormalised slopes at the inner knots, shape `(*inputs.shape, bins - 1)`.
        tail_bound: Half the width of the interval.
        inverse: Whether to apply the inverse.

    Returns:
        Outputs and log-derivatives, both of the shape of `inputs`.

    References:
        | Neural spline flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032
    """
    inside = (inputs >= -tail_bound) & (inputs <= tail_bound)
    x = inputs.clamp(-tail_bound, tail_bound)
    knots_x, knots_y = _knots(widths, tail_bound), _knots(heights, tail_bound)
    slopes = _MIN_DERIVATIVE + functional.softplus(derivatives)
    slopes = functional.pad(slopes, (1, 1), value=1.0)  # slope 1 where the tails begin

    searched = knots_y if inverse else knots_x
    index = (x[..., None] >= searched[..., 1:-1]).sum(-1, keepdim=True)  # (..., 1), 0 .. bins - 1
    both = torch.stack([knots_x, knots_y, slopes], dim=-2)  # (..., 3, bins + 1)
    left = both.gather(-1, index[..., None, :].expand(*both.shape[:-1], 1))[..., 0]
    right = both.gather(-1, index[..., None, :].expand(*both.shape[:-1], 1) + 1)[..., 0]
    x0, y0, d0 = left.unbind(-1)
    x1, y1, d1 = right.unbind(-1)
    width, height = x1 - x0, y1 - y0
    delta = height / width
    bend = d0 + d1 - 2 * delta

    if inverse:
        rise = x - y0
        a = rise * bend + height * (delta - d0)
        b = height * d0 - rise * bend
        c = -delta * rise
        root = 2 * c / (-b - (b * b - 4 * a * c).clamp_min(0.0).sqrt())
        outputs = root * width + x0
    else:
        root = (x - x0) / width
        outputs = y0 + height * (delta * root * root + d0 * root * (1 - root)) / (delta + bend * root * (1 - root))
    product = root * (1 - root)
    numerator = delta * delta * (d1 * root * root + 2 * delta * product + d0 * (1 - root) * (1 - root))
    log_slope = numerator.log() - 2 * (delta + bend * product).log()
    zero = torch.zeros_like(log_slope)
    return torch.where(inside, outputs, inputs), torch.where(inside, -log_slope if inverse else log_slope, zero)


def _knots(unnormalised: Tensor, tail_bound: float) -> Tensor:
    bins = unnormalised.shape[-1]
    sizes = _MIN_BIN + (1 - _MIN_BIN * bins) * functional.softmax(unnormalised, dim=-1)
    inner = (2 * tail_bound) * sizes[..., :-1].cumsum(-1) - tail_bound
    return functional.pad(functional.pad(inner, (1, 0), value=-tail_bound), (0, 1), value=tail_bound)


class SplineCoupling(PiecewiseRationalQuadraticCouplingTransform):
    """The nflows coupling transform with the spline above, for vectors `(n, D)` and linear tails."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        order = torch.cat([self.identity_features, self.transform_features]).argsort()
        self.register_buffer("order", order, persistent=False)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs `(n, D)` and log-determinants `(n,)`."""
        return self._couple(inputs, context, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inverse of `forward`."""
        return self._couple(inputs, context, inverse=True)

    def _couple(self, inputs: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        kept, moved = inputs[:, self.identity_features], inputs[:, self.transform_features]
        params = self.transform_net(kept, context).reshape(*moved.shape, 3 * self.num_bins - 1)
        widths, heights, slopes = params.split([self.num_bins, self.num_bins, self.num_bins - 1], dim=-1)
        root = math.sqrt(self.transform_net.hidden_features)  # as nflows: keeps the softmax near uniform at first
        moved, log_slope = rational_quadratic_spline(
            moved, widths / root, heights / root, slopes, tail_bound=self.tail_bound, inverse=inverse
        )
        return torch.cat([kept, moved], dim=1)[:, self.order], log_slope.sum(-1)


class SolvedLULinear(LULinear):
    """The nflows LU-parameterised linear map, with `torch.linalg` solves and no in-place writes."""

    def _create_lower_upper(self) -> tuple[Tensor, Tensor]:
        lower = torch.diag(torch.ones_like(self.upper_diag))
        upper = torch.diag(self.upper_diag)
        if self.features > 1:
            lower = lower + self._fill(self.lower_indices, self.lower_entries)
            upper = upper + self._fill(self.upper_indices, self.upper_entries)
        return lower, upper

    def _fill(self, indices: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], entries: Tensor) -> Tensor:
        rows, columns = (torch.from_numpy(index).to(entries.device) for index in indices)
        flat = entries.new_zeros(self.features * self.features)
        return flat.scatter(0, rows * self.features + columns, entries).reshape(self.features, self.features)

    def inverse_no_cache(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse map `(n, D)` and its log-determinants `(n,)`."""
        lower, upper = self._create_lower_upper()
        outputs = torch.linalg.solve_triangular(lower, (inputs - self.bias).T, upper=False, unitriangular=True)
        outputs = torch.linalg.solve_triangular(upper, outputs, upper=True).T
        return outputs, -self.logabsdet().expand(len(inputs))
