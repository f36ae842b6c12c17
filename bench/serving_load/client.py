"""A client that costs next to nothing, so that the server is what is measured: httptools over a plain transport.

Events are stamped as they arrive and read when the answer has ended.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httptools

_DONE = b"[DONE]"


@dataclass
class Reply:
    """What came. ``events``: (time.perf_counter() of its arrival, data) of a stream, without ``[DONE]``.

    ``left``: the client did, before the end. ``broken``: how the connection ended, where it did.
    """

    began: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    events: list[tuple[float, bytes]] = field(default_factory=list)
    body: bytes = b""  # what is no stream
    done: bool = False  # [DONE] has come
    left: bool = False
    broken: str | None = None
    ended: float = 0.0

    @property
    def error(self) -> str | None:
        """Of the status, of an event, or of the connection."""
        if self.broken is not None:
            return self.broken
        if self.left and self.status in (0, 200):
            return self._told()
        if self.status != 200:
            return f"status {self.status}: {self.body.decode(errors='replace')}"
        if self.streamed and not self.done:
            return self._told() or "the stream ended without [DONE]"
        return self._told()

    def _told(self) -> str | None:
        told = next((data for _, data in self.events if data.startswith(b'{"error"')), None)
        return None if told is None else told.decode(errors="replace")

    @property
    def streamed(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    def pieces(self) -> list[tuple[float, list[int]]]:
        """(arrival, token ids) of each event that brought any; of a request with ``return_token_ids``."""
        found = []
        for at, data in self.events:
            for choice in json.loads(data).get("choices", ()):
                if choice.get("token_ids"):
                    found.append((at, choice["token_ids"]))
        return found


class Connection:
    """One request at a time; it is opened anew where the server, or leaving, closed it."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._wire: _Wire | None = None
        self._reply = Reply(0.0)

    async def ask(self, path: str, body: Mapping[str, Any] | None = None, leave_after: int | None = None) -> Reply:
        """POST ``body``, or GET. ``leave_after``: so many events, and the connection is cut. OSError if none opens."""
        self._reply = reply = Reply(time.perf_counter())
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {self._host}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        try:
            if self._wire is None or self._wire.is_cut:
                loop = asyncio.get_running_loop()
                _, self._wire = await loop.create_connection(_Wire, self._host, self._port)
            await self._wire.exchange(head.encode() + content, reply, leave_after)
        except asyncio.CancelledError:
            reply.left = True
            self.cut()
            raise
        finally:
            reply.ended = time.perf_counter()
        return reply

    @property
    def reply(self) -> Reply:
        """Of the latest request, which may be under way."""
        return self._reply

    def cut(self) -> None:
        """As by a cable: the server is told nothing but that the connection is no more."""
        if self._wire is not None:
            self._wire.cut()


class _Wire(asyncio.Protocol):
    """One connection, from its beginning to its end."""

    def __init__(self) -> None:
        self.is_cut = False
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._reply = Reply(0.0)
        self._ended: asyncio.Future[None] | None = None  # of the exchange
        self._rest = b""  # an event that has begun
        self._leave_after: int | None = None

    async def exchange(self, request: bytes, reply: Reply, leave_after: int | None) -> None:
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._reply, self._rest, self._leave_after = reply, b"", leave_after
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._ended

    def cut(self) -> None:
        self.is_cut = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.is_cut = True
        if self._ended is not None and not self._ended.done():
            self._reply.broken = f"the connection broke: {error or 'closed by the server'}"
            self._end()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._reply.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self._reply.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        reply = self._reply
        if not reply.streamed:
            reply.body += data
            return
        now = time.perf_counter()
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            told = event.removeprefix(b"data: ")
            if told == _DONE:
                reply.done = True
            else:
                reply.events.append((now, told))
        if self._leave_after is not None and len(reply.events) >= self._leave_after and not reply.done:
            reply.left = True
            self.cut()
            self._end()

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.cut()
        self._end()

    def _end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
