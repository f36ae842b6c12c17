"""The routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from pearl.serving import chat, completions, errors, models, tokenization
from pearl.serving.async_engine import AsyncEngine
from pearl.serving.chat_markup import ChatMarkup
from pearl.serving.connection import ClientGone
from pearl.serving.guards import ApiKeyGuard, BodyLimit
from pearl.serving.metrics import Gauges, Metrics
from pearl.serving.page_routes import PAGE_PATHS, add_page
from pearl.serving.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from pearl.serving.round_counts import RoundCounts
from pearl.serving.sampling import SamplingDefaults
from pearl.serving.service import Service
from pearl.serving.settings import ServerSettings
from pearl.serving.texts import Texts

HEALTH = "/health"  # without a key: load balancers have none
_NOBODY = 499  # nginx's status for a client that closed the connection; nobody reads it
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": words, "content": {"application/json": {}}}
    for status, words in {
        400: "Something in the request cannot be used; error.param names it",
        401: "No valid API key",
        404: "Another model than the one served",
        413: "The body is too large",
        429: "The queue is full",
        500: "The engine failed",
        503: "The server is shutting down, or its engine has ended",
    }.items()
}


def create_app(engine: AsyncEngine, settings: ServerSettings, defaults: SamplingDefaults) -> FastAPI:
    """An OpenAI-compatible API around ``engine``, which stays the caller's to drain and close."""
    texts, rounds = Texts(engine.llm), RoundCounts()
    engine.observe(rounds)
    markup = ChatMarkup(engine.llm.tokenizer, settings.tool_parser, settings.reasoning_parser)
    metrics = Metrics(settings.name, settings.replica, lambda: _gauges(engine, rounds))
    service = Service(engine, settings, defaults, texts, metrics, markup)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        texts.close()

    # No pages of documentation: they would load scripts from elsewhere. /openapi.json is there.
    app = FastAPI(title="PEARL", docs_url=None, redoc_url=None, lifespan=lifespan)
    errors.install(app)
    app.add_exception_handler(ClientGone, _nobody)
    add_guards(app, settings)
    _add_generation(app, service)
    _add_tokenization(app, service)
    _add_information(app, service)
    add_page(app)
    return app


def add_guards(app: FastAPI, settings: ServerSettings) -> None:
    """Key, body limit, web pages. The last added sees a request first: a browser asks without a key whether it may."""
    app.add_middleware(BodyLimit, limit=settings.max_body)
    if settings.api_key is not None:
        app.add_middleware(ApiKeyGuard, key=settings.api_key, open_paths=(HEALTH, *PAGE_PATHS))
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_REFUSALS)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        return await completions.create_completion(service, body, request)

    @app.post("/v1/chat/completions", responses=_REFUSALS)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        return await chat.create_chat_completion(service, body, request)


def _add_tokenization(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=_REFUSALS)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        return await tokenization.tokenize(service, body)

    @app.post("/detokenize", responses=_REFUSALS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        return await tokenization.detokenize(service, body)

    @app.get("/tokenizer_info", responses=_REFUSALS)
    async def tokenizer_info() -> dict[str, Any]:
        return await tokenization.tokenizer_info(service)


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=_REFUSALS)
    async def list_models() -> dict[str, Any]:
        return models.list_models(service)

    @app.get("/v1/models/{name:path}", responses=_REFUSALS)
    async def retrieve_model(name: str) -> dict[str, Any]:
        return models.retrieve_model(service, name)

    @app.get(HEALTH, responses=_REFUSALS)
    async def health() -> Response:
        return models.health(service)

    @app.get("/version", responses=_REFUSALS)
    async def version() -> dict[str, str]:
        return models.server_version()

    @app.get("/metrics", responses=_REFUSALS)
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_NOBODY)


def _gauges(engine: AsyncEngine, rounds: RoundCounts) -> Gauges:
    """Numbers that the engine's thread writes, each as it is just now."""
    load, prefixes = engine.load, engine.llm.engine.scheduler.target_kv.stats
    return Gauges(
        running=load.running,
        waiting=load.waiting,
        kv_usage=load.kv_usage,
        prefix_queries=prefixes.queried_tokens,
        prefix_hits=prefixes.hit_tokens,
        modes=rounds.by_mode.copy(),
        healthy=engine.health.ok,
    )
