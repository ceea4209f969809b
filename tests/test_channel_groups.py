"""Which channels live and die together, construct by construct, and that cutting half of them out is exact.

Every expectation is written down by hand, from what the operators mean. A group reads "filters > channels | tied":
``"a:0 b:0-3 > head:0,4 | bn:0"`` is filter 0 of layer `a`, filters 0 to 3 of `b`, input channels 0 and 4 of `head` and
entry 0 of every parameter and buffer of `bn`.
"""

import copy
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_flatten

from autocompress_fast.compact import Compacted, compact
from autocompress_fast.graph import Report, inspect
from autocompress_fast.plan import LayerPlan, Plan, mask

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE = (3, 8, 8)
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}


# Networks


def net(forward: Callable[..., object], **parts: nn.Module | nn.Parameter | nn.Buffer) -> nn.Module:
    """A network of these parts with this forward."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    Net.forward = forward
    return Net()


def seq(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def conv(channels: int, filters: int, size: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, size, **{"padding": size // 2, **options})


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def randomise(model: nn.Module) -> None:
    """Random statistics, scales, shifts and parameters of the network's own; layers keep their random weights."""
    layers = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
    for module in model.modules():
        if isinstance(module, layers) or parametrize.is_parametrized(module):
            continue
        if isinstance(module, (parametrize.ParametrizationList, nn.RNNBase, nn.MultiheadAttention)):
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_floating_point() or isinstance(module, parametrizations._SpectralNorm):
                continue
            if name.endswith("var"):
                tensor.data.uniform_(0.5, 2.0)
            else:
                tensor.data.normal_()


# Expected and found groups, as texts


def parse(text: str) -> str:
    """The same group in normal form."""
    left, _, tied = text.partition("|")
    filters, _, channels = left.partition(">")
    return render(*(dict(map(entry, part.split())) for part in (filters, channels, tied)))


def entry(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, indices = text.partition(":")
    found: list[int] = []
    for part in indices.split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return name, tuple(sorted(found))


def render(
    filters: Mapping[str, Iterable[int]], channels: Mapping[str, Iterable[int]], tied: Mapping[str, object]
) -> str:
    parts = [
        " ".join(f"{name}:{','.join(str(int(i)) for i in sorted(indices))}" for name, indices in sorted(part.items()))
        for part in (filters, channels, tied)
    ]
    return f"{parts[0]} > {parts[1]} | {parts[2]}"


def modules_of(tied: Mapping[str, tuple[int, ...]], model: nn.Module, layers: set[str]) -> dict[str, tuple[int, ...]]:
    """Entries of all parameters and buffers of a module, at the same indices, as one of the module."""
    found = dict(tied)
    for module in {name.rpartition(".")[0] for name in tied} - {""}:
        if any(module == layer or module.startswith(f"{layer}.") for layer in layers):  # what computes its weight
            names = [name for name in tied if name.startswith(f"{module}.")]
        else:
            state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            names = [name for name, x in state.items() if name.startswith(f"{module}.") and x.ndim]
            if len({tuple(tied.get(name, ())) for name in names}) > 1:
                continue
            found[module] = tied[names[0]]
        for name in names:
            found.pop(name, None)
    return found


def check(
    model: nn.Module,
    free: set[str],
    frozen: Mapping[str, str] | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    inputs: tuple[torch.Tensor, ...] | None = None,
    at_least: bool = False,
    cut: bool | None = None,
) -> Compacted:
    """The network has these free groups, these filters are frozen, and compaction by half is exact.

    Args:
        model: the network.
        free: all groups that can be cut; with `at_least`, some of them.
        frozen: layer, or layer:filters, -> pattern of the reason. Layers called head, the last ones, need no mention.
        shape: of the input without the batch; that of a small image when not given.
        inputs: the whole input, when it is not one random tensor.
        at_least: other groups may be free or frozen.
        cut: whether half of the filters must really be gone; by default, when groups are free.
    """
    torch.manual_seed(0)
    randomise(model)
    inputs = inputs or (torch.randn(2, *(shape or IMAGE)),)
    dtype = dtype_for(model)
    model, inputs = copy.deepcopy(model).to(dtype), cast(inputs, dtype)
    report = inspect(model, inputs)
    check_groups(report, model, free, frozen or {}, at_least)
    small = check_exact(model, inputs, report, dtype)
    plan = Plan.uniform(report, filters=0.5)
    shapes = {layer.name: (layer.shape, small.plan[layer.name].shape) for layer in report.layers}
    if not free and not at_least:
        assert all(before == after for before, after in shapes.values())
    elif cut or cut is None:
        names = {name for text in free for name, _ in map(entry, text.partition(">")[0].partition("|")[0].split())}
        assert sum(plan[name].filters.sum() for name in names) < sum(shapes[name][0][0] for name in names)
        for name in names:
            assert shapes[name][1][0] <= plan[name].filters.sum(), name
        assert small.plan.dense_weights < plan.dense_weights
        assert count(small.model) < count(mask(model, plan))
    return small


def check_groups(report: Report, model: nn.Module, free: set[str], frozen: Mapping[str, str], at_least: bool) -> None:
    layers = {layer.name: layer for layer in report.layers}
    sizes = {
        "filters": {name: layer.shape[0] for name, layer in layers.items()},
        "channels": {name: layer.shape[1] * layer.groups for name, layer in layers.items()},
    }
    for what, expected in sizes.items():
        seen = [(name, int(i)) for group in report.groups for name, ids in getattr(group, what).items() for i in ids]
        assert len(seen) == len(set(seen)), f"{what} in two groups"
        assert all(0 <= i < expected[name] for name, i in seen)
        if what == "filters":
            assert set(seen) == {(name, i) for name, size in expected.items() for i in range(size)}

    found = {
        render(group.filters, group.channels, modules_of(group.tied, model, set(layers)))
        for group in report.groups
        if not group.frozen and group.filters
    }
    wanted = set(map(parse, free))
    if not at_least:
        assert found == wanted, differences(found, wanted, report)
    assert found >= wanted, differences(found, wanted, report)

    reasons = {
        (name, int(i)): group.frozen
        for group in report.groups
        if group.frozen
        for name, indices in group.filters.items()
        for i in indices
    }
    patterns = {name: "output" for name in layers if name.startswith("head") and name not in frozen} | dict(frozen)
    expected_frozen = {}
    for text, pattern in patterns.items():
        name, indices = entry(text) if ":" in text else (text, range(layers[text].shape[0]))
        expected_frozen |= {(name, i): pattern for i in indices}
        if len(indices) == layers[name].shape[0]:
            assert re.search(pattern, report.frozen[name]), report.frozen[name]
    if not at_least:
        assert set(reasons) == set(expected_frozen)
    for key, pattern in expected_frozen.items():
        assert re.search(pattern, reasons[key]), f"{key}: {reasons[key]}"


def differences(found: set[str], wanted: set[str], report: Report) -> str:
    lines = [
        *(f"missing: {text}" for text in sorted(wanted - found)),
        *(f"extra:   {text}" for text in sorted(found - wanted)),
        *(f"frozen:  {dict(group.filters)}: {group.frozen}" for group in report.groups if group.frozen),
    ]
    return "\n".join(lines)


def dtype_for(model: nn.Module) -> torch.dtype:
    """Every other network is compacted in float32, where `compact` compares in float64 first, the others in float64."""
    return list(TOLERANCES)[zlib.crc32(repr(model).encode()) % 2]


def check_exact(model: nn.Module, inputs: tuple[torch.Tensor, ...], report: Report, dtype: torch.dtype) -> Compacted:
    plan = Plan.uniform(report, filters=0.5)
    for group in report.groups:
        kept = {bool(plan[name].filters[i]) for name, indices in group.filters.items() for i in indices}
        assert len(kept) <= 1, f"a part of a group is dropped: {group}"
        assert not group.frozen or False not in kept, f"a frozen group is dropped: {group}"
    before = snapshot(model)
    small = compact(model, plan, inputs, report=report)  # to read it anew takes longest
    masked = mask(model, plan).eval()
    assert same(before, snapshot(model)), "the given model was changed"
    assert small.kind in ("module", "graph")
    assert bool(small.reason) == (small.kind == "graph")
    assert small.kind == "graph" or type(small.model) is type(model)
    fresh = tuple(torch.randn(3, *x.shape[1:], dtype=dtype) if x.is_floating_point() else x.flip(-1) for x in inputs)
    for arguments in (inputs, fresh):
        with torch.no_grad():
            (expected, structure), (got, as_before) = (
                tree_flatten(masked(*arguments)),
                tree_flatten(small.model.eval()(*arguments)),
            )
        assert structure == as_before
        for one, other in zip(expected, got, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(
                other, one, rtol=0, atol=TOLERANCES[dtype] * float(one.abs().max().nan_to_num()), equal_nan=True
            )
    return small


def cast(inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def snapshot(model: nn.Module) -> dict[str, object]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: x.detach().clone() for name, x in tensors.items()} | {
        f"{name}()": (repr(module), module.training) for name, module in model.named_modules()
    }


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(x, other[name]) if isinstance(x, torch.Tensor) else x == other[name] for name, x in one.items()
    )


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Chains


def test_a_chain_with_batch_normalisation():
    model = seq(a=conv(3, 8, bias=False), bn=nn.BatchNorm2d(8), act=nn.ReLU(), drop=nn.Dropout2d(), head=conv(8, 4))
    small = check(model, {f"a:{i} > head:{i} | bn:{i}" for i in range(8)})
    assert small.kind == "module"
    assert small.model.a.weight.shape == (4, 3, 3, 3)
    assert small.model.bn.running_var.shape == (4,)
    assert small.model.head.weight.shape == (4, 4, 3, 3)


def test_the_groups_come_in_the_order_of_their_first_filters():
    model = seq(a=conv(3, 4), bn=nn.BatchNorm2d(4), b=conv(4, 6), act=nn.ReLU(), head=conv(6, 2))
    report = inspect(model, torch.zeros(1, *IMAGE))
    first = [next(iter(group.filters.items())) for group in report.groups if group.filters and not group.frozen]
    assert first == [*(("a", (i,)) for i in range(4)), *(("b", (i,)) for i in range(6))]
    assert list(report.frozen) == ["head"]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.InstanceNorm2d(8, affine=True),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.GroupNorm(8, 8),
    ],
    ids=str,
)
def test_normalisations_of_every_channel_by_itself(norm):
    keeps_constants = getattr(norm, "affine", True)  # without a shift to zero, zero comes out as something else
    free = {f"a:{i} > head:{i} | norm:{i}" for i in range(8)}
    check(seq(a=conv(3, 8), norm=norm, head=conv(8, 4)), free, cut=keeps_constants)


