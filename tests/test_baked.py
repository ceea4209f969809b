"""Layers that compute their own weight, made plain: what is baked, what is not, and that nothing else changes."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autocompress_fast as acf
from autocompress_fast.admm import Constraint
from autocompress_fast.plan import MaskedParameters

pytestmark = pytest.mark.usefixtures("one_thread")


class Standardised(nn.Conv2d):
    """Weight standardisation: every filter has mean 0 and deviation 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, deviation = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (deviation + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Standardised(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Standardised(8, 6, 3), nn.Conv2d(6, 4, 1))


def image() -> torch.Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (2, 3), "padding": (0, 2), "dilation": (2, 1)},
        {"padding": "same"},
        {"groups": 4, "bias": False},
    ],
    ids=str,
)
def test_the_plain_layer_computes_the_same_with_weights_as_the_forward_made_them(options):
    torch.manual_seed(0)
    layer = Standardised(8, 8, 3, **options)
    model, x = nn.Sequential(layer), torch.randn(2, 8, 11, 12)
    plain = acf.baked(model)
    assert type(plain[0]) is nn.Conv2d
    assert set(plain.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(plain[0].weight.mean((1, 2, 3)), torch.zeros(8), rtol=0, atol=1e-6)
    torch.testing.assert_close(plain[0].weight.std((1, 2, 3)), torch.ones(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-6, atol=1e-6)
    plain(x).sum().backward()
    assert plain[0].weight.grad is not None
    assert layer.weight.grad is None


def test_model_random_state_modes_and_hooks_are_left_as_they_are():
    model, calls = network(), []
    model[1].eval()
    model[3].register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.random.get_rng_state()
    plain = acf.baked(model)
    acf.inspect(model, image())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model] == [Standardised, nn.BatchNorm2d, nn.ReLU, Standardised, nn.Conv2d]
    calls.clear()
    plain(image())
    assert calls == [1]
    assert acf.baked(plain) is plain


def test_frozen_parameters_stay_frozen():
    model = network()
    model[0].requires_grad_(False)
    plain = acf.baked(model)
    assert [p.requires_grad for p in (plain[0].weight, plain[0].bias, plain[3].weight)] == [False, False, True]


class Noisy(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight + torch.randn_like(self.weight), self.bias)


class Twice(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.tanh(), self.bias) + F.conv2d(x, self.weight.tanh())


class Activated(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.tanh(), self.bias).relu()


class Picky(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 7:
            raise ValueError(f"want a width of 7, got {x.shape[-1]}")
        return F.conv2d(x, self.weight.tanh(), self.bias)


class Plain(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.contiguous(), self.bias).relu()


@pytest.mark.parametrize("kind", [Noisy, Twice, Activated, Picky, Plain])
def test_what_no_plain_layer_stands_for_stays(kind):
    model = nn.Sequential(kind(3, 4, 3))
    assert acf.baked(model) is model


def test_a_layer_without_weights_of_its_own_stays():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.weight.tanh())

    model = Shared()
    assert acf.baked(model) is model


def test_the_report_says_what_is_plain_in_it():
    report = acf.inspect(network(), image())
    assert report.baked == ("0", "3")
    assert report.to_json()["baked"] == ["0", "3"]
    assert not acf.inspect(acf.baked(network()), image()).baked


def test_compaction_says_what_it_baked_and_trains_on():
    model, x = network(), image()
    plan = acf.Plan.uniform(acf.inspect(model, x), filters=0.5)
    small = acf.compact(model, plan, x)
    assert (small.kind, small.baked) == ("module", ("0", "3"))
    with torch.no_grad():
        torch.testing.assert_close(small.model.eval()(x), acf.mask(model, plan).eval()(x), rtol=1e-5, atol=1e-5)
    small.model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in small.model.parameters())


def test_compaction_of_a_plain_copy_is_that_of_the_model():
    model, x = network(), image()
    plan = acf.Plan.uniform(acf.inspect(model, x), filters=0.5)
    one, other = acf.compact(model, plan, x).model, acf.compact(acf.baked(model), plan, x).model
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


class Peeking(nn.Module):
    """Reads the parameter that its layer computes with, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Standardised(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + self.a.weight.sum()


def test_a_model_that_reads_the_parameter_elsewhere_is_refused():
    torch.manual_seed(0)
    model, x = Peeking(), image()
    before = copy.deepcopy(model.state_dict())
    plan = acf.Plan.uniform(acf.inspect(model, x), filters=0.5)
    with pytest.raises(AssertionError, match="Peeking computes something else when its computed weights are plain"):
        acf.compact(model, plan, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_towards_zeros_in_a_parameter_that_is_none_of_the_weights_is_refused():
    model = network()
    report = acf.inspect(model, image())
    message = r"names '0', whose weight is no parameter but computed in its Standardised: use acf.baked\(model\)"
    with pytest.raises(ValueError, match=message):
        acf.ADMM(model, {"0": Constraint("filter", keep=4)}, report=report)
    plan = acf.Plan.from_masks({"0": np.ones((8, 3, 3, 3), bool)})
    with pytest.raises(ValueError, match=message):
        MaskedParameters(model, plan, torch.optim.SGD(model.parameters(), 0.1))
    plain = acf.baked(model)
    admm = acf.ADMM(plain, {"0": Constraint("filter", keep=4)}, report=report)
    assert int(admm.finish()["0"].filters.sum()) == 4
    assert int((plain[0].weight.flatten(1).abs().sum(1) > 0).sum()) == 4
