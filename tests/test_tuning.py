"""Which way of computing a layer is taken, and what is kept of it. Times that decide something are made up."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import autocompress_fast as acf
from autocompress_fast.engine import tuning
from autocompress_fast.engine.native import NativeExecutor
from autocompress_fast.engine.program import validate
from autocompress_fast.engine.reference import Reference
from autocompress_fast.engine.tuning import WAYS, Network, tuned

SHAPE = (6, 9, 10)
DIRECT = ["filters_in_lanes", "pixels_in_lanes"]


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    layers = nn.Conv2d(6, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 9, 3, stride=2), nn.Flatten(), nn.Linear(144, 5)
    return acf.compile(nn.Sequential(*layers).eval(), torch.zeros(1, *SHAPE), threads=1)


def network(engine, samples=1, threads=1, precision="float32"):
    return Network(engine.program, validate(engine.program), threads, precision, samples)


class Times:
    """In place of a profile: every layer takes as long as `taken` says of its way, and all else takes `mixed`."""

    def __init__(self, monkeypatch, samples=1, mixed=1.0, **taken):
        self.samples, self.mixed, self.taken, self.rounds = samples, mixed, taken, []
        monkeypatch.setattr(tuning, "_profile", self)

    def __call__(self, executor, inputs, rounds):
        assert [x.shape[0] for x in inputs] == [self.samples] * len(inputs)
        self.rounds.append(rounds)
        return np.tile([self.taken.get(way, self.mixed) for _, way in executor.ways(self.samples)], (rounds, 1))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("samples", [1, 7])
def test_every_way_computes_the_same(engine, samples):
    infos = validate(engine.program)
    x = np.random.default_rng(0).standard_normal((samples, *SHAPE), np.float32)
    (expected,) = Reference(engine.program, infos).run([x])
    seen = set()
    for way in WAYS:
        executor = NativeExecutor(engine.program, infos, 1, ways={(i, 0): way for i in range(4)})
        made = [way for _, way in executor.ways(samples)]
        seen.update(made)
        assert made[0] == way or way in ("narrow", "winograd_filters_in_lanes")
        (found,) = executor.run([x])
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert {*WAYS[:3], None} <= seen <= {*WAYS[:4], None}


def test_a_way_is_that_of_its_number_of_samples(engine):
    infos = validate(engine.program)
    free = NativeExecutor(engine.program, infos, 1)
    executor = NativeExecutor(engine.program, infos, 1, ways={(0, 2): "pixels_in_lanes", (0, 0): "filters_in_lanes"})
    assert [executor.ways(samples)[0][1] for samples in (1, 2, 3)] == [DIRECT[0], DIRECT[1], DIRECT[0]]
    assert [executor.ways(n)[1:] for n in (1, 2)] == [free.ways(n)[1:] for n in (1, 2)]


def test_refused_by_the_network(engine):
    built = NativeExecutor(engine.program, validate(engine.program), 1).network
    with pytest.raises(ValueError, match="steps are numbered from 0 to 4, got 4"):
        built.prefer(4, 1, "pixels_in_lanes")
    with pytest.raises(ValueError, match="the number of samples must be at least 0, got -1"):
        built.prefer(0, -1, "pixels_in_lanes")
    with pytest.raises(ValueError, match="unknown way 'by_hand'"):
        built.prefer(0, 1, "by_hand")
    built.prefer(0, 1, "pixels_in_lanes")
    assert built.ways(1)[0] == "pixels_in_lanes"
    built.prefer(0, 1, None)
    assert built.ways(1) == NativeExecutor(engine.program, validate(engine.program), 1).network.ways(1)


@pytest.mark.parametrize("samples", [1, 13])
@pytest.mark.parametrize("quickest", DIRECT)
def test_every_layer_gets_the_quickest(engine, monkeypatch, quickest, samples):
    Times(monkeypatch, samples, **{quickest: 0.1})
    found = tuned(network(engine, samples), 0.0, None)
    assert [choice.chosen for choice in found.choices] == [quickest] * 3
    assert [choice.name for choice in found.choices] == ["0", "2", "4"]
    assert found.samples == samples
    executor = network(engine, samples).executor(found.ways)
    assert [way for _, way in executor.ways(samples)] == [quickest, quickest, None, quickest]
    changed = [c.estimated for c in found.choices if c.estimated != quickest]
    assert len({operation for operation, _ in found.ways}) == len(changed)
    assert found.before == pytest.approx(1 + 0.1 * (3 - len(changed)) + len(changed))
    assert found.after == pytest.approx(1.3)
    assert f"{1e6 * found.after:.1f}" in str(found).splitlines()[-1]


def test_the_remainder_of_a_batch_has_the_same_ways(engine, monkeypatch):
    Times(monkeypatch, 7, pixels_in_lanes=0.1)
    several = network(engine, 7)
    monkeypatch.setattr("autocompress_fast.engine.native._traffic", lambda steps, part: abs(part - 2) + len(steps))
    sizes = several.executor({}).ways(7)[0][0]
    assert sizes == (2, 1)
    found = tuned(several, 0.0, None)
    assert {samples for _, samples in found.ways} == {2, 1}


def test_a_little_quicker_is_no_reason(engine, monkeypatch):
    estimated = {way for _, way in network(engine).executor({}).ways(1)}
    Times(monkeypatch, **{way: 0.98 for way in WAYS if way not in estimated})
    found = tuned(network(engine), 0.0, None)
    assert found.ways == {}
    assert all(choice.chosen == choice.estimated for choice in found.choices)
    assert found.before == found.after


def test_what_is_not_quicker_together_is_not_taken(engine, monkeypatch):
    times = Times(monkeypatch, pixels_in_lanes=0.1)
    monkeypatch.setattr(tuning, "_in_turns", lambda *_: (3.0, 3.1))
    found = tuned(network(engine), 0.0, None)
    assert found.ways == {}
    assert (found.before, found.after) == (3.0, 3.0)
    assert set(times.rounds) == {tuning.LEAST_ROUNDS}


def test_time_decides_the_rounds(engine, monkeypatch):
    times = Times(monkeypatch)
    tuned(network(engine), 1e6, None)
    assert set(times.rounds) == {tuning.MOST_ROUNDS}


def test_the_second_time_nothing_is_measured(engine, monkeypatch, tmp_path):
    Times(monkeypatch, pixels_in_lanes=0.1)
    first = tuned(network(engine), 0.0, tmp_path / "new")
    monkeypatch.setattr(tuning, "_measured", None)
    assert tuned(network(engine), 0.0, tmp_path / "new") == first
    for other in (network(engine, 2), network(engine, threads=2), network(engine, precision="bfloat16")):
        with pytest.raises(TypeError):  # it is measured
            tuned(other, 0.0, tmp_path / "new")


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept.clear(),
        lambda kept: kept["ways"].append([0, 1, "by_hand"]),
        lambda kept: kept["ways"].append([9, 1, "pixels_in_lanes"]),
        lambda kept: kept["ways"].append([0, -1, "pixels_in_lanes"]),
        lambda kept: kept["ways"].append([0, 1.5, "pixels_in_lanes"]),
        lambda kept: kept["ways"].append([0, 2**70, "pixels_in_lanes"]),
        lambda kept: kept.update(seconds=[1]),
        lambda kept: kept.update(choices=[["0", "a", "b", 3]]),
        lambda kept: kept.update(choices=[["0", "a", "b", {"a": "soon"}]]),
        lambda kept: kept.update(choices=[["0", "a", "b", {"a": 1}]]),
    ],
)
def test_a_file_that_cannot_be_used_is_written_anew(engine, monkeypatch, tmp_path, change):
    Times(monkeypatch, pixels_in_lanes=0.1)
    first = tuned(network(engine), 0.0, tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    kept = json.loads(good)
    change(kept)
    for content in (json.dumps(kept).encode(), good[:-3], b""):
        path.write_bytes(content)
        assert tuned(network(engine), 0.0, tmp_path) == first
        assert path.read_bytes() == good


def test_a_place_that_cannot_be_written_costs_only_time(engine, monkeypatch, tmp_path):
    Times(monkeypatch, pixels_in_lanes=0.1)
    (tmp_path / "file").write_text("")
    assert tuned(network(engine), 0.0, tmp_path / "file").ways


def test_an_engine_computes_as_it_was_tuned(monkeypatch, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(6, 20, 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(3, *SHAPE)
    made = acf.compile(model, x, threads=1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for samples, way in ((1, "pixels_in_lanes"), (3, "filters_in_lanes")):
        Times(monkeypatch, samples, **{way: 0.1})
        assert made.tune(samples, seconds=0).choices[0].chosen == way
    assert [made._executor.ways(samples)[0][1] for samples in (1, 3)] == DIRECT[::-1]
    torch.testing.assert_close(made(x), model(x).detach(), atol=1e-4, rtol=1e-4)
    assert len(list((tmp_path / "autocompress_fast").glob("tuned-*.json"))) == 2


def test_really_measured(engine):
    made = acf.Engine(engine.program, threads=2)
    found = made.tune(2, seconds=0, directory=None)
    for choice in found.choices:
        assert choice.chosen in choice.seconds
        assert choice.estimated in choice.seconds
        assert all(seconds > 0 for seconds in choice.seconds.values())
    assert 0 < found.after <= found.before


def test_wrong_arguments(engine):
    with pytest.raises(ValueError, match="samples must be 1 or more, not 0"):
        engine.tune(0)
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds must be 0 or more, and finite"):
            engine.tune(seconds=seconds)


def test_a_layer_of_fewer_bits_is_one_of_the_ways(engine):
    if not acf._core.narrow_units("bfloat16"):
        pytest.skip("no products of bfloat16 here")
    infos = validate(engine.program)
    for way in ("narrow", "pixels_in_lanes"):
        executor = NativeExecutor(engine.program, infos, 1, "bfloat16", {(0, 0): way})
        assert executor.ways(1)[0][1] == way
