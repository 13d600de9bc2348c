r"""Embedding networks: from observations of any shape to the vectors that densities are conditioned on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mlsbi.density.configs import from_config, to_config

__all__ = [
    "CNNEmbedding", "EmbeddingBuilder", "GivenEmbedding", "MLPEmbedding", "SetEmbedding", "embedding_from_config",
    "embedding_to_config", "resolve_embedding", "shared_axes",
]  # fmt: skip


class EmbeddingBuilder(Protocol):
    """Builds an `nn.Module` from standardised rows `(n, *shape)` to vectors `(n, k)`.

    A method `shared(shape) -> axes` may name the axes along which features are exchangeable: they are then
    standardised, and aligned between levels, alike.
    """

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """A fresh network for rows of a shape."""
        ...


@dataclass(frozen=True)
class MLPEmbedding:
    r"""Fully connected layers on the flattened row.

    Args:
        features: Length of the vectors that come out.
        hidden: Width of the hidden layers.
        layers: Hidden layers.

    Example:
        >>> MLPEmbedding(features=8)((5, 2))(torch.zeros(3, 5, 2)).shape
        torch.Size([3, 8])
    """

    features: int = 16
    hidden: int = 64
    layers: int = 2

    def __post_init__(self) -> None:
        _check_positive(self, "features", "hidden", "layers")

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """A fresh network, initialised from torch's global random state."""
        return nn.Sequential(nn.Flatten(), *_layers(_size(shape), self.hidden, self.layers, self.features))

    def shared(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """No axis: every feature has its own scale."""
        return ()


@dataclass(frozen=True)
class CNNEmbedding:
    r"""Convolutions that halve the resolution, averaged to a small grid, then a linear layer.

    Args:
        features: Length of the vectors that come out.
        channels: Channels of each convolution.
        kernel: Width of the kernels, odd.
        grid: Cells a side that the last maps are averaged to.
        dimensions: 1 for series `(length,)` or `(channels, length)`, 2 for images `(height, width)` or
            `(channels, height, width)`; when left out, 1 for rows with one axis, else 2.

    Example:
        >>> CNNEmbedding(features=8, channels=(4, 8))((32, 32))(torch.zeros(3, 32, 32)).shape
        torch.Size([3, 8])
    """

    features: int = 32
    channels: tuple[int, ...] = (16, 32, 64)
    kernel: int = 5
    grid: int = 4
    dimensions: Literal[1, 2] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        _check_positive(self, "features", "kernel", "grid")
        if not self.channels or min(self.channels) < 1 or self.kernel % 2 == 0:
            raise ValueError(f"Expected at least one convolution with channels, and an odd kernel; got {self}.")
        if self.dimensions not in (None, 1, 2):
            raise ValueError(f"Expected dimensions 1, 2 or None; got {self.dimensions}.")

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """A fresh network, initialised from torch's global random state.

        Raises:
            ValueError: If the rows are no series or images.
        """
        spatial = self._spatial(shape)
        given = shape[0] if len(shape) > spatial else 1
        convolution, pool = (nn.Conv1d, nn.AdaptiveAvgPool1d) if spatial == 1 else (nn.Conv2d, nn.AdaptiveAvgPool2d)
        parts: list[nn.Module] = [_Reshape((given, *shape[-spatial:]))]
        for inputs, outputs in zip((given, *self.channels), self.channels, strict=False):
            parts += [convolution(inputs, outputs, self.kernel, stride=2, padding=self.kernel // 2), nn.GELU()]
        parts += [pool(self.grid), nn.Flatten(), nn.Linear(self.channels[-1] * self.grid**spatial, self.features)]
        return nn.Sequential(*parts)

    def shared(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial axes."""
        return tuple(range(len(shape)))[-self._spatial(shape):]

    def _spatial(self, shape: tuple[int, ...]) -> int:
        spatial = self.dimensions or (1 if len(shape) == 1 else 2)
        if len(shape) not in (spatial, spatial + 1):
            raise ValueError(f"Expected rows with {spatial} spatial axes and at most one of channels before them; got "
                             f"shape {shape}. Set dimensions=1 for series, 2 for images.")
        return spatial


@dataclass(frozen=True)
class SetEmbedding:
    r"""The same layers on every element of a set, averaged, and layers on the average; the order is of no account.

    Args:
        features: Length of the vectors that come out.
        hidden: Width of all hidden layers, and of the average.
        layers: Hidden layers before and after averaging.

    References:
        | Deep sets (Zaheer et al., 2017)
        | https://arxiv.org/abs/1703.06114

    Example:
        >>> network, x = SetEmbedding(features=4)((100,)), torch.randn(2, 100)
        >>> torch.allclose(network(x), network(x.flip(1)), atol=1e-6)
        True
    """

    features: int = 16
    hidden: int = 32
    layers: int = 1

    def __post_init__(self) -> None:
        _check_positive(self, "features", "hidden", "layers")

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """A fresh network for sets `(m,)` of numbers or `(m, ...)` of rows, initialised from the global state."""
        if not shape:
            raise ValueError("Expected rows that are sets, (m,) or (m, ...); got single numbers.")
        size = _size(shape[1:])
        before = nn.Sequential(*_layers(size, self.hidden, self.layers, self.hidden))
        after = nn.Sequential(nn.GELU(), *_layers(self.hidden, self.hidden, self.layers, self.features))
        return nn.Sequential(_Reshape((shape[0], size)), before, _Average(), after)

    def shared(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axis of the set's elements."""
        return (0,)


@dataclass(frozen=True)
class GivenEmbedding:
    """A user's network, of which every density trains a copy."""

    module: nn.Module

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """A copy of the network."""
        return copy.deepcopy(self.module)


class _Reshape(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), *self.shape)


class _Average(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows.mean(1)


_EMBEDDINGS: dict[str, Any] = {"mlp": MLPEmbedding, "cnn": CNNEmbedding, "set": SetEmbedding}


def resolve_embedding(embedding: str | nn.Module | EmbeddingBuilder | None) -> EmbeddingBuilder | None:
    """A builder from its name, a builder of copies of a network, or the builder itself.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither.
    """
    if embedding is None:
        return None
    if isinstance(embedding, str):
        if embedding not in _EMBEDDINGS:
            raise ValueError(f"Unknown embedding '{embedding}'; known: {sorted(_EMBEDDINGS)}, or pass a network.")
        built: EmbeddingBuilder = _EMBEDDINGS[embedding]()
        return built
    if isinstance(embedding, nn.Module):
        return GivenEmbedding(embedding)
    if not callable(embedding):
        raise TypeError(f"Expected an embedding's name, a torch module or a builder(shape); got "
                        f"{type(embedding).__name__}.")
    return embedding


def shared_axes(embedding: EmbeddingBuilder | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of a row along which an embedding treats features alike."""
    told = getattr(embedding, "shared", None)
    return tuple(told(shape)) if callable(told) else ()


def embedding_to_config(embedding: EmbeddingBuilder | None) -> dict[str, Any] | bool:
    """JSON description of a builder of this library; `False` for none, `True` for a user's own."""
    if embedding is None:
        return False
    return to_config(_EMBEDDINGS, embedding) or True


def embedding_from_config(config: dict[str, Any]) -> EmbeddingBuilder:
    """Inverse of `embedding_to_config` for builders of this library."""
    built: EmbeddingBuilder = from_config(_EMBEDDINGS, config)
    return built


def _layers(inputs: int, hidden: int, layers: int, outputs: int) -> list[nn.Module]:
    sizes = [inputs, *[hidden] * layers]
    body: list[nn.Module] = []
    for width, following in zip(sizes[:-1], sizes[1:], strict=True):
        body += [nn.Linear(width, following), nn.GELU()]
    return [*body, nn.Linear(hidden, outputs)]


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _check_positive(options: Any, *names: str) -> None:
    if min(getattr(options, name) for name in names) < 1:
        raise ValueError(f"Expected {', '.join(names)} of at least 1; got {options}.")
