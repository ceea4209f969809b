"""How long the steps of a program take on this machine, predicted for any number of filters and columns.

A step's *kind* is what pruning leaves as it is: the operation, its kernel, the plane it works on. For every kind that a
network has, steps of some sizes are timed by the engine itself, in programs made for that. The cost model that chooses
the kernels (`_core.conv_estimate`) says how the cycles follow filters and columns; what is interpolated between the
sizes timed is only the logarithm of measured over estimated, which varies little. Weights that come from the
second-level cache and weights that come from beyond it are timed apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from autocompress_fast import _core
from autocompress_fast._files import write_atomically
from autocompress_fast.engine.machine import processor, second_level_cache
from autocompress_fast.engine.native import NativeExecutor, fused_steps
from autocompress_fast.engine.program import (
    Input,
    Program,
    ProgramError,
    Shape,
    Step,
    StepInfo,
    pool_output_size,
    validate,
)
from autocompress_fast.progress import Progress

__all__ = ["Costs", "Kind", "Outline", "Work", "timed"]

Array = np.ndarray[Any, Any]
Size = tuple[int, ...]

SHARES: Final = (1.0, 0.5, 0.25, 0.125)
"""Of the filters and channels of the largest layer of a kind that are timed."""
ODD: Final = ((0.7, 0.7), (0.35, 0.8), (0.8, 0.3), (0.41, 0.41), (0.19, 0.19))
"""More (channels, filters), rounded to odd numbers: as pruned networks have them."""
COLUMNS: Final = (0.5, 0.25, 0.1)
"""Shares of the columns that are timed, of all and of some of the filters."""
TIME: Final = 0.05
"""Seconds that the rounds of one program take, at least `LEAST_ROUNDS`."""
LEAST_ROUNDS: Final = 9
MOST_ROUNDS: Final = 400
FOOTPRINTS: Final = (2**24, 2**26)
"""Bytes of weights of a network in which they come from the third-level cache, and from memory where that is small."""
LARGE: Final = 2**17
"""Bytes of weights of a layer from which on they are also timed as they come from far beyond."""
VALUES: Final = (3, 32, 32)
"""Shape of what a convolution reads of which the results are written to where the caches do not have it."""

_FORMAT: Final = 1
_LENGTH: Final = 1.5  # octaves over which a ratio says something about others
_KERNEL_SWITCH: Final = 0.5  # what a ratio of another kernel counts
_PLAIN_CYCLES: Final = 300.0  # of a step that is no convolution, whatever its size


@dataclass(frozen=True)
class Kind:
    """What pruning leaves as it is of a step.

    Attributes:
        op: "conv", "expansion" (1x1, then depthwise), "linear", or the operation.
        planes: of the inputs, without the channels.
        attributes: (name, value) pairs.
    """

    op: str
    planes: tuple[Shape, ...]
    attributes: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    @property
    def _found(self) -> dict[str, Any]:
        return dict(self.attributes)

    @property
    def key(self) -> str:
        """As a line of text."""
        return json.dumps([self.op, self.planes, dict(self.attributes)], separators=(",", ":"))


@dataclass(frozen=True)
class Work:
    """A step, or a convolution and what is computed with it, at one size.

    Attributes:
        kind: what it is.
        size: (channels, filters, columns) of a layer, otherwise the first dimension of each input.
        steps, shapes: of a program, and those of the inputs of its first step: an example of the kind.
        values: elements that it reads and makes, for one sample.
    """

    kind: Kind
    size: Size
    steps: tuple[Step, ...] = field(compare=False)
    shapes: tuple[Shape, ...] = field(compare=False)
    values: int = field(default=0, compare=False)

    @property
    def name(self) -> str:
        """The module that it comes from."""
        return self.steps[0].name if self.steps else self.kind.op

    @property
    def op(self) -> str:
        """The operations."""
        return " + ".join(step.op for step in self.steps) or self.kind.op


class Outline:
    """A program whose layers may become smaller: the work that its steps are then.

    Args:
        program: that `validate` passes.
        infos: what it returned.

    Attributes:
        shapes: of all values, for one sample.
        columns: value of a layer -> how many columns it keeps.
    """

    def __init__(self, program: Program, infos: Sequence[StepInfo]) -> None:
        self.program = program
        self.shapes = [given.shape for given in program.inputs] + [info.shape for info in infos]
        self.columns = {
            step.output: _columns(program, step, self.shapes[step.inputs[0]])
            for step in program.steps
            if step.op in ("conv", "linear")
        }
        self._steps = {step.output: step for step in program.steps}
        self._kinds: dict[tuple[int, int], Kind] = {}

    def works(
        self, shapes: Sequence[Shape] | None = None, columns: Mapping[int, int] | None = None, *, fuse: bool = True
    ) -> list[Work]:
        """The work of every step that takes any.

        Args:
            shapes: of all values after pruning; as they are when not given.
            columns: value of a layer -> columns that it keeps then.
            fuse: 1x1 convolutions with the depthwise ones behind them, where the engine does it.
        """
        shapes, columns = self.shapes if shapes is None else shapes, self.columns if columns is None else columns
        fused = fused_steps(self.program, shapes)
        if not fuse:
            fused = {value: other for value, other in fused.items() if self._steps[value].op == "add"}
        done = set(fused.values())
        return [
            self._work(step, self._steps.get(fused.get(step.output, -1)), shapes, columns)
            for step in self.program.steps
            if step.output not in done
        ]

    def _work(self, step: Step, conv: Step | None, shapes: Sequence[Shape], columns: Mapping[int, int]) -> Work:
        steps = (step,) if conv is None else (conv, step)
        first = steps[0]
        given = tuple(shapes[value] for value in first.inputs)
        key = (step.output, first.output)
        if key not in self._kinds:
            self._kinds[key] = _kind(steps, given, self._tensor_shapes(first))
        if first.output in columns:
            axis = 0 if first.op == "conv" else -1
            size: Size = (given[0][axis], shapes[first.output][axis], columns[first.output])
        else:
            size = tuple(shape[0] if shape else 1 for shape in given)
        made = math.prod(shapes[step.output]) * (2 if len(steps) == 2 and step.op == "add" else 1)
        return Work(self._kinds[key], size, steps, given, sum(map(math.prod, given)) + made)

    def _tensor_shapes(self, step: Step) -> dict[str, Shape]:
        return {role: self.program.tensors[name].shape for role, name in step.tensors.items()}


def _columns(program: Program, step: Step, given: Shape) -> int:
    """How many columns of a layer are kept; of single weights, those in which there is any."""
    a = step.attributes
    if a["storage"] == "sparse" and a.get("groups", 1) == 1:
        return len(np.unique(program.tensors[step.tensors["indices"]]))
    if "columns" in step.tensors:
        return int(program.tensors[step.tensors["columns"]].size)
    return given[0] * math.prod(a["kernel"]) if step.op == "conv" else given[-1]


def _kind(steps: Sequence[Step], given: Sequence[Shape], tensors: Mapping[str, Shape]) -> Kind:
    step, a = steps[0], steps[0].attributes
    planes = tuple(shape[1:] for shape in given)
    if step.op == "linear":
        return Kind("linear", (given[0][:-1],), (("activation", _activation(a)),))
    if step.op == "conv":
        last = steps[-1]
        window = last if len(steps) == 2 and last.op == "conv" else step
        grouped: int | str = window.attributes["groups"]
        if grouped == window.attributes["filters"] and grouped != 1:
            grouped = "depthwise"
        named = {name: window.attributes[name] for name in ("kernel", "stride", "dilation", "padding")}
        named |= {"groups": grouped, "activation": _activation(last.attributes)}
        if window is not step:
            return Kind("expansion", planes, tuple((named | {"expanded": _activation(a)}).items()))
        return Kind("conv", planes, tuple((named | {"residual": len(steps) == 2}).items()))
    # What of the attributes is sizes changes with them.
    fixed = {k: v for k, v in a.items() if not (step.op in ("reshape", "slice", "pad") and k != "axis")}
    if "activation" in fixed:
        fixed["activation"] = _activation(a)
    if "constant" in tensors:
        fixed["constant"] = len(tensors["constant"])
    return Kind(step.op, planes, tuple(sorted(fixed.items())))


def _activation(attributes: Mapping[str, Any]) -> str:
    """Those that cost nothing count as one."""
    name: str = attributes["activation"]
    return "relu" if name in ("none", "relu6") else name


# --- estimates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Estimate:
    method: str
    cycles: float  # with weights in the second-level cache
    arrival: float  # more of them when they are beyond it
    weights: int  # bytes

    @property
    def levels(self) -> tuple[float, float, float]:
        """Cycles with weights near, beyond the cache, and far beyond it."""
        return self.cycles, self.cycles + self.arrival, self.cycles + self.arrival


def _estimate(work: Work, samples: int) -> _Estimate:
    kind, size = work.kind, work.size
    if kind.op == "conv":
        channels, filters, columns = size
        groups = channels if kind["groups"] == "depthwise" else kind["groups"]
        return _conv_estimate(kind, (channels, *kind.planes[0]), filters, columns, groups, samples)
    if kind.op == "linear":
        features, filters, columns = size
        rows = samples * math.prod(kind.planes[0])
        return _estimated(
            _core.conv_estimate((features, 1, 1), filters, columns, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), 1, rows)
        )
    if kind.op == "expansion":
        return _expansion_estimate(kind, size, samples)
    elements = sum(n * math.prod(plane) for n, plane in zip(size, kind.planes, strict=True))
    return _Estimate("", _PLAIN_CYCLES + samples * elements / 8, 0.0, 0)


def _conv_estimate(kind: Kind, given: Shape, filters: int, columns: int, groups: int, images: int) -> _Estimate:
    window = (kind["kernel"], kind["stride"], kind["dilation"], kind["padding"])
    return _estimated(_core.conv_estimate(given, filters, columns, *window, groups, images))


def _estimated(found: tuple[str, float, float, int]) -> _Estimate:
    method, cycles, arrival, weights = found
    return _Estimate(method, cycles - arrival, arrival, weights)


def _expansion_estimate(kind: Kind, size: Size, samples: int) -> _Estimate:
    """Of both convolutions, for as many channels at once as fit into a part of the cache."""
    channels, filters, columns = size
    height, width = kind.planes[0]
    count = -(-filters * height * width * 4 // (640 << 10))
    part = -(-filters // count)
    no = (0, 0, 0, 0)
    first = _core.conv_estimate((channels, height, width), part, columns, (1, 1), (1, 1), (1, 1), no, 1, 1)
    taps = math.prod(kind["kernel"])
    second = _conv_estimate(kind, (part, height, width), part, part * taps, part, 1)
    both = _estimated(first)
    cycles = count * samples * (both.cycles + second.cycles)
    return _Estimate(both.method, cycles, count * both.arrival, count * (both.weights + second.weights))


# --- sizes that are timed --------------------------------------------------------------------------------------------


def _sizes(kind: Kind, largest: Size) -> list[Size]:
    """From the largest down."""
    if kind.op not in ("conv", "linear", "expansion"):
        return [tuple(max(1, round(n * share)) for n in largest) for share in SHARES]
    channels, filters, _ = largest
    taps = math.prod(kind["kernel"]) if kind.op == "conv" else 1
    groups = kind["groups"] if kind.op == "conv" else 1
    if groups == "depthwise":
        few = sorted({max(1, round(channels * share)) for share in (*SHARES, 0.7, 0.41, 0.19)})
        return [(n, n, n * taps) for n in reversed(few)]
    found = {(c, f): None for c in _ladder(channels, groups) for f in _ladder(filters, groups)}
    if groups == 1:
        found |= {(_odd(c * channels), _odd(f * filters)): None for c, f in ODD if channels > 4}
    sizes = [(c, f, c * taps) for c, f in found]
    if groups == 1:
        some = [(c, f) for c in (channels, channels // 2) for f in (filters, filters // 3) if c and f]
        sizes += [(c, f, max(1, round(share * c * taps))) for c, f in some for share in COLUMNS]
    return list(dict.fromkeys(sizes))


def _ladder(largest: int, groups: int) -> list[int]:
    """What the input of a network has is never pruned."""
    shares = SHARES if largest // groups > 4 else SHARES[:1]
    return list(dict.fromkeys(max(1, round(largest / groups * share)) * groups for share in shares))


def _odd(size: float) -> int:
    return int(size) | 1


def _example(work: Work, size: Size, number: int, values: Sequence[int], rng: np.random.Generator) -> _Made:
    """Steps that do the work at another size, on these values; their results are numbered from `number`."""
    kind, step = work.kind, work.steps[0]
    tensors: dict[str, Array] = {}

    def layer(step: Step, filters: int, width: int, kept: int, value: int, made: int, **changed: Any) -> Step:
        names = {"weight": f"{made}.weight", "bias": f"{made}.bias"}
        tensors[names["weight"]] = np.full((filters, kept), 1 / max(1, kept), np.float32)
        tensors[names["bias"]] = np.zeros(filters, np.float32)
        storage = "dense"
        if kept < width:
            storage, names["columns"] = "columns", f"{made}.columns"
            tensors[names["columns"]] = np.sort(rng.permutation(width)[:kept]).astype(np.uint32)
        return Step(
            step.op, (value,), made, {**step.attributes, "filters": filters, "storage": storage, **changed}, names
        )

    if kind.op in ("conv", "linear", "expansion"):
        channels, filters, columns = size
        taps = math.prod(step.attributes["kernel"]) if step.op == "conv" else 1
        if kind.op == "conv" and kind["groups"] == "depthwise":
            steps = [layer(step, filters, taps, taps, values[0], number, groups=filters)]
        else:
            groups = step.attributes.get("groups", 1)
            width, kept = channels * taps // groups, columns // groups
            steps = [layer(step, filters, width, kept, values[0], number)]
        if kind.op == "expansion":
            last = work.steps[1]
            taps = math.prod(last.attributes["kernel"])
            steps.append(layer(last, filters, taps, taps, number, number + 1, groups=filters))
        elif len(work.steps) == 2:
            steps.append(replace(work.steps[1], inputs=(number, values[1]), output=number + 1))
        return _Made(steps, tensors)
    return _Made([replace(step, inputs=tuple(values), output=number)], tensors)


def _result(work: Work, size: Size, given: Sequence[Shape]) -> Shape:
    """The shape of what the work makes of inputs of these shapes, where a convolution usually reads it; else ()."""
    if work.kind.op in ("max_pool", "avg_pool"):
        a = work.steps[0].attributes
        windows = (a["kernel"], a["stride"], a["padding"], a.get("dilation", (1, 1)))
        axes = zip(given[0][1:], *windows, strict=True)
        return (size[0], *(pool_output_size(n, k, s, p, d, a["ceil"]) for n, k, s, p, d in axes))
    if work.kind.op in ("add", "sub", "mul", "div", "activation", "clip", "leaky_relu"):
        return given[0]
    if work.kind.op not in ("conv", "expansion"):
        return ()
    window = work.steps[-1 if work.kind.op == "expansion" else 0].attributes
    top, bottom, left, right = window["padding"]
    height, width = (
        (n + pads - d * (k - 1) - 1) // s + 1
        for n, pads, k, s, d in zip(
            given[0][1:],
            (top + bottom, left + right),
            window["kernel"],
            window["stride"],
            window["dilation"],
            strict=True,
        )
    )
    return (size[1], height, width)


def _reader(value: int, made: int, tensors: dict[str, Array]) -> Step:
    """A convolution that does next to nothing: what one reads, as most values of a network, lies in padded planes."""
    window = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
    attributes = {**window, "filters": 1, "storage": "columns", "activation": "none"}
    tensors[f"{made}.weight"], tensors[f"{made}.columns"] = np.ones((1, 1), np.float32), np.array([4], np.uint16)
    return Step("conv", (value,), made, attributes, {"weight": f"{made}.weight", "columns": f"{made}.columns"})


@dataclass(frozen=True)
class _Made:
    steps: list[Step]
    tensors: dict[str, Array]


def _given(work: Work, size: Size) -> list[Shape]:
    """Shapes of what the work reads at another size."""
    kind = work.kind
    if kind.op == "linear":
        return [(*kind.planes[0], size[0])]
    if kind.op not in ("conv", "expansion"):
        return [(n, *plane) if shape else () for n, plane, shape in zip(size, kind.planes, work.shapes, strict=True)]
    shape = (size[0], *kind.planes[0])
    return [shape, _result(work, size, [shape])] if kind.op == "conv" and kind["residual"] else [shape]


# --- timing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a program: of its steps (value of each -> seconds), and what comes on top."""

    steps: Mapping[int, float]
    rest: float


