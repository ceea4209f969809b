"""Compaction: the small network computes what the masked one does, in every kind of chain, or says that it does not."""

import functools
import importlib

import numpy as np
import pytest
import torch
from torch import nn

import autocompress_fast as acf
from autocompress_fast import models
from autocompress_fast.compact import ColumnConv2d, ColumnLinear, EmptyLayer, Kept, compact, restore
from autocompress_fast.graph import Report, inspect
from autocompress_fast.plan import LayerPlan, MaskedParameters, Plan, check_fits, mask
from autocompress_fast.unused import unused_paths

pytestmark = pytest.mark.usefixtures("one_thread")

compaction = importlib.import_module("autocompress_fast.compact")  # the package's attribute is the function


def flat(features: int, outputs: int = 3) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, outputs)]


# name -> (network, shape of the input)
CHAINS = {
    "plain": (lambda: [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), *flat(80)], (2, 8, 8)),
    "no bias": (lambda: [nn.Conv2d(2, 6, 3, bias=False), nn.Conv2d(6, 5, 3, bias=False), *flat(80)], (2, 8, 8)),
    "padding": (
        lambda: [nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), *flat(320)],
        (2, 8, 8),
    ),
    "normalised": (
        lambda: [
            nn.Conv2d(2, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(),
            *flat(80, 7),
            nn.BatchNorm1d(7),
            nn.ReLU(),
            nn.Linear(7, 3),
        ],
        (2, 8, 8),
    ),
    "normalised without affine": (
        lambda: [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 5, 3), *flat(80)],
        (2, 8, 8),
    ),
    "normalised first, padded": (
        lambda: [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 5, 3, padding=1), *flat(180)],
        (2, 8, 8),
    ),
    "sigmoid": (lambda: [nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 5, 3), nn.Sigmoid(), *flat(80)], (2, 8, 8)),
    "sigmoid, reader without bias": (
        lambda: [
            nn.Conv2d(2, 6, 3),
            nn.Sigmoid(),
            nn.Conv2d(6, 5, 3, bias=False),
            nn.Flatten(),
            nn.Linear(80, 3, bias=False),
        ],
        (2, 8, 8),
    ),
    "sigmoid, padded": (
        lambda: [nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 5, 3, padding=1), *flat(180)],
        (2, 8, 8),
    ),
    "sigmoid, padded by reflection": (
        lambda: [nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), *flat(180)],
        (2, 8, 8),
    ),
    "softplus and same": (
        lambda: [nn.Conv2d(2, 6, 3, padding="same"), nn.Softplus(), nn.Conv2d(6, 5, 3, padding="same"), *flat(320)],
        (2, 8, 8),
    ),
    "valid": (lambda: [nn.Conv2d(2, 6, 3, padding="valid"), nn.GELU(), nn.Conv2d(6, 5, 3), *flat(80)], (2, 8, 8)),
    "average pools": (
        lambda: [nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(6, 5, 2), nn.AvgPool2d(2), *flat(5)],
        (2, 8, 8),
    ),
    "average pool that counts its padding": (
        lambda: [nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.AvgPool2d(2, padding=1), nn.Conv2d(6, 5, 2), *flat(45)],
        (2, 8, 8),
    ),
    "adaptive pool": (lambda: [nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(4), *flat(96)], (2, 9, 9)),
    "stride and dilation": (
        lambda: [
            nn.Conv2d(2, 6, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(6, 5, (3, 2), dilation=(1, 2), padding=(1, 0)),
            *flat(75),
        ],
        (2, 11, 11),
    ),
    "linear": (lambda: [nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, 3)], (9,)),
    "one dimension": (
        lambda: [nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Conv1d(6, 5, 3), nn.ReLU(), *flat(40)],
        (2, 12),
    ),
    "three dimensions": (
        lambda: [nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 5, 2), nn.ReLU(), *flat(40)],
        (2, 5, 5, 5),
    ),
    "grouped and depthwise": (
        lambda: [
            nn.Conv2d(2, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, groups=2),
            nn.ReLU(),
            *flat(24),
        ],
        (2, 8, 8),
    ),
}


def network(kind: str, seed: int) -> tuple[nn.Sequential, torch.Tensor]:
    """With random weights, and random statistics and affine parameters in the normalisations."""
    torch.manual_seed(seed)
    layers, shape = CHAINS[kind]
    model = nn.Sequential(*layers())
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model, torch.randn(3, *shape)


