"""Batches for training and evaluation: what the trainer reads, whatever the user brought."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from autocompress_fast.data._augmentation import Augmentation
from autocompress_fast.data._dataset import DataError, Dataset, Int64Array, shuffled

if TYPE_CHECKING:
    import torch

    Batch = tuple[torch.Tensor, torch.Tensor]

_ORDER, _AUGMENTATION, _USER = 1, 2, 3  # keep the random streams of one seed apart


@runtime_checkable
class Batches(Protocol):
    """What the trainer reads: `epoch(i)` gives the (x, y) torch batches of epoch i, the same whenever it is asked."""

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        ...

    def epoch(self, index: int) -> Iterator[Batch]:
        """The batches of epoch `index`, counted from 0."""
        ...


class BatchLoader:
    """Normalised batches of a `Dataset`, optionally shuffled and augmented.

    Order and augmentation depend on (seed, epoch) alone, so that a resumed run sees what an uninterrupted one would.

    Args:
        dataset: where the images come from.
        batch_size: images in a batch; the last one of an epoch may be smaller.
        shuffle: a new order every epoch.
        seed: of order and augmentation.
        augmentation: applied to every image, None for none.
        drop_last: leave out the last batch if it is not full.
        device: where the batches go; raw pixels are moved, then normalised there.

    Raises:
        ValueError, TypeError: a batch size below 1, a negative seed, or no batch at all.

    Example:
        >>> import numpy as np
        >>> data = Dataset(np.zeros((10, 1, 2, 2), np.uint8), np.arange(10) % 2, ("a", "b"), (0.0,), (1.0,))
        >>> loader = BatchLoader(data, 4, shuffle=True, seed=7)
        >>> len(loader), [tuple(x.shape) for x, y in loader.epoch(0)]
        (3, [(4, 1, 2, 2), (4, 1, 2, 2), (2, 1, 2, 2)])
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        drop_last: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset must be a Dataset, got {type(dataset).__name__}")
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augmentation = augmentation
        self.drop_last = drop_last
        self.device = device
        if len(self) == 0:
            raise ValueError(f"drop_last with batch_size {batch_size} leaves none of the {len(dataset)} images")

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def indices(self, index: int) -> Iterator[Int64Array]:
        """Which images of the dataset are in each batch of epoch `index`."""
        order = shuffled(len(self.dataset), _ORDER, self.seed, index) if self.shuffle else np.arange(len(self.dataset))
        for number in range(len(self)):
            yield order[number * self.batch_size : (number + 1) * self.batch_size]

    def epoch(self, index: int) -> Iterator[Batch]:
        """x: float32 (B, C, H, W) normalised, y: int64 (B,)."""
        import torch

        scale, offset = (torch.from_numpy(a).to(self.device) for a in self.dataset.scale_and_offset())
        for number, chosen in enumerate(self.indices(index)):
            raw = self.dataset.images[chosen]
            labels = torch.from_numpy(self.dataset.labels[chosen]).to(self.device)
            rng = np.random.default_rng((_AUGMENTATION, self.seed, index, number))
            if self.augmentation is not None:
                raw = self.augmentation.shift_and_flip(raw, rng)
            pixels = torch.from_numpy(raw).to(self.device)
            if self.augmentation is not None and self.augmentation.resamples:
                pixels = self.augmentation.resample(pixels.to(torch.float32), rng)
            yield torch.mul(pixels, scale).add_(offset), labels


