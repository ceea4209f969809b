"""The ADMM update of conv layers of real networks: ours against numpy, torch eager and torch.compile.

    pytest bench/bench_projection.py                        three layers; groups: layer, structure, threads
    ACF_BENCH_FULL=1 pytest bench/bench_projection.py       every distinct layer, and torch.compile
    python bench/bench_projection.py --report docs/benchmarks-projection.md
                                                            the table, with the machine's copy bandwidth

All do the same: V = W + U, Z <- the nearest point to V with a quarter of the groups, U <- V - Z, and the norms of
W - Z and Z - Z_old. Every run starts from the same Z and U, which come from three updates of slowly moving weights, as
in training; restoring them is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from measuring import NETWORKS, Shape, conditions, forced_isa, interleaved, network_layers, table

from autocompress_fast import _core, ops

STRUCTURES = ("filter", "column", "element")
SMALL = [(64, 3, 3, 3), (64, 64, 3, 3), (256, 64, 1, 1)]
COMPILED = {(64, 64, 3, 3), (256, 64, 1, 1), (512, 512, 3, 3), (512, 2048, 1, 1)}  # in the report: compiling takes long
FULL = bool(os.environ.get("ACF_BENCH_FULL"))


def distinct_layers() -> list[Shape]:
    """Every shape of the three networks once, smallest first."""
    shapes = {shape for network in NETWORKS for shape in network_layers(network)}
    return sorted(shapes, key=lambda shape: (np.prod(shape), shape))


# ---- the same update, four times


@dataclass
class State:
    """A layer in the middle of ADMM training."""

    structure: str
    keep: int
    w: torch.Tensor
    z: torch.Tensor
    u: torch.Tensor
    z_before: torch.Tensor
    u_before: torch.Tensor

    @classmethod
    def of(cls, shape: Shape, structure: str, seed: int = 0) -> State:
        """A reproducible state with a quarter of the groups kept."""
        generator = torch.Generator().manual_seed(seed)
        groups = {"filter": shape[0], "column": int(np.prod(shape[1:])), "element": int(np.prod(shape))}[structure]
        keep = max(1, groups // 4)
        w = torch.randn(shape, generator=generator) * 0.05
        z, u = ops.project(w, structure, keep=keep), torch.zeros(shape)
        for _ in range(3):
            w = w + torch.randn(shape, generator=generator) * 0.005
            ops.admm_update(w, z, u, structure, keep=keep)
        return cls(structure, keep, w, z, u, z.clone(), u.clone())

    def restore(self) -> None:
        """Back to before the update; by numpy, which wakes no threads."""
        np.copyto(self.z.numpy(), self.z_before.numpy())
        np.copyto(self.u.numpy(), self.u_before.numpy())


def update_ours(state: State, threads: int) -> tuple[float, float]:
    """One call of the public function."""
    return ops.admm_update(state.w, state.z, state.u, state.structure, keep=state.keep, threads=threads)


def update_numpy(state: State, _threads: int) -> tuple[float, float]:
    """As one would write it in numpy: norms, argpartition, mask."""
    w, z, u = state.w.numpy(), state.z.numpy(), state.u.numpy()
    v = w + u
    rows = v.reshape(v.shape[0], -1)
    if state.structure == "element":
        values, shape = np.abs(v).reshape(-1), v.shape
    else:
        values = np.square(rows).sum(axis=1 if state.structure == "filter" else 0)
        shape = (-1, *[1] * (v.ndim - 1)) if state.structure == "filter" else (1, *v.shape[1:])
    mask = np.zeros(values.shape, dtype=bool)
    mask[np.argpartition(values, -state.keep)[-state.keep :]] = True
    after = v * mask.reshape(shape)
    primal, dual = np.linalg.norm((w - after).ravel()), np.linalg.norm((after - z).ravel())
    z[...] = after
    u[...] = v - after
    return float(primal), float(dual)


def torch_update(
    w: torch.Tensor, z: torch.Tensor, u: torch.Tensor, structure: str, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As one would write it in torch: norms, topk, mask."""
    v = w + u
    rows = v.flatten(1)
    if structure == "element":
        values, shape = v.abs().flatten(), v.shape
    else:
        values = rows.square().sum(1 if structure == "filter" else 0)
        shape = (v.shape[0], *[1] * (v.ndim - 1)) if structure == "filter" else (1, *v.shape[1:])
    mask = torch.zeros_like(values).index_fill_(0, values.topk(keep, sorted=False).indices, 1)
    after = v * mask.view(shape)
    primal, dual = torch.linalg.vector_norm(w - after), torch.linalg.vector_norm(after - z)
    z.copy_(after)
    u.copy_(v - after)
    return primal, dual


