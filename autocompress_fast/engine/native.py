"""Running a checked program with the compiled kernels.

Every step becomes an operation of `_core.Network`; a convolution whose result is only added to another value adds it
itself. The network then lays out its values, plans its convolutions and runs without Python.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from autocompress_fast import _core
from autocompress_fast.engine.program import (
    MAX_LIVE,
    Program,
    ProgramError,
    Shape,
    Step,
    StepInfo,
    is_narrow,
    rounds_residual,
    sparse_block,
)

__all__ = ["NativeExecutor", "fused_additions", "fused_steps"]

Array = np.ndarray[Any, Any]

LEAST_WORKSPACE: Final = 2**22
MOST_WORKSPACE: Final = 3 * 2**23
"""Bytes that the values of the samples computed at once may take: within these bounds, half of what the weights take.

More samples make better use of weights that are read once, but their values leave the caches.
"""

MOST_SAMPLE: Final = 8 * MAX_LIVE
"""Bytes that the values of one sample may take: twice those that `validate` counts, because values keep the padding of
their readers for as long as they live, and do not fill all the gaps between them."""

FEW_SAMPLES: Final = 4
"""So many are always computed by the whole network."""

LEAST_EXPANSION: Final = 3 << 18
"""Bytes of a sample from which on the result of a 1x1 convolution is made and used some channels at a time."""

CACHE: Final = 3 << 19
"""Bytes of a processor's own cache that the values which a step reads and makes may take, to be found by the next."""

SHARED: Final = 2**23
"""Bytes of the cache that processors share for values of 8 bits: they are found there in half the time of memory. For
float32 this decides nothing that measurements would."""

BEGINNING: Final = 2**13
"""Bytes that could have been moved while a step begins."""

LEAST_GAIN: Final = 0.95
"""Two stages must save a twentieth of the bytes that travel, those between them included."""

MOST_STAGE: Final = 2**26
"""Bytes that the values of the samples computed at once may take."""


@dataclass(frozen=True)
class Stage:
    """Some operations of a network, which are run on all samples, so many at a time, before the next stage begins."""

    network: _core.Network
    inputs: Sequence[int]  # numbers of values of the whole network
    outputs: Sequence[int]
    part: int


