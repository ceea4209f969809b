"""Layers that stay as they are because the user says so: patterns, and what they mean for the channels."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from autocompress_fast.graph.channels import DATA, Channels, Join

if TYPE_CHECKING:
    import torch

__all__ = ["Pattern", "hold", "matched", "shown", "to_hold"]

Pattern: TypeAlias = "str | re.Pattern[str] | type[torch.nn.Module]"
"""A module path (of a layer, or of what contains it), a glob, a regular expression, or a class of modules."""

_MOST_NAMED = 8  # layers that an error lists


def to_hold(
    layers: Collection[str],
    modules: Mapping[str, torch.nn.Module],
    select: Pattern | Sequence[Pattern] | None,
    exclude: Pattern | Sequence[Pattern] | None,
) -> dict[str, str]:
    """Layer -> why it stays as it is.

    Raises:
        ValueError: a pattern that no layer matches.
        TypeError: something that is no pattern.

    Example:
        >>> to_hold(["stem", "body.0", "body.1", "head"], {}, ["stem", "body"], "body.[1-9]")
        {'body.1': 'it is excluded (body.[1-9])', 'head': 'it is not selected'}
    """
    selected = [_matched("select", pattern, layers, modules) for pattern in _all("select", select)]
    excluded = {shown(p): _matched("exclude", p, layers, modules) for p in _all("exclude", exclude)}
    held = {}
    for name in layers:
        if by := [text for text, names in excluded.items() if name in names]:
            held[name] = f"it is excluded ({by[0]})"
        elif select is not None and not any(name in names for names in selected):
            held[name] = "it is not selected"
    return held


def shown(pattern: Pattern) -> str:
    """A pattern as it is written on the command line.

    Example:
        >>> shown("layer3.*"), shown(re.compile("fc[12]"))
        ('layer3.*', 're:fc[12]')
    """
    if isinstance(pattern, str):
        return pattern
    return f"re:{pattern.pattern}" if isinstance(pattern, re.Pattern) else f"type:{pattern.__name__}"


def hold(channels: Channels, layers: Mapping[str, str], filters: Mapping[str, int]) -> Channels:
    """The channels when these layers (name -> why) stay as they are: everything that they put out or read is frozen.

    Each of them reads labels of its own, made of those it read, which live always: none of its columns goes with what
    is dead before it, and all that feeds it is used.
    """
    if not layers:
        return channels
    group, frozen, constant = channels.group.copy(), channels.frozen.copy(), channels.constant.copy()
    reasons, inputs = list(channels.reasons), dict(channels.inputs)
    joins, read = list(channels.joins), [channels.read]
    for name, why in layers.items():
        reason = f"it is tied to a layer that {why.removeprefix('it ')}"
        if reason not in reasons:
            reasons.append(reason)
        own, reads = channels.filters(name, filters[name]), channels.inputs[name]
        touched = np.isin(group, group[np.concatenate([own, reads[reads != DATA]])])
        frozen[touched & (frozen == 0)] = reasons.index(reason)
        first = group.size
        joins.append(Join(first, np.full(reads.size, DATA), reads, "first"))  # DATA lives: so do they
        inputs[name] = np.where(reads == DATA, DATA, np.arange(first, first + reads.size))
        group, frozen = np.append(group, group[reads]), np.append(frozen, frozen[reads])
        constant = np.append(constant, np.zeros(reads.size, bool))
        read += [own, inputs[name]]
    return replace(
        channels,
        inputs=inputs,
        group=group,
        frozen=frozen,
        reasons=tuple(reasons),
        joins=tuple(joins),
        read=np.unique(np.concatenate(read)),
        constant=constant,
    )


def matched(argument: str, pattern: str, layers: Collection[str]) -> list[str]:
    """The layers that a path or a glob means.

    Raises:
        ValueError: there is none; it names the argument.

    Example:
        >>> matched("keep", "body", ["stem", "body.0", "body.1"])
        ['body.0', 'body.1']
    """
    found = _matched(argument, pattern, layers, {})
    return [name for name in layers if name in found]


def _all(argument: str, patterns: Pattern | Sequence[Pattern] | None) -> Sequence[Pattern]:
    found: list[Any] = list(patterns) if isinstance(patterns, list | tuple) else [patterns] * (patterns is not None)
    for pattern in found:
        if not isinstance(pattern, str | re.Pattern | type):
            raise TypeError(
                f"{argument} takes module paths, globs, regular expressions and classes of modules, got {pattern!r}"
            )
    return found


def _matched(
    argument: str, pattern: Pattern, layers: Collection[str], modules: Mapping[str, torch.nn.Module]
) -> set[str]:
    matched = {name for name in layers if _matches(pattern, name, modules)}
    if not matched:
        some = ", ".join(list(layers)[:_MOST_NAMED]) + (", ..." if len(layers) > _MOST_NAMED else "")
        raise ValueError(f"{argument}: no layer matches {shown(pattern)!r}; layers: {some or 'none'}")
    return matched


def _matches(pattern: Pattern, name: str, modules: Mapping[str, torch.nn.Module]) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    if isinstance(pattern, str):
        return name == pattern or name.startswith(f"{pattern}.") or (_is_glob(pattern) and fnmatchcase(name, pattern))
    parts = name.split(".")
    above = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return any(isinstance(modules[path], pattern) for path in above)


def _is_glob(text: str) -> bool:
    return any(character in text for character in "*?[]")
