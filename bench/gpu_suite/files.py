"""Files that an interruption never leaves torn."""

from __future__ import annotations

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
