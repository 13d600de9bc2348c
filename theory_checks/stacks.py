r"""Random stacks of levels and densities, as hypothesis strategies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from operator import mul
from typing import Any, Literal, get_args

import torch
from hypothesis import strategies as st
from torch import Generator
from torch.distributions import Distribution, Independent, Normal

from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.flows import MAF, NSF
from mlsbi.density.mixture_density import MDN
from mlsbi.density.registry import DensityBuilder
from mlsbi.density.standardise import Standardiser
from mlsbi.levels import Level, LevelStack
from mlsbi.priors import BoxPrior
from mlsbi.randomness import seeded
from theory_checks.densities import AffineGaussian, SharedMixture
from theory_checks.generators import (
    Affine,
    Column,
    Matrix,
    MixedNoise,
    NoiseBlock,
    NormalNoise,
    Perturbed,
    Polynomial,
    Saturating,
    Simulator,
    UniformNoise,
)

__all__ = [
    "DensityKind", "GeneratorKind", "NetworkKind", "NoiseKind", "PriorKind", "RandomDensity", "box_prior", "gaussians",
    "mixtures", "networks", "normal_prior", "problems", "random_network", "stacks",
]

GeneratorKind = Literal["affine", "polynomial", "saturating"]
NoiseKind = Literal["uniform", "normal", "mixed"]
PriorKind = Literal["box", "normal"]
NetworkKind = Literal["nsf", "mdn", "maf"]
DensityKind = Literal["gaussian", "mixture", "nsf", "mdn", "maf"]
RandomDensity = AffineGaussian | SharedMixture | ConditionalDensity
Range = int | tuple[int, int]

_TENTHS = st.integers(-20, 20).map(lambda k: k / 10)
_SMALL = st.integers(-20, 20).map(lambda k: k / 100)
# Multiples of a tenth: no coefficient is so small that rounding hides it. 1 first, as the simplest.
_PIVOTS = st.sampled_from([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 1.5, -1.5, 0.2, -0.2, 0.1, -0.1])
_GAP_STEPS = 16
_BUILDERS: dict[NetworkKind, DensityBuilder] = {
    "nsf": NSF(transforms=2, hidden=8, bins=4),
    "mdn": MDN(components=3, hidden=8, layers=1),
    "maf": MAF(transforms=2, hidden=8),
}


Noises = UniformNoise | NormalNoise | MixedNoise


def box_prior(low: Sequence[float], width: Sequence[float]) -> BoxPrior:
    """A box from its lower edges and its widths, shapes `(D,)`."""
    return BoxPrior(low, [edge + size for edge, size in zip(low, width, strict=True)])


def normal_prior(loc: Sequence[float], scale: Sequence[float]) -> Distribution:
    """Independent normals N(loc, scale^2) of the default dtype, shapes `(D,)`."""
    return Independent(Normal(torch.tensor(loc), torch.tensor(scale)), 1)


def stacks(
    *,
    levels: Range = (2, 5),
    parameters: Range = (1, 3),
    outputs: Range = (1, 3),
    noise_dim: Range = (1, 3),
    generators: Sequence[GeneratorKind] = get_args(GeneratorKind),
    noises: Sequence[NoiseKind] = get_args(NoiseKind),
    priors: Sequence[PriorKind] = get_args(PriorKind),
    coupled: bool | None = True,
    gap: tuple[float, float] = (1e-3, 1.0),
) -> st.SearchStrategy[LevelStack]:
    r"""Smooth stacks with declared, ascending costs, whose levels approach the finest one.

    Level l runs `base + gap_l * perturbation`, two generators of one kind, and the finest level `base` alone; gap_l
    falls by the same factor from level to level. So
    :math:`|G^l - G^{l-1}| = |gap_l - gap_{l-1}| \, |\text{perturbation}|` in every norm. Coefficients are multiples
    of 0.01 of moderate size; every output depends on the noise and so does its perturbation. Theta enters as the
    simulator sees it, in the prior's own units.

    Args:
        levels: Number of levels, L + 1: a number or the smallest and the largest one.
        parameters: Length D of theta, likewise.
        outputs: Length d of x, likewise.
        noise_dim: Columns of noise that one level reads, likewise.
        generators: Kinds to choose from: `Affine`, `Polynomial` and `Saturating`.
        noises: Kinds to choose from: `UniformNoise`, `NormalNoise` and `MixedNoise`.
        priors: Kinds to choose from: a `BoxPrior`, or independent normals.
        coupled: `True` for levels that share their noise; `False` for levels that each read columns of their own, of
            which the noise then has `levels * noise_dim`; `None` for either.
        gap: Smallest and largest `gap_0`, drawn evenly in its logarithm; the largest is the simplest.

    Raises:
        ValueError: If a range is empty or below 1, a kind is unknown or none is given, or a gap is not positive.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5, deadline=None)
        ... @given(stack=stacks(levels=2, parameters=(1, 2), generators=["affine"], gap=(1e-3, 1e-2)))
        ... def check(stack):
        ...     theta, noise = stack.prior.sample((100,)), stack.draw_noise(100, torch.Generator())
        ...     coarse, fine = (level.simulate(theta, noise) for level in stack.levels)
        ...     assert (fine - coarse).abs().max() < 1
        >>> check()
    """
    return _stacks(
        _check_range("levels", levels), _check_range("parameters", parameters), _check_range("outputs", outputs),
        _check_range("noise_dim", noise_dim), _check_kinds("generators", generators, get_args(GeneratorKind)),
        _check_kinds("noises", noises, get_args(NoiseKind)), _check_kinds("priors", priors, get_args(PriorKind)),
        _check_coupled(coupled), _check_gap(gap),
    )


def gaussians(dim: int, condition_dim: int) -> st.SearchStrategy[AffineGaussian]:
    """Affine Gaussians of `dim` inputs given `condition_dim` conditions: slopes up to 2, deviations e^-1 to e.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5, deadline=None)
        ... @given(density=gaussians(2, 1))
        ... def check(density):
        ...     assert density.constants.lipschitz > 0
        >>> check()
    """
    _check_range("dim", dim)
    _check_range("condition_dim", condition_dim)
    return st.builds(
        AffineGaussian, slope=_matrix(dim, condition_dim), shift=_vector(dim),
        log_precision=_vector(dim, st.integers(-10, 10).map(lambda k: k / 10)),
    )


def mixtures(dim: int, condition_dim: int) -> st.SearchStrategy[SharedMixture]:
    """Mixtures of 2 or 3 Gaussians with shared precisions, weighted by a network of 1 or 2 hidden units.

    Raises:
        ValueError: If a number is below 1.
    """
    _check_range("dim", dim)
    _check_range("condition_dim", condition_dim)

    def mixture(sizes: tuple[int, int]) -> st.SearchStrategy[SharedMixture]:
        k, hidden = sizes
        return st.builds(
            SharedMixture, slope=_matrix(dim, condition_dim), centres=_matrix(k, dim),
            log_precision=_vector(dim, st.integers(-10, 10).map(lambda j: j / 10)), readout=_matrix(k, hidden),
            weight=_matrix(hidden, condition_dim), bias=_vector(hidden),
        )

    return st.tuples(st.integers(2, 3), st.integers(1, 2)).flatmap(mixture)


def networks(dim: int, condition_dim: int, kind: NetworkKind = "nsf") -> st.SearchStrategy[ConditionalDensity]:
    """Small random networks of one kind, from `random_network`, whose call an example that fails is reported as.

    Raises:
        ValueError: If a number is below 1 or the kind is unknown.
    """
    _check_network(dim, condition_dim, kind)
    return st.builds(
        random_network, st.just(dim), st.just(condition_dim), kind=st.just(kind), seed=st.integers(0, 2**32 - 1),
        scale=st.sampled_from([0.1, 0.3, 1.0]),
    )


def random_network(
    dim: int, condition_dim: int, *, kind: NetworkKind = "nsf", seed: int, scale: float = 0.3
) -> ConditionalDensity:
    r"""A small network in float64, in evaluation mode, whose weights and standardisers are far from their start.

    To every weight is added :math:`N(0, s^2 / k)`, where k is the number of inputs of its layer, and
    :math:`N(0, s^2)` to every bias. Means of the standardisers are N(0, 1), their scales e^-1 to e.

    Args:
        dim: Length of the input.
        condition_dim: Length of the condition.
        kind: A neural spline flow, a mixture density network or a masked autoregressive flow.
        seed: Seed of all numbers.
        scale: The s above.

    Raises:
        ValueError: If a number is below 1 or the kind is unknown.

    Example:
        >>> random_network(1, 2, seed=0).log_prob(torch.zeros(3, 1), torch.zeros(3, 2)).dtype
        torch.float64
    """
    _check_network(dim, condition_dim, kind)
    with seeded(seed), torch.no_grad():
        scalers = [
            Standardiser(torch.randn(size).double(), (2 * torch.rand(size).double() - 1).exp(), dtype=torch.float64)
            for size in (dim, condition_dim)
        ]
        density = ConditionalDensity(_BUILDERS[kind], *scalers).double().eval()
        for weight in density.parameters():
            inputs = weight.shape[1] if weight.ndim > 1 else 1
            weight.add_(torch.randn(weight.shape), alpha=scale / math.sqrt(inputs))
    return density


def problems(
    *,
    estimator: Literal["npe", "nle"] = "npe",
    density: DensityKind | Sequence[DensityKind] = "gaussian",
    **options: Any,
) -> st.SearchStrategy[tuple[LevelStack, RandomDensity]]:
    """A stack and a density of its theta and x.

    Args:
        estimator: `"npe"` for a density of theta given x, `"nle"` for one of x given theta.
        density: A kind or several to choose from: `gaussians`, `mixtures` and `networks`.
        options: Those of `stacks`.

    Raises:
        ValueError: If the estimator or a kind is unknown, or an option of `stacks` is wrong.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5, deadline=None)
        ... @given(problem=problems(density=("gaussian", "mixture"), levels=2))
        ... def check(problem):
        ...     stack, density = problem
        ...     theta, noise = stack.prior.sample((100,)), stack.draw_noise(100, torch.Generator())
        ...     x = stack.levels[-1].simulate(theta, noise)
        ...     assert density.log_prob(theta, x).isfinite().all()
        >>> check()
    """
    _check_kinds("estimator", [estimator], ("npe", "nle"))
    kinds = _check_kinds("density", [density] if isinstance(density, str) else density, get_args(DensityKind))
    return _problems(estimator, kinds, stacks(**options))


@st.composite
def _stacks(
    draw: st.DrawFn,
    levels: tuple[int, int],
    parameters: tuple[int, int],
    outputs: tuple[int, int],
    noise_dim: tuple[int, int],
    generators: tuple[str, ...],
    noises: tuple[str, ...],
    priors: tuple[str, ...],
    coupled: bool | None,  # noqa: FBT001 (checked by `stacks`)
    gap: tuple[float, float],
) -> LevelStack:
    number, dim, d, k = (draw(st.integers(*sizes)) for sizes in (levels, parameters, outputs, noise_dim))
    kind = draw(st.sampled_from(generators))
    base, perturbation = (draw(_generator(kind, dim, d, k)) for _ in range(2))
    largest = gap[1] * (gap[0] / gap[1]) ** (draw(st.integers(0, _GAP_STEPS)) / _GAP_STEPS)
    rate = draw(st.sampled_from([0.5, 0.25, 0.1]))
    simulators: list[Simulator] = [
        *(Perturbed(base, perturbation, largest * rate**level) for level in range(number - 1)), base
    ]
    shared = draw(st.booleans().map(lambda apart: not apart)) if coupled is None else coupled
    blocks = 1 if shared else number
    if not shared:
        simulators = [NoiseBlock(run, level * k, (level + 1) * k) for level, run in enumerate(simulators)]
    factors = [draw(st.integers(2, 10)) for _ in range(number - 1)]
    costs = accumulate(factors, mul, initial=1)
    return LevelStack(
        prior=draw(_PRIORS[draw(st.sampled_from(priors))](dim)),
        noise=draw(_noise(draw(st.sampled_from(noises)), k, blocks)),
        levels=[Level(f"level {level}", run, float(cost))
                for level, (run, cost) in enumerate(zip(simulators, costs, strict=True))],
    )


@st.composite
def _problems(
    draw: st.DrawFn, estimator: str, kinds: tuple[str, ...], stacks: st.SearchStrategy[LevelStack]
) -> tuple[LevelStack, RandomDensity]:
    stack = draw(stacks)
    theta, noise = torch.zeros(1, stack.prior.event_shape[0]), stack.draw_noise(1, Generator())
    dim, d = theta.shape[1], stack.levels[-1].simulate(theta, noise).shape[1]
    sizes = (dim, d) if estimator == "npe" else (d, dim)
    return stack, draw(_DENSITIES[draw(st.sampled_from(kinds))](*sizes))


# Strategies hold no state. To build and validate them anew for every example would take most of its time.
@cache
def _vector(size: int, entry: st.SearchStrategy[float] = _TENTHS) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(*[entry] * size)


@cache
def _matrix(rows: int, columns: int, entry: st.SearchStrategy[float] = _TENTHS) -> st.SearchStrategy[Matrix]:
    return st.tuples(*[_vector(columns, entry)] * rows)


@cache
def _affine(dim: int, d: int, k: int) -> st.SearchStrategy[Affine]:
    """Maps whose every output depends on the noise."""
    rows = (st.tuples(*(_PIVOTS if column == row % k else _TENTHS for column in range(k))) for row in range(d))
    return st.builds(Affine, theta_slope=_matrix(d, dim), noise_slope=st.tuples(*rows), shift=_vector(d))


@cache
def _inner(dim: int, d: int, k: int) -> st.SearchStrategy[Affine]:
    """Maps with small slopes, so that squares and cubes stay moderate over a prior."""
    return st.builds(
        Affine, theta_slope=_matrix(d, dim, _SMALL), noise_slope=_matrix(d, k, _SMALL), shift=_vector(d, _SMALL)
    )


@cache
def _generator(kind: str, dim: int, d: int, k: int) -> st.SearchStrategy[Simulator]:
    affine = _affine(dim, d, k)
    if kind == "affine":
        return affine
    if kind == "polynomial":
        return st.builds(
            Polynomial, affine=affine, inner=_inner(dim, d, k), quadratic=_vector(d), cubic=_vector(d, _SMALL)
        )
    return st.builds(Saturating, affine=affine, inner=_affine(dim, d, k), readout=_matrix(d, d))


@cache
def _noise(kind: str, k: int, blocks: int) -> st.SearchStrategy[Noises]:
    """Blocks of k columns, all of one law."""
    if kind == "uniform":
        return st.just(UniformNoise(k * blocks))
    if kind == "normal":
        return st.just(NormalNoise(k * blocks))
    columns: st.SearchStrategy[Column] = st.sampled_from(get_args(Column))
    return st.tuples(*[columns] * k).map(lambda block: MixedNoise(block * blocks))


@cache
def _box(dim: int) -> st.SearchStrategy[Distribution]:
    width = st.integers(5, 40).map(lambda k: k / 10)
    return st.builds(box_prior, low=_vector(dim), width=_vector(dim, width))


@cache
def _normal(dim: int) -> st.SearchStrategy[Distribution]:
    scale = st.integers(2, 20).map(lambda k: k / 10)
    return st.builds(normal_prior, loc=_vector(dim), scale=_vector(dim, scale))


_PRIORS = {"box": _box, "normal": _normal}
_DENSITIES: dict[str, Any] = {
    "gaussian": gaussians,
    "mixture": mixtures,
    "nsf": lambda dim, condition_dim: networks(dim, condition_dim, "nsf"),
    "mdn": lambda dim, condition_dim: networks(dim, condition_dim, "mdn"),
    "maf": lambda dim, condition_dim: networks(dim, condition_dim, "maf"),
}


def _check_range(name: str, sizes: Range) -> tuple[int, int]:
    pair = (sizes, sizes) if isinstance(sizes, int) else tuple(sizes) if isinstance(sizes, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(size, int) for size in pair) or not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"Expected {name} as a number of at least 1, or as the smallest and the largest; got {sizes}.")
    return pair


def _check_kinds(name: str, kinds: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(known):
        raise ValueError(f"Expected {name} from {list(known)}, at least one; got {kinds!r}.")
    return tuple(kinds)


def _check_network(dim: int, condition_dim: int, kind: str) -> None:
    _check_range("dim", dim)
    _check_range("condition_dim", condition_dim)
    _check_kinds("kind", [kind], get_args(NetworkKind))


def _check_coupled(coupled: bool | None) -> bool | None:  # noqa: FBT001 (one argument)
    if coupled not in (True, False, None):
        raise ValueError(f"Expected coupled as True, False, or None for either; got {coupled!r}.")
    return coupled


def _check_gap(gap: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(gap, Sequence) or len(gap) != 2 or not 0 < gap[0] <= gap[1] < math.inf:
        raise ValueError(f"Expected gap as the smallest and the largest, positive and finite; got {gap}.")
    return gap[0], gap[1]
