"""Training over what is kept, against torch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from autocompress_fast import _core, models  # noqa: E402
from autocompress_fast._kept import KeptKernels  # noqa: E402
from autocompress_fast.data import UserBatches  # noqa: E402
from autocompress_fast.plan import LayerPlan, Plan, apply_masks  # noqa: E402
from autocompress_fast.training import Trainer, TrainingConfig  # noqa: E402


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were called."""
    names: list[str] = []

    def spied(name: str) -> Any:
        kernel = getattr(_core, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return kernel(*args, **kwargs)

        return spy

    for name in ("conv_forward", "conv_input_gradient", "conv_weight_gradient", "max_pool_forward"):
        monkeypatch.setattr(_core, name, spied(name))
    for name in ("max_pool_gradient", "batch_norm_forward", "batch_norm_gradient"):
        monkeypatch.setattr(_core, name, spied(name))
    return names


def random_plan(model: nn.Module, share: float, seed: int = 0) -> Plan:
    """A share of the columns of every convolution, and all filters but one."""
    rng, layers = np.random.default_rng(seed), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            filters = np.ones(module.weight.shape[0], dtype=bool)
            filters[rng.integers(len(filters))] = len(filters) == 1
            layers[name] = LayerPlan(tuple(module.weight.shape), filters, rng.random(module.weight[0].numel()) < share)
    plan = Plan(layers)
    apply_masks(model, plan)
    return plan


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))


WINDOWS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 5},
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("images", [32, 40, 64, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_has_the_values_and_gradients_of_torch(
    window: dict[str, Any], images: int, bias: bool, called: list[str]
) -> None:
    torch.manual_seed(images)
    conv = nn.Sequential(nn.Conv2d(5, 9, bias=bias, **window))
    plan = random_plan(conv, 0.3)
    exact = copy.deepcopy(conv).double()
    x = torch.randn(images, 5, 11, 8, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    out64 = exact(x64)
    g = torch.randn(out64.shape)
    with KeptKernels(conv, plan):
        out = conv(x)
    assert relative(out, out64) < 1e-6
    ours, theirs = gradients(conv, (out * g).sum()), gradients(exact, (out64 * g).sum())
    assert called == ["conv_forward", "conv_input_gradient", "conv_weight_gradient"]
    assert relative(x.grad, x64.grad) < 1e-6
    mask = torch.from_numpy(plan["0"].mask()).reshape(conv[0].weight.shape)
    assert relative(ours["0.weight"], theirs["0.weight"] * mask) < 1e-5
    assert bool((ours["0.weight"][~mask] == 0).all())
    assert not bias or relative(ours["0.bias"], theirs["0.bias"]) < 1e-5


@pytest.mark.parametrize("affine", [True, False])
def test_pooling_and_normalisation_follow_the_layout(affine: bool, called: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6, affine=affine),
        nn.Tanh(),
        nn.MaxPool2d(3, 2, 1),
        nn.BatchNorm2d(6, momentum=0.3),
        nn.Tanh(),
        nn.MaxPool2d(2),
    )
    exact, x = copy.deepcopy(model).double(), torch.randn(33, 3, 12, 10)
    with KeptKernels(model, None):
        out = model(x)
    out64 = exact(x.double())
    assert relative(out, out64) < 1e-5
    ours, theirs = gradients(model, (out**2).sum()), gradients(exact, (out64**2).sum())
    assert set(called) == {
        *("conv_forward", "conv_weight_gradient", "max_pool_forward", "max_pool_gradient"),
        *("batch_norm_forward", "batch_norm_gradient"),
    }
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) < 1e-4, name
    for name, value in exact.state_dict().items():  # the running statistics among them
        assert relative(model.state_dict()[name], value) < 1e-5, name


def test_what_they_return_may_be_changed_in_place(called: list[str]) -> None:
    torch.manual_seed(1)  # which leaves no value next to a kink
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(6, 4, 1), nn.MaxPool2d(2), nn.Hardtanh(inplace=True), nn.Flatten(), nn.Linear(36, 2)),
    )
    exact, x = copy.deepcopy(model).double(), torch.randn(40, 3, 10, 10)
    with KeptKernels(model, None):
        out = model(x)
    ours = gradients(model, (out**2).sum())
    theirs = gradients(exact, (exact(x.double()) ** 2).sum())
    assert {"conv_input_gradient", "batch_norm_gradient", "max_pool_gradient"} <= set(called)
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) < 1e-5 or float(gradient.norm()) < 1e-9, name


