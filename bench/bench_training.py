"""A step of training of networks of which only some columns are left: over what is kept, against torch.

    pytest bench/bench_training.py                          groups: network, share of the columns
    python bench/bench_training.py --report docs/benchmarks-training.md

A step is forward, loss, backward and an update by SGD, of 128 images in float32. All do the same; torch multiplies by
the zeros too.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from measuring import conditions, interleaved, table
from torch import nn

from autocompress_fast import models
from autocompress_fast._kept import KeptKernels
from autocompress_fast.plan import LayerPlan, Plan, apply_masks
from autocompress_fast.training import _freed_memory_kept

_NETWORKS = ("lenet5", "resnet20", "resnet18", "vgg16")
_SHARES = (1.0, 0.5, 0.3, 0.1)
_IMAGES = 128

Step = Callable[[], float]


def pruned(network: str, share: float) -> tuple[nn.Module, Plan]:
    """A network of which every convolution keeps a random share of its columns."""
    torch.manual_seed(0)
    model, rng, layers = models.create(network), np.random.default_rng(0), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            shape = tuple(module.weight.shape)
            columns = rng.permutation(module.weight[0].numel()) < max(1, share * module.weight[0].numel())
            layers[name] = LayerPlan(shape, np.ones(shape[0], dtype=bool), columns)
    plan = Plan(layers)
    apply_masks(model, plan)
    return model, plan


def steps(network: str, share: float) -> dict[str, Step]:
    """What is compared: a step of each, which returns its loss."""
    model, plan = pruned(network, share)
    x, y = torch.randn(_IMAGES, *models.input_shape(network)), torch.randint(0, 10, (_IMAGES,))

    def step_of(kernels: str, layout: torch.memory_format) -> Step:
        mine = copy.deepcopy(model).to(memory_format=layout)
        images = x.contiguous(memory_format=layout)
        mode = KeptKernels(mine, plan) if kernels == "kept" else nullcontext()
        optimizer = torch.optim.SGD(mine.parameters(), lr=1e-4, momentum=0.9)

        def step() -> float:
            with mode:
                loss = F.cross_entropy(mine(images), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step

    return {
        "torch": step_of("torch", torch.contiguous_format),
        "torch, channels_last": step_of("torch", torch.channels_last),
        "kept": step_of("kept", torch.channels_last),
    }


@pytest.mark.parametrize("name", ["torch", "torch, channels_last", "kept"])
@pytest.mark.parametrize("share", [0.3])
@pytest.mark.parametrize("network", ["lenet5", "resnet20"])
def test_step(benchmark, network, share, name):
    """One step, whose loss is that of torch."""
    benchmark.group = f"{network}, {share:.0%} of the columns"
    compared = steps(network, share)
    assert abs(compared[name]() - compared["torch"]()) < 1e-3
    benchmark(compared[name])


def report(rounds: int, threads: list[int]) -> str:
    """The table as Markdown."""
    rows = []
    for network in _NETWORKS:
        for share in _SHARES:
            for count in threads:
                torch.set_num_threads(count)
                compared = steps(network, share)
                with _freed_memory_kept():  # as the trainer does
                    times = interleaved(compared, lambda: None, rounds)
                best = min(times["torch"], times["torch, channels_last"])
                shown = [f"{1e3 * seconds:.1f}" for seconds in times.values()]
                rows.append([network, f"{share:.0%}", str(count), *shown, f"{best / times['kept']:.2f}x"])
                print(*rows[-1], file=sys.stderr, flush=True)
    header = ["network", "columns kept", "threads", "torch", "torch, channels_last", "kept", "better of torch / kept"]
    return table(header, rows)


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    text = "\n".join(
        [
            "# A step of training over what is kept, against torch",
            "",
            conditions(),
            "",
            f"Command: `python bench/bench_training.py --report {options.report} --rounds {options.rounds} "
            f"--threads {' '.join(map(str, options.threads))}`.",
            "",
            f"Medians of {options.rounds} steps in milliseconds, taken in turns: forward, loss, backward, an update by",
            f"SGD of {_IMAGES} images in float32, every convolution with a random share of its columns. *kept*: what",
            '`TrainingConfig(kernels="kept")` does, the default: convolutions over the columns that are kept, poolings',
            "and normalisations by kernels of the package; where most layers keep more than 60% of their weights, all",
            "is left to torch.",
            "",
            report(options.rounds, options.threads),
            "",
        ]
    )
    options.report.write_text(text)


if __name__ == "__main__":
    main()
