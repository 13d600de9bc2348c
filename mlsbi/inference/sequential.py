r"""Inference for one observation, in rounds that spend runs where its posterior is."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from mlsbi.allocation.integrands import IntegrandLike, resolve_integrand
from mlsbi.allocation.remeasuring import Remeasuring
from mlsbi.data import LevelData, MultilevelData
from mlsbi.density.embeddings import EmbeddingBuilder, resolve_embedding
from mlsbi.density.registry import DensityBuilder, resolve_builder
from mlsbi.density.standardise import Transform
from mlsbi.inference.active import ActiveProposal
from mlsbi.inference.budgeting import FEWEST_TRAINED, Bought, Budget, Budgeting, FixedRows, Purchase, check_parts
from mlsbi.inference.loading import load
from mlsbi.inference.npe import NPE
from mlsbi.inference.observations import read_observation
from mlsbi.inference.posteriors import DirectPosterior
from mlsbi.inference.surprise import outside_all
from mlsbi.inference.truncated import (
    LEAST_ACCEPTANCE,
    TruncatedPrior,
    TruncationError,
    density_region,
    truncate_prior,
)
from mlsbi.levels import LevelStack, campaign_cost
from mlsbi.randomness import check_seed, child_seed
from mlsbi.simulation.campaign import simulate, simulate_joint, simulate_level
from mlsbi.simulation.opening import accept_code as accept_code_of
from mlsbi.simulation.running import RunOptions
from mlsbi.simulation.scheduling import OnFailure
from mlsbi.simulation.sources import strip_addresses
from mlsbi.store.store import open_store
from mlsbi.strategies.fitting import check_strategy
from mlsbi.strategies.registry import Strategy, resolve_strategy, strategy_to_config
from mlsbi.training.options import TrainingOptions

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["InferenceRound", "SequentialInference", "infer_sequentially"]

_ROUND_KEY = 1 << 21  # seeds of each round
_SIMULATING, _PLANNING, _TRAINING, _REGION, _TRUNCATING, _DRAWING = range(6)  # what they are for
_SHAPE_STREAM = (1 << 40) + 7
_DRAWS = 4096  # posterior draws that leakage and moments are measured on
_LEAKY = 0.05  # share of a posterior outside, from which it is warned of
_FEW = 10.0  # candidates that count, below which resampled draws are far from the truncated prior


@dataclass(frozen=True)
class InferenceRound:
    r"""One round of sequential inference.

    Args:
        share: Share of the prior that theta were drawn from: 1 in the first round.
        resampled: Whether they were drawn by sampling-importance resampling.
        effective: As how many equally weighted draws the 256 count that each of those was chosen from.
        n: New rows of each level.
        inside: Rows of each level, of this round and earlier ones, inside what theta were drawn from.
        trained: Rows of each level that were trained on.
        variances: Of the corrections that decided what to buy; `None` where the user did.
        spent: Cost of everything up to its end.
        leakage: Share of the round's posterior outside what its theta were drawn from.
        mean: Mean of the round's posterior.
        sd: Its standard deviation.
        seconds: Time that training took.
        notes: What needs saying.
    """

    share: float
    resampled: bool
    effective: float | None
    n: tuple[int, ...]
    inside: tuple[int, ...]
    trained: tuple[int, ...]
    variances: tuple[float, ...] | None
    spent: float
    leakage: float
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class SequentialInference:
    r"""What sequential inference found.

    Args:
        estimator: The last round's; its density is the posterior for observations near the one asked for only.
        x: The observation, shape `(1, ...)`.
        data: All rows of all rounds.
        priors: What theta of each round were drawn from: the prior, then truncated priors.
        posteriors: The posterior after each round.
        rounds: What each round did.
        names: Level names.
        unit: Unit of costs: `"declared"` or `"seconds"`.
    """

    estimator: NPE
    x: Tensor
    data: MultilevelData
    priors: tuple[Distribution, ...]
    posteriors: tuple[DirectPosterior, ...]
    rounds: tuple[InferenceRound, ...]
    names: tuple[str, ...]
    unit: str

    @property
    def posterior(self) -> DirectPosterior:
        """The last round's posterior, with the observation as its default."""
        return self.posteriors[-1]

    @property
    def spent(self) -> float:
        """Cost of all rounds."""
        return self.rounds[-1].spent

    @property
    def inside(self) -> MultilevelData:
        """Rows of all rounds inside what the last round drew theta from, `priors[-1]`.

        A likelihood can be learned from them too: `NLE(found.priors[-1], ...).fit(found.inside).posterior(found.x)`,
        whose evidence is that of the truncated prior. With `keep="all"` or `active` levels may have other laws in it
        than one another: then learn by a strategy that takes no sum over levels.
        """
        return _inside(self.data, self.priors[-1])

    def truncation_error(self, theta: Tensor) -> tuple[float, ...]:
        r"""Share of draws from the exact posterior `(n, D)` outside what theta of each round were drawn from.

        Lost mass stays lost: later rounds draw nothing there.
        """
        return tuple(float((~prior.holds(theta)).double().mean()) if isinstance(prior, TruncatedPrior) else 0.0
                     for prior in self.priors)

    def to_frame(self) -> pd.DataFrame:
        """One row per round and level: `round`, `level`, `share of prior`, `n`, `inside`, `trained on`, `spent`..."""
        import pandas as pd  # slow to import, and little else here needs it

        return pd.DataFrame([
            {"round": number, "level": name, "share of prior": done.share, "n": done.n[i], "inside": done.inside[i],
             "trained on": done.trained[i],
             "variance of correction": math.nan if done.variances is None else done.variances[i],
             "spent": done.spent, "leakage": done.leakage}
            for number, done in enumerate(self.rounds, start=1) for i, name in enumerate(self.names)
        ])

    def __str__(self) -> str:
        unit = "seconds" if self.unit == "seconds" else "cost units"
        lines = [f"Sequential inference: {self.spent:.6g} {unit} spent in {len(self.rounds)} rounds"]
        for number, done in enumerate(self.rounds, start=1):
            levels = ", ".join(f"{name} {new:,} new, {inside:,} inside" for name, new, inside in
                               zip(self.names, done.n, done.inside, strict=True))
            lines.append(f"round {number}: {done.share:.3g} of the prior; {levels}; leakage {done.leakage:.2g}; "
                         f"{done.spent:.6g} spent")
            lines += [f"  {note}" for note in done.notes]
        return "\n".join(lines)


