r"""Numbers and names of a run's results as the report writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from mlsbi.report.elements import Cell, number

__all__ = [
    "Record", "cell", "decimals", "give_or_take", "joined", "measured", "named", "options_text", "part", "percent",
    "rounded", "unit_of",
]

Record: TypeAlias = Mapping[str, Any]


def measured(value: Any) -> Any:
    """A number that JSON may have had to write as "nan" or "inf"; several outputs' are summed up as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(number(measured(one)) for one in value)
    return float(value) if isinstance(value, str) else value


def cell(value: Any) -> Cell:
    """A table entry of unknown kind: words stay words, what could not be measured is a dash."""
    try:
        found = measured(value)
    except ValueError:
        return str(value)
    return None if isinstance(found, float) and math.isnan(found) else found


def percent(value: Any) -> str:
    """A share; a dash where there is none."""
    share = measured(value)
    return number(None) if share is None or math.isnan(share) else f"{share:.1%}".replace(".0%", "%")


def rounded(value: Any, digits: int) -> str:
    """A number with so many digits."""
    return number(measured(value), digits)


def give_or_take(mean: Any, error: Any, digits: int | None = None) -> str:
    """A number with its error, both with so many decimals; to the error's second digit when left out.

    Example:
        >>> give_or_take(-0.91234, 0.0512), give_or_take(12.3, None), give_or_take("inf", "nan"), give_or_take(3.0, 0.0)
        ('−0.912 ± 0.051', '12.3', '∞', '3 ± 0')
    """
    value, spread = measured(mean), measured(error)
    if value is None or spread is None or not (math.isfinite(value) and math.isfinite(spread)):
        return number(value)
    if digits is None:
        if spread == 0:
            return f"{number(value)} ± 0"
        digits = decimals([spread])
    return f"{value:,.{digits}f} ± {spread:,.{digits}f}".replace("-", "−")


def decimals(errors: Sequence[Any]) -> int:
    """Decimals that show two digits of the middle one of some errors; two where none is known."""
    known = sorted(spread for spread in map(measured, errors) if spread is not None and 0 < spread < math.inf)
    return min(max(1 - math.floor(math.log10(known[(len(known) - 1) // 2])), 0), 6) if known else 2


def part(results: Record, name: str) -> Record:
    """A part of the results, empty where it is missing or null."""
    return results.get(name) or {}


def unit_of(results: Record) -> str:
    """The unit of costs."""
    unit = str(results.get("cost_unit") or "")
    return "units" if unit in ("", "declared", "as declared") else unit


def joined(values: Sequence[int]) -> str:
    """Counts level by level."""
    return " + ".join(number(value) for value in values)


def named(name: Any, options: Record | None) -> str:
    """A name with its options in brackets."""
    told = options_text(options)
    return f"{name or ''} ({told})" if told else str(name or "")


def options_text(options: Record | None) -> str:
    """Options and their values in words."""
    return ", ".join(f"{key.replace('_', ' ')} {_option(value)}" for key, value in (options or {}).items())


def _option(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return number(value) if isinstance(value, (int, float)) else str(value)
