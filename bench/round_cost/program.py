"""``python bench/host_cost.py``: the host's time in a round, with models that answer at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.round_cost.measure import Cost, Interrupted, Load, measure
from bench.shared.numbers import positive_numbers
from pearl.bench.command import run_command
from pearl.bench.options import check_output, check_rate
from pearl.bench.report import provenance, write_whole
from pearl.choices import MethodName
from pearl.config import EngineConfig
from pearl.engine.model_loading import LoadedModels, load_models
from pearl.interrupts import INTERRUPTED, InterruptGuard

_METHODS: tuple[MethodName, ...] = ("autoregressive", "speculative", "pearl")
_WIDTH = 120  # of the table in a pipe
_TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


def host_cost(
    batch: Annotated[str, typer.Option(help="Requests that run at once, comma-separated")] = "1,8,32,64,256",
    context: Annotated[str, typer.Option(help="Tokens of each in the cache, comma-separated")] = "100,8000",
    window: Annotated[int, typer.Option(min=1, help="Drafted tokens a round")] = 4,
    acceptance: Annotated[float, typer.Option(help="Probability that a drafted token holds")] = 0.8,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each kind")] = 60,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the report here, after each kind")] = None,
) -> None:
    """Microseconds of a round, and of each request in it, by part; medians over rounds."""
    check_rate(acceptance)
    check_output("--json", json_out)
    batches, contexts = positive_numbers("--batch", batch), positive_numbers("--context", context)
    loads = [
        Load(method, b, c, temperature, window, rounds, acceptance)
        for c, temperature, b, method in product(contexts, _TEMPERATURES.values(), batches, _METHODS)
    ]
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    config = EngineConfig(device="cpu", draft_threads=1, target_threads=1, max_num_seqs=1)
    results: list[dict[str, Any]] = []
    with InterruptGuard() as guard:
        models = load_models(config)
        _run(models, config, loads, results, json_out, console, lambda: guard.requested)
        console.print(_table(results))
        if json_out is not None:
            console.print(f"written to {json_out}")
        if guard.requested:
            raise typer.Exit(INTERRUPTED)


def _run(
    models: LoadedModels,
    config: EngineConfig,
    loads: Sequence[Load],
    results: list[dict[str, Any]],
    json_out: Path | None,
    console: Console,
    stopped: Callable[[], bool],
) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("", total=len(loads))
        for load in loads:
            progress.update(task, description=f"{load.method}, batch {load.batch}, context {load.context}")
            try:
                results.append(_result(load, measure(models, config, load, stopped)))
            except Interrupted:
                return
            if json_out is not None:
                write_whole(json_out, json.dumps({**provenance(), "results": results}, indent=1) + "\n")
            progress.advance(task)


def _result(load: Load, cost: Cost) -> dict[str, Any]:
    what = {"method": load.method, "batch": load.batch, "context": load.context, "sampling": load.sampling}
    return {**what, "window": load.window, "acceptance": load.acceptance, **asdict(cost)}


def _table(results: Sequence[dict[str, Any]]) -> Table:
    parts = list(dict.fromkeys(name for result in results for name in result["parts"]))
    title = "microseconds of the host: of a round, for each request in it, and of its parts (medians)"
    table = Table(title=title, box=box.SIMPLE)
    for name in ("method", "sampling", "context"):
        table.add_column(name, no_wrap=True)
    for name in ("batch", "round", "request", *parts):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        numbers = [f"{r['us_per_round']:.0f}", f"{r['us_per_request']:.1f}"]
        numbers += [f"{r['parts'].get(name, 0.0):.0f}" for name in parts]
        table.add_row(r["method"], r["sampling"], str(r["context"]), str(r["batch"]), *numbers)
    return table


def main() -> None:
    run_command(host_cost)
