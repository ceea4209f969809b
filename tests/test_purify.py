"""Purification by limits: what goes is small, the score stays within the tolerance, and nothing else changes."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import autocompress_fast as acf
from autocompress_fast import models
from autocompress_fast.compact import compact
from autocompress_fast.graph import Report, inspect
from autocompress_fast.plan import MaskedParameters, Plan, mask
from autocompress_fast.progress import Progress
from autocompress_fast.purify import Purified, purify
from autocompress_fast.unused import unused_paths

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """Two tied layers, a free one between them, and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 10, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(10)
        self.outer = nn.Conv2d(10, 12, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(12, 8, 3, groups=2, bias=False)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.inner_norm(self.inner(x)))
        return self.last(torch.relu(self.grouped(x + self.outer(y))).mean((2, 3)))


def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual().eval()
    for norm in (model.norm, model.inner_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.2, 0.2)
    return model


def closeness(model: nn.Module, x: torch.Tensor = X) -> Callable[[nn.Module], float]:
    """A score: 0 for what puts out the same as `model`, falling with the largest difference, in percent."""
    with torch.no_grad():
        expected = model(x)

    @torch.no_grad()
    def score(net: nn.Module) -> float:
        return -100 * float((net(x) - expected).abs().max() / expected.abs().max())

    return score


def check(purified: Purified, report: Report, plan: Plan, x: torch.Tensor = X) -> None:
    """What always holds."""
    for name, layer in purified.plan.items():
        assert not (layer.mask() & ~plan[name].mask()).any(), f"{name} has weights that the plan did not keep"
    assert purified.before == report.counts(plan)
    assert purified.unused == report.counts(unused_paths(plan, report))
    assert purified.after == report.counts(purified.plan)
    assert purified.unused.params - sum(step.weights for step in purified.steps) == purified.after.params
    kept = dict.fromkeys(("filters", "columns"), 0)
    for name, layer in unused_paths(plan, report).items():
        kept["filters"] += int(layer.filters.sum() - purified.plan[name].filters.sum())
        kept["columns"] += int(layer.columns.sum() - purified.plan[name].columns.sum())
    assert kept == {what: sum(getattr(step, what) for step in purified.steps) for what in kept}
    scores = [step.score for step in purified.steps]
    assert [step.score_before for step in purified.steps][1:] == scores[:-1] or len(purified.scores) > 2
    text = str(purified)
    assert f"{len(purified.steps)} limits found with {purified.evaluations} evaluations" in text
    assert all(f"{step.weights:,}" in text for step in purified.steps if step.weights)
    assert json.loads(json.dumps(purified.to_json()))["after"]["params"] == purified.after.params
    assert purified.unused.macs - sum(step.macs for step in purified.steps) == purified.after.macs
    for name, layer in purified.plan.items():
        assert not purified.model.get_submodule(name).weight[~torch.from_numpy(layer.weight_mask())].any()
    small = acf.compact(purified.model, purified.plan, x[:2], report=report)
    with torch.no_grad():
        torch.testing.assert_close(small.model(x), purified.model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("filters", [0.0, 0.4])
def test_the_score_stays_within_the_tolerance(tolerance: float, filters: float) -> None:
    model = residual()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = inspect(model, X[:2])
    plan = Plan.uniform(report, filters=filters)
    score = closeness(mask(model, plan))
    purified = purify(model, score, X[:2], plan=plan, tolerance=tolerance)
    check(purified, report, plan)
    assert purified.scores == pytest.approx((0.0, score(purified.model)))
    assert purified.scores[-1] >= -tolerance
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} of the model given has changed"
    if tolerance == 10:
        assert purified.after.params < 0.98 * purified.unused.params


