r"""What every neural estimator does: train, move, save and load."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from mlsbi.data import MultilevelData
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.embeddings import (
    EmbeddingBuilder,
    embedding_from_config,
    embedding_to_config,
    resolve_embedding,
    shared_axes,
)
from mlsbi.density.mixture import DensityMixture, Network
from mlsbi.density.registry import DensityBuilder, builder_from_config, builder_to_config, resolve_builder
from mlsbi.density.standardise import Standardiser, Transform, check_transform
from mlsbi.inference.saving import prior_from_config, prior_to_config, read_option, write_model
from mlsbi.priors import check_prior
from mlsbi.randomness import check_device, check_seed, seeded
from mlsbi.strategies.fitting import Problem, fit_ensemble, fit_replicates
from mlsbi.strategies.registry import Strategy, resolve_strategy, strategy_from_config, strategy_to_config
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.history import History
from mlsbi.training.options import TrainingOptions

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Estimator"]

_COMMON = ("strategy", "builder", "embedding", "x_transform", "training", "device")


class Estimator(ABC):
    r"""A conditional density trained on coupled simulations.

    To make one: name it in `kind`, say in `_problem` what is a density of what, and give its `posterior`.

    Args:
        prior: Distribution of theta.
        strategy: A strategy, or its name.
        density: A density name or builder.
        embedding: What reads the condition: a name, a builder or a torch module.
        x_transform: What outputs go through before they are standardised.
        training: How networks are trained.
        device: Where they are trained and evaluated.
        seed: Seed of initialisation, held-out rows, batches and dropout.

    Raises:
        ValueError: If a name or the device is unknown, or the prior has no usable support.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        prior: Distribution,
        *,
        strategy: str | Strategy = "multilevel",
        density: str | DensityBuilder = "nsf",
        embedding: str | nn.Module | EmbeddingBuilder | None = None,
        x_transform: Transform = "none",
        training: TrainingOptions | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        check_prior(prior)
        self.prior = prior
        self.strategy: Strategy | None = resolve_strategy(strategy)
        self.builder = resolve_builder(density)
        self.embedding = resolve_embedding(embedding)
        self.x_transform = check_transform(x_transform)
        self.training = training if training is not None else TrainingOptions()
        self.device = check_device(device)
        self.seed = check_seed(seed)
        self._strategy_config: dict[str, Any] = {}
        self.x_shape: tuple[int, ...] = ()
        self.networks: tuple[Network, ...] = ()
        self.histories: tuple[History, ...] = ()

    @abstractmethod
    def _problem(self, data: MultilevelData, proposal: Distribution) -> Problem:
        """The rows to train on: what is a density of what, and what strategies draw more theta from."""

    @abstractmethod
    def _transformed(self) -> str:
        """Which side x is on: `"input"` of the density, or `"condition"`."""

    @abstractmethod
    def posterior(self, x_o: Any = None) -> Any:
        """The posterior, with `x_o` as its default observation."""

    def fit(
        self,
        data: MultilevelData,
        ensemble: int | None = None,
        *,
        proposal: Distribution | None = None,
        start: Estimator | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> Self:
        r"""Trains on coupled simulations.

        Args:
            data: Simulations of all levels.
            ensemble: Networks to train; their equal mixture is used. They differ in initialisation and in the rows
                held out, which pays most when the pairs are few. The strategy's usual number when left out: 5 for
                `"auto"` and `"emulation"`, else 1.
            proposal: What the theta of the data were drawn from where it is not the prior: a truncated prior, inside
                which the density is that of the posterior. Strategies that draw more theta draw them from it.
            start: A trained estimator of the same kind, density and embedding, whose networks training goes on from,
                with the units that they read; strategies that mix others cannot.
            checkpoint: A folder in which the state of the training is kept, every half minute and at the end. Called
                again with the same data, options and seed, training goes on from there with the same result; the
                folder may be deleted once the estimator is saved.
            progress: Whether to show a progress bar.

        Returns:
            This estimator, trained.

        Raises:
            ValueError: If the data does not fit the prior or is too small to hold rows out, or the checkpoint is of
                another training.
            TrainingError: If training gives no network that could be used, or a step does not fit into memory.
        """
        problem, strategy, members = self._prepare(data, ensemble, proposal)
        if start is not None:
            problem = self._going_on(problem, start, data)
        networks, histories = fit_ensemble(
            problem, self.builder, strategy, members=members, embedding=self.embedding,
            options=self.training, device=self.device, seed=self.seed, progress=progress,
            checkpoint=None if checkpoint is None else Checkpoint(Path(checkpoint) / "training"),
        )
        return self._accept(data, networks, histories)

    @classmethod
    def fit_replicates(
        cls,
        estimators: Sequence[Self],
        data: Sequence[MultilevelData],
        ensemble: int | None = None,
        *,
        progress: bool = True,
    ) -> None:
        r"""Trains estimators that differ in seed alone, each on its own data, in one go where that is faster.

        Each is then as after its own `fit`, up to rounding. Benchmarks over many seeds take a fraction of the time.

        Args:
            estimators: Of one kind, with equal strategy, density, embedding, options and device.
            data: One data set for each.
            ensemble: Networks of each; see `fit`.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If numbers or settings differ, or data does not fit.
        """
        if len(estimators) != len(data) or not estimators:
            raise ValueError(f"Expected one data set for each estimator; got {len(data)} for {len(estimators)}.")
        first = estimators[0]
        for other in estimators[1:]:
            if type(other) is not type(first) or any(getattr(other, name) != getattr(first, name)
                                                     for name in _COMMON):
                raise ValueError(f"Expected estimators that differ in their seed alone; {', '.join(_COMMON)} must be "
                                 "equal.")
        prepared = [estimator._prepare(own, ensemble) for estimator, own in zip(estimators, data, strict=True)]
        trained = fit_replicates(
            [problem for problem, _, _ in prepared], first.builder, prepared[0][1], members=prepared[0][2],
            seeds=[estimator.seed for estimator in estimators], embedding=first.embedding, options=first.training,
            device=first.device, progress=progress,
        )
        for estimator, own, (networks, histories) in zip(estimators, data, trained, strict=True):
            estimator._accept(own, networks, histories)

    def _prepare(
        self, data: MultilevelData, ensemble: int | None, proposal: Distribution | None = None
    ) -> tuple[Problem, Strategy, int]:
        """The rows to train on, how, and how many networks, once everything is checked."""
        if not isinstance(data, MultilevelData):
            raise TypeError(f"Expected MultilevelData, as simulate() gives; got {type(data).__name__}. Wrap arrays by "
                            "MultilevelData.from_arrays([(theta, x), (theta, fine, coarse)]).")
        if ensemble is not None and ensemble < 1:
            raise ValueError(f"Expected ensemble >= 1; got {ensemble}.")
        if self.strategy is None:
            raise RuntimeError("This estimator was loaded with a strategy of your own, which is not saved: set "
                               ".strategy before training again.")
        data.check()
        members = getattr(self.strategy, "members", 1) if ensemble is None else ensemble
        return self._problem(data, self.prior if proposal is None else proposal), self.strategy, members

    def _going_on(self, problem: Problem, start: Estimator, data: MultilevelData) -> Problem:
        """The problem of networks that go on from another estimator's."""
        start._check_fitted()
        shape = tuple(data.levels[0].fine.shape[1:])
        alike = all(getattr(start, name) == getattr(self, name) for name in ("builder", "embedding", "x_transform"))
        if type(start) is not type(self) or start.x_shape != shape or not alike \
                or start.training.dtype != self.training.dtype \
                or start.prior.event_shape != self.prior.event_shape:
            raise ValueError("Expected start= of the same kind, density, embedding, x_transform, precision and "
                             f"outputs; got {start}.")
        return problem.going_on(start.networks)

    def _accept(
        self, data: MultilevelData, networks: Sequence[Network], histories: Sequence[History]
    ) -> Self:
        """Takes in what was trained on data."""
        if self.strategy is not None:
            self._strategy_config = strategy_to_config(self.strategy)
        self.networks, self.histories = tuple(networks), tuple(histories)
        self.x_shape = tuple(data.levels[0].fine.shape[1:])
        return self

    @property
    def history(self) -> History:
        """What happened in the training of the first network; `histories` has all."""
        self._check_fitted()
        return self.histories[0]

    def to(self, device: str | torch.device) -> Self:
        """Moves the networks to a device; returns the estimator."""
        self.device = check_device(device)
        for network in self.networks:
            network.to(self.device)
        return self

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes a model folder (JSON and safetensors); `mlsbi.load(folder)` reads it."""
        self._check_fitted()
        config = {
            "estimator": self.kind,
            "prior": prior_to_config(self.prior),
            "parameters": self.prior.event_shape[0],
            "strategy": self._strategy_config,
            "density": builder_to_config(self.builder),
            "embedding": embedding_to_config(self.embedding),
            "x_transform": self.x_transform,
            "training": asdict(self.training),
            "seed": self.seed,
            "x_shape": list(self.x_shape),
            "input_shape": list(self.networks[0].input_scaler.mean.shape),
            "condition_shape": list(self.networks[0].condition_scaler.mean.shape),
            "members": len(self.networks),
            "parts": len(self.networks[0].parts) if isinstance(self.networks[0], DensityMixture) else None,
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
        embedding: nn.Module | EmbeddingBuilder | None,
        device: str | torch.device,
    ) -> Self:
        """Rebuilds an estimator from what `save` wrote.

        Raises:
            ValueError: If a prior, density or embedding of the user's own was not passed again, or does not fit.
        """
        if density is None and config["density"] is None:
            raise ValueError("The model was saved with a density of your own; pass it again: load(folder, density=...)")
        if config["embedding"] is True and embedding is None:
            raise ValueError("The model was saved with an embedding; pass it again: load(folder, embedding=...).")
        if embedding is None and config["embedding"]:
            embedding = read_option("embedding", embedding_from_config, config["embedding"])
        loaded = cls(
            read_option("prior", lambda saved: prior_from_config(saved, prior, dim=config["parameters"]),
                        config["prior"]),
            density=density if density is not None else read_option("density", builder_from_config, config["density"]),
            embedding=embedding, x_transform=config["x_transform"],
            training=read_option("training", lambda saved: TrainingOptions(**saved), config["training"]),
            device=device, seed=config["seed"],
        )
        loaded._strategy_config = dict(config["strategy"])
        loaded.strategy = read_option("strategy", strategy_from_config, config["strategy"])
        loaded.x_shape = tuple(config["x_shape"])
        loaded.histories = read_option("histories", lambda saved: tuple(map(History.read, saved)), config["histories"])
        loaded.networks = tuple(
            loaded._rebuild(config, {name.partition(".")[2]: tensor for name, tensor in tensors.items()
                                     if name.partition(".")[0] == str(member)})
            for member in range(config["members"])
        )
        return loaded

    def _rebuild(self, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Network:
        """One network with saved tensors."""
        condition_shape = tuple(config["condition_shape"])
        shared = shared_axes(self.embedding, condition_shape)
        input_scaler, condition_scaler = (
            Standardiser(torch.zeros(config[f"{side}_shape"]), torch.ones(config[f"{side}_shape"]),
                         transform=self.x_transform if side == self._transformed() else "none",
                         shared=shared if side == "condition" else (), dtype=self.training.dtype)
            for side in ("input", "condition")
        )
        with seeded(0):  # values are overwritten next; only the global state matters
            built = None if self.embedding is None else self.embedding(condition_shape)
            part = ConditionalDensity(self.builder, input_scaler, condition_scaler, built)
        part.embedding.to(self.training.dtype)
        part.density.to(self.training.dtype)
        network: Network = part
        if config.get("parts") is not None:
            network = DensityMixture([part, *(copy.deepcopy(part) for _ in range(config["parts"] - 1))])
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"The saved tensors do not fit the density or embedding given: {error}") from error
        return network.to(self.device).eval()

    def _check_fitted(self) -> None:
        if not self.networks:
            raise RuntimeError("This estimator is not trained yet: call .fit(data) first.")

    def __repr__(self) -> str:
        state = f"{len(self.networks)} networks" if self.networks else "not trained"
        return f"{type(self).__name__}({self.strategy}, {self.builder}, {state})"
