r"""Seeds for one purpose, and code that must draw from torch's global random state without leaving a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["child_seed", "seeded"]


def child_seed(seed: int | None, *key: int) -> int:
    """A 63-bit seed for one purpose, from a user's seed and the numbers that name the purpose.

    Example:
        >>> child_seed(1, 0, 0) == child_seed(1, 0, 0), child_seed(1, 0, 0) == child_seed(1, 0, 1)
        (True, False)
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0] >> np.uint64(1))


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
