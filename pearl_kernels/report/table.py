"""The table of compiled kernels, printed row by row as they are done."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pearl_kernels.report.resources import Compiled

_COLUMNS = (("sm", 4), ("registers", 9), ("shared", 16), ("spilled", 8), ("warps", 6), ("status", 8))
_DETAIL_LINES = 20


class KernelTable:
    """Rows of one width for all, whatever is in them: a kernel is shown before the next is known."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._console.print(self._table(header=True))

    def add(self, kernel: Compiled) -> None:
        table = self._table(header=False)
        table.add_row(Text(kernel.name), *_cells(kernel))
        self._console.print(table)
        detail = kernel.problem or (kernel.spilling and kernel.spills)
        if detail:
            lines = detail.splitlines()
            text = "\n".join(f"    {line}" for line in lines[:_DETAIL_LINES])
            more = f"\n    ({len(lines) - _DETAIL_LINES} more lines: --json has all)" * (len(lines) > _DETAIL_LINES)
            self._console.print(Text(text + more, style="red" if kernel.problem else "yellow"))

    def _table(self, header: bool) -> Table:
        table = Table(box=None, show_header=header, padding=(0, 2, 0, 0), pad_edge=False)
        fixed = sum(width + 2 for _, width in _COLUMNS)
        table.add_column("kernel", width=max(self._console.width - fixed - 2, 16), overflow="fold")
        for name, width in _COLUMNS:
            table.add_column(name, width=width, justify="left" if name == "status" else "right")
        return table


def _cells(kernel: Compiled) -> list[str]:
    """Shared memory is static + dynamic bytes, ``?`` what the launch decides; warps are of a multiprocessor."""
    usage = kernel.usage
    if usage is None:
        return [str(kernel.arch), *[""] * 4, "[red]failed[/]"]
    dynamic = "?" if usage.dynamic_shared is None else str(usage.dynamic_shared)
    return [
        str(kernel.arch),
        str(usage.registers),
        f"{usage.static_shared} + {dynamic}",
        str(max(usage.stack, usage.spilled)),
        ("" if usage.exact else "<= ") + str(usage.warps(kernel.arch)),
        "[red]problem[/]" if kernel.problem else "[yellow]spills[/]" if kernel.spilling else "[green]ok[/]",
    ]


def summary(kernels: list[Compiled], seconds: float) -> str:
    """One sentence about all."""
    failed = sum(kernel.usage is None for kernel in kernels)
    problems = sum(kernel.usage is not None and kernel.problem is not None for kernel in kernels)
    explained = sum(kernel.spilling and kernel.problem is None for kernel in kernels)
    return (
        f"{len(kernels)} kernels in {seconds:.0f} s: {failed} not compiled, {problems} with a problem, "
        f"{explained} with spills that are explained."
    )
