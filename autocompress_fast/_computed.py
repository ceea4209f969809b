"""Layers whose own forward computes the weight that they convolve with, and the plain layers that do the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["PlainLayer", "SameConv2d", "plain_layer"]

_CONV = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
# torch's function of every kind of layer, and the names of its arguments after input, weight and bias.
_FUNCTIONS: dict[type[nn.Module], tuple[Callable[..., torch.Tensor], tuple[str, ...]]] = {
    nn.Linear: (F.linear, ()),
    nn.Conv1d: (F.conv1d, _CONV),
    nn.Conv2d: (F.conv2d, _CONV),
    nn.Conv3d: (F.conv3d, _CONV),
    nn.ConvTranspose1d: (F.conv_transpose1d, _TRANSPOSED),
    nn.ConvTranspose2d: (F.conv_transpose2d, _TRANSPOSED),
    nn.ConvTranspose3d: (F.conv_transpose3d, _TRANSPOSED),
}
_MOST_SIZES = 8  # on which a layer and the plain one are compared


class SameConv2d(nn.Conv2d):
    """A convolution that pads with zeros to an output of ceil(size / stride), the odd row or column at the end.

    Example:
        >>> SameConv2d(1, 1, 3, stride=2)(torch.zeros(1, 1, 5, 8)).shape
        torch.Size([1, 1, 3, 4])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, P, ceil(H / stride), ceil(W / stride))."""
        amounts: list[int] = []
        for dim in (1, 0):  # F.pad takes the last dimension first
            size, stride = x.shape[2 + dim], self.stride[dim]
            window = self.dilation[dim] * (self.kernel_size[dim] - 1) + 1
            missing = max((-(-size // stride) - 1) * stride + window - size, 0)
            amounts += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, amounts))


@dataclass(frozen=True)
class PlainLayer:
    """A plain layer: its class, its parameters, and the settings that it has other than the module that it is for."""

    kind: type[nn.Module]
    weight: torch.Tensor
    bias: torch.Tensor | None
    settings: Mapping[str, Any]

    def put_into(self, module: nn.Module) -> None:
        """Turn the module into this layer, in place; its hooks stay."""
        trained = any(x is not None and x.requires_grad for x in module._parameters.values())
        for own in (module._parameters, module._buffers, module._modules):
            own.clear()
        vars(module).pop("forward", None)
        module.__class__ = self.kind
        for name, value in self.settings.items():
            setattr(module, name, value)
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            module.register_parameter(name, None if tensor is None else nn.Parameter(tensor.detach().clone(), trained))


def plain_layer(module: nn.Module) -> PlainLayer | None:
    """The plain layer that does the same as one that computes its weight; None for any other module.

    The layer is run on random inputs of several sizes. It must call torch's function once, with the same weight every
    time, which is not its parameter, and the plain layer must put out the same for all of them.
    """
    kind = next((one for one in _FUNCTIONS if isinstance(module, one)), None)
    if kind is None or _runs_code_of(kind, module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _same_as(copy.deepcopy(module).eval(), kind)
    except Exception:  # whatever the user's code raises for inputs that it does not expect
        return None


def _runs_code_of(kind: type[nn.Module], module: nn.Module) -> bool:
    same = all(getattr(type(module), n, None) is getattr(kind, n, None) for n in ("forward", "_conv_forward"))
    return (same or type(module) is SameConv2d) and "forward" not in vars(module)


def _same_as(module: nn.Module, kind: type[nn.Module]) -> PlainLayer | None:
    own = module.get_parameter("weight")
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    calls: list[_Call] = []
    for x in _samples(module, own):
        with (recorder := _Recorder(*_FUNCTIONS[kind])):
            y = module.forward(x)
        results.append((x, y))
        calls += recorder.calls
        first, last = calls[0], calls[-1]
        if len(calls) != len(results) or last.weight.shape != own.shape or last.weight.data_ptr() == own.data_ptr():
            return None
        if not torch.equal(first.weight, last.weight):  # it depends on the input, or on chance
            return None
    as_called = {} if kind is nn.Linear else {"padding_mode": "zeros", **first.settings}
    candidates: list[tuple[type[nn.Module], dict[str, Any]]] = [(kind, {}), (kind, as_called)]
    if kind is nn.Conv2d:
        candidates.append((SameConv2d, as_called))
    for cls, settings in candidates:
        layer, other = PlainLayer(cls, first.weight, first.bias, settings), copy.deepcopy(module)
        layer.put_into(other)
        if all(_equal(other.forward(x), y) for x, y in results):
            return layer
    return None


@dataclass(frozen=True)
class _Call:
    """What a forward called torch's function with."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    settings: Mapping[str, Any]


class _Recorder(TorchFunctionMode):
    """Records the calls of one function."""

    def __init__(self, function: Callable[..., torch.Tensor], names: tuple[str, ...]) -> None:
        super().__init__()
        self.function, self.names = function, names
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is self.function:
            given = {**dict(zip(("input", "weight", "bias", *self.names), args, strict=False)), **kwargs}
            rank = given["weight"].dim() - 2
            settings = {name: value for name, value in given.items() if name in self.names}
            for name, value in settings.items():
                if isinstance(value, int) and name != "groups":
                    settings[name] = (value,) * rank
            self.calls.append(_Call(given["weight"], given.get("bias"), settings))
        return func(*args, **kwargs)


def _samples(module: nn.Module, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Inputs of as many sizes as the stride has phases, and one more."""
    if isinstance(module, nn.Linear):
        shapes: list[tuple[int, ...]] = [(2, module.in_features)] * 2
    else:
        assert isinstance(module, nn.modules.conv._ConvNd)
        least = [
            d * (k - 1) + 1 + 2 * s for d, k, s in zip(module.dilation, module.kernel_size, module.stride, strict=True)
        ]
        steps = range(min(max(module.stride) + 1, _MOST_SIZES))
        shapes = [(2, module.in_channels, *(size + more for size in least)) for more in steps]
    for shape in shapes:
        yield torch.randn(shape, dtype=torch.float64).to(weight)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    if a.shape != b.shape:
        return False
    tolerance = torch.finfo(b.dtype).eps ** 0.75 * float(b.abs().max())
    return bool(((a - b).abs() <= tolerance).all())
