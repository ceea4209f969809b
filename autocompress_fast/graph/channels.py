"""Which channels live and die together, found by sending labels through the model's own operators.

Every filter of every layer gets a label. A value of the network is then a tensor of labels: which filter each of its
elements comes from. Operators that only move data (views, permutations, slices, concatenations, shuffles ...) are
*executed* on these tensors, so that no rule about channel indices has to be written down, or can be wrong:

    data movement      run on the labels
    elementwise        labels that meet are one group, and the result is a new label made of both
    conv, linear       read one label per input channel; a new label per filter
    pooling, resizing  need the same label at all positions; keep it
    anything else      freezes the groups that touch it, and nothing else

A group can be cut out physically when every tensor that holds it stays rectangular: where a view spreads labels over
two dimensions, the cells along one of them become one group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autocompress_fast.graph import operators as ops
from autocompress_fast.trace import BATCH, Node, Ref, Tensor, Trace

if TYPE_CHECKING:
    import torch

__all__ = ["DATA", "OUTPUT", "Channels", "Join", "follow"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

OUTPUT = "it is an output of the model"
"""Why the filters of an output layer are frozen."""

DATA = 0
"""The label of what is no channel: the model's inputs, and results of operators that mix channels."""

_EITHER, _BOTH, _FIRST = "either", "both", "first"


@dataclass(frozen=True)
class Join:
    """New labels ``first, first + 1, ...`` made of the labels `a` and `b`.

    alive: "either": the result lives when a or b does (a sum); "both": when both do (a product); "first": when a does
    (a product with something that is not zero when it is dead).
    """

    first: int
    a: IntArray
    b: IntArray
    alive: str


@dataclass(frozen=True)
class Norm:
    """A normalisation: its module (empty when unknown), its number of groups (0 but for a GroupNorm), its channels."""

    module: str
    groups: int
    labels: IntArray


@dataclass(frozen=True, eq=False)
class Channels:
    """Where every channel comes from and goes to.

    Attributes:
        first: layer -> label of its filter 0; filter i has the label first + i.
        inputs: layer -> (C,) label of every input channel (of a linear layer: input feature).
        slices: (tensor, dimension) -> label along that dimension, for everything that is cut with the groups.
        group: (labels,) the smallest label that is tied to each.
        frozen: (labels,) index into `reasons`; 0 when free. All labels of a group have the same.
        reasons: why; the first is "".
        joins: in execution order.
        read: labels that are read by something that is no layer.
        constant: (labels,) whether it stands for an element of a parameter, or for padding.
        norms: node -> the normalisation that it is.
        values: (node, result) -> labels of its value in the model, for those that carry any.
    """

    first: Mapping[str, int]
    inputs: Mapping[str, IntArray]
    slices: Mapping[tuple[str, int], IntArray]
    group: IntArray
    frozen: IntArray
    reasons: tuple[str, ...]
    joins: tuple[Join, ...]
    read: IntArray
    constant: BoolArray
    norms: Mapping[str, Norm]
    values: Mapping[str, Any]

    def alive(self, filters: Mapping[str, BoolArray]) -> BoolArray:
        """(labels,) whether anything arrives, when of each layer only these filters put out anything."""
        alive = np.zeros(self.group.size, bool)
        alive[DATA] = True
        for layer, kept in filters.items():
            alive[self.first[layer] : self.first[layer] + kept.size] = kept
        for join in self.joins:
            a, b = alive[join.a], alive[join.b]
            result = a | b if join.alive == _EITHER else a & b if join.alive == _BOTH else a
            alive[join.first : join.first + a.size] = result
        return alive

    def lives(self, alive: BoolArray) -> BoolArray:
        """(labels,) what stays of a tensor: what is alive; a parameter's element while its group has anything alive."""
        group_alive = np.zeros(self.group.size, bool)
        group_alive[self.group[alive & ~self.constant]] = True
        group_alive[DATA] = True
        lives: BoolArray = np.where(self.constant, group_alive[self.group], alive)
        return lives

    def used(self, read: BoolArray) -> BoolArray:
        """(labels,) whether anybody reads it, when layers read those of `read`.

        Who reads a sum reads its terms.
        """
        used: BoolArray = read.copy()
        used[self.read] = True
        for join in reversed(self.joins):
            out = used[join.first : join.first + join.a.size]
            used[join.a[out]] = True
            used[join.b[out]] = True
        return used

    def filters(self, layer: str, count: int) -> IntArray:
        """Labels of the filters of a layer."""
        return np.arange(self.first[layer], self.first[layer] + count)


def follow(trace: Trace, layers: Mapping[str, str]) -> Channels:
    """Follow the channels through a trace; `layers` maps the weight's name to the name of each layer."""
    return _Follower(trace, layers).run()


