"""Mutated .acf files: each is refused with a FileFormatError, or it loads and, if that takes little, runs.

File N is made from the number N alone. A run writes the files that break the rule to a folder, as N.acf and N.txt, and
goes on; given the same folder and numbers again, it continues where it was stopped:

    python tests/fuzz_acf.py FOLDER 0 1000000

A file may take 10 seconds and 4 GiB; a process that dies of one is started again behind it. CONTRIBUTING.md says how to
run this with the sanitizers.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import mmap
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from test_acf_file import INFO, VERSION_1, Builder, every_operation
from test_engine_native import Drawn
from test_narrow import every_residual_of_8_bits, every_storage, narrowed

import autocompress_fast as acf
from autocompress_fast.engine import Engine, FileFormatError, native, packing
from autocompress_fast.engine.file import METADATA_KEY
from autocompress_fast.engine.program import (
    ACTIVATIONS,
    Input,
    Program,
    Step,
    is_narrow,
    program_to_json,
    rounds_residual,
    validate,
)

SECONDS = 10
KIB = 4 << 20
MOST_WORK = 2**20
"""Multiply-adds, or elements looked at, of one sample; a file that takes more is only loaded."""
MOST_WORKSPACE = 2**22

OUTCOMES = ("refused", "ran", "large", "found")

# --- files to begin with


class Tensor(NamedTuple):
    """As it stands in a file."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass(frozen=True)
class Content:
    """What a file says, to be changed and packed."""

    metadata: Any
    tensors: dict[str, Tensor]


