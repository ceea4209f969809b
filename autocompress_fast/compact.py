"""Compaction: the masked network made physically small, computing the same.

Dropped filters are cut out of their layer, of the normalisation behind it and of the layer that reads them. A layer
that keeps only some of its columns becomes a `ColumnConv2d` or `ColumnLinear`: the weights that are left, their index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from autocompress_fast._baked import baked, computed, copied
from autocompress_fast.graph import Layer, Report, inspect
from autocompress_fast.graph.rebuild import as_graph
from autocompress_fast.plan import LayerPlan, Plan, apply_masks, mask
from autocompress_fast.trace import check_unwrapped
from autocompress_fast.unused import check_something_left, kept_labels, read_labels, settled, whole

if TYPE_CHECKING:
    import numpy.typing as npt

    IntArray = npt.NDArray[np.intp]

__all__ = ["ColumnConv2d", "ColumnLinear", "Compacted", "EmptyLayer", "Kept", "compact", "restore"]

_FLOAT32_TOLERANCE, _FLOAT64_TOLERANCE = 1e-4, 1e-10  # relative to the largest output


class ColumnConv2d(nn.Module):
    """A convolution of which only some columns (c, kh, kw) are left; trainable, plain torch.

    Args:
        weight: (P, columns left), the compact weight.
        index: (columns left,), where they lie in C * KH * KW.
        bias: (P,) or None.
        channels, kernel_size, stride, padding, dilation: of the convolution it stands for.

    Raises:
        ValueError: shapes that do not fit together, an index that does not rise or leaves the columns there are.

    Example:
        >>> index = torch.tensor([4, 13])  # the middle of the kernel, in both channels
        >>> conv = ColumnConv2d(torch.ones(1, 2), index, None, channels=2, kernel_size=(3, 3), padding=(1, 1))
        >>> conv(torch.ones(1, 2, 2, 2)).tolist()
        [[[[2.0, 2.0], [2.0, 2.0]]]]
    """

    stands_for_a_layer = True

    index: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        index: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        width = channels * kernel_size[0] * kernel_size[1]
        _check_columns(weight, index, bias, width)
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("index", index)
        self.channels, self.kernel_size = channels, kernel_size
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def dense_weight(self) -> torch.Tensor:
        """The weight with zeros in the dropped columns, (P, C, KH, KW)."""
        filters = self.weight.shape[0]
        width = self.channels * self.kernel_size[0] * self.kernel_size[1]
        dense = self.weight.new_zeros(filters, width).index_copy(1, self.index, self.weight)
        return dense.reshape(filters, self.channels, *self.kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, P, H', W')."""
        return F.conv2d(x, self.dense_weight(), self.bias, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        width = self.channels * self.kernel_size[0] * self.kernel_size[1]
        return f"{self.channels} -> {self.weight.shape[0]}, {self.kernel_size}, {len(self.index)} of {width} columns"


class ColumnLinear(nn.Module):
    """A linear layer that reads only some of its inputs; trainable, plain torch.

    Args:
        weight: (P, inputs left).
        index: (inputs left,), which.
        bias: (P,) or None.
        features: number of all inputs.

    Raises:
        ValueError: shapes that do not fit together, an index that does not rise or leaves the inputs there are.

    Example:
        >>> layer = ColumnLinear(torch.ones(1, 2), torch.tensor([0, 2]), None, features=3)
        >>> layer(torch.tensor([[1.0, 10.0, 100.0]])).tolist()
        [[101.0]]
    """

    stands_for_a_layer = True

    index: torch.Tensor

    def __init__(self, weight: torch.Tensor, index: torch.Tensor, bias: torch.Tensor | None, *, features: int) -> None:
        super().__init__()
        _check_columns(weight, index, bias, features)
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("index", index)
        self.features = features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., features) -> (..., P)."""
        return F.linear(x.index_select(-1, self.index), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"{self.features} -> {self.weight.shape[0]}, {len(self.index)} inputs read"


class EmptyLayer(nn.Module):
    """What is left of a convolution or linear layer without weights: its bias, or zeros, at every position.

    Args:
        layer: the layer; its bias and sizes are taken over.

    Example:
        >>> EmptyLayer(nn.Conv2d(4, 2, 3, stride=2, bias=False))(torch.ones(1, 4, 9, 7)).shape
        torch.Size([1, 2, 4, 3])
    """

    stands_for_a_layer = True

    value: torch.Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear = isinstance(layer, nn.Linear)
        weight, bias = _tensor(layer, "weight"), getattr(layer, "bias", None)
        if self.linear:
            self.dims = 0
            filters = weight.shape[0]
        else:
            assert isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED))
            self.dims, filters = len(layer.kernel_size), layer.out_channels
            self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
            self.same = layer.padding == "same"
            self.padding = (0,) * self.dims if isinstance(layer.padding, str) else tuple(layer.padding)
            self.output_padding = tuple(layer.output_padding) if isinstance(layer, _TRANSPOSED) else None
        if bias is None:
            self.register_buffer("value", weight.new_zeros(filters), persistent=False)
        else:
            self.value = nn.Parameter(bias.detach().clone(), bias.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, P, ...), what the layer would put out for `x`."""
        if self.linear:  # a copy: operators in place may follow
            return self.value.expand(*x.shape[:-1], self.value.shape[0]).clone()
        first = x.dim() - self.dims
        sizes = [self._size(dim, x.shape[first + dim]) for dim in range(self.dims)]
        value = self.value.reshape(-1, *[1] * self.dims)
        return value.expand(*x.shape[: first - 1], self.value.shape[0], *sizes).clone()

    def _size(self, dim: int, size: int) -> int:
        """Of the output along a dimension in which the input has this size."""
        reach = self.dilation[dim] * (self.kernel_size[dim] - 1)
        if self.output_padding is not None:
            return (size - 1) * self.stride[dim] - 2 * self.padding[dim] + reach + self.output_padding[dim] + 1
        return size if self.same else (size + 2 * self.padding[dim] - reach - 1) // self.stride[dim] + 1

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"filters={self.value.shape[0]}"