def random_plan(report: Report, seed: int, *, elements: bool = False) -> Plan:
    rng = np.random.default_rng(seed)
    layers = {}
    for layer in report.layers:
        filters, columns = np.ones(layer.shape[0], bool), np.ones(layer.columns, bool)
        if layer.filters_prunable:
            filters = rng.random(layer.shape[0]) < (0.8 if elements else 0.6)
            filters[rng.integers(layer.shape[0])] = True
        if layer.columns_prunable:
            columns = rng.random(layer.columns) < 0.7
        chosen = rng.random(layer.shape) < 0.8 if elements and layer.groups == 1 else None
        layers[layer.name] = LayerPlan(layer.shape, filters, columns, chosen, layer.groups)
    return Plan(layers)


def physical(model: nn.Module) -> int:
    return sum(
        m.weight.numel()
        for m in model.modules()
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, ColumnConv2d, ColumnLinear))
    )


def largest(x: torch.Tensor) -> float:
    return float(x.detach().abs().max())


@functools.cache
def report_on(kind: str) -> Report:
    """Of any of the networks of this kind: nothing that the tests use of it depends on the weights."""
    return inspect(*network(kind, 0))


@pytest.mark.parametrize("kind", CHAINS)
def test_the_small_network_computes_what_the_masked_one_does(kind):
    """With the scales and shifts of dropped filters zeroed along (a tied plan), and with constants left by them."""
    report = report_on(kind)
    for seed, (dtype, tolerance, tied, columns) in enumerate(
        [(torch.float32, 1e-4, False, True), (torch.float64, 1e-10, True, True), (torch.float32, 1e-4, True, False)]
    ):
        model, x = network(kind, seed)
        model, x = model.to(dtype), x.to(dtype)
        plan = random_plan(report, seed)
        plan = plan.tied(report) if tied else plan
        small = compact(model, plan, x, columns=columns, report=report if seed else None)
        expected = mask(model, plan).eval()(x)
        torch.testing.assert_close(small.model.eval()(x), expected, rtol=0, atol=tolerance * largest(expected))
        assert small.max_difference <= tolerance
        assert physical(small.model) < physical(model) or not columns


@pytest.mark.parametrize("kind", ["plain", "normalised", "sigmoid", "sigmoid, padded", "linear", "one dimension"])
def test_irregular_plans(kind):
    for seed in (1, 2):
        model, x = network(kind, seed)
        plan = random_plan(report_on(kind), seed, elements=True)
        small = compact(model, plan, x, report=report_on(kind))
        expected = mask(model, plan).eval()(x)
        torch.testing.assert_close(small.model.eval()(x), expected, rtol=0, atol=1e-4 * largest(expected))
        check_fits(small.model, small.plan)
        torch.testing.assert_close(mask(small.model, small.plan)(x), small.model(x))


def test_filters_that_die_with_their_input_leave_their_constant():
    """Filter 0 of the second layer reads channel 0 alone, which is dropped: what it puts out is its bias."""
    model, x = network("sigmoid", 0)
    elements = np.ones((5, 6, 3, 3), bool)
    elements[0, 1:] = False
    plan = Plan(
        {
            "0": LayerPlan((6, 2, 3, 3), [0, 1, 1, 1, 1, 1], np.ones(18)),
            "2": LayerPlan((5, 6, 3, 3), np.ones(5), np.ones(54), elements),
        }
    )
    small = compact(model, plan, x)
    assert small.model[2].weight.shape == (4, 5, 3, 3)
    torch.testing.assert_close(small.model.eval()(x), mask(model, plan).eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "stays"),
    [
        ("padding", False),
        ("sigmoid", False),
        ("sigmoid, padded", True),
        ("sigmoid, padded by reflection", False),
        ("softplus and same", True),
        ("valid", False),
        ("average pools", False),
        ("average pool that counts its padding", True),
        ("adaptive pool", False),
    ],
)
def test_a_filter_stays_only_where_its_constant_cannot_be_folded(kind, stays):
    model, x = network(kind, 0)
    plan = Plan({"0": LayerPlan((6, 2, 3, 3), [1, 1, 0, 1, 0, 1], np.ones(18))})
    small = compact(model, plan, x, report=report_on(kind))
    assert small.model[0].weight.shape[0] == (6 if stays else 4)


def test_a_constant_that_nobody_reads_need_not_be_folded():
    model, x = network("sigmoid, padded", 0)
    plan = Plan(
        {
            "0": LayerPlan((6, 2, 3, 3), [1, 1, 0, 1, 1, 1], np.ones(18)),
            "2": LayerPlan((5, 6, 3, 3), np.ones(5), np.repeat([1, 1, 0, 1, 1, 1], 9)),
        }
    )
    assert compact(model, plan, x).model[0].weight.shape[0] == 5


