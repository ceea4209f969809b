"""The threads of numpy's own matrix products, which numpy has no call for.

A product that waits for its other threads costs many times what it computes when the processors are busy, and the
engine's own threads would each start one. OpenBLAS, which numpy's wheels bring, can be told; others are left alone.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["limited_threads"]

_lock = threading.Lock()
_users = 0
_before = 1


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Let products use at most `count` threads; back to what it was when the last of several users leaves."""
    global _users, _before
    functions = _openblas()
    if functions is None:
        yield
        return
    get, set_ = functions
    with _lock:
        _users += 1
        if _users == 1:
            _before = get()
            set_(min(count, _before))  # never more: that would start threads
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                set_(_before)


@cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """The functions that read and set the number of threads, looked up among the libraries numpy is linked to."""
    try:
        from numpy.linalg import _umath_linalg

        library = ctypes.CDLL(_umath_linalg.__file__)
    except (ImportError, OSError):
        return None
    for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("scipy_", ""), ("", "")):
        names = (f"{prefix}openblas_{verb}_num_threads{suffix}" for verb in ("get", "set"))
        get, set_ = (getattr(library, name, None) for name in names)
        if get is not None and set_ is not None:
            get.restype, get.argtypes, set_.restype, set_.argtypes = ctypes.c_int, [], None, [ctypes.c_int]
            return get, set_
    return None
