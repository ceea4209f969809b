"""Unused paths: a fixed point that only removes, in both directions, and leaves the function as it is."""

import numpy as np
import pytest
import torch
from torch import nn

from autocompress_fast import models
from autocompress_fast.graph import Report, inspect
from autocompress_fast.plan import LayerPlan, Plan, mask
from autocompress_fast.unused import unused_paths

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = torch.zeros(1, 2, 8, 8)


def chain(*, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=bias),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 9, 7, bias=bias),
        nn.ReLU(),
        nn.Linear(7, 3),
    ).eval()


def random_plan(report: Report, seed: int, *, density: float, elements: bool) -> Plan:
    rng = np.random.default_rng(seed)
    layers = {}
    for layer in report.layers:
        filters = rng.random(layer.shape[0]) < density if layer.filters_prunable else np.ones(layer.shape[0], bool)
        chosen = rng.random(layer.shape) < density if elements else None
        columns = rng.random(layer.columns) < density
        layers[layer.name] = LayerPlan(layer.shape, filters, columns, chosen, layer.groups, layer.transposed)
    return Plan(layers)


def purified(report: Report, seed: int, **options: object) -> tuple[Plan, Plan] | None:
    plan = random_plan(report, seed, **options)
    try:
        return plan, unused_paths(plan, report)
    except ValueError:
        return None


CASES = [(seed, density, elements) for seed in range(12) for density in (0.3, 0.6) for elements in (False, True)]


READERS = {"0": "3", "3": "7", "7": "9"}  # of the chain


def slow_unused_paths(plan: Plan) -> dict[str, np.ndarray]:
    """By the definition, one weight at a time: a weight stays if it is on a path from input to output."""
    masks = {name: layer.mask().reshape(layer.shape[0], -1) for name, layer in plan.items()}
    while True:
        before = sum(int(m.sum()) for m in masks.values())
        for producer, reader in READERS.items():
            reads = masks[reader]
            per_filter = reads.shape[1] // masks[producer].shape[0]
            for p in range(masks[producer].shape[0]):
                read = reads[:, p * per_filter : (p + 1) * per_filter]
                if not masks[producer][p].any():
                    read[:] = False
                if not read.any():
                    masks[producer][p] = False
        if sum(int(m.sum()) for m in masks.values()) == before:
            return masks


@pytest.mark.parametrize("elements", [False, True])
def test_what_is_left_is_on_a_path_and_everything_that_is_on_one_is_left(elements):
    report = inspect(chain(), EXAMPLE)
    left = 0
    for seed in range(40):
        density = 0.25 + 0.01 * seed
        result = purified(report, seed, density=density, elements=elements)
        expected = slow_unused_paths(random_plan(report, seed, density=density, elements=elements))
        if result is None:
            assert any(not m.any() for m in expected.values())
            continue
        left += 1
        for name, m in expected.items():
            np.testing.assert_array_equal(result[1][name].mask().reshape(m.shape), m)
    assert left > 10


def test_it_only_removes_and_a_second_time_removes_nothing():
    report = inspect(chain(), EXAMPLE)
    found = [result for case in CASES if (result := purified(report, case[0], density=case[1], elements=case[2]))]
    assert len(found) > len(CASES) // 3
    removed = 0
    for plan, result in found:
        for name, layer in result.items():
            assert not (layer.mask() & ~plan[name].mask()).any()
        again = unused_paths(result, report)
        assert again == result
        for name, layer in result.items():
            np.testing.assert_array_equal(again[name].filters, layer.filters)
            np.testing.assert_array_equal(again[name].columns, layer.columns)
        removed += plan.weights - result.weights
    assert removed > 0


def test_the_masked_network_computes_the_same():
    model = chain()
    model[1].running_mean.normal_()
    report = inspect(model, EXAMPLE)
    x = torch.randn(4, 2, 8, 8)
    different = 0
    for seed, density, elements in CASES:
        if result := purified(report, seed, density=density, elements=elements):
            plan, less = (p.tied(report) for p in result)
            expected = mask(model, plan)(x)
            torch.testing.assert_close(mask(model, less)(x), expected, rtol=1e-5, atol=1e-6)
            different += less.weights < plan.weights
    assert different > 10


def test_forwards_a_dead_filter_takes_the_columns_that_read_it():
    report = inspect(chain(), EXAMPLE)
    plan = Plan({"0": LayerPlan((5, 2, 3, 3), [1, 0, 1, 1, 1], np.ones(18))})
    result = unused_paths(plan, report)
    np.testing.assert_array_equal(result["3"].columns.reshape(5, 9).all(axis=1), [1, 0, 1, 1, 1])
    assert list(result) == ["0", "3", "7", "9"]
    assert {name: kept.tolist() for name, (_, kept) in result.parameters.items()} == {
        f"1.{part}": [True, False, True, True, True] for part in ("weight", "bias", "running_mean", "running_var")
    }
    assert result["9"].mask().all()


