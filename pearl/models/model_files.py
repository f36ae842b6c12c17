"""The small files of a model, in a local folder or on the hub: where they lie, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pearl.errors import ModelLoadError

LFS_ADVICE = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
_LFS_POINTER = b"version https://git-lfs"


def find_file(path: str, name: str, *, cached_only: bool = False) -> Path | None:
    """The file ``name`` of a local folder or a hub id; None if it has none, or the hub cannot be asked.

    A GGUF file is a whole model: nothing beside it is its.
    """
    if is_gguf(path):
        return None
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.exists() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, name, local_files_only=cached_only))
    except Exception:  # no such file, no such model, no network
        return None


def is_gguf(path: str) -> bool:
    """Whether a model's name is that of a GGUF file: here, or, as ``repository:file.gguf``, on the hub."""
    return not Path(path).is_dir() and (path.lower().endswith(".gguf") or Path(path).is_file())


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ModelLoadError."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror or error}") from error
    if content.startswith(_LFS_POINTER):
        raise ModelLoadError(f"{file} {LFS_ADVICE}")
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is not JSON in UTF-8: {first_line(error)}; write or download it again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} must hold a JSON object, not a {type(value).__name__}; download it again")
    return value


def read_json_if_there(file: Path) -> dict[str, Any]:
    """As ``read_json``; {} if there is no such file."""
    return read_json(file) if file.is_file() else {}


def checked_integer(name: str, value: object, least: int = 1, most: int = 2**31 - 1) -> int:
    """The value of a field. ModelLoadError if it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ModelLoadError(f"{name} must be an integer from {least} to {most}, not {value!r}")
    return value


def is_lfs_pointer(file: Path) -> bool:
    """Whether a clone without Git LFS left a pointer in place of the file."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def listed(names: Sequence[str]) -> str:
    """The first, and how many more there are."""
    return repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