def test_depthwise_layers_shrink_with_their_channels_and_grouped_ones_stay_alike():
    """Layer "2" has a group per channel of "0"; "6" two groups, of which the i-th filters go together."""
    model, x = network("grouped and depthwise", 0)
    report = report_on("grouped and depthwise")
    channels, grouped = np.array([1, 0, 1, 1, 0, 1], bool), np.array([1, 0, 1, 1, 0, 1], bool)
    plan = Plan(
        {
            "0": LayerPlan((6, 2, 3, 3), channels, np.ones(18)),
            "2": LayerPlan((6, 1, 3, 3), channels, np.repeat(channels, 9), None, 6),
            "6": LayerPlan((6, 4, 3, 3), grouped, np.ones(72), None, 2),
        }
    )
    small = compact(model, plan.tied(report), x)
    kept = torch.tensor(channels)
    depthwise = small.model[2]
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (4, 4, 4)
    assert torch.equal(depthwise.weight, model[2].weight[kept])
    assert small.plan["2"].groups == 4
    assert small.model[0].weight.shape == (4, 2, 3, 3)
    other = small.model[6]
    assert (other.groups, other.in_channels, other.out_channels) == (2, 8, 4)
    assert torch.equal(other.weight, model[6].weight[torch.tensor([0, 2, 3, 5])])
    assert small.model[9].weight.shape == (3, 4 * 4)
    assert small.kind == "module"


def test_filters_that_go_from_one_group_alone_are_zeros_and_masks():
    """The groups stay alike: what the plan drops of one of them only cannot be cut out."""
    model, x = network("grouped and depthwise", 0)
    plan = Plan({"6": LayerPlan((6, 4, 3, 3), [0, 1, 1, 1, 1, 1], np.ones(72), None, 2)})
    small = compact(model, plan, x)
    assert small.model[6].weight.shape == (6, 4, 3, 3)
    assert small.plan["6"].filters.tolist() == [False] + [True] * 5
    assert not small.model[6].weight[0].any()


@pytest.mark.parametrize(("filters", "columns"), [(0.0, 0.5), (0.5, 0.0), (0.4, 0.6)])
def test_mobilenet_is_compacted_with_its_depthwise_layers(filters, columns):
    torch.manual_seed(0)
    model = nn.Sequential(*models.create("mobilenet_v2").features[:4])
    x = torch.randn(2, 3, 16, 16)
    report = inspect(model, x)
    plan = Plan.uniform(report, filters=filters, columns=columns)
    small = compact(model, plan, x, report=report)
    assert small.kind == "module"
    assert report.counts(restore(small.plan, small.kept, report)) == report.counts(unused_paths(plan, report))
    if not columns:
        assert physical(small.model) == report.counts(plan).params
        for layer in report.layers:
            assert small.model.get_submodule(layer.name).weight.shape[0] == plan[layer.name].filters.sum()


def randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def test_residual_networks_lose_tied_filters_together():
    torch.manual_seed(0)
    model, x = randomised(models.create("resnet20", width=8)), torch.randn(2, 3, 32, 32)
    report = inspect(model, x)
    plan = Plan.uniform(report, filters=0.5)
    small = compact(model, plan, x)
    assert small.kind == "graph"  # the shortcuts pad with channels of zeros, so many as their code says
    assert small.max_difference < 1e-4
    assert physical(small.model) == report.counts(plan).params < report.params / 2.5
    tied = report.sets[0].layers
    assert len(tied) == 10
    assert small.model.conv1.weight.shape[0] == plan["conv1"].filters.sum()
    assert small.model.linear.weight.shape == (10, 16)
    assert report.counts(restore(small.plan, small.kept, report)) == report.counts(plan)


@pytest.mark.parametrize("columns", [True, False])
def test_filters_of_a_sum_stay_while_one_of_its_terms_does(columns):
    """Random filters of every layer by itself: what of a sum is alive in one term has its place in all others."""
    torch.manual_seed(0)
    model, x = randomised(models.create("resnet20", width=4)), torch.randn(2, 3, 16, 16)
    report = inspect(model, x)
    for seed in range(2):
        plan = random_plan(report, seed)
        small = compact(model, plan, x, columns=columns, report=report)
        expected = mask(model, plan).eval()(x)
        torch.testing.assert_close(small.model.eval()(x), expected, rtol=0, atol=1e-4 * largest(expected))
        check_fits(small.model, small.plan)
        torch.testing.assert_close(mask(small.model, small.plan).eval()(x), small.model(x))
        assert physical(small.model) < physical(model)
        kept = {name: set(k.filters.tolist()) for name, k in small.kept.items()}
        for block in range(3):  # the three blocks of the first stage add onto what `conv1` puts out
            assert kept[f"layer1.{block}.conv2"] == kept["conv1"]
            assert set(np.flatnonzero(plan[f"layer1.{block}.conv2"].filters)) <= kept["conv1"]


