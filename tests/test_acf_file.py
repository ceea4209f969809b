"""Files of format .acf: what is written is read back, and a damaged or hostile file is one clear error."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import autocompress_fast as acf
from autocompress_fast.engine import Engine, FileFormatError
from autocompress_fast.engine.file import write
from autocompress_fast.engine.program import (
    _OPERATIONS,
    Input,
    Program,
    Step,
    program_from_json,
    program_to_json,
)

VERSION_1 = Path(__file__).parent / "data" / "version_1.acf"


class Builder:
    """Adds steps one after the other; weights are small, seeded numbers."""

    def __init__(self, *shape):
        self.inputs, self.steps, self.tensors = (Input("x", shape),), [], {}
        self.generator = np.random.default_rng(0)

    def floats(self, *shape):
        return (self.generator.integers(-8, 9, shape) / 16).astype(np.float32)

    def add(self, op, *inputs, arrays=None, **attributes):
        names = {role: f"{len(self.steps)}.{role}" for role in arrays or {}}
        self.tensors.update((names[role], array) for role, array in (arrays or {}).items())
        self.steps.append(Step(op, inputs, len(self.steps) + 1, attributes, names, f"layer.{len(self.steps)}"))
        return len(self.steps)

    def program(self, *outputs):
        return Program(self.inputs, tuple(self.steps), outputs, self.tensors)


def every_operation():
    """A program with every operation of version 1, every storage, and more than one output."""
    b = Builder(2, 8, 9)
    conv = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1, "filters": 3}
    columns = {
        "weight": b.floats(2, 4), "filters": np.array([0, 2], np.uint16),
        "columns": np.array([0, 4, 9, 17], np.uint16), "bias": b.floats(3),
    }  # fmt: skip
    x = b.add("conv", 0, arrays=columns, **conv, storage="columns", activation="silu")
    depthwise = {**conv, "kernel": (2, 3), "padding": (2, 0, 0, 1), "dilation": (2, 1), "groups": 3}
    x = b.add("conv", x, arrays={"weight": b.floats(3, 6)}, **depthwise, storage="dense", activation="hardswish")
    sparse = {
        "values": b.floats(5) * 16, "indices": np.array([0, 5, 26, 3, 4], np.uint32),
        "offsets": np.array([0, 3, 3, 5, 5], np.uint16), "bias": b.floats(4) + 2,
    }  # fmt: skip
    x = b.add("conv", x, arrays=sparse, **{**conv, "filters": 4}, storage="sparse", activation="relu6")
    x = b.add("max_pool", x, kernel=(2, 3), stride=(1, 2), padding=(1, 1), dilation=(1, 1), ceil=True)
    x = b.add("avg_pool", x, kernel=(2, 2), stride=(2, 1), padding=(0, 1), ceil=False, count_padding=False)
    x = b.add("adaptive_avg_pool", x, output=(3, 2))
    x = b.add("add", x, arrays={"constant": b.floats(4, 1, 1)}, activation="sigmoid")
    pooled = b.add("global_avg_pool", x)
    x = b.add("mul", x, pooled, activation="none")
    x = b.add("sub", x, arrays={"constant": np.array(0.25, np.float32)}, activation="tanh")
    x = b.add("div", x, arrays={"constant": np.full((2,), 2, np.float32)}, activation="none")
    x = b.add("activation", x, activation="hardsigmoid")
    x = b.add("leaky_relu", x, slope=0.1)
    x = b.add("clip", x, low=-0.5, high=0.75)
    x = b.add("pad", x, before=(0, 1, 0), after=(1, 0, 2), value=0.5)
    x = b.add("slice", x, axis=1, start=0, stop=4, step=2)
    x = b.add("transpose", x, order=(1, 0, 2))
    x = b.add("take", x, arrays={"indices": np.array([4, 0, 0], np.uint16)}, axis=1)
    x = b.add("matmul", b.add("matmul", x, b.add("transpose", x, order=(0, 2, 1))), x)
    x = b.add("attention", x, x, x, scale=0.25)
    x = b.add("mul", x, b.add("norm", x, axes=(1,), keep=True), activation="none")
    y = b.add("mean", x, axes=(0, 2), keep=False)
    x = b.add("reshape", x, shape=(24,))
    x = b.add("concat", x, y, axis=0)
    x = b.add("softmax", x, axis=0)
    x = b.add("linear", x, arrays={"weight": b.floats(3, 27) * 64}, filters=3, storage="dense", activation="relu")
    norm = {"scale": b.floats(3), "shift": b.floats(3)}
    x = b.add("layer_norm", x, arrays=norm, dims=1, epsilon=1e-5)
    x = b.add("log_softmax", x, axis=0)
    return b.program(x, y)


INFO = {
    "classes": ["cat", "dog", "cow"],
    "mean": [0.5, 0.25],
    "std": [1, 0.5],
    "accuracy": 0.75,
    "original": {"weights": 1000, "conv_weights": 600, "macs": 12345},
    "provenance": {"data": "none", "seed": 0},
    "anything": [None, True, 1.5, "text", {"nested": []}],
}


def example(samples=3):
    return np.sin(np.arange(samples * 2 * 8 * 9) * 1.7).astype(np.float32).reshape(samples, 2, 8, 9)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "net.acf"
    write(path, every_operation(), INFO)
    return path


def contents(path):
    with safetensors.safe_open(path, "np") as file:
        return json.loads(file.metadata()["autocompress_fast"]), safetensors.numpy.load_file(path)


def packed(metadata, tensors):
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    return safetensors.numpy.save(tensors, {"autocompress_fast": text})


def rewritten(path, change_metadata=None, change_tensors=None):
    """Write the file again with other metadata or tensors, as a hostile author would."""
    metadata, tensors = contents(path)
    if change_metadata is not None:
        change_metadata(metadata)
    if change_tensors is not None:
        change_tensors(tensors)
    path.write_bytes(packed(metadata, tensors))
    return path


# --- round trip


def test_every_operation_is_in_the_program():
    assert {step.op for step in every_operation().steps} == set(_OPERATIONS)
    assert {step.attributes["storage"] for step in every_operation().steps if "storage" in step.attributes} == {
        "dense", "columns", "sparse"
    }  # fmt: skip


def test_what_is_written_is_read_back(path):
    before, after = Engine(every_operation(), info=INFO), acf.load(path)
    assert after.program.steps == before.program.steps
    assert after.program.inputs == before.program.inputs
    assert after.info == INFO
    assert after.program.tensors.keys() == before.program.tensors.keys()
    for name, tensor in before.program.tensors.items():
        read = after.program.tensors[name]
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert read.tobytes() == tensor.tobytes()
    for y, z in zip(before(example()), after(example()), strict=True):
        assert np.array_equal(y, z)
    again = path.with_name("again.acf")
    after.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_a_program_is_its_json():
    program = every_operation()
    text = json.dumps(program_to_json(program))
    assert program_from_json(json.loads(text), program.tensors) == program


def test_a_batch_size_is_kept(tmp_path):
    b = Builder(2)
    b.add("activation", 0, activation="relu")
    program = Program(b.inputs, tuple(b.steps), (1,), {}, batch=7)
    write(tmp_path / "net.acf", program, {})
    assert acf.load(tmp_path / "net.acf").program.batch == 7


def test_the_file_of_version_1_is_read_forever():
    """Written once by the first release from `every_operation`; it must never be written again."""
    engine = acf.load(VERSION_1, threads=1)
    assert {"conv", "linear", "take", "log_softmax"} <= {step.op for step in engine.program.steps}
    expected = engine.info.pop("expected")  # for example(2), from the release that wrote the file
    for y, wanted in zip(engine(example(2)), expected, strict=True):
        np.testing.assert_allclose(y, np.float32(wanted), rtol=1e-5, atol=1e-6)
    assert engine.info == INFO


def test_a_file_is_read_and_run_without_torch(path, run_python):
    np.save(path.with_name("x.npy"), example())
    program = f"""
