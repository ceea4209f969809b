"""Purification of whole networks: scores of every layer, and what is below its limits; ours against numpy and torch.

    pytest bench/bench_purification.py                      groups: network, threads
    python bench/bench_purification.py --report docs/benchmarks-purification.md

All do the same: the norm of every filter and column and the importance of every channel, in float64; then columns,
channels and filters below a limit are marked. The floor is to read every weight once: torch.sum of each weight, in
turns with the rest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from measuring import NETWORKS, conditions, forced_isa, interleaved, network_layers, table

from autocompress_fast import _core, ops

Masks = list[tuple[np.ndarray, np.ndarray]]  # (columns, filters) that stay, of every layer

_TENTH = 0.1  # limits lie at a tenth of what the median column, channel and filter have


def weights_of(network: str) -> list[torch.Tensor]:
    """Random weights with a third of the columns near zero, as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    weights = []
    for shape in network_layers(network):
        weight = torch.randn(shape, generator=generator) * 0.05
        small = torch.rand(shape[1:], generator=generator) < 1 / 3
        weights.append(torch.where(small, weight * 1e-3, weight))
    return weights


def limits_of(weights: list[torch.Tensor]) -> list[ops.PurificationLimits]:
    """Limits of every layer."""
    limits = []
    for scores in ops.purification_scores_all([(weight, 1) for weight in weights]):
        of = (scores.column_norms, scores.importance, scores.filter_norms)
        column, importance, filters = (_TENTH * float(np.median(values)) for values in of)
        limits.append(ops.PurificationLimits(column, importance, 1.0, filters))
    return limits


def purify_ours(weights: list[torch.Tensor], limits: list[ops.PurificationLimits], threads: int) -> Masks:
    """Two calls of the public functions."""
    scores = ops.purification_scores_all([(weight, 1) for weight in weights], threads=threads)
    return ops.purification_keep(scores, limits)


def purify_numpy(weights: list[torch.Tensor], limits: list[ops.PurificationLimits], _threads: int) -> Masks:
    """As one would write it in numpy."""
    masks = []
    for tensor, limit in zip(weights, limits, strict=True):
        squares = np.square(tensor.numpy().reshape(*tensor.shape[:2], -1), dtype=np.float64)
        columns, filters = np.sqrt(squares.sum(0)), np.sqrt(squares.sum((1, 2)))
        kept = (columns > 0) & (columns >= limit.column)
        kept &= ~((np.square(columns).mean(1) < limit.importance) & (kept.mean(1) < limit.emptiness))[:, None]
        masks.append((kept.ravel(), (filters > 0) & (filters >= limit.filter)))
    return masks


def purify_torch(weights: list[torch.Tensor], limits: list[ops.PurificationLimits], _threads: int) -> Masks:
    """As one would write it in torch."""
    masks = []
    for weight, limit in zip(weights, limits, strict=True):
        columns = torch.linalg.vector_norm(weight.flatten(2), dim=0, dtype=torch.float64)
        filters = torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=torch.float64)
        kept = (columns > 0) & (columns >= limit.column)
        unimportant = columns.square().mean(1) < limit.importance
        kept &= ~(unimportant & (kept.double().mean(1) < limit.emptiness))[:, None]
        masks.append((kept.flatten().numpy(), ((filters > 0) & (filters >= limit.filter)).numpy()))
    return masks


def torch_float32(weights: list[torch.Tensor], limits: list[ops.PurificationLimits], _threads: int) -> Masks:
    """The norms in float32, which is quicker and less exact."""
    masks = []
    for weight, limit in zip(weights, limits, strict=True):
        columns, filters = weight.flatten(2).norm(dim=0), weight.flatten(1).norm(dim=1)
        kept = (columns > 0) & (columns >= limit.column)
        unimportant = columns.square().mean(1) < limit.importance
        kept &= ~(unimportant & (kept.float().mean(1) < limit.emptiness))[:, None]
        masks.append((kept.flatten().numpy(), ((filters > 0) & (filters >= limit.filter)).numpy()))
    return masks


