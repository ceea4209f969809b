"""The native kernels. Arrays are checked for shape, dtype and contiguity; they are never copied."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any

__version__: str
compiler: str
flags: str

def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def active_isa() -> str: ...
def reload_isa() -> str: ...
def hardware_threads() -> int: ...

# An Array is a numpy array or a torch CPU tensor, float32 or float64, C-contiguous.
def conv2d(
    x: Array,
    weight: Array,
    columns: Sequence[int],
    bias: Array | None,
    filters: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    groups: int,
    activation: str,
    slope: float,
    residual: Array | None,
    method: str,
    threads: int,
) -> NDArray[np.float32]: ...
def group_norms(weight: Array, structure: str, groups: int, threads: int) -> NDArray[np.float64]: ...
def project(
    weight: Array, out: Array, structure: str, keep: int | tuple[int, int], groups: int, threads: int
) -> None: ...
def admm_update(
    weight: Array, z: Array, u: Array, structure: str, keep: int | tuple[int, int], groups: int, threads: int
) -> tuple[float, float]: ...
def admm_update_all(
    layers: Sequence[tuple[Array, Array, Array, str, int | tuple[int, int], int]], threads: int, names: Sequence[str]
) -> list[tuple[float, float]]: ...
def best_scale(weight: Array, levels: NDArray[np.float64]) -> tuple[float, bool]: ...
def project_levels(
    weight: Array, levels: NDArray[np.float64], scale: float, values: Array, codes: NDArray[Any], threads: int
) -> None: ...
def purification_scores(
    layers: Sequence[tuple[Array, int]], threads: int, names: Sequence[str]
) -> list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]: ...
def purification_keep(
    layers: Sequence[
        tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], tuple[float, ...]]
    ],
    groups: int,
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]: ...
