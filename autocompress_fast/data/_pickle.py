"""Reads pickles that hold numbers and names, and refuses all others before they do anything.

A pickle is a program. This reader first looks at its instructions without running them and accepts a short list; then
it lets Python's unpickler build the values, with inert stand-ins in place of every global the pickle names. No function
of numpy ever sees what the file says: arrays are made here, after checks, from the recorded type, shape and bytes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autocompress_fast.data._dataset import DataError

_ALLOWED = "numpy arrays, bytes, str, list, dict, int"
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET MEMOIZE
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    GLOBAL STACK_GLOBAL REDUCE BUILD
"""  # the last line makes arrays: a call of a known global, then a state
# Numbers of one to eight bytes; everything else, objects and records above all, is refused.
_DTYPES = frozenset({"b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"})


def load_pickle(path: Path) -> dict[str, Any]:
    """The dict in a pickle file, bytes keys as str; Python 2 pickles too.

    Raises:
        DataError: the file is missing or damaged, or holds anything but numpy arrays of numbers, bytes, str, list, dict
            and int. Nothing in it has been run.
    """
    try:
        content = path.read_bytes()
        _check_instructions(content)
        value = _finished(_Unpickler(io.BytesIO(content), encoding="latin1").load())
    except _RefusedError as error:
        raise DataError(f"{path}: expected a pickle of {_ALLOWED}, found {error}") from None
    except Exception as error:  # a damaged pickle can raise almost anything
        raise DataError(f"{path}: expected a pickle of {_ALLOWED}, found a damaged file ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a pickled dict, found {type(value).__name__}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): item for key, item in value.items()}


class _RefusedError(Exception):
    """Something that may not be in the file; the text names it."""


def _check_instructions(content: bytes) -> None:
    allowed, end = frozenset(_INSTRUCTIONS.split()), 0
    for opcode, argument, position in pickletools.genops(content):
        if opcode.name not in allowed:
            raise _RefusedError(f"the instruction {opcode.name}")
        # The unpickler makes room for as many memo entries as the largest index says.
        if "PUT" in opcode.name and not 0 <= int(argument or 0) <= len(content):
            raise _RefusedError(f"the memo index {argument}")
        end = (position or 0) + 1
    if end != len(content):
        raise _RefusedError(f"{len(content) - end} bytes behind its end")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        package = module.replace("numpy._core", "numpy.core")  # numpy 2 renamed it
        makers = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy.core.multiarray", "scalar"): _Scalar,
            ("numpy.core.numeric", "_frombuffer"): _array_of_buffer,
            ("numpy", "ndarray"): _refuse_call,
            ("numpy", "dtype"): _DType,
            ("_codecs", "encode"): _latin1,
        }
        if (package, name) not in makers:
            raise _RefusedError(f"a reference to {module}.{name}")
        return _Global(makers[package, name])


class _Global:
    """Stands in for a function or class of numpy: can be called, and has no state that a pickle could change."""

    __slots__ = ("_make",)

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("a state for a function")


class _DType:
    """numpy.dtype(code, align, copy), then (version, byte order, ...)."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code not in _DTYPES:
            raise _RefusedError(f"an array of type {code!r}")
        self.code = code
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
            raise _RefusedError(f"the type state {state!r}")
        self.order = state[1]

    def array(self, content: Any, shape: Any, *, fortran: bool) -> npt.NDArray[Any]:
        dtype = np.dtype(self.order + self.code)
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise _RefusedError(f"the shape {shape!r}")
        if isinstance(content, str):  # the str of Python 2
            content = content.encode("latin1")
        if not isinstance(content, (bytes, bytearray)) or len(content) != math.prod(shape) * dtype.itemsize:
            size = len(content) if isinstance(content, (bytes, bytearray)) else type(content).__name__
            raise _RefusedError(f"{size} as content of an array {self.code} {shape}")
        values = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="))
        return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


class _Array:
    """numpy's _reconstruct(), then the state (version, shape, dtype, is_fortran, content)."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: npt.NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _DType):
            raise _RefusedError("an array without a type of numbers")
        _, shape, dtype, fortran, content = state
        self.value = dtype.array(content, shape, fortran=bool(fortran))


class _Scalar:
    """numpy's scalar(dtype, content)."""

    __slots__ = ("value",)

    def __init__(self, dtype: Any, content: Any) -> None:
        if not isinstance(dtype, _DType):
            raise _RefusedError("a scalar without a type of numbers")
        self.value = dtype.array(content, (), fortran=False).item()


def _array_of_buffer(content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    """Protocol 5: numpy's _frombuffer(content, dtype, shape, order), and since numpy 2.3 an order of the axes."""
    if order not in ("C", "F") or axes is not None:
        raise _RefusedError(f"an array in the order {order!r}, {axes!r}")
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


def _latin1(text: Any, encoding: Any) -> bytes:
    """How protocols 0 to 2 write bytes: _codecs.encode(text, "latin1")."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


def _refuse_call(*_: Any) -> Any:
    raise _RefusedError("a call of numpy.ndarray")


def _finished(value: Any) -> Any:
    """`value` with the stand-ins in it, and in the dict or list that it is, replaced by what they stand for."""
    if type(value) is dict:
        return {
            key: [_plain(one) for one in item] if type(item) is list else _plain(item) for key, item in value.items()
        }
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (_Array, _Scalar)):
        if value.value is None:
            raise _RefusedError("an array without content")
        return value.value
    if isinstance(value, (_Global, _DType)):
        raise _RefusedError("a function or type as a value")
    return value
