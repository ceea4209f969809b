"""From a torch model to a program: operators become steps, and everything that depends on weights alone is computed.

Three stages: every operator of the trace becomes one or a few operations on named values (`_Lowering`, one method
for each operator); neighbours are merged (`_merge`); weights get the storage that takes the fewest bytes and values
their numbers (`_assemble`).
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from autocompress_fast.engine.program import Input, Program, Step, UnsupportedError, VerificationError
from autocompress_fast.trace import BATCH, Node, Ref, Tensor, Trace, trace

if TYPE_CHECKING:
    from autocompress_fast.engine import Engine

__all__ = ["lower", "lower_trace", "verify"]

Array = np.ndarray[Any, Any]

TOLERANCE: Final = 1e-4
"""Largest difference allowed between engine and model, relative to the largest output."""

LOWEST: Final = np.float32(-1e38)
"""Stands for -infinity where a mask hides a score."""


def lower(model: torch.nn.Module, example_input: torch.Tensor | Sequence[torch.Tensor]) -> Program:
    """Turn `model` into a program for any batch size, or for that of the example where the model holds for no other.

    Raises:
        TraceError: the model cannot be read as a graph of operators.
        UnsupportedError: an operator, dtype or use of the batch dimension has no counterpart; all are listed.
    """
    return lower_trace(trace(model, example_input))[0]


def lower_trace(traced: Trace) -> tuple[Program, tuple[str, ...]]:
    """The program of a trace, and for each of its values the name of the node whose result it is.

    Values that an operator makes on the way have its name with quotation marks behind it.

    Raises:
        UnsupportedError: as `lower`.
    """
    lowering = _Lowering(traced)
    outputs = lowering.run()
    operations = _merge(lowering.operations, outputs)
    names = [given.name for given in traced.inputs] + [operation.output for operation in operations]
    return _assemble(traced, operations, outputs), tuple(names)


def verify(engine: Engine, model: torch.nn.Module, example_input: torch.Tensor | Sequence[torch.Tensor]) -> None:
    """Compare engine and model on the example and on random inputs of another batch size.

    Raises:
        VerificationError: they differ by more than 1e-4 of the largest output.
    """
    reference = copy.deepcopy(model).eval()
    example = (example_input,) if isinstance(example_input, torch.Tensor) else tuple(example_input)
    generator = torch.Generator().manual_seed(0)
    more = 0 if engine.program.batch is not None else 1  # an example of zeros, or of one sample, would show little
    noise = tuple(torch.randn(len(x) + more, *x.shape[1:], generator=generator).to(x) for x in example)
    for what, inputs in (("the example", example), ("random inputs", noise)):
        with torch.no_grad():
            expected = [y.cpu().numpy() for y in torch.utils._pytree.tree_leaves(reference(*inputs))]
        if what == "random inputs" and not all(np.isfinite(y).all() for y in expected):
            continue  # noise may lie outside what the model is made for
        found = engine(*inputs)
        for i, (y, wanted) in enumerate(zip(found if isinstance(found, tuple) else (found,), expected, strict=True)):
            with np.errstate(invalid="ignore"):  # infinity - infinity is no agreement
                difference = float(np.abs(y.cpu().numpy() - wanted).max(initial=0))
            largest = float(np.abs(wanted).max(initial=0))
            if not difference <= TOLERANCE * largest:
                raise VerificationError(
                    f"output {i} on {what} differs from the model's by {difference:.3g} where the largest is "
                    f"{largest:.3g}; allowed is a relative {TOLERANCE:g}"
                )


@dataclass
class _Operation:
    """A step before values are numbered: weights are still whole, (P, C, KH, KW) or (P, K)."""

    op: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    name: str = ""


class _NotLoweredError(Exception):
    """Why a node cannot be lowered."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the model has its samples: `dim` holds all of them `outer` times, each in `inner` parts.

    The value that stands for the tensor has its samples first; outer and inner are axes of a sample where above 1.
    """

    dim: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def parts(self) -> tuple[int, ...]:
        return tuple(n for n in (self.outer, self.inner) if n > 1)

    def sample(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """The shape of one sample of a tensor of `shape`."""
        return (*shape[: self.dim], *self.parts, *shape[self.dim + 1 :])

    def axes(self, rank: int) -> list[tuple[int, ...]]:
        """For every dimension of a tensor of `rank` the axes of one sample that it is."""
        behind = range(self.dim + len(self.parts), rank - 1 + len(self.parts))
        parts = tuple(range(self.dim, self.dim + len(self.parts)))
        return [*((d,) for d in range(self.dim)), parts, *((d,) for d in behind)]


class _Lowering:
    """Turns the live nodes of a trace into operations; values keep the names of their nodes."""

    def __init__(self, traced: Trace) -> None:
        self.trace = traced
        self.batch = traced.inputs[0].shape[0] if traced.inputs[0].shape else None
        self.operations: list[_Operation] = []
        self.names: dict[str, str] = {}  # node -> the value it stands for; differs where a node changes nothing
        self.shapes: dict[str, tuple[int, ...]] = {}  # value -> shape of one sample
        self.places: dict[str, _Place] = {}  # node -> where it has its samples
        self.constants: dict[str, Any] = {}
        self.per_sample: set[str] = set()  # constants that the model repeats for every sample; kept for one

    def run(self) -> list[str]:
        """Lower everything; return the names of the outputs."""
        problems: list[str] = []
        for given in self.trace.inputs:
            if given.dtype != "float32" or not given.shape or given.shape[0] != self.batch:
                problems.append(
                    f"input {given.name!r} is {given.dtype} {given.shape}; all must be float32 and (N, ...)"
                )
            self.names[given.name], self.shapes[given.name] = given.name, given.shape[1:]
            self.places[given.name] = _Place()
        problems.extend(filter(None, map(self._problem, _live(self.trace))))
        for output in self.trace.outputs:
            if output.name not in self.names:
                problems.append(f"output {output.name!r} does not depend on the input")
            elif self.places[output.name].dim != 0:
                problems.append(f"output {output.name!r} does not have the batch first")
            elif self.places[output.name].parts:
                problems.append(f"output {output.name!r} mixes the batch with other dimensions")
        if problems:
            raise UnsupportedError("the engine cannot run this model: " + "; ".join(problems))
        return [self.names[output.name] for output in self.trace.outputs]

    def _problem(self, node: Node) -> str:
        """Lower `node`; return why that cannot be done, and go on as if it could, so that all problems are listed."""
        try:
            self._lower(node)
        except _NotLoweredError as error:
            self.names[node.name] = node.name
            self.places[node.name] = place = self.places.get(node.name, _Place())
            self.shapes[node.name] = tuple(1 if type(n) is type(BATCH) else n for n in place.sample(node.shape))
            return f"{node.where}: {error}"
        return ""

    def _lower(self, node: Node) -> None:
        if self._is_constant(node):
            self.constants[node.name] = self._evaluate(node)
            return
        handler = _HANDLERS.get(node.op) if node.target.startswith("aten.") or node.op == "getitem" else None
        if handler is None:
            raise _NotLoweredError("unsupported operator")
        if node.dtype == "tuple":
            return  # "getitem" nodes do the work
        if node.dtype != "float32":
            raise _NotLoweredError(f"the result is {node.dtype}; only float32 is supported")
        self.places[node.name] = self._place(node)
        value = handler(self, node)
        self.names[node.name] = value
        if self.shapes[value] != self.made(node):
            raise _NotLoweredError(f"gives samples of {self.made(node)}, but {self.shapes[value]} was expected")

    def _place(self, node: Node) -> _Place:
        """Where `node` has its samples: where its first operand has them, but for operators that reorder dimensions."""
        if self.trace.dynamic_batch:
            dims = [d for d, n in enumerate(node.shape) if type(n) is type(BATCH)]
        else:  # a number among others says nothing about where the samples are
            dims = [0] if node.shape[:1] == (self.batch,) else []
        if not dims:
            raise _NotLoweredError(f"the result {node.shape} does not have the batch")
        if len(dims) > 1:
            raise _NotLoweredError(f"the result {node.shape} has the batch more than once")
        if 0 in node.shape:
            raise _NotLoweredError(f"the result {node.shape} is empty")
        source = self.trace.node(node.args[0].name) if node.op == "getitem" else node
        given = next((o for o in (source or node).operands if self.is_value(o)), None)
        if given is None or not self.trace.dynamic_batch:
            return _Place(dims[0])
        place, shape = self.places[given.name], self.shapes[self.names[given.name]]
        if _HANDLERS[node.op] is not _Lowering.reshape:
            return _Place(dims[0], place.outer, place.inner)
        ahead = place.dim + (place.outer > 1)
        outer, above = divmod(math.prod(shape[:ahead]), math.prod(node.shape[: dims[0]]))
        inner, below = divmod(math.prod(shape[ahead:]), math.prod(node.shape[dims[0] + 1 :]))
        if above or below:
            raise _NotLoweredError(f"the result {node.shape} mixes the batch with other dimensions")
        return _Place(dims[0], outer, inner)

    # --- constants

    def _is_constant(self, node: Node) -> bool:
        """Whether the node is the same for every input, and is made without the number of samples.

        What is the same for every sample (an expanded bias) is kept for one of them, as the batch dimension is 1 then.
        """
        known = node.op in _FILLED or all(isinstance(o, Tensor) or o.name in self.constants for o in node.operands)
        if not known or any(type(n) is type(BATCH) for n in _numbers(node.shape[1:])):
            return False
        sized = any(type(n) is type(BATCH) for n in _numbers((node.args, *node.kwargs.values())))
        per_sample = any(o.name in self.per_sample for o in node.operands)
        if not per_sample and not (sized and node.op == "expand"):
            return not sized
        if sized and node.op != "expand":
            return False
        if not node.shape or type(node.shape[0]) is not type(BATCH):
            raise _NotLoweredError("works across the batch")
        self.per_sample.add(node.name)
        return True

    def _evaluate(self, node: Node) -> Any:
        if node.op == "getitem":
            return self._constant(node.args[0])[node.args[1]]
        target = operator.attrgetter(node.target)(torch.ops)
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise _NotLoweredError("random numbers are not supported")
        if node.op in _FILLED:  # reads no more than a dtype
            args = [torch.empty(0, dtype=getattr(torch, node.dtype)), *self._constant(node.args[1:])]
        else:
            args = self._constant(node.args)
        kwargs = {k: self._constant(v) for k, v in node.kwargs.items()}
        if node.op == "expand":
            args[1] = [1 if type(n) is type(BATCH) else n for n in args[1]]
        if target._schema.is_mutable:  # the values belong to the model
            args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        with torch.no_grad():
            return target(*args, **kwargs)

    def _constant(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.trace.tensors[value.name]
        if isinstance(value, Ref):
            return self.constants[value.name]
        return [self._constant(v) for v in value] if isinstance(value, tuple) else value

    def array(self, argument: Any, what: str) -> Array:
        """The float32 array of a constant argument or number."""
        if isinstance(argument, Ref) and argument.name not in self.constants:
            raise _NotLoweredError(f"its {what} depends on the input")
        value = self._constant(argument)
        if type(value) is type(BATCH):
            raise _NotLoweredError(f"its {what} depends on the batch size")
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise _NotLoweredError(f"its {what} holds NaN or infinity")
        return array

    # --- building

    def is_value(self, argument: Any) -> bool:
        """Whether an argument is computed from the input."""
        return isinstance(argument, Ref) and argument.name in self.names

    def value(self, argument: Any) -> str:
        """The value that an argument stands for."""
        if not self.is_value(argument):
            raise _NotLoweredError("an operand does not depend on the input")
        return self.names[argument.name]

    def place(self, argument: Any) -> _Place:
        """Where a computed argument has its samples."""
        return self.places[argument.name]

    def batch_first(self, argument: Any) -> str:
        """The value that an argument stands for, if its first dimension is the batch and nothing else."""
        value = self.value(argument)
        if self.place(argument) != _Place():
            raise _NotLoweredError("its input does not have the batch first, or mixes it with other dimensions")
        return value

    def made(self, node: Node) -> tuple[int, ...]:
        """The shape of one sample of what `node` makes."""
        return self.places[node.name].sample(node.shape)

    def rank(self, argument: Any) -> int:
        """Dimensions of a computed argument."""
        return len(self.shapes[self.value(argument)]) - len(self.place(argument).parts) + 1

    def emit(
        self,
        node: Node,
        op: str,
        inputs: Sequence[str],
        shape: tuple[int, ...],
        attributes: Mapping[str, Any] | None = None,
        arrays: Mapping[str, Array] | None = None,
    ) -> str:
        """Add an operation that makes a value of `shape`; return its name."""
        output = node.name
        while output in self.shapes:
            output += "'"
        self.shapes[output] = shape
        self.operations.append(
            _Operation(op, list(inputs), output, dict(attributes or {}), dict(arrays or {}), node.module)
        )
        return output

    def axis(self, node: Node, dim: Any) -> int:
        """A dimension of the node's first operand as an axis of one sample."""
        return self.axis_of(node.args[0], dim)

    def axis_of(self, argument: Any, dim: Any) -> int:
        """A dimension of a computed argument as an axis of one sample."""
        rank, place = self.rank(argument), self.place(argument)
        if dim % rank == place.dim:
            raise _NotLoweredError("works across the batch")
        return place.axes(rank)[int(dim) % rank][0]

    # --- operators

    def conv2d(self, node: Node) -> str:
        given, weight, bias, stride, padding, dilation, groups = node.args
        x = self.batch_first(given)
        arrays = {"weight": self.array(weight, "weight")}
        if bias is not None:
            arrays["bias"] = self.array(bias, "bias")
        kernel = arrays["weight"].shape[2:]
        stride, dilation = _pair(stride), _pair(dilation)
        attributes = {
            "kernel": kernel,
            "stride": stride,
            "padding": _conv_padding(padding, kernel, dilation),
            "dilation": dilation,
            "groups": groups,
            "activation": "none",
        }
        return self.emit(node, "conv", [x], self.made(node), attributes, arrays)

    def linear(self, node: Node) -> str:
        given, weight, bias = node.args
        self.axis(node, -1)
        arrays = {"weight": self.array(weight, "weight")}
        if bias is not None:
            arrays["bias"] = self.array(bias, "bias")
        return self.emit(node, "linear", [self.value(given)], self.made(node), {"activation": "none"}, arrays)

    def batch_norm(self, node: Node) -> str:
        given, weight, bias, mean, variance, training, _, epsilon, _ = node.args
        if training or mean is None or variance is None:
            raise _NotLoweredError("normalises by the batch itself; only running statistics are supported")
        spread = np.sqrt(self.array(variance, "variance").astype(np.float64) + epsilon)
        scale = (1.0 if weight is None else self.array(weight, "weight").astype(np.float64)) / spread
        shift = -self.array(mean, "mean").astype(np.float64) * scale
        if bias is not None:
            shift += self.array(bias, "bias")
        x = self.batch_first(given)
        attributes = {"rank": len(self.shapes[x])}
        return self.emit(node, "batch_norm", [x], self.made(node), attributes, {"scale": scale, "shift": shift})

    def layer_norm(self, node: Node) -> str:
        given, shape, weight, bias, epsilon, *_ = node.args
        x = self.value(given)
        if len(shape) >= self.rank(given) - self.place(given).dim:
            raise _NotLoweredError("normalises across the batch")
        arrays = {
            role: self.array(value, role).reshape(-1)
            for role, value in (("scale", weight), ("shift", bias))
            if value is not None
        }
        attributes = {"dims": len(shape), "epsilon": float(epsilon)}
        return self.emit(node, "layer_norm", [x], self.shapes[x], attributes, arrays)

    def gelu(self, node: Node) -> str:
        if (kind := [*node.args[1:], node.kwargs.get("approximate", "none")][0]) != "none":
            raise _NotLoweredError(f"approximate={kind!r} is not supported")
        return self._activate(node, "gelu")

    def activation(self, node: Node) -> str:
        return self._activate(node, node.op)

    def _activate(self, node: Node, kind: str) -> str:
        x = self.value(node.args[0])
        return self.emit(node, "activation", [x], self.shapes[x], {"activation": kind})

    def clamp(self, node: Node) -> str:
        x = self.value(node.args[0])
        low, high = (*node.args[1:], None)[:2]
        if any(isinstance(bound, Ref | Tensor) for bound in (low, high)):
            raise _NotLoweredError("bounds that are tensors are not supported")
        if low == 0 and high in (None, 6):
            return self._activate(node, "relu" if high is None else "relu6")
        largest = float(np.finfo(np.float32).max)
        bounds = {"low": -largest if low is None else float(low), "high": largest if high is None else float(high)}
        return self.emit(node, "clip", [x], self.shapes[x], bounds)

    def leaky_relu(self, node: Node) -> str:
        x = self.value(node.args[0])
        return self.emit(node, "leaky_relu", [x], self.shapes[x], {"slope": float(node.args[1])})

    def max_pool2d(self, node: Node) -> str:
        given, kernel, stride, padding, dilation, ceil = node.args
        attributes = _pool(kernel, stride, padding, ceil)
        attributes["dilation"] = _pair(dilation)
        return self.emit(node, "max_pool", [self.batch_first(given)], self.made(node), attributes)

    def avg_pool2d(self, node: Node) -> str:
        given, kernel, stride, padding, ceil, count_padding, divisor = node.args
        if divisor is not None:
            raise _NotLoweredError("divisor_override is not supported")
        attributes = _pool(kernel, stride, padding, ceil)
        attributes["count_padding"] = count_padding
        return self.emit(node, "avg_pool", [self.batch_first(given)], self.made(node), attributes)

    def adaptive_avg_pool2d(self, node: Node) -> str:
        x = self.batch_first(node.args[0])
        (height, width), (rows, columns) = self.shapes[x][-2:], node.shape[-2:]
        if (rows, columns) == (height, width):
            return x
        if rows == columns == 1:
            return self.emit(node, "global_avg_pool", [x], self.made(node))
        if height % rows == width % columns == 0:
            kernel = (height // rows, width // columns)
            attributes = {**_pool(kernel, kernel, 0, ceil=False), "count_padding": False}
            return self.emit(node, "avg_pool", [x], self.made(node), attributes)
        return self.emit(node, "adaptive_avg_pool", [x], self.made(node), {"output": (rows, columns)})

    def mean(self, node: Node) -> str:
        x = self.value(node.args[0])
        if node.target != "aten.mean.dim" or not node.args[1]:
            raise _NotLoweredError("works across the batch")
        axes, keep = tuple(sorted(self.axis(node, d) for d in node.args[1])), node.args[2]
        if axes == (1, 2) and len(self.shapes[x]) == 3:
            pooled = self.emit(node, "global_avg_pool", [x], (self.shapes[x][0], 1, 1))
            return pooled if keep else self._reshape(node, pooled)
        return self.emit(node, "mean", [x], self.made(node), {"axes": axes, "keep": keep})

    def norm(self, node: Node) -> str:
        given, order, dims, keep, *_ = node.args
        if order != 2 or not dims:
            raise _NotLoweredError(f"order {order} over {dims}; only 2 over some dimensions is supported")
        axes = tuple(sorted(self.axis(node, d) for d in dims))
        return self.emit(node, "norm", [self.value(given)], self.made(node), {"axes": axes, "keep": keep})

    def binary(self, node: Node) -> str:
        left, right = node.args[:2]
        alpha, rounding = node.kwargs.get("alpha", 1), node.kwargs.get("rounding_mode")
        if rounding is not None:
            raise _NotLoweredError(f"rounding mode {rounding!r} is not supported")
        if not self.is_value(left) and node.op in ("add", "mul") and alpha == 1:
            left, right = right, left
        elif not self.is_value(left) and node.op == "sub":
            return self._from_constant(node, right, self.array(left, "first operand"), alpha)
        x = self.value(left)
        plain = {"activation": "none"}
        if self.is_value(right):
            y = self.value(right)
            if alpha != 1:
                y = self._with_constant(node, "mul", y, np.asarray(alpha, np.float32))
            if len(self.shapes[x]) != len(self.shapes[y]):
                raise _NotLoweredError(f"operands {self.shapes[x]} and {self.shapes[y]} of one sample differ in rank")
            self._check_places(left, right)
            return self.emit(node, node.op, [x, y], self.made(node), plain)
        constant = self.array(right, "second operand") * np.float32(alpha)
        return self._with_constant(node, node.op, x, self._of_sample(left, constant))

    def _check_places(self, *arguments: Any) -> None:
        if len({self.place(argument) for argument in arguments}) > 1:
            raise _NotLoweredError("its operands have the batch in different places")

    def _of_sample(self, argument: Any, constant: Array) -> Array:
        """What of a constant that is broadcast with a computed argument meets one sample."""
        rank, place = self.rank(argument), self.place(argument)
        if constant.ndim < rank - place.dim:
            return constant
        whole = constant.reshape((1,) * (rank - constant.ndim) + constant.shape)
        one: Array = whole.take([0], axis=place.dim)
        if whole.ndim > rank or (whole != one).any():
            raise _NotLoweredError(f"a constant of shape {constant.shape} reaches into the batch")
        shape = (*one.shape[: place.dim], *(1 for _ in place.parts), *one.shape[place.dim + 1 :])
        return np.reshape(one, shape)

    def _with_constant(self, node: Node, op: str, x: str, constant: Array) -> str:
        shape = np.broadcast_shapes(self.shapes[x], constant.shape)
        return self.emit(node, op, [x], shape, {"activation": "none"}, {"constant": constant})

    def _from_constant(self, node: Node, given: Any, constant: Array, alpha: Any) -> str:
        """Constant - alpha * given."""
        negative = self._with_constant(node, "mul", self.value(given), np.asarray(-alpha, np.float32))
        return self._with_constant(node, "add", negative, self._of_sample(given, constant))

    def rsub(self, node: Node) -> str:
        left, right, *rest = node.args
        alpha = rest[0] if rest else node.kwargs.get("alpha", 1)
        return self._from_constant(node, left, self.array(right, "second operand"), alpha)

    def zeros_like(self, node: Node) -> str:
        x = self.value(node.args[0])
        return self.emit(node, "clip", [x], self.shapes[x], {"low": 0.0, "high": 0.0})

    def cat(self, node: Node) -> str:
        tensors, dim = node.args
        given = [t for t in tensors if self.is_value(t)] or tensors
        axis = self.axis_of(given[0], dim)
        self._check_places(*given)
        ahead: list[Array] = []  # constants in front of the first value
        parts: list[tuple[str, list[Array]]] = []  # values, each with the constants behind it
        for tensor in tensors:
            if self.is_value(tensor):
                parts.append((self.value(tensor), []))
            else:
                (parts[-1][1] if parts else ahead).append(self._of_sample(given[0], self.array(tensor, "operand")))
        values = []
        for x, behind in parts:
            values.append(self._between(node, ahead, x, behind, axis))
            ahead = []
        return values[0] if len(values) == 1 else self.emit(node, "concat", values, self.made(node), {"axis": axis})

    def _between(self, node: Node, ahead: Sequence[Array], x: str, behind: Sequence[Array], axis: int) -> str:
        """A value with constants around it along an axis: zeros, to which they are added."""
        if not ahead and not behind:
            return x
        shape = self.shapes[x]
        constant = np.concatenate([*ahead, np.zeros(shape, np.float32), *behind], axis)
        before, after = (
            tuple(sum(part.shape[axis] for part in side) if d == axis else 0 for d in range(len(shape)))
            for side in (ahead, behind)
        )
        padded = self.emit(node, "pad", [x], constant.shape, {"before": before, "after": after, "value": 0.0})
        return self._with_constant(node, "add", padded, constant)

    def expand(self, node: Node) -> str:
        x, shape = self.value(node.args[0]), self.made(node)
        if self.shapes[x] == shape:
            return x
        if len(self.shapes[x]) != len(shape):
            raise _NotLoweredError("adds dimensions")
        grown = next(axis for axis, (n, m) in enumerate(zip(self.shapes[x], shape, strict=True)) if n != m)
        return self._with_constant(node, "add", x, np.zeros(shape[grown:], np.float32))

    def reshape(self, node: Node) -> str:
        return self._reshape(node, self.value(node.args[0]))

    def _reshape(self, node: Node, x: str) -> str:
        shape = self.made(node)
        if math.prod(shape) != math.prod(self.shapes[x]):
            raise _NotLoweredError(
                f"turns samples of {self.shapes[x]} into {shape}: mixes the batch with other dimensions"
            )
        return x if shape == self.shapes[x] else self.emit(node, "reshape", [x], shape, {"shape": shape})

    def permute(self, node: Node) -> str:
        rank = self.rank(node.args[0])
        order = list(range(rank))
        if node.op == "permute":
            order = [d % rank for d in node.args[1]]
        else:
            a, b = (d % rank for d in node.args[1:3])
            order[a], order[b] = order[b], order[a]
        if order.index(self.place(node.args[0]).dim) != self.place(node).dim:
            raise _NotLoweredError("moves the batch dimension")
        axes = self.place(node.args[0]).axes(rank)
        return self._transpose(node, self.value(node.args[0]), [axis for d in order for axis in axes[d]])

    def _transpose(self, node: Node, x: str, order: Sequence[int]) -> str:
        if list(order) == sorted(order):
            return x
        made = tuple(self.shapes[x][axis] for axis in order)
        return self.emit(node, "transpose", [x], made, {"order": tuple(order)})

    def pad(self, node: Node) -> str:
        x, widths = self.value(node.args[0]), node.args[1]
        mode, value = node.args[2:4] if node.op == "pad" else ("constant", node.args[2])
        if mode != "constant" or min(widths, default=0) < 0:
            raise _NotLoweredError(f"mode {mode!r} with widths {widths}; only constant padding is supported")
        before, after = [0] * len(self.shapes[x]), [0] * len(self.shapes[x])
        for i in range(len(widths) // 2):  # torch counts from the last dimension
            if widths[2 * i] or widths[2 * i + 1]:
                axis = self.axis(node, -1 - i)
                before[axis], after[axis] = widths[2 * i], widths[2 * i + 1]
        if not any(widths):
            return x
        attributes = {"before": tuple(before), "after": tuple(after), "value": float(value or 0)}
        return self.emit(node, "pad", [x], self.made(node), attributes)

    def slice_(self, node: Node) -> str:
        _, dim, start, stop, step = node.args
        if dim == 0 and start in (None, 0) and (stop is None or stop >= 2**62) and step == 1:
            return self.value(node.args[0])
        return self._slice(node, self.axis(node, dim), start, stop, step)

    def _slice(self, node: Node, axis: int, start: int | None, stop: int | None, step: int = 1) -> str:
        x = self.value(node.args[0])
        if any(type(n) is type(BATCH) for n in (start, stop, step)):
            raise _NotLoweredError("its bounds depend on the batch size")
        shape = self.shapes[x]
        first, last, step = slice(start, stop, step).indices(shape[axis])
        if (first, last, step) == (0, shape[axis], 1):
            return x
        if first >= last:
            raise _NotLoweredError("the result is empty")
        made = (*shape[:axis], len(range(first, last, step)), *shape[axis + 1 :])
        return self.emit(node, "slice", [x], made, {"axis": axis, "start": first, "stop": last, "step": step})

    def select(self, node: Node) -> str:
        _, dim, index = node.args
        axis = self.axis(node, dim)
        start = index % self.shapes[self.value(node.args[0])][axis]
        return self._reshape(node, self._slice(node, axis, start, start + 1))

    def narrow(self, node: Node) -> str:
        _, dim, start, length = node.args
        return self._slice(node, self.axis(node, dim), start, start + length)

    def getitem(self, node: Node) -> str:
        source = self.trace.node(node.args[0].name)
        if source is None or source.op not in ("split", "split_with_sizes", "chunk"):
            raise _NotLoweredError("picks one of several results")
        _, parts, dim = source.args
        axis, index = self.axis(source, dim), node.args[1]
        size = self.shapes[self.value(source.args[0])][axis]
        if isinstance(parts, tuple):
            start = sum(parts[:index])
        else:
            start = index * (parts if source.op == "split" else -(-size // parts))
        x = self.value(source.args[0])
        length = self.made(node)[axis]
        return x if length == size else self._slice(_reading(node, source), axis, start, start + length)

    def index_select(self, node: Node) -> str:
        return self._take(node, self.axis(node, node.args[1]), node.args[2])

    def index(self, node: Node) -> str:
        given = [(dim, index) for dim, index in enumerate(node.args[1]) if index is not None]
        if len(given) != 1:
            raise _NotLoweredError("only one index is supported")
        return self._take(node, self.axis(node, given[0][0]), given[0][1])

    def _take(self, node: Node, axis: int, index: Any) -> str:
        x = self.value(node.args[0])
        if isinstance(index, Ref) and index.name not in self.constants:
            raise _NotLoweredError("its index depends on the input")
        picked = self._constant(index).cpu().numpy()
        if picked.ndim != 1 or not picked.size or picked.dtype.kind not in "iu":
            raise _NotLoweredError(f"an index of {picked.dtype} {picked.shape} is not supported")
        return self._pick(node, x, axis, np.where(picked < 0, picked + self.shapes[x][axis], picked))

    def _pick(self, node: Node, x: str, axis: int, picked: Array) -> str:
        given = self.shapes[x]
        shape = (*given[:axis], len(picked), *given[axis + 1 :])
        attributes = {"axis": axis, "last": len(given) - 1, "size": given[axis]}
        return self.emit(node, "take", [x], shape, attributes, {"indices": picked})

    def roll(self, node: Node) -> str:
        given, shifts, dims = node.args
        x = self.value(given)
        if not dims:
            raise _NotLoweredError("works across the batch")
        for shift, dim in zip(shifts, dims, strict=True):
            axis = self.axis(node, dim)
            x = self._pick(node, x, axis, np.roll(np.arange(self.shapes[x][axis]), shift))
        return x

    def softmax(self, node: Node) -> str:
        x = self.value(node.args[0])
        return self.emit(node, node.op.lstrip("_"), [x], self.shapes[x], {"axis": self.axis(node, node.args[1])})

    def attention(self, node: Node) -> str:
        query, key, value, mask, dropout, causal = node.args
        if dropout:
            raise _NotLoweredError("drops some of its weights")
        self._check_places(query, key, value)
        if self.rank(query) - self.place(query).dim < 3:
            raise _NotLoweredError("works across the batch")
        q, k, v = map(self.value, (query, key, value))
        if len({self.shapes[x][:-2] for x in (q, k, v)}) != 1:
            raise _NotLoweredError(f"heads of {self.shapes[q]}, {self.shapes[k]} and {self.shapes[v]} are not the same")
        scale = node.kwargs.get("scale")
        scale = self.shapes[q][-1] ** -0.5 if scale is None else float(scale)
        if mask is None and not causal:
            return self.emit(node, "attention", [q, k, v], self.made(node), {"scale": scale})
        shown = np.tri(self.shapes[q][-2], self.shapes[k][-2], dtype=bool) if causal else self._mask(mask)
        shift = np.maximum(np.where(shown, 0, LOWEST) if shown.dtype == bool else shown, LOWEST, dtype=np.float32)
        scores = self._matmul(node, q, self._turned(node, k))
        scores = self._with_constant(node, "mul", scores, np.asarray(scale, np.float32))
        scores = self._with_constant(node, "add", scores, self._of_sample(query, shift))
        axis = {"axis": len(self.shapes[scores]) - 1}
        return self._matmul(node, self.emit(node, "softmax", [scores], self.shapes[scores], axis), v)

    def _mask(self, mask: Any) -> Array:
        if isinstance(mask, Ref) and mask.name not in self.constants:
            raise _NotLoweredError("its mask depends on the input")
        given: Array = self._constant(mask).detach().cpu().numpy()
        return given

    def _turned(self, node: Node, x: str) -> str:
        """Matrices with rows and columns exchanged."""
        *front, rows, columns = range(len(self.shapes[x]))
        return self._transpose(node, x, [*front, columns, rows])

    def matmul(self, node: Node) -> str:
        left, right = node.args
        x = self.value(left)
        if not self.is_value(right):
            weight = self.array(right, "second operand")
            if weight.ndim != 2:
                raise _NotLoweredError(f"a constant of shape {weight.shape} is not a matrix")
            self.axis(node, -1)
            return self.emit(node, "linear", [x], self.made(node), {"activation": "none"}, {"weight": weight.T})
        self._check_places(left, right)
        for dim in (-1, -2):
            self.axis(node, dim)
        return self._matmul(node, x, self.value(right))

    def _matmul(self, node: Node, x: str, y: str) -> str:
        a, b = self.shapes[x], self.shapes[y]
        if len(a) < 2 or a[:-2] != b[:-2]:
            raise _NotLoweredError(f"matrices of {a} and {b} are not as many")
        return self.emit(node, "matmul", [x, y], (*a[:-1], b[-1]))

    def einsum(self, node: Node) -> str:
        """Products of matrices: the letters in front are the same, the last two in any order."""
        equation, operands = node.args[0].replace(" ", ""), node.args[1]
        terms, _, result = equation.partition("->")
        names = [*terms.split(","), result]
        front = result[:-2]
        if len(names) != 3 or len(operands) != 2 or any(name[:-2] != front for name in names):
            raise _NotLoweredError(f"{node.args[0]!r} is not a product of matrices")
        self._check_places(*operands)
        (x, y), (row, column) = map(self.value, operands), result[-2:]
        (summed,) = set(names[0][-2:]) - {row}
        if {column, summed} != set(names[1][-2:]) or self.place(operands[0]).dim >= len(front):
            raise _NotLoweredError(f"{node.args[0]!r} is not a product of matrices")
        x = self._turned(node, x) if names[0][-1] == row else x
        y = self._turned(node, y) if names[1][-1] == summed else y
        return self._matmul(node, x, y)

    def dropout(self, node: Node) -> str:
        if node.args[2]:
            raise _NotLoweredError("is active in eval mode")
        return self.value(node.args[0])

    def identity(self, node: Node) -> str:
        return self.value(node.args[0])


_Handler = Callable[[_Lowering, Node], str]

_HANDLERS: Final[Mapping[str, _Handler]] = {
    **dict.fromkeys(("relu", "relu6", "silu", "hardswish", "sigmoid", "hardsigmoid", "tanh"), _Lowering.activation),
    **dict.fromkeys(("clamp", "clamp_min", "hardtanh"), _Lowering.clamp),
    **dict.fromkeys(("add", "sub", "mul", "div"), _Lowering.binary),
    **dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"), _Lowering.reshape
    ),
    **dict.fromkeys(("permute", "transpose", "swapaxes"), _Lowering.permute),
    **dict.fromkeys(("pad", "constant_pad_nd"), _Lowering.pad),
    **dict.fromkeys(("getitem", "split", "split_with_sizes", "chunk"), _Lowering.getitem),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), _Lowering.softmax),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _Lowering.dropout),
    **dict.fromkeys(
        ("contiguous", "clone", "detach", "alias", "to", "_to_copy", "lift_fresh_copy"), _Lowering.identity
    ),
    "conv2d": _Lowering.conv2d,
    "linear": _Lowering.linear,
    "batch_norm": _Lowering.batch_norm,
    "layer_norm": _Lowering.layer_norm,
    "gelu": _Lowering.gelu,
    "leaky_relu": _Lowering.leaky_relu,
    "max_pool2d": _Lowering.max_pool2d,
    "avg_pool2d": _Lowering.avg_pool2d,
    "adaptive_avg_pool2d": _Lowering.adaptive_avg_pool2d,
    "mean": _Lowering.mean,
    "linalg_vector_norm": _Lowering.norm,
    "rsub": _Lowering.rsub,
    "zeros_like": _Lowering.zeros_like,
    "cat": _Lowering.cat,
    "slice": _Lowering.slice_,
    "select": _Lowering.select,
    "narrow": _Lowering.narrow,
    "index_select": _Lowering.index_select,
    "index": _Lowering.index,
    **dict.fromkeys(("expand", "expand_as"), _Lowering.expand),
    "roll": _Lowering.roll,
    "scaled_dot_product_attention": _Lowering.attention,
    **dict.fromkeys(("matmul", "bmm"), _Lowering.matmul),
    "einsum": _Lowering.einsum,
}

