"""Steps of 8-bit inputs and weights: what a program may hold, what they compute, files of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from test_acf_file import ONE, Builder, packed
from test_engine_native import Drawn
from torch import nn
from torch.nn import functional

import autocompress_fast as acf
from autocompress_fast import _core
from autocompress_fast.engine import Engine, FileFormatError
from autocompress_fast.engine.file import size, write
from autocompress_fast.engine.narrow import residuals
from autocompress_fast.engine.program import (
    Input,
    Program,
    ProgramError,
    Step,
    is_narrow,
    program_to_json,
    rounds_residual,
    validate,
)
from autocompress_fast.engine.reference import Reference, quantized

VERSION_3 = Path(__file__).parent / "data" / "version_3.acf"
VERSION_4 = Path(__file__).parent / "data" / "version_4.acf"


def narrowed(program: Program, seed: int) -> Program:
    """The same program with 8 bits in most of the steps that can have them; weights, scales and zeros are random."""
    rng = np.random.default_rng(seed)
    tensors, steps = dict(program.tensors), []
    for step in program.steps:
        if step.op not in ("conv", "linear") or step.attributes["storage"] == "sparse" or rng.random() < 0.2:
            steps.append(step)
            continue
        weight = tensors[step.tensors["weight"]]
        scales = f"{step.tensors['weight']}.scales"
        tensors[step.tensors["weight"]] = rng.integers(-127, 128, weight.shape).astype(np.int8)
        tensors[scales] = rng.uniform(0.001, 0.02, len(weight)).astype(np.float32)
        attributes = numbers(rng, "input")
        steps.append(
            dataclasses.replace(
                step, attributes={**step.attributes, **attributes}, tensors={**step.tensors, "scales": scales}
            )
        )
    return rounded(dataclasses.replace(program, steps=tuple(steps), tensors=tensors), rng)


def numbers(rng: np.random.Generator, what: str) -> dict[str, object]:
    """A scale and a zero."""
    zero = int(rng.choice([0, 3, 128, 255]))
    return {f"{what}_scale": float(rng.uniform(0.005, 0.03)), f"{what}_zero": zero}


def rounded(program: Program, rng: np.random.Generator, share: float = 0.8) -> Program:
    """The same program with 8 bits in most residuals that can have them."""
    shapes = [given.shape for given in program.inputs] + [info.shape for info in validate(program)]
    found = residuals(program, shapes, {step.output for step in program.steps if is_narrow(step)})
    steps = [
        dataclasses.replace(s, inputs=found[s.output], attributes={**s.attributes, **numbers(rng, "residual")})
        if s.output in found and rng.random() < share
        else s
        for s in program.steps
    ]
    return dataclasses.replace(program, steps=tuple(steps))


def every_storage() -> Program:
    """Convolutions in full, of columns, in groups and depthwise, and linear layers, all of 8 bits but one."""
    b = Builder(4, 6, 7)
    three = {**ONE, "kernel": (3, 3), "padding": (1, 0, 2, 1), "activation": "relu"}
    x = b.add("conv", 0, arrays={"weight": b.floats(6, 36), "bias": b.floats(6)}, **{**three, "filters": 6})
    columns = {
        "weight": b.floats(3, 4), "filters": np.array([0, 2, 5], np.uint16),
        "columns": np.array([0, 4, 9, 53], np.uint16), "bias": b.floats(6),
    }  # fmt: skip
    kept = {**three, "filters": 6, "storage": "columns", "stride": (1, 2), "activation": "none"}
    x = b.add("conv", x, arrays=columns, **kept)
    x = b.add("conv", x, arrays={"weight": b.floats(4, 27)}, **{**three, "filters": 4, "groups": 2})
    x = b.add("conv", x, arrays={"weight": b.floats(4, 9)}, **{**three, "filters": 4, "groups": 4})
    x = b.add("conv", x, arrays={"weight": b.floats(2, 4), "bias": b.floats(2)}, **{**ONE, "filters": 2})
    x = b.add("linear", x, arrays={"weight": b.floats(5, 7)}, filters=5, storage="dense", activation="none")
    fewer = {"weight": b.floats(5, 2), "columns": np.array([1, 4], np.uint16)}
    x = b.add("linear", x, arrays=fewer, filters=5, storage="columns", activation="tanh")
    return b.program(x)


def every_residual() -> Program:
    """Convolutions with residuals that layers read too, or not; of columns, and in groups."""
    b = Builder(4, 6, 7)
    three = {**ONE, "kernel": (3, 3), "padding": (1,) * 4, "filters": 4, "activation": "none"}
    x = b.add("conv", 0, arrays={"weight": b.floats(4, 36), "bias": b.floats(4)}, **{**three, "activation": "relu"})
    y = b.add("conv", x, arrays={"weight": b.floats(4, 36), "bias": b.floats(4)}, **three)
    x = b.add("add", y, x, activation="relu")
    columns = {"weight": b.floats(2, 3), "filters": np.array([0, 3], np.uint16)}
    columns |= {"columns": np.array([1, 9, 30], np.uint16), "bias": b.floats(4)}
    y = b.add("conv", x, arrays=columns, **{**three, "storage": "columns"})
    z = b.add("conv", x, arrays={"weight": b.floats(4, 4)}, **{**ONE, "filters": 4, "activation": "none"})
    x = b.add("add", y, z, activation="none")
    y = b.add("conv", x, arrays={"weight": b.floats(4, 18)}, **{**three, "groups": 2})
    x = b.add("add", x, y, activation="hardswish")
    y = b.add("conv", x, arrays={"weight": b.floats(4, 36)}, **three)
    return b.program(b.add("add", x, y, activation="relu6"))


def every_residual_of_8_bits() -> Program:
    """The same with 8 bits in all layers, and all residuals but the last."""
    rng = np.random.default_rng(0)
    program = rounded(narrowed_whole(every_residual(), rng), rng, 1.0)
    last = dataclasses.replace(program.steps[-1], attributes={"activation": "relu6"})
    return dataclasses.replace(program, steps=(*program.steps[:-1], last))


def some(program: Program, samples: int = 3) -> list[np.ndarray]:
    shapes = [given.shape for given in program.inputs]
    return [np.sin(np.arange(samples * np.prod(s)) * 1.7).astype(np.float32).reshape(samples, *s) for s in shapes]


# --- numbers


@pytest.mark.parametrize(("scale", "zero"), [(0.0137, 37), (1.0, 0), (3e-5, 255), (1e-30, 7), (1e30, 128)])
def test_inputs_become_what_torch_makes_of_them(scale, zero):
    rng = np.random.default_rng(zero)
    x = np.concatenate([rng.standard_normal(4000) * scale * 200, (np.arange(-300, 600) + 0.5) * scale, [0.0, -0.0]])
    x = np.concatenate([x, rng.standard_normal(500) * 1e5 * scale]).astype(np.float32)
    found = quantized(x, scale, zero)
    wanted = torch.fake_quantize_per_tensor_affine(torch.from_numpy(x), scale, zero, 0, 255).numpy()
    np.testing.assert_array_equal((found - zero).astype(np.float32) * np.float32(scale), wanted)


def test_what_is_no_number_or_beyond_them():
    x = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38], np.float32)
    assert quantized(x, 0.25, 100).tolist() == [255, 255, 0, 255, 0]


def by_torch(step, tensors, x):
    """A step of 8 bits from its definition, with torch's convolution of integers in float64."""
    a, own = step.attributes, {role: tensors[name] for role, name in step.tensors.items()}
    columns = x.shape[1] // a["groups"] * a["kernel"][0] * a["kernel"][1] if step.op == "conv" else x.shape[-1]
    rows, kept = own.get("filters", np.arange(a["filters"])), own.get("columns", np.arange(columns))
    weight = np.zeros((a["filters"], columns))
    weight[np.ix_(rows, kept)] = own["weight"]
    factor = np.ones(a["filters"], np.float32)
    factor[rows] = np.float32(a["input_scale"]) * own["scales"]
    integers = torch.from_numpy((quantized(x, a["input_scale"], a["input_zero"]) - a["input_zero"]).astype(np.float64))
    if step.op == "linear":
        sums, shape = functional.linear(integers, torch.from_numpy(weight)), (-1,)
    else:
        top, bottom, left, right = a["padding"]
        around = functional.pad(integers, (left, right, top, bottom))
        full = torch.from_numpy(weight.reshape(len(weight), x.shape[1] // a["groups"], *a["kernel"]))
        sums = functional.conv2d(around, full, None, a["stride"], 0, a["dilation"], a["groups"])
        shape = (-1, 1, 1)
    y = sums.numpy().astype(np.float32) * factor.reshape(shape)
    y = y + own["bias"].reshape(shape) if "bias" in own else y
    return {"none": lambda y: y, "relu": lambda y: np.maximum(y, 0), "tanh": np.tanh}[a["activation"]](y)


def test_what_is_added_is_rounded_as_inputs_are():
    program = every_residual_of_8_bits()
    assert [rounds_residual(step) for step in program.steps if step.op == "add"] == [True, True, True, False]
    given = some(program)
    everything = dataclasses.replace(program, outputs=tuple(step.output for step in program.steps))
    values = given + Reference(everything, validate(program)).run(given)
    activations = {"none": lambda y: y, "relu": lambda y: np.maximum(y, 0)}
    for step in program.steps[:-1]:
        if step.op == "add" and step.attributes["activation"] in activations:
            scale, zero = step.attributes["residual_scale"], step.attributes["residual_zero"]
            y, x = (values[value] for value in step.inputs)
            added = torch.fake_quantize_per_tensor_affine(torch.from_numpy(x), scale, zero, 0, 255).numpy()
            assert (added != x).any()
            np.testing.assert_array_equal(values[step.output], activations[step.attributes["activation"]](y + added))


def test_every_step_is_its_definition_bit_for_bit():
    program = narrowed(every_storage(), 1)
    assert sum(map(is_narrow, program.steps)) == 6
    outputs = tuple(step.output for step in program.steps)
    given = some(program)
    values = given + Reference(program, validate(program)).run(given)
    everything = dataclasses.replace(program, outputs=outputs)
    values = given + Reference(everything, validate(everything)).run(given)
    for step in program.steps:
        if is_narrow(step):
            wanted = by_torch(step, program.tensors, values[step.inputs[0]])
            np.testing.assert_array_equal(values[step.output], wanted)
            assert len(np.unique(wanted)) > 3


@pytest.mark.parametrize("seed", range(20))
def test_random_programs_in_every_batch(seed):
    program = narrowed(Drawn(seed).program, seed)
    engine = Engine(program, threads=1)
    inputs = [np.random.default_rng(seed).standard_normal((19, *i.shape), np.float32) for i in program.inputs]
    whole = engine(*inputs)
    few = engine(*(x[3:5] for x in inputs))
    for y, z in zip(whole, few, strict=True):
        np.testing.assert_allclose(y[3:5], z, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(z).max())))
    assert [y.shape[0] for y in engine(*(x[:0] for x in inputs))] == [0] * len(whole)
    assert engine.workspace_bytes(2) >= engine.workspace_bytes(1) > 0
    assert len(engine.profile(rounds=1).steps) >= 1


