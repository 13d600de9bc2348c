r"""Which laws theta and the noise have in the estimator's own coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor, distributions
from torch.distributions import Distribution

from mlsbi.priors import Unbounded, check_prior, parameter_names, sample_prior
from mlsbi.randomness import child_seed
from theory_checks import poincare
from theory_checks.drawing import FEWEST_DRAWS, DrawnLeaf, draw_leaves
from theory_checks.joint import from_joint_density, product_of_few
from theory_checks.poincare import Law, product
from theory_checks.precision import in_float64
from theory_checks.recognise import Fit, alike, dependent_groups, group_law, recognise, sampled_law

__all__ = ["NoiseLaw", "noise_law", "prior_law"]

_DRAWS = 2048
_DISCRETE = "discrete"
_LARGEST_LOGIT = 25 * math.log(2)  # `Unbounded` goes no further in a box, and float64 soon rounds 1 - theta away


@dataclass(frozen=True)
class NoiseLaw:
    r"""The law of a stack's noise.

    Args:
        law: Of all noise together.
        parts: Independent parts of it: name of the leaf (`noise`, `noise[0]`, `noise['path']`) and law, such as that
            of all standard normals of a leaf.
    """

    law: Law
    parts: tuple[tuple[str, Law], ...]


def prior_law(prior: Distribution, estimator: Literal["npe", "nle"], *, given: float | None = None) -> Law:
    r"""The law of theta in the coordinates in which an estimator's density reads it.

    NPE's density lives in unbounded coordinates; NLE's reads a box as it is and unbounded coordinates elsewhere.
    Independent uniform, normal and other usual components have proven constants; other densities are bracketed
    numerically where they separate over coordinates (see `from_joint_density`).

    Args:
        prior: Distribution over vectors, on the CPU.
        estimator: Which coordinates.
        given: The constant, where it is known.

    Raises:
        ValueError: If the prior has no usable support, or an argument is none of the above.

    Example:
        >>> from mlsbi.priors import BoxPrior
        >>> prior = BoxPrior([0.0, 0.0], [1.0, 3.0])
        >>> law = prior_law(prior, "npe")
        >>> law.name, law.constant
        ('logistic(0, 1)', 4.0)
        >>> law = prior_law(prior, "nle")
        >>> law.name, round(law.constant, 4)
        ('uniform(0, 1) x uniform(0, 3)', 0.9119)
    """
    check_prior(prior)
    if estimator not in ("npe", "nle"):
        raise ValueError(f"Expected estimator 'npe' or 'nle'; got {estimator!r}.")
    theta = sample_prior(prior, _DRAWS, seed=0).double()
    as_is = estimator == "nle" and torch.equal(Unbounded(prior).features(theta), theta)
    law = _known_prior(prior, as_is=as_is)
    return _declare(_numeric_prior(prior, theta, as_is=as_is) if law is None else law, given)


def noise_law(
    noise: Callable[[int, Generator], Any] | Literal["seed"], *, rows: int = 20_000, seed: int = 0,
    given: float | None = None,
) -> NoiseLaw:
    r"""The law of a stack's base noise, recognised from draws.

    Every coordinate is compared with usual laws (see `recognise`), and every pair is tested for dependence; what is
    not recognised gets an estimate without proof, or none (see `sampled_law`). Of a leaf with more than 200 numbers a
    row, 200 are looked at.

    Args:
        noise: A stack's noise function, or `"seed"`.
        rows: How many draws to look at; fewer, at least 2000, where that would be more than 4 10^7 numbers.
        seed: Of the draws.
        given: The constant, where it is known; of no use where a part is discrete, in which nothing is differentiated.

    Raises:
        ValueError: If there are fewer than 2000 rows, or a draw is not finite.
        TypeError: If the noise is neither a function that gives tensors nor `"seed"`.

    Example:
        >>> noise_law(lambda n, generator: torch.randn(n, 3, generator=generator)).law.constant
        1.0
    """
    if isinstance(noise, str):
        if noise != "seed":
            raise TypeError(f'Expected noise(n, generator) or "seed"; got {noise!r}.')
        parts = [("noise", _discrete("noise is a seed (discrete)", 1))]
    elif rows < FEWEST_DRAWS:
        raise ValueError(f"Expected at least {FEWEST_DRAWS} rows; got {rows}.")
    else:
        parts = _parts(draw_leaves(noise, rows=rows, seed=seed), np.random.default_rng(child_seed(seed, 2)))
    law = product([law for _, law in parts])
    discrete = [part for _, part in parts if part.name == _DISCRETE]
    if given is not None and discrete:
        return NoiseLaw(replace(law, reason=f"the declared constant is of no use, as {discrete[0].reason}"),
                        tuple(parts))
    return NoiseLaw(_declare(law, given), tuple(parts))


def _declare(law: Law, given: float | None) -> Law:
    if given is None:
        return law
    if not (math.isfinite(given) and given > 0):
        raise ValueError(f"Expected a positive, finite constant; got {given}.")
    return replace(law, constant=float(given), source="given",
                   reason=f"constant declared to be {given:g}; without that: {law.reason}")


# In unbounded coordinates: the logarithm of what is positive, the logit of what lies in an interval.
_UNBOUNDED: dict[type[Distribution], tuple[Callable[..., Law], tuple[str, ...]]] = {
    distributions.Uniform: (poincare.logistic, ()),
    distributions.Normal: (poincare.normal, ("scale",)),
    distributions.LogNormal: (poincare.normal, ("scale",)),
    distributions.Laplace: (poincare.laplace, ("scale",)),
    distributions.Gumbel: (poincare.gumbel, ("scale",)),
    distributions.Exponential: (lambda: poincare.log_gamma(1.0), ()),
    distributions.Gamma: (poincare.log_gamma, ("concentration",)),
    distributions.Chi2: (poincare.log_gamma, ("concentration",)),
    distributions.InverseGamma: (poincare.log_gamma, ("concentration",)),
    distributions.Weibull: (lambda power: poincare.log_gamma(1.0, 1 / power), ("concentration",)),
    distributions.HalfNormal: (lambda: poincare.log_gamma(0.5, 0.5), ()),
    distributions.HalfCauchy: (lambda: poincare.logit_beta(0.5, 0.5, 0.5), ()),
    distributions.Beta: (poincare.logit_beta, ("concentration1", "concentration0")),
}


def _known_prior(prior: Distribution, *, as_is: bool) -> Law | None:
    """The law, if the table has it."""
    if isinstance(prior, (distributions.MultivariateNormal, distributions.LowRankMultivariateNormal)):
        return poincare.multivariate_normal(prior.covariance_matrix.double().numpy())
    base = prior.base_dist if isinstance(prior, distributions.Independent) else None
    if base is None or base.event_shape or type(base) not in _UNBOUNDED:
        return None
    make, names = _UNBOUNDED[type(base)]
    if as_is and isinstance(base.support, distributions.constraints.interval):
        if not isinstance(base, distributions.Uniform):
            return None
        make, names = poincare.uniform, ("low", "high")
    columns = [torch.as_tensor(getattr(base, name)).double().expand(base.batch_shape).tolist() for name in names]
    return product_of_few([make(*(column[index] for column in columns)) for index in range(prior.event_shape[0])])


def _numeric_prior(prior: Distribution, theta: Tensor, *, as_is: bool) -> Law:
    """The law by its density in the estimator's coordinates."""
    prior = in_float64(prior)
    unbounded = Unbounded(prior)
    support: Any = prior.support
    draws = theta if as_is else unbounded.to(theta)
    dim = draws.shape[1]  # a simplex has one less than theta
    try:
        precision = prior.log_prob(theta[:1]).dtype
    except (RuntimeError, TypeError) as error:
        return _imprecise(prior, dim, str(error))
    if precision != torch.float64:
        return _imprecise(prior, dim, f"it gives {precision}")

    def log_density(z: Tensor) -> Tensor:
        theta = z if as_is else unbounded.back(z)
        subnormal = (theta.abs() < torch.finfo(theta.dtype).tiny) & (theta != 0)  # has lost digits
        inside = support.check(theta) & (torch.isfinite(theta) & ~subnormal).all(-1)
        values = torch.full(z.shape[:-1], -torch.inf, dtype=torch.float64)
        if not bool(inside.any()):
            return values
        found = prior.log_prob(theta[inside])
        if not as_is:
            found = found + unbounded.log_abs_det(z[inside], theta[inside])
        return values.masked_scatter(inside, found)

    along_one = getattr(support, "base_constraint", support)
    boxed = isinstance(along_one, distributions.constraints.interval)
    bounded = boxed or isinstance(along_one, type(distributions.constraints.simplex))
    edges = (along_one.lower_bound, along_one.upper_bound) if as_is and boxed else (-math.inf, math.inf)
    names = parameter_names(prior) if dim == theta.shape[1] else [f"z_{index + 1}" for index in range(dim)]
    low, high = (torch.as_tensor(edge, dtype=torch.float64).expand(dim) for edge in edges)
    return from_joint_density(log_density, draws, names=names, low=low, high=high,
                              straight_beyond=_LARGEST_LOGIT if bounded and not as_is else math.inf)


