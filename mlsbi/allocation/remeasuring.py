r"""Variances measured anew on all rows of a campaign so far, by networks trained on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from mlsbi.allocation.integrands import Integrand, Rows
from mlsbi.allocation.moments import Moments, compact, measure
from mlsbi.allocation.networks import Reader, fold_of, train_states
from mlsbi.allocation.pilot_report import PilotReport
from mlsbi.data import LevelData, MultilevelData
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.embeddings import EmbeddingBuilder
from mlsbi.density.registry import DensityBuilder
from mlsbi.density.standardise import Transform
from mlsbi.randomness import child_seed

__all__ = ["Remeasuring"]

_MOST_ROWS = 4096  # of a level that networks are trained and scored on: its variance is then known to a few percent
_CHUNK_ROWS = 512  # scored together, around a mean of their own
_FEWEST_SCORED = 4  # rows of a set: two a fold


@dataclass(frozen=True)
class Remeasuring:
    r"""How variances are measured.

    Args:
        prior: The prior.
        integrand: What they are of.
        estimator: `"npe"` or `"nle"`.
        density: Of the networks.
        embedding: What reads their condition.
        x_transform: What outputs go through before they are standardised.
        device: Where they are trained.
        progress: Whether to show progress bars.
    """

    prior: Distribution
    integrand: Integrand
    estimator: str
    density: DensityBuilder
    embedding: EmbeddingBuilder | None
    x_transform: Transform
    device: str | torch.device
    progress: bool

    def measure(self, data: MultilevelData, report: PilotReport | None = None, *, seed: int) -> list[Moments]:
        r"""Moments of each level's term, the last of them its correction.

        A pilot's joint rows are measured on at every level. Networks are trained on one half of the rows and scored on
        the other.

        Args:
            data: All rows so far, which begin with the pilot's, if there is one; at least 8 of a level.
            report: The pilot's report.
            seed: Of networks and bootstrap.
        """
        outputs = [(level.theta, level.fine) for level in data.levels]
        outputs += [(level.theta, level.coarse) for level in data.levels if level.coarse is not None]
        reader = Reader.fit(self.prior, self.estimator, outputs, x_transform=self.x_transform,
                            embedding=self.embedding)
        networks = self._train(reader, data, seed)
        return [self._moments(networks, sets, child_seed(seed, 1 + level))
                for level, sets in enumerate(_term_rows(reader, data, report))]

    def _train(self, reader: Reader, data: MultilevelData, seed: int) -> Sequence[ConditionalDensity | None]:
        """Networks trained on the rows so far, one per fold."""
        if not self.integrand.needs_network:
            return [None]
        levels: list[list[Rows]] = [[] for _ in data.levels]
        for index, each in enumerate(data.levels):
            rows = each.rows(slice(_MOST_ROWS))
            levels[index].append(reader.rows(rows.theta, [rows.fine]))
            if rows.coarse is not None:
                levels[index - 1].append(reader.rows(rows.theta, [rows.coarse]))
        states = list(train_states(reader, levels, builder=self.density, embedding=self.embedding,
                                   seed=child_seed(seed, 0), device=self.device, progress=self.progress))
        return states[-1][1]

    def _moments(self, networks: Sequence[ConditionalDensity | None], sets: Sequence[Rows], seed: int) -> Moments:
        """Moments of a term's rows, each scored by the network that has not seen it."""
        folds = []
        for rows in sets:
            for fold, network in enumerate(networks):
                own: Tensor = torch.nonzero(fold_of(len(rows), len(networks)) == fold).flatten()
                for chunk in own.tensor_split(max(1, len(own) // _CHUNK_ROWS)):
                    folds.append(compact(self.integrand.blocks(network, rows.rows(chunk))))
        return measure(folds, seed=seed)


def _term_rows(reader: Reader, data: MultilevelData, report: PilotReport | None) -> list[list[Rows]]:
    """Rows of each level's term, and the pilot's joint rows where they are of another term.

    A row keeps its place in its set, and so its fold: the finest pairs begin with the joint rows.
    """
    found = []
    finest = len(data.levels) - 1
    for index, own in enumerate(data.levels):
        sets = [own]
        if index < finest and report is not None:
            sets.append(LevelData(report.theta, report.outputs[index], report.outputs[index - 1] if index else None))
        few = [rows.rows(slice(_MOST_ROWS)) for rows in sets if len(rows) >= _FEWEST_SCORED]
        found.append([reader.rows(rows.theta, [rows.fine] if rows.coarse is None else [rows.coarse, rows.fine])
                      for rows in few])
    return found