def test_what_a_step_needs_again_may_not_be_changed_in_place() -> None:
    conv = nn.Conv2d(3, 6, 3)
    x = torch.randn(5, 5, 3, 32).permute(3, 2, 0, 1)
    with KeptKernels(conv, None):
        out = conv(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["lenet5", "resnet20"])
def test_networks_have_the_loss_and_gradients_of_torch(name: str, called: list[str]) -> None:
    torch.manual_seed(0)
    model = models.create(name)
    plan = random_plan(model, 0.2)
    other, x = copy.deepcopy(model), torch.randn(32, *models.input_shape(name))
    y = torch.randint(0, 10, (32,))
    torch.manual_seed(1)  # of dropout
    with KeptKernels(model, plan):
        loss = F.cross_entropy(model(x), y)
    torch.manual_seed(1)
    expected = F.cross_entropy(other(x), y)
    assert abs(loss.item() - expected.item()) < 1e-4
    ours, theirs = gradients(model, loss), gradients(other, expected)
    assert "conv_forward" in called
    masks = {f"{name}.weight": torch.from_numpy(layer.mask()) for name, layer in plan.items()}
    differences = [ours[p] - g * masks.get(p, torch.ones(g.shape)).reshape(g.shape) for p, g in theirs.items()]
    # A value next to the kink of a ReLU may fall on its other side, so the norm over all is compared.
    size = sum(float((g**2).sum()) for g in ours.values())
    assert sum(float((d**2).sum()) for d in differences) < 1e-4 * size


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, _channels_last, lambda x: x[:, :, ::2, 1:]])
def test_inputs_lie_in_memory_as_they_like(layout: Any) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 3, 3)
    x = layout(torch.randn(36, 4, 12, 12))
    with KeptKernels(conv, None):
        out = conv(x)
    assert relative(out, conv(x)) < 1e-6
    conv.to(memory_format=torch.channels_last)
    with KeptKernels(conv, None):
        out = conv(x)
    assert relative(out, conv(x)) < 1e-6


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: F.conv2d(x, torch.ones(4, 2, 3, 3), groups=2), torch.randn(32, 4, 6, 6)),
        (lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3), padding="same"), torch.randn(32, 4, 6, 6)),
        (lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3)), torch.randn(4, 6, 6)),
        (lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3).double()), torch.randn(32, 4, 6, 6).double()),
        (lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3)), torch.randn(31, 4, 6, 6)),
        (lambda x: F.max_pool2d(x, 2, ceil_mode=True), torch.randn(5, 5, 2, 3).permute(3, 2, 0, 1)),
        (lambda x: F.max_pool2d(x, 2, dilation=2), torch.randn(5, 5, 2, 3).permute(3, 2, 0, 1)),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[1], torch.randn(5, 5, 2, 3).permute(3, 2, 0, 1)),
        (lambda x: F.batch_norm(x, torch.zeros(2), torch.ones(2)), torch.randn(5, 5, 2, 3).permute(3, 2, 0, 1)),
    ],
    ids=["grouped", "same", "one image", "float64", "few images", "ceil", "dilated", "indices", "eval"],
)
def test_what_the_kernels_cannot_do_is_left_to_torch(function: Any, x: torch.Tensor, called: list[str]) -> None:
    with KeptKernels(nn.Conv2d(1, 1, 1), None):
        out = function(x)
    assert torch.equal(out, function(x))
    assert called == []


def test_errors_are_those_of_torch() -> None:
    with KeptKernels(nn.Conv2d(1, 1, 1), None):
        with pytest.raises(RuntimeError, match="channels"):
            F.conv2d(torch.ones(32, 3, 5, 5), torch.ones(2, 4, 3, 3))
        with pytest.raises(RuntimeError, match="Kernel size"):
            F.conv2d(torch.ones(32, 3, 2, 2), torch.ones(2, 3, 3, 3))
        with pytest.raises(RuntimeError, match="pad"):
            F.max_pool2d(torch.ones(5, 5, 2, 3).permute(3, 2, 0, 1), 2, padding=2)


