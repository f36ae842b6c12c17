"""What goes wrong under a live server with a real engine: whoever it happens to is told, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from async_support import Hook
from serving_support import OPTIONS, PROMPT, LiveServer, listening, live_server, settings, wait_until
from test_serving_clients import HEAD

from pearl import LLM
from pearl.messages import TargetOutput, TargetPlan
from pearl.serving.app import create_app
from pearl.serving.async_engine import AsyncEngine
from pearl.serving.sampling import SamplingDefaults

PATH = "/v1/completions"
BODY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
LONG = 250  # tokens


def asked(server: LiveServer, prompt: str, max_tokens: int) -> list[int]:
    answer = server.post(PATH, **BODY, prompt=prompt, max_tokens=max_tokens)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def streamed(url: str, prompt: str, max_tokens: int) -> tuple[list[int], str | None]:
    """(token ids, the error that ended them)"""
    tokens: list[int] = []
    with httpx.stream(
        "POST", url + PATH, json=BODY | {"prompt": prompt, "max_tokens": max_tokens, "stream": True}, timeout=60
    ) as response:
        for line in filter(None, response.iter_lines()):
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return tokens, None
            event = json.loads(data)
            if "error" in event:
                return tokens, str(event["error"]["message"])
            tokens += event["choices"][0]["token_ids"]
    raise AssertionError("the stream ended without [DONE]")


def test_a_reader_that_is_slow_holds_nobody_up_and_misses_nothing() -> None:
    """Log-probabilities make the answer larger than what sockets hold, so that the server has to wait for it."""
    with own_server(send_buffer=4096) as server:
        expected = asked(server, PROMPT, LONG)
        body = BODY | {"prompt": PROMPT, "max_tokens": LONG, "stream": True, "logprobs": 20}
        content = json.dumps(body).encode()
        address = urlsplit(server.url)
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((address.hostname, address.port))
            slow.sendall(HEAD.format(len(content)).encode() + content)
            wait_until(lambda: server.engine.load.running == 1)
            wait_until(lambda: server.engine.load.running == 0)  # it was computed, and its pages are free
            assert asked(server, "import os\n", 20) == asked(server, "import os\n", 20)
            received = b""
            while b"data: [DONE]" not in received:
                received += slow.recv(65536)
        lines = [line.strip() for line in received.split(b"\n")]
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        pieces = [event["choices"][0]["token_ids"] for event in events]
        assert [token for piece in pieces for token in piece] == expected
        assert max(map(len, pieces)) > 2 * (OPTIONS["window"] + 1)  # several rounds' tokens came together


def test_when_pages_run_out_answers_are_late_and_right() -> None:
    prompts = [f"{PROMPT}    # {number}\n" for number in range(4)]
    with live_server(kv_cache_memory=5 << 20) as server:
        expected = [asked(server, prompt, LONG) for prompt in prompts]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda prompt: streamed(server.url, prompt, LONG), prompts))
        assert found == [(tokens, None) for tokens in expected]
        assert preemptions(server) > 0


def preemptions(server: LiveServer) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_preemptions_total"))


def test_a_request_without_numbers_is_told_and_others_go_on() -> None:
    sick = "def sick(x, y, z):\n"
    with live_server(method="autoregressive") as server:
        engine = server.engine.llm.engine
        expected, length = asked(server, PROMPT, 40), len(server.engine.llm.encode(sick))
        assert length != len(server.engine.llm.encode(PROMPT))
        engine.workers.target.run = Hook(engine.workers.target.run, after=poisoning(length))  # type: ignore[method-assign]
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(lambda prompt: streamed(server.url, prompt, 40), (PROMPT, sick, PROMPT)))
        assert found[0] == found[2] == (expected, None)
        tokens, error = found[1]
        assert 0 < len(tokens) < 10
        assert error is not None
        assert server.http.get("/health").status_code == 200


def poisoning(prompt_length: int) -> Callable[[TargetPlan, TargetOutput], None]:
    """Rows of requests with such a prompt become NaN, from their sixth token on."""

    def poison(plan: TargetPlan, output: TargetOutput) -> None:
        row = 0
        for work in plan.work:
            if work.state.prompt_length == prompt_length and work.end > prompt_length + 5:
                assert output.logits is not None
                output.logits[row : row + work.num_logits] = torch.nan
            row += work.num_logits

    return poison


@contextmanager
def own_server(send_buffer: int | None = None) -> Iterator[LiveServer]:
    """One whose engine may end before it is closed. ``send_buffer``: as of ``listening``."""
    engine = AsyncEngine(LLM(**OPTIONS | {"max_num_seqs": 2}))
    try:
        with listening(create_app(engine, settings(), SamplingDefaults.of_openai()), send_buffer) as url:
            yield LiveServer(url, engine)
    finally:
        asyncio.run(engine.close())


def test_a_worker_that_ends_is_told_to_everyone() -> None:
    """Those that stream, those that wait, and those that come later."""
    with own_server() as server, ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(streamed, server.url, PROMPT, LONG) for _ in range(2)]
        wait_until(lambda: server.engine.load.running == 2)
        waiting = [threads.submit(server.post, PATH, **BODY, prompt=PROMPT, max_tokens=LONG) for _ in range(2)]
        wait_until(lambda: server.engine.load.waiting == 2)
        worker = server.engine.llm.engine.workers.draft_worker
        assert worker is not None
        worker.close()
        for each in asking:
            assert "the worker" in str(each.result()[1])
        for each in waiting:
            assert each.result().status_code == 500
            assert each.result().json()["error"]["code"] == "engine_failed"
        assert server.http.get("/health").status_code == 503
        late = server.post(PATH, **BODY, prompt=PROMPT)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_closed")
