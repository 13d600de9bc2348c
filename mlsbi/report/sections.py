r"""The sections of the report about the run as a whole: what was asked, planned and spent."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlsbi.report.checking import lost_rows, worst_level
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
from mlsbi.report.wording import (
    Record,
    cell,
    joined,
    measured,
    named,
    options_text,
    part,
    percent,
    unit_of,
)

__all__ = ["asked", "opening", "plan", "reproduce", "spent"]

_CAPTIONS = {
    "coupled": "The same parameters and the same random numbers, run through the finest level and the one below it. "
    "The more closely the two agree, the less the finest level adds and the fewer of its runs are needed.",
    "samples": "Samples of the only level.",
    "pilot": "What the pilot measured. Levels pay off where the correction (filled) varies much less than the level "
    "itself (outlined) and the level below is much cheaper.",
    "plan": "How rows, cost and variance are split over the levels. Where a level's share of the cost and its share of "
    "the variance agree, moving runs between levels cannot help.",
    "errors": "The error that a budget would buy with all levels, without each of them, and with the finest alone, by "
    "the pilot's variances. A level is worth its runs where the line without it lies above that of all levels.",
}
_WORDS = ("level", "state")  # columns of names, which may be digits
_ESTIMATORS = {
    "npe": "posterior network (neural posterior estimation)",
    "nle": "likelihood network (neural likelihood estimation)",
}


def opening(results: Record) -> str:
    """Title, date and the verdict."""
    question = part(results, "asked")
    title = question.get("title") or question.get("task") or "Results of a run"
    created = str(results.get("created") or "").replace("T", " ")[:16]
    version = part(results, "versions").get("mlsbi")
    meta = [f"Task {question['task']}" if question.get("task") else "", f"run on {created}" if created else "",
            f"mlsbi {version}" if version else ""]
    verdict = results.get("verdict") or ["No verdict was recorded for this run: judge by the checks below."]
    return heading(str(title).rstrip("."), ", ".join(one for one in meta if one)) + summary(
        re.sub(r"(?<=\s)-(?=\d)", "\u2212", str(sentence).replace(" +- ", " ± ")) for sentence in verdict
    )


def asked(results: Record, figures: Path) -> str:
    """The question: parameters, levels and how they were to be used."""
    question = part(results, "asked")
    density, embedding, transform = part(question, "density"), part(question, "embedding"), question.get("x_transform")
    m, several = question.get("observations") or 1, len(question.get("strategies") or []) > 1
    each = " for each strategy" if several else ""
    budget, n = measured(question.get("budget")), question.get("n")
    members = sorted(set(question.get("networks") or [])) or [question.get("ensemble")]
    unit = unit_of(results)
    entries: list[tuple[str, Cell]] = [
        ("Parameters", ", ".join(map(str, question.get("parameters") or []))),
        ("Strategies" if several else "Strategy", _strategies(results)),
        ("Estimator", _ESTIMATORS.get(str(question.get("estimator")), question.get("estimator"))),
        ("Density", named(density.get("name"), density.get("options"))),
        ("Embedding", named(embedding.get("name"), embedding.get("options"))),
        ("Outputs", f"through {transform}, then standardised" if transform not in (None, "none") else None),
        ("One observation", f"{number(m)} outputs at the same parameters" if m > 1 else None),
        ("Training", options_text(question.get("training"))),
        ("Budget", None if budget is None else f"{number(budget)} {unit}"),
        ("Rows asked for", None if not n else _by_level(results, n)),
        ("Networks", None if members == [None] else f"1{each}" if members == [1]
         else f"{' or '.join(map(str, members))}{each}, mixed with equal weight"),
        ("Seed", question.get("seed")),
        ("Device", question.get("device")),
        ("Source", question.get("citation")),
    ]
    levels = results.get("levels") or []
    rows = [[str(level["name"]), measured(level.get("cost"))] for level in levels]
    return section(
        "What was asked",
        paragraph(
            f"Which parameters explain {f'{number(m)} outputs' if m > 1 else 'an observation'}"
            f"{' of the finest level below' if len(levels) > 1 else ''}, given a prior and simulations?",
            "Cheaper levels stand in for most of the runs; runs of two levels at the same parameters and random "
            "numbers tell what they get wrong." if len(levels) > 1 else "",
            "What is learned is the likelihood of one output given the parameters; the posterior follows from it and "
            "the prior, and is sampled by Markov chains." if question.get("estimator") == "nle" else "",
        ),
        facts(entries),
        table(["level, cheapest first", f"cost of one run ({unit})"], rows) if rows else "",
        figure(figures / "coupled.png", _CAPTIONS["samples" if len(levels) == 1 else "coupled"]),
    )  # fmt: skip


def plan(results: Record, figures: Path) -> str:
    """The split of the budget, and what it rests on."""
    allocation, pilot = results.get("plan"), results.get("pilot")
    if allocation:
        rows = zip(
            map(str, allocation["names"]), map(measured, allocation["pair_costs"]), _variances(allocation),
            allocation["n"], allocation["rows"], map(percent, allocation["shares"]), strict=True,
        )  # fmt: skip
        header = ["level", "cost per row", "variance", "rows", "of them there already", "share of variance"]
        body = [
            paragraph(
                "Rows are split so that the multilevel loss varies least for its cost: each level gets rows in "
                "proportion to the square root of its variance over its cost, rounded to the best whole numbers.",
                f"The plan costs {number(measured(allocation['cost']))} {unit_of(results)}.",
                _speedup(allocation.get("speedup")),
            ),
            table(header, [list(row) for row in rows]),
            listing(map(str, allocation.get("advice") or [])),
            paragraph("Bounds that were in force: " + "; ".join(map(str, allocation["binding"])) + ".")
            if allocation.get("binding") else "",
            _figure(figures, "plan"),
            _figure(figures, "errors") if (pilot or {}).get("curves") else "",
        ]  # fmt: skip
    else:
        body = [paragraph(str(results.get("plan_note") or "The number of rows was given; nothing was planned."))]
    return section("The plan, and why", *body, *_rounds(results), *_pilot(pilot, results, figures))


def _rounds(results: Record) -> list[str]:
    """What each round of an adaptive campaign knew and bought."""
    rounds = results.get("rounds")
    if not rounds:
        return []
    return [
        subheading("The rounds"),
        paragraph("The budget was spent in rounds. Before each, the variances were measured anew on all rows so far."),
        _table_of(rounds),
    ]


def _pilot(pilot: Record | None, results: Record, figures: Path) -> list[str]:
    if not pilot:
        return [paragraph("No pilot was run, so the variances of the levels were not measured.")]
    sizes, integrand = pilot.get("sizes"), pilot.get("integrand") or "loss"
    of = ("simulators' standardised outputs" if integrand == "output" else
          f"network's {integrand}, on rows that the pilot's networks were not trained on")
    return [
        subheading("The pilot"),
        paragraph(f"{number(pilot['n'])} parameters were run through every level with the same random numbers, for "
                  f"{number(measured(pilot['spent']))} {unit_of(results)}. Variances are of the {of}."),
        _table_of(pilot["table"]),
        listing(map(str, pilot["warnings"])) if pilot.get("warnings") else paragraph("The pilot gave no warning."),
        _figure(figures, "pilot"),
        *([paragraph(f"What {number(measured(results['plan']['cost']))} {unit_of(results)} beside the pilot would buy, "
                     "by the variances at each state of its network, with 90% intervals from resampled rows:"),
           _table_of(sizes)] if sizes and results.get("plan") else []),
    ]


def _table_of(frame: Record) -> str:
    columns = list(map(str, frame["columns"]))
    return table(columns, [[str(entry) if column in _WORDS else cell(entry)
                            for column, entry in zip(columns, row, strict=True)] for row in frame["rows"]])


def spent(results: Record, figures: Path) -> str:
    """Simulator runs that were made, what the same cost buys on the finest level alone, and what failed."""
    record = part(results, "spent")
    if not record:
        return section("What was spent", paragraph("The runs that were made were not recorded."))
    names = [str(level["name"]) for level in results.get("levels") or []] or list(map(str, range(len(record["n"]))))
    header, columns = ["level", "rows", "simulator runs"], [names, record["n"], record["runs"]]
    if any(record["failures"]):
        header += ["failed", "share that failed"]
        columns += [record["failures"], [percent(lost / (rows + lost) if lost else 0.0) for rows, lost in
                                         zip(record["n"], record["failures"], strict=True)]]
    if record.get("seconds"):
        header.append("seconds")
        columns.append([measured(value) for value in record["seconds"]])
    cost, alone = measured(record.get("cost")), measured(record.get("high_only_n"))
    further = record.get("test_runs") or 0
    tested = any(one.get("checks") for one in results.get("strategies") or [])
    return section(
        "What was spent",
        paragraph(
            f"All simulations cost {number(cost)} {unit_of(results)}." if cost is not None else "",
            f"The same would buy {number(math.floor(alone))} runs of the finest level alone."
            if alone is not None and math.isfinite(alone) and len(names) > 1 else "",
            f"{number(further)} further run{'s' if further > 1 else ''} of the finest level, at a cost of "
            f"{number(measured(record['test_cost']))} {unit_of(results)}, "
            f"{'served to test the posterior' if tested else 'made the observation'}; no budget counts "
            f"{'them' if further > 1 else 'it'}." if further else "",
            "" if any(record["failures"]) else "No row failed.",
        ),
        table(header, [list(row) for row in zip(*columns, strict=True)],
              "Rows are what is trained on; a row above the cheapest level is a pair and takes a run of each level."
              if len(names) > 1 else ""),
        *_failed(results, names, figures),
    )  # fmt: skip


def _failed(results: Record, names: Sequence[str], figures: Path) -> list[str]:
    """What failed rows mean, and where in the prior they are."""
    worst, path = worst_level(results), figures / "failures.png"
    if worst is None:
        return []
    several = len(part(results, "asked").get("parameters") or []) > 1
    return [
        subheading("Rows that failed"),
        paragraph(
            *lost_rows(results),
            "A row fails if a simulator raises an error, runs out of time, gives NaN, infinite numbers or another "
            "shape, or kills its worker; mlsbi status, given this folder, counts the reasons.",
            "" if path.is_file() else "Where in the prior they are cannot be drawn: the run's store of simulations is "
                                      "not here, or cannot be read.",
        ),
        figure(path, f"Every row that the run kept whose finest level is '{names[worst]}', a pilot's and test rows "
               "included. "
               + ("Below the diagonal, rows that failed are red; on it is" if several else "Drawn is")
               + " the share that fails along each parameter, and dashed that of all rows. Where nearly everything "
               "fails, nothing was learned: do not rely on the posterior there."),
    ]  # fmt: skip


def reproduce(results: Record) -> str:
    """Command, seed, versions and files."""
    versions, files = part(results, "versions"), part(results, "files")
    seed = part(results, "asked").get("seed")
    return section(
        "How to reproduce this",
        code(str(results["command"])) if results.get("command") else paragraph("The command was not recorded."),
        paragraph(f"All randomness follows from seed {seed}." if seed is not None else "",
                  "Other versions, and other kinds of processor, can change the last digits."),
        facts([("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
               *((name.capitalize(), str(path)) for name, path in files.items() if path),
               *((f"Files of {record['name']}", ", ".join(map(str, part(record, "files").values())))
                 for record in results.get("strategies") or [])]),
    )  # fmt: skip


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
        return [", ".join(number(measured(output[level]), 3) for output in values) for level in range(len(values[0]))]
    return [measured(value) for value in values]


def _figure(figures: Path, name: str) -> str:
    return figure(figures / f"{name}.png", _CAPTIONS[name])


def _by_level(results: Record, n: Sequence[int]) -> str:
    levels = results.get("levels") or []
    if len(levels) != len(n):
        return joined(n)
    return ", ".join(f"{number(rows)} of {level['name']}" for rows, level in zip(n, levels, strict=True))




def _strategies(results: Record) -> str:
    """Names of the strategies with the options that were set."""
    records = {record["name"]: record for record in results.get("strategies") or []}
    levels = results.get("levels") or []
    told = []
    for name in part(results, "asked").get("strategies") or []:
        options = {key: value for key, value in part(records.get(name, {}), "options").items() if value is not None}
        level = options.get("level")
        if isinstance(level, int) and -len(levels) <= level < len(levels):
            options["level"] = str(levels[level]["name"])
        told.append(named(name, options))
    return "; ".join(told)