def test_an_engine_says_what_its_weights_take():
    program = narrowed(every_storage(), 1)
    engine = Engine(program)
    whole = Engine(every_storage())
    assert engine.weights.kept == whole.weights.kept
    assert engine.weights.bytes < 0.6 * whole.weights.bytes  # small layers, whose scales and biases count
    wanted = ["dense 8-bit", "columns 8-bit", *["dense 8-bit"] * 3, "dense", "columns 8-bit"]
    assert [step.storage for step in engine.summary().steps] == wanted
    assert "columns 8-bit" in str(engine.summary())


# --- what a program may hold


def one(op="conv", **changes):
    """A program of one step of 8 bits, with some of its attributes and tensors changed, or left out where None."""
    b = Builder(2, 3, 3) if op == "conv" else Builder(2)
    tensors = {"weight": np.ones((3, 2), np.int8), "scales": np.full(3, 0.5, np.float32)}
    form = ONE if op == "conv" else {"storage": "dense", "activation": "none"}
    attributes = {**form, "filters": 3, "input_scale": 0.5, "input_zero": 3}
    for name, value in changes.items():
        kind = tensors if isinstance(value, np.ndarray) or name in tensors else attributes
        kind[name] = value
        if value is None:
            del kind[name]
    return b.program(b.add(op, 0, arrays=tensors, **attributes))


