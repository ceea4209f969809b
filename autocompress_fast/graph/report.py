"""`inspect`: a model's layers, their sizes and multiply-adds, what can be pruned, and what is frozen and why."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from autocompress_fast._baked import baked, computed
from autocompress_fast.graph.channels import DATA, Channels, follow
from autocompress_fast.graph.operators import LAYERS, Geometry, oriented
from autocompress_fast.graph.selection import Pattern, hold, to_hold
from autocompress_fast.trace import Node, Tensor, Trace, trace

if TYPE_CHECKING:
    import torch


IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

__all__ = ["Counts", "Frozen", "Group", "Kind", "Layer", "Report", "Set", "inspect"]


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
    """One convolution, transposed convolution or linear layer.

    Attributes:
        name: module path; its weight is `name`.weight.
        kind: "conv1d" ... "conv3d", "conv_transpose1d" ... or "linear".
        shape: (P, C / groups, ...): of the weight, or of a transposed convolution's with filters and inputs exchanged.
        groups: of a convolution; 1 for linear layers.
        outputs: positions at which every weight is used for one input, over all calls: those of the output (H * W; 1
            for linear), or of the input of a transposed convolution.
        frozen_filters, frozen_columns: why no filter, or no column, can be pruned; empty when some can.
        held: why the layer stays as it is: it was excluded, or not selected; empty when it was not.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int
    outputs: int
    frozen_filters: str
    frozen_columns: str
    held: str = ""

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
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.kind.startswith("conv_transpose")

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Number of columns: groups * C/groups * KH * KW."""
        return self.groups * math.prod(self.shape[1:])

    @property
    def inputs(self) -> int:
        """Number of input channels C (input features of a linear layer)."""
        return self.groups * self.shape[1]

    @property
    def macs(self) -> int:
        """Multiply-adds for one input."""
        return self.weights * self.outputs


@dataclass(frozen=True)
class Group:
    """Channels that live and die together.

    Attributes:
        filters: layer -> its filters (output channels) in the group.
        channels: layer -> its input channels in the group; of a linear layer, its input features.
        tied: other parameters and buffers by their state_dict names -> indices along their channel dimension.
        frozen: why the group cannot be cut; empty when it can.
    """

    filters: Mapping[str, tuple[int, ...]]
    channels: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, tuple[int, ...]]
    frozen: str


@dataclass(frozen=True)
class Kind:
    """Groups that are alike: in the same layers, with the same numbers of filters and channels, frozen for one reason.

    Attributes:
        filters: layer -> how many of its filters each group has.
        channels: layer -> how many of its input channels each group has.
        tied: other parameters and buffers that each group has a part of.
        groups: how many there are.
        frozen: why they cannot be cut; empty when they can.
    """

    filters: Mapping[str, int]
    channels: Mapping[str, int]
    tied: tuple[str, ...]
    groups: int
    frozen: str


@dataclass(frozen=True)
class Frozen:
    """What cannot be cut out for one reason.

    Attributes:
        reason: with the operator, and the line of code where it is known.
        layers: with filters that are frozen for it.
        macs, params: multiply-adds and weights in these filters, of input channels that are frozen too, or are none.
    """

    reason: str
    layers: tuple[str, ...]
    macs: int
    params: int


@dataclass(frozen=True, eq=False)
class Set:
    """Layers whose filters are tied to each other's, and the groups that they have in common.

    Attributes:
        layers: with filters in the set, in execution order.
        rows: layer -> (P,) position of each filter's group in the set, -1 for filters that are frozen.
        size: number of groups that can be cut.
        classes: (size,) which groups lie in the same layers: equal numbers do. A zero-padded shortcut, for one, ties
            some filters of a layer to another layer's and leaves the others alone.
        readers: layer -> (C,) position of the group that each of its input channels belongs to, -1 for others.
    """

    layers: tuple[str, ...]
    rows: Mapping[str, IntArray]
    size: int
    classes: IntArray
    readers: Mapping[str, IntArray]

    @cached_property
    def sizes(self) -> IntArray:
        """How many groups every class has."""
        return np.bincount(self.classes)

    @cached_property
    def _members(self) -> list[IntArray]:
        """The groups of every class."""
        return [np.flatnonzero(self.classes == number) for number in range(self.sizes.size)]

    @cached_property
    def _filters(self) -> dict[str, list[int]]:
        """Layer -> how many of its filters stay when 0, 1, ... groups do; rates are found by asking very often."""
        shares = self._kept(np.arange(self.size + 1)[:, None]) / self.sizes
        found = {}
        for name, rows in self.rows.items():
            per_class = np.bincount(self.classes[rows[rows >= 0]], minlength=self.sizes.size)
            free = np.rint((per_class * shares).sum(axis=1)).astype(np.int64)
            found[name] = (int((rows < 0).sum()) + free).tolist()
        return found

    def _kept(self, groups: int | IntArray) -> IntArray:
        sizes = self.sizes
        kept: IntArray = np.clip(np.floor(sizes * (groups / self.size) + 1e-9).astype(np.int64), 1, sizes)
        return kept

    def counts(self, groups: int) -> IntArray:
        """How many groups of every class stay when so many do in all: the same share of each, and one at least."""
        return self._kept(groups)

    def chosen(self, joint: npt.NDArray[np.float64], groups: int) -> BoolArray:
        """(size,) the groups that stay: of every class those with the largest norm; of equal ones, the first."""
        chosen = np.zeros(self.size, bool)
        for members, count in zip(self._members, self.counts(groups).tolist(), strict=True):
            chosen[members[np.argsort(-joint[members], kind="stable")[:count]]] = True
        return chosen

    def filters(self, layer: str, groups: int) -> int:
        """How many filters of a layer stay when so many groups do."""
        return self._filters[layer][min(groups, self.size)]

    def groups(self, layer: str, filters: int) -> int:
        """The largest number of groups with which no more than so many filters of a layer stay; 1 at least."""
        return max(1, bisect_right(self._filters[layer], filters) - 1)

    def joint(self, norms: Mapping[str, npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        """(size,) norm of every group from those of the filters of all its layers."""
        squares = np.zeros(self.size)
        for name, rows in self.rows.items():
            free = rows >= 0
            np.add.at(squares, rows[free], norms[name][free] ** 2)
        return np.sqrt(squares)


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What `inspect` found; print it for tables.

    Attributes:
        model_name: class of the model.
        layers: in execution order.
        channels: where every channel comes from and goes to.
        trace: the model as operators.
        skipped: convolutions and linear operators that are no layer here, because their weight is shared, computed or
            not that of a plain torch layer -> why. They are left as they are, and no size counts them. (A depthwise one
            with a kernel that no layer owns, such as a blur, goes with the channels that it filters.)
        baked: modules that compute a weight from parameters: the report is on the plain one, as in `acf.baked`.
    """

    model_name: str
    layers: tuple[Layer, ...]
    channels: Channels
    trace: Trace
    skipped: Mapping[str, str] = field(default_factory=dict)
    baked: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Layer:
        if name not in self._by_name:
            reason = f": {self.skipped[name]}" if name in self.skipped else ""
            raise KeyError(f"{self.model_name} has no layer {name!r}{reason}; layers: {', '.join(self._by_name)}")
        return self._by_name[name]

    def __repr__(self) -> str:
        return f"Report({self.model_name}: {len(self.layers)} layers, {self.params:,} weights, {self.macs:,} MACs)"

    def __str__(self) -> str:
        from autocompress_fast.report import Inspection

        return str(Inspection(self))

    def __rich__(self) -> Any:
        from autocompress_fast.report import Inspection

        return Inspection(self)

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
        """Multiply-adds in filters or input channels that can be cut out; the others are frozen at both ends."""
        return self.macs - sum(one.macs for one in self.frozen_by)

    @property
    def prunable_params(self) -> int:
        """Weights in filters or input channels that can be cut out."""
        return self.params - sum(one.params for one in self.frozen_by)

    @cached_property
    def frozen_by(self) -> tuple[Frozen, ...]:
        """What is frozen for every reason, the reason with most multiply-adds first.

        A weight is frozen when its filter and its input channel are, and counts for the filter's reason: all of a
        layer that is excluded or not selected for that. So the sums are what is not prunable of the network.
        """
        found: dict[str, dict[str, int]] = {}  # reason -> layer -> frozen weights
        for layer in self.layers:
            inputs = self._frozen_of(self.channels.inputs[layer.name])
            per_filter = inputs.reshape(layer.groups, -1).sum(axis=1) * math.prod(layer.shape[2:])
            weights = np.repeat(per_filter, layer.shape[0] // layer.groups)
            reasons = self.channels.frozen[self.labels(layer.name)]
            for number in np.unique(reasons[reasons > 0]).tolist():
                per_layer = found.setdefault(layer.held or self.channels.reasons[number], {})
                more = int(weights[reasons == number].sum())
                per_layer[layer.name] = per_layer.get(layer.name, 0) + more
        by_reason = (
            Frozen(
                reason,
                tuple(weights),
                sum(count * self[name].outputs for name, count in weights.items()),
                sum(weights.values()),
            )
            for reason, weights in found.items()
        )
        return tuple(sorted(by_reason, key=lambda one: (-one.macs, -one.params)))

    @property
    def held(self) -> dict[str, str]:
        """Layer -> why it stays as it is, for those that were excluded or not selected."""
        return {layer.name: layer.held for layer in self.layers if layer.held}

    def predict(self, filters: float = 0.0, columns: float = 0.0) -> Counts:
        """Sizes after uniform pruning (`Plan.uniform`) and the removal of all that is dead then (`unused_paths`).

        Args:
            filters, columns: shares removed, 0 <= share < 1.

        Raises:
            ValueError: a share outside of the range, or nothing would be left of the network.

        Example:
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
            >>> inspect(model, torch.zeros(1, 1, 8, 8)).predict(filters=0.5)
            Counts(conv=54, params=54, macs=1224)
        """
        from autocompress_fast.plan import Plan
        from autocompress_fast.unused import unused_paths

        return self.counts(unused_paths(Plan.uniform(self, filters=filters, columns=columns), self))

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
        """The weight of a layer as (P, C / groups, ...), sharing the model's memory where that is its shape."""
        layer = self[name]
        weight: torch.Tensor = oriented(
            self.trace.tensors[f"{name}.weight"].detach(), layer.groups, transposed=layer.transposed
        )
        return weight

    def counts(self, plan: Mapping[str, Sized] | None = None) -> Counts:
        """Sizes of the network, of what `plan` keeps when one is given."""
        conv = params = macs = 0
        for layer in self.layers:
            weights = plan[layer.name].weights if plan is not None and layer.name in plan else layer.weights
            conv += weights * layer.is_conv
            params += weights
            macs += weights * layer.outputs
        return Counts(conv, params, macs)

    @cached_property
    def _labels(self) -> dict[str, IntArray]:
        return {n.name: _read_only(self.channels.filters(n.name, n.shape[0])) for n in self.layers}

    @cached_property
    def _frozen_filters(self) -> dict[str, BoolArray]:
        return {name: _read_only(self._frozen_of(labels)) for name, labels in self._labels.items()}

    @cached_property
    def tied_parameters(self) -> dict[tuple[str, int], IntArray]:
        """(tensor, dimension) -> labels along it, of what is cut with filters and belongs to no layer of them."""
        own = {f"{layer.name}.{part}" for layer in self.layers for part in ("weight", "bias")}
        return {
            (name, dim): labels
            for (name, dim), labels in self.channels.slices.items()
            if name not in own and self.trace.tensors[name].is_floating_point()
        }

    def labels(self, name: str) -> IntArray:
        """(P,) the labels of a layer's filters."""
        return self._labels[name]

    def frozen_filters(self, name: str) -> BoolArray:
        """(P,) which filters of a layer cannot be cut out."""
        return self._frozen_filters[name]

    def _frozen_of(self, labels: IntArray) -> BoolArray:
        frozen: BoolArray = (labels == DATA) | (self.channels.frozen[labels] > 0)
        return frozen

    def living_columns(self, alive: BoolArray, name: str) -> BoolArray:
        """(groups * K,) the columns of a layer that read a label which is alive."""
        layer = self[name]
        return np.repeat(alive[self.channels.inputs[name]], layer.columns // layer.inputs)

    @cached_property
    def sets(self) -> tuple[Set, ...]:
        """Layers whose filters are tied to each other; a layer without prunable filters is in none."""
        group = self.channels.group
        root = _Roots()
        for layer in self.layers:
            groups = group[self.labels(layer.name)[~self.frozen_filters(layer.name)]]
            for other in groups.tolist():
                root.join(("layer", layer.name), ("group", other))
        members: dict[Any, list[Layer]] = {}
        for layer in self.layers:
            if layer.filters_prunable:
                members.setdefault(root.of(("layer", layer.name)), []).append(layer)
        return tuple(self._set(layers) for layers in members.values())

    @cached_property
    def set_of(self) -> dict[str, Set]:
        """Layer -> the set that its filters are in."""
        return {name: tied for tied in self.sets for name in tied.layers}

    def _set(self, layers: list[Layer]) -> Set:
        group = self.channels.group
        labels = {layer.name: self.labels(layer.name) for layer in layers}
        free = [group[found[~self._frozen_of(found)]] for found in labels.values()]
        groups = np.unique(np.concatenate(free))
        position = np.full(group.size, -1)
        position[groups] = np.arange(groups.size)
        position = position[group]
        position[DATA] = -1
        rows = {name: position[found] for name, found in labels.items()}
        lies_in = np.zeros((groups.size, len(layers)), bool)
        for number, found in enumerate(rows.values()):
            lies_in[found[found >= 0], number] = True
        _, classes = np.unique(lies_in, axis=0, return_inverse=True)
        readers = {name: position[inputs] for name, inputs in self.channels.inputs.items()}
        return Set(
            tuple(labels),
            rows,
            groups.size,
            classes.reshape(-1),
            {name: found for name, found in readers.items() if (found >= 0).any()},
        )

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Every group with a filter in it, in the order of the first."""
        channels = self.channels
        weights = {f"{layer.name}.{part}" for layer in self.layers for part in ("weight", "bias")}
        found: dict[int, tuple[dict[str, list[int]], dict[str, list[int]], dict[str, list[int]]]] = {}

        def collect(part: int, name: str, labels: IntArray) -> None:
            for index, root in enumerate(channels.group[labels].tolist()):
                if root != DATA and (part == 0 or root in found):
                    found.setdefault(root, ({}, {}, {}))[part].setdefault(name, []).append(index)

        for layer in self.layers:
            collect(0, layer.name, self.labels(layer.name))
        for layer in self.layers:
            collect(1, layer.name, channels.inputs[layer.name])
        for (name, _), labels in channels.slices.items():
            if name not in weights:
                collect(2, name, labels)
        frozen = {root: channels.reasons[channels.frozen[root]] for root in found}
        groups = []
        for root, parts in found.items():
            filters, inputs, tied = ({name: tuple(index) for name, index in part.items()} for part in parts)
            groups.append(Group(filters, inputs, tied, frozen[root]))
        return tuple(groups)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The groups, summed up: those that are alike count as one kind, in the order of their first."""
        found: dict[tuple[Any, ...], int] = {}
        for group in self.groups:
            sizes = (
                tuple((name, len(index)) for name, index in part.items()) for part in (group.filters, group.channels)
            )
            key = (*sizes, tuple(dict.fromkeys(group.tied)), group.frozen)
            found[key] = found.get(key, 0) + 1
        return tuple(
            Kind(dict(filters), dict(channels), tied, count, frozen)
            for (filters, channels, tied, frozen), count in found.items()
        )

    def to_json(self) -> dict[str, Any]:
        """The report as plain numbers and strings."""
        return {
            "model": self.model_name,
            "macs": self.macs,
            "params": self.params,
            "conv_params": self.conv_params,
            "prunable_macs": self.prunable_macs,
            "prunable_params": self.prunable_params,
            "skipped": dict(self.skipped),
            "baked": list(self.baked),
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
                    "held": layer.held,
                }
                for layer in self.layers
            ],
            "sets": [{"layers": list(one.layers), "groups": one.size} for one in self.sets],
            "kinds": [
                {
                    "filters": dict(kind.filters),
                    "channels": dict(kind.channels),
                    "tied": list(kind.tied),
                    "groups": kind.groups,
                    "frozen": kind.frozen,
                }
                for kind in self.kinds
            ],
            "frozen": self.frozen,
            "frozen_by": [
                {"reason": one.reason, "layers": list(one.layers), "macs": one.macs, "params": one.params}
                for one in self.frozen_by
            ],
        }


