"""Networks of 8-bit weights and activations, made of networks in float32 by looking at what they compute.

The network runs on some samples, and the inputs of its convolutions and linear layers are watched, as is what is added
to convolutions. Each gets a scale and a zero point, every filter a scale of its own (`calibration`), and the weights
become integers. Nothing is trained.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from autocompress_fast.engine import Engine
from autocompress_fast.engine.calibration import METHODS, Grid, Histogram, chosen, rounded_weights
from autocompress_fast.engine.native import fused_additions
from autocompress_fast.engine.program import (
    MIN_SCALE,
    NARROW_COLUMNS,
    NARROW_MOST,
    Program,
    Shape,
    Step,
    is_narrow,
    validate,
)

if TYPE_CHECKING:
    import torch

    from autocompress_fast.data import Dataset

__all__ = ["can_be_narrow", "quantize", "residuals", "scales_name"]

Array = np.ndarray[Any, Any]

_ELEMENTS: Final = 2**26
"""Of the values that are watched at once."""


_LEAST_FILTERS: Final = 8
"""Of a group: products are computed for 16 at once."""
_MOST_TAPS: Final = 2**24 // (255 * NARROW_MOST)
"""Of a depthwise convolution: sums of so many products stay below 2^24, where integers are exact in float32."""


def quantize(
    engine: Engine,
    batches: Array | torch.Tensor | Dataset | Iterable[Any],
    *,
    method: str = "mse",
    percentile: float = 99.99,
    skip: str | Collection[str] = (),
    samples: int = 512,
    residual_bits: int = 8,
) -> Engine:
    """The same network with 8-bit weights and activations, from what it computes on some samples; torch is not needed.

    Convolutions and linear layers compute with integers: their inputs are rounded to 256 numbers, between which zero
    lies, and the weights of every filter to 255. What residual networks add to the result of such a convolution is
    rounded as inputs are. Other steps and biases stay float32, and so do layers whose single weights were pruned
    (sparse storage), those with more than 65536 columns, and grouped convolutions of less than 8 filters a group, which
    float32 is quicker at, but for depthwise ones.

    Args:
        engine: in float32; it is not changed.
        batches: what the network takes, like that it was trained on: a float32 array or tensor of samples, an
            `acf.data.Dataset`, or an iterable of arrays or tensors, of tuples where there are several inputs. Labels
            behind the inputs, as loaders have them, are ignored.
        method: how ranges are chosen: "mse", the least squared error of activations and weights; "minmax", all that was
            seen; "percentile", all activations but the outermost. The last two keep the whole range of the weights.
        percentile: of the activations that "percentile" keeps.
        skip: layers that stay in float32: names, names of parts of the network, or globs such as "classifier.*".
        samples: at most so many are looked at: spread over an array or a data set, the first ones of an iterable.
        residual_bits: of what is added to the results of convolutions: 8, or 32 to leave it in float32. It stays there
            anyway where it is the same everywhere in the samples.

    Returns:
        An engine. Its `info` is that of the given one but for the accuracy, which was measured in float32; what was
        done stands in "provenance".

    Raises:
        TypeError, ValueError: samples that the network does not take, none at all, NaN or infinity in what it computes
            with them, an input of a layer that is always the same, a name in `skip` that no layer has, an unknown
            method, bits of residuals that there are not, or a network with nothing to quantize.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> layers = torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 2)
    >>> net = torch.nn.Sequential(*layers)
    >>> from autocompress_fast.engine import compile
    >>> engine = compile(net, x := torch.randn(100, 1, 8, 8))
    >>> small = quantize(engine, x)
    >>> [step.storage for step in small.summary().steps if step.storage]
    ['dense 8-bit', 'dense 8-bit']
    >>> bool((small(x) - engine(x)).abs().max() < 0.02)
    True
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 50 <= percentile <= 100:
        raise ValueError(f"percentile must be from 50 to 100, got {percentile!r}")
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    if residual_bits not in (8, 32):
        raise ValueError(f"residual_bits must be 8 or 32, got {residual_bits!r}")
    program = engine.program
    steps = _chosen_steps(program, (skip,) if isinstance(skip, str) else skip)
    layers = {step.output: step for step in steps}
    shapes = _shapes(program)
    added = residuals(program, shapes, layers) if residual_bits == 8 else {}
    readers: dict[int, str] = {}  # value -> what it is to the first layer that reads it
    for step in steps:
        readers.setdefault(step.inputs[0], f"the input of layer {step.name!r}")
    inputs = set(readers)
    for conv, value in added.values():
        readers.setdefault(value, f"what is added to layer {layers[conv].name!r}")
    seen, count = _watched(engine, batches, shapes, readers, samples)
    grids = {
        value: _grid(histogram, readers[value], method, percentile)
        for value, histogram in seen.items()
        if value in inputs or histogram.low < histogram.high
    }
    added = {output: pair for output, pair in added.items() if pair[1] in grids}
    program = _narrowed(program, {step.output: grids[step.inputs[0]] for step in steps}, best=method == "mse")
    program = _with_rounded_residuals(program, added, grids)
    done = {"method": method, "samples": count, "layers": len(steps)}
    if added:
        done["residuals"] = len(added)
    if method == "percentile":
        done["percentile"] = percentile
    info = {key: value for key, value in engine.info.items() if key != "accuracy"}
    info["provenance"] = {**info.get("provenance", {}), "quantization": done}
    return Engine(program, threads=engine.threads, info=info, precision=engine.precision)