def test_a_step_of_8_bits():
    (y,) = Reference(one(), validate(one())).run([np.ones((1, 2, 3, 3), np.float32)])
    assert (y == 1).all()


@pytest.mark.parametrize("op", ["conv", "linear"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_scale": None}, "attribute 'input_scale' is missing"),
        ({"input_zero": None}, "attribute 'input_zero' is missing"),
        ({"input_scale": 0.0}, "input_scale must be a float from 1e-30 to 1e\\+30, not 0.0"),
        ({"input_scale": -1.0}, "input_scale must be a float"),
        ({"input_scale": float("nan")}, "input_scale must be a float"),
        ({"input_scale": 1e31}, "input_scale must be a float"),
        ({"input_scale": 1}, "input_scale must be a float from 1e-30 to 1e\\+30, not 1"),
        ({"input_scale": True}, "input_scale must be a float"),
        ({"input_zero": 256}, "input_zero must be an integer from 0 to 255, not 256"),
        ({"input_zero": -1}, "input_zero must be an integer"),
        ({"input_zero": 0.0}, "input_zero must be an integer"),
        ({"scales": None}, "dense storage takes the tensors bias, scales, weight; found weight"),
        ({"input_scale": None, "input_zero": None}, "dense storage takes the tensors bias, weight; found scales"),
        (
            {"input_scale": None, "input_zero": None, "scales": None},
            "a weight of int8 needs input_scale, input_zero and scales",
        ),
        ({"weight": np.ones((3, 2), np.float32)}, "weight of a step with input_scale must be int8, not float32"),
        ({"weight": np.ones((3, 2), np.uint16)}, "weight must be float32 or int8, not uint16"),
        ({"weight": np.full((3, 2), -128, np.int8)}, "8-bit weights must be from -127 to 127, not -128"),
        ({"weight": np.ones((2, 2), np.int8)}, r"weight must have shape \(3, 2\), not \(2, 2\)"),
        ({"scales": np.ones(2, np.float32)}, r"scales must have shape \(3,\), not \(2,\)"),
        ({"scales": np.ones((3, 1), np.float32)}, "scales must have 1 dimensions"),
        ({"scales": np.ones(3, np.int8)}, "scales must be float32, not int8"),
        ({"scales": np.float32([1, 0, 1])}, "scales must be from 1e-30 to 1e\\+30, not 0"),
        ({"scales": np.float32([1, -1, 1])}, "scales must be from 1e-30 to 1e\\+30, not -1"),
        ({"scales": np.float32([1, 3e38, 1])}, "scales must be from 1e-30 to 1e\\+30, not 3e\\+38"),
        ({"scales": np.full(3, 1e-20, np.float32), "input_scale": 1e-20}, "scales times input_scale must be from"),
        ({"scales": np.full(3, 1e20, np.float32), "input_scale": 1e20}, "scales times input_scale must be from"),
        ({"storage": "sparse"}, "8-bit weights cannot have sparse storage"),
    ],
)
def test_what_is_refused(op, changes, message):
    with pytest.raises(ProgramError, match=message):
        validate(one(op, **changes))


