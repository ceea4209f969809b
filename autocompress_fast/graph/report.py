"""`inspect`: a model's layers, their sizes and multiply-adds, what can be pruned, and what is frozen and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from autocompress_fast.graph.links import LAYERS, Frozen, Link, follow
from autocompress_fast.trace import Node, Tensor, Trace, trace

if TYPE_CHECKING:
    import torch


__all__ = ["Counts", "Layer", "Report", "inspect"]


class Sized(Protocol):
    """A layer's part of a plan."""

    @property
    def weights(self) -> int:
        """Number of weights kept."""
        ...


@dataclass(frozen=True)
class Counts:
    """Sizes of a network.

    Attributes:
        conv: weights of the convolutions.
        params: weights of the convolutions and linear layers; biases and normalisations apart.
        macs: multiply-adds of these layers for one input.
    """

    conv: int
    params: int
    macs: int


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer.

    Attributes:
        name: module path; its weight is `name`.weight.
        kind: "conv1d", "conv2d", "conv3d" or "linear".
        shape: of the weight, (P, C / groups, ...).
        groups: of a convolution; 1 for linear layers.
        outputs: positions that every filter computes for one input (H * W; 1 for linear).
        link: where the filters' output goes, when they can be cut out.
        frozen_filters, frozen_columns: why filters or columns cannot be pruned; empty when they can.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int
    outputs: int
    link: Link | None
    frozen_filters: str
    frozen_columns: str

    @property
    def filters_prunable(self) -> bool:
        """Whether filters can be cut out."""
        return not self.frozen_filters

    @property
    def columns_prunable(self) -> bool:
        """Whether columns can be dropped."""
        return not self.frozen_columns

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution."""
        return self.kind != "linear"

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Number of columns: groups * C/groups * KH * KW."""
        return self.groups * math.prod(self.shape[1:])

    @property
    def macs(self) -> int:
        """Multiply-adds for one input."""
        return self.weights * self.outputs


@dataclass(frozen=True, eq=False)
class Report:
    """What `inspect` found.

    Attributes:
        model_name: class of the model.
        layers: in execution order.
        trace: the model as operators.
        skipped: convolutions and linear operators that are no layer here, because their weight is shared, computed or
            not that of a plain torch layer -> why. They are left as they are, and no size counts them.
    """

    model_name: str
    layers: tuple[Layer, ...]
    trace: Trace
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Layer:
        if name not in self._by_name:
            reason = f": {self.skipped[name]}" if name in self.skipped else ""
            raise KeyError(f"{self.model_name} has no layer {name!r}{reason}; layers: {', '.join(self._by_name)}")
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @property
    def macs(self) -> int:
        """Multiply-adds of the layers for one input."""
        return sum(layer.macs for layer in self.layers)

    @property
    def params(self) -> int:
        """Weights of all layers (biases and normalisations apart)."""
        return sum(layer.weights for layer in self.layers)

    @property
    def conv_params(self) -> int:
        """Weights of the convolutions."""
        return sum(layer.weights for layer in self.layers if layer.is_conv)

    @property
    def prunable_macs(self) -> int:
        """Multiply-adds of the layers of which filters or columns can be pruned."""
        return sum(layer.macs for layer in self.layers if layer.filters_prunable or layer.columns_prunable)

    @property
    def frozen(self) -> dict[str, str]:
        """Layer -> what of it is frozen, and why."""
        found = {}
        for layer in self.layers:
            parts = [("filters", layer.frozen_filters), ("columns", layer.frozen_columns)]
            if text := "; ".join(f"{what}: {reason}" for what, reason in parts if reason):
                found[layer.name] = text
        return found

    def weight(self, name: str) -> torch.Tensor:
        """The weight of a layer, sharing the model's memory."""
        return self.trace.tensors[f"{name}.weight"].detach()

    def counts(self, plan: Mapping[str, Sized] | None = None) -> Counts:
        """Sizes of the network, of what `plan` keeps when one is given."""
        conv = params = macs = 0
        for layer in self.layers:
            weights = plan[layer.name].weights if plan is not None and layer.name in plan else layer.weights
            conv += weights * layer.is_conv
            params += weights
            macs += weights * layer.outputs
        return Counts(conv, params, macs)

    def links(self) -> dict[str, str]:
        """Layer -> the layer whose filters are its channels, where they can be cut out."""
        return {consumer: layer.name for consumer, layer in self._producers.items()}

    def producer(self, consumer: str) -> Layer | None:
        """The layer whose filters are the channels of `consumer`, when they can be cut out."""
        return self._producers.get(consumer)

    @cached_property
    def _producers(self) -> dict[str, Layer]:
        return {layer.link.consumer: layer for layer in self.layers if layer.link is not None}

    def to_json(self) -> dict[str, Any]:
        """The report as plain numbers and strings."""
        return {
            "model": self.model_name,
            "macs": self.macs,
            "params": self.params,
            "conv_params": self.conv_params,
            "prunable_macs": self.prunable_macs,
            "skipped": dict(self.skipped),
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "groups": layer.groups,
                    "weights": layer.weights,
                    "macs": layer.macs,
                    "frozen_filters": layer.frozen_filters,
                    "frozen_columns": layer.frozen_columns,
                }
                for layer in self.layers
            ],
        }


