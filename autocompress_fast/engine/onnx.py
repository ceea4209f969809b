"""Programs as ONNX models, for other runtimes.

A convolution of which only some columns are left reads the channels that they lie in, through a Gather, with zeros for
the taps that are gone: other runtimes have no operator for single columns. A step of 8 bits is one of float32 between
QuantizeLinear and DequantizeLinear, which other runtimes may compute with integers. They divide by the scale, where the
engine multiplies with its inverse, so that a value between two numbers may be rounded to the other one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from autocompress_fast.engine.program import Program, Shape, Step, StepInfo, is_narrow

if TYPE_CHECKING:
    import onnx

__all__ = ["as_onnx"]

Array = np.ndarray[Any, Any]

OPSET: Final = 18
IR_VERSION: Final = 9  # of that opset: what is newer, older runtimes refuse


def as_onnx(program: Program, infos: Sequence[StepInfo]) -> onnx.ModelProto:
    """The same network as an ONNX model; inputs and outputs have a dynamic first dimension unless the batch is fixed.

    Args:
        program: valid.
        infos: what `validate` returned for it.

    Raises:
        ImportError: the package onnx is not installed.
    """
    return _Exporter(program, infos).model()


class _Exporter:
    def __init__(self, program: Program, infos: Sequence[StepInfo]) -> None:
        from onnx import helper, numpy_helper

        self.program, self.helper, self.numpy_helper = program, helper, numpy_helper
        self.shapes: list[Shape] = [given.shape for given in program.inputs] + [info.shape for info in infos]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.names = [given.name for given in program.inputs]
        self.names += [f"value{i}" for i in range(len(program.inputs), len(self.shapes))]

    def model(self) -> onnx.ModelProto:
        import onnx

        for step in self.program.steps:
            _STEPS[step.op](self, step, [self.names[value] for value in step.inputs])
        outputs = []
        for i, value in enumerate(self.program.outputs):  # a value may be put out twice, or be an input
            name = f"output{i}"
            self.node("Identity", [self.names[value]], name)
            outputs.append(self.described(name, self.shapes[value]))
        inputs = [self.described(given.name, given.shape) for given in self.program.inputs]
        graph = self.helper.make_graph(self.nodes, "network", inputs, outputs, self.constants)
        model = self.helper.make_model(
            graph, opset_imports=[self.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
            producer_name="autocompress_fast",
        )  # fmt: skip
        onnx.checker.check_model(model, full_check=True)
        return model

    def described(self, name: str, shape: Shape) -> onnx.ValueInfoProto:
        batch: int | str = "batch" if self.program.batch is None else self.program.batch
        return self.helper.make_tensor_value_info(name, 1, [batch, *shape])

    def node(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Add an operator; returns the name of its result."""
        made = output or f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(op, inputs, [made], **attributes))
        return made

    def constant(self, value: Any) -> str:
        """A tensor of the model."""
        name = f"constant{len(self.constants)}"
        self.constants.append(self.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def done(self, step: Step, name: str) -> None:
        """`name`, activated, is what the step makes."""
        activation = step.attributes.get("activation", "none")
        self.names[step.output] = self.activated(name, activation)

    def activated(self, x: str, activation: str) -> str:
        if activation == "none":
            return x
        if activation == "silu":
            return self.node("Mul", [x, self.node("Sigmoid", [x])])
        if activation == "gelu":
            root, one, half = (self.constant(np.float32(value)) for value in (0.5**0.5, 1, 0.5))
            share = self.node("Add", [self.node("Erf", [self.node("Mul", [x, root])]), one])
            return self.node("Mul", [self.node("Mul", [x, half]), share])
        if activation == "relu6":
            bounds = [self.constant(np.float32(bound)) for bound in (0, 6)]
            return self.node("Clip", [x, *bounds])
        if activation == "hardsigmoid":
            return self.node("HardSigmoid", [x], alpha=1 / 6, beta=0.5)
        return self.node(
            {"relu": "Relu", "hardswish": "HardSwish", "sigmoid": "Sigmoid", "tanh": "Tanh"}[activation], [x]
        )

    def tensors(self, step: Step) -> dict[str, Array]:
        return {role: self.program.tensors[name] for role, name in step.tensors.items()}

    # ---- layers

    def conv(self, step: Step, inputs: list[str]) -> None:
        a, tensors = step.attributes, self.tensors(step)
        groups, kernel = a["groups"], a["kernel"]
        channels = self.shapes[step.inputs[0]][0] // groups
        weight = dense(tensors, a["filters"], channels * math.prod(kernel)).reshape(a["filters"], channels, *kernel)
        (x,) = inputs
        used = np.flatnonzero(weight.any(axis=(0, 2, 3)))
        if groups == 1 and 0 < len(used) < channels:
            x = self.node("Gather", [x, self.integers(*used.tolist())], axis=1)
            weight = weight[:, used]
        operands = [self.rounded(step, x, "input"), self.weight(step, weight, 0), *self.bias(tensors)]
        top, bottom, left, right = a["padding"]
        self.done(
            step,
            self.node(
                "Conv", operands, kernel_shape=kernel, strides=a["stride"], dilations=a["dilation"], group=groups,
                pads=[top, left, bottom, right],
            ),
        )  # fmt: skip

    def linear(self, step: Step, inputs: list[str]) -> None:
        tensors, (x,) = self.tensors(step), inputs
        features = self.shapes[step.inputs[0]][-1]
        weight = dense(tensors, step.attributes["filters"], features)
        used = np.flatnonzero(weight.any(axis=0))
        if 0 < len(used) < features:
            x = self.node("Gather", [x, self.integers(*used.tolist())], axis=-1)
            weight = weight[:, used]
        made = self.node("MatMul", [self.rounded(step, x, "input"), self.weight(step, weight.T, 1)])
        for bias in self.bias(tensors):
            made = self.node("Add", [made, bias])
        self.done(step, made)

    def rounded(self, step: Step, x: str, what: str) -> str:
        """What a step reads, its "input" or a "residual", on the numbers of its 8 bits if it has them."""
        a = step.attributes
        if f"{what}_scale" not in a:
            return x
        grid = [self.constant(np.float32(a[f"{what}_scale"])), self.constant(np.uint8(a[f"{what}_zero"]))]
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [x, *grid]), *grid])

    def weight(self, step: Step, weight: Array, axis: int) -> str:
        """The weight of a layer whose filters lie along the axis."""
        if not is_narrow(step):
            return self.constant(weight)
        tensors = self.tensors(step)
        scales = np.ones(step.attributes["filters"], np.float32)
        scales[tensors.get("filters", slice(None))] = tensors["scales"]
        return self.node("DequantizeLinear", [self.constant(weight), self.constant(scales)], axis=axis)

    def bias(self, tensors: Mapping[str, Array]) -> list[str]:
        return [self.constant(tensors["bias"])] if "bias" in tensors else []

    # ---- pooling

    def pool(self, step: Step, inputs: list[str]) -> None:
        """Padded behind just as far as the last window reaches: what ceil_mode means has changed between opsets."""
        a, made = step.attributes, self.shapes[step.output][1:]
        dilation = a.get("dilation", (1, 1))
        axes = zip(self.shapes[step.inputs[0]][1:], a["kernel"], a["stride"], a["padding"], dilation, made, strict=True)
        behind = [max(0, (out - 1) * s + d * (k - 1) + 1 - p - n) for n, k, s, p, d, out in axes]
        shared = {"kernel_shape": a["kernel"], "strides": a["stride"], "pads": [*a["padding"], *behind]}
        if step.op == "max_pool":
            return self.done(step, self.node("MaxPool", inputs, dilations=dilation, **shared))
        pooled = self.node("AveragePool", inputs, count_include_pad=int(a["count_padding"]), **shared)
        if a["count_padding"] and any(more > p for more, p in zip(behind, a["padding"], strict=True)):
            counts = [
                np.array([min(k, n + 2 * p - i * s) for i in range(out)])  # behind the padding nothing counts
                for n, k, s, p, out in zip(
                    self.shapes[step.inputs[0]][1:], a["kernel"], a["stride"], a["padding"], made, strict=True
                )
            ]
            share = np.outer(a["kernel"][0] / counts[0], a["kernel"][1] / counts[1]).astype(np.float32)
            pooled = self.node("Mul", [pooled, self.constant(share)])
        return self.done(step, pooled)

    def adaptive_pool(self, step: Step, inputs: list[str]) -> None:
        """Two products: with the shares of the rows, and of the columns."""
        _, height, width = self.shapes[step.inputs[0]]
        rows, columns = (
            shares(size, out) for size, out in zip((height, width), step.attributes["output"], strict=True)
        )
        made = self.node("MatMul", [self.constant(rows), *inputs])
        self.done(step, self.node("MatMul", [made, self.constant(columns.T)]))

    def mean(self, step: Step, inputs: list[str]) -> None:
        axes = step.attributes.get("axes", (1, 2))
        keep = int(step.attributes.get("keep", True))
        self.done(step, self.node("ReduceMean", [*inputs, self.integers(*(axis + 1 for axis in axes))], keepdims=keep))

    def norm(self, step: Step, inputs: list[str]) -> None:
        axes = self.integers(*(axis + 1 for axis in step.attributes["axes"]))
        self.done(step, self.node("ReduceL2", [*inputs, axes], keepdims=int(step.attributes["keep"])))

    # ---- elementwise

    def binary(self, step: Step, inputs: list[str]) -> None:
        operands = list(inputs)
        if "constant" in step.tensors:  # all dimensions of a sample, or the batch would be taken for one of them
            value, rank = self.tensors(step)["constant"], len(self.shapes[step.inputs[0]])
            operands.append(self.constant(value.reshape((1,) * (rank - value.ndim) + value.shape)))
        else:
            operands[1] = self.rounded(step, operands[1], "residual")
        self.done(step, self.node({"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}[step.op], operands))

    def activation(self, step: Step, inputs: list[str]) -> None:
        self.done(step, inputs[0])

    def leaky(self, step: Step, inputs: list[str]) -> None:
        self.done(step, self.node("LeakyRelu", inputs, alpha=float(step.attributes["slope"])))

    def clip(self, step: Step, inputs: list[str]) -> None:
        bounds = [self.constant(np.float32(step.attributes[name])) for name in ("low", "high")]
        self.done(step, self.node("Clip", [*inputs, *bounds]))

    def softmax(self, step: Step, inputs: list[str]) -> None:
        op = "Softmax" if step.op == "softmax" else "LogSoftmax"
        self.done(step, self.node(op, inputs, axis=step.attributes["axis"] + 1))

    def matmul(self, step: Step, inputs: list[str]) -> None:
        self.done(step, self.node("MatMul", inputs))

    def attention(self, step: Step, inputs: list[str]) -> None:
        query, key, value = inputs
        rank = len(self.shapes[step.inputs[1]]) + 1
        keys = self.node("Transpose", [key], perm=[*range(rank - 2), rank - 1, rank - 2])
        scale = self.constant(np.float32(step.attributes["scale"]))
        scores = self.node("Mul", [self.node("MatMul", [query, keys]), scale])
        self.done(step, self.node("MatMul", [self.node("Softmax", [scores], axis=-1), value]))

    def layer_norm(self, step: Step, inputs: list[str]) -> None:
        a, tensors = step.attributes, self.tensors(step)
        form = self.shapes[step.output][len(self.shapes[step.output]) - a["dims"] :]
        scale = self.constant(tensors.get("scale", np.ones(math.prod(form), np.float32)).reshape(form))
        shift = [self.constant(tensors["shift"].reshape(form))] if "shift" in tensors else []
        operands = [*inputs, scale, *shift]
        made = self.node("LayerNormalization", operands, axis=-a["dims"], epsilon=float(a["epsilon"]))
        self.done(step, made)

    # ---- moving

    def concat(self, step: Step, inputs: list[str]) -> None:
        self.done(step, self.node("Concat", inputs, axis=step.attributes["axis"] + 1))

    def reshape(self, step: Step, inputs: list[str]) -> None:
        self.done(step, self.node("Reshape", [*inputs, self.integers(0, *step.attributes["shape"])]))  # 0: as it was

    def transpose(self, step: Step, inputs: list[str]) -> None:
        self.done(step, self.node("Transpose", inputs, perm=[0, *(axis + 1 for axis in step.attributes["order"])]))

    def pad(self, step: Step, inputs: list[str]) -> None:
        a = step.attributes
        amounts = self.integers(0, *a["before"], 0, *a["after"])
        self.done(step, self.node("Pad", [*inputs, amounts, self.constant(np.float32(a["value"]))]))

    def slice(self, step: Step, inputs: list[str]) -> None:
        a = step.attributes
        bounds = [self.integers(value) for value in (a["start"], a["stop"], a["axis"] + 1, a["step"])]
        self.done(step, self.node("Slice", [*inputs, *bounds]))

    def take(self, step: Step, inputs: list[str]) -> None:
        indices = self.integers(*self.tensors(step)["indices"].tolist())
        self.done(step, self.node("Gather", [*inputs, indices], axis=step.attributes["axis"] + 1))


def dense(tensors: Mapping[str, Array], filters: int, columns: int) -> Array:
    """(filters, columns), a weight stored in any way written out in full."""
    weight: Array = np.zeros((filters, columns), tensors["weight"].dtype if "weight" in tensors else np.float32)
    if "values" in tensors:
        counts: Array = np.diff(tensors["offsets"].astype(np.intp))
        weight[np.repeat(np.arange(filters), counts), tensors["indices"]] = tensors["values"]
        return weight
    rows = tensors.get("filters", np.arange(filters))
    weight[np.ix_(rows, tensors.get("columns", np.arange(columns)))] = tensors["weight"]
    return weight


def shares(size: int, out: int) -> Array:
    """(out, size): window i runs from floor(i * size / out) to ceil((i + 1) * size / out), and is averaged."""
    matrix: Array = np.zeros((out, size), np.float32)
    for i in range(out):
        start, stop = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


_STEPS: Final[Mapping[str, Callable[[_Exporter, Step, list[str]], None]]] = {
    "conv": _Exporter.conv,
    "linear": _Exporter.linear,
    **dict.fromkeys(("max_pool", "avg_pool"), _Exporter.pool),
    "adaptive_avg_pool": _Exporter.adaptive_pool,
    **dict.fromkeys(("global_avg_pool", "mean"), _Exporter.mean),
    "norm": _Exporter.norm,
    **dict.fromkeys(("add", "sub", "mul", "div"), _Exporter.binary),
    "activation": _Exporter.activation,
    "leaky_relu": _Exporter.leaky,
    "clip": _Exporter.clip,
    **dict.fromkeys(("softmax", "log_softmax"), _Exporter.softmax),
    "matmul": _Exporter.matmul,
    "attention": _Exporter.attention,
    "layer_norm": _Exporter.layer_norm,
    "concat": _Exporter.concat,
    "reshape": _Exporter.reshape,
    "transpose": _Exporter.transpose,
    "pad": _Exporter.pad,
    "slice": _Exporter.slice,
    "take": _Exporter.take,
}