def timed(program: Program, samples: int, threads: int) -> Timing:
    """Run a program for some time.

    The machine may be doing something else now and then: what counts, of every step, is the mean of the third of the
    rounds in which it took least.
    """
    executor = NativeExecutor(program, validate(program), threads)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((samples, *given.shape), np.float32) for given in program.inputs]

    def rounds(count: int) -> Array:
        """(rounds, steps + 1) seconds, last what a call takes besides its steps."""
        found = []
        for _ in range(count):
            begin = time.perf_counter()
            steps = executor.network.profile(arrays, threads, len(arrays[0]), 1)[0]
            found.append([*steps, time.perf_counter() - begin - steps.sum()])
        return np.array(found)

    rounds(1)
    first = rounds(2)
    count = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(TIME / first.sum(axis=1).min())))
    *steps, rest = np.sort(rounds(count), axis=0)[: count // 3].mean(axis=0).tolist()
    outputs = [made[-1].output for made in executor.steps]
    return Timing(dict(zip(outputs, steps, strict=True)), max(0.0, rest))


def _together(works: Sequence[tuple[Work, Size]], *, evict: int) -> tuple[Program, dict[int, int]]:
    """A program that does all of it, each after its inputs have been written; value of a step -> index of the work.

    Args:
        evict: bytes of other weights that are read before it.
    """
    rng = np.random.default_rng(0)
    inputs: dict[Shape, int] = {(1024,): 0}
    for work, size in works:
        for shape in _given(work, size):
            inputs.setdefault(shape, len(inputs))
    steps: list[Step] = []
    tensors: dict[str, Array] = {}
    found: dict[int, int] = {}
    number = len(inputs)
    if evict >= 4096:
        steps.append(_eviction(0, number, evict, tensors))
        number += 1
    for index, (work, size) in enumerate(works):
        values = []
        for shape in _given(work, size):
            steps.append(Step("activation", (inputs[shape],), number, {"activation": "relu"}))
            values.append(number)
            number += 1
        made = _example(work, size, number, values, rng)
        number += len(made.steps)
        steps += made.steps
        tensors |= made.tensors
        found[number - 1] = index
        result = _result(work, size, _given(work, size))
        for value, shape in [*zip(values, _given(work, size), strict=True), (number - 1, result)]:
            if len(shape) == 3 and shape[1:] != (1, 1):
                steps.append(_reader(value, number, tensors))
                number += 1
    given = tuple(Input(str(i), shape) for i, shape in enumerate(inputs))
    return Program(given, tuple(steps), (number - 1,), tensors), found


# --- what is known ---------------------------------------------------------------------------------------------------


class Costs:
    """What steps cost on this machine: measured once, kept in a file, predicted for every size.

    Args:
        threads: that a run may use.
        samples: of a run.
        directory: of the file; None to keep nothing.
    """

    def __init__(self, *, threads: int, samples: int, directory: Path | None) -> None:
        self.threads, self.samples = threads, samples
        self._machine = {
            "processor": processor(),
            "isa": _core.active_isa(),
            "kernels": f"{_core.__version__} {_core.compiler}",
            "threads": threads,
            "samples": samples,
        }
        name = hashlib.sha256(json.dumps(self._machine).encode()).hexdigest()[:16]
        self.path = None if directory is None else directory / f"latency-{name}.json"
        self._points: dict[str, dict[Size, _Seconds]] = {}
        self._curves: dict[str, _Curve] = {}
        self._known: dict[Work, tuple[_Seconds, _Estimate]] = {}

    def learn(self, works: Iterable[Work], progress: Progress) -> None:
        """Time what is not known yet of the kinds of these works, up to their sizes.

        The file is read first, and written when something was timed. One that cannot be read is replaced, with a note.
        """
        self._read(progress)
        kinds: dict[Kind, list[Work]] = {}
        for work in (*_MEMORY, *works):
            kinds.setdefault(work.kind, []).append(work)
        missing: list[tuple[Work, list[Size]]] = []
        for kind, found in kinds.items():
            largest = tuple(max(sizes) for sizes in zip(*(work.size for work in found), strict=True))
            known = self._points.setdefault(kind.key, {})
            if new := [size for size in _sizes(kind, largest) if size not in known]:
                missing.append((max(found, key=lambda work: work.size), new))
        if not missing:
            return
        progress.start("timing layers", len(missing))
        count = 0
        for work, sizes in missing:
            self._points[work.kind.key].update(self._measured(work, sizes))
            self._curves.pop(work.kind.key, None)
            count += len(sizes)
            progress.tell(f"{count} sizes of {len(missing)} kinds of layers")
            progress.advance()
        self._known.clear()
        progress.finish()
        self._write(progress)

    def seconds(self, works: Sequence[Work]) -> list[float]:
        """What each takes in a network of these.

        Raises:
            ValueError: a kind that was not learnt.
        """
        found = [self._of(work) for work in works]
        shares = _shares(sum(estimate.weights for _, estimate in found))
        levels = np.array([seconds for seconds, _ in found]).reshape(-1, 3)
        result: list[float] = (levels @ shares).tolist()
        return result

    def arrival(self, works: Sequence[Work]) -> float:
        """Seconds until values have come back into the second-level cache, which weights drove out of it."""
        found = [self._of(work) for work in works]
        per_byte = np.array(self._points[_VALUES.key][1,])
        shares = _shares(sum(estimate.weights for _, estimate in found))
        values = self.samples * max((4 * work.values for work in works), default=0)
        return float((per_byte - per_byte[0]).clip(0) @ shares) * min(values, second_level_cache())

    def _of(self, work: Work) -> tuple[_Seconds, _Estimate]:
        if work not in self._known:
            estimate = _estimate(work, self.samples)
            self._known[work] = self._curve(work).at(work, estimate), estimate
        return self._known[work]

    def _curve(self, work: Work) -> _Curve:
        key = work.kind.key
        if key not in self._curves:
            points = {size: seconds for size, seconds in self._points.get(key, {}).items() if seconds[0] >= 0}
            if not points:
                raise ValueError(f"no {work.kind.op} like that of {work.name!r} was timed: LatencyModel.of times them")
            self._curves[key] = _Curve(work, points, self.samples)
        return self._curves[key]

    def _measured(self, work: Work, sizes: Sequence[Size]) -> dict[Size, _Seconds]:
        """Seconds for every level; negative ones for sizes at which there is no such step."""
        if work.kind.op == "call":
            rests = [timed(_call(work, evict), self.samples, self.threads).rest for evict in (0, *FOOTPRINTS)]
            return dict.fromkeys(sizes, (rests[0], rests[1], rests[2]))
        if work.kind.op == "values":
            found = [self._per_byte(evict) for evict in (0, *FOOTPRINTS)]
            return dict.fromkeys(sizes, (found[0], found[1], found[2]))
        possible = [size for size in sizes if _is_possible(work, size)]
        if not _has_weights(work):
            near = beyond = far = self._timed(work, possible, FOOTPRINTS[0])
        else:
            cache = second_level_cache() // 2  # more than that is read anew each time
            beyond = self._timed(work, possible, FOOTPRINTS[0], fill=True)
            near = beyond | self._timed(work, [size for size in possible if self._weights(work, size) <= cache], cache)
            large = [size for size in possible if self._weights(work, size) >= LARGE]
            far = beyond | self._timed(work, large, FOOTPRINTS[1], fill=True)
        measured = {size: (near[size], beyond[size], max(beyond[size], far[size])) for size in possible}
        return {size: measured.get(size, (-1.0, -1.0, -1.0)) for size in sizes}

    def _weights(self, work: Work, size: Size) -> int:
        return _estimate(replace(work, size=size), self.samples).weights

    def _timed(self, work: Work, sizes: Sequence[Size], most: int, *, fill: bool = False) -> dict[Size, float]:
        """Seconds for each, in programs whose weights take at most so many bytes, if it can be; as many with `fill`."""
        found: dict[Size, float] = {}
        weights = {size: self._weights(work, size) for size in sizes}
        for part in _parts(sizes, list(weights.values()), most):
            evict = max(0, most - sum(weights[size] for size in part)) if fill else 0
            program, values = _together([(work, size) for size in part], evict=evict)
            steps = timed(program, self.samples, self.threads).steps
            found |= {part[index]: steps[value] for value, index in values.items()}
        return found

    def _per_byte(self, evict: int) -> float:
        """Seconds that a convolution takes for a byte that it writes."""
        tensors: dict[str, Array] = {}
        steps = [_plain_conv(VALUES, 64, 1, 2, tensors)]
        if evict:
            steps.append(_eviction(0, 3, evict, tensors))
        program = Program((Input("0", (1024,)), Input("1", VALUES)), tuple(steps), (2 + len(steps) - 1,), tensors)
        seconds = timed(program, self.samples, self.threads).steps[2]
        return seconds / (4 * self.samples * 64 * math.prod(VALUES[1:]))

    # ---- the file

    def _read(self, progress: Progress) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_bytes())
            if content["format"] != _FORMAT or content["machine"] != self._machine:
                raise ValueError("it is of another machine or version")
            for key, rows in content["points"].items():
                points = self._points.setdefault(str(key), {})
                for size, *seconds in rows:
                    near, beyond, far = map(float, seconds)
                    if not all(type(n) is int for n in size) or not math.isfinite(near + beyond + far):
                        raise ValueError(f"{size} took {seconds} seconds")
                    points[tuple(size)] = (near, beyond, far)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._points.clear()
            progress.note(f"{self.path} cannot be used and is written anew ({type(error).__name__}: {error})")

    def _write(self, progress: Progress) -> None:
        if self.path is None:
            return
        points = {
            key: [[size, *seconds] for size, seconds in sizes.items()] for key, sizes in self._points.items() if sizes
        }
        content = {"format": _FORMAT, "machine": self._machine, "points": points}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(content, indent=1).encode())
        except OSError as error:
            progress.note(f"what was timed cannot be kept: {error}")


