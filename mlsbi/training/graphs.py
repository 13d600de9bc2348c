r"""Training steps recorded once and replayed on a GPU without the gaps between launches."""

from __future__ import annotations

import torch
from torch import Tensor

from mlsbi.training.descent import Descent, Step
from mlsbi.training.plan import Rows

__all__ = ["CapturedStep"]

_WARM_UP = 3  # steps before recording, in which libraries choose their kernels


class CapturedStep:
    r"""A step of one shape as a CUDA graph.

    Recording leaves the parameters as they were. The graph writes to the tensors of the descent, which must not be
    replaced as long as it is in use.

    Args:
        descent: Whose step is recorded, on a GPU; its networks must not draw random numbers of their own.
        rows: Rows of a step; the graph works on a copy, into which later rows are written.
        weights: a_0 .. a_L, shape `(K, L + 1)`.
    """

    def __init__(self, descent: Descent, rows: Rows, weights: Tensor) -> None:
        self.descent = descent
        self._rows = Rows(rows.input.clone(), rows.condition.clone(), rows.sizes,
                          {name: mask.clone() for name, mask in rows.keep.items()})
        self._seen = rows.input
        self._weights = weights.clone()
        before = {name: tensor.clone() for name, tensor in descent.tensors().items()}
        self._device = rows.input.device
        try:
            with torch.cuda.device(self._device):
                self._record()
        finally:
            self._restore(before)

    def _record(self) -> None:
        """Takes the step on a stream of the device's own, as torch wants it: a few times, then to be recorded."""
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.descent.move(self._rows, self._weights)
        torch.cuda.current_stream(self._device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):
            self._out = self.descent.move(self._rows, self._weights)

    @torch.no_grad()
    def _restore(self, before: dict[str, Tensor]) -> None:
        for name, tensor in self.descent.tensors().items():
            tensor.copy_(before[name]) if name in before else tensor.zero_()
        self.descent.optimiser.state[self.descent.flat]["step"].fill_(float(self.descent.done))

    def __call__(self, rows: Rows, weights: Tensor) -> Step:
        """Takes a step; what it gives is overwritten by the next one."""
        self.descent.advance()
        if rows.input is not self._seen:
            self._seen = rows.input
            self._rows.input.copy_(rows.input, non_blocking=True)
            self._rows.condition.copy_(rows.condition, non_blocking=True)
        for name, mask in rows.keep.items():
            self._rows.keep[name].copy_(mask, non_blocking=True)
        self._weights.copy_(weights, non_blocking=True)
        with torch.cuda.device(self._device):
            self.graph.replay()
        return self._out
