"""``python bench/serve_soak.py``: many clients, some of which leave; nothing may be lost, wrong or leaked."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import shlex
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.serving_load.checked_server import INTACT, PAGES
from bench.serving_load.client import Connection
from bench.serving_load.closed_loop import Percentiles, percentiles, until_idle
from bench.serving_load.questions import PATH, Answers, Question, answers, is_right, tokens_of
from bench.shared.server import Server, server
from pearl.bench.command import run_command
from pearl.bench.options import check_output
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.bench.report import provenance, write_whole
from pearl.errors import RoundError
from pearl.interrupts import INTERRUPTED, InterruptGuard

_CHECKED = "bench.serving_load.checked_server"
_LOOK = 0.5  # seconds between two looks at the server's memory
_FINISH = 120.0  # seconds for what runs when the time is over
_GROWTH = 1.05  # of the memory, from the second quarter of the time to the last: what counts as flat
_LATEST = 12  # events behind which, at the latest, a client that leaves has left


@dataclass
class Tally:
    """What became of the requests. ``resident``: MiB of the server, from the first client to the last."""

    finished: int = 0
    left: int = 0
    refused: int = 0  # with status 429
    tokens: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def quarter(self, number: int) -> float:
        """Median of the memory in that quarter of the time, 0 to 3."""
        length = max(1, len(self.resident) // 4)
        return statistics.median(self.resident[number * length :][:length] or self.resident[-1:])


def serve_soak(
    clients: Annotated[int, typer.Option(min=1, help="Streams at once")] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="Until the last request is sent")] = 60.0,
    abort: Annotated[float, typer.Option(min=0, max=1, help="Part of the requests whose client leaves")] = 0.2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each answer, whatever ends a text")] = 64,
    dataset: Annotated[str, typer.Option(help="As of serve_load.py")] = BUILT_IN,
    prompts: Annotated[int, typer.Option(min=1, help="Each is asked greedily and with a seed")] = 16,
    options: Annotated[str, typer.Option(help="Options of pearl serve, as one text")] = "--max-waiting 128",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the report here")] = None,
) -> None:
    """Ends with status 1 unless every answer is the one that the server gives without load, nothing but 429 was
    refused, memory is flat, and when all clients are gone no page is held and the engine's books are in order.
    """
    check_output("--json", json_out)
    texts = load_prompts(dataset, prompts)
    kinds: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8, "seed": 11})
    questions = [
        Question.of(number, text, max_tokens, **kind)
        for number, (text, kind) in enumerate(itertools.product(texts, kinds))
    ]
    console = Console()
    with InterruptGuard() as guard:
        with (
            Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress,
            server(shlex.split(options), _CHECKED) as running,
        ):
            task = progress.add_task("reference answers", total=seconds)

            def show(now: float) -> None:
                progress.update(task, completed=now, description=f"{clients} clients")

            expected = asyncio.run(answers(running, questions))
            soak = Soak(running, questions, expected, clients, abort, seconds, lambda: guard.requested, show)
            tally, gauges = asyncio.run(soak.run())
        books = next((line for line in reversed(running.log) if line.startswith(PAGES)), f"{PAGES} the log is silent")
        failures = list(_failures(tally, gauges, books, running.process.returncode))
        first = percentiles(tally.first)
        _show(console, tally, first, books)
        if json_out is not None:
            settings = {"clients": clients, "seconds": seconds, "abort": abort, "max_tokens": max_tokens,
                        "prompts": len(questions), "options": options}  # fmt: skip
            told = vars(tally) | {"errors": dict(tally.errors), "first": first, "gauges": gauges}
            told |= {"pages": books.strip(), "failures": failures}
            write_whole(json_out, json.dumps({**provenance(), "settings": settings, **told}, indent=1) + "\n")
        if guard.requested:
            raise typer.Exit(INTERRUPTED)
        if failures:
            raise RoundError("; ".join(failures))
        console.print("nothing lost, wrong or leaked")


def _failures(tally: Tally, gauges: dict[str, float], books: str, status: int) -> Iterator[str]:
    if tally.errors:
        yield f"errors: {dict(tally.errors.most_common(3))}"
    if tally.wrong:
        yield f"{tally.wrong} answers are not those of the server without load"
    if not tally.finished:
        yield "no answer was finished"
    if any(gauges.values()):
        yield f"the clients are gone, and the server still has {gauges}"
    if books.removeprefix(PAGES).strip() != INTACT:
        yield books.strip()
    if tally.quarter(3) > _GROWTH * tally.quarter(1):
        yield f"memory grew from {tally.quarter(1):.0f} to {tally.quarter(3):.0f} MiB"
    if status != 0:
        yield f"the server ended with status {status}"


def _show(console: Console, tally: Tally, first: Percentiles, books: str) -> None:
    waits = "/".join(f"{1e3 * value:.0f}" for value in first.values())
    console.print(
        f"{tally.seconds:.0f} s: {tally.finished} answers, all compared, {tally.wrong} wrong; "
        f"{tally.left} clients left; {tally.refused} times 429; {tally.errors.total()} errors\n"
        f"{tally.tokens / max(tally.seconds, 1e-9):.0f} tok/s reached clients; "
        f"first token after {waits} ms (p50/p95/p99)\n"
        f"the server's memory: {tally.resident[0]:.0f} MiB at the start, {tally.quarter(1):.0f} in the second quarter, "
        f"{tally.quarter(3):.0f} in the last\n{books.strip()}",
        soft_wrap=True,
    )


class Soak:
    def __init__(
        self,
        running: Server,
        questions: Sequence[Question],
        expected: Answers,
        clients: int,
        abort: float,
        seconds: float,
        stopped: Callable[[], bool],
        show: Callable[[float], None],
    ) -> None:
        """``stopped``: whether the user wants no more; ``show`` gets the seconds that have gone."""
        self._server, self._questions, self._expected = running, questions, expected
        self._clients, self._abort, self._seconds = clients, abort, seconds
        self._stopped, self._show = stopped, show
        self._tally = Tally()
        self._over = False

    async def run(self) -> tuple[Tally, dict[str, float]]:
        """The tally, and the server's gauges when all clients are gone."""
        begin, tally = time.monotonic(), self._tally
        tasks = [asyncio.ensure_future(self._client(number)) for number in range(self._clients)]
        while (gone := time.monotonic() - begin) < self._seconds and not self._stopped():
            tally.resident.append(self._server.resident())
            self._show(gone)
            await asyncio.sleep(_LOOK)
        self._over = True
        _, unfinished = await asyncio.wait(tasks, timeout=_FINISH)
        tally.seconds = time.monotonic() - begin
        for task in unfinished:
            task.cancel()
            tally.errors["a request did not end"] += 1
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        tally.errors.update(repr(error) for error in ended if isinstance(error, Exception))
        return tally, await until_idle(self._server, _FINISH)

    async def _client(self, number: int) -> None:
        luck, connection = random.Random(number), Connection(self._server.host, self._server.port)
        while not self._over:
            question = luck.choice(self._questions)
            leave_after = luck.randint(0, _LATEST) if luck.random() < self._abort else None
            if leave_after == 0:  # before a token
                await self._leave_early(connection, question, luck)
            else:
                await self._ask(connection, question, leave_after)
        connection.cut()

    async def _leave_early(self, connection: Connection, question: Question, luck: random.Random) -> None:
        asking = asyncio.ensure_future(connection.ask(PATH, question.body))
        await asyncio.wait((asking,), timeout=luck.random() / 20)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        self._tally.left += 1

    async def _ask(self, connection: Connection, question: Question, leave_after: int | None) -> None:
        reply, tally = await connection.ask(PATH, question.body, leave_after), self._tally
        if reply.status == 429:
            tally.refused += 1
            await asyncio.sleep(float(reply.headers["retry-after"]))
            return
        if reply.error is not None:
            tally.errors[reply.error] += 1
            return
        if pieces := reply.pieces():
            tally.first.append(pieces[0][0] - reply.began)
        tally.tokens += len(tokens_of(reply))
        tally.finished += reply.done
        tally.left += reply.left
        tally.wrong += not is_right(reply, self._expected[question.number])


def main() -> None:
    run_command(serve_soak)
