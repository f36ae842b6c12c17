"""Where a server listens, and how it ends: the first signal lets it finish what runs, the second ends it at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from pearl.errors import ConfigurationError

_LOG = logging.getLogger("pearl.serving")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_KEEP_ALIVE = 60  # seconds: longer than clients keep idle connections, so that none is closed under a request
_SLOWEST_READER = 30  # seconds for the last of an answer to reach its client


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket of that address, before anything is loaded; port 0: one that is free. ConfigurationError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        opened = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigurationError(f"{host!r} is no address to listen at: {error}") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise ConfigurationError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
    return opened


def url_of(opened: socket.socket) -> str:
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if opened.family == socket.AF_INET6 else f"http://{host}:{port}"


class Ending(Protocol):
    """What stands behind an app: an engine, or several."""

    async def drain(self, timeout: float | None = None) -> None:
        """Take nothing new, and wait for what runs; at most ``timeout`` seconds."""
        ...

    async def close(self) -> None:
        """Give up what still runs. May be called again."""
        ...


class ServerProcess(uvicorn.Server):
    """uvicorn's server, which would stop listening at the first signal: clients could not be told why.

    It closes the engine. A second signal has its usual effect, which is that the process is gone.
    """

    def __init__(
        self, app: FastAPI, engine: Ending, listening: Callable[[], None], drain_timeout: float | None
    ) -> None:
        """``listening`` is called when requests are accepted. ``drain_timeout``: seconds; None: as long as it takes."""
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_SLOWEST_READER,
        )
        super().__init__(config)
        self._engine, self._listening, self._drain_timeout = engine, listening, drain_timeout
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            await self._engine.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._begin_end, number)
        yield

    def _begin_end(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        for each in _SIGNALS:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        _LOG.info("%s: finishing what runs, refusing new requests; a second signal ends at once", name)
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        """What the time does not suffice for is told so by the engine that closes."""
        try:
            await self._engine.drain(self._drain_timeout)
            await self._engine.close()
        finally:
            self.should_exit = True