@dataclass(frozen=True)
class Kept:
    """Which filters and columns of a layer's weight before compaction its weight after it holds, in order."""

    filters: IntArray
    columns: IntArray

    def then(self, inner: Kept) -> Kept:
        """What is left of the first weight after a second compaction that kept `inner`."""
        return Kept(self.filters[inner.filters], self.columns[inner.columns])


@dataclass(frozen=True)
class Compacted:
    """A physically smaller network.

    Attributes:
        model: a smaller copy.
        plan: what is kept of the smaller layers (columns or single weights that are masked in them, if any); layers of
            which nothing is left (`EmptyLayer`) are not in it.
        kept: per layer, where the weights of the smaller model were.
        max_difference: largest difference of any output to the masked model's, which is computed in float64 where it
            can be, relative to the largest output.
        kind: "module", the user's own class with smaller layers in it; or "graph", a `torch.fx.GraphModule` of the same
            layers, where the Python code has sizes of its own in the way.
        reason: why it is a graph; empty when it is not.
        baked: modules of which a computed weight has become a plain one; the model is trained further without what
            computed it.
    """

    model: nn.Module
    plan: Plan
    kept: dict[str, Kept]
    max_difference: float
    kind: str = "module"
    reason: str = ""
    baked: tuple[str, ...] = ()


def restore(plan: Plan, kept: Mapping[str, Kept], report: Report) -> Plan:
    """The plan of a compacted model as one for the model before, whose layers `report` has.

    Args:
        plan: what is kept of the compacted model.
        kept: of the compaction, where its weights were.
        report: on the model before.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> report = inspect(model, torch.zeros(1, 3))
        >>> plan = Plan.uniform(report, filters=0.5)
        >>> small = compact(model, plan, torch.zeros(1, 3))
        >>> restored = restore(small.plan, small.kept, report)
        >>> restored["0"] == plan["0"], restored.weights == small.plan.weights
        (True, True)
    """
    layers = {}
    for name in kept.keys() - plan.keys():  # nothing is left of them but biases
        before, filters = report[name], np.zeros(report[name].shape[0], bool)
        filters[kept[name].filters] = True
        nothing = np.zeros(before.columns, bool)
        layers[name] = LayerPlan(before.shape, filters, nothing, None, before.groups, before.transposed)
    for name, layer in plan.items():
        before, rows, columns = report[name], kept[name].filters, kept[name].columns
        if layer.shape == before.shape:
            layers[name] = layer
            continue
        whole_rows, whole_columns = np.zeros(before.shape[0], bool), np.zeros(before.columns, bool)
        whole_rows[rows], whole_columns[columns] = layer.filters, layer.columns
        elements = None
        if layer.elements is not None:
            width = before.columns // before.groups
            matrix = np.zeros((before.shape[0], width), bool)
            matrix[np.ix_(rows, np.unique(columns % width))] = layer.elements.reshape(len(rows), -1)
            elements = matrix.reshape(before.shape)
        layers[name] = LayerPlan(before.shape, whole_rows, whole_columns, elements, before.groups, before.transposed)
    return Plan(layers).tied(report)


