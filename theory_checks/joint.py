r"""Laws on R^D by their log density: coordinate by coordinate where it separates, else by its curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from theory_checks.brackets import from_log_density
from theory_checks.poincare import Law, product

__all__ = ["from_joint_density", "product_of_few"]

Array: TypeAlias = np.ndarray[Any, Any]


def from_joint_density(
    log_density: Callable[[Tensor], Tensor],
    draws: Tensor,
    *,
    names: Sequence[str],
    low: Tensor,
    high: Tensor,
    straight_beyond: float = math.inf,
) -> Law:
    r"""The law of a joint density.

    Whether it separates is tested by exchanging coordinates between draws. Where it does not, and the Hessian of
    `-log p` is positive at all draws and at points twice and four times as far out, the constant is the smaller of two
    bounds: 1 over its least eigenvalue (Bakry and Emery), and `16 (E|z - E z|)^2 / log(2)^2`, which holds for
    log-concave laws (isoperimetry by Kannan, Lovász and Simonovits, then Cheeger's inequality).

    Args:
        log_density: Log density up to a constant of rows `(n, D)`, float64, `-inf` outside the support.
        draws: Draws of the law, shape `(n, D)`, float64.
        names: What the coordinates are called.
        low: Lower edges of the support, shape `(D,)`, perhaps infinite.
        high: Upper edges.
        straight_beyond: Distance from 0 beyond which the log density of one coordinate is continued in a straight
            line, where rounding would spoil it.

    References:
        | Isoperimetric problems for convex bodies and a localization lemma (Kannan, Lovász and Simonovits, 1995)
        | https://doi.org/10.1007/BF02574061
    """
    draws = draws[torch.isfinite(draws).all(-1)]
    if not _separates(log_density, draws):
        return _law_by_curvature(log_density, draws)
    middle = draws.median(0).values
    laws = []
    for index, name in enumerate(names):

        def along(x: Array, index: int = index) -> Array:
            rows = middle.repeat(len(x), 1)
            rows[:, index] = torch.from_numpy(np.array(x, dtype=np.float64))
            with torch.no_grad():
                return log_density(rows).numpy()

        points = draws[:, index].quantile(torch.linspace(0.05, 0.95, 19, dtype=torch.float64)).tolist()
        density = along if math.isinf(straight_beyond) else _continued(along, straight_beyond)
        laws.append(from_log_density(density, float(low[index]), float(high[index]), name=name, points=points))
    return product_of_few(laws)


def product_of_few(laws: Sequence[Law]) -> Law:
    """The product of independent laws, in which equal ones are named once."""
    return replace(product(list(dict.fromkeys(laws))), coordinates=sum(law.coordinates for law in laws))


def _separates(log_density: Callable[[Tensor], Tensor], draws: Tensor) -> bool:
    """Whether exchanging one coordinate between two draws never changes the sum of their log densities."""
    half = len(draws) // 2
    first, second = draws[:half], draws[half : 2 * half]
    with torch.no_grad():
        together = log_density(first) + log_density(second)
        for index in range(draws.shape[1]):
            a, b = first.clone(), second.clone()
            a[:, index], b[:, index] = second[:, index], first[:, index]
            mixed = log_density(a) + log_density(b)
            if not bool(((mixed - together).abs() <= 1e-9 * (1 + together.abs())).all()):
                return False
    return True


def _continued(log_density: Callable[[Array], Array], beyond: float) -> Callable[[Array], Array]:
    ends = np.array([-beyond, 1 - beyond, beyond - 1, beyond])
    heights = log_density(ends)
    left, right = heights[1] - heights[0], heights[2] - heights[3]

    def continued(x: Array) -> Array:
        drop = np.maximum(-beyond - x, 0) * left + np.maximum(x - beyond, 0) * right
        return log_density(np.clip(x, -beyond, beyond)) - drop

    return continued


def _law_by_curvature(log_density: Callable[[Tensor], Tensor], draws: Tensor) -> Law:
    dim = draws.shape[1]
    name = "dependent coordinates"
    centre = draws.mean(0)
    points = torch.cat([centre + stretch * (draws - centre) for stretch in (1.0, 2.0, 4.0)]).requires_grad_()
    values = log_density(points)
    if not values.requires_grad:
        return Law(name, None, log_concave=None, source="none", coordinates=dim, reason="the density does not separate "
                   "over coordinates and cannot be differentiated: no constant is known")
    (gradient,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    rows = [torch.autograd.grad(gradient[:, i].sum(), points, retain_graph=True, materialize_grads=True)[0]
            if gradient.requires_grad else torch.zeros_like(points) for i in range(dim)]
    hessian = -torch.stack(rows, 1).detach()
    usable = torch.isfinite(values.detach()) & torch.isfinite(hessian).all(-1).all(-1)
    eigenvalues = torch.linalg.eigvalsh((hessian + hessian.mT)[usable] / 2)
    least = eigenvalues[:, 0]
    negative = least < -1e-9 * eigenvalues.abs().max()
    if bool(negative.any()):
        return Law(name, None, log_concave=False, source="none", coordinates=dim,
                   reason="the density does not separate over coordinates, and its logarithm is not concave at "
                   f"{float(negative.double().mean()):.1%} of {len(least)} sampled points (A1 fails): no constant is "
                   "known")
    smallest = max(float(least.min()), 0.0)
    curvature = 1 / smallest if smallest > 0 else math.inf
    spread = 16 * float((draws - centre).norm(dim=-1).mean() / math.log(2)) ** 2
    told = ("1 over the least eigenvalue of the Hessian of -log p (Bakry and Emery)" if curvature <= spread else
            "16 (E|z - E z|)^2 / log(2)^2 (Kannan, Lovász and Simonovits)")
    return Law(name, min(curvature, spread), log_concave=True, source="sampled", coordinates=dim,
               reason=f"{told}; log-concave at all of {len(least)} sampled points")