Purify = Callable[[list[torch.Tensor], list[ops.PurificationLimits], int], Masks]
PEERS: dict[str, Purify] = {"numpy": purify_numpy, "torch": purify_torch, "torch float32": torch_float32}


def check(masks: Masks, weights: list[torch.Tensor], limits: list[ops.PurificationLimits]) -> None:
    """What was timed marks what the definition says; no score lies so near to a limit that rounding decides."""
    for (columns, filters), (expected_columns, expected_filters) in zip(
        masks, purify_numpy(weights, limits, 1), strict=True
    ):
        np.testing.assert_array_equal(columns, expected_columns)
        np.testing.assert_array_equal(filters, expected_filters)
    assert 0.3 < np.mean([columns.mean() for columns, _ in masks]) < 0.9


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("who", [*PEERS, *_core.supported_isas()])
def test_purification(benchmark, who, network, threads):
    benchmark.group = f"{network}, {threads} thread{'s' * (threads > 1)}"
    weights = weights_of(network)
    limits = limits_of(weights)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    arguments = {"args": (weights, limits, threads), "rounds": 5, "warmup_rounds": 1, "iterations": 1}
    if who in PEERS:
        masks = benchmark.pedantic(PEERS[who], **arguments)
    else:
        with forced_isa(who):
            masks = benchmark.pedantic(purify_ours, **arguments)
    torch.set_num_threads(before)
    check(masks, weights, limits)


PREFACE = """\
# Purification of whole networks against reading them once

{conditions}

Command: `{command}`.

Medians of {rounds} runs in milliseconds, float32 weights, taken in turns (torch after the others): the scores of every
layer (norms of filters and columns, importance of channels, summed in float64) and what of them is below its limits,
for the conv layers of a network. *floor*: torch.sum of every weight, which reads each once; *scores*:
`ops.purification_scores_all` alone; *ours*: that and `ops.purification_keep`. The last columns: peers, and how many
times as long as ours they take; "torch float32" sums in float32, which the others do not.
"""


def report(path: Path, rounds: int, note: str) -> None:
    """Measure everything and write the page."""
    rows = []
    for network in NETWORKS:
        weights = weights_of(network)
        limits = limits_of(weights)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            layers = [(weight, 1) for weight in weights]
            functions: dict[str, Callable[[], object]] = {
                "floor": lambda weights=weights: [weight.sum() for weight in weights],
                "scores": lambda layers=layers, n=threads: ops.purification_scores_all(layers, threads=n),
            }
            for name, function in {"ours": purify_ours, **PEERS}.items():
                check(function(weights, limits, threads), weights, limits)
                functions[name] = lambda f=function, w=weights, m=limits, n=threads: f(w, m, n)
            of_torch = {name: functions.pop(name) for name in ("floor", "torch", "torch float32")}
            time.sleep(1)  # the threads of torch go on spinning for a while, on the cores of the others
            t = interleaved(functions, lambda: None, rounds) | interleaved(of_torch, lambda: None, rounds)
            t = {name: 1e3 * value for name, value in t.items()}
            peers = [f"{t[name]:.2f} ({t[name] / t['ours']:.1f}x)" for name in PEERS]
            share = f"{100 * t['floor'] / t['scores']:.0f} %"
            own = [f"{t[name]:.2f}" for name in ("floor", "scores")]
            rows.append([network, str(threads), *own, share, f"{t['ours']:.2f}", *peers])
            print(rows[-1], file=sys.stderr)
    command = f"python bench/bench_purification.py --report {path} --rounds {rounds}"
    header = ["network", "threads", "floor", "scores", "floor / scores", "ours", *PEERS]
    path.write_text(
        f"{PREFACE.format(conditions=conditions(note), command=command, rounds=rounds)}\n{table(header, rows)}\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="markdown file to write")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--note", default="", help="a sentence about the conditions, for the page")
    arguments = parser.parse_args()
    report(arguments.report, arguments.rounds, arguments.note)
