"""What people read: tables and plots of a finished run, of an inspected model, and of a run that is only planned."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress_fast._files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group

    from autocompress_fast.admm import Constraint
    from autocompress_fast.graph import Counts, Kind, Layer, Report
    from autocompress_fast.pipeline import DryRun, Result
    from autocompress_fast.purify import Purified
    from autocompress_fast.rates import Target

__all__ = ["Document", "Inspection", "Outlook", "Purification", "Summary", "Table"]

_COUNTED = {"CONV weights": "conv", "all weights": "params", "MACs": "macs"}
_SHARES = (0.25, 0.5, 0.75)
# Shares of filters and of columns that `Inspection` tries: of one kind, of the other, of both.
_UNIFORM = (
    *((share, 0.0) for share in _SHARES),
    *((0.0, share) for share in _SHARES),
    *((share, share) for share in _SHARES),
)
_MOST_NAMED = 2  # layers that a cell lists
_DENSE, _SMALL, _ADMM = "#c9ced6", "#1f6f8b", "#e08e45"  # colours of the plots


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
        data = result.info.get("provenance", {}).get("data")
        yield f"{result.layers.model_name}{f' on {data}' if data else ''}, target {result.target}"
        yield self._layers()
        if text := _in_engine(result.dense, result.small, result.target):
            yield text
        if table := self._accuracy():
            yield table
        if found := result.purification:
            dense, scores = (
                result.dense.params,
                (f"{one['scores'][0]:.2f} -> {one['scores'][-1]:.2f}%" for one in found),
            )
            left = " -> ".join(_rate(dense, one["after"]["params"]) for one in found)
            before = _rate(dense, found[0]["before"]["params"])
            yield (
                f"purification in {len(found)} rounds: {before} of all weights -> {left}; "
                f"validation accuracy before retraining {', '.join(scores)}"
            )
        epochs = len(result.history)
        yield (
            f"masked and compacted network differ by {result.max_difference:.1g} of the largest output\n"
            f"{epochs} epochs of compression in {_duration(result.seconds)}, seed {result.recipe.seed}"
        )

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
                    _rate(layer.weights, plan.weights),
                )
            )
        for name, before, after in _changes(result.dense, result.small):
            rows.append((name, "", "", f"{before:,} -> {after:,}", _rate(before, after)))
        return Table("", ("layer", "filters", "columns", "weights", "rate"), rows)

    def _accuracy(self) -> Table | None:
        accuracy = self._result.accuracy
        pairs = {"validation": ("base", "final"), "test": ("base_test", "final_test")}
        rows = []
        for part, (base, final) in pairs.items():
            if base in accuracy and final in accuracy:
                before, after = accuracy[base], accuracy[final]
                rows.append((part, f"{before:.2f}%", f"{after:.2f}%", f"{after - before:+.2f}"))
        return Table("", ("accuracy", "dense", "compressed", "points"), rows) if rows else None

    def to_json(self) -> dict[str, Any]:
        """The figures as plain numbers and strings."""
        return self._result.to_json()

    def save_plots(self, folder: str | Path) -> list[Path]:
        """Write `accuracy.png` (validation accuracy over all epochs) and `weights.png` (per layer) into `folder`.

        The folder is made when it is missing; matplotlib is needed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        layers = {
            layer.name: (layer.weights, self._result.plan[layer.name].weights) for layer in self._result.layers.layers
        }
        history = [row for row in self._result.history if "validation" in row]
        title = f"{self._result.layers.model_name}, target {self._result.target}"
        figures = {"weights.png": _plot_weights(layers, title)}
        if history:
            figures["accuracy.png"] = _plot_accuracy(history, self._result.accuracy["base"], title)
        return [_save(figure, folder / name) for name, figure in sorted(figures.items())]