import sys
sys.modules["torch"] = None  # any import of torch fails
import numpy as np
import autocompress_fast as acf
engine = acf.load({str(path)!r})
scores, _ = engine(np.load("x.npy"))
np.save("y.npy", scores)
engine.info = {{**engine.info, "accuracy": 0.5}}
engine.save("copy.acf")
print(engine.summary())
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("total")
    assert np.array_equal(np.load(path.with_name("y.npy")), acf.load(path)(example())[0])
    assert acf.load(path.with_name("copy.acf")).info["accuracy"] == 0.5


def test_loading_imports_neither_torch_nor_safetensors_torch(path, run_python):
    done = run_python(f"import autocompress_fast as acf, sys; acf.load({str(path)!r}); print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


# --- information


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"classes": ["a", "b"]}, r"info\['classes'\] must be a list of 3 names, not \['a', 'b'\]"),
        ({"classes": [1, 2, 3]}, "must be a list of 3 names"),
        ({"mean": [1, 2, 3]}, r"info\['mean'\] must be a list of 1 or 2 numbers"),
        ({"mean": 0.5}, "must be a list of 1 or 2 numbers"),
        ({"mean": [10**400]}, "must be a list of 1 or 2 numbers"),
        ({"std": [0.0]}, r"info\['std'\] must be above 0"),
        ({"std": [True]}, "must be a list of 1 or 2 numbers"),
        ({"accuracy": 97.5}, r"info\['accuracy'\] must be a number from 0 to 1, not 97.5"),
        ({"original": {"weights": -1}}, r"info\['original'\] must be counts of weights, conv_weights, macs"),
        ({"original": {"bytes": 1}}, "must be counts of"),
        ({"provenance": "here"}, r"info\['provenance'\] must be a dict"),
        ({"x": float("nan")}, r"info\['x'\] is nan"),
        ({"x": (1, 2)}, r"info\['x'\] is \(1, 2\)"),
        ({"x": np.float32(1)}, r"info\['x'\] is np.float32\(1.0\)"),
        ({1: 2}, "has the key 1; keys must be strings"),
        ({"x": "a" * 2**20}, "at most 1048576 are allowed"),
        ([], "info must be a dict, not list"),
    ],
)
def test_information_is_checked(info, message, path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        Engine(every_operation(), info=info)
    engine = acf.load(path)
    with pytest.raises(ValueError, match=message):
        engine.info = info
    assert engine.info == INFO
    if info and isinstance(info, dict):
        engine.info.update(info)  # changed behind the check: found when it is saved
        with pytest.raises(ValueError, match=message):
            engine.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_deep_information_is_refused():
    deep = {}
    for _ in range(20):
        deep = {"x": deep}
    with pytest.raises(ValueError, match="nested more than 16 deep"):
        Engine(every_operation(), info=deep)


# --- damaged files


def test_what_is_no_file_of_ours(tmp_path):
    path = tmp_path / "net.acf"
    with pytest.raises(FileNotFoundError):
        acf.load(path)
    with pytest.raises(FileFormatError, match="not a regular file"):
        acf.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="not a regular file"):
        acf.load(tmp_path / "pipe")
    for content in (b"", b"\0" * 7, b"\0" * 64, b"\xff" * 64, b"PK\x03\x04" + b"\0" * 60, b"[" * 10**5):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"net\.acf: "):
            acf.load(path)
    path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)}))
    with pytest.raises(FileFormatError, match="not one of autocompress_fast"):
        acf.load(path)


