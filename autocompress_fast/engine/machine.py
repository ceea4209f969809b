"""What the engine knows of the machine that it runs on, and where it keeps what it has measured of it."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

__all__ = ["cache_directory", "processor", "second_level_cache"]


@cache
def second_level_cache() -> int:
    """Bytes of the second-level cache of a processor; 1 MiB where the system does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**20


@cache
def processor() -> str:
    """What the operating system calls the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_directory() -> Path:
    """Where measurements are kept: $XDG_CACHE_HOME/autocompress_fast, or ~/.cache/autocompress_fast."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "autocompress_fast"
