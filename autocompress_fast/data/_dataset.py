"""Data sets as numpy arrays: one labelled set, and its cut into training, validation and test."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autocompress_fast.data._augmentation import Augmentation

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
ImageArray = npt.NDArray[Any]
Size = int | float

_SPLIT = 0  # first part of the key of `shuffled`; the others are in _batches.py


class DataError(ValueError):
    """Data that is missing, damaged or contradicts itself; it says which file, what was expected and what was found."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, raw, with the constants that normalise them.

    Args:
        images: (N, C, H, W), uint8 in 0..255 or finite float32.
        labels: (N,) integers in 0..len(classes)-1; kept as int64.
        classes: name of every class.
        mean, std: one number per channel, of the images as floats (uint8 images are divided by 255 first).

    Raises:
        DataError: a shape, type or value is not as above.

    Example:
        >>> import numpy as np
        >>> images = np.arange(2 * 1 * 2 * 2, dtype=np.uint8).reshape(2, 1, 2, 2)
        >>> data = Dataset(images, np.array([0, 1]), ("cat", "dog"), mean=(0.0,), std=(1 / 255,))
        >>> len(data), data.input_shape
        (2, (1, 2, 2))
        >>> data.normalized([1]).ravel().round(3).tolist()
        [4.0, 5.0, 6.0, 7.0]
    """

    images: ImageArray
    labels: Int64Array
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        images = np.asarray(self.images)
        if images.ndim != 4 or images.dtype not in (np.uint8, np.float32) or 0 in images.shape:
            raise DataError(
                f"images must be a non-empty uint8 or float32 array (N, C, H, W), got {images.dtype} {images.shape}"
            )
        if images.dtype == np.float32 and not np.isfinite(images).all():
            first = int(np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))[0])
            raise DataError(f"images must be finite, image {first} has NaN or infinity")
        classes = tuple(str(name) for name in self.classes)
        labels = checked_labels(self.labels, count=len(images), classes=len(classes), where="labels")
        mean, std = tuple(map(float, self.mean)), tuple(map(float, self.std))
        if len(mean) != images.shape[1] or len(std) != images.shape[1]:
            raise DataError(
                f"mean and std must have one number for each of {images.shape[1]} channels, got {mean} and {std}"
            )
        if not np.isfinite(mean).all() or not np.isfinite(std).all() or min(std) <= 0:
            raise DataError(f"mean must be finite and std positive, got {mean} and {std}")
        for field, value in (
            ("images", images),
            ("labels", labels),
            ("classes", classes),
            ("mean", mean),
            ("std", std),
        ):
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"Dataset({len(self)} x {self.input_shape} {self.images.dtype}, {len(self.classes)} classes)"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def scale_and_offset(self) -> tuple[Float32Array, Float32Array]:
        """The normalisation as one multiply and one add, float32 (C, 1, 1) each: raw * scale + offset."""
        unit = 255.0 if self.images.dtype == np.uint8 else 1.0
        mean, std = np.array(self.mean).reshape(-1, 1, 1), np.array(self.std).reshape(-1, 1, 1)
        return (1 / (unit * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def normalized(self, index: slice | Sequence[int] | Int64Array = slice(None)) -> Float32Array:
        """The images at `index` as a network sees them: new float32 array (n, C, H, W)."""
        scale, offset = self.scale_and_offset()
        pixels = self.images[index].astype(np.float32)
        pixels *= scale
        pixels += offset
        return pixels

    def subset(self, index: slice | Sequence[int] | Int64Array) -> Dataset:
        """The images and labels at `index`; a copy, unless `index` is a slice."""
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])

    def with_normalization(self, mean: Sequence[float], std: Sequence[float]) -> Dataset:
        """The same images under other constants, for a network that was trained with those."""
        return dataclasses.replace(self, mean=tuple(mean), std=tuple(std))


@dataclass(frozen=True, eq=False)
class Splits:
    """The three parts of a data set: `train` fits the weights, `validation` decides, `test` is read once, at the end.

    All parts have one image shape, one list of classes and one normalisation. `augmentation` is the usual one for
    this set, a suggestion to the trainer.

    Example:
        >>> import numpy as np
        >>> x, y = np.zeros((100, 1, 4, 4), np.float32), np.arange(100) % 5
        >>> splits = from_arrays(x, y, validation=20, test=0.1, seed=1)
        >>> len(splits.train), len(splits.validation), len(splits.test)
        (70, 20, 10)
        >>> np.bincount(splits.validation.labels).tolist()
        [4, 4, 4, 4, 4]
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    name: str = "data"
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        for field in ("validation", "test"):
            part: Dataset = getattr(self, field)
            for what in ("input_shape", "classes", "mean", "std"):
                if getattr(part, what) != getattr(self.train, what):
                    raise DataError(
                        f"{field} has {what} {getattr(part, what)}, the training set has {getattr(self.train, what)}"
                    )

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.train.input_shape

    def with_normalization(self, mean: Sequence[float], std: Sequence[float]) -> Splits:
        """The same splits under other normalisation constants."""
        train, validation, test = (
            part.with_normalization(mean, std) for part in (self.train, self.validation, self.test)
        )
        return dataclasses.replace(self, train=train, validation=validation, test=test)


