"""Folders of images, one folder per class."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autocompress_fast.data._augmentation import Augmentation
from autocompress_fast.data._dataset import (
    DataError,
    Dataset,
    ImageArray,
    Int64Array,
    Size,
    Splits,
    channel_statistics,
    split,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff", ".webp"))
_VALIDATION_NAMES = ("val", "valid", "validation")
_MOST_BYTES = 16 << 30


def load_folder(
    folder: str | Path,
    *,
    size: tuple[int, int] | None = None,
    validation: Size = 0.1,
    test: Size = 0.2,
    seed: int = 0,
) -> Splits:
    """A folder of images: train/CLASS/*.png and test/ or val/ beside it, or CLASS/*.png alone. Needs Pillow.

    With test/ and val/ both are used as they are; one of them alone is the test set, and the validation set is cut from
    train; without either both are cut by seed. Images are kept in memory as uint8: grey if all of them are grey,
    otherwise RGB.

    Args:
        folder: the root.
        size: (height, width) to which every image is resized (bilinear); None: they must all have one size.
        validation, test: count or share to cut where the folders do not say.
        seed: what is cut.

    Raises:
        DataError: no images, a damaged one, sizes that differ, a class without images or one that training lacks; or
            more than fits into memory: give your own iterable of batches then.
    """
    root = Path(folder)
    parts = _find_parts(root)
    classes = tuple(path.name for path in _class_folders(parts["train"]))
    files = {part: _files(path, classes) for part, path in parts.items()}
    shape = _common_shape((path for listed in files.values() for path, _ in listed), size)
    needed = sum(map(len, files.values())) * shape[0] * shape[1] * shape[2]
    if needed > _MOST_BYTES:
        raise DataError(
            f"{root}: expected at most {_MOST_BYTES >> 30} GiB of pixels, found {needed / 2**30:.1f} GiB;"
            " give a smaller size, or an iterable of (x, y) batches that reads them as needed"
        )
    neutral = ((0.0,) * shape[0], (1.0,) * shape[0])
    sets = {part: Dataset(*_read(listed, shape), classes, *neutral) for part, listed in files.items()}
    if "test" not in sets:
        sets["train"], sets["test"] = split(sets["train"], test, seed=seed)
    if "validation" not in sets:
        sets["train"], sets["validation"] = split(sets["train"], validation, seed=seed)
    mean, std = channel_statistics(sets["train"].images)
    # An eighth of the side is what 4 pixels are for CIFAR.
    augmentation = Augmentation(shift=shape[1] // 8, flip=True)
    splits = Splits(sets["train"], sets["validation"], sets["test"], root.resolve().name, augmentation)
    return splits.with_normalization(mean, std)


def is_image_folder(folder: Path) -> bool:
    """Whether some FOLDER/CLASS or FOLDER/train/CLASS holds an image."""
    return bool(_class_folders(folder / "train") or _class_folders(folder))


def _find_parts(root: Path) -> dict[str, Path]:
    if not _class_folders(root / "train"):
        if not _class_folders(root):
            raise DataError(f"{root}: expected folders train/CLASS or CLASS with images, found none")
        return {"train": root}
    parts = {"train": root / "train"}
    validation = next((root / name for name in _VALIDATION_NAMES if _class_folders(root / name)), None)
    if _class_folders(root / "test"):
        parts["test"] = root / "test"
        if validation:
            parts["validation"] = validation
    elif validation:
        parts["test"] = validation
    return parts


def _class_folders(folder: Path) -> list[Path]:
    """Sorted folders below `folder`, if any of them holds an image."""
    if not folder.is_dir():
        return []
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return below if any(_is_image(path) for sub in below for path in sub.iterdir()) else []


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def _files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """(image, label), sorted by class and name."""
    listed = []
    for sub in _class_folders(folder):
        if sub.name not in classes:
            raise DataError(f"{sub}: expected one of the classes in train ({', '.join(classes)}), found {sub.name}")
        images = sorted(path for path in sub.iterdir() if _is_image(path))
        if not images:
            raise DataError(f"{sub}: expected images of class {sub.name}, found none")
        listed += [(path, classes.index(sub.name)) for path in images]
    return listed


def _common_shape(listed: Iterable[Path], size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(C, H, W) of all images, from their headers."""
    channels = 1
    first: Path | None = None
    for path in listed:
        with _opened(path) as image:
            if image.mode not in ("1", "L", "LA"):
                channels = 3
            found = (image.height, image.width)
        if size is None:
            first, size = path, found
        elif first is not None and found != size:
            raise DataError(
                f"{path}: expected {size[0]}x{size[1]} pixels (height x width) as in {first.name}, found"
                f" {found[0]}x{found[1]}; give size=(height, width) to resize"
            )
    if size is None or min(size) < 1:
        raise DataError(f"size must be (height, width), both positive, got {size}")
    return channels, *size


def _read(listed: list[tuple[Path, int]], shape: tuple[int, int, int]) -> tuple[ImageArray, Int64Array]:
    images = np.empty((len(listed), *shape), np.uint8)
    for pixels, (path, _) in zip(images, listed, strict=True):
        pixels[:] = read_image(path, shape)
    return images, np.array([label for _, label in listed], np.int64)


def read_image(path: str | Path, shape: tuple[int, int, int]) -> ImageArray:
    """The image in a file as uint8 (C, H, W): grey for one channel, else RGB, resized (bilinear) where it is not H x W.

    Raises:
        DataError: no readable image, or Pillow is not installed.
    """
    with _opened(Path(path)) as image:
        plain = image.convert("L" if shape[0] == 1 else "RGB")
        if plain.size != (shape[2], shape[1]):
            plain = plain.resize((shape[2], shape[1]), resample=2)  # bilinear
        pixels: ImageArray = np.asarray(plain).reshape(shape[1], shape[2], shape[0]).transpose(2, 0, 1)
        return pixels


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """The image in a file; however a damaged one fails, now or when its pixels are read, it is a DataError."""
    try:
        import PIL.Image
    except ImportError as error:
        raise DataError("image folders are read with Pillow; install it: pip install pillow") from error
    try:
        with warnings.catch_warnings():
            # An image that would unpack to very much memory is only a warning to Pillow.
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path) as image:
                yield image
    except Exception as error:
        raise DataError(f"{path}: expected a readable image, found {error}") from error
