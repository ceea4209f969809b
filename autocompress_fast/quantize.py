"""Weights on few levels: scale * {levels}, by the ADMM that prunes (arXiv 1903.09769, section IV).

    minimise f(W)  subject to  w in scale * levels      for every weight that is not pruned

`LevelConstraint` projects onto that set, with the scale that is nearest; `ADMM` trains towards it. What is left between
the weights and their levels is then closed in portions: the weights that are closest to a level are set to it and stay
there (`snap`), the others are trained on, until none is left. Weights that are zero are pruned, and stay zero.

A weight that was set to a level cannot go to another one. `LevelParameters` lets all of them, at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autocompress_fast import ops
from autocompress_fast.plan import Hooks

if TYPE_CHECKING:
    import torch

__all__ = ["KINDS", "LevelConstraint", "LevelError", "LevelParameters", "bits_of", "snap"]

Floats = npt.NDArray[np.float64]

KINDS = ("equal", "power", "ternary", "binary")
_MOST_BITS = 8


class LevelError(ValueError):
    """Weights that cannot be put on levels."""


@dataclass(frozen=True)
class LevelConstraint:
    """Every weight of a layer that is not zero lies on a level: scale * one of `levels`.

    Args:
        bits: of a code, from 1 to 8: there are 2^bits levels.
        kind: "equal" for equal distances, as -2, -1, 1, 2 of 2 bits; "power" for powers of two, as -1, -1/2, 1/2, 1;
            "binary" for -1, 1 (1 bit) and "ternary" for -1, 0, 1 (2 bits). None of the first three has zero: what is
            zero is pruned and takes no code.
        per_filter: a scale for every filter instead of one for the layer.

    Raises:
        ValueError: an unknown kind, bits out of range, or other bits than the kind has.

    Example:
        >>> import numpy as np
        >>> LevelConstraint(bits=1).project(np.array([[0.9, -1.1, 0.0], [1.0, 1.0, 0.0]]))
        array([[ 1., -1.,  0.],
               [ 1.,  1.,  0.]])
        >>> LevelConstraint(2, "power").levels
        (-1.0, -0.5, 0.5, 1.0)
    """

    bits: int
    kind: str = "equal"
    per_filter: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= _MOST_BITS:
            raise ValueError(f"bits must be an int from 1 to {_MOST_BITS}, got {self.bits!r}")
        wanted = {"binary": 1, "ternary": 2}.get(self.kind, self.bits)
        if self.bits != wanted:
            raise ValueError(f"{self.kind} levels have {wanted} bits, got {self.bits}")

    @property
    def levels(self) -> tuple[float, ...]:
        """In ascending order, without the scale."""
        if self.kind == "ternary":
            return (-1.0, 0.0, 1.0)
        half = np.arange(1, 2 ** (self.bits - 1) + 1, dtype=np.float64)
        if self.kind == "power":
            half = 2.0 ** (1 - half[::-1])
        if self.bits == 1:
            half = np.ones(1)
        return (*(-half[::-1]).tolist(), *half.tolist())

    def project(self, weight: Any, scales: Sequence[float] | None = None) -> Any:
        """The nearest point to `weight` (numpy or torch) whose weights lie on levels, or are zero where it is zero.

        Args:
            weight: (filters, ...).
            scales: as `scales` returns them; those with the least squared error when not given.

        Raises:
            LevelError: NaN or infinity, or another number of scales.
        """
        array, back = _as_numpy(weight)
        projected = np.zeros_like(array)
        for rows, scale in zip(self._parts(array), scales or itertools.repeat(None), strict=scales is not None):
            kept = array[rows] != 0
            if kept.any():
                projected[rows][kept] = self._nearest(array[rows][kept], scale)[0]
        return back(projected)

    def scales(self, weight: Any) -> tuple[float, ...]:
        """The scale, or that of every filter, with the least squared error (`ops.project_levels`).

        Raises:
            LevelError: NaN or infinity.
        """
        array, _ = _as_numpy(weight)
        kept = [array[rows][array[rows] != 0] for rows in self._parts(array)]
        return tuple(self._nearest(values)[1] if values.size else 0.0 for values in kept)

    def _nearest(self, values: npt.NDArray[Any], scale: float | None = None) -> tuple[npt.NDArray[Any], float]:
        try:
            nearest, _, chosen = ops.project_levels(values, levels=self.levels, scale=scale)
        except ValueError as error:
            raise LevelError(str(error)) from error
        return nearest, chosen

    def _parts(self, array: npt.NDArray[Any]) -> list[slice]:
        """The filters that share a scale."""
        step = 1 if self.per_filter else len(array)
        return [slice(start, start + step) for start in range(0, len(array), step)]


class LevelParameters(Hooks):
    """Keeps weights on their levels while any optimizer trains what they stand for.

    Every step computes with weights on levels, and its gradient, straight through the rounding, moves the weights
    behind them (Courbariaux et al., arXiv 1511.00363): where those have gone far enough, another level is nearer. The
    scales follow, as those with the least squared error for the levels of the step. Weights that are zero stay zero.
    Use as a context, or call `remove` when done; the weights are on levels then.

    Args:
        model: trained in place by the caller's loop; its weights are set to their levels.
        constraints: layer -> its levels.
        optimizer: the optimizer that trains the model.
        state: `state_dict()` of before, to go on from there with the model of then; at first the weights behind are
            those of the model.

    Raises:
        ValueError: a name that is no layer with a weight, a state of other layers or shapes; nothing is changed then.
        LevelError: a weight is NaN or infinite; nothing is changed then.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> with torch.no_grad():
        ...     model[0].weight.copy_(torch.tensor([[0.9, 0.1]]))
        Parameter containing:
        tensor([[0.9000, 0.1000]], requires_grad=True)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with LevelParameters(model, {"0": LevelConstraint(bits=1)}, optimizer):
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.tensor([[0.0, 1.0]])).sum().backward()
        ...         optimizer.step()
        >>> (model[0].weight > 0).tolist()
        [[True, False]]
    """

    def __init__(
        self,
        model: torch.nn.Module,
        constraints: Mapping[str, LevelConstraint],
        optimizer: torch.optim.Optimizer,
        *,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in constraints:
            if f"{name}.weight" not in parameters:
                weighted = ", ".join(n.removesuffix(".weight") for n in parameters if n.endswith(".weight"))
                raise ValueError(f"levels are given for {name!r}, which is no layer with a weight; layers: {weighted}")
        self._layers = {n: _OnLevels(parameters[f"{n}.weight"], c) for n, c in constraints.items()}
        if state is None:
            for layer in self._layers.values():
                layer.project()
        else:
            mine = self.state_dict()
            shapes, found = ({n: tuple(v.shape) for n, v in values.items()} for values in (mine, state))
            if shapes != found:
                raise ValueError(f"the state must have the shapes {shapes}, got {found}")
            for name, value in state.items():
                mine[name].copy_(value)

        def before_step(*_: object) -> None:
            for layer in self._layers.values():
                layer.show()

        def after_step(*_: object) -> None:
            for layer in self._layers.values():
                layer.follow()

        self._handles = [optimizer.register_step_pre_hook(before_step), optimizer.register_step_post_hook(after_step)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights behind the levels, and the scales; they change as the training goes on."""
        state = {f"{name}.latent": layer.latent for name, layer in self._layers.items()}
        return state | {f"{name}.scales": layer.scales for name, layer in self._layers.items()}

    def remove(self) -> None:
        """Detach from the optimizer."""
        super().remove()
        for layer in self._layers.values():
            layer.settle()
        self._layers = {}


