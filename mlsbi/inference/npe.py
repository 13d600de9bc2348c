r"""Neural posterior estimation from coupled simulations."""

from __future__ import annotations

from typing import Any

from torch.distributions import Distribution

from mlsbi.data import MultilevelData
from mlsbi.inference.estimator import Estimator
from mlsbi.inference.posteriors import DirectPosterior
from mlsbi.strategies.fitting import Problem, posterior_problem

__all__ = ["NPE"]


class NPE(Estimator):
    r"""Neural posterior estimation: a density q(theta | x) trained on coupled simulations.

    Args:
        prior: Distribution of theta; the density lives in unbounded space, so it never leaves the support.
        strategy: A strategy, or one of `"multilevel"`, `"transfer"`, `"transfer_then_multilevel"`,
            `"translation"`, `"emulation"`, `"high"`, `"low"`, and `"auto"`, which mixes them.
        density: A density name or builder, such as `NSF(transforms=3)`: `"nsf"`, `"maf"`, `"mdn"`.
        embedding: What turns standardised x `(n, ...)` into vectors `(n, k)` and is trained with the density: `"mlp"`,
            `"cnn"`, `"set"`, a builder such as `SetEmbedding(features=8)`, or a torch module, of which a copy is
            trained (freeze parameters to keep them).
        x_transform: `"asinh"` where outputs have heavy tails.
        training: How networks are trained.
        device: Where they are trained and evaluated.
        seed: Seed of initialisation, held-out rows, batches and dropout.

    Raises:
        ValueError: If a name or the device is unknown, or the prior has no usable support.

    References:
        | Multilevel neural simulation-based inference (Hikida et al., 2025)
        | https://arxiv.org/abs/2506.06087

    Example:
        >>> import torch
        >>> from mlsbi import BoxPrior, MultilevelData, TrainingOptions
        >>> theta = torch.rand(64, 1)
        >>> data = MultilevelData.from_arrays([(theta, theta + 0.1), (theta[:8], theta[:8], theta[:8] + 0.1)])
        >>> npe = NPE(BoxPrior([0.0], [1.0]), training=TrainingOptions(epochs=2), seed=1)
        >>> npe.fit(data, progress=False).posterior([0.5]).sample((5,), seed=2).shape
        torch.Size([5, 1])
    """

    kind = "npe"

    def posterior(self, x_o: Any = None) -> DirectPosterior:
        """The posterior, with `x_o` as its default observation, shape `(...)` or `(1, ...)`."""
        self._check_fitted()
        return DirectPosterior(self.networks, self.prior, x_o)

    def _problem(self, data: MultilevelData, proposal: Distribution) -> Problem:
        return posterior_problem(data, proposal, x_transform=self.x_transform, embedding=self.embedding,
                                 dtype=self.training.dtype)

    def _transformed(self) -> str:
        return "condition"
