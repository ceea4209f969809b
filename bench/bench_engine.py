"""Whole networks: our engine, dense and pruned, beside the runtimes that people use.

    pytest bench/bench_engine.py                            groups: network, batch
    python bench/bench_engine.py --report docs/benchmarks-engine.md [--threads 1 2] [--only NAME ...]
    python bench/bench_engine.py --report docs/benchmarks-bfloat16.md --precision bfloat16 ...
    python bench/bench_engine.py --report docs/benchmarks-int8.md --precision int8 ...

All compute in float32; OpenVINO is told so, as its default on some CPUs is bfloat16. With --precision bfloat16 we,
OpenVINO and torch (weights and values in bfloat16) use that; the others have float32 alone. With --precision int8
weights and activations have 8 bits: onnxruntime and OpenVINO run what onnxruntime's own quantize_static makes of the
network (QDQ, a scale for every filter, U8S8), the others float32; all are calibrated with the same images. torch is
taken at its best of eager, channels_last, frozen (torch.jit, oneDNN) and, with --compile, torch.compile with constants
frozen, which takes a while for every network. The runtimes that are installed take part (`pip install onnx onnxruntime
openvino litert-torch ncnn pnnx`); LiteRT, which is XNNPACK here, is given images as NHWC; ncnn, with Winograd and in
float32, takes one image at a time. Every result is compared with torch's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import sys
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from measuring import conditions, interleaved, table
from torch import nn

import autocompress_fast as acf
from autocompress_fast import models
from autocompress_fast.engine.others import OTHERS, installed

Run = Callable[[], np.ndarray]
Shape = tuple[int, ...]

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


class CannotRunError(Exception):
    """A runtime lacks an operator of a network."""


def lenet_1998() -> nn.Module:
    """With 6 and 16 filters and layers of 120 and 84 features; ReLU and maximum pooling as people build it now."""
    convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()]
    linear = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *linear)


DENSE: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "LeNet-5, of 1998": (lenet_1998, (1, 28, 28)),
    "LeNet-5, of Caffe": (lambda: models.create("lenet5"), (1, 28, 28)),
    "ResNet-20 CIFAR": (lambda: models.create("resnet20"), CIFAR),
    "ResNet-18 CIFAR": (lambda: models.create("resnet18"), CIFAR),
    "VGG-16 CIFAR": (lambda: models.create("vgg16"), CIFAR),
    "MobileNetV2": (lambda: models.create("mobilenet_v2_imagenet"), IMAGENET),
    "ResNet-18": (lambda: models.create("resnet18_imagenet"), IMAGENET),
    "ResNet-50": (lambda: models.create("resnet50"), IMAGENET),
}
PRUNED = ("ResNet-18 CIFAR", "VGG-16 CIFAR")
# Shares of the filters removed: widths x 0.5, 0.25, 0.125; and odd ones: 31, 61, 123, 246 and 13, 26, 51, 102.
FILTERS = (0.5, 0.52, 0.75, 0.8, 0.875)
COLUMNS = (0.5, 0.75, 0.9)  # shares of the columns removed
TURN = 0.005  # seconds a turn takes at least, in as many calls
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 0.3}  # of the largest output
CALIBRATION = 16  # images


def randomised(model: nn.Module) -> nn.Module:
    """With statistics of normalisations as after training, so that nothing is a zero or a one by chance."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.running_mean, -0.1, 0.1), (module.running_var, 0.5, 1.5)):
                assert value is not None
                value.copy_(torch.empty_like(value).uniform_(low, high, generator=generator))
    return model.eval()


@functools.cache
def network(name: str) -> tuple[nn.Module, Shape]:
    """One of `names()`: a dense network, or one without a share of its filters or columns."""
    base, _, removed = name.partition(", -")
    make, shape = DENSE[base]
    torch.manual_seed(0)
    model = randomised(make())
    if removed:
        share, _, structure = removed.partition("% ")
        example = torch.zeros(1, *shape)
        report = acf.inspect(model, example)
        plan = acf.Plan.uniform(report, **{structure: float(share) / 100})
        model = acf.compact(model, plan, example, report=report).model
    return model, shape


def names() -> Iterator[str]:
    """All networks of the page."""
    for base in DENSE:
        yield base
        if base in PRUNED:
            yield from (f"{base}, -{100 * share:g}% filters" for share in FILTERS)
            yield from (f"{base}, -{100 * share:g}% columns" for share in COLUMNS)


# ---- runtimes


def ours(model: nn.Module, x: torch.Tensor, threads: int, precision: str = "float32") -> Run:
    """The engine."""
    wide = "float32" if precision == "int8" else precision
    engine, given = acf.compile(model, x[:1], threads=threads, precision=wide), x.numpy()
    if precision == "int8":
        engine = acf.quantize(engine, calibration(x))
    return lambda: engine(given)


def calibration(x: torch.Tensor) -> torch.Tensor:
    """Images like those of x, in 8 bits."""
    return torch.randn(CALIBRATION, *x.shape[1:], generator=torch.Generator().manual_seed(2))


