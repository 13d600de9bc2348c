r"""Parts of an HTML page: sections, tables, figures; all text is escaped here."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

__all__ = [
    "Cell", "code", "facts", "figure", "heading", "listing", "number", "page", "paragraph", "section", "subheading",
    "summary", "table",
]

Cell: TypeAlias = str | float | int | None
"""Text, or a number that is set in figures and to the right; `None` is a dash."""

_MISSING = "–"
_FIGURES = re.compile(r"[−-]?[\d,.]+(e[+-]?\d+)?%?( \+ [\d,]+)*( ± [\d,.]+)?|–|undefined|−?∞")
_LONG, _SHORT = 1e7, 1e-4  # numbers outside are written with a power of ten

_STYLE = """
:root { --ink: #1f2328; --soft: #5c6570; --line: #d9dee3; --wash: #f5f7f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 900px; color: var(--ink); background: #fff;
  font: 16.5px/1.6 Charter, "Bitstream Charter", "Source Serif 4", Cambria, Georgia, "Liberation Serif", serif; }
h1, h2, h3, th, td, dt, dd, figcaption, .meta, .caption { font-family: "Helvetica Neue", Helvetica, Arial,
  "Liberation Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .5rem; }
p { margin: .7rem 0; }
.meta { color: var(--soft); font-size: .88rem; margin: 0 0 1.6rem; }
.summary { background: var(--wash); border-left: 4px solid var(--accent); padding: 1rem 1.3rem; margin: 1.5rem 0; }
.summary h2 { border: 0; margin: 0 0 .3rem; padding: 0; font-size: 1rem; }
.summary ul { margin: .3rem 0; }
ul { padding-left: 1.2rem; margin: .6rem 0; }
li { margin: .25rem 0; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem; line-height: 1.4; }
p.caption { color: var(--soft); margin: 0 0 .5rem; font-size: .86rem; line-height: 1.45; break-after: avoid; }
th { font-weight: 600; text-align: left; vertical-align: bottom; border-bottom: 1.5px solid var(--ink); }
th, td { padding: .32rem 0 .32rem 1.2rem; }
th:first-child, td:first-child { padding-left: 0; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
th.number { max-width: 8.5rem; }
td { border-bottom: 1px solid var(--line); vertical-align: top; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; font-size: .9rem; line-height: 1.45;
  margin: 1rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.8rem 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: .86rem; line-height: 1.45; color: var(--soft); margin-top: .7rem; }
pre { background: var(--wash); padding: .8rem 1rem; font: .82rem/1.5 "SF Mono", Menlo, Consolas, "Liberation Mono",
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2, h3 { break-after: avoid; }
  figure, table, .summary { break-inside: avoid; }
  .summary, pre { border: 1px solid var(--line); border-left: 4px solid var(--accent); }
}
"""


def page(title: str, *parts: str) -> str:
    """A whole document that needs nothing beside it."""
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    r"""A heading and what belongs under it; empty parts are left out.

    Example:
        >>> section("What was spent", "<p>Nothing.</p>")
        '<section id="what-was-spent">\n<h2>What was spent</h2>\n<p>Nothing.</p>\n</section>'
    """
    anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    body = "\n".join(part for part in parts if part)
    return f'<section id="{anchor}">\n<h2>{html.escape(title)}</h2>\n{body}\n</section>'


def heading(title: str, remark: str = "") -> str:
    """The title of the page, and a line about it."""
    return f'<h1>{html.escape(title)}</h1>\n<p class="meta">{html.escape(remark)}</p>'


def subheading(title: str) -> str:
    """A title within a section."""
    return f"<h3>{html.escape(title)}</h3>"


def summary(sentences: Iterable[str]) -> str:
    """The box at the top."""
    return f'<div class="summary">\n<h2>In short</h2>\n{listing(sentences)}\n</div>'


def paragraph(*sentences: str) -> str:
    """Sentences in a row; empty ones are left out."""
    text = " ".join(sentence for sentence in sentences if sentence)
    return f"<p>{html.escape(text)}</p>" if text else ""


def listing(sentences: Iterable[str]) -> str:
    """One bullet a sentence."""
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def code(text: str) -> str:
    """Something to copy into a terminal."""
    return f"<pre>{html.escape(text)}</pre>"


def facts(entries: Iterable[tuple[str, Cell]]) -> str:
    """Names with their values; entries without a value are left out."""
    shown = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(_text(value))}</dd>" for name, value in entries
        if value is not None and value != ""
    )  # fmt: skip
    return f"<dl>{shown}</dl>" if shown else ""


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> str:
    """A table; a column of numbers, percentages, sums and dashes is aligned to the right.

    Raises:
        ValueError: If a row is not as long as the header.

    Example:
        >>> table(["level", "n"], [["low", 1000], ["high", None]]).count('class="number"')
        3
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"Expected rows of {len(header)} cells, as many as the header; got {len(row)}: {row}.")
    numeric = [all(_FIGURES.fullmatch(_text(row[i])) for row in rows) for i in range(len(header))]
    mark = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(f"<th{m}>{html.escape(name)}</th>" for m, name in zip(mark, header, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{m}>{html.escape(_text(cell))}</td>" for m, cell in zip(mark, row, strict=True)) + "</tr>"
        for row in rows
    )
    title = f'<p class="caption">{html.escape(caption)}</p>' if caption else ""
    return f'<div class="wide">{title}<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def figure(path: Path, caption: str) -> str:
    """A PNG as part of the page, with how to read it; nothing where the file does not exist."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    text = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def number(value: float | None, digits: int = 4) -> str:
    """A number as people write it.

    Example:
        >>> number(11000.0), number(0.04567, 3), number(2.5e-7), number(float("inf")), number(None)
        ('11,000', '0.0457', '2.5e-07', '∞', '–')
    """
    if value is None:
        return _MISSING
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if isinstance(value, int) or (10 ** (digits - 1) <= size < _LONG and value == round(value)):
        text = f"{value:,.0f}"
    elif size >= 10 ** (digits - 1) and size < _LONG:
        text = f"{value:,.1f}" if size < 10**digits else f"{value:,.0f}"
    elif value == 0 or size >= _SHORT:
        text = f"{value:.{digits}g}"
    else:
        text = f"{value:.{min(digits, 3)}g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else number(cell)
