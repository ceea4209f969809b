"""Single weights that shrink to zero while a network trains, until as many are left as a budget allows.

    minimise  f(W) + sum_i lambda_i * log(1 + |w_i| / epsilon_i)

The logarithm counts weights, nearly: what is far from zero is hardly pulled. After every step of the optimizer follows
the proximal step of the penalty, made linear where the weight is (reweighted l1: Candes, Wakin and Boyd, 2008), in the
metric of the optimizer, s being how far it moves a weight per unit of gradient:

    w <- sign(w) * max(0, |w| - s * lambda / (|w| + epsilon))

At rest a weight that stays has |df/dw| * (|w| + epsilon) = lambda: what a weight is worth to first order is the same in
all layers, so one lambda decides how much each of them keeps, where projections (`ADMM`) have to be told. A weight at
zero comes back as soon as |df/dw| > lambda / epsilon.

There is one lambda for every size that is limited. It is steered while the network trains: up by a little while more is
left than the schedule allows, down otherwise, so that it fades where another limit binds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from autocompress_fast.admm import Constraint, projected
from autocompress_fast.plan import Hooks, Plan

if TYPE_CHECKING:
    import torch

    from autocompress_fast.graph import Counts, Report
    from autocompress_fast.meter import Meter
    from autocompress_fast.rates import Target

__all__ = ["Shrinkage", "ShrunkParameters", "check_rates", "epsilons", "largest_left"]

_SHARE_OF_RMS = 0.1  # epsilon, of the size of a layer's weights
LIMITED_AFTER = 0.8  # of the training: from then on the limits hold, and what is left settles
_BEND = 3.0  # of the schedule: how much slower it becomes towards the limits; 1 for a constant rate
_STEERINGS = 1000  # of the strengths, in a training, or as many as there are steps
_MOST_STEERED = 50.0  # of the logarithm of a strength, in all of them
_GAIN = 100.0  # of all of them, as powers of the excess; each of 1 at most
_WEAKEST = 1e-30
_HALVINGS = 24  # in which the share of the weights that a target allows is found


@dataclass(frozen=True)
class Shrinkage:
    """What the weights that are left may cost at the end of a training, and how they are brought there.

    Args:
        costs: size, such as "params" -> layer -> what one weight of it costs; layers that are not named in any stay.
        limits: the same sizes -> the most that all weights may cost at the end.
        epsilon: layer -> the magnitude below which a weight counts as small; of all layers named in `costs`.
        steps: of the training.
        strength: size -> lambda at the beginning; from the first gradients if not given.

    Raises:
        ValueError: nothing that is limited, sizes or layers that do not belong together, a value out of range.
    """

    costs: Mapping[str, Mapping[str, float]]
    limits: Mapping[str, float]
    epsilon: Mapping[str, float]
    steps: int
    strength: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.limits or set(self.limits) != set(self.costs):
            raise ValueError(f"limits are for {sorted(self.limits)}, costs for {sorted(self.costs)}: they must agree")
        if self.strength is not None and set(self.strength) != set(self.limits):
            raise ValueError(f"strength must be given for {sorted(self.limits)}, got {sorted(self.strength)}")
        if missing := [name for name in self.layers if name not in self.epsilon]:
            raise ValueError(f"epsilon must be given for every layer, is missing for {', '.join(missing)}")
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}")
        values = {"limits": self.limits, "epsilon": self.epsilon, "strength": self.strength or {}}
        values |= {f"costs of {size}": costs for size, costs in self.costs.items()}
        for what, found in values.items():
            if wrong := {name: value for name, value in found.items() if not 0 < value < math.inf}:
                raise ValueError(f"{what} must be positive and finite, got {wrong}")

    @classmethod
    def towards(
        cls,
        report: Report,
        target: Target,
        *,
        steps: int,
        dense: Counts | None = None,
        epsilon: Mapping[str, float] | None = None,
        strength: Mapping[str, float] | None = None,
    ) -> Shrinkage:
        """Of all layers that may be pruned, towards a target.

        Args:
            report: of the network as it is now.
            target: of weights or multiply-adds, relative to `dense`.
            steps: of the training.
            dense: sizes of the network that the target counts from; that of the report if not given.
            epsilon: of every layer; `epsilons` of the report if not given.
            strength: as above.

        Raises:
            ValueError: a target of latency or bytes, which single weights do not add up to, or one that the layers
                that stay exceed alone.

        Example:
            >>> import torch
            >>> from autocompress_fast.graph import inspect
            >>> from autocompress_fast.rates import Target
            >>> model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10))
            >>> found = Shrinkage.towards(inspect(model, torch.zeros(1, 100)), Target(params=11), steps=100)
            >>> found.limits, found.costs
            ({'params': 500.0}, {'params': {'0': 1.0, '2': 1.0}})
        """
        check_rates(target)
        held = {layer.name for layer in report.layers if layer.held}
        costs, limits = {}, {}
        for size, limit in target.limits(report.counts() if dense is None else dense).items():
            each = {
                layer.name: float(layer.outputs) if size == "macs" else 1.0
                for layer in report.layers
                if size != "conv" or layer.is_conv
            }
            stay = sum(each[layer.name] * layer.weights for layer in report.layers if layer.name in held & set(each))
            if stay >= limit:
                raise ValueError(f"the target {target} allows {limit:g} {size}, and layers that stay have {stay:g}")
            costs[size] = {name: cost for name, cost in each.items() if name not in held}
            limits[size] = limit - stay
        found = epsilons(report) if epsilon is None else epsilon
        return cls(costs, limits, {name: found[name] for name in found if name not in held}, steps, strength)

    @property
    def layers(self) -> list[str]:
        """The layers whose weights shrink."""
        return list(dict.fromkeys(name for costs in self.costs.values() for name in costs))

    def allowed(self, size: str, start: float, step: int) -> float:
        """What all weights may cost after a step, counted from 1: from `start` to the limit, fast at first.

        Example:
            >>> shrinkage = Shrinkage({"params": {"0": 1.0}}, {"params": 10.0}, {"0": 0.01}, steps=10)
            >>> [round(shrinkage.allowed("params", 1000.0, step)) for step in (1, 2, 4, 6, 8, 10)]
            [219, 70, 18, 11, 10, 10]
        """
        return allowed_after(step, self.steps, start, self.limits[size], _BEND)

    def attach(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> ShrunkParameters:
        """`ShrunkParameters` of this."""
        return ShrunkParameters(model, self, optimizer, state=state)

    def described(self) -> dict[str, Any]:
        """This, as plain numbers and strings."""
        return asdict(self)


class Scheduled(Protocol):
    """What is limited, and when."""

    @property
    def limits(self) -> Mapping[str, float]: ...

    @property
    def steps(self) -> int: ...

    @property
    def strength(self) -> Mapping[str, float] | None: ...

    def allowed(self, size: str, start: float, step: int) -> float: ...


def allowed_after(step: int, steps: int, start: float, limit: float, bend: float) -> float:
    """What may be left of a size after a step of a training: `start` to `limit`, at a rate that falls with `bend`."""
    left = max(0.0, 1 - step / (LIMITED_AFTER * steps))
    return limit if start <= limit else limit * (start / limit) ** (left**bend)


def check_rates(target: Target) -> None:
    """Check that weights can shrink towards a target.

    Raises:
        ValueError: it limits latency or bytes.
    """
    if target.measured:
        names = " and ".join(sorted(target.measured))
        raise ValueError(f"weights shrink towards rates of weights or multiply-adds, not {names}: got {target}")


def epsilons(report: Report) -> dict[str, float]:
    """A tenth of the root mean square of every layer's weights.

    Example:
        >>> import torch
        >>> from autocompress_fast.graph import inspect
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> _ = torch.nn.init.constant_(model[0].weight, 0.5)
        >>> epsilons(inspect(model, torch.zeros(1, 2)))
        {'0': 0.05}
    """
    found = {}
    for layer in report.layers:
        rms = float(report.weight(layer.name).double().square().mean().sqrt())
        found[layer.name] = round(_SHARE_OF_RMS * rms, 12) or _SHARE_OF_RMS
    return found


def largest_left(report: Report, target: Target, meter: Meter) -> Plan:
    """What is left of a network whose weights have shrunk, less the smallest of every layer where that is too much.

    Args:
        report: of the network as it is now.
        target: relative to `meter.dense`.
        meter: for plans in the shapes of this network.

    Raises:
        ValueError: even one weight of every layer is too much, or nothing is left of an output layer.

    Example:
        >>> import torch
        >>> from autocompress_fast.graph import inspect
        >>> from autocompress_fast.meter import Meter
        >>> from autocompress_fast.rates import Target
        >>> model = torch.nn.Sequential(torch.nn.Linear(10, 2))
        >>> _ = model[0].weight.data[:, 3:].zero_()
        >>> report = inspect(model, torch.zeros(1, 10))
        >>> [largest_left(report, Target(params=rate), Meter(report)).weights for rate in (3, 5)]
        [6, 4]
    """
    counts = {
        layer.name: (int(report.weight(layer.name).count_nonzero()), layer.groups)
        for layer in report.layers
        if not layer.held
    }

    def left(share: float) -> Plan:
        keep = {name: (max(1, math.floor(share * count)), groups) for name, (count, groups) in counts.items()}
        return projected(report, {name: Constraint("element", *kept) for name, kept in keep.items()})

    low, high = 0.0, 1.0
    if target.met(meter.dense, meter.measure(found := left(high))):
        return found
    if not target.met(meter.dense, meter.measure(found := left(low))):
        raise ValueError(f"the target {target} cannot be met: one weight of every layer is too much")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        trial = left(middle)
        if target.met(meter.dense, meter.measure(trial)):
            low, found = middle, trial
        else:
            high = middle
    return found


class Shrinking(Hooks):
    """What shrinks after every step of an optimizer, with one strength for every size, steered to the limits.

    Args:
        shrinkage: limits, steps, and the strengths at the beginning.
        optimizer: SGD, Adam or AdamW.
        kept: tensors of the subclass, which belong to the state.
        state: `state_dict()` of before, to go on from there.

    Raises:
        ValueError: another optimizer, a state of other sizes; nothing is changed then.
    """

    _first = 0.1  # strength at the beginning, of what it would take to hold what is average at rest
    _damping = 0.0  # how a strength answers to changes of the excess, as a power

    def __init__(
        self,
        shrinkage: Scheduled,
        optimizer: torch.optim.Optimizer,
        kept: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor] | None,
    ) -> None:
        import torch

        if not isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam)):  # AdamW is an Adam
            raise ValueError(f"weights shrink beside SGD, Adam or AdamW, got {type(optimizer).__name__}")
        self._schedule = shrinkage
        self._sizes = list(shrinkage.limits)
        self._interval = max(1, shrinkage.steps // _STEERINGS)
        self._steerings = shrinkage.steps / self._interval
        start = [self._cost(size) for size in self._sizes]
        strength = [0.0 if shrinkage.strength is None else shrinkage.strength[size] for size in self._sizes]
        self._state = {
            "step": torch.zeros((), dtype=torch.int64),
            "start": torch.tensor(start, dtype=torch.float64),
            "strength": torch.tensor(strength, dtype=torch.float64),
            "excess": torch.zeros(len(start), dtype=torch.float64),
            **kept,
        }
        if state is not None:
            shapes, found = ({n: tuple(v.shape) for n, v in values.items()} for values in (self._state, state))
            if shapes != found:
                raise ValueError(f"the state must have the shapes {shapes}, got {found}")
            for name, value in state.items():
                self._state[name].copy_(value)

        def after_step(*_: object) -> None:
            self._step(optimizer)

        self._handles: list[Any] = [optimizer.register_step_post_hook(after_step)]

    @property
    def strength(self) -> dict[str, float]:
        """Lambda of every size, for a weight of its average cost."""
        return dict(zip(self._sizes, self._state["strength"].tolist(), strict=True))

    @property
    def left(self) -> int:
        """Number of weights that are left, of the layers that shrink."""
        raise NotImplementedError

    def measure(self, x: torch.Tensor) -> None:
        """Look at a batch before the step that it is trained on: needed where the model is compiled."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Steps so far, costs at the beginning, strengths and the like; they change as the training goes on."""
        return self._state

    def _cost(self, size: str) -> float:
        """What all that is left costs."""
        raise NotImplementedError

    def _at_rest(self) -> float:
        """The lambda for which what is average would be at rest with the gradient that it has."""
        raise NotImplementedError

    def _shrink(self, rates: Mapping[int, Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> None:
        """The proximal step; `rates` has the optimizer's options by the parameters' ids."""
        raise NotImplementedError

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        import torch

        strengths = self._state["strength"]
        if not bool(strengths.any()):
            strengths.fill_(max(self._first * self._at_rest() / len(strengths), _WEAKEST))
        rates = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            self._shrink(rates, optimizer)
        self._state["step"] += 1
        step = int(self._state["step"])
        if step % self._interval == 0:
            self._steer(step)

    def _excesses(self, step: int) -> list[float]:
        """By how much too much is left of every size after a step, as logarithms."""
        allowed = self._allowed(step)
        return [math.log(max(self._cost(size), 1e-9) / most) for size, most in zip(self._sizes, allowed, strict=True)]

    def _allowed(self, step: int) -> list[float]:
        starts = zip(self._sizes, self._state["start"].tolist(), strict=True)
        return [self._schedule.allowed(size, start, step) for size, start in starts]

    def _steer(self, step: int) -> None:
        most = _MOST_STEERED / self._steerings
        for index, excess in enumerate(self._excesses(step)):
            change = min(max(min(1.0, _GAIN / self._steerings) * excess, -most), most)
            change += self._damping * (excess - float(self._state["excess"][index]))
            self._state["excess"][index] = excess
            self._state["strength"][index] = max(float(self._state["strength"][index]) * math.exp(change), _WEAKEST)


class ShrunkParameters(Shrinking):
    """Shrinks weights of a model after every step of its optimizer, until what is left meets the limits.

    Use as a context, or call `remove` when done. The weights that are left at the end cost what the limits allow, less
    a few hundredths: what comes back comes slowly.

    Args:
        model: trained in place by the caller's loop.
        shrinkage: what is limited, and how.
        optimizer: SGD, Adam or AdamW, which trains the model.
        state: `state_dict()` of before, to go on from there with the model and the optimizer of then.

    Raises:
        ValueError: a layer that the model does not have, another optimizer, a state of other sizes; nothing is changed
            then.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 1, bias=False))
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> what = Shrinkage({"params": {"0": 1.0}}, {"params": 2.0}, {"0": 0.01}, steps=2000)
        >>> with ShrunkParameters(model, what, optimizer):
        ...     for _ in range(2000):
        ...         x = torch.randn(32, 20)
        ...         loss = (model(x)[:, 0] - x[:, 3] + 0.5 * x[:, 7]).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> model[0].weight.nonzero()[:, 1].tolist()
        [3, 7]
    """

    def __init__(
        self,
        model: torch.nn.Module,
        shrinkage: Shrinkage,
        optimizer: torch.optim.Optimizer,
        *,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._weights = weights_of(model, shrinkage.layers)
        self.shrinkage = shrinkage
        # A size's strength is that for a weight of average cost: strengths of different sizes compare.
        self._shares = {size: self._share(costs) for size, costs in shrinkage.costs.items()}
        super().__init__(shrinkage, optimizer, {}, state)

    @property
    def left(self) -> int:
        """Number of weights that are not zero, of the layers that shrink."""
        return sum(int(weight.count_nonzero()) for weight in self._weights.values())

    def _share(self, costs: Mapping[str, float]) -> dict[str, float]:
        counts = {name: self._weights[name].numel() for name in costs}
        average = sum(costs[name] * count for name, count in counts.items()) / sum(counts.values())
        return {name: cost / average for name, cost in costs.items()}

    def _cost(self, size: str) -> float:
        costs = self.shrinkage.costs[size]
        return sum(cost * int(self._weights[name].count_nonzero()) for name, cost in costs.items())

    def _shrink(self, rates: Mapping[int, Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> None:
        import torch

        each = self.strength
        for name, weight in self._weights.items():
            strength = sum(each[size] * shares[name] for size, shares in self._shares.items() if name in shares)
            moved = moved_per_gradient(rates[id(weight)], optimizer.state[weight])
            magnitude = weight.abs()
            pull = (strength * moved) / (magnitude + self.shrinkage.epsilon[name])
            # Adding zero makes +0 of -0.
            weight.copy_(torch.copysign(magnitude.sub_(pull).clamp_(min=0), weight).add_(0.0))

    def _at_rest(self) -> float:
        total = count = 0.0
        for name, weight in self._weights.items():
            if weight.grad is not None:
                worth = weight.grad.abs() * (weight.detach().abs() + self.shrinkage.epsilon[name])
                total += float(worth.double().sum())
                count += weight.numel()
        return total / max(count, 1.0)


def weights_of(model: torch.nn.Module, layers: Iterable[str]) -> dict[str, torch.nn.Parameter]:
    """The weights of layers.

    Raises:
        ValueError: the model does not have one of them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in layers:
        if f"{name}.weight" not in parameters:
            raise ValueError(f"weights are to shrink in {name!r}, which is no layer with a weight")
    return {name: parameters[f"{name}.weight"] for name in layers}


def moved_per_gradient(
    group: Mapping[str, Any], state: Mapping[str, torch.Tensor], *, of_columns: bool = False
) -> torch.Tensor | float:
    """How far the optimizer moves a weight, or all of a column, for one unit of a gradient that lasts."""
    if "exp_avg_sq" not in state:
        return float(group["lr"] / (1 - group.get("momentum", 0.0)))
    unbiased = math.sqrt(1 - group["betas"][1] ** float(state["step"]))
    square = state["exp_avg_sq"].mean(dim=0) if of_columns else state["exp_avg_sq"]
    moved: torch.Tensor = group["lr"] / (square.sqrt() / unbiased + group["eps"])
    return moved
