"""The pictures of a run, all in one look: for files, and for a page that is light or dark."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec
from xml.etree import ElementTree

from autocompress_fast._files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from autocompress_fast.search import Trial

__all__ = [
    "COLOURS",
    "Bar",
    "LayerSizes",
    "as_svg",
    "duration",
    "latency",
    "layers",
    "rate",
    "run",
    "save",
    "search",
    "unit",
]

P = ParamSpec("P")

COLOURS = {  # on white, and on a dark page; blue, orange and pink are told apart with any colour vision
    "ink": ("#1d2530", "#e6eaf0"),
    "muted": ("#5d6776", "#9da8b7"),
    "line": ("#d5dae1", "#3a4450"),
    "track": ("#dfe4ea", "#333c48"),
    "band": ("#f4f6f8", "#1d242d"),
    "kept": ("#17698f", "#58b4dc"),
    "admm": ("#dc7f1e", "#f2a654"),
    "purify": ("#b23f8e", "#e58fcb"),
    "page": ("#ffffff", "#151a21"),
}
_INK, _MUTED, _LINE, _TRACK, _BAND, _KEPT, _ADMM, _PURIFY, _PAGE = (light for light, _ in COLOURS.values())
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": _PAGE,
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "autocompress_fast",
    "text.color": _INK,
    "text.parse_math": False,  # names may hold dollar signs
    "xtick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "xtick.labelsize": 8.5,
    "ytick.color": _LINE,
    "ytick.labelcolor": _MUTED,
    "ytick.labelsize": 8.5,
}
_WIDTH = 7.4  # inches
_LONGEST = 32  # letters of a layer's name
_MOST_POINTS = 2000  # that are drawn one by one in a page
_WINDOW = 20  # moves, at least, over which the acceptance rate is taken
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 90)  # of the error, in percent


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Matplotlib in our look; letters that its font does not have are boxes and no reason to warn."""
    from matplotlib import rc_context

    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _style():
            return draw(*args, **kwargs)

    return styled


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure in one step, in the format that the name ends with.

    Raises:
        ValueError: a format that matplotlib does not write.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"{path} must end in a format of pictures, such as .png or .svg")
    content = io.BytesIO()
    with _style():
        figure.savefig(content, format=kind, dpi=150)
    write_atomically(path, content.getvalue())
    return path


def as_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an element of a page, which names its colours as `var(--ink)`; `name` begins all its ids."""
    content = io.BytesIO()
    with _style():
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, dpi=150, metadata=metadata)
    root = ElementTree.fromstring(content.getvalue())
    colours = {light: f"var(--{colour})" for colour, (light, _) in COLOURS.items()}
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith("}style"):  # would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            plain = key.rpartition("}")[2]
            if plain == "id":
                value = f"{name}-{value}"
            elif plain == "href":
                value = re.sub(r"^#", f"#{name}-", value)
            elif plain == "style":
                value = re.sub(r"#[0-9a-f]{6}\b", lambda found: colours.get(found[0], found[0]), value)
                value = re.sub(r"font-family:[^;]*;? *", "", value)
            value = re.sub(r"url\(#", f"url(#{name}-", value) if plain in ("clip-path", "style") else value
            element.set(plain, value)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", description)
    return ElementTree.tostring(root, encoding="unicode")


def rate(before: float, after: float) -> str:
    """As the papers write it.

    >>> rate(100, 8), rate(4000, 8), rate(100, 0)
    ('12.5x', '500x', '-')
    """
    if not after:
        return "-"
    value = before / after
    return f"{value:.1f}x" if value < 99.95 else f"{value:.0f}x"


# ---- layers


@dataclass(frozen=True)
class LayerSizes:
    """A layer's (before, after)."""

    name: str
    filters: tuple[int, int]
    columns: tuple[int, int]
    weights: tuple[int, int]


