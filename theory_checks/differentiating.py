r"""Outputs of levels with their derivatives: by autodiff, or by finite differences where there is a black box."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlsbi.randomness import child_seed
from theory_checks.coordinates import Coordinates, Points, SimulatorProblem
from theory_checks.smoothness import AGREEMENT, STEPS, Smoothness, check_smoothness
from theory_checks.tangents import Tangents, moved_inside, pull_back, relative_error, spread_of

__all__ = ["Differentiator", "differentiator"]


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
            tangents = torch.stack(pull_back(self.coordinates, level, points, list(weights)), 1)
        else:
            # Every coordinate moves by the same length, a step of the narrowest.
            along = along.double()
            step = stride * self.step * float(self.spread[self.spread > 0].min()) / math.sqrt(points.dim)
            centre = moved_inside(points, torch.full_like(self.spread, step))
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
        error = float(relative_error((far.values - near.values).flatten()[None], near.values.flatten()[None]))
        if error <= AGREEMENT:
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
    step = sorted(steps)[len(steps) // 2] if steps else STEPS[len(STEPS) // 2]
    derive = Differentiator(coordinates, exact, step, directions, spread_of(points.flat()), seed)
    return derive, [derive.checked(level, points, seen) for level, seen in enumerate(found)]