def infer_sequentially(
    stack: LevelStack,
    x_o: Any,
    *,
    seed: int,
    rounds: int = 3,
    budget: float | None = None,
    n: Sequence[int] | Sequence[Sequence[int]] | None = None,
    strategy: str | Strategy | Sequence[str | Strategy] = "auto",
    ensemble: int | None = None,
    keep: Literal["inside", "all"] = "inside",
    region: Literal["union", "mixture"] = "union",
    outside: float = 1e-6,
    active: float = 0.0,
    go_on: bool = False,
    density: str | DensityBuilder = "nsf",
    embedding: str | nn.Module | EmbeddingBuilder | None = None,
    x_transform: Transform = "none",
    training: TrainingOptions | None = None,
    pilot_rows: int = 64,
    integrand: IntegrandLike = "loss",
    folder: str | os.PathLike[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    executor: Any = None,
    workers: int = 1,
    batch_size: int | None = None,
    on_failure: OnFailure = "raise",
    retry_failed: bool = False,
    accept_code: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> SequentialInference:
    r"""The posterior of one observation, in rounds; from the second on theta come from a truncated prior.

    After each round the prior is cut to where the density q(theta | x_o) of any network is above that of all but a tiny
    share of its own draws. Inside, the posterior is what the prior's would be, so that the plain loss needs no
    correction (TSNPE). Regions are nested: rows of earlier rounds that lie inside have the law of new ones, at every
    level. Those, and no others, are trained on, which keeps the sum over levels telescoping, and they count toward what
    a round buys: each round divides its part of the budget by the variances of the corrections inside the truncated
    prior.

    The published methods are this function with other options: TSNPE has a stack of the finest level alone; MF-TSNPE
    `strategy=("transfer", "high", "high")`, `go_on=True`, `keep="all"`, `region="mixture"` and all runs of the cheap
    level in the first round, such as `n=[(10_000, 10), (0, 10), (0, 10)]`; MF-TSNPE-AF `active=0.2` and `ensemble=5`
    beside that.

    With a `folder` every simulation and every round's networks are kept, and the same call goes on where it stopped.
    The first round does not depend on the observation: others asked for with the same folder share it.

    Args:
        stack: Prior, noise and levels.
        x_o: The observation, shape `(...)` or `(1, ...)`, in the finest level's units.
        seed: Seed of everything random. The first round's rows are those that `pilot` and `simulate` have with it.
        rounds: Rounds; 1 is inference without truncation.
        budget: Total cost in the unit of the stack's costs, in seconds where it declares none; a pilot in the first
            round and the rows inside later divide it over levels.
        n: In its place, rows of each level in all, shared out evenly over rounds; or of every round, `(rounds, L + 1)`,
            where later rounds may have 0 of all levels but the finest.
        strategy: How networks are trained, or one for each round.
        ensemble: Networks of each round; the strategy's usual number when left out.
        keep: `"inside"` trains each round on the rows inside its truncated prior; `"all"` on all rows so far, as
            published, which biases a multilevel sum whose levels were not drawn in equal parts. Then regions are not
            nested: what one round leaves out a later one may find again.
        region: `"union"` cuts to where any network of the ensemble has its mass, so that one that is too sure of
            itself loses nothing that another one sees; `"mixture"` to where all of them together have theirs, as
            published, which is smaller.
        outside: Share of a network's, or of the mixture's, draws outside its region. It is found from 30 000 of them,
            of which the lowest density is the edge where the share is less than one of these.
        active: Share of a later round's theta at which the ensemble disagrees most, out of 10 000 prior draws. They
            do not follow the prior; no correction is made, as published.
        go_on: Whether the networks of later rounds go on from those of the round before; where strategies mix others,
            they cannot.
        density: As in `NPE`.
        embedding: As in `NPE`.
        x_transform: As in `NPE`.
        training: As in `NPE`.
        pilot_rows: Joint rows of the first round's pilot, where there is a budget.
        integrand: What variances are of, as in `pilot`.
        folder: Where everything is kept, but for what is in `store`.
        store: Where the first round's simulations are kept: the store of a pilot or campaign with the same seed, of
            which no row is run again. A part of `folder` when left out.
        executor: As in `simulate`.
        workers: As in `simulate`.
        batch_size: As in `simulate`.
        on_failure: As in `simulate`; with a budget rows are not drawn anew beyond the pilot, and a later round buys
            others.
        retry_failed: As in `simulate`. Networks of rounds that others followed stay as they were: these keep their
            truncated priors and plans, and train on the mended rows too.
        accept_code: Whether rows in the folder and store that other code of the stack made are taken for its own; see
            `mlsbi.accept_code`.
        device: Where networks are trained.
        progress: Whether to show progress bars.

    Returns:
        The posterior, and what each round did.

    Raises:
        ValueError: If the observation does not have the simulators' shape or is not finite (after one run of the
            cheapest level), budget and rounds do not fit each other, options contradict each other, a strategy cannot
            use such data, a round would leave a level without rows to train on, or the folder holds another inference.
        SimulationError: As `simulate`.
        TrainingError: If a round gives no network that can be used.
        TruncationError: If rounds contradict each other; `.found` has the rounds before.

    References:
        | Truncated proposals for scalable and hassle-free simulation-based inference (Deistler et al., 2022)
        | https://arxiv.org/abs/2210.04815
        | Multifidelity simulation-based inference for computationally expensive simulators (Krouglova et al., 2025)
        | https://arxiv.org/abs/2502.08416

    Example:
        >>> from mlsbi import TrainingOptions, tasks
        >>> task = tasks.get("ou2")
        >>> theta, x = task.test(1, seed=7)
        >>> found = infer_sequentially(task.stack, x[0], seed=0, rounds=2, n=(400, 20), strategy="multilevel",
        ...                            density="mdn", training=TrainingOptions(epochs=5), progress=False)
        >>> [done.n for done in found.rounds], found.posterior.sample((3,), seed=1).shape
        ([(200, 10), (200, 10)], torch.Size([3, 2]))
    """
    seed = check_seed(seed)
    strategies = _strategies(strategy, rounds)
    _check_options(rounds, budget, n, keep, region, outside, active, strategies, ensemble)
    if go_on and any(getattr(each, "mixes", False) for each in strategies):
        raise ValueError("Expected strategies that mix no others beside go_on=True, which cannot go on from others'.")
    running = {"executor": executor, "workers": workers, "batch_size": batch_size, "on_failure": on_failure,
               "retry_failed": retry_failed, "progress": progress}
    builder, reads = resolve_builder(density), resolve_embedding(embedding)
    budgeting: Budgeting
    if budget is not None:
        networks = {"density": builder, "embedding": reads, "x_transform": x_transform, "device": device}
        remeasuring = Remeasuring(stack.prior, resolve_integrand(integrand), "npe", builder, reads, x_transform, device,
                                  progress)
        budgeting = Budget(budget, rounds, pilot_rows, {"integrand": integrand, **networks}, remeasuring)
        check_parts(stack, budget, rounds, pilot_rows)
    else:
        assert n is not None
        budgeting = FixedRows.read(n, rounds, len(stack))

    def estimator(number: int) -> NPE:
        return NPE(stack.prior, strategy=strategies[number - 1], density=builder, embedding=reads,
                   x_transform=x_transform, training=training, device=device,
                   seed=child_seed(seed, _ROUND_KEY, number, _TRAINING))

    shape = _output_shape(stack, seed, running)
    observed = read_observation(x_o, shape)
    for number in range(1, rounds + 1):
        check_strategy(strategies[number - 1], len(stack), shape, options=estimator(number).training)
    asked = {
        "seed": seed, "rounds": int(rounds), "budget": budget,
        "n": budgeting.n if isinstance(budgeting, FixedRows) else None,
        "store": None if store is None or folder is None else os.path.relpath(store, folder),
        "keep": keep, "region": region, "outside": outside, "active": active, "go_on": go_on, "ensemble": ensemble,
        "pilot_rows": int(pilot_rows),
        "strategies": [strategy_to_config(each) for each in strategies],
        **{name: strip_addresses(repr(value)) for name, value in
           (("density", builder), ("embedding", reads), ("x_transform", x_transform), ("integrand", integrand),
            ("training", estimator(1).training))},
    }
    kept = None if folder is None else _Folder.open(Path(folder), asked, observed)
    state = _State(stack, observed, seed, keep, region, outside, active, go_on, budgeting, running, estimator, ensemble,
                   kept, None if store is None else Path(store), progress=progress, accept_code=accept_code)
    for number in range(1, rounds + 1):
        try:
            state = state.after_round(number)
        except TruncationError as error:
            error.found = state.found() if state.done else None
            raise
    return state.found()


@dataclass(frozen=True)
class _State:
    """An inference after some rounds."""

    stack: LevelStack
    x: Tensor
    seed: int
    keep: str
    region: str
    outside: float
    active: float
    go_on: bool
    budgeting: Budgeting
    running: dict[str, Any]
    new_estimator: Callable[[int], NPE]
    ensemble: int | None
    folder: _Folder | None
    store: Path | None
    progress: bool
    accept_code: bool
    everything: MultilevelData | None = None
    priors: tuple[Distribution, ...] = ()
    estimators: tuple[NPE, ...] = ()
    posteriors: tuple[DirectPosterior, ...] = ()
    done: tuple[InferenceRound, ...] = ()

    @property
    def data(self) -> MultilevelData:
        """All rows so far."""
        assert self.everything is not None
        return self.everything

    def found(self) -> SequentialInference:
        """What the rounds so far have found."""
        return SequentialInference(
            self.estimators[-1], self.x, self.data, self.priors, self.posteriors, self.done, self.stack.names,
            "seconds" if self.stack.costs is None else "declared",
        )

    def after_round(self, number: int) -> _State:
        """The state after one more round."""
        decided = None if self.folder is None else self.folder.decided(number)
        if number == 1:
            prior: Distribution = self.stack.prior
            purchase, everything, spent, notes = self._begin(decided)
            new = everything
        else:
            prior = self._next_prior(number, decided)
            purchase, new, notes = self._buy(number, prior, decided)
            everything, spent = _joined(self.data, new), self.done[-1].spent + _cost(self.stack, new)
        inside = _inside(everything, prior)
        trained = inside if self.keep == "inside" else everything
        self._check_rows(number, trained.n)
        began = time.perf_counter()
        estimator = self._fit(number, trained, prior)
        seconds = time.perf_counter() - began
        posterior = DirectPosterior(estimator.networks, self.stack.prior, self.x)
        draws = posterior.sample((_DRAWS,), seed=self._seed(number, _DRAWING))
        truncated = prior if isinstance(prior, TruncatedPrior) else None
        leakage = 0.0 if truncated is None else float((~truncated.holds(draws)).double().mean())
        if leakage > _LEAKY:
            notes = (*notes, f"{leakage:.0%} of the posterior lie outside what its theta were drawn from, where "
                             "nothing was learned: the rounds before may have left out some of the exact one")
            warnings.warn(f"Round {number}: {notes[-1]}.", stacklevel=3)
        record = InferenceRound(
            share=1.0 if truncated is None else truncated.share,
            resampled=truncated is not None and truncated.resampled,
            effective=None if truncated is None else truncated.effective,
            n=new.n, inside=inside.n, trained=trained.n, variances=purchase.variances, spent=spent, leakage=leakage,
            mean=tuple(draws.mean(0).tolist()), sd=tuple(draws.std(0).tolist()), seconds=seconds,
            notes=(*purchase.notes, *notes),
        )
        return replace(self, everything=everything, priors=(*self.priors, prior), done=(*self.done, record),
                       estimators=(*self.estimators, estimator), posteriors=(*self.posteriors, posterior))

    def _seed(self, number: int, purpose: int) -> int:
        return child_seed(self.seed, _ROUND_KEY, number, purpose)

    def _options(self, number: int, stack: LevelStack, *, pilot: bool = False) -> dict[str, Any]:
        """How a round's rows are run and where they are kept."""
        store = self.store if number == 1 else None
        if store is None and self.folder is not None:
            store = self.folder.part(number) / "store"
        if store is not None and self.accept_code and (store / "store.json").is_file():
            accept_code_of(store, stack)
        asked = self.running["on_failure"]
        return {**self.running, "store": store, "on_failure": asked if pilot else self.budgeting.on_failure(asked),
                "retry_failed": self.running["retry_failed"] and store is not None}

    def _begin(self, decided: dict[str, Any] | None) -> tuple[Purchase, MultilevelData, float, tuple[str, ...]]:
        """The first round's rows, what they cost, and what is to be said of the observation."""
        seed = self.seed
        if self.store is not None and decided is None:
            _check_seed_of(self.store, seed)
        report = self.budgeting.pilot(self.stack, seed, self._options(1, self.stack, pilot=True))
        notes: tuple[str, ...] = ()
        if report is not None:  # before the rest is paid for
            notes = self._look({name: torch.cat([report.outputs[level], report.data.levels[level].fine]) for level, name
                                in enumerate(self.stack.names)})
        purchase = self.budgeting.first(report) if decided is None else _purchase(decided)
        if self.folder is not None and decided is None:
            self.folder.decide(1, {"purchase": asdict(purchase)})
        data = simulate(self.stack, purchase.n, seed=seed, reuse=None if report is None else report.data,
                        **self._options(1, self.stack))
        if report is None:
            notes = self._look({name: level.fine for name, level in zip(self.stack.names, data.levels, strict=True)})
            return purchase, data, _cost(self.stack, data), notes
        spent = _cost(self.stack, data, after=report.data) + (report.spent if self.stack.costs is not None else 0.0)
        return purchase, data, spent, notes

    def _look(self, outputs: dict[str, Tensor]) -> tuple[str, ...]:
        """Warns of an observation that no level produces."""
        found = outside_all(self.x, outputs)
        if found is None:
            return ()
        warnings.warn(found, stacklevel=5)
        return (found,)

    def _next_prior(self, number: int, decided: dict[str, Any] | None) -> TruncatedPrior:
        """What theta of a later round are drawn from, but for those chosen actively."""
        nested = self.keep == "inside"
        if decided is not None:
            posteriors = self.posteriors if nested else self.posteriors[-1:]
            return TruncatedPrior.from_settings(self.stack.prior, posteriors, decided["prior"])
        region = density_region(self.posteriors[-1], union=self.region == "union", outside=self.outside,
                                seed=self._seed(number, _REGION))
        last = self.priors[-1]
        regions = (*last.regions, region) if isinstance(last, TruncatedPrior) and nested else (region,)
        truncated = truncate_prior(self.stack.prior, regions, seed=self._seed(number, _TRUNCATING))
        if truncated.resampled:
            warnings.warn(_resampled(truncated), stacklevel=5)
        return truncated

    def _buy(
        self, number: int, prior: TruncatedPrior, decided: dict[str, Any] | None
    ) -> tuple[Purchase, MultilevelData, tuple[str, ...]]:
        """A later round's new rows."""
        have = _inside(self.data, prior) if self.keep == "inside" else self.data
        if decided is None:
            tries = tuple((rows + lost) / rows if rows else 1.0
                          for rows, lost in zip(self.data.n, self.data.failures, strict=True))
            bought = Bought(_inside(self.data, prior), self.done[-1].spent, _run_costs(self.stack, self.data), tries,
                            self.done[-1].variances)
            purchase = self.budgeting.more(self.stack, number, bought, self._seed(number, _PLANNING))
            self._check_rows(number, tuple(a + b for a, b in zip(have.n, purchase.n, strict=True)))
            if self.folder is not None:
                self.folder.decide(number, {"prior": prior.settings(), "purchase": asdict(purchase)})
        else:
            purchase = _purchase(decided)
        proposal = ActiveProposal(prior, self.posteriors[-1], self.active) if self.active else prior
        stack = replace(self.stack, prior=proposal)
        new = _rows(stack, purchase.n, self._seed(number, _SIMULATING), RunOptions(**self._options(number, stack)),
                    like=self.data)
        return purchase, new, (_resampled(prior),) if prior.resampled else ()

    def _check_rows(self, number: int, rows: Sequence[int]) -> None:
        """Raises a `ValueError` if a round cannot be trained."""
        if min(rows) >= FEWEST_TRAINED:
            return
        told = ", ".join(f"{count} of '{name}'" for name, count in zip(self.stack.names, rows, strict=True))
        inside = ' inside the truncated prior; keep="all" trains on the others too' if self.keep == "inside" else ""
        raise ValueError(f"Round {number} would train on {told}{inside}. Every level needs {FEWEST_TRAINED}: ask for "
                         "more rows or a larger budget, or fewer rounds. What was simulated is kept in the folder, if "
                         "there is one.")

    def _fit(self, number: int, data: MultilevelData, prior: Distribution) -> NPE:
        """Trains a round's networks, or reads those that were trained on the same rows, or that a round followed."""
        estimator = self.new_estimator(number)
        part = None if self.folder is None else self.folder.part(number)
        if part is not None and (part / "model" / "model.json").is_file() and self.folder is not None \
                and (self.folder.trained_on(number) == _digest(data) or self.folder.is_followed(number)):
            loaded = load(part / "model", self.stack.prior, density=estimator.builder, embedding=estimator.embedding,
                          device=estimator.device)
            assert isinstance(loaded, NPE)
            return loaded
        start = self.estimators[-1] if self.go_on and self.estimators else None
        estimator.fit(data, self.ensemble, proposal=prior, start=start, progress=self.progress,
                      checkpoint=None if part is None else part / "training" / _digest(data)[:16])
        if part is not None and self.folder is not None:
            estimator.save(part / "model")
            self.folder.note_trained(number, _digest(data))
            shutil.rmtree(part / "training", ignore_errors=True)
        return estimator


@dataclass(frozen=True)
class _Folder:
    """Where inferences are kept: what they were asked with, the first round, and the later ones of each observation."""

    path: Path
    own: Path

    @classmethod
    def open(cls, path: Path, asked: dict[str, Any], x: Tensor) -> _Folder:
        """Makes the folder, or goes on in it.

        Raises:
            ValueError: If it holds another inference.
        """
        file = path / "inference.json"
        text = json.dumps(asked, indent=1, default=list)
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = [key for key, value in json.loads(text).items() if before.get(key) != value]
            if changed:
                raise ValueError(f"{path} holds an inference with other settings ({', '.join(changed)}). Give another "
                                 "folder, or call it again as it was.")
        else:
            path.mkdir(parents=True, exist_ok=True)
            _write(file, text)
        own = path / f"observation-{hashlib.sha256(x.double().numpy().tobytes()).hexdigest()[:12]}"
        own.mkdir(exist_ok=True)
        _write(own / "x_o.json", json.dumps(x[0].tolist()))
        return cls(path, own)

    def part(self, number: int) -> Path:
        """Folder of a round."""
        return (self.path if number == 1 else self.own) / f"round-{number}"

    def decided(self, number: int) -> dict[str, Any] | None:
        """What was decided about a round when it began."""
        file = self.part(number) / "round.json"
        found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        return found

    def decide(self, number: int, content: dict[str, Any]) -> None:
        """Keeps what was decided, so that going on changes nothing of it."""
        self.part(number).mkdir(parents=True, exist_ok=True)
        _write(self.part(number) / "round.json", json.dumps(content, indent=1))

    def is_followed(self, number: int) -> bool:
        """Whether a later round, of any observation after the first, was decided by this one's networks."""
        if number == 1:
            return any(self.path.glob("observation-*/round-2/round.json"))
        return (self.part(number + 1) / "round.json").is_file()

    def trained_on(self, number: int) -> str | None:
        """Digest of the rows that a round's networks were trained on."""
        file = self.part(number) / "trained.json"
        return json.loads(file.read_text(encoding="utf-8"))["data"] if file.is_file() else None

    def note_trained(self, number: int, digest: str) -> None:
        """Says what the saved networks of a round were trained on."""
        _write(self.part(number) / "trained.json", json.dumps({"data": digest}))


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _strategies(strategy: str | Strategy | Sequence[str | Strategy], rounds: int) -> list[Strategy]:
    """A strategy for each round."""
    several: list[Any] = list(strategy) if isinstance(strategy, (list, tuple)) else [strategy] * rounds
    if len(several) != rounds:
        raise ValueError(f"Expected one strategy, or one for each of {rounds} rounds; got {len(several)}.")
    return [resolve_strategy(each) for each in several]


def _check_options(
    rounds: int, budget: float | None, n: Any, keep: str, region: str, outside: float, active: float,
    strategies: Sequence[Strategy], ensemble: int | None,
) -> None:  # fmt: skip
    if isinstance(rounds, bool) or not isinstance(rounds, (int, np.integer)) or rounds < 1:
        raise ValueError(f"Expected rounds to be a whole number of at least 1; got {rounds!r}.")
    if (budget is None) == (n is None):
        raise ValueError("Expected a budget or n, rows of each level; got "
                         f"{'neither' if budget is None else 'both'}.")
    if ensemble is not None and ensemble < 1:
        raise ValueError(f"Expected an ensemble of at least 1; got {ensemble}.")
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"Expected a positive, finite number as budget; got {budget!r}.")
    if keep not in ("inside", "all"):
        raise ValueError(f'Expected keep="inside" or keep="all"; got {keep!r}.')
    if region not in ("union", "mixture"):
        raise ValueError(f'Expected region="union" or region="mixture"; got {region!r}.')
    if not 0 < outside < 1:
        raise ValueError(f"Expected a share between 0 and 1 as outside; got {outside!r}.")
    if not 0 <= active < 1:
        raise ValueError(f"Expected a share of at least 0 and below 1 as active; got {active!r}.")
    if not active:
        return
    if keep == "inside" or budget is not None:
        raise ValueError('Expected keep="all" and n beside active=: rows chosen where networks disagree do not follow '
                         "the truncated prior, so that levels would not have one law.")
    members = [getattr(each, "members", 1) if ensemble is None else ensemble for each in strategies[:-1]]
    if min(members, default=2) < 2:
        raise ValueError("Expected an ensemble of at least 2 beside active=: one network cannot disagree.")


def _rows(stack: LevelStack, n: Sequence[int], seed: int, options: RunOptions, *, like: MultilevelData
          ) -> MultilevelData:  # fmt: skip
    """New rows of some levels, those of the finest first."""
    levels: list[LevelData] = []
    runs, seconds, failures = [0] * len(stack), [0.0] * len(stack), [0] * len(stack)
    for level in reversed(range(len(stack))):
        if n[level] < 1:
            levels.append(like.levels[level].rows(slice(0)))
            continue
        places = range(max(level - 1, 0), level + 1)
        joint = simulate_joint(stack, n[level], seed=seed, stream=level, levels=slice(places[0], level + 1),
                               options=options)
        levels.append(LevelData(joint.theta, joint.outputs[-1], joint.outputs[0] if level else None))
        failures[level] = joint.left_out
        for place, number, took in zip(places, joint.runs, joint.seconds, strict=True):
            runs[place] += number
            seconds[place] += took
    return MultilevelData(tuple(levels[::-1]), stack.names, tuple(failures), tuple(runs), tuple(seconds))


def _joined(first: MultilevelData, second: MultilevelData) -> MultilevelData:
    """The rows of both, and what both cost."""
    levels = tuple(one.followed_by(other) for one, other in zip(first.levels, second.levels, strict=True))
    runs, failures = (tuple(a + b for a, b in zip(getattr(first, name), getattr(second, name), strict=True))
                      for name in ("runs", "failures"))
    seconds = tuple(a + b for a, b in zip(first.seconds or (), second.seconds or (), strict=True))
    return MultilevelData(levels, first.names, failures, runs, seconds)


def _inside(data: MultilevelData, prior: Distribution) -> MultilevelData:
    """The rows that lie in a truncated prior; all of them in another."""
    if not isinstance(prior, TruncatedPrior):
        return data
    return replace(data, levels=tuple(level.rows(prior.holds(level.theta)) for level in data.levels))


def _cost(stack: LevelStack, data: MultilevelData, after: MultilevelData | None = None) -> float:
    """What rows cost, failed ones included; of declared costs only what was run after a pilot's."""
    if stack.costs is None or stack.row_costs is None:
        return float(sum(data.seconds or ()))
    pairs, runs = ([rows + lost for rows, lost in zip(data.n, data.failures, strict=True)], list(data.runs))
    if after is not None:
        pairs = [all_ - own - lost for all_, own, lost in zip(pairs, after.n, after.failures, strict=True)]
        runs = [all_ - own for all_, own in zip(runs, after.runs, strict=True)]
    return campaign_cost(stack.costs, stack.row_costs, runs=runs, pairs=pairs)


def _purchase(decided: dict[str, Any]) -> Purchase:
    """A purchase that was kept."""
    found = decided["purchase"]
    variances = found["variances"]
    return Purchase(tuple(found["n"]), None if variances is None else tuple(variances), tuple(found["notes"]))


def _output_shape(stack: LevelStack, seed: int, running: dict[str, Any]) -> tuple[int, ...]:
    """Shape of one output, by one run of the cheapest level that does not fail."""
    options = RunOptions(**{**running, "on_failure": "redraw", "retry_failed": False, "progress": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a failed row, which another takes the place of
        return tuple(simulate_level(stack, 0, 1, seed=seed, stream=_SHAPE_STREAM, options=options)[1].shape[1:])


def _run_costs(stack: LevelStack, data: MultilevelData) -> tuple[float, ...]:
    """Cost of one run of each level, declared or measured."""
    if stack.costs is not None:
        return stack.costs
    return tuple(seconds / max(runs, 1) for seconds, runs in zip(data.seconds or (), data.runs, strict=True))


def _check_seed_of(path: Path, seed: int) -> None:
    """Warns of a store whose rows are of no use."""
    seeds = {stream.seed for stream in open_store(path).streams} if (path / "store.json").is_file() else set()
    if seeds and seed not in seeds:
        warnings.warn(f"No row in {path} is of seed {seed}, as the first round's are; there are rows of "
                      f"{', '.join(map(str, sorted(seeds)))}. All of the first round is run.", stacklevel=6)


def _resampled(prior: TruncatedPrior) -> str:
    few = " So few make them narrower than the truncated prior." if (prior.effective or 0) < _FEW else ""
    return (f"Of draws proposed for the truncated prior, which holds {prior.share:.2g} of the prior, less than "
            f"{LEAST_ACCEPTANCE:g} lie inside: its draws are posterior draws, resampled by their weights, each out of "
            f"256 that count as {prior.effective or 0:.1f} equally weighted ones.{few}")


def _digest(data: MultilevelData) -> str:
    found = hashlib.sha256()
    for level in data.levels:
        for tensor in (level.theta, level.fine, level.coarse):
            if tensor is not None:
                found.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