def test_what_hardly_contributes_goes_and_nothing_else() -> None:
    model = residual()
    dead_filters, dead_columns = [1, 4, 7, 10], [0, 27, 53]  # the grouped layer ties i to i + 6
    with torch.no_grad():
        for weight in (model.stem.weight, model.outer.weight):  # tied: both must be small
            weight[dead_filters] *= 1e-6
        model.norm.bias[dead_filters] = 0
        model.stem.weight[[2, 8]] *= 1e-6  # tied to what is not small
        model.inner.weight.flatten(1)[:, dead_columns] *= 1e-6
    report = inspect(model, X[:2])
    purified = purify(model, closeness(model), X[:2], tolerance=0.01, evaluations=10_000, report=report)
    check(purified, report, Plan.dense(report))
    assert np.flatnonzero(~purified.plan["stem"].filters).tolist() == dead_filters
    assert np.flatnonzero(~purified.plan["outer"].filters).tolist() == dead_filters
    of_dead_channels = {9 * channel + tap for channel in dead_filters for tap in range(9)}
    assert set(np.flatnonzero(~purified.plan["inner"].columns)) == of_dead_channels | set(dead_columns)
    assert purified.plan["inner"].filters.all()


def test_the_limit_is_the_largest_that_bisection_can_tell() -> None:
    """A score that counts filters: any tolerance is used up to one filter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 100), nn.ReLU(), nn.Linear(100, 4))
    x = torch.randn(8, 3)

    def score(net: nn.Module) -> float:
        return float((net[0].weight != 0).any(1).sum())

    for tolerance in (0, 1, 37, 90):
        purified = purify(model, score, x, tolerance=tolerance, evaluations=1000)
        assert int(purified.plan["0"].filters.sum()) == 100 - tolerance


def test_evaluations_are_bounded() -> None:
    model, calls = residual(), []
    score = closeness(model)

    def counted(net: nn.Module) -> float:
        calls.append(1)
        return score(net)

    for evaluations, most in ((1, 2), (30, 3), (10_000, 7)):
        calls.clear()
        purified = purify(model, counted, X[:2], tolerance=1.0, evaluations=evaluations)
        assert purified.evaluations == len(calls) == 1 + sum(step.evaluations for step in purified.steps)
        assert max(step.evaluations for step in purified.steps) <= most


def test_layers_with_most_to_save_come_first_and_no_layer_takes_all() -> None:
    model = residual()
    purified = purify(model, closeness(model), X[:2], tolerance=5.0)
    report = inspect(model, X[:2])
    sizes = [sum(report[name].weights for name in step.layers) for step in purified.steps]
    assert sizes == sorted(sizes, reverse=True)
    spent = np.cumsum(sizes) / sum(sizes)
    for step, share in zip(purified.steps, spent, strict=True):
        assert step.score >= -5.0 * share - 1e-9


def test_rounds_with_retraining_keep_the_masks() -> None:
    model = residual()
    score = closeness(model)
    with torch.no_grad():
        expected = model(X)
    seen: list[Plan] = []

    def retrain(net: nn.Module, plan: Plan) -> None:
        seen.append(plan)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        with MaskedParameters(net, plan, optimizer):
            for _ in range(20):
                optimizer.zero_grad()
                (net(X) - expected).square().mean().backward()
                optimizer.step()

    report = inspect(model, X[:2])
    once = purify(model, score, X[:2], tolerance=20.0, report=report)
    purified = purify(model, score, X[:2], tolerance=20.0, rounds=2, retrain=retrain, report=report)
    assert len(seen) == 2
    assert len(purified.scores) == 3
    assert seen[0] == once.plan
    assert purified.scores[1] > once.scores[1]  # retraining won something back,
    assert purified.after.params < once.after.params  # which the second round could spend
    check(purified, report, Plan.dense(report))
    assert score(purified.model) == pytest.approx(purified.scores[-1])


def test_it_ends_when_nothing_goes_any_more() -> None:
    model = residual()
    purified = purify(model, closeness(model), X[:2], tolerance=0.0, rounds=5)
    assert max(step.round for step in purified.steps) == 1


def test_masks_of_single_weights_are_kept() -> None:
    model = residual()
    generator = np.random.default_rng(0)
    report = inspect(model, X[:2])
    plan = Plan.from_masks(
        {layer.name: generator.random(layer.shape) < 0.5 for layer in report.layers}, groups={"grouped": 2}
    )
    purified = purify(model, closeness(mask(model, plan)), X[:2], plan=plan, tolerance=10.0)
    check(purified, report, plan)
    assert purified.after.params < purified.unused.params


def test_a_zero_padded_shortcut_and_a_transposed_convolution() -> None:
    torch.manual_seed(0)
    resnet = models.create("resnet20").eval()
    x = torch.randn(4, 3, 16, 16)
    report = inspect(resnet, x)
    purified = purify(resnet, closeness(resnet, x), x, tolerance=30.0, evaluations=1, report=report)
    check(purified, report, Plan.dense(report), x)
    upsampling = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    purified = purify(upsampling, closeness(upsampling), X, tolerance=50.0)
    report = inspect(upsampling, X[:2])
    check(purified, report, Plan.dense(report))
    assert purified.after.params < purified.before.params


def test_excluded_layers_stay_as_they_are() -> None:
    model = residual()
    report = inspect(model, X[:2], exclude=["inner", "grouped"])
    purified = purify(model, closeness(model), X[:2], tolerance=20.0, report=report)
    assert all(not {"inner", "grouped"} & set(step.layers) for step in purified.steps)
    for name in ("inner", "grouped"):
        assert purified.plan[name].weights == report[name].weights
    assert purified.after.params < purified.before.params
    dropping = Plan.from_masks({"inner": np.pad(np.ones((9, 12, 3, 3)), [(0, 1)] + 3 * [(0, 0)])})
    with pytest.raises(ValueError, match="drops weights of 'inner', which stays as it is: it is excluded"):
        unused_paths(dropping, report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "tolerance must be 0 or more, got -0.1"),
        ({"tolerance": float("nan")}, "tolerance must be 0 or more, got nan"),
        ({"evaluations": 0}, "evaluations must be 1 or more, got 0"),
        ({"rounds": 0}, "rounds must be 1 or more, got 0"),
    ],
)
def test_bad_options_are_errors(options: dict[str, float], message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=message):
        purify(model, lambda _: 0.0, torch.zeros(1, 2), **options)


def test_a_score_that_is_not_finite_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="score must return a finite number, got nan"):
        purify(model, lambda _: float("nan"), torch.zeros(1, 2))


def network_with_a_constant():
    """A residual block of which one filter is empty but puts out a constant that the output needs."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv, self.norm = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.last = nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, x):
            x = self.first(x)
            return self.last((x + self.norm(self.conv(x))).relu())

    torch.manual_seed(0)
    model = Block().eval()
    with torch.no_grad():
        model.conv.weight[1] = 0
        model.conv.bias[1] = 0
        model.norm.bias[1] = 3.0
    x = torch.randn(2, 2, 6, 6)
    weights = np.ones((4, 4, 3, 3))
    weights[1] = 0
    return model, x, Plan.from_masks({"conv": weights})


