"""How many bits the weights of each layer get: as asked for, or found by simulated annealing under a file's bytes.

A search says how far each layer departs from the bits that all would have alike; the bytes that a file may have then
settle how many those are, so that every candidate uses them up. A candidate is scored without training: every weight on
the nearest of its levels, statistics of normalisations measured anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from autocompress_fast.graph import Report
from autocompress_fast.graph.selection import matched
from autocompress_fast.meter import FileSize, Numbers
from autocompress_fast.plan import Plan
from autocompress_fast.quantize import LevelConstraint
from autocompress_fast.rates import Action
from autocompress_fast.search import Annealer

if TYPE_CHECKING:
    import torch

    from autocompress_fast.data import Batches

__all__ = ["BitSearch", "Bits", "level_score", "middle", "numbers", "ranges"]

Bits: TypeAlias = "int | tuple[int, int] | Mapping[str, int | tuple[int, int]]"
"""Of all layers, or by patterns of layers; (at least, at most) where a search is to find them."""

_PER_DEPARTURE = 2.0  # bits; the moves of a search have a standard deviation of about half a departure


def ranges(bits: Bits, kind: str, layers: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Layer -> the fewest and the most bits of its weights; layers that no pattern means are left out.

    Args:
        bits: of all layers, or of those that patterns mean (paths or globs), the last that means a layer.
        kind: of the levels, as of `LevelConstraint`.
        layers: their names.

    Raises:
        ValueError: bits out of range, or others than levels of the kind have; a pattern that no layer matches.

    Example:
        >>> ranges({"conv*": (2, 6), "fc1": 3}, "equal", ["conv1", "conv2", "fc1", "fc2"])
        {'conv1': (2, 6), 'conv2': (2, 6), 'fc1': (3, 3)}
    """
    names = list(layers)
    if not isinstance(bits, Mapping):
        return dict.fromkeys(names, _range(bits, kind))
    found: dict[str, tuple[int, int]] = {}
    for pattern, given in bits.items():
        found |= dict.fromkeys(matched("bits", pattern, names), _range(given, kind))
    return {name: found[name] for name in names if name in found}


def checked(bits: Bits, kind: str) -> None:
    """Raise a ValueError for bits that no network could have."""
    for given in bits.values() if isinstance(bits, Mapping) else [bits]:
        _range(given, kind)
    if isinstance(bits, Mapping) and not bits:
        raise ValueError("bits are of no layer: give a number, or patterns of layers with theirs")


def _range(given: Any, kind: str) -> tuple[int, int]:
    low, high = given if isinstance(given, tuple | list) and len(given) == 2 else (given, given)
    for number in (low, high):
        LevelConstraint(number, kind)  # checks both
    if low > high:
        raise ValueError(f"bits must be (at least, at most), got {given!r}")
    return low, high


