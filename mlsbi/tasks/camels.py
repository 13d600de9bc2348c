r"""CAMELS matter power spectra: hydrodynamics and gravity-only runs of the same universes, read from a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mlsbi.data import MultilevelData, spread
from mlsbi.density.flows import NSF
from mlsbi.priors import BoxPrior
from mlsbi.tasks.task import Task

__all__ = ["Catalogue", "build", "read"]

VARIABLE = "MLSBI_CAMELS"
"""Environment variable that names the data folder."""

_RANGES = {"Omega_m": (0.1, 0.5), "sigma_8": (0.6, 1.0)}
_LEVELS = ("n-body", "hydro")
_WAVENUMBERS, _HIGH, _LOW = "combined_data_k.npy", "combined_data_pk.npy", "combined_data_pk_low_fid.npy"
_PARAMETERS = "CosmoAstroSeed_*.txt"
_WHERE = (
    "The data are public: power spectra at z = 0 of the IllustrisTNG and N-body LH suites of the CAMELS project "
    "(https://camels.readthedocs.io), as published with Hikida et al. 2025 (arXiv 2506.06087). Expected one folder "
    f"with {_WAVENUMBERS} (39,), {_HIGH} (1000, 39), {_LOW} (1000, 39) and {_PARAMETERS} (1000 rows, with a header "
    f"that names the columns). Give it as data=..., as --data on the command line, or as {VARIABLE} in the environment."
)


def build(
    data: str | os.PathLike[str] | None = None,
    parameters: Sequence[str] = ("sigma_8",),
    split: Literal["clean", "leaky"] = "clean",
    noise: Literal["matched", "unmatched"] = "matched",
) -> Task:
    r"""The task "camels": cosmology from noisy matter power spectra.

    Observation: :math:`x = k (P + 0.2 (0.05 + P) \epsilon)` with :math:`\epsilon \sim N(0, I)`, one draw for both
    levels of a catalogue row. A seed is one split of the catalogue and one draw of the noise.

    The clean split permutes the rows; 60% of them are for training, pairs from the front and low rows from the back,
    and the other 40% are for testing, whatever n is. The leaky split is the published one: pairs are the catalogue's
    first 2%, low rows and test rows are the *same* other 98%, so that the low twin of every test row has been seen in
    training. Its numbers say nothing about new data.

    Args:
        data: Folder with the four files; the environment variable `MLSBI_CAMELS` when left out.
        parameters: What to infer, out of Omega_m and sigma_8, in that order of columns.
        split: "clean", or "leaky" to repeat the published figures.
        noise: "matched", or "unmatched" to draw a pair's two noises separately, as the published arrays have it.

    Raises:
        FileNotFoundError: If the folder or one of its files is not there.
        ValueError: If a file has another shape, or values that cannot be, or an option is not one of those above.
    """
    names = (parameters,) if isinstance(parameters, str) else tuple(parameters)
    if not names or len(set(names)) != len(names) or not set(names) <= set(_RANGES):
        raise ValueError(f"Expected parameters out of {list(_RANGES)}, each once; got {list(names)}.")
    if split not in ("clean", "leaky"):
        raise ValueError(f"Expected split='clean' or split='leaky'; got {split!r}.")
    if noise not in ("matched", "unmatched"):
        raise ValueError(f"Expected noise='matched' or noise='unmatched'; got {noise!r}.")
    catalogue = read(_folder(data), names)
    splits = _Splits(catalogue, leaky=split == "leaky", matched=noise == "matched")
    low, high = zip(*(_RANGES[name] for name in names), strict=True)
    return Task(
        name="camels",
        title="Cosmology from matter power spectra: gravity-only (low) and hydrodynamic (high) runs, real data.",
        stack=None,
        prior=BoxPrior(low, high, names=names),
        level_names=_LEVELS,
        level_costs=(1.0, 100.0),
        simulate=splits.simulate,
        test=splits.test,
        budgets=(splits.budget,),
        test_rows=splits.test_rows,
        density=NSF(transforms=3, hidden=16, blocks=1, bins=3),  # small, as its training rows are few
        x_names=("k [h/Mpc]",),
        x_axis=tuple(catalogue.k.tolist()),
        citation="Villaescusa-Navarro et al., The CAMELS project, ApJ 915 (2021) and ApJS 265 (2023); spectra as "
        "published with Hikida, Bharti, Jeffrey, Briol, Multilevel neural simulation-based inference, NeurIPS 2025, "
        "arXiv 2506.06087",
    )


@dataclass(frozen=True)
class Catalogue:
    r"""Noise-free spectra of the same universes at two levels, rows aligned, float64.

    Args:
        theta: Parameters, shape `(rows, D)`.
        k: Wavenumbers in h/Mpc, shape `(K,)`.
        low: Gravity-only power spectra in (Mpc/h)^3, shape `(rows, K)`.
        high: Hydrodynamic power spectra in (Mpc/h)^3, shape `(rows, K)`.
    """

    theta: np.ndarray[Any, Any]
    k: np.ndarray[Any, Any]
    low: np.ndarray[Any, Any]
    high: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.theta)


def read(folder: str | os.PathLike[str], parameters: Sequence[str]) -> Catalogue:
    r"""Reads the four files of a folder.

    Args:
        folder: Where the files are.
        parameters: Columns to read, by the names in the parameter file's header.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a file has another shape, values that are not finite, or parameters outside the suite's ranges.
    """
    path = Path(folder)
    k = _read_array(path / _WAVENUMBERS, ndim=1)
    high, low = _read_array(path / _HIGH, ndim=2), _read_array(path / _LOW, ndim=2)
    if high.shape[1] != len(k):
        raise ValueError(f"Expected {path / _HIGH} of shape (rows, {len(k)}), as {_WAVENUMBERS} has {len(k)} "
                         f"wavenumbers; got {high.shape}.")
    if low.shape != high.shape:
        raise ValueError(f"Expected {path / _LOW} of shape {high.shape}, as {_HIGH} has; got {low.shape}.")
    theta = _read_parameters(path, parameters)
    if len(theta) != len(high):
        raise ValueError(f"Expected {len(high)} rows in {path / _PARAMETERS}, as {_HIGH} has; got {len(theta)}.")
    if len(theta) < 5:
        raise ValueError(f"Expected at least 5 rows in {path / _HIGH}, to split them; got {len(theta)}.")
    return Catalogue(theta, k, low, high)


@dataclass(frozen=True)
class _Splits:
    """Noisy observations of a catalogue, split by a seed."""

    catalogue: Catalogue
    leaky: bool
    matched: bool

    @property
    def budget(self) -> tuple[int, int]:
        """Of 1000 rows, the published (980, 20) when leaky and (580, 20) when clean."""
        pairs = self._published_pairs
        return len(self.catalogue) - pairs - (0 if self.leaky else self.test_rows), pairs

    @property
    def test_rows(self) -> int:
        """How many rows are for testing."""
        rows = len(self.catalogue)
        return rows - self._published_pairs if self.leaky else 2 * rows // 5

    def simulate(self, n: int | Sequence[int], seed: int) -> MultilevelData:
        """Low rows and pairs of one split."""
        low, pairs = spread(n, 2, what="n")
        if low < 1 or pairs < 1:
            raise ValueError(f"Expected at least one row per level; got {(low, pairs)}.")
        for_low, for_pairs, _ = self._split(seed)
        if self.leaky and (low > len(for_low) or pairs > len(for_pairs)):
            raise ValueError(f"Expected at most {self.budget} rows, as the leaky split of {len(self.catalogue)} "
                             f"catalogue rows has; got {(low, pairs)}.")
        if not self.leaky and low + pairs > len(for_low):
            raise ValueError(f"Expected at most {len(for_low)} training rows in all, as the other {self.test_rows} of "
                             f"{len(self.catalogue)} catalogue rows are for testing; got {low} + {pairs}.")
        front, back = for_pairs[:pairs], for_low[:low]
        theta, (x_low, x_high) = self._theta(), self._observe(seed)
        levels = [(theta[back], x_low[back]), (theta[front], x_high[front], x_low[front])]
        return MultilevelData.from_arrays(levels, names=_LEVELS)

    def test(self, n: int | None, seed: int) -> tuple[Tensor, Tensor]:
        """The first n test rows of one split at the high level; all of them when n is `None`."""
        if n is not None and not 1 <= n <= self.test_rows:
            raise ValueError(f"Expected between 1 and {self.test_rows} test rows; got {n}. n=None takes all.")
        rows = self._split(seed)[2][:n]
        return self._theta()[rows], self._observe(seed)[1][rows]

    @property
    def _published_pairs(self) -> int:
        return max(1, len(self.catalogue) // 50)

    def _split(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Catalogue rows for low rows, for pairs and for testing, in the order in which they are taken.

        When clean, low rows and pairs take the same rows from opposite ends, so that either can be many.
        """
        rows = len(self.catalogue)
        if self.leaky:
            order = torch.arange(rows)
            rest = order[self._published_pairs :]
            return rest.flip(0), order[: self._published_pairs], rest
        order = torch.from_numpy(_generator(seed, 0).permutation(rows))
        training, held_out = order[: rows - self.test_rows], order[rows - self.test_rows :]
        return training.flip(0), training, held_out

    def _observe(self, seed: int) -> tuple[Tensor, Tensor]:
        """Noisy spectra of every catalogue row, so that a row's noise does not depend on n, at both levels."""
        high = _observation(self.catalogue.k, self.catalogue.high, _generator(seed, 1))
        low = _observation(self.catalogue.k, self.catalogue.low, _generator(seed, 1 if self.matched else 2))
        return low, high

    def _theta(self) -> Tensor:
        return torch.tensor(self.catalogue.theta, dtype=torch.get_default_dtype())


