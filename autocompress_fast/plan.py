"""Plans: what is kept of every layer, as kept filters, columns and single weights, and as 0/1 masks on a model."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from autocompress_fast import ops
from autocompress_fast._baked import baked, check_plain
from autocompress_fast._files import write_atomically
from autocompress_fast.graph.operators import oriented
from autocompress_fast.trace import check_unwrapped

if TYPE_CHECKING:
    import torch

    from autocompress_fast.graph import Report

__all__ = ["LayerPlan", "Plan", "mask"]

BoolArray = npt.NDArray[np.bool_]

_FORMAT_VERSION = 1
_HooksT = TypeVar("_HooksT", bound="Hooks")
_MOST_SIZES = 2**26  # filters and columns of all layers of a file; more are no network's


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What is kept of one layer's weight, seen as the GEMM matrix P x K (K = C/groups * KH * KW).

    A weight is kept where its filter, its column and its element are.

    Args:
        shape: of the weight: (P, C/groups, ...).
        filters: (P,) bool.
        columns: (groups * K,) bool; the i-th block of K belongs to the i-th block of P / groups filters.
        elements: bool of `shape` for irregular pruning, None when every weight of kept filters and columns is kept.
        groups: of a grouped convolution.
        transposed: of a transposed convolution, whose weight is (C, P/groups, ...).

    Raises:
        ValueError: sizes that do not fit together.
    """

    shape: tuple[int, ...]
    filters: BoolArray
    columns: BoolArray
    elements: BoolArray | None = None
    groups: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"a weight has at least 2 dimensions of size 1 or more, got shape {shape}")
        if self.groups < 1 or shape[0] % self.groups:
            raise ValueError(f"groups must divide the {shape[0]} filters, got {self.groups}")
        width = math.prod(shape[1:])
        expected = {"filters": (shape[0],), "columns": (self.groups * width,), "elements": shape}
        object.__setattr__(self, "shape", shape)
        for field, size in expected.items():
            value = getattr(self, field)
            if value is None and field == "elements":
                continue
            array = value if _is_fixed(value) else np.array(value, dtype=bool)
            if array.shape != size:
                raise ValueError(f"{field} of a weight {shape} must have shape {size}, got {array.shape}")
            array.setflags(write=False)
            object.__setattr__(self, field, array)

    @classmethod
    def dense(cls, shape: tuple[int, ...], groups: int = 1, *, transposed: bool = False) -> LayerPlan:
        """The plan that keeps everything."""
        width = math.prod(shape[1:])
        return cls(shape, np.ones(shape[0], bool), np.ones(groups * width, bool), None, groups, transposed)

    @classmethod
    def from_mask(cls, mask: npt.ArrayLike, groups: int = 1) -> LayerPlan:
        """The plan of a 0/1 mask of the weight's shape: filters and columns without any kept weight are dropped."""
        kept = np.asarray(mask) != 0
        if kept.ndim < 2 or kept.size == 0 or groups < 1 or kept.shape[0] % groups:
            raise ValueError(f"a mask must have at least 2 dimensions and {groups} groups, got shape {kept.shape}")
        plan = cls(kept.shape, *filled(kept, groups), None, groups)
        return plan if np.array_equal(plan.mask(), kept) else replace(plan, elements=kept)

    def mask(self) -> BoolArray:
        """True where a weight is kept, in the weight's shape."""
        rows = self.filters.reshape(self.groups, -1, 1)
        columns = self.columns.reshape(self.groups, 1, -1)
        kept = (rows & columns).reshape(self.shape)
        return kept if self.elements is None else kept & self.elements

    def weight_mask(self) -> BoolArray:
        """True where a weight is kept, as the weight of the layer lies: (C, P/groups, ...) when it is transposed."""
        kept: BoolArray = oriented(self.mask(), self.groups, transposed=self.transposed)
        return kept

    def used(self) -> tuple[BoolArray, BoolArray]:
        """(P,) filters and (groups * K,) columns in which any weight is kept."""
        return self._used

    @cached_property
    def _used(self) -> tuple[BoolArray, BoolArray]:
        rows, columns = self.filters.reshape(self.groups, -1), self.columns.reshape(self.groups, -1)
        if self.elements is None:
            found = (rows & columns.any(axis=1, keepdims=True), columns & rows.any(axis=1, keepdims=True))
        else:
            found = filled(self.mask(), self.groups)
        used = found[0].ravel(), found[1].ravel()
        for array in used:
            array.setflags(write=False)
        return used

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight: `shape`, or (C, P/groups, ...) when it is transposed."""
        filters, inputs, *kernel = self.shape
        return (inputs * self.groups, filters // self.groups, *kernel) if self.transposed else self.shape

    @cached_property
    def weights(self) -> int:
        """Number of weights kept."""
        if self.elements is not None:
            return int(self.mask().sum())
        rows = self.filters.reshape(self.groups, -1).sum(axis=1)
        return int((rows * self.columns.reshape(self.groups, -1).sum(axis=1)).sum())

    @property
    def dense_weights(self) -> int:
        """Number of weights there were."""
        return math.prod(self.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerPlan):
            return NotImplemented
        return self.shape == other.shape and self.groups == other.groups and np.array_equal(self.mask(), other.mask())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        kind = "" if self.elements is None else ", irregular"
        return (
            f"LayerPlan({self.shape}: {int(self.filters.sum())} filters, {int(self.columns.sum())} columns{kind}, "
            f"{self.weights} of {self.dense_weights} weights)"
        )


class Plan(Mapping[str, LayerPlan]):
    """What is kept, per layer; a read-only mapping from the layer's module path to its `LayerPlan`.

    Layers that the plan does not name are kept whole. A dropped filter takes its bias along, and everything else that
    lives and dies with it (`tied`): it puts out nothing.

    Args:
        layers: what is kept of each.
        tied: other parameter, such as the weight of a normalisation -> (dimension, bool: what is kept along it).
        held: layers that were excluded, or not selected: `compact` leaves them as they are, too.

    Plans are equal when they keep the same of the same layers and parameters, and hold the same layers.

    Example:
        >>> import numpy as np
        >>> plan = Plan.from_masks({"conv1": np.array([[1, 0, 1], [0, 0, 0]])})
        >>> plan["conv1"].filters.tolist(), plan["conv1"].columns.tolist(), plan.weights
        ([True, False], [True, False, True], 2)
    """

    def __init__(
        self,
        layers: Mapping[str, LayerPlan],
        tied: Mapping[str, tuple[int, BoolArray]] | None = None,
        held: Iterable[str] = (),
    ) -> None:
        for name, layer in layers.items():
            if not isinstance(name, str) or not isinstance(layer, LayerPlan):
                raise TypeError(f"a plan maps layer names to LayerPlan, got {name!r}: {type(layer).__name__}")
        self._layers = dict(layers)
        self.parameters = {name: (int(dim), np.array(kept, bool)) for name, (dim, kept) in (tied or {}).items()}
        self.held = frozenset(held)

    def __getitem__(self, name: str) -> LayerPlan:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        same = self._layers == other._layers and self.held == other.held
        return same and _listed(self.parameters) == _listed(other.parameters)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Plan(\n" + "".join(f"  {name}: {layer!r}\n" for name, layer in self.items()) + ")"

    @property
    def weights(self) -> int:
        """Number of weights kept in the layers that the plan names."""
        return sum(layer.weights for layer in self.values())

    @property
    def dense_weights(self) -> int:
        """Number of weights there were in the layers that the plan names."""
        return sum(layer.dense_weights for layer in self.values())

    @classmethod
    def dense(cls, report: Report) -> Plan:
        """The plan that keeps everything of the layers of `report`."""
        return cls(
            {
                layer.name: LayerPlan.dense(layer.shape, layer.groups, transposed=layer.transposed)
                for layer in report.layers
            }
        ).tied(report)

    @classmethod
    def uniform(cls, report: Report, *, filters: float = 0.0, columns: float = 0.0) -> Plan:
        """The same share of filters and columns removed wherever that is possible, the smallest norms first.

        Filters that are tied go together, those whose joint norm is smallest. The share of columns is that of the
        columns that are left without those of dropped filters.

        Args:
            report: of `acf.inspect`.
            filters, columns: shares removed, 0 <= share < 1; at least one filter and one column stay.

        Raises:
            ValueError: a share outside of the range, NaN or infinity in a weight.

        Example:
            >>> import torch
            >>> from autocompress_fast.graph import inspect
            >>> model = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 5))
            >>> plan = Plan.uniform(inspect(model, torch.zeros(1, 2, 8, 8)), filters=0.5, columns=0.25)
            >>> [(int(layer.filters.sum()), int(layer.columns.sum())) for layer in plan.values()]
            [(4, 14), (5, 108)]
        """
        for name, share in (("filters", filters), ("columns", columns)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} is the share removed, 0 <= share < 1, got {share}")
        kept = {layer.name: np.ones(layer.shape[0], bool) for layer in report.layers}
        weights = {layer.name: report.weight(layer.name) for layer in report.layers}
        norms = {name: ops.group_norms(weight, "filter").double().numpy() for name, weight in weights.items()}
        for tied in report.sets:
            joint = tied.joint(norms)
            chosen = np.append(
                tied.chosen(joint, max(1, round(tied.size * (1 - filters)))), True
            )  # [-1]: frozen filters
            for positions in tied.readers.values():
                if not chosen[positions].any():  # nobody is left without anything to read
                    chosen[positions[np.argmax(joint[positions])]] = True
            for name in tied.layers:
                kept[name] &= chosen[tied.rows[name]]
        alive = report.channels.alive(kept)
        layers = {}
        for layer in report.layers:
            living, chosen = report.living_columns(alive, layer.name), np.ones(layer.columns, bool)
            if layer.columns_prunable and columns:
                matrix = weights[layer.name].double().flatten(1).numpy()[kept[layer.name]]
                count = max(1, round(int(living.sum()) * (1 - columns)))
                chosen = largest(np.where(living, np.linalg.norm(matrix, axis=0), -1.0), count)
            layers[layer.name] = LayerPlan(
                layer.shape, kept[layer.name], chosen & living, None, layer.groups, layer.transposed
            )
        return cls(layers).tied(report)

    def tied(self, report: Report) -> Plan:
        """The same plan with all that `report` finds tied to the dropped filters, and the layers that it holds.

        Such are the normalisations behind them. Layers that the report does not have stay as they are.
        """
        channels = report.channels
        filters = {
            layer.name: self[layer.name].filters if layer.name in self else np.ones(layer.shape[0], bool)
            for layer in report.layers
        }
        lives = channels.lives(channels.alive(filters))
        tied = {}
        for (name, dim), labels in report.tied_parameters.items():
            kept = lives[labels]
            if not kept.all():
                tied[name] = (dim, kept)
        return Plan(self, tied, report.held)

    @classmethod
    def from_masks(cls, masks: Mapping[str, Any], *, groups: Mapping[str, int] | None = None) -> Plan:
        """The plan of 0/1 masks (numpy or torch) in the shapes of the layers' weights; `groups` of grouped layers.

        Raises:
            ValueError: a mask without two dimensions, or with filters that the groups do not divide.
        """
        arrays = {name: np.asarray(m.detach().cpu() if hasattr(m, "detach") else m) for name, m in masks.items()}
        return cls({name: LayerPlan.from_mask(m, (groups or {}).get(name, 1)) for name, m in arrays.items()})

    def masks(self) -> dict[str, BoolArray]:
        """True where a weight is kept, per layer, in the weights' shapes."""
        return {name: layer.weight_mask() for name, layer in self.items()}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: kept filters and columns as indices, elements as packed bits in base64.

        Raises:
            OSError: the file cannot be written; one that was there stays as it was.
        """
        layers = {name: _to_json(layer) for name, layer in self.items()}
        content = {
            "autocompress_fast.plan": _FORMAT_VERSION,
            "layers": layers,
            "tied": _listed(self.parameters),
            "held": sorted(self.held),
        }
        text = json.dumps(content, indent=1)
        write_atomically(path, text.encode())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            ValueError: the file is no plan; the message names the file and the fault.
            OSError: the file cannot be read.
        """
        text = Path(path).read_bytes()
        try:
            content = json.loads(text)
            if not isinstance(content, dict) or content.get("autocompress_fast.plan") != _FORMAT_VERSION:
                raise ValueError(f'expected "autocompress_fast.plan": {_FORMAT_VERSION} at the top level')
            held = content.get("held", [])
            if not isinstance(held, list) or not all(isinstance(name, str) for name in held):
                raise ValueError(f'"held" must be a list of names, got {held!r:.100}')
            return cls(_layers_from_json(content.get("layers")), _tied_from_json(content.get("tied", {})), held)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a plan: {error}") from error