_FILLED: Final = ("new_zeros", "new_ones", "new_full")


def _live(traced: Trace) -> list[Node]:
    """The nodes that an output depends on, in order."""
    needed = {output.name for output in traced.outputs}
    live = []
    for node in reversed(traced.nodes):
        if node.name in needed:
            needed.update(operand.name for operand in node.operands)
            live.append(node)
    return live[::-1]


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    else:
        yield value


def _reading(node: Node, source: Node) -> Node:
    """`node` as if it read what `source` reads."""
    return Node(node.name, node.op, node.target, source.args, {}, node.shape, node.dtype, node.module, node.source)


def _pair(value: Any) -> tuple[int, int]:
    items = tuple(value) if isinstance(value, tuple | list) else (value,)
    return (items[0], items[-1])


def _conv_padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right); "same" puts an odd one behind."""
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    rows, columns = (0, 0) if padding == "valid" else _pair(padding)
    return (rows, rows, columns, columns)


def _pool(kernel: Any, stride: Any, padding: Any, ceil: bool) -> dict[str, Any]:
    kernel = _pair(kernel)
    return {
        "kernel": kernel,
        "stride": _pair(stride) if stride not in (None, ()) else kernel,
        "padding": _pair(padding),
        "ceil": ceil,
    }


# --- merging neighbours ----------------------------------------------------------------------------------------------


def _merge(operations: list[_Operation], outputs: Sequence[str]) -> list[_Operation]:
    """Merge each operation into the one before it where that one's result is read by nothing else."""
    readers = Counter(name for operation in operations for name in operation.inputs)
    readers.update(outputs)
    producers: dict[str, _Operation] = {}
    merged: list[_Operation] = []
    for operation in operations:
        before = producers.get(operation.inputs[0])
        rule = _RULES.get(operation.op)
        if before is not None and rule is not None and readers[before.output] == 1 and rule(before, operation):
            # `before` has become both: it takes over the name of the result, its place in the order stays valid.
            del producers[before.output]
            before.output = operation.output
            producers[before.output] = before
            continue
        merged.extend(_batch_norm_alone(operation) if operation.op == "batch_norm" else [operation])
        producers[merged[-1].output] = merged[-1]
    return merged


