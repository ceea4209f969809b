"""The command `autocompress`."""

from __future__ import annotations

import sys

__all__ = ["app"]

# module -> the extra that installs it
_EXTRAS = {
    "torch": "torch",
    "PIL": "images",
    "onnx": "onnx",
    "typer": "demo",
    "rich": "demo",
    "sklearn": "demo",
    "matplotlib": "demo",
}


def app() -> None:
    """Run the command line; one clear line where an optional package is missing."""
    try:
        from autocompress_fast.cli.commands import commands
    except ModuleNotFoundError as error:
        if (advice := missing_package(error)) is None:
            raise
        sys.exit(f"error: {advice}")
    commands()


def missing_package(error: ImportError) -> str | None:
    """What to install, when the module that could not be imported belongs to one of the extras.

    Example:
        >>> missing_package(ModuleNotFoundError(name="torch"))
        "this needs torch, which is not installed: pip install 'autocompress-fast[torch]'"
    """
    module = (error.name or "").partition(".")[0]
    if module not in _EXTRAS:
        return None
    return f"this needs {module}, which is not installed: pip install 'autocompress-fast[{_EXTRAS[module]}]'"
