"""A step of training of networks of which only some columns are left: over what is kept, against torch.

    pytest bench/bench_training.py                          groups: network, share of the columns
    python bench/bench_training.py --report docs/benchmarks-training.md

A step is forward, loss, backward and an update by SGD, of 128 images in float32. All do the same; torch multiplies by
the zeros too. The report also has single layers beside the floor that the machine sets: the multiply-adds that are kept
at its peak, or the bytes that must be read and written at the speed of a copy, whichever is longer.
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

from autocompress_fast import _core, models
from autocompress_fast._kept import KeptKernels
from autocompress_fast.plan import LayerPlan, Plan, apply_masks
from autocompress_fast.training import _freed_memory_kept

_NETWORKS = ("lenet5", "resnet20", "resnet18", "vgg16")
_SHARES = (1.0, 0.5, 0.3, 0.1)
_IMAGES = 128
# 3x3 convolutions of the networks for small images: channels, filters, height and width.
_LAYERS = ((16, 16, 32), (32, 32, 16), (64, 64, 8), (64, 64, 32), (256, 256, 8), (512, 512, 4))
_LAYER_SHARES = (1.0, 0.3, 0.1)

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

    def step_of(kernels: str, layout: torch.memory_format, *, narrow: bool = False) -> Step:
        mine = copy.deepcopy(model).to(memory_format=layout)
        images = x.contiguous(memory_format=layout)
        mode = KeptKernels(mine, plan) if kernels == "kept" else nullcontext()
        optimizer = torch.optim.SGD(mine.parameters(), lr=1e-4, momentum=0.9)

        def step() -> float:
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow), mode:
                loss = F.cross_entropy(mine(images), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step

    return {
        "torch": step_of("torch", torch.contiguous_format),
        "torch, channels_last": step_of("torch", torch.channels_last),
        "torch, bfloat16": step_of("torch", torch.channels_last, narrow=True),
        "kept": step_of("kept", torch.channels_last),
    }


@pytest.mark.parametrize("name", ["torch", "torch, channels_last", "torch, bfloat16", "kept"])
@pytest.mark.parametrize("share", [0.3])
@pytest.mark.parametrize("network", ["lenet5", "resnet20"])
def test_step(benchmark, network, share, name):
    """One step, whose loss is that of torch."""
    benchmark.group = f"{network}, {share:.0%} of the columns"
    compared = steps(network, share)
    assert abs(compared[name]() - compared["torch"]()) < 1e-3
    benchmark(compared[name])


class Layer:
    """A 3x3 convolution of padding 1 that keeps a random share of its columns: forward and both gradients."""

    def __init__(self, channels: int, filters: int, size: int, share: float) -> None:
        rng, count = np.random.default_rng(0), 9 * channels
        self.kept = np.sort(rng.permutation(count)[: max(1, int(share * count))]).astype(np.int32)
        mask = np.zeros(count, dtype=np.float32)
        mask[self.kept] = 1
        self.weight = (torch.randn(filters, count) * torch.from_numpy(mask)).reshape(filters, channels, 3, 3)
        self.x, self.g = torch.randn(_IMAGES, channels, size, size), torch.randn(_IMAGES, filters, size, size)
        window = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "threads": 1}
        self.arguments = {"filters": np.arange(filters, dtype=np.int32), "columns": self.kept, **window}
        self.x_inside, self.g_inside = (t.permute(2, 3, 1, 0).contiguous() for t in (self.x, self.g))
        self.out, self.of_x = torch.empty_like(self.g_inside), torch.empty_like(self.x_inside)
        self.of_weight = torch.empty_like(self.weight)

    def ours(self) -> dict[str, Callable[[], object]]:
        """What the kernels do."""
        given, weight = self.arguments, self.weight
        return {
            "forward": lambda: _core.conv_forward(self.x_inside, weight, None, self.out, **given),
            "input": lambda: _core.conv_input_gradient(self.g_inside, weight, self.of_x, **given),
            "weight": lambda: _core.conv_weight_gradient(self.x_inside, self.g_inside, self.of_weight, None, **given),
        }

    def torch(self) -> dict[str, Callable[[], object]]:
        """The same by torch, in the faster of its layouts for most layers, over all columns."""
        x, g, w = (t.contiguous(memory_format=torch.channels_last) for t in (self.x, self.g, self.weight))

        def gradient(of_x: bool) -> Callable[[], object]:
            rest = (None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (of_x, not of_x, False))
            return lambda: torch.ops.aten.convolution_backward(g, x, w, *rest)

        return {"forward": lambda: F.conv2d(x, w, padding=1), "input": gradient(True), "weight": gradient(False)}

    def floor(self, peak: float, bandwidth: float) -> dict[str, float]:
        """Seconds that each takes at least; what is written is read before, unless a kernel goes past the caches."""
        work = 2 * self.g.numel() * len(self.kept) / peak
        x, g, w = (4 * t.numel() / bandwidth for t in (self.x, self.g, self.weight))
        return {"forward": max(work, x + 2 * g), "input": max(work, g + 2 * x), "weight": max(work, x + g + 2 * w)}


def test_layers_are_those_of_torch() -> None:
    """Forward and both gradients."""
    layer = Layer(16, 20, 9, 0.3)
    ours, theirs = layer.ours(), layer.torch()
    results = {"forward": layer.out.permute(3, 2, 0, 1), "input": layer.of_x.permute(3, 2, 0, 1)}
    for name, place in {"forward": None, "input": 0, "weight": 1}.items():
        ours[name]()
        result = theirs[name]()
        expected = result if place is None else result[place]
        if name == "weight":
            expected, found = expected.flatten(1)[:, layer.kept], layer.of_weight.flatten(1)[:, layer.kept]
        else:
            found = results[name]
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5, name


def layers_report(rounds: int) -> str:
    """Single layers at one thread beside their floors, as Markdown."""
    torch.set_num_threads(1)
    rows, peak = [], max(_core.peak_flops() for _ in range(5))
    a, b = torch.empty(2**24), torch.ones(2**24)
    copy_time = interleaved({"copy": lambda: a.copy_(b)}, lambda: None, 15)["copy"]
    bandwidth = 3 * 4 * a.numel() / copy_time  # a copy reads, and reads what it writes
    for channels, filters, size in _LAYERS:
        for share in _LAYER_SHARES:
            layer = Layer(channels, filters, size, share)
            with _freed_memory_kept():
                ours = interleaved(layer.ours(), lambda: None, rounds)
                theirs = interleaved(layer.torch(), lambda: None, max(3, rounds // 2))
            floor = layer.floor(peak, bandwidth)
            flops = 2 * layer.g.numel() * len(layer.kept)
            cells = []
            for name, time in ours.items():
                speed = f"{flops / time / 1e9:.0f}"
                cells.append(f"{1e3 * time:.2f} ({speed}, {floor[name] / time:.0%}, {theirs[name] / time:.1f}x)")
            rows.append([f"{channels} -> {filters}, {size}x{size}", f"{share:.0%}", *cells])
            print(*rows[-1], file=sys.stderr, flush=True)
    measured = f"Measured: peak {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s of a copy (its reads and writes)."
    return measured + "\n\n" + table(["layer", "columns kept", "forward", "input gradient", "weight gradient"], rows)


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
            "and normalisations by kernels of the package; where layers keep more than 60% of their weights, in the",
            "mean, all is left to torch.",
            "",
            report(options.rounds, options.threads),
            "",
            "## Single layers, one thread",
            "",
            "3x3 convolutions of padding 1: milliseconds, medians; in brackets GFLOP/s on what is kept, the share of",
            "the floor (the kept multiply-adds at the peak, or the bytes at the speed of a copy, whichever takes",
            "longer), and how many times as long torch takes (channels_last, over all columns).",
            "",
            layers_report(options.rounds),
            "",
        ]
    )
    options.report.write_text(text)


if __name__ == "__main__":
    main()
