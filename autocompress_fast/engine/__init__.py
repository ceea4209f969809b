"""Compressed networks as files that run without torch.

`compile` turns a torch model into an `Engine`; `Engine.save` writes it, `load` reads it back with numpy alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from autocompress_fast import _core
from autocompress_fast._files import write_atomically
from autocompress_fast.config import default_threads
from autocompress_fast.engine.file import FORMAT_VERSION, FileFormatError, check_info, read, write
from autocompress_fast.engine.native import NativeExecutor
from autocompress_fast.engine.program import (
    Input,
    Program,
    ProgramError,
    UnsupportedError,
    VerificationError,
    is_narrow,
    validate,
)
from autocompress_fast.engine.tables import Choice, Profile, StepSummary, StepTime, Summary, Tuning, WeightCounts

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMAT_VERSION",
    "Choice",
    "Engine",
    "FileFormatError",
    "Profile",
    "Program",
    "ProgramError",
    "StepSummary",
    "StepTime",
    "Summary",
    "Tuning",
    "UnsupportedError",
    "VerificationError",
    "WeightCounts",
    "compile",
    "load",
]

FloatArray = npt.NDArray[np.float32]

PRECISIONS = ("float32", "bfloat16")


class Engine:
    """A network that runs without torch; made by `compile` or `load`.

    Calling it takes the network's inputs, each with any number of samples first, as float32 numpy arrays or torch
    tensors, and returns the same kind: one array, or a tuple where the network has several outputs. Other dtypes are
    refused, not converted: only the caller knows how 0..255 was scaled for training. A torch tensor on another device
    is computed on the CPU and the result put back there; no gradient flows through.

    An engine may be used by several threads at once; they run side by side.

    Attributes:
        program: the steps and tensors it runs.
        threads: how many processors a call uses; results do not depend on it.
        precision: "float32", or "bfloat16": convolutions and linear layers then multiply numbers of that kind and add
            up in float32, wherever this processor is quicker at it (AMX, AVX512-BF16). What goes in, comes out and is
            saved is float32 all the same.
    """

    def __init__(
        self,
        program: Program,
        *,
        threads: int | None = None,
        info: dict[str, Any] | None = None,
        precision: str = "float32",
    ) -> None:
        self._infos = validate(program)
        self.program = program
        self.threads = _thread_count(threads)
        self.precision = _precision(precision)
        self.info = {} if info is None else info
        self._ways: dict[int, Mapping[tuple[int, int], str]] = {}  # of calls with so many samples
        self._executor = NativeExecutor(program, self._infos, self.threads, precision)
        self._usual = program.inputs[0].shape if len(program.inputs) == 1 and program.batch is None else None

    @property
    def info(self) -> dict[str, Any]:
        """What is saved with the program, for people and for `autocompress predict`: JSON values.

        Some keys have a meaning and are checked when `info` is set and when it is saved: "classes", "mean", "std",
        "accuracy", "original", "provenance" (docs/acf-format.md).
        """
        return self._info

    @info.setter
    def info(self, value: dict[str, Any]) -> None:
        check_info(value, self.program, self._infos)
        self._info = dict(value)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Names of the inputs and the shape of one sample of each."""
        return self.program.inputs

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of one sample of each output."""
        shapes = [given.shape for given in self.program.inputs] + [info.shape for info in self._infos]
        return tuple(shapes[value] for value in self.program.outputs)

    @overload
    def __call__(self, *inputs: FloatArray) -> Any: ...

    @overload
    def __call__(self, *inputs: torch.Tensor) -> Any: ...

    def __call__(self, *inputs: Any) -> Any:
        """Run the network.

        A result does not depend on the number of threads, nor on what else is in the batch. For another number of
        samples its last bits may be others, because convolutions are then computed differently.

        Raises:
            TypeError: an input is neither a numpy array nor a torch tensor, or not float32.
            ValueError: a shape is not the declared one, or the numbers of samples differ.
        """
        arrays = self._check_inputs(inputs)
        outputs: Sequence[Any] = self._executor.run(arrays)
        if not isinstance(inputs[0], np.ndarray):
            import torch

            outputs = [torch.from_numpy(y).to(inputs[0].device) for y in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _check_inputs(self, inputs: tuple[Any, ...]) -> list[FloatArray]:
        if len(inputs) == 1:  # the usual call: small networks take only some microseconds
            x = inputs[0]
            if isinstance(x, np.ndarray) and x.dtype == np.float32 and x.shape[1:] == self._usual and x.ndim > 0:
                return [x]
        declared = self.program.inputs
        if len(inputs) != len(declared):
            names = ", ".join(given.name for given in declared)
            raise TypeError(f"the network takes {len(declared)} inputs ({names}), not {len(inputs)}")
        arrays = [_as_numpy(x, given.name) for x, given in zip(inputs, declared, strict=True)]
        batch = self.program.batch
        for array, given in zip(arrays, declared, strict=True):
            if array.shape[1:] != given.shape or array.ndim == 0 or batch not in (None, len(array)):
                wanted = ", ".join(["N" if batch is None else str(batch), *map(str, given.shape)])
                raise ValueError(f"input {given.name!r} must have shape ({wanted}), not {array.shape}")
            if len(array) != len(arrays[0]):
                raise ValueError(f"input {given.name!r} has {len(array)} samples, the first input {len(arrays[0])}")
        return arrays

    def save(self, path: str | Path) -> None:
        """Write the program and `info` to one file, `load`'s counterpart; an old file is replaced in one step.

        Raises:
            ValueError: `info` was changed into something that cannot be saved; nothing is written.
        """
        write(path, self.program, self.info)

    def export_onnx(self, path: str | Path) -> None:
        """Write the network as an ONNX model, for other runtimes; an old file is replaced in one step.

        Columns that were removed become a choice of channels and zeros, which other runtimes compute in full.

        Raises:
            ImportError: the package onnx is not installed.
        """
        from autocompress_fast.engine.onnx import as_onnx

        write_atomically(path, as_onnx(self.program, self._infos).SerializeToString())

    @property
    def weights(self) -> WeightCounts:
        """How many weights are stored, and how many the same layers have in full."""
        pairs = list(zip(self.program.steps, self._infos, strict=True))
        conv = [info for step, info in pairs if step.op == "conv"]
        return WeightCounts(
            kept=sum(info.weights for _, info in pairs),
            dense=sum(info.dense_weights for _, info in pairs),
            conv_kept=sum(info.weights for info in conv),
            conv_dense=sum(info.dense_weights for info in conv),
            bytes=sum(tensor.nbytes for tensor in self.program.tensors.values()),
        )

    def summary(self) -> Summary:
        """Each step with its output, its weights, multiply-accumulates and bytes, and the totals, for one sample."""
        steps = tuple(
            StepSummary(
                s.op, s.name, i.shape, i.storage + " 8-bit" * is_narrow(s), i.weights, i.dense_weights, i.macs, i.bytes
            )
            for s, i in zip(self.program.steps, self._infos, strict=True)
        )
        return Summary(steps, self.weights, sum(step.macs for step in steps))

    def workspace_bytes(self, samples: int = 1) -> int:
        """Memory of the values of so many samples. Of a larger batch, every thread computes one part at a time."""
        return self._executor.workspace_bytes(samples)

    def profile(self, *inputs: Any, samples: int = 1, rounds: int = 20) -> Profile:
        """How long every step takes: medians over some runs, beside their speed and its share of the peak.

        Args:
            inputs: as for a call; random numbers when not given.
            samples: how many, when no inputs are given.
            rounds: how many runs.

        Raises:
            TypeError, ValueError: as for a call; no rounds.

        >>> import torch
        >>> engine = compile(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 16, 16))
        >>> [(step.op, step.macs) for step in engine.profile(rounds=2).steps]
        [('conv', 42336)]
        """
        if rounds < 1:
            raise ValueError(f"rounds must be 1 or more, got {rounds}")
        rng = np.random.default_rng(0)
        drawn = tuple(rng.standard_normal((samples, *given.shape), np.float32) for given in self.program.inputs)
        arrays = self._check_inputs(inputs or drawn)
        executor, threads = self._executor, self.threads
        executor.profile(arrays, 1)  # what is worked out once for this number of samples
        seconds = np.median(executor.profile(arrays, rounds), axis=0)
        peak, count = _core.peak_flops() * threads, len(arrays[0])
        infos = dict(zip((step.output for step in self.program.steps), self._infos, strict=True))
        steps = tuple(
            StepTime(
                " + ".join(step.op for step in made),
                made[0].name,
                infos[made[-1].output].shape,
                count * sum(infos[step.output].macs for step in made),
                float(time),
                peak,
            )
            for made, time in zip(executor.steps, seconds, strict=True)
        )
        return Profile(steps, count, threads, peak)

    def tune(self, samples: int = 1, *, seconds: float = 2.0, directory: str | Path | None = "") -> Tuning:
        """Measure in which way every layer is quickest on this machine, and compute it so from now on.

        Convolutions and linear layers can be computed in several ways, of which an engine takes those that it estimates
        to be quickest; results are then the same in every process. What is measured may be quicker, the more so the
        less this processor is like those that the estimate was made for. It holds for calls with so many samples;
        results may change by rounding. Winograd's algorithm is one of the ways. Another call with the same network on
        the same machine finds what was measured.

        Args:
            samples: in a call.
            seconds: that measuring takes, roughly; a large network takes longer, as every way is run some times.
            directory: where what was found is kept; "" for the user's cache directory, None to keep nothing.

        Raises:
            ValueError: no samples, or another number than the program's; seconds are negative or not finite.

        >>> import torch
        >>> engine = compile(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 16, 16), threads=1)
        >>> tuning = engine.tune(seconds=0.01, directory=None)
        >>> {"filters_in_lanes", "pixels_in_lanes", "winograd_tiles_in_lanes"} <= set(tuning.choices[0].seconds)
        True
        >>> tuning.after <= tuning.before
        True
        """
        from autocompress_fast.engine.machine import cache_directory
        from autocompress_fast.engine.tuning import Network, tuned

        if type(samples) is not int or samples < 1 or self.program.batch not in (None, samples):
            allowed = "1 or more" if self.program.batch is None else f"{self.program.batch}, as the program has it"
            raise ValueError(f"samples must be {allowed}, not {samples!r}")
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"seconds must be 0 or more, and finite, not {seconds!r}")
        place = None if directory is None else Path(directory) if directory else cache_directory()
        found = tuned(Network(self.program, self._infos, self.threads, self.precision, samples), seconds, place)
        self._ways[samples] = found.ways
        ways = {place: way for some in self._ways.values() for place, way in some.items()}
        self._executor = NativeExecutor(self.program, self._infos, self.threads, self.precision, ways)
        return found

    def __repr__(self) -> str:
        shapes = ", ".join(f"{given.name}: {given.shape}" for given in self.inputs)
        return f"Engine({shapes}; {len(self.program.steps)} steps, {self.weights.kept} weights)"


def compile(  # noqa: A001  the name users see is acf.compile
    model: torch.nn.Module,
    example_input: torch.Tensor | Sequence[torch.Tensor],
    *,
    threads: int | None = None,
    info: dict[str, Any] | None = None,
    precision: str = "float32",
) -> Engine:
    """Turn a torch model, compressed or dense, into an `Engine`.

    The model is read in eval mode and not changed. Normalisations are folded into the weights, and each weight is
    stored the smallest way: in full, as the columns and filters that are left, or as single values. The engine is
    then run on the example and compared with the model.

    Args:
        model: any model made of supported operators, or a `simulate`d one, whose program is taken as it is.
        example_input: a float32 tensor, or a sequence of them, that the model takes; the first dimension is the batch.
        threads: how many processors a call uses; default: those of torch.
        info: what `Engine.info` says at first.
        precision: "float32", or "bfloat16" to multiply such numbers where that is quicker (`Engine.precision`).

    Raises:
        TraceError: the model cannot be read as a graph of operators.
        UnsupportedError: it uses operators that the engine does not have; all of them are listed with their places.
        VerificationError: engine and model differ by more than 1e-4 of the largest output on the example.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> layers = torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    >>> net = torch.nn.Sequential(*layers)
    >>> engine = compile(net, torch.randn(1, 1, 8, 8))
    >>> engine(np.zeros((5, 1, 8, 8), np.float32)).shape
    (5, 2)
    >>> engine.weights.kept
    324
    """
    from autocompress_fast.engine.lower import lower, verify
    from autocompress_fast.engine.simulation import Simulation

    _precision(precision)
    if isinstance(model, Simulation):
        return model.engine(threads=threads, info=info, precision=precision)
    program = lower(model, example_input)
    engine = Engine(program, threads=threads, info=info)
    verify(engine, model, example_input)
    return engine if precision == "float32" else Engine(program, threads=threads, info=info, precision=precision)


def load(path: str | Path, *, threads: int | None = None, precision: str = "float32") -> Engine:
    """Read a file that `Engine.save` wrote. Needs neither torch nor the model's class and runs nothing from the file.

    Args:
        path: the file.
        threads: how many processors a call uses; default: torch's if it is loaded, else all of them.
        precision: "float32", or "bfloat16" to multiply such numbers where that is quicker (`Engine.precision`).

    Raises:
        FileFormatError: the file is not a valid program; the message names the file and the fault.
        OSError: the file cannot be opened.
    """
    threads, precision = _thread_count(threads), _precision(precision)
    program, _, info = read(path)
    try:
        return Engine(program, threads=threads, info=info, precision=precision)
    except ValueError as error:  # what the kernels cannot compute, or not in the memory allowed
        raise FileFormatError(f"{path}: {error}") from error


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return default_threads()
    if type(threads) is not int or not 1 <= threads <= 1024:
        raise ValueError(f"threads must be None or an integer from 1 to 1024, not {threads!r}")
    return threads


def _precision(precision: str) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    return precision


def _as_numpy(x: Any, name: str) -> FloatArray:
    torch = sys.modules.get("torch")
    is_tensor = torch is not None and isinstance(x, torch.Tensor)
    if not is_tensor and not isinstance(x, np.ndarray):
        raise TypeError(f"input {name!r} must be a numpy array or a torch tensor, not {type(x).__name__}")
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype != "float32":
        raise TypeError(
            f"input {name!r} must be float32, not {dtype}; convert it, and scale it as the network was trained"
        )
    array: FloatArray = x.detach().cpu().numpy() if is_tensor else x
    return array
