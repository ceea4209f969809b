"""How much of every layer stays: a budget for the network turned into a constraint for each layer.

Larger layers bear higher rates (the experience that AutoCompress builds on, arXiv 1907.03141): a layer of n weights
keeps s * n^(1 - alpha) of them, with one s for the network that meets the budget exactly. How many of a layer's weights
are filters and how many columns is then chosen by the energy (squared norm) that the nearest such pattern keeps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from autocompress_fast import ops
from autocompress_fast.admm import Constraint, projected
from autocompress_fast.graph import Counts, Layer, Report, Set, matched
from autocompress_fast.meter import Meter
from autocompress_fast.plan import Plan

__all__ = ["STRUCTURES", "Action", "Keep", "Target", "allocate", "between", "fill", "relative", "smallest"]

Keep: TypeAlias = "Mapping[str, float | tuple[float, float]]"
"""Pattern of layers -> the share of its weights that each keeps at least, or (at least, at most)."""

STRUCTURES = ("filter+column", "filter-then-column", "filter", "column", "element")

_ALPHA = 0.55
# Rate of linear layers that a target does not count, as a power of the convolutions' rate. At the same rate (power 1)
# the linear layers limit LeNet-5: at 89x CONV, 35x instead of 85x of all weights gave 0.4 points more (validation set).
_UNCOUNTED = 0.75
_FILTER_CHOICES = 16  # candidate filter counts of a layer, spaced geometrically
_ROUNDED = 2  # steps in which a search rounds budgets, to a factor of two, for the choice among those
_MOST_GROWTH, _GROWTH_STEPS = 64.0, 16  # of `fill`: factors up to the first, found to a relative 64^(2^-16)
_STEPS, _CLOSE = 16, 0.01  # of the search for a latency: at most so many, and the logarithm that is close enough
_ATTEMPTS, _MARGIN = 12, 0.03  # for what the weights keep to meet it, each aiming by so much (a logarithm) lower


_ENERGIES: WeakKeyDictionary[Report, dict[tuple[str, int], list[float]]] = WeakKeyDictionary()  # by layer and budget


_RATES = ("conv", "params", "macs")
_PARTS = {  # of a target, by name: the sizes that they limit
    "conv": "conv",
    "params": "params",
    "macs": "macs",
    "speedup": "seconds",
    "latency_ms": "seconds",
    "bytes": "bytes",
}
_PREFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}  # of bytes
_PART = re.compile(
    r"(?:([a-z_]+)\s*[=\s]\s*)?(nan|inf|[-+]?[0-9.]+(?:e[-+]?[0-9]+)?)\s*(x|ms|[kmg]?b?)(\s+faster)?", re.IGNORECASE
)
_LIKE = "20x, conv=40, macs=4, 3x faster, latency_ms=2.5 or bytes=100k"


@dataclass(frozen=True, repr=False)
class Target:
    """How small or fast the network is to be; all that is given must be met.

    Args:
        conv: rate dense / remaining of the weights of convolutions.
        params: of the weights of convolutions and linear layers.
        macs: of the multiply-adds.
        speedup: how many times faster than the dense network the engine is to run it on this machine.
        latency_ms: milliseconds that the engine may take for it on this machine.
        bytes: that its `.acf` file may have.
        threads: of the engine, for `speedup` and `latency_ms`; of one sample.

    Latencies are those that `LatencyModel` predicts.

    Raises:
        ValueError: nothing that limits the network, a rate below 1, a number that makes no sense.

    Example:
        >>> Target.parse("conv=40")
        Target(conv=40.0)
        >>> Target.parse("20x").params
        20.0
        >>> print(Target.parse("conv=4, 3x faster, bytes=100k"))
        conv 4x, 3x faster, bytes 100000
    """

    conv: float | None = None
    params: float | None = None
    macs: float | None = None
    speedup: float | None = None
    latency_ms: float | None = None
    bytes: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        given = self.given()
        if not given.keys() & _PARTS.keys():
            raise ValueError(f"a target needs at least one of {', '.join(_PARTS)}")
        for name in given.keys() & {*_RATES, "speedup"}:
            if not 1 <= given[name] < math.inf:
                what = "times faster than the dense network" if name == "speedup" else "the rate dense / remaining"
                raise ValueError(f"{name} is {what}, 1 or more, got {given[name]}")
        if self.latency_ms is not None and not 0 < self.latency_ms < math.inf:
            raise ValueError(f"latency_ms is in milliseconds, more than 0, got {self.latency_ms}")
        for name in ("bytes", "threads"):
            if name in given and (type(given[name]) is not int or given[name] < 1):
                raise ValueError(f"{name} must be an integer, 1 or more, got {given[name]!r}")
        if self.threads != 1 and "seconds" not in self.measured:
            raise ValueError("threads belongs to a target with speedup or latency_ms, got neither")

    def __repr__(self) -> str:
        return f"Target({', '.join(f'{name}={value!r}' for name, value in self.given().items())})"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read what people write; several parts with commas between them.

        "20x" (all weights), "conv=40", "macs=4x", "3x faster", "latency_ms=2.5", "bytes=100k" (or M, G: powers of
        1000), "threads=2"; also what `str` makes of a target.

        Raises:
            ValueError: anything else, or a part that comes twice.
        """
        found: dict[str, Any] = {}
        for part in text.split(","):
            match = _PART.fullmatch(part.strip())
            if match is None:
                raise ValueError(f"a target is like {_LIKE}, got {text!r}")
            name, number, unit, faster = match.groups()
            name = (name or "params").lower() if not faster else "speedup" if not name and unit else ""
            if name not in (*_PARTS, "threads") or name in found:
                raise ValueError(f"a target names each of {', '.join(_PARTS)}, threads at most once, got {text!r}")
            found[name] = _number(name, number, unit.lower(), text)
        return cls(**found)

    def given(self) -> dict[str, Any]:
        """All that is given, by name."""
        values = {name: getattr(self, name) for name in _PARTS}
        given = {name: value for name, value in values.items() if value is not None}
        return given | ({"threads": self.threads} if self.threads != 1 else {})

    def rates(self) -> dict[str, float]:
        """The rates of weights and multiply-adds that are given, by name."""
        return {n: float(v) for n in _RATES if (v := getattr(self, n)) is not None}

    @cached_property
    def measured(self) -> frozenset[str]:
        """Which of "seconds" and "bytes" it limits: what a `Meter` works out."""
        return frozenset(_PARTS[name] for name in self.given().keys() & {"speedup", "latency_ms", "bytes"})

    def of_engine(self) -> Target:
        """The part of it that limits latency and bytes.

        Raises:
            ValueError: there is none.
        """
        return replace(self, conv=None, params=None, macs=None)

    def limits(self, dense: Counts) -> dict[str, float]:
        """The most that is allowed of every size that is limited, by the names of `Size`.

        Raises:
            ValueError: it is relative to a latency or limits one, and `dense` has none.
        """
        self._check_measured(dense)
        limits = {name: _of(dense, name) / rate for name, rate in self.rates().items()}
        times = []
        if self.speedup is not None:
            times.append(_of(dense, "seconds") / self.speedup)
        if self.latency_ms is not None:
            times.append(self.latency_ms / 1e3)
        if times:
            limits["seconds"] = min(times)
        return limits if self.bytes is None else {**limits, "bytes": float(self.bytes)}

    def part(self, share: float, dense: Counts | None = None) -> Target:
        """The target after that share of the way: rates to the power of `share`; between dense and target likewise.

        Args:
            share: 0 to 1.
            dense: sizes of the dense network; for `latency_ms` and `bytes`.
        """
        way = {name: value**share for name, value in self.given().items() if name in (*_RATES, "speedup")}
        if self.latency_ms is not None or self.bytes is not None:
            if dense is None:
                raise ValueError(f"a part of the target {self} depends on the sizes of the dense network, got none")
            self._check_measured(dense)
        if self.latency_ms is not None:
            way["latency_ms"] = (1e3 * _of(dense, "seconds")) ** (1 - share) * self.latency_ms**share
        if self.bytes is not None:
            way["bytes"] = round(_of(dense, "bytes") ** (1 - share) * self.bytes**share)
        return Target(**way, threads=self.threads)

    def met(self, dense: Counts, now: Counts) -> bool:
        """Whether a network with `now` meets the target, measured from `dense`; a `Meter` makes both.

        Raises:
            ValueError: it limits what they do not have.
        """
        return self.excess(dense, now) <= 1e-12

    def excess(self, dense: Counts, now: Counts) -> float:
        """The logarithm of the factor by which `now` is too large, in what is furthest from the target."""
        return self._excess(self.limits(dense), now)

    def _excess(self, limits: Mapping[str, float], now: Counts) -> float:
        self._check_measured(now)
        found = (math.log(max(_of(now, name), 1e-300) / limit) for name, limit in limits.items() if limit > 0)
        return max(found, default=-math.inf)

    def _check_measured(self, sizes: Counts) -> None:
        if missing := [name for name in sorted(self.measured) if getattr(sizes, name, None) is None]:
            raise ValueError(f"the target {self} asks for {' and '.join(missing)}: sizes of a Meter have them")

    def met_by(self, dense: Counts) -> Callable[[Counts], bool]:
        """`met` as a function of the counts now."""
        limits = self.limits(dense)
        return lambda now: self._excess(limits, now) <= 1e-12

    def __str__(self) -> str:
        texts = {
            "speedup": "{}x faster",
            "latency_ms": "latency_ms {}",
            "bytes": "bytes {}",
            "threads": "threads {}",
        }
        return ", ".join(texts.get(name, name + " {}x").format(_text(value)) for name, value in self.given().items())