def test_json_that_cannot_be_parsed_is_refused(path):
    header = b'{"__metadata__":' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileFormatError, match="header is not valid JSON"):
        acf.load(path)
    for text in ("[" * 10**5, "{", '{"program": NaN}', '{"program": 1' + "0" * 10**5 + "}"):
        path.write_bytes(packed(text, {}))
        with pytest.raises(FileFormatError, match="metadata is not valid JSON"):
            acf.load(path)


def test_every_truncation_is_found(path):
    content = path.read_bytes()
    for length in [*range(0, 200, 7), *range(200, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(FileFormatError):
            acf.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(FileFormatError):
        acf.load(path)


def dtype_f64(tensors):
    tensors["1.weight"] = tensors["1.weight"].astype(np.float64)


def nan(tensors):
    tensors["1.weight"] = tensors["1.weight"] * np.float32(np.nan)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        (lambda m: m.update(format_version=5), None, "version 5 is unknown; this release reads versions 1 to 4"),
        (lambda m: m.update(format_version=1), None, "the metadata must be format_version, info, program, not"),
        (lambda m: m.update(format_version="1"), None, "version '1' is unknown"),
        (lambda m: m.update(format_version=True), None, "version True is unknown"),
        (lambda m: m.update(more="x"), None, "the metadata must be format_version, info, packed, program, not"),
        (lambda m: m.pop("program"), None, "the metadata must be"),
        (lambda m: m.update(program=[]), None, "program must have the fields batch, inputs, steps, outputs"),
        (lambda m: m.update(info=3), None, "info must be a dict, not int"),
        (lambda m: m.update(info={"accuracy": 2}), None, "must be a number from 0 to 1"),
        (None, dtype_f64, r"tensor '1\.weight' has dtype F64; allowed are F32, I8, U8, U16, U32"),
        (None, nan, r"tensor '1\.weight' holds NaN or infinity"),
        (None, lambda t: t.pop("1.weight"), r"its weight '1\.weight' is not in the file"),
        (None, lambda t: t.update(more=np.zeros(1, np.float32)), "tensor 'more' is used by 0 steps"),
    ],
)
def test_faults_are_named(metadata, tensors, message, path):
    with pytest.raises(FileFormatError, match=message) as caught:
        acf.load(rewritten(path, metadata, tensors))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", {}),
        ("inputs", None),
        ("outputs", 3),
        ("batch", "x"),
        ("batch", 1.5),
        ("batch", True),
        ("outputs", ["x"]),
    ],
)
def test_fields_of_the_wrong_type(field, value, path):
    def change(metadata):
        metadata["program"][field] = value

    with pytest.raises(FileFormatError, match=r"must not be|must be an integer"):
        acf.load(rewritten(path, change))


