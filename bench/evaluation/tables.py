"""Rows for people, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from bench.evaluation.summary import Row


def results_table(found: Sequence[Row], title: str) -> Table:
    """A section for each data set. times: faster than plain decoding; half: the middle one of the answers; holds:
    share of drafted tokens; model: what is predicted over what was measured.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for index, column in enumerate(_NARROW):
        table.add_column(column, no_wrap=True, justify="right" if index else "left")
    data_set = None
    for row in found:
        if row.data_set != data_set:
            table.add_section()
            table.add_row(row.data_set)
            data_set = row.data_set
        table.add_row(row.setup, *cells(row))
    return table


COLUMNS = ("setup", "tok/s", "speedup", "middle half", "holds", "predicted", "score")
_NARROW = ("setup", "tok/s", "times", "half", "holds", "model", "score")  # the same, for 80 columns


def cells(row: Row) -> list[str]:
    """Of COLUMNS behind the first."""
    half = "-" if row.speedup_low is None else f"{row.speedup_low:.2f}-{row.speedup_high:.2f}"
    return [
        f"{row.tok_s:.1f}", _number(row.speedup, ".2f"), half, _number(row.acceptance, ".2f"),
        _number(row.predicted_off, "+.0%"), _number(row.score, ".2f"),
    ]  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
