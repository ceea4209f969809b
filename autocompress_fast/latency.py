"""How long a network takes on this machine after pruning, predicted from its plan: what a search aims with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autocompress_fast.engine import Engine
from autocompress_fast.engine.latency import Costs, Outline, call_work, timed
from autocompress_fast.engine.machine import cache_directory
from autocompress_fast.engine.program import Program, Shape, validate
from autocompress_fast.progress import Progress, default_progress

if TYPE_CHECKING:
    from autocompress_fast.graph import Report
    from autocompress_fast.plan import LayerPlan, Plan

__all__ = ["LATENCIES", "Compaction", "Latency", "LatencyModel", "Matrix", "Sizes", "StepLatency"]

BoolArray = npt.NDArray[np.bool_]

LATENCIES = "latency-*.json"
"""Names of the files in which measurements are kept."""


@dataclass(frozen=True)
class StepLatency:
    """What one step of the engine is predicted to take: a layer, with what is computed with it.

    Attributes:
        op, name: the operations, and the module they come from; "call" and "values" for what comes on top of all steps.
        size: (channels, filters, columns) of a layer that are left; of other steps the first dimension of each input.
        seconds: of one call.
    """

    op: str
    name: str
    size: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Latency:
    """The prediction for a network.

    Attributes:
        steps: in order.
        samples, threads: of a call.
    """

    steps: tuple[StepLatency, ...]
    samples: int
    threads: int

    @property
    def seconds(self) -> float:
        """Of one call."""
        return sum(step.seconds for step in self.steps)

    def __str__(self) -> str:
        width = max(len(step.name) for step in self.steps)
        rows = [f"{1e6 * s.seconds:10.1f} us  {s.name:<{width}}  {s.op} {s.size}" for s in self.steps]
        return "\n".join([*rows, f"{1e6 * self.seconds:10.1f} us in all"])


class LatencyModel:
    """Predicts how long the engine takes for a network whose layers keep any filters and columns.

    Layers of the network's kinds are timed at some sizes, once: results are kept in a file for this machine. A
    prediction then takes no measurement and does not build the network.

    Attributes:
        threads, samples: of the calls that are predicted.
        path: of the file, None when there is none.

    Example:
        >>> import torch
        >>> from autocompress_fast import Plan, inspect
        >>> layers = torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 10)
        >>> report = inspect(torch.nn.Sequential(*layers), torch.zeros(1, 3, 8, 8))
        >>> model = LatencyModel.of(report, directory=None)
        >>> found = model.predict(Plan.uniform(report, filters=0.5))
        >>> [(step.name, step.size) for step in found.steps if step.name in ("0", "3")]
        [('0', (3, 8, 27)), ('3', (288, 10, 288))]
        >>> 0 < found.seconds < 1
        True
    """

    def __init__(self, program: Program, costs: Costs, sizes: Callable[[Plan, bool], Sizes] | None) -> None:
        self._outline, self._costs, self._sizes = Outline(program, validate(program)), costs, sizes
        self._call = call_work(program)
        self.threads, self.samples, self.path = costs.threads, costs.samples, costs.path

    @classmethod
    def of(
        cls,
        network: Report | Program | Engine,
        *,
        threads: int = 1,
        samples: int = 1,
        directory: Path | str | None = "",
        progress: Progress | None = None,
    ) -> LatencyModel:
        """The model for a network and all that pruning can make of it; times what is not known yet.

        Args:
            network: the report of `acf.inspect`, for predictions from plans; or a program or engine, for predictions
                of it and of others made of the same kinds of steps.
            threads: that a call may use.
            samples: of a call.
            directory: where measurements are kept; $XDG_CACHE_HOME/autocompress_fast or ~/.cache/autocompress_fast
                when not given, None to keep nothing.
            progress: what is told about it; bars when not given.

        Raises:
            ValueError: threads or samples below 1.
            UnsupportedError: the engine cannot run the network.
        """
        for name, value in (("threads", threads), ("samples", samples)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer, 1 or more, got {value!r}")
        program, sizes = _read(network)
        kept = None if directory is None else Path(directory) if directory else cache_directory()
        model = cls(program, Costs(threads=threads, samples=samples, directory=kept), sizes)
        works = [*model._outline.works(), *model._outline.works(fuse=False), model._call]
        with progress or default_progress() as shown:
            model._costs.learn(works, shown)
        return model

    def predict(self, network: Plan | Program | Engine | None = None, *, settled: bool = False) -> Latency:
        """What a call takes.

        Args:
            network: a plan for the layers of the report, of which `compact` would cut out what is dead; a program or
                engine; the network itself when not given. A layer that keeps single weights counts as one that keeps
                all filters and columns with any.
            settled: the plan is a result of `unused_paths`, which takes longer than the rest and is left out then.

        Raises:
            TypeError: a plan, and the model was not made from a report.
            ValueError: the plan does not fit the report, or leaves nothing of an output layer; the program has steps
                of a kind that was not timed.
        """
        outline, sizes = self._outline, Sizes()
        if isinstance(network, Program | Engine):
            program = network.program if isinstance(network, Engine) else network
            outline = Outline(program, validate(program))
        elif network is not None:
            if self._sizes is None:
                raise TypeError("plans can be predicted by a model of a report: LatencyModel.of(acf.inspect(...))")
            sizes = self._sizes(network, settled)
        works = [*outline.works(sizes.shapes, sizes.columns), self._call]
        steps = [
            StepLatency(work.op, work.name, work.size, seconds)
            for work, seconds in zip(works, self._costs.seconds(works), strict=True)
        ]
        steps.append(StepLatency("values", "values", (), self._costs.arrival(works)))
        return Latency(tuple(steps), self.samples, self.threads)

    def seconds(self, network: Plan | Program | Engine | None = None, *, settled: bool = False) -> float:
        """`predict` in one number."""
        return self.predict(network, settled=settled).seconds

    def measure(self, engine: Engine) -> float:
        """Seconds that a call of the engine takes, timed in the way of the model: without what disturbs it.

        Raises:
            ValueError: the engine takes another number of samples.
        """
        found = timed(engine.program, self.samples, self.threads)
        return sum(found.steps.values()) + found.rest


@dataclass(frozen=True)
class Matrix:
    """What is left of the weight of a layer, (filters, columns) for each of its groups.

    Attributes:
        filters, columns: of the compacted layer.
        filled, kept: filters and columns with any weight.
        weights: in them.
        groups: of the convolution; columns of grouped ones are never cut out one by one.
    """

    filters: int
    columns: int
    filled: int
    kept: int
    weights: int
    groups: int

    @property
    def read(self) -> int:
        """Columns that the engine reads: all where a part of the weight and its index (uint16) take more bytes."""
        if self.groups > 1:
            return self.groups * self.columns
        part, whole = self.filled * self.kept, self.filters * self.columns
        index = self.kept * (self.kept < self.columns) + self.filled * (self.filled < self.filters)
        return self.columns if 2 * whole <= 2 * part + index else max(1, self.kept)


@dataclass(frozen=True)
class Sizes:
    """What a program becomes: shapes of all values, columns that are read and the weight, both per value of a layer.

    None for as it is.
    """

    shapes: list[Shape] | None = None
    columns: Mapping[int, int] | None = None
    matrices: Mapping[int, Matrix] | None = None


def _read(network: Any) -> tuple[Program, Callable[[Plan, bool], Sizes] | None]:
    if isinstance(network, Program):
        return network, None
    if isinstance(network, Engine):
        return network.program, None
    from autocompress_fast.engine.lower import lower_trace

    program, names = lower_trace(network.trace)
    return program, Compaction(network, program, names).sizes


class Compaction:
    """What the values and layers of a program become when a network is compacted.

    Args:
        report: on the network.
        program: of the same.
        names: of the nodes of the trace whose results the program's values are.

    Attributes:
        whole: value of a layer -> its columns before.
    """

    def __init__(self, report: Report, program: Program, names: tuple[str, ...]) -> None:
        self._report = report
        outline = Outline(program, validate(program))
        self._shapes, self.whole = outline.shapes, outline.columns
        layers = {layer.name for layer in report.layers}
        self._layers = {
            step.output: step.name for step in program.steps if step.op in ("conv", "linear") and step.name in layers
        }
        self._along: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}  # value -> axis, labels along it
        for value, name in enumerate(names):
            if found := _labels(report.channels.values.get(name), self._shapes[value]):
                self._along[value] = found

    def sizes(self, plan: Plan, settled: bool) -> Sizes:
        """Of the values and layers."""
        from autocompress_fast.unused import kept_labels, unused_paths

        left = plan if settled else unused_paths(plan, self._report)
        keep = kept_labels(left, self._report)
        shapes = list(self._shapes)
        for value, (axis, labels) in self._along.items():
            shape = list(shapes[value])
            shape[axis] = max(1, int(keep[labels].sum()))
            shapes[value] = tuple(shape)
        matrices = {value: self._matrix(left[name], name, keep, shapes[value]) for value, name in self._layers.items()}
        columns = {value: matrix.read for value, matrix in matrices.items()}
        return Sizes(shapes, self.whole | columns, matrices)

    def _matrix(self, plan: LayerPlan, name: str, keep: BoolArray, made: Shape) -> Matrix:
        layer, living = self._report[name], self._report.living_columns(keep, name)
        rows, used = plan.used()
        filters, whole = made[0 if len(made) == 3 else -1], int(living.sum())
        groups = layer.groups
        if groups > 1 and layer.shape[1] == 1:  # depthwise: a group goes with its channel
            groups = max(1, whole * layer.groups // layer.columns)
        return Matrix(filters, whole // groups, int(rows.sum()), int((living & used).sum()), plan.weights, groups)


def _labels(value: Any, shape: Shape) -> tuple[int, npt.NDArray[np.int64]] | None:
    """The axis of one sample along which channels lie, and their labels."""
    if value is None or isinstance(value, tuple | list) or tuple(value.shape[1:]) != shape:
        return None
    array = value[0].numpy()
    for axis, size in enumerate(shape):
        first = np.moveaxis(array, axis, 0).reshape(size, -1)[:, 0]
        if len(np.unique(first)) > 1 or (size == 1 and first[0] != 0):
            return axis, first
    return None
