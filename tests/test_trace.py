"""Reading a torch model as a flat list of operators."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress_fast import models
from autocompress_fast.trace import BATCH, Ref, Tensor, TraceError, trace


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(traced, *inputs):
    """What the recorded operators compute: an interpreter of traces, the oracle that nothing was lost."""
    values = {given.name: x for given, x in zip(traced.inputs, inputs, strict=True)}

    def resolve(value):
        if isinstance(value, Ref):
            return values[value.name]
        if isinstance(value, Tensor):
            return traced.tensors[value.name]
        if isinstance(value, tuple):
            return [resolve(item) for item in value]
        return len(inputs[0]) if value is BATCH else value

    with torch.no_grad():
        for node in traced.nodes:
            args, kwargs = resolve(node.args), {key: resolve(value) for key, value in node.kwargs.items()}
            if node.op == "getitem":
                values[node.name] = args[0][args[1]]
                continue
            namespace, name, overload = node.target.split(".")
            operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
            args = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]  # in-place forms: the value is new
            values[node.name] = operator(*args, **kwargs)
        return [resolve(output) for output in traced.outputs]


def same(traced, model, *inputs):
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(copy.deepcopy(model).eval()(*inputs))
    found = run(traced, *inputs)
    assert len(found) == len(expected)
    for y, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)


class WithoutAutocast(nn.Module):
    """Two regions, one in the other, whose results are used outside, and a parameter that is used inside."""

    def __init__(self, enabled: bool = False) -> None:
        super().__init__()
        self.conv, self.scale, self.enabled = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4, 1, 1)), enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        with torch.autocast("cpu", enabled=self.enabled):
            low, high = (y * self.scale).chunk(2, 1)
            with torch.autocast("cpu", enabled=False):
                low = low.sigmoid() + 1
        return torch.cat([low, high, y], 1).relu()


def test_regions_without_autocast_are_read_as_what_is_in_them():
    torch.manual_seed(0)
    model, x = WithoutAutocast(), torch.randn(2, 3, 6, 6)
    traced = trace(model, x)
    assert [node.op for node in traced.nodes if node.op != "getitem"] == "conv2d mul chunk sigmoid add cat relu".split()
    assert len({node.name for node in traced.nodes}) == len(traced.nodes)
    same(traced, model, x)


def test_regions_with_autocast_are_refused():
    with pytest.raises(TraceError, match="nested graph"):
        trace(WithoutAutocast(enabled=True), torch.zeros(2, 3, 6, 6))


class Everything(nn.Module):
    """In-place operators, a shared weight, a constant, several results, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.side, self.drop = nn.Conv2d(3, 8, 1), nn.Dropout()
        self.first, self.second, self.third = nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.third.weight = self.second.weight
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, x):
        x = x - torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
        y = self.relu(self.norm(self.conv(x)))
        y += self.side(x)
        kept = y
        self.relu(y)
        left, right = torch.chunk(kept, 2, 1)
        y = torch.cat([right, left], 1)
        with torch.no_grad():
            y = self.drop(F.adaptive_avg_pool2d(y, 1)).flatten(1) * self.scale
        return {"scores": self.third(self.second(self.first(y))), "mean": y.mean(-1)}


class WritesThroughView(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.conv(x))
        y[:, :2] += 1
        return y * 2


def test_records_what_the_model_computes():
    model, x = Everything(), torch.randn(2, 3, 8, 8)
    model.norm.running_mean.uniform_(-1, 1)
    traced = trace(model, x)
    same(traced, model, x)
    same(traced, model, torch.randn(5, 3, 8, 8))
    assert len(traced.outputs) == 2


def test_a_write_into_a_slice_reaches_its_base():
    model = WritesThroughView()
    model.norm.running_mean.uniform_(-1, 1)
    traced = trace(model, torch.zeros(1, 3, 4, 4))
    same(traced, model, torch.randn(3, 3, 4, 4))
    norms = [node for node in traced.nodes if node.op == "batch_norm"]
    assert len(norms) == 1
    assert norms[0].args[3] == Tensor("norm.running_mean")


@pytest.mark.parametrize("name", ["lenet5", "lenet_digits", "resnet20"])
def test_our_models(name):
    model, shape = models.create(name), models.input_shape(name)
    traced = trace(model, torch.zeros(1, *shape))
    same(traced, model, torch.randn(2, *shape))
    assert traced.dynamic_batch
    assert set(traced.tensors) == set(model.state_dict())
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert {node.module for node in traced.nodes if node.op in ("conv2d", "linear")} == layers


def test_names_modules_sources_and_arguments():
    model = Everything()
    traced = trace(model, torch.zeros(1, 3, 8, 8))
    (given,) = traced.inputs
    assert (given.shape, given.dtype) == ((BATCH, 3, 8, 8), "float32")
    conv = next(node for node in traced.nodes if node.op == "conv2d")
    subtracted = next(node for node in traced.nodes if node.op == "sub")
    expected = (Ref(subtracted.name), Tensor("conv.weight"), Tensor("conv.bias"), (1, 1), (1, 1), (1, 1), 1)
    assert conv.args == expected  # defaults filled in
    assert conv.operands == expected[:3]
    assert (conv.module, conv.dtype, conv.shape) == ("conv", "float32", (BATCH, 8, 8, 8))
    line = Everything.forward.__code__.co_firstlineno + 2
    assert conv.source == f"test_trace.py:{line} in forward"
    assert conv.where == f"aten.conv2d.default in conv ({conv.source})"
    assert {node.op for node in traced.nodes} >= {"relu", "add", "chunk", "getitem", "cat", "flatten", "mean"}
    assert traced.node(conv.name) is conv
    assert traced.node(given.name) is None
    assert [node.name for node in traced.users("conv.weight")] == [conv.name]
    assert {node.op for node in traced.users(subtracted.name)} == {"conv2d"}
    assert traced.users("nothing") == ()


