r"""Derivatives of levels along directions in z: by autodiff, or by finite differences where there is a black box.

Before any is taken, levels are looked at: are they deterministic, do they jump, does autodiff tell the truth, and which
step size gives stable differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vjp

from mlsbi.randomness import child_seed
from theory_checks.coordinates import Coordinates, Points, SimulatorProblem

__all__ = [
    "Differentiator", "Smoothness", "Tangents", "check_smoothness", "count_jumps", "differentiator", "random_way",
]  # fmt: skip

_STEPS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)  # of a coordinate's standard deviation
_HALVINGS = 24  # of an interval a standard deviation long, after which a smooth function hardly changes over it
_MOST_HALVINGS = 40  # where one still does, after which it is steeper than anything that is computed in float64
_JUMP = 1e-3  # of an output's standard deviation, over an interval that short
_AGREEMENT = 0.05  # relative root mean square error up to which derivatives are trusted
_DETERMINISM = 1e-6  # of an output's standard deviation


@dataclass(frozen=True)
class Tangents:
    r"""Derivatives of a vector-valued function of z along k directions, at n rows.

    Args:
        values: Shape `(n, outputs, k)`.
        exact: Whether the directions are all coordinates of z. Otherwise they are independent with unit covariance, so
            that the square of a derivative along one has the gradient's squared norm as its mean.

    Example:
        >>> tangents = Tangents(torch.tensor([[[3.0, 4.0]]]), exact=True)
        >>> tangents.square(), tangents.fourth()
        (tensor([25.]), tensor([625.]))
    """

    values: Tensor
    exact: bool

    def __sub__(self, other: Tangents) -> Tangents:
        return Tangents(self.values - other.values, self.exact)

    def square(self) -> Tensor:
        """Unbiased for the squared Frobenius norm of the derivative, `(n,)`."""
        along = self.values.square().sum(1)
        return along.sum(-1) if self.exact else along.mean(-1)

    def fourth(self) -> Tensor:
        """Unbiased for its fourth power, `(n,)`."""
        along = self.values.square().sum(1)
        if self.exact:
            return along.sum(-1).square()
        k = along.shape[-1]  # products of two different directions, which are independent
        return (along.sum(-1).square() - along.square().sum(-1)) / (k * (k - 1))


@dataclass(frozen=True)
class Smoothness:
    r"""How a level can be differentiated.

    Args:
        level: The level's name.
        method: By autodiff, by finite differences, or not at all.
        step: Best step of finite differences, in standard deviations of each coordinate.
        error: Relative root mean square difference between autodiff and finite differences, or between those of
            neighbouring steps.
        problem: Why it cannot be, in words.
    """

    level: str
    method: Literal["autodiff", "finite differences", "none"]
    step: float = math.nan
    error: float = math.nan
    problem: str | None = None


def check_smoothness(coordinates: Coordinates, level: int, points: Points, *, seed: int) -> Smoothness:
    r"""Looks for what would make derivatives of a level meaningless.

    It is run twice, the second time backwards; on intervals that are halved towards the larger change, where a jump
    survives and everything else vanishes; and along one random direction a row with several step sizes.

    Args:
        coordinates: The stack.
        level: Which level.
        points: Some rows, a few hundred where they are cheap.
        seed: Of directions.
    """
    name = coordinates.stack.levels[level].name
    try:
        return _look(coordinates, level, points, torch.Generator().manual_seed(child_seed(seed, level)))
    except SimulatorProblem as error:
        return Smoothness(name, "none", problem=str(error))


def _look(coordinates: Coordinates, level: int, points: Points, generator: torch.Generator) -> Smoothness:
    name = coordinates.stack.levels[level].name
    x = coordinates.simulate(level, points).flatten(1)
    broken = int((~torch.isfinite(x)).any(1).sum())
    if broken:
        return Smoothness(name, "none", problem=f"level '{name}' gives numbers that are not finite in {broken} of "
                                                f"{len(x)} rows: its moments are infinite or undefined")
    backwards = torch.arange(len(points) - 1, -1, -1)
    halves = [half for half in backwards.tensor_split(2) if len(half)]
    again = torch.cat([coordinates.simulate(level, points.rows(half)).flatten(1) for half in halves])[backwards]
    scale = _spread(x)
    if not ((x - again).abs() <= _DETERMINISM * scale + 1e-12 * x.abs()).all():
        worst = float(((x - again).abs() / scale.clamp_min(1e-300)).max())
        return Smoothness(name, "none", problem=f"level '{name}' is not deterministic: the same rows in other "
                                                f"batches gave outputs that differ by {worst:.2g} standard deviations. "
                                                "Draw all randomness from `noise`, and let no row depend on another")
    signs = torch.randint(0, 2, (2, len(points), max(points.dim, x.shape[1])), generator=generator) * 2.0 - 1
    # One output a row, a random mixture of all, along one direction a row.
    mix = (signs[0, :, :x.shape[1]] / scale.clamp_min(1e-300)).where(scale > 0, 0.0).double()
    direction = _spread(points.flat()) * signs[1, :, :points.dim].double() / math.sqrt(points.dim)
    points = _inside(points, direction.abs() * _STEPS[0])

    def along(at: Tensor) -> Tensor:
        moved = points.moved(at[:, None] * direction)
        return (coordinates.simulate(level, moved).flatten(1) * mix).sum(1)

    jumps = int(count_jumps(lambda at: along(at)[:, None], len(points), reach=_STEPS[0]))
    if jumps:
        return Smoothness(name, "none", problem=f"level '{name}' is not differentiable: within 1e-12 standard "
                                                f"deviations of theta or noise it jumps, in {jumps} of {len(points)} "
                                                "rows that were looked at (rounding, counts, comparisons, a path that "
                                                "the least difference decides?)")
    steps = torch.tensor(_STEPS, dtype=torch.float64)
    slopes = torch.stack([(along(torch.full((len(points),), step)) - along(torch.full((len(points),), -step)))
                          / (2 * step) for step in _STEPS])
    try:
        slope = _slope(coordinates, level, points, mix, direction)
        errors = _relative(slopes - slope, slopes)
        if float(errors.min()) <= _AGREEMENT:
            best = int(errors.argmin())
            return Smoothness(name, "autodiff", float(steps[best]), float(errors[best]))
    except SimulatorProblem:
        pass  # it runs, so that what failed is differentiating it
    errors = _relative(slopes[1:] - slopes[:-1], slopes[1:])
    errors = torch.maximum(errors[1:], errors[:-1])  # of three steps: two may agree by chance
    best = int(errors.argmin())
    if float(errors[best]) > _AGREEMENT:
        return Smoothness(name, "none", float(steps[best + 1]), float(errors[best]),
                          f"level '{name}' is not differentiable: its finite differences change by "
                          f"{float(errors[best]):.0%} from one step size to the next, whatever the step")
    return Smoothness(name, "finite differences", float(steps[best + 1]), float(errors[best]))


def count_jumps(along: Callable[[Tensor], Tensor], rows: int, *, reach: float) -> Tensor:
    r"""In how many rows each component of a function of one number jumps.

    Intervals are halved towards the larger change, until a continuous function hardly changes over them any more,
    however steep it is: changes are seen relative to the largest on the way.

    Args:
        along: From one number a row `(rows,)` to values `(rows, components)`, with standard deviations of about 1.
        rows: How many rows.
        reach: How far from 0 the intervals begin.

    Returns:
        Counts, `(components,)`.

    Example:
        >>> count_jumps(lambda t: torch.stack([t.round(), t.abs()], 1), 3, reach=0.7)
        tensor([3, 0])
    """
    low, high = torch.full((rows,), -reach, dtype=torch.float64), torch.full((rows,), reach, dtype=torch.float64)
    at_low, at_high = along(low), along(high)
    size = torch.ones_like(at_low)
    for halving in range(_MOST_HALVINGS):
        if halving == _HALVINGS and not ((at_high - at_low).abs() > _JUMP * size).any():
            break
        middle = (low + high) / 2
        at_middle = along(middle)
        size = torch.maximum(size, torch.maximum((at_middle - at_low).abs(), (at_high - at_middle).abs()))
        left = (at_middle - at_low).square().sum(1) > (at_high - at_middle).square().sum(1)
        low, high = torch.where(left, low, middle), torch.where(left, middle, high)
        at_low = torch.where(left[:, None], at_low, at_middle)
        at_high = torch.where(left[:, None], at_middle, at_high)
    return ((at_high - at_low).abs() > _JUMP * size).sum(0)


def random_way(
    theta: Tensor, x: Tensor, generator: torch.Generator
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]:
    r"""A straight way through each row of v = (theta, x), in a random direction.

    Args:
        theta: Shape `(n, D)`.
        x: Shape `(n, ...)`.
        generator: Source of directions.

    Returns:
        A function from distances `(n,)`, in standard deviations of v's coordinates, to theta and x there; and how long
        a unit of it is in v, `(n,)`.
    """
    scale = torch.cat([theta.std(0), x.flatten(1).std(0)])
    way = torch.randn(len(theta), len(scale), generator=generator, dtype=torch.float64)
    way = scale * way / way.square().sum(1, keepdim=True).sqrt()

    def move(at: Tensor) -> tuple[Tensor, Tensor]:
        step = at[:, None] * way
        return theta + step[:, :theta.shape[1]], x + step[:, theta.shape[1]:].reshape(x.shape)

    return move, way.square().sum(1).sqrt()


def _slope(coordinates: Coordinates, level: int, points: Points, mix: Tensor, direction: Tensor) -> Tensor:
    """The mixed output's derivative along a direction, by autodiff."""
    gradient = _pull(coordinates, level, points, [mix])[0]
    return (gradient * direction).sum(1)