class _OnLevels:
    """One weight, and that behind it."""

    def __init__(self, weight: Any, constraint: LevelConstraint) -> None:
        import torch

        self.weight, self.constraint, self.latent = weight, constraint, weight.detach().clone()
        levels = torch.tensor(constraint.levels, dtype=weight.dtype, device=weight.device)
        self._levels, self._middles = levels, (levels[1:] + levels[:-1]) / 2
        self._kept = self.latent != 0
        scales = torch.tensor(constraint.scales(self.latent), dtype=weight.dtype, device=weight.device)
        self.scales = scales.reshape(-1, *[1] * (weight.ndim - 1))

    def project(self) -> None:
        """The weight onto the levels nearest to what is behind, with the scales that fit those best."""
        import torch

        with torch.no_grad():
            # A scale of zero belongs to filters of zeros alone.
            units = self.latent / self.scales.clamp(min=torch.finfo(self.latent.dtype).tiny)
            levels = torch.where(self._kept, self._levels[torch.bucketize(units.contiguous(), self._middles)], 0)
            along = tuple(range(1 if self.constraint.per_filter else 0, levels.ndim))
            squares = (levels * levels).sum(dim=along, keepdim=True)
            fitting = (self.latent * levels).sum(dim=along, keepdim=True) / squares
            self.scales.copy_(torch.where((squares > 0) & (fitting > 0), fitting, self.scales))
            self.weight.copy_(levels * self.scales)

    def show(self) -> None:
        """What is behind the weight in its place: the optimizer moves it."""
        import torch

        with torch.no_grad():
            self.weight.copy_(self.latent)

    def follow(self) -> None:
        """The weight as it was moved goes behind, what it stands for now comes before."""
        import torch

        with torch.no_grad():
            self.latent.copy_(self.weight)
        self.project()

    def settle(self) -> None:
        """Exactly on levels, as `LevelConstraint.project` has them."""
        import torch

        with torch.no_grad():
            self.weight.copy_(self.constraint.project(self.weight, self.scales.flatten().tolist()))


def snap(weight: Any, target: Any, share: float) -> Any:
    """Which weights to set to their levels: the share of those that are not zero that is closest to them.

    Args:
        weight: numpy or torch.
        target: its projection, of the same kind and shape.
        share: from 0 to 1.

    Returns:
        Bools of the shape of `weight`; zeros of it are among them always. Of weights as close as each other, the first
        ones are taken.

    Raises:
        ValueError: a share out of range.

    Example:
        >>> import numpy as np
        >>> snap(np.array([0.9, -1.2, 0.0, 0.4]), np.array([1.0, -1.0, 0.0, 1.0]), 0.5)
        array([ True,  True,  True, False])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}")
    array, back = _as_numpy(weight)
    distance = np.abs(array - _as_numpy(target)[0]).ravel()
    fixed: npt.NDArray[np.bool_] = (array == 0).ravel()
    left = np.flatnonzero(~fixed)
    chosen = left[np.argsort(distance[left], kind="stable")[: round(share * len(left))]]
    fixed[chosen] = True
    return back(fixed.reshape(array.shape))


def bits_of(model: torch.nn.Module, constraints: Mapping[str, LevelConstraint]) -> int:
    """Bits of all codes of the weights that are not zero: the papers' data size, without indices, scales and biases."""
    total = 0
    for name, constraint in constraints.items():
        weight: Any = model.get_submodule(name).weight
        total += constraint.bits * int((weight != 0).sum())
    return total


def _as_numpy(value: Any) -> tuple[npt.NDArray[Any], Any]:
    """The array, and what turns one back into the kind and device of `value`."""
    if isinstance(value, np.ndarray):
        return value, lambda array: array
    import torch

    device = value.device
    return value.detach().cpu().contiguous().numpy(), lambda array: torch.from_numpy(array).to(device)
