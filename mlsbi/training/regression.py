r"""Gaussian-process regression of several outputs, each with its own length scales."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

__all__ = ["GaussianProcess"]

_STEPS = 80  # of the search for the most likely length scales and variances
_JITTER = 1e-6
# Means and standard deviations of the logarithms of what is fitted: a prior that keeps few rows from fitting noise.
_LENGTHS, _LINEAR, _SCALE, _NOISE = (1.0, 1.0), (-1.0, 1.0), (-1.0, 1.0), (-1.5, 1.0)


@dataclass(frozen=True)
class GaussianProcess:
    r"""A posterior of functions, one per output, given rows.

    The kernel is a sum of a linear one and a Gaussian one with a length for each feature; lengths, scales and noise are
    where their posterior density, under log-normal priors, is largest, as far as `_STEPS` steps of L-BFGS find it. All
    of it happens in float64 on the CPU.

    Args:
        rows: Features trained on, shape `(m, n, d)`: those of each output.
        factors: Kernel matrix times these is the targets, shape `(m, n)`.
        inverse: Inverse of the kernel matrix, shape `(m, n, n)`.
        logs: Logarithms of `d` lengths, the linear scale, the Gaussian one and the noise, shape `(m, d + 3)`.
    """

    rows: Tensor
    factors: Tensor
    inverse: Tensor
    logs: Tensor

    @classmethod
    def fit(cls, rows: Tensor, targets: Tensor) -> GaussianProcess:
        r"""Fits lengths, scales and noise.

        Args:
            rows: Features of each output, shape `(m, n, d)`, of about unit scale.
            targets: Outputs of mean about 0 and about unit scale, shape `(m, n)`.
        """
        rows, targets = rows.cpu().double(), targets.cpu().double()
        outputs, n, features = rows.shape
        prior = torch.tensor([*[_LENGTHS] * features, _LINEAR, _SCALE, _NOISE], dtype=torch.float64)

        @torch.enable_grad()
        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            logs = torch.tensor(flat, requires_grad=True)
            own = logs.reshape(outputs, -1)
            root = torch.linalg.cholesky(_kernel(rows, rows, own, noise=True))
            white = torch.linalg.solve_triangular(root, targets[..., None], upper=False)
            value = (white**2).sum() / 2 + root.diagonal(dim1=1, dim2=2).log().sum()
            value = value + (((own - prior[:, 0]) / prior[:, 1]) ** 2).sum() / 2
            gradient, = torch.autograd.grad(value, logs)
            return value.item(), gradient.numpy()

        start = prior[:, 0].repeat(outputs).numpy()
        found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(-6.0, 6.0)] * len(start),
                         options={"maxiter": _STEPS})
        logs = torch.tensor(found.x).reshape(outputs, -1)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(_kernel(rows, rows, logs, noise=True)))
        return cls(rows, (inverse @ targets[..., None])[..., 0], inverse, logs)

    def __call__(self, rows: Tensor) -> Tensor:
        """Means at features `(m, k, d)`, shape `(m, k)`."""
        return (_kernel(rows.cpu().double(), self.rows, self.logs) @ self.factors[..., None])[..., 0]

    @property
    def residuals(self) -> Tensor:
        """What each row's target differs by from its prediction by all others, shape `(m, n)`."""
        return self.factors / self.inverse.diagonal(dim1=1, dim2=2)


def _kernel(a: Tensor, b: Tensor, logs: Tensor, *, noise: bool = False) -> Tensor:
    """Covariance `(m, k, n)` of functions at features `(m, k, d)` and `(m, n, d)`; with noise, of observations."""
    lengths, (linear, scale, spread) = logs[:, :-3].exp(), logs[:, -3:].exp().unbind(1)
    x, y = a / lengths[:, None], b / lengths[:, None]
    squares = (x**2).sum(2)[:, :, None] + (y**2).sum(2)[:, None] - 2 * x @ y.mT
    plain = (a @ b.mT + 1.0) * linear[:, None, None] ** 2 / math.sqrt(a.shape[2])
    found = plain + scale[:, None, None] ** 2 * torch.exp(-squares.clamp_min(0) / 2)
    if noise:
        found = found + (spread[:, None, None] ** 2 + _JITTER) * torch.eye(a.shape[1], dtype=a.dtype)
    return found
