import dataclasses
import functools
import itertools
import json
import math
import re
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from rich.console import Console

import autocompress_fast as acf
from autocompress_fast import _plots
from autocompress_fast import report as reports
from autocompress_fast._plots import LayerSizes
from autocompress_fast.engine import UnsupportedError
from autocompress_fast.engine.turns import in_turns
from autocompress_fast.rates import Action
from autocompress_fast.search import Trial, read_trace
from autocompress_fast.unused import unused_paths

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    recipe = acf.Recipe(
        rounds=2, admm_epochs=1, retrain_epochs=1, final_epochs=2, batch_size=256, precision="float32", seed=5
    )
    return acf.compress(acf.models.create("lenet_digits"), acf.data.digits(), target="6x", recipe=recipe)


@pytest.fixture(scope="module")
def branching():
    """A network whose first layer goes two ways, once through a grouped convolution."""

    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.body = torch.nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.head = torch.nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            return self.head((x + self.body(x)).mean((2, 3)))

    torch.manual_seed(0)
    return acf.inspect(Branching(), torch.zeros(1, 3, 8, 8))


def cells(text, name):
    """The words of the line that begins with `name`."""
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line[len(name) :].replace("->", " ").replace(",", "").split()


# ---- tables


def test_table_aligns_names_left_and_figures_right():
    table = reports.Table("title", ("name", "kind", "n"), [("a", "conv", "1,000"), ("long name", "x", "5")], names=2)
    assert str(table).splitlines() == [
        "title",
        "name       kind      n",
        "a          conv  1,000",
        "long name  x         5",
    ]


def test_rich_shows_the_same_cells(result):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(result.report())
    shown = console.export_text()
    for word in str(result.report()).split():
        assert word in shown


# ---- a finished run


def test_summary_tells_what_is_left_of_every_layer(result):
    text = str(result.report())
    for layer in result.layers.layers:
        plan = result.plan[layer.name]
        kept = int(plan.filters.sum()), int(plan.columns.sum()), plan.weights
        *found, rate = cells(text, layer.name)
        before_after = zip((layer.shape[0], layer.columns, layer.weights), kept, strict=True)
        assert found == [str(n) for pair in before_after for n in pair]
        assert float(rate[:-1]) == pytest.approx(layer.weights / plan.weights, abs=0.051)


def test_summary_tells_totals_and_accuracy(result):
    text = str(result.report())
    for name, key in (("CONV weights", "conv"), ("all weights", "params"), ("MACs", "macs")):
        before, after, rate = cells(text, name)
        assert (int(before), int(after)) == (getattr(result.dense, key), getattr(result.small, key))
        assert float(rate[:-1]) == pytest.approx(result.rates[key], abs=0.051)
    for part, suffix in (("validation", ""), ("test", "_test")):
        base, final, points = cells(text, part)
        assert base == f"{result.accuracy['base' + suffix]:.2f}%"
        assert final == f"{result.accuracy['final' + suffix]:.2f}%"
        expected = result.accuracy["final" + suffix] - result.accuracy["base" + suffix]
        assert float(points) == pytest.approx(expected, abs=0.0051)
    assert text.startswith("DigitsNet on digits, target params 6x\n")
    assert "differ by" in text
    assert "5 epochs of compression" in text
    assert text.endswith("seed 5")


def test_summary_as_json_is_the_result(result):
    found = json.loads(json.dumps(result.report().to_json()))
    assert found["rates"] == result.rates
    assert found["layers"]["fc1"]["weights"] == result.plan["fc1"].weights


def test_run_without_test_set_or_names():
    data = acf.data.digits()
    train, validation = (
        [(torch.from_numpy(p.normalized()), torch.from_numpy(p.labels))] for p in (data.train, data.test)
    )
    recipe = acf.Recipe(rounds=1, admm_epochs=1, final_epochs=1, precision="float32")
    found = acf.compress(acf.models.create("lenet_digits"), (train, validation), target="2x", recipe=recipe)
    text = str(found.report())
    assert text.startswith("DigitsNet, target params 2x\n")
    assert cells(text, "validation")
    assert not [line for line in text.splitlines() if line.startswith("test ")]