def test_instance_normalisation_without_parameters():
    check(seq(a=conv(3, 8), norm=nn.InstanceNorm2d(8), head=conv(8, 4)), {f"a:{i} > head:{i}" for i in range(8)})


def test_sequences_in_sequences():
    model = nn.Sequential(
        nn.Sequential(conv(3, 8), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True))),
        nn.Sequential(nn.Sequential(conv(8, 6)), nn.Identity()),
        conv(6, 4),
    )
    free = {f"0.0:{i} > 1.0.0:{i} | 0.1.0:{i}" for i in range(8)} | {f"1.0.0:{i} > 2:{i}" for i in range(6)}
    check(model, free, {"2": "output"})


@pytest.mark.parametrize(
    "between",
    [
        nn.MaxPool2d(2),
        nn.AvgPool2d(3, 2, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveMaxPool2d(2),
        nn.LPPool2d(2, 2),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample((5, 5), mode="bicubic"),
        nn.ReflectionPad2d(1),
        nn.ZeroPad2d((1, 0, 2, 0)),
        nn.Hardswish(),
        nn.Softmax(dim=-1),
        nn.LeakyReLU(inplace=True),
        nn.PReLU(),
        nn.LayerNorm(8),  # over the width, which happens to be as long as there are channels
        nn.LayerNorm((8, 8)),
    ],
    ids=str,
)
def test_what_keeps_channels_apart(between):
    keeps_constants = not isinstance(between, (nn.Softmax, nn.LayerNorm))  # zero comes out as something else there
    free = {f"a:{i} > head:{i}" for i in range(8)}
    check(seq(a=conv(3, 8), between=between, head=conv(8, 4)), free, cut=keeps_constants)


def test_interpolation_to_the_size_of_another():
    def forward(m, x):
        large = m.a(x)
        return m.head(large + F.interpolate(m.b(F.max_pool2d(x, 2)), size=large.shape[-2:], mode="nearest"))

    model = net(forward, a=conv(3, 8), b=conv(3, 8), head=conv(8, 4))
    assert check(model, {f"a:{i} b:{i} > head:{i}" for i in range(8)}).kind == "module"


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d, nn.BatchNorm1d, (3, 12)),
        (nn.Conv3d, nn.BatchNorm3d, (3, 5, 5, 5)),
        (nn.ConvTranspose1d, nn.BatchNorm1d, (3, 6)),
        (nn.ConvTranspose2d, nn.BatchNorm2d, (3, 4, 4)),
        (nn.ConvTranspose3d, nn.BatchNorm3d, (3, 3, 3, 3)),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_layers_of_every_dimension(layer, norm, shape):
    model = seq(a=layer(3, 8, 3), norm=norm(8), act=nn.ReLU(), b=layer(8, 6, 2), head=layer(6, 4, 1))
    free = {f"a:{i} > b:{i} | norm:{i}" for i in range(8)} | {f"b:{i} > head:{i}" for i in range(6)}
    check(model, free, shape=shape)


def test_linear_layers():
    model = seq(a=nn.Linear(5, 8), norm=nn.BatchNorm1d(8), act=nn.ReLU(), b=nn.Linear(8, 6), head=nn.Linear(6, 4))
    free = {f"a:{i} > b:{i} | norm:{i}" for i in range(8)} | {f"b:{i} > head:{i}" for i in range(6)}
    check(model, free, shape=(5,))


def test_linear_layers_on_every_position():
    model = seq(a=nn.Linear(5, 8), act=nn.GELU(), head=nn.Linear(8, 4))
    check(model, {f"a:{i} > head:{i}" for i in range(8)}, shape=(7, 5))


def test_one_layer():
    check(seq(head=conv(3, 4)), set())


# Additions and other operators of several tensors


def residual(m, x):
    x = m.a(x)
    return m.head(x + m.b(x))


def residual_in_place(m, x):
    x = m.a(x)
    x += m.b(x)
    return m.head(x)


def residual_into_the_branch(m, x):
    x = m.a(x)
    return m.head(m.b(x).add_(x))


def residual_through_two_names(m, x):
    y = m.a(x)
    seen = y
    y += m.b(seen)
    return m.head(seen)


def residual_before_an_activation_in_place(m, x):
    x = F.relu(m.a(x), inplace=True)
    return m.head(F.relu_(torch.add(m.b(x), x, alpha=2)))


@pytest.mark.parametrize(
    "forward",
    [
        residual,
        residual_in_place,
        residual_into_the_branch,
        residual_through_two_names,
        residual_before_an_activation_in_place,
    ],
    ids=lambda f: f.__name__,
)
def test_residual_additions(forward):
    model = net(forward, a=conv(3, 8), b=conv(8, 8), head=conv(8, 4))
    small = check(model, {f"a:{i} b:{i} > b:{i} head:{i}" for i in range(8)})
    assert small.kind == "module"
    assert small.model.b.weight.shape == (4, 4, 3, 3)


def test_an_addition_seen_through_an_earlier_view():
    def forward(m, x):
        y = m.a(x)
        flat = y.flatten(2)
        y += m.b(x)
        return m.head(flat.mean(2))

    model = net(forward, a=conv(3, 8), b=conv(3, 8), head=nn.Linear(8, 4))
    check(model, {f"a:{i} b:{i} > head:{i}" for i in range(8)})


