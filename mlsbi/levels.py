r"""Levels of fidelity and the stack that couples them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution

from mlsbi.priors import check_prior, parameter_names

__all__ = ["Level", "LevelStack", "Noise", "campaign_cost", "map_noise", "sum_pair_costs"]

Noise = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""Base noise of n rows: a tensor, or a tuple or dict of tensors, each with leading dimension n."""


@dataclass(frozen=True)
class Level:
    r"""One simulator of a stack.

    Args:
        name: What plots, tables and errors call it.
        simulate: `simulate(theta, noise) -> x`, with theta `(n, D)`, noise of n rows, x `(n, ...)`. It is a pure
            function: the same inputs give the same output, and its inputs are not changed.
        cost: Cost of one run in any unit; `None` to have it measured, in seconds.
        parameters: Names of the prior's parameters that this level has, in the order in which `simulate` reads them;
            all of them when left out. The stack draws all parameters for every level, and those that a level lacks are
            dummies there: its rows teach their prior.

    Raises:
        TypeError: If `simulate` cannot be called, or `parameters` is one text.
        ValueError: If the cost is not positive and finite, or parameters are missing or repeat.
    """

    name: str
    simulate: Callable[[Tensor, Any], Tensor]
    cost: float | None = None
    parameters: Sequence[str] | None = None
    columns: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)
    """Places of its parameters in theta, once the level is in a stack."""

    def __post_init__(self) -> None:
        if not callable(self.simulate):
            raise TypeError(f"Expected a function simulate(theta, noise) for level '{self.name}'; got "
                            f"{type(self.simulate).__name__}.")
        if self.cost is not None and not (math.isfinite(self.cost) and self.cost > 0):
            raise ValueError(f"Expected a positive, finite cost for level '{self.name}'; got {self.cost}.")
        if self.parameters is None:
            return
        if isinstance(self.parameters, str):
            raise TypeError(f"Expected a list of parameter names for level '{self.name}'; got the text "
                            f"{self.parameters!r}.")
        object.__setattr__(self, "parameters", tuple(map(str, self.parameters)))
        if not self.parameters or len(set(self.parameters)) != len(self.parameters):
            raise ValueError(f"Expected different parameter names for level '{self.name}', at least one; got "
                             f"{list(self.parameters)}.")

    def own(self, theta: Tensor) -> Tensor:
        """The parameters `(n, d)` that this level reads, out of all `(n, D)`."""
        return theta if self.columns is None else theta[..., list(self.columns)]

    def run(self, theta: Tensor, noise: Any) -> Tensor:
        """Runs the simulator with its own parameters, out of all `(n, D)`."""
        return self.simulate(self.own(theta), noise)

    def placed(self, names: Sequence[str]) -> Level:
        """This level in a stack whose prior has these parameters.

        Raises:
            ValueError: If the prior lacks one of the level's parameters.
        """
        if self.parameters is None:
            return self
        unknown = [name for name in self.parameters if name not in names]
        if unknown:
            raise ValueError(f"Level '{self.name}' has the parameters {unknown}, which the prior lacks; it has "
                             f"{list(names)}. Name a BoxPrior's parameters by names=[...].")
        placed = replace(self)
        object.__setattr__(placed, "columns", tuple(list(names).index(name) for name in self.parameters))
        return placed


