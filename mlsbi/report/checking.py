r"""The checks of a run, as numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mlsbi.diagnostics import (
    Score,
    calibration_error,
    coverage,
    folded_uniformity,
    fom,
    hpd_levels,
    kld,
    mse,
    nlpd,
    nrmse,
    rank_uniformity,
    sbc_ranks,
    tarp_levels,
    uniformity,
)
from mlsbi.priors import sample_prior
from mlsbi.randomness import child_seed
from mlsbi.tasks.task import Likelihood, Reference

__all__ = [
    "ALARM", "CREDIBILITY", "Posterior", "check_likelihood", "check_posterior", "compare", "lost_rows", "verdict",
    "worst_level",
]  # fmt: skip

CREDIBILITY = (0.5, 0.8, 0.9, 0.95)
ALARM = 0.01
"""P-value below which a deviation from uniformity is called one, over all tests of a kind."""

_DOUBT = 0.05  # p-value below which one may be, which one calibrated posterior in twenty is too
_EXACT_ROWS, _EXACT_DRAWS = 50, 200
_PRIOR_DRAWS = 4000


class Posterior(Protocol):
    """What the checks ask of a posterior, sampled directly or by MCMC."""

    prior: Any

    def sample_batched(self, sample_shape: Sequence[int], x: Any, seed: int | None = None) -> Tensor:
        """Draws `(n, B, D)` at observations `(B, ...)`."""
        ...

    def log_prob_batched(self, theta: Any, x: Any) -> Tensor:
        """Log density `(n, B)` of theta `(n, B, D)`, up to `log_normaliser`."""
        ...

    def log_normaliser(self, x: Any, *, draws: Tensor | None = None, seed: int = 0) -> Tensor:
        """Log of the density's integral, shape `(B,)`."""
        ...


