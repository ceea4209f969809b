"""Predicted latencies: sizes are those of the compacted network, interpolation is exact, measurements are kept."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import autocompress_fast as acf
from autocompress_fast import models
from autocompress_fast.engine import latency, machine
from autocompress_fast.engine.latency import Costs, Outline, Timing, Work, _estimate
from autocompress_fast.engine.lower import lower, lower_trace
from autocompress_fast.engine.program import Program, validate
from autocompress_fast.graph import Report
from autocompress_fast.latency import LatencyModel
from autocompress_fast.models import vgg
from autocompress_fast.plan import LayerPlan, Plan
from autocompress_fast.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

PER_CYCLE, REST = 3e-10, 1e-6


class Clock:
    """Takes so many seconds for an estimated cycle, and counts the programs."""

    def __init__(self) -> None:
        self.programs = 0

    def __call__(self, program: Program, samples: int, _threads: int) -> Timing:
        self.programs += 1
        seconds = {work.steps[-1].output: PER_CYCLE * _estimate(work, samples).cycles for work in works(program)}
        return Timing(seconds, REST)


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(latency, "timed", made)
    monkeypatch.setattr("autocompress_fast.latency.timed", made)
    monkeypatch.setattr(latency, "second_level_cache", lambda: 2**21)
    return made


def works(program: Program) -> list[Work]:
    return Outline(program, validate(program)).works()


def small(filters: int = 32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, filters, 3, padding=1), nn.ReLU(), nn.Conv2d(filters, 24, 3), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 9, 5)).eval()


X = torch.zeros(1, 3, 8, 8)


def random_plan(report: Report, seed: int) -> Plan:
    """Every layer keeps other shares of its filters and columns."""
    rng = np.random.default_rng(seed)
    layers = {}
    for layer in report.layers:
        filters = rng.random(layer.shape[0]) < rng.uniform(0.3, 1)
        filters |= report.frozen_filters(layer.name)
        columns = np.ones(layer.columns, bool)
        if layer.columns_prunable:
            columns = rng.random(layer.columns) < rng.uniform(0.2, 1)
        filters[0] = columns[0] = True
        layers[layer.name] = LayerPlan(layer.shape, filters, columns, None, layer.groups, layer.transposed)
    return Plan(layers).tied(report)


NETWORKS = {
    "residual": lambda: models.create("resnet20", width=8),
    "depthwise": lambda: nn.Sequential(*models.create("mobilenet_v2").features[:6]),
    "chain": lambda: vgg.VGG16(width=16),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.usefixtures("clock")
def test_sizes_are_those_of_the_compacted_network(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), torch.zeros(1, 3, 32, 32)
    report = acf.inspect(model, x)
    predictor = LatencyModel.of(report, directory=None)
    dense = Plan.dense(report)
    for plan in (dense, Plan.uniform(report, filters=0.4, columns=0.3), random_plan(report, 0)):
        small = acf.compact(model, plan, x, report=report).model
        program = lower_trace(report.trace)[0] if plan is dense else lower(small, x)
        expected = [(work.op, work.size) for work in works(program)]
        found = [(step.op, step.size) for step in predictor.predict(plan).steps]
        assert [step for step in found if step[0] not in ("call", "values")] == expected
        settled = acf.unused_paths(plan, report)
        assert predictor.seconds(settled, settled=True) == predictor.seconds(plan)


@pytest.mark.usefixtures("clock")
def test_what_was_timed_is_predicted_exactly() -> None:
    program = lower(small(), X)
    costs = Costs(threads=1, samples=1, directory=None)
    costs.learn(works(program), Progress())
    assert costs.seconds(works(program)) == pytest.approx(
        [max(1e-10, PER_CYCLE * _estimate(work, 1).cycles) for work in works(program)], rel=1e-9
    )


@pytest.mark.parametrize("filters", [31, 17, 6, 3])
@pytest.mark.usefixtures("clock")
def test_a_constant_ratio_is_found_at_every_size(filters: int) -> None:
    costs = Costs(threads=1, samples=1, directory=None)
    costs.learn(works(lower(small(), X)), Progress())
    program = lower(small(filters), X)
    expected = [max(1e-10, PER_CYCLE * _estimate(work, 1).cycles) for work in works(program)]
    assert costs.seconds(works(program)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("clock")
def test_less_takes_less() -> None:
    report = acf.inspect(models.create("resnet20"), torch.zeros(1, 3, 32, 32))
    model = LatencyModel.of(report, directory=None)
    # All columns may take no longer than half of them: Winograd's transforms.
    for structure, shares in {"filters": (0.0, 0.5, 0.75, 0.9), "columns": (0.0, 0.75, 0.9)}.items():
        seconds = [model.seconds(Plan.uniform(report, **{structure: share})) for share in shares]
        assert seconds == sorted(seconds, reverse=True)
    assert model.seconds() == model.seconds(Plan.dense(report))


@pytest.mark.usefixtures("clock")
def test_weights_come_from_where_there_is_room() -> None:
    assert latency._shares(2**10).tolist() == [1, 0, 0]
    assert latency._shares(2**24).tolist() == [0, 1, 0]
    assert latency._shares(2**30).tolist() == [0, 0, 1]
    for size in (2**21, 2**22 - 1, 3 * 2**23):
        shares = latency._shares(size)
        assert shares.sum() == pytest.approx(1)
        assert (shares >= 0).all()


def test_the_second_time_nothing_is_timed(clock: Clock, tmp_path: Path) -> None:
    report = acf.inspect(small(), X)
    first = LatencyModel.of(report, directory=tmp_path)
    programs = clock.programs
    assert programs > 0
    second = LatencyModel.of(report, directory=tmp_path)
    assert clock.programs == programs
    assert second.predict() == first.predict()
    assert second.path == first.path
    assert first.path is not None
    assert first.path.parent == tmp_path
    LatencyModel.of(acf.inspect(small(64), X), directory=tmp_path)  # the same kinds, larger
    assert programs < clock.programs < 2 * programs
    LatencyModel.of(report, directory=tmp_path, samples=2)  # another file
    assert len(list(tmp_path.iterdir())) == 2


def change(key: str, value: object) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), key: value})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "[]",
        change("format", 0),
        change("machine", {"processor": "another"}),
        change("points", {"[]": [[[1], 1.0]]}),
        change("points", {"[]": [[["a"], 1.0, 1.0, 1.0]]}),
        change("points", {"[]": [[[1], 1.0, float("nan"), 1.0]]}),
        change("points", []),
    ],
)
@pytest.mark.usefixtures("clock")
def test_a_broken_file_is_written_anew(spoil: Callable[[str], str], tmp_path: Path) -> None:
    report, notes = acf.inspect(small(), X), Notes()
    model = LatencyModel.of(report, directory=tmp_path, progress=notes)
    assert notes.notes == []
    assert model.path is not None
    text = model.path.read_text()
    model.path.write_text(spoil(text))
    again = LatencyModel.of(report, directory=tmp_path, progress=notes)
    assert len(notes.notes) == 1
    assert str(model.path) in notes.notes[0]
    assert model.path.read_text() == text
    assert again.predict() == model.predict()


@pytest.mark.usefixtures("clock")
def test_a_place_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    notes = Notes()
    LatencyModel.of(acf.inspect(small(), X), directory=tmp_path / "file", progress=notes)
    assert "cannot be kept" in notes.notes[-1]


def test_the_file_lies_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.cache_directory() == tmp_path / "autocompress_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.cache_directory() == tmp_path / ".cache" / "autocompress_fast"


@pytest.mark.usefixtures("clock")
def test_programs_are_predicted_without_a_report() -> None:
    engine = acf.compile(small(), X, threads=1)
    model = LatencyModel.of(engine, directory=None)
    assert model.seconds() == model.seconds(engine) == model.seconds(engine.program)
    assert model.measure(engine) == pytest.approx(
        REST + sum(PER_CYCLE * _estimate(work, 1).cycles for work in works(engine.program))
    )
    assert "us in all" in str(model.predict())
    with pytest.raises(TypeError, match="of a report"):
        model.predict(Plan.dense(acf.inspect(small(), X)))
    other = acf.compile(nn.Sequential(nn.Conv2d(3, 4, 5)), X, threads=1)
    with pytest.raises(ValueError, match="no conv like that of '0' was timed"):
        model.predict(other)


@pytest.mark.parametrize(("name", "value"), [("threads", 0), ("samples", 0), ("samples", 1.5), ("threads", True)])
def test_numbers_that_make_no_sense(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer, 1 or more"):
        LatencyModel.of(acf.inspect(small(), X), directory=None, **{name: value})


def test_the_real_clock_times_every_step() -> None:
    program = lower(small(), X)
    found = latency.timed(program, 2, 1)
    assert set(found.steps) == {work.steps[-1].output for work in works(program)}
    assert all(seconds >= 0 for seconds in found.steps.values())
    assert found.rest >= 0
