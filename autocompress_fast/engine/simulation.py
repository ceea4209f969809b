"""A program as a torch module that can be trained, in which steps of 8 bits round as the engine does.

It is made of the engine, not of the model that was compiled: normalisations are already folded into the weights and
what was pruned is cut out, so that what is trained is what runs. Rounding has the gradient of the identity, and none
for what is cut off (straight-through estimation); scales and zero points stay as they were chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from autocompress_fast.engine import Engine
from autocompress_fast.engine.program import NARROW_MOST, Program, Step, is_narrow, rounds_residual, validate

__all__ = ["Simulation", "simulate"]

Shape = tuple[int, ...]
Attributes = Mapping[str, Any]
_Activation = Callable[[torch.Tensor], torch.Tensor]


def simulate(engine: Engine) -> Simulation:
    """A torch module that computes what the engine does and can be trained: for quantization-aware fine-tuning.

    Its parameters are the weights and biases of the program, as they are stored there, so what is pruned stays pruned.
    Inputs and weights of 8-bit steps, and residuals of 8 bits, are rounded on the way, to what the engine rounds them
    to. With gradients their sums are in float32, whose last bits may decide how the next layer rounds; in eval mode and
    without gradients they are exact, as in the engine. Train it in float32.

    Args:
        engine: such as `quantize` returns; steps in float32 are simulated, and trained, as well.

    Example:
        >>> import autocompress_fast as acf
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> x = torch.randn(100, 1, 8, 8)
        >>> simulation = acf.simulate(acf.quantize(acf.compile(net, x), x))
        >>> optimizer = torch.optim.SGD(simulation.parameters(), lr=1e-3)
        >>> loss = nn.functional.cross_entropy(simulation(x), torch.zeros(100, dtype=torch.long))
        >>> loss.backward()
        >>> optimizer.step()
        >>> engine = simulation.eval().engine()
        >>> with torch.no_grad():
        ...     bool((engine(x) == simulation(x)).all())
        True
    """
    return Simulation(engine.program, engine.info)


class Simulation(nn.Module):
    """What `simulate` makes; called as the engine is, with tensors.

    Attributes:
        steps: a module for each step of the program, in order.
        info: of the engine that is simulated.
    """

    def __init__(self, program: Program, info: dict[str, Any] | None = None) -> None:
        super().__init__()
        infos = validate(program)
        shapes = [given.shape for given in program.inputs] + [found.shape for found in infos]
        self._program, self.info = program, dict(info or {})
        self.steps = nn.ModuleList(_module(step, program.tensors, shapes) for step in program.steps)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """One tensor, or a tuple where the program has several outputs."""
        values = list(inputs)
        for step, module in zip(self._program.steps, self.steps, strict=True):
            values.append(module(*(values[value] for value in step.inputs)))
        outputs = tuple(values[value] for value in self._program.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def program(self) -> Program:
        """The program with the weights as they are now.

        Raises:
            ProgramError: weights that became NaN or infinite.
        """
        tensors = dict(self._program.tensors)
        for step, module in zip(self._program.steps, self.steps, strict=True):
            assert isinstance(module, _Module)
            tensors.update((step.tensors[role], array) for role, array in module.arrays().items())
        program = dataclasses.replace(self._program, tensors=tensors)
        validate(program)
        return program

    def engine(
        self, *, threads: int | None = None, info: dict[str, Any] | None = None, precision: str = "float32"
    ) -> Engine:
        """An engine with the weights as they are now, whose `info` is that of the one simulated, unless given."""
        return Engine(self.program(), threads=threads, info=self.info if info is None else info, precision=precision)


class _Module(nn.Module):
    """A step; tensors of float32 that are trained are parameters, by their roles."""

    def __init__(self, step: Step, tensors: Mapping[str, np.ndarray[Any, Any]], trained: Sequence[str]) -> None:
        super().__init__()
        self.step = step
        own = {role: torch.from_numpy(np.array(tensors[name])) for role, name in step.tensors.items()}
        self.trained = tuple(role for role in trained if role in own)
        for role, tensor in own.items():
            if role in self.trained:
                self.register_parameter(role, nn.Parameter(tensor.to(torch.float32)))
            else:
                kept = tensor if tensor.dtype == torch.float32 else tensor.to(torch.int64)
                self.register_buffer(role, kept, persistent=False)

    def tensor(self, role: str) -> torch.Tensor | None:
        found: torch.Tensor | None = getattr(self, role, None)
        return found

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """What is trained, as the program has it."""
        return {role: getattr(self, role).detach().cpu().numpy().copy() for role in self.trained}

    def extra_repr(self) -> str:
        return f"{self.step.op} {self.step.name}" + " 8-bit" * is_narrow(self.step)


class _Layer(_Module):
    """A convolution or a linear layer."""

    weight: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    places: torch.Tensor | None

    def __init__(self, step: Step, tensors: Mapping[str, np.ndarray[Any, Any]], shapes: Sequence[Shape]) -> None:
        super().__init__(step, tensors, ("weight", "values", "bias"))
        a, given = step.attributes, shapes[step.inputs[0]]
        self.activate: _Activation = _ACTIVATIONS[a["activation"]]
        self.narrow, filters = is_narrow(step), a["filters"]
        if step.op == "conv":
            self.form: Shape = (filters, given[0] // a["groups"], *a["kernel"])
        else:
            self.form = (filters, given[-1])
        columns = int(np.prod(self.form[1:]))
        places: np.ndarray[Any, Any] | None = None  # of the weights stored, in the whole one
        own = {role: tensors[name].astype(np.int64) for role, name in step.tensors.items() if role in _INDICES}
        if "offsets" in own:
            places = np.repeat(np.arange(filters), np.diff(own["offsets"])) * columns + own["indices"]
        elif own:
            rows, kept = own.get("filters", np.arange(filters)), own.get("columns", np.arange(columns))
            places = (rows[:, None] * columns + kept).ravel()
        self.register_buffer("places", None if places is None else torch.from_numpy(places), persistent=False)
        if self.narrow:
            self.register_buffer("zeros", torch.zeros(len(self.weight), dtype=torch.int32), persistent=False)
            with torch.no_grad():
                self.weight.mul_(self.scales[:, None])

    def rounded(self) -> torch.Tensor:
        """The weights as they are stored, on the 8-bit numbers of their filters."""
        return torch.fake_quantize_per_channel_affine(
            self.weight, self.scales, self.zeros, 0, -NARROW_MOST, NARROW_MOST
        )

    def integers(self) -> torch.Tensor:
        """The 8-bit weights as they are stored."""
        return torch.round(self.rounded() / self.scales[:, None])  # they are multiples

    def whole(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight written out in full."""
        if self.places is None:
            return stored.reshape(self.form)
        empty = stored.new_zeros(int(np.prod(self.form)))
        return empty.index_put((self.places,), stored.reshape(-1)).reshape(self.form)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.step.attributes
        if not self.narrow:
            stored = self.values if "values" in self.trained else self.weight
            return self.activate(self.product(x, self.whole(stored), self.tensor("bias")))
        scale, zero = float(np.float32(a["input_scale"])), a["input_zero"]
        if not (self.training or torch.is_grad_enabled()):
            return self.activate(self.exact(x, scale, zero))
        x = torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, 0, 255)
        return self.activate(self.product(x, self.whole(self.rounded()), self.tensor("bias")))

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        a = self.step.attributes
        if self.step.op == "linear":
            return functional.linear(x, weight, bias)
        top, bottom, left, right = a["padding"]
        around = (top, left)
        if (top, left) != (bottom, right):
            x, around = functional.pad(x, (left, right, top, bottom)), (0, 0)
        return functional.conv2d(x, weight, bias, a["stride"], around, a["dilation"], a["groups"])

    def exact(self, x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
        """As the engine: integers, whose sums are exact, then a product and a sum in float32."""
        integers = self.integers()
        largest = _MOST_INPUT * float(integers.abs().sum(dim=1).max()) if len(integers) else 0.0
        exact = torch.float32 if largest <= _EXACT else torch.float64  # the slower one, by much
        sums = self.product(_integers(x, scale, zero).to(exact), self.whole(integers).to(exact)).float()
        form = (-1,) if self.step.op == "linear" else (-1, 1, 1)
        factor = self.scales * float(np.float32(scale))
        kept = self.tensor("filters")
        if kept is not None:
            factor = factor.new_ones(self.form[0]).index_put((kept,), factor)
        y = sums * factor.reshape(form)
        bias = self.tensor("bias")
        return y if bias is None else y + bias.reshape(form)

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        found = super().arrays()
        if self.narrow:
            with torch.no_grad():
                integers = self.integers()
            found["weight"] = integers.cpu().numpy().astype(np.int8)
        return found


class _Operation(_Module):
    """Any other step."""

    def __init__(self, step: Step, tensors: Mapping[str, np.ndarray[Any, Any]], shapes: Sequence[Shape]) -> None:
        super().__init__(step, tensors, ("scale", "shift"))
        self.given: Shape = shapes[step.inputs[0]]
        self.activate: _Activation = _ACTIVATIONS[step.attributes.get("activation", "none")]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        if rounds_residual(self.step):
            inputs = (inputs[0], self.rounded(inputs[1]))
        return self.activate(_OPERATIONS[self.step.op](self, self.step.attributes, *inputs))

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to a convolution, on the 8-bit numbers that stand for it."""
        a = self.step.attributes
        scale, zero = float(np.float32(a["residual_scale"])), a["residual_zero"]
        if self.training or torch.is_grad_enabled():
            return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, 0, 255)
        return _integers(x, scale, zero) * scale


def _integers(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """The integers that stand for values, less their zero, as the engine finds them."""
    inverse = float(np.float32(1) / np.float32(scale))
    steps = torch.fmin(x.float() * inverse, x.new_tensor(2.0**16, dtype=torch.float32))
    return (torch.round(steps) + zero).clamp(0, 255) - zero


_MOST_INPUT: Final = 255  # of 8 bits, less their zero
_EXACT: Final = 2**24  # up to which float32 has all integers, and so all sums on the way, in any order
_INDICES: Final = ("filters", "columns", "indices", "offsets")


def _module(step: Step, tensors: Mapping[str, np.ndarray[Any, Any]], shapes: Sequence[Shape]) -> _Module:
    return (_Layer if step.op in ("conv", "linear") else _Operation)(step, tensors, shapes)


# --- what other operations compute ------------------------------------------------------------------------------------


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


_ACTIVATIONS: Final[Mapping[str, _Activation]] = {
    "none": _same,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": functional.hardsigmoid,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
}


def _max_pool(_: _Operation, a: Attributes, x: torch.Tensor) -> torch.Tensor:
    return functional.max_pool2d(x, a["kernel"], a["stride"], a["padding"], a["dilation"], a["ceil"])


def _avg_pool(_: _Operation, a: Attributes, x: torch.Tensor) -> torch.Tensor:
    return functional.avg_pool2d(x, a["kernel"], a["stride"], a["padding"], a["ceil"], a["count_padding"])


def _binary(module: _Operation, _: Attributes, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    constant = module.tensor("constant")
    if constant is not None:  # all dimensions of a sample, or the batch would be taken for one of them
        more = (constant.reshape((1,) * (len(module.given) - constant.ndim) + constant.shape),)
    made: torch.Tensor = getattr(torch, module.step.op)(x, *more)
    return made


def _layer_norm(module: _Operation, a: Attributes, x: torch.Tensor) -> torch.Tensor:
    form = module.given[len(module.given) - a["dims"] :]
    own = (module.tensor("scale"), module.tensor("shift"))
    scale, shift = (None if tensor is None else tensor.reshape(form) for tensor in own)
    return functional.layer_norm(x, form, scale, shift, a["epsilon"])


def _mean(_: _Operation, a: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.mean([axis + 1 for axis in a.get("axes", (1, 2))], a.get("keep", True))


def _norm(_: _Operation, a: Attributes, x: torch.Tensor) -> torch.Tensor:
    length: torch.Tensor = torch.linalg.vector_norm(x, dim=[axis + 1 for axis in a["axes"]], keepdim=a["keep"])
    return length


def _pad(_: _Operation, a: Attributes, x: torch.Tensor) -> torch.Tensor:
    around = [amount for pair in zip(a["before"], a["after"], strict=True) for amount in pair[::-1]]
    return functional.pad(x, around[::-1], value=a["value"])


def _slice(_: _Operation, a: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x[(slice(None),) * (a["axis"] + 1) + (slice(a["start"], a["stop"], a["step"]),)]


def _take(module: _Operation, a: Attributes, x: torch.Tensor) -> torch.Tensor:
    indices = module.tensor("indices")
    assert indices is not None
    return x.index_select(a["axis"] + 1, indices)


def _attention(_: _Operation, a: Attributes, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, scale=a["scale"])


_OPERATIONS: Final[Mapping[str, Callable[..., torch.Tensor]]] = {
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": lambda _, a, x: functional.adaptive_avg_pool2d(x, a["output"]),
    **dict.fromkeys(("global_avg_pool", "mean"), _mean),
    **dict.fromkeys(("add", "sub", "mul", "div"), _binary),
    "activation": lambda _, __, x: x,
    "leaky_relu": lambda _, a, x: functional.leaky_relu(x, a["slope"]),
    "clip": lambda _, a, x: x.clamp(a["low"], a["high"]),
    "softmax": lambda _, a, x: x.softmax(a["axis"] + 1),
    "log_softmax": lambda _, a, x: x.log_softmax(a["axis"] + 1),
    "layer_norm": _layer_norm,
    "matmul": lambda _, __, x, y: x @ y,
    "attention": _attention,
    "norm": _norm,
    "concat": lambda _, a, *inputs: torch.cat(inputs, a["axis"] + 1),
    "reshape": lambda _, a, x: x.reshape(len(x), *a["shape"]),
    "transpose": lambda _, a, x: x.permute(0, *(axis + 1 for axis in a["order"])),
    "pad": _pad,
    "slice": _slice,
    "take": _take,
}
