r"""The checks of a run, as numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlsbi.diagnostics import coverage, hpd_levels, kld, nlpd, sbc_ranks, uniformity
from mlsbi.inference.posteriors import DirectPosterior
from mlsbi.randomness import child_seed
from mlsbi.tasks.task import Reference

__all__ = ["ALARM", "CREDIBILITY", "check_posterior", "verdict"]

CREDIBILITY = (0.5, 0.8, 0.9, 0.95)
ALARM = 0.01
"""P-value below which a deviation from uniformity is called one, over all tests of a kind."""

_EXACT_ROWS, _EXACT_DRAWS = 50, 200


def check_posterior(
    posterior: DirectPosterior, theta: Tensor, x: Tensor, *, draws: int, seed: int, reference: Reference | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    r"""Scores a posterior on test pairs that no network has seen.

    Args:
        posterior: The posterior.
        theta: True parameters, shape `(B, D)`.
        x: Observations of the highest level, shape `(B, ...)`.
        draws: Posterior draws per observation.
        seed: Seed of the draws.
        reference: The exact posterior, where it is known.

    Returns:
        Summary for `results.json`, and the arrays behind it: levels, ranks, log densities.
    """
    log_q = posterior.log_prob_batched(theta[None], x)[0]
    samples = posterior.sample_batched((draws,), x, seed=child_seed(seed, 0))
    levels = hpd_levels(log_q.numpy(), posterior.log_prob_batched(samples, x).numpy())
    ranks = sbc_ranks(theta.numpy(), samples.numpy())
    score = nlpd(log_q.numpy())
    found: dict[str, Any] = {
        "n_test": len(theta),
        "draws": draws,
        "nlpd": vars(score),
        "prior_nlpd": float(-posterior.prior.log_prob(theta).double().mean()),
        "reference_nlpd": None,
        "kld": None,
        "coverage": {
            "credibility": list(CREDIBILITY),
            "found": coverage(levels, CREDIBILITY).tolist(),
            "p": uniformity(levels),
        },
        "sbc": {"p": [uniformity((column + 0.5) / (draws + 1)) for column in ranks.T]},
    }
    if reference is not None:
        found["reference_nlpd"] = nlpd(reference.log_prob(theta, x).numpy()).mean
        found["kld"] = vars(_against(reference, posterior, x[:_EXACT_ROWS], seed))
    return found, {"hpd_levels": levels, "ranks": ranks, "log_q": log_q.numpy()}


def _against(reference: Reference, posterior: DirectPosterior, x: Tensor, seed: int) -> Any:
    exact = torch.stack([
        reference.sample(_EXACT_DRAWS, row, child_seed(seed, 1, index)) for index, row in enumerate(x)
    ], dim=1).to(torch.get_default_dtype())  # (draws, B, D)
    flat, rows = exact.reshape(-1, exact.shape[-1]), x.repeat(_EXACT_DRAWS, *([1] * (x.ndim - 1)))
    log_p = reference.log_prob(flat, rows).reshape(exact.shape[:2])
    return kld(log_p.numpy(), posterior.log_prob_batched(exact, x).numpy())


def verdict(results: Mapping[str, Any]) -> list[str]:
    """What a run's numbers say, in sentences, the most important first.

    Args:
        results: The content of `results.json`: `checks`, `spent`, `training`.
    """
    sentences = []
    checks = results.get("checks")
    if checks is None:
        sentences.append("Nothing was checked: no test simulations were made. Do not trust this posterior yet.")
    else:
        sentences += [_information(checks), _calibration(checks), *_shape(checks, results["asked"]["parameters"])]
        if checks["kld"] is not None:
            sentences.append(f"The exact posterior is known here: it scores {checks['reference_nlpd']:.2f}, and the "
                             f"divergence from it is {checks['kld']['mean']:.2f} nats per observation.")
    lost = sum(results["spent"]["failures"])
    if lost:
        sentences.append(f"{lost} rows had NaN or infinite output and were left out with their twins, which truncates "
                         "the prior to where simulations succeed.")
    return sentences


def _information(checks: Mapping[str, Any]) -> str:
    score, prior = checks["nlpd"], checks["prior_nlpd"]
    gain, error = prior - score["mean"], score["standard_error"]
    line = f"(negative log density {score['mean']:.2f}, the prior's {prior:.2f})"
    if not math.isfinite(score["mean"]):
        return "Some true parameters have no density at all under the posterior: it must not be used."
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
    if p >= ALARM:
        return f"Its stated probabilities are consistent with what happens: {stated}."
    mean_gap = float(np.mean(np.asarray(checks["coverage"]["found"]) - np.asarray(checks["coverage"]["credibility"])))
    word = "overconfident" if mean_gap < 0 else "too cautious"
    return f"It is {word}: {stated}."


def _shape(checks: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    low = [name for name, p in zip(names, checks["sbc"]["p"], strict=True) if p < ALARM / len(names)]
    if not low:
        return []
    marginals = "its marginal is" if len(low) == 1 else "their marginals are"
    return [f"The ranks of {', '.join(low)} are not uniform: {marginals} shifted or of the wrong width."]