class NativeExecutor:
    """Runs a program that `validate` has passed; keeps no state between runs and may be used by several threads.

    Args:
        program: the program; its tensors are copied.
        infos: what `validate` returned for it.
        threads: how many processors a run may use. Results do not depend on it.
        precision: "bfloat16" multiplies numbers of that kind where it is quicker.
        ways: of computing layers, for (operation, samples at once), or 0 samples for all other numbers; those that are
            not named, and those that cannot be, are chosen by estimate.

    Attributes:
        part: how many samples are computed at once, if they are few (`stages` says so for others).
        steps: of the program, what each operation of the network stands for: one, or a convolution and an addition.
    """

    def __init__(
        self,
        program: Program,
        infos: Sequence[StepInfo],
        threads: int,
        precision: str = "float32",
        ways: Mapping[tuple[int, int], str] | None = None,
    ) -> None:
        self.program, self.threads = program, threads
        builder = _Builder(program, infos, precision)
        self.network, self.steps = builder.build(), tuple(builder.made)
        for (operation, samples), way in (ways or {}).items():
            self.network.prefer(operation, samples, way)
        self._outputs = [builder.numbers[value] for value in program.outputs]
        self._costs = builder.costs()
        self._stages: dict[int, tuple[Stage, ...]] = {}
        self._cut: dict[tuple[int, int], tuple[_core.Network, list[int], list[int]]] = {}
        one = self.network.workspace_bytes(1)
        if one > MOST_SAMPLE:
            raise ProgramError(f"one sample needs {one} bytes at once; at most {MOST_SAMPLE} are allowed")
        self.part = max(1, _workspace(program) // one)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Outputs for float32 inputs of the declared shapes, each with the same number of samples first."""
        samples = len(inputs[0])
        if samples == 0:
            ones = [np.zeros((1, *given.shape), np.float32) for given in self.program.inputs]
            return [y[:0] for y in self.network.run(ones, self.threads, 1)]
        if samples <= FEW_SAMPLES:
            return self.network.run(list(inputs), self.threads, self.part)
        stages = self.stages(samples)
        if len(stages) == 1:  # may return a value twice, in arrays of their own
            return self.network.run(list(inputs), self.threads, stages[0].part)
        values = dict(enumerate(inputs))
        for stage in stages:
            values |= self._run_stage(stage, values)
        return [values[value] for value in self._outputs]

    def _run_stage(self, stage: Stage, values: Mapping[int, Array]) -> dict[int, Array]:
        made = stage.network.run([values[value] for value in stage.inputs], self.threads, stage.part)
        return dict(zip(stage.outputs, made, strict=True))

    def profile(self, inputs: Sequence[Array], rounds: int) -> Array:
        """(rounds, steps): seconds that each step takes, with all threads working on it."""
        values, seconds = dict(enumerate(inputs)), []
        for stage in self.stages(len(inputs[0])):
            given = [values[value] for value in stage.inputs]
            seconds.append(stage.network.profile(given, self.threads, stage.part, rounds))
            values |= self._run_stage(stage, values)
        return np.hstack(seconds)

    def ways(self, samples: int) -> list[tuple[tuple[int, ...], str | None]]:
        """Of every operation, how many samples it computes at once when there are so many, and in what way."""
        found: list[tuple[tuple[int, ...], str | None]] = []
        for stage in self.stages(samples):
            parts = -(-samples // min(samples, stage.part))
            size = -(-samples // parts)
            sizes = tuple(sorted({size, samples - (-(-samples // size) - 1) * size}, reverse=True))
            found += [(sizes, way) for way in stage.network.ways(size)]
        return found

    def workspace_bytes(self, samples: int) -> int:
        """Memory of the values of so many samples, at the stage that takes most; threads have parts of their own.

        What lies between two stages comes on top, as inputs and outputs do.
        """
        most = 0
        for stage in self.stages(samples):
            part, parts = min(samples, stage.part), -(-samples // stage.part)
            most = max(most, stage.network.workspace_bytes(part) * min(parts, self.threads))
        return most

    def stages(self, samples: int) -> tuple[Stage, ...]:
        """How so many samples are computed: whole, or first the steps whose values are large, some samples at a time.

        Large values should stay in the cache until they are read, which takes few samples at once; weights that do not
        fit there come from memory for every part, which takes many. Where a network has the ones first and the others
        later, as most have, each gets its own.
        """
        planned = self._stages.get(samples)
        if planned is None:
            if len(self._stages) > 64:
                self._stages.clear()
            planned = self._stages[samples] = self._planned(samples)
        return planned

    def _planned(self, samples: int) -> tuple[Stage, ...]:
        inputs = list(range(len(self.program.inputs)))
        if samples <= FEW_SAMPLES:
            return (Stage(self.network, inputs, self._outputs, self.part),)
        steps, cuts = self._costs
        sizes = sorted({min(2**i, samples) for i in range(12)})  # whatever the threads: the bits depend on it
        least, size = min((_traffic(steps, size), size) for size in reversed(sizes))
        splits = [
            (_traffic(steps[:cut], first) + _traffic(steps[cut:], second) + 2 * between, cut, first, second)
            for cut, between in (cuts.items() if len(set(self._outputs)) == len(self._outputs) else ())
            for first in sizes
            for second in sizes
            if first < second
        ]
        if not splits or min(splits)[0] > LEAST_GAIN * least:
            return (Stage(self.network, inputs, self._outputs, _fitting(self.network, size)),)
        _, cut, first, second = min(splits)
        early, late = self._stage(0, cut), self._stage(cut, len(steps))
        return tuple(Stage(*made, _fitting(made[0], size)) for made, size in ((early, first), (late, second)))

    def _stage(self, begin: int, end: int) -> tuple[_core.Network, list[int], list[int]]:
        """The same for all numbers of samples, so that they share what a network keeps."""
        if (begin, end) not in self._cut:
            self._cut[begin, end] = self.network.stage(begin, end)
        return self._cut[begin, end]


class _Cost(NamedTuple):
    """Of an operation: the bytes of its weights, and of the values of a sample that it reads and makes."""

    weights: int
    values: int
    narrow: bool  # it makes 8 bits


def _traffic(steps: Sequence[_Cost], part: int) -> float:
    """Bytes of a sample that come from beyond the cache: weights once a part, and values that do not fit.

    To begin a step counts as some more.
    """
    total = 0.0
    for weights, values, narrow in steps:
        near = narrow and part * values <= SHARED
        total += (weights + BEGINNING) / part + (values / (1 + near) if part * values > CACHE else 0)
    return total


def _fitting(network: _core.Network, part: int) -> int:
    """So many samples, or less where their values would take too much memory."""
    while part > 1 and network.workspace_bytes(part) > MOST_STAGE:
        part = -(-part // 2)
    return part


class _Builder:
    def __init__(self, program: Program, infos: Sequence[StepInfo], precision: str) -> None:
        self.program, self.precision = program, precision
        self.shapes: list[Shape] = [given.shape for given in program.inputs] + [info.shape for info in infos]
        self.network = _core.Network()
        self.numbers: dict[int, int] = {}  # of the program's values in the network
        self.made: list[tuple[Step, ...]] = []

    def build(self) -> _core.Network:
        for i, given in enumerate(self.program.inputs):
            self.numbers[i] = self.network.input(list(given.shape))
        steps = {step.output: step for step in self.program.steps}
        fused = fused_steps(self.program, self.shapes, self.precision)
        for step in self.program.steps:
            if step.output in fused.values():
                continue  # computed with what reads its result
            conv = steps.get(fused.get(step.output, -1))
            if conv is None:
                self.numbers[step.output] = _STEPS[step.op](self, step, [self.numbers[value] for value in step.inputs])
                self.made.append((step,))
                continue
            if step.op == "conv":
                self.numbers[step.output] = self._expansion(conv, step)
            else:
                (other,) = (value for value in step.inputs if value != conv.output)
                inputs = [self.numbers[conv.inputs[0]], self.numbers[other]]
                self.numbers[step.output] = self._conv(conv, inputs, {**conv.attributes, **step.attributes})
            self.made.append((conv, step))
        self.network.finish([self.numbers[value] for value in self.program.outputs])
        return self.network

    def costs(self) -> tuple[list[_Cost], dict[int, int]]:
        """Of every operation; and before which ones a single value of float32 is needed, with its bytes: for cuts.

        One of 8 bits would be made float32 and bytes again, which takes longer than a cut saves.
        """
        counts = {number: math.prod(self.shapes[value]) for value, number in self.numbers.items()}
        narrow = {number for number in counts if self.network.is_bytes(number)}
        sizes = {number: count * (1 if number in narrow else 4) for number, count in counts.items()}
        inside = {step.output for made in self.made for step in made[:-1]}
        last = {self.numbers[value]: len(self.made) for value in self.program.outputs}
        steps = []
        for i, made in enumerate(self.made):
            read = {self.numbers[value] for step in made for value in step.inputs if value not in inside}
            weights = sum(_weight_bytes(self.program, step, self.precision) for step in made)
            output = self.numbers[made[-1].output]
            steps.append(_Cost(weights, sum(sizes[value] for value in read) + sizes[output], output in narrow))
            last.update((value, max(last.get(value, 0), i)) for value in read)
        first = len(self.program.inputs)
        cuts = {}
        for cut in range(1, len(self.made)):
            needed = [value for value, until in last.items() if value < first + cut and until >= cut]
            if len(needed) == 1 and needed[0] >= first and needed[0] not in narrow:
                cuts[cut] = sizes[needed[0]]
        return steps, cuts

    def _tensors(self, step: Step) -> dict[str, Array]:
        return {role: self.program.tensors[name] for role, name in step.tensors.items()}

    def _conv(self, step: Step, inputs: list[int], attributes: Mapping[str, Any] | None = None) -> int:
        a = step.attributes if attributes is None else attributes
        window: dict[str, Any] = {name: a[name] for name in ("kernel", "stride", "dilation", "padding", "groups")}
        tensors = self._tensors(step)
        bias, activation = tensors.get("bias", _NONE), a["activation"]
        columns = self.shapes[step.inputs[0]][0] // a["groups"] * a["kernel"][0] * a["kernel"][1]
        if "values" in tensors and (a["groups"] > 1 or not sparse_block(tensors["indices"], tensors["offsets"])[2]):
            return self.network.sparse_conv(inputs, **window, **_sparse(tensors), bias=bias, activation=activation)
        values, kept = _matrix(tensors, a["filters"], columns)
        if a["groups"] > 1:
            kept = np.arange(columns * a["groups"])
        return self.network.conv(
            inputs,
            **window,
            filters=a["filters"],
            columns=kept,
            values=values,
            bias=bias,
            activation=activation,
            **self._arithmetic(step, tensors),
            residual=(a["residual_scale"], a["residual_zero"]) if "residual_scale" in a else None,
        )

    def _arithmetic(self, step: Step, tensors: Mapping[str, Array]) -> dict[str, Any]:
        """Which numbers a convolution or linear layer multiplies."""
        a = step.attributes
        if not is_narrow(step):
            return {"precision": self.precision, "scale": 1.0, "zero": 0, "scales": _NONE}
        scales = tensors["scales"]
        if "filters" in tensors:  # rows of zeros have one too
            scales = np.ones(a["filters"], np.float32)
            scales[tensors["filters"]] = tensors["scales"]
        return {"precision": "int8", "scale": a["input_scale"], "zero": a["input_zero"], "scales": scales}

    def _expansion(self, expand: Step, step: Step) -> int:
        a, first, second = step.attributes, self._tensors(expand), self._tensors(step)
        values, kept = _matrix(first, expand.attributes["filters"], self.shapes[expand.inputs[0]][0])
        return self.network.expansion(
            [self.numbers[expand.inputs[0]]],
            expand.attributes["filters"],
            kept,
            values,
            first.get("bias", _NONE),
            expand.attributes["activation"],
            **{name: a[name] for name in ("kernel", "stride", "dilation", "padding")},
            values=second["weight"],
            bias=second.get("bias", _NONE),
            activation=a["activation"],
        )

    def _linear(self, step: Step, inputs: list[int]) -> int:
        tensors, a = self._tensors(step), step.attributes
        features, bias = self.shapes[step.inputs[0]][-1], tensors.get("bias", _NONE)
        if "values" in tensors and not sparse_block(tensors["indices"], tensors["offsets"])[2]:
            return self.network.sparse_linear(
                inputs, features, **_sparse(tensors), bias=bias, activation=a["activation"]
            )
        values, kept = _matrix(tensors, a["filters"], features)
        return self.network.linear(
            inputs, features, a["filters"], kept, values, bias, a["activation"], **self._arithmetic(step, tensors)
        )

    def _plain(self, step: Step, inputs: list[int]) -> int:
        """An operation of the same name and attributes."""
        made: int = getattr(self.network, step.op)(inputs, **step.attributes)
        return made

    def _global_pool(self, _: Step, inputs: list[int]) -> int:
        return self.network.mean(inputs, axes=[1, 2], keep=True)

    def _combine(self, step: Step, inputs: list[int]) -> int:
        activation, tensors = step.attributes["activation"], self._tensors(step)
        if "constant" in tensors:
            return self.network.combine_constant(inputs, step.op, tensors["constant"], activation)
        return self.network.combine(inputs, step.op, activation)

    def _activation(self, step: Step, inputs: list[int]) -> int:
        return self.network.activation(inputs, step.attributes["activation"], 0.0)

    def _leaky(self, step: Step, inputs: list[int]) -> int:
        return self.network.activation(inputs, "leaky", step.attributes["slope"])

    def _softmax(self, step: Step, inputs: list[int]) -> int:
        return self.network.softmax(inputs, step.attributes["axis"], step.op == "log_softmax")

    def _layer_norm(self, step: Step, inputs: list[int]) -> int:
        tensors = self._tensors(step)
        scale, shift = (tensors.get(role, _NONE) for role in ("scale", "shift"))
        return self.network.layer_norm(inputs, step.attributes["dims"], step.attributes["epsilon"], scale, shift)

    def _take(self, step: Step, inputs: list[int]) -> int:
        return self.network.take(inputs, step.attributes["axis"], self._tensors(step)["indices"])


def fused_steps(program: Program, shapes: Sequence[Shape], precision: str = "float32") -> dict[int, int]:
    """Value of a step -> value of the convolution before it that is computed with it, of which nothing else reads it.

    Such are an addition of the convolution's result, and a depthwise convolution of that of a 1x1 one, if it is large.

    Args:
        shapes: of all values of the program, for one sample.
        precision: a depthwise convolution is computed on its own in others than float32.
    """
    additions = fused_additions(program, shapes)
    return {**additions, **(_expansions(program, shapes, additions) if precision == "float32" else {})}


def fused_additions(program: Program, shapes: Sequence[Shape]) -> dict[int, int]:
    """The additions among `fused_steps`: their value -> value of the convolution."""
    steps, readers = {step.output: step for step in program.steps}, _readers(program)
    found: dict[int, int] = {}
    for add in program.steps:
        if add.op != "add" or "constant" in add.tensors or add.inputs[0] == add.inputs[1]:
            continue
        if shapes[add.inputs[0]] != shapes[add.inputs[1]]:
            continue
        for value in add.inputs[:1] if rounds_residual(add) else sorted(add.inputs, reverse=True):
            conv = steps.get(value)
            if conv is None or conv.op != "conv" or conv.attributes["storage"] == "sparse":
                continue
            if conv.attributes["activation"] == "none" and readers[value] == 1:
                found[add.output] = value
                break
    return found


def _readers(program: Program) -> Counter[int]:
    """How often each value is read, or put out."""
    readers = Counter(value for step in program.steps for value in step.inputs)
    readers.update(program.outputs)
    return readers


def _expansions(program: Program, shapes: Sequence[Shape], additions: Mapping[int, int]) -> dict[int, int]:
    steps, readers = {step.output: step for step in program.steps}, _readers(program)
    found: dict[int, int] = {}
    for step in program.steps:
        if step.op != "conv" or step.output in additions.values():
            continue
        a, (value, *_) = step.attributes, step.inputs
        expand, shape = steps.get(value), shapes[value]
        if a["storage"] != "dense" or a["groups"] == 1 or a["groups"] != a["filters"]:
            continue
        if expand is None or expand.op != "conv" or readers[value] != 1 or value in additions:
            continue
        if is_narrow(step) or is_narrow(expand):
            continue
        b = expand.attributes
        is_plain = b["kernel"] == b["stride"] == (1, 1) and not any(b["padding"]) and b["groups"] == 1
        if b["filters"] != a["groups"] or not is_plain or b["storage"] == "sparse":
            continue
        if 4 * math.prod(shape) > LEAST_EXPANSION:
            found[step.output] = value
    return found


def _workspace(program: Program) -> int:
    """Bytes for the values of the samples computed at once."""
    weights = sum(_weight_bytes(program, step, "float32") for step in program.steps)
    return min(MOST_WORKSPACE, max(LEAST_WORKSPACE, weights // 2))


def _weight_bytes(program: Program, step: Step, precision: str) -> int:
    """As they are packed: Winograd's are 36 for 9, those of bfloat16 half as large."""
    a = step.attributes
    own = sum(program.tensors[name].nbytes for name in step.tensors.values())
    if is_narrow(step) or step.op not in ("conv", "linear"):
        return own
    if precision == "bfloat16":
        return own // 2
    is_winograd = step.op == "conv" and a["storage"] == "dense" and a["kernel"] == (3, 3) and a["stride"] == (1, 1)
    return 4 * own if is_winograd else own


_NONE: Final = np.zeros(0, np.float32)


def _matrix(tensors: Mapping[str, Array], filters: int, columns: int) -> tuple[Array, Array]:
    """(filters, columns kept) and which these are, of a weight stored in any way; empty filters are rows of zeros."""
    if "values" in tensors:
        kept, within = np.unique(tensors["indices"], return_inverse=True)
        counts: Array = np.diff(tensors["offsets"].astype(np.intp))
        matrix = np.zeros((filters, len(kept)), np.float32)
        matrix[np.repeat(np.arange(filters), counts), within] = tensors["values"]
        return matrix, kept
    weight, kept = tensors["weight"], tensors.get("columns", np.arange(columns))
    if "filters" not in tensors:
        return weight, kept
    matrix = np.zeros((filters, weight.shape[1]), np.float32)
    matrix[tensors["filters"]] = weight
    return matrix, kept


def _sparse(tensors: Mapping[str, Array]) -> dict[str, Any]:
    return {role: tensors[role] for role in ("offsets", "indices", "values")}


_STEPS: Final[Mapping[str, Callable[[_Builder, Step, list[int]], int]]] = {
    "conv": _Builder._conv,
    "linear": _Builder._linear,
    "global_avg_pool": _Builder._global_pool,
    **dict.fromkeys(("add", "sub", "mul", "div"), _Builder._combine),
    "activation": _Builder._activation,
    "leaky_relu": _Builder._leaky,
    **dict.fromkeys(("softmax", "log_softmax"), _Builder._softmax),
    "layer_norm": _Builder._layer_norm,
    "take": _Builder._take,
    **dict.fromkeys(
        (
            "max_pool",
            "avg_pool",
            "adaptive_avg_pool",
            "clip",
            "matmul",
            "attention",
            "mean",
            "norm",
            "concat",
            "reshape",
            "transpose",
            "pad",
            "slice",
        ),
        _Builder._plain,
    ),
}
