r"""The section of the report that sets strategies beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mlsbi.report.checking import ALARM
from mlsbi.report.elements import Cell, facts, figure, listing, number, paragraph, section, table
from mlsbi.report.wording import Record, decimals, give_or_take, joined, measured, part, percent, rounded, unit_of

__all__ = ["compared", "ranked"]

_FAILED = "\u00a0(failed)"  # in one line with the name
_SHOWN = (0.5, 0.9)  # of the regions, in the comparison
_WHAT = {
    "multilevel": "one network learns from all levels at once: many cheap runs carry most of it, pairs of runs correct "
    "them",
    "transfer": "one network learns from the cheapest level first and goes on from there with the next, up to the "
    "finest",
    "transfer_then_multilevel": "one network learns from the cheaper levels one after the other and then from all "
    "levels at once",
    "translation": "outputs of the cheap levels are translated into the finest level's, by what pairs of runs share, "
    "and one network learns from all of them",
    "emulation": "a likelihood is learned first, by several networks, and the posterior from many draws of it",
    "auto": "most of these, mixed by how well they predict runs of the finest level that they have not seen",
    "high": "the finest level alone, as if there were no cheaper one",
    "low": "the cheapest level alone, as if it were the finest",
}
_CAPTIONS = {
    "quality": "What each strategy knows about the parameters, against what the simulations cost that it learns from: "
    "low and to the left is good. Bars reach two standard errors either way. Where bars overlap, the table above "
    "decides: it compares observation by observation.",
    "coverages": "How often the true parameters lay inside the credible region, against how often they should, one "
    "curve a strategy. Inside the grey band nothing is wrong that so many test observations could show. Below it a "
    "posterior is too sure of itself, above it too cautious.",
    "posteriors of one": "What each strategy concludes from the same observation, with the prior as a dotted line. "
    "Where the true value is known it is drawn in red, where the exact posterior is known it is drawn in dashed black.",
    "posteriors": "What each strategy concludes from the same observation. Diagonal: the density of each parameter, "
    "with the prior as a dotted line. Below it: the regions of two parameters that hold as much probability as the "
    "legend says. Where the true values are known they are drawn in red, where the exact posterior is known it is "
    "drawn in dashed black.",
}


def compared(results: Record, figures: Path) -> str:
    """All strategies beside each other; nothing where there is one."""
    records = results.get("strategies") or []
    if len(records) < 2:
        return ""
    done = [record for record in records if not record.get("error")]
    checked = [record for record in done if record.get("checks")]
    n_test = checked[0]["checks"]["n_test"] if checked else 0
    drawn = [record for record in done if record.get("posterior")]
    single = bool(drawn) and len(drawn[0]["posterior"]["names"]) == 1
    return section(
        "The strategies compared",
        paragraph(
            "All strategies were given the same simulations, but not all learn from all of them: what a strategy costs "
            "is what the runs cost that it learns from.",
            f"They are judged on the same {number(n_test)} observations of the finest level, whose parameters are "
            "known and which none of them learned from." if checked else
            "Nothing was checked, for there were no test simulations: which strategy is best cannot be said.",
        ),
        facts([(str(record["name"]), _WHAT.get(str(record["name"]))) for record in records]),
        listing(f"Training '{record['name']}' failed: {record['error']}" for record in records if record.get("error")),
        _score_table(results, ranked(records)),
        figure(figures / "quality.png", _CAPTIONS["quality"]),
        _calibration_table(checked),
        figure(figures / "coverage.png", _CAPTIONS["coverages"]),
        _estimate_table(drawn),
        figure(figures / "posterior.png", _CAPTIONS["posteriors of one" if single else "posteriors"]),
    )  # fmt: skip


def ranked(records: Sequence[Record]) -> list[Record]:
    """The best first, those without a score next in the order asked for, those that failed last."""

    def place(record: Record) -> tuple[bool, float]:
        score = measured(part(part(record, "checks"), "nlpd").get("mean"))
        return bool(record.get("error")), math.inf if score is None or math.isnan(score) else score

    return sorted(records, key=place)


def _score_table(results: Record, records: Sequence[Record]) -> str:
    """What each strategy learns from, what that cost and what it knows."""
    checks = [part(record, "checks") for record in records]
    comparison = part(results, "comparison")
    behind = part(comparison, "behind")
    columns: list[tuple[str, list[Cell]]] = [
        ("strategy", [f"{record['name']}{_FAILED if record.get('error') else ''}" for record in records]),
        ("runs it learns from", [joined(record["runs"]) if record.get("runs") else None for record in records]),
        (f"their cost ({unit_of(results)})", [measured(record.get("cost")) for record in records]),
        ("training, seconds", [_seconds(record) for record in records]),
    ]
    if any(checks):
        columns.append(("negative log density", _scores_of([check.get("nlpd") for check in checks])))
        columns.append(("behind the best", _scores_of([behind.get(record["name"]) for record in records])))
    for key, header in (("kld", "divergence from the exact posterior"),
                        ("likelihood_kld", "divergence from the exact likelihood, per output")):
        if any(check.get(key) for check in checks):
            columns.append((header, _scores_of([check.get(key) for check in checks])))
    found = next((check for check in checks if check), {})
    lines = [(name, found.get(key)) for name, key in (("prior", "prior_nlpd"), ("exact posterior", "reference_nlpd"))]
    scale = " and ".join(f"the {name}'s is {rounded(value, 3)}" for name, value in lines if measured(value) is not None)
    caption = "Runs are counted level by level, cheapest first."
    if found:
        caption += (
            " Negative log density of the true parameters, in nats per observation: lower is better"
            f"{f'; {scale}' if scale else ''}. Behind the best: the mean loss against it on the same observations, "
            "which cannot be told from nothing where it is below two standard errors. After ± stands one standard "
            "error."
        )
    return table([name for name, _ in columns], list(map(list, zip(*(values for _, values in columns), strict=True))),
                 caption)


def _calibration_table(records: Sequence[Record]) -> str:
    """Whether the stated probabilities of each strategy come true."""
    if not records:
        return ""
    checks = [record["checks"] for record in records]
    stated = part(checks[0], "coverage").get("credibility") or []
    header = ["strategy", *(f"truth in its {percent(level)} regions" for level in stated if level in _SHOWN),
              "p of coverage", "p of regions around random points", "smallest p of ranks", "calibration error"]
    chains = [part(check, "mcmc") for check in checks]
    if any(chains):
        header.append("posteriors that converged")
    rows: list[list[Cell]] = []
    for record, check in zip(records, checks, strict=True):
        coverage = part(check, "coverage")
        shares = zip(coverage.get("credibility") or [], coverage.get("found") or [], strict=True)
        ranks = [measured(p) for p in part(check, "sbc").get("p") or []]
        rows.append([
            str(record["name"]), *(percent(share) for level, share in shares if level in _SHOWN),
            _p(coverage), _p(part(check, "tarp")), rounded(min(ranks), 2) if ranks else None,
            rounded(part(check, "calibration_error").get("value"), 2),
        ])  # fmt: skip
        if any(chains):
            mcmc = part(check, "mcmc")
            rows[-1].append(percent(mcmc["converged"] / mcmc["chains"]) if mcmc else None)
    error = part(checks[0], "calibration_error")
    null = f"; without a fault it is {give_or_take(error['null'], error['null_sd'])} (± one standard deviation)" \
        if error else ""
    dim = max(len(part(check, "sbc").get("p") or [0]) for check in checks)
    apart = f", of ranks one below {number(ALARM / dim, 2)}" if dim > 1 else ""
    return table(
        header, rows,
        "Whether stated probabilities come true: how often the true parameters lay in the regions that hold so much of "
        "the probability, and how often a posterior without fault would look at least as wrong (p). A p below "
        f"{number(ALARM)} speaks against a posterior{apart}. "
        f"Calibration error: how uneven the levels of the regions are{null}.",
    )  # fmt: skip


def _estimate_table(records: Sequence[Record]) -> str:
    """Mean and standard deviation of each parameter from each strategy."""
    if not records:
        return ""
    first = records[0]["posterior"]
    truth = first.get("truth")
    rows: list[list[Cell]] = []
    for index, name in enumerate(first["names"]):
        row: list[Cell] = [str(name), *([measured(truth[index])] if truth is not None else [])]
        found = [(record["posterior"]["mean"][index], record["posterior"]["sd"][index]) for record in records]
        digits = decimals([sd for _, sd in found])
        rows.append([*row, *(give_or_take(mean, sd, digits) for mean, sd in found)])
    observation = first.get("observation")
    return table(
        ["parameter", *(["truth"] if truth is not None else []), *(str(record["name"]) for record in records)], rows,
        f"Mean ± standard deviation of the posteriors{f' given {observation}' if observation else ''}.",
    )  # fmt: skip


def _seconds(record: Record) -> float | None:
    found = [measured(network.get("seconds")) for network in record.get("training") or []]
    return float(f"{sum(found):.3g}") if found and None not in found else None


def _scores_of(scores: Sequence[Record | None]) -> list[Cell]:
    """Means with their errors, all to the same digit; a dash where there is no score."""
    digits = decimals([score.get("standard_error") for score in scores if score])
    return [give_or_take(score.get("mean"), score.get("standard_error"), digits) if score else None
            for score in scores]


def _p(record: Record) -> str:
    return rounded(record.get("p"), 2)
