"""The networks of the pruning papers, by name; plain torch modules whose sizes are read from their layers alone."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from autocompress_fast.models.pretrained import Loaded, load_pretrained

__all__ = ["Loaded", "create", "input_shape", "load_pretrained", "names"]


@dataclass(frozen=True)
class _Entry:
    factory: str  # "module.class" of this package
    input_shape: tuple[int, int, int]
    classes: int
    fixed: Mapping[str, Any] = field(default_factory=dict)  # arguments that the name decides


_CIFAR, _IMAGENET = (3, 32, 32), (3, 224, 224)
_MODELS = {
    "lenet5": _Entry("lenet.LeNet5", (1, 28, 28), 10),
    "lenet300": _Entry("lenet.LeNet300", (1, 28, 28), 10),
    "lenet_digits": _Entry("lenet.DigitsNet", (1, 8, 8), 10),
    "vgg16": _Entry("vgg.VGG16", _CIFAR, 10),
    "resnet18": _Entry("resnet.ResNet", _CIFAR, 10, {"depth": 18, "stem": "cifar"}),
    **{f"resnet{n}": _Entry("resnet.CifarResNet", _CIFAR, 10, {"depth": n}) for n in (20, 32, 44, 56, 110)},
    "mobilenet_v2": _Entry("mobilenet.MobileNetV2", _CIFAR, 10, {"stem": "cifar"}),
    "alexnet": _Entry("vgg.AlexNet", _IMAGENET, 1000),
    "vgg16_imagenet": _Entry("vgg.VGG16ImageNet", _IMAGENET, 1000),
    "resnet18_imagenet": _Entry("resnet.ResNet", _IMAGENET, 1000, {"depth": 18, "stem": "imagenet"}),
    "resnet50": _Entry("resnet.ResNet", _IMAGENET, 1000, {"depth": 50, "stem": "imagenet"}),
    "mobilenet_v2_imagenet": _Entry("mobilenet.MobileNetV2", _IMAGENET, 1000, {"stem": "imagenet"}),
}


def names() -> tuple[str, ...]:
    """The names `create` knows.

    Example:
        >>> "lenet5" in names()
        True
    """
    return tuple(_MODELS)


def input_shape(name: str) -> tuple[int, int, int]:
    """(C, H, W) of the images that network `name` was made for.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> input_shape("lenet5")
        (1, 28, 28)
    """
    return _entry(name).input_shape


def create(name: str, *, classes: int | None = None, in_channels: int | None = None, **options: Any) -> nn.Module:
    """A new network, initialised from torch's global random generator (torch.manual_seed).

    Args:
        name: one of `names()`.
        classes: outputs; those of the papers' data set when not given.
        in_channels: channels of the images; likewise.
        options: what the network's class takes besides, for example shortcut="B" for the CIFAR ResNets.

    Raises:
        ValueError: an unknown name, or a number below 1.
        TypeError: an option that this network does not have.

    Example:
        >>> model = create("lenet5")
        >>> sum(p.numel() for p in model.parameters() if p.ndim > 1)
        430500
    """
    entry = _entry(name)
    sizes = {
        "classes": entry.classes if classes is None else classes,
        "in_channels": entry.input_shape[0] if in_channels is None else in_channels,
    }
    for what, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{what} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{what} must be 1 or more, got {value}")
    factory = _resolve(entry.factory)
    known = [key for key in inspect.signature(factory).parameters if key not in {*sizes, *entry.fixed}]
    for option in options:
        if option not in known:
            raise TypeError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    model: nn.Module = factory(**sizes, **entry.fixed, **options)
    return model


def __getattr__(name: str) -> object:
    if name not in ("Loaded", "load_pretrained"):
        raise AttributeError(f"module 'autocompress_fast.models' has no attribute {name!r}")
    return _resolve(f"pretrained.{name}")


def _resolve(path: str) -> Any:
    """Import "module.name" of this package, and torch with it."""
    module, _, name = path.partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _entry(name: str) -> _Entry:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(_MODELS)}")
    return _MODELS[name]