def _pull(coordinates: Coordinates, level: int, points: Points, cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Gradients `(n, dim)` of sums of outputs, one for each of several weights `(n, d)`.

    Raises:
        SimulatorProblem: If the level cannot be differentiated by torch.
    """
    name = coordinates.stack.levels[level].name
    try:
        pulled: Any = vjp(coordinates.function(level, points), *points.leaves)
        back, found = pulled[1], []
        for weight in cotangents:
            found.append(torch.cat([part.reshape(len(part), -1) for part in back(weight)], 1))
        return found
    except SimulatorProblem:
        raise
    except Exception as error:
        raise SimulatorProblem(f"level '{name}' cannot be differentiated by torch: {error}") from error


def _relative(errors: Tensor, values: Tensor) -> Tensor:
    """Root mean square of errors `(steps, n)` over that of values; zero where both vanish."""
    size = values.square().mean(1)
    return torch.where(size > 0, errors.square().mean(1) / size.clamp_min(1e-300), errors.square().mean(1)).sqrt()


def _spread(values: Tensor) -> Tensor:
    """Standard deviation of each column; 0 for one that is constant."""
    return values.std(0) if len(values) > 1 else torch.ones_like(values[0])


def _inside(points: Points, reach: Tensor) -> Points:
    """Rows at the edge of what was drawn moved inside by `reach`: noise may have an end there."""
    z = points.flat()
    low, high = z.min(0).values + reach, z.max(0).values - reach
    fits = low < high
    return points.moved(torch.where(fits, torch.minimum(torch.maximum(z, low), high), z) - z)


@dataclass(frozen=True)
class Differentiator:
    r"""Outputs of levels and their derivatives, along the same directions at all levels.

    Args:
        coordinates: The stack.
        exact: Whether all levels are differentiated by autodiff, in all coordinates.
        step: Step of finite differences, in standard deviations of each coordinate.
        directions: How many random directions finite differences take.
        spread: Standard deviation of each coordinate of z, `(dim,)`.
        seed: Of directions.
    """

    coordinates: Coordinates
    exact: bool
    step: float
    directions: int
    spread: Tensor
    seed: int

    def along(self, points: Points, *, block: int) -> Tensor:
        """Directions at each row, `(n, dim, k)`; those of theta's coordinates are the first D rows of each.

        Args:
            points: The rows.
            block: Which block of rows they are, for other directions in each.
        """
        if self.exact:
            return torch.eye(points.dim, dtype=torch.float64).expand(len(points), -1, -1)
        generator = torch.Generator().manual_seed(child_seed(self.seed, block))
        return torch.randint(0, 2, (len(points), points.dim, self.directions), generator=generator) * 2.0 - 1

    def outputs(self, level: int, points: Points, along: Tensor) -> tuple[Tensor, Tangents]:
        """Outputs `(n, ...)` of a level and its derivatives `(n, d, k)` along directions `(n, dim, k)`.

        Raises:
            SimulatorProblem: If the level fails, or gives numbers that are not finite.
        """
        x = self.coordinates.simulate(level, points)
        self._check(level, x)
        return x, self.tangents(level, points, along, x)

    def tangents(self, level: int, points: Points, along: Tensor, x: Tensor, *, stride: float = 1.0) -> Tangents:
        """The derivatives alone, where the outputs x are known, by steps of finite differences times `stride`."""
        if self.exact:
            outputs = x.flatten(1).shape[1]
            weights = torch.eye(outputs, dtype=torch.float64)[:, None].expand(-1, len(points), -1)
            tangents = torch.stack(_pull(self.coordinates, level, points, list(weights)), 1)
        else:
            # Every coordinate moves by the same length, a step of the narrowest.
            along = along.double()
            step = stride * self.step * float(self.spread[self.spread > 0].min()) / math.sqrt(points.dim)
            centre = _inside(points, torch.full_like(self.spread, step))
            slopes = []
            for direction in along.unbind(-1):
                ahead, behind = (self.coordinates.simulate(level, centre.moved(sign * step * direction)).flatten(1)
                                 for sign in (1, -1))
                slopes.append((ahead - behind) / (2 * step))
            tangents = torch.stack(slopes, -1)
        self._check(level, tangents)
        return Tangents(tangents, self.exact)

    def checked(self, level: int, points: Points, seen: Smoothness) -> Smoothness:
        """What was seen of a level, with the error of finite differences as they are taken from now on."""
        if self.exact or seen.problem:
            return seen
        along = self.along(points, block=0)
        try:
            x, near = self.outputs(level, points, along)
            far = self.tangents(level, points, along, x, stride=2.0)
        except SimulatorProblem as problem:
            return replace(seen, method="none", problem=str(problem))
        error = float(_relative((far.values - near.values).flatten()[None], near.values.flatten()[None]))
        if error <= _AGREEMENT:
            return replace(seen, method="finite differences", step=self.step, error=error)
        widths = self.spread[self.spread > 0]
        return replace(seen, method="none", error=error, problem=(
            f"finite differences of level '{seen.level}' change by {error:.0%} with the step: its coordinates are "
            f"{float(widths.min()):.2g} to {float(widths.max()):.2g} wide. Scale parameters and noise alike, or write "
            "the simulator in torch"))

    def _check(self, level: int, values: Tensor) -> None:
        broken = int((~torch.isfinite(values)).flatten(1).any(1).sum())
        if broken:
            name = self.coordinates.stack.levels[level].name
            raise SimulatorProblem(f"level '{name}' gives outputs or derivatives that are not finite in {broken} of "
                                   f"{len(values)} rows: its moments are infinite or undefined")


def differentiator(
    coordinates: Coordinates, *, rows: int, directions: int, seed: int
) -> tuple[Differentiator, list[Smoothness]]:
    r"""Looks at every level and settles how all of them are differentiated.

    Simulators that refuse float64 are run in float32.

    Args:
        coordinates: The stack.
        rows: Rows to look at.
        directions: Random directions of finite differences, at least 2; all coordinates are taken by autodiff.
        seed: Of rows and directions.

    Returns:
        What differentiates, and what was seen of each level.
    """
    if directions < 2:
        raise ValueError(f"Expected at least 2 directions, for fourth moments; got {directions}.")
    points = coordinates.draw(rows, seed=seed, stream=1)
    found = [check_smoothness(coordinates, level, points, seed=seed) for level in range(len(coordinates.stack))]
    if coordinates.precision == torch.float64 and any(one.problem and "raised" in one.problem for one in found):
        single = replace(coordinates, precision=torch.float32)
        other = [check_smoothness(single, level, points, seed=seed) for level in range(len(coordinates.stack))]
        if not any(one.problem and "raised" in one.problem for one in other):
            coordinates, found = single, other
    exact = all(one.method == "autodiff" for one in found)
    steps = [one.step for one in found if math.isfinite(one.step)]
    step = sorted(steps)[len(steps) // 2] if steps else _STEPS[len(_STEPS) // 2]
    derive = Differentiator(coordinates, exact, step, directions, _spread(points.flat()), seed)
    return derive, [derive.checked(level, points, seen) for level, seen in enumerate(found)]
