r"""Rows of a stack with all that the bounds are made of: losses, Sobolev norms, derivatives along z."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlsbi.levels import LevelStack
from mlsbi.randomness import check_seed, child_seed
from theory_checks.coordinates import Coordinates, Estimator, SimulatorProblem
from theory_checks.differentiating import Differentiator, differentiator
from theory_checks.integrands import Integrand
from theory_checks.jumps import count_jumps, random_way
from theory_checks.laws import noise_law, prior_law
from theory_checks.poincare import Law, product
from theory_checks.smoothness import Smoothness
from theory_checks.tangents import Tangents

__all__ = ["FEWEST_ROWS", "Measured", "measure", "measure_all"]

FEWEST_ROWS = 64
"""Rows that are run whatever time they take."""

_LOOKED_AT = 256  # rows whose smoothness is looked at
_GRADIENT_SHARE = 0.5  # of the time, after which gradients get no more rows
_KEPT = 4096  # rows whose outputs are kept
_LOOKED_FOR_JUMPS = 1000  # rows
_JUMP_REACH = 0.3  # standard deviations along which the integrand's jumps are looked for
_BLOCK_NUMBERS = 1 << 22  # float64 numbers of derivatives held at once
_LARGEST_BLOCK = 4096  # rows


@dataclass(frozen=True)
class Measured:
    r"""Rows of a stack, the same at all levels. What is per level has L + 1 first entries, level 0 first.

    Args:
        stack: The stack.
        integrand: What is integrated; `None` where only Sobolev norms were asked for.
        estimator: Whose coordinates.
        theta_law: Law of theta in them.
        noise_law: Law of the noise.
        smoothness: How each level could be differentiated.
        wanted: Rows that were asked for; there are fewer where time ran out.
        problem: Why nothing could be measured; all below is then empty.
        values: The integrand, `(L + 1, n, components)`.
        level_slopes: Squared norm of the gradient of `f^l` in z, `(L + 1, n, components)`.
        slopes: That of `f^l - f^(l-1)`, with `f^(-1) = 0`, likewise.
        density_fourth: Fourth power of the norm of the integrand's gradient in v = (theta, x), likewise.
        output_fourth: `|G^l|^4`, `(L + 1, n)`.
        gradient_square: `|grad G^l|^2`, `(L + 1, n)`.
        gradient_fourth: `|grad G^l|^4`, `(L + 1, n)`.
        difference_fourth: `|G^l - G^(l-1)|^4`, `(L, n)`.
        difference_gradient_fourth: `|grad (G^l - G^(l-1))|^4`, `(L, n)`.
        theta_fourth: `|theta|^4`, `(n,)`.
        theta: Parameters of the first rows, `(kept, D)`.
        outputs: Outputs of each level at them, each `(kept, ...)`.
        jumps: In how many of a thousand rows each component of the integrand jumps as a function of v, `(components,)`:
            what jumps has no weak derivative, and no bound here is of it.
    """

    stack: LevelStack
    integrand: Integrand | None
    estimator: Estimator
    theta_law: Law
    noise_law: Law
    smoothness: tuple[Smoothness, ...]
    wanted: int
    problem: str | None = None
    values: Tensor = field(default_factory=torch.Tensor, repr=False)
    level_slopes: Tensor = field(default_factory=torch.Tensor, repr=False)
    slopes: Tensor = field(default_factory=torch.Tensor, repr=False)
    density_fourth: Tensor = field(default_factory=torch.Tensor, repr=False)
    output_fourth: Tensor = field(default_factory=torch.Tensor, repr=False)
    gradient_square: Tensor = field(default_factory=torch.Tensor, repr=False)
    gradient_fourth: Tensor = field(default_factory=torch.Tensor, repr=False)
    difference_fourth: Tensor = field(default_factory=torch.Tensor, repr=False)
    difference_gradient_fourth: Tensor = field(default_factory=torch.Tensor, repr=False)
    theta_fourth: Tensor = field(default_factory=torch.Tensor, repr=False)
    theta: Tensor = field(default_factory=torch.Tensor, repr=False)
    outputs: tuple[Tensor, ...] = field(default=(), repr=False)
    jumps: Tensor = field(default_factory=torch.Tensor, repr=False)

    @property
    def law(self) -> Law:
        """Law of z: theta and noise are independent."""
        return product([self.theta_law, self.noise_law])

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.output_fourth.shape[1] if self.output_fourth.ndim == 2 else 0

    @property
    def differences(self) -> Tensor:
        """`f^l - f^(l-1)`, with `f^(-1) = 0`, `(L + 1, n, components)`."""
        return torch.cat([self.values[:1], self.values[1:] - self.values[:-1]])

    @property
    def joint_fourth(self) -> Tensor:
        """`|grad g^l|^4` with `g = (G, theta)`, `(L + 1, n)`: theta adds D to the square."""
        dim = self.theta.shape[1]
        return self.gradient_fourth + 2 * dim * self.gradient_square + dim**2


def measure(
    stack: LevelStack, integrand: Integrand | None = None, *, estimator: Estimator = "npe", rows: int = 20_000,
    **options: Any,
) -> Measured:  # fmt: skip
    r"""Runs all levels at the same rows and measures what the bounds are made of.

    What is wrong with a simulator does not raise: it is in `problem`.

    Args:
        stack: Prior, noise and levels.
        integrand: A loss, or its gradient; `None` for the levels alone.
        estimator: Whose coordinates: `"npe"` or `"nle"`.
        rows: Rows to run.
        **options: As of `measure_all`.

    Raises:
        ValueError: If a number is out of range, or not even the fewest rows fit into ten times `seconds`.
    """
    return measure_all(stack, [integrand], rows=[rows], estimator=estimator, **options)[0]


def measure_all(
    stack: LevelStack,
    integrands: Sequence[Integrand | None],
    *,
    rows: Sequence[int],
    estimator: Estimator = "npe",
    seed: int = 0,
    seconds: float | None = None,
    directions: int = 4,
    theta_constant: float | None = None,
    noise_constant: float | None = None,
    advance: Callable[[int], Any] | None = None,
) -> list[Measured]:
    r"""The same for several integrands, which share the simulators' runs.

    Args:
        stack: Prior, noise and levels.
        integrands: Losses or gradients.
        rows: How many of the rows each of them looks at; the first ones.
        estimator: Whose coordinates: `"npe"` or `"nle"`.
        seed: Of everything random.
        seconds: Time after which fewer rows, at least `FEWEST_ROWS`, will do.
        directions: Random directions along which black boxes are differentiated, two runs each.
        theta_constant: Poincaré constant of theta in the estimator's coordinates, where it is known.
        noise_constant: Poincaré constant of the noise, where it is known.
        advance: Is told of every block of rows done.

    Raises:
        ValueError: As of `measure`.
    """
    if len(rows) != len(integrands) or not rows or min(rows) < 2:
        raise ValueError(f"Expected at least 2 rows for every integrand, for a variance; got {list(rows)}.")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"Expected seconds > 0; got {seconds}.")
    check_seed(seed)
    coordinates = Coordinates(stack, estimator)
    laws = (prior_law(stack.prior, estimator, given=theta_constant),
            noise_law(stack.noise, seed=seed, given=noise_constant).law)
    start = time.monotonic()
    looked_at = min(_LOOKED_AT, max(rows))
    if seconds is not None:
        looked_at = _rows_to_look_at(coordinates, looked_at, seconds, seed)
    derive, smoothness = differentiator(coordinates, rows=looked_at, directions=directions, seed=seed)

    def told(place: int, **found: Any) -> Measured:
        return Measured(stack, integrands[place], estimator, *laws, tuple(smoothness), rows[place], **found)

    problems = [one.problem for one in smoothness if one.problem]
    if problems:
        return [told(place, problem="; ".join(problems)) for place in range(len(integrands))]
    blocks: list[tuple[_Shared, list[dict[str, Tensor]]]] = []
    limits = list(rows)
    try:
        for first, last in _blocks(derive, integrands, limits, seconds):
            spent = 0.0 if seconds is None or first < FEWEST_ROWS else (time.monotonic() - start) / seconds
            if spent > 1:
                break
            if spent > _GRADIENT_SHARE:  # what has many components stops with the rows it has
                limits[:] = [limit if integrand is None or len(integrand.names) == 1 else min(limit, first)
                             for integrand, limit in zip(integrands, limits, strict=True)]
            active = [integrand if first < limit else None for integrand, limit in zip(integrands, limits, strict=True)]
            blocks.append(_block(derive, active, first, last, seed))
            if advance is not None:
                advance(last - first)
    except SimulatorProblem as error:
        return [told(place, problem=str(error)) for place in range(len(integrands))]
    found = [_joined(blocks, which, limit, len(stack)) for which, limit in enumerate(limits)]
    return [told(place, **own, jumps=torch.Tensor() if integrand is None else _jumps(integrand, own, seed))
            for place, (integrand, own) in enumerate(zip(integrands, found, strict=True))]


@dataclass(frozen=True)
class _Shared:
    """What a block of rows has whatever the integrand: per level, and theta and the outputs."""

    numbers: dict[str, Tensor]
    theta: Tensor
    outputs: list[Tensor]


def _joined(
    blocks: Sequence[tuple[_Shared, list[dict[str, Tensor]]]], which: int, limit: int, levels: int
) -> dict[str, Any]:
    """All blocks of one integrand, up to a number of rows."""
    names = blocks[0][0].numbers
    found: dict[str, Any] = {name: torch.cat([shared.numbers[name] for shared, _ in blocks], -1)[..., :limit]
                             for name in names}
    own = [parts[which] for _, parts in blocks if parts[which]]
    if own:
        found.update({name: torch.cat([part[name] for part in own], 1)[:, :limit] for name in own[0]})
    kept = min(_KEPT, limit)
    found["theta"] = torch.cat([shared.theta for shared, _ in blocks])[:kept]
    found["outputs"] = tuple(torch.cat([shared.outputs[level] for shared, _ in blocks if shared.outputs])[:kept]
                             for level in range(levels))
    return found


def _blocks(
    derive: Differentiator, integrands: Sequence[Integrand | None], rows: Sequence[int], seconds: float | None
) -> Iterator[tuple[int, int]]:
    """Ranges of rows, none across a limit, as large as memory allows; where time is short each as all before it."""
    points = derive.coordinates.draw(1, seed=0)
    outputs = derive.coordinates.simulate(0, points).numel()
    along = points.dim if derive.exact else derive.directions
    start = 0
    while start < max(rows):
        components = sum(len(integrand.names) for integrand, limit in zip(integrands, rows, strict=True)
                         if integrand is not None and start < limit)
        each = outputs * along + components * (outputs + derive.coordinates.dim + along)
        size = _LARGEST_BLOCK if seconds is None else min(max(start, FEWEST_ROWS), _LARGEST_BLOCK)
        size = max(1, min(size, _BLOCK_NUMBERS // each))
        stop = min(start + size, *(limit for limit in (*rows, max(rows)) if limit > start))
        yield start, stop
        start = stop


def _block(
    derive: Differentiator, integrands: Sequence[Integrand | None], first: int, last: int, seed: int
) -> tuple[_Shared, list[dict[str, Tensor]]]:
    """All that is measured of some rows."""
    points = derive.coordinates.draw(last - first, seed=seed, start=first)
    along = derive.along(points, block=first)
    of_theta = along[:, :points.theta.shape[1]].double()
    shared: dict[str, list[Tensor]] = {}
    own: list[dict[str, list[Tensor]]] = [{} for _ in integrands]
    below: tuple[Tensor, Tangents] | None = None
    slopes_below: list[Tensor | None] = [None for _ in integrands]
    outputs = []
    for level in range(len(derive.coordinates.stack)):
        x, tangents = derive.outputs(level, points, along)
        if below is not None and x.shape != below[0].shape:
            lower, upper = derive.coordinates.stack.names[level - 1:level + 1]
            raise SimulatorProblem(f"levels '{lower}' and '{upper}' give outputs of shapes {tuple(below[0].shape[1:])} "
                                   f"and {tuple(x.shape[1:])}, which cannot be compared: interpolate onto one grid")
        outputs.append(x)
        _put(shared, output_fourth=x.flatten(1).square().sum(1).square(), gradient_square=tangents.square(),
             gradient_fourth=tangents.fourth())
        if below is not None:
            _put(shared, difference_fourth=(x - below[0]).flatten(1).square().sum(1).square(),
                 difference_gradient_fourth=(tangents - below[1]).fourth())
        for place, integrand in enumerate(integrands):
            if integrand is None:
                continue
            evaluated = integrand.evaluate(points.theta, x)
            broken = int((~torch.isfinite(evaluated.values)).any(1).sum())
            if broken:
                name = derive.coordinates.stack.levels[level].name
                raise SimulatorProblem(f"the density is not finite at {broken} of {len(points)} rows of level '{name}'")
            slope = evaluated.theta @ of_theta + evaluated.x @ tangents.values  # along directions, (n, components, k)
            before = slopes_below[place]
            change = slope if before is None else slope - before
            of_v = evaluated.theta.square().sum(-1) + evaluated.x.square().sum(-1)
            _put(own[place], values=evaluated.values, level_slopes=_squared(slope, derive),
                 slopes=_squared(change, derive), density_fourth=of_v.square())
            slopes_below[place] = slope
        below = x, tangents
    numbers = {name: torch.stack(tensors) for name, tensors in shared.items()}
    numbers["theta_fourth"] = points.theta.square().sum(1).square()
    kept = outputs if first < _KEPT else []
    return (_Shared(numbers, points.theta, kept),
            [{name: torch.stack(tensors) for name, tensors in found.items()} for found in own])


def _jumps(integrand: Integrand, found: dict[str, Any], seed: int) -> Tensor:
    """In how many rows each component jumps on the way along a random direction in v."""
    theta, x = found["theta"][:_LOOKED_FOR_JUMPS], found["outputs"][-1][:_LOOKED_FOR_JUMPS]
    move, _ = random_way(theta, x, torch.Generator().manual_seed(child_seed(seed, 4)))
    spread = integrand.values(theta, x).std(0)
    weight = torch.where(spread > 0, 1 / spread.clamp_min(1e-300), 0.0)
    return count_jumps(lambda at: integrand.values(*move(at)) * weight, len(theta), reach=_JUMP_REACH)


def _squared(slopes: Tensor, derive: Differentiator) -> Tensor:
    """Squared norms of gradients from derivatives along directions `(n, components, k)`."""
    square = slopes.square()
    return square.sum(-1) if derive.exact else square.mean(-1)


def _put(found: dict[str, list[Tensor]], **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        found.setdefault(name, []).append(tensor)


def _rows_to_look_at(coordinates: Coordinates, most: int, seconds: float, seed: int) -> int:
    """As many rows as a fourth of the time allows, once it is known what a run takes.

    Raises:
        ValueError: If the whole would take more than ten times as long as it may.
    """
    evaluations = 50  # of each level, to see whether it can be differentiated
    rows, taken, warm = 2, 0.0, False
    while True:
        points = coordinates.draw(rows, seed=seed, stream=1)
        start = time.monotonic()
        try:
            for level in range(len(coordinates.stack)):
                coordinates.simulate(level, points)
        except SimulatorProblem:
            return rows  # which is said in a moment
        taken = time.monotonic() - start
        if not warm and taken < seconds < 16 * evaluations * taken:  # a first call may compile or load something
            warm = True
            continue
        if evaluations * taken > 10 * seconds:
            hours = (evaluations * 2 + FEWEST_ROWS * 9) / rows * taken / 3600
            raise ValueError(f"One run of every level takes {taken / rows:.3g} s; the checks need some "
                             f"{evaluations * 2 + FEWEST_ROWS * 9} of them, {hours:.2g} hours. Allow that by "
                             "seconds=... (--seconds), or check a shorter version of the simulator.")
        if rows == most or 4 * evaluations * taken > seconds / 4:
            return rows
        rows = min(4 * rows, most)
