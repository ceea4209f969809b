"""8-bit networks from float32 ones: ranges against brute force, the whole against what torch simulates, bad samples."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from test_acf_file import ONE, Builder
from torch import nn

import autocompress_fast as acf
from autocompress_fast.compact import compact
from autocompress_fast.engine import Engine
from autocompress_fast.engine.calibration import METHODS, Grid, Histogram, chosen, rounded_weights
from autocompress_fast.engine.program import is_narrow, rounds_residual
from autocompress_fast.plan import Plan


def seen(values, parts=1):
    histogram = Histogram()
    for part in np.array_split(np.asarray(values, np.float32), parts):
        histogram.add(part)
    return histogram


def drawn(seed: int) -> np.ndarray:
    """Values as networks have them: of both signs or one, with and without many zeros, and some far outside."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(3000) * 10.0 ** rng.integers(-4, 5)
    if seed % 3 == 1:
        values = np.maximum(values, 0)
    if seed % 3 == 2:
        values = np.abs(values) + values.std() / 3
    values[:5] *= rng.choice([1, 30, 1000])
    return values.astype(np.float32)


# --- histograms


@pytest.mark.parametrize("seed", range(8))
def test_a_histogram_does_not_depend_on_order_and_parts(seed):
    values = drawn(seed)
    rng = np.random.default_rng(seed)
    whole = seen(values).content()
    for parts in (2, 7, 3000):
        for found, wanted in zip(seen(rng.permutation(values), parts).content(), whole, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("seed", range(8))
def test_bins_are_narrow_and_hold_what_was_seen(seed):
    values = drawn(seed)
    histogram = seen(values, 5)
    assert (histogram.low, histogram.high, histogram.count) == (values.min(), values.max(), len(values))
    centres, counts = histogram.content()
    assert counts.sum() == len(values)
    width = np.abs(values).max() / 2**13
    in_order = np.sort(values)
    np.testing.assert_allclose(np.repeat(centres, counts), in_order, atol=width)
    for share in (0.0, 0.1, 0.5, 0.999, 1.0):
        wanted = in_order[max(0, int(np.ceil(share * len(values))) - 1)]
        assert wanted - 1e-6 * width <= histogram.below(share) <= wanted + width


def test_a_histogram_takes_the_same_memory_for_all_magnitudes():
    histogram = Histogram()
    for value in (1e-45, -1e-30, 0.0, 1e-10, 1.0, -1e20, 3e38):
        histogram.add(np.full(3, value, np.float32))
    assert histogram.count == histogram.content()[1].sum() == 21
    assert len(histogram.content()[0]) < 2**15
    zeros = seen(np.zeros(4))
    zeros.add(np.float32([1e-6, 2e-6]))
    assert zeros.content()[1].tolist() == [4, 1, 1]


def test_what_is_no_number_is_not_counted():
    histogram = seen([1, 2])
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            histogram.add(np.float32([0, value]))
    histogram.add(np.zeros((0, 3), np.float32))
    assert histogram.count == 2


# --- grids


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(12))
def test_grids_have_zero_and_reach_no_further_than_the_values(method, seed):
    values = drawn(seed)
    grid = chosen(seen(values), method)
    assert 0 <= grid.zero <= 255
    assert grid.scale == np.float32(grid.scale) > 0
    assert grid.rounded(np.zeros(1)) == 0
    if values.min() >= 0:
        assert grid.zero == 0
    low, high = -grid.zero * grid.scale, (255 - grid.zero) * grid.scale
    assert low >= min(0, values.min()) - grid.scale
    assert high <= max(0, values.max()) + grid.scale
    if method == "minmax":
        assert np.abs(grid.rounded(values.astype(np.float64)) - values).max() <= grid.scale * 1.01


@pytest.mark.parametrize("seed", range(12))
def test_no_other_range_has_much_less_error(seed):
    values = drawn(seed).astype(np.float64)

    def error(grid):
        return np.square(grid.rounded(values) - values).sum()

    found = error(chosen(seen(values), "mse"))
    factors = 2.0 ** (np.arange(0, 40) / -4)
    ends = itertools.product(factors * min(0, values.min()), factors * max(0, values.max()))
    best = min(error(Grid.between(low, high)) for low, high in set(ends))
    assert found <= 1.1 * best
    assert found <= error(chosen(seen(values), "minmax")) * 1.01


