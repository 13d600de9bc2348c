r"""Stands for a simulator of your own: a program that reads parameters and a seed and writes an array.

A population grows to its capacity under random weather. With fewer steps it is cheaper and less exact, but it has the
same weather: that is what couples two levels.

    python examples/population.py 0.8 100 7 result.npy --steps 512
"""

from __future__ import annotations

import argparse

import numpy as np

__all__ = ["grow"]

_FINEST, _TIME, _SEEN = 512, 8.0, 4


def grow(growth: float, capacity: float, seed: int, steps: int) -> np.ndarray:
    """The population at four times, shape `(4,)`."""
    weather = np.random.default_rng(seed).normal(size=_FINEST).reshape(steps, -1).sum(1) / _FINEST**0.5
    size, step, path = 10.0, _TIME / steps, []
    for gust in weather:
        size += growth * size * (1 - size / capacity) * step + 0.1 * size * gust * _TIME**0.5
        size = max(size, 0.0)
        path.append(size)
    return np.array(path[steps // _SEEN - 1 :: steps // _SEEN], np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("growth", type=float)
    parser.add_argument("capacity", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=_FINEST)
    options = parser.parse_args()
    np.save(options.output, grow(options.growth, options.capacity, options.seed, options.steps))