def _text(value: float) -> str:
    """Four digits of a fraction, all of an integer."""
    return str(value) if isinstance(value, int) else f"{value:.4g}" if value < 1e4 else f"{value:g}"


def _of(sizes: Any, name: str) -> Any:
    return getattr(sizes, name)


def _number(name: str, number: str, unit: str, text: str) -> Any:
    """The value of a part of a target."""
    allowed = {"latency_ms": ("", "ms"), "bytes": ("", *"kmgb", "kb", "mb", "gb"), "threads": ("",)}.get(
        name, ("", "x")
    )
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"a target is like {_LIKE}, got {text!r}") from None
    if unit not in allowed:
        raise ValueError(f"a target is like {_LIKE}, got {text!r}: {name} has no unit {unit!r}")
    if name in ("bytes", "threads"):
        value *= _PREFIXES[unit.removesuffix("b")]
        return int(value) if value == int(value) else value
    return value


@dataclass(frozen=True)
class Action:
    """How the rates of a network depart from experience: what a search moves.

    Args:
        weights: per layer, the logarithm of the factor by which its share of the budget is larger; the budget of the
            network is met whatever it is.
        filters: per set of tied filters, named by its first layer, the logarithm of the factor by which more of them
            are kept than have the most energy; columns make up for it. Of "filter+column" alone.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    filters: Mapping[str, float] = field(default_factory=dict)


def allocate(
    report: Report,
    target: Target,
    dense: Counts | Meter,
    structure: str = "filter+column",
    *,
    alpha: float = _ALPHA,
    action: Action | None = None,
    keep: Keep | None = None,
) -> dict[str, Constraint]:
    """A constraint for every layer, so that the network meets the target.

    Args:
        report: of the network as it is now; `report.weight` decides between filters and columns.
        target: relative to `dense`.
        dense: sizes of the network that the target counts from; for a target of latency or bytes a `Meter` (after
            compactions `Meter.after`). What the weights of the report keep is then projected, and measured.
        structure: one of `STRUCTURES`.
        alpha: how much more larger layers lose; 0 for the same rate everywhere.
        action: how the layers depart from that.
        keep: pattern of layers (a path, a glob) -> share of its weights that each keeps at least, or (at least, at
            most); of its filters with structure "filter". Unused paths and purification may take more.

    Raises:
        ValueError: the target cannot be met: even one weight per filter of every layer is too much; or there is no
            layer, or no convolution, to which it could apply; shares that contradict it, or each other.

    Example:
        >>> import torch
        >>> from autocompress_fast.graph import inspect
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10))
        >>> report = inspect(model, torch.zeros(1, 100))
        >>> constraints = allocate(report, Target(params=10), report.counts(), "element")
        >>> [constraint.keep for constraint in constraints.values()]
        [406, 144]
        >>> constraints = allocate(report, Target(params=10), report.counts(), "element", keep={"2": 0.5})
        >>> [constraint.keep for constraint in constraints.values()]
        [300, 250]
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {', '.join(STRUCTURES)}, got {structure!r}")
    if not report.layers:
        raise ValueError(f"{report.model_name} has no layer that can be pruned; left out: {report.skipped or 'none'}")
    meter = dense if isinstance(dense, Meter) else Meter(report)
    sizes = dense.dense if isinstance(dense, Meter) else dense
    if target.conv is not None and sizes.conv == 0:
        raise ValueError(f"the target {target} is for convolutions, and {report.model_name} has none")
    target.limits(sizes)  # says now what it needs
    ranges = _ranges(report, keep or {}, structure)
    counted = _Budgets(report, structure, alpha, action or Action(), ranges).counted(target, sizes)
    if not target.measured:
        return _constraints(report, counted.weights(), structure, action, ranges)
    action, goal = action or Action(), target.of_engine()

    def constraints(share: float) -> dict[str, Constraint]:
        return _constraints(report, counted.times(share).weights(), structure, action, ranges)

    def excess(margin: float, share: float) -> float:
        chosen = constraints(share)
        # How many filters and columns single weights leave, only the weights know.
        left = meter.measure(projected(report, chosen)) if structure == "element" else meter.allowed(chosen)
        return goal.excess(sizes, left) + margin

    if target.met(sizes, meter.measure(projected(report, found := constraints(1.0)))):
        return found
    for attempt in range(_ATTEMPTS):
        margin = _MARGIN * attempt
        share = _largest(partial(excess, margin), counted.least)
        if target.met(sizes, meter.measure(projected(report, found := constraints(share)))):
            return found
        if share == 0:
            break
    raise counted.times(0.0).refusal(target, sizes, meter)


