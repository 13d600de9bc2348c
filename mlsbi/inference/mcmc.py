r"""What Markov chains have in common: where they start, when they stop, which draws are kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mlsbi.inference.convergence import Convergence, diagnose, forgotten
from mlsbi.randomness import check_seed

__all__ = ["Chain", "ChainError", "LogDensity", "Step", "check_start", "collect", "flattening", "start_points", "thin"]

LogDensity = Callable[[Tensor], Tensor]

Step = tuple[Tensor, Tensor, Tensor]  # where the chains are (B, C, D), their log density (B, C), acceptance (B,)


class ChainError(RuntimeError):
    """A chain cannot start or stays where it began.

    Attributes:
        targets: Indices of the posteriors of the batch that this happened to.
    """

    def __init__(self, message: str, targets: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.targets = tuple(targets)


@dataclass(frozen=True)
class Chain:
    """Draws from B densities by C chains (or walkers) each, after warm-up, on the CPU.

    Attributes:
        draws: Shape `(steps, B, C, D)`.
        log_density: Unnormalised log density of the draws, shape `(steps, B, C)`.
        convergence: What is known about the chains of each density, length B.
    """

    draws: Tensor
    log_density: Tensor
    convergence: tuple[Convergence, ...]


def start_points(draws: Tensor, log_likelihood: Tensor, count: int, *, seed: int) -> Tensor:
    r"""Prior draws in proportion to their likelihood, all different, for chains to start from.

    The likelihood is raised to the largest power :math:`\beta \le 1` that leaves twice `count` effective draws, so
    chains also start apart where the posterior is so narrow that hardly a prior draw hits it. Where :math:`\beta = 1`
    starts are posterior draws nearly, separate modes in their right weights.

    Args:
        draws: Prior draws in unbounded space, shape `(n, D)`.
        log_likelihood: At the draws, shape `(n,)`, or `(n, B)` for B observations. Draws whose value is not finite
            are left out.
        count: Number of starts of each observation.
        seed: Seed of the choice.

    Returns:
        Starts, shape `(count, D)`, or `(B, count, D)` for B observations.

    Raises:
        ValueError: If fewer than `count` draws have a finite likelihood, for any observation.

    References:
        | Gumbel top-k sampling without replacement (Kool et al., 2019)
        | https://arxiv.org/abs/1903.06059
    """
    value = log_likelihood.detach().double().cpu().reshape(len(draws), -1)
    finite = value.isfinite()
    fewest = int(finite.sum(0).min())
    if fewest == 0:
        raise ValueError(
            "No prior draw has a finite likelihood: the chain cannot start. Check that the observation is like the "
            "training outputs, and that training did not diverge."
        )
    if fewest < count:
        raise ValueError(
            f"Expected at least {count} prior draws with a finite likelihood to start chains from; {fewest} of "
            f"{len(draws)} have one. Pass more prior draws."
        )
    value = torch.where(finite, value - value.where(finite, -torch.inf).max(0).values, -torch.inf)
    power = flattening(value, finite.sum(0).clamp(max=2 * count))
    uniform = torch.rand(value.shape, generator=torch.Generator().manual_seed(check_seed(seed)), dtype=value.dtype)
    chosen = (value * power - (-uniform.log()).log()).topk(count, dim=0).indices  # (count, B)
    return draws[chosen[:, 0] if log_likelihood.ndim == 1 else chosen.T]


def flattening(log_weight: Tensor, wanted: Tensor | int) -> Tensor:
    """The largest powers, up to 1, of weights `(n, B)` that leave `wanted` of them effective, shape `(B,)`."""
    wanted = torch.as_tensor(wanted) * (1 - 1e-9)
    log_weight = log_weight - log_weight.max(0).values
    low, high = torch.full_like(log_weight[0], -80.0), torch.zeros_like(log_weight[0])
    for _ in range(60):  # bisection of the power's logarithm; with power 0 every weight above zero counts
        middle = torch.where(_effective(log_weight * high.exp()) >= wanted, high, (low + high) / 2)
        good = _effective(log_weight * middle.exp()) >= wanted
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return low.exp()


def _effective(log_weight: Tensor) -> Tensor:
    """Effective number of weights down each column."""
    return (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp()


def check_start(good: Tensor) -> None:
    """Raises a `ChainError` unless all chains of all densities `(B, C)` can start."""
    bad = (~good).sum(1)
    if bool(bad.any()):
        targets = bad.nonzero()[:, 0].tolist()
        raise ChainError(
            f"The chain cannot start: the log density or its gradient is not finite at {int(bad.sum())} of "
            f"{good.numel()} starting points. Take them from start_points().",
            targets,
        )


def collect(
    steps: Iterator[Step], method: str, begun: float, effective: int, max_steps: int,
    *, least: int, warmup: int | None, progress: bool, label: str,
) -> Chain:
    """Runs steps until there are `least` draws and enough effective ones; throws away `warmup`, or what is needed."""
    fixed = warmup or 0
    if max_steps < fixed + 8:
        raise ValueError(f"Expected max_steps of at least {fixed + 8}, warm-up with it; got {max_steps}.")
    positions, values, moves = [], [], []
    planned = min(max_steps, fixed + (50 if fixed else 200))
    with tqdm(total=planned, desc=label, unit="step", disable=not progress, leave=False) as bar:
        for count, (z, value, moved) in enumerate(steps, 1):
            bar.update()
            if count > fixed:
                positions.append(z)
                values.append(value)
                moves.append(moved)
            if count < planned:
                continue
            draws, log_density, acceptance = torch.stack(positions), torch.stack(values), torch.stack(moves).mean(0)
            stuck = (acceptance == 0).nonzero()[:, 0].tolist()
            if stuck:
                raise ChainError(f"No chain has moved in {len(draws)} steps: every proposal is rejected. Is the log "
                                 "density finite, and smooth where the chains start?", stuck)
            drop = forgotten(draws[:, 0].numpy(), log_density[:, 0].numpy()) if warmup is None else 0
            seconds = time.perf_counter() - begun
            convergence = tuple(
                diagnose(draws[drop:, b].numpy(), acceptance=acceptance[b].item(), warmup=fixed + drop,
                         seconds=seconds, method=method)
                for b in range(draws.shape[1])
            )
            fewest = min(min(each.effective) for each in convergence)
            kept = draws[drop:, 0, :, 0].numel()
            if count >= max_steps or (
                kept >= least and fewest >= effective and all(each.converged for each in convergence)
            ):
                break
            bar.set_postfix_str(f"{fewest:.0f}/{effective} effective")
            growth = 1.1 * max(effective / fewest, least / kept) if fewest > 0 else 2.0
            planned = bar.total = min(max_steps, math.ceil(count * min(max(growth, 1.2), 1.5)))
    return Chain(draws[drop:], log_density[drop:], convergence)


def thin(chain: Chain, n: int, *, seed: int = 0) -> Tensor:
    """Takes n different draws of each density, spread evenly over steps and chains.

    They are in random order, so that the first few are as good a sample as any. Neighbouring steps are correlated:
    more draws than `chain.convergence` counts as effective add little.

    Args:
        chain: The chain.
        n: Number of draws, at most steps times chains.
        seed: Seed of the order.

    Returns:
        Draws, shape `(n, B, D)`.

    Raises:
        ValueError: If the chain has fewer draws.
    """
    steps, _, chains, _ = chain.draws.shape
    if not 1 <= n <= steps * chains:
        raise ValueError(f"Expected between 1 and {steps * chains} draws, all that the chain has; got {n}. Run a "
                         "longer chain for more.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(check_seed(seed)))
    # Draw k is of step k * steps / n and of chain k modulo C: never more than C are of one step, so none comes twice.
    return chain.draws[order * steps // n, :, order % chains]
