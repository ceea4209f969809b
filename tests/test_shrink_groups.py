"""Columns and channels that shrink to zero while a network trains: the step as loops, its costs, whole trainings."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress_fast import inspect
from autocompress_fast.meter import Meter
from autocompress_fast.plan import LayerPlan, Plan
from autocompress_fast.rates import Target
from autocompress_fast.shrink_groups import GroupShrinkage, ShrunkGroups, largest_columns_left

pytestmark = pytest.mark.usefixtures("one_thread")


class Residual(nn.Module):
    """Two convolutions whose sum is read by a third and, flattened, by a linear layer; one between is depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 3, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.c = nn.Conv2d(6, 5, 1)
        self.d = nn.Linear(5 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        x = F.relu(x + self.b(x))
        return self.d(F.relu(self.c(F.relu(self.deep(x)))).flatten(1))


class Chain(nn.Module):
    """Of one dimension, with a transposed convolution, whose columns stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 4, 3, padding=1)
        self.b = nn.Conv1d(4, 5, 3)
        self.up = nn.ConvTranspose1d(5, 6, 2, stride=2)
        self.c = nn.Conv1d(6, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.relu(self.up(F.relu(self.b(F.relu(self.a(x))))))).mean(2)


NETWORKS = {"residual": (Residual, (3, 4, 4)), "chain": (Chain, (2, 8))}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    return make(), torch.randn(8, *shape)


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.8, 0.99))
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def numbers(layer: nn.Module) -> np.ndarray:
    """The weight of a layer, filters first."""
    weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose1d) else layer.weight
    return weight.detach().double().numpy()


def expected_step(moved, before, shrinkage, strength, reads, epsilons):
    """What the weights of the layers are after the step: one loop over columns, one over channels.

    moved: layer -> how far the optimizer moves each weight per unit of a gradient; before: the weights to shrink.
    """
    layers = shrinkage.layers
    columns = {n: (before[n] != 0).any(0) if x.shrinks else np.ones(x.shape[1:], bool) for n, x in layers.items()}
    read = dict.fromkeys(range(shrinkage.groups), False)
    for name, layer in layers.items():
        for channel, group in enumerate(layer.channels if layer.shrinks else []):
            if group >= 0 and columns[name][channel].any():
                read[group] = True
    alive = {n: sum(g < 0 or read[g] for g in x.filters.tolist()) for n, x in layers.items()}
    total = sum(math.prod(x.shape) for x in layers.values())
    average = sum(math.prod(x.shape) * x.costs["macs"] for x in layers.values()) / total
    each = {n: strength * x.costs["macs"] / average for n, x in layers.items()}
    after = {n: before[n].copy() for n, x in layers.items() if x.shrinks}
    squares, pulls, smalls = ({g: [] for g in range(shrinkage.groups)} for _ in range(3))
    for name in after:
        for place in np.ndindex(layers[name].shape[1:]):
            at = (slice(None), *place)
            a = reads[name][place[0]]
            size = a * np.linalg.norm(before[name][at])
            pull = a * a * moved[name][place]
            if size > 0:
                less = pull * alive[name] * each[name] / (size + epsilons[name])
                after[name][at] *= max(0.0, 1 - less / size)
            group = layers[name].channels[place[0]]
            if group >= 0:
                squares[group].append(size**2)
                pulls[group].append(size**2 * pull)
                smalls[group].append(size**2 * epsilons[name])
    largest = {}
    for name in after:
        sizes = reads[name].reshape(-1, *[1] * (before[name].ndim - 2)) * np.linalg.norm(before[name], axis=0)
        largest[name] = np.unravel_index(sizes.argmax(), sizes.shape)
    for group in range(shrinkage.groups if shrinkage.channels else 0):
        cost = sum((x.filters == group).sum() * columns[n].sum() * each[n] for n, x in layers.items())
        size = math.sqrt(sum(squares[group]))
        if size > 0:
            small = np.sum(smalls[group]) / size**2
            less = np.sum(pulls[group]) / size**2 * cost / (size + small)
            for name in after:
                after[name][:, layers[name].channels == group] *= max(0.0, 1 - less / size)
    for name, place in largest.items():  # the largest column of a layer stays
        after[name][(slice(None), *place)] = before[name][(slice(None), *place)]
        after[name] *= np.linalg.norm(before[name]) / np.linalg.norm(after[name])  # and every layer as large as it was
    return after


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("structure", ["filter+column", "column"])
def test_the_step_is_that_of_loops_over_columns_and_channels(network, kind, structure):
    model, x = made(network)
    twin, _ = made(network)
    report = inspect(model, x[:1])
    strength = 0.3 if kind == "sgd" else 3e-3
    shrinkage = GroupShrinkage.towards(report, Target(macs=3), structure, steps=60, strength={"macs": strength})
    assert shrinkage.channels == (structure == "filter+column")
    with torch.no_grad():
        first = model.a.weight
        first[:, 1].zero_()  # a channel that nobody reads
    optimizer, plain = optimizer_of(kind, model), optimizer_of(kind, twin)
    names = [name for name, layer in shrinkage.layers.items() if layer.shrinks]
    shrank = 0
    with ShrunkGroups(model, shrinkage, optimizer) as shrunk:
        for step in range(4):
            strength = shrunk.strength["macs"]
            twin.load_state_dict(model.state_dict())
            for net, stepped in ((twin, plain), (model, optimizer)):
                stepped.zero_grad()
                net(x).square().sum().backward()
                if step == 1:  # zeros that stay
                    net.a.weight.grad[:, 1].zero_()
                stepped.step()
            state = shrunk.state_dict()
            reads = {name: state[f"reads.{name}"].double().numpy() for name in names}
            epsilons = dict(zip(names, state["epsilon"].tolist(), strict=True))
            moved, before, found = {}, {}, {}
            for name in names:
                layer = twin.get_submodule(name)
                before[name] = numbers(layer)
                found[name] = numbers(model.get_submodule(name))
                of = plain.state[layer.weight]
                if kind == "adam":
                    mean = of["exp_avg_sq"].double().numpy().mean(0) / (1 - 0.99 ** float(of["step"]))
                    moved[name] = 1e-3 / (np.sqrt(mean) + 1e-8)
                else:
                    moved[name] = np.full(before[name].shape[1:], 1e-2)
            for name in shrinkage.layers:
                before.setdefault(name, numbers(twin.get_submodule(name)))
            expected = expected_step(moved, before, shrinkage, strength, reads, epsilons)
            for name in names:
                np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=1e-7)
                shrank += int((expected[name] != before[name]).any())
    assert shrank >= 3 * len(names)


def test_a_contribution_is_the_same_however_layers_share_the_scale():
    """conv1 times 8 and conv2 over 8, of which a ReLU and the loss see nothing."""
    sizes = []
    for scale in (1.0, 8.0):
        model, x = made("residual")
        with torch.no_grad():
            for part in (model.a.weight, model.a.bias, model.b.bias):
                part.mul_(scale)  # what is added to it is linear in it but for the bias
            model.deep.weight.div_(scale)
        shrinkage = GroupShrinkage.towards(inspect(model, x[:1]), Target(params=2), steps=10)
        with ShrunkGroups(model, shrinkage, optimizer_of("adam", model)) as shrunk:
            model(x)
            norms = shrunk._norms()
            sizes.append({name: shrunk._reads(name) * norms[name] for name in ("a", "b", "c", "d")})
            for name in ("a", "b"):  # contribute to what is as many times as large
                sizes[-1][name] /= scale
    for name, size in sizes[0].items():
        torch.testing.assert_close(size, sizes[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_costs_are_those_of_what_is_cut_out(network):
    """Of channels that nobody reads, and of columns of the others."""
    model, x = made(network)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for layer in (model.b, model.c):
            layer.weight[:, 2].zero_()
        model.b.weight.mul_(torch.from_numpy(rng.random(model.b.weight.shape[1:]) < 0.6))
        model.b.weight[:, 0, 1] = 1.0
    report = inspect(model, x[:1])
    shrinkage = GroupShrinkage.towards(report, Target(conv=2, params=2, macs=2), steps=10)
    plan = {}
    for layer in report.layers:
        columns = (report.weight(layer.name) != 0).any(dim=0).reshape(-1).numpy()
        if layer.groups == 1:
            plan[layer.name] = LayerPlan(
                layer.shape, np.ones(layer.shape[0], bool), columns, transposed=layer.transposed
            )
    counts = Meter(report).measure(Plan(plan))
    shrunk = ShrunkGroups(model, shrinkage, optimizer_of("sgd", model))
    assert counts.conv < report.counts().conv * 0.9
    assert {s: shrunk._cost(s) for s in shrinkage.limits} == {s: getattr(counts, s) for s in shrinkage.limits}


def test_channels_that_something_else_reads_stay():
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x)))

    report = inspect(Grouped(), torch.zeros(1, 3, 2, 2))
    shrinkage = GroupShrinkage.towards(report, Target(params=2), steps=10)
    assert {name: layer.shrinks for name, layer in shrinkage.layers.items()} == {"a": True, "b": False, "c": True}
    assert (shrinkage.layers["a"].filters == -1).all()  # b reads them, whose columns stay
    assert (shrinkage.layers["c"].filters == -1).all()  # the output
    held = inspect(Grouped(), torch.zeros(1, 3, 2, 2), exclude=["c"])
    assert not GroupShrinkage.towards(held, Target(params=1.1), steps=10).layers["c"].shrinks


def rows_of_one_channel(seed: int, images: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of three channels; classes by how neighbours in the rows of the second go together."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, 8, 8, generator=generator)
    return x, ((x[:, 1, :, 1:] * x[:, 1, :, :-1]).mean((1, 2)) > 0).long()


def test_what_is_left_is_what_the_task_needs():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    example, steps, target = torch.zeros(1, 3, 8, 8), 800, Target(params=6)
    meter = Meter(inspect(model, example))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    shrinkage = GroupShrinkage.towards(meter.report, target, steps=steps)
    with ShrunkGroups(model, shrinkage, optimizer) as shrunk:
        for step in range(steps):
            x, y = rows_of_one_channel(step)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert shrunk.left < 1.5 * shrinkage.limits["params"]
    report = inspect(model, example)
    plan = largest_columns_left(report, target, meter)
    energy = model[0].weight.detach().square().sum((0, 2, 3))
    assert energy[1] > 0.99 * energy.sum()  # of the channel that matters
    assert target.met(meter.dense, meter.measure(plan))
    x, y = rows_of_one_channel(-1 + 2**31, 512)
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.7


def test_a_training_that_is_continued_shrinks_on_as_if_it_had_not_stopped():
    def trained(stops: tuple[int, ...]) -> nn.Module:
        model, x = made("residual")
        optimizer, state, done = optimizer_of("adam", model), None, 0
        shrinkage = GroupShrinkage.towards(inspect(model, x[:1]), Target(macs=4), steps=60)
        for stop in (*stops, 60):
            with ShrunkGroups(model, shrinkage, optimizer, state=state) as shrunk:
                for _ in range(done, stop):
                    optimizer.zero_grad()
                    model(x).square().mean().backward()
                    optimizer.step()
                state, done = {name: value.clone() for name, value in shrunk.state_dict().items()}, stop
        return model

    whole, parts = trained(()), trained((7, 23, 24))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_of_a_network_of_double_precision_the_step_is_the_same():
    after = []
    for dtype in (torch.float32, torch.float64):
        model, x = (value.to(dtype) for value in made("residual"))
        optimizer = optimizer_of("adam", model)
        shrinkage = GroupShrinkage.towards(inspect(model, x[:1]), Target(macs=3), steps=60, strength={"macs": 3e-3})
        with ShrunkGroups(model, shrinkage, optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        after.append([value.detach().double() for value in model.parameters()])
    for single, double in zip(*after, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-6)


def test_what_is_measured_of_a_compiled_model_is_what_hooks_see():
    found = []
    for compiled in (False, True):
        model, x = made("residual")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        shrinkage = GroupShrinkage.towards(inspect(model, x[:1]), Target(macs=3), steps=60)
        forward = torch.compile(model, backend="eager") if compiled else model
        with ShrunkGroups(model, shrinkage, optimizer) as shrunk:
            for step in range(12):
                if compiled:
                    model.d.eval()  # as layers that somebody froze
                    shrunk.measure(x + step)
                    assert [model.training, model.d.training] == [True, False]
                forward(x + step).square().mean().backward()
                optimizer.step()
            found.append({name: value.clone() for name, value in shrunk.state_dict().items() if "reads" in name})
    hooks, measured = found
    assert hooks.keys() == measured.keys()
    for name, reads in hooks.items():
        assert torch.equal(reads, measured[name])
        assert (reads > 0).any()


def test_what_one_size_leaves_room_for_stays_in_layers_that_do_not_count_to_it():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 20), nn.ReLU(), nn.Linear(20, 3)
    )
    report = inspect(model, torch.zeros(1, 4, 6, 6))
    meter = Meter(report)
    both, conv = Target(conv=12, params=2), Target(conv=12)
    plan, narrow = (largest_columns_left(report, target, meter) for target in (both, conv))
    assert both.met(meter.dense, meter.measure(plan))
    kept = {name: layer.columns.sum() for name, layer in plan.items()}
    assert kept["0"] == narrow["0"].columns.sum() == 3
    # Not one column more would fit.
    for name, layer in plan.items():
        norms = np.linalg.norm(numbers(model.get_submodule(name)).reshape(layer.shape[0], -1), axis=0)
        smallest = np.where(layer.columns.reshape(-1), 0, norms).argmax()
        columns = layer.columns.copy()
        columns.reshape(-1)[smallest] = True
        more = Plan({**plan, name: LayerPlan(layer.shape, np.ones(layer.shape[0], bool), columns)})
        assert not both.met(meter.dense, meter.measure(more))


def test_bad_input_is_refused():
    model, x = made("residual")
    report = inspect(model, x[:1])
    with pytest.raises(ValueError, match="structure must be filter\\+column or column, got 'filter'"):
        GroupShrinkage.towards(report, Target(params=2), "filter", steps=10)
    with pytest.raises(ValueError, match="not seconds"):
        GroupShrinkage.towards(report, Target.parse("2x faster"), steps=10)
    with pytest.raises(ValueError, match="no layer has columns that can shrink"):
        GroupShrinkage.towards(inspect(model, x[:1], exclude=["*"]), Target(params=2), steps=10)
    shrinkage = GroupShrinkage.towards(report, Target(params=2), steps=10)
    with pytest.raises(ValueError, match="beside SGD, Adam or AdamW, got Adagrad"):
        ShrunkGroups(model, shrinkage, torch.optim.Adagrad(model.parameters()))
    with pytest.raises(ValueError, match="'a', which is no layer"):
        ShrunkGroups(nn.Linear(2, 2), shrinkage, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="the state must have the shapes"):
        ShrunkGroups(model, shrinkage, torch.optim.SGD(model.parameters(), lr=0.1), state={"step": torch.zeros(())})
    split, _ = made("residual")
    split.c.to("meta")
    with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
        ShrunkGroups(split, shrinkage, torch.optim.SGD(split.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="one column of every layer is too much"):
        largest_columns_left(report, Target(params=300), Meter(report))
