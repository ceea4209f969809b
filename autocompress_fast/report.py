"""What people read: tables and plots of a finished run, of an inspected model, and of a run that is only planned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress_fast import _plots
from autocompress_fast._files import remove_partial, write_atomically
from autocompress_fast._page import Code, Picture, Section, Tile, page
from autocompress_fast._plots import LayerSizes, duration, rate
from autocompress_fast.config import show_config
from autocompress_fast.engine.turns import Spread, in_turns

if TYPE_CHECKING:
    from rich.console import Group

    from autocompress_fast.admm import Constraint
    from autocompress_fast.graph import Counts, Kind, Layer, Report
    from autocompress_fast.pipeline import DryRun, Result
    from autocompress_fast.purify import Purified
    from autocompress_fast.rates import Target
    from autocompress_fast.search import Found, Trial

__all__ = ["Document", "Inspection", "Outlook", "Purification", "Speed", "Summary", "Table", "plot_search"]

_COUNTED = {"CONV weights": "conv", "all weights": "params", "MACs": "macs"}
_SHARES = (0.25, 0.5, 0.75)
# Shares of filters and of columns that `Inspection` tries: of one kind, of the other, of both.
_UNIFORM = (
    *((share, 0.0) for share in _SHARES),
    *((0.0, share) for share in _SHARES),
    *((share, share) for share in _SHARES),
)
_MOST_NAMED = 2  # layers that a cell lists
_ACCURACIES = {"validation": ("base", "final"), "test": ("base_test", "final_test")}
_SCORE = "score: −loss"  # noqa: RUF001  a minus
_MEASURED = 1.0  # seconds that latencies are measured, about
_LEAST_CALLS, _MOST_CALLS = 9, 400  # of each network, in that time


@dataclass(frozen=True)
class Table:
    """Rows of text; the first `names` columns are names, the others figures, which stand right.

    Example:
        >>> print(Table("sizes", ("layer", "weights"), [("conv1", "500"), ("fc", "4,000")]))
        sizes
        layer  weights
        conv1      500
        fc       4,000
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int = 1

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = (
            "  ".join(
                cell.ljust(width) if place < self.names else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        return "\n".join([self.title, *text] if self.title else text)

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title) if self.title else None, title_justify="left", box=box.SIMPLE_HEAD)
        for place, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if place < self.names else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table


class Document:
    """Tables and paragraphs: `print` it, or give it to rich."""

    def parts(self) -> Iterable[Table | str]:
        """What it consists of, in order."""
        raise TypeError("a Document has no parts of its own; use one of its kinds")

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.parts()))

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        return Group(*(Text(part) if isinstance(part, str) else part for part in self.parts()))


