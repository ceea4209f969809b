"""How fast a saved network runs, beside other runtimes and beside the dense network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autocompress_fast.cli.prediction import Accuracy, classify_data
from autocompress_fast.engine import Engine, load
from autocompress_fast.engine import compile as compile_engine
from autocompress_fast.engine.others import OTHERS, installed
from autocompress_fast.engine.program import is_narrow, validate
from autocompress_fast.engine.turns import in_turns
from autocompress_fast.report import Document, Table

_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the largest output, between two runtimes
_NARROW_TOLERANCE = 0.1  # where values are rounded to 8 bits, which the last bit of another sum may decide

Call = Callable[[], Sequence[np.ndarray[Any, Any]]]


@dataclass(frozen=True)
class Latency:
    """Seconds of one call with all samples: median, and the quarter and three quarters of the calls around it."""

    network: str
    runtime: str
    samples: int
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Benchmark(Document):
    """What was measured, in turns."""

    file: Path
    threads: int
    precision: str
    tuned: bool
    rounds: int
    rows: tuple[Latency, ...]
    accuracy: Accuracy | None

    def parts(self) -> Iterator[Table | str]:
        """A table for every number of samples, and the accuracy."""
        for samples in dict.fromkeys(row.samples for row in self.rows):
            rows = [row for row in self.rows if row.samples == samples]
            ours = rows[0].median
            yield Table(
                f"{samples} sample{'s' if samples > 1 else ''} a call, {self.threads} "
                f"thread{'s' if self.threads > 1 else ''}, {self.precision}{', tuned' * self.tuned}, "
                f"{self.rounds} calls each in turns",
                ("network", "runtime", "median", "half of the calls", "samples a second", "of ours"),
                [
                    (
                        row.network,
                        row.runtime,
                        _duration(row.median),
                        f"{_duration(row.low)} to {_duration(row.high)}",
                        f"{samples / row.median:,.0f}",
                        f"{row.median / ours:.2f}x",
                    )
                    for row in rows
                ],
                names=2,
            )
        if self.accuracy is not None:
            yield from self.accuracy.parts()

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "file": str(self.file),
            "threads": self.threads,
            "precision": self.precision,
            "tuned": self.tuned,
            "rounds": self.rounds,
            "latencies": [
                {"network": r.network, "runtime": r.runtime, "samples": r.samples}
                | {"median": r.median, "low": r.low, "high": r.high}
                for r in self.rows
            ],
            "accuracy": None if self.accuracy is None else self.accuracy.to_json(),
        }


def measured(
    file: Path,
    *,
    dense: str | None,
    against: Sequence[str] | None,
    samples: Sequence[int],
    rounds: int,
    data: str | None,
    dataset: str | None,
    seed: int,
    threads: int | None,
    precision: str = "float32",
    tune: bool = False,
) -> Benchmark:
    """Time the saved network, and the dense one if it is named, in our engine and in other runtimes.

    Args:
        file: a compressed network.
        dense: a model's name, or module:callable, to be measured beside it with random weights.
        against: other runtimes; those that are installed when not given.
        samples: of a call; each is measured.
        rounds: calls of each, in turns.
        data, dataset, seed: a data set whose test part gives the accuracy, if wanted.
        threads: of all runtimes.
        precision: of ours, as for `load`, and of OpenVINO; onnxruntime and torch compute in float32.
        tune: measure first in which way every layer is quickest in ours (`Engine.tune`).

    Raises:
        ValueError: an unknown runtime, or one that is not installed; the dense network takes other inputs.
        AssertionError: a runtime computes something else than ours.
    """
    engine = load(file, threads=threads, precision=precision)
    chosen = installed() if against is None else list(against)
    for name in chosen:
        if name not in OTHERS or name not in installed():
            raise ValueError(
                f"{name} is {'not installed' if name in OTHERS else 'unknown'}; "
                f"known are {', '.join(OTHERS)}, which need onnx too"
            )
    accuracy = None if data is None else classify_data(file, data, dataset, seed, threads, precision)
    engines = {"compressed": engine}
    model = None
    if dense is not None:
        model, engines["dense"] = _dense(dense, engine)
    rows: list[Latency] = []
    for count in samples:
        rng = np.random.default_rng(0)
        inputs = [rng.standard_normal((count, *given.shape), np.float32) for given in engine.inputs]
        calls: dict[tuple[str, str], Call] = {}
        for network, one in engines.items():
            if tune:
                one.tune(count)
            calls[network, "autocompress_fast"] = partial(_ours, one, inputs)
            calls |= {(network, name): _other(name, one, inputs) for name in chosen}
        if model is not None:
            calls["dense", "torch"] = _torch(model, inputs, engine.threads)
        _check(calls, {name: _tolerance(one) for name, one in engines.items()})
        rows += [
            Latency(network, runtime, count, spread.median, spread.low, spread.high)
            for (network, runtime), spread in in_turns(calls, rounds).items()
        ]
    return Benchmark(file, engine.threads, precision, tune, rounds, tuple(rows), accuracy)


def _ours(engine: Engine, inputs: Sequence[np.ndarray[Any, Any]]) -> Sequence[np.ndarray[Any, Any]]:
    return _tuple(engine(*inputs))


def _dense(name: str, engine: Engine) -> tuple[Any, Engine]:
    """A torch model with random weights, and the engine of it."""
    import torch

    from autocompress_fast.cli.job import named

    shapes = [given.shape for given in engine.inputs]
    torch.manual_seed(0)
    model = named(name, shapes[0]).eval()
    example = tuple(torch.zeros(1, *shape) for shape in shapes)
    return model, compile_engine(model, example, threads=engine.threads, precision=engine.precision)


def _torch(model: Any, inputs: Sequence[np.ndarray[Any, Any]], threads: int) -> Call:
    import torch

    tensors = [torch.from_numpy(x) for x in inputs]

    def run() -> Sequence[np.ndarray[Any, Any]]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                found = model(*tensors)
        finally:
            torch.set_num_threads(before)
        return [y.numpy() for y in _tuple(found)]

    return run


def _other(name: str, engine: Engine, inputs: Sequence[np.ndarray[Any, Any]]) -> Call:
    from autocompress_fast.engine.onnx import as_onnx

    model = as_onnx(engine.program, validate(engine.program)).SerializeToString()
    run = OTHERS[name](model, engine.threads, engine.precision)
    return lambda: run(inputs)


def _tolerance(engine: Engine) -> float:
    return _NARROW_TOLERANCE if any(map(is_narrow, engine.program.steps)) else _TOLERANCE[engine.precision]


def _check(calls: dict[tuple[str, str], Call], tolerances: dict[str, float]) -> None:
    """Every runtime computes what ours does."""
    expected: dict[str, Sequence[np.ndarray[Any, Any]]] = {}
    for (network, runtime), call in calls.items():
        found = call()
        wanted = expected.setdefault(network, found)
        for y, z in zip(found, wanted, strict=True):
            error = float(np.abs(y - z).max()) / max(float(np.abs(z).max()), 1e-30)
            if not error <= tolerances[network]:
                raise AssertionError(f"{runtime} differs by {error:.2g} of the largest output on the {network} network")


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _duration(seconds: float) -> str:
    """For people.

    >>> _duration(0.0000123), _duration(0.0123), _duration(1.23)
    ('12.3 us', '12.3 ms', '1.23 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
