"""Training: schedules, losses, and above all that a run which was killed ends as one that was not."""

import copy
import functools
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress_fast.admm import ADMM, Constraint, RhoSchedule
from autocompress_fast.data import Augmentation, BatchLoader, Dataset, UserBatches
from autocompress_fast.graph import Report, inspect
from autocompress_fast.plan import LayerPlan, Plan
from autocompress_fast.progress import Progress
from autocompress_fast.training import Trainer, TrainingConfig, evaluate, evaluate_together, recalibrate

pytestmark = pytest.mark.usefixtures("one_thread")


def dataset(samples: int = 48, seed: int = 0) -> Dataset:
    """Three classes of noisy 6x6 images, told apart by where they are bright."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, samples)
    images = rng.standard_normal((samples, 1, 6, 6)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 2
    return Dataset(images, labels, ("a", "b", "c"), (0.0,), (1.0,))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(80, 3),
        nn.Linear(3, 3),
    )


def loader(seed: int = 0, augmentation: Augmentation | None = None) -> BatchLoader:
    return BatchLoader(dataset(), 16, shuffle=True, seed=seed, augmentation=augmentation)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


class StopError(Exception):
    """What stands for a power cut."""


class StopAfter(Progress):
    """Raises in the given step, counted over the whole run."""

    def __init__(self, steps: int, error: type[BaseException] = StopError) -> None:
        self.steps, self.error = steps, error

    def advance(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise self.error


# Exact resume


def plan() -> Plan:
    rng = np.random.default_rng(0)
    filters = np.array([1, 0, 1, 1], bool)
    return Plan(
        {
            "0": LayerPlan((4, 1, 3, 3), filters, np.ones(9)),
            "3": LayerPlan((5, 4, 3, 3), np.ones(5), rng.random(36) < 0.5),
            "7": LayerPlan((3, 80), np.ones(3), np.ones(80), rng.random((3, 80)) < 0.5),
        },
        {"1.weight": (0, filters), "1.bias": (0, filters)},
    )


CONSTRAINTS = {"0": Constraint("filter", 2), "3": Constraint("filter+column", (3, 12)), "7": Constraint("element", 60)}

RUNS = {
    "sgd": {"optimizer": "sgd"},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "adam, channels last": {"optimizer": "adam", "lr": 0.01, "channels_last": True},
    "sgd, channels last, ADMM": {"optimizer": "sgd", "channels_last": True, "admm": True},
    "adam, ADMM": {"optimizer": "adam", "lr": 0.01, "admm": True},
    "adam, ADMM every second epoch": {"optimizer": "adam", "lr": 0.01, "admm": True, "admm_every": 2},
    "sgd, masks": {"optimizer": "sgd", "plan": True},
    "adam, masks and ADMM": {"optimizer": "adam", "lr": 0.01, "plan": True, "admm": True},
    "augmented": {"optimizer": "adam", "lr": 0.01, "augmentation": True},
    "distillation": {"optimizer": "sgd", "distillation": 0.5},
    "distillation, augmented": {"optimizer": "sgd", "distillation": 0.5, "augmentation": True},
    "dropout": {"optimizer": "sgd", "dropout": 0.2},
    "bfloat16": {"optimizer": "adam", "lr": 0.01, "precision": "bfloat16", "admm": True},
    "step schedule": {"optimizer": "sgd", "schedule": "step", "label_smoothing": 0.1},
}


@functools.cache
def report() -> Report:
    """Of every `network`: ADMM reads none of its weights there."""
    return inspect(network(), torch.zeros(1, 1, 6, 6))


def trainer(folder, options, *, epochs=4, progress=None):
    options = dict(options)
    model = network()
    augmentation = Augmentation(shift=1, flip=True) if options.pop("augmentation", False) else None
    schedule = RhoSchedule(1e-2, factor=2.0)
    admm = ADMM(model, CONSTRAINTS, rho=schedule, report=report()) if options.pop("admm", False) else None
    masks = plan() if options.pop("plan", False) else None
    every = options.pop("admm_every", 1)
    return Trainer(
        model,
        loader(augmentation=augmentation),
        TrainingConfig(epochs, **{"lr": 0.1, **options}),
        validation=BatchLoader(dataset(20, seed=1), 20),
        teacher=network(7) if options.get("distillation") else None,
        admm=admm,
        admm_every=every,
        plan=masks,
        checkpoint=folder / "run.ckpt",
        log=folder / "log.jsonl",
        progress=progress,
    )


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_a_run_killed_anywhere_ends_as_one_that_was_not(options, tmp_path):
    """Three batches an epoch: killed in the first epoch, at the end of one, and in the middle of others, twice."""
    (tmp_path / "whole").mkdir()
    whole = trainer(tmp_path / "whole", options)
    expected = whole.run()
    for steps in ((1,), (3, 4), (7, 1), (6, 3)):
        folder = tmp_path / str(steps)
        folder.mkdir()
        for step in steps:
            with pytest.raises(StopError):
                trainer(folder, options, progress=StopAfter(step)).run()
        continued = trainer(folder, options)
        rows = continued.run()
        assert_same(weights(continued.model), weights(whole.model))
        assert without_seconds(rows) == without_seconds(expected)
        if whole.admm is not None:
            assert_same(continued.admm.z, whole.admm.z)
            assert_same(continued.admm.u, whole.admm.u)
            assert continued.admm.rho == whole.admm.rho
        logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert logged == rows
        assert [row["epoch"] for row in logged] == [1, 2, 3, 4]


def test_the_runs_above_differ(tmp_path):
    """Otherwise a setting that does nothing would pass."""
    results = {}
    for index, (name, options) in enumerate(RUNS.items()):
        (tmp_path / str(index)).mkdir()
        run = trainer(tmp_path / str(index), options, epochs=2)
        run.run()
        results[name] = weights(run.model)["3.weight"]
    same = {("adam", "adam, channels last")}  # up to rounding
    for a in results:
        for b in results:
            if a < b and (a, b) not in same:
                assert not torch.equal(results[a], results[b]), (a, b)


KILLED = """
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import test_training as here

