r"""What a pilot takes variances of: the loss, its gradient, the outputs, or a function of the user's.

Adding one takes a class, and a line in `_INTEGRANDS` if it has a name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mlsbi.allocation.arrays import Array
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.training.objective import Term

__all__ = ["Function", "Gradient", "Integrand", "IntegrandLike", "Loss", "Output", "Rows", "resolve_integrand"]

IntegrandLike: TypeAlias = Literal["loss", "gradient", "output"] | Callable[[Tensor, Tensor], Any]

_BLOCK_BYTES = 1 << 28  # of per-sample gradients held at once; more parameters are taken in several groups
_CHUNK_ROWS = 256  # whose activations are held at once


@dataclass(frozen=True)
class Rows:
    r"""The same rows at several levels.

    Args:
        theta: Parameters, shape `(n, D)`.
        outputs: Output of each level, each `(n, ...)`.
        terms: What a network reads of each level: standardised, float64.
    """

    theta: Tensor
    outputs: tuple[Tensor, ...]
    terms: tuple[Term, ...]

    def __len__(self) -> int:
        return len(self.theta)

    def rows(self, index: Tensor) -> Rows:
        """The rows that `index` picks."""
        return Rows(self.theta[index], tuple(x[index] for x in self.outputs),
                    tuple(term.rows(index) for term in self.terms))


class Integrand(Protocol):
    r"""What is integrated: numbers per row and level.

    `needs_network` says whether it depends on one; `name` is what tables call it.
    """

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def needs_network(self) -> bool:
        """Whether it depends on a network."""

    def blocks(self, network: ConditionalDensity | None, rows: Rows) -> Iterator[Array]:
        """Its components at every level, some at a time, each block `(levels, n, components)`, float64."""


@dataclass(frozen=True)
class Loss:
    """The loss of each row, -log q, in standardised coordinates."""

    name: str = "loss"
    needs_network: bool = True

    def blocks(self, network: ConditionalDensity | None, rows: Rows) -> Iterator[Array]:
        """One component."""
        exact, device = _exact(network)
        with torch.no_grad():
            losses = [-exact.standard_log_prob(term.input.to(device), term.fine.to(device)) for term in rows.terms]
        yield torch.stack(losses).cpu().numpy()[..., None]


@dataclass(frozen=True)
class Gradient:
    r"""The gradient of each row's loss in the network's parameters: what training averages (METHOD 4, theorem 3).

    Its variance is the trace of its covariance. Gradients of all rows are taken at once, by `torch.func`.
    """

    name: str = "gradient"
    needs_network: bool = True

    def blocks(self, network: ConditionalDensity | None, rows: Rows) -> Iterator[Array]:
        """One component per trained parameter, parameters of many rows in several groups.

        Raises:
            ValueError: If the network cannot be differentiated row by row.
        """
        exact, device = _exact(network)
        fixed = {name: tensor.detach() for name, tensor in (*exact.named_parameters(), *exact.named_buffers())}
        trained = [name for name, parameter in exact.named_parameters() if parameter.requires_grad]
        loss = _RowLoss(exact)
        for group in _groups([(name, fixed[name].numel()) for name in trained], len(rows.terms) * len(rows)):
            chosen = {name: fixed[name] for name in group}

            def of_row(parameters: dict[str, Tensor], input: Tensor, condition: Tensor) -> Tensor:
                everything = {f"network.{name}": tensor for name, tensor in {**fixed, **parameters}.items()}
                found: Tensor = functional_call(loss, everything, (input[None], condition[None]))
                return found

            by_row = vmap(grad(of_row), in_dims=(None, 0, 0))
            levels = []
            for term in rows.terms:
                parts = []
                for input, condition in zip(term.input.split(_CHUNK_ROWS), term.fine.split(_CHUNK_ROWS), strict=True):
                    try:
                        found = by_row(chosen, input.to(device), condition.to(device))
                    except torch.OutOfMemoryError:
                        raise
                    except RuntimeError as error:
                        raise ValueError("This network cannot be differentiated row by row, as integrand=\"gradient\" "
                                         f"needs: {error} Use integrand=\"loss\".") from error
                    parts.append(torch.cat([found[name].flatten(1) for name in group], 1).cpu())
                levels.append(torch.cat(parts))
            yield torch.stack(levels).numpy()


@dataclass(frozen=True)
class Output:
    """The simulator's outputs, standardised alike at all levels."""

    name: str = "output"
    needs_network: bool = False

    def blocks(self, network: ConditionalDensity | None, rows: Rows) -> Iterator[Array]:
        """One component per number of an output."""
        yield torch.stack([term.outputs[0].flatten(1) for term in rows.terms]).numpy()


