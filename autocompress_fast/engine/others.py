"""Other runtimes, to be measured beside the engine; each takes part when it is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Final

import numpy as np

__all__ = ["OTHERS", "Run", "installed"]

Array = np.ndarray[Any, Any]
Run = Callable[[Sequence[Array]], list[Array]]


def installed() -> list[str]:
    """Those of `OTHERS` that can be used: they read ONNX models, so the package onnx must be there too."""
    return [name for name in OTHERS if find_spec(name) and find_spec("onnx")]


def _onnxruntime(model: bytes, threads: int, precision: str) -> Run:
    """With all of its optimisations; in float32 always."""
    import onnxruntime

    del precision
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda inputs: list(session.run(None, dict(zip(names, inputs, strict=True))))


def _openvino(model: bytes, threads: int, precision: str) -> Run:
    """In the precision that is asked for, which is not its default everywhere, and tuned for latency."""
    import openvino

    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    hints = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model, b""), "CPU", hints)
    request = compiled.create_infer_request()

    def run(inputs: Sequence[Array]) -> list[Array]:
        request.infer(list(inputs), share_inputs=True)
        return [np.array(output.data) for output in request.output_tensors]

    return run


OTHERS: Final[Mapping[str, Callable[[bytes, int, str], Run]]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
"""Name -> how an ONNX model is made ready to run on so many threads in a precision of `Engine`."""
