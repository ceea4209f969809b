"""Purification: removing what contributes nothing (P-RM, arXiv 1905.00136, Algorithm 1: unused paths)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autocompress_fast.graph import Layer, Report
from autocompress_fast.plan import LayerPlan, Plan

__all__ = ["unused_paths"]


def unused_paths(plan: Plan, report: Report) -> Plan:
    """Drop every path through the network that is dead at one end, to a fixed point.

    Forwards: a filter without any weight feeds an empty channel to the next layer, whose columns for it do nothing.
    Backwards: a channel of which no column is left is read by nobody, so the filter that makes it does nothing.
    Layers that the plan does not name count as kept whole. The result keeps a subset of what `plan` keeps; the masked
    network computes the same with both when an empty filter puts out zero (its bias and normalisation are dropped with
    it, and the activation maps 0 to 0); `compact` folds the constant forward where it does not. Filters that cannot be
    cut out (of the output layer, or in front of an addition) are left as the plan has them.

    Args:
        plan: what is kept.
        report: of `acf.inspect`, on the network that the plan is for.

    Returns:
        a plan for all layers of the report.

    Raises:
        ValueError: nothing would be left of a layer, or the plan is for other layers than the report's.

    Example:
        >>> import numpy as np, torch
        >>> from autocompress_fast.graph import inspect
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> plan = Plan.from_masks({"0": np.array([[1, 1, 0], [0, 0, 0]]), "2": np.ones((2, 2))})
        >>> unused_paths(plan, inspect(model, torch.zeros(1, 3)))["2"].columns.tolist()
        [True, False]
    """
    layers = whole(plan, report)
    order = [layer for layer in report.layers if layer.link is not None]
    while True:
        before = sum(layer.weights for layer in layers.values())
        for layer in report.layers:
            layers[layer.name] = without_empty(layer, layers[layer.name])
        for producer in order:
            assert producer.link is not None
            consumer = producer.link.consumer
            used = layers[consumer].columns.reshape(producer.shape[0], -1).any(axis=1)
            alive = layers[producer.name].filters & used
            columns = layers[consumer].columns & np.repeat(alive, layers[consumer].columns.size // alive.size)
            layers[producer.name] = replace(layers[producer.name], filters=alive)
            layers[consumer] = replace(layers[consumer], columns=columns)
        if sum(layer.weights for layer in layers.values()) == before:
            return Plan({layer.name: layers[layer.name] for layer in report.layers}).tied(report)


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
    return {
        layer.name: plan[layer.name] if layer.name in plan else LayerPlan.dense(layer.shape, layer.groups)
        for layer in report.layers
    }


def without_empty(layer: Layer, kept: LayerPlan) -> LayerPlan:
    """The layer's plan without the columns, and the filters that can be cut out, in which no weight is left.

    Raises:
        ValueError: no weight is left.
    """
    seen = LayerPlan.from_mask(kept.mask(), kept.groups)
    if not seen.filters.any():
        raise ValueError(f"nothing would be left of layer {layer.name!r}: the network would be a constant")
    return replace(kept, filters=kept.filters if layer.link is None else seen.filters, columns=seen.columns)