def test_sums_stay_below_the_integers_of_32_bits():
    b = Builder(2**16 + 1)
    tensors = {"weight": np.ones((1, 2**16 + 1), np.int8), "scales": np.ones(1, np.float32)}
    form = {"filters": 1, "storage": "dense", "activation": "none", "input_scale": 1.0, "input_zero": 0}
    with pytest.raises(ProgramError, match="at most 65536 columns, not 65537"):
        validate(b.program(b.add("linear", 0, arrays=tensors, **form)))


def test_other_steps_have_no_8_bits():
    b = Builder(3)
    with pytest.raises(ProgramError, match="'input_scale' is unknown"):
        validate(b.program(b.add("activation", 0, activation="relu", input_scale=0.5, input_zero=3)))
    b = Builder(3)
    with pytest.raises(ProgramError, match="constant must be float32, not int8"):
        validate(b.program(b.add("add", 0, arrays={"constant": np.ones(3, np.int8)}, activation="none")))


def one_addition(narrow=True, inputs=(1, 0), outputs=(2,), conv=(), **changes):
    """An 8-bit convolution, and what it reads added to it, rounded; some attributes changed, or left out where None."""
    b = Builder(2, 3, 3)
    tensors = {"weight": np.ones((2, 2), np.int8), "scales": np.full(2, 0.5, np.float32)}
    form = {**ONE, "filters": 2, "activation": "none", "input_scale": 0.5, "input_zero": 3, **dict(conv)}
    if not narrow:
        tensors = {"weight": np.ones((2, 2), np.float32)}
        form = {name: value for name, value in form.items() if not name.startswith("input")}
    b.add("conv", 0, arrays=tensors, **form)
    attributes = {"activation": "none", "residual_scale": 0.25, "residual_zero": 1, **changes}
    b.add("add", *inputs, **{name: value for name, value in attributes.items() if value is not None})
    return b.program(*outputs)


