"""Clients that vanish: what they asked for ends, and is free for others. Real connections, an engine without end."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from fake_engine import FakeEngine, chunk
from serving_support import PROMPT, listening, live_server, settings, wait_until

from pearl import LLM
from pearl.serving.app import create_app
from pearl.serving.sampling import SamplingDefaults

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"


@pytest.fixture
def engine(idle_llm: LLM) -> FakeEngine:
    return FakeEngine(idle_llm, chunk("a"), chunk("b"), endless=True)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with listening(create_app(engine, settings(), SamplingDefaults.of_openai())) as url:  # type: ignore[arg-type]
        yield url


def all_cancelled(engine: FakeEngine, count: int) -> None:
    wait_until(lambda: len(engine.streams) == count and all(stream.cancelled for stream in engine.streams))


def test_a_stream_that_nobody_reads_any_more(url: str, engine: FakeEngine) -> None:
    body = {"prompt": ["x", "y"], "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        lines = response.iter_lines()  # whose end closes the connection
        assert next(lines).startswith("data: ")
        assert not any(stream.cancelled for stream in engine.streams)
    all_cancelled(engine, 2)
    metrics = httpx.get(f"{url}/metrics").text
    assert 'pearl:requests_cancelled_total{engine="0",model_name="pair"} 1.0' in metrics


@pytest.mark.parametrize("stream", ["false", "true"])
def test_an_answer_that_nobody_waits_for(url: str, engine: FakeEngine, stream: str) -> None:
    """Neither has got its first byte."""
    engine.script = ()
    address = urlsplit(url)
    content = f'{{"prompt": "x", "stream": {stream}}}'.encode()
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(HEAD.format(len(content)).encode() + content)
        wait_until(lambda: len(engine.streams) == 1)
        assert not engine.streams[0].cancelled
    all_cancelled(engine, 1)


def test_bodies_that_end_early_or_never_ask_for_nothing(url: str, engine: FakeEngine) -> None:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(HEAD.format(900).encode() + b'{"prompt": ')
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"\x00\xff not http\r\n\r\n")
        assert b"400" in connection.recv(100)
    assert httpx.get(f"{url}/health").status_code == 200
    assert not engine.streams


def test_a_body_that_is_declared_too_large_is_not_waited_for(url: str) -> None:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(HEAD.format(1 << 30).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_pages_of_vanished_clients_are_free_for_others() -> None:
    """``live_server`` looks for what is left."""
    body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": 500, "stream": True}
    with live_server(max_num_seqs=2) as server:
        for _ in range(4):
            with server.http.stream("POST", "/v1/completions", json=body) as response:
                assert next(response.iter_lines())
        answer = server.post("/v1/completions", **body | {"stream": False, "max_tokens": 5}).json()
        assert answer["usage"]["completion_tokens"] == 5
