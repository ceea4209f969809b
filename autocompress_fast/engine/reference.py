"""Running a checked program with numpy: obviously right, and what the compiled kernels are held to in the tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from autocompress_fast.engine.program import Program, Shape, StepInfo, sparse_block

__all__ = ["Reference", "quantized"]

Array = np.ndarray[Any, Any]
Kernel = Callable[[list[Array]], Array]


class Reference:
    """Runs a program that `validate` has passed.

    Args:
        program: the program; its tensors must not change afterwards.
        infos: what `validate` returned for it.
    """

    def __init__(self, program: Program, infos: Sequence[StepInfo]) -> None:
        self.program = program
        shapes = [given.shape for given in program.inputs] + [info.shape for info in infos]
        self.kernels: list[Kernel] = []
        for step in program.steps:
            tensors = {role: program.tensors[name] for role, name in step.tensors.items()}
            prepared = _Prepared(step.op, step.attributes, tensors, shapes[step.inputs[0]], shapes[step.output])
            self.kernels.append(_KERNELS[step.op](prepared))

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Outputs for float32 inputs of the declared shapes, each with the same number of samples first."""
        values = list(inputs)
        with np.errstate(all="ignore"):  # NaN and infinity travel through, as in torch
            for step, kernel in zip(self.program.steps, self.kernels, strict=True):
                values.append(kernel([values[i] for i in step.inputs]))
        return [np.ascontiguousarray(values[i]) for i in self.program.outputs]


def quantized(x: Array, scale: float, zero: int) -> Array:
    """The 8-bit numbers that stand for float32: x / scale, rounded to even, plus zero, from 0 to 255; NaN is 255.

    Every machine gives the same: the inverse of the scale is rounded to float32 first, and so is its product with x.

    >>> quantized(np.array([-9, -0.3, 0.5, 1.5, 300, np.nan], np.float32), 0.5, 3)
    array([  0,   2,   4,   6, 255, 255])
    """
    with np.errstate(all="ignore"):
        steps = np.fmin(x * (np.float32(1) / np.float32(scale)), np.float32(2**16))  # not beyond the integers
        number: Array = np.clip(np.rint(steps) + np.float32(zero), 0, 255).astype(np.int64)
    return number


def _rounded(x: Array, scale: float, zero: int) -> Array:
    """What the 8-bit numbers that stand for float32 are."""
    values: Array = (quantized(x, scale, zero) - zero).astype(np.float32) * np.float32(scale)
    return values


# --- weights ---------------------------------------------------------------------------------------------------------


class _Matrix:
    """A weight (filters x columns) as it is multiplied: the rows that hold anything, and the columns that they read."""

    def __init__(self, filters: int, tensors: Mapping[str, Array]) -> None:
        self.filters = filters
        self.rows: Array | slice = slice(None)
        self.columns: Array | None = None  # None: all of them
        self.block: Array | None = None  # (rows, columns); None: values, indices and starts of the rows instead
        if "values" in tensors:
            self._set_sparse(tensors["values"], tensors["indices"], tensors["offsets"])
        else:
            self.block = tensors["weight"]
            self.columns = tensors["columns"].astype(np.intp) if "columns" in tensors else None
            self.rows = tensors["filters"].astype(np.intp) if "filters" in tensors else slice(None)

    def _set_sparse(self, values: Array, indices: Array, offsets: Array) -> None:
        offsets = offsets.astype(np.intp)
        self.rows, self.columns, dense = sparse_block(indices, offsets)
        within = np.searchsorted(self.columns, indices)
        if dense:
            row_of = np.repeat(np.arange(len(self.rows)), np.diff(offsets)[self.rows])
            self.block = np.zeros((len(self.rows), len(self.columns)), np.float32)
            self.block[row_of, within] = values
        else:
            # reduceat sums from each start to the next: rows without values would break that and are left out.
            self.values, self.indices, self.starts = values[:, None], within, offsets[self.rows]

    def multiply(self, columns: Array) -> Array:
        """(columns read, M) -> (filters, M)."""
        part: Array
        if self.block is not None:
            part = self.block @ columns
        elif len(self.values):
            part = np.add.reduceat(columns[self.indices] * self.values, self.starts, axis=0)
        else:
            part = np.zeros((0, columns.shape[1]), np.float32)
        if len(part) == self.filters:
            return part
        result: Array = np.zeros((self.filters, columns.shape[1]), part.dtype)
        result[self.rows] = part
        return result