class _Union:
    """Labels and the groups they are in."""

    def __init__(self) -> None:
        self.parent = np.zeros(1, np.int64)

    def new(self, count: int) -> int:
        first = self.parent.size
        self.parent = np.concatenate([self.parent, np.arange(first, first + count)])
        return first

    def roots(self) -> IntArray:
        while True:
            up = self.parent[self.parent]
            if np.array_equal(up, self.parent):
                return up
            self.parent = up

    def join(self, a: IntArray, b: IntArray) -> None:
        """Tie a[i] and b[i]; DATA is never tied."""
        keep = (a != DATA) & (b != DATA) & (a != b)
        a, b = a[keep], b[keep]
        while a.size:
            roots = self.roots()
            ra, rb = roots[a], roots[b]
            apart = ra != rb
            if not apart.any():
                return
            a, b, ra, rb = a[apart], b[apart], ra[apart], rb[apart]
            np.minimum.at(self.parent, np.maximum(ra, rb), np.minimum(ra, rb))


class _Follower:
    """Executes a trace on labels. A value without labels is None."""

    def __init__(self, trace: Trace, layers: Mapping[str, str]) -> None:
        self.trace, self.layers = trace, layers
        self.union = _Union()
        self.zero = [np.ones(1, bool)]  # whether a label's value is zero when it is dead
        self.values: dict[str, Any] = {}
        self.constants: dict[str, torch.Tensor] = {}  # labels of parameters used elementwise
        self.first: dict[str, int] = {}
        self.inputs: dict[str, IntArray] = {}
        self.slices: dict[tuple[str, int], IntArray] = {}
        self.joins: list[Join] = []
        self.read: list[IntArray] = []
        self.reasons: dict[str, int] = {"": 0}
        self.marks: list[tuple[IntArray, int]] = []
        self.constant_ranges: list[tuple[int, int]] = []
        self.copies: list[tuple[int, int]] = []  # labels of one channel that is repeated, as ranges
        self.norms: dict[str, Norm] = {}

    def run(self) -> Channels:
        for node in self.trace.nodes:
            self.values[node.name] = self._node(node)
        for output in self.trace.outputs:
            self._freeze([self._of(output)], OUTPUT)
        group = self.union.roots()
        frozen = np.zeros(group.size, np.int64)
        for labels, reason in reversed(self.marks):  # the first reason that was found stays
            frozen[group[labels]] = reason
        frozen = frozen[group]
        self._slice_constants(group)
        constant = np.zeros(group.size, bool)
        for first, count in self.constant_ranges:
            constant[first : first + count] = True
        return Channels(
            self.first,
            self.inputs,
            self.slices,
            group,
            frozen,
            tuple(self.reasons),
            tuple(self.joins),
            np.unique(np.concatenate([np.zeros(0, np.int64), *self.read])),
            constant,
            self.norms,
            self.values,
        )

    # ---- values

    def _of(self, operand: Any) -> Any:
        """The labels of an operand; None when it has none."""
        if isinstance(operand, Ref):
            return self.values.get(operand.name)
        if isinstance(operand, tuple):
            return tuple(self._of(x) for x in operand)
        return None

    def _labelled(self, node: Node) -> list[torch.Tensor]:
        """The operands that carry labels."""
        found = (self.values.get(x.name) if isinstance(x, Ref) else None for x in node.operands)
        flat = itertools.chain.from_iterable(x if isinstance(x, tuple | list) else (x,) for x in found)
        return [x for x in flat if x is not None]

    def _node(self, node: Node) -> Any:
        if node.op in ops.LAYERS:
            return self._layer(node)
        labelled = self._labelled(node)
        if node.op == "getitem":
            whole = self._of(node.args[0])
            return None if whole is None else whole[node.args[1]]
        if node.op in ops.FACTORIES:
            return self._made(node)
        if not labelled:
            return self._constant(node)
        try:
            rule = self._rule(node)
            result = rule(node)
        except _NotFollowedError as error:
            return self._give_up(node, f"{error} in {node.where}")
        except (RuntimeError, IndexError, TypeError, ValueError):  # torch's, when an operator cannot run on labels
            return self._give_up(node, f"its channels cannot be followed through {node.where}")
        return self._rectangular(result)

    def _rule(self, node: Node) -> Callable[[Node], Any]:
        if node.op in ops.MOVES:
            return self._move
        if node.op in ops.SPATIAL:
            return self._spatial
        if node.op in ops.REDUCTIONS:
            return self._reduce
        rules: dict[str, Callable[[Node], Any]] = {
            "batch_norm": self._batch_norm,
            "instance_norm": self._batch_norm,
            "group_norm": self._group_norm,
            "layer_norm": self._layer_norm,
            "rms_norm": self._layer_norm,
            "prelu": self._prelu,
            "matmul": self._matmul,
            "bmm": self._matmul,
            "mm": self._matmul,
            "einsum": self._einsum,
            "softmax": self._along,
            "log_softmax": self._along,
            "cumsum": self._along,
        }
        if node.op in rules:
            return rules[node.op]
        if ops.is_pointwise(node):
            return self._pointwise
        raise _NotFollowedError("its output goes into an operator that is not understood,")

    def _give_up(self, node: Node, reason: str) -> None:
        self._freeze(self._labelled(node), reason)

    def _freeze(self, values: Iterable[Any], reason: str) -> None:
        """Everything in these values is read, and its groups cannot be cut."""
        number = self.reasons.setdefault(reason, len(self.reasons))
        for value in values:
            if isinstance(value, tuple | list):
                self._freeze(value, reason)
            elif value is not None:
                labels = np.unique(_compressed(value).numpy())
                labels = labels[labels != DATA]
                self.read.append(labels)
                self.marks.append((labels, number))

    def _new(self, count: int, zero: BoolArray | None = None) -> int:
        self.zero.append(np.ones(count, bool) if zero is None else zero)
        return self.union.new(count)

    @property
    def _zero(self) -> BoolArray:
        if len(self.zero) > 1:
            self.zero = [np.concatenate(self.zero)]
        return self.zero[0]

    def _varies(self, value: torch.Tensor) -> list[int]:
        """Dimensions along which the groups differ."""
        import torch

        groups = torch.from_numpy(self.union.roots())[_compressed(value)]
        return [d for d in range(value.dim()) if groups.shape[d] > 1 and bool((groups != groups.narrow(d, 0, 1)).any())]

    def _along_one(self, value: torch.Tensor, dim: int, what: str) -> IntArray:
        """The labels along one dimension, when they are the same everywhere else; otherwise they are tied so."""
        dim %= value.dim()
        if any(d != dim for d in self._varies(value)):
            raise _NotFollowedError(f"its channels do not lie along {what}")
        small = _compressed(value).movedim(dim, 0)
        rows = small.reshape(small.shape[0], -1).numpy()
        if rows.shape[1] > 1:  # other labels of the same group
            labels = rows[:, 0].copy()
            for column in range(1, rows.shape[1]):
                labels = self._joined(labels, rows[:, column], _EITHER)
        else:
            labels = rows[:, 0]
        return np.repeat(labels, value.shape[dim]) if small.shape[0] != value.shape[dim] else labels.copy()

    def _rectangular(self, value: Any) -> Any:
        """Tie labels so that every group is a set of whole slices along one dimension."""
        if isinstance(value, tuple | list):
            return tuple(self._rectangular(x) for x in value)
        if value is None:
            return None
        value = _expanded(value)
        varying = self._varies(value)
        if len(varying) > 1:
            small = _compressed(value)
            if bool((small == DATA).any()):
                self._freeze([value], "its channels are mixed with values that are no channels")
                return value
            best, ties = -1, (np.zeros(0, np.int64),) * 2
            for dim in varying:
                moved = small.movedim(dim, 0).reshape(small.shape[dim], -1).numpy()
                a, b = np.broadcast_to(moved[:, :1], moved.shape).ravel(), moved.ravel()
                trial = _Union()
                trial.parent = self.union.roots().copy()
                trial.join(a, b)
                left = np.unique(trial.roots()[moved[:, 0]]).size
                if left > best:
                    best, ties = left, (a, b)
            self.union.join(*ties)
        return value

    def _joined(self, a: IntArray, b: IntArray, alive: str) -> IntArray:
        """Labels made of two, elementwise: one new label for every pair that occurs, and the pair is one group."""
        if a.size == 0 or np.array_equal(a, b):
            return a
        self.union.join(a, b)
        pairs, index = np.unique(np.stack([a, b]), axis=1, return_inverse=True)
        zero = self._zero[pairs[0]] & self._zero[pairs[1]] if alive == _EITHER else self._zero[pairs[0]]
        if alive == _BOTH:
            zero = self._zero[pairs[0]] | self._zero[pairs[1]]
        first = self._new(pairs.shape[1], zero)
        self.joins.append(Join(first, pairs[0], pairs[1], alive))
        new = np.arange(first, first + pairs.shape[1])
        self.union.join(new, np.where(pairs[0] == DATA, pairs[1], pairs[0]))
        return new[index.reshape(a.shape)]

    # ---- parameters and constants

    def _constant(self, node: Node) -> Any:
        """An operator without channels among its operands: parameters on their way to channels are followed."""
        if not any(isinstance(x, Tensor) for x in node.operands) or any(isinstance(x, Ref) for x in node.operands):
            return None
        try:
            if node.op in ops.MOVES and node.op not in ops.INDEXED:
                return self._rectangular(self._move(node))
            return self._pointwise(node) if ops.is_pointwise(node) else None
        except (_NotFollowedError, RuntimeError, IndexError, TypeError, ValueError):
            return None

    def _made(self, node: Node) -> Any:
        """A tensor of zeros, or the like: it is made as large as the channels that it meets are many."""
        import torch

        sizes = [1 if n is BATCH else n for n in node.args[ops.FACTORIES[node.op]]]
        if len(sizes) < 2 or sizes[1] > ops.MOST_CONSTANT or not all(isinstance(n, int) and n > 0 for n in sizes):
            return None
        labels = self._fresh(sizes[1])
        return labels.reshape(-1, *[1] * (len(sizes) - 2)).expand(torch.Size(sizes))

    def _fresh(self, count: int) -> torch.Tensor:
        """New labels of what is no filter, and lives with the channels that it meets."""
        import torch

        first = self._new(count)
        self.constant_ranges.append((first, count))
        return torch.arange(first, first + count)

    def _known(self, operand: Any) -> torch.Tensor | None:
        """The value of an operand that is a constant, or a copy of one."""
        if isinstance(operand, Tensor):
            return self.trace.tensors[operand.name]
        node = self.trace.node(operand.name) if isinstance(operand, Ref) else None
        if node is not None and node.op in ops.UNCHANGED:
            return self._known(node.args[0])
        return None

    def _parameter(self, operand: Tensor) -> torch.Tensor | None:
        """Labels for every element of a parameter or buffer that is used elementwise."""
        if operand.name not in self.constants:
            value = self.trace.tensors[operand.name]
            if not 1 < value.numel() <= ops.MOST_CONSTANT or operand.name in self.trace.constants:
                return None
            self.constants[operand.name] = self._fresh(value.numel()).reshape(value.shape)
        return self.constants[operand.name]

    def _slice_constants(self, group: IntArray) -> None:
        """Along which dimension each parameter that met channels is cut with them."""
        size = np.bincount(group, minlength=group.size)
        for name, value in self.constants.items():
            labels = value.numpy()
            groups = group[labels]
            if (size[groups] == 1).all():
                continue
            for dim in range(groups.ndim):
                rest = np.moveaxis(groups, dim, 0).reshape(groups.shape[dim], -1)
                if groups.shape[dim] > 1 and (rest == rest[:, :1]).all() and (rest != rest[:1]).any():
                    self.slices[name, dim] = np.moveaxis(labels, dim, 0).reshape(groups.shape[dim], -1)[:, 0]

    def _slice(self, tensor: Any, dim: int, labels: IntArray) -> None:
        if not isinstance(tensor, Tensor):
            return
        known = self.slices.get((tensor.name, dim))
        if known is None:
            self.slices[tensor.name, dim] = labels.copy()
        elif not np.array_equal(known, labels):
            self.slices[tensor.name, dim] = self._joined(known, labels, _EITHER)

    # ---- rules

    def _move(self, node: Node) -> Any:
        """Run the operator itself on the labels."""
        import torch

        def value(x: Any) -> Any:
            if isinstance(x, Ref):
                labels = self.values.get(x.name)
                if labels is not None:
                    return labels
                shape = self._shape(x.name)
                return torch.zeros((), dtype=torch.int64).expand(shape)
            if isinstance(x, Tensor):
                return self.trace.tensors[x.name] if node.op in ops.INDEXED else self._labels_of_constant(x)
            if isinstance(x, tuple):
                return [value(item) for item in x]
            return -1 if x is BATCH else x

        if node.op in ops.UNCHANGED:
            return value(node.args[0])
        if node.op in ops.INDEXED:
            return self._indexed(node, value(node.args[0]))
        if node.op in ("channel_shuffle", "native_channel_shuffle"):
            return self._shuffled(value(node.args[0]), node.args[1])
        if node.op == "pixel_shuffle":
            return self._pixel_shuffled(value(node.args[0]), node.args[1])
        arguments = [value(x) for x in node.args]
        if node.op in ("expand", "expand_as", "broadcast_to"):
            return self._expanded_map(node, arguments)
        if node.op in ops.PADDING:
            return self._pad(node, arguments)
        if node.op in ("view", "reshape", "_unsafe_view", "unsafe_view"):  # labels are not stored as the values are
            return arguments[0].reshape([-1 if n is BATCH else n for n in node.shape])
        result = ops.overload(node)(*arguments, **{k: value(v) for k, v in node.kwargs.items() if k not in ops.PLACES})
        return tuple(result) if isinstance(result, list | tuple) else result

    def _indexed(self, node: Node, x: torch.Tensor) -> Any:
        """A choice along dimensions by indices that are known."""

        def known(index: Any) -> Any:
            if index is None or isinstance(index, int):
                return index
            if isinstance(index, tuple):
                return [known(one) for one in index]
            if (found := self._known(index)) is None:
                raise _NotFollowedError("its channels are chosen by data")
            return found

        return ops.overload(node)(x, *(known(a) for a in node.args[1:]), **node.kwargs)

    def _shuffled(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        grid = self._rectangular(x.reshape(x.shape[0], groups, -1, *x.shape[2:]))
        return _expanded(grid.transpose(1, 2).flatten(1, 2))

    def _pixel_shuffled(self, x: torch.Tensor, factor: int) -> torch.Tensor:
        """The channels that one channel of the result is made of are one group."""
        import torch

        cells = _compressed(x).movedim(-3, 0).reshape(x.shape[-3] // factor**2, -1)
        self.union.join(cells[:, :1].expand(cells.shape).reshape(-1).numpy(), cells.reshape(-1).numpy())
        return torch.pixel_shuffle(x.contiguous(), factor)

    def _expanded_map(self, node: Node, arguments: list[Any]) -> Any:
        """One channel that is repeated to meet many: it stays, and the copies live with what they meet."""
        x = arguments[0]
        result = ops.overload(node)(*arguments)
        single = result.dim() > 1 and not self._varies(x) and not self._is_data(x)
        if single and result.shape[1] > 1 and (x.dim() < result.dim() or x.shape[1] == 1):
            self._freeze([x], f"it is put onto many channels in {node.where}")
            labels = self._fresh(result.shape[1])
            self.copies.append((int(labels[0]), result.shape[1]))
            return labels.reshape(-1, *[1] * (result.dim() - 2)).expand(result.shape)
        return result

    def _labels_of_constant(self, operand: Tensor) -> torch.Tensor:
        import torch

        labels = self._parameter(operand)
        if labels is None:
            return torch.zeros((), dtype=torch.int64).expand(self.trace.tensors[operand.name].shape)
        return labels

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(1 if n is BATCH else n for n in self.trace.shape(Ref(name)))

    def _pad(self, node: Node, arguments: list[Any]) -> Any:
        """Constant padding puts labels of its own around the channels; other modes repeat what is there."""
        import torch
        import torch.nn.functional as F

        x, amounts = arguments[0], list(node.args[1])
        mode = node.args[2] if node.op == "pad" else "constant"
        if mode == "constant":
            padded = F.pad(x, amounts, value=-1)
            outside = padded < 0
            channels = [d for d in range(x.dim()) if d in self._varies(x)]
            grown = [d for d in channels if padded.shape[d] != x.shape[d]]
            if not grown:  # zeros at the borders of a plane belong to its channel
                inner = _compressed(x)
                if any(inner.shape[d] > 1 for d in range(x.dim()) if padded.shape[d] != x.shape[d]):
                    raise _NotFollowedError("its channels are padded")
                return inner.expand(
                    [n if d in channels else m for d, (n, m) in enumerate(zip(x.shape, padded.shape, strict=True))]
                )
            shape = [1] * x.dim()
            shape[grown[0]] = -1
            fresh = self._fresh(padded.shape[grown[0]]).reshape(shape).expand(padded.shape)
            return torch.where(outside, fresh, padded)
        labels = (
            F.pad(x.to(torch.float64), amounts, mode=mode)
            if node.op == "pad"
            else ops.overload(node)(x.to(torch.float64), *node.args[1:])
        )
        return labels.to(torch.int64)

    def _spatial(self, node: Node) -> Any:
        """Pooling and resizing: channels stay, positions do not matter as long as all have the same label."""
        x = self._of(node.args[0])
        rank = ops.SPATIAL[node.op]
        channel = x.dim() - rank - 1
        if any(isinstance(y, Ref) for y in node.args[1:]):
            raise _NotFollowedError("positions to look at are computed")
        if any(d > channel for d in self._varies(x)):
            raise _NotFollowedError("its channels lie along positions that are mixed")
        shape = [*x.shape[: channel + 1], *(1 if n is BATCH else n for n in self._node_shape(node)[channel + 1 :])]
        inner = x
        for dim in range(channel + 1, x.dim()):
            inner = self._joined_along(inner, dim)
        result = inner.expand(shape)
        return (result, None) if node.dtype == "tuple" else result

    def _node_shape(self, node: Node) -> tuple[int, ...]:
        if node.dtype != "tuple":
            return node.shape
        return next(u.shape for u in self.trace.users(node.name) if u.op == "getitem" and u.args[1] == 0)

    def _reduce(self, node: Node) -> Any:
        """A reduction over positions keeps the channels; one over channels mixes them."""
        x = self._of(node.args[0])
        dims = ops.reduced_dims(node, x.dim())
        if any(d in dims for d in self._varies(x)):
            raise _NotFollowedError("its channels are mixed")
        result = x
        keep = ops.keeps_dims(node)
        for dim in sorted(dims, reverse=True):
            result = self._joined_along(result, dim)
            result = result if keep else result.squeeze(dim)
        if node.op in ops.NOT_ZERO:
            result = self._not_zero(result)
        return (result,) * ops.REDUCTIONS[node.op] if node.dtype == "tuple" else result

    def _joined_along(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        """Labels made of all that lie along a dimension, which is then 1."""
        import torch

        small = _compressed(value)
        labels = small.narrow(dim, 0, 1)
        for i in range(1, small.shape[dim]):
            other = small.narrow(dim, i, 1)
            joined = self._joined(labels.reshape(-1).numpy(), other.reshape(-1).numpy(), _EITHER)
            labels = torch.from_numpy(joined).reshape(labels.shape)
        return labels.expand([1 if d == dim else n for d, n in enumerate(value.shape)])

    def _along(self, node: Node) -> Any:
        """Softmax and the like: channels stay apart unless they lie along the dimension."""
        x = self._of(node.args[0])
        if node.args[1] % x.dim() in self._varies(x):
            raise _NotFollowedError("its channels are mixed")
        return x if node.op == "cumsum" else self._not_zero(x)

    def _not_zero(self, value: torch.Tensor) -> torch.Tensor:
        """The same channels, whose values are not zero when they are dead."""
        import torch

        small = _compressed(value)
        labels, index = np.unique(small.numpy(), return_inverse=True)
        if labels.size == 1 and labels[0] == DATA:
            return value
        first = self._new(labels.size, np.zeros(labels.size, bool))
        self.joins.append(Join(first, labels, labels, _EITHER))
        new = np.arange(first, first + labels.size)
        self.union.join(new, labels)
        new[labels == DATA] = DATA
        return torch.from_numpy(new[index.reshape(small.shape)]).expand(value.shape)

    def _pointwise(self, node: Node) -> Any:
        """Labels that meet at an element are tied; a tensor of one channel that is put onto many is not."""
        import torch

        values: list[tuple[Any, torch.Tensor]] = []
        for x in node.operands:
            value = self._parameter(x) if isinstance(x, Tensor) else self.values.get(x.name)
            if value is None:
                value = self._value_or_data(x)
            values.append((x, value))
        shape = torch.Size(np.broadcast_shapes(*(tuple(v.shape) for _, v in values)))
        values = [(x, v.reshape((1,) * (len(shape) - v.dim()) + tuple(v.shape))) for x, v in values]
        varying = sorted({d for x, v in values for d in self._varies(v) if isinstance(x, Ref)})
        product = node.op in ops.PRODUCTS
        kept: list[torch.Tensor] = []
        for x, v in values:
            small = any(v.shape[d] == 1 and shape[d] > 1 for d in varying)
            if isinstance(x, Tensor) and all(v.shape[d] == 1 for d in varying) and (varying or v.numel() == 1):
                continue  # the same number for all channels
            if isinstance(x, Tensor) and x.name in self.constants:
                kept.append(v)
            elif self._is_data(v):
                if any(v.shape[d] > 1 for d in varying):
                    raise _NotFollowedError("its channels meet values that are no channels")
                if not product and varying:
                    raise _NotFollowedError("what is the same for all channels is added to its channels")
            elif small:
                self._freeze([v], f"it is put onto many channels in {node.where}")
                if not product:
                    raise _NotFollowedError("what is the same for all channels is added to its channels")
            elif not product and self._within(v, self.copies):
                raise _NotFollowedError("what is the same for all channels is added to its channels")
            else:
                kept.append(v)
        if not kept:
            return None
        result = kept[0].expand(shape)
        for other in kept[1:]:
            result = self._meet(result, other.expand(shape), product)
        if not ops.keeps_zero(node):
            result = self._not_zero(result)
        return result

    def _is_data(self, value: torch.Tensor) -> bool:
        small = _compressed(value)
        return small.numel() == 1 and int(small) == DATA

    def _meet(self, a: torch.Tensor, b: torch.Tensor, product: bool) -> torch.Tensor:
        import torch

        inner = [max(n, m) for n, m in zip(_compressed(a).shape, _compressed(b).shape, strict=True)]
        small_a, small_b = _compressed(a).expand(inner), _compressed(b).expand(inner)
        left, right = small_a.reshape(-1).numpy(), small_b.reshape(-1).numpy()
        mixed = (left == DATA) != (right == DATA)
        if mixed.any():
            self._freeze(
                [torch.from_numpy(np.concatenate([left[mixed], right[mixed]]))], "it meets values that are no channels"
            )
        alive = _EITHER
        if product:
            constant_a, constant_b = (self._within(x, self.constant_ranges) for x in (left, right))
            if constant_b:
                alive = _FIRST
            elif constant_a:
                left, right, alive = right, left, _FIRST
            else:
                zero_a, zero_b = bool(self._zero[left].all()), bool(self._zero[right].all())
                if zero_a and zero_b:
                    alive = _BOTH
                elif zero_a:
                    alive = _FIRST
                elif zero_b:
                    left, right, alive = right, left, _FIRST
        return torch.from_numpy(self._joined(left, right, alive).reshape(small_a.shape)).expand(a.shape)

    @staticmethod
    def _within(labels: Any, ranges: list[tuple[int, int]]) -> bool:
        """Whether all labels are of one of the ranges."""
        low, high = int(labels.min()), int(labels.max())
        return any(first <= low and high < first + count for first, count in ranges)

    def _batch_norm(self, node: Node) -> Any:
        x = self._of(node.args[0])
        labels = self._along_one(x, 1, "the dimension that is normalised")
        if any(self._of(y) is not None for y in node.args[1:5]):
            raise _NotFollowedError("it is a parameter of the normalisation")
        for tensor in node.args[1:5]:
            self._slice(tensor, 0, labels)
        self.norms[node.name] = Norm(self._owner(node), 0, labels)
        return x

    @staticmethod
    def _owner(node: Node) -> str:
        """The module of a normalisation: that of its tensors where the trace does not say."""
        own = [x.name.rpartition(".")[0] for x in node.args if isinstance(x, Tensor)]
        return node.module or (own[0] if own else "")

    def _group_norm(self, node: Node) -> Any:
        import torch

        x, groups = self._of(node.args[0]), node.args[1]
        labels = self._along_one(x, 1, "the dimension that is normalised")
        rows = labels.reshape(groups, -1)
        if groups == 1 or bool((labels == DATA).any()):
            raise _NotFollowedError("it is normalised across channels")
        self.union.join(np.broadcast_to(rows[:, :1], rows.shape).ravel(), rows.ravel())
        together = rows[:, 0]  # every channel of a group is made of the whole group
        for column in range(1, rows.shape[1]):
            together = self._joined(together, rows[:, column], _EITHER)
        labels = self._joined(rows.reshape(-1), np.repeat(together, rows.shape[1]), _EITHER)
        for tensor in node.args[2:4]:
            self._slice(tensor, 0, labels)
        self.norms[node.name] = Norm(self._owner(node), groups, labels)
        return torch.from_numpy(labels).reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape)

    def _layer_norm(self, node: Node) -> Any:
        x, size = self._of(node.args[0]), len(node.args[1])
        if any(d >= x.dim() - size for d in self._varies(x)):
            raise _NotFollowedError("it is normalised across channels")
        return self._not_zero(x)

    def _prelu(self, node: Node) -> Any:
        x, weight = self._of(node.args[0]), node.args[1]
        if isinstance(weight, Tensor) and self.trace.tensors[weight.name].numel() > 1:
            self._slice(weight, 0, self._along_one(x, min(1, x.dim() - 1), "the dimension of its slopes"))
        elif not isinstance(weight, Tensor):
            raise _NotFollowedError("its slopes are computed")
        return x

    def _matmul(self, node: Node) -> Any:
        a, b = (self._value_or_data(x) for x in node.args[:2])
        if a.dim() < 2 or b.dim() < 2:
            raise _NotFollowedError("its channels are mixed")
        letters = "".join(map(chr, range(ord("a"), ord("a") + max(a.dim(), b.dim()) - 2)))
        left, right = letters[len(letters) - a.dim() + 2 :] + "xy", letters[len(letters) - b.dim() + 2 :] + "yz"
        return self._contract([left, right], [a, b], letters + "xz", node)

    def _einsum(self, node: Node) -> Any:
        terms, arrow, result = node.args[0].replace(" ", "").partition("->")
        if not arrow or "." in terms:
            raise _NotFollowedError("its channels are mixed")
        return self._contract(terms.split(","), [self._value_or_data(x) for x in node.args[1]], result, node)

    def _value_or_data(self, operand: Any) -> torch.Tensor:
        import torch

        value = self._of(operand)
        if value is not None:
            assert isinstance(value, torch.Tensor)
            return value
        shape = self.trace.tensors[operand.name].shape if isinstance(operand, Tensor) else self._shape(operand.name)
        return torch.zeros((), dtype=torch.int64).expand(shape)

    def _contract(self, terms: list[str], values: list[torch.Tensor], result: str, node: Node) -> Any:
        """A sum of products: channels along one dimension that is left stay apart; those that are summed are mixed."""
        import torch

        varying = {term[d] for term, value in zip(terms, values, strict=True) for d in self._varies(value)}
        if len(varying) > 1 or not varying <= set(result):
            raise _NotFollowedError("its channels are mixed")
        letter = "".join(varying)
        labels: IntArray | None = None
        for term, value in zip(terms, values, strict=True):
            if not varying & set(term):
                self._freeze([value], f"it is put onto many channels in {node.where}")
                continue
            found = self._along_one(value, term.index(letter), "one dimension")
            if bool((found == DATA).any()):
                raise _NotFollowedError("its channels meet values that are no channels")
            labels = found if labels is None else self._joined(labels, found, _BOTH)
        if labels is None:
            raise _NotFollowedError("its channels are mixed")
        shape = [1 if n is BATCH else n for n in node.shape]
        at = result.index(letter)
        inner = torch.from_numpy(labels).reshape([-1 if d == at else 1 for d in range(len(shape))])
        return inner.expand([labels.size if d == at else n for d, n in enumerate(shape)])

    # ---- layers

    def _layer(self, node: Node) -> Any:
        """A convolution or linear layer: reads a label per input channel, and puts out one per filter."""
        import torch

        weight, bias = node.args[1], node.args[2]
        x = self._of(node.args[0])
        name = self.layers.get(weight.name) if isinstance(weight, Tensor) else None
        if name is None and x is not None and self._is_filter(node):
            return self._filtered(node, x)
        if name is None:
            return self._give_up(node, f"its output goes into {node.where}, which is no layer with a weight of its own")
        if isinstance(bias, Ref) or self._of(weight) is not None:
            return self._give_up(node, f"its output is a parameter of {node.where}")
        geometry = ops.Geometry.of(node, tuple(self.trace.tensors[weight.name].shape))
        dim = -1 if node.op == "linear" else self._value_rank(node) - geometry.spatial - 1
        try:
            read = np.zeros(geometry.inputs, np.int64) if x is None else self._along_one(x, dim, "its inputs")
        except _NotFollowedError as error:
            self._give_up(node, f"{error} in {node.where}")
            read = np.zeros(geometry.inputs, np.int64)
        known = name in self.first
        first = self.first.setdefault(name, 0 if known else self._new(geometry.filters))
        filters = np.arange(first, first + geometry.filters)
        if known:  # called before
            mixed = (self.inputs[name] == DATA) != (read == DATA)
            both = np.concatenate([self.inputs[name][mixed], read[mixed]])
            self._freeze(
                [torch.from_numpy(both)] if both.size else [], f"{node.where} reads it, and what is no channel"
            )
            read = self._joined(self.inputs[name], read, _EITHER)
        self.inputs[name] = read
        self._tie_groups(geometry, filters, read)
        for dimension, along in geometry.along(filters, read).items():
            self._slice(weight, dimension, along)
        self._slice(bias, 0, filters)
        shape = [1 if n is BATCH else n for n in node.shape]
        if x is not None and dim > 0:
            shape[0] = x.shape[0]
        labels = torch.from_numpy(filters)
        if node.op == "linear":
            return labels.expand(shape)
        return labels.reshape(-1, *[1] * geometry.spatial).expand(shape)

    def _is_filter(self, node: Node) -> bool:
        """Whether it is a depthwise convolution with a kernel that no layer owns, such as a blur's."""
        weight, bias = node.args[1:3]
        if node.op == "linear" or not self._is_constant(weight) or not (bias is None or self._is_constant(bias)):
            return False
        return ops.Geometry.of(node, self.trace.shape(weight)).whole_groups

    def _is_constant(self, operand: Any) -> bool:
        """Whether a value depends on no input."""
        if isinstance(operand, Tensor):
            return True
        node = self.trace.node(operand.name)
        return node is not None and all(self._is_constant(x) for x in node.operands)

    def _held(self, operand: Ref | Tensor | None) -> Tensor | None:
        """The parameter or buffer that an operand is, or is a copy of, when nothing else is made of it."""
        while isinstance(operand, Ref):
            node = self.trace.node(operand.name)
            operand = node.args[0] if node is not None and node.op in ops.UNCHANGED else None
        if operand is None or operand.name in self.trace.constants or not self._feeds_layers(operand.name):
            return None
        return operand

    def _feeds_layers(self, name: str) -> bool:
        """Whether a value, and its copies, go into layers alone."""
        return all(
            user.op in ops.LAYERS or (user.op in ops.UNCHANGED and self._feeds_layers(user.name))
            for user in self.trace.users(name)
        )

    def _filtered(self, node: Node, x: torch.Tensor) -> Any:
        """Every channel is filtered by itself. A kernel that the model holds is cut too; a computed one is not."""
        import torch

        weight, bias = node.args[1:3]
        geometry = ops.Geometry.of(node, self.trace.shape(weight))
        channel = x.dim() - geometry.spatial - 1
        try:
            read = self._along_one(x, channel, "its inputs")
        except _NotFollowedError as error:
            return self._give_up(node, f"{error} in {node.where}")
        out = np.repeat(read, geometry.filters // geometry.inputs)
        for operand, along in ((weight, read if geometry.transposed else out), (bias, out)):
            if (tensor := self._held(operand)) is not None:
                self.constants.pop(tensor.name, None)  # a copy of it is no parameter used elementwise
                self._slice(tensor, 0, along)
        shape = [1 if n is BATCH else n for n in node.shape]
        if channel:
            shape[0] = x.shape[0]
        result = torch.from_numpy(out).reshape(-1, *[1] * geometry.spatial).expand(shape)
        return result if bias is None else self._not_zero(result)

    def _value_rank(self, node: Node) -> int:
        return len(node.shape)

    def _tie_groups(self, geometry: ops.Geometry, filters: IntArray, read: IntArray) -> None:
        """What a grouped convolution ties: its groups stay alike, or go as a whole when they have one input each."""
        groups = geometry.groups
        if groups == 1:
            return
        inputs, outputs = read.reshape(groups, -1), filters.reshape(groups, -1)
        data = read == DATA
        if data.any() and (geometry.whole_groups or not data.all()):
            reason = "it is a grouped convolution of values that are no channels"
            number = self.reasons.setdefault(reason, len(self.reasons))
            self.marks.append((read[~data], number))
            if geometry.whole_groups:
                self.marks.append((filters, number))
        if geometry.whole_groups:
            self.union.join(np.broadcast_to(outputs[:, :1], outputs.shape).ravel(), outputs.ravel())
            self.union.join(inputs[:, 0], outputs[:, 0])
        else:
            for labels in (inputs, outputs):
                self.union.join(np.broadcast_to(labels[:1], labels.shape).ravel(), labels.ravel())


class _NotFollowedError(Exception):
    """The channels of a value cannot be followed through an operator; says why."""


def _compressed(value: torch.Tensor) -> torch.Tensor:
    """One slice along every dimension in which the tensor is only repeated."""
    for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if size > 1 and stride == 0:
            value = value.narrow(dim, 0, 1)
    return value


def _expanded(value: torch.Tensor) -> torch.Tensor:
    """The same labels, stored once where they are only repeated along a dimension."""
    shape, small = value.shape, _compressed(value)
    for dim in range(small.dim()):
        if small.shape[dim] > 1:
            first = small.narrow(dim, 0, 1)
            if bool((small == first).all()):
                small = first
    return small.contiguous().expand(shape)
