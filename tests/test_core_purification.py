"""The native purification scores against the formulas."""

import numpy as np
import pytest

from autocompress_fast import _core

every_isa = pytest.mark.usefixtures("isa")


@every_isa
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "groups"), [((6, 5, 3, 3), 1), ((8, 3, 5), 4), ((7, 19), 1), ((4, 2, 2, 2, 2), 2)])
def test_scores_equal_the_formulas(shape, groups, dtype):
    rng = np.random.default_rng(1)
    weight = rng.integers(-9, 10, shape).astype(dtype)
    weight[rng.random(shape) < 0.6] = 0
    view = weight.astype(np.float64).reshape(groups, shape[0] // groups, shape[1], -1)
    taps = view.shape[-1]
    column_squares = (view**2).sum(1).reshape(-1, taps)
    importance, emptiness, columns, filters = _core.purification_scores(weight, groups, 1)
    np.testing.assert_allclose(importance, column_squares.sum(1) / taps, rtol=1e-14)
    np.testing.assert_array_equal(emptiness, (column_squares != 0).sum(1) / taps)
    np.testing.assert_array_equal(columns, np.sqrt(column_squares).ravel())
    np.testing.assert_array_equal(filters, np.sqrt((view**2).sum((2, 3))).ravel())


@every_isa
def test_empty_channels_and_filters_score_zero():
    weight = np.ones((4, 3, 3, 3), dtype=np.float32)
    weight[:, 1] = 0
    weight[2] = 0
    weight[:, 2, 0, 0] = 0
    importance, emptiness, columns, filters = _core.purification_scores(weight, 1, 2)
    assert importance.tolist() == pytest.approx([3.0, 0.0, 3 * 8 / 9])
    assert emptiness.tolist() == [1.0, 0.0, 8 / 9]
    assert filters[2] == 0
    assert (columns.reshape(3, 9) == 0).sum(1).tolist() == [0, 9, 1]


@every_isa
def test_tiny_columns_are_not_empty():
    """1e-30 squared is far below the smallest float."""
    weight = np.zeros((2, 2), dtype=np.float32)
    weight[1, 0] = 1e-30
    _, emptiness, columns, _ = _core.purification_scores(weight, 1, 1)
    assert emptiness.tolist() == [1.0, 0.0]
    assert columns[0] == pytest.approx(1e-30)


@every_isa
def test_not_finite_is_an_error():
    weight = np.ones((2, 3))
    weight[1, 1] = np.nan
    with pytest.raises(
        ValueError, match=r"weight has 1 value that is NaN or infinite, the first at flat index 4, index"
    ):
        _core.purification_scores(weight, 1, 1)
