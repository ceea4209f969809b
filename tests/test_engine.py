"""Lowering and running: the engine computes what torch computes, or says why it cannot."""

import copy
import math
import random
import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autocompress_fast as acf
from autocompress_fast import _core, models
from autocompress_fast.compact import ColumnConv2d, ColumnLinear
from autocompress_fast.engine import Engine, UnsupportedError, VerificationError, native
from autocompress_fast.engine.lower import verify
from autocompress_fast.engine.program import Input, Program, ProgramError, Step, pool_output_size, validate

EPSILON = 2.0**-24  # half a unit in the last place of 1.0, the error of one float32 operation


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough for more
    yield
    torch.set_num_threads(threads)


def exact(model, *inputs):
    """What the model computes in float64."""
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval().double()(*(x.double() for x in inputs))
    return torch.utils._pytree.tree_leaves(outputs)


def with_every_isa(program):
    """Engines of a program with each instruction set in turn; reading the model, which takes longest, is done once."""
    for isa in _core.supported_isas():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACF_FORCE_ISA", isa)
            assert _core.reload_isa() == isa
            yield isa, Engine(program)
    _core.reload_isa()


def check(model, *shape, rounding=32, batches=(1, 3)):
    """Compile for batch 2 and compare on others with float64: at most `rounding` errors of the largest value."""
    compiled = acf.compile(model, torch.randn(2, *shape))
    expected = [(x, exact(model, x)) for x in (torch.randn(batch, *shape) for batch in batches)]
    for isa, engine in with_every_isa(compiled.program):
        for x, all_wanted in expected:
            found = engine(x)
            for y, wanted in zip(found if isinstance(found, tuple) else (found,), all_wanted, strict=True):
                assert y.shape == wanted.shape
                assert y.dtype == torch.float32
                assert float((y - wanted).abs().max()) <= rounding * EPSILON * float(wanted.abs().max()), isa
    return compiled


def check_product(layer, *shape):
    """Convolutions and linear layers: each output is a sum of K products, its error at most (K + 2) times theirs.

    |error| <= (K + 2) * epsilon * (sum |w| |x| + |b|), the standard bound of a dot product in any order.
    """
    compiled = acf.compile(layer, torch.randn(2, *shape))
    x = torch.randn(3, *shape)
    (wanted,) = exact(layer, x)
    magnitudes = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in magnitudes.parameters():
            parameter.abs_()
    (sums,) = exact(magnitudes, x.abs())
    terms = layer.weight[0].numel()
    for isa, engine in with_every_isa(compiled.program):
        assert bool(((engine(x) - wanted).abs() <= (terms + 2) * EPSILON * sums).all()), isa
    return compiled


def random_conv(draw):
    groups = draw.choice([1, 1, 1, 2, 3])
    channels, filters = groups * draw.randint(1, 4), groups * draw.randint(1, 5)
    if draw.random() < 0.25:
        groups = filters = channels  # depthwise
    kernel, dilation = (draw.randint(1, 4), draw.randint(1, 5)), (draw.randint(1, 3), draw.randint(1, 2))
    stride, padding = (draw.randint(1, 3), draw.randint(1, 3)), (draw.randint(0, 3), draw.randint(0, 2))
    size = [max(1, d * (k - 1) + 1 - 2 * p) + draw.randint(0, 6) for k, d, p in zip(kernel, dilation, padding)]  # noqa: B905
    layer = nn.Conv2d(channels, filters, kernel, stride, padding, dilation, groups, bias=draw.random() < 0.5)
    return layer, (channels, *size)


@pytest.mark.parametrize("seed", range(24))
def test_convolutions_of_any_shape(seed):
    draw = random.Random(seed)
    layer, shape = random_conv(draw)
    kept = draw.choice([1.0, 0.5, 0.1])
    with torch.no_grad():  # element-sparse weights of every density
        layer.weight *= torch.rand_like(layer.weight) < kept
    check_product(layer, *shape)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding):
    check_product(nn.Conv2d(2, 3, (4, 3), padding=padding, dilation=(1, 2)), 2, 9, 8)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_linear_layers(shape):
    check_product(nn.Linear(7, 5), *shape)
    check_product(nn.Linear(7, 1, bias=False), *shape)


