r"""How many rows of each level a round of sequential inference buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlsbi.allocation.optimal import optimal_allocation
from mlsbi.allocation.pilot_report import PilotReport
from mlsbi.allocation.piloting import FEWEST, pilot, pilot_cost
from mlsbi.allocation.remeasuring import Remeasuring
from mlsbi.data import MultilevelData, spread
from mlsbi.levels import LevelStack, sum_pair_costs
from mlsbi.simulation.scheduling import OnFailure

__all__ = ["FEWEST_TRAINED", "Bought", "Budget", "Budgeting", "FixedRows", "Purchase", "check_parts"]

FEWEST_TRAINED = 2
"""Rows of a level that a round needs: one to train on, one to hold out."""


@dataclass(frozen=True)
class Purchase:
    r"""Rows to simulate in a round, and why.

    Args:
        n: New rows of each level; in the first round all, the pilot's included.
        variances: Of the corrections that decided, shape `(L + 1,)`; `None` where rows are fixed.
        notes: What needs saying.
    """

    n: tuple[int, ...]
    variances: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bought:
    r"""What rounds so far have left.

    Args:
        inside: All rows inside the truncated prior.
        spent: Cost of everything.
        run_costs: Of one run of each level.
        attempts: Rows of each level tried for one that was finished.
        last_variances: What the round before was planned by.
    """

    inside: MultilevelData
    spent: float
    run_costs: tuple[float, ...]
    attempts: tuple[float, ...]
    last_variances: tuple[float, ...] | None


class Budgeting(Protocol):
    """How rounds are paid for."""

    def pilot(self, stack: LevelStack, seed: int, running: dict[str, Any]) -> PilotReport | None:
        """What the first round is planned by."""
        ...

    def first(self, report: PilotReport | None) -> Purchase:
        """What the first round buys."""
        ...

    def more(self, stack: LevelStack, number: int, bought: Bought, seed: int) -> Purchase:
        """What a later round buys."""
        ...

    def on_failure(self, asked: OnFailure) -> OnFailure:
        """What a failed row does outside the pilot."""
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
            ValueError: If shapes do not fit, the first round lacks a level, or a round has none of the finest.
        """
        try:
            rows: list[Any] = list(n)
        except TypeError:
            raise ValueError(f"Expected n with {levels} numbers of rows, one a level, or one such entry for each of "
                             f"{rounds} rounds; got {n!r}.") from None
        if all(isinstance(each, (int, np.integer)) for each in rows):
            total = spread(rows, levels, what="n")
            table = [[each * (number + 1) // rounds - each * number // rounds for each in total]
                     for number in range(rounds)][::-1]  # the first round has the larger part
        else:
            table = [spread(each, levels, what="n of a round") for each in rows]
        if len(table) != rounds:
            raise ValueError(f"Expected n with one entry a round, {rounds}, or with {levels} numbers of rows in all; "
                             f"got {len(table)} rounds.")
        for number, each in enumerate(table, 1):
            if min(each) < 0 or number == 1 and min(each) < FEWEST_TRAINED or each[-1] == 0:
                raise ValueError(f"Expected at least {FEWEST_TRAINED} rows of every level in the first round, and one "
                                 f"of the finest in each; round {number} of {rounds} has {tuple(each)}. Ask for more "
                                 "rows, or fewer rounds.")
        return cls(tuple(tuple(each) for each in table))

    def pilot(self, stack: LevelStack, seed: int, running: dict[str, Any]) -> PilotReport | None:
        """None: nothing is planned."""
        return None

    def first(self, report: PilotReport | None) -> Purchase:
        """The rows of the first round."""
        return Purchase(self.n[0])

    def more(self, stack: LevelStack, number: int, bought: Bought, seed: int) -> Purchase:
        """The rows of a later round."""
        return Purchase(self.n[number - 1])

    def on_failure(self, asked: OnFailure) -> OnFailure:
        """As the user says."""
        return asked


def check_parts(stack: LevelStack, total: float, rounds: int, pilot_rows: int) -> None:
    """Raises a `ValueError` if a round's part of a budget cannot pay for the pilot, as far as costs are known."""
    floor, part = pilot_cost(stack, pilot_rows), total / rounds
    if floor is not None and part <= floor:
        raise ValueError(f"Expected a budget whose part for each of {rounds} rounds is beyond the cost of a pilot of "
                         f"{pilot_rows} rows, {floor:g}; got {total:g}, {part:g} a round. Raise it, or take fewer "
                         f"rounds or pilot rows (at least {FEWEST}).")


@dataclass(frozen=True)
class Budget:
    r"""Equal parts of a budget, each spent where the variance of the loss inside the truncated prior wants it.

    Rows of earlier rounds that lie inside count as rows that exist already. Failed rows are paid for, and not drawn
    anew: a later round buys others.

    Args:
        total: Of all rounds, the pilot included.
        rounds: Rounds.
        pilot_rows: Joint rows of the first round's pilot.
        pilot_options: Of the pilot.
        remeasuring: How variances are measured in later rounds.
        minimum: Least rows of a level to train on, as far as a round's part of the budget buys them.
    """

    total: float
    rounds: int
    pilot_rows: int
    pilot_options: dict[str, Any]
    remeasuring: Remeasuring
    minimum: int = FEWEST

    def pilot(self, stack: LevelStack, seed: int, running: dict[str, Any]) -> PilotReport | None:
        """The first round's pilot."""
        options = {name: value for name, value in running.items() if name != "batch_size"}
        return pilot(stack, self.pilot_rows, seed=seed, **self.pilot_options, **options)

    def first(self, report: PilotReport | None) -> Purchase:
        """The first round's rows, by the pilot."""
        assert report is not None
        plan = optimal_allocation(report, budget=self.total / self.rounds, minimum=self.minimum)
        return Purchase(plan.n, tuple(map(float, report.variances)))

    def more(self, stack: LevelStack, number: int, bought: Bought, seed: int) -> Purchase:
        """Plans a later round by the rows inside."""
        notes: list[str] = []
        variances = bought.last_variances
        assert variances is not None
        if min(bought.inside.n) >= FEWEST:
            variances = tuple(float(each.variances[-1]) for each in self.remeasuring.measure(bought.inside, seed=seed))
        else:
            notes.append(f"planned by the variances of the round before: only {min(bought.inside.n)} rows of a level "
                         f"lie inside, {FEWEST} are needed to measure them")
        own = stack.row_costs or sum_pair_costs(bought.run_costs)
        costs = np.array([cost * tries for cost, tries in zip(own, bought.attempts, strict=True)])
        have = np.array(bought.inside.n)
        left = max(self.total * number / self.rounds - bought.spent, 0.0)
        least = np.maximum(have, self.minimum)
        if float((least - have) @ costs) > left:  # the finest level's rows are what no other replaces
            n = [0] * len(have)
            for level in reversed(range(len(have))):
                n[level] = min(int(least[level] - have[level]), math.floor(left / costs[level]))
                left -= n[level] * float(costs[level])
            notes.append(f"the budget bought no {self.minimum} rows inside of every level")
            return Purchase(tuple(n), variances, tuple(notes))
        # What there is inside costs nothing more: the budget is what the rows inside would have cost and what is left.
        plan = optimal_allocation(variances, pair_costs=costs, spent=have, budget=float(have @ costs) + left,
                                  minimum=self.minimum)
        tried = [math.floor((want - there) * tries) for want, there, tries in
                 zip(plan.n, bought.inside.n, bought.attempts, strict=True)]
        return Purchase(tuple(tried), variances, tuple(notes))

    def on_failure(self, asked: OnFailure) -> OnFailure:
        """Rows in the place of failed ones would cost what nobody planned."""
        return "raise" if asked == "raise" else "drop"