def filled(kept: BoolArray, groups: int) -> tuple[BoolArray, BoolArray]:
    """(P,) filters and (groups * K,) columns with anything in a mask of the weight's shape."""
    blocks = kept.reshape(groups, kept.shape[0] // groups, -1)
    return blocks.any(axis=2).ravel(), blocks.any(axis=1).ravel()


def _is_fixed(array: object) -> bool:
    """Whether it is an array of another plan, which nobody changes; all others are copied."""
    return isinstance(array, np.ndarray) and array.dtype == bool and array.base is None and not array.flags.writeable


def largest(norms: npt.NDArray[np.float64], count: int) -> BoolArray:
    """Which `count` are the largest; of equal ones, the first."""
    chosen = np.zeros(norms.size, bool)
    chosen[np.argsort(-norms, kind="stable")[:count]] = True
    return chosen


def mask(model: torch.nn.Module, plan: Plan) -> torch.nn.Module:
    """A copy of `model`, same shapes, with zeros where `plan` keeps nothing.

    A dropped filter also loses its bias and its scale and shift in the normalisations that the plan ties to it.

    Raises:
        ValueError: the plan names a layer that the model does not have, has in another shape, or computes.

    Example:
        >>> import numpy as np, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3))
        >>> masked = mask(model, Plan.from_masks({"0": np.array([[1, 0], [0, 0], [1, 0]])}))
        >>> (masked[0].weight != 0).tolist(), (masked[0].bias != 0).tolist()
        ([[True, False], [False, False], [True, False]], [True, False, True])
    """
    import copy

    plain = baked(model)
    check_fits(plain, plan)
    masked = copy.deepcopy(plain) if plain is model else plain
    apply_masks(masked, plan)
    return masked


def check_fits(model: torch.nn.Module, plan: Plan) -> None:
    """Raise ValueError unless every layer of `plan` is a layer of `model` with a weight of that shape."""
    check_unwrapped(model)
    modules = dict(model.named_modules())
    for name, layer in plan.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise ValueError(f"the plan names {name!r}, which is no layer with a weight; layers: {_weighted(modules)}")
        check_plain("the plan", name, modules[name])
        if "weight" not in modules[name]._parameters:
            raise ValueError(f"the plan names {name!r}, whose weight is no parameter but computed")
        if tuple(weight.shape) != layer.weight_shape:
            raise ValueError(
                f"the plan of {name!r} is for a weight {layer.weight_shape}, the model's has {tuple(weight.shape)}"
            )
    for name, (dim, kept) in plan.parameters.items():
        path, _, attribute = name.rpartition(".")
        value = getattr(modules.get(path), attribute, None)
        shape = tuple(getattr(value, "shape", ()))
        if dim >= len(shape) or shape[dim] != kept.size:
            raise ValueError(f"the plan ties {name!r} of size {kept.size} in dimension {dim}, the model's has {shape}")


def apply_masks(model: torch.nn.Module, plan: Plan) -> None:
    """Zero, in place, the weights that `plan` drops and the biases of dropped filters."""
    import torch

    with torch.no_grad():
        for parameter, kept in _parameter_masks(model, plan):
            parameter.masked_fill_(~kept, 0)


class Hooks:
    """Hooks on a model and its optimizer, as a context."""

    _handles: Sequence[Any]

    def remove(self) -> None:
        """Detach from model and optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self: _HooksT) -> _HooksT:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class MaskedParameters(Hooks):
    """Keeps the dropped weights of a model at zero while any optimizer trains it.

    The dropped weights get no gradient, and after every step they are set to zero again, whatever weight decay or
    momentum from before did to them. Use as a context, or call `remove` when done.

    Args:
        model: trained in place by the caller's loop.
        plan: what is kept.
        optimizer: the optimizer that trains the model.

    Raises:
        ValueError: the plan does not fit the model; nothing is changed then.

    Example:
        >>> import numpy as np, torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> net = torch.nn.Sequential(model)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> with MaskedParameters(net, Plan.from_masks({"0": np.array([[1, 0]])}), optimizer):
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         net(torch.ones(4, 2)).sum().backward()
        ...         optimizer.step()
        >>> (model.weight != 0).tolist()
        [[True, False]]
    """

    def __init__(self, model: torch.nn.Module, plan: Plan, optimizer: torch.optim.Optimizer) -> None:
        import torch

        check_fits(model, plan)
        apply_masks(model, plan)
        pairs = [(parameter, kept) for parameter, kept in _parameter_masks(model, plan) if not bool(kept.all())]
        self._parameters: list[torch.Tensor] = [parameter for parameter, _ in pairs]
        self._factors = [kept.to(parameter.dtype) for parameter, kept in pairs]
        gradient = [
            parameter.register_post_accumulate_grad_hook(_Multiply(factor))  # type: ignore[no-untyped-call]
            for parameter, factor in zip(self._parameters, self._factors, strict=True)
        ]

        def zero_again(*_: object) -> None:
            if self._parameters:
                with torch.no_grad():
                    torch._foreach_mul_(self._parameters, self._factors)

        self._handles = [*gradient, optimizer.register_step_post_hook(zero_again)]


class FixedParameters(Hooks):
    """Keeps some values of a model's parameters as they are while any optimizer trains the rest.

    They get no gradient, and after every step they are what they were when this began. Use as a context, or call
    `remove` when done.

    Args:
        model: trained in place by the caller's loop.
        fixed: parameter, by its name in the model -> bools of its shape: which values stay.
        optimizer: the optimizer that trains the model.

    Raises:
        ValueError: an unknown parameter, or another shape; nothing is changed then.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> before = model.weight.tolist()[0]
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        >>> with FixedParameters(model, {"weight": torch.tensor([[True, False]])}, optimizer):
        ...     model(torch.ones(4, 2)).sum().backward()
        ...     optimizer.step()
        >>> [now == was for now, was in zip(model.weight.tolist()[0], before)]
        [True, False]
    """

    def __init__(
        self, model: torch.nn.Module, fixed: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        import torch

        parameters = dict(model.named_parameters())
        for name, stays in fixed.items():
            if name not in parameters:
                raise ValueError(f"fixed names {name!r}, which is no parameter of the model")
            if stays.shape != parameters[name].shape:
                raise ValueError(f"fixed is {tuple(stays.shape)} for {name!r} of {tuple(parameters[name].shape)}")
        self._parameters: list[torch.Tensor] = [parameters[name] for name in fixed]
        self._factors = [
            torch.empty_like(p, requires_grad=False).copy_(~stays.to(p.device))
            for p, stays in zip(self._parameters, fixed.values(), strict=True)
        ]
        with torch.no_grad():
            self._values = [p - p * factor for p, factor in zip(self._parameters, self._factors, strict=True)]

        def put_back(*_: object) -> None:
            if self._parameters:
                with torch.no_grad():
                    torch._foreach_mul_(self._parameters, self._factors)
                    torch._foreach_add_(self._parameters, self._values)

        hooks = [
            parameter.register_post_accumulate_grad_hook(_Multiply(factor))  # type: ignore[no-untyped-call]
            for parameter, factor in zip(self._parameters, self._factors, strict=True)
        ]
        self._handles = [*hooks, optimizer.register_step_post_hook(put_back)]


class _Multiply:
    """Gradient hook: gradient times mask."""

    def __init__(self, factor: torch.Tensor) -> None:
        self.factor = factor

    def __call__(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.mul_(self.factor)


def _parameter_masks(model: torch.nn.Module, plan: Plan) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(parameter, bool mask) for the weights, the biases, and everything else that lives and dies with filters."""
    import torch

    for name, layer in plan.items():
        module = model.get_submodule(name)
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, torch.nn.Parameter)
        yield weight, torch.from_numpy(layer.weight_mask()).to(weight.device)
        if isinstance(bias, torch.nn.Parameter):
            yield bias, torch.from_numpy(layer.filters.copy()).to(bias.device)
    for name, (dim, kept) in plan.parameters.items():
        path, _, attribute = name.rpartition(".")
        parameter = getattr(model.get_submodule(path), attribute)
        if isinstance(parameter, torch.nn.Parameter):  # statistics and other buffers stay
            along = torch.from_numpy(kept).reshape([-1 if d == dim else 1 for d in range(parameter.dim())])
            yield parameter, along.expand(parameter.shape).to(parameter.device)


