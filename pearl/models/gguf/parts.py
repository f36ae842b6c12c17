"""A model's GGUF file, or all numbered parts of it (``NAME-00001-of-00003.gguf``), read as one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pearl.errors import ModelLoadError
from pearl.models.gguf.header import Header, StoredTensor, read_header

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def part_names(name: str) -> list[str]:
    """Names of all parts of the file that ``name`` is the first of, or ``name`` alone. ModelLoadError: a later one."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    if int(match["number"]) != 1:
        raise ModelLoadError(
            f"{name} is a later part of a model; give the first, {match['name']}-00001-of-{match['count']}.gguf"
        )
    return [f"{match['name']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]


def read_parts(first: Path) -> tuple[Mapping[str, Any], dict[str, StoredTensor]]:
    """The first part's metadata and all parts' tensors. Raises ModelLoadError or UnsupportedModelError."""
    header = read_header(first)
    count = header.metadata.get("split.count", 0)
    names = part_names(first.name)
    if count > 1 and len(names) != count:
        raise ModelLoadError(
            f"{first} is the first of {count} parts (split.count), which are found by their names: call them "
            f"NAME-00001-of-{count:05}.gguf and so on"
        )
    tensors = dict(header.tensors)
    for number, name in enumerate(names[1:], start=1):
        part = _read_part(first.with_name(name), number, len(names))
        if twice := tensors.keys() & part.tensors.keys():
            raise ModelLoadError(f"{first.with_name(name)} holds tensor {min(twice)!r}, as an earlier part does")
        tensors |= part.tensors
    total = header.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ModelLoadError(f"{first} and its parts hold {len(tensors)} tensors, not {total} (split.tensors.count)")
    return header.metadata, tensors


def _read_part(file: Path, number: int, count: int) -> Header:
    if not file.is_file():
        raise ModelLoadError(f"{file} is missing, one of the model's {count} parts; download it too")
    header = read_header(file)
    found = header.metadata.get("split.no"), header.metadata.get("split.count")
    if found != (number, count):
        raise ModelLoadError(
            f"{file} calls itself part {found[0]} of {found[1]} (split.no, split.count); download it again"
        )
    return header
