r"""Conditional densities whose growth and Lipschitz constants are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlsbi.density.standardise import Standardiser

__all__ = ["AffineGaussian", "Constants", "GradientConstants", "SharedMixture"]

_TANH_CURVATURE = 4 / (3 * math.sqrt(3))  # the largest |tanh''|, where tanh = 1 / sqrt(3)
_LEAST_RIDGE = 1e-12  # below it, rounding errors of a correlation matrix are no longer small beside the ridge


@dataclass(frozen=True)
class Constants:
    r"""The constants of (A3) for a function f of v = (x, theta).

    Args:
        growth: K with :math:`|\nabla f(v)| \le K (|x| + |\theta| + 1)` for all v.
        lipschitz: K with :math:`|\nabla f(v) - \nabla f(w)| \le K |v - w|` for all v and w.
    """

    growth: float
    lipschitz: float


@dataclass(frozen=True)
class GradientConstants:
    r"""The constants of (A3) for each partial derivative of log q in one of its parameters, as functions of v.

    Args:
        growth: As in `Constants`, of the parameter's shape.
        lipschitz: As in `Constants`, of the parameter's shape.
    """

    growth: Tensor
    lipschitz: Tensor


class AffineGaussian(nn.Module):
    r"""A Gaussian with an affine mean and fixed variances, in float64.

    .. math:: q(\text{input} \mid \text{condition}) =
        N(\text{input}; A\,\text{condition} + b, \operatorname{diag}(e^{-2 \lambda}))

    Its log is a quadratic function of v = (input, condition), so all constants are closed and attained. The two
    arguments may be theta given x or x given theta: the constants are the same.

    Args:
        slope: A, shape `(dim, condition_dim)`.
        shift: b, shape `(dim,)`.
        log_precision: :math:`\lambda`, the log of one over the standard deviation, shape `(dim,)`.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> density = AffineGaussian([[2.0]], [0.5], [0.0])
        >>> density.log_prob(torch.tensor([[2.5]]), torch.tensor([[1.0]]))
        tensor([-0.9189], dtype=torch.float64, grad_fn=<SubBackward0>)
        >>> density.constants  # the Hessian is -[[1, -2], [-2, 4]]: norm 5, columns of length 5^0.5 and 20^0.5
        Constants(growth=4.472..., lipschitz=5.0...)
    """

    def __init__(
        self,
        slope: Tensor | Sequence[Sequence[float]],
        shift: Tensor | Sequence[float],
        log_precision: Tensor | Sequence[float],
    ) -> None:
        super().__init__()
        self.slope, self.shift, self.log_precision = _parameter(slope), _parameter(shift), _parameter(log_precision)
        dim = len(self.shift)
        if self.slope.ndim != 2 or self.shift.shape != (dim,) or self.log_precision.shape != (dim,) or (
            len(self.slope) != dim or self.slope.numel() == 0
        ):
            raise ValueError("Expected slope (dim, condition_dim), shift (dim,), log_precision (dim,); got "
                             f"{tuple(self.slope.shape)}, {tuple(self.shift.shape)}, "
                             f"{tuple(self.log_precision.shape)}.")

    @classmethod
    def fit(cls, input: Tensor, condition: Tensor, *, ridge: float = 1e-6) -> AffineGaussian:
        r"""The least-squares fit, for when a density is wanted at once.

        Inputs and conditions are standardised first (constant columns are centred only) and the ridge is added to
        the conditions' correlation matrix and to the residual variances. So collinear columns share a slope, a
        constant column has slope 0, and no standard deviation is below `sqrt(ridge)` times that of its input, or
        below `sqrt(ridge)` where the input is constant.

        Args:
            input: Rows `(n, dim)`.
            condition: Rows `(n, ...)`, flattened.
            ridge: At least 1e-12; slopes shrink by about this fraction.

        Raises:
            ValueError: If the rows do not fit, are not finite, or the ridge is too small.

        Example:
            >>> condition = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
            >>> AffineGaussian.fit(3 * condition + 1, condition).slope.item()
            2.99999...
        """
        if input.ndim != 2 or condition.ndim < 2 or len(input) != len(condition) or len(input) == 0:
            raise ValueError("Expected input (n, dim) and condition (n, ...) with as many rows, at least one; got "
                             f"{tuple(input.shape)} and {tuple(condition.shape)}.")
        if not bool(torch.isfinite(input).all() & torch.isfinite(condition).all()):
            raise ValueError("Expected finite rows; leave out the others first.")
        if not (math.isfinite(ridge) and ridge >= _LEAST_RIDGE):
            raise ValueError(f"Expected a ridge of at least {_LEAST_RIDGE:g}; got {ridge}.")
        y, c = input.detach().double(), condition.detach().double().flatten(1)
        y_scaler, c_scaler = (Standardiser.fit([rows], dtype=torch.float64) for rows in (y, c))
        y, c = y_scaler(y), c_scaler(c)
        correlation = c.T @ c / len(c) + ridge * torch.eye(c.shape[1], dtype=c.dtype)
        weights = torch.linalg.solve(correlation, c.T @ y / len(c))
        variance = (y - c @ weights).square().mean(0) + ridge
        slope = y_scaler.scale[:, None] * weights.T / c_scaler.scale
        shift = y_scaler.mean - slope @ c_scaler.mean
        return cls(slope, shift, -y_scaler.scale.log() - 0.5 * variance.log())

    def extra_repr(self) -> str:
        """The numbers that make it up."""
        return f"{_numbers(self.slope)}, {_numbers(self.shift)}, {_numbers(self.log_precision)}"

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given `condition` (n, ...), flattened, shape `(n,)`."""
        mean = condition.flatten(1).to(self.slope) @ self.slope.T + self.shift
        white = self.log_precision.exp() * (input.to(self.slope) - mean)
        return self.log_precision.sum() - 0.5 * len(self.shift) * math.log(2 * math.pi) - 0.5 * white.square().sum(1)

    @property
    def constants(self) -> Constants:
        r"""The smallest constants of (A3).

        With :math:`M = (I, -A)`, :math:`\Lambda = \operatorname{diag}(e^{2 \lambda})` and
        :math:`S = M^T \Lambda M` the gradient is :math:`M^T \Lambda b - S v`. The Lipschitz constant is the spectral
        norm of S. Under the sum of norms of (A3) the growth is that of the blocks of columns of S, one for the input
        and one for the condition, or the gradient at 0 if that is larger.
        """
        with torch.no_grad():
            squared, blocks, at_zero = _quadratic(self.slope, self.log_precision, self.shift[None])
        return Constants(max(blocks, float(at_zero[0].norm())), squared)

    @property
    def gradient_constants(self) -> dict[str, GradientConstants]:
        r"""The smallest constants of (A3) for every partial derivative of log q in a parameter (theorem 3), by name.

        All of them are quadratic in v at most, with r = M v - b, M_i the i-th row of M and p_i its squared precision:
        :math:`p_i r_i` in `shift[i]`, :math:`p_i r_i c_j` in `slope[i, j]` and :math:`1 - p_i r_i^2` in
        `log_precision[i]`. Growth comes from the two blocks of columns of their constant Hessians, or from 0.
        """
        with torch.no_grad():
            slope, shift, square = self.slope, self.shift.abs(), (2 * self.log_precision).exp()
            within = slope.square().sum(1)  # squared length of the condition's part of M_i; the input's has length 1
            row = (1 + within).sqrt()
            shifts = GradientConstants(square * row, torch.zeros_like(shift))
            # The Hessian is p (M_i e^T + e M_i^T) with e the unit vector of c_j: its norm is p (|M_i| + |M_i . e|).
            # Its columns of the input are p e e_i^T, of norm p. Those of the condition are p H with, for
            # a = -A_i and t = a . e, H^T H = |M_i|^2 e e^T + t (e a^T + a e^T) + a a^T, whose two eigenvalues other
            # than 0 have trace |M_i|^2 + 2 t^2 + |a|^2 and determinant (|M_i|^2 - t^2) (|a|^2 - t^2).
            t = slope.square()
            half = 0.5 * (1 + 2 * within[:, None] + 2 * t)
            product = (1 + within[:, None] - t) * (within[:, None] - t).clamp_min(0)
            columns = (half + (half.square() - product).clamp_min(0).sqrt()).sqrt()
            slopes = GradientConstants(
                square[:, None] * torch.maximum(columns, shift[:, None]),
                square[:, None] * (row[:, None] + slope.abs()),
            )
            precisions = GradientConstants(
                2 * square * row * torch.stack([torch.ones_like(shift), within.sqrt(), shift]).amax(0),
                2 * square * row.square(),
            )
        return {"slope": slopes, "shift": shifts, "log_precision": precisions}