def test_an_addition_of_8_bits():
    program = one_addition()
    x = np.full((1, 2, 3, 3), 0.3, np.float32)  # 0.5 to the layer, 0.25 for the addition
    (y,) = Reference(program, validate(program)).run([x])
    assert (y == np.float32(0.5 + 0.25)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual_scale": None}, "attribute 'residual_scale' is missing"),
        ({"residual_zero": None}, "attribute 'residual_zero' is missing"),
        ({"residual_scale": 0.0}, "residual_scale must be a float from 1e-30 to 1e\\+30, not 0.0"),
        ({"residual_scale": float("nan")}, "residual_scale must be a float"),
        ({"residual_scale": 1}, "residual_scale must be a float from 1e-30 to 1e\\+30, not 1"),
        ({"residual_scale": "1"}, "residual_scale must be a float"),
        ({"residual_zero": 256}, "residual_zero must be an integer from 0 to 255, not 256"),
        ({"residual_zero": -1}, "residual_zero must be an integer"),
        ({"residual_zero": 1.0}, "residual_zero must be an integer"),
        ({"inputs": (1,)}, "takes two inputs, or one and a constant"),
        ({"inputs": (0, 1)}, "its first input must be made by an 8-bit conv step without activation"),
        ({"inputs": (0, 0)}, "its first input must be made by an 8-bit conv step without activation"),
        ({"inputs": (1, 1)}, "its first input is read 2 times; it must be once"),
        ({"outputs": (2, 1)}, "its first input is read 2 times; it must be once"),
        ({"conv": {"activation": "relu"}}, "its first input must be made by an 8-bit conv step without activation"),
        ({"narrow": False}, "its first input must be made by an 8-bit conv step without activation"),
        ({"conv": {"padding": (0, 0, 1, 1)}}, "with residual_scale, it takes two inputs of one shape"),
    ],
)
def test_what_additions_are_refused(changes, message):
    with pytest.raises(ProgramError, match=message):
        validate(one_addition(**changes))


def test_other_operations_round_nothing():
    b = Builder(2, 3, 3)
    with pytest.raises(ProgramError, match="'residual_scale' is unknown"):
        validate(b.program(b.add("sub", 0, 0, activation="none", residual_scale=0.5, residual_zero=3)))
    b = Builder(2, 3, 3)
    constant = {"constant": np.ones((2, 3, 3), np.float32)}
    attributes = {"activation": "none", "residual_scale": 0.5, "residual_zero": 3}
    with pytest.raises(ProgramError, match="with residual_scale, it takes two inputs of one shape"):
        validate(b.program(b.add("add", 0, arrays=constant, **attributes)))


# --- files


@pytest.mark.parametrize("make", [lambda: narrowed(every_storage(), 1), every_residual_of_8_bits])
def test_what_is_written_is_read_back(make, tmp_path):
    engine = Engine(make(), info={"accuracy": 0.5})
    path = tmp_path / "net.acf"
    engine.save(path)
    loaded = acf.load(path)
    assert loaded.program.steps == engine.program.steps
    assert {n: (t.dtype, t.tobytes()) for n, t in loaded.program.tensors.items()} == {
        n: (t.dtype, t.tobytes()) for n, t in engine.program.tensors.items()
    }
    (x,) = some(engine.program)
    np.testing.assert_array_equal(loaded(x), engine(x))
    again = tmp_path / "again.acf"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    assert size(engine.program, engine.info) >= path.stat().st_size - 16  # and the word "packed" more


def header(path):
    with safetensors.safe_open(path, "np") as file:
        return json.loads(file.metadata()["autocompress_fast"])


