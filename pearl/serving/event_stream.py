"""Server-sent events: an answer while it grows."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from json import JSONEncoder

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pearl.serving.connection import ClientGone, while_connected
from pearl.serving.errors import api_error

_LOG = logging.getLogger("pearl.serving")
DONE = b"data: [DONE]\n\n"
# JSON allows them in a text, but many clients take them for the end of a line.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}

_encode: Callable[[object], str] = JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def as_json(value: object) -> str:
    """JSON on one line, whatever ends a line to a client; for values of this server alone: no half characters."""
    text = _encode(value)
    return text if text.isascii() else text.translate(_LINE_ENDS)


class EventStream(Response):
    """Writes ``events``, of which the first has come already, and ``[DONE]``; calls ``close`` in any case.

    What fails on the way is an event with an error, since the status has been sent.
    """

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        super().__init__(
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self._first, self._events, self._close = first, events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(send))
        except ClientGone:
            pass
        finally:
            await self._events.aclose()
            self._close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            told = api_error(error)
            if told.code == "internal_error":
                _LOG.exception("a stream failed")
            await send({"type": "http.response.body", "body": f"data: {told.body()}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
