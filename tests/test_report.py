import dataclasses
import itertools
import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from rich.console import Console

import autocompress_fast as acf
from autocompress_fast import report as reports
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
        with PIL.Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 300
        assert 0.01 < (pixels < 250).mean() < 0.7, "neither empty nor covered"


def test_plot_of_weights_shows_the_numbers():
    axes = reports._plot_weights({"conv1": (100, 10), "fc": (4000, 8)}, "title").axes[0]
    dense, kept = axes.containers
    assert [bar.get_width() for bar in dense] == [100, 4000]
    assert [bar.get_width() for bar in kept] == [10, 8]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "fc"]
    assert [text.get_text() for text in axes.texts] == ["10.0x", "500x"]
    assert axes.get_xscale() == "log"


def test_plot_of_accuracy_shows_every_epoch_and_where_stages_begin():
    stages = ["round1.admm"] * 2 + ["round1.final"] * 3
    values = [90.0, 95.0, 50.0, 99.0, 100.0]
    history = [{"stage": s, "validation": v} for s, v in zip(stages, values, strict=True)]
    axes = reports._plot_accuracy(history, 98.0, "title").axes[0]
    base, admm, final, boundary = axes.lines
    assert list(base.get_ydata()) == [2, 2]
    assert list(admm.get_xdata()) == [1, 2]
    assert list(admm.get_ydata()) == [10, 5]
    assert list(final.get_xdata()) == [3, 4, 5]
    assert list(final.get_ydata())[:2] == [50, 1]
    assert 0 < final.get_ydata()[2] < 1, "100% is drawn above the best that is not"
    assert list(boundary.get_xdata()) == [2.5, 2.5]
    assert [text.get_text() for text in axes.texts] == ["round 1\nadmm", "round 1\nfinal"]
    low, high = axes.get_ylim()
    assert low > 50
    assert high < final.get_ydata()[2], "better is higher, and everything is inside"


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