def compact(
    model: nn.Module,
    plan: Plan,
    example_input: torch.Tensor | Sequence[torch.Tensor],
    *,
    columns: bool = True,
    report: Report | None = None,
) -> Compacted:
    """Cut out of a copy of `model` what `plan` drops, and all that is dead then; check that it computes the same.

    A dropped filter that puts out a constant (through a shift or an activation) has it folded into the bias of the
    layers that read it; where zero padding makes that inexact, the filter stays. Layers of which no weight is left, as
    in a dead branch, become an `EmptyLayer`, which computes nothing. Weights that are computed (weight_norm and other
    parametrizations, weight standardisation) become plain ones, as in `acf.baked`.

    Args:
        model: any model; it is not changed.
        plan: what is kept, in the shapes of `model`.
        example_input: a tensor, or a tuple of tensors, that the model takes.
        columns: also cut out dropped columns (`ColumnConv2d`, `ColumnLinear`); if not, they stay as zeros and as masks
            in the returned plan, which suits further training.
        report: of `inspect` on this model, when there is one: saves reading it again. Layers that it, or otherwise the
            plan, holds (`exclude` and `select` of `inspect`) stay as they are.

    Raises:
        ValueError: the plan does not fit the model, names a layer that `inspect` leaves out, or leaves nothing of one.
        AssertionError: masked and compacted network differ, or the model and what it is with plain weights; nothing is
            returned.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> x = torch.randn(2, 1, 8, 8)
        >>> small = compact(model, Plan.uniform(inspect(model, x), filters=0.75), x)
        >>> small.model[0].weight.shape, small.model[3].weight.shape, small.max_difference < 1e-5, small.kind
        (torch.Size([2, 1, 3, 3]), torch.Size([2, 72]), True, 'module')
    """
    check_unwrapped(model)
    inputs = (example_input,) if isinstance(example_input, torch.Tensor) else tuple(example_input)
    if changed := computed(model):
        plain = baked(model)
        _check_baked(model, plain, inputs)
        return replace(compact(plain, plan, inputs, columns=columns, report=report), baked=changed)
    report = inspect(model, inputs, exclude=sorted(plan.held)) if report is None else report
    _check_report(report, model)
    small = _cut_in_double(model, inputs, plan, report, columns) or _cut_as_it_is(model, inputs, plan, report, columns)
    training = {name: module.training for name, module in model.named_modules()}
    for name, module in small.model.named_modules():
        module.training = training.get(name, model.training)
    return small