_Seconds = tuple[float, float, float]
"""With weights in the second-level cache, beyond it, and far beyond it: in networks of the sizes of `FOOTPRINTS`."""

_VALUES: Final = Kind("values", ())


_MEMORY: Final = (Work(_VALUES, (1,), (), ()),)


class _Curve:
    """The ratio of measured to estimated time over the sizes of a kind, interpolated by its logarithm (kriging)."""

    def __init__(self, work: Work, points: Mapping[Size, _Seconds], samples: int) -> None:
        works = [replace(work, size=size) for size in points]
        estimates = [_estimate(one, samples) for one in works]
        self.at_points = np.array([_features(one) for one in works])
        self.methods = np.array([estimate.method for estimate in estimates])
        cycles = np.array([e.levels for e in estimates])
        ratios = np.log(np.maximum(np.array(list(points.values())), 1e-10) / cycles)
        self.mean = ratios.mean(axis=0)
        among = self._likeness(self.at_points[:, None], self.methods[:, None])
        self.weights = np.linalg.solve(among, ratios - self.mean)

    def _likeness(self, features: Array, methods: Any) -> Array:
        """How much the ratio there says about those at the points, 1 for the same place."""
        distance = np.sqrt(((features - self.at_points) ** 2).sum(axis=-1))
        likeness: Array = np.exp(-distance / _LENGTH) * np.where(methods == self.methods, 1.0, _KERNEL_SWITCH)
        return likeness

    def at(self, work: Work, estimate: _Estimate) -> _Seconds:
        ratios = np.exp(self.mean + self._likeness(np.array(_features(work)), estimate.method) @ self.weights)
        near, beyond, far = (ratios * estimate.levels).tolist()
        return near, beyond, far