def test_plots_are_pictures(result, tmp_path):
    paths = result.report().save_plots(tmp_path / "new" / "plots")
    assert [path.name for path in paths] == ["accuracy.png", "weights.png"]
    assert sorted((tmp_path / "new" / "plots").iterdir()) == paths
    for path in paths:
        assert_picture(path)


def assert_picture(path):
    with PIL.Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 300
    assert 0.01 < (pixels < 250).mean() < 0.7, "neither empty nor covered"


def test_plot_of_layers_shows_the_numbers():
    sizes = [
        LayerSizes("conv1", (10, 5), (10, 2), (100, 10)),
        LayerSizes("fc", (40, 1), (100, 8), (4000, 8)),
        LayerSizes("dead $x_{", (4, 0), (2, 0), (8, 0)),
    ]
    filters, columns, weights = _plots.layers(sizes).axes
    for axes, shares in ((filters, [50, 2.5, 0]), (columns, [20, 8, 0])):
        whole, kept = axes.containers
        assert [bar.get_width() for bar in whole] == [100] * 3
        assert [bar.get_width() for bar in kept] == pytest.approx(shares)
    dense, kept = weights.containers
    assert [bar.get_width() for bar in dense] == [100, 4000, 8]
    assert [bar.get_width() for bar in kept] == [10, 8, 0]
    assert [label.get_text() for label in filters.get_yticklabels()] == ["conv1", "fc", "dead $x_{"]
    assert [text.get_text() for text in weights.texts] == ["10.0x", "500x", "nothing kept"]
    assert weights.get_xscale() == "log"
    assert filters.get_ylim()[0] > filters.get_ylim()[1], "the first layer is the topmost"


def test_plot_of_accuracy_shows_every_epoch_and_where_rounds_begin():
    stages = ["round1.admm"] * 2 + ["round1.retrain"] * 3 + ["round2.admm"] * 4
    values = [90.0, 95.0, 50.0, 99.0, 100.0, 98.0, 97.0, 96.0, 95.0]
    history = [{"stage": s, "validation": v} for s, v in zip(stages, values, strict=True)]
    (axes,) = _plots.run(history, 98.0).axes
    base, admm, retrain, second, *boundaries = axes.lines
    assert list(base.get_ydata()) == [2, 2]
    assert list(admm.get_xdata()) == [1, 2]
    assert list(admm.get_ydata()) == [10, 5]
    assert list(retrain.get_xdata()) == [3, 4, 5]
    assert list(retrain.get_ydata())[:2] == [50, 1]
    assert 0 < retrain.get_ydata()[2] < 1, "100% is drawn above the best that is not"
    assert second.get_color() == admm.get_color() != retrain.get_color()
    assert [line.get_xdata()[0] for line in boundaries] == [2.5, 5.5]
    assert [text.get_text() for text in axes.texts] == ["round 1", "round 2"]
    low, high = axes.get_ylim()
    assert low > 50
    assert high < retrain.get_ydata()[2], "better is higher, and everything is inside"


def test_plot_of_sizes_steps_where_stages_begin():
    stages = ["round1.admm", "round1.admm", "round2.admm", "round2.final", "purify1"]
    history = [{"stage": stage, "validation": 90.0} for stage in stages]
    left = {"all weights": {"round1.retrain": 2.0, "round2.final": 4.0, "purify1": 5.0}, "MACs": {"purify1": 3.0}}
    _, axes = _plots.run(history, 98.0, left).axes
    weights, macs = axes.lines[:2]
    steps = dict(zip(weights.get_xdata(), weights.get_ydata(), strict=True))
    assert steps == {0.5: 1, 2.5: 2, 3.5: 4, 4.5: 5, 5.5: 5}, "also of a stage that had no epochs"
    assert list(macs.get_ydata())[-2:] == [3, 3]
    left["MACs"] |= {"purify2": 6.0}
    _, axes = _plots.run(history, 98.0, left).axes
    assert list(axes.lines[1].get_ydata())[-2:] == [3, 6], "also of one that nothing comes after"
    left["MACs"].pop("purify2")
    _, axes = _plots.run(history, 98.0, left).axes
    assert [text.get_text() for text in axes.texts] == ["all weights 5.0x", "MACs 3.0x"]
    assert axes.texts[0].xy[1] > axes.texts[1].xy[1]


