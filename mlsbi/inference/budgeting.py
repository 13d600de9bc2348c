r"""How many rows of each level a round of sequential inference buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from mlsbi.allocation.adaptive import simulate_adaptively
from mlsbi.allocation.optimal import Allocation, optimal_allocation
from mlsbi.allocation.piloting import FEWEST, pilot_cost
from mlsbi.allocation.remeasuring import Remeasuring
from mlsbi.data import MultilevelData, spread
from mlsbi.levels import LevelStack, sum_pair_costs
from mlsbi.simulation.campaign import simulate

__all__ = ["Bought", "Budget", "Budgeting", "FixedRows", "Purchase"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Purchase:
    r"""Rows to simulate in a round, and why.

    Args:
        n: New rows of each level.
        variances: Of the corrections that decided, shape `(L + 1,)`; `None` where rows are fixed.
        notes: What needs saying.
    """

    n: tuple[int, ...]
    variances: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bought:
    """What rounds so far have left: all rows inside the truncated prior, and the cost of everything."""

    inside: MultilevelData
    spent: float
    run_costs: tuple[float, ...]
    last_variances: tuple[float, ...] | None


class Budgeting(Protocol):
    """How rounds are paid for."""

    def begin(self, stack: LevelStack, seed: int, running: dict[str, Any]) -> tuple[MultilevelData, Purchase]:
        """The first round's rows."""
        ...

    def more(self, stack: LevelStack, number: int, bought: Bought, seed: int) -> Purchase:
        """What a later round buys."""
        ...


@dataclass(frozen=True)
class FixedRows:
    r"""As many rows of each level as the user says.

    Args:
        n: Rows of each round and level.
    """

    n: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, n: Sequence[int] | Sequence[Sequence[int]], rounds: int, levels: int) -> FixedRows:
        """Rows of a whole campaign, shared out evenly, or of every round.

        Raises:
            ValueError: If shapes do not fit, the first round lacks a level, or a round has no rows at all.
        """
        rows = list(n)
        if all(isinstance(each, (int, np.integer)) for each in rows):
            total = spread(rows, levels, what="n")  # type: ignore[arg-type]
            table = [[each * (number + 1) // rounds - each * number // rounds for each in total]
                     for number in range(rounds)][::-1]  # the first round has the larger part
        else:
            table = [spread(each, levels, what="n of a round") for each in rows]  # type: ignore[arg-type]
        if len(table) != rounds:
            raise ValueError(f"Expected n with one entry a round, {rounds}, or with {levels} numbers of rows in all; "
                             f"got {len(table)} rounds.")
        for number, each in enumerate(table, 1):
            if any(count < 0 for count in each) or sum(each) == 0 or number == 1 and 0 in each or each[-1] == 0:
                raise ValueError(f"Expected rows of every level in the first round, and of the finest in each; round "
                                 f"{number} of {rounds} has {tuple(each)}. Ask for more rows, or fewer rounds.")
        return cls(tuple(tuple(each) for each in table))

    def begin(self, stack: LevelStack, seed: int, running: dict[str, Any]) -> tuple[MultilevelData, Purchase]:
        """Simulates the first round's rows."""
        return simulate(stack, self.n[0], seed=seed, **running), Purchase(self.n[0])

    def more(self, stack: LevelStack, number: int, bought: Bought, seed: int) -> Purchase:
        """The rows of a later round."""
        return Purchase(self.n[number - 1])


@dataclass(frozen=True)
class Budget:
    r"""Equal parts of a budget, each spent where the variance of the loss inside the truncated prior wants it.

    Rows of earlier rounds that lie inside count as rows that exist already.

    Args:
        total: Of all rounds, the pilot included.
        rounds: Rounds.
        pilot_rows: Joint rows of the first round's pilot.
        remeasuring: How variances are measured in later rounds.
        begin_options: Of `simulate_adaptively` in the first round.
        minimum: Least rows of a level to train on.
    """

    total: float
    rounds: int
    pilot_rows: int
    remeasuring: Remeasuring
    begin_options: dict[str, Any]
    minimum: ArrayLike = FEWEST

    def check(self, stack: LevelStack) -> None:
        """Raises a `ValueError` if a part of the budget cannot pay for the pilot, as far as costs are known."""
        floor = pilot_cost(stack, self.pilot_rows)
        part = self.total / self.rounds
        if floor is not None and part <= floor:
            raise ValueError(f"Expected a budget whose part for each of {self.rounds} rounds is beyond the cost of a "
                             f"pilot of {self.pilot_rows} rows, {floor:g}; got {self.total:g}, {part:g} a round. Raise "
                             f"it, or take fewer rounds or pilot rows (at least {FEWEST}).")

    def begin(self, stack: LevelStack, seed: int, running: dict[str, Any]) -> tuple[MultilevelData, Purchase]:
        """Pilots, plans and simulates the first round."""
        campaign = simulate_adaptively(stack, self.total / self.rounds, seed=seed, rounds=1, minimum=self.minimum,
                                       pilot_rows=self.pilot_rows, **self.begin_options, **running)
        return campaign.data, Purchase(campaign.data.n, tuple(map(float, campaign.pilot.variances)))

    def more(self, stack: LevelStack, number: int, bought: Bought, seed: int) -> Purchase:
        """Plans a later round by the rows inside."""
        notes: tuple[str, ...] = ()
        variances = bought.last_variances
        if min(bought.inside.n) >= FEWEST:
            moments = self.remeasuring.measure(bought.inside, seed=seed)
            variances = tuple(float(each.variances[-1]) for each in moments)
        else:
            notes = (f"planned by the variances of the round before: only {min(bought.inside.n)} rows of a level lie "
                     f"inside, {FEWEST} are needed to measure them",)
        assert variances is not None
        plan = self._plan(stack, number, bought, variances)
        n = tuple(want - have for want, have in zip(plan.n, bought.inside.n, strict=True))
        return Purchase(n, variances, notes)

    def _plan(
        self, stack: LevelStack, number: int, bought: Bought, variances: Sequence[float]
    ) -> Allocation:
        own = stack.row_costs or sum_pair_costs(bought.run_costs)
        pair_costs = tuple(map(float, own))
        # What there is inside costs nothing more: the budget is what the rows inside would have cost and what is left.
        sunk = sum(rows * cost for rows, cost in zip(bought.inside.n, pair_costs, strict=True))
        left = max(self.total * number / self.rounds - bought.spent, 0.0)
        return optimal_allocation(variances, pair_costs=pair_costs, spent=bought.inside.n, budget=sunk + left,
                                  minimum=self.minimum)

