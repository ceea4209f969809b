"""MNIST and Fashion-MNIST from their IDX files, plain or gzip."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from autocompress_fast.data._augmentation import Augmentation
from autocompress_fast.data._dataset import DataError, Dataset, Size, Splits, checked_labels, split

_DIGITS = tuple("0123456789")
_GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def load_mnist(folder: str | Path, *, validation: Size = 0.1, seed: int = 0) -> Splits:
    """MNIST: 28x28 digits, 60,000 + 10,000 images.

    Args:
        folder: holds {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz, itself or in raw/ or MNIST/raw/.
        validation: count or share of the training images to cut off for validation.
        seed: which ones.

    Raises:
        DataError: a file is missing or damaged, or does not fit the others; the message names it.
    """
    return _load_idx("mnist", folder, validation, seed)


def load_fashion_mnist(folder: str | Path, *, validation: Size = 0.1, seed: int = 0) -> Splits:
    """Fashion-MNIST: 28x28 garments, 60,000 + 10,000 images; files (FashionMNIST/raw/) and arguments as for MNIST."""
    return _load_idx("fashion-mnist", folder, validation, seed)


def find_mnist(folder: Path) -> dict[str, Path]:
    """Where `folder` holds IDX files: set name -> folder. A folder with "fashion" in its name holds Fashion-MNIST."""
    found: dict[str, Path] = {}
    for sub in ("", "raw", "MNIST", "MNIST/raw", "FashionMNIST", "FashionMNIST/raw", "fashion-mnist"):
        place = folder / sub
        if any(place.glob("*-ubyte")) or any(place.glob("*-ubyte.gz")):
            named = (place.resolve().parent.name if place.name == "raw" else place.resolve().name).lower()
            found.setdefault("fashion-mnist" if "fashion" in named else "mnist", place)
    return found


def _load_idx(name: str, folder: str | Path, validation: Size, seed: int) -> Splits:
    found = find_mnist(Path(folder))
    # A folder given by hand need not be named after what it holds.
    place = found.get(name) or next((path for path in found.values() if path == Path(folder)), None)
    if place is None:
        raise DataError(f"{folder}: expected {name} IDX files (train-images-idx3-ubyte, ...), found none")
    train, test = (_read_part(place, prefix, name) for prefix in ("train", "t10k"))
    rest, cut = split(train, validation, seed=seed)
    augmentation = Augmentation(shift=1) if name == "mnist" else Augmentation(shift=2, flip=True)
    return Splits(rest, cut, test, name, augmentation)


def _read_part(folder: Path, prefix: str, name: str) -> Dataset:
    images_path, labels_path = (_existing(folder / f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    images = read_idx(images_path, dimensions=3)
    labels = checked_labels(read_idx(labels_path, dimensions=1), count=len(images), classes=10, where=str(labels_path))
    classes, mean, std = (_DIGITS, 0.1307, 0.3081) if name == "mnist" else (_GARMENTS, 0.2860, 0.3530)
    return Dataset(images[:, None], labels, classes, (mean,), (std,))


def read_idx(path: Path, *, dimensions: int) -> npt.NDArray[np.uint8]:
    """The uint8 array in an IDX file: magic 0x000008dd (dd = dimensions), the big-endian sizes, the bytes."""
    magic = 0x0800 + dimensions
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            header = np.frombuffer(_read_up_to(stream, 4 + 4 * dimensions), np.uint8).tobytes()
            fields = np.frombuffer(header[: len(header) // 4 * 4], ">u4").tolist()
            if len(fields) < 1 + dimensions or fields[0] != magic:
                raise DataError(
                    f"{path}: expected an IDX file of {dimensions} dimensions (magic {magic:#010x}),"
                    f" found {header[:4].hex() or 'an empty file'} in {len(header)} header bytes"
                )
            shape = tuple(fields[1:])
            expected = math.prod(shape)
            content = _read_up_to(stream, expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable IDX file, found {error}") from error
    if len(content) != expected or expected == 0:
        held = "more" if len(content) > expected else str(len(content))
        raise DataError(f"{path}: expected {expected} bytes for shape {shape}, found {held}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_up_to(stream: IO[bytes], count: int) -> bytearray:
    """At most `count` bytes, in steps, so that a damaged header cannot ask for all of the memory at once."""
    content = bytearray()
    while len(content) < count and (chunk := stream.read(min(count - len(content), 1 << 20))):
        content += chunk
    return content


def _existing(path: Path) -> Path:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise DataError(f"{path}: expected this file (or {path.name}.gz), found none")
