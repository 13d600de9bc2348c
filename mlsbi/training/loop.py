r"""Minimising the telescoping loss, with early stopping on held-out pairs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mlsbi.density.conditional import ConditionalDensity
from mlsbi.randomness import seeded
from mlsbi.training.gradients import Combined, combine_gradients
from mlsbi.training.objective import Batch, Term, batch_terms, telescope
from mlsbi.training.weights import LaggedWeights

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["History", "Objective", "TrainingError", "TrainingOptions", "join_histories", "minimise"]

_SMALLEST_BATCH = 64  # rows of a term in a step, where it has them: fewer make the correction's gradient noise
_FIRST_ROWS = 1024  # rows of a term scored before training, to see whether x can be used at all
_GRADIENT_EVERY = 20  # epochs between records of the terms' gradients, where the step does not need them


class TrainingError(RuntimeError):
    """Training gave no network that could be used."""


@dataclass(frozen=True)
class TrainingOptions:
    r"""How a network is trained.

    Args:
        learning_rate: Adam's step size.
        batch_size: Rows of all terms in a step, about: a term gives its share, at least 64 rows where it has them.
            Every row in every step when `None`. `"auto"` is a quarter of the rows, at least 256 and at most 2048:
            where cheap rows are many, small batches would show the few pairs far more often than them.
        epochs: Most passes over the rows.
        patience: Epochs without a better held-out loss before training stops.
        validation_fraction: Share of each term's rows held out, pairs kept together; 0 trains all epochs on all rows
            and keeps the last weights.
        clip: Largest gradient norm.
        weight_decay: Decoupled weight decay.

    Raises:
        ValueError: If a number is out of range.
    """

    learning_rate: float = 5e-4
    batch_size: int | Literal["auto"] | None = "auto"
    epochs: int = 1000
    patience: int = 30
    validation_fraction: float = 0.2
    clip: float = 5.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and self.clip > 0 and self.weight_decay >= 0):
            raise ValueError(f"Expected learning_rate > 0, clip > 0 and weight_decay >= 0; got {self}.")
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f'Expected a number, "auto" or None as batch_size; got {self.batch_size!r}.')
        rows = self.batch_size if isinstance(self.batch_size, (int, float)) else 1
        if self.epochs < 1 or self.patience < 1 or rows < 1:
            raise ValueError(f"Expected epochs, patience and batch_size of at least 1; got {self}.")
        counts = (self.epochs, self.patience, rows)
        if any(int(number) != number for number in counts):
            raise ValueError(f"Expected whole numbers of epochs, patience and batch_size; got {self}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"Expected 0 <= validation_fraction < 1; got {self.validation_fraction}.")


@dataclass(frozen=True)
class Objective:
    r"""Which weighted telescoping sum is descended, and how its gradient is adjusted.

    Args:
        weights: `"unit"` (the published objective), `"estimated"` (variance-minimising, from losses of held-out rows in
            earlier epochs; each epoch is then scored under weights of its own), or fixed a_0 .. a_{L-1}.
        rescale: Whether each coarse gradient gets the length of its fine twin.
        project: Whether conflicting gradients of level 0 and of the correction are projected.
    """

    weights: Literal["unit", "estimated"] | tuple[float, ...] = "unit"
    rescale: bool = False
    project: bool = False


@dataclass
class History:
    r"""What happened in one training.

    Args:
        epochs: One record per epoch: losses, loss of each half, weights, gradient norms, cosine, projected share; in
            transfer learning its stage.
        best_epoch: Epoch whose weights were kept.
        best_loss: Held-out loss of that epoch; the training loss without held-out rows.
        stopped: Why training ended.
        seconds: Time it took.
        n_train: Rows trained on, per term.
        n_validation: Rows held out, per term.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    best_loss: float = math.inf
    stopped: str = ""
    seconds: float = 0.0
    n_train: tuple[int, ...] = ()
    n_validation: tuple[int, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per epoch."""
        import pandas as pd  # takes a quarter as long to import as torch, and training does not need it

        return pd.DataFrame(self.epochs)


def join_histories(stages: Sequence[History]) -> History:
    """The history of trainings in a row, each of one term, with the number of its stage in every record.

    The kept epoch and its loss are the last stage's.
    """
    before = sum(len(stage.epochs) for stage in stages[:-1])
    return History(
        epochs=[{**record, "stage": float(index)} for index, stage in enumerate(stages) for record in stage.epochs],
        best_epoch=before + stages[-1].best_epoch,
        best_loss=stages[-1].best_loss,
        stopped="; then ".join(stage.stopped for stage in stages),
        seconds=sum(stage.seconds for stage in stages),
        n_train=tuple(n for stage in stages for n in stage.n_train),
        n_validation=tuple(n for stage in stages for n in stage.n_validation),
    )


def minimise(
    network: ConditionalDensity,
    train: Sequence[Term],
    validation: Sequence[Term],
    *,
    objective: Objective,
    options: TrainingOptions,
    seed: int,
    progress: bool = True,
    label: str = "training",
) -> History:
    r"""Trains a network in place and leaves it in eval mode with the best weights found.

    Args:
        network: On the device to train on.
        train: Standardised rows of each term.
        validation: Held-out rows of each term; empty to train for all epochs and keep the last weights.
        objective: Weights and gradient adjustments.
        options: Step size, batches, stopping.
        seed: Seed of batches and dropout; torch's global random state is left as found.
        progress: Whether to show a progress bar.
        label: What the bar is called.

    Raises:
        ValueError: If the weights do not fit the terms, or cannot be estimated because a term has one row.
        TrainingError: If the loss is not finite before training, or training diverges at once.
    """
    device = next(network.parameters()).device
    with seeded(seed, device):
        trainer = _Trainer(network, train, validation, objective, options, device)
        return trainer.run(tqdm(range(options.epochs), desc=label, unit="epoch", disable=not progress, leave=False))


class _Trainer:
    """State of one training run."""

    def __init__(
        self,
        network: ConditionalDensity,
        train: Sequence[Term],
        validation: Sequence[Term],
        objective: Objective,
        options: TrainingOptions,
        device: torch.device,
    ) -> None:
        _check(network, train, objective)
        self.network, self.objective, self.options = network, objective, options
        self.terms = [term.to(device) for term in train]
        self.validation = batch_terms([term.to(device) for term in validation]) if validation else None
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=options.learning_rate, weight_decay=options.weight_decay,
            fused=device.type in ("cpu", "cuda"),  # one call instead of ten a parameter
        )
        self.lagged = LaggedWeights([len(term) for term in train]) if objective.weights == "estimated" else None
        self.by_halves = objective.rescale or objective.project
        # One pass over all halves would give the halves of a pair different masks.
        self.paired = self._draws_masks()
        total = sum(len(term) for term in train)
        self.batch_size = _batch_size(options.batch_size, total)
        self.full = batch_terms(self.terms) if self.batch_size >= total else None
        self.history = History(
            n_train=tuple(len(term) for term in train), n_validation=tuple(len(term) for term in validation)
        )

    @torch.no_grad()
    def _draws_masks(self) -> bool:
        """Whether two passes over the same rows in train mode differ."""
        _train_mode(self.network)
        few = self.terms[-1].rows(torch.arange(min(len(self.terms[-1]), 16), device=self.terms[-1].input.device))
        first, again = (self.network.standard_log_prob(few.input, few.fine) for _ in range(2))
        return not torch.equal(torch.nan_to_num(first), torch.nan_to_num(again))

    @property
    def weights(self) -> tuple[float, ...]:
        if self.lagged is not None:
            return self.lagged.current
        fixed = self.objective.weights
        return (1.0,) * len(self.terms) if isinstance(fixed, str) else (*fixed, 1.0)

    def run(self, epochs: Any) -> History:
        start = time.perf_counter()
        best: dict[str, Tensor] | None = None
        history = self.history
        few = [term.rows(torch.arange(min(len(term), _FIRST_ROWS), device=term.input.device)) for term in self.terms]
        if not math.isfinite(self._score(batch_terms(few))):
            raise TrainingError("The loss is not finite before training has begun. Check x for extreme values.")
        for epoch in epochs:
            record = self._train_epoch(epoch)
            record["validation_loss"] = self._score(self.validation) if self.validation is not None else math.nan
            history.epochs.append(record)
            score = record["validation_loss"] if self.validation is not None else record["loss"]
            if self.validation is None:
                history.best_epoch, history.best_loss = epoch, score
            elif score < history.best_loss:
                history.best_epoch, history.best_loss = epoch, score
                best = copy.deepcopy(self.network.state_dict())
            epochs.set_postfix(loss=f"{record['loss']:.3f}", held_out=f"{record['validation_loss']:.3f}", refresh=False)
            if not math.isfinite(record["loss"]):
                history.stopped = "the loss stopped being finite; the best weights before that were kept"
                break
            if self.validation is not None and epoch - history.best_epoch >= self.options.patience:
                history.stopped = f"no better held-out loss for {self.options.patience} epochs"
                break
        else:
            history.stopped = f"all {self.options.epochs} epochs done"
        epochs.close()
        if not math.isfinite(history.best_loss):
            raise TrainingError("Training diverged before there were any weights to keep. Lower the learning rate.")
        if best is not None:
            self.network.load_state_dict(best)
        self.network.eval()
        history.seconds = time.perf_counter() - start
        return history

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        _train_mode(self.network)
        halves_seen: list[Tensor] = []
        combined_seen: list[Combined] = []
        weights = self.weights
        for step, batch in enumerate(self._batches()):
            weights = self.weights
            halves, combined = self._step(batch, weights, record=step == 0 and epoch % _GRADIENT_EVERY == 0)
            halves_seen.append(torch.stack([half.detach().mean() for half in halves]))
            if combined is not None:
                combined_seen.append(combined)
            if self.lagged is not None and self.validation is None:
                self.lagged.update(halves)
        means = torch.stack(halves_seen).mean(0)
        return _record(means, weights, combined_seen)

    def _step(self, batch: Batch, weights: Sequence[float], *, record: bool) -> tuple[list[Tensor], Combined | None]:
        combined = None
        self.optimiser.zero_grad(set_to_none=True)
        if self.by_halves or record:
            halves, gradients = self._gradients(batch)
            combined = combine_gradients(
                gradients, weights, use_rescale=self.objective.rescale, use_project=self.objective.project
            )
            length = combined.gradient.norm()
            self._set_gradient(combined.gradient * (self.options.clip / (length + 1e-6)).clamp(max=1.0))
        else:
            halves = self._losses(batch)
            telescope(halves, weights).backward()
            nn.utils.clip_grad_norm_(self.parameters, self.options.clip)
        self.optimiser.step()
        return halves, combined

    def _losses(self, batch: Batch) -> list[Tensor]:
        if not self.paired:
            losses = -self.network.standard_log_prob(batch.input, batch.condition)
            return list(losses.split(batch.sizes))
        return [loss() for loss in self._paired_losses(batch)]

    def _gradients(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Row losses and the flat gradient of the mean loss, half by half."""
        halves, gradients = [], []
        for loss in self._paired_losses(batch):
            rows = loss()
            parts = torch.autograd.grad(rows.mean(), self.parameters, allow_unused=True)
            gradients.append(torch.cat([
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(self.parameters, parts, strict=True)
            ]))
            halves.append(rows.detach())
        return halves, gradients

    def _paired_losses(self, batch: Batch) -> Iterator[Any]:
        """One function per half; the coarse half runs from the random state of its fine twin, so masks agree."""
        state: Tensor | None = None
        device = batch.input.device
        for index, (input, condition) in enumerate(batch.halves()):
            if self.paired:
                if index > 0 and index % 2 == 0 and state is not None:
                    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
                else:
                    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
            yield lambda i=input, c=condition: -self.network.standard_log_prob(i, c)

    def _set_gradient(self, flat: Tensor) -> None:
        sizes = [p.numel() for p in self.parameters]
        for parameter, part in zip(self.parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    @torch.no_grad()
    def _score(self, batch: Batch) -> float:
        """The telescoped loss of rows in eval mode; held-out rows then tell the next weights."""
        self.network.eval()
        halves = (-self.network.standard_log_prob(batch.input, batch.condition)).split(batch.sizes)
        score = float(telescope(halves, self.weights))
        if self.lagged is not None and batch is self.validation and math.isfinite(score):
            self.lagged.update(halves)
        return score

    def _batches(self) -> Iterator[Batch]:
        if self.full is not None:
            yield self.full
            return
        steps = math.ceil(sum(len(term) for term in self.terms) / self.batch_size)
        orders = [torch.randperm(len(term)).to(term.input.device) for term in self.terms]
        sizes = [min(len(term), max(math.ceil(len(term) / steps), _SMALLEST_BATCH)) for term in self.terms]
        for step in range(steps):
            rows = []
            for term, order, size in zip(self.terms, orders, sizes, strict=True):
                at = torch.arange(step * size, (step + 1) * size, device=order.device) % len(term)
                rows.append(term.rows(order[at]))
            yield batch_terms(rows)


def _batch_size(asked: int | str | None, total: int) -> int:
    if asked is None:
        return total
    return asked if isinstance(asked, int) else min(max(math.ceil(total / 4), 256), 2048)


def _train_mode(network: ConditionalDensity) -> None:
    """Train mode, but for an embedding of which nothing is trained: its batch statistics and masks stay fixed too."""
    network.train()
    parameters = list(network.embedding.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        network.embedding.eval()


def _record(means: Tensor, weights: Sequence[float], combined: Sequence[Combined]) -> dict[str, float]:
    values = means.cpu().tolist()
    record = {"loss": values[0] * weights[0], "fine_0": values[0]}
    for level in range(1, len(weights)):
        fine, coarse = values[2 * level - 1], values[2 * level]
        record["loss"] += weights[level] * fine - weights[level - 1] * coarse
        record[f"fine_{level}"], record[f"coarse_{level}"] = fine, coarse
        record[f"weight_{level - 1}"] = weights[level - 1]
    for name in ("base_norm", "correction_norm", "cosine", "projected"):
        found = [float(getattr(c, name)) for c in combined]
        record[name] = float(np.mean(found)) if found else math.nan
    return record


def _check(network: nn.Module, terms: Sequence[Term], objective: Objective) -> None:
    weights = objective.weights
    if isinstance(weights, str):
        if weights not in ("unit", "estimated"):
            raise ValueError(f'Expected weights "unit", "estimated" or numbers; got "{weights}".')
    elif len(weights) != len(terms) - 1:
        raise ValueError(f"Expected {len(terms) - 1} weights, a_0 .. a_(L-1); got {len(weights)}.")
    if weights == "estimated" and min(len(term) for term in terms) < 2:
        raise ValueError(f"Expected at least 2 training rows a term to estimate weights; got "
                         f'{[len(term) for term in terms]}. Simulate more pairs, or use weights="unit".')
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    if normed and len(terms) > 1:
        raise ValueError("Batch normalisation is not supported in a multilevel loss: the halves of a pair would be "
                         "normalised by different statistics. Use LayerNorm or GroupNorm.")
