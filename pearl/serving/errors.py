"""Every error of the server in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pearl.errors import (
    EngineClosedError,
    EngineDrainingError,
    InvalidRequestError,
    PearlError,
    QueueFullError,
)

_LOG = logging.getLogger("pearl.serving")
_INVALID = "invalid_request_error"
_RETRY_AFTER = {"Retry-After": "1"}  # seconds: a queue moves with every request that ends


class ApiError(Exception):
    """What a client is told. ``param``: the field of the request that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.headers = status, kind, param, code, headers

    def body(self) -> str:
        """JSON in ASCII, whatever the message quotes."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code or self.status}
        return json.dumps({"error": error})

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def api_error(error: Exception) -> ApiError:
    """What a client is told about an error of the library."""
    words = str(error) or type(error).__name__
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, words, param=error.param)
    if isinstance(error, QueueFullError):
        return ApiError(429, words, kind="rate_limit_error", code="queue_full", headers=_RETRY_AFTER)
    if isinstance(error, EngineDrainingError):
        return ApiError(503, words, kind="service_unavailable_error", code="draining", headers=_RETRY_AFTER)
    if isinstance(error, EngineClosedError):
        return ApiError(503, words, kind="service_unavailable_error", code="engine_closed")
    if isinstance(error, PearlError):
        return ApiError(500, words, kind="server_error", code="engine_failed")
    return ApiError(500, "the server failed; its log says why", kind="server_error", code="internal_error")


def install(app: FastAPI) -> None:
    """Let ``app`` answer with errors in this shape, whoever raises them."""
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(PearlError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer)


async def _answer(request: Request, error: Exception) -> Response:
    return _logged(request, api_error(error)).response()


async def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _logged(request, validation_error(error.errors())).response()


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{message}: {request.method} {request.url.path}"
    return _logged(request, ApiError(error.status_code, message, headers=error.headers)).response()


def _logged(request: Request, error: ApiError) -> ApiError:
    """The message is not logged: it may quote the prompt."""
    _LOG.info(
        "%s %s refused: %d %s param=%s", request.method, request.url.path, error.status, error.code or error.kind,
        error.param,
    )  # fmt: skip
    return error


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Of what pydantic found wrong with a body: about its first field, of which there may be several findings."""
    name = _field(errors[0])
    found = dict.fromkeys(str(each["msg"]) for each in errors if _field(each) == name)
    words = "; or: ".join(found)
    if name == "tools":
        return ApiError(400, f"{_place(errors[0])}: {errors[0]['msg']}", param=name)
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {errors[0]['ctx']['error']} at character {errors[0]['loc'][-1]}")
    if name is None:
        return ApiError(400, f"the body must be a JSON object, sent with Content-Type: application/json ({words})")
    return ApiError(400, f"{name}: {words}", param=name)


def _place(error: Mapping[str, Any]) -> str:
    """Of a finding where there are no unions, whose branches would be named too."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"][1:])[1:]


def _field(error: Mapping[str, Any]) -> str | None:
    """Behind the field's name come positions and branches of unions, and names inside objects that forbid others."""
    _, *path = error["loc"]
    if not path or not isinstance(path[0], str):
        return None
    nested = len(path) == 2 and isinstance(path[1], str) and path[0] == "stream_options"
    return ".".join(path) if nested else path[0]