def _observation(k: np.ndarray[Any, Any], power: np.ndarray[Any, Any], generator: np.random.Generator) -> Tensor:
    noisy = k * (power + 0.2 * (0.05 + power) * generator.standard_normal(power.shape))
    return torch.tensor(noisy, dtype=torch.get_default_dtype())


def _generator(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose,)))


def _folder(data: str | os.PathLike[str] | None) -> Path:
    given = data if data is not None else os.environ.get(VARIABLE)
    if not given:
        raise FileNotFoundError(f"Task 'camels' needs a data folder. {_WHERE}")
    if not Path(given).is_dir():
        raise FileNotFoundError(f"Expected a folder with the CAMELS data; there is none at {given}. {_WHERE}")
    return Path(given)


def _read_array(path: Path, *, ndim: int) -> np.ndarray[Any, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}. {_WHERE}")
    array = np.load(path, allow_pickle=False)
    if array.ndim != ndim or array.size == 0:
        shape = "(wavenumbers,)" if ndim == 1 else "(rows, wavenumbers)"
        raise ValueError(f"Expected {path} of shape {shape}; got {array.shape}.")
    if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all() or (array <= 0).any():
        raise ValueError(f"Expected {path} to hold finite, positive real numbers; it has others. Is it the right file?")
    return array.astype(np.float64)


