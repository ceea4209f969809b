"""A network as a program of steps over numpy arrays, and the check that it can be run safely.

Values are numbered: the inputs first, then one for every step, in order. All shapes are those of one sample: the batch
dimension comes first in every value and no step touches it. `validate` checks a whole program before anything is
computed with it; what runs a program may rely on every rule stated here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

__all__ = [
    "ACTIVATIONS",
    "Input",
    "Program",
    "ProgramError",
    "Shape",
    "Step",
    "StepInfo",
    "UnsupportedError",
    "VerificationError",
    "frees",
    "is_narrow",
    "peak_live",
    "pool_output_size",
    "program_from_json",
    "program_to_json",
    "rounds_residual",
    "sparse_block",
    "validate",
]

Shape = tuple[int, ...]

ACTIVATIONS: Final = ("none", "relu", "relu6", "silu", "hardswish", "sigmoid", "hardsigmoid", "tanh", "gelu")
STORAGES: Final = ("dense", "columns", "sparse")

MAX_RANK: Final = 8
MAX_INT: Final = 2**31 - 1
MAX_FLOAT: Final = float(np.finfo(np.float32).max)
"""A float of Python: one of numpy cannot be compared with every integer."""
MAX_VALUE: Final = 2**26
"""Elements of one value of one sample (256 MiB of float32)."""
MAX_LIVE: Final = 2**28
"""Elements of one sample alive at once, paddings included (1 GiB of float32)."""
MAX_WEIGHT: Final = 2**28
"""Elements of one weight written out in full; values and indices stored are bounded by the file itself."""
MAX_VALUES: Final = 2**14
"""Inputs and steps: finding a place in memory for each takes time that grows with the square of their number."""

SPARSE_FILTER: Final = 256
"""Elements that the plan of one filter with columns of its own takes."""
FREE_PREPARED: Final = 2**24
"""Elements that weights may be unpacked to however few are stored; from there on, `SPARSE_FILTER` for each of them."""
FILTER_BLOCK: Final = 16
"""Filters are unpacked in blocks of so many."""
PIECE_COLUMNS: Final = 24
"""Columns are unpacked in pieces of more than so many, on the average."""
MATRICES_AT_ONCE: Final = 64
ROWS_AT_ONCE: Final = 32
"""Products of values are computed for so many matrices at once, and so many rows of each."""
MAX_STRIDE: Final = 2**28
"""Stride and dilation of a convolution."""
MAX_SIDE: Final = 2**16
"""Height or width of an image."""

NARROW_MOST: Final = 127
"""Of an 8-bit weight; -128 is not used, so that weights can change their sign."""
NARROW_COLUMNS: Final = 2**16
"""Columns of an 8-bit weight: sums of so many products of 255 and 127 stay below 2^31."""
MIN_SCALE: Final = 1e-30
MAX_SCALE: Final = 1e30
"""Scales of 8-bit steps, and products of two: neither they nor their inverses come near the ends of float32."""


class ProgramError(ValueError):
    """A program breaks a rule; the message says which step, what it holds and what is allowed."""


class UnsupportedError(ValueError):
    """A model uses operators that the engine does not have; the message lists all of them with their places."""


class VerificationError(RuntimeError):
    """The engine does not compute what the model computes."""


@dataclass(frozen=True)
class Input:
    """An input: its name and the shape of one sample. Always float32."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        op: a key of the table of operations (docs/acf-format.md lists them with their attributes).
        inputs: numbers of the values it reads.
        output: number of the value it makes.
        attributes: plain numbers, strings and tuples.
        tensors: role ("weight", "bias", "columns", ...) -> key of `Program.tensors`.
        name: where it comes from, for people: the path of the module.
    """

    op: str
    inputs: tuple[int, ...]
    output: int
    attributes: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Program:
    """Steps in execution order, with their tensors.

    Attributes:
        inputs: values 0 .. len(inputs) - 1.
        steps: step i makes value len(inputs) + i.
        outputs: numbers of the values returned.
        tensors: the weights, float32 or int8, and their indices, uint16 or uint32.
        batch: the only batch size the program holds for; None for every one.
    """

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    tensors: Mapping[str, np.ndarray[Any, Any]]
    batch: int | None = None


@dataclass(frozen=True)
class StepInfo:
    """What one step of a valid program makes and costs, for one sample.

    Attributes:
        shape: of the value it makes.
        storage: "dense", "columns" or "sparse" for a step with weights, else "".
        weights: weights stored, biases not counted.
        dense_weights: weights of the same layer written out in full.
        macs: multiply-accumulates: weights stored times the positions each is used at, and products of values.
        bytes: of all its tensors, indices and biases included.
        workspace: elements needed besides inputs and output while it runs: the padding around an image, or packed
            matrices.
        prepared: elements that the weight is unpacked to before it runs.
    """

    shape: Shape
    storage: str = ""
    weights: int = 0
    dense_weights: int = 0
    macs: int = 0
    bytes: int = 0
    workspace: int = 0
    prepared: int = 0


def validate(program: Program) -> tuple[StepInfo, ...]:
    """Check every number of `program` against every other; return what each step makes.

    Shapes, indices, offsets, sizes, value numbers, attributes and dtypes are checked; sizes are computed with Python's
    integers, which cannot overflow. After this the program can be run on any input of the declared shape.

    Raises:
        ProgramError: the first rule that is broken.
    """
    if not program.inputs:
        raise ProgramError("a program needs at least one input")
    count = len(program.inputs) + len(program.steps)
    if count > MAX_VALUES:
        raise ProgramError(f"a program has at most {MAX_VALUES} inputs and steps, not {count}")
    if program.batch is not None:
        _integer(program.batch, "batch", low=1)
    shapes: list[Shape] = []
    for i, given in enumerate(program.inputs):
        shapes.append(_shape(given.shape, f"shape of input {i} ({given.name!r})"))
    for name, tensor in program.tensors.items():
        if not isinstance(tensor, np.ndarray) or tensor.dtype not in (np.float32, np.int8, np.uint16, np.uint32):
            found = getattr(tensor, "dtype", type(tensor).__name__)
            raise ProgramError(f"tensor {name!r} must be float32, int8, uint16 or uint32, not {found}")
        if tensor.dtype == np.float32 and not np.isfinite(tensor).all():
            raise ProgramError(f"tensor {name!r} holds NaN or infinity")
    # Once each: a small file cannot have the same tensor unpacked, or checked, again and again.
    uses = Counter(name for step in program.steps for name in step.tensors.values())
    for name, count in uses.items():
        if count > 1:
            raise ProgramError(f"tensor {name!r:.80} is used by {count} steps; it must be by one")
    infos: list[StepInfo] = []
    for i, step in enumerate(program.steps):
        label = f"step {i} ({step.op!r} {step.name!r})"
        try:
            info = _check_step(step, shapes, program.tensors)
            _shape(info.shape, "shape of the result")
        except ProgramError as error:
            raise ProgramError(f"{label}: {error}") from None
        infos.append(info)
        shapes.append(info.shape)
    for name in program.tensors:
        if name not in uses:
            raise ProgramError(f"tensor {name!r:.80} is used by 0 steps; it must be by one")
    if not program.outputs:
        raise ProgramError("a program needs at least one output")
    for output in program.outputs:
        _integer(output, "output number", low=0, high=len(shapes) - 1)
    _check_residuals(program)
    prepared = sum(info.prepared for info in infos)
    stored = sum(tensor.size for tensor in program.tensors.values())
    # In proportion to the file: a small one cannot ask for a large allocation.
    most = max(2 * stored, min(MAX_WEIGHT, FREE_PREPARED + SPARSE_FILTER * stored))
    if prepared > most:
        raise ProgramError(f"the weights take {prepared} elements to run; at most {most} are allowed")
    live = peak_live(program, infos)
    if live > MAX_LIVE:
        raise ProgramError(f"one sample needs {live} elements at once; at most {MAX_LIVE} are allowed")
    returned = sum(math.prod(shapes[output]) for output in program.outputs)
    if returned > MAX_LIVE:
        raise ProgramError(f"the outputs of one sample have {returned} elements; at most {MAX_LIVE} are allowed")
    return tuple(infos)


def is_narrow(step: Step) -> bool:
    """Whether a step computes with 8-bit inputs and weights.

    >>> is_narrow(Step("linear", (0,), 1, {"filters": 2, "storage": "dense", "activation": "none"}))
    False
    """
    return "input_scale" in step.attributes


def rounds_residual(step: Step) -> bool:
    """Whether a step adds to the result of an 8-bit convolution what is rounded to 8 bits."""
    return "residual_scale" in step.attributes


def frees(program: Program) -> list[list[int]]:
    """For every step the values that nothing needs after it."""
    first = len(program.inputs)
    last = {value: max(value - first, 0) for value in range(first + len(program.steps))}
    for i, step in enumerate(program.steps):
        last.update((value, i) for value in step.inputs)
    dropped: list[list[int]] = [[] for _ in program.steps]
    outputs = set(program.outputs)
    for value, i in last.items():
        if value not in outputs and program.steps:
            dropped[i].append(value)
    return dropped


def peak_live(program: Program, infos: Sequence[StepInfo]) -> int:
    """Elements of one sample alive at the worst step: values still needed, its result and its work space."""
    sizes = [math.prod(given.shape) for given in program.inputs] + [math.prod(info.shape) for info in infos]
    live = peak = sum(sizes[: len(program.inputs)])
    for step, info, dropped in zip(program.steps, infos, frees(program), strict=True):
        live += sizes[step.output]
        peak = max(peak, live + info.workspace)
        live -= sum(sizes[value] for value in dropped)
    return peak


def pool_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """Windows along one axis; with `ceil` a last window may stick out, but must start inside the input or its padding.

    >>> pool_output_size(7, 2, 2, 0, 1, ceil=False), pool_output_size(7, 2, 2, 0, 1, ceil=True)
    (3, 4)
    """
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    windows = (room + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (windows - 1) * stride >= size + padding:
        windows -= 1
    return windows


# --- checks of single things -----------------------------------------------------------------------------------------


def _integer(value: object, what: str, low: int = 0, high: int = MAX_INT) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ProgramError(f"{what} must be an integer from {low} to {high}, not {value!r:.80}")
    return value


def _integers(
    value: object, what: str, low: int = 0, length: int | None = None, high: int = MAX_INT
) -> tuple[int, ...]:
    if not isinstance(value, tuple) or (len(value) > MAX_RANK if length is None else len(value) != length):
        count = f"at most {MAX_RANK}" if length is None else str(length)
        raise ProgramError(f"{what} must be a tuple of {count} integers, not {value!r:.80}")
    for item in value:
        _integer(item, what, low, high)
    return value


def _shape(value: object, what: str) -> Shape:
    """Check the shape of one sample: no empty dimension, and small enough to be computed with."""
    shape = _integers(value, what, low=1)
    if math.prod(shape) > MAX_VALUE:
        raise ProgramError(f"{what} is {shape}, {math.prod(shape)} elements; at most {MAX_VALUE} are allowed")
    return shape


def _number(value: object, what: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_FLOAT:
        raise ProgramError(f"{what} must be a finite float32, not {value!r:.80}")
    return float(value)


def _scale(value: object, what: str) -> object:
    if type(value) is not float or not MIN_SCALE <= value <= MAX_SCALE:
        raise ProgramError(f"{what} must be a float from {MIN_SCALE:g} to {MAX_SCALE:g}, not {value!r:.80}")
    return value


def _one_of(*allowed: object) -> Check:
    def check(value: object, what: str) -> object:
        if not any(type(value) is type(item) and value == item for item in allowed):
            raise ProgramError(f"{what} must be one of {', '.join(map(repr, allowed))}, not {value!r:.80}")
        return value

    return check


def _pair(low: int, high: int = MAX_INT) -> Check:
    return lambda value, what: _integers(value, what, low, length=2, high=high)


def _four(value: object, what: str) -> object:
    return _integers(value, what, length=4)


def _positive(value: object, what: str) -> object:
    return _integer(value, what, low=1)


def _byte(value: object, what: str) -> object:
    return _integer(value, what, high=255)


Check = Callable[[object, str], object]
Tensors = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class _Call:
    """A step whose attributes have been checked one by one, with what it is given."""

    attributes: Mapping[str, Any]
    shapes: list[Shape]
    tensors: Tensors

    @property
    def input(self) -> Shape:
        return self.shapes[0]


@dataclass(frozen=True)
class _Operation:
    inputs: tuple[int, int]  # fewest, most
    attributes: Mapping[str, Check]
    roles: tuple[str, ...]  # of the tensors it may have
    infer: Callable[[_Call], StepInfo]
    together: Mapping[str, Check] = field(default_factory=dict)  # attributes of which it has all or none


def _check_step(step: Step, shapes: list[Shape], tensors: Tensors) -> StepInfo:
    operation = _OPERATIONS.get(step.op) if isinstance(step.op, str) else None
    if operation is None:
        raise ProgramError(f"unknown operation; known are {', '.join(_OPERATIONS)}")
    low, high = operation.inputs
    if not low <= len(step.inputs) <= high:
        raise ProgramError(f"takes {low} to {high} inputs, not {len(step.inputs)}")
    for value in step.inputs:
        if type(value) is not int or not 0 <= value < len(shapes):
            raise ProgramError(f"input {value!r:.80} is not a value made before it (0 to {len(shapes) - 1})")
    if type(step.output) is not int or step.output != len(shapes):
        raise ProgramError(f"its output must be value {len(shapes)}, not {step.output!r:.80}")
    known = dict(operation.attributes)
    if operation.together.keys() & step.attributes.keys():
        known.update(operation.together)
    missing, unknown = known.keys() - step.attributes, step.attributes.keys() - known
    if missing or unknown:
        raise ProgramError(f"attribute {min(missing or unknown)!r} is {'missing' if missing else 'unknown'}")
    for name, check in known.items():
        check(step.attributes[name], name)
    own: dict[str, np.ndarray[Any, Any]] = {}
    for role, name in step.tensors.items():
        if role not in operation.roles:
            raise ProgramError(f"takes no tensor {role!r}")
        if name not in tensors:
            raise ProgramError(f"its {role} {name!r:.80} is not in the file")
        own[role] = tensors[name]
        _check_role(role, own[role])
    info = operation.infer(_Call(step.attributes, [shapes[value] for value in step.inputs], own))
    return replace(info, bytes=sum(tensor.nbytes for tensor in own.values()))


def _check_residuals(program: Program) -> None:
    """A rounded residual is added to an 8-bit convolution whose result nothing else reads: one operation does both."""
    first = len(program.inputs)
    readers = Counter(value for step in program.steps for value in step.inputs)
    readers.update(program.outputs)
    for i, step in enumerate(program.steps):
        if not rounds_residual(step):
            continue
        value = step.inputs[0]
        conv = program.steps[value - first] if value >= first else None
        if conv is None or conv.op != "conv" or not is_narrow(conv) or conv.attributes["activation"] != "none":
            wrong = "must be made by an 8-bit conv step without activation"
        elif readers[value] > 1:
            wrong = f"is read {readers[value]} times; it must be once"
        else:
            continue
        raise ProgramError(f"step {i} ({step.op!r} {step.name!r}): with residual_scale, its first input {wrong}")


_INDEX_ROLES = ("filters", "columns", "indices", "offsets")


def _check_role(role: str, tensor: np.ndarray[Any, Any]) -> None:
    allowed = ("uint16", "uint32") if role in _INDEX_ROLES else ("float32",)
    if role == "weight":
        allowed = ("float32", "int8")
    if tensor.dtype.name not in allowed:
        raise ProgramError(f"{role} must be {' or '.join(allowed)}, not {tensor.dtype}")
    ranks = {"weight": 2, "constant": None}
    if ranks.get(role, 1) not in (None, tensor.ndim):
        raise ProgramError(f"{role} must have {ranks.get(role, 1)} dimensions, not shape {tensor.shape}")


def _rising(index: np.ndarray[Any, Any], below: int, what: str) -> None:
    if index.size and (int(index[-1]) >= below or bool((index[1:] <= index[:-1]).any())):
        raise ProgramError(f"{what} must rise strictly and stay below {below}")


# --- what each operation makes ---------------------------------------------------------------------------------------


def sparse_block(
    indices: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], bool]:
    """Rows and columns of a sparse matrix that hold anything, and whether that block is better run as a dense one.

    Gathering, multiplying and adding element by element takes 50 to 500 times as long for each weight as BLAS does. The
    limit of 64 also keeps the block in proportion to what is stored: a small file cannot ask for a large allocation.
    """
    rows, columns = np.flatnonzero(np.diff(offsets.astype(np.int64))), np.unique(indices)
    return rows, columns, len(rows) * len(columns) <= 64 * len(indices)


def _weights(call: _Call, columns: int) -> StepInfo:
    """Check the matrix (filters x columns) of a step as it is stored. `shape` is left empty, `macs` is per position."""
    filters, storage, narrow = call.attributes["filters"], call.attributes["storage"], "input_scale" in call.attributes
    needed, optional = {
        "dense": ({"weight"}, {"bias"}),
        "columns": ({"weight"}, {"bias", "filters", "columns"}),
        "sparse": ({"values", "indices", "offsets"}, {"bias"}),
    }[storage]
    if narrow:
        if storage == "sparse":
            raise ProgramError("8-bit weights cannot have sparse storage")
        needed = needed | {"scales"}
    if needed - call.tensors.keys() or call.tensors.keys() - needed - optional:
        found = ", ".join(sorted(call.tensors)) or "none"
        raise ProgramError(f"{storage} storage takes the tensors {', '.join(sorted(needed | optional))}; found {found}")
    if filters * columns > MAX_WEIGHT:
        raise ProgramError(f"a weight of {filters} x {columns} elements is too large; at most {MAX_WEIGHT} are allowed")
    if "bias" in call.tensors and call.tensors["bias"].shape != (filters,):
        raise ProgramError(f"bias must have shape {(filters,)}, not {call.tensors['bias'].shape}")
    if storage == "sparse":
        values, indices, offsets = call.tensors["values"], call.tensors["indices"], call.tensors["offsets"]
        _check_sparse(values, indices, offsets, filters, columns)
        _, block_columns, dense = sparse_block(indices, offsets)
        if dense and call.attributes.get("groups", 1) == 1:
            prepared = _prepared(call, len(block_columns))
        else:
            prepared = len(values) + SPARSE_FILTER * filters + _kernel_rows(call, filters, len(values))
        return StepInfo((), storage, len(values), filters * columns, len(values), prepared=prepared)
    stored = call.tensors["filters"].size if "filters" in call.tensors else filters
    used = call.tensors["columns"].size if "columns" in call.tensors else columns
    if call.tensors["weight"].shape != (stored, used):
        raise ProgramError(f"weight must have shape {(stored, used)}, not {call.tensors['weight'].shape}")
    if "filters" in call.tensors:
        _rising(call.tensors["filters"], filters, "filters")
    if "columns" in call.tensors:
        _rising(call.tensors["columns"], columns, "columns")
    if narrow:
        _check_narrow(call, stored, used)
    elif call.tensors["weight"].dtype != np.float32:
        raise ProgramError(f"a weight of {call.tensors['weight'].dtype} needs input_scale, input_zero and scales")
    return StepInfo((), storage, stored * used, filters * columns, stored * used, prepared=_prepared(call, used))


def _check_narrow(call: _Call, stored: int, used: int) -> None:
    weight, scales = call.tensors["weight"], call.tensors["scales"]
    if weight.dtype != np.int8:
        raise ProgramError(f"the weight of a step with input_scale must be int8, not {weight.dtype}")
    if weight.size and int(weight.min()) < -NARROW_MOST:
        raise ProgramError(f"8-bit weights must be from {-NARROW_MOST} to {NARROW_MOST}, not {int(weight.min())}")
    if used > NARROW_COLUMNS:
        raise ProgramError(f"an 8-bit weight has at most {NARROW_COLUMNS} columns, not {used}")
    if scales.shape != (stored,):
        raise ProgramError(f"scales must have shape {(stored,)}, not {scales.shape}")
    with np.errstate(over="ignore", under="ignore"):
        products = scales * np.float32(call.attributes["input_scale"])
    for values, what in ((scales, "scales"), (products, "scales times input_scale")):
        outside = ~((values >= MIN_SCALE) & (values <= MAX_SCALE))
        if outside.any():
            found = values[outside][0]
            raise ProgramError(f"{what} must be from {MIN_SCALE:g} to {MAX_SCALE:g}, not {found:g}")


def _prepared(call: _Call, columns: int) -> int:
    """Elements of a weight with so many columns, and its bias; a group's filters are filled up to whole registers."""
    filters: int = call.attributes["filters"]
    groups: int = call.attributes.get("groups", 1)
    padded = groups * -(-filters // (groups * FILTER_BLOCK)) * FILTER_BLOCK
    return padded * (columns + 1) + _kernel_rows(call, groups, groups * columns)


def _kernel_rows(call: _Call, parts: int, columns: int) -> int:
    """Numbers of columns with which the kernel's rows begin, in every piece of every part of a weight."""
    height: int = call.attributes.get("kernel", (1, 1))[0]
    return (parts + columns // PIECE_COLUMNS) * (height + 1)


def _check_sparse(
    values: np.ndarray[Any, Any], indices: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any], rows: int, columns: int
) -> None:
    if indices.shape != values.shape or offsets.shape != (rows + 1,):
        shapes = f"{values.shape}, {indices.shape} and {offsets.shape}"
        raise ProgramError(f"values, indices, offsets must have shapes (n,), (n,) and {(rows + 1,)}, not {shapes}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(values) or bool((offsets[1:] < offsets[:-1]).any()):
        raise ProgramError(f"offsets must rise from 0 to the number of values, {len(values)}")
    if len(indices) and int(indices.max()) >= columns:
        raise ProgramError(f"indices must stay below {columns}, not {int(indices.max())}")
    starts = np.zeros(len(indices) + 1, bool)
    starts[offsets] = True
    if bool(((indices[1:] <= indices[:-1]) & ~starts[1:-1]).any()):
        raise ProgramError("indices must rise strictly within every filter")


def _infer_conv(call: _Call) -> StepInfo:
    channels, height, width = _image(call.input)
    a = call.attributes
    filters, groups = a["filters"], a["groups"]
    if channels % groups or filters % groups:
        raise ProgramError(f"groups must divide {channels} channels and {filters} filters, not {groups}")
    if groups > 1 and a["storage"] == "columns":
        raise ProgramError("a grouped convolution cannot be stored as columns")
    top, bottom, left, right = a["padding"]
    size = tuple(
        (n - d * (k - 1) - 1) // s + 1 if n >= d * (k - 1) + 1 else 0
        for n, k, s, d in zip(
            (height + top + bottom, width + left + right), a["kernel"], a["stride"], a["dilation"], strict=True
        )
    )
    if min(size) < 1:
        raise ProgramError(f"kernel {a['kernel']} does not fit into the input {call.input} with padding {a['padding']}")
    matrix = _weights(call, channels // groups * math.prod(a["kernel"]))
    positions = math.prod(size)
    padded = channels * (height + top + bottom) * (width + left + right)
    return replace(matrix, shape=(filters, *size), macs=matrix.macs * positions, workspace=padded)


def _infer_linear(call: _Call) -> StepInfo:
    if not call.input:
        raise ProgramError("takes at least one dimension besides the batch")
    matrix = _weights(call, call.input[-1])
    rows = math.prod(call.input[:-1])
    shape = (*call.input[:-1], call.attributes["filters"])
    return replace(matrix, shape=shape, macs=matrix.macs * rows)


def _infer_pool(call: _Call) -> StepInfo:
    channels, *sizes = _image(call.input)
    a = call.attributes
    dilations = a.get("dilation", (1, 1))
    rest = zip(sizes, a["kernel"], a["stride"], a["padding"], dilations, strict=True)
    if any(2 * p > k for k, p in zip(a["kernel"], a["padding"], strict=True)):
        raise ProgramError(f"padding must be at most half of kernel {a['kernel']}, not {a['padding']}")
    out = tuple(pool_output_size(n, k, s, p, d, a["ceil"]) for n, k, s, p, d in rest)
    if min(out) < 1:
        raise ProgramError(f"kernel {a['kernel']} does not fit into the input {call.input}")
    return StepInfo((channels, *out))


def _infer_adaptive_pool(call: _Call) -> StepInfo:
    channels, _, _ = _image(call.input)
    made = call.attributes["output"]
    return StepInfo((channels, *made))


def _infer_global_pool(call: _Call) -> StepInfo:
    return StepInfo((_image(call.input)[0], 1, 1))


def _infer_binary(call: _Call) -> StepInfo:
    if (len(call.shapes) == 2) == ("constant" in call.tensors):
        raise ProgramError("takes two inputs, or one and a constant")
    other = call.tensors["constant"].shape if "constant" in call.tensors else call.shapes[1]
    if "residual_scale" in call.attributes and (len(call.shapes) < 2 or other != call.input):
        raise ProgramError("with residual_scale, it takes two inputs of one shape")
    if len(other) > len(call.input) or ("constant" not in call.tensors and len(other) != len(call.input)):
        raise ProgramError(f"{call.input} and {other} do not match in rank")
    try:
        return StepInfo(np.broadcast_shapes(call.input, other))
    except ValueError:
        raise ProgramError(f"{call.input} and {other} cannot be broadcast") from None


def _infer_same(call: _Call) -> StepInfo:
    if "axis" in call.attributes:
        _integer(call.attributes["axis"], "axis", high=len(call.input) - 1)
    if call.attributes.get("low", 0) > call.attributes.get("high", math.inf):
        raise ProgramError(f"low {call.attributes['low']} is above high {call.attributes['high']}")
    return StepInfo(call.input)


def _infer_layer_norm(call: _Call) -> StepInfo:
    dims = _integer(call.attributes["dims"], "dims", low=1, high=len(call.input))
    if not call.attributes["epsilon"] > 0:
        raise ProgramError(f"epsilon must be above 0, not {call.attributes['epsilon']!r}")
    size = math.prod(call.input[len(call.input) - dims :])
    for role, tensor in call.tensors.items():
        if tensor.shape != (size,):
            raise ProgramError(f"{role} must have shape {(size,)}, not {tensor.shape}")
    return StepInfo(call.input)


def _infer_matmul(call: _Call) -> StepInfo:
    (rows, depth), (inner, columns) = _matrices(call)
    if depth != inner:
        raise ProgramError(f"matrices of {call.shapes[0]} and {call.shapes[1]} cannot be multiplied")
    count = math.prod(call.input[:-2])
    workspace = min(count, MATRICES_AT_ONCE) * _product_room(depth, columns)
    shape = (*call.input[:-1], columns)
    return StepInfo(shape, macs=count * rows * depth * columns, workspace=workspace)


def _infer_attention(call: _Call) -> StepInfo:
    (queries, width), (keys, inner), (values, columns) = _matrices(call)
    if width != inner or keys != values:
        raise ProgramError(f"queries {call.shapes[0]}, keys {call.shapes[1]} and values {call.shapes[2]} do not match")
    count = math.prod(call.input[:-2])
    workspace = min(count, MATRICES_AT_ONCE) * (_product_room(width, keys) + _product_room(keys, columns))
    macs = count * queries * keys * (width + columns)
    return StepInfo((*call.input[:-1], columns), macs=macs, workspace=workspace)


def _matrices(call: _Call) -> list[tuple[int, int]]:
    """Rows and columns of the inputs: of each as many matrices, in the same order."""
    if len(call.input) < 2 or any(
        shape[:-2] != call.input[:-2] or len(shape) != len(call.input) for shape in call.shapes
    ):
        raise ProgramError(f"takes as many matrices from every input, not {', '.join(map(str, call.shapes))}")
    return [(shape[-2], shape[-1]) for shape in call.shapes]


def _product_room(depth: int, columns: int) -> int:
    """Elements for a matrix (depth, columns) as it is multiplied by, and for some rows of the product."""
    return (depth + ROWS_AT_ONCE) * -(-columns // FILTER_BLOCK) * FILTER_BLOCK


def _infer_reshape(call: _Call) -> StepInfo:
    shape = call.attributes["shape"]
    if math.prod(shape) != math.prod(call.input):
        raise ProgramError(f"{call.input} cannot be reshaped to {shape}")
    return StepInfo(shape)


def _infer_transpose(call: _Call) -> StepInfo:
    order = call.attributes["order"]
    if sorted(order) != list(range(len(call.input))):
        raise ProgramError(f"order must hold every axis of {call.input} once, not {order}")
    return StepInfo(tuple(call.input[axis] for axis in order))


def _infer_mean(call: _Call) -> StepInfo:
    axes, keep = call.attributes["axes"], call.attributes["keep"]
    if not axes or len(set(axes)) != len(axes) or max(axes) >= len(call.input):
        raise ProgramError(f"axes must be different axes of {call.input}, not {axes}")
    kept = (1 if axis in axes else n for axis, n in enumerate(call.input) if keep or axis not in axes)
    return StepInfo(tuple(kept))


def _infer_concat(call: _Call) -> StepInfo:
    axis = _integer(call.attributes["axis"], "axis", high=len(call.input) - 1)
    rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in call.shapes}
    if len(rest) != 1 or len({len(shape) for shape in call.shapes}) != 1:
        raise ProgramError(f"{call.shapes} differ besides axis {axis}")
    return StepInfo((*call.input[:axis], sum(shape[axis] for shape in call.shapes), *call.input[axis + 1 :]))


def _infer_pad(call: _Call) -> StepInfo:
    before, after = call.attributes["before"], call.attributes["after"]
    if not len(before) == len(after) == len(call.input):
        raise ProgramError(f"before and after must hold one number for every axis of {call.input}")
    return StepInfo(tuple(n + b + e for n, b, e in zip(call.input, before, after, strict=True)))


def _infer_slice(call: _Call) -> StepInfo:
    axis = _integer(call.attributes["axis"], "axis", high=len(call.input) - 1)
    start, stop = call.attributes["start"], call.attributes["stop"]
    if not start < stop <= call.input[axis]:
        raise ProgramError(f"start {start} and stop {stop} must rise within the {call.input[axis]} of axis {axis}")
    taken = len(range(start, stop, call.attributes["step"]))
    return StepInfo((*call.input[:axis], taken, *call.input[axis + 1 :]))


def _infer_take(call: _Call) -> StepInfo:
    axis = _integer(call.attributes["axis"], "axis", high=len(call.input) - 1)
    if (
        "indices" not in call.tensors
        or not call.tensors["indices"].size
        or int(call.tensors["indices"].max()) >= call.input[axis]
    ):
        raise ProgramError(f"needs indices, at least one, all below {call.input[axis]}")
    return StepInfo((*call.input[:axis], call.tensors["indices"].size, *call.input[axis + 1 :]))


def _image(shape: Shape) -> Shape:
    if len(shape) != 3:
        raise ProgramError(f"takes (channels, height, width), not {shape}")
    if max(shape[1:]) > MAX_SIDE:
        raise ProgramError(f"takes images of at most {MAX_SIDE} x {MAX_SIDE}, not {shape}")
    return shape


_ACTIVATION = {"activation": _one_of(*ACTIVATIONS)}
_MATRIX: dict[str, Check] = {"filters": _positive, "storage": _one_of(*STORAGES), **_ACTIVATION}
_CONV: dict[str, Check] = {
    "kernel": _pair(1), "stride": _pair(1, MAX_STRIDE), "padding": _four, "dilation": _pair(1, MAX_STRIDE),
    "groups": _positive, **_MATRIX,
}  # fmt: skip
_POOL: dict[str, Check] = {"kernel": _pair(1), "stride": _pair(1), "padding": _pair(0), "ceil": _one_of(False, True)}
_AXIS: dict[str, Check] = {"axis": _integer}
_STORED = ("weight", "bias", "filters", "columns", "values", "indices", "offsets", "scales")
_NARROW: dict[str, Check] = {"input_scale": _scale, "input_zero": _byte}
_RESIDUAL: dict[str, Check] = {"residual_scale": _scale, "residual_zero": _byte}

_OPERATIONS: Final[dict[str, _Operation]] = {
    "conv": _Operation((1, 1), _CONV, _STORED, _infer_conv, _NARROW),
    "linear": _Operation((1, 1), _MATRIX, _STORED, _infer_linear, _NARROW),
    "max_pool": _Operation((1, 1), {**_POOL, "dilation": _pair(1)}, (), _infer_pool),
    "avg_pool": _Operation((1, 1), {**_POOL, "count_padding": _one_of(False, True)}, (), _infer_pool),
    "adaptive_avg_pool": _Operation((1, 1), {"output": _pair(1)}, (), _infer_adaptive_pool),
    "global_avg_pool": _Operation((1, 1), {}, (), _infer_global_pool),
    "add": _Operation((1, 2), _ACTIVATION, ("constant",), _infer_binary, _RESIDUAL),
    "sub": _Operation((1, 2), _ACTIVATION, ("constant",), _infer_binary),
    "mul": _Operation((1, 2), _ACTIVATION, ("constant",), _infer_binary),
    "div": _Operation((1, 2), _ACTIVATION, ("constant",), _infer_binary),
    "activation": _Operation((1, 1), _ACTIVATION, (), _infer_same),
    "leaky_relu": _Operation((1, 1), {"slope": _number}, (), _infer_same),
    "clip": _Operation((1, 1), {"low": _number, "high": _number}, (), _infer_same),
    "softmax": _Operation((1, 1), _AXIS, (), _infer_same),
    "log_softmax": _Operation((1, 1), _AXIS, (), _infer_same),
    "layer_norm": _Operation((1, 1), {"dims": _positive, "epsilon": _number}, ("scale", "shift"), _infer_layer_norm),
    "matmul": _Operation((2, 2), {}, (), _infer_matmul),
    "attention": _Operation((3, 3), {"scale": _number}, (), _infer_attention),
    "mean": _Operation((1, 1), {"axes": _integers, "keep": _one_of(False, True)}, (), _infer_mean),
    "norm": _Operation((1, 1), {"axes": _integers, "keep": _one_of(False, True)}, (), _infer_mean),
    "concat": _Operation((1, 4096), _AXIS, (), _infer_concat),
    "reshape": _Operation((1, 1), {"shape": _shape}, (), _infer_reshape),
    "transpose": _Operation((1, 1), {"order": _integers}, (), _infer_transpose),
    "pad": _Operation((1, 1), {"before": _integers, "after": _integers, "value": _number}, (), _infer_pad),
    "slice": _Operation((1, 1), {**_AXIS, "start": _integer, "stop": _integer, "step": _positive}, (), _infer_slice),
    "take": _Operation((1, 1), _AXIS, ("indices",), _infer_take),
}


# --- JSON ------------------------------------------------------------------------------------------------------------


def program_to_json(program: Program) -> dict[str, Any]:
    """Everything but the tensors, as JSON values."""
    return {
        "batch": program.batch,
        "inputs": [{"name": given.name, "shape": list(given.shape)} for given in program.inputs],
        "steps": [
            {
                "op": step.op,
                "name": step.name,
                "inputs": list(step.inputs),
                "output": step.output,
                "attributes": dict(step.attributes),
                "tensors": dict(step.tensors),
            }
            for step in program.steps
        ],
        "outputs": list(program.outputs),
    }


def program_from_json(value: object, tensors: Tensors) -> Program:
    """Read what `program_to_json` wrote; the types of all fields are checked here, their values by `validate`.

    Raises:
        ProgramError: a field is missing, unknown or of the wrong type.
    """
    top = _fields(value, "program", {"batch": (int, None), "inputs": (list,), "steps": (list,), "outputs": (list,)})
    inputs, steps = [], []
    for i, item in enumerate(top["inputs"]):
        given = _fields(item, f"input {i}", {"name": (str,), "shape": (list,)})
        inputs.append(Input(given["name"], tuple(given["shape"])))
    kinds: dict[str, tuple[type | None, ...]] = {
        "op": (str,), "name": (str,), "inputs": (list,), "output": (int,), "attributes": (dict,), "tensors": (dict,)
    }  # fmt: skip
    for i, item in enumerate(top["steps"]):
        step = _fields(item, f"step {i}", kinds)
        if not all(isinstance(name, str) for name in step["tensors"].values()):
            raise ProgramError(f"step {i}: tensors must map roles to names, not {step['tensors']!r:.80}")
        attributes = {k: tuple(v) if isinstance(v, list) else v for k, v in step["attributes"].items()}
        named = (step["op"], tuple(step["inputs"]), step["output"], attributes, step["tensors"], step["name"])
        steps.append(Step(*named))
    return Program(tuple(inputs), tuple(steps), tuple(top["outputs"]), tensors, top["batch"])


def _fields(value: object, what: str, kinds: Mapping[str, tuple[type | None, ...]]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        found = sorted(value) if isinstance(value, dict) else value
        raise ProgramError(f"{what} must have the fields {', '.join(kinds)}, not {found!r:.80}")
    for name, allowed in kinds.items():
        if (None if value[name] is None else type(value[name])) not in allowed:
            raise ProgramError(f"{name} of {what} must not be {value[name]!r:.80}")
    return value