@pytest.mark.parametrize("seed", range(24))
def test_pools_of_any_shape(seed):
    draw = random.Random(seed)
    kernel = (draw.randint(1, 4), draw.randint(2, 5))
    stride, ceil = (draw.randint(1, 4), draw.randint(1, 3)), draw.random() < 0.5
    padding = (draw.randint(0, kernel[0] // 2), draw.randint(0, kernel[1] // 2))
    size = tuple(k + draw.randint(0, 7) for k in kernel)
    if seed % 2:
        check(nn.AvgPool2d(kernel, stride, padding, ceil, count_include_pad=draw.random() < 0.5), 3, *size)
        return
    dilation = (draw.randint(1, 2), draw.randint(1, 3))
    size = tuple(n + (d - 1) * (k - 1) for n, d, k in zip(size, dilation, kernel, strict=True))
    check(nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil), 3, *size, rounding=0)


def test_pool_sizes_are_those_of_torch():
    draw = random.Random(0)
    for _ in range(300):
        kernel, stride, dilation, ceil = draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 3), draw.random() < 0.5
        padding, size = draw.randint(0, kernel // 2), draw.randint(dilation * (kernel - 1) + 1, 20)
        wanted = F.max_pool1d(torch.zeros(1, 1, size), kernel, stride, padding, dilation, ceil_mode=ceil).shape[-1]
        assert pool_output_size(size, kernel, stride, padding, dilation, ceil) == wanted


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


COLUMN = torch.tensor([0.5, -2.0, 3.0]).view(3, 1, 1)

ROW = torch.arange(14.0).view(1, 2, 7)


FUNCTIONS = {
    "relu": lambda x: F.relu(x),
    "relu6": lambda x: F.relu6(x * 5),
    "silu": lambda x: F.silu(x),
    "hardswish": lambda x: F.hardswish(x * 3),
    "gelu": lambda x: F.gelu(x * 3),
    "layer_norm": lambda x: F.layer_norm(x * 5 + 1, (7,), torch.arange(7.0).to(x), torch.ones(7).to(x)),
    "layer_norm of several dimensions": lambda x: F.layer_norm(x, (5, 7), eps=0.1),
    "layer_norm of channels": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (3,)).permute(0, 3, 1, 2),
    "sigmoid": lambda x: torch.sigmoid(x * 30),
    "hardsigmoid": lambda x: F.hardsigmoid(x * 3),
    "tanh": lambda x: torch.tanh(x),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.25),
    "clamp below": lambda x: x.clamp(min=0.1),
    "clamp above": lambda x: x.clamp(max=0.1),
    "softmax": lambda x: F.softmax(x, 1),
    "softmax of large numbers": lambda x: F.softmax(x * 300, -1),
    "log_softmax": lambda x: F.log_softmax(x, 2),
    "add": lambda x: x + 0.5,
    "add to a number": lambda x: 0.5 + x,
    "sub": lambda x: x - COLUMN,
    "sub from a tensor": lambda x: COLUMN - x,
    "sub from a number": lambda x: 1 - x,
    "sub scaled": lambda x: torch.sub(x, F.relu(x), alpha=3),
    "sub scaled from a number": lambda x: torch.rsub(x, 1.5, alpha=2),
    "mul": lambda x: x * COLUMN,
    "div": lambda x: x / COLUMN,
    "add values": lambda x: x + x * 2,
    "add scaled": lambda x: torch.add(x, F.relu(x), alpha=0.25),
    "sub values": lambda x: x - F.relu(x),
    "mul values": lambda x: x * x.mean((2, 3), keepdim=True),
    "div values": lambda x: x / (1 + F.relu(x)),
    "mean": lambda x: x.mean((1, 3)),
    "mean kept": lambda x: x.mean(-1, keepdim=True),
    "mean of an image": lambda x: x.mean((2, 3)),
    "concat": lambda x: torch.cat([x, x * 2, x[:, :1]], 1),
    "concat zeros": lambda x: torch.cat([x, torch.zeros_like(x)], 1),
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(-1, 3, 35),
    "unsqueeze, squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "mean of all, plus a number": lambda x: x.mean((1, 2, 3)) + 0.5,
    "transpose": lambda x: x.transpose(1, -1).contiguous().view(x.size(0), -1),
    "shuffle": lambda x: torch.cat([x, x * 2], 1).view(-1, 2, 3, 5, 7).transpose(1, 2).reshape(-1, 6, 5, 7),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=1.5),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)),
    "slice": lambda x: x[:, 1:, ::2, -3:],
    "select": lambda x: x[:, 1, 2] + x.select(-2, -1)[:, 2],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "split": lambda x: torch.cat(x.split([2, 1, 4], -1)[::-1], -1),
    "split equally": lambda x: torch.cat(x.split(3, -1)[::-1], -1),
    "chunk": lambda x: torch.cat(torch.chunk(x, 3, 3)[::-1], 3),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0, 2])),
    "index": lambda x: x[:, :, torch.tensor([-1, 0])],
    "dropout": lambda x: F.dropout(x, training=False),
    "copies": lambda x: x.to(torch.float32).clone().detach(),
    "several": lambda x: {"a": x + 1, "b": (x, x * 2)},
    "global pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive pool, same size": lambda x: F.adaptive_avg_pool2d(x, (5, 7)) + 0.5,
    "adaptive pool, even": lambda x: F.adaptive_avg_pool2d(x, (5, 1)),
    "adaptive pool, uneven": lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
    "adaptive pool, larger": lambda x: F.adaptive_avg_pool2d(x, (8, 9)),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=(1, -1)),
    "normalise": lambda x: F.normalize(x, dim=2),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "matmul with a constant": lambda x: x @ torch.arange(14.0).view(7, 2).to(x),
    "bmm": lambda x: torch.bmm(x.reshape(-1, 5, 7), x.reshape(-1, 7, 5)).reshape(-1, 3, 5, 5),
    "einsum": lambda x: torch.einsum("b c i d, b c j d -> b c i j", x, x * 2),
    "einsum, turned": lambda x: torch.einsum("bcdi, bcdj -> bcij", x, x * 2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x[:, :, 1:] * 2, x[:, :, 1:, :4]),
    "attention, scaled": lambda x: F.scaled_dot_product_attention(x, x, x, scale=-0.1),
    "attention, causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention, shifted": lambda x: F.scaled_dot_product_attention(x, x, x, torch.arange(25.0).view(5, 5).to(x)),
    "attention, masked": lambda x: F.scaled_dot_product_attention(x, x, x, torch.arange(25).view(5, 5) % 3 > 0),
    "roll": lambda x: torch.roll(x, (1, -2), (2, 3)),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 4, -1) + 0.5,
    "concat a constant": lambda x: torch.cat([COLUMN.to(x).expand(x.shape[0], 3, 5, 1), x], 3),
    "concat constants": lambda x: torch.cat(
        [x, ROW.to(x).expand(x.shape[0], 3, 2, 7), x * 2, ROW.to(x).expand(x.shape[0], 3, 2, 7)], 2
    ),
    "batch behind": lambda x: F.softmax(x.transpose(0, 2) + 1, 1).transpose(0, 2),
    "batch behind, constant": lambda x: (x.permute(2, 3, 0, 1) * COLUMN[:, 0, 0].to(x)).permute(2, 3, 0, 1),
    "batch of parts": lambda x: (x.reshape(-1, 7).softmax(-1) + torch.ones(1, 7).to(x)).view(-1, 3, 5, 7),
    "parts of a batch": lambda x: x.transpose(0, 1).reshape(-1, 5, 7)[:, 1:].mean(-1).view(3, -1, 4).transpose(0, 1),
    "new tensors": lambda x: x + x.new_full((5, 1), 2.0) + x.new_zeros(7),
    "constants": lambda x: x + torch.arange(7.0) * torch.full((5, 1), 2.0),
}