class Block(nn.Module):
    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, filters, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = conv(filters, filters, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.down = None
        if stride > 1 or channels != filters:
            self.down = nn.Sequential(conv(channels, filters, 1, stride=stride), nn.BatchNorm2d(filters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return F.relu(y)


def test_residual_blocks():
    model = seq(
        stem=conv(3, 6),
        one=Block(6, 6, 1),
        two=Block(6, 8, 2),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(8, 4),
    )
    free = {
        *(f"stem:{i} one.conv2:{i} > one.conv1:{i} two.conv1:{i} two.down.0:{i} | one.bn2:{i}" for i in range(6)),
        *(f"one.conv1:{i} > one.conv2:{i} | one.bn1:{i}" for i in range(6)),
        *(f"two.conv1:{i} > two.conv2:{i} | two.bn1:{i}" for i in range(8)),
        *(f"two.conv2:{i} two.down.0:{i} > head:{i} | two.bn2:{i} two.down.1:{i}" for i in range(8)),
    }
    assert check(model, free).kind == "module"


@pytest.mark.parametrize(
    "combine",
    [
        torch.sub,
        torch.mul,
        torch.maximum,
        lambda a, b: a / (1 + b * b),
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: torch.where(b > 0, a, torch.zeros_like(a)),
        lambda a, b: torch.lerp(a, b, 0.25),
        lambda a, b: torch.addcmul(a, b, b),
        lambda a, b: sum([a, b, a]),
        lambda a, b: a.masked_fill(b > 0, 0.0),
    ],
)
def test_elementwise_operators_of_two_tensors(combine):
    model = net(lambda m, x: m.head(combine(m.a(x), m.b(x))), a=conv(3, 8), b=conv(3, 8), head=conv(8, 4))
    check(model, {f"a:{i} b:{i} > head:{i}" for i in range(8)})


def test_three_branches_in_two_additions():
    def forward(m, x):
        y, z = m.a(x), m.b(x)
        return m.head(y + z), m.head2(z + m.c(x))

    model = net(forward, a=conv(3, 8), b=conv(3, 8), c=conv(3, 8), head=conv(8, 4), head2=conv(8, 4))
    check(model, {f"a:{i} b:{i} c:{i} > head:{i} head2:{i}" for i in range(8)})


def test_an_addition_of_the_input_freezes():
    model = net(lambda m, x: m.head(x + m.b(m.a(x))), a=conv(3, 8), b=conv(8, 3), head=conv(3, 4))
    check(model, {f"a:{i} > b:{i}" for i in range(8)}, {"b": "add"})


# Concatenation, split, slices


@pytest.mark.parametrize("dim", [1, -3])
def test_concatenation(dim):
    def forward(m, x):
        return m.head(m.bn(torch.cat([m.a(x), m.b(x)], dim=dim)))

    model = net(forward, a=conv(3, 8), b=conv(3, 6), bn=nn.BatchNorm2d(14), head=conv(14, 4))
    free = {f"a:{i} > head:{i} | bn:{i}" for i in range(8)} | {f"b:{i} > head:{8 + i} | bn:{8 + i}" for i in range(6)}
    assert check(model, free).kind == "module"


def test_concatenation_of_a_tensor_with_itself():
    def forward(m, x):
        y = m.a(x)
        return m.head(torch.cat((y, y.relu(), y), 1))

    model = net(forward, a=conv(3, 8), head=conv(24, 4))
    check(model, {f"a:{i} > head:{i},{8 + i},{16 + i}" for i in range(8)})


def test_concatenation_of_a_tensor_with_itself_before_a_normalisation():
    def forward(m, x):
        y = m.a(x)
        return m.head(m.bn(torch.cat((y, y), 1)))

    model = net(forward, a=conv(3, 8), bn=nn.BatchNorm2d(16), head=conv(16, 4))
    check(model, {f"a:{i} > head:{i},{8 + i} | bn:{i},{8 + i}" for i in range(8)})


def test_dense_connections():
    def forward(m, x):
        x = m.a(x)
        x = torch.cat([x, m.b(F.relu(m.norm1(x)))], 1)
        x = torch.cat([x, m.c(F.relu(m.norm2(x)))], 1)
        return m.head(x)

    model = net(
        forward,
        a=conv(3, 6),
        norm1=nn.BatchNorm2d(6),
        b=conv(6, 4),
        norm2=nn.BatchNorm2d(10),
        c=conv(10, 5),
        head=conv(15, 4),
    )
    free = {
        *(f"a:{i} > b:{i} c:{i} head:{i} | norm1:{i} norm2:{i}" for i in range(6)),
        *(f"b:{i} > c:{6 + i} head:{6 + i} | norm2:{6 + i}" for i in range(4)),
        *(f"c:{i} > head:{10 + i}" for i in range(5)),
    }
    check(model, free)


def test_an_addition_onto_a_concatenation():
    def forward(m, x):
        return m.head(torch.cat([m.a(x), m.b(x)], 1) + m.c(x))

    model = net(forward, a=conv(3, 5), b=conv(3, 7), c=conv(3, 12), head=conv(12, 4))
    free = {f"a:{i} c:{i} > head:{i}" for i in range(5)} | {f"b:{i} c:{5 + i} > head:{5 + i}" for i in range(7)}
    check(model, free)


def test_concatenation_with_the_input():
    model = net(lambda m, x: m.head(torch.cat([x, m.a(x)], 1)), a=conv(3, 8), head=conv(11, 4))
    check(model, {f"a:{i} > head:{3 + i}" for i in range(8)})


def test_split_into_unequal_parts_of_which_one_is_dropped():
    def forward(m, x):
        p, _, q = torch.split(m.a(x), [2, 1, 5], dim=1)
        return m.head(torch.cat([q, p], 1))

    model = net(forward, a=conv(3, 8), head=conv(7, 4))
    free = {f"a:{i} > head:{5 + i}" for i in range(2)} | {"a:2"} | {f"a:{3 + i} > head:{i}" for i in range(5)}
    assert check(model, free).kind == "graph"


def test_split_with_a_remainder():
    def forward(m, x):
        p, q, r = m.a(x).split(3, dim=-3)
        return m.head(p + q), m.head2(r)

    model = net(forward, a=conv(3, 8), head=conv(3, 4), head2=conv(2, 4))
    check(model, {f"a:{i},{3 + i} > head:{i}" for i in range(3)} | {f"a:{6 + i} > head2:{i}" for i in range(2)})


@pytest.mark.parametrize("dim", [1, -3])
def test_chunks_one_of_which_is_the_gate_of_the_other(dim):
    def forward(m, x):
        p, q = m.bn(m.a(x)).chunk(2, dim)
        return m.head(p * q.sigmoid())

    model = net(forward, a=conv(3, 8), bn=nn.BatchNorm2d(8), head=conv(4, 4))
    check(model, {f"a:{i},{4 + i} > head:{i} | bn:{i},{4 + i}" for i in range(4)})


def test_chunks_that_go_their_own_way():
    def forward(m, x):
        p, q = m.a(x).chunk(2, 1)
        return m.head(torch.cat([m.b(q), p], 1))

    model = net(forward, a=conv(3, 8), b=conv(4, 6), head=conv(10, 4))
    free = {
        *(f"a:{i} > head:{6 + i}" for i in range(4)),
        *(f"a:{4 + i} > b:{i}" for i in range(4)),
        *(f"b:{i} > head:{i}" for i in range(6)),
    }
    check(model, free)


def test_the_blocks_of_res2net():
    def forward(m, x):
        p, q, r, s = m.a(x).chunk(4, 1)
        q = m.b(q)
        return m.head(torch.cat([p, q, m.c(r + q), s], 1))

    model = net(forward, a=conv(3, 8), b=conv(2, 2), c=conv(2, 2), head=conv(8, 4))
    free = {
        *(f"a:{i} > head:{i}" for i in range(2)),
        *(f"a:{2 + i} > b:{i}" for i in range(2)),
        *(f"a:{4 + i} b:{i} > c:{i} head:{2 + i}" for i in range(2)),
        *(f"c:{i} > head:{4 + i}" for i in range(2)),
        *(f"a:{6 + i} > head:{6 + i}" for i in range(2)),
    }
    check(model, free)


@pytest.mark.parametrize(
    ("take", "pairs"),
    [
        (lambda y: y[:, ::2] + y[:, 1::2], ["a:0,1 > head:0", "a:2,3 > head:1", "a:4,5 > head:2", "a:6,7 > head:3"]),
        (lambda y: y[:, :4] + y[:, -4:], ["a:0,4 > head:0", "a:1,5 > head:1", "a:2,6 > head:2", "a:3,7 > head:3"]),
        (
            lambda y: y[:, 2:6],
            ["a:0", "a:1", "a:2 > head:0", "a:3 > head:1", "a:4 > head:2", "a:5 > head:3", "a:6", "a:7"],
        ),
        (
            lambda y: y.narrow(1, 1, 4),
            ["a:0", "a:1 > head:0", "a:2 > head:1", "a:3 > head:2", "a:4 > head:3", "a:5", "a:6", "a:7"],
        ),
        (
            lambda y: torch.cat([y[:, 7:], y[:, :3]], 1),
            ["a:7 > head:0", "a:0 > head:1", "a:1 > head:2", "a:2 > head:3", "a:3", "a:4", "a:5", "a:6"],
        ),
        (
            lambda y: y[:, :4, 1:, ::2],
            ["a:0 > head:0", "a:1 > head:1", "a:2 > head:2", "a:3 > head:3", "a:4", "a:5", "a:6", "a:7"],
        ),
        (
            lambda y: torch.stack([y[:, 5], y[:, 1], y[:, 2], y[:, 3]], 1),
            ["a:5 > head:0", "a:1 > head:1", "a:2 > head:2", "a:3 > head:3", "a:0", "a:4", "a:6", "a:7"],
        ),
    ],
)
def test_slices(take, pairs):
    check(net(lambda m, x: m.head(take(m.a(x))), a=conv(3, 8), head=conv(4, 4)), set(pairs))


def test_slices_of_a_concatenation():
    """The ghost module: cheap features beside the primary ones, of which some are not needed."""

    def forward(m, x):
        x = m.a(x)
        return m.head(torch.cat([x, m.cheap(x)], 1)[:, :12])

    model = net(forward, a=conv(3, 8), cheap=conv(8, 8, groups=8), head=conv(12, 4))
    free = {
        *(f"a:{i} cheap:{i} > cheap:{i} head:{i},{8 + i}" for i in range(4)),
        *(f"a:{i} cheap:{i} > cheap:{i} head:{i}" for i in range(4, 8)),
    }
    check(model, free)


# Channel and pixel shuffle


def shuffle_by_view(y: torch.Tensor, groups: int) -> torch.Tensor:
    b, c, h, w = y.shape
    return y.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def shuffle_with_fixed_sizes(y: torch.Tensor, groups: int) -> torch.Tensor:
    return y.reshape(-1, groups, 12 // groups, 8, 8).permute(0, 2, 1, 3, 4).reshape(-1, 12, 8, 8)


def shuffle_by_unflatten(y: torch.Tensor, groups: int) -> torch.Tensor:
    return y.unflatten(1, (groups, -1)).swapaxes(1, 2).flatten(1, 2)


def shuffle_by_module(y: torch.Tensor, groups: int) -> torch.Tensor:
    return F.channel_shuffle(y, groups)


SHUFFLES = [shuffle_by_view, shuffle_with_fixed_sizes, shuffle_by_unflatten, shuffle_by_module]


@pytest.mark.parametrize("shuffle", SHUFFLES, ids=lambda f: f.__name__)
def test_channel_shuffle(shuffle):
    """(3, 4) -> (4, 3): the three channels in the same place of every group, which come to lie side by side."""
    model = net(lambda m, x: m.head(shuffle(m.a(x), 3)), a=conv(3, 12), head=conv(12, 4))
    check(model, {f"a:{i},{4 + i},{8 + i} > head:{3 * i},{3 * i + 1},{3 * i + 2}" for i in range(4)})


def test_channel_shuffle_module():
    model = seq(a=conv(3, 8), bn=nn.BatchNorm2d(8), shuffle=nn.ChannelShuffle(2), head=conv(8, 4))
    small = check(model, {f"a:{i},{4 + i} > head:{2 * i},{2 * i + 1} | bn:{i},{4 + i}" for i in range(4)})
    assert small.kind == "module"


@pytest.mark.parametrize("shuffle", SHUFFLES, ids=lambda f: f.__name__)
def test_channel_shuffle_of_many_small_groups(shuffle):
    """(6, 2) -> (2, 6): both channels of a group, which come to lie six apart."""
    model = net(lambda m, x: m.head(shuffle(m.a(x), 6)), a=conv(3, 12), head=conv(12, 4))
    check(model, {f"a:{2 * i},{2 * i + 1} > head:{i},{6 + i}" for i in range(6)})


def test_the_blocks_of_shufflenet():
    def forward(m, x):
        p, q = m.a(x).chunk(2, dim=1)
        return m.head(shuffle_by_view(torch.cat((p, m.b(q)), dim=1), 2))

    model = net(forward, a=conv(3, 8), b=conv(4, 4), head=conv(8, 4))
    free = {f"a:{i} b:{i} > head:{2 * i},{2 * i + 1}" for i in range(4)} | {f"a:{4 + i} > b:{i}" for i in range(4)}
    check(model, free)


def test_pixel_shuffle():
    model = seq(a=conv(3, 16), bn=nn.BatchNorm2d(16), up=nn.PixelShuffle(2), head=conv(4, 4))
    check(model, {f"a:{4 * i}-{4 * i + 3} > head:{i} | bn:{4 * i}-{4 * i + 3}" for i in range(4)})


def test_pixel_shuffle_by_view():
    def forward(m, x):
        y = m.a(x)
        b, c, h, w = y.shape
        y = y.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
        return m.head(y)

    check(net(forward, a=conv(3, 16), head=conv(4, 4)), {f"a:{4 * i}-{4 * i + 3} > head:{i}" for i in range(4)})


def test_pixel_unshuffle():
    model = seq(a=conv(3, 6), down=nn.PixelUnshuffle(2), head=conv(24, 4))
    check(model, {f"a:{i} > head:{4 * i}-{4 * i + 3}" for i in range(6)})


# Flatten and views


@pytest.mark.parametrize(
    ("flatten", "kind"),
    [
        (lambda y: y.flatten(1), "module"),
        (lambda y: torch.flatten(y, -3), "module"),
        (lambda y: y.view(y.size(0), -1), "module"),
        (lambda y: y.reshape(len(y), -1), "module"),
        (lambda y: y.reshape(y.shape[0], y.shape[1] * y.shape[2] * y.shape[3]), "module"),
        (lambda y: y.flatten(2).flatten(1), "module"),
        (lambda y: y.view(-1, 32), "graph"),
        (lambda y: y.view(-1, 8, 4).reshape(-1, 8 * 4), "graph"),
    ],
)
def test_flatten_into_a_linear_layer(flatten, kind):
    """Every channel is four features in a row."""
    model = net(lambda m, x: m.head(flatten(F.max_pool2d(m.a(x), 4))), a=conv(3, 8), head=nn.Linear(32, 4))
    assert check(model, {f"a:{i} > head:{4 * i}-{4 * i + 3}" for i in range(8)}).kind == kind


def test_flatten_with_the_channels_last():
    """Position by position, all channels: the features of a channel are eight apart."""

    def forward(m, x):
        return m.head(F.max_pool2d(m.a(x), 4).permute(0, 2, 3, 1).flatten(1))

    model = net(forward, a=conv(3, 8), head=nn.Linear(32, 4))
    check(model, {f"a:{i} > head:{i},{8 + i},{16 + i},{24 + i}" for i in range(8)})


def test_normalisation_and_linear_layers_after_flatten():
    model = seq(
        a=conv(3, 8),
        pool=nn.MaxPool2d(4),
        flat=nn.Flatten(),
        bn=nn.BatchNorm1d(32),
        fc=nn.Linear(32, 6),
        act=nn.ReLU(),
        head=nn.Linear(6, 4),
    )
    free = {f"a:{i} > fc:{4 * i}-{4 * i + 3} | bn:{4 * i}-{4 * i + 3}" for i in range(8)}
    check(model, free | {f"fc:{i} > head:{i}" for i in range(6)}, cut=True)


def test_from_features_to_an_image():
    """Every channel of the image is made by 16 filters of the linear layer."""
    model = net(lambda m, x: m.head(m.fc(x).view(-1, 6, 4, 4)), fc=nn.Linear(5, 96), head=conv(6, 4))
    check(model, {f"fc:{16 * i}-{16 * i + 15} > head:{i}" for i in range(6)}, shape=(5,))


def test_means_over_the_positions():
    model = net(lambda m, x: m.head(m.a(x).mean([2, 3])), a=conv(3, 8), head=nn.Linear(8, 4))
    check(model, {f"a:{i} > head:{i}" for i in range(8)})


def test_positions_in_a_row():
    model = net(lambda m, x: m.head(m.a(x).flatten(2)), a=conv(3, 8), head=nn.Conv1d(8, 4, 3))
    check(model, {f"a:{i} > head:{i}" for i in range(8)})


def test_channels_merged_with_the_batch_freeze():
    def forward(m, x):
        return m.head(m.b(m.a(x)).flatten(0, 1).unsqueeze(1))

    model = net(forward, a=conv(3, 6), b=conv(6, 8), head=conv(1, 4))
    check(model, {f"a:{i} > b:{i}" for i in range(6)}, {"b": "flatten|view|reshape|conv2d"})


def test_linear_layers_with_the_channels_last():
    """The block of ConvNeXt, without its normalisation."""

    def forward(m, x):
        x = m.a(x)
        y = m.dw(x).permute(0, 2, 3, 1)
        y = m.fc2(F.gelu(m.fc1(y))) * m.gamma
        return m.head(x + y.permute(0, 3, 1, 2))

    model = net(
        forward,
        a=conv(3, 8),
        dw=conv(8, 8, groups=8),
        fc1=nn.Linear(8, 12),
        fc2=nn.Linear(12, 8),
        gamma=parameter(8),
        head=conv(8, 4),
    )
    free = {f"a:{i} dw:{i} fc2:{i} > dw:{i} fc1:{i} head:{i} | gamma:{i}" for i in range(8)}
    check(model, free | {f"fc1:{i} > fc2:{i}" for i in range(12)})


# Zero-padded shortcuts


def test_zero_padded_shortcut():
    """Option A of the residual networks for CIFAR: half of the new channels before the old ones, half behind."""

    def forward(m, x):
        x = m.a(x)
        return m.head(F.relu(m.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))))

    model = net(forward, a=conv(3, 8), b=conv(8, 16, stride=2), head=conv(16, 4))
    free = {
        *(f"b:{i} > head:{i}" for i in range(4)),
        *(f"a:{i} b:{4 + i} > b:{i} head:{4 + i}" for i in range(8)),
        *(f"b:{12 + i} > head:{12 + i}" for i in range(4)),
    }
    check(model, free)


@pytest.mark.parametrize(
    "zeros",
    [
        lambda x: torch.zeros(x.shape[0], 6, 8, 8, dtype=x.dtype),
        lambda x: x.new_zeros(x.shape[0], 6, x.shape[2], x.shape[3]),
    ],
)
def test_concatenation_with_zeros(zeros):
    def forward(m, x):
        x = m.a(x)
        return m.head(m.b(x) + torch.cat([x, zeros(x)], 1))

    model = net(forward, a=conv(3, 8), b=conv(8, 14), head=conv(14, 4))
    free = {f"a:{i} b:{i} > b:{i} head:{i}" for i in range(8)} | {f"b:{8 + i} > head:{8 + i}" for i in range(6)}
    check(model, free)


# Broadcasts


def test_a_map_of_one_channel_times_many():
    def forward(m, x):
        y = m.a(x)
        return m.head(y * torch.sigmoid(m.map(y)))

    model = net(forward, a=conv(3, 8), map=conv(8, 1), head=conv(8, 4))
    check(model, {f"a:{i} > map:{i} head:{i}" for i in range(8)}, {"map": "mul"})


def test_an_expanded_map_times_many():
    def forward(m, x):
        y = m.a(x)
        return m.head(torch.sigmoid(m.map(x)).expand_as(y) * y)

    model = net(forward, a=conv(3, 8), map=conv(3, 1), head=conv(8, 4))
    check(model, {f"a:{i} > head:{i}" for i in range(8)}, {"map": "expand|mul"})


def test_a_map_of_one_channel_added_onto_many_freezes_both():
    model = net(lambda m, x: m.head(m.a(x) + m.map(x)), a=conv(3, 8), map=conv(3, 1), head=conv(8, 4))
    check(model, set(), {"a": "add", "map": "add"})


def test_an_input_of_one_channel_times_many():
    model = net(lambda m, x, z: m.head(m.a(x) * z), a=conv(3, 8), head=conv(8, 4))
    check(model, {f"a:{i} > head:{i}" for i in range(8)}, inputs=(torch.randn(2, *IMAGE), torch.randn(2, 1, 8, 8)))


def test_attention_to_positions():
    """From the mean and the maximum over the channels, which nothing may be cut out of."""

    def forward(m, x):
        y = m.b(m.a(x))
        seen = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1)
        return m.head(y * m.map(seen).sigmoid())

    model = net(forward, a=conv(3, 6), b=conv(6, 8), map=conv(2, 1, 7), head=conv(8, 4))
    check(model, {f"a:{i} > b:{i}" for i in range(6)}, {"b": "mean|max", "map": "mul"})


def test_squeeze_and_excitation_with_convolutions():
    def forward(m, x):
        y = m.a(x)
        s = m.up(F.relu(m.down(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return m.head(s * y)

    model = net(forward, a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), head=conv(8, 4))
    free = {f"a:{i} up:{i} > down:{i} head:{i}" for i in range(8)} | {f"down:{i} > up:{i}" for i in range(4)}
    assert check(model, free).kind == "module"


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (lambda s: s[:, :, None, None], "module"),
        (lambda s: s.unsqueeze(-1).unsqueeze(-1), "module"),
        (lambda s: s.view(s.shape[0], s.shape[1], 1, 1), "module"),
        (lambda s: s.view(*s.size(), 1, 1).expand(-1, -1, 8, 8), "module"),
        (lambda s: s.view(-1, 8, 1, 1), "graph"),
    ],
)
def test_squeeze_and_excitation_with_linear_layers(image, kind):
    def forward(m, x):
        y = m.a(x)
        return m.head(y * image(m.up(F.relu(m.down(y.mean((2, 3))))).sigmoid()))

    model = net(forward, a=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), head=conv(8, 4))
    free = {f"a:{i} up:{i} > down:{i} head:{i}" for i in range(8)} | {f"down:{i} > up:{i}" for i in range(4)}
    assert check(model, free).kind == kind


