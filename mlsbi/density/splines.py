r"""Rational-quadratic coupling without masks or in-place writes.

Same values as nflows 0.14, whose version indexes with boolean masks, writes in place and looks at the data.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["UNIT_SLOPE", "RationalQuadraticSpline", "SplineCoupling"]

_MIN_BIN = 1e-3
_MIN_DERIVATIVE = 1e-3
UNIT_SLOPE = math.log(math.expm1(1 - _MIN_DERIVATIVE))
"""The unnormalised slope that stands for a slope of one, which splines have where their tails begin."""


class RationalQuadraticSpline(nn.Module):
    r"""Monotone rational-quadratic splines on `[-tail_bound, tail_bound]`, the identity outside.

    Within a bin of width w and height h, with t the place in it from 0 to 1, s = 1 - t, slopes :math:`d_0` and
    :math:`d_1` at its ends and :math:`\delta = h / w` on average,

    .. math:: y = y_0 + h \frac{t a}{t a + s b}, \qquad
              \frac{dy}{dx} = \delta^2 \frac{s a + t b}{(t a + s b)^2}, \qquad
              a = s d_0 + t \delta, \quad b = s \delta + t d_1.

    Args:
        bins: Number of bins.
        tail_bound: Half the width of the interval.

    References:
        | Neural spline flows (Durkan et al., 2019), equations 4 to 8
        | https://arxiv.org/abs/1906.04032
    """

    sums: Tensor
    counts: Tensor
    ends: Tensor

    def __init__(self, bins: int, tail_bound: float) -> None:
        super().__init__()
        self.bins, self.tail_bound = bins, tail_bound
        # The knots are a linear map of the shares of the bins. Its numbers are whole ones, the same in any precision,
        # and the outer knots are not sums, so that they are where they should be.
        sums = torch.ones(bins + 1, bins).tril(-1)
        sums[-1] = 0.0
        counts = torch.arange(bins + 1.0)[:, None] - 0.5 / _MIN_BIN
        counts[-1] = 0.5 / _MIN_BIN
        self.register_buffer("sums", sums, persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("ends", torch.arange(2)[:, None, None], persistent=False)

    def extra_repr(self) -> str:
        """What tells it from another."""
        return f"bins={self.bins}, tail_bound={self.tail_bound}"

    def forward(
        self, inputs: Tensor, sizes: Tensor, slopes: Tensor, *, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Outputs and log-derivatives of m splines at n points each, both `(m, n)`.

        Args:
            inputs: Points, shape `(m, n)`.
            sizes: Unnormalised bin widths and heights, shape `(bins, 2, m, n)`.
            slopes: Unnormalised slopes at the knots, shape `(bins + 1, m, n)`, `UNIT_SLOPE` at the first and last.
            inverse: Whether to apply the inverse.
        """
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):  # knots need all digits
            with torch.autocast(kind, enabled=False):
                return self.forward(inputs.float(), sizes.float(), slopes.float(), inverse=inverse)
        inside = inputs.abs() <= self.tail_bound
        x = torch.where(inside, inputs, 0.0)  # what comes of points outside is not used
        knots = self._knots(sizes)
        left = (x >= knots[1:-1, int(inverse)]).sum(0)  # (m, n), 0 .. bins - 1
        ends = left + self.ends  # (2, m, n)
        near = knots.gather(0, ends[:, None].expand(-1, 2, -1, -1))
        x0, y0 = near[0].unbind()
        width, height = (near[1] - near[0]).unbind()
        d0, d1 = (_MIN_DERIVATIVE + functional.softplus(slopes.gather(0, ends))).unbind()
        delta = height / width
        t = _place(x - y0, height, delta, d0, d1) if inverse else (x - x0) / width
        s = 1 - t
        a, b = s * d0 + t * delta, s * delta + t * d1
        above = t * a
        total = above + s * b
        log_slope = torch.add((s * a + t * b).log(), (delta / total).log(), alpha=2)
        outputs, log_slope = (t * width + x0, -log_slope) if inverse else (y0 + height * above / total, log_slope)
        return torch.where(inside, outputs, inputs), torch.where(inside, log_slope, 0.0)

    def _knots(self, sizes: Tensor) -> Tensor:
        """Knots of inputs and of outputs, `(bins + 1, 2, m, n)`."""
        smallest, spread = 2 * self.tail_bound * _MIN_BIN, 2 * self.tail_bound * (1 - _MIN_BIN * self.bins)
        shares = sizes.softmax(0).flatten(1)
        return torch.addmm(self.counts, self.sums, shares, beta=smallest, alpha=spread).unflatten(1, sizes.shape[1:])