class Attention(nn.Module):
    """A block of a transformer, whose attention reads queries of its own length."""

    def __init__(self, features, heads, batch_first, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(features, heads, batch_first=batch_first, **options)
        self.norm, self.linear = nn.LayerNorm(features), nn.Linear(features, 2 * features)
        self.batch_first = batch_first
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x):
        y = self.norm(x) if self.batch_first else self.norm(x).transpose(0, 1)
        y, _ = self.attention(y, y, y, need_weights=False)
        y = y if self.batch_first else y.transpose(0, 1)
        return F.gelu(self.linear(x + y))[:, 0]


@pytest.mark.parametrize(("heads", "features"), [(1, 5), (2, 34), (3, 21), (4, 64), (7, 7)])
@pytest.mark.parametrize("tokens", [1, 5, 50])
def test_attention_of_several_heads(tokens, heads, features):
    engine = check(Attention(features, heads, batch_first=heads % 2 == 0), tokens, features, rounding=64)
    assert [s.op for s in engine.program.steps].count("attention") == 1


def test_attention_counts_its_products():
    step = acf.compile(Function(lambda x: F.scaled_dot_product_attention(x, x, x[..., :3])), torch.zeros(1, 2, 5, 4))
    assert step.summary().macs == 2 * 5 * 5 * (4 + 3)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators(name):
    check(Function(FUNCTIONS[name]), 3, 5, 7, rounding=64)


def norm(kind, channels):
    layer = kind(channels)
    with torch.no_grad():
        for value in (layer.running_mean, layer.weight, layer.bias):
            value.normal_()
        layer.running_var.uniform_(0.2, 3)
    return layer


def test_normalisation_is_folded():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), norm(nn.BatchNorm2d, 6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), norm(nn.BatchNorm2d, 6), nn.ReLU6(),
        nn.Flatten(), nn.Linear(96, 5), norm(nn.BatchNorm1d, 5), nn.Hardswish(),
    )  # fmt: skip
    engine = check(model, 3, 8, 8, rounding=1000)
    assert [(s.op, s.attributes.get("activation")) for s in engine.program.steps] == [
        ("conv", "relu"), ("conv", "relu6"), ("reshape", None), ("linear", "hardswish")
    ]  # fmt: skip
    conv, scale = model[0], model[1].weight.double() / (model[1].running_var.double() + model[1].eps).sqrt()
    exactly = (conv.weight.double() * scale[:, None, None, None]).float()
    stored = engine.program.tensors[engine.program.steps[0].tensors["weight"]]
    assert np.array_equal(stored, exactly.detach().reshape(6, -1).numpy())


def test_normalisation_that_follows_no_layer():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.after = nn.Conv2d(3, 3, 1), norm(nn.BatchNorm2d, 3), norm(nn.BatchNorm2d, 3)
            self.rows = norm(nn.BatchNorm1d, 4)
            self.linear = nn.Linear(5, 4)

        def forward(self, x):
            y = self.conv(x)
            z = self.after(y) + y  # y has two readers: nothing may be folded into it
            z = F.relu(self.norm(z))
            return self.rows(self.linear(z[:, 0])), z  # normalised along the rows, not along the outputs

    engine = check(PreActivation(), 3, 4, 5, rounding=300)
    assert [s.op for s in engine.program.steps].count("mul") == 3


def test_a_layer_with_several_readers_keeps_its_own_output():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.conv(x)
            return F.relu(y), y

    check(Model(), 3, 4, 4, rounding=32)


def test_zeros_around_an_image_become_padding():
    model = nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
    engine = check(model, 2, 6, 6)
    assert [s.op for s in engine.program.steps] == ["conv"]
    assert engine.program.steps[0].attributes["padding"] == (3, 1, 1, 2)
    ones = nn.Sequential(nn.ConstantPad2d(1, 1.0), nn.Conv2d(2, 3, 3))
    assert [s.op for s in check(ones, 2, 6, 6).program.steps] == ["pad", "conv"]


# --- storage


def test_columns_and_filters_that_are_zero_are_not_stored():
    conv, linear = nn.Conv2d(8, 16, 3), nn.Linear(16 * 36, 10)
    with torch.no_grad():
        conv.weight[::4] = 0
        conv.weight[:, 1::2] = 0
        conv.weight[:, :, 0, 0] = 0
        linear.weight[:, 100:] = 0
    engine = check(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear), 8, 8, 8, rounding=200)
    first, _, second = engine.summary().steps
    assert (first.storage, first.weights, first.dense_weights) == ("columns", 12 * 4 * 8, 16 * 72)
    assert first.macs == 12 * 4 * 8 * 36
    assert first.bytes == 4 * first.weights + 2 * (12 + 32) + 4 * 16
    assert (second.storage, second.weights) == ("columns", 1000)
    assert engine.weights.kept == first.weights + 1000
    assert (engine.weights.conv_kept, engine.weights.conv_dense) == (first.weights, 16 * 72)


def test_storage_is_the_smallest():
    generator = np.random.default_rng(0)
    cases = [(1.0, 1.0, "dense"), (0.7, 1.0, "dense"), (0.6, 1.0, "sparse"), (0.02, 1.0, "sparse")]
    for density, block, expected in [*cases, (1.0, 0.5, "columns"), (0.0, 1.0, "columns")]:
        layer = nn.Linear(300, 40, bias=False)
        mask = (generator.random((40, 300)) < density) & (np.arange(300) < 300 * block)
        with torch.no_grad():
            layer.weight *= torch.from_numpy(mask)
        engine = check_product(layer, 300)
        (step,) = engine.summary().steps
        assert (step.storage, step.weights) == (expected, 12000 if expected == "dense" else mask.sum())
        assert step.bytes <= 4 * 12000


