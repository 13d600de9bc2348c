r"""What the bounds are about: the loss of each row, or its derivatives in a network's parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from mlsbi.density.standardise import Standardiser
from mlsbi.randomness import child_seed
from theory_checks.coordinates import Estimator
from theory_checks.densities import Constants

__all__ = ["Evaluated", "Gradient", "Integrand", "Loss", "as_density"]


@dataclass(frozen=True)
class Evaluated:
    r"""Components of an integrand at n rows, and their derivatives in v = (theta, x).

    Args:
        values: Shape `(n, components)`.
        theta: Derivatives in theta, `(n, components, D)`.
        x: Derivatives in the outputs, flattened, `(n, components, d)`.
    """

    values: Tensor
    theta: Tensor
    x: Tensor


class Integrand(Protocol):
    """A function of theta and x with one or more components, differentiable in both."""

    @property
    def names(self) -> tuple[str, ...]:
        """One name per component."""

    @property
    def growth(self) -> Tensor | None:
        """Known growth constants (A3), `(components,)`."""

    @property
    def lipschitz(self) -> Tensor | None:
        """Known global Lipschitz constants of the derivative (A3), `(components,)`."""

    def values(self, theta: Tensor, x: Tensor) -> Tensor:
        """Its components `(n, components)` at theta `(n, D)` and x `(n, ...)`, float64."""

    def evaluate(self, theta: Tensor, x: Tensor) -> Evaluated:
        """Values and derivatives."""


class Loss:
    r"""The loss -log q of a conditional density.

    Args:
        density: Has `log_prob(input, condition)`; or a function `log_q(theta, x)`. What has `constants` (of
            `theory_checks.densities`) has known growth and Lipschitz constants.
        estimator: Whether the density is of theta given x (`"npe"`) or of x given theta (`"nle"`).
    """

    names: tuple[str, ...] = ("loss",)

    def __init__(self, density: Any, estimator: Estimator) -> None:
        self._density = as_density(density)
        self._log_q = _log_q(self._density, estimator)
        constants: Constants | None = getattr(density, "constants", None)
        self.growth = None if constants is None else torch.tensor([constants.growth], dtype=torch.float64)
        self.lipschitz = None if constants is None else torch.tensor([constants.lipschitz], dtype=torch.float64)

    def values(self, theta: Tensor, x: Tensor) -> Tensor:
        """One component."""
        with torch.no_grad():
            return self._loss(theta, x)[:, None]

    def evaluate(self, theta: Tensor, x: Tensor) -> Evaluated:
        """One component, and its derivatives."""
        theta, x = theta.detach().requires_grad_(), x.detach().requires_grad_()
        loss = self._loss(theta, x)
        if loss.requires_grad:
            slopes = torch.autograd.grad(loss.sum(), (theta, x), materialize_grads=True)
        else:  # a density that is constant
            slopes = torch.zeros_like(theta), torch.zeros_like(x)
        return Evaluated(loss.detach()[:, None], slopes[0][:, None], slopes[1].flatten(1)[:, None])

    def _loss(self, theta: Tensor, x: Tensor) -> Tensor:
        try:
            loss = -self._log_q(theta, x)
        except RuntimeError as error:
            raise ValueError(f"The density cannot read theta of shape {tuple(theta.shape)} and x of shape "
                             f"{tuple(x.shape)}: {error}") from error
        if loss.shape != (len(theta),):
            raise ValueError(f"Expected log densities of shape ({len(theta)},); got {tuple(loss.shape)}.")
        return loss


class Gradient:
    r"""The gradient of the loss in a network's parameters, one component a parameter (theorem 3).

    Args:
        density: An `nn.Module` with `log_prob(input, condition)` that `torch.func` can differentiate row by row.
        estimator: Whether it is of theta given x (`"npe"`) or of x given theta (`"nle"`).
        most: Parameters to look at; where there are more, so many of them at random.
        seed: Of that choice.

    Raises:
        ValueError: If the density has no parameters.
    """

    def __init__(self, density: Any, estimator: Estimator, *, most: int = 200, seed: int = 0) -> None:
        if most < 1:
            raise ValueError(f"Expected to look at 1 parameter at least; got {most}.")
        module = as_density(density)
        if not isinstance(module, nn.Module):
            raise ValueError(f"Expected a density with parameters (an nn.Module); got {type(density).__name__}.")
        self._call, self._npe = _Call(module), estimator == "npe"
        every = {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        self._fixed = {f"density.{name}": tensor for name, tensor in every.items()}
        trained = [(f"density.{name}", tensor) for name, tensor in module.named_parameters() if tensor.requires_grad]
        if not trained:
            raise ValueError(f"Expected a density with parameters to train; {type(module).__name__} has none.")
        total = sum(tensor.numel() for _, tensor in trained)
        generator = torch.Generator().manual_seed(child_seed(seed, 7))
        chosen = torch.randperm(total, generator=generator)[:most].sort().values
        self._chosen: list[tuple[str, Tensor]] = []
        names, start = [], 0
        for name, tensor in trained:
            own = chosen[(chosen >= start) & (chosen < start + tensor.numel())] - start
            if len(own):
                self._chosen.append((name, own))
                names += [f"{name.removeprefix('density.')}[{index}]" for index in own.tolist()]
            start += tensor.numel()
        self.names = tuple(names)
        known = getattr(density, "gradient_constants", None)
        self.growth = None if known is None else self._pick({f"density.{k}": v.growth for k, v in known.items()})
        self.lipschitz = None if known is None else self._pick({f"density.{k}": v.lipschitz for k, v in known.items()})

    def _pick(self, tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].flatten()[index] for name, index in self._chosen])

    def values(self, theta: Tensor, x: Tensor) -> Tensor:
        """One component per chosen parameter."""
        loss = self._loss(theta.shape[1], x.shape[1:])
        return vmap(lambda v: self._pick(grad(loss)(self._wanted, v)))(torch.cat([theta, x.flatten(1)], 1).detach())

    def evaluate(self, theta: Tensor, x: Tensor) -> Evaluated:
        """The same with derivatives: those in the parameters of each derivative in v."""
        loss, dim = self._loss(theta.shape[1], x.shape[1:]), theta.shape[1]
        of_v = jacrev(grad(loss, argnums=1))

        def both(v: Tensor) -> tuple[Tensor, Tensor]:
            mixed = of_v(self._wanted, v)  # of each parameter (D + d, its shape)
            slopes = torch.cat([mixed[name].flatten(1)[:, index] for name, index in self._chosen], 1)
            return self._pick(grad(loss)(self._wanted, v)), slopes.T

        values, slopes = vmap(both)(torch.cat([theta, x.flatten(1)], 1).detach())
        return Evaluated(values, slopes[..., :dim], slopes[..., dim:])

    @property
    def _wanted(self) -> dict[str, Tensor]:
        return {name: self._fixed[name] for name, _ in self._chosen}

    def _loss(self, dim: int, shape: Sequence[int]) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        """The loss of one row, as a function of the parameters and its v."""

        def loss(parameters: dict[str, Tensor], v: Tensor) -> Tensor:
            own, output = v[None, :dim], v[None, dim:].reshape(1, *shape)
            pair = (own, output) if self._npe else (output.flatten(1), own)
            found: Tensor = functional_call(self._call, {**self._fixed, **parameters}, pair)
            return found

        return loss


class _Call(nn.Module):
    """The loss of one row as a module's call."""

    def __init__(self, density: nn.Module) -> None:
        super().__init__()
        self.density = density

    def forward(self, input: Tensor, condition: Tensor) -> Tensor:
        return -self.density.log_prob(input, condition).sum()  # type: ignore[operator]