# --- files that ask for much

ONE = {
    "kernel": (1, 1), "stride": (1, 1), "padding": (0,) * 4, "dilation": (1, 1), "groups": 1, "filters": 1,
    "storage": "dense", "activation": "none",
}  # fmt: skip


def written(path, program):
    """Write a program that `write` may refuse."""
    content = {"format_version": 1, "program": program_to_json(program), "info": {}}
    path.write_bytes(packed(content, dict(program.tensors)))
    return path


def numbers_beyond_floats():
    b = Builder(2)
    return b.program(b.add("leaky_relu", 0, slope=10**400))


def many_steps():
    b = Builder(2)
    for i in range(2**14):
        b.add("activation", i, activation="relu")
    return b.program(1)


def many_outputs():
    b = Builder(2**26)
    return b.program(*[b.add("activation", 0, activation="relu")] * 5)


def values_that_keep_their_padding():
    """One reader at a time pads its input, but all inputs are made before."""
    b, far = Builder(1, 1, 1), {**ONE, "padding": (5000,) * 4, "stride": (10000, 10000)}
    for i in range(30):
        b.add("activation", i, activation="relu")
    return b.program(*(b.add("conv", i, arrays={"weight": b.floats(1, 1)}, **far) for i in range(31)))


def readers_that_pad_differently():
    """What is large is the padding that fits both."""
    b, side = Builder(1, 1, 1), 20000
    tall, wide = (side, 0, 0, 0), (0, 0, side, 0)
    return b.program(
        *(b.add("conv", 0, arrays={"weight": b.floats(1, 1)}, **{**ONE, "padding": p}) for p in (tall, wide))
    )


def filters_without_weights():
    b = Builder(64, 4, 4)
    one = {"weight": b.floats(1, 64), "filters": np.array([5], np.uint16)}
    return b.program(b.add("conv", 0, arrays=one, **{**ONE, "filters": 2**20, "storage": "columns"}))


def tall_kernels():
    b, height = Builder(1, 1, 1), 2**25
    one = {"weight": b.floats(1, 1), "columns": np.array([0], np.uint16)}
    tall = {**ONE, "kernel": (height, 1), "padding": (height, 0, 0, 0), "storage": "columns"}
    return b.program(b.add("conv", 0, arrays=one, **tall))