@pytest.mark.parametrize("kept", [0, 1, 40, 2000])
def test_very_sparse_weights(kept):
    """Few weights far apart are multiplied one by one, more of them as a block; a filter may have none."""
    for layer, shape in ((nn.Conv2d(40, 60, 5, padding=2), (40, 6, 7)), (nn.Linear(9000, 70), (9000,))):
        chosen = torch.randperm(layer.weight.numel())[:kept]
        with torch.no_grad():
            values = layer.weight.flatten()[chosen].clone()
            layer.weight.zero_().view(-1)[chosen] = values
        engine = check_product(layer, *shape)
        assert engine.weights.kept == kept


@pytest.mark.parametrize("density", [1.0, 0.3, 0.001])
def test_grouped_sparse_weights(density):
    layer = nn.Conv2d(64, 64, 3, groups=2)
    with torch.no_grad():
        layer.weight *= torch.rand_like(layer.weight) < density
    engine = check_product(layer, 64, 5, 5)
    assert engine.summary().steps[0].storage == ("dense" if density == 1 else "sparse")


def test_layers_with_columns_cut_out():
    index = torch.tensor([0, 3, 4, 8, 17])
    conv = ColumnConv2d(torch.randn(4, 5), index, torch.randn(4), channels=2, kernel_size=(3, 3), padding=(1, 1))
    linear = ColumnLinear(torch.randn(3, 4), torch.tensor([1, 5, 60, 99]), None, features=100)
    engine = check(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear), 2, 5, 5, rounding=100)
    assert [(s.op, s.storage, s.weights) for s in engine.summary().steps] == [
        ("conv", "columns", 20), ("reshape", "", 0), ("linear", "columns", 12)
    ]  # fmt: skip


def test_an_input_picked_twice_counts_twice():
    layer = nn.Linear(3, 2)
    model = nn.Sequential(Function(lambda x: x[:, torch.tensor([1, 1, 0])]), layer)
    engine = check(model, 4)
    assert [s.op for s in engine.program.steps] == ["linear"]


# --- whole models


@pytest.mark.parametrize("name", ["lenet5", "lenet300", "resnet20", "mobilenet_v2"])
def test_our_models(name):
    model, shape = models.create(name), models.input_shape(name)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            with torch.no_grad():
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 2)
                layer.weight.uniform_(0.5, 1.5)
    engine = acf.compile(model, torch.zeros(1, *shape))
    x = torch.randn(2, *shape)
    (wanted,) = exact(model, x)
    # Relative to the largest output; the errors of a hundred layers add up far below the 1e-4 that `compile` allows.
    assert float((engine(x) - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())
    assert not {"batch_norm", "mul"} & {s.op for s in engine.program.steps}
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert engine.weights.dense == sum(layer.weight.numel() for layer in layers)


def test_macs_are_counted_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 5)
    )
    summary = acf.compile(model, torch.zeros(1, 3, 8, 8)).summary()
    assert [s.macs for s in summary.steps] == [16 * 8 * 27, 4 * 8 * 9, 0, 160]
    assert summary.macs == 16 * 8 * 27 + 4 * 8 * 9 + 160
    table = str(summary).splitlines()
    assert len(table) == 1 + 4 + 1
    assert table[-1].split() == ["total", "448", "100.0%", f"{summary.macs:,}", f"{summary.weights.bytes:,}"]


