"""An engine whose outputs a test writes: what happens around them is the server's."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

import httpx
from serving_support import settings

from pearl import LLM, SamplingParams
from pearl.grammars import Grammar
from pearl.outputs import FinishReason, RequestMetrics, StreamChunk
from pearl.prompts import ReadPrompt
from pearl.serving.app import create_app
from pearl.serving.health import EngineLoad, Health
from pearl.serving.sampling import SamplingDefaults

BODY = {"prompt": "secret words", "max_tokens": 4}


def chunk(
    text: str, finish_reason: FinishReason | None = None, error: str | None = None, index: int = 0
) -> StreamChunk:
    """One token of that text."""
    return StreamChunk(index, text, (1,), (True,), finish_reason, RequestMetrics(), error, sources=("pre-verify",))


class FakeStream:
    def __init__(self, script: Sequence[StreamChunk | Exception], endless: bool) -> None:
        self._script, self._endless = list(script), endless
        self.cancelled, self.ended = False, False

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> StreamChunk:
        await asyncio.sleep(0)
        if not self._script and self._endless:
            await asyncio.sleep(60)
        if not self._script or self.cancelled:
            self.ended = True
            raise StopAsyncIteration
        item = self._script.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class FakeEngine:
    """``submit`` gives streams of ``script``, then of nothing for a long time if ``endless``; or raises ``refusal``,
    once ``taken`` requests were taken."""

    def __init__(self, llm: LLM, *script: StreamChunk | Exception, endless: bool = False) -> None:
        self.llm, self.script, self.endless = llm, script, endless
        self.refusal: Exception | None = None
        self.taken = 0
        self.shown: Collection[int] = ()
        self.health, self.load, self.draining = Health(True), EngineLoad(0, 0, 0.0), False
        self.streams: list[FakeStream] = []
        self.observers: list[Any] = []
        self.asked: list[tuple[Sequence[int], SamplingParams]] = []

    def observe(self, observer: Any) -> None:
        self.observers.append(observer)

    def forget(self, observer: Any) -> None:
        self.observers = [each for each in self.observers if each is not observer]

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        grammar: Grammar | None = None,
        shown: Collection[int] = (),
    ) -> Any:
        if self.refusal is not None and len(self.streams) >= self.taken:
            raise self.refusal
        ids = prompt_ids.token_ids if isinstance(prompt_ids, ReadPrompt) else prompt_ids
        self.asked.append((ids or (), params))
        self.shown = shown
        self.streams.append(FakeStream(self.script, self.endless))
        return self.streams[-1]


def ask(
    engine: FakeEngine, method: str, path: str, server: dict[str, Any] | None = None, **sent: Any
) -> httpx.Response:
    """One request; ``server``: its settings."""
    app = create_app(engine, settings(**(server or {})), SamplingDefaults.of_openai())  # type: ignore[arg-type]

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **sent)

    return asyncio.run(send())
