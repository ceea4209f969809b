"""How much of every layer stays: a budget for the network turned into a constraint for each layer.

Larger layers bear higher rates (the experience that AutoCompress builds on, arXiv 1907.03141): a layer of n weights
keeps s * n^(1 - alpha) of them, with one s for the network that meets the budget exactly. How many of a layer's weights
are filters and how many columns is then chosen by the energy (squared norm) that the nearest such pattern keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from autocompress_fast import ops
from autocompress_fast.admm import Constraint
from autocompress_fast.graph import Counts, Layer, Report, Set
from autocompress_fast.plan import Plan
from autocompress_fast.unused import unused_paths

__all__ = ["STRUCTURES", "Action", "Target", "allocate", "fill", "smallest"]

STRUCTURES = ("filter+column", "filter-then-column", "filter", "column", "element")

_ALPHA = 0.55
# Rate of linear layers that a target does not count, as a power of the convolutions' rate. At the same rate (power 1)
# the linear layers limit LeNet-5: at 89x CONV, 35x instead of 85x of all weights gave 0.4 points more (validation set).
_UNCOUNTED = 0.75
_FILTER_CHOICES = 16  # candidate filter counts of a layer, spaced geometrically
_ROUNDED = 2  # steps in which a search rounds budgets, to a factor of two, for the choice among those
_MOST_GROWTH, _GROWTH_STEPS = 64.0, 16  # of `fill`: factors up to the first, found to a relative 64^(2^-16)


_ENERGIES: WeakKeyDictionary[Report, dict[tuple[str, int], list[float]]] = WeakKeyDictionary()  # by layer and budget


@dataclass(frozen=True)
class Target:
    """How small the network is to be, as rates dense / remaining; every rate that is given must be met.

    Args:
        conv: of the weights of convolutions.
        params: of the weights of convolutions and linear layers.
        macs: of the multiply-adds.

    Raises:
        ValueError: no rate, or one below 1.

    Example:
        >>> Target.parse("conv=40")
        Target(conv=40.0, params=None, macs=None)
        >>> Target.parse("20x").params
        20.0
    """

    conv: float | None = None
    params: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        rates = self.rates()
        if not rates:
            raise ValueError("a target needs at least one of conv, params, macs")
        for name, rate in rates.items():
            if not 1 <= rate < math.inf:
                raise ValueError(f"{name} is the rate dense / remaining, 1 or more, got {rate}")

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read "20x" (all weights), "conv=40", "macs=4x", or several with commas between them."""
        rates: dict[str, float] = {}
        for part in text.split(","):
            name, equals, rate = part.strip().rpartition("=")
            name = name.strip() if equals else "params"
            try:
                value = float(rate.strip().removesuffix("x"))
            except ValueError:
                raise ValueError(f"a target is like 20x or conv=40,macs=4, got {text!r}") from None
            if name not in ("conv", "params", "macs") or name in rates:
                raise ValueError(f"a target names each of conv, params, macs at most once, got {text!r}")
            rates[name] = value
        return cls(**rates)

    def rates(self) -> dict[str, float]:
        """The rates that are given, by name."""
        return {n: float(v) for n in ("conv", "params", "macs") if (v := getattr(self, n)) is not None}

    def part(self, share: float) -> Target:
        """The target after that share of the way: every rate to the power of `share`."""
        return Target(**{name: rate**share for name, rate in self.rates().items()})

    def met(self, dense: Counts, now: Counts) -> bool:
        """Whether a network with `now` meets the target, measured from `dense`."""
        return all(
            getattr(now, name) * rate <= getattr(dense, name) * (1 + 1e-12) for name, rate in self.rates().items()
        )

    def met_by(self, dense: Counts) -> Callable[[Counts], bool]:
        """`met` as a function of the counts now."""
        return lambda now: self.met(dense, now)

    def __str__(self) -> str:
        return ", ".join(f"{name} {rate:g}x" for name, rate in self.rates().items())


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
    dense: Counts,
    structure: str = "filter+column",
    *,
    alpha: float = _ALPHA,
    action: Action | None = None,
) -> dict[str, Constraint]:
    """A constraint for every layer, so that the network meets the target.

    Args:
        report: of the network as it is now; `report.weight` decides between filters and columns.
        target: relative to `dense`.
        dense: sizes of the network that the target counts from.
        structure: one of `STRUCTURES`.
        alpha: how much more larger layers lose; 0 for the same rate everywhere.
        action: how the layers depart from that.

    Raises:
        ValueError: the target cannot be met: even one weight per filter of every layer is too much; or there is no
            layer, or no convolution, to which it could apply.

    Example:
        >>> import torch
        >>> from autocompress_fast.graph import inspect
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10))
        >>> report = inspect(model, torch.zeros(1, 100))
        >>> constraints = allocate(report, Target(params=10), report.counts(), "element")
        >>> [constraint.keep for constraint in constraints.values()]
        [406, 144]
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {', '.join(STRUCTURES)}, got {structure!r}")
    if not report.layers:
        raise ValueError(f"{report.model_name} has no layer that can be pruned; left out: {report.skipped or 'none'}")
    if target.conv is not None and dense.conv == 0:
        raise ValueError(f"the target {target} is for convolutions, and {report.model_name} has none")
    budget = _budget(report, target, dense, structure, alpha, action or Action())
    if structure == "element":
        return {
            name: Constraint("element", weights, report[name].groups)
            for name, weights in budget.items()
            if not report[name].held
        }
    if structure == "filter":
        filters = _filters(report, budget)
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


def fill(
    report: Report,
    target: Target,
    dense: Counts,
    constraints: dict[str, Constraint],
    project: Callable[[dict[str, Constraint]], Plan],
) -> dict[str, Constraint]:
    """The constraints, as much larger as the target allows once unused paths are gone.

    What a constraint lets stay is not all used: a filter that the next layer does not read is dead, and so is a column
    of a dropped filter. Their places go to others: the counts of all layers grow by one factor, then those of
    convolutions and of linear layers each by one more, as far as the target is still met.

    Args:
        report: of the network as it is now.
        target: relative to `dense`.
        dense: sizes of the network that the target counts from.
        constraints: that meet the target, as `allocate` makes them.
        project: what the network would keep under constraints (`ADMM.plan`).

    Raises:
        ValueError: the constraints leave nothing of a layer.

    Example:
        >>> import torch
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
    factors = {True: 1.0, False: 1.0}  # of convolutions; of linear layers
    linear = math.inf  # a target for convolutions alone says nothing of linear layers: those keep what they were given
    if list(target.rates()) == ["conv"]:
        allowed = {name: _weights(report[name], constraint) for name, constraint in constraints.items()}
        linear = sum(allowed.get(layer.name, layer.weights) for layer in report.layers if not layer.is_conv)

    def fits(trial: dict[bool, float]) -> bool:
        plan = project(_grown(report, constraints, trial))
        counts = report.counts(unused_paths(plan, report))
        return target.met(dense, counts) and counts.params - counts.conv <= linear

    for kinds in ((True, False), (True,), (False,)):
        low, high = 0.0, math.log(_MOST_GROWTH)
        for _ in range(_GROWTH_STEPS):
            middle = 0.5 * (low + high)
            grown = {kind: factor * (math.exp(middle) if kind in kinds else 1.0) for kind, factor in factors.items()}
            low, high = (middle, high) if fits(grown) else (low, middle)
        factors.update({kind: factors[kind] * math.exp(low) for kind in kinds})
    return _grown(report, constraints, factors)