def test_the_model_is_left_as_it_is():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 1, 5, 5)
    state = torch.random.get_rng_state()
    acf.compile(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_further_training_does_not_reach_the_engine():
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), torch.randn(2, 1, 5, 5)
    engine = acf.compile(model, x)
    before = engine(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert torch.equal(engine(x), before)


def test_in_place_constants_leave_the_weights_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return F.linear(x, self.weight.clone().mul_(2).add_(1))

    model = Model()
    before = model.weight.detach().clone()
    engine = acf.compile(model, torch.randn(2, 3))
    assert torch.equal(model.weight, before)
    x = torch.randn(3, 3)
    torch.testing.assert_close(engine(x), x @ (2 * before + 1).T)


# --- running


def test_numpy_in_numpy_out_torch_in_torch_out():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    engine = acf.compile(model, torch.zeros(1, 1, 5, 5))
    x = torch.randn(3, 1, 5, 5, requires_grad=True)
    y, z = engine(x), engine(x.detach().numpy())
    assert isinstance(y, torch.Tensor)
    assert not y.requires_grad
    assert isinstance(z, np.ndarray)
    assert z.dtype == np.float32
    assert np.array_equal(y.numpy(), z)
    assert z.flags.c_contiguous
    strided = np.asfortranarray(x.detach().numpy())
    assert np.array_equal(engine(strided), z)


def test_the_input_is_not_changed_and_not_returned():
    engine = acf.compile(nn.Sequential(nn.ReLU(), nn.Hardswish(), nn.Identity()), torch.zeros(1, 3))
    identity = acf.compile(nn.Identity(), torch.zeros(1, 3))
    x = np.array([[-1, 2, 3]], np.float32)
    for run in (engine, identity):
        y = run(x)
        assert np.array_equal(x, [[-1, 2, 3]])
        assert not np.shares_memory(x, y)


def test_no_samples():
    engine = acf.compile(models.create("lenet_digits"), torch.zeros(1, 1, 8, 8))
    assert engine(np.zeros((0, 1, 8, 8), np.float32)).shape == (0, 10)


def test_results_depend_on_neither_threads_nor_other_samples(monkeypatch):
    program = acf.compile(models.create("lenet_digits"), torch.zeros(1, 1, 8, 8)).program
    x = np.random.default_rng(0).normal(size=(501, 1, 8, 8)).astype(np.float32)
    y = Engine(program, threads=1)(x)
    assert np.array_equal(y, Engine(program, threads=3)(x))
    assert np.array_equal(y[::-1], Engine(program, threads=3)(x[::-1]))
    monkeypatch.setattr(native, "MOST_WORKSPACE", 2**17)  # in parts, of more than one
    assert 1 < Engine(program)._executor.part < 100
    np.testing.assert_allclose(Engine(program, threads=1)(x), y, rtol=1e-5, atol=1e-5)


def test_one_engine_in_several_threads():
    engine = acf.compile(models.create("lenet_digits"), torch.zeros(1, 1, 8, 8), threads=2)
    inputs = [np.random.default_rng(i).normal(size=(400, 1, 8, 8)).astype(np.float32) for i in range(4)]
    wanted = [engine(x) for x in inputs]
    found = [None] * 4

    def run(i):
        found[i] = engine(inputs[i])

    workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for y, z in zip(found, wanted, strict=True):
        assert np.array_equal(y, z)


def test_memory_stays_bounded():
    model = nn.Sequential(nn.Conv2d(8, 32, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    engine = acf.compile(model, torch.zeros(1, 8, 16, 16), threads=1)
    samples = engine._executor.part
    assert 1 < samples < 10_000
    assert engine._executor.network.workspace_bytes(samples) <= native.MOST_WORKSPACE


def test_nan_travels_through_without_a_warning():
    engine = acf.compile(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Softmax(1)), torch.zeros(1, 2))
    y = engine(np.array([[np.nan, 1], [np.inf, 0], [1, 2]], np.float32))
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[2]).all()


def test_a_model_for_one_batch_size():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(4, -1)

    engine = acf.compile(Fixed(), torch.zeros(4, 2, 3))
    assert engine.program.batch == 4
    assert engine(np.zeros((4, 2, 3), np.float32)).shape == (4, 6)
    with pytest.raises(ValueError, match=r"input 'x' must have shape \(4, 2, 3\), not \(5, 2, 3\)"):
        engine(np.zeros((5, 2, 3), np.float32))


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b, b * 2

    engine = acf.compile(Two(), (torch.zeros(1, 3), torch.zeros(1, 3)))
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32)
    total, double = engine(a, b)
    assert (total == 3).all()
    assert (double == 4).all()
    assert engine.output_shapes == ((3,), (3,))
    with pytest.raises(ValueError, match="input 'b' has 1 samples, the first input 2"):
        engine(a, b[:1])
    with pytest.raises(TypeError, match=r"takes 2 inputs \(a, b\), not 1"):
        engine(a)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 3)), TypeError, "must be float32, not float64"),
        (torch.zeros(2, 3, dtype=torch.uint8), TypeError, "must be float32, not uint8; convert it, and scale it"),
        (np.zeros((2, 4), np.float32), ValueError, r"must have shape \(N, 3\), not \(2, 4\)"),
        (np.zeros(3, np.float32), ValueError, r"must have shape \(N, 3\), not \(3,\)"),
        (np.float32(3), TypeError, "must be a numpy array or a torch tensor, not float32"),
        (np.zeros((), np.float32), ValueError, r"must have shape \(N, 3\), not \(\)"),
        ([[1.0, 2.0, 3.0]], TypeError, "must be a numpy array or a torch tensor, not list"),
    ],
)
def test_inputs_are_checked(x, error, message):
    engine = acf.compile(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(error, match=f"input 'input' {message}"):
        engine(x)


@pytest.mark.parametrize("threads", [0, -1, 1.0, True, 5000])
def test_thread_counts_are_checked(threads):
    with pytest.raises(ValueError, match="threads must be None or an integer from 1 to 1024"):
        acf.compile(nn.ReLU(), torch.zeros(1, 3), threads=threads)


# --- what cannot be run


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.linear = nn.SELU(), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cumsum(self.recurrent(self.linear(x)), 1).sort(1)[0]


def test_all_unsupported_operators_are_listed_with_their_places():
    with pytest.raises(UnsupportedError) as caught:
        acf.compile(Strange(), torch.zeros(1, 4))
    message = str(caught.value)
    line = Strange.forward.__code__.co_firstlineno + 1
    assert f"aten.selu.default in recurrent (test_engine.py:{line} in forward): unsupported operator" in message
    assert f"aten.cumsum.default (test_engine.py:{line} in forward): unsupported operator" in message
    assert "aten.sort.default" in message
    assert "linear.default" not in message


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.reshape(-1, 7), r"mixes the batch with other dimensions"),
        (lambda x: x.transpose(0, 1), r"does not have the batch first"),
        (lambda x: x.mean(0, keepdim=True) + x, r"does not have the batch"),
        (lambda x: F.softmax(x, 0), "works across the batch"),
        (lambda x: torch.cat([x, x], 0), "mixes the batch|does not have the batch first|works across the batch"),
        (lambda x: (x > 0).float(), "gt.Scalar .*unsupported operator"),
        (lambda x: x.double(), "the result is float64"),
        (lambda x: x * x.shape[0], "depends on the batch size"),
        (lambda x: F.conv2d(x, x[:1, :1, :2, :2].repeat(1, 3, 1, 1)), "does not have the batch first|unsupported"),
        (lambda x: x[:, :, :0].flatten(2).sum(-1), r"the result \(BATCH, 3, 0, 7\) is empty"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), "only constant padding is supported"),
        (lambda x: x + torch.rand(7), "random numbers are not supported"),
        (lambda _: COLUMN * 1, "does not depend on the input|does not have the batch first"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divisor_override is not supported"),
        (lambda x: F.batch_norm(x, None, None, training=True), "only running statistics are supported"),
        (lambda x: x / (COLUMN * 0), "inf|NaN|differs"),
        (lambda x: F.avg_pool2d(x.transpose(0, 1), 2), "does not have the batch first"),
        (lambda x: F.linear(x.transpose(0, 3), torch.ones(2, 2)), "works across the batch|does not have the batch"),
        (lambda x: x.reshape(-1, 5, 7) + x.transpose(0, 1).reshape(-1, 5, 7), "batch in different places"),
        (lambda x: x @ x[:, :1].transpose(-1, -2), "are not as many"),
        (lambda x: torch.einsum("bcij, bcij -> bc", x, x), "is not a product of matrices"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, x @ x.transpose(-1, -2)), "its mask depends on the input"),
        (lambda x: torch.linalg.vector_norm(x, 1, dim=1), "only 2 over some dimensions is supported"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "rounding mode 'floor' is not supported"),
    ],
)
def test_what_the_engine_cannot_do_is_an_error(function, message):
    with pytest.raises((UnsupportedError, VerificationError), match=message):
        acf.compile(Function(function), torch.randn(2, 3, 5, 7))


