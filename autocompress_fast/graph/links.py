"""From a layer's output to the one layer that reads it: where a filter's whole effect can be followed.

A filter can be cut out when its output goes, channel by channel, to exactly one layer. Everything else (residual adds,
concatenations, several readers, grouped readers, operators that mix channels) freezes the filters of the layer, and
nothing else, with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autocompress_fast.trace import BATCH, Node, Ref, Tensor, Trace

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
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool2d",
    ]
)
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
    outputs = {operand.name for operand in trace.outputs}
    value, positions, norms = layer, 1, []
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
        if user.op in LAYERS:
            return _reader(trace, user, names, positions, tuple(norms))
        if user.op == "batch_norm":
            if not all(
                isinstance(a, Tensor) and len(trace.users(a.name)) == 1 for a in user.args[1:5] if a is not None
            ):
                return Frozen(f"{user.where} shares its parameters or has none of its own")
            norms.append(user.module)
        elif user.op in _RESHAPES:
            before, after = value.shape, user.shape
            if len(after) != 2 or after[0] != before[0] or (before[0] != BATCH and before[0] < 1):
                return Frozen(f"{user.where} reshapes {before} to {after}")
            positions *= math.prod(before[2:])
        elif user.op not in _PER_CHANNEL:
            return Frozen(f"its output goes into {user.where}")
        value = user


def _reader(trace: Trace, user: Node, names: dict[str, str], positions: int, norms: tuple[str, ...]) -> Link | Frozen:
    weight = user.args[1]
    if not isinstance(weight, Tensor) or weight.name not in names:
        return Frozen(f"{user.where} computes its weight or shares it")
    if user.op != "linear" and user.args[6] != 1:
        return Frozen(f"its output goes into {user.args[6]} groups of {user.where}")
    if user.op == "linear" and len(user.shape) != 2:
        return Frozen(f"{user.where} is applied to every position of a {len(user.shape)}-dimensional value")
    return Link(names[weight.name], positions, norms)
