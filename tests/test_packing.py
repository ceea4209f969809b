"""Tensors as codes of few bits: what is read is what was written, and nothing else is taken."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

import autocompress_fast as acf
from autocompress_fast.engine import FileFormatError
from autocompress_fast.engine.packing import MOST_BITS, Packed, chosen, expected, joined, pack, stored, unpack
from autocompress_fast.quantize import LevelConstraint

VERSION_2 = Path(__file__).parent / "data" / "version_2.acf"


def of_values(count: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(count).astype(np.float32)
    tensor = rng.choice(values, shape)
    tensor.reshape(-1)[:count] = values[: tensor.size]
    return tensor


@pytest.mark.parametrize("shape", [(1000,), (16, 64), (7, 13, 3, 3), (1, 999), (300, 7), (257, 255)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 16, 17, 128, 129, 255, 256, 257])
def test_every_bit_comes_back(shape, count):
    tensor = of_values(count, shape, count)
    packed = pack(tensor, overhead=-(2**30))
    if packed is None:
        assert len(np.unique(tensor)) > 2**MOST_BITS
        return
    back = unpack(packed)
    assert back.dtype == np.float32
    assert back.shape == shape
    assert back.tobytes() == tensor.tobytes()
    assert packed.codes.nbytes == -(-tensor.size * packed.bits // 8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_as_many_bits_as_values_need(bits):
    for count in {2 ** (bits - 1) + 1, 2**bits}:
        assert pack(of_values(count, (64, 256), bits)).bits == bits


def test_filters_with_scales_of_their_own_have_tables_of_their_own():
    signs = of_values(2, (64, 576), 1)
    tensor = signs * np.random.default_rng(2).uniform(0.5, 2, (64, 1)).astype(np.float32)
    packed = pack(tensor)
    assert packed.bits == 1
    assert packed.table.shape == (64, 2)
    assert unpack(packed).tobytes() == tensor.tobytes()
    assert pack(signs).table.shape == (1, 2)


def test_zeros_of_both_signs_stay_what_they_are():
    tensor = np.tile(np.array([0.0, -0.0, 1.0], np.float32), 500)
    assert unpack(pack(tensor)).tobytes() == tensor.tobytes()


def test_what_saves_nothing_is_left():
    rng = np.random.default_rng(0)
    assert pack(rng.standard_normal((64, 64)).astype(np.float32)) is None
    assert pack(rng.standard_normal((4, 40)).astype(np.float32)) is None  # few, all different
    assert pack(np.ones(50, np.float32)) is None  # too small
    assert pack(np.ones(5000, np.uint16)) is None
    assert pack(np.ones((), np.float32)) is None
    assert pack(np.ones((0, 3), np.float32)) is None


def codes(*values):
    return np.array(values, np.uint8)


TABLE = np.array([[-1.0, 1.0]], np.float32)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (Packed((8,), 0, codes(1), TABLE), "codes have 1 to 8 bits, not 0"),
        (Packed((8,), 9, codes(*range(9)), TABLE), "codes have 1 to 8 bits, not 9"),
        (Packed((8,), True, codes(1), TABLE), "codes have 1 to 8 bits, not True"),
        (Packed((9,), 1, codes(1), TABLE), "9 codes of 1 bits are not uint8"),
        (Packed((8,), 1, codes(1, 1), TABLE), "8 codes of 1 bits are not uint8"),
        (Packed((8,), 1, np.ones(1, np.float32), TABLE), "are not float32"),
        (Packed((2, 4), 1, codes(1), TABLE[0]), "the table of a tensor"),
        (Packed((2, 4), 1, codes(1), np.zeros((3, 2), np.float32)), "the table of a tensor"),
        (Packed((8,), 1, codes(1), TABLE.astype(np.float64)), "the table of a tensor"),
        (Packed((), 1, codes(1), TABLE), "the table of a tensor"),
        (Packed((4,), 2, codes(0b11), TABLE), "code 3 has no value in a table of 2"),
        (Packed((8,), 1, codes(1), np.zeros((1, 0), np.float32)), "code 1 has no value in a table of 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(packed, message):
    with pytest.raises(ValueError, match=message):
        unpack(packed)


def split(tensors):
    return stored(tensors, chosen(tensors))


def test_tensors_of_a_file():
    tensors = {"a": of_values(2, (30, 40), 0), "b": np.arange(2000, dtype=np.float32), "i": np.zeros(2000, np.uint16)}
    arrays, described = split(tensors)
    assert set(arrays) == {"a.codes", "a.table", "b", "i"}
    assert described == {"a": {"shape": [30, 40], "bits": 1}}
    again = joined(arrays, described, 10**6)
    assert {name: tensor.tobytes() for name, tensor in again.items()} == {n: t.tobytes() for n, t in tensors.items()}
    taken = {**tensors, "a.codes": np.zeros(1, np.float32)}
    assert split(taken)[1] == {}  # the name is in use


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ([], "'packed' must be an object, not list"),
        ({"a": 3}, "must have a shape and bits, not 3"),
        ({"a": {"shape": [30, 40]}}, "must have a shape and bits"),
        ({"a": {"shape": [30, -40], "bits": 1}}, "has the shape"),
        ({"a": {"shape": [30, 40.0], "bits": 1}}, "has the shape"),
        ({"a": {"shape": [30, True], "bits": 1}}, "has the shape"),
        ({"a": {"shape": [10**5, 10**5], "bits": 1}}, "too many elements"),
        ({"a": {"shape": [40, 30, 2], "bits": 1}}, "2400 codes of 1 bits are not"),
        ({"b": {"shape": [30, 40], "bits": 1}}, r"needs 'b'\.codes and \.table, and nothing else"),
        ({}, "has dtype U8, and belongs to no packed tensor"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(described, message):
    arrays, _ = split({"a": of_values(2, (30, 40), 0)})
    with pytest.raises(ValueError, match=message):
        joined(arrays, described, 10**6)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("shape", [(40, 30), (7, 300), (500, 3), (4000,)])
@pytest.mark.parametrize("values", [1, 2, 3, 16, 17, 256, 257])
def test_what_is_expected_is_what_is_packed(values, shape, alike):
    filters, columns = shape if len(shape) > 1 else (1, shape[0])
    places = np.resize(np.arange(values), filters * columns if alike else columns)
    rows = np.broadcast_to(places.reshape(-1, columns), (filters, columns)).astype(np.float32)
    if not alike:
        rows = rows + (np.arange(filters, dtype=np.float32) / 1000)[:, None]
    packed, found = pack(rows.reshape(shape)), expected(shape, values, alike)
    assert (packed is None) == (found is None)
    if packed is not None:
        assert (found.shape, found.bits) == (packed.shape, packed.bits)
        assert (found.codes.nbytes, found.table.nbytes) == (packed.codes.nbytes, packed.table.nbytes)


def quantized() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 10)
    ).eval()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
        for number in (0, 3, 5):
            model[number].weight.copy_(LevelConstraint(2).project(model[number].weight.detach()))
    return model


def test_a_network_of_few_levels_is_a_small_file(tmp_path):
    """Also where a normalisation gives every filter a scale of its own."""
    model, x = quantized(), torch.randn(4, 3, 8, 8)
    engine = acf.compile(model, x)
    engine.save(tmp_path / "a.acf")
    loaded = acf.load(tmp_path / "a.acf")
    assert np.array_equal(loaded(x.numpy()), engine(x.numpy()))
    for name, tensor in engine.program.tensors.items():
        assert loaded.program.tensors[name].tobytes() == tensor.tobytes()
    weights = sum(m.weight.numel() for m in model if hasattr(m, "weight") and m.weight.dim() > 1)
    assert (tmp_path / "a.acf").stat().st_size < weights * 2 / 8 + 4500
    loaded.save(tmp_path / "b.acf")
    assert (tmp_path / "b.acf").read_bytes() == (tmp_path / "a.acf").read_bytes()
    content = json.loads(safetensors.safe_open(tmp_path / "a.acf", "np").metadata()["autocompress_fast"])
    assert content["format_version"] == 2
    assert {how["bits"] for how in content["packed"].values()} == {2}


def test_the_file_of_version_2_is_read_forever():
    """Written once, from `quantized`; it must never be written again."""
    engine = acf.load(VERSION_2, threads=1)
    x = np.sin(np.arange(2 * 3 * 64)).astype(np.float32).reshape(2, 3, 8, 8)
    np.testing.assert_allclose(engine(x), np.float32(engine.info["expected"]), rtol=1e-4, atol=1e-5)
    assert len(np.unique(engine.program.tensors[next(iter(engine.program.tensors))])) <= 4 * 32


def test_damaged_codes_are_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "a.acf"
    acf.compile(quantized(), torch.randn(1, 3, 8, 8)).save(path)
    with safetensors.safe_open(path, "np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith(".codes"))
    tensors[name] = tensors[name][:-1]
    path.write_bytes(safetensors.numpy.save(tensors, metadata))
    with pytest.raises(FileFormatError, match=r"a\.acf: packed tensor .* codes of 2 bits are not uint8"):
        acf.load(path)
