"""Markdown tables and numbers of the GPU suite's summary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: Sequence[int] = ()) -> str:
    """Columns stand right, but for those numbered in ``left``."""
    marks = ["---" if index in left else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in (head, marks, *rows))


def _cell(value: Any) -> str:
    """A bar or a line break would end it."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def number(value: float | None) -> str:
    """Three digits at least."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(value: float | None) -> str:
    """With a decimal: 79.7% misses an aim of 80%."""
    return "-" if value is None else f"{value:.1%}"
