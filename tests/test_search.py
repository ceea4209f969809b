"""Simulated annealing over rates: candidates meet the target, runs repeat and go on, worse is accepted as it should."""

from __future__ import annotations

import itertools
import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from autocompress_fast import models
from autocompress_fast.data import UserBatches
from autocompress_fast.graph import inspect
from autocompress_fast.rates import STRUCTURES, Action, Target
from autocompress_fast.search import Search, one_shot, quick_score
from autocompress_fast.unused import unused_paths


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    return inspect(models.create("resnet20"), torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 9, 10)).eval()
    return model, inspect(model, torch.zeros(1, 3, 8, 8))


def towards(report, wanted):
    """A score that is best at one action: minus the squared distance of the weights kept, in logarithms."""
    search = Search(report, Target(params=8), lambda _: 0.0)
    goal = {name: math.log(weights(c)) for name, c in search.constraints(wanted).items()}

    def score(constraints):
        return -sum((math.log(weights(c)) - goal[name]) ** 2 for name, c in constraints.items())

    return score


def weights(constraint):
    return math.prod(constraint.keep) if isinstance(constraint.keep, tuple) else constraint.keep


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("target", ["conv=4", "6x", "macs=3", "conv=5,params=3,macs=4"])
def test_every_candidate_meets_the_target(small, structure, target):
    model, report = small
    search = Search(report, Target.parse(target), lambda _: 0.0, structure=structure)
    random = np.random.default_rng(0)
    for _ in range(10):
        drawn = dict(zip(search.coordinates, random.normal(0, 2, len(search.coordinates)).tolist(), strict=True))
        action = Action(
            {name: v for (kind, name), v in drawn.items() if kind == "weights"},
            {name: v for (kind, name), v in drawn.items() if kind == "filters"},
        )
        counts = report.counts(unused_paths(one_shot(model, report, search.constraints(action)), report))
        assert search.target.met(report.counts(), counts)


def test_candidates_of_tied_layers_meet_the_target(report):
    search = Search(report, Target.parse("conv=4"), lambda _: 0.0)
    random = np.random.default_rng(1)
    model = models.create("resnet20")
    for _ in range(3):
        draw = {
            kind: {n: float(random.normal()) for k, n in search.coordinates if k == kind}
            for kind in ("weights", "filters")
        }
        counts = report.counts(unused_paths(one_shot(model, report, search.constraints(Action(**draw))), report))
        assert search.target.met(report.counts(), counts)


def test_an_action_moves_what_it_names(small):
    _, report = small
    search = Search(report, Target(params=4), lambda _: 0.0)
    plain = search.constraints(Action())
    more = search.constraints(Action(weights={"3": 0.5}))
    assert weights(more["3"]) > weights(plain["3"])
    assert weights(more["6"]) < weights(plain["6"])
    wide = search.constraints(Action(filters={"3": 0.4}))
    assert wide["3"].keep[0] > plain["3"].keep[0]
    assert wide["3"].keep[1] < plain["3"].keep[1]


def test_it_finds_what_it_is_led_to(small):
    _, report = small
    wanted = Action(weights={"0": 0.9, "3": -0.6, "6": 0.3})
    score = towards(report, wanted)
    found = Search(report, Target(params=8), score).run(120)
    assert found.start < -0.05
    assert found.score > 0.05 * found.start
    assert found.score == max(t.score for t in found.trace) == score(found.constraints)
    assert [t.number for t in found.trace] == list(range(1, 121))
    best = -math.inf
    for trial in found.trace:
        best = max(best, trial.score)
        assert trial.best == best


def test_at_temperature_zero_it_is_greedy(small):
    _, report = small
    score = towards(report, Action(weights={"0": 0.9}))
    trace = Search(report, Target(params=8), score, temperature=0, profile=False).run(60).trace
    current = trace[0].score
    for trial in trace[1:]:
        if trial.kind == "restart":
            current = max(t.score for t in trace[: trial.number - 1])
        assert trial.accepted == (trial.score >= current)
        current = trial.score if trial.accepted else current