def test_a_value_per_channel_added_to_all_positions():
    def forward(m, x):
        y = m.a(x)
        return m.head(y + m.context(y.mean((2, 3), keepdim=True)))

    model = net(forward, a=conv(3, 8), context=conv(8, 8, 1), head=conv(8, 4))
    check(model, {f"a:{i} context:{i} > context:{i} head:{i}" for i in range(8)})


def test_a_gate_from_neighbouring_channels_freezes():
    """Efficient channel attention: a convolution that takes the channels for positions."""

    def forward(m, x):
        y = m.b(m.a(x))
        gate = m.eca(y.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        return m.head(y * gate[:, :, None, None])

    model = net(forward, a=conv(3, 6), b=conv(6, 8), eca=nn.Conv1d(1, 1, 3, padding=1), head=conv(8, 4))
    check(model, {f"a:{i} > b:{i}" for i in range(6)}, {"b": "conv1d", "eca": ""})


# Parameters of the network's own


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1)])
@pytest.mark.parametrize("operator", [torch.mul, torch.add], ids=["scale", "shift"])
def test_a_parameter_per_channel(operator, shape):
    model = net(lambda m, x: m.head(operator(m.a(x), m.gamma)), a=conv(3, 8), gamma=parameter(*shape), head=conv(8, 4))
    check(model, {f"a:{i} > head:{i} | gamma:{i}" for i in range(8)})


def test_a_buffer_per_channel():
    def forward(m, x):
        return m.head((m.a(x) - m.mean) * m.scale[:, None, None])

    buffers = {"mean": nn.Buffer(torch.empty(1, 8, 1, 1)), "scale": nn.Buffer(torch.empty(8))}
    model = net(forward, a=conv(3, 8), **buffers, head=conv(8, 4))
    check(model, {f"a:{i} > head:{i} | mean:{i} scale:{i}" for i in range(8)}, cut=False)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (1, 1, 1, 1)])
def test_a_parameter_for_all_channels(shape):
    model = net(lambda m, x: m.head(m.a(x) * m.alpha), a=conv(3, 8), alpha=parameter(*shape), head=conv(8, 4))
    check(model, {f"a:{i} > head:{i}" for i in range(8)})


@pytest.mark.parametrize("shape", [(8,), (8, 8), (1, 1, 8, 8)])
def test_a_parameter_per_position(shape):
    """The image is as wide as there are channels: the eight of the last dimension are positions."""
    model = net(lambda m, x: m.head(m.a(x) * m.weight), a=conv(3, 8), weight=parameter(*shape), head=conv(8, 4))
    check(model, {f"a:{i} > head:{i}" for i in range(8)})


def test_a_shift_per_channel_and_position():
    model = net(lambda m, x: m.head(m.a(x) + m.shift), a=conv(3, 8), shift=parameter(8, 8, 8), head=conv(8, 4))
    check(model, {f"a:{i} > head:{i} | shift:{i}" for i in range(8)})


def test_activations_with_a_slope_per_channel():
    def forward(m, x):
        return m.head(m.act(torch.cat([m.a(x), m.b(x)], 1)))

    model = net(forward, a=conv(3, 4), b=conv(3, 6), act=nn.PReLU(10), head=conv(10, 4))
    free = {f"a:{i} > head:{i} | act:{i}" for i in range(4)} | {f"b:{i} > head:{4 + i} | act:{4 + i}" for i in range(6)}
    check(model, free)


def test_parameters_in_functional_operators():
    def forward(m, x):
        y = F.batch_norm(m.a(x), m.mean, m.var, m.scale, m.shift)
        return m.head(F.prelu(y, m.slope))

    model = net(
        forward,
        a=conv(3, 8),
        mean=nn.Buffer(torch.zeros(8)),
        var=nn.Buffer(torch.ones(8)),
        scale=parameter(8),
        shift=parameter(8),
        slope=parameter(8),
        head=conv(8, 4),
    )
    check(model, {f"a:{i} > head:{i} | mean:{i} var:{i} scale:{i} shift:{i} slope:{i}" for i in range(8)})


