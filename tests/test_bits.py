"""The bits of each layer: patterns, and the search for them under the bytes of a file."""

import itertools
import math

import pytest
import torch
from torch import nn

import autocompress_fast as acf
from autocompress_fast.bits import BitSearch, level_score, middle, numbers, ranges
from autocompress_fast.data import UserBatches
from autocompress_fast.graph import inspect
from autocompress_fast.meter import FileSize
from autocompress_fast.plan import Plan
from autocompress_fast.quantize import LevelConstraint
from autocompress_fast.rates import Action

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(256, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24 * 64, 40), nn.ReLU(), nn.Linear(40, 10)).eval()


MODEL = network()
REPORT = inspect(MODEL, X[:1])
NAMES = [layer.name for layer in REPORT.layers]
SIZE = FileSize(REPORT, {})


def searching(score=lambda _: 0.0, bits=(1, 6), **options) -> BitSearch:
    layers = ranges(bits, options.get("kind", "equal"), NAMES)
    return BitSearch(REPORT, score, layers=layers, size=SIZE, plan=Plan.dense(REPORT), **options)


def test_the_last_pattern_that_means_a_layer_counts():
    names = ["stem", "body.0", "body.1", "head"]
    assert ranges(4, "equal", names) == dict.fromkeys(names, (4, 4))
    assert ranges((2, 6), "equal", names) == dict.fromkeys(names, (2, 6))
    assert ranges({"body": 3, "*.1": [1, 2]}, "equal", names) == {"body.0": (3, 3), "body.1": (1, 2)}
    assert middle({"a": (2, 6), "b": (1, 2), "c": (3, 3)}) == {"a": 4, "b": 1, "c": 3}


@pytest.mark.parametrize(
    ("bits", "kind", "message"),
    [
        ({"legs": 3}, "equal", "bits: no layer matches 'legs'"),
        ({"0": 9}, "equal", "bits must be an int from 1 to 8, got 9"),
        ((0, 3), "equal", "bits must be an int from 1 to 8, got 0"),
        ((4, 2), "equal", r"\(at least, at most\), got \(4, 2\)"),
        ((1, 2, 3), "equal", r"bits must be an int from 1 to 8, got \(1, 2, 3\)"),
        ((1, 2), "binary", "binary levels have 1 bits, got 2"),
        ({"0": 2.0}, "equal", "bits must be an int"),
        (3, "cubic", "kind must be one of"),
    ],
)
def test_bits_that_no_layer_can_have_are_refused(bits, kind, message):
    with pytest.raises(ValueError, match=message):
        ranges(bits, kind, NAMES)


def test_ternary_weights_count_as_float32():
    assert numbers({"a": 2}, "ternary").values == {}
    assert numbers({"a": 2, "b": 3}, "power").values == {"a": 4, "b": 8}


@pytest.mark.parametrize("bits", [(1, 6), (2, 3), {"0": (1, 8), "6": (2, 4), "8": 3}])
def test_every_candidate_meets_the_bytes_and_uses_them_up(bits):
    """One bit more of any layer would not fit, unless it has as many as it may."""
    random = torch.Generator().manual_seed(3)
    search = searching(bits=bits)
    for _ in range(40):
        departures = torch.randn(len(search.layers), generator=random).tolist()
        chosen = search.constraints(Action(weights=dict(zip(search.layers, departures, strict=True))))
        found = {name: constraint.bits for name, constraint in chosen.items()}
        assert search.bytes_with(found) <= search.bytes
        for name, (low, high) in search.layers.items():
            assert low <= found[name] <= high
            if found[name] < high:
                assert search.bytes_with(found | {name: found[name] + 1}) > search.bytes - 8  # of alignment


def test_bytes_that_cannot_be_met_are_refused():
    least = SIZE.bytes(Plan.dense(REPORT), numbers(dict.fromkeys(NAMES, 2), "equal"))
    with pytest.raises(ValueError, match=f"bytes 1,000 cannot be met: with the fewest bits the file has {least:,}"):
        searching(bits=(2, 4), most=1000)
    with pytest.raises(ValueError, match="no layer whose bits"):
        BitSearch(REPORT, lambda _: 0.0, layers={}, size=SIZE, plan=Plan.dense(REPORT))


def test_it_finds_the_best_of_all():
    """Where bits are worth what a made-up table says, against every combination that meets the bytes."""
    worth = dict(zip(NAMES, (9.0, 1.0, 0.3, 4.0), strict=True))

    def score(constraints):
        return -sum(worth[name] * 4.0**-constraint.bits for name, constraint in constraints.items())

    search = searching(score)
    found = search.run(60)
    every = itertools.product(range(1, 7), repeat=len(NAMES))
    possible = [dict(zip(NAMES, bits, strict=True)) for bits in every]
    best = max(
        score({name: LevelConstraint(number) for name, number in bits.items()})
        for bits in possible
        if search.bytes_with(bits) <= search.bytes
    )
    assert found.score > found.start
    assert found.score >= 1.05 * best


def test_it_goes_on_from_its_trace(tmp_path):
    def score(constraints):
        return -sum((constraint.bits - place) ** 2 for place, constraint in enumerate(constraints.values()))

    whole = searching(score).run(30)
    trace = tmp_path / "bits.jsonl"
    list(itertools.islice(searching(score, trace=trace).steps(30), 13))
    continued = searching(score, trace=trace).run(30)
    assert [(t.action, t.score) for t in continued.trace] == [(t.action, t.score) for t in whole.trace]
    with pytest.raises(ValueError, match="is of a search with another bits, bytes"):
        searching(score, bits=(1, 4), trace=trace).run(30)


def test_the_score_is_that_of_the_network_on_levels():
    y = MODEL(X).argmax(dim=1)
    before = [parameter.clone() for parameter in MODEL.state_dict().values()]
    score = level_score(MODEL, UserBatches([(X, y)]))
    constraints = {"0": LevelConstraint(3), "8": LevelConstraint(2, "power")}
    oracle = network()
    with torch.no_grad():
        for name, constraint in constraints.items():
            weight = oracle.get_submodule(name).weight
            weight.copy_(constraint.project(weight))
        expected = -nn.functional.cross_entropy(oracle(X), y).item()
    for _ in range(2):  # also with what it remembers
        assert math.isclose(score(constraints), expected, rel_tol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, MODEL.state_dict().values(), strict=True))
    whole = score({})
    assert abs(score(dict.fromkeys(NAMES, LevelConstraint(8))) - whole) < 1e-3
    assert abs(score(dict.fromkeys(NAMES, LevelConstraint(1))) - whole) > 1e-3


def test_statistics_are_measured_anew_where_there_is_data():
    batches = [(3 + 2 * X, torch.zeros(len(X), dtype=torch.long))]
    constraints = {"0": LevelConstraint(2)}
    plain = level_score(MODEL, UserBatches(batches))(constraints)
    measured = level_score(MODEL, UserBatches(batches), calibration=batches)(constraints)
    oracle = network()
    with torch.no_grad():
        oracle[0].weight.copy_(LevelConstraint(2).project(oracle[0].weight))
    acf.training.recalibrate(oracle, batches)
    with torch.no_grad():
        expected = -nn.functional.cross_entropy(oracle(batches[0][0]), batches[0][1]).item()
    assert math.isclose(measured, expected, rel_tol=1e-5)
    assert not math.isclose(measured, plain, rel_tol=1e-3)
