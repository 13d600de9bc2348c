r"""The section about rounds for one observation."""

from __future__ import annotations

from pathlib import Path

from mlsbi.report.elements import Cell, figure, listing, paragraph, section, subheading, table
from mlsbi.report.wording import Record, measured, part, unit_of

__all__ = ["told"]

_CAPTION = ("Above: the share of the prior that each round drew parameters from; new rows of each level, and those of "
            "earlier rounds that lie inside. Below: the posterior after each round, later ones darker, and dashed in "
            "black the exact one where it is known.")


def told(results: Record, figures: Path) -> str:
    """How the truncated prior shrank, what each round bought and what was lost; nothing where there were none."""
    found = results.get("sequential")
    if not found:
        return ""
    rounds, names = found["rounds"], [str(level["name"]) for level in results.get("levels") or []]
    unit, lost = unit_of(results), found.get("lost")
    header = ["round", "share of the prior", *(f"new rows of {name}" for name in names),
              *(f"inside, of {name}" for name in names), f"spent so far ({unit})", "share of its posterior outside"]
    header += ["share of the exact posterior outside", "divergence (nats)"] if lost is not None else []
    body: list[list[Cell]] = []
    for index, done in enumerate(rounds):
        row: list[Cell] = [str(index + 1), measured(done["share"]), *done["n"], *done["inside"],
                           measured(done["spent"]), measured(done["leakage"])]
        body.append(row + ([measured(lost[index]), measured(found["divergence"][index])] if lost is not None else []))
    parameters = list(map(str, part(results, "asked").get("parameters") or []))
    moments: list[list[Cell]] = [
        [str(index + 1), *(f"{mean:.4g} \u00b1 {sd:.2g}" for mean, sd in zip(done["mean"], done["sd"], strict=True))]
        for index, done in enumerate(rounds)
    ]
    bought: list[list[Cell]] = [[str(index + 1), *map(measured, done["variances"])]
                                for index, done in enumerate(rounds) if done["variances"] is not None]
    return section(
        "The rounds",
        paragraph(
            "After each round the prior was cut to where the density of any network of the round's ensemble is above "
            "that of all but a tiny share of its own draws, and the next round drew its parameters there. Inside, the "
            "posterior is the prior's. Rows of earlier rounds that lie inside were trained on again; others were left "
            "out.",
            "What lies outside is lost to later rounds, so that a posterior that was too narrow early stays so: the "
            "last columns say how much." if lost is not None else
            "What lies outside is lost to later rounds: a posterior that was too narrow early stays so.",
        ),
        table(header, body),
        listing(note for done in rounds for note in done["notes"]) if any(done["notes"] for done in rounds) else "",
        figure(figures / "rounds.png", _CAPTION),
        subheading("The posterior after each round"),
        table(["round", *(f"{name}, mean \u00b1 sd" for name in parameters)], moments),
        *([subheading("What decided how rows were bought"),
           paragraph("Variance of each level's correction, in the first round by a pilot, later by the rows inside."),
           table(["round", *names], bought)] if bought else []),
    )  # fmt: skip