@dataclass(frozen=True)
class LevelStack:
    r"""A prior, the base noise, and simulators of growing fidelity that share both.

    Two levels run at the same `(theta, noise)` are coupled: their difference is small where the cheap one is good.
    A level that needs less noise reads a part of it.

    Args:
        prior: Distribution of theta, over vectors.
        noise: `noise(n, generator)` draws the base noise of n rows; `"seed"` gives every row one 64-bit seed,
            for black boxes.
        levels: Simulators, cheapest first.
        pair_costs: Cost of one row of each level's term, shape `(L + 1,)`, when it is not the sum of the fine and
            the coarse run (a coarse run may come for free). Entry 0 is level 0's own cost.

    Raises:
        ValueError: If costs do not ascend, are declared for some levels only, names repeat, or the prior has no
            usable support.

    Example:
        >>> from mlsbi.priors import BoxPrior
        >>> stack = LevelStack(
        ...     prior=BoxPrior([0.0], [1.0]),
        ...     noise=lambda n, generator: torch.randn(n, 1, generator=generator),
        ...     levels=[
        ...         Level("rounded", lambda theta, noise: (theta + noise).round(), cost=1.0),
        ...         Level("exact", lambda theta, noise: theta + noise, cost=10.0),
        ...     ],
        ... )
        >>> stack.names, stack.costs, stack.row_costs
        (('rounded', 'exact'), (1.0, 10.0), (1.0, 11.0))
    """

    prior: Distribution
    noise: Callable[[int, Generator], Any] | Literal["seed"]
    levels: Sequence[Level]
    pair_costs: Sequence[float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels or not all(isinstance(level, Level) for level in self.levels):
            raise ValueError("Expected levels=[Level(...), ...], cheapest first, at least one.")
        if len(set(self.names)) != len(self.levels):
            raise ValueError(f"Expected levels with different names; got {list(self.names)}.")
        check_prior(self.prior)
        self._place_parameters()
        if not callable(self.noise) and self.noise != "seed":
            raise TypeError(f'Expected noise(n, generator) or "seed"; got {self.noise!r}.')
        declared = [level.cost for level in self.levels if level.cost is not None]
        if declared and len(declared) != len(self.levels):
            raise ValueError("Expected a cost for every level or for none (then the pilot measures them, in seconds); "
                             f"got {[level.cost for level in self.levels]}.")
        if any(below >= above for below, above in zip(declared, declared[1:], strict=False)):
            raise ValueError(f"Expected levels in ascending cost, cheapest first; got {declared} for "
                             f"{list(self.names)}. Reorder the levels, or drop one that is dearer than the next.")
        if self.pair_costs is not None:
            if not declared:
                raise ValueError("Expected a cost for every level beside pair_costs; levels without one are measured "
                                 "in seconds, which need not be the unit of pair_costs.")
            object.__setattr__(self, "pair_costs", tuple(float(cost) for cost in self.pair_costs))
            if len(self.pair_costs) != len(self.levels) or not all(c > 0 and math.isfinite(c) for c in self.pair_costs):
                raise ValueError(f"Expected {len(self.levels)} positive pair costs, one per level; got "
                                 f"{list(self.pair_costs)}.")

    def _place_parameters(self) -> None:
        """Tells levels where their parameters are in theta."""
        known = parameter_names(self.prior)
        object.__setattr__(self, "levels", tuple(level.placed(known) for level in self.levels))
        read = {name for level in self.levels for name in level.parameters or known}
        unread = [name for name in known if name not in read]
        if unread:
            raise ValueError(f"No level has the parameters {unread} of the prior. Take them out of the prior, or name "
                             "them in the parameters= of a level.")

    @property
    def names(self) -> tuple[str, ...]:
        """Level names, cheapest first."""
        return tuple(level.name for level in self.levels)

    @property
    def costs(self) -> tuple[float, ...] | None:
        """Declared cost of one run of each level; `None` when they are to be measured."""
        costs = tuple(level.cost for level in self.levels if level.cost is not None)
        return costs or None

    @property
    def row_costs(self) -> tuple[float, ...] | None:
        """Cost of one row of each level's term: a pair pays its fine and its coarse run."""
        if self.pair_costs is not None:
            return tuple(self.pair_costs)
        return None if self.costs is None else sum_pair_costs(self.costs)

    def __len__(self) -> int:
        return len(self.levels)

    def draw_noise(self, n: int, generator: Generator) -> Noise:
        """Draws the base noise of n rows.

        Raises:
            TypeError: If the noise function gives neither tensors nor a tuple or dict of them.
            ValueError: If a tensor's leading dimension is not n.
        """
        if isinstance(self.noise, str):
            return torch.randint(0, 2**63 - 1, (n,), generator=generator)
        noise = self.noise(n, generator)

        def check(tensor: Any) -> Tensor:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"Expected noise(n, generator) to give tensors; got {type(tensor).__name__}.")
            if tensor.ndim == 0 or len(tensor) != n:
                raise ValueError(f"Expected noise(n, generator) with leading dimension {n}; got shape "
                                 f"{tuple(tensor.shape)}.")
            return tensor

        return map_noise(check, noise)


def sum_pair_costs(costs: Sequence[float]) -> tuple[float, ...]:
    """Cost of one row of each level's term when a pair pays its fine and its coarse run.

    Example:
        >>> sum_pair_costs([1.0, 10.0, 50.0])
        (1.0, 11.0, 60.0)
    """
    return tuple(fine + coarse for fine, coarse in zip(costs, (0.0, *costs[:-1]), strict=True))


def campaign_cost(
    costs: Sequence[float], pair_costs: Sequence[float], *, runs: Sequence[int], pairs: Sequence[int]
) -> float:
    r"""What simulations cost.

    Args:
        costs: Cost of one run of each level, shape `(L + 1,)`.
        pair_costs: Cost of one row of each level's term, shape `(L + 1,)`.
        runs: Runs made of each level, in pairs or alone.
        pairs: How many of them were made as pairs of each level with the one below; entry 0 is not used.

    Example:
        >>> campaign_cost([1.0, 10.0], [1.0, 10.0], runs=[120, 20], pairs=[0, 20])  # coarse halves come for free
        300.0
    """
    alone = sum(number * cost for number, cost in zip(runs, costs, strict=True))
    together = zip(pairs, pair_costs, sum_pair_costs(costs), strict=True)
    return alone + sum(number * (pair - apart) for number, pair, apart in list(together)[1:])


def map_noise(function: Callable[[Any], Any], noise: Any) -> Any:
    """Applies a function to every tensor of a noise tree (a tensor, or a tuple or dict of tensors)."""
    if isinstance(noise, dict):
        return {key: function(value) for key, value in noise.items()}
    if isinstance(noise, (tuple, list)):
        return tuple(function(value) for value in noise)
    return function(noise)
