r"""Figures of a run: functions on arrays and records that return a matplotlib `Figure`.

No function writes a file, uses pyplot or changes rcParams; `figure.savefig(path)` writes one.
"""

from mlsbi.plots.calibration import coverage, ranks
from mlsbi.plots.comparison import quality
from mlsbi.plots.failures import failures
from mlsbi.plots.planning import errors, pilot, plan
from mlsbi.plots.posterior import pairs
from mlsbi.plots.rounds import rounds
from mlsbi.plots.simulations import coupled
from mlsbi.plots.training import losses

__all__ = ["coupled", "coverage", "errors", "failures", "losses", "pairs", "pilot", "plan", "quality", "ranks",
           "rounds"]
