"""Plans, their files and masks, and training under masks."""

import base64
import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from autocompress_fast._baked import baked
from autocompress_fast.graph import inspect
from autocompress_fast.plan import LayerPlan, MaskedParameters, Plan, check_fits, mask
from autocompress_fast.unused import unused_paths

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


def test_equal_plans_keep_the_same_of_the_same_and_hold_the_same():
    layers = {"a": LayerPlan.dense((2, 2))}
    tied = {"b.weight": (0, np.array([True, False]))}
    plan = Plan(layers, tied, ["a"])
    assert plan == Plan(dict(layers), {"b.weight": (0, [1, 0])}, {"a"})
    others = [
        Plan(layers, tied),
        Plan(layers, None, ["a"]),
        Plan({}, tied, ["a"]),
        *(
            Plan(layers, other, ["a"])
            for other in (
                {"b.weight": (0, [0, 1])},
                {"b.weight": (0, [1, 0, 0])},
                {"b.weight": (1, [1, 0])},
                {"b.bias": (0, [1, 0])},
                {**tied, "b.bias": (0, [1, 0])},
            )
        ),
    ]
    assert all(plan != other for other in others)
    assert plan != layers


def test_a_dense_plan_knows_transposed_layers():
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.Conv2d(8, 2, 1))
    plan = Plan.dense(inspect(model, EXAMPLE))
    assert [layer.weight_shape for layer in plan.values()] == [(3, 8, 3, 3), (2, 8, 1, 1)]
    assert all(layer.weight_mask().all() for layer in plan.values())


def test_masks_that_need_gradients_are_read():
    weight = torch.eye(2, requires_grad=True)
    assert Plan.from_masks({"a": weight})["a"].weights == 2


def test_a_dense_plan_keeps_everything():
    report = inspect(network(), EXAMPLE)
    plan = Plan.dense(report)
    assert plan.weights == plan.dense_weights == report.params
    assert plan.parameters == {}


def test_dropped_filters_tie_all_that_is_theirs_alone():
    """The normalisation behind the first layer; what the second one drops has nothing of its own."""
    report = inspect(network(), EXAMPLE)
    filters, others = [1, 0, 1, 1, 0, 1], [1, 0, 1, 1]
    plan = Plan({"0": LayerPlan((6, 3, 3, 3), filters, np.ones(27)), "3": LayerPlan((4, 6, 3, 3), others, np.ones(54))})
    assert plan.parameters == {}
    tied = plan.tied(report)
    assert dict(tied) == dict(plan)
    assert set(tied.parameters) == {f"1.{part}" for part in ("weight", "bias", "running_mean", "running_var")}
    for dim, kept in tied.parameters.values():
        assert dim == 0
        assert kept.tolist() == [bool(x) for x in filters]


