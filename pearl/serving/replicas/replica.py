"""One replica: an engine and the server's app around it, in a process of Ray's. It answers what the front passes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message

from pearl.serving.app import create_app
from pearl.serving.async_engine import AsyncEngine
from pearl.serving.health import Health
from pearl.serving.program import begin_log, load_llm, sampling_defaults
from pearl.serving.settings import ServerSettings

_WAITING = 64  # messages that an answer may be ahead of who reads it
_GATHER = 0.01  # seconds between two parts of an answer: each costs a crossing of processes, about a millisecond
_PREFIX = 20_000  # characters that a router gets to see
Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Forwarded:
    """A request as the front received it, its body read. Frozen: it may be sent again."""

    method: str
    path: str
    query: bytes = b""
    headers: Headers = ()
    body: bytes = b""

    @cached_property
    def prompt(self) -> str:
        """What Ray's router by prefixes goes by; never empty, which it does not survive."""
        try:
            body = json.loads(self.body)
            begin = body.get("messages") or body.get("prompt")
        except (ValueError, AttributeError, RecursionError):
            begin = None
        if not begin:
            return self.path
        return begin[:_PREFIX] if isinstance(begin, str) else json.dumps(begin)[:_PREFIX]


class Part(NamedTuple):
    """Of an answer: the next bytes of its body. The first has its status and headers."""

    body: bytes
    status: int = 0
    headers: Headers = ()


class State(NamedTuple):
    """What a replica tells of itself."""

    id: str
    pid: int
    health: Health
    exposition: bytes


class Replica:
    """Ray Serve's deployment. All but its construction is on its event loop."""

    def __init__(
        self,
        llm_options: Mapping[str, Any],
        settings: ServerSettings,
        model_defaults: bool,
        round_limit: float | None,
    ) -> None:
        """``settings``: the front's, to whom keys and web pages are left."""
        from ray import serve

        begin_log(anew=True)
        defaults = sampling_defaults(llm_options, model_defaults)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._engine = AsyncEngine(load_llm(llm_options), round_limit=round_limit)
        own = replace(settings, api_key=None, origins=(), replica=self._id)
        self._app = create_app(self._engine, own, defaults)

    async def answer(self, request: Forwarded) -> AsyncGenerator[Part, None]:
        """The app's. If it is left before it has ended, the client has."""
        async with contextlib.aclosing(call(self._app, request)) as parts:
            async for part in parts:
                yield part

    async def state(self) -> State:
        metrics = [part.body async for part in call(self._app, Forwarded("GET", "/metrics"))]
        return State(self._id, os.getpid(), self._engine.health, b"".join(metrics))

    def check_health(self) -> None:
        """Ray replaces a replica that raises."""
        if not (health := self._engine.health).ok:
            raise RuntimeError(health.reason)


async def call(app: ASGIApp, request: Forwarded) -> AsyncGenerator[Part, None]:
    """Have ``app`` answer in this process. The first part comes at once, later ones hold what was written meanwhile."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue(_WAITING)
    gone, ended, asked = asyncio.Event(), asyncio.Event(), False

    async def receive() -> Message:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": request.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await app(_scope(request), receive, messages.put)
        except Exception:  # it has been answered, with status 500
            logging.getLogger("pearl.serving").exception("a request failed")
        ended.set()
        await messages.put(None)

    task = asyncio.ensure_future(work())
    try:
        while (message := await messages.get()) is not None:
            status, headers, body = 0, (), bytearray()  # type: int, Headers, bytearray
            while message is not None:
                if message["type"] == "http.response.start":
                    status, headers = message["status"], message["headers"]
                body += message.get("body", b"")
                if messages.empty() and (body or not message.get("more_body", True)):
                    break
                message = await messages.get()
            yield Part(bytes(body), status, headers)
            if message is None:
                return
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ended.wait(), _GATHER)
    finally:
        gone.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _scope(request: Forwarded) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers),
        "client": None,
        "server": None,
    }
