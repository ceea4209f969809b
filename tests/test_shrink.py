"""Weights that shrink to zero while a network trains: the step as mathematics, its steering, and whole trainings."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import autocompress_fast as acf
from autocompress_fast.data import UserBatches
from autocompress_fast.meter import Meter
from autocompress_fast.progress import Progress
from autocompress_fast.shrink import Shrinkage, ShrunkParameters, largest_left
from autocompress_fast.training import Trainer, TrainingConfig

FOREVER = 10**8  # steps of a training whose strengths are not steered within a test


def layer(values: torch.Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(values.numel(), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(values.reshape(1, -1))
    return model


def constant(strength: float, epsilon: float) -> Shrinkage:
    return Shrinkage({"params": {"0": 1.0}}, {"params": 1.0}, {"0": epsilon}, FOREVER, {"params": strength})


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    weights = model.parameters()
    return {
        "sgd": torch.optim.SGD(weights, lr=0.1),
        "momentum": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
        "adam": torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.8, 0.99)),
        "adamw": torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
    }


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adamw"])
def test_the_step_is_the_minimum_of_its_linearised_penalty(kind):
    torch.manual_seed(1)
    values = torch.tensor([0.5, -0.3, 0.02, -0.01, 0.0, 1e-8, -2.0, 0.1], dtype=torch.float64)
    model = layer(values).double()
    optimizer = optimizers(model)[kind]
    twin = layer(values).double()
    plain = optimizers(twin)[kind]
    strength, epsilon = 3e-3, 0.05
    with ShrunkParameters(model, constant(strength, epsilon), optimizer):
        for step in range(3):
            with torch.no_grad():
                twin[0].weight.copy_(model[0].weight)
            gradient = torch.randn(1, 8, dtype=torch.float64)
            for net, stepped in ((twin, plain), (model, optimizer)):
                net[0].weight.grad = gradient.clone()
                stepped.step()
            moved = twin[0].weight.detach().flatten().numpy()
            if kind.startswith("adam"):
                second = plain.state[twin[0].weight]["exp_avg_sq"].flatten().numpy()
                beta = 0.99 if kind == "adam" else 0.999
                scale = 0.1 / (np.sqrt(second / (1 - beta ** (step + 1))) + 1e-8)
            else:
                scale = np.full(8, 0.1 if kind == "sgd" else 1.0)
            for index, (w, s, found) in enumerate(zip(moved, scale, model[0].weight.flatten().tolist(), strict=True)):
                # argmin_x (x - w)^2 / (2 s) + strength / (|w| + epsilon) * |x|, among many points
                points = np.concatenate([[0.0, found], np.linspace(-abs(w), abs(w), 20001)])
                costs = (points - w) ** 2 / (2 * s) + strength / (abs(w) + epsilon) * np.abs(points)
                best = points[costs.argmin()]
                assert abs(best - found) <= 1e-4 * abs(w), (kind, step, index)
                assert costs[1] <= costs.min() + 1e-15
    assert not np.signbit(model[0].weight.detach().numpy()[model[0].weight.detach().numpy() == 0]).any()


def test_at_rest_every_weight_is_worth_the_strength_and_zeros_would_not_pay():
    torch.manual_seed(0)
    curvature, optimum = torch.rand(50) + 0.1, torch.randn(50)
    model = layer(torch.randn(50))
    strength, epsilon = 0.05, 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model[0].weight
    with ShrunkParameters(model, constant(strength, epsilon), optimizer):
        for _ in range(3000):
            weight.grad = (curvature * (weight.detach() - optimum)).reshape(1, -1)
            optimizer.step()
    w = weight.detach().flatten()
    slope = (curvature * (w - optimum)).abs()
    left = w != 0
    assert 5 < int(left.sum()) < 45
    # The penalty is made linear where the optimizer has moved the weight to, 0.1 * slope further out.
    worth = slope * (w.abs() + 0.1 * slope + epsilon)
    torch.testing.assert_close(worth[left], torch.full_like(w[left], strength), rtol=1e-4, atol=0)
    assert (worth[~left] <= strength * (1 + 1e-5)).all()


def regression(columns: int, seed: int, steps: int) -> tuple[nn.Sequential, UserBatches, set[int]]:
    """Targets that depend on five of the inputs, by weights of different size."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.zeros(columns)
    chosen = torch.randperm(columns, generator=generator)[:5]
    true[chosen] = torch.tensor([2.0, -1.5, 1.0, -1.0, 0.75])
    found = []
    for _ in range(steps):
        x = torch.randn(64, columns, generator=generator)
        found.append((x, (x @ true > 0).long()))
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(columns, 2, bias=False)), UserBatches(found), set(chosen.tolist())


