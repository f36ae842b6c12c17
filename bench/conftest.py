"""Options of ``pytest bench``, and the table that it ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

SIZES = ("tiny", "small", "real")
_COLUMNS = ("operator", "shape", "dtype", "who", "us", "GB/s", "of limit", "vs user's")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pearl kernels")
    group.addoption(
        "--shapes",
        choices=SIZES,
        help="real: as in 8B models, up to batch 32 and 32k tokens; small: what a CPU core can do in minutes; "
        "tiny: to try the benchmarks. Default: real on CUDA, small on CPU",
    )
    group.addoption("--device", choices=("cpu", "cuda"), help="Default: cuda if there is one")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernel(op, shapes, rivals, dtypes): one operator, every contender, every shape")
    config.option.benchmark_quiet = True  # our table instead; --benchmark-json has everything


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [b.extra_info for b in getattr(session, "benchmarks", ()) if b and "gb_s" in b.extra_info]
    if rows:
        console = Console(width=max(terminalreporter._tw.fullwidth, 132), no_color=not terminalreporter.hasmarkup)
        with console.capture() as text:
            console.print(summary(rows))
        terminalreporter.ensure_newline()
        terminalreporter.write(text.get())


def summary(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a measurement. "vs user's": how many times faster than the fastest of what a user would call instead."""
    devices, timings = sorted({row["device"] for row in rows}), sorted({row["timing"] for row in rows})
    table = Table(title=f"{', '.join(devices)}: a call, median; {'; '.join(timings)}", box=box.SIMPLE_HEAD)
    for index, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if index > 3 else "left", no_wrap=True)
    keys = [(row["op"], row["shape"], row["dtype"].removeprefix("torch.")) for row in rows]
    for index, (key, row) in enumerate(zip(keys, rows, strict=True)):
        rivals = [r["seconds"] for k, r in zip(keys, rows, strict=True) if k == key and r["role"] == "rival"]
        first = index == 0 or key != keys[index - 1]
        if first and index:
            table.add_section()
        table.add_row(
            *(key if first else [""] * len(key)),
            escape(row["contender"]),
            f"{row['seconds'] * 1e6:,.1f}",
            f"{row['gb_s']:,.1f}",
            f"{row['share_of_limit']:.0%}",
            f"{min(rivals) / row['seconds']:.2f}x" if rivals and row["role"] == "provider" else "",
            style="dim" if row["role"] == "rival" else None,
        )
    return table