def _imprecise(prior: Distribution, dim: int, problem: str) -> Law:
    return Law(type(prior).__name__, None, log_concave=None, source="none", coordinates=dim,
               reason=f"the prior's log_prob cannot be evaluated in float64 ({problem}): give the constant")


def _discrete(what: str, coordinates: int) -> Law:
    return Law(_DISCRETE, None, log_concave=False, source="none", coordinates=coordinates,
               reason=f"{what}: there is no derivative in it, so no Poincaré inequality")


def _parts(leaves: list[DrawnLeaf], rng: np.random.Generator) -> list[tuple[str, Law]]:
    """Independent parts of the noise, and their laws."""
    parts: list[tuple[str, Law]] = []
    where: list[DrawnLeaf] = []
    smooth: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    if not any(leaf.size for leaf in leaves):
        return [("noise", Law("no noise", 0.0, log_concave=True, reason="no noise", source="table", coordinates=0))]
    for leaf in leaves:
        if leaf.columns is None:
            parts.append((leaf.name, _discrete(f"{leaf.name} holds {leaf.kind} numbers (discrete)", leaf.size)))
            continue
        ordered = np.sort(leaf.columns, axis=1)
        repeats = (np.diff(ordered, axis=1) == 0).mean(1)
        constant, discrete = repeats == 1, (repeats > 0.05) & (repeats < 1)
        if constant.any():
            parts.append((leaf.name, Law("constant", 0.0, log_concave=True, reason="nothing varies", source="table",
                                         coordinates=int(constant.sum()))))
        if discrete.any():
            parts.append((leaf.name, _discrete(f"{leaf.name} repeats values in {discrete.sum()} coordinates (discrete, "
                                               "or with atoms)", int(discrete.sum()))))
        for column in np.flatnonzero(~constant & ~discrete):
            where.append(leaf)
            smooth.append((leaf.columns[column], ordered[column]))
    if smooth:
        parts += _smooth_parts(where, np.array([one for one, _ in smooth]), np.array([one for _, one in smooth]), rng)
    return parts


