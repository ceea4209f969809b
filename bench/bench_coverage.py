"""Reading, pruning and cutting the networks of the zoo (tests/zoo.py): ours against torch-pruning, side by side.

    python bench/bench_coverage.py --report docs/coverage.md        all of them; about half an hour
    python bench/bench_coverage.py --models resnet18,shufflenet_v2_x0_5

Every network has random weights and batch statistics and is a process of its own, so that a crash or a hang is one row.

Both are asked for the same: half of the channels of every layer but the last, by the norm of coupled channels.

- Ours: ``inspect``, ``Plan.uniform(report, filters=0.5)``, ``compact(report=report)``. The time includes that
  it runs the masked and the compacted network and compares them.
- Theirs: ``BasePruner(model, images, importance=GroupMagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=[the
  classifier])``, then ``step()``. It works in place and checks nothing.

Times are medians of runs taken in turns, float32, one thread; the copy of the model that theirs works on is not timed.

Verdicts come from a run in float64, on images that neither of them saw. A pruned network is right when it computes what
the dense network computes with zeros in exactly the parameters that were cut out: largest difference at most 1e-8 of
the largest output. For theirs these parameters are not guessed from its groups: before ``step()`` the gradient of every
parameter is set to the numbers of its elements, its pruning functions cut the gradient along with the parameter, and so
what is left says which elements are left. A cut input channel is zeroed in the weight that read it, too, so it does not
matter that a gate of 0.5 or a bias stands where the channel was.

- right: as above.
- renormalised: right once the dense network's layer, group and similar norms are taken over the kept channels only.
  The pruned network is consistent, but it is not the masked one: what was measured with masks does not hold for it.
- wrong: neither. Channels were mixed up, or an operator across channels sees others than before.
- unchanged: nothing was removed.
- crash, hang: an exception while reading, pruning or in the pruned network's forward; more than a minute.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib
import importlib.metadata
import json
import multiprocessing
import platform
import re
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autocompress_fast as acf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from zoo import ZOO, Entry, build, define_operators, example

TOLERANCE = 1e-8  # of the largest output, float64
LIMIT = 60.0  # seconds without a sign of life, after which a side counts as hanging
RUNS = 3
SLOW = 20.0  # seconds; one run will do
PEER = "torch-pruning"


@dataclass
class Side:
    """What one of the two made of a network."""

    verdict: str = "crash"
    message: str = ""
    left: float | None = None  # share of the parameters
    seconds: list[float] = field(default_factory=list)


@dataclass
class Row:
    """A network of the table."""

    entry: Entry
    network: dict[str, Any] = field(default_factory=dict)
    ours: Side = field(default_factory=Side)
    theirs: Side = field(default_factory=Side)


# ---- the two


def prune_ours(model: nn.Module, images: torch.Tensor) -> tuple[Any, Any, Any]:
    report = acf.inspect(model, images)
    plan = acf.Plan.uniform(report, filters=0.5, columns=0.0)
    return report, plan, acf.compact(model, plan, images, report=report)


def prune_theirs(model: nn.Module, images: torch.Tensor, prepare: Callable[[], None] | None = None) -> nn.Module:
    import torch_pruning

    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    last = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and classes == len(module.weight)
    ]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        images,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=last,
        in_channel_groups={},  # the default is one dictionary for all pruners of the process
        out_channel_groups={},
        num_heads={},
    )
    if prepare is not None:
        prepare()
    pruner.step()
    return model


# ---- verdicts


def judge_ours(model: nn.Module, images: torch.Tensor, fresh: torch.Tensor, network: dict[str, Any]) -> Side:
    report = acf.inspect(model, images)
    network.update(describe(report))
    plan = acf.Plan.uniform(report, filters=0.5, columns=0.0)
    compacted = acf.compact(model, plan, images)
    network["kind"] = compacted.kind
    left = share_left(model, compacted.model)
    with torch.no_grad():
        difference = distance(acf.mask(model, plan).eval()(fresh), compacted.model.eval()(fresh))
    verdict = "unchanged" if left == 1 else "right" if difference <= TOLERANCE else "wrong"
    return Side(verdict, f"differs by {difference:.0e}" if verdict == "wrong" else "", left)


def judge_theirs(model: nn.Module, images: torch.Tensor, fresh: torch.Tensor) -> Side:
    pruned = copy.deepcopy(model)

    def number_elements() -> None:
        for parameter in pruned.parameters():
            parameter.grad = torch.arange(parameter.numel(), dtype=parameter.dtype).reshape(parameter.shape)

    prune_theirs(pruned, images, number_elements)
    left = share_left(model, pruned)
    if left == 1:
        return Side("unchanged", left=left)
    with torch.no_grad():
        output = pruned(fresh)
        difference = distance(masked_like(model, pruned)(fresh), output)
        if difference <= TOLERANCE:
            return Side("right", left=left)
        renormalised = masked_like(model, pruned, norms_of_kept=True)
        if renormalised is not None and distance(renormalised(fresh), output) <= TOLERANCE:
            return Side("renormalised", f"differs by {difference:.0e}", left)
    return Side("wrong", f"differs by {difference:.0e}", left)


def masked_like(model: nn.Module, pruned: nn.Module, norms_of_kept: bool = False) -> nn.Module:
    """The dense model with zeros where the pruned one has no parameters left."""
    masked = copy.deepcopy(model)
    survivors = {name: parameter.grad.long().flatten() for name, parameter in pruned.named_parameters()}
    for name, parameter in masked.named_parameters():
        kept = torch.zeros(parameter.numel(), dtype=torch.bool)
        kept[survivors[name]] = True
        parameter.data.mul_(kept.reshape(parameter.shape))
    if norms_of_kept:
        for name, module in list(masked.named_modules()):
            kept = survivors.get(f"{name}.weight")
            if across_channels(module) and kept is not None and len(kept) < module.weight.numel():
                parent, _, attribute = name.rpartition(".")
                setattr(masked.get_submodule(parent), attribute, NormOfKept(pruned.get_submodule(name), kept))
    return masked


def across_channels(module: nn.Module) -> bool:
    """Whether the module is a norm whose statistics are taken over several channels."""
    name = type(module).__name__
    return bool(re.search("Norm", name)) and not re.search("Batch|Instance|Act2d$", name) and hasattr(module, "weight")


class NormOfKept(nn.Module):
    """A norm of some channels; the others are zero."""

    def __init__(self, norm: nn.Module, kept: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        last = isinstance(self.norm, nn.LayerNorm) and not type(self.norm).__name__.endswith("2d")
        dim = values.ndim - 1 if last else 1
        output = torch.zeros_like(values)
        return output.index_copy(dim, self.kept, self.norm(values.index_select(dim, self.kept)))


def distance(expected: torch.Tensor, value: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value; infinite for another shape or NaN."""
    if expected.shape != value.shape:
        return float("inf")
    difference = float((expected - value).abs().max() / expected.abs().max())
    return difference if difference == difference else float("inf")


