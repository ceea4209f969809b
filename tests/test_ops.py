"""The public operations: what a projection promises, numpy and torch alike, and errors."""

import itertools

import numpy as np
import pytest
import torch

from autocompress_fast import _reference as reference
from autocompress_fast import _torch_ops, ops

STRUCTURES = ("filter", "channel", "column", "element")
SHAPES = [((6, 4), 1), ((5, 3, 3), 1), ((8, 3, 3, 3), 2), ((4, 2, 2, 2, 2), 4)]


def cases(seed):
    """(rng, weight, structure, groups of the convolution, number of structure groups)"""
    rng = np.random.default_rng(seed)
    for (shape, groups), structure in itertools.product(SHAPES, STRUCTURES):
        weight = rng.standard_normal(shape)
        yield rng, weight, structure, groups, len(reference.group_squares(weight, structure, groups))


def kept_groups(weight, structure, groups):
    return int((reference.group_squares(weight, structure, groups) > 0).sum())


# ---- what a projection is


def test_projection_lies_in_the_set_and_nothing_feasible_is_nearer():
    """Against every choice of groups, for weights small enough to try them all."""
    rng = np.random.default_rng(1)
    for structure in STRUCTURES:
        for _ in range(20):
            weight = rng.standard_normal((3, 2, 2))
            squares = reference.group_squares(weight, structure)
            index = reference.group_index(weight.shape, structure)
            keep = int(rng.integers(0, len(squares) + 1))
            result = ops.project(weight, structure, keep=keep)
            assert kept_groups(result, structure, 1) == keep
            distance = reference.energy(weight - result)
            for choice in itertools.combinations(range(len(squares)), keep):
                other = np.where(np.isin(index, choice), weight, 0)
                assert distance <= reference.energy(weight - other) * (1 + 1e-12)