def trained(model: nn.Module, data: UserBatches, what: Shrinkage, epochs: int, **options: object) -> Trainer:
    config = TrainingConfig(epochs=epochs, optimizer="adam", lr=5e-3, weight_decay=0.0, warmup=0.0)
    trainer = Trainer(model, data, config, shrinkage=what, **options)
    trainer.run()
    return trainer


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_weights_that_matter_are_left(seed):
    model, data, chosen = regression(60, seed, steps=50)
    what = Shrinkage({"params": {"0": 1.0}}, {"params": 10.0}, {"0": 0.01}, steps=20 * 50)
    trainer = trained(model, data, what, 20)
    columns = set(model[0].weight.abs().sum(0).nonzero().flatten().tolist())
    assert 8 <= trainer.history[-1]["left"] <= 10
    assert int(model[0].weight.count_nonzero()) == trainer.history[-1]["left"]
    assert columns <= chosen
    assert len(columns) >= 4


def test_a_limit_that_does_not_bind_has_no_strength_and_costs_weigh():
    model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 2))
    torch.manual_seed(0)
    x = torch.randn(256, 30)
    data = UserBatches([(x, (x[:, 0] * x[:, 1] > 0).long())] * 30)
    first, second = {"0": 1.0}, {"0": 1.0, "2": 9.0}
    what = Shrinkage({"conv": first, "macs": second}, {"conv": 890.0, "macs": 200.0}, {"0": 0.01, "2": 0.01}, steps=900)
    trainer = trained(model, data, what, 30)
    strength = trainer.history[-1]["strength"]
    assert strength["conv"] < 1e-3 * strength["macs"]
    kept = [int(model[i].weight.count_nonzero()) for i in (0, 2)]
    assert 150 <= kept[0] + 9 * kept[1] <= 210


def test_a_strength_that_is_given_is_where_it_begins():
    model, data, _ = regression(20, 0, steps=2)
    what = Shrinkage({"params": {"0": 1.0}}, {"params": 4.0}, {"0": 0.01}, FOREVER, {"params": 1e-7})
    trainer = trained(model, data, what, 1)
    assert trainer.history[-1]["strength"] == {"params": 1e-7}


def test_schedule_falls_to_the_limit_and_stays_there():
    what = Shrinkage({"params": {"0": 1.0}}, {"params": 7.0}, {"0": 0.01}, steps=100)
    allowed = [what.allowed("params", 5000.0, step) for step in range(1, 101)]
    assert allowed == sorted(allowed, reverse=True)
    assert allowed[79:] == [7.0] * 21
    assert 7.0 < allowed[77] < 7.1
    assert what.allowed("params", 5.0, 1) == 7.0  # there is less already


