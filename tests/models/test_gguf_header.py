"""Files that are no GGUF, or not whole: refused by name before any byte of them is taken for a number."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="writes files with the package gguf")

from gguf import GGUFEndian
from gguf_files import GgufFile

from pearl.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from pearl.models.gguf.header import Header, read_header

TEXTS = ["a", "", "漢字", "b" * 300]
FILE = GgufFile(
    "llama",
    {
        "llama.block_count": 3,
        "x.flag": True,
        "x.number": 0.5,
        "x.texts": TEXTS,
        "x.list": [*map(np.int32, range(5))],
    },
    {
        "one": (np.arange(6, dtype=np.float32).reshape(2, 3), "F32"),
        "two": (np.arange(68, dtype=np.uint8).reshape(2, 34), "Q8_0"),
    },
)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Path(FILE.write(tmp_path_factory.mktemp("whole") / "model.gguf")).read_bytes()


def read(folder: Path, content: bytes) -> Header:
    (folder / "model.gguf").write_bytes(content)
    return read_header(folder / "model.gguf")


def test_what_a_header_says(tmp_path: Path, content: bytes) -> None:
    header = read(tmp_path, content)
    assert header.metadata["general.architecture"] == "llama"
    assert list(header.metadata["x.texts"]) == TEXTS
    assert {name: header.metadata[name] for name in ("llama.block_count", "x.flag", "x.number", "x.list")} == {
        "llama.block_count": 3, "x.flag": True, "x.number": 0.5, "x.list": (0, 1, 2, 3, 4),
    }  # fmt: skip
    one, two = header.tensors["one"], header.tensors["two"]
    assert (one.shape, one.kind.name, two.shape, two.kind.name) == ((2, 3), "F32", (2, 32), "Q8_0")
    assert content[one.begin : one.end] == FILE.tensors["one"][0].tobytes()
    assert content[two.begin : two.end] == FILE.tensors["two"][0].tobytes()


def test_every_length_that_cuts_something_off(tmp_path: Path, content: bytes) -> None:
    """What the writer appends to the last tensor is padding."""
    whole = read(tmp_path, content).tensors["two"].end
    for size in (*range(whole - 70, whole), *range(0, whole - 70, 13)):
        with pytest.raises(
            ModelLoadError, match=r"model\.gguf:? (the file ends within|is no GGUF file|cannot be read)"
        ):
            read(tmp_path, content[:size])
    read(tmp_path, content[:whole])


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert content.count(old) == 1
        return content.replace(old, new)

    return change


def number(name: str, code: int) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", code)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], type[ConfigurationError], str]] = {
    "another format": (lambda c: b"ggjt" + c[4:], ModelLoadError, "is no GGUF file.*; of other models give the folder"),
    "a pointer to it": (
        lambda c: b"version https://git-lfs.github.com/spec/v1\n",
        ModelLoadError,
        "is a Git LFS pointer",
    ),
    "nothing": (lambda c: b"", ModelLoadError, "cannot be read"),
    "version 1": (lambda c: c[:4] + struct.pack("<I", 1) + c[8:], UnsupportedModelError, "GGUF version 1; read are"),
    "version 9": (lambda c: c[:4] + struct.pack("<I", 9) + c[8:], UnsupportedModelError, "GGUF version 9"),
    "endless tensors": (
        lambda c: c[:8] + struct.pack("<Q", 1 << 62) + c[16:],
        ModelLoadError,
        "tensor '' has 0 dimensions",
    ),
    "endless fields": (lambda c: c[:16] + struct.pack("<Q", 1 << 62) + c[24:], ModelLoadError, "metadata field"),
    "a field twice": (replaced(number("x.list", 9), number("x.flag", 9)), ModelLoadError, "is there twice"),
    "an unknown type": (
        replaced(number("x.flag", 7), number("x.flag", 77)),
        ModelLoadError,
        r"'x\.flag' has a type that GGUF does not have \(77\)",
    ),
    "an array of arrays": (
        replaced(number("x.list", 9) + struct.pack("<I", 5), number("x.list", 9) + struct.pack("<I", 9)),
        ModelLoadError,
        r"'x\.list' is an array of a type that is not read \(9\)",
    ),
    "an endless array": (
        replaced(number("x.list", 9) + struct.pack("<IQ", 5, 5), number("x.list", 9) + struct.pack("<IQ", 5, 1 << 61)),
        ModelLoadError,
        r"ends within the metadata field 'x\.list'",
    ),
    "endless texts": (
        replaced(number("x.texts", 9) + struct.pack("<IQ", 8, 4), number("x.texts", 9) + struct.pack("<IQ", 8, 1 << 9)),
        ModelLoadError,
        r"ends within the metadata field 'x\.texts'",
    ),
    "no dimension": (
        replaced(number("one", 2), number("one", 0)),
        ModelLoadError,
        "'one' has 0 dimensions",
    ),
    "half a block": (
        replaced(number("two", 2) + struct.pack("<QQ", 32, 2), number("two", 2) + struct.pack("<QQ", 48, 2)),
        ModelLoadError,
        r"'two' has shape \(2, 48\), which Q8_0 in blocks of 32",
    ),
    "too many rows": (
        replaced(number("one", 2) + struct.pack("<QQ", 3, 2), number("one", 2) + struct.pack("<QQ", 3, 1 << 60)),
        ModelLoadError,
        "the file ends within tensor 'one'",
    ),
    "one over another": (
        replaced(struct.pack("<QQIQ", 3, 2, 0, 0), struct.pack("<QQIQ", 3, 9, 0, 0)),
        ModelLoadError,
        "tensor 'two' lies over tensor 'one'",
    ),
    "no place for one": (
        replaced(struct.pack("<QQIQ", 3, 2, 0, 0), struct.pack("<QQIQ", 3, 2, 0, 4)),
        ModelLoadError,
        "tensor 'one' does not begin where one can",
    ),
    "a type to come": (
        replaced(number("one", 2) + struct.pack("<QQI", 3, 2, 0), number("one", 2) + struct.pack("<QQI", 3, 2, 999)),
        UnsupportedModelError,
        "tensor 'one' has type 999, which the installed package gguf does not know",
    ),
    "a name twice": (replaced(number("two", 2), number("one", 2)), ModelLoadError, "tensor 'one' is there twice"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, tmp_path: Path, content: bytes) -> None:
    change, kind, message = DAMAGES[damage]
    with pytest.raises(kind, match=message) as error:
        read(tmp_path, change(content))
    assert "model.gguf" in str(error.value)


def test_a_big_endian_file(tmp_path: Path) -> None:
    FILE.write(tmp_path / "model.gguf", GGUFEndian.BIG)
    with pytest.raises(UnsupportedModelError, match=r"model\.gguf: its numbers are big-endian"):
        read_header(tmp_path / "model.gguf")


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.integers(0, 450), st.integers(0, 255), min_size=1, max_size=3))
def test_any_changed_bytes_are_read_or_refused(
    changes: dict[int, int], content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    changed = bytearray(content)
    for place, value in changes.items():
        changed[place] = value
    with suppress(ConfigurationError):
        header = read(tmp_path_factory.getbasetemp(), bytes(changed))
        assert all(tensor.end <= len(content) for tensor in header.tensors.values())
