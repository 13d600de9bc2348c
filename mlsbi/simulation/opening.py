r"""The store that belongs to a stack: made when there is none, refused when it is another stack's."""

from __future__ import annotations

import os
from pathlib import Path

from mlsbi.levels import LevelStack
from mlsbi.priors import parameter_names
from mlsbi.simulation.fingerprint import compare_stacks, describe_stack
from mlsbi.store.store import Store, StoreError, create_store, open_store

__all__ = ["OtherStackError", "store_for"]


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
    differences = compare_stacks(store.description, description)
    if differences:
        told = "\n".join(f"- {sentence}" for sentence in differences)
        raise OtherStackError(f"The store {store.path} holds simulations of another stack:\n{told}\nGive the stack its "
                              "own store.")
    return store
