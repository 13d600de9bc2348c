r"""Bayesian inference for simulators too expensive to run often.

Names are imported when first used: `optimal_allocation` needs no torch, and the package imports as fast as torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlsbi import diagnostics, plots, tasks
    from mlsbi.allocation.adaptive import AdaptiveCampaign, simulate_adaptively
    from mlsbi.allocation.comparing import ErrorCurve, error_curves
    from mlsbi.allocation.optimal import Allocation, optimal_allocation
    from mlsbi.allocation.pilot_report import PilotReport
    from mlsbi.allocation.piloting import pilot
    from mlsbi.data import LevelData, MultilevelData
    from mlsbi.density.embeddings import CNNEmbedding, MLPEmbedding, SetEmbedding
    from mlsbi.density.flows import MAF, NSF
    from mlsbi.density.mixture_density import MDN
    from mlsbi.inference.loading import load
    from mlsbi.inference.mcmc_posterior import MCMCOptions, MCMCPosterior
    from mlsbi.inference.nle import NLE
    from mlsbi.inference.npe import NPE
    from mlsbi.inference.posteriors import DirectPosterior
    from mlsbi.inference.sequential import SequentialInference, infer_sequentially
    from mlsbi.levels import Level, LevelStack
    from mlsbi.priors import BoxPrior
    from mlsbi.simulation.adapters import per_sample
    from mlsbi.simulation.campaign import simulate
    from mlsbi.simulation.merging import merge_stores
    from mlsbi.simulation.opening import accept_code
    from mlsbi.simulation.programs import command
    from mlsbi.simulation.scheduling import SimulationError
    from mlsbi.store.exporting import export_store
    from mlsbi.store.shards import StoreError
    from mlsbi.store.store import Store, open_store
    from mlsbi.strategies.auto import Auto
    from mlsbi.strategies.emulation import Emulation
    from mlsbi.strategies.multilevel import Multilevel
    from mlsbi.strategies.single_level import SingleLevel
    from mlsbi.strategies.transfer import TransferLearning
    from mlsbi.strategies.transfer_then_multilevel import TransferThenMultilevel
    from mlsbi.strategies.translation import Translation
    from mlsbi.training.options import TrainingOptions

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveCampaign": "allocation.adaptive",
    "simulate_adaptively": "allocation.adaptive",
    "Allocation": "allocation.optimal",
    "optimal_allocation": "allocation.optimal",
    "ErrorCurve": "allocation.comparing",
    "error_curves": "allocation.comparing",
    "PilotReport": "allocation.pilot_report",
    "pilot": "allocation.piloting",
    "LevelData": "data",
    "MultilevelData": "data",
    "CNNEmbedding": "density.embeddings",
    "MLPEmbedding": "density.embeddings",
    "SetEmbedding": "density.embeddings",
    "MAF": "density.flows",
    "NSF": "density.flows",
    "MDN": "density.mixture_density",
    "MCMCOptions": "inference.mcmc_posterior",
    "MCMCPosterior": "inference.mcmc_posterior",
    "NLE": "inference.nle",
    "NPE": "inference.npe",
    "DirectPosterior": "inference.posteriors",
    "SequentialInference": "inference.sequential",
    "infer_sequentially": "inference.sequential",
    "load": "inference.loading",
    "Level": "levels",
    "LevelStack": "levels",
    "BoxPrior": "priors",
    "command": "simulation.programs",
    "per_sample": "simulation.adapters",
    "simulate": "simulation.campaign",
    "export_store": "store.exporting",
    "merge_stores": "simulation.merging",
    "accept_code": "simulation.opening",
    "SimulationError": "simulation.scheduling",
    "Store": "store.store",
    "StoreError": "store.shards",
    "open_store": "store.store",
    "Auto": "strategies.auto",
    "Emulation": "strategies.emulation",
    "Multilevel": "strategies.multilevel",
    "SingleLevel": "strategies.single_level",
    "TransferLearning": "strategies.transfer",
    "TransferThenMultilevel": "strategies.transfer_then_multilevel",
    "Translation": "strategies.translation",
    "TrainingOptions": "training.options",
}
_MODULES = ("diagnostics", "plots", "tasks")

__all__ = [  # noqa: PLE0604
    "MAF", "MDN", "NLE", "NPE", "NSF", "AdaptiveCampaign", "Allocation", "Auto", "BoxPrior", "CNNEmbedding",
    "DirectPosterior", "Emulation", "ErrorCurve", "Level", "LevelData", "LevelStack", "MCMCOptions",
    "MCMCPosterior", "MLPEmbedding", "Multilevel", "MultilevelData", "PilotReport", "SequentialInference",
    "SetEmbedding", "SimulationError", "SingleLevel", "Store", "StoreError", "TrainingOptions", "TransferLearning",
    "TransferThenMultilevel", "Translation", "accept_code", "command", "diagnostics", "error_curves",
    "export_store", "infer_sequentially", "load", "merge_stores", "open_store", "optimal_allocation", "per_sample",
    "pilot", "plots", "simulate", "simulate_adaptively", "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mlsbi.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mlsbi' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"mlsbi.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
