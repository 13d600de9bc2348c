r"""What a benchmark task is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.distributions import Distribution

from mlsbi.data import MultilevelData
from mlsbi.levels import LevelStack
from mlsbi.simulation.campaign import simulate, simulate_level
from mlsbi.store.records import TEST_STREAM

__all__ = ["Likelihood", "Reference", "Task"]


class Likelihood(Protocol):
    """The exact density of one output of a task's highest level."""

    def __call__(self, x: Tensor, theta: Tensor) -> Tensor:
        """Log density `(n,)` of outputs x `(n, ...)`, each given its theta `(n, D)`; `-inf` where x cannot occur."""
        ...


class Reference(Protocol):
    """The exact posterior of a task's highest level, or one accurate enough to judge others by."""

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        """Normalised posterior log density `(n,)` of theta `(n, D)` at x `(n, ...)`; `-inf` outside the prior."""
        ...

    def sample(self, n: int, x: Tensor, seed: int) -> Tensor:
        """Posterior draws `(n, D)` at one observation x `(...)`."""
        ...


@dataclass(frozen=True)
class Task:
    r"""A benchmark: what can be simulated, at which budgets, and what is known about the answer.

    Args:
        name: Its name in the registry.
        title: One line on what it is.
        stack: Prior, noise and levels; `None` where only data exists.
        prior: Distribution of theta.
        level_names: Cheapest first.
        level_costs: Cost of one run of each level.
        simulate: `simulate(n, seed) -> MultilevelData`, n one number or one per level. A larger n extends a
            smaller one.
        test: `test(n, seed) -> (theta, x)` of the highest level, on rows that `simulate` does not use with that seed.
        budgets: Rows per level of the published comparisons, one tuple a budget.
        density: Density estimator that suits the task: a name or a builder.
        citation: Where the task and its numbers come from.
        test_rows: Test rows that comparisons use; all there are where only data exists, and `test` refuses more.
        reference: The exact posterior, where it is known.
        likelihood: The exact likelihood, where it is known.
        estimator: What the task is usually solved by, a posterior or a likelihood.
        observations: Independent outputs at the same theta that make up one test observation of a likelihood.
        embedding: Embedding that suits x: a name or a builder; flattening when left out.
        x_transform: `"asinh"` where outputs have heavy tails.
        x_names: What plots write along the axes of one observation, one name per dimension of x.
        x_axis: Where the entries of x lie on its (last) axis.

    Raises:
        ValueError: If costs or budgets do not have one entry per level.
    """

    name: str
    title: str
    stack: LevelStack | None
    prior: Distribution
    level_names: tuple[str, ...]
    level_costs: tuple[float, ...]
    simulate: Callable[[int | Sequence[int], int], MultilevelData]
    test: Callable[[int, int], tuple[Tensor, Tensor]]
    budgets: tuple[tuple[int, ...], ...]
    density: Any
    citation: str
    test_rows: int = 1000
    reference: Reference | None = None
    likelihood: Likelihood | None = None
    estimator: Literal["npe", "nle"] = "npe"
    observations: int = 1
    embedding: Any = None
    x_transform: Literal["none", "asinh"] = "none"
    x_names: tuple[str, ...] | None = None
    x_axis: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        levels = len(self.level_names)
        if len(self.level_costs) != levels:
            raise ValueError(f"Expected {levels} level costs, one per level; got {self.level_costs}.")
        wrong = [budget for budget in self.budgets if len(budget) != levels]
        if wrong or not self.budgets:
            raise ValueError(f"Expected budgets of {levels} numbers, one per level; got {wrong or self.budgets}.")

    @classmethod
    def from_stack(cls, name: str, stack: LevelStack, **fields: Any) -> Task:
        r"""A task that simulates.

        Args:
            name: Its name in the registry.
            stack: Prior, noise and levels with declared costs; it gives the names, costs, `simulate` and `test`.
            **fields: The task's other fields.

        Raises:
            ValueError: If the stack declares no costs.
        """
        if stack.costs is None:
            raise ValueError(f"Expected a stack with declared costs for task '{name}'.")
        return cls(
            name=name, stack=stack, prior=stack.prior, level_names=stack.names, level_costs=stack.costs,
            simulate=partial(_simulate, stack), test=partial(_test, stack), **fields,
        )  # fmt: skip

    @property
    def levels(self) -> tuple[tuple[str, float], ...]:
        """Name and cost of every level, cheapest first."""
        return tuple(zip(self.level_names, self.level_costs, strict=True))


def _simulate(stack: LevelStack, n: int | Sequence[int], seed: int) -> MultilevelData:
    return simulate(stack, n, seed=seed, progress=False)


def _test(stack: LevelStack, n: int, seed: int) -> tuple[Tensor, Tensor]:
    if n < 1:
        raise ValueError(f"Expected at least one test row; got n={n}.")
    return simulate_level(stack, -1, n, seed=seed, stream=TEST_STREAM)
