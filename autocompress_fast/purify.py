"""Purification: removing what contributes nothing (P-RM, arXiv 1905.00136, Algorithm 1: unused paths)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autocompress_fast.graph import Report
from autocompress_fast.plan import LayerPlan, Plan

__all__ = ["unused_paths"]


def unused_paths(plan: Plan, report: Report) -> Plan:
    """Drop every path through the network that is dead at one end, to a fixed point.

    Forwards: a filter without any weight feeds an empty channel to the next layer, whose columns for it do nothing.
    Backwards: a channel of which no column is left is read by nobody, so the filter that makes it does nothing.
    Layers that the plan does not name count as kept whole. The result keeps a subset of what `plan` keeps; the masked
    network computes the same with both when an empty filter puts out zero (its bias and normalisation are dropped with
    it, and the activation maps 0 to 0); `compact` folds the constant forward where it does not.

    Raises:
        ValueError: nothing would be left of a layer.

    Example:
        >>> import numpy as np, torch
        >>> from autocompress_fast.graph import inspect
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> plan = Plan.from_masks({"0": np.array([[1, 1, 0], [0, 0, 0]]), "2": np.ones((2, 2))})
        >>> unused_paths(plan, inspect(model, torch.zeros(1, 3)))["2"].columns.tolist()
        [True, False]
    """
    layers = {layer.name: LayerPlan.dense(layer.shape, layer.groups) for layer in report.layers}
    layers.update(plan)
    order = [layer for layer in report.layers if layer.link is not None]
    while True:
        before = sum(layer.weights for layer in layers.values())
        for layer in report.layers:
            layers[layer.name] = _without_empty(layer.name, layers[layer.name])
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


def _without_empty(name: str, layer: LayerPlan) -> LayerPlan:
    """Filters and columns in which no weight is left are dropped."""
    seen = LayerPlan.from_mask(layer.mask(), layer.groups)
    if not seen.filters.any():
        raise ValueError(f"nothing would be left of layer {name!r}: the network would be a constant")
    return replace(layer, filters=seen.filters, columns=seen.columns)