def test_autocast_is_left_to_torch(called: list[str]) -> None:
    conv = nn.Conv2d(4, 3, 3)
    with KeptKernels(conv, None), torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(32, 4, 6, 6)).dtype == torch.bfloat16
    assert called == []


def test_networks_of_layers_that_torch_does_faster_are_left_to_it(called: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    x = torch.randn(32, 3, 9, 9)
    with KeptKernels(model, None):
        model(x)
    assert called == []
    with KeptKernels(model, random_plan(model, 0.2)):
        model(x)
    assert called == ["conv_forward"] * 3
    called.clear()
    model.insert(1, nn.Conv2d(32, 32, 3, groups=32))
    with KeptKernels(model, random_plan(model, 0.2)):
        model(x)
    assert called == []


def _trained(kernels: str, threads: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = models.create("lenet_digits")
    plan = random_plan(model, 0.3)
    x, y = torch.randn(96, *models.input_shape("lenet_digits")), torch.randint(0, 10, (96,))
    batches = UserBatches([(x[:64], y[:64]), (x[64:], y[64:])])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        Trainer(model, batches, TrainingConfig(epochs=2, lr=0.02, kernels=kernels), plan=plan).run()
    finally:
        torch.set_num_threads(before)
    return model.state_dict()


def test_trainers_use_them(called: list[str]) -> None:
    ours = _trained("kept", 1)
    assert called.count("conv_forward") > 0
    called.clear()
    theirs = _trained("torch", 1)
    assert called == []
    for name, value in theirs.items():
        assert relative(ours[name], value) < 1e-3, name


def test_convolutions_do_not_depend_on_the_threads() -> None:
    torch.manual_seed(0)
    conv, x, results = nn.Conv2d(6, 11, 3, padding=1), torch.randn(70, 6, 9, 9), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            with KeptKernels(conv, None):
                out = conv(x)
            results.append((out, gradients(conv, (out**2).sum())["weight"]))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_shapes_are_checked() -> None:
    x, weight = np.zeros((5, 5, 2, 3), np.float32), np.zeros((4, 2, 3, 3), np.float32)
    numbers = {"filters": np.arange(4, dtype=np.int32), "columns": np.arange(18, dtype=np.int32)}
    window = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "threads": 1}
    out = np.zeros((3, 3, 4, 3), np.float32)
    _core.conv_forward(x, weight, None, out, **numbers, **window)
    with pytest.raises(ValueError, match=r"out must have the shape \(3, 3, 4, 3\), got \(3, 3, 4, 2\)"):
        _core.conv_forward(x, weight, None, out[..., :2].copy(), **numbers, **window)
    with pytest.raises(ValueError, match="x must have the 2 channels of the weight, got 3"):
        _core.conv_forward(np.zeros((5, 5, 3, 3), np.float32), weight, None, out, **numbers, **window)
    with pytest.raises(ValueError, match="kept columns must rise and be from 0 to 17, got 18 at place 0"):
        _core.conv_forward(x, weight, None, out, numbers["filters"], np.array([18], np.int32), **window)
    with pytest.raises(TypeError, match="x must be float32"):
        _core.conv_forward(x.astype(np.float64), weight, None, out, **numbers, **window)
    with pytest.raises(ValueError, match=r"weight_gradient must have 4 dimensions"):
        _core.conv_weight_gradient(x, out, np.zeros((4, 18), np.float32), None, **numbers, **window)
    with pytest.raises(ValueError, match=r"bias must have the shape \(4,\), got \(3,\)"):
        _core.conv_forward(x, weight, np.zeros(3, np.float32), out, **numbers, **window)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        _core.conv_forward(x, weight, None, out, **numbers, **{**window, "threads": 0})
    at = _core.max_pool_forward(x, np.zeros((2, 2, 2, 3), np.float32), (2, 2), (2, 2), (0, 0), 1)
    with pytest.raises(ValueError, match=r"at must have the shape \(2, 2, 2, 3\), got \(2, 2, 2, 1\)"):
        _core.max_pool_gradient(np.zeros((2, 2, 2, 3), np.float32), at[..., :1].copy(), x, (2, 2), (2, 2), (0, 0), 1)
    with pytest.raises(ValueError, match=r"mean must have the shape \(2,\), got \(3,\)"):
        _core.batch_norm_forward(
            x, None, None, 1e-5, np.zeros_like(x), np.zeros(3, np.float32), np.zeros(2, np.float32), 1
        )