def torch_eager(model: nn.Module, x: torch.Tensor, _threads: int) -> Run:
    """As it is."""
    return lambda: model(x).numpy()


def torch_channels_last(model: nn.Module, x: torch.Tensor, _threads: int) -> Run:
    """With images as NHWC."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: model(x).numpy()


def torch_frozen(model: nn.Module, x: torch.Tensor, _threads: int) -> Run:
    """Traced, with weights as constants, fused by oneDNN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, x)))
    return lambda: frozen(x).numpy()


def torch_compiled(model: nn.Module, x: torch.Tensor, _threads: int) -> Run:
    """By TorchInductor, with weights as constants."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(copy.deepcopy(model))
        with torch.no_grad():
            compiled(x)
    return lambda: compiled(x).numpy()


def as_onnx(model: nn.Module, x: torch.Tensor) -> bytes:
    """For the runtimes that read it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), buffer, dynamo=False)
    return buffer.getvalue()


def as_qdq(model: nn.Module, x: torch.Tensor) -> bytes:
    """Quantized by onnxruntime."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        def __init__(self, name: str) -> None:
            whole = calibration(x).repeat(-(-len(x) // CALIBRATION), 1, 1, 1)
            self.left = iter([{name: part.numpy()} for part in whole.split(len(x)) if len(part) == len(x)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        given, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "made"))
        given.write_bytes(as_onnx(model, x))
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        import onnx

        name = onnx.load(given).graph.input[0].name
        formats = {"quant_format": quantization.QuantFormat.QDQ, "activation_type": quantization.QuantType.QUInt8}
        formats |= {"weight_type": quantization.QuantType.QInt8, "per_channel": True}
        quantization.quantize_static(prepared, made, Images(name), **formats)
        return made.read_bytes()


def other(name: str, precision: str, model: nn.Module, x: torch.Tensor, threads: int) -> Run:
    """A runtime that reads ONNX."""
    onnx_model = as_qdq(model, x) if precision == "int8" else as_onnx(model, x)
    run, given = OTHERS[name](onnx_model, threads, "float32" if precision == "int8" else precision), [x.numpy()]
    return lambda: run(given)[0]


@functools.cache
def as_tflite(model: nn.Module, shape: Shape) -> bytes:
    """Converted from torch, with images as NHWC."""
    import litert_torch

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        path = Path(folder) / "model.tflite"
        litert_torch.convert(litert_torch.to_channel_last_io(model, args=[0]), (torch.zeros(shape),)).export(str(path))
        return path.read_bytes()


def litert(model: nn.Module, x: torch.Tensor, threads: int) -> Run:
    """With XNNPACK, its default."""
    from ai_edge_litert.interpreter import Interpreter

    array = x.permute(0, 2, 3, 1).contiguous().numpy()
    interpreter = Interpreter(model_content=as_tflite(model, array.shape), num_threads=threads)
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run() -> np.ndarray:
        interpreter.set_tensor(given["index"], array)
        interpreter.invoke()
        return interpreter.get_tensor(made["index"])

    return run


def ncnn(model: nn.Module, x: torch.Tensor, threads: int) -> Run:
    """Converted by pnnx."""
    import ncnn
    import pnnx

    network, image = ncnn.Net(), np.ascontiguousarray(x[0].numpy())
    network.opt.num_threads = threads
    for half in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(network.opt, f"use_{half}", False)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        named = nn.Sequential(OrderedDict(model=model))  # what it writes needs names that are not numbers
        pnnx.export(named, f"{folder}/model.pt", (x,))
        if network.load_param(f"{folder}/model.ncnn.param") or network.load_model(f"{folder}/model.ncnn.bin"):
            raise CannotRunError("ncnn does not have all operators")

    def run() -> np.ndarray:
        extractor = network.create_extractor()
        extractor.input("in0", ncnn.Mat(image))
        return np.array(extractor.extract("out0")[1])[None]

    return run


TORCH = {"torch eager": torch_eager, "torch channels_last": torch_channels_last, "torch frozen": torch_frozen}


def in_bfloat16(run: Callable[[nn.Module, torch.Tensor, int], Run]) -> Callable[[nn.Module, torch.Tensor, int], Run]:
    """One of torch's, with weights and values of that kind; the results are converted."""

    def make(model: nn.Module, x: torch.Tensor, threads: int) -> Run:
        class Converted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = copy.deepcopy(model).to(torch.bfloat16)

            def forward(self, given: torch.Tensor) -> torch.Tensor:
                return self.model(given.to(torch.bfloat16)).float()

        return run(Converted().eval(), x, threads)

    return make


