"""Calls timed in turns, so that all of them see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

__all__ = ["Spread", "in_turns"]

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: median, and the quarter and three quarters of the calls around it."""

    median: float
    low: float
    high: float


def in_turns(calls: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, Spread]:
    """How long every call takes, measured once in each of the rounds.

    Another one right before it does not count: it brings back into the caches what the turns of the others drove out,
    as for a program that makes the same call again and again.

    Example:
        >>> found = in_turns({"short": lambda: sum(range(10)), "long": lambda: sum(range(100_000))}, rounds=9)
        >>> found["short"].median < found["long"].median, found["long"].low <= found["long"].high
        (True, True)
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - start)
    found = {}
    for key, values in times.items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        found[key] = Spread(median, low, high)
    return found
