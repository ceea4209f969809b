"""Is an installed wheel whole? Needs numpy and safetensors alone, and no test runner.

python tests/test_minimal.py
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import autocompress_fast as acf
from autocompress_fast import ops
from autocompress_fast.engine.program import Input, Program, Step

WEIGHT = np.random.default_rng(0).standard_normal((16, 8, 3, 3), dtype=np.float32)


def test_config():
    config = acf.show_config()
    assert config["version"] == acf.__version__
    assert config["isa_active"] in config["isas_supported"]
    assert config["threads"] >= 1


def test_norms_are_those_of_numpy():
    filters = np.sqrt((WEIGHT.reshape(16, -1).astype(np.float64) ** 2).sum(axis=1))
    np.testing.assert_allclose(ops.group_norms(WEIGHT, "filter"), filters, rtol=1e-6)


def test_projection_keeps_the_largest_groups():
    for structure, axis in (("filter", 1), ("column", 0)):
        projected = ops.project(WEIGHT, structure, keep=5).reshape(16, -1)
        kept = np.flatnonzero(projected.any(axis=axis))
        norms = np.linalg.norm(WEIGHT.reshape(16, -1), axis=axis)
        assert kept.tolist() == sorted(np.argsort(-norms)[:5].tolist())
        np.testing.assert_array_equal(projected.take(kept, 1 - axis), WEIGHT.reshape(16, -1).take(kept, 1 - axis))


def test_update_moves_what_is_cut_into_the_dual():
    z, u = np.zeros_like(WEIGHT), np.zeros_like(WEIGHT)
    ops.admm_update(WEIGHT, z, u, "column", keep=10)
    np.testing.assert_array_equal(z, ops.project(WEIGHT, "column", keep=10))
    np.testing.assert_array_equal(u, WEIGHT - z)


def test_bad_input_is_refused():
    def refusal(weight, structure, keep):
        try:
            ops.project(weight, structure, keep=keep)
        except ValueError as error:
            return str(error).lower()
        return "accepted"

    bad = WEIGHT.copy()
    bad[3, 1, 2, 0] = np.nan
    assert "17" in refusal(WEIGHT, "filter", 17)
    assert "nan" in refusal(bad, "filter", 5)
    assert "row" in refusal(WEIGHT, "row", 5)


def test_a_saved_network_runs():
    weight = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    step = Step("linear", (0,), 1, {"filters": 2, "storage": "dense", "activation": "relu"}, {"weight": "w"})
    engine = acf.Engine(Program((Input("x", (3,)),), (step,), (1,), {"w": weight}))
    x = np.array([[1, 0, -1], [0, 1, 0]], np.float32)
    with tempfile.TemporaryDirectory() as folder:
        engine.save(Path(folder) / "network.acf")
        y = acf.load(Path(folder) / "network.acf")(x)
    np.testing.assert_array_equal(y, np.maximum(x @ weight.T, 0))


def test_a_network_of_8_bits_computes_nearly_the_same():
    step = Step("linear", (0,), 1, {"filters": 16, "storage": "dense", "activation": "relu"}, {"weight": "w"})
    engine = acf.Engine(Program((Input("x", (72,)),), (step,), (1,), {"w": WEIGHT.reshape(16, 72)}))
    x = np.random.default_rng(1).standard_normal((100, 72), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        acf.quantize(engine, x).save(Path(folder) / "network.acf")
        y = acf.load(Path(folder) / "network.acf")(x)
    assert 0 < np.abs(y - engine(x)).max() < 0.02 * np.abs(y).max()


if __name__ == "__main__":
    print(acf.show_config())
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(f"{name} passed")
    assert "torch" not in sys.modules, "torch was imported"