def test_a_convolution_with_a_parameter_for_weight():
    """Whatever becomes of the filters of the network's own parameter: the layers around it are read."""

    def forward(m, x):
        y = m.b(m.a(x))
        y = F.conv2d(y, m.weight, m.shift, padding=1)
        return m.head(m.d(m.c(y)))

    model = net(
        forward,
        a=conv(3, 6),
        b=conv(6, 8),
        weight=parameter(10, 8, 3, 3),
        shift=parameter(10),
        c=conv(10, 6),
        d=conv(6, 5),
        head=conv(5, 4),
    )
    free = {
        *(f"a:{i} > b:{i}" for i in range(6)),
        *(f"c:{i} > d:{i}" for i in range(6)),
        *(f"d:{i} > head:{i}" for i in range(5)),
    }
    check(model, free, at_least=True)


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, self.stride, self.padding)


class ScaledSame(nn.Conv2d):
    """With a gain for every filter, and TensorFlow's padding."""

    def __init__(self, channels: int, filters: int, stride: int, groups: int = 1) -> None:
        super().__init__(channels, filters, 3, stride, groups=groups)
        self.gain = nn.Parameter(torch.rand(filters, 1, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        amounts = [max((-(-n // s) - 1) * s + 3 - n, 0) for n, s in zip(x.shape[2:], self.stride, strict=True)]
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in amounts)
        flat = self.weight.flatten(1)
        weight = F.batch_norm(flat[None], None, None, self.gain.flatten(), training=True).view_as(self.weight)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, self.bias, self.stride, groups=self.groups)


class Centred(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), 2 * self.bias)


class Reflecting(nn.ConvTranspose2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, self.weight.tanh(), self.bias, stride=2, output_padding=1)


def test_weights_that_are_computed_in_the_forward():
    """They are plain ones in the copies, so that filters and channels go, whatever computes them."""
    model = seq(a=Standardised(3, 8, 3, bias=False), bn=nn.BatchNorm2d(8), b=Standardised(8, 6, 3), head=conv(6, 4))
    free = {f"a:{i} > b:{i} | bn:{i}" for i in range(8)} | {f"b:{i} > head:{i}" for i in range(6)}
    small = check(model, free)
    assert (small.kind, small.baked) == ("module", ("a", "b"))
    assert type(small.model.a) is type(small.model.b) is nn.Conv2d
    assert small.model.a.weight.shape == (4, 3, 3, 3)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_computed_weights_with_a_padding_of_their_own(stride):
    model = seq(a=conv(3, 8), b=ScaledSame(8, 8, stride), dw=ScaledSame(8, 8, stride, groups=8), head=conv(8, 4, 1))
    free = {f"a:{i} > b:{i}" for i in range(8)} | {f"b:{i} dw:{i} > dw:{i} head:{i}" for i in range(8)}
    small = check(model, free)
    assert (small.kind, small.baked) == ("module", ("b", "dw"))
    assert "b.gain" not in small.model.state_dict()


class PadsItself(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, [1] * 4))


def test_computed_weights_of_other_kinds_of_layers():
    model = seq(
        a=conv(3, 6), up=Reflecting(6, 5, 3), flat=nn.Flatten(), fc=Centred(5 * 18 * 18, 7), head=nn.Linear(7, 4)
    )
    one = 18 * 18
    free = {
        *(f"a:{i} > up:{i}" for i in range(6)),
        *(f"up:{i} > fc:{one * i}-{one * i + one - 1}" for i in range(5)),
        *(f"fc:{i} > head:{i}" for i in range(7)),
    }
    assert check(model, free).baked == ("up", "fc")


class Twisted(nn.Conv2d):
    """The weight depends on the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias, padding=self.padding)


class Squared(nn.Conv2d):
    """More than a convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.tanh(), self.bias, padding=self.padding).square()


@pytest.mark.parametrize(("kind", "pattern"), [(Twisted, "mean"), (Squared, "conv2d")])
def test_computed_weights_that_no_plain_layer_stands_for_freeze(kind, pattern):
    model = seq(a=conv(3, 6), b=conv(6, 8), own=kind(8, 8, 3, padding=1), c=conv(8, 6), head=conv(6, 4))
    free = {f"a:{i} > b:{i}" for i in range(6)} | {f"c:{i} > head:{i}" for i in range(6)}
    assert not check(model, free, {"b": pattern}).baked


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def doubled(layer: nn.Conv2d) -> nn.Conv2d:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, doubled])
def test_parametrizations(wrap):
    torch.manual_seed(0)
    model = seq(a=wrap(conv(3, 8)), bn=nn.BatchNorm2d(8), b=wrap(conv(8, 6)), act=nn.ReLU(), head=wrap(conv(6, 4)))
    free = {f"a:{i} > b:{i} | bn:{i}" for i in range(8)} | {f"b:{i} > head:{i}" for i in range(6)}
    small = check(model, free)
    assert not any(parametrize.is_parametrized(module) for module in small.model.modules())


# Reductions, contractions, normalisations over the channels


def test_stack_and_sum():
    def forward(m, x, dim):
        return m.head(torch.stack([m.a(x), m.b(x)], dim=dim).sum(dim))

    for dim in (0, 1, 2, -1):
        model = net(lambda m, x, dim=dim: forward(m, x, dim), a=conv(3, 8), b=conv(3, 8), head=conv(8, 4))
        check(model, {f"a:{i} b:{i} > head:{i}" for i in range(8)})


MIXES = {
    "mean": (lambda y: y.mean(1, keepdim=True), 1, "mean"),
    "mean of everything": (lambda y: y * (1 + y.mean()), 8, "mean"),
    "maximum": (lambda y: y.max(dim=1, keepdim=True).values, 1, "max"),
    "amax": (lambda y: y.amax(-3, keepdim=True), 1, "amax"),
    "sum": (lambda y: y.sum(1).unsqueeze(1), 1, "sum"),
    "softmax": (lambda y: F.softmax(y, dim=1), 8, "softmax"),
    "softmax, counted from behind": (lambda y: y.softmax(-3), 8, "softmax"),
    "log softmax": (lambda y: y.log_softmax(1), 8, "softmax"),
    "logsumexp": (lambda y: y.logsumexp(1, keepdim=True), 1, "logsumexp"),
    "normalize": (lambda y: F.normalize(y, dim=1), 8, "norm|sum"),
    "cumulative sum": (lambda y: y.cumsum(1), 8, "cumsum"),
    "sort": (lambda y: y.sort(1).values, 8, "sort"),
    "fft": (lambda y: torch.fft.fft(y, dim=1).real, 8, "fft"),
    "local response normalisation": (lambda y: F.local_response_norm(y, 3), 8, "pool|pad|view|local"),
    "layer normalisation": (lambda y: F.layer_norm(y, y.shape[1:]), 8, "layer_norm"),
    "layer normalisation, channels last": (
        lambda y: F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2]).permute(0, 3, 1, 2),
        8,
        "layer_norm",
    ),
    "matmul": (lambda y: (y.transpose(1, -1) @ torch.ones(8, 8, dtype=y.dtype)).transpose(1, -1), 8, "matmul|mm"),
    "einsum": (lambda y: torch.einsum("bchw,dc->bdhw", y, torch.ones(8, 8, dtype=y.dtype)), 8, "einsum|mm"),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_channels_freezes_them_and_nothing_else(name):
    """Of the layer in front; the layers around it are free, and the reason names the operator and the line."""
    mix, channels, pattern = MIXES[name]
    model = net(
        lambda m, x: m.head(m.c(mix(m.b(m.a(x))))), a=conv(3, 6), b=conv(6, 8), c=conv(channels, 5), head=conv(5, 4)
    )
    free = {f"a:{i} > b:{i}" for i in range(6)} | {f"c:{i} > head:{i}" for i in range(5)}
    check(model, free, {"b": f"(?i){pattern}"})


def test_the_reason_names_operator_module_and_line():
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(1)

    model = seq(a=conv(3, 8), odd=Odd(), head=conv(8, 4))
    check(model, set(), {"a": "cumsum"})
    reason = inspect(model, torch.zeros(1, *IMAGE)).frozen["a"]
    assert "odd" in reason
    assert re.search(r"test_channel_groups\.py:\d+", reason)


def test_layer_normalisation_over_features_freezes():
    model = seq(a=nn.Linear(5, 6), b=nn.Linear(6, 8), ln=nn.LayerNorm(8), act=nn.GELU(), head=nn.Linear(8, 4))
    check(model, {f"a:{i} > b:{i}" for i in range(6)}, {"b": "layer_norm"}, shape=(5,))


def test_attention_of_positions_to_positions():
    """The scores contract over the channels of queries and keys; the values are mixed over positions alone."""

    def forward(m, x):
        x = m.a(x)
        q, k, v = (layer(x).flatten(2) for layer in (m.q, m.k, m.v))
        weights = (q.transpose(1, 2) @ k / 8).softmax(-1)
        return m.head((v @ weights.transpose(1, 2)).unflatten(2, (8, 8)))

    model = net(forward, a=conv(3, 6), q=conv(6, 8), k=conv(6, 8), v=conv(6, 8), head=conv(8, 4))
    free = {f"a:{i} > q:{i} k:{i} v:{i}" for i in range(6)} | {f"v:{i} > head:{i}" for i in range(8)}
    check(model, free, {"q": "matmul|mm", "k": "matmul|mm"})


def test_matmul_along_the_width():
    model = net(lambda m, x: m.head(m.a(x) @ m.matrix), a=conv(3, 8), matrix=parameter(8, 8), head=conv(8, 4))
    check(model, {f"a:{i} > head:{i}" for i in range(8)})


def test_global_response_normalisation_freezes_the_channels_in_front():
    """Every channel is divided by the mean over all of them: without some, the mean is another."""

    def forward(m, x):
        x = F.gelu(m.b(m.a(x)))
        size = x.norm(dim=(2, 3), keepdim=True)
        return m.head(m.c(x + m.gamma * (x * (size / size.mean(1, keepdim=True))) + m.beta))

    own = {"gamma": parameter(1, 8, 1, 1), "beta": parameter(1, 8, 1, 1)}
    model = net(forward, a=conv(3, 6), b=conv(6, 8), **own, c=conv(8, 5), head=conv(5, 4))
    free = {f"a:{i} > b:{i}" for i in range(6)} | {f"c:{i} > head:{i}" for i in range(5)}
    check(model, free, {"b": "aten.mean"})


