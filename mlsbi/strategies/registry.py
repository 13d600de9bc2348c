r"""Names of strategies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from mlsbi.density.registry import builder_from_config, builder_to_config
from mlsbi.strategies.auto import Auto
from mlsbi.strategies.emulation import Emulation
from mlsbi.strategies.multilevel import Multilevel
from mlsbi.strategies.protocol import Strategy
from mlsbi.strategies.single_level import SingleLevel
from mlsbi.strategies.transfer import TransferLearning
from mlsbi.strategies.transfer_then_multilevel import TransferThenMultilevel
from mlsbi.strategies.translation import Translation

__all__ = ["Strategy", "resolve_strategy", "strategy_names", "strategy_from_config", "strategy_to_config"]

_STRATEGIES: dict[str, Strategy] = {
    "multilevel": Multilevel(),
    "transfer": TransferLearning(),
    "high": SingleLevel(-1),
    "low": SingleLevel(0),
    "transfer_then_multilevel": TransferThenMultilevel(),
    "translation": Translation(),
    "emulation": Emulation(),
    "auto": Auto(),
}
_KINDS = {type(strategy).__name__: type(strategy) for strategy in _STRATEGIES.values()}


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
    """JSON description of a strategy, of the strategies and densities that it is made of too."""
    options: dict[str, Any] = {}
    if is_dataclass(strategy) and not isinstance(strategy, type):
        options = {field.name: _encode(getattr(strategy, field.name)) for field in fields(strategy)}
    return {"name": type(strategy).__name__, "options": options}


def strategy_from_config(config: Mapping[str, Any]) -> Strategy | None:
    """Inverse of `strategy_to_config` for the strategies above; `None` for a user's own, or one made of them."""
    kind = _KINDS.get(config["name"])
    if kind is None:
        return None
    try:
        return kind(**{name: _decode(value) for name, value in config["options"].items()})
    except _NotOurs:
        return None


class _NotOurs(Exception):
    """A part of a strategy that only its user can make again."""


def _encode(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_encode(part) for part in value]
    if callable(getattr(value, "fit", None)):
        return {"strategy": strategy_to_config(value)}
    if callable(value):
        return {"density": builder_to_config(value)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_decode(part) for part in value)
    if not isinstance(value, Mapping):
        return value
    if "strategy" in value:
        made: Any = strategy_from_config(value["strategy"])
    else:
        made = None if value["density"] is None else builder_from_config(value["density"])
    if made is None:
        raise _NotOurs
    return made