def _chosen_steps(program: Program, skip: Collection[str]) -> list[Step]:
    """The steps that become 8-bit."""
    layers = [step for step in program.steps if step.op in ("conv", "linear")]
    if any(map(is_narrow, layers)):
        raise ValueError("the network computes with 8 bits already; quantize takes one in float32")
    for pattern in skip:
        if not any(_matches(step.name, pattern) for step in layers):
            names = ", ".join(dict.fromkeys(step.name for step in layers)) or "none"
            raise ValueError(f"skip names {pattern!r}, which no layer matches; layers are {names:.500}")
    possible = [step for step in layers if can_be_narrow(program, step)]
    if not possible:
        raise ValueError("there is nothing to quantize: the network has no layer with dense or columns storage")
    steps = [step for step in possible if not any(_matches(step.name, pattern) for pattern in skip)]
    if not steps:
        raise ValueError("there is nothing to quantize: skip names all layers that could be")
    return steps


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


def can_be_narrow(program: Program, step: Step) -> bool:
    """Whether `quantize` can make this layer an 8-bit one."""
    a = step.attributes
    if a["storage"] == "sparse":
        return False
    weight, groups = program.tensors[step.tensors["weight"]], a.get("groups", 1)
    if groups > 1 and groups == a["filters"] and weight.shape[1] == math.prod(a["kernel"]):
        return bool(weight.shape[1] <= _MOST_TAPS)
    if groups > 1 and a["filters"] // groups < _LEAST_FILTERS:
        return False
    return weight.size > 0 and weight.shape[1] <= NARROW_COLUMNS


def residuals(program: Program, shapes: Sequence[Shape], layers: Container[int]) -> dict[int, tuple[int, int]]:
    """Additions that the engine computes with convolutions of these layers: with which ones, and what they add.

    Args:
        program: in float32.
        shapes: of all its values, for one sample.
        layers: values of those that compute with 8 bits.

    Returns:
        Value of the addition -> value of the convolution, and the other one.
    """
    additions = {add: conv for add, conv in fused_additions(program, shapes).items() if conv in layers}
    steps = {step.output: step for step in program.steps}
    return {add: (conv, sum(steps[add].inputs) - conv) for add, conv in additions.items()}


def _grid(seen: Histogram, what: str, method: str, percentile: float) -> Grid:
    if seen.low == seen.high:
        raise ValueError(
            f"{what} is {seen.low:g} everywhere in the samples, which says nothing about its range; leave the layer in "
            f"float32 with skip"
        )
    return chosen(seen, method, percentile)


# --- watching what a network computes ---------------------------------------------------------------------------------


def _shapes(program: Program) -> list[Shape]:
    """Of all values."""
    return [given.shape for given in program.inputs] + [info.shape for info in validate(program)]


