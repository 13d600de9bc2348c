r"""Checks of a posterior, as functions on arrays."""

from mlsbi.diagnostics.calibration import (
    CalibrationError,
    calibration_error,
    coverage,
    folded_uniformity,
    hpd_levels,
    rank_uniformity,
    sbc_ranks,
    uniformity,
)
from mlsbi.diagnostics.fidelity import LevelTransfer, TransferReport, transfer
from mlsbi.diagnostics.information import Coherence, MutualInformation, coherence, mutual_information
from mlsbi.diagnostics.metrics import Score, fom, kld, mse, nlpd, nrmse
from mlsbi.diagnostics.predictive import posterior_predictive, predictive_levels
from mlsbi.diagnostics.tarp import tarp_levels
from mlsbi.diagnostics.two_sample import c2st, mmd

__all__ = [
    "CalibrationError", "Coherence", "LevelTransfer", "MutualInformation", "Score", "TransferReport", "c2st",
    "calibration_error", "coherence", "coverage", "fom", "folded_uniformity", "hpd_levels", "kld", "mmd", "mse",
    "mutual_information", "nlpd", "nrmse", "posterior_predictive", "predictive_levels", "rank_uniformity", "sbc_ranks",
    "tarp_levels", "transfer", "uniformity",
]  # fmt: skip
