r"""Control-variate weights: the estimator of least variance among those that telescope, for given sizes and with them.

:math:`\sum_\ell a_\ell \bar f^\ell - a_{\ell-1} \bar f^{\ell-1}` is unbiased for any fixed weights with
:math:`a_L = 1`. For sizes n its variance is the least where

.. math::
    -\frac{\gamma_\ell}{n_\ell} a_{\ell-1}
    + \Big(\frac{1}{n_\ell} + \frac{1}{n_{\ell+1}}\Big) a_\ell \mathrm{Var} f^\ell
    - \frac{\gamma_{\ell+1}}{n_{\ell+1}} a_{\ell+1} = 0, \qquad \gamma_\ell = \mathrm{Cov}(f^\ell, f^{\ell-1}),

solved here from the coarsest level upwards in terms of the regression of each level on the one below, so that
variances are sums of positive parts. :math:`V_\ell(a) / n_\ell`, a square over a size, is convex in sizes and weights
together, so minimising over one and then the other, again and again, ends at the best pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlsbi.allocation.arrays import Array
from mlsbi.allocation.goals import Goal
from mlsbi.allocation.integers import best_integers
from mlsbi.allocation.problem import Problem

__all__ = ["Coupling", "round_weighted", "weigh"]

_STILL = 1e-11  # relative gain of a step below which the sizes stand still
_STEPS = 1000  # random problems stand still after 7 in the median and 50 at most


@dataclass(frozen=True, eq=False)
class Coupling:
    r"""How neighbouring levels vary together, for each of K outputs.

    Args:
        variances: Variances of the unweighted corrections, shape `(K, L + 1)`.
        own: Variances of the levels themselves, shape `(K, L + 1)`.
        slopes: Of the regression of each level on the one below, shape `(K, L)`.
        residuals: Variance that it leaves, after level 0's own, shape `(K, L + 1)`.
    """

    variances: Array
    own: Array
    slopes: Array
    residuals: Array

    @classmethod
    def read(cls, problem: Problem) -> Coupling | None:
        r"""The coupling of a problem's levels; `None` without their covariance."""
        if problem.covariance is None:
            return None
        own = np.diagonal(problem.covariance, axis1=1, axis2=2)
        corrections, fine, coarse = problem.variances[:, 1:], own[:, 1:], own[:, :-1]
        varies = coarse > 0
        scale = np.where(varies, coarse, 1)
        slopes = np.where(varies, (fine + coarse - corrections) / (2 * scale), 0)
        # fine - cov^2 / coarse, by Heron's formula for the triangle with these three squared sides: no cancellation.
        apart, together = (np.sqrt(fine) - np.sqrt(coarse)) ** 2, (np.sqrt(fine) + np.sqrt(coarse)) ** 2
        left = np.maximum((corrections - apart) * (together - corrections), 0) / (4 * scale)
        residuals = np.concatenate([problem.variances[:, :1], np.where(varies, left, fine)], axis=1)
        return cls(problem.variances, own, slopes, residuals)

    def weighted(self, weights: Array) -> Array:
        r"""Variances of the weighted corrections :math:`a_\ell f^\ell - a_{\ell-1} f^{\ell-1}`, shape `(K, L + 1)`.

        Equal weights give exactly their square times the unweighted variance, which was measured on differences.
        """
        fine, coarse = weights[:, 1:], weights[:, :-1]
        corrections = fine * coarse * self.variances[:, 1:]
        corrections += (fine - coarse) * (fine * self.own[:, 1:] - coarse * self.own[:, :-1])
        return np.concatenate([weights[:, :1] ** 2 * self.variances[:, :1], np.maximum(corrections, 0)], axis=1)

    def best_weights(self, n: Array) -> Array:
        r"""Weights of least variance for sizes `n`, `(L + 1,)` to `(K, L + 1)`."""
        above = (self.own[:, :-1] / n[1:]).tolist()  # plain numbers: levels are few and follow from each other
        weights = np.ones_like(self.own)
        for k, left in enumerate((self.residuals / n).tolist()):
            below = left[0]  # least variance of all the levels below, for weight 1 on the last of them
            ratios = []  # of each weight to the next
            for own, slope, rest in zip(above[k], self.slopes[k].tolist(), left[1:], strict=True):
                # Where nothing depends on a weight, any does.
                ratios.append(own * slope / (below + own) if below + own > 0 else 1.0)
                below = rest + below * ratios[-1] * slope
            weights[k, :-1] = np.multiply.accumulate(ratios[::-1])[::-1]
        # Variances that contradict the covariance a little, as its check allows, may make these no better than ones.
        better = (self.weighted(weights) / n).sum(axis=1) < (self.variances / n).sum(axis=1)
        return np.where(better[:, None], weights, 1.0)


def weigh(goal_of: Callable[[Array], Goal], coupling: Coupling, start: Array) -> Array:
    r"""Weights of the best continuous sizes and weights together.

    Alternates between the best sizes for the weights and the best weights for
    the sizes; after every two steps it tries a far one in the direction that
    they showed (squared extrapolation), since short ones may be many.

    Args:
        goal_of: What sizes minimise, for variances of the corrections of shape `(K, L + 1)`.
        coupling: How the levels vary together.
        start: Weights for which sizes are feasible, shape `(K, L + 1)`.

    Returns:
        Shape `(K, L + 1)`, never worse than `start`.

    References:
        | Simple and globally convergent methods for accelerating the convergence of any EM algorithm
        | (Varadhan and Roland, 2008)
    """

    def sizes(weights: Array) -> tuple[float, Array]:
        goal = goal_of(coupling.weighted(weights))
        if not goal.feasible(goal.lower, goal.upper):
            return np.inf, goal.lower
        n = goal.continuous()
        return float(goal.scores(n[None])[0][0]), n

    weights = start
    best, n = sizes(weights)
    for _ in range(_STEPS):
        once = coupling.best_weights(n)
        twice = coupling.best_weights(sizes(once)[1])
        found = (*sizes(twice), twice)
        first, second = once - weights, twice - 2 * once + weights
        bend = float(np.linalg.norm(second))
        if bend > 0:
            length = max(float(np.linalg.norm(first)) / bend, 1.0)
            far = weights + 2 * length * first + length**2 * second
            found = min((*sizes(far), far), found, key=lambda step: step[0])
        if found[0] >= best * (1 - _STILL):
            break
        best, n, weights = found
    return weights


def round_weighted(
    goal_of: Callable[[Array], Goal], coupling: Coupling, candidates: Sequence[Array]
) -> tuple[Array, Array]:
    r"""The best of some whole sizes, improved in turn with their weights until neither improves.

    Args:
        goal_of: As in `weigh`.
        coupling: How the levels vary together.
        candidates: Whole sizes that are feasible with their best weights, shape `(L + 1,)` each.

    Returns:
        Sizes, shape `(L + 1,)`, and their best weights, shape `(K, L + 1)`.
    """

    def fit(n: Array) -> tuple[tuple[float, float], Array, Array]:
        weights = coupling.best_weights(n)
        score, tie = goal_of(coupling.weighted(weights)).scores(n[None])
        return (float(score[0]), float(tie[0])), n, weights

    found = min((fit(n) for n in candidates), key=lambda fitted: fitted[0])
    while True:
        best, n, weights = found
        found = fit(best_integers(goal_of(coupling.weighted(weights))))
        if found[0] >= best:
            return n, weights
