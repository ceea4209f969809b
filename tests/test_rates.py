"""Targets and rates: budgets are met, by the projected and purified network too, and larger layers lose more."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from autocompress_fast import models
from autocompress_fast.admm import ADMM, projected
from autocompress_fast.compact import compact, restore
from autocompress_fast.graph import Counts, Report, inspect
from autocompress_fast.models import vgg
from autocompress_fast.rates import STRUCTURES, Target, allocate, between, fill, smallest
from autocompress_fast.unused import unused_paths

pytestmark = pytest.mark.usefixtures("one_thread")

# Targets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20x", Target(params=20)),
        ("20", Target(params=20)),
        ("2.5", Target(params=2.5)),
        ("conv=40", Target(conv=40)),
        ("macs=4x", Target(macs=4)),
        (" conv = 40x , params=10 ", Target(conv=40, params=10)),
        ("conv=2,macs=3,params=4", Target(conv=2, params=4, macs=3)),
        ("1x", Target(params=1)),
    ],
)
def test_targets_are_read(text, expected):
    assert Target.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "many", "conv", "conv=", "=40", "conv=40,conv=3", "bytes=3x", "20x,", "1e", "20x,30x"]
)
def test_texts_that_are_no_targets_are_refused(text):
    with pytest.raises(ValueError, match=r"a target (is like|names each)"):
        Target.parse(text)


@pytest.mark.parametrize("text", ["0.5", "params=0", "conv=-3", "nan", "macs=inf"])
def test_rates_below_one_are_refused(text):
    with pytest.raises(ValueError, match="is the rate dense / remaining, 1 or more, got"):
        Target.parse(text)


def test_a_target_has_a_rate():
    with pytest.raises(ValueError, match="at least one of conv, params, macs, speedup, latency_ms, bytes"):
        Target()


def test_parts_of_the_way_multiply_up_to_the_whole():
    target = Target(conv=64, params=8)
    assert target.part(1.0) == target
    half = target.part(0.5)
    assert half.conv == pytest.approx(8)
    assert half.params == pytest.approx(8**0.5)
    assert half.macs is None


def test_a_target_is_met_when_every_rate_is():
    target, dense = Target(conv=4, macs=2), Counts(400, 1000, 9000)
    assert target.met(dense, Counts(100, 1000, 4500))
    assert not target.met(dense, Counts(101, 1000, 4500))
    assert not target.met(dense, Counts(100, 1000, 4501))
    assert Target(params=3).met(dense, Counts(400, 333, 9000))


def test_a_target_in_words():
    assert str(Target(conv=40, params=12.5)) == "conv 40x, params 12.5x"


# Rates of networks


@functools.cache
def report_of(name: str) -> Report:
    torch.manual_seed(0)
    if name == "vgg16":
        return inspect(vgg.VGG16(width=16), torch.zeros(1, 3, 32, 32))
    return inspect(models.create(name), torch.zeros(1, *models.input_shape(name)))


TARGETS = ["2x", "10x", "60x", "conv=8", "macs=5", "conv=20,params=30", "params=4,macs=12"]
CASES = [
    (name, structure, target)
    for name in ("lenet5", "lenet300", "vgg16")
    for structure in STRUCTURES
    for target in TARGETS
    if not ("conv" in target and name == "lenet300")
]


@pytest.mark.parametrize(("name", "structure", "target"), CASES)
def test_targets_are_met_without_waste_by_what_is_left_after_projection(name, structure, target):
    """What is left after unused paths are gone is within the budget, and once the constraints are filled near it."""
    report, goal = report_of(name), Target.parse(target)
    dense = report.counts()
    try:
        constraints = allocate(report, goal, dense, structure)
    except ValueError as error:
        least = smallest(report, structure)
        assert "cannot be met" in str(error)  # noqa: PT017 - either outcome is checked
        assert not goal.met(dense, least)
        return
    model = rebuilt(report)
    admm = ADMM(model, constraints, rho=1.0, report=report)
    filled = fill(report, goal, dense, constraints, admm.plan)
    assert list(filled) == list(constraints)
    before = report.counts(unused_paths(admm.plan(), report))
    after = report.counts(unused_paths(admm.plan(filled), report))
    assert goal.met(dense, before)
    assert goal.met(dense, after)
    shares = [getattr(after, n) * rate / getattr(dense, n) for n, rate in goal.rates().items()]
    assert max(shares) > {"filter": 0.8, "column": 0.97, "element": 0.99}.get(structure, 0.9)
    for layer, larger in filled.items():
        assert np.all(np.asarray(larger.keep) >= np.asarray(constraints[layer].keep))


def test_filling_gives_the_places_of_unused_paths_to_other_weights():
    report = report_of("lenet5")
    goal, dense = Target(params=100), report.counts()
    constraints = allocate(report, goal, dense, "element")
    admm = ADMM(rebuilt(report), constraints, rho=1.0, report=report)
    wasted = report.counts(unused_paths(admm.plan(), report)).params
    filled = report.counts(unused_paths(admm.plan(fill(report, goal, dense, constraints, admm.plan)), report)).params
    assert wasted < 0.9 * dense.params / 100
    assert 0.999 * dense.params / 100 < filled <= dense.params / 100


def test_filling_for_convolutions_leaves_the_linear_layers_what_they_were_given():
    report = report_of("lenet5")
    goal, dense = Target(conv=40), report.counts()
    constraints = allocate(report, goal, dense)
    admm = ADMM(rebuilt(report), constraints, rho=1.0, report=report)
    given = sum(np.prod(c.keep) for name, c in constraints.items() if not report[name].is_conv)
    counts = report.counts(unused_paths(admm.plan(fill(report, goal, dense, constraints, admm.plan)), report))
    assert 0.9 * given < counts.params - counts.conv <= given
    assert 0.95 * dense.conv / 40 < counts.conv <= dense.conv / 40


def rebuilt(report: Report) -> nn.Module:
    """A module with the layers of the report alone, in which ADMM can project."""
    model = nn.Module()
    for layer in report.layers:
        parent = model
        *path, last = layer.name.split(".")
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        module = nn.Module()
        module.weight = nn.Parameter(report.weight(layer.name).clone())
        parent.add_module(last, module)
    return model


@pytest.mark.parametrize("structure", STRUCTURES)
def test_targets_that_cannot_be_met_say_what_is_possible_and_that_is_possible(structure):
    for name in ("lenet5", "vgg16"):
        report = report_of(name)
        dense = report.counts()
        with pytest.raises(
            ValueError, match=r"params 1e\+09x cannot be met with structure '.*': at most params"
        ) as info:
            allocate(report, Target(params=1e9), dense, structure)
        possible = float(str(info.value).split()[-1].removesuffix("x"))
        allocate(report, Target(params=possible * 0.999), dense, structure)
        with pytest.raises(ValueError, match="cannot be met"):
            allocate(report, Target(params=possible * 1.01), dense, structure)


def test_a_single_filter_can_stay_of_every_layer():
    least = smallest(report_of("lenet5"), "filter")
    assert least == Counts(25 + 25, 25 + 25 + 16 + 10, 25 * 576 + 25 * 64 + 16 + 10)


@pytest.mark.parametrize("structure", ["element", "filter+column"])
def test_larger_layers_lose_more(structure):
    for name in ("lenet5", "lenet300", "vgg16"):
        report = report_of(name)
        constraints = allocate(report, Target(params=20), report.counts(), structure)
        shares = [
            (layer.weights, np.prod(constraints[layer.name].keep) / layer.weights)
            for layer in report.layers
            if layer.weights > 1000
        ]
        shares.sort()
        for (small, more), (large, less) in itertools.pairwise(shares):
            assert less <= more * 1.25 or small == large, (name, small, large)  # 1.25: counts are whole numbers
        assert shares[-1][1] < shares[0][1]


def test_without_alpha_every_layer_keeps_the_same_share():
    report = report_of("lenet5")
    constraints = allocate(report, Target(params=10), report.counts(), "element", alpha=0.0)
    for layer in report.layers:
        assert constraints[layer.name].keep == pytest.approx(layer.weights / 10, abs=1)


def test_a_target_for_convolutions_spares_the_linear_layers():
    report = report_of("lenet5")
    dense = report.counts()
    constraints = allocate(report, Target(conv=30), dense, "element")
    conv = sum(c.keep for name, c in constraints.items() if report[name].is_conv)
    linear = sum(c.keep for name, c in constraints.items() if not report[name].is_conv)
    assert dense.conv / conv == pytest.approx(30, rel=0.02)
    assert 1 < (dense.params - dense.conv) / linear < 31


def test_no_pruning_asked_for_is_no_pruning():
    report = report_of("lenet5")
    for structure in ("element", "filter", "column"):
        constraints = allocate(report, Target(params=1), report.counts(), structure)
        for name, chosen in constraints.items():
            layer = report[name]
            assert (
                chosen.keep == {"element": layer.weights, "filter": layer.shape[0], "column": layer.columns}[structure]
            )


def test_a_layer_keeps_the_filters_that_its_reader_needs():
    for name in ("lenet5", "lenet300", "vgg16"):
        report = report_of(name)
        for rate in (3, 15, 50):
            constraints = allocate(report, Target(params=rate), report.counts())
            for layer in report.layers:
                if layer.name not in report.set_of:
                    assert constraints[layer.name].keep[0] == layer.shape[0]
                    continue
                (reader,) = map(report.__getitem__, report.set_of[layer.name].readers)
                per_filter = reader.columns // layer.shape[0]
                filters, columns = constraints[layer.name].keep[0], constraints[reader.name].keep[1]
                assert filters * per_filter >= columns or filters == layer.shape[0]
                if per_filter == 1:
                    assert filters == columns


def test_grouped_layers_lose_whole_filters_of_all_groups_alike():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 8, 3)
    )
    report = inspect(model, torch.zeros(1, 4, 12, 12))
    dense = report.counts()
    for structure, rates in {"filter": (2, 3.5), "filter+column": (2.5,), "column": (2.5,)}.items():
        for rate in rates:
            constraints = allocate(report, Target(params=rate), dense, structure)
            admm = ADMM(rebuilt(report), constraints, report=report)
            filled = fill(report, Target(params=rate), dense, constraints, admm.plan)
            for chosen in (constraints, filled):
                plan = admm.plan(chosen)
                assert Target(params=rate).met(dense, report.counts(unused_paths(plan, report)))
                if "2" not in plan:
                    continue
                kept = plan["2"].filters.reshape(4, 4)
                assert (kept == kept[0]).all()
                if structure == "filter":
                    assert chosen["2"].keep % 4 == 0
                    assert kept.sum() < 16 or rate == 2
                else:  # single columns of grouped layers cannot go
                    assert kept.all()
    assert "2" not in allocate(report, Target(params=2.5), dense, "column")
    assert allocate(report, Target(params=2.5), dense, "element")["2"].groups == 4


@functools.cache
def branching(name: str) -> tuple[nn.Module, torch.Tensor, Report]:
    torch.manual_seed(0)
    model, example = {
        "residual": (models.create("resnet20", width=8), torch.randn(2, 3, 16, 16)),
        "depthwise": (nn.Sequential(*models.create("mobilenet_v2").features[:5]), torch.randn(2, 3, 16, 16)),
        "transposed": (
            nn.Sequential(
                nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3)
            ),
            torch.randn(2, 3, 16, 16),
        ),
    }[name]
    return model, example, inspect(model, example)


@pytest.mark.parametrize("target", ["2x", "4x", "macs=5", "conv=3"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["residual", "depthwise", "transposed"])
def test_targets_of_networks_with_tied_filters_are_met(name, structure, target):
    model, _, report = branching(name)
    goal, dense = Target.parse(target), report.counts()
    try:
        constraints = allocate(report, goal, dense, structure)
    except ValueError as error:
        assert "cannot be met" in str(error)  # noqa: PT017 - either outcome is checked
        assert not goal.met(dense, smallest(report, structure))
        return
    admm = ADMM(copy.deepcopy(model), constraints, rho=1.0, report=report)
    filled = fill(report, goal, dense, constraints, admm.plan)
    for chosen in (constraints, filled):
        plan = admm.plan(chosen)
        assert goal.met(dense, report.counts(unused_paths(plan, report)))
        for tied in report.sets:
            rows = {m: set(tied.rows[m][plan[m].filters].tolist()) for m in tied.layers if m in plan}
            everything = set().union(*rows.values())
            for member, kept in rows.items():
                assert kept, member
                if "filter" in structure:  # a group stays in all of its layers, or goes from all
                    assert kept == everything & set(tied.rows[member].tolist()), member


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["residual", "depthwise", "transposed", "lenet5"])
def test_what_lies_between_meets_the_part_of_the_target_that_lies_there(name, structure):
    """The inequality of Hölder, of weights and of multiply-adds, from the whole network and from what was pruned."""
    if name == "lenet5":
        report = report_of(name)
        model, example = models.create(name), torch.zeros(1, *models.input_shape(name))
    else:
        model, example, report = branching(name)
    rate = 1.4 if name == "transposed" else 3
    goal, dense = Target(params=rate, macs=rate), report.counts()
    end = allocate(report, goal, dense, structure)
    assert between(report, None, end, 1.0) == end
    assert report.counts(projected(report, between(report, None, end, 0.0))) == dense
    sizes = []
    for share in (0.2, 0.5, 0.9):
        plan = projected(report, between(report, None, end, share))
        assert goal.part(share).met(dense, report.counts(unused_paths(plan, report)))
        sizes.append(plan.weights)
    assert dense.params > sizes[0] > sizes[1] > sizes[2] >= projected(report, end).weights

    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share must be from 0 to 1, got"):
            between(report, None, end, share)

    halfway = between(report, None, end, 0.5)
    masks = projected(report, halfway).tied(report)
    cut = compact(copy.deepcopy(model), masks, example, columns=False, report=report)
    now = inspect(cut.model, example)
    left = report.counts(restore(cut.plan, cut.kept, report))
    for share in (0.3, 0.8):
        plan = projected(now, between(now, cut.plan, allocate(now, goal, dense, structure), share))
        found = report.counts(restore(unused_paths(plan, now), cut.kept, report))
        for size in ("params", "macs"):
            limit = getattr(left, size) ** (1 - share) * (getattr(dense, size) / rate) ** share
            assert getattr(found, size) <= limit * (1 + 1e-12)


def test_later_rounds_count_from_the_dense_network():
    torch.manual_seed(0)
    model, example = models.create("lenet_digits"), torch.randn(2, 1, 8, 8)
    report = inspect(model, example)
    dense, small, masks, kept = report.counts(), model, None, None
    for rate in (4, 16):
        now = inspect(small, example)
        constraints = allocate(now, Target(params=rate), dense)
        masks = ADMM(small, constraints, report=now).finish()
        cut = compact(small, masks.tied(now), example, columns=False)
        kept = cut.kept if kept is None else {name: kept[name].then(inner) for name, inner in cut.kept.items()}
        small = cut.model
        assert Target(params=rate).met(dense, report.counts(restore(cut.plan, kept, report)))


def test_requests_that_mean_nothing_are_refused():
    report = report_of("lenet5")
    with pytest.raises(ValueError, match=r"structure must be one of .*, got 'row'"):
        allocate(report, Target(params=2), report.counts(), "row")
    linear = report_of("lenet300")
    with pytest.raises(ValueError, match=r"the target conv 3x is for convolutions, and LeNet300 has none"):
        allocate(linear, Target(conv=3), linear.counts())
    nothing = inspect(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"Linear has no layer that can be pruned; left out: .*the model itself"):
        allocate(nothing, Target(params=2), nothing.counts())
