r"""The theorems' assumptions: log-concave laws (A1), finite fourth moments (A2), a smooth density (A3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlsbi.randomness import child_seed
from theory_checks.integrands import Integrand
from theory_checks.jumps import count_jumps, random_way
from theory_checks.measuring import Measured
from theory_checks.samples import FEWEST_FOR_TAILS, hill, looks_infinite

__all__ = ["Assumption", "check_assumptions"]

_RADII = (1.0, 10.0, 100.0, 1000.0)  # times as far from the middle as rows are
_DISTANCE = 1e-3  # standard deviations, over which Lipschitz ratios are taken
_REACH = 0.1  # standard deviations along which jumps of the derivative are looked for
_GROWS = 3.0  # times, from one radius to the next, beyond which a ratio is said to grow
_PAIRS = 2048
_FOURTH = 4.0
_HINT = (". If the simulator makes its noise from uniforms, by quantiles or logarithms, draw that noise itself "
         "instead, in which the derivative is bounded")


@dataclass(frozen=True)
class Assumption:
    r"""What is known of an assumption.

    Args:
        name: `"A1"`, `"A2"` or `"A3"`.
        verdict: It is known to hold, nothing speaks against it, it is in doubt, or it fails.
        reason: One sentence.
    """

    name: str
    verdict: Literal["holds", "plausible", "doubtful", "fails"]
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.verdict}: {self.reason}"


def check_assumptions(measured: Measured, *, seed: int = 0) -> tuple[Assumption, Assumption, Assumption]:
    r"""What can be said of A1, A2 and A3.

    Args:
        measured: Rows of a stack with an integrand.
        seed: Of the points at which the density is looked at.
    """
    return _a1(measured), _a2(measured), _a3(measured, seed)


def _a1(measured: Measured) -> Assumption:
    law = measured.law
    if law.constant is None:
        return Assumption("A1", "fails" if law.log_concave is False else "doubtful", law.reason)
    if law.log_concave:
        certain = law.source in ("table", "bracketed", "given")
        return Assumption("A1", "holds" if certain else "plausible", f"theta is {measured.theta_law.name}, the noise "
                                                                     f"{measured.noise_law.name}: log-concave")
    return Assumption("A1", "fails" if law.log_concave is False else "doubtful",
                      f"{law.reason}. (P) needs no more than its constant, which is known")


def _a2(measured: Measured) -> Assumption:
    if measured.problem:
        return Assumption("A2", "doubtful", "it cannot be told: nothing was measured")
    if measured.rows < FEWEST_FOR_TAILS:
        return Assumption("A2", "doubtful", f"{measured.rows} rows are too few to tell whether fourth moments are "
                                            f"finite; {FEWEST_FOR_TAILS} would do")
    worst: tuple[float, float, str] = math.inf, 0.0, ""
    infinite = False
    for place, name in enumerate(measured.stack.names):
        for what, fourth in (("|G|", measured.output_fourth[place]), ("|grad G|", measured.gradient_fourth[place])):
            size = fourth**0.25
            index, error = hill(size)
            infinite |= looks_infinite(size, _FOURTH)
            if index < worst[0]:
                worst = index, error, f"{what} of '{name}'"
    index, error, where = worst
    if infinite:
        return Assumption("A2", "fails", f"the tail index of {where} is about {index:.1f} +- {error:.1f} (Hill): its "
                                         f"fourth moment looks infinite, and no sample estimates it{_HINT}")
    if index < _FOURTH:
        return Assumption("A2", "doubtful", f"the tail index of {where} is about {index:.1f} +- {error:.1f} (Hill), "
                                            "below 4: a few rare rows decide the fourth moment, if it is finite")
    told = "all tails are bounded" if math.isinf(index) else f"the heaviest tail is that of {where}, index {index:.1f}"
    return Assumption("A2", "plausible", f"fourth moments of levels and their derivatives are finite: {told} (Hill)")


def _a3(measured: Measured, seed: int) -> Assumption:
    integrand = measured.integrand
    if integrand is None or measured.problem:
        return Assumption("A3", "doubtful", measured.problem or "there is no density to look at")
    if (measured.jumps > 0).any():
        return Assumption("A3", "fails", "the density itself jumps as a function of theta and x")
    if integrand.growth is not None and integrand.lipschitz is not None:
        growth, lipschitz = float(integrand.growth.max()), float(integrand.lipschitz.max())
        return Assumption("A3", "holds", f"K_grow = {growth:.3g} and K_Lip = {lipschitz:.3g} are known in closed form")
    generator = torch.Generator().manual_seed(child_seed(seed, 3))
    growths = [_growth(integrand, measured, radius) for radius in _RADII]
    jumps, lipschitz = _lipschitz(integrand, measured, generator)
    if not all(map(math.isfinite, growths)):
        return Assumption("A3", "fails", "the density's derivative is not finite far from the data")
    if growths[-1] > _GROWS * growths[-2] and growths[-2] > _GROWS * growths[-3]:
        return Assumption("A3", "fails", "the density's derivative grows faster than linearly: relative to |x| + "
                                         f"|theta| + 1 it is {growths[0]:.3g} at the data and {growths[-1]:.3g} a "
                                         "thousand times as far out")
    if jumps:
        share = f"{jumps} of {min(_PAIRS, len(measured.theta))} rows"
        return Assumption("A3", "fails", "the density's derivative jumps within a tenth of a standard deviation of "
                                         f"{share} (a spline at its knots, ReLU at its kinks); only (P) applies")
    return Assumption("A3", "plausible", f"sampled growth at most {max(growths):.3g}, Lipschitz ratio at most "
                                         f"{lipschitz:.3g}; neither is a proof, so (S0) and (Sl) are not stated")


def _growth(integrand: Integrand, measured: Measured, radius: float) -> float:
    """Largest |grad log q| / (|x| + |theta| + 1) at rows moved so many times as far from zero."""
    theta, x = radius * measured.theta[:_PAIRS], radius * measured.outputs[-1][:_PAIRS]
    slope = _slope(integrand, theta, x)
    size = theta.square().sum(1).sqrt() + x.flatten(1).square().sum(1).sqrt() + 1
    return float((slope.square().sum(-1).sqrt() / size[:, None]).max())


def _lipschitz(integrand: Integrand, measured: Measured, generator: torch.Generator) -> tuple[int, float]:
    """Near how many rows of the finest level the derivative jumps, and its largest change over a short distance."""
    theta, x = measured.theta[:_PAIRS], measured.outputs[-1][:_PAIRS]
    move, unit = random_way(theta, x, generator)

    def slope(at: Tensor) -> Tensor:
        return _slope(integrand, *move(at))

    here = slope(torch.zeros(len(theta), dtype=torch.float64))
    mix = torch.randn(here.shape[1:], generator=generator, dtype=torch.float64)
    spread = float((here * mix).sum((1, 2)).std())
    jumps = int(count_jumps(lambda at: (slope(at) * mix).sum((1, 2))[:, None] / max(spread, 1e-300), len(theta),
                            reach=_REACH))
    change = slope(torch.full((len(theta),), _DISTANCE, dtype=torch.float64)) - here
    ratio = change.square().sum(-1).sqrt() / (_DISTANCE * unit[:, None])
    return jumps, float(ratio.max())


def _slope(integrand: Integrand, theta: Tensor, x: Tensor) -> Tensor:
    """Derivatives in v, `(n, components, D + d)`."""
    found = integrand.evaluate(theta, x)
    return torch.cat([found.theta, found.x], -1)
