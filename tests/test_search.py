"""Simulated annealing over rates: candidates meet the target, runs repeat and go on, worse is accepted as it should."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress_fast import models, training
from autocompress_fast._workers import Workers
from autocompress_fast.compact import compact
from autocompress_fast.data import UserBatches
from autocompress_fast.graph import inspect
from autocompress_fast.rates import STRUCTURES, Action, Target
from autocompress_fast.search import Search, _Regression, one_shot, quick_score
from autocompress_fast.training import Evaluation, Trainer, TrainingConfig
from autocompress_fast.unused import unused_paths

pytestmark = pytest.mark.usefixtures("one_thread")


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
    trace = Search(report, Target(params=8), score, temperature=0).run(60).trace
    current = trace[0].score
    for trial in trace[1:]:
        if trial.kind == "restart":
            current = max(t.score for t in trace[: trial.number - 1])
        assert trial.accepted == (trial.score >= current)
        current = trial.score if trial.accepted else current


def test_worse_moves_are_accepted_while_it_is_warm(small):
    _, report = small
    score = towards(report, Action(weights={"0": 0.9}))
    trace = Search(report, Target(params=8), score, temperature=100).run(60).trace
    moves = [t for t in trace if t.kind in ("move", "restart")]
    assert sum(t.accepted for t in moves[: len(moves) // 2]) >= 0.9 * (len(moves) // 2)
    assert all(a.temperature >= b.temperature > 0 for a, b in itertools.pairwise(moves))
    assert moves[0].temperature > 2 * moves[-1].temperature


def test_what_was_found_before_is_tried_after_experience(small):
    _, report = small
    wanted = Action({"0": 1.0, "3": -0.5}, {"0": -0.7, "gone": 9.0})
    found = Search(report, Target(params=8), towards(report, wanted), before=wanted).run(8)
    assert [trial.kind for trial in found.trace[:2]] == ["start", "departure"]
    tried = found.trace[1].action
    assert {k: v for k, v in tried.weights.items() if v} == wanted.weights
    assert {k: v for k, v in tried.filters.items() if v} == {"0": -0.7}  # of layers that are still there
    assert found.score == found.trace[1].score == 0.0
    with pytest.raises(TypeError, match=r"before must be an Action, such as Found\.action, got Found"):
        Search(report, Target(params=8), lambda _: 0.0, before=found)
    with pytest.raises(ValueError, match="before must be of finite numbers, got nan for '3'"):
        Search(report, Target(params=8), lambda _: 0.0, before=Action({"0": 1.0, "3": math.nan}))


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
        (Search(report, Target(params=8), lambda _: 0.0, trace=path, before=Action({"0": 0.5})), "another before"),
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


@pytest.fixture(scope="module")
def learned(small):
    """A network that has learned something, its report, data, and constraints under which it forgets most of it."""
    model = copy.deepcopy(small[0])
    random = torch.Generator().manual_seed(0)
    y = torch.arange(256) % 10
    x = torch.randn(10, 3, 8, 8, generator=random)[y] + torch.randn(256, 3, 8, 8, generator=random)
    batches = UserBatches(list(zip(x.split(64), y.split(64), strict=True)))
    Trainer(model, batches, TrainingConfig(15, lr=0.02)).run()
    report = inspect(model, x[:1])
    return model.eval(), report, batches, Search(report, Target(params=6), lambda _: 0.0).constraints(Action())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_of_retraining_mend_what_pruning_breaks(learned, optimizer):
    model, report, batches, constraints = learned
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    config = TrainingConfig(1, optimizer=optimizer, lr=0.02 if optimizer == "sgd" else 3e-3, weight_decay=0.0)
    options = {"calibration": list(batches.epoch(0)), "train": batches, "training": config, "measure": "loss"}
    scores = [quick_score(model, report, batches, retrain_steps=n, **options)(constraints) for n in (0, 8, 40)]
    assert scores[0] < scores[1] - 0.1 < scores[2] - 0.2
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]


def test_the_score_after_steps_is_that_of_a_network_pruned_so(learned, monkeypatch):
    model, report, batches, constraints = learned
    seen = []
    monkeypatch.setattr(training, "evaluate", lambda pruned, *_, **__: seen.append(pruned) or Evaluation(1.0, 2.0, 3))
    score = quick_score(model, report, batches, train=batches, retrain_steps=6, measure="loss")
    assert score(constraints) == -2.0
    plan, (pruned,) = one_shot(model, report, constraints), seen
    small = compact(model, plan, torch.zeros(1, 3, 8, 8), columns=False)
    for name, layer in small.plan.items():
        weight, before = (network.get_submodule(name).weight.detach().numpy() for network in (pruned, small.model))
        assert not weight[~layer.mask()].any()
        assert (weight != before)[layer.mask()].any()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_candidates_of_every_structure_are_trained(learned, structure):
    model, report, batches, _ = learned
    for rate in (1.5, 20):
        constraints = Search(report, Target(params=rate), lambda _: 0.0, structure=structure).constraints(Action())
        scores = [
            quick_score(model, report, batches, train=batches, retrain_steps=steps, measure="loss")(constraints)
            for steps in (0, 30)
        ]
        assert scores[0] < scores[1] < 0


def test_the_score_after_steps_repeats_whatever_was_scored_before(learned):
    model, report, batches, constraints = learned
    other = Search(report, Target(params=2), lambda _: 0.0).constraints(Action())
    data = torch.utils.data.TensorDataset(torch.cat([x for x, _ in batches.epoch(0)]), torch.arange(256) % 2)
    shuffled = UserBatches(torch.utils.data.DataLoader(data, 64, shuffle=True))
    dropped = nn.Sequential(model, nn.Dropout(0.5)).eval()
    report = inspect(dropped, torch.zeros(1, 3, 8, 8))
    constraints, other = ({f"0.{name}": one for name, one in c.items()} for c in (constraints, other))
    options = {"train": shuffled, "retrain_steps": 6, "measure": "loss"}  # more than an epoch has
    score = quick_score(dropped, report, batches, **options)
    before = torch.random.get_rng_state()
    expected = score(constraints)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert score(other) != expected
    torch.rand(3)
    assert score(constraints) == expected
    assert quick_score(dropped, report, batches, **options)(constraints) == expected
    assert quick_score(dropped, report, batches, **options | {"retrain_steps": 5})(constraints) != expected


def test_a_retraining_that_diverges_is_worth_nothing(learned):
    model, report, batches, constraints = learned
    config = TrainingConfig(1, lr=1e30, schedule="constant", warmup=0.0)
    score = quick_score(model, report, batches, train=batches, retrain_steps=8, training=config)
    assert score(constraints) == -math.inf
    assert Search(report, Target(params=6), score).run(3).score == -math.inf


def test_steps_of_retraining_are_checked(learned):
    model, report, batches, _ = learned
    for steps in (-1, 2.5, True, "many"):
        with pytest.raises(ValueError, match=rf"^retrain_steps must be an integer of 0 or more, got {steps!r}$"):
            quick_score(model, report, batches, train=batches, retrain_steps=steps)
    with pytest.raises(ValueError, match=r"^retrain_steps=5 needs batches to train on, got train=None$"):
        quick_score(model, report, batches, retrain_steps=5)
    with pytest.raises(ValueError, match=r"^retrain_steps=5 needs batches to train on, train has none$"):
        quick_score(model, report, batches, train=UserBatches([]), retrain_steps=5)


@pytest.mark.parametrize("done", [1, 5, 9])
def test_a_search_with_steps_of_retraining_goes_on_and_workers_find_the_same(learned, tmp_path, done):
    model, report, batches, _ = learned
    path = tmp_path / "trace.jsonl"

    def search(steps, **options):
        score = quick_score(model, report, batches, train=batches, retrain_steps=steps, measure="loss")
        return Search(report, Target(params=6), score, trace=path, **options).run(12)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers have
    try:
        whole = search(4)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[: done + 1]))
        again = search(4, workers=2)
    finally:
        torch.set_num_threads(threads)
    assert outcome(again) == outcome(whole)
    assert whole.score > whole.start
    for steps in (0, 5):
        with pytest.raises(ValueError, match="is of a search with another score; choose another file"):
            search(steps)


# ---- the regression ----


def test_the_regression_interpolates_and_knows_what_it_does_not_know():
    random = np.random.default_rng(0)
    points = random.uniform(-1, 1, (40, 3))
    scores = points @ [1.0, -2.0, 0.5]
    regression = _Regression(points, scores)
    between = random.uniform(-1, 1, (50, 3))
    (expected,) = regression.expected(between, 0.0, 1, random)
    assert np.corrcoef(expected, between @ [1.0, -2.0, 0.5])[0, 1] > 0.98
    (mean,) = regression.expected(between, 0.0, 1, random)
    np.testing.assert_array_equal(expected, mean)
    far = np.concatenate([points[:5], points[:5] + 50])
    drawn = regression.expected(far, 1.0, 2000, random).std(axis=0)
    assert drawn[:5].max() < 0.5 * drawn[5:].min()


def test_the_regression_sees_the_order_of_scores_alone():
    random = np.random.default_rng(0)
    points = random.standard_normal((20, 2))
    scores = points[:, 0]
    one = _Regression(points, scores).expected(points, 0.0, 1, random)
    other = _Regression(points, np.exp(5 * scores)).expected(points, 0.0, 1, random)
    np.testing.assert_array_equal(one, other)
    lowest = np.where(scores == scores.min(), -math.inf, scores)
    np.testing.assert_array_equal(one, _Regression(points, lowest).expected(points, 0.0, 1, random))
    assert not _Regression(points, np.zeros(20)).expected(points, 0.0, 1, random).any()


def test_it_beats_chance_where_there_are_many_layers(report):
    search = Search(report, Target.parse("conv=4"), lambda _: 0.0)
    random = np.random.default_rng(0)
    names = [name for kind, name in search.coordinates if kind == "weights"]

    def action(scale):
        return Action(dict(zip(names, random.normal(0, scale, len(names)).tolist(), strict=True)))

    goal = {name: math.log(weights(c)) for name, c in search.constraints(action(0.5)).items()}

    def score(constraints):
        return -sum((math.log(weights(c)) - goal[name]) ** 2 for name, c in constraints.items())

    by_chance = max(score(search.constraints(action(0.3))) for _ in range(40))
    found = Search(report, Target.parse("conv=4"), score).run(40)
    assert found.score > max(0.6 * found.start, 0.8 * by_chance)


# ---- workers ----


@dataclass(frozen=True)
class Unsteady:
    """A score that takes now more time, now less."""

    name: str

    def __call__(self, constraints):
        kept = weights(constraints[self.name])
        time.sleep(1e-3 * np.random.default_rng().integers(10))
        return -abs(math.log(kept / 50))


def outcome(found):
    return [(t.number, t.kind, t.action, t.score, t.accepted, t.best) for t in found.trace]


def test_workers_change_nothing(small):
    _, report = small
    one, two, many = (Search(report, Target(params=8), Unsteady("3"), workers=n).run(40) for n in (1, 2, 9))
    assert outcome(one) == outcome(two) == outcome(many)
    assert one.constraints == two.constraints == many.constraints


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batches_are_proposed_together(small, batch):
    _, report = small
    found = Search(report, Target(params=8), Unsteady("3"), batch=batch).run(50)
    assert [t.number for t in found.trace] == list(range(1, 51))
    temperatures = [t.temperature for t in found.trace if t.kind == "move"]
    assert len(set(temperatures)) == math.ceil(len(temperatures) / batch)


@pytest.fixture(scope="module")
def by_two_workers(small, tmp_path_factory):
    """What they have found, and the lines of its trace."""
    path = tmp_path_factory.mktemp("by_two_workers") / "trace.jsonl"
    found = Search(small[1], Target(params=8), Unsteady("3"), workers=2, trace=path).run(40)
    return found, path.read_text().splitlines(keepends=True)


@pytest.mark.parametrize("done", [1, 6, 17, 33])
def test_a_search_goes_on_with_other_workers_anywhere_in_a_batch(small, by_two_workers, tmp_path, done):
    _, report = small
    path, (whole, lines) = tmp_path / "trace.jsonl", by_two_workers
    path.write_text("".join(lines[: done + 1]))
    again = Search(report, Target(params=8), Unsteady("3"), trace=path).run(40)
    assert outcome(again) == outcome(whole)
    with pytest.raises(ValueError, match="another batch"):
        Search(report, Target(params=8), Unsteady("3"), batch=5, trace=path).run(40)


def test_networks_are_scored_in_forks_and_in_new_interpreters(small):
    model, report = small
    x = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            batches = UserBatches([(x, model(x).argmax(dim=1))])
        score = quick_score(model, report, batches, calibration=batches.epoch(0), measure="loss")
        rates = [Search(report, Target(params=rate), score).constraints(Action()) for rate in (1.5, 3, 6, 12)]
        expected = [score(constraints) for constraints in rates]
        for method in ("fork", "spawn") if sys.platform == "linux" else ("spawn",):
            with Workers(score, 2, method=method) as workers:
                np.testing.assert_allclose(list(workers.map(rates)), expected, rtol=1e-4)
    finally:
        torch.set_num_threads(threads)


def fails(item):
    if item == "error":
        raise KeyError("the score failed")
    if item == "death":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "exit":
        os._exit(3)
    return item


def test_what_goes_wrong_in_a_worker_is_said():
    with Workers(fails, 2) as workers:
        assert list(workers.map(["a", "b", "c"])) == ["a", "b", "c"]
        with pytest.raises(KeyError, match="the score failed"):
            list(workers.map(["error"]))
    for item, words in (("death", "died by signal SIGKILL; if memory"), ("exit", "died with exit code 3")):
        with Workers(fails, 2) as workers:
            processes = list(workers.processes)
            with pytest.raises(RuntimeError, match=words):
                list(workers.map(["a", "b", item, "c"]))
        assert not any(process.is_alive() for process in processes)
    with pytest.raises(ValueError, match="can be pickled"), Workers(lambda item: item, 2, method="spawn"):
        pass


def test_a_search_whose_worker_died_goes_on(small, tmp_path):
    _, report = small
    path, plain = tmp_path / "trace.jsonl", Unsteady("3")

    def deadly(constraints):
        if len(path.read_text().splitlines()) > 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(constraints)

    with pytest.raises(RuntimeError, match="died by signal SIGKILL"):
        Search(report, Target(params=8), deadly if sys.platform == "linux" else fails, workers=2, trace=path).run(40)
    assert len(path.read_text().splitlines()) >= 13
    found = Search(report, Target(params=8), plain, trace=path).run(40)
    assert outcome(found) == outcome(Search(report, Target(params=8), plain).run(40))


SLEEPER = """
import os, pathlib, signal, sys, time
from autocompress_fast._workers import Workers

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell begins without it

