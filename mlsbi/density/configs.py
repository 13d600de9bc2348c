r"""Builders as JSON: the name of their kind and their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

__all__ = ["from_config", "to_config"]


def to_config(kinds: Mapping[str, Any], builder: Any) -> dict[str, Any] | None:
    """Name and options of a builder, a dataclass of one of the kinds; `None` for any other."""
    for name, kind in kinds.items():
        if type(builder) is kind:
            return {"name": name, "options": asdict(builder)}
    return None


def from_config(kinds: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """Inverse of `to_config`."""
    return kinds[config["name"]](**config["options"])