def test_a_convolution_along_the_channels_freezes_them():
    """A gate that is made of neighbouring channels: without some, others are the neighbours."""

    def forward(m, x):
        x = m.b(m.a(x))
        gate = m.gate(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return m.head(m.c(x * gate.view(-1, 8, 1, 1)))

    gate = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    model = net(forward, a=conv(3, 6), b=conv(6, 8), gate=gate, c=conv(8, 5), head=conv(5, 4))
    free = {f"a:{i} > b:{i}" for i in range(6)} | {f"c:{i} > head:{i}" for i in range(5)}
    check(model, free, {"b": "conv1d", "gate": "conv1d|onto"})


def test_group_normalisation():
    model = seq(a=conv(3, 12), norm=nn.GroupNorm(3, 12), act=nn.ReLU(), head=conv(12, 4))
    small = check(
        model, {f"a:{4 * i}-{4 * i + 3} > head:{4 * i}-{4 * i + 3} | norm:{4 * i}-{4 * i + 3}" for i in range(3)}
    )
    assert small.model.a.weight.shape[0] in (4, 8)


def test_group_normalisation_after_a_residual_addition():
    def forward(m, x):
        x = m.a(x)
        return m.head(m.norm(x + m.b(x)))

    model = net(forward, a=conv(3, 8), b=conv(8, 8), norm=nn.GroupNorm(2, 8), head=conv(8, 4))
    check(model, {"a:0-3 b:0-3 > b:0-3 head:0-3 | norm:0-3", "a:4-7 b:4-7 > b:4-7 head:4-7 | norm:4-7"})


def test_group_normalisations_of_two_kinds_added():
    model = net(
        lambda m, x: m.head(m.two(m.a(x)) + m.four(m.b(x))),
        a=conv(3, 8),
        two=nn.GroupNorm(2, 8),
        b=conv(3, 8),
        four=nn.GroupNorm(4, 8),
        head=conv(8, 4),
    )
    free = {"a:0-3 b:0-3 > head:0-3 | two:0-3 four:0-3", "a:4-7 b:4-7 > head:4-7 | two:4-7 four:4-7"}
    check(model, free)


def test_group_normalisation_across_a_concatenation():
    def forward(m, x):
        return m.head(m.norm(torch.cat([m.a(x), m.b(x)], 1)))

    model = net(forward, a=conv(3, 6), b=conv(3, 10), norm=nn.GroupNorm(4, 16), head=conv(16, 4))
    free = {
        "a:0-3 > head:0-3 | norm:0-3",
        "a:4,5 b:0,1 > head:4-7 | norm:4-7",
        "b:2-5 > head:8-11 | norm:8-11",
        "b:6-9 > head:12-15 | norm:12-15",
    }
    check(model, free)


def test_group_normalisation_without_parameters():
    model = seq(a=conv(3, 8), norm=nn.GroupNorm(4, 8, affine=False), head=conv(8, 4))
    check(model, {f"a:{2 * i},{2 * i + 1} > head:{2 * i},{2 * i + 1}" for i in range(4)})


def test_one_norm_group_cannot_be_cut():
    """All channels together, of which one group must stay."""
    model = seq(a=conv(3, 8), norm=nn.GroupNorm(1, 8), head=conv(8, 4))
    report = inspect(model, torch.zeros(1, *IMAGE))
    assert sorted(len(group.filters["a"]) for group in report.groups if "a" in group.filters) in ([8], [1] * 8)
    assert Plan.uniform(report, filters=0.5)["a"].filters.all()


# Depthwise, grouped and transposed convolutions


def test_depthwise_convolution():
    model = seq(a=conv(3, 8), dw=conv(8, 8, groups=8, bias=False), bn=nn.BatchNorm2d(8), head=conv(8, 4, 1))
    small = check(model, {f"a:{i} dw:{i} > dw:{i} head:{i} | bn:{i}" for i in range(8)})
    assert small.kind == "module"
    assert (small.model.dw.groups, tuple(small.model.dw.weight.shape)) == (4, (4, 1, 3, 3))


def test_depthwise_convolution_with_a_multiplier():
    model = seq(a=conv(3, 8), dw=conv(8, 24, groups=8), bn=nn.BatchNorm2d(24), head=conv(24, 4, 1))
    three = [f"{3 * i}-{3 * i + 2}" for i in range(8)]
    check(model, {f"a:{i} dw:{three[i]} > dw:{i} head:{three[i]} | bn:{three[i]}" for i in range(8)})


def test_depthwise_convolution_of_a_concatenation():
    def forward(m, x):
        return m.head(m.dw(torch.cat([m.a(x), m.b(x)], 1)))

    model = net(forward, a=conv(3, 4), b=conv(3, 5), dw=conv(9, 9, groups=9), head=conv(9, 4))
    free = {f"a:{i} dw:{i} > dw:{i} head:{i}" for i in range(4)}
    check(model, free | {f"b:{i} dw:{4 + i} > dw:{4 + i} head:{4 + i}" for i in range(5)})


def test_depthwise_convolution_of_the_input_freezes():
    model = seq(dw=conv(3, 6, groups=3), a=conv(6, 8), head=conv(8, 4))
    check(model, {f"a:{i} > head:{i}" for i in range(8)}, {"dw": "conv"})


class Blur(nn.Module):
    """Every channel filtered by a kernel that nobody trains."""

    def __init__(self, kernel: torch.Tensor, apply: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel, persistent=False)
        self.apply_kernel = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_kernel(F.pad(x, [1] * 4, mode="reflect"), self.kernel, x.shape[1])


PER_CHANNEL, ONE = (8, 1, 3, 3), (1, 1, 3, 3)
BLURS = {
    "buffer": (PER_CHANNEL, lambda x, k, c: F.conv2d(x, k, stride=2, groups=c), "module"),
    "copy of a buffer": (PER_CHANNEL, lambda x, k, c: F.conv2d(x, k.to(x.dtype).contiguous(), groups=c), "module"),
    "upwards": (PER_CHANNEL, lambda x, k, c: F.conv_transpose2d(x, k, stride=2, groups=c), "module"),
    "size of its own": (PER_CHANNEL, lambda x, k, _: F.conv2d(x, k, stride=2, groups=8), "graph"),
    "computed": (PER_CHANNEL, lambda x, k, c: F.conv2d(x, k.flatten(1).softmax(1).view_as(k), groups=c), "graph"),
    "expanded": (ONE, lambda x, k, c: F.conv2d(x, k.expand(c, -1, -1, -1), stride=2, groups=c), "module"),
    "repeated": (ONE, lambda x, k, c: F.conv2d(x, k.repeat(c, 1, 1, 1), stride=2, groups=c), "module"),
    "repeated 8 times": (ONE, lambda x, k, _: F.conv2d(x, k.repeat(8, 1, 1, 1), stride=2, groups=8), "graph"),
}


@pytest.mark.parametrize("name", BLURS)
def test_blur(name):
    shape, apply, kind = BLURS[name]
    model = seq(a=conv(3, 8), bn=nn.BatchNorm2d(8), act=nn.ReLU(), blur=Blur(torch.rand(shape), apply), head=conv(8, 4))
    cut = shape == PER_CHANNEL and name != "computed"
    small = check(model, {f"a:{i} > head:{i} | bn:{i}" + f" blur:{i}" * cut for i in range(8)})
    assert small.kind == kind
    assert small.model.a.weight.shape[0] == 4


def test_blur_of_a_residual_stream_with_a_shift():
    """The shift keeps constants in the channels that are gone, which the layer behind stands for."""

    def forward(m, x):
        x = m.a(x)
        x = F.relu(x + m.b(x))
        return m.head(F.conv2d(x, m.kernel, m.shift, groups=x.shape[1]))

    model = net(
        forward,
        a=conv(3, 6),
        b=conv(6, 6),
        kernel=nn.Buffer(torch.rand(6, 1, 3, 3)),
        shift=parameter(6),
        head=conv(6, 4, 1),
    )
    check(model, {f"a:{i} b:{i} > b:{i} head:{i} | kernel:{i} shift:{i}" for i in range(6)})


def test_two_images_of_every_channel():
    """A sharpened one and a blurred one: kernels 2i and 2i + 1."""
    model = seq(
        a=conv(3, 8), pair=Blur(torch.rand(16, 1, 3, 3), lambda x, k, c: F.conv2d(x, k, groups=c)), head=conv(16, 4)
    )
    two = [f"{2 * i},{2 * i + 1}" for i in range(8)]
    check(model, {f"a:{i} > head:{two[i]} | pair:{two[i]}" for i in range(8)})


def test_a_kernel_that_depends_on_the_data_freezes():
    def forward(m, x):
        x = m.b(m.a(x))
        kernel = x[:1, :, :3, :3].transpose(0, 1).contiguous()
        return m.head(F.conv2d(x, kernel, groups=8))

    model = net(forward, a=conv(3, 6), b=conv(6, 8), head=conv(8, 4))
    check(model, {f"a:{i} > b:{i}" for i in range(6)}, {"b": "conv2d"})


def test_inverted_residual():
    def forward(m, x):
        x = m.a(x)
        return m.head(x + m.project(F.relu6(m.dw(F.relu6(m.expand(x))))))

    model = net(
        forward,
        a=conv(3, 6),
        expand=conv(6, 12, 1),
        dw=conv(12, 12, groups=12),
        project=conv(12, 6, 1),
        head=conv(6, 4),
    )
    free = {f"a:{i} project:{i} > expand:{i} head:{i}" for i in range(6)}
    check(model, free | {f"expand:{i} dw:{i} > dw:{i} project:{i}" for i in range(12)})


def test_grouped_convolution():
    model = seq(a=conv(3, 8), g=conv(8, 12, groups=2), bn=nn.BatchNorm2d(12), head=conv(12, 4))
    free = {f"a:{i},{4 + i} > g:{i},{4 + i}" for i in range(4)}
    small = check(model, free | {f"g:{i},{6 + i} > head:{i},{6 + i} | bn:{i},{6 + i}" for i in range(6)})
    assert (small.model.g.groups, tuple(small.model.g.weight.shape)) == (2, (6, 2, 3, 3))


def test_grouped_convolution_of_the_input():
    model = seq(g=conv(4, 8, groups=2), head=conv(8, 4))
    check(model, {f"g:{i},{4 + i} > head:{i},{4 + i}" for i in range(4)}, shape=(4, 8, 8))


def test_grouped_convolution_of_a_concatenation():
    def forward(m, x):
        return m.head(m.g(torch.cat([m.a(x), m.b(x)], 1)))

    model = net(forward, a=conv(3, 4), b=conv(3, 4), g=conv(8, 6, groups=2), head=conv(6, 4))
    free = {f"a:{i} b:{i} > g:{i},{4 + i}" for i in range(4)}
    check(model, free | {f"g:{i},{3 + i} > head:{i},{3 + i}" for i in range(3)})


def test_grouped_convolution_in_a_residual_block():
    def forward(m, x):
        x = m.a(x)
        return m.head(x + m.g(x))

    model = net(forward, a=conv(3, 8), g=conv(8, 8, groups=2), head=conv(8, 4))
    check(model, {f"a:{i},{4 + i} g:{i},{4 + i} > g:{i},{4 + i} head:{i},{4 + i}" for i in range(4)})


def test_grouped_convolutions_with_other_groups_behind_each_other():
    model = seq(a=conv(3, 8), two=conv(8, 8, groups=2), four=conv(8, 8, groups=4), head=conv(8, 4))
    free = {
        *(f"a:{i},{4 + i} > two:{i},{4 + i}" for i in range(4)),
        *(f"two:{i},{2 + i},{4 + i},{6 + i} > four:{i},{2 + i},{4 + i},{6 + i}" for i in range(2)),
        *(f"four:{i},{2 + i},{4 + i},{6 + i} > head:{i},{2 + i},{4 + i},{6 + i}" for i in range(2)),
    }
    check(model, free)


def test_grouped_convolution_with_channel_shuffle():
    """Grouped, shuffled, grouped: the channels of group 0 are spread over all groups of the second."""
    model = seq(
        a=conv(3, 8), one=conv(8, 8, groups=2), shuffle=nn.ChannelShuffle(2), two=conv(8, 8, groups=2), head=conv(8, 4)
    )
    free = {
        *(f"a:{i},{4 + i} > one:{i},{4 + i}" for i in range(4)),
        # i and 4 + i of the first come to 2 i and 2 i + 1, and c goes with c + 4 there: {0, 1, 4, 5} and {2, 3, 6, 7}.
        "one:0,2,4,6 > two:0,1,4,5",
        "one:1,3,5,7 > two:2,3,6,7",
        *(f"two:{i},{4 + i} > head:{i},{4 + i}" for i in range(4)),
    }
    check(model, free)


def test_transposed_convolution():
    model = seq(
        a=conv(3, 8), up=nn.ConvTranspose2d(8, 6, 2, stride=2), bn=nn.BatchNorm2d(6), act=nn.ReLU(), head=conv(6, 4)
    )
    small = check(model, {f"a:{i} > up:{i}" for i in range(8)} | {f"up:{i} > head:{i} | bn:{i}" for i in range(6)})
    assert small.model.up.weight.shape == (4, 3, 2, 2)


def test_transposed_convolution_in_groups():
    model = seq(a=conv(3, 8), up=nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), head=conv(12, 4))
    free = {f"a:{i},{4 + i} > up:{i},{4 + i}" for i in range(4)}
    check(model, free | {f"up:{i},{6 + i} > head:{i},{6 + i}" for i in range(6)})