def test_transposed_layers_shrink_at_both_ends():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2))
    model.append(nn.Conv2d(6, 2, 1))
    x = torch.randn(2, 3, 5, 5)
    report = inspect(randomised(model), x)
    plan = Plan.uniform(report, filters=0.5)
    small = compact(model, plan, x)
    assert [tuple(small.model[i].weight.shape) for i in (0, 3, 4)] == [(3, 4, 3, 3), (4, 3, 2, 2), (2, 3, 1, 1)]
    assert (small.model[3].in_channels, small.model[3].out_channels) == (4, 3)
    first, second = (torch.tensor(plan[name].filters) for name in ("0", "3"))
    assert torch.equal(small.model[3].weight, model[3].weight[first][:, second])
    assert small.plan["3"].shape == (3, 4, 2, 2)
    assert small.plan["3"].weight_shape == (4, 3, 2, 2)
    check_fits(small.model, small.plan)
    assert restore(small.plan, small.kept, report) == plan


# Python code with sizes of its own


class Sized(nn.Module):
    """A forward that says how many channels there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)).relu().view(-1, 6 * 36))


def sized() -> tuple[nn.Module, torch.Tensor, Report]:
    torch.manual_seed(0)
    model, x = randomised(Sized()), torch.randn(3, 2, 8, 8)
    return model, x, inspect(model, x)


def test_sizes_in_the_code_make_a_graph_and_the_reason_is_told():
    model, x, report = sized()
    plan = Plan.uniform(report, filters=0.5)
    small = compact(model, plan, x)
    assert small.kind == "graph"
    assert isinstance(small.model, torch.fx.GraphModule)
    assert small.reason.startswith("RuntimeError: shape '[-1, 216]' is invalid for input of size")
    assert type(small.model).__name__ == "Sized"
    assert physical(small.model) == report.counts(plan).params
    expected = mask(model, plan).eval()
    torch.testing.assert_close(small.model.eval()(x), expected(x), rtol=1e-4, atol=1e-5)
    other = torch.randn(7, 2, 8, 8)
    torch.testing.assert_close(small.model(other), expected(other), rtol=1e-4, atol=1e-5)
    assert set(small.model.state_dict()) == set(model.state_dict())
    assert restore(small.plan, small.kept, report) == plan


def test_a_plan_that_cuts_nothing_out_leaves_the_users_own_class():
    model, x, report = sized()
    small = compact(model, Plan.dense(report), x)
    assert (small.kind, small.reason, type(small.model)) == ("module", "", Sized)


def test_a_graph_is_compacted_again():
    model, x, report = sized()
    first = compact(model, Plan.uniform(report, filters=0.5), x, columns=False)
    now = inspect(first.model, x)
    assert [layer.name for layer in now.layers] == ["a", "b"]
    plan = Plan.uniform(now, filters=0.6)
    second = compact(first.model, plan, x)
    expected = mask(first.model, plan).eval()(x)
    torch.testing.assert_close(second.model.eval()(x), expected, rtol=1e-4, atol=1e-5)
    assert second.model.a.weight.shape[0] == 1
    whole = restore(second.plan, {name: first.kept[name].then(kept) for name, kept in second.kept.items()}, report)
    assert torch.equal(second.model.a.weight, model.a.weight[torch.tensor(whole["a"].filters)])


def test_computed_weights_are_plain_in_the_small_network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 6, 3)), nn.ReLU(), nn.Conv2d(6, 5, 3), *flat(80)
    )
    x = torch.randn(3, 2, 8, 8)
    before = state(model)
    report = inspect(model, x)
    assert [layer.name for layer in report.layers] == ["0", "2", "4"]
    plan = Plan.uniform(report, filters=0.5)
    small = compact(model, plan, x)
    assert set(small.model.state_dict()) == {f"{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    filters = torch.tensor(plan["0"].filters)
    torch.testing.assert_close(small.model[0].weight, model[0].weight[filters])
    assert small.model[0].weight.requires_grad
    assert_same_state(model, before)
    assert nn.utils.parametrize.is_parametrized(model[0])


def test_frozen_channels_stay_beside_those_that_go():
    """What the model puts out of its body stays; so does what no operator is understood of."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.free, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            body = self.body(x)
            return body[:, :2], self.head(body.relu() + self.free(x).relu())

    torch.manual_seed(0)
    model, x = Net(), torch.randn(3, 4)
    plan = Plan({name: LayerPlan((6, 4), [1, 0, 1, 0, 0, 1], np.ones(4)) for name in ("body", "free")})
    small = compact(model, plan, x)
    assert small.kept["body"].filters.tolist() == small.kept["free"].filters.tolist() == [0, 1, 2, 5]
    assert isinstance(small.model.head, ColumnLinear)
    assert small.model.head.features == 4
    assert small.model.head.index.tolist() == [0, 2, 3]
    assert small.plan["body"].filters.tolist() == [True, False, True, True]
    assert not small.model.body.weight[1].any()
    torch.testing.assert_close(small.model(x), mask(model, plan)(x))


