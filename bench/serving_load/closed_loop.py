"""Clients each of which asks again as soon as it has its answer, for a while; and what they saw."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.serving_load.client import Connection, Reply
from bench.serving_load.questions import PATH, Answers, Question, is_right
from bench.shared.server import Server

_LOOK = 0.1  # seconds between two looks at whether the user wants no more
PERCENTILES = (50, 95, 99)
Percentiles = dict[str, float]  # "p50": seconds


@dataclass
class Seen:
    """By the clients of one run, between the end of the warm-up and the end: seconds, and counts.

    ``first``: from a request to its first token. ``gaps``: between the pieces of a stream, which is what its reader
    waits for; a piece has one token or several. ``paces``: seconds for each token behind the first piece, of each
    request that ended. ``wrong``: answers that are not the expected ones, ended or not. ``busy``: the part of a core
    that the clients themselves used.
    """

    seconds: float = 0.0
    requests: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    busy: float = 0.0

    def add(self, reply: Reply, begin: float, end: float) -> None:
        if reply.error is not None:
            self.errors.append(reply.error)
            return
        pieces = reply.pieces()
        if pieces and begin <= reply.began < end:
            self.first.append(pieces[0][0] - reply.began)
        self.tokens += sum(len(ids) for at, ids in pieces if begin <= at < end)
        self.gaps += [b - a for (a, _), (b, _) in itertools.pairwise(pieces) if begin <= a and b < end]
        if reply.done and begin <= reply.ended < end:
            self.requests += 1
            if rest := sum(len(ids) for _, ids in pieces[1:]):
                self.paces.append((pieces[-1][0] - pieces[0][0]) / rest)


def percentiles(values: Sequence[float]) -> Percentiles:
    """Empty where there is nothing."""
    if not values:
        return {}
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


async def closed_loop(
    server: Server,
    questions: Sequence[Question],
    expected: Answers,
    clients: int,
    seconds: float,
    warm_up: float,
    stopped: Callable[[], bool],
) -> Seen:
    """``clients`` streams at once for ``warm_up`` and then ``seconds``; what is unfinished then is cut."""
    order, replies = itertools.cycle(questions), list[tuple[Question, Reply]]()
    begin = time.perf_counter() + warm_up
    end = begin + seconds
    tasks = [asyncio.ensure_future(_client(server, order, replies)) for _ in range(clients)]
    busy = 0.0
    try:
        while (now := time.perf_counter()) < end and not stopped():
            if now < begin:
                busy = time.process_time()
            await asyncio.sleep(min(_LOOK, max(0.0, (begin if now < begin else end) - now)))
    finally:
        busy, until = time.process_time() - busy, min(end, time.perf_counter())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    seen = Seen(seconds=until - begin, busy=busy / max(until - begin, 1e-9))
    for question, reply in replies:
        seen.add(reply, begin, until)
        seen.wrong += reply.error is None and not is_right(reply, expected[question.number])
    return seen


async def _client(server: Server, order: Iterator[Question], replies: list[tuple[Question, Reply]]) -> None:
    connection = Connection(server.host, server.port)
    while True:
        question = next(order)
        try:
            replies.append((question, await connection.ask(PATH, question.body)))
        except OSError as error:
            replies.append((question, Reply(time.perf_counter(), broken=str(error))))
            return
        except asyncio.CancelledError:
            replies.append((question, connection.reply))
            raise


async def until_idle(server: Server, patience: float, stopped: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Wait until nothing runs, waits or holds a page; returns the gauges as they are then, or when patience ends."""
    limit = time.monotonic() + patience
    connection = Connection(server.host, server.port)
    while True:
        gauges = _gauges((await connection.ask("/metrics")).body.decode())
        if not any(gauges.values()) or time.monotonic() > limit or stopped():
            connection.cut()
            return gauges
        await asyncio.sleep(_LOOK)


def _gauges(metrics: str) -> dict[str, float]:
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    found = {}
    for line in metrics.splitlines():
        name, _, value = line.rpartition(" ")
        if name.partition("{")[0] in names:
            with contextlib.suppress(ValueError):
                found[name.partition("{")[0]] = float(value)
    return found
