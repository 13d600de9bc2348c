r"""Names of strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, Protocol

from mlsbi.strategies.multilevel import Multilevel
from mlsbi.strategies.single_level import SingleLevel
from mlsbi.strategies.transfer import TransferLearning
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.history import History
from mlsbi.training.members import Member, Schedule
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

__all__ = ["Strategy", "resolve_strategy", "strategy_names", "strategy_from_config", "strategy_to_config"]


class Strategy(Protocol):
    """A way to train networks on coupled rows: a frozen dataclass with three methods."""

    def terms(self, terms: Sequence[Term]) -> list[Term]:
        """The rows to train on, out of those of all levels; they are split before `fit`."""
        ...

    def runs(self, n: Sequence[int]) -> tuple[int, ...]:
        """Runs of each level whose outputs `fit` reads, of data with n rows per level: what its quality cost."""
        ...

    def fit(
        self,
        members: Sequence[Member],
        *,
        options: TrainingOptions,
        pooled: bool = False,
        schedules: Sequence[Schedule] = (),
        checkpoint: Checkpoint | None = None,
        progress: bool = True,
        label: str = "training",
    ) -> list[History]:
        """Trains the networks in place and leaves them with their best weights, in eval mode.

        `schedules` has one per stage, for training without held-out rows; the rest is as in `minimise`.
        """
        ...


_STRATEGIES: dict[str, Strategy] = {
    "multilevel": Multilevel(),
    "transfer": TransferLearning(),
    "high": SingleLevel(-1),
    "low": SingleLevel(0),
}


def strategy_names() -> tuple[str, ...]:
    """Names that `strategy=` takes."""
    return tuple(_STRATEGIES)


def resolve_strategy(strategy: str | Strategy) -> Strategy:
    """A strategy from its name, or the strategy itself.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor a strategy.
    """
    if isinstance(strategy, str):
        if strategy not in _STRATEGIES:
            raise ValueError(f"Unknown strategy '{strategy}'; known: {list(_STRATEGIES)}, or pass a strategy.")
        return _STRATEGIES[strategy]
    if not (callable(getattr(strategy, "terms", None)) and callable(getattr(strategy, "fit", None))):
        raise TypeError(f"Expected a strategy name or an object with terms() and fit(); got "
                        f"{type(strategy).__name__}. A class must be called: Multilevel().")
    return strategy


def strategy_to_config(strategy: Strategy) -> dict[str, Any]:
    """JSON description of a strategy."""
    options: dict[str, Any] = asdict(strategy) if is_dataclass(strategy) and not isinstance(strategy, type) else {}
    return {"name": type(strategy).__name__, "options": options}


def strategy_from_config(config: Mapping[str, Any]) -> Strategy | None:
    """Inverse of `strategy_to_config` for the strategies above; `None` for a user's own."""
    kinds = {type(strategy).__name__: type(strategy) for strategy in _STRATEGIES.values()}
    kind = kinds.get(config["name"])
    return None if kind is None else kind(**config["options"])
