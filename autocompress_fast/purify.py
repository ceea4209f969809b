"""Purification: removing what contributes so little that the network does as well without it, within a tolerance.

The scores are those of P-RM (arXiv 1905.00136, Algorithm 1); its thresholds, set by hand there, are found here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autocompress_fast import ops
from autocompress_fast.graph import Counts, Report, Set, inspect
from autocompress_fast.graph.operators import oriented
from autocompress_fast.ops import PurificationLimits
from autocompress_fast.plan import Plan, apply_masks, mask
from autocompress_fast.progress import Progress
from autocompress_fast.unused import unused_paths, whole

if TYPE_CHECKING:
    import torch

__all__ = ["Purified", "PurifyStep", "purify"]

_FEWEST, _MOST = 2, 8  # evaluations that find one limit
_FACTOR = 4.0  # from one share of a layer's energy to the next that is tried, until one is too much


@dataclass(frozen=True)
class PurifyStep:
    """A limit that was found, and what fell below it.

    Attributes:
        round: counted from 1.
        layers: the layer, or the layers whose filters are tied.
        limit: "filter", "column" or "channel": of its norm, or for a channel of its importance.
        value: of the limit; 0 when nothing could go.
        groups: how many filters (groups of tied ones), columns or channels were below it, and `of` how many.
        filters, columns, weights, macs: that went in the whole network, unused paths with them.
        score_before, score: of the network.
        evaluations: how many networks were tried.
    """

    round: int
    layers: tuple[str, ...]
    limit: str
    value: float
    groups: int
    of: int
    filters: int
    columns: int
    weights: int
    macs: int
    score_before: float
    score: float
    evaluations: int


@dataclass(frozen=True, eq=False)
class Purified:
    """What `purify` leaves; print it for tables.

    Attributes:
        plan: what is kept; a subset of the plan given.
        model: a copy of the network, masked; retrained, if that was asked for.
        steps: in order, the limits that were tried.
        before, unused, after: sizes: as the plan given has it, without its unused paths, and of `plan`.
        scores: of the network given, and after every round (after its retraining).
        evaluations: how many networks were scored.
    """

    plan: Plan
    model: torch.nn.Module
    steps: tuple[PurifyStep, ...]
    before: Counts
    unused: Counts
    after: Counts
    scores: tuple[float, ...]
    evaluations: int

    def __str__(self) -> str:
        from autocompress_fast.report import Purification

        return str(Purification(self))

    def __rich__(self) -> Any:
        from autocompress_fast.report import Purification

        return Purification(self).__rich__()

    def to_json(self) -> dict[str, Any]:
        """The figures as plain numbers and strings."""
        return {
            "before": asdict(self.before),
            "unused": asdict(self.unused),
            "after": asdict(self.after),
            "scores": list(self.scores),
            "evaluations": self.evaluations,
            "steps": [asdict(step) | {"layers": list(step.layers)} for step in self.steps],
        }


def purify(
    model: torch.nn.Module,
    score: Callable[[torch.nn.Module], float],
    example_input: torch.Tensor | Sequence[torch.Tensor],
    *,
    plan: Plan | None = None,
    tolerance: float = 0.2,
    evaluations: int = 200,
    rounds: int = 1,
    retrain: Callable[[torch.nn.Module, Plan], None] | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Purified:
    """Remove small columns, channels and filters, and all that is unused then, as far as the score allows.

    For every layer three limits are looked for: of the norm of its columns, of the importance of its
    channels (sigma of the paper: the mean squared norm of a channel's columns), and of the norm of its filters, joint
    over all that is tied. Each is the largest with which the network, masked and without its unused paths, still
    scores enough; the search is by the energy (squared norm) that goes, in factors and then by bisection. The layers
    that have most to save come first, and each has its part of the tolerance: after layers with a share s of all that
    could go, the score may have fallen by s * tolerance; what one does not need, the next ones have.

    Args:
        model: trained; not changed.
        score: of a network, higher is better; called with masked copies of `model`. The accuracy, in percent, on some
            validation images, for one. The copies are its to use, but for their weights.
        example_input: what the model takes.
        plan: what is kept so far; everything when not given.
        tolerance: how far the score may fall below that of the network given, before retraining.
        evaluations: the number of networks to score in a round, about; at least two for every limit are.
        rounds: how often to go through all layers; with `retrain`, what one round lost the next can lose again.
        retrain: called after every round with the masked copy and its plan, to train it in place and keep its masks
            (`MaskedParameters`, or a `Trainer` with `plan`).
        report: of `acf.inspect` on this model, when there is one.
        progress: who is told.

    Raises:
        ValueError: a negative tolerance, a score that is not finite, a plan for other layers.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     model[0].weight[3:] *= 1e-3  # filters that hardly do anything
        >>> x = torch.randn(64, 4)
        >>> expected = model(x)
        >>> purified = purify(model, lambda net: -float((net(x) - expected).abs().max()), x, tolerance=0.05)
        >>> purified.plan["0"].filters.tolist()
        [True, True, True, False, False, False, False, False]
        >>> purified.plan["2"].columns.tolist() == purified.plan["0"].filters.tolist()
        True
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance}")
    for name, value in (("evaluations", evaluations), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    report = inspect(model, example_input) if report is None else report
    told = progress or Progress()
    given = Plan.dense(report) if plan is None else Plan(whole(plan, report), plan.parameters, report.held)
    search = _Search(mask(model, given), given, score, report, told)
    floor, scores, steps = search.score - tolerance, [search.score], []
    if not search.without_unused_paths(floor):
        told.note(
            "unused paths: the network needs the constants that empty filters put out, so they stay; "
            "`compact` folds them into what reads them"
        )
    unused = report.counts(search.plan)
    for number in range(1, rounds + 1):
        told.note(f"purification, round {number} of {rounds}: the score is {search.score:.4g}, at least {floor:.4g}")
        found = list(search.round(number, floor, evaluations))
        steps += found
        if retrain is not None:
            search.retrained(retrain)
        scores.append(search.score)
        if not any(step.groups for step in found):
            break
    apply_masks(search.model, search.plan)
    return Purified(
        search.plan,
        search.model,
        tuple(steps),
        report.counts(given),
        unused,
        report.counts(search.plan),
        tuple(scores),
        search.evaluations,
    )


@dataclass(frozen=True)
class _Unit:
    """One limit to be found: of the columns or channels of a layer, or of the filters of tied layers."""

    limit: str
    layers: tuple[str, ...]


class _Search:
    """A network, what is kept of it so far, and its score."""

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        score: Callable[[torch.nn.Module], float],
        report: Report,
        progress: Progress,
    ) -> None:
        self.model, self.plan, self.report, self.progress = model, plan, report, progress
        self._score_of = score
        self._tried = copy.deepcopy(model)
        self._tied = _numbered(report)
        self._share = 0.01  # of a layer's energy, which is tried first
        self.evaluations = 0
        self.score = self._evaluate(plan)

    def without_unused_paths(self, floor: float) -> bool:
        """Drop them, unless the score is below `floor` then: they are not zero, if the network was trained so."""
        plan = unused_paths(self.plan, self.report)
        if plan == self.plan:
            return True
        found = self._evaluate(plan)
        if found >= floor:
            self.plan, self.score = plan, found
        return found >= floor

    def round(self, number: int, floor: float, evaluations: int) -> Iterator[PurifyStep]:
        """Find one limit after the other, those with most to save first."""
        kept = {name: layer.weights for name, layer in self.plan.items()}
        units = sorted(self._units(), key=lambda unit: -sum(kept[name] for name in unit.layers))
        savings = np.array([sum(kept[name] for name in unit.layers) for unit in units], float)
        shares = np.cumsum(savings) / max(1.0, savings.sum())
        each = min(_MOST, max(_FEWEST, evaluations // max(1, len(units))))
        self.progress.start("purification", len(units))
        begun = self.score
        for unit, share in zip(units, shares.tolist(), strict=True):
            step = self._step(number, unit, min(begun, floor + (1 - share) * max(0.0, begun - floor)), each)
            self.progress.advance()
            self.progress.tell(f"{', '.join(unit.layers)}: score {self.score:.4g}")
            yield step
        self.progress.finish()

    def _units(self) -> Iterator[_Unit]:
        for layer in self.report.layers:
            if layer.columns_prunable:
                if layer.columns > layer.inputs:  # where a channel is one column, the two limits are the same
                    yield _Unit("channel", (layer.name,))
                yield _Unit("column", (layer.name,))
        for tied in self.report.sets:
            yield _Unit("filter", tied.layers)

    def _step(self, number: int, unit: _Unit, floor: float, evaluations: int) -> PurifyStep:
        """The largest limit with which the score is at least `floor`, as far as so many evaluations tell."""
        scores = self._scores()
        norms = self._norms(unit, scores)
        energy = np.cumsum(norms**2)  # of the smallest ones, rising; more of it costs more of the score
        energy /= max(float(energy[-1]), 1e-300) if norms.size else 1.0
        before, tried = self.plan, self.evaluations
        low, high = 0, norms.size  # so many of the smallest can go; so many are too many, as one has to stay
        best = self.plan, self.score, 0.0
        score_before, share = self.score, self._share
        while high - low > 1 and self.evaluations - tried < evaluations:
            count = int(np.clip(np.searchsorted(energy, share, "right"), low + 1, high - 1))
            value = float(norms[count])  # what is below goes
            plan = self._below(unit, value, scores)
            found = None if plan is None else self._evaluate(plan)
            if plan is not None and found is not None and found >= floor:
                low, best = count, (plan, found, value)
            else:
                high = count
            share = self._next_share(float(energy[low - 1]) if low else 0.0, float(energy[high - 1]), norms.size, high)
        if norms.size > 1:  # the next layer begins where this one has ended, by and large
            reached = float(np.clip(energy[low - 1] if low else energy[high - 1] / _FACTOR, 1e-6, 0.5))
            self._share = math.sqrt(self._share * reached)
        self.plan, self.score, value = best
        counts, left = self.report.counts(before), self.report.counts(self.plan)
        return PurifyStep(
            number,
            unit.layers,
            unit.limit,
            value,
            groups=int((norms < value).sum()),
            of=norms.size,
            filters=sum(int(layer.filters.sum() - self.plan[name].filters.sum()) for name, layer in before.items()),
            columns=sum(int(layer.columns.sum() - self.plan[name].columns.sum()) for name, layer in before.items()),
            weights=counts.params - left.params,
            macs=counts.macs - left.macs,
            score_before=score_before,
            score=self.score,
            evaluations=self.evaluations - tried,
        )

    def _next_share(self, low: float, high: float, groups: int, too_many: int) -> float:
        """The share of the energy to try next, between one that can go and one that is too much."""
        if low == 0:
            return high / _FACTOR
        if too_many == groups:  # nothing was too much yet
            return min(low * _FACTOR, 0.5 * (low + 1))
        return math.sqrt(low * high)

    def _scores(self) -> list[ops.PurificationScores]:
        """Of all layers, as they are masked now."""
        apply_masks(self.model, self.plan)
        weights = []
        for layer in self.report.layers:
            weight: Any = self.model.get_submodule(layer.name).weight
            plain = oriented(weight.detach(), layer.groups, transposed=layer.transposed)
            weights.append((plain.contiguous(), layer.groups))
        return ops.purification_scores_all(weights, names=[layer.name for layer in self.report.layers])

    def _norms(self, unit: _Unit, scores: list[ops.PurificationScores]) -> npt.NDArray[np.float64]:
        """Norms, or importances, of all that is left and could go, in order."""
        by_name = {layer.name: score for layer, score in zip(self.report.layers, scores, strict=True)}
        if unit.limit == "filter":
            tied = self.report.set_of[unit.layers[0]]
            found = tied.joint({name: np.asarray(by_name[name].filter_norms) for name in unit.layers})
        else:
            score = by_name[unit.layers[0]]
            found = np.asarray(score.importance if unit.limit == "channel" else score.column_norms)
        left: npt.NDArray[np.float64] = np.sort(found[found > 0])
        return left

    def _below(self, unit: _Unit, value: float, scores: list[ops.PurificationScores]) -> Plan | None:
        """The plan without what is below the limit, and what is unused then; None when nothing would be left."""
        limit = PurificationLimits(**{"importance" if unit.limit == "channel" else unit.limit: value})
        nothing = PurificationLimits()
        limits = [limit if layer.name in unit.layers else nothing for layer in self.report.layers]
        kept = ops.purification_keep(scores, limits, tied=self._tied)
        layers = {}
        for layer, (columns, filters) in zip(self.report.layers, kept, strict=True):
            now = self.plan[layer.name]
            if layer.name in unit.layers:
                if unit.limit == "filter":
                    now = replace(now, filters=now.filters & filters)
                else:
                    now = replace(now, columns=now.columns & columns)
            layers[layer.name] = now
        try:
            return unused_paths(Plan(layers), self.report)
        except ValueError:  # nothing would be left
            return None

    def _evaluate(self, plan: Plan) -> float:
        import torch

        self._tried.load_state_dict(self.model.state_dict())
        apply_masks(self._tried, plan)
        with torch.no_grad():
            value = float(self._score_of(self._tried))
        if not np.isfinite(value):
            raise ValueError(f"score must return a finite number, got {value}")
        self.evaluations += 1
        return value

    def retrained(self, retrain: Callable[[torch.nn.Module, Plan], None]) -> None:
        """Let the network be trained under its masks, and score it anew."""
        apply_masks(self.model, self.plan)
        retrain(self.model, self.plan)
        self.score = self._evaluate(self.plan)


def _numbered(report: Report) -> list[npt.NDArray[np.int64]]:
    """(P,) of every layer: the number of each filter's group of tied filters, -1 where it cannot be cut."""
    first: dict[Set, int] = {}
    for tied in report.sets:
        first[tied] = sum(other.size for other in first)
    numbers = []
    for layer in report.layers:
        tied_set = report.set_of.get(layer.name)
        rows = np.full(layer.shape[0], -1) if tied_set is None else tied_set.rows[layer.name]
        numbers.append(np.where(rows < 0, -1, rows + (0 if tied_set is None else first[tied_set])).astype(np.int64))
    return numbers
