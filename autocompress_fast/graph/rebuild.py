"""A compacted model as a graph of its layers, for models whose Python code has sizes of its own in the way.

The traced operators are put together again with every size that depends on channels computed anew: views, splits,
slices and paddings. Layers, normalisations and dropout stay the modules they were, so that the result trains like them
and has their state_dict names.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import nn  # this module is imported where a model is compacted, never for reading one

from autocompress_fast.graph import operators as ops
from autocompress_fast.trace import BATCH, Node, Ref, Tensor

if TYPE_CHECKING:
    import torch

    from autocompress_fast.graph.report import Report

__all__ = ["as_graph"]

BoolArray = npt.NDArray[np.bool_]

_MODULES = {
    "batch_norm": ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
    "group_norm": ("GroupNorm",),
    "instance_norm": ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
    "layer_norm": ("LayerNorm",),
    "prelu": ("PReLU",),
    "dropout": ("Dropout",),
    "feature_dropout": ("Dropout1d", "Dropout2d", "Dropout3d"),
}
_LAYER_MODULES = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear")


def as_graph(model: torch.nn.Module, report: Report, keep: BoolArray) -> torch.fx.GraphModule:
    """The model, whose tensors have been cut already, as a graph with sizes that fit.

    Args:
        model: with the cut layers.
        report: on the model before.
        keep: (labels,) what is left.
    """
    return _Builder(model, report, keep).build()


class _Structure(nn.Module):
    """Puts results together as the model returned them: a tuple, a dict, or whatever it was."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *results: Any) -> Any:
        from torch.utils._pytree import tree_unflatten

        return tree_unflatten(results, self.spec)