def _batch_norm_alone(norm: _Operation) -> list[_Operation]:
    """A normalisation that follows no layer it could be merged into: x * scale + shift."""
    shape = (-1, *[1] * (norm.attributes["rank"] - 1))
    scale, shift = (norm.arrays[role].astype(np.float32).reshape(shape) for role in ("scale", "shift"))
    scaled = norm.output + "'scaled"
    return [
        _Operation("mul", norm.inputs, scaled, {"activation": "none"}, {"constant": scale}, norm.name),
        _Operation("add", [scaled], norm.output, {"activation": "none"}, {"constant": shift}, norm.name),
    ]


def _merge_batch_norm(before: _Operation, norm: _Operation) -> bool:
    if before.op not in ("conv", "linear") or before.attributes["activation"] != "none":
        return False
    if before.op == "linear" and norm.attributes["rank"] != 1:
        return False  # normalised along another axis than the linear layer's outputs
    scale, shift = norm.arrays["scale"], norm.arrays["shift"]
    weight = before.arrays["weight"].astype(np.float64)
    bias = before.arrays["bias"].astype(np.float64) if "bias" in before.arrays else 0.0
    before.arrays["weight"] = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
    before.arrays["bias"] = (bias * scale + shift).astype(np.float32)
    return True


def _merge_activation(before: _Operation, activation: _Operation) -> bool:
    if before.attributes.get("activation") != "none" or before.op == "activation":
        return False
    before.attributes["activation"] = activation.attributes["activation"]
    return True


