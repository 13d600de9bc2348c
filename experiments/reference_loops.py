r"""What training speed is measured against: the published multilevel loop on plain nflows, and the `sbi` toolbox."""

from __future__ import annotations

import importlib.util
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import CompositeTransform, LULinear, PiecewiseRationalQuadraticCouplingTransform
from nflows.utils import create_alternating_binary_mask
from torch import Tensor, nn
from torch.distributions import Distribution

from mlsbi import NSF
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.randomness import seeded

__all__ = ["Pass", "PlainLoop", "plain_flow", "sbi_builder", "sbi_epoch_seconds", "sbi_installed"]

_CLIP = 5.0  # largest gradient norm, in both toolboxes
_PREFIX = "density.flow."  # where a ConditionalDensity keeps its nflows flow


def plain_flow(density: NSF, dim: int, condition_dim: int) -> Flow:
    """The flow that `density` describes, made of the layers of nflows alone."""

    def network(inputs: int, outputs: int) -> ResidualNet:
        return ResidualNet(
            inputs, outputs, hidden_features=density.hidden, context_features=condition_dim,
            num_blocks=density.blocks, dropout_probability=density.dropout,
        )

    layers: list[nn.Module] = []
    for index in range(density.transforms):
        mask = create_alternating_binary_mask(dim, even=index % 2 == 0) if dim > 1 else torch.ones(1)
        layers.append(PiecewiseRationalQuadraticCouplingTransform(
            mask, network, num_bins=density.bins, tails="linear", tail_bound=density.tail_bound
        ))
        layers.append(LULinear(dim))
    return Flow(CompositeTransform(layers), StandardNormal([dim]))


@dataclass(frozen=True)
class Pass:
    r"""Rows that go through the network in one forward and one backward pass.

    Args:
        input: Standardised inputs of its halves, one after another, shape `(n, dim)`.
        condition: Their standardised conditions, shape `(n, condition_dim)`.
        sizes: Rows of each half.
        signs: Sign of each half's mean loss in the telescoping sum.
    """

    input: Tensor
    condition: Tensor
    sizes: tuple[int, ...]
    signs: tuple[float, ...]


class PlainLoop:
    r"""The published multilevel loop with unit weights, written on nflows: eager, a forward and a backward per term.

    A step clears the gradients, adds up those of all terms, clips their norm at 5 and lets torch's Adam with its
    defaults move the weights. Dropout masks are drawn anew in every pass, as in the published code, so with dropout the
    halves of a pair do not share theirs.

    Args:
        density: Architecture of the flow.
        dim: Length of an input.
        condition_dim: Length of a condition.
        halves_together: Whether the fine and the coarse rows of a pair share one pass: fewer and larger calls.
        seed: Seed of the initial weights.
        device: Where the rows will be.

    References:
        | Multilevel neural simulation-based inference (Hikida et al., 2025)
        | https://arxiv.org/abs/2506.06087
    """

    def __init__(
        self,
        density: NSF,
        dim: int,
        condition_dim: int,
        *,
        halves_together: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        with seeded(seed):
            self.flow = plain_flow(density, dim, condition_dim).to(device)
        self.parameters = list(self.flow.parameters())
        self.optimiser = torch.optim.Adam(self.parameters)
        self.halves_together = halves_together

    def copy_weights(self, network: ConditionalDensity) -> None:
        """Takes the weights of a network of the library that `density` built."""
        state = network.state_dict()
        self.flow.load_state_dict({k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)})

    def passes(self, halves: Sequence[tuple[Tensor, Tensor]]) -> list[Pass]:
        r"""Rows as `step` takes them; make them once, outside the step.

        Args:
            halves: Standardised inputs and conditions of fine 0, fine 1, coarse 1, fine 2, ..., as
                `batch_terms(...).halves()` gives them.
        """
        if not self.halves_together:
            signs = [1.0 if index % 2 or index == 0 else -1.0 for index in range(len(halves))]
            return [Pass(*half, (len(half[0]),), (sign,)) for half, sign in zip(halves, signs, strict=True)]
        input, condition = halves[0]
        found = [Pass(input, condition, (len(input),), (1.0,))]
        for fine, coarse in zip(halves[1::2], halves[2::2], strict=True):
            both = [torch.cat(parts) for parts in zip(fine, coarse, strict=True)]
            found.append(Pass(both[0], both[1], (len(fine[0]), len(coarse[0])), (1.0, -1.0)))
        return found

    def step(self, passes: Sequence[Pass]) -> None:
        """One step of Adam on the telescoping loss of these rows."""
        self.optimiser.zero_grad()
        for rows in passes:
            self._loss(rows).backward()
        nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        self.optimiser.step()

    def loss_and_gradient(self, passes: Sequence[Pass]) -> tuple[Tensor, list[Tensor]]:
        """The telescoping loss and its unclipped gradient, one tensor per parameter of the flow."""
        loss = torch.stack([self._loss(rows) for rows in passes]).sum()
        return loss.detach(), list(torch.autograd.grad(loss, self.parameters))

    def _loss(self, rows: Pass) -> Tensor:
        log_prob = self.flow.log_prob(rows.input, rows.condition)
        if len(rows.sizes) == 1:
            return -rows.signs[0] * log_prob.mean()
        first, second = log_prob.split(rows.sizes)
        return -(rows.signs[0] * first.mean() + rows.signs[1] * second.mean())