def a_tensor_used_again():
    b = Builder(2)
    linear = {"filters": 2, "storage": "dense", "activation": "none"}
    b.add("linear", 0, arrays={"weight": b.floats(2, 2)}, **linear)
    b.steps.append(Step("linear", (1,), 2, {**linear, "filters": 3}, b.steps[0].tensors))
    return b.program(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (numbers_beyond_floats, "slope must be a finite float32, not 1000"),
        (many_steps, "at most 16384 inputs and steps, not 16385"),
        (many_outputs, "the outputs of one sample have 335544320 elements; at most 268435456"),
        (values_that_keep_their_padding, r"one sample needs \d+ bytes at once; at most 2147483648"),
        (readers_that_pad_differently, "the plane pitch must be at least"),
        (filters_without_weights, "the weights take 68157446 elements to run; at most 16793856"),
        (tall_kernels, "the weights take 33554465 elements to run; at most 16777728"),
        (a_tensor_used_again, r"tensor '0\.weight' is used by 2 steps"),
    ],
)
def test_small_files_cannot_ask_for_much(make, message, tmp_path):
    with pytest.raises(FileFormatError, match=message):
        acf.load(written(tmp_path / "net.acf", make()))


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "net.acf"
    path.touch()
    os.truncate(path, 2**32 + 1)
    with pytest.raises(FileFormatError, match="4294967297 bytes; a file has at most 4294967296"):
        acf.load(path)


def test_a_wrong_number_of_threads_is_no_fault_of_the_file(path):
    with pytest.raises(ValueError, match="threads must be") as raised:
        acf.load(path, threads=0)
    assert raised.type is ValueError


@pytest.mark.parametrize("kernel", [(2**16, 1), (2**11, 2**11)])
def test_large_kernels_load_in_no_time(kernel, tmp_path):
    """With the number of columns, not with that of the places they could have, and of the outputs they are used for."""
    height, width = kernel
    b, columns = Builder(1, 1, 1), np.append(np.arange(min(20 * width, 1000)), height * width - 1).astype(np.uint32)
    weight = b.floats(1, len(columns))
    large = {**ONE, "kernel": kernel, "padding": (height - 1, height - 1, width - 1, width - 1), "storage": "columns"}
    program = b.program(b.add("conv", 0, arrays={"weight": weight, "columns": columns}, **large))
    y = acf.load(written(tmp_path / "net.acf", program))(np.ones((1, 1, 1, 1), np.float32))
    expected = np.zeros(height * width, np.float32)
    expected[columns] = weight
    assert np.array_equal(y[0], expected[::-1].reshape(1, height, width))


def test_a_fixed_batch_is_computed_in_parts(tmp_path):
    b = Builder(2**16)
    b.add("activation", 0, activation="relu")
    program = Program(b.inputs, tuple(b.steps), (1,), {}, batch=2**31 - 1)
    assert acf.load(written(tmp_path / "net.acf", program)).workspace_bytes(2**31 - 1) < 2**24


@pytest.mark.skipif(sys.platform != "linux", reason="measures in KiB")
def test_moving_elements_takes_no_memory_for_each(tmp_path, run_python):
    b = Builder(32, 2**16, 1)
    for i in range(0, 60, 3):  # each with a value before and behind it that lies in planes, with gaps
        conv = {**ONE, "filters": 32, "groups": 32, "padding": (1, 0, 1, 0), "stride": (1, 2)}
        b.add("conv", i, arrays={"weight": b.floats(32, 1)}, **conv)
        b.add("slice", i + 1, axis=1, start=0, stop=2**16, step=1)
        b.add("reshape", i + 2, shape=(32, 2**16, 1))
    path = written(tmp_path / "net.acf", b.program(60))
    done = run_python(f"""
import resource
import autocompress_fast as acf
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
acf.load({str(path)!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
""")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 10  # KiB; a number for each element would be 640 MiB


# --- writing


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()
    engine = acf.load(path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        engine.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_program_lives_on_when_its_file_is_gone(path):
    engine = acf.load(path)
    wanted = engine(example())
    shutil.rmtree(path.parent)
    for y, z in zip(engine(example()), wanted, strict=True):
        assert np.array_equal(y, z)
