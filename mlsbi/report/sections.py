r"""Each section of the report, from the results of a run to HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mlsbi.report.checking import ALARM
from mlsbi.report.elements import (
    Cell,
    code,
    facts,
    figure,
    heading,
    listing,
    number,
    paragraph,
    section,
    subheading,
    summary,
    table,
)

__all__ = ["asked", "opening", "plan", "posterior", "reproduce", "spent", "training", "trust"]

Record: TypeAlias = Mapping[str, Any]

_CAPTIONS = {
    "coupled": "The same parameters and the same random numbers, run through the finest level and the one below it. "
    "The closer the two curves are, the less the finest level adds and the fewer of its runs are needed. On the right: "
    "how closely they agree, output by output.",
    "pilot": "What the pilot measured. Levels pay off where the correction (filled) varies much less than the level "
    "itself (outlined) and the level below is much cheaper.",
    "plan": "How rows, cost and variance are split over the levels. Where a level's share of the cost and its share of "
    "the variance agree, moving runs between levels cannot help.",
    "losses": "Training over epochs. The blue curve is the loss on rows that were held out, the dot marks the weights "
    "that were kept. Where the training loss goes on falling while the held-out loss rises, the network over-fits: "
    "that is why the weights at the dot are used and not the last ones.",
    "posterior of one": "The density of the parameter, with the prior as a dotted line. Where the true value is known "
    "it is drawn in red, where a reference posterior is known it is drawn in dashed black.",
    "posterior": "Diagonal: the density of each parameter, with the prior as a dotted line. Below it: regions that "
    "hold 50% and 90% of the probability of two parameters. Where the true values are known they are drawn in red, "
    "where a reference posterior is known it is drawn in dashed black.",
    "coverage": "How often the true parameters lay inside the credible region, against how often they should. Inside "
    "the grey band nothing is wrong that so many test observations could show. Below it the posterior is too sure of "
    "itself, above it too cautious.",
    "ranks": "Where the true parameters rank among posterior draws. A calibrated posterior gives flat histograms "
    "inside the grey band; a U means too narrow, a hump too wide, a slope biased.",
}


def opening(results: Record) -> str:
    """Title, date and the verdict."""
    question = _part(results, "asked")
    title = question.get("title") or question.get("task") or "Results of a run"
    created = str(results.get("created") or "").replace("T", " ")[:16]
    version = _part(results, "versions").get("mlsbi")
    meta = [f"Task {question['task']}" if question.get("task") else "", f"run on {created}" if created else "",
            f"mlsbi {version}" if version else ""]
    verdict = results.get("verdict") or ["No verdict was recorded for this run: judge by the checks below."]
    return heading(str(title).rstrip("."), ", ".join(part for part in meta if part)) + summary(map(str, verdict))


def asked(results: Record, figures: Path) -> str:
    """The question: parameters, levels and how they were to be used."""
    question = _part(results, "asked")
    density = question.get("density") or {}
    budget, n, members = _number(question.get("budget")), question.get("n"), question.get("ensemble")
    unit = _unit(results)
    entries: list[tuple[str, Cell]] = [
        ("Parameters", ", ".join(map(str, question.get("parameters") or []))),
        ("Strategy", _named(question.get("strategy"), question.get("strategy_options"))),
        ("Density estimator", _named(density.get("name"), density.get("options"))),
        ("Training", _options(question.get("training"))),
        ("Budget", None if budget is None else f"{number(budget)} {unit}"),
        ("Rows asked for", None if not n else _by_level(results, n)),
        ("Networks", None if members is None else f"{members}, mixed with equal weight" if members > 1 else "1"),
        ("Seed", question.get("seed")),
        ("Device", question.get("device")),
        ("Source", question.get("citation")),
    ]
    levels = results.get("levels") or []
    rows = [[str(level["name"]), _number(level.get("cost"))] for level in levels]
    return section(
        "What was asked",
        paragraph(
            "Which parameters explain an observation of the finest level below, given a prior and simulations?"
            if len(levels) > 1 else "Which parameters explain an observation, given a prior and simulations?",
            "Cheaper levels stand in for most of the runs; runs of two levels at the same parameters and random "
            "numbers correct what they get wrong." if len(levels) > 1 else "",
        ),
        facts(entries),
        table(["level, cheapest first", f"cost of one run ({unit})"], rows) if rows else "",
        _figure(figures, "coupled"),
    )  # fmt: skip


def plan(results: Record, figures: Path) -> str:
    """The split of the budget, and what it rests on."""
    allocation, pilot = results.get("plan"), results.get("pilot")
    if allocation:
        rows = zip(
            map(str, allocation["names"]), map(_number, allocation["pair_costs"]), _variances(allocation),
            allocation["n"], allocation["rows"], map(_percent, allocation["shares"]), strict=True,
        )  # fmt: skip
        header = ["level", "cost per row", "variance", "rows", "of them there already", "share of variance"]
        body = [
            paragraph(
                "Rows are split so that the multilevel loss varies least for its cost: each level gets rows in "
                "proportion to the square root of its variance over its cost, rounded to the best whole numbers.",
                f"The plan costs {number(_number(allocation['cost']))} {_unit(results)}.",
                _speedup(allocation.get("speedup")),
            ),
            table(header, [list(row) for row in rows]),
            listing(map(str, allocation.get("advice") or [])),
            paragraph("Bounds that were in force: " + "; ".join(map(str, allocation["binding"])) + ".")
            if allocation.get("binding") else "",
            _figure(figures, "plan"),
        ]  # fmt: skip
    else:
        body = [paragraph(str(results.get("plan_note") or "The number of rows was given; nothing was planned."))]
    return section("The plan, and why", *body, *_pilot(pilot, results, figures))


def _pilot(pilot: Record | None, results: Record, figures: Path) -> list[str]:
    if not pilot:
        return [paragraph("No pilot was run, so the variances of the levels were not measured.")]
    columns, rows = pilot["table"]["columns"], pilot["table"]["rows"]
    return [
        subheading("The pilot"),
        paragraph(f"{number(pilot['n'])} parameters were run through every level with the same random numbers, for "
                  f"{number(_number(pilot['spent']))} {_unit(results)}. A loss is compared on rows that the pilot's "
                  "networks were not trained on."),
        table(list(map(str, columns)), [[str(row[0]), *map(_cell, row[1:])] for row in rows]),
        listing(map(str, pilot["warnings"])) if pilot.get("warnings") else paragraph("The pilot gave no warning."),
        _figure(figures, "pilot"),
    ]


def spent(results: Record) -> str:
    """Simulator runs that were made, and what the same cost buys on the finest level alone."""
    record = _part(results, "spent")
    if not record:
        return section("What was spent", paragraph("The runs that were made were not recorded."))
    names = [str(level["name"]) for level in results.get("levels") or []] or list(map(str, range(len(record["n"]))))
    header, columns = ["level", "rows", "simulator runs", "left out"], [names, record["n"], record["runs"]]
    columns.append(record["failures"])
    if record.get("seconds"):
        header.append("seconds")
        columns.append([_number(value) for value in record["seconds"]])
    cost, alone = _number(record.get("cost")), _number(record.get("high_only_n"))
    lost = sum(record["failures"])
    return section(
        "What was spent",
        paragraph(
            f"All simulations cost {number(cost)} {_unit(results)}." if cost is not None else "",
            f"The same would buy {number(math.floor(alone))} runs of the finest level alone."
            if alone is not None and math.isfinite(alone) and len(names) > 1 else "",
            f"{number(record['test_runs'])} further runs of the finest level, at a cost of "
            f"{number(_number(record['test_cost']))} {_unit(results)}, served to test the posterior; no budget counts "
            "them." if record.get("test_runs") else "",
            f"{lost} rows were left out because an output was not finite." if lost else "",
        ),
        table(header, [list(row) for row in zip(*columns, strict=True)],
              "Rows are what is trained on; a row above the cheapest level is a pair and takes a run of each level."
              if len(names) > 1 else ""),
    )  # fmt: skip


def training(results: Record, figures: Path) -> str:
    """One line a network."""
    networks = results.get("training") or []
    if not networks:
        return section("How training went", paragraph("No training was recorded."), _figure(figures, "losses"))
    header = ["network", "epochs", "best epoch", "held-out loss", "rows trained on", "rows held out", "seconds"]
    optional = {"projected": "steps projected", "cosine": "mean cosine"}
    present = [key for key in optional if any(_number(network.get(key)) is not None for network in networks)]
    rows: list[list[Cell]] = []
    for index, network in enumerate(networks, start=1):
        row: list[Cell] = [str(index), network["epochs"], network["best_epoch"], _number(network["best_loss"])]
        row += [_joined(network["n_train"]), _joined(network["n_validation"]), _number(network.get("seconds"))]
        rows.append([*row, *(_percent(network.get(key)) if key == "projected" else _number(network.get(key))
                             for key in present)])
    reasons = list(dict.fromkeys(str(network["stopped"]) for network in networks if network.get("stopped")))
    adjusted = any((_number(network.get("projected")) or 0) > 0 for network in networks)
    return section(
        "How training went",
        paragraph(f"Training stopped: {'; '.join(reasons)}." if reasons else "",
                  "Some steps were projected because the gradient of the cheapest level and that of the correction "
                  "pulled against each other; such a step is no longer an unbiased estimate of the gradient."
                  if adjusted else ""),
        table([*header, *(optional[key] for key in present)], rows, "Rows per level, cheapest first."),
        _figure(figures, "losses"),
    )  # fmt: skip


def posterior(results: Record, figures: Path) -> str:
    """Summaries of the posterior at one observation."""
    record = _part(results, "posterior")
    if not record:
        return section("The posterior", paragraph("No observation was given, so no posterior was drawn."))
    quantiles = record.get("quantiles") or {}
    columns: list[tuple[str, Sequence[Any] | None]] = [
        ("mean", record["mean"]), ("sd", record["sd"]),
        *((f"{float(level):.0%}", quantiles[level]) for level in sorted(quantiles, key=float)),
        ("most probable", record.get("map")), ("truth", record.get("truth")),
        ("sd / prior sd", record.get("shrinkage")),
    ]  # fmt: skip
    shown = [(name, [_number(value) for value in values]) for name, values in columns if values is not None]
    rows = [[str(name), *(values[index] for _, values in shown)] for index, name in enumerate(record["names"])]
    tightest = _tightest(record)
    return section(
        "The posterior",
        paragraph(f"Observation: {record['observation']}." if record.get("observation") else "", tightest),
        table(["parameter", *(name for name, _ in shown)], rows, "Percentages are quantiles of the posterior."),
        paragraph("" if record.get("truth") is not None else "The true parameters of this observation are not known."),
        figure(figures / "posterior.png", _CAPTIONS["posterior of one" if len(rows) == 1 else "posterior"]),
    )


def trust(results: Record, figures: Path) -> str:
    """The checks that the verdict rests on."""
    checks = results.get("checks")
    title = "Can it be trusted?"
    if not checks:
        return section(title, paragraph(
            "The posterior was not checked: there were no test simulations of the finest level with known parameters. "
            "Do not rely on its width before some have been made."
        ))  # fmt: skip
    names = [str(name) for name in _part(results, "posterior").get("names") or _part(results, "asked")["parameters"]]
    return section(
        title,
        paragraph(f"All checks use {number(checks['n_test'])} observations of the finest level whose parameters are "
                  f"known and which were not trained on, with {number(checks['draws'])} posterior draws each. "
                  "The verdict at the top of this page rests on them."),
        subheading("How much it knows"),
        table(["", "mean", "median", "standard error"], _scores(checks),
              "Negative log density of the true parameters, in nats: lower is better."),
        "" if _number(checks.get("reference_nlpd")) is not None or checks.get("kld") else paragraph(
            "No exact or reference posterior is known for this task, so how far this one is from the best possible "
            "cannot be said."
        ),
        subheading("Whether its probabilities come true"),
        _coverage_table(checks.get("coverage")),
        _figure(figures, "coverage"),
        _sbc_table(checks.get("sbc"), names),
        _figure(figures, "ranks"),
    )  # fmt: skip


def reproduce(results: Record) -> str:
    """Command, seed, versions and files."""
    versions, files = _part(results, "versions"), _part(results, "files")
    seed = _part(results, "asked").get("seed")
    return section(
        "How to reproduce this",
        code(str(results["command"])) if results.get("command") else paragraph("The command was not recorded."),
        paragraph(f"All randomness follows from seed {seed}." if seed is not None else "",
                  "Other versions, and other kinds of processor, can change the last digits."),
        facts([("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
               *((name.capitalize(), str(path)) for name, path in files.items() if path)]),
    )  # fmt: skip


def _scores(checks: Record) -> list[list[Cell]]:
    rows: list[list[Cell]] = [_score_row("this posterior", _part(checks, "nlpd"))]
    rows.append(["prior", _number(checks.get("prior_nlpd")), None, None])
    if _number(checks.get("reference_nlpd")) is not None:
        rows.append(["reference posterior", _number(checks["reference_nlpd"]), None, None])
    if checks.get("kld"):
        rows.append(_score_row("divergence from the reference (KL)", checks["kld"]))
    return rows


def _score_row(name: str, score: Record) -> list[Cell]:
    return [name, *(_number(score.get(key)) for key in ("mean", "median", "standard_error"))]


def _coverage_table(coverage: Record | None) -> str:
    if not coverage:
        return paragraph("Coverage was not computed.")
    stated, found = coverage["credibility"], coverage["found"]
    p = _number(coverage.get("p"))
    note = "" if p is None else f" Kolmogorov-Smirnov test of calibration: p = {number(p, 2)}."
    return table(["credibility", *map(_percent, stated)], [["share that held the truth", *map(_percent, found)]],
                 f"Highest-density regions.{note}")


def _sbc_table(sbc: Record | None, names: Sequence[str]) -> str:
    if not sbc or not sbc.get("p"):
        return ""
    return table(["parameter", *names], [["p of uniform ranks", *(_rounded(p, 2) for p in sbc["p"])]],
                 f"Simulation-based calibration. {_together(len(names))} p below {number(ALARM / len(names), 2)} "
                 "speaks against it.")


def _together(tests: int) -> str:
    return "Only" if tests == 1 else f"With {tests} such tests, only"


def _tightest(record: Record) -> str:
    shrinkage = [_number(value) for value in record.get("shrinkage") or []]
    known = [(value, str(name)) for value, name in zip(shrinkage, record["names"], strict=True) if value is not None] \
        if shrinkage else []
    if not known:
        return ""
    least, name = min(known)
    most, loosest = max(known)
    if name == loosest:
        return f"Its standard deviation is {_percent(least)} of the prior's."
    return (f"The observation tells most about {name}, whose standard deviation is {_percent(least)} of the prior's, "
            f"and least about {loosest} ({_percent(most)}).")


def _speedup(value: Any) -> str:
    if value is None:
        return ""
    value = min(map(float, value)) if isinstance(value, (list, tuple)) else float(value)  # the output that gains least
    if value >= 1:
        return f"Runs of the finest level alone would have {number(value, 3)} times the variance for the same cost."
    return (f"For the same cost, runs of the finest level alone would have only {number(value, 3)} times the variance: "
            "these levels do not pay off.")


def _variances(allocation: Record) -> list[Cell]:
    """One entry per level; with several outputs those of each, joined."""
    values = allocation["variances"]
    if values and isinstance(values[0], (list, tuple)):
        return [", ".join(number(_number(output[level]), 3) for output in values) for level in range(len(values[0]))]
    return [_number(value) for value in values]


def _figure(figures: Path, name: str) -> str:
    return figure(figures / f"{name}.png", _CAPTIONS[name])


def _part(results: Record, name: str) -> Record:
    return results.get(name) or {}


def _unit(results: Record) -> str:
    unit = str(results.get("cost_unit") or "")
    return "units" if unit in ("", "declared", "as declared") else unit


def _by_level(results: Record, n: Sequence[int]) -> str:
    levels = results.get("levels") or []
    if len(levels) != len(n):
        return _joined(n)
    return ", ".join(f"{number(rows)} of {level['name']}" for rows, level in zip(n, levels, strict=True))


def _joined(values: Sequence[int]) -> str:
    return " + ".join(number(value) for value in values)


def _named(name: Any, options: Record | None) -> str:
    told = _options(options)
    return f"{name or ''} ({told})" if told else str(name or "")


def _options(options: Record | None) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_option(value)}" for key, value in (options or {}).items())


def _option(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return number(value) if isinstance(value, (int, float)) else str(value)


def _number(value: Any) -> Any:
    """A number that JSON may have had to write as "nan" or "inf"; several outputs' are summed up as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(number(_number(one)) for one in value)
    return float(value) if isinstance(value, str) else value


def _cell(value: Any) -> Cell:
    """A table entry of unknown kind: words stay words, what could not be measured is a dash."""
    try:
        measured = _number(value)
    except ValueError:
        return str(value)
    return None if isinstance(measured, float) and math.isnan(measured) else measured


def _percent(value: Any) -> str:
    share = _number(value)
    return number(None) if share is None or math.isnan(share) else f"{share:.1%}".replace(".0%", "%")


def _rounded(value: Any, digits: int) -> str:
    return number(_number(value), digits)
