"""``python bench/serve_load.py``: decoding methods behind the real server, at several numbers of clients."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.serving_load.closed_loop import Seen, closed_loop, until_idle
from bench.serving_load.questions import Answers, Question, answers
from bench.serving_load.report import Cell, draw, table
from bench.shared.server import Server, server
from pearl.bench.command import run_command
from pearl.bench.contenders import Contender, parse_contenders
from pearl.bench.options import check_output, check_picture, positive_numbers
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.bench.report import provenance, write_whole
from pearl.errors import ConfigurationError, RoundError
from pearl.interrupts import INTERRUPTED, InterruptGuard

_WIDTH = 150  # of the table in a pipe
_REST = 20.0  # seconds that a server has to notice that its clients are gone


def serve_load(
    methods: Annotated[str, typer.Option(help="As pearl bench --methods; the first is the reference")] = (
        "autoregressive,pearl@4,pearl"
    ),
    clients: Annotated[str, typer.Option(help="Streams at once, comma-separated")] = "1,4,16,64",
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each measured run")] = 6.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of load before each")] = 1.5,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, contenders interleaved")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each answer, whatever ends a text")] = 64,
    dataset: Annotated[str, typer.Option(help="builtin, humaneval, gsm8k, mt_bench, mgsm or a JSONL file")] = BUILT_IN,
    prompts: Annotated[int, typer.Option(min=1, help="How many, asked in turn")] = 16,
    options: Annotated[str, typer.Option(help="More options of pearl serve, of all servers, as one text")] = "",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the report here, after each run")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw speed and waiting here, PNG or SVG")] = None,
) -> None:
    """Requests and tokens per second, and latencies, of real servers on loopback under a closed loop of streams.

    Every answer is greedy, and must be that of the first method, asked without load; a wrong one ends with status 1.
    """
    check_output("--json", json_out)
    check_picture("--plot", plot)
    contenders, counts = parse_contenders(methods), positive_numbers("--clients", clients)
    arguments = {contender.name: [*_options(contender), *shlex.split(options)] for contender in contenders}
    texts = load_prompts(dataset, prompts)
    questions = [Question.of(number, text, max_tokens) for number, text in enumerate(texts)]
    settings = {
        "methods": list(arguments), "clients": counts, "seconds": seconds, "warm_up": warm_up, "repeats": repeats,
        "max_tokens": max_tokens, "dataset": dataset, "prompts": len(questions), "options": options,
    }  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    with InterruptGuard() as guard:
        contest = Contest(arguments, questions, counts, repeats, seconds, warm_up, lambda: guard.requested)
        report = Report(settings, json_out, provenance())
        with ExitStack() as stack:
            for finished in contest.run(stack, console):
                report.add(*finished)
        cells = report.cells
        console.print(table(cells, f"answers of {max_tokens} tokens; latencies in ms: p50/p95/p99"))
        if json_out is not None:
            report.write(complete=not guard.requested)
            console.print(f"written to {json_out}")
        if plot is not None and cells:
            draw(cells, f"pearl serve on loopback, answers of {max_tokens} tokens", plot)
            console.print(f"drawn to {plot}")
        _require_right(cells)
        console.print("every answer was the reference's" if cells else "nothing was measured")
        if guard.requested:
            raise typer.Exit(INTERRUPTED)


def _require_right(cells: Sequence[Cell]) -> None:
    bad = {cell.contender: (cell.wrong, cell.errors[:1]) for cell in cells if cell.wrong or cell.errors}
    if bad:
        raise RoundError(f"wrong answers, errors: {bad}")


def _options(contender: Contender) -> Iterator[str]:
    if contender.prepared != "auto":
        raise ConfigurationError(f"pearl serve has no option for prepared windows: {contender.name}")
    yield from ("--method", contender.method, "--window", str(contender.window), "--pace", contender.pace)


@dataclass(frozen=True)
class Contest:
    """``arguments``: of each server, by contender. All servers run; one at a time has clients."""

    arguments: Mapping[str, Sequence[str]]
    questions: Sequence[Question]
    clients: Sequence[int]
    repeats: int
    seconds: float
    warm_up: float
    stopped: Callable[[], bool]

    def run(self, stack: ExitStack, console: Console) -> Iterator[tuple[str, int, Seen]]:
        """Yields (contender, clients, what they saw) of each run that was not interrupted. ``stack`` ends servers."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=console, refresh_per_second=1) as progress:
            total = len(self.arguments) * len(self.clients) * self.repeats
            task = progress.add_task("starting servers", total=total)
            servers = {name: stack.enter_context(server(options)) for name, options in self.arguments.items()}
            progress.update(task, description="reference answers")
            expected = asyncio.run(answers(next(iter(servers.values())), self.questions))
            for count in self.clients:
                for _ in range(self.repeats):
                    for name, each in servers.items():
                        progress.update(task, description=f"{count} clients, {name}")
                        seen = asyncio.run(self._load(each, expected, count))
                        if self.stopped():
                            return
                        yield name, count, seen
                        progress.advance(task)

    async def _load(self, each: Server, expected: Answers, count: int) -> Seen:
        seen = await closed_loop(each, self.questions, expected, count, self.seconds, self.warm_up, self.stopped)
        left = await until_idle(each, _REST, self.stopped)
        if any(left.values()) and not self.stopped():
            raise RoundError(f"the clients are gone, and the server still has {left}")
        return seen


class Report:
    def __init__(self, settings: Mapping[str, Any], path: Path | None, origin: Mapping[str, Any]) -> None:
        self._settings, self._path, self._origin = settings, path, origin
        self._runs: dict[tuple[int, str], list[Seen]] = {}

    @property
    def cells(self) -> list[Cell]:
        return [Cell.of(name, clients, runs) for (clients, name), runs in self._runs.items()]

    def add(self, contender: str, clients: int, seen: Seen) -> None:
        self._runs.setdefault((clients, contender), []).append(seen)
        self.write(complete=False)

    def write(self, complete: bool) -> None:
        """Anew after each run, so that whatever ends it leaves what was measured."""
        if self._path is None:
            return
        report = {
            **self._origin,
            "settings": self._settings,
            "complete": complete,
            "results": [asdict(cell) for cell in self.cells],
        }
        write_whole(self._path, json.dumps(report, indent=1) + "\n")


def main() -> None:
    run_command(serve_load)
