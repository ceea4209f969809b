"""One door to all data sets on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from autocompress_fast.data._cifar import find_cifar, load_cifar10, load_cifar100
from autocompress_fast.data._dataset import DataError, Size, Splits
from autocompress_fast.data._digits import digits
from autocompress_fast.data._folder import is_image_folder, load_folder
from autocompress_fast.data._mnist import find_mnist, load_fashion_mnist, load_mnist

_LOADERS: dict[str, Callable[..., Splits]] = {
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "folder": load_folder,
}


def load(
    path: str | Path,
    *,
    dataset: str | None = None,
    validation: Size | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
) -> Splits:
    """The data set in a folder, recognised by its files; or "digits", scikit-learn's.

    Args:
        path: a folder as for `load_mnist`, `load_fashion_mnist`, `load_cifar10`, `load_cifar100` or `load_folder`, or
            the word "digits".
        dataset: "mnist", "fashion-mnist", "cifar10", "cifar100" or "folder", where the folder holds more than one.
        validation: count or share to cut off the training images; a tenth when not given.
        seed: which ones.
        size: (height, width) for a folder of images.

    Raises:
        DataError: the folder is missing, holds no set or more than one, or a file of it is damaged.
        ValueError: an unknown name, or `size` for anything but a folder of images.

    Example:
        >>> load("digits", seed=1).name
        'digits'
    """
    options: dict[str, Any] = {"seed": seed} if validation is None else {"seed": seed, "validation": validation}
    if dataset is not None and dataset not in _LOADERS:
        raise ValueError(f"unknown dataset {dataset!r}; known are {', '.join(_LOADERS)}")
    root = Path(path)
    if str(path) == "digits" and dataset is None and not root.exists():
        return digits(**options)
    if not root.is_dir():
        raise DataError(f"{path}: expected a folder with a data set, found {'a file' if root.exists() else 'nothing'}")
    if dataset is None:
        dataset = _recognised(root)
    if size is not None:
        if dataset != "folder":
            raise ValueError(f"size is for a folder of images; {dataset} has its own")
        options["size"] = size
    return _LOADERS[dataset](root, **options)


def _recognised(root: Path) -> str:
    found = {**find_mnist(root), **find_cifar(root)}
    if is_image_folder(root):
        found["folder"] = root
    if not found:
        raise DataError(
            f"{root}: expected the files of MNIST, Fashion-MNIST, CIFAR-10 or CIFAR-100, or images in train/CLASS or"
            " CLASS, found none of them"
        )
    if len(found) > 1:
        held = ", ".join(f"{name} ({place})" for name, place in found.items())
        raise DataError(f"{root}: expected one data set, found {held}; say which: dataset=...")
    return next(iter(found))
