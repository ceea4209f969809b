"""Weights that are computed from other parameters, made plain."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["baked", "check_plain", "computed", "copied"]


def baked(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model in which every weight that is computed from parameters is a plain parameter.

    These are weight_norm, spectral_norm and other parametrizations, and layers whose own forward computes the weight
    that it convolves with, such as weight standardisation. The copy has torch's own layers in their place, with the
    values of eval mode, and computes the same. Train this copy where weights are to be pruned during training.

    Returns:
        the copy; the model itself when nothing in it is computed.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3)))
        >>> plain = baked(model)
        >>> sorted(plain.state_dict()), torch.allclose(plain(torch.ones(1, 2)), model(torch.ones(1, 2)))
        (['0.bias', '0.weight'], True)
    """
    from torch.nn.utils import parametrize

    from autocompress_fast._computed import plain_layer

    if not computed(model):
        return model
    modes = {name: module.training for name, module in model.named_modules()}
    plain = copied(model).eval()
    for module in list(plain.modules()):
        if parametrize.is_parametrized(module):
            _unparametrize(module)
        for remove, hook in _hooks(module):
            remove(module, hook.name)
        if (layer := plain_layer(module)) is not None:
            layer.put_into(module)
    for name, module in plain.named_modules():
        module.training = modes.get(name, False)
    return plain


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """A copy, also of a model that keeps tensors with a graph, which copy.deepcopy refuses."""
    import torch

    kept = (x for module in model.modules() for x in vars(module).values() if isinstance(x, torch.Tensor))
    return copy.deepcopy(model, {id(x): x.detach().clone() for x in kept})


def computed(model: torch.nn.Module) -> tuple[str, ...]:
    """The modules of which a weight is computed from parameters."""
    from torch.nn.utils import parametrize

    from autocompress_fast._computed import plain_layer

    return tuple(
        name
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module) or any(_hooks(module)) or plain_layer(module) is not None
    )


def check_plain(what: str, name: str, module: torch.nn.Module) -> None:
    """Raise ValueError when what the layer computes with is not its parameter `weight`, but computed from it."""
    if computed(module)[:1] == ("",):
        raise ValueError(
            f"{what} names {name!r}, whose weight is no parameter but computed in its {type(module).__name__}: "
            f"use acf.baked(model), in which it is one"
        )


def _hooks(module: torch.nn.Module) -> Iterator[tuple[Any, Any]]:
    """The hooks that compute a weight before each call, with what removes them."""
    from torch.nn.utils import remove_spectral_norm, remove_weight_norm
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    removers = {WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}
    for hook in list(module._forward_pre_hooks.values()):
        if type(hook) in removers:
            yield removers[type(hook)], hook


def _unparametrize(module: torch.nn.Module) -> None:
    """Plain parameters and the class from before; torch's own removal would change the class of the original, too."""
    import torch

    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
    trained = {
        name: any(p.requires_grad for p in module.get_submodule(f"parametrizations.{name}").parameters())
        for name in values
    }
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, torch.nn.Parameter(value, trained[name]))