def test_versions_are_those_that_are_needed(tmp_path):
    path = tmp_path / "net.acf"
    write(path, every_storage(), {})
    assert header(path)["format_version"] == 2  # few values, in one of its layers
    write(path, narrowed(every_storage(), 1), {})
    assert header(path)["format_version"] == 3
    write(path, one(), {})
    assert header(path)["format_version"] == 3
    assert header(path)["packed"] == {}
    write(path, one_addition(), {})
    assert header(path)["format_version"] == 4
    assert header(path)["packed"] == {}
    write(path, one_addition(residual_scale=None, residual_zero=None), {})
    assert header(path)["format_version"] == 3


@pytest.mark.parametrize(
    ("make", "version", "what"),
    [(one, 1, "steps"), (one, 2, "steps"), *((one_addition, version, "residuals") for version in (1, 2, 3))],
)
def test_older_versions_have_no_8_bits(make, version, what, tmp_path):
    program, path = make(), tmp_path / "net.acf"
    more = {"packed": {}} if version > 1 else {}
    content = {"format_version": version, "program": program_to_json(program), "info": {}} | more
    path.write_bytes(packed(content, dict(program.tensors)))
    with pytest.raises(FileFormatError, match=f"a file of version {version} has no {what} of 8 bits"):
        acf.load(path)


def test_the_file_of_version_3_is_read_forever():
    """Written once, from `every_storage`; it must never be written again."""
    engine = acf.load(VERSION_3, threads=1)
    assert sum(map(is_narrow, engine.program.steps)) == 6
    (x,) = some(engine.program)
    np.testing.assert_allclose(engine(x), np.float32(engine.info["expected"]), rtol=1e-5, atol=1e-6)


def test_the_file_of_version_4_is_read_forever():
    """Written once, from `every_residual_of_8_bits`; it must never be written again."""
    engine = acf.load(VERSION_4, threads=1)
    assert sum(map(rounds_residual, engine.program.steps)) == 3
    (x,) = some(engine.program)
    np.testing.assert_allclose(engine(x), np.float32(engine.info["expected"]), rtol=1e-5, atol=1e-6)


# --- the kernels


def one_layer(rng: np.random.Generator) -> Program:
    """A convolution or linear layer of 8 bits, of any shape."""
    groups = int(rng.choice([1, 1, 1, 2, 4]))
    channels, filters = groups * int(rng.integers(1, 30)), groups * int(rng.integers(1, 40))
    if rng.random() < 0.3:
        b = Builder(channels)
        step = {"filters": filters, "storage": "dense", "activation": "relu"}
        b.add("linear", 0, arrays={"weight": b.floats(filters, channels), "bias": b.floats(filters)}, **step)
        return narrowed_whole(b.program(1), rng)
    kernel, stride, dilation = (tuple(int(v) for v in rng.integers(1, most, 2)) for most in (4, 4, 3))
    b = Builder(channels, int(rng.integers(7, 20)), int(rng.integers(7, 40)))
    columns = channels // groups * kernel[0] * kernel[1]
    arrays = {"bias": b.floats(filters)}
    storage = "dense"
    if groups == 1 and rng.random() < 0.5:
        storage, kept = "columns", np.flatnonzero(rng.random(columns) < 0.4)
        kept = kept if len(kept) else np.array([0])
        rows = np.flatnonzero(rng.random(filters) < 0.8)
        rows = rows if len(rows) else np.array([0])
        arrays |= {"weight": b.floats(len(rows), len(kept))}
        arrays |= {"filters": rows.astype(np.uint16), "columns": kept.astype(np.uint16)}
    else:
        arrays |= {"weight": b.floats(filters, columns)}
    padding = tuple(int(v) for v in rng.integers(0, 3, 4))
    window = {"kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    b.add(
        "conv",
        0,
        arrays=arrays,
        **window,
        filters=filters,
        storage=storage,
        activation=str(rng.choice(["none", "relu"])),
    )
    return narrowed_whole(b.program(1), rng)


def narrowed_whole(program: Program, rng: np.random.Generator) -> Program:
    """Every convolution and linear layer of 8 bits."""
    while True:
        found = narrowed(program, int(rng.integers(1000)))
        if all(is_narrow(step) for step in found.steps if step.op in ("conv", "linear")):
            return found


