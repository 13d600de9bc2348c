r"""Neural likelihood estimation from coupled simulations."""

from __future__ import annotations

from typing import Any

from torch.distributions import Distribution

from mlsbi.data import MultilevelData
from mlsbi.inference.estimator import Estimator
from mlsbi.inference.likelihoods import NeuralLikelihood
from mlsbi.inference.mcmc_posterior import MCMCOptions, MCMCPosterior
from mlsbi.strategies.fitting import Problem, likelihood_problem

__all__ = ["NLE"]


class NLE(Estimator):
    r"""Neural likelihood estimation: a density q(x | theta) trained on coupled simulations.

    Its posterior takes any number of independent observations at the same parameters, without training again, and is
    sampled by MCMC.

    Args:
        prior: Distribution of theta; chains run in unbounded space, so they never leave the support.
        strategy: A strategy, or one of `"multilevel"`, `"transfer"`, `"transfer_then_multilevel"`,
            `"translation"`, `"high"`, `"low"`, and `"auto"`, which mixes them.
        density: A density name or builder, such as `NSF(transforms=3)`: `"nsf"`, `"maf"`, `"mdn"`.
        embedding: What reads theta, where it is more than a few numbers; see `NPE`.
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
        >>> nle = NLE(BoxPrior([0.0], [1.0]), training=TrainingOptions(epochs=2), seed=1).fit(data, progress=False)
        >>> nle.posterior([[0.5], [0.4], [0.6]]).log_prob(theta[:4]).shape  # three independent observations
        torch.Size([4])
    """

    kind = "nle"

    @property
    def likelihood(self) -> NeuralLikelihood:
        """The likelihood of one output: its log density, and draws from it."""
        self._check_fitted()
        return NeuralLikelihood(self.networks, self.prior, self.x_shape)

    def posterior(self, x_o: Any = None, *, mcmc: MCMCOptions | None = None) -> MCMCPosterior:
        """The posterior given m independent observations `(m, ...)`, or one `(...)`, as its default.

        Args:
            x_o: Observations.
            mcmc: How it is sampled.
        """
        return MCMCPosterior(self.likelihood, self.prior, self.x_shape, x_o, mcmc=mcmc)

    def _problem(self, data: MultilevelData, proposal: Distribution) -> Problem:
        return likelihood_problem(data, proposal, x_transform=self.x_transform, dtype=self.training.dtype)

    def _transformed(self) -> str:
        return "input"
