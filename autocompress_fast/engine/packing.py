"""Tensors of few values as codes of few bits: how files store quantized weights.

A tensor whose filters have at most 2^b different values each is a table of those values, one row for all filters or one
for each, and codes of b bits that say where in the row a value lies. What is read is what was written, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

__all__ = ["MOST_BITS", "Packed", "chosen", "expected", "joined", "pack", "stored", "unpack"]

Array = np.ndarray[Any, Any]

MOST_BITS: Final = 8
_HEADER: Final = 200
"""Bytes that a second tensor and its description take in a file, about."""


@dataclass(frozen=True)
class Packed:
    """A float32 tensor as codes.

    Attributes:
        shape: of the tensor.
        bits: of a code, 1 to 8.
        codes: (bytes,) uint8: the codes one after the other, the lowest bits of a byte first.
        table: (1 or shape[0], values) float32: what the codes mean, for all or for every index of the first dimension.
    """

    shape: tuple[int, ...]
    bits: int
    codes: Array
    table: Array


def pack(tensor: Array, *, overhead: int = _HEADER) -> Packed | None:
    """The smallest way to store a float32 tensor as codes, None where that saves no more than so many bytes.

    Example:
        >>> weight = np.where(np.arange(4096).reshape(64, 64) % 3 == 0, -0.5, 0.5).astype(np.float32)
        >>> packed = pack(weight)
        >>> packed.bits, packed.codes.nbytes, packed.table.tolist()
        (1, 512, [[-0.5, 0.5]])
        >>> bool((unpack(packed) == weight).all())
        True
    """
    if tensor.dtype != np.float32 or tensor.size == 0 or tensor.ndim == 0:
        return None
    words = np.ascontiguousarray(tensor).view(np.uint32).reshape(tensor.shape)  # -0.0 and 0.0 are two values
    below = tensor.nbytes - overhead
    ways = (words.reshape(1, -1), words.reshape(len(words), -1))
    candidates = [found for rows in ways if (found := _coded(rows, below))]
    packed = [Packed(tensor.shape, bits, codes, table) for bits, codes, table in candidates]
    return _smallest(packed, below)


def expected(shape: tuple[int, ...], values: int, alike: bool, *, overhead: int = _HEADER) -> Packed | None:
    """What `pack` makes at most of a tensor (filters, columns), or of some values, whose filters have so many values.

    Args:
        shape: of the tensor.
        values: different ones, of a filter.
        alike: all filters have the same; of values in one dimension always.

    Returns:
        Arrays without memory; None where the tensor stays as it is.

    Example:
        >>> expected((64, 64), 2, alike=True).codes.nbytes
        512
        >>> expected((64, 64), 2, alike=False).table.shape
        (64, 2)
    """
    size = math.prod(shape)
    tables = [(1, min(size, values if alike or len(shape) == 1 else values * shape[0]))]
    if len(shape) > 1:
        tables.append((shape[0], min(values, size // max(1, shape[0]))))
    packed = []
    for rows, width in tables:
        if 0 < width <= 2**MOST_BITS:
            bits = max(1, (width - 1).bit_length())
            codes = np.broadcast_to(np.uint8(0), -(-size * bits // 8))
            packed.append(Packed(shape, bits, codes, np.broadcast_to(np.float32(0), (rows, width))))
    return _smallest(packed, 4 * size - overhead)


def _smallest(packed: Sequence[Packed], below: int) -> Packed | None:
    best = min(packed, key=lambda one: one.codes.nbytes + one.table.nbytes, default=None)
    return None if best is None or best.codes.nbytes + best.table.nbytes >= below else best


def unpack(packed: Packed) -> Array:
    """The tensor.

    Raises:
        ValueError: shape, bits, codes and table do not fit each other, or a code has no value in the table.
    """
    count = math.prod(packed.shape)
    if type(packed.bits) is not int or not 1 <= packed.bits <= MOST_BITS:
        raise ValueError(f"codes have 1 to {MOST_BITS} bits, not {packed.bits!r:.20}")
    if packed.codes.dtype != np.uint8 or packed.codes.shape != (-(-count * packed.bits // 8),):
        raise ValueError(f"{count} codes of {packed.bits} bits are not {packed.codes.dtype} {packed.codes.shape}")
    rows = packed.table.shape[0] if packed.table.ndim == 2 else 0
    if packed.table.dtype != np.float32 or not packed.shape or rows not in (1, packed.shape[0]) or count == 0:
        raise ValueError(f"the table of a tensor {packed.shape} is not {packed.table.dtype} {packed.table.shape}")
    codes = _unpacked(packed.codes, packed.bits, count).reshape(rows, -1)
    if int(codes.max()) >= packed.table.shape[1]:
        raise ValueError(f"code {int(codes.max())} has no value in a table of {packed.table.shape[1]}")
    found: Array = np.take_along_axis(packed.table, codes.astype(np.intp), axis=1).reshape(packed.shape)
    return found


def chosen(tensors: Mapping[str, Array], *, overhead: int = _HEADER) -> dict[str, Packed]:
    """Those of the tensors that a file has as codes."""
    found = {name: pack(tensor, overhead=overhead) for name, tensor in tensors.items()}
    return {
        name: packed
        for name, packed in found.items()
        if packed is not None and f"{name}.codes" not in tensors and f"{name}.table" not in tensors
    }


def stored(
    tensors: Mapping[str, Array], packed: Mapping[str, Packed]
) -> tuple[dict[str, Array], dict[str, dict[str, Any]]]:
    """The tensors of a file, and how those that are packed are described in its header."""
    kept = {name: tensor for name, tensor in tensors.items() if name not in packed}
    for name, one in packed.items():
        kept |= {f"{name}.codes": one.codes, f"{name}.table": one.table}
    return kept, {name: {"shape": list(one.shape), "bits": one.bits} for name, one in packed.items()}


def joined(stored: Mapping[str, Array], described: object, most: int) -> dict[str, Array]:
    """The tensors again, of at most so many elements in all.

    Raises:
        ValueError: the description does not fit the tensors.
    """
    if not isinstance(described, dict):
        raise ValueError(f"'packed' must be an object, not {type(described).__name__}")
    tensors = dict(stored)
    for name, how in described.items():
        if not isinstance(how, dict) or how.keys() != {"shape", "bits"} or not isinstance(how["shape"], list):
            raise ValueError(f"packed tensor {name!r:.80} must have a shape and bits, not {how!r:.80}")
        shape = tuple(how["shape"])
        if not all(type(size) is int and 0 < size <= most for size in shape):
            raise ValueError(f"packed tensor {name!r:.80} has the shape {shape!r:.80}")
        most -= math.prod(shape)
        if most < 0:
            raise ValueError("the packed tensors have too many elements")
        parts = [tensors.pop(f"{name}.{part}", None) for part in ("codes", "table")]
        if parts[0] is None or parts[1] is None or name in tensors:
            raise ValueError(f"packed tensor {name!r:.80} needs {name!r:.80}.codes and .table, and nothing else")
        try:
            tensors[name] = unpack(Packed(shape, how["bits"], parts[0], parts[1]))
        except ValueError as error:
            raise ValueError(f"packed tensor {name!r:.80}: {error}") from None
    if left := [name for name, tensor in tensors.items() if tensor.dtype == np.uint8]:
        raise ValueError(f"tensor {left[0]!r:.80} has dtype U8, and belongs to no packed tensor")
    return tensors


def _coded(rows: Array, below: int) -> tuple[int, Array, Array] | None:
    """Bits, codes and table of rows of float32 as uint32; None if a row has too many values, or for so many bytes."""
    if rows.shape[1] > 4096 and len(np.unique(rows[:, :4096])) > 2**MOST_BITS * len(rows):
        return None
    if len(np.unique(rows[0])) > 2**MOST_BITS:
        return None
    ordered, first = np.sort(rows, axis=1), np.ones(rows.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
    width = int(first.sum(axis=1).max())
    bits = max(1, (width - 1).bit_length())
    if width > 2**MOST_BITS or -(-rows.size * bits // 8) + 4 * len(rows) * width >= below:
        return None
    tables = [row[chosen] for row, chosen in zip(ordered, first, strict=True)]
    table = np.stack([np.pad(one, (0, width - len(one)), "edge") for one in tables])
    codes = np.stack([np.searchsorted(one, row) for one, row in zip(tables, rows, strict=True)])
    order = np.argsort(table.view(np.float32), axis=1, kind="stable")  # as numbers, for people
    table = np.take_along_axis(table, order, axis=1)
    places = np.argsort(order, axis=1, kind="stable")
    return bits, _packed(np.take_along_axis(places, codes, axis=1).ravel(), bits), table.view(np.float32)


def _packed(codes: Array, bits: int) -> Array:
    """Codes one after the other, the lowest bits of a byte first."""
    places = (codes.astype(np.uint8)[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(places.ravel(), bitorder="little")


def _unpacked(packed: Array, bits: int, count: int) -> Array:
    places = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    found: Array = (places << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    return found
