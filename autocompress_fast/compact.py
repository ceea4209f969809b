"""Compaction: the masked network made physically small, computing the same.

Dropped filters are cut out of their layer, of the normalisation behind it and of the layer that reads them. A layer
that keeps only some of its columns becomes a `ColumnConv2d` or `ColumnLinear`: the weights that are left, their index.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from autocompress_fast.graph import Layer, Report, inspect
from autocompress_fast.plan import LayerPlan, Plan, mask
from autocompress_fast.purify import unused_paths, whole, without_empty

if TYPE_CHECKING:
    import numpy.typing as npt

    IntArray = npt.NDArray[np.intp]

__all__ = ["ColumnConv2d", "ColumnLinear", "Compacted", "Kept", "compact", "restore"]

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
        model: a smaller copy; the user's class with smaller layers in it.
        plan: what is kept of the smaller layers (columns or single weights that are masked in them, if any).
        kept: per layer, where the weights of the smaller model were.
        max_difference: largest difference of any output to the masked model's, relative to the largest output.
    """

    model: nn.Module
    plan: Plan
    kept: dict[str, Kept]
    max_difference: float


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
    for name, layer in plan.items():
        before, rows, columns = report[name], kept[name].filters, kept[name].columns
        if layer.shape == before.shape:
            layers[name] = layer
            continue
        whole_rows, whole_columns = np.zeros(before.shape[0], bool), np.zeros(before.columns, bool)
        whole_rows[rows], whole_columns[columns] = layer.filters, layer.columns
        if layer.elements is None:
            layers[name] = LayerPlan(before.shape, whole_rows, whole_columns)
        else:
            elements = np.zeros((whole_rows.size, whole_columns.size), bool)
            elements[np.ix_(rows, columns)] = layer.elements.reshape(len(rows), -1)
            layers[name] = LayerPlan(before.shape, whole_rows, whole_columns, elements.reshape(before.shape))
    return Plan(layers).tied(report)


def compact(
    model: nn.Module,
    plan: Plan,
    example_input: torch.Tensor | Sequence[torch.Tensor],
    *,
    columns: bool = True,
) -> Compacted:
    """Cut out of a copy of `model` what `plan` drops, and all that is dead then; check that it computes the same.

    A dropped filter that puts out a constant (through a shift or an activation) has it folded into the bias of the
    layer that reads it; where zero padding makes that inexact, the filter stays.

    Args:
        model: any model; it is not changed.
        plan: what is kept, in the shapes of `model`.
        example_input: a tensor, or a tuple of tensors, that the model takes.
        columns: also cut out dropped columns (`ColumnConv2d`, `ColumnLinear`); if not, they stay as zeros and as masks
            in the returned plan, which suits further training.

    Raises:
        ValueError: the plan does not fit the model, names a layer that `inspect` leaves out, or leaves nothing of one.
        AssertionError: masked and compacted network differ; nothing is returned.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> x = torch.randn(2, 1, 8, 8)
        >>> small = compact(model, Plan.uniform(inspect(model, x), filters=0.75), x)
        >>> small.model[0].weight.shape, small.model[3].weight.shape, small.max_difference < 1e-5
        (torch.Size([2, 1, 3, 3]), torch.Size([2, 72]), True)
    """
    inputs = (example_input,) if isinstance(example_input, torch.Tensor) else tuple(example_input)
    masked = mask(model, plan).eval()
    report = inspect(masked, inputs)
    # In float64 first: there the two must agree to rounding, whatever constants were folded into float32 biases.
    if (double := _in_float64(masked, inputs)) is not None:
        _cut(*double, plan, report, columns, _FLOAT64_TOLERANCE)
    small, alive, kept, difference = _cut(masked, inputs, plan, report, columns, _FLOAT32_TOLERANCE)
    for name, module in small.named_modules():
        module.training = model.get_submodule(name).training
    return Compacted(small, _remaining(small, alive, kept, report), kept, difference)


