r"""Linear maps between the layers of a flow: LU-parameterised, the reversal of features, and a shift."""

from __future__ import annotations

import torch
from nflows.transforms import ReversePermutation, Transform
from nflows.transforms.lu import LULinear
from torch import Tensor, nn

__all__ = ["Reversal", "Shift", "SolvedLULinear"]


class SolvedLULinear(LULinear):
    """The nflows LU-parameterised linear map on columns, out of place, with `torch.linalg` solves.

    Args:
        features: Number of features.
        identity_init: Whether to start as the identity, or else at random.
    """

    entries: Tensor
    constants: Tensor

    def __init__(self, features: int, *, identity_init: bool = True) -> None:
        super().__init__(features, identity_init=identity_init)
        # Where each entry of L and of U stands among: those below, those above, the diagonal, a zero and a one.
        size = features * (features - 1) // 2
        rows, columns = torch.meshgrid(torch.arange(features), torch.arange(features), indexing="ij")
        lower, upper = torch.full((2, features, features), 2 * size + features)
        lower[rows > columns] = torch.arange(size)
        upper[rows < columns] = size + torch.arange(size)
        lower[rows == columns] = 2 * size + features + 1
        upper[rows == columns] = 2 * size + torch.arange(features)
        self.register_buffer("entries", torch.stack([lower, upper]).flatten(), persistent=False)
        self.register_buffer("constants", torch.tensor([0.0, 1.0]), persistent=False)

    def columns(self, x: Tensor, condition: Tensor | None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Image of columns `(features, n)`, and log-determinants `(n,)`."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # theta itself needs all digits
            with torch.autocast(kind, enabled=False):
                return self.columns(x.float(), condition, inverse=inverse)
        diagonal = self.upper_diag
        lower, upper = self._triangles(diagonal)
        log_det = diagonal.log().sum().expand(x.shape[1])
        if not inverse:
            return torch.addmm(self.bias[:, None], lower @ upper, x), log_det
        y = torch.linalg.solve_triangular(lower, x - self.bias[:, None], upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, y, upper=True), -log_det

    def forward_no_cache(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Image of rows `(n, features)`, and log-determinants `(n,)`."""
        outputs, log_det = self.columns(inputs.T, None)
        return outputs.T, log_det

    def inverse_no_cache(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `forward_no_cache`."""
        outputs, log_det = self.columns(inputs.T, None, inverse=True)
        return outputs.T, log_det

    def _create_lower_upper(self) -> tuple[Tensor, Tensor]:
        return self._triangles(self.upper_diag)

    def _triangles(self, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        known = torch.cat([self.lower_entries, self.upper_entries, diagonal, self.constants])
        lower, upper = known.index_select(0, self.entries).view(2, self.features, self.features).unbind()
        return lower, upper


class Reversal(ReversePermutation):
    """The nflows reversal of features on columns."""

    def columns(self, x: Tensor, condition: Tensor | None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Columns `(features, n)` in reverse order, and log-determinants `(n,)`, which are zero."""
        return x.flip(0), x.new_zeros(()).expand(x.shape[1])


class Shift(Transform):
    """A shift of columns by a linear map of the condition, zero at first: what is left is a regression's residual.

    Args:
        features: Number of features.
        condition_dim: Length of the conditions.
    """

    def __init__(self, features: int, condition_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, condition_dim))

    def columns(self, x: Tensor, condition: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Columns `(features, n)` less the line at conditions `(condition_dim, n)`, and log-determinants, zero."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # as in `SolvedLULinear`
            with torch.autocast(kind, enabled=False):
                return self.columns(x.float(), condition.float(), inverse=inverse)
        return torch.addmm(x, self.weight, condition, alpha=1 if inverse else -1), x.new_zeros(()).expand(x.shape[1])

    def forward(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `(n, features)` and log-determinants `(n,)`."""
        outputs, log_det = self.columns(inputs.T, context.T)
        return outputs.T, log_det

    def inverse(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `forward`."""
        outputs, log_det = self.columns(inputs.T, context.T, inverse=True)
        return outputs.T, log_det