def split(dataset: Dataset, size: Size, *, seed: int) -> tuple[Dataset, Dataset]:
    """Cut `size` images off `dataset`: (what remains, what was cut), disjoint.

    The same seed cuts the same images on every machine. The cut is stratified: every class loses its proportional
    share, rounded so that the sizes add up exactly.

    Args:
        size: a count (int) or a share of the set (float between 0 and 1).
        seed: which images are drawn; a non-negative integer.

    Raises:
        ValueError, TypeError: `size` leaves one of the parts empty or is no number.

    Example:
        >>> import numpy as np
        >>> data = Dataset(np.zeros((10, 1, 2, 2), np.uint8), np.arange(10) % 2, ("a", "b"), (0.0,), (1.0,))
        >>> rest, cut = split(data, 0.4, seed=0)
        >>> len(rest), len(cut), np.bincount(cut.labels).tolist()
        (6, 4, [2, 2])
    """
    count = resolve_size(size, len(dataset))
    per_class = np.bincount(dataset.labels, minlength=len(dataset.classes))
    # Largest remainders: floor every class's share, then give one more to those that lost most by the floor.
    exact = per_class * count
    quota = exact // len(dataset)
    short = count - int(quota.sum())
    quota[np.argsort(-(exact % len(dataset)), kind="stable")[:short]] += 1

    order = shuffled(len(dataset), _SPLIT, seed)
    by_class = order[np.argsort(dataset.labels[order], kind="stable")]
    starts = np.cumsum(per_class) - per_class
    rank = np.arange(len(dataset)) - np.repeat(starts, per_class)
    is_cut = np.zeros(len(dataset), dtype=bool)
    is_cut[by_class[rank < np.repeat(quota, per_class)]] = True
    return dataset.subset(np.flatnonzero(~is_cut)), dataset.subset(np.flatnonzero(is_cut))


def shuffled(count: int, *key: int) -> Int64Array:
    """A permutation of 0..count-1 that depends on `key` alone.

    It sorts the raw stream of PCG64, which numpy promises never to change, unlike that of Generator.permutation.
    """
    order: Int64Array = np.argsort(np.random.PCG64(key).random_raw(count), kind="stable")
    return order


def resolve_size(size: Size, total: int) -> int:
    if isinstance(size, bool) or not isinstance(size, numbers.Real):
        raise TypeError(f"size must be a count (int) or a share (float), got {size!r}")
    is_count = isinstance(size, numbers.Integral)
    count = int(size) if is_count else round(float(size) * total) if 0 < size < 1 else 0
    if not 0 < count < total:
        raise ValueError(f"size must be a count from 1 to {total - 1} or a share of {total} images, got {size!r}")
    return count


