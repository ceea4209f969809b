"""Writing files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["remove_partial", "write_atomically"]


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, flush it to the disk and rename it over `path`."""
    path = Path(path)
    descriptor, partial = tempfile.mkstemp(prefix=path.name + ".", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)  # mkstemp makes files that the owner alone can read
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def remove_partial(folder: str | Path) -> None:
    """Delete the temporary files that killed processes have left in `folder`; no other process may write there."""
    for partial in Path(folder).glob("*.????????.partial"):
        partial.unlink(missing_ok=True)
