r"""Seeds for one purpose, and code that must draw from torch's global random state without leaving a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["check_device", "check_seed", "child_seed", "seeded"]


def child_seed(seed: int | None, *key: int) -> int:
    """A 63-bit seed for one purpose, from a user's seed (a fresh one if `None`) and numbers that name the purpose.

    Raises:
        ValueError: If the seed is not a whole number of at least 0.

    Example:
        >>> child_seed(1, 0, 0) == child_seed(1, 0, 0), child_seed(1, 0, 0) == child_seed(1, 0, 1)
        (True, False)
    """
    entropy = None if seed is None else check_seed(seed)
    return int(np.random.SeedSequence(entropy, spawn_key=key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_seed(seed: int) -> int:
    """The seed as a plain number.

    Raises:
        ValueError: If it is not a whole number of at least 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"Expected a whole number of at least 0 as seed; got {seed!r}.")
    return int(seed)


def check_device(device: torch.device | str) -> torch.device:
    """The device, once a tensor has been put there.

    Raises:
        ValueError: If there is no such device, or torch cannot use it.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Expected a device that torch can use here; got {device!r}: {error}") from error
    return place


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seeds torch's global random state of the CPU and of one device, and puts the old state back at the end.

    For what takes no generator: torch's distributions, initialisation of modules, dropout.
    """
    place = torch.device(device)
    cuda = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        # torch.manual_seed would also seed every CUDA device, now or when CUDA starts.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(place):
                torch.cuda.manual_seed(seed)
        yield
