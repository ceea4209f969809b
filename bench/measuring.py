"""What the benchmarks share: shapes of real networks, timing in turns, and the text of their pages."""

from __future__ import annotations

import contextlib
import csv
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import autocompress_fast as acf
from autocompress_fast import _core

SHAPES = Path(__file__).parent / "shapes"
NETWORKS = {"VGG-16 CIFAR": "vgg16_cifar", "ResNet-18 CIFAR": "resnet18_cifar", "ResNet-50": "resnet50_imagenet"}
Shape = tuple[int, ...]


def network_layers(network: str) -> list[Shape]:
    """The weights of the conv layers of a network, in order."""
    with (SHAPES / f"{NETWORKS[network]}.csv").open() as file:
        return [
            tuple(int(row[name]) for name in ("filters", "channels", "kernel_h", "kernel_w"))
            for row in csv.DictReader(file)
        ]


@contextlib.contextmanager
def forced_isa(isa: str) -> Iterator[None]:
    """Our kernels with one instruction set."""
    before = os.environ.get("ACF_FORCE_ISA")
    os.environ["ACF_FORCE_ISA"] = isa
    _core.reload_isa()
    try:
        yield
    finally:
        os.environ.pop("ACF_FORCE_ISA")
        if before is not None:
            os.environ["ACF_FORCE_ISA"] = before
        _core.reload_isa()


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    functions: dict[str, Callable[[], object]], prepare: Callable[[], object], rounds: int, least: float = 0.0
) -> dict[str, float]:
    """The median time of each, in turns, so that all see the same machine.

    A turn is as many calls as take `least` seconds, at least one, and counts as their mean. Where it has a least time,
    a call before it does not count: it brings back into the caches what the others' turns drove out, as for a program
    that calls one network again and again.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls = {name: 1 if least == 0 else 1 + int(least / seconds(function)) for name, function in functions.items()}
    for _ in range(rounds):
        for name, function in functions.items():
            if torch.get_num_threads() > 1:
                time.sleep(0.02)  # torch's threads spin for a while after each operation, on the cores of the next one
            prepare()
            if least > 0:
                function()
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def processor() -> str:
    """What the operating system calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions(note: str = "") -> str:
    """Date, machine and versions."""
    config = acf.show_config()
    return (
        f"{datetime.date.today():%Y-%m-%d}, {processor()}, {os.cpu_count()} cores, {platform.system()}; "
        f"autocompress_fast {config['version']} ({config['compiler']}, {config['isa_active']}), torch "
        f"{torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}. {note}".rstrip()
    )
