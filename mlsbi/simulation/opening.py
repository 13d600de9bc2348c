r"""The store that belongs to a stack: made when there is none, refused when it is another stack's."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsbi.levels import LevelStack
from mlsbi.priors import parameter_names
from mlsbi.simulation.fingerprint import compare_stacks, describe_stack
from mlsbi.store.files import write_file
from mlsbi.store.store import Store, StoreError, create_store, open_store

__all__ = ["OtherStackError", "accept_code", "store_for"]


class OtherStackError(StoreError):
    """A store holds simulations of another stack."""


def store_for(stack: LevelStack, store: Store | str | os.PathLike[str]) -> Store:
    r"""Opens a stack's store, or makes it.

    Args:
        stack: The stack.
        store: Its folder, or the open store.

    Raises:
        OtherStackError: If the store holds rows of another stack; the differences are told.
        StoreError: If the folder is no store, or one of a newer layout.
    """
    description = describe_stack(stack)
    if not isinstance(store, Store):
        path = Path(store)
        if not (path / "store.json").exists():
            return create_store(path, description, names=stack.names, parameters=parameter_names(stack.prior),
                                costs=stack.costs, row_costs=stack.row_costs)
        store = open_store(path)
    _check_same(store, compare_stacks(store.description, description), only_code=_is_only_code(store, description))
    return store


def accept_code(store: Store | str | os.PathLike[str], stack: LevelStack) -> Store:
    r"""Takes a stack's code for the one that a store's simulations come from, on your word that it computes the same.

    For simulators that were rewritten, moved or cleaned up, or mended for rows that failed. What the code was before
    stays in the store's manifest.

    Args:
        store: The store's folder, or the open store.
        stack: The stack as it is now.

    Returns:
        The store.

    Raises:
        OtherStackError: If more than code changed: the prior, the draws of the noise, the names of levels.
        StoreError: If the store is being written, or its folder is none.
    """
    kept, now = store if isinstance(store, Store) else open_store(store), describe_stack(stack)
    if not _is_only_code(kept, now):
        _check_same(kept, compare_stacks(kept.description, now), only_code=False)
    if not compare_stacks(kept.description, now):
        return kept
    with kept.writing():
        history = [*kept.manifest.get("earlier", []), kept.description]
        manifest = {**kept.manifest, "description": now, "earlier": history}
        write_file(kept.path / "store.json", json.dumps(manifest, indent=1).encode())
    kept.refresh()
    return kept


def _is_only_code(store: Store, now: Mapping[str, Any]) -> bool:
    """Whether a stack differs from a store's in the code of its noise and levels at most."""
    same = copy.deepcopy(store.description)
    if len(same["levels"]) != len(now["levels"]):
        return False
    for part, other in ((same["noise"], now["noise"]), *zip(same["levels"], now["levels"], strict=True)):
        part["code"] = other["code"]
    return not compare_stacks(same, dict(now))


def _check_same(store: Store, differences: list[str], *, only_code: bool) -> None:
    if not differences:
        return
    told = "\n".join(f"- {sentence}" for sentence in differences)
    advice = ""
    if only_code:
        advice = (" If finished rows would still come out the same, say so by mlsbi.accept_code(store, stack), on the "
                  "command line --accept-code.")
    raise OtherStackError(f"The store {store.path} holds simulations of another stack:\n{told}\nGive the stack its own "
                          f"store.{advice}")
