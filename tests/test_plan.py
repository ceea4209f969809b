"""Plans, their files and masks, and training under masks."""

import base64
import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from autocompress_fast.graph import inspect
from autocompress_fast.plan import LayerPlan, MaskedParameters, Plan, check_fits, mask

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )


EXAMPLE = torch.zeros(1, 3, 8, 8)


def random_plan(rng: np.random.Generator, *, elements: bool = False) -> LayerPlan:
    groups = int(rng.choice([1, 1, 2, 3]))
    kernel = tuple(rng.integers(1, 4, rng.integers(0, 4)))
    shape = (groups * int(rng.integers(1, 5)), int(rng.integers(1, 5)), *map(int, kernel))
    columns = groups * math.prod(shape[1:])
    chosen = rng.random(shape) < 0.5 if elements else None
    return LayerPlan(shape, rng.random(shape[0]) < 0.7, rng.random(columns) < 0.7, chosen, groups)


def brute_force_mask(plan: LayerPlan) -> np.ndarray:
    result = np.zeros(plan.shape, bool).reshape(plan.shape[0], -1)
    width, per_group = result.shape[1], plan.shape[0] // plan.groups
    for p in range(plan.shape[0]):
        for k in range(width):
            element = plan.elements is None or plan.elements.reshape(result.shape)[p, k]
            result[p, k] = plan.filters[p] and plan.columns[p // per_group * width + k] and element
    return result.reshape(plan.shape)


# Layers


def test_a_weight_is_kept_where_its_filter_its_column_and_its_element_are():
    for seed in range(60):
        plan = random_plan(np.random.default_rng(seed), elements=seed % 2 == 1)
        expected = brute_force_mask(plan)
        np.testing.assert_array_equal(plan.mask(), expected)
        assert plan.weights == expected.sum()
        assert plan.dense_weights == expected.size


def test_mask_to_plan_and_back():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        kept = random_plan(rng, elements=seed % 2 == 1).mask()
        groups = 1 if kept.shape[0] % 2 else 2
        plan = LayerPlan.from_mask(kept, groups)
        np.testing.assert_array_equal(plan.mask(), kept)
        blocks = kept.reshape(groups, kept.shape[0] // groups, -1)
        np.testing.assert_array_equal(plan.filters, blocks.any(axis=2).ravel())
        np.testing.assert_array_equal(plan.columns, blocks.any(axis=1).ravel())


def test_elements_are_named_only_where_filters_and_columns_do_not_say_it_all():
    assert LayerPlan.from_mask(np.outer([1, 0, 1], [1, 1, 0])).elements is None
    assert LayerPlan.from_mask(np.eye(2)).elements is not None


def test_plans_do_not_change_under_their_owners_hands():
    filters = np.ones(2, bool)
    plan = LayerPlan((2, 3), filters, np.ones(3, bool))
    filters[0] = False
    assert plan.filters.all()
    with pytest.raises(ValueError, match="read-only"):
        plan.filters[0] = False


def test_equal_plans_keep_the_same_weights():
    a = LayerPlan((2, 2), [True, False], [True, True])
    b = LayerPlan((2, 2), [True, True], [True, True], [[True, True], [False, False]])
    assert a == b
    assert a != LayerPlan.dense((2, 2))
    assert a != "a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4,), [True] * 4, [True]), "at least 2 dimensions"),
        (((0, 3), [], [True] * 3), "at least 2 dimensions of size 1"),
        (((4, 3), [True] * 3, [True] * 3), r"filters of a weight \(4, 3\) must have shape \(4,\), got \(3,\)"),
        (((4, 3), [True] * 4, [True] * 4), r"columns .* must have shape \(3,\)"),
        (((4, 3), [True] * 4, [True] * 3, np.ones((3, 4))), r"elements .* must have shape \(4, 3\)"),
        (((4, 3), [True] * 4, [True] * 3, None, 3), "groups must divide the 4 filters, got 3"),
        (((4, 3), [True] * 4, [True] * 3, None, 2), r"columns .* must have shape \(6,\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LayerPlan(*arguments)


def test_masks_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        LayerPlan.from_mask(np.ones(3))
    with pytest.raises(ValueError, match="2 groups"):
        Plan.from_masks({"a": np.ones((3, 4))}, groups={"a": 2})


# Plans


def test_a_plan_is_a_mapping_of_layers():
    plan = Plan.from_masks({"a": torch.eye(3), "b": np.ones((2, 2, 1))})
    assert list(plan) == ["a", "b"]
    assert len(plan) == 2
    assert (plan.weights, plan.dense_weights) == (7, 13)
    assert "b: LayerPlan((2, 2, 1)" in repr(plan)
    assert "irregular" in repr(plan)
    assert plan == Plan.from_masks(plan.masks())
    with pytest.raises(TypeError, match="'a': ndarray"):
        Plan({"a": np.eye(2)})


def test_masks_that_need_gradients_are_read():
    weight = torch.eye(2, requires_grad=True)
    assert Plan.from_masks({"a": weight})["a"].weights == 2


def test_a_dense_plan_keeps_everything_and_ties_the_normalisations():
    report = inspect(network(), EXAMPLE)
    plan = Plan.dense(report)
    assert plan.weights == report.params
    assert plan["0"].norms == ("1",)
    assert plan["3"].norms == ()


@pytest.mark.parametrize(("filters", "columns"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.4), (0.3, 0.6), (0.99, 0.99)])
def test_uniform_removes_the_shares_asked_for_and_the_smallest_norms(filters, columns):
    model = network()
    report = inspect(model, EXAMPLE)
    plan = Plan.uniform(report, filters=filters, columns=columns)
    for layer in report.layers:
        rows = max(1, round(layer.shape[0] * (1 - filters))) if layer.filters_prunable else layer.shape[0]
        assert plan[layer.name].filters.sum() == rows
        assert plan[layer.name].columns.sum() == max(1, round(layer.columns * (1 - columns)))
    if columns == 0:  # then it is the filters with the largest norms
        norms = model[0].weight.detach().flatten(1).norm(dim=1)
        kept = torch.tensor(plan["0"].filters)
        assert kept.all() or norms[kept].min() >= norms[~kept].max()


def test_uniform_keeps_its_counts_where_weights_are_zero():
    model = network()
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[0].weight[1:])
    plan = Plan.uniform(inspect(model, EXAMPLE), filters=0.5, columns=0.5)
    assert plan["0"].filters.sum() == 3
    assert plan["0"].filters[0]
    assert (plan["3"].filters.sum(), plan["3"].columns.sum()) == (2, 27)


def test_uniform_leaves_grouped_layers_whole():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4 * 16, 3))
    report = inspect(model, torch.zeros(1, 4, 6, 6))
    plan = Plan.uniform(report, filters=0.5, columns=0.5)
    assert plan["0"].groups == 2
    assert plan["0"].mask().all()


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_shares_out_of_range_are_refused(share):
    report = inspect(network(), EXAMPLE)
    with pytest.raises(ValueError, match="columns is the share removed"):
        Plan.uniform(report, columns=share)