@dataclass(frozen=True)
class _Prepared:
    """What a kernel is made from: a step with its tensors by role, and the shapes of its first input and its output."""

    op: str
    attributes: Mapping[str, Any]
    tensors: Mapping[str, Array]
    given: Shape
    made: Shape


@dataclass(frozen=True)
class _Numbers:
    """What a layer computes with: the weights, its input, and what the sums of their products are multiplied by.

    Of 8 bits: integers in float64, in which sums of their products, below 2^31, are exact.
    """

    tensors: Mapping[str, Array]
    read: Callable[[Array], Array]
    factor: Array | None = None  # for every filter


def _numbers(s: _Prepared) -> _Numbers:
    a = s.attributes
    if "input_scale" not in a:
        return _Numbers(s.tensors, lambda x: x)
    scale, zero = a["input_scale"], a["input_zero"]
    factor = np.ones(a["filters"], np.float32)
    stored = s.tensors["filters"].astype(np.intp) if "filters" in s.tensors else slice(None)
    factor[stored] = s.tensors["scales"] * np.float32(scale)
    exact = {**s.tensors, "weight": s.tensors["weight"].astype(np.float64)}
    return _Numbers(exact, lambda x: (quantized(x, scale, zero) - zero).astype(np.float64), factor)


# --- kernels: prepared once for a step, then run on values (N, ...) --------------------------------------------------


