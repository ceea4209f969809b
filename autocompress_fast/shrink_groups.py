"""Columns and channels that shrink to zero while a network trains, until as little is left as a budget allows.

`shrink` does so for single weights. Here it is a column of a layer, w = W[:, c, i, j], and all columns of a channel:

    minimise  f(W) + sum_columns  lambda * cost * log(1 + a |w| / epsilon)
                   + sum_channels lambda * cost * log(1 + |(a w of all its columns)| / epsilon)

a is the root mean square of what a column reads, so that a |w| is how much it contributes. Normalisations and ReLUs let
one layer be multiplied by a number and the next one divided by it; the penalty does not see that either. On norms
alone, a layer's columns would shrink to nothing while the filters before them grow.

A column costs its weights: as many as the layer has filters left. A channel costs the weights of its filters, as many
as their layers have columns left; once nobody reads it, they are dead. Costs follow what is left. At rest, what a
group is worth to first order, per weight that it costs, is the same in all layers.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress_fast.admm import Constraint, projected
from autocompress_fast.shrink import (
    LIMITED_AFTER,
    Shrinking,
    allowed_after,
    check_rates,
    moved_per_gradient,
    weights_of,
)

if TYPE_CHECKING:
    import torch

    from autocompress_fast.graph import Counts, Report
    from autocompress_fast.graph.channels import IntArray
    from autocompress_fast.meter import Meter
    from autocompress_fast.plan import Plan
    from autocompress_fast.rates import Target

__all__ = ["GroupShrinkage", "ShrunkGroups", "largest_columns_left"]

_SHARE_OF_RMS = 0.1  # epsilon, of the contributions of a layer's columns at the beginning
_MEASURED_EVERY = 10  # steps: what layers read
_REMEMBERED = 0.9  # of what was measured before
_BEND = 2.0  # of the schedule; groups are few and alike, and go all at once if they are hurried
_HALF = 5.0  # epsilons of a column that counts half
_LIVES = -1  # the group of channels and filters that cannot be cut
_SHARE_FOUND = 2.0**-20  # how exactly


@dataclass(frozen=True, eq=False)
class GroupLayer:
    """What a layer has to do with the groups of channels.

    Attributes:
        shape: (P, C / groups, ...): of the weight.
        filters: (P,) the group of every filter, or _LIVES.
        channels: (C,) the group of every input channel, or _LIVES.
        shrinks: whether its columns may go.
        costs: size -> what one weight costs; sizes it does not count to are left out.
    """

    shape: tuple[int, ...]
    filters: IntArray
    channels: IntArray
    shrinks: bool
    costs: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class GroupShrinkage:
    """What the columns and channels that are left may cost at the end of a training.

    Args:
        layers: all layers, those that stay as they are, too.
        groups: of channels that live and die together.
        limits: size, such as "conv" -> the most that all weights may cost at the end.
        steps: of the training.
        strength: size -> lambda at the beginning; from the first gradients if not given.
        channels: whether the penalty is on channels, too.
    """

    layers: Mapping[str, GroupLayer]
    groups: int
    limits: Mapping[str, float]
    steps: int
    strength: Mapping[str, float] | None = None
    channels: bool = True

    @classmethod
    def towards(
        cls,
        report: Report,
        target: Target,
        structure: str = "filter+column",
        *,
        steps: int,
        dense: Counts | None = None,
        strength: Mapping[str, float] | None = None,
    ) -> GroupShrinkage:
        """Of all layers that may be pruned, towards a target.

        Args:
            report: of the network as it is now.
            target: of weights or multiply-adds, relative to `dense`.
            structure: "filter+column", or "column": channels go as a whole only when their columns do.
            steps: of the training.
            dense: sizes of the network that the target counts from; that of the report if not given.
            strength: as above.

        Raises:
            ValueError: another structure, a target of latency or bytes, or nothing that can shrink.

        Example:
            >>> import torch
            >>> from autocompress_fast.graph import inspect
            >>> from autocompress_fast.rates import Target
            >>> model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10))
            >>> found = GroupShrinkage.towards(inspect(model, torch.zeros(1, 100)), Target(params=11), steps=100)
            >>> found.limits, found.groups
            ({'params': 500.0}, 50)
        """
        check_rates(target)
        if structure not in ("filter+column", "column"):
            raise ValueError(f"structure must be filter+column or column, got {structure!r}")
        limits = target.limits(report.counts() if dense is None else dense)
        shrinks = {
            layer.name: layer.groups == 1 and not layer.held and layer.columns_prunable for layer in report.layers
        }
        if not any(shrinks.values()):
            raise ValueError("no layer has columns that can shrink")
        number: dict[int, int] = {}
        for group in report.groups:
            # A depthwise layer reads what it puts out; any other that stays as it is reads all.
            stays = any(not shrinks[name] and name not in group.filters for name in group.channels)
            if not group.frozen and not stays and any(shrinks[name] for name in group.channels):
                name, index = next(iter(group.filters.items()))
                number[int(report.channels.group[report.labels(name)[index[0]]])] = len(number)

        def numbered(labels: IntArray) -> IntArray:
            return np.array([number.get(int(root), _LIVES) for root in report.channels.group[labels]], np.int64)

        layers = {}
        for layer in report.layers:
            each = {"conv": 1.0, "params": 1.0, "macs": float(layer.outputs)}
            layers[layer.name] = GroupLayer(
                layer.shape,
                numbered(report.labels(layer.name)),
                numbered(report.channels.inputs[layer.name]),
                shrinks[layer.name],
                {size: each[size] for size in limits if size != "conv" or layer.is_conv},
            )
        return cls(layers, len(number), limits, steps, strength, structure == "filter+column")

    def allowed(self, size: str, start: float, step: int) -> float:
        """What all weights may cost after a step, counted from 1: from `start` to the limit, fast at first."""
        return allowed_after(step, self.steps, start, self.limits[size], _BEND)

    def attach(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> ShrunkGroups:
        """`ShrunkGroups` of this, in one process."""
        return ShrunkGroups(model, self, optimizer, state=state)

    def described(self) -> dict[str, Any]:
        """This, as plain numbers and strings."""
        digest = hashlib.sha256()
        for name, layer in self.layers.items():
            digest.update(repr((name, layer.shape, layer.shrinks, dict(layer.costs))).encode())
            digest.update(layer.filters.tobytes() + layer.channels.tobytes())
        strength = None if self.strength is None else dict(self.strength)
        settings = {"limits": dict(self.limits), "steps": self.steps, "strength": strength, "channels": self.channels}
        return settings | {"groups": digest.hexdigest()}


def largest_columns_left(report: Report, target: Target, meter: Meter) -> Plan:
    """What is left of a network whose columns have shrunk, less the smallest where that is too much.

    One share of the largest column of a layer decides in all of them; where one size has room when another is met, it
    is smaller in layers that do not count to the latter.

    Args:
        report: of the network as it is now.
        target: relative to `meter.dense`.
        meter: for plans in the shapes of this network.

    Raises:
        ValueError: even one column of every layer is too much, or nothing is left of an output layer.

    Example:
        >>> import torch
        >>> from autocompress_fast.graph import inspect
        >>> from autocompress_fast.meter import Meter
        >>> from autocompress_fast.rates import Target
        >>> model = torch.nn.Sequential(torch.nn.Linear(10, 2))
        >>> _ = model[0].weight.data[:, 3:].zero_()
        >>> report = inspect(model, torch.zeros(1, 10))
        >>> [largest_columns_left(report, Target(params=rate), Meter(report)).weights for rate in (3, 5)]
        [6, 4]
    """
    norms = {
        layer.name: report.weight(layer.name).flatten(1).double().norm(dim=0)
        for layer in report.layers
        if layer.columns_prunable and not layer.held
    }

    met: dict[tuple[int, ...], bool] = {}  # shares that differ little leave the same

    def left(shares: Mapping[str, float]) -> tuple[Plan, bool]:
        counts = {
            name: int((norms[name] >= max(share * float(norms[name].max()), 1e-30)).sum())
            for name, share in shares.items()
        }
        found = projected(report, {name: Constraint("column", max(1, count)) for name, count in counts.items()})
        key = tuple(counts.values())
        if key not in met:
            met[key] = target.met(meter.dense, meter.measure(found))
        return found, met[key]

    def lowered(shares: dict[str, float], names: Collection[str]) -> dict[str, float]:
        """The least share of some layers with which the target is met."""
        low, high = -1.0, max(shares[name] for name in names)

        def at(share: float) -> dict[str, float]:
            return {name: min(was, share) if name in names else was for name, was in shares.items()}

        while high - low > _SHARE_FOUND:
            middle = (low + high) / 2
            low, high = (low, middle) if left(at(middle))[1] else (middle, high)
        return at(high)

    def grows(shares: dict[str, float], name: str) -> bool:
        """Whether there is a next column of a layer, and room for it."""
        share = norms[name] / norms[name].max()
        smaller = share[(share < shares[name]) & (share > 0)]
        return len(smaller) > 0 and left(shares | {name: float(smaller.max())})[1]

    shares = dict.fromkeys(norms, 1.0)
    if not left(shares)[1]:
        raise ValueError(f"the target {target} cannot be met: one column of every layer is too much")
    free = set(norms)
    while free:
        before, shares = shares, lowered(shares, free)
        free = {name for name in free if shares != before and grows(shares, name)}
    return left(shares)[0]


class ShrunkGroups(Shrinking):
    """Shrinks columns and channels of a model after every step of its optimizer, until what is left meets the limits.

    Use as a context, or call `remove` when done.

    Args:
        model: trained in place by the caller's loop.
        shrinkage: what is limited, and how.
        optimizer: SGD, Adam or AdamW, which trains the model.
        state: `state_dict()` of before, to go on from there with the model and the optimizer of then.
        ranks: whether all ranks of torch.distributed train this model: they take what rank 0 measures, and stay alike.

    Raises:
        ValueError: a layer that the model does not have, weights on several devices, another optimizer, a state of
            other sizes; nothing is changed then.

    Example:
        >>> import torch
        >>> from autocompress_fast.graph import inspect
        >>> from autocompress_fast.meter import Meter
        >>> from autocompress_fast.rates import Target
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> optimizer, target = torch.optim.Adam(model.parameters(), lr=0.01), Target(params=20)
        >>> report = inspect(model, torch.zeros(1, 20))
        >>> with ShrunkGroups(model, GroupShrinkage.towards(report, target, steps=1000), optimizer):
        ...     for _ in range(1000):
        ...         x = torch.randn(64, 20)
        ...         loss = (model(x)[:, 0] - x[:, 3].abs()).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> largest_columns_left(report, target, Meter(report))["0"].columns.nonzero()[0].tolist()
        [3]
    """

    _first = 0.005  # gradients of a batch are mostly noise, which does not add up over a column
    _damping = 2.0  # columns that are on their way to zero do not turn at once

    def __init__(
        self,
        model: torch.nn.Module,
        shrinkage: GroupShrinkage,
        optimizer: torch.optim.Optimizer,
        *,
        state: Mapping[str, torch.Tensor] | None = None,
        ranks: bool = False,
    ) -> None:
        import torch

        self.shrinkage = shrinkage
        self._layers = {name: layer for name, layer in shrinkage.layers.items() if layer.shrinks}
        self._weights = weights_of(model, self._layers)
        devices = {weight.device for weight in self._weights.values()}
        if len(devices) > 1:
            raise ValueError(f"weights that shrink must be on one device, got {', '.join(sorted(map(str, devices)))}")
        self._device = devices.pop()
        self._model, self._ranks, self._outside = model, ranks, False
        layers_of = shrinkage.layers.items()
        self._channels = {name: torch.from_numpy(self._layers[name].channels).to(self._device) for name in self._layers}
        self._filters = {name: torch.from_numpy(layer.filters).to(self._device) for name, layer in layers_of}
        layers = shrinkage.layers.values()
        weights = {s: sum(math.prod(x.shape) for x in layers if s in x.costs) for s in shrinkage.limits}
        costs = {s: sum(math.prod(x.shape) * x.costs[s] for x in layers if s in x.costs) for s in shrinkage.limits}
        self._average = {size: cost / weights[size] for size, cost in costs.items()}
        zeros = functools.partial(torch.zeros, device=self._device)
        kept = {f"reads.{name}": zeros(len(layer.channels)) for name, layer in self._layers.items()}
        kept["epsilon"] = torch.zeros(len(self._layers))
        kept["large"] = torch.zeros(len(shrinkage.limits), dtype=torch.float64)
        super().__init__(shrinkage, optimizer, kept, state)
        for name in self._layers:
            self._handles.append(model.get_submodule(name).register_forward_pre_hook(self._measured(name)))

    @property
    def left(self) -> int:
        """Number of weights that are left: columns times filters, of the layers that shrink."""
        filters, columns = self._alive(self._norms())
        return sum(filters[name] * columns[name] for name in self._layers)

    def measure(self, x: torch.Tensor) -> None:
        """Look at what layers read of a batch, every few steps. torch.compile leaves out the hooks that do so."""
        import torch

        if int(self._state["step"]) % _MEASURED_EVERY == 0:
            modes = [(module, module.training) for module in self._model.modules()]
            self._outside = True
            self._model.eval()
            try:
                with torch.no_grad():
                    self._model(x)
            finally:
                self._outside = False
                for module, training in modes:
                    module.training = training

    def _measured(self, name: str) -> Any:
        """A hook that keeps how large what a layer reads is, channel by channel."""
        import torch

        count = len(self._layers[name].channels)

        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if torch.compiler.is_compiling():
                return
            if not self._outside and (not module.training or int(self._state["step"]) % _MEASURED_EVERY):
                return
            with torch.no_grad():
                x = inputs[0].detach()
                dim = x.ndim - 1 if len(self._layers[name].shape) == 2 else 1
                others = [d for d in range(x.ndim) if d != dim]
                size = x.float().square().mean(others).sqrt().reshape(count)
                known = self._state[f"reads.{name}"]
                known.copy_(known * _REMEMBERED + size * (1 - _REMEMBERED) if bool(known.any()) else size)

        return hook

    def _norms(self) -> dict[str, torch.Tensor]:
        """|w| of the columns of every layer, (C, KH, KW)."""
        return {name: weight.detach().square().sum(dim=0).sqrt() for name, weight in self._weights.items()}

    def _alive(self, norms: Mapping[str, torch.Tensor]) -> tuple[dict[str, int], dict[str, int]]:
        """Filters and columns of every layer that are left."""
        import torch

        read = torch.zeros(self.shrinkage.groups + 1, dtype=torch.bool, device=self._device)  # the last: _LIVES
        columns = {name: math.prod(layer.shape[1:]) for name, layer in self.shrinkage.layers.items()}
        for name, norm in norms.items():
            nonzero = (norm > 0).reshape(len(self._channels[name]), -1)
            columns[name] = int(nonzero.sum())
            read[self._channels[name][nonzero.any(dim=1)]] = True
        read[_LIVES] = True
        return {name: int(read[groups].sum()) for name, groups in self._filters.items()}, columns

    def _total(self, size: str, filters: Mapping[str, float], columns: Mapping[str, float]) -> float:
        layers = self.shrinkage.layers.items()
        return sum(x.costs[size] * filters[name] * columns[name] for name, x in layers if size in x.costs)

    def _cost(self, size: str) -> float:
        return self._total(size, *self._alive(self._norms()))

    def _contributions(self, norms: Mapping[str, torch.Tensor]) -> _Contributions:
        import torch

        groups = self.shrinkage.groups + 1  # the last is _LIVES
        square, weighted = (torch.zeros(groups, device=self._device) for _ in range(2))
        columns = {}
        for name, small in zip(self._layers, self._state["epsilon"].tolist(), strict=True):
            columns[name] = self._reads(name) * norms[name]
            of, squares = self._channels[name] % groups, columns[name].float().square()
            squares = squares.reshape(len(of), -1).sum(dim=1)
            square.index_add_(0, of, squares)
            weighted.index_add_(0, of, squares * small)
        return _Contributions(columns, square.sqrt(), square.clamp_min(1e-30), weighted / square.clamp_min(1e-30))

    def _soft(self, norms: Mapping[str, torch.Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """As `_alive`, where each counts the less the smaller it is: falls before any is zero."""
        found = self._contributions(norms)
        columns: dict[str, float] = {n: math.prod(x.shape[1:]) for n, x in self.shrinkage.layers.items()}
        for name, epsilon in zip(self._layers, self._state["epsilon"].tolist(), strict=True):
            size = found.columns[name].double()
            columns[name] = float((size / (size + _HALF * epsilon)).sum())
        read = found.channels / (found.channels + _HALF * found.epsilon).clamp_min(1e-30)
        read[_LIVES] = 1.0
        return {name: float(read[groups].sum()) for name, groups in self._filters.items()}, columns

    def _excesses(self, step: int) -> list[float]:
        # Groups are few and alike: they would all go at once if strengths rose until the first of them are zero. In the
        # end it is zeros that count.
        norms = self._norms()
        alive, soft = self._alive(norms), self._soft(norms)
        done = min(1.0, step / (LIMITED_AFTER * self.shrinkage.steps))
        found = []
        for index, (size, most) in enumerate(zip(self._sizes, self._allowed(step), strict=True)):
            large = self._total(size, *soft) / float(self._state["large"][index]) * float(self._state["start"][index])
            left = self._total(size, *alive)
            counts = (max(value, 1e-9) / most for value in (left, min(left, large)))
            hard, ahead = map(math.log, counts)
            found.append(done * hard + (1 - done) * ahead)
        return found

    def _each(self, name: str) -> float:
        """What one weight of a layer costs, by all strengths."""
        costs = self.shrinkage.layers[name].costs
        return sum(strength * costs[s] / self._average[s] for s, strength in self.strength.items() if s in costs)

    def _along(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """(C,) as (C, 1, ...), beside the columns (C, KH, KW) of a layer."""
        return values.reshape(-1, *[1] * (len(self._layers[name].shape) - 2))

    def _reads(self, name: str) -> torch.Tensor:
        """What every channel carries, beside the columns of a layer."""
        reads = self._along(name, self._state[f"reads.{name}"])
        return reads if bool(reads.any()) else reads + 1.0  # nothing went through it yet

    def _set_epsilons(self, norms: Mapping[str, torch.Tensor]) -> None:
        for index, name in enumerate(self._layers):
            size = float((self._reads(name) * norms[name]).double().square().mean().sqrt())
            self._state["epsilon"][index] = _SHARE_OF_RMS * size or _SHARE_OF_RMS
        soft = self._soft(norms)
        for index, name in enumerate(self._sizes):
            self._state["large"][index] = self._total(name, *soft)

    def _at_rest(self) -> float:
        norms = self._norms()
        self._set_epsilons(norms)
        filters, _ = self._alive(norms)
        total = count = 0.0
        for name, epsilon in zip(self._layers, self._state["epsilon"].tolist(), strict=True):
            gradient = self._weights[name].grad
            if gradient is not None:
                reads = self._reads(name)
                along = gradient.square().sum(dim=0).sqrt()
                worth = along * (reads * norms[name] + epsilon) / reads.clamp_min(1e-12)
                total += float(worth.double().sum()) / max(filters[name], 1)
                count += worth.numel()
        return total / max(count, 1.0)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        import torch.distributed

        if self._ranks and int(self._state["step"]) % _MEASURED_EVERY == 0:
            for name in self._layers:
                torch.distributed.broadcast(self._state[f"reads.{name}"], 0)
        super()._step(optimizer)

    def _shrink(self, rates: Mapping[int, Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> None:
        import torch

        norms = self._norms()
        if not bool(self._state["epsilon"].any()):
            self._set_epsilons(norms)
        filters, columns = self._alive(norms)
        each = {name: self._each(name) for name in self._filters}
        groups = self.shrinkage.groups + 1
        zeros = functools.partial(torch.zeros, groups, device=self._device)
        cost = zeros()  # of a channel
        for name, of in self._filters.items():
            cost.index_add_(0, of % groups, torch.full_like(of, columns[name] * each[name], dtype=torch.float32))
        pull, found = zeros(), self._contributions(norms)
        factors, largest = {}, {}
        for name, small in zip(self._layers, self._state["epsilon"].tolist(), strict=True):
            weight, of, size = self._weights[name], self._channels[name] % groups, found.columns[name]
            moved = moved_per_gradient(rates[id(weight)], optimizer.state[weight], of_columns=True)
            # of a |w|, by a penalty of 1 for one unit of it
            pulled = self._reads(name).square() * moved * torch.ones_like(size)
            factors[name] = _factor(pulled * (filters[name] * each[name]), size, small)
            largest[name] = int(size.argmax())
            pull.index_add_(0, of, (size.square() * pulled).float().reshape(len(of), -1).sum(dim=1))
        # Of a channel: the mean over its columns, by how much of it each is.
        whole = _factor(pull / found.squares * cost, found.channels, found.epsilon)
        whole[_LIVES] = 1.0
        for name, factor in factors.items():
            if self.shrinkage.channels:
                factor = factor * self._along(name, whole[self._channels[name] % groups])
            factor.view(-1)[largest[name]] = 1.0  # a network that is cut through learns no more
            # Before a normalisation only the shares of columns matter, but smaller weights are moved further by a step:
            # the layer stays as large as it was.
            before, after = norms[name].norm(), (norms[name] * factor).norm()
            self._weights[name].mul_(factor * (before / after.clamp_min(1e-30))).add_(0.0)  # makes +0 of -0


@dataclass(frozen=True)
class _Contributions:
    """How much columns and channels carry.

    Attributes:
        columns: a |w| of every layer, (C, KH, KW).
        channels: |(a w of all its columns)|, by groups of channels.
        squares: of these, above zero.
        epsilon: of the groups: means over their columns.
    """

    columns: dict[str, torch.Tensor]
    channels: torch.Tensor
    squares: torch.Tensor
    epsilon: torch.Tensor


def _factor(pull: torch.Tensor, size: torch.Tensor, epsilon: torch.Tensor | float) -> torch.Tensor:
    """By what a group is multiplied whose size goes down by pull / (size + epsilon)."""
    return (1 - pull / ((size + epsilon) * size).clamp_min(1e-30)).clamp_(min=0)
