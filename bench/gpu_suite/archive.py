"""The raw results and logs of the GPU suite as one file: a machine gives back few files, and none above a size."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

ARCHIVE = "results.tar.gz"
LARGEST = 15 << 20  # bytes; 16 MiB come back
_MOST_COMPRESSION = 16  # of what programs print


def pack(folder: Path, archive: Path, largest: int = LARGEST) -> list[str]:
    """Write all files below ``folder`` to ``archive``, at once or not at all. Names of those left out for their size.

    The largest files are left out until the rest is no more than ``largest`` bytes, compressed; those that cannot
    become so small are not tried.
    """
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=_size)
    left_out: list[str] = []
    while files and _size(files[-1]) > _MOST_COMPRESSION * largest:
        left_out.append(str(files.pop().relative_to(folder)))
    while len(content := _packed(folder, files)) > largest and files:
        left_out.append(str(files.pop().relative_to(folder)))
    partial = archive.with_name(f".{archive.name}.partial")
    partial.write_bytes(content)
    partial.replace(archive)
    return left_out


def _size(path: Path) -> int:
    return path.stat().st_size


def _packed(folder: Path, files: Sequence[Path]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=6) as archive:
        for path in files:
            archive.add(path, arcname=str(path.relative_to(folder)))
    return content.getvalue()
