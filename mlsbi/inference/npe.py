r"""Neural posterior estimation from coupled simulations."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from mlsbi.data import MultilevelData
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.flows import DensityBuilder, builder_from_config, builder_to_config, resolve_builder
from mlsbi.density.standardise import Standardiser
from mlsbi.inference.posteriors import DirectPosterior
from mlsbi.inference.saving import prior_from_config, prior_to_config, write_model
from mlsbi.priors import check_prior
from mlsbi.randomness import check_device, check_seed, seeded
from mlsbi.strategies.fitting import fit_ensemble, posterior_problem
from mlsbi.strategies.registry import Strategy, resolve_strategy, strategy_from_config, strategy_to_config
from mlsbi.training.loop import History, TrainingOptions

__all__ = ["NPE"]


class NPE:
    r"""Neural posterior estimation: a density q(theta | x) trained on coupled simulations.

    Args:
        prior: Distribution of theta; the density lives in unbounded space, so it never leaves the support.
        strategy: A strategy, or one of `"multilevel"`, `"high"`, `"low"`.
        density: A density name or builder, such as `NSF(transforms=3)`.
        embedding: Network from standardised x `(n, ...)` to vectors `(n, k)`. A copy is trained with the density;
            freeze parameters to keep them.
        training: How networks are trained.
        device: Where they are trained and evaluated.
        seed: Seed of initialisation, held-out rows, batches and dropout.

    Raises:
        ValueError: If a name or the device is unknown, or the prior has no usable support.

    References:
        | Multilevel neural simulation-based inference (Hikida et al., 2025)
        | https://arxiv.org/abs/2506.06087

    Example:
        >>> from mlsbi import BoxPrior, MultilevelData
        >>> theta = torch.rand(64, 1)
        >>> data = MultilevelData.from_arrays([(theta, theta + 0.1), (theta[:8], theta[:8], theta[:8] + 0.1)])
        >>> npe = NPE(BoxPrior([0.0], [1.0]), training=TrainingOptions(epochs=2), seed=1)
        >>> npe.fit(data, progress=False).posterior([0.5]).sample((5,), seed=2).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        prior: Distribution,
        *,
        strategy: str | Strategy = "multilevel",
        density: str | DensityBuilder = "nsf",
        embedding: nn.Module | None = None,
        training: TrainingOptions | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        check_prior(prior)
        self.prior = prior
        self.strategy: Strategy | None = resolve_strategy(strategy)
        self.builder = resolve_builder(density)
        self.embedding = embedding
        self.training = training if training is not None else TrainingOptions()
        self.device = check_device(device)
        self.seed = check_seed(seed)
        self._strategy_config: dict[str, Any] = {}
        self.networks: tuple[ConditionalDensity, ...] = ()
        self.histories: tuple[History, ...] = ()

    def fit(self, data: MultilevelData, ensemble: int = 1, *, progress: bool = True) -> NPE:
        r"""Trains on coupled simulations.

        Args:
            data: Simulations of all levels.
            ensemble: Networks to train; the posterior is their equal mixture. They differ in initialisation and in
                the rows held out, which pays most when the pairs are few.
            progress: Whether to show a progress bar.

        Returns:
            This estimator, trained.

        Raises:
            ValueError: If the data does not fit the prior or is too small to hold rows out.
        """
        if not isinstance(data, MultilevelData):
            raise TypeError(f"Expected MultilevelData, as simulate() gives; got {type(data).__name__}. Wrap arrays by "
                            "MultilevelData.from_arrays([(theta, x), (theta, fine, coarse)]).")
        if ensemble < 1:
            raise ValueError(f"Expected ensemble >= 1; got {ensemble}.")
        if self.strategy is None:
            raise RuntimeError("This estimator was loaded with a strategy of your own, which is not saved: set "
                               ".strategy before training again.")
        data.check()
        networks, histories = fit_ensemble(
            posterior_problem(data, self.prior), self.builder, self.strategy, members=ensemble,
            embedding=self.embedding, options=self.training, device=self.device, seed=self.seed, progress=progress,
        )
        self.networks, self.histories = tuple(networks), tuple(histories)
        self._strategy_config = strategy_to_config(self.strategy)
        return self

    @property
    def history(self) -> History:
        """What happened in the training of the first network; `histories` has all."""
        self._check_fitted()
        return self.histories[0]

    def posterior(self, x_o: Any = None) -> DirectPosterior:
        """The posterior, with `x_o` as its default observation, shape `(...)` or `(1, ...)`."""
        self._check_fitted()
        return DirectPosterior(self.networks, self.prior, x_o)

    def to(self, device: str | torch.device) -> NPE:
        """Moves the networks to a device; returns the estimator."""
        self.device = check_device(device)
        for network in self.networks:
            network.to(self.device)
        return self

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes a model folder (JSON and safetensors); `mlsbi.load(folder)` reads it."""
        self._check_fitted()
        config = {
            "estimator": "npe",
            "prior": prior_to_config(self.prior),
            "strategy": self._strategy_config,
            "density": builder_to_config(self.builder),
            "embedding": self.embedding is not None,
            "training": asdict(self.training),
            "seed": self.seed,
            "x_shape": list(self.networks[0].condition_scaler.mean.shape),
            "parameters": self.prior.event_shape[0],
            "dim": self.networks[0].input_scaler.mean.numel(),
            "members": len(self.networks),
            "histories": [asdict(history) for history in self.histories],
        }
        tensors = {f"{index}.{name}": tensor for index, network in enumerate(self.networks)
                   for name, tensor in network.state_dict().items()}
        return write_model(folder, config, tensors)

    @classmethod
    def from_saved(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        prior: Distribution | None,
        density: DensityBuilder | None,
        embedding: nn.Module | None,
        device: str | torch.device,
    ) -> NPE:
        """Rebuilds an estimator from what `save` wrote.

        Raises:
            ValueError: If a prior, density or embedding of the user's own was not passed again, or does not fit.
        """
        if density is None and config["density"] is None:
            raise ValueError("The model was saved with a density of your own; pass it again: load(folder, density=...)")
        if config["embedding"] and embedding is None:
            raise ValueError("The model was saved with an embedding; pass it again: load(folder, embedding=...).")
        builder = density if density is not None else builder_from_config(config["density"])
        npe = cls(
            prior_from_config(config["prior"], prior, dim=config["parameters"]), density=builder, embedding=embedding,
            training=TrainingOptions(**config["training"]), device=device, seed=config["seed"],
        )
        npe._strategy_config = dict(config["strategy"])
        npe.strategy = strategy_from_config(config["strategy"])
        npe.histories = tuple(History(**history) for history in config["histories"])
        networks = []
        for member in range(config["members"]):
            theta_scaler, x_scaler = (Standardiser(torch.zeros(shape), torch.ones(shape))
                                      for shape in (config["dim"], config["x_shape"]))
            with seeded(0):  # values are overwritten next; only the global state matters
                network = ConditionalDensity(builder, theta_scaler, x_scaler, copy.deepcopy(embedding))
            start = f"{member}."
            state = {name[len(start):]: tensor for name, tensor in tensors.items() if name.startswith(start)}
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(f"The saved tensors do not fit the density or embedding given: {error}") from error
            networks.append(network.to(npe.device).eval())
        npe.networks = tuple(networks)
        return npe

    def _check_fitted(self) -> None:
        if not self.networks:
            raise RuntimeError("This estimator is not trained yet: call .fit(data) first.")

    def __repr__(self) -> str:
        state = f"{len(self.networks)} networks" if self.networks else "not trained"
        return f"NPE({self.strategy}, {self.builder}, {state})"
