"""Programs run by the compiled kernels and by numpy: the same, whatever lay in the memory before."""

import random
import threading

import numpy as np
import pytest

from autocompress_fast.engine import native
from autocompress_fast.engine.native import NativeExecutor
from autocompress_fast.engine.program import Input, Program, Step, validate
from autocompress_fast.engine.reference import Reference

every_isa = pytest.mark.usefixtures("isa")


class Drawn:
    """A program of random steps, most of them on images, whose values are read more than once and in any order."""

    def __init__(self, seed: int) -> None:
        self.draw, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.inputs = tuple(
            Input(f"x{i}", (self.draw.randint(1, 5), self.draw.randint(3, 9), self.draw.randint(3, 17)))
            for i in range(self.draw.randint(1, 2))
        )
        self.shapes = [given.shape for given in self.inputs]
        self.steps: list[Step] = []
        self.tensors: dict[str, np.ndarray] = {}
        makers = [
            self.conv,
            self.conv,
            self.conv,
            self.expansion,
            self.add,
            self.add,
            self.gate,
            self.pool,
            self.concat,
            self.flat,
            self.attention,
        ]
        for _ in range(self.draw.randint(4, 20)):
            self.draw.choice(makers)()
        some = self.draw.sample(range(len(self.shapes)), min(3, len(self.shapes)))
        outputs = (*some, len(self.shapes) - 1)
        self.program = Program(self.inputs, tuple(self.steps), outputs, self.tensors)
        self.infos = validate(self.program)

    def samples(self, count: int) -> list[np.ndarray]:
        return [self.rng.standard_normal((count, *given.shape), np.float32) for given in self.inputs]

    def step(self, op, inputs, attributes, tensors=None) -> None:
        number = len(self.shapes)
        names = {role: f"{number}.{role}" for role in tensors or {}}
        self.tensors |= {names[role]: value for role, value in (tensors or {}).items()}
        made = Step(op, tuple(inputs), number, attributes, names)
        infos = validate(Program(self.inputs, (*self.steps, made), (number,), self.tensors))
        self.steps.append(made)
        self.shapes.append(infos[-1].shape)

    def image(self) -> int:
        return self.draw.choice([i for i, shape in enumerate(self.shapes) if len(shape) == 3])

    def activation(self) -> dict[str, str]:
        return {"activation": self.draw.choice(["none", "none", "relu", "silu", "hardsigmoid", "tanh"])}

    def expansion(self) -> None:
        x = self.image()
        one = {"kernel": (1, 1), "stride": (1, 1), "padding": (0,) * 4, "dilation": (1, 1)}
        filters, stride = self.draw.randint(2, 9), self.draw.randint(1, 2)
        three = {"kernel": (3, 3), "stride": (stride, stride), "padding": (1,) * 4, "dilation": (1, 1)}
        for shape, window, groups in (((filters, self.shapes[x][0]), one, 1), ((filters, 9), three, filters)):
            tensors = {"weight": self.rng.standard_normal(shape, np.float32), "bias": np.ones(filters, np.float32)}
            attributes = {**window, "groups": groups, "filters": filters, "storage": "dense", **self.activation()}
            self.step("conv", [x], attributes, tensors)
            x = len(self.shapes) - 1

    def conv(self) -> None:
        x = self.image()
        channels, height, width = self.shapes[x]
        kernel = (self.draw.randint(1, min(3, height)), self.draw.randint(1, min(5, width)))
        same = self.draw.random() < 0.6
        padding = (
            (kernel[0] // 2, (kernel[0] - 1) // 2, kernel[1] // 2, (kernel[1] - 1) // 2)
            if same
            else tuple(self.draw.randint(0, 2) for _ in range(4))
        )
        stride = (1, 1) if same else (self.draw.randint(1, 2), self.draw.randint(1, 2))
        filters = channels if self.draw.random() < 0.4 else self.draw.randint(1, 20)
        storage = self.draw.choice(["dense", "columns", "sparse"])
        width = channels * kernel[0] * kernel[1]
        weight = self.rng.standard_normal((filters, width), np.float32) / np.float32(width**0.5)
        attributes = {
            "kernel": kernel, "stride": stride, "padding": padding, "dilation": (1, 1), "groups": 1,
            "filters": filters, "storage": storage, **self.activation(),
        }  # fmt: skip
        self.step("conv", [x], attributes, stored(storage, weight, self.rng))

    def add(self) -> None:
        pairs = [(a, b) for a in range(len(self.shapes)) for b in range(a) if self.shapes[a] == self.shapes[b]]
        if pairs:
            pair = list(self.draw.choice(pairs))
            self.draw.shuffle(pair)
            self.step("add", pair, self.activation())

    def gate(self) -> None:
        x = self.image()
        self.step("mean", [x], {"axes": (1, 2), "keep": True})
        self.step(self.draw.choice(["mul", "sub"]), [x, len(self.shapes) - 1], self.activation())

    def pool(self) -> None:
        x = self.image()
        kernel = tuple(self.draw.randint(1, min(3, size)) for size in self.shapes[x][1:])
        attributes = {
            "kernel": kernel, "stride": (self.draw.randint(1, 3), self.draw.randint(1, 3)),
            "padding": tuple(k // 2 for k in kernel), "ceil": self.draw.random() < 0.5,
        }  # fmt: skip
        if self.draw.random() < 0.5:
            self.step("max_pool", [x], attributes | {"dilation": (1, 1)})
        else:
            self.step("avg_pool", [x], attributes | {"count_padding": self.draw.random() < 0.5})

    def concat(self) -> None:
        x = self.image()
        others = [i for i, shape in enumerate(self.shapes) if len(shape) == 3 and shape[1:] == self.shapes[x][1:]]
        self.step("concat", self.draw.choices(others, k=self.draw.randint(1, 3)), {"axis": 0})

    def attention(self) -> None:
        x = self.image()
        self.step("activation", [x], {"activation": "tanh"})
        x = len(self.shapes) - 1
        values = [i for i, shape in enumerate(self.shapes) if shape[:2] == self.shapes[x][:2] and len(shape) == 3]
        self.step("attention", [x, x, self.draw.choice(values)], {"scale": self.draw.uniform(-1, 1)})
        self.step("norm", [x], {"axes": (1,), "keep": True})

    def flat(self) -> None:
        x = self.image()
        size = int(np.prod(self.shapes[x]))
        self.step("reshape", [x], {"shape": (size,)})
        storage = self.draw.choice(["dense", "sparse"])
        weight = self.rng.standard_normal((7, size), np.float32) / np.float32(size**0.5)
        attributes = {"filters": 7, "storage": storage, **self.activation()}
        self.step("linear", [len(self.shapes) - 1], attributes, stored(storage, weight, self.rng))


def stored(storage: str, weight: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    filters, width = weight.shape
    tensors = {"bias": rng.standard_normal(filters, np.float32)}
    if storage == "dense":
        return tensors | {"weight": weight}
    if storage == "columns":
        rows = np.sort(rng.choice(filters, rng.integers(1, filters + 1), replace=False)).astype(np.uint16)
        columns = np.sort(rng.choice(width, rng.integers(1, width + 1), replace=False)).astype(np.uint16)
        kept = {"filters": rows, "columns": columns}
        return tensors | kept | {"weight": np.ascontiguousarray(weight[np.ix_(rows, columns)])}
    mask = rng.random(weight.shape) < rng.choice([0.005, 0.1, 0.5])
    offsets = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.uint32)
    return tensors | {"values": weight[mask], "indices": np.nonzero(mask)[1].astype(np.uint16), "offsets": offsets}


def assert_close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for y, wanted in zip(found, expected, strict=True):
        assert y.shape == wanted.shape
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, wanted, rtol=0, atol=2e-5 * max(1.0, float(np.abs(wanted).max(initial=0))))


@every_isa
@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed, monkeypatch):
    monkeypatch.setattr(native, "LEAST_EXPANSION", 200)  # bytes, of some of them
    drawn = Drawn(seed)
    executor = NativeExecutor(drawn.program, drawn.infos, 1)
    reference = Reference(drawn.program, drawn.infos)
    for count in (2, 1, 2, 5, 2):  # what lies in the memory is from the run before
        inputs = drawn.samples(count)
        assert_close(executor.run(inputs), reference.run(inputs))


