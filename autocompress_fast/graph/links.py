"""From a layer's output to the one layer that reads it: where a filter's whole effect can be followed.

A filter can be cut out when its output goes, channel by channel, to exactly one layer. Everything else (residual adds,
concatenations, several readers, grouped readers, operators that mix channels) freezes the filters of the layer, and
nothing else, with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autocompress_fast.trace import Node, Ref, Tensor, Trace

__all__ = ["LAYERS", "Frozen", "Link", "follow"]

LAYERS = ("conv1d", "conv2d", "conv3d", "linear")

# Applied to every value, or to every channel, by itself; a channel that is constant stays constant.
_PER_CHANNEL = frozenset(
    [
        "relu",
        "relu6",
        "hardtanh",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "softplus",
        "mish",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "clone",
        "contiguous",
        "detach",
        "identity",
    ]
)
# Operators that keep channels apart as long as these are the second dimension: op -> rank of the value then.
_RANKS = {
    "linear": 2,
    **{f"conv{n}d": n + 2 for n in (1, 2, 3)},
    **{f"{kind}pool{n}d": n + 2 for n in (1, 2, 3) for kind in ("max_", "avg_", "adaptive_avg_")},
}
_RESHAPES = frozenset(("flatten", "view", "reshape"))


@dataclass(frozen=True)
class Link:
    """A layer's filters become channels of `consumer`.

    Attributes:
        consumer: module path of the layer that reads the output.
        positions: inputs of the consumer for each filter, in a row: H*W after a flatten, 1 for a convolution.
        norms: module paths of the batch normalisations on the way.
    """

    consumer: str
    positions: int
    norms: tuple[str, ...]


@dataclass(frozen=True)
class Frozen:
    """The layer's filters cannot be cut out; why."""

    reason: str


def follow(trace: Trace, layer: Node, names: dict[str, str]) -> Link | Frozen:
    """Follow the output of `layer`; `names` maps a weight's tensor name to the module path of its layer."""
    if len(layer.shape) != _RANKS[layer.op]:
        return Frozen(f"its output has {len(layer.shape)} dimensions; its filters are not the second one")
    outputs = {operand.name for operand in trace.outputs}
    value, positions = layer, 1
    norms: list[str] = []
    while True:
        if value.name in outputs:
            return Frozen("it is an output of the model" if value is not layer else "it is the output layer")
        users = trace.users(value.name)
        if len(users) != 1:
            where = ", ".join(user.op for user in users)
            return Frozen(f"its output goes to {len(users)} operators ({where})" if users else "its output is unused")
        (user,) = users
        if user.args[0] != Ref(value.name) or sum(op == Ref(value.name) for op in user.operands) != 1:
            return Frozen(f"its output is not the first operand of {user.where}")
        if user.op in _RANKS and len(value.shape) != _RANKS[user.op]:
            return Frozen(f"its output goes into {user.where} with {len(value.shape)} dimensions")
        if user.op in LAYERS:
            return _reader(user, names, positions, tuple(norms))
        if user.op == "batch_norm":
            if positions > 1:
                return Frozen(f"its output is reshaped before {user.where}")
            if not _owns_its_state(trace, user):
                return Frozen(f"{user.where} shares its parameters, or has no running statistics of its own")
            norms.append(user.module)
        elif user.op in _RESHAPES:
            before, after = value.shape, user.shape
            # BATCH stands for any multiple of the batch size too, so the other dimension decides.
            if len(after) != 2 or after[1] != math.prod(before[1:]):
                return Frozen(f"{user.where} reshapes {before} to {after}")
            positions *= math.prod(before[2:])
        elif user.op not in _PER_CHANNEL and user.op not in _RANKS and not _pads_with_values(user):
            return Frozen(f"its output goes into {user.where}")
        value = user


def _pads_with_values(pad: Node) -> bool:
    """Whether it pads positions by reflection, repetition or wrapping: a constant channel stays constant."""
    return pad.op == "pad" and pad.args[2] != "constant" and len(pad.args[1]) <= 2 * (len(pad.shape) - 2)


def _owns_its_state(trace: Trace, norm: Node) -> bool:
    """Whether a batch_norm reads the running statistics, weight and bias of its own module, and nobody else does."""
    for operand, name in zip(norm.args[1:5], ("weight", "bias", "running_mean", "running_var"), strict=True):
        if operand is None and name in ("weight", "bias"):
            continue
        path = f"{norm.module}.{name}"
        if operand != Tensor(path) or len(trace.users(path)) != 1 or path in trace.aliases.values():
            return False
    return True


def _reader(user: Node, names: dict[str, str], positions: int, norms: tuple[str, ...]) -> Link | Frozen:
    weight = user.args[1]
    if not isinstance(weight, Tensor) or weight.name not in names:
        return Frozen(f"its output goes into {user.where}, whose weight is no plain parameter of one layer")
    if user.op != "linear" and user.args[6] != 1:
        return Frozen(f"its output goes into {user.args[6]} groups of {user.where}")
    return Link(names[weight.name], positions, norms)
