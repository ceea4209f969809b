"""`inspect`: what of every kind of network can be pruned, what is frozen or left out, and why."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress_fast import models
from autocompress_fast.compact import compact
from autocompress_fast.graph import Counts, Layer, Report, inspect
from autocompress_fast.plan import LayerPlan, Plan

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
    assert report.links() == {"conv2": "conv1", "fc1": "conv2", "fc2": "fc1"}
    assert (report.params, report.conv_params) == (430_500, 25_500)
    assert report["conv2"].link.positions == 16
    assert report["conv1"].outputs == 24 * 24
    assert report.macs == 500 * 576 + 25_000 * 64 + 400_000 + 5_000
    assert report.frozen == {"fc2": "filters: it is the output layer"}
    assert report.skipped == {}
    assert report.prunable_macs == report.macs  # columns of the output layer, too
    assert report.producer("fc1") is report["conv2"]
    assert report.producer("conv1") is None


def test_vgg16_is_a_chain_with_normalisations():
    model = models.create("vgg16", width=8)
    report = inspect(model, torch.zeros(1, 3, 32, 32))
    assert len(report.layers) == 14
    assert list(report.frozen) == ["classifier"]
    for before, after in zip(report.layers, report.layers[1:], strict=False):
        assert before.link.consumer == after.name
        assert len(before.link.norms) == 1
        assert isinstance(model.get_submodule(before.link.norms[0]), nn.BatchNorm2d)
        assert model.get_submodule(before.link.norms[0]).num_features == before.shape[0]


def test_vgg16_has_the_size_of_the_papers():
    report = report_of("vgg16")
    assert report.conv_params == 14_710_464
    assert report.macs == 313_201_664


def test_resnet20_freezes_what_goes_into_the_additions():
    report = report_of("resnet20")
    first = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    second = [f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in range(3)]
    assert report.links() == dict(zip(second, first, strict=True))
    for name in second:
        assert report.frozen[name].startswith("filters: its output goes into aten.add.Tensor in layer")
        assert "resnet.py" in report.frozen[name]
        assert report[name].columns_prunable
    assert report.frozen["conv1"] == "filters: its output goes to 2 operators (conv2d, add)"
    assert set(report.frozen) == {*second, "conv1", "linear"}


def test_mobilenet_freezes_the_grouped_and_what_feeds_them():
    report = report_of("mobilenet_v2")
    grouped = [layer for layer in report.layers if layer.groups > 1]
    assert len(grouped) == 17
    for layer in grouped:
        assert layer.shape[1] == 1
        reason = f"it is a grouped convolution ({layer.groups} groups)"
        assert report.frozen[layer.name] == f"filters: {reason}; columns: {reason}"
        assert layer.columns == layer.shape[0] * 9
    assert "goes into 32 groups of aten.conv2d.default in features.1.conv.0.0" in report.frozen["features.0.0"]
    assert report["features.18.0"].link.consumer == "classifier.1"
    assert report.prunable_macs == sum(layer.macs for layer in report.layers if layer.groups == 1)


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
    "reflection": nn.ReflectionPad2d(1),
    "replication": nn.ReplicationPad2d((1, 2, 0, 1)),
    "several": nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout()),
}


@pytest.mark.parametrize("between", TRANSPARENT.values(), ids=TRANSPARENT.keys())
def test_operators_that_keep_channels_apart_are_followed(between):
    report = inspect(Between(between), torch.zeros(1, 3, 12, 12))
    assert report.links() == {"second": "first"}
    norm = isinstance(between, nn.BatchNorm2d) or (isinstance(between, nn.Sequential) and "between.0")
    assert len(report["first"].link.norms) == bool(norm)


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


OPAQUE = {
    "softmax over channels": (nn.Softmax(dim=1), "aten.softmax"),
    "layer norm": (nn.LayerNorm(10), "aten.layer_norm"),
    "group norm": (nn.GroupNorm(2, 8), "aten.group_norm"),
    "instance norm": (nn.InstanceNorm2d(8), "instance_norm"),
    "a transposed view": (lambda x: x.transpose(2, 3), "aten.transpose"),
    "a slice of channels": (lambda x: torch.cat([x[:, 4:], x[:, :4]], 1), "goes to 2 operators (slice, slice)"),
    "a sum with itself": (Twice(), "is not the first operand of aten.add"),
    "a prelu": (nn.PReLU(8), "prelu"),
    "padding": (nn.ZeroPad2d(1), "aten.pad"),
    "pixel shuffle and back": (nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2)), "aten.pixel_shuffle"),
    "batch norm without statistics": (nn.BatchNorm2d(8, track_running_stats=False), "no running statistics"),
    "batch norm of others": (OfOthers(), "shares its parameters"),
}


@pytest.mark.parametrize(("between", "reason"), OPAQUE.values(), ids=OPAQUE.keys())
def test_other_operators_freeze_with_the_reason(between, reason):
    report = inspect(Between(between), torch.zeros(1, 3, 12, 12))
    assert reason in report.frozen["first"]
    assert report.links() == {}
    assert report["first"].columns_prunable


def test_a_normalisation_behind_two_layers_is_shared():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.c(self.norm(self.b(self.norm(self.a(x)))))

    report = inspect(Net(), torch.zeros(2, 4))
    assert "shares its parameters" in report.frozen["a"]
    assert "shares its parameters" in report.frozen["b"]


def test_a_normalisation_of_flattened_values_freezes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.BatchNorm1d(8 * 16), nn.Linear(8 * 16, 4))
    assert "is reshaped before aten.batch_norm" in inspect(model, torch.zeros(2, 3, 6, 6)).frozen["0"]


@pytest.mark.parametrize(
    "flatten", [lambda x: x.flatten(1), lambda x: x.view(x.shape[0], -1), lambda x: torch.flatten(x, 1)]
)
def test_flattening_is_followed(flatten):
    report = inspect(Between(flatten, nn.Linear(8 * 100, 4)), torch.zeros(1, 3, 12, 12))
    assert report["first"].link.positions == 100


def test_other_reshapes_freeze():
    for between, second in (
        (lambda x: x.reshape(-1, 100), nn.Linear(100, 4)),
        (lambda x: x.flatten(2), nn.Linear(100, 4)),
    ):
        assert "reshapes" in inspect(Between(between, second), torch.zeros(1, 3, 12, 12)).frozen["first"]


def test_layers_on_every_position_freeze():
    report = inspect(Between(nn.ReLU(), nn.Linear(10, 4)), torch.zeros(1, 3, 12, 12))
    assert "aten.linear.default in second" in report.frozen["first"]
    assert "with 4 dimensions" in report.frozen["first"]
    sequence = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    assert "has 3 dimensions" in inspect(sequence, torch.zeros(1, 3, 2)).frozen["0"]


def test_inputs_without_a_batch_freeze():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 3))
    assert "has 2 dimensions" in inspect(model, torch.zeros(2, 9)).frozen["0"]


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
        "body": "filters: its output goes to 2 operators (linear, linear)",
        "a": "filters: it is the output layer",
        "b": "filters: it is the output layer",
    }


def test_a_value_that_is_an_output_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.body(x).relu()
            return x, self.head(x)

    assert inspect(Net(), torch.zeros(1, 4)).frozen["body"] == "filters: it is an output of the model"


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


def test_a_module_called_twice_is_left_out():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared, nn.Conv2d(4, 2, 3))
    report = inspect(model, torch.zeros(1, 3, 12, 12))
    assert [layer.name for layer in report.layers] == ["0", "4"]
    assert report.skipped == {"1": "its weight is used more than once, or has several names"}
    assert "whose weight is no plain parameter of one layer" in report.frozen["0"]
    with pytest.raises(KeyError, match="has no layer '1': its weight is used more than once"):
        report["1"]


def test_tied_weights_are_left_out():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    report = inspect(nn.Sequential(first, nn.ReLU(), second, nn.Linear(4, 2)), torch.zeros(1, 4))
    assert report.skipped == {"0": "its weight is used more than once, or has several names"}
    assert [layer.name for layer in report.layers] == ["3"]


def test_tied_biases_are_left_out():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.bias = first.bias
    report = inspect(nn.Sequential(first, nn.ReLU(), second, nn.Linear(4, 2)), torch.zeros(1, 4))
    assert report.skipped == dict.fromkeys(("0", "2"), "its bias is used more than once, or has several names")


def test_a_module_with_two_names_is_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model.add_module("again", nn.Identity())
    model.again.alias = model[0]
    assert list(inspect(model, torch.zeros(1, 4)).skipped) == ["0"]


def test_computed_weights_are_left_out():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 3))
    report = inspect(model, torch.zeros(1, 3, 12, 12))
    assert report.skipped == {"0": "its weight is computed, or belongs to another layer"}
    assert [layer.name for layer in report.layers] == ["2"]


def test_functional_weights_are_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Parameter(torch.zeros(4, 4))
            self.borrowed, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = F.linear(x, self.own)
            return self.head(F.linear(x, self.borrowed.weight, self.borrowed.bias))

    report = inspect(Net(), torch.zeros(1, 4))
    reason = "the linear is called by the model itself, not by a convolution or linear layer in it"
    assert report.skipped == {"own": reason, "borrowed": reason}
    assert [layer.name for layer in report.layers] == ["head"]


def test_layers_of_the_users_own_are_left_out():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

        def forward(self, x):
            return F.linear(x, self.weight)

    report = inspect(nn.Sequential(Mine(), nn.Linear(4, 2)), torch.zeros(1, 4))
    assert report.skipped == {"0": "the linear is called by Mine '0', not by a convolution or linear layer in it"}


def test_a_model_that_is_one_layer_is_left_out():
    report = inspect(nn.Linear(4, 2), torch.zeros(1, 4))
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
    assert "ColumnConv2d '0'" in report.skipped["0"]
    assert "ColumnLinear '3'" in report.skipped["3"]


def test_subclasses_of_layers_are_layers():
    class Mine(nn.Conv2d):
        pass

    report = inspect(nn.Sequential(Mine(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), torch.zeros(1, 3, 8, 8))
    assert report.links() == {"2": "0"}


def test_convolutions_of_one_and_three_dimensions():
    for conv, example in ((nn.Conv1d, torch.zeros(1, 2, 9)), (nn.Conv3d, torch.zeros(1, 2, 6, 6, 6))):
        report = inspect(nn.Sequential(conv(2, 4, 3), nn.ReLU(), conv(4, 3, 3)), example)
        assert report.links() == {"2": "0"}
        side = example.shape[2]
        rank = example.ndim - 2
        assert report["2"].macs == 3 * 4 * 3**rank * (side - 4) ** rank
        assert report["2"].kind == f"conv{rank}d"


def test_layer_sizes():
    layer = Layer("a", "conv2d", (6, 2, 3, 3), 3, 10, None, "", "because")
    assert layer.weights == 6 * 18
    assert layer.columns == 3 * 18
    assert layer.macs == 1080
    assert layer.is_conv
    assert layer.filters_prunable
    assert not layer.columns_prunable
    assert math.prod(layer.shape) == layer.weights