@dataclass(frozen=True)
class Function:
    r"""A function of the user's.

    Args:
        function: `function(theta, x)` with theta `(n, D)` and x `(n, ...)`, both float64, gives `(n,)`, or `(n, k)`,
            whose variances are added up: scale what has other units.
    """

    function: Callable[[Tensor, Tensor], Any]
    needs_network: bool = False

    @property
    def name(self) -> str:
        """The function's own name."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def blocks(self, network: ConditionalDensity | None, rows: Rows) -> Iterator[Array]:
        """What the function gives.

        Raises:
            ValueError: If it gives another shape, or numbers that are not finite.
        """
        with torch.no_grad():
            # In float64 before the user's arithmetic, so that small differences between levels keep their digits.
            theta, outputs = rows.theta.double(), [x.double() for x in rows.outputs]
            found = [self._checked(self.function(theta, x), len(rows)) for x in outputs]
        if len({values.shape for values in found}) > 1:
            raise ValueError(f"Expected the integrand to give one shape at all levels; got "
                             f"{[values.shape for values in found]}.")
        yield np.stack(found)

    def _checked(self, values: Any, n: int) -> Array:
        array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
        if array.ndim not in (1, 2) or len(array) != n or not array.size:
            raise ValueError(f"Expected the integrand to give shape ({n},) or ({n}, k) for {n} rows; got "
                             f"{array.shape}.")
        if not np.isfinite(array).all():
            raise ValueError(f"Expected finite numbers from the integrand; {int((~np.isfinite(array)).sum())} of "
                             f"{array.size} are not.")
        return array.reshape(n, -1)


_INTEGRANDS: dict[str, Integrand] = {each.name: each for each in (Loss(), Gradient(), Output())}


def resolve_integrand(integrand: IntegrandLike) -> Integrand:
    """An integrand from its name or from a function.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> resolve_integrand("gradient").needs_network, resolve_integrand(lambda theta, x: x.sum(1)).needs_network
        (True, False)
    """
    if isinstance(integrand, str) and integrand in _INTEGRANDS:
        return _INTEGRANDS[integrand]
    if isinstance(integrand, str) or not callable(integrand):
        names = ", ".join(f'"{name}"' for name in _INTEGRANDS)
        raise ValueError(f"Expected integrand {names} or a function(theta, x); got {integrand!r}.")
    return Function(integrand)


class _RowLoss(nn.Module):
    """The summed loss of rows as a module's call."""

    def __init__(self, network: ConditionalDensity) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor, condition: Tensor) -> Tensor:
        return -self.network.standard_log_prob(input, condition).sum()


def _exact(network: ConditionalDensity | None) -> tuple[ConditionalDensity, torch.device]:
    """A float64 copy of a network in eval mode, and where it is."""
    if network is None:
        raise ValueError("This integrand needs a network.")
    exact = copy.deepcopy(network).double().eval()
    return exact, next(exact.parameters()).device


def _groups(sizes: list[tuple[str, int]], rows: int) -> Iterator[list[str]]:
    """Parameters in groups whose per-sample gradients fit into the memory set aside for them."""
    group: list[str] = []
    held = 0
    for name, size in sizes:
        if group and (held + size) * rows * 8 > _BLOCK_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group
