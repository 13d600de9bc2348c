r"""Timing two things in turn, so that whatever slows the machine slows both."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["compare", "in_turn", "stopwatch"]


def in_turn(
    one: Callable[[], Any],
    other: Callable[[], Any],
    repetitions: int,
    *,
    at_least: float = 0.0,
    wait: Callable[[], Any] | None = None,
) -> dict[str, float]:
    r"""Seconds of a call of `one` and of `other`, the reference, as `compare` reports them.

    Both are called once beforehand, without being timed.

    Args:
        one: What is measured.
        other: What it is compared with.
        repetitions: Pairs of measurements.
        at_least: Seconds that a measurement should take; above 0, one is as many calls as the faster one needs for it.
        wait: Called at the end of every measurement; on a GPU, what waits for it.
    """
    one(), other()
    calls = 1
    if at_least:
        fastest = min(stopwatch(function, wait=wait)() for function in (one, other))
        calls = max(math.ceil(at_least / fastest), 1)
    return compare(stopwatch(one, calls=calls, wait=wait), stopwatch(other, calls=calls, wait=wait), repetitions)


def stopwatch(
    function: Callable[[], Any], *, calls: int = 1, wait: Callable[[], Any] | None = None
) -> Callable[[], float]:
    """A function that calls another one some times and returns the mean seconds of a call."""

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if wait is not None:
            wait()
        return (time.perf_counter() - start) / calls

    return measure


def compare(one: Callable[[], float], other: Callable[[], float], repetitions: int) -> dict[str, float]:
    r"""Compares two functions that return the seconds they measured, run alternately.

    Args:
        one: What is measured.
        other: What it is compared with.
        repetitions: Pairs of measurements, at least 2.

    Returns:
        Median seconds of both, and of their ratio pair by pair the median, the quartiles, the lowest and the highest.
        `other_cores` is how many cores other programs kept busy meanwhile: well above 0, the figures are of a machine
        that was shared, and with several threads they mean little.
    """
    start, busy, own = time.perf_counter(), _busy_seconds(), _own_seconds()
    pairs = [(one(), other()) for _ in range(repetitions)]
    elsewhere = (_busy_seconds() - busy) - (_own_seconds() - own)
    ratios = [a / b for a, b in pairs]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "seconds": statistics.median(a for a, _ in pairs), "reference_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios), "lower_quartile": quartiles[0], "upper_quartile": quartiles[2],
        "lowest": min(ratios), "highest": max(ratios), "repetitions": repetitions,
        "other_cores": max(elsewhere, 0.0) / (time.perf_counter() - start),
    }


def _busy_seconds() -> float:
    """Seconds that all cores were busy since the machine started (Linux)."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Seconds of processor time that this process and its finished children used."""
    return sum(os.times()[:4])