@every_isa
@pytest.mark.parametrize("values", [(-0.25, 0.25), (-0.5, 0.0, 0.5), (-1.0, -0.5, 0.5, 1.0)])
@pytest.mark.parametrize("samples", [1, 3])
def test_weights_of_few_values_give_the_bits_of_any_others(values, samples):
    rng = np.random.default_rng(samples)
    threads = 1 + samples % 2
    few = rng.choice(np.float32(values), (256, 256 * 9)).astype(np.float32)
    any_other = rng.standard_normal((16, 256 * 9)).astype(np.float32)  # filters that no codes stand for
    window = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
    x, found = rng.standard_normal((samples, 256, 7, 7)).astype(np.float32), []
    for weight in (few, np.concatenate([few, any_other])):
        attributes = {**window, "filters": len(weight), "storage": "dense", "activation": "none"}
        step = Step("conv", (0,), 1, attributes, {"weight": "w"})
        program = Program((Input("x", x.shape[1:]),), (step,), (1,), {"w": weight})
        infos = validate(program)
        found.append(NativeExecutor(program, infos, threads).run([x])[0])
        assert_close(found[-1:], Reference(program, infos).run([x]))
    assert np.array_equal(found[0], found[1][:, :256])


@pytest.mark.parametrize("seed", range(1000, 1010))
def test_threads_do_not_change_the_result(seed):
    drawn = Drawn(seed)
    inputs = drawn.samples(6)
    one, three = (NativeExecutor(drawn.program, drawn.infos, threads).run(inputs) for threads in (1, 3))
    for y, z in zip(one, three, strict=True):
        assert np.array_equal(y, z)