# Coordinates and sizes


def gather(weight: torch.Tensor, kept: Kept, groups: int) -> torch.Tensor:
    """The rows and columns that are kept; the i-th block of columns belongs to the i-th block of rows."""
    matrix = weight.flatten(1)
    rows, width = matrix.shape[0] // groups, matrix.shape[1]
    blocks = [kept.columns[kept.columns // width == p // rows] % width for p in kept.filters]
    return torch.stack([matrix[p, block] for p, block in zip(kept.filters, blocks, strict=True)])


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("kind", ["plain", "normalised", "stride and dilation", "linear", "grouped and depthwise"])
def test_kept_says_where_the_weights_were_even_after_a_second_compaction(kind, columns):
    report = report_on(kind)
    for seed in range(2):
        model, x = network(kind, seed)
        first = compact(model, random_plan(report, seed).tied(report), x, columns=False, report=report)
        now = inspect(first.model, x)
        plan = random_plan(now, seed + 100).tied(now)
        inside = Plan(
            {name: LayerPlan.from_mask(plan[name].mask() & first.plan[name].mask(), plan[name].groups) for name in plan}
        )
        if any(not layer.mask().any() for layer in inside.values()):
            continue
        second = compact(first.model, inside.tied(now), x, columns=columns, report=now)
        kept = {name: first.kept[name].then(inner) for name, inner in second.kept.items()}
        restored = restore(second.plan, kept, report)
        for name, layer in second.plan.items():
            weight = second.model.get_submodule(name).weight.detach()
            original = model.get_submodule(name).weight.detach()
            gathered = gather(original, kept[name], report[name].groups).reshape(weight.shape)
            assert torch.equal(weight, torch.where(torch.tensor(layer.mask()), gathered, 0))
            whole = torch.where(torch.tensor(restored[name].mask()), original, 0)
            assert torch.equal(weight, gather(whole, kept[name], report[name].groups).reshape(weight.shape))
            assert restored[name].weights == layer.weights
        for norm, producer in NORMS.get(kind, {}).items():
            for part in ("weight", "bias", "running_mean", "running_var"):
                _, tied = restored.parameters.get(f"{norm}.{part}", (0, np.ones(report[producer].shape[0], bool)))
                assert tied.tolist() == restored[producer].filters.tolist()


NORMS = {"normalised": {"1": "0", "4": "3", "10": "9"}}


def test_then_composes():
    outer = Kept(np.array([1, 3, 4]), np.array([0, 2, 5, 6]))
    both = outer.then(Kept(np.array([0, 2]), np.array([1, 3])))
    assert both.filters.tolist() == [1, 4]
    assert both.columns.tolist() == [2, 6]


@pytest.mark.parametrize("kind", ["plain", "normalised", "linear", "stride and dilation"])
def test_the_small_network_has_the_size_that_the_plan_counts(kind):
    report = report_on(kind)
    for seed in range(2):
        model, x = network(kind, seed)
        small = compact(model, random_plan(report, seed).tied(report), x, report=report)
        counts = report.counts(restore(small.plan, small.kept, report))
        assert physical(small.model) == counts.params
        assert small.plan.weights == counts.params
        macs = sum(small.model.get_submodule(layer.name).weight.numel() * layer.outputs for layer in report.layers)
        assert macs == counts.macs


def test_without_columns_dropped_columns_are_zeros_and_masks():
    model, x = network("plain", 0)
    report = inspect(model, x)
    small = compact(model, Plan.uniform(report, filters=0.5, columns=0.75), x, columns=False)
    assert {type(module) for module in small.model} == {nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear}
    check_fits(small.model, small.plan)
    for name, layer in small.plan.items():
        weight = small.model.get_submodule(name).weight
        assert not weight[~torch.tensor(layer.mask())].any()
        assert not layer.mask().all()
    assert (small.model[0].out_channels, small.model[2].in_channels, small.model[5].in_features) == (
        len(small.kept["0"].filters),
        len(small.kept["0"].filters),
        16 * len(small.kept["2"].filters),
    )


def test_the_plan_of_column_layers_has_their_shape():
    """Eighteen scattered columns are no two channels of 3x3."""
    model, x = network("plain", 0)
    columns = np.zeros(54, bool)
    columns[::3] = True
    small = compact(model, Plan({"2": LayerPlan((5, 6, 3, 3), np.ones(5), columns)}), x)
    assert isinstance(small.model[2], ColumnConv2d)
    assert small.plan["2"].shape == small.model[2].weight.shape == (5, 18)
    check_fits(small.model, small.plan)


# The model that was given


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_model_is_not_changed_and_modes_are_kept():
    model, x = network("normalised", 0)
    model.train()
    model[1].eval()
    before = state(model)
    report = inspect(model, x)
    small = compact(model, random_plan(report, 0), x)
    assert_same_state(model, before)
    assert model.training
    assert small.model.training
    assert not small.model[1].training
    assert small.model[2].training
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in pointers for p in small.model.parameters())
    assert not any(module._forward_pre_hooks for module in small.model.modules())


def test_parameters_that_are_not_trained_stay_so():
    model, x = network("normalised", 0)
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    small = compact(model, random_plan(report_on("normalised"), 0), x).model
    assert {name for name, p in small.named_parameters() if not p.requires_grad} == {"0.weight", "1.weight", "1.bias"}


def test_a_wrong_compaction_is_detected_and_nothing_is_returned(monkeypatch):
    model, x = network("normalised", 0)
    plan = random_plan(report_on("normalised"), 0).tied(report_on("normalised"))
    before = state(model)
    monkeypatch.setattr(compaction, "_shrink", _with_statistics_of_others)
    with pytest.raises(
        AssertionError, match=r"differs from the masked one by .* \(float64, allowed 1e-10\); nothing is"
    ):
        compact(model, plan, x)
    assert_same_state(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def _with_statistics_of_others(model: nn.Module, report: Report, keep: np.ndarray, shrink=compaction._shrink) -> None:
    shrink(model, report, keep)
    assert len(model[1].running_mean) > 1
    model[1].running_mean.copy_(model[1].running_mean.flip(0))


def test_constants_that_are_not_folded_are_detected(monkeypatch):
    model, x = network("sigmoid", 0)
    monkeypatch.setattr(compaction, "_add_to_bias", lambda *_: None)
    with pytest.raises(AssertionError, match="differs from the masked one"):
        compact(model, Plan({"0": LayerPlan((6, 2, 3, 3), [1, 1, 0, 1, 1, 1], np.ones(18))}), x)


def test_nan_in_the_outputs_is_a_difference():
    model, x = network("plain", 0)
    plan = Plan.uniform(inspect(model, x), filters=0.5)
    with torch.no_grad():
        model[5].bias[0] = torch.nan
    with pytest.raises(AssertionError, match="by nan"):
        compact(model, plan, x)


def test_plans_that_do_not_fit_are_refused():
    model, x = network("plain", 0)
    before = state(model)
    with pytest.raises(ValueError, match=r"for a weight \(2, 2\)"):
        compact(model, Plan({"0": LayerPlan.dense((2, 2))}), x)
    with pytest.raises(ValueError, match="nothing would be left of layer '2'"):
        compact(model, Plan({"2": LayerPlan((5, 6, 3, 3), np.zeros(5), np.ones(54))}), x)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="names '0', which cannot be pruned here: its weight is used by other"):
        compact(tied, Plan({"0": LayerPlan.dense((4, 4))}), torch.zeros(1, 4))
    assert_same_state(model, before)


def test_a_plan_that_keeps_everything_changes_nothing():
    model, x = network("normalised", 0)
    small = compact(model, Plan({}), x)
    assert small.max_difference < 1e-6
    assert_same_state(small.model, state(model))


def test_models_with_several_inputs_and_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(5, 3)

        def forward(self, x, y):
            return {"sum": self.b(self.a(x).relu()) + self.head(y), "y": [y * 2]}

    torch.manual_seed(0)
    model, example = Net(), (torch.randn(2, 4), torch.randn(2, 5))
    small = compact(model, Plan.uniform(inspect(model, example), filters=0.5), example)
    assert small.model.a.weight.shape == (3, 4)
    assert small.max_difference < 1e-6


def test_models_that_insist_on_float32():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(self.a(x.float()).relu())

    torch.manual_seed(0)
    small = compact(Net(), Plan.uniform(inspect(Net(), torch.zeros(1, 4)), filters=0.5), torch.randn(2, 4))
    assert small.model.a.weight.shape == (3, 4)


def test_layers_called_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(input=self.a(input=x).sigmoid())

    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 4)
    assert compact(model, Plan.uniform(inspect(model, x), filters=0.5), x).model.b.weight.shape == (3, 3)