def test_worse_moves_are_accepted_while_it_is_warm(small):
    _, report = small
    score = towards(report, Action(weights={"0": 0.9}))
    trace = Search(report, Target(params=8), score, temperature=100, profile=True).run(60).trace
    moves = [t for t in trace if t.kind in ("move", "restart")]
    assert sum(t.accepted for t in moves[: len(moves) // 2]) >= 0.9 * (len(moves) // 2)
    assert all(a.temperature > b.temperature > 0 for a, b in itertools.pairwise(moves))


@pytest.mark.parametrize("factor", [2.0**-10, 64.0])
def test_the_scale_of_the_score_does_not_matter(small, factor):
    _, report = small
    score = towards(report, Action(weights={"0": 0.9, "6": -0.5}))
    one = Search(report, Target(params=8), score).run(50)
    other = Search(report, Target(params=8), lambda c: factor * score(c)).run(50)
    assert [t.action for t in one.trace] == [t.action for t in other.trace]
    assert [t.accepted for t in one.trace] == [t.accepted for t in other.trace]
    np.testing.assert_allclose([factor * t.score for t in one.trace], [t.score for t in other.trace], rtol=0)


def test_seeds_differ_and_repeat(small):
    _, report = small
    score = towards(report, Action(weights={"0": 0.9}))
    runs = [Search(report, Target(params=8), score, seed=seed).run(30).trace for seed in (1, 1, 2)]
    assert [t.action for t in runs[0]] == [t.action for t in runs[1]] != [t.action for t in runs[2]]


def test_a_search_that_was_stopped_goes_on(small, tmp_path):
    _, report = small
    score, scored = towards(report, Action(weights={"0": 0.9})), []

    def counted(constraints):
        scored.append(constraints)
        return score(constraints)

    whole = Search(report, Target(params=8), score).run(40)
    path = tmp_path / "trace.jsonl"
    steps = Search(report, Target(params=8), counted, trace=path).steps(40)
    for _ in range(25):
        next(steps)
    steps.close()
    with path.open("a") as file:
        file.write('{"number": 26, "kind": "mo')  # killed while it was writing
    before = len(scored)
    found = Search(report, Target(params=8), counted, trace=path).run(40)
    assert len(scored) <= before + 15
    assert [(t.action, t.score, t.accepted) for t in found.trace] == [
        (t.action, t.score, t.accepted) for t in whole.trace
    ]
    assert found.constraints == whole.constraints
    assert len(path.read_text().splitlines()) == 41
    done = len(scored)
    again = Search(report, Target(params=8), counted, trace=path).run(40)
    assert len(scored) == done
    assert again.constraints == found.constraints


def test_a_search_that_is_killed_as_it_begins_leaves_no_trace_without_a_head(small, tmp_path, monkeypatch):
    _, report = small
    path = tmp_path / "trace.jsonl"

    def killed(*_):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(InterruptedError):
            Search(report, Target(params=8), lambda _: 0.0, trace=path).run(5)
    assert not path.exists()
    assert len(Search(report, Target(params=8), lambda _: 0.0, trace=path).run(5).trace) == 5


def test_the_trace_of_another_search_is_refused(small, tmp_path):
    _, report = small
    path = tmp_path / "trace.jsonl"
    Search(report, Target(params=8), lambda _: 0.0, trace=path).run(5)
    content = path.read_text()
    for search, words in (
        (Search(report, Target(params=9), lambda _: 0.0, trace=path), "another target"),
        (Search(report, Target(params=8), lambda _: 0.0, trace=path, seed=3), "another seed"),
        (Search(report, Target(params=8), lambda _: 0.0, trace=path, structure="column"), "another structure"),
    ):
        with pytest.raises(ValueError, match=words):
            search.run(5)
    with pytest.raises(ValueError, match="another budget"):
        Search(report, Target(params=8), lambda _: 0.0, trace=path).run(6)
    assert path.read_text() == content
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="no trace of a search"):
        Search(report, Target(params=8), lambda _: 0.0, trace=path).run(5)
    assert path.read_text() == "nonsense\n"


def test_minutes_end_a_search(small):
    _, report = small
    found = Search(report, Target(params=8), lambda _: 0.0).run(minutes=0.001)
    assert 1 <= len(found.trace) < 1000


def test_bad_input(small):
    _, report = small
    search = Search(report, Target(params=8), lambda _: 0.0)
    for budget, words in (({}, "neither"), ({"evaluations": 0}, "more than 0, got 0"), ({"minutes": -1}, "got -1")):
        with pytest.raises(ValueError, match=words):
            search.run(**budget)
    with pytest.raises(ValueError, match="temperature must be 0 or more, got -1"):
        Search(report, Target(params=8), lambda _: 0.0, temperature=-1)
    with pytest.raises(ValueError, match="structure must be one of"):
        Search(report, Target(params=8), lambda _: 0.0, structure="rows")
    with pytest.raises(ValueError, match="cannot be met"):
        Search(report, Target(params=1e6), lambda _: 0.0)
    with pytest.raises(ValueError, match="the score of evaluation 1 is NaN"):
        Search(report, Target(params=8), lambda _: math.nan).run(3)


def test_the_trace_is_json_lines(small, tmp_path):
    _, report = small
    path = tmp_path / "sub" / "trace.jsonl"
    found = Search(report, Target(params=8), towards(report, Action(weights={"0": 0.5})), trace=path).run(20)
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["target"] == {"params": 8.0}
    assert len(lines) == 20
    assert [line["score"] for line in lines] == [t.score for t in found.trace]


def test_quick_scores(small):
    model, report = small
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, 8, 8, generator=random)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    batches = UserBatches([(x[:100], y[:100]), (x[100:], y[100:])])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    mild, harsh = (Search(report, Target(params=rate), lambda _: 0.0).constraints(Action()) for rate in (1.3, 30))
    for measure in ("accuracy", "loss"):
        score = quick_score(model, report, batches, measure=measure)
        assert score(mild) > score(harsh)
        assert score(mild) == score(mild)
    plain = quick_score(model, report, batches, measure="loss")
    calibrated = quick_score(model, report, batches, calibration=batches.epoch(0), measure="loss")
    assert calibrated(mild) != plain(mild)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="measure must be accuracy or loss, got 'speed'"):
        quick_score(model, report, batches, measure="speed")