def _conv(s: _Prepared) -> Kernel:
    a = s.attributes
    groups, filters, kernel, stride, dilation = a["groups"], a["filters"], a["kernel"], a["stride"], a["dilation"]
    channels = s.given[0] // groups
    padding, numbers = a["padding"], _numbers(s)
    tensors = numbers.tensors
    finish = _finish(a["activation"], tensors.get("bias"), 3, numbers.factor)
    size = s.made[1:]
    span = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))

    def windows(x: Array) -> Array:
        """(N, C, H, W) -> (C, KH, KW, N, OH, OW), a view of the padded input."""
        x = np.moveaxis(numbers.read(x), 1, 0)
        if any(padding):
            top, bottom, left, right = padding
            x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        view = sliding_window_view(x, span, axis=(2, 3))[:, :, :: stride[0], :: stride[1]]
        taps: Array = view[..., :: dilation[0], :: dilation[1]].transpose(0, 4, 5, 1, 2, 3)
        return taps

    def result(y: Array, samples: int) -> Array:
        return finish(np.moveaxis(y.reshape(filters, samples, *size), 0, 1))

    if groups == 1:
        matrix = _Matrix(filters, tensors)
        picked = None if matrix.columns is None else np.unravel_index(matrix.columns, (channels, *kernel))
        width = channels * math.prod(kernel) if matrix.columns is None else len(matrix.columns)

        def run(inputs: list[Array]) -> Array:
            view = windows(inputs[0])
            gathered = view if picked is None else view[picked]
            return result(matrix.multiply(gathered.reshape(width, math.prod(view.shape[3:]))), len(inputs[0]))

        return run
    if "weight" in tensors and channels == 1 and filters == groups:
        tap = np.ascontiguousarray(tensors["weight"].T).reshape(*kernel, groups, 1, 1, 1)

        def run_depthwise(inputs: list[Array]) -> Array:
            view = windows(inputs[0])
            y = view[:, 0, 0] * tap[0, 0]
            for i, j in list(np.ndindex(*kernel))[1:]:
                y += view[:, i, j] * tap[i, j]
            return result(y, len(inputs[0]))

        return run_depthwise
    matrices = [_Matrix(filters // groups, part) for part in _split_groups(tensors, groups)]

    def run_grouped(inputs: list[Array]) -> Array:
        view = windows(inputs[0])
        parts = []
        for g, matrix in enumerate(matrices):
            own = view[g * channels : (g + 1) * channels]
            gathered = own.reshape(channels * math.prod(kernel), math.prod(view.shape[3:]))
            parts.append(matrix.multiply(gathered if matrix.columns is None else gathered[matrix.columns]))
        return result(np.concatenate(parts), len(inputs[0]))

    return run_grouped


def _split_groups(tensors: Mapping[str, Array], groups: int) -> list[dict[str, Array]]:
    """The rows of each group as a matrix of their own."""
    if "weight" in tensors:
        return [{"weight": part} for part in np.split(tensors["weight"], groups)]
    offsets = tensors["offsets"].astype(np.intp)
    filters = (len(offsets) - 1) // groups
    parts = []
    for g in range(groups):
        own = offsets[g * filters : (g + 1) * filters + 1]
        stored = slice(own[0], own[-1])
        parts.append(
            {"values": tensors["values"][stored], "indices": tensors["indices"][stored], "offsets": own - own[0]}
        )
    return parts


def _linear(s: _Prepared) -> Kernel:
    numbers = _numbers(s)
    matrix = _Matrix(s.attributes["filters"], numbers.tensors)
    finish = _finish(s.attributes["activation"], s.tensors.get("bias"), 1, numbers.factor)

    def run(inputs: list[Array]) -> Array:
        x = numbers.read(inputs[0])
        columns = x.reshape(-1, x.shape[-1]).T
        y = matrix.multiply(columns if matrix.columns is None else columns[matrix.columns])
        return finish(y.T.reshape(*x.shape[:-1], matrix.filters))

    return run


def _finish(activation: str, bias: Array | None, rank: int, factor: Array | None = None) -> Callable[[Array], Array]:
    """Multiply with the factor and add the bias, along the first axis of a sample, and apply the activation.

    In place where it can: `y` is the step's own.
    """
    apply = _ACTIVATE[activation]
    form = (-1, *([1] * (rank - 1)))
    shift = None if bias is None else bias.reshape(form)
    times = None if factor is None else factor.reshape(form)

    def run(y: Array) -> Array:
        if times is not None:
            y = y.astype(np.float32)  # exact sums, rounded once
            y *= times
        if shift is not None:
            y += shift
        return apply(y)

    return run


def _max_pool(s: _Prepared) -> Kernel:
    a = s.attributes
    windows = _pool_windows(a, s.made, -np.inf)

    def run(inputs: list[Array]) -> Array:
        view = windows(inputs[0])
        y: Array = view(0, 0).copy(order="K")
        for i, j in list(np.ndindex(*a["kernel"]))[1:]:
            np.maximum(y, view(i, j), out=y)
        return y

    return run


def _avg_pool(s: _Prepared) -> Kernel:
    a = s.attributes
    given, made = s.given, s.made
    windows = _pool_windows(a, made, 0.0)
    # A window counts what lies inside the input or, if asked, inside the padding; never what sticks out behind that.
    sizes = []
    for n, k, stride, p, out in zip(given[1:], a["kernel"], a["stride"], a["padding"], made[1:], strict=True):
        low, high = (-p, n + p) if a["count_padding"] else (0, n)
        start = np.arange(out) * stride - p
        sizes.append((np.minimum(start + k, high) - np.maximum(start, low)).astype(np.float32))
    rows, columns = sizes[0][:, None], sizes[1]

    def run(inputs: list[Array]) -> Array:
        view = windows(inputs[0])
        y: Array = view(0, 0).copy(order="K")
        for i, j in list(np.ndindex(*a["kernel"]))[1:]:
            y += view(i, j)
        y /= rows * columns
        return y

    return run


def _pool_windows(a: Mapping[str, Any], made: Shape, fill: float) -> Callable[[Array], Callable[[int, int], Array]]:
    """For an input, a function (i, j) -> the entries at (i, j) of every window, (N, C, OH, OW)."""
    (sh, sw), (ph, pw), (dh, dw) = a["stride"], a["padding"], a.get("dilation", (1, 1))
    kernel = a["kernel"]
    (oh, ow) = made[1:]

    def prepare(x: Array) -> Callable[[int, int], Array]:
        behind = [
            max(0, (out - 1) * s + d * (k - 1) + 1 - p - n)
            for out, s, d, k, p, n in zip(made[1:], (sh, sw), (dh, dw), kernel, (ph, pw), x.shape[2:], strict=True)
        ]
        if ph or pw or any(behind):
            x = np.moveaxis(x, 1, 0)
            x = np.pad(x, ((0, 0), (0, 0), (ph, behind[0]), (pw, behind[1])), constant_values=np.float32(fill))
            x = np.moveaxis(x, 0, 1)

        def view(i: int, j: int) -> Array:
            top, left = i * dh, j * dw
            return x[:, :, top : top + (oh - 1) * sh + 1 : sh, left : left + (ow - 1) * sw + 1 : sw]

        return view

    return prepare


def _adaptive_avg_pool(s: _Prepared) -> Kernel:
    _, height, width = s.given
    rows, columns = (
        np.stack([_share(n, i, out) for i in range(out)]).astype(np.float32)
        for n, out in zip((height, width), s.attributes["output"], strict=True)
    )
    return lambda inputs: np.matmul(np.matmul(rows, inputs[0]), columns.T)


def _share(size: int, i: int, out: int) -> Array:
    """Weight of every entry in window i of `out`: the windows run from floor(i*size/out) to ceil((i+1)*size/out)."""
    share = np.zeros(size)
    start, stop = i * size // out, -(-(i + 1) * size // out)
    share[start:stop] = 1 / (stop - start)
    return share


_BINARY: Final[Mapping[str, Callable[[Array, Array], Array]]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
}


def _binary(s: _Prepared) -> Kernel:
    a, operate = s.attributes, _BINARY[s.op]
    activate = _ACTIVATE[a["activation"]]
    if "constant" in s.tensors:
        # All dimensions of a sample written out, or the batch would be taken for one of them.
        constant = s.tensors["constant"]
        constant = constant.reshape((1,) * (len(s.given) - constant.ndim) + constant.shape)
        return lambda inputs: activate(operate(inputs[0], constant))
    if "residual_scale" in a:
        return lambda inputs: activate(inputs[0] + _rounded(inputs[1], a["residual_scale"], a["residual_zero"]))
    return lambda inputs: activate(operate(inputs[0], inputs[1]))


def _activation(s: _Prepared) -> Kernel:
    apply = _ACTIVATE[s.attributes["activation"]]
    return lambda inputs: apply(inputs[0].copy(order="K"))


_erf = np.vectorize(math.erf, otypes=[np.float32])


def _sigmoid(x: Array) -> Array:
    np.negative(x, out=x)
    np.exp(x, out=x)
    x += np.float32(1)
    return np.reciprocal(x, out=x)


def _hardsigmoid(x: Array) -> Array:
    x += np.float32(3)
    np.clip(x, 0, 6, out=x)
    x *= np.float32(1 / 6)
    return x


_ACTIVATE: Final[Mapping[str, Callable[[Array], Array]]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, np.float32(0), out=x),
    "relu6": lambda x: np.clip(x, 0, 6, out=x),
    "silu": lambda x: x * _sigmoid(x.copy(order="K")),
    "hardswish": lambda x: x * _hardsigmoid(x.copy(order="K")),
    "sigmoid": _sigmoid,
    "hardsigmoid": _hardsigmoid,
    "tanh": lambda x: np.tanh(x, out=x),
    "gelu": lambda x: np.float32(0.5) * x * (1 + _erf(x * np.float32(0.5**0.5))),
}


def _leaky_relu(s: _Prepared) -> Kernel:
    slope = np.float32(s.attributes["slope"])
    return lambda inputs: np.where(inputs[0] > 0, inputs[0], inputs[0] * slope)


def _clip(s: _Prepared) -> Kernel:
    low, high = np.float32(s.attributes["low"]), np.float32(s.attributes["high"])
    return lambda inputs: np.clip(inputs[0], low, high)


def _softmax(s: _Prepared) -> Kernel:
    axis = s.attributes["axis"] + 1

    def run(inputs: list[Array]) -> Array:
        shifted = inputs[0] - inputs[0].max(axis=axis, keepdims=True)
        powers = np.exp(shifted)
        total = powers.sum(axis=axis, keepdims=True)
        y: Array = powers / total if s.op == "softmax" else shifted - np.log(total)
        return y

    return run


def _matmul(_: _Prepared) -> Kernel:
    return lambda inputs: np.matmul(inputs[0], inputs[1])


def _attention(s: _Prepared) -> Kernel:
    scale = np.float32(s.attributes["scale"])

    def run(inputs: list[Array]) -> Array:
        query, key, value = inputs
        scores = np.matmul(query, key.swapaxes(-1, -2)) * scale
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        y: Array = np.matmul(powers / powers.sum(axis=-1, keepdims=True), value)
        return y

    return run


def _layer_norm(s: _Prepared) -> Kernel:
    dims, epsilon = s.attributes["dims"], s.attributes["epsilon"]
    axes, form = tuple(range(-dims, 0)), s.given[len(s.given) - dims :]
    scale, shift = (s.tensors[role].reshape(form) if role in s.tensors else None for role in ("scale", "shift"))

    def run(inputs: list[Array]) -> Array:
        x = inputs[0].astype(np.float64)
        y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)
        y = y if scale is None else y * scale
        y = y if shift is None else y + shift
        normalised: Array = y.astype(np.float32)
        return normalised

    return run


