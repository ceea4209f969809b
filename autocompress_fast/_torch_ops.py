"""The operations of `ops` in torch, for tensors that are not in the memory of the CPU.

The same results: the same groups are kept, ties go to the lowest index, sums are taken in float64. A device may add in
another order than the kernels, so groups whose norms agree to the last few bits of a float64 can be told apart
differently, and residuals and norms can differ in those bits.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Keep = int | tuple[int, int]

_STRUCTURES = ("filter", "channel", "column", "element")


def blocks(weight: Tensor, groups: int) -> Tensor:
    """The weight as (groups, filters per group, channels, taps)."""
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight must be float32 or float64, got {weight.dtype}")
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"weight must have at least 2 dimensions and not be empty, got shape {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"groups must be at least 1 and divide the {weight.shape[0]} filters of the weight, got {groups}"
        )
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError when there is NaN or infinity."""
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    if count:
        first = int(bad.reshape(-1).to(torch.uint8).argmax())
        index = tuple(int(i) for i in np.unravel_index(first, tuple(tensor.shape)))
        values = "value that is" if count == 1 else "values that are"
        raise ValueError(f"{name} has {count} {values} NaN or infinite, the first at flat index {first}, index {index}")


def group_squares(weight: Tensor, structure: str, groups: int) -> Tensor:
    """The sum of squares of each group, float64."""
    if structure not in _STRUCTURES:
        raise ValueError(f"structure must be one of {', '.join(_STRUCTURES)}, got {structure!r}")
    squares = blocks(weight, groups).double().square()
    if structure == "filter":
        return squares.sum((2, 3)).reshape(-1)
    if structure == "element":
        return squares.reshape(-1)
    return squares.sum((1, 3) if structure == "channel" else 1).reshape(-1)


def group_norms(weight: Tensor, structure: str, groups: int) -> Tensor:
    """See `ops.group_norms`."""
    squares = group_squares(weight, structure, groups)
    check_finite("weight", weight)
    # The root of a square is rounded; |w| is not.
    return weight.abs().double().reshape(-1) if structure == "element" else squares.sqrt()


