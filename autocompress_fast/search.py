"""Every layer's rates, found by simulated annealing (AutoCompress, arXiv 1907.03141, section 4).

The four steps of the paper, each of which can be replaced: an *action* says how the layers depart from experience
(`rates.Action`) and becomes constraints that meet the target exactly (`rates.allocate`); a *quick evaluation* scores
the network pruned so in one shot (`quick_score`); the *decision* is that of simulated annealing; the *actual pruning*
is left to ADMM. Beyond the paper, experience guides the moves and forbids none: a profile says which layers are
sensitive and gives the directions to start from, and moves that were accepted lately are tried again in part.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autocompress_fast._files import write_atomically
from autocompress_fast.admm import ADMM, Constraint
from autocompress_fast.graph import Counts, Report
from autocompress_fast.meter import Meter
from autocompress_fast.plan import Plan, mask
from autocompress_fast.progress import Progress
from autocompress_fast.rates import STRUCTURES, Action, Keep, Target, allocate

if TYPE_CHECKING:
    import torch

    from autocompress_fast.data import Batches

__all__ = ["Found", "Search", "Trial", "one_shot", "quick_score", "read_trace"]

Floats = npt.NDArray[np.float64]
Constraints = dict[str, Constraint]

_STEP = 0.5  # standard deviation of a move of one coordinate at the start: a factor of e^0.5
_LEAST_STEP = 0.2  # of that, at the end
_PROFILE_STEP = -math.log(2)  # a layer at half its budget
_DIRECTIONS = (0.25, 0.5, 1.0)  # how far towards the sensitive layers the first candidates go
_FIRST_TEMPERATURE, _LAST_TEMPERATURE = 0.5, 0.01  # of the spread of the scores
_MEMORY = 0.8  # of the moves accepted before, in what guides the next
_GUIDED = 0.5  # share of what they say in a move
_PATIENCE = 30  # evaluations without a better score after which the best is gone back to
_FORMAT = 1


@dataclass(frozen=True)
class Trial:
    """A candidate that was scored: a line of the trace.

    Attributes:
        number: counted from 1.
        kind: "start", "profile" (a layer at half its budget), "direction" (towards sensitive layers), "move" or
            "restart" (a move from the best).
        action: what was tried.
        score: of it; higher is better.
        temperature: of the decision; 0 before the annealing begins.
        accepted: whether the search went on from there.
        best: the best score so far.
        seconds: since the search began, over all its runs.
    """

    number: int
    kind: str
    action: Action
    score: float
    temperature: float
    accepted: bool
    best: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Found:
    """What a search has found.

    Attributes:
        constraints: the best ones; they meet the target.
        action: that led to them.
        score: of the network pruned so in one shot; `start` that of experience alone.
        trace: every trial.
    """

    constraints: Constraints
    action: Action
    score: float
    start: float
    trace: tuple[Trial, ...]

    @property
    def acceptance(self) -> float:
        """The share of moves that were accepted."""
        moves = [t.accepted for t in self.trace if t.kind in ("move", "restart")]
        return sum(moves) / len(moves) if moves else 0.0

    def plot(self, path: str | Path) -> Path:
        """Draw score and temperature over the trials into a picture, such as "search.png"; matplotlib is needed."""
        from autocompress_fast.report import plot_search

        return plot_search(self, path)


class Search:
    """Looks for the constraints that meet a target with the highest score.

    Args:
        report: of the network as it is now.
        target: relative to `dense`.
        score: of constraints, higher is better; any function. `quick_score` makes one.
        dense: sizes that the target counts from, or a `Meter`; those of `report` when not given.
        structure: one of `rates.STRUCTURES`.
        keep: shares that layers keep at least and at most, as of `allocate`.
        profile: whether to measure first how sensitive every layer is; a quarter of the evaluations at most.
        temperature: factor on the temperatures; 0 accepts nothing that is worse.
        seed: of the moves.
        trace: a file of JSON lines, written after every evaluation. A search that finds its own trace goes on from
            there, with the same moves as if it had not been stopped.

    The temperature is measured in the spread of the scores, so scaling the score changes nothing.

    Raises:
        ValueError: a target that cannot be met, an unknown structure, the trace of another search.

    Example:
        >>> import torch
        >>> from autocompress_fast.graph import inspect
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10))
        >>> report = inspect(model, torch.zeros(1, 100))
        >>> def prefer_the_last(constraints):
        ...     return float(constraints["2"].keep)
        >>> found = Search(report, Target(params=10), prefer_the_last, structure="element").run(40)
        >>> found.score > found.start, sum(c.keep for c in found.constraints.values()) <= 550
        (True, True)
    """

    def __init__(
        self,
        report: Report,
        target: Target,
        score: Callable[[Constraints], float],
        *,
        dense: Counts | Meter | None = None,
        structure: str = "filter+column",
        keep: Keep | None = None,
        profile: bool = True,
        temperature: float = 1.0,
        seed: int = 0,
        trace: str | Path | None = None,
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        if structure not in STRUCTURES:
            raise ValueError(f"structure must be one of {', '.join(STRUCTURES)}, got {structure!r}")
        self.report, self.target, self.score = report, target, score
        if dense is None:
            dense = Meter.of(report, target)
        self.meter, self.keep = dense, dict(keep or {})
        self.dense = dense.dense if isinstance(dense, Meter) else dense
        self.structure, self.profile, self.temperature, self.seed = structure, profile, temperature, seed
        self.trace = None if trace is None else Path(trace)
        constraints = self.constraints(Action())  # says now what cannot be met
        both = structure in ("filter+column", "filter-then-column")
        self.coordinates = tuple(
            [("weights", name) for name in constraints]
            + [("filters", tied.layers[0]) for tied in report.sets if both and tied.layers[0] in constraints]
        )

    def constraints(self, action: Action) -> Constraints:
        """Those that an action leads to; they meet the target."""
        return allocate(self.report, self.target, self.meter, self.structure, action=action, keep=self.keep)

    def run(
        self, evaluations: int | None = None, *, minutes: float | None = None, progress: Progress | None = None
    ) -> Found:
        """Search until the budget is used up: evaluations, minutes, or what comes first.

        Raises:
            ValueError: no budget, or none left for a single evaluation.
        """
        found: Found | None = None
        progress = progress or Progress()
        progress.start("search", evaluations or 0)
        for found in self.steps(evaluations, minutes=minutes):
            progress.advance()
            progress.tell(f"best {found.score:.4g}, experience {found.start:.4g}")
        progress.finish()
        assert found is not None
        return found

    def steps(self, evaluations: int | None = None, *, minutes: float | None = None) -> Iterator[Found]:
        """As `run`, with what has been found after every evaluation."""
        for name, value in (("evaluations", evaluations), ("minutes", minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be more than 0, got {value}")
        if evaluations is None and minutes is None:
            raise ValueError("a search needs a number of evaluations or minutes, got neither")
        budget = _Budget(evaluations, minutes)
        annealing = _Annealing(self, budget, self._read(budget))
        for _ in annealing.trials():
            yield annealing.found()

    # ---- the trace ----

    def _head(self, budget: _Budget) -> dict[str, Any]:
        names = {name: list(self.report[name].shape) for name in self.constraints(Action())}
        settings = {"structure": self.structure, "profile": self.profile, "temperature": self.temperature}
        settings |= {"budget": asdict(budget)} | ({"keep": self.keep} if self.keep else {})
        head = {"format": _FORMAT, "target": self.target.given(), "dense": asdict(self.dense), "layers": names}
        return dict(json.loads(json.dumps(head | settings | {"seed": self.seed})))

    def _read(self, budget: _Budget) -> list[Trial]:
        """What an earlier run has written; a last line that was cut off is left out."""
        if self.trace is None:
            return []
        head = self._head(budget)
        if not self.trace.exists():
            self.trace.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.trace, (json.dumps(head) + "\n").encode())
            return []
        whole, found, known = _parsed(self.trace)
        if found != head:
            differing = ", ".join(key for key in head if found.get(key) != head[key])
            raise ValueError(f"{self.trace} is of a search with another {differing}; choose another file")
        write_atomically(self.trace, ("\n".join(whole) + "\n").encode())
        return known

    def _write(self, trial: Trial) -> None:
        if self.trace is not None:
            with self.trace.open("a") as file:
                file.write(json.dumps(asdict(trial)) + "\n")


@dataclass(frozen=True)
class _Budget:
    evaluations: int | None
    minutes: float | None

    def used(self, evaluations: int, seconds: float) -> float:
        """The share of it that is gone; 1 or more: all."""
        by_count = evaluations / self.evaluations if self.evaluations else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_count, by_time)


@dataclass
class _Annealing:
    """One run. What it does follows from the seed and the scores, so known scores bring it to where it was."""

    search: Search
    budget: _Budget
    known: list[Trial]  # of an earlier run
    trace: list[Trial] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)  # of constraints seen before
    best: tuple[float, Floats] | None = None
    chosen: tuple[Action, Constraints] | None = None  # what the best leads to

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.search.seed)
        self.begun = time.monotonic()
        self.before = self.known[-1].seconds if self.known else 0.0
        self.used = 0.0

    def trials(self) -> Iterator[Trial]:
        """Score candidate after candidate."""
        size = len(self.search.coordinates)
        current = np.zeros(size)
        yield self.scored("start", current)
        score = self.trace[-1].score
        if self.search.profile:
            yield from self.profiled(score)
            assert self.best is not None
            score, current = self.best
        spread = self.spread()
        guide, since = np.zeros(size), 0
        while self.used < 1:
            cold = min(1.0, self.used)
            temperature = self.search.temperature * spread * _FIRST_TEMPERATURE
            temperature *= (_LAST_TEMPERATURE / _FIRST_TEMPERATURE) ** cold
            kind = "move"
            if since >= _PATIENCE:
                assert self.best is not None
                kind, since = "restart", 0
                score, current = self.best
            step = self.move(guide, 1 - (1 - _LEAST_STEP) * cold)
            proposed, before = current + step, self.best
            trial = self.scored(kind, proposed, score, temperature, chance=self.random.random())
            if trial.accepted:
                guide = _MEMORY * guide + (1 - _MEMORY) * step / _STEP
                current, score = proposed, trial.score
            since = since + 1 if self.best is before else 0
            yield trial

    def profiled(self, start: float) -> Iterator[Trial]:
        """Every layer at half its budget, then candidates that give more to those at which the score fell most."""
        layers: list[int] = []  # as many as the budget of a profile is enough for
        drops = np.zeros(len(self.search.coordinates))
        for i, (kind, _) in enumerate(self.search.coordinates):
            if kind != "weights":
                continue
            if self.used >= 0.25:
                break
            layers.append(i)
            halved = np.zeros(len(drops))
            halved[i] = _PROFILE_STEP
            yield self.scored("profile", halved)
            drops[i] = start - self.trace[-1].score
        deviation = float(drops[layers].std()) if layers else 0.0
        if deviation > 0:
            direction = np.zeros(len(drops))
            direction[layers] = np.clip((drops[layers] - drops[layers].mean()) / deviation, -2, 2)
            for share in _DIRECTIONS:
                if self.used < 1:
                    yield self.scored("direction", share * direction)

    def move(self, guide: Floats, size: float) -> Floats:
        """A step along a few coordinates, drawn at random and towards where accepted moves have gone."""
        count = len(guide)
        changed = self.random.random(count) < min(1.0, 3 / count)
        changed[self.random.integers(count)] = True
        step = self.random.standard_normal(count) + _GUIDED * guide
        return np.where(changed, _STEP * size * step, 0.0)

    def scored(
        self, kind: str, vector: Floats, against: float = -math.inf, temperature: float = 0.0, chance: float = 0.0
    ) -> Trial:
        """Score a candidate, or take its score from the trace, decide, and write it down."""
        action = self.action(vector)
        number = len(self.trace) + 1
        if number <= len(self.known):
            old = self.known[number - 1]
            if old.kind != kind or old.action != action:
                raise ValueError(f"evaluation {number} in {self.search.trace} is not what this search does there")
            score, seconds = old.score, old.seconds
        else:
            constraints = self.search.constraints(action)
            key = repr([(name, c.keep) for name, c in constraints.items()])
            if key not in self.scores:
                self.scores[key] = float(self.search.score(constraints))
            score, seconds = self.scores[key], self.before + time.monotonic() - self.begun
            if math.isnan(score):
                raise ValueError(f"the score of evaluation {number} is NaN, of {constraints}")
        if self.best is None or score > self.best[0]:
            self.best = (score, vector)
        accepted = _accepts(score - against, temperature, chance)
        trial = Trial(number, kind, action, score, temperature, accepted, self.best[0], seconds)
        self.trace.append(trial)
        if number > len(self.known):
            self.search._write(trial)
        self.used = self.budget.used(number, seconds)
        return trial

    def action(self, vector: Floats) -> Action:
        parts: dict[str, dict[str, float]] = {"weights": {}, "filters": {}}
        for (kind, name), value in zip(self.search.coordinates, vector.tolist(), strict=True):
            parts[kind][name] = value
        return Action(**parts)

    def spread(self) -> float:
        """Standard deviation of the finite scores so far."""
        scores = np.array([t.score for t in self.trace if math.isfinite(t.score)])
        return float(scores.std()) if len(scores) > 1 else 0.0

    def found(self) -> Found:
        assert self.best is not None
        action = self.action(self.best[1])
        if self.chosen is None or self.chosen[0] != action:
            self.chosen = (action, self.search.constraints(action))
        return Found(self.chosen[1], action, self.best[0], self.trace[0].score, tuple(self.trace))


def read_trace(path: str | Path) -> tuple[Trial, ...]:
    """What a search has written to its file so far, as `Found.trace` has it; a line that was cut off is left out.

    Raises:
        ValueError: the file is no trace of a search.
        OSError: it cannot be opened.
    """
    path = Path(path)
    _, head, trials = _parsed(path)
    if head.get("format") != _FORMAT:
        raise ValueError(f"{path} is no trace of a search: its first line does not say format {_FORMAT}")
    numbers = ("number", "score", "temperature", "best", "seconds")
    for trial in trials:
        wrong = [name for name in numbers if not isinstance(getattr(trial, name), (int, float))]
        if wrong or not isinstance(trial.kind, str):
            raise ValueError(f"{path} is no trace of a search: {', '.join(wrong) or 'kind'} in line {trial.number!r}")
    return tuple(trials)


def _parsed(path: Path) -> tuple[list[str], dict[str, Any], list[Trial]]:
    """The whole lines of a trace, its head (empty if there is none), and its trials."""
    try:
        whole = path.read_text().rpartition("\n")[0].splitlines()
        lines = [json.loads(line) for line in whole]
        trials = [Trial(**{**line, "action": Action(**line["action"])}) for line in lines[1:]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no trace of a search: {error}") from error
    return whole, lines[0] if lines and isinstance(lines[0], dict) else {}, trials


def _accepts(gain: float, temperature: float, chance: float) -> bool:
    """The rule of Metropolis."""
    return gain >= 0 or (temperature > 0 and chance < math.exp(gain / temperature))


def quick_score(
    model: torch.nn.Module,
    report: Report,
    validation: Batches,
    *,
    calibration: Iterable[Any] | None = None,
    measure: str = "accuracy",
    precision: str = "float32",
    channels_last: bool = False,
) -> Callable[[Mapping[str, Constraint]], float]:
    """A score of constraints: how well the network does when it is pruned so in one shot, without retraining.

    Args:
        model: trained; it is not changed.
        report: of it.
        validation: on which it is scored; some samples will do, always the same.
        calibration: batches (x, y) of training data on which the statistics of batch normalisations are measured anew
            before that; what is pruned shifts them.
        measure: "accuracy" in percent, or "loss" for the negative cross entropy.
        precision, channels_last: as for `evaluate`.

    Raises:
        ValueError: an unknown measure.
    """
    from autocompress_fast.training import evaluate, recalibrate

    if measure not in ("accuracy", "loss"):
        raise ValueError(f"measure must be accuracy or loss, got {measure!r}")
    batches = None if calibration is None else list(calibration)

    def score(constraints: Mapping[str, Constraint]) -> float:
        pruned = mask(model, one_shot(model, report, constraints))
        if batches is not None:
            recalibrate(pruned, batches, precision=precision, channels_last=channels_last)
        result = evaluate(pruned, validation, precision=precision, channels_last=channels_last)
        return result.accuracy if measure == "accuracy" else -result.loss

    return score


def one_shot(model: torch.nn.Module, report: Report, constraints: Mapping[str, Constraint]) -> Plan:
    """What magnitudes alone keep of a network under constraints, tied filters together."""
    return ADMM(model, constraints, report=report).plan()
