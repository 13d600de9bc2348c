r"""Whether a level can be differentiated: is it deterministic, does it jump, does autodiff tell the truth of it?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlsbi.randomness import child_seed
from theory_checks.coordinates import Coordinates, Points, SimulatorProblem
from theory_checks.jumps import count_jumps
from theory_checks.tangents import moved_inside, pull_back, relative_error, spread_of

__all__ = ["AGREEMENT", "STEPS", "Smoothness", "check_smoothness"]

STEPS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
"""Steps of finite differences that are tried, in standard deviations of a coordinate."""

AGREEMENT = 0.05
"""Relative root mean square error up to which derivatives are trusted."""

_PATHS, _STOPS = 64, 33  # between rows, and how many places on each, where changes are compared with derivatives
_HIDDEN = 1.25  # times, from which change that no derivative tells of
_DETERMINISM = 1e-6  # of an output's standard deviation


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
    scale = spread_of(x)
    if not ((x - again).abs() <= _DETERMINISM * scale + 1e-12 * x.abs()).all():
        worst = float(((x - again).abs() / scale.clamp_min(1e-300)).max())
        return Smoothness(name, "none", problem=f"level '{name}' is not deterministic: the same rows in other "
                                                f"batches gave outputs that differ by {worst:.2g} standard deviations. "
                                                "Draw all randomness from `noise`, and let no row depend on another")
    signs = torch.randint(0, 2, (2, len(points), max(points.dim, x.shape[1])), generator=generator) * 2.0 - 1
    # One output a row, a random mixture of all, along one direction a row.
    mix = (signs[0, :, :x.shape[1]] / scale.clamp_min(1e-300)).where(scale > 0, 0.0).double()
    direction = spread_of(points.flat()) * signs[1, :, :points.dim].double() * _parts_moved(points)
    points = moved_inside(points, direction.abs() * STEPS[0])

    def along(at: Tensor) -> Tensor:
        moved = points.moved(at[:, None] * direction)
        return (coordinates.simulate(level, moved).flatten(1) * mix).sum(1)

    jumps = int(count_jumps(lambda at: along(at)[:, None], len(points), reach=STEPS[0]))
    if jumps:
        return Smoothness(name, "none", problem=f"level '{name}' is not differentiable: within 1e-12 standard "
                                                f"deviations of theta or noise it jumps, in {jumps} of {len(points)} "
                                                "rows that were looked at (rounding, counts, comparisons, a path that "
                                                "the least difference decides?)")
    steps = torch.tensor(STEPS, dtype=torch.float64)
    slopes = torch.stack([(along(torch.full((len(points),), step)) - along(torch.full((len(points),), -step)))
                          / (2 * step) for step in STEPS])
    try:
        slope = _slope(coordinates, level, points, mix, direction)
    except SimulatorProblem:
        slope = torch.full((len(points),), math.nan, dtype=torch.float64)  # it runs: what fails is differentiating it
    errors = relative_error(slopes - slope, slopes)
    if float(errors.min()) <= AGREEMENT:
        best = int(errors.argmin())
        hidden = _hidden_change(coordinates, level, points, mix)
        problem = None if hidden < _HIDDEN else (
            f"level '{name}' is so steep in places that its derivatives at a few hundred rows tell of {1 / hidden:.0%} "
            "of its change between them: no sample of rows can estimate these bounds")
        return Smoothness(name, "none" if problem else "autodiff", float(steps[best]), float(errors[best]), problem)
    errors = relative_error(slopes[1:] - slopes[:-1], slopes[1:])
    errors = torch.maximum(errors[1:], errors[:-1])  # of three steps: two may agree by chance
    best = int(errors.argmin())
    if float(errors[best]) > AGREEMENT:
        return Smoothness(name, "none", float(steps[best + 1]), float(errors[best]),
                          f"level '{name}' is not differentiable: its finite differences change by "
                          f"{float(errors[best]):.0%} from one step size to the next, whatever the step")
    return Smoothness(name, "finite differences", float(steps[best + 1]), float(errors[best]))


def _parts_moved(points: Points) -> Tensor:
    """Which coordinates each row moves, `(n, dim)`: theta, the noise or both, by one standard deviation in all."""
    theta = torch.arange(points.dim) < points.theta.shape[1]
    kinds = torch.stack([theta, ~theta, torch.ones_like(theta)]) if not theta.all() else theta[None]
    moved = kinds[torch.arange(len(points)) % len(kinds)].double()
    return moved / moved.sum(1, keepdim=True).sqrt()


def _hidden_change(coordinates: Coordinates, level: int, points: Points, mix: Tensor) -> float:
    """How many times more outputs change on the way from one row to another than derivatives along it add up to."""
    pairs = min(_PATHS, len(points) // 2)
    ends = points.flat()
    way = ends[pairs:2 * pairs] - ends[:pairs]
    at = torch.linspace(0, 1, _STOPS, dtype=torch.float64).repeat_interleave(pairs)
    along = points.rows(torch.arange(pairs).repeat(_STOPS)).moved(at[:, None] * way.repeat(_STOPS, 1))
    weight = mix[:pairs].repeat(_STOPS, 1)
    values = (coordinates.simulate(level, along).flatten(1) * weight).sum(1).reshape(_STOPS, pairs)
    slopes = _slope(coordinates, level, along, weight, way.repeat(_STOPS, 1)).reshape(_STOPS, pairs).abs()
    changed = float(values.diff(dim=0).abs().sum())
    told = float((slopes[1:] + slopes[:-1]).sum()) / 2 / (_STOPS - 1)
    return changed / told if told > 0 else 1.0 if changed == 0 else math.inf


def _slope(coordinates: Coordinates, level: int, points: Points, mix: Tensor, direction: Tensor) -> Tensor:
    """The mixed output's derivative along a direction, by autodiff."""
    gradient = pull_back(coordinates, level, points, [mix])[0]
    return (gradient * direction).sum(1)
