r"""A store in tables and words: what is wanted, done and failed, and why."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from mlsbi.store.catalogue import Catalogue
from mlsbi.store.locking import find_holder
from mlsbi.store.records import JOINT_STREAM, REPEAT_STREAM, STATUSES, TEST_STREAM, Stream

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["summarise", "tabulate_failures", "tabulate_levels"]


def tabulate_levels(catalogue: Catalogue) -> pd.DataFrame:
    """A line per level; see `Store.to_frame`."""
    import pandas as pd

    runs, seconds = catalogue.count_runs(catalogue.streams), catalogue.sum_seconds(catalogue.streams)
    declared = catalogue.manifest["costs"]
    lines = []
    for level, name in enumerate(catalogue.names):
        streams = [stream for stream in catalogue.streams if stream.number == level]
        lines.append({
            "level": name, "wanted": sum(catalogue.targets.get(stream, 0) for stream in streams),
            "done": sum(len(catalogue.index(stream).ok) for stream in streams),
            "failed": sum(len(catalogue.index(stream).lost) for stream in streams),
            "runs": runs[level], "seconds": seconds[level],
            "seconds per run": seconds[level] / runs[level] if runs[level] else math.nan,
            "cost": seconds[level] if declared is None else runs[level] * declared[level],
        })  # fmt: skip
    return pd.DataFrame(lines).set_index("level")


def tabulate_failures(catalogue: Catalogue) -> pd.DataFrame:
    """A line per row that failed; see `Store.failures`."""
    import pandas as pd

    fixed = ("level", "stream", "seed", "index", "noise_seed", "status", "message")
    titles = [f"{name} (parameter)" if name in fixed else name for name in catalogue.parameters]
    lines = []
    for stream in catalogue.streams:
        for records in catalogue.read(stream, catalogue.index(stream).lost, failed=True):
            for place in range(len(records)):
                line = {
                    "level": catalogue.names[stream.levels[-1]], "stream": _name_purpose(catalogue, stream),
                    "seed": stream.seed, "index": int(records.index[place]),
                }  # fmt: skip
                if records.noise_seed is not None:
                    line["noise_seed"] = int(records.noise_seed[place])
                line |= dict(zip(titles, records.theta[place].tolist(), strict=True))
                lines.append(line | {"status": STATUSES[int(records.status[place])],
                                     "message": records.messages.get(place, "")})
    seeds = ["noise_seed"] if any("noise_seed" in line for line in lines) else []
    return pd.DataFrame(lines, columns=["level", "stream", "seed", "index", *seeds, *titles, "status", "message"])


def summarise(catalogue: Catalogue) -> str:
    """The table of levels, what else there is, how rows failed, what is damaged, and who is writing."""
    table = tabulate_levels(catalogue).to_string(float_format=lambda value: f"{value:.4g}")
    lines = [f"Store {catalogue.folder}", table]
    kinds: Counter[str] = Counter()
    for stream in catalogue.streams:
        index, target = catalogue.index(stream), catalogue.targets.get(stream)
        if stream.number >= len(catalogue.names):
            asked, lost = f" of {target}" if target else "", f", {len(index.lost)} failed" if index.failed else ""
            lines.append(f"{_name_purpose(catalogue, stream)}, seed {stream.seed}: {len(index.ok)} rows{asked}{lost}")
        kinds.update({STATUSES[status]: len(rows) for status, rows in index.failed.items()})
    if kinds:
        lines.append("failed: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    lines += [f"damaged: {name}: {why}" for name, why in sorted(catalogue.damaged.items())]
    holder = find_holder(catalogue.folder / "lock")
    return "\n".join(lines + ([f"being written by {holder}"] if holder else []))


def _name_purpose(catalogue: Catalogue, stream: Stream) -> str:
    number, names = stream.number, catalogue.names
    if number < len(names):
        return f"level {names[number]}"
    if number == JOINT_STREAM:
        return "pilot, all levels together"
    if JOINT_STREAM < number <= JOINT_STREAM + len(names):
        return f"pilot, {names[number - JOINT_STREAM - 1]} alone"
    if number == REPEAT_STREAM:
        return "pilot's theta with other noise"
    return "test rows" if number == TEST_STREAM else f"stream {number}"