def _watched(
    engine: Engine, batches: Any, shapes: Sequence[Shape], readers: Mapping[int, str], samples: int
) -> tuple[dict[int, Histogram], int]:
    """Histograms of values of the program on the samples, and how many there were."""
    program = engine.program
    groups = _groups(list(readers), shapes)
    runs = [Engine(dataclasses.replace(program, outputs=tuple(group)), threads=engine.threads) for group in groups]
    most = max(sum(math.prod(shapes[value]) for value in group) for group in groups)
    part = program.batch or max(1, _ELEMENTS // most)
    seen = {value: Histogram() for value in readers}
    count = 0
    for inputs in _parts(batches, len(program.inputs), part, samples, whole=program.batch is not None):
        for group, run in zip(groups, runs, strict=True):
            found = run(*inputs)
            for value, array in zip(group, found if isinstance(found, tuple) else (found,), strict=True):
                try:
                    seen[value].add(np.asarray(array))
                except ValueError as error:
                    raise ValueError(f"{readers[value]} holds {error} on the samples") from None
        count += len(inputs[0])
    if count == 0:
        raise ValueError("quantize needs samples to look at, got none")
    return seen, count


def _groups(values: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Values that are watched together: together not too large."""
    groups: list[list[int]] = []
    room = 0
    for value in values:
        size = math.prod(shapes[value])
        if size > room:
            groups.append([])
            room = _ELEMENTS
        groups[-1].append(value)
        room -= size
    return groups


def _parts(batches: Any, inputs: int, part: int, samples: int, *, whole: bool) -> Iterator[tuple[Any, ...]]:
    """The inputs of one call after the other; not more samples than are wanted, but for those of a whole batch."""
    if hasattr(batches, "normalized") or (hasattr(batches, "dtype") and batches.ndim and not whole):
        count = min(part if whole else samples, len(batches))
        spread = np.linspace(0, len(batches) - 1, count).astype(np.int64)  # they may be sorted by their classes
        batches = batches.normalized(spread) if hasattr(batches, "normalized") else batches[spread]
    for batch in (batches,) if hasattr(batches, "dtype") else batches:
        given = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        given = given[:inputs] if len(given) == inputs + 1 else given
        if not all(getattr(x, "ndim", 0) for x in given):
            found = ", ".join(type(x).__name__ for x in given)
            raise TypeError(f"batches must be arrays or tensors whose first dimension is the samples, not {found}")
        size = len(given[0]) if given else 0
        for start in range(0, size, part) if not whole else (0,):
            taken = size if whole else min(part, samples, size - start)
            yield tuple(x[start : start + taken] for x in given)
            samples -= taken
            if samples <= 0:
                return


# --- programs ---------------------------------------------------------------------------------------------------------


def _narrowed(program: Program, grids: Mapping[int, Grid], *, best: bool) -> Program:
    """The program with 8 bits in the steps of these outputs."""
    tensors, steps = dict(program.tensors), list(program.steps)
    for i, step in enumerate(steps):
        grid = grids.get(step.output)
        if grid is None:
            continue
        name = step.tensors["weight"]
        least = 2 * MIN_SCALE / min(1.0, grid.scale)  # products with the scale of the input are not below either
        tensors[name], scales = rounded_weights(tensors[name], best=best, least=least)
        role = scales_name(name, tensors)
        tensors[role] = scales
        attributes = {**step.attributes, "input_scale": grid.scale, "input_zero": grid.zero}
        steps[i] = dataclasses.replace(step, attributes=attributes, tensors={**step.tensors, "scales": role})
    return dataclasses.replace(program, steps=tuple(steps), tensors=tensors)


def _with_rounded_residuals(
    program: Program, additions: Mapping[int, tuple[int, int]], grids: Mapping[int, Grid]
) -> Program:
    """The program in which these additions round what they add to a convolution."""
    steps = list(program.steps)
    for i, step in enumerate(steps):
        if step.output in additions:
            conv, value = additions[step.output]
            rounding = {"residual_scale": grids[value].scale, "residual_zero": grids[value].zero}
            steps[i] = dataclasses.replace(step, inputs=(conv, value), attributes={**step.attributes, **rounding})
    return dataclasses.replace(program, steps=tuple(steps))


def scales_name(weight: str, taken: Mapping[str, Any]) -> str:
    """Of the tensor with the scales of these weights."""
    name = f"{weight.removesuffix('.weight')}.scales"
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}.{count}"
    return free