# What comes after


@pytest.mark.parametrize("columns", [True, False])
def test_the_small_network_trains_on_and_its_state_loads_into_another(columns):
    model, x = network("normalised", 0)
    report = report_on("normalised")
    plan = Plan.uniform(report, filters=0.4, columns=0.4)
    small = compact(model, plan, x, columns=columns)
    optimizer = torch.optim.SGD(small.model.parameters(), lr=0.01)
    y = torch.tensor([0, 1, 2])
    losses = []
    with MaskedParameters(small.model, small.plan, optimizer):
        for _ in range(8):
            loss = nn.functional.cross_entropy(small.model.eval()(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    other = compact(model, plan, x, columns=columns).model.eval()
    assert not torch.equal(other(x), small.model(x))
    other.load_state_dict(small.model.state_dict())
    assert torch.equal(other(x), small.model(x))


def test_column_layers_compute_what_the_dense_ones_do():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        options = {
            "stride": int(rng.integers(1, 3)),
            "padding": int(rng.integers(0, 3)),
            "dilation": int(rng.integers(1, 3)),
        }
        dense = nn.Conv2d(3, 4, (3, 2), **options, bias=bool(seed % 2))
        index = torch.tensor(np.sort(rng.choice(18, 7, replace=False)))
        pairs = {name: (value, value) for name, value in options.items()}
        bias = None if dense.bias is None else dense.bias.detach().clone()
        column = ColumnConv2d(
            dense.weight.detach().flatten(1)[:, index], index, bias, channels=3, kernel_size=(3, 2), **pairs
        )
        with torch.no_grad():
            dense.weight.copy_(column.dense_weight())
        x = torch.randn(2, 3, 9, 9)
        assert torch.equal(column(x), dense(x))
        assert "7 of 18 columns" in repr(column)

        linear = nn.Linear(18, 4, bias=bool(seed % 2))
        bias = None if linear.bias is None else linear.bias.detach().clone()
        column = ColumnLinear(linear.weight.detach()[:, index], index, bias, features=18)
        with torch.no_grad():
            linear.weight[:, [k for k in range(18) if k not in index]] = 0
        torch.testing.assert_close(column(x[:, 0].reshape(-1, 27)[:, :18]), linear(x[:, 0].reshape(-1, 27)[:, :18]))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 2], r"index \(K,\)"),
        ([0, 2, 9], "from 0 to 8"),
        ([-1, 2, 3], "from 0 to 8"),
        ([0, 3, 3], "rising"),
        ([3, 2, 1], "rising"),
    ],
)
def test_column_indices_are_checked(index, message):
    with pytest.raises(ValueError, match=message):
        ColumnLinear(torch.ones(2, 3), torch.tensor(index), None, features=9)
    with pytest.raises(ValueError, match=message):
        ColumnConv2d(torch.ones(2, 3), torch.tensor(index), None, channels=1, kernel_size=(3, 3))
    with pytest.raises(ValueError, match="int64"):
        ColumnLinear(torch.ones(2, 3), torch.tensor([0.0, 1.0, 2.0]), None, features=9)
    with pytest.raises(ValueError, match=r"bias \(P,\)"):
        ColumnLinear(torch.ones(2, 3), torch.tensor([0, 1, 2]), torch.ones(3), features=9)


