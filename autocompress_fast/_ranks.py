"""Calls of one function, spread over the ranks of torch.distributed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

__all__ = ["Ranks"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Ranks(Generic[Item, Answer]):
    """The processes of torchrun, all of which call the same in the same order; use as `Workers`.

    Args:
        function: that is called.

    Raises:
        RuntimeError: torch.distributed is not initialized.
    """

    def __init__(self, function: Callable[[Item], Answer]) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError('workers="ranks" needs torch.distributed: call init_process_group first, under torchrun')
        self.function, self.rank, self.count = function, dist.get_rank(), dist.get_world_size()

    def __enter__(self) -> Ranks[Item, Answer]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def map(self, items: Sequence[Item]) -> Iterator[Answer]:
        """The answers, in the order of the items, of which each rank works on its share.

        Raises:
            RuntimeError: the function raised on a rank; with what it said, on all ranks.
        """
        own = [_answer(self.function, item) for item in items[self.rank :: self.count]]
        parts = self._gathered(own)
        for number in range(len(items)):
            good, found = parts[number % self.count][number // self.count]
            if not good:
                raise RuntimeError(f"on rank {number % self.count}:\n{found}")
            yield found

    def of_first(self, function: Callable[[], Any]) -> Any:
        """What the function returns on rank 0, where alone it is called.

        Raises:
            RuntimeError: it raised there; with what it said, on all ranks.
        """
        import torch.distributed as dist

        said = [_answer(lambda _: function(), None) if self.rank == 0 else None]
        dist.broadcast_object_list(said)
        assert said[0] is not None
        good, found = said[0]
        if not good:
            raise RuntimeError(f"on rank 0:\n{found}")
        return found

    def _gathered(self, own: Any) -> list[Any]:
        import torch.distributed as dist

        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, own)
        return parts


def _answer(function: Callable[[Any], Any], item: Any) -> tuple[bool, Any]:
    try:
        return True, function(item)
    except Exception:  # the other ranks would wait for ever
        return False, traceback.format_exc()