def test_percentiles():
    values = np.concatenate([np.arange(9990), np.full(10, 1e6)]).astype(np.float32)
    assert 255 * chosen(seen(values), "percentile", 99.9).scale == pytest.approx(9990, rel=0.01)
    both = np.concatenate([values, -values])
    grid = chosen(seen(both), "percentile", 99.8)
    assert 255 * grid.scale == pytest.approx(2 * 9990, rel=0.02)
    assert 126 <= grid.zero <= 129
    assert chosen(seen(values), "percentile", 100) == chosen(seen(values), "minmax")
    mostly_zero = np.append(np.zeros(10**5), [2.55]).astype(np.float32)
    assert chosen(seen(mostly_zero), "percentile", 99.0) == Grid.between(0.0, float(np.float32(2.55)))


def test_ranges_beyond_8_bits():
    assert Grid.between(0.0, 1e-37).scale >= 1e-30
    with pytest.raises(ValueError, match="values from -1e\\+38 to 3e\\+38 are too large for 8 bits"):
        Grid.between(-1e38, 3e38)
    assert Grid.between(-5.0, -1.0).zero == 255


# --- weights


@pytest.mark.parametrize("best", [False, True])
def test_weights_are_the_nearest_integers(best):
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((9, 50)) * 10.0 ** rng.integers(-5, 5, (9, 1))).astype(np.float32)
    weight[3] = 0
    weight[:, 7] = 0
    integers, scales = rounded_weights(weight, best=best)
    assert integers.dtype == np.int8
    assert scales.dtype == np.float32
    assert (integers[weight == 0] == 0).all()
    assert scales[3] == 1
    largest = np.abs(weight).max(axis=1)
    kept = largest > 0
    assert (np.abs(integers).max(axis=1)[kept] == 127).all()
    inside = np.abs(weight) <= 127 * scales[:, None]
    assert (np.abs(integers * scales[:, None] - weight) <= 0.5001 * scales[:, None])[inside].all()
    if not best:
        np.testing.assert_allclose(127 * scales[kept], largest[kept], rtol=1e-6)


def test_scales_with_less_error_are_found():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 5000)).astype(np.float32)
    weight[:, 0] = 8  # one far outside, of which half a step less for all others is worth more
    errors = []
    for best in (False, True):
        integers, scales = rounded_weights(weight, best=best)
        errors.append(np.square(integers * scales[:, None] - weight).sum())
    assert errors[1] < errors[0]