def share_left(model: nn.Module, smaller: nn.Module) -> float:
    before, after = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, smaller))
    return after / before


def describe(report: Any) -> dict[str, Any]:
    """Size and coverage of a network, and what cannot be pruned in it."""
    reasons = Counter(re.sub(r"\s+", " ", reason) for reason in report.frozen.values())
    return {
        "params": report.params,
        "macs": report.macs,
        "prunable": report.prunable_macs / report.macs,
        "frozen": [f"{count} x {reason}" for reason, count in reasons.most_common()],
    }


# ---- one network, in a process of its own


def work(entry: Entry, peer: bool, runs: int, pipe: Connection) -> None:
    """Send (what, value) for everything found out; "start" announces whose turn it is."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = build(entry, dtype=torch.float64)
    images, fresh = example(entry, 2, 0, torch.float64), example(entry, 3, 1, torch.float64)
    network: dict[str, Any] = {}
    judges = {"ours": lambda: judge_ours(model, images, fresh, network)}
    prunes: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {"ours": prune_ours}
    if peer:
        judges["theirs"] = lambda: judge_theirs(model, images, fresh)
        prunes["theirs"] = prune_theirs
    for who, judge in judges.items():
        pipe.send(("start", who))
        try:
            pipe.send((who, judge()))
        except Exception as error:  # whatever it is, it is a row of the table
            pipe.send((who, Side("crash", f"{type(error).__name__}: {str(error).strip() or 'no message'}")))
            prunes.pop(who)
        if who == "ours":
            pipe.send(("network", network))
    model, images = model.float(), images.float()
    for _ in range(runs):
        for who, prune in list(prunes.items()):
            pipe.send(("start", who))
            given = copy.deepcopy(model)
            started = time.perf_counter()
            try:
                prune(given, images)
            except Exception as error:
                pipe.send(("late", (who, f"float32: {type(error).__name__}: {error}")))
                prunes.pop(who)
                continue
            seconds = time.perf_counter() - started
            pipe.send(("seconds", (who, seconds)))
            if seconds > SLOW:
                prunes.pop(who)
    pipe.send(("end", None))


def run(entry: Entry, peer: bool, runs: int) -> Row:
    """The row of a network, whatever happens in its process."""
    row, turn = Row(entry), "ours"
    row.theirs.verdict = "crash" if peer else ""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(entry, peer, runs, send), daemon=True)
    process.start()
    send.close()
    try:
        while True:
            if not receive.poll(LIMIT):
                setattr(row, turn, Side("hang", f"more than {LIMIT:.0f} s"))
                break
            what, value = receive.recv()
            if what == "end":
                break
            if what == "start":
                turn = value
            elif what == "seconds":
                getattr(row, value[0]).seconds.append(value[1])
            elif what == "late":
                getattr(row, value[0]).message = value[1]
            else:
                setattr(row, what, value)
    except EOFError:
        setattr(row, turn, Side("crash", "the process ended"))
    finally:
        process.kill()
        process.join()
    return row


# ---- the page


def page(rows: list[Row], command: str, resnet50: list[float], note: str) -> Iterator[str]:
    cnns, others = [row for row in rows if row.entry.cnn], [row for row in rows if not row.entry.cnn]
    covered = sum(row.network.get("prunable", 0) >= 0.9 for row in cnns)
    yield "# Coverage\n"
    yield (
        f"What of {len(rows)} networks can be pruned, and whether the pruned network computes what the masked\n"
        f"one does. At least 90% of the MACs can be pruned in {covered} of {len(cnns)} CNNs.\n"
    )
    yield "| CNNs | right | renormalised | wrong | unchanged | crash | hang |\n|---|---|---|---|---|---|---|"
    for title, who in (("ours", "ours"), (PEER, "theirs")):
        counts = Counter(getattr(row, who).verdict for row in cnns)
        words = ("right", "renormalised", "wrong", "unchanged", "crash", "hang")
        yield f"| {title} | " + " | ".join(str(counts[word]) for word in words) + " |"
    if resnet50:
        yield (
            f"\nReading, planning and compacting ResNet-50 (224 x 224, batch 1, float32, 1 thread): "
            f"{statistics.median(resnet50):.2f} s, median of {len(resnet50)}.\n"
        )
    yield f"```\n{command}\n```\n"
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision", "timm", PEER)
    )
    yield f"{datetime.date.today()}, {machine()}, 1 thread; Python {platform.python_version()}, {versions}. {note}\n"
    yield (
        "MACs are those of one image of the size given; *prunable* is the share of them in layers whose filters or\n"
        "input channels can be cut. *left* is the share of the parameters after half of the channels are gone. The\n"
        "method and the words right, renormalised, wrong are explained at the head of `bench/bench_coverage.py`.\n"
    )
    yield "## Convolutional networks\n"
    yield from table(cnns)
    yield "\n## Networks with attention, recurrence or state spaces\n"
    yield (
        "Not what this package is made for; they must still be read, and never be changed wrongly.\n"
        f"{PEER} runs without the numbers of heads that it can be told per model.\n"
    )
    yield from table(others)
    yield "\n## What is frozen\n"
    for row in rows:
        yield f"- {row.entry.name} ({row.entry.source}): " + ("; ".join(row.network.get("frozen", [])) or "nothing")
    yield f"\n## What {PEER} said\n"
    for row in rows:
        if row.theirs.message:
            yield f"- {row.entry.name} ({row.entry.source}): {row.theirs.verdict}: {short(row.theirs.message)}"


def table(rows: list[Row]) -> Iterator[str]:
    yield f"| network | source | input | params, M | MACs, M | prunable | kind | ours | left | s | {PEER} | left | s |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        network = row.network
        cells = [row.entry.name, row.entry.source, str(row.entry.size)]
        if network:
            cells += [
                f"{network['params'] / 1e6:.1f}",
                f"{network['macs'] / 1e6:.0f}",
                f"{network['prunable']:.1%}",
                network.get("kind", ""),
            ]
        else:
            cells += [""] * 4
        for side in (row.ours, row.theirs):
            seconds = f"{statistics.median(side.seconds):.2f}" if side.seconds else ""
            cells += [side.verdict, "" if side.left is None else f"{side.left:.0%}", seconds]
        yield "| " + " | ".join(cells) + " |"


def short(message: str) -> str:
    return re.sub(r"\s+", " ", message)[:200].replace("|", "/")


def machine() -> str:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def kept_rows(path: Path | None) -> dict[str, Row]:
    """The rows that an earlier run left in a file, by network."""
    if path is None or not path.exists():
        return {}
    by_name, rows = {str(entry): entry for entry in ZOO}, {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        entry = by_name[row["entry"]]
        rows[row["entry"]] = Row(entry, row["network"], Side(**row["ours"]), Side(**row["theirs"]))
    return rows


def time_resnet50(runs: int = 5) -> list[float]:
    """Seconds for inspect, a uniform plan and compact of ResNet-50."""
    entry = Entry("torchvision", "resnet50", 224)
    model, images = build(entry), example(entry, 1)
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        prune_ours(model, images)
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", help="names, separated by commas; all by default")
    parser.add_argument("--report", type=Path, help="write the page here")
    parser.add_argument("--no-peer", action="store_true", help="ours only")
    parser.add_argument("--runs", type=int, default=RUNS, help="how often each is timed")
    parser.add_argument("--note", default="", help="what else there is to say about the machine, for the page")
    parser.add_argument("--keep", type=Path, help="file that rows are kept in: another run goes on where one stopped")
    arguments = parser.parse_args()
    wanted = set(arguments.models.split(",")) if arguments.models else None
    entries = [entry for entry in ZOO if wanted is None or entry.name in wanted]
    torch.set_num_threads(1)
    define_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torchvision", "timm", "torch_pruning"):
            importlib.import_module(name)  # here, once, and not in every process
    rows = []
    known = kept_rows(arguments.keep)
    for number, entry in enumerate(entries, 1):
        row = known.get(str(entry)) or run(entry, not arguments.no_peer, arguments.runs)
        rows.append(row)
        if arguments.keep and str(entry) not in known:
            with arguments.keep.open("a") as file:
                file.write(json.dumps(asdict(row) | {"entry": str(entry)}) + "\n")
        sides = "; ".join(
            f"{title} {side.verdict} {statistics.median(side.seconds) if side.seconds else 0:.2f} s "
            f"{'' if side.left is None else f'{side.left:.0%} left'} {short(side.message)}"
            for title, side in (("ours", row.ours), ("theirs", row.theirs))
        )
        prunable = f"{row.network['prunable']:.1%}" if "prunable" in row.network else "?"
        print(f"{number}/{len(entries)} {entry} {prunable} prunable, {row.network.get('kind')}; {sides}", flush=True)
    resnet50 = time_resnet50()
    print(f"ResNet-50: {statistics.median(resnet50):.2f} s")
    if arguments.report:
        command = f"python {' '.join(sys.argv)}"
        arguments.report.write_text("\n".join(page(rows, command, resnet50, arguments.note)) + "\n")


if __name__ == "__main__":
    main()