_ArrayT = TypeVar("_ArrayT", bound=npt.NDArray[Any])


def _read_only(array: _ArrayT) -> _ArrayT:
    array.setflags(write=False)
    return array


class _Roots:
    """Sets of things that are joined pairwise."""

    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}

    def of(self, thing: Any) -> Any:
        while (up := self.parent.get(thing, thing)) != thing:
            thing = up
        return thing

    def join(self, a: Any, b: Any) -> None:
        a, b = self.of(a), self.of(b)
        if a != b:
            self.parent[b] = a


def inspect(
    model: torch.nn.Module,
    example_input: torch.Tensor | Sequence[torch.Tensor],
    *,
    select: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
) -> Report:
    """Read a model: its layers, what lives and dies together, what can be pruned, and what is frozen and why.

    Layers can be left as they are, by patterns: the path of a layer or of a module that contains it ("layer3"), a glob
    on the layer's path ("layer3.*.conv1"), a compiled regular expression that is the whole path, or a class of modules
    (of the layer, or of one that contains it, such as a block). No filter, column or input channel of such a layer is
    pruned, so that whatever is tied to it, or feeds it, is frozen as well.

    Args:
        model: any module that `torch.export` can read, or whose forward can be recorded for the example; not changed.
        example_input: a tensor, or a tuple of tensors, that the model takes.
        select: one or several patterns; all other layers stay as they are.
        exclude: one or several patterns of layers that stay as they are, even if they are selected.

    Raises:
        TraceError: the model cannot be read.
        ValueError: a pattern that no layer matches.
        TypeError: something that is no pattern.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
        >>> report = inspect(model, torch.zeros(1, 1, 8, 8))
        >>> report.params, report.macs, report.frozen
        (108, 2448, {'2': 'filters: it is an output of the model'})
        >>> report.groups[3]
        Group(filters={'0': (3,)}, channels={'2': (3,)}, tied={}, frozen='')
        >>> inspect(model, torch.zeros(1, 1, 8, 8), exclude="2").frozen["0"]
        'filters: it is tied to a layer that is excluded (2)'
    """
    name, own = type(model).__name__, dict(model.named_modules(remove_duplicate=False))
    changed = computed(model)
    model = baked(model)
    traced = trace(model, example_input)
    modules = dict(model.named_modules(remove_duplicate=False))
    nodes = [node for node in traced.nodes if node.op in LAYERS]
    calls: dict[str, list[Node]] = {}  # layer -> its calls
    names: dict[str, str] = {}  # of the weight -> of the layer
    skipped: dict[str, str] = {}
    for node in nodes:
        if reason := _why_no_layer(traced, node, modules):
            skipped[_skipped_as(node)] = reason
        else:
            path = node.args[1].name.removesuffix(".weight")
            names[node.args[1].name] = path
            calls.setdefault(path, []).append(node)
    for path in set(calls) & set(skipped):
        del calls[path], names[f"{path}.weight"]
    held = to_hold(calls, modules | own, select, exclude)
    channels = hold(follow(traced, names), held, {path: _filters(traced, found) for path, found in calls.items()})
    layers = tuple(_layer(traced, path, found, channels, held.get(path, "")) for path, found in calls.items())
    for node in nodes:
        key = _skipped_as(node)
        if key in skipped and channels.values.get(node.name) is not None:
            skipped[key] = "its kernel is fixed: it goes with the channels that it filters"
    return Report(name, layers, channels, traced, skipped, changed)