def residual() -> nn.Module:
    """A block around which its input goes: `stem`, `inner` and what the additions put out have the same channels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 3)
            self.norm, self.scale = nn.BatchNorm2d(6), nn.Parameter(torch.ones(1, 6, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.head(self.scale * self.norm(x + self.inner(x)))

    torch.manual_seed(0)
    return Net()


def test_what_reads_a_sum_is_tied_when_nothing_of_the_sum_is_left():
    report = inspect(residual(), EXAMPLE)
    stem = LayerPlan((6, 3, 3, 3), [0, 0, 1, 1, 1, 1], np.ones(27))
    inner = LayerPlan((6, 6, 3, 3), [0, 1, 0, 1, 1, 1], np.ones(54))
    assert Plan({"stem": stem}).tied(report).parameters == {}  # what the other puts out still arrives
    tied = Plan({"stem": stem, "inner": inner}).tied(report).parameters
    assert {name: dim for name, (dim, _) in tied.items() if name == "scale"} == {"scale": 1}
    assert "norm.weight" in tied
    for _, kept in tied.values():
        assert kept.tolist() == [False] + [True] * 5


@pytest.mark.parametrize(("filters", "columns"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.4), (0.3, 0.6), (0.99, 0.99)])
def test_uniform_removes_the_shares_asked_for_and_the_smallest_norms(filters, columns):
    model = network()
    report = inspect(model, EXAMPLE)
    plan = Plan.uniform(report, filters=filters, columns=columns)
    for layer in report.layers:
        rows = max(1, round(layer.shape[0] * (1 - filters))) if layer.filters_prunable else layer.shape[0]
        kept = plan[layer.name]
        assert kept.filters.sum() == rows
        reading = {"0": np.ones(27, bool), "3": np.repeat(plan["0"].filters, 9), "5": np.repeat(plan["3"].filters, 36)}
        living = reading[layer.name]  # columns of filters that are dropped go with them
        assert not kept.columns[~living].any()
        assert kept.columns.sum() == max(1, round(living.sum() * (1 - columns)))
        sizes = (
            model.get_submodule(layer.name).weight.detach().flatten(1)[torch.tensor(kept.filters)].norm(dim=0).numpy()
        )
        others = living & ~kept.columns
        assert not others.any() or sizes[kept.columns].min() >= sizes[others].max()
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
    assert (plan["3"].filters.sum(), plan["3"].columns.sum()) == (2, 14)  # of the 27 that are left with 3 channels


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 0.99])
def test_uniform_drops_tied_filters_together_those_of_smallest_joint_norm(share):
    """The two layers that are added: the norms are independent, so that neither layer's own order is the joint one."""
    model = residual()
    joint = (model.stem.weight.flatten(1).square().sum(1) + model.inner.weight.flatten(1).square().sum(1)).detach()
    plan = Plan.uniform(inspect(model, EXAMPLE), filters=share)
    kept = plan["stem"].filters
    assert kept.sum() == max(1, round(6 * (1 - share)))
    assert kept.tolist() == plan["inner"].filters.tolist()
    assert kept.all() or joint.numpy()[kept].min() > joint.numpy()[~kept].max()
    assert plan["head"].filters.all()
    assert plan["head"].columns.tolist() == np.repeat(kept, 9).tolist()
    assert kept.all() == (plan.parameters == {})
    assert all(tied.tolist() == kept.tolist() for _, tied in plan.parameters.values())


def test_uniform_keeps_the_groups_of_grouped_layers_alike():
    """The i-th filter of every group goes with the i-th of the others, by their joint norm; single columns stay."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 16, 3))
    report = inspect(model, torch.zeros(1, 4, 6, 6))
    plan = Plan.uniform(report, filters=0.5, columns=0.5)["0"]
    joint = model[0].weight.detach().reshape(2, 4, -1).square().sum((0, 2))
    kept = plan.filters.reshape(2, 4)
    assert plan.groups == 2
    assert kept[0].tolist() == kept[1].tolist() == (joint >= joint.sort().values[2]).tolist()
    assert plan.columns.all()


def test_uniform_drops_depthwise_filters_with_the_channel_they_read():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    plan = Plan.uniform(inspect(model, EXAMPLE), filters=0.5)
    joint = sum(model[i].weight.detach().flatten(1).square().sum(1) for i in (0, 1))
    assert plan["0"].filters.tolist() == plan["1"].filters.tolist() == (joint >= joint.sort().values[4]).tolist()
    assert plan["1"].columns.reshape(8, 9).all(axis=1).tolist() == plan["0"].filters.tolist()


def test_plans_of_transposed_layers_know_how_their_weight_lies():
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Conv2d(6, 2, 1)
    )
    report = inspect(model, EXAMPLE)
    with torch.no_grad():
        model[0].weight[:, :4] *= 0.01
    plan = Plan.uniform(report, filters=0.5)
    assert plan["0"].shape == (8, 3, 3, 3)
    assert plan["0"].weight_shape == tuple(model[0].weight.shape) == (3, 8, 3, 3)
    assert plan["2"].weight_shape == tuple(model[2].weight.shape) == (8, 3, 2, 2)
    assert plan["0"].weight_mask().any(axis=(0, 2, 3)).tolist() == plan["0"].filters.tolist()
    assert np.array_equal(plan["2"].weight_mask().any(axis=(1, 2, 3)), plan["0"].filters)
    masked = mask(model, plan)
    for name in ("0", "2"):
        kept = torch.tensor(plan[name].weight_mask())
        old = model.get_submodule(name).weight
        assert torch.equal(masked.get_submodule(name).weight, torch.where(kept, old, 0))
        assert 0 < kept.sum() < kept.numel()


def test_masks_of_transposed_layers_one_weight_at_a_time():
    """Weight [c, j] of group g is of filter g * P/groups + j, and reads channel c, the (c mod C/groups)-th of g."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        groups, inputs, outputs, size = (int(n) for n in rng.integers(1, 4, 4))
        shape = (groups * outputs, inputs, size)
        plan = LayerPlan(
            shape, rng.random(shape[0]) < 0.6, rng.random(groups * inputs * size) < 0.6, None, groups, transposed=True
        )
        found = plan.weight_mask()
        assert found.shape == plan.weight_shape == (groups * inputs, outputs, size)
        for c, j, k in np.ndindex(found.shape):
            group = c // inputs
            column = group * inputs * size + c % inputs * size + k
            assert found[c, j, k] == (plan.filters[group * outputs + j] and plan.columns[column])
        assert found.sum() == plan.weights


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


