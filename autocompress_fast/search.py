"""Every layer's rates, found by simulated annealing (AutoCompress, arXiv 1907.03141, section 4).

The four steps of the paper, each of which can be replaced: an *action* says how the layers depart from experience
(`rates.Action`) and becomes constraints that meet the target exactly (`rates.allocate`); a *quick evaluation* scores
the network pruned so (`quick_score`), after some steps of training with its masks, since what pruning costs at first
says less about what it costs in the end; the *decision* is that of simulated annealing; the *actual pruning* is left
to ADMM.

Beyond the paper, no move is blind: of many that are drawn, those are tried which a regression over all trials so far
(`_Regression`) holds for the best. How well a network does follows closely from the logarithms of the filters and
columns that its layers keep, so that some ten trials tell more about a move than its size does.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from autocompress_fast._files import write_atomically
from autocompress_fast._ranks import Ranks
from autocompress_fast._workers import Workers
from autocompress_fast.admm import ADMM, Constraint
from autocompress_fast.graph import Counts, Report
from autocompress_fast.meter import Meter
from autocompress_fast.plan import Plan, mask
from autocompress_fast.progress import Progress
from autocompress_fast.rates import STRUCTURES, Action, Keep, Target, allocate

if TYPE_CHECKING:
    import torch

    from autocompress_fast.data import Batches
    from autocompress_fast.training import TrainingConfig

__all__ = ["Found", "Search", "Trial", "one_shot", "quick_score", "read_trace"]

Floats = npt.NDArray[np.float64]
Constraints = dict[str, Any]  # of what is kept, or of levels
_Scorers: TypeAlias = "Workers[Constraints, float] | Ranks[Constraints, float]"

_STEP = 0.5  # standard deviation of a move of one coordinate at the start: a factor of e^0.5
_LEAST_STEP = 0.2  # of that, at the end
_CHANGED = ((3, 1.0), (10, 0.8), (math.inf, 0.6))  # coordinates that a move changes, about; how far, in steps
_DRAWN = 64  # moves, of which the most promising are tried
_BOLDNESS = 0.5  # what the regression does not know counts so much in that
_FIRST = 0.2  # share of the evaluations that go to directions and departures, before the annealing
_MOST_FIRST = 24
_DIRECTION = 0.25  # how far: the power of a layer's size by which its budget changes
_DEPARTURE = 0.3  # standard deviation of each coordinate
_FIRST_TEMPERATURE, _LAST_TEMPERATURE = 0.5, 0.01  # of the spread of the scores
_PATIENCE = 30  # evaluations without a better score after which the best is gone back to
_KNOWN = 300  # latest trials that the regression sees
_RETRAIN_LR = 0.02  # of a few steps, for networks trained with SGD
_LENGTHS, _NOISES = (1.0, 2.0, 4.0, 8.0), (0.03, 0.1, 0.3, 1.0)  # of the regression
_FORMAT = 2


@dataclass(frozen=True)
class Trial:
    """A candidate that was scored: a line of the trace.

    Attributes:
        number: counted from 1.
        kind: "start", "departure" (far from it, in a direction or at random), "move", or "restart" (a move from the
            best).
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
        score: of them; `start` that of experience alone.
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


