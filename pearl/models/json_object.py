"""JSON files of a model's folder, with sentences for what is not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pearl.errors import ModelLoadError

_LFS_POINTER = b"version https://git-lfs"


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file; {} if there is no file. Raises ModelLoadError if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = LFS_ADVICE if is_lfs_pointer(path) else f"{error}; download it again"
        raise ModelLoadError(f"{path} is not valid JSON: {reason}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a JSON {type(value).__name__}, not an object; download it again")
    return value


def is_lfs_pointer(path: Path) -> bool:
    """Whether git cloned a pointer in the file's place, for want of git-lfs."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


LFS_ADVICE = "it is a Git LFS pointer, not the file; run `git lfs pull` in the clone"
