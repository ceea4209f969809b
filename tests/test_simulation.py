"""Programs as torch modules: they compute what the engine does, have gradients, and become engines again."""

import copy

import numpy as np
import pytest
import torch
from test_acf_file import every_operation, example
from test_calibration import Branches, trained_norms
from test_engine_native import Drawn, assert_close
from test_narrow import every_residual_of_8_bits, every_storage, narrowed, one_addition, some
from torch import nn

import autocompress_fast as acf
from autocompress_fast import models
from autocompress_fast.compact import compact
from autocompress_fast.engine import Engine
from autocompress_fast.engine.program import ProgramError, is_narrow, rounds_residual, validate
from autocompress_fast.engine.reference import Reference
from autocompress_fast.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")


def outputs(simulation, inputs, *, exact=False):
    simulation.train(not exact)
    with torch.no_grad():
        found = simulation(*map(torch.from_numpy, inputs))
    return [y.numpy() for y in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("seed", range(30))
def test_random_programs(seed):
    drawn = Drawn(seed)
    inputs = drawn.samples(3)
    wanted = Reference(drawn.program, drawn.infos).run(inputs)
    assert_close(outputs(acf.simulate(Engine(drawn.program)), inputs), wanted)


def test_every_operation():
    engine = Engine(every_operation())
    assert_close(outputs(acf.simulate(engine), [example()]), list(engine(example())))


@pytest.mark.parametrize("seed", range(12))
def test_every_step_of_8_bits_is_that_of_the_engine(seed):
    """One by one: in a whole network the last bits of a sum may decide how the next layer rounds."""
    program = narrowed(every_storage() if seed == 0 else Drawn(seed).program, seed)
    program = every_residual_of_8_bits() if seed == 1 else program
    inputs = some(program)
    everything = Engine(program).program.__class__(
        program.inputs, program.steps, tuple(s.output for s in program.steps), program.tensors
    )
    values = inputs + Reference(everything, validate(program)).run(inputs)
    simulation = acf.simulate(Engine(program))
    for step, module in zip(program.steps, simulation.steps, strict=True):
        inputs = [values[value] for value in step.inputs]
        assert_close(outputs(module, inputs), [values[step.output]])
        exact = is_narrow(step) or rounds_residual(step)
        if exact and step.attributes["activation"] in ("none", "relu"):
            np.testing.assert_array_equal(outputs(module, inputs, exact=True)[0], values[step.output])


@pytest.mark.parametrize("make", [every_operation, lambda: narrowed(every_storage(), 3)])
def test_an_engine_again_with_the_same_weights(make):
    program = make()
    engine = Engine(program, info={"mean": [0.5]})
    again = acf.simulate(engine).engine(threads=1)
    assert again.info == {"mean": [0.5]}
    assert again.threads == 1
    assert again.program.steps == program.steps
    for name, tensor in program.tensors.items():
        assert again.program.tensors[name].dtype == tensor.dtype
        assert again.program.tensors[name].tobytes() == tensor.tobytes()


def test_rounding_has_the_gradient_of_the_identity_inside_the_range():
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
    x = torch.linspace(0, 1, 50)[:, None]
    simulation = acf.simulate(acf.quantize(acf.compile(net, x), x, method="minmax"))
    inside, outside = torch.full((1, 1), 0.503, requires_grad=True), torch.full((1, 1), 1.5, requires_grad=True)
    (simulation(inside) + simulation(outside)).sum().backward()
    assert inside.grad.item() == pytest.approx(1)
    assert outside.grad.item() == 0
    weight = simulation.steps[0].weight
    assert weight.grad.item() == pytest.approx(1.503, abs=0.01)  # both inputs, as they are rounded
    with torch.no_grad():
        weight.fill_(1.1)  # beyond what 8 bits can say
    weight.grad = None
    simulation(torch.ones(1, 1)).sum().backward()
    assert weight.grad.item() == 0
    assert simulation.engine().program.tensors["linear.weight"].tolist() == [[127]]


def test_what_is_added_passes_gradients_on_inside_its_range():
    simulation = acf.simulate(Engine(one_addition()))  # from -0.25 to 63.5 in steps of 0.25
    addition = simulation.steps[1]
    residual = torch.tensor([0.3, 80.0, -1.0], requires_grad=True)
    y = addition(torch.zeros(3), residual)
    assert y.tolist() == [0.25, 63.5, -0.25]
    y.sum().backward()
    assert residual.grad.tolist() == [1, 0, 0]


def test_a_residual_that_is_no_number_is_the_largest():
    program = one_addition()
    simulation = acf.simulate(Engine(program)).eval()
    x = np.float32([np.nan, np.inf, -np.inf, 3e38, 0.3, -0.1, 0.125, 0.375, 0.625]).reshape(1, 1, 3, 3).repeat(2, 1)
    np.testing.assert_array_equal(outputs(simulation, [x], exact=True)[0], Engine(program)(x))


def lenet():
    torch.manual_seed(0)
    data = acf.data.digits()
    model = acf.train(
        models.create("lenet_digits"),
        data,
        acf.TrainingConfig(epochs=2, optimizer="adam", lr=3e-3, precision="float32"),
    )
    return model.eval(), data.train.normalized(slice(300)), data.validation.normalized()


def resnet():
    torch.manual_seed(0)
    x = torch.randn(300, 3, 8, 8)
    return trained_norms(Branches(), x), x[:200].numpy(), x[200:].numpy()


@pytest.mark.parametrize("make", [lenet, resnet])
def test_engine_and_simulation_agree(make):
    model, samples, unseen = make()
    small = acf.quantize(acf.compile(model, torch.from_numpy(unseen[:2])), samples)
    simulation = acf.simulate(small)
    found = small(unseen)
    for exact, least in ((True, 0.9), (False, 0.5)):
        wanted = outputs(simulation, [unseen], exact=exact)[0]
        assert (found.argmax(1) == wanted.argmax(1)).mean() > 0.99
        # all but the few in which a value lay between two numbers, to the last bits
        differences = np.abs(found - wanted).max(axis=1) / np.abs(wanted).max()
        assert (differences < 1e-5).mean() > least
        assert differences.max() < 0.02
    assert np.array_equal(acf.compile(simulation, torch.from_numpy(unseen[:2]))(unseen), found)


def test_sums_beyond_the_integers_of_float32_are_exact():
    torch.manual_seed(0)
    net = nn.Linear(3001, 4)
    with torch.no_grad():
        net.weight.uniform_(0.9, 1.0)
    x = torch.rand(20, 3001) / 2 + 0.5
    engine = acf.quantize(acf.compile(net, x), x)
    (layer,) = acf.simulate(engine).eval().steps
    sums = 255 * layer.integers().double().sum(dim=1)
    assert (sums > 2**26).all()  # of which float32 has one in eight
    (found,) = outputs(acf.simulate(engine), [x.numpy()], exact=True)
    np.testing.assert_array_equal(found, engine(x.numpy()))


def test_training_moves_the_integers_and_the_engine_follows():
    model, samples, _ = resnet()
    labels = torch.from_numpy(samples[:, 0].sum((1, 2)) > 0).long()
    x = torch.from_numpy(samples)
    small = acf.quantize(acf.compile(model, x[:2]), samples)
    simulation = acf.simulate(small)
    optimizer = torch.optim.Adam(simulation.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(simulation(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    tuned = simulation.engine()
    assert [s.attributes for s in tuned.program.steps] == [s.attributes for s in small.program.steps]
    for step in tuned.program.steps:
        if is_narrow(step):
            name = step.tensors["weight"]
            assert (tuned.program.tensors[name] != small.program.tensors[name]).any()
    loss = nn.functional.cross_entropy(torch.from_numpy(tuned(samples)), labels).item()
    assert loss == pytest.approx(nn.functional.cross_entropy(simulation(x), labels).item(), abs=0.01)


def test_what_was_pruned_stays_pruned():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    kept = np.ones((8, 6, 3, 3))
    kept[:, [0, 3]] = 0
    x = torch.randn(60, 6, 4, 4)
    small = compact(net, Plan.from_masks({"0": kept}), x).model
    simulation = acf.simulate(acf.quantize(acf.compile(small, x), x))
    before = simulation.engine()
    optimizer = torch.optim.SGD(simulation.parameters(), lr=0.1)
    simulation(x).square().sum().backward()
    optimizer.step()
    after = simulation.engine()
    assert after.weights.kept == before.weights.kept == 8 * 36 + 3 * 128
    np.testing.assert_array_equal(after.program.tensors["0.columns"], before.program.tensors["0.columns"])


def test_copies_and_saved_states():
    model, samples, _ = resnet()
    x = torch.from_numpy(samples[:3])
    simulation = acf.simulate(acf.quantize(acf.compile(model, x), samples))
    other = copy.deepcopy(simulation)
    with torch.no_grad():
        other.steps[0].weight.mul_(0.5)
    assert not torch.equal(other(x), simulation(x))
    other.load_state_dict(simulation.state_dict())
    assert torch.equal(other(x), simulation(x))
    assert all(name.rsplit(".", 1)[-1] in ("weight", "bias") for name in simulation.state_dict())
    assert "conv grouped 8-bit" in repr(simulation)


def test_weights_that_became_nan_are_refused():
    simulation = acf.simulate(Engine(every_storage()))
    with torch.no_grad():
        simulation.steps[0].weight[0, 0] = float("nan")
    with pytest.raises(ProgramError, match="holds NaN or infinity"):
        simulation.engine()
