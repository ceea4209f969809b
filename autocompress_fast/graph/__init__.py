"""The channel graph: which layers a model has, what of them can be pruned, and what is frozen and why."""

from autocompress_fast.graph.report import Counts, Layer, Report, inspect

__all__ = ["Counts", "Layer", "Report", "inspect"]