@pytest.mark.usefixtures("isa")
def test_kernels_give_the_bits_of_the_reference():
    rng = np.random.default_rng(0)
    for _ in range(60):
        program = one_layer(rng)
        x = some(program, int(rng.choice([1, 2, 17])))
        (wanted,) = Reference(program, validate(program)).run(x)
        for threads in (1, 3):
            np.testing.assert_array_equal(Engine(program, threads=threads)(*x), wanted)


@pytest.mark.usefixtures("isa")
def test_a_residual_is_added_after_the_sum():
    b = Builder(5, 9, 9)
    same = {**ONE, "filters": 5, "kernel": (3, 3), "padding": (1, 1, 1, 1), "activation": "none"}
    x = b.add("conv", 0, arrays={"weight": b.floats(5, 45), "bias": b.floats(5)}, **same)
    program = narrowed_whole(b.program(b.add("add", x, 0, activation="relu")), np.random.default_rng(0))
    given = some(program)
    (wanted,) = Reference(program, validate(program)).run(given)
    engine = Engine(program)
    assert [step.op for step in engine.profile(rounds=1).steps] == ["conv + add"]
    np.testing.assert_array_equal(engine(*given), wanted)


@pytest.mark.usefixtures("isa")
def test_residuals_have_the_bits_of_the_reference():
    program = every_residual_of_8_bits()
    program = dataclasses.replace(program, outputs=(program.steps[2].output, program.steps[5].output))
    given = some(program, 5)
    wanted = Reference(program, validate(program)).run(given)
    for threads in (1, 3):
        for y, z in zip(Engine(program, threads=threads)(*given), wanted, strict=True):
            np.testing.assert_array_equal(y, z)