def update_torch(state: State, _threads: int) -> tuple[float, float]:
    """Torch, operator by operator."""
    primal, dual = torch_update(state.w, state.z, state.u, state.structure, state.keep)
    return float(primal), float(dual)


@functools.cache
def compiled_update() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The function above, compiled when it is first needed and again for every shape."""
    torch._dynamo.config.cache_size_limit = 1000
    return torch.compile(torch_update, dynamic=False)


def update_compiled(state: State, _threads: int) -> tuple[float, float]:
    """Torch, compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile of this version warns of its own parts
        primal, dual = compiled_update()(state.w, state.z, state.u, state.structure, state.keep)
    return float(primal), float(dual)


Update = Callable[[State, int], tuple[float, float]]
PEERS: dict[str, Update] = {"numpy": update_numpy, "torch": update_torch, "torch.compile": update_compiled}


def check(state: State, residuals: tuple[float, float]) -> None:
    """The update that was timed did what it should: the right count, energy, U and residuals."""
    v = state.w + state.u_before
    expected = ops.project(v, state.structure, keep=state.keep)
    assert state.z.count_nonzero() == expected.count_nonzero()
    # Sums in float32 may rank two nearly equal groups the other way round; the energy then hardly differs.
    torch.testing.assert_close(state.z.norm(), expected.norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(state.u, v - state.z, rtol=1e-5, atol=1e-6)
    expected_residuals = ((state.w - state.z).norm(), (state.z - state.z_before).norm())
    np.testing.assert_allclose(residuals, [float(r) for r in expected_residuals], rtol=1e-3)


# ---- pytest-benchmark


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", distinct_layers() if FULL else SMALL, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("who", [*PEERS, *_core.supported_isas()])
def test_admm_update(benchmark, who, shape, structure, threads):
    if who == "torch.compile" and not FULL:
        pytest.skip("takes seconds to compile each function: ACF_BENCH_FULL=1")
    benchmark.group = f"{'x'.join(map(str, shape))} {structure}, {threads} thread{'s' * (threads > 1)}"
    state = State.of(shape, structure)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with forced_isa(who) if who not in PEERS else contextlib.nullcontext():
        update = PEERS.get(who, update_ours)
        residuals = benchmark.pedantic(
            update, args=(state, threads), setup=state.restore, rounds=20, warmup_rounds=1, iterations=1
        )
    torch.set_num_threads(threads_before)
    check(state, residuals)


# ---- the report


def few(rounds: int) -> int:
    """Runs of what takes long."""
    return max(5, rounds // 4)


def measure(shape: Shape, structure: str, threads: int, *, with_compile: bool, rounds: int) -> dict[str, float]:
    """Medians in seconds: the copies, every implementation, and the empty calls."""
    torch.set_num_threads(threads)
    state = State.of(shape, structure)
    one, other = torch.randn(state.w.shape), torch.empty(state.w.shape)
    three, other_three = torch.randn(3, *shape), torch.empty(3, *shape)
    tiny = State.of((1, 1), "filter")
    tiny_one, tiny_other = torch.randn(1), torch.empty(1)

    def prepare() -> None:
        state.restore()
        np.copyto(other.numpy(), one.numpy())
        np.copyto(other_three.numpy(), three.numpy())

    updates = {name: update for name, update in PEERS.items() if with_compile or name != "torch.compile"}
    functions: dict[str, Callable[[], object]] = {
        "copy": lambda: other.copy_(one),
        "copy of three": lambda: other_three.copy_(three),
        "empty copy": lambda: tiny_other.copy_(tiny_one),
        "empty call": lambda: update_ours(tiny, threads),
        "ours": lambda: update_ours(state, threads),
    }
    slow = {name: (lambda update=update: update(state, threads)) for name, update in updates.items()}
    for update in (update_ours, *updates.values()):
        state.restore()
        check(state, update(state, threads))
    result = interleaved(functions, prepare, rounds)
    result.update(interleaved(slow, state.restore, few(rounds)))
    return result


def measure_network(network: str, structure: str, threads: int, rounds: int) -> dict[str, float]:
    """All conv layers at once: one call of ours, torch layer by layer, and copies of every weight."""
    torch.set_num_threads(threads)
    states = [State.of(shape, structure, seed) for seed, shape in enumerate(network_layers(network))]
    layers = [(state.w, state.z, state.u, structure, state.keep, 1) for state in states]
    others = [torch.empty_like(state.w) for state in states]

    def prepare() -> None:
        for state in states:
            state.restore()

    return interleaved(
        {
            "copy": lambda: [other.copy_(state.w) for other, state in zip(others, states, strict=True)],
            "ours": lambda: ops.admm_update_all(layers, threads=threads),
            "torch": lambda: [update_torch(state, threads) for state in states],
        },
        prepare,
        rounds,
    )


def layer_table(structure: str, threads: int, *, with_compile: bool, rounds: int) -> tuple[str, list[float]]:
    """One row per distinct layer; and the shares of the floor of the layers that are not call overhead."""
    rows, shares = [], []
    for shape in distinct_layers():
        t = measure(shape, structure, threads, with_compile=with_compile and shape in COMPILED, rounds=rounds)
        floor = 3 * max(t["copy"] - t["empty copy"], 0)
        kernel = max(t["ours"] - t["empty call"], 1e-9)
        if kernel > 2 * t["empty call"]:
            shares.append(floor / kernel)
        peers = [f"{t[name] * 1e6:.0f} ({t[name] / t['ours']:.1f}x)" if name in t else "" for name in PEERS]
        rows.append(
            [
                "x".join(map(str, shape)),
                f"{t['copy'] * 1e6:.1f}",
                f"{t['copy of three'] * 1e6:.1f}",
                f"{floor * 1e6:.1f}",
                f"{t['ours'] * 1e6:.1f}",
                f"{kernel * 1e6:.1f}",
                f"{100 * floor / kernel:.0f} %",
                *peers,
            ]
        )
        print(structure, threads, rows[-1], file=sys.stderr)
    header = ["layer", "copy", "copy of 3", "floor", "call", "kernel", "floor / kernel", *PEERS]
    return table(header, rows), shares


PREFACE = """\
# The ADMM update against the machine's copy bandwidth

{conditions}

Command: `{command}`.

Medians of {rounds} runs (peers: {few}) in microseconds, float32, taken in turns with the copies. A quarter of the
groups is kept; Z and U come from earlier updates of slowly moving weights.

- *copy*: one array of the weight's size to another, by torch; *copy of 3*: the same for three times the size, which is
  what an update touches (W, U, Z).
- *floor*: three times *copy*, less an empty copy: what it takes to move the bytes of an update that reads W and U twice
  and writes Z and U once, 6 passes over the weight's bytes, where a copy is 2. Passes can be saved: filters whose U or
  Z is zero already are read and written less, and what the first pass read last is still in the cache for the second.
- *call*: `ops.admm_update` from Python; *kernel*: less a call for a 1 x 1 weight, measured in the same run.
- The last columns: peers doing the same update, and how many times as long as our call they take. torch.compile was
  measured for a few layers: compiling takes seconds for each.
"""


def report(path: Path, *, with_compile: bool, rounds: int, note: str) -> None:
    """Measure everything and write the page."""
    command = (
        f"python bench/bench_projection.py --report {path} --rounds {rounds}{'' if with_compile else ' --no-compile'}"
    )
    parts = [PREFACE.format(conditions=conditions(note), command=command, rounds=rounds, few=few(rounds))]
    for structure in STRUCTURES:
        for threads in (1, 2):
            text, shares = layer_table(structure, threads, with_compile=with_compile, rounds=rounds)
            below = sum(share < 0.8 for share in shares)
            parts += [
                f"## {structure.capitalize()}s, {threads} {'thread' if threads == 1 else 'threads'}",
                "",
                f"Of the {len(shares)} layers whose kernel takes more than twice an empty call, {len(shares) - below} "
                f"are at 80 % of the floor or better, {below} below; median {100 * statistics.median(shares):.0f} %.",
                "",
                text,
                "",
            ]
    rows = []
    for network in NETWORKS:
        for structure in STRUCTURES:
            for threads in (1, 2):
                t = measure_network(network, structure, threads, few(rounds))
                floor = 3 * t["copy"]
                rows.append(
                    [
                        network,
                        structure,
                        str(threads),
                        f"{floor * 1e3:.2f}",
                        f"{t['ours'] * 1e3:.2f}",
                        f"{100 * floor / t['ours']:.0f} %",
                        f"{t['torch'] * 1e3:.2f} ({t['torch'] / t['ours']:.1f}x)",
                    ]
                )
                print(rows[-1], file=sys.stderr)
    header = ["network", "structure", "threads", "floor (ms)", "ours (ms)", "floor / ours", "torch layer by layer (ms)"]
    parts += ["## Whole networks, one call of `ops.admm_update_all`", "", table(header, rows), ""]
    path.write_text("\n".join(parts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="markdown file to write")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--note", default="", help="a sentence about the conditions, for the page")
    arguments = parser.parse_args()
    report(arguments.report, with_compile=not arguments.no_compile, rounds=arguments.rounds, note=arguments.note)