def _features(work: Work) -> list[float]:
    """Where a size lies, in octaves."""
    if work.kind.op not in ("conv", "linear", "expansion"):
        return [math.log2(sum(work.size))]
    channels, filters, columns = work.size
    columns = max(1, columns)
    return [math.log2(filters), math.log2(columns), math.log2(columns / channels)]


def _shares(weights: int) -> Array:
    """(3,) how much the seconds of every level count in a network with so many bytes of weights."""
    cache = second_level_cache()
    levels = np.log2([cache, max(FOOTPRINTS[0], 4 * cache), max(FOOTPRINTS[1], 16 * cache)])
    at = math.log2(max(weights, 1))
    beyond, far = np.interp(at, levels[:2], [0, 1]), np.interp(at, levels[1:], [0, 1])
    return np.array([1 - beyond, beyond - far, far])


def _has_weights(work: Work) -> bool:
    return work.kind.op in ("conv", "linear", "expansion")


def _is_possible(work: Work, size: Size) -> bool:
    try:
        program, _ = _together([(work, size)], evict=0)
        infos = validate(program)
    except ProgramError:
        return False
    if work.kind.op != "expansion":
        return True
    return bool(fused_steps(program, [g.shape for g in program.inputs] + [i.shape for i in infos]))


def _parts(sizes: Sequence[Size], weights: Sequence[int], most: int) -> Iterator[list[Size]]:
    """Cut the sizes into lists of which the weights take at most so much together; one size may take more."""
    part: list[Size] = []
    total = 0
    for size, own in zip(sizes, weights, strict=True):
        if part and total + own > most:
            yield part
            part, total = [], 0
        part.append(size)
        total += own
    if part:
        yield part


