"""The engine in bfloat16: as exact as such numbers allow, on every processor, and float32 outside."""

import numpy as np
import pytest
import torch
from torch import nn

import autocompress_fast as acf
from autocompress_fast import _core, models
from autocompress_fast.engine import PRECISIONS, Engine, FileFormatError, load


def rounded(x):
    """To bfloat16 and back."""
    return x.to(torch.bfloat16).float()


@pytest.fixture
def layers():
    """A convolution that is large enough for bfloat16 to be quicker, and a linear layer."""
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU())
    linear = nn.Linear(300, 200)
    return (conv, torch.randn(2, 32, 20, 20)), (linear, torch.randn(32, 300))


def test_products_are_of_rounded_numbers(layers):
    for model, x in layers:
        engine = acf.compile(model, x, precision="bfloat16")
        found = engine(x)
        with torch.no_grad():
            wide = model(x)
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.weight.copy_(rounded(module.weight))
            narrow = model(rounded(x))
        errors = {exact: float((found - y).abs().max()) for exact, y in (("narrow", narrow), ("wide", wide))}
        assert min(errors.values()) < 2e-5
        if "amx" in _core.narrow_units("bfloat16"):  # others may be slower than float32, which is taken then
            assert errors["narrow"] < 2e-5 < errors["wide"]
        assert found.dtype == torch.float32


def test_results_do_not_depend_on_threads_or_time():
    model = models.create("resnet20").eval()
    x = torch.randn(5, 3, 32, 32)
    engines = [acf.compile(model, x, threads=threads, precision="bfloat16") for threads in (1, 2, 3)]
    first = engines[0](x)
    assert all(torch.equal(engine(x), first) for engine in engines for _ in range(2))


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "mobilenet_v2", "lenet5"])
def test_networks_compute_nearly_the_same(name):
    torch.manual_seed(0)
    model = models.create(name).eval()
    x = torch.randn(4, *((1, 28, 28) if name == "lenet5" else (3, 32, 32)))
    engine = acf.compile(model, x)
    wide, narrow = engine(x), Engine(engine.program, precision="bfloat16")(x)
    assert float((wide - narrow).abs().max()) <= 0.03 * float(wide.abs().max())
    if name != "lenet5" and "amx" in _core.narrow_units("bfloat16"):
        assert not torch.equal(wide, narrow)


def test_pruned_columns(tmp_path):
    torch.manual_seed(0)
    model, example = models.create("resnet20").eval(), torch.randn(3, 3, 32, 32)
    report = acf.inspect(model, example)
    small = acf.compact(model, acf.Plan.uniform(report, filters=0.3, columns=0.6), example, report=report).model
    engine = acf.compile(small, example, precision="bfloat16")
    with torch.no_grad():
        expected = small(example)
    assert float((engine(example) - expected).abs().max()) <= 0.03 * float(expected.abs().max())

    engine.save(tmp_path / "small.acf")  # the file is that of float32
    wide, narrow = load(tmp_path / "small.acf"), load(tmp_path / "small.acf", precision="bfloat16")
    assert wide.precision == "float32"
    assert narrow.precision == "bfloat16"
    torch.testing.assert_close(wide(example), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(narrow(example), engine(example))


def test_other_instruction_sets_compute_in_float32(monkeypatch, layers):
    (model, x), _ = layers
    monkeypatch.setenv("ACF_FORCE_ISA", "generic")
    _core.reload_isa()
    try:
        assert _core.narrow_units("bfloat16") == []
        assert torch.equal(acf.compile(model, x, precision="bfloat16")(x), acf.compile(model, x)(x))
    finally:
        monkeypatch.undo()
        _core.reload_isa()


def test_unknown_precisions(tmp_path):
    model, x = nn.Linear(3, 2), torch.zeros(1, 3)
    message = "precision must be one of float32, bfloat16, not 'half'"
    with pytest.raises(ValueError, match=message):
        acf.compile(model, x, precision="half")
    engine = acf.compile(model, x)
    with pytest.raises(ValueError, match=message):
        Engine(engine.program, precision="half")
    engine.save(tmp_path / "a.acf")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "a.acf", precision="half")
    assert not isinstance(caught.value, FileFormatError)
    assert PRECISIONS == ("float32", "bfloat16")
    with pytest.raises(ValueError, match="number must be bfloat16 or int8, got 'half'"):
        _core.narrow_units("half")


def test_what_the_machine_has_is_told():
    config = acf.show_config()
    assert "generic" in config["int8_units"]
    assert config["bfloat16_units"] == tuple(_core.narrow_units("bfloat16"))
    assert np.isin(config["bfloat16_units"], ("avx512_bf16", "amx", "neon_bf16")).all()


def test_any_number_of_samples_after_another():
    model = models.create("resnet20").eval()
    x = torch.randn(40, 3, 32, 32)
    engine = acf.compile(model, x[:1], precision="bfloat16")
    with torch.no_grad():
        expected = model(x)
    for samples in (1, 3, 40, 2, 1, 17):
        assert float((engine(x[:samples]) - expected[:samples]).abs().max()) <= 0.03 * float(expected.abs().max())
