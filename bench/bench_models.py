"""Which networks the engine runs, and whether it computes what torch computes: all of torchvision, and ours.

    python bench/bench_models.py --report docs/models.md        all of them; about an hour
    python bench/bench_models.py --models resnet18,vit_b_16

Every network has random weights and batch statistics that hide no mistake (tests/zoo.py), a small input that suits it,
and a process of its own. It is compiled (which already compares it with the model) and run on two images that the
compiler did not see; the error is the largest difference from torch, both in float32, as a share of the largest output.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from measuring import conditions, table
from torch import nn

import autocompress_fast as acf
from autocompress_fast import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from zoo import define_operators, randomise

TOLERANCE = 1e-4  # of the largest output
LIMIT = 3600.0  # seconds for one network
STATISTICS = 8  # images that batch statistics are taken of
ROUNDING = 1e-5  # of the largest output, that torch's own float32 may differ from float64 by
HALVINGS = 8
SIZE = 64
SIZES = {"googlenet": 96, "inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}  # where 64 is too small, or does not fit
OURS = "autocompress_fast"


@dataclass
class Row:
    """A network of the table; `error` is NaN and `message` says why where there is no result."""

    source: str
    family: str
    name: str
    size: int
    parameters: int = 0
    error: float = float("nan")
    message: str = ""

    @property
    def agrees(self) -> bool:
        return self.error <= TOLERANCE


def rows() -> Iterator[Row]:
    """All networks, without results."""
    torchvision = importlib.import_module("torchvision")
    for name in torchvision.models.list_models(module=torchvision.models):
        family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        yield Row("torchvision", family, name, SIZES.get(name, SIZE))
    for name in models.names():
        yield Row(OURS, OURS, name, models.input_shape(name)[-1])


def network(row: Row, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """The network with its weights, and two images."""
    torch.manual_seed(0)
    if row.source == OURS:
        model, shape = models.create(row.name), models.input_shape(row.name)
    else:
        options = {"image_size": row.size} if row.family == "vision_transformer" else {}
        if row.name in ("googlenet", "inception_v3"):
            options = {"init_weights": True}  # they warn when they are not told
        model = importlib.import_module("torchvision").models.get_model(row.name, weights=None, **options)
        shape = (3, row.size, row.size)
    images = torch.randn(STATISTICS, *shape, generator=torch.Generator().manual_seed(0))
    randomise(model.eval(), images)
    settle(model, images)
    return model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def settle(model: nn.Module, images: torch.Tensor) -> None:
    """Take the batch statistics anew, with smaller gains if need be, until float32 is enough for torch itself.

    At a depth of a hundred layers rounding may grow until nothing of the output is right, whoever computes it.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for _ in range(HALVINGS):
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        model(images)
        for norm in norms:
            norm.eval()
            norm.running_var.clamp_(min=max(float(norm.running_var.mean()) / 2, 1e-3))
        exact = copy.deepcopy(model).double()(images[:2].double())
        if not norms or (model(images[:2]) - exact).abs().max() <= ROUNDING * exact.abs().max():
            return
        for norm in norms:
            norm.weight.mul_(0.5)


def work(row: Row, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        model, images = network(row, seed=1)
        row.parameters = sum(parameter.numel() for parameter in model.parameters())
        engine = acf.compile(model, images[:1].flip(-1), threads=1)
        with torch.no_grad():
            wanted = model(images)
        row.error = float((engine(images) - wanted).abs().max() / wanted.abs().max())
    except Exception as error:  # whatever it is, it is a row of the table
        row.message = f"{type(error).__name__}: {error}"
    pipe.send(row)


def measured(row: Row) -> Row:
    """The row with its result, whatever happens in its process."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(row, send), daemon=True)
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(LIMIT) else Row(**asdict(row) | {"message": f"more than {LIMIT:.0f} s"})
    except EOFError:
        return Row(**asdict(row) | {"message": "the process ended"})
    finally:
        process.kill()
        process.join()


def page(done: list[Row], command: str) -> Iterator[str]:
    yield "# Networks that the engine runs\n"
    for source in ("torchvision", OURS):
        of = [row for row in done if row.source == source]
        worst = max((row.error for row in of if row.agrees), default=0.0)
        yield (
            f"- {source}: {sum(row.agrees for row in of)} of {len(of)} networks compile and agree with torch; the\n"
            f"  largest error is {worst:.0e} of the largest output."
        )
    yield f"\n```\n{command}\n```\n\n{conditions()}\n"
    yield (
        "Random weights and batch statistics, float32, two images that the compiler did not see; the error is the\n"
        "largest difference from torch as a share of the largest output, and at most 1e-4 agrees. The gains of batch\n"
        "normalisations are halved until torch's own float32 is within 1e-5 of float64.\n"
    )
    header = ["family", "network", "input", "parameters, M", "result", "error"]
    yield table(header, [cells(row) for row in sorted(done, key=lambda row: (row.source == OURS, row.family))])


def cells(row: Row) -> list[str]:
    result = "agrees" if row.agrees else "differs" if not row.message else short(row.message)
    error = f"{row.error:.0e}" if row.error == row.error else ""
    return [row.family, row.name, str(row.size), f"{row.parameters / 1e6:.1f}", result, error]


def short(message: str) -> str:
    return re.sub(r"\s+", " ", message)[:300].replace("|", "/")


def kept_rows(path: Path | None) -> dict[str, Row]:
    """The rows that an earlier run left in a file, by network."""
    if path is None or not path.exists():
        return {}
    kept = (Row(**json.loads(line)) for line in path.read_text().splitlines())
    return {f"{row.source}-{row.name}": row for row in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", help="names, separated by commas; all by default")
    parser.add_argument("--report", type=Path, help="write the page here")
    parser.add_argument("--keep", type=Path, help="file that rows are kept in: another run goes on where one stopped")
    arguments = parser.parse_args()
    define_operators()
    wanted = set(arguments.models.split(",")) if arguments.models else None
    todo = [row for row in rows() if wanted is None or row.name in wanted]
    known, done = kept_rows(arguments.keep), []
    for number, empty in enumerate(todo, 1):
        name = f"{empty.source}-{empty.name}"
        row = known.get(name) or measured(empty)
        done.append(row)
        if arguments.keep and name not in known:
            with arguments.keep.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        print(f"{number}/{len(todo)} {name} {row.error:.1e} {short(row.message)}", flush=True)
    if arguments.report:
        arguments.report.write_text("\n".join(page(done, f"python {' '.join(sys.argv)}")) + "\n")


if __name__ == "__main__":
    main()