def test_tied_parameters_survive_the_file(tmp_path):
    for model, names in ((network(), {"1.weight", "1.bias"}), (residual(), {"norm.weight", "norm.bias", "scale"})):
        plan = Plan.uniform(inspect(model, EXAMPLE), filters=0.5)
        assert names <= set(plan.parameters)
        plan.save(tmp_path / "plan.json")
        loaded = Plan.load(tmp_path / "plan.json").parameters
        assert {name: (dim, kept.tolist()) for name, (dim, kept) in loaded.items()} == {
            name: (dim, kept.tolist()) for name, (dim, kept) in plan.parameters.items()
        }
        expected = mask(model, plan).state_dict()
        assert all(
            torch.equal(x, expected[n]) for n, x in mask(model, Plan.load(tmp_path / "plan.json")).state_dict().items()
        )


def test_layers_that_are_held_survive_the_file_and_what_is_made_of_the_plan(tmp_path):
    report = inspect(network(), EXAMPLE, exclude=["3", "0"])
    plan = Plan.uniform(report, columns=0.5)
    assert plan.held == {"0", "3"}
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert unused_paths(plan, report).held == Plan.dense(report).held == plan.held
    assert plan.tied(inspect(network(), EXAMPLE)).held == frozenset()


def test_transposed_layers_survive_the_file(tmp_path):
    plan = Plan({"a": LayerPlan((4, 3, 2), [1, 0, 1, 1], np.ones(12), None, 2, transposed=True)})
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")["a"]
    assert loaded.transposed
    assert loaded.weight_shape == (6, 2, 2)
    np.testing.assert_array_equal(loaded.weight_mask(), plan["a"].weight_mask())