def test_transposed_convolution_of_every_channel_by_itself():
    model = seq(a=conv(3, 8), up=nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8, bias=False), head=conv(8, 4))
    check(model, {f"a:{i} up:{i} > up:{i} head:{i}" for i in range(8)})


def test_transposed_convolution_of_every_channel_with_a_multiplier():
    model = seq(a=conv(3, 8), up=nn.ConvTranspose2d(8, 16, 3, padding=1, groups=8), head=conv(16, 4))
    check(model, {f"a:{i} up:{2 * i},{2 * i + 1} > up:{i} head:{2 * i},{2 * i + 1}" for i in range(8)})


def test_encoder_and_decoder_with_a_shortcut():
    def forward(m, x):
        x = F.relu(m.a(x))
        y = F.relu(m.b(F.max_pool2d(x, 2)))
        return m.head(torch.cat([m.up(y), x], 1))

    model = net(forward, a=conv(3, 6), b=conv(6, 8), up=nn.ConvTranspose2d(8, 5, 2, stride=2), head=conv(11, 4))
    free = {
        *(f"a:{i} > b:{i} head:{5 + i}" for i in range(6)),
        *(f"b:{i} > up:{i}" for i in range(8)),
        *(f"up:{i} > head:{i}" for i in range(5)),
    }
    check(model, free)


# Modules that are called twice, several inputs and outputs


def test_a_layer_that_reads_itself():
    model = net(lambda m, x: m.head(m.s(F.relu(m.s(m.a(x))))), a=conv(3, 8), s=conv(8, 8), head=conv(8, 4))
    check(model, {f"a:{i} s:{i} > s:{i} head:{i}" for i in range(8)})


def test_a_block_that_is_called_twice():
    def forward(m, x):
        x = m.a(x)
        return m.head(m.block(m.block(x)))

    model = net(forward, a=conv(3, 8), block=seq(s=conv(8, 8), bn=nn.BatchNorm2d(8)), head=conv(8, 4))
    check(model, {f"a:{i} block.s:{i} > block.s:{i} head:{i} | block.bn:{i}" for i in range(8)})


def test_a_layer_that_reads_two():
    model = net(
        lambda m, x: (
            m.head(m.s(m.a(x)), m.s(m.b(x))) if False else (m.head(m.s(m.a(x))), m.head2(m.s(F.max_pool2d(m.b(x), 2))))
        ),
        a=conv(3, 8),
        b=conv(3, 8),
        s=conv(8, 6),
        head=conv(6, 4),
        head2=conv(6, 4),
    )
    check(model, {f"a:{i} b:{i} > s:{i}" for i in range(8)} | {f"s:{i} > head:{i} head2:{i}" for i in range(6)})


def test_a_layer_that_reads_the_input_and_itself_freezes():
    """Its channels are those of the input, and its filters become its channels."""
    model = net(lambda m, x: m.head(m.b(m.s(F.relu(m.s(x))))), s=conv(3, 3), b=conv(3, 6), head=conv(6, 4))
    check(model, {f"b:{i} > head:{i}" for i in range(6)}, {"s": ""})


def test_a_layer_that_reads_frozen_channels_and_itself_freezes():
    def forward(m, x):
        return m.head(m.b(m.s(F.relu(m.s(m.norm(m.a(x)))))))

    model = net(forward, a=conv(3, 8), norm=nn.GroupNorm(1, 8), s=conv(8, 8), b=conv(8, 6), head=conv(6, 4))
    check(model, {f"b:{i} > head:{i}" for i in range(6)}, {"a": "norm", "s": ""})


def test_a_normalisation_that_is_shared():
    model = net(
        lambda m, x: m.head(torch.cat([m.bn(m.a(x)), m.bn(m.b(x))], 1)),
        a=conv(3, 8),
        b=conv(3, 8),
        bn=nn.BatchNorm2d(8),
        head=conv(16, 4),
    )
    check(model, {f"a:{i} b:{i} > head:{i},{8 + i} | bn:{i}" for i in range(8)})


def test_two_layers_with_one_weight():
    """Whatever is made of them: the layers around are read, and it is exact."""
    model = seq(a=conv(3, 6), b=conv(6, 8), one=conv(8, 8), two=conv(8, 8), c=conv(8, 6), d=conv(6, 5), head=conv(5, 4))
    model.two.weight = model.one.weight
    free = {
        *(f"a:{i} > b:{i}" for i in range(6)),
        *(f"c:{i} > d:{i}" for i in range(6)),
        *(f"d:{i} > head:{i}" for i in range(5)),
    }
    check(model, free, at_least=True)


def test_two_inputs():
    model = net(lambda m, x, z: m.head(m.a(x) + m.b(z)), a=conv(3, 8), b=conv(2, 8), head=conv(8, 4))
    inputs = (torch.randn(2, 3, 8, 8), torch.randn(2, 2, 8, 8))
    check(model, {f"a:{i} b:{i} > head:{i}" for i in range(8)}, inputs=inputs)


def test_a_gate_that_is_an_input_freezes():
    model = net(lambda m, x, z: m.head(m.b(m.a(x)) * z), a=conv(3, 6), b=conv(6, 8), head=conv(8, 4))
    inputs = (torch.randn(2, *IMAGE), torch.randn(2, 8, 1, 1))
    check(model, {f"a:{i} > b:{i}" for i in range(6)}, {"b": "mul"}, inputs=inputs)


def test_tokens_for_input():
    def forward(m, tokens):
        return m.head(m.b(F.relu(m.a(m.table(tokens).transpose(1, 2)))))

    model = net(forward, table=nn.Embedding(11, 5), a=nn.Conv1d(5, 8, 3), b=nn.Conv1d(8, 6, 3), head=nn.Conv1d(6, 4, 1))
    free = {f"a:{i} > b:{i}" for i in range(8)} | {f"b:{i} > head:{i}" for i in range(6)}
    check(model, free, inputs=(torch.randint(11, (2, 9)),), at_least=True)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda one, two: (one, two),
        lambda one, two: {"one": one, "two": two},
        lambda one, two: [one, {"two": (two,)}],
    ],
)
def test_two_outputs(outputs):
    def forward(m, x):
        y = F.relu(m.a(x))
        return outputs(m.head(y), m.head2(y.mean((2, 3))))

    model = net(forward, a=conv(3, 8), head=conv(8, 4), head2=nn.Linear(8, 3))
    check(model, {f"a:{i} > head:{i} head2:{i}" for i in range(8)})


def test_features_that_are_an_output_freeze():
    def forward(m, x):
        y = m.b(F.relu(m.a(x)))
        return {"features": y, "classes": m.head(y.flatten(1))}

    model = net(forward, a=conv(3, 6), b=conv(6, 8, stride=4), head=nn.Linear(32, 4))
    check(model, {f"a:{i} > b:{i}" for i in range(6)}, {"b": "output"})


def test_an_output_that_is_a_part_of_a_layer():
    """The first two channels come out, the others go on."""

    def forward(m, x):
        y = m.a(x)
        return y[:, :2], m.head(y[:, 2:])

    model = net(forward, a=conv(3, 8), head=conv(6, 4))
    check(model, {f"a:{2 + i} > head:{i}" for i in range(6)}, {"a:0,1": "output"})


def test_the_path_that_the_example_takes():
    def forward(m, x):
        y = m.a(x)
        return m.head(F.relu(y) if float(x.abs().sum()) >= 0 else m.other(y))

    model, x = net(forward, a=conv(3, 8), other=conv(8, 8), head=conv(8, 4)).double(), torch.randn(2, *IMAGE).double()
    report = inspect(model, x)
    found = [group for group in report.groups if "a" in group.filters]
    assert [(group.filters["a"], group.channels["head"]) for group in found] == [((i,), (i,)) for i in range(8)]
    assert not any(group.frozen for group in found)
    check_exact(model, (x,), report, torch.float64)


def test_a_part_that_is_not_used():
    model = net(lambda m, x: m.head(m.a(x)), a=conv(3, 8), unused=conv(3, 5), head=conv(8, 4)).double()
    x = torch.randn(2, *IMAGE).double()
    report = inspect(model, x)
    assert {"a", "head"} <= {layer.name for layer in report.layers}
    check_exact(model, (x,), report, torch.float64)


# Operators that may be understood or not


