"""What the channel graph knows about operators: which move data, which work element by element, which mix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autocompress_fast.trace import Node, Ref

IntArray = npt.NDArray[np.int64]

__all__ = [
    "FACTORIES",
    "INDEXED",
    "LAYERS",
    "MOST_CONSTANT",
    "MOVES",
    "NOT_ZERO",
    "PADDING",
    "PLACES",
    "PRODUCTS",
    "REDUCTIONS",
    "SHAPED_LIKE",
    "SPATIAL",
    "UNCHANGED",
    "Geometry",
    "argument",
    "is_pointwise",
    "keeps_dims",
    "keeps_zero",
    "oriented",
    "overload",
    "reduced_dims",
]

LAYERS = frozenset(("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))))

MOST_CONSTANT = 2**16  # elements of a parameter that is followed when it is used outside of layers

UNCHANGED = frozenset(
    [
        "clone",
        "contiguous",
        "detach",
        "alias",
        "to",
        "_to_copy",
        "type_as",
        "lift_fresh_copy",
        "lift_fresh",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "identity",
        "float",
        "double",
        "half",
        "bfloat16",
        "positive",
        "resolve_conj",
        "requires_grad",
    ]
)
PADDING = frozenset(
    ("pad", "constant_pad_nd", *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)))
)
INDEXED = frozenset(("index_select", "index", "gather", "take_along_dim"))
MOVES = (
    UNCHANGED
    | PADDING
    | INDEXED
    | frozenset(
        [
            "view",
            "reshape",
            "_unsafe_view",
            "unsafe_view",
            "view_as",
            "reshape_as",
            "flatten",
            "unflatten",
            "permute",
            "transpose",
            "t",
            "numpy_T",
            "matrix_H",
            "mT",
            "movedim",
            "moveaxis",
            "swapaxes",
            "swapdims",
            "squeeze",
            "unsqueeze",
            "expand",
            "expand_as",
            "repeat",
            "tile",
            "repeat_interleave",
            "slice",
            "select",
            "narrow",
            "split",
            "split_with_sizes",
            "unsafe_split",
            "unsafe_split_with_sizes",
            "chunk",
            "unsafe_chunk",
            "unbind",
            "tensor_split",
            "hsplit",
            "vsplit",
            "dsplit",
            "cat",
            "concat",
            "concatenate",
            "stack",
            "hstack",
            "vstack",
            "dstack",
            "column_stack",
            "flip",
            "fliplr",
            "flipud",
            "roll",
            "rot90",
            "pixel_shuffle",
            "pixel_unshuffle",
            "channel_shuffle",
            "native_channel_shuffle",
            "unfold",
            "ravel",
            "broadcast_to",
            "diagonal",
        ]
    )
)
# Tensors made from nothing but a size: name -> position of the size among the arguments.
FACTORIES = {
    **dict.fromkeys("zeros ones empty full rand randn".split(), 0),
    **dict.fromkeys("new_zeros new_ones new_empty new_full".split(), 1),
}
SHAPED_LIKE = frozenset(("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"))
PLACES = frozenset(("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking"))

# Operators that treat every channel's positions by themselves: name -> number of spatial dimensions.
SPATIAL = {
    **{
        f"{kind}pool{n}d{more}": n
        for n in (1, 2, 3)
        for kind in ("max_", "avg_", "adaptive_avg_", "adaptive_max_", "lp_", "_adaptive_avg_", "fractional_max_")
        for more in ("", "_with_indices")
    },
    **{
        name: n
        for n, names in {
            1: "upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d",
            2: "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d grid_sampler_2d"
            " grid_sampler _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
            3: "upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d grid_sampler_3d",
        }.items()
        for name in names.split()
    },
}
# Reductions along dimensions: name -> number of results when there are several.
REDUCTIONS = {
    **dict.fromkeys(
        [
            "mean",
            "sum",
            "amax",
            "amin",
            "var",
            "std",
            "norm",
            "linalg_vector_norm",
            "logsumexp",
            "prod",
            "argmax",
            "argmin",
            "any",
            "all",
            "nansum",
            "count_nonzero",
        ],
        1,
    ),
    **dict.fromkeys(["max", "min", "var_mean", "std_mean", "median", "mode", "aminmax"], 2),
}
NOT_ZERO = frozenset(("logsumexp", "argmax", "argmin", "any", "all"))  # of zeros
PRODUCTS = frozenset(("mul", "multiply", "div", "divide", "true_divide"))

_POINTWISE = frozenset(
    [
        "relu6",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "selu",
        "celu",
        "elu",
        "silu",
        "mish",
        "gelu",
        "leaky_relu",
        "softplus",
        "softsign",
        "log_sigmoid",
        "logsigmoid",
        "glu_jvp",
        "tanhshrink",
        "softshrink",
        "hardshrink",
        "threshold",
        "rrelu",
        "square",
        "where",
        "maximum",
        "minimum",
        "max",
        "min",
        "clamp",
        "clip",
        "clamp_min",
        "clamp_max",
        "lerp",
        "addcmul",
        "addcdiv",
        "pow",
        "float_power",
        "nan_to_num",
        "masked_fill",
    ]
)
_ZERO_AT_ZERO = frozenset(
    [
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "hardswish",
        "mish",
        "tanh",
        "neg",
        "abs",
        "sqrt",
        "sign",
        "sgn",
        "square",
        "sin",
        "asin",
        "sinh",
        "asinh",
        "atan",
        "tan",
        "erf",
        "floor",
        "ceil",
        "round",
        "trunc",
        "expm1",
        "log1p",
        "softsign",
        "tanhshrink",
        "softshrink",
        "hardshrink",
        "mul",
        "multiply",
        "maximum",
        "minimum",
        "rrelu",
        "nan_to_num",
    ]
)


@dataclass(frozen=True)
class Geometry:
    """How a layer's weight lies: (P, C/groups, k...), or (C, P/groups, k...) of a transposed convolution.

    whole_groups: every group has one input channel, so that only whole groups can go.
    """

    filters: int
    inputs: int
    groups: int
    spatial: int
    transposed: bool

    @classmethod
    def of(cls, node: Node, shape: tuple[int, ...]) -> Geometry:
        """Of a node whose op is in `LAYERS`, with a weight of that shape."""
        if node.op == "linear":
            return cls(shape[0], shape[1], 1, 0, False)
        groups, transposed = int(node.args[6]), node.op.startswith("conv_transpose")
        rows, columns = shape[:2]
        filters, inputs = (columns * groups, rows) if transposed else (rows, columns * groups)
        return cls(filters, inputs, groups, len(shape) - 2, transposed)

    @property
    def whole_groups(self) -> bool:
        """Whether every group has one input channel."""
        return self.groups > 1 and self.inputs == self.groups

    @property
    def filter_dim(self) -> int:
        """Dimension of the weight along which the filters lie."""
        return 1 if self.transposed else 0

    @property
    def input_dim(self) -> int:
        """Dimension of the weight along which the input channels lie."""
        return 0 if self.transposed else 1

    def along(self, filters: IntArray, inputs: IntArray) -> dict[int, IntArray]:
        """Labels along the dimensions of the weight that are cut, from those of the filters and input channels.

        Groups are alike, so that the labels of the first stand for all; where whole groups go, the other dimension of
        the weight stays.
        """
        if self.whole_groups:
            return {0: inputs if self.transposed else filters}
        first = {self.filter_dim: filters, self.input_dim: inputs}
        shared = self.filter_dim if self.transposed else self.input_dim  # the dimension that all groups share
        first[shared] = first[shared][: first[shared].size // self.groups]
        return first


def oriented(weight: Any, groups: int, *, transposed: bool) -> Any:
    """A transposed convolution's weight (C, P / groups, ...) as (P, C / groups, ...), or back; any other as it is."""
    if not transposed:
        return weight
    rows, columns, *kernel = weight.shape
    parts = weight.reshape(groups, rows // groups, columns, *kernel)
    parts = parts.swapaxes(1, 2)
    return parts.reshape(groups * columns, rows // groups, *kernel)


def overload(node: Node) -> Any:
    """The torch operator that a node calls; of an in-place one, the one that is out of place where there is one."""
    import torch

    namespace, _, rest = node.target.partition(".")
    name, _, kind = rest.partition(".")
    packets = getattr(torch.ops, namespace)
    for candidate in (node.op, name):
        packet = getattr(packets, candidate, None)
        if packet is not None and kind in packet.overloads():
            return getattr(packet, kind)
    raise TypeError(f"{node.target} is no torch operator")


def argument(node: Node, name: str, default: Any = None) -> Any:
    """The value of an argument by its name in the operator's schema."""
    positional = [a for a in overload(node)._schema.arguments if not a.kwarg_only]
    for a, value in zip(positional, node.args, strict=False):
        if a.name == name:
            return value
    return node.kwargs.get(name, default)


def is_pointwise(node: Node) -> bool:
    """Whether every element of the result depends on the elements at that place (after broadcasting) alone."""
    import torch

    if node.op in _POINTWISE or node.op in SHAPED_LIKE:
        return True
    try:
        return torch.Tag.pointwise in overload(node).tags
    except TypeError:
        return False


def keeps_zero(node: Node) -> bool:
    """Whether the result is zero where all operands that are tensors are."""
    numbers = [x for x in node.args if isinstance(x, int | float) and not isinstance(x, bool)]
    tensors = sum(isinstance(x, Ref) for x in node.args)
    if node.op in ("add", "sub", "rsub", "subtract"):
        return tensors == 2 or len(node.operands) == 2 or not any(numbers[:1])
    if node.op in ("div", "divide", "true_divide"):
        return isinstance(node.args[0], Ref) and not isinstance(node.args[1], Ref)
    if node.op in ("hardtanh", "clamp", "clip"):
        low, high = (node.args[i] if len(node.args) > i else None for i in (1, 2))
        return (low is None or low <= 0) and (high is None or high >= 0)
    if node.op == "clamp_min":
        return bool(node.args[1] <= 0)
    if node.op == "pow":
        return isinstance(node.args[0], Ref) and bool(numbers) and numbers[0] > 0
    return node.op in _ZERO_AT_ZERO


def reduced_dims(node: Node, rank: int) -> list[int]:
    """The dimensions along which a reduction goes, counted from the front; all when it names none."""
    dims = argument(node, "dim")
    if dims is None or dims == ():
        return list(range(rank))
    return sorted({d % rank for d in (dims if isinstance(dims, tuple) else (dims,))})


def keeps_dims(node: Node) -> bool:
    """Whether a reduction leaves dimensions of size 1."""
    return bool(argument(node, "keepdim", False))