def test_constants_of_empty_filters_that_the_network_needs_stay():
    model, x, plan = network_with_a_constant()
    with torch.no_grad():
        expected = model(x)
    notes = []

    class Told(Progress):
        def note(self, text):
            notes.append(text)

    result = purify(
        model, lambda net: -float((net(x) - expected).abs().max()), x, plan=plan, tolerance=1e-3, progress=Told()
    )
    assert result.scores[0] == 0
    assert result.scores[-1] >= -1e-3
    assert any("constants" in note for note in notes)


def test_the_plan_of_a_compacted_network_keeps_what_was_tied_to_empty_filters_at_zero():
    model, x, plan = network_with_a_constant()
    report = inspect(model, x)
    small = compact(model, plan.tied(report), x, columns=False)
    dim, kept = small.plan.parameters["norm.bias"]
    assert (dim, kept.tolist()) == (0, [True, False, True, True])
    optimizer = torch.optim.SGD(small.model.parameters(), lr=1.0)
    with MaskedParameters(small.model, small.plan, optimizer):
        small.model(x).square().sum().backward()
        optimizer.step()
    assert (small.model.norm.bias != 0).tolist() == [True, False, True, True]
    untied = compact(model, plan, x, columns=False)
    assert "norm.bias" not in untied.plan.parameters
    assert untied.model.norm.bias[1] == 3