def _skipped_as(node: Node) -> str:
    """What `Report.skipped` calls an operator that is no layer."""
    path = node.args[1].name.removesuffix(".weight") if isinstance(node.args[1], Tensor) else node.module
    return path or node.name


_LAYER_CLASSES = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear")


def _why_no_layer(traced: Trace, node: Node, modules: dict[str, torch.nn.Module]) -> str:
    """Why the operator is not a torch layer with a weight and a bias of its own; empty when it is."""
    from torch import nn

    for operand in node.args[1:3]:
        if isinstance(operand, Tensor):
            what = operand.name.rpartition(".")[2]
            if any(user.op != node.op or user.args[1:3] != node.args[1:3] for user in traced.users(operand.name)):
                return f"its {what} is used by other operators too"
            others = [alias for alias, name in traced.aliases.items() if name == operand.name]
            owner = modules.get(operand.name.rpartition(".")[0])
            if any(modules.get(alias.rpartition(".")[0]) is not owner for alias in others):
                return f"its {what} has several owners"
    if not isinstance(node.args[1], Tensor):
        return "its weight is computed"
    path, _, attribute = node.args[1].name.rpartition(".")
    module = modules.get(path)
    if attribute != "weight" or not path or not isinstance(module, tuple(getattr(nn, n) for n in _LAYER_CLASSES)):
        where = f"{type(module).__name__} {path!r}" if path else "the model itself"
        return f"the {node.op} is called by {where}, not by a convolution or linear layer in it"
    if node.args[2] is not None and node.args[2] != Tensor(f"{path}.bias"):
        return "its bias is computed, or belongs to another layer"
    return ""


