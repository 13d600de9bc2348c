r"""Whether simulators produce anything like an observation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["outside_all", "surprise"]

_NEIGHBOURS = 5
_FEWEST = 8  # rows below which nothing is said
_MOST = 2000
_CONSTANT = 1e-3
_MARGIN = 10.0  # of n rows the farthest is not the farthest there is; one time in n another is farther


def surprise(x_o: Tensor, outputs: Tensor) -> float:
    r"""How far an observation lies from simulated outputs, over how far the farthest of these lies from the others.

    Distances are to the fifth nearest neighbour, outputs measured in their interquartile ranges. Above 1 the
    observation is farther out than all of them, as one simulation in n + 1 is by chance.

    Args:
        x_o: Observation, shape `(...)` or `(1, ...)`.
        outputs: Simulated outputs, shape `(n, ...)`; of more than 2000 the first.

    Example:
        >>> outputs = torch.randn(99, 2, generator=torch.Generator().manual_seed(0))
        >>> surprise(torch.tensor([0.1, 0.1]), outputs) < 0.3, surprise(torch.tensor([9.0, 0.1]), outputs) > 3
        (True, True)
    """
    rows = torch.cat([x_o.reshape(1, -1).double(), outputs[:_MOST].flatten(1).double()])
    low, middle, high = rows[1:].quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
    spread, known = high - low, rows[1:].std(0)
    constant = _CONSTANT * middle.abs().clamp(min=_CONSTANT)  # what never varies is known well
    scale = torch.where(spread > 0, spread, torch.where(known > 0, known, constant))
    rows = (rows - middle) / scale
    apart = torch.cdist(rows, rows)
    others = min(_NEIGHBOURS, len(rows) - 2)
    simulated = apart[1:, 1:].kthvalue(others + 1, dim=1).values
    return float(apart[0, 1:].kthvalue(others).values / simulated.max().clamp(min=1e-12))


def outside_all(x_o: Tensor, outputs: Mapping[str, Tensor]) -> str | None:
    """What to say of an observation that lies clearly farther out than every output of every level.

    Args:
        x_o: Observation, shape `(...)` or `(1, ...)`.
        outputs: Simulated outputs by level, finest last, each `(n, ...)`; those with less than 8 rows say nothing.
    """
    finest = list(outputs.values())[-1].flatten(1)
    asked = {name: x for name, x in outputs.items() if len(x) >= _FEWEST}
    if not asked or any(surprise(x_o, x) <= 1 + _MARGIN / len(x) for x in asked.values()):
        return None
    rows = ", ".join(f"{len(x)} of '{name}'" for name, x in asked.items())
    flat = x_o.flatten()
    beyond = ((flat < finest.amin(0)) | (flat > finest.amax(0))).nonzero()[:, 0].tolist()
    where = f" Its entries {beyond[:10]} lie outside the finest level's range." if beyond else ""
    if len(finest) < _FEWEST:
        return (f"The observation is farther from the simulations ({rows}) than each of these from the others, and "
                f"{len(finest)} of the finest level are too few to tell whether that one produces it.")
    return (f"The observation is farther from the simulations ({rows}) than each of these from the others.{where} "
            "Check its units, order and preprocessing, the prior, and whether the model can produce it at all.")
