"""Weights from checkpoint files, read without running anything that is in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


@dataclass(frozen=True)
class Loaded:
    """Names that did not meet: the model keeps its values of `missing` ones, those `unexpected` in it are unused."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_pretrained(model: nn.Module, path: str | Path, *, strict: bool = True) -> Loaded:
    """Fill `model` with the weights in a .safetensors file or in one that torch.save wrote.

    A torch file is read with weights_only=True: it holds tensors and plain containers or it is refused. A state_dict
    inside a dict (under "state_dict", "model_state_dict", "model", "net") is found, and the prefixes "module." and
    "_orig_mod." are dropped. Batch counters, which old files lack, may be missing.

    Args:
        model: changed in place, on whatever device it is.
        path: the file.
        strict: all names must meet; otherwise those that do are loaded, and the result lists the others.

    Raises:
        ValueError: the file is missing, damaged or unsafe; or names or shapes do not fit. The model is unchanged then.

    Example:
        >>> import tempfile
        >>> from autocompress_fast import models
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": models.create("lenet_digits").state_dict()}, f"{folder}/digits.pt")
        ...     load_pretrained(models.create("lenet_digits"), f"{folder}/digits.pt")
        Loaded(missing=(), unexpected=())
    """
    own = model.state_dict()
    given = {
        name if name in own else _without_prefixes(name): tensor
        for name, tensor in _read_state_dict(Path(path)).items()
    }
    counters = {name for name in own if name.endswith(".num_batches_tracked")}
    missing = [name for name in own if name not in given and name not in counters]
    unexpected = [name for name in given if name not in own]
    fitting = {name: tensor for name, tensor in given.items() if name in own}
    wrong = [
        f"{name} is {tuple(tensor.shape)}, the model's {tuple(own[name].shape)}"
        for name, tensor in fitting.items()
        if tensor.shape != own[name].shape
    ]
    problems = [f"shapes differ: {_some(wrong)}"] if wrong else []
    if strict:
        problems += [f"missing: {_some(missing)}"] if missing else []
        problems += [f"unexpected: {_some(unexpected)}"] if unexpected else []
    if problems:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    if not fitting:
        raise ValueError(f"{path} has no weight of {type(model).__name__}: unexpected: {_some(unexpected)}")
    model.load_state_dict(fitting, strict=False)
    return Loaded(tuple(missing), tuple(unexpected))


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a checkpoint file, found none")
    content: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path}: expected a state_dict of tensors, which is not read ({type(error).__name__}: {reason})"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: expected a state_dict, found {type(content).__name__} without names")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: expected tensors by name, found {type(value).__name__} at {name!r}")
    return dict(content)


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
