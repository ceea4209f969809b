"""Weights that are computed from other parameters, made plain."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["baked"]


def baked(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model in which weight_norm, spectral_norm and parametrizations are plain parameters.

    The model itself when it has none of them. The values are those of eval mode.
    """
    import torch
    from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    removers = {WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}

    def hooks(module: torch.nn.Module) -> list[object]:
        return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, tuple(removers))]

    if not any(parametrize.is_parametrized(module) or hooks(module) for module in model.modules()):
        return model
    modes = {name: module.training for name, module in model.named_modules()}
    computed = (x for module in model.modules() for x in vars(module).values() if isinstance(x, torch.Tensor))
    plain = copy.deepcopy(model, {id(x): x.detach().clone() for x in computed}).eval()
    for module in list(plain.modules()):
        if parametrize.is_parametrized(module):
            _unparametrize(module)
        for hook in hooks(module):
            removers[type(hook)](module, hook.name)  # type: ignore[attr-defined]
    for name, module in plain.named_modules():
        module.training = modes.get(name, False)
    return plain


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
