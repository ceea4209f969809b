"""Norms, projections and the ADMM update: numpy arrays or torch tensors in, the same kind out.

A weight is seen as the matrix P x K of its GEMM: P filters (rows), K = channels * kernel positions columns. With
grouped convolution the i-th block of P / groups filters has its own columns, so there are groups * K columns and
groups * channels channels in all, numbered block by block. A *structure* says what is kept or dropped as one:

    "filter"    a row                          P groups
    "channel"   the columns of one channel     groups * C groups
    "column"    one (c, kh, kw) position       groups * K groups
    "element"   one weight                     P * K groups

Weights are float32 or float64, of rank 2 or more. Contiguous arrays and CPU tensors are used in place and never
copied; a weight that is not contiguous is copied, an array to be written must be contiguous. Tensors on other devices
take a path in torch. NaN and infinity are errors, raised before anything is written. Results are exact: ties go to the
lowest index, and neither the number of threads nor the instruction set changes a bit. `threads` is by default
`torch.get_num_threads()` if torch is imported, and else the number of processors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autocompress_fast import _core
from autocompress_fast.config import default_threads

ArrayT = TypeVar("ArrayT")  # a numpy array or a torch tensor
Keep = int | tuple[int, int]


class Residuals(NamedTuple):
    """How far an ADMM update is from rest.

    Attributes:
        primal: ||W - Z||_F, the distance of the weights from the constraint.
        dual: ||Z - Z_old||_F, how far the target moved.
    """

    primal: float
    dual: float


@dataclass(frozen=True, slots=True)
class PurificationScores:
    """What purification decides by; arrays of float64 of the kind of the weight.

    Attributes:
        importance: per channel, the mean of the squared norms of its columns.
        emptiness: per channel, the share of its columns that are not zero ("emptiness ratio" in the papers: 1 is full).
        column_norms: per column, its L2 norm.
        filter_norms: per filter, its L2 norm.
    """

    importance: Any
    emptiness: Any
    column_norms: Any
    filter_norms: Any


class PurificationLimits(NamedTuple):
    """What of a layer goes: whatever is below.

    Attributes:
        column: of the norm of a column.
        importance, emptiness: of the importance of a channel and the share of its columns that are left; it goes when
            both are below. By default a channel's importance alone decides.
        filter: of the norm of a filter, joint with all that is tied to it.
    """

    column: float = 0.0
    importance: float = 0.0
    emptiness: float = math.inf
    filter: float = 0.0


def group_norms(weight: ArrayT, structure: str, *, groups: int = 1, threads: int | None = None) -> ArrayT:
    """L2 norm of every group.

    Args:
        weight: (P, C, kernel...) or (P, K); float32 or float64.
        structure: "filter", "channel", "column" or "element".
        groups: of the convolution.
        threads: how many to use.

    Returns:
        The norms, float64, numbered as the groups are.

    Raises:
        ValueError: NaN or infinity, a rank below 2, or an argument out of its range.
        TypeError: not a numpy array or torch tensor of float32 or float64.

    >>> import numpy as np
    >>> weight = np.array([[3.0, 0.0], [4.0, 2.0]], dtype=np.float32)
    >>> group_norms(weight, "column")
    array([5., 2.])
    """
    if (tensor := _on_device(weight)) is not None:
        norms: ArrayT = _torch_ops().group_norms(tensor, structure, groups)
    else:
        norms = _like(weight, _core.group_norms(_readable(weight), structure, groups, _count(threads)))
    return norms


def project(
    weight: ArrayT,
    structure: str,
    *,
    keep: int,
    groups: int = 1,
    out: ArrayT | None = None,
    threads: int | None = None,
) -> ArrayT:
    """The nearest point with at most `keep` non-zero groups: the `keep` groups of largest norm survive.

    Exactly `keep` groups are copied, whatever their values; of equal ones those with the lowest index.

    Args:
        weight: (P, C, kernel...) or (P, K); float32 or float64.
        structure: "filter", "channel", "column" or "element".
        keep: how many groups survive, 0 to all.
        groups: of the convolution.
        out: where to write the result; `weight` itself is allowed.
        threads: how many to use.

    Returns:
        `out`, or a new contiguous array of the kind of `weight`.

    Raises:
        ValueError: NaN or infinity, `keep` out of range, `out` of another shape, overlapping or not writable.
        TypeError: a dtype other than float32 and float64, or `out` of another dtype.

    >>> import numpy as np
    >>> project(np.array([[3.0, -1.0], [2.0, 2.0]]), "element", keep=2)
    array([[3., 0.],
           [2., 0.]])
    """
    return _project(weight, structure, keep, groups, out, threads)


def project_filters_and_columns(
    weight: ArrayT,
    *,
    filters: int,
    columns: int,
    groups: int = 1,
    out: ArrayT | None = None,
    threads: int | None = None,
) -> ArrayT:
    """A near point with at most `filters` filters and `columns` columns, of those that are left.

    The nearest one has no closed form. The best columns for given filters and the best filters for given columns are
    found in turn until the kept energy stops growing, once begun with the filters and once with the columns, and the
    better end is taken: never worse than the papers' sequential order, filters first and columns of the rest next. Of
    400 random Gaussian 5 x 6 matrices (3 filters and 3 columns kept) 360 were solved to the optimum of an
    exhaustive search, where the sequential order solved 252; on average the kept energy was 99.7 % of
    the optimum.

    Args:
        weight: (P, C, kernel...) or (P, K); float32 or float64.
        filters: how many filters survive.
        columns: how many columns survive, of groups * K.
        groups: of the convolution.
        out: where to write the result; `weight` itself is allowed.
        threads: how many to use.

    Returns:
        `out`, or a new contiguous array of the kind of `weight`.

    Raises:
        ValueError, TypeError: as `project`.

    >>> import numpy as np
    >>> project_filters_and_columns(np.array([[3.0, 1.0], [2.0, 2.5]]), filters=1, columns=1)
    array([[3., 0.],
           [0., 0.]])
    """
    return _project(weight, "filter+column", (filters, columns), groups, out, threads)


def _project(
    weight: ArrayT, structure: str, keep: Keep, groups: int, out: ArrayT | None, threads: int | None
) -> ArrayT:
    if (tensor := _on_device(weight)) is not None:
        result: ArrayT = _torch_ops().project(tensor, structure, keep, groups, out)
        return result
    source = _readable(weight)
    target: ArrayT = _empty(source) if out is None else out
    _core.project(source, target, structure, keep, groups, _count(threads))
    return target


def project_levels(
    weight: ArrayT, *, levels: ArrayLike, scale: float | None = None, threads: int | None = None
) -> tuple[ArrayT, ArrayT, float]:
    """Quantize every element to the nearest of scale * levels.

    Halfway between two levels the lower one is taken. All elements are quantized; what is pruned is the caller's mask.

    Without a scale, the one is found that minimises the squared error. With n weights and m boundaries between levels
    (the larger number of those on one side of zero) this takes O(n log n + n m log m): all assignments that any scale
    gives are visited, and the result is the global minimum. That holds up to n m = 2^25, and so for every layer with
    binary (the scale is the mean of |w|) or ternary levels. Beyond, the squared error is computed for 201 scales at
    0.9 to 1.1 of max |w| / max |level| (the search of the papers) and 256 below, and the 8 best are improved by
    alternating assignment and scale: at least as good as the papers' search, and not proven to be the best.

    Args:
        weight: of any shape with at least one element; float32 or float64.
        levels: ascending and distinct, up to 32768; with or without zero, symmetric or not.
        scale: at least 0; None: the best.
        threads: how many to use.

    Returns:
        (values, codes, scale): scale * levels[codes] in the dtype of `weight`, and the indices into `levels` as int8
        (up to 128 levels) or int16.

    Raises:
        ValueError: NaN or infinity, levels that do not ascend, a negative scale.
        TypeError: a dtype other than float32 and float64.

    >>> import numpy as np
    >>> weight = np.array([0.9, -1.1, 0.1, 1.0])
    >>> values, codes, scale = project_levels(weight, levels=[-1, 0, 1])
    >>> values
    array([ 1., -1.,  0.,  1.])
    >>> codes, scale
    (array([2, 0, 1, 2], dtype=int8), 1.0)
    """
    level = np.ascontiguousarray(levels, dtype=np.float64)
    code_type = np.int8 if level.size <= 128 else np.int16
    if (tensor := _on_device(weight)) is not None:  # the search for a scale sorts: as well done on the CPU
        values, codes, chosen = project_levels(tensor.cpu(), levels=level, scale=scale, threads=threads)
        on_device: tuple[ArrayT, ArrayT, float] = (values.to(tensor.device), codes.to(tensor.device), chosen)
        return on_device
    source = _readable(weight)
    chosen = _core.best_scale(source, level)[0] if scale is None else float(scale)
    values = _empty(source)
    codes = np.empty(tuple(source.shape), dtype=code_type)
    _core.project_levels(source, level, chosen, values, codes, _count(threads))
    return values, _like(weight, codes), chosen


def admm_update(
    weight: ArrayT,
    z: ArrayT,
    u: ArrayT,
    structure: str,
    *,
    keep: Keep,
    groups: int = 1,
    threads: int | None = None,
) -> Residuals:
    """One ADMM update in place: with V = W + U, Z <- P(V) and U <- V - Z (which is U + W - Z).

    Args:
        weight: W, (P, C, kernel...) or (P, K); float32 or float64. Only read.
        z: the target Z, overwritten; like `weight` in shape, dtype and kind, contiguous.
        u: the scaled dual variable U, overwritten; like `z`.
        structure: "filter", "channel", "column", "element", or "filter+column" for both constraints at once.
        keep: how many groups survive; for "filter+column" the pair (filters, columns).
        groups: of the convolution.
        threads: how many to use.

    Returns:
        The residuals ||W - Z||_F and ||Z - Z_old||_F, for float32 right to 2e-6. Z itself is not checked: NaN in it
        makes the second one NaN and is overwritten.

    Raises:
        ValueError: NaN or infinity in W or U (Z and U are untouched then), `keep` out of range, arrays that differ in
            shape or overlap, Z or U not contiguous or not writable.
        TypeError: a dtype other than float32 and float64, or dtypes that differ.

    >>> import numpy as np
    >>> weight, z, u = np.array([[3.0, 4.0], [1.0, 0.0]]), np.zeros((2, 2)), np.zeros((2, 2))
    >>> admm_update(weight, z, u, "filter", keep=1)
    Residuals(primal=1.0, dual=5.0)
    >>> z.tolist(), u.tolist()
    ([[3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]])
    """
    if _on_device(weight) is not None:
        return admm_update_all([(weight, z, u, structure, keep, groups)])[0]
    return Residuals(*_core.admm_update(_readable(weight), z, u, structure, keep, groups, _count(threads)))


def admm_update_all(
    layers: Iterable[tuple[ArrayT, ArrayT, ArrayT, str, Keep, int]],
    *,
    names: Sequence[str] = (),
    threads: int | None = None,
) -> list[Residuals]:
    """`admm_update` for all layers of a network in one call, spread over the threads.

    Every weight and every U is checked before the first Z is written, so after an error nothing has changed.

    Args:
        layers: (weight, z, u, structure, keep, groups) each; all of the same dtype and on the same kind of device.
        names: of the layers, for messages.
        threads: how many to use.

    Returns:
        The residuals, in the order of the layers.

    Raises:
        ValueError, TypeError: as `admm_update`.

    >>> import numpy as np
    >>> layers = [(np.eye(2), np.zeros((2, 2)), np.zeros((2, 2)), "column", keep, 1) for keep in (1, 2)]
    >>> admm_update_all(layers, names=["conv1", "conv2"])
    [Residuals(primal=1.0, dual=1.0), Residuals(primal=0.0, dual=1.4142135623730951)]
    """
    entries: list[tuple[Any, Any, Any, str, Keep, int]] = list(layers)
    if any(_on_device(layer[0]) is not None for layer in entries):
        return [Residuals(*pair) for pair in _torch_ops().admm_update_all(entries, names)]
    readable = [(_readable(w), z, u, structure, keep, groups) for w, z, u, structure, keep, groups in entries]
    return [Residuals(*pair) for pair in _core.admm_update_all(readable, _count(threads), names)]


def purification_scores(weight: ArrayT, *, groups: int = 1, threads: int | None = None) -> PurificationScores:
    """Importance and emptiness of every channel, and the norms of every column and filter.

    With delta = KH * KW columns per channel j: importance_j = (1 / delta) * sum_k ||column_jk||_F^2 and emptiness_j =
    (1 / delta) * #{k : column_jk != 0}.

    Args:
        weight: (P, C, kernel...) or (P, K); float32 or float64.
        groups: of the convolution.
        threads: how many to use.

    Returns:
        The scores, in the order of the channels, columns and filters.

    Raises:
        ValueError: NaN or infinity, a rank below 2, or groups that do not divide the filters.
        TypeError: a dtype other than float32 and float64.

    >>> import numpy as np
    >>> scores = purification_scores(np.array([[[3.0, 0.0], [1.0, 1.0]]]))
    >>> scores.importance, scores.emptiness
    (array([4.5, 1. ]), array([0.5, 1. ]))
    """
    return purification_scores_all([(weight, groups)], threads=threads)[0]


def purification_scores_all(
    layers: Iterable[tuple[ArrayT, int]], *, names: Sequence[str] = (), threads: int | None = None
) -> list[PurificationScores]:
    """`purification_scores` for all layers of a network in one call, spread over the threads.

    Args:
        layers: (weight, groups) each; all of the same dtype and on the same kind of device.
        names: of the layers, for messages.
        threads: how many to use.

    Returns:
        The scores, in the order of the layers.

    Raises:
        ValueError, TypeError: as `purification_scores`.

    >>> import numpy as np
    >>> [scores.filter_norms for scores in purification_scores_all([(np.eye(2), 1), (2 * np.eye(3), 1)])]
    [array([1., 1.]), array([2., 2., 2.])]
    """
    entries: list[tuple[Any, int]] = list(layers)
    if any(_on_device(weight) is not None for weight, _ in entries):
        return [PurificationScores(*scores) for scores in _torch_ops().purification_scores_all(entries, names)]
    readable = [(_readable(weight), groups) for weight, groups in entries]
    found = _core.purification_scores(readable, _count(threads), names)
    return [
        PurificationScores(*(_like(weight, score) for score in scores))
        for (weight, _), scores in zip(entries, found, strict=True)
    ]


def purification_keep(
    scores: Sequence[PurificationScores],
    limits: Sequence[PurificationLimits],
    *,
    tied: Sequence[NDArray[np.int64]] | None = None,
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """What of a network stays when everything below the limits of its layer goes.

    A column goes when it is empty or its norm is below `column`. A channel then goes whole when its importance is below
    `importance` and the share of its columns that are left below `emptiness`. A filter, with all that is tied to it,
    goes when it is empty or the joint norm of the tied ones is below `filter` of each of their layers. What is dead
    because of that is found by `acf.unused_paths`.

    Args:
        scores: of the layers, from `purification_scores_all`.
        limits: of the layers.
        tied: (P,) of every layer: the number of the group of tied filters that each filter belongs to, counted from 0
            over all layers, or -1 for one that stays. Not given: every filter is a group of its own.

    Returns:
        (columns, filters) of every layer: True what stays.

    Raises:
        ValueError: numbers of layers or filters that differ, limits that are negative or NaN.

    >>> import numpy as np
    >>> scores = purification_scores_all([(np.array([[[3.0, 0.0], [0.1, 0.1]], [[0.2, 0.0], [0.0, 0.0]]]), 1)])
    >>> columns, filters = purification_keep(scores, [PurificationLimits(importance=0.1, filter=1.0)])[0]
    >>> columns, filters
    (array([ True, False, False, False]), array([ True, False]))
    """
    if len(limits) != len(scores) or (tied is not None and len(tied) != len(scores)):
        raise ValueError(
            f"limits and tied must be as many as the {len(scores)} layers, got {len(limits)} and "
            f"{'none' if tied is None else len(tied)}"
        )
    arrays = [[np.asarray(a) for a in (s.importance, s.column_norms, s.filter_norms)] for s in scores]
    if tied is None:
        ends = np.cumsum([filters.size for _, _, filters in arrays]).tolist()
        tied = [np.arange(end - filters.size, end) for end, (_, _, filters) in zip(ends, arrays, strict=True)]
    groups = max((int(numbers.max(initial=-1)) for numbers in tied), default=-1) + 1
    layers: Any = [(*a, t, tuple(limit)) for a, t, limit in zip(arrays, tied, limits, strict=True)]
    return _core.purification_keep(layers, groups)


def _torch_ops() -> Any:
    from autocompress_fast import _torch_ops

    return _torch_ops


def _count(threads: int | None) -> int:
    return default_threads() if threads is None else threads


def _is_tensor(array: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _on_device(weight: Any) -> Any:
    """The detached tensor if it is one and not in the memory of the CPU, else None."""
    return weight.detach() if getattr(weight, "is_cpu", True) is False else None


def _readable(weight: Any) -> Any:
    """The weight itself, or a contiguous copy."""
    if isinstance(weight, np.ndarray):
        return weight if weight.flags.c_contiguous else np.ascontiguousarray(weight)
    is_contiguous = getattr(weight, "is_contiguous", None)
    return weight if is_contiguous is None or is_contiguous() else weight.detach().contiguous()


def _empty(source: Any) -> Any:
    """A new contiguous array like a contiguous source."""
    if isinstance(source, np.ndarray):
        return np.empty_like(source, order="C", subok=False)
    import torch

    return torch.empty(source.shape, dtype=source.dtype) if _is_tensor(source) else source


def _like(weight: Any, result: NDArray[Any]) -> Any:
    if not _is_tensor(weight):
        return result
    import torch

    return torch.from_numpy(result)