@_styled
def layers(sizes: Sequence[LayerSizes], title: str = "") -> Figure:
    """What is left of every layer: shares of filters and columns, and weights on a log scale with their rate."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    figure = Figure(figsize=(_WIDTH, 1.25 + 0.27 * len(sizes) + (0.3 if title else 0)), layout="constrained")
    shares = figure.subplots(1, 3, sharey=True, width_ratios=[1, 1, 1.9])
    places = list(range(len(sizes)))
    for axes, what in zip(shares[:2], ("filters", "columns"), strict=True):
        found = [100 * after / before for before, after in (getattr(size, what) for size in sizes)]
        axes.barh(places, [100] * len(sizes), height=0.62, color=_TRACK)
        axes.barh(places, found, height=0.62, color=_KEPT)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 50, 100])
        axes.xaxis.set_major_formatter(PercentFormatter(100))
        axes.set_xlabel(f"{what} kept")
    weights = shares[2]
    before, after = ([size.weights[i] for size in sizes] for i in (0, 1))
    weights.barh(places, before, height=0.62, color=_TRACK, label="dense")
    weights.barh(places, after, height=0.62, color=_KEPT, label="kept")
    least, most = max(1, min(after)), max(before)
    weights.set_xscale("log")
    weights.set_xlim(least / 2, most * (most / least) ** 0.2 * 1.6)
    weights.xaxis.set_minor_locator(NullLocator())
    weights.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _counted(value)))
    weights.grid(axis="x")
    weights.set_xlabel("weights, log scale")
    for place, dense, small in zip(places, before, after, strict=True):
        text = rate(dense, small) if small else "nothing kept"
        weights.annotate(text, (dense, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    shares[0].set_yticks(places, [_short(size.name) for size in sizes])
    shares[0].tick_params(axis="y", labelcolor=_INK)
    shares[0].set_ylim(len(sizes) - 0.4, -0.6)
    for axes in shares:
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    _legend(figure, weights, title)
    return figure


# ---- the run


@_styled
def run(
    history: Sequence[Mapping[str, Any]],
    base: float,
    left: Mapping[str, Mapping[str, float]] | None = None,
    title: str = "",
) -> Figure:
    """Validation accuracy over the epochs of all stages, and below it how many times smaller the network was.

    Args:
        history: with the validation accuracy of every epoch, in percent.
        base: that of the dense network.
        left: rates by what is counted, of the stages since which they are so; all weights first.
        title: above it.
    """
    from matplotlib.figure import Figure

    left = left or {}
    figure = Figure(figsize=(_WIDTH, (5.0 if left else 3.6) + (0.3 if title else 0)), layout="constrained")
    rows = figure.subplots(2 if left else 1, 1, sharex=True, squeeze=False, height_ratios=[1.9, 1] if left else [1])
    panels = [row[0] for row in rows]
    stretches = _stretches([row["stage"] for row in history])
    _accuracy(panels[0], history, base, stretches)
    if left:
        _sizes(panels[1], left, stretches)
    for axes in panels:
        _bands(axes, stretches, labelled=axes is panels[0])
        axes.set_xlim(0.5, len(history) + 0.5)
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, panels[0], title)
    return figure


def _accuracy(
    axes: Axes, history: Sequence[Mapping[str, Any]], base: float, stretches: Sequence[tuple[str, int, int]]
) -> None:
    """On a scale that is logarithmic in the error."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    errors = [100 - row["validation"] for row in history]
    positive = [error for error in [*errors, 100 - base] if error > 0]
    least = min(positive, default=1.0) / 2  # where 100% is drawn
    axes.set_yscale("log")
    axes.axhline(max(100 - base, least), color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), label=f"dense, {base:.2f}%")
    labelled: set[str] = set()
    for stage, first, last in stretches:
        colour, kind = _kind(stage)
        axes.plot(
            range(first + 1, last + 2),
            [max(error, least) for error in errors[first : last + 1]],
            color=colour,
            marker="o" if len(history) <= 120 else None,
            markersize=2.6,
            linewidth=1.5,
            solid_capstyle="round",
            label=None if kind in labelled else kind,
        )
        labelled.add(kind)
    high = min(100.0, max(positive, default=1.0) * 1.3)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if least <= tick <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100 - error:g}%"))
    axes.set_ylim(high, least * (0.85 if min(errors) <= 0 else 1.6))
    axes.grid(axis="y")
    axes.set_ylabel("validation accuracy")


