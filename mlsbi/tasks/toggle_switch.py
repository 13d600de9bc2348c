r"""A genetic toggle switch, seen once at the end of a noisy path; cheaper levels stop the path earlier."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Generator, Tensor

from mlsbi.density.mixture_density import MDN
from mlsbi.levels import Level, LevelStack
from mlsbi.priors import BoxPrior
from mlsbi.tasks.task import Task

__all__ = ["build", "noise", "run", "truncated_normal"]

STEPS = (50, 80, 300)
"""Length of the path at each level, which is also its cost."""

START = 10.0
LARGEST = 2000.0
"""Outputs above count as this."""

_NAMES = ("alpha_1", "alpha_2", "beta_1", "beta_2", "mu", "sigma", "gamma")
_LOW = (0.01, 0.01, 0.01, 0.01, 250.0, 0.01, 0.01)
_HIGH = (50.0, 50.0, 5.0, 5.0, 450.0, 0.5, 0.4)
_SD = {"paper": 1.0, "code": 0.5**0.5}


def build(sd: Literal["paper", "code"] = "paper") -> Task:
    r"""The task "toggle_switch": seven parameters of two genes that repress each other, by one gene's expression.

    .. math::
        u_{t+1} &\sim TN(u_t + \alpha_1 / (1 + v_t^{\beta_1}) - (1 + 0.03 u_t), \; 0.5) \\
        v_{t+1} &\sim TN(v_t + \alpha_2 / (1 + u_t^{\beta_2}) - (1 + 0.03 v_t), \; 0.5) \\
        x &\sim TN(\mu + u_T, \; \mu \sigma / u_T^\gamma)

    with :math:`u_0 = v_0 = 10` and TN(m, s) a normal of mean m and standard deviation s truncated to positive values.
    T is 50, 80 or 300, and the cost. Levels are coupled by their uniforms: a shorter path reads the first of a longer
    one's, and x has the same one at every level. Over the prior, x of neighbouring levels has a correlation of 0.98
    (0.77 if they shared theta alone). At one theta it is 0.95 for the median theta, and 0.1 to 0.5 where it is least:
    there the switch tips between the two ends.

    An output is one number, at most 2000: the simulators clamp it. That changes 0.14% of the outputs of the finest
    level and 0.04% of the others, but for a few theta it is most of them.

    Args:
        sd: "code" divides all three standard deviations by the root of 2, as the authors' code does by writing the
            inverse CDF with the error function. "paper" has them as above.

    Raises:
        ValueError: If `sd` is neither "paper" nor "code".
    """
    if sd not in _SD:
        raise ValueError(f"Expected sd='paper' or sd='code' for task 'toggle_switch'; got {sd!r}.")
    stack = LevelStack(
        prior=BoxPrior(_LOW, _HIGH, names=_NAMES),
        noise=noise,
        levels=[Level(f"{steps} steps", partial(run, steps=steps, scale=_SD[sd]), cost=float(steps))
                for steps in STEPS],
    )
    return Task.from_stack(
        "toggle_switch",
        stack,
        title="Genetic toggle switch: expression of a gene after 300 steps; lower levels stop after 80 and 50.",
        budgets=((10_000, 500, 100), (9260, 200, 300), (1077, 1077, 1077)),
        density=MDN(components=2, hidden=20, layers=2),
        estimator="nle",
        observations=10,
        x_names=("cell",),
        citation="Bonassi and West, Sequential Monte Carlo with adaptive weights for approximate Bayesian computation, "
        "Bayesian Analysis 10 (2015); levels and budgets of Hikida, Bharti, Jeffrey, Briol, Multilevel neural "
        "simulation-based inference, NeurIPS 2025, arXiv 2506.06087",
    )


def noise(n: int, generator: Generator) -> dict[str, Tensor]:
    r"""Uniform noise, float32: `"path"` for u and v at every step, shape `(n, 2, 300)`, and `"last"` for x, `(n, 1)`.

    None is 0 or 1: they are multiples of 2^-24 below 1, and 0 counts as 2^-25.
    """
    shapes = {"path": (n, 2, STEPS[-1]), "last": (n, 1)}
    return {name: torch.rand(shape, generator=generator).clamp_(min=2.0**-25) for name, shape in shapes.items()}


def run(theta: Tensor, noise: dict[str, Tensor], steps: int = STEPS[-1], scale: float = 1.0) -> Tensor:
    """The output after some steps, worked out in float64.

    Args:
        theta: Parameters, shape `(n, 7)`.
        noise: Uniforms, as `noise` draws them; of a path the first `steps` are read.
        steps: Length of the path, at most that of the noise.
        scale: What all standard deviations are multiplied by.

    Returns:
        Outputs, shape `(n, 1)`, above 0 and at most 2000, in the dtype of theta.
    """
    alpha_1, alpha_2, beta_1, beta_2, mu, sigma, gamma = theta.double().unbind(1)
    kick = torch.full_like(mu, 0.5 * scale)
    u = v = torch.full_like(mu, START)
    for for_u, for_v in noise["path"][:, :, :steps].permute(2, 1, 0).contiguous():  # (n,) each: a step is one run
        mean_u = u + alpha_1 / (1 + v**beta_1) - (1 + 0.03 * u)
        mean_v = v + alpha_2 / (1 + u**beta_2) - (1 + 0.03 * v)
        u, v = truncated_normal(mean_u, kick, for_u), truncated_normal(mean_v, kick, for_v)
    x = truncated_normal(mu + u, scale * mu * sigma / u**gamma, noise["last"][:, 0])
    return x.clamp(max=LARGEST)[:, None].to(theta.dtype)


def truncated_normal(mean: Tensor, sd: Tensor, uniform: Tensor) -> Tensor:
    r"""Draws from normals truncated to positive values, by the inverse CDF, float64.

    .. math:: x = m - s \, \Phi^{-1}((1 - u) \Phi(m / s))

    The argument of :math:`\Phi^{-1}` is a probability to lie *above* x, which keeps its digits where it is small.

    Args:
        mean: Mean m before truncation, shape `(n,)`; above -37 sd, as nothing is left in float64 beyond. The task's
            own are above -3 sd.
        sd: Standard deviation s before truncation, shape `(n,)`.
        uniform: Uniforms u on (0, 1), shape `(n,)`.

    Returns:
        Draws, shape `(n,)`, above 0 and growing with u.

    Example:
        >>> truncated_normal(torch.tensor([10.0, 0.0]), torch.ones(2), torch.tensor([0.5, 0.5]))
        tensor([10.0000,  0.6745], dtype=torch.float64)
    """
    mean, sd = mean.double(), sd.double()
    return mean - sd * torch.special.ndtri((1 - uniform.double()) * torch.special.ndtr(mean / sd))
