"""What an engine says about its steps: their sizes, and how long they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Choice", "Profile", "StepSummary", "StepTime", "Summary", "Tuning", "WeightCounts"]


@dataclass(frozen=True)
class WeightCounts:
    """Weights of a program, biases and normalisations not counted.

    Attributes:
        kept: weights stored.
        dense: weights of the same layers written out in full.
        conv_kept, conv_dense: the same for convolutions alone.
        bytes: of all tensors, indices and biases included.
    """

    kept: int
    dense: int
    conv_kept: int
    conv_dense: int
    bytes: int


@dataclass(frozen=True)
class StepSummary:
    """One step: its operation, where it comes from, and what `StepInfo` says of it for one sample."""

    op: str
    name: str
    shape: tuple[int, ...]
    storage: str
    weights: int
    dense_weights: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """The steps of an engine and their totals for one sample; `str` makes a table of it."""

    steps: tuple[StepSummary, ...]
    weights: WeightCounts
    macs: int

    def __str__(self) -> str:
        rows = [("step", "name", "output", "storage", "weights", "of dense", "MACs", "bytes")]
        for s in self.steps:
            share = f"{s.weights / s.dense_weights:.1%}" if s.dense_weights else ""
            shape = "x".join(map(str, s.shape))
            figures = (f"{n:,}" if n else "" for n in (s.weights, s.macs, s.bytes))
            weights, macs, size = figures
            rows.append((s.op, s.name, shape, s.storage, weights, share, macs, size))
        total = self.weights
        share = f"{total.kept / total.dense:.1%}" if total.dense else ""
        rows.append(("total", "", "", "", f"{total.kept:,}", share, f"{self.macs:,}", f"{total.bytes:,}"))
        return _aligned(rows, left=4)


@dataclass(frozen=True)
class StepTime:
    """One step of a run, or several that are computed as one.

    Attributes:
        op, name, shape: as in `StepSummary`.
        macs: multiply-accumulates for all samples.
        seconds: median.
        peak: operations that the processors in use can do in a second.
    """

    op: str
    name: str
    shape: tuple[int, ...]
    macs: int
    seconds: float
    peak: float

    @property
    def flops(self) -> float:
        """Operations in a second, two for every multiply-accumulate."""
        return 2 * self.macs / self.seconds if self.seconds else 0.0

    @property
    def share_of_peak(self) -> float:
        """Of what the processors can do; above 1 where a convolution takes fewer operations than its definition."""
        return self.flops / self.peak


@dataclass(frozen=True)
class Profile:
    """What `Engine.profile` measured; `str` makes a table of it.

    Attributes:
        steps: in order.
        samples, threads: of every run.
        peak: operations that the processors in use can do in a second, measured.
    """

    steps: tuple[StepTime, ...]
    samples: int
    threads: int
    peak: float

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(step.seconds for step in self.steps)

    def __str__(self) -> str:
        rows = [("step", "name", "output", "microseconds", "of all", "GFLOP/s", "of peak")]
        for s in self.steps:
            speed = (f"{s.flops / 1e9:.1f}", f"{s.share_of_peak:.0%}") if s.macs else ("", "")
            share = f"{s.seconds / self.seconds:.1%}"
            rows.append((s.op, s.name, "x".join(map(str, s.shape)), f"{1e6 * s.seconds:.1f}", share, *speed))
        macs = sum(step.macs for step in self.steps)
        speed = (f"{2e-9 * macs / self.seconds:.1f}", f"{2 * macs / self.seconds / self.peak:.0%}")
        rows.append(("total", "", f"{self.samples} samples", f"{1e6 * self.seconds:.1f}", "", *speed))
        return _aligned(rows, left=3)


@dataclass(frozen=True)
class Choice:
    """How a layer is computed.

    Attributes:
        name: of its module.
        estimated: the way that the engine takes when nothing was measured.
        chosen: the one that it takes now.
        seconds: measured, of every way in which it can be computed.
    """

    name: str
    estimated: str
    chosen: str
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Tuning:
    """What `Engine.tune` found; `str` makes a table of it.

    Attributes:
        choices: of the layers that can be computed in several ways, in order.
        samples, threads: of every run.
        before, after: seconds of a run, as estimated and as chosen.
        ways: (operation, samples at once) -> way, of layers that are not computed as estimated.
    """

    choices: tuple[Choice, ...]
    samples: int
    threads: int
    before: float
    after: float
    ways: Mapping[tuple[int, int], str]

    def __str__(self) -> str:
        rows = [("layer", "estimated", "chosen", "microseconds", "before")]
        for c in self.choices:
            chosen = "" if c.chosen == c.estimated else c.chosen
            after, before = (f"{1e6 * c.seconds[way]:.1f}" for way in (c.chosen, c.estimated))
            rows.append((c.name, c.estimated, chosen, after, before))
        rows.append(("all steps", "", "", f"{1e6 * self.after:.1f}", f"{1e6 * self.before:.1f}"))
        return _aligned(rows, left=3)


def _aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns of text, of which the first `left` hold words and the rest figures."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