# Files


def test_saved_plans_load_as_they_were(tmp_path):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        layers = {f"layer.{i}": random_plan(rng, elements=i == 1) for i in range(3)}
        plan = Plan(layers)
        plan.save(tmp_path / "plan.json")
        loaded = Plan.load(tmp_path / "plan.json")
        assert loaded == plan
        for name, layer in plan.items():
            np.testing.assert_array_equal(loaded[name].filters, layer.filters)
            np.testing.assert_array_equal(loaded[name].columns, layer.columns)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_ties_survive_the_file(tmp_path):
    plan = Plan.uniform(inspect(network(), EXAMPLE), filters=0.5)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json")["0"].norms == ("1",)


def good_file() -> dict:
    layer = {"shape": [2, 3], "groups": 1, "filters": [0], "columns": [0, 2], "norms": []}
    return {"autocompress_fast.plan": 1, "layers": {"a": layer}}


def changed(**fields: object) -> str:
    content = good_file()
    content["layers"]["a"].update(fields)
    return json.dumps(content)


HOSTILE = {
    "empty": "",
    "no JSON": "{",
    "no UTF-8": b"\xff\xfe\x00",
    "no object": "[]",
    "a number": "3",
    "nothing": "null",
    "another file": '{"layers": {}}',
    "another version": '{"autocompress_fast.plan": 2, "layers": {}}',
    "no layers": '{"autocompress_fast.plan": 1}',
    "a list of layers": '{"autocompress_fast.plan": 1, "layers": []}',
    "a layer that is a list": '{"autocompress_fast.plan": 1, "layers": {"a": []}}',
    "an empty layer": '{"autocompress_fast.plan": 1, "layers": {"a": {}}}',
    "deep nesting": "[" * 200_000,
    "a shape of one": changed(shape=[2]),
    "a shape of zero": changed(shape=[2, 0]),
    "a negative shape": changed(shape=[2, -3]),
    "a shape of floats": changed(shape=[2.0, 3]),
    "a shape of truth": changed(shape=[True, 3]),
    "a shape of text": changed(shape="23"),
    "a nested shape": changed(shape=[[2], [3]]),
    "a long shape": changed(shape=[1] * 100_000),
    "2**34 weights": changed(shape=[2, 2**33]),
    "2**200 weights": changed(shape=[2, 2**66, 2**66, 2**66]),
    "2**34 filters": changed(shape=[2**34, 3]),
    "2**34 columns by groups": changed(shape=[2**17, 2**17], groups=2**17),
    "no groups": changed(groups=None),
    "groups of zero": changed(groups=0),
    "groups that do not divide": changed(groups=3),
    "groups of text": changed(groups="1"),
    "filters of text": changed(filters="01"),
    "filters in an object": changed(filters={}),
    "filters of floats": changed(filters=[0.5]),
    "filters beyond": changed(filters=[2]),
    "filters below": changed(filters=[-1]),
    "columns beyond": changed(columns=[3]),
    "columns of truth": changed(columns=[True]),
    "columns of nothing": changed(columns=None),
    "norms of text": changed(norms="ab"),
    "norms of numbers": changed(norms=[1]),
    "elements of numbers": changed(elements=[1, 0]),
    "elements not in base64": changed(elements="*&^"),
    "too few elements": changed(elements=""),
    "too many elements": changed(elements=base64.b64encode(bytes(2)).decode()),
    "a huge number": '{"autocompress_fast.plan": ' + "9" * 10_000 + "}",
    "many plausible layers": json.dumps(
        {
            "autocompress_fast.plan": 1,
            "layers": {
                str(i): {"shape": [1, 2**25], "groups": 1, "filters": [], "columns": [], "norms": []} for i in range(99)
            },
        }
    ),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused_by_name_before_anything_large_is_made(tmp_path, content, monkeypatch):
    def small_only(size, *arguments):
        assert math.prod(size if isinstance(size, tuple) else (size,)) < 2**26
        return zeros(size, *arguments)

    zeros = np.zeros
    monkeypatch.setattr(np, "zeros", small_only)
    path = tmp_path / "hostile.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"hostile\.json is not a plan: ."):
        Plan.load(path)


def test_the_good_file_of_these_tests_is_good(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(good_file()))
    assert Plan.load(path)["a"].weights == 2


def test_missing_files_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        Plan.load(tmp_path / "nothing.json")


# Masks on models


def test_masking_leaves_the_model_untouched():
    model = network()
    before = copy.deepcopy(model.state_dict())
    masked = mask(model, Plan.uniform(inspect(model, EXAMPLE), filters=0.5, columns=0.3))
    assert masked is not model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert value.data_ptr() != masked.state_dict()[name].data_ptr()


def test_masked_weights_are_zero_and_the_others_as_they_were():
    model = network()
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    plan = Plan.uniform(inspect(model, EXAMPLE), filters=0.5, columns=0.3)
    masked = mask(model, plan)
    for name, layer in plan.items():
        kept = torch.tensor(layer.mask())
        weight, old = masked.get_submodule(name).weight, model.get_submodule(name).weight
        assert torch.equal(weight, torch.where(kept, old, 0))
        filters = torch.tensor(layer.filters)
        assert torch.equal(masked.get_submodule(name).bias, torch.where(filters, model.get_submodule(name).bias, 0))
    filters = torch.tensor(plan["0"].filters)
    for part in ("weight", "bias"):
        assert torch.equal(getattr(masked[1], part), torch.where(filters, getattr(model[1], part), 0))


def test_dropped_filters_put_out_nothing():
    model = network().eval()
    nn.init.normal_(model[1].bias)
    model[1].running_mean.normal_()
    plan = Plan.uniform(inspect(model, EXAMPLE), filters=0.5)
    arriving = mask(model, plan)[:3](torch.randn(2, 3, 8, 8))
    kept = torch.tensor(plan["0"].filters)
    assert not arriving[:, ~kept].any()
    assert arriving[:, kept].any()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan({"9": LayerPlan.dense((2, 2))}), r"names '9', which is no layer with a weight; layers: 0, 1, 3, 5"),
        (Plan({"2": LayerPlan.dense((2, 2))}), "names '2'"),
        (Plan({"0": LayerPlan.dense((6, 3, 3, 2))}), r"for a weight \(6, 3, 3, 2\), the model's has \(6, 3, 3, 3\)"),
        (Plan({"3": LayerPlan((4, 6, 3, 3), [1] * 4, [1] * 54, norms=("1",))}), "ties '3' to '1', no normalisation"),
        (Plan({"3": LayerPlan((4, 6, 3, 3), [1] * 4, [1] * 54, norms=("7",))}), "ties '3' to '7'"),
    ],
)
def test_plans_for_another_model_are_refused_before_anything_changes(plan, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        check_fits(model, plan)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        MaskedParameters(model, plan, torch.optim.SGD(model.parameters(), 0.1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_computed_weights_cannot_be_masked():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="names '0', whose weight is no parameter but computed"):
        mask(model, Plan({"0": LayerPlan.dense((2, 2))}))


# Training under masks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}


def train_a_step(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def dropped(model, plan):
    filters = ~torch.tensor(plan["0"].filters)
    return torch.cat(
        [model.get_submodule(name).weight[~torch.tensor(layer.mask())] for name, layer in plan.items()]
        + [model[0].bias[filters], model[1].weight[filters], model[1].bias[filters]]
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_dropped_weights_stay_exactly_zero_even_with_momentum_from_before(kind):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for step in range(3):
        train_a_step(model, optimizer, step)
    plan = Plan.uniform(inspect(model, EXAMPLE), filters=0.5, columns=0.3)
    with MaskedParameters(model, plan, optimizer):
        assert not dropped(model, plan).any()  # at once, before any step
        before = copy.deepcopy(model.state_dict())
        for step in range(5):
            train_a_step(model, optimizer, step)
            assert not dropped(model, plan).any()
            for name, layer in plan.items():
                assert not model.get_submodule(name).weight.grad[~torch.tensor(layer.mask())].any()
    kept = torch.tensor(plan["0"].mask())
    assert (model[0].weight[kept] != before["0.weight"][kept]).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_other_weights_train_as_they_would(kind):
    """The oracle: the same network in which every dropped weight is set to zero by hand around every step."""
    model = network()
    plan = Plan.uniform(inspect(model, EXAMPLE), filters=0.5, columns=0.3)
    by_hand = mask(model, plan)
    optimizer = OPTIMIZERS[kind](model.parameters())
    hand_optimizer = OPTIMIZERS[kind](by_hand.parameters())
    with MaskedParameters(model, plan, optimizer):
        for step in range(4):
            train_a_step(model, optimizer, step)
            train_a_step(by_hand, hand_optimizer, step)
            by_hand = _zeroed(by_hand, plan)
    for name, layer in plan.items():
        kept = torch.tensor(layer.mask())
        assert torch.equal(model.get_submodule(name).weight[kept], by_hand.get_submodule(name).weight[kept])


def _zeroed(model, plan):
    with torch.no_grad():
        for name, value in mask(model, plan).state_dict().items():
            model.state_dict()[name].copy_(value)
    return model


def test_removed_masks_let_go():
    model = network()
    plan = Plan.uniform(inspect(model, EXAMPLE), filters=0.5, columns=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    masks = MaskedParameters(model, plan, optimizer)
    train_a_step(model, optimizer, 0)
    masks.remove()
    masks.remove()  # twice does no harm
    train_a_step(model, optimizer, 1)
    assert model[5].weight[~torch.tensor(plan["5"].mask())].any()


def test_a_plan_that_keeps_everything_masks_nothing():
    model = network()
    expected = copy.deepcopy(model)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    with MaskedParameters(model, Plan.dense(inspect(model, EXAMPLE)), optimizer):
        train_a_step(model, optimizer, 0)
    train_a_step(expected, OPTIMIZERS["adam"](expected.parameters()), 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