def _smooth_parts(
    where: list[DrawnLeaf], draws: np.ndarray[Any, Any], ordered: np.ndarray[Any, Any], rng: np.random.Generator
) -> list[tuple[str, Law]]:
    """Parts among columns of draws `(k, n)`, also given sorted, each from the leaf beside it."""
    parts: list[tuple[str, Law]] = []
    fits = recognise(ordered)
    known: dict[tuple[str, str], list[Fit]] = {}
    unknown: list[int] = []
    leaves = {leaf.name: leaf for leaf in where}
    partly_seen: set[str] = set()
    for group in dependent_groups(draws):
        inside = list(dict.fromkeys(where[index].name for index in group))
        partial = {name for name in inside if leaves[name].looked_at < leaves[name].size}
        fit = fits[group[0]]
        if len(group) > 1 and partial:
            partly_seen |= set(inside)
        elif len(group) > 1:
            law = group_law(draws[list(group)], [fits[index] for index in group], rng=rng)
            parts.append((" and ".join(inside), law))
        elif fit is None:
            unknown.append(group[0])
        else:
            kind = fit.law.name if fit.law.source == "table" else fit.family
            known.setdefault((inside[0], kind), []).append(fit)
    for name in sorted(partly_seen):
        leaf = leaves[name]
        reason = (f"coordinates depend on each other, of {name} only {leaf.looked_at} out of {leaf.size} were looked "
                  "at, and a constant would need all of them")
        parts.append((name, Law("dependent", None, log_concave=None, reason=reason, source="none",
                                coordinates=leaf.size)))
        known = {key: found for key, found in known.items() if key[0] != name}
        unknown = [index for index in unknown if where[index].name != name]
    n = draws.shape[1]
    for (name, kind), found in known.items():
        widest = max(found, key=lambda fit: fit.law.constant or 0.0)
        distance = max(fit.distance for fit in found)
        reason = (f"{_counted(len(found), leaves[name])} recognised as {kind} from {n} draws (Kolmogorov distance "
                  f"{distance:.2g}); {widest.law.reason}")
        parts.append((name, replace(widest.law, coordinates=_number(len(found), leaves[name]), reason=reason)))
    while unknown:
        name = where[unknown[0]].name
        candidates = [index for index in unknown if where[index].name == name]
        same = [index for index, one in zip(candidates, alike(ordered[candidates]), strict=True) if one]
        law = sampled_law(np.sort(draws[same].ravel()), name=f"unrecognised {name}", tests=len(draws))
        parts.append((name, replace(law, coordinates=_number(len(same), leaves[name]),
                                    reason=f"{_counted(len(same), leaves[name])}: {law.reason}")))
        unknown = [index for index in unknown if index not in same]
    return parts


def _number(found: int, leaf: DrawnLeaf) -> int:
    """How many coordinates of a leaf are of a law that was found in some of those looked at."""
    return round(found * leaf.size / leaf.looked_at)


def _counted(found: int, leaf: DrawnLeaf) -> str:
    if leaf.looked_at < leaf.size:
        return f"{found} of {leaf.looked_at} coordinates looked at, out of {leaf.size},"
    return f"{found} coordinate{'s' if found > 1 else ''}"