def chain(rng: np.random.Generator) -> Program:
    """Convolutions, depthwise ones, poolings and residuals of 8 bits one after the other, now and then float32."""
    b = Builder(int(rng.integers(1, 9)), int(rng.integers(9, 17)), int(rng.integers(9, 40)))
    x = 0
    for _ in range(int(rng.integers(2, 7))):
        channels, height, width = value_shape(b, x)
        kind = rng.random()
        if kind < 0.25 and min(height, width) > 3:
            pool = {"kernel": (2, 3), "stride": (1, 2), "padding": (1, 0), "dilation": (1, 1), "ceil": True}
            x = b.add("max_pool", x, **pool) if kind < 0.2 else b.add("activation", x, activation="relu")
            continue
        kernel = int(rng.choice([1, 3]))
        if 0.25 < kind < 0.45 and channels > 1:
            kernel = int(rng.choice([3, 3, 5]))
            window = {
                "kernel": (kernel, kernel),
                "padding": (kernel // 2,) * 4,
                "filters": channels,
                "groups": channels,
            }
            window["stride"] = (int(rng.choice([1, 1, 2])),) * 2
            arrays = {"weight": b.floats(channels, kernel**2), "bias": b.floats(channels)}
            activation = str(rng.choice(["none", "relu", "relu6"]))
            x = b.add("conv", x, arrays=arrays, **{**ONE, **window, "activation": activation})
            continue
        same = kind > 0.6
        filters = channels if same else int(rng.integers(1, 100))
        window = {"kernel": (kernel, kernel), "padding": (kernel // 2,) * 4, "filters": filters}
        if not same:
            window |= {"stride": (1, int(rng.choice([1, 2]))), "padding": tuple(int(v) for v in rng.integers(1, 3, 4))}
        activation = "none" if same else str(rng.choice(["none", "relu", "relu6"]))
        arrays = {"weight": b.floats(filters, channels * kernel**2), "bias": b.floats(filters)}
        y = b.add("conv", x, arrays=arrays, **{**ONE, **window, "activation": activation})
        x = b.add("add", y, x, activation=str(rng.choice(["none", "relu"]))) if same else y
    shape = value_shape(b, x)
    b.add("conv", x, arrays={"weight": b.floats(3, shape[0])}, **{**ONE, "filters": 3})
    outputs = {len(b.steps), *(rng.choice([x, len(b.steps)], 1).tolist())} - {0}
    return alike(narrowed_whole(b.program(*sorted(outputs)), rng), rng)


def value_shape(b: Builder, value: int) -> tuple[int, ...]:
    return b.inputs[0].shape if value == 0 else validate(b.program(value))[value - 1].shape


def alike(program: Program, rng: np.random.Generator) -> Program:
    """The same numbers for most readers of a value."""
    wanted: dict[int, tuple[float, int]] = {}
    steps = []
    for step in program.steps:
        attributes = dict(step.attributes)
        for what, value in (("input", step.inputs[0]), ("residual", step.inputs[-1])):
            if f"{what}_scale" in attributes and rng.random() < 0.9:
                scale, zero = wanted.setdefault(value, (attributes[f"{what}_scale"], attributes[f"{what}_zero"]))
                attributes |= {f"{what}_scale": scale, f"{what}_zero": zero}
        steps.append(dataclasses.replace(step, attributes=attributes))
    return dataclasses.replace(program, steps=tuple(steps))


def byte_values(engine: Engine) -> int:
    executor = engine._executor
    return sum(executor.network.is_bytes(value) for value in range(1 + len(executor.steps)))


@pytest.mark.parametrize("part", range(4))
@pytest.mark.usefixtures("isa")
def test_values_that_are_bytes_between_layers_have_the_bits_of_the_reference(part):
    rng, bytes_seen = np.random.default_rng(part), 0
    for _ in range(35):
        program = chain(rng)
        x = some(program, int(rng.choice([1, 2, 6, 17])))
        wanted = Reference(program, validate(program)).run(x)
        for threads in (1, 3):
            engine = Engine(program, threads=threads)
            found = engine(*x)
            for _ in range(2):  # the second run finds what the first has left in the halos
                for y, z in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
                    np.testing.assert_array_equal(y, z)
                found = engine(*x)
        bytes_seen += byte_values(engine)
    if _core.narrow_units("int8")[-1] in ("generic", "avx512_vnni"):
        assert bytes_seen > 25


@pytest.mark.usefixtures("isa")
def test_separable_networks_compute_with_8_bits_wholly():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU6()]
    for channels, filters, taps, stride in ((24, 40, 3, 1), (40, 40, 5, 1), (40, 72, 3, 2)):
        layers += [nn.Conv2d(channels, channels, taps, stride, taps // 2, groups=channels), nn.ReLU6()]
        layers += [nn.Conv2d(channels, filters, 1), nn.ReLU6()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(72, 5)).eval()
    x = torch.randn(20, 3, 33, 29)
    engine = acf.compile(net, x)
    small = acf.quantize(engine, x)
    assert {step.storage for step in small.summary().steps if step.storage} == {"dense 8-bit"}
    wide = np.abs(engine(x.numpy())).max()
    assert np.abs(small(x.numpy()) - engine(x.numpy())).max() < 0.05 * wide
    with torch.no_grad():
        np.testing.assert_array_equal(small(x.numpy()), acf.simulate(small).eval()(x).numpy())
    if _core.narrow_units("int8")[-1] in ("generic", "avx512_vnni"):
        assert byte_values(small) == 6  # between all of its convolutions


@pytest.mark.usefixtures("isa")
def test_residuals_that_are_no_numbers_or_beyond_them():
    rng, tensors = np.random.default_rng(0), {"w": np.ones((3, 2), np.int8), "s": np.full(3, 0.01, np.float32)}
    inputs = (Input("x", (2, 5, 23)), Input("y", (3, 5, 23)))
    conv = {**ONE, "filters": 3, "activation": "none", "input_scale": 0.1, "input_zero": 100}
    x = rng.standard_normal((2, 2, 5, 23), np.float32)
    for scale, zero in ((0.013, 0), (0.02, 77), (1e-30, 255), (1e30, 9), (0.5, 128)):
        y = (rng.standard_normal((2, 3, 5, 23)) * 200 * scale).astype(np.float32)
        special = [np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0, -0.0, 1e-45, 2.5 * scale, -1.5 * scale]
        y.reshape(-1)[rng.permutation(y.size)[: 4 * len(special)]] = np.tile(np.float32(special), 4)
        add = {"activation": "none", "residual_scale": scale, "residual_zero": zero}
        steps = (Step("conv", (0,), 2, conv, {"weight": "w", "scales": "s"}), Step("add", (2, 1), 3, add))
        program = Program(inputs, steps, (3,), tensors)
        (wanted,) = Reference(program, validate(program)).run([x, y])
        assert np.isfinite(wanted).all()
        np.testing.assert_array_equal(Engine(program, threads=2)(x, y), wanted)