def test_weights_that_are_not_finite_are_refused():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(UnsupportedError, match="its weight holds NaN or infinity"):
        acf.compile(layer, torch.zeros(1, 3))


def test_other_dtypes_are_refused():
    with pytest.raises(UnsupportedError, match="input 'input' is float64"):
        acf.compile(nn.Linear(3, 2).double(), torch.zeros(1, 3).double())


def test_an_engine_that_computes_something_else_is_found():
    model = nn.Linear(3, 2)
    engine = acf.compile(model, torch.zeros(1, 3))
    wrong = dict(engine.program.tensors)
    (name,) = (name for name in wrong if name.endswith("weight"))
    wrong[name] = wrong[name] * np.float32(1.001)
    for example in (torch.ones(1, 3), torch.zeros(1, 3)):  # zeros alone would not show it
        with pytest.raises(VerificationError, match="differs from the model's by"):
            verify(Engine(replace(engine.program, tensors=wrong)), model, example)


# --- validation: every rule, broken one at a time


def small_program():
    weight = np.arange(8, dtype=np.float32).reshape(2, 4)
    sparse = {
        "values": np.ones(3, np.float32),
        "indices": np.array([0, 1, 1], np.uint16),
        "offsets": np.array([0, 2, 2, 3], np.uint16),
        "index": np.array([2, 0], np.uint16),
    }
    conv = {
        "kernel": (2, 2), "stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1,
        "filters": 3, "storage": "columns", "activation": "relu",
    }  # fmt: skip
    pool = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "ceil": False, "dilation": (1, 1)}
    roles = {"values": "values", "indices": "indices", "offsets": "offsets", "bias": "bias"}
    steps = (
        Step("conv", (0,), 1, conv, {"weight": "w", "filters": "f", "columns": "c"}),
        Step("max_pool", (1,), 2, pool),
        Step("take", (2,), 3, {"axis": 0}, {"indices": "index"}),
        Step("reshape", (3,), 4, {"shape": (2,)}),
        Step("linear", (4,), 5, {"filters": 3, "storage": "sparse", "activation": "none"}, roles),
        Step("add", (5,), 6, {"activation": "none"}, {"constant": "k"}),
        Step("concat", (6, 5), 7, {"axis": 0}),
        Step("slice", (7,), 8, {"axis": 0, "start": 1, "stop": 6, "step": 2}),
    )
    tensors = {
        "w": weight, "f": np.array([0, 2], np.uint16), "c": np.array([0, 1, 2, 3], np.uint32), **sparse,
        "bias": np.zeros(3, np.float32), "k": np.ones((), np.float32),
    }  # fmt: skip
    return Program((Input("x", (1, 3, 3)),), steps, (8,), tensors)


def with_step(program, i, attributes=None, tensors=None, **fields):
    step = program.steps[i]
    step = replace(step, attributes={**step.attributes, **(attributes or {})}, **fields)
    if tensors is not None:
        step = replace(step, tensors=tensors)
    return replace(program, steps=(*program.steps[:i], step, *program.steps[i + 1 :]))


def with_tensor(program, name, value):
    return replace(program, tensors={**program.tensors, name: value})


def u16(*values):
    return np.array(values, np.uint16)


