"""Random changes of the training images, drawn and applied for a whole batch at once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

_SMOOTH = 1 / 7  # of the image's side: the standard deviation of the Gaussian that elastic distortions are smoothed by
_NODES = 14  # each way, of the noise that is smoothed: two for each of its deviations


@dataclass(frozen=True)
class Augmentation:
    """What is varied in the training images; every image of a batch gets its own draw.

    Args:
        shift: largest shift in pixels, both ways, the border filled with zeros ("random crop with padding"): 4 is
            usual for CIFAR.
        flip: mirror left and right, half of the images.
        rotation: largest angle, degrees.
        scale: largest relative change of size; 0.1 draws factors from 0.9 to 1.1.
        elastic: smooth distortions, as of handwriting (Simard, Steinkraus and Platt, 2003): standard deviation in
            pixels of the way that a pixel is moved, each way; neighbours are moved alike, over a seventh of the image.

    Raises:
        ValueError, TypeError: a negative or non-numeric value, or scale >= 1.

    Example:
        >>> Augmentation(shift=4, flip=True)
        Augmentation(shift=4, flip=True, rotation=0.0, scale=0.0, elastic=0.0)
        >>> Augmentation(shift=-1)
        Traceback (most recent call last):
            ...
        ValueError: shift must be 0 or more, got -1
    """

    shift: int = 0
    flip: bool = False
    rotation: float = 0.0
    scale: float = 0.0
    elastic: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip must be bool, got {self.flip!r}")
        kinds: tuple[tuple[str, tuple[type, ...]], ...]
        kinds = (("shift", (int,)), ("rotation", (int, float)), ("scale", (int, float)), ("elastic", (int, float)))
        for name, allowed in kinds:
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise TypeError(f"{name} must be {allowed[-1].__name__}, got {value!r}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value!r}")
        if self.scale >= 1:
            raise ValueError(f"scale must be less than 1, got {self.scale!r}")

    def shift_and_flip(self, images: npt.NDArray[Any], rng: np.random.Generator) -> npt.NDArray[Any]:
        """The part of the augmentation that moves whole pixels, on raw images (B, C, H, W) of any type."""
        count, channels, height, width = images.shape
        if self.shift:
            margin = self.shift
            padded = np.zeros((count, channels, height + 2 * margin, width + 2 * margin), images.dtype)
            padded[:, :, margin : margin + height, margin : margin + width] = images
            # A view of every window of every image; indexing it copies one window each, whole rows at a time, which is
            # faster than gathering pixels one by one with torch.
            windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
            top, left = rng.integers(0, 2 * margin + 1, (2, count))
            images = windows.transpose(0, 2, 3, 1, 4, 5)[np.arange(count), top, left]
        if self.flip:
            mirrored = rng.random(count) < 0.5
            images = images if self.shift else images.copy()
            images[mirrored] = images[mirrored, :, :, ::-1]
        return images

    @property
    def resamples(self) -> bool:
        """Whether pixels are interpolated (rotation, scale or elastic)."""
        return self.rotation > 0 or self.scale > 0 or self.elastic > 0

    def resample(self, images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """The part of the augmentation that interpolates (bilinear, zeros outside), on float images (B, C, H, W)."""
        import torch
        import torch.nn.functional as F

        count, _, height, width = images.shape
        # affine_grid maps an output position to the input position it is read from, both in units of half the image:
        # the inverse of "turn anticlockwise by angle, enlarge by factor" (y points down), with the ratio of the sides.
        theta = np.eye(2, 3)[None]
        if self.rotation > 0 or self.scale > 0:
            angle = np.deg2rad(rng.uniform(-self.rotation, self.rotation, count))
            factor = rng.uniform(1 - self.scale, 1 + self.scale, count)
            cos, sin, ratio = np.cos(angle) / factor, np.sin(angle) / factor, height / width
            zero = np.zeros(count)
            theta = np.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], axis=1).reshape(count, 2, 3)
        grid = F.affine_grid(torch.from_numpy(theta).to(images), [len(theta), 1, height, width], align_corners=False)
        if self.elastic > 0:
            # White noise in (node down, image, node across, direction), of one variance; the nodes become pixels by one
            # product for all images each way. Means of many nodes are as good as normal.
            noise = (rng.random((_NODES, count * _NODES * 2), np.float32) - np.float32(0.5)) * np.float32(12**0.5)
            moved = torch.from_numpy(_smoothing(height)) @ torch.from_numpy(noise)
            pixels = np.diag([2 * self.elastic / width, 2 * self.elastic / height])  # in units of half the image
            moved = moved.view(height * count, -1) @ torch.from_numpy(np.kron(_smoothing(width).T, pixels)).to(moved)
            grid = grid + moved.view(height, count, width, 2).transpose(0, 1).to(images)
        grid = grid.expand(count, height, width, 2)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@functools.cache
def _smoothing(size: int) -> npt.NDArray[np.float32]:
    """(size, nodes): means of neighbouring nodes, weighted by a Gaussian, that have the variance of white noise."""
    places, nodes = (np.arange(size) + 0.5) / size, (np.arange(_NODES) + 0.5) / _NODES
    weights = np.exp(-0.5 * ((places[:, None] - nodes) / _SMOOTH) ** 2)
    kept: npt.NDArray[np.float32] = (weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))).astype(np.float32)
    return kept
