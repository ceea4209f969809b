"""Which 256 numbers stand best for the values of a network, and which 255 for the weights of a filter.

Values are seen once, in parts, and only counted: a `Histogram` takes the same memory for any number of them, and is the
same for any order. Three methods choose a range from it: all that was seen, all but the outermost, or the range with
the least squared error, in which the error of what is cut off and that of coarser steps balance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from autocompress_fast.engine.program import MAX_SCALE, MIN_SCALE, NARROW_MOST

__all__ = ["METHODS", "Grid", "Histogram", "chosen", "rounded_weights"]

Array = np.ndarray[Any, Any]
Floats = npt.NDArray[np.float64]

METHODS: Final = ("mse", "minmax", "percentile")

_BINS: Final = 2**14  # on either side of zero
_LEVELS: Final = 255
_BLOCK: Final = 2**22  # weights that are rounded at once


@dataclass(frozen=True)
class Grid:
    """The numbers (q - zero) * scale for q from 0 to 255, of which zero is always one.

    Attributes:
        scale: a float32 above 0.
        zero: from 0 to 255.
    """

    scale: float
    zero: int

    @classmethod
    def between(cls, low: float, high: float) -> Grid:
        """From `low` to `high`, and zero if it lies outside.

        Raises:
            ValueError: numbers too large for steps of 8 bits.

        >>> Grid.between(0.0, 510.0), Grid.between(-1.0, 1.0).zero
        (Grid(scale=2.0, zero=0), 128)
        """
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32(max((high - low) / _LEVELS, 2 * MIN_SCALE)))
        if scale > MAX_SCALE / 2:
            raise ValueError(f"values from {low:g} to {high:g} are too large for 8 bits")
        return cls(scale, round(-low / max((high - low) / _LEVELS, 2 * MIN_SCALE)))

    def rounded(self, values: Floats) -> Floats:
        """The nearest numbers of the grid."""
        number = np.clip(np.rint(values / self.scale) + self.zero, 0, _LEVELS)
        nearest: Floats = (number - self.zero) * self.scale
        return nearest


class Histogram:
    """How many values lie where: bins whose width is a power of two, doubled whenever a value lies beyond them.

    Bins begin at multiples of their width, so that two make one of the next size, and nothing depends on the order.

    Attributes:
        low, high: the smallest and the largest value.
        count: how many there were.

    >>> seen = Histogram()
    >>> seen.add(np.array([0.5, -2.0, 0.25], np.float32))
    >>> seen.low, seen.high, seen.count
    (-2.0, 0.5, 3)
    """

    def __init__(self) -> None:
        self.low, self.high, self.count = math.inf, -math.inf, 0
        self._exponent = -140  # of the width
        self._bins: npt.NDArray[np.int64] = np.zeros(2 * _BINS, np.int64)

    def add(self, values: Array) -> None:
        """Count float32 values.

        Raises:
            ValueError: NaN or infinity; nothing is counted.
        """
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or infinity")
        self._widen(max(-low, high))
        places = np.floor(np.ldexp(values.ravel(), -self._exponent)).astype(np.int64)
        self._bins += np.bincount(places + _BINS, minlength=2 * _BINS)
        self.low, self.high, self.count = min(self.low, low), max(self.high, high), self.count + values.size

    def _widen(self, most: float) -> None:
        """Bins as wide as a value needs whose magnitude is `most`."""
        if most == 0:
            return
        needed = math.frexp(most)[1] - _BINS.bit_length() + 1
        if needed <= self._exponent:
            return
        if self.count:
            # A value below 2^-32 of the largest is in the first bin, on its side of zero, whatever the shift.
            shift = min(needed - self._exponent, 32)
            places = ((np.arange(2 * _BINS) - _BINS) >> shift) + _BINS
            merged = np.zeros_like(self._bins)
            np.add.at(merged, places, self._bins)
            self._bins = merged
        self._exponent = needed

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self._exponent)

    def content(self) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Centres of the bins that hold anything, and how many values are in each."""
        filled = np.flatnonzero(self._bins)
        centres = np.ldexp(filled - _BINS + 0.5, self._exponent)
        return np.clip(centres, self.low, self.high), self._bins[filled]

    def below(self, share: float) -> float:
        """A number that this share of the values is not above, to within the width of a bin."""
        filled = np.flatnonzero(self._bins)
        reached = np.cumsum(self._bins[filled])
        place = filled[min(int(np.searchsorted(reached, share * self.count - 1e-6)), len(filled) - 1)]
        edge = math.ldexp(float(place - _BINS + 1), self._exponent)
        return min(max(edge, self.low), self.high)