here.torch.set_num_threads(1)

class Announce(here.Progress):
    steps = 0

    def advance(self):
        self.steps += 1
        print(self.steps, flush=True)

options = here.RUNS["adam, masks and ADMM"]
here.trainer(Path({folder!r}), options, epochs=400, progress=Announce()).run()
"""


def test_a_process_killed_without_warning_leaves_a_state_to_go_on_from(tmp_path):
    """SIGKILL at an arbitrary moment, checked against a run that was stopped in the epoch it got to."""
    options = RUNS["adam, masks and ADMM"]
    program = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 8:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    continued = trainer(tmp_path, options, epochs=400, progress=StopAfter(5))
    with pytest.raises(StopError):
        continued.run()
    done = len(continued.history)
    assert done >= 3
    (tmp_path / "whole").mkdir()
    whole = trainer(tmp_path / "whole", options, epochs=400, progress=StopAfter(3 * done + 2))
    with pytest.raises(StopError):
        whole.run()
    assert_same(weights(continued.model), weights(whole.model))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, done + 1))


def test_ctrl_c_leaves_a_state_to_go_on_from(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = trainer(tmp_path / "whole", RUNS["adam"])
    whole.run()
    stopped = trainer(tmp_path, RUNS["adam"], progress=StopAfter(7, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert len(stopped.history) == 2
    stopped.progress = Progress()
    stopped.run()  # the same object goes on, too
    assert_same(weights(stopped.model), weights(whole.model))


def test_a_finished_run_trains_nothing(tmp_path):
    first = trainer(tmp_path, RUNS["adam"])
    rows = first.run()
    again = trainer(tmp_path, RUNS["adam"], progress=StopAfter(0))
    assert again.run() == rows
    assert_same(weights(again.model), weights(first.model))


def test_stages_share_a_log(tmp_path):
    for name in ("first", "second", "first"):
        run = trainer(tmp_path, RUNS["adam"], epochs=2)
        run.name, run.checkpoint = name, tmp_path / f"{name}.ckpt"
        run.run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted((row["stage"], row["epoch"]) for row in rows) == [(s, e) for s in ("first", "second") for e in (1, 2)]


def test_a_line_of_the_log_that_was_cut_off_does_no_harm(tmp_path):
    with pytest.raises(StopError):
        trainer(tmp_path, RUNS["sgd"], progress=StopAfter(4)).run()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"stage": "training", "epo')
    trainer(tmp_path, RUNS["sgd"]).run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


# Checkpoints that are refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.2}, "another lr;"),
        ({"lr": 0.2, "weight_decay": 0.0}, "another lr, weight_decay;"),
        ({"optimizer": "adam"}, "another optimizer"),
        ({"epochs": 5}, "another epochs"),
        ({"seed": 3}, "another seed"),
        ({"channels_last": True}, "another channels_last"),
        ({"plan": True}, "another plan"),
        ({"admm": True}, "another constraints, rho, admm_every"),
    ],
)
def test_another_runs_checkpoint_is_refused_by_its_difference(tmp_path, change, message):
    trainer(tmp_path, {}, epochs=1).run()
    change = dict(change)
    other = trainer(tmp_path, change, epochs=change.pop("epochs", 1))
    before = weights(other.model)
    with pytest.raises(ValueError, match=rf"run\.ckpt is of a run with .*{message}"):
        other.run()
    assert_same(weights(other.model), before)


def test_another_amount_of_data_is_another_run(tmp_path):
    trainer(tmp_path, {}, epochs=1).run()
    other = trainer(tmp_path, {}, epochs=1)
    other.train = BatchLoader(dataset(80), 16, shuffle=True)
    with pytest.raises(ValueError, match="another batches"):
        other.run()


def test_another_rho_is_another_run(tmp_path):
    trainer(tmp_path, {"admm": True}, epochs=1).run()
    other = trainer(tmp_path, {"admm": True}, epochs=1)
    other.admm.rho_schedule = RhoSchedule(0.5)
    with pytest.raises(ValueError, match="another rho"):
        other.run()


def test_another_models_checkpoint_is_refused_before_anything_changes(tmp_path):
    trainer(tmp_path, {}, epochs=1).run()
    for wrong in (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 5, 3, bias=False), nn.Conv2d(4, 5, 3, dtype=torch.float64)):
        other = trainer(tmp_path, {}, epochs=1)
        other.model[3] = wrong
        before = weights(other.model)
        with pytest.raises(ValueError, match=r"run\.ckpt is of another model: .*3\."):
            other.run()
        assert_same(weights(other.model), before)


def test_another_stages_checkpoint_is_refused(tmp_path):
    trainer(tmp_path, {}, epochs=1).run()
    other = trainer(tmp_path, {}, epochs=1)
    other.name = "retrain"
    with pytest.raises(ValueError, match=r"is of 'training', version 1, not 'retrain'"):
        other.run()


def test_damaged_checkpoints_are_refused(tmp_path):
    trainer(tmp_path, RUNS["adam"], epochs=1).run()
    path = tmp_path / "run.ckpt"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-20] ^= 4  # a weight
    number = good.replace(b'\\"epoch\\": 1', b'\\"epoch\\": 2')
    assert number != good
    for content in (b"", good[:100], good[:-7], b"\0" * 64, b"{}", bytes(flipped), number, good + b"x"):
        path.write_bytes(content)
        run = trainer(tmp_path, RUNS["adam"], epochs=1)
        before = weights(run.model)
        with pytest.raises(ValueError, match=r"run\.ckpt is damaged, or no checkpoint of a training: ."):
            run.run()
        assert_same(weights(run.model), before)
    path.write_bytes(good)
    trainer(tmp_path, RUNS["adam"], epochs=1).run()


def test_other_safetensors_are_no_checkpoint(tmp_path):
    from safetensors.torch import save_file

    for metadata in (None, {"trainer": "{}"}, {"trainer": "[]", "crc32": "0"}):
        save_file({"model.a": torch.zeros(2)}, tmp_path / "run.ckpt", metadata)
        with pytest.raises(ValueError, match="damaged, or no checkpoint"):
            trainer(tmp_path, {}, epochs=1).run()


# What is put back


def test_the_global_random_state_is_not_touched(tmp_path):
    torch.manual_seed(123)
    expected = torch.rand(3)
    for options in ({}, RUNS["augmented"], RUNS["distillation"]):
        run = trainer(tmp_path, options, epochs=1)
        run.checkpoint = None
        torch.manual_seed(123)
        np.random.seed(5)  # noqa: NPY002 - this is the state in question
        state = np.random.get_state()[1].copy()  # noqa: NPY002
        run.run()
        assert torch.equal(torch.rand(3), expected)
        np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    stopped = trainer(tmp_path, {}, progress=StopAfter(1))
    torch.manual_seed(123)
    with pytest.raises(StopError):
        stopped.run()
    assert torch.equal(torch.rand(3), expected)


def test_a_run_does_not_depend_on_the_global_random_state(tmp_path):
    results = []
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        run = trainer(tmp_path / str(seed), RUNS["augmented"], epochs=1)
        torch.manual_seed(seed)
        run.run()
        results.append(weights(run.model))
    assert_same(*results)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stop", [False, True])
def test_modes_and_memory_layouts_are_put_back(tmp_path, channels_last, stop):
    options = {"channels_last": channels_last, "distillation": 0.5}
    run = trainer(tmp_path, options, epochs=1, progress=StopAfter(1) if stop else None)
    run.model.eval()
    run.model[5].train()
    with torch.no_grad():
        run.model[3].weight.data = run.model[3].weight.data.contiguous(memory_format=torch.channels_last)
    run.teacher.train()
    run.teacher[5].eval()
    layouts = {name: p.stride() for name, p in run.model.named_parameters()}
    layouts |= {f"teacher.{name}": p.stride() for name, p in run.teacher.named_parameters()}
    modes = [module.training for model in (run.model, run.teacher) for module in model.modules()]
    if stop:
        with pytest.raises(StopError):
            run.run()
    else:
        run.run()
    assert layouts == {name: p.stride() for name, p in run.model.named_parameters()} | {
        f"teacher.{name}": p.stride() for name, p in run.teacher.named_parameters()
    }
    assert modes == [module.training for model in (run.model, run.teacher) for module in model.modules()]


def test_channels_last_leaves_other_dimensions_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(8, 1, 3, 3, 3)
    config = TrainingConfig(1, channels_last=True)
    before = model[0].weight.detach().clone()
    history = Trainer(model, UserBatches([(x, torch.arange(8) % 2)]), config).run()
    assert len(history) == 1
    assert model[0].weight.is_contiguous()
    assert not torch.equal(model[0].weight, before)


# The loss


def one_step(model, config, **options):
    """Gradients of the first step of a run, read from the change that plain SGD with a rate of 1 makes."""
    x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    y = torch.arange(8) % 3
    before = weights(model)
    Trainer(model, UserBatches([(x, y)]), config, **options).run()
    return x, y, {name: before[name] - value for name, value in model.named_parameters()}


def plain(**options):
    return TrainingConfig(1, lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0, **options)


def without_dropout(seed=0):
    model = network(seed)
    model[5] = nn.Identity()
    return model


def assert_gradients(found, model, loss):
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].detach(), parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing(smoothing):
    model = without_dropout()
    oracle = copy.deepcopy(model).train()
    x, y, found = one_step(model, plain(label_smoothing=smoothing))
    wanted = (1 - smoothing) * F.one_hot(y, 3) + smoothing / 3
    assert_gradients(found, oracle, -(wanted * oracle(x).log_softmax(dim=1)).sum(dim=1).mean())


def test_dropout_leaves_out_inputs_of_fully_connected_layers_while_training():
    """Seen by the layer itself: whole batches of 1, of which each number is 0 or 1 / (1 - share)."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(72, 50), nn.Linear(50, 3))
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.fill_(1.0)
    seen = {layer: [] for layer in model}
    for layer in model:
        layer.register_forward_hook(lambda layer, inputs, _: seen[layer].append((layer.training, inputs[0].detach())))
    data = UserBatches([(torch.randn(64, 1, 6, 6), torch.arange(64) % 3)])
    Trainer(model, data, TrainingConfig(1, lr=1e-3, dropout=0.25), validation=data).run()
    (trains, inside), (evaluates, outside) = seen[model[2]]
    assert (trains, evaluates) == (True, False)
    torch.testing.assert_close(inside.unique(), torch.tensor([0.0, 4 / 3]))
    assert (inside == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert len({tuple(row.tolist()) for row in inside}) == 64  # of each sample others
    torch.testing.assert_close(outside, torch.ones(64, 72), atol=0.01, rtol=0)
    assert (seen[model[3]][0][1] != 0).all()
    assert (seen[model[0]][0][1] != 0).all()
    model(torch.zeros(1, 1, 6, 6))  # in training mode: of the user again
    assert (seen[model[2]][-1][1] != 0).all()


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_distillation_is_the_divergence_from_the_softened_teacher_times_t_squared(share):
    model, teacher = without_dropout(), network(7)
    before = weights(teacher)
    oracle = copy.deepcopy(model).train()
    x, y, found = one_step(model, plain(distillation=share, temperature=3.0), teacher=teacher)
    with torch.no_grad():
        theirs = (copy.deepcopy(teacher).eval()(x) / 3).softmax(dim=1)
    logits = oracle(x)
    divergence = (theirs * (theirs.log() - (logits / 3).log_softmax(dim=1))).sum(dim=1).mean()
    assert_gradients(found, oracle, (1 - share) * F.cross_entropy(logits, y) + share * 9 * divergence)
    assert_same(weights(teacher), before)  # its normalisations, too
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teachers_logits_known_beforehand_are_those_of_every_batch(tmp_path):
    """The same run with a loader that the trainer cannot look into, so that the teacher is asked for every batch."""
    (tmp_path / "2").mkdir()
    known, asked = trainer(tmp_path, RUNS["distillation"]), trainer(tmp_path / "2", RUNS["distillation"])
    inner = asked.train

    class Opaque:
        def __len__(self):
            return len(inner)

        def epoch(self, index):
            return inner.epoch(index)

    asked.train = Opaque()
    for run in (known, asked):
        run.teacher[1].running_mean.fill_(0.3)
        run.run()
    for name, value in weights(known.model).items():
        torch.testing.assert_close(value, weights(asked.model)[name], rtol=1e-3, atol=1e-4)
    assert known._known_logits is not None
    assert asked._known_logits is None


def test_no_distillation_needs_no_teacher():
    with pytest.raises(ValueError, match=r"distillation=0\.5 needs a teacher, got none"):
        Trainer(network(), loader(), TrainingConfig(1, distillation=0.5))
    with pytest.raises(ValueError, match="admm_every must be 1 or more, got 0"):
        Trainer(network(), loader(), TrainingConfig(1), admm_every=0)


def test_the_admm_penalty_is_added():
    model = without_dropout()
    oracle = copy.deepcopy(model).train()
    admm = ADMM(model, {"7": Constraint("column", 20)}, rho=0.5)
    z = admm.z["7"].clone()
    x, y, found = one_step(model, plain(), admm=admm)
    assert_gradients(found, oracle, F.cross_entropy(oracle(x), y) + 0.25 * (oracle[7].weight - z).square().sum())
    assert admm.updates == 1


def test_weight_decay_is_for_weights_alone():
    model = without_dropout()
    decayed = copy.deepcopy(model)
    _, _, found = one_step(model, plain())
    before = weights(decayed)
    config = TrainingConfig(1, lr=1.0, momentum=0.0, weight_decay=0.1, schedule="constant", warmup=0.0)
    _, _, with_decay = one_step(decayed, config)
    for name, change in found.items():
        expected = change + 0.1 * before[name] if change.ndim >= 2 else change
        torch.testing.assert_close(with_decay[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_masked_weights_stay_zero_through_a_whole_training(tmp_path):
    run = trainer(tmp_path, RUNS["adam, masks and ADMM"])
    run.run()
    for name, layer in plan().items():
        assert not run.model.get_submodule(name).weight[~torch.tensor(layer.mask())].any()
    assert not run.model[1].bias[1]
    # and after it the masks are gone
    run.model(torch.randn(4, 1, 6, 6)).sum().backward()
    assert run.model[3].weight.grad[~torch.tensor(plan()["3"].mask())].any()


def test_training_learns(tmp_path):
    run = trainer(tmp_path, {"optimizer": "adam", "lr": 0.02}, epochs=12)
    rows = run.run()
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert rows[-1]["validation"] == evaluate(run.model, run.validation).accuracy > 90
    assert {"stage", "epoch", "loss", "validation", "seconds"} == set(rows[0])


def test_frozen_normalisations_keep_their_statistics():
    frozen, trained = network(), network()
    for parameter in frozen[1].parameters():
        parameter.requires_grad_(False)
    before = weights(frozen)
    for model in (frozen, trained):
        Trainer(model, loader(), TrainingConfig(2, lr=0.01)).run()
    after = weights(frozen)
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("1."))
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(trained[1].running_mean, before["1.running_mean"])


def test_admm_metrics_are_logged(tmp_path):
    rows = trainer(tmp_path, RUNS["adam, ADMM every second epoch"]).run()
    assert ["primal" in row for row in rows] == [False, True, False, True]
    assert rows[1]["rho"] == pytest.approx(0.02)
    assert rows[3]["rho"] == pytest.approx(0.04)
    assert 0 < rows[3]["primal"] < 1


@pytest.mark.parametrize("options", [{}, {"admm": True, "plan": True}])
def test_divergence_stops_with_a_message_and_keeps_the_last_checkpoint(tmp_path, options):
    run = trainer(tmp_path, options)
    good = loader()

    class TurnsBad:
        def __len__(self):
            return len(good)

        def epoch(self, index):
            for x, y in good.epoch(index):
                yield (x * 1e38 if index == 2 else x), y

    run.train = TurnsBad()
    with pytest.raises(FloatingPointError, match=r"training: training diverged in epoch 3 .*below 0\.1 may help"):
        run.run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    again = trainer(tmp_path, options, progress=StopAfter(0))  # with the good data
    with pytest.raises(StopError):
        again.run()
    assert all(p.isfinite().all() for p in again.model.parameters())
    assert len(again.history) == 2


# Schedules


def rates(steps: int = 20, **options: object) -> list[float]:
    config = TrainingConfig(1, lr=2.0, **options)
    return [config.rate(step, steps) for step in range(steps)]


def test_constant_and_warmup():
    assert rates(schedule="constant", warmup=0.0) == [2.0] * 20
    assert rates(schedule="constant", warmup=0.25) == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0] + [2.0] * 15)