def test_names_of_rounds_stand_where_there_is_room():
    stages = [f"round{number}.admm" for number in range(1, 30)] + ["round30.final"] * 90
    history = [{"stage": stage, "validation": 90.0} for stage in stages]
    texts = [text.get_text() for text in _plots.run(history, 98.0).axes[0].texts]
    assert texts == ["round 30"]


# ---- searches


TRIALS = [
    Trial(1, "start", Action(), -2.0, 0.0, True, -2.0, 1.0),
    Trial(2, "departure", Action(), -1.5, 0.0, True, -1.5, 2.0),
    Trial(3, "move", Action(), -1.0, 0.5, True, -1.0, 3.0),
    Trial(4, "move", Action(), -math.inf, 0.4, False, -1.0, 4.0),
    Trial(5, "restart", Action(), -1.25, 0.3, False, -1.0, 5.0),
]


def test_plot_of_a_search_shows_every_trial():
    scores, temperature, accepted = _plots.search(TRIALS, score="points").axes
    lines = {line.get_label(): line for line in scores.lines}
    shown = {name: (list(line.get_xdata()), list(line.get_ydata())) for name, line in lines.items()}
    assert shown["departures, before the annealing"] == ([1, 2], [-2, -1.5])
    assert shown["move, accepted"] == ([3], [-1])
    assert shown["move, rejected"] == ([5], [-1.25])
    (below,) = (xy for name, xy in shown.items() if name == "1 below this scale")
    assert below[0] == [4]
    assert scores.get_ylim()[0] < below[1][0] < -2, "at the lower edge"
    assert shown["best so far"] == ([1, 2, 3, 4, 5], [-2, -1.5, -1, -1, -1])
    assert shown["by experience"][1] == [-2, -2]
    assert scores.get_ylabel() == "points"
    assert list(temperature.lines[0].get_xdata()) == [3, 4, 5]
    assert list(temperature.lines[0].get_ydata()) == [0.5, 0.4, 0.3]
    assert list(accepted.lines[0].get_ydata()) == pytest.approx([50, 100 / 3])
    for axes in (scores, temperature, accepted):
        assert [5, 5] in [list(line.get_xdata()) for line in axes.lines], "where it went back"


def test_plot_of_a_long_search_stays_small():
    trials = [dataclasses.replace(TRIALS[2], number=number) for number in range(1, 5001)]
    svg = _plots.as_svg(_plots.search(trials), "long", "a long search")
    assert len(svg) < 400_000
    assert "data:image/png;base64," in svg
    assert not re.search(r"https?:", svg)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_plot_of_a_search_that_has_just_begun(count, tmp_path):
    assert_picture(acf.plot_search(TRIALS[:count], tmp_path / "search.png"))


def test_plot_of_a_search_in_which_nothing_works(tmp_path):
    trials = [dataclasses.replace(trial, score=-math.inf, best=-math.inf) for trial in TRIALS]
    assert_picture(acf.plot_search(trials, tmp_path / "search.png"))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """What a search has found, and its trace."""
    report = acf.inspect(chain([20, 30, 10]), torch.zeros(1, 20))
    trace = tmp_path_factory.mktemp("search") / "trace.jsonl"
    search = acf.Search(report, acf.Target(params=2), lambda c: float(c["0"].keep[0]), trace=trace)
    return search.run(25), trace


