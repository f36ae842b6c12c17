"""The header of a GGUF file: its metadata, and where its tensors lie.

Nothing is read from beyond the file's end or believed before it is checked: a file that was cut off or is none is
refused here, before any of its bytes is taken for a weight.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.gguf.package import TensorType, tensor_type
from pearl.models.model_files import LFS_ADVICE, is_lfs_pointer

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_ALIGNMENT = "general.alignment"
_DAMAGED = "it is damaged or was cut off; download it again"
# By their codes: u8, i8, u16, i16, u32, i32, f32, bool, (8 text), (9 array), u64, i64, f64.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _TEXT, _ARRAY = 7, 8, 9
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class StoredTensor:
    """``shape`` as torch has it: rows first. The bytes are ``data[begin:end]``."""

    name: str
    kind: TensorType
    shape: tuple[int, ...]
    data: mmap.mmap
    begin: int
    end: int


class Texts:
    """An array of texts, which is decoded when it is asked for: vocabularies have many."""

    def __init__(self, data: mmap.mmap, begin: int, count: int) -> None:
        self._data, self._begin, self._count = data, begin, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        """Raises UnicodeDecodeError."""
        at = self._begin
        for _ in range(self._count):
            (size,) = struct.unpack_from("<Q", self._data, at)
            yield self._data[at + 8 : at + 8 + size].decode()
            at += 8 + size


@dataclass(frozen=True)
class Header:
    """``metadata``: int, float, bool and str; arrays are tuples of numbers, or Texts."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_header(file: Path) -> Header:
    """Raises ModelLoadError or UnsupportedModelError, which name the file and what is wrong in it."""
    try:
        with file.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise ModelLoadError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if data[:4] != _MAGIC:
        reason = "is no GGUF file: it does not begin with the letters GGUF; of other models give the folder"
        raise ModelLoadError(f"{file} {LFS_ADVICE if is_lfs_pointer(file) else reason}")
    try:
        return _Parser(data).header()
    except (ModelLoadError, UnsupportedModelError) as error:
        raise type(error)(f"{file}: {error}") from error


class _Parser:
    """Goes through the bytes once."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, len(_MAGIC)

    def header(self) -> Header:
        self._require_version()
        tensors, fields = self._number("Q", "its counts"), self._number("Q", "its counts")
        metadata: dict[str, Any] = {}
        for index in range(fields):
            name = self._text(f"the name of metadata field {index}")
            if name in metadata:
                raise ModelLoadError(f"the metadata field {name!r} is there twice; {_DAMAGED}")
            metadata[name] = self._value(self._number("I", name), name)
        places = [self._place(index) for index in range(tensors)]
        return Header(metadata, self._located(places, metadata.get(_ALIGNMENT, 32)))

    def _require_version(self) -> None:
        version = self._number("I", "its version")
        if version & 0xFFFF == 0:
            raise UnsupportedModelError("its numbers are big-endian, which is not read; take the little-endian file")
        if version not in _VERSIONS:
            raise UnsupportedModelError(
                f"it is GGUF version {version}; read are versions 2 and 3, to which llama.cpp's tools convert it"
            )

    def _take(self, size: int, what: str) -> int:
        """Where the next ``size`` bytes begin."""
        begin = self._at
        if size > len(self._data) - begin:
            raise ModelLoadError(f"the file ends within {what}; {_DAMAGED}")
        self._at = begin + size
        return begin

    def _number(self, form: str, what: str) -> Any:
        (number,) = struct.unpack_from(f"<{form}", self._data, self._take(struct.calcsize(f"<{form}"), what))
        return number

    def _text(self, what: str) -> str:
        size = self._number("Q", what)
        begin = self._take(size, what)
        try:
            return self._data[begin : begin + size].decode()
        except UnicodeDecodeError as error:
            raise ModelLoadError(f"{what} is no text in UTF-8; {_DAMAGED}") from error

    def _value(self, code: int, name: str) -> Any:
        what = f"the metadata field {name!r}"
        if code == _TEXT:
            return self._text(what)
        if code == _ARRAY:
            return self._array(what)
        if code not in _NUMBERS:
            raise ModelLoadError(f"{what} has a type that GGUF does not have ({code}); {_DAMAGED}")
        return self._number(_NUMBERS[code], what)

    def _array(self, what: str) -> Any:
        code, count = self._number("I", what), self._number("Q", what)
        if code == _TEXT:
            begin = self._at
            for _ in range(count):
                self._take(self._number("Q", what), what)
            return Texts(self._data, begin, count)
        if code not in _NUMBERS:
            raise ModelLoadError(f"{what} is an array of a type that is not read ({code}); {_DAMAGED}")
        form = np.dtype(f"<{_NUMBERS[code]}")
        begin = self._take(count * form.itemsize, what)
        return tuple(np.frombuffer(self._data, form, count, begin).tolist())

    def _place(self, index: int) -> tuple[str, TensorType, tuple[int, ...], int]:
        """A tensor's name, type and shape, and where it begins behind the header."""
        name = self._text(f"the name of tensor {index}")
        what = f"the description of tensor {name!r}"
        dimensions = self._number("I", what)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ModelLoadError(f"tensor {name!r} has {dimensions} dimensions; {_DAMAGED}")
        shape = tuple(reversed([self._number("Q", what) for _ in range(dimensions)]))
        code, begin = self._number("I", what), self._number("Q", what)
        kind = tensor_type(code)
        if kind is None:
            raise UnsupportedModelError(
                f"tensor {name!r} has type {code}, which the installed package gguf does not know; update it"
            )
        if min(shape) < 1 or shape[-1] % kind.numbers:
            raise ModelLoadError(
                f"tensor {name!r} has shape {shape}, which {kind.name} in blocks of {kind.numbers} cannot have; "
                f"{_DAMAGED}"
            )
        return name, kind, shape, begin

    def _located(
        self, places: list[tuple[str, TensorType, tuple[int, ...], int]], alignment: Any
    ) -> dict[str, StoredTensor]:
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ModelLoadError(f"{_ALIGNMENT} must be a power of two, not {alignment!r}")
        origin = -(-self._at // alignment) * alignment
        found: dict[str, StoredTensor] = {}
        last, last_name = 0, ""
        for name, kind, shape, begin in sorted(places, key=lambda place: place[3]):
            end = begin + prod(shape[:-1]) * kind.row_bytes(shape[-1])
            if name in found:
                raise ModelLoadError(f"tensor {name!r} is there twice; {_DAMAGED}")
            if begin % alignment or begin < last:
                where = f"lies over tensor {last_name!r}" if begin < last else "does not begin where one can"
                raise ModelLoadError(f"tensor {name!r} {where}; {_DAMAGED}")
            if origin + end > len(self._data):
                raise ModelLoadError(f"the file ends within tensor {name!r}; {_DAMAGED}")
            found[name] = StoredTensor(name, kind, shape, self._data, origin + begin, origin + end)
            last, last_name = end, name
        return found