class _Builder:
    def __init__(self, model: torch.nn.Module, report: Report, keep: BoolArray) -> None:
        import torch

        self.model, self.report, self.keep = model, report, keep
        self.labels = report.channels.values
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.graph = torch.fx.Graph()
        self.built: dict[str, Any] = {}
        self.batch: Any = None

    def build(self) -> torch.fx.GraphModule:
        import torch

        trace = self.report.trace
        for entry in trace.inputs:
            self.built[entry.name] = self.graph.placeholder(entry.name)
        self.first = self.built[trace.inputs[0].name]
        for node in trace.nodes:
            self.built[node.name] = self._node(node)
        outputs = [self._value(x) for x in trace.outputs]
        if trace.structure is not None:
            self.model.add_module("_structure", _Structure(trace.structure))
            self.graph.output(self.graph.call_module("_structure", tuple(outputs)))
        else:
            self.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        built = torch.fx.GraphModule(self.model, self.graph, class_name=type(self.model).__name__)
        built.graph.eliminate_dead_code()
        built.recompile()
        return built

    def _node(self, node: Node) -> Any:
        """The operator in the new graph; None for a value of which nothing is left."""
        if node.op == "getitem":
            return self._getitem(node)
        if node.op in ("stack", "cat"):
            left = tuple(x for x in node.args[0] if not isinstance(x, Ref) or self.built[x.name] is not None)
            return self._call(node, [left, *node.args[1:]]) if left else None
        if any(isinstance(x, Ref) and self.built[x.name] is None for x in node.operands):
            return None
        if (path := self._module(node)) is not None:
            return self.graph.call_module(path, (self._value(node.args[0]),))
        resized = getattr(self, f"_{_RESIZED.get(node.op, '')}", None)
        if resized is not None and self.labels.get(_of(node)) is not None:
            return resized(node)
        args = list(node.args)
        if node.op in ops.LAYERS:
            args[2] = self._bias(node)
        if node.op in ops.LAYERS and not self._is_layer(node) and self.labels.get(node.name) is not None:
            return self._filter(node)
        if node.op in ops.LAYERS and node.op != "linear":
            args[6] = self._groups(node)
        elif node.op in ops.FACTORIES and self.labels.get(node.name) is not None:
            at = ops.FACTORIES[node.op]
            args[at] = [n if n is BATCH else m for n, m in zip(node.args[at], self._sizes(node), strict=True)]
        elif node.op == "group_norm" and (norm := self.report.channels.norms.get(node.name)) is not None:
            args[1] = int(self.keep[norm.labels].sum()) * norm.groups // norm.labels.size
        return self._call(node, args)

    def _call(self, node: Node, args: Sequence[Any]) -> Any:
        kwargs = {name: self._value(x) for name, x in node.kwargs.items()}
        return self.graph.call_function(ops.overload(node), tuple(self._value(x) for x in args), kwargs)

    def _module(self, node: Node) -> str | None:
        """The module that does exactly what the operator does, if there is one."""
        from torch import nn

        path, module = node.module, self.modules.get(node.module)
        if node.op in ops.LAYERS:
            name = node.args[1].name.removesuffix(".weight") if isinstance(node.args[1], Tensor) else ""
            if name not in self.report:
                return None
            module = self.modules[name]
            plain = type(module) in tuple(getattr(nn, n) for n in _LAYER_MODULES)
            plain = plain and getattr(module, "padding_mode", "zeros") == "zeros"
            return name if plain or getattr(module, "stands_for_a_layer", False) else None
        classes = tuple(getattr(nn, name) for name in _MODULES.get(node.op, ()))
        return path if classes and type(module) in classes else None

    def _is_layer(self, node: Node) -> bool:
        return isinstance(node.args[1], Tensor) and node.args[1].name.removesuffix(".weight") in self.report

    def _filter(self, node: Node) -> Any:
        """A depthwise convolution with a kernel that no layer owns, of the channels that are left."""
        import torch

        channel = len(node.shape) - len(self.report.trace.shape(node.args[1])) + 1
        channels, filters = self._along(node.args[0].name, channel), self._along(node.name, channel)
        args = list(node.args)
        args[6] = int(channels.sum())
        for position, left in ((1, channels if node.op.startswith("conv_transpose") else filters), (2, filters)):
            operand = args[position]
            if operand is None or left.all() or (self._held(operand), 0) in self.report.channels.slices:
                continue
            index = self._buffer(f"_index_of_{node.name}_{position}", torch.from_numpy(np.flatnonzero(left)))
            call = torch.ops.aten.index_select.default
            args[position] = self.graph.call_function(call, (self._value(operand), 0, index))
        return self._call(node, args)

    def _held(self, operand: Any) -> str:
        """The tensor that an operand is, or is a copy of; empty when it is computed."""
        if isinstance(operand, Tensor):
            return operand.name
        node = self.report.trace.node(operand.name)
        return self._held(node.args[0]) if node is not None and node.op in ops.UNCHANGED else ""

    def _bias(self, node: Node) -> Any:
        """A layer's bias, which it may have got when constants were folded into it."""
        name = node.args[1].name.removesuffix(".weight") if isinstance(node.args[1], Tensor) else ""
        has_one = name in self.report and getattr(self.modules[name], "bias", None) is not None
        return Tensor(f"{name}.bias") if has_one else node.args[2]

    def _groups(self, node: Node) -> int:
        groups = int(node.args[6])
        name = node.args[1].name.removesuffix(".weight") if isinstance(node.args[1], Tensor) else ""
        if name not in self.report or groups == 1 or self.report[name].shape[1] != 1:
            return groups
        return int(self.keep[self.report.channels.inputs[name]].sum())

    def _value(self, value: Any) -> Any:
        import torch

        if isinstance(value, Ref):
            return self.built[value.name]
        if isinstance(value, Tensor):
            if value.name in self.report.trace.constants:
                return self._buffer("_" + value.name.replace(".", "_"), self.report.trace.tensors[value.name])
            return self.graph.get_attr(value.name)
        if isinstance(value, tuple | list):
            return [self._value(x) for x in value]
        if value is BATCH:
            if self.batch is None:
                with self.graph.inserting_after(self.first):
                    self.batch = self.graph.call_function(torch.ops.aten.sym_size.int, (self.first, 0))
            return self.batch
        return value

    # ---- sizes

    def _buffer(self, name: str, value: torch.Tensor) -> Any:
        """A constant of the graph."""
        if not hasattr(self.model, name):
            self.model.register_buffer(name, value, persistent=False)
        return self.graph.get_attr(name)

    def _known(self, operand: Any) -> torch.Tensor | None:
        """The value of an operand that is a constant, or a copy of one."""
        if isinstance(operand, Tensor):
            return self.report.trace.tensors[operand.name]
        node = self.report.trace.node(operand.name) if isinstance(operand, Ref) else None
        return self._known(node.args[0]) if node is not None and node.op in ops.UNCHANGED else None

    def _along(self, name: str, dim: int) -> BoolArray:
        """Which entries of a value are left along a dimension."""
        return self._mask(self.labels[name], dim)

    def _mask(self, labels: torch.Tensor, dim: int) -> BoolArray:
        if labels.stride(dim) == 0:  # the same all along: nothing is cut here
            return np.ones(labels.shape[dim], bool)
        other = [d for d in range(labels.dim()) if d != dim % labels.dim()]
        narrow = labels
        for d in other:
            if labels.stride(d) == 0:
                narrow = narrow.narrow(d, 0, 1)
        kept = self.keep[narrow.numpy()]
        found: BoolArray = np.asarray(kept.any(axis=tuple(other)) if other else kept)
        return found

    def _any(self, labels: torch.Tensor) -> bool:
        """Whether anything is left of a value."""
        inner = labels[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in labels.stride())]
        return bool(self.keep[inner.numpy()].any())

    def _sizes(self, node: Node) -> list[int]:
        labels = self.labels[node.name]
        return [int(self._mask(labels, d).sum()) for d in range(labels.dim())]

    def _view(self, node: Node) -> Any:
        """The new shape; at most one dimension is left to torch, that of the batch where there is one."""
        shape = [-1 if old is BATCH else new for old, new in zip(node.shape, self._sizes(node), strict=True)]
        return self._call(node, [node.args[0], shape, *node.args[2:]])

    def _expand(self, node: Node) -> Any:
        sizes = [
            old if old is BATCH or old == -1 else new for old, new in zip(node.args[1], self._sizes(node), strict=True)
        ]
        return self._call(node, [node.args[0], sizes, *node.args[2:]])

    def _unflatten(self, node: Node) -> Any:
        labels = self.labels[node.args[0].name]
        dim, sizes = node.args[1] % labels.dim(), self._sizes(node)
        return self._call(node, [node.args[0], node.args[1], sizes[dim : dim + len(node.args[2])]])

    def _split(self, node: Node) -> Any:
        import torch

        pieces = self.labels[node.name]
        dim = int(node.args[2]) if len(node.args) > 2 else 0
        sizes = [int(self._mask(piece, dim).sum()) if self._any(piece) else 0 for piece in pieces]
        call = torch.ops.aten.split_with_sizes.default
        return self.graph.call_function(call, (self._value(node.args[0]), sizes, dim))

    def _slice(self, node: Node) -> Any:
        """Any choice along one dimension: run on the positions, to find where they are now."""
        import torch

        x = node.args[0].name
        labels = self.labels[x]
        dim, chosen = self._chosen(node, labels)
        if dim is None or chosen is None:
            return self._call(node, node.args)
        left = self._along(x, dim)
        if left.size != labels.shape[dim] or left.all():
            return self._call(node, node.args)
        index = (np.cumsum(left) - 1)[[i for i in chosen.reshape(-1).tolist() if left[i]]]
        if index.size == 0:
            return None
        operand = self._value(node.args[0])
        if node.op == "select":
            return self._call(node, [node.args[0], dim, int(index[0])])
        if (np.diff(index) == 1).all():
            call = torch.ops.aten.slice.Tensor
            return self.graph.call_function(call, (operand, dim, int(index[0]), int(index[-1]) + 1))
        buffer = self._buffer(f"_index_of_{node.name}", torch.from_numpy(index))
        return self.graph.call_function(torch.ops.aten.index_select.default, (operand, dim, buffer))

    def _chosen(self, node: Node, labels: torch.Tensor) -> tuple[int | None, torch.Tensor | None]:
        """The dimension along which an operator chooses, and the positions that it takes there."""
        import torch

        if node.op == "index":
            dims = [d for d, index in enumerate(node.args[1]) if index is not None]
            index = self._known(node.args[1][dims[0]]) if len(dims) == 1 else None
            return (dims[0], index) if index is not None and index.dim() == 1 else (None, None)
        dim = int(node.args[1] or 0) % labels.dim()
        if node.op == "index_select":
            return dim, self._known(node.args[2])
        arguments = [0 if i == 1 else (2**62 if a is BATCH else a) for i, a in enumerate(node.args)]
        return dim, ops.overload(node)(torch.arange(labels.shape[dim]), *arguments[1:])

    def _getitem(self, node: Node) -> Any:
        """One of several results; of an unbind along channels, those that are gone are not there any more."""
        source = self.report.trace.node(node.args[0].name)
        whole, index = self._value(node.args[0]), node.args[1]
        if whole is None:
            return None
        if source is not None and source.op == "unbind" and self.labels.get(source.args[0].name) is not None:
            dim = int(source.args[1]) if len(source.args) > 1 else 0
            left = self._along(source.args[0].name, dim)
            if left.size > index:
                if not left[index]:
                    return None
                index = int(left[:index].sum())
        return self.graph.call_function(operator.getitem, (whole, index))

    def _pad(self, node: Node) -> Any:
        amounts, x = list(node.args[1]), self.labels[node.args[0].name]
        for pair in range(len(amounts) // 2):
            dim = x.dim() - 1 - pair
            before, after = amounts[2 * pair : 2 * pair + 2]
            outer, inner = self._along(node.name, dim), self._along(node.args[0].name, dim)
            if not (outer.all() and inner.all()):  # a negative amount takes away
                amounts[2 * pair] = int(outer[: max(before, 0)].sum()) - int(inner[: max(-before, 0)].sum())
                added, gone = outer[outer.size - max(after, 0) :], inner[inner.size - max(-after, 0) :]
                amounts[2 * pair + 1] = int(added.sum()) - int(gone.sum())
        return self._call(node, [node.args[0], amounts, *node.args[2:]])

    def _shuffle(self, node: Node) -> Any:
        """Channels leave from every group, or whole groups do."""
        grid = self._along(node.args[0].name, 1).reshape(node.args[1], -1)
        return self._call(node, [node.args[0], int(grid.any(axis=1).sum())])

    def _roll(self, node: Node) -> Any:
        dims = node.args[2]
        if any(not self._along(node.name, d).all() for d in dims):
            import torch

            (dim,), (shift,) = dims, node.args[1]
            left = self._along(node.args[0].name, dim)
            order = torch.roll(torch.arange(left.size), shift).tolist()
            index = (np.cumsum(left) - 1)[[i for i in order if left[i]]]
            buffer = self._buffer(f"_index_of_{node.name}", torch.from_numpy(index))
            call = torch.ops.aten.index_select.default
            return self.graph.call_function(call, (self._value(node.args[0]), dim, buffer))
        return self._call(node, node.args)


_RESIZED = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unsafe_view"), "view"),
    **dict.fromkeys(("expand", "broadcast_to"), "expand"),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "tensor_split"), "split"),
    **dict.fromkeys(("slice", "narrow", "select", "index_select", "index"), "slice"),
    **dict.fromkeys(ops.PADDING, "pad"),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), "shuffle"),
    "unflatten": "unflatten",
    "roll": "roll",
}


def _of(node: Node) -> str:
    """The value whose labels decide about a node's sizes: the operand's for slices, else its own."""
    operand = node.args[0]
    return operand.name if _RESIZED.get(node.op) in ("slice",) and isinstance(operand, Ref) else node.name
