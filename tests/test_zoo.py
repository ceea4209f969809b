"""Networks that others wrote: each is read, pruned by half and cut, and computes what the masked one does."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from zoo import ZOO, Entry, build, example

import autocompress_fast as acf
from autocompress_fast.graph import Report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (find_spec("timm") and find_spec("torchvision")), reason="needs timm and torchvision"),
]

_prunable: dict[Entry, float] = {}  # share of the MACs, of the networks read so far


def read(entry: Entry, model: nn.Module) -> Report:
    report = acf.inspect(model, example(entry, dtype=next(model.parameters()).dtype))
    _prunable[entry] = report.prunable_macs / report.macs
    return report


def distance(expected: torch.Tensor, value: torch.Tensor) -> float:
    assert expected.shape == value.shape
    return float((expected - value).abs().max() / expected.abs().max())


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("entry", ZOO, ids=str)
def test_half_of_a_network(entry: Entry, record_property: Callable[[str, object], None]) -> None:
    model = build(entry, dtype=torch.float64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = read(entry, model)
    record_property("prunable_macs", _prunable[entry])
    plan = acf.Plan.uniform(report, filters=0.5, columns=0.0)
    masked = acf.mask(model, plan).eval()
    compacted = acf.compact(model, plan, example(entry, dtype=torch.float64))
    record_property("kind", compacted.kind)

    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} of the model given has changed"
    for name, layer in plan.items():
        kept = torch.from_numpy(layer.weight_mask().copy())
        assert not masked.get_submodule(name).weight[~kept].any(), f"{name} is not masked"
    if size(compacted.model) == size(model):
        assert all(group.frozen for group in report.groups), "silently unchanged"

    images = example(entry, batch=3, seed=1, dtype=torch.float64)  # not what it was compacted with
    with torch.no_grad():
        expected, found = masked(images), compacted.model.eval()(images)
        assert distance(expected[:1], expected[1:2]) > 1e-6, "the output hardly depends on the input: shows no mistake"
        assert distance(expected, found) < 1e-10


def test_coverage() -> None:
    """At least 90% of the MACs can be pruned in 90% of the convolutional networks."""
    cnns = [entry for entry in ZOO if entry.cnn]
    for entry in cnns:
        if entry not in _prunable:
            read(entry, build(entry))
    short = {str(entry): round(_prunable[entry], 3) for entry in cnns if _prunable[entry] < 0.9}
    assert len(short) <= 0.1 * len(cnns), short