class Annealer(ABC):
    """A search by simulated annealing, whatever for: what an action leads to is left to those that derive from it.

    Args:
        report: of the network.
        score: of what is found, higher is better; any function that says the same of the same.
        temperature: factor on the temperatures; 0 accepts nothing that is worse.
        batch: candidates that are proposed together, from the same trials; 1 knows most at every one.
        workers: processes that score the candidates of a batch at the same time, each on one thread; 1: this one; see
            `Workers` for what they are. "ranks": those of torch.distributed, with as many threads as they have. All of
            them then search alike, and find the same; only rank 0 reads and writes the trace. What is found depends on
            `batch` and not on them.
        seed: of the moves.
        trace: a file of JSON lines, written after every evaluation. A search that finds its own trace goes on from
            there, with the same moves as if it had not been stopped.

    The temperature is measured in the spread of the scores, so scaling the score changes nothing.

    Raises:
        ValueError: a temperature, batch or number of workers that makes no sense.
    """

    coordinates: tuple[tuple[str, str], ...]
    """What a move changes: parts of an action, "weights" or "filters", and the names of layers."""

    before: Action | None = None
    """What is tried after experience."""

    def __init__(
        self,
        report: Report,
        score: Callable[[Constraints], float],
        *,
        temperature: float = 1.0,
        batch: int = 4,
        workers: int | Literal["ranks"] = 1,
        seed: int = 0,
        trace: str | Path | None = None,
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        for what, number in (("batch", batch), ("workers", 1 if workers == "ranks" else workers)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{what} must be an integer of 1 or more, got {number!r}")
        self.report, self.score, self.temperature, self.seed = report, score, temperature, seed
        self.batch: int = batch
        self.workers: int | Literal["ranks"] = workers
        self.trace = None if trace is None else Path(trace)

    @abstractmethod
    def constraints(self, action: Action) -> Constraints:
        """Those that an action leads to."""

    @abstractmethod
    def kept(self, constraints: Mapping[str, Any]) -> tuple[int, ...]:
        """Numbers above 0 that tell candidates apart, and that their scores follow from."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What is looked for, as a trace names it."""

    def run(
        self, evaluations: int | None = None, *, minutes: float | None = None, progress: Progress | None = None
    ) -> Found:
        """Search until the budget is used up: evaluations, minutes, or what comes first.

        Raises:
            ValueError: no budget, or a score that is NaN.
            RuntimeError: a worker died.
        """
        found: Found | None = None
        progress = progress or Progress()
        progress.start("search", evaluations or 0)
        with closing(self.steps(evaluations, minutes=minutes)) as steps:
            for found in steps:
                progress.advance()
                progress.tell(f"best {found.score:.4g}, experience {found.start:.4g}")
        progress.finish()
        assert found is not None
        return found

    def steps(self, evaluations: int | None = None, *, minutes: float | None = None) -> Generator[Found, None, None]:
        """As `run`, with what has been found after every evaluation; workers end when it is closed."""
        for name, value in (("evaluations", evaluations), ("minutes", minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be more than 0, got {value}")
        if evaluations is None and minutes is None:
            raise ValueError("a search needs a number of evaluations or minutes, got neither")
        budget = _Budget(evaluations, minutes)
        with self._scoring(minutes) as workers:
            ranks = workers if isinstance(workers, Ranks) else None
            known = self._read(budget) if ranks is None else ranks.of_first(lambda: self._read(budget))
            annealing = _Annealing(self, budget, known, workers, writes=ranks is None or ranks.rank == 0)
            for _ in annealing.trials():
                yield annealing.found()

    def _scoring(self, minutes: float | None) -> AbstractContextManager[_Scorers | None]:
        """What scores candidates at the same time."""
        if self.workers == "ranks":
            if minutes is not None:
                raise ValueError(f"ranks would not agree on when {minutes} minutes are over: give evaluations")
            return Ranks(self.score)
        count = min(self.workers, self.batch)
        return Workers(self.score, count) if count > 1 else nullcontext()

    # ---- the trace ----

    def _head(self, budget: _Budget) -> dict[str, Any]:
        names = {name: list(self.report[name].shape) for name in self.constraints(Action())}
        settings: dict[str, Any] = {"temperature": self.temperature, "batch": self.batch, "budget": asdict(budget)}
        if hasattr(self.score, "settings"):
            settings["score"] = self.score.settings()
        head = {"format": _FORMAT, **self.described(), "layers": names}
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
            differing = ", ".join(key for key in head | found if found.get(key) != head.get(key))
            raise ValueError(f"{self.trace} is of a search with another {differing}; choose another file")
        write_atomically(self.trace, ("\n".join(whole) + "\n").encode())
        return known

    def _write(self, trial: Trial) -> None:
        if self.trace is not None:
            with self.trace.open("a") as file:
                file.write(json.dumps(asdict(trial)) + "\n")


class Search(Annealer):
    """Looks for the constraints that meet a target with the highest score.

    Args:
        report: of the network as it is now.
        target: relative to `dense`.
        score: of constraints, higher is better; any function that says the same of the same. `quick_score` makes one.
        dense: sizes that the target counts from, or a `Meter`; those of `report` when not given.
        structure: one of `rates.STRUCTURES`.
        keep: shares that layers keep at least and at most, as of `allocate`.
        before: what a search of a network much like this one has found; tried second.
        options: as of `Annealer`.

    Raises:
        ValueError: a target that cannot be met, an unknown structure, the trace of another search; NaN or infinity in
            `before`.
        TypeError: `before` is no action.

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
        before: Action | None = None,
        **options: Any,
    ) -> None:
        if structure not in STRUCTURES:
            raise ValueError(f"structure must be one of {', '.join(STRUCTURES)}, got {structure!r}")
        if before is not None and not isinstance(before, Action):
            raise TypeError(f"before must be an Action, such as Found.action, got {type(before).__name__}")
        if before is not None:
            for name, value in itertools.chain(before.weights.items(), before.filters.items()):
                if not math.isfinite(value):
                    raise ValueError(f"before must be of finite numbers, got {value} for {name!r}")
        super().__init__(report, score, **options)
        self.target, self.before = target, before
        if dense is None:
            dense = Meter.of(report, target)
        self.meter, self.keep = dense, dict(keep or {})
        self.dense = dense.dense if isinstance(dense, Meter) else dense
        self.structure = structure
        constraints = self.constraints(Action())  # says now what cannot be met
        both = structure in ("filter+column", "filter-then-column")
        self.coordinates = tuple(
            [("weights", name) for name in constraints]
            + [("filters", tied.layers[0]) for tied in report.sets if both and tied.layers[0] in constraints]
        )

    def constraints(self, action: Action) -> Constraints:
        """Those that an action leads to; they meet the target."""
        return dict(allocate(self.report, self.target, self.meter, self.structure, action=action, keep=self.keep))

    def kept(self, constraints: Mapping[str, Any]) -> tuple[int, ...]:
        """What is kept of each layer."""
        keeps = (c.keep if isinstance(c.keep, tuple) else (c.keep,) for c in constraints.values())
        return tuple(number for keep in keeps for number in keep)

    def described(self) -> dict[str, Any]:
        """The target, and the network it is of."""
        described = {"target": self.target.given(), "dense": asdict(self.dense), "structure": self.structure}
        described |= {"keep": self.keep} if self.keep else {}
        return described | ({} if self.before is None else {"before": asdict(self.before)})


@dataclass(frozen=True)
class _Budget:
    evaluations: int | None
    minutes: float | None

    def used(self, evaluations: int, seconds: float) -> float:
        """The share of it that is gone; 1 or more: all."""
        by_count = evaluations / self.evaluations if self.evaluations else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_count, by_time)

    def left(self, evaluations: int) -> int:
        """How many more there may be."""
        return sys.maxsize if self.evaluations is None else self.evaluations - evaluations


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A departure from experience, and what it leads to."""

    vector: Floats
    action: Action
    constraints: Constraints
    kept: tuple[int, ...]  # as `Search.kept` has it


@dataclass
class _Annealing:
    """One run. What it does follows from the seed and the scores, so known scores bring it to where it was."""

    search: Annealer
    budget: _Budget
    known: list[Trial]  # of an earlier run
    workers: _Scorers | None
    writes: bool  # its trials into the file of the trace
    trace: list[Trial] = field(default_factory=list)
    tried: list[_Candidate] = field(default_factory=list)  # those of the trace
    scores: dict[tuple[int, ...], float] = field(default_factory=dict)  # of what was kept before
    best: int = 0  # its place in the trace
    current: int = 0  # where the search goes on from
    improved: int = 0  # trials when there was a new best

    def __post_init__(self) -> None:
        self.begun = time.monotonic()
        self.before = self.known[-1].seconds if self.known else 0.0
        self.used = 0.0

    def trials(self) -> Iterator[Trial]:
        """Score candidate after candidate: experience, departures far from it, then the moves of the annealing."""
        yield from self.scored("start", lambda: [np.zeros(len(self.search.coordinates))])
        while self.used < _FIRST and len(self.trace) < _MOST_FIRST:
            yield from self.scored("departure", self.departures)
        self.current, spread = self.best, self.spread()
        while self.used < 1:
            cold = min(1.0, self.used)
            temperature = self.search.temperature * spread * _FIRST_TEMPERATURE
            temperature *= (_LAST_TEMPERATURE / _FIRST_TEMPERATURE) ** cold
            kind = "move"
            if len(self.trace) - self.improved >= _PATIENCE:
                kind, self.current, self.improved = "restart", self.best, len(self.trace)
            size = 1 - (1 - _LEAST_STEP) * cold
            yield from self.scored(kind, functools.partial(self.moves, size), temperature)

    def departures(self) -> list[Floats]:
        """What was found before, directions from experience, then random departures from the best, and opposites."""
        random, best = self.random("departures"), self.tried[self.best].vector
        known = [] if self.search.before is None else [self.vector(self.search.before)]
        steps = _DEPARTURE * random.standard_normal(((self.search.batch + 1) // 2, len(best)))
        pairs = [best + sign * step for step in steps for sign in (1, -1)]
        return ((known + self.directions())[len(self.trace) - 1 :] + pairs)[: self.search.batch]

    def directions(self) -> list[Floats]:
        """Larger layers lose less than by experience, and more; so do later ones; more filters, and fewer."""
        coordinates = self.search.coordinates
        of_weights = np.array([kind == "weights" for kind, _ in coordinates])
        sizes = np.log([self.search.report[name].weights for _, name in coordinates])
        depths = np.linspace(0, float(np.ptp(sizes[of_weights])), int(of_weights.sum()))
        directions = np.zeros((3, len(coordinates)))
        directions[0, of_weights] = sizes[of_weights] - sizes[of_weights].mean()
        directions[1, of_weights] = depths - depths.mean()
        directions[2, ~of_weights] = 1.0
        return [sign * _DIRECTION * one for one in directions if one.any() for sign in (1, -1)]

    def moves(self, size: float) -> list[Floats]:
        """From where the search is, the most promising of many, as one regression after the other sees it."""
        random, here = self.random("move"), self.tried[self.current].vector
        drawn = max(_DRAWN, 4 * self.search.batch)
        counts, lengths = np.array(_CHANGED)[random.integers(len(_CHANGED), size=drawn)].T
        changed = random.random((drawn, len(here))) < counts[:, None] / len(here)
        changed[np.arange(drawn), random.integers(len(here), size=drawn)] = True
        steps = np.where(changed, random.standard_normal(changed.shape), 0.0) * (_STEP * size * lengths[:, None])
        moved = [self.candidate(here + step) for step in steps]
        candidates = list({c.kept: c for c in moved if c.kept not in self.scores}.values()) or moved
        latest = slice(max(0, len(self.tried) - _KNOWN), None)
        regression = _Regression(_features(self.tried[latest]), np.array([t.score for t in self.trace[latest]]))
        promise = regression.expected(_features(candidates), _BOLDNESS, self.search.batch, random)
        chosen: list[int] = []
        for values in promise:
            values[chosen] = -math.inf
            chosen.append(int(values.argmax()))
        return [candidates[index].vector for index in chosen]

    def random(self, what: str) -> np.random.Generator:
        """Of its own for every batch: what lies before it can then be taken from a trace."""
        return np.random.default_rng((self.search.seed, len(self.trace), len(what)))

    def scored(self, kind: str, propose: Callable[[], list[Floats]], temperature: float = 0.0) -> Iterator[Trial]:
        """Score a batch of candidates, or take scores from the trace; decide on one by one, and write them down."""
        begun = len(self.trace)
        count = min(1 if kind == "start" else self.search.batch, self.budget.left(begun))
        known = self.known[begun : begun + count]
        if any(trial.kind != kind for trial in known):
            raise ValueError(f"evaluation {begun + 1} in {self.search.trace} is not what this search does there")
        vectors = [self.vector(trial.action) for trial in known]
        if len(known) < count:
            vectors += propose()[len(known) : count]
        chances = self.random("chances").random(count).tolist()
        batch = [self.candidate(vector) for vector in vectors]
        self.scores |= {candidate.kept: trial.score for candidate, trial in zip(batch, known, strict=False)}
        fresh = {c.kept: c.constraints for c in batch if c.kept not in self.scores}
        score = self.search.score
        scores = map(score, fresh.values()) if self.workers is None else self.workers.map(list(fresh.values()))
        for candidate, chance in zip(batch, chances, strict=True):
            if candidate.kept not in self.scores:
                self.scores[candidate.kept] = float(next(scores))
            yield self.decided(kind, candidate, temperature, chance)

    def decided(self, kind: str, candidate: _Candidate, temperature: float, chance: float) -> Trial:
        """A line of the trace: whether the search goes on from the candidate."""
        place, score = len(self.trace), self.scores[candidate.kept]
        if math.isnan(score):
            raise ValueError(f"the score of evaluation {place + 1} is NaN, of {candidate.constraints}")
        accepted = place == 0 or _accepts(score - self.trace[self.current].score, temperature, chance)
        self.current = place if accepted else self.current
        if place == 0 or score > self.trace[self.best].score:
            self.best, self.improved = place, place + 1
        best = score if self.best == place else self.trace[self.best].score
        known = place < len(self.known)
        seconds = self.known[place].seconds if known else self.before + time.monotonic() - self.begun
        trial = Trial(place + 1, kind, candidate.action, score, temperature, accepted, best, seconds)
        self.trace.append(trial)
        self.tried.append(candidate)
        if self.writes and not known:
            self.search._write(trial)
        self.used = self.budget.used(place + 1, seconds)
        return trial

    def candidate(self, vector: Floats) -> _Candidate:
        parts: dict[str, dict[str, float]] = {"weights": {}, "filters": {}}
        for (kind, name), value in zip(self.search.coordinates, vector.tolist(), strict=True):
            parts[kind][name] = value
        action = Action(**parts)
        constraints = self.search.constraints(action)
        return _Candidate(vector, action, constraints, self.search.kept(constraints))

    def vector(self, action: Action) -> Floats:
        parts = {"weights": action.weights, "filters": action.filters}
        return np.array([parts[kind].get(name, 0.0) for kind, name in self.search.coordinates])

    def spread(self) -> float:
        """Of the finite scores so far: as a standard deviation, but a few that are far away do not count."""
        scores = np.array([t.score for t in self.trace if math.isfinite(t.score)])
        low, high = np.quantile(scores, (0.25, 0.75)) if len(scores) else (0.0, 0.0)
        return float(high - low) / 1.35

    def found(self) -> Found:
        best = self.tried[self.best]
        return Found(best.constraints, best.action, self.trace[self.best].score, self.trace[0].score, tuple(self.trace))


class _Regression:
    """What scores to expect elsewhere: a Gaussian process on their ranks, which has neither scale nor outliers.

    The kernel is exp(-d^2 / 2 l^2), and noise stands for the roughness of the scores; both are as likely as can be.
    """

    def __init__(self, points: Floats, scores: Floats) -> None:
        ordered, count = np.sort(scores), len(scores)
        ranks = (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")) / (2 * count)
        values = np.array([NormalDist().inv_cdf(rank) for rank in ranks.tolist()])
        self.points, distances = points, _distances(points, points)
        likeliest = -math.inf
        for length in _LENGTHS:
            kernel = np.exp(-0.5 * distances / length**2)
            for noise in _NOISES:
                factor = np.linalg.cholesky(kernel + noise * np.eye(count))
                whitened = np.linalg.solve(factor, values)
                variance = max(float(whitened @ whitened) / count, 1e-12)
                likelihood = -0.5 * count * math.log(variance) - float(np.log(np.diag(factor)).sum())
                if likelihood > likeliest:
                    likeliest = likelihood
                    self.length, self.factor, self.whitened, self.variance = length, factor, whitened, variance

    def expected(self, points: Floats, boldness: float, draws: int, random: np.random.Generator) -> Floats:
        """Scores at points, (draws, points): as they may be, with so much of the deviations from their mean."""
        across = np.linalg.solve(self.factor, np.exp(-0.5 * _distances(self.points, points) / self.length**2))
        covariance = np.exp(-0.5 * _distances(points, points) / self.length**2) - across.T @ across
        deviations = np.linalg.cholesky(self.variance * covariance + 1e-6 * np.eye(len(points)))
        drawn = random.standard_normal((draws, len(points))) @ deviations.T
        result: Floats = self.whitened @ across + boldness * drawn
        return result


def _distances(one: Floats, other: Floats) -> Floats:
    """Squared, between all points of one and the other."""
    squares: Floats = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    return np.maximum(squares, 0.0, out=squares)


def _features(candidates: Sequence[_Candidate]) -> Floats:
    """What a score depends on: logarithms of what is kept."""
    return np.log([candidate.kept for candidate in candidates])


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
    train: Batches | None = None,
    retrain_steps: int = 0,
    training: TrainingConfig | None = None,
    measure: str = "accuracy",
    precision: str = "float32",
    channels_last: bool = False,
) -> Callable[[Mapping[str, Constraint]], float]:
    """A score of constraints: how well the network does when it is pruned so in one shot and trained for some steps.

    Every candidate sees the same batches in the same order, so the score of the same constraints is the same, in any
    process with as many threads.

    Args:
        model: trained; it is not changed.
        report: of it.
        validation: on which it is scored; some samples will do, always the same.
        calibration: batches (x, y) of training data on which the statistics of batch normalisations are measured anew
            before that; what is pruned shifts them.
        train: batches of training data, of which the first `retrain_steps`, over its epochs, are kept in memory.
        retrain_steps: of training with what was pruned staying zero, before the score is read; 0 for none. Without it,
            a score says what pruning breaks, and with it what cannot be mended; see docs/architecture.md.
        training: optimizer, learning rate, its schedule over these steps and what else there is, but for epochs,
            precision and layout, and never compiled; Nesterov's SGD by default. The teacher of a distillation is
            `model`.
        measure: "accuracy" in percent, or "loss" for the negative cross entropy.
        precision, channels_last: as for `TrainingConfig`; "auto" chooses for every candidate.

    A training that diverges is worth minus infinity.

    Raises:
        ValueError: an unknown measure, a number of steps that is none, or steps without batches.

    Example:
        >>> import torch
        >>> from autocompress_fast.data import UserBatches
        >>> from autocompress_fast.graph import inspect
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 2))
        >>> x = torch.randn(64, 20)
        >>> data = UserBatches([(x, (x[:, 0] > 0).long())])
        >>> report = inspect(model, x[:1])
        >>> constraints = allocate(report, Target(params=4), report.counts())
        >>> at_once = quick_score(model, report, data, measure="loss")
        >>> mended = quick_score(model, report, data, train=data, retrain_steps=20, measure="loss")
        >>> mended(constraints) > at_once(constraints)
        True
    """
    if measure not in ("accuracy", "loss"):
        raise ValueError(f"measure must be accuracy or loss, got {measure!r}")
    if isinstance(retrain_steps, bool) or not isinstance(retrain_steps, int) or retrain_steps < 0:
        raise ValueError(f"retrain_steps must be an integer of 0 or more, got {retrain_steps!r}")
    steps: list[Any] = []
    if retrain_steps:
        if train is None:
            raise ValueError(f"retrain_steps={retrain_steps} needs batches to train on, got train=None")
        if len(train) == 0:
            raise ValueError(f"retrain_steps={retrain_steps} needs batches to train on, train has none")
        steps = list(itertools.islice(_endless(train), retrain_steps))
    batches = None if calibration is None else list(calibration)
    return _QuickScore(model, report, validation, batches, steps, training, measure, precision, channels_last)


def _endless(batches: Batches) -> Iterator[Any]:
    """Epoch after epoch."""
    for epoch in itertools.count():
        yield from batches.epoch(epoch)


@dataclass(frozen=True, eq=False)
class _QuickScore:
    model: torch.nn.Module
    report: Report
    validation: Batches
    calibration: list[Any] | None
    steps: list[Any]  # a batch each
    training: TrainingConfig | None
    measure: str
    precision: str
    channels_last: bool

    def __call__(self, constraints: Mapping[str, Constraint]) -> float:
        from autocompress_fast.training import evaluate

        try:
            network, options = self._trained(constraints)
        except FloatingPointError:
            return -math.inf
        result = evaluate(network, self.validation, **options)
        return result.accuracy if self.measure == "accuracy" else -result.loss

    def network(self, constraints: Mapping[str, Constraint]) -> torch.nn.Module:
        """What is scored: pruned, trained for some steps, with the statistics of its normalisations measured anew."""
        return self._trained(constraints)[0]

    def _trained(self, constraints: Mapping[str, Constraint]) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The network, and the precision and layout for it."""
        from autocompress_fast.compact import compact
        from autocompress_fast.data import UserBatches
        from autocompress_fast.training import Trainer, TrainingConfig, recalibrate

        plan = one_shot(self.model, self.report, constraints)
        config = self.training or TrainingConfig(epochs=1, lr=_RETRAIN_LR, weight_decay=0.0)
        options: dict[str, Any] = {"precision": self.precision, "channels_last": self.channels_last}
        config = dataclasses.replace(config, epochs=1, compile=False, **options)  # to compile takes longer
        if not self.steps:
            pruned = mask(self.model, plan)
        else:  # whole filters are cut out: LeNet-5 at 200x is trained four times as quickly, no network more slowly
            small = compact(self.model, plan, self.steps[0][0][:2], columns=False, report=self.report)
            pruned, plan = small.model, small.plan
            Trainer(pruned, UserBatches(self.steps), config, teacher=self.model, plan=plan).run()
        options["precision"] = config.settled(pruned, plan).precision
        if self.calibration is not None:
            recalibrate(pruned, self.calibration, **options)
        return pruned, options

    def settings(self) -> dict[str, Any]:
        """What a trace must have in common with a search that goes on from it."""
        training = None if self.training is None or not self.steps else asdict(self.training)
        return {"measure": self.measure, "retrain_steps": len(self.steps), "training": training}


def one_shot(model: torch.nn.Module, report: Report, constraints: Mapping[str, Constraint]) -> Plan:
    """What magnitudes alone keep of a network under constraints, tied filters together."""
    return ADMM(model, constraints, report=report).plan()
