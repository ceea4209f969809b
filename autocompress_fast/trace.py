"""A torch model as a flat list of operators.

`trace` runs the model symbolically (``torch.export``) in eval mode and returns plain, immutable records: no torch
graph, no proxies. The channel graph and the engine's lowering both read a `Trace`: what one sees, the other sees.
"""

from __future__ import annotations

import copy
import io
import itertools
import logging
import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

__all__ = ["BATCH", "Input", "Node", "Ref", "Tensor", "Trace", "TraceError", "trace"]


class TraceError(ValueError):
    """The model cannot be read as a graph of operators; the message has the cause."""


class _BatchSize(int):
    """An int (-1) that stands for any size that changes with the batch, told apart from a literal -1 by its type."""

    def __repr__(self) -> str:
        return "BATCH"

    __str__ = __repr__


BATCH: Final = _BatchSize(-1)
"""The size of a dimension that depends on the batch size, in shapes and arguments: ``shape == (BATCH, 64, 8, 8)``."""


@dataclass(frozen=True)
class Ref:
    """The value of an earlier node, or an input, by name."""

    name: str


@dataclass(frozen=True)
class Tensor:
    """A parameter, buffer or constant of the model: a key of `Trace.tensors`."""

    name: str


@dataclass(frozen=True)
class Input:
    """An input of the model. ``shape[0]`` is `BATCH` when the traced graph holds for every batch size."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Node:
    """One operator call.

    Attributes:
        name: unique name of the value.
        op: short name without overload and without the underscore of in-place forms: "conv2d", "add", "max_pool2d".
        target: the operator in full, "aten.conv2d.default".
        args: positional arguments, filled up with the schema's defaults, so that ``args[i]`` exists for every argument
            of the schema: `Ref` and `Tensor` for tensors, tuples for lists, plain values otherwise.
        kwargs: keyword-only arguments that were given.
        shape, dtype: of the value; ``()`` and "tuple" for an operator with several results, which "getitem" nodes pick.
        module: path of the `torch.nn.Module` whose forward made the call, "" for the model itself.
        source: "file.py:12 in forward" when known, else "".
    """

    name: str
    op: str
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: str
    module: str
    source: str

    @property
    def operands(self) -> tuple[Ref | Tensor, ...]:
        """Every `Ref` and `Tensor` among the arguments, in order, nested lists included."""
        return tuple(_operands((self.args, *self.kwargs.values())))

    @property
    def where(self) -> str:
        """The call for an error message: "aten.gelu.default in features.3 (net.py:12 in forward)"."""
        module = f" in {self.module}" if self.module else ""
        return self.target + module + (f" ({self.source})" if self.source else "")


@dataclass(frozen=True)
class Trace:
    """A model in eval mode as operators in execution order.

    Attributes:
        inputs: the model's inputs.
        outputs: its results, flattened when the model returns a tuple, list or dict.
        nodes: in execution order: every `Ref` points backwards. Nodes without users may occur.
        tensors: parameters, buffers and constants under their state_dict names; detached, sharing the model's memory.
        aliases: for a tensor with several names, each further name -> the one used in `nodes` and `tensors`.
        dynamic_batch: whether the trace holds for every batch size or for that of the example alone.
        constants: which of the tensors are no parameters or buffers, but made by the model's code.
        structure: how the outputs make up what the model returns (a pytree spec); None for a single tensor.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[Ref | Tensor, ...]
    nodes: tuple[Node, ...]
    tensors: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    dynamic_batch: bool
    constants: frozenset[str] = frozenset()
    structure: Any = None

    @cached_property
    def _users(self) -> dict[str, tuple[Node, ...]]:
        users: dict[str, dict[str, Node]] = {}
        for node in self.nodes:
            for operand in node.operands:
                users.setdefault(operand.name, {})[node.name] = node
        return {name: tuple(nodes.values()) for name, nodes in users.items()}

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    def users(self, name: str) -> tuple[Node, ...]:
        """Return the nodes that read the value or tensor `name`, in order; empty when none does."""
        return self._users.get(name, ())

    def shape(self, operand: Ref | Tensor) -> tuple[int, ...]:
        """Return the shape of a value or a tensor."""
        if isinstance(operand, Tensor):
            return tuple(self.tensors[operand.name].shape)
        known = self._by_name.get(operand.name) or next(x for x in self.inputs if x.name == operand.name)
        return known.shape

    def node(self, name: str) -> Node | None:
        """Return the node of that name; None for an input or a tensor."""
        return self._by_name.get(name)