def test_many_filters_are_rounded_in_blocks(monkeypatch):
    weight = np.random.default_rng(0).standard_normal((10, 6)).astype(np.float32)
    whole = rounded_weights(weight, best=True)
    monkeypatch.setattr("autocompress_fast.engine.calibration._BLOCK", 13)
    for found, wanted in zip(rounded_weights(weight, best=True), whole, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_tiny_weights_keep_scales_that_are_allowed():
    integers, scales = rounded_weights(np.full((1, 2), 1e-33, np.float32), best=True, least=1e-20)
    assert (integers == 0).all()
    assert scales[0] == np.float32(1e-20)


# --- networks


class Branches(nn.Module):
    """Residuals, a grouped and a depthwise convolution, a normalisation, a gate that is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.strided = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(16, 16, 1, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.grouped(x) + x)
        x = torch.nn.functional.silu(self.strided(x) + self.shortcut(x))
        x = self.depthwise(x)
        return self.fc(x.mean((2, 3)))


def trained_norms(model: nn.Module, x: torch.Tensor) -> nn.Module:
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(x)
    return model.eval()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    x = torch.randn(200, 3, 8, 8)
    model = trained_norms(Branches(), x)
    return acf.compile(model, x[:2], threads=1), x.numpy()


def scales(engine):
    """Of the inputs of its layers: their last bits depend on how many samples are computed at once."""
    return pytest.approx(
        [s.attributes[name] for s in engine.program.steps if is_narrow(s) for name in ("input_scale", "input_zero")],
        rel=1e-4,
    )


def difference(engine, other, x):
    wanted = other(x)
    return float(np.abs(engine(x) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("method", METHODS)
def test_a_network_of_8_bits_computes_nearly_the_same(method, network):
    engine, x = network
    small = acf.quantize(engine, x, method=method)
    assert sum(map(is_narrow, small.program.steps)) == 6
    assert 0 < difference(small, engine, x) < 0.05
    zeros = {step.name: step.attributes["input_zero"] for step in small.program.steps if is_narrow(step)}
    assert zeros["first"] > 0
    assert zeros["grouped"] == zeros["strided"] == zeros["shortcut"] == 0  # after relu
    again = acf.quantize(engine, x, method=method)
    assert again.program.steps == small.program.steps
    for name, tensor in small.program.tensors.items():
        assert again.program.tensors[name].tobytes() == tensor.tobytes()


def test_readers_of_one_value_share_its_scale(network):
    engine, x = network
    steps = {step.name: step for step in acf.quantize(engine, x).program.steps}
    assert steps["strided"].attributes["input_scale"] == steps["shortcut"].attributes["input_scale"]
    assert steps["strided"].inputs == steps["shortcut"].inputs
    assert is_narrow(steps["depthwise"])


def test_what_is_added_has_the_numbers_of_its_other_reader(network):
    engine, x = network
    small = acf.quantize(engine, x)
    layers = {step.name: step for step in small.program.steps if is_narrow(step)}
    adds = [step for step in small.program.steps if step.op == "add"]
    assert all(map(rounds_residual, adds))
    of_input = [layers["grouped"].attributes[name] for name in ("input_scale", "input_zero")]
    assert [adds[0].attributes[name] for name in ("residual_scale", "residual_zero")] == of_input
    assert adds[0].inputs == (layers["grouped"].output, layers["grouped"].inputs[0])
    assert adds[1].attributes["residual_zero"] > 0  # of a convolution, without activation
    assert set(adds[1].inputs) == {layers["strided"].output, layers["shortcut"].output}
    assert small.info["provenance"]["quantization"]["residuals"] == 2
    assert [step.op for step in small.profile(x[:1], rounds=1).steps].count("conv + add") == 2


def test_residuals_may_stay_in_float32(network):
    engine, x = network
    wide = acf.quantize(engine, x, residual_bits=32)
    assert not any(map(rounds_residual, wide.program.steps))
    assert "residuals" not in wide.info["provenance"]["quantization"]
    small = acf.quantize(engine, x)
    plain = {"residual_scale", "residual_zero"}
    for one, other in zip(wide.program.steps, small.program.steps, strict=True):
        assert one.attributes == {k: v for k, v in other.attributes.items() if k not in plain}
        assert sorted(one.inputs) == sorted(other.inputs)
    assert difference(wide, engine, x) < 1.2 * difference(small, engine, x)
    for options in ({"skip": "grouped"}, {"skip": ["strided", "shortcut"]}):  # those of layers in float32
        found = acf.quantize(engine, x, **options)
        assert sum(map(rounds_residual, found.program.steps)) == 1


def test_a_residual_that_is_always_the_same_stays_in_float32():
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            with torch.no_grad():
                self.other.weight.zero_()
                self.other.bias.fill_(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.other(x)) + self.conv(x)

    torch.manual_seed(0)
    x = torch.randn(50, 3, 4, 4)
    engine = acf.compile(Same().eval(), x[:2])
    small = acf.quantize(engine, x)
    assert not any(map(rounds_residual, small.program.steps))
    assert any(map(is_narrow, small.program.steps))
    assert difference(small, engine, x.numpy()) < 0.05


def test_a_residual_that_is_not_finite_is_named():
    b = Builder(8, 4, 4)
    b.add("conv", 0, arrays={"weight": b.floats(8, 8)}, **{**ONE, "filters": 8, "activation": "none"})
    constant = {"constant": np.full((8, 1, 1), 3e38, np.float32)}
    b.add("mul", 0, arrays=constant, activation="none")
    b.add("add", 1, 2, activation="none")
    x = np.random.default_rng(0).standard_normal((40, 8, 4, 4), np.float32)
    engine = Engine(b.program(3))
    with (
        np.errstate(all="ignore"),
        pytest.raises(ValueError, match="what is added to layer 'layer\\.0' holds NaN"),
    ):
        acf.quantize(engine, x)
    assert acf.quantize(engine, x, residual_bits=32).info["provenance"]["quantization"]["layers"] == 1


def test_how_samples_are_given_does_not_matter(network):
    engine, x = network
    labels = np.zeros(len(x), np.int64)
    wanted = acf.quantize(engine, x)
    given = [
        torch.from_numpy(x),
        [x[:50], x[50:]],
        [torch.from_numpy(x)],
        iter(np.split(x, 100)),
        [(x[:120], labels[:120]), (x[120:], labels[120:])],
        [[x]],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(x), torch.zeros(200)), 64),
    ]
    for batches in given:
        assert scales(acf.quantize(engine, batches)).expected == scales(wanted)


def test_no_more_samples_are_looked_at_than_wanted(network):
    engine, x = network

    def endless():
        yield from np.split(x, 20)
        raise AssertionError("too many")

    small = acf.quantize(engine, endless(), samples=35)
    assert small.info["provenance"]["quantization"] == {
        "method": "mse", "samples": 35, "layers": 6, "residuals": 2
    }  # fmt: skip
    assert scales(small).expected == scales(acf.quantize(engine, [x[:35]]))
    spread = acf.quantize(engine, x, samples=2)
    assert spread.program.steps == acf.quantize(engine, [x[[0, 199]]]).program.steps


def test_a_data_set_is_taken_as_the_network_sees_it(network):
    images = np.random.default_rng(0).integers(0, 256, (90, 3, 8, 8), np.uint8)
    splits = acf.data.from_arrays(images, np.arange(90) % 3, validation=0.2, test=0.2, seed=0)
    engine, _ = network
    found = acf.quantize(engine, splits.train)
    assert found.program.steps == acf.quantize(engine, splits.train.normalized()).program.steps
    fixed = acf.quantize(Engine(dataclasses.replace(engine.program, batch=7)), splits.train)
    assert fixed.info["provenance"]["quantization"]["samples"] == 7


def test_layers_stay_in_float32(network):
    engine, x = network

    def narrow(skip):
        return [s.name for s in acf.quantize(engine, x, skip=skip).program.steps if is_narrow(s)]

    assert narrow("first") == narrow(["first"]) == ["grouped", "strided", "shortcut", "depthwise", "fc"]
    assert narrow(["f*", "grouped"]) == ["strided", "shortcut", "depthwise"]
    with pytest.raises(ValueError, match="skip names 'frist', which no layer matches; layers are first, grouped, "):
        narrow(["first", "frist"])
    with pytest.raises(ValueError, match="nothing to quantize: skip names all layers"):
        narrow("*")


def test_groups_of_few_filters_stay_float32_unless_depthwise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 8, 3, groups=2))
    x = torch.randn(40, 8, 9, 9)
    small = acf.quantize(acf.compile(model, x), x)
    assert [step.name for step in small.program.steps if is_narrow(step)] == ["0"]


def test_columns_stay_columns_and_single_weights_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    kept = np.ones((8, 6, 3, 3))
    kept[:, [0, 3]] = 0
    kept[:, 1, 0] = 0
    x = torch.randn(60, 6, 4, 4)
    small = compact(model, Plan.from_masks({"0": kept}), x).model
    with torch.no_grad():
        small[3].weight[torch.rand_like(small[3].weight) < 0.95] = 0
    engine = acf.compile(small, x)
    assert [s.attributes["storage"] for s in engine.program.steps if "storage" in s.attributes] == ["columns", "sparse"]
    narrow = acf.quantize(engine, x)
    assert [is_narrow(s) for s in narrow.program.steps] == [True, False, False]
    assert difference(narrow, engine, x.numpy()) < 0.05
    with pytest.raises(ValueError, match="nothing to quantize: skip names all"):
        acf.quantize(engine, x, skip="0")


def test_sparse_networks_have_nothing_to_quantize():
    b = Builder(9)
    sparse = {
        "values": b.floats(2), "indices": np.array([0, 5], np.uint16), "offsets": np.array([0, 1, 2], np.uint16)
    }  # fmt: skip
    engine = Engine(b.program(b.add("linear", 0, arrays=sparse, filters=2, storage="sparse", activation="none")))
    with pytest.raises(ValueError, match="nothing to quantize: the network has no layer with dense or columns"):
        acf.quantize(engine, np.ones((3, 9), np.float32))


def test_what_is_quantized_is_not_again(network):
    engine, x = network
    with pytest.raises(ValueError, match="computes with 8 bits already"):
        acf.quantize(acf.quantize(engine, x), x)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "needs samples to look at, got none"),
        (np.zeros((0, 3, 8, 8), np.float32), ValueError, "needs samples to look at, got none"),
        (np.zeros((4, 3, 8, 9), np.float32), ValueError, r"must have shape \(N, 3, 8, 8\), not \(4, 3, 8, 9\)"),
        (np.zeros((4, 3, 8, 8)), TypeError, "must be float32, not float64"),
        (np.zeros((4, 3, 8, 8), np.uint8), TypeError, "must be float32, not uint8"),
        ([np.zeros((3, 8, 8), np.float32)], ValueError, "must have shape"),
        ([3], TypeError, "batches must be arrays or tensors whose first dimension is the samples, not int"),
        ([(np.ones((4, 3, 8, 8), np.float32),) * 3], TypeError, "takes 1 inputs"),
        (np.full((4, 3, 8, 8), np.nan, np.float32), ValueError, "the input of layer 'first' holds NaN or infinity"),
        (np.full((4, 3, 8, 8), 1e38, np.float32), ValueError, "the input of layer 'fc' holds NaN or infinity"),
        (np.zeros((4, 3, 8, 8), np.float32), ValueError, "input of layer 'first' is 0 everywhere in the samples"),
        (np.full((4, 3, 8, 8), 2, np.float32), ValueError, "input of layer 'first' is 2 everywhere in the samples"),
    ],
)
def test_samples_that_say_nothing(batches, error, message, network):
    engine, _ = network
    with np.errstate(all="ignore"), pytest.raises(error, match=message):
        acf.quantize(engine, batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "entropy"}, "method must be one of mse, minmax, percentile, got 'entropy'"),
        ({"percentile": 101}, "percentile must be from 50 to 100, got 101"),
        ({"percentile": float("nan")}, "percentile must be from 50 to 100, got nan"),
        ({"samples": 0}, "samples must be 1 or more, got 0"),
        ({"residual_bits": 16}, "residual_bits must be 8 or 32, got 16"),
        ({"residual_bits": "8"}, "residual_bits must be 8 or 32, got '8'"),
    ],
)
def test_options_are_checked(options, message, network):
    engine, x = network
    with pytest.raises(ValueError, match=message):
        acf.quantize(engine, x, **options)


def test_information_goes_along_but_for_the_accuracy(network, tmp_path):
    engine, x = network
    known = Engine(engine.program, info={"accuracy": 0.9, "mean": [0.5], "provenance": {"data": "none"}})
    small = acf.quantize(known, x, method="percentile")
    done = {"method": "percentile", "samples": 200, "layers": 6, "residuals": 2, "percentile": 99.99}
    assert small.info == {"mean": [0.5], "provenance": {"data": "none", "quantization": done}}
    assert known.info["accuracy"] == 0.9
    small.save(tmp_path / "small.acf")
    assert acf.load(tmp_path / "small.acf").info == small.info


def test_several_inputs_and_a_fixed_batch():
    b = Builder(2, 4, 4)
    b.inputs = (*b.inputs, dataclasses.replace(b.inputs[0], name="y"))
    b.steps = []
    b.add("add", 0, 1, activation="none")
    b.steps[0] = dataclasses.replace(b.steps[0], output=2)
    attributes = {**ONE, "filters": 3}
    b.tensors["w"] = b.floats(3, 2)
    b.steps.append(dataclasses.replace(b.steps[0], op="conv", inputs=(2,), output=3, attributes=attributes,
                                       tensors={"weight": "w"}, name="conv"))  # fmt: skip
    program = b.program(3)
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((6, 2, 4, 4), np.float32) for _ in range(2))
    small = acf.quantize(Engine(program), [(x, y)])
    assert np.abs(small(x, y) - Engine(program)(x, y)).max() < 0.1
    fixed = Engine(dataclasses.replace(program, batch=6))
    assert acf.quantize(fixed, [(x, y), (y, x)], samples=3).info["provenance"]["quantization"]["samples"] == 6
    with pytest.raises(ValueError, match=r"must have shape \(6, 2, 4, 4\)"):
        acf.quantize(fixed, [(x[:3], y[:3])])


def test_values_are_watched_in_groups_where_they_are_large(network, monkeypatch):
    engine, x = network
    wanted = acf.quantize(engine, x)
    monkeypatch.setattr("autocompress_fast.engine.narrow._ELEMENTS", 600)
    assert scales(acf.quantize(engine, x)).expected == scales(wanted)


def test_engine_of_8_bits_runs_without_torch(network, tmp_path, run_python):
    engine, x = network
    path = tmp_path / "float.acf"
    engine.save(path)
    np.save(tmp_path / "x.npy", x)
    done = run_python(f"""
import sys
sys.modules["torch"] = None  # any import of torch fails
import numpy as np
import autocompress_fast as acf
acf.quantize(acf.load({str(path)!r}), np.load("x.npy")).save("small.acf")
""")
    assert done.returncode == 0, done.stderr
    found = acf.load(tmp_path / "small.acf")
    np.testing.assert_array_equal(found(x), acf.quantize(engine, x)(x))