def test_projection_is_idempotent():
    for _, weight, structure, groups, count in cases(2):
        once = ops.project(weight, structure, keep=count // 2, groups=groups)
        twice = ops.project(once, structure, keep=count // 2, groups=groups)
        np.testing.assert_array_equal(once, twice)


def test_projection_of_scaled_weights_is_the_scaled_projection():
    for _, weight, structure, groups, count in cases(3):
        result = ops.project(weight, structure, keep=count // 2, groups=groups)
        for factor in (2.0**-40, 0.5, 2.0**70):  # powers of two, so that nothing is rounded
            scaled = ops.project(weight * factor, structure, keep=count // 2, groups=groups)
            np.testing.assert_array_equal(scaled, result * factor)


def test_projection_follows_permutations():
    rng = np.random.default_rng(4)
    for structure in STRUCTURES:
        weight = rng.standard_normal((7, 5, 3))
        keep = len(reference.group_squares(weight, structure)) // 2
        rows, channels = rng.permutation(7), rng.permutation(5)
        expected = ops.project(weight, structure, keep=keep)[rows][:, channels]
        np.testing.assert_array_equal(ops.project(weight[rows][:, channels], structure, keep=keep), expected)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_ties_go_to_the_lowest_index(value):
    weight = np.full((6, 4, 3), value, dtype=np.float32)
    for structure in STRUCTURES:
        index = reference.group_index(weight.shape, structure)
        count = int(index.max()) + 1
        for keep in range(count + 1):
            result = ops.project(weight, structure, keep=keep)
            np.testing.assert_array_equal(result, np.where(index < keep, weight, 0))


def test_a_column_of_a_block_belongs_to_that_block():
    """Grouped convolution: the same column number of two blocks is two columns."""
    weight = np.ones((4, 3))
    weight[2:, 1] = 5
    result = ops.project(weight, "column", keep=1, groups=2)
    assert np.argwhere(result).tolist() == [[2, 1], [3, 1]]


# ---- filters and columns at once


def optimum(weight, filters, columns):
    squares = weight**2
    rows = np.array([np.isin(range(len(weight)), r) for r in itertools.combinations(range(len(weight)), filters)])
    return float(np.sort(rows @ squares, axis=1)[:, -columns:].sum(1).max())


def test_joint_projection_is_as_good_as_documented():
    """The figures in the docstring of project_filters_and_columns."""
    rng = np.random.default_rng(1)
    optimal = sequential_optimal = 0
    shares = []
    for _ in range(400):
        weight = rng.standard_normal((5, 6))
        best = optimum(weight, 3, 3)
        energy = reference.energy(ops.project_filters_and_columns(weight, filters=3, columns=3))
        sequential = reference.energy(reference.sequential(weight, 3, 3))
        assert sequential * (1 - 1e-12) <= energy <= best * (1 + 1e-12)
        optimal += energy > best * (1 - 1e-12)
        sequential_optimal += sequential > best * (1 - 1e-12)
        shares.append(energy / best)
    assert (optimal, sequential_optimal) == (360, 252)
    assert np.mean(shares) == pytest.approx(0.997, abs=5e-4)


def test_joint_projection_keeps_exact_counts_and_is_a_local_optimum():
    rng = np.random.default_rng(5)
    for shape, groups in [((9, 4, 3), 1), ((8, 3, 3, 3), 2), ((6, 5), 3)]:
        weight = rng.standard_normal(shape)
        columns = len(reference.group_squares(weight, "column", groups)) // 2
        result = ops.project_filters_and_columns(weight, filters=4, columns=columns, groups=groups)
        mask = result != 0
        np.testing.assert_array_equal(result, np.where(mask, weight, 0))
        live_rows = reference.group_squares(result, "filter") > 0
        live_columns = reference.group_squares(result, "column", groups) > 0
        assert live_rows.sum() <= 4
        assert live_columns.sum() <= columns
        only_columns = np.where(live_columns[reference.group_index(shape, "column", groups)], weight, 0)
        better_rows = reference.project(only_columns, "filter", 4)
        assert reference.energy(better_rows) == pytest.approx(reference.energy(result))
        again = ops.project_filters_and_columns(result, filters=4, columns=columns, groups=groups)
        np.testing.assert_array_equal(again, result)


def test_joint_projection_at_the_limits():
    weight = np.random.default_rng(6).standard_normal((5, 7))
    everything = ops.project_filters_and_columns(weight, filters=5, columns=7)
    np.testing.assert_array_equal(everything, weight)
    for filters, columns in [(0, 7), (5, 0), (0, 0)]:
        assert not ops.project_filters_and_columns(weight, filters=filters, columns=columns).any()
    rows = ops.project_filters_and_columns(weight, filters=2, columns=7)
    np.testing.assert_array_equal(rows, reference.project(weight, "filter", 2))
    columns = ops.project_filters_and_columns(weight, filters=5, columns=3)
    np.testing.assert_array_equal(columns, reference.project(weight, "column", 3))


# ---- the ADMM update is what its parts say


def test_update_is_the_composition_of_its_parts():
    for rng, weight, structure, groups, count in cases(7):
        z, u = rng.standard_normal(weight.shape), rng.standard_normal(weight.shape)
        v = weight + u
        expected = ops.project(v, structure, keep=count // 2, groups=groups)
        new_z, new_u = z.copy(), u.copy()
        residuals = ops.admm_update(weight, new_z, new_u, structure, keep=count // 2, groups=groups)
        np.testing.assert_array_equal(new_z, expected)
        np.testing.assert_array_equal(new_u, v - expected)
        assert residuals.primal == pytest.approx(np.linalg.norm(weight - expected))
        assert residuals.dual == pytest.approx(np.linalg.norm(expected - z))


def test_joint_update_is_the_composition_of_its_parts():
    rng = np.random.default_rng(8)
    for shape, groups in SHAPES:
        weight, z, u = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
        keep = (shape[0] // 2, groups * weight[0].size // 2)
        v = weight + u
        expected = ops.project_filters_and_columns(v, filters=keep[0], columns=keep[1], groups=groups)
        residuals = ops.admm_update(weight, z, u, "filter+column", keep=keep, groups=groups)
        np.testing.assert_array_equal(z, expected)
        np.testing.assert_array_equal(u, v - expected)
        assert residuals.primal == pytest.approx(np.linalg.norm(weight - expected), rel=1e-5)


def test_update_comes_to_rest_at_the_projection():
    """min ||W - A||^2 / 2 over the set: from W = A the iteration ends with Z = P(A) and both residuals at zero."""
    rng = np.random.default_rng(9)
    anchor = rng.standard_normal((12, 20))
    weight, rho = anchor.copy(), 1.0
    z, u = ops.project(weight, "filter", keep=5), np.zeros_like(weight)
    for _ in range(200):
        weight = (anchor + rho * (z - u)) / (1 + rho)  # the exact minimum of the first subproblem
        residuals = ops.admm_update(weight, z, u, "filter", keep=5)
    np.testing.assert_allclose(z, reference.project(anchor, "filter", 5), atol=1e-9)
    assert max(residuals) < 1e-9


# ---- levels


def test_given_scale_takes_the_nearest_level():
    weight = np.array([[-3.0, -1.5, -0.5, 0.0, 0.5, 0.6, 9.0]])
    values, codes, scale = ops.project_levels(weight, levels=[-1, 0, 1], scale=1.0)
    assert values.tolist() == [[-1, -1, -1, 0, 0, 1, 1]]  # halfway: the lower level
    assert codes.dtype == np.int8
    assert scale == 1.0


def test_binary_scale_is_the_mean_size():
    weight = np.random.default_rng(10).standard_normal((4, 33))
    values, codes, scale = ops.project_levels(weight, levels=[-1, 1])
    assert scale == pytest.approx(np.abs(weight).mean(), rel=1e-14)
    np.testing.assert_array_equal(codes, weight > 0)
    np.testing.assert_array_equal(values, np.where(weight > 0, scale, -scale))


@pytest.mark.parametrize(
    "levels", [[-1, 0, 1], [-4, -2, -1, 1, 2, 4], [-3, -2, -1, 0, 1, 2, 3], [-8, -4, -2, -1, 0, 1, 2, 4, 8], [0, 1, 5]]
)
def test_found_scale_beats_a_fine_grid(levels):
    rng = np.random.default_rng(11)
    levels = np.array(levels, dtype=np.float64)
    for weight in (rng.standard_normal((3, 50)), rng.laplace(size=(3, 50)), rng.integers(-3, 4, (3, 50)) * 0.5):
        values, codes, scale = ops.project_levels(weight, levels=levels)
        error = reference.energy(weight - values)
        grid = np.linspace(1e-3, 1.2 * np.abs(weight).max() / np.abs(levels).max() * len(levels), 2000)
        assert error <= min(reference.levels_error(weight, levels, s) for s in grid) * (1 + 1e-12)
        np.testing.assert_array_equal(values, scale * levels[codes])


def test_no_scale_helps_where_all_levels_have_the_wrong_sign():
    values, codes, scale = ops.project_levels(np.array([[-1.0, -2.0]]), levels=[1, 2])
    assert scale == 0
    assert not values.any()
    assert codes.tolist() == [[0, 0]]
    values, _, scale = ops.project_levels(np.zeros((2, 2), np.float32), levels=[-1, 0, 1])
    assert (scale, values.any()) == (0, False)


def test_many_levels_have_wide_codes():
    levels = np.arange(-100.0, 101.0)
    values, codes, _ = ops.project_levels(np.array([[-100.0, 99.0]]), levels=levels, scale=1.0)
    assert codes.dtype == np.int16
    assert codes.tolist() == [[0, 199]]
    assert values.tolist() == [[-100, 99]]


# ---- numpy and torch


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torch_and_numpy_agree(dtype):
    for rng, array, structure, groups, count in cases(12):
        weight = array.astype(dtype)
        tensor = torch.from_numpy(weight.copy()).requires_grad_()
        keep = count // 2
        result = ops.project(tensor, structure, keep=keep, groups=groups)
        assert isinstance(result, torch.Tensor)
        assert not result.requires_grad
        np.testing.assert_array_equal(result.numpy(), ops.project(weight, structure, keep=keep, groups=groups))
        norms = ops.group_norms(tensor, structure, groups=groups)
        np.testing.assert_array_equal(norms.numpy(), ops.group_norms(weight, structure, groups=groups))
        z, u = (rng.standard_normal(weight.shape).astype(dtype) for _ in range(2))
        z_tensor, u_tensor = torch.from_numpy(z.copy()), torch.from_numpy(u.copy())
        from_torch = ops.admm_update(tensor, z_tensor, u_tensor, structure, keep=keep, groups=groups)
        assert from_torch == ops.admm_update(weight, z, u, structure, keep=keep, groups=groups)
        np.testing.assert_array_equal(z_tensor.numpy(), z)
        np.testing.assert_array_equal(u_tensor.numpy(), u)
    scores, expected = ops.purification_scores(tensor, groups=4), ops.purification_scores(weight, groups=4)
    for name in ("importance", "emptiness", "column_norms", "filter_norms"):
        np.testing.assert_array_equal(getattr(scores, name).numpy(), getattr(expected, name))
    values, codes, scale = ops.project_levels(tensor, levels=[-1, 0, 1])
    expected_values, expected_codes, expected_scale = ops.project_levels(weight, levels=[-1, 0, 1])
    assert scale == expected_scale
    assert codes.dtype == torch.int8
    np.testing.assert_array_equal(values.numpy(), expected_values)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)


def test_contiguous_memory_is_used_in_place():
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    out = torch.empty(4, 3)
    address = out.data_ptr()
    assert ops.project(weight, "filter", keep=2, out=out) is out
    assert out.data_ptr() == address
    assert out.count_nonzero() == 6
    assert ops.project(weight, "filter", keep=1, out=weight) is weight
    assert weight.count_nonzero() == 3


def test_weights_that_are_not_contiguous_are_copied():
    rng = np.random.default_rng(13)
    weight = rng.standard_normal((6, 5, 3, 3)).astype(np.float32)
    expected = ops.project(weight, "column", keep=11)
    strided = np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not strided.flags.c_contiguous
    np.testing.assert_array_equal(ops.project(strided, "column", keep=11), expected)
    channels_last = torch.from_numpy(weight).to(memory_format=torch.channels_last)
    assert not channels_last.is_contiguous()
    result = ops.project(channels_last, "column", keep=11)
    assert result.is_contiguous()
    np.testing.assert_array_equal(result.numpy(), expected)
    u, z = np.zeros_like(weight), np.zeros_like(weight)
    ops.admm_update(channels_last, torch.from_numpy(z), torch.from_numpy(u), "column", keep=11)
    np.testing.assert_array_equal(z, expected)
    with pytest.raises(ValueError, match="z must be C-contiguous"):
        ops.admm_update(torch.from_numpy(weight), channels_last, torch.from_numpy(u), "column", keep=11)


def test_update_all_equals_single_updates():
    rng = np.random.default_rng(14)
    layers, expected = [], []
    for shape, structure, keep in [
        ((8, 3, 3, 3), "filter", 3),
        ((16, 8), "element", 40),
        ((4, 6), "filter+column", (2, 3)),
    ]:
        weight, z, u = (torch.from_numpy(rng.standard_normal(shape)) for _ in range(3))
        z_alone, u_alone = z.clone(), u.clone()
        expected.append((z_alone, u_alone, ops.admm_update(weight, z_alone, u_alone, structure, keep=keep)))
        layers.append((weight, z, u, structure, keep, 1))
    residuals = ops.admm_update_all(layers, threads=2)
    for (_, z, u, *_), residual, (z_alone, u_alone, alone) in zip(layers, residuals, expected, strict=True):
        assert torch.equal(z, z_alone)
        assert torch.equal(u, u_alone)
        assert residual == alone
    assert ops.admm_update_all([]) == []


# ---- the torch path of other devices, run on the CPU


def test_device_path_gives_the_same_projection_and_update():
    rng = np.random.default_rng(15)
    for shape, groups in SHAPES:
        for structure in (*STRUCTURES, "filter+column"):
            # Whole numbers: the sums are exact in any order, and there are ties.
            weight, z, u = (torch.from_numpy(rng.integers(-9, 10, shape).astype(np.float32)) for _ in range(3))
            if structure == "filter+column":
                keep = (shape[0] // 2, groups * weight[0].numel() // 2)
            else:
                keep = len(reference.group_squares(weight.numpy(), structure, groups)) // 2
                norms = _torch_ops.group_norms(weight, structure, groups)
                torch.testing.assert_close(
                    norms, ops.group_norms(weight, structure, groups=groups), rtol=1e-15, atol=0
                )  # torch does not promise a correctly rounded root
                result = _torch_ops.project(weight, structure, keep, groups, None)
                assert torch.equal(result, ops.project(weight, structure, keep=keep, groups=groups))
                out = torch.empty_like(weight)
                assert _torch_ops.project(weight, structure, keep, groups, out) is out
                assert torch.equal(out, result)
            z_device, u_device = z.clone(), u.clone()
            (primal, dual), *_ = _torch_ops.admm_update_all([(weight, z_device, u_device, structure, keep, groups)], [])
            residuals = ops.admm_update(weight, z, u, structure, keep=keep, groups=groups)
            assert torch.equal(z_device, z)
            assert torch.equal(u_device, u)
            assert (primal, dual) == pytest.approx(residuals, rel=1e-6)
        scores = ops.purification_scores(weight, groups=groups)
        on_device = _torch_ops.purification_scores_all([(weight, groups)], [])[0]
        names = ("importance", "emptiness", "column_norms", "filter_norms")
        for name, result in zip(names, on_device, strict=True):
            torch.testing.assert_close(result, getattr(scores, name), rtol=1e-14, atol=0)


def test_device_path_refuses_what_the_kernels_refuse():
    weight = torch.ones(4, 3)
    bad = weight.clone()
    bad[2, 1] = float("nan")
    z, u = torch.zeros(4, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"weight of a has 1 value that is NaN or infinite, the first at flat index 7"):
        _torch_ops.admm_update_all([(bad, z, u, "filter", 2, 1)], ["a"])
    assert not z.any()
    for keep, error in ((5, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="keep must be"):
            _torch_ops.project(weight, "filter", keep, 1, None)
    with pytest.raises(ValueError, match="structure must be one of"):
        _torch_ops.group_norms(weight, "row", 1)
    with pytest.raises(ValueError, match="divide the 4 filters"):
        _torch_ops.project(weight, "filter", 1, 3, None)
    with pytest.raises(TypeError, match="weight must be float32 or float64"):
        _torch_ops.project(weight.half(), "filter", 1, 1, None)
    with pytest.raises(TypeError, match="out must have the dtype"):
        _torch_ops.project(weight, "filter", 1, 1, torch.zeros(4, 3, dtype=torch.float64))


def test_a_tensor_elsewhere_takes_the_device_path(monkeypatch):
    """A tensor of the meta device has no memory: what arrives at the torch path is what matters."""
    seen = []
    monkeypatch.setattr(_torch_ops, "project", lambda weight, *rest: seen.append((weight.device.type, *rest)) or weight)
    ops.project(torch.empty(4, 3, device="meta"), "filter", keep=2)
    assert seen == [("meta", "filter", 2, 1, None)]


# ---- errors


def test_torch_errors():
    weight = torch.ones(4, 3)
    with pytest.raises(TypeError, match=r"weight must be float32 or float64, got torch.bfloat16"):
        ops.project(weight.bfloat16(), "filter", keep=1)
    with pytest.raises(TypeError, match="z must have the dtype of the weight"):
        ops.admm_update(weight, torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3), "filter", keep=1)
    with pytest.raises(ValueError, match="u must have the shape of the weight"):
        ops.admm_update(weight, torch.zeros(4, 3), torch.zeros(3, 4), "filter", keep=1)
    with pytest.raises(ValueError, match="z is written and must not require a gradient"):
        ops.admm_update(weight, torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3), "filter", keep=1)
    with pytest.raises(TypeError, match="weight must be a numpy array or a torch tensor, got list"):
        ops.project([[1.0]], "filter", keep=1)
    with pytest.raises(TypeError, match="weight must be a numpy array or a torch tensor, got list"):
        ops.group_norms([[1.0]], "filter")


def test_nan_leaves_z_and_u_untouched():
    weight = torch.ones(4, 3)
    weight[1, 1] = float("inf")
    z, u = torch.full((4, 3), 2.0), torch.full((4, 3), 3.0)
    for structure in STRUCTURES:
        with pytest.raises(ValueError, match=r"weight has 1 value .* flat index 4, index \(1, 1\)"):
            ops.admm_update(weight, z, u, structure, keep=2)
    assert z.eq(2).all()
    assert u.eq(3).all()


def test_ops_need_no_torch(run_python):
    result = run_python(
        "import sys, numpy as np\n"
        "from autocompress_fast import ops\n"
        "w = np.ones((4, 3), np.float32); z = w * 0; u = w * 0\n"
        "ops.project(w, 'filter', keep=2); ops.admm_update(w, z, u, 'column', keep=1); ops.group_norms(w, 'element')\n"
        "ops.project_levels(w, levels=[-1, 1]); ops.purification_scores(w)\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert result.returncode == 0, result.stderr