BROKEN = {
    "no inputs": (lambda p: replace(p, inputs=()), "at least one input"),
    "no outputs": (lambda p: replace(p, outputs=()), "at least one output"),
    "an output that is not there": (lambda p: replace(p, outputs=(9,)), "output number must be an integer from 0 to 8"),
    "a negative output": (lambda p: replace(p, outputs=(-1,)), "output number must be an integer from 0"),
    "a batch of none": (lambda p: replace(p, batch=0), "batch must be an integer from 1"),
    "an empty input": (lambda p: replace(p, inputs=(Input("x", (1, 0, 3)),)), "input 0 .* must be an integer from 1"),
    "a huge input": (lambda p: replace(p, inputs=(Input("x", (2**20, 2**20, 2**20)),)), "at most 67108864 are allowed"),
    "a long shape": (lambda p: replace(p, inputs=(Input("x", (1,) * 9),)), "at most 8 integers"),
    "a bool for a size": (lambda p: replace(p, inputs=(Input("x", (True, 3, 3)),)), "must be an integer"),
    "a float16 tensor": (lambda p: with_tensor(p, "w", p.tensors["w"].astype(np.float16)), "must be float32, int8"),
    "a NaN": (lambda p: with_tensor(p, "k", np.float32([np.nan])), "holds NaN"),
    "an unused tensor": (lambda p: with_tensor(p, "more", u16(1)), "'more' is used by 0 steps"),
    "a tensor used twice": (lambda p: with_step(p, 2, tensors={"indices": "f"}), "'f' is used by 2 steps|used by 0"),
    "an unknown operation": (lambda p: with_step(p, 3, op="explode"), "step 3 .*unknown operation"),
    "an operation that is no string": (lambda p: with_step(p, 3, op=["conv"]), "unknown operation"),
    "a cycle": (lambda p: with_step(p, 1, inputs=(2,)), "input 2 is not a value made before it"),
    "a value from nowhere": (lambda p: with_step(p, 1, inputs=(-1,)), "input -1 is not a value"),
    "a wrong output": (lambda p: with_step(p, 1, output=5), "its output must be value 2, not 5"),
    "too many inputs": (lambda p: with_step(p, 1, inputs=(0, 1)), "takes 1 to 1 inputs, not 2"),
    "an unknown attribute": (lambda p: with_step(p, 1, {"color": 3}), "attribute 'color' is unknown"),
    "a missing attribute": (lambda p: with_step(p, 3, op="softmax"), "attribute 'axis' is missing"),
    "a stride of none": (lambda p: with_step(p, 0, {"stride": (0, 1)}), "stride must be an integer from 1"),
    "a huge stride": (lambda p: with_step(p, 0, {"stride": (2**30, 1)}), "stride must be an integer from 1 to 2684"),
    "a stride of three": (lambda p: with_step(p, 0, {"stride": (1, 1, 1)}), "stride must be a tuple of 2 integers"),
    "negative padding": (lambda p: with_step(p, 0, {"padding": (0, 0, -1, 0)}), "padding must be an integer from 0"),
    "a huge padding": (lambda p: with_step(p, 0, {"padding": (0, 2**30, 0, 2**30)}), "at most 67108864"),
    "a padding beyond integers": (lambda p: with_step(p, 0, {"padding": (0, 2**31 - 1, 0, 2**31)}), "padding must be"),
    "a huge kernel": (lambda p: with_step(p, 0, {"kernel": (2**30, 2**30)}), "does not fit|too large"),
    "a kernel as large as its padding": (
        lambda p: with_step(p, 0, {"kernel": (2**15, 2**15), "padding": (2**15,) * 4}), "too large|at most"
    ),
    "groups that do not divide": (lambda p: with_step(p, 0, {"groups": 2}), "groups must divide"),
    "an unknown activation": (lambda p: with_step(p, 0, {"activation": "exec"}), "activation must be one of 'none'"),
    "an unknown storage": (lambda p: with_step(p, 0, {"storage": "zip"}), "storage must be one of"),
    "a tensor of another storage": (lambda p: with_step(p, 0, {"storage": "dense"}), "dense storage takes the tensors"),
    "a tensor that is not there": (lambda p: with_step(p, 2, tensors={"indices": "gone"}), "'gone' is not in the file"),
    "an unknown role": (lambda p: with_step(p, 2, tensors={"color": "index"}), "takes no tensor 'color'"),
    "a weight of another shape": (lambda p: with_tensor(p, "w", np.ones((2, 3), np.float32)), r"shape \(2, 4\)"),
    "a weight of another rank": (lambda p: with_tensor(p, "w", np.ones(8, np.float32)), "must have 2 dimensions"),
    "an integer weight": (lambda p: with_tensor(p, "w", np.ones((2, 4), np.uint16)), "weight must be float32"),
    "a float index": (lambda p: with_tensor(p, "f", np.ones(2, np.float32)), "filters must be uint16"),
    "filters out of range": (lambda p: with_tensor(p, "f", u16(0, 3)), "filters must rise strictly"),
    "filters twice": (lambda p: with_tensor(p, "f", u16(1, 1)), "filters must rise strictly"),
    "columns out of range": (lambda p: with_tensor(p, "c", u16(0, 1, 2, 4)), "columns must rise strictly"),
    "too many filters": (lambda p: with_step(p, 4, {"filters": 2**31 - 1}), "too large"),
    "a bias of another shape": (lambda p: with_tensor(p, "bias", np.zeros(4, np.float32)), r"bias must have shape"),
    "offsets that fall": (lambda p: with_tensor(p, "offsets", u16(0, 3, 2, 3)), "offsets must rise"),
    "offsets that end early": (lambda p: with_tensor(p, "offsets", u16(0, 1, 2, 2)), "offsets must rise"),
    "offsets that start late": (lambda p: with_tensor(p, "offsets", u16(1, 2, 2, 3)), "offsets must rise"),
    "offsets too few": (lambda p: with_tensor(p, "offsets", u16(0, 3)), "values, indices, offsets must have shapes"),
    "indices out of range": (lambda p: with_tensor(p, "indices", u16(0, 1, 2)), "indices must stay below 2"),
    "indices that fall": (lambda p: with_tensor(p, "indices", u16(1, 0, 1)), "rise strictly within every filter"),
    "indices too few": (lambda p: with_tensor(p, "indices", u16(0, 1)), "values, indices, offsets must have shapes"),
    "taking what is not there": (lambda p: with_tensor(p, "index", u16(3)), "all below 3"),
    "taking nothing": (lambda p: with_tensor(p, "index", u16()), "at least one"),
    "a reshape that loses": (lambda p: with_step(p, 3, {"shape": (3,)}), "cannot be reshaped to"),
    "a constant of another shape": (lambda p: with_tensor(p, "k", np.ones(4, np.float32)), "cannot be broadcast"),
    "a constant with the batch": (lambda p: with_tensor(p, "k", np.ones((1, 3), np.float32)), "do not match in rank"),
    "an axis that is not there": (lambda p: with_step(p, 6, {"axis": 1}), "axis must be an integer from 0 to 0"),
    "concatenating unlike shapes": (lambda p: with_step(p, 6, inputs=(6, 3)), "differ besides axis"),
    "a slice that ends outside": (lambda p: with_step(p, 7, {"stop": 7}), "start 1 and stop 7"),
    "an empty slice": (lambda p: with_step(p, 7, {"start": 6}), "start 6 and stop 6"),
    "pooling more than there is": (lambda p: with_step(p, 1, {"kernel": (4, 4)}), "does not fit"),
    "padding more than half a window": (lambda p: with_step(p, 1, {"padding": (2, 0)}), "at most half of kernel"),
    "two operands and a constant": (lambda p: with_step(p, 5, inputs=(5, 5)), "two inputs, or one and a constant"),
}  # fmt: skip


def test_the_program_that_is_broken_below_is_valid():
    program = small_program()
    infos = validate(program)
    assert [info.shape for info in infos] == [(3, 2, 2), (3, 1, 1), (2, 1, 1), (2,), (3,), (3,), (6,), (3,)]
    y = Engine(program)(np.ones((1, 1, 3, 3), np.float32))
    # conv (6, 0, 22), picked (22, 6), products (28, 0, 6), plus one, then themselves: (29, 1, 7, 28, 0, 6)[1:6:2]
    assert y.tolist() == [[1, 28, 6]]


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_programs_are_refused(fault):
    damage, message = BROKEN[fault]
    with pytest.raises(ProgramError, match=message):
        validate(damage(small_program()))


