r"""One step of gradient descent on the weighted telescoping sum, for all members at once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlsbi.randomness import seeded
from mlsbi.training.compiling import compiled
from mlsbi.training.objective import telescope
from mlsbi.training.options import TrainingOptions
from mlsbi.training.plan import Rows
from mlsbi.training.stabilisers import adjust, averaged_share, clip_norm, difference_penalty
from mlsbi.training.stack import Stack

__all__ = ["RECORDED", "Descent", "Objective", "Step"]

RECORDED = ("gradient_norm", "base_norm", "correction_norm", "cosine", "projected")
"""What a step records of its gradient; all but the first only where the gradient is adjusted."""


@dataclass(frozen=True)
class Objective:
    r"""Which weighted telescoping sum is descended, and how its gradient is adjusted.

    Args:
        weights: `"unit"` (the published objective), `"estimated"` (variance-minimising, from losses of held-out rows in
            earlier epochs; each epoch is then scored under weights of its own), or fixed a_0 .. a_{L-1}.
        rescale: Whether each coarse gradient gets the length of its fine twin.
        project: Whether conflicting gradients of level 0 and of the correction are projected.
        correction_limit: Longest correction of the gradient, in lengths of level 0's gradient; any when left out.
        difference_penalty: How many standard errors of the correction terms are added to the loss.

    Raises:
        ValueError: If a number is out of range.
    """

    weights: Literal["unit", "estimated"] | tuple[float, ...] = "unit"
    rescale: bool = False
    project: bool = False
    correction_limit: float | None = None
    difference_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.weights, str):
            object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        elif self.weights not in ("unit", "estimated"):
            raise ValueError(f'Expected weights "unit", "estimated" or numbers a_0 .. a_(L-1); got "{self.weights}".')
        if self.correction_limit is not None and not self.correction_limit > 0:
            raise ValueError(f"Expected correction_limit > 0; got {self.correction_limit}.")
        if not self.difference_penalty >= 0:
            raise ValueError(f"Expected difference_penalty >= 0; got {self.difference_penalty}.")

    @property
    def adjusts(self) -> bool:
        """Whether a step needs the gradient of every half."""
        return self.rescale or self.project or self.correction_limit is not None


@dataclass(frozen=True)
class Step:
    """What a step saw: losses of its rows `(K, n)`, and `(K,)` tensors by names out of `RECORDED`."""

    losses: Tensor
    recorded: dict[str, Tensor]


class Descent:
    r"""The parameters of K members, their optimiser, and what a step does to them.

    Args:
        stack: The networks, from which parameters start.
        objective: What is descended.
        options: Step size, clipping, precision.
        n: Training rows of each term.
        together: Whether all members are evaluated in one go.
        draws: Whether the networks draw random numbers of their own, by torch's global state. The two halves of a pair
            are then evaluated from one seed each time.
    """

    def __init__(
        self,
        stack: Stack,
        objective: Objective,
        options: TrainingOptions,
        *,
        n: Sequence[int],
        together: bool,
        draws: bool,
    ) -> None:
        self.stack, self.objective, self.options = stack, objective, options
        self.n, self.is_together, self.draws = tuple(n), together, draws
        self.flat = nn.Parameter(stack.read())
        self.average = self.flat.detach().clone() if options.average else None
        self._share = torch.zeros((), dtype=self.flat.dtype, device=self.flat.device)
        self.done = 0
        self.optimiser = _optimiser(self.flat, options)
        self._bound = False
        self._evaluate: Callable[[Rows], Tensor] = self._one_by_one
        self._prepare()

    @property
    def current(self) -> Tensor:
        """The parameters to score and keep, `(K, P)`."""
        return self.flat.detach() if self.average is None else self.average

    @torch.no_grad()
    def score(self, rows: Rows, most: int) -> Tensor:
        """Row losses `(K, n)` in the mode the networks are in and in full precision, of so many rows at a time."""
        return torch.cat([self._score(*part) for part in zip(rows.input.split(most, 1), rows.condition.split(most, 1),
                                                             strict=True)], 1)

    def _score(self, input: Tensor, condition: Tensor) -> Tensor:
        if self._bound and self.average is None:
            return self._one_by_one(Rows(input, condition, (input.shape[1],), {}))
        function = self.stack.together if self.is_together else self.stack.apart
        return function(self.current, input, condition, {})

    def compile(self) -> None:
        """Evaluates training steps by a compiled function from now on; the next step compiles it."""
        evaluate = compiled(self.stack.together)  # of one network too, which takes its parameters from the matrix
        self._evaluate = lambda rows: evaluate(self.flat, rows.input, rows.condition, rows.keep)
        self._bound = False

    def step(self, rows: Rows, weights: Tensor, seeds: Sequence[Sequence[int]] = ()) -> Step:
        r"""Moves the parameters by one step.

        Args:
            rows: What the step sees.
            weights: a_0 .. a_L, shape `(K, L + 1)`.
            seeds: For networks that draw numbers of their own: one seed per member and term.
        """
        self.advance()
        return self.move(rows, weights, seeds)

    def advance(self) -> None:
        """Counts a step, before `move`; apart from it, for a step that is replayed on the device."""
        self.done += 1
        if self.average is not None:
            self._share.fill_(averaged_share(self.options.average, self.done))

    def move(self, rows: Rows, weights: Tensor, seeds: Sequence[Sequence[int]] = ()) -> Step:
        """What `step` does to the parameters once it is counted."""
        losses, gradient, recorded = self.gradient(rows, weights, seeds)
        with torch.no_grad():
            self.flat.grad, recorded["gradient_norm"] = clip_norm(gradient, self.options.clip)
            self.optimiser.step()
            if self.average is not None:
                self.average.lerp_(self.flat, self._share)
        return Step(losses, recorded)

    def gradient(
        self, rows: Rows, weights: Tensor, seeds: Sequence[Sequence[int]] = ()
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Row losses, the adjusted gradient `(K, P)` before clipping, and what is recorded of it."""
        penalty = self.objective.difference_penalty if len(self.n) > 1 else 0.0
        if not self.objective.adjusts or len(self.n) == 1:
            losses = self._losses(rows, seeds)
            halves = losses.split(rows.sizes, 1)
            total = telescope(halves, weights)
            if penalty:
                total = total + penalty * difference_penalty(halves, weights, self.n)
            return losses.detach(), self._slope(total), {}
        found, gradients = [], []
        for half in self._apart_by_half(rows, seeds):
            losses = half()
            gradients.append(self._slope(losses.mean(1)))
            found.append(losses.detach())
        adjusted = adjust(gradients, weights, use_rescale=self.objective.rescale, use_project=self.objective.project,
                          correction_limit=self.objective.correction_limit)
        gradient = adjusted.gradient
        if penalty:
            halves = tuple(self._losses(rows, seeds).split(rows.sizes, 1))
            gradient = gradient + penalty * self._slope(difference_penalty(halves, weights, self.n))
        return torch.cat(found, 1), gradient, {name: getattr(adjusted, name) for name in RECORDED[1:]}

    def _slope(self, values: Tensor) -> Tensor:
        """Gradient of each member's value with respect to its own parameters, `(K, P)`."""
        if not self._bound:
            return torch.autograd.grad(values.sum(), self.flat)[0]
        own = self.stack.parameters()
        found = iter(torch.autograd.grad(values.sum(), [one for parameters in own for one in parameters],
                                         allow_unused=True))
        rows = []
        for parameters in own:
            parts = [(parameter, next(found)) for parameter in parameters]
            rows.append(torch.cat([parameter.new_zeros(parameter.numel()) if part is None else part.flatten()
                                   for parameter, part in parts]))
        return torch.stack(rows)

    def _prepare(self) -> None:
        """How losses are evaluated: all members from the matrix, or each network by itself, its parameters in there."""
        stack = self.stack
        self._bound = not self.is_together
        if self._bound:
            stack.bind(self.flat)
            self._evaluate = self._one_by_one
        else:
            self._evaluate = lambda rows: stack.together(self.flat, rows.input, rows.condition, rows.keep)

    def _one_by_one(self, rows: Rows) -> Tensor:
        return torch.stack([self.stack.as_is(member, rows.input, rows.condition, rows.keep)
                            for member in range(len(self.stack))])

    def _losses(self, rows: Rows, seeds: Sequence[Sequence[int]]) -> Tensor:
        if self.draws:
            return torch.cat([half() for half in self._apart_by_half(rows, seeds)], 1)
        with self._cast(rows):
            return self._evaluate(rows).to(self.flat.dtype)

    def _apart_by_half(self, rows: Rows, seeds: Sequence[Sequence[int]]) -> Iterator[Callable[[], Tensor]]:
        """One function per half, to be called in turn."""
        for index, half in enumerate(rows.halves()):
            yield functools.partial(self._half, half, (index + 1) // 2, seeds)

    def _half(self, half: Rows, term: int, seeds: Sequence[Sequence[int]]) -> Tensor:
        with self._cast(half):
            if not self.draws:
                return self._evaluate(half).to(self.flat.dtype)
            losses = []
            for member, own in enumerate(seeds):
                with seeded(own[term], self.flat.device):  # one seed for both halves of a pair: then their masks agree
                    losses.append(self.stack.as_is(member, half.input, half.condition, half.keep))
        return torch.stack(losses).to(self.flat.dtype)

    def _cast(self, rows: Rows) -> contextlib.AbstractContextManager[Any]:
        if self.options.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(rows.input.device.type, dtype=torch.bfloat16)

    def select(self, members: Sequence[int], stack: Stack) -> None:
        """Goes on with some of the members, whose networks are `stack`."""
        state = {name: tensor[list(members)] for name, tensor in self.tensors().items()}
        self.stack.release()
        self.stack = stack
        self.load(state, self.done)

    def undo(self) -> None:
        """Goes back to evaluating without compiling, after a step that failed before it changed anything."""
        self.done -= 1
        self._prepare()

    def tensors(self) -> dict[str, Tensor]:
        """All that changes, each with a leading axis of members."""
        state = self.optimiser.state.get(self.flat, {})
        found = {"flat": self.flat.detach(), **{name: state[name] for name in ("exp_avg", "exp_avg_sq") if state}}
        return found if self.average is None else {**found, "average": self.average}

    def load(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Goes on from what `tensors` gave after `done` steps."""
        self.flat = nn.Parameter(tensors["flat"].clone())
        self.average = tensors["average"].clone() if "average" in tensors else None
        self.done = done
        self.optimiser = _optimiser(self.flat, self.options)
        if "exp_avg" in tensors:
            self.optimiser.state[self.flat] = {
                "step": torch.tensor(float(done), device=self.flat.device),
                **{name: tensors[name].clone() for name in ("exp_avg", "exp_avg_sq")},
            }
        self._prepare()


def _optimiser(flat: nn.Parameter, options: TrainingOptions) -> torch.optim.AdamW:
    kind = flat.device.type
    return torch.optim.AdamW([flat], lr=options.learning_rate, weight_decay=options.weight_decay,
                             fused=kind in ("cpu", "cuda"), capturable=kind == "cuda")