class Purification(Document):
    """What purification removed, step by step, and what that did to the score."""

    def __init__(self, purified: Purified) -> None:
        self._purified = purified

    def parts(self) -> Iterable[Table | str]:
        """The steps that removed anything, and the sizes."""
        found = self._purified
        rows = [
            (
                str(step.round),
                _names(step.layers),
                f"{step.limit} below {step.value:.3g}",
                f"{step.groups:,} of {step.of:,}",
                f"{step.filters:,}",
                f"{step.columns:,}",
                f"{step.weights:,}",
                f"{step.macs:,}",
                f"{step.score_before:.2f} -> {step.score:.2f}",
            )
            for step in found.steps
            if step.weights
        ]
        header = ("round", "layer", "removed", "of them", "filters", "columns", "weights", "MACs", "score")
        if rows:
            yield Table("removed by each limit, unused paths with it", header, rows, names=3)
        sizes = [
            (name, f"{before:,}", f"{unused:,}", f"{after:,}", _rate(before, after))
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
        if report.frozen_by:
            yield self._frozen()
        columns = {layer.name: layer.frozen_columns.partition(" (")[0] for layer in report.layers if not layer.held}
        if lines := _by_reason(columns):
            yield "\n".join(["columns that cannot be dropped one by one:", *lines])
        if lines := _by_reason(report.skipped):
            yield "\n".join(["no layers of their own, and not counted:", *lines])
        if report.baked:
            yield f"computed weights, which become plain ones in what is pruned: {_names(report.baked)}"
        yield self._effects()

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
                    name: f"{_share(after, before)}, {_rate(before, after)}"
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
        goal = run.rounds[-1][0]
        yield f"{run.report.model_name}: the target {goal} can be met"
        if text := _in_engine(run.dense, run.small, goal):
            yield f"in one shot, at the rates of the last round, {text}"
        rows = []
        for layer in run.report.layers:
            kept = (_keep_text(constraints.get(layer.name)) for _, constraints in run.rounds)
            rows.append((layer.name, f"{layer.shape[0]} x {layer.columns // layer.groups}", *kept))
        header = (f"round {number}: {part}" for number, (part, _) in enumerate(run.rounds, 1))
        yield Table("", ("kept of layer", "filters x columns", *header), rows)
        later = ", later rounds decide anew from the weights they find" if len(run.rounds) > 1 else ""
        before = f"after {self._base_epochs} epochs of training the dense network: " if self._base_epochs else ""
        yield f"{before}{run.epochs} epochs of compression, at most {_duration(run.seconds)}{later}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain numbers and strings."""
        run = self._dry_run
        return {
            "model": run.report.model_name,
            "target": str(run.rounds[-1][0]),
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


def _in_engine(dense: Any, small: Any, target: Target) -> str:
    """Latency and bytes, where the target limits them."""
    texts = []
    if "seconds" in target.measured:
        before, after, count = 1e3 * dense.seconds, 1e3 * small.seconds, target.threads
        times = f"{before:.4g} -> {after:.4g} ms, {_rate(before, after)} faster"
        texts.append(f"predicted latency of one sample on {count} thread{'s' * (count > 1)}: {times}")
    if "bytes" in target.measured:
        texts.append(f"bytes of the file: {dense.bytes:,} -> {small.bytes:,}, {_rate(dense.bytes, small.bytes)}")
    return "; ".join(texts)


def _rate(before: float, after: float) -> str:
    rate = before / after
    return f"{rate:.1f}x" if rate < 99.95 else f"{rate:.0f}x"


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


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


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


def _plot_weights(layers: Mapping[str, tuple[int, int]], title: str) -> Figure:
    """Weights of every layer before and after, on a log scale, with the rate beside each bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.42 * len(layers)), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(layers)))
    before, after = ([pair[i] for pair in layers.values()] for i in (0, 1))
    axes.barh(places, before, height=0.72, color=_DENSE, label="dense")
    axes.barh(places, after, height=0.36, color=_SMALL, label="kept")
    for place, dense, small in zip(places, before, after, strict=True):
        axes.annotate(_rate(dense, small), (dense, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(1, max(before) * 4)
    axes.set_yticks(places, list(layers))
    axes.invert_yaxis()
    axes.set_xlabel("weights")
    axes.set_title(f"Weights per layer: {title}", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.5 / len(layers)), ncols=2)
    _without_frame(axes)
    return figure


def _plot_accuracy(history: Sequence[Mapping[str, Any]], base: float, title: str) -> Figure:
    """Validation accuracy over the epochs of all stages, on a scale that is logarithmic in the error."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    errors = [100 - row["validation"] for row in history]
    positive = [error for error in [*errors, 100 - base] if error > 0]
    least = min(positive, default=1.0) / 2  # where 100% is drawn
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.axhline(max(100 - base, least), color="#555555", linewidth=1, linestyle="--", label=f"dense, {base:.2f}%")
    labelled: set[str] = set()
    for stage, first, last in _stretches(history):
        is_admm = "admm" in stage
        kind = "ADMM training, before pruning" if is_admm else "pruned, retraining"
        axes.plot(
            range(first + 1, last + 2),
            [max(error, least) for error in errors[first : last + 1]],
            color=_ADMM if is_admm else _SMALL,
            marker="o" if len(history) <= 60 else None,
            markersize=3,
            linewidth=1.6,
            label=None if kind in labelled else kind,
        )
        labelled.add(kind)
        if first:
            axes.axvline(first + 0.5, color="#dddddd", linewidth=1, zorder=0)
        axes.annotate(
            stage.replace(".", "\n").replace("round", "round "),
            ((first + last) / 2 + 1, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=7,
            color="#555555",
        )
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 90) if least <= tick]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100 - error:g}%"))
    axes.set_ylim(min(100.0, max(positive, default=1.0) * 1.3), least * 0.85)
    axes.set_xlim(0.5, len(history) + 0.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy")
    axes.set_title(f"Accuracy over the run: {title}", loc="left", fontsize=11, pad=26)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    _without_frame(axes)
    return figure


def _stretches(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """(stage, first row, last row) of every stage, in order."""
    stretches: list[tuple[str, int, int]] = []
    for place, row in enumerate(history):
        if stretches and stretches[-1][0] == row["stage"]:
            stretches[-1] = (row["stage"], stretches[-1][1], place)
        else:
            stretches.append((row["stage"], place, place))
    return stretches


def _without_frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _save(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(path, content.getvalue())
    return path
