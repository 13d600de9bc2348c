r"""The sections of the report about strategies one by one: the best in full, the others in short."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlsbi.report.checking import ALARM
from mlsbi.report.comparing import ranked
from mlsbi.report.elements import Cell, figure, number, paragraph, section, subheading, table
from mlsbi.report.wording import Record, give_or_take, joined, measured, part, percent, rounded

__all__ = ["described"]

_IN_STAGES = ", stage by stage; each begins with the best weights of the one before"
_CAPTIONS = {
    "losses": "Training over epochs. The blue curve is the loss on rows that were held out, the dot marks the weights "
    "that were kept. Where the training loss goes on falling while the held-out loss rises, the network over-fits: "
    "that is why the weights at the dot are used and not the last ones.",
    "losses in stages": "Training over epochs, stage by stage: each begins with the best weights of the one before. "
    "The blue curve is the loss on rows that were held out, the dot marks the weights that were kept in the end. Where "
    "the training loss goes on falling while the held-out loss rises, the network over-fits: that is why the weights "
    "at the dot are used and not the last ones.",
    "posterior of one": "The density of the parameter, with the prior as a dotted line. Where the true value is known "
    "it is drawn in red, where the exact posterior is known it is drawn in dashed black.",
    "posterior": "Diagonal: the density of each parameter, with the prior as a dotted line. Below it: regions that "
    "hold 50% and 90% of the probability of two parameters. Where the true values are known they are drawn in red, "
    "where the exact posterior is known it is drawn in dashed black.",
    "coverage": "How often the true parameters lay inside the credible region, against how often they should. Inside "
    "the grey band nothing is wrong that so many test observations could show. Below it the posterior is too sure of "
    "itself, above it too cautious.",
    "ranks": "Where the true parameters rank among posterior draws. A calibrated posterior gives flat histograms "
    "inside the grey band; a U means too narrow, a hump too wide, a slope biased.",
}


def described(results: Record, figures: Path) -> list[str]:
    """One strategy in full, the best where that is known, then the others in short."""
    records = results.get("strategies") or []
    if len(records) < 2:
        record = records[0] if records else {}
        return [
            section("How training went", *_training(record), _losses(record, figures / "losses.png")),
            section("The posterior", *_posterior(record), _draws(record, figures / "posterior.png")),
            section("Can it be trusted?", *_trust(results, record, figures, tail="")),
        ]
    best, *others = ranked(records)
    name = str(best["name"])
    if all(record.get("error") for record in others):
        why = "the only one that could be trained"
    else:
        why = "the best here" if results.get("comparison") else "the first that was asked for"
    return [
        section(
            f"How '{name}' was trained",
            paragraph(f"'{name}', {why}, is shown in full; the others follow in short."),
            *_training(best), _losses(best, figures / f"losses-{name}.png"),
        ),
        section(f"The posterior of '{name}'", *_posterior(best), _draws(best, figures / f"posterior-{name}.png")),
        section(f"Can '{name}' be trusted?", *_trust(results, best, figures, tail=f"-{name}")),
        section("The other strategies, in short", *(text for record in others for text in _short(record, figures))),
    ]  # fmt: skip


def _training(record: Record) -> list[str]:
    """One line a network."""
    networks = record.get("training") or []
    if not networks:
        return [paragraph("No training was recorded.")]
    mixed = bool(networks[0].get("mixture"))  # then there is one best epoch a strategy
    # Stages of several levels have rows of each of them: more numbers than stages.
    plain = not mixed and not (_staged(record) and any(
        len(network["n_train"]) != len(str(network["stopped"]).split("; then ")) for network in networks))
    header = ["network", "epochs", *([] if mixed else ["best epoch"]), "held-out loss",
              *(["rows trained on", "rows held out"] if plain else []), "seconds"]
    # Gradients of terms are compared only where a loss has several, and not if one was always zero.
    optional = {"projected": "steps projected", "cosine": "mean cosine"}
    present = [key for key in optional if any(_nonzero(network.get(key)) for network in networks)]
    rows: list[list[Cell]] = []
    for index, network in enumerate(networks, start=1):
        row: list[Cell] = [str(index), network["epochs"], *([] if mixed else [network["best_epoch"]])]
        row += [measured(network["best_loss"]), *([joined(network["n_train"]), joined(network["n_validation"])]
                                                  if plain else [])]
        row.append(measured(network.get("seconds")))
        rows.append([*row, *(percent(network.get(key)) if key == "projected" else measured(network.get(key))
                             for key in present)])
    staged = _staged(record)
    caption = f"Rows {'of each stage' if staged else 'per level'}, cheapest first." \
        if any(len(network["n_train"]) > 1 for network in networks) and plain else ""
    if "cosine" in present:
        caption += " The cosine is that of the angle between the gradients of the cheapest level and of the " \
                   "correction; below 0 they pull against each other."
    reasons = list(dict.fromkeys(_reason(str(network["stopped"])) for network in networks if network.get("stopped")))
    notes = list(dict.fromkeys(str(note) for network in networks for note in network.get("notes") or ()))
    return [
        *_mixed(networks),
        paragraph(f"Training stopped: {'; '.join(reasons)}." if reasons else "",
                  "Epochs are counted through all stages; the best one is of the last." if staged and not mixed
                  else "",
                  "Some steps were projected because the gradient of the cheapest level and that of the correction "
                  "pulled against each other; such a step is no longer an unbiased estimate of the gradient."
                  if "projected" in present else "",
                  *(f"{note[:1].upper()}{note[1:]}." for note in notes)),
        table([*header, *(optional[key] for key in present)], rows, caption.strip()),
    ]  # fmt: skip


def _mixed(networks: Sequence[Record]) -> list[str]:
    """What a mixture of strategies weighted and why."""
    mixture = networks[0].get("mixture") or []
    if not mixture:
        return []
    rows: list[list[Cell]] = [
        [str(own["strategy"]), percent(own["weight"]),
         "failed" if own["held_out"] is None else give_or_take(own["held_out"], own["standard_error"]),
         measured(sum(part["mixture"][index]["seconds"] for part in networks))]
        for index, own in enumerate(mixture)
    ]
    return [
        paragraph(f"Every network is a mixture of {number(len(mixture))} strategies, weighted by how well the mixture "
                  "predicts runs of the finest level that its networks have not seen."),
        table(["strategy", "weight", "its own loss on held-out rows", "seconds"], rows,
              "The loss is in the units of standardised rows: what counts is the difference between two. A strategy "
              "that does worse alone may still have weight, where it is right and others are not."),
    ]


def _losses(record: Record, path: Path) -> str:
    return figure(path, _CAPTIONS["losses in stages" if _staged(record) else "losses"])


def _posterior(record: Record) -> list[str]:
    """Summaries of the posterior at one observation."""
    found = part(record, "posterior")
    if not found:
        return [paragraph("No observation was given, so no posterior was drawn.")]
    quantiles = found.get("quantiles") or {}
    columns: list[tuple[str, Sequence[Any] | None]] = [
        ("mean", found["mean"]), ("sd", found["sd"]),
        *((f"{float(level):.0%}", quantiles[level]) for level in sorted(quantiles, key=float)),
        ("most probable", found.get("map")), ("truth", found.get("truth")),
        ("sd / prior sd", found.get("shrinkage")),
    ]  # fmt: skip
    shown = [(name, [measured(value) for value in values]) for name, values in columns if values is not None]
    rows = [[str(name), *(values[index] for _, values in shown)] for index, name in enumerate(found["names"])]
    return [
        paragraph(f"Observation: {found['observation']}." if found.get("observation") else "", _tightest(found)),
        table(["parameter", *(name for name, _ in shown)], rows, "Percentages are quantiles of the posterior."),
        paragraph("" if found.get("truth") is not None else "The true parameters of this observation are not known."),
        *_chain(part(found, "mcmc")),
    ]


def _draws(record: Record, path: Path) -> str:
    names = part(record, "posterior").get("names") or []
    return figure(path, _CAPTIONS["posterior of one" if len(names) == 1 else "posterior"])


def _chain(mcmc: Record) -> list[str]:
    """How the chain of the observation went."""
    if not mcmc:
        return []
    rhat, effective = ([measured(value) for value in mcmc[key]] for key in ("rhat", "effective"))
    return [
        paragraph(
            f"The draws come from {number(mcmc['chains'])} Markov chains ({mcmc['method']}) of "
            f"{number(mcmc['steps'])} steps each, after {number(mcmc['warmup'])} that were thrown away while the "
            f"chains found their place. {percent(mcmc['acceptance'])} of the steps proposed were taken, in "
            f"{rounded(mcmc['seconds'], 2)} seconds.",
            f"R-hat, which is 1 where all chains agree, is at most {max(rhat):.3f}; the draws are worth at "
            f"least {number(round(min(effective)))} independent ones in every parameter."
            if all(map(math.isfinite, [*rhat, *effective])) else
            "R-hat, which tells whether the chains agree, could not be computed for every parameter.",
            "" if mcmc.get("warning") else "Nothing speaks against these chains.",
        ),
        paragraph(f"Warning: {mcmc['warning']}" if mcmc.get("warning") else ""),
    ]  # fmt: skip


def _trust(results: Record, record: Record, figures: Path, *, tail: str) -> list[str]:
    """The checks that the verdict rests on; `tail` ends the names of figures that each strategy has."""
    checks = part(record, "checks")
    if not checks:
        return [paragraph(
            "The posterior was not checked: there were no test simulations of the finest level with known parameters. "
            "Do not rely on its width before some have been made."
        )]  # fmt: skip
    question = part(results, "asked")
    names = [str(name) for name in part(record, "posterior").get("names") or question.get("parameters") or []]
    m = question.get("observations") or 1
    exact = any(checks.get(key) is not None for key in ("reference_nlpd", "kld", "likelihood_kld"))
    return [
        paragraph(
            f"All checks use {number(checks['n_test'])} observations{f' of {number(m)} outputs each' if m > 1 else ''} "
            "of the finest level, whose parameters are known and which were not trained on, with "
            f"{number(checks['draws'])} posterior draws for each. The verdict at the top of this page rests on them.",
            *_test_chains(part(checks, "mcmc")),
        ),
        subheading("How much it knows"),
        table(["", "mean", "median", "standard error"], _scores(checks),
              "Negative log density of the true parameters and divergences from what is exact, in nats: lower is "
              "better."),
        "" if exact else paragraph(
            "No exact or reference posterior is known for this task, so how far this one is from the best possible "
            "cannot be said."
        ),
        _error_table(checks, names),
        _merit(part(checks, "fom")),
        subheading("Whether its probabilities come true"),
        _coverage_table(part(checks, "coverage")),
        "" if tail else figure(figures / "coverage.png", _CAPTIONS["coverage"]),
        _uniformity_table(checks, names),
        _uneven(part(checks, "calibration_error")),
        figure(figures / f"ranks{tail}.png", _CAPTIONS["ranks"]),
    ]  # fmt: skip


def _short(record: Record, figures: Path) -> list[str]:
    """How one strategy was trained and how its ranks are spread; the rest is in the comparison."""
    name = str(record["name"])
    if record.get("error"):
        return [subheading(name), paragraph(f"Training failed: {record['error']}")]
    mcmc = part(part(record, "posterior"), "mcmc")
    return [
        subheading(name),
        *_training(record),
        figure(figures / f"losses-{name}.png", f"Training of '{name}'{_IN_STAGES if _staged(record) else ''}."),
        paragraph(f"Of the observation's chain: {mcmc['warning']}") if mcmc.get("warning") else "",
        figure(figures / f"ranks-{name}.png", f"Ranks of the truth under '{name}': flat is good."),
    ]  # fmt: skip


def _test_chains(mcmc: Record) -> list[str]:
    if not mcmc:
        return []
    chains, converged = mcmc["chains"], mcmc["converged"]
    if converged == chains:
        told = f"all {number(chains)} converged"
    else:
        told = f"{number(chains - converged)} of {number(chains)} did not converge, so the checks are uncertain too"
    error = measured(mcmc.get("normaliser_error"))
    return [f"The posterior of each was sampled by {mcmc['method']}: {told}; the least of them has "
            f"{number(round(measured(mcmc['least_effective'])))} effective draws.",
            "" if error is None else "Its density was normalised by importance sampling; the standard error is at "
            f"most {rounded(error, 2)} nats."]


def _scores(checks: Record) -> list[list[Cell]]:
    rows: list[list[Cell]] = [_score_row("this posterior", part(checks, "nlpd"))]
    rows.append(["prior", measured(checks.get("prior_nlpd")), None, None])
    if measured(checks.get("reference_nlpd")) is not None:
        rows.append(["exact posterior", measured(checks["reference_nlpd"]), None, None])
    for key, name in (("kld", "divergence from the exact posterior (KL)"),
                      ("likelihood_kld", "divergence from the exact likelihood (KL), per output")):
        if checks.get(key):
            rows.append(_score_row(name, checks[key]))
    return rows


def _score_row(name: str, score: Record) -> list[Cell]:
    return [name, *(measured(score.get(key)) for key in ("mean", "median", "standard_error"))]


def _error_table(checks: Record, names: Sequence[str]) -> str:
    squared, relative = checks.get("mse"), checks.get("nrmse")
    if not squared or not relative:
        return ""
    rows = [[name, measured(one), measured(other)] for name, one, other in zip(names, squared, relative, strict=True)]
    return table(["parameter", "mean squared error", "its root / prior sd"], rows,
                 "How far the posterior's mean is from the true parameter. In units of the prior's standard deviation, "
                 "an error of 1 is what guessing the prior's mean gives.")


def _merit(fom: Record) -> str:
    if not fom:
        return ""
    return paragraph(
        f"Figure of merit: {give_or_take(fom['mean'], fom['standard_error'])}. It is one over the size of the "
        "posterior's covariance (its determinant to the power 1 / number of parameters, with the prior's box scaled to "
        "1): higher is narrower, right or not."
    )  # fmt: skip


def _coverage_table(coverage: Record) -> str:
    if not coverage:
        return paragraph("Coverage was not computed.")
    return table(["probability stated", *map(percent, coverage["credibility"])],
                 [["share that held the truth", *map(percent, coverage["found"])]],
                 "Highest-density regions: the smallest that hold the probability stated.")


def _uniformity_table(checks: Record, names: Sequence[str]) -> str:
    """P-values of all tests of calibration, each with what speaks against the posterior."""
    ranks = part(checks, "sbc").get("p") or []
    tests = [("regions of highest density, of every size", part(checks, "coverage").get("p"), ALARM),
             ("regions around random points (TARP)", part(checks, "tarp").get("p"), ALARM),
             *((f"ranks of {name}", p, ALARM / len(names)) for name, p in zip(names, ranks, strict=bool(ranks)))]
    rows: list[list[Cell]] = [[name, rounded(p, 2), rounded(alarm, 2)] for name, p, alarm in tests if p is not None]
    if not rows:
        return ""
    together = "; of ranks it must be lower, for the lowest of several is low by chance" if len(ranks) > 1 else ""
    return table(["test", "p", "alarm below"], rows,
                 "p: how often a posterior without fault would look at least as wrong. Below the last column it speaks "
                 f"against this posterior{together}. Regions around random points need no density, but cannot tell a "
                 "posterior from the prior. Ranks are those of the truth among posterior draws (simulation-based "
                 "calibration).")


def _uneven(error: Record) -> str:
    if not error:
        return ""
    return paragraph(f"Calibration error, how uneven the sizes of the regions are that just hold the truth: "
                     f"{rounded(error['value'], 2)}. A posterior without fault gives "
                     f"{give_or_take(error['null'], error['null_sd'])} (± one standard deviation).")


def _tightest(record: Record) -> str:
    shrinkage = [measured(value) for value in record.get("shrinkage") or []]
    known = [(value, str(name)) for value, name in zip(shrinkage, record["names"], strict=True) if value is not None] \
        if shrinkage else []
    if not known:
        return ""
    least, name = min(known)
    most, loosest = max(known)
    if name == loosest:
        return f"Its standard deviation is {percent(least)} of the prior's."
    return (f"The observation tells most about {name}, whose standard deviation is {percent(least)} of the prior's, "
            f"and least about {loosest} ({percent(most)}).")


def _staged(record: Record) -> bool:
    """Whether training went in stages: every stage then has a reason to stop of its own."""
    return any("; then " in str(network.get("stopped")) for network in record.get("training") or [])


def _reason(stopped: str) -> str:
    """Why training stopped, once where all stages stopped alike."""
    stages = stopped.split("; then ")
    different = list(dict.fromkeys(stages))
    if len(different) == 1:
        return f"{stages[0]}, in every stage" if len(stages) > 1 else stopped
    return stopped if len(stages) < 4 else f"{' or '.join(different)}, stage by stage"


def _nonzero(value: Any) -> bool:
    found = measured(value)
    return found is not None and found != 0 and not math.isnan(found)