def smallest(report: Report, structure: str = "filter+column") -> Counts:
    """The smallest network that `allocate` can ask for."""
    return _counts(report, {layer.name: _least(layer, structure) for layer in report.layers}, structure)


def _budget(
    report: Report, target: Target, dense: Counts, structure: str, alpha: float, action: Action
) -> dict[str, int]:
    """Weights that each layer may keep: s * n^(1 - alpha), with the largest s that meet the target, by bisection.

    A target for convolutions alone leaves the linear layers a rate of their own: what `params` asks for when it is
    given, otherwise a gentler one than the convolutions'.
    """
    names = [layer.name for layer in report.layers]
    weights, outputs = (np.array([getattr(layer, of) for layer in report.layers]) for of in ("weights", "outputs"))
    convolutions = np.array([layer.is_conv for layer in report.layers])
    departures = np.array([math.exp(action.weights.get(name, 0.0)) for name in names])
    wanted = departures * np.array([layer.weights ** (1 - alpha) for layer in report.layers])
    least = np.array([_least(layer, structure) for layer in report.layers])
    scales = np.full(len(names), float((weights / wanted).max()))

    def budget(scales: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        kept: npt.NDArray[np.int64] = np.maximum(least, np.minimum(weights, scales * wanted).astype(np.int64))
        return kept

    def counts(kept: npt.NDArray[np.int64]) -> Counts:
        if structure == "filter":
            return _counts(report, dict(zip(names, kept.tolist(), strict=True)), structure)
        return Counts(conv=int(kept @ convolutions), params=int(kept.sum()), macs=int(kept @ outputs))

    def shrink(chosen: npt.NDArray[np.bool_], fits: Callable[[Counts], bool]) -> None:
        """Scale these layers down until the counts fit; as far as it goes when they never do."""
        low, high = 0.0, 1.0
        if fits(counts(budget(scales))):
            return
        for _ in range(60):
            middle = 0.5 * (low + high)
            fitting = fits(counts(budget(np.where(chosen, middle * scales, scales))))
            low, high = (middle, high) if fitting else (low, middle)
        scales[chosen] *= low

    if target.conv is not None:
        shrink(convolutions, Target(conv=target.conv).met_by(dense))
        if target.params is None:
            linear = (dense.params - dense.conv) / target.conv**_UNCOUNTED
            shrink(~convolutions, lambda now: now.params - now.conv <= linear)
        else:
            shrink(~convolutions, Target(params=target.params).met_by(dense))
    shrink(np.ones(len(names), bool), target.met_by(dense))
    result = budget(scales)
    if not target.met(dense, counts(result)):
        lowest = smallest(report, structure)
        possible = ", ".join(f"{name} {getattr(dense, name) / getattr(lowest, name):.4g}x" for name in target.rates())
        raise ValueError(f"the target {target} cannot be met with structure {structure!r}: at most {possible}")
    return dict(zip(names, result.tolist(), strict=True))


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


def _counts(report: Report, budget: dict[str, int], structure: str) -> Counts:
    """Sizes of a network whose layers keep so many weights."""
    kept = budget
    if structure == "filter":  # what is kept follows from the filters of the layer and of the one before
        filters = _filters(report, budget)
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
            per_class = tied.counts(tied.groups(first, filters[first])) / np.bincount(tied.classes)
            share[positions >= 0] = per_class[tied.classes[positions[positions >= 0]]]
    return float(share.mean())


def _filters(report: Report, budget: dict[str, int]) -> dict[str, int]:
    """Filters to keep when whole filters go: the square root of the layers' share, as channels go with them."""
    filters = {layer.name: layer.shape[0] for layer in report.layers}
    for tied in report.sets:
        kept = sum(min(budget[name], report[name].weights) for name in tied.layers)
        share = kept / sum(report[name].weights for name in tied.layers)
        groups = max(1, int(tied.size * math.sqrt(share)))
        filters.update({name: tied.filters(name, groups) for name in tied.layers})
    return filters


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


def _choices(low: int, high: int) -> list[int]:
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


def _grown(report: Report, constraints: dict[str, Constraint], factors: dict[bool, float]) -> dict[str, Constraint]:
    """The constraints with so many times the weights, no count smaller than before, and none above what there is."""
    grown: dict[str, Constraint] = {}
    groups: dict[Set, int] = {}
    for layer in reversed(report.layers):
        if layer.name not in constraints:
            continue
        old, factor = constraints[layer.name], factors[layer.is_conv]
        tied = report.set_of.get(layer.name)
        keep: int | tuple[int, int]
        if isinstance(old.keep, tuple) or old.structure == "filter":
            first = old.keep[0] if isinstance(old.keep, tuple) else old.keep
            if tied is not None and tied not in groups:
                groups[tied] = _grown_groups(report, tied, layer, first, factor, grown)
            filters = first if tied is None else max(first, tied.filters(layer.name, groups[tied]))
            keep = filters
            if isinstance(old.keep, tuple):
                weights = int(old.keep[0] * old.keep[1] * factor)
                keep = filters, min(layer.weights // layer.shape[0], max(old.keep[1], weights // filters))
        else:
            keep = min(layer.weights if old.structure == "element" else layer.columns, int(old.keep * factor))
        grown[layer.name] = Constraint(old.structure, keep, old.groups)
    return {name: grown[name] for name in constraints}


def _grown_groups(
    report: Report, tied: Set, layer: Layer, filters: int, factor: float, grown: dict[str, Constraint]
) -> int:
    """As many as the reader's columns where every filter is one column there; otherwise half of the growth."""
    for reader, positions in tied.readers.items():
        keep = grown[reader].keep if reader in grown else None
        one = positions.size == tied.size and report[reader].columns == report[reader].inputs
        if isinstance(keep, tuple) and one and (positions >= 0).all() and len(tied.layers) == 1:
            return min(tied.size, max(filters, keep[1]))
    return min(tied.size, max(1, int(tied.groups(layer.name, filters) * math.sqrt(factor) + 1e-9)))