def test_cosine_falls_from_the_peak_to_nothing():
    found = rates(schedule="cosine", warmup=0.0)
    assert found == pytest.approx([1 + math.cos(math.pi * step / 20) for step in range(20)])
    found = rates(schedule="cosine", warmup=0.2)
    assert found[4] == 2.0
    assert found[12] == pytest.approx(1.0)
    assert found[4:] == sorted(found[4:], reverse=True)


def test_steps():
    found = rates(schedule="step", warmup=0.0, milestones=(0.5, 0.75), gamma=0.1)
    assert found == pytest.approx([2.0] * 10 + [0.2] * 5 + [0.02] * 5)


def test_the_peak_is_never_exceeded_however_short_the_run():
    for schedule in ("cosine", "step", "constant"):
        for steps in range(1, 30):
            for warmup in (0.0, 0.1, 0.33, 1.0):
                found = rates(steps, schedule=schedule, warmup=warmup)
                assert all(0 < rate <= 2.0 for rate in found)


def test_the_rate_reaches_the_optimizer(tmp_path):
    run = trainer(tmp_path, {"schedule": "step", "warmup": 0.0}, epochs=4)
    seen = []
    step = run.optimizer.step
    run.optimizer.step = lambda: (seen.append({group["lr"] for group in run.optimizer.param_groups}), step())
    run.run()
    assert seen == [{0.1}] * 6 + [{0.1 * 0.1}] * 3 + [{0.1 * 0.1**2}] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs must be an int, 0 or more, got -1"),
        ({"epochs": 1.5}, "epochs must be an int"),
        ({"seed": -1}, "seed must be an int, 0 or more"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, got 'lion'"),
        ({"schedule": "linear"}, "schedule must be one of cosine, step, constant, got 'linear'"),
        ({"precision": "float16"}, "precision must be one of auto, float32, bfloat16, got 'float16'"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"temperature": math.inf}, "temperature must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative"),
        ({"gamma": math.nan}, "gamma must be finite"),
        ({"warmup": 1.1}, "warmup must be from 0 to 1"),
        ({"momentum": -0.1}, "momentum must be from 0 to 1"),
        ({"label_smoothing": math.nan}, "label_smoothing must be from 0 to 1"),
        ({"distillation": 2.0}, "distillation must be from 0 to 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
        ({"milestones": (0.5, 30)}, "milestones must be from 0 to 1, got 30"),
    ],
)
def test_configurations_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"epochs": 1, **options})


