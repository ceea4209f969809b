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
    importance, emptiness, columns, filters = _core.purification_scores([(weight, groups)], 1, [])[0]
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
    importance, emptiness, columns, filters = _core.purification_scores([(weight, 1)], 2, [])[0]
    assert importance.tolist() == pytest.approx([3.0, 0.0, 3 * 8 / 9])
    assert emptiness.tolist() == [1.0, 0.0, 8 / 9]
    assert filters[2] == 0
    assert (columns.reshape(3, 9) == 0).sum(1).tolist() == [0, 9, 1]


@every_isa
def test_tiny_columns_are_not_empty():
    """1e-30 squared is far below the smallest float."""
    weight = np.zeros((2, 2), dtype=np.float32)
    weight[1, 0] = 1e-30
    _, emptiness, columns, _ = _core.purification_scores([(weight, 1)], 1, [])[0]
    assert emptiness.tolist() == [1.0, 0.0]
    assert columns[0] == pytest.approx(1e-30)


@every_isa
def test_not_finite_is_an_error():
    weight = np.ones((2, 3))
    weight[1, 1] = np.nan
    with pytest.raises(
        ValueError, match=r"weight has 1 value that is NaN or infinite, the first at flat index 4, index"
    ):
        _core.purification_scores([(weight, 1)], 1, [])


@every_isa
def test_a_network_scores_as_its_layers_do_one_by_one():
    """Layers that are cut into pieces in every way: many in one, one in many, and many blocks of a grouped one."""
    rng = np.random.default_rng(2)
    shapes = [((64, 3, 3, 3), 1), ((700, 500), 1), ((512, 1, 3, 3), 512), ((600, 300, 3, 3), 2), ((1, 70000), 1)]
    layers = [(rng.standard_normal(shape).astype(np.float32), groups) for shape, groups in shapes]
    alone = [_core.purification_scores([layer], 1, [])[0] for layer in layers]
    for threads in (1, 2, 3):
        for found, expected in zip(_core.purification_scores(layers, threads, []), alone, strict=True):
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)
    for (weight, groups), (_, _, columns, filters) in zip(layers, alone, strict=True):
        view = weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, -1)
        np.testing.assert_allclose(columns, np.sqrt((view**2).sum(1)).ravel(), rtol=1e-13)
        np.testing.assert_allclose(filters, np.sqrt((view**2).sum(2)).ravel(), rtol=1e-13)


@every_isa
@pytest.mark.parametrize("magnitude", [1e-170, 1e170])
def test_doubles_whose_squares_leave_the_range(magnitude):
    weight = np.array([[3.0, 0.0], [4.0, 2.0]]) * magnitude
    _, emptiness, columns, filters = _core.purification_scores([(weight, 1)], 1, [])[0]
    np.testing.assert_allclose(columns, [5 * magnitude, 2 * magnitude], rtol=1e-15)
    np.testing.assert_allclose(filters, [3 * magnitude, np.sqrt(20) * magnitude], rtol=1e-15)
    assert emptiness.tolist() == [1.0, 1.0]


def test_not_finite_names_the_layer():
    layers = [(np.ones((2, 3)), 1), (np.full((2, 2), np.inf), 1)]
    with pytest.raises(ValueError, match=r"weight of second has 4 values that are NaN or infinite"):
        _core.purification_scores(layers, 1, ["first", "second"])


def kept_by_the_definition(scores, limits, tied):
    """Slow and obviously right."""
    joint = {}
    for (_, _, filters), numbers in zip(scores, tied, strict=True):
        for norm, number in zip(filters, numbers, strict=True):
            joint[number] = joint.get(number, 0) + norm**2
    wanted = {
        number
        for numbers, (*_, limit) in zip(tied, limits, strict=True)
        for number in numbers
        if joint[number] > 0 and joint[number] ** 0.5 >= limit
    }
    kept = []
    for (importance, columns, _), numbers, (column, sigma, eta, _) in zip(scores, tied, limits, strict=True):
        by_channel = columns.reshape(len(importance), -1)
        stay = (by_channel > 0) & (by_channel >= column)
        stay[(importance < sigma) & (stay.mean(1) < eta)] = False
        kept.append((stay.ravel(), np.array([number < 0 or number in wanted for number in numbers])))
    return kept


def test_what_is_kept_follows_the_definition():
    rng = np.random.default_rng(3)
    for _ in range(200):
        scores, limits, tied = [], [], []
        for _ in range(rng.integers(1, 5)):
            rows, channels, taps = rng.integers(1, 6, 3)
            weight = rng.integers(-2, 3, (rows, channels, taps)).astype(float)
            importance, _, columns, filters = _core.purification_scores([(weight, 1)], 1, [])[0]
            scores.append((importance, columns, filters))
            limits.append((*rng.integers(0, 4, 2), rng.random() * 1.5, rng.integers(0, 6)))
            tied.append(rng.integers(-1, 4, rows))
        layers = [(*score, numbers, limit) for score, numbers, limit in zip(scores, tied, limits, strict=True)]
        expected = kept_by_the_definition(scores, limits, tied)
        for found, wanted in zip(_core.purification_keep(layers, 4), expected, strict=True):
            np.testing.assert_array_equal(found[0], wanted[0])
            np.testing.assert_array_equal(found[1], wanted[1])


def test_bad_limits_and_ties_are_errors():
    one = (np.ones(2), np.ones(4), np.ones(3))
    for tied, limits, message in [
        (np.zeros(3, int), (1.0, 1.0, 1.0, -1.0), "a limit must be 0 or more, got -1"),
        (np.zeros(3, int), (1.0, 1.0, np.nan, 1.0), "a limit must be 0 or more, got nan"),
        (np.zeros(3, int), (1.0, 1.0, 1.0), "limits must be four numbers, got 3"),
        (np.zeros(2, int), (1.0,) * 4, "one number for each of the 3 filters, got 2"),
        (np.array([0, 1, 2]), (1.0,) * 4, "tied must be from -1 to 1, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            _core.purification_keep([(*one, tied, limits)], 2)
    with pytest.raises(ValueError, match="multiple of the channels, got 4 columns and 3 channels"):
        _core.purification_keep([(np.ones(3), np.ones(4), np.ones(3), np.zeros(3, int), (1.0,) * 4)], 1)