def test_backwards_an_unread_filter_goes_with_all_that_fed_it_alone():
    """The last layer reads three inputs, of which the first is the only one to read filter 5 of "3"."""
    report = inspect(chain(), EXAMPLE)
    reads = np.ones((7, 6, 9), bool)
    reads[:, 5] = False
    reads[0, 5] = True
    plan = Plan(
        {
            "7": LayerPlan.from_mask(reads.reshape(7, 54)),
            "9": LayerPlan((3, 7), np.ones(3), [0, 1, 1, 1, 1, 1, 1]),
        }
    )
    result = unused_paths(plan, report)
    assert result["7"].filters.tolist() == [False] + [True] * 6
    assert result["3"].filters.tolist() == [True] * 5 + [False]
    assert not result["7"].columns.reshape(6, 9)[5].any()


def test_frozen_filters_stay_as_the_plan_has_them():
    """An output keeps its bias even if nothing is left to read for it."""
    report = inspect(chain(), EXAMPLE)
    kept = np.ones((3, 7), bool)
    kept[2] = False
    kept[2, 0] = True
    plan = Plan({"7": LayerPlan((7, 54), [0, 1, 1, 1, 1, 1, 1], np.ones(54)), "9": LayerPlan.from_mask(kept)})
    result = unused_paths(plan, report)
    assert not result["9"].mask()[2].any()
    assert result["9"].filters.all()


def test_paths_inside_a_residual_block_are_lost_there_alone():
    report = inspect(models.create("resnet20", width=4), torch.zeros(1, 3, 32, 32))
    name = "layer1.0.conv1"
    plan = Plan({name: LayerPlan((4, 4, 3, 3), [1, 0, 0, 1], np.ones(36))})
    result = unused_paths(plan, report)
    changed = [layer.name for layer in report.layers if result[layer.name].weights < layer.weights]
    assert changed == [name, "layer1.0.conv2"]


class Net(nn.Module):
    """Layers a, b, ... put together by a function of them and the input."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.run = nn.ModuleDict(layers), forward

    def forward(self, x):
        return self.run(x, *self.layers.values())


def linears(forward, *sizes: tuple[int, int]) -> Report:
    layers = {letter: nn.Linear(*size) for letter, size in zip("abcd", sizes, strict=False)}
    return inspect(Net(forward, **layers), torch.zeros(1, sizes[0][0]))


def filters_of(**kept: tuple[list[int], int]) -> Plan:
    """Layers with these filters of so many inputs each, all columns."""
    return Plan({f"layers.{n}": LayerPlan((len(f), width), f, np.ones(width)) for n, (f, width) in kept.items()})


def test_forwards_a_sum_is_dead_when_all_its_terms_are():
    report = linears(lambda x, a, b, c: c(a(x).relu() + b(x)), (2, 4), (2, 4), (4, 3))
    result = unused_paths(filters_of(a=([0, 0, 1, 1], 2), b=([0, 1, 0, 1], 2)), report)
    assert result["layers.c"].columns.tolist() == [False, True, True, True]
    assert result["layers.a"].filters.tolist() == [False, False, True, True]
    assert result["layers.b"].filters.tolist() == [False, True, False, True]


def test_forwards_a_product_is_dead_when_one_factor_is_and_the_other_goes_too():
    report = linears(lambda x, a, b, c: c(a(x).relu() * b(x)), (2, 4), (2, 4), (4, 3))
    result = unused_paths(filters_of(a=([0, 0, 1, 1], 2), b=([0, 1, 0, 1], 2)), report)
    alive = [False, False, False, True]
    assert result["layers.c"].columns.tolist() == alive
    assert result["layers.a"].filters.tolist() == result["layers.b"].filters.tolist() == alive


def test_forwards_a_product_with_a_gate_that_is_not_zero_lives_by_the_other_factor():
    """A dropped filter before a sigmoid leaves a half, not nothing."""
    report = linears(lambda x, a, b, c: c(a(x).relu() * b(x).sigmoid()), (2, 4), (2, 4), (4, 3))
    result = unused_paths(filters_of(a=([0, 0, 1, 1], 2), b=([0, 1, 0, 1], 2)), report)
    assert result["layers.c"].columns.tolist() == [False, False, True, True]
    assert result["layers.a"].filters.tolist() == [False, False, True, True]
    assert result["layers.b"].filters.tolist() == [False, False, False, True]


def test_backwards_an_unread_sum_takes_all_its_terms():
    report = linears(lambda x, a, b, c: c(a(x).relu() + b(x)), (2, 4), (2, 4), (4, 3))
    plan = Plan({"layers.c": LayerPlan((3, 4), np.ones(3), [1, 0, 1, 1])})
    result = unused_paths(plan, report)
    for name in "ab":
        assert result[f"layers.{name}"].filters.tolist() == [True, False, True, True]


def test_backwards_a_channel_stays_while_one_of_its_readers_needs_it():
    report = linears(lambda x, a, b, c: (b(a(x).relu()), c(a(x).relu())), (2, 4), (4, 3), (4, 3))
    reads = {"b": [1, 0, 0, 1], "c": [1, 0, 1, 0]}
    plan = Plan({f"layers.{n}": LayerPlan((3, 4), np.ones(3), columns) for n, columns in reads.items()})
    result = unused_paths(plan, report)
    assert result["layers.a"].filters.tolist() == [True, False, True, True]
    for name, columns in reads.items():
        assert result[f"layers.{name}"].columns.tolist() == [bool(x) for x in columns]


def test_depthwise_filters_go_with_their_channel_in_both_directions():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    report = inspect(model, EXAMPLE)
    forwards = unused_paths(Plan({"0": LayerPlan((4, 2, 3, 3), [1, 0, 1, 1], np.ones(18))}), report)
    backwards = unused_paths(Plan({"3": LayerPlan((3, 4, 1, 1), np.ones(3), [1, 0, 1, 1])}), report)
    for result in (forwards, backwards):
        assert result["0"].filters.tolist() == result["1"].filters.tolist() == [True, False, True, True]
        assert result["1"].columns.reshape(4, 9).tolist() == [[kept] * 9 for kept in (True, False, True, True)]
        assert result["3"].columns.tolist() == [True, False, True, True]


def branching() -> nn.Module:
    """A residual block with a depthwise layer in it, a concatenation, and transposed and grouped layers."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide, self.narrow = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
            self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(6)
            self.grouped, self.up = nn.Conv2d(6, 4, 3, padding=1, groups=2), nn.ConvTranspose2d(10, 5, 2)
            self.head = nn.Conv2d(5, 3, 1)

        def forward(self, x):
            x = self.stem(x).relu()
            x = self.norm(x + self.narrow(self.depthwise(self.wide(x).relu()).relu())).relu()
            return self.head(self.up(torch.cat([x, self.grouped(x).relu()], 1)).relu())

    torch.manual_seed(0)
    model = Branching().eval()
    for name, value in model.named_parameters():  # no constants that dropped filters leave
        if name.endswith("bias"):
            nn.init.zeros_(value)
    return model