class SharedMixture(nn.Module):
    r"""A mixture of K Gaussians that share an affine slope and variances, weighted by a tanh network, in float64.

    .. math:: q(\text{input} \mid c) =
        \sum_k \pi_k(c)\, N(\text{input}; A c + m_k, \operatorname{diag}(e^{-2 \lambda})),
        \qquad \pi(c) = \operatorname{softmax}(R \tanh(W c + w))

    It is as general as a mixture with global constants gets. In a mixture density network they do not exist: where
    two components of different precisions are equally likely, their gradients differ by an amount that grows with
    |v|, and the Hessian, which has the covariance of those gradients, with its square; and a mean that is curved in c
    adds `(input - mean) * mean''`, which grows with the input.

    Args:
        slope: A, shape `(dim, condition_dim)`.
        centres: The m_k, shape `(K, dim)`.
        log_precision: :math:`\lambda`, the log of one over the standard deviation, shape `(dim,)`.
        readout: R, shape `(K, hidden)`.
        weight: W, shape `(hidden, condition_dim)`.
        bias: w, shape `(hidden,)`.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> density = SharedMixture([[1.0]], [[-1.0], [1.0]], [0.0], [[0.0], [0.0]], [[1.0]], [0.0])
        >>> density.log_prob(torch.zeros(1, 1), torch.zeros(1, 1)).item()  # both centres at distance 1
        -1.418...
    """

    def __init__(
        self,
        slope: Tensor | Sequence[Sequence[float]],
        centres: Tensor | Sequence[Sequence[float]],
        log_precision: Tensor | Sequence[float],
        readout: Tensor | Sequence[Sequence[float]],
        weight: Tensor | Sequence[Sequence[float]],
        bias: Tensor | Sequence[float],
    ) -> None:
        super().__init__()
        self.slope, self.centres, self.log_precision = _parameter(slope), _parameter(centres), _parameter(log_precision)
        self.readout, self.weight, self.bias = _parameter(readout), _parameter(weight), _parameter(bias)
        found = tuple(tuple(part.shape) for part in self.parameters())
        if self.slope.ndim != 2 or self.readout.ndim != 2 or min(*self.slope.shape, *self.readout.shape) == 0 or (
            found[1:] != _mixture_shapes(*self.slope.shape, *self.readout.shape)
        ):
            raise ValueError("Expected slope (dim, condition_dim), centres (K, dim), log_precision (dim,), readout "
                             f"(K, hidden), weight (hidden, condition_dim), bias (hidden,); got {found}.")

    def extra_repr(self) -> str:
        """The numbers that make it up."""
        return ", ".join(f"{name}={_numbers(part)}" for name, part in self.named_parameters())

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log density of `input` (n, dim) given `condition` (n, ...), flattened, shape `(n,)`."""
        c = condition.flatten(1).to(self.slope)
        logits = (c @ self.weight.T + self.bias).tanh() @ self.readout.T  # (n, K)
        white = self.log_precision.exp() * ((input.to(self.slope) - c @ self.slope.T)[:, None] - self.centres)
        constant = self.log_precision.sum() - 0.5 * self.slope.shape[0] * math.log(2 * math.pi)
        return constant + (logits.log_softmax(1) - 0.5 * white.square().sum(2)).logsumexp(1)

    @property
    def constants(self) -> Constants:
        r"""Constants of (A3), valid but not the smallest; for K = 1 those of `AffineGaussian`.

        With M, :math:`\Lambda` and S of `AffineGaussian`, logits l_k, and :math:`a_k = M^T \Lambda m_k`,

        .. math:: \log q = \text{const} - \tfrac12 v^T S v
            + \operatorname{LSE}_k(l_k + a_k \cdot v - \tfrac12 m_k^T \Lambda m_k) - \operatorname{LSE}_k(l_k)
        """
        # Let p and pi be the two softmax weights, and g_k = grad l_k. Then
        #   grad = -S v + sum_k p_k a_k + sum_k (p_k - pi_k) g_k,
        #   Hess = -S + Cov_p(a + g) - Cov_pi(g) + sum_k (p_k - pi_k) Hess l_k.
        # Gradient: an average of the a_k is at most the longest; two averages of the g_k differ by no more than two
        # of the g_k can, which is `far`. Hessian: a covariance of vectors is at most a quarter of the squared
        # distance of the two farthest (Popoviciu). Hess l_k = W^T diag(tanh'' R_k) W, and sum_k (p_k - pi_k) R_kh is
        # at most the range of R_kh over k, so the last term lies between -bend and bend. As S and the covariances
        # are positive, the eigenvalues of Hess lie between -(|S| + Cov_pi + bend) and Cov_p + bend.
        with torch.no_grad():
            squared, blocks, pulls = _quadratic(self.slope, self.log_precision, self.centres)
            # g_j - g_k = W^T diag(tanh') (R_j - R_k), with tanh' between 0 and 1.
            apart = self.readout[:, None] - self.readout  # (K, K, hidden)
            far = torch.minimum(
                torch.linalg.matrix_norm(self.weight, 2) * apart.norm(dim=2), apart.abs() @ self.weight.norm(dim=1)
            )
            posterior = float(((pulls[:, None] - pulls).norm(dim=2) + far).max().square() / 4)
            prior = float(far.max().square() / 4)
            spread = (self.readout.amax(0) - self.readout.amin(0)).sqrt()[:, None] * self.weight
            bend = _TANH_CURVATURE * float(torch.linalg.matrix_norm(spread, 2).square())
            growth = max(blocks, float(pulls.norm(dim=1).max() + far.max()))
        return Constants(growth, max(posterior, squared + prior) + bend)


def _quadratic(slope: Tensor, log_precision: Tensor, centres: Tensor) -> tuple[float, float, Tensor]:
    """The norm of S, the larger norm of its two blocks of columns, and M^T Lambda m of centres m (K, dim)."""
    scale = log_precision.exp()[:, None]
    root = scale * torch.cat([torch.eye(len(slope), dtype=slope.dtype), -slope], 1)  # root^T root = S
    blocks = [float(torch.linalg.matrix_norm(root.T @ part, 2)) for part in root.tensor_split([len(slope)], 1)]
    return float(torch.linalg.matrix_norm(root, 2).square()), max(blocks), (centres * scale[:, 0]) @ root


def _mixture_shapes(dim: int, condition_dim: int, k: int, hidden: int) -> tuple[tuple[int, ...], ...]:
    return (k, dim), (dim,), (k, hidden), (hidden, condition_dim), (hidden,)


def _parameter(values: Tensor | Sequence[float] | Sequence[Sequence[float]]) -> nn.Parameter:
    """A float64 parameter of its own memory."""
    return nn.Parameter(torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone())


def _numbers(tensor: Tensor) -> str:
    return str(tensor.detach().tolist())