def check_posterior(
    posterior: Posterior, theta: Tensor, x: Tensor, *, draws: int, seed: int, reference: Reference | None = None,
    reference_x: Tensor | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    r"""Scores a posterior on test pairs that no network has seen.

    Args:
        posterior: The posterior.
        theta: True parameters, shape `(B, D)`.
        x: Observations of the highest level, shape `(B, ...)`, or sets of them `(B, m, ...)` for a likelihood.
        draws: Posterior draws per observation.
        seed: Seed of the draws.
        reference: The exact posterior given x, where it is known.
        reference_x: The observations as the reference reads them, where that is not x: a set of one is a single x.

    Returns:
        Summary for `results.json`, and the arrays behind it: levels, ranks, log densities.
    """
    samples = posterior.sample_batched((draws,), x, seed=child_seed(seed, 0))
    normaliser = posterior.log_normaliser(x, draws=samples, seed=child_seed(seed, 2))
    log_q = posterior.log_prob_batched(theta[None], x)[0] - normaliser
    levels = hpd_levels(log_q.numpy(), (posterior.log_prob_batched(samples, x) - normaliser).numpy())
    ranks = sbc_ranks(theta.numpy(), samples.numpy())
    box = _box(posterior.prior)
    tarp = tarp_levels(theta.numpy(), samples.numpy(), low=box[0], high=box[1], seed=child_seed(seed, 3) % 2**32)
    error = calibration_error(levels)
    found: dict[str, Any] = {
        "n_test": len(theta),
        "draws": draws,
        "nlpd": vars(nlpd(log_q.numpy())),
        "prior_nlpd": float(-posterior.prior.log_prob(theta).double().mean()),
        "reference_nlpd": None,
        "kld": None,
        "coverage": {
            "credibility": list(CREDIBILITY),
            "found": coverage(levels, CREDIBILITY).tolist(),
            "p": uniformity(levels),
        },
        "sbc": {"p": rank_uniformity(ranks, draws).tolist()},
        "tarp": {"p": folded_uniformity(tarp)},
        "calibration_error": {"value": error.value, "null": error.null, "null_sd": error.null_sd},
        "fom": _merit(samples.numpy(), *box),
        "mse": mse(theta.numpy(), samples.numpy()).tolist(),
        "nrmse": nrmse(theta.numpy(), samples.numpy(), scale=_prior_sd(posterior.prior)).tolist(),
        "likelihood_kld": None,
        "mcmc": _chains(posterior),
    }
    if reference is not None:
        plain = x if reference_x is None else reference_x
        found["reference_nlpd"] = nlpd(reference.log_prob(theta, plain).numpy()).mean
        few = slice(_EXACT_ROWS)
        found["kld"] = vars(_against(reference, plain[few], posterior, x[few], normaliser[few], seed))
    arrays = {"hpd_levels": levels, "ranks": ranks, "tarp_levels": tarp, "log_q": log_q.numpy()}
    return found, arrays


def check_likelihood(likelihood: Likelihood, exact: Likelihood, theta: Tensor, x: Tensor) -> Score:
    r"""Kullback-Leibler divergence of a likelihood from the exact one, over test rows.

    .. math:: E_{(\theta, x)} [\log p(x | \theta) - \log q(x | \theta)]

    Args:
        likelihood: The one to judge.
        exact: The exact one.
        theta: Parameters of the rows, shape `(n, D)`.
        x: Outputs of the highest level at them, shape `(n, ...)`.
    """
    with torch.no_grad():
        log_p, log_q = exact(x, theta).double(), likelihood(x, theta).double().cpu()
    return kld((log_p - log_q).numpy()[None], np.zeros((1, len(theta))))


def compare(records: Sequence[Mapping[str, Any]], log_q: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any] | None:
    """Which strategy has the least negative log density, and by how much, on the same test observations.

    Args:
        records: Name and checks of every strategy.
        log_q: Log densities at the true parameters by name, each `(B,)`, over the same observations.

    Returns:
        `best`, and `behind`: mean and standard error of every other one's loss of log density, observation by
        observation; `None` where fewer than two were checked, or none has a finite score.
    """
    scores = {record["name"]: record["checks"]["nlpd"]["mean"] for record in records if record.get("checks")}
    if len(scores) < 2:
        return None
    best = min(scores, key=lambda name: scores[name] if math.isfinite(scores[name]) else math.inf)
    if not math.isfinite(scores[best]):
        return None
    behind = {name: vars(nlpd(log_q[name] - log_q[best])) for name in scores if name != best}
    return {"best": best, "behind": behind}


def _merit(
    samples: np.ndarray[Any, Any], low: np.ndarray[Any, Any], high: np.ndarray[Any, Any]
) -> dict[str, Any] | None:
    """The figure of merit, where there is one: parameters that depend on each other have none."""
    try:
        return vars(fom(samples, low, high))
    except ValueError:
        return None


def _box(prior: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Edges in which parameters are scaled: those of a box prior, else of nearly all of its draws."""
    if hasattr(prior, "low") and hasattr(prior, "high"):
        return prior.low.numpy(), prior.high.numpy()
    low, high = np.quantile(sample_prior(prior, _PRIOR_DRAWS, seed=0).numpy(), [0.001, 0.999], axis=0)
    return low, high


def _prior_sd(prior: Any) -> np.ndarray[Any, Any]:
    return sample_prior(prior, _PRIOR_DRAWS, seed=0).std(0).numpy()


def _chains(posterior: Any) -> dict[str, Any] | None:
    """How the chains of the test observations went, for a posterior sampled by MCMC."""
    found = getattr(posterior, "convergence", ())
    if not found:
        return None
    normaliser = getattr(posterior, "normaliser", None)
    return {"chains": len(found), "converged": sum(one.converged for one in found), "method": found[0].method,
            "least_effective": min(min(one.effective) for one in found),
            "normaliser_error": None if normaliser is None else float(normaliser.standard_error.max())}


def _against(
    reference: Reference, plain: Tensor, posterior: Posterior, x: Tensor, normaliser: Tensor, seed: int
) -> Score:
    exact = torch.stack([
        reference.sample(_EXACT_DRAWS, row, child_seed(seed, 1, index)) for index, row in enumerate(plain)
    ], dim=1).to(torch.get_default_dtype())  # (draws, B, D)
    flat, rows = exact.reshape(-1, exact.shape[-1]), plain.repeat(_EXACT_DRAWS, *([1] * (plain.ndim - 1)))
    log_p = reference.log_prob(flat, rows).reshape(exact.shape[:2])
    return kld(log_p.numpy(), (posterior.log_prob_batched(exact, x) - normaliser).numpy())


def verdict(results: Mapping[str, Any]) -> list[str]:
    """What a run's numbers say, in sentences, the most important first.

    Args:
        results: The content of `results.json`: `strategies`, `comparison`, `spent`, `asked`.
    """
    records = results["strategies"]
    best = next((record for record in records if record["name"] == (results.get("comparison") or {}).get("best")), None)
    sentences = [*_failures(records), *_rounds(results), *_comparison(results)]
    shown = best or next(record for record in records if not record.get("error"))
    checks = shown["checks"]
    if best is not None:
        sentences.append(f"The next sentences are about '{best['name']}'.")
    if checks is None:
        sentences.append("Nothing was checked: no test simulations were made. Do not trust this posterior yet.")
    else:
        sentences += [_information(checks), _calibration(checks), *_shape(checks, results["asked"]["parameters"])]
        if checks["kld"] is not None:
            sentences.append(f"The exact posterior is known here: it scores {checks['reference_nlpd']:.2f}, and the "
                             f"divergence from it is {checks['kld']['mean']:.2f} nats per observation.")
        if checks["likelihood_kld"] is not None:
            sentences.append(f"The exact likelihood is known here: the divergence from it is "
                             f"{checks['likelihood_kld']['mean']:.3f} +- "
                             f"{checks['likelihood_kld']['standard_error']:.3f} nats per output.")
    sentences += _convergence(shown)
    reference = results.get("reference")
    if reference is not None and reference["warning"]:
        sentences.append(f"The exact posterior it is drawn with is uncertain itself: {reference['warning']}")
    return [*sentences, *lost_rows(results)]


def _share(value: float) -> str:
    return f"{value:.1g}" if 0 < value < 0.001 else f"{value:.1%}"


def _rounds(results: Mapping[str, Any]) -> list[str]:
    """What rounds for one observation make of what follows."""
    found, records = results.get("sequential"), results["strategies"]
    if not found:
        return []
    last = found["rounds"][-1]
    told = [f"It was found in {len(found['rounds'])} rounds and holds for this observation alone: the last round drew "
            f"parameters from {_share(last['share'])} of the prior, and {_share(last['leakage'])} of its posterior "
            f"lie outside.{' Checks are on test simulations inside.' if records[0]['checks'] else ''}"]
    if found["lost"] is not None:
        told.append(f"Of the exact posterior, {_share(found['lost'][-1])} lie outside and are lost; the divergence "
                    f"from it is {found['divergence'][-1]:.2f} nats.")
    return told + [note for done in found["rounds"] for note in done["notes"]]


def lost_rows(results: Mapping[str, Any]) -> list[str]:
    """How many rows of which level failed, what was done about it and what it means; nothing where none failed.

    Args:
        results: The content of `results.json`: `spent`, `levels`, and `asked` with `on_failure`, which older ones lack.

    Returns:
        One sentence, or none.
    """
    spent = results["spent"]
    names = [level["name"] for level in results.get("levels") or []] or range(len(spent["n"]))
    told = [f"{lost:,} of {n + lost:,} rows ({lost / (n + lost):.1%}) of level '{name}'"
            for name, n, lost in zip(names, spent["n"], spent["failures"], strict=True) if lost]
    if not told:
        return []
    budget, cost = (results.get("asked") or {}).get("budget"), spent.get("cost")
    beyond = ""
    if budget and isinstance(cost, (int, float)) and cost > budget:
        beyond = (f" Runs that failed or replaced failed ones took the cost to {cost:,.4g}, beyond the budget of "
                  f"{budget:,.4g}.")
    done = "left out with their twins"
    if (results.get("asked") or {}).get("on_failure") == "redraw":
        done = "replaced by others, with their twins"
    return [f"{', '.join(told)} failed and were {done}: what is learned holds for the part of the prior where "
            f"simulations succeed.{beyond}"]


def worst_level(results: Mapping[str, Any]) -> int | None:
    """The level with most failed rows, the cheapest of several; `None` where no row failed, or it is not known."""
    lost = (results.get("spent") or {}).get("failures") or [0]
    return lost.index(max(lost)) if max(lost) else None


def _failures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    failed = [f"Training '{record['name']}' failed: {record['error']}" for record in records if record.get("error")]
    return failed + [f"'{record['name']}': {failure}" for record in records for failure in record.get("failures") or []]


def _comparison(results: Mapping[str, Any]) -> list[str]:
    comparison = results.get("comparison")
    if comparison is None:
        return []
    sentences = []
    for name, loss in sorted(comparison["behind"].items(), key=lambda item: item[1]["mean"]):
        told = f"'{name}' is behind by {loss['mean']:.2f} +- {loss['standard_error']:.2f} nats per observation"
        if not math.isfinite(loss["mean"]):
            told = f"'{name}' gives some true parameters no density at all"
        elif not loss["mean"] >= 2 * loss["standard_error"]:  # one test has no standard error
            told += ", which these tests cannot tell from nothing"
        sentences.append(told)
    return [f"'{comparison['best']}' knows most about the parameters; {'; '.join(sentences)}."]


def _convergence(record: Mapping[str, Any]) -> list[str]:
    own, checked = (record["posterior"] or {}).get("mcmc"), (record["checks"] or {}).get("mcmc")
    sentences = []
    if own is not None and own["warning"]:
        sentences.append(f"The chain of the observation has not converged: {own['warning']}")
    if checked is not None and checked["converged"] < checked["chains"]:
        sentences.append(f"At {checked['chains'] - checked['converged']} of the {checked['chains']} test observations "
                         f"{checked['method']} has not converged, so that the checks themselves are uncertain.")
    return sentences


def _information(checks: Mapping[str, Any]) -> str:
    score, prior = checks["nlpd"], checks["prior_nlpd"]
    gain, error = prior - score["mean"], score["standard_error"]
    line = f"(negative log density {score['mean']:.2f}, the prior's {prior:.2f})"
    if not math.isfinite(score["mean"]):
        return "Some true parameters have no density at all under the posterior: it must not be used."
    if math.isnan(error):
        return f"One test observation cannot tell how much the posterior knows {line}."
    if gain > 2 * error:
        return f"The posterior is worth {gain:.2f} +- {error:.2f} nats more than the prior per observation {line}."
    if gain < -2 * error:
        return f"The posterior is worse than the prior by {-gain:.2f} +- {error:.2f} nats per observation {line}: do " \
               "not use it."
    return f"The posterior cannot be told from the prior {line}: it has learned nothing that these tests see."


def _calibration(checks: Mapping[str, Any]) -> str:
    found = dict(zip(checks["coverage"]["credibility"], checks["coverage"]["found"], strict=True))
    at, p = found[0.9], checks["coverage"]["p"]
    stated = f"90% regions hold the truth in {100 * at:.0f}% of {checks['n_test']} tests (uniformity p = {p:.2g})"
    if p >= _DOUBT:
        return f"Its stated probabilities are consistent with what happens: {stated}."
    mean_gap = float(np.mean(np.asarray(checks["coverage"]["found"]) - np.asarray(checks["coverage"]["credibility"])))
    word = "overconfident" if mean_gap < 0 else "too cautious"
    return f"It {'may be' if p >= ALARM else 'is'} {word}: {stated}."


def _shape(checks: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    low = [name for name, p in zip(names, checks["sbc"]["p"], strict=True) if p < ALARM / len(names)]
    if not low:
        return []
    marginals = "its marginal is" if len(low) == 1 else "their marginals are"
    return [f"The ranks of {', '.join(low)} are not uniform: {marginals} shifted or of the wrong width."]