@pytest.mark.parametrize("elements", [False, True])
def test_a_branching_network_computes_the_same_and_loses_nothing_twice(elements):
    model = branching()
    report = inspect(model, EXAMPLE)
    x, different = torch.randn(3, 2, 8, 8), 0
    for seed in range(30):
        if not (result := purified(report, seed, density=0.4 + 0.015 * seed, elements=elements)):
            continue
        plan, less = result
        for name, layer in less.items():
            assert not (layer.mask() & ~plan[name].mask()).any()
        assert unused_paths(less, report) == less
        torch.testing.assert_close(mask(model, less)(x), mask(model, plan.tied(report))(x), rtol=1e-5, atol=1e-6)
        different += less.weights < plan.weights
    assert different > 10


def test_a_layer_that_would_vanish_is_an_error():
    report = inspect(chain(), EXAMPLE)
    nothing = Plan({"3": LayerPlan((6, 5, 3, 3), np.zeros(6), np.ones(45))})
    with pytest.raises(ValueError, match="nothing would be left of layer '3': the network would be a constant"):
        unused_paths(nothing, report)
    disjoint = Plan(
        {
            "0": LayerPlan((5, 2, 3, 3), [1, 1, 0, 0, 0], np.ones(18)),
            "3": LayerPlan((6, 5, 3, 3), np.ones(6), np.repeat([0, 0, 1, 1, 1], 9)),
        }
    )
    with pytest.raises(ValueError, match="nothing would be left of layer"):
        unused_paths(disjoint, report)


def test_a_dead_output_is_an_error_beside_a_layer_that_is_excluded():
    report = inspect(chain(), EXAMPLE, exclude="0")
    nothing = Plan({"7": LayerPlan((7, 54), np.zeros(7), np.ones(54))})
    with pytest.raises(ValueError, match="nothing would be left of layer '7': the network would be a constant"):
        unused_paths(nothing, report)


def test_plans_of_other_networks_are_refused():
    report = inspect(chain(), EXAMPLE)
    with pytest.raises(ValueError, match="names '8', which cannot be pruned here: there is no such layer"):
        unused_paths(Plan({"8": LayerPlan.dense((2, 2))}), report)
    with pytest.raises(ValueError, match=r"of '0' is for a weight \(5, 2\), the model's has \(5, 2, 3, 3\)"):
        unused_paths(Plan({"0": LayerPlan.dense((5, 2))}), report)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    report = inspect(model, torch.zeros(1, 4))
    with pytest.raises(
        ValueError, match="names '0', which cannot be pruned here: its weight is used by other operators"
    ):
        unused_paths(Plan({"0": LayerPlan.dense((4, 4))}), report)
