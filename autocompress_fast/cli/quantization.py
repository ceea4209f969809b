"""A saved network with 8-bit weights and activations; numpy alone, Pillow for images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autocompress_fast.cli.prediction import accuracy_on, matching, normalized, opened, read_samples
from autocompress_fast.engine.narrow import quantize
from autocompress_fast.engine.program import is_narrow
from autocompress_fast.report import Document, Table


@dataclass(frozen=True)
class Quantized(Document):
    """What became of a network.

    Attributes:
        file, output: the network before, and after.
        method: of choosing ranges.
        samples: that were looked at.
        layers: that compute with 8 bits.
        float32: names of those that do not.
        bytes, bytes_before: of the files.
        accuracy, accuracy_before: percent of the validation images, if there were any.
        images: how many these are.
    """

    file: Path
    output: Path
    method: str
    samples: int
    layers: int
    float32: tuple[str, ...]
    bytes: int
    bytes_before: int
    accuracy: float | None
    accuracy_before: float | None
    images: int

    def parts(self) -> Iterator[Table | str]:
        """What was done, and sizes and accuracies."""
        others = f"; in float32: {', '.join(self.float32)}" if self.float32 else ""
        count = f"{self.layers} of {self.layers + len(self.float32)} layers"
        yield f"{count} with 8-bit weights and activations ({self.method}, {self.samples:,} samples){others}"
        rows = [("bytes", f"{self.bytes_before:,}", f"{self.bytes:,}")]
        if self.accuracy is not None:
            what = f"accuracy on {self.images:,} validation images"
            rows.append((what, f"{self.accuracy_before:.2f}%", f"{self.accuracy:.2f}%"))
        yield Table("", ("", str(self.file), str(self.output)), rows)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {**asdict(self), "file": str(self.file), "output": str(self.output), "float32": list(self.float32)}


def quantized(
    file: Path,
    output: Path,
    *,
    inputs: Sequence[Path],
    data: str | None,
    dataset: str | None,
    seed: int,
    threads: int | None,
    method: str,
    percentile: float,
    skip: Sequence[str],
    samples: int,
    residual_bits: int,
) -> Quantized:
    """Quantize a saved classifier and write the result; options as of `acf.quantize` and `autocompress predict`."""
    if output.suffix.lower() != ".acf":
        raise ValueError(f"{output} must end in .acf")
    engine = opened(file, threads)
    splits = None if data is None else matching(engine, file, data, dataset, seed)
    read = [normalized(engine, some) for _, some in read_samples(engine, inputs)] if splits is None else splits.train
    small = quantize(
        engine, read, method=method, percentile=percentile, skip=skip, samples=samples, residual_bits=residual_bits
    )
    layers = [step for step in small.program.steps if step.op in ("conv", "linear")]
    before = after = None
    if splits is not None:
        before, after = accuracy_on(engine, splits.validation), accuracy_on(small, splits.validation)
    size = file.stat().st_size
    small.save(output)
    return Quantized(
        file,
        output,
        method,
        small.info["provenance"]["quantization"]["samples"],
        sum(map(is_narrow, layers)),
        tuple(step.name for step in layers if not is_narrow(step)),
        output.stat().st_size,
        size,
        after,
        before,
        0 if splits is None else len(splits.validation),
    )