def runtimes(precision: str, batch: int, compiled: bool) -> dict[str, Callable[[nn.Module, torch.Tensor, int], Run]]:
    """Ours and those that are installed."""
    more = {"litert": litert} if all(map(importlib.util.find_spec, ("litert_torch", "ai_edge_litert"))) else {}
    if batch == 1 and all(map(importlib.util.find_spec, ("ncnn", "pnnx"))):
        more["ncnn"] = ncnn
    own = TORCH | ({"torch compiled": torch_compiled} if compiled else {})
    if precision == "bfloat16":
        own = {title: in_bfloat16(run) for title, run in own.items()}
    others = {name: functools.partial(other, name, precision) for name in installed()}
    return {"ours": functools.partial(ours, precision=precision), **own, **others, **more}


def prepared(name: str, batch: int, threads: int, precision: str, compiled: bool) -> dict[str, Run]:
    """Every runtime, ready to run, its result checked."""
    model, shape = network(name)
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x).numpy()
    ready = {}
    for title, make in runtimes(precision, batch, compiled).items():
        try:
            run = make(model, x, threads)
        except CannotRunError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        with torch.no_grad():
            error = float(np.abs(run() - expected).max() / np.abs(expected).max())
        allowed = TOLERANCE[precision] * (10 if title == "ncnn" else 1)  # its Winograd takes larger tiles
        if title == "ncnn" and error > allowed:
            print(f"{name}: ncnn is left out, off by {error:.2g} of the largest output", file=sys.stderr)
            continue
        assert error <= allowed, f"{title} is off by {error:.2g} of the largest output on {name}"
        ready[title] = run
    return ready


# ---- pytest-benchmark: every network once, ours beside torch


@pytest.mark.parametrize("name", ["LeNet-5, of 1998", "ResNet-20 CIFAR", "ResNet-18 CIFAR, -87.5% filters"])
@pytest.mark.parametrize("runtime", ["ours", "torch eager"])
def test_whole_network(benchmark: Callable[[Run], np.ndarray], name: str, runtime: str) -> None:
    benchmark.group = f"{name}, batch 1"  # type: ignore[attr-defined]
    model, shape = network(name)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x).numpy()
        found = benchmark({"ours": ours, **TORCH}[runtime](model, x, 1))
    assert np.abs(found - expected).max() <= TOLERANCE["float32"] * np.abs(expected).max()


# ---- the page


ELSEWHERE = {
    "float32": "",
    "bfloat16": " (onnxruntime, litert and ncnn: float32)",
    "int8": " (torch, litert and ncnn: float32; onnxruntime and openvino: by onnxruntime's quantize_static, QDQ)",
}


def page(
    chosen: list[str],
    batches: list[int],
    threads: list[int],
    rounds: int,
    command: str,
    precision: str,
    compiled: bool,
    note: str,
) -> Iterator[str]:
    """Sections by threads and batch; the best of torch, and every other runtime."""
    yield f"# Whole networks{'' if precision == 'float32' else ', in ' + precision}\n"
    yield (
        f"Median of {rounds} rounds in which the runtimes take turns of {1e3 * TURN:.0f} ms or a call, after one that"
        f" does not count; milliseconds a call, {precision}{ELSEWHERE[precision]}.\n"
        "*against the best* is the fastest of the others on the same network divided by ours;\n"
        "*against dense* the fastest of the others on the dense network divided by ours. The pruned networks\n"
        "have the given share of their filters, or of the columns of every convolution, removed. Left empty: a\n"
        "runtime that lacks an operator, or is off by more than it may be.\n"
    )
    yield f"```\n{command}\n```\n\n{conditions(f'Weights random. {note}')}\n"
    for count, batch in itertools.product(threads, batches):
        torch.set_num_threads(count)
        titles = list(runtimes(precision, batch, compiled))
        torchs = [title for title in titles if title.startswith("torch")]
        others = [title for title in titles if title not in torchs and title != "ours"]
        rows, dense = [], 0.0
        for name in chosen:
            with torch.no_grad():
                times = interleaved(prepared(name, batch, count, precision, compiled), lambda: None, rounds, TURN)
            best_torch = min(times[title] for title in torchs)
            best = min(value for title, value in times.items() if title != "ours")
            dense = best if ", -" not in name else dense
            shown = [times["ours"], best_torch, *(times.get(title) for title in others)]
            milliseconds = ("" if value is None else f"{1e3 * value:.3g}" for value in shown)
            rows.append([name, *milliseconds, *(f"{value / times['ours']:.2f}x" for value in (best, dense))])
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
        yield f"## {count} thread{'s' if count > 1 else ''}, batch {batch}\n"
        header = ["network", "ours", "torch, best", *others, "against the best", "against dense"]
        yield table(header, rows) + "\n"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", type=Path, help="write the page here; to standard output if not given")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--note", default="", help="a sentence about the conditions, for the page")
    parser.add_argument("--precision", choices=TOLERANCE, default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--only", nargs="+", choices=list(names()), help="networks; all if not given")
    options = parser.parse_args()
    chosen = options.only or list(names())
    command = f"python {' '.join(sys.argv)}"
    text = "\n".join(
        page(
            chosen,
            options.batches,
            options.threads,
            options.rounds,
            command,
            options.precision,
            options.compile,
            options.note,
        )
    )
    if options.report:
        options.report.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
