"""The native kernels against `_reference`, for every instruction set, at awkward sizes and places in memory."""

import numpy as np
import pytest

from autocompress_fast import _core
from autocompress_fast import _reference as reference

every_isa = pytest.mark.usefixtures("isa")

STRUCTURES = ("filter", "channel", "column", "element")
DTYPES = (np.float32, np.float64)
WIDTH = 16  # of the vector that all kernels are written in
# K below, at and above the vector's width, primes, one row, one column, more than one task, more than one stripe.
SHAPES = [
    (1, 1),
    (1, WIDTH - 1),
    (2, WIDTH),
    (3, WIDTH + 1),
    (1, 2 * WIDTH + 3),
    (7, 5, 3),
    (13, 31, 1, 1),
    (31, 1, 7, 1),
    (4, 3, 2, 2, 2),
    (97, 11, 3, 3),
    (64, 30, 3, 3),
    (6, 2063),
]


def whole_numbers(rng, shape, dtype, limit=30):
    """Numbers whose squares add up exactly in any order, with many ties."""
    return rng.integers(-limit, limit + 1, shape).astype(dtype)


def misaligned(array, offset):
    """A contiguous copy that begins `offset` elements after a multiple of 64 bytes."""
    memory = np.zeros(array.nbytes + 64 + offset * array.itemsize, dtype=np.uint8)
    start = -memory.ctypes.data % 64 + offset * array.itemsize
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def group_choices(rows):
    return [groups for groups in (1, 2, 7, rows) if rows % groups == 0 and groups <= rows]