def test_no_epochs_train_nothing(tmp_path):
    run = trainer(tmp_path, {}, epochs=0)
    before = weights(run.model)
    assert run.run() == []
    assert_same(weights(run.model), before)


# Evaluation


def test_evaluation_is_exact_and_leaves_modes_as_they_were():
    model = network().train()
    model[1].eval()
    data = dataset(50)
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(torch.from_numpy(data.normalized()))
    y = torch.from_numpy(data.labels)
    result = evaluate(model, BatchLoader(data, 16))
    assert result.samples == 50
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert [module.training for module in model] == [True, False, *[True] * 7]


def test_models_evaluated_together_read_the_batches_once():
    read = []

    class Counting:
        def __len__(self):
            return 1

        def epoch(self, index):
            read.append(index)
            return BatchLoader(dataset(), 48).epoch(index)

    models = [network(seed) for seed in range(3)]
    together = evaluate_together(models, Counting())
    assert read == [0]
    assert together == [evaluate(model, Counting()) for model in models]


def test_evaluation_in_bfloat16_and_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    stride = model[0].weight.stride()
    batches = UserBatches([(torch.randn(64, 3, 6, 6), torch.randint(4, (64,)))])
    exact = evaluate(model, batches)
    rounded = evaluate(model, batches, precision="bfloat16")
    assert evaluate(model, batches, channels_last=True).loss == pytest.approx(exact.loss, rel=1e-5)
    assert rounded.loss == pytest.approx(exact.loss, rel=1e-2)
    assert rounded.loss != exact.loss
    assert model[0].weight.stride() == stride
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'half'"):
        evaluate(model, batches, precision="half")