def matrices(*shapes, op="attention", **attributes):
    inputs = tuple(Input(f"x{i}", shape) for i, shape in enumerate(shapes))
    return Program(inputs, (Step(op, tuple(range(len(shapes))), len(shapes), attributes),), (len(shapes),), {})


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (matrices((2, 3, 4), (2, 5, 4), scale=1.0), "takes 3 to 3 inputs, not 2"),
        (matrices((4,), (4,), (4,), scale=1.0), "takes as many matrices from every input"),
        (matrices((2, 3, 4), (5, 4), (2, 5, 6), scale=1.0), "takes as many matrices from every input"),
        (matrices((2, 3, 4), (3, 5, 4), (2, 5, 6), scale=1.0), "takes as many matrices from every input"),
        (matrices((2, 3, 4), (2, 5, 3), (2, 5, 6), scale=1.0), r"queries \(2, 3, 4\), keys .* do not match"),
        (matrices((2, 3, 4), (2, 5, 4), (2, 4, 6), scale=1.0), r"values \(2, 4, 6\) do not match"),
        (matrices((2, 3, 4), (2, 5, 4), (2, 5, 6)), "attribute 'scale' is missing"),
        (matrices((2, 3, 4), (2, 5, 4), (2, 5, 6), scale=math.nan), "scale must be a finite float32"),
        (matrices((1, 1), (2**23, 1), (2**23, 1), scale=1.0), "one sample needs .* elements at once"),
        (matrices((2**14, 1), (1, 2**14), op="matmul"), "268435456 elements; at most 67108864 are allowed"),
        (matrices((2, 3), (4, 2), op="matmul"), "cannot be multiplied"),
        (matrices((3,), (3,), op="matmul"), "takes as many matrices from every input"),
        (matrices((2, 3), op="norm", axes=(2,), keep=True), "axes must be different axes"),
    ],
)
def test_products_that_do_not_fit_are_refused(program, message):
    with pytest.raises(ProgramError, match=message):
        validate(program)


def test_programs_that_need_too_much_memory_are_refused():
    tall, wide = Input("x", (2**14, 1)), {"k": np.ones((1, 2**14), np.float32)}
    grow = Step("add", (0,), 1, {"activation": "none"}, {"constant": "k"})
    with pytest.raises(ProgramError, match=r"step 0 .*268435456 elements; at most 67108864 are allowed"):
        validate(Program((tall,), (grow,), (1,), wide))
    side = 2**12
    steps = tuple(Step("activation", (0,), i + 1, {"activation": "relu"}) for i in range(40))  # all alive at the end
    program = Program((Input("x", (1, side, side)),), steps, tuple(range(1, 41)), {})
    with pytest.raises(ProgramError, match=r"one sample needs \d+ elements at once"):
        validate(program)
    one = replace(program, outputs=(40,))
    validate(one)


def test_weights_take_memory_in_proportion_to_what_is_stored(monkeypatch):
    monkeypatch.setattr("autocompress_fast.engine.program.MAX_WEIGHT", 800)

    def layers(*shapes):
        tensors = {f"w{i}": np.ones(shape, np.float32) for i, shape in enumerate(shapes)}
        attributes = {"storage": "dense", "activation": "none"}
        steps = (
            Step("linear", (i,), i + 1, {**attributes, "filters": shape[0]}, {"weight": f"w{i}"})
            for i, shape in enumerate(shapes)
        )
        return Program((Input("x", (shapes[0][1],)),), tuple(steps), (len(shapes),), tensors)

    validate(layers((48, 16), (16, 48)))  # more than the limit, in a file as large
    with pytest.raises(ProgramError, match=r"the weights take \d+ elements to run; at most 800 are allowed"):
        validate(layers((1, 100)))


def test_a_small_weight_cannot_unpack_to_a_large_one():
    """Single weights far apart are never written out in full: 2**14 of them on a diagonal would take 1 GiB."""
    n = 2**14
    tensors = {
        "v": np.ones(n, np.float32), "i": np.arange(n, dtype=np.uint16), "o": np.arange(n + 1, dtype=np.uint16)
    }  # fmt: skip
    attributes = {"filters": n, "storage": "sparse", "activation": "none"}
    roles = {"values": "v", "indices": "i", "offsets": "o"}
    program = Program((Input("x", (n,)),), (Step("linear", (0,), 1, attributes, roles),), (1,), tensors)
    tracemalloc.start()
    engine = Engine(program)
    x = np.random.default_rng(0).normal(size=(2, n)).astype(np.float32)
    assert np.array_equal(engine(x), x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


def test_a_profile_has_every_step_and_the_totals():
    engine = acf.compile(models.create("resnet20"), torch.zeros(1, 3, 32, 32), threads=1)
    profile = engine.profile(samples=3, rounds=2)
    assert profile.samples == 3
    assert sum(step.macs for step in profile.steps) == 3 * engine.summary().macs
    assert sum(step.op == "conv + add" for step in profile.steps) == 9
    assert all(step.seconds > 0 for step in profile.steps if step.macs)
    assert all(0 < step.share_of_peak < 5 for step in profile.steps if step.macs)
    lines = str(profile).splitlines()
    assert len(lines) == len(profile.steps) + 2
    assert lines[-1].startswith("total")
    given = engine.profile(np.zeros((2, 3, 32, 32), np.float32), rounds=1)
    assert given.samples == 2
    with pytest.raises(ValueError, match="rounds must be 1 or more, got 0"):
        engine.profile(rounds=0)
    with pytest.raises(ValueError, match="must have shape"):
        engine.profile(np.zeros((2, 3, 32, 31), np.float32))


def test_the_workspace_is_that_of_what_is_alive_at_once():
    chain = nn.Sequential(*(nn.Conv2d(8, 8, 5, padding=2) for _ in range(20)))  # 3x3 may take Winograd's transforms
    engine = acf.compile(chain, torch.zeros(1, 8, 30, 30))
    value = 4 * 8 * 32 * 32  # with the zeros around every image, which neighbours share
    assert 2 * value <= engine.workspace_bytes() < 2.2 * value
    assert engine.workspace_bytes(4) > 3 * engine.workspace_bytes()
