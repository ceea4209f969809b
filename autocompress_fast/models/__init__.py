"""The networks of the pruning papers, by name; plain torch modules whose sizes are read from their layers alone."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["create", "input_shape", "names"]


@dataclass(frozen=True)
class _Entry:
    factory: str  # "module.function or class" below this package
    input_shape: tuple[int, int, int]
    classes: int
    fixed: tuple[tuple[str, Any], ...] = ()

    def load(self) -> Callable[..., nn.Module]:
        module, _, name = self.factory.partition(".")
        factory = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return functools.partial(factory, **dict(self.fixed))


_MODELS = {
    "lenet5": _Entry("lenet.LeNet5", (1, 28, 28), 10),
    "lenet_digits": _Entry("lenet.DigitsNet", (1, 8, 8), 10),
    "lenet300": _Entry("lenet.LeNet300", (1, 28, 28), 10),
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
    factory = entry.load()
    known = [key for key in inspect.signature(factory).parameters if key not in (*sizes, *dict(entry.fixed))]
    for option in options:
        if option not in known:
            raise TypeError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return factory(**sizes, **options)


def _entry(name: str) -> _Entry:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(_MODELS)}")
    return _MODELS[name]