def test_a_training_that_was_stopped_goes_on_as_one_that_was_not(tmp_path):
    results = []
    for stops in ((6,), (1, 4, 6)):
        path = tmp_path / f"{len(stops)}.ckpt"
        for number, stop in enumerate(stops):
            model, data, _ = regression(40, 3, steps=20)
            what = Shrinkage({"params": {"0": 1.0}}, {"params": 8.0}, {"0": 0.01}, steps=6 * 20)
            config = TrainingConfig(epochs=6, optimizer="adam", lr=5e-3, weight_decay=0.0)
            progress = Stop(stop * 20) if number + 1 < len(stops) else None
            trainer = Trainer(model, data, config, shrinkage=what, checkpoint=path, progress=progress)
            if progress is None:
                trainer.run()
            else:
                with pytest.raises(KeyboardInterrupt):
                    trainer.run()
        results.append((model[0].weight.detach().clone(), trainer.history[-1]["strength"]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    other = Shrinkage({"params": {"0": 1.0}}, {"params": 9.0}, {"0": 0.01}, steps=120)
    with pytest.raises(ValueError, match="of a run with another shrinkage"):
        Trainer(model, data, config, shrinkage=other, checkpoint=path).run()


class Stop(Progress):
    """Interrupts a training in the middle of the epoch after so many batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches + 5

    def advance(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def small_network() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 10))
    return model, torch.zeros(1, 1, 8, 8)


def test_costs_of_every_rate():
    model, x = small_network()
    report = acf.inspect(model, x)
    target = acf.Target.parse("conv=2,params=10,macs=4")
    found = Shrinkage.towards(report, target, steps=10)
    assert found.costs == {"conv": {"0": 1.0}, "params": {"0": 1.0, "3": 1.0}, "macs": {"0": 36.0, "3": 1.0}}
    counts = report.counts()
    assert found.limits == {"conv": 27.0, "params": counts.params / 10, "macs": counts.macs / 4}
    held = acf.inspect(model, x, exclude="0")
    found = Shrinkage.towards(held, acf.Target(params=10), steps=10)
    assert found.layers == ["3"]
    assert found.limits == {"params": counts.params / 10 - 54}
    with pytest.raises(ValueError, match="layers that stay have 2160"):
        Shrinkage.towards(acf.inspect(model, x, exclude="3"), acf.Target(params=10), steps=10)
    with pytest.raises(ValueError, match="not bytes: got bytes 1000"):
        Shrinkage.towards(report, acf.Target(bytes=1000), steps=10)


@pytest.mark.parametrize("rate", [1, 3, 10, 100])
def test_what_is_left_is_the_largest_that_meets_the_target(rate):
    model, x = small_network()
    with torch.no_grad():
        for index in (0, 3):
            model[index].weight.mul_(torch.rand_like(model[index].weight) < 0.5)
    report = acf.inspect(model, x)
    meter = Meter(report)
    plan = largest_left(report, acf.Target(params=rate), meter)
    found = meter.measure(plan).params
    whole = sum(int(model[i].weight.count_nonzero()) for i in (0, 3))
    allowed = meter.dense.params / rate
    assert found <= allowed
    assert found == whole if allowed >= whole else found > 0.85 * allowed - 2
    for name, kept in plan.items():
        weight = report.weight(name).abs().numpy()
        mask = kept.mask()
        assert (weight[mask] > 0).all()
        if mask.any() and (dropped := weight[~mask & (weight > 0)]).size and rate < 10:
            assert dropped.max() <= weight[mask].max()


def test_what_cannot_be():
    costs, limits, epsilon = {"params": {"0": 1.0}}, {"params": 5.0}, {"0": 0.1}
    for changes, match in (
        ({"limits": {}}, "limits are for"),
        ({"limits": {"macs": 5.0}}, r"limits are for \['macs'\], costs for \['params'\]"),
        ({"limits": {"params": 0.0}}, "limits must be positive and finite, got {'params': 0.0}"),
        ({"limits": {"params": math.nan}}, "limits must be positive"),
        ({"epsilon": {}}, "epsilon must be given for every layer, is missing for 0"),
        ({"epsilon": {"0": -1.0}}, "epsilon must be positive"),
        ({"strength": {"macs": 1.0}}, "strength must be given for"),
        ({"strength": {"params": math.inf}}, "strength must be positive"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"costs": {"params": {"0": 0.0}}}, "costs of params must be positive"),
    ):
        given = {"costs": costs, "limits": limits, "epsilon": epsilon, "steps": 10} | changes
        with pytest.raises(ValueError, match=match):
            Shrinkage(**given)
    model = layer(torch.randn(10))
    before = model[0].weight.detach().clone()
    what = Shrinkage(costs, limits, epsilon, 10)
    with pytest.raises(ValueError, match="beside SGD, Adam or AdamW, got RMSprop"):
        ShrunkParameters(model, what, torch.optim.RMSprop(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="'7', which is no layer"):
        ShrunkParameters(model, Shrinkage({"params": {"7": 1.0}}, limits, {"7": 0.1}, 10), optimizer)
    with pytest.raises(ValueError, match="the state must have the shapes"):
        ShrunkParameters(model, what, optimizer, state={"step": torch.zeros(3)})
    assert torch.equal(model[0].weight, before)
    hooked = ShrunkParameters(model, what, optimizer)
    hooked.remove()
    model[0].weight.grad = torch.zeros(1, 10)
    optimizer.step()
    assert torch.equal(model[0].weight, before)