def _check_baked(model: nn.Module, plain: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Raise AssertionError when plain weights change what the model computes: it reads its parameters elsewhere too."""
    expected, got = (_outputs(copied(x).eval(), inputs) for x in (model, plain))
    tolerance = _FLOAT64_TOLERANCE if expected.dtype == torch.float64 else _FLOAT32_TOLERANCE
    if not float((expected - got).abs().max()) <= tolerance * (float(expected.abs().max()) or 1.0):
        raise AssertionError(f"{type(model).__name__} computes something else when its computed weights are plain ones")


def _cut_in_double(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], plan: Plan, report: Report, columns: bool
) -> Compacted | None:
    """Compact a float32 model in float64, where the masked and the compacted network must agree to rounding.

    Returns:
        None for models that are float64 themselves or insist on another precision.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    dtypes = {name: x.dtype for name, x in tensors}
    if _rounds(model, report) or all(x.dtype == torch.float64 for x in model.parameters()):
        return None
    masked, cast = mask(model, plan).eval().double(), _cast(inputs, torch.float64)
    examples = (cast, _random_like(cast))
    try:
        arriving, expected = _measured(masked, report, examples)
    except RuntimeError:  # its code insists on another dtype
        return None
    pairs = list(zip(examples, expected, strict=True))
    small = _cut(masked, plan, report, columns, arriving, pairs, _FLOAT64_TOLERANCE)
    for name, x in [*small.model.named_parameters(), *small.model.named_buffers()]:
        if x.dtype == torch.float64:  # (a bias that was folded into a layer without one is of its weight's type)
            dtype = dtypes.get(name) or dtypes.get(f"{name.rpartition('.')[0]}.weight")
            x.data = x.data.to(dtype or x.dtype)
    return replace(small, max_difference=_difference(small.model, [(inputs, expected[0])], _FLOAT32_TOLERANCE))


def _cut_as_it_is(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], plan: Plan, report: Report, columns: bool
) -> Compacted:
    """Compact a model in its own precision."""
    masked, examples = mask(model, plan).eval(), (inputs, _random_like(inputs))
    arriving, expected = _measured(masked, report, examples)
    exact = not _rounds(model, report) and all(x.dtype == torch.float64 for x in model.parameters())
    pairs, tolerance = list(zip(examples, expected, strict=True)), _FLOAT64_TOLERANCE if exact else _FLOAT32_TOLERANCE
    return _cut(masked, plan, report, columns, arriving, pairs, tolerance)


def _rounds(model: nn.Module, report: Report) -> bool:
    """Whether the model holds, or casts to, a lower precision than its own: in float64 it would compute otherwise."""
    lower = (torch.float32, torch.float16, torch.bfloat16)
    casts = (node for node in report.trace.nodes if node.op in ("to", "_to_copy"))
    holds = any(x.dtype in lower[1:] for x in model.parameters())
    return holds or any(isinstance(x, torch.dtype) and x in lower for n in casts for x in (*n.args, *n.kwargs.values()))


def _check_report(report: Report, model: nn.Module) -> None:
    for layer in report.layers:
        module = dict(model.named_modules()).get(layer.name)
        shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
        expected = tuple(report.trace.tensors[f"{layer.name}.weight"].shape)
        if shape != expected:
            raise ValueError(f"the report is on another model: {layer.name!r} has a weight {expected}, not {shape}")


def _cut(
    small: nn.Module,
    plan: Plan,
    report: Report,
    columns: bool,
    arriving: dict[str, tuple[torch.Tensor, torch.Tensor]],
    examples: Sequence[tuple[tuple[torch.Tensor, ...], torch.Tensor]],
    tolerance: float,
) -> Compacted:
    """Make the masked network `small` physically smaller, in place.

    Args:
        arriving: of the masked network, from `_measured`.
        examples: inputs, and what the masked network makes of them.
        tolerance: of the largest output.

    Raises:
        AssertionError: on one of the examples they differ by more.
    """
    alive = _fold_constants(small, plan, report, arriving)
    apply_masks(small, alive)
    keep = kept_labels(alive, report)
    kept = {}
    for layer in report.layers:
        rows = np.flatnonzero(keep[report.labels(layer.name)])
        kept[layer.name] = Kept(rows, np.flatnonzero(report.living_columns(keep, layer.name)))
    _shrink(small, report, keep)
    _replace_empty(small, kept, [name for name in arriving if alive[name].weights == 0])
    if columns:
        _cut_columns(small, alive, kept, report)
    try:
        worst = _difference(small, examples, tolerance)
        kind, reason = "module", ""
    except Exception as error:  # whatever the user's code raises, or computes, with sizes that it did not expect
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        small, kind = as_graph(small, report, keep), "graph"
        worst = _difference(small, examples, tolerance)
    return Compacted(small, _remaining(small, alive, plan, keep, kept, report), kept, worst, kind, reason)