class Write(nn.Module):
    def forward(self, y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[:, :4] += y[:, 4:]
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        rows = self.lstm(F.avg_pool2d(y, 4).flatten(2).transpose(1, 2))[0]
        return rows.transpose(1, 2).unflatten(2, (2, 2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        rows = y.flatten(2).transpose(1, 2)
        return self.attention(rows, rows, rows, need_weights=False)[0].transpose(1, 2).unflatten(2, (8, 8))


class Call(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.function(y)


OTHERS = {
    "glu": (Call(lambda y: F.glu(y, 1)), 4),
    "flip": (Call(lambda y: y.flip(1)), 8),
    "roll": (Call(lambda y: y.roll(1, 1)), 8),
    "repeat": (Call(lambda y: y.repeat(1, 2, 1, 1)), 16),
    "repeat every channel": (Call(lambda y: y.repeat_interleave(2, 1)), 16),
    "index": (Call(lambda y: y[:, [3, 1, 1, 7]]), 4),
    "index select": (Call(lambda y: y.index_select(1, torch.tensor([0, 5, 2]))), 3),
    "largest": (Call(lambda y: y.topk(3, 1).values), 3),
    "write into a slice": (Write(), 8),
    "unbind": (Call(lambda y: torch.stack([c * (i + 1) for i, c in enumerate(y.unbind(1))], 1)), 8),
    "constants per channel": (Call(lambda y: y * torch.arange(8.0).to(y)[:, None, None]), 8),
    "added constants": (Call(lambda y: y + torch.ones(1, 8, 1, 1).to(y)), 8),
    "zeros of the same shape": (Call(lambda y: torch.cat([y, torch.zeros_like(y)], 1)), 16),
    "circular padding": (Call(lambda y: F.pad(y, (1, 1, 1, 1), mode="circular")), 8),
    "padding with ones": (Call(lambda y: F.pad(y, (1, 1, 1, 1), value=1.0)), 8),
    "padding channels with ones": (Call(lambda y: F.pad(y, (0, 0, 0, 0, 2, 1), value=1.0)), 11),
    "dropping channels by padding": (Call(lambda y: F.pad(y, (0, 0, 0, 0, -2, -1))), 5),
    "unfold": (Call(lambda y: F.unfold(y, 2, stride=2).unflatten(2, (4, 4))), 32),
    "max pool with indices": (Call(lambda y: F.max_pool2d(y, 2, return_indices=True)[0]), 8),
    "bilinear grid": (Call(lambda y: F.grid_sample(y, y[:, :2].permute(0, 2, 3, 1), align_corners=False)), 8),
    "transposed positions": (Call(lambda y: y.transpose(2, 3)), 8),
    "channels for positions": (Call(lambda y: y.transpose(1, 2)), 8),
    "variance over positions": (Call(lambda y: y / (1 + y.var((2, 3), keepdim=True))), 8),
    "clamp and power": (Call(lambda y: y.clamp(-0.5, 0.5) ** 2), 8),
    "no gradient": (Call(lambda y: y.detach() * torch.tanh(y)), 8),
    "two views": (Call(lambda y: y.view(-1, 4, 2, 8, 8).sum(2)), 4),
    "einsum of every channel": (Call(lambda y: torch.einsum("bchw,bc->bchw", y, y.mean((2, 3)))), 8),
    "recurrent": (Recurrent(), 8),
    "attention": (Attention(), 8),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_layers_around_any_operator_are_read(name):
    between, channels = OTHERS[name]
    model = seq(
        a=conv(3, 6), b=conv(6, 8), between=copy.deepcopy(between), c=conv(channels, 6), act=nn.ReLU(), head=conv(6, 4)
    )
    free = {f"a:{i} > b:{i}" for i in range(6)} | {f"c:{i} > head:{i}" for i in range(6)}
    check(model, free, at_least=True)


# Plans of other than whole groups


def partial(report: Report, **dropped: list[int]) -> Plan:
    """Without these filters, or, of `layer_inputs`, without the columns of these input channels."""
    layers = {}
    for layer in report.layers:
        filters, columns = np.ones(layer.shape[0], bool), np.ones(layer.columns, bool)
        filters[dropped.get(layer.name, [])] = False
        columns.reshape(layer.shape[1] * layer.groups, -1)[dropped.get(f"{layer.name}_inputs", [])] = False
        layers[layer.name] = LayerPlan(layer.shape, filters, columns, None, layer.groups, layer.transposed)
    return Plan(layers)


def check_partial(model: nn.Module, **dropped: list[int]) -> Compacted:
    """Compaction of such a plan is exact, on inputs of either sign as well."""
    model = model.double()
    x = torch.rand(2, *IMAGE).double()
    plan = partial(inspect(model, x), **dropped)
    small, masked = compact(model, plan, x), mask(model, plan).eval()
    for inputs in (x, -x, 10 * x - 5, torch.zeros_like(x)):
        with torch.no_grad():
            expected, got = masked(inputs), small.model.eval()(inputs)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    return small


def test_a_dropped_filter_of_a_norm_group_puts_out_what_the_others_make_of_it():
    """Zero minus the mean of the group: negative on positive inputs, where the ReLU makes a constant of it."""
    model = seq(a=conv(3, 4, 1, bias=False), norm=nn.GroupNorm(2, 4), act=nn.ReLU(), head=conv(4, 2, 1))
    nn.init.ones_(model.a.weight)
    nn.init.constant_(model.norm.bias, -0.5)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None, None].expand(2, 4, 1, 1))
    assert check_partial(model, a=[0]).model.head.weight.numel() == 8


@pytest.mark.parametrize("layer", [ScaledSame(8, 6, 1), PadsItself(8, 6, 3)], ids=lambda x: type(x).__name__)
def test_constants_beside_the_zeros_that_a_layer_pads_with_itself(layer):
    """Half for a dropped filter, and zero at the border: no bias stands for that, and the filter stays."""
    small = check_partial(seq(a=conv(3, 8), act=nn.Sigmoid(), b=layer, head=conv(6, 4, 1)), a=[0, 5])
    assert small.kind == "module"
    assert small.model.a.weight.shape[0] == 8


def test_a_filter_that_nobody_reads_still_counts_in_its_norm_group():
    check_partial(seq(a=conv(3, 4), norm=nn.GroupNorm(2, 4), head=conv(4, 2)), head_inputs=[0])


@pytest.mark.parametrize("dropped", [[0], [1, 2, 3], [5, 6]])
@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Identity()], ids=str)
def test_some_of_the_filters_that_pixel_shuffle_makes_a_channel_of(pool, dropped):
    check_partial(seq(a=conv(3, 12), up=nn.PixelShuffle(2), pool=pool, head=conv(3, 2, 1)), a=dropped)


@pytest.mark.parametrize("dropped", [[0], [2], [3], [2, 3]])
def test_channels_of_pixel_unshuffle_in_pieces_that_are_not_whole(dropped):
    """A piece ends within a channel, and another is made of one channel alone, which is dropped."""

    def forward(m, x):
        p, _, q = F.pixel_unshuffle(m.a(x), 2).split([9, 4, 3], 1)
        return m.head(torch.cat([q, p], 1))

    check_partial(net(forward, a=conv(3, 4), head=conv(12, 2)), a=dropped)


def test_a_constant_for_a_layer_without_bias_in_a_graph():
    """The layer pads by reflection and has no bias to fold the constant into; its code has sizes in the way."""

    def forward(m, x):
        y = m.bn(m.a(x))
        return m.head(m.b(y.view(-1, 6, 8, 8)))

    bn = nn.BatchNorm2d(6)
    nn.init.normal_(bn.bias)
    b = conv(6, 4, bias=False, padding_mode="reflect")
    small = check_partial(net(forward, a=conv(3, 6, bias=False), bn=bn, b=b, head=conv(4, 2)), a=[0])
    assert small.kind == "graph"
    assert small.plan["b"].shape == (4, 5, 3, 3)


def test_one_branch_of_an_addition_alone():
    def forward(m, x):
        return m.head(m.a(x) + m.b(x))

    small = check_partial(net(forward, a=conv(3, 4), b=conv(3, 4), head=conv(4, 2)), a=[0, 1], b=[1, 2])
    assert small.plan["head"].shape == (2, 3, 3, 3)


def test_a_branch_that_is_dead_as_a_whole():
    def forward(m, x):
        y = m.a(x)
        return m.head(y + m.c(F.relu(m.b(y))))

    parts = {"a": conv(3, 6), "b": conv(6, 8), "c": conv(8, 6, bias=False), "head": conv(6, 4)}
    assert check_partial(net(forward, **parts), c=list(range(6))).plan.weights <= 6 * 27 + 4 * 54 + 8 * 54 // 8 + 54


# What comes out


def test_the_small_network_is_trained_and_loaded_like_any_other():
    def forward(m, x):
        x = m.a(x)
        return m.head(m.bn(x + m.dw(x)).flatten(1))

    model = net(forward, a=conv(3, 8), dw=conv(8, 8, groups=8), bn=nn.BatchNorm2d(8), head=nn.Linear(512, 4))
    x = torch.randn(2, *IMAGE)
    small = compact(model, Plan.uniform(inspect(model, x), filters=0.5), x)
    assert small.kind == "module"
    again = copy.deepcopy(small.model)
    again.load_state_dict(small.model.state_dict())
    again.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in again.parameters())
    assert type(again) is type(model)
    assert (again.a.out_channels, again.dw.in_channels, again.dw.groups, again.bn.num_features) == (4, 4, 4, 4)
    assert again.head.in_features == 256


def test_a_graph_is_trained_and_loaded_like_any_other():
    def forward(m, x):
        return m.head(F.relu(m.bn(m.a(x))).view(-1, 512))

    model = net(forward, a=conv(3, 8), bn=nn.BatchNorm2d(8), head=nn.Linear(512, 4))
    x = torch.randn(2, *IMAGE)
    small = compact(model, Plan.uniform(inspect(model, x), filters=0.5), x)
    assert small.kind == "graph"
    again = copy.deepcopy(small.model)
    again.load_state_dict(small.model.state_dict())
    mean = small.model.state_dict()["bn.running_mean"].clone()
    again.train()(torch.randn(5, *IMAGE)).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    assert not torch.equal(again.state_dict()["bn.running_mean"], mean), "the graph no longer trains its normalisation"


def test_the_given_model_is_untouched_after_an_error():
    model = seq(a=conv(3, 8), bn=nn.BatchNorm2d(8), head=conv(8, 4))
    x = torch.randn(2, *IMAGE)
    plan = Plan.uniform(inspect(model, x), filters=0.5)
    before = snapshot(model)
    with pytest.raises(Exception, match=r".+"):
        compact(model, plan, torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match="nope"):
        compact(model, Plan({"nope": plan["a"]}), x)
    assert same(before, snapshot(model))
