r"""What the command line works on: a benchmark task or a user's own stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from torch.distributions import Distribution

from mlsbi import tasks
from mlsbi.data import MultilevelData
from mlsbi.levels import LevelStack
from mlsbi.loading import load_stack
from mlsbi.simulation.campaign import simulate_level
from mlsbi.simulation.running import RunOptions
from mlsbi.simulation.sets import simulate_sets
from mlsbi.store.records import TEST_STREAM
from mlsbi.tasks.task import Likelihood, Reference

__all__ = ["Target", "find_target"]


@dataclass(frozen=True)
class Target:
    """A task, or a stack seen as one."""

    name: str
    options: dict[str, Any]
    title: str
    citation: str
    prior: Distribution
    level_names: tuple[str, ...]
    level_costs: tuple[float, ...] | None
    stack: LevelStack | None
    default_n: tuple[int, ...] | None
    default_tests: int
    most_tests: int | None
    most_rows: int
    density: Any
    embedding: Any
    x_transform: Literal["none", "asinh"]
    estimator: Literal["npe", "nle"]
    observations: int
    reference: Reference | None
    likelihood: Likelihood | None
    x_axis: Sequence[float] | None
    x_label: str
    simulate_data: Callable[[Sequence[int], int], MultilevelData] | None
    test_data: Callable[[int, int], tuple[Tensor, Tensor]] | None

    def networks(self, kind: str) -> dict[str, Any]:
        """Density, embedding and transform of x: the task's own, where it is solved as it usually is."""
        usual = kind == self.estimator
        return {"density": self.density if usual else "nsf", "x_transform": self.x_transform,
                "embedding": self.embedding if usual and kind == "npe" else None}

    def test(self, n: int, seed: int, options: RunOptions) -> tuple[Tensor, Tensor]:
        """Theta `(n, D)` and outputs of the highest level `(n, ...)`, on rows that no training data has."""
        if self.stack is not None:
            return simulate_level(self.stack, -1, n, seed=seed, stream=TEST_STREAM, options=options)
        if self.test_data is None:
            raise ValueError(f"'{self.name}' has neither simulators nor data.")
        return self.test_data(n, seed)

    def test_sets(self, n: int, m: int, seed: int, options: RunOptions) -> tuple[Tensor, Tensor]:
        """Theta `(n, D)` and sets of m outputs of the highest level `(n, m, ...)`.

        Raises:
            ValueError: If a fixed data set is asked for more than one output at the same theta.
        """
        if self.stack is not None:
            gaps = options if options.on_failure == "raise" else replace(options, on_failure="drop")
            return simulate_sets(self.stack, -1, n, m, seed=seed, stream=TEST_STREAM, options=gaps)
        if m > 1:
            raise ValueError(f"'{self.name}' is a fixed data set with one output at each theta; got {m} observations.")
        theta, x = self.test(n, seed, options)
        return theta, x[:, None]


def find_target(name: str, options: dict[str, Any]) -> Target:
    r"""A task by name, or a stack by `path/to/file.py:stack`.

    Args:
        name: What the user typed.
        options: Options of the task.

    Raises:
        ValueError: If it is neither.
    """
    if ":" in name or name.endswith(".py"):
        if options:
            raise ValueError(f"A stack of your own takes no task options; got {sorted(options)}.")
        stack = load_stack(name)
        return Target(
            name=name, options={}, title="Own stack.", citation="", prior=stack.prior, level_names=stack.names,
            level_costs=stack.costs, stack=stack, default_n=None, default_tests=0, most_tests=None, most_rows=0,
            density="nsf", embedding=None, x_transform="none", estimator="npe", observations=1, reference=None,
            likelihood=None, x_axis=None, x_label="output", simulate_data=None,
            test_data=None,
        )
    task = tasks.get(name, **options)
    return Target(
        name=name, options=options, title=task.title, citation=task.citation, prior=task.prior,
        level_names=task.level_names, level_costs=task.level_costs, stack=task.stack, default_n=task.budgets[-1],
        default_tests=min(task.test_rows, 400), most_tests=task.test_rows if task.stack is None else None,
        most_rows=task.test_rows,
        density=task.density, embedding=task.embedding, x_transform=task.x_transform, estimator=task.estimator,
        observations=task.observations, reference=task.reference, likelihood=task.likelihood, x_axis=task.x_axis,
        x_label=task.x_names[0] if task.x_names else "output",
        simulate_data=task.simulate if task.stack is None else None,
        test_data=task.test if task.stack is None else None,
    )