def inspect(model: torch.nn.Module, example_input: torch.Tensor | Sequence[torch.Tensor]) -> Report:
    """Read a model: its layers, what of them can be pruned, and what is frozen and why.

    Filters can be pruned where their output goes to exactly one layer (plain chains: convolution, normalisation,
    activation, pooling, flatten, linear); columns of every convolution and linear layer with a weight of its own.

    Args:
        model: any module that torch.export can read; it is not changed.
        example_input: a tensor, or a tuple of tensors, that the model takes.

    Raises:
        TraceError: the model cannot be read.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
        >>> report = inspect(model, torch.zeros(1, 1, 8, 8))
        >>> report.params, report.macs, report.frozen
        (108, 2448, {'2': 'filters: it is the output layer'})
    """
    traced = trace(model, example_input)
    modules = dict(model.named_modules(remove_duplicate=False))
    nodes = [node for node in traced.nodes if node.op in LAYERS]
    names: dict[str, str] = {}  # of the weight -> of the layer
    skipped: dict[str, str] = {}
    for node in nodes:
        path = node.args[1].name.removesuffix(".weight") if isinstance(node.args[1], Tensor) else node.module
        if reason := _why_no_layer(traced, node, modules):
            skipped[path or node.name] = reason
        else:
            names[node.args[1].name] = path
    layers = tuple(_layer(traced, node, names) for node in nodes if getattr(node.args[1], "name", "") in names)
    return Report(type(model).__name__, layers, traced, skipped)


def _why_no_layer(traced: Trace, node: Node, modules: dict[str, torch.nn.Module]) -> str:
    """Why the operator is not a torch layer with a weight and a bias of its own, used once; empty when it is."""
    from torch import nn

    for operand in node.args[1:3]:
        if isinstance(operand, Tensor) and (
            len(traced.users(operand.name)) != 1 or operand.name in traced.aliases.values()
        ):
            return f"its {operand.name.rpartition('.')[2]} is used more than once, or has several names"
    module = modules.get(node.module)
    if not node.module or not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        where = f"{type(module).__name__} {node.module!r}" if node.module else "the model itself"
        return f"the {node.op} is called by {where}, not by a convolution or linear layer in it"
    for operand, name in zip(node.args[1:3], ("weight", "bias"), strict=True):
        if operand is not None and operand != Tensor(f"{node.module}.{name}"):
            return f"its {name} is computed, or belongs to another layer"
    return ""


def _layer(traced: Trace, node: Node, names: dict[str, str]) -> Layer:
    weight = node.args[1].name
    shape = tuple(traced.tensors[weight].shape)
    groups = 1 if node.op == "linear" else node.args[6]
    link = Frozen(f"it is a grouped convolution ({groups} groups)") if groups > 1 else follow(traced, node, names)
    return Layer(
        name=names[weight],
        kind=node.op,
        shape=shape,
        groups=groups,
        outputs=math.prod(node.shape[2:]) if node.op != "linear" else math.prod(node.shape[1:-1]),
        link=link if isinstance(link, Link) else None,
        frozen_filters=link.reason if isinstance(link, Frozen) else "",
        frozen_columns="" if groups == 1 else f"it is a grouped convolution ({groups} groups)",
    )