def test_files_without_ties_and_of_before_there_were_transposed_layers_are_read(tmp_path):
    content = good_file()
    del content["tied"], content["held"], content["layers"]["a"]["transposed"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.parameters == {}
    assert plan.held == frozenset()
    assert not plan["a"].transposed


def good_file() -> dict:
    layer = {"shape": [2, 3], "groups": 1, "transposed": False, "filters": [0], "columns": [0, 2]}
    tied = {"b.weight": {"dim": 0, "of": 2, "kept": [0]}}
    return {"autocompress_fast.plan": 1, "layers": {"a": layer}, "tied": tied, "held": ["a"]}


def changed(**fields: object) -> str:
    content = good_file()
    content["layers"]["a"].update(fields)
    return json.dumps(content)


def changed_tie(**fields: object) -> str:
    content = good_file()
    content["tied"]["b.weight"].update(fields)
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
    "transposed by a number": changed(transposed=1),
    "transposed by text": changed(transposed="no"),
    "a list of ties": json.dumps({**good_file(), "tied": []}),
    "ties of nothing": json.dumps({**good_file(), "tied": None}),
    "a tie that is a list": json.dumps({**good_file(), "tied": {"b": [0]}}),
    "an empty tie": json.dumps({**good_file(), "tied": {"b": {}}}),
    "a tie along a negative dimension": changed_tie(dim=-1),
    "a tie along dimension 2**40": changed_tie(dim=2**40),
    "a tie along truth": changed_tie(dim=False),
    "a tie of no entries": changed_tie(of=0),
    "a tie of negative size": changed_tie(of=-2),
    "a tie of 2**40 entries": changed_tie(of=2**40),
    "a tie of half an entry": changed_tie(of=0.5),
    "a tie beyond": changed_tie(kept=[2]),
    "a tie below": changed_tie(kept=[-1]),
    "a tie of text": changed_tie(kept="0"),
    "many plausible ties": json.dumps(
        {**good_file(), "tied": {str(i): {"dim": 0, "of": 2**25, "kept": []} for i in range(99)}}
    ),
    "held of nothing": json.dumps({**good_file(), "held": None}),
    "held of text": json.dumps({**good_file(), "held": "a"}),
    "held of numbers": json.dumps({**good_file(), "held": [0]}),
    "held of lists": json.dumps({**good_file(), "held": [["a"]]}),
    "elements of numbers": changed(elements=[1, 0]),
    "elements not in base64": changed(elements="*&^"),
    "too few elements": changed(elements=""),
    "too many elements": changed(elements=base64.b64encode(bytes(2)).decode()),
    "a huge number": '{"autocompress_fast.plan": ' + "9" * 10_000 + "}",
    "many plausible layers": json.dumps(
        {
            "autocompress_fast.plan": 1,
            "layers": {str(i): {"shape": [1, 2**25], "groups": 1, "filters": [], "columns": []} for i in range(99)},
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
    plan = Plan.load(path)
    assert plan["a"].weights == 2
    assert plan.held == {"a"}
    dim, kept = plan.parameters["b.weight"]
    assert (dim, kept.tolist()) == (0, [True, False])


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
        (
            Plan({"0": LayerPlan.dense((6, 3, 3, 3), transposed=True)}),
            r"for a weight \(3, 6, 3, 3\), the model's has \(6, 3, 3, 3\)",
        ),
        (
            Plan({}, {"1.weight": (0, np.ones(5))}),
            r"ties '1\.weight' of size 5 in dimension 0, the model's has \(6,\)",
        ),
        (Plan({}, {"1.weight": (1, np.ones(6))}), r"ties '1\.weight' of size 6 in dimension 1"),
        (Plan({}, {"1.slope": (0, np.ones(6))}), r"ties '1\.slope'"),
        (Plan({}, {"7.weight": (0, np.ones(6))}), r"ties '7\.weight'"),
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


def test_what_is_tied_goes_with_the_filters_and_statistics_stay():
    model = residual()
    with torch.no_grad():
        for x in (model.norm.weight, model.norm.bias, model.norm.running_mean, model.scale):
            x.normal_()
    plan = Plan.uniform(inspect(model, EXAMPLE), filters=0.5)
    masked, filters = mask(model, plan), torch.tensor(plan["stem"].filters)
    for name in ("norm.weight", "norm.bias"):
        old, new = model.get_parameter(name), masked.get_parameter(name)
        assert torch.equal(new, torch.where(filters, old, 0))
    assert torch.equal(masked.scale, torch.where(filters.reshape(1, 6, 1, 1), model.scale, 0))
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(masked.get_buffer(name), model.get_buffer(name))


def test_computed_weights_are_plain_in_the_masked_copy_and_cannot_be_held_at_zero_in_training():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    plan = Plan.from_masks({"0": np.array([[1, 0], [0, 0]])})
    masked = mask(model, plan)
    assert sorted(masked.state_dict()) == ["0.bias", "0.weight"]
    assert isinstance(masked[0].weight, nn.Parameter)
    assert torch.equal(masked[0].weight, model[0].weight * torch.tensor([[1, 0], [0, 0]]))
    assert nn.utils.parametrize.is_parametrized(model[0])
    with pytest.raises(ValueError, match="names '0', whose weight is no parameter but computed"):
        MaskedParameters(model, plan, torch.optim.SGD(model.parameters(), 0.1))


COMPUTED = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "weight norm of old": nn.utils.weight_norm,
    "spectral norm of old": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", COMPUTED)
def test_baked_weights_are_plain_parameters_of_a_copy_that_computes_the_same(kind, train):
    torch.manual_seed(0)
    model = nn.Sequential(COMPUTED[kind](nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.train(train)
    model[1].eval()
    x = torch.randn(3, 4)
    model(x)  # some keep a weight that has a graph from here on
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    modes = {name: module.training for name, module in model.named_modules()}
    plain = baked(model)
    assert set(plain.state_dict()) == set(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).state_dict()
    )
    assert all(isinstance(plain[i].weight, nn.Parameter) for i in (0, 2))
    assert {name: module.training for name, module in plain.named_modules()} == {n: modes[n] for n in ("", *"012")}
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(plain.eval()(x), model.eval()(x), rtol=1e-6, atol=1e-6)


def test_a_model_without_computed_weights_is_baked_as_it_is():
    model = network()
    assert baked(model) is model


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
    plan = Plan.uniform(inspect(model, EXAMPLE), filters=0.25, columns=0.5)
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
