r"""Minimising the telescoping loss of one network or of several side by side, with early stopping on held-out pairs."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mlsbi.density.columns import dropouts
from mlsbi.randomness import seeded
from mlsbi.training.checkpoints import Checkpoint, CheckpointError, fingerprint
from mlsbi.training.compiling import Compiling
from mlsbi.training.descent import RECORDED, Descent, Objective, Step
from mlsbi.training.graphs import CapturedStep
from mlsbi.training.history import FewRowsError, History, TrainingError
from mlsbi.training.kept import NONFINITE, PATIENCE, RUNNING, Kept
from mlsbi.training.members import Member, Pooling, Schedule, at_once, groups_of, whole_groups
from mlsbi.training.memory import kept_memory
from mlsbi.training.objective import telescope
from mlsbi.training.options import TrainingOptions
from mlsbi.training.plan import Plan, Rows, stack_rows
from mlsbi.training.probing import Traits, find_traits, is_normed
from mlsbi.training.stack import Stack, refusal
from mlsbi.training.statistics import Statistics
from mlsbi.training.weights import LaggedWeights

__all__ = ["minimise"]

_FIRST_ROWS = 1024  # rows of a term scored before training, to see whether x can be used at all
_SCORED = 4  # steps' worth of rows
_UNREAD = 20  # epochs on a GPU between two looks at what happened there


def minimise(
    members: Sequence[Member],
    *,
    objective: Objective,
    options: TrainingOptions,
    pooled: Pooling = False,
    schedule: Schedule | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
    label: str = "training",
) -> list[History]:
    r"""Trains networks of one architecture in place, on equally many rows each; torch's random state is left as found.

    Args:
        members: Networks, rows and seeds. A member's result does not depend on the others, up to rounding.
        objective: Weights and stabilisers.
        options: Step size, batches, stopping.
        pooled: Whether all members stop at the epoch that is best on average, or those of a group do. Where not all
            can be trained in one go, whole groups are.
        schedule: Trains for so many epochs, under these weights; without held-out rows only.
        checkpoint: Where to keep the state of the training, and to go on from.
        progress: Whether to show a progress bar.
        label: What the bar is called.

    Returns:
        What happened to each member.

    Raises:
        ValueError: If the weights do not fit the terms, or cannot be estimated because a term has one row.
        CheckpointError: If the checkpoint is of another training.
        TrainingError: If the loss is not finite before training, training diverges at once, or a step does not fit
            into the device's memory.
    """
    trained = [parameter for parameter in members[0].network.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("Expected a network with parameters to train; none requires a gradient.")
    device = trained[0].device
    if isinstance(pooled, tuple):
        most = at_once(members[0].train, len(members), options, device)
        parts = whole_groups(groups_of(pooled, len(members)), most)
        if len(parts) > 1:
            found = [minimise([members[place] for place in part], objective=objective, options=options,
                              pooled=tuple(pooled[place] for place in part), schedule=schedule,
                              checkpoint=None if checkpoint is None else checkpoint.part(str(index)),
                              progress=progress, label=label) for index, part in enumerate(parts)]
            told = dict(zip((place for part in parts for place in part),
                            (history for histories in found for history in histories), strict=True))
            return [told[place] for place in range(len(members))]
    with seeded(members[0].seed, device), kept_memory():
        try:
            run = _Run(members, objective, options, pooled=pooled, schedule=schedule, checkpoint=checkpoint,
                       device=device)
        except torch.OutOfMemoryError as error:
            raise TrainingError("The training rows do not fit into the device's memory. Train on the CPU, or fewer "
                                "networks in one go: together=False.") from error
        try:
            return run.train(tqdm(total=run.epochs, desc=label, unit="epoch", disable=not progress, leave=False))
        except torch.OutOfMemoryError as error:
            cause = error.with_traceback(None)  # which would hold what the failed step had made
        finally:
            run.stack.release()
        try:
            raise run.out_of_memory() from cause
        finally:
            run.stack.release()


class _Run:
    """State of one training."""

    def __init__(
        self,
        members: Sequence[Member],
        objective: Objective,
        options: TrainingOptions,
        *,
        pooled: Pooling,
        schedule: Schedule | None,
        checkpoint: Checkpoint | None,
        device: torch.device,
    ) -> None:
        self.members, self.objective, self.options, self.pooled = members, objective, options, pooled
        self.schedule, self.checkpoint, self.device = schedule, checkpoint, device
        self.epochs = options.epochs if schedule is None else schedule.epochs
        first = members[0]
        masks = {name: (layer.features, layer.p) for name, layer in dropouts(first.network).items()}
        self.plan = Plan([[term.to(device) for term in member.train] for member in members],
                         batch_size=options.batch_size, dropouts=masks, seeds=[member.seed for member in members])
        self.held_out = self._held_out()
        # Rows scored at a time: without gradients several times as many fit as in a step.
        self.scored = max(_SCORED * sum(self.plan.sizes), _FIRST_ROWS)
        self.stack = Stack([member.network for member in members])
        self.stack.train()
        _check(members, objective)
        self.notes: list[str] = []
        rows = self.plan.few([min(n, 16) for n in self.plan.n]).halves()[-1]
        one = rows.input[0], rows.condition[0], {name: mask[0] for name, mask in rows.keep.items()}
        traits = find_traits(first.network, *one)
        self.statistics = Statistics([member.network for member in members], traits.moving)
        together = self._goes_together(traits, one)
        self.kept = Kept(self.stack.read(), patience=options.patience, scored=self.held_out is not None, pooled=pooled)
        estimated = objective.weights == "estimated" and (schedule is None or schedule.weights is None)
        self.lagged = LaggedWeights(self.plan.n, members=len(members), device=device) if estimated else None
        if estimated and self.held_out is None:
            self.notes.append("weights were estimated on rows trained on, for none were held out")
        self.compiling = Compiling(asked=self._compile(traits, together=together), device=device)
        self.captures = device.type == "cuda" and not traits.draws and not self.statistics
        self._captured: CapturedStep | None = None
        self.running = list(range(len(members)))  # which members the tensors hold, in this order
        self.histories = [
            History(n_train=self.plan.n, n_validation=tuple(len(term) for term in member.validation))
            for member in members
        ]
        self.finished: dict[int, Tensor] = {}
        self._unread: list[Tensor] = []
        self._constants: dict[Any, Tensor] = {}
        self.epoch = 0
        # Last, for the networks' parameters are parts of its matrix from here on.
        self.descent = Descent(self.stack, objective, options, n=self.plan.n, together=together, draws=traits.draws)

    # What is decided before the loop

    def _held_out(self) -> Rows | None:
        if not self.members[0].validation:
            return None
        blocks = stack_rows([[term.to(self.device) for term in member.validation] for member in self.members])
        return Rows(torch.cat([input for input, _ in blocks], 1), torch.cat([condition for _, condition in blocks], 1),
                    tuple(input.shape[1] for input, _ in blocks), {})

    def _goes_together(self, traits: Traits, rows: tuple[Tensor, Tensor, dict[str, Tensor]]) -> bool:
        count = len(self.members)
        if count == 1 or at_once(self.members[0].train, count, self.options, self.device) < count:
            return False
        if traits.draws:
            reason: str | None = "the network draws random numbers of its own"
        elif traits.moving:
            reason = "training changes buffers of the network"
        else:
            reason = refusal(self.members[0].network, *rows)
        if reason is not None:
            self.notes.append(f"members were evaluated one after the other: {reason}")
        return reason is None

    def _compile(self, traits: Traits, *, together: bool) -> Any:
        asked = self.options.compile
        if asked is False:
            return False
        if traits.draws:
            self.notes.append("not compiled: the network draws random numbers of its own")
            return False
        if len(self.members) > 1 and not together:
            self.notes.append("not compiled: members were evaluated one after the other")
            return False
        return asked

    # The loop

    def train(self, bar: Any) -> list[History]:
        """Trains until every member has stopped, and writes the best parameters into the networks."""
        start = time.perf_counter()
        before = self._resume()
        if not self.running:
            return self._deliver()  # a finished training, with the notes it had
        if self.epoch == 0:
            self._check_start()
        bar.update(self.epoch)
        with bar:
            while self.epoch < self.epochs and self.running:
                self._train_epoch()
                self.epoch += 1
                bar.update()
                if len(self._unread) >= (_UNREAD if self.device.type == "cuda" else 1) or self.epoch == self.epochs:
                    self._read()
                    bar.set_postfix(self._told(), refresh=False)
                    if self.checkpoint is not None and self.checkpoint.due:
                        self._save(before + time.perf_counter() - start)
        seconds = before + time.perf_counter() - start
        self._finish(self.running)
        self.running = []
        compiled = self.compiling.report(self.descent.done)
        notes = (*self.notes, *([] if compiled is None else [compiled]))
        for history in self.histories:
            history.seconds, history.notes = seconds / len(self.members), notes
        if self.checkpoint is not None:
            self._save(seconds)
        return self._deliver()

    def _train_epoch(self) -> None:
        self.stack.train()
        means: list[Tensor] = []
        recorded: list[Tensor] = []
        weights = self._weights()
        for rows in self.plan.epoch():
            weights = self._weights()
            step = self._step(rows, weights)
            halves = step.losses.split(rows.sizes, 1)
            means.append(torch.stack([half.mean(1) for half in halves], 1))
            missing = torch.full_like(means[-1][:, 0], torch.nan)
            recorded.append(torch.stack([step.recorded.get(name, missing).to(missing.dtype) for name in RECORDED], 1))
            if self.lagged is not None and self.held_out is None:
                self.lagged.update(halves)
        mean = torch.stack(means).mean(0)
        loss = telescope(mean.unsqueeze(2).unbind(1), weights)
        score = torch.full_like(loss, torch.nan)
        self.stack.eval()
        if self.held_out is not None:
            halves = self.descent.score(self.held_out, self.scored).split(self.held_out.sizes, 1)
            score = telescope(halves, weights)
            if self.lagged is not None:
                self.lagged.update(halves)
        was = self.kept.state
        better = self.kept.update(self.epoch, loss, score, self.descent.current)
        if self.statistics:
            self.statistics.keep([member for member, kept in zip(self.running, better.tolist(), strict=True) if kept])
        columns = [loss, score, was, self.kept.state, self.kept.epoch, self.kept.loss]
        self._unread.append(torch.cat([torch.stack([column.double() for column in columns], 1), mean.double(),
                                       weights.double(), torch.stack(recorded).mean(0).double()], 1))

    def _step(self, rows: Rows, weights: Tensor) -> Step:
        if self._captured is not None:
            return self._captured(rows, weights)
        if self.compiling.due:
            return self._compile_step(rows, weights)
        seeds = [[int(torch.randint(1 << 62, (1,), generator=order)) for _ in self.plan.n]
                 for order in self.plan.orders] if self.descent.draws else ()
        step: Step = self.compiling.time(lambda: self.descent.step(rows, weights, seeds))
        if self.captures and self.compiling.settled:
            self._capture(rows, weights)
        return step

    def _compile_step(self, rows: Rows, weights: Tensor) -> Step:
        self.compiling.begin()
        self.descent.compile()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about its own parts, which users can do nothing about
                found: Step = self.compiling.time(lambda: self.descent.step(rows, weights))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # all that torch.compile raises is one
            why = " ".join(line.strip() for line in str(error).splitlines()[:2]).rstrip(".")
            if self.options.compile is True:
                raise TrainingError(f"The network's loss cannot be compiled: {why}. Leave compile out, or mend the "
                                    "embedding or density.") from error
            self.compiling.give_up(f"not compiled: {why}")
            self.descent.undo()
            return self.descent.step(rows, weights)
        return found

    def _capture(self, rows: Rows, weights: Tensor) -> None:
        try:
            self._captured = CapturedStep(self.descent, rows, weights)
        except RuntimeError as error:  # running out of memory is one
            self.captures = False
            self.notes.append(f"steps were not replayed as a CUDA graph: {str(error).partition(chr(10))[0]}")

    def _weights(self) -> Tensor:
        """a_0 .. a_L of every member, `(K, L + 1)`."""
        if self.lagged is not None:
            return self.lagged.current.to(self.plan.dtype)
        fixed: tuple[float, ...]
        if self.schedule is not None and self.schedule.weights is not None:
            fixed = (*self.schedule.weights[self.epoch], 1.0)
        elif isinstance(self.objective.weights, str):
            fixed = (1.0,) * len(self.plan.n)
        else:
            fixed = (*self.objective.weights, 1.0)
        return self._constant(fixed)

    def _constant(self, fixed: tuple[float, ...]) -> Tensor:
        key = (fixed, len(self.plan))
        if key not in self._constants:  # a copy to the device would wait for it
            self._constants = {key: torch.tensor([fixed] * len(self.plan), dtype=self.plan.dtype, device=self.device)}
        return self._constants[key]

    def _read(self) -> None:
        """Fetches what the device has recorded since the last time, and lets stopped members go."""
        if not self._unread:
            return
        levels, halves = len(self.plan.n), len(self.plan.sizes)
        block = torch.stack(self._unread).cpu().tolist()
        self._unread = []
        for epoch in block:
            for member, values in zip(self.running, epoch, strict=True):
                loss, score, was, _, best, best_loss = values[:6]
                if was != RUNNING:
                    continue
                history = self.histories[member]
                history.epochs.append(_record(loss, score, values[6: 6 + halves],
                                              values[6 + halves: 6 + halves + levels], values[6 + halves + levels:]))
                history.best_epoch, history.best_loss = int(best), best_loss
        states = [int(values[3]) for values in block[-1]]
        for member, state in zip(self.running, states, strict=True):
            if state == PATIENCE:
                self.histories[member].stopped = f"no better held-out loss for {self.options.patience} epochs"
            elif state == NONFINITE:
                self.histories[member].stopped = (
                    "the loss stopped being finite; the best weights before that were kept")
        stays = [at for at, state in enumerate(states) if state == RUNNING]
        # A graph and a compiled function are of one shape.
        shrinks = self._captured is None and self.compiling.asked is False
        if len(stays) < len(self.running) and (shrinks or not stays):
            self._finish([member for at, member in enumerate(self.running) if at not in stays])
            if stays:
                self._select(stays)
            self.running = [self.running[at] for at in stays]

    def _select(self, stays: Sequence[int]) -> None:
        self.plan.select(stays)
        self.stack = Stack([self.members[self.running[at]].network for at in stays])
        self.descent.select(stays, self.stack)
        self.kept.select(stays)
        if self.lagged is not None:
            self.lagged.select(stays)
        if self.held_out is not None:
            index = torch.tensor(stays, device=self.device)
            self.held_out = Rows(self.held_out.input[index], self.held_out.condition[index], self.held_out.sizes, {})

    def _finish(self, members: Sequence[int]) -> None:
        """Takes the best parameters of members whose training is over out of the tensors."""
        for member in members:
            self.statistics.restore(member)
            self.finished[member] = self._sound(self.running.index(member)).clone()
            if not self.histories[member].stopped:
                self.histories[member].stopped = f"all {self.epochs} epochs done"

    def _sound(self, at: int) -> Tensor:
        """The best parameters; without held-out rows the last ones, or those before where they have no finite loss."""
        best = self.kept.best[at]
        if self.held_out is not None:
            return best
        self.stack.eval()
        rows = self.plan.few(self.plan.n)
        history = self.histories[self.running[at]]
        for flat in (best, self.kept.previous[at]):
            with torch.no_grad():
                parts = zip(rows.input[at].split(self.scored), rows.condition[at].split(self.scored), strict=True)
                if history.best_epoch >= 0 and all(bool(self.stack.one(at, flat, *part, {}).isfinite().all())
                                                   for part in parts):
                    history.best_loss = history.epochs[history.best_epoch]["loss"]
                    return flat
            history.best_epoch -= 1
        history.best_epoch = -1
        return best

    def _deliver(self) -> list[History]:
        lost = []
        for index, (member, history) in enumerate(zip(self.members, self.histories, strict=True)):
            if history.best_epoch < 0 or not math.isfinite(history.best_loss):
                lost.append(index)
                continue
            history.stages = (history.best_epoch,)
            Stack([member.network]).write(self.finished[index][None])
            member.network.eval()
        if lost:
            last = self.histories[lost[0]].epochs
            why = "the held-out loss was never finite" if last and math.isfinite(last[-1]["loss"]) else \
                "training diverged"
            which = "" if len(self.members) == 1 else \
                f" of network {', '.join(str(index + 1) for index in lost)} of {len(self.members)}"
            raise TrainingError(f"There are no weights{which} to keep: {why}. Lower the learning rate, and check that "
                                "the density's log-prob is finite.")
        return self.histories

    def _told(self) -> dict[str, str]:
        """What the progress bar shows: means over members still in training."""
        last = [self.histories[member].epochs[-1] for member in self.running or range(len(self.members))]
        told = {shown: f"{sum(record[name] for record in last) / len(last):.3f}"
                for shown, name in (("loss", "loss"), ("held_out", "validation_loss"))}
        return told if len(self.members) == 1 else {**told, "networks": str(len(self.running))}

    # What can go wrong

    def _check_start(self) -> None:
        self.stack.eval()
        rows = self.plan.few([_FIRST_ROWS] * len(self.plan.n))
        losses = self.descent.score(rows, self.scored)
        bad = int((~losses.isfinite()).sum())
        if bad:
            raise TrainingError(f"The loss is not finite before training has begun: {bad} of {losses.numel()} rows "
                                "have a log-prob that is not finite. Check x for extreme values, and a density of "
                                "your own for its log_prob.")

    def out_of_memory(self) -> TrainingError:
        """An error that says how many rows would fit."""
        self._captured = None
        self.descent.undo()
        asked = size = sum(self.plan.taken)
        networks = f"{len(self.plan)} network{'' if len(self.plan) == 1 else 's'}"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        while size > 1:
            size //= 2
            rows = self.plan.few(self.plan.split(size)[1])
            try:
                self.descent.gradient(rows, self._weights(), [[0] * len(self.plan.n)] * len(self.plan))
            except torch.OutOfMemoryError:
                continue
            return TrainingError(f"The device ran out of memory with {asked} rows of {networks} in a step; {size} "
                                 f"rows fit. Set batch_size={size}.")
        return TrainingError("The device ran out of memory with a single row in a step: the network is too large.")

    # Going on

    def _fingerprint(self) -> str:
        told = (asdict(self.objective), {**asdict(self.options), "together": None, "compile": None}, self.pooled,
                None if self.schedule is None else asdict(self.schedule), [member.seed for member in self.members])
        held = [] if self.held_out is None else [self.held_out.input, self.held_out.condition]
        networks = [tensor for member in self.members for tensor in member.network.state_dict().values()]
        # `repr` has what no tensor shows, such as the probability of dropout.
        return fingerprint([*networks, *(part for block in self.plan.blocks for part in block), *held],
                           *told, re.sub(" at 0x[0-9a-f]+", "", repr(self.members[0].network)))

    def _resume(self) -> float:
        """Goes on from the checkpoint, if there is one; seconds spent before."""
        if self.checkpoint is None:
            return 0.0
        self._identity = self._fingerprint()
        found = self.checkpoint.read(self._identity, self.device)
        if found is None:
            return 0.0
        tensors, told = found
        if self.plan.dropouts and told["running"] and told["device"] != self.device.type:
            raise CheckpointError(f"The checkpoint is of a training on {told['device']}, where the masks of dropout "
                                  f"are drawn otherwise than on {self.device.type}. Go on there, or delete it to "
                                  "train from the start.")
        self.histories = [History.read(saved) for saved in told["histories"]]
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor
        if told["running"]:
            if told["running"] != self.running:
                self._select(told["running"])
            self.descent.load(groups["descent"], told["steps"])
            self.kept.load(groups["kept"])
            if self.lagged is not None:
                self.lagged.load(groups["lagged"])
            self.plan.set_random_state(groups["random"])
        self.descent.done = told["steps"]
        if self.statistics:
            self.statistics.load(groups["statistics"])
        self.running, self.epoch = told["running"], told["epoch"]
        self.finished = {int(name): tensor for name, tensor in groups.get("finished", {}).items()}
        return float(told["seconds"])

    def _save(self, seconds: float) -> None:
        assert self.checkpoint is not None
        groups: dict[str, Mapping[str, Tensor]] = {"finished": {str(at): row for at, row in self.finished.items()}}
        if self.running:
            groups |= {"descent": self.descent.tensors(), "kept": self.kept.tensors()}
            if self.lagged is not None:
                groups["lagged"] = self.lagged.tensors()
            groups["random"] = self.plan.random_state()
        if self.statistics:
            groups["statistics"] = self.statistics.tensors()
        self.checkpoint.write(
            {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()},
            {"fingerprint": self._identity, "device": self.device.type, "epoch": self.epoch,
             "steps": self.descent.done, "running": self.running, "seconds": seconds,
             "histories": [asdict(history) for history in self.histories]},
        )


def _record(
    loss: float, score: float, means: Sequence[float], weights: Sequence[float], recorded: Sequence[float]
) -> dict[str, float]:
    record = {"loss": loss, "fine_0": means[0]}
    for level in range(1, len(weights)):
        record[f"fine_{level}"], record[f"coarse_{level}"] = means[2 * level - 1], means[2 * level]
        record[f"weight_{level - 1}"] = weights[level - 1]
    found = {name: value for name, value in zip(RECORDED, recorded, strict=True) if not math.isnan(value)}
    return {**record, **found, "validation_loss": score}


def _check(members: Sequence[Member], objective: Objective) -> None:
    terms, weights = members[0].train, objective.weights
    if not isinstance(weights, str) and len(weights) != len(terms) - 1:
        raise ValueError(f"Expected {len(terms) - 1} weights, a_0 .. a_(L-1); got {len(weights)}.")
    if weights == "estimated" and min(len(term) for term in terms) < 2:
        raise FewRowsError("Expected at least 2 training rows a term to estimate weights; got "
                           f'{[len(term) for term in terms]}. Simulate more pairs, or use weights="unit".')
    if len(terms) > 1 and is_normed(members[0].network):
        raise ValueError("Batch normalisation is not supported in a multilevel loss: the halves of a pair would be "
                         "normalised by different statistics. Use LayerNorm or GroupNorm.")
