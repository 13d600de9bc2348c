r"""Translating the outputs of cheap levels into the finest level's, by what pairs share, and training on all of them.

Levels share their random numbers. A flow of the cheap outputs turns each into the noise that it was made from, up to a
map; given this noise and theta, what the level above makes of it is a regression, with little left to chance:

.. math:: x^{l} = g(\theta, z) + r, \qquad z = T^{-1}(x^{l-1} | \theta)

The regression is learned from pairs, and then every run of the level below is worth one of the level above.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlsbi.data import count_runs
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.flows import NSF, FlowDensity
from mlsbi.density.registry import DensityBuilder, resolve_builder
from mlsbi.randomness import child_seed
from mlsbi.strategies.coupling import check_coupled
from mlsbi.strategies.turning import check_outputs, likelihood_network, turn_term
from mlsbi.training.checkpoints import Checkpoint
from mlsbi.training.descent import Objective
from mlsbi.training.history import History, join_histories
from mlsbi.training.loop import minimise
from mlsbi.training.members import Member, Pooling, Schedule
from mlsbi.training.objective import Term, pool_level
from mlsbi.training.options import TrainingOptions
from mlsbi.training.regression import GaussianProcess

__all__ = ["Translation"]

_KEYS = 200, 201, 202, 203  # of the seeds of a flow, its training, the translation, and the training on what it gave
_MOST_PAIRS = 256  # pairs that a regression learns from
_MOST_CROSSED = 8  # numbers in an output up to which each is predicted from all of them
_NEAR = 0.3  # typical distances between rows, from which a residual is taken
_ROWS = 1024  # translated at once


@dataclass(frozen=True)
class Translation:
    r"""Training on the outputs of all levels, translated to the finest level by regression on the pairs.

    From the cheapest level up: a flow of the level's outputs given theta tells which noise each came from; a Gaussian
    process learns from the pairs what the level above differs by, given noise and theta; all rows are translated by
    it, and a residual of a pair with similar noise, output and theta is added. What is then known of the level above
    are these rows and its own runs. The network is trained on those of the finest level.

    Each number of an output of more than 8 is predicted from the same number of the cheap output, and theta, instead.

    It pays where levels share most of their randomness. The density need not be the same as the flow's.

    Args:
        flow: Density of each cheap level's outputs: `NSF`, `MAF`, or their names.

    Raises:
        ValueError: If the flow is another density.
    """

    flow: DensityBuilder | str = NSF(transforms=2, hidden=50, blocks=1, bins=10, tail_bound=7.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flow", resolve_builder(self.flow))
        if not isinstance(self._builder(2, 1), FlowDensity):
            raise ValueError(f"Expected a flow, whose noise can be told from its outputs; got {self.flow}.")

    @property
    def _builder(self) -> DensityBuilder:
        return resolve_builder(self.flow)

    def terms(self, terms: Sequence[Term]) -> list[Term]:
        """The rows this strategy trains on: all.

        Raises:
            ValueError: If there is one level alone, levels are not coupled, or outputs are too long.
        """
        if len(terms) < 2:
            raise ValueError("Expected data of at least 2 levels to translate between; got 1. Use SingleLevel.")
        check_coupled(terms, "Translation")
        check_outputs(terms[0])
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
        """Trains flows and then the networks, in place, of each member; see `minimise`."""
        shape = members[0].train[0].outputs[0].shape[1:]
        turned = [[turn_term(term) for term in member.train] for member in members]
        held = [[turn_term(term) for term in member.validation] for member in members]
        known = [pool_level(terms, 0) for terms in turned]  # what is known of the level that has been reached
        last = len(turned[0]) - 1
        stages = []
        for level in range(last):
            flows = [likelihood_network(member, self._builder, options, _KEYS[0] + 10 * level) for member in members]
            learners = [
                Member(flow, [rows], [pool_level(own, level)] if own else [],
                       child_seed(member.seed, _KEYS[1], level))
                for member, flow, rows, own in zip(members, flows, known, held, strict=True)
            ]
            stages.append(minimise(
                learners, objective=Objective(), options=options, pooled=pooled,
                schedule=schedules[level] if schedules else None,
                checkpoint=None if checkpoint is None else checkpoint.part(str(level)),
                progress=progress, label=f"{label}, flow of level {level}",
            ))
            for history in stages[-1]:
                history.labels = (f"flow of level {level}",)
            known = [_translate(rows, terms, level + 1, flow, child_seed(member.seed, _KEYS[2], level))
                     for member, rows, terms, flow in zip(members, known, turned, flows, strict=True)]
        learners = [replace(member, train=[_turned_back(rows, member.train[0], shape)],
                            validation=[pool_level(member.validation, last)] if member.validation else [],
                            seed=child_seed(member.seed, _KEYS[3]))
                    for member, rows in zip(members, known, strict=True)]
        stages.append(minimise(
            learners, objective=Objective(), options=options, pooled=pooled,
            schedule=schedules[last] if schedules else None,
            checkpoint=None if checkpoint is None else checkpoint.part("translated"),
            progress=progress, label=f"{label}, translated",
        ))
        for history in stages[-1]:
            history.labels = ("translated",)
        return [join_histories(own) for own in zip(*stages, strict=True)]


@torch.no_grad()
def _translate(rows: Term, terms: Sequence[Term], level: int, flow: ConditionalDensity, seed: int) -> Term:
    """Rows of the level below as rows of this one, and all that is known of it otherwise; on the CPU."""
    flow = copy.deepcopy(flow).cpu()
    own = terms[level]
    assert own.coarse_input is not None
    generator = torch.Generator().manual_seed(seed)
    flow.eval()
    # The last rows are the coarse halves of this level's pairs: their translation is known.
    below = Term(rows.input[: -len(own)], rows.fine[: -len(own)], of_outputs=True)
    pick = torch.randperm(len(own), generator=generator)[:_MOST_PAIRS]
    pairs = own.rows(pick)
    at = _features(flow, own.coarse_input[pick], pairs.fine)
    difference = pairs.input - own.coarse_input[pick]
    correction = min(len(pairs) - 1, 1)
    shift, scale = difference.mean(0), difference.std(0, correction=correction)
    scale = scale.where(scale > 0, 1.0)
    process = GaussianProcess.fit(_per_output(at, pairs), ((difference - shift) / scale).T)
    residuals = process.residuals.T.to(scale) * scale
    spread = at.std(0, correction=correction)
    spread = spread.where(spread > 0, 1.0)
    translated = []
    for x, theta in zip(below.input.split(_ROWS), below.fine.split(_ROWS), strict=True):
        features = _features(flow, x, theta)
        mean = process(_per_output(features, Term(x, theta))).T.to(x)
        apart = torch.cdist(features / spread, at / spread).square() / (_NEAR**2 * features.shape[1])
        near = torch.multinomial((-apart / 2).softmax(1), 1, generator=generator)[:, 0]
        translated.append(x + shift + scale * mean + residuals[near])
    return pool_level([Term(torch.cat([*translated, own.input]), torch.cat([below.fine, own.fine]), of_outputs=True),
                       *terms[level + 1:]], 0)


def _features(flow: ConditionalDensity, x: Tensor, theta: Tensor) -> Tensor:
    """Noise, output and parameters `(n, 2 m + d)`."""
    noise = torch.cat([flow.density.noise(a, flow.embedding(b)) for a, b in zip(x.split(_ROWS), theta.split(_ROWS),
                                                                               strict=True)])
    return torch.cat([noise, x, theta], 1)


def _per_output(features: Tensor, rows: Term) -> Tensor:
    """What each of m outputs is predicted from, shape `(m, n, k)`."""
    outputs = rows.input.shape[1]
    noise, x, theta = features.split([outputs, outputs, features.shape[1] - 2 * outputs], 1)
    if outputs <= _MOST_CROSSED:
        return torch.cat([noise, theta], 1).expand(outputs, -1, -1)
    return torch.cat([x.T[:, :, None], theta.expand(outputs, -1, -1)], 2)


def _turned_back(rows: Term, like: Term, shape: torch.Size) -> Term:
    """Rows of a likelihood as `like`, whose outputs have a shape."""
    if like.of_outputs:
        return rows
    return Term(rows.fine, rows.input.unflatten(1, shape) if len(shape) != 1 else rows.input)
