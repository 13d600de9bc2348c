r"""Reading saved estimators back."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.distributions import Distribution

from mlsbi.density.embeddings import EmbeddingBuilder
from mlsbi.density.registry import DensityBuilder
from mlsbi.inference.nle import NLE
from mlsbi.inference.npe import NPE
from mlsbi.inference.saving import read_model

__all__ = ["load"]

_ESTIMATORS: dict[str, type[NPE] | type[NLE]] = {kind.kind: kind for kind in (NPE, NLE)}


def load(
    folder: str | os.PathLike[str],
    prior: Distribution | None = None,
    density: DensityBuilder | None = None,
    embedding: nn.Module | EmbeddingBuilder | None = None,
    *,
    device: str | torch.device = "cpu",
) -> NPE | NLE:
    r"""Reads an estimator that `save` wrote; nothing in the folder is executed.

    Args:
        folder: Model folder.
        prior: The prior, needed again when it is not a `BoxPrior`.
        density: The density builder, needed again when it is your own.
        embedding: The embedding, needed again when it is your own.
        device: Where to put it.

    Raises:
        FileNotFoundError: If there is no whole model.
        ValueError: If it is damaged, of a newer format, or needs one of the objects above.
    """
    config, tensors = read_model(folder)
    if config.get("estimator") not in _ESTIMATORS:
        raise ValueError(f"Unknown estimator {config.get('estimator')!r} in {folder}; known: {sorted(_ESTIMATORS)}.")
    kind = _ESTIMATORS[config["estimator"]]
    try:
        return kind.from_saved(config, tensors, prior=prior, density=density, embedding=embedding, device=device)
    except KeyError as error:
        raise ValueError(f"The configuration in {folder} lacks {error}: it is damaged or not ours.") from error
