"""``python bench/serving_clients.py``: lm-eval, guidellm or vLLM's bench against a live ``pearl serve``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from bench.clients.live_server import Served, live_server
from bench.clients.lm_eval_agreement import TOLERANCE, agreements
from bench.clients.load_reports import guidellm, vllm_bench
from pearl.bench.command import run_command
from pearl.errors import PearlError

_WIDTH = 120  # of the table in a pipe


Client = Literal["lm-eval", "guidellm", "vllm-bench"]


def serving_clients(
    client: Annotated[Client, typer.Argument(help="Which one")],
    python: Annotated[str, typer.Option(help="The interpreter of the environment that has it")] = sys.executable,
) -> None:
    """Run a client against the bundled pair in fp32, and tell whether it found what it should."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with live_server() as served:
            table, holds = _tried(client, python, served, folder)
    told = "".join(served.log)
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
    if "Traceback" in told:
        raise PearlError(f"the server had a bug:\n{told[-4000:]}")
    if not holds:
        raise PearlError(f"{client} did not find what it should")


def _tried(client: Client, python: str, served: Served, folder: Path) -> tuple[Table, bool]:
    if client == "lm-eval":
        table = Table("prompts as", "log-likelihoods", "greedy", "largest difference", "greedy for one alone")
        found = agreements(python, served, folder)
        for one in found:
            largest = f"{one.largest:.1e} (at most {TOLERANCE:.0e})"
            table.add_row(one.form, str(one.requests), str(one.greedy), largest, str(one.other_greedy))
        return table, all(one.holds for one in found)
    table = Table("load", "completed", "failed", "output tokens", "errors")
    reports = (guidellm if client == "guidellm" else vllm_bench)(python, served, folder)
    for report in reports:
        numbers = (report.completed, report.failed, report.output_tokens)
        table.add_row(report.what, *map(str, numbers), "; ".join(report.errors))
    return table, all(report.holds for report in reports)


def main() -> None:
    run_command(serving_clients)
