"""Programs as files: one safetensors file with the program and what people want to know in its metadata.

Reading needs numpy and safetensors alone and treats the file as a stranger's: nothing in it is executed, and every
number is checked before it is used. docs/acf-format.md describes the format.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
import safetensors.numpy

from autocompress_fast._files import write_atomically
from autocompress_fast.engine import packing
from autocompress_fast.engine.program import (
    MAX_FLOAT,
    Program,
    StepInfo,
    is_narrow,
    program_from_json,
    program_to_json,
    rounds_residual,
    validate,
)

__all__ = ["FORMAT_VERSION", "METADATA_KEY", "FileFormatError", "check_info", "read", "size", "write"]

METADATA_KEY: Final = "autocompress_fast"
FORMAT_VERSION: Final = 4

MAX_BYTES: Final = 2**32
"""Of a file: more than all weights and values that may be needed take."""
MAX_INFO_BYTES: Final = 2**20
_MAX_INFO_DEPTH: Final = 16
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype(np.float32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
}


class FileFormatError(ValueError):
    """A file is no valid program; the message names the file and the fault."""


def write(path: str | Path, program: Program, info: dict[str, Any]) -> None:
    """Write `program` and `info` to `path` in one step: a reader sees the old file or the whole new one.

    Raises:
        ValueError: the program or the information is not valid; nothing is written.
    """
    infos = validate(program)
    check_info(info, program, infos)
    tensors, packed = packing.stored(program.tensors, packing.chosen(program.tensors))
    # One key: safetensors writes several in any order, and the same program should be the same file.
    metadata = {METADATA_KEY: _content(program, info, packed)}
    in_order = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    write_atomically(path, safetensors.numpy.save(in_order, metadata))


def size(program: Program, info: dict[str, Any], packed: Mapping[str, packing.Packed] | None = None) -> int:
    """Bytes of the file that `write` makes; of tensors and of these codes, shapes and dtypes alone count.

    Args:
        program, info: as for `write`.
        packed: the tensors that are stored as codes; those that `write` packs if not given.

    Example:
        >>> from autocompress_fast.engine.program import Input, Step
        >>> steps = (Step("activation", (0,), 1, {"activation": "relu"}),)
        >>> size(Program((Input("x", (4,)),), steps, (1,), {}), {})
        336
    """
    tensors, described = packing.stored(program.tensors, packing.chosen(program.tensors) if packed is None else packed)
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: _content(program, info, described)}}
    end = 0
    order = [np.dtype(kind) for kind in ("float32", "uint32", "uint16", "int8", "uint8")]  # of safetensors, then names
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    length = len(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + end


def _content(program: Program, info: dict[str, Any], packed: dict[str, dict[str, Any]] | None = None) -> str:
    """The text of the header: of version 1, which all releases read, where nothing is packed, nor of 8 bits."""
    needed = _needed_version(program)
    version: dict[str, Any] = {"format_version": max(needed, 2 if packed else 1)}
    if needed > 1 or packed:
        version["packed"] = packed or {}
    return json.dumps(version | {"program": program_to_json(program), "info": info}, allow_nan=False)


def _needed_version(program: Program) -> int:
    """The first that has all steps of the program."""
    if any(map(rounds_residual, program.steps)):
        return 4
    return 3 if any(map(is_narrow, program.steps)) else 1


def read(path: str | Path) -> tuple[Program, tuple[StepInfo, ...], dict[str, Any]]:
    """Read and check a whole file.

    Returns:
        The program, what each of its steps makes, and the information saved with it.

    Raises:
        FileFormatError: anything in the file is not as it must be.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
        raise FileFormatError(f"{path}: not a regular file")
    if status.st_size > MAX_BYTES:
        raise FileFormatError(f"{path}: {status.st_size} bytes; a file has at most {MAX_BYTES}")
    content = path.read_bytes()
    try:
        version, written, packed, info = _metadata(content)
        program = program_from_json(written, packing.joined(_tensors(content), packed, MAX_BYTES // 4))
        infos = validate(program)
        if version < (needed := _needed_version(program)):
            what = "residuals" if needed == 4 else "steps"
            raise ValueError(f"a file of version {version} has no {what} of 8 bits")
        check_info(info, program, infos)
    except (ValueError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise FileFormatError(f"{path}: {error}") from error
    return program, infos, info


def _metadata(content: bytes) -> tuple[int, object, object, Any]:
    """The version, the program, which tensors are packed, and the information, in the header of a file."""
    if len(content) < 8:
        raise ValueError(f"{len(content)} bytes are too few for a safetensors file")
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        raise ValueError(f"the header is said to have {length} bytes, but only {len(content) - 8} follow")
    header = _json(content[8 : 8 + length], "header")
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError("a safetensors file at best, but not one of autocompress_fast")
    written = _json(text, "metadata")
    version = written.get("format_version") if isinstance(written, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        known = f"this release reads versions 1 to {FORMAT_VERSION}"
        raise ValueError(f"format version {version!r:.20} is unknown; {known}")
    expected = {"format_version", "program", "info"} | ({"packed"} if version > 1 else set())
    if written.keys() != expected:
        raise ValueError(f"the metadata must be {', '.join(sorted(expected))}, not {sorted(written)!r:.80}")
    return version, written["program"], written.get("packed", {}), written["info"]


def _tensors(content: bytes) -> dict[str, np.ndarray[Any, Any]]:
    tensors = {}
    stored: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    for name, given in stored:
        dtype = _DTYPES.get(given["dtype"])
        if dtype is None:
            raise ValueError(f"tensor {name!r} has dtype {given['dtype']}; allowed are {', '.join(_DTYPES)}")
        tensors[name] = np.frombuffer(given["data"], dtype).reshape(given["shape"])
    return tensors


def _json(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not allowed")


def check_info(info: object, program: Program, infos: Sequence[StepInfo]) -> None:
    """Check the information that goes with a program: JSON values, some keys with a fixed meaning.

    Keys checked: ``classes`` (names of the classes, as many as the first output has entries), ``mean`` and ``std``
    (what an input was normalised by, one number per channel or one for all), ``accuracy`` (0 to 1), ``original``
    (counts before compression: ``weights``, ``conv_weights``, ``macs``) and ``provenance`` (an object). Any other key
    may hold any JSON value.

    Raises:
        ValueError: a key is not as it must be, or the whole is too large or nested too deeply.
    """
    if not isinstance(info, dict):
        raise ValueError(f"info must be a dict, not {type(info).__name__}")
    _check_json(info, "info", depth=0)
    size = len(json.dumps(info))
    if size > MAX_INFO_BYTES:
        raise ValueError(f"info has {size} bytes of JSON; at most {MAX_INFO_BYTES} are allowed")
    shapes = [given.shape for given in program.inputs] + [step.shape for step in infos]
    if "classes" in info:
        entries = math.prod(shapes[program.outputs[0]][-1:])
        classes = info["classes"]
        if not isinstance(classes, list) or len(classes) != entries or not all(isinstance(c, str) for c in classes):
            raise ValueError(f"info['classes'] must be a list of {entries} names, not {classes!r:.80}")
    for key in ("mean", "std"):
        if key in info:
            _check_normalisation(key, info[key], shapes[0])
    if "accuracy" in info and not (_is_number(info["accuracy"]) and 0 <= info["accuracy"] <= 1):
        raise ValueError(f"info['accuracy'] must be a number from 0 to 1, not {info['accuracy']!r:.80}")
    if "original" in info:
        _check_counts(info["original"])
    if not isinstance(info.get("provenance", {}), dict):
        raise ValueError(f"info['provenance'] must be a dict, not {info['provenance']!r:.80}")


def _check_json(value: object, what: str, depth: int) -> None:
    if depth > _MAX_INFO_DEPTH:
        raise ValueError(f"{what:.80} is nested more than {_MAX_INFO_DEPTH} deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{what:.80} has the key {key!r:.80}; keys must be strings")
            _check_json(item, f"{what}[{key!r}]", depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_json(item, f"{what}[{i}]", depth + 1)
    elif not (
        value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
    ):
        raise ValueError(
            f"{what:.80} is {value!r:.80}; allowed are finite numbers, strings, booleans, lists, dicts, None"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT


def _check_normalisation(key: str, value: object, shape: tuple[int, ...]) -> None:
    lengths = sorted({1, *shape[:1]})
    if not isinstance(value, list) or len(value) not in lengths or not all(_is_number(v) for v in value):
        raise ValueError(f"info[{key!r}] must be a list of {' or '.join(map(str, lengths))} numbers, not {value!r:.80}")
    if key == "std" and min(value) <= 0:
        raise ValueError(f"info['std'] must be above 0, not {value!r:.80}")


def _check_counts(counts: object) -> None:
    allowed = ("weights", "conv_weights", "macs")
    if not isinstance(counts, dict) or not all(
        key in allowed and type(value) is int and value >= 0 for key, value in counts.items()
    ):
        raise ValueError(f"info['original'] must be counts of {', '.join(allowed)}, not {counts!r:.80}")