def from_arrays(
    x: Any,
    y: Any,
    *,
    test: Size | tuple[Any, Any] = 0.2,
    validation: Size | tuple[Any, Any] = 0.1,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    name: str = "arrays",
    augmentation: Augmentation | None = None,
) -> Splits:
    """Splits from arrays or tensors in memory.

    Args:
        x: images (N, C, H, W) or (N, H, W), uint8 or floating (kept as float32); numpy or torch.
        y: labels (N,), integers from 0.
        test, validation: each a pair (x, y), or a count or share to cut by seed: the test set from what is given, then
            the validation set from the rest.
        classes: names; "0", "1", ... up to the largest label when not given.
        mean, std: normalisation per channel; those of the training part when not given.
        seed: decides what is cut.

    Raises:
        DataError: arrays that do not fit together.
        ValueError, TypeError: sizes that leave a part empty.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.random((50, 3, 8, 8)), rng.integers(0, 2, 50)
        >>> splits = from_arrays(x, y, test=(x[:10], y[:10]), validation=0.2)
        >>> len(splits.train), len(splits.validation), len(splits.test), splits.input_shape
        (40, 10, 10, (3, 8, 8))
    """
    given = {part: pair for part, pair in (("validation", validation), ("test", test)) if isinstance(pair, tuple)}
    for part, pair in given.items():
        if len(pair) != 2:
            raise DataError(f"{part} must be a pair (x, y), a count or a share, got a tuple of {len(pair)}")
    arrays = {part: (as_images(pair[0]), to_numpy(pair[1])) for part, pair in {"train": (x, y), **given}.items()}
    if classes is None:
        largest = max((int(labels.max()) for _, labels in arrays.values() if labels.size), default=0)
        classes = [str(i) for i in range(largest + 1)]
    channels = arrays["train"][0].shape[1]
    neutral = ((0.0,) * channels, (1.0,) * channels)
    parts = {part: Dataset(images, labels, tuple(classes), *neutral) for part, (images, labels) in arrays.items()}

    if not isinstance(test, tuple):
        parts["train"], parts["test"] = split(parts["train"], test, seed=seed)
    if not isinstance(validation, tuple):
        parts["train"], parts["validation"] = split(parts["train"], validation, seed=seed)
    measured_mean, measured_std = channel_statistics(parts["train"].images)
    splits = Splits(parts["train"], parts["validation"], parts["test"], name, augmentation)
    return splits.with_normalization(measured_mean if mean is None else mean, measured_std if std is None else std)


def channel_statistics(images: ImageArray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel (uint8 as shares of 255); a constant channel is not scaled."""
    chunks = [images[i : i + 256] for i in range(0, len(images), 256)]  # bounds the float64 temporaries
    means = np.concatenate([chunk.mean(axis=(2, 3), dtype=np.float64) for chunk in chunks])
    variances = np.concatenate([chunk.var(axis=(2, 3), dtype=np.float64) for chunk in chunks])
    std = np.sqrt(variances.mean(axis=0) + means.var(axis=0))  # within the images, and between them
    std[std == 0] = 1
    unit = 255.0 if images.dtype == np.uint8 else 1.0
    return tuple((means.mean(axis=0) / unit).tolist()), tuple((std / unit).tolist())


def as_images(x: Any) -> ImageArray:
    images = to_numpy(x)
    if np.issubdtype(images.dtype, np.floating):
        images = images.astype(np.float32, copy=False)
    return images[:, None] if images.ndim == 3 else images


def to_numpy(x: Any) -> npt.NDArray[Any]:
    """`x` as an array; a torch tensor on any device without its graph."""
    return np.asarray(x.detach().cpu()) if hasattr(x, "detach") else np.asarray(x)


def checked_labels(labels: Any, *, count: int, classes: int, where: str) -> Int64Array:
    """`labels` as int64, after checking that there are `count` of them, all in 0..classes-1."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: expected a row of integers, found {labels.dtype} of shape {labels.shape}")
    if len(labels) != count:
        raise DataError(f"{where}: expected {count} labels, one for each image, found {len(labels)}")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        raise DataError(
            f"{where}: expected labels from 0 to {classes - 1}, found {labels[outside[0]]} at image {outside[0]}"
            f" ({outside.size} such labels)"
        )
    checked: Int64Array = labels.astype(np.int64)
    return checked
