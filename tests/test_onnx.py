"""Programs as ONNX models: onnxruntime computes what the engine computes."""

import numpy as np
import pytest
import torch
from test_engine import FUNCTIONS, Function
from test_engine_native import Drawn, assert_close
from test_narrow import every_residual_of_8_bits, every_storage, narrowed, some
from torch import nn

import autocompress_fast as acf
from autocompress_fast import models
from autocompress_fast.compact import compact
from autocompress_fast.engine import Engine
from autocompress_fast.engine.onnx import as_onnx
from autocompress_fast.engine.program import is_narrow, rounds_residual, validate
from autocompress_fast.plan import Plan

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


def computed(model, inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


def check(engine: Engine, batches=(1, 3)):
    model = as_onnx(engine.program, validate(engine.program))
    rng = np.random.default_rng(0)
    for count in batches:
        inputs = [rng.standard_normal((count, *given.shape), np.float32) for given in engine.inputs]
        found, wanted = computed(model, inputs), engine(*inputs)
        assert_close(found, list(wanted) if isinstance(wanted, tuple) else [wanted])
    return model


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators(name):
    check(acf.compile(Function(FUNCTIONS[name]), torch.randn(2, 3, 5, 7)))


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed):
    drawn = Drawn(seed)
    found = computed(as_onnx(drawn.program, drawn.infos), inputs := drawn.samples(3))
    assert_close(found, list(Engine(drawn.program, threads=1)(*inputs)))


def test_columns_become_a_gather_of_channels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    kept = np.ones((4, 6, 3, 3))
    kept[:, [0, 3]] = 0
    kept[:, 1, 0] = 0
    x = torch.randn(1, 6, 4, 4)
    small = compact(model, Plan.from_masks({"0": kept}), x).model
    exported = check(acf.compile(small, x))
    assert [node.op_type for node in exported.graph.node][:2] == ["Gather", "Conv"]
    weight = next(onnx.numpy_helper.to_array(t) for t in exported.graph.initializer if len(t.dims) == 4)
    assert weight.shape == (4, 4, 3, 3)


@pytest.mark.parametrize("name", ["lenet5", "resnet20"])
def test_export_writes_a_file(name, tmp_path):
    model = models.create(name).eval()
    engine = acf.compile(model, torch.zeros(1, *models.input_shape(name)))
    path = tmp_path / "model.onnx"
    engine.export_onnx(path)
    x = np.random.default_rng(0).standard_normal((2, *models.input_shape(name)), np.float32)
    assert_close(computed(onnx.load(path), [x]), [engine(x)])


@pytest.mark.parametrize("seed", range(12))
def test_steps_of_8_bits(seed):
    """A value that lies between two numbers may become the other one, and change what is added by a step or two."""
    program = narrowed(every_storage() if seed == 0 else Drawn(seed).program, seed)
    program = every_residual_of_8_bits() if seed == 1 else program
    engine = Engine(program)
    exported = as_onnx(program, validate(program))
    inputs = some(program, 5)
    wanted = engine(*inputs)
    for y, z in zip(computed(exported, inputs), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        differences = np.abs(y - z) / max(1e-9, float(np.abs(z).max()))
        assert np.median(differences) < 1e-5
        assert differences.max() < 0.05
    kinds = [node.op_type for node in exported.graph.node]
    rounded = sum(map(is_narrow, program.steps)) + sum(map(rounds_residual, program.steps))
    assert kinds.count("QuantizeLinear") == rounded


def test_a_quantized_network(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(288, 5)
    )
    x = torch.randn(100, 3, 8, 8)
    small = acf.quantize(acf.compile(model, x), x)
    small.export_onnx(tmp_path / "small.onnx")
    (found,) = computed(onnx.load(tmp_path / "small.onnx"), [x.numpy()])
    wanted = small(x.numpy())
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.99
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    small.save(tmp_path / "small.acf")
    assert (tmp_path / "small.onnx").stat().st_size < 1.5 * (tmp_path / "small.acf").stat().st_size
