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
    from autocompress_fast.config import show_config as show_config
    from autocompress_fast.engine import Engine as Engine
    from autocompress_fast.engine import FileFormatError as FileFormatError
    from autocompress_fast.engine import compile as compile
    from autocompress_fast.engine import load as load

__version__ = _core.__version__

# name -> the module that defines it. A new public name goes here, into __all__, and into the imports for type checkers.
_LAZY = {
    "show_config": "config",
    "Engine": "engine",
    "FileFormatError": "engine",
    "compile": "engine",
    "load": "engine",
}
_SUBMODULES: tuple[str, ...] = ("data", "engine", "models")

__all__ = [
    "Engine",
    "FileFormatError",
    "__version__",
    "compile",
    "data",
    "engine",
    "load",
    "models",
    "show_config",
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
