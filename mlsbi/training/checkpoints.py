r"""Trainings on disk, to go on from after an interruption as if there had been none."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mlsbi.store.files import write_file

__all__ = ["Checkpoint", "CheckpointError", "fingerprint"]

_KEY = "training"


class CheckpointError(ValueError):
    """A checkpoint cannot be gone on from; the message says what to do."""


@dataclass
class Checkpoint:
    r"""One file that is replaced as training goes on: tensors as safetensors, the rest as JSON inside; no pickle.

    Args:
        path: The file, or the beginning of the names of several, see `part`.
        every: Seconds between two versions.
    """

    path: Path
    every: float = 30.0
    _written: float = field(default_factory=time.monotonic, init=False, repr=False)

    def part(self, name: str) -> Checkpoint:
        """The checkpoint of a part of a training, such as one member or stage."""
        return Checkpoint(self.path.with_name(f"{self.path.name}-{name}"), self.every)

    @property
    def due(self) -> bool:
        """Whether it is time for a new version."""
        return time.monotonic() - self._written >= self.every

    def write(self, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """Replaces the file by a new version, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_file(self._file, save(on_cpu, {_KEY: json.dumps(told)}))
        self._written = time.monotonic()

    def read(self, wanted: str, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was written last, `None` where there is nothing.

        Args:
            wanted: Fingerprint of the training that is to go on.
            device: Where tensors are to be.

        Raises:
            CheckpointError: If the file is of another training, or damaged.
        """
        if not self._file.is_file():
            return None
        try:
            with safe_open(self._file, framework="pt", device=str(device)) as file:
                told = json.loads(file.metadata()[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{self._file} is damaged ({error}). Delete it to train from the start.") from error
        if told.get("fingerprint") != wanted:
            raise CheckpointError(f"{self._file} is of another training: data, network, seed or options differ. Pass "
                                  "another folder, or delete it to train from the start.")
        return tensors, told

    @property
    def _file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.safetensors")


def fingerprint(tensors: Iterable[Tensor], *told: Any) -> str:
    """Says whether two trainings are the same, by the bytes of their tensors and the text of everything else."""
    digest = hashlib.sha256(repr(told).encode())
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
