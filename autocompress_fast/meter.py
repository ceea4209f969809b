"""How large and how slow a network is after pruning, worked out from its plan: what a target is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress_fast._files import write_atomically
from autocompress_fast.engine import file
from autocompress_fast.engine.narrow import can_be_narrow, residuals, scales_name
from autocompress_fast.engine.packing import Packed, expected
from autocompress_fast.engine.program import Program, Shape, Step, validate
from autocompress_fast.graph import Counts, Report
from autocompress_fast.latency import Compaction, LatencyModel, Matrix, Sizes
from autocompress_fast.plan import LayerPlan, Plan
from autocompress_fast.unused import unused_paths

if TYPE_CHECKING:
    from autocompress_fast.admm import Constraint
    from autocompress_fast.compact import Kept
    from autocompress_fast.progress import Progress
    from autocompress_fast.rates import Target

__all__ = ["FileSize", "Meter", "Numbers", "Size"]

_LONGEST = 0.0012345678901234567  # a number with as many digits as any


@dataclass(frozen=True)
class Size(Counts):
    """Sizes of a network, with those of the engine where they were asked for.

    Attributes:
        seconds: that a call is predicted to take; None when it was not asked for.
        bytes: of the `.acf` file; None when it was not asked for.
    """

    seconds: float | None = None
    bytes: int | None = None


class Meter:
    """Works out the sizes of a network from plans for it, with its latency and the bytes of its file if wanted.

    Args:
        report: on the dense network.
        latency: of the same report; None where latency does not matter.
        file: of the same report; None where the file does not matter.

    Attributes:
        dense: the sizes of the network as it is; as of `measure` a `Size` with latency or file, otherwise `Counts`.
        report: on the network that plans are for: the dense one, or what `after` was given.

    Example:
        >>> import torch
        >>> from autocompress_fast.graph import inspect
        >>> model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10))
        >>> report = inspect(model, torch.zeros(1, 100))
        >>> meter = Meter(report, file=FileSize(report, {}))
        >>> meter.measure(Plan.uniform(report, filters=0.5)).params, meter.dense.params
        (2750, 5500)
        >>> meter.dense.bytes - meter.measure(Plan.uniform(report, filters=0.5)).bytes
        11100
    """

    def __init__(self, report: Report, *, latency: LatencyModel | None = None, file: FileSize | None = None) -> None:
        self._latency, self._file = latency, file
        self._dense_report = self.report = report
        self._kept: Mapping[str, Kept] | None = None
        seconds = None if latency is None else latency.seconds()
        self.dense = _size(report.counts(), seconds, None if file is None else file.bytes())

    @classmethod
    def of(
        cls,
        report: Report,
        target: Target,
        *,
        info: Mapping[str, Any] | None = None,
        numbers: Numbers | None = None,
        directory: Path | str | None = "",
        progress: Progress | None = None,
    ) -> Meter:
        """One that knows all that the target asks for.

        Args:
            report: on the dense network.
            target: whose latency is timed with so many threads, if it has one.
            info: that will be saved with the network; counts to the bytes of the file.
            numbers: that its weights will become; float32 if not given.
            directory: of the measurements, as of `LatencyModel.of`.
            progress: what is told of them.

        Raises:
            UnsupportedError: the target asks for latency or bytes, and the engine cannot run the network.
        """
        names, latency = target.measured, None
        if "seconds" in names:
            latency = LatencyModel.of(report, threads=target.threads, directory=directory, progress=progress)
        file = FileSize(report, info or {}, numbers) if "bytes" in names else None
        return cls(report, latency=latency, file=file)

    def after(self, now: Report, kept: Mapping[str, Kept]) -> Meter:
        """The same for plans in the shapes of the network after compactions.

        Args:
            now: on that network.
            kept: of the compactions, where its weights were.
        """
        other = Meter.__new__(Meter)
        other.__dict__ |= self.__dict__
        other.report, other._kept = now, kept
        return other

    def keep_latencies(self, folder: Path) -> None:
        """Copy what was timed into a folder, from which `of` can read it."""
        path = None if self._latency is None else self._latency.path
        if path is not None and path.exists():
            write_atomically(folder / path.name, path.read_bytes())

    def measure(self, plan: Plan, *, settled: bool = False) -> Counts:
        """What the network is when `plan` and all that is dead then are cut out.

        Args:
            plan: what is kept.
            settled: the plan is a result of `unused_paths` or `compact`: nothing more is dead.

        Raises:
            ValueError: the plan does not fit the network, or leaves nothing of an output layer.
        """
        return self._sizes(plan if settled else unused_paths(plan, self.report))

    def allowed(self, constraints: Mapping[str, Constraint]) -> Counts:
        """What a network has that keeps as much as it can under constraints: columns of as many channels as can be.

        Which filters and columns stay is decided by the weights, and more are dead then: `measure` knows. Of layers
        that keep single weights, all count.
        """
        report = self.report
        rows = {layer.name: np.ones(layer.shape[0], bool) for layer in report.layers}
        for tied in report.sets:
            counts = {name: _filters(constraints[name]) for name in tied.layers if name in constraints}
            groups = min((tied.groups(name, count) for name, count in counts.items() if count), default=tied.size)
            chosen = np.append(tied.chosen(np.zeros(tied.size), groups), True)
            rows |= {name: chosen[tied.rows[name]] for name in tied.layers}
        alive = report.channels.alive(rows)
        layers = {}
        for layer in report.layers:
            columns = report.living_columns(alive, layer.name)
            constraint = constraints.get(layer.name)
            if constraint is not None and (count := _columns(constraint)):
                living = np.flatnonzero(columns)
                columns = np.zeros(layer.columns, bool)
                few = min(count, len(living))
                columns[living[np.arange(few) * len(living) // few]] = True
            layers[layer.name] = LayerPlan(layer.shape, rows[layer.name], columns, None, layer.groups, layer.transposed)
        return self._sizes(unused_paths(Plan(layers), report))

    def _sizes(self, plan: Plan) -> Counts:
        """Of a plan without unused paths."""
        counts = self.report.counts(plan)
        if self._kept is not None and (self._latency or self._file):
            from autocompress_fast.compact import restore

            plan = restore(plan, self._kept, self._dense_report)
        seconds = None if self._latency is None else self._latency.seconds(plan, settled=True)
        return _size(counts, seconds, None if self._file is None else self._file.bytes(plan))


def _size(counts: Counts, seconds: float | None, bytes_: int | None) -> Counts:
    if seconds is None and bytes_ is None:
        return counts
    return Size(counts.conv, counts.params, counts.macs, seconds, bytes_)


def _filters(constraint: Constraint) -> int:
    """That may stay; 0: the constraint does not say."""
    if isinstance(constraint.keep, tuple):
        return constraint.keep[0]
    return constraint.keep if constraint.structure == "filter" else 0


def _columns(constraint: Constraint) -> int:
    if isinstance(constraint.keep, tuple):
        return constraint.keep[1]
    return constraint.keep if constraint.structure == "column" else 0


@dataclass(frozen=True)
class Numbers:
    """What the weights of a network become when it is pruned.

    Args:
        values: layer -> different ones of it, zero apart, when they lie on levels; any where it is not named.
        narrow: 8-bit layers (`acf.quantize`).

    Raises:
        ValueError: fewer than one value, or both: 8-bit layers have levels of their own.
    """

    values: Mapping[str, int] = field(default_factory=dict)
    narrow: bool = False

    def __post_init__(self) -> None:
        for name, count in self.values.items():
            if count < 1:
                raise ValueError(f"values must be 1 or more, got {count} of {name}")
        if self.values and self.narrow:
            raise ValueError(f"8-bit layers have levels of their own, got values={self.values}")


class FileSize:
    """How many bytes the `.acf` file of a network takes after pruning, without building the network.

    Args:
        report: on the dense network.
        info: that is saved with it.
        numbers: that weights will become; float32 if not given.

    Raises:
        UnsupportedError: the engine cannot run the network.
    """

    def __init__(self, report: Report, info: Mapping[str, Any], numbers: Numbers | None = None) -> None:
        from autocompress_fast.engine.lower import lower_trace

        self._numbers, self._held = numbers or Numbers(), report.held
        self._program, names = lower_trace(report.trace)
        self._shapes = [g.shape for g in self._program.inputs] + [i.shape for i in validate(self._program)]
        self._compaction, self._info = Compaction(report, self._program, names), dict(info)
        # A normalisation that is folded into the weights gives every filter levels of its own.
        layers = {layer.name for layer in report.layers}
        self._alike = {
            step.name
            for step in self._program.steps
            if step.name in layers
            and "weight" in step.tensors
            and np.array_equal(self._program.tensors[step.tensors["weight"]].ravel(), report.weight(step.name).ravel())
        }

    def bytes(self, plan: Plan | None = None, numbers: Numbers | None = None) -> int:
        """Of the network when `plan`, a result of `unused_paths`, is cut out of it; of the network itself without.

        Args:
            plan: what is kept.
            numbers: that its weights will become, if others than those of this object.

        It is exact but for numbers that are written with fewer digits, for biases of layers without one, which may
        get one when constants are folded, and for levels that no weight is on; these count. Of the network itself it is
        that with the weights it has.
        """
        if plan is None:
            return file.size(self._program, self._info)
        numbers = numbers or self._numbers
        program, packed = self._smaller(self._compaction.sizes(plan, settled=True), numbers)
        return file.size(self._narrowed(program) if numbers.narrow else program, self._info, packed)

    def _narrowed(self, program: Program) -> Program:
        """With 8-bit layers; of their numbers the digits alone count."""
        tensors, steps = dict(program.tensors), []
        layers = [step for step in program.steps if step.op in ("conv", "linear") and can_be_narrow(program, step)]
        narrow = {step.output for step in layers}
        additions = residuals(program, self._shapes, narrow)
        for step in program.steps:
            if step.output in additions:
                rounding = {"residual_scale": _LONGEST, "residual_zero": 255}
                steps.append(replace(step, attributes={**step.attributes, **rounding}))
                continue
            if step.output not in narrow:
                steps.append(step)
                continue
            name = step.tensors["weight"]
            scales = scales_name(name, tensors)
            tensors[scales] = _empty(np.float32, step.attributes["filters"])
            tensors[name] = _empty(np.int8, *tensors[name].shape)
            attributes = {**step.attributes, "input_scale": _LONGEST, "input_zero": 255}
            steps.append(replace(step, attributes=attributes, tensors={**step.tensors, "scales": scales}))
        return replace(program, steps=tuple(steps), tensors=tensors)

    def _codes(self, step: Step, matrix: Matrix, tensor: Any, numbers: Numbers) -> Packed | None:
        """How weights on levels are stored."""
        if step.name not in numbers.values or step.name in self._held:
            return None
        zeros = tensor.ndim > 1 and matrix.weights < tensor.size
        alike, values = step.name in self._alike, numbers.values[step.name] + zeros
        if tensor.ndim == 1 and not alike:  # of all filters together
            return expected(tensor.shape, values * matrix.filters, alike=True)
        return expected(tensor.shape, values, alike)

    def _smaller(self, sizes: Sizes, numbers: Numbers) -> tuple[Program, dict[str, Packed]]:
        """The program with tensors of these sizes, which hold nothing, and those that are stored as codes."""
        assert sizes.shapes is not None
        assert sizes.matrices is not None
        steps: list[Step] = []
        tensors: dict[str, Any] = {}
        packed: dict[str, Packed] = {}
        for step in self._program.steps:
            matrix = sizes.matrices.get(step.output)
            old = {role: self._program.tensors[name] for role, name in step.tensors.items()}
            attributes = dict(step.attributes)
            if matrix is None:
                made, now = self._shapes[step.output], sizes.shapes[step.output]
                arrays = {role: _like(tensor, made, now) for role, tensor in old.items()}
            else:
                attributes["storage"], arrays = _stored(matrix)
                attributes["filters"] = matrix.filters
                if "bias" in old or matrix.columns * matrix.groups < self._compaction.whole[step.output]:
                    arrays["bias"] = _empty(np.float32, matrix.filters)
            names = {role: step.tensors.get(role, f"{step.name or step.op}.{role}") for role in arrays}
            for role in arrays.keys() & {"weight", "values"}:
                if matrix is not None and (codes := self._codes(step, matrix, arrays[role], numbers)):
                    packed[names[role]] = codes
            tensors |= {names[role]: array for role, array in arrays.items()}
            steps.append(replace(step, attributes=attributes, tensors=names))
        return replace(self._program, steps=tuple(steps), tensors=tensors), packed


def _stored(matrix: Matrix) -> tuple[str, dict[str, Any]]:
    """The storage that takes the fewest bytes, as a program has it."""
    one = matrix
    found: dict[str, dict[str, Any]] = {"dense": {"weight": _empty(np.float32, one.filters, one.columns)}}
    if one.groups == 1:
        found["columns"] = {"weight": _empty(np.float32, one.filled, one.kept)}
        if one.filled < one.filters:
            found["columns"]["filters"] = _index(one.filled, one.filters - 1)
        if one.kept < one.columns:
            found["columns"]["columns"] = _index(one.kept, one.columns - 1)
    found["sparse"] = {
        "values": _empty(np.float32, one.weights),
        "indices": _index(one.weights, one.columns - 1),
        "offsets": _index(one.filters + 1, one.weights),
    }
    storage = min(found, key=lambda kind: sum(tensor.nbytes for tensor in found[kind].values()))
    return storage, found[storage]


def _empty(dtype: type[np.generic], *shape: int) -> Any:
    """A tensor without memory."""
    return np.broadcast_to(dtype(0), shape)


def _index(count: int, most: int) -> Any:
    return _empty(np.uint16 if most < 2**16 else np.uint32, count)


def _like(tensor: Any, made: Shape, now: Shape) -> Any:
    """A tensor that goes with the channels of a value that had the shape `made`."""
    if tensor.ndim > len(made) or tensor.dtype != np.float32:
        return tensor
    ends = zip(tensor.shape, made[len(made) - tensor.ndim :], now[len(now) - tensor.ndim :], strict=True)
    return _empty(np.float32, *(after if size == before else size for size, before, after in ends))