def _read_parameters(folder: Path, parameters: Sequence[str]) -> np.ndarray[Any, Any]:
    found = sorted(folder.glob(_PARAMETERS))
    if len(found) != 1:
        what = f"found {[path.name for path in found]}" if found else "there is none"
        raise FileNotFoundError(f"Expected one file {folder / _PARAMETERS}; {what}. {_WHERE}")
    path = found[0]
    header, *lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()] or [[]]
    columns = [column.lstrip("#") for column in header if column != "#"]
    missing = [name for name in parameters if name not in columns]
    if missing:
        raise ValueError(f"Expected a first line in {path} that names the columns {list(parameters)}; got {header}.")
    try:
        theta = np.array([[float(line[columns.index(name)]) for name in parameters] for line in lines])
    except (IndexError, ValueError) as error:
        raise ValueError(f"Expected {len(columns)} columns in every row of {path}, numbers in {list(parameters)}; "
                         f"{error}.") from error
    for name, values in zip(parameters, theta.reshape(len(lines), -1).T, strict=True):
        low, high = _RANGES[name]
        if not bool(((values >= low) & (values <= high)).all()):
            raise ValueError(f"Expected {name} between {low} and {high} in {path}; got {values.min()} to "
                             f"{values.max()}. Is it the LH suite?")
    return theta