def test_a_search_is_drawn_from_what_it_found_and_from_its_file(searched, tmp_path):
    found, trace = searched
    paths = [
        found.plot(tmp_path / "found.png"),
        acf.plot_search(found.trace, tmp_path / "trials.png"),
        acf.plot_search(trace, tmp_path / "file.png"),
        acf.plot_search(str(trace), str(tmp_path / "name.png")),
    ]
    assert len({path.read_bytes() for path in paths}) == 1
    assert_picture(paths[0])
    vector = found.plot(tmp_path / "found.svg")
    assert "best so far" in vector.read_text()


def test_a_line_that_was_cut_off_is_left_out_of_the_plot(searched, tmp_path):
    found, trace = searched
    cut = tmp_path / "cut.jsonl"
    cut.write_text(trace.read_text()[:-20])
    assert read_trace(trace) == found.trace
    assert read_trace(cut) == found.trace[:-1]


def damaged(text):
    lines = text.splitlines()
    trial = json.loads(lines[3])
    yield "", "first line"
    yield lines[0] + "\n", "there are no trials"
    yield "\x00\xff binary\n", "no trace"
    yield '{"stage": "base", "epoch": 1}\n' * 3, "no trace"
    yield re.sub(r'"format": \d+', '"format": 99', text), "does not say format"
    yield "\n".join([*lines[:3], lines[3][:30], *lines[4:], ""]), "no trace"
    for change in ({"score": "high"}, {"temperature": None}, {"kind": 3}, {"more": 1}, {"action": [1]}):
        yield "\n".join([*lines[:3], json.dumps(trial | change), ""]), "no trace"


def test_a_damaged_trace_gives_one_clear_error(searched, tmp_path):
    path = tmp_path / "damaged.jsonl"
    for text, message in damaged(searched[1].read_text()):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            acf.plot_search(path, tmp_path / "no.png")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["damaged.jsonl"]
    with pytest.raises(FileNotFoundError):
        acf.plot_search(tmp_path / "missing.jsonl", tmp_path / "no.png")


def test_pictures_in_formats_that_are_none(searched, tmp_path):
    with pytest.raises(ValueError, match=r"search.txt must end in a format of pictures"):
        searched[0].plot(tmp_path / "search.txt")


# ---- the page


class Page(HTMLParser):
    """A page as its sections, tables, links and ids; it fails where elements do not close as they opened."""

    VOID = ("meta", "br", "img", "link", "hr", "input")

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.tags = [], [], [], []
        self.headings, self.tables, self.texts, self.attributes = [], [], [], []
        self.content = path.read_text(encoding="utf-8")
        self.feed(self.content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("href", "src") if name in found]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.open and self.open[-1] == "h2":
            self.headings[-1] += data

    def table(self, *header):
        (found,) = [table[1:] for table in self.tables if tuple(table[0][: len(header)]) == header]
        return found


ALWAYS = ["Over the run", "Layer by layer", "What stays as it is", "To make it again"]


@pytest.fixture(scope="module")
def written(result, tmp_path_factory):
    file = result.save(tmp_path_factory.mktemp("page") / "model.acf")
    path = file.parent / "report.html"
    assert result.report().save_html(path, file=file, notes=["A <note> & more"]) == path
    assert sorted(one.name for one in file.parent.iterdir()) == ["model.acf", "report.html"]
    return Page(path), file


