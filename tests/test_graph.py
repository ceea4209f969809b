"""`inspect`: what of every kind of network can be pruned, what is frozen or left out, and why."""

import copy
import functools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress_fast import models
from autocompress_fast.admm import ADMM, Constraint
from autocompress_fast.compact import compact
from autocompress_fast.graph import Counts, Frozen, Group, Kind, Layer, Report, Set, inspect
from autocompress_fast.plan import LayerPlan, Plan
from autocompress_fast.purify import purify
from autocompress_fast.rates import STRUCTURES, Target, allocate, fill
from autocompress_fast.report import Inspection
from autocompress_fast.trace import Trace, trace
from autocompress_fast.unused import unused_paths

pytestmark = pytest.mark.usefixtures("one_thread")


def report_of(name: str, **options: object) -> Report:
    torch.manual_seed(0)
    return inspect(models.create(name, **options), torch.zeros(1, *models.input_shape(name)))


def expected_sizes(model: nn.Module, example: torch.Tensor) -> Counts:
    """Sizes by running the model, with hooks: nothing of the graph is used."""
    conv = params = macs = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal conv, params, macs
        weights = module.weight.numel()
        params += weights
        conv += weights * (not isinstance(module, nn.Linear))
        positions = output.numel() // output.shape[1] if not isinstance(module, nn.Linear) else 1
        macs += weights * positions

    handles = [
        m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model.eval()(example)
    for handle in handles:
        handle.remove()
    return Counts(conv, params, macs)


# Networks of the papers


def test_lenet5_is_a_chain_through_pooling_and_flatten():
    report = report_of("lenet5")
    assert [layer.name for layer in report.layers] == ["conv1", "conv2", "fc1", "fc2"]
    assert [(tied.layers, tied.size) for tied in report.sets] == [(("conv1",), 20), (("conv2",), 50), (("fc1",), 500)]
    for tied, reader, positions in zip(report.sets, ("conv2", "fc1", "fc2"), (1, 16, 1), strict=True):
        assert tied.rows[tied.layers[0]].tolist() == list(range(tied.size))
        assert list(tied.readers) == [reader]
        assert tied.readers[reader].tolist() == np.repeat(np.arange(tied.size), positions).tolist()
    assert (report.params, report.conv_params) == (430_500, 25_500)
    assert report["conv1"].outputs == 24 * 24
    assert report.macs == 500 * 576 + 25_000 * 64 + 400_000 + 5_000
    assert report.frozen == {"fc2": "filters: it is an output of the model"}
    assert report.skipped == {}
    assert report.prunable_macs == report.macs  # columns of the output layer, too
    assert report.prunable_params == report.params
    assert report.set_of == {tied.layers[0]: tied for tied in report.sets}
    assert len(report.groups) == 20 + 50 + 500 + 10
    assert {group.frozen for group in report.groups[-10:]} == {"it is an output of the model"}
    assert not any(group.frozen for group in report.groups[:-10])


def test_vgg16_is_a_chain_with_normalisations():
    model = models.create("vgg16", width=8)
    report = inspect(model, torch.zeros(1, 3, 32, 32))
    assert len(report.layers) == 14
    assert list(report.frozen) == ["classifier"]
    groups = {}
    for group in report.groups:
        groups.setdefault(next(iter(group.filters)), []).append(group)
    for before, after in zip(report.layers, report.layers[1:], strict=False):
        assert report.set_of[before.name].layers == (before.name,)
        assert list(report.set_of[before.name].readers) == [after.name]
        for i, group in enumerate(groups[before.name]):
            assert group.filters == {before.name: (i,)}
            assert list(group.channels) == [after.name]
            names = {name.rpartition(".")[0] for name in group.tied}
            assert len(names) == 1
            norm = model.get_submodule(names.pop())
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.num_features == before.shape[0]
            assert set(group.tied.values()) == {(i,)}
            assert len(group.tied) == 4


def test_vgg16_has_the_size_of_the_papers():
    report = report_of("vgg16")
    assert report.conv_params == 14_710_464
    assert report.macs == 313_201_664


def test_resnet20_ties_what_goes_into_the_additions():
    report = report_of("resnet20")
    first = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    second = [f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in range(3)]
    added, *inside = report.sets
    assert added.layers == ("conv1", *second)
    assert added.size == 64
    assert [tied.layers for tied in inside] == [(name,) for name in first]
    assert [list(tied.readers) for tied in inside] == [[name] for name in second]
    assert set(added.readers) == {*first, "linear"}
    # The shortcuts put the channels of a stage into the middle of the next one's, between zeros.
    expected = {1: range(24, 40), 2: range(16, 48), 3: range(64)}
    order = added.rows["layer3.2.conv2"]
    assert sorted(order.tolist()) == list(range(64))
    for stage, place in expected.items():
        for block in range(3):
            assert added.rows[f"layer{stage}.{block}.conv2"].tolist() == order[place.start : place.stop].tolist()
            reads = max(1, stage - (block == 0))
            assert added.readers[f"layer{stage}.{block}.conv1"].tolist() == order[expected[reads]].tolist()
    assert report.frozen == {"linear": "filters: it is an output of the model"}
    assert report.prunable_macs == report.macs


def test_mobilenet_ties_depthwise_layers_to_what_feeds_them():
    report = report_of("mobilenet_v2")
    depthwise = [layer for layer in report.layers if layer.groups > 1]
    assert len(depthwise) == 17
    before = {after.name: layer.name for layer, after in zip(report.layers, report.layers[1:], strict=False)}
    for layer in depthwise:
        assert layer.shape[1] == 1
        assert report.frozen[layer.name] == f"columns: it is a grouped convolution ({layer.groups} groups)"
        assert layer.columns == layer.shape[0] * 9
        tied = report.set_of[layer.name]
        assert tied.layers == (before[layer.name], layer.name)
        assert tied.size == layer.groups
        assert (tied.rows[layer.name] == tied.rows[before[layer.name]]).all()
        assert (tied.readers[layer.name] == tied.rows[layer.name]).all()
    assert set(report.frozen) == {"classifier.1", *(layer.name for layer in depthwise)}
    assert report.set_of["features.4.conv.2"].layers == tuple(f"features.{i}.conv.2" for i in (4, 5, 6))
    assert report.prunable_macs == report.macs


@pytest.mark.parametrize("name", ["lenet5", "lenet300", "lenet_digits", "resnet20", "mobilenet_v2"])
def test_sizes_are_those_of_a_run(name):
    model = models.create(name)
    report = inspect(model, torch.zeros(1, *models.input_shape(name)))
    assert report.counts() == expected_sizes(model, torch.zeros(1, *models.input_shape(name)))


def test_sizes_do_not_depend_on_the_batch():
    model = models.create("lenet5")
    one, four = (inspect(model, torch.zeros(batch, 1, 28, 28)) for batch in (1, 4))
    assert one.counts() == four.counts()
    assert one.to_json() == four.to_json()


def test_counts_of_a_plan():
    report = report_of("lenet5")
    plan = Plan({"conv2": LayerPlan((50, 20, 5, 5), [i < 5 for i in range(50)], [i % 2 for i in range(500)])})
    counts = report.counts(plan)
    assert counts == Counts(500 + 5 * 250, 430_500 - 25_000 + 1250, report.macs - (25_000 - 1250) * 64)


def test_the_report_as_json():
    content = json.loads(json.dumps(report_of("lenet5").to_json()))
    assert content["model"] == "LeNet5"
    assert content["layers"][1]["shape"] == [50, 20, 5, 5]
    assert sum(layer["macs"] for layer in content["layers"]) == content["macs"]
    assert content["skipped"] == {}
    assert content["sets"] == [
        {"layers": [name], "groups": size} for name, size in (("conv1", 20), ("conv2", 50), ("fc1", 500))
    ]
    assert content["layers"][3]["frozen_filters"] == "it is an output of the model"
    assert (content["prunable_macs"], content["prunable_params"]) == (content["macs"], content["params"])


def test_layers_that_are_not_there():
    report = report_of("lenet5")
    assert "conv1" in report
    assert "conv9" not in report
    with pytest.raises(KeyError, match="LeNet5 has no layer 'conv9'; layers: conv1, conv2, fc1, fc2"):
        report["conv9"]


def test_a_model_is_not_changed():
    model = models.create("lenet_digits").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inspect(model, torch.zeros(1, 1, 8, 8))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_reports_weights_are_the_models():
    model = models.create("lenet_digits")
    report = inspect(model, torch.zeros(1, 1, 8, 8))
    assert report.weight("fc1").data_ptr() == model.fc1.weight.data_ptr()
    assert not report.weight("fc1").requires_grad


def test_the_weights_of_transposed_layers_are_turned_to_filters_times_inputs():
    for groups in (1, 2):
        layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
        report = inspect(nn.Sequential(layer), torch.zeros(1, 4, 5, 5))
        weight = report.weight("0")
        assert tuple(weight.shape) == report["0"].shape == (6, 4 // groups, 3, 3)
        assert report["0"].kind == "conv_transpose2d"
        assert report["0"].transposed
        assert report["0"].outputs == 25  # every weight meets every input once
        for p in range(6):
            group, j = divmod(p, 6 // groups)
            assert torch.equal(weight[p], layer.weight[group * 4 // groups : (group + 1) * 4 // groups, j])


# What freezes filters, in chains of two layers: the reason must say it


class Between(nn.Module):
    """A convolution, something, and a convolution."""

    def __init__(self, between, second=None, first=None):
        super().__init__()
        self.first = first or nn.Conv2d(3, 8, 3)
        self.second = second or nn.Conv2d(8, 4, 3)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


TRANSPARENT = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky relu": nn.LeakyReLU(0.1),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "elu": nn.ELU(),
    "softplus": nn.Softplus(),
    "identity": nn.Identity(),
    "max pool": nn.MaxPool2d(2),
    "average pool": nn.AvgPool2d(2),
    "adaptive pool": nn.AdaptiveAvgPool2d(4),
    "dropout": nn.Dropout(),
    "dropout of channels": nn.Dropout2d(),
    "batch norm": nn.BatchNorm2d(8),
    "batch norm without affine": nn.BatchNorm2d(8, affine=False),
    "batch norm without statistics": nn.BatchNorm2d(8, track_running_stats=False),
    "instance norm": nn.InstanceNorm2d(8),
    "instance norm with affine": nn.InstanceNorm2d(8, affine=True),
    "layer norm of rows": nn.LayerNorm(10),
    "a prelu": nn.PReLU(8),
    "a prelu for all": nn.PReLU(),
    "zero padding": nn.ZeroPad2d(1),
    "a transposed view": lambda x: x.transpose(2, 3),
    "softmax over the width": nn.Softmax(dim=3),
    "reflection": nn.ReflectionPad2d(1),
    "replication": nn.ReplicationPad2d((1, 2, 0, 1)),
    "several": nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout()),
}


TIED = {
    "batch norm": ("weight", "bias", "running_mean", "running_var"),
    "batch norm without affine": ("running_mean", "running_var"),
    "batch norm without statistics": ("weight", "bias"),
    "instance norm with affine": ("weight", "bias"),
    "a prelu": ("weight",),
    "several": ("0.weight", "0.bias", "0.running_mean", "0.running_var"),
}


@pytest.mark.parametrize(("kind", "between"), TRANSPARENT.items(), ids=TRANSPARENT.keys())
def test_operators_that_keep_channels_apart_are_followed(kind, between):
    report = inspect(Between(between), torch.zeros(2, 3, 12, 12))
    assert report.frozen == {"second": "filters: it is an output of the model"}
    (tied,) = report.sets
    assert tied.layers == ("first",)
    assert tied.rows["first"].tolist() == list(range(8))
    assert {name: found.tolist() for name, found in tied.readers.items()} == {"second": list(range(8))}
    for i, group in enumerate(report.groups[:8]):
        assert group == Group(
            {"first": (i,)}, {"second": (i,)}, {f"between.{name}": (i,) for name in TIED.get(kind, ())}, ""
        )


class Twice(nn.Module):
    def forward(self, x):
        return x + x


class OfOthers(nn.Module):
    """A normalisation in which everything is another module's."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)


def apart(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, 4:], x[:, :4]], 1)


# name -> (operators, groups of filters that go together, (C,) which of the groups each channel of "second" is)
MOVED = {
    "group norm": (nn.GroupNorm(2, 8), [range(4), range(4, 8)], [0] * 4 + [1] * 4),
    "a slice of channels": (apart, [[i] for i in range(8)], [4, 5, 6, 7, 0, 1, 2, 3]),
    "a sum with itself": (Twice(), [[i] for i in range(8)], range(8)),
    "a sum with itself in another order": (
        lambda x: x + x.flip(1),
        [[i, 7 - i] for i in range(4)],
        [0, 1, 2, 3, 3, 2, 1, 0],
    ),
    "pixel unshuffle and back": (
        nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)),
        [[i] for i in range(8)],
        range(8),
    ),
    "batch norm of others": (OfOthers(), [[i] for i in range(8)], range(8)),
}


@pytest.mark.parametrize(("between", "together", "reads"), MOVED.values(), ids=MOVED.keys())
def test_operators_that_move_or_tie_channels_are_followed(between, together, reads):
    report = inspect(Between(between), torch.zeros(1, 3, 12, 12))
    (tied,) = report.sets
    assert tied.size == len(together)
    assert [list(np.flatnonzero(tied.rows["first"] == i)) for i in range(tied.size)] == [list(t) for t in together]
    assert tied.readers["second"].tolist() == list(reads)
    assert [group.filters["first"] for group in report.groups if "first" in group.filters] == [
        tuple(t) for t in together
    ]


@pytest.mark.parametrize(("filters", "factor"), [(16, 2), (8, 2), (48, 4)])
def test_pixel_shuffle_into_any_number_of_channels(filters, factor):
    """As many as its factor, or fewer, too: the channels of the image are what goes."""
    channels = filters // factor**2
    model = nn.Sequential(nn.Conv2d(3, filters, 3), nn.PixelShuffle(factor), nn.Conv2d(channels, 4, 3))
    (tied,) = inspect(model, torch.zeros(1, 3, 9, 9)).sets
    assert tied.rows["0"].tolist() == np.repeat(np.arange(channels), factor**2).tolist()
    assert tied.readers["2"].tolist() == list(range(channels))


MIXED = {
    "softmax over channels": (nn.Softmax(dim=1), "its channels are mixed in aten.softmax"),
    "layer norm": (nn.LayerNorm([8, 10, 10]), "it is normalised across channels in aten.layer_norm"),
    "one norm group": (nn.GroupNorm(1, 8), "it is normalised across channels in aten.group_norm"),
    "a mean over channels": (lambda x: x - x.mean(1, keepdim=True), "its channels are mixed in aten.mean"),
    "a sort": (lambda x: x.sort(1)[0], "its output goes into an operator that is not understood, in aten.sort"),
}


@pytest.mark.parametrize(("between", "reason"), MIXED.values(), ids=MIXED.keys())
def test_operators_that_mix_channels_freeze_with_the_reason(between, reason):
    report = inspect(Between(between), torch.zeros(1, 3, 12, 12))
    assert report.frozen["first"].startswith(f"filters: {reason}")
    assert "(test_graph.py:" in report.frozen["first"] or "in between" in report.frozen["first"]
    assert report.sets == ()
    assert report["first"].columns_prunable
    assert (report.prunable_macs, report.prunable_params) == (0, 0)
    assert all(group.frozen for group in report.groups)
    assert report.frozen_filters("first").all()


def test_a_normalisation_behind_two_layers_ties_them():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.c(self.norm(self.b(self.norm(self.a(x)))))

    report = inspect(Net(), torch.zeros(2, 4))
    (tied,) = report.sets
    assert tied.layers == ("a", "b")
    assert tied.rows["a"].tolist() == tied.rows["b"].tolist()
    assert set(tied.readers) == {"b", "c"}
    assert report.groups[2].filters == {"a": (2,), "b": (2,)}
    assert set(report.groups[2].tied) == {f"norm.{part}" for part in ("weight", "bias", "running_mean", "running_var")}


def test_a_normalisation_of_flattened_values_goes_with_the_filter_of_each():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.BatchNorm1d(8 * 16), nn.Linear(8 * 16, 4))
    report = inspect(model, torch.zeros(2, 3, 6, 6))
    assert report.frozen == {"3": "filters: it is an output of the model"}
    for i, group in enumerate(report.groups[:8]):
        place = tuple(range(16 * i, 16 * i + 16))
        assert group.filters == {"0": (i,)}
        assert group.channels == {"3": place}
        assert group.tied == {f"2.{part}": place for part in ("weight", "bias", "running_mean", "running_var")}


@pytest.mark.parametrize(
    "flatten", [lambda x: x.flatten(1), lambda x: x.view(x.shape[0], -1), lambda x: torch.flatten(x, 1)]
)
def test_flattening_is_followed(flatten):
    report = inspect(Between(flatten, nn.Linear(8 * 100, 4)), torch.zeros(1, 3, 12, 12))
    assert report.set_of["first"].readers["second"].tolist() == np.repeat(np.arange(8), 100).tolist()


def test_other_reshapes_freeze():
    for between, second in (
        (lambda x: x.reshape(-1, 100), nn.Linear(100, 4)),
        (lambda x: x.flatten(2), nn.Linear(100, 4)),
    ):
        reason = "filters: its channels do not lie along its inputs in aten.linear.default in second"
        assert inspect(Between(between, second), torch.zeros(1, 3, 12, 12)).frozen["first"].startswith(reason)


def test_layers_on_every_position_of_an_image_freeze_it_and_those_of_a_sequence_are_followed():
    report = inspect(Between(nn.ReLU(), nn.Linear(10, 4)), torch.zeros(1, 3, 12, 12))
    assert "do not lie along its inputs in aten.linear.default in second" in report.frozen["first"]
    sequence = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    report = inspect(sequence, torch.zeros(1, 3, 2))
    assert report["0"].outputs == 3
    assert report.set_of["0"].readers["3"].tolist() == [0, 1, 2, 3] * 3


def test_inputs_without_a_batch():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 3))
    report, batched = inspect(model, torch.zeros(2, 9)), inspect(model, torch.zeros(1, 2, 9))
    assert report.set_of["0"].readers["2"].tolist() == [0, 1, 2, 3]
    assert report.counts() == batched.counts()


def test_two_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x):
            x = self.body(x).relu()
            return {"a": self.a(x), "b": [self.b(x)]}

    report = inspect(Net(), torch.zeros(1, 4))
    assert report.frozen == {
        "a": "filters: it is an output of the model",
        "b": "filters: it is an output of the model",
    }
    assert report.groups[3] == Group({"body": (3,)}, {"a": (3,), "b": (3,)}, {}, "")


def test_a_value_that_is_an_output_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.body(x).relu()
            return x, self.head(x)

    assert inspect(Net(), torch.zeros(1, 4)).frozen["body"] == "filters: it is an output of the model"


class Partly(nn.Module):
    """Two of six channels are outputs, and the input goes beside them into the last layer."""

    def __init__(self):
        super().__init__()
        self.body, self.side, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(10, 3)

    def forward(self, x):
        body = self.body(x)
        return body[:, :2], self.head(torch.cat([body.relu() + self.side(x), x], 1))


def test_some_channels_are_frozen_and_the_others_of_the_layer_are_not():
    report = inspect(Partly(), torch.zeros(1, 4))
    frozen = [True, True, False, False, False, False]
    assert report.frozen_filters("body").tolist() == report.frozen_filters("side").tolist() == frozen
    assert report["body"].filters_prunable
    assert list(report.frozen) == ["head"]
    assert [bool(group.frozen) for group in report.groups] == [*frozen, True, True, True]
    assert report.groups[1].frozen == "it is an output of the model"
    assert report.groups[1].filters == {"body": (1,), "side": (1,)}
    (tied,) = report.sets
    assert tied.rows["side"].tolist() == [-1, -1, 0, 1, 2, 3]
    assert tied.readers["head"].tolist() == [-1, -1, 0, 1, 2, 3, -1, -1, -1, -1]
    # 4 of 6 filters of `body` and `side`; 4 of the 10 channels that `head` reads
    assert report.prunable_params == report.prunable_macs == 16 + 16 + 12


def test_how_many_filters_stay_and_the_norm_of_what_is_tied():
    rows = {"a": np.array([-1, 0, 1, 2]), "b": np.array([2, 2, 0, 0, 1, 1])}
    tied = Set(("a", "b"), rows, 3, np.zeros(3, np.int64), {})
    assert [tied.filters("a", groups) for groups in (1, 2, 3)] == [2, 3, 4]
    assert [tied.filters("b", groups) for groups in (1, 2, 3)] == [2, 4, 6]
    norms = {"a": np.array([100.0, 1.0, 2.0, 3.0]), "b": np.array([1.0, 2.0, 3.0, 4.0, 0.0, 0.0])}
    np.testing.assert_allclose(tied.joint(norms), np.sqrt([1 + 9 + 16, 4, 9 + 1 + 4]))


def test_layers_tied_in_part_keep_the_same_share_of_every_class():
    rows = {"narrow": np.array([0, 1, 2, 3]), "wide": np.array([4, 0, 1, 2, 3, 5, 6, 7])}
    tied = Set(("narrow", "wide"), rows, 8, np.array([0, 0, 0, 0, 1, 1, 1, 1]), {})
    assert tied.counts(4).tolist() == [2, 2]
    assert tied.counts(1).tolist() == [1, 1]
    joint = np.array([9.0, 8.0, 7.0, 6.0, 1.0, 3.0, 3.0, 3.0])
    assert np.flatnonzero(tied.chosen(joint, 4)).tolist() == [0, 1, 5, 6]
    assert [(tied.filters("narrow", g), tied.filters("wide", g)) for g in (4, 5, 6, 8)] == [
        (2, 4),
        (2, 4),
        (3, 6),
        (4, 8),
    ]
    assert [tied.groups("wide", filters) for filters in (1, 4, 5, 8)] == [1, 5, 5, 8]


def test_outputs_that_nobody_reads():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    report = inspect(Net(), torch.zeros(1, 4))
    assert "used" in report
    assert "unused" not in report or "unused" in report.frozen


# What is left out, and why


def test_a_module_called_twice_has_one_set_of_filters():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared, nn.Conv2d(4, 2, 3))
    report = inspect(model, torch.zeros(1, 3, 12, 12))
    assert [(layer.name, layer.outputs) for layer in report.layers] == [("0", 100), ("1", 200), ("4", 64)]
    (tied,) = report.sets
    assert tied.layers == ("0", "1")
    assert {name: found.tolist() for name, found in tied.readers.items()} == {"1": [0, 1, 2, 3], "4": [0, 1, 2, 3]}
    assert report.skipped == {}
    assert report.macs == 100 * 108 + 200 * 144 + 64 * 72


def test_tied_weights_are_left_out():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    report = inspect(nn.Sequential(first, nn.ReLU(), second, nn.Linear(4, 2)), torch.zeros(1, 4))
    assert report.skipped == {"0": "its weight has several owners"}
    assert [layer.name for layer in report.layers] == ["3"]
    with pytest.raises(KeyError, match="has no layer '0': its weight has several owners; layers: 3"):
        report["0"]


def test_what_feeds_a_layer_that_is_left_out_is_frozen():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    report = inspect(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), first, nn.ReLU(), second), torch.zeros(1, 3))
    assert report.frozen["0"].startswith("filters: its output goes into aten.linear.default in 2")
    assert "which is no layer with a weight of its own" in report.frozen["0"]


def test_tied_biases_are_left_out():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.bias = first.bias
    report = inspect(nn.Sequential(first, nn.ReLU(), second, nn.Linear(4, 2)), torch.zeros(1, 4))
    assert report.skipped == dict.fromkeys(("0", "2"), "its bias is used by other operators too")


def test_a_module_with_two_names_is_a_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model.add_module("again", nn.Identity())
    model.again.alias = model[0]
    example = torch.zeros(1, 4)
    report = inspect(model, example)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    small = compact(model, Plan.uniform(report, filters=0.5, columns=0.7), example).model
    assert small.again.alias is small[0]
    assert not isinstance(small[0], nn.Linear)


def test_computed_weights_are_seen_as_plain_ones():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 3))
    report = inspect(model, torch.zeros(1, 3, 12, 12))
    assert report.skipped == {}
    assert [layer.name for layer in report.layers] == ["0", "2"]
    torch.testing.assert_close(report.weight("0"), model[0].weight.detach())
    assert report.groups[1] == Group({"0": (1,)}, {"2": (1,)}, {}, "")
    assert nn.utils.parametrize.is_parametrized(model[0])


def test_weights_of_the_model_itself_are_left_out_and_those_borrowed_from_a_layer_are_not():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Parameter(torch.zeros(4, 4))
            self.borrowed, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = F.linear(x, self.own)
            return self.head(F.linear(x, self.borrowed.weight, self.borrowed.bias))

    report = inspect(Net(), torch.zeros(1, 4))
    assert report.skipped == {
        "own": "the linear is called by the model itself, not by a convolution or linear layer in it"
    }
    assert [layer.name for layer in report.layers] == ["borrowed", "head"]


def test_layers_of_the_users_own_are_left_out():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

        def forward(self, x):
            return F.linear(x, self.weight)

    report = inspect(nn.Sequential(Mine(), nn.Linear(4, 2)), torch.zeros(1, 4))
    assert report.skipped == {"0": "the linear is called by Mine '0', not by a convolution or linear layer in it"}


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_that_is_one_layer_is_left_out(bias):
    report = inspect(nn.Linear(4, 2, bias=bias), torch.zeros(1, 4))
    assert report.layers == ()
    assert list(report.skipped.values()) == [
        "the linear is called by the model itself, not by a convolution or linear layer in it"
    ]
    assert report.counts() == Counts(0, 0, 0)


def test_column_layers_of_a_compacted_model_are_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6), nn.ReLU(), nn.Linear(6, 2))
    example = torch.zeros(1, 3, 6, 6)
    small = compact(model, Plan.uniform(inspect(model, example), columns=0.5), example).model
    report = inspect(small, example)
    assert [layer.name for layer in report.layers] == ["5"]  # it lost inputs with the filters, and no single column
    assert list(report.skipped) == ["0", "3"]
    assert report.skipped["0"] == "its weight is computed"
    assert "ColumnLinear '3'" in report.skipped["3"]


def test_subclasses_of_layers_are_layers():
    class Mine(nn.Conv2d):
        pass

    report = inspect(nn.Sequential(Mine(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), torch.zeros(1, 3, 8, 8))
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert report.groups[3] == Group({"0": (3,)}, {"2": (3,)}, {}, "")


def test_convolutions_of_one_and_three_dimensions():
    for conv, example in ((nn.Conv1d, torch.zeros(1, 2, 9)), (nn.Conv3d, torch.zeros(1, 2, 6, 6, 6))):
        report = inspect(nn.Sequential(conv(2, 4, 3), nn.ReLU(), conv(4, 3, 3)), example)
        assert report.set_of["0"].readers["2"].tolist() == [0, 1, 2, 3]
        side = example.shape[2]
        rank = example.ndim - 2
        assert report["2"].macs == 3 * 4 * 3**rank * (side - 4) ** rank
        assert report["2"].kind == f"conv{rank}d"


def test_layer_sizes():
    layer = Layer("a", "conv2d", (6, 2, 3, 3), 3, 10, "", "because")
    assert layer.weights == 6 * 18
    assert layer.columns == 3 * 18
    assert layer.inputs == 6
    assert not layer.transposed
    assert layer.macs == 1080
    assert layer.is_conv
    assert layer.filters_prunable
    assert not layer.columns_prunable
    assert math.prod(layer.shape) == layer.weights


# Layers that stay as they are


class Wide(nn.Module):
    """A residual addition, a depthwise, a grouped and a transposed layer, and a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1))
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.up = nn.ConvTranspose2d(20, 4, 2, stride=2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.block(x)
        deep = F.relu(self.depth(x))
        return self.head(F.relu(self.up(torch.cat([x, F.relu(self.grouped(deep))], 1))))


WIDE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
WIDE_LAYERS = ["stem", "block.0", "block.2", "depth", "grouped", "up", "head.1", "head.3"]
HEAD = ["head.1", "head.3"]
REST = [name for name in WIDE_LAYERS if name not in HEAD]


@pytest.fixture
def read_once(monkeypatch):
    """`wide` is traced once for all tests: that takes longest, and does not depend on what is held."""
    monkeypatch.setattr("autocompress_fast.graph.report.trace", traced)


@functools.cache
def traced(model: nn.Module, example: torch.Tensor) -> Trace:
    return trace(model, example)


@functools.cache
def wide() -> nn.Module:  # no test changes it
    torch.manual_seed(0)
    model = Wide().eval()
    for tensor in (model.norm.weight, model.norm.bias, model.norm.running_mean):
        nn.init.normal_(tensor)
    return model


@pytest.mark.parametrize(
    ("select", "exclude", "expected"),
    [
        (None, None, {}),
        (None, [], {}),
        (None, "stem", {"stem": "it is excluded (stem)"}),
        (None, "block", dict.fromkeys(["block.0", "block.2"], "it is excluded (block)")),
        (None, "b*.2", {"block.2": "it is excluded (b*.2)"}),
        (None, "head.[12]", {"head.1": "it is excluded (head.[12])"}),
        (None, "?????.0", {"block.0": "it is excluded (?????.0)"}),
        (None, re.compile("up|he.*"), dict.fromkeys(["up", *HEAD], "it is excluded (re:up|he.*)")),
        (None, nn.Linear, dict.fromkeys(HEAD, "it is excluded (type:Linear)")),
        (None, nn.modules.conv._ConvTransposeNd, {"up": "it is excluded (type:_ConvTransposeNd)"}),
        (None, nn.Sequential, dict.fromkeys(["block.0", "block.2", *HEAD], "it is excluded (type:Sequential)")),
        (
            None,
            ["up", nn.Linear, "head.3"],
            {"up": "it is excluded (up)", **dict.fromkeys(HEAD, "it is excluded (type:Linear)")},
        ),
        ("head", None, dict.fromkeys(REST, "it is not selected")),
        ([re.compile("head.*"), nn.ConvTranspose2d], None, dict.fromkeys(REST[:-1], "it is not selected")),
        (
            ("head", *REST[:4]),
            ("head.3", "depth"),
            {
                "depth": "it is excluded (depth)",
                "grouped": "it is not selected",
                "up": "it is not selected",
                "head.3": "it is excluded (head.3)",
            },
        ),
        ([], None, dict.fromkeys(WIDE_LAYERS, "it is not selected")),
    ],
)
@pytest.mark.usefixtures("read_once")
def test_patterns_say_which_layers_stay_as_they_are(select, exclude, expected):
    report = inspect(wide(), WIDE, select=select, exclude=exclude)
    assert [layer.name for layer in report.layers] == WIDE_LAYERS
    assert report.held == expected
    for layer in report.layers:
        assert layer.held == expected.get(layer.name, "")
        if layer.held:
            assert (layer.frozen_filters, layer.frozen_columns) == (layer.held, layer.held)
            assert report.frozen[layer.name] == f"filters: {layer.held}; columns: {layer.held}"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("stern", "stern"),
        ("norm", "norm"),
        ("bloc", "bloc"),
        ("", ""),
        ("head.?.*", "head.?.*"),
        (re.compile("head"), "re:head"),
        (nn.Conv3d, "type:Conv3d"),
        (nn.ReLU, "type:ReLU"),
        (["stem", "block.1"], "block.1"),
    ],
)
@pytest.mark.usefixtures("read_once")
def test_patterns_that_no_layer_matches_are_refused(pattern, text):
    argument = "select" if text == "stern" else "exclude"
    message = re.escape(f"{argument}: no layer matches {text!r}; layers: stem, block.0, block.2, depth")
    with pytest.raises(ValueError, match=message):
        inspect(wide(), WIDE, **{argument: pattern})


