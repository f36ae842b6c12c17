"""A live server on loopback, in a thread of the tests' process, around the bundled pair or any engine."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from pearl import LLM
from pearl.serving.app import create_app
from pearl.serving.async_engine import AsyncEngine
from pearl.serving.listening import bound_socket, url_of
from pearl.serving.sampling import SamplingDefaults
from pearl.serving.settings import ServerSettings

NAME = "pair"
OPTIONS: dict[str, Any] = {"dtype": "float32", "window": 3, "max_model_len": 512, "max_num_seqs": 4, "max_waiting": 8}
PROMPT = "def read_lines(path):\n"
_PATIENCE = 30.0  # seconds


def settings(**changes: Any) -> ServerSettings:
    return ServerSettings(**({"names": (NAME, "alias")} | changes))


@contextmanager
def listening(app: FastAPI, send_buffer: int | None = None) -> Iterator[str]:
    """The URL of ``app``, served until the end. ``send_buffer``: bytes of an answer that the system holds back."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    with bound_socket("127.0.0.1", 0) as opened:
        if send_buffer is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # of accepted connections too
        url = url_of(opened)
        thread = threading.Thread(target=server.run, args=([opened],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield url
        finally:
            server.should_exit = True
            thread.join(_PATIENCE)
            assert not thread.is_alive()


class LiveServer:
    def __init__(self, url: str, engine: AsyncEngine) -> None:
        self.url, self.engine = url, engine
        self.http = httpx.Client(base_url=url, timeout=_PATIENCE)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)


@contextmanager
def live_server(defaults: SamplingDefaults | None = None, **changes: Any) -> Iterator[LiveServer]:
    """Around an LLM of its own; ``changes`` are to its OPTIONS. At the end nothing is left of its clients."""
    engine = AsyncEngine(LLM(**OPTIONS | changes))
    try:
        with listening(create_app(engine, settings(), defaults or SamplingDefaults.of_openai())) as url:
            server = LiveServer(url, engine)
            with server.http:
                yield server
                wait_until(lambda: at_rest(engine))
                engine.llm.engine.scheduler.target_kv.check_integrity()
    finally:
        # In a thread without an event loop: the tests' own may have one (Playwright's).
        closing = threading.Thread(target=lambda: asyncio.run(engine.close()))
        closing.start()
        closing.join()


def wait_until(holds: Callable[[], bool]) -> None:
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() - begin < _PATIENCE, "it did not happen"
        time.sleep(0.01)


def at_rest(engine: AsyncEngine) -> bool:
    """Whether nothing runs, waits, or holds a page."""
    scheduler = engine.llm.engine.scheduler
    load = engine.load
    return not (load.running or load.waiting or scheduler.requests or scheduler.target_kv.usage)