def test_page_shows_the_figures(result, written):
    page, file = written
    assert page.headings == [*ALWAYS[:2], "Latency", *ALWAYS[2:]]
    text = " ".join(page.texts)
    assert f"{result.rates['params']:.1f}x fewer weights" in text
    assert "DigitsNet on digits, target params 6x, seed 5" in text
    assert "A <note> & more" in text
    for key in ("final", "final_test", "base", "base_test"):
        assert f"{result.accuracy[key]:.2f}%" in text
    assert f"{file.stat().st_size / 1000:.1f} kB" in text
    for layer, row in zip(result.layers.layers, page.table("layer", "filters"), strict=False):
        plan = result.plan[layer.name]
        assert row[:4] == [
            layer.name,
            f"{layer.shape[0]} → {int(plan.filters.sum())}",
            f"{layer.columns} → {int(plan.columns.sum())}",
            f"{layer.weights:,} → {plan.weights:,}",
        ]
    stages = page.table("stage", "epochs")
    assert [row[0] for row in stages] == ["round1.admm", "round1.retrain", "round2.admm", "round2.final"]
    assert [row[1] for row in stages] == ["1", "1", "1", "2"]
    assert stages[-1][3] == f"{result.history[-1]['validation']:.2f}%"
    assert stages[1][5] == f"{result.sizes['round1.retrain'].params:,}, 3.3x"
    assert stages[-1][5] == f"{result.small.params:,}, {result.rates['params']:.1f}x"
    assert "1 sample a call, 1 thread, medians of " in text
    assert page.table("filters that are frozen")[0][0] == "it is an output of the model"


def test_page_says_how_to_make_it_again(result, written):
    page, _ = written
    (code,) = [text for text in page.texts if text.startswith("result = acf.compress")]
    asked = {}
    names = {"Recipe": acf.Recipe, "Target": acf.Target, "compress": lambda *_, **options: asked.update(options)}
    exec(code, {"acf": SimpleNamespace(**names), "model": None, "data": None})
    assert asked == {"target": result.target, "recipe": result.recipe}
    settings = {row[0]: row[1:] for row in page.table("setting", "value")}
    assert settings.keys() == {field.name for field in dataclasses.fields(acf.Recipe)}
    assert settings["seed"] == ["5", "by default 0"]
    assert settings["optimizer"] == ["adam", ""]
    installation = dict(page.tables[-1][1:])
    assert installation["version"] == acf.__version__
    assert installation["torch"] == torch.__version__


def test_page_needs_nothing_else(written):
    page, _ = written
    assert "script" not in page.tags
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not re.search(r"https?:|//|@import|javascript:", page.content)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("svg") == 3
    assert len(page.ids) == len(set(page.ids)), "no two parts of the page have the same name"
    inside = [link.removeprefix("#") for link in page.links if link.startswith("#")]
    assert set(inside) <= set(page.ids)
    assert len(inside) == len([link for link in page.links if not link.startswith("data:image/png;base64,")])
    assert set(re.findall(r"url\(#([^)]*)\)", page.content)) <= set(page.ids)
    assert ("name", "viewport") in page.attributes


def test_page_is_light_and_dark(written):
    page, _ = written
    parts = page.content.split("@media")
    light, dark, printed = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in parts[:3])
    assert printed == light
    assert light.keys() == dark.keys() == _plots.COLOURS.keys()
    assert not set(light.values()) & set(dark.values())
    styles = " ".join(value for name, value in page.attributes if name == "style")
    assert set(re.findall(r"var\(--(\w+)\)", styles)) >= {"ink", "muted", "kept", "admm", "track"}
    assert not re.findall(r"#[0-9a-f]{6}", styles), "every colour follows the page"