def _weighted(modules: Mapping[str, torch.nn.Module]) -> str:
    names = [name for name, module in modules.items() if getattr(module, "weight", None) is not None]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _to_json(layer: LayerPlan) -> dict[str, Any]:
    content: dict[str, Any] = {
        "shape": list(layer.shape),
        "groups": layer.groups,
        "transposed": layer.transposed,
        "filters": _indices(layer.filters),
        "columns": _indices(layer.columns),
    }
    if layer.elements is not None:
        content["elements"] = base64.b64encode(np.packbits(layer.elements).tobytes()).decode()
    return content


def _indices(kept: BoolArray) -> list[int]:
    found: list[int] = np.flatnonzero(kept).tolist()
    return found


def _listed(parameters: Mapping[str, tuple[int, BoolArray]]) -> dict[str, dict[str, Any]]:
    return {n: {"dim": dim, "of": kept.size, "kept": _indices(kept)} for n, (dim, kept) in parameters.items()}


def _tied_from_json(content: Any) -> dict[str, tuple[int, BoolArray]]:
    if not isinstance(content, dict):
        raise ValueError(f'"tied" must be an object, got {type(content).__name__}')
    tied, total = {}, 0
    for name, value in content.items():
        dim, size = (value.get(key) if isinstance(value, dict) else None for key in ("dim", "of"))
        if type(dim) is not int or not 0 <= dim < 16 or type(size) is not int or size < 1:
            raise ValueError(f"tied {name!r} must have a dim of 0 to 15 and a positive size, got {value!r:.100}")
        total += size
        if total > _MOST_SIZES:
            raise ValueError(f"the parameters up to {name!r} have {total} entries, allowed are {_MOST_SIZES}")
        tied[name] = dim, _from_indices(value.get("kept"), size, f"kept of {name!r}")
    return tied


