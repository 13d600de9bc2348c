r"""What makes two stacks the same: a description in JSON, and its differences in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.distributions import Distribution

from mlsbi.levels import Level, LevelStack
from mlsbi.priors import parameter_names, sample_prior
from mlsbi.randomness import seeded
from mlsbi.simulation.sources import describe_code, strip_addresses

__all__ = ["compare_stacks", "describe_stack"]

_FORMAT = 1
_TOLERANCE = 1e-4  # of draws: other processors round differently


def describe_stack(stack: LevelStack) -> dict[str, Any]:
    r"""Describes the prior, the noise and the simulators of a stack, for `compare_stacks`.

    The prior and the noise are told by a few draws as well as in words; simulators, and the noise function, by their
    source without comments, docstrings and formatting, with the functions they call, eight deep, and the values they
    use: defaults, captured variables, globals, attributes, arguments of a `functools.partial`. Lists, dicts, namespaces
    and arrays count by value, unless the code itself changes them while it runs, as it does a cache. External programs
    count by the content of the files that their command names by a path.

    Not seen are the inside of libraries and of their objects, modules imported inside functions, and whatever is read
    when a simulator runs: data files, the environment, what a program calls in turn. Costs are left out, since they may
    be corrected. See `mlsbi.simulation.sources.describe_code`.

    Args:
        stack: The stack; torch's global random state is left as found.

    Returns:
        Plain dicts, lists, texts and numbers, the same in every process, and after a round trip through JSON.

    Example:
        >>> from mlsbi.levels import Level
        >>> from mlsbi.priors import BoxPrior
        >>> stack = LevelStack(BoxPrior([0.0], [1.0]), "seed", [Level("only", torch.add)])
        >>> describe_stack(stack)["levels"]
        [{'name': 'only', 'code': 'builtin add'}]
    """
    return {
        "format": _FORMAT,
        "prior": _describe_prior(stack.prior),
        "noise": _describe_noise(stack),
        "levels": [{"name": str(level.name), "code": _describe_level(level)} for level in stack.levels],
    }


def compare_stacks(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Tells how two descriptions of `describe_stack` differ.

    Args:
        stored: The earlier description.
        now: The present one.

    Returns:
        One sentence for the prior, the noise, the names of the levels, and each level whose code changed, where they
        differ; none if the stacks are the same. Draws may differ by a ten-thousandth.

    Example:
        >>> from mlsbi.levels import Level
        >>> from mlsbi.priors import BoxPrior
        >>> one, two = (LevelStack(BoxPrior([0.0], [b]), "seed", [Level("only", torch.add)]) for b in (1.0, 2.0))
        >>> compare_stacks(describe_stack(one), describe_stack(two))
        ['prior: stored `BoxPrior(theta_1 in [0, 1])`, now `BoxPrior(theta_1 in [0, 2])`']
    """
    if stored.get("format") != now.get("format"):
        return [f"description: stored in format {stored.get('format')}, now in format {now.get('format')}; stacks "
                "described by different versions of mlsbi cannot be compared"]
    differences = [_prior_difference(stored["prior"], now["prior"]), _noise_difference(stored["noise"], now["noise"])]
    before, after = ({level["name"]: level["code"] for level in each["levels"]} for each in (stored, now))
    if list(before) != list(after):
        differences.append(f"levels: stored {list(before)}, now {list(after)}")
    differences += [
        f"level '{name}': its code changed:\n{_diff(code, after[name])}"
        for name, code in before.items()
        if name in after and code != after[name]
    ]
    return [text for text in differences if text is not None]


def _describe_level(level: Level) -> str:
    code = describe_code(level.simulate)
    return code if level.parameters is None else f"parameters: {', '.join(level.parameters)}\n{code}"


def _describe_prior(prior: Distribution) -> dict[str, Any]:
    draws, names = sample_prior(prior, 8, seed=0), list(parameter_names(prior))
    return {
        "text": " ".join(strip_addresses(repr(prior)).split()),
        "class": type(prior).__name__,
        "names": names,
        "dtype": str(draws.dtype),
        "draws": {name: _numbers(draws[:, i]) for i, name in enumerate(names)},
    }


def _describe_noise(stack: LevelStack) -> dict[str, Any]:
    with seeded(0):  # of noise that draws from the global state as well, which is found and refused elsewhere
        noise = stack.draw_noise(4, Generator().manual_seed(0))
    leaves = {
        name: {
            "kind": f"{str(leaf.dtype).removeprefix('torch.')} {('n', *leaf.shape[1:])}".replace("'", ""),
            "draws": _numbers(leaf.reshape(4, -1)[:, :2].flatten()) if leaf.numel() else [],
        }
        for name, leaf in _leaves(noise)
    }
    return {"code": "one seed a row" if isinstance(stack.noise, str) else describe_code(stack.noise), "leaves": leaves}


def _leaves(noise: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(noise, dict):
        yield from ((f"noise[{key!r}]", leaf) for key, leaf in noise.items())
    elif isinstance(noise, tuple):
        yield from ((f"noise[{place}]", leaf) for place, leaf in enumerate(noise))
    else:
        yield "noise", noise


def _numbers(values: Tensor) -> list[Any]:
    """A flat list that JSON keeps; NaN and infinity, which it does not know, as texts."""
    flat = torch.view_as_real(values).flatten() if values.is_complex() else values.detach()
    return [value if np.isfinite(value) else str(value) for value in flat.tolist()]


def _prior_difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if stored["text"] != now["text"]:
        return f"prior: stored `{stored['text']}`, now `{now['text']}`"
    for what in ("class", "names", "dtype"):
        if stored[what] != now[what]:
            return f"prior: its {what} changed, stored {stored[what]}, now {now[what]}"
    return _changed_draws("prior", stored["draws"], now["draws"])


def _noise_difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    kinds, draws = ([{name: leaf[what] for name, leaf in each["leaves"].items()} for each in (stored, now)]
                    for what in ("kind", "draws"))
    found = f"noise: stored {kinds[0]}, now {kinds[1]}" if kinds[0] != kinds[1] else _changed_draws("noise", *draws)
    if stored["code"] == now["code"]:
        return found
    code = f"its code changed:\n{_diff(stored['code'], now['code'])}"
    return f"{found}; {code}" if found else f"noise: {code}"


def _changed_draws(what: str, stored: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> str | None:
    changed = [name for name in stored if not _close(stored[name], now[name])]
    if not changed:
        return None
    name = changed[0]
    others = f" (and those of {', '.join(changed[1:])})" if changed[1:] else ""
    return f"{what}: its draws changed, {name} stored {_short(stored[name])}, now {_short(now[name])}{others}"


def _close(stored: list[Any], now: list[Any]) -> bool:
    one, other = np.array(stored, float), np.array(now, float)  # texts as well, such as "nan"
    both = np.abs([*one, *other])
    scale = both.max(initial=0.0, where=np.isfinite(both))  # a draw that is zero but for rounding has no digits
    return one.shape == other.shape and np.allclose(
        one, other, rtol=_TOLERANCE, atol=1e-3 * _TOLERANCE * scale, equal_nan=True
    )


def _short(values: list[Any]) -> str:
    return "[" + ", ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values) + "]"


def _diff(stored: str, now: str) -> str:
    lines = difflib.unified_diff(stored.splitlines(), now.splitlines(), "stored", "now", lineterm="", n=2)
    return "\n".join(lines)
