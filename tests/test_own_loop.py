"""ADMM and masks in other people's training loops: accumulated gradients, mixed precision, several ranks."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import autocompress_fast as acf

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "own-loop.md"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def assert_same(a, b, **tolerance):
    assert list(a) == list(b)
    for name, value in a.items():
        if tolerance and value.is_floating_point():
            torch.testing.assert_close(value, b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(value, b[name]), name


def alone(**options):
    model = ranks.network(0, **{key: options[key] for key in ("dtype", "norm") if key in options})
    return ranks.train(model, model, **options)


@pytest.fixture(scope="module")
def whole_batches():
    return alone()


# Accumulated gradients


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("penalty_in_every_part", [False, True])
def test_accumulated_parts_end_as_one_large_batch(whole_batches, parts, penalty_in_every_part):
    found = alone(parts=parts, penalty_in_every_part=penalty_in_every_part)
    assert_same(found, whole_batches, rtol=1e-9, atol=1e-11)


def test_a_penalty_of_every_part_undivided_is_another_rho():
    """What the test above would miss if the penalty hardly mattered."""
    model = ranks.network(0)
    admm = acf.ADMM(model, ranks.CONSTRAINTS, rho=0.05)
    gradients = []
    for times in (1, 2):
        model.zero_grad()
        x, y = ranks.batch(0, torch.float64)
        (F.cross_entropy(model(x), y) + times * admm.penalty()).backward()
        gradients.append(model.wide.weight.grad.clone())
    expected = gradients[0] + 0.05 * (model.wide.weight.detach() - admm.z["wide"])
    torch.testing.assert_close(gradients[1], expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)


# Mixed precision


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_penalty_is_float32_and_its_gradient_exact(device, dtype):
    model = ranks.network(0, torch.float32).to(device)
    admm = acf.ADMM(model, ranks.CONSTRAINTS, rho=0.1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1e-3 * torch.randn_like(weight))  # nothing that 16 bits could hold
    admm.update()
    with torch.autocast(device, dtype):
        assert model(torch.zeros(1, 2, 7, 7, device=device)).dtype == dtype
        penalty = admm.penalty()
        penalty.backward()
    assert penalty.dtype == torch.float32
    total = 0.0
    for name in ranks.CONSTRAINTS:
        weight = model.get_submodule(name).weight
        difference = weight.detach() - (admm.z[name] - admm.u[name])
        assert torch.equal(weight.grad, difference * 0.1), name
        total += 0.05 * float(difference.double().square().sum())
    assert penalty.item() == pytest.approx(total, rel=1e-6)


def test_a_gradient_scaler_changes_nothing():
    """Its factors are powers of two: the weights are the same bit for bit."""
    options = {"dtype": torch.float32, "autocast": True}
    assert_same(alone(**options, scaled=True), alone(**options))


@pytest.mark.parametrize("device", DEVICES)
def test_steps_that_overflow_are_left_out_and_dropped_weights_stay_zero(device):
    model = ranks.network(0, torch.float32).to(device)
    admm = acf.ADMM(model, ranks.CONSTRAINTS, rho=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, growth_interval=10)
    skipped, plan = [], None

    def step(number, penalty):
        x, y = (value.to(device) for value in ranks.batch(number, torch.float32))
        before = copy.deepcopy(model.state_dict())
        scale = scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = F.cross_entropy(model(x), y) + penalty()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < scale)
        if skipped[-1]:
            assert_same(model.state_dict(), before)

    for number in range(40):
        step(number, admm.penalty)
    plan = admm.finish()
    with acf.MaskedParameters(model, plan, optimizer):
        scaler.update(2.0**40)
        for number in range(40, 80):
            step(number, lambda: 0.0)
            for name, layer in plan.items():
                assert not model.get_submodule(name).weight[~torch.tensor(layer.mask()).to(device)].any()
    for part in (skipped[:40], skipped[40:]):
        assert any(part)
        assert not all(part)
    assert all(bool(value.isfinite().all()) for value in model.parameters())


def test_weights_of_half_precision_are_refused():
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=f"must be float32 or float64, got {dtype}"):
            acf.ADMM(ranks.network(0).to(dtype), ranks.CONSTRAINTS)


# Several ranks


gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


def on_two_ranks(program, *arguments):
    """Run a program by torchrun, over the loopback interface and whichever ports are free."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(ranks.__file__, folder)
    return folder