def trace(model: torch.nn.Module, example_input: torch.Tensor | Sequence[torch.Tensor]) -> Trace:
    """Read `model` as a flat list of operators.

    A copy of the model is traced in eval mode; the model, its modes and its tensors are left as they are. The batch
    dimension (the first of every input) is kept free where the model allows that.

    Args:
        model: any `torch.nn.Module` that `torch.export` can read.
        example_input: a tensor, or a sequence of them for a model with several inputs; shape and dtype count alone.

    Raises:
        TraceError: the model cannot be copied or exported; says why.
        ValueError: the model is wrapped in DistributedDataParallel.
        TypeError: `model` is no module, or `example_input` no tensor or sequence of tensors.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
    >>> result = trace(net, torch.zeros(1, 1, 8, 8))
    >>> [(node.op, node.shape, node.module) for node in result.nodes]
    [('conv2d', (BATCH, 4, 6, 6), '0'), ('relu', (BATCH, 4, 6, 6), '1')]
    >>> result.nodes[0].args[1]
    Tensor(name='0.weight')
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    check_unwrapped(model)
    inputs = (example_input,) if isinstance(example_input, torch.Tensor) else example_input
    if not isinstance(inputs, Sequence) or not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise TypeError(f"example_input must be a tensor or a sequence of tensors, not {type(example_input).__name__}")
    with _quiet():
        exported, dynamic = _export(model, tuple(inputs))
    return _Reader(model, exported).read(dynamic)


def check_unwrapped(model: torch.nn.Module) -> None:
    """Raise ValueError when `model` is what synchronises a network's gradients, not the network."""
    import torch

    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel: call it to train, and pass the network in it, ddp.module"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Export warns, logs and prints about its own internals, which says nothing to the user."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)


def _export(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, bool]:
    import torch

    name = type(model).__name__
    try:
        frozen = copy.deepcopy(model).eval()
    except Exception as error:
        raise TraceError(f"cannot trace {name}: it cannot be copied: {_cause(error)}") from error
    # no_grad: a model that switches gradients off itself would otherwise hide that part in a nested graph.
    with torch.no_grad():
        try:
            if all(x.dim() > 0 and x.shape[0] == inputs[0].shape[0] > 0 for x in inputs):
                # A batch of one would be taken as a constant; two of the same are as good an example.
                samples = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in inputs)
                shapes = [{0: torch.export.Dim("batch")} for _ in samples]
                try:
                    free = torch.export.export(frozen, samples, dynamic_shapes=shapes, strict=False)
                    return _functional(free), True
                except Exception:  # something in the model binds it to one batch size: that of the example
                    pass
            return _functional(torch.export.export(frozen, inputs, strict=False)), False
        except Exception as error:
            try:  # a model whose code looks at its data: the path that it takes for the example
                return _Recorded(frozen, inputs), False
            except Exception:
                raise TraceError(f"cannot trace {name}: {_cause(error)}") from error


