"""GET /v1/models, /health, /version: what is served, and whether it works."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from pearl.installed import DISTRIBUTION, installed_version
from pearl.serving.service import Service


def list_models(service: Service) -> dict[str, Any]:
    return {"object": "list", "data": [_card(service, name) for name in service.settings.names]}


def retrieve_model(service: Service, name: str) -> dict[str, Any]:
    """ApiError if it is not served here."""
    service.require_model(name)
    return _card(service, name)


def _card(service: Service, name: str) -> dict[str, Any]:
    llm = service.engine.llm
    config = llm.config
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "pearl",
        "root": config.target or "bundled",
        "parent": None,
        "max_model_len": llm.max_model_len,
        "default_sampling_params": service.defaults.shown(),
        "pearl": {
            "draft": (config.draft or "bundled") if config.uses_draft else None,
            "method": config.method,
            "verification": config.verification,
        },
    }


def health(service: Service) -> Response:
    """Red too while it drains: what routes requests sends them elsewhere then."""
    state = service.engine.health
    if not state.ok:
        return JSONResponse({"status": "unavailable", "reason": state.reason}, 503)
    if service.engine.draining:
        return JSONResponse({"status": "draining"}, 503)
    return JSONResponse({"status": "ok"})


def server_version() -> dict[str, str]:
    return {"version": installed_version(DISTRIBUTION) or "unknown"}
