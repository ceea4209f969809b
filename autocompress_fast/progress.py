"""What a long run tells the person who waits for it."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Progress", "RichProgress", "default_progress"]


class Progress:
    """Receives the course of a run; this one says nothing. Use as a context around the run."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def note(self, text: str) -> None:
        """A line that stays: a stage begins or ends, a decision was taken."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """A task of `total` steps begins, `done` of them finished before."""

    def advance(self) -> None:
        """One step is done."""

    def tell(self, text: str) -> None:
        """How the task stands."""

    def finish(self) -> None:
        """The task has ended."""


class RichProgress(Progress):
    """Progress bars with the time left (rich), and plain lines where the output is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}", style="dim"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: Any = None
        self._what = ""
        self._text = ""
        self._begun = time.monotonic()

    def __enter__(self) -> RichProgress:
        self._bars.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.__exit__(kind, error, trace)

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, highlight=False)

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Show a new bar."""
        self._what, self._text, self._begun = what, "", time.monotonic()
        self._task = self._bars.add_task(what, total=total, completed=done, text="")

    def advance(self) -> None:
        """Move the bar."""
        self._bars.update(self._task, advance=1)

    def tell(self, text: str) -> None:
        """Write beside the bar."""
        self._text = text
        self._bars.update(self._task, text=text)

    def finish(self) -> None:
        """Replace the bar by a line that stays."""
        self._bars.remove_task(self._task)
        self.note(f"{self._what}: {self._text} ({time.monotonic() - self._begun:.0f} s)")


def default_progress() -> Progress:
    """Bars where rich is installed and someone may be looking, silence otherwise."""
    try:
        import rich  # noqa: F401
    except ImportError:
        return Progress()
    return RichProgress() if sys.stderr is not None else Progress()
