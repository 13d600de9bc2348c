r"""How far a neural likelihood is from the simulator's own: by its exact density, or by draws where none is known.

By draws, with one simulation for any number of likelihoods:

    theta, x, again = draw_twice(task, thetas=1000, draws=500, seed=seed)
    null = mean_mmd(x, again)                        # two sets of the same law; its expectation is 0
    score = likelihood_mmd(nle, theta, x, limits=(0.0, LARGEST), seed=seed)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from mlsbi import NLE
from mlsbi.diagnostics import Score, kld, mmd
from mlsbi.simulation.sets import simulate_sets
from mlsbi.store.records import TEST_STREAM
from mlsbi.tasks import Task

__all__ = ["draw_twice", "likelihood_kl", "likelihood_mmd", "mean_mmd"]

_NO_WIDTH = 1e-12  # far below the distance of different outputs in float32


def likelihood_kl(nle: NLE, task: Task, rows: int, seed: int) -> dict[str, float]:
    r"""Kullback-Leibler divergence E[log p(x | theta) - log q(x | theta)] over test rows, exact in expectation.

    Args:
        nle: A trained likelihood of the task.
        task: A task whose exact likelihood is known.
        rows: Test rows, each with its own theta.
        seed: Seed of the test rows.

    Returns:
        `kld`, the mean over rows; `median`, theirs; `test_error`, the standard error due to the rows; and `exact_nll`,
        the mean of -log p.
    """
    if task.likelihood is None:
        raise ValueError(f"Expected a task with an exact likelihood; '{task.name}' has none.")
    theta, x = task.test(rows, seed)
    log_p = task.likelihood(x, theta).double()
    difference = (log_p - nle.likelihood.log_prob(x, theta)).numpy()[None]
    score = kld(difference, np.zeros_like(difference))
    return {"kld": score.mean, "median": score.median, "test_error": score.standard_error,
            "exact_nll": -log_p.mean().item()}


def likelihood_mmd(nle: NLE, theta: Tensor, x: Tensor, *, limits: tuple[float, float], seed: int) -> Score:
    r"""Squared maximum mean discrepancy between a likelihood's draws and the simulator's, as `mean_mmd` has it.

    Args:
        nle: A trained likelihood.
        theta: Test parameters, shape `(B, D)`.
        x: Simulated outputs at each, shape `(B, m, 1)`; as many are drawn from the likelihood.
        limits: The least and the greatest x that the simulator gives; draws beyond count as these.
        seed: Seed of the likelihood's draws.
    """
    sets, draws = x.shape[:2]
    drawn = nle.likelihood.sample(theta.repeat_interleave(draws, 0), seed=seed)
    return mean_mmd(x, drawn.clamp(*limits).reshape(sets, draws, -1))


def mean_mmd(reference: Iterable[Tensor], samples: Iterable[Tensor]) -> Score:
    r"""Squared maximum mean discrepancy between two sets of draws, averaged over B pairs of sets.

    The kernel is Gaussian, :math:`\exp(-|a - b|^2 / (2 h^2))`, and h is the median distance between any two draws of
    *that* pair's pooled sets, so that pairs of any width count alike. Where h is 0, as most pairs
    of draws are both the greatest that the simulator gives, the kernel is its limit: 1 for equal draws, 0 for others.

    The estimate is the unbiased one: for sets of the same law its expectation is 0 even though h depends on the draws,
    since h does not tell the sets apart. It is then below 0 in more than half of the pairs.

    Args:
        reference: B sets of draws, each `(n, D)`.
        samples: B sets of draws, each `(m, D)`, independent of the first.
    """
    values = np.array([_squared_mmd(x.numpy(), y.numpy()) for x, y in zip(reference, samples, strict=True)])
    error = values.std(ddof=1) / len(values) ** 0.5
    return Score(float(values.mean()), float(np.median(values)), float(error), len(values))


def _squared_mmd(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    counts = np.unique(np.concatenate([x, y]), axis=0, return_counts=True)[1]
    pairs, equal = counts.sum() * (counts.sum() - 1), (counts * (counts - 1)).sum()
    return mmd(x, y, bandwidth=_NO_WIDTH if 2 * equal > pairs else None)


def draw_twice(task: Task, *, thetas: int, draws: int, seed: int, level: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    r"""Test theta `(thetas, D)`, and two independent sets of outputs `(thetas, draws, ...)` of one level at each.

    Every level gives the same theta. The first sets of two levels have the same noise and so are not independent; the
    first of one and the second of the other are.
    """
    if task.stack is None:
        raise ValueError(f"Expected a task that simulates; '{task.name}' has data only.")
    theta, x = simulate_sets(task.stack, level, thetas, 2 * draws, seed=seed, stream=TEST_STREAM)
    return theta, x[:, :draws], x[:, draws:]