@every_isa
@pytest.mark.parametrize("seed", range(2000, 2030))
def test_stages_compute_what_the_whole_does(seed, monkeypatch):
    monkeypatch.setattr(native, "CACHE", 2000)  # bytes: so that values of most steps do not fit
    monkeypatch.setattr(native, "BEGINNING", 0)
    monkeypatch.setattr(native, "LEAST_GAIN", 100.0)  # of a loss, even
    drawn = Drawn(seed)
    executors = [NativeExecutor(drawn.program, drawn.infos, threads) for threads in (1, 3)]
    reference = Reference(drawn.program, drawn.infos)
    for count in (5, 17, 5):
        inputs = drawn.samples(count)
        found, other = (executor.run(inputs) for executor in executors)
        assert_close(found, reference.run(inputs))
        assert all(np.array_equal(y, z) for y, z in zip(found, other, strict=True))
        assert executors[0].profile(inputs, 2).shape == (2, len(executors[0].steps))
        assert executors[0].workspace_bytes(count) > 0


def test_large_values_and_large_weights_have_stages_of_their_own():
    rng = np.random.default_rng(0)

    def conv(channels, filters, number, stride):
        window = {"kernel": (3, 3), "stride": (stride, stride), "padding": (1, 1, 1, 1), "dilation": (1, 1)}
        attributes = {**window, "groups": 1, "filters": filters, "storage": "dense", "activation": "relu"}
        tensors[f"w{number}"] = rng.standard_normal((filters, 9 * channels), np.float32) / (9 * channels) ** 0.5
        return Step("conv", (number,), number + 1, attributes, {"weight": f"w{number}"})

    tensors: dict[str, np.ndarray] = {}
    steps = [conv(3, 32, 0, 1), conv(32, 32, 1, 1), conv(32, 32, 2, 1), conv(32, 256, 3, 8), conv(256, 256, 4, 2)]
    program = Program((Input("x", (3, 48, 48)),), tuple(steps), (5,), tensors)
    infos = validate(program)
    executor = NativeExecutor(program, infos, 1)
    early, late = executor.stages(32)
    assert early.part < late.part == 32
    assert len(early.inputs) == len(early.outputs) == len(late.inputs) == len(late.outputs) == 1
    assert len(executor.stages(1)) == len(executor.stages(native.FEW_SAMPLES)) == 1
    assert executor.stages(31)[0].network is early.network  # with its workspaces
    x = rng.standard_normal((32, 3, 48, 48), np.float32)
    assert_close(executor.run([x]), Reference(program, infos).run([x]))


def test_several_callers_at_once():
    drawn = Drawn(7)
    native = NativeExecutor(drawn.program, drawn.infos, 2)
    given = [drawn.samples(1 + i % 3) for i in range(6)]
    expected = [native.run(inputs) for inputs in given]
    found: list[list[list[np.ndarray]]] = [[] for _ in given]

    def call(i: int) -> None:
        found[i] = [native.run(given[i]) for _ in range(20)]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(given))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for results, wanted in zip(found, expected, strict=True):
        assert len(results) == 20
        for result in results:
            assert all(np.array_equal(y, z) for y, z in zip(result, wanted, strict=True))


@every_isa
@pytest.mark.parametrize("op", ["max_pool", "add", "activation"])
def test_nan_stays_nan(op):
    attributes = {
        "max_pool": {"kernel": (2, 2), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "ceil": False},
        "add": {"activation": "relu"},
        "activation": {"activation": "relu6"},
    }[op]
    inputs = (0, 0) if op == "add" else (0,)
    program = Program((Input("x", (1, 9, 40)),), (Step(op, inputs, 1, attributes),), (1,), {})
    x = np.random.default_rng(0).standard_normal((1, 1, 9, 40), np.float32)
    x[0, 0, ::3, ::5] = np.nan
    infos = validate(program)
    (found,), (wanted,) = NativeExecutor(program, infos, 1).run([x]), Reference(program, infos).run([x])
    assert 0 < np.isnan(wanted).sum() < wanted.size
    assert np.array_equal(found, wanted, equal_nan=True)