def chosen(seen: Histogram, method: str, percentile: float = 99.99) -> Grid:
    """The grid for values as they were seen; that of values of which none is negative has its zero at 0.

    Args:
        seen: some values that are not all the same.
        method: "minmax", "percentile" or "mse".
        percentile: of the values that lie in the grid, from 50 to 100: the rest is cut off at the top, or half of it
            at each end if there are negative ones. Where only zeros were left, nothing is cut off.

    Raises:
        ValueError: an unknown method, a percentile out of range, or values too large.

    >>> seen = Histogram()
    >>> seen.add(np.append(np.arange(1000), [100000]).astype(np.float32))
    >>> [round(255 * chosen(seen, method, 99.9).scale) for method in ("minmax", "percentile")]
    [100000, 1000]
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 50 <= percentile <= 100:
        raise ValueError(f"percentile must be from 50 to 100, got {percentile!r}")
    if method == "minmax":
        return Grid.between(seen.low, seen.high)
    if method == "percentile":
        outside = 1 - percentile / 100
        low = 0.0 if seen.low >= 0 else seen.below(outside / 2)
        high = seen.below(1 - outside / 2 if seen.low < 0 else 1 - outside)
        return Grid.between(low, high) if max(-low, high) > seen.width else Grid.between(seen.low, seen.high)
    return _least_error(seen)


def _least_error(seen: Histogram) -> Grid:
    """The grid with the least squared error, by a search along either end in turn, first in large steps."""
    centres, counts = seen.content()

    def error(ends: tuple[float, float]) -> float:
        grid = Grid.between(*ends)
        return float(counts @ np.square(grid.rounded(centres) - centres))

    ends = (min(seen.low, 0.0), max(seen.high, 0.0))
    least = error(ends)
    for factors in (2.0 ** (np.arange(1, 57) / -8), 2.0 ** (np.arange(1, 57) / -8), 2.0 ** (np.arange(-7, 8) / 64)):
        for side in (1, 0):
            around = ends
            for factor in factors if around[side] else ():
                tried = (around[0], around[1] * factor) if side else (around[0] * factor, around[1])
                if tried[0] < seen.low or tried[1] > max(seen.high, 0.0) or (found := error(tried)) >= least:
                    continue
                least, ends = found, tried
    return Grid.between(*ends)


def rounded_weights(weight: Array, *, best: bool, least: float = MIN_SCALE) -> tuple[Array, Array]:
    """Weights as integers from -127 to 127 and a scale for every filter.

    Args:
        weight: (filters, columns) float32, finite.
        best: choose scales with the least squared error, which may cut off the largest weights; else the largest
            weight of every filter becomes 127 or -127.
        least: the smallest scale allowed.

    Returns:
        int8 (filters, columns) and float32 (filters,). A filter of zeros has scale 1.

    >>> integers, scales = rounded_weights(np.array([[0.5, -1.27], [0, 0]], np.float32), best=False)
    >>> integers.tolist(), scales.round(6).tolist()
    ([[50, -127], [0, 0]], [0.009999999776482582, 1.0])
    """
    integers, scales = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        integers[rows], scales[rows] = _rounded_rows(weight[rows], best, least)
    return integers, scales


def _rounded_rows(weight: Array, best: bool, least: float) -> tuple[Array, Array]:
    largest = np.abs(weight).max(axis=1, initial=0)

    def rounded(factor: float) -> tuple[Array, Array]:
        scales = np.maximum(largest * np.float32(factor / NARROW_MOST), np.float32(least)).astype(np.float32)
        scales[largest == 0] = 1
        return np.clip(np.rint(weight / scales[:, None]), -NARROW_MOST, NARROW_MOST), scales

    def error(integers: Array, scales: Array) -> Floats:
        squared: Floats = np.square(integers * scales[:, None] - weight, dtype=np.float64).sum(axis=1)
        return squared

    integers, scales = rounded(1.0)
    smallest = error(integers, scales)
    for factor in np.arange(0.98, 0.49, -0.02) if best else ():
        others, tried = rounded(float(factor))
        found = error(others, tried)
        better = found < smallest
        integers[better], scales[better], smallest[better] = others[better], tried[better], found[better]
    return integers.astype(np.int8), scales