def test_recalibration_measures_the_statistics_and_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, 4)
    ).eval()
    model[1].running_mean.fill_(9)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
    images = [torch.randn(16, 3, 6, 6) for _ in range(3)]
    recalibrate(model, [(x, None) for x in images])
    with torch.no_grad():
        outputs = [model[0](x) for x in images]
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0))
    assert model[1].momentum == 0.1
    assert not any(module.training for module in model.modules())
    for name, value in before.items():
        if "num_batches" not in name:
            assert torch.equal(model.state_dict()[name], value), name


def test_nothing_to_evaluate_on():
    class Empty:
        def __len__(self):
            return 0

        def epoch(self, _index):
            return iter(())

    with pytest.raises(ValueError, match="there is no batch"):
        evaluate(network(), Empty())


@pytest.fixture
def narrow(monkeypatch):
    """A CPU that has, or has not, instructions for bfloat16."""
    return lambda has: monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)


def columns_kept(model, share):
    """A plan by which every layer keeps its first columns."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            columns = np.arange(module.weight[0].numel()) < share * module.weight[0].numel()
            layers[name] = LayerPlan(tuple(module.weight.shape), np.ones(module.out_channels, dtype=bool), columns)
    return Plan(layers)


@pytest.mark.parametrize(
    ("kept", "has", "options", "expected"),
    [
        (1.0, True, {}, "bfloat16"),
        (0.4, True, {}, "bfloat16"),  # the kernels are quicker than float32 there, but not than bfloat16
        (0.2, True, {}, "float32"),
        (0.2, True, {"kernels": "torch"}, "bfloat16"),
        (0.2, True, {"compile": True}, "bfloat16"),
        (1.0, False, {}, "float32"),
        (0.2, True, {"precision": "bfloat16"}, "bfloat16"),
        (1.0, True, {"precision": "float32"}, "float32"),
    ],
)
def test_auto_is_the_precision_that_is_quicker_for_what_is_kept(narrow, kept, has, options, expected):
    narrow(has)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 20, 3))
    config = TrainingConfig(1, **{"precision": "auto", **options})
    assert config.settled(model, columns_kept(model, kept)).precision == expected


def test_auto_is_float32_for_networks_of_few_channels(narrow):
    narrow(True)
    thin = nn.Sequential(nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5))
    assert TrainingConfig(1, precision="auto").settled(thin).precision == "float32"
    assert TrainingConfig(1, precision="auto").settled(nn.Linear(4, 2)).precision == "bfloat16"  # no kernels for it


def test_a_run_continues_in_the_precision_it_began_with(tmp_path, narrow):
    """Also on a CPU where another one would be chosen."""

    def trained(checkpoint=None, progress=None):
        model = network()
        config = TrainingConfig(epochs=2, lr=0.01, precision="auto", kernels="torch")
        Trainer(model, loader(), config, checkpoint=checkpoint, progress=progress).run()
        return weights(model)

    narrow(True)
    whole = trained()
    with pytest.raises(StopError):
        trained(tmp_path / "a.ckpt", StopAfter(4))
    narrow(False)
    assert_same(trained(tmp_path / "a.ckpt"), whole)
    assert not torch.equal(trained()["0.weight"], whole["0.weight"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch has deprecated
def test_compiled_training_goes_the_same_way():
    trained = []
    for compiled in (False, True):
        model = network()
        model[5] = nn.Identity()  # dropout draws other numbers when compiled
        config = TrainingConfig(epochs=2, lr=0.05, distillation=0.5, channels_last=True, compile=compiled)
        Trainer(model, loader(), config, teacher=network(1).eval()).run()
        trained.append(weights(model))
    assert list(trained[0]) == list(trained[1])
    assert not torch.equal(trained[0]["7.weight"], network()[7].weight)
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-3, atol=1e-4)