def _in_float64(
    model: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[nn.Module, tuple[torch.Tensor, ...]] | None:
    """A copy of the model and the inputs in float64; None for a model whose forward insists on another dtype."""
    double, cast = copy.deepcopy(model).double(), _cast(inputs, torch.float64)
    try:
        with torch.no_grad():
            double(*cast)
    except RuntimeError:
        return None
    return double, cast


def _cut(
    masked: nn.Module, inputs: tuple[torch.Tensor, ...], plan: Plan, report: Report, columns: bool, tolerance: float
) -> tuple[nn.Module, Plan, dict[str, Kept], float]:
    """The smaller network, the plan that was cut, where its weights were, and its largest relative difference."""
    small = copy.deepcopy(masked)
    alive = unused_paths(_fold_constants(small, plan, report, inputs), report)
    kept = {}
    for layer in report.layers:
        rows = np.flatnonzero(alive[layer.name].filters) if layer.link is not None else np.arange(layer.shape[0])
        read = _read_columns(layer, alive, report)
        cut = columns and layer.columns_prunable and _cuts_columns(small.get_submodule(layer.name))
        kept[layer.name] = Kept(rows, np.flatnonzero(alive[layer.name].columns) if cut else read)
        _shrink(small, layer, kept[layer.name], read)
    return small, alive, kept, _check_same(masked, small, inputs, tolerance)


def _fold_constants(model: nn.Module, plan: Plan, report: Report, inputs: tuple[torch.Tensor, ...]) -> Plan:
    """Fold what empty filters put out into the bias of the layer that reads it, in place; return the plan to cut.

    A filter is empty when the plan drops it, or when all it reads are channels of empty filters. It puts out the same
    number everywhere, for every input, so what arrives at the reader is measured. Where it is not one number (an
    average pooling that counts its padding), or where the reader pads with zeros beside it, the filter is kept.
    """
    layers = whole(plan, report)
    arriving = _arriving(model, [layer.link.consumer for layer in report.layers if layer.link is not None], inputs)
    for layer in report.layers:
        name, kept = layer.name, without_empty(layer, layers[layer.name])
        layers[name] = kept
        if layer.link is None or kept.filters.all():
            continue
        consumer = report[layer.link.consumer]
        reader, values = model.get_submodule(consumer.name), arriving[consumer.name].reshape(2, layer.shape[0], -1)
        low, high = values[0].amin(dim=1), values[1].amax(dim=1)
        read = torch.from_numpy(layers[consumer.name].columns.reshape(layer.shape[0], -1).any(axis=1))
        rounding = 8 * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
        exact = (high - low <= rounding) & ((low == 0) | torch.tensor(not _pads_with_zeros(reader))) | ~read
        empty = torch.from_numpy(~kept.filters)
        layers[name] = _with_filters(kept, (empty & ~exact).numpy())
        cut = empty & exact
        weight = _tensor(reader, "weight").reshape(consumer.shape[0], layer.shape[0], -1)
        constant = torch.where(cut & read, low, 0).double()
        if bool((constant != 0).any()):
            _add_to_bias(reader, weight.double().sum(dim=2) @ constant)
        columns = layers[consumer.name].columns & ~np.repeat(cut.numpy(), weight.shape[2])
        layers[consumer.name] = replace(layers[consumer.name], columns=columns)
    return Plan(layers).tied(report)


def _with_filters(layer: LayerPlan, more: npt.NDArray[np.bool_]) -> LayerPlan:
    """The plan with these filters, which have no weight left, in place."""
    elements = layer.elements
    if elements is not None:
        elements = elements | more.reshape(-1, *[1] * (len(layer.shape) - 1))
    return replace(layer, filters=layer.filters | more, elements=elements)


def _arriving(model: nn.Module, readers: Iterable[str], inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """(2, C, ...): least and largest value over the batch that each reader gets when the model runs on `inputs`."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def measure(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            seen[name] = torch.stack(x.detach().aminmax(dim=0))

        return measure

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in readers]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _pads_with_zeros(module: nn.Module) -> bool:
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or module.padding_mode != "zeros":
        return False
    return module.padding == "same" if isinstance(module.padding, str) else any(module.padding)


def _add_to_bias(module: nn.Module, shift: torch.Tensor) -> None:
    weight, bias = _tensor(module, "weight"), getattr(module, "bias", None)
    old = 0.0 if bias is None else bias.detach().double()
    trained = module.get_parameter("weight" if bias is None else "bias").requires_grad
    module.register_parameter("bias", nn.Parameter((old + shift).to(weight.dtype), trained))


def _read_columns(layer: Layer, alive: Plan, report: Report) -> IntArray:
    """The columns of the layer's weight whose input still exists: those of the producer's filters that are left."""
    producer = report.producer(layer.name)
    channels = np.ones(1, bool) if producer is None else alive[producer.name].filters
    return np.flatnonzero(np.repeat(channels, layer.weights // layer.shape[0] // channels.size))


def _shrink(model: nn.Module, layer: Layer, kept: Kept, read: IntArray) -> None:
    """Make the layer, and the normalisations behind it, smaller in place; `read`: the columns that still get input."""
    module = model.get_submodule(layer.name)
    if len(kept.filters) * len(kept.columns) == layer.weights:
        return
    filters, columns = torch.from_numpy(kept.filters), torch.from_numpy(kept.columns)
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    small = weight.detach().reshape(layer.shape[0], -1)[filters][:, columns].clone()
    small_bias = None if bias is None else bias.detach()[filters].clone()
    index = torch.from_numpy(np.searchsorted(read, kept.columns))
    if len(kept.columns) == len(read):
        small = small.reshape(len(filters), -1, *layer.shape[2:])
        _set_parameter(module, "weight", small)
        if small_bias is not None:
            _set_parameter(module, "bias", small_bias)
        inputs, outputs = ("in_features", "out_features") if layer.kind == "linear" else ("in_channels", "out_channels")
        setattr(module, inputs, small.shape[1])
        setattr(module, outputs, len(filters))
    else:
        columns_left = _column_layer(module, small, index, small_bias, len(read))
        for name, parameter in columns_left.named_parameters():
            parameter.requires_grad_(module.get_parameter(name).requires_grad)
        model.set_submodule(layer.name, columns_left)
    for norm in layer.link.norms if layer.link is not None else ():
        _shrink_norm(model.get_submodule(norm), filters)


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


def _shrink_norm(norm: nn.Module, filters: torch.Tensor) -> None:
    for name, parameter in list(norm.named_parameters(recurse=False)):
        _set_parameter(norm, name, parameter.detach()[filters].clone())
    for name in ("running_mean", "running_var"):
        norm.register_buffer(name, _tensor(norm, name)[filters].clone())
    setattr(norm, "num_features", len(filters))  # noqa: B010 (a plain int, which nn.Module's types do not foresee)


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Another parameter of that name, trained if the one before was."""
    module.register_parameter(name, nn.Parameter(value, module.get_parameter(name).requires_grad))


def _cuts_columns(module: nn.Module) -> bool:
    """Whether a layer of this kind can lose single columns: exactly the classes that the column modules stand for."""
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.padding_mode == "zeros")


def _remaining(small: nn.Module, alive: Plan, kept: dict[str, Kept], report: Report) -> Plan:
    """What is kept of the smaller layers: the masks that could not be cut out physically."""
    layers = {}
    for layer in report.layers:
        rows, columns, plan = kept[layer.name].filters, kept[layer.name].columns, alive[layer.name]
        shape = tuple(_tensor(small.get_submodule(layer.name), "weight").shape)
        if shape != plan.shape:
            elements = plan.elements
            if elements is not None:
                elements = elements.reshape(layer.shape[0], -1)[np.ix_(rows, columns)].reshape(shape)
            plan = LayerPlan(shape, plan.filters[rows], plan.columns[columns], elements, norms=plan.norms)
        layers[layer.name] = plan
    return Plan(layers)


def _check_same(masked: nn.Module, small: nn.Module, inputs: tuple[torch.Tensor, ...], tolerance: float) -> float:
    """Compare the outputs, in eval mode, on the example and on random inputs."""
    generator = torch.Generator().manual_seed(0)
    random = tuple(torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x for x in inputs)
    worst = 0.0
    for arguments in (inputs, random):
        with torch.no_grad():
            expected, got = _flat(masked(*arguments)), _flat(small(*arguments))
        scale = float(expected.abs().max()) or 1.0
        difference = float((expected - got).abs().max()) / scale
        if not difference <= tolerance:
            raise AssertionError(
                f"the compacted network differs from the masked one by {difference:.3g} of the largest output "
                f"({str(expected.dtype).removeprefix('torch.')}, allowed {tolerance:g}); nothing is returned"
            )
        worst = max(worst, difference)
    return worst


def _cast(inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def _flat(outputs: object) -> torch.Tensor:
    if isinstance(outputs, torch.Tensor):
        return outputs.flatten()
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    assert isinstance(parts, Iterable)
    return torch.cat([_flat(part) for part in parts])


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
