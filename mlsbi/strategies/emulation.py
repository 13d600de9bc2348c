r"""Learning the likelihood first, and the posterior from draws of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mlsbi.data import count_runs
from mlsbi.density.flows import MAF
from mlsbi.density.mixture import DensityMixture
from mlsbi.density.mixture_density import MDN
from mlsbi.density.registry import DensityBuilder, resolve_builder
from mlsbi.randomness import child_seed, seeded
from mlsbi.strategies.coupling import is_coupled
from mlsbi.strategies.mixing import Candidate, check_held_out, mix_candidates, tell_apart
from mlsbi.strategies.protocol import Strategy
from mlsbi.strategies.single_level import SingleLevel
from mlsbi.strategies.transfer import TransferLearning
from mlsbi.strategies.transfer_then_multilevel import TransferThenMultilevel
from mlsbi.strategies.translation import Translation
from mlsbi.strategies.turning import check_outputs, likelihood_network, turn_term
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.descent import Objective
from mlsbi.training.history import History, TrainingError, join_histories
from mlsbi.training.loop import minimise
from mlsbi.training.members import Member, Pooling, Schedule
from mlsbi.training.objective import Term
from mlsbi.training.options import TrainingOptions

__all__ = ["Emulation"]

_KEYS = 100, 101, 102, 103  # of the seeds of the emulator, its training, its draws, and the training on them
_BEYOND = 1.0  # ranges of the simulated outputs by which a draw may lie outside them


@dataclass(frozen=True)
class Emulation:
    r"""Posterior estimation by an emulator: q(x | theta) first, then q(theta | x) from its draws.

    A likelihood is often simpler than a posterior: it does not depend on the prior, has a regular shape, and what a
    cheap level teaches of it carries over. It is learned from the few runs there are; the posterior then has as many
    rows as it wants, at new parameters from the prior. It stops training by draws too, which are held out: the few real
    runs of the finest level would stop it by chance. What the emulator gets wrong, the posterior gets wrong too.

    The emulator is itself a mixture, of densities that different strategies train, weighted by held-out runs of the
    finest level.

    Args:
        emulators: Pairs of a density, or its name, and the strategy that trains it. When left out: a Gaussian, by
            transfer learning with and without multilevel training after it, by the finest level alone and by
            translation, and a flow by the first and the third of these; where levels are not coupled, both by transfer
            learning and by the finest level alone.
        rows: Draws of the emulator that the posterior is trained on and stopped by, at least 2.
        batch_size: Draws in a step.
        learning_rate: Step size of the posterior's training.
        patience: Its patience.
        members: Networks where no other number is asked for.

    Raises:
        ValueError: If a number is out of range, or there is no emulator.
    """

    emulators: tuple[tuple[DensityBuilder | str, Strategy], ...] | None = None
    rows: int = 8192
    batch_size: int = 512
    learning_rate: float = 2e-3
    patience: int = 8
    members: int = 5

    covers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.rows - 1, self.batch_size, self.patience, self.members) < 1 or not self.learning_rate > 0:
            raise ValueError("Expected at least 2 rows, and positive batch_size, patience, members and learning_rate; "
                             f"got {self}.")
        if self.emulators is None:
            return
        pairs = tuple((resolve_builder(density), strategy) for density, strategy in self.emulators)
        object.__setattr__(self, "emulators", pairs)
        if not pairs or any(getattr(strategy, "mixes", False) for _, strategy in pairs):
            raise ValueError("Expected at least one emulator, trained by a strategy that does not mix others itself.")

    def chosen(self, terms: Sequence[Term]) -> tuple[tuple[DensityBuilder, Strategy], ...]:
        """The emulators for such rows."""
        if self.emulators is not None:
            return tuple((resolve_builder(density), strategy) for density, strategy in self.emulators)
        gaussian, flow = MDN(components=1), MAF(transforms=2, line=True)
        if not is_coupled(terms):
            return tuple((density, strategy) for density in (gaussian, flow)
                         for strategy in (TransferLearning(), SingleLevel(-1)))
        return ((gaussian, TransferThenMultilevel()), (gaussian, TransferLearning()), (gaussian, SingleLevel(-1)),
                (gaussian, Translation()), (flow, TransferThenMultilevel()), (flow, SingleLevel(-1)))

    def terms(self, terms: Sequence[Term]) -> list[Term]:
        """The rows this strategy trains on: all.

        Raises:
            ValueError: If the density is a likelihood, outputs are too long, or there is one level alone.
        """
        if terms[0].of_outputs:
            raise ValueError("Emulation learns a posterior by way of a likelihood. NLE learns the likelihood: use NPE, "
                             "or NLE with another strategy.")
        check_outputs(terms[0])
        for _, strategy in self.chosen(terms):
            strategy.terms(terms)
        return list(terms)

    def runs(self, n: Sequence[int]) -> tuple[int, ...]:
        """Runs of each level whose outputs are trained on, of data with n rows per level: all."""
        return count_runs(n)

    def fit(
        self,
        members: Sequence[Member],
        *,
        options: TrainingOptions,
        pooled: Pooling = False,
        schedules: Sequence[Schedule] = (),
        checkpoint: Checkpoint | None = None,
        progress: bool = True,
        label: str = "training",
    ) -> list[History]:
        """Trains an emulator and then the network, of each member; see `minimise`.

        Raises:
            ValueError: If there is no prior to draw from, or no rows are held out.
            TrainingError: If an emulator's draws cannot be used.
        """
        check_held_out(members, "Emulation")
        if any(member.draw is None for member in members):
            raise ValueError("Emulation draws parameters from the prior, which these members do not know.")
        first, last = (None if checkpoint is None else checkpoint.part(name) for name in ("emulator", "draws"))
        turned = [replace(member, train=[turn_term(term) for term in member.train], draw=None,
                          validation=[turn_term(term) for term in member.validation],
                          seed=child_seed(member.seed, _KEYS[1])) for member in members]
        pairs = self.chosen(members[0].train)
        names = tell_apart([f"{type(density).__name__} by {type(strategy).__name__}" for density, strategy in pairs],
                           [f"{density} by {strategy}" for density, strategy in pairs])
        candidates = [
            Candidate(name, strategy, [likelihood_network(member, density, options, _KEYS[0]) for member in turned])
            for name, (density, strategy) in zip(names, pairs, strict=True)
        ]
        emulators, before = mix_candidates(candidates, turned, options=options, pooled=pooled, checkpoint=first,
                                           progress=progress, label=f"{label}, emulator")
        learners, notes = [], []
        for member, emulator in zip(members, emulators, strict=True):
            rows, lost = self._draw(member, emulator)
            held = min(max(round(options.validation_fraction * self.rows), 1), self.rows - 1)
            out, kept = (Term(rows.input[part], rows.fine[part]) for part in (slice(held), slice(held, None)))
            learners.append(replace(member, train=[kept], validation=[out], seed=child_seed(member.seed, _KEYS[3])))
            notes.append(f"{lost:.1%} of the emulator's draws lay far from every output simulated and were drawn anew"
                         if lost else "")
        after = minimise(
            learners, objective=Objective(), pooled=pooled or True,
            options=replace(options, batch_size=min(self.batch_size, self.rows), learning_rate=self.learning_rate,
                            patience=self.patience),
            checkpoint=last, progress=progress, label=f"{label}, {self.rows} draws",
        )
        for emulated, history, note in zip(before, after, notes, strict=True):
            history.labels = ("draws",)
            emulated.labels = tuple(f"emulator {label}" for label in emulated.labels)
            emulated.notes = tuple(f"emulator: {text}" for text in emulated.notes)
            history.notes = (*history.notes, note) if note else history.notes
        return [join_histories(parts) for parts in zip(before, after, strict=True)]

    def _draw(self, member: Member, emulator: DensityMixture) -> tuple[Term, float]:
        """Draws at parameters from the prior, and the share that had to be drawn anew; on the CPU."""
        assert member.draw is not None
        device = member.network.input_scaler.mean.device
        shape = member.train[0].fine.shape[1:]
        seen = torch.cat([term.fine.flatten(1) for term in member.train])
        low, high = (edge.values.to(device) for edge in (seen.min(0), seen.max(0)))
        margin = _BEYOND * (high - low).where(high > low, 1.0)
        kept: list[tuple[Tensor, Tensor]] = []
        found = drawn = 0
        while found < self.rows:
            part = len(kept)
            if part > 10:
                raise TrainingError("The emulator's draws lie far from every simulated output: it has not learned "
                                    "their law. Simulate more, or use another strategy.")
            theta = member.draw(self.rows, child_seed(member.seed, _KEYS[2], part)).to(device)
            with torch.no_grad(), seeded(child_seed(member.seed, _KEYS[2], part, 1), device):
                x = emulator.sample(1, theta)[0]
            near = ((x > low - margin) & (x < high + margin)).all(1)  # not a number is not near
            kept.append((theta[near].cpu(), x[near].cpu()))
            found, drawn = found + int(near.sum()), drawn + self.rows
        theta, x = (torch.cat(parts)[: self.rows] for parts in zip(*kept, strict=True))
        return Term(theta, x.unflatten(1, shape) if len(shape) != 1 else x), 1 - found / drawn
