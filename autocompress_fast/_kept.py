"""Convolutions and poolings of a training step by the native kernels, which compute what is kept and nothing else.

Their tensors lie with the images innermost, and the channels of a pixel side by side: strides (1, N, W * C * N, C * N)
for (N, C, H, W). What torch computes of such a tensor element by element keeps the layout, so that a network of
convolutions, activations and poolings changes it at its ends alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from autocompress_fast import _core
from autocompress_fast.plan import Plan

_Numbers = NDArray[np.int32]
_Pair = tuple[int, int]

# Measured by bench/bench_training.py: with more than this share of the weights of its layers kept, a network is as fast
# or faster by torch; layers of at most so many channels or filters always are faster by the kernels.
_MOST_KEPT = 0.6
_MOST_KEPT_BESIDE_BFLOAT16 = 0.3  # the same where torch may compute in bfloat16 with instructions for it
_THIN = 8
_FEWEST_IMAGES = 32  # of a batch; they are rounded up to two registers
_MOST_VALUES = 2**30  # of a tensor; the kernels count in 32 bits, of images rounded up


class KeptKernels(TorchFunctionMode):
    """Inside the context, `model` is trained over what the plan keeps.

    All is left to torch where it is faster: where most is kept, and in networks with grouped convolutions, which the
    kernels do not have, as what changes from one layout to the other costs time. So are layers of other types than
    float32, on other devices, and small batches. Results differ from those of torch by rounding; they do not depend on
    the number of threads.

    Args:
        model: its convolutions are found by their weights.
        plan: what of them is kept; what is not must be zero.

    Attributes:
        beats_bfloat16: whether so little is kept that this is quicker, too, than torch in bfloat16.
    """

    def __init__(self, model: nn.Module, plan: Plan | None) -> None:
        super().__init__()
        self._kept: dict[int, tuple[_Numbers, _Numbers]] = {}
        for name, layer in (plan or {}).items():
            weight = getattr(model.get_submodule(name), "weight", None)
            if isinstance(weight, torch.Tensor) and weight.ndim == 4 and layer.groups == 1 and not layer.transposed:
                mask = layer.mask().reshape(len(layer.filters), -1)
                self._kept[id(weight)] = _numbers(mask.any(axis=1)), _numbers(mask.any(axis=0))
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        shares = [self._share(layer.weight) for layer in layers]
        grouped = any(layer.groups > 1 for layer in layers)
        mean = sum(shares) / len(shares) if layers and not grouped else math.inf
        self._active = mean <= _MOST_KEPT
        self.beats_bfloat16 = mean <= _MOST_KEPT_BESIDE_BFLOAT16

    def _of(self, weight: torch.Tensor) -> tuple[_Numbers, _Numbers]:
        kept = self._kept.get(id(weight))
        return (_all(weight.shape[0]), _all(weight[0].numel())) if kept is None else kept

    def _share(self, weight: torch.Tensor) -> float:
        """Of the weights that are kept; of a thin layer, none counts."""
        filters, columns = self._of(weight)
        thin = min(len(filters), weight.shape[1]) <= _THIN
        return 0.0 if thin else len(filters) * len(columns) / weight.numel()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """`func`, or what stands for it."""
        kwargs = kwargs or {}
        if not self._active:
            return func(*args, **kwargs)
        if func is torch.conv2d:
            convolution = self._convolution(*args, **kwargs)
            return func(*args, **kwargs) if convolution is None else convolution
        if func is F.max_pool2d or func is torch.max_pool2d:
            pooled = _pooled(*args, **kwargs)
            return func(*args, **kwargs) if pooled is None else pooled
        if func is F.batch_norm:
            normalised = _normalised(*args, **kwargs)
            return func(*args, **kwargs) if normalised is None else normalised
        return func(*args, **kwargs)

    def _convolution(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor | None:
        if groups != 1 or isinstance(padding, str) or not _ours(x, weight) or x.shape[0] < _FEWEST_IMAGES:
            return None
        layer = _Layer(*self._of(weight), _pair(stride), _pair(padding), _pair(dilation))
        sizes = layer.out_sizes(x.shape[2:], weight.shape[2:])
        if x.shape[1] != weight.shape[1] or min(sizes) < 1:
            return None  # torch says what is wrong
        if max(x.numel(), weight.shape[0] * math.prod(sizes) * x.shape[0]) > _MOST_VALUES:
            return None
        return _Convolution.apply(x, weight, bias, layer)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class _Layer:
    filters: _Numbers
    columns: _Numbers
    stride: _Pair
    padding: _Pair
    dilation: _Pair

    def out_sizes(self, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
        window = zip(sizes, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(size + 2 * pad - apart * (width - 1) - 1) // step + 1 for size, width, step, pad, apart in window]

    def arguments(self) -> dict[str, Any]:
        return {**vars(self), "threads": torch.get_num_threads()}


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: _Layer
    ) -> torch.Tensor:
        """(N, C, H, W), (P, C, KH, KW) -> (N, P, H', W')."""
        inner, weight = _images_inside(x), weight.contiguous()
        out = _empty(x.shape[0], weight.shape[0], *layer.out_sizes(x.shape[2:], weight.shape[2:]))
        start = None if bias is None else bias.contiguous()
        _core.conv_forward(inner, weight, start, _images_inside(out), **layer.arguments())
        ctx.save_for_backward(inner, weight)
        ctx.bias, ctx.layer = bias is not None, layer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Of x, the weight and the bias."""
        inner, weight = ctx.saved_tensors
        gradient, arguments = _images_inside(gradients[0]), ctx.layer.arguments()
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = torch.empty_like(inner)
            _core.conv_input_gradient(gradient, weight, of_x, **arguments)
            of_x = _images_first(of_x)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_weight = torch.empty_like(weight)
            of_bias = weight.new_empty(weight.shape[0]) if ctx.bias else None
            _core.conv_weight_gradient(inner, gradient, of_weight, of_bias, **arguments)
        return of_x, of_weight, of_bias, None