def _place(rise: Tensor, height: Tensor, delta: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    """The place in a bin where the spline has risen so far: a root of a quadratic."""
    bend = rise * (d0 + d1 - 2 * delta)
    a, b, c = bend + height * (delta - d0), height * d0 - bend, -delta * rise
    return 2 * c / (-b - (b * b - 4 * a * c).clamp_min(0.0).sqrt())


class SplineCoupling(PiecewiseRationalQuadraticCouplingTransform):
    """The nflows coupling transform with the spline above, on columns, for linear tails and a `ColumnResidualNet`."""

    arrangement: Tensor
    outermost: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spline = RationalQuadraticSpline(self.num_bins, self.tail_bound)
        self._kept, self._moved = self.identity_features.tolist(), self.transform_features.tolist()
        self._order = torch.cat([self.identity_features, self.transform_features]).argsort().tolist()
        # The network's outputs feature by feature, as nflows has them, and bin by bin, with the slopes where the tails
        # begin. That is a matrix, which is applied to the weights rather than to their many outputs.
        old = torch.arange(len(self._moved) * (3 * self.num_bins - 1)).view(len(self._moved), -1)
        widths, heights, slopes = old.T.split([self.num_bins, self.num_bins, self.num_bins - 1])
        sizes, none = torch.stack([widths, heights], 1).flatten(), torch.full((len(self._moved),), -1)
        new = torch.cat([sizes, none, slopes.flatten(), none])
        self.register_buffer("arrangement", (new[:, None] == old.flatten()).float(), persistent=False)
        self.register_buffer("outermost", (new == -1).float(), persistent=False)

    def columns(self, x: Tensor, condition: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Image of columns `(features, n)` given conditions `(condition_dim, n)`, and log-determinants `(n,)`."""
        rows = x.unbind()  # the gradient of it is one stack, that of an index a slow scatter
        kept = [rows[index] for index in self._kept]
        moved = torch.stack([rows[index] for index in self._moved])
        sizes, slopes = self._read(kept, condition)
        moved, log_slope = self.spline(moved, sizes, slopes, inverse=inverse)
        both = [*kept, *moved.unbind()]
        return torch.stack([both[index] for index in self._order]), log_slope.sum(0)

    def _read(self, kept: list[Tensor], condition: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes and slopes of the splines."""
        network, moved = self.transform_net, len(self._moved)
        hidden = network.hidden_columns(torch.cat([*(row[None] for row in kept), condition]), condition)
        weight, bias = network.final_layer.weight, network.final_layer.bias
        bias = torch.addmv(self.outermost, self.arrangement, bias, beta=UNIT_SLOPE)
        params = torch.addmm(bias[:, None], self.arrangement @ weight, hidden)
        sizes, slopes = params.split([self.num_bins * 2 * moved, (self.num_bins + 1) * moved])
        # As nflows: keeps the softmax near uniform at first.
        sizes = sizes / math.sqrt(network.hidden_features)
        return sizes.unflatten(0, (self.num_bins, 2, moved)), slopes.unflatten(0, (self.num_bins + 1, moved))

    def forward(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `(n, features)` and log-determinants `(n,)`."""
        outputs, log_det = self.columns(inputs.T, context.T)
        return outputs.T, log_det

    def inverse(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `forward`."""
        outputs, log_det = self.columns(inputs.T, context.T, inverse=True)
        return outputs.T, log_det