DTYPES = {"F32": np.float32, "I8": np.int8, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def content_of(program: Program, info: dict[str, Any], *, few_values: bool = False) -> Content:
    """As a file has it; with few values, its numbers are rounded to 0, 1/2, 1, 2, ... and packed."""
    stored, described = dict(program.tensors), {}
    narrow = any(map(is_narrow, program.steps))
    if few_values:
        scales = {step.tensors["scales"] for step in program.steps if is_narrow(step)}  # must not become zero
        floats = {k for k, v in stored.items() if v.dtype == np.float32 and k not in scales}
        rounded = {k: np.round(2 * v) / 2 if k in floats else v for k, v in stored.items()}
        stored, described = packing.stored(rounded, packing.chosen(rounded, overhead=-(2**20)))
    residuals = any(map(rounds_residual, program.steps))
    version = {"format_version": 4 if residuals else 3 if narrow else 2 if few_values else 1}
    if narrow or few_values:
        version["packed"] = described
    tensors = {k: Tensor(NAMES[v.dtype], list(v.shape), v.tobytes()) for k, v in stored.items()}
    metadata = version | {"program": program_to_json(program), "info": info}
    return Content(json.loads(json.dumps(metadata)), tensors)


def packed(content: Content, draw: random.Random | None = None) -> bytes:
    """The bytes of a file, whatever its tensors are said to be."""
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in content.tensors.items():
        end = at + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(content.metadata)
    if draw is not None and draw.random() < 0.1:
        text = damage_text(draw, text)
    header["__metadata__"] = {METADATA_KEY: text}
    if draw is not None and draw.random() < 0.2:
        damage_json(draw, header)
    encoded = json.dumps(header).encode()
    if draw is not None and draw.random() < 0.05:
        encoded = damage_text(draw, encoded.decode()).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(tensor.data for tensor in content.tensors.values())


def part(program: Program, first: int, last: int) -> Program:
    """Steps [first, last) alone, with all that they read from before them as inputs."""
    shapes = [given.shape for given in program.inputs] + [info.shape for info in validate(program)]
    steps = program.steps[first:last]
    made = {step.output for step in steps}
    read = sorted({value for step in steps for value in step.inputs} - made)
    number = {value: i for i, value in enumerate([*read, *sorted(made)])}
    used = {value for step in steps for value in step.inputs}
    return Program(
        tuple(Input(f"x{value}", shapes[value]) for value in read),
        tuple(
            Step(s.op, tuple(number[v] for v in s.inputs), number[s.output], s.attributes, s.tensors, s.name)
            for s in steps
        ),
        tuple(number[value] for value in sorted(made - used)),
        {name: program.tensors[name] for step in steps for name in step.tensors.values()},
    )


def thin(b: Builder, rows: int, columns: int) -> dict[str, np.ndarray]:
    """A sparse matrix with so few weights that they are not run as a block."""
    indices = np.arange(rows) * 7 % columns
    return {
        "values": b.floats(rows),
        "indices": indices.astype(np.uint16),
        "offsets": np.arange(rows + 1, dtype=np.uint32),
    }


def special_programs() -> Iterator[Program]:
    """What the engine computes in a way of its own."""
    plain = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "activation": "none"}
    one = {**plain, "kernel": (1, 1), "padding": (0,) * 4}
    three = {**plain, "kernel": (3, 3), "padding": (1,) * 4}

    b = Builder(8, 3, 3)  # every filter with columns of its own
    b.add("conv", 0, arrays=thin(b, 80, 72), **three, filters=80, storage="sparse")
    b.add("mean", 1, axes=(1, 2), keep=False)
    b.add("linear", 2, arrays=thin(b, 70, 80), filters=70, storage="sparse", activation="relu")
    yield b.program(3)

    b = Builder(4, 5, 5)  # the same in groups, and a residual
    sparse = {
        "values": b.floats(4),
        "indices": np.array([0, 17, 8, 9], np.uint16),
        "offsets": np.array([0, 2, 2, 3, 4], np.uint16),
    }
    b.add("conv", 0, arrays=sparse, **{**three, "groups": 2}, filters=4, storage="sparse")
    b.add("conv", 1, arrays={"weight": b.floats(4, 36), "bias": b.floats(4)}, **three, filters=4, storage="dense")
    b.add("add", 2, 0, activation="relu")
    yield b.program(3)

    b = Builder(3, 9, 6)  # an expansion, and a reshape of planes
    b.add("conv", 0, arrays={"weight": b.floats(6, 3)}, **one, filters=6, storage="dense")
    b.add("conv", 1, arrays={"weight": b.floats(6, 9)}, **{**three, "groups": 6}, filters=6, storage="dense")
    b.add("reshape", 2, shape=(9, 36))
    yield b.program(3)

    b = Builder(2, 6, 6)  # one value with readers that pad it differently
    b.add("conv", 0, arrays={"weight": b.floats(2, 2)}, **one, filters=2, storage="dense")
    wide = {**three, "kernel": (5, 5), "padding": (3, 0, 1, 4)}
    b.add("conv", 1, arrays={"weight": b.floats(1, 18)}, **three, filters=1, storage="dense")
    b.add("conv", 1, arrays={"weight": b.floats(1, 50)}, **wide, filters=1, storage="dense")
    yield b.program(2, 3, 1)

    b = Builder()  # a number
    b.add("leaky_relu", 0, slope=0.25)
    b.add("reshape", 1, shape=(1, 1, 1))
    yield Program(b.inputs, tuple(b.steps), (2, 1), {}, batch=2)


@cache
def beginnings() -> list[tuple[bytes, bytes]]:
    """Pickled contents, of which copies are made in no time, and whole files."""
    whole = every_operation()
    steps = range(len(whole.steps))
    programs = [part(whole, i, i + count) for count in (1, 1, 1, 3) for i in steps[: len(steps) - count + 1]]
    programs += [*special_programs()] * 5
    programs += [Drawn(seed).program for seed in range(20)]
    programs += [narrowed(Drawn(seed).program, seed) for seed in range(20)]
    whole_narrow = narrowed(every_storage(), 0)
    narrow = [part(whole_narrow, i, i + count) for count in (1, 1, 3) for i in range(len(whole_narrow.steps) - count)]
    programs += narrow * 2
    residuals = every_residual_of_8_bits()
    programs += [residuals, part(residuals, 1, 3), part(residuals, 3, 8), part(residuals, 0, 3)]
    contents = [content_of(program, {}, few_values=number % 4 == 3) for number, program in enumerate(programs)]
    contents.append(content_of(whole, INFO))
    found = [(pickle.dumps(content), packed(content)) for content in contents]
    return [*(pair for pair in found if len(pair[1]) < 2**14), (found[-1][0], VERSION_1.read_bytes())]