def _merge_pad(before: _Operation, conv: _Operation) -> bool:
    """Zeros around an image are padding of the convolution that reads it."""
    if before.op != "pad" or before.attributes["value"] != 0:
        return False
    (channels, *starts), (more_channels, *ends) = before.attributes["before"], before.attributes["after"]
    if channels or more_channels:
        return False
    around = (starts[0], ends[0], starts[1], ends[1])
    padding = tuple(p + q for p, q in zip(conv.attributes["padding"], around, strict=True))
    before.op, before.arrays, before.name = "conv", conv.arrays, conv.name
    before.attributes = {**conv.attributes, "padding": padding}
    return True


def _merge_take(before: _Operation, linear: _Operation) -> bool:
    """A layer that reads some of its inputs is one that has weights of zero for the others."""
    picked = before.arrays.get("indices")
    if before.op != "take" or picked is None or before.attributes["axis"] != before.attributes["last"]:
        return False
    weight = linear.arrays["weight"]
    whole = np.zeros((before.attributes["size"], len(weight)), np.float32)
    np.add.at(whole, picked, weight.T)  # an input may be picked more than once
    before.op, before.arrays, before.name = "linear", {**linear.arrays, "weight": whole.T}, linear.name
    before.attributes = dict(linear.attributes)
    return True