def _pooled(
    x: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> torch.Tensor | None:
    kernel = _pair(kernel_size)
    if ceil_mode or return_indices or _pair(dilation) != (1, 1) or kernel[0] * kernel[1] > 256:
        return None
    if not (_ours(x) and _lies_inside(x)):
        return None
    window = _Window(kernel, _pair(stride) if stride else kernel, _pair(padding))
    if min(window.out_sizes(x.shape[2:])) < 1 or any(2 * p > k for p, k in zip(window.padding, kernel, strict=True)):
        return None  # torch says what is wrong
    return _MaxPool.apply(x, window)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class _Window:
    kernel: _Pair
    stride: _Pair
    padding: _Pair

    def out_sizes(self, sizes: Sequence[int]) -> list[int]:
        window = zip(sizes, self.kernel, self.stride, self.padding, strict=True)
        return [(size + 2 * pad - width) // step + 1 for size, width, step, pad in window]

    def arguments(self) -> dict[str, Any]:
        return {**vars(self), "threads": torch.get_num_threads()}


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, window: _Window) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        inner = _images_inside(x)
        out = _empty(*x.shape[:2], *window.out_sizes(x.shape[2:]))
        ctx.at = _core.max_pool_forward(inner, _images_inside(out), **window.arguments())
        ctx.window, ctx.shape = window, inner.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Of x."""
        gradient = _images_inside(gradients[0])
        of_x = gradient.new_empty(ctx.shape)
        _core.max_pool_gradient(gradient, ctx.at, of_x, **ctx.window.arguments())
        return _images_first(of_x), None


def _normalised(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor | None:
    if not (training and _ours(x) and _lies_inside(x)) or x.numel() == x.shape[1]:
        return None
    if any(t is not None and t.dtype != torch.float32 for t in (running_mean, running_var, weight, bias)):
        return None
    out, mean, variance = _BatchNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    count = x.numel() // x.shape[1]
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean, momentum)
        if running_var is not None:
            running_var.lerp_(variance * (count / (count - 1)), momentum)
    return out  # type: ignore[no-any-return]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, C, H, W) -> the same, mean and variance of (C,)."""
        inner = _images_inside(x)
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        out, mean, variance = _empty(*x.shape), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        _core.batch_norm_forward(inner, weight, bias, eps, _images_inside(out), mean, variance, torch.get_num_threads())
        ctx.save_for_backward(inner, weight, mean, variance)
        ctx.eps, ctx.affine = eps, (weight is not None, bias is not None)
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Of x, the weight and the bias."""
        inner, weight, mean, variance = ctx.saved_tensors
        gradient = _images_inside(gradients[0])
        of_x, of_weight, of_bias = torch.empty_like(inner), torch.empty_like(mean), torch.empty_like(mean)
        _core.batch_norm_gradient(
            inner, gradient, weight, mean, variance, ctx.eps, of_x, of_weight, of_bias, torch.get_num_threads()
        )
        affine = (g if there else None for g, there in zip((of_weight, of_bias), ctx.affine, strict=True))
        return _images_first(of_x), *affine, None


def _ours(*tensors: torch.Tensor) -> bool:
    """Images and a weight that the kernels take."""
    return not torch.is_autocast_enabled("cpu") and all(
        t.ndim == 4 and t.dtype == torch.float32 and t.device.type == "cpu" and 0 < t.numel() <= _MOST_VALUES
        for t in tensors
    )


def _empty(images: int, channels: int, height: int, width: int) -> torch.Tensor:
    """(N, C, H, W) with the images inside. Not a view: what a function returns may be changed in place."""
    strides = (1, images, width * channels * images, channels * images)
    return torch.empty_strided((images, channels, height, width), strides, dtype=torch.float32)


def _lies_inside(x: torch.Tensor) -> bool:
    """As these kernels leave a tensor; those of torch are quicker for others."""
    return x.permute(2, 3, 1, 0).is_contiguous()


def _images_inside(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (H, W, C, N), contiguous."""
    return x.detach().permute(2, 3, 1, 0).contiguous()


def _images_first(x: torch.Tensor) -> torch.Tensor:
    """(H, W, C, N) -> (N, C, H, W), the same memory."""
    return x.permute(3, 2, 0, 1)


def _pair(value: Any) -> _Pair:
    first, second = (value, value) if isinstance(value, int) else (value[0], value[-1])
    return int(first), int(second)


def _numbers(kept: Any) -> _Numbers:
    return np.flatnonzero(kept).astype(np.int32)


def _all(count: int) -> _Numbers:
    return np.arange(count, dtype=np.int32)