@gloo
@pytest.mark.parametrize("name", ranks.RUNS)
def test_ranks_that_see_different_data_end_with_the_same_bits(two_ranks, name):
    first, second = (torch.load(two_ranks / f"{name}.{rank}.pt") for rank in (0, 1))
    assert {key.partition(" ")[0] for key in first} == {"weight", "z", "u", "mask"}
    assert_same(first, second)


@gloo
@pytest.mark.parametrize("name", [name for name, (options, _) in ranks.RUNS.items() if "dtype" not in options])
def test_ranks_end_as_one_process_that_sees_all_data(two_ranks, whole_batches, name):
    assert_same(torch.load(two_ranks / f"{name}.0.pt"), whole_batches, rtol=1e-9, atol=1e-11)


@gloo
def test_ranks_that_differ_and_wrapped_models_are_told(two_ranks):
    said = [json.loads((two_ranks / f"said.{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    differ, *wrapped = said[0]
    assert re.match(
        r"RuntimeError: the ranks differ in Z of 'stem', Z of 'inner', Z of 'wide': make ADMM after", differ
    )
    for message in wrapped:
        assert re.fullmatch(r"ValueError: the model is wrapped in DistributedDataParallel: .*, ddp\.module", message)
    assert len(wrapped) == 7


@gloo
def test_a_search_is_spread_over_the_ranks(two_ranks):
    first, second = (json.loads((two_ranks / f"searched.{rank}.json").read_text()) for rank in (0, 1))
    alone = ranks.searching(lambda found: float(sum(c.keep[1] - 2 * c.keep[0] for c in found.values()))).run(24)
    expected = [[trial.action.weights, trial.score, trial.accepted] for trial in alone.trace]
    for trials, scored, continued, then, disk, minutes, another in (first, second):
        assert trials == continued == expected
        assert 4 < scored < 20  # about half of 24
        assert 2 < then - scored < 12  # 13 were left
        assert re.search(r"on rank 1:.*the disk is full", disk, re.DOTALL)
        assert "ranks would not agree on when 1 minutes are over" in minutes
        assert "is of a search with another seed" in another
    assert len((two_ranks / "ranks.jsonl").read_text().splitlines()) == 1 + 24


@gloo
def test_channels_shrink_alike_on_all_ranks(two_ranks):
    first, second = (torch.load(two_ranks / f"shrunk True.{rank}.pt") for rank in (0, 1))
    assert_same(first, second)
    assert any((value == 0).any() for name, value in first.items() if name.startswith("weight "))
    first, second = (torch.load(two_ranks / f"shrunk False.{rank}.pt") for rank in (0, 1))
    assert not torch.equal(first["state reads.wide"], second["state reads.wide"])


def test_a_search_on_ranks_needs_them():
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed: call init_process_group first"):
        ranks.searching(lambda _: 0.0, workers="ranks").run(2)


def test_without_ranks_there_is_nothing_to_check():
    model = nn.Sequential(nn.Linear(3, 4))
    acf.ADMM(model, {"0": acf.Constraint("filter", 2)}).check_ranks()


# What the page shows


def test_the_code_of_the_page_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    *loops, program = blocks
    names = {}
    for number, block in enumerate(loops, 1):
        exec(compile(block, f"docs/own-loop.md, block {number}", "exec"), names)
    assert number == 5
    capsys.readouterr()
    if dist.is_available() and dist.is_gloo_available():
        (tmp_path / "train.py").write_text(program)
        assert on_two_ranks("train.py").count("filters left") == 1
