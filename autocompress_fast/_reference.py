"""The operations of `ops` in plain numpy: slow, obviously right, and the oracle of the tests.

Sums are taken in float64, so a comparison with the kernels is exact where the sums are (small integers, few bits) and
close everywhere else.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Update:
    """What an ADMM update gives."""

    z: Array
    u: Array
    primal: float
    dual: float


def group_index(shape: tuple[int, ...], structure: str, groups: int = 1) -> NDArray[np.int64]:
    """The number of the group that each element of a weight of this shape belongs to."""
    columns = int(np.prod(shape[1:]))
    taps = columns // shape[1]
    row, column = np.divmod(np.arange(shape[0] * columns).reshape(shape), columns)
    block = row // (shape[0] // groups)
    index = {
        "filter": row,
        "channel": (block * columns + column) // taps,
        "column": block * columns + column,
        "element": row * columns + column,
    }
    return index[structure].astype(np.int64)


def group_squares(weight: Array, structure: str, groups: int = 1) -> NDArray[np.float64]:
    """The sum of squares of each group."""
    index = group_index(weight.shape, structure, groups)
    squares = np.zeros(int(index.max()) + 1)
    np.add.at(squares, index.ravel(), weight.astype(np.float64).ravel() ** 2)
    return squares


def group_norms(weight: Array, structure: str, groups: int = 1) -> NDArray[np.float64]:
    """The L2 norm of each group."""
    return np.sqrt(group_squares(weight, structure, groups))


def largest(values: Array, keep: int) -> NDArray[np.bool_]:
    """A mask of the `keep` largest values; among equal ones the lowest index wins."""
    mask = np.zeros(values.shape, dtype=np.bool_)
    mask[np.argsort(-values, kind="stable")[:keep]] = True
    return mask


def project(weight: Array, structure: str, keep: int, groups: int = 1) -> Array:
    """The weight with all but the `keep` largest groups set to zero."""
    kept = largest(group_squares(weight, structure, groups), keep)
    return np.where(kept[group_index(weight.shape, structure, groups)], weight, weight.dtype.type(0))


def energy(weight: Array) -> float:
    """The sum of squares of all elements."""
    return float((weight.astype(np.float64) ** 2).sum())


def sequential(weight: Array, filters: int, columns: int, groups: int = 1) -> Array:
    """The papers' order: the filters first, then the columns of what is left."""
    return project(project(weight, "filter", filters, groups), "column", columns, groups)


def admm_update(weight: Array, z: Array, u: Array, structure: str, keep: int, groups: int = 1) -> Update:
    """One ADMM update, by the book: V = W + U, Z <- P(V), U <- V - Z."""
    v = weight + u
    after = project(v, structure, keep, groups)
    return Update(after, v - after, energy(weight - after) ** 0.5, energy(after - z) ** 0.5)


def nearest_levels(weight: Array, levels: Array, scale: float) -> NDArray[np.int64]:
    """The index of the level nearest to weight / scale; the lower one in the middle between two."""
    middle = (levels[:-1] + levels[1:]) / 2
    return np.searchsorted(middle * scale, weight.astype(np.float64), side="left")


def levels_error(weight: Array, levels: Array, scale: float) -> float:
    """The squared error of quantization to scale * levels."""
    return energy(weight.astype(np.float64) - scale * levels[nearest_levels(weight, levels, scale)])