def as_density(density: Any) -> Any:
    r"""What has `log_prob(input, condition)`, in float64, or a function, from what users have.

    Args:
        density: A density, a function, or a fitted `NPE` or `NLE`, of which the first network is taken.

    Raises:
        TypeError: If it is none of them.
        ValueError: If an estimator was not fitted.
    """
    if hasattr(density, "networks"):
        if not density.networks:
            raise ValueError("Expected a fitted estimator; call .fit(data) first.")
        density = density.networks[0]
    if isinstance(density, nn.Module):
        exact = copy.deepcopy(density).cpu().double().eval()
        for part in exact.modules():
            if isinstance(part, Standardiser):  # which returns the precision of training, whatever it is given
                part.dtype = torch.float64
        return exact
    if not callable(density) and not hasattr(density, "log_prob"):
        raise TypeError(f"Expected a density with log_prob(input, condition), a function log_q(theta, x), or a fitted "
                        f"estimator; got {type(density).__name__}.")
    return density


def _log_q(density: Any, estimator: Estimator) -> Callable[[Tensor, Tensor], Tensor]:
    if not hasattr(density, "log_prob"):
        return lambda theta, x: density(theta, x)
    if estimator == "npe":
        return lambda theta, x: density.log_prob(theta, x)
    return lambda theta, x: density.log_prob(x.flatten(1), theta)
