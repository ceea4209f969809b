"""Small trainings, in one process or on the ranks of torchrun: under ADMM and then masks, and of channels that shrink.

test_own_loop.py starts it as a program on two ranks, and compares what they leave in a folder.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import autocompress_fast as acf

# options of `train`, and what DistributedDataParallel is made with
RUNS = {
    "plain": ({}, {}),
    "gradients in buckets": ({}, {"gradient_as_bucket_view": True}),
    "a static graph": ({}, {"static_graph": True}),
    "four parts accumulated": ({"parts": 4}, {}),
    "bfloat16": ({"dtype": torch.float32, "autocast": True}, {}),
    "bfloat16 and a gradient scaler": ({"dtype": torch.float32, "autocast": True, "scaled": True}, {}),
    "normalised": ({"dtype": torch.float32, "norm": nn.BatchNorm2d}, {}),
}


class Net(nn.Module):
    """`stem` and `inner` are tied by an addition."""

    def __init__(self, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.wide, self.head = norm(8), nn.Conv2d(8, 12, 3), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.norm(x + self.inner(x.relu())).relu()
        return self.head(self.wide(x).relu().mean((2, 3)))


CONSTRAINTS = {
    "stem": acf.Constraint("filter+column", (5, 12)),
    "inner": acf.Constraint("filter+column", (5, 30)),
    "wide": acf.Constraint("column", 40),
}


def network(seed: int, dtype: torch.dtype = torch.float64, norm: type[nn.Module] = nn.Identity) -> Net:
    torch.manual_seed(seed)
    return Net(norm).to(dtype)


def batch(step: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """32 images of every step; a rank sees its part of them."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 2, 7, 7, generator=generator, dtype=dtype)
    return x, (x.mean((2, 3)).sum(1) * 20).long().clamp(-1, 2) + 1


def admm_of(model: nn.Module, dtype: torch.dtype) -> acf.ADMM:
    report = acf.inspect(model, torch.zeros(1, 2, 7, 7, dtype=dtype))
    return acf.ADMM(model, CONSTRAINTS, rho=acf.RhoSchedule(0.05, factor=2.0, maximum=0.2), report=report)


