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
def conv_estimate(
    shape: Sequence[int],
    filters: int,
    columns: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    groups: int,
    images: int,
) -> tuple[str, float, float, int]: ...
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
def narrow_units(number: str) -> list[str]: ...
def peak_flops() -> float: ...

class Network:
    """Operations on float32 values, named as in docs/acf-format.md; a method adds one and returns its number."""

    def __init__(self) -> None: ...
    def input(self, shape: Sequence[int]) -> int: ...
    def conv(
        self,
        inputs: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[int],
        groups: int,
        filters: int,
        columns: NDArray[Any],
        values: NDArray[np.float32],
        bias: NDArray[np.float32],
        activation: str,
        precision: str,
        scale: float,
        zero: int,
        scales: NDArray[np.float32],
        residual: tuple[float, int] | None,
    ) -> int: ...
    def expansion(
        self,
        inputs: Sequence[int],
        filters: int,
        columns: NDArray[Any],
        expand_values: NDArray[np.float32],
        expand_bias: NDArray[np.float32],
        expand_activation: str,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[int],
        values: NDArray[np.float32],
        bias: NDArray[np.float32],
        activation: str,
    ) -> int: ...
    def sparse_conv(
        self,
        inputs: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[int],
        groups: int,
        offsets: NDArray[Any],
        indices: NDArray[Any],
        values: NDArray[np.float32],
        bias: NDArray[np.float32],
        activation: str,
    ) -> int: ...
    def linear(
        self,
        inputs: Sequence[int],
        features: int,
        filters: int,
        columns: NDArray[Any],
        values: NDArray[np.float32],
        bias: NDArray[np.float32],
        activation: str,
        precision: str,
        scale: float,
        zero: int,
        scales: NDArray[np.float32],
    ) -> int: ...
    def sparse_linear(
        self,
        inputs: Sequence[int],
        features: int,
        offsets: NDArray[Any],
        indices: NDArray[Any],
        values: NDArray[np.float32],
        bias: NDArray[np.float32],
        activation: str,
    ) -> int: ...
    def max_pool(
        self,
        inputs: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[int],
        ceil: bool,
    ) -> int: ...
    def avg_pool(
        self,
        inputs: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        ceil: bool,
        count_padding: bool,
    ) -> int: ...
    def adaptive_avg_pool(self, inputs: Sequence[int], output: Sequence[int]) -> int: ...
    def mean(self, inputs: Sequence[int], axes: Sequence[int], keep: bool) -> int: ...
    def norm(self, inputs: Sequence[int], axes: Sequence[int], keep: bool) -> int: ...
    def combine(self, inputs: Sequence[int], op: str, activation: str) -> int: ...
    def combine_constant(
        self, inputs: Sequence[int], op: str, constant: NDArray[np.float32], activation: str
    ) -> int: ...
    def activation(self, inputs: Sequence[int], activation: str, slope: float) -> int: ...
    def clip(self, inputs: Sequence[int], low: float, high: float) -> int: ...
    def softmax(self, inputs: Sequence[int], axis: int, logarithm: bool) -> int: ...
    def matmul(self, inputs: Sequence[int]) -> int: ...
    def attention(self, inputs: Sequence[int], scale: float) -> int: ...
    def layer_norm(
        self,
        inputs: Sequence[int],
        dims: int,
        epsilon: float,
        scale: NDArray[np.float32],
        shift: NDArray[np.float32],
    ) -> int: ...
    def concat(self, inputs: Sequence[int], axis: int) -> int: ...
    def reshape(self, inputs: Sequence[int], shape: Sequence[int]) -> int: ...
    def transpose(self, inputs: Sequence[int], order: Sequence[int]) -> int: ...
    def pad(self, inputs: Sequence[int], before: Sequence[int], after: Sequence[int], value: float) -> int: ...
    def slice(self, inputs: Sequence[int], axis: int, start: int, stop: int, step: int) -> int: ...
    def take(self, inputs: Sequence[int], axis: int, indices: NDArray[Any]) -> int: ...
    def stage(self, begin: int, end: int) -> tuple[Network, list[int], list[int]]: ...
    def finish(self, outputs: Sequence[int]) -> None: ...
    def run(self, inputs: Sequence[NDArray[np.float32]], threads: int, part: int) -> list[NDArray[np.float32]]: ...
    def profile(
        self, inputs: Sequence[NDArray[np.float32]], threads: int, part: int, rounds: int
    ) -> NDArray[np.float64]: ...
    def prefer(self, step: int, samples: int, way: str | None) -> None: ...
    def ways(self, samples: int) -> list[str | None]: ...
    def is_bytes(self, value: int) -> bool: ...
    def workspace_bytes(self, samples: int) -> int: ...

# Steps of training. Tensors are float32, (channels, height, width, images); of a weight (P, C, KH, KW) the filters and
# columns that are kept.
def conv_forward(
    x: Array,
    weight: Array,
    bias: Array | None,
    out: Array,
    filters: NDArray[np.int32],
    columns: NDArray[np.int32],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
) -> None: ...
def conv_input_gradient(
    out_gradient: Array,
    weight: Array,
    x_gradient: Array,
    filters: NDArray[np.int32],
    columns: NDArray[np.int32],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
) -> None: ...
def conv_weight_gradient(
    x: Array,
    out_gradient: Array,
    weight_gradient: Array,
    bias_gradient: Array | None,
    filters: NDArray[np.int32],
    columns: NDArray[np.int32],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
) -> None: ...
def max_pool_forward(
    x: Array, out: Array, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], threads: int
) -> NDArray[np.uint8]: ...
def max_pool_gradient(
    out_gradient: Array,
    at: NDArray[np.uint8],
    x_gradient: Array,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    threads: int,
) -> None: ...
def batch_norm_forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array,
    mean: Array,
    variance: Array,
    threads: int,
) -> None: ...
def batch_norm_gradient(
    x: Array,
    out_gradient: Array,
    weight: Array | None,
    mean: Array,
    variance: Array,
    eps: float,
    x_gradient: Array,
    weight_gradient: Array,
    bias_gradient: Array,
    threads: int,
) -> None: ...