def keeps(groups):
    return sorted({0, 1, groups // 3, groups // 2, max(0, groups - 1), groups})


def project(weight, structure, keep, groups=1, threads=1):
    out = np.full_like(weight, np.nan)
    _core.project(weight, out, structure, keep, groups, threads)
    return out


def updated(weight, z, u, structure, keep, groups=1, threads=1):
    z, u = z.copy(), u.copy()
    return z, u, _core.admm_update(weight, z, u, structure, keep, groups, threads)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_and_norms_equal_the_reference(shape, dtype):
    rng = np.random.default_rng(1)
    for groups in group_choices(shape[0]):
        for structure in STRUCTURES:
            weight = whole_numbers(rng, shape, dtype)
            squares = reference.group_squares(weight, structure, groups)
            norms = _core.group_norms(weight, structure, groups, 1)
            np.testing.assert_array_equal(norms, np.sqrt(squares))
            for keep in keeps(len(squares)):
                expected = reference.project(weight, structure, keep, groups)
                np.testing.assert_array_equal(project(weight, structure, keep, groups), expected)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update_equals_the_reference(shape, dtype):
    rng = np.random.default_rng(2)
    for groups in group_choices(shape[0]):
        for structure in STRUCTURES:
            weight, z, u = (whole_numbers(rng, shape, dtype, 9) for _ in range(3))
            for keep in keeps(len(reference.group_squares(weight, structure, groups))):
                expected = reference.admm_update(weight, z, u, structure, keep, groups)
                new_z, new_u, (primal, dual) = updated(weight, z, u, structure, keep, groups)
                np.testing.assert_array_equal(new_z, expected.z)
                np.testing.assert_array_equal(new_u, expected.u)
                assert primal == pytest.approx(expected.primal, rel=1e-6)
                assert dual == pytest.approx(expected.dual, rel=1e-6)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_updates_stay_equal_to_the_reference(dtype):
    """The second update finds filters with U = 0 and with Z = 0, for which there are shorter ways."""
    rng = np.random.default_rng(3)
    for structure in STRUCTURES:
        weight, z, u = whole_numbers(rng, (40, 7, 3, 3), dtype), np.zeros((40, 7, 3, 3), dtype), None
        u = np.zeros_like(z)
        keep = len(reference.group_squares(weight, structure)) // 4
        for _ in range(5):
            expected = reference.admm_update(weight, z, u, structure, keep)
            z, u, residuals = updated(weight, z, u, structure, keep)
            np.testing.assert_array_equal(z, expected.z)
            np.testing.assert_array_equal(u, expected.u)
            assert residuals == pytest.approx((expected.primal, expected.dual), rel=1e-6)
            weight += whole_numbers(rng, weight.shape, dtype, 3)
            weight[3] = -0.0


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_alignment(dtype):
    rng = np.random.default_rng(4)
    values = [whole_numbers(rng, (9, 37), dtype) for _ in range(3)]
    for offset in (0, 1, 3, 7, 15):
        weight, z, u = (misaligned(array, offset) for array in values)
        for structure in STRUCTURES:
            keep = len(reference.group_squares(weight, structure)) // 2
            out = misaligned(np.zeros_like(weight), (offset + 5) % WIDTH)
            _core.project(weight, out, structure, keep, 1, 1)
            np.testing.assert_array_equal(out, reference.project(weight, structure, keep))
            expected = reference.admm_update(weight, z, u, structure, keep)
            new_z, new_u = misaligned(z, offset), misaligned(u, (offset + 1) % WIDTH)
            _core.admm_update(weight, new_z, new_u, structure, keep, 1, 1)
            np.testing.assert_array_equal(new_z, expected.z)
            np.testing.assert_array_equal(new_u, expected.u)


# What a sample misjudges: order, ties, two values, outliers, values in one place; more than one task of elements.
def element_data(rng, n):
    yield "gaussian", rng.standard_normal(n)
    yield "ascending", np.linspace(0, 1, n)
    yield "descending", np.linspace(1, 0, n)
    yield "all equal", np.full(n, 0.5)
    yield "zeros", np.zeros(n)
    yield "minus zero", np.full(n, -0.0)
    yield "two values", np.where(rng.random(n) < 0.3, 2.0, -1.0)
    yield "mostly zero", np.where(rng.random(n) < 0.05, rng.standard_normal(n), 0)
    yield "half zero, in one place", np.where(np.arange(n) < n // 2, 0, rng.standard_normal(n))
    yield "one outlier", np.where(np.arange(n) == n - 1, 1e30, 1e-30)
    yield "whole numbers", rng.integers(-5, 6, n)
    yield "huge range", rng.standard_normal(n) * 10.0 ** rng.integers(-18, 18, n)
    yield "denormal", rng.integers(-9, 9, n) * 1e-45
    yield "crowded", np.where(np.arange(n) // 5000 == 1, 1 + 1e-3 * rng.standard_normal(n), 5 * rng.random(n))
    yield "periodic", np.tile(np.arange(64.0), n // 64 + 1)[:n]


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4095, 4097, 3 * 16384 + 5])
def test_elements_of_peculiar_data(n, dtype):
    rng = np.random.default_rng(5)
    for name, values in element_data(rng, n):
        weight = values.astype(dtype).reshape(1, n)
        for keep in (1, n // 20, n // 2, n - 1):
            kept = reference.largest(np.abs(weight.ravel()).astype(np.float64), keep)
            expected = np.where(kept, weight.ravel(), 0)
            result = project(weight, "element", keep, threads=2).ravel()
            np.testing.assert_array_equal(result, expected, err_msg=f"{name}, keep {keep}")


def test_results_do_not_depend_on_isa_or_threads(monkeypatch):
    """Random floats, whose sums are rounded: every bit must agree, residuals included."""
    rng = np.random.default_rng(6)
    for dtype in DTYPES:
        # The last is large enough for three threads to be used, the others have odd sizes.
        for shape, groups in [((64, 61, 3, 3), 1), ((32, 5, 3, 3), 4), ((5, 2063), 1), ((300, 147, 3, 3), 2)]:
            weight, z, u = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
            for structure in (*STRUCTURES, "filter+column"):
                if structure == "filter+column":
                    keep = (shape[0] // 3, groups * weight[0].size // 4)
                else:
                    keep = len(_core.group_norms(weight, structure, groups, 1)) // 3
                results = []
                for isa in _core.supported_isas():
                    monkeypatch.setenv("ACF_FORCE_ISA", isa)
                    _core.reload_isa()
                    for threads in (1, 2, 5):
                        new_z, new_u, residuals = updated(weight, z, u, structure, keep, groups, threads)
                        norms = b""
                        if structure != "filter+column":
                            norms = _core.group_norms(weight, structure, groups, threads).tobytes()
                        results.append((new_z.tobytes(), new_u.tobytes(), residuals, norms))
                assert all(result == results[0] for result in results), (dtype, shape, structure)
    monkeypatch.delenv("ACF_FORCE_ISA")
    _core.reload_isa()


@every_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_is_found_anywhere_and_nothing_is_written(dtype, bad):
    rng = np.random.default_rng(7)
    for shape in [(5, 7, 3), (40, 900)]:
        for structure in (*STRUCTURES, "filter+column"):
            keep = (2, 3) if structure == "filter+column" else 2
            for place in (0, 17, int(np.prod(shape)) - 1):
                for owner in ("weight", "u"):
                    weight, z, u = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
                    (weight if owner == "weight" else u).ravel()[place] = bad
                    before = z.copy(), u.copy()
                    index = ", ".join(str(i) for i in np.unravel_index(place, shape))
                    message = (
                        rf"^{owner} has 1 value that is NaN or infinite, the first at flat index {place}, "
                        rf"index \({index}\)$"
                    )
                    with pytest.raises(ValueError, match=message):
                        _core.admm_update(weight, z, u, structure, keep, 1, 1)
                    np.testing.assert_array_equal(z, before[0])
                    np.testing.assert_array_equal(u, before[1])


@every_isa
def test_not_finite_with_nothing_or_everything_to_keep():
    weight = np.ones((4, 5), dtype=np.float32)
    weight[1, 2] = weight[3, 0] = np.nan
    for structure, groups in (("filter", 4), ("column", 5), ("element", 20)):
        for keep in (0, groups):
            out = np.zeros_like(weight)
            with pytest.raises(
                ValueError, match="weight has 2 values that are NaN or infinite, the first at flat index 7"
            ):
                _core.project(weight, out, structure, keep, 1, 1)
            assert not out.any()


@every_isa
def test_sum_that_overflows_is_named():
    weight = np.full((2, 3), 3e38, dtype=np.float32)
    for structure in STRUCTURES:
        with pytest.raises(ValueError, match=r"^weight \+ u has 6 values"):
            _core.admm_update(weight, np.zeros_like(weight), weight.copy(), structure, 1, 1, 1)


@every_isa
@pytest.mark.parametrize("exponent", [-300, -160, 0, 160, 300])
def test_doubles_whose_squares_leave_the_range(exponent):
    rng = np.random.default_rng(8)
    small = whole_numbers(rng, (12, 5, 3), np.float64)
    scale = 2.0 ** int(exponent * np.log2(10))
    for structure in STRUCTURES:
        norms = _core.group_norms(small * scale, structure, 1, 1)
        np.testing.assert_allclose(norms, reference.group_norms(small, structure) * scale, rtol=1e-14)
        keep = len(norms) // 2
        expected = reference.project(small, structure, keep) * scale
        np.testing.assert_array_equal(project(small * scale, structure, keep), expected)


@every_isa
@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e-20, 1e-13, 1e13, 1e19, 1e30])
def test_residuals_of_floats_near_the_ends_of_their_range(factor):
    rng = np.random.default_rng(9)
    weight, z, u = ((whole_numbers(rng, (12, 5, 3), np.float64) * factor).astype(np.float32) for _ in range(3))
    for structure in STRUCTURES:
        keep = len(reference.group_squares(weight, structure)) // 2
        expected = reference.admm_update(weight, z, u, structure, keep)
        new_z, new_u, residuals = updated(weight, z, u, structure, keep)
        np.testing.assert_array_equal(new_z, expected.z)
        np.testing.assert_array_equal(new_u, expected.u)
        assert residuals == pytest.approx((expected.primal, expected.dual), rel=1e-6)


@every_isa
def test_update_of_several_layers_equals_one_at_a_time():
    rng = np.random.default_rng(10)
    cases = [
        ((8, 3, 3, 3), "filter", 5, 1),
        ((64, 40, 3, 3), "element", 999, 1),
        ((12, 6, 3, 3), "column", 50, 3),
        ((30, 70), "filter+column", (10, 33), 1),
        ((5, 2), "channel", 1, 1),
        ((300, 200, 3, 3), "element", 12345, 1),  # with these, several threads are worth it
        ((128, 513, 3, 3), "column", 2000, 2),
        ((200, 1500), "filter", 77, 1),
    ]
    for threads in (1, 2, 7):
        layers, expected = [], []
        for shape, structure, keep, groups in cases:
            weight, z, u = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
            expected.append(updated(weight, z, u, structure, keep, groups))
            layers.append((weight, z, u, structure, keep, groups))
        residuals = _core.admm_update_all(layers, threads, [])
        for layer, (z, u, residual), got in zip(layers, expected, residuals, strict=True):
            np.testing.assert_array_equal(layer[1], z)
            np.testing.assert_array_equal(layer[2], u)
            assert got == residual


@every_isa
def test_error_in_one_layer_leaves_all_untouched():
    rng = np.random.default_rng(11)
    layers = []
    for structure in ("filter", "column", "element"):
        weight, z, u = (rng.standard_normal((20, 30)).astype(np.float32) for _ in range(3))
        layers.append((weight, z, u, structure, 7, 1))
    layers[1][0][4, 5] = np.inf
    layers[2][2][0, 0] = np.nan
    before = [(z.copy(), u.copy()) for _, z, u, *_ in layers]
    with pytest.raises(ValueError, match=r"^weight of second has 1 value .* flat index 125, index \(4, 5\)$"):
        _core.admm_update_all(layers, 2, ["first", "second", "third"])
    for (_, z, u, *_), (old_z, old_u) in zip(layers, before, strict=True):
        np.testing.assert_array_equal(z, old_z)
        np.testing.assert_array_equal(u, old_u)


@every_isa
@pytest.mark.parametrize(
    "levels", [[-1, 1], [-1, 0, 1], [0], [2], [-3, -1, 0.5, 4], [-4, -2, -1, 1, 2, 4], range(-63, 64)]
)
def test_levels_equal_the_reference(levels):
    rng = np.random.default_rng(12)
    levels = np.array(levels, dtype=np.float64)
    for dtype in DTYPES:
        weight = rng.integers(-40, 41, (3, 67)).astype(dtype) / 8  # many fall between two levels exactly
        for scale in (0.25, 1.0, 3.0):
            values, codes = np.empty_like(weight), np.empty(weight.shape, np.int8)
            _core.project_levels(weight, levels, scale, values, codes, 2)
            expected = reference.nearest_levels(weight, levels, scale)
            np.testing.assert_array_equal(codes, expected)
            np.testing.assert_array_equal(values, (scale * levels[expected]).astype(dtype))


def test_exact_scale_against_all_assignments():
    """The global minimum: no assignment that any scale gives is better, and none is missed."""
    rng = np.random.default_rng(13)
    for levels in ([-1, 1], [-1, 0, 1], [-2, -1, 1, 2], [-1, 0.5, 3], [1, 2, 4], [-3, -1], [0, 1], [-1, 0]):
        levels = np.array(levels, dtype=np.float64)
        middle = (levels[1:] + levels[:-1]) / 2
        for _ in range(20):
            weight = rng.standard_normal((1, 9))
            weight[0, 3] = 0
            with np.errstate(divide="ignore", invalid="ignore"):
                edges = np.unique(np.abs(weight.ravel()[:, None] / middle[None, :]).ravel())
            edges = edges[np.isfinite(edges) & (edges > 0)]
            best = reference.energy(weight)
            for scale in np.concatenate([edges[:1] / 2, (edges[1:] + edges[:-1]) / 2, edges[-1:] * 2, [1.0]]):
                q = levels[reference.nearest_levels(weight, levels, scale)]
                optimum = max(0.0, float((weight * q).sum()) / max(float((q * q).sum()), 1e-300))
                best = min(best, reference.energy(weight - optimum * q))
            scale, exact = _core.best_scale(weight, levels)
            error = reference.levels_error(weight, levels, scale) if scale > 0 else reference.energy(weight)
            assert exact
            assert error == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_grid_is_used_and_at_least_as_good_as_the_papers_scan():
    rng = np.random.default_rng(14)
    weight = rng.standard_normal((1, 40_000)).astype(np.float32)
    levels = np.array([level for level in range(-1000, 1001) if level], dtype=np.float64)
    scale, exact = _core.best_scale(weight, levels)
    assert not exact
    best = reference.levels_error(weight, levels, scale)
    q0 = float(np.abs(weight).max()) / 1000
    papers = min(reference.levels_error(weight, levels, q0 * (0.9 + 0.02 * step)) for step in range(11))
    assert best <= papers * (1 + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"structure": "rows"},
            ValueError,
            "structure must be one of filter, channel, column, element, filter.column, got",
        ),
        ({"keep": 9}, ValueError, "keep must be between 0 and the 8 filters of the weight, got 9"),
        ({"keep": -1}, ValueError, "keep must be between 0 and the 8 filters of the weight, got -1"),
        ({"keep": 2.0}, TypeError, "keep must be an integer, got 2.0"),
        ({"keep": True}, TypeError, "keep must be an integer, got True"),
        ({"keep": (1, 2)}, TypeError, r"keep must be an integer, got \(1, 2\)"),
        ({"structure": "filter+column", "keep": 3}, TypeError, r"must be the pair \(filters, columns\), got 3"),
        ({"structure": "filter+column", "keep": (3, 13)}, ValueError, "columns must be between 0 and the 12 columns"),
        ({"groups": 3}, ValueError, "groups must be at least 1 and divide the 8 filters of the weight, got 3"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"weight": np.zeros(8)}, ValueError, r"at least 2 dimensions .*got shape \(8,\)"),
        ({"weight": np.zeros((0, 3))}, ValueError, r"must not be empty, got shape \(0, 3\)"),
        ({"weight": np.zeros((8, 3, 4), np.float16)}, TypeError, "weight must be float32 or float64, got float16"),
        ({"weight": np.zeros((8, 3, 4), ">f4")}, TypeError, "weight must be float32 or float64"),
        ({"weight": [[1.0]]}, TypeError, "weight must be a numpy array or a torch tensor, got list"),
        ({"weight": np.zeros((8, 4, 3)).transpose(0, 2, 1)}, ValueError, "weight must be C-contiguous"),
        ({"out": np.zeros((8, 3, 4), np.float32)}, TypeError, "out must have the dtype of the weight"),
        (
            {"out": np.zeros((8, 4, 3))},
            ValueError,
            r"out must have the shape of the weight, \(8, 3, 4\), got \(8, 4, 3\)",
        ),
        ({"out": np.zeros((8, 4, 3)).transpose(0, 2, 1)}, ValueError, "out must be C-contiguous"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, error, message):
    good = {
        "weight": np.ones((8, 3, 4)),
        "out": np.zeros((8, 3, 4)),
        "structure": "filter",
        "keep": 2,
        "groups": 1,
        "threads": 1,
    }
    with pytest.raises(error, match=message):
        _core.project(**{**good, **arguments})


def test_memory_that_must_not_be_written():
    memory = np.zeros(60)
    weight, overlapping = memory[:24].reshape(4, 6), memory[12:36].reshape(4, 6)
    with pytest.raises(ValueError, match=r"^(out and weight|weight and out) must not overlap"):
        _core.project(weight, overlapping, "filter", 1, 1, 1)
    read_only = np.zeros((4, 6))
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writable"):
        _core.project(np.ones((4, 6)), read_only, "filter", 1, 1, 1)
    with pytest.raises(ValueError, match="must not overlap in memory"):
        _core.admm_update(np.ones((4, 6)), weight, overlapping, "filter", 1, 1, 1)
    layers = [(np.ones((4, 6)), np.ones((4, 6)), u, "filter", 1, 1) for u in (weight, overlapping)]
    with pytest.raises(ValueError, match="u and u must not overlap in memory"):
        _core.admm_update_all(layers, 1, [])
    _core.project(weight, weight, "filter", 1, 1, 1)  # in place is allowed


@pytest.mark.parametrize("levels", [[1.0, 1.0], [2.0, 1.0], [0.0, np.nan], [np.inf], []])
def test_bad_levels(levels):
    with pytest.raises(ValueError, match="levels must"):
        _core.best_scale(np.ones((2, 2)), np.array(levels, dtype=np.float64))
