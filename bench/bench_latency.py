"""Predicted latencies beside measured ones, of networks that the model has not seen.

    python bench/bench_latency.py --report docs/latency.md [--threads 1] [--only NAME ...]

The model times single layers of the kinds that a network has, in programs of its own, never a network of the table.
The layers of dense networks, and of those without 50, 75 or 87.5% of the filters, mostly have sizes that are timed;
those of the other rows are interpolated.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from bench_engine import DENSE, network
from measuring import conditions, table

import autocompress_fast as acf
from autocompress_fast.graph import Report
from autocompress_fast.latency import LatencyModel
from autocompress_fast.plan import LayerPlan, Plan

NETWORKS = ("ResNet-20 CIFAR", "ResNet-18 CIFAR", "VGG-16 CIFAR", "MobileNetV2")
FILTERS = (0.3, 0.5, 0.75, 0.875)  # shares removed
COLUMNS = (0.5, 0.75, 0.9)
SEEDS = (0, 1, 2)
TARGET = 0.15
LEAST, MOST = 20, 400  # calls


def random_plan(report: Report, seed: int) -> Plan:
    """Every set of tied layers keeps another share of its filters, every layer of its columns; something is left."""
    rng = np.random.default_rng(seed)
    uniform = [Plan.uniform(report, filters=share) for share in (0.0, 0.3, 0.5, 0.7, 0.9)]
    while True:
        chosen = {tied.layers: uniform[rng.integers(len(uniform))] for tied in report.sets}
        layers = {}
        for layer in report.layers:
            tied = report.set_of.get(layer.name)
            filters = np.ones(layer.shape[0], bool) if tied is None else chosen[tied.layers][layer.name].filters
            columns = np.ones(layer.columns, bool)
            if layer.columns_prunable:
                columns = rng.random(layer.columns) < rng.uniform(0.1, 1)
            layers[layer.name] = LayerPlan(layer.shape, filters, columns, None, layer.groups, layer.transposed)
        with contextlib.suppress(ValueError):  # nothing is left
            return acf.unused_paths(Plan(layers).tied(report), report)


def plans(report: Report) -> Iterator[tuple[str, Plan]]:
    """What the page shows of a network."""
    yield "dense", Plan.dense(report)
    for share in FILTERS:
        yield f"-{100 * share:g}% filters", Plan.uniform(report, filters=share)
    for share in COLUMNS:
        yield f"-{100 * share:g}% columns", Plan.uniform(report, columns=share)
    for seed in SEEDS:
        yield f"random, seed {seed}", random_plan(report, seed)


def called(engine: acf.Engine, samples: int, seconds: float) -> float:
    """The lower decile of as many calls as take about half a second: few calls are longer than any disturbance."""
    x = np.random.default_rng(0).standard_normal((samples, *engine.inputs[0].shape), np.float32)
    times = []
    for _ in range(3 + max(LEAST, min(MOST, int(0.5 / seconds)))):
        start = time.perf_counter()
        engine(x)
        times.append(time.perf_counter() - start)
    return float(np.quantile(times[3:], 0.1))


def rows(name: str, threads: int, samples: int, directory: Path) -> Iterator[tuple[list[str], tuple[float, float]]]:
    """A row for every plan, and its error; first how long timing and predicting took."""
    model, shape = network(name)
    x = torch.zeros(1, *shape)
    report = acf.inspect(model, x)
    start = time.perf_counter()
    predictor = LatencyModel.of(report, threads=threads, samples=samples, directory=directory)
    timing = time.perf_counter() - start
    for title, plan in plans(report):
        settled = acf.unused_paths(plan, report)
        start = time.perf_counter()
        predicted = predictor.seconds(settled, settled=True)
        first = time.perf_counter() - start
        again = []
        for _ in range(9):
            start = time.perf_counter()
            predictor.seconds(settled, settled=True)
            again.append(time.perf_counter() - start)
        engine = acf.compile(acf.compact(model, plan, x, report=report).model, x, threads=threads)
        measured, steps = called(engine, samples, predicted), predictor.measure(engine)
        error = predicted / measured - 1
        figures = [f"{1e3 * value:.3g}" for value in (predicted, measured, steps)]
        speed = [f"{1e3 * first:.1f}", f"{1e3 * statistics.median(again):.1f}"]
        of_steps = predicted / steps - 1
        row = [f"{name}, {title}", *figures, f"{100 * error:+.1f}%", f"{100 * of_steps:+.1f}%", *speed]
        row.append(f"{timing:.1f}" if title == "dense" else "")
        print(" ".join(row), file=sys.stderr, flush=True)
        yield row, (error, of_steps)


def page(chosen: list[str], threads: int, samples: int, command: str) -> Iterator[str]:
    """The text."""
    yield "# Predicted latencies\n"
    yield (
        "Milliseconds a call, predicted from a plan by `acf.LatencyModel` and measured on the compacted network, with\n"
        f"{threads} thread{'s' if threads > 1 else ''} and {samples} sample{'s' if samples > 1 else ''}. *measured* is"
        " the lower decile of 20 to 400 calls, *steps* the sum over the steps,\n"
        "each the mean of the third of its runs that took least, which short disturbances do not reach: where a\n"
        "call of some milliseconds is far above it, other programs had the processor meanwhile. *first* and\n"
        "*again* are the milliseconds of a prediction, of sizes that are new and once more, *timing* the seconds\n"
        "that the model took to time layers, once for each machine; it started without any measurements, and\n"
        "networks share what they have in common. The random plans keep other shares of filters and columns in\n"
        "every layer. Layers of dense networks, and of those without 50, 75 or 87.5% of the filters, mostly have\n"
        "sizes that are timed; those of the other rows are interpolated. Constants of the model were chosen with\n"
        "earlier runs on these networks.\n"
    )
    yield f"```\n{command}\n```\n\n{conditions('Weights random.')}\n"
    found: list[list[str]] = []
    errors: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in chosen:
            for row, both in rows(name, threads, samples, Path(directory)):
                found.append(row)
                errors.append((abs(both[0]), abs(both[1])))
    for what, found_errors in zip(("measured", "steps"), zip(*errors, strict=True), strict=True):
        within = sum(error <= TARGET for error in found_errors)
        yield (
            f"Error against *{what}*: median {100 * statistics.median(found_errors):.1f}%, worst"
            f" {100 * max(found_errors):.1f}%; {within} of {len(errors)} within {100 * TARGET:.0f}%.\n"
        )
    yield table(["network", "predicted", "measured", "steps", "error", "of steps", "first", "again", "timing"], found)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", type=Path, help="write the page here; to standard output if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(DENSE), default=list(NETWORKS), help="networks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command = f"python {' '.join(sys.argv)}"
    text = "\n".join(page(options.only, options.threads, options.samples, command)) + "\n"
    if options.report:
        options.report.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