def train(
    model: nn.Module,
    inner: nn.Module,
    *,
    dtype: torch.dtype = torch.float64,
    norm: object = None,
    part: slice = slice(None),
    parts: int = 1,
    penalty_in_every_part: bool = False,
    autocast: bool = False,
    scaled: bool = False,
) -> dict[str, torch.Tensor]:
    """Train `model`, which is `inner` or wraps it; returns weights, Z, U and masks.

    Args:
        part: of every batch, that this rank sees.
        parts: that the gradient of a step is accumulated over.
        penalty_in_every_part: divided by their number, instead of once a step.
    """
    del norm
    admm = admm_of(inner, dtype)
    optimizer = torch.optim.SGD(inner.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    unsynchronised = getattr(model, "no_sync", contextlib.nullcontext)

    def step(number: int, penalty) -> None:
        optimizer.zero_grad()
        x, y = (value[part] for value in batch(number, dtype))
        for index, (images, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            last = index == parts - 1
            with contextlib.nullcontext() if last else unsynchronised():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = F.cross_entropy(model(images), labels) / parts
                    if penalty_in_every_part:
                        loss = loss + penalty() / parts
                    elif last:
                        loss = loss + penalty()
                scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    for epoch in range(4):
        for number in range(4):
            step(4 * epoch + number, admm.penalty)
        admm.update()
        admm.check_ranks()
    plan = admm.finish()
    with acf.MaskedParameters(inner, plan, optimizer):
        for number in range(16, 20):
            step(number, lambda: torch.zeros(()))
    admm.check_ranks()
    found = {f"weight {name}": value.detach().clone() for name, value in inner.named_parameters()}
    found |= {f"z {name}": z for name, z in admm.z.items()} | {f"u {name}": u for name, u in admm.u.items()}
    return found | {f"mask {name}": torch.from_numpy(kept) for name, kept in plan.masks().items()}


def shrunk(model: nn.Module, inner: nn.Module, *, part: slice, ranks: bool) -> dict[str, torch.Tensor]:
    """Train while columns and channels shrink; returns weights, and what each layer was found to read."""
    report = acf.inspect(inner, torch.zeros(1, 2, 7, 7, dtype=torch.float64))
    shrinkage = acf.GroupShrinkage.towards(report, acf.Target(params=3), steps=32)
    optimizer = torch.optim.Adam(inner.parameters(), 0.01)
    with acf.ShrunkGroups(inner, shrinkage, optimizer, ranks=ranks) as shrinking:
        for number in range(32):
            x, y = (value[part] for value in batch(number, torch.float64))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        found = {f"state {name}": value.clone() for name, value in shrinking.state_dict().items()}
    return found | {f"weight {name}": value.detach().clone() for name, value in inner.named_parameters()}


def on_a_rank(folder: Path) -> None:
    """Every run, begun with other weights on every rank, and what is said of mistakes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, (options, wrapping) in RUNS.items():
        inner = network(rank, **{key: options[key] for key in ("dtype", "norm") if key in options})
        found = train(DistributedDataParallel(inner, **wrapping), inner, part=slice(rank, None, ranks), **options)
        torch.save(found, folder / f"{name}.{rank}.pt")
    for alike in (True, False):
        inner = network(rank)
        found = shrunk(DistributedDataParallel(inner), inner, part=slice(rank, None, ranks), ranks=alike)
        torch.save(found, folder / f"shrunk {alike}.{rank}.pt")
    (folder / f"said.{rank}.json").write_text(json.dumps(list(mistakes(rank))))
    (folder / f"searched.{rank}.json").write_text(json.dumps(list(searches(rank, folder))))
    dist.destroy_process_group()


def searching(score, **options) -> acf.Search:
    report = acf.inspect(network(0), torch.zeros(1, 2, 7, 7, dtype=torch.float64))
    return acf.Search(report, acf.Target(params=2), score, **options)


def searches(rank: int, folder: Path):
    """The trials of a search on all ranks, of one that goes on from half of its trace, and what is said of mistakes."""
    scored = []

    def score(constraints):
        scored.append(constraints)
        return float(sum(c.keep[1] - 2 * c.keep[0] for c in constraints.values()))

    def trials(found):
        return [(trial.action.weights, trial.score, trial.accepted) for trial in found.trace]

    trace = folder / "ranks.jsonl"
    yield trials(searching(score, workers="ranks", trace=trace).run(24))
    yield len(scored)
    if rank == 0:
        trace.write_text("".join(trace.read_text().splitlines(keepends=True)[:12]))
    dist.barrier()
    yield trials(searching(score, workers="ranks", trace=trace).run(24))
    yield len(scored)

    def fails(constraints):
        if rank == 1:
            raise ValueError("the disk is full")
        return score(constraints)

    for search, budget in (
        (searching(fails, workers="ranks"), {"evaluations": 8}),
        (searching(score, workers="ranks"), {"minutes": 1}),
        (searching(score, workers="ranks", trace=trace, seed=5), {"evaluations": 24}),
    ):
        try:
            search.run(**budget)
            yield "nothing"
        except (ValueError, RuntimeError) as error:
            yield str(error)


def mistakes(rank: int):
    """What is said when ADMM is made before the ranks have the same weights, and of wrapped models."""
    inner, x = network(rank), torch.zeros(1, 2, 7, 7, dtype=torch.float64)
    admm = admm_of(inner, torch.float64)
    ddp = DistributedDataParallel(inner)
    plan = acf.Plan.uniform(acf.inspect(inner, x), filters=0.5)
    optimizer = torch.optim.SGD(inner.parameters(), 0.1)
    for call in (
        admm.check_ranks,
        lambda: acf.inspect(ddp, x),
        lambda: acf.ADMM(ddp, CONSTRAINTS),
        lambda: acf.mask(ddp, plan),
        lambda: acf.MaskedParameters(ddp, plan, optimizer),
        lambda: acf.compact(ddp, plan, x),
        lambda: acf.purify(ddp, lambda _: 0.0, x, plan=plan),
        lambda: acf.compile(ddp, x),
    ):
        try:
            call()
            yield "nothing"
        except (ValueError, RuntimeError) as error:
            yield f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    on_a_rank(Path(sys.argv[1]))
