"""Makes trained convolutional networks many times smaller and really faster on a CPU.

Everything public is an attribute of this package and is imported when first used, so that a program that only runs a
compressed file pays for nothing else: importing the package never imports torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

try:
    from autocompress_fast import _core
except ImportError as error:
    raise ImportError(
        f"autocompress_fast in {__path__[0]} has no native module that fits this Python ({error}). "
        "Install the package with 'pip install .' in its source tree, and start Python elsewhere: "
        "in the source tree the folder autocompress_fast hides the installed package."
    ) from error

if TYPE_CHECKING:
    from autocompress_fast import data as data
    from autocompress_fast import engine as engine
    from autocompress_fast import models as models
    from autocompress_fast import ops as ops
    from autocompress_fast._baked import baked as baked
    from autocompress_fast.admm import ADMM as ADMM
    from autocompress_fast.admm import Constraint as Constraint
    from autocompress_fast.admm import RhoSchedule as RhoSchedule
    from autocompress_fast.compact import compact as compact
    from autocompress_fast.config import show_config as show_config
    from autocompress_fast.engine import Engine as Engine
    from autocompress_fast.engine import FileFormatError as FileFormatError
    from autocompress_fast.engine import compile as compile  # noqa: A004  acf.compile
    from autocompress_fast.engine import load as load
    from autocompress_fast.engine.narrow import quantize as quantize
    from autocompress_fast.engine.simulation import simulate as simulate
    from autocompress_fast.graph import inspect as inspect
    from autocompress_fast.latency import LatencyModel as LatencyModel
    from autocompress_fast.meter import Meter as Meter
    from autocompress_fast.pipeline import Recipe as Recipe
    from autocompress_fast.pipeline import compress as compress
    from autocompress_fast.pipeline import train as train
    from autocompress_fast.plan import FixedParameters as FixedParameters
    from autocompress_fast.plan import MaskedParameters as MaskedParameters
    from autocompress_fast.plan import Plan as Plan
    from autocompress_fast.plan import mask as mask
    from autocompress_fast.purify import purify as purify
    from autocompress_fast.quantize import LevelConstraint as LevelConstraint
    from autocompress_fast.quantize import LevelParameters as LevelParameters
    from autocompress_fast.rates import Target as Target
    from autocompress_fast.rates import allocate as allocate
    from autocompress_fast.report import plot_search as plot_search
    from autocompress_fast.search import Search as Search
    from autocompress_fast.search import quick_score as quick_score
    from autocompress_fast.shrink import Shrinkage as Shrinkage
    from autocompress_fast.shrink import ShrunkParameters as ShrunkParameters
    from autocompress_fast.shrink_groups import GroupShrinkage as GroupShrinkage
    from autocompress_fast.shrink_groups import ShrunkGroups as ShrunkGroups
    from autocompress_fast.shrink_groups import largest_columns_left as largest_columns_left
    from autocompress_fast.training import Trainer as Trainer
    from autocompress_fast.training import TrainingConfig as TrainingConfig
    from autocompress_fast.training import evaluate as evaluate
    from autocompress_fast.unused import unused_paths as unused_paths

__version__ = _core.__version__

# name -> the module that defines it. A new public name goes here, into __all__, and into the imports for type checkers.
_LAZY = {
    "ADMM": "admm",
    "Constraint": "admm",
    "Engine": "engine",
    "FileFormatError": "engine",
    "GroupShrinkage": "shrink_groups",
    "LatencyModel": "latency",
    "LevelConstraint": "quantize",
    "FixedParameters": "plan",
    "LevelParameters": "quantize",
    "MaskedParameters": "plan",
    "Meter": "meter",
    "Plan": "plan",
    "Recipe": "pipeline",
    "RhoSchedule": "admm",
    "Search": "search",
    "Shrinkage": "shrink",
    "ShrunkGroups": "shrink_groups",
    "ShrunkParameters": "shrink",
    "Target": "rates",
    "Trainer": "training",
    "TrainingConfig": "training",
    "allocate": "rates",
    "baked": "_baked",
    "compact": "compact",
    "compile": "engine",
    "compress": "pipeline",
    "evaluate": "training",
    "inspect": "graph",
    "largest_columns_left": "shrink_groups",
    "load": "engine",
    "mask": "plan",
    "plot_search": "report",
    "purify": "purify",
    "quantize": "engine.narrow",
    "quick_score": "search",
    "show_config": "config",
    "simulate": "engine.simulation",
    "train": "pipeline",
    "unused_paths": "unused",
}
_SUBMODULES: tuple[str, ...] = ("data", "engine", "models", "ops")

__all__ = [
    "ADMM",
    "Constraint",
    "Engine",
    "FileFormatError",
    "FixedParameters",
    "GroupShrinkage",
    "LatencyModel",
    "LevelConstraint",
    "LevelParameters",
    "MaskedParameters",
    "Meter",
    "Plan",
    "Recipe",
    "RhoSchedule",
    "Search",
    "Shrinkage",
    "ShrunkGroups",
    "ShrunkParameters",
    "Target",
    "Trainer",
    "TrainingConfig",
    "__version__",
    "allocate",
    "baked",
    "compact",
    "compile",
    "compress",
    "data",
    "engine",
    "evaluate",
    "inspect",
    "largest_columns_left",
    "load",
    "mask",
    "models",
    "ops",
    "plot_search",
    "purify",
    "quantize",
    "quick_score",
    "show_config",
    "simulate",
    "train",
    "unused_paths",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        value = getattr(importlib.import_module(f"autocompress_fast.{_LAZY[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"autocompress_fast.{name}")
    else:
        raise AttributeError(f"module 'autocompress_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps functions such as acf.compact, whose module has the same name, from being replaced by that module.

    When a submodule is imported, Python sets it as an attribute of its package, no matter what the name meant before.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