class UserBatches:
    """The user's own re-iterable batches behind the interface of `Batches`; they are passed through as they are.

    While the user's iterator runs, the global random generators (torch's, numpy's and Python's) are set from (seed,
    epoch) and put back after every batch, and the loader's own `generator` is seeded: a shuffling DataLoader repeats
    its order when a run is resumed, and the trainer's random numbers do not depend on the loader's.

    Args:
        iterable: gives (x, y) pairs of tensors or arrays each time it is iterated, for example a DataLoader.
        seed: see above.
        length: number of batches, where `len(iterable)` does not say.

    Raises:
        TypeError: not an iterable, or one that can be read only once, or its length is unknown.
        DataError: while iterating: a batch that is no (x, y) pair of equal lengths, or no batch at all.

    Example:
        >>> import torch
        >>> mine = [(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))] * 3
        >>> loader = UserBatches(mine)
        >>> len(loader), sum(len(y) for x, y in loader.epoch(0))
        (3, 12)
    """

    def __init__(self, iterable: Iterable[Any], *, seed: int = 0, length: int | None = None) -> None:
        if not isinstance(iterable, Iterable):
            raise TypeError(
                f"data must be an iterable of (x, y) batches, got {type(iterable).__name__};"
                " a torch Dataset goes into a DataLoader first"
            )
        if isinstance(iterable, Iterator):
            raise TypeError(
                f"data is a one-shot {type(iterable).__name__} that is empty after one epoch; "
                "give a list of batches, a DataLoader, or an object whose __iter__ starts again"
            )
        if length is None:
            try:
                length = len(iterable)  # type: ignore[arg-type]
            except TypeError:
                raise TypeError(
                    f"the number of batches of {type(iterable).__name__} is unknown; say it: length=..."
                ) from None
        self.iterable = iterable
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, index: int) -> Iterator[Batch]:
        import torch

        sampler: Any = getattr(self.iterable, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(index)
        generator = getattr(self.iterable, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(_mixed(self.seed, index))
        streams = _GlobalStreams(_mixed(self.seed, index))
        with streams:
            iterator = iter(self.iterable)
        number = -1
        for number in range(self.length):
            with streams:
                batch = next(iterator, None)
            if batch is None:
                raise DataError(f"epoch {index} ended after {number} batches, expected {self.length}")
            yield _checked_batch(batch, number)


def batches(
    data: Any,
    batch_size: int = 128,
    *,
    shuffle: bool = False,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    drop_last: bool = False,
    device: torch.device | str | None = None,
) -> Batches:
    """`data` as `Batches`: a `Dataset` gets a `BatchLoader`, `Batches` stay, any other iterable of (x, y) is wrapped.

    The keywords are those of `BatchLoader`; batches that the user made himself keep their size, order and device.

    Example:
        >>> import numpy as np
        >>> data = Dataset(np.zeros((10, 1, 2, 2), np.uint8), np.arange(10) % 2, ("a", "b"), (0.0,), (1.0,))
        >>> len(batches(data, 4))
        3
    """
    if isinstance(data, Dataset):
        return BatchLoader(
            data,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            augmentation=augmentation,
            drop_last=drop_last,
            device=device,
        )
    # A user's loader may keep a number called "epoch".
    is_batches = isinstance(data, Batches) and callable(data.epoch)
    return data if is_batches else UserBatches(data, seed=seed)


class _GlobalStreams:
    """Context in which the global random generators continue a stream of their own; outside they are as before."""

    def __init__(self, seed: int) -> None:
        self.seed: int | None = seed
        self.inside: tuple[Any, Any, Any]

    def __enter__(self) -> None:
        import random

        import torch

        self.outside = _global_streams()
        if self.seed is None:
            _set_global_streams(self.inside)
        else:
            random.seed(self.seed)
            np.random.seed(self.seed % 2**32)  # noqa: NPY002 - the user's code draws from it
            torch.default_generator.manual_seed(self.seed)
            self.seed = None

    def __exit__(self, *_: object) -> None:
        self.inside = _global_streams()
        _set_global_streams(self.outside)


def _global_streams() -> tuple[Any, Any, Any]:
    import random

    import torch

    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def _set_global_streams(states: tuple[Any, Any, Any]) -> None:
    import random

    import torch

    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])


def _mixed(seed: int, epoch: int) -> int:
    """One 63-bit seed for (seed, epoch)."""
    return int(np.random.SeedSequence((_USER, seed, epoch)).generate_state(1, np.uint64)[0] >> 1)


def _checked_batch(batch: Any, number: int) -> Batch:
    import torch

    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
        raise DataError(f"batch {number} must be a pair (x, y), found {type(batch).__name__}{size}")
    x, y = (torch.as_tensor(part) for part in batch)
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or len(x) == 0:
        raise DataError(f"batch {number} must have as many images as labels, found {tuple(x.shape)}, {tuple(y.shape)}")
    return x, y
