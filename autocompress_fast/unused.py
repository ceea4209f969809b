"""Unused paths: what is dead because of what was dropped, exactly (P-RM, arXiv 1905.00136, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from autocompress_fast.graph import Layer, Report
from autocompress_fast.graph.channels import DATA, OUTPUT
from autocompress_fast.plan import LayerPlan, Plan

__all__ = ["check_something_left", "kept_labels", "read_labels", "settled", "unused_paths", "whole"]

BoolArray = npt.NDArray[np.bool_]


def unused_paths(plan: Plan, report: Report) -> Plan:
    """Drop every path through the network that is dead at one end, to a fixed point.

    Forwards: a filter without any weight puts out nothing; columns of channels to which nothing arrives do nothing. A
    sum is dead when all its terms are, a product when one of its factors is. Backwards: a channel that no layer reads
    any more is needed by nobody, so the filters that make it do nothing. Layers that the plan does not name count as
    kept whole.

    The result keeps a subset of what `plan` keeps; the masked network computes the same with both when an empty filter
    puts out zero (its bias and normalisation are dropped with it, and the activation maps 0 to 0); `compact` folds the
    constant forward where it does not. Filters that cannot be cut out (of the output layer, for one) are left as the
    plan has them.

    Args:
        plan: what is kept.
        report: of `acf.inspect`, on the network that the plan is for.

    Returns:
        a plan for all layers of the report.

    Raises:
        ValueError: nothing would be left of the output layers, the plan is for other layers, or it drops weights of a
            layer that was excluded.

    Example:
        >>> import numpy as np, torch
        >>> from autocompress_fast.graph import inspect
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> plan = Plan.from_masks({"0": np.array([[1, 1, 0], [0, 0, 0]]), "2": np.ones((2, 2))})
        >>> unused_paths(plan, inspect(model, torch.zeros(1, 3)))["2"].columns.tolist()
        [True, False]
    """
    layers = settled(whole(plan, report), report, report.living_columns)
    check_something_left(layers, report, plan)
    return Plan(layers).tied(report)


def settled(
    layers: Mapping[str, LayerPlan], report: Report, living_columns: Callable[[BoolArray, str], BoolArray]
) -> dict[str, LayerPlan]:
    """What is left when empty filters, the columns that read them, and filters that nobody reads go until none is left.

    Args:
        layers: the plan of every layer of the report.
        report: on the network.
        living_columns: (labels that are alive, name of a layer) -> which of its columns stay.
    """
    layers = {layer.name: _without_empty(report, layer, layers[layer.name]) for layer in report.layers}
    while True:
        before = sum(layer.weights for layer in layers.values())
        alive = report.channels.alive(_with_weights(layers))
        for layer in report.layers:
            kept = layers[layer.name]
            columns = kept.columns & living_columns(alive, layer.name)
            if not np.array_equal(columns, kept.columns):
                layers[layer.name] = _without_empty(report, layer, replace(kept, columns=columns))
        used = report.channels.used(read_labels(layers, report))
        for layer in report.layers:
            kept = layers[layer.name]
            filters = kept.filters & used[report.labels(layer.name)]
            if not np.array_equal(filters, kept.filters):
                layers[layer.name] = _without_empty(report, layer, replace(kept, filters=filters))
        if sum(layer.weights for layer in layers.values()) == before:
            return layers


def whole(plan: Plan, report: Report) -> dict[str, LayerPlan]:
    """The plan of every layer of the report; a layer that `plan` does not name is kept whole."""
    for name, layer in plan.items():
        if name not in report:
            reason = report.skipped.get(name, "there is no such layer")
            raise ValueError(f"the plan names {name!r}, which cannot be pruned here: {reason}")
        if layer.shape != report[name].shape:
            raise ValueError(
                f"the plan of {name!r} is for a weight {layer.shape}, the model's has {report[name].shape}"
            )
        if report[name].held and layer.weights < layer.dense_weights:
            raise ValueError(f"the plan drops weights of {name!r}, which stays as it is: {report[name].held}")
    return {
        layer.name: plan[layer.name]
        if layer.name in plan
        else LayerPlan.dense(layer.shape, layer.groups, transposed=layer.transposed)
        for layer in report.layers
    }


def _with_weights(layers: dict[str, LayerPlan]) -> dict[str, BoolArray]:
    """Layer -> which filters have any weight left."""
    return {name: layer.used()[0] for name, layer in layers.items()}


def read_labels(layers: dict[str, LayerPlan], report: Report) -> BoolArray:
    """(labels,) which are read by a weight that is kept."""
    read = np.zeros(report.channels.group.size, bool)
    for layer in report.layers:
        inputs = layers[layer.name].used()[1].reshape(layer.inputs, -1).any(axis=1)
        read[report.channels.inputs[layer.name][inputs]] = True
    return read


def kept_labels(alive: Plan, report: Report) -> BoolArray:
    """(labels,) whether the group of each stays in `compact`: one filter or column of it is kept, or it cannot be cut.

    Every tensor keeps at least one entry along every dimension.
    """
    channels = report.channels
    stays = channels.frozen > 0
    stays[DATA] = True
    for layer in report.layers:
        stays[report.labels(layer.name)[alive[layer.name].filters]] = True
    stays[read_labels(dict(alive), report)] = True
    groups = np.zeros(stays.size, bool)
    groups[channels.group[stays]] = True
    # Groups of parameters and paddings alone are no channels of a layer: they stay.
    made = np.zeros(stays.size, bool)
    for layer in report.layers:
        made[channels.group[report.labels(layer.name)]] = True
    groups |= ~made
    along = [*channels.slices.values(), *channels.inputs.values()]
    while True:
        before = int(groups.sum())
        for labels in along:
            if not groups[channels.group[labels]].any():
                groups[channels.group[labels[0]]] = True
        if int(groups.sum()) == before:
            kept: BoolArray = groups[channels.group]
            return kept


def _without_empty(report: Report, layer: Layer, kept: LayerPlan) -> LayerPlan:
    """The layer's plan without the columns, and the filters that can be cut out, in which no weight is left."""
    filters, columns = kept.used()
    filters = np.where(report.frozen_filters(layer.name), kept.filters, filters)
    if np.array_equal(kept.filters, filters) and np.array_equal(kept.columns, columns):
        return kept
    return replace(kept, filters=filters, columns=columns)


def check_something_left(layers: Mapping[str, LayerPlan], report: Report, plan: Plan) -> None:
    """Raise ValueError when the network would be a constant: no weight is left of any output layer.

    Where no layer is an output (what comes after it freezes it), those count of which no filter can be cut out. The
    message names the layer that `plan` leaves nothing of, if there is one.
    """
    frozen = [layer for layer in report.layers if layer.frozen_filters]
    ends = [layer for layer in frozen if layer.frozen_filters == OUTPUT] or [
        layer for layer in frozen if not layer.held
    ]
    empty = [layer.name for layer in ends if not layers[layer.name].used()[0].any()]
    if empty and len(empty) == len(ends):
        name = next((name for name, layer in plan.items() if layer.weights == 0), empty[-1])
        raise ValueError(f"nothing would be left of layer {name!r}: the network would be a constant")