def purification_scores_all(
    layers: Sequence[tuple[Tensor, int]], names: Sequence[str]
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """See `ops.purification_scores_all`."""
    return [
        _scores(weight, groups, f" of {names[number]}" if names else "")
        for number, (weight, groups) in enumerate(layers)
    ]


def _scores(weight: Tensor, groups: int, owner: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = group_squares(weight, "column", groups)
    check_finite("weight" + owner, weight)
    by_channel = columns.reshape(-1, blocks(weight, groups).shape[-1])
    filters = group_squares(weight, "filter", groups)
    return by_channel.mean(1), (by_channel != 0).double().mean(1), columns.sqrt(), filters.sqrt()


def largest(values: Tensor, keep: int, name: str, of: str) -> Tensor:
    """A mask of the `keep` largest values, the lowest index first among equals."""
    if isinstance(keep, bool) or not hasattr(keep, "__index__"):
        raise TypeError(f"{name} must be an integer, got {keep!r}")
    if not 0 <= keep <= values.numel():
        raise ValueError(f"{name} must be between 0 and the {values.numel()} {of}s of the weight, got {keep}")
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[torch.sort(values, descending=True, stable=True).indices[:keep]] = True
    return mask


def kept_mask(weight: Tensor, structure: str, keep: Keep, groups: int) -> Tensor:
    """Which elements a projection keeps, broadcast to the shape of the weight."""
    view = blocks(weight, groups)
    block_count, filters, channels, taps = view.shape
    if structure == "filter+column":
        if not isinstance(keep, Sequence) or len(keep) != 2:
            raise TypeError(f"keep of filter+column must be the pair (filters, columns), got {keep!r}")
        rows, columns = _alternate(view.double().square().flatten(2), keep[0], keep[1])
        mask = (rows[:, :, None] & columns[:, None, :]).view(view.shape)
    else:
        assert not isinstance(keep, tuple)
        # |w| itself orders elements without the rounding of a square.
        values = weight.abs().reshape(-1) if structure == "element" else group_squares(weight, structure, groups)
        kept = largest(values, keep, "keep", structure)
        shapes = {
            "filter": (block_count, filters, 1, 1),
            "channel": (block_count, 1, channels, 1),
            "column": (block_count, 1, channels, taps),
            "element": tuple(view.shape),
        }
        mask = kept.view(shapes[structure]).expand(view.shape)
    return mask.reshape(weight.shape)


def _alternate(squares: Tensor, filters: int, columns: int) -> tuple[Tensor, Tensor]:
    """Best filters for given columns and the reverse, in turn; squares: (groups, filters, columns)."""

    def best_columns(rows: Tensor) -> tuple[Tensor, float]:
        sums = (squares * rows[:, :, None]).sum(1)
        mask = largest(sums.reshape(-1), columns, "columns", "column").view(sums.shape)
        return mask, float(sums[mask].sum())

    def best_rows(kept_columns: Tensor) -> Tensor:
        sums = (squares * kept_columns[:, None, :]).sum(2)
        return largest(sums.reshape(-1), filters, "filters", "filter").view(sums.shape)

    def climb(rows: Tensor) -> tuple[float, Tensor, Tensor]:
        kept_columns, energy = best_columns(rows)
        while True:
            next_rows = best_rows(kept_columns)
            if torch.equal(next_rows, rows):
                return energy, rows, kept_columns
            next_columns, now = best_columns(next_rows)
            if not now > energy:
                return energy, rows, kept_columns
            rows, kept_columns, energy = next_rows, next_columns, now

    first = climb(best_rows(torch.ones_like(squares[:, 0, :], dtype=torch.bool)))
    columns_first, _ = best_columns(torch.ones_like(squares[:, :, 0], dtype=torch.bool))
    second = climb(best_rows(columns_first))
    best = second if second[0] > first[0] else first
    return best[1], best[2]


@torch.no_grad()
def project(weight: Tensor, structure: str, keep: Keep, groups: int, out: Tensor | None) -> Tensor:
    """See `ops.project`."""
    mask = kept_mask(weight, structure, keep, groups)
    check_finite("weight", weight)
    if out is None:
        return torch.where(mask, weight, 0)
    _check_same(out, weight, "out")
    return out.copy_(torch.where(mask, weight, 0))


def _check_same(tensor: Tensor, weight: Tensor, name: str) -> None:
    if tensor.dtype != weight.dtype:
        raise TypeError(f"{name} must have the dtype of the weight, {weight.dtype}, got {tensor.dtype}")
    if tensor.shape != weight.shape or tensor.device != weight.device:
        raise ValueError(
            f"{name} must have the shape and device of the weight, {tuple(weight.shape)} on {weight.device}, "
            f"got {tuple(tensor.shape)} on {tensor.device}"
        )


Layer = tuple[Tensor, Tensor, Tensor, str, Keep, int]


@torch.no_grad()
def admm_update_all(layers: Sequence[Layer], names: Sequence[str]) -> list[tuple[float, float]]:
    """See `ops.admm_update_all`."""
    masks = []
    for number, (weight, z, u, structure, keep, groups) in enumerate(layers):
        of = f" of {names[number]}" if names else ""
        _check_same(z, weight, "z")
        _check_same(u, weight, "u")
        v = weight + u
        for name, tensor in (("weight", weight), ("u", u), ("weight + u", v)):
            check_finite(name + of, tensor)
        masks.append(kept_mask(v, structure, keep, groups))
    residuals = []
    for (weight, z, u, *_), mask in zip(layers, masks, strict=True):
        v = weight + u
        after = torch.where(mask, v, 0)
        primal = math.sqrt(float((weight - after).double().square().sum()))
        dual = math.sqrt(float((after - z).double().square().sum()))
        z.copy_(after)
        u.copy_(torch.where(mask, 0, v))
        residuals.append((primal, dual))
    return residuals
