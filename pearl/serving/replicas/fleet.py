"""The replicas as the front sees them: a request goes to one of them, and to another if that one dies too early."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from pearl.serving.connection import ClientGone, while_connected
from pearl.serving.errors import ApiError, api_error
from pearl.serving.event_stream import DONE
from pearl.serving.replicas.replica import Forwarded, Part, State

_LOG = logging.getLogger("pearl.serving")
_TRIES = 8  # of one request
_PAUSE = 0.05  # seconds before the second, twice as long before each later one
_STATE = 5.0  # seconds that a replica has to tell its state
_NO_REPLICA = "the replica that was working on this ended"


class ReplicaLost(Exception):
    """It died, or was taken away, with the request."""


class Parts(Protocol):
    """Of one answer, from one replica. Iterating raises ReplicaLost."""

    def __aiter__(self) -> AsyncIterator[Part]: ...

    def cancel(self) -> None: ...


class Cluster(Protocol):
    """What runs the replicas."""

    def answer(self, request: Forwarded) -> Parts:
        """From a replica of the router's choice; it waits for one where there is none."""
        ...

    async def states(self, timeout: float) -> list[State]:
        """Of those that tell."""
        ...

    async def close(self) -> None: ...


class Fleet:
    """An ASGI app that passes requests on. Belongs to the event loop."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._running: set[asyncio.Task[Any]] = set()
        self._draining = self._closing = self._closed = False
        self.retried = 0

    @property
    def draining(self) -> bool:
        return self._draining

    async def states(self) -> list[State]:
        return await self._cluster.states(_STATE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._draining:
            words = "the server finishes what it has and takes nothing new; try another one"
            headers = {"Retry-After": "1"}
            raise ApiError(503, words, kind="service_unavailable_error", code="draining", headers=headers)
        body = await Request(scope, receive).body()
        request = Forwarded(scope["method"], scope["path"], scope["query_string"], scope["headers"], body)
        try:
            await while_connected(receive, self._pass_on(request, send))
        except ClientGone:
            return

    async def _pass_on(self, request: Forwarded, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        relay = _Relay(send)
        try:
            await self._try(request, relay)
        except ReplicaLost as error:
            _LOG.error("%s %s failed: %s", request.method, request.path, error)
            await relay.fail(ApiError(500, str(error), kind="server_error", code="engine_failed"))
        except asyncio.CancelledError:
            if not self._closing:
                raise
            words = "the server was closed before this output had ended"
            await relay.fail(ApiError(500, words, kind="server_error", code="engine_failed"))
        except Exception as error:
            if not relay.has_begun:
                raise
            _LOG.exception("%s %s failed", request.method, request.path)
            await relay.fail(api_error(error))
        finally:
            self._running.discard(task)

    async def _try(self, request: Forwarded, relay: _Relay) -> None:
        for attempt in range(_TRIES):
            parts = self._cluster.answer(request)
            try:
                async for part in parts:
                    if part.status == 503 and attempt + 1 < _TRIES:  # its engine has ended, or it is to go
                        raise ReplicaLost(_NO_REPLICA)
                    await relay.write(part)
                await relay.end()
                return
            except ReplicaLost:
                if relay.is_whole:
                    await relay.end()
                    return
                if relay.has_begun or attempt + 1 == _TRIES:
                    raise
                self.retried += 1
                _LOG.warning("%s %s is tried again: %s", request.method, request.path, _NO_REPLICA)
            finally:
                parts.cancel()
            await asyncio.sleep(_PAUSE * 2**attempt)

    async def drain(self, timeout: float | None = None) -> None:
        self._draining = True
        if self._running:
            await asyncio.wait(self._running, timeout=timeout)

    async def close(self) -> None:
        self._draining = self._closing = True
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if not self._closed:
            self._closed = True
            await self._cluster.close()


class _Relay:
    """An answer on its way to its client. ``is_whole``: all of it has been sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_stream = False
        self._missing = 0  # bytes of an answer that is no stream
        self.has_begun = self.is_whole = False

    async def write(self, part: Part) -> None:
        if not self.has_begun:
            self._begin(part)
            await self._send({"type": "http.response.start", "status": part.status, "headers": list(part.headers)})
        self._missing -= len(part.body)
        self.is_whole = part.body.endswith(DONE) if self._is_stream else self._missing == 0
        if part.body:
            await self._send({"type": "http.response.body", "body": part.body, "more_body": True})

    def _begin(self, part: Part) -> None:
        headers = {name.lower(): value for name, value in part.headers}
        self.has_begun = True
        self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        self._missing = int(headers.get(b"content-length", b"0"))

    async def end(self) -> None:
        if not self.has_begun:
            raise ReplicaLost(_NO_REPLICA)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """A status where nothing was sent yet; in a stream an event. Else what was sent lacks its end, as it says."""
        if not (self.has_begun and self._is_stream):
            raise error
        told = f"data: {error.body()}\n\n".encode() + DONE
        await self._send({"type": "http.response.body", "body": told, "more_body": False})
