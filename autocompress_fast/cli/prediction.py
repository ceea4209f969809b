"""Classification with a saved network; numpy alone, Pillow for images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autocompress_fast import data as datasets
from autocompress_fast.data import DataError, Dataset, Splits, read_image
from autocompress_fast.engine import Engine, load
from autocompress_fast.report import Document, Table

FloatArray = npt.NDArray[np.float32]

_BATCH = 500
_TOP = 3


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the first one first, with their probabilities."""

    source: str
    index: int  # in its file
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Predictions(Document):
    """What the images are."""

    file: Path
    predictions: tuple[Prediction, ...]

    def parts(self) -> Iterator[Table | str]:
        """One table, a row for each image."""
        several = {p.source for p in self.predictions if p.index > 0}
        rows = []
        for p in self.predictions:
            (name, probability), *others = p.top
            rows.append(
                (
                    f"{p.source}[{p.index}]" if p.source in several else p.source,
                    name,
                    ", ".join(f"{other} {share:.1%}" for other, share in others),
                    f"{probability:.1%}",
                )
            )
        yield Table("", ("input", "class", "next", "probability"), rows, names=3)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "file": str(self.file),
            "predictions": [
                {
                    "input": p.source,
                    "index": p.index,
                    "class": p.top[0][0],
                    "probability": p.top[0][1],
                    "top": [list(pair) for pair in p.top],
                }
                for p in self.predictions
            ],
        }


@dataclass(frozen=True)
class Accuracy(Document):
    """Result on the test part of a data set; percent."""

    file: Path
    data: str
    samples: int
    accuracy: float
    recorded: float | None  # when the network was saved

    def parts(self) -> Iterator[Table | str]:
        """One line."""
        recorded = "" if self.recorded is None else f"; {self.recorded:.2f}% when it was saved"
        yield f"{self.accuracy:.2f}% of {self.samples:,} test images of {self.data}{recorded}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "file": str(self.file),
            "data": self.data,
            "samples": self.samples,
            "accuracy": self.accuracy,
            "recorded_accuracy": self.recorded,
        }


def classify_files(file: Path, inputs: Sequence[Path], threads: int | None) -> Predictions:
    """Classify images and arrays.

    An array (.npy) is one sample or several of the network's input shape; uint8 is divided by 255, floats are taken as
    they are. An image is made grey or RGB and brought to the network's size. Both are then normalised as in training.
    """
    engine = opened(file, threads)
    predictions = []
    for path, samples in read_samples(engine, inputs):
        logits = np.concatenate([engine(normalized(engine, part)) for part in _batches(samples)])
        predictions += [Prediction(str(path), i, _top(engine, row)) for i, row in enumerate(logits)]
    return Predictions(file, tuple(predictions))


def classify_data(
    file: Path, data: str, dataset: str | None, seed: int, threads: int | None, precision: str = "float32"
) -> Accuracy:
    """Accuracy on the test part of a data set, normalised as the network was trained."""
    engine = opened(file, threads, precision)
    splits = matching(engine, file, data, dataset, seed)
    accuracy = accuracy_on(engine, splits.test)
    recorded = engine.info.get("accuracy")
    return Accuracy(file, splits.name, len(splits.test), accuracy, None if recorded is None else 100.0 * recorded)


def matching(engine: Engine, file: Path, data: str, dataset: str | None, seed: int) -> Splits:
    """A data set that the network knows, normalised as it was trained."""
    splits = datasets.load(data, dataset=dataset, seed=seed)
    if "mean" in engine.info and "std" in engine.info:
        splits = splits.with_normalization(*(_per_channel(engine, key) for key in ("mean", "std")))
    if splits.input_shape != engine.inputs[0].shape:
        raise ValueError(f"{file} takes inputs {engine.inputs[0].shape}, the images of {data} are {splits.input_shape}")
    known = engine.info.get("classes")
    if known is not None and list(splits.classes) != known:
        raise ValueError(f"{file} knows the classes {_some(known)}, {data} has {_some(splits.classes)}")
    return splits


def accuracy_on(engine: Engine, part: Dataset) -> float:
    """Percent of the images that are classified as their labels say."""
    correct = 0
    for start in range(0, len(part), _BATCH):
        some = slice(start, start + _BATCH)
        correct += int((np.argmax(engine(part.normalized(some)), axis=1) == part.labels[some]).sum())
    return 100.0 * correct / len(part)


def opened(file: Path, threads: int | None, precision: str = "float32") -> Engine:
    """A saved classifier of one input."""
    engine = load(file, threads=threads, precision=precision)
    if len(engine.inputs) != 1 or len(engine.output_shapes) != 1 or len(engine.output_shapes[0]) != 1:
        raise ValueError(
            f"{file} is no classifier of one input: it takes {len(engine.inputs)} inputs and puts out shapes "
            f"{', '.join(map(str, engine.output_shapes))}"
        )
    return engine


def read_samples(engine: Engine, inputs: Sequence[Path]) -> list[tuple[Path, npt.NDArray[Any]]]:
    """The samples of every file, not yet normalised; all are read first, as an error must not come halfway."""
    return [(path, _read(path, engine.inputs[0].shape)) for path in inputs]


def _read(path: Path, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The samples in a file, (N, *shape)."""
    if path.suffix.lower() != ".npy":
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"{path}: the network takes inputs {shape}, not images; give a .npy array")
        return read_image(path, (shape[0], shape[1], shape[2]))[None]
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: expected a .npy array of numbers, found {error}") from error
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{path}: expected uint8 or floating-point numbers, found {array.dtype}")
    forms = {shape, shape[1:]} if len(shape) == 3 and shape[0] == 1 else {shape}
    if array.shape in forms:
        array = array[None]
    if array.shape[1:] not in forms or len(array) == 0:
        raise DataError(f"{path}: expected one or more samples of shape {shape}, found shape {array.shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{path}: expected finite numbers, found NaN or infinity")
    samples: npt.NDArray[Any] = array.reshape(-1, *shape)
    return samples


def _batches(samples: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    return (samples[start : start + _BATCH] for start in range(0, len(samples), _BATCH))


def normalized(engine: Engine, samples: npt.NDArray[Any]) -> FloatArray:
    """Samples as the network was trained on them."""
    values = samples.astype(np.float32)
    if samples.dtype == np.uint8:
        values /= 255
    if "mean" in engine.info and "std" in engine.info:
        form = (-1, *[1] * (values.ndim - 2))
        mean, std = (np.array(_per_channel(engine, key), np.float32).reshape(form) for key in ("mean", "std"))
        values = (values - mean) / std
    return values


def _per_channel(engine: Engine, key: str) -> list[float]:
    """The saved numbers, one for each channel; a single one is for all of them."""
    numbers: list[float] = engine.info[key]
    return numbers * engine.inputs[0].shape[0] if len(numbers) == 1 else numbers


def _top(engine: Engine, logits: FloatArray) -> tuple[tuple[str, float], ...]:
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    shares = shifted / shifted.sum()
    names = engine.info.get("classes") or [str(i) for i in range(len(logits))]
    best = np.argsort(-shares, kind="stable")[:_TOP]
    return tuple((names[i], round(float(shares[i]), 6)) for i in best)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