def fill(
    report: Report,
    target: Target,
    dense: Counts | Meter,
    constraints: dict[str, Constraint],
    project: Callable[[dict[str, Constraint]], Plan],
    *,
    keep: Keep | None = None,
) -> dict[str, Constraint]:
    """The constraints, as much larger as the target allows once unused paths are gone.

    What a constraint lets stay is not all used: a filter that the next layer does not read is dead, and so is a column
    of a dropped filter. Their places go to others: the counts of all layers grow by one factor, then those of
    convolutions and of linear layers each by one more, as far as the target is still met. Where other weights than
    those that `allocate` saw miss a latency, the counts shrink by one factor first.

    Args:
        report: of the network as it is now.
        target: relative to `dense`.
        dense: sizes of the network that the target counts from, or a `Meter`, as of `allocate`.
        constraints: that meet the target, as `allocate` makes them.
        project: what the network would keep under constraints (`ADMM.plan`).
        keep: as of `allocate`.

    Raises:
        ValueError: the constraints leave nothing of a layer.

    Example:
        >>> import torch
        >>> from autocompress_fast import unused_paths
        >>> from autocompress_fast.admm import ADMM
        >>> from autocompress_fast.graph import inspect
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10))
        >>> report, target = inspect(model, torch.zeros(1, 100)), Target(params=50)
        >>> constraints = allocate(report, target, report.counts(), "element")
        >>> admm = ADMM(model, constraints, report=report)
        >>> filled = fill(report, target, report.counts(), constraints, admm.plan)
        >>> [unused_paths(admm.plan(c), report).weights for c in (constraints, filled)]
        [81, 110]
    """
    meter = dense if isinstance(dense, Meter) else Meter(report)
    sizes = dense.dense if isinstance(dense, Meter) else dense
    structure = next(iter(constraints.values())).structure if constraints else ""
    ranges = _ranges(report, keep or {}, structure)
    factors = {True: 1.0, False: 1.0}  # of convolutions; of linear layers
    linear = math.inf  # a target for convolutions alone says nothing of linear layers: those keep what they were given
    if list(target.given()) == ["conv"]:
        allowed = {name: _weights(report[name], constraint) for name, constraint in constraints.items()}
        linear = sum(allowed.get(layer.name, layer.weights) for layer in report.layers if not layer.is_conv)

    known: dict[tuple[Any, ...], bool] = {}  # factors that differ little lead to the same constraints

    def fits(trial: dict[bool, float]) -> bool:
        grown = _grown(report, constraints, trial, ranges)
        key = tuple(constraint.keep for constraint in grown.values())
        if key not in known:
            now = meter.measure(project(grown))
            known[key] = target.met(sizes, now) and now.params - now.conv <= linear
        return known[key]

    def grow(kinds: tuple[bool, ...], low: float, high: float) -> None:
        """Multiply by the largest factor that fits, between these logarithms; by the least when none does."""
        for _ in range(_GROWTH_STEPS):
            middle = 0.5 * (low + high)
            grown = {kind: factor * (math.exp(middle) if kind in kinds else 1.0) for kind, factor in factors.items()}
            low, high = (middle, high) if fits(grown) else (low, middle)
        factors.update({kind: factors[kind] * math.exp(low) for kind in kinds})

    if target.measured and not fits(factors):
        grow((True, False), -math.log(_MOST_GROWTH), 0.0)
        if not fits(factors):
            raise ValueError(
                f"the target {target} cannot be met with weights that are so far from where it was decided"
            )
        return _grown(report, constraints, factors, ranges)
    for kinds in ((True, False), (True,), (False,)):
        grow(kinds, 0.0, math.log(_MOST_GROWTH))
    return _grown(report, constraints, factors, ranges)


