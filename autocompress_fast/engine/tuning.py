"""Which way of computing every layer is quickest on this machine: measured, where the engine estimates otherwise.

The whole network runs with all layers computed in one way, then in the next, so that weights and values come from where
they come from in use; every layer is then given the way in which it took least. Together they must be quicker than what
was estimated, or nothing changes. What was found is kept in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from autocompress_fast import _core
from autocompress_fast._files import write_atomically
from autocompress_fast.engine.machine import processor
from autocompress_fast.engine.native import NativeExecutor
from autocompress_fast.engine.program import Program, StepInfo
from autocompress_fast.engine.tables import Choice, Tuning

__all__ = ["Ways", "tuned"]

Array = np.ndarray[Any, Any]
Ways = dict[tuple[int, int], str]
"""Of operations, for so many samples at once: what `NativeExecutor` takes."""

WAYS: Final = (
    "filters_in_lanes",
    "pixels_in_lanes",
    "winograd_tiles_in_lanes",
    "winograd_filters_in_lanes",
    "narrow",
)
LEAST_GAIN: Final = 0.97
"""Of the time that a layer takes in the way that is estimated: what it must take at most in another one."""
PASSES: Final = 2
"""Every way is measured so often, one after the other, so that no single disturbance hits all of its rounds."""
LEAST_ROUNDS: Final = 3
MOST_ROUNDS: Final = 50

_FORMAT: Final = 1


@dataclass(frozen=True)
class Network:
    """What is tuned, and for what."""

    program: Program
    infos: Sequence[StepInfo]
    threads: int
    precision: str
    samples: int

    def executor(self, ways: Mapping[tuple[int, int], str]) -> NativeExecutor:
        """With these ways of computing it."""
        return NativeExecutor(self.program, self.infos, self.threads, self.precision, ways)

    def inputs(self) -> list[Array]:
        """Random numbers."""
        rng = np.random.default_rng(0)
        shapes = [(self.samples, *given.shape) for given in self.program.inputs]
        return [rng.standard_normal(shape, np.float32) for shape in shapes]

    def key(self) -> dict[str, Any]:
        """What decides what is quickest, as far as it can be known."""
        tensors = self.program.tensors
        steps = [
            [step.op, step.inputs, dict(step.attributes), {role: tensors[n].shape for role, n in step.tensors.items()}]
            for step in self.program.steps
        ]
        return {
            "format": _FORMAT,
            "kernels": f"{_core.__version__} {_core.compiler}",
            "processor": processor(),
            "isa": _core.active_isa(),
            "threads": self.threads,
            "samples": self.samples,
            "precision": self.precision,
            "inputs": [given.shape for given in self.program.inputs],
            "steps": steps,
        }


def tuned(network: Network, seconds: float, directory: Path | None) -> Tuning:
    """What is quickest: from the file in the directory if it has been measured before.

    Args:
        network: what is tuned.
        seconds: that measuring takes, roughly; every way is run some times even if that takes longer.
        directory: of the file; None to keep nothing.
    """
    path = None
    if directory is not None:
        digest = hashlib.sha256(json.dumps(network.key(), sort_keys=True).encode()).hexdigest()[:32]
        path = directory / f"tuned-{digest}.json"
        if (kept := _read(path, network)) is not None:
            return kept
    found = _measured(network, seconds)
    if path is not None:
        _write(path, found)
    return found


def _measured(network: Network, seconds: float) -> Tuning:
    inputs, estimated = network.inputs(), network.executor({})
    model = estimated.ways(network.samples)
    names = [made[0].name for made in estimated.steps]
    layers = [i for i, (_, way) in enumerate(model) if way is not None]
    trials: dict[str, Ways] = {"": {}}
    ways: dict[str, list[str | None]] = {"": [way for _, way in model]}
    for way in WAYS:
        trial = {(layer, 0): way for layer in layers}
        made = [way for _, way in network.executor(trial).ways(network.samples)]
        if made not in ways.values():  # some layer can be computed so, and is not already
            trials[way], ways[way] = trial, made

    start = time.perf_counter()
    estimated.profile(inputs, 1)
    one = time.perf_counter() - start
    rounds = int(np.clip(seconds / (PASSES * len(trials) * one), LEAST_ROUNDS, MOST_ROUNDS))
    times: dict[str, list[Array]] = {name: [] for name in trials}
    for _ in range(PASSES):
        for name, trial in trials.items():
            times[name].append(_profile(network.executor(trial), inputs, rounds))
    medians = {name: np.median(np.vstack(found), axis=0) for name, found in times.items()}

    choices, chosen = [], Ways()
    for layer in layers:
        taken: dict[str, float] = {}
        for name in trials:  # what was estimated first
            if (made_so := ways[name][layer]) is not None:
                taken.setdefault(made_so, float(medians[name][layer]))
        sizes, first = model[layer]
        assert first is not None
        best = min(taken, key=lambda way: taken[way])
        if taken[best] > LEAST_GAIN * taken[first]:
            best = first
        else:
            chosen.update({(layer, size): best for size in sizes})
        choices.append(Choice(names[layer], first, best, taken))
    total = float(np.median(np.vstack(times[""]).sum(axis=1)))
    before, after = _in_turns(network, ({}, chosen), inputs, rounds) if chosen else (total, total)
    if after > before:
        after, chosen, choices = before, {}, [Choice(c.name, c.estimated, c.estimated, c.seconds) for c in choices]
    return Tuning(tuple(choices), network.samples, network.threads, before, after, chosen)


def _profile(executor: NativeExecutor, inputs: Sequence[Array], rounds: int) -> Array:
    executor.profile(inputs, 1)
    return executor.profile(inputs, rounds)


def _in_turns(network: Network, ways: Sequence[Ways], inputs: Sequence[Array], rounds: int) -> tuple[float, float]:
    executors = [network.executor(some) for some in ways]
    times = [[_profile(executor, inputs, rounds).sum(axis=1) for executor in executors] for _ in range(PASSES)]
    first, second = np.median(np.concatenate(times, axis=1), axis=1)  # of every round of all passes
    return float(first), float(second)


# ---- the file


def _write(path: Path, tuning: Tuning) -> None:
    content = {
        "choices": [[c.name, c.estimated, c.chosen, c.seconds] for c in tuning.choices],
        "seconds": [tuning.before, tuning.after],
        "ways": [[*place, way] for place, way in tuning.ways.items()],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content).encode())
    except OSError:
        pass  # it is measured again the next time


def _read(path: Path, network: Network) -> Tuning | None:
    """What was written; nothing if there is no such file, or one that cannot be used."""
    try:
        content = json.loads(path.read_bytes())
        choices = tuple(
            Choice(str(name), str(estimated), str(chosen), {str(way): float(s) for way, s in seconds.items()})
            for name, estimated, chosen, seconds in content["choices"]
        )
        if any({choice.estimated, choice.chosen} - choice.seconds.keys() for choice in choices):
            raise ValueError("a way that was not measured")
        before, after = map(float, content["seconds"])
        ways = {}
        for operation, samples, way in content["ways"]:
            if way not in WAYS or type(operation) is not int or type(samples) is not int or min(operation, samples) < 0:
                raise ValueError(way)
            ways[operation, samples] = way
        network.executor(ways)  # refuses numbers of operations that there are not
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return Tuning(choices, network.samples, network.threads, before, after, ways)