def _sizes(axes: Axes, left: Mapping[str, Mapping[str, float]], stretches: Sequence[tuple[str, int, int]]) -> None:
    """Rates as steps, each with its name at its end."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    end = stretches[-1][2] + 1.5
    highest = max(max(rates.values(), default=1.0) for rates in left.values())
    top = max(highest, 1.2) ** 1.12
    ends = _apart([max([1.0, *rates.values()][-1], 1.0) for rates in left.values()], math.log(top) * 0.12)
    styles = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)))
    for (name, rates), place, style in zip(left.items(), ends, styles, strict=False):
        known, now = dict(rates), 1.0
        x, y = [0.5], [1.0]
        for stage, first, _ in stretches:
            for one in [one for one in known if one == stage or _order(one) < _order(stage)]:
                now = known.pop(one)
            x.append(first + 0.5)
            y.append(now)
        now = [now, *known.values()][-1]  # of stages at the end that had no epochs
        axes.step([*x, end], [*y, now], where="post", color=_INK, linewidth=1.3, linestyle=style)
        axes.annotate(
            f"{name} {rate(now, 1)}",
            (1, place),
            (5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )
    axes.set_yscale("log")
    axes.set_ylim(top**-0.03, top)
    ticks = [t for e in range(6) for t in (10**e, 2 * 10**e, 5 * 10**e) if t <= top]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.grid(axis="y")
    axes.set_ylabel("times smaller")


def _apart(values: Sequence[float], least: float) -> list[float]:
    """Moved so that their logarithms differ by `least`: places for words."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    logs = [math.log(value) for value in values]
    found = dict(enumerate(logs))
    for lower, upper in itertools.pairwise(order):
        found[upper] = max(found[upper], found[lower] + least)
    middle = sum(logs) / len(logs) - sum(found.values()) / len(found)
    shift = max(middle, least / 2 - min(found.values()))
    return [math.exp(found[i] + shift) for i in range(len(values))]


def _bands(axes: Axes, stretches: Sequence[tuple[str, int, int]], *, labelled: bool) -> None:
    """Every other round on a tinted ground, with its name where there is room."""
    groups: list[tuple[str, int, int]] = []
    for stage, first, last in stretches:
        name = _group(stage)
        if groups and groups[-1][0] == name:
            groups[-1] = (name, groups[-1][1], last)
        else:
            groups.append((name, first, last))
        if first:
            axes.axvline(first + 0.5, color=_LINE, linewidth=0.6, zorder=0)
    total = groups[-1][2] + 1
    for number, (name, first, last) in enumerate(groups):
        if number % 2 == 0 and len(groups) > 1:
            axes.axvspan(first + 0.5, last + 1.5, color=_BAND, linewidth=0, zorder=-1)
        room = (last + 1 - first) / total * 75  # letters
        shorter = "purified" if name == "purification" else name.removeprefix("round ")
        text = next((text for text in (name, shorter) if len(text) <= room), "")
        if labelled and text:
            axes.annotate(
                text,
                ((first + last) / 2 + 1, 1.015),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8.5,
                color=_MUTED,
            )


def _stretches(stages: Sequence[str]) -> list[tuple[str, int, int]]:
    """(stage, first row, last row) of every stage, in order."""
    found: list[tuple[str, int, int]] = []
    for place, stage in enumerate(stages):
        if found and found[-1][0] == stage:
            found[-1] = (stage, found[-1][1], place)
        else:
            found.append((stage, place, place))
    return found


def _group(stage: str) -> str:
    """The round of a stage, in words."""
    number = re.match(r"round(\d+)\.", stage)
    return f"round {number[1]}" if number else "purification" if stage.startswith("purify") else stage