@pytest.mark.parametrize("columns", [True, False])
def test_layers_that_the_plan_holds_stay_as_they_are(columns):
    """Without a report, too: the readers of the middle layer drop all of some of its filters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1)).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    plan = Plan({"4": LayerPlan((4, 5, 1, 1), [1] * 4, [1, 0, 0, 1, 0])}, held=["2"])
    small = compact(model, plan, x, columns=columns)
    assert torch.equal(small.model[2].weight, model[2].weight)
    assert small.plan.held == {"2"}
    if not columns:  # the others' columns are masked, and cut out when it is compacted again
        again = compact(small.model, small.plan, x)
        assert torch.equal(again.model[2].weight, model[2].weight)
    free = compact(model, Plan(plan), x).model
    assert free[2].weight.shape == (2, 6, 1, 1)


# Layers of which nothing is left


EMPTY = [
    (nn.Linear(5, 3), (2, 4, 5)),
    (nn.Conv1d(4, 3, 3, padding=2, dilation=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=False), (2, 4, 9, 8)),
    (nn.Conv2d(4, 3, 3, padding="same", padding_mode="reflect"), (4, 9, 8)),
    (nn.Conv2d(4, 3, 4, padding="valid", dilation=2), (1, 4, 9, 8)),
    (nn.Conv3d(2, 3, 2, stride=2), (1, 2, 5, 4, 6)),
    (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1, dilation=(1, 2)), (1, 4, 5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), EMPTY, ids=lambda value: getattr(value, "_get_name", lambda: "")())
def test_an_empty_layer_puts_out_what_the_layer_does_without_weights(layer, shape):
    with torch.no_grad():
        layer.weight.zero_()
        x = torch.randn(shape)
        empty = EmptyLayer(layer)
        assert torch.equal(empty(x), layer(x))
        empty(x).add_(1)  # what follows may work in place
        assert torch.equal(empty(x), layer(x))
    assert sorted(EmptyLayer(layer).state_dict()) == (["value"] if layer.bias is not None else [])


class Blocks(nn.Module):
    """Two residual blocks, the second one with a normalisation at the end of its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.inner, self.norm = nn.BatchNorm2d(5), nn.BatchNorm2d(6)
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.a2(torch.relu(self.a1(x))))
        x = torch.relu(x + self.norm(self.b2(torch.relu(self.inner(self.b1(x))))))
        return self.last(x.mean((2, 3)))