def test_page_has_the_sections_that_have_content(result, searched, tmp_path):
    plain = dataclasses.replace(result, history=[], sizes={}, accuracy={"base": 99.0, "final": 98.0})
    page = Page(plain.report().save_html(tmp_path / "plain.html", measure=False))
    assert page.headings == ALWAYS[1:]
    assert "file" not in page.texts
    assert page.tags.count("svg") == 1

    purified = {
        "before": {"conv": 4, "params": 2000, "macs": 8},
        "after": {"conv": 2, "params": 1000, "macs": 4},
        "scores": [97.5, 97.0],
        "steps": [
            {"round": 1, "layers": ["fc1"], "limit": "filter", "value": 0.5, "groups": 2, "of": 9, "score": 97.0}
            | {"filters": 2, "columns": 3, "weights": 4, "macs": 5, "score_before": 97.5, "evaluations": 3},
            {"round": 1, "layers": ["fc2"], "limit": "column", "value": 0.0, "groups": 0, "of": 9, "score": 97.0}
            | {"filters": 0, "columns": 0, "weights": 0, "macs": 0, "score_before": 97.0, "evaluations": 3},
        ],
    }
    found = searched[0]
    more = dataclasses.replace(result, searches=[found, found], purification=[purified, purified])
    page = Page(more.report().save_html(tmp_path / "more.html", measure=False))
    assert page.headings == [*ALWAYS[:2], "Search for the rates", "Purification", *ALWAYS[2:]]
    assert page.tags.count("svg") == 4
    assert len(page.ids) == len(set(page.ids))
    assert page.table("round", "candidates")[1][:2] == ["2", "25"]
    assert page.table("round", "layer") == [
        [str(n), "fc1", "filter below 0.5", "2 of 9", "2", "3", "4", "5", "97.50 → 97.00"] for n in (1, 2)
    ]
    dense = result.dense.params
    assert f"All weights {dense / 2000:.1f}x → {dense / 1000:.1f}x → {dense / 1000:.1f}x" in " ".join(page.texts)
    text = str(more.report())
    assert f"search, 50 candidates: score by experience -> of the best, in every round: {found.start:.4g} -> " in text
    assert [path.name for path in more.report().save_plots(tmp_path)][1:3] == ["search1.png", "search2.png"]