# --- damage

NASTY = (
    0, 1, -1, 2, 3, 7, 255, 2**16, 2**16 + 1, 2**26, 2**28, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64,
    10**30, 10**400, -(10**400), 0.5, -0.0, 1.0, 1e-320, 1e39, -1e39, 1e308, True, False, None, "", "x", "\ud800", "\0",
    [], {}, [0], [1, 1], [-1, 0], [2**31 - 1] * 2, [0] * 4, [2**20] * 4, [2**16, 2**12], [3, 3], [1] * 9, [[]], [None],
    [2**63, 0], {"x": 1},
)  # fmt: skip
WORDS = (
    *ACTIVATIONS, "dense", "columns", "sparse", "leaky", "input_scale", "input_zero", "scales",
    "residual_scale", "residual_zero",
    "F32", "I8", "U8", "U16", "U32", "F64", "F16", "I64", "BOOL",
    "__metadata__",
)  # fmt: skip
TOKENS = (
    "1e999", "-1e999", "-0", "0.0", "1e3", "NaN", "Infinity", "-Infinity", "00", "0x10", "1" * 5000, "1e-999", "null",
    "true", '"', "[", "]", "{", "}", ",", ":", "\\", "\\u0000", "\\ud800", "\0", "\x7f", "\u00e9", "[" * 3000,
    '{"":' * 3000,
)  # fmt: skip
SMALL = (1, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33)


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            places(value[key], found)
    return found