def between(
    report: Report, plan: Plan | None, constraints: Mapping[str, Constraint], share: float
) -> dict[str, Constraint]:
    """Constraints that lie a share of the way from what is left now to others: in the logarithm of every count.

    Where the others meet a target that lies so far ahead, these meet `Target.part` of it: by Hölder's inequality
    sum n^(1 - s) m^s <= (sum n)^(1 - s) (sum m)^s, whatever n weights or multiply-adds layers have and m keep. Of
    latencies and bytes, that holds only about.

    Args:
        report: of the network as it is now.
        plan: what is left of it, where not all of the report's is.
        constraints: those at the end of the way.
        share: from 0 to 1.

    Raises:
        ValueError: another share.

    Example:
        >>> import torch
        >>> from autocompress_fast.graph import inspect
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(100, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> report = inspect(model, torch.zeros(1, 100))
        >>> end = {"0": Constraint("filter+column", (16, 25)), "2": Constraint("filter+column", (10, 16))}
        >>> {name: c.keep for name, c in between(report, None, end, 0.5).items()}
        {'0': (32, 50), '2': (10, 32)}
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}")

    def middle(now: int, end: int) -> int:
        return int(now ** (1 - share) * end**share + 1e-9)

    filters = {n: c.keep[0] if isinstance(c.keep, tuple) else c.keep for n, c in constraints.items()}
    tied_by = {n: report.set_of[n] for n, c in constraints.items() if "filter" in c.structure and n in report.set_of}
    for tied in set(tied_by.values()):  # the most groups that leave each of its layers its filters
        members = [name for name in tied_by if tied_by[name] is tied]
        groups = middle(tied.size, min(tied.groups(name, filters[name]) for name in members))
        filters.update({name: tied.filters(name, groups) for name in members})
    found: dict[str, Constraint] = {}
    for name, end in constraints.items():
        left = None if plan is None else plan[name]
        columns = report[name].columns if left is None else int(left.columns.sum())
        keep: int | tuple[int, int]
        if isinstance(end.keep, tuple):
            keep = filters[name], middle(columns, end.keep[1])
        elif end.structure == "filter":
            keep = filters[name]
        else:
            weights = report[name].weights if left is None else left.weights
            keep = middle(weights if end.structure == "element" else columns, end.keep)
        found[name] = replace(end, keep=keep)
    return found


def smallest(report: Report, structure: str = "filter+column", *, keep: Keep | None = None) -> Counts:
    """The smallest network that `allocate` can ask for."""
    return _Budgets(report, structure, _ALPHA, Action(), _ranges(report, keep or {}, structure)).times(0.0).counts()


def _largest(excess: Callable[[float], float], least: float) -> float:
    """A share in (least, 1) as large as possible whose excess is not above 0; 0 when none is found.

    The logarithm of a size is about linear in that of the share: the next share lies where a line says, or half-way.
    """
    low, below = math.log(least), -math.inf
    high, above = 0.0, excess(1.0)
    found = 0.0
    middle = max(-abs(above), 0.9 * low)  # as if sizes were in proportion
    for step in range(_STEPS):
        value = excess(math.exp(middle))
        if value <= 0:
            found, low, below = math.exp(middle), middle, value
        else:
            high, above = middle, value
        if high - low < _CLOSE:
            break
        middle = 0.5 * (low + high)
        if math.isfinite(below + above) and step % 3:
            line = low + (high - low) * below / (below - above)
            middle = min(max(line, low + 0.1 * (high - low)), high - 0.1 * (high - low))
    return found


@dataclass(frozen=True)
class _Budgets:
    """Weights that each layer may keep: s * n^(1 - alpha), within its range.

    Args:
        ranges: see `_ranges`.
        scales: the factor s, of convolutions and of linear layers; by default no layer loses anything.
        bounds: (layer, whether it is a convolution, weights for s = 1, the fewest, the most) of every layer; found from
            the others when not given.
    """

    report: Report
    structure: str
    alpha: float
    action: Action
    ranges: Mapping[str, tuple[int, int]]
    scales: Mapping[bool, float] = field(default_factory=dict)
    bounds: tuple[tuple[Layer, bool, float, int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.bounds:
            object.__setattr__(self, "bounds", tuple(map(self._bounds, self.report.layers)))
        if not self.scales:
            everything = max(layer.weights / wanted for layer, _, wanted, _, _ in self.bounds)
            object.__setattr__(self, "scales", {True: everything, False: everything})

    def _bounds(self, layer: Layer) -> tuple[Layer, bool, float, int, int]:
        low, high = _least(layer, self.structure), layer.weights
        if layer.name in self.ranges and self.structure != "filter":
            low, high = (max(low, self.ranges[layer.name][0]), max(low, self.ranges[layer.name][1]))
        return layer, layer.is_conv, self._wanted(layer), low, high

    def _wanted(self, layer: Layer) -> float:
        factor: float = math.exp(self.action.weights.get(layer.name, 0.0)) * layer.weights ** (1 - self.alpha)
        return factor

    @property
    def least(self) -> float:
        """A factor at which no layer keeps more than it must."""
        return 0.5 / max(self.scales[conv] * wanted for _, conv, wanted, _, _ in self.bounds)

    def times(self, share: float, kinds: tuple[bool, ...] = (True, False)) -> _Budgets:
        """These kinds of layers scaled."""
        return replace(self, scales=self._scaled(share, kinds))

    def _scaled(self, share: float, kinds: tuple[bool, ...]) -> dict[bool, float]:
        return {kind: scale * (share if kind in kinds else 1.0) for kind, scale in self.scales.items()}

    def weights(self, scales: Mapping[bool, float] | None = None) -> dict[str, int]:
        """Layer -> the weights that it may keep, with these scales or its own."""
        scales = scales or self.scales
        return {
            layer.name: max(low, min(high, int(scales[conv] * wanted)))
            for layer, conv, wanted, low, high in self.bounds
        }

    def counts(self) -> Counts:
        """Of a network whose layers keep so many weights."""
        return _counts(self.report, self.weights(), self.structure, self.ranges)

    def counted(self, target: Target, dense: Counts) -> _Budgets:
        """The largest that meet what the target counts, found by bisection.

        A target for convolutions alone leaves the linear layers a rate of their own: what `params` asks for when it is
        given, otherwise a gentler one than the convolutions'.
        """
        rates = target.rates()
        if not rates:
            return self
        found = self
        if "conv" in rates:
            found = found._shrunk((True,), Target(conv=rates["conv"]).met_by(dense))
            if "params" in rates:
                found = found._shrunk((False,), Target(params=rates["params"]).met_by(dense))
            else:
                linear = (dense.params - dense.conv) / rates["conv"] ** _UNCOUNTED
                found = found._shrunk((False,), lambda now: now.params - now.conv <= linear)
        goal = Target(conv=target.conv, params=target.params, macs=target.macs)
        found = found._shrunk((True, False), goal.met_by(dense))
        if not goal.met(dense, found.counts()):
            raise self.times(0.0).refusal(goal, dense, None)
        return found

    def _shrunk(self, kinds: tuple[bool, ...], fits: Callable[[Counts], bool]) -> _Budgets:
        """Scaled down until the counts fit; as far as it goes when they never do."""
        if fits(self.counts()):
            return self.times(1.0, kinds)
        known: dict[tuple[int, ...], bool] = {}  # scales that differ little lead to the same weights
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = 0.5 * (low + high)
            weights = self.weights(self._scaled(middle, kinds))
            key = tuple(weights.values())
            if key not in known:
                known[key] = fits(_counts(self.report, weights, self.structure, self.ranges))
            low, high = (middle, high) if known[key] else (low, middle)
        return self.times(low, kinds)

    def refusal(self, target: Target, dense: Counts, meter: Meter | None) -> ValueError:
        """That these budgets, the smallest, do not meet the target, and what they do meet."""
        least: Any = self.counts()
        possible = [f"{name} {_of(dense, name) / _of(least, name):.4g}x" for name in target.rates()]
        bounds = []
        if meter is not None:
            chosen = _constraints(self.report, self.weights(), self.structure, self.action, self.ranges)
            least = meter.measure(projected(self.report, chosen))
            if target.speedup is not None:
                possible.append(f"{_of(dense, 'seconds') / least.seconds:.4g}x faster")
            if target.latency_ms is not None:
                bounds.append(f"latency_ms {1e3 * least.seconds:.4g}")
            if target.bytes is not None:
                bounds.append(f"bytes {least.bytes}")
        texts = [
            f"{words} {', '.join(found)}" for words, found in (("at most", possible), ("at least", bounds)) if found
        ]
        within = " and the shares to keep" if self.ranges else ""
        return ValueError(
            f"the target {target} cannot be met with structure {self.structure!r}{within}: {'; '.join(texts)}"
        )


def _ranges(report: Report, keep: Keep, structure: str) -> dict[str, tuple[int, int]]:
    """Layer -> the fewest and the most weights that it may keep; filters where whole filters go.

    Raises:
        ValueError: a pattern that no layer matches, shares that are none or contradict each other or the layer.
    """
    shares: dict[str, tuple[float, float]] = {}
    names = [layer.name for layer in report.layers]
    for pattern, given in keep.items():
        low, high = given if isinstance(given, tuple | list) else (given, 1.0)
        if not 0 <= low <= high <= 1 or high == 0:
            raise ValueError(f"keep of {pattern!r} must be a share or (at least, at most), 0 to 1, got {given!r}")
        for name in matched("keep", pattern, names):
            before = shares.get(name, (0.0, 1.0))
            shares[name] = max(before[0], low), min(before[1], high)
            if shares[name][0] > shares[name][1]:
                raise ValueError(
                    f"keep says that {name!r} keeps at least {shares[name][0]:g} and at most {shares[name][1]:g}"
                )
    ranges = {}
    for name, (low, high) in shares.items():
        layer = report[name]
        unit = layer.shape[0] if structure == "filter" else layer.weights
        least = layer.shape[0] if structure == "filter" and layer.frozen_filters else _least(layer, structure)
        if int(high * unit) < least:
            reason = layer.held or layer.frozen_filters or layer.frozen_columns
            raise ValueError(
                f"keep says that {name!r} keeps at most {high:g} of its {unit:,}, but structure {structure!r} leaves "
                f"{least:,} at least" + (f" ({reason})" if reason else "")
            )
        spare = 0 if structure in ("element", "filter") or low == 0 else layer.shape[0]  # columns are rounded down
        ranges[name] = min(unit, math.ceil(low * unit - 1e-9) + spare), int(high * unit + 1e-9)
        if ranges[name][0] > ranges[name][1]:
            ranges[name] = ranges[name][1], ranges[name][1]
    return ranges


def _constraints(
    report: Report,
    budget: dict[str, int],
    structure: str,
    action: Action | None,
    ranges: Mapping[str, tuple[int, int]],
) -> dict[str, Constraint]:
    """The constraints with which layers keep no more weights than their budgets."""
    if structure == "element":
        return {
            name: Constraint("element", weights, report[name].groups)
            for name, weights in budget.items()
            if not report[name].held
        }
    if structure == "filter":
        filters = _filters(report, budget, ranges)
        return {
            layer.name: Constraint("filter", filters[layer.name], layer.groups)
            for layer in report.layers
            if layer.filters_prunable
        }
    if structure == "column":
        return {
            layer.name: Constraint("column", max(1, budget[layer.name] // layer.shape[0]))
            for layer in report.layers
            if layer.columns_prunable
        }
    return _filters_and_columns(report, budget, action)


def _least(layer: Layer, structure: str) -> int:
    """The smallest budget of the layer: one weight, or what is frozen of it."""
    if layer.held:
        return layer.weights
    if structure in ("element", "filter"):  # for whole filters, _filters knows what is frozen
        return 1
    if layer.groups > 1 or layer.transposed:
        return layer.weights
    filters = 1 if layer.filters_prunable and structure != "column" else layer.shape[0]
    columns = 1 if layer.columns_prunable else layer.weights // layer.shape[0]
    return filters * columns


def _counts(report: Report, budget: dict[str, int], structure: str, ranges: Mapping[str, tuple[int, int]]) -> Counts:
    """Sizes of a network whose layers keep so many weights."""
    kept = budget
    if structure == "filter":  # what is kept follows from the filters of the layer and of the one before
        filters = _filters(report, budget, ranges)
        kept = {}
        for layer in report.layers:
            channels = 1.0 if layer.groups > 1 else _channel_share(report, layer, filters)
            kept[layer.name] = round(filters[layer.name] * layer.weights / layer.shape[0] * channels)
    return Counts(
        conv=sum(kept[layer.name] for layer in report.layers if layer.is_conv),
        params=sum(kept.values()),
        macs=sum(kept[layer.name] * layer.outputs for layer in report.layers),
    )


def _channel_share(report: Report, layer: Layer, filters: dict[str, int]) -> float:
    """Share of the input channels that is left when so many filters of every layer are."""
    share = np.ones(layer.inputs)
    for tied in report.sets:
        if layer.name in tied.readers:
            positions, first = tied.readers[layer.name], tied.layers[0]
            per_class = tied.counts(tied.groups(first, filters[first])) / tied.sizes
            share[positions >= 0] = per_class[tied.classes[positions[positions >= 0]]]
    return float(share.mean())


def _filters(report: Report, budget: dict[str, int], ranges: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Filters to keep when whole filters go: the square root of the layers' share, as channels go with them."""
    filters = {layer.name: layer.shape[0] for layer in report.layers}
    for tied in report.sets:
        kept = sum(min(budget[name], report[name].weights) for name in tied.layers)
        share = kept / sum(report[name].weights for name in tied.layers)
        low, high = _group_range(tied, ranges)
        groups = max(low, min(high, int(tied.size * math.sqrt(share))))
        filters.update({name: tied.filters(name, groups) for name in tied.layers})
    return filters