def _mean(s: _Prepared) -> Kernel:
    axes = tuple(axis + 1 for axis in s.attributes.get("axes", (1, 2)))
    keep = s.attributes.get("keep", True)  # without attributes: the global pool
    return lambda inputs: inputs[0].mean(axis=axes, keepdims=keep)


def _norm(s: _Prepared) -> Kernel:
    axes, keep = tuple(axis + 1 for axis in s.attributes["axes"]), s.attributes["keep"]
    return lambda inputs: np.sqrt(np.square(inputs[0], dtype=np.float64).sum(axes, keepdims=keep)).astype(np.float32)


def _concat(s: _Prepared) -> Kernel:
    return lambda inputs: np.concatenate(inputs, axis=s.attributes["axis"] + 1)


def _reshape(s: _Prepared) -> Kernel:
    return lambda inputs: inputs[0].reshape(len(inputs[0]), *s.attributes["shape"])


def _transpose(s: _Prepared) -> Kernel:
    return lambda inputs: inputs[0].transpose(0, *(axis + 1 for axis in s.attributes["order"]))


def _pad(s: _Prepared) -> Kernel:
    widths = ((0, 0), *zip(s.attributes["before"], s.attributes["after"], strict=True))
    return lambda inputs: np.pad(inputs[0], widths, constant_values=np.float32(s.attributes["value"]))


def _slice(s: _Prepared) -> Kernel:
    a = s.attributes
    index = (slice(None),) * (a["axis"] + 1) + (slice(a["start"], a["stop"], a["step"]),)
    return lambda inputs: inputs[0][index]


def _take(s: _Prepared) -> Kernel:
    indices = s.tensors["indices"].astype(np.intp)
    return lambda inputs: inputs[0].take(indices, axis=s.attributes["axis"] + 1)


_KERNELS: Final[Mapping[str, Callable[[_Prepared], Kernel]]] = {
    "conv": _conv,
    "linear": _linear,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "global_avg_pool": _mean,
    "add": _binary,
    "sub": _binary,
    "mul": _binary,
    "div": _binary,
    "activation": _activation,
    "leaky_relu": _leaky_relu,
    "clip": _clip,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "layer_norm": _layer_norm,
    "matmul": _matmul,
    "attention": _attention,
    "mean": _mean,
    "norm": _norm,
    "concat": _concat,
    "reshape": _reshape,
    "transpose": _transpose,
    "pad": _pad,
    "slice": _slice,
    "take": _take,
}