def test_order_and_names_are_sound():
    traced = trace(Everything(), torch.zeros(1, 3, 8, 8))
    known = {given.name for given in traced.inputs}
    for node in traced.nodes:
        for operand in node.operands:
            assert operand.name in (traced.tensors if isinstance(operand, Tensor) else known)
        assert node.name not in known | set(traced.tensors)
        known.add(node.name)


def test_an_input_named_like_a_parameter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.x

    traced = trace(Model(), torch.zeros(2, 3))
    assert traced.inputs[0].name != "x"
    assert [node.op for node in traced.users("x")] == ["mul"]


def test_shared_weights_have_one_name():
    model = Everything()
    traced = trace(model, torch.zeros(1, 3, 8, 8))
    assert traced.aliases == {"third.weight": "second.weight"}
    assert len(traced.users("second.weight")) == 2
    assert "third.weight" not in traced.tensors
    assert traced.tensors["second.weight"].data_ptr() == model.third.weight.data_ptr()


def test_the_model_is_left_as_it_is():
    model = Everything().train()
    model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    trace(model, torch.randn(4, 3, 8, 8))
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_for_one_batch_size():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(4, -1)

    traced = trace(Fixed(), torch.zeros(4, 2, 3))
    assert not traced.dynamic_batch
    assert traced.inputs[0].shape == (4, 2, 3)
    assert traced.nodes[0].shape == (4, 6)


def test_several_inputs():
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b, a

    traced = trace(Two(), (torch.zeros(1, 3), torch.zeros(1, 3)))
    assert traced.dynamic_batch
    assert [given.name for given in traced.inputs] == ["a", "b"]
    assert traced.outputs[1] == Ref("a")


def test_changes_of_buffers_are_no_outputs():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls[:1] += 1
            return x * 2

    model = Counts()
    traced = trace(model, torch.zeros(1, 3))
    assert len(traced.outputs) == 1
    assert model.calls == 0


def test_a_number_made_of_the_batch_size_is_not_minus_one():
    class Model(nn.Module):
        def forward(self, x):
            return (x * x.shape[0]).reshape(-1, 3)

    traced = trace(Model(), torch.zeros(2, 3))
    assert traced.nodes[0].args[1] is BATCH
    assert traced.nodes[1].args[1][0] is not BATCH
    assert repr(traced.inputs[0].shape) == "(BATCH, 3)"


def test_of_a_model_that_looks_at_its_data_the_path_of_the_example_is_read():
    """Writes in place, parameters of the model and constants are all in it."""

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.norm(self.first(x))
            y = y.relu_() if float(x.sum()) > 0 else y.neg_()
            y += torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
            return {"mean": self.last(y.mean((2, 3))), "all": y}

    model, x = Looks(), torch.rand(2, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    for sign, op in ((1, "relu"), (-1, "neg")):
        traced = trace(model, sign * x)
        assert not traced.dynamic_batch
        same(traced, model, sign * x)
        same(traced, model, sign * torch.rand(2, 3, 6, 6))
        ops = {node.op for node in traced.nodes}
        assert op in ops
        assert not {"relu", "neg"} - {op} & ops
        layers = [node for node in traced.nodes if node.op in ("conv2d", "linear")]
        assert [(node.args[1], node.module) for node in layers] == [
            (Tensor("first.weight"), "first"),
            (Tensor("last.weight"), "last"),
        ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_write_into_a_slice_reaches_its_base_on_the_path_of_the_example_too():
    class Looks(nn.Module):
        def forward(self, x):
            y = x * 2 if float(x.sum()) > 0 else -x
            y[:, :2] += 1
            return y * 3

    for x, op in ((torch.ones(2, 3), "mul"), (-torch.ones(2, 3), "neg")):
        traced = trace(Looks(), x)
        same(traced, Looks(), x)
        assert op in {node.op for node in traced.nodes}


class Fails(nn.Module):
    def forward(self, x):
        return self.missing(x) if x.sum() > 0 else self.nothing(x)


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Fails(), r"cannot trace Fails: .*"),
        (Uncopyable(), r"cannot trace Uncopyable: it cannot be copied: RuntimeError: one of a kind"),
        (nn.Linear(3, 2), r"cannot trace Linear: .*"),
    ],
)
def test_what_cannot_be_traced_has_one_error(model, message, capfd, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(TraceError, match=message) as caught:
        trace(model, torch.zeros(2, 5))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_arguments_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not function"):
        trace(lambda x: x, torch.zeros(1))
    for wrong in ([], [1.0], 3.0, "x", None):
        with pytest.raises(TypeError, match="example_input must be a tensor or a sequence of tensors"):
            trace(nn.ReLU(), wrong)