def _group_range(tied: Set, ranges: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """The fewest and the most groups with which all layers of the set keep as many filters as they may.

    Raises:
        ValueError: there is no such number.
    """
    low, high = 1, tied.size
    for name in tied.layers:
        least, most = ranges.get(name, (0, len(tied.rows[name])))
        groups = tied.groups(name, least)
        low, high = max(low, groups + (tied.filters(name, groups) < least)), min(high, tied.groups(name, most))
    if low > high:
        raise ValueError(f"keep contradicts itself: the filters of {', '.join(tied.layers)} are tied to each other")
    return low, high


def _filters_and_columns(report: Report, budget: dict[str, int], action: Action | None) -> dict[str, Constraint]:
    """Split every layer's weights into filters x columns, from the output backwards.

    A filter that nobody reads is wasted, and a column without its filter as well: a layer keeps at least as many
    filters as its readers' columns need, and exactly as many where every filter is one column there. Layers whose
    filters are tied keep the same; of grouped and transposed convolutions, the filters alone are chosen.
    """
    sizes: dict[str, tuple[int, int]] = {}
    groups: dict[Set, int] = {}
    constraints: dict[str, Constraint] = {}
    for layer in reversed(report.layers):
        rows, width = layer.shape[0], layer.weights // layer.shape[0]
        tied = report.set_of.get(layer.name)
        if tied is not None and tied not in groups:
            groups[tied] = _groups(report, tied, budget, sizes, action)
        filters = rows if tied is None else tied.filters(layer.name, groups[tied])
        if layer.columns_prunable:
            sizes[layer.name] = filters, min(width, max(1, budget[layer.name] // filters))
            constraints[layer.name] = Constraint("filter+column", sizes[layer.name])
        elif tied is not None:
            constraints[layer.name] = Constraint("filter", filters, layer.groups)
    return {layer.name: constraints[layer.name] for layer in report.layers if layer.name in constraints}


def _groups(
    report: Report, tied: Set, budget: dict[str, int], sizes: dict[str, tuple[int, int]], action: Action | None
) -> int:
    """Number of groups of tied filters: what readers need, or those with which the layers keep most energy."""
    least = 1
    for reader, positions in tied.readers.items():
        if reader in sizes and (positions >= 0).all():
            layer = report[reader]
            per_group = positions.size / tied.size * (layer.columns // layer.inputs)
            least = max(least, min(tied.size, math.ceil(sizes[reader][1] / per_group)))
            if per_group == 1 and len(tied.layers) == 1:
                return min(least, budget[tied.layers[0]])
    members = [report[name] for name in tied.layers if report[name].columns_prunable]
    if not members:
        return max(least, round(tied.size * min(1.0, budget[tied.layers[0]] / report[tied.layers[0]].weights)))
    if len(tied.layers) == 1:
        least = min(least, budget[members[0].name])
    fewest = max(math.ceil(budget[m.name] / (m.weights // m.shape[0]) * tied.size / m.shape[0]) for m in members)
    most = min(tied.size, *(budget[m.name] for m in members))
    low = max(1, min(tied.size, max(least, fewest)))
    if action is None:
        return _with_most_energy(report, tied, {m.name: budget[m.name] for m in members}, low, max(low, most))
    # A search asks thousands of times, for budgets that differ little: each layer's energies are known by then.
    rounded = {m.name: max(1, round(2 ** (round(math.log2(budget[m.name]) * _ROUNDED) / _ROUNDED))) for m in members}
    known = _ENERGIES.setdefault(report, {})
    choices = _choices(1, tied.size)
    for name, weights in rounded.items():
        if (name, weights) not in known:
            known[name, weights] = [_energy(report, tied, name, weights, number) for number in choices]
    allowed = [i for i, number in enumerate(choices) if number <= min(rounded.values())]
    chosen = choices[max(allowed, key=lambda i: sum(known[one][i] for one in rounded.items()))]
    departure = math.exp(action.filters.get(tied.layers[0], 0.0))
    return max(low, min(max(low, most), round(chosen * departure)))


def _with_most_energy(report: Report, tied: Set, budget: dict[str, int], low: int, high: int) -> int:
    """The number of groups of tied filters with which layers of these budgets keep the most energy."""

    def energy(groups: int) -> float:
        return sum(_energy(report, tied, name, weights, groups) for name, weights in budget.items())

    return max(_choices(low, high), key=energy)


@lru_cache(1024)
def _choices(low: int, high: int) -> list[int]:  # nobody changes them
    return sorted({round(n) for n in np.geomspace(low, high, _FILTER_CHOICES).tolist()})


def _energy(report: Report, tied: Set, name: str, weights: int, groups: int) -> float:
    """What so many weights of a layer keep, with so many groups of its filters."""
    layer = report[name]
    filters = tied.filters(name, groups)
    columns = min(layer.weights // layer.shape[0], max(1, weights // filters))
    kept = ops.project_filters_and_columns(report.weight(name), filters=filters, columns=columns)
    return float((kept**2).sum())


def _weights(layer: Layer, constraint: Constraint) -> int:
    """The weights that a constraint lets stay."""
    if isinstance(constraint.keep, tuple):
        return constraint.keep[0] * constraint.keep[1]
    groups = {"filter": layer.shape[0], "column": layer.columns}.get(constraint.structure, layer.weights)
    return constraint.keep * layer.weights // groups


def _grown(
    report: Report,
    constraints: dict[str, Constraint],
    factors: dict[bool, float],
    ranges: Mapping[str, tuple[int, int]],
) -> dict[str, Constraint]:
    """The constraints with so many times the weights: from 1 on, no count is smaller than before; else none is larger.

    None is above what there is, or leaves its range.
    """
    grown: dict[str, Constraint] = {}
    groups: dict[Set, int] = {}
    for layer in reversed(report.layers):
        if layer.name not in constraints:
            continue
        old, factor = constraints[layer.name], factors[layer.is_conv]
        farther: Callable[[int, int], int] = max if factor >= 1 else min
        low, high = ranges.get(layer.name, (1, layer.weights))
        tied = report.set_of.get(layer.name)
        keep: int | tuple[int, int]
        if isinstance(old.keep, tuple) or old.structure == "filter":
            first = old.keep[0] if isinstance(old.keep, tuple) else old.keep
            if tied is not None and tied not in groups:
                groups[tied] = _grown_groups(report, tied, layer, first, factor, grown)
                if not isinstance(old.keep, tuple):
                    fewest, most = _group_range(tied, ranges)
                    groups[tied] = max(fewest, min(most, groups[tied]))
            filters = first if tied is None else farther(first, tied.filters(layer.name, groups[tied]))
            keep = filters
            if isinstance(old.keep, tuple):
                weights = int(old.keep[0] * old.keep[1] * factor)
                columns = farther(old.keep[1], weights // filters)
                if layer.name in ranges:
                    columns = max(math.ceil(low / filters), min(high // filters, columns))
                keep = filters, max(1, min(layer.weights // layer.shape[0], columns))
        elif old.structure == "element":
            keep = max(low, min(high, layer.weights, int(old.keep * factor)))
        else:
            rows = layer.shape[0]
            keep = max(math.ceil(low / rows), min(high // rows, layer.columns, int(old.keep * factor)))
        grown[layer.name] = Constraint(old.structure, keep, old.groups)
    return {name: grown[name] for name in constraints}


def _grown_groups(
    report: Report, tied: Set, layer: Layer, filters: int, factor: float, grown: dict[str, Constraint]
) -> int:
    """As many as the reader's columns where every filter is one column there; otherwise half of the change."""
    for reader, positions in tied.readers.items():
        keep = grown[reader].keep if reader in grown else None
        one = positions.size == tied.size and report[reader].columns == report[reader].inputs
        if isinstance(keep, tuple) and one and (positions >= 0).all() and len(tied.layers) == 1:
            return min(tied.size, max(filters, keep[1]) if factor >= 1 else keep[1])
    return min(tied.size, max(1, int(tied.groups(layer.name, filters) * math.sqrt(factor) + 1e-9)))


def relative(keep: Keep, dense: Report, now: Report, structure: str) -> Keep:
    """Shares of the layers of the dense network as shares of what is left of them."""
    shares: dict[str, tuple[float, float]] = {}
    for pattern, given in keep.items():
        low, high = given if isinstance(given, tuple | list) else (given, 1.0)
        for name in matched("keep", pattern, [layer.name for layer in dense.layers]):
            if name not in now:
                continue
            before, after = dense[name], now[name]
            grown = before.shape[0] / after.shape[0] if structure == "filter" else before.weights / after.weights
            one = min(1.0, low * grown), min(1.0, high * grown)
            known = shares.get(name, (0.0, 1.0))
            shares[name] = max(known[0], one[0]), min(known[1], one[1])
    return shares
