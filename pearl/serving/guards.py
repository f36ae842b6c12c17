"""What every request passes before a route sees it. Plain ASGI: what is streamed passes through untouched."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pearl.serving.errors import ApiError


class ApiKeyGuard:
    """Lets in who sends ``Authorization: Bearer KEY``, and everyone to ``open_paths``.

    Spaces around a key do not count. How long the comparison takes says nothing about the key.
    """

    def __init__(self, app: ASGIApp, key: str, open_paths: Collection[str]) -> None:
        self._app, self._digest, self._open = app, _digest(key.strip()), open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open or self._knows(scope):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            401,
            "a valid API key is needed: Authorization: Bearer KEY",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        return hmac.compare_digest(_digest(given.strip()), self._digest) and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class BodyLimit:
    """Refuses bodies of more than ``limit`` bytes: by their declared length at once, else when they exceed it."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal() or int(declared[:19]) > self._limit:
            await self._refusal().response()(scope, receive, send)
            return
        received, started = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLarge:
            if started:
                raise
            await self._refusal().response()(scope, receive, send)

    def _refusal(self) -> ApiError:
        words = f"the body is larger than the {self._limit} bytes that this server reads (--max-body)"
        # What of it is still on its way is not read, so nothing can follow it on this connection.
        return ApiError(413, words, code="body_too_large", headers={"Connection": "close"})


class _TooLarge(BaseException):
    """No Exception: what reads the body would take that for a body that it cannot parse."""