def _call(work: Work, evict: int) -> Program:
    """A program of which the steps hardly do anything that outlasts them."""
    inputs = tuple(Input(str(i), shape) for i, shape in enumerate((*work.shapes, (1024,))))
    steps: list[Step] = []
    tensors: dict[str, Array] = {}
    for i, shape in enumerate(work.shapes):
        value = len(inputs) + i
        if len(shape) == 3:  # a plane with a halo, as convolutions read it
            steps.append(_plain_conv(shape, 1, i, value, tensors))
        else:
            steps.append(Step("activation", (i,), value, {"activation": "relu"}))
    outputs = tuple(range(len(inputs), len(inputs) + len(steps)))
    if evict:
        steps.append(_eviction(len(inputs) - 1, len(inputs) + len(steps), evict, tensors))
    return Program(inputs, tuple(steps), outputs, tensors)


def _plain_conv(shape: Shape, filters: int, value: int, made: int, tensors: dict[str, Array]) -> Step:
    window = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
    attributes = {**window, "filters": filters, "storage": "dense", "activation": "none"}
    tensors[f"{made}.weight"] = np.ones((filters, 9 * shape[0]), np.float32)
    return Step("conv", (value,), made, attributes, {"weight": f"{made}.weight"})


def _eviction(value: int, made: int, size: int, tensors: dict[str, Array]) -> Step:
    """A linear layer of 1024 features whose weights take so many bytes: they drive others out of the caches."""
    filters = size // 4096
    tensors["evict"] = np.full((filters, 1024), 1e-3, np.float32)
    attributes = {"filters": filters, "storage": "dense", "activation": "none"}
    return Step("linear", (value,), made, attributes, {"weight": "evict"})


def call_work(program: Program) -> Work:
    """What a call takes besides its steps."""
    shapes = tuple(given.shape for given in program.inputs)
    return Work(Kind("call", shapes), (1,) * len(shapes), (), shapes)
