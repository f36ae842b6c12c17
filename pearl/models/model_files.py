"""The small files of a model, in a local folder or on the hub: where they lie, and their JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from pearl.errors import ModelLoadError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def download(model_id: str, name: str, *, cached_only: bool = False) -> Path:
    """A file of the hub, in its cache. Raises what the hub's client raises, which is of many kinds."""
    return Path(hf_hub_download(model_id, name, local_files_only=cached_only))


def find_file(path: str, name: str, *, cached_only: bool = False) -> Path | None:
    """The file ``name`` of a local folder or a hub id; None if it has none, or the hub cannot be asked."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.exists() else None
    try:
        return download(path, name, cached_only=cached_only)
    except Exception:  # no such file, no such model, no network
        return None


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ModelLoadError."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror or error}") from error
    if is_lfs_pointer(content):
        raise ModelLoadError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is not JSON in UTF-8: {first_line(error)}; write or download it again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a clone without Git LFS left this in place of the file."""
    return content.startswith(_LFS_POINTER)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
