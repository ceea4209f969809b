"""CIFAR-10 and CIFAR-100, from the binary or the Python version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autocompress_fast.data._augmentation import Augmentation
from autocompress_fast.data._dataset import DataError, Dataset, Size, Splits, checked_labels, split
from autocompress_fast.data._pickle import load_pickle

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Version:
    """Files of one version of a set, and where in them labels and names are."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str  # file of the class names
    names_key: str | None = None  # in a pickle: under which key
    labels_key: str | None = None  # in a pickle; a binary row begins with its labels,
    label_bytes: int = 1  # of which the last counts (CIFAR-100: coarse, fine)

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


@dataclass(frozen=True)
class _Kind:
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    versions: tuple[_Version, ...]


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_KINDS = {
    "cifar10": _Kind(
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        (
            _Version("cifar-10-batches-bin", tuple(f"{b}.bin" for b in _BATCHES), "test_batch.bin", "batches.meta.txt"),
            _Version("cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", "label_names", "labels"),
        ),
    ),
    "cifar100": _Kind(
        100,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        (
            _Version("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", label_bytes=2),
            _Version("cifar-100-python", ("train",), "test", "meta", "fine_label_names", "fine_labels"),
        ),
    ),
}


def load_cifar10(folder: str | Path, *, validation: Size = 0.1, seed: int = 0) -> Splits:
    """CIFAR-10: 32x32 colour images of ten classes, 50,000 + 10,000 images.

    Args:
        folder: holds the files of the binary or the Python version, itself or in the folder they are published in
            (cifar-10-batches-bin, cifar-10-batches-py). The Python version's pickles are read without running them.
        validation: count or share of the training images to cut off for validation.
        seed: which ones.

    Raises:
        DataError: a file is missing or damaged, or does not fit the others; the message names it.
    """
    return _load("cifar10", folder, validation, seed)


def load_cifar100(folder: str | Path, *, validation: Size = 0.1, seed: int = 0) -> Splits:
    """CIFAR-100 with its fine labels; arguments as for CIFAR-10 (cifar-100-binary, cifar-100-python)."""
    return _load("cifar100", folder, validation, seed)


def find_cifar(folder: Path) -> dict[str, Path]:
    """Where `folder` holds CIFAR files: set name -> folder."""
    return {name: found[0] for name in _KINDS if (found := _find_version(name, folder))}


def _find_version(name: str, folder: Path) -> tuple[Path, _Version] | None:
    for version in _KINDS[name].versions:
        for place in (folder / version.folder, folder):
            if any((place / file).is_file() for file in version.files):
                return place, version
    return None


def _load(name: str, folder: str | Path, validation: Size, seed: int) -> Splits:
    kind = _KINDS[name]
    found = _find_version(name, Path(folder))
    if found is None:
        places = " or ".join(f"{version.folder}/{version.test}" for version in kind.versions)
        raise DataError(f"{folder}: expected {name} ({places}), found none")
    place, version = found
    for file in version.files:
        if not (place / file).is_file():
            raise DataError(f"{place / file}: expected this file of {name}, found none")
    classes = _class_names(place / version.names, version.names_key, kind.classes)
    train, test = (
        Dataset(*_read_part(place, files, version, kind.classes), classes, kind.mean, kind.std)
        for files in (version.train, (version.test,))
    )
    rest, cut = split(train, validation, seed=seed)
    return Splits(rest, cut, test, name, Augmentation(shift=4, flip=True))


def _read_part(
    place: Path, files: Sequence[str], version: _Version, classes: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    read = _read_binary if version.labels_key is None else _read_pickle
    parts = [read(place / file, version, classes) for file in files]
    images = np.concatenate([images for images, _ in parts])
    return images.reshape(-1, 3, 32, 32), np.concatenate([labels for _, labels in parts])


def _read_binary(path: Path, version: _Version, classes: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    row = version.label_bytes + _PIXELS
    content = _read_bytes(path)
    if len(content) == 0 or len(content) % row:
        raise DataError(
            f"{path}: expected rows of {row} bytes, found {len(content)} bytes: {len(content) % row} too many"
            f" after {len(content) // row} rows"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, row)
    labels = checked_labels(rows[:, version.label_bytes - 1], count=len(rows), classes=classes, where=str(path))
    return rows[:, version.label_bytes :], labels


def _read_pickle(path: Path, version: _Version, classes: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    content = load_pickle(path)
    for key in ("data", version.labels_key):
        if key not in content:
            raise DataError(f"{path}: expected an entry {key!r}, found {', '.join(sorted(content)) or 'none'}")
    images, labels = content["data"], content[version.labels_key or ""]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_PIXELS,):
        held = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{path}: expected data of uint8 (N, {_PIXELS}), found {held}")
    if not isinstance(labels, np.ndarray) and not (
        isinstance(labels, list) and all(type(label) is int for label in labels)
    ):
        raise DataError(
            f"{path}: expected {version.labels_key} to be a list of integers, found {type(labels).__name__}"
        )
    try:
        labels = np.asarray(labels, dtype=np.int64 if isinstance(labels, list) else None)
    except OverflowError as error:
        raise DataError(f"{path}: expected labels from 0 to {classes - 1}, found one of more than 64 bits") from error
    return images, checked_labels(labels, count=len(images), classes=classes, where=str(path))


def _class_names(path: Path, key: str | None, count: int) -> tuple[str, ...]:
    if not path.is_file():
        raise DataError(f"{path}: expected this file with {count} class names, found none")
    names: Any = _read_bytes(path).decode("utf-8", "replace").split() if key is None else load_pickle(path).get(key)
    if not isinstance(names, list) or len(names) != count:
        held = len(names) if isinstance(names, list) else "none"
        raise DataError(f"{path}: expected {count} class names, found {held}")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, found {error}") from error
