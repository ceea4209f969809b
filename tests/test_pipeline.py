"""The whole job on small data: the target is met, and a run killed anywhere ends as one that was not."""

import contextlib
import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress_fast import pipeline
from autocompress_fast.admm import RhoSchedule
from autocompress_fast.compact import ColumnConv2d, ColumnLinear
from autocompress_fast.data import BatchLoader, Dataset, Splits, UserBatches
from autocompress_fast.engine import UnsupportedError, load
from autocompress_fast.engine.narrow import quantize
from autocompress_fast.engine.program import is_narrow
from autocompress_fast.engine.simulation import Simulation, simulate
from autocompress_fast.graph import Counts, inspect
from autocompress_fast.pipeline import DryRun, Recipe, Result, _share, _Way, compress, train
from autocompress_fast.plan import Plan, mask
from autocompress_fast.progress import Progress
from autocompress_fast.quantize import LevelConstraint
from autocompress_fast.rates import Target
from autocompress_fast.report import Outlook
from autocompress_fast.training import TrainingConfig, evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def dataset(samples: int, seed: int) -> Dataset:
    """Three classes of noisy 6x6 images, told apart by where they are bright."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, samples)
    images = rng.standard_normal((samples, 1, 6, 6)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 2
    return Dataset(images, labels, ("a", "b", "c"), (0.0,), (1.0,))


SPLITS = Splits(dataset(96, 0), dataset(48, 1), dataset(64, 2), "bright")


def network(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        activation(),
        nn.Conv2d(6, 8, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    )


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    config = TrainingConfig(10, optimizer="adam", lr=0.01, weight_decay=0.0)
    return train(network(), SPLITS, config, batch_size=32, progress=Progress())


RECIPE = Recipe(
    rounds=2,
    admm_epochs=2,
    retrain_epochs=1,
    final_epochs=6,
    admm_lr=3e-3,
    retrain_lr=1e-2,
    final_lr=1e-2,
    rho=RhoSchedule(0.1, 2.0),
    batch_size=32,
    precision="float32",
)


def variant(**changes: object) -> Recipe:
    return dataclasses.replace(RECIPE, **changes)


PURIFYING = variant(rounds=1, purify_rounds=2, purify_tolerance=10.0, purify_epochs=1)


class StopError(Exception):
    """What stands for a power cut."""


class Watcher(Progress):
    """Counts steps and notes, and raises at the given one of either."""

    def __init__(self, *, steps: float = math.inf, notes: float = math.inf) -> None:
        self.last_step, self.last_note = steps, notes
        self.steps = 0
        self.noted: list[str] = []
        self.tasks: list[str] = []

    def start(self, what, *_):
        self.tasks.append(what)

    def advance(self):
        self.steps += 1
        if self.steps > self.last_step:
            raise StopError

    def note(self, text):
        self.noted.append(text)
        if len(self.noted) > self.last_note:
            raise StopError


class Counting:
    """Batches that count how often they are read."""

    def __init__(self, data: Dataset) -> None:
        self.inner, self.read = BatchLoader(data, 16), 0

    def __len__(self):
        return len(self.inner)

    def epoch(self, index):
        self.read += 1
        return self.inner.epoch(index)


def run(model: nn.Module, data: object = SPLITS, **options: object) -> Result:
    options = {"target": "6x", "recipe": RECIPE, "progress": Progress(), **options}
    result = compress(model, data, **options)
    assert isinstance(result, Result)
    return result


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def stored(model: nn.Module) -> int:
    layers = (nn.Conv2d, nn.Linear, ColumnConv2d, ColumnLinear)
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, layers))


# The result


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return run(trained, workdir=folder / "new" / "folder"), folder / "new" / "folder"


@pytest.mark.parametrize(
    ("structure", "target"),
    [
        ("filter+column", "8x"),
        ("filter+column", "conv=5,macs=4"),
        ("filter-then-column", "8x"),
        ("filter", "3x"),
        ("column", "3x"),
        ("element", "8x"),
        ("element", "conv=10,params=6,macs=3"),
    ],
)
def test_the_target_is_met_and_the_network_still_works(trained, structure, target):
    goal = Target.parse(target)
    result = run(trained, target=goal, recipe=variant(structure=structure, final_epochs=8))
    assert goal.met(result.dense, result.small)
    assert result.dense == inspect(trained, torch.zeros(1, 1, 6, 6)).counts()
    assert result.layers.counts(result.plan) == result.small
    assert result.accuracy["base"] > 90
    assert result.accuracy["final"] > 70
    assert result.max_difference < 1e-4
    if structure != "element":
        assert stored(result.model) == result.small.params
    dropped = [~torch.tensor(layer.mask()) for layer in result.plan.values()]
    assert sum(int(d.sum()) for d in dropped) == result.dense.params - result.small.params


def test_the_accuracies_are_those_of_the_returned_network(trained, whole):
    result, _ = whole
    assert not result.model.training
    for part, name in ((SPLITS.validation, "final"), (SPLITS.test, "final_test")):
        assert result.accuracy[name] == evaluate(result.model, BatchLoader(part, 100)).accuracy
    for part, name in ((SPLITS.validation, "base"), (SPLITS.test, "base_test")):
        assert result.accuracy[name] == evaluate(trained, BatchLoader(part, 100)).accuracy


def test_the_given_network_is_not_changed_and_runs_repeat(trained, whole):
    before, modes = state(trained), [module.training for module in trained.modules()]
    torch.manual_seed(1)
    again = run(trained)
    assert_same(state(trained), before)
    assert modes == [module.training for module in trained.modules()]
    assert_same(state(again.model), state(whole[0].model))  # which was made with a work directory
    assert again.plan == whole[0].plan


def test_another_seed_is_another_run(trained, whole):
    other = run(trained, recipe=variant(seed=1))
    assert other.plan != whole[0].plan or other.history[0]["loss"] != whole[0].history[0]["loss"]


def test_the_plan_fits_the_given_network(trained, whole):
    result, _ = whole
    masked = mask(trained, result.plan)  # untrained after the projection, but of the right shapes
    assert sum(int((m.weight != 0).sum()) for m in masked.modules() if isinstance(m, (nn.Conv2d, nn.Linear))) == (
        result.small.params
    )


def test_the_history_has_every_epoch_of_every_stage(whole):
    result, _ = whole
    stages = [(row["stage"], row["epoch"]) for row in result.history]
    assert stages == [
        ("round1.admm", 1),
        ("round1.admm", 2),
        ("round1.retrain", 1),
        ("round2.admm", 1),
        ("round2.admm", 2),
        *(("round2.final", epoch) for epoch in range(1, 7)),
    ]
    assert result.seconds == pytest.approx(sum(row["seconds"] for row in result.history))


def test_the_result_as_json(whole):
    content = json.loads(json.dumps(whole[0].to_json()))
    assert content["target"] == "params 6x"
    assert content["rates"]["params"] >= 6
    assert content["dense"]["params"] == content["small"]["params"] * content["rates"]["params"]
    assert sum(layer["weights"] for layer in content["layers"].values()) == content["small"]["params"]
    assert content["recipe"]["rounds"] == 2
    assert content["sizes"].keys() == {"round1.retrain", "round2.final"}
    assert content["sizes"]["round2.final"] == content["small"]


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.GELU])
def test_activations_that_do_not_map_zero_to_zero(activation):
    """What dropped filters put out is not zero then, in front of a convolution that pads."""
    result = run(network(activation), target="8x")
    assert Target(params=8).met(result.dense, result.small)
    assert stored(result.model) == result.small.params


def test_filters_before_columns_are_two_trainings(trained):
    watcher = Watcher()
    run(trained, recipe=variant(structure="filter-then-column", rounds=1), progress=watcher)
    assert watcher.tasks == ["round1.admm", "round1.admm2", "round1.final"]


# As far as the accuracy holds

HOLDING = variant(rounds=3, final_epochs=2)


@pytest.mark.parametrize(("target", "max_drop"), [("200x", 0.0), ("200x", 5.0), ("200x", 30.0), (None, 5.0)])
def test_no_more_accuracy_is_lost_than_allowed(trained, target, max_drop):
    result = run(trained, target=target, max_drop=max_drop, recipe=HOLDING)
    accuracy = result.accuracy
    assert accuracy["final"] >= accuracy["base"] - max_drop
    accepted = [row for row in result.rounds if row["accepted"]]
    refused = [row for row in result.rounds if not row["accepted"]]
    assert all(row["validation"] >= accuracy["base"] - max_drop for row in accepted)
    assert all(row["validation"] < accuracy["base"] - max_drop for row in refused)
    assert len(refused) == 3 or result.target.met(result.dense, result.small)
    assert len(accepted) <= 3 * 4  # three steps, of which a quarter at least is done at once
    assert result.small.params == min([result.dense.params, *(row["params"] for row in accepted)])


def test_a_round_after_one_that_was_taken_back_goes_half_as_far(trained):
    result = run(trained, target="200x", max_drop=0.0, recipe=HOLDING)
    assert not result.rounds[0]["accepted"]
    tried = [math.log(float(row["target"].removeprefix("params ").removesuffix("x"))) for row in result.rounds]
    reached, last = 0.0, tried[0]
    for row, at in list(zip(result.rounds, tried, strict=True))[1:]:
        if reached == 0:
            assert at == pytest.approx(last / 2, rel=1e-3)
        if row["accepted"]:
            break
        last = at


def test_where_nothing_holds_the_network_stays_as_it_was(trained, monkeypatch):
    monkeypatch.setattr("autocompress_fast.pipeline._trained", lambda _, state, *__: state)
    result = run(trained, target="200x", max_drop=0.0, recipe=HOLDING)
    assert [row["accepted"] for row in result.rounds] == [False] * 3
    assert result.small == result.dense
    assert_same(state(result.model), state(trained))
    assert "macs" in result.rates


def test_a_target_that_holds_is_met(trained):
    result = run(trained, target="4x", max_drop=100.0, recipe=HOLDING)
    assert [row["accepted"] for row in result.rounds] == [True] * 3
    assert result.history[-1]["stage"] == "final"
    assert Target(params=4).met(result.dense, result.small)


TAKEN_BACK = {"target": "200x", "max_drop": 5.0, "recipe": HOLDING}


@pytest.fixture(scope="module")
def taken_back(trained) -> Result:
    return run(trained, **TAKEN_BACK)


def test_a_run_with_rounds_taken_back_is_continued(trained, taken_back, tmp_path):
    options, expected = TAKEN_BACK, taken_back
    for steps in (8, 12, 13):
        with pytest.raises(StopError):
            run(trained, **options, workdir=tmp_path, progress=Watcher(steps=steps))
    with pytest.raises(ValueError, match="holds a run with another max_drop"):
        run(trained, **(options | {"max_drop": 6.0}), workdir=tmp_path)
    result = run(trained, **options, workdir=tmp_path)
    assert_same(state(result.model), state(expected.model))
    assert result.plan == expected.plan
    assert result.rounds == expected.rounds


def test_purification_keeps_the_accuracy_too(trained):
    recipe = variant(rounds=1, purify_rounds=3, purify_tolerance=40.0, purify_epochs=0)
    result = run(trained, target="2x", max_drop=2.0, recipe=recipe)
    free = run(trained, target="2x", max_drop=100.0, recipe=recipe)
    assert result.accuracy["final"] >= result.accuracy["base"] - 2
    assert free.accuracy["final"] < free.accuracy["base"] - 2  # so there was something to take back


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": None}, "needs a target, such as target='20x', or max_drop, or both; got neither"),
        ({"max_drop": -0.1}, "max_drop is in points of accuracy, from 0 to 100, got -0.1"),
        ({"max_drop": math.nan}, "max_drop is in points of accuracy, from 0 to 100, got nan"),
    ],
)
def test_a_run_needs_an_end(trained, options, message):
    with pytest.raises(ValueError, match=message):
        run(trained, **options)


# Weights on levels

LEVELLED = variant(rounds=1, final_epochs=3, bits=2, quantize_epochs=1, level_epochs=2)


@pytest.fixture(scope="module")
def levelled(trained, tmp_path_factory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("levelled")
    return run(trained, target="3x", recipe=LEVELLED, workdir=folder), folder


SHRINKING = variant(structure="element", method="shrink", rounds=None, shrink_epochs=20, shrink_lr=3e-3)
SHRINKING_GROUPS = dataclasses.replace(SHRINKING, structure="filter+column", shrink_epochs=120, shrink_lr=1e-2)


@pytest.mark.parametrize("structure", ["element", "column", "filter+column"])
@pytest.mark.parametrize(("target", "rounds"), [("4x", None), ("10x", 2), ("conv=3,params=8,macs=5", None)])
def test_weights_shrink_until_the_target_is_met(trained, target, rounds, structure):
    recipe = SHRINKING if structure == "element" else SHRINKING_GROUPS
    recipe = dataclasses.replace(recipe, rounds=rounds, structure=structure)
    if (structure, target) == ("column", "10x"):  # which would leave a column or two of every layer, of all filters
        target = "6x"
    result = run(trained, target=target, recipe=recipe)
    goal = Target.parse(target)
    assert goal.met(result.dense, result.small)
    # What was dead cannot come back; a column, and what dies with it, is a large part of a network that small.
    assert goal.excess(result.dense, result.small) > (-0.25 if structure == "element" else -1.0)
    assert result.max_difference < 1e-5
    stages = list(dict.fromkeys(row["stage"] for row in result.history))
    last = rounds or 1
    assert stages == [
        f"round{n}.{kind}" for n in range(1, last + 1) for kind in ("shrink", "final" if n == last else "retrain")
    ]
    assert [row["left"] for row in result.history if row["stage"] == f"round{last}.shrink"][-1] >= result.small.params
    assert result.accuracy["final"] > 60
    for name, layer in result.plan.items():
        assert (layer.elements is not None) == (structure == "element"), name


@pytest.mark.parametrize("structure", ["element", "filter+column"])
def test_a_run_killed_while_weights_shrink_ends_as_one_that_was_not(trained, tmp_path, structure):
    recipe = dataclasses.replace(SHRINKING, rounds=2, shrink_epochs=2, final_epochs=1, structure=structure)
    whole = run(trained, target="6x", recipe=recipe)
    for steps in (5, 40, 70, 120):
        with contextlib.suppress(StopError):
            run(trained, target="6x", recipe=recipe, workdir=tmp_path, progress=Watcher(steps=steps))
    result = run(trained, target="6x", recipe=recipe, workdir=tmp_path)
    assert_same(state(result.model), state(whole.model))
    assert [row["left"] for row in result.history if "left" in row] == [
        row["left"] for row in whole.history if "left" in row
    ]


def test_what_weights_cannot_shrink_towards_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="not seconds: got 2x faster"):
        run(trained, target="2x faster", recipe=SHRINKING, workdir=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_dry_run_counts_the_epochs_in_which_weights_shrink(trained):
    plan = compress(trained, SPLITS, target="4x", recipe=SHRINKING, dry_run=True)
    assert plan.epochs == SHRINKING.shrink_epochs + SHRINKING.final_epochs


@pytest.mark.parametrize(("bits", "levels"), [(1, "binary"), (2, "equal"), (3, "power"), (2, "ternary")])
def test_every_weight_that_is_left_lies_on_a_level(trained, bits, levels):
    recipe = dataclasses.replace(LEVELLED, bits=bits, levels=levels)
    result = run(trained, target="3x", recipe=recipe)
    assert Target(params=3).met(result.dense, result.small)
    for module in result.model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, ColumnConv2d, ColumnLinear)):
            values = module.weight[module.weight != 0]
            units = values.abs() / values.abs().min()
            allowed = torch.tensor(LevelConstraint(bits, levels).levels)
            allowed = allowed[allowed > 0]
            steps = (allowed / allowed.min()).tolist()  # the smallest level may have no weight: any of them is the unit
            assert any(
                all(min(abs(u * s - t) for t in steps) < 1e-4 for u in units.unique().tolist()) for s in steps
            ), units.unique()


def test_levels_do_not_cost_the_network_its_sense(levelled):
    result, _ = levelled
    assert result.accuracy["final"] > 60
    stages = list(dict.fromkeys(row["stage"] for row in result.history))
    portions = ["admm", "50", "80", "95", "100"]
    towards = [f"quantize.{group}.{part}" for group in ("inner", "edge") for part in portions]
    assert stages[2:] == [*towards, "quantize.levels"]


def test_weights_that_go_to_other_levels_never_cost_accuracy(trained):
    """At a learning rate that ruins the network, that training is taken back."""
    validation = run(trained, target="3x", recipe=dataclasses.replace(LEVELLED, level_epochs=0)).accuracy["final"]
    for rate in (1e-3, 30.0):
        watcher = Watcher()
        recipe = dataclasses.replace(LEVELLED, level_lr=rate, level_epochs=3)
        result = run(trained, target="3x", recipe=recipe, progress=watcher)
        assert result.accuracy["final"] >= validation
        assert any("taken back" in note for note in watcher.noted) == (result.accuracy["final"] == validation)


def test_a_run_killed_while_it_goes_to_levels_ends_as_one_that_was_not(trained, levelled, tmp_path):
    expected, _ = levelled
    for steps in (17, 8, 13, 9):  # 6 of ADMM and 9 of retraining come before the 30 towards levels and 6 on them
        with pytest.raises(StopError):
            run(trained, target="3x", recipe=LEVELLED, workdir=tmp_path, progress=Watcher(steps=steps))
    result = run(trained, target="3x", recipe=LEVELLED, workdir=tmp_path)
    assert_same(state(result.model), state(expected.model))
    assert without_seconds(result.history) == without_seconds(expected.history)


def test_files_of_levels_are_read_back(levelled, tmp_path):
    result, _ = levelled
    path = result.save(tmp_path / "small.acf")
    x = SPLITS.test.normalized(slice(8))
    with torch.no_grad():
        expected = result.model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(load(path)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_dry_run_counts_the_trainings_towards_levels(trained):
    options = {"target": "3x", "progress": Progress(), "dry_run": True}
    plain = compress(trained, SPLITS, recipe=dataclasses.replace(LEVELLED, bits=None), **options)
    assert compress(trained, SPLITS, recipe=LEVELLED, **options).epochs == plain.epochs + 10 + 2


@pytest.mark.parametrize("max_drop", [None, 100])
def test_what_meets_the_target_already_is_not_pruned(trained, tmp_path, max_drop):
    recipe = dataclasses.replace(LEVELLED, purify_rounds=0, search=3)
    options = {"target": "1x", "recipe": recipe, "max_drop": max_drop}
    outlook = compress(trained, SPLITS, **options, progress=Progress(), dry_run=True)
    assert outlook.rounds == ()
    assert outlook.small == outlook.dense
    assert "nothing would be pruned" in str(Outlook(outlook))
    result = run(trained, **options, workdir=tmp_path)
    assert len(result.history) == outlook.epochs
    assert {row["stage"].partition(".")[0] for row in result.history} == {"quantize"}
    assert result.rounds == []
    assert result.searches == []
    assert result.small == result.dense
    assert set(result.bits) == {layer.name for layer in result.layers.layers}
    result.report().save_html(tmp_path / "report.html", measure=False)
    again = run(trained, **options, workdir=tmp_path)
    for one, other in zip(result.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_nothing_to_do_gives_the_network_back(trained):
    result = run(trained, target="1x")
    assert result.history == []
    assert result.accuracy["final"] == result.accuracy["base"]
    assert result.small == result.dense
    assert str(result.report())
    x = torch.from_numpy(SPLITS.test.normalized())
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), copy.deepcopy(trained).eval()(x))


def test_shares_that_are_asked_for_are_pruned_for_any_target(trained):
    result = run(trained, target="1x", recipe=variant(keep={"3": (0.1, 0.5)}))
    assert result.small.params < result.dense.params


def test_layers_have_the_bits_that_were_asked_for(trained):
    name = next(layer.name for layer in inspect(trained, torch.from_numpy(SPLITS.test.normalized(slice(2)))).layers)
    result = run(trained, target="3x", recipe=dataclasses.replace(LEVELLED, bits={name: 3}))
    assert result.bits == {name: 3}
    assert result.to_json()["layers"][name]["bits"] == 3
    assert "bits" in str(result.report())
    for path, module in result.model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, ColumnConv2d, ColumnLinear)):
            assert (len(module.weight[module.weight != 0].unique()) <= 8) == (path == name), path


@pytest.mark.parametrize("target", ["bytes=4k", "3x"])
def test_bits_are_searched_for(trained, target, tmp_path):
    """Within the bytes of the target, or those of the bits in the middle; again, the trace says the same."""
    recipe = dataclasses.replace(LEVELLED, bits=(1, 5), quantize_epochs=0, level_epochs=0)
    result = run(trained, target=target, recipe=recipe, workdir=tmp_path)
    assert set(result.bits) == {layer.name for layer in result.layers.layers}
    assert len(set(result.bits.values())) > 1
    assert all(1 <= bits <= 5 for bits in result.bits.values())
    if target.startswith("bytes"):
        assert 3600 < result.save(tmp_path / "small.acf").stat().st_size <= 4000
    trace = (tmp_path / "bits.search.jsonl").read_text()
    for path in tmp_path.glob("quantize*"):
        path.unlink()
    assert run(trained, target=target, recipe=recipe, workdir=tmp_path).bits == result.bits
    assert (tmp_path / "bits.search.jsonl").read_text() == trace


# 8-bit weights and activations

NARROW = variant(rounds=1, final_epochs=3, activation_bits=8, activation_epochs=2)


@pytest.fixture(scope="module")
def narrow(trained, tmp_path_factory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("narrow")
    return run(trained, target="3x", recipe=NARROW, workdir=folder), folder


def test_the_result_computes_with_8_bits(narrow, tmp_path):
    result, _ = narrow
    assert isinstance(result.model, Simulation)
    assert Target(params=3).met(result.dense, result.small)
    engine = load(result.save(tmp_path / "small.acf"))
    layers = [step for step in engine.program.steps if step.op in ("conv", "linear")]
    assert [is_narrow(step) for step in layers] == [step.attributes["storage"] != "sparse" for step in layers]
    assert any(map(is_narrow, layers))
    assert engine.info["provenance"]["quantization"]["samples"] == len(SPLITS.train)
    x = SPLITS.test.normalized()
    found = engine(x)
    with torch.no_grad():
        np.testing.assert_allclose(found, result.model(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-4)
    assert 100 * (found.argmax(1) == SPLITS.test.labels).mean() == pytest.approx(result.accuracy["final_test"])
    assert result.accuracy["final"] > 60
    assert [row["epoch"] for row in result.history if row["stage"] == "activation"] == [1, 2]
    assert str(result.report())


def test_a_run_killed_while_it_rounds_ends_as_one_that_was_not(trained, narrow, tmp_path):
    expected, _ = narrow
    for steps in (16, 4):  # 6 of ADMM and 9 of retraining come before
        with pytest.raises(StopError):
            run(trained, target="3x", recipe=NARROW, workdir=tmp_path, progress=Watcher(steps=steps))
    result = run(trained, target="3x", recipe=NARROW, workdir=tmp_path)
    assert_same(state(result.model), state(expected.model))
    assert without_seconds(result.history) == without_seconds(expected.history)


def test_8_bits_that_cost_too_much_are_taken_back(trained, monkeypatch):
    def harmful(engine, samples):
        found = simulate(quantize(engine, samples))
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.zero_()
        return found.engine()

    monkeypatch.setattr(pipeline, "quantize", harmful)
    watcher = Watcher()
    options = {"target": "2x", "max_drop": 20.0, "progress": watcher}
    result = run(trained, recipe=dataclasses.replace(NARROW, activation_epochs=0), **options)
    assert not isinstance(result.model, Simulation)
    assert result.accuracy["final"] >= result.accuracy["base"] - 20
    assert "which is too little: it stays in float32" in watcher.noted[-1]


def test_8_bits_of_batches_without_training(trained):
    batches = list(BatchLoader(SPLITS.train, 32))
    recipe = dataclasses.replace(NARROW, activation_epochs=0)
    result = run(trained, (batches, list(BatchLoader(SPLITS.validation, 20))), recipe=recipe, target="3x")
    assert isinstance(result.model, Simulation)
    assert "activation" not in {row["stage"] for row in result.history}


def test_what_the_engine_cannot_run_is_said_before_8_bits_are_trained(trained):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = trained

        def forward(self, x):
            return torch.erfinv(self.inner(x).tanh() / 2)

    watcher = Watcher()
    with pytest.raises(UnsupportedError, match="erfinv"):
        run(Odd(), recipe=NARROW, progress=watcher)
    assert watcher.noted == []


def test_a_dry_run_counts_the_training_with_8_bits(trained):
    options = {"target": "3x", "progress": Progress(), "dry_run": True}
    plain = compress(trained, SPLITS, recipe=dataclasses.replace(NARROW, activation_bits=None), **options)
    assert compress(trained, SPLITS, recipe=NARROW, **options).epochs == plain.epochs + 2


# Data of every kind


def test_lists_of_batches(trained):
    train_part = list(BatchLoader(SPLITS.train, 32))
    validation = [(x.numpy(), y.numpy()) for x, y in BatchLoader(SPLITS.validation, 20)]
    result = run(trained, (train_part, validation))
    assert set(result.accuracy) == {"base", "final"}
    assert Target(params=6).met(result.dense, result.small)
    assert "classes" not in result.info


def test_data_sets_without_a_test_part(trained):
    result = run(trained, (SPLITS.train, SPLITS.validation), recipe=variant(rounds=1))
    assert set(result.accuracy) == {"base", "final"}


def test_the_test_part_is_read_once(trained):
    test, validation = Counting(SPLITS.test), Counting(SPLITS.validation)
    result = run(trained, (SPLITS.train, validation, test))
    assert test.read == 1
    assert validation.read > 1
    assert {"base_test", "final_test"} < set(result.accuracy)


@pytest.mark.parametrize("options", [{"exclude": "3"}, {"select": ["0", "7"]}])
def test_layers_that_are_excluded_or_not_selected_stay_as_they_are(trained, options, tmp_path):
    result = run(trained, **options, target="2x", recipe=PURIFYING, workdir=tmp_path)
    held = set(result.layers.held)
    assert held
    assert result.plan.held == held
    for name in held:
        assert result.plan[name].mask().all()
        assert result.model.get_submodule(name).weight.shape == trained.get_submodule(name).weight.shape
    assert result.target.met(result.dense, result.small)
    with pytest.raises(ValueError, match="holds a run with another choice of layers"):
        run(trained, target="2x", recipe=PURIFYING, workdir=tmp_path)


def test_small_data_sets_are_one_batch(trained):
    few = SPLITS.train.subset(slice(10))
    result = run(trained, (few, SPLITS.validation), recipe=variant(rounds=1, batch_size=128))
    assert result.history
    assert all(np.isfinite(row["loss"]) for row in result.history)


@pytest.mark.parametrize("data", [SPLITS.train, (SPLITS.train,), (1, 2, 3, 4), None])
def test_data_in_other_forms_are_refused(trained, data):
    with pytest.raises(TypeError, match="data must be Splits"):
        compress(trained, data, target=2)


def test_what_is_saved_with_it_says_what_the_data_were(whole):
    info = whole[0].info
    assert info["classes"] == ["a", "b", "c"]
    assert info["provenance"]["data"] == "bright"
    assert 0 <= info["accuracy"] <= 1


# Work directories


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_work_directory_holds_the_plan_the_figures_and_the_log(whole):
    result, folder = whole
    stages = ["round1.admm", "round1.retrain", "round2.admm", "round2.final"]
    assert files(folder) == sorted(
        ["log.jsonl", "plan.json", "result.json", "run.json", *(f"{s}.ckpt" for s in stages)]
    )
    assert Plan.load(folder / "plan.json") == result.plan
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result.to_json()))
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert logged == result.history


def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(trained, whole, tmp_path):
    """Three batches an epoch: 6 steps of ADMM, 3 of retraining, 6 of ADMM, 18 at the end; whole epochs are kept."""
    expected, _ = whole
    kills = [{"steps": 1}, {"steps": 7}, {"notes": 3}, {"steps": 1}, {"steps": 4}, {"steps": 8}, {"steps": 2}]
    stages = ["round1.admm", "round1.retrain", "round1.retrain", "round2.admm", "round2.admm", *["round2.final"] * 2]
    for kill, stage in zip(kills, stages, strict=True):
        watcher = Watcher(**kill)
        with pytest.raises(StopError):
            run(trained, workdir=tmp_path, progress=watcher)
        assert watcher.tasks[-1] == stage
    result = run(trained, workdir=tmp_path)
    assert_same(state(result.model), state(expected.model))
    assert result.plan == expected.plan
    assert result.accuracy == expected.accuracy
    assert without_seconds(result.history) == without_seconds(expected.history)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged == result.history


@pytest.fixture(scope="module")
def purified(trained, tmp_path_factory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("purified")
    return run(trained, target="2x", recipe=PURIFYING, workdir=folder), folder


def test_purification_removes_more_than_the_target(trained, purified):
    result, folder = purified
    without = run(trained, target="2x", recipe=variant(rounds=1))
    assert result.small.params < 0.8 * without.small.params
    assert stored(result.model) == result.small.params == result.plan.weights
    assert evaluate(result.model, BatchLoader(SPLITS.validation, 48)).accuracy == result.accuracy["final"]
    assert result.accuracy["final"] >= without.accuracy["final"] - 10
    stages = [row["stage"] for row in result.history]
    assert stages[-2:] == ["purify1", "purify2"]
    assert len(result.purification) == 2
    first, second = result.purification
    assert first["before"]["params"] == without.small.params
    assert second["before"]["params"] == first["after"]["params"]
    assert second["after"]["params"] == result.small.params
    assert [(stage, size.params) for stage, size in result.sizes.items()] == [
        ("round1.final", without.small.params),
        ("purify1", first["after"]["params"]),
        ("purify2", result.small.params),
    ]
    for found in (first, second):
        assert found["scores"][-1] >= first["scores"][0] - 10 or not any(step["weights"] for step in found["steps"])
    assert json.loads((folder / "result.json").read_text())["purification"] == result.purification
    assert "purification in 2 rounds: 2.0x of all weights -> " in str(result.report())


def test_a_run_killed_while_it_purifies_ends_as_one_that_was_not(trained, purified, tmp_path):
    expected, _ = purified
    for kill, last in (
        ({"steps": 25}, "purification"),  # what was begun last
        ({"steps": 11}, "purify1"),
        ({"notes": 3}, "purification 1 of 2"),  # what was said last
        ({"notes": 4}, "purify2: down to"),
        ({"notes": 5}, "purification, round 1 of 1"),
        ({"notes": 6}, "purification 2 of 2"),
    ):
        watcher = Watcher(**kill)
        with pytest.raises(StopError):
            run(trained, target="2x", recipe=PURIFYING, workdir=tmp_path, progress=watcher)
        assert (watcher.tasks if "steps" in kill else watcher.noted)[-1].startswith(last)
    result = run(trained, target="2x", recipe=PURIFYING, workdir=tmp_path)
    assert_same(state(result.model), state(expected.model))
    assert result.plan == expected.plan
    assert without_seconds(result.history) == without_seconds(expected.history)


SEARCHING = variant(rounds=2, search=12, final_epochs=3)


@pytest.fixture(scope="module")
def searched(trained, tmp_path_factory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("searched")
    return run(trained, target="4x", recipe=SEARCHING, workdir=folder), folder


def test_rates_are_searched_for_in_every_round(trained, searched):
    result, folder = searched
    assert result.rates["params"] >= 4
    for number in (1, 2):
        head, *trials = [json.loads(line) for line in (folder / f"round{number}.search.jsonl").read_text().splitlines()]
        assert len(trials) == 12
        assert trials[-1]["best"] >= trials[0]["score"]
        assert head["seed"] == 1000 * number
        assert head["target"] == {"params": 4}  # both look ahead to the end
        assert head.get("before") == (dataclasses.asdict(result.searches[0].action) if number == 2 else None)
        assert [trial.score for trial in result.searches[number - 1].trace] == [trial["score"] for trial in trials]
    assert 4 ** (2 / 3) <= result.dense.params / result.rounds[0]["params"] < 3  # the first goes two thirds of the way
    assert result.plan != run(trained, target="4x", recipe=variant(rounds=2, final_epochs=3)).plan


@pytest.mark.parametrize(
    ("target", "reached", "share", "rate"),
    [
        (Target(conv=216, params=10), 0, 0.2, 6),
        (Target(conv=216, params=10), 1 / 3, 0.5, 36),
        (Target(conv=216, params=10), 0.8, 0.9, 216),
        (Target(conv=216, params=10), 0, 0.5, 216**0.5),  # the round itself goes farther
        (Target(conv=4), 0, 0.5, 4),
    ],
)
def test_a_search_looks_so_far_ahead_of_its_round(target, reached, share, rate):
    dense = Counts(conv=10**6, params=10**6, macs=10**6)
    way = _Way(target, dense, reached, share)
    assert way.part == target.part(share)
    assert target.part(way.ahead).conv == pytest.approx(rate)


def test_a_run_killed_while_it_searches_ends_as_one_that_was_not(trained, searched, tmp_path):
    """In the first search, and in the final training after the second one."""
    expected, _ = searched
    with_workers = dataclasses.replace(SEARCHING, search_workers=2)  # as a run may go on with another number of them
    for recipe, steps, task in ((SEARCHING, 7, "search"), (with_workers, 40, "round2.final")):
        watcher = Watcher(steps=steps)
        with pytest.raises(StopError):
            run(trained, target="4x", recipe=recipe, workdir=tmp_path, progress=watcher)
        assert watcher.tasks[-1] == task
    result = run(trained, target="4x", recipe=SEARCHING, workdir=tmp_path)
    assert_same(state(result.model), state(expected.model))
    assert result.plan == expected.plan


def test_candidates_are_scored_after_steps_of_training(trained):
    notes, starts = [], []
    for steps in (0, 20):
        recipe = variant(rounds=1, search=1, search_steps=steps, admm_epochs=1, final_epochs=1)
        watcher = Watcher()
        starts.append(run(trained, target="4x", recipe=recipe, progress=watcher).searches[0].start)
        notes += [note for note in watcher.noted if ", loss " in note]
    assert starts[0] < starts[1] - 0.05
    assert [note.split(" by experience")[0] for note in notes] == [
        f"round 1: at params 4x, loss {when} {-start:.4g},"
        for when, start in zip(("in one shot", "after 20 steps"), starts, strict=True)
    ]


def test_a_dry_run_counts_the_search(trained):
    def outlook(search):
        options = {"target": "4x", "recipe": variant(search=search), "progress": Progress(), "dry_run": True}
        return compress(trained, SPLITS, **options)

    assert outlook(10**6).epochs == outlook(0).epochs
    assert outlook(10**6).seconds > outlook(0).seconds


def test_the_same_call_in_a_finished_directory_trains_nothing(trained, whole):
    expected, folder = whole
    before = (folder / "result.json").read_bytes()
    listed = files(folder)
    (folder / "round2.final.ckpt.x3_k9a0b.partial").write_bytes(b"of a process that was killed")
    watcher = Watcher()
    result = run(trained, workdir=folder, progress=watcher)
    assert watcher.steps == 0
    assert watcher.tasks == []
    assert_same(state(result.model), state(expected.model))
    assert result.history == expected.history
    assert (folder / "result.json").read_bytes() == before
    assert files(folder) == listed


def test_other_settings_in_a_used_directory_are_refused(trained, whole):
    _, folder = whole
    before = files(folder)
    other = network()
    for model, options, what in (
        (trained, {"target": "7x"}, "target (params 6.0 there, 7.0 here)"),
        (trained, {"target": "conv=6x"}, "target (params 6.0 there, not said here; conv not said there, 6.0 here)"),
        (trained, {"recipe": variant(seed=5)}, "recipe (seed 0 there, 5 here)"),
        (trained, {"recipe": variant(rho=RhoSchedule(0.2))}, "recipe (rho {"),
        (other, {}, "weights; choose another work directory"),
        (other, {"target": "7x"}, "target (params 6.0 there, 7.0 here), weights; choose another work directory"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"holds a run with another {what}")):
            run(model, workdir=folder, **options)
    with pytest.raises(ValueError, match="holds a run with another data; choose"):
        run(trained, workdir=folder, data=dataclasses.replace(SPLITS, train=SPLITS.train.subset(slice(1, None))))
    assert files(folder) == before


def test_a_damaged_run_file_is_refused(trained, tmp_path):
    for content in ("", "[1]", "{"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json does not say what the run in"):
            run(trained, workdir=tmp_path)


def test_train_goes_on_too(tmp_path):
    config = TrainingConfig(3, optimizer="adam", lr=0.01)
    model = network()
    expected = train(model, SPLITS, config, batch_size=32)
    assert_same(state(model), state(network()))
    with pytest.raises(StopError):
        train(model, SPLITS, config, batch_size=32, workdir=tmp_path / "a", progress=Watcher(steps=5))
    continued = train(model, SPLITS, config, batch_size=32, workdir=tmp_path / "a")
    assert_same(state(continued), state(expected))
    assert files(tmp_path / "a") == ["base.ckpt", "log.jsonl"]


def test_what_killed_processes_left_half_written_goes_and_nothing_else(tmp_path):
    for name in ("base.ckpt.x3_k9a0b.partial", "mine.partial"):
        (tmp_path / name).touch()
    train(network(), SPLITS, TrainingConfig(1), batch_size=32, workdir=tmp_path)
    assert files(tmp_path) == ["base.ckpt", "log.jsonl", "mine.partial"]


# Before anything is trained


def test_a_dry_run_trains_nothing_and_says_what_would_happen(trained, tmp_path):
    before = state(trained)
    watcher = Watcher()
    folder = tmp_path / "never"
    plan = compress(trained, SPLITS, target="6x", recipe=RECIPE, workdir=folder, progress=watcher, dry_run=True)
    assert isinstance(plan, DryRun)
    assert_same(state(trained), before)
    assert watcher.steps == 0
    assert not folder.exists()
    assert plan.epochs == 2 + 1 + 2 + 6
    assert plan.seconds > 0
    assert [target.params for target, _ in plan.rounds] == [pytest.approx(6 ** (2 / 3)), pytest.approx(6)]
    assert all(set(constraints) == {"0", "3", "7", "9"} for _, constraints in plan.rounds)


def test_a_dry_run_counts_the_two_trainings_of_filters_before_columns(trained):
    watcher = Watcher()
    recipe = variant(structure="filter-then-column")
    plan = compress(trained, SPLITS, target="6x", recipe=recipe, dry_run=True)
    assert plan.epochs == len(run(trained, recipe=recipe, progress=watcher).history)


def test_a_dry_run_counts_the_epochs_after_purification(trained):
    plan = compress(trained, SPLITS, target="2x", recipe=PURIFYING, dry_run=True)
    assert plan.epochs == len(run(trained, target="2x", recipe=PURIFYING).history)


def test_targets_out_of_reach_are_refused_before_anything_is_written(trained, tmp_path):
    for dry_run in (False, True):
        with pytest.raises(
            ValueError, match=r"params 9000x cannot be met with structure 'filter\+column': at most params"
        ):
            compress(trained, SPLITS, target=9000, workdir=tmp_path / "never", dry_run=dry_run)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "row"}, "structure must be one of"),
        ({"precision": "float16"}, "precision must be one of auto, float32, bfloat16, got 'float16'"),
        ({"rounds": 0}, "rounds must be 1 or more"),
        ({"method": "magnitude"}, "method must be admm or shrink, got 'magnitude'"),
        (
            {"method": "shrink", "structure": "filter"},
            "for the structures element, column, filter\\+column, got 'filter'",
        ),
        ({"method": "shrink", "structure": "element", "search": 5}, "give no search and no keep, got 5"),
        ({"method": "shrink", "structure": "element", "keep": {"0": 0.5}}, "give no search and no keep, got 0"),
        ({"shrink_epochs": 0}, "shrink_epochs must be 1 or more"),
        ({"shrink_lr": -1.0}, "lr must be positive"),
        ({"admm_epochs": 0}, "admm_epochs must be 1 or more"),
        ({"final_epochs": 0}, "final_epochs must be 1 or more"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"search_steps": -1}, "search_steps must be an integer of 0 or more, got -1"),
        ({"search_steps": 2.5}, r"search_steps must be an integer of 0 or more, got 2\.5"),
        ({"purify_rounds": -1}, "purify_rounds must be 0 or more"),
        ({"purify_tolerance": -0.5}, "purify_tolerance must be 0 or more"),
        ({"bits": 0}, "bits must be an int from 1 to 8, got 0"),
        ({"bits": 3, "levels": "binary"}, "binary levels have 1 bits, got 3"),
        ({"bits": {"conv": 9}}, "bits must be an int from 1 to 8, got 9"),
        ({"bits": (5, 2)}, r"bits must be \(at least, at most\), got \(5, 2\)"),
        ({"bits": {}}, "bits are of no layer"),
        ({"levels": "ternary"}, "levels='ternary' needs bits, got none"),
        ({"activation_bits": 4}, "activation_bits must be 8 or not given, got 4"),
        ({"activation_bits": 8, "bits": 4}, "found on the way: give no bits, got 4"),
        ({"activation_bits": 8, "structure": "element"}, "activation_bits need another structure"),
        ({"activation_epochs": -1}, "epochs must be an int, 0 or more"),
        ({"quantize_epochs": -1}, "epochs must be an int, 0 or more"),
        ({"purify_epochs": -1}, "epochs must be an int, 0 or more"),
        ({"retrain_epochs": -1}, "epochs must be an int, 0 or more"),
        ({"admm_lr": 0.0}, "lr must be positive"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"distillation": 1.5}, "distillation must be from 0 to 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_recipes_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_dropout_is_of_the_final_training_and_what_follows():
    recipe = Recipe(dropout=0.2)
    kinds = {kind: recipe.training(kind, 1).dropout for kind in ("admm", "retrain", "final", "purify", "quantize")}
    assert kinds == {"admm": 0.0, "retrain": 0.0, "final": 0.2, "purify": 0.2, "quantize": 0.2}


def test_rounds_are_about_fourfold():
    dense = Counts(1000, 1000, 1000)
    assert [Recipe().rounds_for(Target(params=rate), dense) for rate in (1, 2, 6, 16, 230)] == [0, 1, 1, 2, 4]
    assert Recipe(rounds=3).rounds_for(Target(params=1), dense) == 0  # there is nothing to prune
    assert Recipe(rounds=3).rounds_for(Target(params=2), dense) == 3
    assert Recipe(rounds=5).rounds_for(Target(params=2), dense) == 5


@pytest.mark.parametrize("rounds", [1, 2, 3, 8])
def test_the_steps_of_the_rounds_become_smaller(rounds):
    shares = [_share(number, rounds) for number in range(rounds + 1)]
    steps = np.diff(shares)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert (steps > 0).all()
    assert (np.diff(steps) < 0).all()
    assert rounds == 1 or steps[0] / steps[-1] == pytest.approx(2)


def test_users_batches_as_validation(trained):
    validation = UserBatches(list(BatchLoader(SPLITS.validation, 16)))
    result = run(trained, (SPLITS.train, validation), recipe=variant(rounds=1), example_input=torch.zeros(1, 1, 6, 6))
    assert len(result.example_input) == 1
