"""Single convolutions: how far from what the machine can do, dense and with columns removed.

    pytest bench/bench_conv.py                            groups: layer, share of the columns that are left
    python bench/bench_conv.py --report docs/benchmarks-conv.md

A convolution is compiled alone and runs with its operands in the caches. Its floor is the longer of two times: that of
its multiply-adds on kept columns at the measured peak of the instruction set, and that of reading its weights, input
and output once at the measured bandwidth. Complete 3x3 kernels may take less than the floor: Winograd's algorithm takes
fewer multiply-adds. torch (eager, oneDNN) runs the dense layer.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from measuring import NETWORKS, SHAPES, conditions, forced_isa, interleaved, seconds, table
from torch import nn

import autocompress_fast as acf
from autocompress_fast import _core

LEFT = (1.0, 0.5, 0.25, 0.1)  # shares of the columns
TURN = 0.002  # seconds a turn takes at least
CACHE = 1 << 20  # bytes below which the bandwidth of memory is no bound
TOLERANCE = 1e-4  # of the largest output


@dataclass(frozen=True)
class Layer:
    """A convolution with as much padding as its kernel needs."""

    filters: int
    channels: int
    kernel: int
    stride: int
    size: int

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.channels} -> {self.filters}, {self.kernel}x{self.kernel}{stride}, {self.size}x{self.size}"

    def module(self, left: float) -> nn.Conv2d:
        """With a share of its columns; the others are zeros."""
        torch.manual_seed(0)
        conv = nn.Conv2d(self.channels, self.filters, self.kernel, self.stride, self.kernel // 2)
        columns = self.channels * self.kernel**2
        removed = torch.randperm(columns)[round(left * columns) :]
        with torch.no_grad():
            conv.weight.flatten(1)[:, removed] = 0
        return conv.eval()

    def image(self, batch: int) -> torch.Tensor:
        """What it reads."""
        return torch.randn(batch, self.channels, self.size, self.size, generator=torch.Generator().manual_seed(1))


THIN = [
    Layer(filters, filters, 3, 1, size)
    for filters, size in [(8, 32), (13, 32), (16, 32), (37, 32), (37, 16), (101, 8), (203, 4)]
]


def layers() -> Iterator[Layer]:
    """Each of the three networks' once, and thin and odd ones."""
    seen = set()
    for name in NETWORKS.values():
        with (SHAPES / f"{name}.csv").open() as file:
            for row in csv.DictReader(file):
                values = (int(row[key]) for key in ("filters", "channels", "kernel_h", "stride", "input_h"))
                layer = Layer(*values)
                if layer not in seen:
                    seen.add(layer)
                    yield layer
    yield from THIN


def prepared(layer: Layer, left: float, batch: int, threads: int) -> tuple[Callable[[], object], acf.Engine]:
    """The convolution, ready to run, its result checked."""
    conv, x = layer.module(left), layer.image(batch)
    engine, given = acf.compile(conv, x[:1], threads=threads), x.numpy()
    with torch.no_grad():
        expected = conv(x).numpy()
    error = float(np.abs(engine(given) - expected).max() / np.abs(expected).max())
    assert error <= TOLERANCE, f"{layer} is off by {error:.2g} of the largest output"
    return lambda: engine(given), engine


# ---- pytest-benchmark


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("layer", [Layer(64, 64, 3, 1, 32), Layer(37, 37, 3, 1, 16), Layer(64, 256, 1, 1, 14)], ids=str)
def test_convolution(benchmark: Callable[[Callable[[], object]], object], layer: Layer, left: float) -> None:
    benchmark.group = f"{layer}, {left:.0%} of the columns"  # type: ignore[attr-defined]
    benchmark(prepared(layer, left, 1, 1)[0])


# ---- the page


def read_bandwidth() -> float:
    """Bytes in a second, of weights that no cache below the last holds."""
    values = torch.ones(4 << 20)
    values.sum()
    return 4 * values.numel() / statistics.median(seconds(values.sum) for _ in range(21))


def row(layer: Layer, batch: int, rounds: int, bandwidth: float, peaks: dict[str, float]) -> list[str]:
    """One line of the table."""
    cells, conv, x = [str(layer)], layer.module(1), layer.image(batch)
    side = -(-layer.size // layer.stride)
    out = side * side
    with torch.no_grad():
        torch_time = interleaved({"torch": lambda: conv(x)}, lambda: None, 21, TURN)["torch"]
    cells.append(f"{1e6 * torch_time:.1f}")
    for isa, peak in peaks.items():
        with forced_isa(isa):
            steps = {}
            for left in LEFT:
                _, engine = prepared(layer, left, batch, 1)
                steps[left] = engine.profile(samples=batch, rounds=rounds).steps[0].seconds
        for left in LEFT:
            columns = round(left * layer.channels * layer.kernel**2)
            flops = 2 * batch * layer.filters * columns * out
            moved = layer.filters * columns + batch * (layer.channels * layer.size**2 + layer.filters * out)
            floor = max(flops / peak, 4 * moved / bandwidth if 4 * moved > CACHE else 0.0)
            cells.append(f"{1e6 * steps[left]:.1f} ({floor / steps[left]:.0%})")
    return cells


def page(batch: int, rounds: int, command: str, chosen: list[Layer]) -> Iterator[str]:
    """A row for every layer, columns for every instruction set and share of the columns."""
    isas = [isa for isa in ("avx512", "avx2", "neon") if isa in acf.show_config()["isas_supported"]]
    peaks = {}
    for isa in isas:
        with forced_isa(isa):
            peaks[isa] = max(_core.peak_flops() for _ in range(5))
    bandwidth = read_bandwidth()
    yield "# Single convolutions\n"
    yield (
        f"Microseconds, median of {rounds} rounds, batch {batch}, one thread, float32, with 100, 50, 25 and 10% of the"
        " columns left; in\nbrackets the share of the floor: the multiply-adds on kept columns at the peak, or, above"
        f" {CACHE >> 20} MiB, weights, input and output at\nthe read bandwidth. More than 100% is Winograd's doing.\n"
    )
    measured = ", ".join(f"{isa} {peak / 1e9:.0f} GFLOP/s" for isa, peak in peaks.items())
    yield f"Measured: peak {measured}; read bandwidth {bandwidth / 1e9:.0f} GB/s.\n"
    yield f"```\n{command}\n```\n\n{conditions('Weights random, removed columns at random places.')}\n"
    rows = []
    for layer in chosen:
        rows.append(row(layer, batch, rounds, bandwidth, peaks))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    yield table(["layer", "torch, dense", *(f"{isa}, {left:.0%}" for isa in isas for left in LEFT)], rows) + "\n"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", type=Path, help="write the page here; to standard output if not given")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--first", type=int, help="only so many layers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = list(layers())[: options.first]
    text = "\n".join(page(options.batch, options.rounds, f"python {' '.join(sys.argv)}", chosen))
    if options.report:
        options.report.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
