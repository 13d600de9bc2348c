r"""The best parameters of every member so far, and who has stopped; all of it decided where the numbers are.

Nothing here waits for the device: a stop is noticed when the host next looks, and until then the members concerned are
already left as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mlsbi.training.members import Pooling, groups_of

__all__ = ["NONFINITE", "PATIENCE", "RUNNING", "Kept"]

RUNNING, PATIENCE, NONFINITE = range(3)


class Kept:
    r"""Best parameters by held-out score, or the last ones where nothing is held out.

    Args:
        flat: Parameters to begin with, `(K, P)`.
        patience: Epochs without a better score before a member stops.
        scored: Whether there are held-out rows.
        pooled: Whether members, or those of a group, share one score, their mean, and so stop at one epoch.
    """

    def __init__(self, flat: Tensor, *, patience: int, scored: bool, pooled: Pooling) -> None:
        self.patience, self.scored, self.pooled = patience, scored, pooled
        members = len(flat)
        self._same = self._together(members, flat.device)
        self.best = flat.clone()
        self.previous = flat.clone()  # without scores the last parameters are kept, of which no loss is known yet
        self.loss = torch.full((members,), torch.inf, dtype=torch.float64, device=flat.device)
        self.epoch = torch.full((members,), -1, dtype=torch.int64, device=flat.device)
        self.state = torch.full((members,), RUNNING, dtype=torch.int64, device=flat.device)

    def update(self, epoch: int, loss: Tensor, score: Tensor, flat: Tensor) -> Tensor:
        """Takes in an epoch's training losses, held-out scores `(K,)` and parameters; gives who was kept, `(K,)`."""
        running = self.state == RUNNING
        sound = loss.isfinite() & flat.isfinite().all(1)
        if self.scored:
            if self.pooled:
                # A member without a finite score says that its epoch is no good; the others' go on.
                score = torch.where(self._same, score, 0.0).sum(1) / self._same.sum(1)
                sound = (sound | ~running | ~self._same).all(1)  # there is no common epoch without one of them
            better = running & sound & score.isfinite() & (score < self.loss)
        else:
            score, better = loss, running & sound
        self.loss = torch.where(better, score.double(), self.loss)
        self.epoch = torch.where(better, epoch, self.epoch)
        if not self.scored:
            self.previous = torch.where(better[:, None], self.best, self.previous)
        self.best = torch.where(better[:, None], flat, self.best)
        tired = running & (epoch - self.epoch >= self.patience) & self.scored
        self.state = torch.where(tired, PATIENCE, self.state)
        self.state = torch.where(running & ~sound, NONFINITE, self.state)
        return better

    def _together(self, members: int, device: torch.device) -> Tensor:
        """Which members stop together, `(K, K)`."""
        same = torch.zeros(members, members, dtype=torch.bool)
        for group in groups_of(self.pooled, members):
            for member in group:
                same[member, group] = True
        return same.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """All that changes, each with a leading axis of members."""
        return {"best": self.best, "previous": self.previous, "best_loss": self.loss, "best_epoch": self.epoch,
                "state": self.state}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `tensors` gave."""
        self.best, self.previous = tensors["best"].clone(), tensors["previous"].clone()
        self.loss = tensors["best_loss"].clone()
        self.epoch, self.state = tensors["best_epoch"].clone(), tensors["state"].clone()

    def select(self, members: Sequence[int]) -> None:
        """Goes on with some of the members."""
        if isinstance(self.pooled, tuple):
            self.pooled = tuple(self.pooled[member] for member in members)
        self._same = self._together(len(members), self.loss.device)
        self.load({name: tensor[list(members)] for name, tensor in self.tensors().items()})
