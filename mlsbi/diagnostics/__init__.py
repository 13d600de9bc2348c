r"""Checks of a posterior, as functions on arrays."""

from mlsbi.diagnostics.calibration import coverage, hpd_levels, sbc_ranks, uniformity
from mlsbi.diagnostics.metrics import Score, kld, nlpd

__all__ = ["Score", "coverage", "hpd_levels", "kld", "nlpd", "sbc_ranks", "uniformity"]