class Summary(Document):
    """A finished run: what is left of every layer and of the whole, and what it cost in accuracy.

    Example:
        >>> import autocompress_fast as acf
        >>> data = acf.data.digits()
        >>> recipe = acf.Recipe(rounds=1, admm_epochs=1, final_epochs=1, batch_size=256, precision="float32")
        >>> result = acf.compress(acf.models.create("lenet_digits"), data, target="4x", recipe=recipe)
        >>> str(Summary(result)).splitlines()[0]
        'DigitsNet on digits, target params 4x'
    """

    def __init__(self, result: Result) -> None:
        self._result = result

    def parts(self) -> Iterable[Table | str]:
        """Layers, accuracy, and what else was checked."""
        result = self._result
        yield f"{self._name()}, target {result.target}"
        yield self._layers()
        if text := _in_engine(result.dense, result.small, result.target):
            yield text
        if table := self._accuracy():
            yield table
        if searches := result.searches:
            scores = ", ".join(f"{one.start:.4g} -> {one.score:.4g}" for one in searches)
            tried = sum(len(one.trace) for one in searches)
            yield f"search, {tried:,} candidates: score by experience -> of the best, in every round: {scores}"
        if found := result.purification:
            before, *left = (rate(result.dense.params, size) for size in _through(found))
            falls = ", ".join(f"{one['scores'][0]:.2f} -> {one['scores'][-1]:.2f}%" for one in found)
            yield (
                f"purification in {len(found)} rounds: {before} of all weights -> {' -> '.join(left)}; "
                f"validation accuracy before retraining {falls}"
            )
        epochs = len(result.history)
        yield (
            f"masked and compacted network differ by {result.max_difference:.1g} of the largest output\n"
            f"{epochs} epochs of compression in {duration(result.seconds)}, seed {result.recipe.seed}"
        )

    def _name(self) -> str:
        data = self._result.info.get("provenance", {}).get("data")
        return f"{self._result.layers.model_name}{f' on {data}' if data else ''}"

    def _layers(self) -> Table:
        result = self._result
        rows = []
        for layer in result.layers.layers:
            plan = result.plan[layer.name]
            rows.append(
                (
                    layer.name,
                    f"{layer.shape[0]:,} -> {int(plan.filters.sum()):,}",
                    f"{layer.columns:,} -> {int(plan.columns.sum()):,}",
                    f"{layer.weights:,} -> {plan.weights:,}",
                    rate(layer.weights, plan.weights),
                    str(result.bits.get(layer.name, "")),
                )
            )
        for name, before, after in _changes(result.dense, result.small):
            rows.append((name, "", "", f"{before:,} -> {after:,}", rate(before, after), ""))
        header = ("layer", "filters", "columns", "weights", "rate", "bits")
        width = len(header) if result.bits else len(header) - 1
        return Table("", header[:width], [row[:width] for row in rows])

    def _accuracy(self) -> Table | None:
        accuracy = self._result.accuracy
        rows = []
        for part, (base, final) in _ACCURACIES.items():
            if base in accuracy and final in accuracy:
                before, after = accuracy[base], accuracy[final]
                rows.append((part, f"{before:.2f}%", f"{after:.2f}%", f"{after - before:+.2f}"))
        return Table("", ("accuracy", "dense", "compressed", "points"), rows) if rows else None

    def to_json(self) -> dict[str, Any]:
        """The figures as plain numbers and strings."""
        return self._result.to_json()

    def save_plots(self, folder: str | Path) -> list[Path]:
        """Write pictures into `folder`, which is made when it is missing; matplotlib is needed.

        They are `accuracy.png` (validation accuracy and size over all epochs), `weights.png` (every layer before and
        after) and, where a search chose the rates, `search1.png` and so on for its rounds.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        title = f"{self._name()}, target {self._result.target}"
        figures = {"weights.png": _plots.layers(self._layer_sizes(), title)}
        if history := self._validated():
            figures["accuracy.png"] = _plots.run(history, self._result.accuracy["base"], self._left(), title)
        for number, found in enumerate(self._result.searches, 1):
            figures[f"search{number}.png"] = _plots.search(found.trace, f"{title}, search of round {number}", _SCORE)
        return [_plots.save(figure, folder / name) for name, figure in sorted(figures.items())]

    def save_html(
        self, path: str | Path, *, file: str | Path | None = None, notes: Sequence[str] = (), measure: bool = True
    ) -> Path:
        """Write all of it as one page, which needs nothing else to be looked at; matplotlib is needed.

        Args:
            path: of the page; an old one is replaced in one step.
            file: the saved network, whose size is told.
            notes: more paragraphs for its head.
            measure: whether to time the dense and the compressed network in the engine, which takes about a second.

        Example:
            >>> result.report().save_html("report.html")  # doctest: +SKIP
        """
        result = self._result
        speed = Speed.measured(result) if measure else None
        lead = [f"{self._name()}, target {result.target}, seed {result.recipe.seed}", *notes]
        config = show_config()
        footer = f"Made by autocompress_fast {config['version']}. Rates are dense / remaining."
        smaller = rate(result.dense.params, result.small.params)
        tiles = self._tiles(None if file is None else Path(file).stat().st_size, speed)
        title = f"{result.layers.model_name}: {smaller} fewer weights"
        content = page(title, lead, tiles, self._sections(speed), footer)
        write_atomically(path, content.encode("utf-8", "replace"))
        return Path(path)

    def _tiles(self, size: int | None, speed: Speed | str | None) -> Iterator[Tile]:
        result = self._result
        for name, whole, left in _changes(result.dense, result.small):
            yield Tile(name, rate(whole, left), f"{whole:,} → {left:,}")
        for part, (base, final) in _ACCURACIES.items():
            if final in result.accuracy:
                dense, small = result.accuracy[base], result.accuracy[final]
                points = f"{small - dense:+.2f}".replace("-", "−")  # noqa: RUF001  a minus
                yield Tile(f"{part} accuracy", f"{small:.2f}%", f"dense {dense:.2f}%: {points} points")
        if size is not None:
            yield Tile("file", _bytes(size), f"dense weights {_bytes(4 * result.dense.params)}")
        if isinstance(speed, Speed):
            before, after = speed.dense.median, speed.small.median
            faster = f"{before / after:.1f}x faster" if before >= after else f"{after / before:.1f}x slower"
            yield Tile("latency", faster, f"{_seconds(before)} → {_seconds(after)} a call")

    def _sections(self, speed: Speed | str | None) -> Iterator[Section]:
        yield Section("Over the run", [*self._over_the_run()])
        caption = "Filters, columns and weights that are kept of every layer; beside the bars, dense / kept."
        picture = Picture("layers", _plots.layers(self._layer_sizes()), caption)
        yield Section("Layer by layer", [picture, self._layers()])
        yield Section("Search for the rates", [*self._searched()])
        yield Section("Purification", [*self._purified()])
        yield Section("Latency", [speed.picture() if isinstance(speed, Speed) else speed] if speed else [])
        yield Section("What stays as it is", [*Inspection(self._result.layers).reasons()])
        yield Section("To make it again", [*self._again()])

    def _over_the_run(self) -> Iterator[Picture | Table]:
        result = self._result
        if history := self._validated():
            figure = _plots.run(history, result.accuracy["base"], self._left())
            yield Picture(
                "run",
                figure,
                "Validation accuracy after every epoch, on a scale that is logarithmic in the error, and how many "
                "times smaller the network was then. While ADMM trains, nothing is pruned yet.",
            )
        names = [name for name, _, _ in _changes(result.dense, result.small)]
        rows = []
        for stage in dict.fromkeys(row["stage"] for row in result.history):
            epochs = [row for row in result.history if row["stage"] == stage]
            accuracy = f"{epochs[-1]['validation']:.2f}%" if "validation" in epochs[-1] else ""
            left = _changes(result.dense, result.sizes[stage]) if stage in result.sizes else []
            cells = {name: f"{after:,}, {rate(before, after)}" for name, before, after in left}
            seconds = duration(sum(row["seconds"] for row in epochs))
            rows.append((stage, f"{len(epochs)}", seconds, accuracy, *(cells.get(name, "") for name in names)))
        header = ("stage", "epochs", "time", "validation", *names)
        if rows:
            yield Table("What every stage ended with", header, rows)

    def _searched(self) -> Iterator[str | Picture | Table]:
        searches = self._result.searches
        if searches:
            steps = self._result.recipe.search_steps
            trained = f"trained for {steps} steps" if steps else "without retraining"
            yield (
                "Candidates for the rates of the layers, smaller than the round ends where the target is further away, "
                f"each scored by the network pruned so in one shot, {trained}; higher is better. The colder simulated "
                "annealing is, the less often it accepts what is worse. A round goes its part of the way to the best."
            )
        for number, found in enumerate(searches, 1):
            caption = f"Round {number}: {found.start:.4g} by experience, {found.score:.4g} for the best candidate."
            yield Picture(f"search{number}", _plots.search(found.trace, score=_SCORE), caption)
        rows = [
            (
                f"{number}",
                f"{len(found.trace):,}",
                duration(found.trace[-1].seconds),
                f"{found.start:.4g}",
                f"{found.score:.4g}",
                f"{found.acceptance:.0%}",
                f"{sum(trial.kind == 'restart' for trial in found.trace)}",
            )
            for number, found in enumerate(searches, 1)
        ]
        header = ("round", "candidates", "time", "by experience", "best", "accepted", "restarts")
        if rows:
            yield Table("Scores", header, rows)

    def _purified(self) -> Iterator[str | Table]:
        found = self._result.purification
        steps = [{**step, "round": number} for number, one in enumerate(found, 1) for step in one["steps"]]
        if found:
            dense = self._result.dense.params
            left = " → ".join(rate(dense, size) for size in _through(found))
            yield f"All weights {left}; the score is the accuracy on some validation samples, before retraining."
        if rows := _removed(steps):
            yield rows

    def _again(self) -> Iterator[str | Table | Code]:
        result = self._result
        held = f"    exclude={sorted(result.layers.held)!r},\n" if result.layers.held else ""
        yield Code(
            "result = acf.compress(\n    model,\n    data,\n"
            f"    target={_as_code(result.target)},\n    recipe={_as_code(result.recipe, lines=True)},\n{held})"
        )
        defaults = {name: default for name, _, default in _defaults(result.recipe)}
        rows = [
            (name, _plain(value), "" if value == defaults[name] else f"by default {_plain(defaults[name])}")
            for name, value, _ in _defaults(result.recipe)
        ]
        yield Table("Recipe", ("setting", "value", ""), rows, names=3)
        config = {name: _plain(value) for name, value in show_config().items() if value is not None}
        yield Table("Installation", ("", ""), [("processor", _processor()), *config.items()], names=2)
        yield (
            f"Masked and compacted network differ by {result.max_difference:.1g} of the largest output. "
            f"{len(result.history)} epochs of compression took {duration(result.seconds)}."
        )

    def _layer_sizes(self) -> list[LayerSizes]:
        found = []
        for layer in self._result.layers.layers:
            plan = self._result.plan[layer.name]
            filters, columns = int(plan.filters.sum()), int(plan.columns.sum())
            pairs = (layer.shape[0], filters), (layer.columns, columns), (layer.weights, plan.weights)
            found.append(LayerSizes(layer.name, *pairs))
        return found

    def _validated(self) -> list[dict[str, Any]]:
        return [row for row in self._result.history if "validation" in row]

    def _left(self) -> dict[str, dict[str, float]]:
        """Rates of all weights and the rest, by the stage since which they are so."""
        found: dict[str, dict[str, float]] = {"all weights": {}}
        for stage, counts in self._result.sizes.items():
            for name, before, after in _changes(self._result.dense, counts):
                found.setdefault(name, {})[stage] = before / after
        return {name: rates for name, rates in found.items() if rates}


@dataclass(frozen=True)
class Speed:
    """How long the engine takes for the dense and for the compressed network, measured in turns.

    Attributes:
        dense, small: seconds of a call.
        samples, threads, rounds: of a call; of both; calls of each.
    """

    dense: Spread
    small: Spread
    samples: int
    threads: int
    rounds: int

    @classmethod
    def measured(cls, result: Result, *, samples: int = 1, seconds: float = _MEASURED) -> Speed | str:
        """Time both for about so long; or the reason why the engine cannot run them."""
        from autocompress_fast.engine import Engine, UnsupportedError, VerificationError
        from autocompress_fast.engine import compile as compile_engine
        from autocompress_fast.engine.lower import lower_trace
        from autocompress_fast.trace import TraceError

        try:
            small = compile_engine(result.model, result.example_input)
            dense = Engine(lower_trace(result.layers.trace)[0], threads=small.threads)
        except (TraceError, UnsupportedError, VerificationError) as error:
            return f"Not measured: {error}"
        samples = small.program.batch or samples
        rng = np.random.default_rng(0)
        inputs = [rng.standard_normal((samples, *given.shape), np.float32) for given in small.inputs]
        calls = {"dense": lambda: dense(*inputs), "small": lambda: small(*inputs)}
        once = [spread.median for spread in in_turns(calls, 1).values()]
        rounds = min(_MOST_CALLS, max(_LEAST_CALLS, math.ceil(seconds / max(sum(once), 1e-9))))
        found = in_turns(calls, rounds)
        return cls(found["dense"], found["small"], samples, small.threads, rounds)

    def picture(self) -> Picture:
        """Both, with the conditions."""
        bars = [
            _plots.Bar(name, spread.median, spread.low, spread.high)
            for name, spread in (("dense", self.dense), ("compressed", self.small))
        ]
        samples, threads = _some(self.samples, "sample"), _some(self.threads, "thread")
        config = show_config()
        return Picture(
            "latency",
            _plots.latency(bars),
            f"The engine of this package, {samples} a call, {threads}, medians of {self.rounds} calls each in turns, "
            f"on {_processor()} ({config['isa_active']}), autocompress_fast {config['version']}.",
        )


class Purification(Document):
    """What purification removed, step by step, and what that did to the score."""

    def __init__(self, purified: Purified) -> None:
        self._purified = purified

    def parts(self) -> Iterable[Table | str]:
        """The steps that removed anything, and the sizes."""
        found = self._purified
        if rows := _removed([asdict(step) for step in found.steps]):
            yield rows
        sizes = [
            (name, f"{before:,}", f"{unused:,}", f"{after:,}", rate(before, after))
            for (name, before, unused), (_, _, after) in zip(
                _changes(found.before, found.unused), _changes(found.before, found.after), strict=True
            )
        ]
        yield Table("", ("", "before", "without unused paths", "after", "rate"), sizes)
        scores = " -> ".join(f"{score:.2f}" for score in found.scores)
        yield f"score {scores}, {len(found.steps)} limits found with {found.evaluations} evaluations"


class Inspection(Document):
    """A model's layers and groups, what of them can be pruned, what is frozen by what, and what uniform pruning leaves.

    Args:
        report: of `acf.inspect`.
        groups: show every set of tied layers by itself, with all their names; by default those that are alike are one
            row.

    Example:
        >>> import torch, autocompress_fast as acf
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
        >>> inspection = Inspection(acf.inspect(model, torch.zeros(1, 1, 8, 8)))
        >>> inspection.to_json()["uniform"][1]
        {'filters': 0.5, 'columns': 0.0, 'left': {'conv': 54, 'params': 54, 'macs': 1224}}
    """

    def __init__(self, report: Report, *, groups: bool = False) -> None:
        self._report, self._all_groups = report, groups

    def parts(self) -> Iterable[Table | str]:
        """Sizes, layers, groups, reasons, and the effect of uniform rates."""
        report = self._report
        yield (
            f"{report.model_name}: {report.params:,} weights, {report.conv_params:,} of them in convolutions; "
            f"{report.macs:,} multiply-adds\n"
            f"in filters or channels that can be cut out: {_share(report.prunable_params, report.params)} of the "
            f"weights, {_share(report.prunable_macs, report.macs)} of the multiply-adds"
        )
        rows = [
            (
                layer.name,
                layer.kind + (f", {layer.groups} groups" if layer.groups > 1 else ""),
                _prunable(layer),
                "x".join(map(str, layer.shape)),
                f"{layer.weights:,}",
                f"{layer.macs:,}",
            )
            for layer in report.layers
        ]
        yield Table("", ("layer", "kind", "prunable", "weight", "weights", "MACs"), rows, names=3)
        if report.kinds:
            yield self._groups()
        yield from self.reasons()
        yield self._effects()

    def reasons(self) -> Iterator[Table | str]:
        """What is not pruned, and why."""
        report = self._report
        if report.frozen_by:
            yield self._frozen()
        columns = {layer.name: layer.frozen_columns.partition(" (")[0] for layer in report.layers if not layer.held}
        if lines := _by_reason(columns):
            yield "\n".join(["columns that cannot be dropped one by one:", *lines])
        if lines := _by_reason(report.skipped):
            yield "\n".join(["no layers of their own, and not counted:", *lines])
        if report.baked:
            yield f"computed weights, which become plain ones in what is pruned: {_names(report.baked)}"

    def _groups(self) -> Table:
        """Filters that live and die together, and who reads them; of sets that are alike, the first."""
        alike: dict[object, list[Kind]] = {}
        for place, kind in enumerate(self._report.kinds):
            sizes = tuple(kind.filters.values()), tuple(kind.channels.values()), kind.groups
            alike.setdefault(place if self._all_groups else kind.frozen or sizes, []).append(kind)
        most = len(self._report.layers) if self._all_groups else _MOST_NAMED
        rows = [
            (
                _names(_each(kinds[0].filters), most),
                _names(_each(kinds[0].channels), most) or "-",
                kinds[0].frozen or "yes",
                f"{len(kinds):,}",
                f"{sum(kind.groups for kind in kinds):,}",
            )
            for kinds in alike.values()
        ]
        header = ("filters of each group", "channels of each group, in", "prunable", "sets", "groups")
        return Table("what lives and dies together", header, rows, names=3)

    def _frozen(self) -> Table:
        report = self._report
        rows = [
            (
                one.reason,
                _names(one.layers),
                f"{one.params:,}",
                _share(one.params, report.params),
                f"{one.macs:,}",
                _share(one.macs, report.macs),
            )
            for one in report.frozen_by
        ]
        header = ("filters that are frozen", "of", "weights", "share", "MACs", "share")
        return Table("", header, rows, names=2)

    def _effects(self) -> Table:
        dense = self._report.counts()
        rows = []
        for filters, columns, left in self._uniform():
            cells = dict.fromkeys(_COUNTED, "-")
            if left is not None:
                cells |= {
                    name: f"{_share(after, before)}, {rate(before, after)}"
                    for name, before, after in _changes(dense, left)
                }
            rows.append((f"{filters:.0%} of the filters, {columns:.0%} of the columns", *cells.values()))
        return Table("", ("removed of all that can be; left are", *_COUNTED), rows)

    def _uniform(self) -> list[tuple[float, float, Counts | None]]:
        """Shares of filters and columns, and what their removal leaves; None where that would be nothing."""
        effects: list[tuple[float, float, Counts | None]] = []
        for filters, columns in _UNIFORM:
            try:
                effects.append((filters, columns, self._report.predict(filters, columns)))
            except ValueError:
                effects.append((filters, columns, None))
        return effects

    def to_json(self) -> dict[str, Any]:
        """The report as plain numbers and strings, with the effect of uniform rates."""
        uniform = [
            {"filters": filters, "columns": columns, "left": None if left is None else asdict(left)}
            for filters, columns, left in self._uniform()
        ]
        return {**self._report.to_json(), "uniform": uniform}


class Outlook(Document):
    """A dry run: what every round would keep of every layer, and how long that takes at most.

    `base_epochs` are trained before it, if any.
    """

    def __init__(self, dry_run: DryRun, *, base_epochs: int = 0) -> None:
        self._dry_run, self._base_epochs = dry_run, base_epochs

    def parts(self) -> Iterable[Table | str]:
        """The target, a table of the rounds, and the time."""
        run = self._dry_run
        how = "can be met" if run.rounds else "is met already: nothing would be pruned"
        yield f"{run.report.model_name}: the target {run.target} {how}"
        if text := _in_engine(run.dense, run.small, run.target):
            yield f"in one shot, at the rates of the last round, {text}"
        if run.rounds:
            yield self._kept()
        later = ", later rounds decide anew from the weights they find" if len(run.rounds) > 1 else ""
        before = f"after {self._base_epochs} epochs of training the dense network: " if self._base_epochs else ""
        yield f"{before}{run.epochs} epochs of compression, at most {duration(run.seconds)}{later}"

    def _kept(self) -> Table:
        run, rows = self._dry_run, []
        for layer in run.report.layers:
            kept = (_keep_text(constraints.get(layer.name)) for _, constraints in run.rounds)
            rows.append((layer.name, f"{layer.shape[0]} x {layer.columns // layer.groups}", *kept))
        header = (f"round {number}: {part}" for number, (part, _) in enumerate(run.rounds, 1))
        return Table("", ("kept of layer", "filters x columns", *header), rows)

    def to_json(self) -> dict[str, Any]:
        """The same as plain numbers and strings."""
        run = self._dry_run
        return {
            "model": run.report.model_name,
            "target": str(run.target),
            "can_be_met": True,
            "dense": asdict(run.dense),
            "small": asdict(run.small),
            "base_epochs": self._base_epochs,
            "epochs": run.epochs,
            "seconds_at_most": round(run.seconds, 1),
            "rounds": [
                {
                    "target": str(part),
                    "layers": {
                        name: {"structure": c.structure, "keep": c.keep if isinstance(c.keep, int) else list(c.keep)}
                        for name, c in constraints.items()
                    },
                }
                for part, constraints in run.rounds
            ],
        }


def _changes(dense: Counts, small: Counts) -> list[tuple[str, int, int]]:
    """(what, before, after) of everything that is counted, without what the network does not have."""
    pairs = [(name, getattr(dense, key), getattr(small, key)) for name, key in _COUNTED.items()]
    return [(name, before, after) for name, before, after in pairs if after]


def plot_search(trace: Found | Sequence[Trial] | str | Path, path: str | Path) -> Path:
    """Draw a search: every candidate's score and the best so far, the temperature, and how many moves were accepted.

    Args:
        trace: what a search has found, its trials, or the file that it writes them to, finished or not.
        path: of the picture, such as "search.png" or "search.svg"; matplotlib is needed.

    Raises:
        ValueError: no trials, the file is no trace of a search, or no such format of pictures.
    """
    from autocompress_fast.search import Found, read_trace

    trials = read_trace(trace) if isinstance(trace, (str, Path)) else trace.trace if isinstance(trace, Found) else trace
    if not trials:
        raise ValueError(f"there are no trials in {trace if isinstance(trace, (str, Path)) else 'the trace'}")
    return _plots.save(_plots.search(trials), path)


def _removed(steps: Iterable[Mapping[str, Any]]) -> Table | None:
    """The steps of purification that removed anything."""
    rows = [
        (
            str(step["round"]),
            _names(step["layers"]),
            f"{step['limit']} below {step['value']:.3g}",
            f"{step['groups']:,} of {step['of']:,}",
            f"{step['filters']:,}",
            f"{step['columns']:,}",
            f"{step['weights']:,}",
            f"{step['macs']:,}",
            f"{step['score_before']:.2f} -> {step['score']:.2f}",
        )
        for step in steps
        if step["weights"]
    ]
    header = ("round", "layer", "removed", "of them", "filters", "columns", "weights", "MACs", "score")
    return Table("removed by each limit, unused paths with it", header, rows, names=3) if rows else None


def _through(found: Sequence[Mapping[str, Any]]) -> list[int]:
    """All weights before purification and after every round of it."""
    return [found[0]["before"]["params"], *(one["after"]["params"] for one in found)]


def _defaults(value: Any) -> list[tuple[str, Any, Any]]:
    """(name, value, default) of the fields of a dataclass; MISSING where it has no default."""
    found = []
    for one in fields(value):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        found.append((one.name, getattr(value, one.name), default))
    return found


def _as_code(value: Any, *, lines: bool = False) -> str:
    """What makes the same value, without what is as by default.

    >>> from autocompress_fast import Recipe, Target
    >>> _as_code(Target(params=8)), _as_code(Recipe(rounds=2))
    ('acf.Target(params=8)', 'acf.Recipe(rounds=2)')
    """
    if not is_dataclass(value):
        return repr(value)
    changed = [f"{name}={_as_code(now)}" for name, now, default in _defaults(value) if now != default]
    if lines and len(changed) > 2:
        inside = "".join(f"        {one},\n" for one in changed)
        return f"acf.{type(value).__name__}(\n{inside}    )"
    return f"acf.{type(value).__name__}({', '.join(changed)})"


def _plain(value: Any) -> str:
    """A setting, for people."""
    if is_dataclass(value):
        return ", ".join(f"{name} {_plain(now)}" for name, now, _ in _defaults(value))
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def _processor() -> str:
    from autocompress_fast.engine.machine import processor

    return processor()


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def _bytes(count: int) -> str:
    """For people.

    >>> _bytes(54336), _bytes(1_724_000)
    ('54.3 kB', '1.72 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:,.1f} kB"


def _seconds(seconds: float) -> str:
    """For people.

    >>> _seconds(0.0000123), _seconds(0.0123)
    ('12.3 µs', '12.3 ms')
    """
    unit, size = _plots.unit(seconds)
    return f"{seconds / size:.3g} {unit}"


def _in_engine(dense: Any, small: Any, target: Target) -> str:
    """Latency and bytes, where the target limits them."""
    texts = []
    if "seconds" in target.measured:
        before, after, count = 1e3 * dense.seconds, 1e3 * small.seconds, target.threads
        times = f"{before:.4g} -> {after:.4g} ms, {rate(before, after)} faster"
        texts.append(f"predicted latency of one sample on {count} thread{'s' * (count > 1)}: {times}")
    if "bytes" in target.measured:
        texts.append(f"bytes of the file: {dense.bytes:,} -> {small.bytes:,}, {rate(dense.bytes, small.bytes)}")
    return "; ".join(texts)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _names(names: Sequence[str], most: int = _MOST_NAMED) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _each(counts: Mapping[str, int]) -> list[str]:
    """Layers, and how many each group has of each where that is not one."""
    return [name if count == 1 else f"{count} of {name}" for name, count in counts.items()]


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """A line for every reason, with the names that it holds for."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason:
            found.setdefault(reason, []).append(name)
    return [f"  {_names(names)}: {reason}" for reason, names in found.items()]


def _prunable(layer: Layer) -> str:
    parts = [name for name, can in (("filters", layer.filters_prunable), ("columns", layer.columns_prunable)) if can]
    return ", ".join(parts) or "nothing"


def _keep_text(constraint: Constraint | None) -> str:
    if constraint is None:
        return "all"
    if isinstance(constraint.keep, int):
        what = "weights" if constraint.structure == "element" else f"{constraint.structure}s"
        return f"{constraint.keep:,} {what}"
    return " x ".join(f"{count:,}" for count in constraint.keep)