class _Recorded:
    """The operators that a model calls for one example, recorded while it runs on it."""

    def __init__(self, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        import torch
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.utils._pytree import tree_flatten

        structure: list[Any] = []

        def run(*arguments: torch.Tensor) -> Any:
            flat, spec = tree_flatten(model(*arguments))
            structure.append(spec)
            return flat

        module = make_fx(run, pre_dispatch=True, tracing_mode="real", _error_on_data_dependent_ops=False)(*inputs)
        if _writes_through_views(module.graph):
            plain = torch.func.functionalize(run, remove="mutations_and_views")
            module = make_fx(plain, tracing_mode="real", _error_on_data_dependent_ops=False)(*inputs)
        self.graph, self.spec = module.graph, structure[-1]
        for node in reversed(list(self.graph.nodes)):  # what only decided about the path
            mutable = getattr(getattr(node.target, "_schema", None), "is_mutable", True)
            if node.op == "call_function" and not node.users and not mutable:
                self.graph.erase_node(node)
        named, _ = _named_tensors(model)
        names = {(value.data_ptr(), value.shape, value.stride()): name for name, value in named.items()}
        self.attributes: dict[str, str] = {}  # of the recording -> tensor's name
        self.constants: dict[str, torch.Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                value = getattr(module, node.target)
                name = names.get((value.data_ptr(), value.shape, value.stride()))
                if name is None:
                    self.constants[node.target] = value
                self.attributes[node.target] = name or node.target


def _cause(error: Exception) -> str:
    """The first line that says something, in one sentence."""
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {next((line for line in lines if line), 'no message')}"


def _functional(exported: Any) -> Any:
    """Rewrite without in-place operators where one writes through a view.

    Export hands the result of an in-place operator to whoever reads that tensor later, so that plain ``relu_`` and
    ``add_`` read as if they were out of place. A write into a slice changes its base behind the graph's back.
    """
    return exported.run_decompositions({}) if _writes_through_views(exported.graph) else exported


def _writes_through_views(graph: Any) -> bool:
    views: set[Any] = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        aliased = [x for x, a in zip(node.args, schema.arguments, strict=False) if a.alias_info is not None]
        if not aliased:
            continue
        if schema.is_mutable:
            if node.target.__name__.startswith("detach_"):
                continue
            if any(x in views for x in aliased):
                return True
        else:
            views.update(aliased, (node,))
    return False


class _Reader:
    """Turns an exported program into a `Trace`."""

    def __init__(self, model: torch.nn.Module, exported: Any) -> None:
        self.exported = exported
        self.tensors, self.aliases = _named_tensors(model)
        self.constants: list[str] = []
        for name, value in exported.constants.items():
            if name not in self.tensors and name not in self.aliases:
                self.tensors[name] = value.detach()
                self.constants.append(name)
        self.values: dict[Any, Any] = {}  # graph node -> what stands for it in the trace
        self.taken = set(self.tensors) | set(self.aliases)

    def read(self, dynamic: bool) -> Trace:
        recorded = self.exported.attributes if isinstance(self.exported, _Recorded) else {}
        signature = None if isinstance(self.exported, _Recorded) else self.exported.graph_signature
        specs = [] if signature is None else signature.input_specs
        targets = {s.arg.name: s.target for s in specs if s.target is not None}
        inputs: list[Input] = []
        nodes: list[Node] = []
        outputs: tuple[Any, ...] = ()
        nested = getattr(self.exported, "graph_module", None)
        for node in self.exported.graph.nodes:
            if node.op == "placeholder" and node.name in targets:
                self.values[node] = Tensor(self.aliases.get(targets[node.name], targets[node.name]))
            elif node.op == "placeholder":
                shape, dtype = _meta(node)
                inputs.append(Input(self._name(node), shape, dtype))
            elif node.op == "output":
                # Changes of the model's own buffers come back as outputs too.
                results = self._value(node.args[0])
                kinds = (
                    [spec.kind.name for spec in signature.output_specs] if signature else ["USER_OUTPUT"] * len(results)
                )
                outputs = tuple(x for x, kind in zip(results, kinds, strict=True) if kind == "USER_OUTPUT")
            elif node.op == "get_attr" and node.target in recorded:
                self.values[node] = Tensor(recorded[node.target])
            else:
                nodes.extend(self._calls(node, nested))
        if not outputs or not all(isinstance(x, Ref | Tensor) for x in outputs):
            raise TraceError(f"the model must return tensors, not {outputs}")
        spec = self.exported.spec if signature is None else self.exported.call_spec.out_spec
        return Trace(
            tuple(inputs),
            outputs,
            tuple(_merge_batch_norm(nodes)),
            self.tensors,
            self.aliases,
            dynamic,
            frozenset(self.constants),
            None if spec is None or spec.is_leaf() else spec,
        )

    def _calls(self, node: Any, owner: Any) -> Iterator[Node]:
        """What a node stands for: an operator, nothing, or the operators of a graph that `owner` holds for it."""
        if node.op == "get_attr":
            if not all(_is_region(user) for user in node.users):
                raise TraceError(f"the model branches on data or calls a nested graph ({node.target}): not supported")
        elif _is_region(node):
            position = next(i for i, x in enumerate(node.args) if getattr(x, "op", "") == "get_attr")
            inner = getattr(owner, node.args[position].target)
            if _writes_through_views(inner.graph):
                raise TraceError(f"the model writes through views in a nested graph ({node.args[position].target})")
            arguments = iter(node.args[position + 1 :])
            for one in inner.graph.nodes:
                if one.op == "placeholder":
                    self.values[one] = self._value(next(arguments))
                elif one.op == "output":
                    self.values[node] = self._value(one.args[0])
                else:
                    yield from self._calls(one, inner)
        elif node.target is operator.getitem and _is_region(node.args[0]):
            self.values[node] = self.values[node.args[0]][node.args[1]]
        elif _is_number(node):
            self.values[node] = _size(node.meta["val"])
        elif node.users:
            yield self._node(node)

    def _name(self, node: Any) -> str:
        name = node.name
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        self.values[node] = Ref(name)
        return str(name)

    def _node(self, node: Any) -> Node:
        args, kwargs = self._value(node.args), dict(self._value(node.kwargs))
        if node.target is operator.getitem:
            op = target = "getitem"
        else:
            target = str(node.target)
            # "aten.add_.Tensor" -> "add"; a leading underscore belongs to the name.
            op = re.sub(r"(?<=[^_])_$", "", target.split(".")[1] if "." in target else target)
            args = self._all_arguments(node, args, kwargs)
        shape, dtype = _meta(node)
        module = _module_path(node.meta.get("nn_module_stack"))
        if isinstance(self.exported, _Recorded):  # which says nothing of modules
            owners = [x.name.rpartition(".")[0] for x in args if isinstance(x, Tensor) and x.name not in self.constants]
            module = owners[0] if owners else ""
        return Node(self._name(node), op, target, args, kwargs, shape, dtype, module, _source(node))

    def _all_arguments(self, node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Positional arguments by the schema: those given, those given by keyword (moved), and the defaults."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return args
        rest = [a for a in schema.arguments if not a.kwarg_only][len(args) :]
        return (*args, *(kwargs.pop(a.name, self._value(a.default_value)) for a in rest))

    def _value(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.fx.Node):
            return self.values[value]
        if isinstance(value, list | tuple):
            return tuple(self._value(x) for x in value)
        if isinstance(value, Mapping):
            return {key: self._value(x) for key, x in value.items()}
        return _size(value)


def _named_tensors(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, value in named:
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value.detach()
    return tensors, aliases


def _operands(value: Any) -> Iterator[Ref | Tensor]:
    if isinstance(value, Ref | Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _operands(item)


def _size(value: Any) -> Any:
    """A symbolic number (a function of the batch size) as `BATCH`; anything else as it is."""
    import torch

    return BATCH if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _is_region(node: Any) -> bool:
    """Whether it calls a nested graph that is a part of the code where a switch has no effect on what is computed."""
    if getattr(node.target, "_name", "") == "wrap_with_autocast":
        return not node.args[2]
    return getattr(node.target, "_name", "") == "wrap_with_set_grad_enabled"


def _is_number(node: Any) -> bool:
    import torch

    number = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(node.meta.get("val"), number)


def _meta(node: Any) -> tuple[tuple[int, ...], str]:
    import torch

    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return (), "tuple"
    return tuple(_size(n) for n in value.shape), str(value.dtype).removeprefix("torch.")


def _module_path(stack: Mapping[str, Any] | None) -> str:
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return re.sub(r"@\d+", "", path).removeprefix("L['self']").lstrip(".")


def _source(node: Any) -> str:
    """The innermost line of the user's own code."""
    import torch

    torch_code = (str(Path(torch.__file__).parent), "torch/")
    frames = re.findall(r'File "(.*?)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(torch_code)]
    if not own:
        return ""
    file, line, function = own[-1]
    return f"{Path(file).name}:{line} in {function}"


def _merge_batch_norm(nodes: list[Node]) -> Iterator[Node]:
    """Functional rewriting turns batch_norm into a call with three results of which the first is used: put it back."""
    split = {n.name: n for n in nodes if n.op == "_native_batch_norm_legit_no_training"}
    for node in nodes:
        if node.op == "getitem" and node.args[0].name in split:
            call = split[node.args[0].name]
            *tensors, momentum, eps = call.args
            args = (*tensors, False, momentum, eps, False)
            op, target = "batch_norm", "aten.batch_norm.default"
            yield replace(node, op=op, target=target, args=args, module=call.module, source=call.source)
        elif node.name not in split:
            yield node
