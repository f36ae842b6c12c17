"""Two replicas of the bundled pair under Ray on this machine, one of which is killed under load.

Skipped where Ray is not installed: pip install 'ray[serve]'; half a minute, and 2 GB.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest

from bench.serving_load.client import Connection, Reply
from bench.serving_load.questions import PATH, Question, answers, is_right
from bench.shared.server import Server, server

pytest.importorskip("ray")
PROMPTS = ("import os\n", "def add(a, b):\n", "class Node:\n    ", "for i in range(", "try:\n    x =", "# a test\n")
QUESTIONS = [Question.of(number, prompt, 200) for number, prompt in enumerate(PROMPTS)]
SETTLED = ("--dtype", "float32", "--window", "3", "--max-model-len", "512")
CLIENTS = 16
PATIENCE = 240.0


@pytest.mark.slow
def test_a_replica_that_is_killed_loses_nothing_that_had_not_begun() -> None:
    arguments = ("--replicas", "2", "--max-num-seqs", "4", *SETTLED)
    with server(arguments) as running:
        asyncio.run(asyncio.wait_for(kill_under_load(running), PATIENCE))
    assert running.process.returncode == 0


async def kill_under_load(running: Server) -> None:
    expected = await answers(running, QUESTIONS)
    replies: list[tuple[Question, Reply]] = []
    over = asyncio.Event()
    tasks = [asyncio.ensure_future(client(running, number, over, replies)) for number in range(CLIENTS)]
    await asyncio.sleep(2)
    before = {each["id"]: each["pid"] for each in (await replicas(running))["replicas"]}
    assert len(before) == 2
    killed = next(iter(before))
    os.kill(before[killed], signal.SIGKILL)
    while killed in (now := {each["id"] for each in (await replicas(running))["replicas"]}) or len(now) < 2:
        await asyncio.sleep(0.2)
    over.set()
    await asyncio.gather(*tasks)
    told = 0
    for question, reply in replies:
        assert reply.status == 200, reply.error
        assert reply.broken is None
        assert reply.done
        if reply.error is None:
            assert is_right(reply, expected[question.number])
        else:
            told += 1
            *begun, (_, last) = reply.events
            assert begun
            assert json.loads(last)["error"]["code"] == "engine_failed"
    assert 0 < told <= 4  # what it had in hand
    assert await metric(running, "pearl:replica_retries_total") > 0
    assert await metric(running, "vllm:kv_cache_usage_perc") == 0
    print(f"{len(replies)} answers, {told} of which had begun at the replica that was killed")


async def client(running: Server, number: int, over: asyncio.Event, replies: list[tuple[Question, Reply]]) -> None:
    connection = Connection(running.host, running.port)
    while not over.is_set():
        question = QUESTIONS[(number + len(replies)) % len(QUESTIONS)]
        replies.append((question, await connection.ask(PATH, question.body)))


async def replicas(running: Server) -> Any:
    return json.loads((await Connection(running.host, running.port).ask("/health")).body)


async def metric(running: Server, name: str) -> float:
    text = (await Connection(running.host, running.port).ask("/metrics")).body.decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))
