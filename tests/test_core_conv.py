"""The native convolution against a sum over the kept columns."""

import math

import numpy as np
import pytest

from autocompress_fast import _core

every_isa = pytest.mark.usefixtures("isa")
DIRECT = ("pixels_in_lanes", "filters_in_lanes")
WINOGRAD = ("winograd_tiles_in_lanes", "winograd_filters_in_lanes")
OPTIONS = {
    "stride": (1, 1),
    "dilation": (1, 1),
    "padding": (0, 0, 0, 0),
    "groups": 1,
    "activation": "none",
    "slope": 0.01,
    "residual": None,
    "method": "auto",
    "threads": 1,
}


def conv2d(x, weight, columns=None, bias=None, **changes):
    """`_core.conv2d` of a weight (filters, channels of a group, kernel height, kernel width), cut to `columns`."""
    filters, channels, *kernel = weight.shape
    groups = changes.get("groups", 1)
    columns = np.arange(groups * weight[0].size) if columns is None else np.asarray(columns)
    own, per_group = weight.reshape(groups, filters // groups, -1), channels * kernel[0] * kernel[1]
    kept = [own[g][:, columns[columns // per_group == g] - g * per_group].ravel() for g in range(groups)]
    options = {"filters": filters, "kernel": kernel} | OPTIONS | changes
    return _core.conv2d(x, np.concatenate(kept), columns.tolist(), bias, **options)


def expected(x, weight, columns, bias, stride, dilation, padding, groups):
    top, left, bottom, right = padding
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    filters, _, kernel_h, kernel_w = weight.shape
    height = (x.shape[2] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    out = np.zeros((len(x), filters, height, width)) + np.reshape(bias, (1, -1, 1, 1))
    per_group, own = filters // groups, weight.shape[1]
    for column in columns:
        c, kh, kw = column // (kernel_h * kernel_w), column // kernel_w % kernel_h, column % kernel_w
        group = slice(c // own * per_group, (c // own + 1) * per_group)
        y, z = kh * dilation[0], kw * dilation[1]
        taken = x[:, c, y : y + stride[0] * height : stride[0], z : z + stride[1] * width : stride[1]]
        out[:, group] += weight[group, c % own, kh, kw].astype(np.float64)[:, None, None] * taken[:, None]
    return out


@every_isa
@pytest.mark.parametrize("seed", range(12))
def test_equals_the_sum_over_the_columns(seed):
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 2]))
    filters, channels = groups * int(rng.choice([1, 7, 13, 16, 37])), groups * int(rng.integers(1, 6))
    kernel, stride, dilation = (tuple(map(int, rng.integers(1, high, 2))) for high in (4, 4, 3))
    padding = tuple(map(int, rng.integers(0, 3, 4)))
    x = rng.standard_normal((int(rng.integers(1, 4)), channels, 11, 19), dtype=np.float32)
    weight = rng.standard_normal((filters, channels // groups, *kernel), dtype=np.float32)
    bias = rng.standard_normal(filters, dtype=np.float32)
    columns = np.flatnonzero(rng.random(groups * weight[0].size) < (1.0, 0.4, 0.0)[seed % 3])
    want = expected(x, weight, columns, bias, stride, dilation, padding, groups)
    residual = rng.standard_normal(want.shape, dtype=np.float32)
    for method in ("auto", *DIRECT)[: 1 if stride[1] > 2 else None]:
        got = conv2d(
            x, weight, columns, bias, stride=stride, dilation=dilation, padding=padding, groups=groups, method=method,
            residual=residual, activation="leaky", slope=0.25, threads=2,
        )  # fmt: skip
        total = want + residual
        np.testing.assert_allclose(got, np.where(total > 0, total, 0.25 * total), rtol=1e-5, atol=2e-5)


@every_isa
@pytest.mark.parametrize("seed", range(6))
def test_winograd_equals_the_sum_over_the_columns(seed):
    rng = np.random.default_rng(seed)
    filters, channels, images = int(rng.integers(1, 40)), int(rng.integers(1, 30)), int(rng.integers(1, 5))
    padding = tuple(map(int, rng.integers(0, 3, 4)))
    x = rng.standard_normal((images, channels, *rng.integers(3, (40, 40, 7)[seed % 3], 2)), dtype=np.float32)
    weight = rng.standard_normal((filters, channels, 3, 3), dtype=np.float32)
    bias = rng.standard_normal(filters, dtype=np.float32)
    columns = np.flatnonzero(rng.random(weight[0].size) < (1.0, 0.5)[seed % 2])
    want = expected(x, weight, columns, bias, (1, 1), (1, 1), padding, 1)
    tiles = math.prod((images, *(-(-size // 4) for size in want.shape[2:])))
    for method in WINOGRAD[: None if tiles < 4 else 1]:
        got = conv2d(x, weight, columns, bias, padding=padding, method=method, threads=2)
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


@every_isa
@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("none", lambda x: x),
        ("relu", lambda x: np.maximum(x, 0)),
        ("relu6", lambda x: np.clip(x, 0, 6)),
        ("leaky", lambda x: np.where(x > 0, x, 0.5 * x)),
        ("hardsigmoid", lambda x: np.clip(x + 3, 0, 6) / 6),
        ("gelu", lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / 2**0.5))),
        ("hardswish", lambda x: x * np.clip(x + 3, 0, 6) / 6),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("tanh", np.tanh),
    ],
)
def test_activations(activation, formula):
    x = np.linspace(-20, 20, 1001, dtype=np.float32).reshape(1, 1, 7, 143)
    got = conv2d(x, np.ones((1, 1, 1, 1), dtype=np.float32), activation=activation, slope=0.5)
    np.testing.assert_allclose(got, formula(x.astype(np.float64)), rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("methods", [DIRECT, WINOGRAD], ids=["direct", "winograd"])
def test_methods_and_threads_give_the_same_bits(methods):
    rng = np.random.default_rng(1)
    size = 9 if methods == DIRECT else 4  # few tiles
    x = rng.standard_normal((3, 40, size, size), dtype=np.float32)
    weight = rng.standard_normal((150, 40, 3, 3), dtype=np.float32)
    first = conv2d(x, weight, padding=(1, 1, 1, 1), method=methods[0])
    for method in methods:
        for threads in (1, 3):
            assert (conv2d(x, weight, padding=(1, 1, 1, 1), method=method, threads=threads) == first).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": [0, 2, 2]}, "ascending numbers from 0 to 35, got 2 after 2"),
        ({"columns": [36]}, "from 0 to 35, got 36"),
        ({"columns": [-1]}, "from 0 to 35, got -1"),
        ({"stride": (0, 1)}, "from 1 to 268435456, got 0"),
        ({"padding": (0, -1, 0, 0)}, "padding must be from 0 to 268435456, got -1"),
        ({"groups": 3}, "groups must divide channels 4 and filters 5, got 3"),
        ({"kernel": (9, 1)}, "the kernel does not fit into the padded input of 8 x 8"),
        ({"filters": 0}, "from 1 to 268435456, got 0"),
        ({"activation": "mish"}, "activation must be one of 'none', 'relu', .*, got 'mish'"),
        ({"method": "fft"}, "method must be one of 'auto', 'pixels_in_lanes', 'filters_in_lanes', .*, got 'fft'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"bias": np.zeros(4, np.float32)}, r"bias must have the shape \(5,\), got \(4,\)"),
        ({"weight": np.zeros(7, np.float32)}, r"weight must have the shape \(180,\), got \(7,\)"),
        ({"residual": np.zeros((1, 5, 8, 8), np.float32)}, r"residual must have the shape \(1, 5, 6, 6\)"),
        ({"x": np.zeros((4, 8, 8), np.float32)}, r"input must have the shape .*, got \(4, 8, 8\)"),
        ({"stride": (1, 3), "method": "pixels_in_lanes"}, "horizontal stride of 1 or 2, got 3"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, message):
    call = {
        "x": np.zeros((1, 4, 8, 8), np.float32),
        "weight": np.zeros(180, np.float32),
        "columns": range(36),
        "bias": None,
        "filters": 5,
        "kernel": (3, 3),
        **OPTIONS,
    }
    _core.conv2d(**call)
    with pytest.raises(ValueError, match=message):
        _core.conv2d(**(call | changes))


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="input must be float32, got float64"):
        conv2d(np.zeros((1, 1, 2, 2)), np.zeros((1, 1, 1, 1), np.float32))