def blocks() -> Blocks:
    torch.manual_seed(0)
    model = Blocks().eval()
    for norm in (model.inner, model.norm):
        for value in (norm.weight, norm.bias, norm.running_var):
            nn.init.uniform_(value, 0.3, 1.2)
        nn.init.normal_(norm.running_mean)
    return model


@functools.cache
def report_on_blocks() -> Report:
    return inspect(blocks(), torch.zeros(3, 3, 8, 8))


@pytest.mark.parametrize("dead", [("a2",), ("b2",), ("a1", "b1"), ("a2", "b2")])
@pytest.mark.parametrize("columns", [True, False])
def test_a_dead_block_computes_nothing(dead, columns):
    model, x = blocks(), torch.randn(3, 3, 8, 8)
    shapes = {name: model.get_submodule(name).weight.shape for name in dead}
    plan = Plan.from_masks({name: np.zeros(shape) for name, shape in shapes.items()})
    small = compact(model, plan, x, columns=columns, report=report_on_blocks())
    assert small.kind == "module"
    gone = [name for name, module in small.model.named_modules() if isinstance(module, EmptyLayer)]
    expected = {"a2": ["a1", "a2"], "b2": ["b1", "b2"], "a1": ["a1", "a2"], "b1": ["b1", "b2"]}
    if dead == ("a1", "b1"):  # what dead filters put out reaches the border of a convolution that pads: that one stays
        assert {"a1", "b1"} <= set(gone)
    else:
        assert sorted(gone) == sorted(name for block in dead for name in expected[block])
    with torch.no_grad():
        torch.testing.assert_close(small.model(x), mask(model, plan)(x), rtol=1e-5, atol=1e-5)
    restored = restore(small.plan, small.kept, report_on_blocks())
    assert {name for name, layer in restored.items() if layer.weights == 0} == set(gone)
    assert not set(gone) & set(small.plan)
    now = inspect(small.model, x)  # a network with such layers is read, pruned and cut like any other
    for after in (small.plan, Plan.uniform(now, filters=0.5)):
        assert compact(small.model, after, x, report=now).max_difference < 1e-5


def test_an_empty_layer_is_trained_and_exported():
    model, x = blocks(), torch.randn(3, 3, 8, 8)
    small = compact(model, Plan.from_masks({"a2": np.zeros(model.a2.weight.shape)}), x).model
    small(x).square().sum().backward()
    assert isinstance(small.a2, EmptyLayer)
    assert small.a2.value.grad is not None
    engine = acf.compile(small, x)
    with torch.no_grad():
        np.testing.assert_allclose(engine(x.numpy()), small(x).numpy(), rtol=1e-4, atol=1e-5)
    assert len(engine.program.steps) < len(acf.compile(model, x).program.steps)