def test_names_are_text_wherever_they_come_from(tmp_path):
    names = ["<script>alert(1)</script>", "$x_{^&amp;", '"><img src=x onerror=y>\x01 #17698f']
    model = torch.nn.Sequential(torch.nn.Flatten())
    torch.manual_seed(0)
    for name, (inputs, outputs) in zip(names, itertools.pairwise((64, 12, 12, 10)), strict=True):
        model.add_module(name, torch.nn.Linear(inputs, outputs))
    data = dataclasses.replace(acf.data.digits(), name="</title><b>digits")
    recipe = acf.Recipe(rounds=1, admm_epochs=1, final_epochs=1, batch_size=512, precision="float32")
    result = acf.compress(model, data, target="2x", recipe=recipe, exclude=names[1])
    result.report().save_plots(tmp_path)
    page = Page(result.report().save_html(tmp_path / "report.html", measure=False))
    assert not {"script", "img", "b"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert [row[0] for row in page.table("layer", "filters")][:3] == names
    assert [text for text in page.texts if "</title><b>digits" in text]
    drawn = ["<script>alert(1)</script>", "$x_{^&amp;", '"><img src=x onerror=y>  #17698f']
    assert set(drawn) <= set(page.texts), "in the plot, too"
    (code,) = [text for text in page.texts if text.startswith("result = acf.compress")]
    assert f"exclude={[names[1]]!r}" in code


def test_page_says_why_nothing_was_measured(result, monkeypatch, tmp_path):
    def refused(*_):
        raise UnsupportedError("the engine cannot run this model: <fft>")

    monkeypatch.setattr("autocompress_fast.engine.lower.lower_trace", refused)
    page = Page(result.report().save_html(tmp_path / "report.html"))
    assert "Not measured: the engine cannot run this model: <fft>" in page.texts
    assert "latency" not in page.texts


def test_page_replaces_an_old_one_at_once(result, monkeypatch, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space"):
            result.report().save_html(path, measure=False)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_speed_is_measured_in_turns(result):
    speed = reports.Speed.measured(result, samples=3, seconds=0.01)
    assert (speed.samples, speed.threads) == (3, 1)
    assert speed.rounds >= 9
    for spread in (speed.dense, speed.small):
        assert 0 < spread.low <= spread.median <= spread.high


def test_the_call_that_begins_a_turn_does_not_count(monkeypatch):
    made, now = [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow_after_another(name):
        made.append(name)
        now[0] += 1.0 if made[-2:] == [name, name] else 50.0

    calls = {name: functools.partial(slow_after_another, name) for name in ("one", "other")}
    found = in_turns(calls, 3)
    assert made == ["one", "one", "other", "other"] * 3
    assert all((spread.low, spread.median, spread.high) == (1.0, 1.0, 1.0) for spread in found.values())


# ---- an inspected model


def test_inspection_lists_layers_and_reasons(branching):
    text = str(reports.Inspection(branching))
    assert f"{branching.params:,} weights" in text
    assert cells(text, "stem  ")[:3] == ["conv2d", "filters", "columns"]
    assert "conv2d 2 groups filters" in " ".join(cells(text, "body  "))
    assert "conv2d 2 groups filters columns" not in " ".join(cells(text, "body  "))
    assert cells(text.split("what lives")[0], "head  ")[:2] == ["linear", "columns"]
    (one,) = branching.frozen_by
    assert one.layers == ("head",)
    assert cells(text, one.reason) == ["head", "0", "0.0%", "0", "0.0%"]
    assert text.split("columns that cannot be dropped one by one:\n")[1].splitlines()[0] == (
        "  body: it is a grouped convolution"
    )


def test_inspection_tells_what_lives_and_dies_together(branching):
    table = str(reports.Inspection(branching)).split("what lives and dies together\n")[1].split("\n\n")[0]
    assert [re.split(" {2,}", line) for line in table.splitlines()] == [
        ["filters of each group", "channels of each group, in", "prunable", "sets", "groups"],
        ["2 of stem, 2 of body", "2 of body, 2 of head", "yes", "1", "4"],
        ["head", "-", "it is an output of the model", "1", "4"],
    ]


def chain(widths):
    """Pairs of layers behind each other: those of the same widths are alike."""
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    torch.manual_seed(0)
    return torch.nn.Sequential(*layers[:-1])


def test_inspection_counts_sets_that_are_alike_unless_all_are_asked_for():
    report = acf.inspect(chain([3, 6, 6, 4, 6, 2]), torch.zeros(1, 3))
    tables = [
        str(reports.Inspection(report, groups=groups)).split("what lives and dies together\n")[1].split("\n\n")[0]
        for groups in (False, True)
    ]
    rows = [[re.split(" {2,}", line) for line in table.splitlines()[1:]] for table in tables]
    output = ["8", "-", "it is an output of the model", "1", "2"]
    assert rows[0] == [["0", "2", "yes", "3", "18"], ["4", "6", "yes", "1", "4"], output]
    assert rows[1] == [
        ["0", "2", "yes", "1", "6"],
        ["2", "4", "yes", "1", "6"],
        ["4", "6", "yes", "1", "4"],
        ["6", "8", "yes", "1", "6"],
        output,
    ]


def test_inspection_sums_up_long_lists_of_layers():
    report = acf.inspect(chain([3, 6, 6, 4, 6, 2]), torch.zeros(1, 3), select="0")
    text = str(reports.Inspection(report))
    sizes = [36, 24, 24, 12]
    share = f"{sum(sizes) / (sum(sizes) + 18):.1%}"
    assert cells(text, "it is not selected") == ["2", "4", "and", "2", "more", "96", share, "96", share]
    assert "cut out: 0.0% of the weights, 0.0% of the multiply-adds" in text
    assert "one by one" not in text, "what is not selected is said once"


def test_inspection_names_what_is_left_out():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[2].weight = model[0].weight
    report = acf.inspect(model, torch.zeros(1, 4))
    inspection = reports.Inspection(report)
    assert report.skipped
    assert inspection.to_json()["skipped"] == dict(report.skipped)
    for name, reason in report.skipped.items():
        assert f"  {name}: {reason}" in str(inspection).split("not counted:")[1]


def test_inspection_predicts_what_uniform_pruning_leaves(result):
    report = result.layers
    dense = report.counts()
    text, uniform = str(reports.Inspection(report)), reports.Inspection(report).to_json()["uniform"]
    assert [(effect["filters"], effect["columns"]) for effect in uniform] == [
        *((share, 0.0) for share in (0.25, 0.5, 0.75)),
        *((0.0, share) for share in (0.25, 0.5, 0.75)),
        *((share, share) for share in (0.25, 0.5, 0.75)),
    ]
    for effect in uniform:
        plan = acf.Plan.uniform(report, filters=effect["filters"], columns=effect["columns"])
        counts = report.counts(unused_paths(plan, report))
        assert effect["left"] == dataclasses.asdict(counts)
        found = cells(text, f"{effect['filters']:.0%} of the filters, {effect['columns']:.0%} of the columns")
        assert len(found) == 6
        for name, share, rate in zip(("conv", "params", "macs"), found[::2], found[1::2], strict=True):
            left = getattr(counts, name) / getattr(dense, name)
            assert float(share[:-1]) == pytest.approx(100 * left, abs=0.051)
            assert float(rate[:-1]) == pytest.approx(1 / left, abs=0.051)


def test_inspection_of_a_network_in_which_little_can_stay():
    """Columns and filters of a narrow network meet: one weight of the first layer, and what the second one reads."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    report = acf.inspect(model, torch.zeros(1, 4))
    last = reports.Inspection(report).to_json()["uniform"][-1]
    assert last == {"filters": 0.75, "columns": 0.75, "left": {"conv": 0, "params": 3, "macs": 3}}
    assert str(reports.Inspection(report)).splitlines()[-1].split()[-5:] == ["-", "12.5%,", "8.0x", "12.5%,", "8.0x"]


def test_inspection_of_a_network_of_which_nothing_would_be_left(monkeypatch, branching):
    def predict(report, filters, columns):
        if filters and columns:
            raise ValueError("nothing would be left")
        return report.counts()

    monkeypatch.setattr(type(branching), "predict", predict)
    inspection = reports.Inspection(branching)
    left = [effect["left"] for effect in inspection.to_json()["uniform"]]
    assert left == [dataclasses.asdict(branching.counts())] * 6 + [None] * 3
    *_, before, _, _, last = str(inspection).splitlines()
    assert before.split()[-2:] == ["100.0%,", "1.0x"]
    assert last.split()[-3:] == ["-", "-", "-"]


# ---- a dry run


@pytest.mark.parametrize("structure", ["filter+column", "filter", "column", "element"])
def test_outlook_shows_what_every_round_keeps(structure):
    data = acf.data.digits()
    recipe = acf.Recipe(structure=structure, rounds=2, admm_epochs=3, retrain_epochs=2, final_epochs=4)
    model = acf.models.create("lenet_digits")
    dry_run = acf.compress(model, data, target="4x", recipe=recipe, dry_run=True)
    outlook = reports.Outlook(dry_run, base_epochs=9)
    text, found = str(outlook), json.loads(json.dumps(outlook.to_json()))
    assert "round 1: params 2.52x  round 2: params 4x" in text
    assert "after 9 epochs of training the dense network: 12 epochs of compression, at most" in text
    assert (found["epochs"], found["base_epochs"], found["can_be_met"]) == (12, 9, True)
    for (part, constraints), row in zip(dry_run.rounds, found["rounds"], strict=True):
        assert row["target"] == str(part)
        assert row["layers"].keys() == constraints.keys()
    for name, constraint in dry_run.rounds[-1][1].items():
        line = " ".join(cells(text, f"{name} "))
        keep = constraint.keep if isinstance(constraint.keep, tuple) else (constraint.keep,)
        ending = " x ".join(map(str, keep)) + (
            "" if len(keep) == 2 else " weights" if structure == "element" else f" {structure}s"
        )
        assert line.endswith(ending)
