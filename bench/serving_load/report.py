"""What was measured of each server at each number of clients: a table, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from bench.serving_load.closed_loop import Percentiles, Seen, percentiles

_COLOURS = ("#4a5568", "#2f855a", "#c05621", "#2b6cb0", "#805ad5", "#b7791f")


@dataclass(frozen=True)
class Cell:
    """``tok_s``: the median of the runs; ``spread``: (largest - smallest) / median. Latencies, in seconds, are those of
    all runs together."""

    contender: str
    clients: int
    runs: int
    requests: int
    requests_s: float
    tok_s: float
    spread: float
    first: Percentiles
    gaps: Percentiles
    paces: Percentiles
    client_busy: float
    wrong: int
    errors: list[str]

    @classmethod
    def of(cls, contender: str, clients: int, runs: Sequence[Seen]) -> Cell:
        speeds = [run.tokens / run.seconds for run in runs]
        middle = statistics.median(speeds)
        return cls(
            contender,
            clients,
            len(runs),
            sum(run.requests for run in runs),
            statistics.median(run.requests / run.seconds for run in runs),
            middle,
            (max(speeds) - min(speeds)) / middle if middle else 0.0,
            percentiles([value for run in runs for value in run.first]),
            percentiles([value for run in runs for value in run.gaps]),
            percentiles([value for run in runs for value in run.paces]),
            max(run.busy for run in runs),
            sum(run.wrong for run in runs),
            [error for run in runs for error in run.errors],
        )


def table(cells: Iterable[Cell], title: str) -> Table:
    """Latencies in milliseconds: p50/p95/p99."""
    rows = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for name in (
        "server",
        "clients",
        "req/s",
        "tok/s",
        "spread",
        "first token",
        "between pieces",
        "per token",
        "client",
    ):
        rows.add_column(name, justify="left" if name == "server" else "right", no_wrap=True)
    clients = None
    for cell in cells:
        if clients not in (None, cell.clients):
            rows.add_section()
        clients = cell.clients
        rows.add_row(
            cell.contender, str(cell.clients), f"{cell.requests_s:.1f}", f"{cell.tok_s:.0f}", f"{cell.spread:.0%}",
            _shown(cell.first, 0), _shown(cell.gaps, 1), _shown(cell.paces, 2), f"{cell.client_busy:.0%}",
        )  # fmt: skip
    return rows


def _shown(of: Percentiles, digits: int) -> str:
    return "/".join(f"{1e3 * value:.{digits}f}" for value in of.values()) or "-"


def draw(cells: Sequence[Cell], title: str, path: Path) -> None:
    """Tokens per second, and the wait for the first token (p50, and a thin line to p99), over the clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, wait) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    counts = sorted({cell.clients for cell in cells})
    for number, name in enumerate(dict.fromkeys(cell.contender for cell in cells)):
        mine = [cell for cell in cells if cell.contender == name and cell.first]
        colour, xs = _COLOURS[number % len(_COLOURS)], [cell.clients for cell in mine]
        halves = [cell.tok_s * cell.spread / 2 for cell in mine]
        speed.errorbar(xs, [cell.tok_s for cell in mine], halves, marker="o", capsize=3, color=colour, label=name)
        middle = [1e3 * cell.first["p50"] for cell in mine]
        above = [1e3 * (cell.first["p99"] - cell.first["p50"]) for cell in mine]
        wait.errorbar(xs, middle, [[0.0] * len(mine), above], marker="o", capsize=3, elinewidth=0.8, color=colour)
    for axes, label in ((speed, "tokens per second"), (wait, "ms to the first token: p50, whisker to p99")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_ylim(0)
        axes.set(xlabel="clients", ylabel=label)
        axes.grid(True, linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    speed.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