def _filters(traced: Trace, calls: list[Node]) -> int:
    """Number of filters of a layer."""
    return Geometry.of(calls[0], tuple(traced.tensors[calls[0].args[1].name].shape)).filters


def _positions(traced: Trace, call: Node, geometry: Geometry) -> int:
    """At how many positions a layer's weight is used for one sample."""
    if not geometry.spatial:
        return math.prod(call.shape[1:-1])
    shape = traced.shape(call.args[0]) if geometry.transposed else call.shape
    return math.prod(shape[-geometry.spatial :])


def _layer(traced: Trace, path: str, calls: list[Node], channels: Channels, held: str) -> Layer:
    node = calls[0]
    weight = traced.tensors[node.args[1].name]
    geometry = Geometry.of(node, tuple(weight.shape))
    labels = channels.filters(path, geometry.filters)
    reasons = {channels.reasons[i] for i in channels.frozen[labels].tolist()}
    frozen_columns = ""
    if geometry.groups > 1:
        frozen_columns = f"it is a grouped convolution ({geometry.groups} groups)"
    elif geometry.transposed:
        frozen_columns = "it is a transposed convolution"
    return Layer(
        name=path,
        kind=node.op,
        shape=tuple(oriented(weight, geometry.groups, transposed=geometry.transposed).shape),
        groups=geometry.groups,
        outputs=sum(_positions(traced, call, geometry) for call in calls),
        frozen_filters=held or ("" if "" in reasons else sorted(reasons)[0]),
        frozen_columns=held or frozen_columns,
        held=held,
    )
