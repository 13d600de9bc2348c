r"""Weights of the telescoping sum: fixed, or estimated from earlier steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlsbi.training.alignment import fit_affine

__all__ = ["LaggedWeights", "solve_weights"]


def solve_weights(n: Sequence[float] | Tensor, fine: Any, coarse: Any, covariance: Any) -> Tensor:
    r"""Weights a_0 .. a_L that minimise the telescoping estimator's variance, a_L = 1.

    .. math:: -\frac{c_l}{n_l} a_{l-1} + \left(\frac{V^f_l}{n_l} + \frac{V^c_{l+1}}{n_{l+1}}\right) a_l
              - \frac{c_{l+1}}{n_{l+1}} a_{l+1} = 0

    Args:
        n: Rows of each term, shape `(L + 1,)`.
        fine: Variance of f^l over term l's rows, shape `(..., L + 1)`.
        coarse: Variance of f^{l-1} over term l's rows, shape `(..., L + 1)`, entry 0 unused.
        covariance: Covariance of f^l and f^{l-1} over term l's rows, shape `(..., L + 1)`, entry 0 unused.

    Returns:
        Weights, shape `(..., L + 1)`, float64.

    Example:
        >>> solve_weights([1000, 10], fine=[1.0, 1.0], coarse=[0.0, 1.0], covariance=[0.0, 0.5])
        tensor([0.4950, 1.0000], dtype=torch.float64)
    """
    v_fine, v_coarse, covariance = (torch.as_tensor(part, dtype=torch.float64) for part in (fine, coarse, covariance))
    top = len(n) - 1
    last = torch.ones_like(v_fine[..., :1])
    if top == 0:
        return last
    g = 1.0 / torch.as_tensor(n, dtype=torch.float64, device=v_fine.device)
    coupling = g * covariance
    right = torch.zeros_like(coupling[..., 0]), coupling[..., top]
    pivots = list((g[:-1] * v_fine[..., :-1] + g[1:] * v_coarse[..., 1:]).unbind(-1))
    rights = [right[int(level == top - 1)] for level in range(top)]
    # Elimination along the levels; one without any variance leaves its weight free, which is then 0.
    for level in range(1, top):
        share = _divide(coupling[..., level], pivots[level - 1])
        pivots[level] = pivots[level] - share * coupling[..., level]
        rights[level] = rights[level] + share * rights[level - 1]
    weights = [_divide(rights[top - 1], pivots[top - 1])]
    for level in range(top - 2, -1, -1):
        weights.insert(0, _divide(rights[level] + coupling[..., level + 1] * weights[0], pivots[level]))
    return torch.cat([torch.stack(weights, -1), last], -1)


def _divide(one: Tensor, other: Tensor) -> Tensor:
    return torch.where(other > 0, one / torch.where(other > 0, other, 1.0), 0.0)


class LaggedWeights:
    r"""Weights estimated from losses seen before: smoothed moments of rows that the network was not trained on.

    The moments of training rows would not do: the finer the network fits the few fine halves, the less these go with
    their coarse twins, until the cheap levels are left out altogether. A level's variance is pooled over all rows that
    have its output; the slope of fine on coarse losses is drawn towards 1, the published objective, by `fit_affine`.

    Args:
        n: Rows trained on in each term, shape `(L + 1,)`.
        members: Networks trained side by side, each with weights of its own.
        smoothing: Share of the old moments kept at each update.
        device: Where losses come from.
    """

    def __init__(
        self, n: Sequence[int], *, members: int = 1, smoothing: float = 0.8, device: torch.device | str = "cpu"
    ) -> None:
        self.n = torch.tensor(n, dtype=torch.float64, device=device)
        self.smoothing = smoothing
        self.current = torch.ones(members, len(n), dtype=torch.float64, device=device)
        self._moments = torch.full((members, 2, len(n) - 1), torch.nan, dtype=torch.float64, device=device)

    def update(self, halves: Sequence[Tensor]) -> None:
        """Takes in row losses `(K, rows)`, in the order of `telescope`; the new weights hold from the next use on."""
        if len(self.n) == 1:
            return
        losses = [half.detach().double() for half in halves]
        fine, coarse = [losses[0], *losses[1::2]], losses[2::2]  # coarse[l] are rows of level l, as fine[l]
        variances, slopes = [], []
        for level, twin in enumerate(coarse):
            variances.append(_pooled_variance(fine[level], twin))
            slopes.append(torch.func.vmap(fit_affine)(twin, fine[level + 1], variances[-1])[0])
        moments = torch.stack([torch.stack(variances, 1), torch.stack(slopes, 1)], 1)  # (K, 2, L)
        moments = torch.where(self._moments.isnan(), moments,
                              self.smoothing * self._moments + (1 - self.smoothing) * moments)
        sound = moments.isfinite().all(2).all(1)[:, None]
        variance, slope = torch.where(sound[..., None], moments, 0.0).unbind(1)
        nought = torch.zeros_like(variance[:, :1])
        # The finest level's own variance does not enter.
        solved = solve_weights(self.n, torch.cat([variance, nought], 1), torch.cat([nought, variance], 1),
                               torch.cat([nought, slope * variance], 1))
        # Losses that are not finite end the training; they tell nothing of the weights.
        self._moments = torch.where(sound[..., None], moments, self._moments)
        # Beyond [0, 1] a weight follows noise of few pairs: levels that agree give 1, unrelated ones 0.
        self.current = torch.where(sound, solved.clamp(0.0, 1.0), self.current)

    def tensors(self) -> dict[str, Tensor]:
        """All that changes, each with a leading axis of members."""
        return {"weights": self.current, "moments": self._moments}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `tensors` gave."""
        self.current, self._moments = tensors["weights"].clone(), tensors["moments"].clone()

    def select(self, members: Sequence[int]) -> None:
        """Goes on with some of the members."""
        self.load({name: tensor[list(members)] for name, tensor in self.tensors().items()})


def _pooled_variance(*groups: Tensor) -> Tensor:
    """Variance `(K,)` of all rows together, each group about its own mean; 0 where no group has two rows."""
    freedom = sum(group.shape[1] - 1 for group in groups)
    total = torch.stack([((group - group.mean(1, keepdim=True)) ** 2).sum(1) for group in groups]).sum(0)
    return total / max(freedom, 1)