def middle(found: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The bits of the layers when a search is still to find them."""
    return {name: (low + high) // 2 for name, (low, high) in found.items()}


def numbers(found: Mapping[str, int], kind: str) -> Numbers:
    """What the weights become, for the bytes of a file.

    How many weights ternary levels make zero, and how they are stored then, training decides: those count as float32.
    """
    return Numbers({} if kind == "ternary" else {name: 2**bits for name, bits in found.items()})


class BitSearch(Annealer):
    """Looks for the bits of each layer with which a file has at most so many bytes, and the score is highest.

    Args:
        report: on the dense network.
        score: of constraints (layer -> `LevelConstraint`), higher is better; `level_score` makes one.
        layers: as `ranges` gives them.
        kind: of the levels.
        size: of files of that network.
        plan: what is kept of it.
        most: bytes that the file may have; those with the bits in the middle of the ranges when not given.
        options: as of `Annealer`.

    Raises:
        ValueError: no layer, or the file is larger with the fewest bits.
    """

    def __init__(
        self,
        report: Report,
        score: Callable[[dict[str, Any]], float],
        *,
        layers: Mapping[str, tuple[int, int]],
        kind: str = "equal",
        size: FileSize,
        plan: Plan,
        most: int | None = None,
        **options: Any,
    ) -> None:
        if not layers:
            raise ValueError("there is no layer whose bits could be searched for")
        super().__init__(report, score, **options)
        self.layers, self.kind, self._size, self._plan = dict(layers), kind, size, plan
        fewest = {name: low for name, (low, _) in layers.items()}
        least = self.bytes_with(fewest)
        self.bytes = self.bytes_with(middle(layers)) if most is None else most
        if least > self.bytes:
            raise ValueError(f"bytes {self.bytes:,} cannot be met: with the fewest bits the file has {least:,}")
        # What a layer adds to those with the fewest bits; but for the digits of offsets that is all there is to it.
        self._added = {
            (name, bits): self.bytes_with(fewest | {name: bits}) - least
            for name, (low, high) in layers.items()
            for bits in range(low, high + 1)
        }
        self._least = least
        self.coordinates = tuple(("weights", name) for name in layers)

    def bytes_with(self, bits: Mapping[str, int]) -> int:
        """Of the file when the layers have so many."""
        return self._size.bytes(self._plan, numbers(bits, self.kind))

    def constraints(self, action: Action) -> dict[str, Any]:
        """The levels that an action leads to: as many bits as the bytes allow, departing from each other by it."""
        room = self.bytes - self._least
        while True:
            bits = self._bits(action, room)
            excess = self.bytes_with(bits) - self.bytes
            if excess <= 0:
                return {name: LevelConstraint(number, self.kind) for name, number in bits.items()}
            room -= excess

    def _bits(self, action: Action, room: int) -> dict[str, int]:
        """The layers take one bit more in the order in which they come to it as all grow alike, while there is room."""
        bits = {name: low for name, (low, _) in self.layers.items()}
        due = [
            (number - 0.5 - _PER_DEPARTURE * action.weights.get(name, 0.0), place, name)
            for place, (name, (low, high)) in enumerate(self.layers.items())
            for number in range(low + 1, high + 1)
        ]
        for _, _, name in sorted(due):
            more = self._added[name, bits[name] + 1] - self._added[name, bits[name]]
            if more <= room:
                bits[name] += 1
                room -= more
        return bits

    def kept(self, constraints: Mapping[str, Any]) -> tuple[int, ...]:
        """The bits of the layers."""
        return tuple(constraint.bits for constraint in constraints.values())

    def described(self) -> dict[str, Any]:
        """The ranges of the bits, and the bytes."""
        return {"bits": self.layers, "levels": self.kind, "bytes": self.bytes}


def level_score(
    model: torch.nn.Module,
    validation: Batches,
    *,
    calibration: Iterable[Any] | None = None,
    precision: str = "float32",
    channels_last: bool = False,
) -> Callable[[Mapping[str, LevelConstraint]], float]:
    """A score of bits: the negative cross entropy of the network whose weights are set to their levels at once.

    Args:
        model: it is not changed; weights that are zero stay zero.
        validation: on which it is scored; some samples will do, always the same.
        calibration: batches (x, y) of training data on which the statistics of batch normalisations are measured anew
            before that.
        precision, channels_last: as for `evaluate`.

    Example:
        >>> import torch
        >>> from autocompress_fast.data import UserBatches
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 2))
        >>> x = torch.randn(64, 20)
        >>> score = level_score(model, UserBatches([(x, model(x).argmax(dim=1))]))
        >>> score({"0": LevelConstraint(8), "2": LevelConstraint(8)}) > score({"0": LevelConstraint(1)})
        True
    """
    return _LevelScore(model, validation, None if calibration is None else list(calibration), precision, channels_last)


@dataclass(frozen=True, eq=False)
class _LevelScore:
    model: torch.nn.Module
    validation: Batches
    calibration: list[Any] | None
    precision: str
    channels_last: bool
    _projected: dict[tuple[str, LevelConstraint], Any] = field(default_factory=dict)

    def __call__(self, constraints: Mapping[str, LevelConstraint]) -> float:
        import torch

        from autocompress_fast.training import evaluate, recalibrate

        network = copy.deepcopy(self.model)
        for name, constraint in constraints.items():
            weight: Any = network.get_submodule(name).weight
            if (name, constraint) not in self._projected:
                self._projected[name, constraint] = constraint.project(weight)
            with torch.no_grad():
                weight.copy_(self._projected[name, constraint])
        options: dict[str, Any] = {"precision": self.precision, "channels_last": self.channels_last}
        if self.calibration is not None:
            recalibrate(network, self.calibration, **options)
        return -evaluate(network, self.validation, **options).loss

    def settings(self) -> dict[str, Any]:
        """What a trace must have in common with a search that goes on from it."""
        return {"measure": "loss"}