@pytest.mark.parametrize("pattern", [3, b"stem", ["stem", None], [["stem"]], nn.Linear(1, 1), {"stem"}])
@pytest.mark.usefixtures("read_once")
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(TypeError, match="exclude takes module paths, globs, regular expressions and classes"):
        inspect(wide(), WIDE, exclude=pattern)


def test_classes_are_those_of_the_model_that_was_given():
    """A parametrized layer is of another class; the copy in which it is plain may be of a third."""

    class Mine(nn.Conv2d):
        pass

    model = nn.Sequential(nn.utils.parametrizations.weight_norm(Mine(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 3))
    assert inspect(model, torch.zeros(1, 3, 8, 8), exclude=Mine).held == {"0": "it is excluded (type:Mine)"}


def test_a_held_layer_freezes_what_it_reads_and_what_is_tied_to_it_and_nothing_else():
    report = inspect(wide(), WIDE, exclude="depth")
    free = inspect(wide(), WIDE)
    tied = "it is tied to a layer that is excluded (depth)"
    assert report.frozen["depth"].startswith("filters: it is excluded (depth)")
    assert report.frozen["stem"] == report.frozen["block.2"] == f"filters: {tied}"
    assert [one.layers for one in report.sets] == [("block.0",), ("grouped",), ("up",), ("head.1",)]
    groups = {group.filters["stem"]: group for group in report.groups if "stem" in group.filters}
    for before in free.groups:  # what lives and dies together is the same
        after = groups.get(before.filters.get("stem", ()))
        if after is not None:
            assert (after.filters, after.channels, after.tied) == (before.filters, before.channels, before.tied)
            assert (before.frozen, after.frozen) == ("", tied)
    assert len(groups) == 4
    assert not any(group.frozen for group in report.groups if "grouped" in group.filters)


def test_a_reason_of_its_own_is_not_hidden_by_the_choice_of_a_neighbour():
    report = inspect(wide(), WIDE, exclude="head.3")
    assert report["head.1"].frozen_filters == "it is tied to a layer that is excluded (head.3)"
    assert [group.frozen for group in report.groups if "head.3" in group.filters] == [
        "it is an output of the model"
    ] * 3
    assert report["head.3"].frozen_filters == "it is excluded (head.3)"


HELD = [[name] for name in WIDE_LAYERS] + [["stem", "grouped"], ["block.0", "up", "head.3"], HEAD]


def whole_in(plan: Plan, names: list[str]) -> bool:
    return all(plan[name].filters.all() and plan[name].columns.all() and plan[name].mask().all() for name in names)


def assert_as_it_was(model: nn.Module, small: nn.Module, names: list[str]) -> None:
    for name in names:
        old, new = model.get_submodule(name), small.get_submodule(name)
        assert type(old) is type(new)
        assert torch.equal(old.weight, new.weight)


@pytest.mark.parametrize("names", HELD, ids="+".join)
@pytest.mark.usefixtures("read_once")
def test_plans_leave_held_layers_whole_and_so_does_compaction(names):
    model = wide()
    report = inspect(model, WIDE, exclude=names)
    dense = report.counts()
    for filters, columns in ((0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (0.99, 0.99)):
        plan = Plan.uniform(report, filters=filters, columns=columns)
        assert whole_in(plan, names)
        plan = unused_paths(plan, report)
        assert whole_in(plan, names)
        assert plan.held == set(names)
        assert report.counts(plan).params < dense.params or not (columns or report.sets)
        small = compact(model, plan, WIDE, report=report)
        assert_as_it_was(model, small.model, names)


@pytest.mark.parametrize("names", HELD, ids="+".join)
@pytest.mark.usefixtures("read_once")
def test_what_is_dead_around_held_layers_does_not_touch_them(names):
    """Random weights of all others go, and with them whole filters before a held layer and the readers behind it."""
    model = wide()
    report, free = inspect(model, WIDE, exclude=names), inspect(model, WIDE)
    emptied = unread = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        layers = {}
        for layer in report.layers:
            kept = LayerPlan.dense(layer.shape, layer.groups, transposed=layer.transposed)
            if not layer.held:
                elements = rng.random(layer.shape) < rng.choice([0.02, 0.2])
                if layer.name == "head.3":
                    elements[:, 0] = True  # something is left of the outputs
                kept = replace(kept, elements=elements)
            layers[layer.name] = kept
        try:
            without = unused_paths(Plan(layers), free)
        except ValueError:  # nothing is left of the outputs
            continue
        plan = unused_paths(Plan(layers), report)
        assert whole_in(plan, names)
        emptied += any(not without[name].columns.all() for name in names)
        unread += any(not without[name].filters.all() for name in names)
        small = compact(model, plan, WIDE, report=report)
        assert_as_it_was(model, small.model, names)
    assert emptied or names == ["stem"], "otherwise nothing was tested"
    assert unread or names in (["head.3"], HEAD)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.usefixtures("read_once")
def test_allocations_and_admm_leave_held_layers_whole(structure):
    model, target = wide(), Target(params=1.7)
    for names in (["block.2"], ["block.0", "grouped"]):
        report = inspect(model, WIDE, exclude=names)
        dense = report.counts()
        constraints = allocate(report, target, dense, structure)
        assert not set(names) & set(constraints)
        admm = ADMM(copy.deepcopy(model), constraints, report=report)
        plan = unused_paths(admm.plan(fill(report, target, dense, constraints, admm.plan)), report)
        assert target.met(dense, report.counts(plan))
        assert whole_in(plan, names)
        assert plan.held == set(names)
    report = inspect(model, WIDE, exclude="head.1")  # more than half of all weights
    with pytest.raises(ValueError, match="cannot be met with structure"):
        allocate(report, target, report.counts(), structure)


def test_constraints_on_held_layers_are_refused():
    model = wide()
    report = inspect(model, WIDE, select=["stem", "head"], exclude="head.1")
    for name, why in (("head.1", r"it is excluded \(head\.1\)"), ("up", "it is not selected")):
        with pytest.raises(ValueError, match=f"constraints names '{name}', which stays as it is: {why}"):
            ADMM(model, {"stem": Constraint("filter", 4), name: Constraint("filter", 4)}, report=report)


def test_purification_leaves_held_layers_whole():
    model = wide()
    report = inspect(model, WIDE, exclude=["block.0", "grouped"])
    purified = purify(model, lambda _: 1.0, WIDE, tolerance=1.0, evaluations=40, report=report)
    assert whole_in(purified.plan, ["block.0", "grouped"])
    assert purified.plan["up"].weights < report["up"].weights
    assert purified.plan["head.1"].weights < report["head.1"].weights


# What is frozen by what, and what uniform pruning leaves


def frozen_one_by_one(report: Report) -> dict[str, dict[str, int]]:
    """Reason -> layer -> frozen weights: of every weight the group of its filter and that of its input channel."""
    of_filter = {(n, i): group for group in report.groups for n, index in group.filters.items() for i in index}
    of_input = {(n, i): group for group in report.groups for n, index in group.channels.items() for i in index}
    found: dict[str, dict[str, int]] = {}
    for layer in report.layers:
        rows, inside = layer.shape[0] // layer.groups, layer.shape[1]
        for p, c in np.ndindex(layer.shape[0], inside):
            group, source = of_filter[layer.name, p], of_input.get((layer.name, p // rows * inside + c))
            if group.frozen:
                per_layer = found.setdefault(layer.held or group.frozen, {})
                frozen = source is None or bool(source.frozen)
                per_layer[layer.name] = per_layer.get(layer.name, 0) + frozen * math.prod(layer.shape[2:])
    return found


class Attention(nn.Module):
    """Half of the first layer's filters go through a softmax, and the others are added to an output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = self.a(x)
        left, right = self.b(x[:, :4].softmax(1)), x[:, 4:]
        return self.d(self.c(torch.cat([left, right], 1)).relu()) + right


@pytest.mark.parametrize(
    ("model", "example", "options"),
    [
        (wide(), WIDE, {}),
        (wide(), WIDE, {"exclude": "grouped"}),
        (wide(), WIDE, {"exclude": ["stem", "up"]}),
        (wide(), WIDE, {"select": "block", "exclude": "block.0"}),
        (Attention(), torch.zeros(1, 3, 6, 6), {}),
        (Attention(), torch.zeros(1, 3, 6, 6), {"exclude": "d"}),
        (Partly(), torch.zeros(1, 4), {}),
        (Between(nn.Softmax(dim=1)), torch.zeros(1, 3, 12, 12), {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value) if value is not WIDE else "",
)
def test_every_frozen_weight_counts_for_the_reason_of_its_filter(model, example, options):
    report = inspect(model, example, **options)
    expected = frozen_one_by_one(report)
    assert {one.reason: set(one.layers) for one in report.frozen_by} == {r: set(names) for r, names in expected.items()}
    for one in report.frozen_by:
        weights = expected[one.reason]
        assert one.params == sum(weights.values())
        assert one.macs == sum(count * report[name].outputs for name, count in weights.items())
    macs = [one.macs for one in report.frozen_by]
    assert macs == sorted(macs, reverse=True)
    assert sum(macs) == report.macs - report.prunable_macs
    assert sum(one.params for one in report.frozen_by) == report.params - report.prunable_params
    for one in report.frozen_by:
        if one.reason.startswith(("it is excluded", "it is not selected")):
            assert one.macs == sum(report[name].macs for name in one.layers)


def test_what_is_frozen_by_an_operator_names_it_and_its_line():
    report = inspect(Attention(), torch.zeros(1, 3, 6, 6))
    reasons = {one.reason: one for one in report.frozen_by}
    (softmax,) = (reason for reason in reasons if "aten.softmax" in reason)
    assert "(test_graph.py:" in softmax
    assert reasons[softmax] == Frozen(softmax, ("a",), 4 * 27 * 16, 4 * 27)


def test_groups_that_are_alike_are_one_kind():
    report = inspect(wide(), WIDE)
    tied = tuple(f"norm.{part}" for part in ("weight", "bias", "running_mean", "running_var"))
    channels = {"block.0": 1, "depth": 1, "grouped": 1, "up": 1}
    added, inner, grouped, up, hidden, outputs = report.kinds
    assert added.frozen == inner.frozen == grouped.frozen == up.frozen == hidden.frozen == ""
    assert added.tied == tied
    assert sum(kind.groups for kind in report.kinds) == len(report.groups)
    # The two groups of `grouped` stay alike: the i-th inputs of both go together, and so do the i-th filters.
    assert added.filters == {"stem": 2, "block.2": 2, "depth": 2}
    assert added.channels == {name: 2 * count for name, count in channels.items()}
    assert (added.groups, inner.groups, grouped.groups, up.groups, hidden.groups, outputs.groups) == (4, 6, 6, 4, 10, 3)
    assert (dict(inner.filters), dict(inner.channels)) == ({"block.0": 1}, {"block.2": 1})
    assert (dict(grouped.filters), dict(grouped.channels)) == ({"grouped": 2}, {"up": 2})
    assert (dict(up.filters), dict(up.channels)) == ({"up": 1}, {"head.1": 64})
    assert outputs == Kind({"head.3": 1}, {}, (), 3, "it is an output of the model")


def test_predictions_are_what_compaction_leaves():
    model = wide()
    for exclude in ([], ["grouped"]):
        report = inspect(model, WIDE, exclude=exclude)
        for filters, columns in ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (0.5, 0.0)):
            small = compact(model, Plan.uniform(report, filters=filters, columns=columns), WIDE, report=report).model
            assert report.predict(filters=filters, columns=columns) == expected_sizes_of_wide(small)
        plan = unused_paths(Plan.uniform(report, filters=0.25, columns=0.5), report)
        assert report.predict(0.25, 0.5) == report.counts(plan)
        assert report.predict() == report.counts()
    with pytest.raises(ValueError, match="filters is the share removed"):
        report.predict(filters=1.0)


def expected_sizes_of_wide(model: nn.Module) -> Counts:
    weights = {name: m.weight.numel() for name, m in model.named_modules() if getattr(m, "weight", None) is not None}
    del weights["norm"]
    linear = sum(weights[name] for name in HEAD)
    params = sum(weights.values())
    return Counts(params - linear, params, 16 * (params - linear) + linear)


def test_a_report_is_printed_in_tables_and_shown_in_a_line():
    report = inspect(wide(), WIDE, exclude="up")
    assert repr(report) == f"Report(Wide: 8 layers, {report.params:,} weights, {report.macs:,} MACs)"
    assert "it is excluded (up)" in str(report)
    assert str(report) == str(Inspection(report))