def _from_indices(index: Any, length: int, what: str) -> BoolArray:
    if not isinstance(index, list) or not all(type(i) is int and 0 <= i < length for i in index):
        raise ValueError(f"{what} must be a list of indices from 0 to {length - 1}")
    kept = np.zeros(length, bool)
    kept[index] = True
    return kept


def _layers_from_json(content: Any) -> dict[str, LayerPlan]:
    """The layers of a file; every size is checked before anything of that size is made."""
    if not isinstance(content, dict):
        raise ValueError(f'"layers" must be an object, got {type(content).__name__}')
    total = 0
    for name, layer in content.items():
        if not isinstance(layer, dict):
            raise ValueError(f"layer {name!r} must be an object, got {type(layer).__name__}")
        total += sum(_sizes(name, layer).values())
        if total > _MOST_SIZES:
            raise ValueError(f"the layers up to {name!r} have {total} filters and columns, allowed are {_MOST_SIZES}")
    return {name: _from_json(name, layer) for name, layer in content.items()}


def _sizes(name: str, content: Mapping[str, Any]) -> dict[str, int]:
    """Number of filters and of columns, after checking shape and groups."""
    shape, groups = content.get("shape"), content.get("groups")
    if not isinstance(shape, list) or not 2 <= len(shape) <= 16 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"shape of layer {name!r} must be 2 to 16 positive ints, got {shape!r:.100}")
    if type(groups) is not int or groups < 1 or shape[0] % groups:
        raise ValueError(f"groups of layer {name!r} must divide its {shape[0]} filters, got {groups!r:.100}")
    return {"filters": shape[0], "columns": groups * math.prod(shape[1:])}


def _from_json(name: str, content: Mapping[str, Any]) -> LayerPlan:
    shape, transposed = tuple(content["shape"]), content.get("transposed", False)
    sizes = _sizes(name, content)
    kept = {what: _from_indices(content.get(what), size, f"{what} of layer {name!r}") for what, size in sizes.items()}
    if not isinstance(transposed, bool):
        raise ValueError(f"transposed of layer {name!r} must be true or false, got {transposed!r:.100}")
    elements = None
    if "elements" in content:
        size = math.prod(shape)
        text = content["elements"]
        bits = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        if len(bits) != (size + 7) // 8:
            raise ValueError(f"elements of layer {name!r} must be {size} bits in base64, got {len(bits)} bytes")
        elements = np.unpackbits(np.frombuffer(bits, np.uint8), count=size).astype(bool).reshape(shape)
    return LayerPlan(shape, kept["filters"], kept["columns"], elements, content["groups"], transposed)