def damage_json(draw: random.Random, value: Any) -> None:
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        found = places(value, [])
        if not found:
            return
        container, key = draw.choice(found)
        old, action = container[key], draw.random()
        if action < 0.08:
            del container[key]
        elif action < 0.13 and isinstance(container, dict):
            container[draw.choice(found)[1] if draw.random() < 0.5 else draw.choice(WORDS)] = container.pop(key)
        elif action < 0.2 and isinstance(container, list):
            container.insert(key, copy.deepcopy(draw.choice((old, draw.choice(NASTY)))))
        elif action < 0.3:
            other, there = draw.choice(found)
            container[key] = copy.deepcopy(other[there])
        elif action < 0.75 and isinstance(old, int):
            nasty = copy.deepcopy(draw.choice(NASTY))
            container[key] = draw.choice((old + 1, old - 1, old * 2, old // 2, -old, draw.choice(SMALL), nasty))
        elif action < 0.75 and isinstance(old, str):
            container[key] = draw.choice(WORDS)
        elif action < 0.75 and isinstance(old, list) and old and all(type(item) is int for item in old):
            change = draw.choice((list.reverse, list.pop, draw.shuffle, lambda items: items.append(items[0])))
            change(old)
        else:
            container[key] = copy.deepcopy(draw.choice(NASTY))


def damage_text(draw: random.Random, text: str) -> str:
    numbers = [match.span() for match in re.finditer(r"-?\d+(\.\d+)?", text)]
    first, last = draw.choice(numbers or [(0, 0)])
    if draw.random() < 0.3:
        first = last = draw.randrange(len(text))
    return text[:first] + draw.choice(TOKENS) + text[last:]


def renumbered(steps: list[Any], inputs: int, order: list[int], program: Any) -> None:
    """Steps in another order, or fewer or more of them, with numbers that still say the same, where they can."""
    number = {inputs + old: inputs + new for new, old in reversed([*enumerate(order)])}
    program["steps"] = made = [copy.deepcopy(steps[old]) for old in order]
    for i, step in enumerate(made):
        step["inputs"] = [number.get(value, value) if value >= inputs else value for value in step["inputs"]]
        step["output"] = inputs + i
    program["outputs"] = [number.get(value, value) for value in program["outputs"]]


def damage_steps(draw: random.Random, content: Content) -> None:
    """What stays valid more often than not."""
    program = content.metadata["program"]
    steps, inputs = program["steps"], len(program["inputs"])
    action = draw.randrange(8) if steps else draw.randrange(2, 6)
    if action == 0:
        order = [*range(len(steps))]
        where = draw.randrange(len(order))
        how = draw.randrange(3)
        if how == 0:
            del order[where]
        elif how == 1:
            order.insert(where, draw.choice(order))
        else:
            draw.shuffle(order)
        renumbered(steps, inputs, order, program)
    elif action == 1:
        draw.choice(steps)["inputs"] = [draw.randrange(inputs + len(steps)) for _ in range(draw.choice((1, 1, 2, 3)))]
    elif action == 2:
        program["outputs"] = [draw.randrange(inputs + len(steps)) for _ in range(draw.randrange(1, 4))]
    elif action == 3:
        program["batch"] = draw.choice((None, 1, 2, 3, 2**20, 2**31 - 1))
    elif action in (4, 5):
        shape = draw.choice(program["inputs"])["shape"]
        if shape:
            sizes = SMALL if action == 4 else (*SMALL, 64, 257, 1000, 4096, 2**16, 2**20)
            shape[draw.randrange(max(0, len(shape) - 2), len(shape))] = draw.choice(sizes)
    else:
        attributes = draw.choice(steps)["attributes"]
        for key, old in attributes.items():
            if draw.random() < 0.5:
                continue
            if isinstance(old, list):
                attributes[key] = [draw.choice((item, item, *SMALL, 0)) for item in old]
            elif isinstance(old, bool):
                attributes[key] = not old
            elif isinstance(old, int):
                attributes[key] = draw.choice((old, *SMALL, 0))
            elif isinstance(old, float):
                attributes[key] = draw.choice((old, 0.0, -1.5, 3e38, 1e-45, -3e38))
            elif key == "activation":
                attributes[key] = draw.choice(ACTIVATIONS)


NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 3e38, -3e38, 1e20, math.nan, math.inf, -math.inf)
INDICES = (0, 1, 2, 3, 5, 8, 17, 26, 27, 72, 80, 255, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


def damage_tensor(draw: random.Random, content: Content) -> None:
    tensors = content.tensors
    if not tensors:
        return damage_steps(draw, content)
    name = draw.choice(list(tensors))
    tensor = tensors[name]
    dtype = np.dtype(DTYPES[tensor.dtype])
    array = np.frombuffer(tensor.data, dtype, len(tensor.data) // dtype.itemsize).copy()
    action = draw.randrange(12)
    if action == 0:
        del tensors[name]
    elif action == 1:
        other = draw.choice((name + "x", "", "\0", draw.choice(list(tensors))))
        tensors[other] = tensors.pop(name)
    elif action == 2:
        other = draw.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif action == 3:
        wanted = draw.choice(list(DTYPES))
        with np.errstate(all="ignore"):
            tensors[name] = Tensor(wanted, tensor.shape, array.astype(DTYPES[wanted]).tobytes())
    elif action == 4:
        shape = [*tensor.shape]
        shape.insert(draw.randrange(len(shape) + 1), 1) if draw.random() < 0.5 or not shape else shape.reverse()
        tensors[name] = tensor._replace(shape=shape)
    elif action == 5:  # as many as the header says, but others
        shape = [draw.choice((size, size + 1, size - 1, 0, 1, *SMALL)) for size in tensor.shape]
        count = math.prod(max(size, 0) for size in shape)
        tensors[name] = Tensor(tensor.dtype, shape, np.resize(array, count).tobytes())
    elif action == 6:
        size = draw.choice((0, 1, len(tensor.data) // 2, max(0, len(tensor.data) - 1)))
        tensors[name] = tensor._replace(data=tensor.data[:size])
    elif array.size:
        some = NUMBERS if tensor.dtype == "F32" else [value % 2 ** (8 * dtype.itemsize) for value in INDICES]
        for _ in range(draw.choice((1, 1, 2, 5))):
            i, how = draw.randrange(array.size), draw.randrange(6)
            with np.errstate(all="ignore"):
                if how == 0:
                    array[i] = array[draw.randrange(array.size)]
                elif how == 1:
                    array[i] += dtype.type(1)
                elif how == 2:
                    array[i] -= dtype.type(1)
                elif how == 3:
                    array = array[::-1].copy() if draw.random() < 0.3 else np.sort(array)
                else:
                    array[i] = np.asarray(draw.choice(some)).astype(dtype)
        tensors[name] = tensor._replace(data=array.tobytes())
    return None


def damage_bytes(draw: random.Random, whole: bytes) -> bytes:
    content = bytearray(whole)
    header = int.from_bytes(whole[:8], "little")
    for _ in range(draw.choice((1, 1, 2, 8))):
        if not content:
            break
        place = min(
            draw.choice((draw.randrange(8), 8 + draw.randrange(header), draw.randrange(len(content)))), len(content) - 1
        )
        action = draw.randrange(12)
        if action < 3:
            content[place] = draw.randrange(256)
        elif action < 6:
            content[place] ^= 1 << draw.randrange(8)
        elif action < 8:
            content[place:place] = bytes(draw.choice(b'0123456789[]{}",:-e') for _ in range(draw.randrange(1, 4)))
        elif action == 8:
            del content[place : place + draw.choice((1, 1, 2, 5, 100))]
        elif action == 9:
            del content[place:]
        elif action == 10:
            start = draw.randrange(len(content))
            content[place : place + draw.choice((0, 8))] = content[start : start + draw.choice((1, 8, 100))]
        else:
            _, other = draw.choice(beginnings())
            start = draw.randrange(len(other))
            content[place:] = other[start:] if draw.random() < 0.5 else other[min(place, len(other) - 1) :]
    return bytes(content)


def mutated(number: int) -> bytes:
    """File `number`."""
    draw = random.Random(number)
    content, whole = draw.choice(beginnings())
    kind = draw.random()
    if kind < 0.2:
        return damage_bytes(draw, whole)
    changed = pickle.loads(content)
    if kind < 0.4:
        damage_json(draw, changed.metadata)
    else:
        for _ in range(draw.choice((1, 1, 2, 3))):
            draw.choice((damage_steps, damage_tensor))(draw, changed)
        if kind < 0.6:
            damage_json(draw, changed.metadata)
    return packed(changed, draw if kind < 0.7 else None)


# --- what must not happen

PATTERN = np.sin(np.arange(2**20) * 1.7).astype(np.float32)
WILD = np.where(
    np.arange(2**20) % 7 == 3, np.resize(np.float32([np.nan, np.inf, -np.inf, 3e38, 1e-45]), 2**20), PATTERN
)


def work(engine: Engine) -> int:
    """Of one sample: multiply-adds, and what pooling looks at."""
    shapes = [given.shape for given in engine.inputs]
    total = sum(map(math.prod, [*shapes, *engine.output_shapes]))
    for step, info in zip(engine.program.steps, validate(engine.program), strict=True):
        shapes.append(info.shape)
        total += info.macs + math.prod(info.shape) + info.prepared
        if "kernel" in step.attributes and step.op != "conv":
            total += math.prod(info.shape) * math.prod(map(min, step.attributes["kernel"], shapes[step.inputs[0]][1:]))
        elif step.op == "adaptive_avg_pool":
            total += sum(math.prod(shapes[value]) for value in step.inputs) + 4 * math.prod(info.shape)
    return total


def outcome(path: Path, number: int) -> str:
    """Load a file, run it; "refused", "ran", "large" where that would take long, or any exception."""
    native.LEAST_EXPANSION = 200 if number % 2 else 3 << 18  # bytes: those of small files too
    try:
        engine = acf.load(path, threads=1)
    except FileFormatError:
        return "refused"
    samples = engine.program.batch or (3 if number % 3 == 0 else 1)
    if samples * work(engine) > MOST_WORK or engine.workspace_bytes(samples) > MOST_WORKSPACE:
        return "large"
    values = WILD if number % 5 == 0 else PATTERN
    inputs = [values[: samples * math.prod(given.shape)].reshape(samples, *given.shape) for given in engine.inputs]
    outputs = engine(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if [y.shape for y in outputs] != [(samples, *shape) for shape in engine.output_shapes]:
        raise AssertionError(f"outputs of shapes {[y.shape for y in outputs]}")
    return "ran"


# --- long runs


class State:
    """How far a run has come, kept in a file that outlives the process.

    Attributes:
        numbers: the next file, whether a process is at it, and how many came to each of `OUTCOMES`.
    """

    def __init__(self, path: Path, first: int) -> None:
        if not path.exists():
            path.write_bytes(np.array([first, 0, *[0] * len(OUTCOMES)], np.int64).tobytes())
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)
        self.numbers = np.frombuffer(self.map, np.int64)

    @property
    def number(self) -> int:
        return int(self.numbers[0])

    def count(self, result: str) -> None:
        self.numbers[2 + OUTCOMES.index(result)] += 1
        self.numbers[0] += 1

    def __str__(self) -> str:
        counts = (f"{n} {name}" for name, n in zip(OUTCOMES, self.numbers[2:], strict=True))
        return f"next {self.number}: {', '.join(counts)}"


def record(folder: Path, number: int, what: str) -> None:
    (folder / f"{number}.acf").write_bytes(mutated(number))
    (folder / f"{number}.txt").write_text(what, errors="backslashreplace")


def work_through(folder: Path, scratch: Path, state: State, last: int) -> None:
    """What the process does that may die."""
    warnings.simplefilter("error")
    supervisor = os.getppid()
    state.numbers[1] = True
    while state.number < last and os.getppid() == supervisor:
        number = state.number
        scratch.write_bytes(mutated(number))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: others may need it meanwhile
        try:
            result = outcome(scratch, number)
        except Exception:
            result = "found"
            record(folder, number, traceback.format_exc())
        signal.setitimer(signal.ITIMER_PROF, 0)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > KIB:
            record(folder, number, f"{result}, but took more than {KIB} KiB of memory")
            state.count("found")
            return
        state.count(result)


def supervise(folder: Path, first: int, last: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"{first}-{last}.state"
    state, begin = State(name, first), time.monotonic()
    started = state.number
    with (folder / f"{first}-{last}.log").open("w+b") as log:
        while state.number < last:
            log.seek(0)
            log.truncate()
            state.numbers[1] = False
            command = [sys.executable, __file__, str(folder), str(first), str(last), "--worker"]
            worker = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                while worker.poll() is None:
                    time.sleep(1)
                    rate = (state.number - started) / (time.monotonic() - begin)
                    print(f"\r{state}; {rate:.0f}/s  ", end="", flush=True)
            finally:
                worker.kill()
            if worker.returncode != 0:
                log.seek(0)
                said = log.read().decode(errors="replace")
                if not state.numbers[1]:
                    raise RuntimeError(f"cannot begin: {said}")
                died = f"died with code {worker.returncode} ({-signal.SIGPROF}: more than {SECONDS} seconds)\n"
                record(folder, state.number, died + said)
                state.count("found")
    print(f"\r{state}  ")
    return int(state.numbers[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what is found, and how far the run has come")
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int, help="not included")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.worker:
        return min(1, supervise(given.folder, given.first, given.last))
    state = State(given.folder / f"{given.first}-{given.last}.state", given.first)
    memory = Path("/dev/shm")
    scratch = (memory if memory.is_dir() else given.folder) / f"fuzz-{given.first}-{given.last}.acf"
    try:
        work_through(given.folder, scratch, state, given.last)
    finally:
        scratch.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
