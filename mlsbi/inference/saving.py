r"""Model folders: configuration as JSON, tensors as safetensors, nothing pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.priors import BoxPrior, check_prior

__all__ = ["prior_from_config", "prior_to_config", "read_model", "read_option", "write_model"]

_FORMAT = 2
_OLDEST = 2
T = TypeVar("T")

_CONFIG, _TENSORS = "model.json", "model.safetensors"


def write_model(folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes a model folder; the configuration comes last, so a folder that has it is whole."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": _FORMAT, **config}, indent=1, default=_plain)
    (target / _CONFIG).unlink(missing_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, target / _TENSORS)
    partial = target / (_CONFIG + ".partial")
    partial.write_text(text)
    os.replace(partial, target / _CONFIG)
    return target


def _plain(value: Any) -> Any:
    """Numbers of numpy as numbers of Python."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be saved in a model's configuration.")


def read_model(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `write_model` wrote.

    Raises:
        FileNotFoundError: If the folder holds no whole model.
        ValueError: If it was written by a newer format, or a file is damaged.
    """
    path = Path(folder)
    if not (path / _CONFIG).is_file() or not (path / _TENSORS).is_file():
        raise FileNotFoundError(f"Expected a saved model ({_CONFIG} and {_TENSORS}) in {path}; there is none.")
    try:
        config = json.loads((path / _CONFIG).read_text())
        version = int(config["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / _CONFIG} is not a model configuration: {error}.") from error
    if version > _FORMAT:
        raise ValueError(f"{path} was saved in format {version}; this version reads up to {_FORMAT}. Upgrade mlsbi.")
    if version < _OLDEST:
        raise ValueError(f"{path} was saved in format {version}, before likelihoods and embeddings could be; this "
                         f"version reads from {_OLDEST}. Train and save it again.")
    try:
        tensors = load_file(path / _TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{path / _TENSORS} is damaged or no safetensors file: {error}.") from error
    return config, tensors


def read_option(name: str, read: Callable[[Any], T], saved: Any) -> T:
    """Part of a saved configuration.

    Raises:
        ValueError: If it cannot be read: it was changed by hand, or by something else.
    """
    try:
        return read(saved)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The saved {name} cannot be read ({type(error).__name__}: {error}): the configuration is "
                         "damaged or not this library's.") from error


def prior_to_config(prior: Distribution) -> dict[str, Any] | None:
    """JSON description of a box prior; `None` for any other, which is passed again when loading."""
    if isinstance(prior, BoxPrior):
        return {"low": prior.low.tolist(), "high": prior.high.tolist(), "names": list(prior.names)}
    return None


def prior_from_config(config: Mapping[str, Any] | None, prior: Distribution | None, *, dim: int) -> Distribution:
    """The prior passed by the user, else the saved one.

    Raises:
        ValueError: If there is neither, or it is not over `dim` parameters.
    """
    if prior is not None:
        check_prior(prior)
        if prior.event_shape[0] != dim:
            raise ValueError(f"Expected a prior over {dim} parameters, as the saved one; got {prior.event_shape[0]}.")
        return prior
    if config is None:
        raise ValueError("The model was saved with a prior that is not a BoxPrior; pass it again: load(folder, "
                         "prior=...).")
    return BoxPrior(config["low"], config["high"], config["names"])