def _order(stage: str) -> tuple[int, int]:
    """Sorts the rounds of pruning, and those of purification behind them."""
    number = int("".join(re.findall(r"^\D+(\d+)", stage)) or 0)
    return int(stage.startswith("purify")), number


def _kind(stage: str) -> tuple[str, str]:
    if "admm" in stage:
        return _ADMM, "ADMM training, before pruning"
    if stage.endswith(".shrink"):
        return _ADMM, "training while weights shrink"
    return (_PURIFY, "purified, retraining") if stage.startswith("purify") else (_KEPT, "pruned, retraining")


# ---- searches


@_styled
def search(trace: Sequence[Trial], title: str = "", score: str = "score") -> Figure:
    """Every candidate's score and the best so far; below, temperature and the share of moves that were accepted."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    moves = [trial for trial in trace if trial.kind in ("move", "restart")]
    warm = [trial for trial in moves if trial.temperature > 0]
    below = bool(warm) + bool(len(moves) > 1)
    figure = Figure(figsize=(_WIDTH, 3.1 + 1.05 * below + (0.3 if title else 0)), layout="constrained")
    rows = figure.subplots(1 + below, 1, sharex=True, squeeze=False, height_ratios=[2.7, *[1] * below])
    panels = [row[0] for row in rows]
    _scores(panels[0], trace)
    panels[0].set_ylabel(score)
    if warm:
        axes = panels[1]
        axes.plot([t.number for t in warm], [t.temperature for t in warm], color=_ADMM, linewidth=1.5)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        axes.set_ylabel("temperature,\nlog scale")
    if len(moves) > 1:
        axes = panels[-1]
        window = min(max(_WINDOW, len(moves) // 50), len(moves))
        last = [moves[max(0, i + 1 - window) : i + 1] for i in range(len(moves))]
        shares = [100 * sum(t.accepted for t in some) / len(some) for some in last]
        start = window // 2
        axes.plot([t.number for t in moves][start:], shares[start:], color=_KEPT, linewidth=1.5)
        axes.set_ylim(0, 100)
        axes.yaxis.set_major_formatter(PercentFormatter(100))
        axes.set_ylabel(f"accepted, of\nlast {window} moves")
    for axes in panels:
        axes.grid(axis="y")
        if moves and moves[0].number > 1:
            axes.axvline(moves[0].number - 0.5, color=_MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        for trial in moves:
            if trial.kind == "restart":
                axes.axvline(trial.number, color=_PURIFY, linewidth=0.8, alpha=0.8, zorder=0.5)
    panels[-1].set_xlim(0.5, max(len(trace) + 0.5, 2))
    panels[-1].set_xlabel(f"candidate, of {len(trace):,} in {duration(trace[-1].seconds)}")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels(panels)
    _legend(figure, panels[0], title)
    return figure


def _scores(axes: Axes, trace: Sequence[Trial]) -> None:
    """One mark for every candidate; those that are far below the others are marked at the lower edge."""
    from matplotlib.lines import Line2D

    finite = sorted(trial.score for trial in trace if math.isfinite(trial.score))
    best, worst = (finite[-1], finite[0]) if finite else (0.0, 0.0)
    usual = finite[len(finite) // 20] if finite else 0.0
    start = trace[0].score if math.isfinite(trace[0].score) else usual
    low = worst if best - worst <= 2.5 * (best - usual) else usual - 0.6 * (best - usual)
    low = min(low, start)
    room = 0.06 * (best - low) or 1.0
    axes.set_ylim(low - room, best + room)

    kinds: dict[str, tuple[str, str, str, list[Trial]]] = {
        "departures, before the annealing": (_ADMM, "s", _ADMM, []),
        "move, accepted": (_KEPT, "o", _KEPT, []),
        "move, rejected": (_MUTED, "o", "none", []),
    }
    first, accepted, rejected = (trials for *_, trials in kinds.values())
    outside: list[Trial] = []
    for trial in trace:
        if trial.score < low:
            outside.append(trial)
        elif trial.kind not in ("move", "restart"):
            first.append(trial)
        else:
            (accepted if trial.accepted else rejected).append(trial)
    size = 3.4 if len(trace) <= 300 else 2.2
    many = len(trace) > _MOST_POINTS
    for label, (colour, marker, face, trials) in kinds.items():
        if trials:
            axes.plot(
                [t.number for t in trials], [t.score for t in trials], marker, markersize=size, markeredgewidth=0.7,
                markeredgecolor=colour, markerfacecolor=face, label=label, alpha=0.85, rasterized=many,
            )  # fmt: skip
    if outside:
        axes.plot(
            [t.number for t in outside], [low - room * 0.5] * len(outside), "v", markersize=size + 0.6, color=_MUTED,
            markeredgewidth=0, label=f"{len(outside):,} below this scale", rasterized=many,
        )  # fmt: skip
    axes.axhline(start, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), label="by experience")
    scores = [t.best if math.isfinite(t.best) else low - room for t in trace]
    axes.step([t.number for t in trace], scores, where="post", color=_INK, linewidth=1.5, label="best so far")
    if any(trial.kind == "restart" for trial in trace):
        axes.add_line(Line2D([], [], color=_PURIFY, linewidth=0.9, label="back to the best"))


# ---- latency


@dataclass(frozen=True)
class Bar:
    """Seconds of one call: median, and the quarter and three quarters of the calls around it."""

    name: str
    median: float
    low: float
    high: float


@_styled
def latency(bars: Sequence[Bar], title: str = "") -> Figure:
    """Medians, with half of the calls as a line: the last bar is the compressed network."""
    from matplotlib.figure import Figure

    name, size = unit(max(bar.median for bar in bars))
    figure = Figure(figsize=(_WIDTH, 0.75 + 0.36 * len(bars) + (0.3 if title else 0)), layout="constrained")
    axes = figure.subplots()
    for place, bar in enumerate(bars):
        colour = _KEPT if place == len(bars) - 1 else _TRACK
        axes.barh(place, bar.median / size, height=0.62, color=colour)
        half = [bar.low / size, bar.high / size]
        for line, width in ((_PAGE, 4.0), (_INK, 1.4)):  # seen on any ground
            axes.plot(half, [place, place], color=line, linewidth=width, solid_capstyle="butt")
        faster = f", {bars[0].median / bar.median:.1f}x faster" if place and bar.median < bars[0].median else ""
        axes.annotate(
            f"{bar.median / size:.3g} {name}{faster}",
            (max(bar.median, bar.high) / size, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, max(bar.high for bar in bars) / size * 1.25)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{name} a call; the lines span half of the calls")
    if title:
        figure.suptitle(_short(title, 90), x=0.01, ha="left", fontsize=10.5)
    return figure


def unit(seconds: float) -> tuple[str, float]:
    """The unit that a duration is best told in, and its seconds."""
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)


# ---- what they share


def _legend(figure: Figure, axes: Axes, title: str) -> None:
    """Above everything, so that it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if len(labels) > 4 else max(1, len(labels))
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.6,
        title=_short(title, 90) or None, alignment="left", title_fontproperties={"size": 10.5},
    )  # fmt: skip


def _short(text: str, most: int = _LONGEST) -> str:
    r"""Text that can be drawn, without its middle where it is long.

    >>> _short("features.denseblock3.denselayer12.conv2", 21), _short("a\tb")
    ('featur…elayer12.conv2', 'a b')
    """
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    begin = (most - 1) // 3
    return text if len(text) <= most else f"{text[:begin]}…{text[begin + 1 - most :]}"


def _counted(value: float) -> str:
    """A number of weights, shortly.

    >>> _counted(100), _counted(25000), _counted(1e6)
    ('100', '25k', '1M')
    """
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """For people, of what takes long."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
