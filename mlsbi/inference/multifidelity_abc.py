r"""Multifidelity rejection ABC: a baseline without networks, for comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlsbi.inference.observations import read_observation
from mlsbi.levels import LevelStack, map_noise
from mlsbi.randomness import child_seed
from mlsbi.simulation.seeding import RowSource

__all__ = ["WeightedDraws", "multifidelity_abc"]

_STREAM = 1 << 41
_CONTINUING = 0  # what a seed is for
_FEWEST = 8
_BATCH = 1024


@dataclass(frozen=True, eq=False)
class WeightedDraws:
    r"""Parameters with weights that may be negative, whose weighted means are those of the ABC posterior.

    Args:
        theta: Prior draws of weights other than 0, shape `(n, D)`.
        weights: Their weights, shape `(n,)`.
        tolerances: Of the cheap and the expensive level's distance.
        continuation: Probability of an expensive run behind a cheap run that was accepted, and that was not.
        runs: Cheap and expensive runs.
    """

    theta: Tensor
    weights: Tensor
    tolerances: tuple[float, float]
    continuation: tuple[float, float]
    runs: tuple[int, int]

    @property
    def negative(self) -> float:
        """Negative weight over positive weight: what `sample` leaves out."""
        return float(-self.weights.clamp(max=0).sum() / self.weights.clamp(min=0).sum())

    @property
    def effective(self) -> float:
        """As many equally weighted draws have the same variance."""
        return float(self.weights.sum().square() / self.weights.square().sum())

    def sample(self, n: int, *, seed: int) -> Tensor:
        """Draws `(n, D)` by the weights; negative ones count as 0, which is not exact.

        Raises:
            ValueError: If no weight is positive.
        """
        positive = self.weights.clamp(min=0)
        if not bool((positive > 0).any()):
            raise ValueError("No draw has a positive weight: take more runs, or a larger share of accepted ones.")
        chosen = torch.multinomial(positive, n, replacement=True, generator=torch.Generator().manual_seed(seed))
        return self.theta[chosen]


def multifidelity_abc(
    stack: LevelStack, x_o: Any, *, low_runs: int, high_runs: int, seed: int, accepted: float = 0.05,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> WeightedDraws:  # fmt: skip
    r"""Rejection ABC on the cheapest level, corrected by runs of the finest at the same theta and noise.

    A cheap run is accepted where its distance from the observation is below a tolerance. Behind some of them, with
    probability :math:`\eta`, the finest level is run too:

    .. math:: w = \tilde a + (a - \tilde a) / \eta \text{ where it was run, else } \tilde a,

    which has the mean of the finest level's acceptance :math:`a` whatever the cheap level is worth. A pilot on half of
    the expensive runs sets the tolerances, and probabilities for accepted and for rejected cheap runs that minimise
    variance times cost; they are scaled to use up the rest. All in this process, kept nowhere.

    Args:
        stack: Prior, noise and levels; the first and the last are used.
        x_o: Observation, shape `(...)` or `(1, ...)`.
        low_runs: Runs of the cheapest level.
        high_runs: Runs of the finest level, at least 16 and at most `low_runs`.
        seed: Seed of everything random.
        accepted: Share of runs that the tolerances accept.
        distance: `distance(x, x_o)` of outputs `(n, ...)` and the observation `(1, ...)`, `(n,)`; when left out the
            Euclidean one, outputs in units of their standard deviation over the pilot.

    Raises:
        ValueError: If numbers are out of range, there is one level alone, the observation does not fit, or an output is
            not finite.

    References:
        | Multifidelity approximate Bayesian computation (Prescott and Baker, 2020)
        | https://doi.org/10.1137/18M1229742

    Example:
        >>> from mlsbi import tasks
        >>> task = tasks.get("ou2")
        >>> found = multifidelity_abc(task.stack, task.test(1, 0)[1], low_runs=500, high_runs=60, seed=0)
        >>> found.sample(3, seed=0).shape, found.runs[1] <= 60
        (torch.Size([3, 2]), True)
    """
    if len(stack) < 2:
        raise ValueError(f"Expected a stack of at least 2 levels; got {list(stack.names)}.")
    if not 2 * _FEWEST <= high_runs <= low_runs:
        raise ValueError(f"Expected at least {2 * _FEWEST} high_runs, and as many low_runs; got {high_runs} and "
                         f"{low_runs}.")
    if not 0 < accepted < 1:
        raise ValueError(f"Expected a share between 0 and 1 as accepted; got {accepted!r}.")
    source = RowSource(stack, seed=seed, stream=_STREAM)
    theta = source.thetas(low_runs)
    cheap = _run(stack, 0, source, torch.arange(low_runs))
    observed = read_observation(x_o, tuple(cheap.shape[1:]))
    pilot = high_runs // 2
    fine = _run(stack, -1, source, torch.arange(pilot))
    measure = _scaled(fine) if distance is None else distance
    low_distance, high_distance = measure(cheap, observed), measure(fine, observed)
    share = max(accepted, 4 / pilot)
    tolerances = float(low_distance.quantile(share)), float(high_distance.quantile(share))
    low_in, high_in = low_distance <= tolerances[0], high_distance <= tolerances[1]
    continuation = _continuation(low_in, low_in[:pilot], high_in, cost=_cost_ratio(stack))
    rest = low_in[pilot:]
    continuation = _spread(continuation, int(rest.sum()), int((~rest).sum()), high_runs - pilot)
    behind = torch.tensor(continuation, dtype=torch.float64)
    eta = torch.where(rest, behind[0], behind[1])
    uniform = torch.rand(len(rest), generator=torch.Generator().manual_seed(child_seed(seed, _STREAM, _CONTINUING)),
                         dtype=torch.float64)
    chosen = (uniform < eta).nonzero()[:, 0]
    weights = low_in.double()
    weights[:pilot] = high_in.double()  # the finest level is run behind each of these
    if len(chosen) > high_runs - pilot:  # by chance; the first of them are as good as any
        eta = eta * (high_runs - pilot) / len(chosen)
        chosen = chosen[: high_runs - pilot]
    if len(chosen):
        more = measure(_run(stack, -1, source, pilot + chosen), observed) <= tolerances[1]
        weights[pilot + chosen] += (more.double() - low_in[pilot + chosen].double()) / eta[chosen]
    kept = weights != 0
    return WeightedDraws(theta[kept], weights[kept], tolerances, continuation, (low_runs, pilot + len(chosen)))


def _run(stack: LevelStack, level: int, source: RowSource, rows: Tensor) -> Tensor:
    """Outputs of a level at some rows of a stream."""
    outputs = []
    for part in rows.split(_BATCH):
        theta, noise = source.rows(int(part[0]), int(part[-1]) + 1)
        own = part - part[0]
        outputs.append(stack.levels[level].run(theta[own], map_noise(partial(_pick, own), noise)))
    found = torch.cat(outputs)
    lost = int((~torch.isfinite(found)).flatten(1).any(1).sum())
    if lost:
        raise ValueError(f"Expected finite outputs; {lost} of {len(found)} of level '{stack.names[level]}' are not.")
    return found


def _pick(rows: Tensor, tensor: Tensor) -> Tensor:
    return tensor[rows]


def _spread(continuation: tuple[float, float], inside: int, out: int, runs: int) -> tuple[float, float]:
    """Probabilities in the ratio of two, none above 1, whose expected number of runs is what there is."""
    first, second = continuation
    scale = runs / max(first * inside + second * out, 1e-12)
    first, second = scale * first, scale * second
    if first > 1:
        first, second = 1.0, (runs - inside) / max(out, 1)
    elif second > 1:
        first, second = (runs - out) / max(inside, 1), 1.0
    return min(max(first, 1e-9), 1.0), min(max(second, 1e-9), 1.0)


def _scaled(outputs: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    scale = outputs.flatten(1).std(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return lambda x, x_o: ((x - x_o).flatten(1) / scale).norm(dim=1)


def _cost_ratio(stack: LevelStack) -> float:
    """Cost of a cheap run over that of an expensive one; a hundredth where costs are not declared."""
    return 0.01 if stack.costs is None else stack.costs[0] / stack.costs[-1]


def _continuation(low_in: Tensor, low_pilot: Tensor, high_pilot: Tensor, *, cost: float) -> tuple[float, float]:
    """Probabilities that minimise variance times cost, behind accepted and rejected cheap runs; see section 3.2."""
    n = len(low_pilot)
    # Half a row each, so that what was not seen among few is not taken for impossible.
    false_in = (float((low_pilot & ~high_pilot).sum()) + 0.5) / n
    false_out = (float((~low_pilot & high_pilot).sum()) + 0.5) / n
    true_in = (float((low_pilot & high_pilot).sum()) + 0.5) / n
    gain = max(true_in - false_in, 0.5 / n)
    inside = float(low_in.double().mean())
    first = math.sqrt(cost / gain * false_in / max(inside, 1e-12))
    return first, math.sqrt(cost / gain * false_out / max(1 - inside, 1e-12))