def sleep(item):
    (pathlib.Path(sys.argv[1]) / str(os.getpid())).touch()
    time.sleep(item)

if __name__ == "__main__":
    with Workers(sleep, 2) as workers:
        list(workers.map([float(sys.argv[2])] * 2))
        time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("kill", "seconds"), [(signal.SIGINT, 600), (signal.SIGKILL, 0)])
def test_no_worker_outlives_its_search(tmp_path, kill, seconds):
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SLEEPER)
    pids.mkdir()
    command = [sys.executable, str(script), str(pids), str(seconds)]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    waits_for(lambda: len(list(pids.iterdir())) == 2)
    if kill == signal.SIGINT:
        os.killpg(parent.pid, kill)  # what a terminal does
    else:
        parent.kill()
    _, errors = parent.communicate(timeout=300)
    assert errors.count(b"Traceback") == (kill == signal.SIGINT)
    waits_for(lambda: not any(alive(int(path.name)) for path in pids.iterdir()))


def waits_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_numbers_of_workers_are_checked(small):
    _, report = small
    for options, words in (({"workers": 0}, "workers must be .* got 0"), ({"batch": 2.5}, "batch must be .* got 2.5")):
        with pytest.raises(ValueError, match=words):
            Search(report, Target(params=8), lambda _: 0.0, **options)