def _fold_constants(
    model: nn.Module, plan: Plan, report: Report, arriving: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> Plan:
    """Fold what empty filters put out into the biases of the layers that read it, in place; return what is left.

    A channel is empty when all filters that it is made of are dropped, or read empty channels alone. It is the same
    number everywhere, for every input, so what arrives at each reader is measured. Where it is not one number (an
    average pooling that counts its padding), or where the reader pads with zeros beside it, the reader keeps it.
    Backwards, filters that nobody reads any more are dropped, until nothing changes.
    """
    exact = {layer.name: np.zeros(layer.inputs, bool) for layer in report.layers}
    exact |= {name: _foldable(model.get_submodule(name), low, high) for name, (low, high) in arriving.items()}
    folded = {layer.name: np.zeros(layer.inputs, bool) for layer in report.layers}

    def living_columns(alive: npt.NDArray[np.bool_], name: str) -> npt.NDArray[np.bool_]:
        dead = ~alive[report.channels.inputs[name]] & exact[name]
        folded[name] |= dead
        return ~np.repeat(dead, report[name].columns // report[name].inputs)

    layers = settled(whole(plan, report), report, living_columns)
    check_something_left(layers, report, plan)
    for name, (low, _) in arriving.items():
        _fold(model.get_submodule(name), report[name], torch.from_numpy(folded[name]), low)
    return _with_biases(model, Plan(layers), report)


def _with_biases(model: nn.Module, plan: Plan, report: Report) -> Plan:
    """The plan with the filters in place that have no weight left, but a bias that somebody reads."""
    used = report.channels.used(read_labels(dict(plan), report))
    layers = {}
    for layer in report.layers:
        bias, kept = getattr(model.get_submodule(layer.name), "bias", None), plan[layer.name]
        if bias is not None:
            more = (bias.detach() != 0).cpu().numpy() & used[report.labels(layer.name)] & ~kept.filters
            kept = _with_filters(kept, more)
        layers[layer.name] = kept
    return Plan(layers)


def _foldable(reader: nn.Module, low: torch.Tensor, high: torch.Tensor) -> npt.NDArray[np.bool_]:
    """(C,) whether the input channel is one number that the reader's bias can stand for."""
    rounding = 8 * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
    anywhere = not (_pads_with_zeros(reader) or isinstance(reader, _TRANSPOSED))
    exact: npt.NDArray[np.bool_] = ((high - low <= rounding) & ((low == 0) | anywhere)).numpy()
    return exact


def _fold(reader: nn.Module, layer: Layer, folded: torch.Tensor, values: torch.Tensor) -> None:
    """Add to the bias what the folded channels contribute."""
    constant = torch.where(folded, values, 0).double()
    if not bool((constant != 0).any()):
        return
    weight = (
        _tensor(reader, "weight").double().reshape(layer.groups, layer.shape[0] // layer.groups, layer.shape[1], -1)
    )
    shift = torch.einsum("gpck,gc->gp", weight, constant.reshape(layer.groups, -1)).flatten()
    _add_to_bias(reader, shift)


def _with_filters(layer: LayerPlan, more: npt.NDArray[np.bool_]) -> LayerPlan:
    """The plan with these filters, which have no weight left, in place."""
    if not more.any():
        return layer
    elements = layer.mask()
    return replace(layer, filters=layer.filters | more, elements=elements)


def _measured(
    model: nn.Module, report: Report, examples: Sequence[tuple[torch.Tensor, ...]]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    """Layer -> (C,) least and (C,) largest value that arrives in each of its input channels; and the outputs."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # not of layers whose weight is used without calling them

    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def measure(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            channel = x.dim() - 1 if layer.kind == "linear" else x.dim() - len(layer.shape) + 1
            low, high = x.movedim(channel, 0).reshape(layer.inputs, -1).aminmax(dim=1)
            if layer.name in seen:
                low, high = torch.minimum(low, seen[layer.name][0]), torch.maximum(high, seen[layer.name][1])
            seen[layer.name] = low, high

        return measure

    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(hook(layer), with_kwargs=True)
        for layer in report.layers
    ]
    try:
        outputs = [_outputs(model, inputs) for inputs in examples]
    finally:
        for handle in handles:
            handle.remove()
    return seen, outputs


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _pads_with_zeros(module: nn.Module) -> bool:
    if not isinstance(module, _CONVOLUTIONS) or module.padding_mode != "zeros":
        return False
    if type(module).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        return True  # its own code may pad
    return module.padding == "same" if isinstance(module.padding, str) else any(module.padding)


def _add_to_bias(module: nn.Module, shift: torch.Tensor) -> None:
    weight, bias = _tensor(module, "weight"), getattr(module, "bias", None)
    old = 0.0 if bias is None else bias.detach().double()
    trained = module.get_parameter("weight" if bias is None else "bias").requires_grad
    module.register_parameter("bias", nn.Parameter((old + shift).to(weight.dtype), trained))


def _shrink(model: nn.Module, report: Report, keep: npt.NDArray[np.bool_]) -> None:
    """Cut out, in place, every tensor's slices of groups that go, and tell the modules their new sizes."""
    for (name, dim), labels in report.channels.slices.items():
        if keep[labels].all():
            continue
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        value = getattr(owner, attribute)
        small = value.detach().index_select(dim, torch.from_numpy(np.flatnonzero(keep[labels]))).clone()
        if isinstance(value, nn.Parameter):
            _set_parameter(owner, attribute, small)
        else:
            owner.register_buffer(attribute, small, persistent=attribute not in owner._non_persistent_buffers_set)
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        filters = int(keep[report.labels(layer.name)].sum())
        inputs = int(keep[report.channels.inputs[layer.name]].sum())
        # (a bias that was folded into a layer without one lies as the filters do)
        bias = getattr(module, "bias", None)
        if bias is not None and bias.shape[0] != filters:
            index = torch.from_numpy(np.flatnonzero(keep[report.labels(layer.name)]))
            _set_parameter(module, "bias", bias.detach()[index].clone())
        if layer.kind == "linear":
            _set_sizes(module, in_features=inputs, out_features=filters)
        else:
            groups = inputs if layer.groups > 1 and layer.shape[1] == 1 else layer.groups
            _set_sizes(module, in_channels=inputs, out_channels=filters, groups=groups)
    for norm in report.channels.norms.values():
        module, kept = model.get_submodule(norm.module), int(keep[norm.labels].sum())
        if isinstance(module, nn.GroupNorm):
            _set_sizes(module, num_channels=kept, num_groups=kept * norm.groups // norm.labels.size)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            _set_sizes(module, num_features=kept)
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            _set_sizes(module, num_parameters=module.weight.numel())


def _set_sizes(module: nn.Module, **sizes: int) -> None:
    for name, size in sizes.items():
        setattr(module, name, size)


def _replace_empty(model: nn.Module, kept: dict[str, Kept], empty: Sequence[str]) -> None:
    """Replace layers without any weight by their biases, in place."""
    for name in empty:
        module = model.get_submodule(name)
        pads_otherwise = getattr(module, "padding_mode", "zeros") != "zeros"  # by an operator of its own, in a graph
        if type(module) in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED) and not pads_otherwise:
            _replace(model, module, EmptyLayer(module))
            kept[name] = Kept(kept[name].filters, np.zeros(0, np.int64))


def _replace(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Put another module wherever `module` is."""
    for path, found in list(model.named_modules(remove_duplicate=False)):
        if found is module:
            model.set_submodule(path, other)


def _cut_columns(model: nn.Module, alive: Plan, kept: dict[str, Kept], report: Report) -> None:
    """Replace layers that keep only some of their columns, in place."""
    for layer in report.layers:
        module, columns = model.get_submodule(layer.name), kept[layer.name].columns
        chosen = alive[layer.name].columns[columns]
        if chosen.all() or not chosen.any() or not _cuts_columns(module) or not layer.columns_prunable:
            continue
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        index = torch.from_numpy(np.flatnonzero(chosen))
        small = weight.detach().flatten(1)[:, index].clone()
        replaced = _column_layer(module, small, index, None if bias is None else bias.detach().clone(), len(columns))
        for name, parameter in replaced.named_parameters():
            parameter.requires_grad_(module.get_parameter(name).requires_grad)
        _replace(model, module, replaced)
        kept[layer.name] = Kept(kept[layer.name].filters, columns[chosen])


def _column_layer(
    module: nn.Module, weight: torch.Tensor, index: torch.Tensor, bias: torch.Tensor | None, inputs: int
) -> ColumnConv2d | ColumnLinear:
    if not isinstance(module, nn.Conv2d):
        return ColumnLinear(weight, index, bias, features=inputs)
    kernel = _pair(module.kernel_size)
    return ColumnConv2d(
        weight,
        index,
        bias,
        channels=inputs // (kernel[0] * kernel[1]),
        kernel_size=kernel,
        stride=_pair(module.stride),
        padding=module.padding if isinstance(module.padding, str) else _pair(module.padding),
        dilation=_pair(module.dilation),
    )


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Another parameter of that name, trained if the one before was."""
    module.register_parameter(name, nn.Parameter(value, module.get_parameter(name).requires_grad))


def _cuts_columns(module: nn.Module) -> bool:
    """Whether a layer of this kind can lose single columns: exactly the classes that the column modules stand for."""
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.padding_mode == "zeros")


def _remaining(
    small: nn.Module,
    alive: Plan,
    given: Plan,
    keep: npt.NDArray[np.bool_],
    kept: dict[str, Kept],
    report: Report,
) -> Plan:
    """What is kept of the smaller layers, and of what `given` ties to them: the masks that could not be cut out."""
    layers = {}
    for layer in report.layers:
        if isinstance(small.get_submodule(layer.name), EmptyLayer):
            continue
        rows, columns, plan = kept[layer.name].filters, kept[layer.name].columns, alive[layer.name]
        width = layer.columns // layer.groups
        inside = np.unique(columns % width)
        groups = layer.groups
        if groups > 1 and layer.shape[1] == 1:
            groups = len(columns) // width
        elements = plan.elements
        if elements is not None:
            elements = elements.reshape(layer.shape[0], -1)[np.ix_(rows, inside)]
        weight = _tensor(small.get_submodule(layer.name), "weight")
        shape = tuple(weight.shape)
        if layer.transposed:
            shape = (len(rows), shape[0] // groups, *shape[2:])
        layers[layer.name] = LayerPlan(
            shape,
            plan.filters[rows],
            plan.columns[columns],
            None if elements is None else elements.reshape(shape),
            groups,
            layer.transposed,
        )
    tied = {}
    for name, (dim, mask_of) in given.parameters.items():
        labels = report.channels.slices.get((name, dim))
        left = mask_of if labels is None else mask_of[keep[labels]]
        if not left.all():
            tied[name] = (dim, left)
    return Plan(layers, tied, report.held)


def _difference(
    small: nn.Module, examples: Sequence[tuple[tuple[torch.Tensor, ...], torch.Tensor]], tolerance: float
) -> float:
    """The largest difference to the outputs wanted of each input, relative to the largest output.

    Raises:
        AssertionError: they differ by more than `tolerance`.
    """
    worst = 0.0
    for inputs, wanted in examples:
        got = _outputs(small, inputs)
        if got.shape != wanted.shape:
            raise AssertionError(
                f"the compacted network puts out {got.numel()} values, the masked one {wanted.numel()}"
            )
        scale = float(wanted.abs().max()) or 1.0
        difference = float((wanted - got).abs().max()) / scale
        if not difference <= tolerance:
            raise AssertionError(
                f"the compacted network differs from the masked one by {difference:.3g} of the largest output "
                f"({str(got.dtype).removeprefix('torch.')}, allowed {tolerance:g}); nothing is returned"
            )
        worst = max(worst, difference)
    return worst


def _random_like(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) if x.is_floating_point() else x
        for x in inputs
    )


def _cast(inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def _outputs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with torch.no_grad():
        return _flat(model(*inputs))


def _flat(outputs: object) -> torch.Tensor:
    if isinstance(outputs, torch.Tensor):
        return outputs.flatten()
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs
    if not isinstance(parts, Iterable):
        return torch.zeros(0)
    found = [_flat(part) for part in parts]
    return torch.cat([part.to(found[0]) for part in found]) if found else torch.zeros(0)


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    value = getattr(module, name)
    assert isinstance(value, torch.Tensor)
    return value.detach()


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check_columns(weight: torch.Tensor, index: torch.Tensor, bias: torch.Tensor | None, width: int) -> None:
    if weight.ndim != 2 or index.shape != (weight.shape[1],) or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = [None if x is None else tuple(x.shape) for x in (weight, index, bias)]
        raise ValueError(f"weight must be (P, K), index (K,) and bias (P,), got {shapes}")
    if index.dtype != torch.int64 or (index < 0).any() or (index >= width).any() or (index.diff() <= 0).any():
        raise ValueError(f"index must be rising int64 from 0 to {width - 1}, got {index.tolist()[:8]} ...")