_RULES: Final[Mapping[str, Callable[[_Operation, _Operation], bool]]] = {
    "batch_norm": _merge_batch_norm,
    "activation": _merge_activation,
    "conv": _merge_pad,
    "linear": _merge_take,
}


# --- storage and numbers ---------------------------------------------------------------------------------------------


def _assemble(traced: Trace, operations: Sequence[_Operation], outputs: Sequence[str]) -> Program:
    numbers = {given.name: i for i, given in enumerate(traced.inputs)}
    tensors: dict[str, Array] = {}
    steps: list[Step] = []
    for operation in operations:
        attributes, arrays = dict(operation.attributes), dict(operation.arrays)
        if operation.op in ("conv", "linear"):
            weight = arrays.pop("weight")
            attributes["filters"] = len(weight)
            attributes["storage"], stored = _stored(weight.reshape(len(weight), -1), attributes.get("groups", 1))
            arrays.update(stored)
        elif operation.op == "take":
            attributes = {"axis": attributes["axis"]}
            arrays["indices"] = _index(arrays["indices"])
        names = {role: _unused(f"{operation.name or operation.op}.{role}", tensors) for role in arrays}
        tensors.update((names[role], np.asarray(array, order="C")) for role, array in arrays.items())
        numbers[operation.output] = len(numbers)
        read = tuple(numbers[name] for name in operation.inputs)
        steps.append(Step(operation.op, read, numbers[operation.output], attributes, names, operation.name))
    inputs = tuple(Input(given.name, given.shape[1:]) for given in traced.inputs)
    batch = None if traced.dynamic_batch else int(traced.inputs[0].shape[0])
    return Program(inputs, tuple(steps), tuple(numbers[name] for name in outputs), tensors, batch)


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    free = name
    count = 1
    while free in taken:
        count += 1
        free = f"{name}.{count}"
    return free


def _stored(weight: Array, groups: int) -> tuple[str, dict[str, Array]]:
    """The storage of a weight (filters, columns) that takes the fewest bytes, and its tensors."""
    used = weight != 0
    candidates: dict[str, dict[str, Array]] = {"dense": {"weight": weight}}
    if groups == 1:
        rows, columns = np.flatnonzero(used.any(axis=1)), np.flatnonzero(used.any(axis=0))
        candidates["columns"] = {"weight": weight[np.ix_(rows, columns)]}
        if len(rows) < weight.shape[0]:
            candidates["columns"]["filters"] = _index(rows)
        if len(columns) < weight.shape[1]:
            candidates["columns"]["columns"] = _index(columns)
    candidates["sparse"] = {
        "values": weight[used],
        "indices": _index(np.nonzero(used)[1]),
        "offsets": _index(np.concatenate([[0], np.cumsum(used.sum(axis=1))])),
    }
    storage = min(candidates, key=lambda kind: sum(tensor.nbytes for tensor in candidates[kind].values()))
    return storage, candidates[storage]


def _index(index: Array) -> Array:
    return index.astype(np.uint16 if index.max(initial=0) < 2**16 else np.uint32)
