"""The channel graph: a model's layers, and which of their channels live and die together."""

from autocompress_fast.graph.channels import DATA, Channels
from autocompress_fast.graph.operators import oriented
from autocompress_fast.graph.report import Counts, Frozen, Group, Kind, Layer, Report, Set, inspect
from autocompress_fast.graph.selection import Pattern, matched

__all__ = [
    "DATA",
    "Channels",
    "Counts",
    "Frozen",
    "Group",
    "Kind",
    "Layer",
    "Pattern",
    "Report",
    "Set",
    "inspect",
    "matched",
    "oriented",
]