def sbi_installed() -> bool:
    """Whether the `sbi` toolbox can be imported; `pip install -c constraints.txt -e ".[sbi]"` installs it."""
    return importlib.util.find_spec("sbi") is not None


def sbi_builder(density: NSF) -> Callable[[Tensor, Tensor], nn.Module]:
    """What builds the toolbox's nsf of the same size, from rows of theta and x."""
    from sbi.neural_nets import posterior_nn

    return posterior_nn(
        "nsf", num_transforms=density.transforms, hidden_features=density.hidden, num_blocks=density.blocks,
        num_bins=density.bins, tail_bound=density.tail_bound, dropout_probability=density.dropout,
    )


def sbi_epoch_seconds(
    theta: Tensor,
    x: Tensor,
    prior: Distribution,
    *,
    density: NSF | None = None,
    batch_size: int = 200,
    validation_fraction: float = 0.1,
    epochs: int = 20,
    seed: int = 0,
) -> float:
    r"""Median seconds that an epoch of the `sbi` toolbox takes: plain NPE with its nsf on nflows, on the CPU.

    An epoch is as the toolbox times it: every training batch, then every validation batch. Both loaders drop a last
    batch that is not full. The first epoch warms up and is left out. Nothing is written or printed, and torch's global
    random state is left as found.

    Args:
        theta: Parameters, shape `(n, dim)`.
        x: Outputs, shape `(n, condition_dim)`.
        prior: The prior.
        density: Size of the flow; the library's default when left out.
        batch_size: Rows in a step.
        validation_fraction: Share of the rows held out.
        epochs: Epochs timed.
        seed: Seed of weights, split and batches.
    """
    from sbi.inference import NPE

    build = sbi_builder(NSF() if density is None else density)
    with seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Maximum number of epochs")  # that is what is wanted here
        trainer = NPE(prior=prior, density_estimator=build, tracker=_NoTracker(), show_progress_bars=False)
        # 0.27 trains one epoch more than asked; a version that does not has one fewer to take the median of.
        trainer.append_simulations(theta, x).train(
            training_batch_size=batch_size, validation_fraction=validation_fraction, max_num_epochs=epochs,
            stop_after_epochs=epochs + 2, clip_max_norm=_CLIP,
        )
    return statistics.median(trainer.summary["epoch_durations_sec"][1:])


class _NoTracker:
    """Takes what the toolbox would write to TensorBoard, and keeps nothing."""

    log_dir: str | None = None

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        """Drops one number."""

    def flush(self) -> None:
        """Has nothing to write."""
