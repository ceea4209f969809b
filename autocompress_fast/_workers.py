"""Calls of one function, in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

__all__ = ["Workers"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_LOOK = 1.0  # seconds after which an idle worker looks whether the process that made it is still there
_END = 5.0  # seconds that a worker has to end before it is killed


class Workers(Generic[Item, Answer]):
    """Processes that call a function, each on one thread; use as a context, at whose end they are gone.

    On Linux they are forks, as those of torch's data loaders are: the function, and the model and data that it holds,
    are there at once and need not be picklable. A fork that computes with torch on one thread needs no thread of the
    process that it was made from. Elsewhere, and once CUDA is in use, they are new interpreters: the function is
    pickled, and a script needs `if __name__ == "__main__":` around what it runs.

    Args:
        function: that is called.
        count: processes.
        method: "fork" or "spawn"; chosen as above when not given.

    Raises:
        ValueError: the function has to be pickled and cannot be.
    """

    def __init__(self, function: Callable[[Item], Answer], count: int, *, method: str | None = None) -> None:
        self.function, self.count = function, count
        self.method = method or _method()
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []

    def __enter__(self) -> Workers[Item, Answer]:
        context: Any = multiprocessing.get_context(self.method)
        try:
            for number in range(self.count):
                ours, theirs = context.Pipe()
                self.connections.append(ours)
                unused = tuple(self.connections) if self.method == "fork" else ()
                process = context.Process(
                    target=_serve, args=(theirs, self.function, os.getpid(), unused), name=f"worker {number}"
                )
                process.daemon = True
                with warnings.catch_warnings():  # of forking while there are threads: see above
                    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                    process.start()
                self.processes.append(process)
                theirs.close()
        except BaseException as error:
            self.__exit__(None, None, None)
            if isinstance(error, Exception) and self.method != "fork":
                raise ValueError(f"workers need a function that can be pickled: {error}") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(_END)
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []

    def map(self, items: Sequence[Item]) -> Iterator[Answer]:
        """The answers, in the order of the items.

        Raises:
            RuntimeError: a worker died.
            Exception: what the function raised.
        """
        waiting = iter(enumerate(items))
        busy: dict[int, int] = {}  # which item each worker has
        answers: dict[int, Answer] = {}

        def employ(worker: int) -> None:
            number, item = next(waiting, (-1, None))
            if number >= 0:
                busy[worker] = number
                try:
                    self.connections[worker].send(item)
                except OSError:
                    raise self.died(worker) from None

        for worker in range(self.count):
            employ(worker)
        for number in range(len(items)):
            while number not in answers:
                ready = wait([self.connections[worker] for worker in busy])
                for worker in [w for w in busy if self.connections[w] in ready]:
                    answers[busy.pop(worker)] = self.answer(worker)
                    employ(worker)
            yield answers.pop(number)

    def answer(self, worker: int) -> Answer:
        try:
            good, answer = self.connections[worker].recv()
        except (EOFError, OSError):
            raise self.died(worker) from None
        if not good:
            error, text = answer
            raise error from RuntimeError(f"in a worker:\n{text}")
        found: Answer = answer
        return found

    def died(self, worker: int) -> RuntimeError:
        process = self.processes[worker]
        process.join(_END)
        code = process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return RuntimeError(f"worker {worker + 1} of {self.count} died {how}; if memory was short, use fewer workers")


def _method() -> str:
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_initialized()
    return "fork" if sys.platform == "linux" and not cuda else "spawn"


def _serve(connection: Connection, function: Callable[[Any], Any], parent: int, unused: tuple[Connection, ...]) -> None:
    """What a worker does until its connection is closed or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in unused:
        other.close()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    while True:
        while not connection.poll(_LOOK):
            if os.getppid() != parent:
                return
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[bool, Any] = (True, function(item))
        except Exception as error:
            answer = (False, (error, traceback.format_exc()))
        try:
            connection.send(answer)
        except OSError:
            return
        except Exception as error:  # what was raised cannot be pickled
            connection.send((False, (RuntimeError(f"{type(error).__name__}: {error}"), traceback.format_exc())))
